//! The kernel in place of the device, for a while or for good: whatever happens between, however often the device is replaced,
//! and whoever serves the queues then, no packet is lost, repeated or out of order.
//!
//! `/dev/vhost-net` is played by a type that keeps its rules: it has an owner, takes from a queue where it is told to begin,
//! appends to what was used where guest memory says, and asks for interrupts by an eventfd.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Mutex, MutexGuard};

use cpr_core::frame::{Frame, FrameWriter};
use nix::sys::socket::{MsgFlags, recv};
use oslib::vhost::{QUEUES, Ring, VhostError};
use proptest::prelude::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueOwnedT};
use vm_memory::GuestMemoryMmap;

use super::*;

/// An open file, as several processes may have it.
#[derive(Debug, Clone)]
struct Kernel(Arc<Mutex<OpenFile>>);

#[derive(Debug)]
struct OpenFile {
    wire: Wire,
    memory: Option<GuestMemoryMmap>,
    features: u64,
    rings: [Option<Served>; QUEUES],
    /// How often it was claimed.
    claims: usize,
    refuses: bool,
}

/// A queue that it serves.
#[derive(Debug)]
struct Served {
    queue: Queue,
    call: EventFd,
    error: EventFd,
}

impl Accelerator for Kernel {
    fn claim(&mut self, memory: &GuestMemoryMmap) -> Result<(), VhostError> {
        let mut file = self.lock();
        if file.refuses || file.memory.is_some() {
            return Err(VhostError::InUse);
        }
        file.memory = Some(memory.clone());
        file.claims += 1;
        Ok(())
    }

    fn is_claimed(&self) -> bool {
        self.lock().memory.is_some()
    }

    fn release(&mut self) -> Result<(), VhostError> {
        let mut file = self.lock();
        (file.memory, file.features, file.rings) = (None, 0, [None, None]);
        Ok(())
    }

    fn agree(&mut self, features: u64) -> Result<(), VhostError> {
        self.lock().features = features;
        Ok(())
    }

    fn start(&mut self, index: usize, ring: &Ring<'_>) -> Result<(), VhostError> {
        let mut file = self.lock();
        assert!(file.rings[index].is_none(), "it serves queue {index} already");
        assert!(file.features & 1 << VIRTIO_F_VERSION_1 != 0, "nothing was agreed on");
        let memory = file.memory.clone().expect("an owner");
        let mut queue = Queue::new(ring.size).unwrap();
        queue.try_set_desc_table_address(ring.descriptors).unwrap();
        queue.try_set_avail_ring_address(ring.available).unwrap();
        queue.try_set_used_ring_address(ring.used).unwrap();
        queue.set_event_idx(file.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        queue.set_ready(true);
        queue.set_next_avail(ring.next_available);
        queue.set_next_used(queue.used_idx(&memory, Ordering::Relaxed).unwrap().0);
        let [call, error] = [ring.call, ring.error].map(|bell| bell.try_clone().unwrap());
        file.rings[index] = Some(Served { queue, call, error });
        Ok(())
    }

    fn stop(&mut self, index: usize) -> Result<u16, VhostError> {
        Ok(self.lock().rings[index].take().expect("a queue that is served").queue.next_avail())
    }
}

impl Kernel {
    fn new(wire: &Wire) -> Self {
        let (memory, features, rings, claims, refuses) = Default::default();
        let wire = wire.clone();
        Self(Arc::new(Mutex::new(OpenFile { wire, memory, features, rings, claims, refuses })))
    }

    fn lock(&self) -> MutexGuard<'_, OpenFile> {
        self.0.lock().unwrap()
    }

    /// Its thread has a turn with each queue.
    fn work(&self) {
        let OpenFile { wire, memory, features, rings, .. } = &mut *self.lock();
        let Some(memory) = memory else { return };
        let [receive, send] = rings;
        if let Some(ring) = receive {
            let mergeable = *features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
            while ring.receive(wire, memory, mergeable) {}
            ring.call(memory);
        }
        if let Some(ring) = send {
            while ring.send(wire, memory) {}
            ring.call(memory);
        }
    }
}

impl Served {
    fn call(&mut self, memory: &GuestMemoryMmap) {
        if self.queue.needs_notification(memory).unwrap() {
            self.call.signal().unwrap();
        }
    }

    /// Reads a packet if there is one, and room for it.
    fn receive(&mut self, wire: &Wire, memory: &GuestMemoryMmap, mergeable: bool) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC;
        let Ok(len) = recv(wire.socket.as_raw_fd(), &mut [], flags) else { return false };
        let (before, mut chains, mut room) = (self.queue.next_avail(), Vec::new(), 0);
        while room < len && (mergeable || chains.is_empty()) {
            let Some(chain) = self.queue.pop_descriptor_chain(memory) else {
                self.queue.set_next_avail(before);
                self.queue.enable_notification(memory).unwrap();
                return false;
            };
            room += chain.clone().writer(memory).unwrap().available_bytes();
            chains.push(chain);
        }
        let mut packet = vec![0; len];
        wire.socket.recv(&mut packet).unwrap();
        packet[10..12].copy_from_slice(&(chains.len() as u16).to_le_bytes());
        let mut left = &packet[..];
        for chain in chains {
            let head = chain.head_index();
            let mut writer = chain.writer(memory).unwrap();
            let written = left.len().min(writer.available_bytes());
            writer.write_all(&left[..written]).unwrap();
            left = &left[written..];
            self.queue.add_used(memory, head, written as u32).unwrap();
        }
        true
    }

    /// Sends a packet if there is one, and the network takes it.
    fn send(&mut self, wire: &Wire, memory: &GuestMemoryMmap) -> bool {
        let Some(chain) = self.queue.pop_descriptor_chain(memory) else {
            return self.queue.enable_notification(memory).unwrap();
        };
        let head = chain.head_index();
        let mut packet = Vec::new();
        chain.reader(memory).unwrap().read_to_end(&mut packet).unwrap();
        if wire.socket.send(&packet).is_err() {
            self.queue.go_to_previous_position();
            return false;
        }
        self.queue.add_used(memory, head, 0).unwrap();
        true
    }
}

/// The doorbells of three queues.
fn doorbells() -> Arc<[EventFd]> {
    (0..3).map(|_| EventFd::new().unwrap()).collect()
}

/// A device with one pair, which this kernel serves if it is given.
fn device(wire: &Wire, kernel: Option<(&Kernel, bool)>) -> Net {
    let mut net = Net::new(SETTINGS, vec![wire.clone()]);
    if let Some((kernel, handed_over)) = kernel {
        net = net.accelerate(vec![kernel.clone()], handed_over).unwrap();
    }
    net.hear_doorbells(&doorbells());
    net
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Device,
    /// A kernel whose open file each process has for itself.
    OwnKernel,
    /// One that is handed over.
    PassedKernel,
}

#[derive(Debug, Clone)]
enum Step {
    /// The network sends a packet with this many bytes.
    Arrive(usize),
    /// The network takes this many.
    Depart(usize),
    /// The driver has this many buffers more, of so many bytes.
    Refill(usize, usize),
    /// The driver sends a packet with this many bytes.
    Send(usize),
    /// The driver looks whether there was an interrupt.
    Look,
    /// Device and kernel do what there is to do.
    Poll,
    /// The device rests, and goes on in the same process or, having left that, in another one.
    Rest { left: bool },
    /// Another one takes its place.
    Replace(By),
}

fn by() -> impl Strategy<Value = By> {
    prop_oneof![Just(By::Device), Just(By::OwnKernel), Just(By::PassedKernel)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..400_usize).prop_map(Step::Arrive),
        2 => (1..6_usize).prop_map(Step::Depart),
        3 => (1..6_usize, prop_oneof![Just(32), Just(64), Just(500)]).prop_map(|(n, len)| Step::Refill(n, len)),
        4 => (0..400_usize).prop_map(Step::Send),
        2 => Just(Step::Look),
        4 => Just(Step::Poll),
        1 => any::<bool>().prop_map(|left| Step::Rest { left }),
        2 => by().prop_map(Step::Replace),
    ]
}

struct Scene {
    net: Net,
    guest: Guest,
    wire: Wire,
    other: UnixDatagram,
    kernel: Kernel,
    passed: Kernel,
    mergeable: bool,
    arrived: Vec<Vec<u8>>,
    received: Vec<Vec<u8>>,
    sent: Vec<Vec<u8>>,
    departed: Vec<Vec<u8>>,
}

fn payload(number: usize, len: usize) -> Vec<u8> {
    let mut payload = (number as u32).to_le_bytes().to_vec();
    payload.extend((0..len).map(|at| (at + number) as u8));
    payload
}

impl Scene {
    fn new(by: By, mergeable: bool, event_index: bool) -> Self {
        let (wire, other) = wire();
        let mut features = vec![];
        features.extend(mergeable.then_some(VIRTIO_NET_F_MRG_RXBUF));
        features.extend(event_index.then_some(VIRTIO_RING_F_EVENT_IDX));
        let (kernel, passed) = (Kernel::new(&wire), Kernel::new(&wire));
        let (arrived, received, sent, departed) = Default::default();
        let guest = Guest::new(&features, event_index);
        let net = device(&wire, None);
        let mut scene =
            Self { net, guest, wire, other, kernel, passed, mergeable, arrived, received, sent, departed };
        scene.net = scene.make(by);
        scene.net.activate(&mut scene.guest.driver).unwrap();
        scene
    }

    fn make(&mut self, by: By) -> Net {
        self.kernel = Kernel::new(&self.wire);
        match by {
            By::Device => device(&self.wire, None),
            By::OwnKernel => device(&self.wire, Some((&self.kernel, false))),
            By::PassedKernel => device(&self.wire, Some((&self.passed, true))),
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Arrive(len) => {
                let packet = payload(self.arrived.len(), len);
                if self.other.send(&framed(&packet)).is_ok() {
                    self.arrived.push(packet);
                }
            }
            Step::Depart(count) => {
                let packets = std::iter::from_fn(|| receive(&self.other)).take(count);
                self.departed.extend(packets.map(|packet| packet[HEADER_LEN..].to_vec()));
            }
            Step::Refill(count, len) => {
                let len = if self.mergeable { len } else { 500 };
                for _ in 0..count.min(self.guest.free(RX)) {
                    self.guest.offer(RX, &[(len, None)]);
                }
                self.kick(RX);
            }
            Step::Send(len) if self.guest.free(TX) > 0 => {
                let packet = payload(self.sent.len(), len);
                let framed = framed(&packet);
                self.guest.offer(TX, &[(framed.len(), Some(&framed))]);
                self.sent.push(packet);
                self.kick(TX);
            }
            Step::Send(_) => {}
            Step::Look => {
                self.received.extend(Guest::packets(self.guest.interrupted(RX)));
                self.guest.interrupted(TX);
            }
            Step::Poll => {
                self.kernel.work();
                self.passed.work();
                poll_once(&mut self.net, &mut self.guest.driver);
            }
            Step::Rest { left } => {
                self.rest();
                if left {
                    self.net.leave_process();
                    assert!(!self.kernel.is_claimed(), "its thread would end with the process");
                }
                self.go_on();
            }
            Step::Replace(by) => self.replace(by),
        }
    }

    fn kick(&mut self, queue: usize) {
        if !self.guest.has_to_kick(queue) {
            return;
        }
        match self.net.served_elsewhere().contains(&queue) {
            true => [&self.kernel, &self.passed].into_iter().for_each(Kernel::work),
            false => self.net.queue_ready(&mut self.guest.driver, queue).unwrap(),
        }
    }

    fn rest(&mut self) {
        assert_eq!(self.net.drain(&mut self.guest.driver).unwrap(), Drained::AtRest);
        assert!(self.net.watches().is_empty() && self.net.served_elsewhere().is_empty());
        for kernel in [&self.kernel, &self.passed] {
            assert!(kernel.lock().rings.iter().all(Option::is_none), "a queue is still being served");
        }
        assert!(!self.passed.is_claimed(), "the next process could not claim it");
        // A late kick changes nothing.
        self.net.queue_ready(&mut self.guest.driver, RX).unwrap();
        assert!(self.net.served_elsewhere().is_empty());
    }

    fn go_on(&mut self) {
        self.net.resume();
        for queue in [RX, TX] {
            self.net.queue_ready(&mut self.guest.driver, queue).unwrap();
        }
    }

    fn replace(&mut self, by: By) {
        // What the driver has not looked at yet was called for in time.
        self.rest();
        let mut writer = FrameWriter::default();
        self.net.persistent().unwrap().save(&mut writer, 0).unwrap();
        let mut frame = Frame::parse(&writer.finish(1)).unwrap();
        self.net = self.make(by);
        self.net.persistent().unwrap().load(&mut frame, 0).unwrap();
        self.guest.move_out();
        assert_eq!((self.kernel.lock().claims, self.passed.is_claimed()), (0, false), "the guest may run");
        self.go_on();
    }

    fn come_to_an_end(&mut self) {
        for _ in 0..1000 {
            let before = (self.received.len(), self.departed.len(), self.guest.free(TX), self.guest.free(RX));
            for step in
                [Step::Poll, Step::Depart(100), Step::Poll, Step::Look, Step::Refill(SIZE.into(), 500)]
            {
                self.step(&step);
            }
            let after = (self.received.len(), self.departed.len(), self.guest.free(TX), self.guest.free(RX));
            if before == after {
                return;
            }
        }
        panic!("it does not come to an end");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_repeated_or_out_of_order_whoever_serves(
        steps in proptest::collection::vec(step(), 0..80),
        first in by(),
        mergeable in any::<bool>(),
        event_index in any::<bool>(),
    ) {
        let mut scene = Scene::new(first, mergeable, event_index);
        for step in &steps {
            scene.step(step);
        }
        scene.come_to_an_end();
        prop_assert_eq!(&scene.received, &scene.arrived);
        prop_assert_eq!(&scene.departed, &scene.sent);
        prop_assert_eq!(scene.guest.free(TX), usize::from(SIZE));
    }
}

/// A device that a kernel serves from the start, with what is behind it.
fn served() -> (Net, Guest, UnixDatagram, Kernel) {
    let (wire, other) = wire();
    let kernel = Kernel::new(&wire);
    let mut net = device(&wire, Some((&kernel, false)));
    let mut guest = Guest::new(&[], false);
    net.activate(&mut guest.driver).unwrap();
    (net, guest, other, kernel)
}

#[test]
fn the_kernel_serves_both_queues_from_the_start() {
    let (mut net, mut guest, other, kernel) = served();
    assert_eq!(net.served_elsewhere(), [RX, TX]);
    guest.offer(TX, &[(14, Some(&framed(b"go")))]);
    guest.offer(RX, &[(100, None)]);
    other.send(&framed(b"come")).unwrap();
    // The device leaves all of that alone.
    for queue in [RX, TX] {
        net.queue_ready(&mut guest.driver, queue).unwrap();
    }
    assert!(!poll_once(&mut net, &mut guest.driver) && receive(&other).is_none());
    kernel.work();
    assert_eq!(receive(&other).unwrap(), framed(b"go"));
    assert!(guest.interrupted(RX).is_empty(), "the kernel's call is not yet answered");
    assert!(poll_once(&mut net, &mut guest.driver));
    assert_eq!(Guest::packets(guest.interrupted(RX)), [b"come"]);
    assert_eq!(guest.interrupted(TX), [b""]);
}

#[test]
fn an_interrupt_that_was_called_for_comes_before_the_state_is_saved() {
    let (mut net, mut guest, other, kernel) = served();
    guest.offer(RX, &[(100, None)]);
    other.send(&framed(b"x")).unwrap();
    kernel.work();
    net.drain(&mut guest.driver).unwrap();
    assert_eq!(guest.interrupts.queues[RX].load(Ordering::Relaxed), 1);
    let queue = &guest.driver.queues[RX];
    assert_eq!((queue.next_avail(), queue.next_used()), (1, 1));
}

#[test]
fn a_driver_that_goes_away_is_not_served() {
    for handed_over in [false, true] {
        let (wire, _other) = wire();
        let kernel = Kernel::new(&wire);
        let mut net = device(&wire, Some((&kernel, handed_over)));
        let mut guest = Guest::new(&[], false);
        net.activate(&mut guest.driver).unwrap();
        assert!(kernel.is_claimed());
        net.reset();
        assert!(net.served_elsewhere().is_empty() && kernel.lock().rings.iter().all(Option::is_none));
        // An update does not ask a device without a driver to rest.
        assert_eq!(kernel.is_claimed(), !handed_over);
    }
}

#[test]
fn rings_that_make_no_sense_break_the_device() {
    let (mut net, mut guest, _other, kernel) = served();
    kernel.lock().rings[TX].as_ref().unwrap().error.signal().unwrap();
    let token = net.watches().iter().find(|watch| watch.token >= ERROR).unwrap().token;
    let broken = net.fd_ready(&mut guest.driver, token).unwrap_err();
    assert!(broken.to_string().contains("the kernel cannot make sense of it"), "{broken}");
}

#[test]
fn the_device_does_what_the_kernel_refuses() {
    let (wire, other) = wire();
    let kernel = Kernel::new(&wire);
    kernel.lock().refuses = true;
    let mut net = device(&wire, Some((&kernel, true)));
    let mut guest = Guest::new(&[], false);
    guest.offer(RX, &[(100, None)]);
    net.activate(&mut guest.driver).unwrap();
    assert!(net.served_elsewhere().is_empty());
    other.send(&framed(b"x")).unwrap();
    assert!(poll_once(&mut net, &mut guest.driver));
    assert_eq!(Guest::packets(guest.interrupted(RX)), [b"x"]);
}

#[test]
fn pairs_are_served_as_they_take_part() {
    let (wire, _other) = wire();
    let kernels = [Kernel::new(&wire), Kernel::new(&wire)];
    let mut net = Net::new(SETTINGS, vec![wire.clone(), wire.clone()]);
    net = net.accelerate(kernels.to_vec(), false).unwrap();
    net.hear_doorbells(&(0..5).map(|_| EventFd::new().unwrap()).collect());
    let mut guest = Guest::new(&[VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ], false);
    net.activate(&mut guest.driver).unwrap();
    assert_eq!(net.served_elsewhere(), [0, 1]);
    for (count, expected) in [(2, &[0, 1, 2, 3][..]), (1, &[0, 1])] {
        assert_eq!(guest.command(&mut net, 4, &[4, 0, count, 0]), Some(0));
        assert_eq!(net.served_elsewhere(), expected);
        let served = kernels.iter().flat_map(|kernel| kernel.lock().rings.each_ref().map(Option::is_some));
        assert_eq!(served.filter(|served| *served).count(), expected.len());
    }
}
