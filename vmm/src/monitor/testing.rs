//! A machine made of nothing, for the tests of the sessions.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::command::MigrationParameters;
use super::{Backend, Command, Origin, QmpError, Reply};

/// Remembers what it was told.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) commands: Vec<Command>,
    pub(crate) status: &'static str,
    pub(crate) parameters: MigrationParameters,
    pub(crate) fds: BTreeMap<String, OwnedFd>,
    pub(crate) migration: Value,
    /// Every command that changes something suspends its session.
    pub(crate) suspend: bool,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            commands: Vec::new(),
            status: "running",
            parameters: MigrationParameters::default(),
            fds: BTreeMap::new(),
            migration: json!({}),
            suspend: false,
        }
    }
}

impl Backend for Machine {
    fn execute(&mut self, command: Command, origin: &mut Origin<'_>) -> Result<Reply, QmpError> {
        self.commands.push(command.clone());
        let value = match command {
            Command::QueryStatus => json!({"status": self.status, "running": self.status == "running"}),
            Command::QueryKvm => json!({"enabled": true, "present": true}),
            Command::QueryName => json!({"name": "guest"}),
            Command::QueryUuid => json!({"UUID": "00000000-0000-0000-0000-000000000000"}),
            Command::QueryCpusFast => json!([
                {"cpu-index": 0, "thread-id": 11, "qom-path": "/0", "target": "x86_64"},
                {"cpu-index": 1, "thread-id": 12, "qom-path": "/1", "target": "x86_64"},
            ]),
            Command::QueryChardev => json!([{"label": "serial0", "filename": "null", "frontend-open": true}]),
            Command::QueryMemdev => json!([{
                "id": "ram0", "size": 1_073_741_824, "share": true, "merge": false, "dump": true, "prealloc": false,
                "policy": "default", "host-nodes": [],
            }]),
            Command::QueryBlock => json!([{
                "device": "d0", "qdev": "disk0", "type": "unknown", "removable": false, "locked": false,
                "inserted": {"file": "/images/a", "node-name": "d0", "drv": "raw", "ro": true,
                             "cache": {"writeback": true, "direct": false, "no-flush": true}},
            }]),
            Command::QueryPci => json!([{"bus": 0, "devices": [{
                "bus": 0, "slot": 18, "function": 0, "qdev_id": "disk0", "id": {"vendor": 0x1af4, "device": 0x1042},
                "model": "virtio-blk-pci",
            }]}]),
            Command::QueryNetwork => json!([{
                "name": "nic", "model": "virtio-net-pci", "mac": "52:54:00:12:34:56", "queues": 2, "netdev": "n0",
                "peer": "type=tap,ifname=t0",
            }]),
            Command::QueryMigrate => self.migration.clone(),
            Command::QueryMigrateParameters => json!({
                "mode": self.parameters.mode.clone().unwrap_or_else(|| "normal".into()),
                "cpr-exec-command": self.parameters.cpr_exec_command.clone().unwrap_or_default(),
            }),
            Command::QueryMigrateCapabilities => json!([{"capability": "events", "state": false}]),
            Command::MigrateSetParameters(parameters) => {
                if let Some(mode) = parameters.mode {
                    if !self.migration_modes().contains(&mode) {
                        return Err(QmpError::generic(format!(
                            "Parameter 'mode' does not accept value '{mode}'"
                        )));
                    }
                    self.parameters.mode = Some(mode);
                }
                self.parameters.cpr_exec_command =
                    parameters.cpr_exec_command.or(self.parameters.cpr_exec_command.take());
                json!({})
            }
            Command::GetFd { name } => {
                let fd = origin
                    .received_fds
                    .pop_front()
                    .ok_or_else(|| QmpError::generic("No file descriptor supplied via SCM_RIGHTS"))?;
                self.fds.insert(name, fd);
                json!({})
            }
            Command::Migrate { detach: false, .. } => return Ok(Reply::Suspended),
            _ if self.suspend => return Ok(Reply::Suspended),
            _ => json!({}),
        };
        Ok(Reply::Value(value))
    }

    fn migration_modes(&self) -> Vec<String> {
        ["normal", "cpr-exec", "cpr-reboot"].map(String::from).to_vec()
    }
}

/// What is left of a state after it went through its wire format.
pub(crate) fn persisted<T: Serialize + DeserializeOwned>(state: &T) -> T {
    postcard::from_bytes(&postcard::to_allocvec(state).unwrap()).unwrap()
}
