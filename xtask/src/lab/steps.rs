//! What the user sees while the lab works: one line per step with its time, on stderr; and the way the lab runs other
//! programs: quietly, with their output in a log, of which the end is shown if they fail, with a time limit, and never longer than we live.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// No program of the build takes longer, also over a slow network.
const LIMIT: Duration = Duration::from_secs(20 * 60);

/// Runs one step under a progress line. `advice` says what to do if it fails.
pub(super) fn step<T>(what: &str, advice: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprint!("lab: {what} ...");
    let begin = Instant::now();
    let result = work();
    let seconds = begin.elapsed().as_secs_f64();
    match &result {
        Ok(_) => eprintln!(" {seconds:.1} s"),
        Err(_) => eprintln!(" failed after {seconds:.1} s"),
    }
    result.with_context(|| format!("lab: {what}: failed. {advice}"))
}

/// Whether a program may use our terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Terminal {
    /// It reads from it, or gets Ctrl-C with us.
    Shared,
    /// It is in a process group of its own, which ends as a whole.
    None,
}

/// `program` and its environment, ended at the limit, if any, and with the process that starts it, however that ends.
pub(super) fn limited(program: &Command, limit: Option<Duration>, terminal: Terminal) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", "timeout", "--kill-after=5"]);
    if terminal == Terminal::Shared {
        command.arg("--foreground");
    }
    // To timeout(1), zero is none.
    let seconds = limit.map_or(0, |limit| limit.as_secs().max(1));
    command
        .arg(seconds.to_string())
        .args(["setpriv", "--pdeathsig", "KILL"])
        .arg(program.get_program())
        .args(program.get_args())
        .envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command
}

/// Runs a program to its end, its output appended to `log`. An error shows the last lines of it.
pub(super) fn run_logged(command: &Command, log: &Path) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot write {}", log.display()))?;
    writeln!(file, "+ {command:?}")?;
    let status = limited(command, Some(LIMIT), Terminal::None)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("cannot run {program}"))?;
    if status.code() == Some(124) {
        bail!("{program} took longer than {} s; see {}", LIMIT.as_secs(), log.display());
    }
    if !status.success() {
        bail!("{program}: {status}; the end of {}:\n{}", log.display(), last_lines(log, 20));
    }
    Ok(())
}

/// The last lines of a text file, or a word on why there are none.
pub(super) fn last_lines(path: &Path, count: usize) -> String {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) => return format!("({}: {error})", path.display()),
    };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    match lines.len() {
        0 => "(empty)".into(),
        total => lines[total.saturating_sub(count)..].join("\n"),
    }
}
