//! The source's half of an update, as a state machine that the host's own loop steps.
//!
//! ```text
//!                          ┌ Alongside: Introduce ─► Await ┐
//!                          ├ Departing: Depart ─► Terminal, then in the keeper: Await ┐
//!  begin ─► (Ask) ─► Prepare ─► Halted: ──────────────┴─► Stop ─► Save ─► HandOver ─► (Terminal | wait) ─► gone
//!   │ preflight:  │        └────────────────────────────────┴───────┴────────┴──────────────┘
//!   └─────────────┤                                     any failure
//!     nothing was │                                         ▼
//!     touched     └─► Finished
//!                              word rolled back, mode undone, subscribers told
//!                              RolledBack in reverse, guest resumed: Finished
//! ```
//!
//! It never blocks except in what the mode, the host and the subscribers do themselves.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::blocker::{BlockReason, Blockers};
use crate::control::Control;
use crate::error::{BoxError, UpdateError};
use crate::fault::{self, Point};
use crate::frame::{FrameError, FrameWriter};
use crate::host::{Backing, GuestActivity, Host, StateWriter};
use crate::mode::{Course, CprMode, HandOver, Introduced, ModeInfo, Prepared, Properties, Wait};
use crate::notify::{Event, Notice, Notifier, NotifyError, Told};
use crate::ownership::{Epoch, Lost, Owner};
use crate::preflight::{self, Asked, Manifest, Policy, REFUSAL_SECTION, Reads};
use crate::registry::FdRegistry;
use crate::timeline::Stamp;

/// What every component of a VMM shares: where descriptors, subscribers and blockers are registered.
#[derive(Debug, Clone)]
pub struct Services {
    /// Descriptors that must survive.
    pub registry: FdRegistry,
    /// Who is told.
    pub notifier: Notifier,
    /// Why not now.
    pub blockers: Blockers,
    /// Updates that the guest has been through.
    pub generation: u64,
    /// How long the host may take to stop the guest.
    pub stop_timeout: Duration,
}

impl Default for Services {
    fn default() -> Self {
        Services {
            registry: FdRegistry::default(),
            notifier: Notifier::default(),
            blockers: Blockers::default(),
            generation: 0,
            stop_timeout: Duration::from_secs(5),
        }
    }
}

impl Services {
    /// Every reason why `mode` is not possible now: blockers first, then what the memory rule finds.
    ///
    /// The memory rule holds for every mode that leaves RAM in place, by whatever name: memory that is not shared,
    /// or whose descriptor is not in the registry, would be lost without a word. So would shared memory without a name
    /// under a mode that leaves it in storage.
    pub fn blocked_reasons(&self, mode: &ModeInfo, host: &dyn Host) -> Vec<BlockReason> {
        let mut reasons = self.blockers.reasons(mode);
        if mode.properties.contains(Properties::RAM_IN_PLACE) {
            reasons.extend(host.memory().iter().filter_map(|region| {
                let name = &region.name;
                let reason = match &region.backing {
                    Backing::Shared { name: fd, id } | Backing::File { name: fd, id, .. }
                        if self.registry.contains(fd, *id) =>
                    {
                        return None;
                    }
                    Backing::Shared { .. } | Backing::File { .. } => {
                        format!("Memory region {name} has no registered descriptor.")
                    }
                    Backing::Private => format!(
                        "Memory region {name} is not compatible with CPR. share=on is required for \
                         memory-backend objects, and guest RAM needs one (-machine memory-backend=ID)."
                    ),
                    Backing::GuestMemfd => {
                        format!("Memory region {name} uses guest_memfd, which is not supported with CPR.")
                    }
                    Backing::Unknown => format!("Memory region {name} has no descriptor to carry over."),
                };
                Some(BlockReason(reason))
            }));
        }
        if mode.properties.contains(Properties::RAM_IN_STORAGE) {
            reasons.extend(host.memory().iter().filter_map(|region| {
                let name = &region.name;
                let reason = match &region.backing {
                    // What is private is no shared memory to be left anywhere: the mode copies it.
                    Backing::File { .. } | Backing::Private => return None,
                    Backing::Shared { .. } => format!(
                        "Memory region {name} is shared memory without a file, which ends with this process. Use \
                         memory-backend-file with share=on, or switch x-ignore-shared off to have it copied."
                    ),
                    Backing::GuestMemfd => {
                        format!("Memory region {name} uses guest_memfd, which is not supported with CPR.")
                    }
                    Backing::Unknown => format!("Memory region {name} is of unknown making."),
                };
                Some(BlockReason(reason))
            }));
        }
        reasons
    }
}

/// What a mode may know of the attempt that it is part of.
#[derive(Debug)]
pub struct Attempt<'a> {
    /// The attempt's control page.
    pub control: &'a Control,
    /// Descriptors that must survive.
    pub registry: &'a FdRegistry,
}

/// What the loop does next.
#[derive(Debug)]
pub enum Step {
    /// Step again; nothing to wait for.
    Again,
    /// Step again after this.
    Wait(Wait),
    /// The host has the terminal action in its slot: run it from the loop. Should it come back, call
    /// [`Update::terminal_returned`] with its answer.
    Terminal,
    /// It is over.
    Finished(Outcome),
}

/// How an update ended, seen from the source.
#[derive(Debug)]
pub enum Outcome {
    /// The target has the guest, or storage has its state: the source must not run it again.
    HandedOver,
    /// The update failed.
    Failed {
        /// Why.
        error: UpdateError,
        /// Whether the guest is as it was before; it belongs to the source. An error here is a second failure, of
        /// resuming it.
        guest: Result<(), BoxError>,
    },
}

enum State {
    /// The host is to say what the target is shown.
    Ask,
    Asking(Manifest),
    Tell,
    Prepare,
    Introduce,
    Depart,
    /// The terminal action that leaves the process is in the host's slot.
    Leaving,
    Await,
    Stop,
    Save,
    HandOver(StateWriter),
    Polling,
    Terminal,
    Finished,
}

/// One attempt to update, in the source.
pub struct Update {
    mode: Box<dyn CprMode>,
    info: ModeInfo,
    services: Services,
    control: Control,
    state: State,
    told: Told,
    activity: Option<GuestActivity>,
    departed: bool,
    preflight: Policy,
    reads: Option<Reads>,
    /// The target refused beforehand, and the user goes on all the same.
    refusal: Option<String>,
}

/// Version 1 of the early `cpr-core/update` section.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct UpdateSection {
    pub(crate) mode: String,
    pub(crate) generation: u64,
}

/// Name of the early section that says which update a frame belongs to.
pub(crate) const UPDATE_SECTION: &str = "cpr-core/update";

/// Name of the only section of a main frame that takes the room of one to come.
const ROOM_SECTION: &str = "cpr-core/room";

/// Version 1 of the main `cpr-core/activity` section.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ActivitySection {
    pub(crate) guest_running: bool,
}

/// Name of the main section that says whether the guest is to run.
pub(crate) const ACTIVITY_SECTION: &str = "cpr-core/activity";

impl Update {
    /// The start of an attempt, with that part of the preflight that takes no time. The guest runs; on an error nothing was
    /// touched.
    ///
    /// # Errors
    /// [`UpdateError::Blocked`], [`UpdateError::Refused`] or [`UpdateError::Setup`].
    pub fn begin(
        services: &Services,
        mut mode: Box<dyn CprMode>,
        host: &dyn Host,
    ) -> Result<Update, UpdateError> {
        let info = mode.info();
        let _span = tracing::info_span!("preflight", mode = %info.id).entered();
        let reasons = services.blocked_reasons(&info, host);
        if !reasons.is_empty() {
            return Err(UpdateError::Blocked { mode: info.id, reasons });
        }
        // Before the check, which may open what nobody would undo if this failed after it.
        let control = Control::create(fresh_epoch()).map_err(UpdateError::Setup)?;
        fault::at(Point::Check).map_err(UpdateError::Refused)?;
        mode.check().map_err(UpdateError::Refused)?;
        control.timeline().stamp(Stamp::Begin);
        Ok(Update {
            mode,
            info,
            services: services.clone(),
            control,
            state: State::Ask,
            told: Told::default(),
            activity: None,
            departed: false,
            preflight: Policy::default(),
            reads: None,
            refusal: None,
        })
    }

    /// The mode.
    pub fn mode(&self) -> &ModeInfo {
        &self.info
    }

    /// The attempt's shared page; its timeline is stamped by the host's vCPU threads as well.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Whether the guest was asked to stop, and was not resumed here since.
    pub fn has_stopped_guest(&self) -> bool {
        self.activity.is_some()
    }

    /// Whether the program has left its process: from then on it is the keeper of the old image.
    pub fn has_departed(&self) -> bool {
        self.departed
    }

    /// What becomes of the update if the target refuses it beforehand: [`Policy::Require`] unless it is said here, before
    /// the first step.
    pub fn set_preflight(&mut self, policy: Policy) {
        self.preflight = policy;
    }

    /// Why the target refused beforehand, if the update went on all the same ([`Policy::Warn`]).
    pub fn preflight_refusal(&self) -> Option<&str> {
        self.refusal.as_deref()
    }

    /// Which section versions the target reads, if it has said so.
    pub fn reads(&self) -> Option<&Reads> {
        self.reads.as_ref()
    }

    /// Notes which section versions the target reads, for a host that knows it by other means than the preflight.
    pub fn set_reads(&mut self, reads: Reads) {
        self.reads = Some(reads);
    }

    /// Goes one phase further. Once it has answered [`Step::Finished`], this and the other ways to end an update
    /// answer [`UpdateError::Over`] and do nothing.
    pub fn step(&mut self, host: &mut dyn Host) -> Step {
        match self.try_step(host) {
            Ok(step) => step,
            Err(error) => Step::Finished(self.fail(host, error)),
        }
    }

    fn try_step(&mut self, host: &mut dyn Host) -> Result<Step, UpdateError> {
        match std::mem::replace(&mut self.state, State::Finished) {
            State::Ask => {
                let manifest = if self.preflight == Policy::Off { None } else { host.manifest(&self.info) };
                let Some(mut manifest) = manifest else {
                    self.state = State::Tell;
                    return self.try_step(host);
                };
                preflight::complete(&mut manifest, self.services.registry.entries());
                self.ask(manifest)
            }
            State::Asking(manifest) => self.ask(manifest),
            State::Tell => {
                let _span = tracing::info_span!("prepare", mode = %self.info.id).entered();
                self.state = State::Prepare;
                let notice = notice(Event::Prepare, &self.info, &self.control);
                self.told.tell_all(&self.services.notifier, &notice)?;
                Ok(Step::Again)
            }
            State::Prepare => {
                let _span = tracing::info_span!("prepare", mode = %self.info.id).entered();
                self.state = State::Prepare;
                fault::at(Point::Prepare).map_err(|source| self.prepare_error(source))?;
                let prepared = self.mode.prepare(&attempt(&self.control, &self.services));
                self.after_prepare(
                    prepared,
                    match self.mode.course() {
                        Course::Halted => State::Stop,
                        Course::Departing => State::Depart,
                        Course::Alongside => State::Introduce,
                    },
                )
            }
            State::Introduce => {
                let _span = tracing::info_span!("introduce").entered();
                let early = self.early_frame(host)?;
                let state = StateWriter { early, main: FrameWriter::default() };
                self.introduce(host, state)
            }
            State::Depart => {
                let _span = tracing::info_span!("depart").entered();
                host.before_departure().map_err(|source| self.prepare_error(source))?;
                fault::at(Point::Depart).map_err(|source| self.prepare_error(source))?;
                let early = self.early_frame(host)?;
                let mut main = FrameWriter::default();
                main.put(ROOM_SECTION, 0, 1, vec![0; host.state_len_hint()]).map_err(save_error)?;
                // Everything but the departure itself is done before the guest stops.
                self.introduce(host, StateWriter { early, main })
            }
            State::Leaving => {
                self.state = State::Leaving;
                Ok(Step::Terminal)
            }
            State::Await => {
                let _span = tracing::info_span!("await-target").entered();
                // A target that its user ends before it has asked for the state takes the guest with it.
                if self.is_committed() {
                    return Ok(Step::Finished(Outcome::HandedOver));
                }
                fault::at(Point::AwaitTarget).map_err(|source| self.prepare_error(source))?;
                let prepared = self.mode.await_target(&attempt(&self.control, &self.services));
                // Once more: the mode has drained the ring that told it.
                if self.is_committed() {
                    return Ok(Step::Finished(Outcome::HandedOver));
                }
                self.state = State::Await;
                self.after_prepare(prepared, State::Stop)
            }
            State::Stop => {
                let _span = tracing::info_span!("stop").entered();
                fault::at(Point::Stop).map_err(UpdateError::Stop)?;
                self.control.timeline().stamp(Stamp::StopRequested);
                // vCPUs may have stopped since for another reason, as a reset.
                self.control.timeline().clear(Stamp::FirstExit);
                self.stop_guest(host)?;
                self.tell_again(Event::Stopped)?;
                self.control.timeline().stamp(Stamp::Stopped);
                self.state = State::Save;
                Ok(Step::Again)
            }
            State::Save => {
                let _span = tracing::info_span!("save").entered();
                fault::at(Point::Save).map_err(UpdateError::Save)?;
                let main = self.main_frame(host)?;
                let early = match self.mode.course() {
                    Course::Halted => self.early_frame(host)?,
                    Course::Departing | Course::Alongside => FrameWriter::default(),
                };
                let state = StateWriter { early, main };
                self.tell_again(Event::HandOver)?;
                self.control.timeline().stamp(Stamp::Saved);
                self.state = State::HandOver(state);
                Ok(Step::Again)
            }
            State::HandOver(state) => {
                let _span = tracing::info_span!("hand-over").entered();
                fault::at(Point::HandOver).map_err(|source| self.hand_over_error(source))?;
                let attempt = attempt(&self.control, &self.services);
                let next = self.mode.hand_over(&attempt, state);
                self.after_hand_over(host, next)
            }
            State::Polling => {
                let attempt = attempt(&self.control, &self.services);
                let next = self.mode.poll_hand_over(&attempt);
                self.after_hand_over(host, next)
            }
            State::Terminal => {
                self.state = State::Terminal;
                Ok(Step::Terminal)
            }
            State::Finished => Ok(Step::Finished(over())),
        }
    }

    fn ask(&mut self, manifest: Manifest) -> Result<Step, UpdateError> {
        let _span = tracing::info_span!("preflight", mode = %self.info.id).entered();
        let asked = self.mode.preflight(&attempt(&self.control, &self.services), &manifest);
        match asked.map_err(|source| self.prepare_error(source))? {
            Asked::Wait(wait) => {
                self.state = State::Asking(manifest);
                return Ok(Step::Wait(wait));
            }
            Asked::Nobody => {}
            Asked::Accepted(reads) => self.reads = Some(reads),
            Asked::Refused(reason) if self.preflight == Policy::Warn => {
                tracing::warn!(%reason, "preflight refused the update, which goes on");
                self.refusal = Some(reason);
            }
            Asked::Refused(reason) => {
                return Err(UpdateError::Preflight { mode: self.info.id.clone(), reason });
            }
        }
        self.state = State::Tell;
        Ok(Step::Again)
    }

    fn after_hand_over(
        &mut self,
        host: &mut dyn Host,
        next: Result<HandOver, BoxError>,
    ) -> Result<Step, UpdateError> {
        match next.map_err(|source| self.hand_over_error(source))? {
            HandOver::Terminal(action) => {
                host.request_terminal(action);
                self.state = State::Terminal;
                Ok(Step::Terminal)
            }
            HandOver::Wait(wait) => {
                self.state = State::Polling;
                Ok(Step::Wait(wait))
            }
            HandOver::Complete => {
                fault::at(Point::Complete).map_err(|source| self.hand_over_error(source))?;
                Ok(Step::Finished(Outcome::HandedOver))
            }
        }
    }

    /// Stops the guest, and remembers what to resume.
    fn stop_guest(&mut self, host: &mut dyn Host) -> Result<(), UpdateError> {
        // Before the call: a host that fails half-way has stopped something, and must be resumed.
        self.activity = Some(host.activity());
        let deadline = Instant::now() + self.services.stop_timeout;
        self.activity = Some(host.stop(deadline).map_err(UpdateError::Stop)?);
        Ok(())
    }

    /// A frame that the target reads.
    fn writer(&self) -> FrameWriter {
        self.reads.clone().map_or_else(FrameWriter::default, FrameWriter::for_reader)
    }

    fn early_frame(&self, host: &mut dyn Host) -> Result<FrameWriter, UpdateError> {
        let mut early = self.writer();
        host.save_early(&self.info, &mut early).map_err(UpdateError::Save)?;
        let section = UpdateSection { mode: self.info.id.to_string(), generation: self.services.generation };
        early.put_value(UPDATE_SECTION, 0, 1, &section).map_err(save_error)?;
        if let Some(refusal) = &self.refusal {
            early.put_value(REFUSAL_SECTION, 0, 1, refusal).map_err(save_error)?;
        }
        Ok(early)
    }

    fn main_frame(&self, host: &mut dyn Host) -> Result<FrameWriter, UpdateError> {
        let mut main = self.writer();
        host.save(&mut main).map_err(UpdateError::Save)?;
        let section = ActivitySection { guest_running: self.activity == Some(GuestActivity::Running) };
        main.put_value(ACTIVITY_SECTION, 0, 1, &section).map_err(save_error)?;
        Ok(main)
    }

    fn after_prepare(
        &mut self,
        prepared: Result<Prepared, BoxError>,
        next: State,
    ) -> Result<Step, UpdateError> {
        match prepared.map_err(|source| self.prepare_error(source))? {
            Prepared::Wait(wait) => Ok(Step::Wait(wait)),
            Prepared::Ready => {
                self.state = next;
                Ok(Step::Again)
            }
        }
    }

    fn introduce(&mut self, host: &mut dyn Host, state: StateWriter) -> Result<Step, UpdateError> {
        fault::at(Point::Introduce).map_err(|source| self.prepare_error(source))?;
        let introduced = self.mode.introduce(&attempt(&self.control, &self.services), state);
        match introduced.map_err(|source| self.prepare_error(source))? {
            Introduced::Done => {
                self.state = State::Await;
                Ok(Step::Again)
            }
            Introduced::Terminal(action) => {
                self.control.timeline().clear(Stamp::DepartureExit);
                self.stop_guest(host)?;
                host.depart().map_err(|source| self.prepare_error(source))?;
                fault::at(Point::Leave).map_err(|source| self.prepare_error(source))?;
                host.request_terminal(action);
                self.state = State::Leaving;
                Ok(Step::Terminal)
            }
        }
    }

    /// The terminal action came back with `answer`. An error: the guest is taken back. `Ok`: the program goes on in another
    /// process, and so does this update.
    pub fn terminal_returned(&mut self, host: &mut dyn Host, answer: Result<(), BoxError>) -> Step {
        match (answer, &self.state) {
            (_, State::Finished) => Step::Finished(over()),
            (Ok(()), State::Leaving) => match self.arrive(host) {
                Ok(()) => Step::Again,
                Err(error) => Step::Finished(self.fail(host, error)),
            },
            (answer, _) => {
                let source = answer.err().unwrap_or_else(|| "the terminal action returned".into());
                let error = self.hand_over_error(source);
                Step::Finished(self.fail(host, error))
            }
        }
    }

    /// In the other process: runs the guest until the target is ready.
    fn arrive(&mut self, host: &mut dyn Host) -> Result<(), UpdateError> {
        self.departed = true;
        self.state = State::Await;
        host.departed().map_err(|source| self.hand_over_error(source))?;
        fault::at(Point::Arrive).map_err(|source| self.hand_over_error(source))?;
        if let Some(activity) = self.activity {
            // Only then forgotten: a guest that does not run is resumed once more by the roll back.
            host.resume(activity).map_err(|source| self.hand_over_error(source))?;
            self.activity = None;
        }
        Ok(())
    }

    /// Ends the attempt at the user's wish. [`Outcome::HandedOver`]: too late, the target has committed. A terminal
    /// action that the host still has in its slot is to be dropped unrun.
    pub fn cancel(&mut self, host: &mut dyn Host) -> Outcome {
        if self.is_over() {
            return over();
        }
        self.fail(host, UpdateError::Cancelled)
    }

    fn prepare_error(&self, source: BoxError) -> UpdateError {
        UpdateError::Prepare { mode: self.info.id.clone(), source }
    }

    fn hand_over_error(&self, source: BoxError) -> UpdateError {
        UpdateError::HandOver { mode: self.info.id.clone(), source }
    }

    fn is_committed(&self) -> bool {
        self.control.ownership().owner() == Some(Owner::Target)
    }

    fn is_over(&self) -> bool {
        matches!(self.state, State::Finished)
    }

    /// Wins the word back, then undoes everything in reverse order, then resumes the guest.
    fn fail(&mut self, host: &mut dyn Host, error: UpdateError) -> Outcome {
        let _span = tracing::info_span!("roll-back", %error).entered();
        self.state = State::Finished;
        if self.control.ownership().roll_back() == Err(Lost::To(Owner::Target)) {
            tracing::warn!(%error, "too late to take the guest back: the target has committed");
            return Outcome::HandedOver;
        }
        self.mode.roll_back(&attempt(&self.control, &self.services));
        if let Err(error) = self.tell_again(Event::RolledBack) {
            tracing::error!(%error, "an ending cannot fail");
        }
        let guest = self.activity.take().map_or(Ok(()), |activity| host.resume(activity));
        Outcome::Failed { error, guest }
    }

    fn tell_again(&self, event: Event) -> Result<(), NotifyError> {
        self.told.tell_again(&notice(event, &self.info, &self.control))
    }
}

impl std::fmt::Debug for Update {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Update")
            .field("mode", &self.info)
            .field("control", &self.control)
            .finish_non_exhaustive()
    }
}

fn over() -> Outcome {
    Outcome::Failed { error: UpdateError::Over, guest: Ok(()) }
}

fn attempt<'a>(control: &'a Control, services: &'a Services) -> Attempt<'a> {
    Attempt { control, registry: &services.registry }
}

fn save_error(error: FrameError) -> UpdateError {
    UpdateError::Save(error.into())
}

pub(crate) fn notice<'a>(event: Event, mode: &'a ModeInfo, control: &Control) -> Notice<'a> {
    Notice { event, mode, epoch: control.epoch() }
}

/// A number that no other attempt has, in the 62 bits that the ownership word keeps for it.
fn fresh_epoch() -> Epoch {
    // RandomState is seeded by the kernel once per process and differs per call.
    let random = RandomState::new().build_hasher().finish();
    (random ^ oslib::clock::monotonic_ns()) >> 2 | 1
}
