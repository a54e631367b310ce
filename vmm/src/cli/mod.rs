//! The command line: QEMU's words for the subset that this program has.
//!
//! [`parse`] turns arguments into a [`Config`] or an error that names the culprit and what would do; it opens no
//! file and starts nothing. One table of options ([`options`]) is both the parser's and the help's. Grammar and
//! defaults follow QEMU's `qemu-options.hx` and `system/vl.c`.

use std::ffi::OsString;

use thiserror::Error;

mod block;
pub mod config;
mod device;
mod given;
mod help;
pub(crate) mod keyval;
mod models;
mod netdev;
mod options;
mod resolve;

pub use config::Config;

use options::OPTIONS;
use resolve::Builder;

/// The most vCPUs a machine can have.
pub const MAX_CPUS: u8 = 64;

/// RAM of a machine for which nobody said a size, in bytes.
pub const DEFAULT_MEMORY_BYTES: u64 = 128 << 20;

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invocation {
    /// Run a machine.
    Run(Box<Config>),
    /// Print this and end well.
    Help(String),
    /// Print this and end well.
    Version(String),
}

/// Why the command line cannot be carried out. The text names the option, not the program.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CliError {
    /// An argument that starts with a dash but is no option.
    #[error("{0}: unknown option (-help lists them)")]
    UnknownOption(String),
    /// An argument that is no option's.
    #[error("unexpected argument '{0}' (options start with '-'; -help lists them)")]
    UnexpectedArgument(String),
    /// An argument that is not UTF-8.
    #[error("argument '{0}' is not valid UTF-8")]
    NotUtf8(String),
    /// An option at the end of the line that needs a value.
    #[error("{option}: a value must follow ({option} {metavar})")]
    MissingValue {
        /// The option.
        option: String,
        /// What kind of value.
        metavar: &'static str,
    },
    /// A value that cannot be used.
    #[error("{option}: {reason}")]
    Invalid {
        /// The option.
        option: String,
        /// What is wrong, and what would do.
        reason: String,
    },
}

/// Understands the arguments after the program's name.
///
/// `-help`, `-version` and `-machine help` count as soon as they are read: what stands after them is not looked at.
///
/// # Errors
///
/// The first mistake, in the order of the command line; then those that concern several options.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, CliError> {
    let mut builder = Builder::default();
    let mut args = args.into_iter();
    while let Some(argument) = args.next() {
        let argument = utf8(argument)?;
        let Some(name) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) else {
            return Err(CliError::UnexpectedArgument(argument));
        };
        let Some(option) = OPTIONS.iter().find(|option| option.names.contains(&name)) else {
            return Err(CliError::UnknownOption(argument));
        };
        let value = match option.metavar {
            None => String::new(),
            Some(metavar) => match args.next() {
                Some(value) => utf8(value)?,
                None => return Err(CliError::MissingValue { option: format!("-{name}"), metavar }),
            },
        };
        match option.action {
            options::Action::Help => return Ok(Invocation::Help(help::text())),
            options::Action::Version => return Ok(Invocation::Version(version())),
            options::Action::Apply(apply) => apply(&mut builder, option, &value)
                .map_err(|reason| CliError::Invalid { option: format!("-{name}"), reason })?,
        }
        if let Some(text) = builder.text {
            return Ok(Invocation::Help(text));
        }
    }
    let config =
        builder.resolve().map_err(|(option, reason)| CliError::Invalid { option: option.into(), reason })?;
    Ok(Invocation::Run(Box::new(config)))
}

fn utf8(argument: OsString) -> Result<String, CliError> {
    argument.into_string().map_err(|argument| CliError::NotUtf8(argument.to_string_lossy().into_owned()))
}

fn version() -> String {
    format!("{}\n", crate::monitor::PACKAGE)
}

#[cfg(test)]
mod tests;
