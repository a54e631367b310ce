//! Measures an update from both sides: what the VMM's timeline says, and the largest gap between two clock reads that
//! the guest itself saw.
//!
//! The guest's figure is the truth, but it also holds what the host's scheduler took at that moment. So every update
//! comes with its ambient: the same window, with the same monitor traffic, without an update. Nothing here judges;
//! limits are for `cargo xtask bench`.

use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::{Value, json};
use vmm_core::payload::{Command, field};

use crate::{Guest, PATIENCE, Vmm, payload_tsc_hz, wait_for};

/// How long a window stays open after every vCPU beats again.
const TAIL: Duration = Duration::from_millis(3);

/// How the state travels to the next VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Through {
    /// In a file in the VM's folder.
    File,
    /// In a memfd: no disk is touched.
    Memfd,
}

/// One update as both sides saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    /// The host's timeline: from the first vCPU's last exit to the last vCPU's first entry.
    pub host: Duration,
    /// The largest gap that any vCPU saw.
    pub guest: Duration,
    /// The largest gap of a window as long as the update's, without an update.
    pub ambient: Duration,
    /// The pieces of `host`, in order.
    pub phases: Vec<(String, Duration)>,
}

/// Measures the updates of one VM.
#[derive(Debug)]
pub struct Meter {
    tsc_hz: f64,
    vcpus: u32,
    populated_bytes: u64,
}

impl Meter {
    /// A meter for a running guest with `vcpus` vCPUs that touches `populated_bytes` of its RAM before each update; this
    /// fills them with the pattern of `seed`.
    ///
    /// # Errors
    /// The guest does not answer, or has less RAM.
    pub fn new(guest: &Guest, vcpus: u8, populated_bytes: u64, seed: u64) -> anyhow::Result<Meter> {
        guest.fill(populated_bytes, seed)?;
        Ok(Meter { tsc_hz: payload_tsc_hz(guest), vcpus: vcpus.into(), populated_bytes })
    }

    /// RAM that the guest touches before each update, in bytes.
    pub fn populated_bytes(&self) -> u64 {
        self.populated_bytes
    }

    /// Updates once: lets the guest write to all of its populated pages, takes the ambient, then the update.
    ///
    /// # Errors
    /// The update fails, or the guest stands still.
    pub fn update(&self, vmm: &mut Vmm, guest: &Guest, through: Through) -> anyhow::Result<Update> {
        guest.run(Command::Touch { offset: 0, bytes: self.populated_bytes })?;
        let uri = match through {
            Through::File => format!("file:{}", vmm.path("state").display()),
            Through::Memfd => "memfd:".to_owned(),
        };
        let command = vmm.exec_command(&uri);
        vmm.set_exec(&command)?;

        self.measure(guest, vmm, |vmm| vmm.migrate(&uri))
    }

    /// The same by a transfer to `target`, which has the guest afterwards.
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub fn transfer(&self, source: &mut Vmm, target: &mut Vmm, guest: &Guest) -> anyhow::Result<Update> {
        guest.run(Command::Touch { offset: 0, bytes: self.populated_bytes })?;
        self.measure(guest, source, |source| source.transfer(target))
    }

    fn measure(
        &self,
        guest: &Guest,
        vmm: &mut Vmm,
        update: impl FnOnce(&mut Vmm) -> anyhow::Result<Value>,
    ) -> anyhow::Result<Update> {
        let mut report = Value::Null;
        let mut took = Duration::ZERO;
        let gap = self.gap(guest, || {
            let begin = Instant::now();
            report = update(vmm)?;
            took = begin.elapsed();
            Ok(())
        })?;
        let ambient = self.gap(guest, || {
            let begin = Instant::now();
            while begin.elapsed() < took {
                vmm.qmp().execute("query-migrate", json!({}))?;
            }
            Ok(())
        })?;
        let (host, phases) = timeline(&report)?;
        Ok(Update { host, guest: gap, ambient, phases })
    }

    /// The largest gap that any vCPU sees around `action`. The window ends a few milliseconds after all of them beat
    /// again, so that it holds little else.
    ///
    /// # Errors
    /// The action fails, or a vCPU stands still.
    pub fn gap(
        &self,
        guest: &Guest,
        action: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<Duration> {
        // Asked of all before any is waited for: where vCPUs share a CPU, one answer takes a time slice.
        let tickets: Vec<_> =
            self.each().map(|index| (index, guest.vcpu(index).request_gap_reset())).collect();
        for (index, ticket) in tickets {
            wait_for("the gap reset", PATIENCE, || guest.vcpu(index).gap_was_reset(ticket).then_some(()))?;
        }
        action()?;
        for index in self.each() {
            guest.beats_on(index)?;
        }
        std::thread::sleep(TAIL);
        let cycles = self.each().map(|index| guest.vcpu(index).max_gap_tsc()).max().unwrap_or(0);
        Ok(Duration::from_secs_f64(cycles as f64 / self.tsc_hz))
    }

    /// Beats whose clock lay before that of the beat before, over all vCPUs since the start. Anything but zero is a bug.
    pub fn backward_steps(&self, guest: &Guest) -> u64 {
        self.each().map(|index| guest.vcpu(index).read(field::TSC_BACKWARDS)).sum()
    }

    fn each(&self) -> std::ops::Range<u32> {
        0..self.vcpus
    }
}

/// How long the guest stood still, in how many pieces, out of a `query-migrate`: the blackout with its phases in order and,
/// before it, the pause in which the program left its process.
///
/// # Errors
/// It reports no finished update of a running guest.
pub fn timeline(report: &Value) -> anyhow::Result<(Duration, Vec<(String, Duration)>)> {
    let cpr = &report["cpr"];
    let us = |value: &Value| value.as_u64().map(Duration::from_micros);
    let blackout = us(&cpr["blackout-us"]).with_context(|| format!("no blackout in {report}"))?;
    let phases = cpr["phases"].as_array().with_context(|| format!("no phases in {report}"))?;
    let departure = us(&cpr["departure-us"]);
    let named =
        phases.iter().filter_map(|phase| Some((phase["name"].as_str()?.to_owned(), us(&phase["us"])?)));
    let phases =
        departure.map(|departure| ("depart".to_owned(), departure)).into_iter().chain(named).collect();
    Ok((blackout + departure.unwrap_or_default(), phases))
}

/// Median of at least one figure; of an even number the mean of the middle two.
///
/// # Panics
/// If there is none.
pub fn median(figures: impl IntoIterator<Item = Duration>) -> Duration {
    let mut figures: Vec<Duration> = figures.into_iter().collect();
    figures.sort_unstable();
    let middle = figures.len() / 2;
    if figures.len() % 2 == 1 { figures[middle] } else { (figures[middle - 1] + figures[middle]) / 2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        let ms = |figures: &[u64]| median(figures.iter().copied().map(Duration::from_millis));
        assert_eq!(ms(&[5]), Duration::from_millis(5));
        assert_eq!(ms(&[9, 1, 5]), Duration::from_millis(5));
        assert_eq!(ms(&[9, 1, 5, 6]), Duration::from_micros(5500));
    }

    #[test]
    fn a_timeline_is_read_from_a_report() {
        let report = json!({ "status": "completed", "cpr": {
            "blackout-us": 3000, "phases": [{ "name": "stop", "us": 200 }, { "name": "save", "us": 2800 }] } });
        let (host, phases) = timeline(&report).unwrap();
        assert_eq!(host, Duration::from_millis(3));
        assert_eq!(phases[1], ("save".to_owned(), Duration::from_micros(2800)));
        let report = json!({ "cpr": { "blackout-us": 500, "departure-us": 700, "phases": [] } });
        let departure = ("depart".to_owned(), Duration::from_micros(700));
        assert_eq!(timeline(&report).unwrap(), (Duration::from_micros(1200), vec![departure]));
        assert!(timeline(&json!({ "status": "failed" })).is_err());
    }
}
