//! After the commit: the keeper is told, ends, and is reaped, all off the guest's path.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use oslib::eventfd::EventFd;
use oslib::pidfd::PidFd;

/// `ECHILD` of errno(3).
const ECHILD: i32 = 10;

/// The target's end of the keeper.
#[derive(Debug)]
pub struct KeeperEnd {
    pid: u32,
    pidfd: PidFd,
    doorbell: Arc<EventFd>,
}

impl KeeperEnd {
    pub(crate) fn new(pid: u32, doorbell: Arc<EventFd>) -> io::Result<KeeperEnd> {
        // The keeper is our child and nobody has reaped it, so its pid cannot have been given to another process.
        Ok(KeeperEnd { pid, pidfd: PidFd::open(pid)?, doorbell })
    }

    /// Tells the keeper that the ownership word has flipped. It closes its descriptors at once, so that peers see
    /// what this process closes, and takes the old address space down at low priority.
    ///
    /// # Errors
    /// The doorbell cannot be rung.
    pub fn release(&self) -> io::Result<()> {
        self.doorbell.signal()
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

impl AsFd for KeeperEnd {
    /// Readable once the keeper has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}
