//! `cargo xtask prepush`: what CI does, in its order; the quick checks come first.

use anyhow::Result;
use clap::Args;

use crate::task_test::{self, TestArgs};
use crate::tools::{Paint, cargo, run};

/// Arguments of `cargo xtask prepush`.
#[derive(Debug, Args)]
pub(crate) struct PrepushArgs {
    /// Leave out the nested lab
    #[arg(long)]
    no_lab: bool,
}

/// Runs the checks until one fails; false if one did.
pub(crate) fn prepush(arguments: &PrepushArgs) -> Result<bool> {
    let checks: [(&str, &[&str], Option<(&str, &str)>); 3] = [
        ("formatting", &["fmt", "--all", "--check"], None),
        ("lints", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], None),
        ("documentation", &["doc", "--workspace", "--no-deps"], Some(("RUSTDOCFLAGS", "-D warnings"))),
    ];
    for (what, words, variable) in checks {
        if !run(cargo().args(words).envs(variable))? {
            println!("{}", Paint::stdout().red(format!("prepush: {what} failed")));
            return Ok(false);
        }
    }
    task_test::test(&TestArgs { no_lab: arguments.no_lab, ..TestArgs::default() })
}
