//! The sections of the main frame: the machine.

use std::sync::{Arc, OnceLock};

use cpr_core::frame::{Frame, FrameWriter, to_body};
use kvm_bindings::{
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use vmm::app::{Arrived, read_machine};
use vmm::cli::config::Config;
use vmm_core::output::OutputSink;
use vmm_core::ports::PortDevice;
use vmm_core::serial::{COM1_LEN, IrqLine, Serial};
use vmm_core::state::{
    Blob, ClockState, GsiRoute, MachineState, NESTED_HEADER_LEN, PlatformState, SREGS2_LEN, SerialState,
    SregsState, VcpuState, VmState, XSAVE_MIN_LEN,
};
use vmm_core::time::{Now, TimeState};

use crate::{decoded, frame_of};

pub(crate) const MACHINE: &str = "cpr-vmm/machine";
pub(crate) const VCPU: &str = "kvm/vcpu";
pub(crate) const VM: &str = "kvm/vm";
pub(crate) const SERIAL: &str = "serial";
pub(crate) const PLATFORM: &str = "platform";
pub(crate) const OUTSIDE: &str = "cpr-vmm/outside";
pub(crate) const SERIAL_INPUT: &str = "cpr-vmm/serial-input";
const CONSOLE_LINE: &str = "cpr-vmm/console-line";
const DEVICES: &str = "cpr-vmm/devices";
pub(crate) const TIME: &str = "kvm/time";

/// The machine that the frames of this module are for.
fn config() -> &'static Config {
    static CONFIG: OnceLock<Config> = OnceLock::new();
    CONFIG.get_or_init(|| crate::command_line::config(&["-M", "microvm-0.1", "-m", "64M", "-smp", "1"]))
}

/// A machine with devices.
fn config_with_devices() -> &'static Config {
    static CONFIG: OnceLock<Config> = OnceLock::new();
    CONFIG.get_or_init(|| {
        let args = "-M microvm-0.2 -m 64M -smp 1 -device virtio-rng-pci,addr=3 -chardev null,id=c \
                    -device virtio-serial-pci,addr=4,max_ports=2 -device virtconsole,chardev=c,name=x";
        crate::command_line::config(&args.split(' ').collect::<Vec<_>>())
    })
}

/// Takes the machine out of a frame, as a target does before it gives it to KVM.
pub(crate) fn read(frame: &mut Frame) -> bool {
    read_for(frame, config())
}

fn read_for(frame: &mut Frame, config: &Config) -> bool {
    match read_machine(frame, config) {
        Ok(Arrived { state, .. }) => {
            assert_eq!(state.vcpus.len(), 1);
            state.check().map_err(|error| error.to_string()).is_ok()
        }
        Err(error) => {
            let _ = vmm::errors::text(error.as_ref());
            false
        }
    }
}

/// A good main frame.
pub(crate) fn writer() -> FrameWriter {
    let mut writer = FrameWriter::default();
    for (name, version, body) in good() {
        writer.put(name, 0, *version, body.clone()).expect("each name stands once");
    }
    writer
}

/// Sections, versions and bodies of a good main frame.
fn good() -> &'static [(&'static str, u32, Vec<u8>)] {
    static GOOD: OnceLock<Vec<(&str, u32, Vec<u8>)>> = OnceLock::new();
    GOOD.get_or_init(|| {
        vec![
            (MACHINE, 2, machine_seeds().remove(0)),
            (VM, 1, to_body(&good_vm())),
            (VCPU, 1, to_body(&good_vcpu())),
            (SERIAL, 1, to_body(&good_serial())),
            (PLATFORM, 1, to_body(&PlatformState::default())),
            (OUTSIDE, 1, outside_seeds().remove(0)),
        ]
    })
}

/// A frame in which `section`, in this version, has `data` for a body, and whose other sections are good.
fn good_but_for(section: &str, version: u32, data: &[u8]) -> Frame {
    let sections = good().iter().map(|(name, good, body)| match *name == section {
        true => (*name, version, data),
        false => (*name, *good, &body[..]),
    });
    frame_of(&sections.collect::<Vec<_>>())
}

/// The section `cpr-vmm/machine` in both versions, in a frame whose other sections are good.
pub fn machine(data: &[u8]) -> bool {
    let [previous, current] = [1, 2].map(|version| {
        let mut frame = good_but_for(MACHINE, version, data);
        let good = read(&mut frame);
        assert!(!good || frame.remaining().is_empty());
        good
    });
    previous || current
}

fn machine_body(machine_type: &str, ended: Option<u32>) -> Vec<u8> {
    to_body(&(machine_type, 64_u64 << 20, 1_u32, "running", ended))
}

pub(crate) fn machine_seeds() -> Vec<Vec<u8>> {
    // How the guest ended, if it did: None, then a power-off.
    let of = |ended| machine_body("microvm-0.1", ended);
    let of_version_1 = to_body(&("microvm", 64_u64 << 20, 1_u32, "running", None::<u32>));
    vec![of(None), of(Some(0)), of_version_1]
}

/// The section `cpr-vmm/outside`, in a frame whose other sections are good.
pub fn outside(data: &[u8]) -> bool {
    read(&mut good_but_for(OUTSIDE, 1, data))
}

pub(crate) fn outside_seeds() -> Vec<Vec<u8>> {
    vec![to_body(&(b"unsent".to_vec(), vec![true, false])), to_body(&(Vec::<u8>::new(), Vec::<bool>::new()))]
}

/// The section `cpr-vmm/serial-input`, beside those of a good main frame.
pub fn serial_input(data: &[u8]) -> bool {
    let good = good().iter().map(|(name, version, body)| (*name, *version, &body[..]));
    read(&mut frame_of(&good.chain([(SERIAL_INPUT, 1, data)]).collect::<Vec<_>>()))
}

pub(crate) fn serial_input_seeds() -> Vec<Vec<u8>> {
    vec![to_body(&b"typed ahead".to_vec()), to_body(&Vec::<u8>::new())]
}

/// The section `cpr-vmm/console-line`, beside those of a good main frame.
pub fn console_line(data: &[u8]) -> bool {
    let good = good().iter().map(|(name, version, body)| (*name, *version, &body[..]));
    read(&mut frame_of(&good.chain([(CONSOLE_LINE, 1, data)]).collect::<Vec<_>>()))
}

pub(crate) fn console_line_seeds() -> Vec<Vec<u8>> {
    let nothing = Vec::<u8>::new();
    vec![
        to_body(&("null:c", b"unsent".to_vec(), b"typed ahead".to_vec())),
        to_body(&("unix:/run/c", &nothing, &nothing)),
    ]
}

/// The section `cpr-vmm/devices`, in a good main frame of a machine that has some.
pub fn devices(data: &[u8]) -> bool {
    let machine = machine_body("microvm-0.2", None);
    let good = good().iter().map(|(name, version, body)| match *name {
        MACHINE => (MACHINE, 2, &machine[..]),
        _ => (*name, *version, &body[..]),
    });
    let sections: Vec<_> = good.chain([(DEVICES, 1, data)]).collect();
    read_for(&mut frame_of(&sections), config_with_devices())
}

pub(crate) fn devices_seeds() -> Vec<Vec<u8>> {
    let none = Vec::<(&str, &str)>::new();
    let console = vec![("max_ports", "2"), ("ports", "0:x")];
    let [rng, serial] = [(3_u8, "virtio-rng-pci", &none), (4, "virtio-serial-pci", &console)];
    vec![to_body(&[rng, serial].to_vec())]
}

/// The section `kvm/vcpu`. What passes the check has the lengths of the kernel's structures.
pub fn vcpu(data: &[u8]) -> bool {
    let Some(state) = decoded::<VcpuState>(VCPU, data) else { return false };
    if let Err(error) = state.check() {
        let _ = error.to_string();
        return false;
    }
    state.mp_state.load::<kvm_mp_state>("mp_state").expect("checked");
    state.regs.load::<kvm_regs>("regs").expect("checked");
    if let SregsState::Sregs(sregs) = &state.sregs {
        sregs.load::<kvm_sregs>("sregs").expect("checked");
    }
    if let Some(xcrs) = &state.xcrs {
        xcrs.load::<kvm_xcrs>("xcrs").expect("checked");
    }
    state.debugregs.load::<kvm_debugregs>("debugregs").expect("checked");
    state.lapic.load::<kvm_lapic_state>("lapic").expect("checked");
    state.events.load::<kvm_vcpu_events>("events").expect("checked");
    true
}

fn blob(len: usize) -> Blob {
    Blob::from(vec![0x5a; len])
}

fn good_vcpu() -> VcpuState {
    let mut nested = vec![0; NESTED_HEADER_LEN];
    nested[4..8].copy_from_slice(&(NESTED_HEADER_LEN as u32).to_le_bytes());
    VcpuState {
        id: 0,
        cpuid: blob(40 * 2),
        mp_state: blob(size_of::<kvm_mp_state>()),
        regs: blob(size_of::<kvm_regs>()),
        sregs: SregsState::Sregs2(blob(SREGS2_LEN)),
        xsave: blob(XSAVE_MIN_LEN),
        xcrs: Some(blob(size_of::<kvm_xcrs>())),
        debugregs: blob(size_of::<kvm_debugregs>()),
        lapic: blob(size_of::<kvm_lapic_state>()),
        msrs: vec![(0x174, 0x10), (0xc000_0081, u64::MAX)],
        events: blob(size_of::<kvm_vcpu_events>()),
        nested: Some(Blob::from(nested)),
        tsc_khz: 2_700_000,
        tsc_offset: Some(u64::MAX),
    }
}

pub(crate) fn vcpu_seeds() -> Vec<Vec<u8>> {
    let full = good_vcpu();
    let mut bare = full.clone();
    (bare.xcrs, bare.nested, bare.tsc_offset) = (None, None, None);
    (bare.cpuid, bare.msrs) = (Blob::default(), Vec::new());
    bare.sregs = SregsState::Sregs(blob(size_of::<kvm_sregs>()));
    vec![to_body(&full), to_body(&bare)]
}

/// The section `kvm/vm`.
pub fn vm(data: &[u8]) -> bool {
    let Some(state) = decoded::<VmState>(VM, data) else { return false };
    if let Err(error) = state.check() {
        let _ = error.to_string();
        return false;
    }
    for chip in [&state.ioapic, &state.pic_master, &state.pic_slave] {
        chip.load::<kvm_irqchip>("chip").expect("checked");
    }
    state.pit.load::<kvm_pit_state2>("pit").expect("checked");
    true
}

fn good_vm() -> VmState {
    let chip = || blob(size_of::<kvm_irqchip>());
    VmState {
        ioapic: chip(),
        pic_master: chip(),
        pic_slave: chip(),
        pit: blob(size_of::<kvm_pit_state2>()),
        clock: ClockState { kvmclock_ns: 1 << 40, flags: 4, realtime_ns: 1, host_tsc: 2, monotonic_ns: 3 },
        gsi_routes: vec![
            GsiRoute::Pin { gsi: 4, chip: 2, pin: 4 },
            GsiRoute::Msi { gsi: 24, address_lo: 0xfee0_0000, address_hi: 0, data: 0x4041 },
        ],
    }
}

pub(crate) fn vm_seeds() -> Vec<Vec<u8>> {
    vec![to_body(&good_vm()), to_body(&VmState { gsi_routes: Vec::new(), ..good_vm() })]
}

/// A line that nobody listens to, and a terminal that nobody reads.
struct Nobody;

impl IrqLine for Nobody {
    fn pulse(&self) {}
}

impl OutputSink for Nobody {
    fn write(&mut self, _bytes: &[u8]) {}
}

/// The section `serial`, and a port that goes on with it.
pub fn serial(data: &[u8]) -> bool {
    let Some(state) = decoded::<SerialState>(SERIAL, data) else { return false };
    let port = Serial::new(Arc::new(Nobody), Box::new(Nobody));
    let restored = port.restore(&state);
    assert_eq!(restored.is_ok(), state.check().is_ok());
    if let Err(error) = restored {
        let _ = error.to_string();
        return false;
    }
    // The port is the guest's now: it may do with it what it likes.
    assert!(port.enqueue(&[0x55; 100]) <= 100 && port.fifo_room() <= 64);
    for value in data {
        let (offset, value) = (u16::from(value % 8), value / 8);
        assert!(offset < COM1_LEN);
        port.write(offset, &[value]);
        port.read(offset, &mut [0]);
    }
    port.save().check().expect("a running port has a good state");
    true
}

fn good_serial() -> SerialState {
    SerialState {
        baud_divisor_low: 12,
        baud_divisor_high: 0,
        interrupt_enable: 3,
        interrupt_identification: 1,
        line_control: 3,
        line_status: 0x60,
        modem_control: 8,
        modem_status: 0xb0,
        scratch: 0,
        in_buffer: Blob::from(b"half a line".to_vec()),
    }
}

pub(crate) fn serial_seeds() -> Vec<Vec<u8>> {
    vec![to_body(&good_serial()), to_body(&SerialState { in_buffer: blob(64), ..good_serial() })]
}

/// The section `platform`.
pub fn platform(data: &[u8]) -> bool {
    decoded::<PlatformState>(PLATFORM, data).is_some()
}

pub(crate) fn platform_seeds() -> Vec<Vec<u8>> {
    [0, 0x32, 0xff].map(|rtc_index| to_body(&PlatformState { rtc_index })).to_vec()
}

/// The section `kvm/time`, and a machine whose time goes on from it.
pub fn time(data: &[u8]) -> bool {
    let Some(time) = decoded::<TimeState>(TIME, data) else { return false };
    let mut state = MachineState {
        vcpus: vec![good_vcpu()],
        vm: good_vm(),
        serial: good_serial(),
        platform: PlatformState::default(),
    };
    let before = state.vm.clock.kvmclock_ns;
    time.go_on(&mut state, &Now { boot_id: [9; 16], realtime_ns: 1 << 60, monotonic_ns: 5 });
    assert!(state.vm.clock.kvmclock_ns >= before);
    state.check().expect("time does no harm to a good state");
    true
}

pub(crate) fn time_seeds() -> Vec<Vec<u8>> {
    let time = TimeState {
        boot_id: [7; 16],
        realtime_ns: 1 << 59,
        monotonic_ns: 3,
        vcpus: vec![(1 << 40, 1 << 59)],
    };
    vec![to_body(&time), to_body(&TimeState { boot_id: [9; 16], ..time })]
}
