//! The source's half: finds the target, gives it what it builds from, and hands the state over in shared memory.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cpr_core::error::BoxError;
use cpr_core::fault::{self, Point};
use cpr_core::frame::{Frame, FrameWriter, sealed_memfd};
use cpr_core::ownership::{Epoch, Owner};
use cpr_core::preflight::{Asked, Manifest, Verdict};
use cpr_core::{
    Attempt, Course, CprMode, FdRegistry, HandOver, Introduced, ModeId, Prepared, Properties, Stamp,
    StateWriter, TargetPhase, Wait, Watchdog,
};
use oslib::eventfd::EventFd;
use oslib::memfd::{self, Memfd};
use oslib::pidfd::PidFd;
use oslib::uds;

use crate::protocol::{Heard, Introduction, Link, MAX_FDS, PeerError, process_of};
use crate::{MODE, PROPERTIES};

/// Where the target is.
#[derive(Debug)]
pub enum Endpoint {
    /// It listens on this path.
    Path(PathBuf),
    /// It is at the other end of this connection.
    Connected(UnixStream),
}

/// How long a target may take to answer, and how long it may go without progress while the guest stands still.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long it may go without progress while it builds, which costs the guest nothing.
const BUILD_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two attempts to connect to a target whose queue is full.
const QUEUE_POLL: Duration = Duration::from_millis(20);
/// How long a target that was told to end may take before it is killed: while the guest runs, and while it stands still.
const ENDS_WITHIN: Duration = Duration::from_secs(5);
const ENDS_SOON: Duration = Duration::from_secs(2);
/// And how long after that.
const KILLED_WITHIN: Duration = Duration::from_secs(10);

/// One attempt in the cpr-transfer mode.
#[derive(Debug)]
pub struct CprTransfer {
    endpoint: Option<Endpoint>,
    /// For messages.
    place: String,
    stays: Vec<String>,
    timeout: Duration,
    watchdog: Watchdog,
    /// When the target must have answered.
    deadline: Option<Instant>,
    link: Option<Link>,
    target: Option<Target>,
    /// The target was shown the manifest.
    has_asked: bool,
}

/// A target that has answered.
#[derive(Debug)]
struct Target {
    process: PidFd,
    doorbell: EventFd,
    main: Arc<OwnedFd>,
    /// It has the descriptors: from now on it must be seen to end before the guest goes on without it.
    is_introduced: bool,
    /// It has said why it cannot take over.
    has_refused: bool,
    /// It was given the state, for which the guest stands still.
    has_state: bool,
    /// Doorbell, connection and process, for the host's loop.
    watched: Vec<Arc<OwnedFd>>,
}

impl CprTransfer {
    /// Will transfer to the target at `endpoint`.
    pub fn new(endpoint: Endpoint) -> CprTransfer {
        let place = match &endpoint {
            Endpoint::Path(path) => format!("'{}'", path.display()),
            Endpoint::Connected(_) => "the other end of the cpr channel".into(),
        };
        CprTransfer {
            endpoint: Some(endpoint),
            place,
            stays: Vec::new(),
            timeout: TIMEOUT,
            watchdog: Watchdog::new(Some(BUILD_TIMEOUT), None),
            deadline: None,
            link: None,
            target: None,
            has_asked: false,
        }
    }

    /// Leaves the registry's descriptors of these names behind: what belongs to this process rather than to the guest.
    #[must_use]
    pub fn leaving(mut self, names: Vec<String>) -> CprTransfer {
        self.stays = names;
        self
    }

    /// How long the target may take to answer, and to take over once the guest stands still, 5 s by default; how long it may
    /// go without progress while it builds, 30 s by default; and how long its user may take to say where the state comes from
    /// (`-incoming defer`), for ever by default.
    #[must_use]
    pub fn time_limits(mut self, answer: Duration, build: Duration, defer: Option<Duration>) -> CprTransfer {
        self.timeout = answer;
        self.watchdog = Watchdog::new(Some(build), defer);
        self
    }

    /// Says hello, if the target takes connections now.
    fn connect(&mut self) -> Result<Option<Link>, BoxError> {
        let stream = match self.endpoint.take() {
            Some(Endpoint::Path(path)) => match uds::connect_now(&path) {
                Ok(stream) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.endpoint = Some(Endpoint::Path(path));
                    return Ok(None);
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    return Err(format!("nobody listens at {} any more", self.place).into());
                }
                Err(error) => return Err(format!("cannot connect to {}: {error}", self.place).into()),
            },
            Some(Endpoint::Connected(stream)) => stream,
            None => return Err("the cpr channel was used already".into()),
        };
        let link = Link::new(stream)?;
        link.check_user()?;
        match link.hello(None) {
            // It has said why, which is read next.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            other => other.map_err(PeerError::Io)?,
        }
        Ok(Some(link))
    }

    fn answer(&self, link: &Link) -> Result<Target, BoxError> {
        let heard = link.hear().map_err(|error| format!("{}: {error}", self.place))?;
        let Heard::Hello(fds) = heard else { return Err(PeerError::OutOfTurn.into()) };
        let found = fds.len();
        let [process] =
            <[OwnedFd; 1]>::try_from(fds).map_err(|_| PeerError::Descriptors { expected: 1, found })?;
        let process = process_of(process)?;
        let doorbell = EventFd::new()?;
        let mut watched = Vec::new();
        for fd in [doorbell.as_fd(), link.as_fd(), process.as_fd()] {
            watched.push(Arc::new(fd.try_clone_to_owned()?));
        }
        let main = Arc::new(Memfd::new("cpr-main").create()?);
        Ok(Target {
            process,
            doorbell,
            main,
            is_introduced: false,
            has_refused: false,
            has_state: false,
            watched,
        })
    }

    /// Finds the target and exchanges greetings with it, once. What is to be waited for before it is called again.
    fn greet(&mut self) -> Result<Option<Wait>, BoxError> {
        if self.target.is_some() {
            return Ok(None);
        }
        let now = Instant::now();
        let deadline = *self.deadline.get_or_insert(now + self.timeout);
        let is_late = now >= deadline;
        if self.link.is_none() {
            self.link = self.connect()?;
        }
        let Some(link) = &self.link else {
            if is_late {
                return Err(format!("{} takes no connections: its queue is full", self.place).into());
            }
            return Ok(Some(Wait { fds: Vec::new(), deadline: Some(now + QUEUE_POLL) }));
        };
        if !link.is_readable()? {
            if is_late {
                return Err(format!("{}: {}", self.place, PeerError::Silent(self.timeout)).into());
            }
            let fds = vec![Arc::new(link.as_fd().try_clone_to_owned()?)];
            return Ok(Some(Wait { fds, deadline: Some(deadline) }));
        }
        self.target = Some(self.answer(link)?);
        Ok(None)
    }

    /// The manifest as the target is to see it.
    fn manifest_frame(&self, manifest: &Manifest, epoch: Epoch) -> Result<OwnedFd, BoxError> {
        let mut manifest = manifest.clone().section(FdRegistry::SECTION, 0, 1..=1);
        manifest.descriptors.retain(|entry| !self.stays.contains(&entry.name));
        let mut frame = FrameWriter::default();
        manifest.put_into(&mut frame)?;
        let frame = fault::pass(Point::Manifest, frame.finish(epoch))?;
        Ok(sealed_memfd("cpr-manifest", &frame)?)
    }

    fn parts(&self) -> Result<(&Link, &Target), BoxError> {
        self.link.as_ref().zip(self.target.as_ref()).ok_or_else(|| "there is no target".into())
    }

    /// What the target is doing.
    fn look_at_target(&mut self, attempt: &Attempt<'_>) -> Result<(TargetPhase, Wait), BoxError> {
        let (link, target) = self.parts()?;
        // Before the words are read: a ring that comes between the two wakes the next wait.
        target.doorbell.drain()?;
        let is_ours = || attempt.control.ownership().owner() == Some(Owner::Source);
        if is_ours() && link.is_readable()? {
            match link.hear() {
                // One that nobody waits for any more.
                Ok(Heard::Verdict(_)) => {}
                Ok(_) => return Err(PeerError::OutOfTurn.into()),
                // It can have committed meanwhile, as the last thing it did.
                Err(PeerError::Receive(_)) if !is_ours() => {}
                Err(PeerError::Receive(_)) => return Err("the target ended before it took over".into()),
                Err(error) => {
                    if let Some(target) = &mut self.target {
                        target.has_refused = matches!(error, PeerError::Refused(_));
                    }
                    return Err(error.into());
                }
            }
        }
        if target.process.is_exited()? && is_ours() {
            return Err("the target ended before it took over".into());
        }
        let fds = target.watched.clone();
        let rendezvous = attempt.control.rendezvous();
        let deadline = self.watchdog.check(&rendezvous)?;
        Ok((rendezvous.target_phase(), Wait { fds, deadline }))
    }
}

impl CprMode for CprTransfer {
    fn id(&self) -> ModeId {
        MODE
    }

    fn properties(&self) -> Properties {
        PROPERTIES
    }

    fn course(&self) -> Course {
        Course::Alongside
    }

    fn check(&mut self) -> Result<(), BoxError> {
        let Some(Endpoint::Path(path)) = &self.endpoint else { return Ok(()) };
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.file_type().is_socket() => Ok(()),
            Ok(_) => Err(format!("cpr channel: {} is no socket", self.place).into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(format!("cpr channel: there is no socket {}; start the target first", self.place).into())
            }
            Err(error) => Err(format!("cpr channel: {}: {error}", self.place).into()),
        }
    }

    fn preflight(&mut self, attempt: &Attempt<'_>, manifest: &Manifest) -> Result<Asked, BoxError> {
        if let Some(wait) = self.greet()? {
            return Ok(Asked::Wait(wait));
        }
        let epoch = attempt.control.epoch();
        let now = Instant::now();
        if !std::mem::replace(&mut self.has_asked, true) {
            let frame = self.manifest_frame(manifest, epoch)?;
            self.parts()?.0.show(&frame).map_err(PeerError::Io)?;
            self.deadline = Some(now + self.timeout);
        }
        let (link, _) = self.parts()?;
        if !link.is_readable()? {
            let deadline = self.deadline.unwrap_or(now);
            if now >= deadline {
                let reason = format!("the target gave no verdict within {:?} ({})", self.timeout, self.place);
                return Ok(Asked::Refused(reason));
            }
            let fds = vec![Arc::new(link.as_fd().try_clone_to_owned()?)];
            return Ok(Asked::Wait(Wait { fds, deadline: Some(deadline) }));
        }
        let heard = link.hear().map_err(|error| format!("{}: {error}", self.place))?;
        let Heard::Verdict(frame) = heard else { return Err(PeerError::OutOfTurn.into()) };
        Ok(match read_verdict(&frame, epoch) {
            Ok(verdict) => verdict.into_asked(),
            Err(error) => Asked::Refused(format!("the target gave a verdict that cannot be used: {error}")),
        })
    }

    fn prepare(&mut self, _: &Attempt<'_>) -> Result<Prepared, BoxError> {
        Ok(self.greet()?.map_or(Prepared::Ready, Prepared::Wait))
    }

    fn introduce(&mut self, attempt: &Attempt<'_>, state: StateWriter) -> Result<Introduced, BoxError> {
        let mut early = state.early;
        let mut sent = Vec::new();
        // The token is the place among the registry's descriptors in the message.
        let table = attempt.registry.encode_some(|entry, fd| {
            if self.stays.contains(&entry.name) {
                return Ok(None);
            }
            if sent.len() == MAX_FDS {
                return Err(format!(
                    "descriptor {entry} is one too many: {MAX_FDS} can be carried over a socket"
                ));
            }
            sent.push(fd.try_clone_to_owned().map_err(|error| format!("descriptor {entry}: {error}"))?);
            Ok(Some(sent.len() as u64 - 1))
        })?;
        early.put(FdRegistry::SECTION, 0, 1, table)?;
        let early = fault::pass(Point::EarlyFrame, early.finish(attempt.control.epoch()))?;
        let early = sealed_memfd("cpr-early", &early)?;
        let process = PidFd::of_self()?;
        let (link, target) = self.parts()?;
        let own = Introduction {
            early: early.as_fd(),
            control: attempt.control.fd().as_fd(),
            main: target.main.as_fd(),
            doorbell: target.doorbell.as_fd(),
            process: process.as_fd(),
        };
        // A message that was cut off is none: the target goes back to listening.
        link.introduce(&own, &sent).map_err(|error| match link.is_readable() {
            Ok(true) => link.hear().err().unwrap_or(PeerError::OutOfTurn).to_string(),
            _ => format!("the descriptors could not be sent: {error}"),
        })?;
        if let Some(target) = &mut self.target {
            target.is_introduced = true;
        }
        Ok(Introduced::Done)
    }

    fn await_target(&mut self, attempt: &Attempt<'_>) -> Result<Prepared, BoxError> {
        let (phase, wait) = self.look_at_target(attempt)?;
        Ok(if phase >= TargetPhase::Ready { Prepared::Ready } else { Prepared::Wait(wait) })
    }

    fn hand_over(&mut self, attempt: &Attempt<'_>, state: StateWriter) -> Result<HandOver, BoxError> {
        let frame = fault::pass(Point::MainFrame, state.main.finish(attempt.control.epoch()))?;
        let (_, target) = self.parts()?;
        let main = File::from(target.main.try_clone()?);
        main.write_all_at(&frame, 0).map_err(|error| format!("the state cannot be written: {error}"))?;
        // Nobody changes it any more, so that a rollback finds what was saved to be what was read.
        memfd::seal_write(&main)?;
        self.watchdog = Watchdog::new(Some(self.timeout), None);
        if let Some(target) = &mut self.target {
            target.has_state = true;
        }
        attempt.control.timeline().stamp(Stamp::HandedOver);
        attempt.control.rendezvous().publish_state();
        fault::at(Point::Published)?;
        self.poll_hand_over(attempt)
    }

    fn poll_hand_over(&mut self, attempt: &Attempt<'_>) -> Result<HandOver, BoxError> {
        let (_, wait) = self.look_at_target(attempt)?;
        Ok(match attempt.control.ownership().owner() {
            Some(Owner::Target) => HandOver::Complete,
            _ => HandOver::Wait(wait),
        })
    }

    fn roll_back(&mut self, attempt: &Attempt<'_>) {
        let Some(link) = self.link.take() else { return };
        link.close();
        let Some(Target { process, is_introduced, has_refused, has_state, .. }) = self.target.take() else {
            return;
        };
        // One that was not introduced has nothing, and goes back to listening; so does one that could not make anything of
        // the introduction.
        let has_nothing = !is_introduced || has_refused && attempt.control.rendezvous().progress() == 0;
        if !has_nothing {
            end_target(&process, if has_state { ENDS_SOON } else { ENDS_WITHIN });
        }
    }
}

fn read_verdict(frame: &OwnedFd, epoch: Epoch) -> Result<Verdict, BoxError> {
    let mut frame = Frame::read_memfd(frame)?;
    if frame.epoch != epoch {
        return Err("it is of another update".into());
    }
    Ok(Verdict::take_from(&mut frame)?)
}

/// Waits for the end of a target that has lost the guest: it must not touch anything once the guest runs again. It ends by
/// itself, as it sees the word and the end of the connection.
fn end_target(process: &PidFd, patience: Duration) {
    let ended = process.wait_exited(patience).and_then(|ended| {
        if ended {
            return Ok(true);
        }
        tracing::warn!("the target does not end, and is killed");
        process.kill().and_then(|()| process.wait_exited(KILLED_WITHIN))
    });
    match ended {
        Ok(true) => {}
        // It cannot commit any more either.
        Ok(false) => tracing::error!("the target could not be ended"),
        Err(error) => tracing::error!(%error, "the target could not be ended"),
    }
}
