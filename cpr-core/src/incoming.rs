//! The target's half of an update.
//!
//! ```text
//!  begin (Adopt) ──► load (Restored) ──► commit (word flips, guest runs, Running) ──► released (Released)
//!        └─────────────────┴──────────► abandon (Abandoned, in reverse order)
//! ```
//!
//! Until `commit` the target is passive: it reads from no preserved descriptor, prints nothing, and writes neither
//! guest RAM nor state, so that the source can still take the guest back unchanged.

use crate::control::Control;
use crate::error::IncomingError;
use crate::fault::{self, Point};
use crate::frame::Frame;
use crate::host::{GuestActivity, Host};
use crate::mode::{MainSource, ModeInfo};
use crate::notify::{Event, NotifyError, Told};
use crate::ownership::Lost;
use crate::preflight::REFUSAL_SECTION;
use crate::registry::{FdEntry, FdPolicy, FdRegistry};
use crate::timeline::{Report, Stamp};
use crate::update::{ACTIVITY_SECTION, ActivitySection, Services, UPDATE_SECTION, UpdateSection, notice};

/// What a mode's receiving end found.
#[derive(Debug)]
pub struct Arrival {
    /// The mode that brought it.
    pub mode: ModeInfo,
    /// The early frame; the mode has taken its own sections out of it.
    pub early: Frame,
    /// The descriptors, decoded by the mode.
    pub registry: FdRegistry,
    /// The attempt's control page.
    pub control: Control,
}

/// An update that is coming in, in the target.
pub struct Incoming {
    mode: ModeInfo,
    services: Services,
    control: Control,
    early: Frame,
    activity: GuestActivity,
    told: Told,
    refusal: Option<String>,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming")
            .field("mode", &self.mode)
            .field("activity", &self.activity)
            .finish_non_exhaustive()
    }
}

impl Incoming {
    /// Takes over the descriptors and tells subscribers `Adopt`. Call it before any device is made; sets
    /// `services.generation`.
    ///
    /// # Errors
    /// The frame says nothing of an update, or says it wrongly; or a subscriber refuses, and those who were told
    /// `Adopt` have been told `Abandoned`.
    pub fn begin(services: &mut Services, mut arrival: Arrival) -> Result<Incoming, IncomingError> {
        fault::at(Point::Adopt).map_err(IncomingError::Load)?;
        let section = arrival.early.require(UPDATE_SECTION, 0)?;
        let update: UpdateSection = section.decode(1)?;
        if update.mode != arrival.mode.id.as_str() {
            let reason = format!("written by mode '{}', received by '{}'", update.mode, arrival.mode.id);
            return Err(section.malformed(reason).into());
        }
        // A fallback start is the program that the guest has been with already.
        let generation =
            update.generation.checked_add(u64::from(!arrival.control.rendezvous().is_fallback()));
        let generation =
            generation.ok_or_else(|| section.malformed(format!("generation {}", update.generation)))?;
        let refusal = arrival.early.take(REFUSAL_SECTION, 0).map(|section| section.decode(1)).transpose()?;
        services.registry.absorb(arrival.registry).map_err(|error| section.malformed(error))?;
        services.generation = generation;
        let mut incoming = Incoming {
            mode: arrival.mode,
            services: services.clone(),
            control: arrival.control,
            early: arrival.early,
            activity: GuestActivity::Paused,
            told: Told::default(),
            refusal,
        };
        match incoming.tell_all(Event::Adopt) {
            Ok(()) => Ok(incoming),
            Err(error) => {
                incoming.abandon();
                Err(error.into())
            }
        }
    }

    /// The mode that brought the update.
    pub fn mode(&self) -> &ModeInfo {
        &self.mode
    }

    /// Early sections, for the host to take its own.
    pub fn early(&mut self) -> &mut Frame {
        &mut self.early
    }

    /// Whether the guest is to run after the commit; known once the state is [loaded](Self::load).
    pub fn activity(&self) -> GuestActivity {
        self.activity
    }

    /// The attempt's shared page.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Why this program had refused beforehand, if its user went on all the same.
    pub fn preflight_refusal(&self) -> Option<&str> {
        self.refusal.as_deref()
    }

    /// The true blackout and its phases, as far as they are known.
    pub fn report(&self) -> Report {
        self.control.timeline().report()
    }

    /// Reads the main frame, lets the host load it, and checks that nothing was left over. The guest does not run
    /// yet, and on an error must not.
    ///
    /// # Errors
    /// Anything that makes this program unfit for this guest; call [`abandon`](Self::abandon) then.
    pub fn load(&mut self, host: &mut dyn Host, main: &mut dyn MainSource) -> Result<(), IncomingError> {
        let mut frame = {
            let _span = tracing::info_span!("load").entered();
            fault::at(Point::Load).map_err(IncomingError::Read)?;
            main.read_main().map_err(IncomingError::Read)?
        };
        if frame.epoch != self.control.epoch() {
            return Err(IncomingError::OtherUpdate { found: frame.epoch, expected: self.control.epoch() });
        }
        self.control.timeline().stamp(Stamp::Loaded);
        self.control.rendezvous().note_progress();
        fault::at(Point::Loaded).map_err(IncomingError::Load)?;
        let activity: ActivitySection = frame.require(ACTIVITY_SECTION, 0)?.decode(1)?;
        self.activity = if activity.guest_running { GuestActivity::Running } else { GuestActivity::Paused };
        let _span = tracing::info_span!("restore").entered();
        host.load(&mut frame).map_err(IncomingError::Load)?;
        self.control.rendezvous().note_progress();
        let mut left = self.early.remaining();
        left.extend(frame.remaining());
        if !left.is_empty() {
            return Err(IncomingError::UnclaimedSections(left));
        }
        let lost: Vec<_> = self.unclaimed(FdPolicy::MustSurvive).iter().map(ToString::to_string).collect();
        if !lost.is_empty() {
            return Err(IncomingError::UnclaimedDescriptors(lost));
        }
        self.tell_all(Event::Restored)?;
        self.control.timeline().stamp(Stamp::Restored);
        fault::at(Point::Restored).map_err(IncomingError::Load)?;
        Ok(())
    }

    /// Wins the ownership word and runs the guest. From here on there is no way back.
    ///
    /// # Errors
    /// [`IncomingError::RolledBack`]: the guest belongs to somebody else, touch nothing. [`IncomingError::Resume`]:
    /// committed, but the guest does not run.
    pub fn commit(&mut self, host: &mut dyn Host) -> Result<(), IncomingError> {
        let _span = tracing::info_span!("commit").entered();
        fault::at(Point::Commit).map_err(IncomingError::Load)?;
        match self.control.ownership().commit() {
            Ok(()) => {}
            Err(Lost::To(_) | Lost::OtherAttempt) => return Err(IncomingError::RolledBack),
        }
        self.control.timeline().stamp(Stamp::Committed);
        host.resume(self.activity).map_err(IncomingError::Resume)?;
        let _ = fault::at(Point::Committed);
        for entry in self.unclaimed(FdPolicy::MayBeRebuilt) {
            tracing::warn!("descriptor {entry} is not used by this program and was closed");
            self.services.registry.delete(&entry.name, entry.id);
        }
        self.tell_all(Event::Running)?;
        Ok(())
    }

    /// Takes the guest in order to end it, unloaded as it is: the user ended this program before the guest was taken over,
    /// and the source must not go on with it.
    ///
    /// # Errors
    /// [`IncomingError::RolledBack`]: the source has it back already.
    pub fn forgo(&self) -> Result<(), IncomingError> {
        self.control.ownership().commit().map_err(|_| IncomingError::RolledBack)
    }

    /// The keeper or source has ended: tells `Released`.
    pub fn released(&mut self) {
        let _span = tracing::info_span!("clean-up").entered();
        let _ = fault::at(Point::Released);
        self.control.timeline().stamp(Stamp::Released);
        if let Err(error) = self.tell_all(Event::Released) {
            tracing::error!(%error, "nothing can fail any more");
        }
    }

    /// The update failed before the commit: tells `Abandoned`, in reverse order.
    pub fn abandon(self) {
        let notice = notice(Event::Abandoned, &self.mode, &self.control);
        if let Err(error) = self.told.tell_again(&notice) {
            tracing::error!(%error, "an ending cannot fail");
        }
    }

    fn unclaimed(&self, policy: FdPolicy) -> Vec<FdEntry> {
        let mut entries = self.services.registry.unclaimed();
        entries.retain(|entry| entry.policy == policy);
        entries
    }

    fn tell_all(&mut self, event: Event) -> Result<(), NotifyError> {
        let notice = notice(event, &self.mode, &self.control);
        self.told.tell_all(&self.services.notifier, &notice)
    }
}
