//! What the lab runs is built by cargo; these ask it where the results are.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::tools::workspace;

/// Integration tests of `vmm` that are written for the lab begin so.
pub(super) const TESTS_BEGIN_WITH: &str = "lab_";

/// The one among them that measures, and is run only by its name.
pub(super) const BENCHMARK: &str = "lab_bench";

/// Builds the release binary `program` of `package` and tells its path.
pub(crate) fn release_program(package: &str, program: &str) -> Result<PathBuf> {
    executable(&["build", "--release", "-p", package, "--bin", program], &[], program)
}

/// Builds the `cpr-vmm` that leaves out steps of a restore when its environment says so, and tells its path. It has a name
/// of its own, so that nobody ever takes it for the real one; without symbols, as it goes into an initramfs.
pub(super) fn faulty_vmm() -> Result<PathBuf> {
    let program = "cpr-vmm-faulty";
    let arguments = ["rustc", "-p", "vmm", "--bin", program, "--features", "fault-injection"];
    executable(&arguments, &["--", "-C", "strip=symbols"], program)
}

/// Builds the integration tests of `vmm` whose names match `pattern` (a glob), and tells names and binaries.
pub(super) fn tests(pattern: &str) -> Result<Vec<(String, PathBuf)>> {
    let arguments = ["test", "-p", "vmm", "--test", pattern, "--no-run"];
    let mut tests: Vec<_> = executables(&arguments, &[])?
        .into_iter()
        .filter(|(name, _)| name.starts_with(TESTS_BEGIN_WITH) && (name != BENCHMARK || pattern == BENCHMARK))
        .collect();
    tests.sort();
    ensure!(!tests.is_empty(), "there is no test {pattern}");
    Ok(tests)
}

/// Builds the agent that runs in L2. It shares the dependencies of xtask's own build, so this takes a moment only; the
/// extra flags make it small and its loops tight.
pub(super) fn guest_agent() -> Result<PathBuf> {
    let flags = ["--", "-C", "opt-level=2", "-C", "debuginfo=0", "-C", "strip=symbols"];
    executable(&["rustc", "-p", "xtask", "--bin", "guest-agent"], &flags, "guest-agent")
}

/// Runs cargo and finds the executable of `target` in its messages.
fn executable(arguments: &[&str], trailing: &[&str], target: &str) -> Result<PathBuf> {
    let found = executables(arguments, trailing)?.into_iter().find(|(name, _)| name == target);
    found
        .map(|(_, path)| path)
        .with_context(|| format!("cargo {} made no executable {target}", arguments.join(" ")))
}

/// Runs cargo and finds targets and their executables in its messages.
fn executables(arguments: &[&str], trailing: &[&str]) -> Result<Vec<(String, PathBuf)>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let output = Command::new(cargo)
        .args(arguments)
        .args(["--quiet", "--message-format=json-render-diagnostics"])
        .args(trailing)
        .current_dir(workspace())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "cargo {} failed", arguments.join(" "));
    let executable = |line: &str| {
        let message = serde_json::from_str::<serde_json::Value>(line).ok()?;
        let name = message["target"]["name"].as_str()?;
        (message["reason"] == "compiler-artifact").then_some(())?;
        Some((name.to_owned(), PathBuf::from(message["executable"].as_str()?)))
    };
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(executable).collect())
}
