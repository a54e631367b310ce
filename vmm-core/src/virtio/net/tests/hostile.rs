//! Drivers that keep no rules: a request fails, or the device does; nothing else.

use vm_memory::{Bytes, GuestAddress};

use super::guest::{NEXT, WRITE, available_ring};
use super::*;

#[test]
fn packets_that_are_none_are_dropped() {
    let (mut net, mut guest, other) = ready(&[], false);
    let limit = MAX_PACKET_LEN as u32 + 1;
    // Without memory, in no RAM, too short, for the device to write, too long, and one that ends in itself.
    for (index, (place, len, flags, next)) in [
        (0x10_0000, 0, 0, 0),
        (u64::MAX - 20, 100, 0, 0),
        (0x10_0000, 12, 0, 0),
        (0x10_0000, 100, WRITE, 0),
        (0x10_0000, limit, 0, 0),
        (0x10_0000, 0x2000, NEXT, 5),
        (0x10_0000, 16, 4, 0),
    ]
    .into_iter()
    .enumerate()
    {
        guest.describe(TX, index as u16, place, len, flags, next);
        guest.make_available(TX, index as u16);
    }
    net.queue_ready(&mut guest.driver, TX).unwrap();
    assert_eq!(guest.driver.queues[TX].next_used(), 7);
    assert_eq!(receive(&other), None);
}

#[test]
fn a_chain_of_too_many_descriptors_breaks_the_device() {
    let (mut net, mut guest, _other) = ready(&[], false);
    let table = 0x20_0000;
    for index in 0..2000_u64 {
        let at = GuestAddress(table + index * 16);
        guest.driver.memory.write_obj(0x10_0000_u64, at).unwrap();
        guest.driver.memory.write_obj(1 | u64::from(NEXT) << 32 | (index + 1) << 48, at_plus(at, 8)).unwrap();
    }
    guest.describe(TX, 0, table, 2000 * 16, 4, 0);
    guest.make_available(TX, 0);
    let error = net.queue_ready(&mut guest.driver, TX).unwrap_err();
    assert_eq!(error.to_string(), "queue 1: more than 1024 descriptors in a chain");
}

fn at_plus(at: GuestAddress, bytes: u64) -> GuestAddress {
    GuestAddress(at.0 + bytes)
}

#[test]
fn rings_that_make_no_sense_break_the_device() {
    let broken = |queue: usize, damage: &dyn Fn(&mut Guest)| {
        let (mut net, mut guest, other) = ready(&[VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_CTRL_VQ], true);
        other.send(&framed(b"x")).unwrap();
        damage(&mut guest);
        net.queue_ready(&mut guest.driver, queue).unwrap_err().to_string()
    };
    for queue in [RX, TX, 2] {
        // More than the queue has.
        let error = broken(queue, &|guest| guest.write(available_ring(queue) + 2, SIZE + 1));
        assert!(error.starts_with(&format!("queue {queue}: ")), "{error}");
        // A descriptor that does not exist.
        broken(queue, &|guest| guest.make_available(queue, SIZE));
        // Rings that are elsewhere than RAM.
        broken(queue, &|guest| guest.driver.queues[queue].set_avail_ring_address(Some(0x7fff_f000), None));
        broken(queue, &|guest| {
            guest.driver.queues[queue].set_used_ring_address(Some(0x7fff_f000), None);
            guest.offer(queue, &[(100, (queue == TX).then_some(&[0; 100]))]);
        });
    }
    // Buffers that cannot be written.
    broken(RX, &|guest| {
        guest.offer(RX, &[(4, Some(b"read"))]);
    });
    broken(RX, &|guest| {
        guest.describe(RX, 0, u64::MAX, 100, WRITE, 0);
        guest.make_available(RX, 0);
    });
}

#[test]
fn commands_without_end_break_the_device() {
    let (mut net, mut guest, _wire) = controlled(&[]);
    guest.describe(2, 0, 0x10_0000, 2, 0, 0);
    guest.make_available(2, 0);
    // Both rings in one place, and one index ahead of the other: each command that is answered makes another available, as a
    // driver on another CPU could.
    let queue = &mut guest.driver.queues[2];
    queue.set_used_ring_address(Some(available_ring(2) as u32), Some(0));
    queue.set_next_used(1);
    let error = net.queue_ready(&mut guest.driver, 2).unwrap_err();
    assert_eq!(error.to_string(), "queue 2: commands come without end");
}

#[test]
fn buffers_of_a_packet_are_given_back_together_or_not_at_all() {
    let (_net, mut guest, _other) = ready(&[VIRTIO_NET_F_MRG_RXBUF], true);
    let index = |guest: &Guest| guest.driver.queues[RX].used_idx(&guest.driver.memory, Ordering::Acquire);
    // The last one cannot be, so the driver must not see the first either.
    ring::give_back_together(&mut guest.driver, RX, &[(0, 16), (SIZE, 3)]).unwrap_err();
    assert_eq!(index(&guest).unwrap().0, 0);
    ring::give_back_together(&mut guest.driver, RX, &[(0, 16), (1, 3)]).unwrap();
}

#[test]
fn queues_that_do_not_exist_or_are_not_enabled_are_left_alone() {
    let (mut net, mut guest, _other) = ready(&[VIRTIO_NET_F_CTRL_VQ], false);
    for queue in [3, 4, 99, usize::MAX / 2] {
        net.queue_ready(&mut guest.driver, queue).unwrap();
    }
    for queue in &mut guest.driver.queues {
        queue.set_ready(false);
    }
    for queue in 0..5 {
        net.queue_ready(&mut guest.driver, queue).unwrap();
        net.fd_ready(&mut guest.driver, queue as WatchToken).unwrap();
    }
    assert!(net.watches().is_empty());
    net.fd_ready(&mut guest.driver, u32::MAX).unwrap();
}

#[test]
fn a_state_that_cannot_be_is_refused_by_field() {
    use cpr_core::frame::{Frame, FrameWriter};
    let good = NetState {
        mac: MAC,
        mtu: None,
        link_up: true,
        header_len: 12,
        active_pairs: 1,
        guest_offloads: 0,
        held: vec![Some(framed(b"x").into())],
    };
    let load = |state: NetState| {
        let mut writer = FrameWriter::default();
        writer.put_section(3, &state).unwrap();
        let mut frame = Frame::parse(&writer.finish(1)).unwrap();
        Net::new(SETTINGS, vec![wire().0]).load(&mut frame, 3).map_err(|error| error.to_string())
    };
    load(good.clone()).unwrap();
    for (state, field) in [
        (NetState { mtu: Some(1500), ..good.clone() }, "mtu"),
        (NetState { header_len: 10, ..good.clone() }, "header_len"),
        (NetState { active_pairs: 0, ..good.clone() }, "active_pairs"),
        (NetState { active_pairs: 2, ..good.clone() }, "active_pairs"),
        (NetState { guest_offloads: 1 << 40, ..good.clone() }, "guest_offloads"),
        (NetState { held: vec![], ..good.clone() }, "queue pairs"),
        (NetState { held: vec![Some(vec![0; 11].into())], ..good.clone() }, "held"),
        (NetState { held: vec![Some(vec![0; MAX_PACKET_LEN + 1].into())], ..good.clone() }, "held"),
    ] {
        let error = load(state).unwrap_err();
        assert!(error.contains(&format!("`{field}`")), "{error}");
    }
}
