//! Linux guests in the nested lab (`cargo xtask lab`): a stock kernel with a shell on its serial line and a test agent,
//! driven through updates in either mode.
//!
//! The lab says in the environment where kernel and initramfs are. It emulates its CPUs and may share them with others, so
//! nothing is timed closely: clocks are compared, not measured, and limits are there to end what hangs.

mod checks;
mod linux;
mod report;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use checks::{
    Time, boot_is_good, clocks_are_good, clocks_go_on_through, clocksource, float_registers_stay_through,
    log_has_nothing_new, remember_log, shell_answers_through, time_agrees_with_the_host_through,
    timers_are_good, timers_tick, watched,
};
pub use linux::{Boot, Linux};
pub use report::Report;

/// A boot takes 15 to 60 seconds on emulated CPUs.
pub const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// How long a command in the guest may take.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// After this long without an answer a guest is given up that is expected to fail.
const DEATH_LIMIT: Duration = Duration::from_secs(8);

/// What the lab tells us.
#[derive(Debug, Clone)]
pub struct Lab {
    /// The program under test.
    pub vmm: PathBuf,
    /// The one that fails on purpose.
    pub faulty: Option<PathBuf>,
    /// The guest's kernel as an ELF file.
    pub vmlinux: String,
    /// The same as a bzImage.
    pub bzimage: String,
    /// The guest's initramfs.
    pub initrd: String,
    /// A kernel command line.
    pub append: String,
    prompt: String,
    out: PathBuf,
}

impl Lab {
    /// None outside of the lab.
    ///
    /// # Panics
    /// If the lab is there but does not say where its things are.
    pub fn find() -> Option<Lab> {
        std::env::var_os("CPR_LAB")?;
        let text = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("the lab does not set {name}"));
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

    /// What the guest's shell prints when it waits for a line.
    pub fn prompt(&self) -> &str {
        &self.prompt
    }

    /// A folder; what is left in it comes back with the logs of the run.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// Notes a figure for whoever reads the run's output: the lab shows them all at its end.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn note(&self, figure: &str) -> anyhow::Result<()> {
        use std::io::Write;
        let mut file = std::fs::File::options().create(true).append(true).open(self.out.join("figures"))?;
        Ok(writeln!(file, "{}: {figure}", crate::current_test())?)
    }
}

/// Gives the lab, or skips the test that calls it, by name. The test returns a `Result`.
#[macro_export]
macro_rules! need_lab {
    () => {
        match $crate::lab::Lab::find() {
            Some(lab) => lab,
            None => {
                eprintln!("SKIPPED {}: not in the lab (cargo xtask lab)", $crate::current_test());
                return Ok(());
            }
        }
    };
}

/// How a guest gets from program to program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// cpr-exec, by turns through a memfd and a file.
    Exec,
    /// cpr-transfer to a new process each time.
    Transfer,
}

impl Mode {
    /// As monitors spell it.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Exec => "cpr-exec",
            Mode::Transfer => "cpr-transfer",
        }
    }
}

/// What an update is done with.
#[derive(Debug, Clone, Copy)]
pub enum Target<'a> {
    /// The program under test.
    Good,
    /// The one that fails on purpose, and the step of the restore that it leaves out.
    Faulty(Option<&'a str>),
}

impl Target<'_> {
    /// How long the guest may take to answer afterwards.
    pub fn patience(self) -> Duration {
        match self {
            Target::Faulty(Some(_)) => DEATH_LIMIT,
            Target::Good | Target::Faulty(None) => COMMAND_LIMIT,
        }
    }
}
