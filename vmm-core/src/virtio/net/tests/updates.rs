//! Whatever happens between, and however often the device is replaced: no packet is lost, repeated or out of order, no kick and
//! no interrupt is missed, and at the end nobody is busy.

use std::os::unix::net::UnixDatagram;

use cpr_core::frame::{Frame, FrameWriter};
use proptest::prelude::*;

use super::*;

/// Bytes of the smallest buffer: a ring full of them holds the longest packet of the test.
const SMALLEST: usize = 32;

#[derive(Debug, Clone)]
enum Step {
    /// The network sends a packet with this many bytes.
    Arrive(usize),
    /// The network takes this many.
    Depart(usize),
    /// The driver has this many buffers more, of so many bytes.
    Refill(usize, usize),
    /// The driver sends a packet with this many bytes, in so many pieces.
    Send(usize, usize),
    /// The driver looks whether there was an interrupt.
    Look,
    /// The device is called for what it watches.
    Poll,
    /// The device rests, and goes on: as another one, or not.
    Rest { replaced: bool },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..400_usize).prop_map(Step::Arrive),
        2 => (1..6_usize).prop_map(Step::Depart),
        3 => (1..6_usize, prop_oneof![Just(SMALLEST), Just(64), Just(500)]).prop_map(|(n, len)| Step::Refill(n, len)),
        4 => (0..400_usize, 1..4_usize).prop_map(|(len, pieces)| Step::Send(len, pieces)),
        2 => Just(Step::Look),
        4 => Just(Step::Poll),
        2 => any::<bool>().prop_map(|replaced| Step::Rest { replaced }),
    ]
}

/// A device in the midst of it all.
struct Scene {
    net: Net,
    guest: Guest,
    wire: Wire,
    other: UnixDatagram,
    mergeable: bool,
    arrived: Vec<Vec<u8>>,
    received: Vec<Vec<u8>>,
    sent: Vec<Vec<u8>>,
    departed: Vec<Vec<u8>>,
}

/// A payload that no other packet has.
fn payload(number: usize, len: usize) -> Vec<u8> {
    let mut payload = (number as u32).to_le_bytes().to_vec();
    payload.extend((0..len).map(|at| (at + number) as u8));
    payload
}

impl Scene {
    fn new(mergeable: bool, event_index: bool) -> Self {
        let (wire, other) = wire();
        let features: &[u32] = if mergeable { &[VIRTIO_NET_F_MRG_RXBUF] } else { &[] };
        let (mut net, mut guest) =
            (Net::new(SETTINGS, vec![wire.clone()]), Guest::new(features, event_index));
        net.activate(&mut guest.driver).unwrap();
        wire.set.lock().unwrap().clear();
        let (arrived, received, sent, departed) = Default::default();
        Self { net, guest, wire, other, mergeable, arrived, received, sent, departed }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Arrive(len) => {
                let packet = payload(self.arrived.len(), len);
                // A full wire takes nothing: then it is as if nobody had sent.
                if self.other.send(&framed(&packet)).is_ok() {
                    self.arrived.push(packet);
                }
            }
            Step::Depart(count) => {
                let packets = std::iter::from_fn(|| receive(&self.other)).take(count);
                self.departed.extend(packets.map(|packet| packet[HEADER_LEN..].to_vec()));
            }
            Step::Refill(count, len) => {
                // A packet that does not fit into the only buffer it may have would be dropped.
                let len = if self.mergeable { len } else { 500 };
                for _ in 0..count.min(self.guest.free(RX)) {
                    self.guest.offer(RX, &[(len, None)]);
                }
                self.kick(RX);
            }
            Step::Send(len, pieces) => {
                if self.guest.free(TX) < pieces {
                    return;
                }
                let packet = payload(self.sent.len(), len);
                let framed = framed(&packet);
                let pieces: Vec<_> = framed
                    .chunks(framed.len().div_ceil(pieces))
                    .map(|piece| (piece.len(), Some(piece)))
                    .collect();
                self.guest.offer(TX, &pieces);
                self.sent.push(packet);
                self.kick(TX);
            }
            Step::Look => {
                self.received.extend(Guest::packets(self.guest.interrupted(RX)));
                self.guest.interrupted(TX);
            }
            Step::Poll => drop(poll_once(&mut self.net, &mut self.guest.driver)),
            Step::Rest { replaced } => self.rest(replaced),
        }
    }

    fn kick(&mut self, queue: usize) {
        if self.guest.has_to_kick(queue) {
            self.net.queue_ready(&mut self.guest.driver, queue).unwrap();
        }
    }

    fn rest(&mut self, replaced: bool) {
        assert_eq!(self.net.drain(&mut self.guest.driver).unwrap(), Drained::AtRest);
        assert!(self.net.watches().is_empty());
        // A late kick changes nothing.
        self.net.queue_ready(&mut self.guest.driver, RX).unwrap();
        let mut writer = FrameWriter::default();
        self.net.persistent().unwrap().save(&mut writer, 0).unwrap();
        if replaced {
            let mut frame = Frame::parse(&writer.finish(1)).unwrap();
            self.net = Net::new(SETTINGS, vec![self.wire.clone()]);
            self.net.persistent().unwrap().load(&mut frame, 0).unwrap();
            assert!(frame.remaining().is_empty() && self.net.watches().is_empty());
            self.guest.move_out();
        }
        self.net.resume();
        for queue in [RX, TX] {
            self.net.queue_ready(&mut self.guest.driver, queue).unwrap();
        }
    }

    /// Everybody goes on by the book until nothing happens any more.
    fn come_to_an_end(&mut self) {
        for _ in 0..1000 {
            let before = (self.received.len(), self.departed.len(), self.guest.free(TX), self.guest.free(RX));
            for step in
                [Step::Poll, Step::Depart(100), Step::Look, Step::Refill(SIZE.into(), 500), Step::Poll]
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
    fn nothing_is_lost_repeated_or_out_of_order(
        steps in proptest::collection::vec(step(), 0..80),
        mergeable in any::<bool>(),
        event_index in any::<bool>(),
    ) {
        let mut scene = Scene::new(mergeable, event_index);
        for step in &steps {
            scene.step(step);
        }
        scene.come_to_an_end();
        prop_assert_eq!(&scene.received, &scene.arrived);
        prop_assert_eq!(&scene.departed, &scene.sent);
        prop_assert_eq!(scene.guest.free(TX), usize::from(SIZE));
        prop_assert!(!poll_once(&mut scene.net, &mut scene.guest.driver), "somebody is busy");
        prop_assert!(scene.wire.set.lock().unwrap().is_empty(), "the wire was set anew");
    }
}

#[test]
fn another_tap_is_set_up_once_the_guest_goes_on() {
    let (wire, _other) = wire();
    let mut net = Net::new(SETTINGS, vec![wire.clone()]);
    let mut guest = Guest::new(&[VIRTIO_NET_F_GUEST_CSUM], true);
    net.activate(&mut guest.driver).unwrap();
    let mut writer = FrameWriter::default();
    net.save(&mut writer, 0).unwrap();
    let frame = writer.finish(1);
    for (adopted, expected) in [(true, &[][..]), (false, &["offloads 0x1", "attached true"][..])] {
        wire.set.lock().unwrap().clear();
        let mut net = Net::new(SETTINGS, vec![Wire { adopted, ..wire.clone() }]);
        net.load(&mut Frame::parse(&frame).unwrap(), 0).unwrap();
        assert!(wire.set.lock().unwrap().is_empty(), "not before the guest goes on");
        net.resume();
        assert_eq!(*wire.set.lock().unwrap(), expected);
    }
}
