//! The samples summed up: what a table shows of each cell, mode and VMM, and the limits that the project has set itself.

use std::time::Duration;

use testkit::median;

use super::journal::{Journal, Sample};
use super::plan::{Cell, MODES, Mode, WHO, Who};

/// Fewer updates say nothing about their slowest hundredth.
const P99_FROM: usize = 200;

/// QEMU's cpr-exec takes at least so many times ours, at 1 GiB.
const EXEC_RATIO: f64 = 20.0;
/// Our cpr-exec with the most RAM takes at most so many times that with the least.
const EXEC_FLAT: f64 = 1.5;
/// Our cpr-transfer takes at most this, median, at 4 GiB.
const TRANSFER_MEDIAN: Duration = Duration::from_micros(500);
/// The same for one in a hundred.
const TRANSFER_P99: Duration = Duration::from_millis(2);
/// QEMU's cpr-transfer takes at least so many times ours, at 4 GiB.
const TRANSFER_RATIO: f64 = 5.0;

/// An ambient above the figure divided by this makes it doubtful.
const DOUBTFUL: u32 = 2;

/// What was measured of one VMM in one cell by one mode.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Figure {
    pub(super) cell: &'static Cell,
    pub(super) mode: Mode,
    pub(super) who: Who,
    /// The guest's gaps, sorted; never empty.
    gaps: Vec<Duration>,
    /// Median of the same without an update.
    pub(super) ambient: Duration,
    /// Sorted; one that was not over in time is the last, and endless.
    brownouts: Vec<Duration>,
    /// Median of each piece of the pause.
    pub(super) phases: Vec<(String, Duration)>,
}

impl Figure {
    fn of(journal: &Journal, cell: &'static Cell, who: Who, mode: Mode) -> Option<Figure> {
        let samples = journal.samples(cell, who, mode);
        if samples.is_empty() {
            return None;
        }
        let mut gaps: Vec<_> = samples.iter().map(|sample| Duration::from_micros(sample.gap_us)).collect();
        gaps.sort_unstable();
        let walks = journal.walks(cell, who, mode);
        let brownout = |us: Option<u64>| us.map_or(Duration::MAX, Duration::from_micros);
        let mut brownouts: Vec<_> = walks.iter().map(|walked| brownout(walked.brownout_us)).collect();
        brownouts.sort_unstable();
        // Those of the first update, in their order; all updates of one program have the same.
        let names = samples[0].phases_us.iter().map(|(name, _)| name.clone());
        let phases = names.map(|name| {
            let of = |sample: &&Sample| {
                sample.phases_us.iter().find(|phase| phase.0 == name).map_or(0, |phase| phase.1)
            };
            let times: Vec<_> = samples.iter().map(of).map(Duration::from_micros).collect();
            (name, median(times))
        });
        Some(Figure {
            cell,
            mode,
            who,
            ambient: median(samples.iter().map(|sample| Duration::from_micros(sample.ambient_us))),
            brownouts,
            phases: phases.collect(),
            gaps,
        })
    }

    /// Number of updates.
    pub(super) fn count(&self) -> usize {
        self.gaps.len()
    }

    pub(super) fn median(&self) -> Duration {
        median(self.gaps.iter().copied())
    }

    pub(super) fn best(&self) -> Duration {
        self.gaps[0]
    }

    pub(super) fn worst(&self) -> Duration {
        self.gaps[self.gaps.len() - 1]
    }

    /// What 99 of 100 updates stay within (nearest rank), if there are enough.
    pub(super) fn p99(&self) -> Option<Duration> {
        let count = self.gaps.len();
        (count >= P99_FROM).then(|| self.gaps[(count * 99).div_ceil(100) - 1])
    }

    /// Number of brownouts.
    pub(super) fn walks(&self) -> usize {
        self.brownouts.len()
    }

    /// The middle brownout, the longer of two; `None` if it was not over in time, or there is none.
    pub(super) fn brownout(&self) -> Option<Duration> {
        self.brownouts.get(self.brownouts.len() / 2).copied().filter(|&time| time != Duration::MAX)
    }
}

/// All that is known.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Figures(Vec<Figure>);

impl Figures {
    /// The figures of these cells, by mode, cell and VMM.
    pub(super) fn of(journal: &Journal, cells: &[&'static Cell]) -> Figures {
        let mut figures = Vec::new();
        for mode in MODES {
            for &cell in cells {
                for who in WHO {
                    figures.extend(Figure::of(journal, cell, who, mode));
                }
            }
        }
        Figures(figures)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Figure> {
        self.0.iter()
    }

    /// One of them.
    pub(super) fn find(&self, cell: &str, who: Who, mode: Mode) -> Option<&Figure> {
        self.iter().find(|figure| figure.cell.name == cell && figure.who == who && figure.mode == mode)
    }

    /// How many times ours QEMU takes.
    pub(super) fn ratio(&self, cell: &str, mode: Mode) -> Option<f64> {
        let median = |who| self.find(cell, who, mode).map(|figure| figure.median().as_secs_f64());
        Some(median(Who::Qemu)? / median(Who::CprVmm)?)
    }

    /// The cells in which the host was so busy that its figures are doubtful: without an update, too, the guest saw a
    /// good part of the gap. Where a vCPU has no CPU for itself this says nothing.
    pub(super) fn doubtful(&self, cpus: usize) -> Vec<&Figure> {
        let of_its_own = |figure: &&Figure| usize::from(figure.cell.vcpus) < cpus;
        self.iter().filter(of_its_own).filter(|figure| figure.ambient > figure.median() / DOUBTFUL).collect()
    }

    /// Every limit, and how it fares.
    pub(super) fn limits(&self) -> Vec<Limit> {
        use Mode::{CprExec, CprTransfer};
        let ours = |cell, mode| self.find(cell, Who::CprVmm, mode);
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let flat = ours("8G", CprExec)
            .zip(ours("256M", CprExec))
            .map(|(most, least)| most.median().as_secs_f64() / least.median().as_secs_f64());
        let name = |cell: &str| Cell::named(cell).expect("it is one of the cells").ram();
        vec![
            Limit::at_least(
                format!("cpr-exec at {}: QEMU's median, in medians of cpr-vmm", name("1G")),
                self.ratio("1G", CprExec),
                EXEC_RATIO,
            ),
            Limit::at_most(
                format!("cpr-exec of cpr-vmm: median at {}, in medians at {}", name("8G"), name("256M")),
                flat,
                EXEC_FLAT,
                "",
            ),
            Limit::at_most(
                format!("cpr-transfer of cpr-vmm at {}: median", name("4G")),
                ours("4G", CprTransfer).map(|figure| ms(figure.median())),
                ms(TRANSFER_MEDIAN),
                " ms",
            ),
            Limit::at_most(
                format!("cpr-transfer of cpr-vmm at {}: p99", name("4G")),
                ours("4G", CprTransfer).and_then(Figure::p99).map(ms),
                ms(TRANSFER_P99),
                " ms",
            ),
            Limit::at_least(
                format!("cpr-transfer at {}: QEMU's median, in medians of cpr-vmm", name("4G")),
                self.ratio("4G", CprTransfer),
                TRANSFER_RATIO,
            ),
        ]
    }

    /// The largest phase of the pause of cpr-vmm, said in a sentence.
    pub(super) fn largest_phase(&self, mode: Mode) -> Option<String> {
        let figures: Vec<_> = self.phased(mode).collect();
        let largest = |figure: &Figure| figure.phases.iter().max_by_key(|phase| phase.1).cloned();
        // That of the cell that everything is compared at, if it was measured.
        let shown = figures.iter().find(|figure| figure.cell.name == "1G").or(figures.first())?;
        let (name, time) = largest(shown)?;
        let same =
            figures.iter().filter(|figure| largest(figure).is_some_and(|phase| phase.0 == name)).count();
        let sum: Duration = shown.phases.iter().map(|phase| phase.1).sum();
        Some(format!(
            "The largest phase is `{name}`, in {} of {} cells: {:.2} of {:.2} ms ({:.0} %) at {}.",
            same,
            figures.len(),
            time.as_secs_f64() * 1e3,
            sum.as_secs_f64() * 1e3,
            100.0 * time.as_secs_f64() / sum.as_secs_f64(),
            shown.cell,
        ))
    }

    /// Those that tell their phases.
    pub(super) fn phased(&self, mode: Mode) -> impl Iterator<Item = &Figure> {
        self.iter().filter(move |figure| figure.mode == mode && !figure.phases.is_empty())
    }
}

/// How a limit fares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Reached,
    NotReached,
    NotMeasured,
}

/// A limit and the figure that is held against it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Limit {
    pub(super) what: String,
    /// The limit and the figure, for people.
    pub(super) wanted: String,
    pub(super) measured: String,
    pub(super) verdict: Verdict,
}

impl Limit {
    fn at_least(what: String, figure: Option<f64>, limit: f64) -> Limit {
        Limit::new(what, format!("at least {limit}"), figure, "", |figure| figure >= limit)
    }

    fn at_most(what: String, figure: Option<f64>, limit: f64, unit: &str) -> Limit {
        Limit::new(what, format!("at most {limit}{unit}"), figure, unit, |figure| figure <= limit)
    }

    fn new(
        what: String,
        wanted: String,
        figure: Option<f64>,
        unit: &str,
        good: impl Fn(f64) -> bool,
    ) -> Limit {
        let verdict = match figure {
            None => Verdict::NotMeasured,
            Some(figure) if good(figure) => Verdict::Reached,
            Some(_) => Verdict::NotReached,
        };
        let measured = figure.map_or_else(|| "-".to_owned(), |figure| format!("{figure:.2}{unit}"));
        Limit { what, wanted, measured, verdict }
    }
}

impl Verdict {
    pub(super) fn name(self) -> &'static str {
        match self {
            Verdict::Reached => "reached",
            Verdict::NotReached => "not reached",
            Verdict::NotMeasured => "not measured",
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn figure(
        cell: &str,
        who: Who,
        mode: Mode,
        gaps_us: impl IntoIterator<Item = u64>,
    ) -> Figure {
        let mut gaps: Vec<_> = gaps_us.into_iter().map(Duration::from_micros).collect();
        gaps.sort_unstable();
        let phase = |name: &str, us| (name.to_owned(), Duration::from_micros(us));
        let phases =
            if who == Who::CprVmm { vec![phase("stop", 250), phase("exec", 900)] } else { Vec::new() };
        Figure {
            cell: Cell::named(cell).unwrap(),
            mode,
            who,
            gaps,
            ambient: Duration::from_micros(80),
            brownouts: vec![Duration::from_micros(410_000), Duration::MAX],
            phases,
        }
    }

    pub(in super::super) fn figures(figures: Vec<Figure>) -> Figures {
        Figures(figures)
    }

    fn verdicts(figures: &Figures) -> Vec<Verdict> {
        figures.limits().iter().map(|limit| limit.verdict).collect()
    }

    #[test]
    fn a_figure_has_its_statistics() {
        let few = figure("1G", Who::Qemu, Mode::CprExec, [5, 1, 9, 6]);
        assert_eq!(few.median(), Duration::from_nanos(5500));
        assert_eq!((few.best(), few.worst()), (Duration::from_micros(1), Duration::from_micros(9)));
        assert_eq!(few.p99(), None);
        assert_eq!(few.brownout(), None, "the longer of two was not over in time");
        let many = figure("1G", Who::Qemu, Mode::CprExec, 1..=200);
        assert_eq!(many.p99(), Some(Duration::from_micros(198)));
        assert_eq!(many.count(), 200);
    }

    #[test]
    fn limits_are_reached_missed_or_not_measured() {
        use Verdict::{NotMeasured, NotReached, Reached};
        let (exec, transfer) = (Mode::CprExec, Mode::CprTransfer);
        let mut all = Figures(vec![
            figure("256M", Who::CprVmm, exec, [3000]),
            figure("1G", Who::CprVmm, exec, [3100]),
            figure("1G", Who::Qemu, exec, [100_000]),
        ]);
        assert_eq!(verdicts(&all), [Reached, NotMeasured, NotMeasured, NotMeasured, NotMeasured]);
        all.0.push(figure("8G", Who::CprVmm, exec, [4600]));
        all.0.push(figure("4G", Who::CprVmm, transfer, [490; 200]));
        all.0.push(figure("4G", Who::Qemu, transfer, [2000]));
        assert_eq!(verdicts(&all), [Reached, NotReached, Reached, Reached, NotReached]);
        assert_eq!(all.limits()[1].measured, "1.53");
        assert_eq!(all.limits()[3].wanted, "at most 2 ms");
    }

    #[test]
    fn a_busy_host_is_told() {
        let quiet = figure("1G", Who::CprVmm, Mode::CprExec, [3000]);
        let mut busy = figure("256M", Who::CprVmm, Mode::CprExec, [3000]);
        busy.ambient = Duration::from_micros(1600);
        let mut shared = figure("1Gx2", Who::CprVmm, Mode::CprExec, [3000]);
        shared.ambient = Duration::from_micros(8000);
        let all = Figures(vec![quiet, busy, shared]);
        let names = |cpus| all.doubtful(cpus).iter().map(|figure| figure.cell.name).collect::<Vec<_>>();
        assert_eq!(names(2), ["256M"]);
        assert_eq!(names(4), ["256M", "1Gx2"]);
    }

    #[test]
    fn the_largest_phase_is_computed() {
        let all = Figures(vec![
            figure("256M", Who::CprVmm, Mode::CprExec, [3000]),
            figure("1G", Who::CprVmm, Mode::CprExec, [3000]),
            figure("1G", Who::Qemu, Mode::CprExec, [3000]),
        ]);
        assert_eq!(
            all.largest_phase(Mode::CprExec).unwrap(),
            "The largest phase is `exec`, in 2 of 2 cells: 0.90 of 1.15 ms (78 %) at 1 GiB, 1 vCPU."
        );
        assert_eq!(all.largest_phase(Mode::CprTransfer), None);
    }
}
