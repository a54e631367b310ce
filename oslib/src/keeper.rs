#![allow(unsafe_code, reason = "clone of a process that shares this one's memory")]
//! The keeper: a short-lived process that holds the old address space and old descriptors past an exec.
//!
//! Tearing down the page tables of a guest's RAM takes an exec tens of milliseconds per GiB, and the last close of a KVM
//! VM milliseconds more, all of it before the first instruction of the new program. A process made by
//! `clone(CLONE_VM)` keeps the address space in use and, with descriptors of its own, the open files, so that the exec
//! finds nothing to tear down; the keeper does it afterwards, off the path. See clone(2) and execve(2).
//!
//! ```text
//!   source              keeper                         target (the source's pid, after exec)
//!   spawn ────────────► waits, all signals blocked
//!     │                  │        word committed  ◄──── commits, then rings
//!     ├─ exec ok         ├──────► closes all but `keep_fds`, steps down, exit code 0  ────► PidFd::reap
//!     │                  └──────► source or target ended without commit: the same, exit code 1
//!     └─ exec failed: cancel ───► killed, reaped, its memory freed
//! ```
//!
//! While it waits it holds a copy of *every* descriptor that was open at [`Keeper::spawn`]: peers of a connection see its
//! end no earlier than the commit, and close-on-exec does not concern it. It runs on a stack of its own and makes raw
//! system calls only, because it shares the thread-local storage (and so `errno`) of the thread that spawned it.

mod child;
mod raw;
mod stack;

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use nix::errno::Errno;

use crate::pidfd::PidFd;
use crate::shared::SharedWord;
use crate::{process, signals};

use self::child::Orders;
use self::stack::Stack;

/// What a keeper is told before it starts; it cannot be told more later.
#[derive(Clone, Debug)]
pub struct KeeperPlan<'a> {
    /// The doorbell: an eventfd, nonblocking, used for nothing else. Ring it after committing; the keeper drains it.
    ///
    /// A ring without a commit is ignored. A commit without a ring is noticed within a second.
    pub commit: BorrowedFd<'a>,
    /// The word that decides. Its mapping stays until the keeper has ended.
    pub word: SharedWord,
    /// The value of `word` that means "committed".
    ///
    /// Only the target may store it: from there on the keeper raises its `oom_score_adj`, and Linux gives that to every
    /// process of the same address space, to which the source belongs until it executes the target.
    pub committed: u64,
    /// Descriptors that stay open until the keeper has torn down its address space: those of KVM, whose last close is
    /// slow. All others are closed first.
    pub keep_fds: Vec<RawFd>,
}

/// A keeper that waits for the commit.
///
/// A successful exec leaves this value behind, with the keeper's memory, in the address space that the keeper holds; the
/// target finds the keeper by [`Keeper::pid`], opens it ([`PidFd::open`]) and reaps it ([`PidFd::reap`]). A failed exec
/// returns to the source, which calls [`Keeper::cancel`]. Dropping it cancels, too, with errors ignored.
#[derive(Debug)]
pub struct Keeper {
    pid: u32,
    pidfd: PidFd,
    memory: Option<Memory>,
}

/// What the keeper runs on and reads. Freed only when it has certainly ended.
#[derive(Debug)]
struct Memory {
    _stack: Stack,
    orders: NonNull<Orders>,
    _word: SharedWord,
}

// SAFETY: `orders` is a box that `Memory` owns, read by the keeper and by nobody in this process; nothing in it belongs to
// a thread.
unsafe impl Send for Memory {}
// SAFETY: as above; a shared `Memory` gives no access at all.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: made by Box::into_raw in `spawn`, freed here only.
        drop(unsafe { Box::from_raw(self.orders.as_ptr()) });
    }
}

impl Keeper {
    /// Starts a keeper of this process as it is now: its address space, its open descriptors.
    ///
    /// Spawn it last of all, when everything that the target needs is prepared and nothing but the exec is to come, which
    /// the main thread must do: to watchers on older kernels an exec by another thread can look like the end of the
    /// process. The keeper is a child of this process with SIGCHLD as exit signal, named `cpr-keeper`.
    ///
    /// # Errors
    /// `InvalidInput` if the doorbell is a blocking one or a number of `keep_fds` is negative; those of clone(2), mmap(2) and
    /// pidfd_open(2) otherwise. Then there is no keeper and nothing has changed.
    pub fn spawn(plan: KeeperPlan<'_>) -> io::Result<Keeper> {
        if !process::is_nonblocking(plan.commit)? {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the keeper's doorbell must not block"));
        }
        let close = complement(plan.keep_fds)?;
        let stack = Stack::new()?;
        // Before the clone, so that an end of this process at any later moment is seen. The keeper inherits the
        // descriptor under the same number; this process closes its own on return.
        let parent = PidFd::of_self()?;
        let orders = Box::new(Orders {
            parent: parent.as_raw_fd(),
            doorbell: plan.commit.as_raw_fd(),
            word: &raw const *plan.word,
            committed: plan.committed,
            close,
        });
        let orders = NonNull::from(Box::leak(orders));
        let memory = Memory { _stack: stack, orders, _word: plan.word };

        // A handler of this process must never run in the keeper, on its small stack and with borrowed thread-locals. The
        // keeper inherits the mask, and keeps it.
        let mask = signals::block_all()?;
        // SAFETY: `memory` holds the stack and the orders that the child uses, and is freed only after its end. The child
        // runs `child::main` alone, which by its contract touches no thread-local and no lock of this process.
        let spawned = unsafe { clone_onto(&memory) };
        let restored = signals::set_mask(mask);
        let (pid, pidfd) = spawned?;
        // Whole before the next `?`, so that the memory cannot go while the keeper runs.
        let keeper = Keeper { pid, pidfd, memory: Some(memory) };
        restored?;
        Ok(keeper)
    }

    /// Its process id, which the target needs to find it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its pidfd, which is close-on-exec.
    pub fn pidfd(&self) -> &PidFd {
        &self.pidfd
    }

    /// Ends the keeper after an exec that failed: kills it, reaps it, frees its stack. Also where it has ended already.
    ///
    /// # Errors
    /// Those of pidfd_send_signal(2) and waitid(2); its memory is left allocated then, because it may still run on it.
    pub fn cancel(mut self) -> io::Result<()> {
        self.end()
    }

    fn end(&mut self) -> io::Result<()> {
        let Some(memory) = self.memory.take() else { return Ok(()) };
        // Whatever goes wrong from here on, memory that a process may be running on stays.
        let memory = std::mem::ManuallyDrop::new(memory);
        match self.pidfd.send_signal(libc::SIGKILL) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
            _ => {}
        }
        match self.pidfd.reap() {
            Ok(_) => {}
            // Somebody else reaped it, or the kernel did because SIGCHLD is ignored: that is an end, too.
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) && self.pidfd.is_exited()? => {}
            Err(error) => return Err(error),
        }
        drop(std::mem::ManuallyDrop::into_inner(memory));
        Ok(())
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // Nobody is left to tell; the memory is safe either way.
        let _ = self.end();
    }
}

/// Clones this process without its descriptor table and its thread group, onto the stack in `memory`.
///
/// # Safety
/// `memory` outlives the child.
unsafe fn clone_onto(memory: &Memory) -> io::Result<(u32, PidFd)> {
    // No CLONE_FILES: the exec would take the table away from the keeper, or find it shared and copy it. No
    // CLONE_THREAD: the exec kills the threads of its group. CLONE_PIDFD: the number alone could be reused.
    let flags = libc::CLONE_VM | libc::CLONE_PIDFD | libc::SIGCHLD;
    let mut pidfd: libc::c_int = -1;
    // SAFETY: the stack is mapped and grows down from its top; `orders` is what `child::main` expects; with CLONE_PIDFD the
    // fifth argument is where the kernel stores an int. The caller keeps both alive.
    let pid = Errno::result(unsafe {
        libc::clone(
            child::main,
            memory._stack.top().as_ptr(),
            flags,
            memory.orders.as_ptr().cast(),
            &raw mut pidfd,
        )
    })?;
    // SAFETY: the kernel has just made this descriptor for us, close-on-exec, in this process only.
    Ok((pid.cast_unsigned(), PidFd::from(unsafe { OwnedFd::from_raw_fd(pidfd) })))
}

/// The ranges of descriptor numbers without `keep`.
fn complement(mut keep: Vec<RawFd>) -> io::Result<Vec<RangeInclusive<u32>>> {
    keep.sort_unstable();
    keep.dedup();
    let mut ranges = Vec::with_capacity(keep.len() + 1);
    let mut from = 0;
    for number in keep {
        let number = u32::try_from(number).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("descriptor {number} is negative"))
        })?;
        if from < number {
            ranges.push(from..=number - 1);
        }
        from = number + 1;
    }
    ranges.push(from..=u32::MAX);
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    use crate::eventfd::EventFd;
    use crate::shared::SharedWords;

    // The rest needs an exec: see tests/keeper.rs.

    #[test]
    fn everything_but_what_is_kept_is_closed() {
        assert_eq!(complement(vec![]).unwrap(), [0..=u32::MAX]);
        assert_eq!(complement(vec![0]).unwrap(), [1..=u32::MAX]);
        assert_eq!(complement(vec![9, 3, 4, 9]).unwrap(), [0..=2, 5..=8, 10..=u32::MAX]);
        assert_eq!(complement(vec![i32::MAX]).unwrap(), [0..=0x7fff_fffe, 0x8000_0000..=u32::MAX]);
        assert!(complement(vec![3, -1]).is_err());
    }

    #[test]
    fn a_plan_that_could_hang_is_refused() {
        let words = SharedWords::create("plan", 1).unwrap();
        let blocking = EventFd::blocking().unwrap();
        let ready = EventFd::new().unwrap();
        let plan =
            |commit, keep_fds| KeeperPlan { commit, word: words.word(0).unwrap(), committed: 1, keep_fds };
        let refusal = Keeper::spawn(plan(blocking.as_fd(), vec![])).unwrap_err();
        assert_eq!(refusal.kind(), io::ErrorKind::InvalidInput);
        let refusal = Keeper::spawn(plan(ready.as_fd(), vec![-1])).unwrap_err();
        assert_eq!(refusal.kind(), io::ErrorKind::InvalidInput);
    }
}
