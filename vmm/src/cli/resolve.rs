//! From single options to a whole [`Config`]: defaults, references, and what concerns several options at once.

use std::path::PathBuf;

use uuid::Uuid;

use super::block::Blocks;
use super::config::{
    BootConfig, ChardevBackend, ChardevConfig, Config, DeviceConfig, HugePages, Incoming, MachineConfig,
    MachineType, MemoryBackend, MemoryConfig, MonitorConfig, MonitorKind, RngSource, SandboxConfig,
    TraceConfig,
};
use super::device::{Backends, Rngs, Wanted};
use super::given::known;
use super::keyval::show_size;
use super::netdev::Netdevs;
use super::{DEFAULT_MEMORY_BYTES, MAX_CPUS};
use crate::monitor::{Channel, SocketAddress};

/// Id of the RAM that no memory backend was named for, as QEMU's microvm machine calls it.
const DEFAULT_MEMORY_ID: &str = "microvm.ram";

/// Guest memory comes in pages of this many bytes.
const PAGE_BYTES: u64 = 4096;

/// An error that concerns an option as a whole: the option, and the reason.
type Failure = (&'static str, String);

/// What the options said so far.
#[derive(Debug, Default)]
pub(super) struct Builder {
    /// A text that was asked for instead of a machine.
    pub(super) text: Option<String>,
    pub(super) machine_type: Option<MachineType>,
    pub(super) memory_backend: Option<String>,
    pub(super) aux_ram_share: bool,
    pub(super) smp: Smp,
    pub(super) memory_bytes: Option<u64>,
    pub(super) name: Option<String>,
    pub(super) uuid: Option<Uuid>,
    pub(super) boot: BootConfig,
    pub(super) start_paused: bool,
    pub(super) no_reboot: bool,
    pub(super) nographic: bool,
    pub(super) nodefaults: bool,
    pub(super) serial: Option<String>,
    pub(super) serial_given: bool,
    pub(super) monitor_given: bool,
    pub(super) incoming: Option<Incoming>,
    pub(super) incoming_cpr: Option<SocketAddress>,
    pub(super) pidfile: Option<PathBuf>,
    pub(super) sandbox: Option<SandboxConfig>,
    pub(super) trace: TraceConfig,
    pub(super) blocks: Blocks,
    pub(super) netdevs: Netdevs,
    pub(super) wanted: Wanted,
    rngs: Rngs,
    /// How many `-nic` there were that named no id.
    nic_ids: usize,
    objects: Vec<Object>,
    chardevs: Vec<ChardevConfig>,
    /// Monitors, each with the option that asked for it.
    monitors: Vec<(&'static str, MonitorConfig)>,
    /// How many monitors got a character device of their own.
    monitor_ids: usize,
}

/// The vCPU topology as given.
#[derive(Debug, Default)]
pub(super) struct Smp {
    pub(super) cpus: Option<u32>,
    pub(super) maxcpus: Option<u32>,
    pub(super) sockets: Option<u32>,
    pub(super) cores: Option<u32>,
    pub(super) threads: Option<u32>,
}

/// A memory backend as given.
#[derive(Debug, Default)]
pub(super) struct Object {
    pub(super) kind: Option<ObjectKind>,
    pub(super) id: String,
    pub(super) size_bytes: Option<u64>,
    pub(super) share: Option<bool>,
    pub(super) hugetlb: Option<bool>,
    pub(super) huge_page_bytes: Option<u64>,
    pub(super) path: Option<PathBuf>,
}

/// The types of memory backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ObjectKind {
    Memfd,
    File,
    Ram,
}

impl Builder {
    /// Adds a memory backend, if it makes sense by itself.
    pub(super) fn add_object(&mut self, object: Object) -> Result<(), String> {
        let kind =
            object.kind.ok_or("the type must be named first, as in memory-backend-memfd,id=ram0,size=1G")?;
        let id = &object.id;
        if id.is_empty() {
            return Err("property 'id' is missing".into());
        }
        self.check_object_id(id)?;
        if object.size_bytes.is_none() {
            return Err(format!("'{id}': property 'size' is missing"));
        }
        if kind != ObjectKind::File && object.path.is_some() {
            return Err(format!("'{id}': property 'mem-path' is for memory-backend-file only"));
        }
        if kind == ObjectKind::File && object.path.is_none() {
            return Err(format!("'{id}': property 'mem-path' is missing"));
        }
        if kind != ObjectKind::Memfd && (object.hugetlb.is_some() || object.huge_page_bytes.is_some()) {
            return Err(format!(
                "'{id}': properties 'hugetlb' and 'hugetlbsize' are for memory-backend-memfd only"
            ));
        }
        if let Some(page_bytes) = object.huge_page_bytes {
            if object.hugetlb != Some(true) {
                return Err(format!("'{id}': property 'hugetlbsize' needs hugetlb=on"));
            }
            if !page_bytes.is_power_of_two() || page_bytes < PAGE_BYTES {
                return Err(format!(
                    "'{id}': property 'hugetlbsize': {} is no page size",
                    show_size(page_bytes)
                ));
            }
        }
        self.objects.push(object);
        Ok(())
    }

    /// Adds a source of randomness.
    pub(super) fn add_rng(&mut self, id: String, source: RngSource) -> Result<(), String> {
        self.check_object_id(&id)?;
        self.rngs.0.push((id, source, false));
        Ok(())
    }

    fn check_object_id(&self, id: &str) -> Result<(), String> {
        let mut ids =
            self.objects.iter().map(|object| &object.id).chain(self.rngs.0.iter().map(|(id, ..)| id));
        match ids.any(|other| other == id) {
            true => Err(format!("id '{id}' is taken by another -object")),
            false => Ok(()),
        }
    }

    /// An id for the netdev of a `-nic` that names none. It is the same with the same command line.
    pub(super) fn next_nic_id(&mut self) -> String {
        let id = format!("nic{}", self.nic_ids);
        self.nic_ids += 1;
        id
    }

    /// Adds a character device that `option` asked for. Its id must be new, and so must its hold on standard input.
    pub(super) fn add_chardev(
        &mut self,
        option: &'static str,
        id: String,
        backend: ChardevBackend,
        mux: bool,
    ) -> Result<(), String> {
        if self.chardevs.iter().any(|other| other.id == id) {
            return Err(format!("id '{id}' is taken by another character device"));
        }
        let is_stdio = |backend: &ChardevBackend| matches!(backend, ChardevBackend::Stdio { .. });
        if is_stdio(&backend)
            && let Some(other) = self.chardevs.iter().find(|other| is_stdio(&other.backend))
        {
            return Err(format!(
                "stdio is in use by '{}' already; share it by -serial mon:stdio, or by a -chardev with mux=on that \
                 both -serial chardev:ID and {option} name",
                other.id
            ));
        }
        self.chardevs.push(ChardevConfig { id, backend, mux });
        Ok(())
    }

    /// Adds a monitor on a character device, which may be defined later.
    pub(super) fn add_monitor(&mut self, option: &'static str, kind: MonitorKind, chardev: String) {
        self.monitors.push((option, MonitorConfig { kind, chardev }));
        self.monitor_given = true;
    }

    /// An id for the character device of the next monitor, as QEMU numbers them.
    pub(super) fn next_monitor_id(&mut self) -> String {
        let id = format!("compat_monitor{}", self.monitor_ids);
        self.monitor_ids += 1;
        id
    }

    /// Fills in defaults and resolves references.
    pub(super) fn resolve(mut self) -> Result<Config, Failure> {
        self.default_front_ends()?;
        self.check_front_ends()?;
        self.check_incoming().map_err(|reason| ("-incoming", reason))?;
        let cpus = self.smp.resolve().map_err(|reason| ("-smp", reason))?;
        let memory = self.resolve_memory()?;
        let (devices, warnings) = self.resolve_devices(cpus)?;
        if self.boot.initrd.is_some() && self.boot.kernel.is_none() {
            return Err(("-initrd", "makes sense with -kernel only".into()));
        }
        Ok(Config {
            machine: MachineConfig { machine_type: self.machine_type, aux_ram_share: self.aux_ram_share },
            memory,
            cpus,
            boot: self.boot,
            devices,
            chardevs: self.chardevs,
            serial: self.serial,
            monitors: self.monitors.into_iter().map(|(_, monitor)| monitor).collect(),
            name: self.name,
            uuid: self.uuid,
            pidfile: self.pidfile,
            start_paused: self.start_paused,
            no_reboot: self.no_reboot,
            incoming: self.incoming,
            incoming_cpr: self.incoming_cpr,
            sandbox: self.sandbox,
            trace: self.trace,
            warnings,
        })
    }

    /// The devices, and what is odd about what was defined for them.
    fn resolve_devices(&mut self, cpus: u8) -> Result<(Vec<DeviceConfig>, Vec<String>), Failure> {
        let wanted = std::mem::take(&mut self.wanted);
        if let Some(machine_type) = self.machine_type.filter(|machine_type| !machine_type.has_pci())
            && let Some((option, device)) = wanted.first()
        {
            let (name, alias) = (machine_type.name(), MachineType::ALIAS);
            return Err((
                option,
                format!("{device}: machine type '{name}' has no PCI bus; use -machine {alias}"),
            ));
        }
        let Builder { blocks, netdevs, rngs, .. } = self;
        let devices = wanted.resolve(cpus, &mut Backends { blocks, netdevs, rngs })?;
        if let Some((id, ..)) = self.rngs.0.iter().find(|(_, _, is_used)| !is_used) {
            return Err((
                "-object",
                format!("nothing uses '{id}'; name it by -device virtio-rng-pci,rng={id}"),
            ));
        }
        let drives = self.blocks.unused().map(|id| {
            format!("drive '{id}' is used by no device; name it by -device virtio-blk-pci,drive={id}")
        });
        let netdevs = self
            .netdevs
            .unused()
            .map(|id| format!("netdev '{id}' has no peer; name it by -device virtio-net-pci,netdev={id}"));
        Ok((devices, drives.chain(netdevs).collect()))
    }

    /// QEMU's defaults without a display: a serial line that leads nowhere and no monitor; with `-nographic` both on
    /// the terminal.
    fn default_front_ends(&mut self) -> Result<(), Failure> {
        if self.nodefaults {
            return Ok(());
        }
        let (serial, monitor) = (!self.serial_given, !self.monitor_given);
        let stdio = |signal| ChardevBackend::Stdio { signal };
        // Without -nographic all that can fail is that a -chardev took the id.
        let option = if self.nographic { "-nographic" } else { "-chardev" };
        let failed = |reason| (option, reason);
        if serial {
            let (backend, mux) = match (self.nographic, monitor) {
                (true, true) => (stdio(false), true),
                (true, false) => (stdio(true), false),
                (false, _) => (ChardevBackend::Null, false),
            };
            self.add_chardev("-nographic", "serial0".into(), backend, mux).map_err(failed)?;
            self.serial = Some("serial0".into());
        }
        if monitor && self.nographic {
            let id = if serial { "serial0".into() } else { self.next_monitor_id() };
            if !serial {
                self.add_chardev("-nographic", id.clone(), stdio(true), false).map_err(failed)?;
            }
            self.add_monitor("-nographic", MonitorKind::Hmp, id);
        }
        Ok(())
    }

    /// Every front end's character device exists, and only a multiplexed one has several front ends.
    fn check_front_ends(&self) -> Result<(), Failure> {
        let serial = self.serial.iter().map(|id| ("-serial", id));
        let monitors = self.monitors.iter().map(|(option, monitor)| (*option, &monitor.chardev));
        let consoles = self.wanted.chardevs().map(|id| ("-device", id));
        let mut users: Vec<&String> = Vec::new();
        for (option, id) in serial.chain(monitors).chain(consoles) {
            let Some(chardev) = self.chardevs.iter().find(|chardev| chardev.id == *id) else {
                let known = known(self.chardevs.iter().map(|chardev| chardev.id.as_str()));
                return Err((option, format!("unknown character device '{id}' (known: {known})")));
            };
            if users.contains(&id) && !chardev.mux {
                return Err((
                    option,
                    format!("character device '{id}' is in use already; mux=on lets several share it"),
                ));
            }
            users.push(id);
        }
        Ok(())
    }

    /// What the main channel can be depends on whether there is a cpr channel.
    fn check_incoming(&self) -> Result<(), String> {
        match (&self.incoming, &self.incoming_cpr) {
            (None, Some(_)) => Err("the cpr channel needs a main channel beside it: -incoming defer, or \
                                    -incoming unix:PATH"
                .into()),
            (Some(Incoming::Channel(channel @ Channel::File { .. })), Some(_)) => Err(format!(
                "'{channel}': with a cpr channel the state comes through memory; the main channel is unix:PATH, \
                 memfd: or defer"
            )),
            (Some(Incoming::Channel(channel @ Channel::Unix { .. })), None) => {
                Err(format!("'{channel}': a socket as main channel needs a cpr channel beside it"))
            }
            _ => Ok(()),
        }
    }

    fn resolve_memory(&mut self) -> Result<MemoryConfig, Failure> {
        let Some(id) = self.memory_backend.clone() else {
            if let Some(object) = self.objects.first() {
                let reason = format!("nothing uses '{}'; name it by -machine memory-backend={0}", object.id);
                return Err(("-object", reason));
            }
            let size_bytes = self.memory_bytes.unwrap_or(DEFAULT_MEMORY_BYTES);
            check_size(size_bytes, PAGE_BYTES).map_err(|reason| ("-m", reason))?;
            let backend = MemoryBackend::Ram { share: false };
            return Ok(MemoryConfig { id: DEFAULT_MEMORY_ID.into(), size_bytes, backend });
        };
        let Some(index) = self.objects.iter().position(|object| object.id == id) else {
            let known = known(self.objects.iter().map(|object| object.id.as_str()));
            return Err(("-machine", format!("unknown memory backend '{id}' (known: {known})")));
        };
        let object = self.objects.swap_remove(index);
        if let Some(other) = self.objects.first() {
            return Err(("-object", format!("nothing uses '{}'; the guest's RAM is '{id}'", other.id)));
        }
        let size_bytes = object.size_bytes.unwrap_or_default();
        if let Some(wanted) = self.memory_bytes
            && wanted != size_bytes
        {
            let (wanted, has) = (show_size(wanted), show_size(size_bytes));
            return Err(("-m", format!("{wanted} is not the size of memory backend '{id}', which is {has}")));
        }
        let page_bytes = object.huge_page_bytes.unwrap_or(PAGE_BYTES);
        check_size(size_bytes, page_bytes).map_err(|reason| ("-object", format!("'{id}': {reason}")))?;
        let backend = match (object.kind, object.path) {
            (Some(ObjectKind::File), Some(path)) => {
                MemoryBackend::File { path, share: object.share.unwrap_or(false) }
            }
            (Some(ObjectKind::Memfd), _) => MemoryBackend::Memfd {
                share: object.share.unwrap_or(true),
                hugetlb: object
                    .hugetlb
                    .unwrap_or(false)
                    .then_some(HugePages { page_bytes: object.huge_page_bytes }),
            },
            _ => MemoryBackend::Ram { share: object.share.unwrap_or(false) },
        };
        Ok(MemoryConfig { id, size_bytes, backend })
    }
}

fn check_size(size_bytes: u64, page_bytes: u64) -> Result<(), String> {
    if size_bytes == 0 || !size_bytes.is_multiple_of(page_bytes) {
        let (size, page) = (show_size(size_bytes), show_size(page_bytes));
        return Err(format!("size {size} is no multiple of the page size {page}"));
    }
    Ok(())
}

impl Smp {
    /// The number of vCPUs.
    fn resolve(&self) -> Result<u8, String> {
        let parts = [self.sockets, self.cores, self.threads];
        let product = parts.iter().flatten().product::<u32>();
        let cpus = self.cpus.or(self.maxcpus).unwrap_or(product);
        if parts.iter().any(Option::is_some) && product != cpus {
            // Parts that were left out count as one: there is nothing to tell the guest about them.
            return Err(format!("sockets * cores * threads is {product}, but the number of vCPUs is {cpus}"));
        }
        if let Some(maxcpus) = self.maxcpus
            && maxcpus != cpus
        {
            return Err(format!("maxcpus is {maxcpus}, but no vCPU can be added to the {cpus} given"));
        }
        u8::try_from(cpus)
            .ok()
            .filter(|cpus| (1..=MAX_CPUS).contains(cpus))
            .ok_or_else(|| format!("{cpus} vCPUs are too many (1 to {MAX_CPUS})"))
    }
}
