//! The guest survives every failure of the program that was to take it over: with the old program in the same process where
//! the new one can still do that much, and in the keeper's otherwise. The monitors say why, and the next good update works.

use std::fs;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::json;
use testkit::process::send_signal;
use testkit::{Gate, Machine, PATIENCE, Terminal, VmmBuilder, binary, need_kvm, wait_for};

const SIGKILL: i32 = 9;

/// Who has the guest after a failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Process {
    /// The old program, in the process that the user knows.
    Same,
    /// The old program in what was the keeper.
    Another,
}

/// A machine of which updates fail.
struct Failing {
    machine: Machine,
    failures: u64,
}

impl Deref for Failing {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl DerefMut for Failing {
    fn deref_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

impl Failing {
    fn start() -> anyhow::Result<Failing> {
        Failing::of(VmmBuilder::new())
    }

    fn of(builder: VmmBuilder) -> anyhow::Result<Failing> {
        let mut machine = Machine::start(builder)?;
        // Which would find most of this before anything happens.
        machine.vmm.set_preflight("off")?;
        Ok(Failing { machine, failures: 0 })
    }

    /// Waits for the failure of the update, which leaves the guest to this process; gives the error.
    fn fails(&mut self, process: Process) -> anyhow::Result<String> {
        self.failures += 1;
        let (error, events) = self.failure()?;
        let statuses: Vec<_> = events.iter().filter(|event| event["event"] == "MIGRATION").collect();
        let last = statuses.last().map(|event| event["data"]["status"].clone());
        ensure!(last == Some(json!("failed")), "events: {events:?}");
        ensure!(statuses.iter().all(|event| event["data"]["status"] != "completed"), "events: {events:?}");
        self.is_run_by(process).context(error.clone())?;
        Ok(error)
    }

    /// One process is there, it is the right one, and it runs the guest.
    fn is_run_by(&mut self, expected: Process) -> anyhow::Result<()> {
        let runner = self.runner()?;
        let same = runner == self.vmm.pid();
        ensure!(same == (expected == Process::Same), "{runner} has the guest of {}", self.vmm.pid());
        Ok(())
    }

    /// The next update is a good one, and everything ends in order.
    fn goes_on(mut self, process: Process) -> anyhow::Result<()> {
        let info = self.vmm.update()?;
        ensure!(info["cpr"]["generation"] == 1, "what failed is not counted: {info}");
        ensure!(info.get("error-desc").is_none(), "{info}");
        self.is_run_by(process)?;
        self.verify()?;
        let mut vmm = self.machine.vmm;
        if process == Process::Same {
            return vmm.quit();
        }
        vmm.qmp().execute("quit", json!({}))?;
        wait_for("the end of every process", PATIENCE, || vmm.processes().is_empty().then_some(()))
    }

    fn command_with(&self, uri: &str, more: &[&str]) -> Vec<String> {
        [self.vmm.exec_command(uri), words(more)].concat()
    }
}

fn contains(error: &str, needles: &[&str]) -> anyhow::Result<()> {
    for needle in needles {
        ensure!(error.contains(needle), "{needle:?} is not in {error:?}");
    }
    Ok(())
}

#[test]
fn a_program_that_is_none_of_ours_leaves_its_last_words() -> anyhow::Result<()> {
    need_kvm!();
    let loader = "/lib64/ld-linux-x86-64.so.2";
    let mut cases = vec![
        (words(&["sh", "-c", "echo no such configuration >&2; exit 3"]), "no such configuration"),
        (words(&["sh", "-c", "kill -SEGV $$"]), "ended before it took over"),
        (words(&["false"]), "ended before it took over"),
    ];
    if Path::new(loader).exists() {
        // What a program says that lacks a library.
        cases.push((words(&[loader, "/no/such/library.so"]), "cannot open shared object file"));
    }
    for (command, said) in cases {
        let mut machine = Failing::start()?;
        machine.begin(&command, "memfd:")?;
        let error = machine.fails(Process::Another)?;
        contains(&error, &["cpr-exec could not prepare: the new program ended before", said])?;
        if said.starts_with("no such") {
            contains(&error, &["(exited with code 3): no such configuration"])?;
            contains(&machine.vmm.stderr(), &["no such configuration\n"])?;
        }
        machine.goes_on(Process::Another)?;
    }
    Ok(())
}

#[test]
fn a_program_that_hangs_is_ended() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Failing::start()?;
    machine.set("cpr-exec-timeout", json!(300))?;
    machine.begin(&words(&["sleep", "1000"]), "memfd:")?;
    let error = machine.fails(Process::Another)?;
    contains(&error, &["the new program was killed", "no progress for 300ms (building)"])?;
    let parameters = machine.vmm.qmp().execute("query-migrate-parameters", json!({}))?;
    ensure!(parameters["cpr-exec-timeout"] == 300 && parameters["cpr-defer-timeout"] == 0, "{parameters}");
    machine.set("cpr-exec-timeout", json!(5000))?;
    machine.goes_on(Process::Another)
}

#[test]
fn a_process_that_is_killed_leaves_its_guest_to_the_keeper() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Failing::start()?;
    machine.set("cpr-exec-timeout", json!(0))?;
    let gate = Gate::new(&machine.vmm.path(""))?;
    let command = gate.command(&machine.vmm.exec_command("memfd:"));
    machine.begin(&command, "memfd:")?;
    let _held = gate.held()?;
    machine.guest.beats_on(0)?;
    send_signal(machine.vmm.pid(), SIGKILL)?;
    let error = machine.fails(Process::Another)?;
    contains(&error, &["the new program ended before it took over (was killed by signal 9)"])?;
    machine.goes_on(Process::Another)
}

#[test]
fn a_program_that_refuses_brings_the_old_one_back_even_if_it_is_deleted() -> anyhow::Result<()> {
    need_kvm!();
    let folder = tempfile::tempdir()?;
    let own = folder.path().join("cpr-vmm-of-before");
    fs::copy(binary(), &own)?;
    let mut machine = Failing::of(VmmBuilder::new().binary(&own))?;
    fs::remove_file(&own)?;
    fs::write(&own, "#!/bin/sh\nexit 1\n")?;
    fs::set_permissions(&own, fs::Permissions::from_mode(0o755))?;
    // A wrapper that goes elsewhere changes nothing for the old program.
    let elsewhere = machine.vmm.path("elsewhere");
    fs::create_dir(&elsewhere)?;
    for uri in ["memfd:".to_owned(), format!("file:{}", machine.vmm.path("vm.state").display())] {
        let mut command = machine.command_with(&uri, &["-no-such-option"]);
        command[0] = binary().display().to_string();
        let wrapper = words(&["/bin/sh", "-c", "cd elsewhere; exec \"$@\"", "sh"]);
        let command = [wrapper, command].concat();
        machine.begin(&command, &uri)?;
        let error = machine.fails(Process::Same)?;
        contains(&error, &["could not hand over: the new program failed before it took over: cpr-vmm: "])?;
        contains(&error, &["-no-such-option"])?;
        // The user's terminal has it as well, once.
        let said = machine.vmm.stderr();
        ensure!(said.matches("-no-such-option").count() as u64 == machine.failures, "{said}");
    }
    let directory = fs::read_link(format!("/proc/{}/cwd", machine.vmm.pid()))?;
    ensure!(directory != elsewhere, "it stays in {}", directory.display());
    let name = fs::read_to_string(format!("/proc/{}/comm", machine.vmm.pid()))?;
    ensure!(name == "cpr-vmm-of-befo\n", "the process is called {name}");
    fs::remove_file(&own)?;
    fs::copy(binary(), &own)?;
    machine.goes_on(Process::Same)
}

#[test]
fn when_both_programs_fail_the_keeper_goes_on_and_the_error_has_both() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Failing::start()?;
    let uri = format!("file:{}", machine.vmm.path("vm.state").display());
    // The state becomes unreadable for everybody.
    let script = "mv vm.state kept; ln -s nowhere vm.state; exec \"$@\"";
    let mut command = words(&["/bin/sh", "-c", script, "sh"]);
    command.extend(machine.command_with(&uri, &["-S", "-no-such-option"]));
    machine.begin(&command, &uri)?;
    let error = machine.fails(Process::Another)?;
    contains(
        &error,
        &["failed, and the previous one, started again in its place, ended", "exited with code 1"],
    )?;
    contains(&error, &["-no-such-option", "vm.state': No such file"])?;
    ensure!(machine.vmm.path("vm.state").is_symlink() && machine.vmm.path("kept").exists());
    machine.goes_on(Process::Another)
}

#[test]
fn a_stopped_guest_stays_stopped() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Failing::start()?;
    machine.vmm.qmp().execute("stop", json!({}))?;
    let (beats, ram) = (machine.guest.vcpu(0).beats(), machine.guest.snapshot()?);
    for command in [machine.command_with("memfd:", &["-stray"]), words(&["false"])] {
        machine.begin(&command, "memfd:")?;
        wait_for("the failure", PATIENCE, || {
            let info = machine.vmm.qmp().execute("query-migrate", json!({})).ok()?;
            (info["status"] == "failed").then_some(())
        })?;
        ensure!(machine.vmm.status()? == "paused");
        ensure!(machine.guest.vcpu(0).beats() == beats, "it ran");
        ensure!(machine.guest.snapshot()? == ram, "a refused update wrote to guest RAM");
    }
    machine.vmm.qmp().execute("cont", json!({}))?;
    machine.goes_on(Process::Another)
}

#[test]
fn under_defer_the_answer_comes_first_and_the_sessions_go_on() -> anyhow::Result<()> {
    need_kvm!();
    let (terminal, mut console) = Terminal::open()?;
    let mut machine = Failing::of(VmmBuilder::new().args(&["-monitor", "stdio"]).stdio(terminal.stdio()))?;
    console.expect("(qemu) ")?;
    let command = machine.vmm.exec_command("defer");
    machine.begin(&command, "memfd:")?;
    wait_for("the target", PATIENCE, || machine.vmm.status().ok().filter(|status| status == "inmigrate"))?;
    fs::write(machine.vmm.path("garbage"), vec![b'x'; 4096])?;
    let refusal = machine.vmm.qmp().refused("migrate-incoming", json!({ "uri": "file:garbage" }))?;
    contains(&refusal.desc, &["'garbage'", "not a CPR state frame"])?;
    let error = machine.fails(Process::Same)?;
    contains(&error, &["the new program failed before it took over", &refusal.desc])?;
    console.type_line("info migrate")?;
    console.expect("not a CPR state frame")?;
    console.expect("(qemu) ")?;

    // Nobody says where from: that has a limit of its own, if the user wants one.
    machine.set("cpr-exec-timeout", json!(4000))?;
    machine.set("cpr-defer-timeout", json!(6000))?;
    let command = machine.vmm.exec_command("defer");
    machine.begin(&command, "memfd:")?;
    let error = machine.fails(Process::Same)?;
    contains(&error, &["nobody gave the new program a migrate-incoming for 6s", "ended by SIGABRT"])?;
    machine.set("cpr-exec-timeout", json!(5000))?;
    machine.goes_on(Process::Same)
}

#[test]
fn a_link_to_the_program_may_change_at_any_time() -> anyhow::Result<()> {
    need_kvm!();
    let folder = tempfile::tempdir()?;
    let link = folder.path().join("current");
    symlink(binary(), &link)?;
    let mut machine = Failing::of(VmmBuilder::new().binary(&link))?;
    fs::remove_file(&link)?;
    symlink("/bin/false", &link)?;
    let command = machine.vmm.exec_command("memfd:");
    machine.begin(&command, "memfd:")?;
    machine.fails(Process::Another)?;
    fs::remove_file(&link)?;
    symlink(binary(), &link)?;
    machine.goes_on(Process::Another)
}

/// What a target does to itself, and how it is told; see `cpr-core/src/fault.rs`.
#[cfg(feature = "fault-injection")]
mod faults {
    use cpr_core::fault::VARIABLE;

    use super::*;

    fn strikes(fault: &str, process: Process, needles: &[&str]) -> anyhow::Result<()> {
        let mut machine = Failing::start()?;
        // A program that is only asked gets nowhere near: the fault strikes the one that takes over.
        machine.vmm.set_preflight("require")?;
        let machine = fails_by(machine, fault, process, needles).context(fault.to_owned())?;
        machine.goes_on(process).context(fault.to_owned())
    }

    fn fails_by(
        mut machine: Failing,
        fault: &str,
        process: Process,
        needles: &[&str],
    ) -> anyhow::Result<Failing> {
        machine.set("cpr-exec-timeout", json!(3000))?;
        let mut command = words(&["/usr/bin/env", &format!("{VARIABLE}={fault}")]);
        command.extend(machine.vmm.exec_command("memfd:"));
        machine.begin(&command, "memfd:")?;
        let error = machine.fails(process)?;
        contains(&error, needles)?;
        Ok(machine)
    }

    #[test]
    fn a_panic_brings_the_old_program_back() -> anyhow::Result<()> {
        need_kvm!();
        for fault in ["panic@built", "thread-panic@built", "panic@restored", "thread-panic@restored"] {
            strikes(
                fault,
                Process::Same,
                &["new program failed", "panicked at", "a panic that was asked for"],
            )?;
        }
        Ok(())
    }

    #[test]
    fn a_fatal_signal_brings_the_old_program_back() -> anyhow::Result<()> {
        need_kvm!();
        for (fault, name) in [
            ("segv@built", "SIGSEGV"),
            ("overflow@built", "SIGSEGV"),
            ("overflow@restored", "SIGSEGV"),
            ("abort@restored", "SIGABRT"),
        ] {
            strikes(fault, Process::Same, &["new program failed", &format!("ended by {name}")])?;
        }
        Ok(())
    }

    #[test]
    fn a_hang_brings_the_old_program_back() -> anyhow::Result<()> {
        need_kvm!();
        for fault in ["stall@built", "stall@restored"] {
            strikes(fault, Process::Same, &["made no progress for 3s", "ended by SIGABRT"])?;
        }
        Ok(())
    }

    #[test]
    fn a_kill_leaves_the_guest_to_the_keeper() -> anyhow::Result<()> {
        need_kvm!();
        for fault in ["kill@built", "kill@restored"] {
            strikes(fault, Process::Another, &["ended before it took over (was killed by signal 9)"])?;
        }
        Ok(())
    }

    #[test]
    fn a_fallback_start_does_not_fall_back_again() -> anyhow::Result<()> {
        need_kvm!();
        for fault in ["panic@built", "overflow@restored", "stall@built"] {
            // Which has the environment of the old program, not of the new one.
            let machine = Failing::of(VmmBuilder::new().env(VARIABLE, fault))?;
            let needles = ["failed, and the previous one, started again in its place,"];
            fails_by(machine, fault, Process::Another, &needles).context(fault)?;
        }
        Ok(())
    }
}

/// Of the build with faults, too, so that the question is seen to have two answers.
#[test]
fn only_a_build_with_faults_knows_how_to_ask_for_them() -> anyhow::Result<()> {
    let program = fs::read(binary())?;
    let mark = b"CPR_TEST_";
    let found = program.windows(mark.len()).any(|window| window == mark);
    ensure!(found == cfg!(feature = "fault-injection"), "{}", binary().display());
    Ok(())
}
