//! Doorbells: how the driver tells that it has put something into a queue.
//!
//! Each queue has an eventfd. KVM signals it where the driver writes; a write that becomes an exit all the same, because
//! KVM was not told or another BAR is in the way, signals it from here. So there is one way on for both.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use oslib::eventfd::EventFd;

use super::{NOTIFY, NOTIFY_STEP};
use crate::pci::Hypervisor;

pub(super) struct Doorbells {
    bells: Arc<[EventFd]>,
    hypervisor: Arc<dyn Hypervisor>,
    /// The beginning of the BAR for which KVM has them.
    attached: Mutex<Option<u64>>,
}

impl Doorbells {
    pub(super) fn new(count: usize, hypervisor: Arc<dyn Hypervisor>) -> io::Result<Self> {
        let bells = (0..count).map(|_| EventFd::new()).collect::<io::Result<_>>()?;
        Ok(Self { bells, hypervisor, attached: Mutex::new(None) })
    }

    pub(super) fn bells(&self) -> &Arc<[EventFd]> {
        &self.bells
    }

    /// Rings for queue number `queue`, if there is one.
    pub(super) fn ring(&self, queue: u64) {
        let bell = usize::try_from(queue).ok().and_then(|queue| self.bells.get(queue));
        if let Some(Err(error)) = bell.map(EventFd::signal) {
            tracing::error!(%error, queue, "cannot ring a doorbell");
        }
    }

    pub(super) fn silence(&self, queue: usize) {
        if let Some(Err(error)) = self.bells.get(queue).map(EventFd::drain) {
            tracing::error!(%error, queue, "cannot silence a doorbell");
        }
    }

    /// Has KVM listen where the BAR is now. Asks under a lock, so that of two vCPUs that move the BAR the last one counts.
    pub(super) fn follow(&self, memory: impl FnOnce() -> Option<Range<u64>>) {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = memory().map(|memory| memory.start);
        if *attached == wanted {
            return;
        }
        if let Some(base) = attached.take() {
            for (bell, address) in self.bells.iter().zip(addresses(base)) {
                // Of those that could not be attached KVM knows nothing, and says so.
                let _ = self.hypervisor.detach_doorbell(address, bell);
            }
        }
        if let Some(base) = wanted {
            for (bell, address) in self.bells.iter().zip(addresses(base)) {
                if let Err(error) = self.hypervisor.attach_doorbell(address, bell) {
                    tracing::debug!(%error, address, "this doorbell is rung by exits");
                }
            }
        }
        *attached = wanted;
    }
}

/// The addresses of the queues' notifications in a BAR.
fn addresses(base: u64) -> impl Iterator<Item = u64> {
    (0..).map(move |queue| base + NOTIFY + queue * NOTIFY_STEP)
}
