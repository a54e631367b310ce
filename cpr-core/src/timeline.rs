//! When each step of an update happened, stamped by source and target into one shared page.
//!
//! All stamps are CLOCK_MONOTONIC nanoseconds: one clock for both processes as long as the kernel stays, which the
//! boot id in the control page proves. A stamp costs one clock read and one atomic operation.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// A moment of an update. The number is its place in the control page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
#[non_exhaustive]
pub enum Stamp {
    /// The user's command passed preflight.
    Begin = 0,
    /// The source asked the guest to stop.
    StopRequested = 1,
    /// The first vCPU left the guest for the last time: the blackout begins.
    FirstExit = 2,
    /// Every vCPU is parked and subscribers were told `Stopped`.
    Stopped = 3,
    /// The state is written.
    Saved = 4,
    /// The source let go: exec was called, or the target was told to take over.
    HandedOver = 5,
    /// The target's `main` began.
    TargetStarted = 6,
    /// The target has its VM: guest memory mapped, vCPUs created.
    Built = 7,
    /// The target has read the main frame.
    Loaded = 8,
    /// State is restored and subscribers were told `Restored`.
    Restored = 9,
    /// The ownership word flipped.
    Committed = 10,
    /// The first vCPU entered the guest.
    FirstEntry = 11,
    /// The *last* vCPU entered the guest for the first time: the blackout ends.
    LastEntry = 12,
    /// The keeper or source ended.
    Released = 13,
    /// The first vCPU left the guest because the program is about to leave its process: a first, short pause begins.
    DepartureExit = 14,
    /// The last vCPU entered the guest again, in the other process: that pause ends.
    DepartureEntry = 15,
    /// The program executed the target, and went on in the other process.
    Executed = 16,
    /// State, and memory that had to be copied, are in storage: the source has nothing left to do.
    Stored = 17,
}

impl Stamp {
    /// Places that a control page keeps for stamps.
    pub const PLACES: usize = 32;
}

/// The stamps of one attempt, in shared memory.
#[derive(Debug, Clone, Copy)]
pub struct Timeline<'a> {
    stamps: &'a [AtomicU64],
}

impl<'a> Timeline<'a> {
    /// A view of [`Stamp::PLACES`] shared words; zero means not stamped.
    pub(crate) fn new(stamps: &'a [AtomicU64]) -> Self {
        assert_eq!(stamps.len(), Stamp::PLACES);
        Timeline { stamps }
    }

    /// Stamps now. A later call overwrites.
    pub fn stamp(&self, stamp: Stamp) {
        self.stamps[stamp as usize].store(now_ns(), Ordering::Relaxed);
    }

    /// Forgets a moment, for one that comes again: what was stamped for another reason does not count.
    pub fn clear(&self, stamp: Stamp) {
        self.stamps[stamp as usize].store(0, Ordering::Relaxed);
    }

    /// Notes a moment that was read before the page could be reached, in nanoseconds of CLOCK_MONOTONIC.
    pub fn stamp_at(&self, stamp: Stamp, at_ns: u64) {
        self.stamps[stamp as usize].store(at_ns, Ordering::Relaxed);
    }

    /// Stamps now, unless an earlier moment stands there: for the first of several threads.
    pub fn stamp_first(&self, stamp: Stamp) {
        // Zero means "not stamped", so a plain minimum would never leave it.
        let now = now_ns();
        let _ = self.stamps[stamp as usize]
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| (old == 0 || now < old).then_some(now));
    }

    /// Stamps now, unless a later moment stands there: for the last of several threads.
    pub fn stamp_last(&self, stamp: Stamp) {
        self.stamps[stamp as usize].fetch_max(now_ns(), Ordering::Relaxed);
    }

    /// The moment in nanoseconds of CLOCK_MONOTONIC, if it was stamped.
    pub fn at_ns(&self, stamp: Stamp) -> Option<u64> {
        match self.stamps[stamp as usize].load(Ordering::Relaxed) {
            0 => None,
            at => Some(at),
        }
    }

    /// What can be said of the update so far.
    pub fn report(&self) -> Report {
        let between = |from, to| Some(self.at_ns(to)?.saturating_sub(self.at_ns(from)?));
        Report {
            blackout_ns: self
                .blackout_begin()
                .and_then(|begin| Some(self.at_ns(Stamp::LastEntry)?.saturating_sub(begin))),
            departure_ns: between(Stamp::DepartureExit, Stamp::DepartureEntry),
            prepare_ns: between(Stamp::Begin, Stamp::StopRequested),
            total_ns: between(Stamp::Begin, Stamp::LastEntry).or(between(Stamp::Begin, Stamp::Stored)),
            phases: self.phases().unwrap_or_default(),
        }
    }

    /// When the first vCPU ran its last instruction under the source.
    fn blackout_begin(&self) -> Option<u64> {
        // On a busy host the state can be asked for before every vCPU ran again after the departure: then that pause never
        // ended, and is the blackout's beginning.
        match (self.at_ns(Stamp::DepartureExit), self.at_ns(Stamp::DepartureEntry)) {
            (Some(departure), None) => Some(departure),
            // vCPUs that waited for their turns have no last exit of their own.
            (Some(_), Some(_)) => self.at_ns(Stamp::FirstExit).or(self.at_ns(Stamp::StopRequested)),
            (None, _) => self.at_ns(Stamp::FirstExit),
        }
    }

    /// From one moment of the blackout to the next. What happened before it, as the building of a target alongside the
    /// guest, is no part of it.
    fn phases(&self) -> Option<Vec<Phase>> {
        let mut from = self.blackout_begin()?;
        let mut ends: Vec<_> = PHASES
            .iter()
            .filter_map(|&(name, stamp)| Some((name, self.at_ns(stamp)?)))
            .filter(|&(_, at)| at >= from)
            .collect();
        // By time, and in the order of the table where two moments are one.
        ends.sort_by_key(|&(_, at)| at);
        let phase = |(name, to): (&str, u64)| {
            let ns = to - std::mem::replace(&mut from, to);
            Phase { name: name.to_owned(), ns }
        };
        Some(ends.into_iter().map(phase).collect())
    }
}

/// The pieces of the blackout, which add up to it, and the moment at which each ends.
const PHASES: [(&str, Stamp); 9] = [
    ("stop", Stamp::Stopped),
    ("save", Stamp::Saved),
    ("store", Stamp::Stored),
    ("hand-over", Stamp::HandedOver),
    ("start", Stamp::TargetStarted),
    ("build", Stamp::Built),
    ("load", Stamp::Loaded),
    ("restore", Stamp::Restored),
    ("resume", Stamp::LastEntry),
];

/// One piece of the blackout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// `stop`, `save`, `hand-over`, `load`, `restore` or `resume`; `start` and `build` after the third where the guest
    /// stands still meanwhile; and `store` in place of the third where the state goes to storage.
    pub name: String,
    /// Nanoseconds.
    pub ns: u64,
}

/// A timeline as it is told to the user.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Report {
    /// From the first vCPU's last exit to the last vCPU's first entry, nanoseconds. `None` when the guest was not
    /// running.
    pub blackout_ns: Option<u64>,
    /// An earlier pause, in which the program left its process to the target, nanoseconds. `None` in modes that do not
    /// leave, or when the guest was not running.
    pub departure_ns: Option<u64>,
    /// From the accepted command to the request to stop, nanoseconds; the guest ran.
    pub prepare_ns: Option<u64>,
    /// From the accepted command to the last vCPU's first entry, nanoseconds; or, in a source that leaves the guest in
    /// storage, until it is there.
    pub total_ns: Option<u64>,
    /// The blackout in pieces, in order.
    pub phases: Vec<Phase>,
}

impl Report {
    /// How long the guest stood still altogether, in nanoseconds; `None` when it was not running.
    pub fn downtime_ns(&self) -> Option<u64> {
        Some(self.blackout_ns? + self.departure_ns.unwrap_or_default())
    }
}

fn now_ns() -> u64 {
    oslib::clock::monotonic_ns()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_add_up_to_the_blackout() {
        let words: Vec<_> = (0..Stamp::PLACES).map(|_| AtomicU64::new(0)).collect();
        let timeline = Timeline::new(&words);
        assert_eq!(timeline.report(), Report::default());
        for (at, word) in words.iter().enumerate() {
            word.store(1000 + (at * at) as u64, Ordering::Relaxed);
        }
        // No target has this one.
        timeline.clear(Stamp::Stored);
        let report = timeline.report();
        assert_eq!(report.blackout_ns, Some(140));
        assert_eq!(report.phases.iter().map(|p| p.ns).sum::<u64>(), 140);
        assert_eq!(report.prepare_ns, Some(1));
    }

    #[test]
    fn a_target_built_alongside_takes_none_of_the_blackout() {
        let words: Vec<_> = (0..Stamp::PLACES).map(|_| AtomicU64::new(0)).collect();
        let timeline = Timeline::new(&words);
        let stamps = [
            (Stamp::DepartureExit, 10),
            (Stamp::DepartureEntry, 15),
            (Stamp::TargetStarted, 20),
            (Stamp::Built, 30),
            (Stamp::FirstExit, 40),
            (Stamp::Stopped, 41),
            (Stamp::Saved, 43),
            (Stamp::Loaded, 44),
            (Stamp::LastEntry, 50),
        ];
        stamps.iter().for_each(|&(stamp, at)| timeline.stamp_at(stamp, at));
        let report = timeline.report();
        let names: Vec<_> = report.phases.iter().map(|phase| (phase.name.as_str(), phase.ns)).collect();
        assert_eq!(names, [("stop", 1), ("save", 2), ("load", 1), ("resume", 6)]);
        assert_eq!((report.blackout_ns, report.departure_ns), (Some(10), Some(5)));
        assert_eq!(report.downtime_ns(), Some(15));

        // A vCPU that did not run between the two pauses makes them one.
        timeline.stamp_at(Stamp::DepartureEntry, 0);
        let report = timeline.report();
        assert_eq!((report.blackout_ns, report.departure_ns), (Some(40), None));
        let names: Vec<_> = report.phases.iter().map(|phase| phase.name.as_str()).collect();
        assert_eq!(names, ["start", "build", "stop", "save", "load", "resume"]);
        assert_eq!(report.phases.iter().map(|phase| phase.ns).sum::<u64>(), 40);
    }

    #[test]
    fn a_source_that_stores_the_guest_tells_what_that_took() {
        let words: Vec<_> = (0..Stamp::PLACES).map(|_| AtomicU64::new(0)).collect();
        let timeline = Timeline::new(&words);
        let stamps = [
            (Stamp::Begin, 10),
            (Stamp::StopRequested, 15),
            (Stamp::FirstExit, 16),
            (Stamp::Stopped, 17),
            (Stamp::Saved, 20),
            (Stamp::Stored, 50),
        ];
        stamps.iter().for_each(|&(stamp, at)| timeline.stamp_at(stamp, at));
        let report = timeline.report();
        let names: Vec<_> = report.phases.iter().map(|phase| (phase.name.as_str(), phase.ns)).collect();
        assert_eq!(names, [("stop", 1), ("save", 3), ("store", 30)]);
        assert_eq!((report.blackout_ns, report.total_ns), (None, Some(40)));
    }

    #[test]
    fn first_and_last_of_several_threads() {
        let words: Vec<_> = (0..Stamp::PLACES).map(|_| AtomicU64::new(0)).collect();
        let timeline = Timeline::new(&words);
        timeline.stamp_first(Stamp::FirstExit);
        timeline.stamp_last(Stamp::LastEntry);
        let (first, last) = (timeline.at_ns(Stamp::FirstExit), timeline.at_ns(Stamp::LastEntry));
        std::thread::sleep(std::time::Duration::from_millis(1));
        timeline.stamp_first(Stamp::FirstExit);
        timeline.stamp_last(Stamp::LastEntry);
        assert_eq!(timeline.at_ns(Stamp::FirstExit), first);
        assert!(timeline.at_ns(Stamp::LastEntry) > last);
    }
}
