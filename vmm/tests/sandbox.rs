//! `-sandbox` as its users see it: what is denied stays denied, and every update works all the same.

use std::fs;

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use testkit::process::{send_signal, status_field};
use testkit::{Machine, PATIENCE, Vmm, VmmBuilder, need_kvm, wait_for};

/// Everything that cpr-exec can do without.
const STRICT: &str = "on,elevateprivileges=deny,resourcecontrol=deny";
/// Everything.
const STRICTEST: &str = "on,elevateprivileges=children,resourcecontrol=deny,spawn=deny";
/// signal(7).
const SIGSYS: i32 = 31;

fn sandboxed(sandbox: &str) -> VmmBuilder {
    VmmBuilder::new().args(&["-sandbox", sandbox])
}

fn number(pid: u32, key: &str) -> anyhow::Result<u32> {
    Ok(status_field(pid, key)?.parse()?)
}

/// The filters that each thread of the process has.
fn filters(pid: u32) -> anyhow::Result<u32> {
    let count = number(pid, "Seccomp_filters")?;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        ensure!(status.contains(&format!("\nSeccomp_filters:\t{count}\n")), "not {count}: {status}");
    }
    Ok(count)
}

/// Those that a program without `-sandbox` has from whoever runs the tests.
fn inherited() -> anyhow::Result<u32> {
    number(std::process::id(), "Seccomp_filters")
}

/// An update to the same machine under another sandbox, or under none.
fn update_to(machine: &mut Machine, sandbox: Option<&str>) -> anyhow::Result<Value> {
    let mut command = machine.vmm.exec_command("memfd:");
    let at = command.iter().position(|word| word == "-sandbox").context("it has a sandbox")?;
    command.splice(at..at + 2, sandbox.into_iter().flat_map(|sandbox| ["-sandbox".into(), sandbox.into()]));
    machine.vmm.set_exec(&command)?;
    machine.vmm.migrate("memfd:")
}

/// A command that runs `script` before the program of the next update, in the same process.
fn preceded_by(script: &str, machine: &Machine) -> Vec<String> {
    let shell = ["/bin/sh", "-c", &format!("{script}\nexec \"$@\""), "sh"].map(String::from);
    [shell.to_vec(), machine.vmm.exec_command("memfd:")].concat()
}

#[test]
fn updates_in_a_row_gather_no_filters() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::start(sandboxed(STRICT).cpus(2).args(&["-append", "cpus=2"]))?;
    let pid = machine.vmm.pid();
    let before = filters(pid)?;
    ensure!(before > inherited()?, "{before} filters");
    ensure!(number(pid, "Seccomp")? == 2 && number(pid, "NoNewPrivs")? == 1);
    for generation in 1..=4 {
        let info = if generation % 2 == 0 { machine.vmm.update()? } else { machine.vmm.update_by_file()? };
        ensure!(info["cpr"]["generation"] == generation, "{info}");
        ensure!(machine.runner()? == pid);
        let now = filters(pid)?;
        ensure!(now == before, "{before} filters became {now}");
    }
    machine.verify()?;
    let said = machine.vmm.stderr();
    ensure!(said.is_empty(), "{said}");
    machine.vmm.quit()
}

#[test]
fn an_update_adds_what_is_new_and_takes_nothing_away() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::start(sandboxed("off"))?;
    let pid = machine.vmm.pid();
    ensure!(filters(pid)? == inherited()?);
    update_to(&mut machine, Some("on"))?;
    let on = filters(pid)?;
    ensure!(on > inherited()?);
    update_to(&mut machine, Some(STRICT))?;
    let strict = filters(pid)?;
    ensure!(strict > on, "{on} filters became {strict}");
    ensure!(machine.vmm.stderr().is_empty(), "{}", machine.vmm.stderr());
    // To and fro.
    for sandbox in [None, Some(STRICT), Some("on"), Some("off"), Some(STRICT)] {
        update_to(&mut machine, sandbox)?;
        let now = filters(pid)?;
        ensure!(now == strict, "{strict} filters became {now} under {sandbox:?}");
    }
    let said = machine.vmm.stderr();
    let kept = |what: &str| said.matches(&format!("-sandbox {what}: asked for by a program before")).count();
    let all = "on,obsolete=deny,elevateprivileges=deny,resourcecontrol=deny";
    ensure!(kept(all) == 2 && kept("elevateprivileges=deny,resourcecontrol=deny") == 1, "{said}");
    machine.verify()?;
    // The last of them to be added is one that no update comes after.
    update_to(&mut machine, Some(STRICTEST))?;
    ensure!(filters(pid)? > strict);
    let refusal = machine.vmm.qmp().refused("migrate", json!({ "uri": "memfd:" }))?.desc;
    ensure!(refusal.contains("-sandbox spawn=deny"), "{refusal}");
    machine.beats_on()?;
    machine.verify()?;
    machine.vmm.quit()
}

#[test]
fn what_an_update_executes_is_denied_the_same_calls() -> anyhow::Result<()> {
    need_kvm!();
    // Tools whose first act is the call, and the exit codes of a shell under which that ended by SIGSYS, or was refused.
    let script = "for tool in 'dmesg --syslog' 'setsid true' \"renice -n 19 -p $$\"; do
        $tool >/dev/null 2>&1; printf '%s ' $? >>codes
    done";
    for (sandbox, expected) in [("off", "0 0 0 0 0 0 "), (STRICT, "159 159 1 159 159 1 ")] {
        let mut machine = Machine::start(sandboxed(sandbox))?;
        let command = preceded_by(script, &machine);
        machine.vmm.set_exec(&command)?;
        machine.vmm.migrate("memfd:")?;
        // Once in the program that was asked, and once in the one that took over. Who may read the kernel's log, is for
        // another file to say.
        let codes = fs::read_to_string(machine.vmm.path("codes"))?;
        let allowed = if sandbox == "off" { codes.replace('1', "0") } else { codes };
        ensure!(allowed == expected, "under {sandbox}: {allowed}");
        machine.verify()?;
        machine.vmm.quit()?;
    }
    Ok(())
}

#[test]
fn failed_updates_leave_guest_and_sandbox_as_they_were() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::start(sandboxed(STRICT))?;
    let pid = machine.vmm.pid();
    let before = filters(pid)?;
    // Asked beforehand, a program that is denied a call gives no verdict.
    let denied = ["/bin/sh", "-c", "exec dmesg --syslog"].map(String::from);
    machine.begin(&denied, "memfd:")?;
    let error = machine.has_failed()?;
    ensure!(error.contains("gave no verdict and was killed by signal 31"), "{error}");
    ensure!(machine.runner()? == pid);
    // A program that refuses, and would have denied more, does so before it denies anything.
    machine.vmm.set_preflight("off")?;
    let mut refuses = machine.vmm.exec_command("memfd:");
    refuses.extend(["-sandbox", STRICTEST, "-smp", "2"].map(String::from));
    machine.begin(&refuses, "memfd:")?;
    let error = machine.has_failed()?;
    ensure!(error.contains("the command line says 2"), "{error}");
    ensure!(machine.runner()? == pid && filters(pid)? == before, "the old program got another sandbox");
    // One that is ended by a denied call once it has received the guest.
    let mut waits = machine.vmm.exec_command("defer");
    waits.extend(["-sandbox", STRICTEST].map(String::from));
    machine.begin(&waits, "memfd:")?;
    wait_for("the target", PATIENCE, || machine.vmm.status().ok().filter(|status| status == "inmigrate"))?;
    send_signal(pid, SIGSYS)?;
    let error = machine.has_failed()?;
    ensure!(error.contains("ended by SIGSYS"), "{error}");
    ensure!(machine.runner()? == pid && filters(pid)? == before);
    machine.vmm.update()?;
    // And one that is ended before.
    machine.vmm.set_preflight("off")?;
    machine.begin(&denied, "memfd:")?;
    let error = machine.has_failed()?;
    ensure!(error.contains("was killed by signal 31"), "{error}");
    let keeper = machine.runner()?;
    ensure!(keeper != pid && filters(keeper)? == before);
    machine.vmm.update()?;
    ensure!(machine.runner()? == keeper && filters(keeper)? == before);
    machine.verify()
}

#[test]
fn a_guest_moves_to_a_process_with_a_sandbox_of_its_own() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::start(sandboxed(STRICTEST))?;
    let strictest = filters(machine.vmm.pid())?;
    machine.vmm.qmp().execute("migrate-set-parameters", json!({ "mode": "cpr-exec" }))?;
    let info = machine.vmm.qmp().execute("query-migrate", json!({}))?;
    ensure!(info["blocked-reasons"].to_string().contains("-sandbox spawn=deny"), "{info}");
    for sandbox in ["on", STRICTEST, "off"] {
        let mut target = sandboxed(sandbox).target("unix:main.sock").start()?;
        machine.vmm.transfer(&mut target)?;
        machine.vmm.quit()?;
        machine.vmm = target;
        let expected = match sandbox {
            "off" => inherited()?..inherited()? + 1,
            "on" => inherited()? + 1..strictest,
            _ => strictest..strictest + 1,
        };
        let found = filters(machine.vmm.pid())?;
        ensure!(expected.contains(&found), "{found} filters under {sandbox}, not in {expected:?}");
        machine.beats_on()?;
        machine.verify()?;
    }
    machine.vmm.quit()
}

#[test]
fn a_guest_rests_and_goes_on_under_the_strictest_sandbox() -> anyhow::Result<()> {
    need_kvm!();
    let folder = tempfile::tempdir()?;
    let uri = format!("file:{}", folder.path().join("vm.state").display());
    let mut machine = Machine::start(sandboxed(STRICTEST))?;
    let strictest = filters(machine.vmm.pid())?;
    machine.vmm.qmp().execute("migrate-set-parameters", json!({ "mode": "cpr-reboot" }))?;
    machine.vmm.qmp().execute("migrate", json!({ "uri": uri }))?;
    wait_for("the state file", PATIENCE, || {
        machine.vmm.status().ok().filter(|status| status == "postmigrate")
    })?;
    let Machine { vmm, .. } = machine;
    vmm.quit()?;
    let mut vmm: Vmm = sandboxed(STRICTEST).incoming(&uri).start()?;
    ensure!(filters(vmm.pid())? == strictest);
    let guest = vmm.guest()?;
    ensure!(vmm.status()? == "running");
    guest.beats_on(0)?;
    vmm.quit()
}
