//! The nested lab: tests of whole machines against an ordinary KVM, on any Debian machine and without KVM of its own.
//!
//! ```text
//! this machine      QEMU with TCG, out of a Debian root in the cache
//! └─ L1             Debian's kernel with kvm_amd: a real /dev/kvm, an IOMMU, VFIO
//!    └─ command     usually a libtest binary; it starts $CPR_VMM
//!       └─ L2       a stock Debian kernel, its shell on the serial line, guest-agent in /bin
//! ```
//!
//! [`run`] brings a command into L1 and its output and exit status back; [`shell`] gives a prompt there. The first call
//! builds the lab (`build`) into the cache (`cache`); each run puts its own files into an initramfs (`initramfs`) and
//! boots a fresh machine (`machine`).
//!
//! What the command finds in L1: its files in `/lab`, which is also its working directory; `/tmp`; loopback; kvm
//! and tun loaded, other modules by `modprobe`; QEMU as `qemu-system-x86_64`, for comparison; and these variables:
//!
//! | variable | what |
//! |---|---|
//! | `CPR_LAB` | `1` |
//! | `CPR_VMM` | path of our release binary |
//! | `CPR_LAB_FAULTY_VMM` | for a test: a `cpr-vmm` that fails on purpose (feature `fault-injection`) |
//! | `CPR_LAB_KERNEL`, `CPR_LAB_BZIMAGE` | the L2 kernel, as an ELF file and as a bzImage |
//! | `CPR_LAB_INITRD` | the L2 initramfs |
//! | `CPR_LAB_APPEND` | a kernel command line for L2 |
//! | `CPR_LAB_PROMPT` | the prompt of the L2 shell |
//! | `CPR_LAB_OUT` | a folder; what is left in it comes back as `artifacts.tar` among the logs |
//! | `CPR_LAB_LIMIT` | seconds until the command is ended |
//!
//! The lab refuses to guess: where it cannot be built it reports [`Outcome::Skipped`] with the reason, never a pass.
//!
//! # What the emulator gets wrong
//!
//! - **CPU 0 must not run guests.** Each time any CPU loads the x87 state, for an XRSTOR as well, QEMU (10.0 to 11.1 at least)
//!   clears a bit in a word of the *first* CPU, without a lock (`cpu_clear_ignne` of `target/i386/tcg`). The same word says
//!   whether that CPU translates by nested tables and whether it takes interrupts (`hflags2`: HF2_NPT_MASK, HF2_GIF_MASK). If
//!   the two meet, a change is undone: a guest begins without its nested tables and resets by a triple fault; or L1 goes on
//!   with them after the guest's exit, which is taken for one more exit, and the guest has L1's registers (KVM's suberror 3, at
//!   the address after L1's VMRUN); or L1 takes an interrupt where it cannot. One guest in four died so that had four busy vCPUs
//!   for half a minute; QEMU's own log (`-d in_asm,tid`) shows the two exits without a VMRUN between. So L1 has one CPU more
//!   than its programs may use (`scripts/l1-main.sh`).
//! - An exception that was delivered in the guest stays in EXITINTINFO of the VMCB, not valid, but with its type. KVM of recent
//!   kernels looks at the type alone: if the same run of the guest goes on to access a device, KVM takes that for an exit
//!   during the delivery of an event, which it cannot emulate (suberror 3). Doorbells are no matter, as they are not emulated.
//!   A guest all of whose pages are mapped, as after cpr-transfer, is most in danger: where another one has an exit for each page
//!   that comes new, it has none between a page fault and, say, the reset of its devices at `poweroff -f`. So guests
//!   have no asynchronous page faults (`no-kvmapf`), and tests power them off by sysrq.
//! - Code that KVM patches under a running CPU: see `scripts/l1-tests.sh`.

mod build;
mod cache;
mod cargo;
mod cli;
mod cpio;
mod host;
mod initramfs;
mod kernel;
mod machine;
mod steps;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

pub(crate) use cargo::release_program;
pub(crate) use cli::{LabArgs, lab};

use build::Build;
use cache::Cache;
use machine::End;
use steps::{last_lines, step};

/// The prompt of the shell in L2: nothing else prints it.
pub(crate) const PROMPT: &str = "guest-ready# ";

/// A kernel command line for L2. The TSC checks, mitigations and messages cost much under emulation, and earlyprintk is
/// what makes an emulated guest crawl. With `ECHO=1` added the shell echoes, for people.
///
/// Asynchronous page faults are off, too: see "What the emulator gets wrong" above.
pub(crate) const L2_APPEND: &str =
    "console=ttyS0 quiet tsc=reliable no_timer_check mitigations=off no-kvmapf";

/// The name in `/lab` of the `cpr-vmm` that leaves out steps of a restore when told to.
const FAULTY: &str = "cpr-vmm-faulty";

/// The shell script that runs test programs in L1.
const RUN_TESTS: &str = include_str!("scripts/l1-tests.sh");

/// When a machine with tests is ended. Two CPUs that do nothing else need half of it.
const TESTS_LIMIT: Duration = Duration::from_secs(30 * 60);

/// The same with all tests.
const ALL_TESTS_LIMIT: Duration = Duration::from_secs(2 * 60 * 60);

/// What to do when one of our programs does not build.
const SEE_CARGO: &str = "See cargo's messages above.";

/// What the command has less than the machine: time to tell the end, and for us to fetch it.
const GRACE: Duration = Duration::from_secs(20);

/// A file that a run brings to L1.
#[derive(Debug, Clone)]
pub(crate) struct LabFile {
    /// Where it is here.
    pub(crate) from: PathBuf,
    /// Its name in `/lab`; no slashes. It is executable there.
    pub(crate) name: String,
}

/// One run of the lab.
#[derive(Debug, Clone)]
pub(crate) struct LabOptions {
    /// Our release binary; it becomes `/lab/cpr-vmm`.
    pub(crate) vmm: Option<PathBuf>,
    /// Further files.
    pub(crate) files: Vec<LabFile>,
    /// The command and its arguments, started in `/lab`. Not used by [`shell`].
    pub(crate) command: Vec<String>,
    /// Further variables of the command's environment.
    pub(crate) environment: Vec<(String, String)>,
    /// When the machine is ended, whatever it does; the command is ended 20 seconds earlier. Not used by [`shell`].
    pub(crate) time_limit: Duration,
    /// RAM of L1, in MiB. It is taken from this machine as L1 touches it.
    pub(crate) memory_mib: u32,
    /// CPUs of L1, each a thread of QEMU; two at least, as its programs may not use the first.
    pub(crate) cpus: u32,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            vmm: None,
            files: Vec::new(),
            command: Vec::new(),
            environment: Vec::new(),
            time_limit: Duration::from_secs(15 * 60),
            memory_mib: 6144,
            cpus: 3,
        }
    }
}

/// Which tests of the lab are run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LabTests {
    /// Names of integration tests of `vmm`, as a glob.
    pub(crate) pattern: String,
    /// Also those that are left out of the lane of `cargo xtask test`, marked as ignored, for which there is more time.
    pub(crate) all: bool,
    /// Arguments for the test programs: filters, `--nocapture`.
    pub(crate) arguments: Vec<String>,
}

impl Default for LabTests {
    fn default() -> Self {
        let pattern = format!("{}*", cargo::TESTS_BEGIN_WITH);
        Self { pattern, all: false, arguments: Vec::new() }
    }
}

impl LabTests {
    /// The comparison with QEMU.
    pub(crate) fn benchmark() -> Self {
        Self { pattern: cargo::BENCHMARK.into(), all: true, arguments: vec!["--nocapture".into()] }
    }
}

impl LabOptions {
    /// Runs integration tests of `vmm`, built now, against the binary `vmm`. They run one after another in one L1: each
    /// has the machine's CPUs for itself.
    ///
    /// # Errors
    /// A test does not build, or the `cpr-vmm` with faults that they are checked with.
    pub(crate) fn for_tests(vmm: PathBuf, tests: &LabTests) -> Result<Self> {
        let programs = step("build of the tests", SEE_CARGO, || cargo::tests(&tests.pattern))?;
        let faulty = step("build of cpr-vmm with faults", SEE_CARGO, cargo::faulty_vmm)?;
        let mut command: Vec<String> = ["sh", "-c", RUN_TESTS, "tests"].map(str::to_owned).into();
        command.extend(programs.iter().map(|(name, _)| name.clone()));
        command.push("--".into());
        command.extend(tests.all.then(|| "--include-ignored".to_owned()));
        command.extend(tests.arguments.iter().cloned());
        let mut files: Vec<_> = programs.into_iter().map(|(name, from)| LabFile { from, name }).collect();
        files.push(LabFile { from: faulty, name: FAULTY.into() });
        let environment =
            [("CPR_LAB_FAULTY_VMM", format!("/lab/{FAULTY}")), ("RUST_TEST_THREADS", "1".to_owned())];
        Ok(Self {
            vmm: Some(vmm),
            files,
            command,
            environment: environment.map(|(name, value)| (name.to_owned(), value)).into(),
            time_limit: if tests.all { ALL_TESTS_LIMIT } else { TESTS_LIMIT },
            ..Self::default()
        })
    }
}

/// How a run of the lab ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The command ended with status 0.
    Passed,
    /// It ended with another status, or L1 did not live to tell; the text says which.
    Failed(String),
    /// The lab cannot be built on this machine, for this reason.
    Skipped(String),
}

/// What [`run`] has to tell.
#[derive(Debug, Clone)]
pub(crate) struct LabReport {
    /// How it ended.
    pub(crate) outcome: Outcome,
    /// From the start of L1 to the start of the command, if it came that far.
    pub(crate) boot: Option<Duration>,
    /// The whole run, without the build of the lab.
    pub(crate) total: Duration,
    /// Where the logs are, if there was a run.
    pub(crate) logs: Option<PathBuf>,
}

impl LabReport {
    fn skipped(reason: String) -> Self {
        Self { outcome: Outcome::Skipped(reason), boot: None, total: Duration::ZERO, logs: None }.told()
    }

    /// Itself, after its one line went to stderr.
    fn told(self) -> Self {
        eprintln!("lab: {self}");
        self
    }

    /// Whether the run counts as a failure. A skipped one does not; the caller names it.
    pub(crate) fn is_failure(&self) -> bool {
        matches!(self.outcome, Outcome::Failed(_))
    }
}

impl fmt::Display for LabReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.outcome {
            Outcome::Passed => write!(f, "passed")?,
            Outcome::Failed(why) => write!(f, "failed: {why}")?,
            Outcome::Skipped(reason) => return write!(f, "skipped: unavailable: {reason}"),
        }
        write!(f, " after {:.1} s", self.total.as_secs_f64())?;
        if let Some(boot) = self.boot {
            write!(f, ", of it L1's start {:.1} s", boot.as_secs_f64())?;
        }
        self.logs.as_ref().map_or(Ok(()), |logs| write!(f, "; logs in {}", logs.display()))
    }
}

/// Why the lab cannot be used on this machine, or `None` if it can: it is in the cache, or can be built.
///
/// # Errors
/// There is no cache folder.
pub(crate) fn obstacle() -> Result<Option<String>> {
    if Build::is_cached(&Cache::open()?) { Ok(None) } else { Ok(host::obstacle()) }
}

/// The QEMUs of the lab's Debian root, as programs of this host. They stay in the cache while this value lives.
pub(crate) struct LabQemu {
    build: Build,
}

impl LabQemu {
    /// Makes the lab's build unless it is cached, with progress on stderr.
    ///
    /// # Errors
    /// It cannot be built on this machine, or a step of the build failed; the error says what to do.
    pub(crate) fn get() -> Result<LabQemu> {
        if let Some(reason) = obstacle()? {
            bail!("the Debian root with QEMU cannot be made here: {reason}");
        }
        Ok(LabQemu { build: Build::get(&Cache::open()?)? })
    }

    /// QEMU as `name` of `/usr/bin`; `None` if Debian has no such build of it.
    pub(crate) fn command(&self, name: &str) -> Option<Command> {
        self.build.has_program(name).then(|| self.build.qemu_named(name))
    }
}

/// Builds the lab into the cache, if it is not there.
///
/// # Errors
/// A step of the build failed; the error says what to do.
pub(crate) fn prepare_build() -> Result<LabReport> {
    let begin = Instant::now();
    Build::get(&Cache::open()?)?;
    Ok(LabReport { outcome: Outcome::Passed, boot: None, total: begin.elapsed(), logs: None }.told())
}

/// Runs a command in L1, its output copied to our stdout as it comes, progress told on stderr.
///
/// # Errors
/// The lab could not be built or QEMU not be started. What goes wrong in L1 is [`Outcome::Failed`].
pub(crate) fn run(options: &LabOptions) -> Result<LabReport> {
    ensure!(!options.command.is_empty(), "no command to run in the lab");
    let cache = Cache::open()?;
    if let Some(reason) = obstacle()? {
        return Ok(LabReport::skipped(reason));
    }
    let build = Build::get(&cache)?;
    let (dir, initrd) = prepare(&cache, &build, options, Some(&options.command))?;

    eprintln!("lab: L1 starts; limit {} s, logs in {}", options.time_limit.as_secs(), dir.display());
    let begin = Instant::now();
    let ended = machine::run(&build, &dir, &initrd, options)?;
    let total = begin.elapsed();
    let _ = std::fs::remove_file(&initrd);

    let outcome = match ended.end {
        End::Exit(0) => Outcome::Passed,
        End::Exit(124) => Outcome::Failed(format!(
            "the command was ended at its limit of {} s",
            command_limit(options.time_limit).as_secs()
        )),
        End::Exit(code) => Outcome::Failed(format!("the command ended with status {code}")),
        End::Broken(why) => Outcome::Failed(why),
    };
    if !matches!(outcome, Outcome::Passed) {
        eprintln!("lab: the end of {}:", dir.join("console.log").display());
        eprintln!("{}", last_lines(&dir.join("console.log"), 25));
    }
    Ok(LabReport { outcome, boot: ended.boot, total, logs: Some(dir) }.told())
}

/// Gives a prompt in L1; returns when it is left, or at `limit`, if any.
///
/// # Errors
/// As [`run`]; also if the machine did not end in order.
pub(crate) fn shell(options: &LabOptions, limit: Option<Duration>) -> Result<LabReport> {
    let cache = Cache::open()?;
    if let Some(reason) = obstacle()? {
        return Ok(LabReport::skipped(reason));
    }
    let build = Build::get(&cache)?;
    let mut options = options.clone();
    for (name, value) in [("LAB_TTY_SIZE", terminal_size()), ("TERM", std::env::var("TERM").ok())] {
        options.environment.extend(value.map(|value| (name.to_owned(), value)));
    }
    let (dir, initrd) = prepare(&cache, &build, &options, None)?;
    eprintln!(
        "lab: L1 starts, which takes some seconds. Leave it with exit or Ctrl-D; Ctrl-a x pulls the plug."
    );
    let begin = Instant::now();
    machine::shell(&build, &dir, &initrd, &options, limit)?;
    let _ = std::fs::remove_file(&initrd);
    Ok(LabReport { outcome: Outcome::Passed, boot: None, total: begin.elapsed(), logs: Some(dir) }.told())
}

/// Rows and columns of the terminal on stdin, as stty(1) tells them; a serial line cannot ask.
fn terminal_size() -> Option<String> {
    let output =
        Command::new("stty").arg("size").stdin(Stdio::inherit()).stderr(Stdio::null()).output().ok()?;
    let size = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && size != "0 0").then_some(size)
}

/// The folder of a new run and its initramfs for L1.
fn prepare(
    cache: &Cache,
    build: &Build,
    options: &LabOptions,
    command: Option<&[String]>,
) -> Result<(PathBuf, PathBuf)> {
    for file in &options.files {
        ensure!(!file.name.is_empty() && !file.name.contains('/'), "{:?} is no plain file name", file.name);
    }
    let agent =
        step("guest agent", "It is a program of xtask: see cargo's messages above.", cargo::guest_agent)?;
    let dir = cache.new_run()?;
    let l1 = dir.join("l1.cpio");
    step("files of this run", "See the file named below.", || {
        write_archives(&l1, &dir, build, &agent, options, command)
    })?;
    Ok((dir, l1))
}

fn write_archives(
    l1: &Path,
    dir: &Path,
    build: &Build,
    agent: &Path,
    options: &LabOptions,
    command: Option<&[String]>,
) -> Result<()> {
    let l2 = dir.join("l2.cpio");
    initramfs::write_l2(&l2, build, agent)?;
    initramfs::write_l1(l1, build, &l2, options, command)?;
    Ok(std::fs::remove_file(&l2)?)
}

/// When the command is ended in L1, counted from its start.
fn command_limit(machine_limit: Duration) -> Duration {
    machine_limit.saturating_sub(GRACE).max(machine_limit / 2)
}

/// The variables that the command finds in L1.
fn environment(options: &LabOptions) -> Vec<(String, String)> {
    let mut variables: Vec<(String, String)> = [
        ("CPR_LAB", "1"),
        ("CPR_VMM", "/lab/cpr-vmm"),
        ("CPR_LAB_KERNEL", "/lab/vmlinux"),
        ("CPR_LAB_BZIMAGE", "/lab/bzImage"),
        ("CPR_LAB_INITRD", "/lab/initrd"),
        ("CPR_LAB_APPEND", L2_APPEND),
        ("CPR_LAB_PROMPT", PROMPT),
        ("CPR_LAB_OUT", "/lab/out"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    variables.push(("CPR_LAB_LIMIT".into(), command_limit(options.time_limit).as_secs().max(1).to_string()));
    variables.extend(options.environment.iter().cloned());
    variables
}
