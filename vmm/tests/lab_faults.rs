//! The main points of the fault matrix (`fault_matrix.rs`) on a Linux guest: whatever becomes of an update before its
//! commit, the guest's shell, clocks and timers go on under whoever has it, and the next update is a good one. In the
//! nested lab alone (`cargo xtask lab`).

use anyhow::{Context, ensure};
use testkit::lab::{
    Boot, COMMAND_LIMIT, Linux, Mode, Target, Time, log_has_nothing_new, remember_log, timers_tick,
};
use testkit::{need_lab, skip_unless};

/// The environment variable of a program with faults: `KIND@POINT`.
const VARIABLE: &str = "CPR_TEST_FAULT";

/// Of the new program: while it builds, loads, and just before it would take over.
const IN_TARGET: [&str; 4] = ["panic@built", "kill@loaded", "error@restored", "panic@commit"];

/// Of the program that has the guest. Once per process, so each takes a program of its own.
const IN_SOURCE: [&str; 3] = ["error@save", "corrupt@main-frame", "error@hand-over"];

fn faults(mode: Mode, cpus: u8) -> anyhow::Result<()> {
    let lab = need_lab!();
    skip_unless!(lab.faulty.is_some(), "no CPR_LAB_FAULTY_VMM");
    let mut linux = Boot::new(&lab, mode, cpus).boot(lab)?;
    linux.run("kept=here")?;
    remember_log(&mut linux)?;
    let first = Time::read(&mut linux, COMMAND_LIMIT)?;

    for fault in IN_TARGET {
        let failed = update_with(&mut linux, fault);
        fails(&mut linux, fault, failed)?;
    }
    for fault in IN_SOURCE {
        update_with(&mut linux, fault).with_context(|| format!("an update to the program with {fault}"))?;
        let failed = linux.update(Target::Good);
        fails(&mut linux, fault, failed)?;
        linux.update(Target::Good).with_context(|| format!("the update after {fault}"))?;
    }
    goes_on(&mut linux)?;
    let last = Time::read(&mut linux, COMMAND_LIMIT)?;
    let drift = last.agrees_since(&first)?;
    timers_tick(&mut linux, cpus)?;
    log_has_nothing_new(&mut linux)?;
    linux.lab.note(&format!("{} faults, {drift}", IN_TARGET.len() + IN_SOURCE.len()))
}

/// Updates to the program that `fault` strikes.
fn update_with(linux: &mut Linux, fault: &str) -> anyhow::Result<()> {
    let faulty = linux.lab.faulty.clone().context("no program with faults")?;
    match linux.mode {
        Mode::Exec => {
            let mut command = vec!["/usr/bin/env".to_owned(), format!("{VARIABLE}={fault}")];
            command.extend(linux.vmm.exec_command_of(&faulty, "memfd:"));
            linux.exec(&command, "memfd:").map(drop)
        }
        Mode::Transfer => {
            let target = linux.target().binary(faulty).env(VARIABLE, fault).start()?;
            linux.transfer(target).map(drop)
        }
    }
}

fn fails(linux: &mut Linux, fault: &str, update: anyhow::Result<()>) -> anyhow::Result<()> {
    let error = update.err().with_context(|| format!("{fault}: the update succeeded"))?;
    linux.step(&format!("{fault}: {error:#}"));
    goes_on(linux).with_context(|| format!("after {fault}"))
}

/// The shell of before answers, and a timer ends a sleep.
fn goes_on(linux: &mut Linux) -> anyhow::Result<()> {
    let answer = linux.run("sleep 0.2; echo $kept $((6 * 7))")?;
    ensure!(answer == "here 42", "{answer}");
    ensure!(linux.vmm.status()? == "running");
    Ok(())
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn faults_with_one_vcpu_by_exec() -> anyhow::Result<()> {
    faults(Mode::Exec, 1)
}

#[test]
fn faults_with_four_vcpus_by_exec() -> anyhow::Result<()> {
    faults(Mode::Exec, 4)
}

#[test]
fn faults_with_one_vcpu_by_transfer() -> anyhow::Result<()> {
    faults(Mode::Transfer, 1)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn faults_with_four_vcpus_by_transfer() -> anyhow::Result<()> {
    faults(Mode::Transfer, 4)
}
