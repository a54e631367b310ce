//! Clocks, read all the time on all CPUs: none may go backwards, and none apart from the others.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use nix::time::ClockId;
use oslib::clock::tsc;

use crate::{is_enough, monotonic_ns, ns};

/// How long the TSC is compared with CLOCK_MONOTONIC to know its rate.
const CALIBRATION: Duration = Duration::from_millis(500);

/// Lets time pass without a timer, so that clocks can still be told from a guest that has lost its timers.
fn spin(time: Duration) {
    let end = monotonic_ns() + i64::try_from(time.as_nanos()).unwrap_or(i64::MAX);
    while monotonic_ns() < end {
        std::hint::spin_loop();
    }
}

/// What all threads saw together.
#[derive(Default)]
struct Clocks {
    latest_ns: AtomicI64,
    latest_tsc: AtomicU64,
    samples: AtomicU64,
    max_gap_ns: AtomicI64,
    backsteps: AtomicU64,
    backstep_ns: AtomicI64,
    tsc_backsteps: AtomicU64,
    tsc_off_ns: AtomicI64,
    realtime_off_ns: AtomicI64,
    boottime_off_ns: AtomicI64,
}

/// All clocks at one instant: the TSC between two readings of CLOCK_MONOTONIC, and how far these are apart.
struct Reading {
    tsc: u64,
    monotonic_ns: i64,
    realtime_ns: i64,
    boottime_ns: i64,
    span_ns: i64,
}

impl Reading {
    /// The tightest of a few tries, so that an interrupt between two reads is not taken for a clock that went wrong.
    fn tightest() -> Self {
        let take = |_| {
            let begin = monotonic_ns();
            let (tsc, realtime_ns, boottime_ns) =
                (tsc(), ns(ClockId::CLOCK_REALTIME), ns(ClockId::CLOCK_BOOTTIME));
            let span_ns = monotonic_ns() - begin;
            Self { tsc, monotonic_ns: begin + span_ns / 2, realtime_ns, boottime_ns, span_ns }
        };
        (0..5).map(take).min_by_key(|reading| reading.span_ns).expect("five tries")
    }
}

/// TSC ticks per millisecond between two readings.
fn tsc_khz(from: &Reading, to: &Reading) -> i64 {
    let ticks = to.tsc.wrapping_sub(from.tsc) as i64;
    let ns = (to.monotonic_ns - from.monotonic_ns).max(1);
    (i128::from(ticks) * 1_000_000 / i128::from(ns)) as i64
}

/// Busy-reads the clocks on `threads` threads. False if one of them went backwards, also as seen across the threads.
pub(crate) fn watch_clocks(seconds: u32, threads: usize) -> bool {
    println!("agent: clock begin seconds={seconds} threads={threads}");
    let clocks = Clocks::default();
    let first = Reading::tightest();
    spin(CALIBRATION);
    let calibrated = Reading::tightest();
    let khz = tsc_khz(&first, &calibrated);

    let end_ns = first.monotonic_ns + i64::from(seconds) * 1_000_000_000;
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| clocks.watch_until(end_ns, &calibrated, khz));
        }
    });
    let late = Reading::tightest();
    spin(CALIBRATION);
    let late_khz = tsc_khz(&late, &Reading::tightest());

    let us = |value: &AtomicI64| value.load(SeqCst) / 1000;
    let count = |value: &AtomicU64| value.load(SeqCst);
    let ok = count(&clocks.backsteps) == 0 && count(&clocks.tsc_backsteps) == 0;
    println!(
        "agent: clock {} samples={} max_gap_us={} backsteps={} backstep_us={} tsc_backsteps={} tsc_khz={khz} \
         tsc_late_khz={late_khz} tsc_off_us={} realtime_off_us={} boottime_off_us={} enough={}",
        if ok { "ok" } else { "bad" },
        count(&clocks.samples),
        us(&clocks.max_gap_ns),
        count(&clocks.backsteps),
        us(&clocks.backstep_ns),
        count(&clocks.tsc_backsteps),
        us(&clocks.tsc_off_ns),
        us(&clocks.realtime_off_ns),
        us(&clocks.boottime_off_ns),
        u8::from(is_enough()),
    );
    ok
}

impl Clocks {
    /// One thread's loop: fast readings for gaps and steps; after a gap, and now and then, a careful one of all clocks.
    fn watch_until(&self, end_ns: i64, origin: &Reading, khz: i64) {
        const CAREFUL_EVERY_NS: i64 = 20_000_000;
        const GAP_NS: i64 = 1_000_000;
        let mut samples = 0;
        let mut previous = monotonic_ns();
        let mut careful_at = previous;
        while previous < end_ns {
            // The maximum seen by anybody is read before the clock: the clock must not be behind it.
            let latest = self.latest_ns.load(SeqCst);
            let now = monotonic_ns();
            if now < latest {
                self.backsteps.fetch_add(1, SeqCst);
                self.backstep_ns.fetch_max(latest - now, SeqCst);
            }
            self.latest_ns.fetch_max(now, SeqCst);
            let latest = self.latest_tsc.load(SeqCst);
            let ticks = tsc();
            if ticks < latest {
                self.tsc_backsteps.fetch_add(1, SeqCst);
                // The guest's timers may be lost with it, and then nobody else gets to run while we do.
                break;
            }
            self.latest_tsc.fetch_max(ticks, SeqCst);

            let gap = now - previous;
            self.max_gap_ns.fetch_max(gap, SeqCst);
            samples += 1;
            previous = now;
            if gap > GAP_NS || now >= careful_at {
                self.compare(origin, khz);
                if is_enough() {
                    break;
                }
                previous = monotonic_ns();
                careful_at = previous + CAREFUL_EVERY_NS;
                // The comparison is no gap, unless something stopped us in the midst of it.
                if previous - now > GAP_NS {
                    self.max_gap_ns.fetch_max(previous - now, SeqCst);
                }
            }
        }
        self.samples.fetch_add(samples, SeqCst);
    }

    /// How far the other clocks moved against CLOCK_MONOTONIC since `origin`.
    fn compare(&self, origin: &Reading, khz: i64) {
        let now = Reading::tightest();
        let passed_ns = now.monotonic_ns - origin.monotonic_ns;
        let ticks = now.tsc.wrapping_sub(origin.tsc) as i64;
        let tsc_ns = (i128::from(ticks) * 1_000_000 / i128::from(khz.max(1))) as i64;
        self.tsc_off_ns.fetch_max((tsc_ns - passed_ns).abs(), SeqCst);
        self.realtime_off_ns.fetch_max((now.realtime_ns - origin.realtime_ns - passed_ns).abs(), SeqCst);
        self.boottime_off_ns.fetch_max((now.boottime_ns - origin.boottime_ns - passed_ns).abs(), SeqCst);
    }
}
