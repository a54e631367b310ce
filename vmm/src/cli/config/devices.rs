//! PCI devices and what is behind them on the host, with every reference resolved and every default filled in.

use std::fmt;
use std::path::PathBuf;

/// A device on the PCI bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Its id, if it was given one.
    pub id: Option<String>,
    /// Its slot on bus 0, 1 to [`LAST_SLOT`]; function 0. Every device has another one.
    pub slot: u8,
    /// What it is.
    pub kind: DeviceKind,
}

/// The last slot of a PCI bus.
pub const LAST_SLOT: u8 = 31;

/// The most queues of a block device, and the most pairs of queues of a network device.
pub const MAX_QUEUES: u16 = 64;

/// The most entries of a queue.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceKind {
    /// A disk.
    Blk(BlkConfig),
    /// A network interface.
    Net(NetConfig),
    /// A source of randomness.
    Rng(RngConfig),
    /// Consoles.
    Serial(SerialConfig),
}

impl DeviceConfig {
    /// The name of its model, as `-device` has it.
    pub fn model(&self) -> &'static str {
        match self.kind {
            DeviceKind::Blk(_) => "virtio-blk-pci",
            DeviceKind::Net(_) => "virtio-net-pci",
            DeviceKind::Rng(_) => "virtio-rng-pci",
            DeviceKind::Serial(_) => "virtio-serial-pci",
        }
    }

    /// Whether the guest can write to an image by it.
    pub fn writes_disk(&self) -> bool {
        matches!(&self.kind, DeviceKind::Blk(blk) if !blk.drive.read_only)
    }

    /// How messages call it.
    pub fn describe(&self) -> String {
        match &self.id {
            Some(id) => format!("{} '{id}'", self.model()),
            // Hexadecimal, as in addr=.
            None => format!("{} at slot {:x}", self.model(), self.slot),
        }
    }

    /// The virtio features, as bits, that it must not offer although it could.
    pub fn withheld_features(&self) -> u64 {
        let withheld = match &self.kind {
            DeviceKind::Blk(blk) => vec![(13, blk.discard), (14, blk.write_zeroes)],
            DeviceKind::Net(net) => net.offloads.features().to_vec(),
            DeviceKind::Rng(_) | DeviceKind::Serial(_) => Vec::new(),
        };
        let withheld = withheld.into_iter().filter(|(_, is_offered)| !is_offered);
        withheld.fold(0, |bits, (feature, _)| bits | 1 << feature)
    }

    /// Names and ids in the registry of the descriptors that an update must bring for it.
    pub fn registry_entries(&self) -> Vec<(String, u64)> {
        match &self.kind {
            DeviceKind::Blk(blk) => vec![(blk.drive.registry_name(), 0)],
            DeviceKind::Net(net) => {
                let name = net.netdev.registry_name();
                (0..u64::from(net.netdev.queues())).map(|queue| (name.clone(), queue)).collect()
            }
            DeviceKind::Rng(_) | DeviceKind::Serial(_) => Vec::new(),
        }
    }
}

/// A disk: `virtio-blk-pci`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlkConfig {
    /// What is on it.
    pub drive: DriveConfig,
    /// Its serial number, at most 20 bytes of ASCII.
    pub serial: Option<String>,
    /// The number of queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Entries of each queue, a power of two.
    pub queue_size: u16,
    /// The driver may discard sectors.
    pub discard: bool,
    /// The driver may have sectors zeroed.
    pub write_zeroes: bool,
}

/// An image on the host. It holds the guest's sectors and nothing else (format raw).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriveConfig {
    /// Its id: that of `-drive`, or the node name that the device gives.
    pub id: String,
    /// The image.
    pub path: PathBuf,
    /// It is never written.
    pub read_only: bool,
    /// When a write is on the disk.
    pub cache: Cache,
    /// What the guest discards is given back to the host; else it is kept.
    pub discard: bool,
    /// Other programs are kept out by locks.
    pub locking: bool,
    /// Those that write to it are not (`share-rw` of the device).
    pub share_rw: bool,
    /// How it is read and written.
    pub aio: Aio,
}

impl DriveConfig {
    /// The name of its descriptor in the registry, with id 0.
    pub fn registry_name(&self) -> String {
        format!("drive/{}", self.id)
    }
}

/// When a write is on the disk, in the words of `cache=`. All go through the host's page cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Cache {
    /// When the guest flushes; it is told of the cache.
    #[default]
    Writeback,
    /// When it is completed.
    Writethrough,
    /// At some time: a flush does nothing, and a crash of the host may lose what was flushed.
    Unsafe,
}

/// How an image is read and written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Aio {
    /// By io_uring if the host has it, else as [`Threads`](Self::Threads).
    #[default]
    IoUring,
    /// By threads.
    Threads,
}

/// A network interface: `virtio-net-pci`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// What it is connected to.
    pub netdev: NetdevConfig,
    /// Its address.
    pub mac: MacAddress,
    /// What it offers to the driver.
    pub offloads: Offloads,
    /// The largest packet that it tells the driver of, in bytes.
    pub host_mtu: Option<u16>,
}

impl NetConfig {
    /// Pairs of queues, 1 to [`MAX_QUEUES`]; with more than one the device offers VIRTIO_NET_F_MQ.
    pub fn queue_pairs(&self) -> u16 {
        self.netdev.queues()
    }
}

/// The address of a network interface: neither a group's nor zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// QEMU's default of the interface number `index`.
    pub(in crate::cli) fn default_of(index: u8) -> MacAddress {
        MacAddress([0x52, 0x54, 0x00, 0x12, 0x34, 0x56_u8.wrapping_add(index)])
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Features of a network device that move work between driver and host. Each is off if one that it needs is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offloads {
    /// The host takes packets without a checksum.
    pub csum: bool,
    /// The driver may be given such packets.
    pub guest_csum: bool,
    /// The host takes TCP over IPv4 in large pieces. The other `host_` features likewise.
    pub host_tso4: bool,
    /// Over IPv6.
    pub host_tso6: bool,
    /// With congestion notification.
    pub host_ecn: bool,
    /// UDP.
    pub host_ufo: bool,
    /// The driver may be given TCP over IPv4 in large pieces. The other `guest_` features likewise.
    pub guest_tso4: bool,
    /// Over IPv6.
    pub guest_tso6: bool,
    /// With congestion notification.
    pub guest_ecn: bool,
    /// UDP.
    pub guest_ufo: bool,
    /// A packet may be received into several buffers. (It needs no help of the host's.)
    pub mrg_rxbuf: bool,
}

impl Offloads {
    /// The number of each feature (virtio 1.2, 5.1.3), and whether it is on.
    fn features(&self) -> [(u32, bool); 11] {
        [
            (0, self.csum),
            (1, self.guest_csum),
            (7, self.guest_tso4),
            (8, self.guest_tso6),
            (9, self.guest_ecn),
            (10, self.guest_ufo),
            (11, self.host_tso4),
            (12, self.host_tso6),
            (13, self.host_ecn),
            (14, self.host_ufo),
            (15, self.mrg_rxbuf),
        ]
    }
}

/// A tap device of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetdevConfig {
    /// Its id.
    pub id: String,
    /// How it is found.
    pub tap: TapConfig,
    /// The kernel carries the packets, by these; else this program does.
    pub vhost: Option<VhostConfig>,
}

/// Where open files of `/dev/vhost-net` come from, one for each queue of a tap device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VhostConfig {
    /// Every program opens its own.
    Opened,
    /// By descriptors that the program was started with, which updates hand over.
    Inherited {
        /// Their numbers, 3 or more; none of them twice on a command line.
        fds: Vec<i32>,
    },
}

/// How a tap device is found, if it does not come with an update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TapConfig {
    /// By its name on the host.
    Named {
        /// The name, at most 15 bytes.
        name: String,
        /// Queues to open.
        queues: u16,
    },
    /// By descriptors that the program was started with, one for each queue.
    Inherited {
        /// Their numbers, 3 or more; none of them twice on a command line.
        fds: Vec<i32>,
    },
}

impl NetdevConfig {
    /// The number of its queues, one descriptor each.
    pub fn queues(&self) -> u16 {
        match &self.tap {
            TapConfig::Named { queues, .. } => *queues,
            TapConfig::Inherited { fds } => u16::try_from(fds.len()).unwrap_or(u16::MAX),
        }
    }

    /// The name of vhost descriptors in the registry, if updates hand them over. Their ids are those of the queues.
    pub fn vhost_registry_name(&self) -> String {
        format!("vhost/{}", self.id)
    }

    /// The name of the interface, if the command line has it.
    pub fn interface(&self) -> Option<&str> {
        match &self.tap {
            TapConfig::Named { name, .. } => Some(name),
            TapConfig::Inherited { .. } => None,
        }
    }

    /// The name of its descriptors in the registry, with the number of the queue, from 0, as the id.
    pub fn registry_name(&self) -> String {
        format!("netdev/{}", self.id)
    }
}

/// A source of randomness: `virtio-rng-pci`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RngConfig {
    /// Where it comes from.
    pub source: RngSource,
}

/// Where randomness comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RngSource {
    /// The kernel, by getrandom(2).
    Builtin,
    /// A file.
    File(PathBuf),
}

/// Consoles: `virtio-serial-pci`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SerialConfig {
    /// The most ports that it can have, 1 to [`MAX_PORTS`].
    pub max_ports: u32,
    /// Its ports, by number.
    pub ports: Vec<PortConfig>,
}

/// The most ports of one [`SerialConfig`], as in QEMU.
pub const MAX_PORTS: u32 = 31;

/// A port of [`SerialConfig`]: a console, `virtconsole`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortConfig {
    /// Its number; every port of a device has another one.
    pub number: u32,
    /// Id of its character device.
    pub chardev: String,
    /// The name that the guest knows it by.
    pub name: Option<String>,
}
