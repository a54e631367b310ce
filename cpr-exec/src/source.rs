//! The source's half: preflight of the command, the two frames, and the terminal action that execs.

use std::ffi::{CString, OsString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cpr_core::error::BoxError;
use cpr_core::fault::{self, Point};
use cpr_core::frame::{FrameWriter, sealed_memfd};
use cpr_core::ownership::Owner;
use cpr_core::preflight::{Asked, Manifest};
use cpr_core::{
    Attempt, Control, Course, CprMode, FdKind, FdPolicy, FdRegistry, HandOver, Introduced, ModeId, Prepared,
    Properties, Stamp, StateWriter, TargetPhase, TerminalAction, Wait, Watchdog,
};
use oslib::eventfd::EventFd;
use oslib::exec::{FileIdentity, PreparedExec, ProgramError};
use oslib::keeper::{Departed, HeadStart, Keeper};
use oslib::pidfd::PidFd;
use oslib::signals::{self, SignalMask};

use crate::ask::{Asking, Question};
use crate::channel::{MainChannel, OpenChannel};
use crate::fallback::{LastWords, SIGABRT, with_words};
use crate::{FallbackWire, MODE, PROPERTIES, ProcessSection, environment, names};

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

/// How long a target may go without progress, unless the user says otherwise.
const TIMEOUT: Duration = Duration::from_secs(5);

/// One attempt in the cpr-exec mode.
#[derive(Debug)]
pub struct CprExec {
    command: Vec<OsString>,
    main: MainChannel,
    signal_mask: SignalMask,
    keeper: bool,
    fallback: Option<Vec<OsString>>,
    /// The program that `fallback` executes, and its working directory.
    program: Option<[Arc<OwnedFd>; 2]>,
    words: Option<LastWords>,
    timeout: Option<Duration>,
    asking: Option<Asking>,
    /// What the program was that is asked, or has said that it can take over.
    asked: Option<FileIdentity>,
    /// The target was told to give up, because it made no progress.
    aborted: bool,
    open: Option<OpenChannel>,
    doorbell: Option<Arc<EventFd>>,
    watchdog: Watchdog,
    departure: Arc<Mutex<Option<Departure>>>,
    /// The doorbell and the successor, for the host's loop.
    watched: Vec<Arc<OwnedFd>>,
}

impl CprExec {
    /// Will execute `command` (the program, searched in PATH as `execvp` does, and its arguments), with the main
    /// frame in `main`.
    ///
    /// The target gets this thread's signal mask of now, unless [`signal_mask`](Self::signal_mask) says otherwise.
    pub fn new(command: Vec<OsString>, main: MainChannel) -> CprExec {
        let signal_mask = signals::current().unwrap_or_default();
        CprExec {
            command,
            main,
            signal_mask,
            keeper: true,
            fallback: None,
            program: None,
            words: None,
            timeout: Some(TIMEOUT),
            asking: None,
            asked: None,
            aborted: false,
            open: None,
            doorbell: None,
            watchdog: Watchdog::new(Some(TIMEOUT), None),
            departure: Arc::default(),
            watched: Vec::new(),
        }
    }

    /// Sets the signal mask that the target restores once its handlers stand: the one that the program itself was
    /// started with.
    #[must_use]
    pub fn signal_mask(mut self, mask: SignalMask) -> Self {
        self.signal_mask = mask;
        self
    }

    /// How long the program may take to answer a preflight, and how long the target may go without progress before it is given
    /// up, 5 s by default; and how long its user may take to say where the state comes from (`-incoming defer`), for ever by
    /// default. The latter two need the keeper.
    #[must_use]
    pub fn time_limits(mut self, timeout: Option<Duration>, defer_timeout: Option<Duration>) -> Self {
        self.timeout = timeout;
        self.watchdog = Watchdog::new(timeout, defer_timeout);
        self
    }

    /// Whether the program goes on in a keeper ([`oslib::keeper`]) until the target has taken over; on by default.
    ///
    /// Without it the guest stands still from the save to the commit, exec frees the old mappings of guest RAM meanwhile
    /// (some 45 ms per GiB that was touched in 4 KiB pages), and a target that fails takes the guest with it.
    #[must_use]
    pub fn keeper(mut self, on: bool) -> Self {
        self.keeper = on;
        self
    }

    /// How this program itself takes the guest over again, in the same process, if the target fails before it has: with
    /// these arguments, the program's name first, in the environment and the working directory of now. The file that this
    /// program was started from is executed, though it may be deleted by then. Needs the keeper.
    ///
    /// Otherwise, and if that fails as well, the program goes on in the keeper, under its process id.
    #[must_use]
    pub fn fallback(mut self, argv: Vec<OsString>) -> Self {
        self.fallback = Some(argv);
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

    /// Finishes the early frame, and makes the exec ready that will deliver it.
    fn ready_to_exec(
        &mut self,
        attempt: &Attempt<'_>,
        mut early: FrameWriter,
    ) -> Result<TerminalAction, BoxError> {
        let process = ProcessSection {
            signal_mask: self.signal_mask.bits(),
            main: self.main.to_wire(),
            source_goes_on: self.keeper,
            fallback: self.program.as_ref().and(self.fallback.as_ref()).map(|arguments| FallbackWire {
                arguments: arguments.iter().map(bytes).collect(),
                environment: environment::own().map(|(name, value)| (bytes(&name), bytes(&value))).collect(),
            }),
        };
        early.put_value(names::PROCESS_SECTION, 0, 1, &process)?;
        // Numbers are kept by exec, so a number is all that the target needs to find a descriptor again.
        let registry = attempt.registry.encode(|_, fd| Ok::<_, BoxError>(fd.as_raw_fd().try_into()?))?;
        early.put(FdRegistry::SECTION, 0, 1, registry)?;
        let early = fault::pass(Point::EarlyFrame, early.finish(attempt.control.epoch()))?;
        let state = sealed_memfd("cpr-state", &early)?;

        let program = self.find_program()?;
        let exec = PreparedExec::new(
            &program,
            &self.command,
            environment::with_state(environment::own(), state.as_raw_fd()),
        )?;
        let last = LastAct {
            program: program.into_os_string(),
            asked: self.asked,
            exec,
            state,
            registry: attempt.registry.clone(),
            control: attempt.control.clone(),
            departure: self.keeper.then(|| self.departure.clone()),
            words: self.words.as_ref().map(|words| [words.original.clone(), words.memfd.clone()]),
        };
        Ok(Box::new(move || last.run()))
    }

    /// Why there is no update, with the last words of the program that was to take over.
    fn failure(&self, attempt: &Attempt<'_>, what: &str) -> String {
        let what = if attempt.control.rendezvous().is_fallback() {
            format!("the new program failed, and the previous one, started again in its place, {what}")
        } else {
            format!("the new program {what}")
        };
        let words = self.words.as_ref().map(LastWords::read).unwrap_or_default();
        with_words(what, &words)
    }

    fn answered(&mut self, asked: Asked) -> Asked {
        if !matches!(asked, Asked::Wait(_)) {
            self.asking = None;
        }
        if !matches!(asked, Asked::Wait(_) | Asked::Accepted(_)) {
            // Whatever it is by the time it is executed, it is not worse.
            self.asked = None;
        }
        asked
    }

    fn channel(&mut self) -> Result<&mut OpenChannel, BoxError> {
        self.open.as_mut().ok_or_else(|| "the main channel is not open".into())
    }

    /// In the keeper: what the target is doing.
    fn look_at_target(&mut self, attempt: &Attempt<'_>) -> Result<(TargetPhase, Wait), BoxError> {
        let mut departure = self.departure.lock().unwrap_or_else(PoisonError::into_inner);
        let Departure { successor, head_start, .. } =
            departure.as_mut().ok_or("the program has not left its process")?;
        // The guest runs again.
        *head_start = None;
        let doorbell = self.doorbell.as_ref().ok_or("there is no doorbell")?;
        // Before the words are read: a ring that comes between the two wakes the next wait.
        doorbell.drain()?;
        let rendezvous = attempt.control.rendezvous();
        // It can have committed as the last thing it did.
        if successor.is_exited()? && attempt.control.ownership().owner() == Some(Owner::Source) {
            let how = successor.ended_how().map(|how| format!(" ({how})")).unwrap_or_default();
            return Err(self.failure(attempt, &format!("ended before it took over{how}")).into());
        }
        let deadline = match self.watchdog.check(&rendezvous) {
            Ok(deadline) => deadline,
            Err(stalled) if !self.aborted => {
                self.aborted = true;
                tracing::warn!(%stalled, "the new program is told to give up");
                // Among its last words, so that a fallback start knows, too.
                if let Some(words) = &self.words {
                    oslib::stream::write(
                        &words.memfd,
                        format!("{stalled} ({})\n", doing(rendezvous.target_phase())).as_bytes(),
                    )?;
                }
                // Whatever it waits for, it is to come to an end now; and its time begins anew.
                rendezvous.enter(TargetPhase::Building);
                successor.send_signal(SIGABRT)?;
                self.watchdog.check(&rendezvous)?
            }
            Err(_) => return Err(self.failure(attempt, "was killed").into()),
        };
        if self.watched.is_empty() {
            for fd in [doorbell.as_fd(), successor.as_fd()] {
                self.watched.push(Arc::new(fd.try_clone_to_owned()?));
            }
        }
        Ok((rendezvous.target_phase(), Wait { fds: self.watched.clone(), deadline }))
    }
}

impl CprMode for CprExec {
    fn id(&self) -> ModeId {
        MODE
    }

    fn properties(&self) -> Properties {
        PROPERTIES
    }

    fn course(&self) -> Course {
        if self.keeper { Course::Departing } else { Course::Halted }
    }

    fn check(&mut self) -> Result<(), BoxError> {
        self.find_program()?;
        self.open = Some(self.main.open()?);
        Ok(())
    }

    fn preflight(&mut self, attempt: &Attempt<'_>, manifest: &Manifest) -> Result<Asked, BoxError> {
        if self.asking.is_none() {
            let program = self.find_program()?;
            self.asked = Some(FileIdentity::of(&program)?);
            let question = Question {
                program: &program,
                command: &self.command,
                mask: self.signal_mask,
                manifest,
                main: self.main.to_wire(),
                keeper: self.keeper,
                epoch: attempt.control.epoch(),
            };
            match question.ask(self.timeout)? {
                Ok(asking) => self.asking = Some(asking),
                Err(reason) => return Ok(self.answered(Asked::Refused(reason))),
            }
        }
        let asking = self.asking.as_mut().ok_or("nobody is asked")?;
        let asked = asking.poll()?;
        Ok(self.answered(asked))
    }

    fn prepare(&mut self, attempt: &Attempt<'_>) -> Result<Prepared, BoxError> {
        let registry = attempt.registry;
        registry.resave(names::CONTROL, 0, FdKind::Memfd, FdPolicy::MustSurvive, attempt.control.fd())?;
        self.channel()?.register(registry)?;
        if self.keeper {
            let doorbell = Arc::new(EventFd::new()?);
            registry.save(names::DOORBELL, 0, FdKind::EventFd, FdPolicy::MustSurvive, &doorbell)?;
            self.doorbell = Some(doorbell);
            let words = LastWords {
                memfd: Arc::new(oslib::memfd::Memfd::new("cpr-last-words").create()?),
                original: Arc::new(std::io::stderr().as_fd().try_clone_to_owned()?),
            };
            let policy = FdPolicy::MayBeRebuilt;
            registry.save(names::LAST_WORDS, 0, FdKind::Memfd, policy, &words.memfd)?;
            registry.save(names::STDERR, 0, FdKind::Other, policy, &words.original)?;
            self.words = Some(words);
            if self.fallback.is_some() {
                let program = Arc::new(oslib::exec::this_program()?);
                let directory = Arc::new(oslib::exec::this_directory()?);
                registry.save(names::PROGRAM, 0, FdKind::Other, policy, &program)?;
                registry.save(names::DIRECTORY, 0, FdKind::Other, policy, &directory)?;
                self.program = Some([program, directory]);
            }
        }
        Ok(Prepared::Ready)
    }

    fn introduce(&mut self, attempt: &Attempt<'_>, state: StateWriter) -> Result<Introduced, BoxError> {
        // The rehearsal: a full disk is noticed now, and the room is taken.
        let epoch = attempt.control.epoch();
        self.channel()?.write(&state.main.finish(epoch))?;
        Ok(Introduced::Terminal(self.ready_to_exec(attempt, state.early)?))
    }

    fn await_target(&mut self, attempt: &Attempt<'_>) -> Result<Prepared, BoxError> {
        let (phase, wait) = self.look_at_target(attempt)?;
        Ok(if phase >= TargetPhase::Ready { Prepared::Ready } else { Prepared::Wait(wait) })
    }

    fn hand_over(&mut self, attempt: &Attempt<'_>, state: StateWriter) -> Result<HandOver, BoxError> {
        let frame = fault::pass(Point::MainFrame, state.main.finish(attempt.control.epoch()))?;
        self.channel()?.write(&frame)?;
        self.channel()?.seal()?;
        if !self.keeper {
            return Ok(HandOver::Terminal(self.ready_to_exec(attempt, state.early)?));
        }
        attempt.control.timeline().stamp(Stamp::HandedOver);
        attempt.control.rendezvous().publish_state();
        fault::at(Point::Published)?;
        // The time that stopping and saving took is not the target's.
        self.watchdog.restart();
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
        // Ends with whoever asks.
        self.asking = None;
        if let Some(departure) = self.departure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            end_successor(&departure.successor);
            if let Some(name) = departure.name {
                let _ = oslib::process::set_name(&name);
            }
            // As it was before the last act blocked all signals.
            if let Err(error) = signals::set_mask(departure.mask) {
                tracing::error!(%error, "the signal mask could not be restored");
            }
            // Nobody else will.
            if let Some(words) = self.words.take() {
                words.replay();
            }
        }
        // What two programs could not use is worth a look.
        if let Some(open) = self.open.take()
            && !attempt.control.rendezvous().is_fallback()
        {
            open.discard();
        }
        (self.doorbell, self.program, self.words) = (None, None, None);
        self.watched.clear();
        for name in names::OWN {
            attempt.registry.delete(name, 0);
        }
    }
}

fn doing(phase: TargetPhase) -> &'static str {
    match phase {
        TargetPhase::Building => "building",
        TargetPhase::Deferred => "waiting for its user",
        TargetPhase::Ready => "waiting for the state",
        TargetPhase::Loading => "loading the state",
        _ => "in an unknown phase",
    }
}

fn bytes(string: &OsString) -> Vec<u8> {
    string.as_encoded_bytes().to_vec()
}

/// How long a killed process may take to end.
const KILLED_WITHIN: Duration = Duration::from_secs(10);

/// Ends the process that could not take over: it must not touch anything once the guest runs again.
fn end_successor(successor: &PidFd) {
    match successor.kill().and_then(|()| successor.wait_exited(KILLED_WITHIN)) {
        Ok(true) => {}
        // Pid 1 of a container cannot be killed from inside. It cannot commit any more either.
        Ok(false) => tracing::error!("the new program could not be ended"),
        Err(error) => tracing::error!(%error, "the new program could not be ended"),
    }
}

/// What the last act leaves for the program when it goes on in the keeper.
#[derive(Debug)]
struct Departure {
    successor: PidFd,
    /// Until the guest runs.
    head_start: Option<HeadStart>,
    /// Signals that were blocked before all were.
    mask: SignalMask,
    /// What the process was called.
    name: Option<CString>,
}

/// Everything that the exec needs, so that the terminal action allocates as little as it can.
struct LastAct {
    program: OsString,
    /// What it was when it said that it can take over.
    asked: Option<FileIdentity>,
    exec: PreparedExec,
    state: OwnedFd,
    registry: FdRegistry,
    control: Control,
    /// Where to leave word, if the program is to go on in a keeper.
    departure: Option<Arc<Mutex<Option<Departure>>>>,
    /// Standard error, and what it is for the target until the commit.
    words: Option<[Arc<OwnedFd>; 2]>,
}

impl LastAct {
    /// Execs. Coming back with an error, it has put everything as it was before; with `Ok`, this is the keeper.
    fn run(self) -> Result<(), BoxError> {
        // A target of an update that was cancelled since could never commit, and the guest would be lost.
        if self.control.ownership().owner() != Some(Owner::Source) {
            return Err("the update ended before it was executed".into());
        }
        if let Some(asked) = self.asked {
            let program = self.program.display();
            let found = FileIdentity::of(&self.program).map_err(|error| format!("'{program}': {error}"))?;
            if found != asked {
                return Err(format!(
                    "'{program}' was changed since it was asked whether it can take over; migrate again to ask what is \
                     there now"
                )
                .into());
            }
        }
        let name = oslib::process::name().ok();
        let mask = signals::block_all().map_err(|error| format!("signals could not be blocked: {error}"))?;
        let error = match self.clear_and_exec() {
            Ok(Departed { successor, head_start }) => {
                if let Some(departure) = &self.departure {
                    *departure.lock().unwrap_or_else(PoisonError::into_inner) =
                        Some(Departure { successor, head_start: Some(head_start), mask, name });
                }
                return Ok(());
            }
            Err(error) => error,
        };
        if let Some([original, _]) = &self.words
            && let Err(error) = oslib::stream::replace_stderr(original)
        {
            tracing::error!(%error, "standard error could not be put back");
        }
        let _ = self.registry.walk_fd(|entry, fd| {
            if let Err(error) = oslib::cloexec::set(fd) {
                tracing::error!(%entry, %error, "close-on-exec could not be set again");
            }
            Ok::<_, ()>(())
        });
        if let Err(error) = signals::set_mask(mask) {
            tracing::error!(%error, "the signal mask could not be restored");
        }
        Err(error)
    }

    fn clear_and_exec(&self) -> Result<Departed, BoxError> {
        // Before the descriptors are made to survive: the keeper's table is a copy, and programs that it may start later
        // must not inherit them.
        let keeper = match &self.departure {
            Some(_) => {
                Some(Keeper::spawn().map_err(|error| format!("the keeper could not be started: {error}"))?)
            }
            None => None,
        };
        // Only now, so that no child that the program ever starts inherits them.
        self.registry.walk_fd(|entry, fd| {
            oslib::cloexec::clear(fd).map_err(|error| format!("descriptor {entry} cannot be kept: {error}"))
        })?;
        oslib::cloexec::clear(&self.state)?;
        self.control.set_keeper_pid(keeper.as_ref().map(Keeper::pid));
        // The keeper has a table of its own, in which standard error stays what it is.
        if let Some([_, memfd]) = &self.words {
            oslib::stream::replace_stderr(memfd)
                .map_err(|error| format!("standard error cannot be kept: {error}"))?;
        }
        fault::at(Point::Terminal)?;
        self.control.timeline().stamp(Stamp::Executed);
        let error = match keeper {
            Some(keeper) => match keeper.exec(&self.exec) {
                Ok(departed) => return Ok(departed),
                Err(error) => error,
            },
            None => {
                self.control.timeline().stamp(Stamp::HandedOver);
                self.exec.run()
            }
        };
        self.control.set_keeper_pid(None);
        Err(format!("cannot execute '{}': {error}", self.program.display()).into())
    }
}
