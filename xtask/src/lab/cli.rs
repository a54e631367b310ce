//! The command line of `cargo xtask lab`.

use std::time::Duration;

use anyhow::Result;
use clap::{Args, Subcommand};

use super::steps::step;
use super::{LabOptions, LabReport, SEE_CARGO, obstacle, prepare_build, release_program, run, shell};

/// The integration test of `vmm` that is written for the lab.
const TEST: &str = "lab_linux";

/// A forgotten shell ends by itself, too.
const SHELL_LIMIT: Duration = Duration::from_secs(4 * 60 * 60);

/// Arguments of `cargo xtask lab`.
#[derive(Debug, Args)]
pub(crate) struct LabArgs {
    #[command(subcommand)]
    task: Option<LabTask>,
    /// Seconds until the machine is ended, whatever it does [default: 900; shell: 14400]
    #[arg(long, global = true, value_name = "SECONDS")]
    limit: Option<u64>,
    /// RAM of L1 in MiB
    #[arg(long, global = true, default_value_t = 6144, value_name = "MIB")]
    memory: u32,
}

#[derive(Debug, Clone, Subcommand)]
enum LabTask {
    /// Run an integration test of `vmm` in L1 (the default)
    Test {
        /// The test's name
        #[arg(long, default_value = TEST)]
        name: String,
        /// Arguments for the test binary: filters, --nocapture
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Give a prompt in L1
    Shell,
    /// Run a command of L1; /lab/cpr-vmm is there
    Run {
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Build the lab into the cache and stop
    Build,
}

/// Does what the command line says. The caller turns [`LabReport::is_failure`] into its exit status.
///
/// # Errors
/// As [`run`]; also if our own programs do not build.
pub(crate) fn lab(arguments: LabArgs) -> Result<LabReport> {
    // Said before minutes go into a release build.
    if let Some(reason) = obstacle()? {
        return Ok(LabReport::skipped(reason));
    }
    let task = arguments.task.unwrap_or(LabTask::Test { name: TEST.into(), arguments: Vec::new() });
    let vmm = || step("release build of cpr-vmm", SEE_CARGO, || release_program("vmm", "cpr-vmm"));
    let mut options = match &task {
        LabTask::Build => return prepare_build(),
        LabTask::Test { name, arguments } => LabOptions::for_test(vmm()?, name, arguments)?,
        LabTask::Shell => LabOptions { vmm: Some(vmm()?), time_limit: SHELL_LIMIT, ..LabOptions::default() },
        LabTask::Run { command } => {
            LabOptions { vmm: Some(vmm()?), command: command.clone(), ..LabOptions::default() }
        }
    };
    if let Some(seconds) = arguments.limit {
        options.time_limit = Duration::from_secs(seconds);
    }
    options.memory_mib = arguments.memory;
    match task {
        LabTask::Shell => shell(&options),
        _ => run(&options),
    }
}
