#![allow(unsafe_code, reason = "madvise")]
//! Filling the page tables of a mapping before its pages are used: `MADV_POPULATE_WRITE` of madvise(2), Linux 5.14.

use std::io;
use std::ops::Range;

use crate::retry;

/// Has every page of these addresses mapped for writing, whatever it takes: what is a hole in a file is allocated. The
/// contents stay as they are, also while others write to them.
///
/// # Errors
/// `OutOfMemory` (ENOMEM) if part of the addresses is not mapped, or memory is short; EINVAL for addresses that are no whole
/// pages or a mapping that is not writable; EFAULT where an access would be a SIGBUS. Part of the pages may be mapped then.
pub fn populate(addresses: Range<usize>) -> io::Result<()> {
    retry::on_eintr(|| {
        let start = std::ptr::without_provenance_mut::<libc::c_void>(addresses.start);
        // SAFETY: the kernel checks the range, and this advice changes no byte of any mapping in it: it does what a first
        // write of the old value would.
        nix::errno::Errno::result(unsafe { libc::madvise(start, addresses.len(), libc::MADV_POPULATE_WRITE) })
    })
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memfd::{self, Memfd};
    use crate::mmap::Mapping;
    use std::num::NonZeroUsize;
    use std::os::fd::AsFd;

    #[test]
    fn pages_are_there_afterwards_and_others_are_not() {
        let fd = Memfd::new("populate").len(8 * 4096).create().unwrap();
        let mapping = Mapping::of(fd.as_fd(), NonZeroUsize::new(8 * 4096).unwrap(), true).unwrap();
        let start = mapping.start().as_ptr().addr();
        populate(start + 4096..start + 3 * 4096).unwrap();
        let extents = memfd::extents(&fd).unwrap();
        let expected = 4096..3 * 4096;
        assert_eq!(extents, [expected]);
        assert!(populate(start + 1..start + 4096).is_err());
    }

    #[test]
    fn what_is_not_mapped_is_refused() {
        assert!(populate(4096..8192).is_err());
    }
}
