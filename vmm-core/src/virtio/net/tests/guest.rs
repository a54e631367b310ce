//! The other side of the device: a driver that goes by the book, and a network that loses nothing.

use std::collections::BTreeMap;
use std::io;
use std::num::Wrapping;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oslib::tap::Offloads;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::virtio::net::{HEADER_LEN, Link};
use crate::virtio::{Direction, Driver, Interrupt, VirtioDevice};

/// Entries of each queue.
pub(super) const SIZE: u16 = 16;
/// Bytes for each queue's rings.
const RINGS: u64 = 0x1000;
/// Where buffers begin, and how much memory each queue has for them.
const BUFFERS: u64 = 0x10_0000;
const BUFFERS_LEN: u64 = 0x20_0000;
const QUEUES: u64 = 5;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;

/// Interrupts that were raised and not yet looked at.
#[derive(Debug, Default)]
pub(super) struct Interrupts {
    pub(super) queues: [AtomicU32; QUEUES as usize],
    pub(super) config: AtomicU32,
}

impl Interrupt for Arc<Interrupts> {
    fn queue(&self, index: usize) {
        self.queues[index].fetch_add(1, Ordering::Relaxed);
    }

    fn config(&self) {
        self.config.fetch_add(1, Ordering::Relaxed);
    }
}

/// A network that keeps packets in order and loses none, as long as nobody drops them on purpose.
#[derive(Debug, Clone)]
pub(super) struct Wire {
    pub(super) socket: Arc<UnixDatagram>,
    pub(super) adopted: bool,
    /// What the device has set.
    pub(super) set: Arc<Mutex<Vec<String>>>,
}

impl Link for Wire {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn is_adopted(&self) -> bool {
        self.adopted
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.set.lock().unwrap().push(format!("offloads {:#x}", offloads.bits()));
        Ok(())
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        self.set.lock().unwrap().push(format!("attached {attached}"));
        Ok(())
    }
}

/// A wire and its other end.
pub(super) fn wire() -> (Wire, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    (Wire { socket: Arc::new(ours), adopted: true, set: Arc::default() }, theirs)
}

/// A packet as it is on a wire: an empty header, and a payload.
pub(super) fn framed(payload: &[u8]) -> Vec<u8> {
    [&[0; HEADER_LEN], payload].concat()
}

/// One queue as the driver sees it.
#[derive(Debug, Default)]
struct Side {
    available: Wrapping<u16>,
    used: Wrapping<u16>,
    /// Whether the device has to be told.
    kick: bool,
    /// Descriptors that are free.
    free: Vec<u16>,
    /// Chains under way, by their head.
    under_way: BTreeMap<u16, Chain>,
}

#[derive(Debug)]
struct Chain {
    descriptors: Vec<u16>,
    /// Address and length of the memory that the device may write.
    writable: Vec<(u64, usize)>,
}

/// A driver, and what the device knows of it.
pub(super) struct Guest {
    pub(super) driver: Driver,
    pub(super) interrupts: Arc<Interrupts>,
    sides: Vec<Side>,
    event_index: bool,
}

impl Guest {
    pub(super) fn new(features: &[u32], event_index: bool) -> Self {
        let ram = (GuestAddress(0), (BUFFERS + QUEUES * BUFFERS_LEN) as usize);
        let memory = GuestMemoryMmap::from_ranges(&[ram]).unwrap();
        let features = features.iter().chain([&VIRTIO_F_VERSION_1]).fold(0, |bits, bit| bits | 1 << bit);
        let interrupts = Arc::new(Interrupts::default());
        let queues = (0..QUEUES).map(|queue| ring(queue * RINGS, event_index)).collect();
        let side = || Side { free: (0..SIZE).rev().collect(), ..Side::default() };
        let driver = Driver { memory, queues, features, interrupt: Box::new(interrupts.clone()) };
        Self { driver, interrupts, sides: (0..QUEUES).map(|_| side()).collect(), event_index }
    }

    /// A new driver structure over the same memory, as the target of an update has.
    pub(super) fn move_out(&mut self) {
        let queues = self.driver.queues.iter().map(|queue| Queue::try_from(queue.state()).unwrap());
        self.driver = Driver {
            memory: self.driver.memory.clone(),
            queues: queues.collect(),
            features: self.driver.features,
            interrupt: Box::new(self.interrupts.clone()),
        };
    }

    fn read(&self, at: u64) -> u16 {
        self.driver.memory.read_obj(GuestAddress(at)).unwrap()
    }

    pub(super) fn write(&self, at: u64, value: u16) {
        self.driver.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    /// Free descriptors of a queue.
    pub(super) fn free(&self, queue: usize) -> usize {
        self.sides[queue].free.len()
    }

    /// Makes a chain available: pieces with these lengths, and what is to be in them; without a content they are for the device.
    pub(super) fn offer(&mut self, queue: usize, pieces: &[(usize, Option<&[u8]>)]) -> u16 {
        let (size, free) = (u64::from(SIZE), &mut self.sides[queue].free);
        let descriptors: Vec<_> = pieces.iter().map(|_| free.pop().expect("a free descriptor")).collect();
        let mut writable = Vec::new();
        for (at, (len, content)) in pieces.iter().enumerate() {
            let index = u64::from(descriptors[at]);
            let place = buffers(queue) + index * (BUFFERS_LEN / size);
            assert!(*len as u64 <= BUFFERS_LEN / size);
            self.driver.memory.write_slice(content.unwrap_or(&[]), GuestAddress(place)).unwrap();
            let next = descriptors.get(at + 1);
            let flags = next.map_or(0, |_| NEXT) | content.map_or(WRITE, |_| 0);
            self.describe(queue, descriptors[at], place, *len as u32, flags, next.copied().unwrap_or(0));
            if content.is_none() {
                writable.push((place, *len));
            }
        }
        let head = descriptors[0];
        self.sides[queue].under_way.insert(head, Chain { descriptors, writable });
        self.make_available(queue, head);
        head
    }

    /// Writes a descriptor, whatever is in it.
    pub(super) fn describe(&self, queue: usize, index: u16, place: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(queue as u64 * RINGS + u64::from(index) * 16);
        self.driver.memory.write_obj(place, at).unwrap();
        let words = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.driver.memory.write_obj(words, GuestAddress(at.0 + 8)).unwrap();
    }

    /// Puts a descriptor into the available ring, whatever it is.
    pub(super) fn make_available(&mut self, queue: usize, head: u16) {
        let (available, used) = (available_ring(queue), used_ring(queue));
        let old = self.sides[queue].available;
        self.write(available + 4 + u64::from(old.0 % SIZE) * 2, head);
        self.write(available + 2, (old + Wrapping(1)).0);
        self.sides[queue].available += 1;
        let wanted = match self.event_index {
            true => self.read(used + 4 + u64::from(SIZE) * 8) == old.0,
            false => self.read(used) & 1 == 0,
        };
        self.sides[queue].kick |= wanted;
    }

    /// Whether the driver has to tell the device of a queue. It has done so then.
    pub(super) fn has_to_kick(&mut self, queue: usize) -> bool {
        std::mem::take(&mut self.sides[queue].kick)
    }

    /// Takes what was used in a queue, as chains with their written bytes, if there was an interrupt.
    pub(super) fn interrupted(&mut self, queue: usize) -> Vec<Vec<u8>> {
        match self.interrupts.queues[queue].swap(0, Ordering::Relaxed) {
            0 => Vec::new(),
            _ => self.take(queue),
        }
    }

    /// Takes what was used in a queue.
    pub(super) fn take(&mut self, queue: usize) -> Vec<Vec<u8>> {
        let (available, used) = (available_ring(queue), used_ring(queue));
        let mut taken = Vec::new();
        while self.sides[queue].used.0 != self.read(used + 2) {
            let at = used + 4 + u64::from(self.sides[queue].used.0 % SIZE) * 8;
            let len = usize::from(self.read(at + 4)) | usize::from(self.read(at + 6)) << 16;
            let head = self.read(at);
            let chain = self.sides[queue].under_way.remove(&head).expect("a chain that is under way");
            self.sides[queue].free.extend(chain.descriptors);
            let mut bytes = Vec::new();
            for (place, room) in chain.writable {
                let mut piece = vec![0; room.min(len - bytes.len())];
                self.driver.memory.read_slice(&mut piece, GuestAddress(place)).unwrap();
                bytes.extend(piece);
            }
            assert_eq!(bytes.len(), len, "more was used than there is");
            taken.push(bytes);
            self.sides[queue].used += 1;
        }
        self.write(available + 4 + u64::from(SIZE) * 2, self.sides[queue].used.0);
        taken
    }

    /// Packets of a receive queue, without their headers, from what was used of it.
    pub(super) fn packets(used: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        let mut used = used.into_iter();
        let mut packets = Vec::new();
        while let Some(mut packet) = used.next() {
            let count = u16::from_le_bytes([packet[10], packet[11]]);
            for _ in 1..count {
                packet.extend(used.next().expect("all buffers of a packet are there with the first"));
            }
            packets.push(packet.split_off(HEADER_LEN));
        }
        packets
    }

    /// Executes a control command and returns the answer.
    pub(super) fn command(
        &mut self,
        device: &mut impl VirtioDevice,
        queue: usize,
        command: &[u8],
    ) -> Option<u8> {
        self.offer(queue, &[(command.len(), Some(command)), (1, None)]);
        device.queue_ready(&mut self.driver, queue).unwrap();
        match &self.take(queue)[..] {
            [answer] => answer.first().copied(),
            other => panic!("one command, {} answers", other.len()),
        }
    }
}

/// Calls the device for what it watches and is ready. Returns whether there was something.
pub(super) fn poll_once(device: &mut impl VirtioDevice, driver: &mut Driver) -> bool {
    let mut ready = Vec::new();
    for watch in device.watches() {
        let flags = match watch.direction {
            Direction::Read => PollFlags::POLLIN,
            Direction::Write => PollFlags::POLLOUT,
        };
        if poll(&mut [PollFd::new(watch.fd, flags)], PollTimeout::ZERO).unwrap() > 0 {
            ready.push(watch.token);
        }
    }
    for token in &ready {
        device.fd_ready(driver, *token).unwrap();
    }
    !ready.is_empty()
}

fn ring(base: u64, event_index: bool) -> Queue {
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_desc_table_address(Some(base as u32), Some(0));
    queue.set_avail_ring_address(Some(base as u32 + 0x400), Some(0));
    queue.set_used_ring_address(Some(base as u32 + 0x800), Some(0));
    queue.set_event_idx(event_index);
    queue.set_ready(true);
    queue
}

pub(super) fn available_ring(queue: usize) -> u64 {
    queue as u64 * RINGS + 0x400
}

fn used_ring(queue: usize) -> u64 {
    queue as u64 * RINGS + 0x800
}

fn buffers(queue: usize) -> u64 {
    BUFFERS + queue as u64 * BUFFERS_LEN
}
