//! The agent in the L2 guests of the lab: it watches clocks, timers and registers while the VMM under the guest is
//! replaced, and prints what it saw as single lines that a test can parse. It judges only what is never right, such as a
//! clock that goes backwards; how long a gap may be is the test's business.
//!
//! A watch ends after its SECONDS, once the TSC went backwards, or when somebody makes the file `/tmp/enough`; then it
//! reports `enough=1`.
//!
//! ```text
//! guest-agent clock SECONDS [THREADS]     (by default a thread per CPU)
//! agent: clock begin seconds=10 threads=2
//! agent: clock ok samples=2711405 max_gap_us=3120 backsteps=0 backstep_us=0 tsc_backsteps=0 tsc_khz=2000012
//!        tsc_late_khz=2000010 tsc_off_us=14 realtime_off_us=2 boottime_off_us=1 enough=0         (one line)
//! guest-agent timer SECONDS [PERIOD_MS]   (by default 10 ms)
//! agent: timer begin seconds=10 period_ms=10
//! agent: timer ok wakeups=998 max_late_us=812 missed=2 early=0 longest_sleep_us=10990 enough=0
//! guest-agent float SECONDS               (one thread, its values in floating-point registers only)
//! agent: float begin seconds=10
//! agent: float ok rounds=1204 wrong=0 enough=0
//! guest-agent ask                         (once for every line of input, until its end or the line "end")
//! agent: now monotonic_ns=81046001 realtime_ns=1767222000081046001 boottime_ns=81046001 tsc=162092002
//! ```

use std::hint::black_box;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use oslib::clock::tsc;

/// Ends a watch once it exists.
const ENOUGH: &str = "/tmp/enough";

/// How long the TSC is compared with CLOCK_MONOTONIC to know its rate.
const CALIBRATION: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| arguments.get(at).map(|text| text.parse::<u32>());
    let result = match (arguments.first().map(String::as_str), number(1), number(2)) {
        (Some("clock"), Some(Ok(seconds)), None) => {
            let cpus = thread::available_parallelism().map_or(1, usize::from);
            watch_clocks(seconds, cpus)
        }
        (Some("clock"), Some(Ok(seconds)), Some(Ok(threads @ 1..=256))) => {
            watch_clocks(seconds, threads as usize)
        }
        (Some("timer"), Some(Ok(seconds)), None) => watch_timer(seconds, 10),
        (Some("timer"), Some(Ok(seconds)), Some(Ok(period @ 1..))) => watch_timer(seconds, period),
        (Some("float"), Some(Ok(seconds)), None) => watch_arithmetic(seconds),
        (Some("ask"), None, None) => answer(),
        _ => {
            eprintln!(
                "usage: guest-agent clock SECONDS [THREADS] | timer SECONDS [PERIOD_MS] | float SECONDS | ask"
            );
            return ExitCode::from(2);
        }
    };
    if result { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Nanoseconds of a clock.
fn ns(clock: ClockId) -> i64 {
    let now = clock_gettime(clock).expect("the kernel has this clock");
    now.tv_sec() * 1_000_000_000 + now.tv_nsec()
}

fn monotonic_ns() -> i64 {
    ns(ClockId::CLOCK_MONOTONIC)
}

fn is_enough() -> bool {
    Path::new(ENOUGH).exists()
}

/// Tells all clocks whenever it is asked, so that a test can bracket the answer with its own clock.
fn answer() -> bool {
    for line in std::io::stdin().lines() {
        match line {
            Ok(line) if line != "end" => {}
            _ => break,
        }
        let [monotonic, realtime, boottime] =
            [ClockId::CLOCK_MONOTONIC, ClockId::CLOCK_REALTIME, ClockId::CLOCK_BOOTTIME].map(ns);
        let tsc = tsc();
        println!(
            "agent: now monotonic_ns={monotonic} realtime_ns={realtime} boottime_ns={boottime} tsc={tsc}"
        );
    }
    true
}

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
fn watch_clocks(seconds: u32, threads: usize) -> bool {
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

/// Sleeps from one multiple of the period to the next. False if it woke early; a wakeup that never comes shows as this
/// line never coming. A multiple that passed during a sleep is a missed wakeup.
fn watch_timer(seconds: u32, period_ms: u32) -> bool {
    println!("agent: timer begin seconds={seconds} period_ms={period_ms}");
    let period = i64::from(period_ms) * 1_000_000;
    let begin = monotonic_ns();
    let end = begin + i64::from(seconds) * 1_000_000_000;
    let (mut wakeups, mut missed, mut early) = (0_u64, 0_i64, 0_u64);
    let (mut max_late, mut longest_sleep) = (0, 0);
    let mut next = begin + period;
    while next < end && !is_enough() {
        let before = monotonic_ns();
        thread::sleep(Duration::from_nanos(u64::try_from(next - before).unwrap_or(0)));
        let now = monotonic_ns();
        wakeups += 1;
        early += u64::from(now < next);
        let late = (now - next).max(0);
        max_late = max_late.max(late);
        longest_sleep = longest_sleep.max(now - before);
        missed += late / period;
        next += (late / period + 1) * period;
    }
    let ok = early == 0;
    println!(
        "agent: timer {} wakeups={wakeups} max_late_us={} missed={missed} early={early} longest_sleep_us={} enough={}",
        if ok { "ok" } else { "bad" },
        max_late / 1000,
        longest_sleep / 1000,
        u8::from(is_enough()),
    );
    ok
}

/// Computes the same thing again and again. False if the result changed: then a register did.
fn watch_arithmetic(seconds: u32) -> bool {
    println!("agent: float begin seconds={seconds}");
    let end = monotonic_ns() + i64::from(seconds) * 1_000_000_000;
    let expected = orbit();
    let (mut rounds, mut wrong) = (0_u64, 0_u64);
    while monotonic_ns() < end && !is_enough() {
        rounds += 1;
        wrong += u64::from(orbit() != expected);
    }
    println!(
        "agent: float {} rounds={rounds} wrong={wrong} enough={}",
        if wrong == 0 { "ok" } else { "bad" },
        u8::from(is_enough())
    );
    wrong == 0
}

/// A point of the logistic map after many steps. It is chaotic, so any change on the way changes the result, and it is all
/// in registers, so a change of these does. It takes some ten milliseconds, with next to nothing between two calls.
fn orbit() -> u64 {
    let mut x = black_box(0.3);
    for _ in 0..100_000 {
        x = 3.99 * x * (1.0 - x);
    }
    f64::to_bits(x)
}
