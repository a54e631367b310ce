//! The running program: one machine, its chardevs and monitors, and the main loop that drives them.
//!
//! Everything here runs on one thread. vCPU threads reach it through [`vmm_core`]'s event queue only.
//!
//! - `front_ends`: which bytes go to which monitor or serial port.
//! - `commands`: what monitor commands do.
//! - `host`: what an update does to the program ([`cpr_core::Host`]), and the sections it saves.
//! - `lifecycle`: run states, reset, power-off, the end.

mod commands;
mod front_ends;
mod host;
mod lifecycle;
mod observer;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cpr_core::{Outcome, Services, Step, TerminalAction, Update, UpdateError};
use cpr_exec::KeeperEnd;
use oslib::signals::{SignalFd, SignalMask};
use vmm_core::machine::Machine;
use vmm_core::memory::{Backend as MemoryBackend, GuestRam};

use crate::chardev::Chardev;
use crate::cli::config::{Config, Incoming};
use crate::errors;
use crate::event_loop::{EventLoop, Interest, Ready, Token};
use crate::migration::{Progress, Settings, Status};
use crate::monitor::Channel;
use crate::startup::{self, Arriving};

pub use front_ends::{FrontEnd, User};
pub use host::{EarlyState, find_named_fds, read_machine, take_early_state};
pub use lifecycle::{Exit, RunState};
pub use observer::BlackoutObserver;

/// How long an orderly end waits for peers to take the last output.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// How often a full serial FIFO is looked at again.
const FIFO_POLL: Duration = Duration::from_millis(5);
/// How often a keeper that an update waits for is hurried.
const KEEPER_POLL: Duration = Duration::from_millis(5);

/// Everything that `startup` has made ready.
pub struct Parts {
    pub(crate) config: Config,
    pub(crate) services: Services,
    pub(crate) memory: MemoryBackend,
    pub(crate) ram: GuestRam,
    pub(crate) machine: Machine,
    pub(crate) observer: Arc<BlackoutObserver>,
    pub(crate) signals: SignalFd,
    pub(crate) original_mask: SignalMask,
    pub(crate) chardevs: Vec<Chardev>,
    pub(crate) front_ends: Vec<FrontEnd>,
    pub(crate) settings: Settings,
    pub(crate) named_fds: BTreeMap<String, Arc<OwnedFd>>,
    pub(crate) run_state: RunState,
    pub(crate) arriving: Option<Arriving>,
}

/// The running program.
pub struct App {
    parts: Parts,
    events: EventLoop,
    progress: Progress,
    update: Option<Update>,
    terminal: Option<TerminalAction>,
    /// The keeper of the update that this program came from, until it has ended.
    keeper: Option<(Arc<KeeperEnd>, cpr_core::Incoming)>,
    /// A monitor that waits for the end of the update.
    suspended: bool,
    /// It was let go on, and has output or input to be processed.
    resumed: bool,
    /// QMP events that monitors have not been given yet.
    pending_events: Vec<front_ends::PendingEvent>,
    /// Descriptors in flight that belong to no session while an update is under way.
    saved_fds: Vec<Arc<OwnedFd>>,
    /// What a paused guest goes back to when an update fails.
    state_before_update: RunState,
    exit: Option<Exit>,
}

impl App {
    /// Takes over the parts.
    ///
    /// # Errors
    /// No event loop can be made.
    pub fn new(parts: Parts) -> anyhow::Result<App> {
        let progress = Progress { generation: parts.services.generation, ..Progress::default() };
        Ok(App {
            parts,
            events: EventLoop::new()?,
            progress,
            update: None,
            terminal: None,
            keeper: None,
            suspended: false,
            resumed: false,
            pending_events: Vec::new(),
            saved_fds: Vec::new(),
            state_before_update: RunState::Prelaunch,
            exit: None,
        })
    }

    /// Boots the guest, or takes it over if the command line says from where. Under `-incoming defer` a monitor will.
    ///
    /// # Errors
    /// The guest cannot be booted, or not be taken over.
    pub fn begin(&mut self) -> anyhow::Result<()> {
        if self.parts.arriving.is_some() {
            let channel = match &self.parts.config.incoming {
                Some(Incoming::Defer) => return Ok(()),
                Some(Incoming::Channel(channel)) => Some(channel.clone()),
                None => {
                    tracing::warn!(
                        "an update came in without -incoming; its state is read from where it was written"
                    );
                    None
                }
            };
            return self.take_over(channel);
        }
        let entry = startup::load_kernel(&self.parts.config, &self.parts.ram)?;
        self.parts.machine.set_entry(&|regs, sregs| entry.apply(regs, sregs))?;
        if !self.parts.config.start_paused {
            self.run_guest()?;
        }
        Ok(())
    }

    /// Runs until the end, and says how it ended.
    ///
    /// # Errors
    /// The loop itself failed; everything else is handled inside.
    pub fn run(&mut self) -> anyhow::Result<Exit> {
        self.process_front_ends();
        loop {
            // An end that was asked for together with an update comes first: the next program would not know of it.
            if self.exit.is_none() {
                self.run_update();
            }
            self.deliver_events();
            if let Some(exit) = self.exit.take() {
                self.end(&exit);
                return Ok(exit);
            }
            let interests = self.interests();
            self.events.set_interests(interests)?;
            for ready in self.events.wait(self.timeout())? {
                self.handle(ready)?;
            }
            self.process_front_ends();
        }
    }

    /// Whether one of the chardevs is a terminal, and will give it back as it was found.
    pub fn has_terminal(&self) -> bool {
        self.parts.chardevs.iter().any(Chardev::has_terminal)
    }

    fn interests(&self) -> Vec<Interest> {
        let mut interests = vec![
            Interest::read_forever(&self.parts.signals, Token::Signals),
            Interest::read_forever(self.parts.machine.events(), Token::Vcpus),
        ];
        for (at, chardev) in self.parts.chardevs.iter().enumerate() {
            interests.extend(chardev.interests(at, self.wants_input(at)));
        }
        if let Some((keeper, _)) = &self.keeper {
            interests.push(Interest::read(keeper, Token::Keeper));
        }
        interests
    }

    fn timeout(&self) -> Option<Duration> {
        if self.resumed {
            return Some(Duration::ZERO);
        }
        match (&self.update, &self.keeper) {
            (Some(_), None) => Some(Duration::ZERO),
            // A keeper that was hurried may have stepped down only after it.
            (Some(_), Some(_)) => Some(KEEPER_POLL),
            (None, _) => self.serial_is_full().then_some(FIFO_POLL),
        }
    }

    fn handle(&mut self, ready: Ready) -> anyhow::Result<()> {
        match ready.token {
            Token::Signals => self.handle_signals()?,
            Token::Vcpus => self.handle_vcpu_events(),
            Token::Accept(at) => self.accept(at)?,
            Token::Peer(at) | Token::Output(at) => {
                if ready.writable {
                    self.parts.chardevs[at].flush();
                }
                if ready.readable && matches!(ready.token, Token::Peer(_)) {
                    self.read_input(at);
                }
            }
            Token::Keeper => self.reap_keeper(),
        }
        Ok(())
    }

    /// Steps an update as far as it goes. From the moment that the guest stops until the exec, nothing else runs on
    /// this thread: no monitor is read, so nothing can be lost between the saved state and the next program.
    fn run_update(&mut self) {
        // One keeper at a time: it holds a whole address space.
        if let Some((keeper, _)) = &self.keeper {
            if self.update.is_some() {
                keeper.hurry();
            }
            return;
        }
        let Some(mut update) = self.update.take() else { return };
        loop {
            match update.step(self) {
                Step::Again => {}
                Step::Terminal => {
                    let Some(action) = self.terminal.take() else { continue };
                    // No return, if all goes well.
                    let error = action();
                    self.progress.status = Status::Completed;
                    self.emit_migration_event();
                    let outcome = update.terminal_failed(self, error);
                    return self.update_ended(outcome);
                }
                Step::Wait(_) => {
                    // No mode of this program waits for anything but its own steps.
                    self.update = Some(update);
                    return;
                }
                Step::Finished(outcome) => return self.update_ended(outcome),
            }
        }
    }

    fn update_ended(&mut self, outcome: Outcome) {
        self.parts.observer.disarm();
        self.saved_fds.clear();
        match outcome {
            Outcome::HandedOver => self.progress.status = Status::Completed,
            Outcome::Failed { error, guest } => {
                tracing::warn!(%error, "update failed");
                self.progress.status =
                    if matches!(error, UpdateError::Cancelled) { Status::Cancelled } else { Status::Failed };
                let mut text = errors::text(&error);
                if let Err(second) = guest {
                    text.push_str(&format!(
                        "; the guest could not be resumed either: {}",
                        errors::text(second.as_ref())
                    ));
                    self.set_run_state(RunState::InternalError);
                }
                self.progress.error = Some(text);
            }
        }
        self.emit_migration_event();
        self.resume_suspended();
    }

    /// Begins an update; the loop steps it from here on.
    fn start_update(&mut self, channel: Channel) -> Result<(), crate::monitor::QmpError> {
        use crate::monitor::QmpError;
        if self.update.is_some() {
            return Err(QmpError::generic("There's a migration process in progress"));
        }
        if self.parts.arriving.is_some() {
            return Err(QmpError::generic("Guest is waiting for an incoming migration"));
        }
        if !self.parts.run_state.can_migrate() {
            return Err(QmpError::generic(format!(
                "an update is not possible in run state '{}'",
                self.parts.run_state.name()
            )));
        }
        let mode = self.parts.settings.attempt(channel, self.parts.original_mask)?;
        let mode_name = mode.id().to_string();
        let update = Update::begin(&self.parts.services, mode, self)
            .map_err(|error| QmpError::generic(errors::text(&error)))?;
        self.parts.observer.arm(update.control().clone());
        self.progress = Progress {
            status: Status::Setup,
            error: None,
            control: Some(update.control().clone()),
            mode: Some(mode_name),
            generation: self.parts.services.generation,
        };
        self.emit_migration_event();
        self.update = Some(update);
        Ok(())
    }

    fn cancel_update(&mut self) {
        if let Some(mut update) = self.update.take() {
            let outcome = update.cancel(self);
            self.update_ended(outcome);
        }
    }

    fn emit_migration_event(&mut self) {
        if self.parts.settings.events {
            let status = self.progress.status.name();
            self.emit("MIGRATION", Some(serde_json::json!({ "status": status })));
        }
    }

    fn reap_keeper(&mut self) {
        let Some((keeper, mut incoming)) = self.keeper.take() else { return };
        if let Err(error) = keeper.reap() {
            tracing::warn!(%error, "the keeper could not be reaped");
        }
        incoming.released();
    }

    /// The orderly end: last output, terminal modes, socket paths.
    fn end(&mut self, exit: &Exit) {
        if let Some(mut update) = self.update.take() {
            update.cancel(self);
        }
        if let Err(error) = self.parts.machine.pause(Duration::from_secs(2)) {
            tracing::warn!(%error, "a vCPU did not stop");
        }
        self.emit_shutdown(exit);
        self.deliver_events();
        let deadline = Instant::now() + LAST_WORDS;
        while self.parts.chardevs.iter().any(Chardev::has_pending) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
            self.parts.chardevs.iter().for_each(Chardev::flush);
        }
        self.parts.chardevs.iter_mut().for_each(Chardev::close);
        if let Some(path) = &self.parts.config.pidfile {
            let _ = std::fs::remove_file(path);
        }
    }
}
