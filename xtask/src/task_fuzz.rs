//! `cargo xtask fuzz`: libFuzzer against everything that reads bytes of others, for a bounded time.
//!
//! The bodies are `fuzz/bodies`, which every test run executes on stable. This builds them with a nightly toolchain and
//! cargo-fuzz, which is installed into the user's cache folder if it is nowhere else, and gives each target its seconds.
//! New inputs stay in `fuzz/corpus`, what breaks a target in `fuzz/artifacts`.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::tools::{Paint, cargo, run, workspace};

/// The sanitizers' runtime is linked dynamically; cargo-fuzz's flags take the place of those of `.cargo/config.toml`.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Limit of one input, in seconds.
const INPUT_SECONDS: u32 = 10;
/// Limit of the whole process, in MiB; the sanitizer takes most of it.
const RSS_MIB: u32 = 512;
/// Limit of one allocation, in MiB.
const ALLOCATION_MIB: u32 = 16;

/// Arguments of `cargo xtask fuzz`.
#[derive(Debug, Args)]
pub(crate) struct FuzzArgs {
    /// How long each target runs, in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Only list the targets
    #[arg(long)]
    list: bool,
    /// Targets to run; all of them if none is named
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
}

/// A target, and the longest input that it is worth trying, in bytes.
struct Target {
    name: String,
    max_len: String,
}

/// Runs the targets one after the other, whatever they find; false if one found something.
pub(crate) fn fuzz(arguments: &FuzzArgs) -> Result<bool> {
    let work = workspace().join("target/fuzz");
    let seeds = work.join("seeds");
    let targets = chosen(write_seeds(&seeds)?, &arguments.targets)?;
    if arguments.list {
        targets.iter().for_each(|target| println!("{}", target.name));
        return Ok(true);
    }
    check_tools()?;
    let fuzzer = Fuzzer { tools: cargo_fuzz()?, work };
    let names: Vec<_> = targets.iter().map(|target| target.name.as_str()).collect();
    fuzzer.build(if arguments.targets.is_empty() { &[] } else { &names })?;

    let paint = Paint::stdout();
    println!("{}", paint.bold(format!("{:<22} {:>12} {:>9} {:>9}", "target", "inputs", "per s", "peak MiB")));
    let mut broken = Vec::new();
    for target in &targets {
        let outcome = fuzzer.fuzz(target, &seeds, arguments.seconds)?;
        let figures = format!(
            "{:<22} {:>12} {:>9} {:>9}",
            target.name, outcome.inputs, outcome.per_second, outcome.peak_mib
        );
        match &outcome.failure {
            None => println!("{figures}"),
            Some(why) => {
                println!("{}", paint.red(format!("{figures}  {why}")));
                broken.push((target, outcome));
            }
        }
    }
    for (target, outcome) in &broken {
        println!();
        println!("{}: all that was said is in {}", target.name, outcome.log.display());
        if let Some(input) = &outcome.input {
            println!("  once more:  {}", fuzzer.once_more(target, input));
            println!("  the input:  {}", escaped(input)?);
        }
    }
    if !broken.is_empty() {
        println!();
        println!("An input that breaks something becomes a test beside the code that it broke.");
    }
    Ok(broken.is_empty())
}

/// Has the seeds written, and asks which targets there are.
fn write_seeds(folder: &Path) -> Result<Vec<Target>> {
    // Nothing of an earlier version.
    let _ = fs::remove_dir_all(folder);
    let mut command = cargo();
    command.args(["run", "--quiet", "-p", "fuzz-bodies", "--bin", "fuzz-corpus", "--"]).arg(folder);
    let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "the seeds cannot be written; see the messages above");
    let lines = String::from_utf8(output.stdout)?;
    let target = |line: &str| {
        let (name, max_len) = line.split_once(' ')?;
        Some(Target { name: name.into(), max_len: max_len.into() })
    };
    lines.lines().map(|line| target(line).with_context(|| format!("fuzz-corpus says {line:?}"))).collect()
}

/// The targets of these names, or all.
fn chosen(mut targets: Vec<Target>, names: &[String]) -> Result<Vec<Target>> {
    for name in names {
        if !targets.iter().any(|target| target.name == *name) {
            let known: Vec<_> = targets.iter().map(|target| target.name.as_str()).collect();
            bail!("no fuzz target '{name}' (there are: {})", known.join(", "));
        }
    }
    targets.retain(|target| names.is_empty() || names.contains(&target.name));
    Ok(targets)
}

/// What is needed and cannot be installed on the quiet.
fn check_tools() -> Result<()> {
    let good = |command: &mut Command| {
        command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    ensure!(
        good(Command::new("rustup").arg("--version")),
        "rustup is missing: cargo-fuzz needs a nightly toolchain beside the stable one. See https://rustup.rs"
    );
    ensure!(
        good(Command::new("rustup").args(["run", "nightly", "rustc", "--version"])),
        "the nightly toolchain is missing: only it has sanitizers. Install it with\n  \
         rustup toolchain install nightly --profile minimal"
    );
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    ensure!(
        good(Command::new(&compiler).arg("--version")),
        "no C++ compiler ({compiler:?}): libFuzzer is built with it. Install one, on Debian: apt-get install g++"
    );
    Ok(())
}

/// The folder of cargo-fuzz if it is not on the path; installs it there if it is nowhere.
fn cargo_fuzz() -> Result<Option<PathBuf>> {
    if cargo().args(["fuzz", "--version"]).output().is_ok_and(|output| output.status.success()) {
        return Ok(None);
    }
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    let cache =
        cache.context("neither XDG_CACHE_HOME nor HOME is an absolute path: nowhere to put cargo-fuzz")?;
    let root = cache.join("cpr-vmm/tools");
    if !root.join("bin/cargo-fuzz").is_file() {
        eprintln!("cargo-fuzz is not installed; building it into {}", root.display());
        fs::create_dir_all(&root).with_context(|| format!("cannot create {}", root.display()))?;
        let mut install = cargo();
        install.args(["install", "cargo-fuzz", "--locked", "--root"]).arg(&root);
        // Away from the workspace, whose flags are for its own programs.
        ensure!(
            run(install.current_dir(&root))?,
            "cargo-fuzz cannot be installed; see cargo's messages above"
        );
    }
    Ok(Some(root.join("bin")))
}

/// cargo-fuzz, and where its builds and logs go.
struct Fuzzer {
    tools: Option<PathBuf>,
    work: PathBuf,
}

/// How a target fared.
struct Outcome {
    inputs: String,
    per_second: String,
    peak_mib: String,
    failure: Option<String>,
    /// The file with the input that broke it.
    input: Option<PathBuf>,
    log: PathBuf,
}

impl Fuzzer {
    /// `cargo fuzz ACTION` by the nightly toolchain.
    fn cargo_fuzz(&self, action: &str) -> Result<Command> {
        let mut command = Command::new("rustup");
        command.args(["run", "nightly", "cargo", "fuzz", action, "--fuzz-dir", "fuzz", "--target", TARGET]);
        command.arg("--target-dir").arg(&self.work).current_dir(workspace());
        // Those of the toolchain that runs this.
        for name in ["CARGO", "RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"]
        {
            command.env_remove(name);
        }
        if let Some(tools) = &self.tools {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let path: Vec<_> = [tools.clone()].into_iter().chain(std::env::split_paths(&path)).collect();
            command.env("PATH", std::env::join_paths(path)?);
        }
        // Freed memory is kept aside to find who still uses it; at its default size it hides what the program takes.
        let mut options = OsString::from("quarantine_size_mb=8:");
        options.push(std::env::var_os("ASAN_OPTIONS").unwrap_or_default());
        command.env("ASAN_OPTIONS", options);
        Ok(command)
    }

    /// Builds one target, or all.
    fn build(&self, names: &[&str]) -> Result<()> {
        let all: &[&str] = &[];
        let each = if names.is_empty() { vec![all] } else { names.chunks(1).collect() };
        for name in each {
            eprintln!(
                "{}",
                Paint::stderr().bold(format!("building {}", name.first().unwrap_or(&"every target")))
            );
            let built = self.cargo_fuzz("build")?.args(name).status().context("cannot run rustup")?;
            ensure!(built.success(), "the fuzz targets do not build; see cargo's messages above");
        }
        Ok(())
    }

    fn fuzz(&self, target: &Target, seeds: &Path, seconds: u32) -> Result<Outcome> {
        let logs = self.work.join("logs");
        fs::create_dir_all(&logs)?;
        let log = logs.join(format!("{}.log", target.name));
        let corpus = workspace().join("fuzz/corpus").join(&target.name);
        fs::create_dir_all(&corpus)?;
        let mut command = self.cargo_fuzz("run")?;
        command.arg(&target.name).arg(&corpus).arg(seeds.join(&target.name)).arg("--");
        command.args([
            format!("-max_total_time={seconds}"),
            format!("-timeout={INPUT_SECONDS}"),
            format!("-rss_limit_mb={RSS_MIB}"),
            format!("-malloc_limit_mb={ALLOCATION_MIB}"),
            format!("-max_len={}", target.max_len),
            "-print_final_stats=1".into(),
        ]);
        let dictionary = seeds.join(format!("{}.dict", target.name));
        if dictionary.is_file() {
            command.arg(format!("-dict={}", dictionary.display()));
        }
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let status = command.status().context("cannot run rustup")?;
        let said = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        let figure = |name: &str| last_word(&said, name).unwrap_or("-").to_owned();
        Ok(Outcome {
            inputs: figure("stat::number_of_executed_units:"),
            per_second: figure("stat::average_exec_per_sec:"),
            peak_mib: figure("stat::peak_rss_mb:"),
            failure: (!status.success()).then(|| reason(&said)),
            input: last_word(&said, "artifact_prefix=").map(PathBuf::from).filter(|path| path.is_file()),
            log,
        })
    }

    /// What a user types to see a failure again.
    fn once_more(&self, target: &Target, input: &Path) -> String {
        let cargo_fuzz = match &self.tools {
            Some(tools) => format!("{} fuzz", tools.join("cargo-fuzz").display()),
            None => "cargo fuzz".into(),
        };
        let folder = self.work.display();
        format!(
            "rustup run nightly {cargo_fuzz} run --fuzz-dir fuzz --target {TARGET} --target-dir {folder} {} {}",
            target.name,
            input.display()
        )
    }
}

/// The last word of the last line that begins with this.
fn last_word<'a>(text: &'a str, beginning: &str) -> Option<&'a str> {
    text.lines().rev().find(|line| line.starts_with(beginning))?.split_whitespace().last()
}

/// Why a target ended, as libFuzzer or the panic says it.
fn reason(said: &str) -> String {
    let mut lines = said.lines();
    if let Some(panic) = lines.by_ref().find(|line| line.contains("panicked at")) {
        let place =
            panic.split_once("panicked at").map_or("", |(_, place)| place.trim().trim_end_matches(':'));
        return format!("panic at {place}: {}", lines.next().unwrap_or_default());
    }
    let error = said.lines().find(|line| line.contains("ERROR: ") || line.starts_with("error: "));
    error.map_or_else(|| "it failed".into(), |line| line.trim_start_matches("==").to_owned())
}

/// An input as Rust writes it, for a test.
fn escaped(input: &Path) -> Result<String> {
    let bytes = fs::read(input).with_context(|| format!("cannot read {}", input.display()))?;
    Ok(format!("b\"{}\"", bytes.escape_ascii()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libfuzzer_says_is_understood() {
        let said = "INFO: Seed: 1\n\
                    thread '<unnamed>' (7) panicked at src/a.rs:1:2:\n\
                    attempt to add with overflow\n\
                    ==7== ERROR: libFuzzer: deadly signal\n\
                    artifact_prefix='/x/'; Test unit written to /x/crash-1\n\
                    stat::average_exec_per_sec:     1032\n";
        assert_eq!(reason(said), "panic at src/a.rs:1:2: attempt to add with overflow");
        assert_eq!(last_word(said, "artifact_prefix="), Some("/x/crash-1"));
        assert_eq!(last_word(said, "stat::average_exec_per_sec:"), Some("1032"));
        assert_eq!(
            reason("x\n==9== ERROR: libFuzzer: timeout after 10 seconds"),
            "9== ERROR: libFuzzer: timeout after 10 seconds"
        );
    }
}
