//! What this device does with rings beyond [`Driver`]: several buffers are given back as one, and some are taken back.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use crate::virtio::requests::{self, Request};
use crate::virtio::{Broken, Driver};

/// Bytes before the first entry of either ring.
const RING_HEADER: u64 = 4;
/// Bytes of an entry of the used ring.
const USED_ENTRY: u64 = 8;
/// Bytes of an entry of the available ring.
const AVAILABLE_ENTRY: u64 = 2;

/// Takes the next chain that the driver has made available.
pub(super) fn next_chain<'m>(
    driver: &mut Driver,
    memory: &'m GuestMemoryMmap,
    queue: usize,
) -> Result<Option<Request<'m>>, Broken> {
    requests::take(memory, &mut driver.queues[queue], queue)
}

/// Does without the driver's kicks.
pub(super) fn ignore_kicks(driver: &mut Driver, queue: usize) -> Result<(), Broken> {
    let Driver { memory, queues, .. } = driver;
    queues[queue].disable_notification(memory).map_err(|error| Broken::queue(queue, error))
}

/// Asks the driver to kick for what it makes available beyond what was taken; says whether there is something already.
pub(super) fn ask_for_kick(driver: &mut Driver, queue: usize) -> Result<bool, Broken> {
    let Driver { memory, queues, .. } = driver;
    queues[queue].enable_notification(memory).map_err(|error| Broken::queue(queue, error))
}

/// Adds the pieces of guest memory that a chain has for the device to write, or to read, to `slices`, at most `limit`. Says
/// whether all of the chain is in RAM.
pub(super) fn add_slices<'m>(
    slices: &mut Vec<VolatileSlice<'m>>,
    chain: DescriptorChain<&'m GuestMemoryMmap>,
    memory: &'m GuestMemoryMmap,
    access: Permissions,
    limit: usize,
) -> bool {
    let (write, limit) = (access == Permissions::Write, slices.len() + limit);
    for descriptor in chain.filter(|descriptor| descriptor.is_write_only() == write) {
        let len = descriptor.len() as usize;
        let Ok(pieces) = GuestMemory::get_slices(memory, descriptor.addr(), len, access) else {
            return false;
        };
        for piece in pieces {
            match piece {
                Ok(_) if slices.len() == limit => return true,
                Ok(piece) => slices.push(piece),
                Err(_) => return false,
            }
        }
    }
    true
}

/// Bytes in `slices`.
pub(super) fn total(slices: &[VolatileSlice<'_>]) -> usize {
    slices.iter().map(VolatileSlice::len).sum()
}

/// Writes `bytes` at `offset` into memory that is in pieces, as far as it goes.
pub(super) fn scatter(slices: &[VolatileSlice<'_>], mut offset: usize, mut bytes: &[u8]) {
    for slice in slices {
        let Ok(place) = slice.offset(offset) else {
            offset -= slice.len();
            continue;
        };
        let count = place.len().min(bytes.len());
        place.copy_from(&bytes[..count]);
        (offset, bytes) = (0, &bytes[count..]);
    }
}

/// Reads what lies in pieces of memory.
pub(super) fn gather(slices: &[VolatileSlice<'_>]) -> Vec<u8> {
    let mut bytes = vec![0; total(slices)];
    let mut rest = &mut bytes[..];
    for slice in slices {
        let (piece, after) = rest.split_at_mut(slice.len());
        slice.copy_to(piece);
        rest = after;
    }
    bytes
}

/// Gives back several chains, each with the number of bytes that were written into it. The driver sees all of them at once: of
/// a packet in several buffers it expects the others where it finds the first.
pub(super) fn give_back_together(
    driver: &mut Driver,
    queue: usize,
    used: &[(u16, u32)],
) -> Result<(), Broken> {
    let Some(((head, len), before)) = used.split_last() else { return Ok(()) };
    let Driver { memory, queues, .. } = driver;
    let ring = &mut queues[queue];
    let mut next = Wrapping(ring.next_used());
    for (head, len) in before {
        let index = u64::from(next.0 % ring.size());
        let entry = (u64::from(*len) << 32 | u64::from(*head)).to_le_bytes();
        let place = ring.used_ring().checked_add(RING_HEADER + USED_ENTRY * index);
        let place = GuestAddress(place.ok_or_else(|| Broken::queue(queue, "its used ring wraps around"))?);
        memory.write_slice(&entry, place).map_err(|error| Broken::queue(queue, error))?;
        next += 1;
    }
    // Publishes the index, past all of them.
    ring.set_next_used(next.0);
    driver.give_back(queue, *head, *len)
}

/// Interrupts the driver, if it wants to know of what it was given back since the used index was `before`.
///
/// [`Driver::signal`] counts calls of [`Driver::give_back`], which are fewer here than the chains that were given back.
pub(super) fn signal_since(driver: &mut Driver, queue: usize, before: u16) -> Result<(), Broken> {
    let ring = &driver.queues[queue];
    let (before, now) = (Wrapping(before), Wrapping(ring.next_used()));
    if before == now {
        return Ok(());
    }
    if ring.event_idx_enabled() {
        // The driver writes its wish, then looks for what was used; here it is the other way round.
        fence(Ordering::SeqCst);
        let place = ring.avail_ring().checked_add(RING_HEADER + AVAILABLE_ENTRY * u64::from(ring.size()));
        let place =
            GuestAddress(place.ok_or_else(|| Broken::queue(queue, "its available ring wraps around"))?);
        let wish: u16 =
            driver.memory.load(place, Ordering::Relaxed).map_err(|error| Broken::queue(queue, error))?;
        let passed = now - Wrapping(u16::from_le(wish)) - Wrapping(1) < now - before;
        if !passed {
            return Ok(());
        }
    }
    driver.interrupt.queue(queue);
    Ok(())
}
