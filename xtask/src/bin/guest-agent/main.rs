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
//! guest-agent tick SECONDS [PERIOD_MS]    (by default 10 ms; a timer that the kernel repeats)
//! agent: tick begin seconds=10 period_ms=10
//! agent: tick ok ticks=1000 reads=998 lost=0 surplus=0 longest_us=21004 enough=0
//! guest-agent load SECONDS [MIB]          (a thread per CPU, by default 8 MiB each)
//! agent: load begin seconds=10 threads=2 mib=8
//! agent: load ok rounds=310 wrong=0 enough=0
//! guest-agent disk SECONDS BLOCKS PATH    (writes with fsync, round and round over so many blocks of 4 KiB)
//! agent: disk begin seconds=10 blocks=1024
//! agent: disk ok last=812 wrong=0 longest_us=21310 enough=0
//! guest-agent send SECONDS ADDRESS:PORT   (numbers over TCP)
//! agent: send begin seconds=10
//! agent: send ok last=1280000 longest_us=20133 enough=0
//! guest-agent ask                         (once for every line of input, until its end or the line "end")
//! agent: now monotonic_ns=81046001 realtime_ns=1767222000081046001 boottime_ns=81046001 tsc=162092002
//! ```

mod clocks;
mod disk;
mod load;
mod net;
mod timers;

use std::path::Path;
use std::process::ExitCode;
use std::thread;

use nix::time::{ClockId, clock_gettime};
use oslib::clock::tsc;

/// Ends a watch once it exists.
const ENOUGH: &str = "/tmp/enough";

const USAGE: &str = "usage: guest-agent clock SECONDS [THREADS] | timer SECONDS [PERIOD_MS] | tick SECONDS [PERIOD_MS] | \
                     float SECONDS | load SECONDS [MIB] | disk SECONDS BLOCKS PATH | send SECONDS ADDRESS:PORT | ask";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&words) {
        Some(Ok(true)) => ExitCode::SUCCESS,
        Some(Ok(false)) => ExitCode::FAILURE,
        Some(Err(error)) => {
            println!("agent: {} failed: {error}", words[0]);
            ExitCode::FAILURE
        }
        None => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

/// Does what the words say; `None` if they say nothing.
fn run(words: &[&str]) -> Option<std::io::Result<bool>> {
    if words == ["ask"] {
        return Some(Ok(answer()));
    }
    let (&name, words) = words.split_first()?;
    let (&seconds, words) = words.split_first()?;
    let seconds = seconds.parse::<u32>().ok()?;
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    // What may be left out.
    let number_or = |default: u32| match words {
        [] => Some(default),
        [number] => number.parse::<u32>().ok().filter(|&number| number > 0),
        _ => None,
    };
    Some(match (name, words) {
        ("clock", _) => Ok(clocks::watch_clocks(seconds, number_or(cpus as u32)? as usize)),
        ("timer", _) => Ok(timers::watch_timer(seconds, number_or(10)?)),
        ("tick", _) => timers::watch_ticks(seconds, number_or(10)?),
        ("float", []) => Ok(load::watch_arithmetic(seconds)),
        ("load", _) => Ok(load::watch_memory(seconds, cpus, number_or(8)? as usize)),
        ("disk", [blocks, path]) => disk::watch_disk(Path::new(path), seconds, blocks.parse().ok()?),
        ("send", [address]) => net::send_numbers(address, seconds),
        _ => return None,
    })
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
