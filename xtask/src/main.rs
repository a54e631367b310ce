//! The tasks of this workspace, as `cargo xtask TASK`.

mod lab;

use std::process::ExitCode;

use clap::Parser;

/// The tasks of this workspace.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask")]
enum Task {
    /// Test whole machines on an emulated host with a real /dev/kvm
    Lab(lab::LabArgs),
}

fn main() -> anyhow::Result<ExitCode> {
    match Task::parse() {
        Task::Lab(arguments) => Ok(ExitCode::from(u8::from(lab::lab(arguments)?.is_failure()))),
    }
}
