//! The guest's side of a device: its memory, its queues, and how it is interrupted.

use std::fmt;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::Broken;

/// How a device interrupts its driver. The transport's business: message-signalled, masked or remembered.
///
/// An interrupt has reached the guest's interrupt controller when the call returns, so that nothing of it is under way
/// when the vCPUs are saved.
pub trait Interrupt: Send + Sync {
    /// Buffers of queue `index` have been used.
    fn queue(&self, index: usize);

    /// The device's configuration changed.
    fn config(&self);
}

/// A driver that has set `DRIVER_OK`, as its device sees it.
pub struct Driver {
    /// The guest's RAM.
    pub memory: GuestMemoryMmap,
    /// The device's queues. Those that the driver did not enable are not [ready](QueueT::ready).
    pub queues: Vec<Queue>,
    /// The features that were agreed on.
    pub features: u64,
    /// Its ear.
    pub interrupt: Box<dyn Interrupt>,
}

impl Driver {
    /// Whether the feature of this bit number was agreed on.
    pub fn has(&self, feature: u32) -> bool {
        self.features & (1 << feature) != 0
    }

    /// Gives the chain that begins at descriptor `head` back to the driver, with `written` bytes written into it. Does not
    /// interrupt: see [`signal`](Self::signal).
    ///
    /// # Errors
    /// [`Broken`] if the used ring is not in RAM.
    pub fn give_back(&mut self, queue: usize, head: u16, written: u32) -> Result<(), Broken> {
        self.queues[queue].add_used(&self.memory, head, written).map_err(|error| Broken::queue(queue, error))
    }

    /// Interrupts the driver, if it wants to know about what it was given back in this queue.
    ///
    /// # Errors
    /// [`Broken`] if the rings are not in RAM.
    pub fn signal(&mut self, queue: usize) -> Result<(), Broken> {
        let wanted = self.queues[queue].needs_notification(&self.memory);
        if wanted.map_err(|error| Broken::queue(queue, error))? {
            self.interrupt.queue(queue);
        }
        Ok(())
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver")
            .field("queues", &self.queues)
            .field("features", &format_args!("{:#x}", self.features))
            .finish_non_exhaustive()
    }
}
