//! cpr-reboot as its users see it: a guest rests in a file while no program runs it, and goes on in another one.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use cpr_core::frame::{Frame, FrameWriter, Header};
use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::{Console, Guest, PATIENCE, Vmm, VmmBuilder, need_kvm, pipes, wait_for};
use vmm_core::payload::Command;
use vmm_core::state::{VcpuState, VmState};
use vmm_core::time::TimeState;

const RAM: u64 = 64 << 20;
const FILLED: u64 = 16 << 20;
const SEED: u64 = 43;

/// The guests of this file would take each other's CPUs.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where what survives is: outlives every program of a test.
struct Storage(TempDir);

impl Storage {
    fn new() -> anyhow::Result<Storage> {
        Ok(Storage(tempfile::tempdir()?))
    }

    /// On tmpfs.
    fn volatile() -> anyhow::Result<Storage> {
        Ok(Storage(tempfile::tempdir_in("/dev/shm")?))
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn state(&self) -> PathBuf {
        self.at("vm.state")
    }

    fn uri(&self) -> String {
        format!("file:{}", self.state().display())
    }

    /// A machine whose RAM is a file here.
    fn machine(&self, cpus: u8) -> VmmBuilder {
        machine(cpus, &self.file_ram(RAM))
    }

    fn file_ram(&self, bytes: u64) -> String {
        format!("memory-backend-file,id=ram0,size={bytes},mem-path={},share=on", self.at("ram").display())
    }

    fn guest(&self, cpus: u8) -> anyhow::Result<Guest> {
        Guest::attach_file(&self.at("ram"), cpus.into())
    }

    /// This machine with a guest whose RAM is filled.
    fn filled(&self, cpus: u8) -> anyhow::Result<(Vmm, Guest)> {
        let vmm = self.machine(cpus).start()?;
        let guest = self.guest(cpus)?;
        guest.fill(FILLED, SEED)?;
        Ok((vmm, guest))
    }

    /// Puts a guest of this machine into storage, with its RAM in place, and ends its program.
    fn rest(&self, mut vmm: Vmm) -> anyhow::Result<()> {
        vmm.set_capability("x-ignore-shared")?;
        vmm.store(&self.uri())?;
        vmm.quit()
    }

    /// The same machine, to go on with the guest.
    fn wake(&self, cpus: u8) -> anyhow::Result<Vmm> {
        self.machine(cpus).incoming(&self.uri()).start()
    }
}

fn machine(cpus: u8, ram: &str) -> VmmBuilder {
    let cmdline = format!("cpus={cpus}");
    let memory = ["-object", ram, "-machine", "memory-backend=ram0"];
    VmmBuilder::new().cpus(cpus).memory_args(&memory).args(&["-append", &cmdline])
}

fn memfd(share: bool) -> String {
    format!("memory-backend-memfd,id=ram0,size={RAM},share={}", if share { "on" } else { "off" })
}

/// A machine with RAM that ends with its program, filled.
fn filled(cpus: u8) -> anyhow::Result<(Vmm, Guest)> {
    let vmm = machine(cpus, &memfd(true)).start()?;
    let guest = vmm.guest()?;
    guest.fill(FILLED, SEED)?;
    Ok((vmm, guest))
}

fn set_mode(vmm: &mut Vmm) -> anyhow::Result<()> {
    vmm.qmp().execute("migrate-set-parameters", json!({ "mode": "cpr-reboot" })).map(drop)
}

fn query(vmm: &mut Vmm) -> anyhow::Result<Value> {
    vmm.qmp().execute("query-migrate", json!({}))
}

/// Starts it, expecting it to end with this reason.
fn refuses(builder: VmmBuilder, reason: &str) -> anyhow::Result<()> {
    let mut vmm = builder.spawn()?;
    ensure!(vmm.wait_exit()? == Some(1), "{}", vmm.stderr());
    ensure!(vmm.stderr().contains(reason), "{}", vmm.stderr());
    Ok(())
}

fn goes_on(vmm: &mut Vmm, guest: &Guest, cpus: u8) -> anyhow::Result<()> {
    ensure!(vmm.status()? == "running");
    for vcpu in 0..cpus {
        guest.beats_on(vcpu.into())?;
    }
    guest.verify(FILLED, SEED)
}

fn names(events: &[Value]) -> Vec<String> {
    let name = |event: &Value| match event["event"].as_str().unwrap_or_default() {
        "MIGRATION" => event["data"]["status"].as_str().unwrap_or_default().to_owned(),
        other => other.to_owned(),
    };
    events.iter().map(name).collect()
}

/// Stores a guest whose RAM stays in its file, and goes on with it, several times.
fn rests_in_place(storage: &Storage, cpus: u8) -> anyhow::Result<()> {
    let (mut vmm, guest) = storage.filled(cpus)?;
    for generation in 1..=2 {
        vmm.set_capability("events")?;
        vmm.set_capability("x-ignore-shared")?;
        vmm.qmp().take_events();
        let info = vmm.store(&storage.uri())?;
        let phases: Vec<_> =
            info["cpr"]["phases"].as_array().into_iter().flatten().map(|p| &p["name"]).collect();
        ensure!(phases == ["stop", "save", "store"] && info.get("total-time").is_some(), "{info}");
        ensure!(names(&vmm.qmp().take_events()) == ["setup", "active", "STOP", "device", "completed"]);
        ensure!(storage.state().metadata()?.len() < 1 << 20, "the RAM is not in the file");
        let beats: Vec<_> = (0..cpus).map(|vcpu| guest.vcpu(vcpu.into()).beats()).collect();
        let last = guest.vcpu(0).last_tsc();
        vmm.quit()?;
        // Nobody runs it.
        ensure!(guest.vcpu(0).last_tsc() == last);
        vmm = storage.wake(cpus)?;
        for (vcpu, beats) in (0..).zip(beats) {
            ensure!(guest.vcpu(vcpu).beats() >= beats, "vCPU {vcpu} went back");
        }
        goes_on(&mut vmm, &guest, cpus)?;
        let info = wait_for("the report", PATIENCE, || {
            query(&mut vmm).ok().filter(|info| info["cpr"].get("blackout-us").is_some())
        })?;
        ensure!(info["status"] == "completed" && info["cpr"]["mode"] == "cpr-reboot", "{info}");
        ensure!(info["cpr"]["generation"] == generation, "{info}");
    }
    // What came out of storage can go on by exec.
    vmm.update()?;
    goes_on(&mut vmm, &guest, cpus)?;
    vmm.quit()
}

#[test]
fn ram_stays_in_place_on_disk() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    rests_in_place(&Storage::new()?, 1)
}

#[test]
fn ram_stays_in_place_on_tmpfs_with_four_vcpus() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    rests_in_place(&Storage::volatile()?, 4)
}

#[test]
fn ram_is_copied_from_shared_and_from_private_memory() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let storage = Storage::new()?;
    let wake = |ram: &str| machine(2, ram).incoming(&storage.uri()).start();
    let (mut vmm, _) = filled(2)?;
    vmm.store(&storage.uri())?;
    let len = storage.state().metadata()?.len();
    ensure!((FILLED..FILLED + (16 << 20)).contains(&len), "{len}");
    vmm.quit()?;
    // Nobody outside sees the memory of this one.
    let mut vmm = wake(&memfd(false))?;
    ensure!(vmm.status()? == "running");
    std::thread::sleep(Duration::from_millis(50));
    vmm.store(&storage.uri())?;
    vmm.quit()?;
    // A file that was something else before is the guest's RAM afterwards.
    std::fs::write(storage.at("ram"), vec![0xa5; RAM as usize])?;
    let mut vmm = storage.wake(2)?;
    let guest = storage.guest(2)?;
    goes_on(&mut vmm, &guest, 2)?;
    vmm.store(&storage.uri())?;
    vmm.quit()?;
    // A copy can be used again and again.
    for _ in 0..2 {
        let mut vmm = wake(&memfd(true))?;
        let guest = vmm.guest()?;
        goes_on(&mut vmm, &guest, 2)?;
        vmm.quit()?;
    }
    Ok(())
}

#[test]
fn a_paused_guest_stays_paused_with_its_serial_input() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let storage = Storage::new()?;
    let (stdio, mut console) = pipes()?;
    let mut vmm = storage.machine(1).args(&["-serial", "stdio"]).stdio(stdio).start()?;
    let guest = storage.guest(1)?;
    guest.run(Command::Echo { on: true })?;
    console.expect("cpr payload: 1 vcpus\n")?;
    vmm.qmp().execute("stop", json!({}))?;
    // More than the FIFO has room for.
    let typed = "x".repeat(40) + &"y".repeat(60);
    console.type_keys(&typed)?;
    std::thread::sleep(Duration::from_millis(50));
    storage.rest(vmm)?;
    let (stdio, mut console): (_, Console) = pipes()?;
    let mut vmm = storage.machine(1).args(&["-serial", "stdio"]).incoming("defer").stdio(stdio).start()?;
    ensure!(vmm.status()? == "inmigrate");
    console.type_keys(";after")?;
    set_mode(&mut vmm)?;
    vmm.qmp().execute("migrate-incoming", json!({ "uri": storage.uri() }))?;
    ensure!(vmm.status()? == "paused");
    let info = query(&mut vmm)?;
    ensure!(info["status"] == "completed" && info["cpr"].get("blackout-us").is_none(), "{info}");
    vmm.qmp().execute("cont", json!({}))?;
    ensure!(console.expect(&format!("{typed};after"))?.is_empty());
    vmm.quit()
}

#[test]
fn defer_takes_the_mode_and_another_try() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let storage = Storage::new()?;
    let (vmm, guest) = storage.filled(1)?;
    storage.rest(vmm)?;
    let mut vmm = storage.machine(1).incoming("defer").start()?;
    let uri = storage.uri();
    let refused = |vmm: &mut Vmm, uri: &str| -> anyhow::Result<String> {
        Ok(vmm.qmp().refused("migrate-incoming", json!({ "uri": uri }))?.desc)
    };
    let text = refused(&mut vmm, &uri)?;
    ensure!(text.contains("set the mode first (migrate_set_parameter mode cpr-reboot)"), "{text}");
    set_mode(&mut vmm)?;
    for command in ["cont", "system_reset"] {
        let text = vmm.qmp().refused(command, json!({}))?.desc;
        ensure!(text == "Guest is waiting for an incoming migration", "{text}");
    }
    ensure!(refused(&mut vmm, "file:none")?.contains("cannot read state file 'none'"));
    ensure!(refused(&mut vmm, "memfd:")?.contains("is file:PATH"));
    ensure!(vmm.status()? == "inmigrate");
    vmm.qmp().execute("migrate-incoming", json!({ "uri": uri }))?;
    goes_on(&mut vmm, &guest, 1)?;
    ensure!(refused(&mut vmm, &uri)?.contains("is loaded already"));
    vmm.quit()
}

#[test]
fn the_source_takes_its_guest_back_unless_another_has_it() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let storage = Storage::new()?;
    let (mut source, guest) = storage.filled(1)?;
    source.set_capability("x-ignore-shared")?;
    source.store(&storage.uri())?;
    for (command, arguments) in [("system_reset", json!({})), ("migrate", json!({ "uri": "file:x" }))] {
        let text = source.qmp().refused(command, arguments)?.desc;
        ensure!(text.contains("the guest is in storage"), "{text}");
    }
    source.qmp().execute("cont", json!({}))?;
    goes_on(&mut source, &guest, 1)?;
    // What is in the file is of a guest that has run on.
    refuses(storage.machine(1).incoming(&storage.uri()), "was used already: the guest has run on since")?;
    goes_on(&mut source, &guest, 1)?;
    source.store(&storage.uri())?;
    let mut target = storage.wake(1)?;
    let text = source.qmp().refused("cont", json!({}))?.desc;
    ensure!(text.contains("was used already"), "{text}");
    ensure!(source.status()? == "postmigrate");
    refuses(storage.machine(1).incoming(&storage.uri()), "was used already")?;
    goes_on(&mut target, &guest, 1)?;
    source.quit()?;
    goes_on(&mut target, &guest, 1)?;
    target.quit()
}

#[test]
fn what_would_not_survive_is_refused_at_once() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let storage = Storage::new()?;
    let (mut vmm, guest) = filled(1)?;
    set_mode(&mut vmm)?;
    let refused = |vmm: &mut Vmm, uri: &str| -> anyhow::Result<String> {
        let text = vmm.qmp().refused("migrate", json!({ "uri": uri }))?.desc;
        ensure!(vmm.status()? == "running");
        Ok(text)
    };
    for uri in ["memfd:", "unix:sock"] {
        let text = refused(&mut vmm, uri)?;
        ensure!(text.starts_with(&format!("'{uri}': the main channel of cpr-reboot is file:PATH")), "{text}");
    }
    let folder = format!("file:{}", storage.0.path().display());
    ensure!(refused(&mut vmm, &folder)?.contains("Is a directory"));
    ensure!(refused(&mut vmm, "file:/dev/full")?.contains("no regular file"));
    ensure!(refused(&mut vmm, "file:none/vm.state")?.contains("No such file or directory"));
    vmm.set_capability("x-ignore-shared")?;
    let text = refused(&mut vmm, &storage.uri())?;
    ensure!(text.contains("Memory region ram0 is shared memory without a file"), "{text}");
    ensure!(query(&mut vmm)?["blocked-reasons"][0].as_str().is_some_and(|text| text.contains("ram0")));
    goes_on(&mut vmm, &guest, 1)?;
    vmm.quit()?;
    // A file that has lost its name ends with the process, too.
    let (mut vmm, guest) = storage.filled(1)?;
    std::fs::remove_file(storage.at("ram"))?;
    set_mode(&mut vmm)?;
    vmm.set_capability("x-ignore-shared")?;
    ensure!(refused(&mut vmm, &storage.uri())?.contains("ram0"));
    ensure!(!storage.state().exists());
    goes_on(&mut vmm, &guest, 1)?;
    vmm.quit()
}

#[test]
fn a_full_disk_leaves_the_guest_running_and_the_old_file() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let storage = Storage::new()?;
    std::fs::write(storage.state(), "old")?;
    let unharmed = ["sh", "-c", "trap '' XFSZ; exec \"$0\" \"$@\""];
    let mut vmm = machine(1, &memfd(true)).wrapper(&unharmed).start()?;
    let guest = vmm.guest()?;
    guest.fill(FILLED, SEED)?;
    // From now on the program may not write files of more than 4 MiB.
    let limit = std::process::Command::new("prlimit")
        .args(["--fsize=4194304", "--pid", &vmm.pid().to_string()])
        .status()?;
    ensure!(limit.success());
    set_mode(&mut vmm)?;
    vmm.qmp().execute("migrate", json!({ "uri": storage.uri() }))?;
    let info =
        wait_for("the failure", PATIENCE, || query(&mut vmm).ok().filter(|info| info["status"] == "failed"))?;
    let text = info["error-desc"].as_str().unwrap_or_default();
    ensure!(text.contains("cpr-reboot could not hand over: cannot write state to file"), "{text}");
    ensure!(std::fs::read(storage.state())? == b"old" && std::fs::read_dir(storage.0.path())?.count() == 1);
    goes_on(&mut vmm, &guest, 1)?;
    vmm.quit()
}

#[test]
fn a_long_copy_can_be_cancelled() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let storage = Storage::new()?;
    let ram = format!("memory-backend-memfd,id=ram0,size={}", 1_u64 << 30);
    let mut vmm = machine(1, &ram).start()?;
    let guest = vmm.guest()?;
    guest.fill(guest.usable_bytes(), SEED)?;
    set_mode(&mut vmm)?;
    vmm.qmp().execute("migrate", json!({ "uri": storage.uri() }))?;
    // The monitor answers while it is being written.
    wait_for("the stop", PATIENCE, || (vmm.status().ok()? == "finish-migrate").then_some(()))?;
    for command in ["cont", "system_reset"] {
        let text = vmm.qmp().refused(command, json!({}))?.desc;
        ensure!(text == "There's a migration process in progress", "{text}");
    }
    vmm.qmp().execute("migrate_cancel", json!({}))?;
    ensure!(query(&mut vmm)?["status"] == "cancelled" && vmm.status()? == "running");
    ensure!(std::fs::read_dir(storage.0.path())?.count() == 0);
    guest.beats_on(0)?;
    guest.verify(guest.usable_bytes(), SEED)?;
    vmm.quit()
}

#[test]
fn other_machines_and_other_files_are_refused() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let storage = Storage::new()?;
    let (mut vmm, guest) = storage.filled(1)?;
    // The state of an exec has no RAM.
    vmm.update_by_file()?;
    let exec_state = std::fs::read_dir(vmm.path(""))?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| std::fs::read(path).is_ok_and(|bytes| bytes.starts_with(b"CPRSTATE")))
        .context("the state of the exec")?;
    std::fs::copy(exec_state, storage.at("exec.state"))?;
    let incoming = format!("file:{}", storage.at("exec.state").display());
    refuses(storage.machine(1).incoming(&incoming), "cpr-exec is such a mode")?;

    storage.rest(vmm)?;
    let uri = storage.uri();
    let refused = |builder: VmmBuilder, reason: &str| refuses(builder.incoming(&uri), reason);
    refused(storage.machine(2), "the guest has 1 vCPUs, the command line says 2")?;
    refused(machine(1, &storage.file_ram(2 * RAM)), "bytes of RAM, the command line says 134217728")?;
    refused(machine(1, &memfd(true)), "is in file")?;
    std::fs::rename(storage.at("ram"), storage.at("elsewhere"))?;
    refused(storage.machine(1), "No such file or directory")?;
    ensure!(!storage.at("ram").exists());
    std::fs::write(storage.at("ram"), "short")?;
    refused(storage.machine(1), "has 5 bytes, the configuration says 67108864")?;
    std::fs::rename(storage.at("elsewhere"), storage.at("ram"))?;
    let good = std::fs::read(storage.state())?;
    for (at, reason) in
        [(0, "does not begin with CPRSTATE"), (100, "is damaged"), (good.len() - 9, "is damaged")]
    {
        let mut bad = good.clone();
        bad[at] ^= 4;
        std::fs::write(storage.state(), bad)?;
        refused(storage.machine(1), reason)?;
    }
    std::fs::write(storage.state(), &good[..good.len() - 1])?;
    refused(storage.machine(1), "it is truncated")?;
    // None of this has done any harm.
    std::fs::write(storage.state(), good)?;
    let mut vmm = storage.wake(1)?;
    goes_on(&mut vmm, &guest, 1)?;
    vmm.quit()
}

#[test]
fn damaged_ram_is_found_before_the_guest_runs() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let storage = Storage::new()?;
    let (mut vmm, _) = filled(1)?;
    vmm.store(&storage.uri())?;
    vmm.quit()?;
    let mut bytes = std::fs::read(storage.state())?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(storage.state(), bytes)?;
    let incoming = storage.uri();
    refuses(machine(1, &memfd(true)).incoming(&incoming), "guest RAM 'ram0' is damaged at offset")
}

/// A state file in its parts: both frames, and what follows.
fn parts(path: &Path) -> anyhow::Result<(Vec<u8>, Frame, Vec<u8>)> {
    let bytes = std::fs::read(path)?;
    let early_len = Header::parse(&bytes)?.total_len as usize;
    let (early, rest) = bytes.split_at(early_len);
    let (main, rest) = rest.split_at(Header::parse(rest)?.total_len as usize);
    Ok((early.to_vec(), Frame::parse(main)?, rest.to_vec()))
}

/// Makes the state file one that was written under another boot of the host, with the guest's TSCs `ticks` further on, and
/// its clock by `ns`.
fn of_another_boot(path: &Path, ticks: u64, ns: u64) -> anyhow::Result<()> {
    let (early, mut main, rest) = parts(path)?;
    let mut writer = FrameWriter::default();
    for name in main.remaining() {
        let (name, instance) = name.rsplit_once('/').context("a name and an instance")?;
        let instance = instance.parse()?;
        let section = main.require(name, instance)?;
        match name {
            "kvm/time" => {
                let mut time: TimeState = section.decode(1)?;
                time.boot_id[0] ^= 1;
                time.vcpus.iter_mut().for_each(|(tsc, _)| *tsc += ticks);
                writer.put_value(name, instance, 1, &time)?;
            }
            "kvm/vm" => {
                let mut vm: VmState = section.decode(1)?;
                vm.clock.kvmclock_ns += ns;
                writer.put_value(name, instance, 1, &vm)?;
            }
            _ => writer.put(name, instance, section.version, section.body)?,
        }
    }
    let main = writer.finish(main.epoch);
    std::fs::write(path, [early, main, rest].concat())?;
    Ok(())
}

/// What KVM said of the guest's time when the file was written.
fn time_of(path: &Path) -> anyhow::Result<(TimeState, VmState, Vec<VcpuState>)> {
    let (_, mut main, _) = parts(path)?;
    let time: TimeState = main.require("kvm/time", 0)?.decode(1)?;
    let vcpus =
        (0..u32::try_from(time.vcpus.len())?).map(|at| Ok(main.require("kvm/vcpu", at)?.decode(1)?));
    let vcpus = vcpus.collect::<anyhow::Result<_>>()?;
    Ok((time, main.require("kvm/vm", 0)?.decode(1)?, vcpus))
}

#[test]
fn the_guests_time_goes_on_under_another_kernel() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    const HOUR: f64 = 3600.0;
    let storage = Storage::new()?;
    let (vmm, guest) = storage.filled(2)?;
    storage.rest(vmm)?;
    let (before, vm_before, vcpus) = time_of(&storage.state())?;
    // Some KVMs give their guests the host's TSC, whatever they are asked for.
    let has_tsc = vcpus[0].tsc_offset != Some(0);
    ensure!(before.boot_id == oslib::clock::boot_id()?);
    let hz = f64::from(vcpus[0].tsc_khz) * 1000.0;
    std::thread::sleep(Duration::from_millis(300));
    of_another_boot(&storage.state(), (hz * HOUR) as u64, 3600 * 1_000_000_000)?;
    let mut vmm = storage.wake(2)?;
    goes_on(&mut vmm, &guest, 2)?;
    storage.rest(vmm)?;
    // What was recorded, and what passed by the wall clock; not what this host's counters say.
    let (after, vm_after, vcpus) = time_of(&storage.state())?;
    for (vcpu, (before, after)) in before.vcpus.iter().zip(&after.vcpus).enumerate().filter(|_| has_tsc) {
        let wall = Duration::from_nanos(after.1 - before.1).as_secs_f64();
        let passed = (after.0 - before.0) as f64 / hz;
        ensure!(
            (passed - HOUR - wall).abs() < 0.1,
            "vCPU {vcpu}: {passed} s, by the wall clock {wall} s and an hour"
        );
    }
    let wall = Duration::from_nanos(after.realtime_ns - before.realtime_ns).as_secs_f64();
    let passed = (vm_after.clock.kvmclock_ns - vm_before.clock.kvmclock_ns) as f64 / 1e9;
    ensure!((passed - HOUR - wall).abs() < 0.1, "{passed} s, by the wall clock {wall} s and an hour");
    // From here on it is an offset to this host's TSC again, for those who can leave it at that.
    ensure!(
        vcpus.iter().all(|vcpu| vcpu.tsc_offset.is_some() && vcpu.msrs.iter().all(|&(msr, _)| msr != 0x10))
    );
    let offsets: Vec<_> = vcpus.iter().filter_map(|vcpu| vcpu.tsc_offset).collect();
    ensure!(
        offsets[0].abs_diff(offsets[1]) as f64 / hz < 1e-3,
        "the vCPUs have times of their own: {offsets:?}"
    );
    let mut vmm = storage.wake(2)?;
    goes_on(&mut vmm, &guest, 2)?;
    vmm.quit()
}

#[test]
fn the_session_that_qemus_users_know() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let storage = Storage::new()?;
    let ram = storage.file_ram(RAM);
    let args = ["-monitor", "stdio", "-object", &ram, "-machine", "memory-backend=ram0"];
    let say = |console: &mut Console, line: &str, answer: &str| -> anyhow::Result<()> {
        console.type_line(line)?;
        let expected = format!("{line}\n{answer}(qemu) ");
        ensure!(console.expect(&expected)?.is_empty(), "{}", console.text());
        Ok(())
    };
    let (stdio, mut console) = pipes()?;
    let mut vmm = VmmBuilder::new().only_args(&args).stdio(stdio).spawn()?;
    console.expect("(qemu) ")?;
    let guest = storage.guest(1)?;
    guest.fill(FILLED, SEED)?;
    let state = storage.uri();
    say(&mut console, "info status", "VM status: running\n")?;
    say(&mut console, "migrate_set_parameter mode cpr-reboot", "")?;
    say(&mut console, "migrate_set_capability x-ignore-shared on", "")?;
    say(&mut console, &format!("migrate -d {state}"), "")?;
    wait_for("the state", PATIENCE, || storage.state().exists().then_some(()))?;
    say(&mut console, "info status", "VM status: paused (postmigrate)\n")?;
    console.type_line("quit")?;
    ensure!(vmm.wait_exit()? == Some(0), "{}", vmm.stderr());

    let (stdio, mut console) = pipes()?;
    let mut vmm =
        VmmBuilder::new().only_args(&[&args[..], &["-incoming", "defer"]].concat()).stdio(stdio).spawn()?;
    console.expect("(qemu) ")?;
    say(&mut console, "info status", "VM status: paused (inmigrate)\n")?;
    say(&mut console, "migrate_set_parameter mode cpr-reboot", "")?;
    say(&mut console, "migrate_set_capability x-ignore-shared on", "")?;
    say(&mut console, &format!("migrate_incoming {state}"), "")?;
    say(&mut console, "info status", "VM status: running\n")?;
    guest.beats_on(0)?;
    guest.verify(FILLED, SEED)?;
    console.type_line("quit")?;
    ensure!(vmm.wait_exit()? == Some(0), "{}", vmm.stderr());
    Ok(())
}
