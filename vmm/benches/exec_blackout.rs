//! The blackout of cpr-exec and cpr-transfer: the real release binary, a real guest, and the gap that the guest saw.
//!
//! Three studies: over the RAM that the guest populates before each update (with and without the keeper), over vCPUs, and
//! of a guest that moves from process to process.
//! A study measures all of its variants in rounds, in another order each round, so that a busy minute of the host hits
//! all of them alike; criterion then gets the measured times one by one for its statistics and comparisons. It says that
//! it cannot complete its samples in the target time: there is no target, each sample is one update.
//!
//! `cargo xtask bench` runs this and prints the table. `CPR_BENCH=quick` in the environment measures less.

use std::cell::OnceCell;
use std::time::Duration;

use anyhow::{Context, Result};
use criterion::{BenchmarkId, Criterion, SamplingMode};
use serde_json::json;
use testkit::{Guest, Meter, Through, Update, Vmm, VmmBuilder};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// RAM that the payload keeps for itself, and some.
const OVERHEAD: u64 = 16 * MIB;

/// Guest RAM that is not measured over.
const SMALL: u64 = 256 * MIB;

/// Exec without keeper over more takes long, and three sizes show the slope.
const KEEPER_OFF_LIMIT: u64 = 4 * GIB;

const SEED: u64 = 11;

fn main() {
    if !testkit::kvm_is_present() {
        eprintln!("SKIPPED exec_blackout: there is no /dev/kvm");
        return;
    }
    let plan = Plan::from_environment();
    let mut criterion = Criterion::default().configure_from_args();
    over_ram(&mut criterion, &plan);
    over_vcpus(&mut criterion, &plan);
    by_transfer(&mut criterion, &plan);
    criterion.final_summary();
}

/// How much is measured.
struct Plan {
    ram_bytes: &'static [u64],
    vcpus: &'static [u8],
    transferred_bytes: &'static [u64],
    /// Updates of each variant.
    samples: usize,
}

impl Plan {
    fn from_environment() -> Plan {
        let quick = std::env::var_os("CPR_BENCH").is_some_and(|value| value == "quick");
        // As criterion decides it: cargo passes --bench, and anything else only checks that the benchmark runs.
        let only_a_test =
            std::env::args().any(|word| word == "--test") || !std::env::args().any(|word| word == "--bench");
        match (only_a_test, quick) {
            (true, _) => Plan { ram_bytes: &[SMALL], vcpus: &[1], transferred_bytes: &[SMALL], samples: 1 },
            (false, true) => Plan {
                ram_bytes: &[SMALL, GIB],
                vcpus: &[1, 2, 8],
                transferred_bytes: &[SMALL, GIB],
                samples: 10,
            },
            (false, false) => Plan {
                ram_bytes: &[SMALL, GIB, 4 * GIB, 8 * GIB],
                vcpus: &[1, 2, 4, 8],
                transferred_bytes: &[SMALL, 4 * GIB],
                samples: 25,
            },
        }
    }
}

/// A VM that stands still while others are measured.
struct Subject {
    builder: VmmBuilder,
    vmm: Vmm,
    guest: Guest,
    meter: Meter,
}

impl Subject {
    fn start(populated_bytes: u64, vcpus: u8) -> Result<Subject> {
        let builder = VmmBuilder::new().memory(populated_bytes + OVERHEAD).cpus(vcpus);
        let mut vmm = builder.clone().start()?;
        let guest = vmm.guest()?;
        let meter = Meter::new(&guest, vcpus, populated_bytes, SEED)?;
        vmm.qmp().execute("stop", json!({}))?;
        Ok(Subject { builder, vmm, guest, meter })
    }

    fn measure(&mut self, way: Way) -> Result<Update> {
        self.vmm.qmp().execute("cont", json!({}))?;
        let update = match way {
            Way::Exec { keeper } => {
                self.vmm.qmp().execute("migrate-set-parameters", json!({ "x-cpr-exec-keeper": keeper }))?;
                self.meter.update(&mut self.vmm, &self.guest, Through::Memfd)?
            }
            Way::Transfer => {
                let mut target = self.builder.clone().target("memfd:").start()?;
                let update = self.meter.transfer(&mut self.vmm, &mut target, &self.guest)?;
                std::mem::replace(&mut self.vmm, target).quit()?;
                update
            }
        };
        self.vmm.qmp().execute("stop", json!({}))?;
        Ok(update)
    }

    /// Ends the VM, which must not have lost a word of its RAM.
    fn end(mut self) -> Result<()> {
        self.vmm.qmp().execute("cont", json!({}))?;
        self.guest.verify(self.meter.populated_bytes(), SEED)?;
        self.vmm.quit()
    }
}

/// How the guest gets to its next program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Exec { keeper: bool },
    Transfer,
}

const EXEC: Way = Way::Exec { keeper: true };
const WITHOUT_KEEPER: Way = Way::Exec { keeper: false };

/// Which machine, and how it is updated.
type Variant = (usize, Way);

/// Variants that are measured together.
struct Study {
    /// Name of the criterion group.
    name: &'static str,
    /// Populated RAM in bytes, and vCPUs.
    machines: Vec<(u64, u8)>,
    variants: Vec<Variant>,
    /// Updates of each variant.
    samples: usize,
    measured: OnceCell<Vec<Vec<Update>>>,
}

/// What of an update is handed to criterion.
type Figure = fn(&Update) -> Duration;

const GUEST: Figure = |update| update.guest;
const HOST: Figure = |update| update.host;
const AMBIENT: Figure = |update| update.ambient;

impl Study {
    /// The updates of every variant, measured at the first call.
    fn updates(&self) -> &[Vec<Update>] {
        self.measured.get_or_init(|| self.measure().unwrap_or_else(|error| panic!("{error:#}")))
    }

    /// Measures every variant once a round. The first round is left out: programs and page cache are cold in it.
    fn measure(&self) -> Result<Vec<Vec<Update>>> {
        let start = |&(bytes, vcpus)| Subject::start(bytes, vcpus);
        let mut subjects = self.machines.iter().map(start).collect::<Result<Vec<_>>>()?;
        let mut updates = vec![Vec::new(); self.variants.len()];
        for round in 0..=self.samples {
            eprintln!("{}: round {round} of {}", self.name, self.samples);
            for step in 0..self.variants.len() {
                let index = (step + round) % self.variants.len();
                let (machine, way) = self.variants[index];
                let update = subjects[machine].measure(way).with_context(|| {
                    let (bytes, vcpus) = self.machines[machine];
                    format!("{}: {} MiB, {vcpus} vCPUs, {way:?}", self.name, bytes / MIB)
                })?;
                if round > 0 {
                    updates[index].push(update);
                }
            }
        }
        subjects.into_iter().try_for_each(Subject::end)?;
        Ok(updates)
    }

    /// Hands a variant's times to criterion, one per iteration, one iteration per sample.
    fn replay(&self, criterion: &mut Criterion, variant: usize, id: BenchmarkId, figure: Figure) {
        let mut group = criterion.benchmark_group(self.name);
        // The smallest durations make criterion warm up once and take one iteration per sample.
        group
            .sampling_mode(SamplingMode::Flat)
            .sample_size(self.samples.max(10))
            .warm_up_time(Duration::from_nanos(1))
            .measurement_time(Duration::from_nanos(1));
        let mut calls = 0;
        group.bench_function(id, |bencher| {
            let updates = &self.updates()[variant];
            bencher.iter_custom(|iterations| {
                let mut sum = Duration::ZERO;
                for _ in 0..iterations {
                    // The warm-up takes the last one, and the samples take each one.
                    sum += figure(&updates[(calls + updates.len() - 1) % updates.len()]);
                    calls += 1;
                }
                sum
            });
        });
        group.finish();
    }
}

fn over_ram(criterion: &mut Criterion, plan: &Plan) {
    let sizes = affordable(plan.ram_bytes);
    let keeper_off = (0..sizes.len()).filter(|&machine| sizes[machine] <= KEEPER_OFF_LIMIT);
    let study = Study {
        name: "exec_blackout_ram",
        machines: sizes.iter().map(|&bytes| (bytes, 1)).collect(),
        variants: (0..sizes.len())
            .map(|m| (m, EXEC))
            .chain(keeper_off.map(|m| (m, WITHOUT_KEEPER)))
            .collect(),
        samples: plan.samples,
        measured: OnceCell::new(),
    };
    for (variant, &(machine, way)) in study.variants.iter().enumerate() {
        let figures: &[(&str, Figure)] = match way {
            WITHOUT_KEEPER => &[("guest-keeper-off", GUEST)],
            _ => &[("guest", GUEST), ("host", HOST), ("ambient", AMBIENT)],
        };
        for &(name, figure) in figures {
            let id = BenchmarkId::new(name, format!("{} MiB", sizes[machine] / MIB));
            study.replay(criterion, variant, id, figure);
        }
    }
}

fn over_vcpus(criterion: &mut Criterion, plan: &Plan) {
    let study = Study {
        name: "exec_blackout_vcpus",
        machines: plan.vcpus.iter().map(|&vcpus| (SMALL, vcpus)).collect(),
        variants: (0..plan.vcpus.len()).map(|machine| (machine, EXEC)).collect(),
        samples: plan.samples,
        measured: OnceCell::new(),
    };
    for (variant, vcpus) in plan.vcpus.iter().enumerate() {
        for (name, figure) in [("guest", GUEST), ("host", HOST), ("ambient", AMBIENT)] {
            study.replay(criterion, variant, BenchmarkId::new(name, vcpus), figure);
        }
    }
}

fn by_transfer(criterion: &mut Criterion, plan: &Plan) {
    let sizes = affordable(plan.transferred_bytes);
    let study = Study {
        name: "transfer_blackout",
        machines: sizes.iter().map(|&bytes| (bytes, 1)).collect(),
        variants: (0..sizes.len()).map(|machine| (machine, Way::Transfer)).collect(),
        samples: plan.samples,
        measured: OnceCell::new(),
    };
    for (variant, size) in sizes.iter().enumerate() {
        for (name, figure) in [("guest", GUEST), ("host", HOST), ("ambient", AMBIENT)] {
            study.replay(criterion, variant, BenchmarkId::new(name, format!("{} MiB", size / MIB)), figure);
        }
    }
}

/// The sizes that fit into this host's free memory all at once; says which do not.
fn affordable(sizes: &[u64]) -> Vec<u64> {
    let mut left = available_bytes().saturating_sub(GIB);
    let mut affordable = Vec::new();
    for &size in sizes {
        if size + OVERHEAD > left {
            eprintln!(
                "SKIPPED: {} MiB of guest RAM, {} MiB of memory are left for it",
                size / MIB,
                left / MIB
            );
            continue;
        }
        left -= size + OVERHEAD;
        affordable.push(size);
    }
    affordable
}

/// Free memory of this host.
fn available_bytes() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
