//! `cargo xtask bench --peer qemu`: how long the same guest stands still when `cpr-vmm` and when QEMU is updated under it.
//!
//! Both are driven over QMP by the same code (`subject`), in turns (`plan`), and read by the guest's own clock (`measure`,
//! `walk`). Every finished visit is kept (`journal`), so a run can be interrupted and go on; the tables (`figures`,
//! `report`) and the picture (`plot`) are made of all that is kept. A mode or a cell that cannot be measured here is left
//! out by name, never shown as a result.

mod figures;
mod host;
mod journal;
mod measure;
mod plan;
mod plot;
mod programs;
mod report;
mod subject;
mod walk;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum};

use self::figures::{Figures, Verdict};
use self::host::Host;
use self::journal::{Circumstances, Journal};
use self::plan::{CELLS, Cell, MODES, Mode, Plan, WHO, Who};
use self::programs::Programs;
use self::report::Context;
use crate::tools::{Paint, kvm_obstacle, workspace};

/// A published result has at least so many updates in each cell.
const ENOUGH: usize = 20;

/// Arguments of `cargo xtask bench --peer`.
#[derive(Debug, Args)]
pub(crate) struct PeerArgs {
    /// Compare with another VMM in place of the benchmarks; takes 30 to 60 minutes
    #[arg(long, conflicts_with_all = ["quick", "filter"])]
    pub(crate) peer: Option<PeerName>,
    /// Rounds through all cells, with two updates of each mode in each; every second one with a brownout
    #[arg(long, requires = "peer", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Only these cells, such as 256M,1G,1Gx2
    #[arg(long, requires = "peer", value_delimiter = ',', value_name = "CELLS", value_parser = Cell::named)]
    only: Option<Vec<&'static Cell>>,
    /// 200 updates at 1 and 4 GiB with one vCPU, for their p99; takes one to two hours more
    #[arg(long, requires = "peer")]
    long: bool,
    /// Forget the samples of former runs; without it a run goes on where the last one stopped
    #[arg(long, requires = "peer")]
    fresh: bool,
    /// This QEMU in place of the one out of Debian
    #[arg(long, requires = "peer", value_name = "PROGRAM")]
    qemu: Option<PathBuf>,
}

/// Who can be compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PeerName {
    /// QEMU 11.1 with the machine microvm
    Qemu,
}

/// Measures and reports; false if `strict` and a limit was missed.
pub(crate) fn compare(arguments: &PeerArgs, strict: bool) -> Result<bool> {
    if let Some(obstacle) = kvm_obstacle() {
        bail!("the comparison needs KVM.\n  {obstacle}");
    }
    let folder = workspace().join("target/bench-qemu");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let _alone = lock(&folder)?;
    let programs = Programs::get(&folder, arguments.qemu.as_deref())?;
    let host = Host::look();

    let journal_path = folder.join("samples.jsonl");
    let (mut journal, told) =
        Journal::open(&journal_path, &circumstances(&host, &programs), arguments.fresh)?;
    if let Some(told) = told {
        eprintln!("starts over. {told}");
    }
    let (cells, mut skipped) = affordable(arguments.only.as_deref(), host::available_bytes());
    ensure!(!cells.is_empty(), "no cell fits into this machine's memory: {}", told_skipped(&skipped));
    let offers = try_out(&programs, &cells, &mut skipped)?;
    for (what, why) in &skipped {
        eprintln!("skipped: {what} ({why})");
    }

    let plan = Plan { cells, offers, rounds: arguments.rounds, long: arguments.long };
    run(&plan, &programs, &mut journal)?;

    let figures = Figures::of(&journal, &plan.cells);
    let context = Context { host, versions: versions(&programs), skipped };
    println!("\n{}", report::tables(&figures, &context));
    let whole = arguments.only.is_none() && is_enough(&plan, &figures);
    publish(&figures, &context, &plan.cells, &folder, whole)?;
    println!("samples: {}", journal_path.display());
    let missed = figures.limits().iter().any(|limit| limit.verdict == Verdict::NotReached);
    Ok(!(strict && missed))
}

/// Two runs at a time would measure each other, and write into one file.
fn lock(folder: &Path) -> Result<File> {
    let path = folder.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    file.try_lock().context("another comparison runs here; wait for its end")?;
    Ok(file)
}

/// What makes samples comparable.
fn circumstances(host: &Host, programs: &Programs) -> Circumstances {
    let mut list: Vec<(String, String)> = vec![
        ("CPU".into(), format!("{} x {}", host.cpus, host.cpu)),
        ("kernel".into(), format!("{}, {}", host.kernel, host.kvm)),
        ("build of cpr-vmm".into(), format!("{:016x}", programs.cpr_vmm_hash)),
        ("payload".into(), format!("{:016x}", programs::hash(vmm_core::payload::ELF))),
    ];
    list.extend(programs.qemus.iter().map(|qemu| (qemu.who.name().to_owned(), qemu.version.clone())));
    list
}

fn versions(programs: &Programs) -> Vec<(&'static str, String)> {
    let mut versions = vec![(Who::CprVmm.name(), programs.cpr_vmm_version.clone())];
    versions.extend(programs.qemus.iter().map(|qemu| (qemu.who.name(), qemu.version.clone())));
    versions
}

/// What was left out, and why.
type Skipped = Vec<(String, String)>;

/// The wanted cells that fit into memory, in their own order.
fn affordable(only: Option<&[&'static Cell]>, available_bytes: u64) -> (Vec<&'static Cell>, Skipped) {
    let mut skipped = Skipped::new();
    let wanted = CELLS.iter().filter(|cell| only.is_none_or(|only| only.contains(cell)));
    let cells = wanted.filter(|cell| match cell.obstacle(available_bytes) {
        None => true,
        Some(reason) => {
            skipped.push((cell.to_string(), reason));
            false
        }
    });
    (cells.collect(), skipped)
}

fn told_skipped(skipped: &Skipped) -> String {
    skipped.iter().map(|(what, why)| format!("{what} {why}")).collect::<Vec<_>>().join("; ")
}

/// Asks every VMM that is there which modes it has.
fn try_out(programs: &Programs, cells: &[&'static Cell], skipped: &mut Skipped) -> Result<Vec<(Who, Mode)>> {
    let mut offers = Vec::new();
    for who in WHO {
        let there = who == Who::CprVmm || programs.qemu(who).is_some();
        if !there || !cells.iter().any(|cell| who.is_in(cell)) {
            continue;
        }
        eprint!("{}: warm-up ...", who.name());
        let begin = Instant::now();
        let modes = measure::try_out(programs, who, &CELLS[0])
            .with_context(|| format!("{} with {}", who.name(), CELLS[0]))?;
        eprintln!(" {:.1} s", begin.elapsed().as_secs_f64());
        for (mode, refused) in modes {
            match refused {
                None => offers.push((who, mode)),
                Some(words) => skipped.push((
                    format!("{}, {}", who.name(), mode.name()),
                    format!("not in this build: {words}"),
                )),
            }
        }
    }
    Ok(offers)
}

/// Makes the visits that are missing.
fn run(plan: &Plan, programs: &Programs, journal: &mut Journal) -> Result<()> {
    let visits = plan.visits(|round, cell, who, mode| journal.done(round, cell, who, mode));
    let mut clock = Clock::new(visits.iter().map(plan::Visit::guess_seconds).sum());
    let count = visits.len();
    match count {
        0 => eprintln!("all is measured already; --fresh measures again"),
        _ => eprintln!("{count} visits, {}; Ctrl-C is safe, what is finished is kept", clock.told()),
    }
    for (number, visit) in visits.iter().enumerate() {
        eprint!("{:>4} of {count}, {visit} ...", number + 1);
        let begin = Instant::now();
        let record = measure::visit(programs, visit);
        let record = record
            .inspect_err(|_| eprintln!())
            .with_context(|| format!("{visit}; what was finished before is kept: run it again to go on"))?;
        clock.spent(visit.guess_seconds(), begin.elapsed());
        let medians = MODES.iter().filter_map(|&mode| {
            let times = record.updates.iter().filter(|sample| sample.mode == mode);
            let times: Vec<_> = times.map(|sample| Duration::from_micros(sample.gap_us)).collect();
            (!times.is_empty())
                .then(|| format!("{} {} ms", mode.name(), crate::tools::ms(testkit::median(times))))
        });
        let medians = medians.collect::<Vec<_>>().join(", ");
        eprintln!(" {medians}; {:.0} s; {}", begin.elapsed().as_secs_f64(), clock.told());
        journal.add(record)?;
    }
    Ok(())
}

/// Guesses the time that is left from what earlier guesses were worth.
struct Clock {
    left: f64,
    guessed: f64,
    took: f64,
}

impl Clock {
    fn new(guess_seconds: f64) -> Clock {
        Clock { left: guess_seconds, guessed: 0.0, took: 0.0 }
    }

    fn spent(&mut self, guess_seconds: f64, took: Duration) {
        self.left -= guess_seconds;
        self.guessed += guess_seconds;
        self.took += took.as_secs_f64();
    }

    fn told(&self) -> String {
        let scale = if self.guessed > 0.0 { self.took / self.guessed } else { 1.0 };
        match (self.left * scale).max(0.0) {
            seconds @ ..90.0 => format!("about {seconds:.0} s left"),
            seconds => format!("about {:.0} min left", seconds / 60.0),
        }
    }
}

/// Whether everything that can be measured here was measured often enough to be shown around.
fn is_enough(plan: &Plan, figures: &Figures) -> bool {
    let wanted = plan.cells.iter().flat_map(|cell| {
        plan.offers.iter().filter(|(who, _)| who.is_in(cell)).map(|&(who, mode)| (cell.name, who, mode))
    });
    wanted
        .into_iter()
        .all(|(cell, who, mode)| figures.find(cell, who, mode).is_some_and(|figure| figure.count() >= ENOUGH))
}

/// Writes page and picture: a whole result into the documentation, another one beside the samples.
fn publish(
    figures: &Figures,
    context: &Context,
    cells: &[&'static Cell],
    folder: &Path,
    whole: bool,
) -> Result<()> {
    const PICTURE: &str = "qemu.svg";
    let place = if whole { workspace().join("docs/benchmarks") } else { folder.to_owned() };
    std::fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
    let page = place.join("qemu.md");
    for (path, text) in
        [(&page, report::page(figures, context, PICTURE)), (&place.join(PICTURE), plot::svg(figures, cells)?)]
    {
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if !whole {
        let paint = Paint::stdout();
        println!(
            "{}",
            paint.dim(format!(
                "Not for docs/benchmarks: that takes all cells and {ENOUGH} updates in each of them."
            ))
        );
    }
    println!("page: {}", page.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::BenchArgs;
    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        bench: BenchArgs,
    }

    fn parse(words: &str) -> Result<PeerArgs, String> {
        let words = ["bench"].into_iter().chain(words.split_whitespace());
        Line::try_parse_from(words).map(|line| line.bench.peer).map_err(|error| error.to_string())
    }

    #[test]
    fn the_command_line_is_checked() {
        let arguments = parse("--peer qemu --rounds 3 --only 256M,1G --strict").unwrap();
        assert_eq!(arguments.peer, Some(PeerName::Qemu));
        assert_eq!(arguments.rounds, 3);
        let names: Vec<_> = arguments.only.unwrap().iter().map(|cell| cell.name).collect();
        assert_eq!(names, ["256M", "1G"]);
        assert_eq!(parse("--peer qemu").unwrap().rounds, 10);
        assert_eq!(parse("--quick registry").unwrap().peer, None);

        for (bad, word) in [
            ("--peer bochs", "qemu"),
            ("--peer qemu --only 3G", "no such cell; there are 256M"),
            ("--peer qemu --rounds 0", "1..=1000"),
            ("--peer qemu --quick", "cannot be used with"),
            ("--peer qemu registry", "cannot be used with"),
            ("--peer qemu --verbose", "unexpected argument"),
            ("--long", "--peer"),
            ("--only 1G", "--peer"),
            ("--rounds 3", "--peer"),
            ("--fresh", "--peer"),
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains(word), "{bad}: {error}");
        }
    }

    #[test]
    fn cells_that_do_not_fit_are_named() {
        let (cells, skipped) = affordable(None, 6 << 30);
        assert_eq!(cells.len(), 5);
        assert_eq!(skipped[0].0, "8 GiB, 1 vCPU");
        assert!(told_skipped(&skipped).starts_with("8 GiB, 1 vCPU needs 9232 MiB"));
        let only = [Cell::named("8G").unwrap(), Cell::named("256M").unwrap()];
        let (cells, _) = affordable(Some(&only), 24 << 30);
        assert_eq!(cells.iter().map(|cell| cell.name).collect::<Vec<_>>(), ["256M", "8G"]);
    }

    #[test]
    fn the_time_left_follows_the_time_taken() {
        let mut clock = Clock::new(600.0);
        assert_eq!(clock.told(), "about 10 min left");
        clock.spent(300.0, Duration::from_secs(30));
        assert_eq!(clock.told(), "about 30 s left");
    }
}
