#![allow(unsafe_code, reason = "mmap, mprotect and munmap")]
//! The keeper's stack: anonymous memory with a page below it that faults, so that an overflow hits nothing of the parent's.

use std::ffi::c_void;
use std::io;
use std::ptr::NonNull;

use nix::errno::Errno;

const GUARD_BYTES: usize = 4096;
/// Far more than the keeper's few frames need, unoptimised builds included.
const STACK_BYTES: usize = 64 << 10;
const MAPPED_BYTES: usize = GUARD_BYTES + STACK_BYTES;

/// Unmapped on drop.
#[derive(Debug)]
pub(super) struct Stack(NonNull<c_void>);

// SAFETY: memory of the process, not of a thread.
unsafe impl Send for Stack {}
// SAFETY: as above; `&Stack` only tells an address.
unsafe impl Sync for Stack {}

impl Stack {
    pub(super) fn new() -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK;
        // SAFETY: without MAP_FIXED the kernel picks unused addresses.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), MAPPED_BYTES, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let stack = Stack(NonNull::new(start).ok_or(io::ErrorKind::Other)?);
        // SAFETY: the first page of the mapping made above, which nobody uses yet.
        Errno::result(unsafe { libc::mprotect(start, GUARD_BYTES, libc::PROT_NONE) })?;
        Ok(stack)
    }

    /// One past the last byte, which is where a stack begins; aligned to a page.
    pub(super) fn top(&self) -> NonNull<c_void> {
        // SAFETY: one past the end of the mapping.
        unsafe { self.0.byte_add(MAPPED_BYTES) }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: made by mmap with this length; whoever ran on it has ended.
        unsafe { libc::munmap(self.0.as_ptr(), MAPPED_BYTES) };
    }
}
