//! The table of device models: what each is called and which properties it has. `-device` and its help read it.

use super::options::{Property, property};

/// A kind of device that `-device` makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ModelKind {
    Blk,
    Net,
    Rng,
    Serial,
    /// A port of a [`ModelKind::Serial`]; not on the PCI bus itself.
    Console,
}

/// A row of the table.
pub(super) struct Model {
    pub(super) kind: ModelKind,
    pub(super) name: &'static str,
    /// Other names of it in QEMU.
    pub(super) aliases: &'static [&'static str],
    pub(super) help: &'static str,
    /// Its own properties; those of [`PCI`] come on top for all but ports.
    own: &'static [Property],
}

/// Properties of every device on the PCI bus.
const PCI: &[Property] = &[
    property("id", "ID", "its id"),
    property("bus", "pcie.0", "the bus; there is one, also called pci.0"),
    property(
        "addr",
        "SLOT[.0]",
        "its slot on the bus, 1 to 1f, hexadecimal (default: the lowest that is free, in the order of the command line)",
    ),
    property("disable-legacy", "on|auto", "there is no legacy interface"),
    property("disable-modern", "off", "the modern interface is all there is"),
];

/// Every model.
pub(super) const MODELS: &[Model] = &[
    Model {
        kind: ModelKind::Blk,
        name: "virtio-blk-pci",
        aliases: &["virtio-blk", "virtio-blk-pci-non-transitional"],
        help: "a disk",
        own: &[
            property("drive", "ID", "the -drive or -blockdev that it shows; required"),
            property("serial", "TEXT", "its serial number, at most 20 characters"),
            property("num-queues", "N", "queues, 1 to 64 (default: one for each vCPU)"),
            property("queue-size", "N", "entries of a queue, a power of two, 4 to 1024 (default: 256)"),
            property(
                "write-cache",
                "on|off|auto",
                "whether the guest has to flush (default: auto, as the drive has it)",
            ),
            property("discard", "on|off", "the guest may discard sectors (default: on)"),
            property("write-zeroes", "on|off", "the guest may have sectors zeroed (default: on)"),
            property("share-rw", "on|off", "others may write to the image, too (default: off)"),
            property("bootindex", "N", "accepted and ignored: no firmware looks for a disk to boot"),
        ],
    },
    Model {
        kind: ModelKind::Net,
        name: "virtio-net-pci",
        aliases: &["virtio-net", "virtio-net-pci-non-transitional"],
        help: "a network interface",
        own: &[
            property("netdev", "ID", "the -netdev that it is connected to; required"),
            property("mac", "ADDRESS", "its address (default: 52:54:00:12:34:56, and on from there)"),
            property("mq", "on|off", "use all queues of the netdev, which it must if there are several"),
            property(
                "vectors",
                "N",
                "MSI-X vectors; two for each pair of queues and two more is all that it can be",
            ),
            property("rx_queue_size", "256", "entries of a receive queue"),
            property("tx_queue_size", "256", "entries of a transmit queue"),
            property("host_mtu", "BYTES", "largest packet to tell the guest of, 68 to 65535 (default: none)"),
            property("mrg_rxbuf", "on|off", "offer to receive a packet into several buffers (default: on)"),
            property("csum", "on|off", "offer to take packets without a checksum (default: on)"),
            property("guest_csum", "on|off", "offer to give such packets (default: on)"),
            property("host_tso4", "on|off", "offer to split TCP over IPv4 (default: on)"),
            property("host_tso6", "on|off", "the same over IPv6 (default: on)"),
            property("host_ecn", "on|off", "the same with congestion notification (default: on)"),
            property("host_ufo", "on|off", "the same for UDP (default: on)"),
            property("guest_tso4", "on|off", "offer to give TCP over IPv4 unsplit (default: on)"),
            property("guest_tso6", "on|off", "the same over IPv6 (default: on)"),
            property("guest_ecn", "on|off", "the same with congestion notification (default: on)"),
            property("guest_ufo", "on|off", "the same for UDP (default: on)"),
            property("bootindex", "N", "accepted and ignored: no firmware looks for a network to boot from"),
        ],
    },
    Model {
        kind: ModelKind::Rng,
        name: "virtio-rng-pci",
        aliases: &["virtio-rng", "virtio-rng-pci-non-transitional"],
        help: "a source of randomness",
        own: &[property("rng", "ID", "the -object it comes from (default: the kernel's, as rng-builtin)")],
    },
    Model {
        kind: ModelKind::Serial,
        name: "virtio-serial-pci",
        aliases: &["virtio-serial", "virtio-serial-pci-non-transitional"],
        help: "consoles, each a virtconsole",
        own: &[property("max_ports", "N", "the most consoles, 1 to 31 (default: 31)")],
    },
    Model {
        kind: ModelKind::Console,
        name: "virtconsole",
        aliases: &[],
        help: "a console of a virtio-serial-pci",
        own: &[
            property("chardev", "ID", "the -chardev that it is connected to; required"),
            property("name", "TEXT", "the name that the guest finds it by"),
            property("id", "ID", "its id"),
            property(
                "bus",
                "ID.0",
                "the virtio-serial-pci that it belongs to, by its id (default: the first)",
            ),
            property("nr", "N", "its number there (default: the lowest that is free)"),
        ],
    },
];

impl Model {
    /// Every property.
    pub(super) fn properties(&self) -> impl Iterator<Item = &'static Property> {
        let common = if self.kind == ModelKind::Console { &[] } else { PCI };
        self.own.iter().chain(common)
    }

    pub(super) fn property_names(&self) -> Vec<&'static str> {
        self.properties().map(|property| property.name).collect()
    }

    /// What `-device MODEL,help` prints.
    pub(super) fn help(&self) -> String {
        let mut out = format!("{} options:\n", self.name);
        for Property { name, metavar, help } in self.properties() {
            out += &format!("  {:<26} - {help}\n", format!("{name}=<{metavar}>"));
        }
        out
    }
}

/// Whether some model has this property.
pub(super) fn is_property(name: &str) -> bool {
    MODELS.iter().flat_map(Model::properties).any(|property| property.name == name)
}

/// The model of this name.
pub(super) fn find(name: &str) -> Result<&'static Model, String> {
    MODELS.iter().find(|model| model.name == name || model.aliases.contains(&name)).ok_or_else(|| {
        let known: Vec<_> = MODELS.iter().map(|model| model.name).collect();
        format!("device model '{name}' is not supported (supported: {})", known.join(", "))
    })
}

/// What `-device help` prints.
pub(super) fn list() -> String {
    let mut out = "Supported devices are (-device MODEL,help lists properties):\n".to_owned();
    for Model { name, aliases, help, .. } in MODELS {
        let aliases = aliases.first().map(|alias| format!(", alias {alias}")).unwrap_or_default();
        out += &format!("{:<40} {help}\n", format!("name \"{name}\"{aliases}"));
    }
    out
}
