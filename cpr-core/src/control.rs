//! The control page of one attempt: ownership word, timeline, and a few numbers that source, keeper and target share.
//!
//! It is a sealed memfd of its own, made afresh for each attempt, so that nothing of an older attempt can be won or
//! read by mistake. The layout is fixed; `docs/state-format.md` has it as a table.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use oslib::shared::{SharedWord, SharedWords};

use crate::ownership::{Epoch, OwnershipWord};
use crate::rendezvous::Rendezvous;
use crate::timeline::{Stamp, Timeline};

/// "CPRCTRL" and the layout version.
const MAGIC: u64 = u64::from_be_bytes(*b"CPRCTRL\x01");
const MAGIC_AT: usize = 0;
const WORD_AT: usize = 1;
const BOOT_ID_AT: [usize; 2] = [2, 3];
const EPOCH_AT: usize = 4;
const KEEPER_AT: usize = 5;
const TARGET_AT: usize = 6;
const PROGRESS_AT: usize = 7;
const OFFER_AT: usize = 8;
const FALLBACK_AT: usize = 9;
const DEFERRED_AT: usize = 10;
const STAMPS_AT: usize = 16;
const WORDS: usize = 512;

/// The shared page of one attempt. Clones share it.
#[derive(Debug, Clone)]
pub struct Control {
    page: SharedWords,
    epoch: Epoch,
}

impl Control {
    /// Makes the page of a fresh attempt, owned by the source.
    ///
    /// # Errors
    /// The memfd cannot be made, or the kernel does not tell its boot id.
    pub fn create(epoch: Epoch) -> io::Result<Control> {
        let page = SharedWords::create("cpr-control", WORDS)?;
        let control = Control { page, epoch };
        let boot_id = oslib::clock::boot_id()?;
        for (at, half) in BOOT_ID_AT.into_iter().zip(boot_id_words(boot_id)) {
            control.cell(at).store(half, Ordering::Relaxed);
        }
        control.cell(EPOCH_AT).store(epoch, Ordering::Relaxed);
        OwnershipWord::start(control.cell(WORD_AT), epoch);
        control.cell(MAGIC_AT).store(MAGIC, Ordering::Release);
        Ok(control)
    }

    /// Maps the page that the source of update `epoch` made.
    ///
    /// # Errors
    /// It is no control page, or of another attempt.
    pub fn attach(fd: Arc<OwnedFd>, epoch: Epoch) -> io::Result<Control> {
        let page = SharedWords::map(fd).map_err(io::Error::other)?;
        let invalid = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        if page.words().len() < WORDS || page.words()[MAGIC_AT].load(Ordering::Acquire) != MAGIC {
            return Err(invalid("it is no CPR control page"));
        }
        if page.words()[EPOCH_AT].load(Ordering::Relaxed) != epoch {
            return Err(invalid("the control page is of another update"));
        }
        // Stamps of another boot would be of another clock.
        let boot_id = boot_id_words(oslib::clock::boot_id()?);
        if BOOT_ID_AT.map(|at| page.words()[at].load(Ordering::Relaxed)) != boot_id {
            return Err(invalid("the control page is of another boot of this host"));
        }
        Ok(Control { page, epoch })
    }

    /// The page's memfd, for the registry.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        self.page.fd()
    }

    /// The attempt.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Who may run the guest.
    pub fn ownership(&self) -> OwnershipWord<'_> {
        OwnershipWord::attach(self.cell(WORD_AT), self.epoch)
    }

    /// Where source and target meet while both are alive.
    pub fn rendezvous(&self) -> Rendezvous {
        Rendezvous {
            target: self.word(TARGET_AT),
            progress: self.word(PROGRESS_AT),
            offer: self.word(OFFER_AT),
            fallback: self.word(FALLBACK_AT),
            deferred: self.word(DEFERRED_AT),
        }
    }

    /// When what happened.
    pub fn timeline(&self) -> Timeline<'_> {
        Timeline::new(&self.page.words()[STAMPS_AT..STAMPS_AT + Stamp::PLACES])
    }

    /// The keeper's process id, once there is one. It is a child of the process that execs, and so of the target.
    pub fn keeper_pid(&self) -> Option<u32> {
        u32::try_from(self.cell(KEEPER_AT).load(Ordering::Acquire)).ok().filter(|&pid| pid > 0)
    }

    /// Notes the keeper's process id, or that there is none (again).
    pub fn set_keeper_pid(&self, pid: Option<u32>) {
        self.cell(KEEPER_AT).store(pid.map_or(0, u64::from), Ordering::Release);
    }

    fn word(&self, at: usize) -> SharedWord {
        self.page.word(at).expect("the page was checked to have all words")
    }

    fn cell(&self, at: usize) -> &AtomicU64 {
        &self.page.words()[at]
    }
}

fn boot_id_words(boot_id: [u8; 16]) -> [u64; 2] {
    let number = u128::from_le_bytes(boot_id);
    [number as u64, (number >> 64) as u64]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::Owner;

    #[test]
    fn source_and_target_see_one_page() {
        let source = Control::create(9).unwrap();
        let target = Control::attach(source.fd().clone(), 9).unwrap();
        source.timeline().stamp(Stamp::Saved);
        assert_eq!(target.timeline().at_ns(Stamp::Saved), source.timeline().at_ns(Stamp::Saved));
        assert_eq!(target.keeper_pid(), None);
        source.set_keeper_pid(Some(42));
        assert_eq!(target.keeper_pid(), Some(42));
        target.ownership().commit().unwrap();
        assert_eq!(source.ownership().owner(), Some(Owner::Target));
    }

    #[test]
    fn a_foreign_page_is_refused() {
        let other = Control::create(9).unwrap();
        let error = Control::attach(other.fd().clone(), 8).unwrap_err().to_string();
        assert_eq!(error, "the control page is of another update");
        other.cell(BOOT_ID_AT[1]).fetch_add(1, Ordering::Relaxed);
        let error = Control::attach(other.fd().clone(), 9).unwrap_err().to_string();
        assert_eq!(error, "the control page is of another boot of this host");
        let plain = SharedWords::create("plain", WORDS).unwrap();
        Control::attach(plain.fd().clone(), 9).unwrap_err();
    }
}
