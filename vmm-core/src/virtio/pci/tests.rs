//! A driver's way through configuration space and BAR, good and bad.

use std::sync::atomic::Ordering;
use std::time::Duration;

use cpr_core::frame::{Frame, FrameWriter};
use proptest::prelude::*;

use super::*;
use crate::pci::{ECAM, PciBus};
use crate::ports::{MmioBus, PortBus};
use crate::virtio::testing::*;

const SLOT: u8 = 3;
/// Where its configuration space is.
const CONFIG: u64 = ECAM.start + ((SLOT as u64) << 15);

/// A bus with a loopback in slot 3.
struct Board {
    mmio: MmioBus,
    ports: PortBus,
    device: Arc<VirtioPci>,
    remote: Arc<Remote>,
    kvm: Arc<NoHypervisor>,
    memory: GuestMemoryMmap,
    bell: Bell,
}

impl Board {
    fn new() -> Board {
        Board::with(Loopback::new())
    }

    fn with(device: (Box<Loopback>, Arc<Remote>)) -> Board {
        let memory = GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 4 << 20)]);
        Board::in_memory(device, memory.unwrap())
    }

    fn in_memory((loopback, remote): (Box<Loopback>, Arc<Remote>), memory: GuestMemoryMmap) -> Board {
        let kvm = Arc::new(NoHypervisor::default());
        let hypervisor: Arc<dyn Hypervisor> = kvm.clone();
        let bell = Bell(Arc::new(EventFd::new().unwrap()));
        let device =
            VirtioPci::new(loopback, 0, first_address(SLOT), memory.clone(), &hypervisor, bell.clone())
                .unwrap();
        let device = Arc::new(device);
        let bus = Arc::new(PciBus::new([(SLOT, device.clone() as Arc<dyn Function>)]));
        let (mmio, ports) = (MmioBus::new(), PortBus::new());
        bus.attach(&ports, &mmio).unwrap();
        Board { mmio, ports, device, remote, kvm, memory, bell }
    }

    fn config(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(CONFIG + offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_config(&self, offset: u64, data: &[u8]) {
        self.mmio.write(CONFIG + offset, data);
    }

    /// The BAR where it is first, answered from now on.
    fn bar(&self) -> Bar<'_> {
        self.set_config(4, &[6, 0]);
        Bar(&self.mmio, first_address(SLOT))
    }

    /// A device that works.
    fn up(&self) -> Bar<'_> {
        let bar = self.bar();
        self.enable_msix();
        unmask(&bar);
        bring_up(&bar);
        assert_eq!(bar.status(), 0x0f);
        bar
    }

    fn enable_msix(&self) {
        assert_eq!(self.config(0x40) & 0xff, 0x11, "the first capability is MSI-X");
        self.set_config(0x42, &[0, 0x80]);
    }

    /// Serves what was rung, as the I/O thread would; tells of which queues.
    fn serve(&self) -> Vec<usize> {
        let rung = |bell: &EventFd| bell.wait(Duration::ZERO).unwrap();
        let queues: Vec<_> = (0..2).filter(|&queue| rung(&self.device.doorbells()[queue])).collect();
        queues.iter().for_each(|&queue| self.device.rung(queue));
        queues
    }

    fn save(&self) -> Vec<u8> {
        let mut main = FrameWriter::default();
        self.device.save(&mut main, SLOT.into()).unwrap();
        main.finish(1)
    }
}

struct Bar<'a>(&'a MmioBus, u64);

impl Wires for Bar<'_> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(self.1 + offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(self.1 + offset, data);
    }
}

impl Bar<'_> {
    fn u32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn u16(&self, offset: u64) -> u16 {
        self.u32(offset) as u16
    }

    fn status(&self) -> u8 {
        self.u32(0x14) as u8
    }
}

#[test]
fn a_driver_finds_the_device_both_ways() {
    let board = Board::new();
    assert_eq!(board.config(0), 0x106a_1af4);
    assert_eq!(board.config(8), 0xff00_0001);
    assert_eq!(board.config(0x3c) >> 8 & 0xff, 0, "no INTx");
    let by_port = |address: u32| {
        let mut data = [0; 4];
        board.ports.write(0xcf8, &address.to_le_bytes());
        board.ports.read(0xcfc, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(by_port(0x8000_1800), 0x106a_1af4);
    assert_eq!(by_port(0x8000_0000), 0x0008_1b36, "the host bridge");
    for nobody in [0x8000_2000, 0x8000_1900, 0x8001_1800, 0x0000_1800, 0x8000_f800] {
        assert_eq!(by_port(nobody), u32::MAX, "{nobody:#x}");
    }
    board.ports.write(0xcf8, &0x8000_1804u32.to_le_bytes());
    board.ports.write(0xcfc, &[2]);
    assert_eq!(board.config(4) & 0xffff, 2);
    let mut byte = [0];
    board.ports.read(0xcfe, &mut byte);
    assert_eq!(byte, [0x10], "there are capabilities");
    // Parts of the address port are nobody's.
    board.ports.write(0xcf9, &[6]);
    board.ports.read(0xcf9, &mut byte);
    assert_eq!(byte, [0xff]);
}

#[test]
fn capabilities_lead_to_the_parts_of_the_bar() {
    let board = Board::new();
    let mut at = u64::from(board.config(0x34) & 0xff);
    let mut found = Vec::new();
    while at != 0 {
        let head = board.config(at);
        if head & 0xff == 9 {
            found.push((
                head >> 24,
                board.config(at + 4) & 0xff,
                board.config(at + 8),
                board.config(at + 12),
            ));
        }
        at = u64::from(head >> 8 & 0xff);
    }
    assert_eq!(
        found,
        [
            (1, 0, 0, 0x1000),
            (3, 0, 0x1000, 0x1000),
            (4, 0, 0x2000, 0x1000),
            (2, 0, 0x3000, 0x1000),
            (5, 0, 0, 0)
        ]
    );
    assert_eq!((board.config(0x44), board.config(0x48)), (0x4000, 0xc000));
    assert_eq!(board.config(0x40) >> 16, 2, "three vectors");
}

#[test]
fn the_bar_is_answered_where_the_guest_says() {
    let board = Board::new();
    let first = Bar(&board.mmio, first_address(SLOT));
    assert_eq!(first.u32(0), u32::MAX, "not before memory is enabled");
    let _ = board.bar();
    assert_eq!(first.u16(0x12), 2);
    let bells = |base: u64| vec![base + 0x3000, base + 0x3004];
    assert_eq!(*board.kvm.doorbells.lock().unwrap(), bells(first.1));
    // The size, and another place.
    board.set_config(0x10, &[0xff; 4]);
    board.set_config(0x14, &[0xff; 4]);
    assert_eq!((board.config(0x10), board.config(0x14)), (0xffff_0004, u32::MAX));
    assert_eq!(first.u32(0), u32::MAX);
    assert_eq!(*board.kvm.doorbells.lock().unwrap(), [0; 0], "outside of the window nothing is answered");
    board.set_config(0x10, &0xc800_0000u32.to_le_bytes());
    board.set_config(0x14, &[0; 4]);
    let moved = Bar(&board.mmio, 0xc800_0000);
    assert_eq!((moved.u16(0x12), first.u32(0)), (2, u32::MAX));
    assert_eq!(*board.kvm.doorbells.lock().unwrap(), bells(moved.1));
    board.set_config(4, &[4, 0]);
    assert_eq!(moved.u32(0), u32::MAX);
    assert_eq!(*board.kvm.doorbells.lock().unwrap(), [0; 0]);
    // The last place that there is, and the first that is none.
    board.set_config(4, &[2, 0]);
    board.set_config(0x10, &0xdfff_0000u32.to_le_bytes());
    assert_eq!(Bar(&board.mmio, 0xdfff_0000).u16(0x12), 2);
    board.set_config(0x10, &0xe000_0000u32.to_le_bytes());
    assert_eq!(Bar(&board.mmio, 0xdfff_0000).u32(0), u32::MAX);
}

#[test]
fn a_driver_is_served_and_interrupted() {
    let board = Board::new();
    let bar = board.up();
    offer(&board.memory, 0x5a);
    bar.write(0x3000, &0u16.to_le_bytes());
    assert_eq!(board.serve(), [0]);
    assert_eq!((used(&board.memory), answer(&board.memory)), (1, 0xa5));
    assert_eq!(board.kvm.take_messages(), [(0xfee0_0000, 0xc1)]);
    // Another queue's doorbell is another one, and one of none is nothing.
    bar.write(0x3004, &1u16.to_le_bytes());
    bar.write(0x3008, &2u16.to_le_bytes());
    assert_eq!(board.serve(), [1]);
    assert_eq!(board.serve(), [0; 0]);
    assert_eq!(bar.u32(0x1000), 0, "with MSI-X the ISR status says nothing");
}

#[test]
fn a_device_that_is_no_bus_master_any_more_leaves_memory_alone() {
    let board = Board::new();
    let bar = board.up();
    board.remote.slow.store(true, Ordering::SeqCst);
    offer(&board.memory, 1);
    bar.write(0x3000, &0u16.to_le_bytes());
    board.serve();
    // Bits beside it are nobody's business.
    board.set_config(4, &[6, 4]);
    assert_eq!((bar.status(), board.remote.reset.load(Ordering::SeqCst)), (0x0f, 0));
    board.set_config(4, &[2, 4]);
    assert_eq!((bar.status(), board.remote.reset.load(Ordering::SeqCst)), (0x0b, 1));
    board.device.fd_ready(7);
    board.device.rung(0);
    assert_eq!(used(&board.memory), 0, "what was under way is given back to nobody");
    // It is saved so, and another driver has it by a reset.
    let next = Board::in_memory(Loopback::new(), board.memory.clone());
    next.device.load(&mut Frame::parse(&board.save()).unwrap(), SLOT.into()).unwrap();
    assert_eq!(next.save(), board.save());
    board.set_config(4, &[6, 0]);
    board.remote.slow.store(false, Ordering::SeqCst);
    bar.write(0x14, &[0]);
    bring_up(&bar);
    assert_eq!(bar.status(), 0x0f);
}

#[test]
fn sections_are_told_while_the_device_is_at_work() {
    let board = Board::new();
    let _at_work = board.device.lock();
    assert_eq!(board.device.sections().map(<[_]>::len), Some(3));
}

#[test]
fn a_masked_vector_remembers() {
    let board = Board::new();
    let bar = board.up();
    let answer_one = || {
        offer(&board.memory, 1);
        bar.write(0x3000, &0u16.to_le_bytes());
        board.serve();
    };
    bar.write(0x401c, &1u32.to_le_bytes());
    answer_one();
    assert_eq!((board.kvm.take_messages(), bar.u32(0xc000)), (vec![], 0b10));
    // The pending bits are not the driver's.
    bar.write(0xc000, &0u32.to_le_bytes());
    assert_eq!(bar.u32(0xc000), 0b10);
    // Unmasked with another message, which is the one that counts.
    bar.write(0x4018, &[0x77, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!((board.kvm.take_messages(), bar.u32(0xc000)), (vec![(0xfee0_0000, 0x77)], 0));
    // All of them masked.
    board.set_config(0x43, &[0xc0]);
    answer_one();
    assert_eq!((board.kvm.take_messages(), bar.u32(0xc000)), (vec![], 0b10));
    board.set_config(0x43, &[0x80]);
    assert_eq!(board.kvm.take_messages(), [(0xfee0_0000, 0x77)]);
    // No MSI-X at all.
    board.set_config(0x43, &[0]);
    answer_one();
    assert_eq!((board.kvm.take_messages(), bar.u32(0xc000)), (vec![], 0));
    assert_eq!((bar.u32(0x1000), bar.u32(0x1000)), (1, 0), "ISR status, cleared by the read");
}

#[test]
fn writes_of_another_length_than_the_register_change_nothing() {
    let board = Board::new();
    let bar = board.bar();
    agree(&bar);
    let all = || (0..0x3c).map(|at| bar.u32(at) as u8).collect::<Vec<_>>();
    let before = all();
    for offset in 0..0x38 {
        for len in [1, 2, 3, 4, 5, 6, 7, 8, 16] {
            let register = match offset {
                0x14 | 0x15 => 1,
                0x10..=0x1e => 2,
                0x20.. => continue,
                _ => 4,
            };
            if len != register || offset % register as u64 != 0 {
                bar.write(offset, &vec![0xee; len]);
                assert_eq!(all(), before, "{len} bytes at {offset:#x}");
            }
        }
    }
    for (offset, len) in
        [(0x4000, 2), (0x4002, 4), (0x4004, 8), (0x4000, 3), (0x4030, 4), (0xbff8, 8), (0xfffc, 4)]
    {
        bar.write(offset, &vec![0xee; len]);
    }
    assert!((0x4000..0x4030).all(|at| matches!((at % 16, bar.u32(at) as u8), (12, 1) | (_, 0))));
    // Beyond the end, and across it.
    bar.write(0xfffc, &[0; 8]);
    let mut data = [0; 8];
    bar.read(0xfffc, &mut data);
    assert_eq!(data, [0xff; 8]);
}

#[test]
fn addresses_are_taken_whole_and_by_halves() {
    let board = Board::new();
    let bar = board.bar();
    bar.write(0x20, &0x1122_3344_5566_7788u64.to_le_bytes());
    bar.write(0x2c, &0xaabb_ccddu32.to_le_bytes());
    assert_eq!(
        (bar.u32(0x20), bar.u32(0x24), bar.u32(0x28), bar.u32(0x2c)),
        (0x5566_7788, 0x1122_3344, 0, 0xaabb_ccdd)
    );
    // A queue that is enabled stays as it is, and so does one that does not exist.
    bar.write(0x1c, &1u16.to_le_bytes());
    bar.write(0x20, &0u64.to_le_bytes());
    bar.write(0x18, &8u16.to_le_bytes());
    bar.write(0x1c, &0u16.to_le_bytes());
    assert_eq!((bar.u32(0x20), bar.u16(0x18), bar.u16(0x1c)), (0x5566_7788, 16, 1));
    bar.write(0x16, &9u16.to_le_bytes());
    for offset in [0x18, 0x1a, 0x1c] {
        bar.write(offset, &1u16.to_le_bytes());
        assert_eq!(bar.u16(offset), 0);
    }
    bar.write(0x16, &1u16.to_le_bytes());
    for (size, taken) in [(0u16, 8), (3, 8), (16, 8), (4, 4)] {
        bar.write(0x18, &size.to_le_bytes());
        assert_eq!(bar.u16(0x18), taken, "a size of {size}");
    }
    for (vector, taken) in [(2u16, 2), (3, 0xffff), (0xfffe, 0xffff)] {
        bar.write(0x1a, &vector.to_le_bytes());
        bar.write(0x10, &vector.to_le_bytes());
        assert_eq!((bar.u16(0x1a), bar.u16(0x10)), (taken, taken));
    }
}

#[test]
fn features_that_are_not_offered_are_not_agreed_on() {
    let board = Board::new();
    let bar = board.bar();
    let try_features = |low: u32, high: u32| {
        bar.write(0x14, &[0]);
        bar.write(0x14, &[3]);
        for (select, features) in [(0u32, low), (1, high)] {
            bar.write(0x08, &select.to_le_bytes());
            bar.write(0x0c, &features.to_le_bytes());
        }
        bar.write(0x14, &[0x0b]);
        bar.write(0x14, &[0x0f]);
        bar.status()
    };
    assert_eq!(try_features(0, 0), 3, "a driver of before version 1");
    assert_eq!(try_features(1, 1), 3);
    assert_eq!(try_features(0, 3), 3);
    assert_eq!(try_features(1 << 29, 1), 0x0f);
    // What was agreed on stays.
    bar.write(0x0c, &0u32.to_le_bytes());
    assert_eq!(bar.u32(0x0c), 1);
    let offered = |select: u32| {
        bar.write(0, &select.to_le_bytes());
        bar.u32(4)
    };
    assert_eq!((offered(0), offered(1), offered(2)), (FEATURE as u32 | 3 << 28, 1, 0));
    // No bit goes away but by a reset.
    bar.write(0x14, &[1]);
    assert_eq!(bar.status(), 0x0f);
    bar.write(0x14, &[0x80]);
    assert_eq!(bar.status(), 0x8f);
    bar.write(0x14, &[0]);
    assert_eq!(bar.status(), 0);
}

#[test]
fn rings_outside_of_ram_need_a_reset() {
    let board = Board::new();
    let bar = board.bar();
    board.enable_msix();
    unmask(&bar);
    for descriptors in [64 << 20, !0xf, DESCRIPTORS + 8] {
        let generation = bar.u32(0x15) as u8;
        agree(&bar);
        set_queue(&bar, descriptors);
        bar.write(0x14, &[0x0f]);
        assert_eq!(bar.status(), 0x4f, "descriptors at {descriptors:#x}");
        assert_eq!(board.kvm.take_messages(), [(0xfee0_0000, 0xc0)], "the configuration's vector");
        assert_eq!(bar.u32(0x15) as u8, generation.wrapping_add(1));
        bar.write(0x3000, &0u16.to_le_bytes());
        board.serve();
        bar.write(0x14, &[0]);
        assert_eq!(bar.status(), 0);
    }
    // And a ring that goes bad later.
    let bar = board.up();
    use vm_memory::Bytes;
    board.memory.write_obj(999u16, vm_memory::GuestAddress(AVAILABLE + 2)).unwrap();
    let resets = board.remote.reset.load(Ordering::SeqCst);
    bar.write(0x3000, &0u16.to_le_bytes());
    board.serve();
    assert_eq!((bar.status(), board.remote.reset.load(Ordering::SeqCst)), (0x4f, resets + 1));
}

#[test]
fn a_doorbell_that_kvm_refuses_is_rung_by_exits() {
    let board = Board::new();
    board.kvm.deaf.store(true, Ordering::SeqCst);
    let bar = board.up();
    assert_eq!(*board.kvm.doorbells.lock().unwrap(), [0; 0]);
    offer(&board.memory, 3);
    bar.write(0x3000, &0u16.to_le_bytes());
    assert_eq!(board.serve(), [0]);
    assert_eq!(answer(&board.memory), !3);
    // That KVM knows nothing of them is no error when they move.
    board.set_config(4, &[0, 0]);
    board.kvm.deaf.store(false, Ordering::SeqCst);
    board.set_config(4, &[6, 0]);
    assert_eq!(board.kvm.doorbells.lock().unwrap().len(), 2);
}

#[test]
fn doorbells_attached_ahead_are_not_attached_again() {
    let board = Board::new();
    board.device.attach_doorbells_ahead();
    assert_eq!(board.kvm.doorbells.lock().unwrap().len(), 2);
    let _ = board.bar();
    assert_eq!(board.kvm.doorbells.lock().unwrap().len(), 2);
}

#[test]
fn the_window_in_configuration_space_leads_into_the_bar() {
    let board = Board::new();
    let mut at = u64::from(board.config(0x34) & 0xff);
    while board.config(at) & 0xff00_00ff != 0x0500_0009 {
        at = u64::from(board.config(at) >> 8 & 0xff);
    }
    let aim = |bar: u8, offset: u32, len: u32| {
        board.set_config(at + 4, &[bar]);
        board.set_config(at + 8, &offset.to_le_bytes());
        board.set_config(at + 12, &len.to_le_bytes());
    };
    let mut two = [0; 2];
    aim(0, 0x12, 2);
    board.mmio.read(CONFIG + at + 16, &mut two);
    assert_eq!(two, [2, 0], "the number of queues, without memory being enabled");
    aim(0, 0x14, 1);
    board.set_config(at + 16, &[1]);
    assert_eq!(board.bar().status(), 1);
    // It is said to be another length, another BAR, or nowhere.
    for (bar, offset, len) in [(0, 0x12, 4), (1, 0x12, 2), (0, 0x1_0000, 2), (0, u32::MAX, 2), (0, 0x13, 2)] {
        aim(bar, offset, len);
        board.mmio.read(CONFIG + at + 16, &mut two);
        assert_eq!(two, [0, 0]);
        board.set_config(at + 16, &[0xff; 2]);
    }
}

/// Saved at each step, and loaded into a new one, which then goes on and is saved again.
#[test]
fn a_driver_goes_on_in_another_device_from_anywhere() {
    let steps: &[fn(&Board)] = &[
        |board| {
            let _ = board.bar();
        },
        |board| board.set_config(0x10, &0xc900_0000u32.to_le_bytes()),
        |board| board.set_config(0x10, &(first_address(SLOT) as u32).to_le_bytes()),
        |board| board.enable_msix(),
        |board| unmask(&board.bar()),
        |board| agree(&board.bar()),
        |board| board.bar().write(0x2000, &[1, 2, 3]),
        |board| set_queue(&board.bar(), DESCRIPTORS),
        |board| board.bar().write(0x401c, &1u32.to_le_bytes()),
        |board| board.bar().write(0x14, &[0x0f]),
        |board| {
            // Masked, so it stays pending.
            offer(&board.memory, 9);
            board.device.rung(0);
        },
        |board| board.ports.write(0xcf8, &0x8000_1810u32.to_le_bytes()),
        |board| board.bar().write(0x401c, &0u32.to_le_bytes()),
        |board| {
            use vm_memory::Bytes;
            board.memory.write_obj(999u16, vm_memory::GuestAddress(AVAILABLE + 2)).unwrap();
            board.device.rung(0);
        },
    ];
    let mut board = Board::new();
    for (at, step) in steps.iter().enumerate() {
        step(&board);
        let next = Board::in_memory(Loopback::new(), board.memory.clone());
        assert_eq!(board.device.drain(), Drained::AtRest);
        let (saved, again) = (board.save(), board.save());
        assert_eq!(saved, again, "a save changes nothing");
        let mut saved = Frame::parse(&saved).unwrap();
        next.device.load(&mut saved, SLOT.into()).unwrap();
        assert_eq!(saved.remaining().len(), 0);
        assert_eq!(next.save(), again, "step {at}");
        assert_eq!(*next.kvm.doorbells.lock().unwrap(), *board.kvm.doorbells.lock().unwrap());
        assert_eq!(next.kvm.take_messages(), [], "nothing is sent before the guest runs");
        next.device.go_on();
        assert_eq!(next.remote.resumed.load(Ordering::SeqCst), 1);
        assert!(!next.remote.woken.load(Ordering::SeqCst));
        board = next;
    }
    assert_eq!(board.bar().status(), 0x4f);
}

#[test]
fn what_a_queue_holds_is_found_after_the_load() {
    let board = Board::new();
    let _ = board.up();
    board.remote.slow.store(true, Ordering::SeqCst);
    offer(&board.memory, 1);
    board.device.rung(0);
    assert_eq!(used(&board.memory), 0, "under way");
    // Given to the device, which was not told.
    assert_eq!(board.device.drain(), Drained::AtRest);
    assert_eq!(used(&board.memory), 1, "a drain completes it");
    offer(&board.memory, 2);
    let mut saved = Frame::parse(&board.save()).unwrap();
    let (loopback, remote) = Loopback::new();
    let hypervisor: Arc<dyn Hypervisor> = board.kvm.clone();
    board.kvm.doorbells.lock().unwrap().clear();
    let next = VirtioPci::new(
        loopback,
        0,
        first_address(SLOT),
        board.memory.clone(),
        &hypervisor,
        board.bell.clone(),
    );
    let next = next.unwrap();
    next.load(&mut saved, SLOT.into()).unwrap();
    assert_eq!(used(&board.memory), 1, "nothing is touched before the guest runs");
    next.go_on();
    assert_eq!((used(&board.memory), answer(&board.memory)), (2, !2));
    assert_eq!(remote.served.load(Ordering::SeqCst), 1, "and nothing is done twice");
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let board = Board::new();
    let _ = board.up();
    let mut saved = Frame::parse(&board.save()).unwrap();
    let function: FunctionState = saved.require_section(SLOT.into()).unwrap();
    let virtio: VirtioState = saved.require_section(SLOT.into()).unwrap();
    let load = |function: &FunctionState, virtio: &VirtioState| {
        let mut main = FrameWriter::default();
        main.put_section(SLOT.into(), function).unwrap();
        main.put_section(SLOT.into(), virtio).unwrap();
        main.put_section(SLOT.into(), &LoopbackState::default()).unwrap();
        let fresh = Board::new();
        fresh
            .device
            .load(&mut Frame::parse(&main.finish(1)).unwrap(), SLOT.into())
            .map_err(|error| error.to_string())
    };
    load(&function, &virtio).unwrap();
    type Damage = fn(&mut FunctionState, &mut VirtioState);
    let cases: &[(&str, Damage)] = &[
        ("`msix`", |f, _| f.msix.truncate(2)),
        ("`msix`", |f, _| f.msix.resize(5000, f.msix[0])),
        ("`msix_control`", |f, _| f.msix_control = 1),
        ("`command`", |f, _| f.command = 0xffff),
        ("`bar`", |f, _| f.bar += 4096),
        ("id 1,", |_, v| v.virtio_id = 1),
        ("has 1 queues", |_, v| v.queues.truncate(1)),
        ("0 entries", |_, v| v.queues[0].size = 0),
        ("32 entries", |_, v| v.queues[0].size = 32),
        ("vector 3 ", |_, v| v.queues[1].vector = 3),
        ("vector 3 ", |_, v| v.config_vector = 3),
        ("features 0x1,", |_, v| v.driver_features = 1),
        ("status 0x10 ", |_, v| v.status = 0x10),
        ("status 0x7 ", |_, v| v.status = 7),
        ("status 0x4b ", |_, v| v.status = 0x4b),
        ("not in RAM", |_, v| v.queues[0].used = 1 << 40),
        ("queue 0", |_, v| v.queues[0].available += 1),
    ];
    for (expected, damage) in cases {
        let (mut function, mut virtio) = (function.clone(), virtio.clone());
        damage(&mut function, &mut virtio);
        let error = load(&function, &virtio).unwrap_err();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn a_device_without_an_answer_cannot_be_saved() {
    let (mut loopback, remote) = Loopback::new();
    loopback.savable = false;
    let board = Board::with((loopback, remote));
    assert!(board.device.sections().is_none());
    assert!(board.device.save(&mut FrameWriter::default(), 3).is_err());
    let names: Vec<_> = Board::new().device.sections().unwrap().iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["pci/function", "virtio/transport", "test/loopback"]);
}

#[test]
fn a_reset_makes_it_new() {
    let board = Board::new();
    let fresh = Board::new().save();
    let _ = board.up();
    board.set_config(0x10, &0xca00_0000u32.to_le_bytes());
    board.device.reset();
    assert_eq!(board.save(), fresh);
    assert_eq!(*board.kvm.doorbells.lock().unwrap(), [0; 0]);
    assert_eq!(board.remote.reset.load(Ordering::SeqCst), 1);
    board.up();
}

/// What a guest can do with the bus, whatever it may mean.
#[derive(Debug, Clone)]
enum Access {
    Config(u64, Vec<u8>),
    Bar(u64, Vec<u8>),
    Ports(u16, Vec<u8>),
    /// A step of a driver that knows what it does, so that all of the above meets a device that works.
    Good(u8),
    /// The I/O thread comes by.
    Serve,
}

fn access() -> impl Strategy<Value = Access> {
    let data = || proptest::collection::vec(any::<u8>(), 1..9);
    // Where something is.
    let in_bar = prop_oneof![
        0..0x40u64,
        0x1000..0x1004u64,
        0x2000..0x2010u64,
        0x3000..0x3010u64,
        0x4000..0x4040u64,
        0xc000..0xc010u64,
        0..BAR_LEN
    ];
    prop_oneof![
        (0..0x110u64, data()).prop_map(|(at, data)| Access::Config(at, data)),
        (in_bar, data()).prop_map(|(at, data)| Access::Bar(at, data)),
        (0..8u16, data()).prop_map(|(at, data)| Access::Ports(at, data)),
        (0..6u8).prop_map(Access::Good),
        Just(Access::Serve),
    ]
}

proptest! {
    /// Nothing that a guest does is a panic, and wherever it leaves a device, another one goes on from there.
    #[test]
    fn whatever_a_guest_does_can_be_saved_and_loaded(accesses in proptest::collection::vec(access(), 1..60)) {
        let board = Board::new();
        for access in accesses {
            let mut back = [0; 8];
            match access {
                Access::Config(at, data) => {
                    board.set_config(at, &data);
                    board.mmio.read(CONFIG + at, &mut back[..data.len()]);
                }
                Access::Bar(at, data) => {
                    let bar = Bar(&board.mmio, board.device.memory().map_or(first_address(SLOT), |memory| memory.start));
                    bar.write(at, &data);
                    bar.read(at, &mut back[..data.len()]);
                }
                Access::Ports(at, data) => {
                    board.ports.write(0xcf8 + at, &data);
                    board.ports.read(0xcf8 + at, &mut back[..data.len()]);
                }
                Access::Good(0) => board.set_config(4, &[6]),
                Access::Good(1) => board.enable_msix(),
                Access::Good(2) => unmask(&board.bar()),
                Access::Good(3) => bring_up(&board.bar()),
                Access::Good(4) => board.bar().write(0x14, &[0]),
                Access::Good(_) => {
                    offer(&board.memory, 5);
                    board.bar().write(0x3000, &[0, 0]);
                }
                Access::Serve => drop(board.serve()),
            }
        }
        prop_assert_eq!(board.device.drain(), Drained::AtRest);
        let saved = board.save();
        let fresh = Board::in_memory(Loopback::new(), board.memory.clone());
        fresh.device.load(&mut Frame::parse(&saved).unwrap(), SLOT.into()).unwrap();
        prop_assert_eq!(fresh.save(), saved);
        prop_assert_eq!(&*fresh.kvm.doorbells.lock().unwrap(), &*board.kvm.doorbells.lock().unwrap());
        fresh.device.go_on();
    }
}
