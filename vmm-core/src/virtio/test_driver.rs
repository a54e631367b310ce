//! A driver for tests of devices: guest memory, queues, buffers.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::{Driver, Interrupt, VirtioDevice};

/// Bytes of guest memory.
pub(crate) const RAM: u64 = 4 << 20;
/// Each queue has a piece of its own: descriptors, and from here on the available ring and the used ring. (The rings of
/// virtio-queue's own mock overlap when they are full.) Buffers are behind all of them.
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const RINGS_LEN: u64 = 0x4000;
const BUFFERS: u64 = 1 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Address, length, and whether the device may write there.
type Buffer = (u64, u32, bool);

#[derive(Default)]
struct Interrupts {
    queues: Mutex<BTreeMap<usize, usize>>,
    config: AtomicUsize,
}

impl Interrupt for Arc<Interrupts> {
    fn queue(&self, index: usize) {
        *self.queues.lock().unwrap().entry(index).or_default() += 1;
    }

    fn config(&self) {
        self.config.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the device gave back.
#[derive(Debug)]
pub(crate) struct Used {
    pub(crate) head: u16,
    pub(crate) bytes: Vec<u8>,
}

struct Ring {
    base: u64,
    size: u16,
    available: u16,
    /// Up to where the device was told of requests.
    told: u16,
    next_descriptor: u16,
    next_used: u16,
    chains: BTreeMap<u16, Vec<Buffer>>,
}

impl Ring {
    fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.base + AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.base + USED)).unwrap();
        queue.set_ready(true);
        queue
    }
}

pub(crate) struct Guest {
    pub(crate) driver: Driver,
    rings: Vec<Ring>,
    next_buffer: u64,
    interrupts: Arc<Interrupts>,
}

impl Guest {
    /// Its driver has queues of these sizes, and agreed on these features.
    pub(crate) fn new(sizes: &[u16], features: u64) -> Guest {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        assert!(sizes.len() as u64 * RINGS_LEN <= BUFFERS);
        let rings: Vec<Ring> = sizes
            .iter()
            .zip(0..)
            .map(|(&size, index)| Ring {
                base: index * RINGS_LEN,
                size,
                available: 0,
                told: 0,
                next_descriptor: 0,
                next_used: 0,
                chains: BTreeMap::new(),
            })
            .collect();
        let queues = rings.iter().map(Ring::queue).collect();
        let interrupts = Arc::<Interrupts>::default();
        let driver = Driver { memory, queues, features, interrupt: Box::new(interrupts.clone()) };
        Guest { driver, rings, next_buffer: BUFFERS, interrupts }
    }

    fn room_for(&mut self, len: u32) -> u64 {
        if self.next_buffer + u64::from(len) > RAM {
            self.next_buffer = BUFFERS;
        }
        let at = self.next_buffer;
        self.next_buffer += u64::from(len);
        at
    }

    fn write<T: ByteValued>(&self, value: T, address: u64) {
        self.driver.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    fn read<T: ByteValued>(&self, address: u64) -> T {
        self.driver.memory.read_obj(GuestAddress(address)).unwrap()
    }

    /// Makes a chain available; gives its head.
    pub(crate) fn add(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let Ring { base, size, next_descriptor: head, available, .. } = self.rings[queue];
        let mut index = head;
        for (at, &(address, len, writable)) in buffers.iter().enumerate() {
            let next = (index + 1) % size;
            let flags = if at + 1 < buffers.len() { NEXT } else { 0 } | if writable { WRITE } else { 0 };
            self.write(Descriptor::new(address, len, flags, next), base + 16 * u64::from(index));
            index = next;
        }
        self.write(head, base + AVAILABLE + 4 + 2 * u64::from(available % size));
        self.rings[queue].next_descriptor = index;
        self.rings[queue].chains.insert(head, buffers.to_vec());
        self.claim(queue, 1);
        head
    }

    /// Makes a chain of `count` descriptors available, all of one byte that the device may write, by an indirect table.
    pub(crate) fn add_indirect(&mut self, queue: usize, count: u16) {
        const INDIRECT: u16 = 4;
        let table = self.room_for(u32::from(count) * 16);
        for index in 0..count {
            let flags = WRITE | if index + 1 < count { NEXT } else { 0 };
            self.write(Descriptor::new(BUFFERS, 1, flags, index + 1), table + 16 * u64::from(index));
        }
        let head = self.add(queue, &[(table, u32::from(count) * 16, true)]);
        let descriptor = Descriptor::new(table, u32::from(count) * 16, INDIRECT, 0);
        self.write(descriptor, self.rings[queue].base + 16 * u64::from(head));
    }

    /// Makes a buffer available that the device may write to.
    pub(crate) fn add_buffer(&mut self, queue: usize, len: u32) -> u16 {
        let at = self.room_for(len);
        self.add(queue, &[(at, len, true)])
    }

    /// Makes bytes available.
    pub(crate) fn add_output(&mut self, queue: usize, bytes: &[u8]) -> u16 {
        let at = self.room_for(bytes.len() as u32);
        self.driver.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        self.add(queue, &[(at, bytes.len() as u32, false)])
    }

    /// Says that there are so many requests more.
    pub(crate) fn claim(&mut self, queue: usize, count: u16) {
        let ring = &mut self.rings[queue];
        ring.available = ring.available.wrapping_add(count);
        let (available, address) = (ring.available, ring.base + AVAILABLE + 2);
        self.write(available, address);
    }

    /// Chains that the device has not given back.
    pub(crate) fn pending(&self, queue: usize) -> u16 {
        self.rings[queue].available.wrapping_sub(self.rings[queue].next_used)
    }

    /// What the device gave back since this was asked last.
    pub(crate) fn used(&mut self, queue: usize) -> Vec<Used> {
        let mut all = Vec::new();
        let Ring { base, size, .. } = self.rings[queue];
        while self.rings[queue].next_used != self.read::<u16>(base + USED + 2) {
            let element = base + USED + 4 + 8 * u64::from(self.rings[queue].next_used % size);
            let head = u16::try_from(self.read::<u32>(element)).unwrap();
            let mut left = self.read::<u32>(element + 4) as usize;
            self.rings[queue].next_used = self.rings[queue].next_used.wrapping_add(1);
            let chain = self.rings[queue].chains.remove(&head).expect("a chain that is the device's");
            let mut bytes = Vec::new();
            for (address, len, _) in chain.into_iter().filter(|&(.., writable)| writable) {
                let mut piece = vec![0; left.min(len as usize)];
                self.driver.memory.read_slice(&mut piece, GuestAddress(address)).unwrap_or_default();
                left -= piece.len();
                bytes.extend(piece);
            }
            assert_eq!(left, 0, "more was written than there was room for");
            all.push(Used { head, bytes });
        }
        all
    }

    /// Interrupts of a queue so far.
    pub(crate) fn interrupts(&self, queue: usize) -> usize {
        self.interrupts.queues.lock().unwrap().get(&queue).copied().unwrap_or_default()
    }

    /// Interrupts of the configuration so far.
    pub(crate) fn config_interrupts(&self) -> usize {
        self.interrupts.config.load(Ordering::Relaxed)
    }

    /// Goes on by event index: the device is told of requests only when it has asked for that.
    pub(crate) fn agree_on_event_index(&mut self) {
        self.driver.queues.iter_mut().for_each(|queue| queue.set_event_idx(true));
    }

    /// Whether the device has asked to be told of a request that was added since this was asked last.
    pub(crate) fn must_tell(&mut self, queue: usize) -> bool {
        let Ring { base, size, available, told, .. } = self.rings[queue];
        let event: u16 = self.read(base + USED + 4 + 8 * u64::from(size));
        self.rings[queue].told = available;
        available.wrapping_sub(event).wrapping_sub(1) < available.wrapping_sub(told)
    }

    /// What the transport keeps of a driver over an update.
    pub(crate) fn move_to_another_program(&mut self) {
        for queue in &mut self.driver.queues {
            *queue = Queue::try_from(queue.state()).unwrap();
        }
    }
}

/// Takes a device's state to another one, by a frame.
pub(crate) fn saved_and_loaded(
    old: &mut dyn VirtioDevice,
    new: &mut dyn VirtioDevice,
) -> Result<(), BoxError> {
    let mut writer = FrameWriter::default();
    let old = old.persistent().expect("it can be saved");
    old.save(&mut writer, 3)?;
    let mut frame = Frame::parse(&writer.finish(1))?;
    new.persistent().expect("it can be loaded").load(&mut frame, 3)?;
    assert_eq!(frame.remaining(), [""; 0], "not everything was taken");
    Ok(())
}
