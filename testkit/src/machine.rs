//! A VM whose guest holds a pattern and counts: what a failure must leave as it was.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::{Guest, PATIENCE, Vmm, VmmBuilder, wait_for};

/// The VM, and what its guest must keep.
pub struct Machine {
    /// The program that is talked to.
    pub vmm: Vmm,
    /// Its guest.
    pub guest: Guest,
    pattern_bytes: u64,
    seed: u64,
    beats: Vec<u64>,
}

/// Bytes of the pattern, unless it is to be everywhere.
const PATTERN_BYTES: u64 = 4 << 20;

impl Machine {
    /// Starts it, with 4 MiB of pattern and the `events` capability.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(builder: VmmBuilder) -> anyhow::Result<Machine> {
        Machine::with_pattern(builder, 7, |_| PATTERN_BYTES)
    }

    /// The same with the pattern in all of the RAM that the payload does not need itself.
    ///
    /// # Errors
    /// It does not come up.
    pub fn full(builder: VmmBuilder, seed: u64) -> anyhow::Result<Machine> {
        Machine::with_pattern(builder, seed, Guest::usable_bytes)
    }

    /// The same with RAM that is the file `ram`.
    ///
    /// # Errors
    /// It does not come up.
    pub fn full_in_file(builder: VmmBuilder, ram: &Path, seed: u64) -> anyhow::Result<Machine> {
        let vmm = builder.start()?;
        let guest = Guest::attach_file(ram, vmm.cpus().into())?;
        Machine::of(vmm, guest, seed, Guest::usable_bytes)
    }

    fn with_pattern(builder: VmmBuilder, seed: u64, bytes: fn(&Guest) -> u64) -> anyhow::Result<Machine> {
        let vmm = builder.start()?;
        let guest = vmm.guest()?;
        Machine::of(vmm, guest, seed, bytes)
    }

    fn of(mut vmm: Vmm, guest: Guest, seed: u64, bytes: fn(&Guest) -> u64) -> anyhow::Result<Machine> {
        let pattern_bytes = bytes(&guest);
        guest.fill(pattern_bytes, seed)?;
        vmm.set_capability("events")?;
        let mut machine = Machine { beats: vec![0; vmm.cpus().into()], vmm, guest, pattern_bytes, seed };
        machine.look_at_beats()?;
        Ok(machine)
    }

    /// Follows the guest into `target`, which must answer by now; gives the program that had it.
    ///
    /// # Errors
    /// QMP refuses.
    pub fn follow(&mut self, mut target: Vmm) -> anyhow::Result<Vmm> {
        // Capabilities are each program's own.
        target.set_capability("events")?;
        Ok(std::mem::replace(&mut self.vmm, target))
    }

    /// Sets a migration parameter.
    ///
    /// # Errors
    /// QMP refuses.
    pub fn set(&mut self, name: &str, value: Value) -> anyhow::Result<()> {
        self.vmm.qmp().execute("migrate-set-parameters", json!({ name: value })).map(drop)
    }

    /// Begins an update by cpr-exec, without waiting. Events that came before are forgotten.
    ///
    /// # Errors
    /// QMP refuses.
    pub fn begin(&mut self, command: &[String], uri: &str) -> anyhow::Result<()> {
        self.vmm.set_exec(command)?;
        self.vmm.qmp().take_events();
        self.vmm.qmp().execute("migrate", json!({ "uri": uri })).map(drop)
    }

    /// Waits until the update has failed; gives the error in `query-migrate`.
    ///
    /// # Errors
    /// It has not, or the guest's counter went back.
    pub fn has_failed(&mut self) -> anyhow::Result<String> {
        self.failure().map(|(error, _)| error)
    }

    /// The same with the events up to then.
    ///
    /// # Errors
    /// As [`has_failed`](Self::has_failed).
    pub fn failure(&mut self) -> anyhow::Result<(String, Vec<Value>)> {
        let failed = |data: &Value| data["status"] == "failed";
        // Nobody is asked before it was told: a program that dies of a signal takes an answer under way with it.
        let deadline = Instant::now() + PATIENCE;
        while !self.vmm.qmp().has_come("MIGRATION", failed, Duration::from_millis(100))? {
            self.look_at_beats()?;
            ensure!(Instant::now() < deadline, "waited {PATIENCE:?} in vain for the failure");
        }
        let info = self.vmm.qmp().execute("query-migrate", json!({}))?;
        ensure!(info["status"] == "failed", "an update that was told to have failed: {info}");
        let events = self.vmm.qmp().take_events();
        let error = info["error-desc"].as_str().unwrap_or_default().to_owned();
        self.look_at_beats().context(error.clone())?;
        Ok((error, events))
    }

    /// The guest's counters never go back.
    ///
    /// # Errors
    /// One did.
    pub fn look_at_beats(&mut self) -> anyhow::Result<()> {
        for (vcpu, before) in (0..).zip(&mut self.beats) {
            let beats = self.guest.vcpu(vcpu).beats();
            ensure!(beats >= *before, "vCPU {vcpu} went back from {before} to {beats}");
            *before = beats;
        }
        Ok(())
    }

    /// Every vCPU runs, from where it was.
    ///
    /// # Errors
    /// One does not.
    pub fn beats_on(&mut self) -> anyhow::Result<()> {
        for vcpu in (0..).take(self.beats.len()) {
            self.guest.beats_on(vcpu)?;
        }
        self.look_at_beats()
    }

    /// No vCPU runs.
    ///
    /// # Errors
    /// One does.
    pub fn stands_still(&mut self) -> anyhow::Result<()> {
        self.look_at_beats()?;
        let before = self.beats.clone();
        std::thread::sleep(std::time::Duration::from_millis(20));
        self.look_at_beats()?;
        ensure!(self.beats == before, "the guest runs: {before:?} -> {:?}", self.beats);
        Ok(())
    }

    /// One process of the VM is left, and it runs the guest; gives its id.
    ///
    /// # Errors
    /// There are more or none, or the guest stands still.
    pub fn runner(&mut self) -> anyhow::Result<u32> {
        let runner = wait_for("all but one process to end", PATIENCE, || match *self.vmm.processes() {
            [runner] => Some(runner),
            _ => None,
        })?;
        // A thread names itself, some time after it was started.
        wait_for("one thread per vCPU", PATIENCE, || {
            let threads = oslib::process::thread_names(runner).ok()?;
            let count = |vcpu| threads.iter().filter(|name| **name == format!("vcpu{vcpu}")).count();
            (0..self.beats.len()).all(|vcpu| count(vcpu) == 1).then_some(())
        })?;
        let status = self.vmm.status()?;
        ensure!(status == "running", "the guest is {status}");
        self.beats_on()?;
        Ok(runner)
    }

    /// The pattern is intact.
    ///
    /// # Errors
    /// It is not; the error names the first word.
    pub fn verify(&self) -> anyhow::Result<()> {
        self.guest.verify(self.pattern_bytes, self.seed)
    }
}
