//! Sections of the release before are read, and written, to the byte.
//!
//! The fixtures are both frames of an update as the program wrote them before any section had a second version: a guest
//! with 64 MiB of RAM and one vCPU, monitors and serial line on sockets, a half-typed line, and a descriptor by name. They
//! are never written anew: whoever changes a wire type adds a version instead.

use std::fs::File;

use cpr_core::frame::{Frame, FrameWriter, Section};
use cpr_core::preflight::{Reads, SectionRange};
use cpr_core::section::SectionType;
use cpr_core::{Arrival, Control, FdRegistry, Incoming, Services};
use proptest::prelude::*;
use vmm_core::state::{PlatformState, SerialState, VcpuState, VmState};

use super::*;
use crate::cli::{self, Invocation};

const EARLY: &[u8] = include_bytes!("../../../tests/fixtures/versions-1.early");
const MAIN: &[u8] = include_bytes!("../../../tests/fixtures/versions-1.main");

fn config() -> Config {
    let args = ["-m", "64M", "-nodefaults", "-M", "microvm-0.1"].map(Into::into);
    match cli::parse(args) {
        Ok(Invocation::Run(config)) => *config,
        other => panic!("{other:?}"),
    }
}

/// A target that reads this version of the section, and no other.
fn only<T: SectionType>(version: u32) -> Reads {
    [SectionRange { name: T::NAME.into(), least: version, most: version }].into_iter().collect()
}

/// The section as it stands in a frame for such a target.
fn written<T: SectionType>(value: &T, version: u32) -> Result<Section, String> {
    let mut writer = FrameWriter::for_reader(only::<T>(version));
    writer.put_section(0, value).map_err(|error| error.to_string())?;
    Ok(Frame::parse(&writer.finish(1)).unwrap().require(T::NAME, 0).unwrap())
}

/// `section`, of version 1, is read, written in each version and read again, and is the same in the end.
fn goes_up_and_down<T: SectionType>(section: &Section) -> T {
    assert_eq!(section.version, 1, "{}", T::NAME);
    for version in 1..=T::VERSION {
        let value: T = section.read().unwrap();
        let between = written(&value, version).unwrap();
        assert_eq!(between.version, version);
        let back = written(&between.read::<T>().unwrap(), 1).unwrap();
        assert_eq!(back.body, section.body, "{} by way of version {version}", T::NAME);
    }
    section.read().unwrap()
}

fn fixture<T: SectionType>(frame: &[u8]) -> T {
    goes_up_and_down(&Frame::parse(frame).unwrap().require(T::NAME, 0).unwrap())
}

#[test]
fn an_early_frame_of_the_release_before_is_read() {
    let state: EarlyState = fixture(EARLY);
    assert_eq!(state.machine_type, "microvm-0.1");
    let identities: Vec<_> = state.chardevs.iter().map(|(chardev, _)| chardev.identity()).collect();
    assert_eq!(identities, ["unix:/run/guest/qmp", "unix:/run/guest/hmp", "unix:/run/guest/serial"]);
    assert_eq!(state.named_fds, ["spare"]);
    assert_eq!(state.settings.parameters()["mode"], "cpr-exec");
    assert_eq!(state.settings.parameters()["cpr-exec-command"][0], "/bin/sh");
    assert_eq!(state.settings.parameters()["cpr-exec-timeout"], 5000);
    assert_eq!(state.cpuid.len(), 1);

    let mut early = Frame::parse(EARLY).unwrap();
    let epoch = early.epoch;
    let registry = early.require("cpr-core/registry", 0).unwrap();
    let registry = FdRegistry::decode(&registry, |_, _| Ok(File::open("/dev/null")?.into())).unwrap();
    assert!(registry.contains("ram0", 0) && registry.contains("getfd/spare", 0));
    let control = Control::create(epoch).unwrap();
    let mut services = Services::default();
    let arrival = Arrival { mode: cpr_exec::mode_info(), early, registry, control };
    let mut incoming = Incoming::begin(&mut services, arrival).unwrap();
    assert_eq!(services.generation, 1);
    take_early_state(incoming.early()).unwrap();
    assert_eq!(incoming.early().remaining(), ["cpr-exec/process/0"], "which cpr-exec's own end takes");
}

#[test]
fn a_main_frame_of_the_release_before_is_read() {
    let machine: MachineSection = fixture(MAIN);
    assert_eq!((machine.machine_type.as_str(), machine.ram_bytes), ("microvm-0.1", 64 << 20));
    assert_eq!((machine.vcpus, machine.run_state.as_str(), machine.ended), (1, "running", None));
    fixture::<VcpuState>(MAIN).check().unwrap();
    fixture::<VmState>(MAIN).check().unwrap();
    fixture::<SerialState>(MAIN).check().unwrap();
    fixture::<PlatformState>(MAIN);
    fixture::<OutsideSection>(MAIN);

    let mut main = Frame::parse(MAIN).unwrap();
    let arrived = read_machine(&mut main, &config()).unwrap();
    assert_eq!(arrived.state.vcpus.len(), 1);
    assert_eq!(main.remaining(), ["cpr-core/activity/0"]);
    assert!(main.require("cpr-core/activity", 0).unwrap().decode::<bool>(1).unwrap());
}

#[test]
fn a_machine_type_without_a_form_in_the_release_before_is_refused_by_name() {
    let mut machine: MachineSection = fixture(MAIN);
    machine.machine_type = "microvm-9.9".into();
    let mut early: EarlyState = fixture(EARLY);
    early.machine_type = "microvm-9.9".into();
    for (section, error) in
        [("machine", written(&machine, 1).unwrap_err()), ("monitors", written(&early, 1).unwrap_err())]
    {
        let expected = format!(
            "state section 'cpr-vmm/{section}' cannot be written in version 1: it has no machine type 'microvm-9.9'"
        );
        assert_eq!(error, expected);
    }
    // The unversioned name is none in the current version.
    machine.machine_type = "microvm".into();
    let expected = MachineSection::of(&config(), RunState::Paused, None).shape();
    let error = machine.shape().check(&expected).unwrap_err().to_string();
    assert_eq!(error, "the guest's machine type is 'microvm', this program has 'microvm-0.1'");
}

fn section<T: SectionType>(body: Vec<u8>) -> Section {
    Section { name: T::NAME.into(), instance: 0, version: 1, body }
}

/// The fields of the wire types of version 1, by themselves.
mod v1 {
    use super::*;

    pub(super) type Chardev = (String, bool, Vec<u8>, Option<([u32; 4], u8, Vec<u8>, [u32; 2])>);
    pub(super) type FrontEnd = (Option<(u8, u8, bool)>, Vec<(u8, Vec<u8>)>);
    pub(super) type Settings = (String, Vec<String>, bool, u64, u64, bool);
    pub(super) type Early = (Vec<(Chardev, FrontEnd)>, Settings, Vec<String>, Vec<Vec<u8>>);
    pub(super) type Machine = (String, u64, u32, String, Option<bool>);

    pub(super) fn bytes() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(any::<u8>(), 0..20)
    }

    pub(super) fn early() -> impl Strategy<Value = Early> {
        let terminal = proptest::option::of((any::<[u32; 4]>(), any::<u8>(), bytes(), any::<[u32; 2]>()));
        let chardev = (any::<String>(), any::<bool>(), bytes(), terminal);
        // A serial line, which is the first kind of user.
        let users = proptest::collection::vec((Just(0), bytes()), 0..3);
        let front_end = (proptest::option::of(any::<(u8, u8, bool)>()), users);
        let settings = (
            any::<String>(),
            proptest::collection::vec(any::<String>(), 0..4),
            any::<bool>(),
            any::<u64>(),
            any::<u64>(),
            any::<bool>(),
        );
        let names = proptest::collection::vec(any::<String>(), 0..4);
        let cpuid = proptest::collection::vec(bytes(), 0..4);
        (proptest::collection::vec((chardev, front_end), 0..4), settings, names, cpuid)
    }

    pub(super) fn machine() -> impl Strategy<Value = Machine> {
        let ended = proptest::option::of(any::<bool>());
        (Just("microvm".to_owned()), any::<u64>(), any::<u32>(), any::<String>(), ended)
    }
}

proptest! {
    #[test]
    fn any_early_state_goes_up_and_down(fields in v1::early()) {
        goes_up_and_down::<EarlyState>(&section::<EarlyState>(cpr_core::frame::to_body(&fields)));
    }

    #[test]
    fn any_machine_goes_up_and_down(fields in v1::machine()) {
        let machine: MachineSection =
            goes_up_and_down(&section::<MachineSection>(cpr_core::frame::to_body(&fields)));
        prop_assert_eq!(machine.machine_type, "microvm-0.1");
    }

    #[test]
    fn any_outside_goes_through(unsent in v1::bytes(), resets in proptest::collection::vec(any::<bool>(), 0..5)) {
        goes_up_and_down::<OutsideSection>(&section::<OutsideSection>(cpr_core::frame::to_body(&(unsent, resets))));
    }

    #[test]
    fn any_serial_input_goes_through(input in v1::bytes()) {
        goes_up_and_down::<SerialInput>(&section::<SerialInput>(cpr_core::frame::to_body(&input)));
    }

    #[test]
    fn any_serial_line_goes_through(registers in any::<[u8; 9]>(), fifo in v1::bytes()) {
        goes_up_and_down::<SerialState>(&section::<SerialState>(cpr_core::frame::to_body(&(registers, fifo))));
    }
}
