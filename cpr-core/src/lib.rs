//! The core of a VMM live update (QEMU calls it CPR, checkpoint and restart): what is the same for every way of
//! replacing a VMM under its running guest.
//!
//! - [`CprMode`] is such a way; [`Host`] is the program that is replaced; [`Update`] brings them together as a state
//!   machine that the host's own loop steps, and [`Incoming`] is its other half, in the target.
//! - [`FdRegistry`] names the descriptors that must survive, [`Notifier`] tells components of each phase,
//!   [`Blockers`] says why not now, and [`frame`] carries their state,
//!   in the versions that [`section`] says.
//! - [`control`] is the page that source and target share: the [`ownership`] word that makes sure the guest has one
//!   runner, the [`rendezvous`] of a target that is built while the guest runs, and the [`timeline`] that measures the
//!   true blackout.
//!
//! The crate has no KVM, no VM, no event loop, no thread and no async runtime of its own, and refuses to know any
//! mode by name. Words are those of `docs/architecture.md`; formats are in `docs/state-format.md`.

pub mod ownership;

// The model checker replaces the atomics, which only the ownership word is generic over.
#[cfg(not(loom))]
mod full {
    pub use crate::blocker::{BlockReason, Blocker, Blockers};
    pub use crate::control::Control;
    pub use crate::error::{BoxError, IncomingError, UpdateError};
    pub use crate::host::{Backing, GuestActivity, Host, MemoryRegion, StateWriter};
    pub use crate::incoming::{Arrival, Incoming};
    pub use crate::mode::{
        Course, CprMode, HandOver, Introduced, MainSource, ModeId, ModeInfo, ModeSet, Prepared, Properties,
        TerminalAction, Wait,
    };
    pub use crate::notify::{Event, Notice, Notifier, NotifyError, OrderClass, Subscription};
    pub use crate::registry::{FdEntry, FdKind, FdPolicy, FdRegistry, FindOrOpenError, RegistryError};
    pub use crate::rendezvous::{LiveMain, Rendezvous, TargetPhase, Watchdog};
    pub use crate::timeline::{Phase, Report, Stamp, Timeline};
    pub use crate::update::{Attempt, Outcome, Services, Step, Update};
}
#[cfg(not(loom))]
pub use full::*;

#[cfg(not(loom))]
pub mod blocker;
#[cfg(not(loom))]
pub mod control;
#[cfg(not(loom))]
pub mod error;
#[cfg(not(loom))]
pub mod fault;
#[cfg(not(loom))]
pub mod frame;
#[cfg(not(loom))]
pub mod host;
#[cfg(not(loom))]
pub mod incoming;
#[cfg(not(loom))]
pub mod mode;
#[cfg(not(loom))]
pub mod notify;
#[cfg(not(loom))]
pub mod preflight;
#[cfg(not(loom))]
pub mod registry;
#[cfg(not(loom))]
pub mod rendezvous;
#[cfg(not(loom))]
pub mod section;
#[cfg(not(loom))]
pub mod timeline;
#[cfg(not(loom))]
pub mod update;

/// Locks a table whose every critical section leaves it whole, so that a panic of another thread does no harm.
#[cfg(not(loom))]
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
