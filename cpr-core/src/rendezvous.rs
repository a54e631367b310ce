//! Where source and target meet while both are alive: a few words of the control page.
//!
//! A target that is built while the guest still runs needs the state late, and at the right moment:
//!
//! ```text
//!   target                                          source
//!   builds everything that needs no state           runs the guest
//!   (progress ... progress)                         watches the progress
//!   Ready, rings the doorbell ────────────────────► stops the guest, saves
//!   waits ◄──────────────────────── state published, and woken
//!   loads, restores, commits, rings ──────────────► sees the ownership word, ends
//! ```
//!
//! The source waits for its doorbell, an eventfd, because it has a loop; the target waits for the word itself (a futex),
//! because every microsecond of that wait is the guest's.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use oslib::eventfd::EventFd;
use oslib::shared::SharedWord;

use crate::control::Control;
use crate::error::BoxError;
use crate::fault::{self, Point};
use crate::frame::Frame;
use crate::mode::MainSource;
use crate::ownership::Owner;

/// How far the target is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u64)]
#[non_exhaustive]
pub enum TargetPhase {
    /// It was started, or is about to be; it builds.
    Building = 0,
    /// It is complete but for the state, and waits for its user to say where from (`-incoming defer`). No time limit of the
    /// source runs.
    Deferred = 1,
    /// It is complete, and waits for the state.
    Ready = 2,
    /// It has read the state.
    Loading = 3,
}

/// What the source has to offer.
const NOTHING_YET: u64 = 0;
const STATE_IS_THERE: u64 = 1;

/// Words of the control page that belong to the rendezvous.
#[derive(Debug, Clone)]
pub struct Rendezvous {
    pub(crate) target: SharedWord,
    pub(crate) progress: SharedWord,
    pub(crate) offer: SharedWord,
    pub(crate) fallback: SharedWord,
    pub(crate) deferred: SharedWord,
}

impl Rendezvous {
    /// Where the target is. Anything that the target should not have written counts as building.
    pub fn target_phase(&self) -> TargetPhase {
        [TargetPhase::Deferred, TargetPhase::Ready, TargetPhase::Loading]
            .into_iter()
            .find(|&phase| phase as u64 == self.target.load(Ordering::Acquire))
            .unwrap_or(TargetPhase::Building)
    }

    /// In the target: says how far it is, which is progress, too.
    pub fn enter(&self, phase: TargetPhase) {
        if phase == TargetPhase::Deferred {
            self.deferred.store(1, Ordering::Release);
        }
        self.target.store(phase as u64, Ordering::Release);
        self.note_progress();
    }

    /// In the target: it is alive and working. Call it at every step that may take long.
    pub fn note_progress(&self) {
        self.progress.fetch_add(1, Ordering::Release);
    }

    /// Whether a target of this attempt has ever been [`Deferred`](TargetPhase::Deferred): its user could talk to it.
    pub fn was_deferred(&self) -> bool {
        self.deferred.load(Ordering::Acquire) != 0
    }

    /// In a target that gives up: the source's own program starts in its place, as another target of this attempt. Safe in
    /// a signal handler.
    pub fn start_fallback(&self) {
        self.fallback.store(1, Ordering::Release);
        self.note_progress();
    }

    /// Whether the target is the source's own program, started in place of one that failed.
    pub fn is_fallback(&self) -> bool {
        self.fallback.load(Ordering::Acquire) != 0
    }

    /// A number that changes whenever the target makes progress.
    pub fn progress(&self) -> u64 {
        self.progress.load(Ordering::Acquire)
    }

    /// In the source: the main frame is where the target looks for it. Wakes the target, whose time begins anew: it has
    /// waited for the source until now.
    pub fn publish_state(&self) {
        self.note_progress();
        self.offer.store(STATE_IS_THERE, Ordering::Release);
        self.offer.wake();
    }

    fn is_published(&self) -> bool {
        self.offer.load(Ordering::Acquire) == STATE_IS_THERE
    }
}

/// Watches from the source that a target makes progress.
#[derive(Debug)]
pub struct Watchdog {
    limit: Option<Duration>,
    defer_limit: Option<Duration>,
    seen: Option<(u64, TargetPhase)>,
    since: Instant,
}

/// The target makes no progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Stalled {
    /// While it builds or loads.
    #[error("the new program has made no progress for {0:?}")]
    Working(Duration),
    /// While its user should have said where the state comes from.
    #[error("nobody gave the new program a migrate-incoming for {0:?}")]
    Deferred(Duration),
}

impl Watchdog {
    /// `limit` of time without progress; `defer_limit` for the wait for `migrate-incoming`, which the former leaves out.
    /// `None`: for ever.
    pub fn new(limit: Option<Duration>, defer_limit: Option<Duration>) -> Watchdog {
        Watchdog { limit, defer_limit, seen: None, since: Instant::now() }
    }

    /// Counts from now on: the target waited for its source until here.
    pub fn restart(&mut self) {
        self.since = Instant::now();
    }

    /// Looks whether there was progress, and answers until when there must be some.
    ///
    /// # Errors
    /// [`Stalled`].
    pub fn check(&mut self, rendezvous: &Rendezvous) -> Result<Option<Instant>, Stalled> {
        let now = Instant::now();
        let state = (rendezvous.progress(), rendezvous.target_phase());
        if self.seen.replace(state) != Some(state) {
            self.since = now;
        }
        let deferred = state.1 == TargetPhase::Deferred;
        let Some(limit) = (if deferred { self.defer_limit } else { self.limit }) else { return Ok(None) };
        if now.duration_since(self.since) < limit {
            return Ok(Some(self.since + limit));
        }
        Err(if deferred { Stalled::Deferred(limit) } else { Stalled::Working(limit) })
    }
}

/// Why the state did not come.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoState {
    /// The source took the guest back.
    #[error("the source took the guest back")]
    RolledBack,
    /// The source is silent.
    #[error("the source did not give the state within {0:?}")]
    Late(Duration),
    /// The source is gone.
    #[error("the source ended before it gave the state")]
    Gone,
    /// A kernel object of the rendezvous failed.
    #[error("cannot wait for the state: {0}")]
    Io(#[from] std::io::Error),
}

/// The main frame of a source that still runs: asks for the state, waits for it, then reads it from `inner`.
pub struct LiveMain {
    control: Control,
    doorbell: Arc<EventFd>,
    patience: Duration,
    watched: Option<Arc<OwnedFd>>,
    inner: Box<dyn MainSource>,
}

/// Between two looks at whether there still is a source.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

impl LiveMain {
    /// `doorbell` is the source's; `patience` is how long it may take to stop the guest and save it.
    pub fn new(
        control: Control,
        doorbell: Arc<EventFd>,
        patience: Duration,
        inner: Box<dyn MainSource>,
    ) -> LiveMain {
        LiveMain { control, doorbell, patience, watched: None, inner }
    }

    /// Has the wait end when `source` becomes readable, as the pidfd of a source that was killed does.
    #[must_use]
    pub fn watching(mut self, source: Arc<OwnedFd>) -> LiveMain {
        self.watched = Some(source);
        self
    }

    fn await_state(&self) -> Result<(), NoState> {
        let rendezvous = self.control.rendezvous();
        rendezvous.enter(TargetPhase::Ready);
        self.doorbell.signal()?;
        fault::at(Point::Ask).map_err(std::io::Error::other)?;
        let deadline = Instant::now() + self.patience;
        while !rendezvous.is_published() {
            if self.control.ownership().owner() != Some(Owner::Source) {
                return Err(NoState::RolledBack);
            }
            if Instant::now() >= deadline {
                return Err(NoState::Late(self.patience));
            }
            // What it published before its end counts.
            if self.is_source_gone()? && !rendezvous.is_published() {
                return Err(NoState::Gone);
            }
            rendezvous.offer.wait(NOTHING_YET, LOOK_AGAIN)?;
        }
        rendezvous.enter(TargetPhase::Loading);
        Ok(())
    }

    fn is_source_gone(&self) -> std::io::Result<bool> {
        self.watched.as_ref().map_or(Ok(false), oslib::stream::is_readable)
    }
}

impl MainSource for LiveMain {
    fn read_main(&mut self) -> Result<Frame, BoxError> {
        self.await_state()?;
        self.inner.read_main()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;

    impl MainSource for Nothing {
        fn read_main(&mut self) -> Result<Frame, BoxError> {
            Err("read".into())
        }
    }

    fn live(control: &Control, patience: Duration) -> (LiveMain, Arc<EventFd>) {
        let doorbell = Arc::new(EventFd::new().unwrap());
        (LiveMain::new(control.clone(), doorbell.clone(), patience, Box::new(Nothing)), doorbell)
    }

    #[test]
    fn the_state_is_read_once_it_is_published() {
        let source = Control::create(5).unwrap();
        let target = Control::attach(source.fd().clone(), 5).unwrap();
        let doorbell = Arc::new(EventFd::new().unwrap());
        let bell = doorbell.clone();
        let reader = std::thread::spawn(move || {
            let mut main = LiveMain::new(target, bell, Duration::from_secs(30), Box::new(Nothing));
            main.read_main().unwrap_err().to_string()
        });
        assert!(doorbell.wait(Duration::from_secs(30)).unwrap());
        assert_eq!(source.rendezvous().target_phase(), TargetPhase::Ready);
        source.rendezvous().publish_state();
        assert_eq!(reader.join().unwrap(), "read");
        assert_eq!(source.rendezvous().target_phase(), TargetPhase::Loading);
    }

    #[test]
    fn a_source_that_rolls_back_or_is_silent_ends_the_wait() {
        let control = Control::create(5).unwrap();
        let (mut main, _) = live(&control, Duration::from_millis(1));
        assert!(main.read_main().unwrap_err().to_string().starts_with("the source did not give the state"));
        control.ownership().roll_back().unwrap();
        let (mut main, _) = live(&control, Duration::from_secs(30));
        assert_eq!(main.read_main().unwrap_err().to_string(), "the source took the guest back");
    }

    #[test]
    fn a_source_that_is_gone_ends_the_wait() {
        let control = Control::create(5).unwrap();
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let (main, _) = live(&control, Duration::from_secs(30));
        let mut main = main.watching(Arc::new(ours.into()));
        drop(theirs);
        assert_eq!(main.read_main().unwrap_err().to_string(), NoState::Gone.to_string());
        control.rendezvous().publish_state();
        assert_eq!(main.read_main().unwrap_err().to_string(), "read");
    }

    #[test]
    fn time_counts_without_progress_only_and_not_while_deferred() {
        let control = Control::create(5).unwrap();
        let meeting = control.rendezvous();
        let mut dog = Watchdog::new(Some(Duration::ZERO), None);
        assert_eq!(dog.check(&meeting), Err(Stalled::Working(Duration::ZERO)));
        meeting.enter(TargetPhase::Deferred);
        assert_eq!(dog.check(&meeting), Ok(None));
        let mut dog = Watchdog::new(Some(Duration::from_secs(60)), Some(Duration::ZERO));
        assert_eq!(dog.check(&meeting), Err(Stalled::Deferred(Duration::ZERO)));
        meeting.enter(TargetPhase::Ready);
        let first = dog.check(&meeting).unwrap().unwrap();
        assert_eq!(dog.check(&meeting), Ok(Some(first)));
        meeting.note_progress();
        let second = dog.check(&meeting).unwrap().unwrap();
        assert!(second > first);
        dog.restart();
        assert!(dog.check(&meeting).unwrap().unwrap() > second);
    }
}
