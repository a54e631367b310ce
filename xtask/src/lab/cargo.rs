//! What the lab runs is built by cargo; these ask it where the results are.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::tools::workspace;

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

/// Builds the integration test `test` of `package` and tells the path of its binary.
pub(super) fn test_binary(package: &str, test: &str) -> Result<PathBuf> {
    executable(&["test", "-p", package, "--test", test, "--no-run"], &[], test)
}

/// Builds the agent that runs in L2. It shares the dependencies of xtask's own build, so this takes a moment only; the
/// extra flags make it small and its loops tight.
pub(super) fn guest_agent() -> Result<PathBuf> {
    let flags = ["--", "-C", "opt-level=2", "-C", "debuginfo=0", "-C", "strip=symbols"];
    executable(&["rustc", "-p", "xtask", "--bin", "guest-agent"], &flags, "guest-agent")
}

/// Runs cargo and finds the executable of `target` in its messages.
fn executable(arguments: &[&str], trailing: &[&str], target: &str) -> Result<PathBuf> {
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
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["reason"] == "compiler-artifact" && message["target"]["name"] == target)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("cargo {} made no executable {target}", arguments.join(" ")))
}
