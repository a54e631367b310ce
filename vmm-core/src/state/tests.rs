use super::*;
use proptest::prelude::*;

fn bytes(len: usize, seed: u8) -> Blob {
    Blob::from((0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect::<Vec<_>>())
}

fn nested(len: usize) -> Blob {
    let mut bytes = bytes(len, 9).as_slice().to_vec();
    bytes[4..8].copy_from_slice(&(len as u32).to_le_bytes());
    Blob::from(bytes)
}

fn vcpu(id: u32) -> VcpuState {
    VcpuState {
        id,
        cpuid: bytes(40 * 30, 1),
        mp_state: bytes(size_of::<kvm_mp_state>(), 2),
        regs: bytes(size_of::<kvm_regs>(), 3),
        sregs: SregsState::Sregs2(bytes(SREGS2_LEN, 4)),
        xsave: bytes(XSAVE_MIN_LEN, 5),
        xcrs: Some(bytes(size_of::<kvm_xcrs>(), 6)),
        debugregs: bytes(size_of::<kvm_debugregs>(), 7),
        lapic: bytes(size_of::<kvm_lapic_state>(), 8),
        msrs: vec![(0x174, 0x10), (0xc000_0081, u64::MAX), (0x6e0, 0)],
        events: bytes(size_of::<kvm_vcpu_events>(), 10),
        nested: Some(nested(4224)),
        tsc_khz: 2_700_000,
        tsc_offset: Some(0xffff_ffff_0000_0001),
    }
}

/// A good state of a machine with so many vCPUs.
pub(crate) fn machine_state(vcpus: u32) -> MachineState {
    machine(vcpus)
}

fn machine(vcpus: u32) -> MachineState {
    let chip = size_of::<kvm_irqchip>();
    MachineState {
        vcpus: (0..vcpus).map(vcpu).collect(),
        vm: VmState {
            ioapic: bytes(chip, 11),
            pic_master: bytes(chip, 12),
            pic_slave: bytes(chip, 13),
            pit: bytes(size_of::<kvm_pit_state2>(), 14),
            clock: ClockState {
                kvmclock_ns: 1 << 40,
                flags: 4,
                realtime_ns: 1,
                host_tsc: 2,
                monotonic_ns: 3,
            },
            gsi_routes: vec![
                GsiRoute::Pin { gsi: 4, chip: 2, pin: 4 },
                GsiRoute::Msi { gsi: 24, address_lo: 0xfee0_0000, address_hi: 0, data: 0x4041 },
            ],
        },
        serial: SerialState {
            baud_divisor_low: 1,
            baud_divisor_high: 2,
            interrupt_enable: 3,
            interrupt_identification: 4,
            line_control: 5,
            line_status: 6,
            modem_control: 7,
            modem_status: 8,
            scratch: 9,
            in_buffer: bytes(17, 15),
        },
        platform: PlatformState { rtc_index: 0x32 },
    }
}

#[test]
fn structures_have_the_kernels_sizes() {
    assert_eq!(size_of::<kvm_bindings::kvm_sregs2>(), SREGS2_LEN);
    assert_eq!(size_of::<kvm_bindings::kvm_nested_state>(), NESTED_HEADER_LEN);
    assert_eq!(size_of::<kvm_cpuid_entry2>(), 40);
    assert_eq!(size_of::<kvm_irqchip>(), 520);
    assert_eq!(size_of::<kvm_lapic_state>(), 1024);
}

#[test]
fn blobs_return_what_they_were_given() {
    let regs = kvm_regs { rip: 0x1234, rflags: 2, r15: u64::MAX, ..Default::default() };
    let blob = Blob::of(&regs);
    assert_eq!(blob.load::<kvm_regs>("regs").unwrap(), regs);
    let short = Blob::from(blob.as_slice()[1..].to_vec());
    assert_eq!(
        short.load::<kvm_regs>("regs").unwrap_err().to_string(),
        "field `regs` has 143 bytes, expected 144"
    );
}

#[test]
fn a_machine_survives_the_wire_bit_for_bit() {
    for vcpus in [1, 2, 64] {
        let state = machine(vcpus);
        state.check().unwrap();
        let wire = postcard::to_allocvec(&state).unwrap();
        let back: MachineState = postcard::from_bytes(&wire).unwrap();
        assert_eq!(back, state);
        assert_eq!(postcard::to_allocvec(&back).unwrap(), wire);
    }
}

#[test]
fn absent_parts_stay_absent() {
    let mut state = vcpu(0);
    (state.xcrs, state.nested, state.tsc_offset) = (None, None, None);
    state.sregs = SregsState::Sregs(bytes(size_of::<kvm_sregs>(), 4));
    state.check().unwrap();
    let wire = postcard::to_allocvec(&state).unwrap();
    assert_eq!(postcard::from_bytes::<VcpuState>(&wire).unwrap(), state);
}

/// The fields of a vCPU that are blobs of a fixed length, by name.
fn fixed(state: &mut VcpuState) -> Vec<(&'static str, &mut Blob)> {
    let SregsState::Sregs2(sregs2) = &mut state.sregs else { unreachable!() };
    vec![
        ("mp_state", &mut state.mp_state),
        ("regs", &mut state.regs),
        ("sregs2", sregs2),
        ("xcrs", state.xcrs.as_mut().unwrap()),
        ("debugregs", &mut state.debugregs),
        ("lapic", &mut state.lapic),
        ("events", &mut state.events),
    ]
}

#[test]
fn a_wrong_length_is_refused_by_name() {
    for nth in 0..fixed(&mut vcpu(0)).len() {
        for grow in [false, true] {
            let mut state = vcpu(0);
            let (name, blob) = fixed(&mut state).swap_remove(nth);
            if grow {
                blob.0.push(0);
            } else {
                blob.0.pop();
            }
            let error = state.check().unwrap_err();
            assert!(matches!(error, StateError::Length { field, .. } if field == name), "{error}");
        }
    }
    type Break = fn(&mut MachineState);
    let broken: [(&str, Break); 11] = [
        ("cpuid", |s| s.vcpus[0].cpuid.0.truncate(39)),
        ("cpuid", |s| s.vcpus[0].cpuid = bytes(40 * 257, 0)),
        ("xsave", |s| s.vcpus[0].xsave = bytes(4092, 0)),
        ("xsave", |s| s.vcpus[0].xsave = bytes(XSAVE_MAX_LEN + 4, 0)),
        ("msrs", |s| s.vcpus[0].msrs = vec![(0, 0); MAX_MSRS + 1]),
        ("nested", |s| s.vcpus[0].nested = Some(bytes(100, 0))),
        ("nested.size", |s| s.vcpus[0].nested = Some(bytes(4224, 0))),
        ("ioapic", |s| s.vm.ioapic.0.truncate(519)),
        ("pit", |s| s.vm.pit.0.push(0)),
        ("serial.in_buffer", |s| s.serial.in_buffer = bytes(65, 0)),
        ("vcpu.id", |s| s.vcpus[1].id = 0),
    ];
    for (name, break_it) in broken {
        let mut state = machine(2);
        break_it(&mut state);
        let error = state.check().unwrap_err().to_string();
        assert!(error.contains(&format!("`{name}`")), "{name}: {error}");
    }
}

#[test]
fn a_length_that_lies_allocates_nothing() {
    // A blob that claims 2^60 bytes.
    let wire = [0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x10, 1, 2, 3];
    assert!(postcard::from_bytes::<Blob>(&wire).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_truncation_is_refused(keep in 0.0..1.0f64) {
        let wire = postcard::to_allocvec(&machine(2)).unwrap();
        let keep = ((wire.len() - 1) as f64 * keep) as usize;
        prop_assert!(postcard::from_bytes::<MachineState>(&wire[..keep]).is_err());
    }

    #[test]
    fn any_shortened_field_is_refused(nth in 0usize..7, cut in 1usize..4096) {
        let mut state = vcpu(0);
        let (name, blob) = fixed(&mut state).swap_remove(nth);
        let len = blob.0.len();
        blob.0.truncate(len - cut.min(len));
        let refused = matches!(state.check(), Err(StateError::Length { field, .. }) if field == name);
        prop_assert!(refused);
    }

    #[test]
    fn any_damage_is_refused_or_harmless(at in any::<prop::sample::Index>(), flip in 1u8..) {
        // Whatever decodes and passes the check has lengths that KVM's structures have: loading cannot panic.
        let mut wire = postcard::to_allocvec(&machine(1)).unwrap();
        let at = at.index(wire.len());
        wire[at] ^= flip;
        if let Ok(state) = postcard::from_bytes::<MachineState>(&wire) && state.check().is_ok() {
            for vcpu in &state.vcpus {
                prop_assert!(vcpu.regs.load::<kvm_regs>("regs").is_ok());
                prop_assert!(vcpu.lapic.load::<kvm_lapic_state>("lapic").is_ok());
            }
        }
    }
}
