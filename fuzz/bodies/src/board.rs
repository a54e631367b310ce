//! A PCI bus with one device of each kind, for a guest that is the fuzzer.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cpr_core::frame::{Frame, FrameWriter};
use oslib::eventfd::EventFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_core::devices::{Board, PciConfig, PciDevice};
use vmm_core::error::KvmError;
use vmm_core::output::OutputSink;
use vmm_core::pci::{ECAM, Hypervisor, WINDOW};
use vmm_core::virtio::VirtioDevice;
use vmm_core::virtio::console::{Console, HostEnd, PortConfig};
use vmm_core::virtio::net::Net;
use vmm_core::virtio::pci::BAR_LEN;
use vmm_core::virtio::rng::{Rng, Source};

use crate::EPOCH;
use crate::block::{self, QUEUES};
use crate::net::{self, PAIRS, Wire};

/// Slots of the devices, and how many queues each has.
pub(crate) const RNG: u8 = 1;
pub(crate) const CONSOLE: u8 = 2;
pub(crate) const BLOCK: u8 = 3;
pub(crate) const NET: u8 = 4;
pub(crate) const SLOTS: u8 = 4;
const QUEUE_COUNTS: [u16; SLOTS as usize] = [1, 6, QUEUES, 2 * PAIRS as u16 + 1];

/// Bytes of guest memory. Addresses in rings reach beyond it.
pub(crate) const MEMORY: usize = 128 << 10;
/// Where requests are; before them are the rings of every queue, as a driver that does well places them.
pub(crate) const BUFFERS: u64 = 0x4000;
/// Bytes of the rings of a queue.
const RINGS_LEN: u64 = 0x400;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;
/// Entries of a queue.
const SIZE: u16 = 16;

/// Longer than any device takes to come to rest.
const PATIENCE: Duration = Duration::from_secs(8);

const COMMAND: u64 = 0x04;
const BAR0: u64 = 0x10;
const MSIX_CONTROL: u64 = 0x42;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;

/// In KVM's place: has one doorbell at an address, as KVM does.
#[derive(Debug, Default)]
pub(crate) struct Doorbells(Mutex<BTreeSet<(u64, i32)>>);

impl Doorbells {
    /// Addresses at which writes ring.
    fn addresses(&self) -> BTreeSet<u64> {
        self.0.lock().expect("nobody panics here").iter().map(|(address, _)| *address).collect()
    }
}

impl Hypervisor for Doorbells {
    fn send_message(&self, _address: u64, _data: u32) {}

    fn attach_doorbell(&self, address: u64, doorbell: &EventFd) -> Result<(), KvmError> {
        if self.addresses().contains(&address) {
            return Err(KvmError { call: "KVM_IOEVENTFD", source: io::ErrorKind::AlreadyExists.into() });
        }
        self.0.lock().expect("nobody panics here").insert((address, doorbell.as_raw_fd()));
        Ok(())
    }

    fn detach_doorbell(&self, address: u64, doorbell: &EventFd) -> Result<(), KvmError> {
        match self.0.lock().expect("nobody panics here").remove(&(address, doorbell.as_raw_fd())) {
            true => Ok(()),
            false => Err(KvmError { call: "KVM_IOEVENTFD", source: io::ErrorKind::NotFound.into() }),
        }
    }
}

struct Nobody;

impl OutputSink for Nobody {
    fn write(&mut self, _bytes: &[u8]) {}
}

/// What the devices have in the world outside, and keep over an update.
pub(crate) struct World {
    pub(crate) image: Arc<File>,
    wires: Vec<Wire>,
    /// The other ends of the wires.
    pub(crate) network: Vec<UnixDatagram>,
}

/// A machine's bus, its guest's memory, and the world.
pub(crate) struct Bench {
    pub(crate) board: Board,
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) world: World,
    doorbells: Arc<Doorbells>,
    /// Of the console's ports.
    pub(crate) ends: Vec<HostEnd>,
}

impl Bench {
    /// Everything new. The guest runs.
    pub(crate) fn new() -> Bench {
        let (wires, network) = net::wires().expect("there are sockets");
        let world = World { image: block::image(false).fd().clone(), wires, network };
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        let (board, doorbells, ends) = board(&memory, &world);
        let mut bench = Bench { board, memory, world, doorbells, ends };
        bench.board.go_on().expect("there are descriptors");
        bench
    }

    /// The devices' state. They come to rest for it.
    pub(crate) fn save(&mut self) -> Vec<u8> {
        self.board.stop(PATIENCE).expect("every device comes to rest");
        saved(&self.board)
    }

    /// Replaces the devices, which have been stopped, by others that go on from `state`. False if it is refused.
    pub(crate) fn load(&mut self, frame: &mut Frame) -> bool {
        let (mut board, doorbells, ends) = board(&self.memory, &self.world);
        if let Err(error) = board.load(frame) {
            let _ = error.to_string();
            return false;
        }
        let state = saved(&board);
        let (again, others, _) = self::board(&self.memory, &self.world);
        again.load(&mut parsed(&state)).expect("what was just saved is loaded");
        assert!(saved(&again) == state, "what is loaded is what was saved");
        // A doorbell may be missing where two BARs overlapped once.
        assert!(others.addresses() == doorbells.addresses());
        board.go_on().expect("there are descriptors");
        (self.board, self.doorbells, self.ends) = (board, doorbells, ends);
        true
    }

    /// The devices in another process.
    pub(crate) fn update(&mut self) {
        let state = self.save();
        let rung = self.doorbells.addresses();
        let mut frame = parsed(&state);
        assert!(self.load(&mut frame), "what was just saved is loaded");
        assert!(frame.remaining().is_empty(), "{:?}", frame.remaining());
        assert!(self.doorbells.addresses().is_superset(&rung), "a doorbell got lost");
    }

    // What a guest does.

    /// Where the configuration space of a device is.
    pub(crate) fn config(slot: u8) -> u64 {
        ECAM.start + (u64::from(slot) << 15)
    }

    /// Where the BAR of a device is, if it is answered there.
    pub(crate) fn bar(&self, slot: u8) -> u64 {
        let mut bytes = [0; 8];
        self.board.mmio.read(Bench::config(slot) + BAR0, &mut bytes);
        match u64::from_le_bytes(bytes) & !0xf {
            base if WINDOW.contains(&base) => base,
            _ => WINDOW.start + u64::from(slot) * BAR_LEN,
        }
    }

    /// Where the rings of a queue are.
    pub(crate) fn rings(slot: u8, queue: u16) -> u64 {
        let before: u16 = QUEUE_COUNTS[..usize::from(slot - 1)].iter().sum();
        u64::from(before + queue) * RINGS_LEN
    }

    pub(crate) fn queues(slot: u8) -> u16 {
        QUEUE_COUNTS[usize::from(slot - 1)]
    }

    /// Does what a driver does to have a device work, without the features in `declined`.
    pub(crate) fn bring_up(&self, slot: u8, declined: u64) {
        let mmio = &self.board.mmio;
        mmio.write(Bench::config(slot) + COMMAND, &[6, 0]);
        mmio.write(Bench::config(slot) + MSIX_CONTROL, &[0, 0x80]);
        let bar = self.bar(slot);
        let write = |at: u64, bytes: &[u8]| mmio.write(bar + at, bytes);
        for value in [0, 1, 3] {
            write(0x14, &[value]);
        }
        for select in [0_u32, 1] {
            write(0x00, &select.to_le_bytes());
            let mut offered = [0; 4];
            mmio.read(bar + 0x04, &mut offered);
            let declined = (declined >> (32 * select)) as u32;
            write(0x08, &select.to_le_bytes());
            write(0x0c, &(u32::from_le_bytes(offered) & !declined).to_le_bytes());
        }
        write(0x14, &[0x0b]);
        write(0x10, &[0, 0]);
        for queue in 0..Bench::queues(slot) {
            let rings = Bench::rings(slot, queue);
            write(0x16, &queue.to_le_bytes());
            write(0x18, &SIZE.to_le_bytes());
            write(0x1a, &(queue + 1).to_le_bytes());
            for (at, address) in [(0x20, rings), (0x28, rings + AVAILABLE), (0x30, rings + USED)] {
                write(at, &address.to_le_bytes());
            }
            write(0x1c, &[1, 0]);
            let entry = MSIX_TABLE + 16 * u64::from(queue + 1);
            write(entry, &0xfee0_0000_u64.to_le_bytes());
            write(entry + 8, &[0x40, 0, 0, 0, 0, 0, 0, 0]);
        }
        write(0x14, &[0x0f]);
    }

    /// Makes a chain of these pieces available: address, length, and whether the device writes it.
    pub(crate) fn offer(&self, slot: u8, queue: u16, pieces: &[(u64, u32, bool)]) {
        let rings = Bench::rings(slot, queue);
        let put = |at: u64, bytes: &[u8]| self.memory.write_slice(bytes, GuestAddress(at)).expect("in RAM");
        let index: u16 = self.memory.read_obj(GuestAddress(rings + AVAILABLE + 2)).expect("in RAM");
        let head = index.wrapping_mul(2);
        for (number, (address, len, writable)) in (0_u16..).zip(pieces) {
            let next = usize::from(number) + 1 < pieces.len();
            let flags = u16::from(next) | u16::from(*writable) << 1;
            let place = |number: u16| head.wrapping_add(number) % SIZE;
            let at = rings + 16 * u64::from(place(number));
            put(at, &address.to_le_bytes());
            put(at + 8, &len.to_le_bytes());
            put(at + 12, &flags.to_le_bytes());
            put(at + 14, &place(number.wrapping_add(1)).to_le_bytes());
        }
        put(rings + AVAILABLE + 4 + 2 * u64::from(index % SIZE), &(head % SIZE).to_le_bytes());
        put(rings + AVAILABLE + 2, &index.wrapping_add(1).to_le_bytes());
    }

    /// Rings the doorbell of a queue.
    pub(crate) fn notify(&self, slot: u8, queue: u16) {
        let at = NOTIFY + 4 * u64::from(queue);
        self.board.mmio.write(self.bar(slot) + at, &queue.to_le_bytes());
    }

    /// How much a queue has been given back, where its rings are in their place.
    pub(crate) fn used(&self, slot: u8, queue: u16) -> u16 {
        self.memory.read_obj(GuestAddress(Bench::rings(slot, queue) + USED + 2)).expect("in RAM")
    }
}

/// One device of each kind, and what leads to them. They are stopped.
fn board(memory: &GuestMemoryMmap, world: &World) -> (Board, Arc<Doorbells>, Vec<HostEnd>) {
    let ends: Vec<_> = (0..2).map(|_| HostEnd::new().expect("there are descriptors")).collect();
    let port = |(host, number): (&HostEnd, u32)| PortConfig {
        number,
        name: Some("port".into()),
        sink: Box::new(Nobody),
        host: host.clone(),
    };
    let console = Console::new(2, ends.iter().zip(0..).map(port).collect()).expect("ports that can be");
    let device = |slot, device: Box<dyn VirtioDevice>| {
        assert_eq!(device.queue_sizes().len(), usize::from(Bench::queues(slot)), "of slot {slot}");
        PciDevice { slot, name: format!("device{slot}"), withheld: 0, device }
    };
    let devices = vec![
        device(RNG, Box::new(Rng::new(Source::Kernel).expect("there are descriptors"))),
        device(CONSOLE, Box::new(console)),
        device(BLOCK, Box::new(block::disk_of(world.image.clone()))),
        device(NET, Box::new(Net::new(net::SETTINGS, world.wires.clone()))),
    ];
    let doorbells = Arc::new(Doorbells::default());
    let hypervisor: Arc<dyn Hypervisor> = doorbells.clone();
    let board = Board::new(PciConfig { devices }, memory, &hypervisor).expect("devices that can be");
    (board, doorbells, ends)
}

pub(crate) fn saved(board: &Board) -> Vec<u8> {
    let mut writer = FrameWriter::default();
    board.save(&mut writer).expect("every device can be saved");
    writer.finish(EPOCH)
}

pub(crate) fn parsed(state: &[u8]) -> Frame {
    Frame::parse(state).expect("what was just written can be read")
}
