//! What guest and target must agree on of each PCI device: where it is, what it is, and everything that its driver could
//! notice. It is shown before an update (`preflight`), and travels with the state.

use anyhow::bail;
use cpr_core::section::SectionType;
use serde::{Deserialize, Serialize};

use crate::cli::config::{
    BlkConfig, Cache, Config, DeviceConfig, DeviceKind, NetConfig, PortConfig, SerialConfig,
};

/// One device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DeviceShape {
    slot: u8,
    /// As `-device` names it.
    model: String,
    /// Its properties and the ids of what is behind it, in the words of the command line; in a fixed order.
    properties: Vec<(String, String)>,
}

/// Main section of a machine that has PCI devices: by slot.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DevicesSection(pub(super) Vec<DeviceShape>);

impl SectionType for DevicesSection {
    const NAME: &'static str = "cpr-vmm/devices";
    const VERSION: u32 = 1;
}

fn on_off(state: bool) -> String {
    if state { "on" } else { "off" }.into()
}

impl DeviceShape {
    /// The devices of this machine, by slot.
    pub(super) fn all_of(config: &Config) -> Vec<DeviceShape> {
        config.devices.iter().map(DeviceShape::of).collect()
    }

    fn of(device: &DeviceConfig) -> DeviceShape {
        let properties = match &device.kind {
            DeviceKind::Blk(blk) => blk_properties(blk),
            DeviceKind::Net(net) => net_properties(net),
            DeviceKind::Rng(_) => Vec::new(),
            DeviceKind::Serial(serial) => serial_properties(serial),
        };
        let properties = properties.into_iter().map(|(key, value)| (key.into(), value)).collect();
        DeviceShape { slot: device.slot, model: device.model().into(), properties }
    }

    /// Whether the guest's devices, `guest`, are those of the command line, `own`.
    ///
    /// # Errors
    /// Names the first difference.
    pub(super) fn check_all(guest: &[DeviceShape], own: &[DeviceShape]) -> anyhow::Result<()> {
        for device in guest {
            match own.iter().find(|other| other.slot == device.slot) {
                Some(other) => device.check(other)?,
                None => bail!("the guest has {}, the command line has nothing there", device.place()),
            }
        }
        match own.iter().find(|device| guest.iter().all(|other| other.slot != device.slot)) {
            Some(device) => bail!("the command line has {}, the guest has nothing there", device.place()),
            None => Ok(()),
        }
    }

    fn place(&self) -> String {
        // Hexadecimal, as in addr=.
        format!("{} at slot {:x}", self.model, self.slot)
    }

    fn check(&self, own: &DeviceShape) -> anyhow::Result<()> {
        if self.model != own.model {
            bail!("the guest has {}, the command line has {} there", self.place(), own.model);
        }
        let of = |shape: &DeviceShape, key: &str| {
            let found = shape.properties.iter().find(|(other, _)| other == key);
            found.map_or_else(|| "none".to_owned(), |(_, value)| value.clone())
        };
        for (key, _) in self.properties.iter().chain(&own.properties) {
            let (guest, own) = (of(self, key), of(own, key));
            if guest != own {
                bail!("{} has {key}={guest}, the command line says {key}={own}", self.place());
            }
        }
        Ok(())
    }
}

fn blk_properties(blk: &BlkConfig) -> Vec<(&'static str, String)> {
    vec![
        ("drive", blk.drive.id.clone()),
        ("read-only", on_off(blk.drive.read_only)),
        ("serial", blk.serial.clone().unwrap_or_default()),
        ("num-queues", blk.queues.to_string()),
        ("queue-size", blk.queue_size.to_string()),
        ("write-cache", on_off(blk.drive.cache != Cache::Writethrough)),
        ("discard", on_off(blk.discard)),
        ("write-zeroes", on_off(blk.write_zeroes)),
    ]
}

fn net_properties(net: &NetConfig) -> Vec<(&'static str, String)> {
    let offloads = &net.offloads;
    vec![
        ("netdev", net.netdev.id.clone()),
        ("mac", net.mac.to_string()),
        ("queues", net.queue_pairs().to_string()),
        ("host_mtu", net.host_mtu.map_or_else(|| "none".into(), |mtu| mtu.to_string())),
        ("mrg_rxbuf", on_off(offloads.mrg_rxbuf)),
        ("csum", on_off(offloads.csum)),
        ("guest_csum", on_off(offloads.guest_csum)),
        ("host_tso4", on_off(offloads.host_tso4)),
        ("host_tso6", on_off(offloads.host_tso6)),
        ("host_ecn", on_off(offloads.host_ecn)),
        ("host_ufo", on_off(offloads.host_ufo)),
        ("guest_tso4", on_off(offloads.guest_tso4)),
        ("guest_tso6", on_off(offloads.guest_tso6)),
        ("guest_ecn", on_off(offloads.guest_ecn)),
        ("guest_ufo", on_off(offloads.guest_ufo)),
    ]
}

fn serial_properties(serial: &SerialConfig) -> Vec<(&'static str, String)> {
    // Which chardev a port has is the host's affair.
    let port = |port: &PortConfig| match &port.name {
        Some(name) => format!("{}:{name}", port.number),
        None => port.number.to_string(),
    };
    let ports: Vec<_> = serial.ports.iter().map(port).collect();
    vec![("max_ports", serial.max_ports.to_string()), ("ports", ports.join(" "))]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{self, Invocation};

    fn shapes(args: &str) -> Vec<DeviceShape> {
        match cli::parse(args.split(' ').map(Into::into)).unwrap() {
            Invocation::Run(config) => DeviceShape::all_of(&config),
            _ => panic!("{args}"),
        }
    }

    const GUEST: &str = "-drive file=/i,if=none,id=d,format=raw -device virtio-blk-pci,drive=d,addr=1a -netdev \
                         tap,id=n,fds=3:4 -device virtio-net-pci,netdev=n -device virtio-rng-pci -chardev null,id=c \
                         -device virtio-serial-pci -device virtconsole,chardev=c,name=x";

    #[test]
    fn a_difference_is_named() {
        let guest = shapes(GUEST);
        DeviceShape::check_all(&guest, &guest).unwrap();
        for (old, new, expected) in [
            (
                "drive=d,addr=1a",
                "drive=d,addr=1a,num-queues=2",
                "virtio-blk-pci at slot 1a has num-queues=1, the command line says num-queues=2",
            ),
            (
                "drive=d,addr=1a",
                "drive=d,addr=1b",
                "the guest has virtio-blk-pci at slot 1a, the command line has nothing there",
            ),
            (
                "id=d,format",
                "readonly=on,id=d,format",
                "virtio-blk-pci at slot 1a has read-only=off, the command line says read-only=on",
            ),
            (
                "virtio-rng-pci",
                "virtio-rng-pci -device virtio-rng-pci",
                "the guest has virtio-serial-pci at slot 3, the command line has virtio-rng-pci there",
            ),
            (
                " -chardev",
                " -device virtio-rng-pci,addr=1f -chardev",
                "the command line has virtio-rng-pci at slot 1f, the guest has nothing there",
            ),
            (
                "id=d,format",
                "cache=writethrough,id=d,format",
                "virtio-blk-pci at slot 1a has write-cache=on, the command line says write-cache=off",
            ),
            ("fds=3:4", "fd=3", "virtio-net-pci at slot 1 has queues=2, the command line says queues=1"),
            (
                "netdev=n",
                "netdev=n,mac=52:54:00:00:00:01",
                "has mac=52:54:00:12:34:56, the command line says mac=52:54:00:00:00:01",
            ),
            ("netdev=n", "netdev=n,csum=off", "has csum=on, the command line says csum=off"),
            ("netdev=n", "netdev=n,host_mtu=1500", "has host_mtu=none, the command line says host_mtu=1500"),
            (
                "name=x",
                "name=y",
                "virtio-serial-pci at slot 3 has ports=0:x, the command line says ports=0:y",
            ),
        ] {
            let own = shapes(&GUEST.replacen(old, new, 1));
            let said = DeviceShape::check_all(&guest, &own).unwrap_err().to_string();
            assert!(said.contains(expected), "{new}: {said}");
        }
        // What no guest can see may change: a descriptor's number, and where the bytes of a console go.
        for (old, new) in [
            ("id=d,", "cache=unsafe,id=d,"),
            ("fds=3:4", "ifname=t,queues=2"),
            ("null,id=c", "file,id=c,path=/x"),
            ("/i", "/j"),
        ] {
            DeviceShape::check_all(&guest, &shapes(&GUEST.replacen(old, new, 1))).unwrap();
        }
    }

    #[test]
    fn an_older_or_newer_property_is_a_difference() {
        let guest = shapes(GUEST);
        let mut other = guest.clone();
        other[2].properties.push(("warp".into(), "9".into()));
        let said = DeviceShape::check_all(&other, &guest).unwrap_err().to_string();
        assert!(said.ends_with("has warp=9, the command line says warp=none"), "{said}");
        let said = DeviceShape::check_all(&guest, &other).unwrap_err().to_string();
        assert!(said.ends_with("has warp=none, the command line says warp=9"), "{said}");
    }
}
