//! What the command line asks for, as plain data with every reference resolved and every default filled in.

use std::path::PathBuf;

use uuid::Uuid;

use crate::monitor::{Channel, SocketAddress};

mod devices;

pub use devices::*;

/// A whole machine with its front ends.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Config {
    /// The kind of machine.
    pub machine: MachineConfig,
    /// Guest RAM.
    pub memory: MemoryConfig,
    /// Number of vCPUs, 1 to [`MAX_CPUS`](super::MAX_CPUS).
    pub cpus: u8,
    /// What the guest boots.
    pub boot: BootConfig,
    /// Every PCI device, by its slot.
    pub devices: Vec<DeviceConfig>,
    /// Every character device, in the order of the command line; ids are unique.
    pub chardevs: Vec<ChardevConfig>,
    /// The character device of COM1; `None`: the port is there and nobody listens.
    pub serial: Option<String>,
    /// Every monitor, in the order of the command line.
    pub monitors: Vec<MonitorConfig>,
    /// The guest's name.
    pub name: Option<String>,
    /// The guest's UUID.
    pub uuid: Option<Uuid>,
    /// Where to write the process id.
    pub pidfile: Option<PathBuf>,
    /// Do not run the guest before a `cont`.
    pub start_paused: bool,
    /// End the program where the guest asks for a reset.
    pub no_reboot: bool,
    /// Where the machine's state comes from, instead of a boot.
    pub incoming: Option<Incoming>,
    /// Where to wait for a source that still runs it. Only with `incoming`.
    pub incoming_cpr: Option<SocketAddress>,
    /// What the program does without; `None`: nothing.
    pub sandbox: Option<SandboxConfig>,
    /// What to trace.
    pub trace: TraceConfig,
    /// What is to be logged of this command line, which can be carried out all the same.
    pub warnings: Vec<String>,
}

/// What a sandbox denies beside what it always does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct SandboxConfig {
    /// System calls that nothing of today uses.
    pub obsolete: bool,
    /// To become another user, or part of another session.
    pub elevate_privileges: bool,
    /// To start or become another program.
    pub spawn: bool,
    /// To have other shares of the CPUs.
    pub resource_control: bool,
}

impl Default for SandboxConfig {
    fn default() -> SandboxConfig {
        SandboxConfig { obsolete: true, elevate_privileges: false, spawn: false, resource_control: false }
    }
}

impl SandboxConfig {
    /// What both deny.
    pub fn and(self, other: SandboxConfig) -> SandboxConfig {
        SandboxConfig {
            obsolete: self.obsolete || other.obsolete,
            elevate_privileges: self.elevate_privileges || other.elevate_privileges,
            spawn: self.spawn || other.spawn,
            resource_control: self.resource_control || other.resource_control,
        }
    }
}

/// The kind of machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MachineConfig {
    /// Its type; `None`: the newest, or that of a guest which arrives by an update.
    pub machine_type: Option<MachineType>,
    /// Whether memory beside the main RAM is shared, too (`aux-ram-share`).
    pub aux_ram_share: bool,
}

impl MachineConfig {
    /// The type of a machine that is made now.
    pub fn machine_type(&self) -> MachineType {
        self.machine_type.unwrap_or_else(MachineType::newest)
    }

    /// Takes the type of a guest that arrives: whatever this program would make by itself, its guest has what it has.
    ///
    /// # Errors
    /// This program has no such type, or the command line names another.
    pub fn adopt(&mut self, arrived: &str) -> Result<(), String> {
        self.adopt_one_of(MACHINE_TYPES, arrived)
    }

    fn adopt_one_of(&mut self, known: &[MachineType], arrived: &str) -> Result<(), String> {
        let Some(arrived) = known.iter().copied().find(|known| known.0 == arrived) else {
            let known: Vec<_> = known.iter().map(|known| known.0).collect();
            let known = known.join(", ");
            return Err(format!(
                "the guest's machine type is '{arrived}', which this program does not have (it has: {known})"
            ));
        };
        match self.machine_type {
            Some(named) if named != arrived => {
                let (arrived, named) = (arrived.0, named.0);
                Err(format!("the guest's machine type is '{arrived}', the command line says '{named}'"))
            }
            _ => {
                self.machine_type = Some(arrived);
                Ok(())
            }
        }
    }
}

/// What a guest sees of the machine, by the release that first had it. A guest keeps its type over every update; a change
/// that guests could notice is a new type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineType(&'static str);

/// The machine type of before there was PCI.
const WITHOUT_PCI: MachineType = MachineType("microvm-0.1");

/// Every machine type, the oldest first. `microvm`: no firmware, no legacy beyond serial port, PIC and PIT; from 0.2 on with
/// a PCI bus.
pub const MACHINE_TYPES: &[MachineType] =
    if crate::formats::HAS_PCI { &[WITHOUT_PCI, MachineType("microvm-0.2")] } else { &[WITHOUT_PCI] };

impl MachineType {
    /// The name of whichever is the newest.
    pub const ALIAS: &'static str = "microvm";

    /// Its full name.
    pub fn name(self) -> &'static str {
        self.0
    }

    /// Whether it has a PCI bus.
    pub fn has_pci(self) -> bool {
        self != WITHOUT_PCI
    }

    /// The newest.
    pub fn newest() -> MachineType {
        *MACHINE_TYPES.last().expect("there is at least one")
    }

    /// The type of this full name.
    pub fn find(name: &str) -> Option<MachineType> {
        MACHINE_TYPES.iter().copied().find(|known| known.0 == name)
    }

    /// Every full name, for a message.
    pub fn known() -> String {
        MACHINE_TYPES.iter().map(|known| known.0).collect::<Vec<_>>().join(", ")
    }
}

/// Guest RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryConfig {
    /// Id of the memory backend; `microvm.ram` without one.
    pub id: String,
    /// Size in bytes, a multiple of the page size.
    pub size_bytes: u64,
    /// What it is made of.
    pub backend: MemoryBackend,
}

/// What guest RAM is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryBackend {
    /// An anonymous file.
    Memfd {
        /// Mapped shared (the default), so that it survives an update in place.
        share: bool,
        /// Made of huge pages.
        hugetlb: Option<HugePages>,
    },
    /// A named file.
    File {
        /// The file; made if it is not there.
        path: PathBuf,
        /// Mapped shared. Not the default.
        share: bool,
    },
    /// Anonymous memory.
    Ram {
        /// Mapped shared, and then a memfd in all but name. Not the default.
        share: bool,
    },
}

/// Huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugePages {
    /// Page size in bytes, a power of two; `None`: 2 MiB.
    pub page_bytes: Option<u64>,
}

/// What the guest boots.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BootConfig {
    /// The kernel; `None`: the built-in payload.
    pub kernel: Option<PathBuf>,
    /// Its command line.
    pub append: Option<String>,
    /// Its initial RAM disk.
    pub initrd: Option<PathBuf>,
}

/// A character device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChardevConfig {
    /// Its id.
    pub id: String,
    /// What it is connected to.
    pub backend: ChardevBackend,
    /// Several front ends share it, switched by Ctrl-a c.
    pub mux: bool,
}

/// What a character device is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChardevBackend {
    /// Standard input and output.
    Stdio {
        /// Ctrl-c and its kind send signals to the program instead of bytes to the front end.
        signal: bool,
    },
    /// A file that output is written to.
    File {
        /// Its path.
        path: PathBuf,
    },
    /// A unix stream socket.
    Socket {
        /// Its path.
        path: PathBuf,
        /// Listen, rather than connect.
        server: bool,
        /// Do not start before the first client is there. Only with `server`.
        wait: bool,
    },
    /// Nothing.
    Null,
}

/// A monitor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MonitorConfig {
    /// For whom.
    pub kind: MonitorKind,
    /// Id of its character device.
    pub chardev: String,
}

/// The kinds of monitors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MonitorKind {
    /// For people.
    Hmp,
    /// For programs.
    Qmp,
}

/// Where an incoming machine comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    /// A monitor will say (`migrate_incoming`).
    Defer,
    /// From there, at once.
    Channel(Channel),
}

/// What to trace, and where log and trace go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TraceConfig {
    /// Patterns of the names to trace.
    pub patterns: Vec<String>,
    /// File for the trace; `None`: where the log goes.
    pub file: Option<PathBuf>,
    /// File for the log; `None`: standard error.
    pub log_file: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_arrives_keeps_its_machine_type() {
        let known = &[MachineType("m-1"), MachineType("m-2")];
        let adopted = |named, arrived| {
            let mut config = MachineConfig { machine_type: named, aux_ram_share: false };
            config.adopt_one_of(known, arrived).map(|()| config.machine_type().0)
        };
        // Not the newest, which this program would make by itself.
        assert_eq!(adopted(None, "m-1"), Ok("m-1"));
        assert_eq!(adopted(Some(known[0]), "m-1"), Ok("m-1"));
        assert_eq!(
            adopted(Some(known[1]), "m-1").unwrap_err(),
            "the guest's machine type is 'm-1', the command line says 'm-2'"
        );
        assert_eq!(
            adopted(None, "m-3").unwrap_err(),
            "the guest's machine type is 'm-3', which this program does not have (it has: m-1, m-2)"
        );
    }

    #[test]
    fn machine_types_are_found_by_their_full_name() {
        for &known in MACHINE_TYPES {
            assert_eq!(MachineType::find(known.name()), Some(known));
        }
        assert_eq!(MachineType::find(MachineType::ALIAS), None);
        assert_eq!(MachineType::newest().name(), "microvm-0.2");
        assert_eq!(MACHINE_TYPES.iter().map(|known| known.has_pci()).collect::<Vec<_>>(), [false, true]);
    }
}
