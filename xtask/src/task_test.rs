//! `cargo xtask test`: every test there is, in lanes, with one total at the end.
//!
//! A lane that cannot run here is skipped with its reason, and so is a test that says `SKIPPED name: reason`; both are
//! listed by name and never counted as passed. The last line is `N passed, N failed, N skipped`.

mod report;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use clap::Args;

use self::report::Tally;
use crate::lab::{self, LabOptions, LabTests, Outcome};
use crate::tools::{Paint, cargo, kvm_obstacle, release_binary, run, workspace};

/// What the feature `fault-injection` puts into a binary: the start of its variables' names.
const FAULT_MARK: &[u8] = b"CPR_TEST_";

/// Arguments of `cargo xtask test`.
#[derive(Debug, Default, Args)]
pub(crate) struct TestArgs {
    /// Leave out the nested lab
    #[arg(long)]
    pub(crate) no_lab: bool,
    /// Use `cargo test` even if cargo-nextest is there
    #[arg(long)]
    pub(crate) no_nextest: bool,
    /// Run only tests whose names contain one of these; the other lanes are left out
    #[arg(value_name = "FILTER")]
    pub(crate) filters: Vec<String>,
}

/// Runs the lanes to their end whatever fails; false if anything did.
pub(crate) fn test(arguments: &TestArgs) -> Result<bool> {
    check_tools()?;
    let mut tally = Tally::default();
    if let Some(obstacle) = kvm_obstacle() {
        eprintln!(
            "no KVM: tests that need it skip themselves, or fail if it is there and does not open.\n{obstacle}"
        );
    }

    if !arguments.no_nextest && has_nextest() {
        nextest(&arguments.filters, &mut tally)?;
    } else {
        if !arguments.no_nextest {
            eprintln!(
                "cargo-nextest is not installed, so `cargo test` does the work: one process per test program,"
            );
            eprintln!("and no time limits. To have both: cargo install --locked cargo-nextest");
        }
        plain_tests(&arguments.filters, &mut tally)?;
    }
    title("doc tests");
    let mut doctests = cargo();
    doctests.args(["test", "--workspace", "--doc", "--no-fail-fast", "--"]).args(&arguments.filters);
    libtest("doc tests", &mut doctests, &mut tally)?;

    if arguments.filters.is_empty() {
        model(&mut tally)?;
        faults(&mut tally)?;
        versions(&mut tally)?;
        release_has_no_faults(&mut tally)?;
        lab_lane(arguments.no_lab, &mut tally)?;
    } else {
        for lane in ["model", "updates that fail", "updates between releases", "release binary", "lab"] {
            tally.skip(lane, "filters given");
        }
    }
    println!();
    print!("{}", tally.summary(Paint::stdout()));
    Ok(tally.is_good())
}

fn title(what: &str) {
    eprintln!();
    eprintln!("{}", Paint::stderr().bold(format!("== {what}")));
}

/// What a build needs beside Rust.
fn check_tools() -> Result<()> {
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let found = Command::new(&compiler).arg("--version").output().is_ok_and(|output| output.status.success());
    ensure!(
        found,
        "no C compiler driver ({compiler:?}): it assembles the built-in guest and links the programs. Install one, on \
         Debian: apt-get install gcc libc6-dev"
    );
    Ok(())
}

fn has_nextest() -> bool {
    cargo().args(["nextest", "--version"]).output().is_ok_and(|output| output.status.success())
}

/// Unit tests, integration tests and examples by cargo-nextest, one process each.
fn nextest(filters: &[String], tally: &mut Tally) -> Result<()> {
    title("tests (cargo-nextest)");
    let target = target_folder()?;
    let junit = target.join("nextest/default/junit.xml");
    // An old one would be taken for this run's if the build fails.
    let _ = std::fs::remove_file(&junit);
    let mut command = cargo();
    command.args(["nextest", "run", "--workspace", "--no-tests"]);
    command.arg(if filters.is_empty() { "fail" } else { "pass" }).args(filters);
    let good = run(&mut command)?;
    match std::fs::read_to_string(&junit) {
        Ok(xml) => tally.add_junit(&xml),
        Err(_) if good => {}
        Err(_) => tally.fail("tests (build)"),
    }
    // A failure that is none of a test's: of the runner, or of a setup.
    if !good && tally.is_good() {
        tally.fail("tests (cargo nextest run)");
    }
    if filters.is_empty() {
        for name in ignored_tests()? {
            tally.skip(&name, "ignored: to be run by hand");
        }
    }
    Ok(())
}

/// Names of the tests that only run when asked for.
fn ignored_tests() -> Result<Vec<String>> {
    let mut command = cargo();
    command.args(["nextest", "list", "--workspace", "--run-ignored", "only", "--message-format", "json"]);
    let output = command.stderr(Stdio::null()).output()?;
    ensure!(output.status.success(), "cargo nextest list failed");
    report::listed_tests(&String::from_utf8_lossy(&output.stdout))
}

/// The same by cargo alone.
fn plain_tests(filters: &[String], tally: &mut Tally) -> Result<()> {
    title("tests (cargo test)");
    let mut command = cargo();
    command.args(["test", "--workspace", "--lib", "--bins", "--tests", "--examples", "--no-fail-fast", "--"]);
    // The guests of the tests keep every CPU busy that they get.
    command.args(filters).arg("--show-output").env("RUST_TEST_THREADS", "2");
    libtest("tests", &mut command, tally)
}

/// Runs a `cargo test` on our terminal and counts what it says.
fn libtest(lane: &str, command: &mut Command, tally: &mut Tally) -> Result<()> {
    command.stdout(Stdio::piped());
    let mut child = command.spawn().context("cannot run cargo")?;
    let stdout = child.stdout.take().context("cargo's output is piped")?;
    let failed_before = tally.failures();
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        println!("{line}");
        tally.add_libtest_line(lane, &line);
    }
    let status = child.wait()?;
    if !status.success() && tally.failures() == failed_before {
        tally.fail(&format!("{lane} (build, or a test program that died)"));
    }
    Ok(())
}

/// Every interleaving of the ownership word's users.
fn model(tally: &mut Tally) -> Result<()> {
    title("model of the ownership word (loom)");
    let mut command = cargo();
    command.args(["test", "--release", "-p", "cpr-core", "--test", "loom_ownership"]);
    // Everything is compiled with other flags: in a folder of its own, or each lane would rebuild the world.
    command.arg("--target-dir").arg(target_folder()?.join("loom")).env("RUSTFLAGS", "--cfg loom");
    libtest("model", &mut command, tally)
}

/// Updates that fail on purpose, at every point.
fn faults(tally: &mut Tally) -> Result<()> {
    title("updates that fail (fault-injection)");
    // Or the other tests would find a program with faults in their folder.
    let target = target_folder()?.join("faults");
    let matrix = target.join("fault-matrix.md");
    let _ = std::fs::remove_file(&matrix);
    let mut command = cargo();
    command.args(["test", "-p", "vmm", "--features", "fault-injection", "--no-fail-fast"]);
    command.args(["--test", "fallback", "--test", "passive", "--test", "fault_matrix"]);
    command.arg("--target-dir").arg(&target);
    // The guests of the tests keep every CPU busy that they get.
    command.env("RUST_TEST_THREADS", "2");
    libtest("updates that fail", &mut command, tally)?;
    let mut steps = cargo();
    steps.args(["test", "-p", "vmm-core", "--features", "fault-injection", "--test", "machine"]);
    steps.arg("a_step_that_is_left_out").arg("--target-dir").arg(&target);
    libtest("updates that fail", &mut steps, tally)?;
    if let Ok(table) = std::fs::read_to_string(&matrix) {
        println!("{table}");
    }
    Ok(())
}

/// Updates from and to a program that writes the state as the release before did.
fn versions(tally: &mut Tally) -> Result<()> {
    const LANE: &str = "updates between releases";
    title("updates between releases (previous-format)");
    let target = target_folder()?.join("versions");
    for arguments in [["-p", "cpr-core", "--lib", "section"], ["-p", "vmm", "--test", "versions"]] {
        let mut command = cargo();
        command.args(["test", "--features", "previous-format", "--no-fail-fast"]).args(arguments);
        command.arg("--target-dir").arg(&target).env("RUST_TEST_THREADS", "2");
        libtest(LANE, &mut command, tally)?;
    }
    Ok(())
}

/// The program that users get must not know how to leave out steps of a restore.
fn release_has_no_faults(tally: &mut Tally) -> Result<()> {
    const NAME: &str = "the release binary has no fault injection";
    title("release binary");
    let binary = release_binary()?;
    let bytes = std::fs::read(&binary).with_context(|| format!("cannot read {}", binary.display()))?;
    if bytes.windows(FAULT_MARK.len()).any(|window| window == FAULT_MARK) {
        let mark = String::from_utf8_lossy(FAULT_MARK);
        eprintln!("{} contains {mark}: built with the feature fault-injection", binary.display());
        tally.fail(NAME);
    } else {
        tally.pass();
    }
    Ok(())
}

/// Whole machines in the nested lab.
fn lab_lane(left_out: bool, tally: &mut Tally) -> Result<()> {
    title("lab");
    if left_out {
        eprintln!("skipped: lab (--no-lab)");
        tally.skip("lab", "--no-lab");
        return Ok(());
    }
    if let Some(reason) = lab::obstacle()? {
        eprintln!("skipped: lab ({reason})");
        tally.skip("lab", &reason);
        return Ok(());
    }
    let report = release_binary()
        .and_then(|vmm| LabOptions::for_tests(vmm, &LabTests::default()))
        .and_then(|options| lab::run(&options));
    let report = match report {
        Ok(report) => report,
        Err(error) => {
            eprintln!("lab: {error:#}");
            tally.fail("lab");
            return Ok(());
        }
    };
    let failed_before = tally.failures();
    let output = report.logs.as_ref().map(|logs| std::fs::read_to_string(logs.join("output.log")));
    for line in output.transpose().unwrap_or_default().unwrap_or_default().lines() {
        tally.add_libtest_line("lab", line);
    }
    match report.outcome {
        Outcome::Passed => {}
        Outcome::Failed(_) if tally.failures() > failed_before => {}
        Outcome::Failed(why) => tally.fail(&format!("lab ({why})")),
        Outcome::Skipped(reason) => tally.skip("lab", &reason),
    }
    Ok(())
}

/// Where cargo puts what it builds.
fn target_folder() -> Result<std::path::PathBuf> {
    let output = cargo().args(["metadata", "--no-deps", "--format-version", "1"]).output()?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    Ok(metadata["target_directory"].as_str().map_or_else(|| workspace().join("target"), Into::into))
}
