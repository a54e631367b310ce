//! Errors of the machine. The outer text says which step failed for which vCPU; the cause is in `source()`.

use std::io;
use std::time::Duration;

use cpr_core::error::BoxError;

use crate::memory::MemoryError;
use crate::ports::OverlapError;
use crate::state::StateError;

/// A KVM call that failed.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed")]
pub struct KvmError {
    /// The call, by its name in the kernel's KVM documentation.
    pub call: &'static str,
    /// What the kernel answered.
    #[source]
    pub source: io::Error,
}

impl KvmError {
    /// Returns a closure for `map_err` that names `call`.
    pub(crate) fn of<E: Into<io::Error>>(call: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self { call, source: source.into() }
    }
}

/// Saving, restoring or running one vCPU failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuError {
    /// A KVM call on the vCPU failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The saved state is not one that this build can load.
    #[error("the saved state is refused")]
    State(#[from] StateError),
    /// KVM stopped in the middle of a list of MSRs: it refused this one.
    #[error("KVM refused to read MSR {index:#x} ({done} of {wanted} were read)")]
    MsrRead {
        /// The MSR that was refused.
        index: u32,
        /// How many of the list were read before it.
        done: usize,
        /// How many the list has.
        wanted: usize,
    },
    /// KVM refused to set an MSR.
    #[error("KVM refused to set MSR {index:#x} to {value:#x} ({done} of {wanted} were set)")]
    MsrWrite {
        /// The MSR that was refused.
        index: u32,
        /// The value it was to get.
        value: u64,
        /// How many of the list were set before it.
        done: usize,
        /// How many the list has.
        wanted: usize,
    },
    /// The state has extended registers that this host's KVM has no room for.
    #[error("the saved XSAVE area has {found} bytes, this host's KVM takes {room}")]
    XsaveTooLarge {
        /// Bytes in the saved state.
        found: usize,
        /// Bytes that KVM takes.
        room: usize,
    },
    /// The state has something that this host's KVM cannot take at all.
    #[error("the saved state has {what}, which this host's KVM does not offer")]
    Unsupported {
        /// What is not offered.
        what: &'static str,
    },
    /// The vCPU's thread has ended.
    #[error("the vCPU's thread has ended")]
    Gone,
    /// The vCPU stands still, but its thread does not come to rest.
    #[error("the vCPU's thread does not come to rest")]
    Restless,
    /// No thread could be started for the vCPU.
    #[error("cannot start the vCPU's thread")]
    Thread(#[source] io::Error),
    /// A job that needs a parked vCPU was given to a running one.
    #[error("the vCPU is running")]
    Running,
}

/// An operation on the machine failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// `/dev/kvm` could not be opened.
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    /// The kernel's KVM is too old or lacks something without which there is no live update.
    #[error("this host's KVM does not offer {0}")]
    Missing(&'static str),
    /// A KVM call on the VM failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A vCPU failed.
    #[error("vCPU {index}")]
    Vcpu {
        /// Which one.
        index: usize,
        /// Why.
        #[source]
        source: VcpuError,
    },
    /// vCPUs did not stop in time. They go on running; nothing was lost.
    #[error("vCPUs {vcpus:?} did not stop within {deadline:?}")]
    PauseTimedOut {
        /// Those that did not stop.
        vcpus: Vec<usize>,
        /// The time limit that was given.
        deadline: Duration,
    },
    /// The saved state is not one that this build can load.
    #[error("the saved state is refused")]
    State(#[from] StateError),
    /// The saved state belongs to a machine of another shape.
    #[error("the saved state has {found} vCPUs, this machine has {expected}")]
    VcpuCount {
        /// vCPUs of this machine.
        expected: usize,
        /// vCPUs in the state.
        found: usize,
    },
    /// The number of vCPUs asked for is impossible here.
    #[error("{wanted} vCPUs asked for; this host's KVM and this machine allow 1 to {limit}")]
    VcpuLimit {
        /// What was asked for.
        wanted: usize,
        /// What is possible.
        limit: usize,
    },
    /// Guest memory could not be used.
    #[error("guest memory")]
    Memory(#[from] MemoryError),
    /// Two devices want the same ports.
    #[error("port devices")]
    Ports(#[from] OverlapError),
    /// A device has a place on the bus that is not there, or taken.
    #[error("device '{device}' cannot be in PCI slot {slot}: {reason}")]
    Slot {
        /// The device.
        device: String,
        /// The slot.
        slot: u8,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A device could not be made, saved or loaded.
    #[error("device '{device}'")]
    Device {
        /// The device.
        device: String,
        /// Why.
        #[source]
        source: BoxError,
    },
    /// Devices did not come to rest in time. The machine runs on.
    #[error("{} did not come to rest within {deadline:?}", devices.join(", "))]
    Restless {
        /// Those that did not.
        devices: Vec<String>,
        /// The time limit that was given.
        deadline: Duration,
    },
    /// A thread, an eventfd or a signal handler could not be set up.
    #[error("cannot set up {what}")]
    Host {
        /// What could not be set up.
        what: &'static str,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
}
