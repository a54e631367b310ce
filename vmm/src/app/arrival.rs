//! A guest that moves between processes: into this one, which has monitors of its own and waits, and out of it.
//!
//! The target's monitors answer from the start. Its machine is made when the source has connected and given the
//! descriptors, while the guest runs on there; what then takes the guest over is the same as after an exec.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use cpr_core::fault::{self, Point};
use cpr_core::{Incoming, Stamp};
use cpr_transfer::{Endpoint, SourceEnd, TransferArrival};

use super::commands::named_fd;
use super::{App, EarlyState, Exit, FrontEnd, RunState, User, WAITING, find_named_fds, take_early_state};
use crate::arriving::{Arriving, Predecessor};
use crate::chardev::{self, Chardev};
use crate::cli::config::{ChardevBackend, ChardevConfig, DeviceConfig};
use crate::migration::{Request, Status};
use crate::monitor::{Channels, QmpError, SocketAddress};
use crate::startup::{self, Hardware, RamOrigin};
use crate::{app, errors};

impl App {
    /// The machine and its RAM.
    ///
    /// # Errors
    /// The guest has not arrived.
    pub(super) fn hardware(&self) -> anyhow::Result<&Hardware> {
        self.parts.hardware.as_ref().ok_or_else(|| anyhow::anyhow!(WAITING))
    }

    /// Whether this is a target that does not have its guest yet.
    pub(super) fn is_waiting_for_guest(&self) -> bool {
        self.parts.arriving.is_some() || self.parts.listening.is_some() || self.parts.in_storage
    }

    /// Whether input for the guest must be left alone: it is not here yet, or its state is on its way to somebody else.
    pub(super) fn guest_is_away(&self) -> bool {
        self.is_waiting_for_guest()
            || matches!(self.parts.run_state, RunState::FinishMigrate | RunState::PostMigrate)
    }

    /// What of an arrival is waited for.
    pub(super) fn arrival_fds(&self) -> Vec<Arc<OwnedFd>> {
        let source = self.parts.arriving.as_ref().map(|arriving| &arriving.from);
        match (&self.parts.listening, source) {
            (Some(listener), _) => listener.wait().fds,
            (None, Some(Predecessor::Transfer(source))) => source.watched().to_vec(),
            (None, _) => Vec::new(),
        }
    }

    /// Goes on with what the source sent. Whatever fails once it has given its descriptors ends this program, which its
    /// source waits for.
    pub(super) fn poll_arrival(&mut self) {
        let result = match (&mut self.parts.listening, &self.parts.arriving) {
            (Some(listener), _) => match listener.poll() {
                Ok(None) => return,
                Ok(Some(arrival)) => {
                    self.parts.listening = None;
                    self.arrive(arrival)
                }
                Err(error) => Err(error.into()),
            },
            (None, Some(arriving)) => arriving.check_source().map_err(|error| anyhow::anyhow!(error)),
            (None, None) => return,
        };
        if let Err(error) = result {
            let text = errors::text(error.as_ref());
            eprintln!("cpr-vmm: {text}");
            self.progress.status = Status::Failed;
            self.progress.error = Some(text);
            self.emit_migration_event();
            if let Some(arriving) = self.parts.arriving.take() {
                arriving.refuse("it lost its source");
            }
            self.exit.get_or_insert(Exit::Fatal);
        }
    }

    /// Builds the machine of a guest whose descriptors have come, and takes the guest over, or waits for the user to say so.
    fn arrive(&mut self, arrival: TransferArrival) -> anyhow::Result<()> {
        let TransferArrival { arrival, source } = arrival;
        self.progress.control = Some(arrival.control.clone());
        self.progress.mode = Some(arrival.mode.id.to_string());
        self.progress.status = Status::Active;
        self.emit_migration_event();
        self.deliver_events();
        let incoming = match Incoming::begin(&mut self.parts.services, arrival) {
            Ok(incoming) => incoming,
            Err(error) => {
                source.refuse(&errors::text(&error));
                return Err(error.into());
            }
        };
        self.progress.generation = self.parts.services.generation;
        self.make_room(incoming, source)?;
        self.begin()
    }

    fn make_room(&mut self, incoming: Incoming, source: SourceEnd) -> anyhow::Result<()> {
        let mut arriving = Arriving { from: Predecessor::Transfer(source), incoming };
        match self.build_around(&mut arriving.incoming) {
            Ok(hardware) => {
                self.parts.hardware = Some(hardware);
                self.parts.arriving = Some(arriving);
                Ok(())
            }
            Err(error) => {
                arriving.refuse(&errors::text(error.as_ref()));
                Err(error)
            }
        }
    }

    fn build_around(&mut self, incoming: &mut Incoming) -> anyhow::Result<Hardware> {
        let control = incoming.control().clone();
        // The user's settings are those of this program's monitors.
        let EarlyState { machine_type, chardevs, named_fds, cpuid, settings: _ } =
            take_early_state(incoming.early())?;
        self.parts.config.machine.adopt(&machine_type).map_err(anyhow::Error::msg)?;
        self.open_awaited(chardevs)?;
        control.rendezvous().note_progress();
        let parts = &mut self.parts;
        parts.named_fds.extend(find_named_fds(&named_fds, &parts.services.registry));
        let ram = startup::open_ram(&parts.config, &parts.services.registry, RamOrigin::Registry)?;
        let hardware = parts.build_hardware(&parts.config, ram)?;
        hardware.complete(&parts.config, &cpuid, &control)?;
        hardware.populate(&control)?;
        fault::at(Point::Built).map_err(|error| anyhow::anyhow!(error))?;
        control.timeline().stamp(Stamp::Built);
        Ok(hardware)
    }

    /// Opens the chardev that the guest brings, or would have brought if it had one like it.
    fn open_awaited(
        &mut self,
        mut states: Vec<(chardev::ChardevState, app::FrontEndState)>,
    ) -> anyhow::Result<()> {
        let parts = &mut self.parts;
        for (at, config) in parts.config.chardevs.iter().enumerate() {
            let front_end = &mut parts.front_ends[at];
            if !front_end.is_guests_only() || !chardev::travels(config) {
                continue;
            }
            let identity = chardev::identity(config)?;
            let came = states.iter().position(|(state, _)| state.identity() == identity);
            let (state, users) = came.map(|at| states.swap_remove(at)).unzip();
            let chardev = Chardev::open(&without_wait(config), &parts.services.registry, state)?;
            if let Some(users) = users {
                front_end.restore(&identity, users, &parts.services.registry, chardev.is_connected(), None);
            }
            front_end.tell_consoles(&chardev);
            parts.chardevs[at] = chardev;
        }
        Ok(())
    }

    /// The guest is here, for good.
    pub(super) fn guest_moved_in(&mut self) {
        if let Err(error) = startup::write_pidfile(&self.parts.config) {
            tracing::warn!("{error:#}");
        }
    }

    /// The guest is in another process, for good.
    pub(super) fn guest_moved_out(&mut self) {
        self.set_run_state(RunState::PostMigrate);
        self.let_go_of_guests();
        self.parts.named_fds.clear();
    }

    fn let_go_of_guests(&mut self) {
        for at in 0..self.parts.chardevs.len() {
            if self.travels(at) {
                self.parts.chardevs[at].let_go();
            }
        }
    }

    /// At the end of a target that did not get the guest: what the source goes on with, socket paths above all, is let alone.
    pub(super) fn leave_to_source(&mut self) {
        if self.parts.config.incoming_cpr.is_none() || self.parts.run_state != RunState::InMigrate {
            return;
        }
        self.let_go_of_guests();
    }

    /// Whether chardev number `at` goes with the guest.
    pub(super) fn travels(&self, at: usize) -> bool {
        self.parts.front_ends[at].is_guests_only() && chardev::travels(&self.parts.config.chardevs[at])
    }

    /// Whether chardev number `at` is about to go from one process to another, and both have its descriptors: a connection
    /// that one of them took would be lost to the other.
    pub(super) fn is_in_transfer(&self, at: usize) -> bool {
        let from = self.parts.arriving.as_ref().map(|arriving| &arriving.from);
        let comes = matches!(from, Some(Predecessor::Transfer(_)));
        let goes = self.moves_out && self.update.is_some();
        (comes || goes) && self.travels(at)
    }

    /// Input that COM1 has no room for.
    pub(super) fn serial_input(&self) -> Vec<u8> {
        let of = |user: &User| match user {
            User::Serial(waiting) => waiting.iter().copied().collect(),
            User::Hmp(_) | User::Qmp(_) | User::Console(..) => Vec::new(),
        };
        self.parts.front_ends.iter().flat_map(|front_end: &FrontEnd| &front_end.users).flat_map(of).collect()
    }

    /// Input that the guest's former process had read for it.
    pub(super) fn give_serial_input(&mut self, input: Vec<u8>) {
        for user in self.parts.front_ends.iter_mut().flat_map(|front_end| &mut front_end.users) {
            if let User::Serial(waiting) = user {
                let later = std::mem::replace(waiting, input.into());
                waiting.extend(later);
                return;
            }
        }
    }

    /// What a mode is told of the user's wish and of this program.
    pub(super) fn update_request(&self, Channels { main, cpr }: Channels) -> Result<Request, QmpError> {
        let mut stays: Vec<String> = (0..self.parts.chardevs.len())
            .filter(|&at| !self.travels(at))
            .map(|at| chardev::registry_name(self.parts.chardevs[at].identity()))
            .collect();
        let cpr = match cpr {
            None => None,
            Some(SocketAddress::Unix(path)) => Some(Endpoint::Path(path)),
            Some(SocketAddress::Fd(name)) => {
                let fd = self.parts.named_fds.get(&name);
                let fd =
                    fd.ok_or_else(|| QmpError::generic(format!("File descriptor named '{name}' not found")))?;
                let copy = fd.try_clone().map_err(|error| QmpError::generic(error.to_string()))?;
                stays.push(named_fd(&name));
                Some(Endpoint::Connected(UnixStream::from(copy)))
            }
        };
        let memory = self.memory_to_store();
        let writes_disks = self.parts.config.devices.iter().any(DeviceConfig::writes_disk);
        Ok(Request { main, cpr, original_mask: self.parts.original_mask, stays, memory, writes_disks })
    }
}

/// A guest that runs elsewhere does not wait for somebody to connect here.
fn without_wait(config: &ChardevConfig) -> ChardevConfig {
    let mut config = config.clone();
    if let ChardevBackend::Socket { wait, .. } = &mut config.backend {
        *wait = false;
    }
    config
}
