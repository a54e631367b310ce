//! Virtio devices whose driver is the fuzzer: its are guest RAM, the rings in it, and what happens in which order.
//!
//! An input is a head, which has the features and, for each of some queues, its size and where its three parts are; then the
//! number of steps, and three bytes for each; the rest is what RAM begins with.

use cpr_core::frame::{Frame, FrameWriter};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_core::output::OutputSink;
use vmm_core::virtio::console::{Console, HostEnd, PortConfig};
use vmm_core::virtio::rng::{Rng, Source};
use vmm_core::virtio::{Broken, Driver, Interrupt, VirtioDevice};

/// The queues that the fuzzer places. Others of a device are not ready.
const QUEUES: usize = 6;
/// Bytes of the head that belong to one queue: the logarithm of its size, and three addresses in units of 16 bytes.
const QUEUE_LEN: usize = 7;
/// Before them are the features; after them, and in the last byte of the head, the number of steps.
const HEAD_LEN: usize = 1 + QUEUES * QUEUE_LEN + 1;
const RAM: usize = 64 << 10;
/// A step may lead a device through much of RAM for each request, so there are not many.
const MAX_STEPS: usize = 24;
/// Turns of a device in one step. It may ask for more for as long as its rings are not empty.
const TURNS: usize = 2;

struct Nobody;

impl Interrupt for Nobody {
    fn queue(&self, _index: usize) {}

    fn config(&self) {}
}

impl OutputSink for Nobody {
    fn write(&mut self, _bytes: &[u8]) {}
}

/// The input, taken apart.
struct Script<'a> {
    driver: Driver,
    steps: &'a [[u8; 3]],
}

/// The two bytes at `at`.
fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

impl<'a> Script<'a> {
    fn parse(data: &'a [u8], device: &dyn VirtioDevice) -> Option<Script<'a>> {
        let (head, rest) = data.split_at_checked(HEAD_LEN)?;
        let steps = usize::from(head[HEAD_LEN - 1]).min(MAX_STEPS);
        let (steps, ram) = rest.split_at_checked(3 * steps)?;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).expect("64 KiB can be mapped");
        memory.write_slice(&ram[..ram.len().min(RAM)], GuestAddress(0)).expect("it fits");
        let mut placed = head[1..HEAD_LEN - 1].chunks_exact(QUEUE_LEN);
        let queue = |size| {
            let mut queue = Queue::new(size).expect("a power of two");
            if let Some(place) = placed.next() {
                let address = |at| Some(u32::from(word(place, at)) << 4);
                queue.set_size((1u16 << (place[0] & 7)).min(size));
                queue.set_event_idx(place[0] & 0x80 != 0);
                queue.set_desc_table_address(address(1), None);
                queue.set_avail_ring_address(address(3), None);
                queue.set_used_ring_address(address(5), None);
                queue.set_ready(true);
            }
            queue
        };
        let queues = device.queue_sizes().into_iter().map(queue).collect();
        let features = u64::from(head[0]) & device.features();
        let driver = Driver { memory, queues, features, interrupt: Box::new(Nobody) };
        Some(Script { driver, steps: steps.as_chunks().0 })
    }

    /// Does what a driver and a transport do, but for what only a device's own kind has.
    fn step(&mut self, device: &mut dyn VirtioDevice, [step, low, high]: [u8; 3]) -> Result<(), Broken> {
        match step {
            0 => device.queue_ready(&mut self.driver, low.into()),
            1 => (0..TURNS).try_for_each(|_| self.turn(device)),
            2 => {
                // The guest goes on while its device works.
                let place = GuestAddress(u64::from(low) << 8 | u64::from(high));
                let byte: u8 = self.driver.memory.read_obj(place).expect("in RAM");
                self.driver.memory.write_obj(byte.wrapping_add(1), place).expect("in RAM");
                Ok(())
            }
            3 => {
                device.write_config(low.into(), &[high, 0, 0, 0]);
                device.read_config(usize::from(low) << 56, &mut [0; 8]);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// What a thread does that watches its descriptors.
    fn turn(&mut self, device: &mut dyn VirtioDevice) -> Result<(), Broken> {
        let ready =
            device.watches().into_iter().filter(|watch| oslib::stream::is_readable(watch.fd).unwrap_or(true));
        let tokens: Vec<_> = ready.map(|watch| watch.token).collect();
        tokens.into_iter().try_for_each(|token| device.fd_ready(&mut self.driver, token))
    }

    /// Moves the device to `next`, whose state is the same afterwards.
    fn update(&mut self, device: &mut dyn VirtioDevice, next: &mut dyn VirtioDevice) -> Result<(), Broken> {
        device.drain(&mut self.driver)?;
        let saved = |device: &mut dyn VirtioDevice| {
            let mut writer = FrameWriter::default();
            let persistent = device.persistent().expect("it can be saved");
            persistent.save(&mut writer, 0).expect("what is, can be told");
            writer.finish(crate::EPOCH)
        };
        let state = saved(device);
        let mut frame = Frame::parse(&state).expect("what was just written can be read");
        let loaded = next.persistent().expect("it can be loaded").load(&mut frame, 0);
        loaded.expect("what was just saved is loaded");
        assert_eq!(saved(next), state);
        next.resume();
        Ok(())
    }
}

fn console(ends: &[HostEnd]) -> Console {
    let port = |(host, number): (&HostEnd, u32)| PortConfig {
        number,
        name: Some("port".into()),
        sink: Box::new(Nobody),
        host: host.clone(),
    };
    Console::new(4, ends.iter().zip(0..).map(port).collect()).expect("ports that can be")
}

fn host_ends() -> Vec<HostEnd> {
    (0..2).map(|_| HostEnd::new().expect("there are descriptors")).collect()
}

/// A console with two ports. Tells whether its rings were good to the end.
pub fn virtio_console(data: &[u8]) -> bool {
    let mut ends = host_ends();
    let mut device = console(&ends);
    let Some(mut script) = Script::parse(data, &device) else { return false };
    script
        .steps
        .iter()
        .try_for_each(|&[step, low, high]| {
            let end = &ends[usize::from(low & 1)];
            match step {
                0x10 => drop(end.put(&vec![high; usize::from(high) << 8])),
                0x11 => end.set_connected(high & 1 != 0),
                0x12 => end.set_size((high.into(), low.into())),
                0x13 => device.reset(),
                0x14 => {
                    let next_ends = host_ends();
                    let mut next = console(&next_ends);
                    script.update(&mut device, &mut next)?;
                    (device, ends) = (next, next_ends);
                }
                _ => return script.step(&mut device, [step, low, high]),
            }
            Ok::<_, Broken>(())
        })
        .is_ok()
}

/// A source of randomness. Tells whether its ring was good to the end.
pub fn virtio_rng(data: &[u8]) -> bool {
    let make = || Rng::new(Source::Kernel).expect("there are descriptors");
    let mut device = make();
    let Some(mut script) = Script::parse(data, &device) else { return false };
    script
        .steps
        .iter()
        .try_for_each(|&step| match step[0] {
            0x13 => {
                device.reset();
                Ok(())
            }
            0x14 => {
                let mut next = make();
                script.update(&mut device, &mut next)?;
                device = next;
                Ok(())
            }
            _ => script.step(&mut device, step),
        })
        .is_ok()
}

/// Writes an input whose queues have eight entries each.
struct Seed {
    steps: Vec<[u8; 3]>,
    ram: Vec<u8>,
    added: [u16; QUEUES],
}

impl Seed {
    const RINGS_LEN: usize = 0x200;
    const AVAILABLE: usize = 0x80;
    const USED: usize = 0xa0;
    const BUFFERS: usize = QUEUES * Self::RINGS_LEN;

    fn new() -> Seed {
        Seed { steps: Vec::new(), ram: vec![0; Self::BUFFERS], added: [0; QUEUES] }
    }

    /// Makes a buffer available that has `bytes`.
    fn add(&mut self, queue: usize, bytes: &[u8], writable: bool) {
        let (base, at) = (queue * Self::RINGS_LEN, self.added[queue]);
        let address = self.ram.len() as u64;
        self.ram.extend(bytes);
        let descriptor = [
            &address.to_le_bytes()[..],
            &(bytes.len() as u32).to_le_bytes(),
            &[if writable { 2 } else { 0 }, 0, 0, 0],
        ];
        let mut put =
            |place: usize, bytes: &[u8]| self.ram[place..place + bytes.len()].copy_from_slice(bytes);
        put(base + 16 * usize::from(at), &descriptor.concat());
        put(base + Self::AVAILABLE + 4 + 2 * usize::from(at), &at.to_le_bytes());
        self.added[queue] = at + 1;
        put(base + Self::AVAILABLE + 2, &self.added[queue].to_le_bytes());
    }

    fn finish(self, event_index: bool) -> Vec<u8> {
        let mut input = vec![0xff];
        for queue in 0..QUEUES {
            let base = queue * Self::RINGS_LEN;
            input.push(3 | if event_index { 0x80 } else { 0 });
            for place in [base, base + Self::AVAILABLE, base + Self::USED] {
                input.extend(((place >> 4) as u16).to_le_bytes());
            }
        }
        input.push(self.steps.len() as u8);
        input.extend(self.steps.concat());
        input.extend(self.ram);
        input
    }
}

pub(crate) fn virtio_console_seeds() -> Vec<Vec<u8>> {
    [false, true]
        .map(|event_index| {
            let mut seed = Seed::new();
            for _ in 0..4 {
                seed.add(0, &[0; 40], true);
                seed.add(2, &[0; 32], true);
            }
            seed.add(1, b"what the guest writes", false);
            seed.add(3, &[0xff, 0xff, 0xff, 0xff, 0, 0, 1, 0], false);
            seed.add(3, &[0, 0, 0, 0, 3, 0, 1, 0], false);
            seed.add(3, &[0, 0, 0, 0, 6, 0, 1, 0], false);
            seed.steps = vec![[0, 3, 0], [0x10, 0, 1], [0x11, 0, 1], [1, 0, 0], [0x12, 80, 25], [0, 1, 0]];
            seed.steps.extend([[0x14, 0, 0], [1, 0, 0], [0, 0, 0], [3, 8, 33], [0x13, 0, 0]]);
            seed.finish(event_index)
        })
        .into()
}

pub(crate) fn virtio_rng_seeds() -> Vec<Vec<u8>> {
    let mut seed = Seed::new();
    for _ in 0..8 {
        seed.add(0, &[0; 64], true);
    }
    seed.steps = vec![[0, 0, 0], [1, 0, 0], [0x14, 0, 0], [2, 0, 0x82], [0x13, 0, 0]];
    vec![seed.finish(true)]
}
