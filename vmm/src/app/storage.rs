//! A guest that rests in storage: how it comes into this program, and how the program that put it there goes on with it.
//!
//! Nobody waits for this program here, and nothing has a limit. A file that turns out to be no guest of this machine costs
//! nothing: it is looked at from its first section to its last before any memory is made.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use cpr_core::fault::{self, Point};
use cpr_core::{Incoming, Stamp};
use cpr_reboot::{FileError, Kept, Memory, RamSource, Region, StateFile, Whereabouts};
use vmm_core::memory::GuestRam;

use super::host::machine_type;
use super::{App, GONE, RESTS, read_machine};
use crate::arriving::{Arriving, Predecessor};
use crate::cli::config::{Config, MemoryBackend};
use crate::errors;
use crate::migration::{Status, storage_channel};
use crate::monitor::{Channel, QmpError, Reply};
use crate::startup::{self, Hardware, Ram, RamOrigin};

/// The guest's RAM as it is read for a copy.
struct Copied(GuestRam);

impl RamSource for Copied {
    fn extents(&self) -> io::Result<Vec<Range<u64>>> {
        self.0.extents()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buffer)
    }
}

impl App {
    /// What becomes of the guest's RAM if the guest goes to storage.
    pub(super) fn memory_to_store(&self) -> Vec<Memory> {
        let Ok(Hardware { memory, ram, .. }) = self.hardware() else { return Vec::new() };
        let stays_at = memory.stays_at().filter(|_| self.parts.settings.ignore_shared);
        let kept = match (stays_at, memory.fd()) {
            (Some(path), Some(file)) => Kept::InFile { path, file: file.clone() },
            _ => Kept::Copied(Arc::new(Copied(ram.clone()))),
        };
        let config = memory.config();
        vec![Memory { name: config.id.clone(), len: config.size, kept }]
    }

    /// What a monitor is told of a guest that this program has given away.
    pub(super) fn guest_is_elsewhere(&self) -> QmpError {
        QmpError::generic(if self.stored.is_some() { RESTS } else { GONE })
    }

    /// `cont` in the program that put the guest into storage.
    pub(super) fn take_back(&mut self) -> Result<(), QmpError> {
        let failed = |error: &(dyn std::error::Error + 'static)| QmpError::generic(errors::text(error));
        let Some(stored) = &self.stored else { return Err(QmpError::generic(GONE)) };
        stored.take_back().map_err(|error| failed(&error))?;
        self.stored = None;
        for (at, unsent) in std::mem::take(&mut self.unsent) {
            self.parts.chardevs[at].output().write_first(&unsent);
        }
        // Input that has waited goes to the guest now.
        self.resumed = true;
        self.run_guest().map_err(|error| failed(error.as_ref()))
    }

    /// `migrate_incoming` in a program whose guest is in storage. A file that is not there, or of another machine, is not the
    /// end of it: another one may be named.
    pub(super) fn fetch_command(&mut self, channel: Channel) -> Result<Reply, QmpError> {
        self.parts.settings.check_storage()?;
        let (path, offset) = storage_channel(channel)?;
        let found = self.look_at(&path, offset);
        let found = found.map_err(|error| QmpError::generic(errors::text(error.as_ref())))?;
        self.fetch(found).map_err(|error| self.cannot_take_over(&error))?;
        Ok(Reply::empty())
    }

    /// The same at the start.
    ///
    /// # Errors
    /// The guest cannot be taken over.
    pub(super) fn fetch_from(&mut self, channel: Channel) -> anyhow::Result<()> {
        let (path, offset) = storage_channel(channel)?;
        let found = self.look_at(&path, offset).context("-incoming")?;
        self.fetch(found)
    }

    /// Opens the guest's state and RAM, and changes neither.
    fn look_at(&self, path: &Path, offset: u64) -> anyhow::Result<Found> {
        let mut config = self.parts.config.clone();
        let state = open_state(path, offset)?;
        let of_file = || format!("state file '{}'", path.display());
        // The guest keeps the hardware that it had.
        let kept = machine_type(&mut state.read_main()?).with_context(of_file)?;
        config.machine.adopt(&kept).map_err(anyhow::Error::msg).with_context(of_file)?;
        let machine = read_machine(&mut state.read_main()?, &config).with_context(of_file)?;
        machine.state.check().with_context(of_file)?;
        let origin = ram_origin(&state.regions(), &config).with_context(of_file)?;
        let ram = startup::open_ram(&config, &self.parts.services.registry, origin)?;
        Ok(Found { state, ram, config })
    }

    /// Fills the RAM, builds the machine around it, and runs the guest if it ran.
    fn fetch(&mut self, Found { mut state, ram, config }: Found) -> anyhow::Result<()> {
        self.parts.config = config;
        self.parts.in_storage = false;
        let arrival = state.arrive()?;
        self.progress.control = Some(arrival.control.clone());
        self.progress.mode = Some(arrival.mode.id.to_string());
        self.progress.status = Status::Active;
        self.emit_migration_event();
        let incoming = Incoming::begin(&mut self.parts.services, arrival)?;
        self.progress.generation = self.parts.services.generation;
        let built = self.build_from(&state, ram);
        let arriving = Arriving { from: Predecessor::Storage(state), incoming };
        match built {
            Ok(hardware) => {
                arriving.incoming.control().timeline().stamp(Stamp::Built);
                (self.parts.hardware, self.parts.arriving) = (Some(hardware), Some(arriving));
                self.take_over(None)
            }
            Err(error) => {
                arriving.refuse(&errors::text(error.as_ref()));
                Err(error)
            }
        }
    }

    fn build_from(&self, state: &StateFile, ram: Ram) -> anyhow::Result<Hardware> {
        let config = &self.parts.config;
        fault::at(Point::Fill).map_err(|error| anyhow!(error))?;
        for (at, region) in state.regions().iter().enumerate() {
            if region.whereabouts == Whereabouts::Here {
                if let MemoryBackend::File { .. } = config.memory.backend {
                    // Zeros were left out, and the file may be an old one.
                    ram.ram.clear()?;
                }
                state.read_ram(at, &mut |offset, bytes| ram.ram.write_at(offset, bytes))?;
            }
        }
        let hardware = self.parts.build_hardware(config, ram)?;
        fault::at(Point::Built).map_err(|error| anyhow!(error))?;
        Ok(hardware)
    }
}

/// A guest in storage that fits into this program.
struct Found {
    state: StateFile,
    ram: Ram,
    /// The command line's, with what the guest brings.
    config: Config,
}

/// Opens a state file.
///
/// # Errors
/// No guest can be started from it, whatever the machine.
pub(crate) fn open_state(path: &Path, offset: u64) -> anyhow::Result<StateFile> {
    StateFile::open(path, offset).map_err(|error| match error {
        error @ FileError::NoRam { .. } => {
            anyhow!("{error} (cpr-exec is such a mode: its state is for the program that it executes)")
        }
        error => error.into(),
    })
}

/// How to come by the RAM of this guest with this command line.
fn ram_origin(regions: &[Region], config: &Config) -> anyhow::Result<RamOrigin> {
    let memory = &config.memory;
    let [region] = regions else {
        bail!("the guest's RAM is in {} pieces, this program's in one", regions.len());
    };
    if region.name != memory.id {
        bail!("the guest's RAM is '{}', the command line names it '{}'", region.name, memory.id);
    }
    if region.len != memory.size_bytes {
        bail!("the guest has {} bytes of RAM, the command line says {}", region.len, memory.size_bytes);
    }
    match (&region.whereabouts, &memory.backend) {
        (Whereabouts::Here, _) => Ok(RamOrigin::New),
        (Whereabouts::File(_), MemoryBackend::File { share: true, .. }) => Ok(RamOrigin::Storage),
        (Whereabouts::File(path), _) => bail!(
            "guest RAM '{0}' is in file '{1}'; the command line has to name it: -object \
             memory-backend-file,id={0},mem-path={1},size={2},share=on",
            region.name,
            path.display(),
            region.len
        ),
    }
}
