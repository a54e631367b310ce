//! The KVM ioctl layer: `kvm-ioctls` plus what it lacks on x86.
//!
//! It adds the TSC offset attribute, SREGS2, XSAVE of any size, nested state of any size, exits with all their
//! details, and a handle with which another thread can make a vCPU leave the guest. It knows nothing of the order
//! in which state must be saved or restored; `vcpu` does. Constants come from `linux/kvm.h` through `kvm-bindings`.
#![allow(unsafe_code)] // ioctls on KVM descriptors and the shared kvm_run page; nothing outside this folder needs it

mod exit;
mod vcpu;
mod vm;

use std::io;

use kvm_bindings as kb;
use kvm_ioctls::Kvm;

pub use exit::Exit;
pub use vcpu::{ImmediateExit, Vcpu};
pub use vm::Vm;

use crate::error::{KvmError, MachineError};
use crate::state::XSAVE_MIN_LEN;

/// What this host's KVM offers, asked once per machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// vCPUs that one VM may have.
    pub max_vcpus: usize,
    /// `KVM_GET_SREGS2` and its counterpart exist.
    pub sregs2: bool,
    /// `KVM_GET_XCRS` and its counterpart exist.
    pub xcrs: bool,
    /// Bytes of `struct kvm_nested_state` with its data; 0 when there is no nested state.
    pub nested_state_len: usize,
    /// vCPUs have attributes, the TSC offset among them. One vCPU must still be asked for the offset itself.
    pub vcpu_attributes: bool,
    /// The guest's TSC may run at another frequency than the host's.
    pub tsc_control: bool,
    /// The LAPIC timer has the TSC-deadline mode.
    pub tsc_deadline_timer: bool,
    /// `KVM_CLOCK_*` flags that `KVM_SET_CLOCK` understands.
    pub clock_flags: u32,
    /// `KVM_KVMCLOCK_CTRL` exists.
    pub kvmclock_ctrl: bool,
    /// `KVM_PRE_FAULT_MEMORY` exists (Linux 6.11, where the MMU has the means).
    pub pre_fault_memory: bool,
}

impl Capabilities {
    /// Asks KVM. Some fifteen calls of well under a microsecond each.
    ///
    /// # Errors
    /// [`MachineError::Missing`] when KVM lacks something without which a machine cannot be updated.
    pub fn probe(kvm: &Kvm) -> Result<Self, MachineError> {
        const KVM_API_VERSION: i32 = kb::KVM_API_VERSION as i32;
        let value = |cap: u32| kvm.check_extension_raw(cap.into());
        let has = |cap: u32| value(cap) > 0;
        if kvm.get_api_version() != KVM_API_VERSION {
            return Err(MachineError::Missing("API version 12"));
        }
        for (cap, name) in [
            (kb::KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY"),
            (kb::KVM_CAP_SET_TSS_ADDR, "KVM_CAP_SET_TSS_ADDR"),
            (kb::KVM_CAP_IRQCHIP, "KVM_CAP_IRQCHIP"),
            (kb::KVM_CAP_PIT2, "KVM_CAP_PIT2"),
            (kb::KVM_CAP_PIT_STATE2, "KVM_CAP_PIT_STATE2"),
            (kb::KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID"),
            (kb::KVM_CAP_MP_STATE, "KVM_CAP_MP_STATE"),
            (kb::KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS"),
            (kb::KVM_CAP_DEBUGREGS, "KVM_CAP_DEBUGREGS"),
            (kb::KVM_CAP_XSAVE, "KVM_CAP_XSAVE"),
            (kb::KVM_CAP_ADJUST_CLOCK, "KVM_CAP_ADJUST_CLOCK"),
            (kb::KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT"),
        ] {
            if !has(cap) {
                return Err(MachineError::Missing(name));
            }
        }
        Ok(Self {
            max_vcpus: kvm.get_max_vcpus(),
            sregs2: has(kb::KVM_CAP_SREGS2),
            xcrs: has(kb::KVM_CAP_XCRS),
            nested_state_len: value(kb::KVM_CAP_NESTED_STATE).max(0) as usize,
            vcpu_attributes: has(kb::KVM_CAP_VCPU_ATTRIBUTES),
            tsc_control: has(kb::KVM_CAP_TSC_CONTROL),
            tsc_deadline_timer: has(kb::KVM_CAP_TSC_DEADLINE_TIMER),
            clock_flags: value(kb::KVM_CAP_ADJUST_CLOCK).max(0) as u32,
            kvmclock_ctrl: has(kb::KVM_CAP_KVMCLOCK_CTRL),
            pre_fault_memory: has(kb::KVM_CAP_PRE_FAULT_MEMORY),
        })
    }
}

/// Opens `/dev/kvm`, close-on-exec.
///
/// # Errors
/// The kernel's answer to the open.
pub fn open() -> Result<Kvm, MachineError> {
    Kvm::new().map_err(|e| MachineError::Open(e.into()))
}

/// Turns the return value of a KVM ioctl that gives 0 on success into a result.
fn zero(ret: i32, call: &'static str) -> Result<(), KvmError> {
    if ret == 0 { Ok(()) } else { Err(KvmError { call, source: io::Error::last_os_error() }) }
}

/// Bytes that an XSAVE area has in this VM: `KVM_CAP_XSAVE2` of the VM, at least the traditional 4 KiB.
fn xsave_len(xsave2: i32) -> usize {
    usize::try_from(xsave2).unwrap_or(0).max(XSAVE_MIN_LEN)
}
