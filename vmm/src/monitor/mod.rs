//! The monitors: QMP for programs, HMP for people, and the multiplexer that shares a terminal with the guest.
//!
//! Everything here is free of input and output of its own: bytes are fed in and taken out by the main loop, commands
//! are carried out by a [`Backend`]. Nothing here knows KVM, a mode, or a file descriptor's number. Every session can
//! be saved at any byte and restored in the next program, so that a connection outlives a live update. The words
//! (commands, keys, error classes) are QEMU's: `docs/interop/qmp-spec.rst`, `qapi/*.json`, `hmp-commands.hx`.
//!
//! ```text
//!  bytes ──► mux ──► hmp::Session ──┐
//!              └───► serial         ├──► Command ──► Backend
//!  bytes, descriptors ─► qmp::Session ┘
//! ```

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) mod args;
pub mod channel;
pub mod command;
pub mod editor;
pub(crate) mod framer;
pub mod hmp;
pub mod mux;
pub(crate) mod output;
pub mod qmp;
#[cfg(test)]
pub(crate) mod testing;

pub use channel::{Channel, Channels, SocketAddress, TypedChannel};
pub use command::Command;

/// The machine as the monitors see it.
pub trait Backend {
    /// Carries out one command.
    ///
    /// # Errors
    ///
    /// What the user is told; the session turns it into its own form.
    fn execute(&mut self, command: Command, origin: &mut Origin<'_>) -> Result<Reply, QmpError>;

    /// The names that the migration parameter `mode` can have, for completion.
    fn migration_modes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// Done; this is the value that QMP returns (`{}` where there is nothing to say).
    Value(Value),
    /// Under way: the session takes no further command until it is told the end
    /// ([`qmp::Session::resume`], [`hmp::Session::resume`]). Meant for [`Command::Migrate`] with `detach` off.
    Suspended,
}

impl Reply {
    /// The empty object, the reply of a command that returns nothing.
    #[must_use]
    pub fn empty() -> Self {
        Self::Value(Value::Object(serde_json::Map::new()))
    }
}

/// Who gave a command, and what came with it.
#[derive(Debug)]
pub struct Origin<'a> {
    /// Id of the monitor, as given to its session.
    pub monitor: &'a str,
    /// Descriptors that came over the monitor's socket and that no command has claimed yet, oldest first.
    pub received_fds: &'a mut VecDeque<OwnedFd>,
}

/// How many unclaimed descriptors a session keeps; the oldest beyond that are closed.
pub const MAX_RECEIVED_FDS: usize = 16;

/// Adds descriptors to a session's unclaimed ones, within [`MAX_RECEIVED_FDS`].
pub(crate) fn keep_fds(kept: &mut VecDeque<OwnedFd>, fds: Vec<OwnedFd>) {
    kept.extend(fds);
    let excess = kept.len().saturating_sub(MAX_RECEIVED_FDS);
    kept.drain(..excess);
}

/// The class of a QMP error, for clients that tell errors apart (`qapi/error.json`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ErrorClass {
    /// Everything without a class of its own.
    GenericError,
    /// No such command, or not now.
    CommandNotFound,
    /// A device is there but not active.
    DeviceNotActive,
    /// No such device.
    DeviceNotFound,
    /// KVM lacks a capability that the command needs.
    KVMMissingCap,
}

/// What a command answers when it fails.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QmpError {
    /// For programs.
    pub class: ErrorClass,
    /// For people.
    pub desc: String,
}

impl QmpError {
    /// An error of class [`ErrorClass::GenericError`].
    pub fn generic(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::GenericError, desc: desc.into() }
    }

    /// An error of class [`ErrorClass::CommandNotFound`].
    pub fn not_found(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::CommandNotFound, desc: desc.into() }
    }
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl std::error::Error for QmpError {}

/// Version of the program as monitors report it: major, minor, micro.
#[must_use]
pub fn version() -> (u64, u64, u64) {
    let mut parts = env!("CARGO_PKG_VERSION").split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    (next(), next(), next())
}

/// The program's name and version as monitors print them.
pub const PACKAGE: &str = concat!("cpr-vmm ", env!("CARGO_PKG_VERSION"));
