//! What of the device travels in an update.

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter};
use cpr_core::section::SectionType;
use serde::{Deserialize, Serialize};

use super::{HEADER_LEN, MAX_PACKET_LEN, MacAddress, Net, features};
use crate::state::{Blob, StateError};
use crate::virtio::{Backing, Persistent, SectionVersions};

/// The wire type of the device's section, without queues, features and status, which are the transport's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The address that the driver sees, or has set.
    pub mac: MacAddress,
    /// The size that the driver was told, in bytes.
    pub mtu: Option<u16>,
    /// Whether the driver was told that there is a network.
    pub link_up: bool,
    /// Bytes of the header before each packet, with the driver and with the tap.
    pub header_len: u8,
    /// Queue pairs in use.
    pub active_pairs: u16,
    /// What the tap was told that the driver can receive, by the bits of the virtio features.
    pub guest_offloads: u64,
    /// For each queue pair that there is, a packet with its header that has been read from the network, and that the driver had
    /// no buffers for.
    pub held: Vec<Option<Blob>>,
}

impl SectionType for NetState {
    const NAME: &'static str = "virtio-net";
    const VERSION: u32 = 1;
}

impl NetState {
    /// Checks that this can be the state of a device with `pairs` queue pairs that tells its driver `mtu`.
    fn check(&self, pairs: usize, mtu: Option<u16>) -> Result<(), StateError> {
        let value = |field, expected, found| match expected == found {
            true => Ok(()),
            false => Err(StateError::Value { field, expected, found }),
        };
        let mtu_value = |mtu: Option<u16>| mtu.map_or(0, u64::from);
        value("header_len", HEADER_LEN as u64, u64::from(self.header_len))?;
        value("mtu", mtu_value(mtu), mtu_value(self.mtu))?;
        value("queue pairs", pairs as u64, self.held.len() as u64)?;
        value("guest_offloads", features::guest_offloads(self.guest_offloads), self.guest_offloads)?;
        if !(1..=pairs).contains(&usize::from(self.active_pairs)) {
            let (field, rule) = ("active_pairs", "between 1 and the number of queue pairs");
            return Err(StateError::Size { field, rule, found: self.active_pairs.into() });
        }
        let lens = self.held.iter().flatten().map(|packet| packet.as_slice().len());
        match lens.into_iter().find(|len| !(HEADER_LEN..=MAX_PACKET_LEN).contains(len)) {
            None => Ok(()),
            Some(found) => {
                Err(StateError::Size { field: "held", rule: "the length of a packet with its header", found })
            }
        }
    }
}

impl Persistent for Net {
    fn sections(&self) -> Vec<SectionVersions> {
        vec![(NetState::NAME, NetState::VERSIONS)]
    }

    fn save(&self, main: &mut FrameWriter, instance: u32) -> Result<(), BoxError> {
        let state = NetState {
            mac: self.mac,
            mtu: self.settings.mtu,
            link_up: self.link_up,
            header_len: HEADER_LEN as u8,
            active_pairs: self.active_pairs as u16,
            guest_offloads: self.guest_offloads,
            held: self.pairs.iter().map(|pair| pair.held.clone().map(Blob::from)).collect(),
        };
        main.put_section(instance, &state)?;
        Ok(())
    }

    fn backing(&self) -> Result<Option<Backing>, BoxError> {
        Ok(self.pairs[0].link.interface()?.map(Backing::Interface))
    }

    fn load(&mut self, main: &mut Frame, instance: u32) -> Result<(), BoxError> {
        let state: NetState = main.require_section(instance)?;
        state.check(self.pairs.len(), self.settings.mtu)?;
        self.mac = state.mac;
        self.link_up = state.link_up;
        self.active_pairs = state.active_pairs.into();
        self.guest_offloads = state.guest_offloads;
        for (pair, held) in self.pairs.iter_mut().zip(state.held) {
            pair.held = held.map(|packet| packet.as_slice().to_vec());
        }
        // A tap that was kept is as the source left it. Another one, under another kernel, has to become so.
        self.unlike_state = self.pairs.iter().any(|pair| !pair.link.is_adopted());
        Ok(())
    }
}
