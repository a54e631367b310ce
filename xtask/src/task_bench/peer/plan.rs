//! What is compared: machines (cells), the two modes, the VMMs; how many updates of each, and in which order.
//!
//! A *visit* boots one VMM with the machine of one cell and updates it a few times. A round visits every cell with every
//! VMM, in another order each round, so that a busy minute of the host hits all of them alike. Nothing here runs
//! anything.

use std::fmt;

use serde::{Deserialize, Serialize};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// RAM beyond what the guest populates: the payload keeps some for itself.
const OVERHEAD_BYTES: u64 = 16 * MIB;

/// Of the host's RAM this much is left for everything else.
const SPARE_BYTES: u64 = GIB;

/// Updates of a mode in one visit.
const UPDATES: u32 = 2;

/// The same with `--long`, for the cells that it is about.
const LONG_UPDATES: u32 = 20;

/// In every so manieth round each visit has one more update of each mode, under a guest that walks its RAM.
const WALK_EVERY: u32 = 2;

/// A machine that is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cell {
    /// The name for `--only` and in the samples file.
    pub(super) name: &'static str,
    /// RAM that the guest writes to before each update, in bytes.
    pub(super) populated_bytes: u64,
    pub(super) vcpus: u8,
    /// `--long` is about it.
    long: bool,
}

/// All cells.
pub(super) const CELLS: [Cell; 6] = [
    Cell { name: "256M", populated_bytes: 256 * MIB, vcpus: 1, long: false },
    Cell { name: "1G", populated_bytes: GIB, vcpus: 1, long: true },
    Cell { name: "4G", populated_bytes: 4 * GIB, vcpus: 1, long: true },
    Cell { name: "8G", populated_bytes: 8 * GIB, vcpus: 1, long: false },
    Cell { name: "1Gx2", populated_bytes: GIB, vcpus: 2, long: false },
    Cell { name: "1Gx4", populated_bytes: GIB, vcpus: 4, long: false },
];

impl Cell {
    /// The cell of this name.
    pub(super) fn named(name: &str) -> Result<&'static Cell, String> {
        CELLS.iter().find(|cell| cell.name == name).ok_or_else(|| {
            let names: Vec<_> = CELLS.iter().map(|cell| cell.name).collect();
            format!("no such cell; there are {}", names.join(", "))
        })
    }

    /// The machine's RAM in bytes.
    pub(super) fn ram_bytes(&self) -> u64 {
        self.populated_bytes + OVERHEAD_BYTES
    }

    /// Why this host cannot hold it, if so.
    pub(super) fn obstacle(&self, available_bytes: u64) -> Option<String> {
        let needed = self.ram_bytes() + SPARE_BYTES;
        (available_bytes < needed).then(|| {
            format!("needs {} MiB of free memory, {} MiB are available", needed / MIB, available_bytes / MIB)
        })
    }

    /// The RAM for people.
    pub(super) fn ram(&self) -> String {
        match self.populated_bytes {
            bytes if bytes % GIB == 0 => format!("{} GiB", bytes / GIB),
            bytes => format!("{} MiB", bytes / MIB),
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = if self.vcpus == 1 { "" } else { "s" };
        write!(f, "{}, {} vCPU{s}", self.ram(), self.vcpus)
    }
}

/// A way to update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Mode {
    CprExec,
    CprTransfer,
}

/// Both.
pub(super) const MODES: [Mode; 2] = [Mode::CprExec, Mode::CprTransfer];

impl Mode {
    /// The name in QMP.
    pub(super) fn name(self) -> &'static str {
        match self {
            Mode::CprExec => "cpr-exec",
            Mode::CprTransfer => "cpr-transfer",
        }
    }
}

/// A VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Who {
    CprVmm,
    Qemu,
    /// Debian's second build of QEMU, that has the machine `microvm` and little else, and so starts faster.
    QemuSmall,
}

/// All three.
pub(super) const WHO: [Who; 3] = [Who::CprVmm, Who::Qemu, Who::QemuSmall];

impl Who {
    /// The name for people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Who::CprVmm => "cpr-vmm",
            Who::Qemu => "QEMU",
            Who::QemuSmall => "QEMU, small build",
        }
    }

    /// Whether it is measured in this cell. The small QEMU tells what the large one's start costs; one cell does.
    pub(super) fn is_in(self, cell: &Cell) -> bool {
        self != Who::QemuSmall || cell.name == "1G"
    }
}

/// What a run is to measure.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// Cells that fit, in the order of [`CELLS`].
    pub(super) cells: Vec<&'static Cell>,
    /// What each VMM can do; one that is not there can do nothing.
    pub(super) offers: Vec<(Who, Mode)>,
    pub(super) rounds: u32,
    pub(super) long: bool,
}

/// One VMM with the machine of one cell, and what to do with it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Visit {
    pub(super) round: u32,
    pub(super) cell: &'static Cell,
    pub(super) who: Who,
    /// Modes in the order in which they are updated by.
    pub(super) updates: Vec<Mode>,
    /// The same under a guest that walks its RAM.
    pub(super) walks: Vec<Mode>,
}

impl Plan {
    /// The visits of a whole run, in their order, less what `done` says is there: the numbers of updates and of walks
    /// that the samples have of a round.
    pub(super) fn visits(&self, done: impl Fn(u32, &Cell, Who, Mode) -> (u32, u32)) -> Vec<Visit> {
        let mut visits = Vec::new();
        for round in 0..self.rounds {
            for step in 0..self.cells.len() {
                let cell = self.cells[(step + round as usize) % self.cells.len()];
                for turn in 0..WHO.len() {
                    // Who goes first changes with the cell and with the round.
                    let who = WHO[(turn + step + round as usize) % WHO.len()];
                    let visit = self.visit(round, cell, who, &done);
                    visits.extend(visit.filter(|visit| !visit.updates.is_empty() || !visit.walks.is_empty()));
                }
            }
        }
        visits
    }

    fn visit(
        &self,
        round: u32,
        cell: &'static Cell,
        who: Who,
        done: impl Fn(u32, &Cell, Who, Mode) -> (u32, u32),
    ) -> Option<Visit> {
        if !who.is_in(cell) {
            return None;
        }
        let mut modes: Vec<Mode> =
            MODES.into_iter().filter(|&mode| self.offers.contains(&(who, mode))).collect();
        if round % 2 == 1 {
            modes.reverse();
        }
        let missing = |wanted: u32, of: fn((u32, u32)) -> u32| {
            let left = |mode| wanted.saturating_sub(of(done(round, cell, who, mode)));
            let mut order = Vec::new();
            for turn in 0..wanted {
                order.extend(modes.iter().copied().filter(|&mode| turn < left(mode)));
            }
            order
        };
        let wanted = if self.long && cell.long { LONG_UPDATES } else { UPDATES };
        let walks = u32::from(round.is_multiple_of(WALK_EVERY));
        Some(Visit {
            round,
            cell,
            who,
            updates: missing(wanted, |done| done.0),
            walks: missing(walks, |done| done.1),
        })
    }
}

impl Visit {
    /// A guess at how long it takes, in seconds, from runs on a small machine: first touch of a page costs the most.
    pub(super) fn guess_seconds(&self) -> f64 {
        let gib = self.cell.populated_bytes as f64 / GIB as f64;
        let (updates, walks) = (self.updates.len() as f64, self.walks.len() as f64);
        0.7 + updates * 0.4 + walks * 0.8 + gib * (3.0 + 1.2 * updates + 2.4 * walks)
    }
}

impl fmt::Display for Visit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "round {}: {}, {}", self.round + 1, self.who.name(), self.cell)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(rounds: u32, long: bool) -> Plan {
        let offers = vec![
            (Who::CprVmm, Mode::CprExec),
            (Who::Qemu, Mode::CprExec),
            (Who::Qemu, Mode::CprTransfer),
            (Who::QemuSmall, Mode::CprExec),
        ];
        Plan { cells: CELLS.iter().collect(), offers, rounds, long }
    }

    fn count(visits: &[Visit], cell: &str, who: Who, mode: Mode) -> usize {
        let of = |visit: &Visit| visit.updates.iter().filter(|&&other| other == mode).count();
        visits.iter().filter(|visit| visit.cell.name == cell && visit.who == who).map(of).sum()
    }

    #[test]
    fn ten_rounds_are_twenty_updates_of_what_is_offered() {
        let visits = plan(10, false).visits(|_, _, _, _| (0, 0));
        assert_eq!(count(&visits, "8G", Who::CprVmm, Mode::CprExec), 20);
        assert_eq!(count(&visits, "8G", Who::CprVmm, Mode::CprTransfer), 0);
        assert_eq!(count(&visits, "1Gx4", Who::Qemu, Mode::CprTransfer), 20);
        assert_eq!(count(&visits, "1G", Who::QemuSmall, Mode::CprExec), 20);
        assert_eq!(count(&visits, "4G", Who::QemuSmall, Mode::CprExec), 0);
    }

    #[test]
    fn a_long_run_has_two_hundred_in_two_cells() {
        let visits = plan(10, true).visits(|_, _, _, _| (0, 0));
        for (cell, expected) in [("256M", 20), ("1G", 200), ("4G", 200), ("8G", 20), ("1Gx2", 20)] {
            assert_eq!(count(&visits, cell, Who::Qemu, Mode::CprExec), expected, "{cell}");
        }
    }

    #[test]
    fn vmms_take_turns_and_cells_move_on() {
        let visits = plan(2, false).visits(|_, _, _, _| (0, 0));
        let first: Vec<_> = visits.iter().filter(|visit| visit.round == 0).collect();
        assert_eq!((first[0].cell.name, first[0].who), ("256M", Who::CprVmm));
        assert_eq!((first[1].cell.name, first[1].who), ("256M", Who::Qemu));
        assert_eq!((first[2].cell.name, first[2].who), ("1G", Who::Qemu));
        let second: Vec<_> = visits.iter().filter(|visit| visit.round == 1).collect();
        assert_eq!(second[0].cell.name, "1G");
        assert_eq!(second.len(), first.len());
    }

    #[test]
    fn what_is_there_is_not_measured_again() {
        let done = |round, cell: &Cell, who, _| match (round, cell.name, who) {
            (0, "1G", Who::CprVmm) => (2, 1),
            (0, "1G", Who::Qemu) => (1, 0),
            _ => (0, 0),
        };
        let mut small = plan(1, false);
        small.cells = vec![Cell::named("1G").unwrap()];
        let visits = small.visits(done);
        assert_eq!(visits.len(), 2, "{visits:?}");
        assert_eq!(visits[0].who, Who::Qemu);
        assert_eq!(visits[0].updates, MODES);
        assert_eq!(visits[0].walks, MODES);
        assert_eq!(visits[1].who, Who::QemuSmall);
        // A longer run adds to a shorter one.
        small.long = true;
        let visits = small.visits(done);
        assert_eq!(count(&visits, "1G", Who::CprVmm, Mode::CprExec), 18);
    }

    #[test]
    fn a_machine_must_fit() {
        let cell = Cell::named("8G").unwrap();
        assert_eq!(cell.obstacle(10 * GIB), None);
        let reason = cell.obstacle(9 * GIB).unwrap();
        assert_eq!(reason, "needs 9232 MiB of free memory, 9216 MiB are available");
        assert!(Cell::named("2G").unwrap_err().contains("256M, 1G,"));
        assert_eq!(Cell::named("1Gx4").unwrap().to_string(), "1 GiB, 4 vCPUs");
    }
}
