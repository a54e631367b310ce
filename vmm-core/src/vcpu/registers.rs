//! One vCPU's state, out of KVM and back, in the order that KVM demands.
//!
//! Reading: the MP state first, because reading it makes KVM take a pending INIT or SIPI, which changes the registers;
//! the events last, because reading the others can queue one.
//!
//! Setting, and why so:
//! 1. CPUID: what it offers decides which bits and MSRs the other calls accept.
//! 2. TSC frequency and offset: the LAPIC's deadline timer is armed by the TSC as it is then.
//! 3. MP state, then the general registers (which clears pending exceptions, so the events come later), then the
//!    segment and control registers, which hold the APIC base.
//! 4. XSAVE, XCRs, debug registers.
//! 5. LAPIC: after the APIC base, before the MSRs, or the TSC deadline among them is lost.
//! 6. MSRs, nested state, and the events last.
//!
//! All of it needs a parked vCPU. A vCPU parks only after `KVM_RUN` was interrupted,
//! so an I/O instruction that it left half-done is complete by then.

use std::io;

use kvm_bindings::{
    CpuId, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use zerocopy::IntoBytes;

use super::{VcpuError, msrs, restore_step};
use crate::error::KvmError;
use crate::kvm::{Capabilities, Vcpu};
use crate::state::{Blob, MAX_CPUID_ENTRIES, SREGS2_LEN, SregsState, StateError, VcpuState};

/// Reads everything. `cpuid` is the table that the vCPU was given, `msr_list` the MSRs worth saving.
pub(crate) fn save(
    vcpu: &Vcpu,
    id: u32,
    caps: &Capabilities,
    cpuid: &Blob,
    msr_list: &[u32],
) -> Result<VcpuState, VcpuError> {
    let fd = vcpu.fd();
    let mp_state = mp_state(vcpu)?;
    let regs = fd.get_regs().map_err(KvmError::of("KVM_GET_REGS"))?;
    let sregs = if caps.sregs2 {
        SregsState::Sregs2(Blob::from(vcpu.sregs2()?.to_vec()))
    } else {
        SregsState::Sregs(Blob::of(&fd.get_sregs().map_err(KvmError::of("KVM_GET_SREGS"))?))
    };
    let xsave = vcpu.xsave()?;
    let xcrs = xcrs(vcpu, caps)?;
    let debugregs = debugregs(vcpu)?;
    let lapic = fd.get_lapic().map_err(KvmError::of("KVM_GET_LAPIC"))?;
    let msrs = msrs::read(vcpu, msr_list)?;
    let nested = vcpu.nested_state(caps.nested_state_len)?.map(Blob::from);
    let events = events(vcpu)?;
    // Neither changes while the machine stands.
    let tsc_khz = vcpu.tsc_khz();
    let tsc_offset = tsc_offset(vcpu, caps)?;
    Ok(VcpuState {
        id,
        cpuid: cpuid.clone(),
        mp_state,
        regs: Blob::of(&regs),
        sregs,
        xsave: Blob::from(xsave),
        xcrs,
        debugregs,
        lapic: Blob::of(&lapic),
        msrs,
        events,
        nested,
        tsc_khz,
        tsc_offset,
    })
}

/// Of a vCPU that has not run, what most guests never change. A restore leaves it as it is where it is to be so.
#[derive(Debug)]
pub(crate) struct Pristine {
    mp_state: Blob,
    xcrs: Option<Blob>,
    debugregs: Blob,
    events: Blob,
    tsc_offset: Option<u64>,
}

impl Pristine {
    pub(super) fn of(vcpu: &Vcpu, caps: &Capabilities) -> Result<Self, VcpuError> {
        Ok(Self {
            mp_state: mp_state(vcpu)?,
            xcrs: xcrs(vcpu, caps)?,
            debugregs: debugregs(vcpu)?,
            events: events(vcpu)?,
            tsc_offset: tsc_offset(vcpu, caps)?,
        })
    }
}

fn events(vcpu: &Vcpu) -> Result<Blob, KvmError> {
    Ok(Blob::of(&vcpu.fd().get_vcpu_events().map_err(KvmError::of("KVM_GET_VCPU_EVENTS"))?))
}

fn tsc_offset(vcpu: &Vcpu, caps: &Capabilities) -> Result<Option<u64>, KvmError> {
    if caps.vcpu_attributes { vcpu.tsc_offset() } else { Ok(None) }
}

fn mp_state(vcpu: &Vcpu) -> Result<Blob, KvmError> {
    Ok(Blob::of(&vcpu.fd().get_mp_state().map_err(KvmError::of("KVM_GET_MP_STATE"))?))
}

fn xcrs(vcpu: &Vcpu, caps: &Capabilities) -> Result<Option<Blob>, KvmError> {
    let read = || vcpu.fd().get_xcrs().map_err(KvmError::of("KVM_GET_XCRS"));
    caps.xcrs.then(read).transpose().map(|xcrs| xcrs.as_ref().map(Blob::of))
}

fn debugregs(vcpu: &Vcpu) -> Result<Blob, KvmError> {
    Ok(Blob::of(&vcpu.fd().get_debug_regs().map_err(KvmError::of("KVM_GET_DEBUGREGS"))?))
}

/// Sets everything. Nothing is touched when a field of the state has an impossible length. `pristine` is there if nothing
/// was set and the vCPU has not run since.
pub(crate) fn restore(
    vcpu: &Vcpu,
    caps: &Capabilities,
    cpuid: &mut Option<Blob>,
    pristine: Option<Box<Pristine>>,
    state: &VcpuState,
) -> Result<(), VcpuError> {
    state.check()?;
    let fd = vcpu.fd();
    let pristine = pristine.as_deref();
    restore_step!("cpuid", set_cpuid(vcpu, cpuid, &state.cpuid)?);
    restore_step!("tsc-offset", set_tsc(vcpu, caps, pristine, state)?);
    restore_step!(
        "mp-state",
        if pristine.is_none_or(|is| is.mp_state != state.mp_state) {
            let mp_state: kvm_mp_state = state.mp_state.load("mp_state")?;
            fd.set_mp_state(mp_state).map_err(KvmError::of("KVM_SET_MP_STATE"))?;
        }
    );
    restore_step!("regs", {
        let regs: kvm_regs = state.regs.load("regs")?;
        fd.set_regs(&regs).map_err(KvmError::of("KVM_SET_REGS"))?;
    });
    restore_step!("sregs", set_sregs(vcpu, caps, &state.sregs)?);
    restore_step!("xsave", {
        let (found, room) = (state.xsave.as_slice().len(), vcpu.vm().xsave_len());
        if found > room {
            return Err(VcpuError::XsaveTooLarge { found, room });
        }
        vcpu.set_xsave(state.xsave.as_slice())?;
    });
    restore_step!(
        "xcrs",
        if pristine.is_none_or(|is| is.xcrs != state.xcrs) {
            set_xcrs(vcpu, caps, state.xcrs.as_ref())?;
        }
    );
    restore_step!(
        "debugregs",
        if pristine.is_none_or(|is| is.debugregs != state.debugregs) {
            let debugregs: kvm_debugregs = state.debugregs.load("debugregs")?;
            fd.set_debug_regs(&debugregs).map_err(KvmError::of("KVM_SET_DEBUGREGS"))?;
        }
    );
    restore_step!("lapic", {
        let lapic: kvm_lapic_state = state.lapic.load("lapic")?;
        fd.set_lapic(&lapic).map_err(KvmError::of("KVM_SET_LAPIC"))?;
    });
    restore_step!("msrs", msrs::write(vcpu, &state.msrs)?);
    restore_step!("nested", {
        if let Some(nested) = &state.nested {
            if caps.nested_state_len == 0 {
                return Err(VcpuError::Unsupported { what: "nested virtualization state" });
            }
            vcpu.set_nested_state(nested.as_slice())?;
        }
    });
    restore_step!(
        "events",
        if pristine.is_none_or(|is| is.events != state.events) {
            let events: kvm_vcpu_events = state.events.load("events")?;
            fd.set_vcpu_events(&events).map_err(KvmError::of("KVM_SET_VCPU_EVENTS"))?;
        }
    );
    Ok(())
}

/// Gives the vCPU its CPUID table, unless it has this very one already: a target that was told early saves the call.
pub(crate) fn set_cpuid(vcpu: &Vcpu, current: &mut Option<Blob>, wanted: &Blob) -> Result<(), VcpuError> {
    if current.as_ref() == Some(wanted) {
        return Ok(());
    }
    let table = load_cpuid(wanted)?;
    vcpu.fd().set_cpuid2(&table).map_err(KvmError::of("KVM_SET_CPUID2"))?;
    *current = Some(wanted.clone());
    Ok(())
}

/// Decodes a CPUID table.
pub(crate) fn load_cpuid(blob: &Blob) -> Result<CpuId, StateError> {
    let mut entries =
        vec![kvm_cpuid_entry2::default(); blob.as_slice().len() / size_of::<kvm_cpuid_entry2>()];
    let bytes = entries.as_mut_bytes();
    let wrong = StateError::Size {
        field: "cpuid",
        rule: "a multiple of 40 up to 256 entries",
        found: blob.as_slice().len(),
    };
    if bytes.len() != blob.as_slice().len() {
        return Err(wrong);
    }
    bytes.copy_from_slice(blob.as_slice());
    if entries.len() > MAX_CPUID_ENTRIES {
        return Err(wrong);
    }
    CpuId::from_entries(&entries).map_err(|_| wrong)
}

fn set_tsc(
    vcpu: &Vcpu,
    caps: &Capabilities,
    pristine: Option<&Pristine>,
    state: &VcpuState,
) -> Result<(), VcpuError> {
    let mut has_offset = pristine.is_some_and(|is| is.tsc_offset == state.tsc_offset);
    // On the same host the frequency is what it was, and setting it is not free. Another boot may have measured it a
    // little differently.
    if state.tsc_khz != 0 && !is_same_frequency(vcpu.tsc_khz(), state.tsc_khz) {
        if !caps.tsc_control {
            return Err(VcpuError::Unsupported { what: "a TSC of another frequency" });
        }
        vcpu.set_tsc_khz(state.tsc_khz)?;
        has_offset = false;
    }
    if let Some(offset) = state.tsc_offset.filter(|_| !has_offset) {
        if !caps.vcpu_attributes {
            return Err(VcpuError::Unsupported { what: "a TSC offset" });
        }
        vcpu.set_tsc_offset(offset)?;
    }
    Ok(())
}

/// Whether KVM would take these frequencies for one: 250 parts in a million, `tsc_tolerance_ppm` of its module.
fn is_same_frequency(here: u32, wanted: u32) -> bool {
    u64::from(here.abs_diff(wanted)) * 1_000_000 <= u64::from(here) * 250
}

fn set_sregs(vcpu: &Vcpu, caps: &Capabilities, sregs: &SregsState) -> Result<(), VcpuError> {
    match sregs {
        SregsState::Sregs(blob) => {
            let sregs: kvm_sregs = blob.load("sregs")?;
            Ok(vcpu.fd().set_sregs(&sregs).map_err(KvmError::of("KVM_SET_SREGS"))?)
        }
        SregsState::Sregs2(_) if !caps.sregs2 => Err(VcpuError::Unsupported { what: "SREGS2 registers" }),
        SregsState::Sregs2(blob) => {
            let bytes: [u8; SREGS2_LEN] = blob.load("sregs2")?;
            Ok(vcpu.set_sregs2(&bytes)?)
        }
    }
}

fn set_xcrs(vcpu: &Vcpu, caps: &Capabilities, xcrs: Option<&Blob>) -> Result<(), VcpuError> {
    let Some(blob) = xcrs else { return Ok(()) };
    if !caps.xcrs {
        return Err(VcpuError::Unsupported { what: "XCR registers" });
    }
    let xcrs: kvm_xcrs = blob.load("xcrs")?;
    Ok(vcpu.fd().set_xcrs(&xcrs).map_err(KvmError::of("KVM_SET_XCRS"))?)
}

/// Gives a vCPU its first instruction: `entry` changes the registers that KVM starts it with.
pub(crate) fn entry_registers(vcpu: &Vcpu) -> Result<(kvm_regs, kvm_sregs), VcpuError> {
    let regs = vcpu.fd().get_regs().map_err(KvmError::of("KVM_GET_REGS"))?;
    let sregs = vcpu.fd().get_sregs().map_err(KvmError::of("KVM_GET_SREGS"))?;
    Ok((regs, sregs))
}

/// Sets the registers that [`entry_registers`] returned.
pub(crate) fn set_entry_registers(vcpu: &Vcpu, regs: &kvm_regs, sregs: &kvm_sregs) -> Result<(), VcpuError> {
    vcpu.fd().set_sregs(sregs).map_err(KvmError::of("KVM_SET_SREGS"))?;
    vcpu.fd().set_regs(regs).map_err(KvmError::of("KVM_SET_REGS"))?;
    Ok(())
}

/// Tells KVM that the guest stood still, so that its watchdogs keep quiet about it.
pub(crate) fn notify_paused(vcpu: &Vcpu) -> Result<(), VcpuError> {
    match vcpu.fd().kvmclock_ctrl() {
        Ok(()) => Ok(()),
        // The guest has no paravirtual clock (yet).
        Err(e) if e.errno() == libc::EINVAL => Ok(()),
        Err(e) => Err(KvmError { call: "KVM_KVMCLOCK_CTRL", source: io::Error::from(e) }.into()),
    }
}
