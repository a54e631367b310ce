//! Run states, and what moves the machine between them: monitors, the guest, signals.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;
use vmm_core::machine::MachineError;
use vmm_core::vcpu::VcpuEvent;

use super::App;
use crate::errors;
use crate::startup::{self, Hardware};

/// QEMU's `RunState`, as far as this program knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// Started with -S.
    Prelaunch,
    /// The guest runs.
    Running,
    /// Stopped by a user.
    Paused,
    /// Waits for an incoming update.
    InMigrate,
    /// Stopped by an update that is under way.
    FinishMigrate,
    /// Another process has the guest.
    PostMigrate,
    /// A vCPU cannot go on.
    InternalError,
}

impl RunState {
    /// As QMP spells it.
    pub fn name(self) -> &'static str {
        match self {
            RunState::Prelaunch => "prelaunch",
            RunState::Running => "running",
            RunState::Paused => "paused",
            RunState::InMigrate => "inmigrate",
            RunState::FinishMigrate => "finish-migrate",
            RunState::PostMigrate => "postmigrate",
            RunState::InternalError => "internal-error",
        }
    }

    /// Whether the guest's state is whole and ours.
    pub fn can_migrate(self) -> bool {
        matches!(self, RunState::Prelaunch | RunState::Running | RunState::Paused)
    }
}

/// A reset that was carried out.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Reset {
    /// The guest asked for it; else a monitor did.
    by_guest: bool,
}

/// Why the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// `quit`, or Ctrl-a x.
    Quit,
    /// SIGTERM, SIGINT or SIGHUP.
    Signal(i32),
    /// The guest powered off.
    GuestPowerOff,
    /// The guest reset, and -no-reboot makes that the end.
    GuestReset,
    /// The guest of an incoming update could not be taken over.
    Fatal,
}

impl Exit {
    fn cause(self) -> (bool, &'static str) {
        match self {
            Exit::Quit => (false, "host-qmp-quit"),
            Exit::Signal(_) => (false, "host-signal"),
            Exit::GuestPowerOff => (true, "guest-shutdown"),
            Exit::GuestReset => (true, "guest-reset"),
            Exit::Fatal => (false, "host-error"),
        }
    }
}

const PAUSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one attempt to carry out the guest's own reset may hold up monitors.
const RESET_TIMEOUT: Duration = Duration::from_millis(500);
/// How long the guest runs on before the next attempt.
const RESET_AGAIN: Duration = Duration::from_secs(1);

impl App {
    pub(super) fn set_run_state(&mut self, state: RunState) {
        tracing::debug!(from = self.parts.run_state.name(), to = state.name(), "run state");
        self.parts.run_state = state;
    }

    /// Stops the guest; `state` is what it is then. Says whether it ran.
    pub(super) fn pause_guest(&mut self, state: RunState, timeout: Duration) -> anyhow::Result<bool> {
        let ran = self.parts.run_state == RunState::Running;
        if ran {
            self.hardware()?.machine.pause(timeout)?;
            if !self.stop_told {
                self.emit("STOP", None);
            }
        }
        self.set_run_state(state);
        Ok(ran)
    }

    /// Runs the guest.
    pub(super) fn run_guest(&mut self) -> anyhow::Result<()> {
        self.hardware()?.machine.run()?;
        self.set_run_state(RunState::Running);
        self.emit("RESUME", None);
        Ok(())
    }

    pub(super) fn emit_reset(&mut self, Reset { by_guest }: Reset) {
        let reason = if by_guest { "guest-reset" } else { "host-qmp-system-reset" };
        self.emit("RESET", Some(json!({ "guest": by_guest, "reason": reason })));
    }

    pub(super) fn emit_shutdown(&mut self, exit: &Exit) {
        let (guest, reason) = exit.cause();
        self.emit("SHUTDOWN", Some(json!({ "guest": guest, "reason": reason })));
    }

    pub(super) fn handle_signals(&mut self) -> anyhow::Result<()> {
        while let Some(signal) = self.parts.signals.read()? {
            self.exit.get_or_insert(Exit::Signal(signal.signo));
        }
        Ok(())
    }

    pub(super) fn handle_vcpu_events(&mut self) {
        let next = |app: &App| app.parts.hardware.as_ref()?.machine.events().try_recv();
        while let Some(event) = next(self) {
            match event {
                VcpuEvent::PowerOff => {
                    self.exit.get_or_insert(Exit::GuestPowerOff);
                }
                VcpuEvent::Reset { .. } | VcpuEvent::TripleFault { .. } => self.guest_reset(&event),
                VcpuEvent::Failed { vcpu, message } => self.vcpu_failed(vcpu, &message),
                VcpuEvent::System { vcpu, kind } => {
                    self.vcpu_failed(vcpu, &format!("KVM system event {kind}, which is not known"));
                }
                other => tracing::warn!(?other, "ignored"),
            }
        }
        self.carry_out_reset();
    }

    /// Whether the guest itself brought it about that it must not run again.
    pub(super) fn guest_has_ended(&self) -> bool {
        matches!(self.exit, Some(Exit::GuestPowerOff | Exit::GuestReset))
            || self.parts.run_state == RunState::InternalError
    }

    fn guest_reset(&mut self, event: &VcpuEvent) {
        match event {
            // Some guests do it to reset; others did not mean to.
            VcpuEvent::TripleFault { vcpu } => tracing::warn!(vcpu, "the guest resets by a triple fault"),
            other => tracing::info!(event = ?other, "the guest asked for a reset"),
        }
        if self.parts.config.no_reboot {
            self.exit.get_or_insert(Exit::GuestReset);
        } else {
            self.reset_due.get_or_insert_with(Instant::now);
        }
    }

    /// Carries out the reset that the guest has asked for, if it has. While a device keeps the machine from stopping, the
    /// guest runs on, and the reset stays due.
    pub(super) fn carry_out_reset(&mut self) {
        if self.reset_due.take().is_none() {
            return;
        }
        let Err(error) = self.reset_machine(true) else { return };
        match error.downcast_ref() {
            Some(MachineError::PauseTimedOut { .. } | MachineError::Restless { .. }) => {
                tracing::warn!(%error, "the guest's reset has to wait");
                self.reset_due = Some(Instant::now() + RESET_AGAIN);
            }
            _ => self.vcpu_failed(0, &errors::text(error.as_ref())),
        }
    }

    fn vcpu_failed(&mut self, vcpu: usize, message: &str) {
        eprintln!("cpr-vmm: vCPU {vcpu}: {message}");
        if let Err(error) = self.pause_guest(RunState::InternalError, PAUSE_TIMEOUT) {
            tracing::error!(%error, "the other vCPUs did not stop");
            self.set_run_state(RunState::InternalError);
        }
    }

    /// Resets machine and memory and boots again; a guest that was stopped stays so.
    pub(super) fn reset_machine(&mut self, by_guest: bool) -> anyhow::Result<()> {
        let ran = self.parts.run_state == RunState::Running;
        let failed = self.parts.run_state == RunState::InternalError;
        let machine = &self.hardware()?.machine;
        if ran || !machine.is_paused() {
            machine.pause(if by_guest { RESET_TIMEOUT } else { PAUSE_TIMEOUT })?;
        }
        // What vCPUs have asked for up to here is done by this reset, or cannot be done after it; an end still can.
        let events: Vec<_> = std::iter::from_fn(|| machine.events().try_recv()).collect();
        if events.contains(&VcpuEvent::PowerOff) {
            self.exit.get_or_insert(Exit::GuestPowerOff);
        }
        self.reset_due = None;
        let Hardware { ram, machine, .. } = self.hardware()?;
        // A kernel's zero-initialised data is expected to be zero, as in a machine that was just switched on.
        ram.clear()?;
        let entry = startup::load_kernel(&self.parts.config, ram)?;
        machine.reset(&|regs, sregs| entry.apply(regs, sregs))?;
        let reset = Reset { by_guest };
        if self.departed {
            self.untold_resets.push(reset)
        } else {
            self.emit_reset(reset)
        }
        if ran {
            self.hardware()?.machine.run()?;
        } else if failed {
            self.set_run_state(RunState::Paused);
        }
        Ok(())
    }

    pub(super) fn stop_command(&mut self) -> anyhow::Result<()> {
        if self.parts.run_state == RunState::Running {
            self.pause_guest(RunState::Paused, PAUSE_TIMEOUT)?;
        }
        Ok(())
    }
}
