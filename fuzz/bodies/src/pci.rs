//! A guest that does with its PCI bus what it likes, and the states of bus, functions and transports.
//!
//! An input is steps: accesses to configuration space by both ways, to BARs and to what is between them; bytes into RAM; what a
//! driver does that knows its trade, so that all of that meets devices that work; the world outside; turns of the I/O thread;
//! updates and resets.

use std::sync::OnceLock;
use std::time::Duration;

use cpr_core::frame::{FrameWriter, to_body};
use vm_memory::{Bytes, GuestAddress};
use vmm_core::pci::{FunctionState, HostState, MsixEntry, WINDOW};
use vmm_core::virtio::pci::VirtioState;

use crate::board::{BLOCK, BUFFERS, Bench, CONSOLE, MEMORY, NET, RNG, SLOTS, parsed};
use crate::net::Bites;
use crate::{EPOCH, decoded};

const HOST: &str = "pci/host";
const FUNCTION: &str = "pci/function";
const TRANSPORT: &str = "virtio/transport";
const CONSOLE_STATE: &str = "virtio-console";

/// Each takes some microseconds at least, and a long input is seldom better than a short one.
const MAX_STEPS: usize = 200;
/// Features that a byte declines: event index, indirect descriptors, merged buffers, commands, ports or checksums, several
/// pairs, and offloads.
const DECLINED: [u64; 7] =
    [1 << 29, 1 << 28, 1 << 15, 1 << 17, 1 << 1, 1 << 22, 0xf << 7 | 0xf << 11 | 1 << 21];
/// A device's own registers are in these parts of its BAR; the last one is all of it.
const PARTS: [(u64, u64); 7] =
    [(0, 0x40), (0x1000, 4), (0x2000, 0x40), (0x3000, 0x20), (0x4000, 0xa0), (0xc000, 0x10), (0, 0x1_0000)];

/// Steps, numbered as inputs number them.
mod step {
    pub(super) const ECAM: u8 = 0;
    pub(super) const PORTS: u8 = 1;
    pub(super) const BAR: u8 = 2;
    pub(super) const WINDOW: u8 = 3;
    pub(super) const RAM: u8 = 4;
    pub(super) const TURN: u8 = 5;
    pub(super) const BRING_UP: u8 = 6;
    pub(super) const OFFER: u8 = 7;
    pub(super) const NOTIFY: u8 = 8;
    pub(super) const UPDATE: u8 = 9;
    pub(super) const STOP: u8 = 10;
    pub(super) const RESET: u8 = 11;
    pub(super) const CONSOLE: u8 = 12;
    pub(super) const NETWORK: u8 = 13;
    /// The number of steps.
    pub(super) const COUNT: u8 = 14;
}

/// A guest and the world around it, as the input says. True if a device had something to give back.
pub fn pci(data: &[u8]) -> bool {
    let mut input = Bites(data);
    let mut bench = Bench::new();
    let image = bench.world.image.metadata().expect("a memfd").len();
    for _ in 0..MAX_STEPS {
        if input.0.is_empty() {
            break;
        }
        take_step(&mut bench, &mut input);
    }
    bench.update();
    bench.board.turn();
    assert_eq!(
        bench.world.image.metadata().expect("a memfd").len(),
        image,
        "nothing is written beyond the disk"
    );
    (1..=SLOTS).any(|slot| (0..Bench::queues(slot)).any(|queue| bench.used(slot, queue) > 0))
}

fn take_step(bench: &mut Bench, input: &mut Bites<'_>) {
    match input.byte() % step::COUNT {
        step::ECAM => {
            // Slot 0 is the bridge's, and the last one nobody's.
            let slot = input.byte() % (SLOTS + 2);
            let at = Bench::config(slot) + u64::from(input.word() % 0x1001);
            access(bench, at, input);
        }
        step::PORTS => {
            let ports = &bench.board.ports;
            let (at, offset) = (input.word(), u16::from(input.byte() % 8));
            let address = 0x8000_0000 | u32::from(at);
            ports.write(0xcf8, &address.to_le_bytes());
            let bytes = input.bytes::<4>();
            let mut back = [0; 4];
            for len in [1, 2, 4] {
                ports.write(0xcf8 + offset, &bytes[..len]);
                ports.read(0xcf8 + offset, &mut back[..len]);
            }
        }
        step::BAR => {
            let slot = 1 + input.byte() % SLOTS;
            let (start, len) = PARTS[usize::from(input.byte()) % PARTS.len()];
            let at = bench.bar(slot) + start + u64::from(input.word()) % len;
            access(bench, at, input);
        }
        step::WINDOW => {
            let at = u64::from(u32::from_le_bytes(input.bytes()));
            access(bench, WINDOW.start + at % (WINDOW.end - WINDOW.start), input);
        }
        step::RAM => {
            let (at, count) = (u64::from(input.word()) * 2, input.byte().into());
            let _ = bench.memory.write_slice(input.take(count), GuestAddress(at));
        }
        step::TURN => bench.board.turn(),
        step::BRING_UP => {
            let (slot, declined) = (1 + input.byte() % SLOTS, input.byte());
            let declined = DECLINED.iter().enumerate().filter(|(bit, _)| declined & 1 << bit != 0);
            bench.bring_up(slot, declined.fold(0, |bits, (_, feature)| bits | feature));
        }
        step::OFFER => {
            let (slot, queue) = queue_of(input);
            // How much the device reads and writes, in this order, each at most 64 KiB.
            let (at, read, written) = (BUFFERS + u64::from(input.word()), input.word(), input.word());
            let pieces = [(at, read.into(), false), (at + u64::from(read), u32::from(written), true)];
            let pieces: Vec<_> = pieces.into_iter().filter(|(_, len, _)| *len > 0).collect();
            bench.offer(slot, queue, &pieces);
        }
        step::NOTIFY => {
            let (slot, queue) = queue_of(input);
            bench.notify(slot, queue);
        }
        step::UPDATE => bench.update(),
        step::STOP => {
            bench.save();
            bench.board.go_on().expect("there are descriptors");
        }
        step::RESET => {
            bench.save();
            bench.board.reset();
            bench.board.go_on().expect("there are descriptors");
        }
        step::CONSOLE => {
            let (what, value) = (input.byte(), input.byte());
            let end = &bench.ends[usize::from(what & 1)];
            match what >> 1 & 3 {
                0 => drop(end.put(&vec![value; usize::from(value) << 6])),
                1 => end.set_connected(value & 1 != 0),
                _ => end.set_size((value.into(), 25)),
            }
        }
        _ => {
            let (what, len) = (usize::from(input.byte()), usize::from(input.word()));
            let wire = &bench.world.network[what % bench.world.network.len()];
            match what & 0x80 {
                0 => drop(wire.send(&vec![0x5a; len])),
                _ => while wire.recv(&mut [0; 16]).is_ok() {},
            }
        }
    }
}

/// A read and a write at this address, by the guest: a length, then the bytes.
fn access(bench: &Bench, at: u64, input: &mut Bites<'_>) {
    let len = usize::from(input.byte() % 8 + 1);
    let bytes = input.bytes::<8>();
    let mut back = [0; 8];
    bench.board.mmio.write(at, &bytes[..len]);
    bench.board.mmio.read(at, &mut back[..len]);
}

fn queue_of(input: &mut Bites<'_>) -> (u8, u16) {
    let slot = 1 + input.byte() % SLOTS;
    (slot, u16::from(input.byte()) % Bench::queues(slot))
}

/// A guest that uses all of its devices.
pub(crate) fn pci_seeds() -> Vec<Vec<u8>> {
    let ram = |at: u64, bytes: &[u8]| {
        let place = ((at / 2) as u16).to_le_bytes();
        [&[step::RAM, place[0], place[1], bytes.len() as u8], bytes].concat()
    };
    // In the buffers at `at`: pieces of `read` and `written` bytes.
    let request = |slot: u8, queue: u8, at: u16, read: u16, written: u16| {
        let [at, read, written] = [at, read, written].map(u16::to_le_bytes);
        let offer = [step::OFFER, slot - 1, queue, at[0], at[1], read[0], read[1], written[0], written[1]];
        [&offer[..], &[step::NOTIFY, slot - 1, queue, step::TURN]].concat()
    };
    let update = vec![step::UPDATE, step::TURN];
    let up = |slot: u8, declined: u8| vec![step::BRING_UP, slot - 1, declined];
    let random = [up(RNG, 0), request(RNG, 0, 0, 0, 64), update.clone(), request(RNG, 0, 64, 0, 900)];
    let write = [
        up(BLOCK, 0),
        ram(BUFFERS, &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]),
        request(BLOCK, 0, 0, 16 + 512, 1),
        update.clone(),
        ram(BUFFERS, &[0]),
        request(BLOCK, 1, 0, 16, 1025),
        vec![step::STOP, step::TURN],
    ];
    let talk = [
        up(CONSOLE, 0),
        request(CONSOLE, 2, 0x100, 0, 32),
        request(CONSOLE, 0, 0x200, 0, 200),
        ram(BUFFERS, &[0xff, 0xff, 0xff, 0xff, 0, 0, 1, 0, 0, 0, 0, 0, 3, 0, 1, 0, 0, 0, 0, 0, 6, 0, 1, 0]),
        request(CONSOLE, 3, 0, 8, 0),
        request(CONSOLE, 3, 8, 8, 0),
        request(CONSOLE, 3, 16, 8, 0),
        vec![step::CONSOLE, 2, 1, step::CONSOLE, 0, 5, step::TURN, step::TURN],
        request(CONSOLE, 1, 0, 24, 0),
        update.clone(),
    ];
    let network = [
        up(NET, 0x01),
        request(NET, 0, 0, 0, 2000),
        vec![step::NETWORK, 0, 60, 0, step::TURN],
        request(NET, 1, 0x1000, 72, 0),
        update,
        ram(BUFFERS, &[4, 0, 2, 0]),
        request(NET, 4, 0, 4, 1),
        vec![step::NETWORK, 1, 60, 0, step::TURN, step::NETWORK, 0x80, 0, 0, step::RESET],
    ];
    // The BAR of the disk goes where that of the network is, and away; the window in configuration space; a masked vector.
    let moved = [
        up(BLOCK, 0x01),
        up(NET, 0),
        vec![step::ECAM, BLOCK, 0x10, 0, 3, 0, 0, 4, 0xc0, 0, 0, 0, 0],
        request(BLOCK, 0, 0, 16, 20),
        vec![step::UPDATE, step::PORTS, 0x10, 0x18, 4, 0, 0, 0x77, 0xc7],
        vec![step::BAR, BLOCK - 1, 4, 0x1c, 0, 3, 1, 0, 0, 0, 0, 0, 0, 0],
        request(BLOCK, 0, 0, 16, 20),
        vec![step::WINDOW, 0, 0, 1, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0],
    ];
    [&random[..], &write, &talk, &network, &moved].map(|parts| parts.concat()).to_vec()
}

/// A bus whose guest has used its devices: its state, and what is in RAM.
fn used_bus() -> &'static (Vec<u8>, Vec<u8>) {
    static USED: OnceLock<(Vec<u8>, Vec<u8>)> = OnceLock::new();
    USED.get_or_init(|| {
        let mut bench = Bench::new();
        (1..=SLOTS).for_each(|slot| bench.bring_up(slot, 0));
        bench.offer(RNG, 0, &[(BUFFERS, 64, true)]);
        bench.notify(RNG, 0);
        bench.board.turn();
        assert_eq!(bench.used(RNG, 0), 1);
        let state = bench.save();
        let mut ram = vec![0; MEMORY];
        bench.memory.read_slice(&mut ram, GuestAddress(0)).expect("all of it");
        (state, ram)
    })
}

/// Loads a bus that was used, but for this section, and has it go on. False if it is refused.
fn goes_on_with(section: &str, instance: u8, body: &[u8]) -> bool {
    let (state, ram) = used_bus();
    let mut good = parsed(state);
    let mut writer = FrameWriter::default();
    for name in good.remaining() {
        let (name, number) = name.rsplit_once('/').expect("as `remaining` writes it");
        let number = number.parse().expect("as `remaining` writes it");
        let saved = good.take(name, number).expect("it is there");
        let replaced = name == section && number == u32::from(instance);
        let body = if replaced { body.to_vec() } else { saved.body };
        writer.put(name, number, saved.version, body).expect("each stands once");
    }
    let mut bench = Bench::new();
    bench.memory.write_slice(ram, GuestAddress(0)).expect("all of it");
    bench.board.stop(Duration::from_secs(1)).expect("nothing is under way");
    if !bench.load(&mut parsed(&writer.finish(EPOCH))) {
        return false;
    }
    (1..=SLOTS).for_each(|slot| bench.notify(slot, 0));
    bench.board.turn();
    bench.update();
    true
}

/// The section `pci/host`, in the state of a bus that was used.
pub fn pci_host(data: &[u8]) -> bool {
    decoded::<HostState>(HOST, data).is_some() && goes_on_with(HOST, 0, data)
}

pub(crate) fn pci_host_seeds() -> Vec<Vec<u8>> {
    [0, 0x8000_1810, u32::MAX].map(|address| to_body(&HostState { address })).to_vec()
}

/// The section `pci/function` of a network card, in the state of a bus that was used.
pub fn pci_function(data: &[u8]) -> bool {
    decoded::<FunctionState>(FUNCTION, data).is_some() && goes_on_with(FUNCTION, NET, data)
}

pub(crate) fn pci_function_seeds() -> Vec<Vec<u8>> {
    let vector =
        |data| MsixEntry { address: 0xfee0_0000, data, masked: data % 2 == 0, pending: data % 4 == 0 };
    let state = FunctionState {
        command: 6,
        bar: 0xc123_0000,
        cache_line: 16,
        interrupt_line: 5,
        msix_control: 0x8000,
        msix: (0..=u32::from(Bench::queues(NET))).map(vector).collect(),
    };
    vec![to_body(&state), to_body(&FunctionState { command: 0, msix_control: 0xc000, ..state })]
}

/// The section `virtio/transport` of a console, in the state of a bus that was used.
pub fn virtio_transport(data: &[u8]) -> bool {
    decoded::<VirtioState>(TRANSPORT, data).is_some() && goes_on_with(TRANSPORT, CONSOLE, data)
}

pub(crate) fn virtio_transport_seeds() -> Vec<Vec<u8>> {
    let saved = parsed(&used_bus().0).require_section(CONSOLE.into());
    let working: VirtioState = saved.expect("it was just saved");
    let idle = VirtioState { status: 3, queue_select: 9, ..working.clone() };
    vec![to_body(&working), to_body(&idle)]
}

/// The section `virtio-console`, in the state of a bus that was used.
pub fn console_state(data: &[u8]) -> bool {
    goes_on_with(CONSOLE_STATE, CONSOLE, data)
}

pub(crate) fn console_state_seeds() -> Vec<Vec<u8>> {
    let of = |bench: &mut Bench| {
        let state = bench.save();
        parsed(&state).take(CONSOLE_STATE, CONSOLE.into()).expect("it was just saved").body
    };
    let mut typed_ahead = Bench::new();
    typed_ahead.ends[1].put(b"typed ahead");
    vec![of(&mut Bench::new()), of(&mut typed_ahead)]
}
