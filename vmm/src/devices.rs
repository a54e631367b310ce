//! The devices on the PCI bus: from the command line to the machine, and what an update has to know of them.
//!
//! A guest knows a device by its slot, and so does a saved state. What source and target must agree on otherwise is
//! compared by `app::device_shape`. Behind a device are descriptors of the host: those of a guest that arrives have come with
//! it, and nothing is opened then.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use anyhow::{Context, bail};
use cpr_core::section::SectionType;
use cpr_core::{Blocker, Blockers, FdKind, FdPolicy, FdRegistry, ModeSet};
use oslib::vhost::Vhost;
use vmm_core::block::{self, Image, ImageConfig};
use vmm_core::machine::{Machine, PciConfig, PciDevice};
use vmm_core::memory::GuestRam;
use vmm_core::pci::{FunctionState, HostState};
use vmm_core::virtio::block::{Aio, Block, BlockConfig, BlockState};
use vmm_core::virtio::console::{self, Console, ConsoleState, HostEnd};
use vmm_core::virtio::net::{Net, NetState, Settings, Tap, check_vhost};
use vmm_core::virtio::pci::VirtioState;
use vmm_core::virtio::rng::{Rng, RngState, Source};
use vmm_core::virtio::{self, SectionVersions, VirtioDevice};

use crate::chardev::{Chardev, Output};
use crate::cli::config::{
    self, BlkConfig, Config, DeviceConfig, DeviceKind, DriveConfig, NetConfig, NetdevConfig, RngSource,
    SerialConfig, TapConfig, VhostConfig,
};

/// The host's ends of all ports of virtio consoles, by slot and number.
#[derive(Debug)]
pub(crate) struct Consoles(BTreeMap<(u8, u32), HostEnd>);

impl Consoles {
    /// One for each port on the command line.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub(crate) fn new(config: &Config) -> anyhow::Result<Self> {
        let ports = ports(config).map(|(at, _)| Ok((at, HostEnd::new().context("a console's port")?)));
        ports.collect::<anyhow::Result<_>>().map(Self)
    }

    /// Those that are connected to a chardev.
    pub(crate) fn of_chardev(&self, config: &Config, chardev: &str) -> Vec<HostEnd> {
        let connected = ports(config).filter(|(_, port)| port.chardev == chardev);
        connected.filter_map(|(at, _)| self.0.get(&at).cloned()).collect()
    }
}

fn ports(config: &Config) -> impl Iterator<Item = ((u8, u32), &config::PortConfig)> {
    config.devices.iter().flat_map(|device| {
        let ports = match &device.kind {
            DeviceKind::Serial(serial) => &serial.ports[..],
            _ => &[],
        };
        ports.iter().map(|port| ((device.slot, port.number), port))
    })
}

/// What devices are made of.
pub(crate) struct Backing<'a> {
    /// Where descriptors are entered, and those that have come are found.
    pub(crate) registry: &'a FdRegistry,
    /// Whether the guest comes with an update that brings its descriptors.
    pub(crate) has_arrived: bool,
    pub(crate) ram: &'a GuestRam,
    pub(crate) chardevs: &'a [Chardev],
    pub(crate) consoles: &'a Consoles,
}

/// Makes the devices that the command line asks for; `None` if the machine has no bus.
///
/// # Errors
/// A device without a bus, or one that cannot be made; the error names it.
pub(crate) fn build(config: &Config, backing: &Backing<'_>) -> anyhow::Result<Option<PciConfig>> {
    check_bus(config)?;
    let device = |device: &DeviceConfig| {
        let made = backing.device(device).with_context(|| device.describe())?;
        Ok(PciDevice {
            slot: device.slot,
            name: device.describe(),
            withheld: device.withheld_features(),
            device: made,
        })
    };
    let devices = config.devices.iter().map(device).collect::<anyhow::Result<_>>()?;
    Ok(config.machine.machine_type().has_pci().then_some(PciConfig { devices }))
}

/// Whether the machine has a bus for its devices.
///
/// # Errors
/// It has none, and a device that needs one.
pub(crate) fn check_bus(config: &Config) -> anyhow::Result<()> {
    let machine_type = config.machine.machine_type();
    let Some(device) = config.devices.first().filter(|_| !machine_type.has_pci()) else { return Ok(()) };
    bail!("{}: machine type '{}' has no PCI bus; use a later one", device.describe(), machine_type.name())
}

impl Backing<'_> {
    fn device(&self, device: &DeviceConfig) -> anyhow::Result<Box<dyn VirtioDevice>> {
        Ok(match &device.kind {
            DeviceKind::Blk(blk) => Box::new(self.disk(blk)?),
            DeviceKind::Net(net) => Box::new(self.network(net)?),
            DeviceKind::Rng(rng) => Box::new(randomness(&rng.source)?),
            DeviceKind::Serial(serial) => Box::new(self.console(device.slot, serial)?),
        })
    }

    fn disk(&self, blk: &BlkConfig) -> anyhow::Result<Block> {
        let drive = &blk.drive;
        let (name, image_config) = (drive.registry_name(), image_config(drive));
        let image = if self.has_arrived {
            let fd = self.registry.find::<File>(&name, 0).with_context(|| did_not_arrive(&name))?;
            Image::adopt(image_config, fd)?
        } else {
            let image = Image::open(image_config)?;
            self.registry.save(&name, 0, FdKind::Other, FdPolicy::MustSurvive, image.fd())?;
            image
        };
        Ok(Block::new(BlockConfig {
            image,
            serial: blk.serial.clone().unwrap_or_default(),
            queues: blk.queues,
            queue_size: blk.queue_size,
            aio: match drive.aio {
                config::Aio::IoUring => Aio::IoUring,
                config::Aio::Threads => Aio::Threads,
            },
        })?)
    }

    fn network(&self, net: &NetConfig) -> anyhow::Result<Net> {
        let netdev = &net.netdev;
        let in_netdev = || format!("netdev '{}'", netdev.id);
        let taps = self.taps(netdev).with_context(in_netdev)?;
        let device = Net::new(Settings { mac: net.mac.0, mtu: net.host_mtu }, taps);
        let Some(vhost) = &netdev.vhost else { return Ok(device) };
        let accelerators = self.accelerators(netdev, vhost).with_context(in_netdev)?;
        Ok(device.accelerate(accelerators, matches!(vhost, VhostConfig::Inherited { .. }))?)
    }

    /// One for each queue.
    fn accelerators(&self, netdev: &NetdevConfig, vhost: &VhostConfig) -> anyhow::Result<Vec<Vhost>> {
        let accelerators: Vec<_> = match vhost {
            VhostConfig::Opened => {
                (0..netdev.queues()).map(|_| self.own_vhost()).collect::<anyhow::Result<_>>()?
            }
            VhostConfig::Inherited { fds } => {
                let name = netdev.vhost_registry_name();
                let one = |(queue, &fd)| self.vhost_of_others(&name, queue, fd);
                (0..).zip(fds).map(one).collect::<anyhow::Result<_>>()?
            }
        };
        accelerators.iter().try_for_each(check_vhost)?;
        Ok(accelerators)
    }

    /// Claimed at once: it takes time, and the guest may be waiting later.
    fn own_vhost(&self) -> anyhow::Result<Vhost> {
        let mut vhost = Vhost::open()?;
        vhost.claim(self.ram.memory())?;
        Ok(vhost)
    }

    /// The one that has come with an update under this name, or that the program was started with. Whoever has it now, it
    /// is claimed when a driver needs it.
    fn vhost_of_others(&self, name: &str, queue: u64, fd: i32) -> anyhow::Result<Vhost> {
        if let Some(arrived) = self.registry.find::<OwnedFd>(name, queue) {
            return Ok(Vhost::adopt(arrived)?);
        }
        let mut vhost = Vhost::adopt(Arc::new(inherited(fd)?)).with_context(|| format!("descriptor {fd}"))?;
        // To find out now whether it can be.
        vhost
            .claim(self.ram.memory())
            .and_then(|()| vhost.release())
            .with_context(|| format!("descriptor {fd}"))?;
        self.registry.save(name, queue, FdKind::Other, FdPolicy::MayBeRebuilt, vhost.descriptor())?;
        Ok(vhost)
    }

    fn taps(&self, netdev: &NetdevConfig) -> anyhow::Result<Vec<Tap>> {
        let name = netdev.registry_name();
        if self.has_arrived {
            let queue = |queue| {
                let found = self.registry.find::<OwnedFd>(&name, queue);
                found.with_context(|| did_not_arrive(&format!("{name}/{queue}")))
            };
            let fds = (0..netdev.queues().into()).map(queue).collect::<anyhow::Result<_>>()?;
            return Ok(Tap::adopt(fds, netdev.interface())?);
        }
        let taps = match &netdev.tap {
            TapConfig::Named { name, queues } => Tap::open(Some(name), (*queues).into())?,
            TapConfig::Inherited { fds } => {
                Tap::from_fds(fds.iter().map(|&fd| inherited(fd)).collect::<anyhow::Result<_>>()?)?
            }
        };
        for (queue, tap) in (0..).zip(&taps) {
            self.registry.save(&name, queue, FdKind::Tap, FdPolicy::MustSurvive, tap.descriptor())?;
        }
        Ok(taps)
    }

    fn console(&self, slot: u8, serial: &SerialConfig) -> anyhow::Result<Console> {
        let port = |port: &config::PortConfig| {
            let host = self.consoles.0.get(&(slot, port.number)).context("it has no end on the host")?;
            Ok(console::PortConfig {
                number: port.number,
                name: port.name.clone(),
                sink: Box::new(self.output(&port.chardev)),
                host: host.clone(),
            })
        };
        let ports = serial.ports.iter().map(port).collect::<anyhow::Result<_>>()?;
        Ok(Console::new(serial.max_ports, ports)?)
    }

    fn output(&self, chardev: &str) -> Output {
        let found = self.chardevs.iter().find(|other| other.id() == chardev);
        found.map(|chardev| chardev.output().clone()).unwrap_or_default()
    }
}

fn inherited(fd: i32) -> anyhow::Result<OwnedFd> {
    oslib::inherited::take(fd).with_context(|| format!("descriptor {fd} was not passed on"))
}

fn did_not_arrive(name: &str) -> String {
    format!(
        "descriptor '{name}' did not arrive with the update; the command line must name drive or netdev as the previous \
         program's did"
    )
}

fn image_config(drive: &DriveConfig) -> ImageConfig {
    ImageConfig {
        read_only: drive.read_only,
        cache: match drive.cache {
            config::Cache::Writeback => block::Cache::Writeback,
            config::Cache::Writethrough => block::Cache::Writethrough,
            config::Cache::Unsafe => block::Cache::Unsafe,
        },
        locking: drive.locking,
        share_rw: drive.share_rw,
        unmap: drive.discard,
        ..ImageConfig::new(&drive.id, &drive.path)
    }
}

fn randomness(source: &RngSource) -> anyhow::Result<Rng> {
    let source = match source {
        RngSource::Builtin => Source::Kernel,
        RngSource::File(path) => Source::open(path).with_context(|| format!("'{}'", path.display()))?,
    };
    Ok(Rng::new(source)?)
}

/// Whether images and interfaces of the command line are those that a guest has, by slot. Nothing is opened.
///
/// # Errors
/// The device that has another one.
pub(crate) fn check_backings(config: &Config, guests: &[(u8, virtio::Backing)]) -> anyhow::Result<()> {
    for device in &config.devices {
        if let Some((_, guests)) = guests.iter().find(|(slot, _)| *slot == device.slot) {
            check_backing(device, guests).with_context(|| device.describe())?;
        }
    }
    Ok(())
}

fn check_backing(device: &DeviceConfig, guests: &virtio::Backing) -> anyhow::Result<()> {
    match (&device.kind, guests) {
        (DeviceKind::Blk(blk), virtio::Backing::Image(image)) => {
            Ok(image_config(&blk.drive).check_identity(*image)?)
        }
        (DeviceKind::Net(net), virtio::Backing::Interface(found)) => {
            Ok(Tap::check_name(net.netdev.interface(), found)?)
        }
        // Another device, which is a difference that is named as such.
        _ => Ok(()),
    }
}

/// Whether the kernel could carry packets where the command line has it do so.
///
/// # Errors
/// The device that would have to do without.
pub(crate) fn check_kernel(config: &Config) -> anyhow::Result<()> {
    let opens = |netdev: &NetdevConfig| netdev.vhost == Some(VhostConfig::Opened);
    let is_served =
        |device: &&DeviceConfig| matches!(&device.kind, DeviceKind::Net(net) if opens(&net.netdev));
    let Some(device) = config.devices.iter().find(is_served) else { return Ok(()) };
    let checked = Vhost::open().map_err(anyhow::Error::from).and_then(|vhost| Ok(check_vhost(&vhost)?));
    checked.with_context(|| device.describe())
}

/// The sections of bus and devices that this program reads.
pub(crate) fn sections() -> Vec<SectionVersions> {
    vec![
        row::<HostState>(),
        row::<FunctionState>(),
        row::<VirtioState>(),
        row::<BlockState>(),
        row::<NetState>(),
        row::<RngState>(),
        row::<ConsoleState>(),
    ]
}

fn row<T: SectionType>() -> SectionVersions {
    (T::NAME, T::VERSIONS)
}

/// Forbids updates for as long as a device is there that cannot be saved.
pub(crate) fn block_updates(machine: &Machine, blockers: &Blockers) -> Vec<Blocker> {
    let block = |name: &str| blockers.add(ModeSet::all(), format!("device '{name}' cannot be saved"));
    machine.unsavable_devices().into_iter().map(block).collect()
}
