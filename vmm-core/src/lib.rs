//! A small KVM machine whose every part can be saved, and restored by another process on the same RAM.
//!
//! A [`machine::Machine`] is vCPUs, interrupt controllers, a timer, a serial port and the few devices that a PC cannot
//! do without. Building one and giving it a state are two steps: everything that does not depend on the state, which is
//! most of the time it takes, can be done before the state exists. The crate knows no update mode, no command line and
//! no event loop; it hands descriptors, events and wire types ([`state`]) to whoever has those.
//!
//! | for | module |
//! |---|---|
//! | guest RAM and its backends | [`memory`] |
//! | the machine as a whole | [`machine`] |
//! | vCPUs: threads, run loop, save and restore | [`vcpu`] |
//! | what is saved, as it travels | [`state`] |
//! | time beyond one boot of the host | [`time`] |
//! | I/O ports, MMIO, small devices, COM1 | [`ports`], [`platform`], [`serial`] |
//! | disk images | [`block`] |
//! | where a serial port's or console's output goes | [`output`] |
//! | devices on the PCI bus, stopped, saved and served together | [`devices`] |
//! | the PCI bus | [`pci`] |
//! | virtio devices | [`virtio`] |
//! | loading a kernel | [`boot`] |
//! | a guest for tests and measurements | [`payload`] |
//! | the ioctls | [`kvm`] |
//!
//! `unsafe` lives in [`kvm`] only.

pub mod block;
pub mod boot;
pub mod devices;
pub mod error;
mod guest_log;
mod io_thread;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod output;
pub mod payload;
pub mod pci;
pub mod platform;
pub mod ports;
pub mod serial;
pub mod state;
pub mod time;
pub mod vcpu;
pub mod virtio;

mod vm_state;
