//! Packets from the driver to the network: written straight from its buffers.

use std::io;

use oslib::packet::{self, MAX_SLICES};
use virtio_queue::{DescriptorChain, QueueOwnedT};
use vm_memory::{GuestMemoryMmap, Permissions, VolatileSlice};

use super::ring::{add_slices, ask_for_kick, ignore_kicks, next_chain, total};
use super::{BURST_BYTES, BURST_PACKETS, HEADER_LEN, MAX_PACKET_LEN, Pair};
use crate::virtio::{Broken, Driver};

/// What became of a packet.
enum Sent {
    /// Out of the way, with this many bytes.
    Done(usize),
    /// There is no room for it now.
    Later,
}

impl Pair {
    /// Writes the packets of `queue` as long as the network takes them, and for one turn at most.
    pub(super) fn transmit(&mut self, driver: &mut Driver, queue: usize) -> Result<(), Broken> {
        let memory = driver.memory.clone();
        self.sending = true;
        ignore_kicks(driver, queue)?;
        let (mut bytes, mut given_back, mut packet) = (0, false, Vec::new());
        for _ in 0..BURST_PACKETS {
            if bytes > BURST_BYTES {
                break;
            }
            let Some(chain) = next_chain(driver, &memory, queue)? else {
                if ask_for_kick(driver, queue)? {
                    ignore_kicks(driver, queue)?;
                    continue;
                }
                self.sending = false;
                break;
            };
            let head = chain.head_index();
            match self.send(&mut packet, chain, &memory) {
                Sent::Done(len) => bytes += len,
                Sent::Later => {
                    driver.queues[queue].go_to_previous_position();
                    break;
                }
            }
            driver.give_back(queue, head, 0)?;
            given_back = true;
        }
        if given_back { driver.signal(queue) } else { Ok(()) }
    }

    /// Sends one packet, which it collects in `packet`. One that makes no sense, to us or to the network, is dropped: a network
    /// may lose packets.
    fn send<'m>(
        &mut self,
        packet: &mut Vec<VolatileSlice<'m>>,
        chain: DescriptorChain<&'m GuestMemoryMmap>,
        memory: &'m GuestMemoryMmap,
    ) -> Sent {
        packet.clear();
        // One piece too many is too many for the system call as well.
        let in_ram = add_slices(packet, chain, memory, Permissions::Read, MAX_SLICES + 1);
        let len = total(packet);
        let sensible = packet.len() <= MAX_SLICES && (HEADER_LEN + 1..=MAX_PACKET_LEN).contains(&len);
        if self.gone || !in_ram || !sensible {
            return Sent::Done(0);
        }
        match packet::send(self.link.fd(), packet) {
            Ok(()) => return Sent::Done(len),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Sent::Later,
            Err(error) if is_gone(&error) => self.lose(error),
            // The header does not fit the packet, or the interface is down.
            Err(error) => tracing::debug!(link = ?self.link, %error, "a packet of the guest is dropped"),
        }
        Sent::Done(0)
    }
}

/// Whether there will never be a network behind this descriptor again. EBADFD is a tap's whose interface was deleted.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::EBADF | libc::EPIPE))
}
