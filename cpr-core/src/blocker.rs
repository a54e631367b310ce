//! Reasons why an update is not possible now, added and removed at run time.
//!
//! A blocker names the modes it forbids by a [`ModeSet`] and goes away with its guard, so a component that is
//! unplugged can not leave a block behind.

use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use crate::mode::{ModeInfo, ModeSet};

/// A sentence for the user: what is in the way, and what would help.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockReason(pub String);

impl fmt::Display for BlockReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Debug)]
struct Entry {
    modes: ModeSet,
    reason: BlockReason,
}

/// The blockers of one VMM. Clones share one list.
#[derive(Debug, Clone, Default)]
pub struct Blockers {
    entries: Arc<Mutex<Vec<Weak<Entry>>>>,
}

/// Keeps one reason alive; dropping it removes the reason.
#[must_use = "dropping the guard removes the blocker"]
#[derive(Debug)]
pub struct Blocker {
    _entry: Arc<Entry>,
}

impl Blockers {
    /// Forbids `modes` for as long as the returned guard lives. `reason` is shown to the user as it is.
    pub fn add(&self, modes: ModeSet, reason: impl fmt::Display) -> Blocker {
        let entry = Arc::new(Entry { modes, reason: BlockReason(reason.to_string()) });
        let mut entries = crate::lock(&self.entries);
        entries.retain(|e| e.strong_count() > 0);
        entries.push(Arc::downgrade(&entry));
        Blocker { _entry: entry }
    }

    /// Every reason that forbids `mode` now, in the order in which they were added.
    pub fn reasons(&self, mode: &ModeInfo) -> Vec<BlockReason> {
        crate::lock(&self.entries)
            .iter()
            .filter_map(Weak::upgrade)
            .filter(|e| e.modes.contains(mode))
            .map(|e| e.reason.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mode::{ModeId, Properties};

    #[test]
    fn reasons_come_and_go_with_their_guards() {
        let exec = ModeInfo { id: ModeId::from_static("cpr-exec"), properties: Properties::RAM_IN_PLACE };
        let reboot = ModeInfo { id: ModeId::from_static("cpr-reboot"), properties: Properties::empty() };
        let blockers = Blockers::default();
        assert_eq!(blockers.reasons(&exec), []);

        let first = blockers.add(ModeSet::having(Properties::RAM_IN_PLACE), "disk is locked");
        let second = blockers.clone().add(ModeSet::all(), "fan is on fire");
        let text = |mode| blockers.reasons(mode).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(text(&exec), ["disk is locked", "fan is on fire"]);
        assert_eq!(text(&reboot), ["fan is on fire"]);

        drop(first);
        assert_eq!(text(&exec), ["fan is on fire"]);
        drop(second);
        assert_eq!(text(&exec), [""; 0]);
    }
}
