//! Timers that fire once, set anew each time, and one that the kernel repeats by itself.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::{is_enough, monotonic_ns};

/// Sleeps from one multiple of the period to the next. False if it woke early; a wakeup that never comes shows as this
/// line never coming. A multiple that passed during a sleep is a missed wakeup.
pub(crate) fn watch_timer(seconds: u32, period_ms: u32) -> bool {
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

/// Counts the expirations of a timer that the kernel repeats. False if there are more than time has passed for, or fewer:
/// late ones are made up for, lost ones are not.
pub(crate) fn watch_ticks(seconds: u32, period_ms: u32) -> std::io::Result<bool> {
    println!("agent: tick begin seconds={seconds} period_ms={period_ms}");
    let period = i64::from(period_ms) * 1_000_000;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty())?;
    let interval = TimeSpec::from_duration(Duration::from_millis(period_ms.into()));
    let begin = monotonic_ns();
    timer.set(Expiration::Interval(interval), TimerSetTimeFlags::empty())?;
    let set = monotonic_ns();
    let mut expirations = File::from(timer.as_fd().try_clone_to_owned()?);
    let end = begin + i64::from(seconds) * 1_000_000_000;
    let (mut ticks, mut reads, mut longest) = (0_i64, 0_u64, 0);
    let (mut before, mut after) = (set, set);
    while after < end && !is_enough() {
        before = monotonic_ns();
        let mut count = [0; 8];
        expirations.read_exact(&mut count)?;
        longest = longest.max(monotonic_ns() - after);
        after = monotonic_ns();
        ticks += i64::from_ne_bytes(count);
        reads += 1;
    }
    // The timer began between `begin` and `set`, and was read between `before` and `after`.
    let lost = ((before - set) / period - ticks).max(0);
    let surplus = (ticks - (after - begin) / period).max(0);
    let ok = lost == 0 && surplus == 0;
    println!(
        "agent: tick {} ticks={ticks} reads={reads} lost={lost} surplus={surplus} longest_us={} enough={}",
        if ok { "ok" } else { "bad" },
        longest / 1000,
        u8::from(is_enough()),
    );
    Ok(ok)
}
