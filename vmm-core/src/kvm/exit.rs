//! Why a vCPU left the guest, with every detail that the shared `kvm_run` page holds.

/// One exit from `KVM_RUN` that user space must look at.
///
/// Except for [`Exit::Interrupted`], an operation told here is complete, and the registers are consistent, only
/// after the vCPU has entered `KVM_RUN` once more (with `immediate_exit` set if the guest must not run).
#[derive(Debug)]
#[non_exhaustive]
pub enum Exit<'a> {
    /// A signal, or `immediate_exit`, or an application processor that still waits to be started.
    Interrupted,
    /// Port input: `data` takes one or more units of `size` bytes.
    PortIn {
        /// The port.
        port: u16,
        /// Bytes of one unit: 1, 2 or 4.
        size: usize,
        /// Where the units go.
        data: &'a mut [u8],
    },
    /// Port output: `data` holds one or more units of `size` bytes.
    PortOut {
        /// The port.
        port: u16,
        /// Bytes of one unit: 1, 2 or 4.
        size: usize,
        /// The units.
        data: &'a [u8],
    },
    /// A read from guest-physical addresses that are not RAM.
    MmioRead {
        /// The guest-physical address.
        address: u64,
        /// Where the value goes.
        data: &'a mut [u8],
    },
    /// A write to guest-physical addresses that are not RAM.
    MmioWrite {
        /// The guest-physical address.
        address: u64,
        /// The value.
        data: &'a [u8],
    },
    /// The guest halted, and no in-kernel interrupt controller takes care of it.
    Halt,
    /// Triple fault.
    Shutdown,
    /// `KVM_SYSTEM_EVENT_*`.
    SystemEvent {
        /// Which event.
        kind: u32,
    },
    /// The processor refused to enter the guest.
    FailEntry {
        /// The processor's reason.
        reason: u64,
    },
    /// KVM could not go on, most often because it cannot emulate an instruction.
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// Further words, as many as KVM gave.
        data: Vec<u64>,
    },
    /// A page of guest memory that KVM could not map.
    MemoryFault {
        /// The guest-physical address.
        address: u64,
    },
    /// Another exit, by its `KVM_EXIT_*` number.
    Other(u32),
}
