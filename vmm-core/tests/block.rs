//! The disk, driven as a guest drives it: every kind of request, nonsense, and updates in the midst of it.

mod block_guest;

use std::sync::atomic::Ordering;
use std::time::Duration;

use block_guest::{Guest, MEMORY, MOST_DATA, QUEUE_SIZE, content, disk, image, image_file};
use cpr_core::frame::{Frame, FrameWriter};
use proptest::prelude::*;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};
use vmm_core::block::{Cache, Image, ImageConfig};
use vmm_core::virtio::block::{Aio, Block, BlockConfig};
use vmm_core::virtio::{Drained, VirtioDevice};

const FAILED: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPPORTED: u8 = VIRTIO_BLK_S_UNSUPP as u8;
const BOTH: [Aio; 2] = [Aio::IoUring, Aio::Threads];

/// A segment of a discard or write-zeroes request.
fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn has(features: u64, feature: u32) -> bool {
    features & (1 << feature) != 0
}

#[test]
fn io_uring_is_used_where_it_is() {
    let file = image_file(512);
    let block = Block::new(disk(file.path(), 1, Aio::IoUring)).unwrap();
    if !block.uses_io_uring() {
        eprintln!("SKIPPED: no io_uring here, so the other tests do without");
    }
    assert_eq!(block.watches().len(), usize::from(block.uses_io_uring()));
    drop(block);
    assert!(!Block::new(disk(file.path(), 1, Aio::Threads)).unwrap().uses_io_uring());
}

#[test]
fn every_kind_of_request() {
    for aio in BOTH {
        let file = image_file(64 * 512);
        let mut guest = Guest::new(disk(file.path(), 1, aio));
        assert_eq!(guest.write_sectors(3, &[3; 1024]), 0);
        assert_eq!(guest.read_sectors(2, 4), [[0; 512], [3; 512], [3; 512], [0; 512]].concat());
        assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).status, 0);
        let id = guest.request(VIRTIO_BLK_T_GET_ID, 0, &[], 20);
        assert_eq!((id.status, id.data.as_slice()), (0, &b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0"[..]));
        assert_eq!(guest.request(VIRTIO_BLK_T_GET_ID, 0, &[], 6).data, b"serial");

        assert_eq!(guest.write_sectors(8, &[9; 8 * 1024]), 0);
        for (kind, flags) in
            [(VIRTIO_BLK_T_DISCARD, 0), (VIRTIO_BLK_T_WRITE_ZEROES, 0), (VIRTIO_BLK_T_WRITE_ZEROES, 1)]
        {
            assert_eq!(guest.write_sectors(8, &[9; 8 * 1024]), 0);
            assert_eq!(guest.request(kind, 0, &segment(9, 3, flags), 0).status, 0, "{kind}");
            let expected = [[9; 512], [0; 512], [0; 512], [0; 512], [9; 512]].concat();
            assert_eq!(guest.read_sectors(8, 5), expected, "{kind} {flags}");
        }
        assert!(guest.interrupts.0.load(Ordering::Relaxed) > 0);
        assert_eq!(content(file.as_file())[3 * 512..5 * 512], [3; 1024]);
    }
}

#[test]
fn what_the_guest_discards_stays_unless_it_is_to_go() {
    let file = image_file(4096);
    let image = Image::open(ImageConfig { unmap: false, ..image(file.path()) }).unwrap();
    let mut guest = Guest::new(BlockConfig { queue_size: QUEUE_SIZE, ..BlockConfig::new(image) });
    assert_eq!(guest.write_sectors(0, &[5; 4096]), 0);
    assert_eq!(guest.request(VIRTIO_BLK_T_DISCARD, 0, &segment(0, 8, 0), 0).status, 0);
    assert_eq!(guest.read_sectors(0, 8), [5; 4096]);
    assert_eq!(guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &segment(0, 8, 1), 0).status, 0);
    assert_eq!(guest.read_sectors(0, 8), [0; 4096]);
}

#[test]
fn requests_that_fail_touch_nothing() {
    for aio in BOTH {
        let file = image_file(8 * 512);
        let mut guest = Guest::new(disk(file.path(), 1, aio));
        let out = VIRTIO_BLK_T_OUT;
        for (kind, sector, data, room, status) in [
            (out, 8, vec![1; 512], 0, FAILED),
            (out, 7, vec![1; 1024], 0, FAILED),
            (out, u64::MAX, vec![1; 512], 0, FAILED),
            (out, u64::MAX / 512 + 1, vec![1; 512], 0, FAILED),
            (out, 0, vec![1; 511], 0, FAILED),
            (out, 9, vec![], 0, FAILED),
            (VIRTIO_BLK_T_IN, 8, vec![], 512, FAILED),
            (VIRTIO_BLK_T_IN, 0, vec![], 100, FAILED),
            (VIRTIO_BLK_T_DISCARD, 0, segment(7, 2, 0), 0, FAILED),
            (VIRTIO_BLK_T_DISCARD, 0, segment(u64::MAX, 1, 0), 0, FAILED),
            (VIRTIO_BLK_T_DISCARD, 0, segment(0, u32::MAX, 0), 0, FAILED),
            (VIRTIO_BLK_T_DISCARD, 0, segment(0, 1, 1), 0, UNSUPPORTED),
            (VIRTIO_BLK_T_DISCARD, 0, vec![0; 15], 0, FAILED),
            (VIRTIO_BLK_T_DISCARD, 0, vec![0; 32], 0, UNSUPPORTED),
            (VIRTIO_BLK_T_WRITE_ZEROES, 0, segment(0, 1, 2), 0, UNSUPPORTED),
            (VIRTIO_BLK_T_WRITE_ZEROES, 0, segment(8, 1, 0), 0, FAILED),
            (2, 0, vec![], 64, UNSUPPORTED),
            (0x8000_0001, 0, vec![1; 512], 0, UNSUPPORTED),
        ] {
            let answer = guest.request(kind, sector, &data, room);
            assert_eq!(answer.status, status, "kind {kind} at {sector} with {} bytes", data.len());
        }
        // Nothing to do is done.
        assert_eq!(guest.request(out, 8, &[], 0).status, 0);
        assert_eq!(guest.request(VIRTIO_BLK_T_DISCARD, 0, &segment(8, 0, 0), 0).status, 0);
        guest.driver.features &= !(1 << VIRTIO_BLK_F_DISCARD);
        assert_eq!(guest.request(VIRTIO_BLK_T_DISCARD, 0, &segment(0, 1, 0), 0).status, UNSUPPORTED);
        assert_eq!(content(file.as_file()), [0; 8 * 512]);
    }
}

#[test]
fn a_read_only_disk_is_only_read() {
    let file = image_file(1024);
    let image = Image::open(ImageConfig { read_only: true, ..image(file.path()) }).unwrap();
    let mut guest = Guest::new(BlockConfig { queue_size: QUEUE_SIZE, ..BlockConfig::new(image) });
    assert!(
        has(guest.block.features(), VIRTIO_BLK_F_RO) && !has(guest.block.features(), VIRTIO_BLK_F_DISCARD)
    );
    assert_eq!(guest.write_sectors(0, &[1; 512]), FAILED);
    assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 0, &[], 0).status, FAILED);
    guest.driver.features = u64::MAX;
    assert_eq!(guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &segment(0, 1, 0), 0).status, FAILED);
    assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).status, 0);
    assert_eq!(guest.read_sectors(0, 2), [0; 1024]);
}

#[test]
fn a_sector_that_is_begun_is_whole_for_the_guest() {
    for aio in BOTH {
        let file = image_file(0);
        std::fs::write(file.path(), [7; 700]).unwrap();
        let mut guest = Guest::new(disk(file.path(), 1, aio));
        let mut capacity = [0; 8];
        guest.block.read_config(0, &mut capacity);
        assert_eq!(u64::from_le_bytes(capacity), 2);
        assert_eq!(guest.read_sectors(0, 2), [&[7; 700][..], &[0; 324]].concat());
        assert_eq!(guest.read_sectors(1, 1)[188..], [0; 324]);
        assert_eq!(guest.write_sectors(1, &[8; 512]), 0);
        assert_eq!(content(file.as_file()), [[7; 512], [8; 512]].concat());
    }
}

#[test]
fn requests_may_be_cut_anywhere() {
    let file = image_file(4096);
    let mut guest = Guest::new(disk(file.path(), 1, Aio::IoUring));
    let at = 0x80_0000;
    let header = [&VIRTIO_BLK_T_OUT.to_le_bytes()[..], &[0; 4], &2_u64.to_le_bytes()].concat();
    let mut bytes = header.clone();
    bytes.extend((0..512_u32).map(|byte| byte as u8));
    guest.driver.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    let status = (at + 0x1000, 1, true);
    // Header and data in one, and in many pieces, some of them empty.
    for cuts in [vec![], vec![3, 3, 10, 16], vec![1, 20, 300]] {
        let mut from = 0;
        let mut pieces = Vec::new();
        for to in cuts.into_iter().chain([bytes.len()]) {
            pieces.push((at + from as u64, (to - from) as u32, false));
            from = to;
        }
        pieces.push(status);
        guest.put(0, &pieces);
        let answer = &guest.finish()[0];
        assert_eq!((answer.status, answer.written), (0, 1));
        assert_eq!(content(file.as_file())[1024..1536], bytes[16..]);
        assert_eq!(guest.write_sectors(2, &[0; 512]), 0);
    }
    // The status in one piece with the data.
    assert_eq!(guest.write_sectors(5, &[6; 512]), 0);
    let header = [&VIRTIO_BLK_T_IN.to_le_bytes()[..], &[0; 4], &5_u64.to_le_bytes()].concat();
    guest.driver.memory.write_slice(&header, GuestAddress(at)).unwrap();
    guest.put(0, &[(at, 16, false), (at + 0x2000, 513, true)]);
    let answer = &guest.finish()[0];
    assert_eq!((answer.status, answer.written), (0, 513));
    assert_eq!(guest.read(at + 0x2000, 513), [&[6; 512][..], &[0]].concat());
}

/// A chain that no driver makes breaks the device, until it is reset; what stood before it is done.
#[test]
fn nonsense_in_rings_breaks_the_device() {
    let top = MEMORY as u64;
    let chains: [(&str, &[block_guest::Piece]); 8] = [
        ("no status", &[(0x80_0000, 16, false)]),
        ("empty status", &[(0x80_0000, 16, false), (0x80_1000, 0, true)]),
        ("no header", &[(0x80_0000, 1, true)]),
        ("short header", &[(0x80_0000, 15, false), (0x80_1000, 1, true)]),
        ("header nowhere", &[(top, 16, false), (0x80_1000, 1, true)]),
        ("header ends nowhere", &[(top - 8, 16, false), (0x80_1000, 1, true)]),
        ("wrong order", &[(0x80_0000, 16, false), (0x80_1000, 1, true), (0x80_2000, 512, false)]),
        ("header at the end of all", &[(u64::MAX - 3, 16, false), (0x80_1000, 1, true)]),
    ];
    for aio in BOTH {
        for (what, chain) in &chains {
            let file = image_file(4096);
            let mut guest = Guest::new(disk(file.path(), 1, aio));
            guest.ask(0, VIRTIO_BLK_T_OUT, 0, &[1; 512], 0);
            guest.put(0, chain);
            let error = guest.kick(0).unwrap_err().to_string();
            assert!(error.starts_with("queue 0: "), "{what}: {error}");
            guest.block.reset();
            assert_eq!(content(file.as_file())[..512], [1; 512], "{what}");
        }
    }
}

#[test]
fn a_status_or_data_nowhere_is_an_error_of_its_kind() {
    let top = MEMORY as u64;
    let file = image_file(4096);
    let mut guest = Guest::new(disk(file.path(), 1, Aio::IoUring));
    guest.driver.memory.write_slice(&[0; 16], GuestAddress(0x80_0000)).unwrap();
    for data in [(top - 511, 512, true), (top, 512, true), (u64::MAX - 100, 512, true)] {
        guest.put(0, &[(0x80_0000, 16, false), data, (0x80_1000, 1, true)]);
        // The harness would read the data.
        guest.kick(0).unwrap();
        assert_eq!(guest.read(0x80_1000, 1), [FAILED]);
        guest = Guest::new(reopened(guest, &file));
        guest.driver.memory.write_slice(&[0; 16], GuestAddress(0x80_0000)).unwrap();
    }
    guest.put(0, &[(0x80_0000, 16, false), (top, 1, true)]);
    guest.kick(0).unwrap_err();
}

fn reopened(guest: Guest, file: &tempfile::NamedTempFile) -> BlockConfig {
    drop(guest);
    disk(file.path(), 1, Aio::IoUring)
}

#[test]
fn rings_that_cannot_be_are_noticed() {
    let file = image_file(4096);
    let broken = |prepare: &dyn Fn(&mut Guest)| {
        let mut guest = Guest::new(disk(file.path(), 1, Aio::Threads));
        prepare(&mut guest);
        guest.kick(0).unwrap_err();
    };
    // A loop; a head and a next one beyond the table; more requests than entries.
    broken(&|guest| {
        guest.descriptor(0, 0, 0x80_0000, 16, 1, 1);
        guest.descriptor(0, 1, 0x80_0000, 16, 1, 0);
        guest.offer(0, 0);
    });
    broken(&|guest| guest.offer(0, QUEUE_SIZE));
    broken(&|guest| {
        guest.descriptor(0, 0, 0x80_0000, 16, 1, QUEUE_SIZE);
        guest.offer(0, 0);
    });
    broken(&|guest| (0..=QUEUE_SIZE).for_each(|_| guest.offer(0, 0)));
    // An indirect table that is none, one in another, and one that is too long.
    for (len, inner_flags) in [(15, 0), (16, 4), (16 << 11, 1)] {
        broken(&|guest| {
            guest.descriptor(0, 0, 0x80_0000, len, 4, 0);
            for entry in 0..2048_u64 {
                let next = (entry + 1) as u16;
                let bytes = [
                    &0x90_0000_u64.to_le_bytes()[..],
                    &8_u32.to_le_bytes(),
                    &[inner_flags, 0],
                    &next.to_le_bytes(),
                ];
                guest
                    .driver
                    .memory
                    .write_slice(&bytes.concat(), GuestAddress(0x80_0000 + entry * 16))
                    .unwrap();
            }
            guest.offer(0, 0);
        });
    }
    // Rings outside of memory.
    broken(&|guest| {
        guest.driver.queues[0].set_avail_ring_address(Some(MEMORY as u32 - 4), None);
        guest.driver.memory.write_obj(1_u16, GuestAddress(MEMORY as u64 - 2)).unwrap();
    });
    broken(&|guest| guest.driver.queues[0].set_used_ring_address(Some(MEMORY as u32), None));
    // And one that its driver does not use is left alone.
    let mut guest = Guest::new(disk(file.path(), 1, Aio::Threads));
    guest.driver.queues[0].set_ready(false);
    guest.kick(0).unwrap();
    guest.kick(7).unwrap();
}

#[test]
fn all_queues_are_served() {
    for aio in BOTH {
        let file = image_file(1 << 20);
        let mut guest = Guest::new(disk(file.path(), 8, aio));
        assert!(has(guest.block.features(), VIRTIO_BLK_F_MQ));
        let mut heads = Vec::new();
        while guest.has_room(0, 5) {
            for queue in 0..8 {
                let sector = heads.len() as u64;
                heads.push((queue, guest.ask(queue, VIRTIO_BLK_T_OUT, sector, &[heads.len() as u8; 512], 0)));
                guest.ask(queue, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
            }
        }
        let asked = guest.outstanding();
        assert!(asked > 150, "{asked}");
        let answers = guest.finish();
        assert!(answers.len() == asked && answers.iter().all(|answer| answer.status == 0));
        let content = content(file.as_file());
        for number in 0..heads.len() {
            assert_eq!(content[number * 512], number as u8);
        }
    }
}

#[test]
fn more_requests_than_a_ring_takes_wait_for_room() {
    let file = image_file(4096);
    let mut guest = Guest::new(disk(file.path(), 12, Aio::IoUring));
    let (header, status) = (0x80_0000, 0x80_1000);
    let mut flush = [0; 16];
    flush[0] = VIRTIO_BLK_T_FLUSH as u8;
    guest.driver.memory.write_slice(&flush, GuestAddress(header)).unwrap();
    for queue in 0..12 {
        while guest.has_room(queue, 2) {
            guest.put(queue, &[(header, 16, false), (status, 1, true)]);
        }
    }
    assert_eq!(guest.outstanding(), 384);
    assert!(guest.finish().iter().all(|answer| answer.status == 0));
}

/// A driver that fills its queue as fast as it is emptied keeps nobody else waiting.
#[test]
fn a_full_queue_is_served_in_turns() {
    const SIZE: u16 = 1024;
    const ASKED: u16 = 600;
    let (descriptors, available, used, request) = (0x1_0000_u32, 0x2_0000_u32, 0x3_0000_u32, 0x4_0000_u32);
    for aio in BOTH {
        let file = image_file(512);
        let mut guest = Guest::new(BlockConfig { queue_size: SIZE, ..disk(file.path(), 1, aio) });
        let queue = &mut guest.driver.queues[0];
        queue.set_desc_table_address(Some(descriptors), None);
        queue.set_avail_ring_address(Some(available), None);
        queue.set_used_ring_address(Some(used), None);
        for (index, address, len, flags, next) in
            [(0_u64, u64::from(request), 16, 1, 1), (1, u64::from(request) + 16, 21, 2, 0)]
        {
            let descriptor: Vec<u8> = [
                &address.to_le_bytes()[..],
                &u32::to_le_bytes(len),
                &u16::to_le_bytes(flags),
                &u16::to_le_bytes(next),
            ]
            .concat();
            guest.write(u64::from(descriptors) + index * 16, &descriptor);
        }
        guest.write(request.into(), &VIRTIO_BLK_T_GET_ID.to_le_bytes());
        guest.write(u64::from(available) + 2, &ASKED.to_le_bytes());
        let answered = |guest: &Guest| guest.read(u64::from(used) + 2, 2);
        guest.kick(0).unwrap();
        for expected in [256, 512, 600, 600_u16] {
            assert_eq!(answered(&guest), expected.to_le_bytes(), "{aio:?}");
            guest.wait(Duration::ZERO);
        }
    }
}

#[test]
fn a_request_is_no_longer_than_a_stop_may_wait_for() {
    let file = image_file(1 << 30);
    let mut guest = Guest::new(disk(file.path(), 1, Aio::Threads));
    let (header, room, status) = (0x80_0000, 0x40_0000, 0x80_1000);
    for (pieces, expected) in [(16, 0), (17, FAILED)] {
        let mut chain = vec![(header, 16, false)];
        chain.extend(std::iter::repeat_n((room, 4 << 20, true), pieces));
        chain.push((status, 1, true));
        guest.put(0, &chain);
        assert_eq!(guest.finish()[0].status, expected, "{pieces}");
    }
}

#[test]
fn nothing_new_is_started_once_it_drains() {
    for aio in BOTH {
        let file = image_file(1 << 20);
        let mut guest = Guest::new(disk(file.path(), 2, aio));
        guest.ask(0, VIRTIO_BLK_T_OUT, 0, &[1; 512], 0);
        guest.kick(0).unwrap();
        guest.drain();
        assert_eq!(guest.answers().len(), 1);
        guest.ask(1, VIRTIO_BLK_T_OUT, 1, &[2; 512], 0);
        guest.kick(1).unwrap();
        guest.wait(Duration::ZERO);
        assert_eq!(guest.block.drain(&mut guest.driver).unwrap(), Drained::AtRest);
        assert_eq!((guest.answers().len(), guest.driver.queues[1].next_avail()), (0, 0));
        assert_eq!(content(file.as_file())[512], 0);
        guest.block.resume();
        assert_eq!(guest.finish().len(), 1);
        assert_eq!(content(file.as_file())[512], 2);
    }
}

#[test]
fn another_thread_goes_on_with_it() {
    let file = image_file(1 << 20);
    let mut guest = Guest::new(disk(file.path(), 1, Aio::IoUring));
    for round in 1..=3_u8 {
        guest = std::thread::spawn(move || {
            guest.ask(0, VIRTIO_BLK_T_OUT, round.into(), &[round; 512], 0);
            guest.kick(0).unwrap();
            guest.drain();
            assert_eq!(guest.answers().len(), 1);
            guest.ask(0, VIRTIO_BLK_T_OUT, 10 + u64::from(round), &[round; 512], 0);
            guest
        })
        .join()
        .unwrap();
        guest.block.resume();
        assert_eq!(guest.finish()[0].status, 0);
    }
    let content = content(file.as_file());
    assert_eq!(
        [content[512], content[1024], content[1536], content[11 * 512], content[13 * 512]],
        [1, 2, 3, 1, 3]
    );
}

#[test]
fn a_reset_waits_for_what_is_under_way() {
    for aio in BOTH {
        let file = image_file(1 << 20);
        let mut guest = Guest::new(disk(file.path(), 1, aio));
        for sector in 0..16 {
            guest.ask(0, VIRTIO_BLK_T_OUT, sector, &[1; 512], 0);
        }
        guest.kick(0).unwrap();
        guest.block.write_config(32, &[0]);
        guest.block.reset();
        let mut writeback = [0];
        guest.block.read_config(32, &mut writeback);
        assert_eq!(writeback, [1]);
        // The driver's memory is its own again.
        let used = guest.read(0x2000, 0x400);
        guest.wait(Duration::ZERO);
        assert_eq!(guest.read(0x2000, 0x400), used);
        assert_eq!(content(file.as_file())[..16 * 512], [1; 16 * 512]);
    }
}

/// What one disk saves, loaded into another.
fn carry(from: &mut Block, into: &mut Block) -> Result<(), String> {
    let mut writer = FrameWriter::default();
    from.persistent().unwrap().save(&mut writer, 0).unwrap();
    let mut frame = Frame::parse(&writer.finish(7)).unwrap();
    into.persistent().unwrap().load(&mut frame, 0).map_err(|error| error.to_string())
}

#[test]
fn the_new_disk_is_the_old_one_or_refused() {
    let file = image_file(8 * 512);
    let mut old = Block::new(disk(file.path(), 2, Aio::Threads)).unwrap();
    old.write_config(32, &[0]);
    // Nobody else writes while it is tried out.
    let unlocked = || Image::open(ImageConfig { locking: false, ..image(file.path()) }).unwrap();
    let config = || BlockConfig {
        serial: "serial-1".into(),
        queues: 2,
        queue_size: QUEUE_SIZE,
        ..BlockConfig::new(unlocked())
    };
    let mut refused = |config| carry(&mut old, &mut Block::new(config).unwrap()).unwrap_err();
    assert_eq!(
        refused(BlockConfig { serial: "other".into(), ..config() }),
        "drive disk0: the guest has a disk with the serial number \"serial-1\", by this command line it is \"other\""
    );
    assert!(
        refused(BlockConfig { queues: 3, ..config() }).contains("num-queues 2, by this command line it is 3")
    );
    assert!(refused(BlockConfig { queue_size: 256, ..config() }).contains("queue-size 64"));
    let read_only =
        Image::open(ImageConfig { locking: false, read_only: true, ..image(file.path()) }).unwrap();
    assert!(
        refused(BlockConfig { image: read_only, ..config() })
            .contains("read-only off, by this command line it is on")
    );
    file.as_file().set_len(7 * 512).unwrap();
    assert!(refused(config()).contains("has become shorter: 3584 bytes, the guest's disk has 4096"));

    // A longer one is as long as before for the guest.
    file.as_file().set_len(100 * 512).unwrap();
    let mut new = Block::new(config()).unwrap();
    carry(&mut old, &mut new).unwrap();
    let (mut before, mut after) = ([0; 60], [0; 60]);
    old.read_config(0, &mut before);
    new.read_config(0, &mut after);
    assert_eq!(before, after);
    assert_eq!((after[0], after[32]), (8, 0));
}

#[test]
fn a_disk_that_cannot_be_is_refused() {
    let file = image_file(512);
    let refused = |change: &dyn Fn(&mut BlockConfig)| {
        let mut config = disk(file.path(), 1, Aio::Threads);
        change(&mut config);
        Block::new(config).unwrap_err().to_string()
    };
    assert!(
        refused(&|config| config.serial = "x".repeat(21)).contains("has 21 bytes; at most 20 are possible")
    );
    assert!(refused(&|config| config.queues = 0).contains("num-queues=0; 1 to 64 are possible"));
    assert!(refused(&|config| config.queues = 65).contains("num-queues=65"));
    for size in [2, 100, 2048] {
        assert!(
            refused(&|config| config.queue_size = size)
                .contains(&format!("queue-size={size}; a power of two"))
        );
    }
}

#[test]
fn caches_lose_nothing_that_was_written() {
    for cache in [Cache::Writeback, Cache::Writethrough, Cache::Unsafe] {
        for aio in BOTH {
            let file = image_file(4096);
            let image = Image::open(ImageConfig { cache, ..image(file.path()) }).unwrap();
            let mut guest =
                Guest::new(BlockConfig { aio, queue_size: QUEUE_SIZE, ..BlockConfig::new(image) });
            let mut writeback = [0xff];
            guest.block.read_config(32, &mut writeback);
            assert_eq!(writeback, [u8::from(cache != Cache::Writethrough)]);
            assert_eq!(guest.write_sectors(1, &[4; 1024]), 0);
            assert_eq!(guest.request(VIRTIO_BLK_T_DISCARD, 0, &segment(2, 1, 0), 0).status, 0);
            assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).status, 0);
            assert_eq!(content(file.as_file())[512..1536], [[4; 512], [0; 512]].concat());
        }
    }
}

// ---- Anything in any order, with updates in between.

const SECTORS: u64 = 48;
const QUEUES: usize = 2;

#[derive(Debug, Clone)]
enum Step {
    Write {
        sector: u64,
        count: u64,
        fill: u8,
    },
    Read {
        sector: u64,
        count: u64,
    },
    Zero {
        sector: u64,
        count: u64,
        unmap: bool,
    },
    Discard {
        sector: u64,
        count: u64,
    },
    Flush,
    Kick(usize),
    Wait,
    Finish,
    /// The guest is stopped and goes on.
    Stop,
    /// It goes on in another program, which may do its requests otherwise.
    Update(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = (0..SECTORS, 1..=8_u64).prop_map(|(sector, count)| (sector, count.min(SECTORS - sector)));
    let step = prop_oneof![
        6 => (place.clone(), any::<u8>()).prop_map(|((sector, count), fill)| Step::Write { sector, count, fill }),
        6 => place.clone().prop_map(|(sector, count)| Step::Read { sector, count }),
        2 => (place.clone(), any::<bool>()).prop_map(|((sector, count), unmap)| Step::Zero { sector, count, unmap }),
        1 => place.prop_map(|(sector, count)| Step::Discard { sector, count }),
        1 => Just(Step::Flush),
        4 => (0..QUEUES).prop_map(Step::Kick),
        1 => Just(Step::Wait),
        1 => Just(Step::Finish),
        1 => Just(Step::Stop),
        2 => any::<bool>().prop_map(Step::Update),
    ];
    prop::collection::vec(step, 1..80)
}

/// The disk as it must be, and what is asked of it.
struct Model {
    sectors: Vec<u8>,
    /// Sectors that a request in a queue is about: the order of two about the same is nobody's promise.
    busy: Vec<bool>,
    /// What each request in a queue reads.
    reads: std::collections::HashMap<(usize, u16), (u64, u64)>,
}

impl Model {
    fn check(&mut self, answers: Vec<block_guest::Answer>) {
        for answer in answers {
            assert_eq!(answer.status, 0);
            if let Some((sector, count)) = self.reads.remove(&(answer.queue, answer.head)) {
                let expected: Vec<u8> = (sector..sector + count)
                    .flat_map(|sector| [self.sectors[sector as usize]; 512])
                    .collect();
                assert!(answer.data == expected, "sectors {sector} to {}", sector + count);
            }
        }
    }
}

fn run(steps: Vec<Step>, aio: Aio) {
    let file = image_file(SECTORS * 512);
    let mut guest = Guest::new(disk(file.path(), QUEUES as u16, aio));
    let mut model = Model {
        sectors: vec![0; SECTORS as usize],
        busy: vec![false; SECTORS as usize],
        reads: Default::default(),
    };
    for (number, step) in steps.into_iter().enumerate() {
        let queue = number % QUEUES;
        let place = match step {
            Step::Write { sector, count, .. }
            | Step::Read { sector, count }
            | Step::Zero { sector, count, .. }
            | Step::Discard { sector, count } => sector as usize..(sector + count) as usize,
            _ => 0..0,
        };
        if model.busy[place.clone()].contains(&true) || !guest.has_room(queue, 3) {
            model.check(guest.finish());
            model.busy.fill(false);
        }
        model.busy[place.clone()].fill(true);
        match step {
            Step::Write { sector, count, fill } => {
                guest.ask(queue, VIRTIO_BLK_T_OUT, sector, &vec![fill; count as usize * 512], 0);
                model.sectors[place].fill(fill);
            }
            Step::Read { sector, count } => {
                let head = guest.ask(queue, VIRTIO_BLK_T_IN, sector, &[], count as usize * 512);
                model.reads.insert((queue, head), (sector, count));
            }
            Step::Zero { sector, count, unmap } => {
                let segment = segment(sector, count as u32, unmap.into());
                guest.ask(queue, VIRTIO_BLK_T_WRITE_ZEROES, 0, &segment, 0);
                model.sectors[place].fill(0);
            }
            Step::Discard { sector, count } => {
                guest.ask(queue, VIRTIO_BLK_T_DISCARD, 0, &segment(sector, count as u32, 0), 0);
                model.sectors[place].fill(0);
            }
            Step::Flush => drop(guest.ask(queue, VIRTIO_BLK_T_FLUSH, 0, &[], 0)),
            Step::Kick(queue) => guest.kick(queue).unwrap(),
            Step::Wait => guest.wait(Duration::from_millis(1)),
            Step::Finish => {}
            Step::Stop => {
                guest.drain();
                guest.block.resume();
            }
            Step::Update(uring) => guest.update(if uring { Aio::IoUring } else { Aio::Threads }),
        }
        if matches!(step, Step::Finish) {
            model.check(guest.finish());
            model.busy.fill(false);
        } else {
            model.check(guest.answers());
        }
    }
    model.check(guest.finish());
    assert!(model.reads.is_empty());
    let expected: Vec<u8> = model.sectors.iter().flat_map(|fill| [*fill; 512]).collect();
    assert!(content(file.as_file()) == expected);
}

const _: () = assert!(8 * 512 <= MOST_DATA);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn nothing_is_lost_or_done_twice_with_io_uring(steps in steps()) {
        run(steps, Aio::IoUring);
    }

    #[test]
    fn nothing_is_lost_or_done_twice_without(steps in steps()) {
        run(steps, Aio::Threads);
    }
}
