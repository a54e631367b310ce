//! The cpr-reboot mode: a guest rests in storage until another program goes on with it.
//!
//! The guest is stopped, its state is written to a file, and the program may end; later, perhaps under another kernel,
//! a program that its user starts reads the file and runs the guest. No process and no descriptor has to survive. Guest RAM
//! either stays in a file of its own, or is copied into the state file. The state file appears whole or not at all.
//!
//! - Source: hand a [`CprReboot`] to [`cpr_core::Update::begin`]. A program that stays can take the guest back
//!   ([`Stored::take_back`]).
//! - Target: [`StateFile::open`], then [`StateFile::arrive`] for [`cpr_core::Incoming::begin`]; copy the RAM out of it, load,
//!   commit, and say so ([`StateFile::mark_used`]).
//!
//! The crate refuses to know what the program is, and how it reaches its guest's memory. The file's layout is in
//! `docs/state-format.md`.

mod layout;
mod ram;
mod source;
mod target;

pub use layout::{FileError, MAX_CHUNK_LEN, USE_LEN};
pub use ram::{Kept, Memory, RamSource};
pub use source::{CprReboot, SourceError, Stored};
pub use target::{Region, StateFile, Whereabouts};

use cpr_core::{ModeId, ModeInfo, Properties};

/// The mode's name.
pub const MODE: ModeId = ModeId::from_static("cpr-reboot");

/// What the mode promises. `in_place`: shared guest RAM stays in its file, and is not copied.
pub fn properties(in_place: bool) -> Properties {
    if in_place { Properties::RAM_IN_STORAGE } else { Properties::empty() }
}

/// Name and properties together.
pub fn mode_info(in_place: bool) -> ModeInfo {
    ModeInfo { id: MODE, properties: properties(in_place) }
}
