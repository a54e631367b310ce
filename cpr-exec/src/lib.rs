//! The cpr-exec mode: the running program executes its successor directly, and the guest stays where it is.
//!
//! Descriptors keep their numbers because close-on-exec is cleared on those in the registry at the last moment. Their
//! names and numbers, and what else the successor must know before it creates a device, travel in a sealed memfd
//! whose number stands in one environment variable: the second channel, hidden from the user. Device state goes
//! through the main channel, a file or another memfd. Same pid, same container, same connections.
//!
//! The running program does not end with its exec: it goes on in a keeper ([`oslib::keeper`]), runs the guest there until
//! the successor is built and asks for the state, and is there still if the successor fails. Without a keeper
//! ([`CprExec::keeper`]) the guest stands still meanwhile, and there is no way back.
//!
//! - Source: hand a [`CprExec`] to [`cpr_core::Update::begin`], and go on stepping the update after the terminal action
//!   came back with `Ok`.
//! - Target: call [`receive`] first thing in `main`, before anything is opened; and [`fall_back`] when it fails.
//! - Before that, if the source's host has a [manifest](cpr_core::Host::manifest): the program is started once more, to be asked
//!   whether it can take over. [`preflight_request`] finds out.
//!
//! The crate refuses to know what the program is: it is used by `cpr-vmm`, and `examples/echo.rs` keeps the TCP
//! connections of an echo server with it.

mod answer;
mod ask;
mod channel;
mod cleanup;
mod environment;
mod fallback;
mod source;
mod target;

pub use answer::{PreflightRequest, catalogue, preflight_request};
pub use channel::{ChannelError, MainChannel};
pub use cleanup::KeeperEnd;
pub use environment::{EnvironmentError, PREFLIGHT_VARIABLE, RESERVED_PREFIX, STATE_VARIABLE};
pub use fallback::fall_back;
pub use source::{CommandError, CprExec};
pub use target::{ExecArrival, MainReader, ReceiveError, receive};

use cpr_core::{ModeId, ModeInfo, Properties};

/// The mode's name.
pub const MODE: ModeId = ModeId::from_static("cpr-exec");

/// What the mode promises.
pub const PROPERTIES: Properties = Properties::SAME_PID
    .union(Properties::RAM_IN_PLACE)
    .union(Properties::DESCRIPTORS_SURVIVE)
    .union(Properties::SAME_KERNEL)
    .union(Properties::DEVICES_STAY_ATTACHED);

/// Name and properties together.
pub fn mode_info() -> ModeInfo {
    ModeInfo { id: MODE, properties: PROPERTIES }
}

/// What the fuzz bodies need of what is private.
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing {
    use std::os::fd::OwnedFd;

    use cpr_core::error::BoxError;
    use cpr_core::frame::{FrameError, Section};
    use oslib::signals::SignalMask;

    /// Reads the section `cpr-exec/process` as [`receive`](crate::receive) does.
    ///
    /// # Errors
    /// It is damaged.
    pub fn read_process(section: &Section) -> Result<(SignalMask, crate::MainChannel), FrameError> {
        let process: crate::ProcessSection = section.decode(1)?;
        Ok((SignalMask::from_bits(process.signal_mask), process.main.into()))
    }

    /// Reads the question of a preflight, in the memfds of manifest and verdict.
    ///
    /// # Errors
    /// The manifest's frame is no good one.
    pub fn read_question(memfds: [OwnedFd; 2]) -> Result<crate::PreflightRequest, BoxError> {
        crate::PreflightRequest::read(memfds.into())
    }
}

/// Registry names of the mode's own descriptors.
mod names {
    pub(crate) const CONTROL: &str = "cpr-exec/control";
    pub(crate) const DOORBELL: &str = "cpr-exec/doorbell";
    pub(crate) const MAIN: &str = "cpr-exec/main";
    pub(crate) const PROGRAM: &str = "cpr-exec/program";
    pub(crate) const DIRECTORY: &str = "cpr-exec/directory";
    pub(crate) const STDERR: &str = "cpr-exec/stderr";
    pub(crate) const LAST_WORDS: &str = "cpr-exec/last-words";
    /// All of them.
    pub(crate) const OWN: [&str; 7] = [CONTROL, DOORBELL, MAIN, PROGRAM, DIRECTORY, STDERR, LAST_WORDS];
    pub(crate) const PROCESS_SECTION: &str = "cpr-exec/process";
    /// In the frame of a manifest: where the main frame will be.
    pub(crate) const CHANNEL_SECTION: &str = "cpr-exec/main-channel";
    /// In the frame of a verdict: the process that gives it.
    pub(crate) const ANSWER_SECTION: &str = "cpr-exec/answer";
    /// Feature: the source runs the guest until the target asks for the state.
    pub(crate) const LIVE_SOURCE: &str = "cpr-exec/live-source";
}

/// Version 1 of the `cpr-exec/process` section: what of the process itself exec does not keep by itself.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct ProcessSection {
    /// Blocked signals before the update, bit n - 1 for signal n.
    signal_mask: u64,
    /// Where the main frame is, or will be.
    main: channel::ChannelWire,
    /// The source runs the guest until the target asks for the state.
    source_goes_on: bool,
    /// How the source's program takes the guest over if the target cannot.
    fallback: Option<FallbackWire>,
}

/// The wire form of a fallback start, version 1. Program and working directory are in the registry.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct FallbackWire {
    /// The program's name first.
    arguments: Vec<Vec<u8>>,
    /// Name and value; without reserved variables.
    environment: Vec<(Vec<u8>, Vec<u8>)>,
}
