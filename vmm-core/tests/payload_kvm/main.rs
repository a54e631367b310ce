//! The payload in a real VM: boots on one and several vCPUs, and does what its mailbox says.
//!
//! `cargo test -p vmm-core --test payload_kvm -- --ignored --nocapture figures` prints how fast it is here.

#![allow(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION takes a raw address; one block in vm.rs")]

mod vm;

use std::time::{Duration, Instant};

use vm::{Config, Vm};
use vmm_core::payload::{
    CHUNK_BYTES, Command, FILL_BASE_GPA, GuestWords, Outcome, Status, VcpuState, field, fill_word, flag,
};

const MIB: u64 = 1 << 20;

fn ok(results: [u64; 2]) -> Outcome {
    Outcome { status: Status::Ok, results }
}

#[test]
fn boots_and_beats_on_every_vcpu() {
    for vcpus in [1, 2, 4, 8] {
        for cmdline in ["", &format!("quiet cpus={vcpus}")] {
            let config = Config { vcpus, cmdline, ..Default::default() };
            let Some(vm) = Vm::boot(&config) else { return };
            // Without cpus=, a vCPU thread that got no time on a busy machine may come after the banner.
            vm.wait("all vCPUs", || vm.header().started() == u64::from(vcpus));
            assert_eq!(vm.header().started_mask(), (1 << vcpus) - 1);
            if !cmdline.is_empty() {
                assert_eq!(vm.output(), format!("cpr payload: {vcpus} vcpus\r\n"));
            }
            for index in 0..u32::from(vcpus) {
                let before = vm.vcpu(index).beats();
                vm.wait("beats", || vm.vcpu(index).beats() > before + 1000);
                assert_eq!(vm.vcpu(index).state(), VcpuState::Beating);
                assert_eq!(vm.vcpu(index).read(field::APIC_ID), u64::from(index));
                assert_eq!(vm.vcpu(index).read(field::TSC_BACKWARDS), 0);
            }
        }
    }
}

#[test]
fn the_memory_map_tells_usable_ram() {
    let ram = [(0, 64 << 20), (4 << 30, 32 << 20), (250 << 30, 16 << 20)];
    let Some(vm) = Vm::boot(&Config { ram: &ram, cmdline: "cpus=1", ..Default::default() }) else { return };
    let header = vm.header();
    assert_eq!(header.ranges(), [(FILL_BASE_GPA, 60 * MIB), (4 << 30, 32 * MIB), (250 << 30, 16 * MIB)]);
    assert_eq!(header.usable_bytes(), 108 * MIB);
    assert_eq!(header.spans(50 * MIB, 20 * MIB), [(54 * MIB, 10 * MIB), (4 << 30, 10 * MIB)]);
    assert_eq!(header.flags() & (flag::RAM_CUT | flag::NO_SERIAL | flag::NO_LAPIC), 0);
}

#[test]
fn fills_and_verifies_across_the_hole() {
    let ram = [(0, 68 << 20), (4 << 30, 64 << 20)];
    let Some(vm) = Vm::boot(&Config { ram: &ram, cmdline: "cpus=1", ..Default::default() }) else { return };
    let all = vm.header().usable_bytes();
    assert_eq!(all, 128 * MIB);
    let seed = 0x1234_5678_9abc_def0;

    assert_eq!(vm.command(0, Command::Fill { offset: 0, bytes: all, seed }), ok([0, 0]));
    assert_eq!(vm.vcpu(0).read(field::PROGRESS_BYTES), all);
    for (start, length) in vm.header().spans(0, all) {
        // Every 61st word from outside; the guest looks at all of them.
        for gpa in (start..start + length).step_by(8 * 61) {
            assert_eq!(vm.ram.read_u64(gpa), fill_word(gpa, seed), "at {gpa:#x}");
        }
    }
    assert_eq!(vm.command(0, Command::Verify { offset: 0, bytes: all, seed }), ok([0, 0]));
    assert_eq!(vm.command(0, Command::Touch { offset: 0, bytes: all }), ok([all / 4096, 0]));
    assert_eq!(vm.command(0, Command::Verify { offset: 0, bytes: all, seed }), ok([0, 0]));

    // One wrong word, then a second one, and one outside of the part that is asked for.
    let wrong = (4 << 30) + 5 * MIB + 24;
    vm.ram.write_u64(wrong, vm.ram.read_u64(wrong) ^ 1);
    assert_eq!(vm.command(0, Command::Verify { offset: 0, bytes: all, seed }), ok([1, wrong]));
    vm.ram.write_u64(FILL_BASE_GPA, 0);
    assert_eq!(vm.command(0, Command::Verify { offset: 0, bytes: all, seed }), ok([2, FILL_BASE_GPA]));
    assert_eq!(vm.command(0, Command::Verify { offset: 8, bytes: 65 * MIB, seed }), ok([0, 0]));
    let other = Command::Verify { offset: 8, bytes: 8192, seed: seed + 1 };
    assert_eq!(vm.command(0, other), ok([1024, FILL_BASE_GPA + 8]));

    for (offset, bytes) in [(0, all + 8), (all, 8), (8, u64::MAX - 7), (4, 8), (0, 12)] {
        let refused = vm.command(0, Command::Fill { offset, bytes, seed: 0 });
        assert_eq!(refused.status, Status::Range, "{offset} + {bytes}");
    }
}

#[test]
fn beats_go_on_during_long_commands() {
    let Some(vm) = Vm::boot(&Config { vcpus: 2, cmdline: "cpus=2", ..Default::default() }) else { return };
    let all = vm.header().usable_bytes();
    // On the second vCPU as well as on the first.
    let before = vm.vcpu(1).beats();
    assert_eq!(vm.command(1, Command::Fill { offset: 0, bytes: all, seed: 1 }), ok([0, 0]));
    assert!(vm.vcpu(1).beats() - before >= all / CHUNK_BYTES);
    assert_eq!(vm.command(0, Command::Verify { offset: 0, bytes: all, seed: 1 }), ok([0, 0]));
}

#[test]
fn walks_while_beating() {
    let Some(vm) = Vm::boot(&Config { cmdline: "cpus=1", ..Default::default() }) else { return };
    let bytes = 16 * MIB;
    assert_eq!(vm.command(0, Command::Fill { offset: 4096, bytes, seed: 3 }), ok([0, 0]));
    assert_eq!(vm.command(0, Command::Walk { offset: 4096, bytes }), ok([0, 0]));
    vm.wait("two rounds", || vm.vcpu(0).walked_pages() > 2 * bytes / 4096);
    assert_eq!(vm.command(0, Command::Verify { offset: 4096, bytes, seed: 3 }), ok([0, 0]));
    assert_eq!(vm.command(0, Command::Walk { offset: 0, bytes: 0 }), ok([0, 0]));
    let walked = vm.vcpu(0).walked_pages();
    let beats = vm.vcpu(0).beats();
    vm.wait("beats", || vm.vcpu(0).beats() > beats + 1000);
    assert_eq!(vm.vcpu(0).walked_pages(), walked);
}

#[test]
fn prints_and_echoes() {
    let Some(vm) = Vm::boot(&Config { cmdline: "cpus=1", ..Default::default() }) else { return };
    for number in [0, 1_234_567, u64::MAX] {
        assert_eq!(vm.command(0, Command::Print { number }).status, Status::Ok);
    }
    let mut expected = "cpr payload: 1 vcpus\r\nbeat 0\nbeat 1234567\nbeat 18446744073709551615\n".to_owned();
    assert_eq!(vm.output(), expected);

    vm.type_in("before ");
    assert_eq!(vm.command(0, Command::Echo { on: true }).status, Status::Ok);
    vm.type_in("after");
    expected += "before after";
    vm.wait("the echo", || vm.output() == expected);
    // Counted after the byte is out.
    vm.wait("the count of it", || vm.vcpu(0).read(field::ECHOED_BYTES) == 12);
    assert_eq!(vm.command(0, Command::Echo { on: false }).status, Status::Ok);
    vm.type_in("unheard");
    let beats = vm.vcpu(0).beats();
    vm.wait("beats", || vm.vcpu(0).beats() > beats + 1000);
    assert_eq!(vm.output(), expected);
}

#[test]
fn does_without_port_io() {
    let config = Config { vcpus: 2, cmdline: "console=none noiopl cpus=2", ..Default::default() };
    let Some(vm) = Vm::boot(&config) else { return };
    assert_eq!(vm.header().flags() & (flag::NO_IOPL | flag::NO_SERIAL), flag::NO_IOPL | flag::NO_SERIAL);
    assert_eq!(vm.output(), "");
    for vcpu in [0, 1] {
        assert_eq!(vm.command(vcpu, Command::Print { number: 1 }).status, Status::NoIo);
        let faults = vm.vcpu(vcpu).read(field::IO_FAULTS);
        assert_eq!(vm.command(vcpu, Command::PortIn { port: 0x3fd, bytes: 1 }).status, Status::NoIo);
        assert_eq!(vm.vcpu(vcpu).read(field::IO_FAULTS), faults + 1);
        assert_eq!(vm.command(vcpu, Command::Echo { on: true }).status, Status::NoIo);
        let beats = vm.vcpu(vcpu).beats();
        vm.wait("beats", || vm.vcpu(vcpu).beats() > beats + 1000);
    }
}

#[test]
fn does_without_a_serial_port() {
    let Some(vm) = Vm::boot(&Config { cmdline: "cpus=1", serial: false, ..Default::default() }) else {
        return;
    };
    assert_eq!(vm.header().flags() & flag::NO_SERIAL, flag::NO_SERIAL);
    assert_eq!(vm.command(0, Command::Print { number: 1 }).status, Status::NoIo);
    assert_eq!(vm.vcpu(0).read(field::IO_FAULTS), 0);
}

#[test]
fn reaches_ports_and_memory() {
    let Some(vm) = Vm::boot(&Config { cmdline: "cpus=1", ..Default::default() }) else { return };
    for (bytes, value) in [(1, 0xf8), (2, 0xf9f8), (4, 0xfbfa_f9f8)] {
        assert_eq!(vm.command(0, Command::PortIn { port: 0xcf8, bytes }), ok([value, 0]));
        let out = Command::PortOut { port: 0xcf8, bytes, value: 0x8765_4321 };
        assert_eq!(vm.command(0, out), ok([0, 0]));
    }
    let bytes = 0x8765_4321u32.to_le_bytes();
    assert_eq!(vm.other_ports(), [1, 2, 4].map(|size| (0xcf8, bytes[..size].to_vec())));

    let gpa = 8 * MIB;
    for (bytes, seen) in [(8, 0x8877_6655_4433_2211), (4, 0x4433_2211), (2, 0x2211), (1, 0x11)] {
        vm.ram.write_u64(gpa, 0);
        let store = Command::Store { gpa, bytes, value: 0x8877_6655_4433_2211 };
        assert_eq!(vm.command(0, store), ok([0, 0]));
        assert_eq!(vm.ram.read_u64(gpa), seen);
        vm.ram.write_u64(gpa, 0x8877_6655_4433_2211);
        assert_eq!(vm.command(0, Command::Load { gpa, bytes }), ok([seen, 0]));
    }
    // Nothing but our run loop answers there.
    assert_eq!(vm.command(0, Command::Load { gpa: 0xd000_0000, bytes: 4 }), ok([0xffff_ffff, 0]));
    assert_eq!(vm.command(0, Command::Load { gpa, bytes: 3 }).status, Status::Range);
    assert_eq!(vm.command(0, Command::PortIn { port: 0x80, bytes: 8 }).status, Status::Range);
}

#[test]
fn a_pause_is_a_gap_and_loses_no_request() {
    let Some(vm) = Vm::boot(&Config { vcpus: 2, cmdline: "cpus=2", ..Default::default() }) else { return };
    for vcpu in [0, 1] {
        vm.reset_gap(vcpu);
    }
    vm.pause();
    let beats = vm.vcpu(0).beats();
    let ticket = vm.vcpu(1).submit(Command::Print { number: 42 });
    std::thread::sleep(Duration::from_millis(60));
    assert_eq!(vm.vcpu(0).beats(), beats, "the guest ran during the pause");
    assert_eq!(vm.vcpu(1).outcome(ticket), None);
    vm.resume();
    assert_eq!(vm.finish(1, ticket).status, Status::Ok);
    assert!(vm.output().ends_with("beat 42\n"));
    for vcpu in [0, 1] {
        vm.wait("the gap", || vm.vcpu(vcpu).max_gap_tsc() >= 60 * vm.tsc_khz);
    }

    // A reset asked for in a pause is done after it.
    vm.pause();
    let ticket = vm.vcpu(0).request_gap_reset();
    assert!(!vm.vcpu(0).gap_was_reset(ticket));
    vm.resume();
    vm.wait("the reset", || vm.vcpu(0).gap_was_reset(ticket));
}

#[test]
fn parks_until_the_next_command() {
    let Some(vm) = Vm::boot(&Config { cmdline: "cpus=1", ..Default::default() }) else { return };
    assert_eq!(vm.command(0, Command::Park).status, Status::Ok);
    vm.wait("parking", || vm.vcpu(0).state() == VcpuState::Parked);
    let beats = vm.vcpu(0).beats();
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(vm.vcpu(0).beats(), beats);
    assert_eq!(vm.command(0, Command::Nop).status, Status::Ok);
    assert_eq!(vm.vcpu(0).state(), VcpuState::Beating);
    vm.wait("beats", || vm.vcpu(0).beats() > beats);
}

#[test]
fn writes_down_what_ended_a_vcpu() {
    let Some(vm) = Vm::boot(&Config { vcpus: 2, cmdline: "cpus=2", ..Default::default() }) else { return };
    let _ = vm.vcpu(1).submit(Command::Load { gpa: 200 << 30, bytes: 8 });
    vm.wait("the fault", || vm.vcpu(1).state() == VcpuState::Faulted);
    assert_eq!(vm.vcpu(1).read(field::FAULT_VECTOR), 14);
    assert_eq!(vm.vcpu(1).read(field::FAULT_CR2), 200 << 30);
    let beats = vm.vcpu(0).beats();
    vm.wait("the other vCPU", || vm.vcpu(0).beats() > beats + 1000);
}

#[test]
#[ignore = "prints figures of this machine; nothing to pass or fail"]
fn figures() {
    for vcpus in [1, 2, 4, 8, 64] {
        let cmdline = format!("cpus={vcpus}");
        let mut boots: Vec<_> = (0..5)
            .filter_map(|_| {
                let vm = Vm::boot(&Config { vcpus, cmdline: &cmdline, ..Default::default() })?;
                let wall = vm.started_at.elapsed();
                let ms = |tsc: u64| tsc as f64 / vm.tsc_khz as f64;
                let entry = vm.header().read(field::TSC_ENTRY);
                let ring3 = ms(vm.vcpu(0).read(field::TSC_START) - entry);
                let last = (0..u32::from(vcpus)).map(|i| vm.vcpu(i).read(field::TSC_START)).max()?;
                let ready = ms(vm.header().read(field::TSC_READY) - entry);
                Some((wall, ring3, ms(last - entry), ready))
            })
            .collect();
        boots.sort_by_key(|boot| boot.0);
        let Some((wall, ring3, last, ready)) = boots.get(2) else { return };
        println!(
            "{vcpus} vCPUs: entry to ring 3 {ring3:.2} ms, last vCPU in ring 3 {last:.2} ms, \
             ready {ready:.2} ms; first KVM_RUN to ready seen {wall:.2?}"
        );
    }

    let ram = [(0, 512 << 20), (4 << 30, 512 << 20)];
    let Some(vm) = Vm::boot(&Config { ram: &ram, cmdline: "cpus=1", ..Default::default() }) else { return };
    let (begin, before) = (Instant::now(), vm.vcpu(0).beats());
    std::thread::sleep(Duration::from_millis(500));
    let rate = (vm.vcpu(0).beats() - before) as f64 / begin.elapsed().as_secs_f64();
    println!("{:.1} M beats/s, {:.1} ns each", rate / 1e6, 1e9 / rate);

    let bytes = vm.header().usable_bytes();
    let timed = |name: &str, command| {
        vm.reset_gap(0);
        let begin = Instant::now();
        let outcome = vm.command(0, command);
        let gib = bytes as f64 / (1u64 << 30) as f64;
        let gap = vm.vcpu(0).max_gap_tsc() as f64 / vm.tsc_khz as f64;
        let rate = gib / begin.elapsed().as_secs_f64();
        println!("{name} of {gib:.2} GiB: {rate:.2} GiB/s, largest gap {gap:.3} ms, {outcome:?}");
    };
    timed("first fill", Command::Fill { offset: 0, bytes, seed: 1 });
    timed("second fill", Command::Fill { offset: 0, bytes, seed: 1 });
    timed("verify", Command::Verify { offset: 0, bytes, seed: 1 });
    timed("touch", Command::Touch { offset: 0, bytes });
    let walk = |bytes| {
        let _ = vm.command(0, Command::Walk { offset: 0, bytes });
        let (begin, before) = (Instant::now(), vm.vcpu(0).walked_pages());
        std::thread::sleep(Duration::from_millis(500));
        let rate = (vm.vcpu(0).walked_pages() - before) as f64 / begin.elapsed().as_secs_f64();
        println!("walk of {} MiB: {:.1} M pages/s", bytes / MIB, rate / 1e6);
    };
    walk(64 * MIB);
    walk(bytes);
}
