//! What monitor commands do.

use std::sync::Arc;

use cpr_core::{FdKind, FdPolicy};
use serde_json::{Value, json};

use super::{App, Exit, RunState, UNDER_WAY, WAITING, device_queries};
use crate::cli::config::MemoryBackend;
use crate::errors;
use crate::migration;
use crate::monitor::{Backend, Command, Origin, QmpError, Reply};

/// Registry name of descriptors that `getfd` named.
pub(super) fn named_fd(name: &str) -> String {
    format!("getfd/{name}")
}

fn failed(error: anyhow::Error) -> QmpError {
    QmpError::generic(errors::text(error.as_ref()))
}

impl Backend for App {
    fn execute(&mut self, command: Command, origin: &mut Origin<'_>) -> Result<Reply, QmpError> {
        match command {
            Command::QueryStatus => Ok(Reply::Value(self.query_status())),
            Command::QueryKvm => Ok(Reply::Value(json!({ "enabled": true, "present": true }))),
            Command::QueryName => Ok(Reply::Value(match &self.parts.config.name {
                Some(name) => json!({ "name": name }),
                None => json!({}),
            })),
            Command::QueryUuid => {
                Ok(Reply::Value(json!({ "UUID": self.parts.config.uuid.unwrap_or_default().to_string() })))
            }
            Command::QueryCpusFast => Ok(Reply::Value(self.query_cpus())),
            Command::QueryChardev => Ok(Reply::Value(self.query_chardev())),
            Command::QueryBlock => Ok(Reply::Value(device_queries::block(&self.parts.config.devices))),
            Command::QueryPci => Ok(Reply::Value(device_queries::pci(&self.parts.config.devices))),
            Command::QueryNetwork => Ok(Reply::Value(device_queries::network(&self.parts.config.devices))),
            Command::QueryMemdev => Ok(Reply::Value(self.query_memdev())),
            Command::Stop => self.stop_command().map_err(failed).map(|()| Reply::empty()),
            Command::Cont => self.cont(),
            Command::Quit => {
                self.exit.get_or_insert(Exit::Quit);
                Ok(Reply::empty())
            }
            Command::SystemReset => {
                if self.is_waiting_for_guest() {
                    return Err(QmpError::generic(WAITING));
                }
                match self.parts.run_state {
                    RunState::PostMigrate => return Err(self.guest_is_elsewhere()),
                    // What was saved must stay true.
                    RunState::FinishMigrate => return Err(QmpError::generic(UNDER_WAY)),
                    _ => {}
                }
                self.reset_machine(false).map_err(failed).map(|()| Reply::empty())
            }
            Command::Migrate { channels, detach } => {
                self.start_update(channels)?;
                if detach {
                    return Ok(Reply::empty());
                }
                self.suspended = true;
                Ok(Reply::Suspended)
            }
            Command::MigrateIncoming { channel } => self.migrate_incoming(channel),
            Command::MigrateCancel => {
                self.cancel_update();
                Ok(Reply::empty())
            }
            Command::QueryMigrate => {
                let mode = self.parts.settings.mode_info();
                let blocked =
                    mode.map(|mode| self.parts.services.blocked_reasons(&mode, self)).unwrap_or_default();
                Ok(Reply::Value(self.progress.query(&blocked)))
            }
            Command::MigrateSetParameters(parameters) => {
                self.parts.settings.set(parameters)?;
                Ok(Reply::empty())
            }
            Command::QueryMigrateParameters => Ok(Reply::Value(self.parts.settings.parameters())),
            Command::MigrateSetCapabilities(capabilities) => {
                self.parts.settings.set_capabilities(&capabilities);
                Ok(Reply::empty())
            }
            Command::QueryMigrateCapabilities => Ok(Reply::Value(self.parts.settings.capabilities())),
            Command::GetFd { name } => self.getfd(name, origin),
            Command::CloseFd { name } => match self.parts.named_fds.remove(&name) {
                Some(_) => Ok(Reply::empty()),
                None => Err(QmpError::generic(format!("File descriptor named '{name}' not found"))),
            },
        }
    }

    fn migration_modes(&self) -> Vec<String> {
        migration::mode_names()
    }
}

impl App {
    fn query_status(&self) -> Value {
        let state = self.parts.run_state;
        json!({ "status": state.name(), "running": state == RunState::Running })
    }

    fn query_cpus(&self) -> Value {
        let threads = self.hardware().and_then(|hardware| Ok(hardware.machine.thread_ids()?));
        let cpus = threads.unwrap_or_default().into_iter().enumerate();
        cpus.map(|(index, thread)| {
            json!({
                "cpu-index": index,
                "qom-path": format!("/machine/unattached/device[{index}]"),
                "thread-id": thread,
                "target": "x86_64",
            })
        })
        .collect()
    }

    fn query_chardev(&self) -> Value {
        self.parts
            .chardevs
            .iter()
            .map(|chardev| {
                json!({
                    "label": chardev.id(),
                    "filename": chardev.describe(),
                    "frontend-open": chardev.is_connected(),
                })
            })
            .collect()
    }

    fn query_memdev(&self) -> Value {
        let memory = &self.parts.config.memory;
        let share = match memory.backend {
            MemoryBackend::Memfd { share, .. }
            | MemoryBackend::File { share, .. }
            | MemoryBackend::Ram { share } => share,
        };
        json!([{
            "id": memory.id,
            "size": memory.size_bytes,
            "share": share,
            "merge": true,
            "dump": true,
            "prealloc": false,
            "policy": "default",
            "host-nodes": [],
        }])
    }

    fn cont(&mut self) -> Result<Reply, QmpError> {
        match self.parts.run_state {
            RunState::Running => {}
            RunState::Prelaunch | RunState::Paused => self.run_guest().map_err(failed)?,
            RunState::InMigrate => {
                // As QEMU: the guest runs once its state is there.
                return Err(QmpError::generic(WAITING));
            }
            RunState::PostMigrate => self.take_back()?,
            RunState::FinishMigrate => return Err(QmpError::generic(UNDER_WAY)),
            RunState::InternalError => {
                return Err(QmpError::generic(
                    "the guest cannot go on after an internal error; reset it first",
                ));
            }
        }
        Ok(Reply::empty())
    }

    fn getfd(&mut self, name: String, origin: &mut Origin<'_>) -> Result<Reply, QmpError> {
        let Some(fd) = origin.received_fds.pop_front() else {
            return Err(QmpError::generic("No file descriptor supplied via SCM_RIGHTS"));
        };
        let fd = Arc::new(fd);
        // A name that is in use is given to the new descriptor, as in QEMU.
        self.parts.named_fds.remove(&name);
        self.parts
            .services
            .registry
            .save(&named_fd(&name), 0, FdKind::Other, FdPolicy::MayBeRebuilt, &fd)
            .map_err(|error| QmpError::generic(errors::text(&error)))?;
        self.parts.named_fds.insert(name, fd);
        Ok(Reply::empty())
    }
}
