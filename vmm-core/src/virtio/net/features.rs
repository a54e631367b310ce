//! What the device offers, and what of it becomes of the tap.

use oslib::tap::Offloads;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
};

/// What every device of this kind offers. Taps have all of it on the kernels that this program runs on, so that source and
/// target need not try it out, which would change the tap.
const ALWAYS: [u32; 19] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
];

/// Features that say what the driver can receive, and the tap's word for each.
const GUEST: [(u32, Offloads); 5] = [
    (VIRTIO_NET_F_GUEST_CSUM, Offloads::CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, Offloads::TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, Offloads::TSO6),
    (VIRTIO_NET_F_GUEST_ECN, Offloads::TSO_ECN),
    (VIRTIO_NET_F_GUEST_UFO, Offloads::UFO),
];

/// The bits of these features.
pub(super) fn bits(features: impl IntoIterator<Item = u32>) -> u64 {
    features.into_iter().fold(0, |bits, feature| bits | 1 << feature)
}

/// The features of a device, apart from those that its settings bring.
pub(super) fn always() -> u64 {
    bits(ALWAYS)
}

/// The features among `features` that say what the driver can receive.
pub(super) fn guest_offloads(features: u64) -> u64 {
    features & bits(GUEST.map(|(feature, _)| feature))
}

/// What the tap is told for them. Leaves out what makes no sense without another, as the kernel refuses all then (virtio
/// 1.2, 5.1.3.1).
pub(super) fn tap_offloads(guest_offloads: u64) -> Offloads {
    let mut offloads: Offloads = GUEST
        .into_iter()
        .filter(|(feature, _)| guest_offloads & (1 << feature) != 0)
        .map(|(_, offload)| offload)
        .collect();
    if !offloads.intersects(Offloads::TSO4 | Offloads::TSO6) {
        offloads.remove(Offloads::TSO_ECN);
    }
    if !offloads.contains(Offloads::CSUM) {
        offloads = Offloads::empty();
    }
    offloads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_alone_is_left_out() {
        let of = |features: &[u32]| tap_offloads(bits(features.iter().copied()));
        let (csum, tso4, ecn) = (VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_ECN);
        assert_eq!(of(&[csum, tso4, ecn]), Offloads::CSUM | Offloads::TSO4 | Offloads::TSO_ECN);
        assert_eq!(of(&[csum, ecn]), Offloads::CSUM);
        assert_eq!(of(&[tso4, ecn, VIRTIO_NET_F_GUEST_UFO]), Offloads::empty());
        assert_eq!(tap_offloads(u64::MAX), Offloads::all());
    }
}
