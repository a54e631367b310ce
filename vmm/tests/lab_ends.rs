//! A Linux guest that reboots or switches itself off right after an update, which the new program has to see through. In
//! the nested lab alone (`cargo xtask lab`).

use anyhow::ensure;
use testkit::lab::{Boot, Mode, Target, boot_is_good};
use testkit::need_lab;

fn reboot_and_power_off(mode: Mode, cpus: u8) -> anyhow::Result<()> {
    let lab = need_lab!();
    let mut linux = Boot::new(&lab, mode, cpus).boot(lab)?;
    linux.run("kept=here")?;
    linux.update(Target::Good)?;
    linux.shell.type_line("reboot -f")?;
    linux.at_prompt()?;
    ensure!(linux.run("echo \"kept=$kept\"")? == "kept=", "it is the old shell");
    boot_is_good(&mut linux, cpus)?;
    linux.update(Target::Good)?;
    linux.shell.type_line("poweroff -f")?;
    linux.ends("guest-shutdown")
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn reboot_and_power_off_with_one_vcpu_by_exec() -> anyhow::Result<()> {
    reboot_and_power_off(Mode::Exec, 1)
}

#[test]
fn reboot_and_power_off_with_four_vcpus_by_exec() -> anyhow::Result<()> {
    reboot_and_power_off(Mode::Exec, 4)
}

#[test]
fn reboot_and_power_off_with_one_vcpu_by_transfer() -> anyhow::Result<()> {
    reboot_and_power_off(Mode::Transfer, 1)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn reboot_and_power_off_with_four_vcpus_by_transfer() -> anyhow::Result<()> {
    reboot_and_power_off(Mode::Transfer, 4)
}
