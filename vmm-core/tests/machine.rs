//! Whole machines on this host's KVM: stop, save, build anew on the same memory, restore, go on.

mod machine_guests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use machine_guests::*;
use oslib::clock::monotonic_ns;
use vm_memory::{Bytes, GuestAddress};
use vmm_core::error::VcpuError;
use vmm_core::machine::{Machine, MachineError, default_routes};
use vmm_core::state::{GsiRoute, MachineState};
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
        source.ports().write(0x70, &[0x32]);
        let first = source.save().unwrap();
        let (target, _) = machine(&adopt(&backend), vcpus);
        target.restore(&first).unwrap();
        let mut second = target.save().unwrap();
        // Only time goes on: the clock, and the timer chip's record of when it was loaded.
        assert!(second.vm.clock.kvmclock_ns > first.vm.clock.kvmclock_ns);
        second.vm.clock = first.vm.clock;
        second.vm.pit = first.vm.pit.clone();
        for (a, b) in first.vcpus.iter().zip(&second.vcpus) {
            assert_eq!(a.msrs, b.msrs);
            assert_eq!(a.sregs, b.sregs);
        }
        assert_eq!(first, second);
    }
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
fn power_events_reach_the_owner() {
    if !have_kvm("power_events_reach_the_owner") {
        return;
    }
    let expected = [(RESET, VcpuEvent::Reset { source: "ACPI" }), (TRIPLE_FAULT, VcpuEvent::TripleFault { vcpu: 0 })];
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
    assert_ne!(after.vcpus[1].mp_state, before.vcpus[1].mp_state, "the second vCPU waits to be started again");
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
    assert!(
        matches!(source, VcpuError::MsrWrite { index: 0xdead_0001, value: 7, done: 5, .. }),
        "{source}"
    );
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
    struct Slow(std::sync::Mutex<()>);
    impl vmm_core::ports::PortDevice for Slow {
        fn read(&self, _: u16, _: &mut [u8]) {}
        fn write(&self, _: u16, _: &[u8]) {
            drop(self.0.lock().unwrap());
        }
    }
    let backend = backend(64 * MIB);
    let (machine, _) = self::machine(&backend, 1);
    let slow = Arc::new(Slow(std::sync::Mutex::new(())));
    machine.ports().remove(0x600);
    machine.ports().insert(0x602, 1, "slow", slow.clone()).unwrap();
    load(&machine, RESET);
    machine.set_entry(&flat).unwrap();
    let held = slow.0.lock().unwrap();
    machine.run().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let error = machine.pause(Duration::from_millis(20)).unwrap_err();
    assert!(matches!(&error, MachineError::PauseTimedOut { vcpus, .. } if *vcpus == [0]), "{error}");
    drop(held);
    machine.run().unwrap();
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
        let config = vmm_core::machine::MachineConfig { ram, vcpus, serial, observer };
        let error = Machine::new(config).unwrap_err();
        assert!(matches!(error, MachineError::VcpuLimit { limit: 64, .. }), "{error}");
    }
}
