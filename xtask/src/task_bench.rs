//! `cargo xtask bench`: the criterion benchmarks, and their medians against the limits that the project has set itself.
//!
//! Criterion measures, compares with the last run, and keeps the samples; this reads them back for one compact table. A
//! figure is the guest's unless it says `host`; whatever a busy host did to it is flagged, not filtered. With `--peer` it
//! measures another VMM beside ours instead, without criterion (see `peer`).

mod peer;
mod samples;

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use clap::Args;

use self::peer::PeerArgs;
use self::samples::{Figure, Results};
use crate::tools::{Paint, cargo, kvm_obstacle, ms, release_binary, run, workspace};

/// Blackout of cpr-exec that a guest with one vCPU may see, median.
const BLACKOUT_LIMIT: Duration = Duration::from_millis(4);
/// Blackout of cpr-transfer, the same.
const TRANSFER_LIMIT: Duration = Duration::from_micros(500);
/// Blackout with the most RAM populated, as a multiple of that with the least.
const RAM_RATIO_LIMIT: f64 = 1.5;
/// Blackout of the most vCPUs on the host's timeline, as a multiple of that of one.
const VCPU_RATIO_LIMIT: f64 = 2.5;

/// Package and benchmark.
const BENCHES: [(&str, &str); 3] = [("cpr-core", "core"), ("vmm-core", "block"), ("vmm", "exec_blackout")];

const RAM: &str = "exec_blackout_ram";
const VCPUS: &str = "exec_blackout_vcpus";
const TRANSFER: &str = "transfer_blackout";

/// Arguments of `cargo xtask bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Fewer sizes and fewer samples: a minute or two in place of ten to twenty
    #[arg(long)]
    quick: bool,
    /// Fail if a limit is missed; without it a miss is only shown
    #[arg(long)]
    strict: bool,
    /// Only benchmarks whose names contain this, such as exec_blackout or registry
    filter: Option<String>,
    #[command(flatten)]
    peer: PeerArgs,
}

/// Runs the benchmarks and prints the table; false if `--strict` and a limit was missed.
pub(crate) fn bench(arguments: &BenchArgs) -> Result<bool> {
    if arguments.peer.peer.is_some() {
        return peer::compare(&arguments.peer, arguments.strict);
    }
    let paint = Paint::stdout();
    let home = workspace().join("target/criterion");
    // All builds first, with progress: what follows is measured. The benchmark's own build of the program has more
    // features of its dependencies and would take the place of the one that users get.
    for (package, name) in BENCHES {
        if !run(cargo().args(["bench", "-p", package, "--bench", name, "--no-run"]))? {
            bail!("the benchmarks do not build; see cargo's messages above");
        }
    }
    let built = release_binary()?;
    let binary = built.with_file_name("cpr-vmm-measured");
    std::fs::copy(&built, &binary).with_context(|| format!("cannot write {}", binary.display()))?;
    let load = load_average();
    let begin = SystemTime::now();
    for (package, name) in BENCHES {
        if package == "vmm"
            && let Some(obstacle) = kvm_obstacle()
        {
            println!("skipped: {name} ({obstacle})");
            continue;
        }
        let mut command = cargo();
        command.args(["bench", "--quiet", "-p", package, "--bench", name, "--"]).args(&arguments.filter);
        command.env("CRITERION_HOME", &home).env("TESTKIT_CPR_VMM", &binary);
        if arguments.quick {
            command.env("CPR_BENCH", "quick");
            if package != "vmm" {
                command.args(["--warm-up-time", "0.5", "--measurement-time", "1", "--sample-size", "20"]);
            }
        }
        run_filtered(&mut command).with_context(|| format!("benchmark {name}"))?;
    }

    let results = Results::read(&home, begin)?;
    println!();
    let mut verdicts = Vec::new();
    print_ram(&results, &mut verdicts);
    print_vcpus(&results, &mut verdicts);
    print_transfer(&results, &mut verdicts);
    print_others(&results);
    print_noise(&results, load);
    for verdict in &verdicts {
        println!("{}", if verdict.good { paint.green(&verdict.text) } else { paint.red(&verdict.text) });
    }
    println!("samples and comparisons: {}", home.display());
    Ok(!arguments.strict || verdicts.iter().all(|verdict| verdict.good))
}

/// Runs a benchmark without criterion's complaint that single updates do not fit into no time at all.
fn run_filtered(command: &mut std::process::Command) -> Result<()> {
    let mut child = command.stderr(Stdio::piped()).spawn().context("cannot run cargo")?;
    let stderr = child.stderr.take().context("cargo's messages are piped")?;
    for line in BufReader::new(stderr).lines() {
        let line = line?;
        if !line.contains("Unable to complete") && !line.trim().is_empty() {
            eprintln!("{line}");
        }
    }
    anyhow::ensure!(child.wait()?.success(), "it failed");
    Ok(())
}

/// A figure against its limit.
struct Verdict {
    good: bool,
    text: String,
}

impl Verdict {
    fn new(what: &str, figure: f64, limit: f64, unit: &str) -> Verdict {
        let good = figure <= limit;
        let word = if good { "ok  " } else { "OVER" };
        Verdict { good, text: format!("{word} {what}: {figure:.2}{unit}, limit {limit:.2}{unit}") }
    }
}

/// `median worst` of a figure, or dashes.
fn pair(figure: Option<&Figure>) -> String {
    figure.map_or_else(
        || format!("{:>8} {:>8}", "-", "-"),
        |figure| format!("{:>8} {:>8}", ms(figure.median()), ms(figure.worst())),
    )
}

fn print_ram(results: &Results, verdicts: &mut Vec<Verdict>) {
    let mut sizes = results.values(RAM);
    sizes.retain(|size| results.find(RAM, "guest", size).is_some());
    if sizes.is_empty() {
        return;
    }
    let paint = Paint::stdout();
    println!("{}", paint.bold("cpr-exec blackout over RAM that the guest populated, 1 vCPU, ms"));
    println!(
        "{:>10} {:>8} | {:>8} {:>8} | {:>8} {:>8} | {:>8} {:>8} | {:>8} {:>8}",
        "", "", "guest", "", "host", "", "ambient", "", "no", "keeper"
    );
    println!(
        "{:>10} {:>8} | {:>8} {:>8} | {:>8} {:>8} | {:>8} {:>8} | {:>8} {:>8}",
        "populated", "updates", "median", "worst", "median", "worst", "median", "worst", "median", "worst"
    );
    for size in &sizes {
        let figure = |function| results.find(RAM, function, size);
        let guest = figure("guest");
        println!(
            "{size:>10} {:>8} | {} | {} | {} | {}",
            guest.map_or(0, Figure::count),
            pair(guest),
            pair(figure("host")),
            pair(figure("ambient")),
            pair(figure("guest-keeper-off")),
        );
    }
    println!();
    let median = |size: &String| results.find(RAM, "guest", size).map(Figure::median).unwrap_or_default();
    for size in &sizes {
        let text = format!("guest-seen median, {size} populated");
        verdicts.push(Verdict::new(
            &text,
            median(size).as_secs_f64() * 1e3,
            BLACKOUT_LIMIT.as_secs_f64() * 1e3,
            " ms",
        ));
    }
    if let [first, .., last] = &sizes[..] {
        let ratio = median(last).as_secs_f64() / median(first).as_secs_f64();
        verdicts.push(Verdict::new(
            &format!("guest-seen median, {last} to {first}"),
            ratio,
            RAM_RATIO_LIMIT,
            " times",
        ));
    }
}

fn print_vcpus(results: &Results, verdicts: &mut Vec<Verdict>) {
    let mut counts = results.values(VCPUS);
    counts.retain(|count| results.find(VCPUS, "host", count).is_some());
    if counts.is_empty() {
        return;
    }
    let paint = Paint::stdout();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{}", paint.bold("cpr-exec blackout over vCPUs, all busy, 256 MiB populated, ms"));
    println!(
        "{:>10} {:>8} | {:>8} {:>8} | {:>8} {:>8} | {:>8} {:>8}",
        "", "", "host", "", "guest", "", "ambient", ""
    );
    println!(
        "{:>10} {:>8} | {:>8} {:>8} | {:>8} {:>8} | {:>8} {:>8}",
        "vCPUs", "updates", "median", "worst", "median", "worst", "median", "worst"
    );
    for count in &counts {
        let figure = |function| results.find(VCPUS, function, count);
        let waits =
            if count.parse::<usize>().is_ok_and(|vcpus| vcpus > cpus) { "  vCPUs wait for CPUs" } else { "" };
        println!(
            "{count:>10} {:>8} | {} | {} | {}{waits}",
            figure("host").map_or(0, Figure::count),
            pair(figure("host")),
            pair(figure("guest")),
            pair(figure("ambient")),
        );
    }
    println!();
    if let [first, .., last] = &counts[..] {
        let median = |count| results.find(VCPUS, "host", count).map(Figure::median).unwrap_or_default();
        let ratio = median(last).as_secs_f64() / median(first).as_secs_f64();
        let text = format!("host timeline median, {last} vCPUs to {first}");
        verdicts.push(Verdict::new(&text, ratio, VCPU_RATIO_LIMIT, " times"));
    }
}

fn print_transfer(results: &Results, verdicts: &mut Vec<Verdict>) {
    let sizes = results.values(TRANSFER);
    if sizes.is_empty() {
        return;
    }
    println!(
        "{}",
        Paint::stdout().bold("cpr-transfer blackout over RAM that the guest populated, 1 vCPU, ms")
    );
    println!(
        "{:>10} {:>8} | {:>8} {:>8} | {:>8} {:>8} | {:>8} {:>8}",
        "populated", "updates", "guest", "worst", "host", "worst", "ambient", "worst"
    );
    for size in &sizes {
        let figure = |function| results.find(TRANSFER, function, size);
        let Some(guest) = figure("guest") else { continue };
        println!(
            "{size:>10} {:>8} | {} | {} | {}",
            guest.count(),
            pair(Some(guest)),
            pair(figure("host")),
            pair(figure("ambient")),
        );
        let text = format!("guest-seen median of a transfer, {size} populated");
        let limit = TRANSFER_LIMIT.as_secs_f64() * 1e3;
        verdicts.push(Verdict::new(&text, guest.median().as_secs_f64() * 1e3, limit, " ms"));
    }
    println!();
}

/// All other benchmarks, one line each.
fn print_others(results: &Results) {
    let others: Vec<_> =
        results.figures().filter(|figure| ![RAM, VCPUS, TRANSFER].contains(&figure.group())).collect();
    if others.is_empty() {
        return;
    }
    println!("{}", Paint::stdout().bold("building blocks, time of one iteration"));
    for figure in others {
        println!("{:<40} {:>12} {:>12} worst", figure.name(), short(figure.median()), short(figure.worst()));
    }
    println!();
}

/// A duration in a unit that suits it.
fn short(duration: Duration) -> String {
    let ns = duration.as_secs_f64() * 1e9;
    match ns {
        ..1e3 => format!("{ns:.0} ns"),
        ..1e6 => format!("{:.2} us", ns / 1e3),
        _ => format!("{:.2} ms", ns / 1e6),
    }
}

/// What makes the figures doubtful.
fn print_noise(results: &Results, load: f64) {
    let mut notes = Vec::new();
    if load > 0.5 {
        notes.push(format!("the host was busy before the start: load {load:.1}"));
    }
    for figure in results.figures() {
        if figure.group() == RAM && figure.function() == "ambient" && figure.median() > BLACKOUT_LIMIT / 8 {
            notes.push(format!(
                "{}: without an update the guest saw {} ms",
                figure.name(),
                ms(figure.median())
            ));
        }
        if figure.group() == RAM && figure.function() != "ambient" && figure.spread() > 0.3 {
            notes.push(format!("{}: the middle half spreads over {:.0} % of the median", figure.name(), {
                figure.spread() * 100.0
            }));
        }
    }
    if !notes.is_empty() {
        println!("{}", Paint::stdout().bold("noise: measure again on a quiet machine"));
        for note in notes {
            println!("  {note}");
        }
        println!();
    }
}

/// Runnable processes, averaged over the last minute.
fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0.0)
}
