//! Any number of vCPUs, in any state, across an update: they all go on, or all stand still as before.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use testkit::{Guest, PATIENCE, Vmm, VmmBuilder, need_kvm, wait_for};
use vmm_core::payload::{Command, Status, VcpuState, field};
use vmm_core::platform::{RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_TYPE_OFF};

const SEED: u64 = 31;

/// The guests of this file would take each other's CPUs.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

fn beats(guest: &Guest, vcpus: u32) -> Vec<u64> {
    (0..vcpus).map(|vcpu| guest.vcpu(vcpu).beats()).collect()
}

/// Every vCPU beats, and from where it was.
fn all_beat_on(guest: &Guest, before: &[u64]) -> anyhow::Result<()> {
    let vcpus = u32::try_from(before.len())?;
    let now = beats(guest, vcpus);
    ensure!(now.iter().zip(before).all(|(now, before)| now >= before), "{before:?} -> {now:?}");
    // All at once: with many more of them than CPUs each has to wait for its turn.
    let further = || beats(guest, vcpus).iter().zip(&now).all(|(further, now)| further > now).then_some(());
    wait_for("a beat of every vCPU", PATIENCE, further)
        .with_context(|| format!("{now:?} -> {:?}", beats(guest, vcpus)))
}

fn all_stand_still(guest: &Guest, vcpus: u32) -> anyhow::Result<()> {
    let before = beats(guest, vcpus);
    std::thread::sleep(Duration::from_millis(30));
    let after = beats(guest, vcpus);
    ensure!(after == before, "a vCPU runs: {before:?} -> {after:?}");
    Ok(())
}

fn park(guest: &Guest, vcpu: u32) -> anyhow::Result<()> {
    let _ticket = guest.vcpu(vcpu).submit(Command::Park);
    let parked = || (guest.vcpu(vcpu).state() == VcpuState::Parked).then_some(());
    wait_for(&format!("vCPU {vcpu} to park"), PATIENCE, parked)
}

/// `cpus=N` makes the payload wait for all of them, however slowly they come up.
fn start(cpus: u8) -> anyhow::Result<(Vmm, Guest)> {
    let vmm = VmmBuilder::new().cpus(cpus).args(&["-append", &format!("cpus={cpus}")]).start()?;
    let guest = vmm.guest()?;
    Ok((vmm, guest))
}

#[test]
fn from_one_to_sixty_four_vcpus_all_beat_on() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    for cpus in [1, 2, 8, 64_u8] {
        let vcpus = u32::from(cpus);
        let (mut vmm, guest) = start(cpus)?;
        let mask = guest.header().started_mask();
        ensure!(mask.count_ones() == vcpus, "{cpus} vCPUs, and {mask:#b} started");
        guest.fill(1 << 20, SEED)?;
        for _ in 0..2 {
            let before = beats(&guest, vcpus);
            let info = vmm.update()?;
            ensure!(info["cpr"]["blackout-us"].as_u64().is_some_and(|us| us > 0), "{info}");
            all_beat_on(&guest, &before).with_context(|| format!("{cpus} vCPUs"))?;
        }
        guest.verify(1 << 20, SEED)?;
        ensure!(guest.header().started_mask() == mask, "a vCPU was started again");
        for vcpu in 0..vcpus {
            let mailbox = guest.vcpu(vcpu);
            ensure!(mailbox.read(field::APIC_ID) == u64::from(vcpu), "vCPU {vcpu} is another");
            ensure!(mailbox.read(field::TSC_BACKWARDS) == 0, "vCPU {vcpu} saw its clock step back");
        }
        let threads = vmm.qmp().execute("query-cpus-fast", json!({}))?;
        ensure!(threads.as_array().map(Vec::len) == Some(cpus.into()), "{threads}");
        vmm.quit()?;
    }
    Ok(())
}

#[test]
fn stop_and_cont_work_after_an_update() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let (mut vmm, guest) = start(2)?;
    for _ in 0..2 {
        vmm.update()?;
        vmm.qmp().take_events();
        vmm.qmp().execute("stop", json!({}))?;
        vmm.qmp().event("STOP")?;
        ensure!(vmm.status()? == "paused");
        all_stand_still(&guest, 2)?;
        let before = beats(&guest, 2);
        vmm.qmp().execute("cont", json!({}))?;
        vmm.qmp().event("RESUME")?;
        ensure!(vmm.status()? == "running");
        all_beat_on(&guest, &before)?;
    }
    vmm.quit()
}

#[test]
fn a_paused_guest_stays_paused_until_cont() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let (mut vmm, guest) = start(2)?;
    guest.fill(8 << 20, SEED)?;
    vmm.qmp().execute("stop", json!({}))?;
    vmm.qmp().event("STOP")?;
    let before = beats(&guest, 2);
    for _ in 0..3 {
        vmm.update()?;
        ensure!(vmm.status()? == "paused");
        ensure!(beats(&guest, 2) == before, "the guest ran");
    }
    // One that fails leaves it paused as well.
    let failed = vmm.migrate("file:/dev/full").map(drop);
    ensure!(failed.is_err() && vmm.status()? == "paused");
    let events = vmm.qmp().take_events();
    let moves = |event: &Value| event["event"] == "STOP" || event["event"] == "RESUME";
    ensure!(!events.iter().any(moves), "{events:?}");

    vmm.qmp().execute("cont", json!({}))?;
    all_beat_on(&guest, &before)?;
    guest.verify(8 << 20, SEED)?;
    vmm.update()?;
    ensure!(vmm.status()? == "running");
    all_beat_on(&guest, &before)?;
    vmm.quit()
}

#[test]
fn a_guest_that_never_ran_boots_under_the_program_that_took_it_over() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let mut vmm = VmmBuilder::new().cpus(2).args(&["-S"]).start()?;
    ensure!(vmm.status()? == "prelaunch");
    for _ in 0..2 {
        vmm.update()?;
        ensure!(vmm.status()? == "prelaunch");
    }
    vmm.qmp().execute("cont", json!({}))?;
    let guest = vmm.guest()?;
    let before = beats(&guest, 2);
    vmm.update()?;
    all_beat_on(&guest, &before)?;
    vmm.quit()
}

/// When the payload's present run began.
fn run_of(guest: &Guest) -> u64 {
    guest.header().read(field::TSC_READY)
}

/// Waits until the payload runs anew on both vCPUs.
fn runs_anew(guest: &Guest, before: u64) -> anyhow::Result<()> {
    wait_for("the payload's next start", Duration::from_secs(60), || {
        let header = guest.header();
        (header.is_ready() && run_of(guest) != before && header.started() == 2).then_some(())
    })?;
    all_beat_on(guest, &[0, 0])
}

#[test]
fn system_reset_works_after_an_update_and_an_update_after_it() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let (mut vmm, guest) = start(2)?;
    for _ in 0..2 {
        vmm.update()?;
        let run = run_of(&guest);
        vmm.qmp().execute("system_reset", json!({}))?;
        vmm.qmp().event("RESET")?;
        runs_anew(&guest, run)?;
        ensure!(vmm.status()? == "running");
        let before = beats(&guest, 2);
        vmm.update()?;
        all_beat_on(&guest, &before)?;
        guest.fill(8 << 20, SEED)?;
        guest.verify(8 << 20, SEED)?;
    }
    vmm.quit()
}

#[test]
fn a_reset_that_the_guest_asks_for_works_after_an_update() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let (mut vmm, guest) = start(2)?;
    vmm.update()?;
    let run = run_of(&guest);
    let pulse_reset_line = Command::PortOut { port: 0x64, bytes: 1, value: 0xfe };
    let _ticket = guest.vcpu(1).submit(pulse_reset_line);
    let event = vmm.qmp().event("RESET")?;
    ensure!(event["data"]["guest"] == true, "{event}");
    runs_anew(&guest, run)?;
    vmm.update()?;
    guest.beats_on(1)?;
    vmm.quit()
}

/// Has the guest write to a port in the very moment that an update begins, try after try.
fn port_write_with_migrate(
    port: u16,
    value: u32,
    mut check: impl FnMut(&mut Vmm, &Guest, u64) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for attempt in 0..12 {
        let (mut vmm, guest) = start(2)?;
        let command = vmm.exec_command("memfd:");
        vmm.set_exec(&command)?;
        // The command waits for the program, and the order for its guest: whoever is first, both are soon.
        let run = run_of(&guest);
        vmm.halt()?;
        let _ticket = guest.vcpu(attempt % 2).submit(Command::PortOut { port, bytes: 1, value });
        vmm.qmp().send("migrate", json!({ "uri": "memfd:" }))?;
        vmm.go_on()?;
        check(&mut vmm, &guest, run).with_context(|| format!("attempt {attempt}"))?;
    }
    Ok(())
}

#[test]
fn a_power_off_that_the_guest_asks_for_during_an_update_is_not_lost() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let power_off = u32::from(SLEEP_TYPE_OFF) << 2 | 1 << 5;
    port_write_with_migrate(SLEEP_CONTROL_PORT, power_off, |vmm, _, _| {
        ensure!(vmm.wait_exit()? == Some(0), "{}", vmm.stderr());
        while let Some(message) = vmm.qmp().try_read_to_end()? {
            if message["event"] == "SHUTDOWN" {
                ensure!(message["data"] == json!({ "guest": true, "reason": "guest-shutdown" }), "{message}");
                return Ok(());
            }
        }
        anyhow::bail!("nobody was told")
    })
}

#[test]
fn a_reset_that_the_guest_asks_for_during_an_update_is_not_lost() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    port_write_with_migrate(RESET_PORT, RESET_VALUE.into(), |vmm, guest, run| {
        let deadline = Instant::now() + PATIENCE;
        while vmm.qmp().try_read(PATIENCE)?.is_none_or(|message| message["event"] != "RESET") {
            ensure!(Instant::now() < deadline, "the guest was not reset");
        }
        // Wherever the reset fell, before the update or into it, the guest comes up again.
        runs_anew(guest, run)
    })
}

#[test]
fn parked_vcpus_stay_parked_and_wake_when_told() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let (mut vmm, guest) = start(4)?;
    let parked = [1, 3];
    for vcpu in parked {
        park(&guest, vcpu)?;
    }
    let before = beats(&guest, 4);
    for _ in 0..3 {
        vmm.update()?;
        for vcpu in [0, 2] {
            guest.beats_on(vcpu)?;
        }
        for vcpu in parked {
            ensure!(guest.vcpu(vcpu).state() == VcpuState::Parked, "vCPU {vcpu} woke up");
            ensure!(guest.vcpu(vcpu).beats() == before[vcpu as usize], "vCPU {vcpu} beat");
        }
    }
    for vcpu in parked {
        guest.reset_gap(vcpu)?;
    }
    all_beat_on(&guest, &before)?;
    vmm.quit()
}

#[test]
fn an_update_with_all_vcpus_parked() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let (mut vmm, guest) = start(2)?;
    for vcpu in 0..2 {
        park(&guest, vcpu)?;
    }
    let before = beats(&guest, 2);
    vmm.update()?;
    vmm.update_by_file()?;
    all_stand_still(&guest, 2)?;
    ensure!(beats(&guest, 2) == before && vmm.status()? == "running");
    for vcpu in 0..2 {
        guest.reset_gap(vcpu)?;
    }
    all_beat_on(&guest, &before)?;
    vmm.quit()
}

#[test]
fn commands_that_the_guest_works_on_go_on_through_updates() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let mut vmm = VmmBuilder::new().cpus(2).memory(1 << 30).args(&["-append", "cpus=2"]).start()?;
    let guest = vmm.guest()?;
    let half = guest.usable_bytes() / 16 * 8;
    let command = |vcpu: u64, verify: bool| {
        let (offset, bytes, seed) = (vcpu * half, half, SEED + vcpu);
        if verify { Command::Verify { offset, bytes, seed } } else { Command::Fill { offset, bytes, seed } }
    };
    for verify in [false, true] {
        let tickets = [0, 1].map(|vcpu| guest.vcpu(vcpu).submit(command(vcpu.into(), verify)));
        let mut updates = 0;
        let all_done =
            || [0, 1].iter().all(|&vcpu| guest.vcpu(vcpu).outcome(tickets[vcpu as usize]).is_some());
        while !all_done() && updates < 50 {
            vmm.update()?;
            updates += 1;
        }
        ensure!(updates > 1, "the work was done before the updates");
        for (vcpu, ticket) in (0..).zip(tickets) {
            let outcome =
                wait_for("the command's end", Duration::from_secs(120), || guest.vcpu(vcpu).outcome(ticket))?;
            ensure!(outcome.status == Status::Ok, "vCPU {vcpu}: {outcome:?}");
            ensure!(!verify || outcome.results[0] == 0, "vCPU {vcpu}: {outcome:?}");
        }
    }
    vmm.quit()
}
