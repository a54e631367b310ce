//! A disk: the block device of virtio 1.2, chapter 5.2, on an [image](crate::block).
//!
//! Requests go from guest memory to the file and back without a copy, by a ring of io_uring(7), so that many are under
//! way at once. Where the kernel has none, or forbids it, the calling thread does them one after the other. Several queues
//! are served by whoever calls, with one ring between them.
//!
//! A chain that was taken from a queue is given back exactly once: whoever stops the device [drains](super::VirtioDevice::drain)
//! it, which lets everything that was taken come to its end and leaves the rest in the queue. So there is never a request in
//! the state of an update, and none is lost or done twice. An error of the host is one of the request (QEMU's
//! `werror=report`).

mod config;
mod device;
mod engine;
mod request;
mod state;

pub use device::{Aio, Block, BlockConfig, BlockError, MAX_QUEUES};
pub use state::BlockState;
