//! One visit: a VMM is booted, its guest populates RAM, is updated under, and checks its RAM at the end.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testkit::{Guest, Meter, payload_tsc_hz};
use vmm_core::payload::Command;

use super::journal::{Record, Sample, Walked};
use super::plan::{Cell, Mode, Visit, Who};
use super::programs::Programs;
use super::subject::{self, Subject};
use super::walk;

/// Chooses the pattern in guest RAM.
const SEED: u64 = 0xbe7c;

/// A brownout that is not over after this is not waited for. On a quiet machine it is about 1 s for each GiB.
pub(super) fn walk_limit(cell: &Cell) -> Duration {
    Duration::from_secs(2 + 6 * (cell.populated_bytes >> 30).max(1))
}

/// Measures what the visit is for.
pub(super) fn visit(programs: &Programs, visit: &Visit) -> Result<Record> {
    let mut running = Running::start(programs, visit.who, visit.cell)?;
    let mut updates = Vec::new();
    for &mode in &visit.updates {
        updates.push(running.update(mode).with_context(|| format!("update by {}", mode.name()))?);
    }
    let mut walks = Vec::new();
    for &mode in &visit.walks {
        walks.push(running.walk(mode).with_context(|| format!("walk and {}", mode.name()))?);
    }
    running.end()?;
    Ok(Record { round: visit.round, cell: visit.cell.name.to_owned(), who: visit.who, updates, walks })
}

/// Boots `who` once, says which modes it has, with its words on those that it has not, and updates by each to warm up:
/// programs and their libraries are in the page cache then.
pub(super) fn try_out(programs: &Programs, who: Who, cell: &Cell) -> Result<Vec<(Mode, Option<String>)>> {
    let mut running = Running::start(programs, who, cell)?;
    let mut modes = Vec::new();
    for mode in super::plan::MODES {
        let refused = running.subject.refuses(mode)?;
        if refused.is_none() {
            running.update(mode).with_context(|| format!("first update by {}", mode.name()))?;
        }
        modes.push((mode, refused));
    }
    running.end()?;
    Ok(modes)
}

struct Running {
    subject: Box<dyn Subject>,
    guest: Guest,
    meter: Meter,
    tsc_hz: f64,
    cell: Cell,
}

impl Running {
    fn start(programs: &Programs, who: Who, cell: &Cell) -> Result<Running> {
        let subject = subject::start(programs, who, cell)?;
        let guest = subject.guest()?;
        let meter = Meter::new(&guest, cell.vcpus, cell.populated_bytes, SEED)?;
        let tsc_hz = payload_tsc_hz(&guest);
        Ok(Running { subject, guest, meter, tsc_hz, cell: *cell })
    }

    fn update(&mut self, mode: Mode) -> Result<Sample> {
        self.populate()?;
        self.subject.prepare(mode)?;
        let begin = Instant::now();
        let gap = self.meter.gap(&self.guest, || self.subject.begin(mode))?;
        let took = begin.elapsed();
        let phases = self.subject.finish(mode)?;
        let ambient = self.meter.gap(&self.guest, || {
            thread::sleep(took);
            Ok(())
        })?;
        let phases = phases.unwrap_or_default().into_iter();
        Ok(Sample {
            mode,
            gap_us: us(gap),
            ambient_us: us(ambient),
            phases_us: phases.map(|(name, time)| (name, us(time))).collect(),
        })
    }

    fn walk(&mut self, mode: Mode) -> Result<Walked> {
        self.populate()?;
        self.subject.prepare(mode)?;
        let (bytes, limit) = (self.cell.populated_bytes, walk_limit(&self.cell));
        let update = || self.subject.begin(mode);
        let brownout = walk::brownout(&self.guest, &self.meter, self.tsc_hz, bytes, limit, update)?;
        self.subject.finish(mode)?;
        Ok(Walked { mode, brownout_us: brownout.map(us) })
    }

    fn populate(&self) -> Result<()> {
        let bytes = self.cell.populated_bytes;
        self.guest.run(Command::Touch { offset: 0, bytes }).map(drop)
    }

    /// Ends the VM, which must not have lost a word of its RAM, nor have set its clock back.
    fn end(self) -> Result<()> {
        self.guest.verify(self.cell.populated_bytes, SEED)?;
        let backward = self.meter.backward_steps(&self.guest);
        ensure!(backward == 0, "the guest's clock stepped back {backward} times");
        self.subject.quit()
    }
}

fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
