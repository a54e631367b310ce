#![allow(unsafe_code, reason = "mmap and munmap")]
//! One shared file mapping with an owner: what [`crate::shared`] and [`crate::mapping`] are both made of (mmap(2)).

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

/// A `MAP_SHARED` mapping of a file from its start; unmapped on drop.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: NonZeroUsize,
}

// SAFETY: the mapping belongs to the process, not to a thread; this type itself never reads or writes it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(crate) fn of(fd: BorrowedFd<'_>, len: NonZeroUsize, writable: bool) -> io::Result<Self> {
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: with a null hint and without MAP_FIXED the kernel picks unused addresses, so no memory of this process
        // is replaced.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), len.get(), protection, libc::MAP_SHARED, fd.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // The kernel maps nothing at address 0 without MAP_FIXED.
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::Other)?;
        Ok(Mapping { start, len })
    }

    /// The first byte; page-aligned, valid for [`Mapping::len`] bytes for as long as `self` lives.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len.get()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `self` owns these addresses and every reference into them borrows `self`. The call fails only for
        // arguments that were never mapped.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len.get()) };
    }
}
