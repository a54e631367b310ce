//! Signals and hang-ups: an orderly end, at any time, and above all during an update.
//!
//! Between the two programs every signal is blocked, so a signal waits for the new program and ends it once the guest is
//! its own. The sweeps below hit every phase of an update sooner or later; a [`Gate`] hits the moment in between for
//! certain.

use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use testkit::process::{self, SIGHUP, SIGINT, SIGTERM, send_signal};
use testkit::{Console, Gate, PATIENCE, Qmp, Terminal, Vmm, VmmBuilder, need_kvm, wait_for};

/// Tries per sweep.
const TRIES: u32 = 8;
const ENDING: [i32; 3] = [SIGTERM, SIGINT, SIGHUP];

/// With all that an orderly end must clear away.
fn builder() -> VmmBuilder {
    VmmBuilder::new().args(&["-pidfile", "pid", "-qmp", "unix:second,server=on,wait=off"])
}

fn start(builder: VmmBuilder) -> anyhow::Result<Vmm> {
    let vmm = builder.start()?;
    vmm.guest()?.beats_on(0)?;
    ensure!(vmm.path("pid").exists() && vmm.path("second").exists());
    Ok(vmm)
}

/// Sets up an update through a memfd and begins it, without waiting for anything.
fn begin_update(vmm: &mut Vmm) -> anyhow::Result<()> {
    let command = vmm.exec_command("memfd:");
    vmm.set_exec(&command)?;
    vmm.qmp().send("migrate", json!({ "uri": "memfd:" })).map(drop)
}

/// Checks that the VMM ends in order, told by a signal, and leaves nothing behind. A reply may still be on its way.
fn ends_in_order(vmm: &mut Vmm, reason: &str) -> anyhow::Result<()> {
    let code = vmm.wait_exit()?;
    ensure!(code == Some(0), "exit code {code:?}: {}", vmm.stderr());
    let mut events = vmm.qmp().take_events();
    while let Some(message) = vmm.qmp().try_read_to_end()? {
        events.push(message);
    }
    events.retain(|message| message.get("event").is_some());
    let names: Vec<_> = events.iter().filter_map(|event| event["event"].as_str()).collect();
    let told: Vec<_> = events.iter().filter(|event| event["event"] == "SHUTDOWN").collect();
    ensure!(told.len() == 1 && names.last() == Some(&"SHUTDOWN"), "events: {names:?}");
    ensure!(told[0]["data"] == json!({ "guest": false, "reason": reason }), "{}", told[0]);
    // Whoever stopped the guest also ran it again: no end before the commit.
    let count = |name| names.iter().filter(|event| **event == name).count();
    ensure!(count("STOP") == count("RESUME"), "events: {names:?}");
    for path in ["pid", "qmp", "second"] {
        ensure!(!vmm.path(path).exists(), "{path} stays behind");
    }
    let ended = || vmm.processes().is_empty().then_some(());
    wait_for("the end of the last keeper", PATIENCE, ended)?;
    let complaints = vmm.stderr();
    ensure!(complaints.is_empty(), "it complained: {complaints}");
    Ok(())
}

/// A VM with its monitor on a terminal, and that terminal.
fn start_on_terminal(wrapper: &[&str]) -> anyhow::Result<(Vmm, Terminal, Console)> {
    let (terminal, mut console) = Terminal::open()?;
    let vmm = start(builder().args(&["-monitor", "stdio"]).wrapper(wrapper).stdio(terminal.stdio()))?;
    console.expect("(qemu) ")?;
    Ok((vmm, terminal, console))
}

#[test]
fn each_signal_ends_it_and_gives_the_terminal_back() -> anyhow::Result<()> {
    need_kvm!();
    for signal in ENDING {
        for updates in [0, 2] {
            let (terminal, mut console) = Terminal::open()?;
            let found = terminal.modes()?;
            let builder = builder().args(&["-monitor", "stdio"]).stdio(terminal.stdio());
            let mut vmm = start(builder)?;
            console.expect("(qemu) ")?;
            for _ in 0..updates {
                vmm.update()?;
            }
            ensure!(terminal.modes()? != found, "the editor needs a raw terminal");
            send_signal(vmm.pid(), signal)?;
            ends_in_order(&mut vmm, "host-signal").context(format!("signal {signal}, {updates} updates"))?;
            ensure!(terminal.modes()? == found, "the terminal is not as it was found");
        }
    }
    Ok(())
}

/// Ends the VMM by `strike` in try after try, each a little later in an update.
fn sweep(
    start: impl Fn() -> anyhow::Result<Vmm>,
    mut strike: impl FnMut(&Vmm) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for shot in 0..TRIES {
        let mut vmm = start()?;
        // An update of its own tells how long one takes at this moment.
        let begun = Instant::now();
        vmm.update()?;
        let took = begun.elapsed();
        // Spread over the whole update and a little more, each by chance within its share.
        let delay = took.mul_f64(1.2 * (f64::from(shot) + chance()) / f64::from(TRIES));
        begin_update(&mut vmm)?;
        std::thread::sleep(delay);
        strike(&vmm)?;
        ends_in_order(&mut vmm, "host-signal")
            .with_context(|| format!("struck after {delay:?}; an update took {took:?}"))?;
    }
    Ok(())
}

/// A number from 0 to 1 that nobody foresees.
fn chance() -> f64 {
    let hash = RandomState::new().hash_one(0);
    hash as f64 / u64::MAX as f64
}

#[test]
fn a_signal_at_any_time_of_an_update_ends_it_after_the_commit() -> anyhow::Result<()> {
    need_kvm!();
    for signal in ENDING {
        sweep(|| start(builder()), |vmm| Ok(send_signal(vmm.pid(), signal)?))
            .with_context(|| format!("signal {signal}"))?;
    }
    Ok(())
}

#[test]
fn a_signal_that_comes_with_the_migrate_command_is_not_lost() -> anyhow::Result<()> {
    need_kvm!();
    for signal in ENDING {
        let mut vmm = start(builder())?;
        // Both wait for the program when it goes on, so that one round of its loop sees both.
        vmm.halt()?;
        let command = vmm.exec_command("memfd:");
        let parameters = json!({ "mode": "cpr-exec", "cpr-exec-command": command });
        vmm.qmp().send("migrate-set-parameters", parameters)?;
        vmm.qmp().send("migrate", json!({ "uri": "memfd:" }))?;
        send_signal(vmm.pid(), signal)?;
        vmm.go_on()?;
        ends_in_order(&mut vmm, "host-signal").with_context(|| format!("signal {signal}"))?;
    }
    Ok(())
}

#[test]
fn a_quit_right_after_the_migrate_command_is_not_lost() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = start(builder())?;
    let command = vmm.exec_command("memfd:");
    vmm.set_exec(&command)?;
    let migrate = json!({ "execute": "migrate", "arguments": { "uri": "memfd:" } });
    vmm.qmp().send_raw(format!("{migrate}\n{}\n", json!({ "execute": "quit" })).as_bytes())?;
    ends_in_order(&mut vmm, "host-qmp-quit")
}

#[test]
fn a_signal_between_the_two_programs_ends_the_second_after_the_commit() -> anyhow::Result<()> {
    need_kvm!();
    for signal in ENDING {
        let mut vmm = start(builder())?;
        let gate = Gate::new(&vmm.path(""))?;
        let command = gate.command(&vmm.exec_command("memfd:"));
        vmm.set_exec(&command)?;
        vmm.qmp().execute("migrate", json!({ "uri": "memfd:" }))?;
        let held = gate.held()?;
        send_signal(vmm.pid(), signal)?;
        held.release()?;
        vmm.qmp().event("STOP")?;
        vmm.qmp().event("RESUME")?;
        ends_in_order(&mut vmm, "host-signal").with_context(|| format!("signal {signal}"))?;
    }
    Ok(())
}

#[test]
fn a_signal_ends_a_program_that_waits_for_migrate_incoming() -> anyhow::Result<()> {
    need_kvm!();
    for keeper in [true, false] {
        for signal in ENDING {
            let mut vmm = start(builder())?;
            let command = vmm.exec_command("defer");
            vmm.set_exec(&command)?;
            vmm.qmp().execute("migrate-set-parameters", json!({ "x-cpr-exec-keeper": keeper }))?;
            vmm.qmp().execute("migrate", json!({ "uri": "memfd:" }))?;
            let deadline = Instant::now() + PATIENCE;
            while vmm.status()? != "inmigrate" {
                ensure!(Instant::now() < deadline, "it does not wait");
            }
            vmm.qmp().event("STOP")?;
            send_signal(vmm.pid(), signal)?;
            ends_in_order(&mut vmm, "host-signal").with_context(|| format!("signal {signal}"))?;
        }
    }
    Ok(())
}

/// `setsid` makes the terminal the controlling one, so that its end sends SIGHUP.
const SESSION: [&str; 2] = ["setsid", "--ctty"];

#[test]
fn the_end_of_the_controlling_terminal_ends_it() -> anyhow::Result<()> {
    need_kvm!();
    let (mut vmm, terminal, console) = start_on_terminal(&SESSION)?;
    vmm.update()?;
    drop((terminal, console));
    ends_in_order(&mut vmm, "host-signal")
}

#[test]
fn the_end_of_the_controlling_terminal_during_an_update_ends_it_after_the_commit() -> anyhow::Result<()> {
    need_kvm!();
    let seat = std::cell::RefCell::new(None);
    let start = || {
        let (vmm, terminal, console) = start_on_terminal(&SESSION)?;
        *seat.borrow_mut() = Some((terminal, console));
        Ok(vmm)
    };
    sweep(start, |_| {
        drop(seat.take());
        Ok(())
    })
}

#[test]
fn the_end_of_the_controlling_terminal_between_the_programs_ends_the_second() -> anyhow::Result<()> {
    need_kvm!();
    let (mut vmm, terminal, console) = start_on_terminal(&SESSION)?;
    let gate = Gate::new(&vmm.path(""))?;
    let command = gate.command(&vmm.exec_command("memfd:"));
    vmm.set_exec(&command)?;
    vmm.qmp().execute("migrate", json!({ "uri": "memfd:" }))?;
    let held = gate.held()?;
    drop((terminal, console));
    held.release()?;
    ends_in_order(&mut vmm, "host-signal")
}

#[test]
fn without_a_session_the_guest_outlives_its_terminal() -> anyhow::Result<()> {
    need_kvm!();
    let (mut vmm, terminal, console) = start_on_terminal(&[])?;
    let guest = vmm.guest()?;
    let gate = Gate::new(&vmm.path(""))?;
    let command = gate.command(&vmm.exec_command("memfd:"));
    vmm.set_exec(&command)?;
    vmm.qmp().execute("migrate", json!({ "uri": "memfd:" }))?;
    let held = gate.held()?;
    drop((terminal, console));
    held.release()?;
    vmm.qmp().event("RESUME")?;
    guest.beats_on(0)?;
    for _ in 0..2 {
        vmm.update()?;
        guest.beats_on(0)?;
    }
    // It must not spin on a descriptor that is at its end for good.
    let ticks = |vmm: &Vmm| cpu_ticks(vmm.pid());
    vmm.qmp().execute("stop", json!({}))?;
    let before = ticks(&vmm)?;
    std::thread::sleep(Duration::from_millis(500));
    let spent = ticks(&vmm)? - before;
    ensure!(spent < 10, "a stopped VM took {spent} clock ticks in half a second");
    vmm.quit()
}

/// User and system time of a process, in clock ticks.
fn cpu_ticks(pid: u32) -> anyhow::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let field = |at: usize| rest.split_ascii_whitespace().nth(at).and_then(|field| field.parse::<u64>().ok());
    field(11).zip(field(12)).map(|(user, system)| user + system).context("no times in /proc/PID/stat")
}

#[test]
fn updates_work_where_the_parent_ignores_and_blocks_signals() -> anyhow::Result<()> {
    need_kvm!();
    let wrapper = ["env", "--ignore-signal=CHLD", "--block-signal=USR2"];
    let mut vmm = start(builder().wrapper(&wrapper))?;
    let guest = vmm.guest()?;
    let blocked = |vmm: &Vmm| process::status_field(vmm.pid(), "SigBlk");
    let before = blocked(&vmm)?;
    for _ in 0..3 {
        vmm.update()?;
        guest.beats_on(0)?;
        let children = || process::children(vmm.pid()).ok()?.is_empty().then_some(());
        wait_for("the keeper's end", PATIENCE, children)?;
        ensure!(blocked(&vmm)? == before, "blocked signals: {before} -> {}", blocked(&vmm)?);
    }
    send_signal(vmm.pid(), SIGTERM)?;
    ends_in_order(&mut vmm, "host-signal")
}

#[test]
fn a_second_signal_changes_nothing() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = start(builder())?;
    let mut second = Qmp::connect(&vmm.path("second"))?;
    for signal in ENDING.repeat(3) {
        // It may be gone before the last one.
        let _ = send_signal(vmm.pid(), signal);
    }
    ends_in_order(&mut vmm, "host-signal")?;
    let events: Vec<Value> = second.events_to_the_end()?;
    ensure!(events.len() == 1 && events[0]["event"] == "SHUTDOWN", "{events:?}");
    Ok(())
}
