//! The device between a driver and a network, and against those who keep no rules.

mod guest;
mod hostile;
mod taps;
mod updates;
mod vhost;

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};

use super::*;
use guest::{Guest, SIZE, Wire, framed, poll_once, wire};

const MAC: MacAddress = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const SETTINGS: Settings = Settings { mac: MAC, mtu: None };
const RX: usize = 0;
const TX: usize = 1;

/// A device with one queue pair that its driver has made ready, and the other end of its wire.
fn ready(features: &[u32], event_index: bool) -> (Net, Guest, std::os::unix::net::UnixDatagram) {
    let (wire, other) = wire();
    let (mut net, mut guest) = (Net::new(SETTINGS, vec![wire]), Guest::new(features, event_index));
    net.activate(&mut guest.driver).unwrap();
    (net, guest, other)
}

fn receive(other: &std::os::unix::net::UnixDatagram) -> Option<Vec<u8>> {
    let mut packet = vec![0; MAX_PACKET_LEN];
    let len = other.recv(&mut packet).ok()?;
    packet.truncate(len);
    Some(packet)
}

#[test]
fn a_packet_of_the_driver_arrives_with_its_header() {
    let (mut net, mut guest, other) = ready(&[], false);
    let header = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
    guest.offer(TX, &[(12, Some(&header)), (3, Some(b"abc")), (0, Some(b"")), (2, Some(b"de"))]);
    // However the driver cuts it.
    guest.offer(TX, &[(5, Some(&header[..5])), (9, Some(b"\x06\x07\x08\x09\x0a\x0b\x0cfg"))]);
    assert!(guest.has_to_kick(TX));
    net.queue_ready(&mut guest.driver, TX).unwrap();
    assert_eq!(receive(&other).unwrap(), [&header[..], b"abcde"].concat());
    assert_eq!(receive(&other).unwrap(), [&header[..], b"fg"].concat());
    assert_eq!(guest.interrupts.queues[TX].load(Ordering::Relaxed), 1, "one interrupt for both");
    assert_eq!(guest.take(TX), [b"", b""]);
    assert_eq!(net.watches().len(), 1, "only packets for the driver are waited for");
}

#[test]
fn a_packet_for_the_driver_arrives_in_one_buffer() {
    let (mut net, mut guest, other) = ready(&[], false);
    other.send(&framed(b"hello")).unwrap();
    // No buffers: nothing is read, nothing is watched, a kick is asked for.
    assert!(poll_once(&mut net, &mut guest.driver));
    assert!(net.watches().is_empty());
    guest.offer(RX, &[(10, None), (2, None), (100, None)]);
    assert!(guest.has_to_kick(RX));
    net.queue_ready(&mut guest.driver, RX).unwrap();
    let used = guest.interrupted(RX);
    assert_eq!(used[0][..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "num_buffers is 1");
    assert_eq!(Guest::packets(used), [b"hello"]);
}

#[test]
fn a_packet_too_long_for_its_buffer_is_dropped_and_the_buffer_stays() {
    let (mut net, mut guest, other) = ready(&[], false);
    guest.offer(RX, &[(20, None)]);
    for payload in [&b"much too long"[..], b"short"] {
        other.send(&framed(payload)).unwrap();
    }
    net.queue_ready(&mut guest.driver, RX).unwrap();
    assert_eq!(Guest::packets(guest.interrupted(RX)), [b"short"]);
}

#[test]
fn merged_buffers_come_all_at_once() {
    let (mut net, mut guest, other) = ready(&[VIRTIO_NET_F_MRG_RXBUF], true);
    for _ in 0..6 {
        guest.offer(RX, &[(16, None)]);
    }
    let (long, short) = (b"0123456789abcdefghijklmnopqrstuvwxyz", b"x");
    other.send(&framed(long)).unwrap();
    other.send(&framed(short)).unwrap();
    net.queue_ready(&mut guest.driver, RX).unwrap();
    let used = guest.interrupted(RX);
    assert_eq!(used.len(), 4, "48 bytes in buffers of 16, then one more");
    assert_eq!(Guest::packets(used), [&long[..], short]);
    assert_eq!(guest.driver.queues[RX].next_avail(), 4, "the others are still the driver's");
}

#[test]
fn a_packet_waits_for_buffers_and_is_not_read_twice() {
    for event_index in [false, true] {
        let (mut net, mut guest, other) = ready(&[VIRTIO_NET_F_MRG_RXBUF], event_index);
        let long = [7; 100];
        other.send(&framed(&long)).unwrap();
        other.send(&framed(b"next")).unwrap();
        guest.offer(RX, &[(16, None)]);
        assert!(guest.has_to_kick(RX));
        net.queue_ready(&mut guest.driver, RX).unwrap();
        assert!(guest.take(RX).is_empty());
        assert!(net.watches().is_empty(), "only a kick can help");
        for _ in 0..7 {
            guest.offer(RX, &[(16, None)]);
        }
        assert!(guest.has_to_kick(RX), "event index: {event_index}");
        net.queue_ready(&mut guest.driver, RX).unwrap();
        assert_eq!(Guest::packets(guest.take(RX)), [&long[..], b"next"]);
    }
}

#[test]
fn a_packet_that_no_number_of_buffers_holds_is_dropped() {
    let (mut net, mut guest, other) = ready(&[VIRTIO_NET_F_MRG_RXBUF], true);
    for _ in 0..SIZE {
        guest.offer(RX, &[(16, None)]);
    }
    other.send(&framed(&[1; 16 * SIZE as usize])).unwrap();
    other.send(&framed(b"fits")).unwrap();
    net.queue_ready(&mut guest.driver, RX).unwrap();
    assert_eq!(Guest::packets(guest.interrupted(RX)), [b"fits"]);
}

#[test]
fn a_full_network_is_waited_for() {
    let (mut net, mut guest, other) = ready(&[], true);
    let mut sent = 0_u16;
    while !net.watches().iter().any(|watch| watch.direction == Direction::Write) {
        assert!(sent < 1000, "the wire takes everything");
        guest.offer(TX, &[(14, Some(&framed(&sent.to_le_bytes())))]);
        net.queue_ready(&mut guest.driver, TX).unwrap();
        guest.take(TX);
        sent += 1;
    }
    assert!(!poll_once(&mut net, &mut guest.driver), "a full network does not keep anybody busy");
    let mut arrived = Vec::new();
    while let Some(packet) = receive(&other) {
        arrived.push(u16::from_le_bytes([packet[12], packet[13]]));
        poll_once(&mut net, &mut guest.driver);
    }
    assert_eq!(arrived, (0..sent).collect::<Vec<_>>());
    assert_eq!(net.watches().len(), 1);
    assert_eq!(guest.interrupted(TX).len(), 1);
}

#[test]
fn a_busy_direction_leaves_the_turn_to_others() {
    let (mut net, mut guest, other) = ready(&[], false);
    // A chain that the driver offers again and again, as one that refills its ring without end.
    let packet = framed(&[9; 0x10000 - HEADER_LEN]);
    let head = guest.offer(TX, &[(packet.len(), Some(&packet))]);
    for _ in 1..SIZE {
        guest.make_available(TX, head);
    }
    let mut arrived = 0;
    net.queue_ready(&mut guest.driver, TX).unwrap();
    while receive(&other).is_some() {
        arrived += 1;
    }
    assert!(arrived > 0 && arrived <= BURST_BYTES / packet.len() + 1, "{arrived} packets in one call");
    assert!(net.watches().iter().any(|watch| watch.direction == Direction::Write), "the rest is to come");
}

#[test]
fn a_network_that_ends_is_a_cable_that_is_pulled() {
    let (mut net, mut guest, _other) = ready(&[], false);
    let status = |net: &Net| {
        let mut status = [0; 2];
        net.read_config(6, &mut status);
        u16::from_le_bytes(status)
    };
    assert_eq!(status(&net), 1);
    // What a tap says whose interface was deleted, a socket cannot say; one without a peer fails otherwise.
    net.pairs[0].lose("a test");
    guest.offer(TX, &[(14, Some(&framed(b"xy")))]);
    net.queue_ready(&mut guest.driver, TX).unwrap();
    assert_eq!(guest.interrupted(TX).len(), 1, "the driver does not wait for it");
    assert_eq!((status(&net), guest.interrupts.config.load(Ordering::Relaxed)), (0, 1));
    assert!(net.watches().is_empty());
}

/// A socket that tells of what became of a packet that it sent, by an error of its next read.
#[derive(Debug)]
struct Complaining(std::net::UdpSocket);

impl Link for Complaining {
    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.0)
    }

    fn is_adopted(&self) -> bool {
        true
    }

    fn set_offloads(&self, _offloads: oslib::tap::Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_attached(&self, _attached: bool) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_packet_that_cannot_be_read_is_not_the_end_of_the_network() {
    let bind = |address| std::net::UdpSocket::bind(address).unwrap();
    let (ours, theirs) = (bind("127.0.0.1:0".to_owned()), bind("127.0.0.1:0".to_owned()));
    ours.set_nonblocking(true).unwrap();
    let (our_address, their_address) = (ours.local_addr().unwrap(), theirs.local_addr().unwrap());
    ours.connect(their_address).unwrap();
    drop(theirs);
    ours.send(b"nobody is there").unwrap();
    let theirs = bind(their_address.to_string());
    theirs.send_to(&framed(b"hello"), our_address).unwrap();
    let refused = ours.try_clone().unwrap();

    let mut net = Net::new(SETTINGS, vec![Complaining(ours)]);
    let mut guest = Guest::new(&[], false);
    net.activate(&mut guest.driver).unwrap();
    guest.offer(RX, &[(100, None)]);
    net.queue_ready(&mut guest.driver, RX).unwrap();
    assert_eq!(Guest::packets(guest.interrupted(RX)), [b"hello"]);
    assert_eq!(guest.interrupts.config.load(Ordering::Relaxed), 0);
    // The error was there, and was met.
    refused.send(b"somebody is there").unwrap();
}

#[test]
fn a_new_network_is_a_cable_that_is_plugged_in() {
    let (mut old, mut guest, _other) = ready(&[], false);
    old.pairs[0].lose("a test");
    old.queue_ready(&mut guest.driver, TX).unwrap();
    assert!(!old.link_up);
    let mut writer = cpr_core::frame::FrameWriter::default();
    old.drain(&mut guest.driver).unwrap();
    old.persistent().unwrap().save(&mut writer, 0).unwrap();
    let (wire, _other) = wire();
    let mut new = Net::new(SETTINGS, vec![wire]);
    let mut frame = cpr_core::frame::Frame::parse(&writer.finish(1)).unwrap();
    new.persistent().unwrap().load(&mut frame, 0).unwrap();
    new.resume();
    guest.interrupts.config.store(0, Ordering::Relaxed);
    new.queue_ready(&mut guest.driver, TX).unwrap();
    assert!(new.link_up);
    assert_eq!(guest.interrupts.config.load(Ordering::Relaxed), 1);
    new.queue_ready(&mut guest.driver, TX).unwrap();
    assert_eq!(guest.interrupts.config.load(Ordering::Relaxed), 1, "told once");
}

#[test]
fn the_driver_reads_what_the_device_is() {
    let wires = vec![wire().0, wire().0];
    let mut net = Net::new(Settings { mac: MAC, mtu: Some(9000) }, wires);
    let mut config = [0xff; 14];
    net.read_config(0, &mut config);
    assert_eq!(config, [0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0, 2, 0, 0x28, 0x23, 0, 0]);
    net.read_config(usize::MAX, &mut config);
    assert_eq!(config, [0; 14]);
    let has = |net: &Net, feature: u32| net.features() & (1 << feature) != 0;
    assert!(has(&net, VIRTIO_NET_F_MQ) && has(&net, VIRTIO_NET_F_MTU));
    assert_eq!(net.queue_sizes(), [256, 256, 256, 256, 64]);
    assert_eq!(net.class().virtio_id, 1);
    net = Net::new(SETTINGS, vec![wire().0]);
    assert!(!has(&net, VIRTIO_NET_F_MQ) && !has(&net, VIRTIO_NET_F_MTU));
}

#[test]
fn a_driver_of_the_first_generation_is_refused() {
    let (mut net, mut guest, _other) = ready(&[], false);
    guest.driver.features = 0;
    let error = net.activate(&mut guest.driver).unwrap_err();
    assert!(error.to_string().contains("VIRTIO_F_VERSION_1"));
}

/// A device with two queue pairs, and a driver that controls them.
fn controlled(features: &[u32]) -> (Net, Guest, Wire) {
    let first = wire().0;
    let mut net = Net::new(SETTINGS, vec![first.clone(), Wire { set: first.set.clone(), ..wire().0 }]);
    let mut guest = Guest::new(&[&[VIRTIO_NET_F_CTRL_VQ], features].concat(), true);
    net.activate(&mut guest.driver).unwrap();
    first.set.lock().unwrap().clear();
    (net, guest, first)
}

const OK: Option<u8> = Some(0);
const REFUSED: Option<u8> = Some(1);

#[test]
fn commands_are_answered() {
    let features = [VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_VLAN];
    let (mut net, mut guest, _wire) = controlled(&features);
    let mut command = |bytes: &[u8]| guest.command(&mut net, 2, bytes);
    assert_eq!(command(&[0, 0, 1]), OK, "promiscuous");
    assert_eq!(command(&[0, 2, 1]), REFUSED, "needs a feature more");
    assert_eq!(command(&[0, 0]), REFUSED, "too short");
    assert_eq!(command(&[1, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0]), OK, "one unicast address");
    assert_eq!(
        command(&[1, 0, 2, 0, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0]),
        REFUSED,
        "two, but for one's room"
    );
    assert_eq!(command(&[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]), REFUSED, "a very long table");
    assert_eq!(command(&[2, 0, 0xff, 0x0f]), OK, "VLAN 4095");
    assert_eq!(command(&[2, 1, 0, 0x10]), REFUSED, "VLAN 4096");
    assert_eq!(command(&[1, 1, 2, 0, 0, 0, 0, 1]), OK, "another address");
    assert_eq!(command(&[1, 1, 2, 0, 0, 0, 0]), REFUSED);
    assert_eq!(command(&[77, 0, 1]), REFUSED, "no such class");
    let mut mac = [0; 6];
    net.read_config(0, &mut mac);
    assert_eq!(mac, [2, 0, 0, 0, 0, 1]);
    net.reset();
    net.read_config(0, &mut mac);
    assert_eq!(mac, MAC, "a reset brings the first address back");
}

#[test]
fn a_command_without_room_for_an_answer_does_nothing() {
    let (mut net, mut guest, _wire) = controlled(&[VIRTIO_NET_F_CTRL_MAC_ADDR]);
    guest.offer(2, &[(8, Some(&[1, 1, 2, 0, 0, 0, 0, 1]))]);
    net.queue_ready(&mut guest.driver, 2).unwrap();
    assert_eq!(guest.take(2), [b""]);
    assert_eq!(net.mac, MAC);
}

#[test]
fn queue_pairs_are_used_as_the_driver_says() {
    let (mut net, mut guest, wire) = controlled(&[VIRTIO_NET_F_MQ]);
    // Before it says so, the second pair is left alone.
    guest.offer(3, &[(14, Some(&framed(b"xy")))]);
    net.queue_ready(&mut guest.driver, 3).unwrap();
    assert_eq!(guest.take(3).len(), 0);
    for refused in [0, 3, 0x8000_u16] {
        assert_eq!(guest.command(&mut net, 4, &[&[4, 0], &refused.to_le_bytes()[..]].concat()), REFUSED);
    }
    assert!(wire.set.lock().unwrap().is_empty());
    assert_eq!(guest.command(&mut net, 4, &[4, 0, 2, 0]), OK);
    assert_eq!(*wire.set.lock().unwrap(), ["attached true", "attached true"]);
    // What was there is sent although nobody kicks again.
    while poll_once(&mut net, &mut guest.driver) && guest.free(3) < SIZE.into() {
        guest.interrupted(3);
    }
    assert_eq!(guest.free(3), usize::from(SIZE));
    assert_eq!(guest.command(&mut net, 4, &[4, 0, 1, 0]), OK);
    assert_eq!(wire.set.lock().unwrap()[2..], ["attached true", "attached false"]);
}

#[test]
fn the_tap_learns_what_the_driver_can_receive() {
    let agreed = [VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4];
    let (mut net, mut guest, wire) = controlled(&agreed);
    let last = || wire.set.lock().unwrap().pop();
    net.activate(&mut guest.driver).unwrap();
    assert_eq!(last().unwrap(), "offloads 0x3");
    let mut command =
        |offloads: u64| guest.command(&mut net, 2, &[&[5, 0], &offloads.to_le_bytes()[..]].concat());
    assert_eq!(command(1 << VIRTIO_NET_F_GUEST_CSUM), OK);
    assert_eq!(last().unwrap(), "offloads 0x1");
    assert_eq!(command(1 << 8), REFUSED, "was not agreed on");
    assert_eq!(command(0), OK);
    assert_eq!(last().unwrap(), "offloads 0x0");
}
