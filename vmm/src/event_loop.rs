//! The main loop's waiting: which descriptors are interesting now, and which of them are ready.
//!
//! event-manager does the epoll; this module turns its callbacks into a list, so that the program handles events
//! with all of itself at hand, and lets the program state its interests as a whole instead of editing them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};

/// What a descriptor is to the program; given back when it is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Token {
    /// Signals arrived.
    Signals,
    /// A vCPU tells something.
    Vcpus,
    /// A chardev's listener has a connection. The number is the chardev's place in the list.
    Accept(usize),
    /// A chardev's peer can be read, written, or is gone.
    Peer(usize),
    /// The output side of a chardev whose two sides are different descriptors.
    Output(usize),
    /// A chardev's peer did not take all of what a thread of the guest has written.
    LeftOver(usize),
    /// A console of the guest has room for input again.
    Room,
    /// A keeper ended.
    Keeper,
    /// The update under way can go on.
    Update,
    /// The program that this one waits for, or waits for the end of, has news.
    Incoming,
}

/// A descriptor that is ready.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    /// Which.
    pub token: Token,
    /// Can be read, or is at its end.
    pub readable: bool,
    /// Can be written.
    pub writable: bool,
}

/// One interest: descriptor, meaning, direction.
#[derive(Clone)]
pub struct Interest {
    fd: RawFd,
    token: Token,
    set: EventSet,
    /// Keeps the descriptor open while it is watched: a number that was closed and given out again would not be
    /// watched, and nobody would notice.
    _hold: Option<Arc<dyn AsFd>>,
}

impl Interest {
    /// Wants to know when `fd` can be read.
    pub fn read<T: AsFd + 'static>(fd: &Arc<T>, token: Token) -> Interest {
        Interest { set: EventSet::IN, _hold: Some(fd.clone()), ..Interest::read_forever(fd, token) }
    }

    /// Wants to know when `fd` can be written.
    pub fn write<T: AsFd + 'static>(fd: &Arc<T>, token: Token) -> Interest {
        Interest { set: EventSet::OUT, ..Interest::read(fd, token) }
    }

    /// Wants to know when `fd`, which stays open for as long as the loop is there, can be read.
    pub fn read_forever(fd: &impl AsFd, token: Token) -> Interest {
        Interest { fd: fd.as_fd().as_raw_fd(), token, set: EventSet::IN, _hold: None }
    }
}

struct Fd(RawFd);

impl AsRawFd for Fd {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

/// Collects what is ready.
#[derive(Default)]
struct Collector {
    ready: Vec<(RawFd, EventSet)>,
}

impl MutEventSubscriber for Collector {
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        self.ready.push((events.fd(), events.event_set()));
    }

    fn init(&mut self, _ops: &mut EventOps) {}
}

/// The waiting half of the main loop.
pub struct EventLoop {
    manager: EventManager<Collector>,
    collector: SubscriberId,
    interests: BTreeMap<RawFd, Interest>,
    /// Regular files cannot be polled; they are always ready.
    always: Vec<(RawFd, Token, EventSet)>,
}

impl EventLoop {
    /// A loop without interests.
    ///
    /// # Errors
    /// No epoll instance can be made.
    pub fn new() -> anyhow::Result<EventLoop> {
        let mut manager = EventManager::new()?;
        let collector = manager.add_subscriber(Collector::default());
        Ok(EventLoop { manager, collector, interests: BTreeMap::new(), always: Vec::new() })
    }

    /// Makes `wanted` the interests, whatever they were. A descriptor may stand in it twice, once per direction.
    ///
    /// # Errors
    /// A descriptor cannot be polled.
    pub fn set_interests(&mut self, wanted: impl IntoIterator<Item = Interest>) -> anyhow::Result<()> {
        let mut next: BTreeMap<RawFd, Interest> = BTreeMap::new();
        for interest in wanted {
            let set = interest.set;
            next.entry(interest.fd).or_insert(interest).set |= set;
        }
        let stays = |fd: &RawFd, old: &Interest| {
            next.get(fd).is_some_and(|new| (new.token, new.set) == (old.token, old.set))
        };
        let mut ops = self.manager.event_ops(self.collector)?;
        let gone: Vec<_> = self.interests.extract_if(.., |fd, old| !stays(fd, old)).collect();
        for (fd, _still_open) in &gone {
            match self.always.iter().position(|(always, ..)| always == fd) {
                Some(at) => drop(self.always.swap_remove(at)),
                None => ops.remove(Events::empty(&Fd(*fd)))?,
            }
        }
        for (fd, interest) in next {
            if self.interests.contains_key(&fd) {
                continue;
            }
            match ops.add(Events::new(&Fd(fd), interest.set)) {
                Ok(()) => {}
                Err(event_manager::Error::Epoll(error))
                    if kind(&error) == io::ErrorKind::PermissionDenied =>
                {
                    self.always.push((fd, interest.token, interest.set));
                }
                Err(error) => return Err(error.into()),
            }
            self.interests.insert(fd, interest);
        }
        Ok(())
    }

    /// Waits until something is ready, or `timeout` is over.
    ///
    /// # Errors
    /// The epoll call fails.
    pub fn wait(&mut self, timeout: Option<Duration>) -> anyhow::Result<Vec<Ready>> {
        let timeout_ms = match timeout {
            _ if !self.always.is_empty() => 0,
            // Rounded up, so that a deadline has passed when it is looked at.
            Some(timeout) => i32::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX),
            None => -1,
        };
        match self.manager.run_with_timeout(timeout_ms) {
            Ok(_) => {}
            Err(event_manager::Error::Epoll(error)) if kind(&error) == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
        let collector = self.manager.subscriber_mut(self.collector)?;
        let mut ready: Vec<_> = std::mem::take(&mut collector.ready)
            .into_iter()
            .filter_map(|(fd, set)| {
                let token = self.interests.get(&fd)?.token;
                let ended = set.intersects(EventSet::HANG_UP | EventSet::ERROR | EventSet::READ_HANG_UP);
                Some(Ready {
                    token,
                    readable: ended || set.contains(EventSet::IN),
                    writable: set.contains(EventSet::OUT),
                })
            })
            .collect();
        ready.extend(self.always.iter().map(|&(_, token, set)| Ready {
            token,
            readable: set.contains(EventSet::IN),
            writable: set.contains(EventSet::OUT),
        }));
        Ok(ready)
    }
}

/// What kind of error an errno of event-manager is: EPERM for a regular file, EINTR for a signal.
fn kind(error: &vmm_sys_util::errno::Error) -> io::ErrorKind {
    io::Error::from_raw_os_error(error.errno()).kind()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, Arc<UnixStream>) {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(b"x").unwrap();
        (a, Arc::new(b))
    }

    #[test]
    fn interests_follow_what_is_asked_for() {
        let mut event_loop = EventLoop::new().unwrap();
        let (_a, b) = pair();
        let now = Some(Duration::ZERO);
        assert!(event_loop.wait(now).unwrap().is_empty());

        event_loop.set_interests([Interest::read(&b, Token::Peer(3))]).unwrap();
        let ready = event_loop.wait(now).unwrap();
        assert!(matches!(ready[..], [Ready { token: Token::Peer(3), readable: true, writable: false }]));

        let both = [Interest::read(&b, Token::Peer(3)), Interest::write(&b, Token::Peer(3))];
        event_loop.set_interests(both).unwrap();
        let ready = event_loop.wait(now).unwrap();
        assert!(matches!(ready[..], [Ready { token: Token::Peer(3), readable: true, writable: true }]));

        event_loop.set_interests([]).unwrap();
        assert!(event_loop.wait(now).unwrap().is_empty());
    }

    #[test]
    fn a_regular_file_is_always_ready() {
        let mut event_loop = EventLoop::new().unwrap();
        let file = Arc::new(tempfile::tempfile().unwrap());
        event_loop.set_interests([Interest::read(&file, Token::Peer(0))]).unwrap();
        assert_eq!(event_loop.wait(None).unwrap().len(), 1);
        event_loop.set_interests([]).unwrap();
        assert!(event_loop.wait(Some(Duration::ZERO)).unwrap().is_empty());
    }

    #[test]
    fn a_watched_descriptor_stays_open_and_so_its_number_unused() {
        let mut event_loop = EventLoop::new().unwrap();
        for _ in 0..3 {
            let (a, b) = pair();
            let number = b.as_raw_fd();
            event_loop.set_interests([Interest::read(&b, Token::Signals)]).unwrap();
            drop((a, b));
            // The owner is gone, and the end of the stream is seen all the same.
            assert!(event_loop.wait(Some(Duration::ZERO)).unwrap()[0].readable);
            let (_c, d) = pair();
            assert_ne!(d.as_raw_fd(), number);
            event_loop.set_interests([Interest::read(&d, Token::Signals)]).unwrap();
            assert_eq!(event_loop.wait(Some(Duration::ZERO)).unwrap().len(), 1);
            event_loop.set_interests([]).unwrap();
        }
    }
}
