//! Logs and traces: warnings go to the log; spans named after an update's phases go to the trace, with their
//! durations, where `-trace` asks for them.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, bail};
use tracing::Level;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::prelude::*;

use crate::cli::config::TraceConfig;

/// Names that `-trace` can ask for, in the order of an update.
pub const SPANS: &[&str] = &[
    "preflight",
    "prepare",
    "introduce",
    "depart",
    "await-target",
    "stop",
    "save",
    "hand-over",
    "load",
    "restore",
    "commit",
    "clean-up",
    "roll-back",
];

/// Starts logging for the whole process.
///
/// # Errors
/// A file cannot be opened.
pub fn start(config: &TraceConfig) -> anyhow::Result<()> {
    if let Some(unknown) =
        config.patterns.iter().find(|pattern| !SPANS.iter().any(|span| matches(pattern, span)))
    {
        bail!("-trace: nothing is named '{unknown}' (known: {}; * stands for any text)", SPANS.join(", "));
    }
    let log = tracing_subscriber::fmt::layer()
        .with_writer(writer(config.log_file.as_deref(), "-D")?)
        .with_ansi(false)
        .with_filter(filter_fn(|metadata| metadata.is_event() && *metadata.level() <= Level::WARN));
    let patterns = config.patterns.clone();
    let trace = (!patterns.is_empty()).then(|| -> anyhow::Result<_> {
        let file = config.file.as_deref().or(config.log_file.as_deref());
        let layer = tracing_subscriber::fmt::layer()
            .with_writer(writer(file, "-trace file=")?)
            .with_ansi(false)
            .with_span_events(FmtSpan::CLOSE)
            .with_filter(filter_fn(move |metadata| {
                metadata.is_span() && patterns.iter().any(|pattern| matches(pattern, metadata.name()))
            }));
        Ok(layer)
    });
    tracing_subscriber::registry().with(log).with(trace.transpose()?).init();
    Ok(())
}

fn writer(path: Option<&Path>, option: &str) -> anyhow::Result<BoxMakeWriter> {
    let Some(path) = path else { return Ok(BoxMakeWriter::new(std::io::stderr)) };
    // Appended to, because the program that takes over writes to the same file.
    let file: File = OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("{option}: cannot open {}", path.display()))?;
    Ok(BoxMakeWriter::new(Mutex::new(file)))
}

/// Whether `name` matches `pattern`, in which `*` stands for any text.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, rest)) => name.strip_prefix(head).is_some_and(|tail| {
            (0..=tail.len()).any(|at| tail.is_char_boundary(at) && matches(rest, &tail[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns() {
        assert!(matches("stop", "stop") && !matches("stop", "stopped"));
        assert!(matches("*", "anything") && matches("*", ""));
        assert!(matches("s*p", "stop") && matches("*-over", "hand-over") && matches("a*b*c", "axxbxxc"));
        assert!(!matches("s*p", "save") && !matches("a*b*c", "acb"));
    }
}
