//! `-device`: from a model and its properties to a device in a slot, with what is behind it.
//!
//! An option is understood as soon as it is read. What it names may come later, so references, slots and addresses are
//! resolved once everything was read: [`Wanted::resolve`].

use super::MAX_CPUS;
use super::block::{Blocks, Found};
use super::config::{
    BlkConfig, Cache, DeviceConfig, DeviceKind, LAST_SLOT, MAX_PORTS, MAX_QUEUE_SIZE, MAX_QUEUES, MacAddress,
    NetConfig, Offloads, PortConfig, RngConfig, RngSource, SerialConfig,
};
use super::given::{Given, known};
use super::keyval::Pair;
use super::models::{self, ModelKind};
use super::netdev::Netdevs;
use super::options::{id, of};

/// Entries of a queue for which nobody said a number, as in QEMU.
const QUEUE_SIZE: u16 = 256;

/// The longest serial number of a disk, in bytes: VIRTIO_BLK_ID_BYTES of virtio 1.2, 5.2.6.
const SERIAL_BYTES: usize = 20;

/// A device as it was asked for.
#[derive(Debug)]
pub(super) struct Device {
    /// The option that asked for it.
    option: &'static str,
    /// How messages call it: as the option does.
    label: String,
    id: Option<String>,
    slot: Option<u8>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Blk(Blk),
    Net(Box<Net>),
    Rng { rng: Option<String> },
    Serial { max_ports: u32 },
}

#[derive(Debug)]
struct Blk {
    drive: String,
    serial: Option<String>,
    queues: Option<u16>,
    queue_size: u16,
    write_cache: Option<bool>,
    discard: bool,
    write_zeroes: bool,
    share_rw: bool,
}

#[derive(Debug)]
struct Net {
    netdev: String,
    mac: Option<MacAddress>,
    mq: Option<bool>,
    vectors: Option<u16>,
    host_mtu: Option<u16>,
    /// Offloads that were named.
    switches: Vec<(&'static str, bool)>,
}

/// A port as it was asked for.
#[derive(Debug)]
struct Port {
    label: String,
    id: Option<String>,
    /// Id of its device.
    bus: Option<String>,
    number: Option<u32>,
    chardev: String,
    name: Option<String>,
}

/// Every device that was asked for, in the order of the command line.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    devices: Vec<Device>,
    ports: Vec<Port>,
}

/// What devices refer to.
pub(super) struct Backends<'a> {
    pub(super) blocks: &'a mut Blocks,
    pub(super) netdevs: &'a mut Netdevs,
    pub(super) rngs: &'a mut Rngs,
}

/// Sources of randomness by their ids, each with whether something uses it.
#[derive(Debug, Default)]
pub(super) struct Rngs(pub(super) Vec<(String, RngSource, bool)>);

impl Rngs {
    /// The kernel's, unless an object is named. Several devices may share one.
    fn take(&mut self, id: Option<String>) -> Result<RngSource, String> {
        let Some(id) = id else { return Ok(RngSource::Builtin) };
        let names = known(self.0.iter().map(|(id, ..)| id.as_str()));
        let found = self.0.iter_mut().find(|(known, ..)| *known == id);
        let (_, source, is_used) = found.ok_or_else(|| format!("unknown object '{id}' (known: {names})"))?;
        *is_used = true;
        Ok(source.clone())
    }
}

/// A mistake: the option that made it, and the reason.
type Failure = (&'static str, String);

impl Wanted {
    /// Adds what a `-device` asks for, or gives the help that it asks for.
    pub(super) fn add(&mut self, pairs: Vec<Pair>) -> Result<Option<String>, String> {
        let is_help = |key: &str| key == "help" || key == "?";
        let driver = pairs.iter().rfind(|pair| pair.key == "driver").map(|pair| pair.value.clone());
        let driver = match driver {
            Some(driver) if is_help(&driver) => return Ok(Some(models::list())),
            Some(driver) => driver,
            None => {
                return Err(
                    "the model must stand first, as in virtio-blk-pci,drive=ID (-device help lists them)"
                        .into(),
                );
            }
        };
        let model = models::find(&driver)?;
        if pairs.iter().any(|pair| is_help(&pair.key)) {
            return Ok(Some(model.help()));
        }
        let pairs: Vec<_> = pairs.into_iter().filter(|pair| pair.key != "driver").collect();
        let label = label(model.name, &pairs);
        let given = Given::new(pairs, &model.property_names());
        let within = |reason: String| format!("{label}: {reason}");
        let given = given.map_err(within)?;
        if model.kind == ModelKind::Console {
            let port = port(label.clone(), given).map_err(within)?;
            self.check_id(port.id.as_deref()).map_err(within)?;
            self.ports.push(port);
        } else {
            let device = device(model.kind, label.clone(), given).map_err(within)?;
            self.check_id(device.id.as_deref()).map_err(within)?;
            self.devices.push(device);
        }
        Ok(None)
    }

    /// Adds the disk that comes with a drive.
    pub(super) fn add_disk(&mut self, drive: &str) {
        let kind = Kind::Blk(Blk {
            drive: drive.to_owned(),
            serial: None,
            queues: None,
            queue_size: QUEUE_SIZE,
            write_cache: None,
            discard: true,
            write_zeroes: true,
            share_rw: false,
        });
        self.push("-drive", format!("virtio-blk-pci,drive={drive}"), kind);
    }

    /// Adds the interface that comes with a `-nic`.
    pub(super) fn add_nic(&mut self, netdev: &str, mac: Option<MacAddress>) {
        let kind = Kind::Net(Box::new(Net {
            netdev: netdev.to_owned(),
            mac,
            mq: None,
            vectors: None,
            host_mtu: None,
            switches: Vec::new(),
        }));
        self.push("-nic", format!("virtio-net-pci,netdev={netdev}"), kind);
    }

    fn push(&mut self, option: &'static str, label: String, kind: Kind) {
        self.devices.push(Device { option, label, id: None, slot: None, kind });
    }

    fn check_id(&self, id: Option<&str>) -> Result<(), String> {
        let Some(id) = id else { return Ok(()) };
        let mut ids =
            self.devices.iter().map(|device| &device.id).chain(self.ports.iter().map(|port| &port.id));
        match ids.any(|other| other.as_deref() == Some(id)) {
            true => Err(format!("id '{id}' is taken by another -device")),
            false => Ok(()),
        }
    }

    /// The first device, for a machine that can have none: the option and the device.
    pub(super) fn first(&self) -> Option<(&'static str, &str)> {
        let device = self.devices.first().map(|device| (device.option, device.label.as_str()));
        device.or(self.ports.first().map(|port| ("-device", port.label.as_str())))
    }

    /// The character devices that ports are connected to.
    pub(super) fn chardevs(&self) -> impl Iterator<Item = &String> {
        self.ports.iter().map(|port| &port.chardev)
    }

    /// Gives every device its slot, its address and what is behind it.
    pub(super) fn resolve(self, cpus: u8, backends: &mut Backends<'_>) -> Result<Vec<DeviceConfig>, Failure> {
        let slots = slots(&self.devices)?;
        let mut macs = macs(&self.devices)?.into_iter();
        let ports = self.ports_by_device().map_err(|reason| ("-device", reason))?;
        let mut configs = Vec::new();
        for ((device, slot), ports) in self.devices.into_iter().zip(slots).zip(ports) {
            let Device { option, label, id, kind, .. } = device;
            let within = |reason: String| (option, format!("{label}: {reason}"));
            let kind = match kind {
                Kind::Blk(blk) => blk.resolve(cpus, &label, backends.blocks).map(DeviceKind::Blk),
                Kind::Net(net) => net.resolve(macs.next(), &label, backends.netdevs).map(DeviceKind::Net),
                Kind::Rng { rng } => {
                    backends.rngs.take(rng).map(|source| DeviceKind::Rng(RngConfig { source }))
                }
                Kind::Serial { max_ports } => Ok(DeviceKind::Serial(SerialConfig { max_ports, ports })),
            };
            configs.push(DeviceConfig { id, slot, kind: kind.map_err(within)? });
        }
        configs.sort_by_key(|device| device.slot);
        Ok(configs)
    }

    /// The ports of each device.
    fn ports_by_device(&self) -> Result<Vec<Vec<PortConfig>>, String> {
        let mut by_device = vec![Vec::<PortConfig>::new(); self.devices.len()];
        // Those that say their number first, so that the others find what is free.
        let (numbered, others): (Vec<_>, Vec<_>) = self.ports.iter().partition(|port| port.number.is_some());
        for port in numbered.into_iter().chain(others) {
            let (at, max_ports) =
                self.device_of(port).map_err(|reason| format!("{}: {reason}", port.label))?;
            let others = &mut by_device[at];
            let is_taken = |number: u32| others.iter().any(|other| other.number == number);
            let number = match port.number {
                Some(number) if number >= max_ports => {
                    Err(format!("number {number} is beyond max_ports={max_ports}"))
                }
                Some(number) if is_taken(number) => Err(format!("number {number} is taken by another port")),
                Some(number) => Ok(number),
                None => (0..max_ports)
                    .find(|&number| !is_taken(number))
                    .ok_or_else(|| format!("no port is left of max_ports={max_ports}")),
            };
            let number = number.map_err(|reason| format!("{}: {reason}", port.label))?;
            others.push(PortConfig { number, chardev: port.chardev.clone(), name: port.name.clone() });
        }
        by_device.iter_mut().for_each(|ports| ports.sort_by_key(|port| port.number));
        Ok(by_device)
    }

    /// The device that a port belongs to, and how many ports that can have.
    fn device_of(&self, port: &Port) -> Result<(usize, u32), String> {
        let mut buses = self.devices.iter().enumerate().filter_map(|(at, device)| match device.kind {
            Kind::Serial { max_ports } => Some((at, device.id.as_deref(), max_ports)),
            _ => None,
        });
        let found = match &port.bus {
            None => buses.next(),
            Some(bus) => buses.find(|(_, id, _)| *id == Some(bus)),
        };
        found.map(|(at, _, max_ports)| (at, max_ports)).ok_or_else(|| match &port.bus {
            None => "it needs a -device virtio-serial-pci".into(),
            Some(bus) => format!("there is no virtio-serial-pci of the id '{bus}'"),
        })
    }
}

/// The part of an option that tells which of its kind it is.
fn label(model: &str, pairs: &[Pair]) -> String {
    let telling = ["id", "drive", "netdev", "chardev", "rng"];
    let found = telling.iter().find_map(|key| pairs.iter().rfind(|pair| pair.key == *key));
    found.map_or_else(|| model.to_owned(), |Pair { key, value }| format!("{model},{key}={value}"))
}

fn device(kind: ModelKind, label: String, mut given: Given) -> Result<Device, String> {
    let id = given.id()?;
    given.only("bus", &["pcie.0", "pci.0"])?;
    given.only("disable-legacy", &["on", "auto"])?;
    given.only("disable-modern", &["off"])?;
    given.number::<u32>("bootindex", 0..=i32::MAX as u32)?;
    let slot = given.text("addr").map(|addr| of("addr", slot(&addr))).transpose()?;
    let kind = match kind {
        ModelKind::Blk => Kind::Blk(blk(&mut given)?),
        ModelKind::Net => Kind::Net(Box::new(net(&mut given)?)),
        ModelKind::Rng => Kind::Rng { rng: given.text("rng") },
        ModelKind::Serial | ModelKind::Console => {
            Kind::Serial { max_ports: given.number("max_ports", 1..=MAX_PORTS)?.unwrap_or(MAX_PORTS) }
        }
    };
    given.finish();
    Ok(Device { option: "-device", label, id, slot, kind })
}

/// A slot as QEMU writes it: hexadecimal, perhaps with a function, which is 0.
fn slot(text: &str) -> Result<u8, String> {
    let bad =
        || format!("'{text}' is no slot from 1 to {LAST_SLOT:x}, hexadecimal (slot 0 is the host bridge's)");
    let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
    if function != "0" && function != "0x0" {
        return Err(format!("'{text}': a device has function 0 only"));
    }
    let digits = slot.strip_prefix("0x").unwrap_or(slot);
    let is_number = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let slot = u8::from_str_radix(digits, 16).ok().filter(|slot| is_number && (1..=LAST_SLOT).contains(slot));
    slot.ok_or_else(bad)
}

fn blk(given: &mut Given) -> Result<Blk, String> {
    let drive = given.required("drive")?;
    let serial = given.text("serial");
    if let Some(serial) = &serial {
        of("serial", check_serial(serial))?;
    }
    Ok(Blk {
        drive,
        serial,
        queues: given.number("num-queues", 1..=MAX_QUEUES)?,
        queue_size: given.queue_size("queue-size", 4..=MAX_QUEUE_SIZE)?.unwrap_or(QUEUE_SIZE),
        write_cache: given
            .choice("write-cache", &[("on", Some(true)), ("off", Some(false)), ("auto", None)])?
            .flatten(),
        discard: given.switch("discard")?.unwrap_or(true),
        write_zeroes: given.switch("write-zeroes")?.unwrap_or(true),
        share_rw: given.switch("share-rw")?.unwrap_or(false),
    })
}

/// A driver is given the serial number as a field of [`SERIAL_BYTES`].
pub(super) fn check_serial(serial: &str) -> Result<(), String> {
    let is_printable = serial.bytes().all(|byte| (0x20..0x7f).contains(&byte));
    match is_printable && serial.len() <= SERIAL_BYTES {
        true => Ok(()),
        false => {
            Err(format!("'{serial}' has more than {SERIAL_BYTES} characters, or others than those of ASCII"))
        }
    }
}

/// The properties that are switches of [`Offloads`], but for [`MRG_RXBUF`].
const OFFLOADS: [&str; 10] = [
    "csum",
    "guest_csum",
    "host_tso4",
    "host_tso6",
    "host_ecn",
    "host_ufo",
    "guest_tso4",
    "guest_tso6",
    "guest_ecn",
    "guest_ufo",
];

/// A switch that is no offload: it needs nothing of the host.
const MRG_RXBUF: &str = "mrg_rxbuf";

fn net(given: &mut Given) -> Result<Net, String> {
    let netdev = given.required("netdev")?;
    given.only("rx_queue_size", &["256"])?;
    given.only("tx_queue_size", &["256"])?;
    let mut switches = Vec::new();
    for name in OFFLOADS.into_iter().chain([MRG_RXBUF]) {
        switches.extend(given.switch(name)?.map(|state| (name, state)));
    }
    Ok(Net {
        netdev,
        mac: given.text("mac").map(|text| of("mac", mac(&text))).transpose()?,
        mq: given.switch("mq")?,
        vectors: given.number("vectors", 0..=2048)?,
        // The least that IPv4 allows, RFC 791.
        host_mtu: given.number("host_mtu", 68..=u16::MAX)?,
        switches,
    })
}

/// Reads the address of an interface.
pub(super) fn mac(text: &str) -> Result<MacAddress, String> {
    let bad = || format!("'{text}' is no address of one interface (such as 52:54:00:12:34:56)");
    let mut bytes = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut bytes {
        let part = parts.next().ok_or_else(bad)?;
        let is_hex = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
        *byte = u8::from_str_radix(part, 16).ok().filter(|_| is_hex).ok_or_else(bad)?;
    }
    // The lowest bit of the first byte marks the address of a group.
    match parts.next().is_none() && bytes[0] & 1 == 0 && bytes != [0; 6] {
        true => Ok(MacAddress(bytes)),
        false => Err(bad()),
    }
}

fn port(label: String, mut given: Given) -> Result<Port, String> {
    let bus = given.text("bus").map(|bus| match bus.strip_suffix(".0") {
        Some(device) => id(device),
        None => Err(format!("'{bus}' is no bus of a virtio-serial-pci (its id and .0, as in vser0.0)")),
    });
    let port = Port {
        id: given.id()?,
        bus: bus.transpose().map_err(|reason| format!("property 'bus': {reason}"))?,
        number: given.number("nr", 0..=MAX_PORTS - 1)?,
        chardev: of("chardev", id(&given.required("chardev")?))?,
        name: given.text("name"),
        label,
    };
    given.finish();
    Ok(port)
}

/// The slot of each device: the one that it was given, or else the lowest that is free, in the order of the command line.
/// So the same command line makes the same machine.
fn slots(devices: &[Device]) -> Result<Vec<u8>, Failure> {
    let mut owners: [Option<&Device>; LAST_SLOT as usize + 1] = [None; _];
    for device in devices {
        let Some(slot) = device.slot else { continue };
        if let Some(other) = owners[usize::from(slot)].replace(device) {
            let reason = format!("{}: slot {slot:x} is taken by {}", device.label, other.label);
            return Err((device.option, reason));
        }
    }
    let mut slots = Vec::new();
    for device in devices {
        let slot = device.slot.or_else(|| (1..=LAST_SLOT).find(|&slot| owners[usize::from(slot)].is_none()));
        let Some(slot) = slot else {
            return Err((
                device.option,
                format!("{}: no slot is left (there are {LAST_SLOT})", device.label),
            ));
        };
        owners[usize::from(slot)] = Some(device);
        slots.push(slot);
    }
    Ok(slots)
}

/// The address of each network device: the one that it was given, or else the lowest of QEMU's defaults that is free.
fn macs(devices: &[Device]) -> Result<Vec<MacAddress>, Failure> {
    let nets = devices.iter().filter_map(|device| match &device.kind {
        Kind::Net(net) => Some((device, net.mac)),
        _ => None,
    });
    let mut taken: Vec<_> = nets.clone().filter_map(|(_, mac)| mac).collect();
    let mut macs = Vec::new();
    for (device, mac) in nets {
        let free = (0..=u8::MAX).map(MacAddress::default_of).find(|mac| !taken.contains(mac));
        let Some(mac) = mac.or(free) else {
            return Err((device.option, format!("{}: no default address is left", device.label)));
        };
        taken.push(mac);
        macs.push(mac);
    }
    Ok(macs)
}

impl Blk {
    fn resolve(self, cpus: u8, user: &str, blocks: &mut Blocks) -> Result<BlkConfig, String> {
        // As in QEMU, each vCPU has a queue of its own.
        const { assert!(MAX_CPUS as u16 <= MAX_QUEUES) };
        let Found { mut drive, serial } = blocks.take(&self.drive, user)?;
        drive.share_rw = self.share_rw;
        drive.cache = match (drive.cache, self.write_cache) {
            (Cache::Unsafe, Some(false)) => {
                return Err(
                    "property 'write-cache': off is in vain, as flushes of the drive do nothing".into()
                );
            }
            (Cache::Writethrough, Some(true)) => Cache::Writeback,
            (Cache::Writeback, Some(false)) => Cache::Writethrough,
            (cache, _) => cache,
        };
        Ok(BlkConfig {
            drive,
            serial: self.serial.or(serial),
            queues: self.queues.unwrap_or(cpus.into()),
            queue_size: self.queue_size,
            discard: self.discard,
            write_zeroes: self.write_zeroes,
        })
    }
}

impl Net {
    fn resolve(
        self,
        mac: Option<MacAddress>,
        user: &str,
        netdevs: &mut Netdevs,
    ) -> Result<NetConfig, String> {
        let netdev = netdevs.take(&self.netdev, user)?;
        let queues = netdev.queues();
        if queues > 1 && self.mq == Some(false) {
            return Err(format!("netdev '{}' has {queues} queues, which mq=off leaves unused", netdev.id));
        }
        let vectors = 2 * queues + 2;
        if let Some(wanted) = self.vectors.filter(|wanted| *wanted != vectors) {
            return Err(format!(
                "property 'vectors': {wanted} is not what {queues} pairs of queues have, which is {vectors}; leave it out"
            ));
        }
        Ok(NetConfig {
            offloads: self.offloads()?,
            netdev,
            mac: mac.ok_or("no address is left")?,
            host_mtu: self.host_mtu,
        })
    }

    /// Which of them are on: those that were not named, if what they need is on (virtio 1.2, 5.1.3.1).
    fn offloads(&self) -> Result<Offloads, String> {
        let named =
            |name: &str| self.switches.iter().find(|(other, _)| *other == name).map(|(_, state)| *state);
        let pick = |name: &str, is_possible: bool, needs: &str| match named(name) {
            Some(true) if !is_possible => Err(format!("property '{name}': on needs {needs}")),
            Some(state) => Ok(state),
            None => Ok(is_possible),
        };
        let [csum, guest_csum] = ["csum", "guest_csum"].map(|name| named(name).unwrap_or(true));
        let host = |name| pick(name, csum, "csum=on");
        let guest = |name| pick(name, guest_csum, "guest_csum=on");
        let (host_tso4, host_tso6) = (host("host_tso4")?, host("host_tso6")?);
        let (guest_tso4, guest_tso6) = (guest("guest_tso4")?, guest("guest_tso6")?);
        Ok(Offloads {
            csum,
            guest_csum,
            host_tso4,
            host_tso6,
            host_ecn: pick("host_ecn", host_tso4 || host_tso6, "host_tso4=on or host_tso6=on")?,
            host_ufo: host("host_ufo")?,
            guest_tso4,
            guest_tso6,
            guest_ecn: pick("guest_ecn", guest_tso4 || guest_tso6, "guest_tso4=on or guest_tso6=on")?,
            guest_ufo: guest("guest_ufo")?,
            mrg_rxbuf: named(MRG_RXBUF).unwrap_or(true),
        })
    }
}
