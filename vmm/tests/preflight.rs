//! The next program is asked before anything is touched. What refuses, or gives no verdict, costs the guest nothing: it
//! beats on, and sockets, files and processes are as before.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use anyhow::{Context, ensure};
use cpr_core::frame::Frame;
use cpr_core::preflight::Manifest;
use serde_json::{Value, json};
use testkit::{Guest, PATIENCE, Vmm, VmmBuilder, need_kvm, process, skip_unless, wait_for};

const PATTERN_BYTES: u64 = 4 << 20;

struct Machine {
    vmm: Vmm,
    guest: Guest,
}

/// What a preflight may not touch: what is in the folder, and what the program holds.
#[derive(Debug, PartialEq, Eq)]
struct Surroundings {
    files: Vec<String>,
    descriptors: Vec<String>,
    processes: Vec<u32>,
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

impl Machine {
    fn start() -> anyhow::Result<Machine> {
        Machine::of(VmmBuilder::new())
    }

    fn of(builder: VmmBuilder) -> anyhow::Result<Machine> {
        let builder = builder.args(&["-pidfile", "pid", "-serial", "unix:serial,server=on,wait=off"]);
        let mut vmm = builder.start()?;
        let guest = vmm.guest()?;
        guest.fill(PATTERN_BYTES, 3)?;
        vmm.set_capability("events")?;
        Ok(Machine { vmm, guest })
    }

    fn set(&mut self, name: &str, value: Value) -> anyhow::Result<()> {
        self.vmm.qmp().execute("migrate-set-parameters", json!({ name: value })).map(drop)
    }

    fn surroundings(&self) -> anyhow::Result<Surroundings> {
        let mut files = Vec::new();
        for entry in fs::read_dir(self.vmm.path(""))? {
            let entry = entry?;
            let found = entry.metadata()?;
            let name = entry.file_name().display().to_string();
            // There it says that the update failed.
            if name == "stderr" {
                continue;
            }
            files.push(format!("{name} {} {} {}", found.ino(), found.len(), found.mtime()));
        }
        files.sort_unstable();
        let mut descriptors = process::Census::of(self.vmm.pid())?.descriptors;
        descriptors.retain(|what| !what.starts_with("/memfd:cpr-control"));
        Ok(Surroundings { files, descriptors, processes: self.vmm.processes() })
    }

    /// Nothing but the guest's counter has changed, and no child is left, not even a dead one.
    fn is_untouched(&mut self, before: &Surroundings) -> anyhow::Result<()> {
        let pid = self.vmm.pid();
        let children = process::children(pid)?;
        ensure!(children.is_empty(), "{children:?} are left");
        // Descendants of the program that was asked were killed with it, and may still be on their way.
        let vmm = &self.vmm;
        let _ =
            wait_for("the end of them all", PATIENCE, || (vmm.processes() == before.processes).then_some(()));
        let now = self.surroundings()?;
        ensure!(now == *before, "{before:#?} became {now:#?}");
        ensure!(self.vmm.status()? == "running");
        self.guest.beats_on(0).map(drop)
    }

    fn end(&mut self) -> anyhow::Result<Value> {
        wait_for("the end of the update", PATIENCE, || {
            let info = self.vmm.qmp().execute("query-migrate", json!({})).ok()?;
            matches!(info["status"].as_str(), Some("failed" | "cancelled" | "completed")).then_some(info)
        })
    }

    /// An update by this command is refused beforehand; gives the reason.
    fn refused(&mut self, command: &[String]) -> anyhow::Result<String> {
        self.vmm.set_exec(command)?;
        self.vmm.qmp().take_events();
        let before = self.surroundings()?;
        self.vmm.qmp().execute("migrate", json!({ "uri": "memfd:" }))?;
        let info = self.end()?;
        ensure!(info["status"] == "failed", "{info}");
        let events: Vec<_> = self.vmm.qmp().take_events().iter().map(brief).collect();
        ensure!(events == ["setup", "failed"], "the guest was stopped: {events:?}");
        self.is_untouched(&before)?;
        let error = info["error-desc"].as_str().unwrap_or_default();
        let reason = error.strip_prefix("cpr-exec preflight: ");
        Ok(reason.with_context(|| format!("{error:?} is no refusal"))?.to_owned())
    }

    /// A good update after all that.
    fn updates(mut self) -> anyhow::Result<()> {
        let info = self.vmm.update()?;
        ensure!(info["cpr"]["generation"] == 1, "{info}");
        ensure!(info["cpr"].get("preflight").is_none(), "{info}");
        self.guest.beats_on(0)?;
        self.guest.verify(PATTERN_BYTES, 3)?;
        self.vmm.quit()
    }

    fn script(&self, text: &str) -> anyhow::Result<String> {
        let path = self.vmm.path("script");
        fs::write(&path, format!("#!/bin/sh\n{text}\n"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path.display().to_string())
    }
}

fn brief(event: &Value) -> String {
    let status = event["data"]["status"].as_str();
    status.or(event["event"].as_str()).unwrap_or_default().to_owned()
}

#[test]
fn a_command_line_that_does_not_fit_is_refused() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::start()?;
    let command = machine.vmm.exec_command("memfd:");
    let with =
        |from: &str, to: &str| -> Vec<String> { command.iter().map(|word| word.replace(from, to)).collect() };
    let cpus = {
        let at = command.iter().position(|word| word == "-smp").context("no -smp")?;
        let mut command = command.clone();
        command[at + 1] = "3".into();
        command
    };
    let and = |more: &[&str]| [command.clone(), words(more)].concat();
    for (command, reason) in [
        (
            with("size=67108864", "size=128M"),
            "the guest has 67108864 bytes of RAM, the command line says 134217728",
        ),
        (with("memory-backend-memfd", "memory-backend-ram"), "memory backend 'ram0': share=on is required"),
        (
            with("size=67108864", "size=67108864,hugetlb=on"),
            "pages of 4096 bytes, memory backend 'ram0' of 2097152",
        ),
        (with("ram0", "ram1"), "the guest's RAM is memory backend 'ram0', the command line has 'ram1'"),
        (cpus, "the guest has 1 vCPUs, the command line says 3"),
        (with("memfd:", "file:vm.state"), "-incoming file:vm.state: the state goes to memfd:; name that"),
        (and(&["-pidfile", "other", "-qmp", "unix:other,server=on", "-no-such-option"]), "-no-such-option"),
        (and(&["-help"]), "its arguments ask for a text"),
    ] {
        let said = machine.refused(&command).context(reason)?;
        ensure!(said.starts_with("the new program refuses: ") && said.contains(reason), "{said}");
    }
    machine.updates()
}

#[test]
fn a_program_that_gives_no_verdict_is_refused() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::start()?;
    let later = [words(&["/usr/bin/env", "CPR_VMM_LATER=1"]), machine.vmm.exec_command("memfd:")].concat();
    let script = machine.script("echo what is a guest; exit 1")?;
    for (command, reason) in [
        (words(&["/bin/true"]), "gave no verdict and exited with code 0"),
        (vec![script, "-S".into()], "gave no verdict and exited with code 1: what is a guest"),
        (
            later,
            "exited with code 1: cpr-vmm: environment variable CPR_VMM_LATER is reserved for live updates and unknown",
        ),
    ] {
        let said = machine.refused(&command).context(reason)?;
        ensure!(said.contains(reason), "{said}");
    }
    // A time limit for those who never say anything.
    machine.set("cpr-exec-timeout", json!(300))?;
    let said = machine.refused(&words(&["/bin/sh", "-c", "echo sleepy; sleep 1000"]))?;
    ensure!(said == "the new program gave no verdict within 300ms: sleepy", "{said}");
    machine.set("cpr-exec-timeout", json!(5000))?;
    machine.updates()
}

#[test]
fn hmp_and_qmp_set_the_parameter() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::start()?;
    let mut hmp =
        |line: &str| machine.vmm.qmp().execute("human-monitor-command", json!({ "command-line": line }));
    let shown = hmp("info migrate_parameters")?;
    ensure!(shown.as_str().is_some_and(|text| text.contains("cpr-preflight: require\r\n")), "{shown}");
    ensure!(hmp("migrate_set_parameter cpr-preflight warn")? == "");
    let said = hmp("migrate_set_parameter cpr-preflight perhaps")?;
    let expected =
        "Error: Parameter 'cpr-preflight' does not accept value 'perhaps' (known: require, warn, off)\r\n";
    ensure!(said == expected, "{said}");
    let refusal = machine.vmm.qmp().refused("migrate-set-parameters", json!({ "cpr-preflight": 3 }))?;
    ensure!(refusal.desc.contains("cpr-preflight"), "{refusal}");
    let parameters = machine.vmm.qmp().execute("query-migrate-parameters", json!({}))?;
    ensure!(parameters["cpr-preflight"] == "warn", "{parameters}");
    machine.updates()
}

/// A command whose program gives no verdict and can take over all the same.
fn shy(machine: &Machine) -> Vec<String> {
    let shell = words(&["/bin/sh", "-c", "[ $CPR_VMM_PREFLIGHT ] && exit 9; exec \"$@\"", "sh"]);
    [shell, machine.vmm.exec_command("memfd:")].concat()
}

#[test]
fn a_refusal_that_is_only_a_warning_is_told_by_both_programs() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::start()?;
    machine.set("cpr-preflight", json!("warn"))?;
    // It fails as it was to be expected, and the guest is not lost.
    machine.vmm.set_exec(&words(&["/bin/false"]))?;
    machine.vmm.qmp().execute("migrate", json!({ "uri": "memfd:" }))?;
    let info = machine.end()?;
    ensure!(info["status"] == "failed", "{info}");
    let error = info["error-desc"].as_str().unwrap_or_default();
    ensure!(error.contains("the new program ended before it took over"), "{info}");
    let refused = "refused: the new program gave no verdict and exited with code";
    ensure!(info["cpr"]["preflight"] == format!("{refused} 1"), "{info}");
    machine.guest.beats_on(0)?;
    // Or it was wrong.
    let command = shy(&machine);
    machine.vmm.set_exec(&command)?;
    let info = machine.vmm.migrate("memfd:")?;
    ensure!(info["cpr"]["preflight"] == format!("{refused} 9"), "{info}");
    let shown =
        machine.vmm.qmp().execute("human-monitor-command", json!({ "command-line": "info migrate" }))?;
    ensure!(
        shown.as_str().is_some_and(|text| text.contains(&format!("Preflight: \t\t{refused} 9"))),
        "{shown}"
    );
    let parameters = machine.vmm.qmp().execute("query-migrate-parameters", json!({}))?;
    ensure!(parameters["cpr-preflight"] == "warn", "it stays set: {parameters}");
    machine.guest.beats_on(0)?;
    machine.guest.verify(PATTERN_BYTES, 3)
}

#[test]
fn nobody_is_asked_if_the_user_does_not_want_it() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::start()?;
    let command = shy(&machine);
    let said = machine.refused(&command)?;
    ensure!(said.contains("exited with code 9"), "{said}");
    machine.vmm.set_preflight("off")?;
    machine.vmm.set_exec(&command)?;
    let info = machine.vmm.migrate("memfd:")?;
    ensure!(info["cpr"]["generation"] == 1 && info["cpr"].get("preflight").is_none(), "{info}");
    machine.guest.beats_on(0)?;
    machine.vmm.quit()
}

#[test]
fn a_preflight_can_be_cancelled_and_keeps_nobody_waiting() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::start()?;
    machine.vmm.set_exec(&words(&["/bin/sleep", "1000"]))?;
    let before = machine.surroundings()?;
    machine.vmm.qmp().execute("migrate", json!({ "uri": "memfd:" }))?;
    let pid = machine.vmm.pid();
    let asked = wait_for("the program that is asked", PATIENCE, || {
        let children = process::children(pid).ok()?;
        children.first().copied()
    })?;
    // Monitors answer meanwhile, and the guest runs.
    let info = machine.vmm.qmp().execute("query-migrate", json!({}))?;
    ensure!(info["status"] == "setup", "{info}");
    ensure!(machine.vmm.status()? == "running");
    machine.guest.beats_on(0)?;
    let refusal = machine.vmm.qmp().refused("migrate", json!({ "uri": "memfd:" }))?;
    ensure!(refusal.desc == "There's a migration process in progress", "{refusal}");
    // It has nothing of the guest's: beside what the test itself was started with, there are the question, the answer, and
    // twice what it says. (While it starts it reads its own libraries.)
    wait_for("a program without anything of the guest's", PATIENCE, || {
        let mut held = process::Census::of(asked).ok()?.descriptors;
        held.retain(|what| what != "/dev/null" && !what.starts_with("pipe:"));
        (held.len() == 4 && held.iter().all(|what| what.starts_with("/memfd:cpr-"))).then_some(())
    })?;
    machine.vmm.qmp().execute("migrate_cancel", json!({}))?;
    let info = machine.vmm.qmp().execute("query-migrate", json!({}))?;
    ensure!(info["status"] == "cancelled", "{info}");
    ensure!(process::status_field(asked, "State").is_err(), "it goes on");
    machine.is_untouched(&before)?;
    machine.updates()
}

#[test]
fn a_program_that_changes_once_it_was_asked_is_not_executed() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::start()?;
    let script = machine.script("[ $CPR_VMM_PREFLIGHT ] && touch \"$0\"\nexec \"$@\"")?;
    let command = [vec![script.clone()], machine.vmm.exec_command("memfd:")].concat();
    machine.vmm.set_exec(&command)?;
    machine.vmm.qmp().execute("migrate", json!({ "uri": "memfd:" }))?;
    let info = machine.end()?;
    let error = info["error-desc"].as_str().unwrap_or_default();
    let expected = format!("cpr-exec could not hand over: '{script}' was changed since it was asked");
    ensure!(info["status"] == "failed" && error.starts_with(&expected), "{info}");
    ensure!(machine.vmm.processes() == [machine.vmm.pid()] && machine.vmm.status()? == "running");
    machine.guest.beats_on(0)?;
    machine.updates()
}

#[test]
fn a_manifest_shows_what_is_written() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::of(VmmBuilder::new().cpus(2))?;
    let state = format!("file:{}", machine.vmm.path("vm.state").display());
    let copy = "[ $CPR_VMM_PREFLIGHT ] && cat /proc/self/fd/${CPR_VMM_PREFLIGHT%,*} > manifest; exec \"$@\"";
    let command = [words(&["/bin/sh", "-c", copy, "sh"]), machine.vmm.exec_command(&state)].concat();
    machine.vmm.set_exec(&command)?;
    machine.vmm.migrate(&state)?;
    let mut frame = Frame::parse(&fs::read(machine.vmm.path("manifest"))?)?;
    let manifest = Manifest::take_from(&mut frame)?;
    let early = ["cpr-core/registry", "cpr-core/update", "cpr-exec/process", "cpr-vmm/monitors"];
    let (early_shown, main_shown): (Vec<_>, Vec<_>) =
        manifest.sections.iter().partition(|section| early.contains(&section.name.as_str()));
    ensure!(early_shown.len() == early.len(), "{early_shown:?}");
    let shown: BTreeSet<_> =
        main_shown.iter().map(|section| (section.name.clone(), section.instance, section.version)).collect();
    let mut state = Frame::parse(&fs::read(machine.vmm.path("vm.state"))?)?;
    let mut written = BTreeSet::new();
    for key in state.remaining() {
        let (name, instance) = key.rsplit_once('/').context("NAME/INSTANCE")?;
        let section = state.require(name, instance.parse()?)?;
        written.insert((section.name, section.instance, section.version));
    }
    ensure!(shown == written, "shown {shown:#?}, written {written:#?}");
    let ram = manifest.descriptors.iter().find(|entry| entry.name == "ram0");
    ensure!(
        ram.is_some_and(|entry| entry.policy == cpr_core::FdPolicy::MustSurvive),
        "{:?}",
        manifest.descriptors
    );
    machine.guest.verify(PATTERN_BYTES, 3)
}

/// A control group of the test's own, removed with it.
struct Group {
    folder: PathBuf,
    limit: &'static str,
    usage: &'static str,
}

impl Group {
    fn new() -> Option<Group> {
        let name = format!("cpr-vmm-test-{}", std::process::id());
        [
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
            ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ]
        .into_iter()
        .find_map(|(top, limit, usage)| {
            let group = Group { folder: PathBuf::from(top).join(&name), limit, usage };
            fs::create_dir(&group.folder).ok()?;
            fs::OpenOptions::new().write(true).open(group.folder.join(limit)).ok()?;
            Some(group)
        })
    }

    fn set_limit(&self, bytes: &str) -> anyhow::Result<()> {
        Ok(fs::write(self.folder.join(self.limit), bytes)?)
    }

    fn used(&self) -> anyhow::Result<u64> {
        Ok(fs::read_to_string(self.folder.join(self.usage))?.trim().parse()?)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Its processes have ended a moment ago.
        let _ = wait_for("an empty group", PATIENCE, || fs::remove_dir(&self.folder).ok());
    }
}

#[test]
fn a_group_without_room_for_page_tables_is_named() -> anyhow::Result<()> {
    need_kvm!();
    let group = Group::new();
    skip_unless!(group.is_some(), "no control group for memory can be made here");
    let group = group.context("just asked")?;
    let join = format!("echo $$ > {}/cgroup.procs; exec \"$@\"", group.folder.display());
    // Hardly any of it is ever touched.
    let mut machine =
        Machine::of(VmmBuilder::new().memory(16 << 30).wrapper(&["/bin/sh", "-c", &join, "sh"]))?;
    let limit = group.used()? + (40 << 20);
    group.set_limit(&limit.to_string())?;
    let command = machine.vmm.exec_command("memfd:");
    let said = machine.refused(&command)?;
    // 8 bytes for each of its pages, and 16 MiB.
    let need = (32 << 20) + (16 << 20);
    let name = group.folder.display();
    ensure!(said.contains(&format!("control group '{name}' is limited to")), "{said}");
    ensure!(said.contains(&format!("page tables for the guest's RAM can take {need};")), "{said}");
    group.set_limit("1099511627776")?;
    machine.updates()
}
