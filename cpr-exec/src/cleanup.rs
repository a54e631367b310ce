//! After the commit: the way back is closed, standard error is itself again, and the keeper is told, ends, and is reaped,
//! all off the guest's path.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use oslib::eventfd::EventFd;
use oslib::pidfd::PidFd;

use crate::fallback::{self, LastWords};

/// `ECHILD` of errno(3).
const ECHILD: i32 = 10;

/// The target's end of the keeper.
#[derive(Debug)]
pub struct KeeperEnd {
    pid: u32,
    pidfd: PidFd,
    doorbell: Arc<EventFd>,
    /// Until the commit.
    words: Mutex<Option<LastWords>>,
}

impl KeeperEnd {
    pub(crate) fn new(pid: u32, doorbell: Arc<EventFd>, words: Option<LastWords>) -> io::Result<KeeperEnd> {
        // The keeper is our child and nobody has reaped it, so its pid cannot have been given to another process.
        Ok(KeeperEnd { pid, pidfd: PidFd::open(pid)?, doorbell, words: Mutex::new(words) })
    }

    /// Tells the keeper that the ownership word has flipped. It closes its descriptors at once, so that peers see
    /// what this process closes, and takes the old address space down at low priority. There is no way back from here
    /// ([`fall_back`](crate::fall_back) does nothing), and standard error, which was kept until now, goes where it should.
    ///
    /// # Errors
    /// The doorbell cannot be rung.
    pub fn release(&self) -> io::Result<()> {
        let told = self.doorbell.signal();
        fallback::disarm();
        if let Some(words) = self.words.lock().unwrap_or_else(PoisonError::into_inner).take() {
            words.replay();
        }
        told
    }

    /// Asks for the end of a released keeper to come soon, because another update waits for it: at low priority it
    /// takes long beside a guest that keeps every CPU busy. Where that is not permitted it takes as long as it takes.
    pub fn hurry(&self) {
        // Our child that nobody has reaped: the number is still its.
        if let Err(error) = oslib::process::schedule_normally(self.pid) {
            tracing::debug!(%error, "the keeper stays at low priority");
        }
    }

    /// Reaps the keeper. Call it when this becomes readable (see [`AsFd`]); before, it blocks.
    ///
    /// # Errors
    /// There is no such child.
    pub fn reap(&self) -> io::Result<()> {
        match self.pidfd.reap() {
            Ok(status) => tracing::debug!(?status, "keeper ended"),
            // Whoever started the program ignores SIGCHLD, which an exec does not change: the kernel reaps for us.
            Err(error) if error.raw_os_error() == Some(ECHILD) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

impl Drop for KeeperEnd {
    /// Without a release it is the keeper who says what was kept of standard error; unless it is gone.
    fn drop(&mut self) {
        let words = self.words.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(words) = words
            && self.pidfd.is_exited().unwrap_or(false)
        {
            words.replay();
        }
    }
}

impl AsFd for KeeperEnd {
    /// Readable once the keeper has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}
