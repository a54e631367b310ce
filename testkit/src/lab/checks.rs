//! What is looked at in a guest. The checks that end in `_through` take the update that they watch.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::ensure;

use super::linux::RAM;
use super::{COMMAND_LIMIT, Linux, Report, Target};

/// The kernel found what it should, and nothing that it complains of.
///
/// # Errors
/// It did not, or it complains.
pub fn boot_is_good(linux: &mut Linux, cpus: u8) -> anyhow::Result<()> {
    let kernel = linux.run("uname -v")?;
    ensure!(kernel.contains("Debian"), "{kernel}");
    ensure!(linux.number("nproc")? == u64::from(cpus));
    let memory_kib = linux.number("awk '/MemTotal/ { print $2 }' /proc/meminfo")?;
    ensure!((RAM / 1024 / 2..=RAM / 1024).contains(&memory_kib), "{memory_kib} KiB");
    let cmdline = linux.run("cat /proc/cmdline")?;
    ensure!(cmdline.contains(&linux.lab.append), "{cmdline}");

    let tables = linux.run("ls /sys/firmware/acpi/tables")?;
    for table in ["APIC", "DSDT", "FACP"] {
        ensure!(tables.split_whitespace().any(|found| found == table), "no {table} among {tables}");
    }
    linux.run("dmesg -r > /tmp/dmesg")?;
    ensure!(linux.number("grep -c 'ACPI: Interpreter enabled' /tmp/dmesg")? == 1);
    // Level 3 and below are errors.
    let errors = linux.run("grep '^<[0-3]>' /tmp/dmesg")?;
    ensure!(errors.is_empty(), "the kernel complains: {errors}");
    let alarms = linux.run(&format!("grep -iE '{ALARMS}' /tmp/dmesg"))?;
    ensure!(alarms.is_empty(), "the kernel is alarmed: {alarms}");

    ensure!(clocksource(linux)? == "kvm-clock");
    serial_is_driven_by_interrupts(linux)?;
    linux.step("the boot was good");
    Ok(())
}

/// What a kernel says of a machine whose time or CPUs do not behave.
const ALARMS: &str = "unstable|lockup|rcu.*stall|skew|nobody cared|BUG:|WARNING:|Call Trace";

/// The clock that the guest's kernel goes by.
///
/// # Errors
/// The guest does not answer.
pub fn clocksource(linux: &mut Linux) -> anyhow::Result<String> {
    linux.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")
}

/// Interrupts on all CPUs so far, of the line with this word.
fn interrupts(linux: &mut Linux, word: &str) -> anyhow::Result<Vec<u64>> {
    let line = linux.run(&format!("grep -w {word} /proc/interrupts"))?;
    let counts = line.split_whitespace().skip(1).map_while(|count| count.parse().ok());
    let counts: Vec<u64> = counts.collect();
    ensure!(!counts.is_empty(), "no counts in {line:?}");
    Ok(counts)
}

fn serial_is_driven_by_interrupts(linux: &mut Linux) -> anyhow::Result<()> {
    let line = linux.run("grep -w ttyS0 /proc/interrupts")?;
    ensure!(line.contains("IO-APIC"), "{line}");
    let before: u64 = interrupts(linux, "ttyS0")?.iter().sum();
    let after: u64 = interrupts(linux, "ttyS0")?.iter().sum();
    ensure!(after > before, "the serial line works without interrupts: {before} -> {after}");
    Ok(())
}

/// Every CPU gets interrupts of its own timer.
///
/// # Errors
/// One does not.
pub fn timers_tick(linux: &mut Linux, cpus: u8) -> anyhow::Result<()> {
    let before = interrupts(linux, "LOC")?;
    linux.run("sleep 1")?;
    let after = interrupts(linux, "LOC")?;
    ensure!(before.len() == usize::from(cpus), "{before:?}");
    let ticking = before.iter().zip(&after).all(|(before, after)| after > before);
    ensure!(ticking, "a CPU's timer stands still: {before:?} -> {after:?}");
    Ok(())
}

/// Starts watches of the agent in the guest, does `work`, and gives what each printed.
///
/// # Errors
/// A watch does not end, or `work` fails.
pub fn watched(
    linux: &mut Linux,
    watches: &[&str],
    limit: Duration,
    work: impl FnOnce(&mut Linux) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<String>> {
    linux.run("rm -f /tmp/enough; agents=")?;
    for (at, watch) in watches.iter().enumerate() {
        linux.run(&format!("guest-agent {watch} > /tmp/watch{at} 2>&1 & agents=\"$agents $!\""))?;
    }
    // Past the calibration of clocks.
    linux.run("sleep 1")?;
    work(linux)?;
    linux.shell.run_within("touch /tmp/enough; wait $agents", limit)?;
    (0..watches.len()).map(|at| linux.shell.run_within(&format!("cat /tmp/watch{at}"), limit)).collect()
}

/// A clock may be this far from another over a whole watch: what emulated CPUs add to the readings.
const CLOCKS_APART_US: i64 = 1_000;

/// A report of the watch `clock` tells of clocks that neither stepped back nor moved apart.
///
/// # Errors
/// They did; the error has the report.
pub fn clocks_are_good(report: &Report) -> anyhow::Result<()> {
    for key in ["backsteps", "tsc_backsteps"] {
        ensure!(report.get(key)? == 0, "a clock went backwards: {}", report.line);
    }
    ensure!(report.get("enough")? == 1, "the watch ended by itself: {}", report.line);
    for key in ["tsc_off_us", "realtime_off_us", "boottime_off_us"] {
        ensure!(report.get(key)? < CLOCKS_APART_US, "clocks moved apart: {}", report.line);
    }
    Ok(())
}

/// A report of the watch `timer` tells of timers that fired, none of them early.
///
/// # Errors
/// One was early, or lost: then it fires when another is due, or never.
pub fn timers_are_good(report: &Report, linux: &Linux) -> anyhow::Result<()> {
    ensure!(report.get("early")? == 0, "a timer fired early: {}", report.line);
    ensure!(report.get("enough")? == 1, "the watch ended by itself: {}", report.line);
    let longest = Duration::from_micros(report.get("longest_sleep_us")?.try_into()?);
    ensure!(longest < linux.longest_blackout + LOST, "a timer was lost: {}", report.line);
    Ok(())
}

/// A timer that is so late was lost; on emulated CPUs that many share, seconds are nothing.
const LOST: Duration = Duration::from_secs(5);

/// CLOCK_MONOTONIC and the TSC, read all the time on all CPUs, neither step back nor move apart.
///
/// # Errors
/// They do, or the update fails.
pub fn clocks_go_on_through(linux: &mut Linux, target: Target<'_>) -> anyhow::Result<()> {
    let printed = watched(linux, &["clock 120"], target.patience(), |linux| linux.update(target))?;
    let report = Report::parse(&printed[0], "clock")?;
    linux.step(&report.line);
    clocks_are_good(&report)
}

/// A process whose values are in registers of the FPU keeps them.
///
/// # Errors
/// It does not, or the update fails.
pub fn float_registers_stay_through(linux: &mut Linux, target: Target<'_>) -> anyhow::Result<()> {
    let printed = watched(linux, &["float 120"], target.patience(), |linux| linux.update(target))?;
    let report = Report::parse(&printed[0], "float")?;
    linux.step(&report.line);
    ensure!(report.get("rounds")? > 0 && report.get("wrong")? == 0, "wrong results: {}", report.line);
    ensure!(report.get("enough")? == 1, "the watch ended by itself: {}", report.line);
    Ok(())
}

/// The shell answers, which takes interrupts of the serial line, and a sleep ends, which takes those of a timer.
///
/// # Errors
/// It does not, or the update fails.
pub fn shell_answers_through(linux: &mut Linux, target: Target<'_>) -> anyhow::Result<()> {
    linux.run("kept=here")?;
    linux.update(target)?;
    let answer = linux.shell.run_within("sleep 0.2; echo $kept $((6 * 7))", target.patience())?;
    ensure!(answer == "here 42", "{answer}");
    Ok(())
}

/// The guest's clocks, and our own just before and after the guest read them.
#[derive(Debug, Clone, Copy)]
pub struct Time {
    guest_monotonic: i64,
    guest_realtime: i64,
    before_monotonic: i64,
    after_monotonic: i64,
    before_realtime: i64,
    after_realtime: i64,
}

impl Time {
    /// The tightest of a few answers of the agent, in nanoseconds.
    ///
    /// # Errors
    /// The guest does not answer within `limit`.
    pub fn read(linux: &mut Linux, limit: Duration) -> anyhow::Result<Time> {
        let begin = linux.begin;
        let monotonic = || begin.elapsed().as_nanos() as i64;
        let realtime = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64);
        let shell = &mut linux.shell;
        shell.type_line("guest-agent ask")?;
        let mut times = Vec::new();
        for _ in 0..5 {
            let (before_monotonic, before_realtime) = (monotonic(), realtime());
            shell.type_line("")?;
            shell.expect("agent: ", limit)?;
            let answer = shell.expect("\n", limit)?;
            let (after_monotonic, after_realtime) = (monotonic(), realtime());
            let report = Report::parse(&format!("agent: {answer}"), "now")?;
            times.push(Time {
                guest_monotonic: report.get("monotonic_ns")?,
                guest_realtime: report.get("realtime_ns")?,
                before_monotonic,
                after_monotonic,
                before_realtime,
                after_realtime,
            });
        }
        shell.run_within("end", limit)?;
        let tightest = times.into_iter().min_by_key(|time| time.after_monotonic - time.before_monotonic);
        Ok(tightest.expect("five answers"))
    }

    fn width(&self) -> Duration {
        Duration::from_nanos((self.after_monotonic - self.before_monotonic) as u64)
    }

    /// Checks that the guest's clocks advanced since `first` by what ours did; tells by how much CLOCK_MONOTONIC differs.
    ///
    /// # Errors
    /// They did not, or CLOCK_REALTIME never came from the host.
    pub fn agrees_since(&self, first: &Time) -> anyhow::Result<String> {
        let monotonic = |t: &Time| (t.guest_monotonic, t.before_monotonic, t.after_monotonic);
        let realtime = |t: &Time| (t.guest_realtime, t.before_realtime, t.after_realtime);
        for (name, first, last) in [
            ("CLOCK_MONOTONIC", monotonic(first), monotonic(self)),
            ("CLOCK_REALTIME", realtime(first), realtime(self)),
        ] {
            let advance = last.0 - first.0;
            let (least, most) = (last.1 - first.2, last.2 - first.1);
            let slack = slack_ns(most);
            ensure!(
                (least - slack..=most + slack).contains(&advance),
                "{name} of the guest advanced by {advance} ns, ours by {least} to {most}"
            );
        }
        // The guest had it from the host once, at its boot, and may lose seconds until it has found its clock source.
        let off = self.guest_realtime - self.after_realtime;
        ensure!(off.abs() < 60_000_000_000, "the guest's CLOCK_REALTIME is off by {off} ns");
        Ok(self.drift_since(first))
    }

    fn drift_since(&self, first: &Time) -> String {
        let middle = |time: &Time| (time.before_monotonic + time.after_monotonic) / 2;
        let passed = middle(self) - middle(first);
        let drift = self.guest_monotonic - first.guest_monotonic - passed;
        let open = (self.width() + first.width()) / 2;
        format!("drift {} us in {:.1} s, known to {open:?}", drift / 1000, passed as f64 / 1e9)
    }
}

/// What the guest's clocks may gain or lose against ours, beyond what the readings leave open: 1 ms and 200 ppm.
fn slack_ns(passed: i64) -> i64 {
    1_000_000 + passed / 5_000
}

/// The guest's clocks advance over updates by what ours do. There are several: together they take longer than readings do,
/// so a clock that stands still meanwhile is found out.
///
/// # Errors
/// An update fails, or clocks are wrong.
pub fn time_agrees_with_the_host_through(linux: &mut Linux, target: Target<'_>) -> anyhow::Result<()> {
    let source = clocksource(linux)?;
    let first = Time::read(linux, COMMAND_LIMIT)?;
    for _ in 0..3 {
        linux.update(target)?;
    }
    std::thread::sleep(Duration::from_millis(500));
    let last = Time::read(linux, target.patience())?;
    linux.step(&last.agrees_since(&first)?);
    ensure!(clocksource(linux)? == source, "the clocksource changed");
    Ok(())
}

/// Remembers, in the guest, what its kernel has said so far.
///
/// # Errors
/// The guest does not answer.
pub fn remember_log(linux: &mut Linux) -> anyhow::Result<()> {
    linux.run("dmesg > /tmp/log-before").map(drop)
}

/// The guest's kernel has said nothing since [`remember_log`].
///
/// # Errors
/// It has; the error tells what.
pub fn log_has_nothing_new(linux: &mut Linux) -> anyhow::Result<()> {
    let new = linux.run("dmesg > /tmp/log-after; diff /tmp/log-before /tmp/log-after")?;
    ensure!(new.is_empty(), "the guest's kernel noticed something: {new}");
    Ok(())
}
