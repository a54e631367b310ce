//! Devices with their thread, first without KVM, then in a machine whose guest rings their doorbells.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::machine::{Machine, MachineConfig};
use crate::memory::{Backend, BackendConfig, BackendKind};
use crate::output::OutputSink;
use crate::pci::{ECAM, WINDOW};
use crate::vcpu::NoObserver;
use crate::virtio::testing::*;

const SLOT: u8 = 1;
const BAR: u64 = WINDOW.start + 0x1_0000;
const SOON: Duration = Duration::from_secs(20);

fn backend() -> Backend {
    let kind = BackendKind::Memfd { share: true, hugetlb: None };
    Backend::create(BackendConfig { id: "ram0".into(), size: 64 << 20, kind }).unwrap()
}

fn config(device: Box<Loopback>) -> PciConfig {
    PciConfig { devices: vec![PciDevice { slot: SLOT, name: "loop0".into(), withheld: 0, device }] }
}

/// A guest's hand on the BAR.
struct Bar<'a>(&'a MmioBus);

impl Wires for Bar<'_> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(BAR + offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(BAR + offset, data);
    }
}

/// Has a device work, with the message of its queue 0 to vector 0xc1 of the first processor.
fn start(mmio: &MmioBus) {
    let config = |offset: u64, data: &[u8]| mmio.write(ECAM.start + (u64::from(SLOT) << 15) + offset, data);
    config(4, &[6, 0]);
    config(0x42, &[0, 0x80]);
    unmask(&Bar(mmio));
    bring_up(&Bar(mmio));
    let mut status = [0];
    Bar(mmio).read(0x14, &mut status);
    assert_eq!(status, [0x0f]);
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < SOON, "{what} did not happen within {SOON:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Devices without a machine.
struct Bench {
    devices: Devices,
    mmio: MmioBus,
    remote: Arc<Remote>,
    ram: GuestRam,
}

impl Bench {
    fn new((loopback, remote): (Box<Loopback>, Arc<Remote>)) -> Bench {
        let ram = GuestRam::map(&backend()).unwrap();
        let mmio = MmioBus::new();
        let hypervisor: Arc<dyn Hypervisor> = Arc::new(NoHypervisor::default());
        let devices = Devices::new(config(loopback), &ram, &hypervisor, &PortBus::new(), &mmio).unwrap();
        Bench { devices, mmio, remote, ram }
    }

    fn memory(&self) -> &GuestMemoryMmap {
        self.ram.memory()
    }

    fn ask(&self, byte: u8) {
        offer(self.memory(), byte);
        Bar(&self.mmio).write(0x3000, &[0, 0]);
    }

    fn is_served(&self, count: u16) {
        wait_for("an answer", || used(self.memory()) == count);
    }

    fn stop(&self, deadline: Duration) -> Result<(), MachineError> {
        self.devices.stop(Instant::now() + deadline, deadline)
    }
}

#[test]
fn the_thread_serves_while_the_guest_runs_and_then_alone() {
    let bench = Bench::new(Loopback::new());
    bench.devices.go_on().unwrap();
    start(&bench.mmio);
    bench.ask(1);
    bench.is_served(1);
    for round in 2..20 {
        bench.stop(SOON).unwrap();
        bench.ask(round);
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(used(bench.memory()), u16::from(round) - 1, "served while the guest was stopped");
        bench.devices.go_on().unwrap();
        bench.is_served(round.into());
        assert_eq!(answer(bench.memory()), !round);
    }
    // Stopped twice, and told to go on twice.
    bench.stop(SOON).unwrap();
    bench.stop(SOON).unwrap();
    bench.devices.go_on().unwrap();
    bench.devices.go_on().unwrap();
    bench.ask(20);
    bench.is_served(20);
    assert!(!bench.remote.woken.load(Ordering::SeqCst), "called between drain and resume");
}

#[test]
fn doorbells_that_others_answer_are_left_alone() {
    let bench = Bench::new(Loopback::new());
    bench.devices.go_on().unwrap();
    start(&bench.mmio);
    bench.ask(1);
    bench.is_served(1);
    let be_deaf = |deaf| {
        bench.remote.deaf.store(deaf, Ordering::SeqCst);
        let asked = bench.remote.asked.load(Ordering::SeqCst);
        // Anything that makes the thread look at the device.
        Bar(&bench.mmio).write(0x2000, &[0]);
        wait_for("a look at the device", || bench.remote.asked.load(Ordering::SeqCst) > asked);
    };
    for round in [2, 3] {
        be_deaf(true);
        bench.ask(round);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(used(bench.memory()), u16::from(round) - 1, "served although others do");
        // The bell has rung meanwhile, and is still ringing.
        be_deaf(false);
        bench.is_served(round.into());
    }
}

#[test]
fn a_thread_that_was_lost_is_replaced() {
    let bench = Bench::new(Loopback::new());
    bench.devices.go_on().unwrap();
    start(&bench.mmio);
    for round in 1..10u8 {
        bench.ask(round);
        bench.is_served(round.into());
        bench.stop(SOON).unwrap();
        bench.devices.io.as_ref().unwrap().lose_thread();
        if round % 2 == 0 {
            // A guest that is paused there, and looked at.
            bench.devices.recall().unwrap();
            bench.stop(SOON).unwrap();
        }
        bench.devices.go_on().unwrap();
    }
    assert!(!bench.remote.woken.load(Ordering::SeqCst));
    // And one that never comes again.
    bench.stop(SOON).unwrap();
    bench.devices.io.as_ref().unwrap().lose_thread();
}

#[test]
fn a_device_that_does_not_come_to_rest_is_named() {
    let bench = Bench::new(Loopback::new());
    bench.devices.go_on().unwrap();
    start(&bench.mmio);
    bench.remote.slow.store(true, Ordering::SeqCst);
    bench.remote.busy.store(true, Ordering::SeqCst);
    bench.ask(1);
    let error = bench.stop(Duration::from_millis(5)).unwrap_err().to_string();
    assert_eq!(error, "device 'loop0' did not come to rest within 5ms");
    bench.devices.go_on().unwrap();
    assert_eq!(used(bench.memory()), 0);
    // It does while it is asked.
    let remote = bench.remote.clone();
    let free = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        remote.busy.store(false, Ordering::SeqCst);
    });
    bench.stop(SOON).unwrap();
    free.join().unwrap();
    // Should the thread not have come to the queue before either stop.
    bench.remote.slow.store(false, Ordering::SeqCst);
    bench.devices.go_on().unwrap();
    bench.is_served(1);
}

#[test]
fn watched_descriptors_are_waited_for_while_there_is_a_driver() {
    let (mut loopback, remote) = Loopback::new();
    let watched = Arc::new(EventFd::new().unwrap());
    loopback.watched = Some(watched.clone());
    let bench = Bench::new((loopback, remote));
    bench.devices.go_on().unwrap();
    let ready = || bench.remote.ready.load(Ordering::SeqCst);
    watched.signal().unwrap();
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(ready(), 0);
    start(&bench.mmio);
    wait_for("the first news", || ready() == 1);
    bench.remote.slow.store(true, Ordering::SeqCst);
    bench.ask(7);
    watched.signal().unwrap();
    wait_for("the second", || ready() >= 2);
    bench.stop(SOON).unwrap();
    watched.signal().unwrap();
    std::thread::sleep(Duration::from_millis(5));
    let before = ready();
    bench.devices.go_on().unwrap();
    wait_for("the third", || ready() == before + 1);
    // Without its driver nobody wants to know.
    Bar(&bench.mmio).write(0x14, &[0]);
    std::thread::sleep(Duration::from_millis(5));
    let before = ready();
    watched.signal().unwrap();
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(ready(), before);
}

#[test]
fn slots_are_there_and_free() {
    let ram = GuestRam::map(&backend()).unwrap();
    let hypervisor: Arc<dyn Hypervisor> = Arc::new(NoHypervisor::default());
    let error = |slots: &[u8]| {
        let device = |slot: &u8| PciDevice {
            slot: *slot,
            name: format!("d{slot}"),
            withheld: 0,
            device: Loopback::new().0,
        };
        let config = PciConfig { devices: slots.iter().map(device).collect() };
        let made = Devices::new(config, &ram, &hypervisor, &PortBus::new(), &MmioBus::new());
        made.err().map(|error| error.to_string())
    };
    assert_eq!(error(&[1, 31, 2]), None);
    assert_eq!(error(&[0]).unwrap(), "device 'd0' cannot be in PCI slot 0: it is the host bridge's");
    assert_eq!(error(&[32]).unwrap(), "device 'd32' cannot be in PCI slot 32: the last one is 31");
    assert_eq!(error(&[4, 4]).unwrap(), "device 'd4' cannot be in PCI slot 4: another device is there");
}

/// Enables its LAPIC, then counts and rings the doorbell of queue 0.
#[rustfmt::skip]
const RINGER: &[u8] = &[
    0xc7, 0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0x00, 0x00, //     mov dword [0xfee000f0], 0x1ff
    0x31, 0xf6,                                                 //     xor esi, esi
    0x46,                                                       // 1:  inc esi
    0x89, 0x35, 0x00, 0x20, 0x00, 0x00,                         //     mov [0x2000], esi
    0x66, 0xc7, 0x05, 0x00, 0x30, 0x01, 0xc0, 0x00, 0x00,       //     mov word [0xc0013000], 0
    0xeb, 0xee,                                                 //     jmp 1b
];
const ENTRY: u64 = 0x8000;

struct Nobody;

impl OutputSink for Nobody {
    fn write(&mut self, _bytes: &[u8]) {}
}

fn machine(backend: &Backend, device: Box<Loopback>) -> Machine {
    Machine::new(MachineConfig {
        ram: GuestRam::map(backend).unwrap(),
        vcpus: 1,
        serial: Box::new(Nobody),
        observer: Arc::new(NoObserver),
        pci: Some(config(device)),
    })
    .unwrap()
}

fn have_kvm(test: &str) -> bool {
    let have = std::path::Path::new("/dev/kvm").exists();
    if !have {
        eprintln!("SKIPPED {test}: no /dev/kvm");
    }
    have
}

/// Whether vector 0xc1 waits in the LAPIC.
fn is_requested(machine: &Machine) -> bool {
    let state = machine.save().unwrap();
    state.vcpus[0].lapic.as_slice()[0x260] & 1 << 1 != 0
}

#[test]
fn a_guest_rings_is_interrupted_and_goes_on_in_another_machine() {
    if !have_kvm("a_guest_rings_is_interrupted_and_goes_on_in_another_machine") {
        return;
    }
    let backend = backend();
    let (loopback, remote) = Loopback::new();
    let source = machine(&backend, loopback);
    let memory = source.ram().memory().clone();
    memory.write_slice(RINGER, GuestAddress(ENTRY)).unwrap();
    let flat = |regs: &mut kvm_bindings::kvm_regs, sregs: &mut kvm_bindings::kvm_sregs| {
        let mut segment = sregs.ds;
        (segment.limit, segment.g, segment.db) = (u32::MAX, 1, 1);
        (sregs.ds, sregs.es, sregs.ss) = (segment, segment, segment);
        sregs.cs = kvm_bindings::kvm_segment { selector: 8, type_: 11, base: 0, ..segment };
        sregs.cr0 |= 1;
        (regs.rip, regs.rflags) = (ENTRY, 2);
    };
    source.set_entry(&flat).unwrap();
    source.run().unwrap();
    let counted = || memory.read_obj::<u32>(GuestAddress(0x2000)).unwrap();
    wait_for("counting, with the LAPIC enabled", || counted() > 0);
    start(source.mmio());
    offer(&memory, 0x11);
    wait_for("an answer", || used(&memory) == 1);
    source.pause(SOON).unwrap();
    assert!(is_requested(&source), "the message has reached the LAPIC before the machine was saved");
    let other = EventFd::new().unwrap();
    source.vm().attach_doorbell(BAR + 0x3000, &other).expect_err("KVM has the doorbell");
    // Available, and never rung for: the one that takes over has to look.
    offer(&memory, 0x22);
    let mut main = FrameWriter::default();
    source.save_devices(&mut main).unwrap();
    let state = source.save().unwrap();
    assert_eq!(source.device_sections().len(), 4);
    assert_eq!(source.unsavable_devices(), [""; 0]);
    drop(source);
    assert_eq!(remote.served.load(Ordering::SeqCst), 1);

    let (loopback, remote) = Loopback::new();
    let target = machine(&backend, loopback);
    target.prepare_devices();
    target.ready().unwrap();
    target.restore(&state).unwrap();
    let mut main = Frame::parse(&main.finish(1)).unwrap();
    target.load_devices(&mut main).unwrap();
    assert_eq!(main.remaining().len(), 0);
    target.vm().attach_doorbell(BAR + 0x3000, &other).expect_err("KVM has the doorbell");
    assert!(is_requested(&target));
    assert_eq!(used(&memory), 1, "nothing is touched before the guest runs");
    let memory = target.ram().memory().clone();
    target.run().unwrap();
    wait_for("the answer that was due", || used(&memory) == 2);
    assert_eq!(answer(&memory), !0x22);
    offer(&memory, 0x33);
    wait_for("another answer", || used(&memory) == 3);
    assert_eq!(remote.served.load(Ordering::SeqCst), 2);

    // A device that cannot stop keeps the machine from stopping, and the guest goes on.
    remote.busy.store(true, Ordering::SeqCst);
    target.pause(Duration::from_millis(200)).unwrap_err();
    remote.busy.store(false, Ordering::SeqCst);
    offer(&memory, 0x44);
    wait_for("an answer afterwards", || used(&memory) == 4);

    // After a reset there is a machine as if it had just been switched on.
    target.pause(SOON).unwrap();
    target.reset(&flat).unwrap();
    target.vm().attach_doorbell(BAR + 0x3000, &other).expect("KVM does not have the doorbell any more");
    target.vm().detach_doorbell(BAR + 0x3000, &other).unwrap();
    for ring in [DESCRIPTORS, AVAILABLE, USED] {
        memory.write_slice(&[0; 4096], GuestAddress(ring)).unwrap();
    }
    target.run().unwrap();
    start(target.mmio());
    offer(&memory, 0x55);
    wait_for("an answer after the reset", || used(&memory) == 1);
}

#[test]
fn a_device_that_cannot_be_saved_is_named() {
    if !have_kvm("a_device_that_cannot_be_saved_is_named") {
        return;
    }
    let (mut loopback, _) = Loopback::new();
    loopback.savable = false;
    let machine = machine(&backend(), loopback);
    assert_eq!(machine.unsavable_devices(), ["loop0"]);
    let error = machine.save_devices(&mut FrameWriter::default()).unwrap_err();
    assert_eq!(error.to_string(), "device 'loop0'");
}
