//! PCI: one bus, as a guest finds it without firmware.
//!
//! There is a host bridge in slot 0 and functions of type 0 beside it, each with one memory BAR and MSI-X. Configuration
//! space is reached by ECAM and by the ports 0xcf8 and 0xcfc. BARs have addresses from the start, as there is nobody
//! before the kernel who would assign them; a kernel that moves them may. Left out on purpose: other buses and bridges,
//! I/O BARs, INTx (no function has an interrupt pin), and hot plug (no slot says that it can). The truth is the PCI Local Bus Specification 3.0, and for ECAM the PCI Express Base Specification.
//!
//! Whatever is written is a guest's and may be nonsense: what cannot be is ignored, or reads back as something else.

mod bus;
mod config;
mod endpoint;
mod msix;
mod state;

use std::ops::Range;

use oslib::eventfd::EventFd;

use crate::error::KvmError;

pub use bus::{Function, PciBus};
pub use config::{CONFIG_LEN, ConfigSpace, Identity};
pub use endpoint::{Endpoint, MsixLayout};
pub use msix::{MAX_VECTORS, Msix};
pub use state::{FunctionState, HostState, MsixEntry};

/// Configuration space of bus 0, memory-mapped: 4 KiB for each of 256 functions. Behind the window, where QEMU's microvm
/// has it, too.
pub const ECAM: Range<u64> = 0xe000_0000..0xe010_0000;

/// Where memory BARs may be: between the RAM below 4 GiB and [`ECAM`]. The ACPI tables say so, and nothing of the bus is
/// answered outside of it.
pub const WINDOW: Range<u64> = crate::memory::LOW_RAM_END..ECAM.start;

/// The ports of the older way to configuration space: address and data.
pub const CONFIG_PORTS: Range<u16> = 0xcf8..0xd00;

/// Slots of the bus. Slot 0 is the host bridge's.
pub const SLOTS: u8 = 32;

/// What functions ask of KVM. Tests have something else in its place.
pub trait Hypervisor: Send + Sync {
    /// Sends a message-signalled interrupt, which has reached the interrupt controllers when this returns. One that leads
    /// nowhere is lost, as on a PC.
    fn send_message(&self, address: u64, data: u32);

    /// Has writes of any length at `address` signal `doorbell`, and nothing else.
    ///
    /// # Errors
    /// The kernel's answer. Such writes are exits then.
    fn attach_doorbell(&self, address: u64, doorbell: &EventFd) -> Result<(), KvmError>;

    /// Undoes [`attach_doorbell`](Self::attach_doorbell).
    ///
    /// # Errors
    /// The kernel's answer.
    fn detach_doorbell(&self, address: u64, doorbell: &EventFd) -> Result<(), KvmError>;
}
