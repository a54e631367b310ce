//! Virtio devices, apart from the transport that a driver reaches them by and from the thread that serves them.
//!
//! A [`VirtioDevice`] is passive: it has no thread, no lock and no loop of its own. Its transport owns it together with its
//! [`Driver`], the guest's side, and calls it for one of four reasons: the driver configures it, the driver has put
//! something into a queue, a descriptor that the device [watches](VirtioDevice::watches) is ready, or an update is under
//! way. So a test or a fuzzer drives a device with nothing but guest memory, and what an update must keep is what the two
//! structures hold.
//!
//! What the driver writes is hostile. A device answers nonsense in a request by failing that request, as the
//! specification says; and nonsense in a ring, after which nothing in it can be trusted, by [`Broken`]. The transport then sets
//! `DEVICE_NEEDS_RESET`, and the device stands still until its driver resets it. Nothing a guest does is a panic.

pub mod block;
pub mod console;
pub mod net;
pub mod rng;

mod device;
mod driver;
pub mod pci;
mod requests;
#[cfg(test)]
mod test_driver;
#[cfg(test)]
pub(crate) mod testing;

pub use device::{
    Backing, Broken, Class, Direction, Drained, Persistent, SectionVersions, VirtioDevice, Watch, WatchToken,
};
pub use driver::{Driver, Interrupt};
