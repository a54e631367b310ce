#![allow(unsafe_code, reason = "runs on borrowed memory of another process")]
//! What the keeper does, in its own process but in its parent's memory.
//!
//! Nothing in here may allocate, lock, panic, unwind or use a thread-local, `errno` included: all of that belongs to the
//! parent, which runs at the same time. It reads its orders, makes system calls of [`super::raw`] and ends.

use std::ffi::{c_int, c_void};
use std::ops::RangeInclusive;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use super::raw;

/// A commit whose ring got lost is noticed after this time.
const RECHECK_MS: u32 = 1000;
/// Between two attempts of a poll that the kernel refused.
const RETRY_MS: u32 = 10;

/// How nice the keeper is while it tears down: about a tenth of the CPU time of an ordinary process.
const NICE: u8 = 10;

/// What the keeper was told; nobody changes it while the keeper runs.
#[derive(Debug)]
pub(super) struct Orders {
    /// The pidfd of the process that holds the machine: source, then target.
    pub(super) parent: RawFd,
    /// The eventfd that is rung after a commit.
    pub(super) doorbell: RawFd,
    /// The ownership word, in a mapping that lasts.
    pub(super) word: *const AtomicU64,
    /// Its value after a commit.
    pub(super) committed: u64,
    /// The descriptor numbers to close before the address space goes.
    pub(super) close: Vec<RangeInclusive<u32>>,
}

/// How the wait ended.
enum Outcome {
    /// The target runs the guest.
    Committed,
    /// The target, or the source before its exec, ended without having committed.
    Orphaned,
}

/// The keeper from its first instruction to its last. `orders` points to [`Orders`] that outlive it.
pub(super) extern "C" fn main(orders: *mut c_void) -> c_int {
    // SAFETY: the parent passed a pointer to orders that nobody changes or frees before this process has ended.
    let orders = unsafe { &*orders.cast::<Orders>() };
    // The C library keeps two signals of its own out of the mask that the parent set.
    raw::block_signals(u64::MAX);
    raw::set_name(c"cpr-keeper");
    match wait(orders) {
        Outcome::Committed => step_aside(orders, 0),
        Outcome::Orphaned => step_aside(orders, 1),
    }
}

fn wait(orders: &Orders) -> Outcome {
    loop {
        let mut fds = [
            libc::pollfd { fd: orders.parent, events: libc::POLLIN, revents: 0 },
            libc::pollfd { fd: orders.doorbell, events: libc::POLLIN, revents: 0 },
        ];
        let ready = raw::poll(&mut fds, RECHECK_MS);
        let [parent, doorbell] = fds;
        // Drained before the word is read: a ring that comes between the two wakes the next poll.
        if doorbell.revents != 0 {
            raw::drain(orders.doorbell);
        }
        if is_committed(orders) {
            return Outcome::Committed;
        }
        if ready < 0 {
            raw::poll(&mut [], RETRY_MS);
        } else if parent.revents != 0 {
            // It can have committed after the look above, as the last thing it did.
            return if is_committed(orders) { Outcome::Committed } else { Outcome::Orphaned };
        }
    }
}

fn is_committed(orders: &Orders) -> bool {
    // SAFETY: the mapping of the word lasts until the keeper has ended.
    unsafe { &*orders.word }.load(Ordering::Acquire) == orders.committed
}

/// Ends in the way that disturbs the guest least.
fn step_aside(orders: &Orders, code: u8) -> ! {
    // First: the peers of the old program's connections wait for their end. At full speed, too.
    for range in &orders.close {
        raw::close_range(*range.start(), *range.end());
    }
    // The rest is tearing down page tables, which may take its time; and should memory get short meanwhile, this
    // process is the one to lose. Not SCHED_IDLE: beside guests that keep every CPU busy it would hardly run at all, and
    // it would do so holding what others wait for (the kernel's SRCU of MMU notifiers, which all VMs share).
    raw::lower_priority(NICE);
    raw::write_file(c"/proc/self/oom_score_adj", b"1000");
    raw::exit(code)
}
