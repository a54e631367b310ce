//! The kernel in place of the device: it serves the queues of a pair between guest memory and tap, packets do not come by here.
//!
//! What is left to the device are beginnings and ends, interrupts, and what drivers say by the control queue. Rings are the
//! whole state, and the same whoever serves them, so each program decides for itself: a guest does not notice.

use std::error::Error;
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

use oslib::eventfd::EventFd;
use oslib::vhost::{QUEUES, Ring, Vhost, VhostError};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::features;
use crate::virtio::{Broken, Driver};

/// What serves the two queues of a pair in place of the device. [`Vhost`] is the one there is; a test has one that it steers.
pub trait Accelerator: Send + fmt::Debug {
    /// Makes this process the one that is served, in this memory.
    ///
    /// # Errors
    /// Those of the kernel, for example that another process is.
    fn claim(&mut self, memory: &GuestMemoryMmap) -> Result<(), VhostError>;

    /// Whether this process is served.
    fn is_claimed(&self) -> bool;

    /// Leaves it to the next process that claims it. Does nothing if this one has not.
    ///
    /// # Errors
    /// Those of the kernel.
    fn release(&mut self) -> Result<(), VhostError>;

    /// Says what was agreed on with the driver, of what concerns rings. No queue is being served.
    ///
    /// # Errors
    /// Those of the kernel.
    fn agree(&mut self, features: u64) -> Result<(), VhostError>;

    /// Serves queue `index` of the pair, below [`QUEUES`], from now on.
    ///
    /// # Errors
    /// Those of the kernel; the queue is not served then.
    fn start(&mut self, index: usize, ring: &Ring<'_>) -> Result<(), VhostError>;

    /// Serves it no more; returns the index of the next available entry to take. Nothing of it is under way then.
    ///
    /// # Errors
    /// Those of the kernel.
    fn stop(&mut self, index: usize) -> Result<u16, VhostError>;
}

impl Accelerator for Vhost {
    fn claim(&mut self, memory: &GuestMemoryMmap) -> Result<(), VhostError> {
        Vhost::claim(self, memory)
    }

    fn is_claimed(&self) -> bool {
        Vhost::is_claimed(self)
    }

    fn release(&mut self) -> Result<(), VhostError> {
        Vhost::release(self)
    }

    fn agree(&mut self, features: u64) -> Result<(), VhostError> {
        Vhost::agree(self, features)
    }

    fn start(&mut self, index: usize, ring: &Ring<'_>) -> Result<(), VhostError> {
        Vhost::start(self, index, ring)
    }

    fn stop(&mut self, index: usize) -> Result<u16, VhostError> {
        Vhost::stop(self, index)
    }
}

/// The kernel cannot take part.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VhostUnfit {
    /// It cannot be asked.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// It has not what drivers are offered anyway.
    #[error(
        "/dev/vhost-net of this kernel has features {found:#x}, at least {needed:#x} are needed: say vhost=off"
    )]
    Features {
        /// Its features.
        found: u64,
        /// What every device offers.
        needed: u64,
    },
}

/// The features that concern rings, all of which every device offers: whoever serves the queues must have them.
fn ring_features() -> u64 {
    features::bits([
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_F_VERSION_1,
    ])
}

/// Whether the kernel can serve queues as this device does. Changes nothing.
///
/// # Errors
/// [`VhostUnfit`].
pub fn check_vhost(vhost: &Vhost) -> Result<(), VhostUnfit> {
    let (found, needed) = (vhost.features()?, ring_features());
    match needed & !found {
        0 => Ok(()),
        _ => Err(VhostUnfit::Features { found, needed }),
    }
}

/// The kernel's part in a queue pair.
#[derive(Debug)]
pub(super) struct Accelerated {
    accelerator: Box<dyn Accelerator>,
    /// An update hands it over: the next process claims it once this one has released it. So it is claimed no longer than
    /// a driver uses it.
    handed_over: bool,
    /// By what each queue calls for an interrupt.
    calls: [EventFd; QUEUES],
    /// By what the kernel tells that it cannot make sense of a queue.
    error: EventFd,
    served: [bool; QUEUES],
}

impl Accelerated {
    pub(super) fn new(accelerator: Box<dyn Accelerator>, handed_over: bool) -> io::Result<Self> {
        Ok(Self {
            accelerator,
            handed_over,
            calls: [EventFd::new()?, EventFd::new()?],
            error: EventFd::new()?,
            served: [false; QUEUES],
        })
    }

    pub(super) fn call(&self, side: usize) -> &EventFd {
        &self.calls[side]
    }

    pub(super) fn error(&self) -> &EventFd {
        &self.error
    }

    pub(super) fn serves(&self, side: usize) -> bool {
        self.served[side]
    }

    /// Has the kernel serve queue number `queue` of the device, if it does not yet.
    pub(super) fn start(
        &mut self,
        driver: &Driver,
        queue: usize,
        doorbell: &EventFd,
        link: BorrowedFd<'_>,
    ) -> Result<(), VhostError> {
        let side = queue % QUEUES;
        if self.served[side] {
            return Ok(());
        }
        if !self.accelerator.is_claimed() {
            self.accelerator.claim(&driver.memory)?;
        }
        if self.served == [false; QUEUES] {
            self.accelerator.agree(driver.features & ring_features())?;
        }
        let set_up = &driver.queues[queue];
        let ring = Ring {
            size: set_up.size(),
            descriptors: GuestAddress(set_up.desc_table()),
            available: GuestAddress(set_up.avail_ring()),
            used: GuestAddress(set_up.used_ring()),
            next_available: set_up.next_avail(),
            kick: doorbell,
            call: &self.calls[side],
            error: &self.error,
            link,
        };
        self.accelerator.start(side, &ring)?;
        self.served[side] = true;
        Ok(())
    }

    /// Has the kernel serve the pair no more, whose first queue is number `first` of the device: everything is in the queues
    /// as if the device had served them, and interrupts that were called for have been sent.
    pub(super) fn stop(&mut self, driver: &mut Driver, first: usize) -> Result<(), Broken> {
        for side in 0..QUEUES {
            if !std::mem::take(&mut self.served[side]) {
                continue;
            }
            let index = first + side;
            let next_avail =
                self.accelerator.stop(side).map_err(|error| Broken::queue(index, told(&error)))?;
            let Driver { memory, queues, .. } = driver;
            let used = queues[index].used_idx(memory, Ordering::Acquire);
            queues[index].set_next_used(used.map_err(|error| Broken::queue(index, error))?.0);
            queues[index].set_next_avail(next_avail);
            self.interrupt(driver, index)?;
        }
        Ok(())
    }

    /// The guest stands still, and may go on elsewhere.
    pub(super) fn rest(&mut self, driver: &mut Driver, first: usize) -> Result<(), Broken> {
        self.stop(driver, first)?;
        self.release_for_the_next();
        Ok(())
    }

    /// The process goes, and the kernel's thread with it.
    pub(super) fn leave_process(&mut self) {
        if let Err(error) = self.accelerator.release() {
            tracing::error!(error = %told(&error), "vhost-net cannot be released");
        }
    }

    /// The driver is no more. An update asks nothing of a device without a driver, so the kernel is released here, too.
    pub(super) fn forget(&mut self) {
        for (side, served) in self.served.iter_mut().enumerate() {
            if std::mem::take(served)
                && let Err(error) = self.accelerator.stop(side)
            {
                tracing::error!(error = %told(&error), "vhost-net cannot be stopped");
            }
        }
        self.release_for_the_next();
    }

    fn release_for_the_next(&mut self) {
        if self.handed_over {
            self.leave_process();
        }
    }

    /// Interrupts the driver if queue number `index` of the device has called for it.
    pub(super) fn interrupt(&self, driver: &Driver, index: usize) -> Result<(), Broken> {
        match self.calls[index % QUEUES].drain() {
            Ok(0) => Ok(()),
            Ok(_) => {
                driver.interrupt.queue(index);
                Ok(())
            }
            Err(error) => Err(Broken::queue(index, error)),
        }
    }
}

/// An error with its cause.
pub(super) fn told(error: &VhostError) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
