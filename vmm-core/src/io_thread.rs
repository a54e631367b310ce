//! The thread that serves virtio devices: their queues' doorbells, and the descriptors that they watch.
//!
//! One thread for all of them. It works while the guest runs, and rests while the guest is stopped: it touches nothing
//! then, and holds or owns nothing, so that an exec may end it at any instruction, as it does with the threads of vCPUs
//! (`vcpu/slot.rs`). Whoever takes its memory into another process gets a new one there. What it waits by, an epoll
//! instance, is made anew each time: one that was copied into another process would know descriptors of the first.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use oslib::signals;
use oslib::thread::Thread;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::error::MachineError;
use crate::vcpu;
use crate::virtio::pci::{Bell, VirtioPci};
use crate::virtio::{Direction, WatchToken};

/// Events that are taken at once.
const BATCH: usize = 64;
/// The time limit of a wait that has none.
const FOREVER: i32 = -1;
/// Stack of the thread, in bytes.
const STACK_LEN: usize = 512 * 1024;
/// How long to wait for the system to have an epoll instance again.
const TRY_AGAIN: Duration = Duration::from_millis(100);

/// What the thread is to do, and does.
mod rest {
    /// It serves devices.
    pub(super) const NO: u8 = 0;
    /// It is to rest.
    pub(super) const WANTED: u8 = 1;
    /// It rests.
    pub(super) const YES: u8 = 2;
    /// It is to end.
    pub(super) const QUIT: u8 = 3;
}

/// The thread as its owner sees it.
pub(crate) struct IoThread {
    shared: Arc<Shared>,
    thread: Mutex<Option<Owned>>,
}

/// A thread, and the process that it was started in.
struct Owned {
    handle: Thread,
    process: u32,
}

struct Shared {
    devices: Vec<Arc<VirtioPci>>,
    /// Rung when a device or the owner wants something.
    bell: Bell,
    /// One of the constants in [`rest`].
    rest: AtomicU8,
    /// Held for the moment in which the thread comes to rest, so that whoever has waited for it knows that it holds nothing
    /// any more.
    resting: Mutex<()>,
    rests: Condvar,
}

impl IoThread {
    /// Serves these devices, of which each rings `bell`. The thread rests until it is told to [go on](Self::go_on).
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) fn spawn(devices: Vec<Arc<VirtioPci>>, bell: Bell) -> Result<Self, MachineError> {
        let shared = Shared {
            devices,
            bell,
            rest: AtomicU8::new(rest::WANTED),
            resting: Mutex::new(()),
            rests: Condvar::new(),
        };
        let io = Self { shared: Arc::new(shared), thread: Mutex::new(None) };
        io.recall()?;
        Ok(io)
    }

    fn thread(&self) -> MutexGuard<'_, Option<Owned>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the thread serves the devices and has not been told to rest.
    pub(crate) fn is_serving(&self) -> bool {
        self.shared.is_to_serve()
    }

    /// Has the thread rest soon.
    pub(crate) fn want_rest(&self) {
        let rest = &self.shared.rest;
        if rest.compare_exchange(rest::NO, rest::WANTED, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            self.shared.bell.ring();
        }
    }

    /// Waits until the thread rests as it was told to; tells whether that came to be before `until`.
    pub(crate) fn wait_rests(&self, until: Instant) -> bool {
        let mut resting = self.shared.lock_resting();
        while self.shared.rest.load(Ordering::SeqCst) != rest::YES {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.rests.wait_timeout(resting, left);
            resting = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Has the thread serve the devices again, in the calling process. Each of them is told that the guest goes on, and
    /// offered each of its queues.
    ///
    /// # Errors
    /// No thread could be started.
    pub(crate) fn go_on(&self) -> Result<(), MachineError> {
        self.recall()?;
        if self.shared.rest.swap(rest::NO, Ordering::SeqCst) == rest::YES
            && let Some(thread) = &*self.thread()
        {
            thread.handle.unpark();
        }
        Ok(())
    }

    /// Has a thread in the calling process, which may not be the one that the last one was started in. One that is started
    /// rests at once.
    ///
    /// # Errors
    /// No thread could be started.
    pub(crate) fn recall(&self) -> Result<(), MachineError> {
        let mut thread = self.thread();
        let process = std::process::id();
        if let Some(ended) = thread.take_if(|thread| thread.process != process) {
            ended.handle.bury();
            self.shared.rest.store(rest::WANTED, Ordering::SeqCst);
        }
        if thread.is_none() {
            let shared = Arc::clone(&self.shared);
            let spawned = Thread::spawn("io", STACK_LEN, move || shared.run())
                .map_err(|source| MachineError::Host { what: "the I/O thread", source })?;
            *thread = Some(Owned { handle: spawned, process });
        }
        Ok(())
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.shared.rest.store(rest::QUIT, Ordering::SeqCst);
        self.shared.bell.ring();
        let Some(Owned { handle, process }) = self.thread().take() else { return };
        if process == std::process::id() {
            handle.unpark();
            handle.join();
        } else {
            handle.bury();
        }
    }
}

impl Shared {
    fn lock_resting(&self) -> MutexGuard<'_, ()> {
        self.resting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_to_serve(&self) -> bool {
        self.rest.load(Ordering::SeqCst) == rest::NO
    }

    /// The thread.
    fn run(&self) {
        oslib::keeper::forget_head_start();
        // After an exec every signal is blocked, those of its own mistakes among them.
        if let Err(error) = signals::set_mask(vcpu::quiet_mask()) {
            tracing::error!(%error, "cannot set the signal mask of the I/O thread");
        }
        loop {
            match self.rest.load(Ordering::SeqCst) {
                rest::NO => self.serve(),
                rest::QUIT => return,
                _ => self.rest(),
            }
        }
    }

    fn rest(&self) {
        {
            let _resting = self.lock_resting();
            let wanted =
                self.rest.compare_exchange(rest::WANTED, rest::YES, Ordering::SeqCst, Ordering::SeqCst);
            if wanted.is_err() {
                return;
            }
            self.rests.notify_all();
        }
        while self.rest.load(Ordering::SeqCst) == rest::YES {
            std::thread::park();
        }
    }

    /// Serves the devices until it is to rest.
    fn serve(&self) {
        let mut poller = match Poller::new(&self.devices, &self.bell) {
            Ok(poller) => poller,
            Err(error) => {
                tracing::error!(%error, "devices are not served: the I/O thread cannot wait for them");
                std::thread::sleep(TRY_AGAIN);
                return;
            }
        };
        poller.start(&self.devices);
        while self.is_to_serve() {
            poller.turn(&self.devices, &self.bell, FOREVER, || self.is_to_serve());
        }
    }
}

/// What a descriptor is to the thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Bell,
    Doorbell {
        /// The device.
        index: usize,
        queue: usize,
    },
    /// A device watches it: under these names, for reading and for writing.
    Watched {
        index: usize,
        read: Option<WatchToken>,
        write: Option<WatchToken>,
    },
}

impl Source {
    fn set(self) -> EventSet {
        match self {
            Source::Bell | Source::Doorbell { .. } => EventSet::IN,
            Source::Watched { read, write, .. } => {
                let mut set = EventSet::empty();
                set.set(EventSet::IN, read.is_some());
                set.set(EventSet::OUT, write.is_some());
                set
            }
        }
    }

    /// What of it is meant by these events. An end or an error is news for either direction.
    fn narrowed(self, events: u32) -> Source {
        let has = |set: EventSet| events & (set | EventSet::ERROR | EventSet::HANG_UP).bits() != 0;
        match self {
            Source::Watched { index, read, write } => Source::Watched {
                index,
                read: read.filter(|_| has(EventSet::IN)),
                // Not twice under one name.
                write: write
                    .filter(|token| has(EventSet::OUT) && !(read == Some(*token) && has(EventSet::IN))),
            },
            other => other,
        }
    }
}

/// Waits for all of them, and has the devices answer.
pub(crate) struct Poller {
    epoll: Epoll,
    sources: BTreeMap<RawFd, Source>,
    /// Of each device the queues whose doorbells others answer.
    ignored: Vec<Vec<usize>>,
    events: [EpollEvent; BATCH],
}

impl Poller {
    /// Waits for `bell` and for the doorbells of these devices.
    pub(crate) fn new(devices: &[Arc<VirtioPci>], bell: &Bell) -> std::io::Result<Self> {
        let mut poller = Self {
            epoll: Epoll::new()?,
            sources: BTreeMap::new(),
            ignored: vec![Vec::new(); devices.len()],
            events: [EpollEvent::default(); BATCH],
        };
        poller.add(bell.0.as_raw_fd(), Source::Bell)?;
        for (index, device) in devices.iter().enumerate() {
            for (queue, doorbell) in device.doorbells().iter().enumerate() {
                poller.add(doorbell.as_raw_fd(), Source::Doorbell { index, queue })?;
            }
        }
        Ok(poller)
    }

    /// The guest goes on: the devices, which are those that this was made for, are told so.
    pub(crate) fn start(&mut self, devices: &[Arc<VirtioPci>]) {
        for (index, device) in devices.iter().enumerate() {
            // Whoever changes something from here on rings again.
            device.take_changed();
            device.go_on();
            self.look_at(index, device);
        }
    }

    /// Waits for at most `timeout_ms` until something is ready, and has it answered, for as long as `is_to_serve`.
    pub(crate) fn turn(
        &mut self,
        devices: &[Arc<VirtioPci>],
        bell: &Bell,
        timeout_ms: i32,
        is_to_serve: impl Fn() -> bool,
    ) {
        for source in self.wait(timeout_ms) {
            if !is_to_serve() {
                return;
            }
            match source {
                Source::Bell => self.answer_bell(devices, bell),
                Source::Doorbell { index, queue } => {
                    devices[index].rung(queue);
                    self.look_at(index, &devices[index]);
                }
                Source::Watched { index, read, write } => {
                    let device = &devices[index];
                    read.into_iter().chain(write).for_each(|token| device.fd_ready(token));
                    self.look_at(index, device);
                }
            }
        }
    }

    fn answer_bell(&mut self, devices: &[Arc<VirtioPci>], bell: &Bell) {
        if let Err(error) = bell.0.drain() {
            tracing::error!(%error, "cannot silence the I/O thread's bell");
        }
        for (index, device) in devices.iter().enumerate().filter(|(_, device)| device.take_changed()) {
            self.look_at(index, device);
        }
    }

    fn add(&mut self, fd: RawFd, source: Source) -> std::io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(source.set(), fd as u64))?;
        self.sources.insert(fd, source);
        Ok(())
    }

    /// Waits for what the device watches from now on, and for those of its doorbells that are ours to answer.
    fn look_at(&mut self, index: usize, device: &VirtioPci) {
        device.watches(|watches, ignored| {
            self.ignore(index, device, ignored);
            let mut wanted: BTreeMap<RawFd, Source> = BTreeMap::new();
            for watch in watches {
                let none = Source::Watched { index, read: None, write: None };
                let source = wanted.entry(watch.fd.as_raw_fd()).or_insert(none);
                if let Source::Watched { read, write, .. } = source {
                    match watch.direction {
                        Direction::Read => *read = Some(watch.token),
                        Direction::Write => *write = Some(watch.token),
                    }
                }
            }
            let is_stale = |fd: &RawFd, source: &mut Source| {
                matches!(source, Source::Watched { index: at, .. } if *at == index)
                    && wanted.get(fd) != Some(source)
            };
            let stale: Vec<_> = self.sources.extract_if(.., is_stale).map(|(fd, _)| fd).collect();
            for fd in stale {
                // One that was closed is out of it already.
                let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
            }
            for (fd, source) in wanted {
                if !self.sources.contains_key(&fd)
                    && let Err(error) = self.add(fd, source)
                {
                    tracing::error!(%error, fd, "a descriptor of a device cannot be watched");
                }
            }
        });
    }

    fn ignore(&mut self, index: usize, device: &VirtioPci, queues: &[usize]) {
        if self.ignored[index] == queues {
            return;
        }
        for (queue, doorbell) in device.doorbells().iter().enumerate() {
            let fd = doorbell.as_raw_fd();
            match (self.ignored[index].contains(&queue), queues.contains(&queue)) {
                (false, true) => {
                    self.sources.remove(&fd);
                    let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
                }
                (true, false) => {
                    if let Err(error) = self.add(fd, Source::Doorbell { index, queue }) {
                        tracing::error!(%error, queue, "a doorbell of a device cannot be answered");
                    }
                }
                _ => {}
            }
        }
        self.ignored[index] = queues.to_vec();
    }

    fn wait(&mut self, timeout_ms: i32) -> Vec<Source> {
        let count = match self.epoll.wait(timeout_ms, &mut self.events) {
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => 0,
            Err(error) => {
                tracing::error!(%error, "the I/O thread cannot wait");
                std::thread::sleep(TRY_AGAIN);
                0
            }
        };
        let ready = self.events[..count].iter();
        ready.filter_map(|event| Some(self.sources.get(&event.fd())?.narrowed(event.events()))).collect()
    }
}

#[cfg(test)]
mod tests;
