//! After the commit: the keeper is told, ends, and is reaped, all off the guest's path.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use oslib::eventfd::EventFd;
use oslib::pidfd::PidFd;

/// The target's end of the keeper.
#[derive(Debug)]
pub struct KeeperEnd {
    pidfd: PidFd,
    doorbell: Arc<EventFd>,
}

impl KeeperEnd {
    pub(crate) fn new(pid: u32, doorbell: Arc<EventFd>) -> io::Result<KeeperEnd> {
        // The keeper is our child and nobody has reaped it, so its pid cannot have been given to another process.
        Ok(KeeperEnd { pidfd: PidFd::open(pid)?, doorbell })
    }

    /// Tells the keeper that the ownership word has flipped. It closes its descriptors at once, so that peers see
    /// what this process closes, and takes the old address space down at idle priority.
    ///
    /// # Errors
    /// The doorbell cannot be rung.
    pub fn release(&self) -> io::Result<()> {
        self.doorbell.signal()
    }

    /// Reaps the keeper. Call it when this becomes readable (see [`AsFd`]); before, it blocks.
    ///
    /// # Errors
    /// There is no such child.
    pub fn reap(&self) -> io::Result<()> {
        let status = self.pidfd.reap()?;
        tracing::debug!(?status, "keeper ended");
        Ok(())
    }
}

impl AsFd for KeeperEnd {
    /// Readable once the keeper has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}
