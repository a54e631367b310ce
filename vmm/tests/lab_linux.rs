//! A stock Debian kernel as the guest, on an ordinary KVM: it boots by both ways, and its clocks, timers, interrupts and
//! shell go on through updates.
//!
//! Written for the nested lab (`cargo xtask lab`), which says in its environment where kernel and initramfs are; anywhere
//! else these tests skip themselves. The lab emulates its CPUs and may share them with others, so nothing here is timed
//! closely: clocks are compared, not measured, and limits are there to end what hangs.
//!
//! What a passing check is worth is shown by the tests named `without_...`: they leave out one step of the restore and
//! demand that the same check fails.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use testkit::{GuestShell, Vmm, VmmBuilder, current_test};

/// A boot takes 15 to 60 seconds on emulated CPUs.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// How long a command in the guest may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);
/// After this long without an answer a guest is given up that is expected to fail.
const DEATH_LIMIT: Duration = Duration::from_secs(8);

const RAM: u64 = 256 << 20;

/// What the lab tells us.
struct Lab {
    vmm: PathBuf,
    faulty: Option<PathBuf>,
    vmlinux: String,
    bzimage: String,
    initrd: String,
    append: String,
    prompt: String,
    out: PathBuf,
}

impl Lab {
    fn find() -> Option<Lab> {
        let text = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("the lab does not set {name}"));
        std::env::var_os("CPR_LAB")?;
        Some(Lab {
            vmm: text("CPR_VMM").into(),
            faulty: std::env::var_os("CPR_LAB_FAULTY_VMM").map(PathBuf::from),
            vmlinux: text("CPR_LAB_KERNEL"),
            bzimage: text("CPR_LAB_BZIMAGE"),
            initrd: text("CPR_LAB_INITRD"),
            append: text("CPR_LAB_APPEND"),
            prompt: text("CPR_LAB_PROMPT"),
            out: text("CPR_LAB_OUT").into(),
        })
    }
}

macro_rules! need_lab {
    () => {
        match Lab::find() {
            Some(lab) => lab,
            None => {
                eprintln!("SKIPPED {}: not in the lab (cargo xtask lab)", current_test());
                return Ok(());
            }
        }
    };
}

/// What an update is done with.
#[derive(Clone, Copy)]
enum Target<'a> {
    /// The program under test.
    Good,
    /// The one that can leave out steps, and what it leaves out.
    Faulty(Option<&'a str>),
}

impl Target<'_> {
    /// How long the guest may take to answer afterwards.
    fn patience(self) -> Duration {
        match self {
            Target::Faulty(Some(_)) => DEATH_LIMIT,
            Target::Good | Target::Faulty(None) => COMMAND_LIMIT,
        }
    }
}

/// A guest at its shell prompt.
struct Linux {
    vmm: Vmm,
    shell: GuestShell,
    lab: Lab,
    begin: Instant,
    updates: u32,
    /// The longest blackout so far, as the VMM tells it.
    longest_blackout: Duration,
}

impl Linux {
    /// Boots `kernel` up to the prompt.
    fn boot(lab: Lab, kernel: &str, cpus: u8) -> anyhow::Result<Linux> {
        let mut linux = Linux::start(lab, kernel, cpus)?;
        linux.at_prompt()?;
        Ok(linux)
    }

    /// Starts to boot `kernel`.
    fn start(lab: Lab, kernel: &str, cpus: u8) -> anyhow::Result<Linux> {
        let begin = Instant::now();
        let serial = ["-serial", "unix:serial,server=on,wait=off"];
        let boot = ["-kernel", kernel, "-initrd", &lab.initrd, "-append", &lab.append];
        let builder = VmmBuilder::new().binary(&lab.vmm).memory(RAM).cpus(cpus).args(&serial).args(&boot);
        let vmm = builder.start()?;
        let shell = GuestShell::connect(&vmm.path("serial"), &lab.prompt)?;
        Ok(Linux { vmm, shell, lab, begin, updates: 0, longest_blackout: Duration::ZERO })
    }

    /// Waits for the end of a boot.
    fn at_prompt(&mut self) -> anyhow::Result<()> {
        let printed = self.shell.ready(BOOT_LIMIT).with_context(|| format!("says: {}", self.vmm.stderr()))?;
        let up = printed.lines().find(|line| line.starts_with("guest: up after ")).unwrap_or("guest: up");
        self.step(up);
        // No notices of background jobs between a command's output and the prompt.
        self.run("set +m").map(drop)
    }

    /// Notes what was done; seen when the test fails, or with --nocapture.
    fn step(&self, what: &str) {
        println!("  {:7.1} s  {what}", self.begin.elapsed().as_secs_f64());
    }

    fn run(&mut self, line: &str) -> anyhow::Result<String> {
        self.shell.run_within(line, COMMAND_LIMIT)
    }

    /// Runs a command whose output is a number.
    fn number(&mut self, line: &str) -> anyhow::Result<u64> {
        let output = self.run(line)?;
        output.trim().parse().with_context(|| format!("{line:?} printed {output:?}"))
    }

    /// Updates, alternating between a state file and a memfd.
    fn update(&mut self, target: Target<'_>) -> anyhow::Result<()> {
        self.updates += 1;
        let uri = match self.updates % 2 {
            1 => "memfd:".to_owned(),
            _ => format!("file:{}", self.vmm.path("state").display()),
        };
        let mut command = match target {
            Target::Good => self.vmm.exec_command(&uri),
            Target::Faulty(step) => {
                let faulty = self.lab.faulty.clone().context("no faulty cpr-vmm")?;
                let skip = format!("CPR_TEST_SKIP_RESTORE={}", step.unwrap_or_default());
                let mut command = vec!["/usr/bin/env".to_owned(), skip];
                command.extend(self.vmm.exec_command_of(&faulty, &uri));
                command
            }
        };
        // What a guest without a step of its restore does may be a reset: then it is over.
        if matches!(target, Target::Faulty(_)) {
            command.push("-no-reboot".into());
        }
        let info = self.update_by(&command, &uri)?;
        let blackout = info["cpr"]["blackout-us"].as_u64().map(Duration::from_micros);
        let blackout = blackout.with_context(|| format!("no blackout: {info}"))?;
        self.longest_blackout = self.longest_blackout.max(blackout);
        self.step(&format!("update {} through {uri}: blackout {blackout:?}", self.updates));
        Ok(())
    }

    fn update_by(&mut self, command: &[String], uri: &str) -> anyhow::Result<Value> {
        self.vmm.set_exec(command)?;
        self.vmm.migrate(uri).with_context(|| format!("says: {}", self.vmm.stderr()))
    }

    /// Waits for the end of the process, and checks that it is a good one for this reason. A reset instead is an error at once.
    fn ends(mut self, reason: &str) -> anyhow::Result<()> {
        self.ends_by(reason).with_context(|| {
            // What it prints, and what it may go on to do.
            let _ = self.shell.expect("what nobody prints", Duration::from_secs(10));
            format!("the VMM says {:?}; the guest {:?}", self.vmm.stderr(), self.shell.transcript())
        })?;
        let code = self.vmm.wait_exit()?;
        ensure!(code == Some(0), "exit code {code:?}: {}", self.vmm.stderr());
        ensure!(self.vmm.stderr().is_empty(), "it complained: {}", self.vmm.stderr());
        self.step(&format!("the end: {reason}"));
        Ok(())
    }

    fn ends_by(&mut self, reason: &str) -> anyhow::Result<()> {
        // Those of the past.
        self.vmm.qmp().take_events();
        let event = self.vmm.qmp().event_of(&["SHUTDOWN", "RESET"])?;
        ensure!(event["data"] == json!({ "guest": true, "reason": reason }), "{event}");
        Ok(())
    }
}

impl Drop for Linux {
    fn drop(&mut self) {
        // For whoever looks into a failure.
        let name = current_test().replace("::", "-");
        let _ = std::fs::write(self.lab.out.join(format!("{name}.serial")), self.shell.transcript());
        let _ = std::fs::write(self.lab.out.join(format!("{name}.stderr")), self.vmm.stderr());
    }
}

/// A line `agent: NAME VERDICT key=value ...`.
struct Report {
    line: String,
    values: BTreeMap<String, i64>,
}

impl Report {
    fn parse(text: &str, name: &str) -> anyhow::Result<Report> {
        let start = format!("agent: {name} ");
        let found = text.lines().find_map(|line| {
            let rest = line.strip_prefix(&start)?;
            (!rest.starts_with("begin")).then_some(rest)
        });
        let rest = found.with_context(|| format!("no report of {name}: {text:?}"))?;
        let pairs = rest.split_whitespace().filter_map(|word| word.split_once('='));
        let values = pairs.filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?))).collect();
        Ok(Report { line: format!("{start}{rest}"), values })
    }

    fn get(&self, key: &str) -> anyhow::Result<i64> {
        self.values.get(key).copied().with_context(|| format!("no {key} in {:?}", self.line))
    }
}

// What is checked. The checks that end in `_through` take the update that they watch.

/// The kernel found what it should, and nothing that it complains of.
fn boot_is_good(linux: &mut Linux, cpus: u8) -> anyhow::Result<()> {
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
    // Level 3 and below are errors. There is no PCI, and the kernel finds that worth one.
    let errors = linux.run("grep '^<[0-3]>' /tmp/dmesg | grep -v 'PCI: Fatal: No config space access'")?;
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

fn clocksource(linux: &mut Linux) -> anyhow::Result<String> {
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
fn timers_tick(linux: &mut Linux, cpus: u8) -> anyhow::Result<()> {
    let before = interrupts(linux, "LOC")?;
    linux.run("sleep 1")?;
    let after = interrupts(linux, "LOC")?;
    ensure!(before.len() == usize::from(cpus), "{before:?}");
    let ticking = before.iter().zip(&after).all(|(before, after)| after > before);
    ensure!(ticking, "a CPU's timer stands still: {before:?} -> {after:?}");
    Ok(())
}

/// Starts watches of the agent in the guest, does `work`, and gives what each printed.
fn watched(
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

fn clocks_are_good(report: &Report) -> anyhow::Result<()> {
    for key in ["backsteps", "tsc_backsteps"] {
        ensure!(report.get(key)? == 0, "a clock went backwards: {}", report.line);
    }
    ensure!(report.get("enough")? == 1, "the watch ended by itself: {}", report.line);
    for key in ["tsc_off_us", "realtime_off_us", "boottime_off_us"] {
        ensure!(report.get(key)? < CLOCKS_APART_US, "clocks moved apart: {}", report.line);
    }
    Ok(())
}

/// CLOCK_MONOTONIC and the TSC, read all the time on all CPUs, neither step back nor move apart.
fn clocks_go_on_through(linux: &mut Linux, target: Target<'_>) -> anyhow::Result<()> {
    let printed = watched(linux, &["clock 120"], target.patience(), |linux| linux.update(target))?;
    let report = Report::parse(&printed[0], "clock")?;
    linux.step(&report.line);
    clocks_are_good(&report)
}

/// A process whose values are in registers of the FPU keeps them.
fn float_registers_stay_through(linux: &mut Linux, target: Target<'_>) -> anyhow::Result<()> {
    let printed = watched(linux, &["float 120"], target.patience(), |linux| linux.update(target))?;
    let report = Report::parse(&printed[0], "float")?;
    linux.step(&report.line);
    ensure!(report.get("rounds")? > 0 && report.get("wrong")? == 0, "wrong results: {}", report.line);
    ensure!(report.get("enough")? == 1, "the watch ended by itself: {}", report.line);
    Ok(())
}

/// The shell answers, which takes interrupts of the serial line, and a sleep ends, which takes those of a timer.
fn shell_answers_through(linux: &mut Linux, target: Target<'_>) -> anyhow::Result<()> {
    linux.run("kept=here")?;
    linux.update(target)?;
    let answer = linux.shell.run_within("sleep 0.2; echo $kept $((6 * 7))", target.patience())?;
    ensure!(answer == "here 42", "{answer}");
    Ok(())
}

/// The guest's clocks, and our own just before and after the guest read them.
#[derive(Debug, Clone, Copy)]
struct Reading {
    guest_monotonic: i64,
    guest_realtime: i64,
    before_monotonic: i64,
    after_monotonic: i64,
    before_realtime: i64,
    after_realtime: i64,
}

impl Reading {
    /// The tightest of a few answers of the agent, in nanoseconds.
    fn take(shell: &mut GuestShell, origin: Instant, limit: Duration) -> anyhow::Result<Reading> {
        let monotonic = || origin.elapsed().as_nanos() as i64;
        let realtime = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64);
        let mut readings = Vec::new();
        for _ in 0..5 {
            let (before_monotonic, before_realtime) = (monotonic(), realtime());
            shell.type_line("")?;
            shell.expect("agent: ", limit)?;
            let answer = shell.expect("\n", limit)?;
            let (after_monotonic, after_realtime) = (monotonic(), realtime());
            let report = Report::parse(&format!("agent: {answer}"), "now")?;
            readings.push(Reading {
                guest_monotonic: report.get("monotonic_ns")?,
                guest_realtime: report.get("realtime_ns")?,
                before_monotonic,
                after_monotonic,
                before_realtime,
                after_realtime,
            });
        }
        let tightest = readings.into_iter().min_by_key(|r| r.after_monotonic - r.before_monotonic);
        Ok(tightest.expect("five readings"))
    }

    fn width(&self) -> Duration {
        Duration::from_nanos((self.after_monotonic - self.before_monotonic) as u64)
    }
}

/// What the guest's clocks may gain or lose against ours, beyond what the readings leave open: 1 ms and 200 ppm.
fn slack_ns(passed: i64) -> i64 {
    1_000_000 + passed / 5_000
}

/// The guest's clocks advance over updates by what ours do. There are several: together they take longer than readings do,
/// so a clock that stands still meanwhile is found out.
fn time_agrees_with_the_host_through(linux: &mut Linux, target: Target<'_>) -> anyhow::Result<()> {
    let source = clocksource(linux)?;
    let origin = linux.begin;
    linux.shell.type_line("guest-agent ask")?;
    let first = Reading::take(&mut linux.shell, origin, COMMAND_LIMIT)?;
    for _ in 0..3 {
        linux.update(target)?;
    }
    std::thread::sleep(Duration::from_millis(500));
    let second = Reading::take(&mut linux.shell, origin, target.patience())?;
    linux.shell.run_within("end", target.patience())?;
    linux.step(&format!("time was read within {:?} and {:?}", first.width(), second.width()));

    let monotonic = |r: Reading| (r.guest_monotonic, r.before_monotonic, r.after_monotonic);
    let realtime = |r: Reading| (r.guest_realtime, r.before_realtime, r.after_realtime);
    for (name, (first, second)) in [
        ("CLOCK_MONOTONIC", (monotonic(first), monotonic(second))),
        ("CLOCK_REALTIME", (realtime(first), realtime(second))),
    ] {
        let advance = second.0 - first.0;
        let (least, most) = (second.1 - first.2, second.2 - first.1);
        let slack = slack_ns(most);
        ensure!(
            (least - slack..=most + slack).contains(&advance),
            "{name} of the guest advanced by {advance} ns, ours by {least} to {most}"
        );
    }
    // Seconds, as the guest had it from the host once, at its boot.
    let off = second.guest_realtime - second.after_realtime;
    ensure!(off.abs() < 3_000_000_000, "the guest's CLOCK_REALTIME is off by {off} ns");
    ensure!(clocksource(linux)? == source, "the clocksource changed");
    Ok(())
}

// The tests.

#[test]
fn one_vcpu_over_pvh() -> anyhow::Result<()> {
    let lab = need_lab!();
    let kernel = lab.vmlinux.clone();
    let mut linux = Linux::boot(lab, &kernel, 1)?;
    boot_is_good(&mut linux, 1)?;
    time_agrees_with_the_host_through(&mut linux, Target::Good)?;
    clocks_go_on_through(&mut linux, Target::Good)?;
    float_registers_stay_through(&mut linux, Target::Good)?;
    shell_answers_through(&mut linux, Target::Good)?;

    linux.vmm.qmp().execute("system_reset", json!({}))?;
    linux.at_prompt()?;
    ensure!(linux.run("echo \"kept=$kept\"")? == "kept=", "it is the old shell");
    boot_is_good(&mut linux, 1)?;
    shell_answers_through(&mut linux, Target::Good)?;

    // From here on a reset is the end.
    let mut command = linux.vmm.exec_command("memfd:");
    command.push("-no-reboot".into());
    linux.update_by(&command, "memfd:")?;
    linux.shell.type_line("reboot -f")?;
    linux.ends("guest-reset")
}

#[test]
fn two_vcpus_over_pvh() -> anyhow::Result<()> {
    const UPDATES: u32 = 10;
    let lab = need_lab!();
    let kernel = lab.vmlinux.clone();
    let mut linux = Linux::boot(lab, &kernel, 2)?;
    let pid = linux.vmm.pid();
    boot_is_good(&mut linux, 2)?;
    linux.run("kept='a word of the past'")?;
    linux.run("beats() { while :; do echo beat >> /tmp/beats; sleep 0.1; done; }; beats & heart=$!")?;
    linux.run("dmesg > /tmp/before")?;

    let printed = watched(&mut linux, &["clock 300", "timer 300"], COMMAND_LIMIT, |linux| {
        for _ in 0..UPDATES {
            linux.update(Target::Good)?;
            std::thread::sleep(Duration::from_millis(300));
        }
        Ok(())
    })?;
    let clock = Report::parse(&printed[0], "clock")?;
    let timer = Report::parse(&printed[1], "timer")?;
    linux.step(&clock.line);
    linux.step(&timer.line);
    clocks_are_good(&clock)?;
    ensure!(timer.get("early")? == 0, "a timer fired early: {}", timer.line);
    ensure!(timer.get("enough")? == 1, "the watch ended by itself: {}", timer.line);
    // A timer that was lost fires when another is due, or never.
    let longest = Duration::from_micros(timer.get("longest_sleep_us")?.try_into()?);
    ensure!(longest < linux.longest_blackout + Duration::from_secs(2), "a timer was lost: {}", timer.line);

    ensure!(linux.run("echo $kept")? == "a word of the past");
    ensure!(linux.run("kill -0 $heart && echo alive")? == "alive");
    let beats = linux.number("grep -c beat /tmp/beats")?;
    linux.run("sleep 1")?;
    ensure!(linux.number("grep -c beat /tmp/beats")? > beats, "the background process stands still");
    timers_tick(&mut linux, 2)?;
    ensure!(clocksource(&mut linux)? == "kvm-clock");
    let new = linux.run("dmesg > /tmp/after; diff /tmp/before /tmp/after")?;
    ensure!(new.is_empty(), "the kernel noticed something: {new}");
    ensure!(linux.vmm.pid() == pid && linux.vmm.status()? == "running");
    linux.step("the shell and its background process went on, and the kernel has nothing to say");

    linux.shell.type_line("reboot -f")?;
    linux.at_prompt()?;
    ensure!(linux.run("echo \"kept=$kept\"")? == "kept=", "it is the old shell");
    boot_is_good(&mut linux, 2)?;
    linux.update(Target::Good)?;
    linux.shell.type_line("poweroff -f")?;
    linux.ends("guest-shutdown")
}

#[test]
fn one_vcpu_as_bzimage() -> anyhow::Result<()> {
    let lab = need_lab!();
    let kernel = lab.bzimage.clone();
    let mut linux = Linux::boot(lab, &kernel, 1)?;
    boot_is_good(&mut linux, 1)?;
    shell_answers_through(&mut linux, Target::Good)?;
    linux.shell.type_line("poweroff -f")?;
    linux.ends("guest-shutdown")
}

/// The kernel unpacks itself, finds its clocks, and starts its second CPU, all with updates in between.
#[test]
fn two_vcpus_as_bzimage_updated_while_it_boots() -> anyhow::Result<()> {
    let lab = need_lab!();
    let kernel = lab.bzimage.clone();
    let mut linux = Linux::start(lab, &kernel, 2)?;
    for _ in 0..8 {
        std::thread::sleep(Duration::from_secs(1));
        linux.update(Target::Good)?;
    }
    linux.at_prompt()?;
    boot_is_good(&mut linux, 2)?;
    timers_tick(&mut linux, 2)?;
    shell_answers_through(&mut linux, Target::Good)?;
    linux.shell.type_line("poweroff -f")?;
    linux.ends("guest-shutdown")
}

/// A check on a guest and an update.
type Check = fn(&mut Linux, Target<'_>) -> anyhow::Result<()>;

/// Demands that `check` passes with the program that can leave out steps while it leaves out none, and fails when it
/// leaves out `step`.
fn is_noticed(step: &str, check: Check, complaint: &str) -> anyhow::Result<()> {
    let lab = need_lab!();
    if lab.faulty.is_none() {
        eprintln!("SKIPPED {}: no CPR_LAB_FAULTY_VMM", current_test());
        return Ok(());
    }
    let kernel = lab.vmlinux.clone();
    let mut linux = Linux::boot(lab, &kernel, 1)?;
    check(&mut linux, Target::Faulty(None)).context("nothing was left out")?;
    let begin = Instant::now();
    // An update may find the guest where it does not need the step: its process not on the CPU, no interrupt under way.
    let tried = (0..5).find_map(|_| check(&mut linux, Target::Faulty(Some(step))).err());
    let Some(error) = tried else {
        bail!("nobody noticed that {step} was left out");
    };
    let error = format!("{error:#}");
    linux.step(&format!("noticed: {error}"));
    ensure!(error.contains(complaint), "noticed for another reason than {complaint:?}: {error}");
    ensure!(begin.elapsed() < Duration::from_secs(60), "noticed after {:?} only", begin.elapsed());
    Ok(())
}

#[test]
fn without_tsc_offset() -> anyhow::Result<()> {
    is_noticed("tsc-offset", clocks_go_on_through, "a clock went backwards")
}

#[test]
fn without_kvmclock() -> anyhow::Result<()> {
    is_noticed("kvmclock", time_agrees_with_the_host_through, "CLOCK_MONOTONIC of the guest advanced by")
}

#[test]
fn without_xsave() -> anyhow::Result<()> {
    is_noticed("xsave", float_registers_stay_through, "wrong results")
}

#[test]
fn without_lapic() -> anyhow::Result<()> {
    is_noticed("lapic", shell_answers_through, "the guest's shell")
}

#[test]
fn without_irqchip() -> anyhow::Result<()> {
    is_noticed("irqchip", shell_answers_through, "the guest's shell")
}

#[test]
fn without_msrs() -> anyhow::Result<()> {
    is_noticed("msrs", shell_answers_through, "the guest's shell")
}
