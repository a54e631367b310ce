//! Many updates of a stock Linux guest in a row: its shell, its clocks and whatever runs in it go on, and its kernel has
//! nothing to say. In the nested lab alone (`cargo xtask lab`).

use std::time::Duration;

use anyhow::ensure;
use testkit::lab::{
    Boot, COMMAND_LIMIT, Mode, Target, Time, boot_is_good, log_has_nothing_new, remember_log, timers_tick,
};
use testkit::{need_lab, process};

const UPDATES: u32 = 20;

fn twenty_updates(mode: Mode, cpus: u8) -> anyhow::Result<()> {
    let lab = need_lab!();
    let mut linux = Boot::new(&lab, mode, cpus).boot(lab)?;
    boot_is_good(&mut linux, cpus)?;
    linux.run("kept='a word of the past'")?;
    linux.run("beats() { while :; do echo beat >> /tmp/beats; sleep 0.1; done; }; beats & heart=$!")?;
    remember_log(&mut linux)?;
    let (pid, started) = (linux.vmm.pid(), process::start_time(linux.vmm.pid())?);
    let first = Time::read(&mut linux, COMMAND_LIMIT)?;

    for update in 1..=UPDATES {
        linux.update(Target::Good)?;
        let answer = linux.run(&format!("echo $kept, {update}"))?;
        ensure!(answer == format!("a word of the past, {update}"), "{answer}");
    }
    let last = Time::read(&mut linux, COMMAND_LIMIT)?;
    let drift = last.agrees_since(&first)?;
    ensure!(linux.run("kill -0 $heart && echo alive")? == "alive");
    let beats = linux.number("grep -c beat /tmp/beats")?;
    linux.run("sleep 1")?;
    ensure!(linux.number("grep -c beat /tmp/beats")? > beats, "the background process stands still");
    timers_tick(&mut linux, cpus)?;
    log_has_nothing_new(&mut linux)?;
    ensure!(linux.vmm.status()? == "running");
    let same = process::start_time(pid).is_ok_and(|time| time == started) && linux.vmm.pid() == pid;
    ensure!(same == (mode == Mode::Exec), "process {pid} became {}", linux.vmm.pid());
    linux.lab.note(&format!("{UPDATES} updates, longest blackout {:?}, {drift}", linux.longest_blackout))?;

    // Nothing is left of the programs that were.
    ensure!(linux.said().is_empty(), "they complained: {}", linux.said());
    let left = testkit::wait_for("the keeper's end", Duration::from_secs(10), || {
        Some(linux.vmm.processes()).filter(|left| *left == [linux.vmm.pid()])
    });
    left.map(drop)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn twenty_with_one_vcpu_by_exec() -> anyhow::Result<()> {
    twenty_updates(Mode::Exec, 1)
}

#[test]
fn twenty_with_four_vcpus_by_exec() -> anyhow::Result<()> {
    twenty_updates(Mode::Exec, 4)
}

#[test]
fn twenty_with_one_vcpu_by_transfer() -> anyhow::Result<()> {
    twenty_updates(Mode::Transfer, 1)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn twenty_with_four_vcpus_by_transfer() -> anyhow::Result<()> {
    twenty_updates(Mode::Transfer, 4)
}
