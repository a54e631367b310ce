//! A machine that does nothing, for the monitors.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use vmm::migration::{Settings, mode_names};
use vmm::monitor::{Backend, Command, Origin, QmpError, Reply};

/// Remembers what it was told to do.
#[derive(Debug, Default)]
pub(crate) struct Machine {
    pub(crate) commands: Vec<Command>,
    pub(crate) settings: Settings,
    /// Every command that changes something keeps its session waiting.
    pub(crate) suspend: bool,
}

impl Backend for Machine {
    fn execute(&mut self, command: Command, origin: &mut Origin<'_>) -> Result<Reply, QmpError> {
        self.commands.push(command.clone());
        let value = match command {
            Command::QueryStatus => json!({"status": "running", "running": true}),
            Command::QueryKvm => json!({"enabled": true, "present": true}),
            Command::QueryName => json!({"name": "guest"}),
            Command::QueryUuid => json!({"UUID": "00000000-0000-0000-0000-000000000000"}),
            Command::QueryCpusFast => json!([{"cpu-index": 0, "thread-id": 11}]),
            Command::QueryChardev => json!([{"label": "serial0", "filename": "null", "frontend-open": true}]),
            Command::QueryMemdev => json!([{"id": "ram0", "size": 1 << 30, "share": true}]),
            Command::QueryMigrate => json!({"status": "failed", "error-desc": "x", "total-time": 1}),
            Command::QueryMigrateParameters => self.settings.parameters(),
            Command::QueryMigrateCapabilities => self.settings.capabilities(),
            Command::MigrateSetParameters(parameters) => {
                self.settings.set(parameters)?;
                json!({})
            }
            Command::MigrateSetCapabilities(capabilities) => {
                self.settings.set_capabilities(&capabilities);
                json!({})
            }
            Command::GetFd { .. } => {
                origin.received_fds.pop_front().ok_or_else(|| QmpError::generic("no descriptor"))?;
                json!({})
            }
            Command::Migrate { detach: false, .. } => return Ok(Reply::Suspended),
            _ if self.suspend => return Ok(Reply::Suspended),
            _ => json!({}),
        };
        Ok(Reply::Value(value))
    }

    fn migration_modes(&self) -> Vec<String> {
        mode_names()
    }
}

/// A state after it went through its wire format.
pub(crate) fn persisted<T: Serialize + DeserializeOwned>(state: &T) -> T {
    crate::section_of("session", &cpr_core::frame::to_body(state))
        .decode(1)
        .expect("what was just encoded decodes")
}

/// What a command that kept its session waiting ends with.
pub(crate) fn ending() -> Result<Value, QmpError> {
    Ok(json!({}))
}
