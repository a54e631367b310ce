//! Updates of a Linux guest all of whose CPUs are busy, with clocks, timers, memory and registers watched from inside: no
//! clock jumps, no timer is lost, and the guest's kernel sees no lockup and no unstable clock. How far the guest's clock
//! drifts against the host's is measured. In the nested lab alone (`cargo xtask lab`).

use std::time::Duration;

use anyhow::ensure;
use testkit::lab::{
    Boot, COMMAND_LIMIT, Mode, Report, Target, Time, clocks_are_good, clocksource, log_has_nothing_new,
    remember_log, timers_are_good, watched,
};
use testkit::need_lab;

const UPDATES: u32 = 8;

/// Longer than the test takes: the watches are told when it is enough.
const WATCHES: [&str; 5] = ["clock 600", "timer 600", "tick 600", "load 600", "float 600"];

fn under_load(mode: Mode, cpus: u8) -> anyhow::Result<()> {
    let lab = need_lab!();
    let mut linux = Boot::new(&lab, mode, cpus).boot(lab)?;
    remember_log(&mut linux)?;
    let first = Time::read(&mut linux, COMMAND_LIMIT)?;
    let printed = watched(&mut linux, &WATCHES, 2 * COMMAND_LIMIT, |linux| {
        let begin = linux.number("awk '/^cpu / { print $5 }' /proc/stat")?;
        for _ in 0..UPDATES {
            linux.update(Target::Good)?;
            std::thread::sleep(Duration::from_millis(700));
        }
        // In ticks of 10 ms: nobody was idle for as long as a second.
        let idle = linux.number("awk '/^cpu / { print $5 }' /proc/stat")? - begin;
        ensure!(idle < 100, "the guest's CPUs were idle for {idle} ticks");
        Ok(())
    })?;
    let last = Time::read(&mut linux, COMMAND_LIMIT)?;
    let drift = last.agrees_since(&first)?;

    let report = |at: usize| Report::parse(&printed[at], WATCHES[at].split(' ').next().unwrap_or_default());
    let [clock, timer, tick, load, float] = [report(0)?, report(1)?, report(2)?, report(3)?, report(4)?];
    for report in [&clock, &timer, &tick, &load, &float] {
        linux.step(&report.line);
        ensure!(report.get("enough")? == 1, "the watch ended by itself: {}", report.line);
    }
    clocks_are_good(&clock)?;
    timers_are_good(&timer, &linux)?;
    ensure!(tick.get("lost")? == 0 && tick.get("surplus")? == 0, "a timer drifted: {}", tick.line);
    for report in [&load, &float] {
        ensure!(report.get("rounds")? > 0 && report.get("wrong")? == 0, "wrong results: {}", report.line);
    }
    log_has_nothing_new(&mut linux)?;
    ensure!(clocksource(&mut linux)? == "kvm-clock");
    linux.lab.note(&format!(
        "{UPDATES} updates under load, longest blackout {:?}, {drift}; longest gap of a clock {} us, latest timer {} us",
        linux.longest_blackout,
        clock.get("max_gap_us")?,
        timer.get("max_late_us")?,
    ))
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn load_with_one_vcpu_by_exec() -> anyhow::Result<()> {
    under_load(Mode::Exec, 1)
}

#[test]
fn load_with_four_vcpus_by_exec() -> anyhow::Result<()> {
    under_load(Mode::Exec, 4)
}

#[test]
fn load_with_one_vcpu_by_transfer() -> anyhow::Result<()> {
    under_load(Mode::Transfer, 1)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn load_with_four_vcpus_by_transfer() -> anyhow::Result<()> {
    under_load(Mode::Transfer, 4)
}
