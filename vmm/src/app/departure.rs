//! The program in the keeper: it has left its process to the next program, and runs the guest until that one is built.
//!
//! The guest notices nothing, and its serial output goes on. Everything that the next program was given is left alone:
//! monitors with their sessions, signals, serial input. What ends this state is the commit, after which this process
//! disappears, or a failure of the next program, after which this one is the program again, under another process id.

use anyhow::Context;

use super::{App, FrontEnd, RunState, User};
use crate::chardev::Chardev;
use crate::event_loop::EventLoop;
use crate::migration::Status;

impl App {
    /// The chardev that COM1 is connected to.
    pub(super) fn serial_chardev(&self) -> Option<usize> {
        let is_serial =
            |front_end: &FrontEnd| front_end.users.iter().any(|user| matches!(user, User::Serial(_)));
        self.parts.front_ends.iter().position(is_serial)
    }

    /// The chardevs that the guest writes to.
    pub(super) fn guests_chardevs(&self) -> impl Iterator<Item = usize> {
        let front_ends = self.parts.front_ends.iter().enumerate();
        front_ends.filter(|(_, front_end)| front_end.is_guests()).map(|(at, _)| at)
    }

    /// Monitors hear of the stop and of what follows now, for the next program has them from here on.
    pub(super) fn say_farewell(&mut self) {
        self.progress.status = Status::Active;
        self.emit_migration_event();
        if self.parts.run_state == RunState::Running {
            self.emit("STOP", None);
        }
        self.progress.status = Status::Device;
        self.emit_migration_event();
        self.deliver_events();
        self.stop_told = true;
        if let Some(hardware) = &self.parts.hardware {
            hardware.machine.rest_when_paused();
        }
    }

    /// The exec ends threads where they stand; what resumes the guest wakes them if it fails, or starts new ones.
    pub(super) fn rest_threads(&mut self) -> anyhow::Result<()> {
        Ok(self.hardware()?.machine.rest_threads()?)
    }

    /// The first thing in the keeper.
    pub(super) fn become_keeper(&mut self) -> anyhow::Result<()> {
        self.departed = true;
        // The old instance watches signals of the process that was left.
        self.events = EventLoop::new()?;
        if let Some(control) = self.progress.control.clone() {
            self.parts.observer.arm_in_keeper(control, self.parts.config.cpus.into());
        }
        Ok(())
    }

    /// The target has the guest: this process is of no use any more.
    pub(super) fn leave_it_to_the_target(&mut self) -> ! {
        // A last close of these would take long, and peers of everything else wait for an end.
        let slow = self.hardware().and_then(|hardware| Ok(hardware.machine.kvm_fds()?)).unwrap_or_default();
        oslib::process::step_aside(slow, 0)
    }

    /// The target failed: this process is the program from now on.
    pub(super) fn come_back(&mut self) {
        self.departed = false;
        tracing::warn!(pid = std::process::id(), "the guest goes on in another process");
        let write = |path: &std::path::PathBuf| {
            std::fs::write(path, format!("{}\n", std::process::id()))
                .with_context(|| format!("-pidfile: cannot write {}", path.display()))
        };
        if let Some(Err(error)) = self.parts.config.pidfile.as_ref().map(write) {
            tracing::warn!("{error:#}");
        }
        let deferred =
            self.progress.control.as_ref().is_some_and(|control| control.rendezvous().was_deferred());
        if deferred {
            // That program served the monitors meanwhile, and sent them what they had not taken.
            let of_all = self.parts.chardevs.iter().zip(&self.parts.front_ends);
            let others = of_all.filter(|(_, front_end)| !front_end.is_guests());
            others.for_each(|(chardev, _)| chardev.output().forget());
        }
        match EventLoop::new() {
            Ok(events) => self.events = events,
            Err(error) => tracing::error!(%error, "signals may go unnoticed"),
        }
        // The program that failed gave it back to whoever started it.
        self.parts.chardevs.iter().for_each(Chardev::reclaim_terminal);
        self.tell_resets();
        // As it is told after a farewell that led nowhere.
        self.stop_told = true;
    }

    /// Monitors hear of resets that happened while nobody could tell them.
    pub(super) fn tell_resets(&mut self) {
        for reset in std::mem::take(&mut self.untold_resets) {
            self.emit_reset(reset);
        }
    }
}
