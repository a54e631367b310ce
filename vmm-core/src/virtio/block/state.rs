//! What is saved of a disk: nothing that is in the image or in the queues.

use cpr_core::section::SectionType;
use serde::{Deserialize, Serialize};

/// A disk as its driver knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// The serial number. The new device must have the same.
    pub serial: String,
    /// Whether it cannot be written. The new device must be the same.
    pub read_only: bool,
    /// How many queues it has. The new device must have as many.
    pub queues: u16,
    /// The most entries of one. The new device must have the same.
    pub queue_size: u16,
    /// Capacity in sectors of 512 bytes. It stays, also if the image has grown.
    pub sectors: u64,
    /// Whether the driver has the write cache on.
    pub writeback: bool,
    /// Whether the host has failed to keep something that was written, so that flushes fail from then on.
    pub inconsistent: bool,
}

impl SectionType for BlockState {
    const NAME: &'static str = "virtio-blk";
    const VERSION: u32 = 1;
}
