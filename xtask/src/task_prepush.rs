//! `cargo xtask prepush`: what CI does, in its order; the quick checks come first.

use anyhow::Result;
use clap::Args;

use crate::task_test::{self, TestArgs};
use crate::tools::{Paint, cargo, run};

/// Features of programs that are built for tests, and never released.
const TEST_FEATURES: &str = "vmm/fault-injection,vmm/previous-format";

/// Arguments of `cargo xtask prepush`.
#[derive(Debug, Args)]
pub(crate) struct PrepushArgs {
    /// Leave out the nested lab
    #[arg(long)]
    no_lab: bool,
}

/// Runs the checks until one fails; false if one did.
pub(crate) fn prepush(arguments: &PrepushArgs) -> Result<bool> {
    let mut formatting = cargo();
    formatting.args(["fmt", "--all", "--check"]);
    let mut lints = cargo();
    lints.args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]);
    let mut feature_lints = cargo();
    feature_lints.args([
        "clippy",
        "-p",
        "vmm",
        "-p",
        "vmm-core",
        "-p",
        "cpr-core",
        "--features",
        TEST_FEATURES,
    ]);
    feature_lints.args(["--all-targets", "--", "-D", "warnings"]);
    let mut documentation = cargo();
    documentation.args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings");
    let checks = [
        ("formatting", formatting),
        ("lints", lints),
        ("lints of what only tests have", feature_lints),
        ("documentation", documentation),
    ];
    for (what, mut check) in checks {
        if !run(&mut check)? {
            println!("{}", Paint::stdout().red(format!("prepush: {what} failed")));
            return Ok(false);
        }
    }
    task_test::test(&TestArgs { no_lab: arguments.no_lab, ..TestArgs::default() })
}
