//! `cargo xtask demo`: a guest keeps beating while the VMM under it is replaced, with the pause measured.
//!
//! It judges nothing but what must hold on any machine: every update succeeds, the process stays the same, and no word of
//! guest RAM changes. Figures are shown beside what the same guest sees without an update.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::{Args, ValueEnum};
use testkit::{Guest, Meter, Through, Update, Vmm, VmmBuilder, median, process};

use crate::tools::{Paint, kvm_obstacle, ms, release_binary};

/// Chooses the pattern in guest RAM.
const SEED: u64 = 0x5eed;

/// Ambient beyond this makes the figures doubtful.
const BUSY: Duration = Duration::from_millis(1);

/// Arguments of `cargo xtask demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// How many updates
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    updates: u32,
    /// Guest RAM, with suffix M or G; all of it is populated before each update
    #[arg(long, default_value = "256M", value_parser = memory_bytes)]
    memory: u64,
    /// vCPUs, all of them busy
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: u8,
    /// How the state travels to the new program
    #[arg(long, value_enum, default_value_t = ExecBy::Memfd)]
    exec_by: ExecBy,
    /// No new update is begun after so many seconds
    #[arg(long, default_value_t = 40, value_name = "SECONDS")]
    limit: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ExecBy {
    /// `migrate file:PATH`
    File,
    /// `migrate memfd:`, no disk touched
    Memfd,
}

impl From<ExecBy> for Through {
    fn from(by: ExecBy) -> Self {
        match by {
            ExecBy::File => Through::File,
            ExecBy::Memfd => Through::Memfd,
        }
    }
}

/// Bytes of a size such as `256M` or `1G`.
fn memory_bytes(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let shift = match suffix {
        "M" | "m" => 20,
        "G" | "g" => 30,
        _ => return Err("a number and M or G, such as 256M".into()),
    };
    let bytes = number.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    bytes.filter(|&bytes| bytes >= 16 << 20).ok_or_else(|| "at least 16M".into())
}

/// Shows updates; an error is a demo that did not keep its promise.
pub(crate) fn demo(arguments: &DemoArgs) -> Result<bool> {
    let paint = Paint::stdout();
    if let Some(obstacle) = kvm_obstacle() {
        bail!("the demo needs KVM.\n  {obstacle}");
    }
    let binary = release_binary()?;

    println!();
    println!("{}", paint.bold("A guest keeps running while the program under it is replaced by exec."));
    println!();
    let begin = Instant::now();
    let mut vmm = VmmBuilder::new().binary(&binary).memory(arguments.memory).cpus(arguments.cpus).start()?;
    let guest = vmm.guest()?;
    let meter = Meter::new(&guest, arguments.cpus, guest.usable_bytes(), SEED)?;
    let pid = vmm.pid();
    let born = process::start_time(pid)?;
    let cpus = arguments.cpus;
    println!(
        "  guest     {cpus} vCPU{}, counting in a tight loop and watching the clock",
        plural(cpus.into())
    );
    println!(
        "  memory    {} MiB, {} MiB of it filled with a pattern, every page written before each update",
        arguments.memory >> 20,
        meter.populated_bytes() >> 20
    );
    println!("  process   cpr-vmm, pid {pid}");
    println!();

    let updates = show_updates(arguments, &mut vmm, &guest, &meter, begin)?;
    guest.verify(meter.populated_bytes(), SEED)?;
    ensure!(vmm.pid() == pid && process::start_time(pid)? == born, "pid {pid} is another process now");
    let backward = meter.backward_steps(&guest);
    ensure!(backward == 0, "the guest's clock stepped back {backward} times");
    vmm.quit()?;

    summarise(arguments, &updates, pid, meter.populated_bytes());
    println!("{}", paint.dim(format!("{:.0} s without the build.", begin.elapsed().as_secs_f64())));
    Ok(true)
}

/// Updates and prints a line for each.
fn show_updates(
    arguments: &DemoArgs,
    vmm: &mut Vmm,
    guest: &Guest,
    meter: &Meter,
    begin: Instant,
) -> Result<Vec<Update>> {
    let paint = Paint::stdout();
    let mut updates: Vec<Update> = Vec::new();
    for number in 1..=arguments.updates {
        if begin.elapsed() > Duration::from_secs(arguments.limit) && number > 1 {
            println!(
                "  (ends after {} of {} updates: {} s are over; see --limit)",
                number - 1,
                arguments.updates,
                arguments.limit
            );
            break;
        }
        let update = meter.update(vmm, guest, arguments.exec_by.into())?;
        if updates.is_empty() {
            println!("{}", paint.dim("  milliseconds; the phases add up to what the host says"));
            println!("{}", paint.bold(header(&update)));
        }
        println!("{}", line(&number.to_string(), &update));
        updates.push(update);
    }
    Ok(updates)
}

fn header(update: &Update) -> String {
    let phases: String = update.phases.iter().map(|(name, _)| format!(" {name:>6}")).collect();
    format!("  {:>6}{phases}  | {:>7} {:>7} {:>9}", "update", "host", "guest", "(ambient)")
}

fn line(name: &str, update: &Update) -> String {
    // As wide as the header's word above it.
    let column = |(name, time): &(String, Duration)| format!(" {:>1$}", ms(*time), name.len().max(6));
    let phases: String = update.phases.iter().map(column).collect();
    let ambient = format!("({})", ms(update.ambient));
    format!("  {name:>6}{phases}  | {:>7} {:>7} {ambient:>9}", ms(update.host), ms(update.guest))
}

/// An update that never was: each figure chosen among the same figures of all.
fn aggregate(updates: &[Update], choose: impl Fn(Vec<Duration>) -> Duration) -> Update {
    let of = |figure: &dyn Fn(&Update) -> Duration| choose(updates.iter().map(figure).collect());
    let phases = updates[0].phases.iter().map(|(name, _)| {
        let same =
            |update: &Update| update.phases.iter().find(|(other, _)| other == name).map(|&(_, time)| time);
        (name.clone(), of(&|update| same(update).unwrap_or_default()))
    });
    Update {
        host: of(&|update| update.host),
        guest: of(&|update| update.guest),
        ambient: of(&|update| update.ambient),
        phases: phases.collect(),
    }
}

fn summarise(arguments: &DemoArgs, updates: &[Update], pid: u32, verified_bytes: u64) {
    let paint = Paint::stdout();
    let middle = aggregate(updates, median);
    let worst = aggregate(updates, |figures| figures.into_iter().max().unwrap_or_default());
    println!("{}", paint.bold(line("median", &middle)));
    println!("{}", line("worst", &worst));
    println!();
    let count = updates.len();
    println!(
        "{}",
        paint.green(format!(
            "{count} update{}: the guest's pause was {} ms (median), {} ms (worst).",
            plural(count),
            ms(middle.guest),
            ms(worst.guest)
        ))
    );
    println!(
        "pid {pid} is still the same process, replaced from within {count} time{}. Every word of {} MiB of guest",
        plural(count),
        verified_bytes >> 20
    );
    println!("RAM is intact, and the guest's clock never stepped back.");
    if middle.ambient > BUSY {
        println!(
            "This host is busy: its scheduler alone stops the guest for {} ms. Figures count on a quiet one.",
            ms(middle.ambient)
        );
    }
    println!();
    println!(
        "host:    the VMM's own timeline, from the first vCPU's last exit to the last vCPU's first entry, in two"
    );
    println!(
        "         pauses: `depart`, in which the old program leaves its process to the new one, and the blackout."
    );
    println!(
        "guest:   the largest gap between two clock reads in the guest: what an update really costs it."
    );
    println!(
        "ambient: the same gap in a window as long, without an update: what the host's scheduler costs it."
    );
    let host_cpus = std::thread::available_parallelism().map_or(1, usize::from);
    if usize::from(arguments.cpus) >= host_cpus {
        println!(
            "         {} busy vCPU{} on {host_cpus} CPU{}: the guest's figure holds waiting for a CPU, too.",
            arguments.cpus,
            plural(arguments.cpus.into()),
            plural(host_cpus),
        );
    }
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_a_suffix() {
        assert_eq!(memory_bytes("256M"), Ok(256 << 20));
        assert_eq!(memory_bytes("2g"), Ok(2 << 30));
        for bad in ["", "256", "M", "1M", "1K", "99999999999999999999G", "17179869184G"] {
            assert!(memory_bytes(bad).is_err(), "{bad}");
        }
    }
}
