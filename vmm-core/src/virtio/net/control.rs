//! Commands of the driver, by the control queue (virtio 1.2, 5.1.6.5).
//!
//! Filters are accepted and not kept: they are best effort, and a tap of a guest's own gets little that is not for it.

use std::io::{Read, Write};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI,
    VIRTIO_NET_CTRL_RX_NOBCAST, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD,
    VIRTIO_NET_CTRL_VLAN_DEL, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use super::ring::{ask_for_kick, ignore_kicks, next_chain};
use super::{MacAddress, Net, features};
use crate::guest_log::warn_of_guest;
use crate::virtio::{Broken, Driver};

/// The longest command that is read. Tables of thousands of addresses are shorter.
const MAX_COMMAND_LEN: u64 = 64 << 10;
/// The most commands that are taken in one call. Drivers wait for the answer to each.
const MAX_COMMANDS: usize = 1024;

impl Net {
    /// Answers the commands in the control queue.
    pub(super) fn control(&mut self, driver: &mut Driver, queue: usize) -> Result<(), Broken> {
        let memory = driver.memory.clone();
        ignore_kicks(driver, queue)?;
        let mut given_back = false;
        for _ in 0..MAX_COMMANDS {
            let Some(chain) = next_chain(driver, &memory, queue)? else {
                if ask_for_kick(driver, queue)? {
                    ignore_kicks(driver, queue)?;
                    continue;
                }
                return if given_back { driver.signal(queue) } else { Ok(()) };
            };
            let head = chain.head_index();
            let written = self.answer(driver, chain, &memory);
            // Other pairs may take part now.
            self.update_kernel(driver)?;
            driver.give_back(queue, head, written)?;
            given_back = true;
        }
        Err(Broken::queue(queue, "commands come without end"))
    }

    /// Executes one command and says how many bytes the answer has. Without room for an answer nothing is done.
    fn answer(
        &mut self,
        driver: &mut Driver,
        chain: DescriptorChain<&GuestMemoryMmap>,
        memory: &GuestMemoryMmap,
    ) -> u32 {
        let (Ok(reader), Ok(mut writer)) = (chain.clone().reader(memory), chain.writer(memory)) else {
            return 0;
        };
        if writer.available_bytes() == 0 {
            return 0;
        }
        let mut command = Vec::new();
        let read = reader.take(MAX_COMMAND_LEN).read_to_end(&mut command);
        let done = read.is_ok() && self.execute(driver, &command).is_some();
        let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        writer.write(&[answer as u8]).map_or(0, |count| count as u32)
    }

    /// None: this is no command, or it cannot be done.
    fn execute(&mut self, driver: &mut Driver, command: &[u8]) -> Option<()> {
        let ([class, command], data) = command.split_first_chunk()?;
        let command = u32::from(*command);
        let agreed = |feature| driver.has(feature).then_some(());
        match (u32::from(*class), command) {
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC..=VIRTIO_NET_CTRL_RX_NOBCAST) => {
                let extra = command > VIRTIO_NET_CTRL_RX_ALLMULTI;
                agreed(if extra { VIRTIO_NET_F_CTRL_RX_EXTRA } else { VIRTIO_NET_F_CTRL_RX })?;
                (data.len() == 1).then_some(())
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
                agreed(VIRTIO_NET_F_CTRL_RX)?;
                address_tables(data)
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
                agreed(VIRTIO_NET_F_CTRL_MAC_ADDR)?;
                self.mac = data.try_into().ok()?;
                Some(())
            }
            (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD | VIRTIO_NET_CTRL_VLAN_DEL) => {
                agreed(VIRTIO_NET_F_CTRL_VLAN)?;
                (u16::from_le_bytes(data.try_into().ok()?) < 4096).then_some(())
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                agreed(VIRTIO_NET_F_MQ)?;
                self.use_pairs(u16::from_le_bytes(data.try_into().ok()?))
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                agreed(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)?;
                self.receive_offloads(driver, u64::from_le_bytes(data.try_into().ok()?))
            }
            _ => None,
        }
    }

    fn use_pairs(&mut self, count: u16) -> Option<()> {
        let count = usize::from(count);
        if !(1..=self.pairs.len()).contains(&count) {
            return None;
        }
        let before = self.active_pairs;
        self.activate_pairs(count).inspect_err(|error| warn_of_guest!(%error, "queues of a network")).ok()?;
        // What the driver has put there meanwhile was left alone.
        for pair in self.pairs[..count].iter_mut().skip(before) {
            (pair.receiving, pair.sending) = (true, true);
        }
        Some(())
    }

    fn receive_offloads(&mut self, driver: &Driver, offloads: u64) -> Option<()> {
        if offloads & !features::guest_offloads(driver.features) != 0 {
            return None;
        }
        self.set_offloads(offloads).inspect_err(|error| warn_of_guest!(%error, "offloads of a network")).ok()
    }
}

/// Two tables of addresses, each after the number of its entries: unicast, then multicast.
fn address_tables(mut data: &[u8]) -> Option<()> {
    for _ in 0..2 {
        let (count, rest) = data.split_first_chunk()?;
        let len = (u32::from_le_bytes(*count) as usize).checked_mul(size_of::<MacAddress>())?;
        data = rest.get(len..)?;
    }
    data.is_empty().then_some(())
}
