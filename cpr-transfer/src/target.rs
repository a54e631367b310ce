//! The target's half: listens for a source, and takes what it gives.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cpr_core::error::BoxError;
use cpr_core::fault::{self, Point};
use cpr_core::frame::{Frame, FrameWriter, sealed_memfd};
use cpr_core::ownership::Owner;
use cpr_core::preflight::{Manifest, SectionCatalogue, Verdict};
use cpr_core::{Arrival, Control, FdRegistry, LiveMain, MainSource, Wait};
use oslib::eventfd::EventFd;
use oslib::pidfd::PidFd;
use oslib::{stream, uds};

use crate::mode_info;
use crate::protocol::{Heard, Introduction, Link, PeerError, process_of};

/// Why nobody can be listened to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// The path cannot be bound; a listener that lives there is left alone.
    #[error(transparent)]
    Bind(#[from] uds::BindError),
    /// The descriptor is something else.
    #[error("the descriptor is no listening unix stream socket")]
    NotListening,
    /// The listener failed.
    #[error("cannot accept a connection: {0}")]
    Io(#[from] std::io::Error),
    /// No source came.
    #[error("no source connected within {0:?}")]
    Late(Duration),
}

/// How long a peer may keep silent.
const PEER_TIME: Duration = Duration::from_secs(5);
/// How long a source may take to stop its guest and save it.
const SAVED_WITHIN: Duration = Duration::from_secs(20);
/// Permissions of the socket.
const MODE: u32 = 0o600;

/// A target that waits for its source.
///
/// It never blocks for longer than a message that has begun to arrive takes, two seconds at most. A path that it bound goes
/// with it.
#[derive(Debug)]
pub struct Listener {
    socket: Arc<OwnedFd>,
    path: Option<PathBuf>,
    peer: Option<Peer>,
    patience: Duration,
    judge: Judge,
}

/// Says whether this program could take over what a manifest shows.
struct Judge(Box<dyn FnMut(&Manifest) -> Verdict + Send>);

impl std::fmt::Debug for Judge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Judge")
    }
}

impl Default for Judge {
    fn default() -> Self {
        Judge(Box::new(|_| {
            Verdict::Refused(vec!["this program cannot say whether it could take over".into()])
        }))
    }
}

/// What this mode's receiving end reads, for the catalogue of a host that answers a preflight.
pub fn catalogue() -> SectionCatalogue {
    SectionCatalogue::default().requires(FdRegistry::SECTION, 1..=1)
}

/// A connection that may become the source's.
#[derive(Debug)]
struct Peer {
    link: Link,
    watched: Arc<OwnedFd>,
    said_hello: bool,
    deadline: Instant,
}

/// What a peer's news make of it.
enum News {
    None,
    Greeted,
    Introduced(Box<TransferArrival>),
}

impl Listener {
    /// Listens on `path`, for this user only. A socket that a dead process left is replaced, a living one is not.
    ///
    /// # Errors
    /// [`ListenError::Bind`].
    pub fn bind(path: impl Into<PathBuf>) -> Result<Listener, ListenError> {
        let path = path.into();
        let socket = uds::bind(&path, MODE)?;
        let mut listener = Listener::on(socket)?;
        listener.path = Some(path);
        Ok(listener)
    }

    /// Listens on a socket that somebody else made ready.
    ///
    /// # Errors
    /// [`ListenError::NotListening`].
    pub fn from_fd(socket: OwnedFd) -> Result<Listener, ListenError> {
        if !uds::is_listening(&socket) {
            return Err(ListenError::NotListening);
        }
        Listener::on(socket.into())
    }

    fn on(socket: UnixListener) -> Result<Listener, ListenError> {
        socket.set_nonblocking(true)?;
        Ok(Listener {
            socket: Arc::new(socket.into()),
            path: None,
            peer: None,
            patience: PEER_TIME,
            judge: Judge::default(),
        })
    }

    /// How long a peer may keep silent before the next one gets its turn, 5 s by default.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Listener {
        self.patience = patience;
        self
    }

    /// How this program answers a source that asks beforehand whether it could take over. Without it the answer is no.
    #[must_use]
    pub fn answering(mut self, judge: impl FnMut(&Manifest) -> Verdict + Send + 'static) -> Listener {
        self.judge = Judge(Box::new(judge));
        self
    }

    /// When to [poll](Self::poll) next.
    pub fn wait(&self) -> Wait {
        let mut fds = vec![self.socket.clone()];
        fds.extend(self.peer.iter().map(|peer| peer.watched.clone()));
        Wait { fds, deadline: self.peer.as_ref().map(|peer| peer.deadline) }
    }

    /// Goes on with what came, without waiting. A peer that is no source, or breaks off, is told so where it can be, and
    /// logged; it does no harm.
    ///
    /// # Errors
    /// [`ListenError::Io`]: the listener itself failed.
    pub fn poll(&mut self) -> Result<Option<TransferArrival>, ListenError> {
        loop {
            // Before the next one is let in: who came only to look has gone by now.
            if let Some(arrival) = self.hear_peer() {
                return Ok(Some(arrival));
            }
            match stream::accept_nonblocking(&self.socket)? {
                Some(connection) => self.welcome(connection.into()),
                None => return Ok(None),
            }
        }
    }

    fn hear_peer(&mut self) -> Option<TransferArrival> {
        loop {
            match self.peer.as_mut()?.news(self.patience, &mut self.judge) {
                Ok(News::None) => return None,
                Ok(News::Greeted) => {}
                Ok(News::Introduced(arrival)) => {
                    self.peer = None;
                    return Some(*arrival);
                }
                Err(error) => self.peer.take()?.dismiss(&error),
            }
        }
    }

    /// Waits for a source, `limit` at most, for a program without a loop.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn receive(&mut self, limit: Duration) -> Result<TransferArrival, ListenError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(arrival) = self.poll()? {
                return Ok(arrival);
            }
            if Instant::now() >= deadline {
                return Err(ListenError::Late(limit));
            }
            // One descriptor at a time is enough to wait for, if the others are looked at often.
            let wait = self.wait();
            if let Some(fd) = wait.fds.last() {
                stream::wait_readable_for(fd, Duration::from_millis(10))?;
            }
        }
    }

    fn welcome(&mut self, stream: UnixStream) {
        let began = || -> Result<Peer, PeerError> {
            let link = Link::new(stream)?;
            if self.peer.is_some() {
                link.refuse("another source is connected already")?;
                return Err(PeerError::OutOfTurn);
            }
            if let Err(error) = link.check_user() {
                let _ = link.refuse(&error.to_string());
                return Err(error);
            }
            let watched = Arc::new(link.as_fd().try_clone_to_owned()?);
            Ok(Peer { link, watched, said_hello: false, deadline: Instant::now() + self.patience })
        };
        match began() {
            Ok(peer) => self.peer = Some(peer),
            Err(error) => tracing::warn!(%error, "a connection to the cpr channel was refused"),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Peer {
    fn news(&mut self, patience: Duration, judge: &mut Judge) -> Result<News, BoxError> {
        if !self.link.is_readable()? {
            if Instant::now() >= self.deadline {
                return Err(PeerError::Silent(patience).into());
            }
            return Ok(News::None);
        }
        match (self.said_hello, self.link.hear()?) {
            (false, Heard::Hello(_)) => {
                self.link.hello(Some(&PidFd::of_self()?))?;
                self.said_hello = true;
                self.deadline = Instant::now() + patience;
                Ok(News::Greeted)
            }
            (true, Heard::Manifest(frame)) => {
                let mut frame = Frame::read_memfd(&frame)?;
                let manifest = Manifest::take_from(&mut frame)?;
                fault::at(Point::Judge)?;
                let verdict = judge.0(&manifest);
                let mut answer = FrameWriter::default();
                verdict.put_into(&mut answer)?;
                let answer = fault::pass(Point::Verdict, answer.finish(frame.epoch))?;
                self.link.judge(&sealed_memfd("cpr-verdict", &answer)?)?;
                self.deadline = Instant::now() + patience;
                Ok(News::Greeted)
            }
            (true, Heard::Introduction(own, registry)) => {
                let link = Link::new(UnixStream::from(self.link.as_fd().try_clone_to_owned()?))?;
                Ok(News::Introduced(Box::new(take_over(link, own, registry)?)))
            }
            _ => Err(PeerError::OutOfTurn.into()),
        }
    }

    fn dismiss(&self, error: &BoxError) {
        // Somebody who asks whether there is a listener comes and goes without a word.
        if matches!(
            error.downcast_ref(),
            Some(PeerError::Receive(oslib::scm::RecvError::Closed)) if !self.said_hello
        ) {
            return;
        }
        tracing::warn!(%error, "the cpr channel waits for another source");
        let _ = self.link.refuse(&error.to_string());
    }
}

/// An update that arrived by transfer.
#[derive(Debug)]
pub struct TransferArrival {
    /// For [`cpr_core::Incoming::begin`].
    pub arrival: Arrival,
    /// The process that still runs the guest.
    pub source: SourceEnd,
}

/// The target's end of the source.
#[derive(Debug)]
pub struct SourceEnd {
    link: Link,
    process: Arc<OwnedFd>,
    watched: Arc<OwnedFd>,
    doorbell: Arc<EventFd>,
    control: Control,
    main: Arc<OwnedFd>,
}

fn take_over(
    link: Link,
    own: Introduction<OwnedFd>,
    registry: Vec<OwnedFd>,
) -> Result<TransferArrival, BoxError> {
    let mut early = Frame::read_memfd(&own.early)?;
    fault::at(Point::Receive)?;
    let table = early.require(FdRegistry::SECTION, 0)?;
    let mut registry: Vec<Option<OwnedFd>> = registry.into_iter().map(Some).collect();
    let names = FdRegistry::decode(&table, |_, token| {
        let place = usize::try_from(token).ok().and_then(|at| registry.get_mut(at));
        place.and_then(Option::take).ok_or_else(|| "it did not come with the message".into())
    })?;
    let left = registry.iter().flatten().count();
    if left > 0 {
        return Err(format!("{left} descriptors came without a name").into());
    }
    let control = Control::attach(Arc::new(own.control), early.epoch)?;
    let process = Arc::new(OwnedFd::from(process_of(own.process)?));
    let source = SourceEnd {
        watched: Arc::new(link.as_fd().try_clone_to_owned()?),
        link,
        process,
        doorbell: Arc::new(EventFd::from(own.doorbell)),
        control: control.clone(),
        main: Arc::new(own.main),
    };
    fault::at(Point::Received)?;
    // From here on the source waits for the end of this process if it fails.
    control.rendezvous().note_progress();
    Ok(TransferArrival { arrival: Arrival { mode: mode_info(), early, registry: names, control }, source })
}

/// The memfd that the source writes the main frame to.
struct SharedMain(Arc<OwnedFd>);

impl MainSource for SharedMain {
    fn read_main(&mut self) -> Result<Frame, BoxError> {
        Ok(Frame::read_memfd(&self.0)?)
    }
}

impl SourceEnd {
    /// The main frame, for [`cpr_core::Incoming::load`]. Reading means: ask for the state, and wait for it.
    pub fn main(&self) -> Box<dyn MainSource> {
        let shared = Box::new(SharedMain(self.main.clone()));
        let live = LiveMain::new(self.control.clone(), self.doorbell.clone(), SAVED_WITHIN, shared);
        Box::new(live.watching(self.process.clone()))
    }

    /// Whether there is still a source that would give the guest. Look again when [`watched`](Self::watched) says so.
    ///
    /// # Errors
    /// Why there is none.
    pub fn check(&self) -> Result<(), BoxError> {
        if self.control.ownership().owner() != Some(Owner::Source) {
            return Err("the source took the guest back".into());
        }
        if stream::is_readable(&self.process)? || self.link.is_readable()? {
            return Err("the source ended before it gave the state".into());
        }
        Ok(())
    }

    /// Each becomes readable when the source is gone, or takes the guest back.
    pub fn watched(&self) -> [Arc<OwnedFd>; 2] {
        [self.watched.clone(), self.process.clone()]
    }

    /// Tells the source that the ownership word has flipped: its guest is here.
    ///
    /// # Errors
    /// The doorbell cannot be rung.
    pub fn release(self) -> std::io::Result<()> {
        self.doorbell.signal()
    }

    /// Tells the source why this program cannot take its guest. This process must end now: the source waits for that.
    pub fn refuse(self, reason: &str) {
        if let Err(error) = self.link.refuse(reason) {
            tracing::debug!(%error, "the source is not told");
        }
    }
}
