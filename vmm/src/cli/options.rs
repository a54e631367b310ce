//! The table of options: what each is called, what it takes, what it means and what it does.
//!
//! Parser and help read this table and nothing else. An option with properties lists them here; a property that is not
//! listed is refused by name before the option's own code sees it.

use std::path::PathBuf;

use serde_json::{Map, Value};
use uuid::Uuid;

use super::MAX_CPUS;
use super::block::{self, Block};
use super::config::{
    ChardevBackend, Incoming, MACHINE_TYPES, MachineType, MonitorKind, RngSource, SandboxConfig,
};
use super::device;
use super::given::{Given, json_pairs, unknown_property};
use super::keyval::{self, Pair, parse_size, parse_switch};
use super::models;
use super::netdev;
use super::resolve::{Builder, Object, ObjectKind};
use crate::monitor::{Channel, TypedChannel};

/// One option.
pub(super) struct OptionSpec {
    /// Names without dashes; help shows the first, then the others.
    pub(super) names: &'static [&'static str],
    /// What value follows; `None`: no value.
    pub(super) metavar: Option<&'static str>,
    /// The heading it stands under in the help.
    pub(super) group: Group,
    pub(super) help: &'static str,
    pub(super) properties: &'static [Property],
    pub(super) action: Action,
}

/// A property inside an option's value.
pub(super) struct Property {
    pub(super) name: &'static str,
    pub(super) metavar: &'static str,
    pub(super) help: &'static str,
}

/// What an option does. `Err` is the reason, without the option's name.
pub(super) enum Action {
    Help,
    Version,
    Apply(fn(&mut Builder, &OptionSpec, &str) -> Result<(), String>),
}

/// Headings of the help, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Group {
    Machine,
    Boot,
    Devices,
    FrontEnds,
    Update,
    Process,
}

impl Group {
    pub(super) const ALL: &[(Self, &'static str)] = &[
        (Self::Machine, "Machine"),
        (Self::Boot, "Boot"),
        (Self::Devices, "Disks, networks and other devices"),
        (Self::FrontEnds, "Serial line and monitors"),
        (Self::Update, "Live update"),
        (Self::Process, "Process"),
    ];
}

pub(super) const fn property(name: &'static str, metavar: &'static str, help: &'static str) -> Property {
    Property { name, metavar, help }
}

const LEGACY_CHARDEV: &str = "stdio|unix:PATH[,server=on][,wait=off]|file:PATH|null|none|mon:...|chardev:ID";

/// Every option.
pub(super) const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        names: &["machine", "M"],
        metavar: Some("[type=]TYPE[,PROPERTY=VALUE...]"),
        group: Group::Machine,
        help: "Set type and properties of the machine. May be repeated; later properties add to earlier ones.",
        properties: &[
            property("type", "TYPE|help", "the machine type; microvm is the newest, help lists all"),
            property("memory-backend", "ID", "the -object that is the guest's RAM"),
            property(
                "aux-ram-share",
                "on|off",
                "share memory beside the RAM, too; accepted for QEMU's sake, this machine has none",
            ),
            property("accel", "kvm", "the accelerator; there is one"),
        ],
        action: Action::Apply(machine),
    },
    OptionSpec {
        names: &["accel"],
        metavar: Some("kvm"),
        group: Group::Machine,
        help: "Set the accelerator; there is one.",
        properties: &[property("accel", "kvm", "the accelerator")],
        action: Action::Apply(accel),
    },
    OptionSpec {
        names: &["cpu"],
        metavar: Some("host"),
        group: Group::Machine,
        help: "Set the CPU model; there is one: the host's, as far as KVM can virtualise it.",
        properties: &[],
        action: Action::Apply(cpu),
    },
    OptionSpec {
        names: &["smp"],
        metavar: Some("[cpus=]N"),
        group: Group::Machine,
        help: "Set the number of vCPUs, 1 (the default) to 64.",
        properties: &[
            property("cpus", "N", "the number of vCPUs"),
            property("maxcpus", "N", "must equal the number of vCPUs: none can be added later"),
            property("sockets", "N", "sockets; sockets * cores * threads must be the number of vCPUs"),
            property("cores", "N", "cores in a socket"),
            property("threads", "N", "threads of a core"),
        ],
        action: Action::Apply(smp),
    },
    OptionSpec {
        names: &["m"],
        metavar: Some("[size=]SIZE"),
        group: Group::Machine,
        help: "Set the size of the RAM, in MiB without a suffix K, M, G or T (default 128M, or that of the memory \
               backend). RAM without a memory backend is private: updates in place are refused.",
        properties: &[property("size", "SIZE", "the size")],
        action: Action::Apply(memory),
    },
    OptionSpec {
        names: &["object"],
        metavar: Some("TYPE,id=ID[,PROPERTY=VALUE...]"),
        group: Group::Machine,
        help: "Define a memory backend: memory-backend-memfd (shared, survives every update), memory-backend-file \
               (survives with share=on) or memory-backend-ram; or a source of randomness: rng-builtin or rng-random. \
               Also as JSON: '{\"qom-type\": TYPE, \"id\": ID, ...}'.",
        properties: &[
            property("qom-type", "TYPE", "the type, if it does not stand first"),
            property("id", "ID", "its id"),
            property("size", "SIZE", "the size, in bytes without a suffix"),
            property("share", "on|off", "map it shared (default: on for memfd, else off)"),
            property("hugetlb", "on|off", "memfd: use huge pages"),
            property("hugetlbsize", "SIZE", "memfd: size of a huge page"),
            property("mem-path", "PATH", "file: the file"),
            property(
                "filename",
                "PATH",
                "rng-random: the file, a character device or a pipe (default: /dev/urandom)",
            ),
        ],
        action: Action::Apply(object),
    },
    OptionSpec {
        names: &["name"],
        metavar: Some("[guest=]NAME"),
        group: Group::Machine,
        help: "Name the guest.",
        properties: &[property("guest", "NAME", "the name")],
        action: Action::Apply(|builder, option, value| {
            for pair in pairs(option, value, Some("guest"))? {
                builder.name = Some(pair.value);
            }
            Ok(())
        }),
    },
    OptionSpec {
        names: &["uuid"],
        metavar: Some("UUID"),
        group: Group::Machine,
        help: "Set the guest's UUID.",
        properties: &[],
        action: Action::Apply(|builder, _, value| {
            let uuid = Uuid::parse_str(value)
                .map_err(|_| format!("'{value}' is no UUID (xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx)"))?;
            builder.uuid = Some(uuid);
            Ok(())
        }),
    },
    OptionSpec {
        names: &["kernel"],
        metavar: Some("FILE"),
        group: Group::Boot,
        help: "Boot this kernel: an ELF file with a PVH entry, or a bzImage. Without it the built-in payload boots.",
        properties: &[],
        action: Action::Apply(|builder, _, value| {
            builder.boot.kernel = Some(path(value)?);
            Ok(())
        }),
    },
    OptionSpec {
        names: &["append"],
        metavar: Some("TEXT"),
        group: Group::Boot,
        help: "Pass a command line to the kernel or payload.",
        properties: &[],
        action: Action::Apply(|builder, _, value| {
            builder.boot.append = Some(value.to_owned());
            Ok(())
        }),
    },
    OptionSpec {
        names: &["initrd"],
        metavar: Some("FILE"),
        group: Group::Boot,
        help: "Pass an initial RAM disk to the kernel.",
        properties: &[],
        action: Action::Apply(|builder, _, value| {
            builder.boot.initrd = Some(path(value)?);
            Ok(())
        }),
    },
    OptionSpec {
        names: &["S"],
        metavar: None,
        group: Group::Boot,
        help: "Do not run the guest before the monitor command 'cont'.",
        properties: &[],
        action: Action::Apply(|builder, _, _| {
            builder.start_paused = true;
            Ok(())
        }),
    },
    OptionSpec {
        names: &["no-reboot"],
        metavar: None,
        group: Group::Boot,
        help: "End where the guest asks for a reset.",
        properties: &[],
        action: Action::Apply(|builder, _, _| {
            builder.no_reboot = true;
            Ok(())
        }),
    },
    OptionSpec {
        names: &["drive"],
        metavar: Some("file=FILE,format=raw[,PROPERTY=VALUE...]"),
        group: Group::Devices,
        help: "Define an image: a disk by itself, or with if=none for a -device that names its id. Images are raw and \
               never probed.",
        properties: &[
            property("file", "FILE", "the image; required"),
            property("format", "raw", "the format; required"),
            property("driver", "raw", "another name of format"),
            property("id", "ID", "its id"),
            property("if", "virtio|none", "with a virtio-blk-pci of its own (the default), or without"),
            property("readonly", "on|off", "never write to it (default: off)"),
            property("read-only", "on|off", "another name of readonly"),
            property("cache", "MODE", "writeback (the default), writethrough or unsafe"),
            property("cache.direct", "off", "images go through the page cache"),
            property("cache.no-flush", "on|off", "ignore flushes"),
            property("cache.writeback", "on|off", "let the guest flush, rather than after each write"),
            property("aio", "threads|io_uring", "how to do it (default: io_uring if the host has it)"),
            property("discard", "ignore|unmap", "give back what the guest discards (default: ignore)"),
            property("detect-zeroes", "off", "it does not look for zeroes"),
            property("file.locking", "auto|on|off", "lock the image against other programs (default: auto)"),
            property("serial", "TEXT", "serial number of the disk, unless its device has one"),
            property("media", "disk", "the kind; there is one"),
            property("snapshot", "off", "writes go to the image"),
            property("werror", "report", "the guest is told of a failed write"),
            property("rerror", "report", "the guest is told of a failed read"),
        ],
        action: Action::Apply(drive),
    },
    OptionSpec {
        names: &["blockdev"],
        metavar: Some("DRIVER,node-name=NAME[,PROPERTY=VALUE...]"),
        group: Group::Devices,
        help: "Define an image as a node of driver raw, with its file inside (file.driver=file,file.filename=FILE) or \
               by name (file=NODE), or as a node of driver file (filename=FILE). Also as JSON.",
        properties: &[
            property("driver", "raw|file", "the driver, if it does not stand first"),
            property("node-name", "NAME", "its name; required"),
            property("file", "NODE", "raw: the node of its file"),
            property("filename", "FILE", "file: the file"),
            property("read-only", "on|off", "never write to it (default: off)"),
            property("auto-read-only", "off", "it is opened as it was asked for"),
            property("cache.direct", "off", "images go through the page cache"),
            property("cache.no-flush", "on|off", "ignore flushes (default: off)"),
            property("discard", "ignore|unmap", "give back what the guest discards (default: ignore)"),
            property("detect-zeroes", "off", "it does not look for zeroes"),
            property("locking", "auto|on|off", "file: lock it against other programs (default: auto)"),
            property("aio", "threads|io_uring", "file: how to do it (default: io_uring if the host has it)"),
            property("file.driver", "file", "raw: the driver of its file"),
            property("file.filename", "FILE", "raw: the file"),
            property("file.locking", "auto|on|off", "raw: as locking"),
            property("file.aio", "threads|io_uring", "raw: as aio"),
            property("file.read-only", "on|off", "raw: must equal read-only"),
            property("file.auto-read-only", "on|off", "raw: accepted and ignored"),
            property("file.cache.direct", "off", "raw: as cache.direct"),
            property("file.cache.no-flush", "on|off", "raw: default as cache.no-flush"),
            property("file.discard", "ignore|unmap", "raw: as the node above (default: unmap)"),
            property("file.detect-zeroes", "off", "raw: as detect-zeroes"),
        ],
        action: Action::Apply(blockdev),
    },
    OptionSpec {
        names: &["netdev"],
        metavar: Some("tap,id=ID,ifname=NAME|fd=N|fds=N:M...[,PROPERTY=VALUE...]"),
        group: Group::Devices,
        help: "Define a tap device of the host, for a -device that names its id. Also as JSON.",
        properties: &[
            property("type", "tap", "the kind, if it does not stand first"),
            property("id", "ID", "its id; required"),
            property("ifname", "NAME", "its name on the host"),
            property(
                "fd",
                "N",
                "its descriptor, inherited by this program; with an update it comes by itself",
            ),
            property("fds", "N:M...", "the same with a descriptor for each queue"),
            property("queues", "N", "ifname: queues, 1 to 64 (default: 1)"),
            property("vnet_hdr", "on", "packets have headers"),
            property("script", "no", "no script is run"),
            property("downscript", "no", "no script is run"),
            property("vhost", "on|off", "the kernel carries the packets, not this program (default: off)"),
            property("vhostfd", "N", "on, by this inherited descriptor of /dev/vhost-net"),
            property("vhostfds", "N:M...", "the same with a descriptor for each queue"),
        ],
        action: Action::Apply(netdev),
    },
    OptionSpec {
        names: &["nic"],
        metavar: Some("tap,ifname=NAME|fd=N|fds=N:M...[,PROPERTY=VALUE...]|none"),
        group: Group::Devices,
        help: "Same as -netdev and a -device virtio-net-pci for it. none: no network, which is the default.",
        properties: &[
            property("type", "tap", "the kind, if it does not stand first"),
            property("id", "ID", "id of the netdev (default: nic0, nic1, ...)"),
            property("model", "virtio-net-pci", "the model; there is one"),
            property("mac", "ADDRESS", "address of the interface"),
            property("ifname", "NAME", "as in -netdev"),
            property("fd", "N", "as in -netdev"),
            property("fds", "N:M...", "as in -netdev"),
            property("queues", "N", "as in -netdev"),
            property("vnet_hdr", "on", "as in -netdev"),
            property("script", "no", "as in -netdev"),
            property("downscript", "no", "as in -netdev"),
            property("vhost", "on|off", "as in -netdev"),
            property("vhostfd", "N", "as in -netdev"),
            property("vhostfds", "N:M...", "as in -netdev"),
        ],
        action: Action::Apply(nic),
    },
    OptionSpec {
        names: &["device"],
        metavar: Some("MODEL[,PROPERTY=VALUE...]"),
        group: Group::Devices,
        help: "Add a device: virtio-blk-pci, virtio-net-pci, virtio-rng-pci, virtio-serial-pci, or a virtconsole of the \
               latter. 'help' lists models, 'MODEL,help' properties. Also as JSON: '{\"driver\": MODEL, ...}'.",
        properties: &[property("driver", "MODEL", "the model, if it does not stand first")],
        action: Action::Apply(device),
    },
    OptionSpec {
        names: &["serial"],
        metavar: Some(LEGACY_CHARDEV),
        group: Group::FrontEnds,
        help: "Connect the serial line COM1 (default: null). mon:stdio shares the terminal with a monitor; Ctrl-a c \
               switches, Ctrl-a h helps.",
        properties: &[],
        action: Action::Apply(serial),
    },
    OptionSpec {
        names: &["monitor"],
        metavar: Some(LEGACY_CHARDEV),
        group: Group::FrontEnds,
        help: "Offer a monitor for people, HMP (default: none).",
        properties: &[],
        action: Action::Apply(|builder, _, value| monitor(builder, "-monitor", MonitorKind::Hmp, value)),
    },
    OptionSpec {
        names: &["qmp"],
        metavar: Some(LEGACY_CHARDEV),
        group: Group::FrontEnds,
        help: "Offer a monitor for programs, QMP. May be repeated.",
        properties: &[],
        action: Action::Apply(|builder, _, value| monitor(builder, "-qmp", MonitorKind::Qmp, value)),
    },
    OptionSpec {
        names: &["mon"],
        metavar: Some("[chardev=]ID[,mode=readline|control]"),
        group: Group::FrontEnds,
        help: "Offer a monitor on a -chardev. May be repeated.",
        properties: &[
            property("chardev", "ID", "the character device"),
            property("mode", "readline|control", "HMP (the default) or QMP"),
        ],
        action: Action::Apply(mon),
    },
    OptionSpec {
        names: &["chardev"],
        metavar: Some("BACKEND,id=ID[,PROPERTY=VALUE...]"),
        group: Group::FrontEnds,
        help: "Define a character device: stdio, socket (unix), file or null.",
        properties: &[
            property("backend", "BACKEND", "the kind, if it does not stand first"),
            property("id", "ID", "its id"),
            property("mux", "on|off", "let several front ends share it, switched by Ctrl-a c"),
            property("signal", "on|off", "stdio: Ctrl-c ends the program (default: on)"),
            property("path", "PATH", "socket, file: where"),
            property("server", "on|off", "socket: listen rather than connect (default: off)"),
            property("wait", "on|off", "socket: with server, start only with the first client (default: on)"),
        ],
        action: Action::Apply(chardev),
    },
    OptionSpec {
        names: &["display"],
        metavar: Some("none"),
        group: Group::FrontEnds,
        help: "Set the display; there is none.",
        properties: &[],
        action: Action::Apply(|_, _, value| match value {
            "none" => Ok(()),
            _ => Err(format!("'{value}' is not supported (supported: none)")),
        }),
    },
    OptionSpec {
        names: &["nographic"],
        metavar: None,
        group: Group::FrontEnds,
        help: "Same as -serial mon:stdio, unless -serial or -monitor say otherwise.",
        properties: &[],
        action: Action::Apply(|builder, _, _| {
            builder.nographic = true;
            Ok(())
        }),
    },
    OptionSpec {
        names: &["nodefaults"],
        metavar: None,
        group: Group::FrontEnds,
        help: "Create no serial line or monitor that was not asked for.",
        properties: &[],
        action: Action::Apply(|builder, _, _| {
            builder.nodefaults = true;
            Ok(())
        }),
    },
    OptionSpec {
        names: &["incoming"],
        metavar: Some("defer|file:PATH[,offset=N]|memfd:|unix:PATH|CHANNEL"),
        group: Group::Update,
        help: "Load the machine from there instead of booting it, in a program that an update starts or from a file \
               that cpr-reboot wrote; defer: wait for the monitor command 'migrate_incoming'. CHANNEL is QMP's form, \
               as JSON or \
               main,addr.transport=file,addr.filename=PATH. Given once more for cpr-transfer, with the socket to wait \
               at for the running program: cpr,addr.transport=socket,addr.type=unix,addr.path=PATH.",
        properties: &[],
        action: Action::Apply(incoming),
    },
    OptionSpec {
        names: &["pidfile"],
        metavar: Some("FILE"),
        group: Group::Process,
        help: "Write the process id to FILE.",
        properties: &[],
        action: Action::Apply(|builder, _, value| {
            builder.pidfile = Some(path(value)?);
            Ok(())
        }),
    },
    OptionSpec {
        names: &["sandbox"],
        metavar: Some("on|off[,PROPERTY=VALUE...]"),
        group: Group::Process,
        help: "Do without system calls that a virtual machine does not need (default: off). May be repeated: what one \
               of them denies is denied. What is denied stays denied over an update by cpr-exec.",
        properties: &[
            property("enable", "on|off", "deny calls that change the host"),
            property("obsolete", "allow|deny", "calls that nothing uses (default: deny)"),
            property(
                "elevateprivileges",
                "allow|deny|children",
                "calls that set user, group, session (allow)",
            ),
            property("spawn", "allow|deny", "calls that start a program (allow); cpr-exec does"),
            property("resourcecontrol", "allow|deny", "calls that set priority and affinity (allow)"),
        ],
        action: Action::Apply(sandbox),
    },
    OptionSpec {
        names: &["trace"],
        metavar: Some("[enable=]PATTERN[,file=FILE]"),
        group: Group::Process,
        help: "Trace what matches PATTERN. May be repeated.",
        properties: &[
            property("enable", "PATTERN", "what to trace"),
            property("file", "FILE", "where the trace goes (default: where the log goes)"),
        ],
        action: Action::Apply(trace),
    },
    OptionSpec {
        names: &["D"],
        metavar: Some("FILE"),
        group: Group::Process,
        help: "Write the log to FILE instead of standard error.",
        properties: &[],
        action: Action::Apply(|builder, _, value| {
            builder.trace.log_file = Some(path(value)?);
            Ok(())
        }),
    },
    OptionSpec {
        names: &["no-user-config"],
        metavar: None,
        group: Group::Process,
        help: "Read no configuration file. There is none; for compatibility.",
        properties: &[],
        action: Action::Apply(|_, _, _| Ok(())),
    },
    OptionSpec {
        names: &["version"],
        metavar: None,
        group: Group::Process,
        help: "Show the version.",
        properties: &[],
        action: Action::Version,
    },
    OptionSpec {
        names: &["help", "h"],
        metavar: None,
        group: Group::Process,
        help: "Show this help.",
        properties: &[],
        action: Action::Help,
    },
];

/// Splits an option's value and refuses properties that its table row does not list.
fn pairs(option: &OptionSpec, value: &str, implied: Option<&str>) -> Result<Vec<Pair>, String> {
    let is_known = |key: &str| option.properties.iter().any(|property| property.name == key);
    let pairs = keyval::parse(value, implied, &is_known);
    match pairs.iter().find(|pair| !is_known(&pair.key)) {
        Some(pair) => Err(unknown_property(&pair.key, &names(option))),
        None => Ok(pairs),
    }
}

fn names(option: &OptionSpec) -> Vec<&'static str> {
    option.properties.iter().map(|property| property.name).collect()
}

pub(super) fn path(value: &str) -> Result<PathBuf, String> {
    if value.is_empty() || value.contains('\0') {
        Err("a path must not be empty".into())
    } else {
        Ok(value.into())
    }
}

/// An id as QEMU's `id_wellformed` has it.
pub(super) fn id(value: &str) -> Result<String, String> {
    let mut chars = value.chars();
    let good = chars.next().is_some_and(|first| first.is_ascii_alphabetic())
        && chars.all(|char| char.is_ascii_alphanumeric() || "-._".contains(char));
    if good {
        return Ok(value.to_owned());
    }
    Err(format!("id '{value}' is malformed (letters, digits, '-', '.' and '_', a letter first)"))
}

/// Puts the property's name before what is wrong with its value.
pub(super) fn of<T>(key: &str, result: Result<T, String>) -> Result<T, String> {
    result.map_err(|reason| format!("property '{key}': {reason}"))
}

fn accelerator(value: &str) -> Result<(), String> {
    match value {
        "kvm" => Ok(()),
        _ => Err(format!("accelerator '{value}' is not supported (supported: kvm)")),
    }
}

/// The machine type of this name; `None` for whichever fits.
fn machine_type(name: &str) -> Result<Option<MachineType>, String> {
    if name == MachineType::ALIAS {
        return Ok(None);
    }
    MachineType::find(name).map(Some).ok_or_else(|| {
        let (alias, known) = (MachineType::ALIAS, MachineType::known());
        format!("machine type '{name}' is not supported (supported: {alias}, {known})")
    })
}

/// What `-machine help` prints.
fn machine_types() -> String {
    let newest = MachineType::newest().name();
    let mut out = "Supported machines are:\n".to_owned();
    out += &format!("{:<20} alias of {newest}, the default\n", MachineType::ALIAS);
    for known in MACHINE_TYPES.iter().rev() {
        out += known.name();
        out.push('\n');
    }
    out
}

fn machine(builder: &mut Builder, option: &OptionSpec, value: &str) -> Result<(), String> {
    for Pair { key, value } in pairs(option, value, Some("type"))? {
        match key.as_str() {
            "type" if value == "help" || value == "?" => builder.text = Some(machine_types()),
            "type" => builder.machine_type = machine_type(&value)?,
            "memory-backend" => builder.memory_backend = Some(of(&key, id(&value))?),
            "aux-ram-share" => builder.aux_ram_share = of(&key, parse_switch(&value))?,
            _ => accelerator(&value)?,
        }
    }
    Ok(())
}

fn accel(_: &mut Builder, option: &OptionSpec, value: &str) -> Result<(), String> {
    let pairs = pairs(option, value, Some("accel"))?;
    if pairs.is_empty() {
        return accelerator("");
    }
    pairs.iter().try_for_each(|pair| accelerator(&pair.value))
}

fn cpu(_: &mut Builder, _: &OptionSpec, value: &str) -> Result<(), String> {
    match value {
        "host" => Ok(()),
        _ => Err(format!("CPU model '{value}' is not supported (supported: host, without features)")),
    }
}

fn smp(builder: &mut Builder, option: &OptionSpec, value: &str) -> Result<(), String> {
    for Pair { key, value } in pairs(option, value, Some("cpus"))? {
        let count = value
            .parse::<u32>()
            .ok()
            .filter(|count| (1..=u32::from(MAX_CPUS)).contains(count))
            .ok_or_else(|| format!("property '{key}': '{value}' is no number from 1 to {MAX_CPUS}"))?;
        let smp = &mut builder.smp;
        let field = match key.as_str() {
            "cpus" => &mut smp.cpus,
            "maxcpus" => &mut smp.maxcpus,
            "sockets" => &mut smp.sockets,
            "cores" => &mut smp.cores,
            _ => &mut smp.threads,
        };
        *field = Some(count);
    }
    Ok(())
}

fn memory(builder: &mut Builder, option: &OptionSpec, value: &str) -> Result<(), String> {
    for Pair { key, value } in pairs(option, value, Some("size"))? {
        builder.memory_bytes = Some(of(&key, parse_size(&value, 1 << 20))?);
    }
    Ok(())
}

fn object(builder: &mut Builder, option: &OptionSpec, value: &str) -> Result<(), String> {
    let pairs = typed_pairs(value, "qom-type", &names(option))?;
    let kind = pairs.iter().rfind(|pair| pair.key == "qom-type").map(|pair| pair.value.clone());
    match kind.as_deref() {
        Some("rng-builtin") => rng_object(builder, pairs, false),
        Some("rng-random") => rng_object(builder, pairs, true),
        _ => memory_object(builder, pairs),
    }
}

fn rng_object(builder: &mut Builder, pairs: Vec<Pair>, is_file: bool) -> Result<(), String> {
    let known: &[&str] = if is_file { &["qom-type", "id", "filename"] } else { &["qom-type", "id"] };
    let mut given = Given::new(pairs, known)?;
    let id = given.id()?.ok_or("property 'id' is missing")?;
    let source = match is_file {
        true => RngSource::File(given.path("filename")?.unwrap_or_else(|| "/dev/urandom".into())),
        false => RngSource::Builtin,
    };
    builder.add_rng(id, source)
}

fn memory_object(builder: &mut Builder, pairs: Vec<Pair>) -> Result<(), String> {
    let mut object = Object::default();
    for Pair { key, value } in pairs {
        match key.as_str() {
            "qom-type" => {
                object.kind = Some(match value.as_str() {
                    "memory-backend-memfd" => ObjectKind::Memfd,
                    "memory-backend-file" => ObjectKind::File,
                    "memory-backend-ram" => ObjectKind::Ram,
                    _ => {
                        return Err(format!(
                            "object type '{value}' is not supported (supported: memory-backend-memfd, \
                             memory-backend-file, memory-backend-ram, rng-builtin, rng-random)"
                        ));
                    }
                });
            }
            "id" => object.id = id(&value)?,
            "size" => object.size_bytes = Some(of(&key, parse_size(&value, 1))?),
            "share" => object.share = Some(of(&key, parse_switch(&value))?),
            "hugetlb" => object.hugetlb = Some(of(&key, parse_switch(&value))?),
            "hugetlbsize" => object.huge_page_bytes = Some(of(&key, parse_size(&value, 1))?),
            "filename" => return Err("property 'filename' is for rng-random only".into()),
            _ => object.path = Some(of(&key, path(&value))?),
        }
    }
    builder.add_object(object)
}

/// The properties of something that also has a form in JSON: names are checked against `known`.
fn typed_pairs(value: &str, implied: &str, known: &[&str]) -> Result<Vec<Pair>, String> {
    let pairs = match value.starts_with('{') {
        true => json_pairs(value)?,
        false => keyval::parse(value, Some(implied), &|key| known.contains(&key)),
    };
    match pairs.iter().find(|pair| !known.contains(&pair.key.as_str())) {
        Some(pair) => Err(unknown_property(&pair.key, known)),
        None => Ok(pairs),
    }
}

fn drive(builder: &mut Builder, option: &OptionSpec, value: &str) -> Result<(), String> {
    let given = Given::new(pairs(option, value, None)?, &names(option))?;
    let drive = block::drive(given, || builder.blocks.next_id())?;
    if let Some(serial) = &drive.serial {
        of("serial", device::check_serial(serial))?;
    }
    let (id, has_device) = (drive.config.id.clone(), drive.has_device);
    builder.blocks.add(Block::Drive(drive))?;
    if has_device {
        builder.wanted.add_disk(&id);
    }
    Ok(())
}

fn blockdev(builder: &mut Builder, option: &OptionSpec, value: &str) -> Result<(), String> {
    let names = names(option);
    let given = Given::new(typed_pairs(value, "driver", &names)?, &names)?;
    builder.blocks.add(Block::Node(block::blockdev(given)?))
}

fn netdev(builder: &mut Builder, option: &OptionSpec, value: &str) -> Result<(), String> {
    let names = names(option);
    let given = Given::new(typed_pairs(value, "type", &names)?, &names)?;
    builder.netdevs.add(netdev::netdev(given)?)
}

fn nic(builder: &mut Builder, option: &OptionSpec, value: &str) -> Result<(), String> {
    if value == "none" {
        return Ok(());
    }
    let mut pairs = pairs(option, value, Some("type"))?;
    if pairs.iter().all(|pair| pair.key != "id") {
        pairs.push(Pair { key: "id".into(), value: builder.next_nic_id() });
    }
    let mut given = Given::new(pairs, &names(option))?;
    given.only("model", &["virtio-net-pci", "virtio-net", "virtio"])?;
    let mac = given.text("mac").map(|text| of("mac", device::mac(&text))).transpose()?;
    let netdev = netdev::netdev(given)?;
    let id = netdev.id.clone();
    builder.netdevs.add(netdev)?;
    builder.wanted.add_nic(&id, mac);
    Ok(())
}

fn device(builder: &mut Builder, _: &OptionSpec, value: &str) -> Result<(), String> {
    let pairs = match value.starts_with('{') {
        true => json_pairs(value)?,
        false => keyval::parse(value, Some("driver"), &|key| models::is_property(key)),
    };
    builder.text = builder.wanted.add(pairs)?;
    Ok(())
}

fn chardev(builder: &mut Builder, option: &OptionSpec, value: &str) -> Result<(), String> {
    let (mut kind, mut chardev_id, mut mux) = (None, None, false);
    let mut rest = Vec::new();
    for pair in pairs(option, value, Some("backend"))? {
        match pair.key.as_str() {
            "backend" => kind = Some(pair.value),
            "id" => chardev_id = Some(id(&pair.value)?),
            "mux" => mux = of("mux", parse_switch(&pair.value))?,
            _ => rest.push(pair),
        }
    }
    let kind = kind.ok_or("the backend must be named (supported: stdio, socket, file, null)")?;
    let chardev_id = chardev_id.ok_or("property 'id' is missing")?;
    let backend = chardev_backend(&kind, rest)?;
    builder.add_chardev("-chardev", chardev_id, backend, mux)
}

/// Makes a backend of its kind and the properties that depend on it.
fn chardev_backend(kind: &str, pairs: Vec<Pair>) -> Result<ChardevBackend, String> {
    let known: &[&str] = match kind {
        "stdio" => &["signal"],
        "socket" => &["path", "server", "wait"],
        "file" => &["path"],
        "null" => &[],
        _ => {
            return Err(format!("backend '{kind}' is not supported (supported: stdio, socket, file, null)"));
        }
    };
    let (mut at, mut server, mut wait, mut signal) = (None, false, None, true);
    for Pair { key, value } in pairs {
        if !known.contains(&key.as_str()) {
            let known = if known.is_empty() { &["none"] } else { known };
            return Err(format!("backend '{kind}': {}", unknown_property(&key, known)));
        }
        match key.as_str() {
            "path" => at = Some(of(&key, path(&value))?),
            "server" => server = of(&key, parse_switch(&value))?,
            "wait" => wait = Some(of(&key, parse_switch(&value))?),
            _ => signal = of(&key, parse_switch(&value))?,
        }
    }
    let at = at.ok_or_else(|| format!("backend '{kind}': property 'path' is missing"));
    Ok(match kind {
        "stdio" => ChardevBackend::Stdio { signal },
        "file" => ChardevBackend::File { path: at? },
        "null" => ChardevBackend::Null,
        _ => {
            let path = at?;
            // sun_path of unix(7) holds 108 bytes, one of them the closing zero.
            if path.as_os_str().len() > 107 {
                return Err(format!("socket path '{}' is longer than 107 bytes", path.display()));
            }
            if wait.is_some() && !server {
                return Err("property 'wait' makes sense with server=on only".into());
            }
            ChardevBackend::Socket { path, server, wait: server && wait.unwrap_or(true) }
        }
    })
}

/// What `-serial`, `-monitor` and `-qmp` take: a short form of a character device.
enum Short {
    None,
    Existing(String),
    New { backend: ChardevBackend, mux: bool },
}

fn short_chardev(value: &str) -> Result<Short, String> {
    let (mux, text) = match value.strip_prefix("mon:") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let backend = match text.split_once(':').unwrap_or((text, "")) {
        ("none", "") if !mux => return Ok(Short::None),
        ("chardev", name) if !mux => return Ok(Short::Existing(id(name)?)),
        // A monitor on the terminal makes Ctrl-c a key for the guest.
        ("stdio", "") => ChardevBackend::Stdio { signal: !mux },
        ("null", "") => ChardevBackend::Null,
        ("file", at) => ChardevBackend::File { path: path(at)? },
        ("unix", rest) => {
            let known = |key: &str| ["path", "server", "wait"].contains(&key);
            chardev_backend("socket", keyval::parse(rest, Some("path"), &known))?
        }
        _ => {
            return Err(format!(
                "'{value}' is not supported (supported: stdio, unix:PATH, file:PATH, null, none, mon:..., chardev:ID)"
            ));
        }
    };
    Ok(Short::New { backend, mux })
}

fn serial(builder: &mut Builder, _: &OptionSpec, value: &str) -> Result<(), String> {
    if builder.serial_given {
        return Err(format!("'{value}': there is one serial line, and -serial was given already"));
    }
    builder.serial_given = true;
    builder.serial = match short_chardev(value)? {
        Short::None => None,
        Short::Existing(id) => Some(id),
        Short::New { backend, mux } => {
            builder.add_chardev("-serial", "serial0".into(), backend, mux)?;
            if mux {
                builder.add_monitor("-serial", MonitorKind::Hmp, "serial0".into());
            }
            Some("serial0".into())
        }
    };
    Ok(())
}

fn monitor(
    builder: &mut Builder,
    option: &'static str,
    kind: MonitorKind,
    value: &str,
) -> Result<(), String> {
    builder.monitor_given = true;
    match short_chardev(value)? {
        Short::None => {}
        Short::Existing(id) => builder.add_monitor(option, kind, id),
        Short::New { backend, mux } => {
            let id = builder.next_monitor_id();
            builder.add_chardev(option, id.clone(), backend, mux)?;
            builder.add_monitor(option, kind, id);
        }
    }
    Ok(())
}

fn mon(builder: &mut Builder, option: &OptionSpec, value: &str) -> Result<(), String> {
    let (mut chardev, mut kind) = (None, MonitorKind::Hmp);
    for Pair { key, value } in pairs(option, value, Some("chardev"))? {
        match (key.as_str(), value.as_str()) {
            ("chardev", _) => chardev = Some(id(&value)?),
            (_, "readline") => kind = MonitorKind::Hmp,
            (_, "control") => kind = MonitorKind::Qmp,
            _ => return Err(format!("mode '{value}' is not supported (supported: readline, control)")),
        }
    }
    let chardev = chardev.ok_or("property 'chardev' is missing")?;
    builder.monitor_given = true;
    builder.add_monitor("-mon", kind, chardev);
    Ok(())
}

fn incoming(builder: &mut Builder, _: &OptionSpec, value: &str) -> Result<(), String> {
    let is_uri = value.split_once(':').is_some_and(|(scheme, _)| {
        scheme.starts_with(|first: char| first.is_ascii_alphabetic())
            && scheme.chars().all(|char| char.is_ascii_alphanumeric() || "+-.".contains(char))
    });
    let channel = if value == "defer" {
        None
    } else if value.starts_with('{') {
        let json = serde_json::from_str(value).map_err(|why| format!("bad JSON: {why}"))?;
        Some(TypedChannel::from_json(json, ""))
    } else if is_uri || !value.contains(['=', ',']) {
        Some(Channel::from_uri(value).map(TypedChannel::Main))
    } else {
        Some(TypedChannel::from_json(dotted(value)?, ""))
    };
    let given_before = match channel.transpose().map_err(|error| error.to_string())? {
        None => builder.incoming.replace(Incoming::Defer).is_some(),
        Some(TypedChannel::Main(channel)) => builder.incoming.replace(Incoming::Channel(channel)).is_some(),
        Some(TypedChannel::Cpr(address)) => {
            if builder.incoming_cpr.replace(address).is_some() {
                return Err(format!("'{value}': there is one cpr channel, and it was given already"));
            }
            false
        }
    };
    if given_before {
        return Err(format!("'{value}': given twice, but a machine comes from one place"));
    }
    Ok(())
}

/// A channel in dotted form as the JSON that it stands for.
fn dotted(text: &str) -> Result<Value, String> {
    let mut channel = Map::new();
    let mut addr = Map::new();
    for Pair { key, value } in keyval::parse(text, Some("channel-type"), &|_| false) {
        match key.strip_prefix("addr.") {
            Some("offset") => addr.insert("offset".into(), of(&key, parse_size(&value, 1))?.into()),
            Some(inner) => addr.insert(inner.into(), value.into()),
            None => channel.insert(key, value.into()),
        };
    }
    channel.insert("addr".into(), addr.into());
    Ok(channel.into())
}

fn sandbox(builder: &mut Builder, option: &OptionSpec, value: &str) -> Result<(), String> {
    let mut enable = None;
    let mut denied = SandboxConfig::default();
    for Pair { key, value } in pairs(option, value, Some("enable"))? {
        let field = match key.as_str() {
            "enable" => {
                enable = Some(of(&key, parse_switch(&value))?);
                continue;
            }
            "obsolete" => &mut denied.obsolete,
            "elevateprivileges" => &mut denied.elevate_privileges,
            "spawn" => &mut denied.spawn,
            _ => &mut denied.resource_control,
        };
        *field = match (value.as_str(), key.as_str()) {
            ("deny", _) | ("children", "elevateprivileges") => true,
            ("allow", _) => false,
            (_, "elevateprivileges") => {
                return Err(format!("property '{key}': '{value}' is not allow, deny or children"));
            }
            _ => return Err(format!("property '{key}': '{value}' is neither allow nor deny")),
        };
    }
    match enable {
        None => return Err("on or off must be said, as in on,spawn=deny".into()),
        Some(true) => builder.sandbox = Some(builder.sandbox.map_or(denied, |other| other.and(denied))),
        Some(false) => {}
    }
    Ok(())
}

fn trace(builder: &mut Builder, option: &OptionSpec, value: &str) -> Result<(), String> {
    for Pair { key, value } in pairs(option, value, Some("enable"))? {
        match key.as_str() {
            "file" => builder.trace.file = Some(of(&key, path(&value))?),
            _ => builder.trace.patterns.push(value),
        }
    }
    Ok(())
}
