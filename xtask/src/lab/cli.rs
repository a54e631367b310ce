//! The command line of `cargo xtask lab`.

use std::time::Duration;

use anyhow::Result;
use clap::{Args, Subcommand};

use super::steps::step;
use super::{
    LabOptions, LabReport, LabTests, SEE_CARGO, obstacle, prepare_build, release_program, run, shell,
};

/// Arguments of `cargo xtask lab`.
#[derive(Debug, Args)]
pub(crate) struct LabArgs {
    #[command(subcommand)]
    task: Option<LabTask>,
    /// Seconds until the machine is ended, whatever it does [default: 900; tests: 1800; all tests: 7200; shell: none]
    #[arg(long, global = true, value_name = "SECONDS")]
    limit: Option<u64>,
    /// RAM of L1 in MiB
    #[arg(long, global = true, default_value_t = 6144, value_name = "MIB")]
    memory: u32,
}

#[derive(Debug, Clone, Subcommand)]
enum LabTask {
    /// Run the lab's tests in L1 (the default): the integration tests of `vmm` whose names begin with lab_
    Test {
        /// All of them; without it those of `cargo xtask test`, which take less than 15 minutes
        #[arg(long)]
        all: bool,
        /// Only test programs of this name; a glob
        #[arg(long)]
        name: Option<String>,
        /// Arguments for the test programs: filters, --nocapture
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Compare how long a Linux guest stands still under cpr-vmm and under QEMU; takes five to ten minutes
    Bench,
    /// Give a prompt in L1, with /lab/cpr-vmm, guest kernels and an initramfs at hand
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
    let task = arguments.task.unwrap_or(LabTask::Test { all: false, name: None, arguments: Vec::new() });
    let vmm = || step("release build of cpr-vmm", SEE_CARGO, || release_program("vmm", "cpr-vmm"));
    let mut options = match &task {
        LabTask::Build => return prepare_build(),
        LabTask::Test { all, name, arguments } => {
            let defaults = LabTests { all: *all, arguments: arguments.clone(), ..LabTests::default() };
            let tests = LabTests { pattern: name.clone().unwrap_or(defaults.pattern), ..defaults };
            LabOptions::for_tests(vmm()?, &tests)?
        }
        LabTask::Bench => LabOptions::for_tests(vmm()?, &LabTests::benchmark())?,
        LabTask::Shell => LabOptions { vmm: Some(vmm()?), ..LabOptions::default() },
        LabTask::Run { command } => {
            LabOptions { vmm: Some(vmm()?), command: command.clone(), ..LabOptions::default() }
        }
    };
    options.memory_mib = arguments.memory;
    let limit = arguments.limit.map(Duration::from_secs);
    if let LabTask::Shell = task {
        return shell(&options, limit);
    }
    options.time_limit = limit.unwrap_or(options.time_limit);
    run(&options)
}
