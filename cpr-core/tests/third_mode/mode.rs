//! The mode "fork-pipe": the target is a child process, and everything reaches it over a socketpair.
//!
//! Source and target are alive together, which makes it the opposite of an exec: descriptors travel by SCM_RIGHTS, the
//! source waits until the target commits, and it can end a target that does not. This file uses what any other crate could
//! use: the public parts of `cpr-core` and `oslib`.
//!
//! ```text
//!  prepare:    source spawns target ──► target: "ready"
//!  hand over:  source: early frame + descriptors, then main frame ──► target commits the word, then: "running"
//!  roll back:  source has won the word, kills the target, waits for its end
//! ```

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cpr_core::error::BoxError;
use cpr_core::frame::Frame;
use cpr_core::ownership::Owner;
use cpr_core::{
    Arrival, Attempt, Control, CprMode, FdRegistry, HandOver, MainSource, ModeId, ModeInfo, Prepared,
    Properties, StateWriter, Wait,
};
use oslib::pidfd::PidFd;
use oslib::scm::{self, Limits};
use oslib::stream;

pub(crate) const MODE: ModeId = ModeId::from_static("fork-pipe");
const PROPERTIES: Properties = Properties::RAM_IN_PLACE
    .union(Properties::DESCRIPTORS_SURVIVE)
    .union(Properties::SAME_KERNEL)
    .union(Properties::DEVICES_STAY_ATTACHED);
const REGISTRY_SECTION: &str = "fork-pipe/registry";
const LIMITS: Limits = Limits { max_payload: 1 << 20, max_fds: 1000 };
const SIGKILL: i32 = 9;

pub(crate) fn mode_info() -> ModeInfo {
    ModeInfo { id: MODE, properties: PROPERTIES }
}

/// The source's end.
pub(crate) struct ForkPipe {
    command: Command,
    patience: Duration,
    target: Option<Target>,
}

struct Target {
    process: PidFd,
    channel: Arc<OwnedFd>,
    deadline: Instant,
}

impl ForkPipe {
    /// Will start `command` as the target, with its end of the channel as standard input. It may take `patience` to get
    /// ready, and as long again to commit.
    pub(crate) fn new(command: Command, patience: Duration) -> ForkPipe {
        ForkPipe { command, patience, target: None }
    }

    fn spawn(&mut self) -> io::Result<Target> {
        let (ours, theirs) = UnixStream::pair()?;
        self.command.stdin(Stdio::from(OwnedFd::from(theirs)));
        // Reaped by its pidfd, here or by whoever started the source.
        let child = self.command.spawn()?;
        // The command keeps a copy of the target's end; without this the end of the target would not be seen.
        self.command.stdin(Stdio::null());
        let channel = Arc::new(OwnedFd::from(ours));
        Ok(Target { process: PidFd::open(child.id())?, channel, deadline: Instant::now() + self.patience })
    }

    fn target(&mut self) -> Result<&mut Target, BoxError> {
        self.target.as_mut().ok_or_else(|| "there is no target".into())
    }
}

impl Target {
    fn wait(&self) -> Wait {
        Wait { fds: vec![self.channel.clone()], deadline: Some(self.deadline) }
    }

    /// Whether the target said `word`; an error if it ended, or takes too long.
    fn has_said(&self, word: &str) -> Result<bool, BoxError> {
        if !stream::is_readable(&*self.channel)? {
            let late = Instant::now() >= self.deadline;
            return if late { Err(format!("the target was not {word} in time").into()) } else { Ok(false) };
        }
        let message = scm::recv(&*self.channel, LIMITS)
            .map_err(|error| format!("the target ended before it was {word}: {error}"))?;
        match message.payload == word.as_bytes() {
            true => Ok(true),
            false => Err(String::from_utf8_lossy(&message.payload).into()),
        }
    }
}

impl CprMode for ForkPipe {
    fn id(&self) -> ModeId {
        MODE
    }

    fn properties(&self) -> Properties {
        PROPERTIES
    }

    fn check(&mut self) -> Result<(), BoxError> {
        oslib::exec::find_program(self.command.get_program(), None)?;
        Ok(())
    }

    fn prepare(&mut self, _: &Attempt<'_>) -> Result<Prepared, BoxError> {
        if self.target.is_none() {
            self.target = Some(self.spawn()?);
        }
        let target = self.target()?;
        Ok(if target.has_said("ready")? { Prepared::Ready } else { Prepared::Wait(target.wait()) })
    }

    fn hand_over(&mut self, attempt: &Attempt<'_>, mut state: StateWriter) -> Result<HandOver, BoxError> {
        let deadline = Instant::now() + self.patience;
        let target = self.target()?;
        // The codec of this mode: the index of a descriptor in the message. The control page is the first.
        let mut fds = vec![attempt.control.fd().try_clone()?];
        let registry = attempt.registry.encode(|entry, fd| {
            fds.push(fd.try_clone_to_owned().map_err(|error| format!("descriptor {entry}: {error}"))?);
            Ok::<_, BoxError>(fds.len() as u64 - 1)
        })?;
        state.early.put(REGISTRY_SECTION, 0, 1, registry)?;
        let epoch = attempt.control.epoch();
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        // Read by a target that waits for it, so this does not block for long.
        scm::send(&*target.channel, &state.early.finish(epoch), &borrowed)?;
        scm::send(&*target.channel, &state.main.finish(epoch), &[])?;
        target.deadline = deadline;
        Ok(HandOver::Wait(target.wait()))
    }

    fn poll_hand_over(&mut self, attempt: &Attempt<'_>) -> Result<HandOver, BoxError> {
        let target = self.target()?;
        if target.has_said("running")? {
            let owner = attempt.control.ownership().owner();
            return match owner {
                Some(Owner::Target) => Ok(HandOver::Complete),
                _ => Err("the target runs without having committed".into()),
            };
        }
        Ok(HandOver::Wait(target.wait()))
    }

    fn roll_back(&mut self, _: &Attempt<'_>) {
        // The word is won already, so the target cannot commit any more; but it must not touch anything either.
        if let Some(target) = self.target.take() {
            let _ = target.process.send_signal(SIGKILL);
            target.process.reap().expect("it is a child of this process");
        }
    }
}

/// The target's end: what came over the channel.
pub(crate) struct Receiver {
    channel: OwnedFd,
}

impl Receiver {
    /// Takes the channel, which is standard input, and says that this process is ready.
    pub(crate) fn connect() -> Result<Receiver, BoxError> {
        let channel = io::stdin().as_fd().try_clone_to_owned()?;
        scm::send(&channel, b"ready", &[])?;
        Ok(Receiver { channel })
    }

    pub(crate) fn receive(&mut self) -> Result<Arrival, BoxError> {
        let message = scm::recv(&self.channel, LIMITS)?;
        let mut early = Frame::parse(&message.payload)?;
        let mut fds: Vec<_> = message.fds.into_iter().map(Some).collect();
        let mut take = |index: usize| fds.get_mut(index).and_then(Option::take).ok_or("it did not come");
        let control = Control::attach(Arc::new(take(0)?), early.epoch)?;
        let section = early.require(REGISTRY_SECTION, 0)?;
        let registry = FdRegistry::decode(&section, |_, token| Ok(take(token.try_into()?)?))?;
        Ok(Arrival { mode: mode_info(), early, registry, control })
    }

    /// Tells the source how it went: "running", or why not.
    pub(crate) fn tell(&self, words: &str) -> io::Result<()> {
        scm::send(&self.channel, words.as_bytes(), &[])
    }
}

impl MainSource for Receiver {
    fn read_main(&mut self) -> Result<Frame, BoxError> {
        Ok(Frame::parse(&scm::recv(&self.channel, LIMITS)?.payload)?)
    }
}
