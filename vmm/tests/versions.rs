//! Updates between two releases: from and to a program that writes and reads the state as the release before did.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use cpr_core::frame::{Frame, Header, Section};
use serde_json::{Value, json};
use testkit::{Guest, PATIENCE, Vmm, VmmBuilder, binary, need_kvm, wait_for};

const SEED: u64 = 23;
const FILLED: u64 = 8 << 20;

/// Sections that have two versions.
const TWO_VERSIONS: [&str; 1] = ["cpr-vmm/machine"];

/// The release of a program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Release {
    Previous,
    Current,
}

use Release::{Current, Previous};

impl Release {
    fn program(self) -> PathBuf {
        match self {
            Previous => PathBuf::from(env!("CARGO_BIN_EXE_cpr-vmm-previous")),
            Current => binary(),
        }
    }

    fn machine(self) -> VmmBuilder {
        // The newest one that both releases have.
        VmmBuilder::new().binary(self.program()).args(&["-machine", "microvm-0.1"])
    }

    fn target(self) -> anyhow::Result<Vmm> {
        self.machine().target("unix:main.sock").start()
    }
}

/// A guest, and what it must not lose.
struct Machine {
    vmm: Vmm,
    guest: Guest,
    beats: u64,
    generation: u64,
}

impl Machine {
    fn start(release: Release) -> anyhow::Result<Machine> {
        let mut vmm = release.machine().start()?;
        let guest = vmm.guest()?;
        guest.fill(FILLED, SEED)?;
        vmm.qmp().execute("migrate-set-parameters", json!({ "cpr-defer-timeout": 77_000 }))?;
        Ok(Machine { beats: guest.vcpu(0).beats(), vmm, guest, generation: 0 })
    }

    fn goes_on(&mut self) -> anyhow::Result<()> {
        let beats = self.guest.vcpu(0).beats();
        ensure!(beats >= self.beats, "the guest went back from {} to {beats}", self.beats);
        self.beats = beats;
        ensure!(self.vmm.status()? == "running");
        self.guest.beats_on(0)?;
        self.guest.verify(FILLED, SEED)
    }

    fn state_file(&self) -> PathBuf {
        self.vmm.path(&format!("state{}", self.generation))
    }

    /// Sets cpr-exec to this release, and where the state goes.
    fn set_exec(&mut self, release: Release) -> anyhow::Result<String> {
        let uri = format!("file:{}", self.state_file().display());
        let command = self.vmm.exec_command_of(&release.program(), &uri);
        self.vmm.set_exec(&command)?;
        Ok(uri)
    }

    /// Updates by cpr-exec; gives the state that travelled.
    fn exec(&mut self, release: Release) -> anyhow::Result<Frame> {
        let uri = self.set_exec(release)?;
        let info = self.vmm.migrate(&uri)?;
        self.generation += 1;
        ensure!(info["cpr"]["generation"] == self.generation, "{info}");
        self.goes_on()?;
        let parameters = self.vmm.qmp().execute("query-migrate-parameters", json!({}))?;
        ensure!(parameters["cpr-defer-timeout"] == 77_000, "{parameters}");
        Ok(Frame::parse(&std::fs::read(state_file(&self.vmm, self.generation - 1))?)?)
    }

    /// An update by cpr-exec that fails; gives the reason.
    fn exec_fails(&mut self, release: Release) -> anyhow::Result<String> {
        let uri = self.set_exec(release)?;
        self.vmm.qmp().execute("migrate", json!({ "uri": uri }))?;
        let reason = failure(&mut self.vmm)?;
        self.goes_on()?;
        Ok(reason)
    }
}

fn state_file(vmm: &Vmm, generation: u64) -> PathBuf {
    vmm.path(&format!("state{generation}"))
}

/// Why the update failed.
fn failure(vmm: &mut Vmm) -> anyhow::Result<String> {
    let info: Value = wait_for("the failure", PATIENCE, || {
        let info = vmm.qmp().execute("query-migrate", json!({})).ok()?;
        (info["status"] == "failed").then_some(info)
    })?;
    Ok(info["error-desc"].as_str().unwrap_or_default().to_owned())
}

/// Each section with two versions has the one that this release writes, and every other has its only one.
fn is_written_by(release: Release, state: &mut Frame) -> anyhow::Result<()> {
    for key in state.remaining() {
        let (name, instance) = key.rsplit_once('/').expect("NAME/INSTANCE");
        let section = state.require(name, instance.parse()?)?;
        let expected = if release == Current && TWO_VERSIONS.contains(&name) { 2 } else { 1 };
        ensure!(section.version == expected, "{key} has version {}", section.version);
        if name == "cpr-vmm/machine" {
            let expected = if release == Current { "microvm-0.1" } else { "microvm" };
            ensure!(machine_type(&section)? == expected, "{release:?}: {section:?}");
        }
    }
    Ok(())
}

/// The first field of the section.
fn machine_type(section: &Section) -> anyhow::Result<String> {
    let (name, _) = postcard::take_from_bytes(&section.body)?;
    Ok(name)
}

#[test]
fn a_guest_goes_up_by_exec_and_keeps_its_machine() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::start(Previous)?;
    is_written_by(Previous, &mut machine.exec(Previous)?)?;
    is_written_by(Previous, &mut machine.exec(Current)?)?;
    is_written_by(Current, &mut machine.exec(Current)?)?;
    machine.vmm.quit()
}

#[test]
fn a_guest_goes_down_and_up_by_exec() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::start(Current)?;
    for round in 0..2 {
        is_written_by(Previous, &mut machine.exec(Previous)?).with_context(|| format!("down, {round}"))?;
        is_written_by(Previous, &mut machine.exec(Current)?).with_context(|| format!("up, {round}"))?;
        is_written_by(Current, &mut machine.exec(Current)?).with_context(|| format!("on, {round}"))?;
    }
    machine.vmm.quit()
}

#[test]
fn a_guest_goes_up_and_down_and_up() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::start(Previous)?;
    for release in [Current, Previous, Current] {
        is_written_by(Previous, &mut machine.exec(release)?)?;
    }
    machine.vmm.quit()
}

#[test]
fn a_guest_goes_down_and_up_by_transfer() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::start(Current)?;
    for release in [Previous, Current, Previous] {
        let mut target = release.target()?;
        machine.vmm.transfer(&mut target)?;
        std::mem::replace(&mut machine.vmm, target).quit()?;
        machine.goes_on()?;
    }
    machine.vmm.quit()
}

#[test]
fn a_guest_goes_up_by_transfer() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::start(Previous)?;
    let mut target = Current.target()?;
    machine.vmm.transfer(&mut target)?;
    std::mem::replace(&mut machine.vmm, target).quit()?;
    machine.goes_on()?;
    is_written_by(Current, &mut {
        machine.vmm.qmp().execute("migrate-set-parameters", json!({ "cpr-defer-timeout": 77_000 }))?;
        machine.generation = 1;
        machine.exec(Current)?
    })?;
    machine.vmm.quit()
}

/// A guest that rests in files, in turn under programs of the two releases.
struct Resting {
    vmm: Vmm,
    /// Outlives every program.
    folder: tempfile::TempDir,
    files: u32,
}

/// What the release before says of a state file that it does not read.
const FILE_REFUSAL: &str = "state section 'cpr-vmm/machine' has version 2; this program reads version 1";

impl Resting {
    /// Starts it, with its RAM in a file.
    fn start(release: Release) -> anyhow::Result<Resting> {
        let folder = tempfile::tempdir()?;
        let vmm = Resting::machine(release, folder.path()).start()?;
        let resting = Resting { vmm, folder, files: 0 };
        resting.guest()?.fill(FILLED, SEED)?;
        Ok(resting)
    }

    fn machine(release: Release, folder: &Path) -> VmmBuilder {
        let ram = folder.join("ram");
        let ram = format!("memory-backend-file,id=ram0,size=64M,share=on,mem-path={}", ram.display());
        release.machine().memory_args(&["-object", &ram, "-machine", "memory-backend=ram0"])
    }

    fn guest(&self) -> anyhow::Result<Guest> {
        Guest::attach_file(&self.folder.path().join("ram"), 1)
    }

    /// Ends the program, with its guest in a file: with its RAM, or beside it.
    fn store(&mut self, in_place: bool) -> anyhow::Result<PathBuf> {
        self.files += 1;
        let file = self.folder.path().join(format!("state{}", self.files));
        if in_place {
            self.vmm.set_capability("x-ignore-shared")?;
        }
        self.vmm.store(&format!("file:{}", file.display()))?;
        Ok(file)
    }

    /// A program of `release` is to go on from `file`.
    fn woken(&self, release: Release, file: &Path) -> VmmBuilder {
        Resting::machine(release, self.folder.path()).incoming(&format!("file:{}", file.display()))
    }

    /// It does, from where the guest was.
    fn goes_on(&mut self, release: Release, file: &Path) -> anyhow::Result<()> {
        let beats = self.guest()?.vcpu(0).beats();
        let woken = self.woken(release, file).start()?;
        std::mem::replace(&mut self.vmm, woken).quit()?;
        let guest = self.guest()?;
        ensure!(guest.vcpu(0).beats() >= beats, "the guest went back from {beats}");
        ensure!(self.vmm.status()? == "running");
        guest.beats_on(0)?;
        guest.verify(FILLED, SEED)
    }

    /// Its main frame.
    fn main_frame(file: &Path) -> anyhow::Result<Frame> {
        let bytes = std::fs::read(file)?;
        let (_, rest) = bytes.split_at(usize::try_from(Header::parse(&bytes)?.total_len)?);
        Ok(Frame::parse(&rest[..usize::try_from(Header::parse(rest)?.total_len)?])?)
    }

    /// Updates the running program by cpr-exec, for which it is asked what it reads.
    fn exec(&mut self, release: Release) -> anyhow::Result<()> {
        let command = self.vmm.exec_command_of(&release.program(), "memfd:");
        self.vmm.set_exec(&command)?;
        self.vmm.migrate("memfd:").map(drop)
    }
}

#[test]
fn a_guest_goes_up_by_a_file_and_keeps_its_machine() -> anyhow::Result<()> {
    need_kvm!();
    for in_place in [false, true] {
        let mut resting = Resting::start(Previous)?;
        for release in [Previous, Current] {
            let file = resting.store(in_place)?;
            is_written_by(Previous, &mut Resting::main_frame(&file)?)?;
            resting.goes_on(release, &file)?;
        }
        let file = resting.store(in_place)?;
        is_written_by(Current, &mut Resting::main_frame(&file)?)?;
        resting.goes_on(Current, &file)?;
        resting.vmm.quit()?;
    }
    Ok(())
}

/// Nobody is asked what he reads when a file is written: one of this release goes to this release. Who wants the one before has
/// it write the file.
#[test]
fn a_guest_goes_down_by_a_file_that_the_release_before_writes() -> anyhow::Result<()> {
    need_kvm!();
    let mut resting = Resting::start(Current)?;
    let file = resting.store(true)?;
    let before = std::fs::read(&file)?;
    let mut refusing = resting.woken(Previous, &file).spawn()?;
    ensure!(
        refusing.wait_exit()? == Some(1) && refusing.stderr().contains(FILE_REFUSAL),
        "{}",
        refusing.stderr()
    );
    ensure!(std::fs::read(&file)? == before, "a refused file is as it was");
    resting.goes_on(Current, &file)?;
    resting.exec(Previous)?;
    let file = resting.store(true)?;
    is_written_by(Previous, &mut Resting::main_frame(&file)?)?;
    resting.goes_on(Previous, &file)?;
    let file = resting.store(true)?;
    resting.goes_on(Current, &file)?;
    resting.vmm.quit()
}

/// What a program says of a section that only the next release knows.
const REFUSAL: &str = "state section 'cpr-vmm/monitors' has version 2; this program reads version 1";

/// Not asked beforehand, nobody knows what it reads.
#[test]
fn a_program_of_the_release_before_refuses_by_name_what_it_does_not_read() -> anyhow::Result<()> {
    need_kvm!();
    let mut machine = Machine::start(Current)?;
    machine.vmm.qmp().execute("migrate-set-parameters", json!({ "cpr-preflight": "off" }))?;
    let reason = machine.exec_fails(Previous)?;
    ensure!(reason.contains(REFUSAL), "{reason}");
    let mut target = Previous.target()?;
    machine.vmm.begin_transfer(&target.cpr_socket())?;
    let reason = failure(&mut machine.vmm)?;
    ensure!(reason.contains(REFUSAL), "{reason}");
    machine.goes_on()?;
    ensure!(target.wait_exit()? == Some(1) && target.stderr().contains(REFUSAL), "{}", target.stderr());
    machine.exec(Current)?;
    machine.vmm.quit()
}

#[test]
fn a_machine_type_can_be_named_and_one_that_is_not_there_is_refused() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = Previous.machine().start()?;
    let guest = vmm.guest()?;
    let command = vmm.exec_command_of(&Current.program(), "memfd:");
    vmm.set_exec(&command)?;
    vmm.migrate("memfd:")?;
    guest.beats_on(0)?;
    let mut command = vmm.exec_command_of(&Current.program(), "memfd:");
    command.extend(["-machine".into(), "microvm-9.9".into()]);
    vmm.set_exec(&command)?;
    vmm.qmp().execute("migrate", json!({ "uri": "memfd:" }))?;
    let said = failure(&mut vmm)?;
    let reason = "machine type 'microvm-9.9' is not supported (supported: microvm, microvm-0.1, microvm-0.2)";
    ensure!(said.contains(reason), "{said}");
    guest.beats_on(0)?;
    vmm.quit()
}

/// A guest on a machine that the release before does not have stays where it is.
#[test]
fn a_machine_type_that_the_release_before_does_not_have_does_not_go_down() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = VmmBuilder::new().binary(Current.program()).start()?;
    let guest = vmm.guest()?;
    let command = vmm.exec_command_of(&Previous.program(), "memfd:");
    vmm.set_exec(&command)?;
    vmm.qmp().execute("migrate", json!({ "uri": "memfd:" }))?;
    let said = failure(&mut vmm)?;
    ensure!(said.contains("'microvm-0.2', which this program does not have (it has: microvm-0.1)"), "{said}");
    guest.beats_on(0)?;
    // And goes on with it in one that does.
    let command = vmm.exec_command_of(&Current.program(), "memfd:");
    vmm.set_exec(&command)?;
    vmm.migrate("memfd:")?;
    guest.beats_on(0)?;
    vmm.quit()
}

#[test]
fn the_two_programs_are_two() {
    assert_ne!(Previous.program(), Current.program());
    assert!(Path::new(&Previous.program()).is_file());
}
