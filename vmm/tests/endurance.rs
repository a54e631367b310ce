//! Many updates in a row: nothing piles up in the process, nothing is lost in the guest, and monitors stay connected.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use testkit::process::{self, Census};
use testkit::{Guest, PATIENCE, Qmp, Vmm, VmmBuilder, need_kvm};
use vmm_core::payload::field;

/// Memory that the kernel's counters and the layout of the address space may add or hide, KiB.
const SLACK_KIB: u64 = 1024;
/// Each whole test is over by then.
const LIMIT: Duration = Duration::from_secs(600);

/// The guests of this file would take each other's CPUs.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts when the keeper of the last update is gone and the guest has touched all of its pages again.
fn settled(vmm: &mut Vmm, guest: &Guest, bytes: u64, seed: u64) -> anyhow::Result<Census> {
    guest.verify(bytes, seed)?;
    vmm.census()
}

/// Watches until `stop` that no vCPU's counter or clock steps back; gives how often it looked.
fn watch(guest: &Guest, vcpus: u32, stop: &AtomicBool) -> anyhow::Result<u64> {
    let mut last = vec![(0, 0); vcpus as usize];
    let mut looks = 0;
    while !stop.load(Ordering::Relaxed) {
        for (vcpu, last) in (0..).zip(&mut last) {
            let mailbox = guest.vcpu(vcpu);
            let now = (mailbox.beats(), mailbox.last_tsc());
            ensure!(now.0 >= last.0 && now.1 >= last.1, "vCPU {vcpu} stepped back: {last:?} -> {now:?}");
            *last = now;
        }
        looks += 1;
        std::thread::sleep(Duration::from_micros(500));
    }
    Ok(looks)
}

/// Updates `updates` times, and compares what the process holds after `first` of them and at the end.
fn endure(cpus: u8, first: u32, updates: u32) -> anyhow::Result<()> {
    let end = Instant::now() + LIMIT;
    let vcpus = u32::from(cpus);
    let mut vmm = VmmBuilder::new().cpus(cpus).start()?;
    let guest = vmm.guest()?;
    let (bytes, seed) = (guest.usable_bytes(), 11);
    guest.fill(bytes, seed)?;
    let pid = vmm.pid();
    let started = process::start_time(pid)?;
    let signals = |pid| -> anyhow::Result<_> {
        Ok(["SigBlk", "SigIgn", "SigCgt"].map(|key| process::status_field(pid, key).ok()))
    };
    let signals_before = signals(pid)?;

    let stop = AtomicBool::new(false);
    let looks = std::thread::scope(|scope| -> anyhow::Result<u64> {
        let watcher = scope.spawn(|| watch(&guest, vcpus, &stop));
        let result = (|| {
            let mut before = None;
            let mut beats = 0;
            for update in 1..=updates {
                ensure!(Instant::now() < end, "only {update} of {updates} updates in {LIMIT:?}");
                // Now and then through a file, so that this way's leftovers would show, too.
                if update.is_multiple_of(25) {
                    vmm.update_by_file()?
                } else {
                    vmm.update()?
                };
                let now = guest.beats_on(0)?;
                ensure!(now > beats, "the counter stepped back: {beats} -> {now}");
                beats = now;
                if update == first {
                    before = Some(settled(&mut vmm, &guest, bytes, seed)?);
                }
            }
            let before = before.expect("the first phase is one of them");
            settled(&mut vmm, &guest, bytes, seed)?.check_against(&before, SLACK_KIB)
        })();
        stop.store(true, Ordering::Relaxed);
        let looks = watcher.join().expect("the watcher does not panic");
        result.and(looks)
    })?;
    ensure!(looks > u64::from(updates), "the watcher looked {looks} times only");

    for vcpu in 0..vcpus {
        guest.beats_on(vcpu)?;
        let backwards = guest.vcpu(vcpu).read(field::TSC_BACKWARDS);
        ensure!(backwards == 0, "vCPU {vcpu} saw its clock step back {backwards} times");
    }
    ensure!(process::start_time(pid)? == started, "it is another process");
    ensure!(signals(pid)? == signals_before, "signals: {signals_before:?} -> {:?}", signals(pid)?);
    // All on the connection of the start: one STOP and one RESUME per update, in turn.
    let events = vmm.qmp().take_events();
    let names: Vec<_> = events.iter().filter_map(|event| event["event"].as_str()).collect();
    let turns: Vec<_> = names.chunks(2).filter(|pair| *pair == ["STOP", "RESUME"]).collect();
    ensure!(turns.len() == updates as usize && names.len() == 2 * turns.len(), "events: {names:?}");
    ensure!(vmm.stderr().is_empty(), "it complained: {}", vmm.stderr());

    vmm.qmp().execute("quit", json!({}))?;
    ensure!(vmm.wait_exit()? == Some(0), "{}", vmm.stderr());
    ensure!(vmm.processes().is_empty(), "processes stay behind");
    Ok(())
}

#[test]
fn three_hundred_updates_leave_nothing_behind() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    endure(1, 10, 300)
}

#[test]
fn updates_of_four_vcpus_leave_nothing_behind() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    endure(4, 5, 30)
}

#[test]
fn updates_that_fail_leave_nothing_behind() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let mut vmm = VmmBuilder::new().cpus(2).start()?;
    let guest = vmm.guest()?;
    let (bytes, seed) = (guest.usable_bytes(), 13);
    guest.fill(bytes, seed)?;
    // Executable, but in no format: the exec itself fails, after all else was done. And a disk that is full.
    let program = vmm.path("program");
    fs::write(&program, "neither a program nor a script\n")?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let ways = [
        (vmm.exec_command_of(&program, "memfd:"), "memfd:".to_owned(), "cannot execute"),
        (
            vmm.exec_command_of(&program, "memfd:"),
            format!("file:{}", vmm.path("state").display()),
            "cannot execute",
        ),
        (vmm.exec_command("memfd:"), "file:/dev/full".to_owned(), "/dev/full"),
    ];
    vmm.set_preflight("off")?;
    let fail = |vmm: &mut Vmm, times: usize| {
        for (command, uri, reason) in ways.iter().cycle().take(times) {
            vmm.set_exec(command)?;
            let error = vmm.migrate(uri).err().context("the update succeeded")?.to_string();
            ensure!(error.contains(reason), "{error}");
            ensure!(vmm.status()? == "running");
            guest.beats_on(0)?;
            guest.beats_on(1)?;
        }
        settled(vmm, &guest, bytes, seed)
    };
    let before = fail(&mut vmm, 3)?;
    fail(&mut vmm, 50)?.check_against(&before, SLACK_KIB)?;
    ensure!(!vmm.path("state").exists(), "a state file stays behind");

    // And none of it is in the way of one that succeeds.
    vmm.update()?;
    guest.beats_on(0)?;
    guest.verify(bytes, seed)?;
    let events = vmm.qmp().take_events();
    let names: Vec<_> = events.iter().filter_map(|event| event["event"].as_str()).collect();
    ensure!(names.chunks(2).all(|pair| pair == ["STOP", "RESUME"]), "events: {names:?}");
    vmm.quit()
}

/// A client that keeps commands in flight on its own connection, without a pause.
struct Fire {
    qmp: Qmp,
    next_id: u64,
    /// The ids whose replies are still to come, in order, and whether they are errors.
    expected: VecDeque<(Value, bool)>,
    answered: u64,
    events: Vec<String>,
}

impl Fire {
    /// Commands in flight at most.
    const WINDOW: usize = 16;

    fn new(qmp: Qmp) -> Fire {
        Fire { qmp, next_id: 0, expected: VecDeque::new(), answered: 0, events: Vec::new() }
    }

    /// Sends the next command; every seventh in two pieces, so that a half one waits across an update.
    fn shoot(&mut self) -> anyhow::Result<()> {
        self.next_id += 1;
        let (command, arguments, fails) = match self.next_id % 8 {
            0 => ("query-commands", json!({}), false),
            1 => ("query-cpus-fast", json!({}), false),
            2 => ("no-such-command", json!({}), true),
            3 => ("human-monitor-command", json!({ "command-line": "info status" }), false),
            4 => ("query-migrate", json!({}), false),
            5 => ("query-migrate-parameters", json!({ "no-such-argument": 1 }), true),
            6 => ("query-chardev", json!({}), false),
            _ => ("query-status", json!({}), false),
        };
        // An id may be any value.
        let id = if self.next_id.is_multiple_of(2) {
            json!(self.next_id)
        } else {
            json!({ "shot": self.next_id })
        };
        let request = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        let (one, two) = request.split_at(if self.next_id.is_multiple_of(7) { request.len() / 2 } else { 0 });
        self.qmp.send_raw(one.as_bytes())?;
        if !one.is_empty() {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.qmp.send_raw(two.as_bytes())?;
        self.qmp.send_raw(b"\n")?;
        self.expected.push_back((id, fails));
        Ok(())
    }

    /// Takes the next message: an event, or the reply to the oldest command in flight.
    fn take(&mut self) -> anyhow::Result<()> {
        let Some(message) = self.qmp.try_read(PATIENCE)? else {
            anyhow::bail!("no reply to {:?}", self.expected);
        };
        if let Some(event) = message["event"].as_str() {
            self.events.push(event.to_owned());
            return Ok(());
        }
        let Some((id, fails)) = self.expected.pop_front() else {
            anyhow::bail!("a reply too many: {message}");
        };
        ensure!(message["id"] == id, "wanted the reply to {id}: {message}");
        ensure!(message.get("error").is_some() == fails, "{message}");
        self.answered += 1;
        Ok(())
    }

    fn run(mut self, stop: &AtomicBool) -> anyhow::Result<Fire> {
        while !stop.load(Ordering::Relaxed) {
            while self.expected.len() < Self::WINDOW {
                self.shoot()?;
            }
            self.take()?;
        }
        while !self.expected.is_empty() {
            self.take()?;
        }
        let extra = self.qmp.try_read(Duration::from_millis(100))?;
        if let Some(event) = extra.as_ref().and_then(|message| message["event"].as_str()) {
            self.events.push(event.to_owned());
        } else {
            ensure!(extra.is_none(), "a reply too many: {extra:?}");
        }
        Ok(self)
    }
}

#[test]
fn every_command_of_a_busy_client_gets_one_reply() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    const UPDATES: usize = 20;
    let mut vmm = VmmBuilder::new().args(&["-qmp", "unix:fire,server=on,wait=off"]).start()?;
    let guest = vmm.guest()?;
    let fire = Fire::new(Qmp::connect(&vmm.path("fire"))?);
    let stop = AtomicBool::new(false);
    let fire = std::thread::scope(|scope| {
        let gunner = scope.spawn(|| fire.run(&stop));
        let result = (0..UPDATES).try_for_each(|_| {
            vmm.update()?;
            guest.beats_on(0)?;
            // The busy client gets a turn of every new process, however short this one's work is.
            std::thread::sleep(Duration::from_millis(5));
            Ok::<_, anyhow::Error>(())
        });
        stop.store(true, Ordering::Relaxed);
        let fire = gunner.join().expect("the client does not panic");
        result.and(fire)
    })?;
    ensure!(fire.answered > 10 * UPDATES as u64, "only {} commands were answered", fire.answered);
    let seen = |name| fire.events.iter().filter(|event| *event == name).count();
    ensure!((seen("STOP"), seen("RESUME")) == (UPDATES, UPDATES), "events: {:?}", fire.events);
    vmm.quit()
}
