//! Errors of an update as a whole. The parts (registry, frame, notifier) have their own, beside them.

use crate::blocker::BlockReason;
use crate::mode::ModeId;
use crate::notify::NotifyError;

/// An error of a part that this crate does not know: a mode, a host, a subscriber.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// Why an update did not happen. Unless a variant says otherwise the guest runs on as before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateError {
    /// Preflight found blockers; nothing was touched.
    #[error("{mode} is blocked: {}", reasons.iter().map(|r| r.0.as_str()).collect::<Vec<_>>().join("; "))]
    Blocked {
        /// The mode that was asked for.
        mode: ModeId,
        /// Every reason, in the order in which the blockers were added.
        reasons: Vec<BlockReason>,
    },
    /// The mode itself refuses: a parameter is missing or the new program cannot be run. Nothing was touched.
    #[error("{0}")]
    Refused(#[source] BoxError),
    /// The target was asked beforehand and refuses, or gave no answer. Nothing was touched.
    #[error("{mode} preflight: {reason}")]
    Preflight {
        /// The mode.
        mode: ModeId,
        /// What the target said, or what is known of its silence.
        reason: String,
    },
    /// A subscriber refused or failed.
    #[error(transparent)]
    Subscriber(#[from] NotifyError),
    /// The mode could not get ready, or the target not be built.
    #[error("{mode} could not prepare: {source}")]
    Prepare {
        /// The mode.
        mode: ModeId,
        /// Its own words.
        source: BoxError,
    },
    /// The control page or another kernel object of the attempt could not be made.
    #[error("cannot set up the update: {0}")]
    Setup(#[source] std::io::Error),
    /// The guest did not stop.
    #[error("the guest could not be stopped: {0}")]
    Stop(#[source] BoxError),
    /// A component could not write its state.
    #[error("the state could not be saved: {0}")]
    Save(#[source] BoxError),
    /// The state could not be given to the target.
    #[error("{mode} could not hand over: {source}")]
    HandOver {
        /// The mode.
        mode: ModeId,
        /// Its own words.
        source: BoxError,
    },
    /// The user cancelled.
    #[error("the update was cancelled")]
    Cancelled,
    /// The update had ended before, and was asked to go on or to end once more. Nothing was done.
    #[error("the update is over already")]
    Over,
}

/// Why a target cannot take over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IncomingError {
    /// A frame is damaged, foreign or from the future.
    #[error(transparent)]
    Frame(#[from] crate::frame::FrameError),
    /// The main frame was written by another update than the early one.
    #[error("the state belongs to another update (epoch {found:#x}, expected {expected:#x})")]
    OtherUpdate {
        /// Epoch in the main frame.
        found: u64,
        /// Epoch of the update that is coming in.
        expected: u64,
    },
    /// A subscriber refused or failed.
    #[error(transparent)]
    Subscriber(#[from] NotifyError),
    /// The main frame could not be read.
    #[error("the state could not be read: {0}")]
    Read(#[source] BoxError),
    /// A component refused its section.
    #[error("the state could not be loaded: {0}")]
    Load(#[source] BoxError),
    /// Sections that nobody took: the new program does not know a device that the guest has.
    #[error("no component of this program claims state section {}", .0.join(", "))]
    UnclaimedSections(Vec<String>),
    /// Descriptors that must survive, and that nobody took.
    #[error("no component of this program claims descriptor {}", .0.join(", "))]
    UnclaimedDescriptors(Vec<String>),
    /// The source (or its keeper) rolled the update back first: this process must not run the guest.
    #[error("the update was rolled back before this process could commit")]
    RolledBack,
    /// The guest could not be resumed after the commit. There is nobody left to fall back to.
    #[error("the guest could not be resumed: {0}")]
    Resume(#[source] BoxError),
}
