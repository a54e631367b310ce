//! A stock Debian kernel as the guest, on an ordinary KVM: it boots by both ways, and its clocks, timers, interrupts and
//! shell go on through updates, also while it boots. The other tests of the lab are beside this one, by subject.
//!
//! Written for the nested lab (`cargo xtask lab`); anywhere else these tests skip themselves. What a passing check is worth
//! is shown by the tests named `without_...`: they leave out one step of the restore and demand that the same check fails.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::json;
use testkit::lab::{
    Boot, COMMAND_LIMIT, Linux, Mode, Report, Target, boot_is_good, clocks_are_good, clocks_go_on_through,
    clocksource, float_registers_stay_through, log_has_nothing_new, remember_log, shell_answers_through,
    time_agrees_with_the_host_through, timers_are_good, timers_tick, watched,
};
use testkit::{current_test, need_lab};

#[test]
fn one_vcpu_over_pvh() -> anyhow::Result<()> {
    let lab = need_lab!();
    let mut linux = Boot::new(&lab, Mode::Exec, 1).boot(lab)?;
    boot_is_good(&mut linux, 1)?;
    time_agrees_with_the_host_through(&mut linux, Target::Good)?;
    clocks_go_on_through(&mut linux, Target::Good)?;
    float_registers_stay_through(&mut linux, Target::Good)?;
    shell_answers_through(&mut linux, Target::Good)?;

    linux.vmm.qmp().execute("system_reset", json!({}))?;
    linux.at_prompt()?;
    ensure!(linux.run("echo \"kept=$kept\"")? == "kept=", "it is the old shell");
    boot_is_good(&mut linux, 1)?;
    shell_answers_through(&mut linux, Target::Good)?;

    // From here on a reset is the end.
    let mut command = linux.vmm.exec_command("memfd:");
    command.push("-no-reboot".into());
    linux.exec(&command, "memfd:")?;
    linux.shell.type_line("reboot -f")?;
    linux.ends("guest-reset")
}

#[test]
fn two_vcpus_over_pvh() -> anyhow::Result<()> {
    const UPDATES: u32 = 10;
    let lab = need_lab!();
    let mut linux = Boot::new(&lab, Mode::Exec, 2).boot(lab)?;
    let pid = linux.vmm.pid();
    boot_is_good(&mut linux, 2)?;
    linux.run("kept='a word of the past'")?;
    linux.run("beats() { while :; do echo beat >> /tmp/beats; sleep 0.1; done; }; beats & heart=$!")?;
    remember_log(&mut linux)?;

    let printed = watched(&mut linux, &["clock 300", "timer 300"], COMMAND_LIMIT, |linux| {
        for _ in 0..UPDATES {
            linux.update(Target::Good)?;
            std::thread::sleep(Duration::from_millis(300));
        }
        Ok(())
    })?;
    let clock = Report::parse(&printed[0], "clock")?;
    let timer = Report::parse(&printed[1], "timer")?;
    linux.step(&clock.line);
    linux.step(&timer.line);
    clocks_are_good(&clock)?;
    timers_are_good(&timer, &linux)?;

    ensure!(linux.run("echo $kept")? == "a word of the past");
    ensure!(linux.run("kill -0 $heart && echo alive")? == "alive");
    let beats = linux.number("grep -c beat /tmp/beats")?;
    linux.run("sleep 1")?;
    ensure!(linux.number("grep -c beat /tmp/beats")? > beats, "the background process stands still");
    timers_tick(&mut linux, 2)?;
    ensure!(clocksource(&mut linux)? == "kvm-clock");
    log_has_nothing_new(&mut linux)?;
    ensure!(linux.vmm.pid() == pid && linux.vmm.status()? == "running");
    linux.step("the shell and its background process went on, and the kernel has nothing to say");

    linux.shell.type_line("reboot -f")?;
    linux.at_prompt()?;
    ensure!(linux.run("echo \"kept=$kept\"")? == "kept=", "it is the old shell");
    boot_is_good(&mut linux, 2)?;
    linux.update(Target::Good)?;
    linux.shell.type_line("poweroff -f")?;
    linux.ends("guest-shutdown")
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn one_vcpu_as_bzimage() -> anyhow::Result<()> {
    let lab = need_lab!();
    let kernel = lab.bzimage.clone();
    let mut linux = Boot::new(&lab, Mode::Exec, 1).kernel(&kernel).boot(lab)?;
    boot_is_good(&mut linux, 1)?;
    shell_answers_through(&mut linux, Target::Good)?;
    linux.shell.type_line("poweroff -f")?;
    linux.ends("guest-shutdown")
}

/// The kernel unpacks itself, finds its clocks, and starts its second CPU, all with updates in between.
#[test]
fn two_vcpus_as_bzimage_updated_while_it_boots() -> anyhow::Result<()> {
    let lab = need_lab!();
    let kernel = lab.bzimage.clone();
    let mut linux = Boot::new(&lab, Mode::Exec, 2).kernel(&kernel).start(lab)?;
    for _ in 0..8 {
        std::thread::sleep(Duration::from_secs(1));
        linux.update(Target::Good)?;
    }
    linux.at_prompt()?;
    boot_is_good(&mut linux, 2)?;
    timers_tick(&mut linux, 2)?;
    shell_answers_through(&mut linux, Target::Good)?;
    linux.shell.type_line("poweroff -f")?;
    linux.ends("guest-shutdown")
}

/// A check on a guest and an update.
type Check = fn(&mut Linux, Target<'_>) -> anyhow::Result<()>;

/// Demands that `check` passes with the program that can leave out steps while it leaves out none, and fails when it
/// leaves out `step`.
fn is_noticed(mode: Mode, step: &str, check: Check, complaint: &str) -> anyhow::Result<()> {
    let lab = need_lab!();
    if lab.faulty.is_none() {
        eprintln!("SKIPPED {}: no CPR_LAB_FAULTY_VMM", current_test());
        return Ok(());
    }
    let mut linux = Boot::new(&lab, mode, 1).boot(lab)?;
    check(&mut linux, Target::Faulty(None)).context("nothing was left out")?;
    let begin = Instant::now();
    // An update may find the guest where it does not need the step: its process not on the CPU, no interrupt under way.
    let tried = (0..5).find_map(|_| check(&mut linux, Target::Faulty(Some(step))).err());
    let Some(error) = tried else {
        bail!("nobody noticed that {step} was left out");
    };
    let error = format!("{error:#}");
    linux.step(&format!("noticed: {error}"));
    ensure!(error.contains(complaint), "noticed for another reason than {complaint:?}: {error}");
    ensure!(begin.elapsed() < Duration::from_secs(60), "noticed after {:?} only", begin.elapsed());
    Ok(())
}

#[test]
fn without_tsc_offset() -> anyhow::Result<()> {
    is_noticed(Mode::Exec, "tsc-offset", clocks_go_on_through, "a clock went backwards")
}

#[test]
fn without_kvmclock() -> anyhow::Result<()> {
    is_noticed(
        Mode::Exec,
        "kvmclock",
        time_agrees_with_the_host_through,
        "CLOCK_MONOTONIC of the guest advanced by",
    )
}

#[test]
fn without_xsave() -> anyhow::Result<()> {
    is_noticed(Mode::Exec, "xsave", float_registers_stay_through, "wrong results")
}

#[test]
fn without_lapic() -> anyhow::Result<()> {
    is_noticed(Mode::Exec, "lapic", shell_answers_through, "the guest's shell")
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn without_irqchip() -> anyhow::Result<()> {
    is_noticed(Mode::Exec, "irqchip", shell_answers_through, "the guest's shell")
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn without_msrs() -> anyhow::Result<()> {
    is_noticed(Mode::Exec, "msrs", shell_answers_through, "the guest's shell")
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn without_tsc_offset_by_transfer() -> anyhow::Result<()> {
    is_noticed(Mode::Transfer, "tsc-offset", clocks_go_on_through, "a clock went backwards")
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn without_lapic_by_transfer() -> anyhow::Result<()> {
    is_noticed(Mode::Transfer, "lapic", shell_answers_through, "the guest's shell")
}
