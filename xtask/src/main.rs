//! The tasks of this workspace, as `cargo xtask TASK`: one file per task.

mod lab;
mod task_bench;
mod task_demo;
mod task_fuzz;
mod task_lab;
mod task_payload;
mod task_prepush;
mod task_test;
mod tools;

use std::process::ExitCode;

use clap::Parser;

/// The tasks of this workspace.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask")]
enum Task {
    /// Boot a guest, replace its VMM several times, and show what the guest noticed
    Demo(task_demo::DemoArgs),
    /// Run every test there is
    Test(task_test::TestArgs),
    /// Run the benchmarks and hold their medians against the limits
    Bench(task_bench::BenchArgs),
    /// Test whole machines on an emulated host with a real /dev/kvm
    Lab(lab::LabArgs),
    /// Fuzz everything that reads bytes of others, for a bounded time
    Fuzz(task_fuzz::FuzzArgs),
    /// Write the built-in guest as a file that other VMMs boot, too
    Payload(task_payload::PayloadArgs),
    /// Do what CI does: formatting, lints, documentation, tests
    Prepush(task_prepush::PrepushArgs),
}

fn main() -> anyhow::Result<ExitCode> {
    let good = match Task::parse() {
        Task::Demo(arguments) => task_demo::demo(&arguments)?,
        Task::Test(arguments) => task_test::test(&arguments)?,
        Task::Bench(arguments) => task_bench::bench(&arguments)?,
        Task::Lab(arguments) => task_lab::lab(arguments)?,
        Task::Fuzz(arguments) => task_fuzz::fuzz(&arguments)?,
        Task::Payload(arguments) => task_payload::payload(&arguments)?,
        Task::Prepush(arguments) => task_prepush::prepush(&arguments)?,
    };
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
