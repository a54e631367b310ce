//! A guest that is nothing but memory and rings, and a disk that it drives.
#![allow(dead_code, reason = "each test uses its part of it")]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cpr_core::frame::{Frame, FrameWriter};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_core::block::{Image, ImageConfig};
use vmm_core::virtio::block::{Aio, Block, BlockConfig};
use vmm_core::virtio::{Broken, Drained, Driver, Interrupt, VirtioDevice};

pub(crate) const QUEUE_SIZE: u16 = 64;
/// How long the host may take for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// Guest memory of one queue's rings.
const RINGS: u64 = 0x3000;
/// Guest memory that requests live in, by the index of their first descriptor.
const ROOM: u64 = 0x10_0000;
/// Of one request.
const ROOM_EACH: u64 = 0x4000;
/// Where its data stands.
const DATA: u64 = 0x100;
/// Bytes of data that there is room for.
pub(crate) const MOST_DATA: usize = 0x3000;
pub(crate) const MEMORY: usize = 16 << 20;

/// A descriptor: address, length, and whether the device writes it.
pub(crate) type Piece = (u64, u32, bool);

/// Counts interrupts.
#[derive(Debug, Default, Clone)]
pub(crate) struct Interrupts(pub(crate) Arc<AtomicUsize>);

impl Interrupt for Interrupts {
    fn queue(&self, _index: usize) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn config(&self) {}
}

/// A request that was not given back yet.
#[derive(Debug, Clone)]
pub(crate) struct Outstanding {
    descriptors: Vec<u16>,
    /// Where its status and the data to the driver stand.
    status: u64,
    data: (u64, usize),
}

/// A request that was given back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) queue: usize,
    pub(crate) head: u16,
    pub(crate) status: u8,
    /// Bytes that are said to be written.
    pub(crate) written: u32,
    pub(crate) data: Vec<u8>,
}

pub(crate) struct Guest {
    pub(crate) driver: Driver,
    pub(crate) block: Block,
    pub(crate) interrupts: Interrupts,
    free: Vec<Vec<u16>>,
    outstanding: Vec<BTreeMap<u16, Outstanding>>,
    used: Vec<u16>,
}

pub(crate) fn image_file(len: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

pub(crate) fn image(path: &Path) -> ImageConfig {
    ImageConfig { unmap: true, ..ImageConfig::new("disk0", path) }
}

pub(crate) fn disk(path: &Path, queues: u16, aio: Aio) -> BlockConfig {
    let image = Image::open(image(path)).unwrap();
    BlockConfig { queues, queue_size: QUEUE_SIZE, aio, serial: "serial-1".into(), ..BlockConfig::new(image) }
}

fn base(queue: usize) -> u64 {
    queue as u64 * RINGS
}

/// A queue as its driver has set it up.
pub(crate) fn queue(index: usize, size: u16) -> Queue {
    let mut queue = Queue::new(size).unwrap();
    queue.set_desc_table_address(Some(base(index) as u32), None);
    queue.set_avail_ring_address(Some(base(index) as u32 + 0x1000), None);
    queue.set_used_ring_address(Some(base(index) as u32 + 0x2000), None);
    queue.set_ready(true);
    queue
}

impl Guest {
    /// With a disk of this configuration, and a driver that takes every feature.
    pub(crate) fn new(config: BlockConfig) -> Self {
        let block = Block::new(config).unwrap();
        let interrupts = Interrupts::default();
        let sizes = block.queue_sizes();
        let mut driver = Driver {
            memory: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap(),
            queues: sizes.iter().enumerate().map(|(index, size)| queue(index, *size)).collect(),
            features: block.features(),
            interrupt: Box::new(interrupts.clone()),
        };
        let mut block = block;
        block.activate(&mut driver).unwrap();
        Self {
            driver,
            block,
            interrupts,
            free: sizes.iter().map(|size| (0..*size).rev().collect()).collect(),
            outstanding: vec![BTreeMap::new(); sizes.len()],
            used: vec![0; sizes.len()],
        }
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.driver.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.driver.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn read_u16(&self, address: u64) -> u16 {
        self.driver.memory.read_obj(GuestAddress(address)).unwrap()
    }

    /// Room for `descriptors` more in a queue.
    pub(crate) fn has_room(&self, queue: usize, descriptors: usize) -> bool {
        self.free[queue].len() >= descriptors
    }

    pub(crate) fn outstanding(&self) -> usize {
        self.outstanding.iter().map(BTreeMap::len).sum()
    }

    /// Puts a chain of these pieces into a queue, and says its first descriptor.
    pub(crate) fn put(&mut self, queue: usize, pieces: &[Piece]) -> u16 {
        let descriptors: Vec<u16> = pieces.iter().map(|_| self.free[queue].pop().unwrap()).collect();
        for (at, (address, len, writable)) in pieces.iter().enumerate() {
            let next = descriptors.get(at + 1);
            let flags = u16::from(next.is_some()) | u16::from(*writable) << 1;
            self.descriptor(queue, descriptors[at], *address, *len, flags, next.copied().unwrap_or(0));
        }
        self.offer(queue, descriptors[0]);
        let writable: Vec<_> = pieces.iter().filter(|(_, _, writable)| *writable).collect();
        let (address, len, _) = **writable.last().unwrap_or(&&(0, 1, true));
        let data = if writable.len() > 1 { (writable[0].0, writable[0].1 as usize) } else { (0, 0) };
        let status = address + u64::from(len) - 1;
        let before = self.outstanding[queue]
            .insert(descriptors[0], Outstanding { descriptors: descriptors.clone(), status, data });
        assert!(before.is_none());
        descriptors[0]
    }

    pub(crate) fn descriptor(&self, queue: usize, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = base(queue) + u64::from(index) * 16;
        self.write(at, &address.to_le_bytes());
        self.write(at + 8, &len.to_le_bytes());
        self.write(at + 12, &flags.to_le_bytes());
        self.write(at + 14, &next.to_le_bytes());
    }

    /// Makes descriptor `head` available.
    pub(crate) fn offer(&self, queue: usize, head: u16) {
        let ring = base(queue) + 0x1000;
        let index = self.read_u16(ring + 2);
        let size = self.driver.queues[queue].size();
        self.write(ring + 4 + u64::from(index % size) * 2, &head.to_le_bytes());
        self.write(ring + 2, &index.wrapping_add(1).to_le_bytes());
    }

    /// Puts a request into a queue whose parts are where [`DATA`] and the others say.
    pub(crate) fn ask(&mut self, queue: usize, kind: u32, sector: u64, out: &[u8], room: usize) -> u16 {
        assert!(out.len() <= MOST_DATA && room <= MOST_DATA);
        let head = *self.free[queue].last().unwrap();
        let at = ROOM + (queue as u64 * u64::from(QUEUE_SIZE) + u64::from(head)) * ROOM_EACH;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.write(at, &header);
        self.write(at + DATA, out);
        let status = at + ROOM_EACH - 1;
        self.write(status, &[0xff]);
        let mut pieces = vec![(at, 16, false)];
        if !out.is_empty() {
            pieces.push((at + DATA, out.len() as u32, false));
        }
        if room > 0 {
            self.write(at + DATA, &vec![0xee; room]);
            pieces.push((at + DATA, room as u32, true));
        }
        pieces.push((status, 1, true));
        self.put(queue, &pieces)
    }

    pub(crate) fn kick(&mut self, queue: usize) -> Result<(), Broken> {
        self.block.queue_ready(&mut self.driver, queue)
    }

    /// Waits for the device's descriptor, if it has one, and tells it.
    pub(crate) fn wait(&mut self, timeout: Duration) {
        let watches = self.block.watches();
        let Some(watch) = watches.first() else { return };
        let token = watch.token;
        let timeout = PollTimeout::try_from(timeout).unwrap();
        let ready = loop {
            match poll(&mut [PollFd::new(watch.fd, PollFlags::POLLIN)], timeout) {
                // The kernel completes requests by interrupting their thread.
                Err(nix::errno::Errno::EINTR) => {}
                other => break other.unwrap(),
            }
        };
        drop(watches);
        if ready > 0 {
            self.block.fd_ready(&mut self.driver, token).unwrap();
        }
    }

    /// What was given back since the last call.
    pub(crate) fn answers(&mut self) -> Vec<Answer> {
        let mut answers = Vec::new();
        for queue in 0..self.used.len() {
            let ring = base(queue) + 0x2000;
            while self.used[queue] != self.read_u16(ring + 2) {
                let size = self.driver.queues[queue].size();
                let entry = self.read(ring + 4 + u64::from(self.used[queue] % size) * 8, 8);
                self.used[queue] = self.used[queue].wrapping_add(1);
                let (head, written) = entry.split_at(4);
                let head = u32::from_le_bytes(head.try_into().unwrap()) as u16;
                let of = self.outstanding[queue].remove(&head).expect("each chain is given back once");
                self.free[queue].extend(of.descriptors.iter().rev());
                answers.push(Answer {
                    queue,
                    head,
                    status: self.read(of.status, 1)[0],
                    written: u32::from_le_bytes(written.try_into().unwrap()),
                    data: self.read(of.data.0, of.data.1),
                });
            }
        }
        answers
    }

    /// Kicks every queue, and waits until all is answered.
    pub(crate) fn finish(&mut self) -> Vec<Answer> {
        for queue in 0..self.driver.queues.len() {
            self.kick(queue).unwrap();
        }
        let (mut answers, deadline) = (self.answers(), Instant::now() + PATIENCE);
        while self.outstanding() > 0 {
            assert!(Instant::now() < deadline, "{} requests are not answered", self.outstanding());
            self.wait(PATIENCE);
            answers.extend(self.answers());
        }
        answers
    }

    /// One request, alone.
    pub(crate) fn request(&mut self, kind: u32, sector: u64, out: &[u8], room: usize) -> Answer {
        self.ask(0, kind, sector, out, room);
        let mut answers = self.finish();
        assert_eq!(answers.len(), 1);
        answers.remove(0)
    }

    pub(crate) fn write_sectors(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.request(VIRTIO_BLK_T_OUT, sector, bytes, 0).status
    }

    pub(crate) fn read_sectors(&mut self, sector: u64, count: usize) -> Vec<u8> {
        let answer = self.request(VIRTIO_BLK_T_IN, sector, &[], count * 512);
        assert_eq!(answer.status, 0);
        assert_eq!(answer.written as usize, count * 512 + 1);
        answer.data
    }

    /// Stops the disk.
    pub(crate) fn drain(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while self.block.drain(&mut self.driver).unwrap() == Drained::UnderWay {
            assert!(Instant::now() < deadline, "it does not come to rest");
            self.wait(Duration::from_millis(10));
        }
    }

    /// The disk goes on in another one, as after an update.
    pub(crate) fn update(&mut self, aio: Aio) {
        self.drain();
        let mut writer = FrameWriter::default();
        self.block.persistent().unwrap().save(&mut writer, 3).unwrap();
        let mut frame = Frame::parse(&writer.finish(7)).unwrap();
        let old = self.block.image();
        let image = Image::adopt(old.config().clone(), Arc::new(old.fd().try_clone().unwrap())).unwrap();
        let queues = self.driver.queues.len() as u16;
        let serial = "serial-1".into();
        let mut block = Block::new(BlockConfig {
            queues,
            queue_size: QUEUE_SIZE,
            aio,
            serial,
            ..BlockConfig::new(image)
        })
        .unwrap();
        block.persistent().unwrap().load(&mut frame, 3).unwrap();
        for queue in &mut self.driver.queues {
            *queue = Queue::try_from(queue.state()).unwrap();
        }
        self.block = block;
        self.block.resume();
    }
}

/// The image's content.
pub(crate) fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}
