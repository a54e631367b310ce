//! Taking requests out of a queue, a bounded number at a time.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use oslib::eventfd::EventFd;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::{Broken, Direction, Watch, WatchToken};

/// The longest chain, as in QEMU (`VIRTQUEUE_MAX_SIZE`): an indirect table could have far more descriptors than a queue.
const MAX_DESCRIPTORS: usize = 1024;

/// A request: a chain of descriptors in guest memory.
pub(super) type Request<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// Takes the next request of queue `index`. If there is none, the driver will tell of the next one.
pub(super) fn next<'m>(
    memory: &'m GuestMemoryMmap,
    queue: &mut Queue,
    index: usize,
) -> Result<Option<Request<'m>>, Broken> {
    if !queue.ready() {
        return Ok(None);
    }
    if let Some(request) = take(memory, queue, index)? {
        return Ok(Some(request));
    }
    // The driver may have added one before it saw that it is to tell.
    match queue.enable_notification(memory).map_err(|error| Broken::queue(index, error))? {
        true => take(memory, queue, index),
        false => Ok(None),
    }
}

/// Takes the next request of queue `index`, if there is one.
///
/// # Errors
/// The ring cannot be read: to go on without the entry would be to come back to it for ever. Or the request is longer than
/// any that makes sense.
pub(super) fn take<'m>(
    memory: &'m GuestMemoryMmap,
    queue: &mut Queue,
    index: usize,
) -> Result<Option<Request<'m>>, Broken> {
    let broken = |error| Broken::queue(index, error);
    if queue.avail_idx(memory, Ordering::Acquire).map_err(broken)?.0 == queue.next_avail() {
        return Ok(None);
    }
    // The iterator says the same of an empty ring and of one that cannot be read.
    let request = queue.iter(memory).map_err(broken)?.next();
    let request = request.ok_or_else(|| Broken::queue(index, "the available ring cannot be read"))?;
    if request.clone().nth(MAX_DESCRIPTORS).is_some() {
        let what = format_args!("more than {MAX_DESCRIPTORS} descriptors in a chain");
        return Err(Broken::queue(index, what));
    }
    Ok(Some(request))
}

/// A descriptor that is always ready. Who watches it gets another turn, after everybody else who is ready: for a device that
/// has done enough for one turn, as a driver can add requests for as long as somebody serves them.
#[derive(Debug)]
pub(super) struct AnotherTurn(EventFd);

impl AnotherTurn {
    pub(super) fn new() -> io::Result<AnotherTurn> {
        let event = EventFd::new()?;
        event.signal()?;
        Ok(AnotherTurn(event))
    }

    pub(super) fn watch(&self, token: WatchToken) -> Watch<'_> {
        Watch { fd: self.0.as_fd(), token, direction: Direction::Read }
    }
}
