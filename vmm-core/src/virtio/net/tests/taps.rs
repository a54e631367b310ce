//! The device with real taps, in a network namespace of the test's own. Needs root and /dev/net/tun.

use std::io::Read;
use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use std::sync::Arc;

use super::*;

/// Runs `test` in a network namespace of its own, or says why not.
fn in_a_namespace(name: &str, test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        if !std::path::Path::new("/dev/net/tun").exists() {
            return Some("no /dev/net/tun".to_owned());
        }
        if Command::new("ip").arg("-V").output().is_err() {
            return Some("no program 'ip'".to_owned());
        }
        if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
            return Some(format!("unshare: {errno}"));
        }
        test();
        None
    });
    if let Some(reason) = thread.join().expect("the test panicked") {
        eprintln!("SKIPPED {name}: {reason}");
    }
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

fn shares(taps: &[Tap]) -> Vec<Arc<std::os::fd::OwnedFd>> {
    taps.iter().map(|tap| Arc::new(tap.descriptor().try_clone().unwrap())).collect()
}

/// A frame with a UDP packet from 10.9.0.2 to port 7 of 10.9.0.1, without a UDP checksum.
fn udp(payload: &[u8]) -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1];
    ip[2..4].copy_from_slice(&(28 + payload.len() as u16).to_be_bytes());
    let sum: u32 = ip.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    ip[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    let len = (8 + payload.len() as u16).to_be_bytes();
    let udp = [0, 9, 0, 7, len[0], len[1], 0, 0];
    [&[0xff; 6][..], &MAC, &[8, 0], &ip, &udp, payload].concat()
}

/// Calls the device until `done` says so.
fn poll_until(net: &mut Net, guest: &mut Guest, mut done: impl FnMut(&mut Guest) -> bool) {
    let start = Instant::now();
    while !done(guest) {
        assert!(start.elapsed() < Duration::from_secs(20), "nothing comes");
        poll_once(net, &mut guest.driver);
    }
}

#[test]
fn a_guest_and_its_host_talk_over_a_tap_that_an_update_keeps() {
    in_a_namespace("a_guest_and_its_host_talk_over_a_tap_that_an_update_keeps", || {
        let mut taps = Tap::open(Some("t0"), 1).unwrap();
        let descriptors = shares(&taps);
        let mut net = Net::new(SETTINGS, std::mem::take(&mut taps));
        let mut guest = Guest::new(&[VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_GUEST_CSUM], true);
        net.activate(&mut guest.driver).unwrap();
        ip("address add 10.9.0.1/24 dev t0");
        ip("link set t0 up");
        ip("neighbour add 10.9.0.2 lladdr 52:54:00:12:34:56 dev t0");
        let host = UdpSocket::bind("10.9.0.1:7").unwrap();
        host.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut monitor =
            Command::new("ip").args(["monitor", "link"]).stdout(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(300));

        let mut heard = [0; 64];
        for number in 0..6_u8 {
            guest.offer(TX, &[(12 + 42 + 1, Some(&framed(&udp(&[number]))))]);
            net.queue_ready(&mut guest.driver, TX).unwrap();
            guest.take(TX);
            assert_eq!(host.recv(&mut heard).unwrap(), 1);
            assert_eq!(heard[0], number);

            // An answer on its way while the device is replaced.
            net.drain(&mut guest.driver).unwrap();
            host.send_to(&[number; 300], "10.9.0.2:9").unwrap();
            let mut writer = cpr_core::frame::FrameWriter::default();
            net.save(&mut writer, 0).unwrap();
            let adopted = Tap::adopt(descriptors.clone(), Some("t0")).unwrap();
            net = Net::new(SETTINGS, adopted);
            let mut frame = cpr_core::frame::Frame::parse(&writer.finish(1)).unwrap();
            net.load(&mut frame, 0).unwrap();
            guest.move_out();
            net.resume();
            while guest.free(RX) > 0 {
                guest.offer(RX, &[(128, None)]);
            }
            net.queue_ready(&mut guest.driver, RX).unwrap();
            poll_until(&mut net, &mut guest, |guest| {
                let packets = Guest::packets(guest.interrupted(RX));
                packets.iter().any(|packet| packet.len() == 342 && packet.ends_with(&[number; 300]))
            });
        }
        monitor.kill().unwrap();
        let mut told = String::new();
        monitor.stdout.take().unwrap().read_to_string(&mut told).unwrap();
        monitor.wait().unwrap();
        assert_eq!(told, "", "the interface has changed in an update");
    });
}

#[test]
fn an_interface_that_is_deleted_is_a_cable_that_is_pulled() {
    in_a_namespace("an_interface_that_is_deleted_is_a_cable_that_is_pulled", || {
        let taps = Tap::open(None, 1).unwrap();
        let (name, descriptors) = (taps[0].name().to_owned(), shares(&taps));
        let (mut net, mut guest) = (Net::new(SETTINGS, taps), Guest::new(&[], false));
        net.activate(&mut guest.driver).unwrap();
        guest.offer(RX, &[(2000, None)]);
        net.queue_ready(&mut guest.driver, RX).unwrap();
        ip(&format!("link delete {name}"));
        assert!(poll_once(&mut net, &mut guest.driver), "the device is told");
        assert!(net.watches().is_empty(), "and told once");
        assert_eq!(guest.interrupts.config.load(Ordering::Relaxed), 1);
        assert!(!net.link_up);
        guest.offer(TX, &[(14, Some(&framed(b"xy")))]);
        net.queue_ready(&mut guest.driver, TX).unwrap();
        assert_eq!(guest.interrupted(TX).len(), 1);
        net.reset();

        let error = Tap::adopt(descriptors, Some(&name)).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(error.to_string(), "tap descriptor 0 of this network cannot be used");
        assert!(cause.starts_with("the tap has no interface: it was deleted"), "{cause}");
    });
}

#[test]
fn queues_of_a_tap_come_and_go() {
    in_a_namespace("queues_of_a_tap_come_and_go", || {
        let taps = Tap::open(Some("t0"), 3).unwrap();
        let descriptors = shares(&taps);
        let attached = || {
            let of = |fd: &Arc<std::os::fd::OwnedFd>| oslib::tap::interface(fd).unwrap().attached;
            descriptors.iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(attached(), [true, false, false]);
        let mut net = Net::new(SETTINGS, taps);
        net.activate_pairs(2).unwrap();
        assert_eq!(attached(), [true, true, false]);

        let mut net = Net::new(SETTINGS, Tap::adopt(descriptors.clone(), None).unwrap());
        assert_eq!(attached(), [true, true, false], "an update leaves them as they are");
        net.activate_pairs(3).unwrap();
        net.activate_pairs(1).unwrap();
        assert_eq!(attached(), [true, false, false]);
    });
}

#[test]
fn taps_that_do_not_fit_are_refused_by_name() {
    in_a_namespace("taps_that_do_not_fit_are_refused_by_name", || {
        let (one, other) = (Tap::open(Some("one"), 1).unwrap(), Tap::open(Some("other"), 2).unwrap());
        let owned = |taps: &[&Tap]| -> Vec<std::os::fd::OwnedFd> {
            taps.iter().map(|tap| tap.descriptor().try_clone().unwrap()).collect()
        };
        let text = |error: NetError| error.to_string();
        assert!(text(Tap::from_fds(vec![]).unwrap_err()).contains("at least one tap"));
        let error = text(Tap::from_fds(owned(&[&one[0], &other[0]])).unwrap_err());
        assert_eq!(error, "tap descriptors of one network are of two interfaces, 'one' and 'other'");
        let error = text(Tap::from_fds(owned(&[&one[0], &one[0]])).unwrap_err());
        assert!(error.contains("'one' has one queue only"), "{error}");
        let error = text(Tap::adopt(shares(&one), Some("two")).unwrap_err());
        assert!(error.contains("is on tap interface 'one', not on 'two'"), "{error}");
        Tap::adopt(shares(&one), Some("tap%d")).unwrap();

        oslib::tap::set_vnet_header_len(one[0].descriptor(), 10).unwrap();
        let error = text(Tap::adopt(shares(&one), None).unwrap_err());
        assert_eq!(
            error,
            "tap interface 'one' has a header of 10 bytes, not of 12, so somebody else has changed it"
        );
        Tap::from_fds(owned(&[&one[0]])).unwrap();
        Tap::adopt(shares(&one), None).unwrap();
    });
}
