//! The ownership word: which process may run the guest.
//!
//! Each attempt has a fresh word in shared memory, holding the attempt's epoch and one of three states. Its two
//! ends are terminal and reached by compare-and-swap only:
//!
//! ```text
//!              commit (target)         ┌────────────┐
//!            ┌────────────────────────►│   Target   │
//! ┌────────┐ │                         └────────────┘
//! │ Source ├─┤
//! └────────┘ │ roll_back (source,      ┌────────────┐
//!            └────────────────────────►│ RolledBack │
//!              keeper, fallback)       └────────────┘
//! ```
//!
//! So at most one side ever wins, and whoever loses learns it before it touches the guest. The model test in
//! `tests/loom_ownership.rs` explores every interleaving of source, target and keeper.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

/// Names one attempt, so that a word of an older attempt can never be won by mistake. 62 bits are used.
pub type Epoch = u64;

const STATE_BITS: u32 = 2;

/// Who may run the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// The update is under way: the guest belongs to the source, though it may be stopped.
    Source,
    /// Committed: only the target may run the guest.
    Target,
    /// The attempt failed: only the source, or a fallback start of its binary, may run the guest.
    RolledBack,
}

impl Owner {
    const fn bits(self) -> u64 {
        match self {
            Owner::Source => 1,
            Owner::Target => 2,
            Owner::RolledBack => 3,
        }
    }
}

/// Why the word could not be won.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// The other side won first.
    #[error("the guest already belongs to {0:?}")]
    To(Owner),
    /// The word is of another attempt, or was never started.
    #[error("the ownership word is not of this attempt")]
    OtherAttempt,
}

/// A view of the shared word.
#[derive(Debug, Clone, Copy)]
pub struct OwnershipWord<'a> {
    word: &'a AtomicU64,
    epoch: Epoch,
}

impl<'a> OwnershipWord<'a> {
    /// Starts an attempt: the guest belongs to the source. Called once, before anybody else sees the word.
    pub fn start(word: &'a AtomicU64, epoch: Epoch) -> Self {
        word.store(Self::value(epoch, Owner::Source), Ordering::Release);
        OwnershipWord { word, epoch }
    }

    /// Looks at a word that another process started.
    pub fn attach(word: &'a AtomicU64, epoch: Epoch) -> Self {
        OwnershipWord { word, epoch }
    }

    /// The raw value that `owner` has in attempt `epoch`.
    const fn value(epoch: Epoch, owner: Owner) -> u64 {
        epoch << STATE_BITS | owner.bits()
    }

    /// The current owner, or `None` when the word is of another attempt.
    pub fn owner(&self) -> Option<Owner> {
        let raw = self.word.load(Ordering::Acquire);
        [Owner::Source, Owner::Target, Owner::RolledBack]
            .into_iter()
            .find(|&owner| raw == Self::value(self.epoch, owner))
    }

    /// The target takes the guest. After `Ok` it, and nobody else, may run it.
    ///
    /// # Errors
    /// [`Lost`] when the attempt was rolled back first.
    pub fn commit(&self) -> Result<(), Lost> {
        self.win(Owner::Target)
    }

    /// The source, or who acts for it, takes the guest back. After `Ok` the target can no longer commit; end the
    /// target and wait for its end before the guest runs.
    ///
    /// # Errors
    /// [`Lost`] when the target committed first, or somebody else rolled back already.
    pub fn roll_back(&self) -> Result<(), Lost> {
        self.win(Owner::RolledBack)
    }

    fn win(&self, owner: Owner) -> Result<(), Lost> {
        let from = Self::value(self.epoch, Owner::Source);
        let to = Self::value(self.epoch, owner);
        match self.word.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(()),
            Err(_) => Err(self.owner().map_or(Lost::OtherAttempt, Lost::To)),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_winner_wins() {
        let cell = AtomicU64::new(0);
        let word = OwnershipWord::start(&cell, 7);
        assert_eq!(word.owner(), Some(Owner::Source));
        assert_eq!(word.commit(), Ok(()));
        assert_eq!(word.roll_back(), Err(Lost::To(Owner::Target)));
        assert_eq!(word.commit(), Err(Lost::To(Owner::Target)));
        assert_eq!(word.owner(), Some(Owner::Target));
    }

    #[test]
    fn a_word_of_another_attempt_cannot_be_won() {
        let cell = AtomicU64::new(0);
        OwnershipWord::start(&cell, 7);
        let stale = OwnershipWord::attach(&cell, 6);
        assert_eq!(stale.owner(), None);
        assert_eq!(stale.commit(), Err(Lost::OtherAttempt));
        assert_eq!(stale.roll_back(), Err(Lost::OtherAttempt));
        assert_eq!(OwnershipWord::attach(&cell, 7).owner(), Some(Owner::Source));
    }
}
