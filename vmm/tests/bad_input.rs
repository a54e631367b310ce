//! What a user, a disk or another version can get wrong: each a clear error that names the thing. Whatever fails before
//! the exec leaves the guest running as before, and the next good update works.

use std::fs;
use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::ensure;
use cpr_core::frame::{Frame, FrameWriter, HEADER_LEN};
use oslib::{cloexec, memfd::Memfd};
use serde_json::{Value, json};
use testkit::{Machine, PATIENCE, VmmBuilder, need_kvm, process, wait_for};

/// A machine that must come to no harm.
struct Tried {
    machine: Machine,
    /// What the program was started with.
    inherited: Vec<String>,
    /// Good updates that it has been through when something goes wrong.
    updates_before: u64,
}

impl Deref for Tried {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl DerefMut for Tried {
    fn deref_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }
}

fn words(command: &[&str]) -> Vec<String> {
    command.iter().map(ToString::to_string).collect()
}

impl Tried {
    fn start() -> anyhow::Result<Tried> {
        Tried::of(VmmBuilder::new())
    }

    fn of(builder: VmmBuilder) -> anyhow::Result<Tried> {
        let machine = Machine::start(builder)?;
        let inherited = inheritable(machine.vmm.pid())?;
        assert!(inherited.iter().all(|fd| !fd.contains("kvm") && !fd.contains("ram0")), "{inherited:?}");
        Ok(Tried { machine, inherited, updates_before: 0 })
    }

    fn path(&self, name: &str) -> String {
        self.vmm.path(name).display().to_string()
    }

    /// A file in the VM's folder.
    fn file(&self, name: &str, content: &str, mode: u32) -> anyhow::Result<String> {
        let path = self.vmm.path(name);
        fs::write(&path, content)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        Ok(self.path(name))
    }

    /// `migrate` must answer with an error.
    fn refused(&mut self, uri: &str) -> anyhow::Result<String> {
        let status = self.vmm.qmp().execute("query-migrate", json!({}))?;
        let refusal = self.vmm.qmp().refused("migrate", json!({ "uri": uri }))?;
        assert_eq!(refusal.class, "GenericError");
        assert_eq!(self.vmm.qmp().execute("query-migrate", json!({}))?, status, "nothing has begun");
        assert_eq!(self.vmm.qmp().take_events(), Vec::<Value>::new());
        self.is_as_before()?;
        Ok(refusal.desc)
    }

    /// `migrate` begins, and must fail; gives the events and the error in `query-migrate`.
    fn fails(&mut self, uri: &str) -> anyhow::Result<(Vec<String>, String)> {
        self.vmm.qmp().take_events();
        self.vmm.qmp().execute("migrate", json!({ "uri": uri }))?;
        let (error, events) = self.failure()?;
        let brief = |event: &Value| {
            let status = event["data"]["status"].as_str();
            status.or(event["event"].as_str()).unwrap_or_default().to_owned()
        };
        self.is_as_before()?;
        Ok((events.iter().map(brief).collect(), error))
    }

    /// The guest runs, and no child would inherit what it should not.
    fn runs_well(&mut self) -> anyhow::Result<()> {
        assert_eq!(self.vmm.status()?, "running");
        self.guest.beats_on(0)?;
        let pid = self.vmm.pid();
        assert_eq!(inheritable(pid)?, self.inherited, "descriptors that a child would inherit");
        Ok(())
    }

    /// The same, and no keeper or other child is there.
    fn is_as_before(&mut self) -> anyhow::Result<()> {
        self.runs_well()?;
        let pid = self.vmm.pid();
        wait_for("the end of a keeper", PATIENCE, || {
            process::children(pid).ok().filter(Vec::is_empty).map(drop)
        })
    }

    /// A good update after all that went wrong.
    fn updates(mut self) -> anyhow::Result<()> {
        let info = self.vmm.update()?;
        assert_eq!(info["cpr"]["generation"], self.updates_before + 1, "what failed is not counted");
        self.guest.beats_on(0)?;
        self.verify()?;
        self.runs_well()?;
        self.machine.vmm.quit()
    }
}

/// Descriptors, but for the standard ones, that lack close-on-exec.
fn inheritable(pid: u32) -> anyhow::Result<Vec<String>> {
    /// O_CLOEXEC of open(2) on x86-64.
    const O_CLOEXEC: u32 = 0o2_000_000;
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let number: u32 = entry.file_name().to_string_lossy().parse()?;
        let Ok(info) = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")) else { continue };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or_default();
        if number > 2 && u32::from_str_radix(flags.trim(), 8)? & O_CLOEXEC == 0 {
            found.push(format!("{number} -> {}", fs::read_link(entry.path())?.display()));
        }
    }
    found.sort_unstable();
    Ok(found)
}

#[test]
fn a_program_that_cannot_be_executed_is_refused_before_anything_is_touched() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Tried::start()?;
    let plain = machine.file("plain", "", 0o644)?;
    let folder = machine.path("folder");
    fs::create_dir(&folder)?;
    let dangling = machine.path("dangling");
    symlink("nowhere", &dangling)?;
    let program = "cpr-exec-command: program";
    for (command, expected) in [
        (vec![], "cpr-exec mode requires setting cpr-exec-command".to_owned()),
        (vec![""], "cpr-exec-command begins with an empty word".to_owned()),
        (vec!["/no/such/program", "-S"], format!("{program} \"/no/such/program\" was not found")),
        (
            vec!["no-such-program-anywhere"],
            format!("{program} \"no-such-program-anywhere\" was not found in /"),
        ),
        (vec![&dangling], format!("{program} {dangling:?} was not found")),
        (vec![&folder], format!("{program} {folder:?} is a directory")),
        (vec![&plain], format!("{program} {plain:?} is not executable")),
        (vec!["/dev/null"], format!("{program} \"/dev/null\" is not a file")),
    ] {
        machine.vmm.set_exec(&words(&command))?;
        let refusal = machine.refused("memfd:")?;
        assert!(refusal.starts_with(&expected), "{command:?}: {refusal}");
    }
    machine.updates()
}

#[test]
fn a_mode_that_is_not_there_is_refused() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Tried::start()?;
    // None was set.
    let command = machine.vmm.exec_command("memfd:");
    machine.vmm.qmp().execute("migrate-set-parameters", json!({ "cpr-exec-command": command }))?;
    let refusal = machine.refused("memfd:")?;
    assert!(refusal.contains("'normal'") && refusal.contains("mode cpr-exec"), "{refusal}");
    // One that nobody knows; what was set stays.
    let parameters = json!({ "mode": "cpr-magic", "cpr-exec-command": ["x"] });
    let refusal = machine.vmm.qmp().refused("migrate-set-parameters", parameters)?;
    assert!(refusal.desc.contains("'cpr-magic'") && refusal.desc.contains("cpr-exec"), "{refusal}");
    let parameters = machine.vmm.qmp().execute("query-migrate-parameters", json!({}))?;
    assert_eq!((&parameters["mode"], &parameters["cpr-exec-command"]), (&json!("normal"), &json!(command)));
    let refusal = machine.vmm.qmp().refused("migrate-set-parameters", json!({ "downtime-limit": 1 }))?;
    assert!(refusal.desc.contains("'downtime-limit'"), "{refusal}");
    machine.updates()
}

#[test]
fn a_channel_that_is_none_is_refused() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Tried::start()?;
    let command = machine.vmm.exec_command("memfd:");
    machine.vmm.set_exec(&command)?;
    let folder = machine.path("");
    for (uri, needles) in [
        ("tcp:localhost:4444", vec!["'tcp'", "memfd:"]),
        ("exec:cat", vec!["'exec'"]),
        ("file:", vec!["path"]),
        ("vm.state", vec!["'vm.state'"]),
        ("memfd:3", vec!["memfd:3"]),
        ("file:/no/such/folder/vm.state", vec!["'/no/such/folder/vm.state'", "No such file"]),
        (&format!("file:{folder}"), vec![folder.as_str(), "directory"]),
        ("file:/dev/null/vm.state", vec!["'/dev/null/vm.state'", "Not a directory"]),
    ] {
        let refusal = machine.refused(uri)?;
        for needle in needles {
            assert!(refusal.contains(needle), "{uri}: {needle:?} is not in {refusal}");
        }
    }
    let refusal = machine.vmm.qmp().refused("migrate", json!({}))?;
    assert!(refusal.desc.contains("'uri'"), "{refusal}");
    machine.updates()
}

#[test]
fn private_memory_blocks_and_says_so() -> anyhow::Result<()> {
    need_kvm!();
    for memory in [
        &["-m", "64M"][..],
        &["-object", "memory-backend-ram,id=ram0,size=64M", "-machine", "memory-backend=ram0"],
        &["-object", "memory-backend-memfd,id=ram0,size=64M,share=off", "-machine", "memory-backend=ram0"],
    ] {
        let mut vmm = VmmBuilder::new().memory_args(memory).start()?;
        let info = vmm.qmp().execute("query-migrate", json!({}))?;
        assert_eq!(info.get("blocked-reasons"), None, "no mode, so nothing is blocked: {info}");
        let command = vmm.exec_command("memfd:");
        vmm.set_exec(&command)?;
        let info = vmm.qmp().execute("query-migrate", json!({}))?;
        let reasons = info["blocked-reasons"].as_array().cloned().unwrap_or_default();
        let [reason] = &reasons[..] else { panic!("{info}") };
        let reason = reason.as_str().unwrap_or_default();
        let id = vmm.qmp().execute("query-memdev", json!({}))?[0]["id"].clone();
        assert!(reason.contains(id.as_str().unwrap_or("?")), "{reason} does not name {id}");
        let refusal = vmm.qmp().refused("migrate", json!({ "uri": "memfd:" }))?;
        assert_eq!(refusal.desc, format!("cpr-exec is blocked: {reason}"));
        let shown = vmm.qmp().execute("human-monitor-command", json!({ "command-line": "info migrate" }))?;
        assert!(shown.as_str().is_some_and(|text| text.contains(reason)), "{shown}");
        assert_eq!(vmm.status()?, "running");
        vmm.quit()?;
    }
    Ok(())
}

/// What the user sees of an update that got as far as the exec.
const FAILED_AT_EXEC: [&str; 7] = ["setup", "active", "STOP", "device", "completed", "RESUME", "failed"];

#[test]
fn an_exec_that_fails_gives_the_guest_back() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Tried::start()?;
    let descriptors = |machine: &Tried| -> anyhow::Result<Vec<String>> {
        let mut found = process::Census::of(machine.vmm.pid())?.descriptors;
        // The page that the report of the last attempt is read from.
        found.retain(|what| !what.starts_with("/memfd:cpr-control"));
        Ok(found)
    };
    let before = descriptors(&machine)?;
    let garbage = machine.file("garbage", "\x7fnothing that a kernel executes", 0o755)?;
    let script = machine.file("script", "#!/no/such/interpreter\n", 0o755)?;
    let state = format!("file:{}", machine.path("vm.state"));
    machine.vmm.set_preflight("off")?;
    for (program, because) in [(&garbage, "Exec format error"), (&script, "No such file")] {
        for uri in ["memfd:", &state] {
            machine.vmm.set_exec(&words(&[program, "-S"]))?;
            let (events, error) = machine.fails(uri)?;
            assert_eq!(events, FAILED_AT_EXEC);
            assert!(error.contains(&format!("cannot execute '{program}': {because}")), "{error}");
            assert!(!machine.vmm.path("vm.state").exists(), "the useless state file stays");
        }
    }
    assert_eq!(descriptors(&machine)?, before);
    machine.verify()?;

    // A guest that stood still stands still afterwards.
    machine.vmm.qmp().execute("stop", json!({}))?;
    let (beats, ram) = (machine.guest.vcpu(0).beats(), machine.guest.snapshot()?);
    machine.vmm.qmp().execute("migrate", json!({ "uri": "memfd:" }))?;
    wait_for("the failure", PATIENCE, || {
        let info = machine.vmm.qmp().execute("query-migrate", json!({})).ok()?;
        (info["status"] == "failed").then_some(())
    })?;
    assert_eq!(machine.vmm.status()?, "paused");
    assert_eq!(machine.guest.vcpu(0).beats(), beats);
    assert!(machine.guest.snapshot()? == ram, "a refused update wrote to guest RAM");
    machine.vmm.qmp().execute("cont", json!({}))?;
    machine.updates()
}

#[test]
fn a_full_disk_gives_the_guest_back() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Tried::start()?;
    let command = machine.vmm.exec_command("file:/dev/full");
    machine.vmm.set_exec(&command)?;
    let (events, error) = machine.fails("file:/dev/full")?;
    assert_eq!(events, ["setup", "active", "STOP", "device", "RESUME", "failed"]);
    assert!(error.contains("cannot write state to file '/dev/full': No space left on device"), "{error}");
    assert!(Path::new("/dev/full").exists());
    machine.updates()
}

#[test]
fn a_second_migrate_is_refused_while_the_first_is_under_way() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Tried::start()?;
    let command = machine.vmm.exec_command("memfd:");
    machine.vmm.set_exec(&command)?;
    let migrate = |id: u64| {
        let request = json!({ "execute": "migrate", "arguments": { "uri": "memfd:" }, "id": id });
        request.to_string()
    };
    machine.vmm.qmp().send_raw([migrate(1), migrate(2)].concat().as_bytes())?;
    machine.vmm.qmp().reply(1)?;
    let refusal = machine.vmm.qmp().reply(2).map_err(|error| error.to_string());
    assert_eq!(
        refusal.as_ref().map_err(String::as_str),
        Err("GenericError: There's a migration process in progress")
    );
    machine.vmm.qmp().event_where("MIGRATION", |data| data["status"] == "completed")?;
    // Nothing is under way any more, and there is nothing to give up.
    machine.vmm.qmp().execute("migrate_cancel", json!({}))?;
    let info = machine.vmm.qmp().execute("query-migrate", json!({}))?;
    assert_eq!(info["cpr"]["generation"], 1);
    machine.runs_well()?;
    machine.machine.vmm.quit()
}

/// Brings a machine to the point where its new program waits for the state in `vm.state`.
fn at_the_door(builder: VmmBuilder) -> anyhow::Result<Tried> {
    let mut machine = Tried::of(builder)?;
    // Leaves a whole state behind: that of the update to come is written at the last moment.
    machine.vmm.update_by_file()?;
    machine.updates_before = 1;
    let command = machine.vmm.exec_command("defer");
    machine.vmm.set_exec(&command)?;
    machine.vmm.qmp().execute("migrate", json!({ "uri": "file:vm.state" }))?;
    wait_for("the target", PATIENCE, || machine.vmm.status().ok().filter(|status| status == "inmigrate"))?;
    Ok(machine)
}

/// The state of the update before, as if it were of this one.
fn copy(machine: &Tried) -> anyhow::Result<PathBuf> {
    let copy = machine.vmm.path("vm.copy");
    fs::copy(machine.vmm.path("state1"), &copy)?;
    let epoch = Frame::parse(&fs::read(machine.vmm.path("vm.state"))?)?.epoch;
    rewrite_as(epoch, &copy, |_, _, _, _| {})?;
    Ok(copy)
}

/// Loading `uri` must fail, with the error for the client; then the old program has the guest again, in the same process,
/// tells the error as the update's, and can be updated.
fn is_turned_away(mut machine: Tried, uri: &str, needles: &[&str]) -> anyhow::Result<()> {
    let refusal = machine.vmm.qmp().refused("migrate-incoming", json!({ "uri": uri }))?;
    for needle in needles {
        ensure!(refusal.desc.contains(needle), "{needle:?} is not in {refusal}");
    }
    let error = machine.has_failed()?;
    ensure!(error.contains(&format!("cpr-vmm: {}", refusal.desc)), "{refusal} is not in {error}");
    let said = machine.vmm.stderr();
    ensure!(said.contains(&format!("cpr-vmm: {}\n", refusal.desc)), "{refusal} is not in {said}");
    machine.is_as_before()?;
    machine.updates()
}

#[test]
fn a_damaged_state_file_is_named() -> anyhow::Result<()> {
    need_kvm!();
    let from_the_end = |len: u64, path: &Path| -> anyhow::Result<()> {
        let file = fs::OpenOptions::new().write(true).open(path)?;
        Ok(file.set_len(file.metadata()?.len() - len)?)
    };
    let flip = |at: u64, path: &Path| -> anyhow::Result<()> {
        let file = fs::OpenOptions::new().read(true).write(true).open(path)?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at)?;
        Ok(file.write_all_at(&[byte[0] ^ 0x10], at)?)
    };
    type Damage<'a> = &'a dyn Fn(&Path) -> anyhow::Result<()>;
    let cases: [(Damage<'_>, &str); 9] = [
        (&|path| from_the_end(1, path), "truncated"),
        (&|path| Ok(fs::write(path, "")?), "truncated"),
        (&|path| Ok(fs::write(path, vec![b'x'; 4096])?), "not a CPR state frame"),
        (&|path| flip(0, path), "not a CPR state frame"),
        (&|path| flip(HEADER_LEN as u64 + 300, path), "damaged"),
        (&|path| flip(37, path), "damaged"),
        // The frame's version: 1 becomes 17.
        (&|path| flip(8, path), "version 17 is newer"),
        (&|path| Ok(fs::remove_file(path)?), "No such file"),
        (&|path| Ok(fs::remove_file(path).and_then(|()| fs::create_dir(path))?), "directory"),
    ];
    for (damage, expected) in cases {
        let machine = at_the_door(VmmBuilder::new())?;
        damage(&copy(&machine)?)?;
        is_turned_away(machine, "file:vm.copy", &["vm.copy", expected])?;
    }
    Ok(())
}

/// Writes the frame in `path` anew, section by section.
fn rewrite(path: &Path, change: impl Fn(&str, u32, &mut u32, &mut Vec<u8>)) -> anyhow::Result<()> {
    rewrite_as(Frame::parse(&fs::read(path)?)?.epoch, path, change)
}

/// The same, as a frame of update `epoch`.
fn rewrite_as(
    epoch: u64,
    path: &Path,
    change: impl Fn(&str, u32, &mut u32, &mut Vec<u8>),
) -> anyhow::Result<()> {
    let mut frame = Frame::parse(&fs::read(path)?)?;
    let mut writer = FrameWriter::default();
    let keys = frame.remaining();
    for key in &keys {
        let (name, instance) = key.rsplit_once('/').expect("NAME/INSTANCE");
        let instance = instance.parse()?;
        let mut section = frame.require(name, instance)?;
        change(name, instance, &mut section.version, &mut section.body);
        writer.put(name, instance, section.version, section.body)?;
    }
    let known = |key: &String| key.starts_with("vmm/flux-capacitor");
    if path.with_extension("extra").exists() && !keys.iter().any(known) {
        writer.put("vmm/flux-capacitor", 0, 1, vec![1])?;
    }
    Ok(fs::write(path, writer.finish(epoch))?)
}

#[test]
fn a_state_that_is_not_this_machines_is_named() -> anyhow::Result<()> {
    need_kvm!();
    // A section from the future, one that is cut short, one that nobody knows.
    let machine = at_the_door(VmmBuilder::new())?;
    rewrite(&copy(&machine)?, |name, _, version, _| {
        if name == "serial" {
            *version = 99;
        }
    })?;
    is_turned_away(machine, "file:vm.copy", &["'serial' has version 99"])?;

    let machine = at_the_door(VmmBuilder::new())?;
    rewrite(&copy(&machine)?, |name, _, _, body| {
        if name == "kvm/vcpu" {
            body.truncate(body.len() / 2);
        }
    })?;
    is_turned_away(machine, "file:vm.copy", &["'kvm/vcpu' instance 0 is malformed"])?;

    let machine = at_the_door(VmmBuilder::new())?;
    fs::write(machine.vmm.path("vm.extra"), "")?;
    rewrite(&copy(&machine)?, |_, _, _, _| {})?;
    is_turned_away(machine, "file:vm.copy", &["claims state section vmm/flux-capacitor/0"])?;

    // Another machine's state, and the same machine's of another update.
    let other = at_the_door(VmmBuilder::new().cpus(2))?;
    let machine = at_the_door(VmmBuilder::new())?;
    let uri = format!("file:{}", other.path("vm.state"));
    is_turned_away(machine, &uri, &["belongs to another update"])?;

    // A channel that the source did not use.
    let machine = at_the_door(VmmBuilder::new())?;
    is_turned_away(machine, "memfd:", &["no state in a memfd"])
}

#[test]
fn a_command_line_of_another_machine_is_named() -> anyhow::Result<()> {
    need_kvm!();
    let memory = |id: &str, size: &str| format!("memory-backend-memfd,id={id},size={size}");
    let gone = |command: Vec<String>, words: &[&str]| -> Vec<String> {
        command.into_iter().filter(|word| !words.contains(&word.as_str())).collect()
    };
    let (ram0, machine_ram0) = (memory("ram0", "67108864"), "memory-backend=ram0".to_owned());
    type Edit<'a> = &'a dyn Fn(Vec<String>) -> Vec<String>;
    let replace = |command: Vec<String>, from: &str, to: &str| -> Vec<String> {
        command.into_iter().map(|word| if word == from { to.to_owned() } else { word }).collect()
    };
    // What preflight says, and what the new program itself says if it was not asked.
    let cases: [(Edit<'_>, &[&str], &[&str]); 6] = [
        (
            &|command| gone(command, &["-object", &ram0, "-machine", &machine_ram0]),
            &["is memory backend 'ram0', the command line has 'microvm.ram'"],
            &["did not arrive with the update", "memory backend"],
        ),
        (
            &|command| {
                let command = replace(command, &ram0, &memory("ram1", "64M"));
                replace(command, &machine_ram0, "memory-backend=ram1")
            },
            &["is memory backend 'ram0', the command line has 'ram1'"],
            &["guest RAM 'ram1' did not arrive"],
        ),
        (
            &|command| replace(command, &ram0, &memory("ram0", "32M")),
            &["has 67108864 bytes of RAM, the command line says 33554432"],
            &["ram0", "33554432", "67108864"],
        ),
        (
            &|command| replace(command, &ram0, &memory("ram0", "128M")),
            &["has 67108864 bytes of RAM, the command line says 134217728"],
            &["ram0", "134217728", "67108864"],
        ),
        (
            &|command| replace(command, "1", "2"),
            &["the guest has 1 vCPUs, the command line says 2"],
            &["the guest has 1 vCPUs, the command line says 2"],
        ),
        (
            &|command| replace(command, "memfd:", "file:elsewhere"),
            &["-incoming file:elsewhere: the state goes to memfd:; name that"],
            &["'elsewhere'", "No such file"],
        ),
    ];
    for (edit, early, late) in cases {
        let mut machine = Tried::start()?;
        let command = edit(machine.vmm.exec_command("memfd:"));
        machine.vmm.set_exec(&command)?;
        for (policy, needles) in [("require", early), ("off", late)] {
            machine.vmm.set_preflight(policy)?;
            let (events, error) = machine.fails("memfd:")?;
            let expected =
                if policy == "off" { "could not" } else { "cpr-exec preflight: the new program refuses: " };
            assert!(error.contains(expected), "{policy}: {error}");
            assert!(policy == "off" || events == ["setup", "failed"], "{events:?}");
            assert_eq!(events.last().map(String::as_str), Some("failed"), "{events:?}");
            for needle in needles {
                assert!(error.contains(needle), "{needle:?} is not in {error}");
            }
        }
        machine.updates()?;
    }
    Ok(())
}

/// Starts a program that must not get far; gives its last words.
fn ends_at_once(builder: VmmBuilder, args: &[&str]) -> anyhow::Result<String> {
    let mut vmm = builder.args(&["-pidfile", "pid"]).args(args).spawn()?;
    assert_eq!(vmm.wait_exit()?, Some(1), "{}", vmm.stderr());
    for name in ["pid", "qmp"] {
        assert!(!vmm.path(name).exists(), "{name} was made");
    }
    Ok(vmm.stderr())
}

#[test]
fn an_environment_that_is_not_understood_ends_the_program() -> anyhow::Result<()> {
    for (name, value, needles) in [
        ("CPR_VMM_LATER", "1", &["CPR_VMM_LATER", "reserved", "unknown to this version"][..]),
        ("CPR_VMM_PREFLIGHT", "1", &["CPR_VMM_PREFLIGHT is '1'", "no descriptor number"]),
        ("CPR_VMM_PREFLIGHT", "987,988", &["CPR_VMM_PREFLIGHT names descriptor 987", "was not passed on"]),
        ("CPR_VMM_", "", &["CPR_VMM_ is reserved"]),
        ("CPR_VMM_STATE", "three", &["CPR_VMM_STATE", "'three'", "no descriptor number"]),
        ("CPR_VMM_STATE", "-1", &["'-1'", "no descriptor number"]),
        ("CPR_VMM_STATE", "", &["CPR_VMM_STATE is ''"]),
        (
            "CPR_VMM_STATE",
            "0",
            &[
                "descriptor 0, which was not passed on: descriptor 0 is a standard stream, which has no owner\n",
            ],
        ),
        ("CPR_VMM_STATE", "987", &["descriptor 987", "was not passed on"]),
    ] {
        let said = ends_at_once(VmmBuilder::new().env(name, value), &[])?;
        for needle in needles {
            assert!(said.contains(needle), "{name}={value}: {needle:?} is not in {said}");
        }
    }
    // Names that only look alike are the user's own.
    let mut vmm = VmmBuilder::new().only_args(&["-version"]).env("CPR_VMMX", "1").spawn()?;
    assert_eq!(vmm.wait_exit()?, Some(0), "{}", vmm.stderr());
    Ok(())
}

#[test]
fn a_descriptor_that_holds_no_state_ends_the_program() -> anyhow::Result<()> {
    let file = tempfile::tempfile()?;
    cloexec::clear(&file)?;
    let number = file.as_raw_fd().to_string();
    let said = ends_at_once(VmmBuilder::new().env("CPR_VMM_STATE", &number), &[])?;
    assert!(said.contains(&format!("CPR_VMM_STATE names descriptor {number}, which is no memfd")), "{said}");

    for (content, expected) in [
        (&b""[..], "truncated"),
        (b"CPRSTATE", "truncated"),
        (b"something else that is long enough for a header", "not a CPR state frame"),
    ] {
        let memfd = fs::File::from(Memfd::new("not-a-state").create()?);
        memfd.write_all_at(content, 0)?;
        cloexec::clear(&memfd)?;
        let number = memfd.as_raw_fd().to_string();
        let said = ends_at_once(VmmBuilder::new().env("CPR_VMM_STATE", number), &[])?;
        assert!(said.contains("CPR state left by the previous program") && said.contains(expected), "{said}");
    }
    Ok(())
}

#[test]
fn a_command_line_that_is_not_understood_ends_the_program() -> anyhow::Result<()> {
    for (args, needles) in [
        (&["-no-such-option"][..], &["-no-such-option", "-help"][..]),
        (&["-machine", "pc"], &["-machine", "'pc'", "microvm"]),
        (&["-machine", "usb=on"], &["-machine", "'usb'"]),
        (&["-accel", "tcg"], &["-accel", "'tcg'"]),
        (&["-uuid", "12"], &["-uuid", "'12'"]),
        (&["stray"], &["'stray'"]),
        (&["-incoming", "tcp:0:4444"], &["-incoming", "'tcp'"]),
        (&["-kernel"], &["-kernel", "must follow"]),
    ] {
        let said = ends_at_once(VmmBuilder::new(), args)?;
        for needle in needles {
            assert!(said.contains(needle), "{args:?}: {needle:?} is not in {said}");
        }
    }
    for (incoming, reason) in [
        ("memfd:", "not started by an update"),
        ("file:vm.state", "-incoming: cannot read state file 'vm.state': No such file"),
    ] {
        let said = ends_at_once(VmmBuilder::new(), &["-incoming", incoming])?;
        assert!(said.contains(reason), "{said}");
    }
    Ok(())
}
