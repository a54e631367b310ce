//! What monitors tell of devices: what the command line made of them. What only a running device knows is not told.

use serde_json::{Value, json};

use crate::cli::config::{Cache, DeviceConfig, DeviceKind, DriveConfig, NetdevConfig, TapConfig};

/// Vendor id of every virtio device, and the device id of virtio id 0 (virtio 1.2, 4.1.2).
const VENDOR: u32 = 0x1af4;
const FIRST_DEVICE_ID: u32 = 0x1040;

/// `query-block`.
pub(super) fn block(devices: &[DeviceConfig]) -> Value {
    let disks = devices.iter().filter_map(|device| match &device.kind {
        DeviceKind::Blk(blk) => Some(disk(device, &blk.drive)),
        _ => None,
    });
    disks.collect()
}

fn disk(device: &DeviceConfig, drive: &DriveConfig) -> Value {
    json!({
        "device": drive.id,
        "qdev": device.id,
        "type": "unknown",
        "removable": false,
        "locked": false,
        "inserted": {
            "file": drive.path.to_string_lossy(),
            "node-name": drive.id,
            "drv": "raw",
            "ro": drive.read_only,
            "encrypted": false,
            "detect_zeroes": "off",
            "cache": {
                "writeback": drive.cache != Cache::Writethrough,
                "direct": false,
                "no-flush": drive.cache == Cache::Unsafe,
            },
        },
    })
}

/// `query-pci`: the devices of the command line.
pub(super) fn pci(devices: &[DeviceConfig]) -> Value {
    if devices.is_empty() {
        return json!([]);
    }
    json!([{ "bus": 0, "devices": devices.iter().map(function).collect::<Value>() }])
}

fn function(device: &DeviceConfig) -> Value {
    // Virtio 1.2, chapter 5.
    let virtio_id = match device.kind {
        DeviceKind::Net(_) => 1,
        DeviceKind::Blk(_) => 2,
        DeviceKind::Serial(_) => 3,
        DeviceKind::Rng(_) => 4,
    };
    json!({
        "bus": 0,
        "slot": device.slot,
        "function": 0,
        "qdev_id": device.id.as_deref().unwrap_or_default(),
        "id": { "vendor": VENDOR, "device": FIRST_DEVICE_ID + virtio_id },
        "model": device.model(),
    })
}

/// What `info network` shows: each interface with what it is connected to.
pub(super) fn network(devices: &[DeviceConfig]) -> Value {
    let nets = devices.iter().filter_map(|device| match &device.kind {
        DeviceKind::Net(net) => Some(json!({
            "name": device.id.as_deref().unwrap_or(device.model()),
            "model": device.model(),
            "mac": net.mac.to_string(),
            "queues": net.queue_pairs(),
            "netdev": net.netdev.id,
            "peer": tap(&net.netdev),
        })),
        _ => None,
    });
    nets.collect()
}

fn tap(netdev: &NetdevConfig) -> String {
    let vhost = if netdev.vhost.is_some() { ",vhost=on" } else { "" };
    match &netdev.tap {
        TapConfig::Named { name, .. } => format!("type=tap,ifname={name}{vhost}"),
        TapConfig::Inherited { fds } if fds.len() == 1 => format!("type=tap,by descriptor{vhost}"),
        TapConfig::Inherited { .. } => format!("type=tap,by descriptors{vhost}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{self, Invocation};

    fn devices(args: &str) -> Vec<DeviceConfig> {
        match cli::parse(args.split(' ').map(Into::into)).unwrap() {
            Invocation::Run(config) => config.devices,
            _ => panic!("{args}"),
        }
    }

    #[test]
    fn what_the_command_line_says_is_told() {
        let devices = devices(
            "-drive file=/i,if=none,id=d,format=raw,readonly=on,cache=unsafe -device virtio-blk-pci,drive=d,id=disk0,addr=3 \
             -netdev tap,id=n,ifname=t,queues=2 -device virtio-net-pci,netdev=n -nic tap,fd=9,vhost=on",
        );
        let block = block(&devices);
        assert_eq!(block.as_array().map(Vec::len), Some(1));
        assert_eq!(block[0]["device"], "d");
        assert_eq!(block[0]["qdev"], "disk0");
        assert_eq!(block[0]["inserted"]["file"], "/i");
        assert_eq!(block[0]["inserted"]["ro"], true);
        let cache = json!({"writeback": true, "direct": false, "no-flush": true});
        assert_eq!(block[0]["inserted"]["cache"], cache);
        let pci = pci(&devices);
        let slots = pci[0]["devices"].as_array().unwrap().iter();
        let slots: Vec<_> = slots.map(|device| (&device["slot"], &device["id"]["device"])).collect();
        assert_eq!(
            slots,
            [(&json!(1), &json!(0x1041)), (&json!(2), &json!(0x1041)), (&json!(3), &json!(0x1042))]
        );
        let network = network(&devices);
        assert_eq!(network[0]["peer"], "type=tap,ifname=t");
        assert_eq!(network[0]["queues"], 2);
        assert_eq!(network[1]["peer"], "type=tap,by descriptor,vhost=on");
        assert_eq!(network[1]["mac"], "52:54:00:12:34:57");
    }

    #[test]
    fn a_machine_without_devices_has_none_to_tell_of() {
        for value in [block(&[]), pci(&[]), network(&[])] {
            assert_eq!(value, json!([]));
        }
    }
}
