//! The source's half: preflight of the command, the two frames, and the terminal action that execs.

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use cpr_core::error::BoxError;
use cpr_core::ownership::{Owner, OwnershipWord};
use cpr_core::{
    Attempt, Control, CprMode, FdKind, FdPolicy, FdRegistry, HandOver, ModeId, Prepared, Properties, Stamp,
    StateWriter, TerminalAction,
};
use oslib::eventfd::EventFd;
use oslib::exec::{PreparedExec, ProgramError};
use oslib::keeper::{Keeper, KeeperPlan};
use oslib::signals::{self, SignalMask};

use crate::channel::{MainChannel, OpenChannel, sealed_memfd};
use crate::{MODE, PROPERTIES, ProcessSection, environment, names};

/// Why the command cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    /// No command was set.
    #[error("cpr-exec mode requires setting cpr-exec-command")]
    Missing,
    /// Its first word is empty.
    #[error("cpr-exec-command begins with an empty word; its first word is the program to execute")]
    EmptyProgram,
    /// The program cannot be executed.
    #[error("cpr-exec-command: {0}")]
    Program(#[from] ProgramError),
}

/// One attempt in the cpr-exec mode.
#[derive(Debug)]
pub struct CprExec {
    command: Vec<OsString>,
    main: MainChannel,
    signal_mask: SignalMask,
    keeper: bool,
    open: Option<OpenChannel>,
    doorbell: Option<Arc<EventFd>>,
}

impl CprExec {
    /// Will execute `command` (the program, searched in PATH as `execvp` does, and its arguments), with the main
    /// frame in `main`.
    ///
    /// The target gets this thread's signal mask of now, unless [`signal_mask`](Self::signal_mask) says otherwise.
    pub fn new(command: Vec<OsString>, main: MainChannel) -> CprExec {
        let signal_mask = signals::current().unwrap_or_default();
        CprExec { command, main, signal_mask, keeper: true, open: None, doorbell: None }
    }

    /// Sets the signal mask that the target restores once its handlers stand: the one that the program itself was
    /// started with.
    #[must_use]
    pub fn signal_mask(mut self, mask: SignalMask) -> Self {
        self.signal_mask = mask;
        self
    }

    /// Whether a keeper holds the old address space past the exec; on by default. Without it exec frees the old
    /// mappings of guest RAM before the target starts: some 45 ms per GiB that was touched in 4 KiB pages.
    #[must_use]
    pub fn keeper(mut self, on: bool) -> Self {
        self.keeper = on;
        self
    }

    fn find_program(&self) -> Result<std::path::PathBuf, CommandError> {
        let program = self.command.first().ok_or(CommandError::Missing)?;
        if program.is_empty() {
            return Err(CommandError::EmptyProgram);
        }
        let path = std::env::var_os("PATH");
        Ok(oslib::exec::find_program(program, path.as_deref())?)
    }

    fn try_hand_over(
        &mut self,
        attempt: &Attempt<'_>,
        mut state: StateWriter,
    ) -> Result<TerminalAction, BoxError> {
        let epoch = attempt.control.epoch();
        let channel = self.open.as_mut().ok_or("hand over before prepare")?;
        channel.write(&state.main.finish(epoch), attempt.registry)?;

        let process = ProcessSection { signal_mask: self.signal_mask.bits(), main: self.main.to_wire() };
        state.early.put_value(names::PROCESS_SECTION, 0, 1, &process)?;
        // Numbers are kept by exec, so a number is all that the target needs to find a descriptor again.
        let registry = attempt.registry.encode(|_, fd| Ok::<_, BoxError>(fd.as_raw_fd().try_into()?))?;
        state.early.put(names::REGISTRY_SECTION, 0, 1, registry)?;
        let state = sealed_memfd("cpr-state", &state.early.finish(epoch))?;

        let program = self.find_program()?;
        let exec = PreparedExec::new(&program, &self.command, environment::for_target(state.as_raw_fd()))?;
        let keeper = self.doorbell.clone().map(|doorbell| (doorbell, attempt.slow_to_close.to_vec()));
        let last = LastAct {
            program: program.into_os_string(),
            exec,
            state,
            registry: attempt.registry.clone(),
            control: attempt.control.clone(),
            keeper,
        };
        Ok(Box::new(move || last.run()))
    }
}

impl CprMode for CprExec {
    fn id(&self) -> ModeId {
        MODE
    }

    fn properties(&self) -> Properties {
        PROPERTIES
    }

    fn check(&mut self) -> Result<(), BoxError> {
        self.find_program()?;
        self.open = Some(self.main.open()?);
        Ok(())
    }

    fn prepare(&mut self, attempt: &Attempt<'_>) -> Result<Prepared, BoxError> {
        let save =
            |name, kind, fd: &Arc<_>| attempt.registry.resave(name, 0, kind, FdPolicy::MustSurvive, fd);
        save(names::CONTROL, FdKind::Memfd, attempt.control.fd())?;
        if self.keeper && self.doorbell.is_none() {
            let doorbell = Arc::new(EventFd::new()?);
            attempt.registry.save(names::DOORBELL, 0, FdKind::EventFd, FdPolicy::MustSurvive, &doorbell)?;
            self.doorbell = Some(doorbell);
        }
        Ok(Prepared::Ready)
    }

    fn hand_over(&mut self, attempt: &Attempt<'_>, state: StateWriter) -> Result<HandOver, BoxError> {
        Ok(HandOver::Terminal(self.try_hand_over(attempt, state)?))
    }

    fn roll_back(&mut self, attempt: &Attempt<'_>) {
        if let Some(open) = self.open.take() {
            open.discard();
        }
        self.doorbell = None;
        attempt.registry.delete(names::CONTROL, 0);
        attempt.registry.delete(names::DOORBELL, 0);
        attempt.registry.delete(names::MAIN, 0);
    }
}

/// Everything that the exec needs, so that the terminal action allocates as little as it can.
struct LastAct {
    program: OsString,
    exec: PreparedExec,
    state: OwnedFd,
    registry: FdRegistry,
    control: Control,
    /// The doorbell, and the descriptors whose last close takes long.
    keeper: Option<(Arc<EventFd>, Vec<i32>)>,
}

impl LastAct {
    /// Execs. Coming back, it has put everything as it was before.
    fn run(self) -> BoxError {
        // A target of an update that was cancelled since could never commit, and the guest would be lost.
        if self.control.ownership().owner() != Some(Owner::Source) {
            return "the update ended before it was executed".into();
        }
        let mask = match signals::block_all() {
            Ok(mask) => mask,
            Err(error) => return format!("signals could not be blocked: {error}").into(),
        };
        let error = self.clear_and_exec();
        let _ = self.registry.walk_fd(|entry, fd| {
            if let Err(error) = oslib::cloexec::set(fd) {
                tracing::error!(%entry, %error, "close-on-exec could not be set again");
            }
            Ok::<_, ()>(())
        });
        if let Err(error) = signals::set_mask(mask) {
            tracing::error!(%error, "the signal mask could not be restored");
        }
        error
    }

    fn clear_and_exec(&self) -> BoxError {
        // Only now, so that no child that the program ever starts inherits them.
        let cleared = self.registry.walk_fd(|entry, fd| {
            oslib::cloexec::clear(fd).map_err(|error| format!("descriptor {entry} cannot be kept: {error}"))
        });
        if let Err(error) = cleared {
            return error.into();
        }
        if let Err(error) = oslib::cloexec::clear(&self.state) {
            return error.into();
        }
        // After the descriptors were made to survive: the keeper's table is a copy.
        let keeper = match self.spawn_keeper() {
            Ok(keeper) => keeper,
            Err(error) => return format!("the keeper could not be started: {error}").into(),
        };
        self.control.set_keeper_pid(keeper.as_ref().map(Keeper::pid));
        self.control.timeline().stamp(Stamp::HandedOver);
        let error = self.exec.run();
        self.control.set_keeper_pid(None);
        if let Some(Err(error)) = keeper.map(Keeper::cancel) {
            tracing::error!(%error, "the keeper could not be ended");
        }
        format!("cannot execute '{}': {error}", self.program.display()).into()
    }

    fn spawn_keeper(&self) -> std::io::Result<Option<Keeper>> {
        let Some((doorbell, keep)) = &self.keeper else { return Ok(None) };
        let plan = KeeperPlan {
            commit: doorbell.as_fd(),
            word: self.control.ownership_cell(),
            committed: OwnershipWord::value(self.control.epoch(), Owner::Target),
            keep_fds: keep.clone(),
        };
        Keeper::spawn(plan).map(Some)
    }
}
