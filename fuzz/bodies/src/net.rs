//! The network card, whose rings, buffers and packets are the fuzzer's.
//!
//! An input is a few bytes for the queues, and then steps: the driver writes into its memory, kicks, the network sends, the
//! device is replaced. Nothing checks addresses beforehand, as a transport would.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use cpr_core::frame::{Frame, FrameWriter};
use oslib::tap::Offloads;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_core::virtio::net::{Link, Net, NetState, Settings};
use vmm_core::virtio::{Broken, Driver, Interrupt, Persistent, VirtioDevice};

use crate::{EPOCH, decoded};

const SECTION: &str = "virtio-net";
/// Bytes of guest memory. Addresses of rings reach beyond it.
const MEMORY: usize = 128 << 10;
pub(crate) const PAIRS: usize = 2;
const QUEUES: usize = 2 * PAIRS + 1;
/// `VIRTIO_F_VERSION_1`.
const VERSION_1: u32 = 32;
/// Features that the first byte of an input chooses from: merged buffers, commands, several pairs, offloads, and the commands
/// for addresses, modes, VLANs and offloads.
const FEATURES: [&[u32]; 7] = [&[15], &[17], &[22], &[1, 7, 9], &[23], &[18, 20], &[19, 2]];
/// The bit of that byte for the event index.
const EVENT_INDEX: u8 = 0x80;

pub(crate) const SETTINGS: Settings = Settings { mac: [2, 0, 0, 0, 0, 1], mtu: Some(1500) };

/// A socket in place of a tap.
#[derive(Debug, Clone)]
pub(crate) struct Wire(Arc<UnixDatagram>);

impl Link for Wire {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn is_adopted(&self) -> bool {
        true
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        // As the kernel does.
        let segments = offloads.intersects(Offloads::TSO4 | Offloads::TSO6);
        assert!(segments || !offloads.contains(Offloads::TSO_ECN));
        assert!(offloads.is_empty() || offloads.contains(Offloads::CSUM));
        Ok(())
    }

    fn set_attached(&self, _attached: bool) -> io::Result<()> {
        Ok(())
    }
}

struct Nobody;

impl Interrupt for Nobody {
    fn queue(&self, index: usize) {
        assert!(index < QUEUES);
    }

    fn config(&self) {}
}

/// Bytes, then zeros.
pub(crate) struct Bites<'a>(pub(crate) &'a [u8]);

impl<'a> Bites<'a> {
    pub(crate) fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    pub(crate) fn word(&mut self) -> u16 {
        u16::from(self.byte()) | u16::from(self.byte()) << 8
    }

    pub(crate) fn bytes<const COUNT: usize>(&mut self) -> [u8; COUNT] {
        std::array::from_fn(|_| self.byte())
    }

    pub(crate) fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

fn queue(input: &mut Bites<'_>, event_index: bool) -> Queue {
    let mut queue = Queue::new(256).expect("a power of two");
    queue.set_size(1 << (input.byte() % 9));
    queue.set_desc_table_address(Some(u32::from(input.word()) * 16), None);
    queue.set_avail_ring_address(Some(u32::from(input.word()) * 2), None);
    queue.set_used_ring_address(Some(u32::from(input.word()) * 4), None);
    queue.set_event_idx(event_index);
    queue.set_ready(true);
    queue
}

/// A wire for each pair of queues, and their other ends.
pub(crate) fn wires() -> io::Result<(Vec<Wire>, Vec<UnixDatagram>)> {
    let (mut wires, mut others) = (Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        let (ours, theirs) = UnixDatagram::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        wires.push(Wire(Arc::new(ours)));
        others.push(theirs);
    }
    Ok((wires, others))
}

/// A device, its driver and the other ends of its wires.
struct Scene {
    device: Net,
    driver: Driver,
    wires: Vec<Wire>,
    others: Vec<UnixDatagram>,
}

impl Scene {
    fn new(input: &mut Bites<'_>) -> io::Result<Self> {
        let choice = input.byte();
        let chosen = FEATURES.iter().enumerate().filter(|(bit, _)| choice & (1 << bit) != 0);
        let features = chosen.flat_map(|(_, features)| *features).chain([&VERSION_1]);
        let driver = Driver {
            memory: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).map_err(io::Error::other)?,
            queues: (0..QUEUES).map(|_| queue(input, choice & EVENT_INDEX != 0)).collect(),
            features: features.fold(0, |bits, bit| bits | 1 << bit),
            interrupt: Box::new(Nobody),
        };
        let (wires, others) = wires()?;
        Ok(Self { device: Net::new(SETTINGS, wires.clone()), driver, wires, others })
    }

    fn step(&mut self, input: &mut Bites<'_>) -> Result<(), Broken> {
        let Self { device, driver, wires, others } = self;
        match input.byte() % 8 {
            0 => {
                let (at, count) = (u64::from(input.word()) * 2, input.byte().into());
                let _ = driver.memory.write_slice(input.take(count), GuestAddress(at));
            }
            1 => device.queue_ready(driver, usize::from(input.byte()))?,
            2 => device.fd_ready(driver, u32::from(input.byte()))?,
            3 => {
                let (wire, len) = (usize::from(input.byte()) % PAIRS, usize::from(input.word()));
                let _ = others[wire].send(&vec![0x5a; len]);
            }
            4 => {
                for other in others {
                    while other.recv(&mut [0; 16]).is_ok() {}
                }
            }
            5 => {
                device.drain(driver)?;
                assert!(device.watches().is_empty());
                let mut writer = FrameWriter::default();
                device.save(&mut writer, 0).expect("every state can be saved");
                let mut frame = Frame::parse(&writer.finish(EPOCH)).expect("what was written is read");
                *device = Net::new(SETTINGS, wires.clone());
                device.load(&mut frame, 0).expect("what was saved can be loaded");
                device.resume();
            }
            6 => {
                device.reset();
                assert!(device.watches().is_empty());
                device.activate(driver)?;
            }
            _ => {
                let mut config = [0; 16];
                device.read_config(input.word().into(), &mut config);
            }
        }
        for watch in device.watches() {
            assert!((watch.token as usize) < 2 * PAIRS);
        }
        Ok(())
    }
}

/// A network card with a driver, and a network, that do as the input says. Takes what breaks nothing.
pub fn net(data: &[u8]) -> bool {
    let mut input = Bites(data);
    let mut scene = Scene::new(&mut input).expect("memory and sockets");
    if scene.device.activate(&mut scene.driver).is_err() {
        return false;
    }
    while !input.0.is_empty() {
        if scene.step(&mut input).is_err() {
            // Only a reset helps, and it always does.
            scene.device.reset();
            return false;
        }
    }
    true
}

/// The section of a network card.
pub fn net_state(data: &[u8]) -> bool {
    let Some(state) = decoded::<NetState>(SECTION, data) else { return false };
    let mut writer = FrameWriter::default();
    writer.put_section(0, &state).expect("it stands once");
    let frame = writer.finish(EPOCH);
    let wire = Wire(Arc::new(UnixDatagram::unbound().expect("a socket")));
    let mut device = Net::new(SETTINGS, vec![wire; PAIRS]);
    let mut read = Frame::parse(&frame).expect("what was written is read");
    if let Err(error) = device.load(&mut read, 0) {
        let _ = error.to_string();
        return false;
    }
    let mut writer = FrameWriter::default();
    device.save(&mut writer, 0).expect("every state can be saved");
    assert_eq!(writer.finish(EPOCH), frame);
    true
}

pub(crate) fn net_seeds() -> Vec<Vec<u8>> {
    // Queue n has its rings at n * 0x1000: the table, the available ring at 0x400, the used ring at 0x800.
    let head = |choice: u8| {
        let mut input = vec![choice];
        for queue in 0..QUEUES as u16 {
            let base = queue * 0x1000;
            input.push(4);
            for word in [base / 16, (base + 0x400) / 2, (base + 0x800) / 4] {
                input.extend(word.to_le_bytes());
            }
        }
        input
    };
    let write =
        |at: u16, bytes: &[u8]| [&[0], &(at / 2).to_le_bytes()[..], &[bytes.len() as u8], bytes].concat();
    let descriptor = |at: u16, len: u8, flags: u8, next: u8| {
        let place = at.to_le_bytes();
        [place[0], place[1], 0, 0, 0, 0, 0, 0, len, 0, 0, 0, flags, 0, next, 0]
    };
    let send = [
        head(0x80),
        write(0x1000, &descriptor(0x6000, 12, 1, 1)),
        write(0x1010, &descriptor(0x7000, 60, 0, 0)),
        write(0x1400, &[0, 0, 1, 0, 0, 0]),
        vec![1, 1, 5, 1, 0, 1, 1, 4],
    ];
    let receive = [
        head(0x01),
        write(0, &[descriptor(0x6000, 64, 2, 0), descriptor(0x7000, 200, 2, 0)].concat()),
        write(0x400, &[0, 0, 2, 0, 0, 0, 1, 0]),
        // A packet that has to wait, and one that fits.
        vec![3, 0, 0x2c, 1, 3, 0, 50, 0, 1, 0, 5, 1, 0, 2, 0],
        write(0x402, &[3, 0, 0, 0, 1, 0, 0, 0]),
        vec![1, 0, 2, 0],
    ];
    let control = [
        head(0xff),
        write(0x4000, &[descriptor(0x6000, 4, 1, 1), descriptor(0x7000, 1, 2, 0)].concat()),
        write(0x6000, &[4, 0, 2, 0]),
        write(0x4400, &[0, 0, 1, 0, 0, 0]),
        vec![1, 4, 2, 3, 7, 0, 0, 6],
    ];
    [&send[..], &receive, &control].map(|parts| parts.concat()).to_vec()
}

pub(crate) fn net_state_seeds() -> Vec<Vec<u8>> {
    let held = [vec![0; 60], vec![]].map(|packet| (!packet.is_empty()).then(|| packet.into()));
    let state = NetState {
        mac: [2, 0, 0, 0, 0, 2],
        mtu: SETTINGS.mtu,
        link_up: true,
        header_len: 12,
        active_pairs: 2,
        guest_offloads: 0x82,
        held: held.to_vec(),
    };
    vec![cpr_core::frame::to_body(&state)]
}
