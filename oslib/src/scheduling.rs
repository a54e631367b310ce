#![allow(unsafe_code, reason = "the C library does not wrap sched_setattr")]
//! How soon a woken thread gets the CPU: the time slice of ordinary threads (sched_setattr(2)).
//!
//! Since Linux 6.12 `sched_runtime` of an ordinary thread is the length of its slice. A thread with a shorter slice than
//! the one that runs takes the CPU from it as soon as it is woken, without getting more of the CPU in the long run. Older
//! kernels take the call and ignore the slice.

use std::io;
use std::time::Duration;

use nix::errno::Errno;

use crate::signals::ThreadId;

/// The shortest slice that Linux accepts.
pub const SHORTEST_SLICE: Duration = Duration::from_micros(100);

/// `struct sched_attr` of `linux/sched/types.h`, first version: 48 bytes.
#[repr(C)]
#[derive(Debug, Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}

/// Sets the time slice of `thread`; `None` is the system's own. Threads of another policy than the two ordinary ones
/// (`SCHED_OTHER`, `SCHED_BATCH`) are left alone.
///
/// # Errors
/// ESRCH if there is no such thread; EPERM if it is another user's.
pub fn set_slice(thread: ThreadId, slice: Option<Duration>) -> io::Result<()> {
    let len = size_of::<SchedAttr>() as u32;
    let mut attributes = SchedAttr { size: len, ..SchedAttr::default() };
    // SAFETY: the kernel writes at most `len` bytes to the structure, which is that large and plain data.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_sched_getattr, thread.as_u32(), &raw mut attributes, len, 0)
    })?;
    if ![libc::SCHED_OTHER, libc::SCHED_BATCH].contains(&attributes.policy.cast_signed()) {
        return Ok(());
    }
    attributes.size = len;
    attributes.runtime_ns = slice.map_or(0, |slice| slice.as_nanos() as u64);
    // SAFETY: the kernel reads `size` bytes of the structure, which lives until the call returns.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_sched_setattr, thread.as_u32(), &raw const attributes, 0)
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_may_change_its_slice_and_change_it_back() {
        let me = ThreadId::current();
        set_slice(me, Some(SHORTEST_SLICE)).unwrap();
        set_slice(me, None).unwrap();
    }

    #[test]
    fn an_ended_thread_is_an_error() {
        let gone = std::thread::spawn(ThreadId::current).join().unwrap();
        // The kernel may take a moment to forget it.
        let refused = (0..100).find_map(|_| {
            std::thread::sleep(Duration::from_millis(1));
            set_slice(gone, None).err()
        });
        assert_eq!(refused.unwrap().raw_os_error(), Some(libc::ESRCH));
    }
}
