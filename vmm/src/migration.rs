//! What the monitors know of updates: parameters, capabilities, status, and the report of the last one.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use cpr_core::preflight::Policy;
use cpr_core::{BlockReason, Control, CprMode, ModeInfo, Report};
use cpr_exec::{CprExec, MainChannel};
use cpr_reboot::{CprReboot, Memory, Stored};
use cpr_transfer::{CprTransfer, Endpoint};
use oslib::signals::SignalMask;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::arriving::check_transfer_channel;
use crate::monitor::command::{Capability, CapabilityState, MigrationParameters};
use crate::monitor::{Channel, QmpError};

/// QEMU's `MigrationStatus`, as far as an update passes through it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Status {
    /// No update was asked for.
    #[default]
    None,
    /// Accepted, or waited for; the guest runs.
    Setup,
    /// The guest is being stopped.
    Active,
    /// Device state is being written.
    Device,
    /// The state was handed over, or taken over.
    Completed,
    /// It failed.
    Failed,
    /// The user cancelled it.
    Cancelled,
}

impl Status {
    /// As QMP spells it.
    pub fn name(self) -> &'static str {
        match self {
            Status::None => "none",
            Status::Setup => "setup",
            Status::Active => "active",
            Status::Device => "device",
            Status::Completed => "completed",
            Status::Failed => "failed",
            Status::Cancelled => "cancelled",
        }
    }
}

/// Parameters and capabilities that a user set; they stay set over an update.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Settings {
    mode: String,
    cpr_exec_command: Vec<String>,
    keeper: bool,
    /// Milliseconds; 0 for no limit.
    cpr_exec_timeout: u64,
    /// The same.
    cpr_defer_timeout: u64,
    cpr_preflight: Policy,
    /// The `events` capability.
    pub events: bool,
    /// The `x-ignore-shared` capability.
    pub ignore_shared: bool,
}

/// [`Settings`] as the release before saved them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SettingsV1 {
    mode: String,
    cpr_exec_command: Vec<String>,
    keeper: bool,
    cpr_exec_timeout: u64,
    cpr_defer_timeout: u64,
    events: bool,
}

impl From<SettingsV1> for Settings {
    fn from(old: SettingsV1) -> Settings {
        let SettingsV1 { mode, cpr_exec_command, keeper, cpr_exec_timeout, cpr_defer_timeout, events } = old;
        let cpr_preflight = Policy::default();
        Settings {
            mode,
            cpr_exec_command,
            keeper,
            cpr_exec_timeout,
            cpr_defer_timeout,
            cpr_preflight,
            events,
            // That release had no mode for which it counts.
            ignore_shared: false,
        }
    }
}

impl From<&Settings> for SettingsV1 {
    fn from(new: &Settings) -> SettingsV1 {
        SettingsV1 {
            mode: new.mode.clone(),
            cpr_exec_command: new.cpr_exec_command.clone(),
            keeper: new.keeper,
            cpr_exec_timeout: new.cpr_exec_timeout,
            cpr_defer_timeout: new.cpr_defer_timeout,
            events: new.events,
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            mode: NORMAL.into(),
            cpr_exec_command: Vec::new(),
            keeper: true,
            cpr_exec_timeout: 5000,
            cpr_defer_timeout: 0,
            cpr_preflight: Policy::default(),
            events: false,
            ignore_shared: false,
        }
    }
}

/// QEMU's default mode: live migration by copying, which this program does not do.
const NORMAL: &str = "normal";

/// The modes that this program was built with, as `migrate_set_parameter mode` takes them.
pub fn mode_names() -> Vec<String> {
    [cpr_exec::MODE, cpr_reboot::MODE, cpr_transfer::MODE].map(|mode| mode.to_string()).to_vec()
}

impl Settings {
    /// Sets what is given and leaves the rest.
    ///
    /// # Errors
    /// A mode that is not there, or a policy; nothing was set then.
    pub fn set(&mut self, parameters: MigrationParameters) -> Result<(), QmpError> {
        let preflight = parameters.cpr_preflight.as_deref().map(preflight_policy).transpose()?;
        if let Some(mode) = parameters.mode {
            let known = mode_names();
            if mode != NORMAL && !known.contains(&mode) {
                return Err(QmpError::generic(format!(
                    "Parameter 'mode' does not accept value '{mode}' (known: {NORMAL}, {})",
                    known.join(", ")
                )));
            }
            self.mode = mode;
        }
        if let Some(command) = parameters.cpr_exec_command {
            self.cpr_exec_command = command;
        }
        if let Some(keeper) = parameters.x_cpr_exec_keeper {
            self.keeper = keeper;
        }
        if let Some(timeout) = parameters.cpr_exec_timeout {
            self.cpr_exec_timeout = timeout;
        }
        if let Some(timeout) = parameters.cpr_defer_timeout {
            self.cpr_defer_timeout = timeout;
        }
        if let Some(policy) = preflight {
            self.cpr_preflight = policy;
        }
        Ok(())
    }

    /// For `query-migrate-parameters`.
    pub fn parameters(&self) -> Value {
        json!({
            "mode": self.mode,
            "cpr-exec-command": self.cpr_exec_command,
            "cpr-exec-timeout": self.cpr_exec_timeout,
            "cpr-defer-timeout": self.cpr_defer_timeout,
            "cpr-preflight": self.cpr_preflight.name(),
            "x-cpr-exec-keeper": self.keeper,
        })
    }

    /// What becomes of an update that the next program refuses beforehand.
    pub fn preflight(&self) -> Policy {
        self.cpr_preflight
    }

    /// Sets capabilities.
    pub fn set_capabilities(&mut self, capabilities: &[CapabilityState]) {
        for &CapabilityState { capability, state } in capabilities {
            match capability {
                Capability::Events => self.events = state,
                Capability::IgnoreShared => self.ignore_shared = state,
            }
        }
    }

    /// For `query-migrate-capabilities`.
    pub fn capabilities(&self) -> Value {
        let state = |&capability: &Capability| {
            let state = match capability {
                Capability::Events => self.events,
                Capability::IgnoreShared => self.ignore_shared,
            };
            json!({ "capability": capability.name(), "state": state })
        };
        Capability::ALL.iter().map(state).collect()
    }

    /// The mode as subscribers and blockers see it, if it is one that updates.
    pub fn mode_info(&self) -> Option<ModeInfo> {
        [cpr_exec::mode_info(), cpr_reboot::mode_info(self.ignore_shared), cpr_transfer::mode_info()]
            .into_iter()
            .find(|info| info.id.as_str() == self.mode)
    }

    /// Whether a guest may be fetched from storage.
    ///
    /// # Errors
    /// Another mode is set.
    pub fn check_storage(&self) -> Result<(), QmpError> {
        if self.mode == cpr_reboot::MODE.as_str() {
            return Ok(());
        }
        Err(QmpError::generic(format!(
            "this program was not started by an update, so the guest can only be in storage; set the mode first \
             (migrate_set_parameter mode {})",
            cpr_reboot::MODE
        )))
    }

    /// An attempt in the mode that is set; and the guest in storage, if that is where the mode puts it.
    ///
    /// # Errors
    /// The mode is none that updates, or has other channels.
    pub fn attempt(&self, request: Request) -> Result<(Box<dyn CprMode>, Option<Stored>), QmpError> {
        let Request { main, cpr, original_mask, stays, memory, writes_disks } = request;
        match (self.mode.as_str(), cpr) {
            (mode, None) if mode == cpr_exec::MODE.as_str() => {
                let command = self.cpr_exec_command.iter().map(OsString::from).collect();
                let limit = |ms: u64| (ms > 0).then(|| Duration::from_millis(ms));
                let own_command = own_command(std::env::args_os(), &main);
                let exec = CprExec::new(command, exec_channel(main)?)
                    .signal_mask(original_mask)
                    .keeper(self.keeper)
                    .time_limits(limit(self.cpr_exec_timeout), limit(self.cpr_defer_timeout))
                    .fallback(own_command);
                Ok((Box::new(exec), None))
            }
            (mode, Some(_)) if mode == cpr_exec::MODE.as_str() => {
                Err(QmpError::generic("mode cpr-exec has no 'cpr' migration channel"))
            }
            (mode, None) if mode == cpr_reboot::MODE.as_str() => {
                let (path, offset) = storage_channel(main)?;
                let mut reboot = CprReboot::new(path, offset, self.ignore_shared, memory);
                if writes_disks {
                    reboot = reboot.used_once();
                }
                let stored = reboot.stored();
                Ok((Box::new(reboot), Some(stored)))
            }
            (mode, Some(_)) if mode == cpr_reboot::MODE.as_str() => {
                Err(QmpError::generic("mode cpr-reboot has no 'cpr' migration channel"))
            }
            (mode, Some(cpr)) if mode == cpr_transfer::MODE.as_str() => {
                check_transfer_channel(&main)?;
                Ok((Box::new(CprTransfer::new(cpr).leaving(stays)), None))
            }
            (mode, None) if mode == cpr_transfer::MODE.as_str() => {
                Err(QmpError::generic("missing 'cpr' migration channel"))
            }
            (mode, _) => Err(QmpError::generic(format!(
                "mode '{mode}' is not available; set one first (migrate_set_parameter mode {})",
                mode_names().join("|")
            ))),
        }
    }
}

fn preflight_policy(name: &str) -> Result<Policy, QmpError> {
    Policy::from_name(name).ok_or_else(|| {
        QmpError::generic(format!(
            "Parameter 'cpr-preflight' does not accept value '{name}' (known: {})",
            Policy::ALL.map(Policy::name).join(", ")
        ))
    })
}

/// This program's command line, to take the guest over from `channel`.
fn own_command(args: impl IntoIterator<Item = OsString>, channel: &Channel) -> Vec<OsString> {
    let mut command = Vec::new();
    let mut args = args.into_iter();
    while let Some(argument) = args.next() {
        if argument == "-incoming" || argument == "--incoming" {
            args.next();
        } else {
            command.push(argument);
        }
    }
    let channel = match channel {
        // A wrapper of the next program may have gone to another directory.
        Channel::File { path, offset } => {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            Channel::File { path, offset: *offset }
        }
        other => other.clone(),
    };
    command.extend(["-incoming".into(), channel.to_string().into()]);
    command
}

/// What the user asked for by `migrate`, and what modes need to know of the program.
#[derive(Debug)]
pub struct Request {
    /// Where the state goes.
    pub main: Channel,
    /// Where the target is, if that is another process.
    pub cpr: Option<Endpoint>,
    /// The signal mask that the program was started with.
    pub original_mask: SignalMask,
    /// Registry names of what another process has no use for: monitors, and who is connected to them.
    pub stays: Vec<String>,
    /// Guest RAM, for storage.
    pub memory: Vec<Memory>,
    /// Whether the guest can write to images, which storage does not keep as they were.
    pub writes_disks: bool,
}

/// The user's channel in the terms of cpr-reboot: a file, and where in it.
///
/// # Errors
/// It is something that ends with the program.
pub fn storage_channel(channel: Channel) -> Result<(PathBuf, u64), QmpError> {
    match channel {
        Channel::File { path, offset } => Ok((path, offset)),
        Channel::Memfd | Channel::Unix { .. } => Err(QmpError::generic(format!(
            "'{channel}': the main channel of cpr-reboot is file:PATH, as the guest has to outlive every program"
        ))),
    }
}

/// The user's channel in the terms of cpr-exec.
///
/// # Errors
/// It has none for a socket: nobody would read from it while the programs take turns.
pub fn exec_channel(channel: Channel) -> Result<MainChannel, QmpError> {
    match channel {
        Channel::File { path, offset } => Ok(MainChannel::File { path, offset }),
        Channel::Memfd => Ok(MainChannel::Memfd),
        Channel::Unix { .. } => Err(QmpError::generic(format!(
            "'{channel}': the main channel of cpr-exec is file:PATH or memfd:, as nobody reads from a socket across the \
             exec"
        ))),
    }
}

/// The last or present update.
#[derive(Debug, Default)]
pub struct Progress {
    /// Where it is.
    pub status: Status,
    /// Why it failed.
    pub error: Option<String>,
    /// Its shared page, and so its timeline.
    pub control: Option<Control>,
    /// Its mode.
    pub mode: Option<String>,
    /// How many the guest has been through.
    pub generation: u64,
    /// Why the new program had refused beforehand, if the user went on all the same.
    pub preflight_refusal: Option<String>,
}

impl Progress {
    /// For `query-migrate`.
    pub fn query(&self, blocked: &[BlockReason]) -> Value {
        let mut info = Map::new();
        if self.status != Status::None {
            info.insert("status".into(), self.status.name().into());
        }
        if let Some(error) = &self.error {
            info.insert("error-desc".into(), error.as_str().into());
        }
        if !blocked.is_empty() {
            info.insert("blocked-reasons".into(), blocked.iter().map(ToString::to_string).collect());
        }
        if let Some(report) = self.control.as_ref().map(|control| control.timeline().report()) {
            self.add_report(&mut info, &report);
        }
        info.into()
    }

    fn add_report(&self, info: &mut Map<String, Value>, report: &Report) {
        // QEMU's keys are whole milliseconds; rounded up, so that a short blackout is not said to be none.
        let ms = |ns: u64| Value::from(ns.div_ceil(1_000_000));
        let us = |ns: u64| Value::from(ns.div_ceil(1_000));
        for (key, ns) in [
            ("setup-time", report.prepare_ns),
            ("total-time", report.total_ns),
            ("downtime", report.downtime_ns()),
        ] {
            if let Some(ns) = ns {
                info.insert(key.into(), ms(ns));
            }
        }
        let phases: Vec<_> =
            report.phases.iter().map(|phase| json!({ "name": phase.name, "us": us(phase.ns) })).collect();
        let mut cpr = json!({ "mode": self.mode, "generation": self.generation, "phases": phases });
        for (key, ns) in [("blackout-us", report.blackout_ns), ("departure-us", report.departure_ns)] {
            if let Some(ns) = ns {
                cpr[key] = us(ns);
            }
        }
        if let Some(refusal) = &self.preflight_refusal {
            cpr["preflight"] = format!("refused: {refusal}").into();
        }
        info.insert("cpr".into(), cpr);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_back_is_the_own_command_line_with_this_update() {
        let words = |words: &str| words.split(' ').map(OsString::from).collect::<Vec<_>>();
        let command = own_command(words("./cpr-vmm -incoming defer -S -name x"), &Channel::Memfd);
        assert_eq!(command, words("./cpr-vmm -S -name x -incoming memfd:"));
        let channel = Channel::File { path: "/a/b".into(), offset: 9 };
        let command = own_command(words("cpr-vmm --incoming memfd:"), &channel);
        assert_eq!(command, words("cpr-vmm -incoming file:/a/b,offset=9"));
    }
}
