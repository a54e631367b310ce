//! A disk whose driver writes nonsense: guest memory, with the rings in it, is the input.

use std::fs::File;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use cpr_core::frame::{Frame, FrameWriter, to_body};
use oslib::eventfd::EventFd;
use oslib::memfd::Memfd;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_core::block::{Image, ImageConfig};
use vmm_core::virtio::block::{Aio, Block, BlockConfig, BlockState};
use vmm_core::virtio::{Broken, Drained, Driver, Interrupt, VirtioDevice};

use crate::{EPOCH, decoded, frame_of};

const SECTION: &str = "virtio-blk";
const QUEUE_SIZE: u16 = 16;
pub(crate) const QUEUES: u16 = 2;
/// Guest memory in bytes. What the input does not reach is zero.
const MEMORY: usize = 64 << 10;
const SECTORS: u64 = 16;
/// Where the rings of a queue stand in it: descriptors, available ring, used ring.
const RINGS: [[u32; 3]; QUEUES as usize] = [[0, 0x100, 0x200], [0x300, 0x400, 0x500]];
/// Where seeds have their requests.
const ROOM: u64 = 0x600;
/// Longer than any request takes.
const PATIENCE: Duration = Duration::from_secs(10);

struct Deaf;

impl Interrupt for Deaf {
    fn queue(&self, _index: usize) {}
    fn config(&self) {}
}

/// An image that nobody else has, of memory.
pub(crate) fn image(read_only: bool) -> Image {
    let fd = Memfd::new("disk").len(SECTORS * 512).create().expect("a memfd");
    let fd = if read_only { reopened(fd.into()).expect("a memfd, read-only") } else { File::from(fd) };
    let config = ImageConfig { read_only, unmap: true, ..ImageConfig::new("disk0", "/nowhere/disk") };
    Image::adopt(config, Arc::new(fd)).expect("what was just made is an image")
}

fn reopened(file: File) -> io::Result<File> {
    use std::os::fd::AsRawFd;
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn disk(aio: Aio, read_only: bool) -> Block {
    let config =
        BlockConfig { queues: QUEUES, queue_size: QUEUE_SIZE, aio, ..BlockConfig::new(image(read_only)) };
    Block::new(config).expect("a disk that can be")
}

fn queue(rings: [u32; 3], event_index: bool) -> Queue {
    let mut queue = Queue::new(QUEUE_SIZE).expect("a power of two");
    queue.set_desc_table_address(Some(rings[0]), None);
    queue.set_avail_ring_address(Some(rings[1]), None);
    queue.set_used_ring_address(Some(rings[2]), None);
    queue.set_event_idx(event_index);
    queue.set_ready(true);
    queue
}

/// A byte of switches, then guest memory. True if the device took it for what a driver does.
pub fn block(data: &[u8]) -> bool {
    let Some((&switches, content)) = data.split_first() else { return false };
    let on = |bit: u8| switches & (1 << bit) != 0;
    let mut disk = disk(if on(0) { Aio::IoUring } else { Aio::Threads }, on(1));
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
    memory.write_slice(&content[..content.len().min(MEMORY)], GuestAddress(0)).expect("it is in there");
    let queues = RINGS.map(|rings| queue(rings, on(2))).into();
    let features = if on(3) { 0 } else { disk.features() };
    let mut driver = Driver { memory, queues, features, interrupt: Box::new(Deaf) };
    let image = disk.image().fd().clone();

    let taken = serve(&mut disk, &mut driver);
    if taken.is_ok() {
        save_and_load(&mut disk, on(1));
    }
    disk.reset();
    assert_eq!(image.metadata().expect("a memfd").len(), SECTORS * 512, "nothing is written beyond the disk");
    taken.is_ok() && driver.queues.iter().any(|queue| queue.next_used() > 0)
}

/// Serves both queues, until everything is at rest or the device broke.
fn serve(disk: &mut Block, driver: &mut Driver) -> Result<(), Broken> {
    disk.activate(driver)?;
    for queue in 0..usize::from(QUEUES) {
        disk.queue_ready(driver, queue)?;
    }
    let began = Instant::now();
    while disk.drain(driver)? == Drained::UnderWay {
        assert!(began.elapsed() < PATIENCE, "it does not come to rest");
        if let Some(watch) = disk.watches().first() {
            let event = EventFd::from(watch.fd.try_clone_to_owned().expect("a descriptor"));
            event.wait(Duration::from_millis(1)).expect("it can be polled");
        }
    }
    for queue in &driver.queues {
        assert_eq!(queue.next_avail(), queue.next_used(), "what was taken is given back");
    }
    Ok(())
}

/// A disk at rest can be saved, and what it saves be loaded.
fn save_and_load(from: &mut Block, read_only: bool) {
    let mut writer = FrameWriter::default();
    persistent(from).save(&mut writer, 0).expect("it is at rest");
    let mut frame = Frame::parse(&writer.finish(EPOCH)).expect("what was just written can be read");
    let mut into = disk(Aio::Threads, read_only);
    persistent(&mut into).load(&mut frame, 0).expect("the same disk");
}

fn persistent(disk: &mut Block) -> &mut dyn vmm_core::virtio::Persistent {
    disk.persistent().expect("a disk can be saved")
}

/// A disk with this image, which another one may have, too.
pub(crate) fn disk_of(image: Arc<File>) -> Block {
    let image = Image::adopt(ImageConfig::new("disk0", "/nowhere/disk"), image).expect("an image");
    let config =
        BlockConfig { queues: QUEUES, queue_size: QUEUE_SIZE, aio: Aio::Threads, ..BlockConfig::new(image) };
    Block::new(config).expect("a disk that can be")
}

/// A saved disk. True if this one is the same.
pub fn block_state(data: &[u8]) -> bool {
    static IMAGE: OnceLock<Arc<File>> = OnceLock::new();
    decoded::<BlockState>(SECTION, data);
    let fd = IMAGE.get_or_init(|| image(false).fd().clone()).clone();
    let mut disk = disk_of(fd);
    let mut frame = frame_of(&[(SECTION, 1, data)]);
    persistent(&mut disk).load(&mut frame, 0).map_err(|error| error.to_string()).is_ok()
}

/// One request of each kind, in each way of doing it.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let segment = |flags: u8| [&[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, flags][..], &[0; 3]].concat();
    let requests: [(u32, Vec<u8>, u32); 6] = [
        (0, vec![], 1024),
        (1, vec![7; 512], 0),
        (4, vec![], 0),
        (8, vec![], 20),
        (11, segment(0), 0),
        (13, segment(1), 0),
    ];
    let mut seeds = Vec::new();
    for switches in [0, 1, 4, 5] {
        seeds.extend(requests.iter().map(|(kind, out, room)| seed(switches, *kind, out, *room)));
    }
    seeds
}

fn seed(switches: u8, kind: u32, out: &[u8], room: u32) -> Vec<u8> {
    let mut memory = vec![0; ROOM as usize];
    let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
    let (header, status) = (ROOM, ROOM + 16 + out.len() as u64);
    let pieces = [(header, 16 + out.len() as u32, 0_u16), (status + 1, room, 2), (status, 1, 2)];
    let pieces: Vec<_> = pieces.into_iter().filter(|(_, len, _)| *len > 0).collect();
    for (at, (address, len, flags)) in pieces.iter().enumerate() {
        let next = at + 1 < pieces.len();
        put(at * 16, &address.to_le_bytes());
        put(at * 16 + 8, &len.to_le_bytes());
        put(at * 16 + 12, &(flags | u16::from(next)).to_le_bytes());
        put(at * 16 + 14, &(at as u16 + 1).to_le_bytes());
    }
    put(0x102, &[1, 0]);
    memory.extend(kind.to_le_bytes());
    memory.extend([0; 12]);
    memory.extend(out);
    [&[switches][..], &memory].concat()
}

pub(crate) fn state_seeds() -> Vec<Vec<u8>> {
    let state = BlockState {
        serial: String::new(),
        read_only: false,
        queues: QUEUES,
        queue_size: QUEUE_SIZE,
        sectors: SECTORS,
        writeback: true,
        inconsistent: false,
    };
    vec![to_body(&state), to_body(&BlockState { sectors: 3, writeback: false, ..state })]
}
