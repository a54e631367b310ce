//! Packets from the network to the driver: read straight into its buffers.
//!
//! How long a packet is, a tap tells only by reading it. So what the buffers of the moment do not hold goes into memory of
//! ours, and such a packet waits there, in one piece, until the driver has more buffers: the one thing that the device
//! holds between two calls. It is part of the saved state.

use std::collections::VecDeque;
use std::io;

use oslib::packet::{self, MAX_SLICES};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_queue::QueueT;
use vm_memory::{GuestMemoryMmap, Permissions, VolatileSlice};

use super::ring::{
    add_slices, ask_for_kick, gather, give_back_together, ignore_kicks, next_chain, scatter, signal_since,
    total,
};
use super::transmit::is_gone;
use super::{BURST_BYTES, BURST_PACKETS, HEADER_LEN, MAX_PACKET_LEN, Pair};
use crate::virtio::{Broken, Driver};

/// Where `num_buffers` is in the header.
const NUM_BUFFERS_AT: usize = 10;

impl Pair {
    /// Reads packets into `queue` as long as there are packets and buffers, and for one turn at most. `rest` is room for
    /// what buffers do not hold, [`MAX_PACKET_LEN`] bytes.
    pub(super) fn receive(
        &mut self,
        driver: &mut Driver,
        queue: usize,
        rest: &mut [u8],
    ) -> Result<(), Broken> {
        // Buffers borrow the memory while queues change. What is cloned is a list of references.
        let memory = driver.memory.clone();
        let before = driver.queues[queue].next_used();
        let mut buffers = Buffers::new(&memory, queue, driver.has(VIRTIO_NET_F_MRG_RXBUF));
        self.receiving = true;
        ignore_kicks(driver, queue)?;
        self.receive_burst(driver, &mut buffers, rest)?;
        buffers.put_back(driver);
        signal_since(driver, queue, before)
    }

    fn receive_burst(
        &mut self,
        driver: &mut Driver,
        buffers: &mut Buffers<'_>,
        rest: &mut [u8],
    ) -> Result<(), Broken> {
        let mut bytes = 0;
        for _ in 0..BURST_PACKETS {
            if bytes > BURST_BYTES || self.gone {
                break;
            }
            buffers.take(driver, self.held.as_ref().map_or(MAX_PACKET_LEN, Vec::len))?;
            if !self.can_go_on(driver, buffers) {
                // Asked only now, for all that was taken: the driver does not kick for what it made available before.
                if ask_for_kick(driver, buffers.queue)? {
                    ignore_kicks(driver, buffers.queue)?;
                    continue;
                }
                self.receiving = false;
                break;
            }
            let received = match self.held.take() {
                Some(held) => buffers.fill(&held).then_some(held.len()),
                // What waited is all that the kernel leaves to us.
                None if self.accelerated.is_some() => break,
                None => match self.read(buffers, rest) {
                    Got::Packet(len) => self.sort(buffers, rest, len),
                    Got::Refused => None,
                    Got::Nothing => break,
                },
            };
            if let Some(len) = received {
                bytes += len;
                buffers.give_back(driver, len)?;
            }
        }
        Ok(())
    }

    /// Whether there is a buffer at all and, for a packet that waits, whether there are enough, or never will be.
    fn can_go_on(&self, driver: &Driver, buffers: &Buffers<'_>) -> bool {
        let waiting = self.held.as_ref().map_or(0, Vec::len);
        let all =
            !buffers.mergeable || buffers.chains.len() >= usize::from(driver.queues[buffers.queue].size());
        !buffers.chains.is_empty() && (waiting <= buffers.bytes || all)
    }

    /// Reads a packet into the buffers and `rest`.
    fn read(&mut self, buffers: &Buffers<'_>, rest: &mut [u8]) -> Got {
        match packet::receive(self.link.fd(), buffers.pieces(), rest) {
            // A tap does not end; what stands in for it does.
            Ok(0) => self.lose("its other end is closed"),
            Ok(len) => return Got::Packet(len),
            Err(error) if is_for_now(&error) => {}
            Err(error) if is_gone(&error) => self.lose(error),
            // A tap has taken the packet off its queue, and cannot say in a header what it is like (EINVAL).
            Err(error) => {
                tracing::debug!(link = ?self.link, %error, "a packet for the guest was dropped");
                return Got::Refused;
            }
        }
        Got::Nothing
    }

    /// What becomes of a packet that was read: its length if the buffers have it. One that they do not hold waits for
    /// more if it may have several, or is dropped.
    fn sort(&mut self, buffers: &Buffers<'_>, rest: &[u8], len: usize) -> Option<usize> {
        let room = total(buffers.pieces());
        match len {
            _ if !(HEADER_LEN..=MAX_PACKET_LEN).contains(&len) => None,
            _ if len <= room => Some(len),
            _ if !buffers.mergeable => None,
            _ => {
                let mut packet = gather(buffers.pieces());
                packet.extend(rest.iter().take(len - room));
                self.held = Some(packet);
                None
            }
        }
    }
}

/// What came of reading a packet.
enum Got {
    /// One, of this length.
    Packet(usize),
    /// One that cannot be read: the next one may be.
    Refused,
    /// There is none now, or there will be no more.
    Nothing,
}

/// Whether there may be a packet later.
fn is_for_now(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOMEM | libc::ENOBUFS))
}

/// A chain that the driver has made available for receiving.
struct Chain {
    head: u16,
    /// How many of [`Buffers::slices`] are its.
    slices: usize,
    bytes: usize,
}

/// The chains that were taken and not yet used.
struct Buffers<'m> {
    memory: &'m GuestMemoryMmap,
    queue: usize,
    /// Whether a packet may be in several chains.
    mergeable: bool,
    chains: VecDeque<Chain>,
    /// Bytes of all of them.
    bytes: usize,
    /// Their memory, in order, after that of chains that were used.
    slices: Vec<VolatileSlice<'m>>,
    used_slices: usize,
}

impl<'m> Buffers<'m> {
    fn new(memory: &'m GuestMemoryMmap, queue: usize, mergeable: bool) -> Self {
        Self {
            memory,
            queue,
            mergeable,
            chains: VecDeque::new(),
            bytes: 0,
            slices: Vec::new(),
            used_slices: 0,
        }
    }

    /// Takes chains until they hold `wanted` bytes, or until there are no more.
    fn take(&mut self, driver: &mut Driver, wanted: usize) -> Result<(), Broken> {
        while self.chains.is_empty() || (self.mergeable && self.bytes < wanted) {
            // More than the queue has, only a driver offers that offers some twice.
            if self.chains.len() >= usize::from(driver.queues[self.queue].size()) {
                break;
            }
            let Some(chain) = next_chain(driver, self.memory, self.queue)? else { break };
            let head = chain.head_index();
            let before = self.slices.len();
            let in_ram = add_slices(&mut self.slices, chain, self.memory, Permissions::Write, MAX_SLICES);
            let bytes = total(&self.slices[before..]);
            if !in_ram || bytes == 0 {
                return Err(Broken::queue(self.queue, "a buffer for packets has no memory to write to"));
            }
            self.chains.push_back(Chain { head, slices: self.slices.len() - before, bytes });
            self.bytes += bytes;
        }
        Ok(())
    }

    /// The memory for the next packet, as much as one system call takes.
    fn pieces(&self) -> &[VolatileSlice<'m>] {
        let free = &self.slices[self.used_slices..];
        &free[..free.len().min(MAX_SLICES)]
    }

    /// Copies a packet to where the next one goes, if there is room.
    fn fill(&self, packet: &[u8]) -> bool {
        let fits = packet.len() <= self.bytes;
        if fits {
            scatter(&self.slices[self.used_slices..], 0, packet);
        }
        fits
    }

    /// Gives a packet of `len` bytes, which is in the first of these chains, to the driver.
    fn give_back(&mut self, driver: &mut Driver, len: usize) -> Result<(), Broken> {
        let pieces = &self.slices[self.used_slices..];
        let mut used = Vec::new();
        let mut left = len;
        while left > 0 {
            let Some(chain) = self.chains.pop_front() else { break };
            let written = chain.bytes.min(left);
            left -= written;
            self.bytes -= chain.bytes;
            self.used_slices += chain.slices;
            used.push((chain.head, written as u32));
        }
        scatter(pieces, NUM_BUFFERS_AT, &(used.len() as u16).to_le_bytes());
        give_back_together(driver, self.queue, &used)
    }

    /// Leaves the chains that are still here to the next call.
    fn put_back(&self, driver: &mut Driver) {
        let queue = &mut driver.queues[self.queue];
        queue.set_next_avail(queue.next_avail().wrapping_sub(self.chains.len() as u16));
    }
}
