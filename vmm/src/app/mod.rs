//! The running program: one machine, its chardevs and monitors, and the main loop that drives them.
//!
//! Everything here runs on one thread. vCPU threads reach it through [`vmm_core`]'s event queue only.
//!
//! - `arrival`: how the guest of another process comes in.
//! - `front_ends`: which bytes go to which monitor or serial port.
//! - `commands`: what monitor commands do.
//! - `departure`: what the program is while it runs the guest in the keeper.
//! - `device_queries`: what monitors tell of devices.
//! - `device_shape`: what guest and target must agree on of each PCI device.
//! - `host`: what an update does to the program ([`cpr_core::Host`]), and the sections it saves.
//! - `preflight`: what the next program is shown of the machine, and what this one says to another's.
//! - `lifecycle`: run states, reset, power-off, the end.
//! - `storage`: a guest that comes out of storage, or goes there.

mod arrival;
mod commands;
mod departure;
mod device_queries;
mod device_shape;
mod front_ends;
mod host;
mod lifecycle;
mod observer;
mod preflight;
mod storage;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cpr_core::{Outcome, Properties, Services, Step, TargetPhase, TerminalAction, Update, UpdateError, Wait};
use cpr_exec::KeeperEnd;
use cpr_reboot::Stored;
use cpr_transfer::Listener;
use oslib::signals::{SignalFd, SignalMask};
use vmm_core::virtio::Backing;

use crate::arriving::Arriving;
use crate::chardev::{Chardev, Direction};
use crate::cli::config::{Config, Incoming};
use crate::devices::Consoles;
use crate::errors;
use crate::event_loop::{EventLoop, Interest, Ready, Token};
use crate::migration::{Progress, Settings, Status};
use crate::monitor::Channels;
use crate::sandbox::Sandbox;
use crate::startup::{self, Hardware, HostSide, Ram};

pub use front_ends::{FrontEnd, User};
use host::Loaded;
pub use host::{
    Arrived, EarlyState, FrontEndState, find_named_fds, read_machine, room_for_state, take_early_state,
};
use lifecycle::Reset;
pub use lifecycle::{Exit, RunState};
pub use observer::BlackoutObserver;
pub use preflight::{answer as answer_preflight, judge, judge_shown, manifest_of};
pub(crate) use storage::open_state;

/// How long an orderly end waits for peers to take the last output.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// How often a full serial FIFO is looked at again.
const FIFO_POLL: Duration = Duration::from_millis(5);
/// How often a keeper that an update waits for is hurried.
const KEEPER_POLL: Duration = Duration::from_millis(5);

/// What a monitor is told while the guest has not arrived, in QEMU's words.
const WAITING: &str = "Guest is waiting for an incoming migration";
/// What a monitor is told once the guest is in storage.
const RESTS: &str = "the guest is in storage since it was migrated; 'cont' goes on with it here, 'quit' leaves it where it is";
/// What a monitor is told while the guest stands still for an update.
const UNDER_WAY: &str = "There's a migration process in progress";
/// What a monitor is told once the guest is in another process.
const GONE: &str =
    "the guest belongs to another process since it was transferred; all that is left is to quit this one";

/// Everything that `startup` has made ready.
pub struct Parts {
    pub(crate) config: Config,
    pub(crate) services: Services,
    pub(crate) sandbox: Sandbox,
    /// `None` while the guest has not arrived.
    pub(crate) hardware: Option<Hardware>,
    pub(crate) observer: Arc<BlackoutObserver>,
    pub(crate) signals: SignalFd,
    pub(crate) original_mask: SignalMask,
    pub(crate) chardevs: Vec<Chardev>,
    pub(crate) front_ends: Vec<FrontEnd>,
    pub(crate) consoles: Consoles,
    pub(crate) settings: Settings,
    pub(crate) named_fds: BTreeMap<String, Arc<OwnedFd>>,
    pub(crate) run_state: RunState,
    pub(crate) arriving: Option<Arriving>,
    /// Waits for a source, in the target of another process.
    pub(crate) listening: Option<Listener>,
    /// The guest is in storage, and was not fetched yet.
    pub(crate) in_storage: bool,
}

impl Parts {
    /// Builds the machine around the guest's RAM, connected to what there is.
    fn build_hardware(&self, config: &Config, ram: Ram) -> anyhow::Result<Hardware> {
        let Parts { services, observer, chardevs, consoles, .. } = self;
        ram.into_hardware(config, &HostSide { services, observer, chardevs, consoles })
    }
}

/// The running program.
pub struct App {
    parts: Parts,
    events: EventLoop,
    progress: Progress,
    update: Option<Update>,
    /// What the update waits for.
    update_wait: Option<Wait>,
    terminal: Option<TerminalAction>,
    /// This is the keeper: another process has the monitors, and this one runs the guest until that one is built.
    departed: bool,
    /// Monitors were told that the guest stops.
    stop_told: bool,
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
    /// The target is another process, which has monitors of its own: what travels is the guest's alone.
    moves_out: bool,
    /// The target may run under another kernel.
    outlives_kernel: bool,
    /// Where the present update puts the guest, or the last one has put it, if that is no process.
    stored: Option<Stored>,
    /// What a paused guest goes back to when an update fails.
    state_before_update: RunState,
    exit: Option<Exit>,
    /// What the guest had printed and was not sent when its state was saved, for each of its chardevs. Where the state is
    /// this goes too, and nothing of it is sent here unless the guest goes on here.
    unsent: BTreeMap<usize, Vec<u8>>,
    /// When the reset that the guest has asked for is tried, until it is carried out.
    reset_due: Option<Instant>,
    /// What the update brought that waits for its commit.
    loaded: Loaded,
    /// Resets that happened in the keeper, and that monitors are to hear of.
    untold_resets: Vec<Reset>,
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
            update_wait: None,
            terminal: None,
            departed: false,
            stop_told: false,
            keeper: None,
            suspended: false,
            resumed: false,
            pending_events: Vec::new(),
            saved_fds: Vec::new(),
            moves_out: false,
            outlives_kernel: false,
            stored: None,
            state_before_update: RunState::Prelaunch,
            exit: None,
            unsent: BTreeMap::new(),
            reset_due: None,
            loaded: Loaded::default(),
            untold_resets: Vec::new(),
        })
    }

    /// Boots the guest, or takes it over if the command line says from where. Under `-incoming defer` a monitor will; and one
    /// of another process has yet to arrive.
    ///
    /// # Errors
    /// The guest cannot be booted, or not be taken over.
    pub fn begin(&mut self) -> anyhow::Result<()> {
        if self.parts.listening.is_some() {
            self.progress.status = Status::Setup;
            return Ok(());
        }
        if self.parts.in_storage {
            return match self.parts.config.incoming.clone() {
                Some(Incoming::Channel(channel)) => self.fetch_from(channel),
                Some(Incoming::Defer) | None => Ok(()),
            };
        }
        if let Some(arriving) = &self.parts.arriving {
            let channel = match &self.parts.config.incoming {
                Some(Incoming::Defer) => {
                    arriving.incoming.control().rendezvous().enter(TargetPhase::Deferred);
                    return Ok(());
                }
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
        let Hardware { ram, machine, .. } = self.hardware()?;
        let entry = startup::load_kernel(&self.parts.config, ram)?;
        machine.set_entry(&|regs, sregs| entry.apply(regs, sregs))?;
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
            if self.exit.is_none() || self.departed {
                if self.reset_due.is_some_and(|at| at <= Instant::now()) {
                    self.carry_out_reset();
                }
                self.run_update();
                self.poll_arrival();
            }
            self.deliver_events();
            // In the keeper an end of the guest is handed over as such, to the process that its user knows.
            if !self.departed
                && let Some(exit) = self.exit.take()
            {
                if exit == Exit::Fatal {
                    self.flush_output();
                    cpr_exec::fall_back();
                }
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
        let mut interests = Vec::new();
        if let Some(Hardware { machine, .. }) = &self.parts.hardware {
            interests.push(Interest::read_forever(machine.events(), Token::Vcpus));
        }
        let waited_for = self.update_wait.iter().flat_map(|wait| &wait.fds);
        interests.extend(waited_for.map(|fd| Interest::read(fd, Token::Update)));
        if self.departed {
            // Signals are for the process that was left, and so are monitors; what the guest prints is sent from here.
            let guests = self.guests_chardevs();
            interests.extend(guests.flat_map(|at| self.parts.chardevs[at].interests(at, Direction::Output)));
            return interests;
        }
        interests.extend(self.arrival_fds().iter().map(|fd| Interest::read(fd, Token::Incoming)));
        interests.push(Interest::read_forever(&self.parts.signals, Token::Signals));
        for (at, chardev) in self.parts.chardevs.iter().enumerate() {
            let direction = match (self.wants_input(at), self.is_in_transfer(at)) {
                (true, false) => Direction::Both,
                (false, false) => Direction::NoInput,
                (true, true) => Direction::NoAccept,
                (false, true) => Direction::Output,
            };
            interests.extend(chardev.interests(at, direction));
        }
        if !self.guest_is_away() {
            // Later it is still readable.
            interests.extend(self.full_consoles().map(|end| Interest::read_forever(end.room(), Token::Room)));
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
        let reset = self.reset_due.map(|at| at.saturating_duration_since(Instant::now()));
        self.timeout_but_for_resets().into_iter().chain(reset).min()
    }

    fn timeout_but_for_resets(&self) -> Option<Duration> {
        match (&self.update, &self.keeper) {
            (Some(_), None) => match &self.update_wait {
                Some(wait) => wait.deadline.map(|at| at.saturating_duration_since(Instant::now())),
                None => Some(Duration::ZERO),
            },
            // A keeper that was hurried may have stepped down only after it.
            (Some(_), Some(_)) => Some(KEEPER_POLL),
            (None, _) if self.serial_is_full() => Some(FIFO_POLL),
            (None, _) => {
                let deadline = self.parts.listening.as_ref().and_then(|listener| listener.wait().deadline);
                deadline.map(|at| at.saturating_duration_since(Instant::now()))
            }
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
                // A keeper sends what the guest prints; input is another program's.
                if ready.readable && matches!(ready.token, Token::Peer(_)) && !self.departed {
                    self.read_input(at);
                }
            }
            // The next round watches for room.
            Token::LeftOver(at) => self.parts.chardevs[at].note_left_over()?,
            // What waits is given to them in each round anyway.
            Token::Room => self.full_consoles().try_for_each(|end| end.room().drain().map(drop))?,
            Token::Keeper => self.reap_keeper(),
            // Both are stepped in each round anyway.
            Token::Update | Token::Incoming => {}
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
        self.update_wait = None;
        let mut step = update.step(self);
        loop {
            if let Some(refusal) = update.preflight_refusal() {
                self.progress.preflight_refusal.get_or_insert_with(|| refusal.to_owned());
            }
            step = match step {
                Step::Again => update.step(self),
                Step::Terminal => match self.terminal.take() {
                    // Returns only if it failed, or in the keeper.
                    Some(action) => {
                        let answer = action();
                        if answer.is_err() {
                            self.progress.status = Status::Completed;
                            self.emit_migration_event();
                        }
                        update.terminal_returned(self, answer)
                    }
                    None => update.step(self),
                },
                Step::Wait(wait) => {
                    self.update = Some(update);
                    self.update_wait = Some(wait);
                    return;
                }
                Step::Finished(outcome) => return self.update_ended(outcome),
            }
        }
    }

    fn update_ended(&mut self, outcome: Outcome) {
        self.parts.observer.disarm();
        self.saved_fds.clear();
        if self.departed {
            match outcome {
                Outcome::HandedOver => self.leave_it_to_the_target(),
                Outcome::Failed { .. } => self.come_back(),
            }
        }
        if matches!(outcome, Outcome::Failed { .. })
            && let Some(hardware) = &self.parts.hardware
            && let Err(error) = hardware.machine.recall_threads()
        {
            // They were to rest for a departure that may never have come about.
            tracing::error!(%error, "a vCPU is without a thread");
        }
        if std::mem::take(&mut self.stop_told) && self.parts.run_state == RunState::Running {
            self.emit("RESUME", None);
        }
        match outcome {
            Outcome::HandedOver => {
                self.progress.status = Status::Completed;
                for (&at, unsent) in &self.unsent {
                    self.parts.chardevs[at].output().release_after(unsent.len());
                }
                match self.stored {
                    Some(_) => self.set_run_state(RunState::PostMigrate),
                    None => self.guest_moved_out(),
                }
            }
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
    fn start_update(&mut self, channels: Channels) -> Result<(), crate::monitor::QmpError> {
        use crate::monitor::QmpError;
        if self.update.is_some() {
            return Err(QmpError::generic(UNDER_WAY));
        }
        if self.is_waiting_for_guest() {
            return Err(QmpError::generic(WAITING));
        }
        if self.parts.run_state == RunState::PostMigrate {
            return Err(self.guest_is_elsewhere());
        }
        if !self.parts.run_state.can_migrate() {
            return Err(QmpError::generic(format!(
                "an update is not possible in run state '{}'",
                self.parts.run_state.name()
            )));
        }
        let request = self.update_request(channels)?;
        let (mode, stored) = self.parts.settings.attempt(request)?;
        let properties = mode.properties();
        if properties.contains(Properties::DESCRIPTORS_SURVIVE) {
            // Later on the next program would find out, and so might the one that it is to fall back to.
            self.backings().map_err(|error| QmpError::generic(errors::text(error.as_ref())))?;
        }
        let (mode_name, course) = (mode.id().to_string(), mode.course());
        let mut update = Update::begin(&self.parts.services, mode, self)
            .map_err(|error| QmpError::generic(errors::text(&error)))?;
        self.moves_out = !properties.contains(Properties::SAME_PID);
        self.outlives_kernel = !properties.contains(Properties::SAME_KERNEL);
        self.stored = stored;
        update.set_preflight(self.parts.settings.preflight());
        self.parts.observer.arm(update.control().clone(), course);
        self.progress = Progress {
            status: Status::Setup,
            error: None,
            control: Some(update.control().clone()),
            mode: Some(mode_name),
            generation: self.parts.services.generation,
            preflight_refusal: None,
        };
        self.emit_migration_event();
        self.update = Some(update);
        Ok(())
    }

    fn backings(&self) -> anyhow::Result<Vec<(u8, Backing)>> {
        Ok(self.hardware()?.machine.backings()?)
    }

    fn cancel_update(&mut self) {
        if let Some(mut update) = self.update.take() {
            // Descriptors that stay readable from now on would keep the loop awake.
            self.update_wait = None;
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

    /// Gives peers a moment to take what this program has said.
    fn flush_output(&self) {
        let deadline = Instant::now() + LAST_WORDS;
        while self.parts.chardevs.iter().any(Chardev::has_pending) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
            self.parts.chardevs.iter().for_each(Chardev::flush);
        }
    }

    /// The orderly end: last output, terminal modes, socket paths.
    fn end(&mut self, exit: &Exit) {
        if let Some(mut update) = self.update.take() {
            update.cancel(self);
        }
        if let Some(arriving) = self.parts.arriving.take()
            && *exit != Exit::Fatal
        {
            arriving.forgo();
        }
        let paused =
            self.parts.hardware.as_ref().map(|hardware| hardware.machine.pause(Duration::from_secs(2)));
        if let Some(Err(error)) = paused {
            tracing::warn!(%error, "the machine did not stop");
            // To take it apart would be to wait for what holds it up.
            std::mem::forget(self.parts.hardware.take());
        }
        self.emit_shutdown(exit);
        self.deliver_events();
        self.flush_output();
        self.leave_to_source();
        self.remove_traces();
    }

    /// Gives terminals back, and removes what others found this program by.
    pub fn remove_traces(&mut self) {
        self.parts.chardevs.iter_mut().for_each(Chardev::close);
        self.parts.config.pidfile.iter().for_each(|path| startup::remove_pidfile(path));
    }
}
