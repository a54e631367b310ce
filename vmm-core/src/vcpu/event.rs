//! What vCPUs and small devices have to tell the machine's owner, and the bell that wakes its loop.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use oslib::eventfd::EventFd;

use crate::error::MachineError;

/// Something that the owner of the machine must act upon. A vCPU that fails is parked when this arrives; after
/// [`VcpuEvent::Reset`] and [`VcpuEvent::PowerOff`] the vCPUs go on until the owner pauses them.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum VcpuEvent {
    /// The guest asked for a reset through the named device.
    Reset {
        /// `i8042` or `ACPI`.
        source: &'static str,
    },
    /// The guest powered the machine off.
    PowerOff,
    /// The guest triple-faulted, which a PC answers with a reset.
    TripleFault {
        /// The vCPU.
        vcpu: usize,
    },
    /// KVM reports a system event.
    System {
        /// The vCPU.
        vcpu: usize,
        /// `KVM_SYSTEM_EVENT_*`.
        kind: u32,
    },
    /// The vCPU cannot go on: KVM or the processor refused, or an exit came that this machine does not know.
    Failed {
        /// The vCPU.
        vcpu: usize,
        /// What happened, for people.
        message: String,
    },
}

/// The sending half. Clones share the queue.
#[derive(Debug, Clone)]
pub struct EventSender {
    sender: Sender<VcpuEvent>,
    bell: Arc<EventFd>,
}

impl EventSender {
    /// Queues an event and rings the bell. An owner who is gone is not told, and misses nothing.
    pub fn send(&self, event: VcpuEvent) {
        if self.sender.send(event).is_ok()
            && let Err(error) = self.bell.signal()
        {
            tracing::error!(%error, "cannot ring the event bell");
        }
    }
}

/// The receiving half: a descriptor that is readable while there are events, and the events.
#[derive(Debug)]
pub struct EventQueue {
    receiver: Mutex<Receiver<VcpuEvent>>,
    bell: Arc<EventFd>,
}

impl EventQueue {
    /// Returns the next event. The bell falls silent once there is none left.
    pub fn try_recv(&self) -> Option<VcpuEvent> {
        let receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        receiver.try_recv().ok().or_else(|| {
            // Silenced first, looked once more afterwards: an event that comes in between rings again.
            if let Err(error) = self.bell.drain() {
                tracing::error!(%error, "cannot silence the event bell");
            }
            receiver.try_recv().ok()
        })
    }
}

impl AsFd for EventQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// Makes a queue.
///
/// # Errors
/// The kernel's answer to `eventfd`.
pub fn event_queue() -> Result<(EventSender, EventQueue), MachineError> {
    let bell = EventFd::new().map_err(|source| MachineError::Host { what: "an eventfd", source })?;
    let bell = Arc::new(bell);
    let (sender, receiver) = channel();
    let queue = EventQueue { receiver: Mutex::new(receiver), bell: Arc::clone(&bell) };
    Ok((EventSender { sender, bell }, queue))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_bell_rings_while_there_are_events() {
        let (sender, queue) = event_queue().unwrap();
        let rings = || queue.bell.wait(Duration::ZERO).unwrap();
        assert!(!rings());
        sender.send(VcpuEvent::PowerOff);
        sender.send(VcpuEvent::TripleFault { vcpu: 3 });
        assert!(rings());
        assert_eq!(queue.try_recv(), Some(VcpuEvent::PowerOff));
        assert!(rings());
        assert_eq!(queue.try_recv(), Some(VcpuEvent::TripleFault { vcpu: 3 }));
        assert_eq!(queue.try_recv(), None);
        assert!(!rings());
        drop(queue);
        sender.send(VcpuEvent::PowerOff);
    }
}
