//! Whole machines on this host's KVM: stop, save, build anew on the same memory, restore, go on.

mod machine_guests;

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_debugregs, kvm_pit_state2, kvm_regs, kvm_vcpu_events, kvm_xcrs};
use machine_guests::*;
use oslib::clock::monotonic_ns;
use vm_memory::{Bytes, GuestAddress};
use vmm_core::boot::{self, BootRequest, KernelImage};
use vmm_core::error::VcpuError;
use vmm_core::machine::{Machine, MachineError, default_routes};
use vmm_core::memory::{Backend, GuestRam};
use vmm_core::payload::{self, Command, GuestWords, Header, Mailbox, Status};
use vmm_core::state::{Blob, ClockState, GsiRoute, MachineState, SregsState, VcpuState};
use vmm_core::vcpu::{RunObserver, VcpuEvent};

const MIB: u64 = 1 << 20;

/// Over the wire and back, as an update does.
fn travel(state: &MachineState) -> MachineState {
    postcard::from_bytes(&postcard::to_allocvec(state).unwrap()).unwrap()
}

#[test]
fn guests_go_on_in_a_new_machine_on_the_same_memory() {
    if !have_kvm("guests_go_on_in_a_new_machine_on_the_same_memory") {
        return;
    }
    for vcpus in [1, 2, 4, 8] {
        let backend = backend(64 * MIB);
        let (source, _) = start(&backend, vcpus, COUNT);
        wait_for_beats(&source, vcpus);
        source.pause(DEADLINE).unwrap();
        assert!(source.is_paused());
        let state = travel(&source.save().unwrap());
        let counted: Vec<u32> = (0..vcpus).map(|v| counter(&source, v)).collect();
        drop(source);

        let (target, _) = machine(&adopt(&backend), vcpus);
        target.restore(&state).unwrap();
        // Nothing runs, and nothing was written, before it is told to.
        assert_eq!((0..vcpus).map(|v| counter(&target, v)).collect::<Vec<_>>(), counted);
        target.run().unwrap();
        wait_for_beats(&target, vcpus);
        target.pause(DEADLINE).unwrap();
        // The count is kept in a register: had it been lost, the guest would have begun anew.
        for (vcpu, before) in counted.iter().enumerate() {
            assert!(counter(&target, vcpu) > *before, "vCPU {vcpu} of {vcpus}");
        }
    }
}

/// Tells whether this host's KVM really offsets the guest's TSC. One that does starts it near zero; `kvm_pvm` takes every
/// offset, keeps none and shows the guest the host's TSC.
fn has_tsc_offset(vcpu: &VcpuState) -> bool {
    vcpu.tsc_offset.is_some_and(|offset| offset != 0)
}

/// Gives every part of a state a value that no machine starts with.
fn make_unusual(state: &mut MachineState) {
    for (vcpu, unusual) in state.vcpus.iter_mut().zip(1u64..) {
        let mut regs: kvm_regs = vcpu.regs.load("regs").unwrap();
        (regs.r8, regs.r15) = (0x8888 * unusual, u64::MAX - unusual);
        vcpu.regs = Blob::of(&regs);
        let mut debugregs: kvm_debugregs = vcpu.debugregs.load("debugregs").unwrap();
        debugregs.db = [0x1000, 0x2000, 0x3000, 0x4000 * unusual];
        vcpu.debugregs = Blob::of(&debugregs);
        let mut xsave = vcpu.xsave.as_slice().to_vec();
        xsave[160..176].fill(0xa0 + unusual as u8); // XMM0
        xsave[512] |= 3; // the header says that x87 and SSE state is there
        vcpu.xsave = xsave.into();
        let mut xcrs: kvm_xcrs = vcpu.xcrs.as_ref().unwrap().load("xcrs").unwrap();
        xcrs.xcrs[0].value = 3;
        vcpu.xcrs = Some(Blob::of(&xcrs));
        let mut lapic = vcpu.lapic.as_slice().to_vec();
        lapic[0x210] = 0x10 * unusual as u8; // requested interrupts among vectors 32 to 39
        lapic[0x370] = 0x40 + unusual as u8; // the vector of the error interrupt
        vcpu.lapic = lapic.into();
        let mut events: kvm_vcpu_events = vcpu.events.load("events").unwrap();
        events.nmi.masked = 1;
        vcpu.events = Blob::of(&events);
        let gs_base = vcpu.msrs.iter_mut().find(|(index, _)| *index == 0xc000_0102).unwrap();
        gs_base.1 = 0x7000 * unusual;
        if has_tsc_offset(vcpu) {
            vcpu.tsc_offset = vcpu.tsc_offset.map(|offset| offset.wrapping_sub(unusual << 40));
        }
    }
    let vm = &mut state.vm;
    let mut ioapic = vm.ioapic.as_slice().to_vec();
    ioapic[8 + 24 + 8 * 5] = 0x35; // the vector of pin 5
    vm.ioapic = ioapic.into();
    let mut pic = vm.pic_slave.as_slice().to_vec();
    pic[8 + 2] = 0xa5; // masked lines
    vm.pic_slave = pic.into();
    let mut pit: kvm_pit_state2 = vm.pit.load("pit").unwrap();
    (pit.channels[2].count, pit.channels[2].mode) = (0x1234, 3);
    vm.pit = Blob::of(&pit);
    state.platform.rtc_index = 0x32;
}

/// Takes out of a state what goes on while the machine stands.
fn without_time(state: &MachineState) -> MachineState {
    let mut state = state.clone();
    state.vm.clock = ClockState::default();
    let mut pit: kvm_pit_state2 = state.vm.pit.load("pit").unwrap();
    for channel in &mut pit.channels {
        channel.count_load_time = 0;
    }
    state.vm.pit = Blob::of(&pit);
    state
}

#[test]
fn a_restored_machine_saves_the_same_state() {
    if !have_kvm("a_restored_machine_saves_the_same_state") {
        return;
    }
    for vcpus in [1, 3] {
        let backend = backend(64 * MIB);
        let (source, _) = start(&backend, vcpus, COUNT);
        source.set_gsi_routes(&default_routes()).unwrap();
        wait_for_beats(&source, vcpus);
        source.pause(DEADLINE).unwrap();
        source.serial().enqueue(b"unread");
        let mut first = source.save().unwrap();
        make_unusual(&mut first);
        let (target, _) = machine(&adopt(&backend), vcpus);
        target.restore(&first).unwrap();
        let second = target.save().unwrap();
        assert!(second.vm.clock.kvmclock_ns > first.vm.clock.kvmclock_ns);
        let (first, second) = (without_time(&first), without_time(&second));
        for (a, b) in first.vcpus.iter().zip(&second.vcpus) {
            let blobs = |v: &VcpuState| {
                let (SregsState::Sregs2(sregs) | SregsState::Sregs(sregs)) = &v.sregs;
                [&v.cpuid, &v.mp_state, &v.regs, sregs, &v.xsave, &v.debugregs, &v.lapic, &v.events]
                    .map(Blob::clone)
            };
            for (nth, (a, b)) in blobs(a).iter().zip(&blobs(b)).enumerate() {
                assert_eq!(a.as_slice(), b.as_slice(), "blob {nth}");
            }
        }
        assert_eq!(first, second);
    }
}

/// The test above notices each step of a restore that is left out.
#[cfg(feature = "fault-injection")]
#[test]
fn a_step_that_is_left_out_is_noticed() {
    if !have_kvm("a_step_that_is_left_out_is_noticed") {
        return;
    }
    let run = |skipped: &str| {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_restored_machine_saves_the_same_state"])
            .env("CPR_TEST_SKIP_RESTORE", skipped)
            .output()
            .unwrap()
            .status
            .success()
    };
    assert!(run(""), "nothing left out");
    let (machine, _) = machine(&backend(64 * MIB), 1);
    let can_offset = has_tsc_offset(&machine.save().unwrap().vcpus[0]);
    let steps = [
        "cpuid",
        "tsc-offset",
        "mp-state",
        "regs",
        "sregs",
        "xsave",
        "xcrs",
        "debugregs",
        "lapic",
        "msrs",
        "events",
        "pic",
        "irqchip",
        "pit",
        "kvmclock",
        "gsi-routes",
        "serial",
        "platform",
    ];
    let steps = steps.into_iter().filter(|&step| can_offset || step != "tsc-offset");
    let unnoticed: Vec<_> = steps.filter(|step| run(step)).collect();
    assert!(unnoticed.is_empty(), "nobody noticed that these were left out: {unnoticed:?}");
}

#[test]
fn a_restore_writes_no_guest_memory() {
    if !have_kvm("a_restore_writes_no_guest_memory") {
        return;
    }
    let size = 8 * MIB;
    let backend = backend(size);
    let (source, _) = start(&backend, 2, COUNT);
    wait_for_beats(&source, 2);
    source.pause(DEADLINE).unwrap();
    let mut state = source.save().unwrap();
    // A guest with a paravirtual clock: its page is KVM's to write once the guest runs, not before.
    for (index, value) in state.vcpus.iter_mut().flat_map(|vcpu| &mut vcpu.msrs) {
        if *index == 0x4b56_4d01 {
            *value = 0x40_0000 | 1;
        }
    }
    drop(source);
    let contents = || {
        let mut bytes = vec![0; size as usize];
        backend.fd().unwrap().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let before = contents();
    let (target, _) = machine(&adopt(&backend), 2);
    target.restore(&state).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(before == contents());
    target.run().unwrap();
    wait_for_beats(&target, 2);
    assert!(
        before[0x40_0000..][..32] != contents()[0x40_0000..][..32],
        "KVM writes the clock as the guest runs"
    );
}

/// The payload's way to its mailboxes.
struct Words<'a>(&'a GuestRam);

impl GuestWords for Words<'_> {
    fn read_u64(&self, gpa: u64) -> u64 {
        self.0.memory().load(GuestAddress(gpa), Ordering::Relaxed).unwrap()
    }

    fn write_u64(&self, gpa: u64, value: u64) {
        self.0.memory().store(value, GuestAddress(gpa), Ordering::Relaxed).unwrap();
    }
}

#[test]
fn a_long_mode_guest_survives_update_after_update() {
    if !have_kvm("a_long_mode_guest_survives_update_after_update") {
        return;
    }
    const VCPUS: usize = 2;
    let backend = backend(64 * MIB);
    let observing = GuestRam::map(&backend).unwrap();
    let words = Words(&observing);
    let (mut source, _) = machine(&backend, VCPUS);
    let kernel = KernelImage::BuiltIn { name: "payload", bytes: payload::ELF };
    let request = BootRequest { kernel, initrd: None, cmdline: "cpus=2", vcpus: VCPUS, pci: false };
    let entry = boot::load(source.ram().memory(), &request).unwrap();
    source.set_entry(&|regs, sregs| entry.apply(regs, sregs)).unwrap();
    source.run().unwrap();
    wait_for("both vCPUs in ring 3", || Header::new(&words).started() == VCPUS as u64);
    let boxes: Vec<_> = (0..VCPUS as u32).map(|vcpu| Mailbox::new(&words, vcpu)).collect();
    let bytes = 4 * MIB;
    let filled = boxes[0].submit(Command::Fill { offset: 0, bytes, seed: 7 });
    wait_for("the fill", || boxes[0].outcome(filled).is_some());
    for round in 0..10 {
        source.pause(DEADLINE).unwrap();
        let state = travel(&source.save().unwrap());
        let beats: Vec<u64> = boxes.iter().map(Mailbox::beats).collect();
        // Every other target is built while the source still exists, and knows the CPUID before the state.
        let (target, _) = machine(&adopt(&backend), VCPUS);
        if round % 2 == 0 {
            target.ready().unwrap();
            target.preset_cpuid(&source.cpuid().unwrap()).unwrap();
        }
        target.restore(&state).unwrap();
        target.run().unwrap();
        source = target;
        wait_for("beats after the update", || {
            boxes.iter().zip(&beats).all(|(b, before)| b.beats() > *before)
        });
    }
    let checked = boxes[1].submit(Command::Verify { offset: 0, bytes, seed: 7 });
    wait_for("the check", || boxes[1].outcome(checked).is_some());
    let outcome = boxes[1].outcome(checked).unwrap();
    assert_eq!((outcome.status, outcome.results[0]), (Status::Ok, 0), "words that differ");
    for mailbox in &boxes {
        assert_eq!(mailbox.read(payload::field::TSC_BACKWARDS), 0);
    }
}

#[test]
fn a_machine_may_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Machine>();
}

#[test]
fn saving_twice_and_going_on_is_harmless() {
    if !have_kvm("saving_twice_and_going_on_is_harmless") {
        return;
    }
    let backend = backend(64 * MIB);
    let (machine, _) = start(&backend, 2, COUNT);
    for _ in 0..50 {
        wait_for_beats(&machine, 1);
        machine.pause(DEADLINE).unwrap();
        let first = machine.save().unwrap();
        let second = machine.save().unwrap();
        assert_eq!(first.vcpus, second.vcpus);
        machine.run().unwrap();
    }
    wait_for_beats(&machine, 2);
}

#[test]
fn pausing_and_running_in_quick_succession_never_hangs() {
    if !have_kvm("pausing_and_running_in_quick_succession_never_hangs") {
        return;
    }
    let backend = backend(64 * MIB);
    let (machine, _) = start(&backend, 4, COUNT);
    for round in 0..300 {
        machine.pause(DEADLINE).unwrap();
        assert!(machine.is_paused());
        machine.run().unwrap();
        if round % 3 == 0 {
            std::thread::yield_now();
        }
    }
    wait_for_beats(&machine, 4);
}

#[test]
fn serial_input_that_was_not_read_survives() {
    if !have_kvm("serial_input_that_was_not_read_survives") {
        return;
    }
    let backend = backend(64 * MIB);
    let (source, console) = start(&backend, 1, ECHO);
    wait_for_beats(&source, 1);
    assert_eq!(source.serial().enqueue(b"typed before"), 12);
    wait_for_beats(&source, 1);
    source.pause(DEADLINE).unwrap();
    assert_eq!(console.text(), "");
    let state = travel(&source.save().unwrap());
    drop(source);

    let (target, console) = machine(&adopt(&backend), 1);
    target.restore(&state).unwrap();
    assert_eq!(target.serial().fifo_room(), 64 - 12);
    target.ram().memory().write_obj(1u32, GuestAddress(MAY_READ)).unwrap();
    target.run().unwrap();
    wait_for("the echo", || console.text() == "typed before");
    assert_eq!(target.serial().enqueue(b", and after"), 11);
    wait_for("the second echo", || console.text() == "typed before, and after");
}

#[test]
fn kvmclock_goes_on_across_the_gap() {
    if !have_kvm("kvmclock_goes_on_across_the_gap") {
        return;
    }
    let backend = backend(64 * MIB);
    let (source, _) = start(&backend, 1, COUNT);
    wait_for_beats(&source, 1);
    source.pause(DEADLINE).unwrap();
    let state = source.save().unwrap();
    drop(source);
    std::thread::sleep(Duration::from_millis(50));
    let (target, _) = machine(&adopt(&backend), 1);
    target.restore(&state).unwrap();
    let before = monotonic_ns();
    let clock = target.vm().fd().get_clock().unwrap().clock;
    let passed = before - state.vm.clock.monotonic_ns;
    let advanced = clock - state.vm.clock.kvmclock_ns;
    assert!(passed >= 50_000_000);
    assert!(advanced.abs_diff(passed) < 1_000_000, "{passed} ns passed, the clock advanced by {advanced}");
}

#[derive(Default)]
struct Stamps {
    first_runs: AtomicU64,
    last_exits: AtomicU64,
    first_run_ns: AtomicU64,
    last_exit_ns: AtomicU64,
}

impl RunObserver for Stamps {
    fn first_run(&self, _vcpu: usize) {
        self.first_run_ns.store(monotonic_ns(), Ordering::SeqCst);
        self.first_runs.fetch_add(1, Ordering::SeqCst);
    }

    fn last_exit(&self, _vcpu: usize) {
        self.last_exit_ns.store(monotonic_ns(), Ordering::SeqCst);
        self.last_exits.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn observers_see_each_pause_from_both_sides() {
    if !have_kvm("observers_see_each_pause_from_both_sides") {
        return;
    }
    let backend = backend(64 * MIB);
    let stamps = Arc::new(Stamps::default());
    let (machine, _) = observed(&backend, 2, stamps.clone());
    load(&machine, ECHO);
    machine.set_entry(&flat).unwrap();
    for round in 1..=20 {
        let before = monotonic_ns();
        machine.run().unwrap();
        wait_for("both first runs", || stamps.first_runs.load(Ordering::SeqCst) == 2 * round);
        assert!(stamps.first_run_ns.load(Ordering::SeqCst) >= before);
        machine.pause(DEADLINE).unwrap();
        assert_eq!(stamps.last_exits.load(Ordering::SeqCst), 2 * round);
        let end = stamps.last_exit_ns.load(Ordering::SeqCst);
        assert!(end >= stamps.first_run_ns.load(Ordering::SeqCst) && end <= monotonic_ns());
    }
}

#[test]
fn threads_rest_and_come_back_while_their_vcpus_stay() {
    if !have_kvm("threads_rest_and_come_back_while_their_vcpus_stay") {
        return;
    }
    const VCPUS: usize = 3;
    let backend = backend(64 * MIB);
    let observing = GuestRam::map(&backend).unwrap();
    let words = Words(&observing);
    let (machine, _) = machine(&backend, VCPUS);
    let kernel = KernelImage::BuiltIn { name: "payload", bytes: payload::ELF };
    let request = BootRequest { kernel, initrd: None, cmdline: "cpus=3", vcpus: VCPUS, pci: false };
    let entry = boot::load(machine.ram().memory(), &request).unwrap();
    machine.set_entry(&|regs, sregs| entry.apply(regs, sregs)).unwrap();
    machine.run().unwrap();
    wait_for("all vCPUs in ring 3", || Header::new(&words).started() == VCPUS as u64);
    let boxes: Vec<_> = (0..VCPUS as u32).map(|vcpu| Mailbox::new(&words, vcpu)).collect();
    let beats = || boxes.iter().map(Mailbox::beats).collect::<Vec<_>>();
    let fds = machine.kvm_fds().unwrap();
    let threads = machine.thread_ids().unwrap();
    for round in 0..10 {
        // Every other time they are told ahead.
        if round % 2 == 0 {
            machine.rest_when_paused();
        }
        machine.pause(DEADLINE).unwrap();
        let counted = beats();
        machine.rest_threads().unwrap();
        machine.rest_threads().unwrap();
        let before = machine.save().unwrap();
        assert!(machine.is_paused());
        if round % 3 == 0 {
            machine.recall_threads().unwrap();
            machine.recall_threads().unwrap();
            assert_eq!(machine.save().unwrap().vcpus, before.vcpus, "saved after the threads came back");
        }
        assert_eq!(beats(), counted);
        machine.run().unwrap();
        wait_for("beats after a rest", || beats().iter().zip(&counted).all(|(now, before)| now > before));
        assert_eq!(machine.thread_ids().unwrap(), threads, "they are the same ones");
    }
    assert_eq!(machine.kvm_fds().unwrap(), fds, "no vCPU was made anew");
    for mailbox in &boxes {
        assert_eq!(mailbox.read(payload::field::TSC_BACKWARDS), 0);
    }
}

#[test]
fn a_machine_whose_threads_rest_can_be_restored_and_dropped() {
    if !have_kvm("a_machine_whose_threads_rest_can_be_restored_and_dropped") {
        return;
    }
    let backend = backend(64 * MIB);
    let (source, _) = start(&backend, 2, COUNT);
    wait_for_beats(&source, 2);
    source.pause(DEADLINE).unwrap();
    let state = source.save().unwrap();
    source.rest_threads().unwrap();
    // Each vCPU keeps the VM.
    let vm = Arc::downgrade(source.vm());
    drop(source);
    assert!(vm.upgrade().is_none());

    let (target, _) = machine(&adopt(&backend), 2);
    target.rest_threads().unwrap();
    target.restore(&state).unwrap();
    target.run().unwrap();
    wait_for_beats(&target, 2);
    target.pause(DEADLINE).unwrap();
    target.pause(DEADLINE).unwrap();
}

#[test]
fn a_running_machine_keeps_its_threads() {
    if !have_kvm("a_running_machine_keeps_its_threads") {
        return;
    }
    let backend = backend(64 * MIB);
    let (machine, _) = start(&backend, 2, COUNT);
    let error = machine.rest_threads().unwrap_err();
    assert!(matches!(error, MachineError::Vcpu { source: VcpuError::Running, .. }), "{error}");
    assert_eq!(machine.thread_ids().unwrap().len(), 2);
    wait_for_beats(&machine, 2);
}

/// A port that a vCPU waits at while it is locked; the number is of those that are at it.
#[derive(Default)]
struct Gate(std::sync::Mutex<()>, AtomicU64);

impl vmm_core::ports::PortDevice for Gate {
    fn read(&self, _: u16, _: &mut [u8]) {}
    fn write(&self, _: u16, _: &[u8]) {
        self.1.fetch_add(1, Ordering::SeqCst);
        drop(self.0.lock().unwrap());
        self.1.fetch_sub(1, Ordering::SeqCst);
    }
}

/// After it has started the others, the first vCPU writes to port 0x680 and counts its writes.
fn writes_and_counts() -> Vec<u8> {
    let (starting, _counting) = COUNT.split_at(COUNT.len() - 9);
    #[rustfmt::skip]
    let writing = [
        0x66, 0xba, 0x80, 0x06,                                 //     mov dx, 0x680
        0x46,                                                   // 2:  inc esi
        0x89, 0x35, 0x00, 0x20, 0x00, 0x00,                     //     mov [0x2000], esi
        0xee,                                                   //     out dx, al
        0xeb, 0xf6,                                             //     jmp 2b
    ];
    [starting, &writing[..]].concat()
}

/// A machine whose first vCPU writes to a gated port all the time, and the others count; everything runs.
fn at_a_gate(backend: &Backend, vcpus: usize) -> (Machine, Arc<Gate>) {
    let (machine, _) = machine(backend, vcpus);
    let gate = Arc::new(Gate::default());
    machine.ports().insert(0x680, 1, "gate", gate.clone()).unwrap();
    load(&machine, &writes_and_counts());
    machine.set_entry(&flat).unwrap();
    machine.run().unwrap();
    wait_for_beats(&machine, vcpus);
    (machine, gate)
}

/// All vCPUs but the first go on counting.
fn the_others_count(machine: &Machine, vcpus: usize) {
    let before: Vec<u32> = (1..vcpus).map(|vcpu| counter(machine, vcpu)).collect();
    wait_for("the others' counting", || (1..vcpus).all(|vcpu| counter(machine, vcpu) > before[vcpu - 1]));
}

#[test]
fn a_vcpu_that_a_device_holds_up_holds_up_no_other() {
    if !have_kvm("a_vcpu_that_a_device_holds_up_holds_up_no_other") {
        return;
    }
    const VCPUS: usize = 5;
    let backend = backend(64 * MIB);
    let (machine, gate) = at_a_gate(&backend, VCPUS);
    machine.pause(DEADLINE).unwrap();
    let held = gate.0.lock().unwrap();
    machine.run().unwrap();
    the_others_count(&machine, VCPUS);
    // Long enough for more than the first turn of each.
    the_others_count(&machine, VCPUS);
    drop(held);
    wait_for_beats(&machine, VCPUS);
}

#[test]
fn a_stop_that_a_device_prevents_is_undone_for_every_vcpu() {
    if !have_kvm("a_stop_that_a_device_prevents_is_undone_for_every_vcpu") {
        return;
    }
    const VCPUS: usize = 3;
    let backend = backend(64 * MIB);
    let (machine, gate) = at_a_gate(&backend, VCPUS);
    for _ in 0..5 {
        let held = gate.0.lock().unwrap();
        wait_for("a vCPU at the port", || gate.1.load(Ordering::SeqCst) == 1);
        let error = machine.pause(Duration::from_millis(200)).unwrap_err();
        assert!(matches!(&error, MachineError::PauseTimedOut { vcpus, .. } if *vcpus == [0]), "{error}");
        the_others_count(&machine, VCPUS);
        drop(held);
        wait_for_beats(&machine, VCPUS);
    }
    machine.pause(DEADLINE).unwrap();
}

#[test]
fn power_events_reach_the_owner() {
    if !have_kvm("power_events_reach_the_owner") {
        return;
    }
    let expected =
        [(RESET, VcpuEvent::Reset { source: "ACPI" }), (TRIPLE_FAULT, VcpuEvent::TripleFault { vcpu: 0 })];
    for (code, event) in expected {
        let backend = backend(64 * MIB);
        let (machine, _) = start(&backend, 1, code);
        assert_eq!(next_event(&machine), event);
        machine.pause(DEADLINE).unwrap();
    }
}

fn next_event(machine: &Machine) -> VcpuEvent {
    let start = Instant::now();
    loop {
        if let Some(event) = machine.events().try_recv() {
            return event;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "no event");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn reset_starts_over() {
    if !have_kvm("reset_starts_over") {
        return;
    }
    let backend = backend(64 * MIB);
    let (machine, _) = start(&backend, 2, COUNT);
    wait_for_beats(&machine, 2);
    wait_for("a count worth losing", || counter(&machine, 0) > 20_000);
    machine.serial().enqueue(b"stale");
    machine.pause(DEADLINE).unwrap();
    let before = machine.save().unwrap();
    machine.reset(&flat).unwrap();
    assert_eq!(machine.serial().fifo_room(), 64);
    let after = machine.save().unwrap();
    assert_eq!(after.vcpus[1].cpuid, before.vcpus[1].cpuid);
    assert_ne!(
        after.vcpus[1].mp_state, before.vcpus[1].mp_state,
        "the second vCPU waits to be started again"
    );
    assert!(after.vm.clock.kvmclock_ns > before.vm.clock.kvmclock_ns);
    let ram = machine.ram().memory();
    ram.write_obj(0u64, GuestAddress(COUNTERS)).unwrap();
    machine.run().unwrap();
    wait_for_beats(&machine, 2);
    machine.pause(DEADLINE).unwrap();
    // And what was reset can be updated.
    let state = machine.save().unwrap();
    drop(machine);
    let (target, _) = self::machine(&adopt(&backend), 2);
    target.restore(&state).unwrap();
    target.run().unwrap();
    wait_for_beats(&target, 2);
}

#[test]
fn a_state_that_does_not_fit_touches_nothing() {
    if !have_kvm("a_state_that_does_not_fit_touches_nothing") {
        return;
    }
    let backend = backend(64 * MIB);
    let (source, _) = start(&backend, 2, COUNT);
    wait_for_beats(&source, 2);
    source.pause(DEADLINE).unwrap();
    let state = source.save().unwrap();

    let (target, _) = machine(&adopt(&backend), 1);
    let error = target.restore(&state).unwrap_err();
    assert_eq!(error.to_string(), "the saved state has 2 vCPUs, this machine has 1");
    let (target, _) = machine(&adopt(&backend), 2);
    let untouched = target.save().unwrap();
    let mut broken = state.clone();
    broken.vcpus[1].lapic = vec![0; 1023].into();
    assert!(matches!(target.restore(&broken), Err(MachineError::State(_))));
    assert_eq!(target.save().unwrap().vcpus, untouched.vcpus);
    // The same machine takes the right one.
    target.restore(&state).unwrap();
}

#[test]
fn an_msr_that_kvm_refuses_is_named() {
    if !have_kvm("an_msr_that_kvm_refuses_is_named") {
        return;
    }
    let backend = backend(64 * MIB);
    let (source, _) = start(&backend, 1, COUNT);
    source.pause(DEADLINE).unwrap();
    let mut state = source.save().unwrap();
    assert!(state.vcpus[0].msrs.len() > 20);
    state.vcpus[0].msrs.insert(5, (0xdead_0001, 7));
    let (target, _) = machine(&adopt(&backend), 1);
    let error = target.restore(&state).unwrap_err();
    let MachineError::Vcpu { index: 0, source } = &error else { panic!("{error:?}") };
    assert!(matches!(source, VcpuError::MsrWrite { index: 0xdead_0001, value: 7, done: 5, .. }), "{source}");
}

#[test]
fn a_running_machine_is_not_saved() {
    if !have_kvm("a_running_machine_is_not_saved") {
        return;
    }
    let backend = backend(64 * MIB);
    let (machine, _) = start(&backend, 1, COUNT);
    let error = machine.save().unwrap_err();
    assert!(matches!(error, MachineError::Vcpu { source: VcpuError::Running, .. }), "{error}");
    wait_for_beats(&machine, 1);
}

#[test]
fn a_vcpu_that_a_device_holds_up_is_named_and_goes_on() {
    if !have_kvm("a_vcpu_that_a_device_holds_up_is_named_and_goes_on") {
        return;
    }
    let backend = backend(64 * MIB);
    let (machine, _) = self::machine(&backend, 1);
    let slow = Arc::new(Gate::default());
    machine.ports().remove(0x600);
    machine.ports().insert(0x602, 1, "slow", slow.clone()).unwrap();
    load(&machine, RESET);
    machine.set_entry(&flat).unwrap();
    let held = slow.0.lock().unwrap();
    machine.run().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let error = machine.pause(Duration::from_millis(20)).unwrap_err();
    assert!(matches!(&error, MachineError::PauseTimedOut { vcpus, .. } if *vcpus == [0]), "{error}");
    assert!(!machine.is_paused());
    drop(held);
    machine.pause(DEADLINE).unwrap();
}

#[test]
fn descriptors_and_routes_are_told() {
    if !have_kvm("descriptors_and_routes_are_told") {
        return;
    }
    let backend = backend(64 * MIB);
    let (machine, _) = machine(&backend, 3);
    let fds = machine.kvm_fds().unwrap();
    assert_eq!(fds.len(), 2 + 3);
    for fd in fds {
        let target = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
        assert!(target.to_string_lossy().contains("kvm"), "{target:?}");
    }
    let mut routes = default_routes();
    routes.push(GsiRoute::Msi { gsi: 24, address_lo: 0xfee0_0000, address_hi: 0, data: 0x41 });
    machine.set_gsi_routes(&routes).unwrap();
    assert_eq!(machine.gsi_routes(), routes);
}

#[test]
fn an_impossible_number_of_vcpus_is_refused() {
    if !have_kvm("an_impossible_number_of_vcpus_is_refused") {
        return;
    }
    for vcpus in [0, 65] {
        let ram = vmm_core::memory::GuestRam::map(&backend(64 * MIB)).unwrap();
        let serial = Box::new(Console::default());
        let observer = Arc::new(vmm_core::vcpu::NoObserver);
        let config = vmm_core::machine::MachineConfig { ram, vcpus, serial, observer, pci: None };
        let error = Machine::new(config).unwrap_err();
        assert!(matches!(error, MachineError::VcpuLimit { limit: 64, .. }), "{error}");
    }
}
