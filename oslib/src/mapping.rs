#![allow(unsafe_code, reason = "reads and writes a mapping that somebody else changes meanwhile")]
//! A look at memory that somebody else is using: a guest's RAM, through the descriptor that backs it.
//!
//! [`SharedMapping`] is for harnesses and tools. It hands out no references, only checked reads and writes, each a
//! volatile access or a relaxed atomic. It accepts files that may shrink, unlike [`crate::shared`]: whoever truncates
//! the file while it is mapped here kills this process by SIGBUS (mmap(2)).

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::memfd;
use crate::mmap::Mapping;

/// The first bytes of a file, mapped shared.
#[derive(Debug)]
pub struct SharedMapping {
    mapping: Mapping,
    writable: bool,
}

impl SharedMapping {
    /// Maps the first `len` bytes of `fd` for reading and writing.
    ///
    /// # Errors
    /// `InvalidInput` if `len` is 0 or more than the file holds; those of mmap(2), such as `PermissionDenied` for a
    /// descriptor that is not open for writing or is sealed against it.
    pub fn map(fd: impl AsFd, len: u64) -> io::Result<Self> {
        Self::map_as(fd, len, true)
    }

    /// Maps the first `len` bytes of `fd` for reading.
    ///
    /// # Errors
    /// As [`SharedMapping::map`].
    pub fn map_read_only(fd: impl AsFd, len: u64) -> io::Result<Self> {
        Self::map_as(fd, len, false)
    }

    fn map_as(fd: impl AsFd, len: u64, writable: bool) -> io::Result<Self> {
        let fd = fd.as_fd();
        let held = memfd::len(fd)?;
        let bytes = usize::try_from(len)
            .ok()
            .and_then(NonZeroUsize::new)
            .filter(|_| len <= held)
            .ok_or_else(|| invalid(format!("cannot map {len} bytes of a file of {held}")))?;
        Ok(SharedMapping { mapping: Mapping::of(fd, bytes, writable)?, writable })
    }

    /// Its length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// Reads the 8 bytes at `offset`, a multiple of 8, in host byte order: one access, never torn.
    ///
    /// # Errors
    /// `InvalidInput` if they are not aligned or reach beyond the mapping.
    pub fn read_u64(&self, offset: u64) -> io::Result<u64> {
        Ok(self.word(offset)?.load(Ordering::Relaxed))
    }

    /// Writes the 8 bytes at `offset`, a multiple of 8, in host byte order: one access, never torn.
    ///
    /// # Errors
    /// `InvalidInput` if they are not aligned or reach beyond the mapping; `PermissionDenied` if it is mapped for reading.
    pub fn write_u64(&self, offset: u64, value: u64) -> io::Result<()> {
        if !self.writable {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "mapped for reading only"));
        }
        self.word(offset)?.store(value, Ordering::Relaxed);
        Ok(())
    }

    /// Copies the bytes from `offset` on into `buffer`. What changes meanwhile is copied as it was or as it is.
    ///
    /// # Errors
    /// `InvalidInput` if they reach beyond the mapping; `buffer` is untouched then.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = self.at(offset, buffer.len())?;
        for (index, byte) in buffer.iter_mut().enumerate() {
            // SAFETY: `at` checked that `buffer.len()` bytes from `start` on lie in the mapping, which `self` owns. Volatile,
            // because whoever owns the memory writes it at any time.
            *byte = unsafe { start.add(index).read_volatile() };
        }
        Ok(())
    }

    /// The address of `offset`, of which `len` bytes are in the mapping.
    fn at(&self, offset: u64, len: usize) -> io::Result<NonNull<u8>> {
        let index = usize::try_from(offset)
            .ok()
            .filter(|index| index.checked_add(len).is_some_and(|end| end <= self.mapping.len()))
            .ok_or_else(|| invalid(format!("{len} bytes at {offset:#x} are not in the mapping")))?;
        // SAFETY: `index` is within the mapping, or at its end with `len` 0.
        Ok(unsafe { self.mapping.start().add(index) })
    }

    fn word(&self, offset: u64) -> io::Result<&AtomicU64> {
        if !offset.is_multiple_of(8) {
            return Err(invalid(format!("{offset:#x} is not aligned to 8 bytes")));
        }
        let start = self.at(offset, 8)?;
        // SAFETY: `at` checked the bounds; a page-aligned start plus a multiple of 8 is aligned. The bytes stay mapped while
        // `self` lives, and this process touches them by atomics and volatile reads only. A store is reached by
        // `write_u64` alone, which requires a writable mapping.
        Ok(unsafe { start.cast::<AtomicU64>().as_ref() })
    }
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use crate::memfd::Memfd;

    #[test]
    fn reads_and_writes_what_the_file_holds() {
        let file = File::from(Memfd::new("look").len(8192).create().unwrap());
        let mapping = SharedMapping::map(&file, 8192).unwrap();
        assert_eq!(mapping.len_bytes(), 8192);
        file.write_all_at(&42u64.to_ne_bytes(), 8184).unwrap();
        assert_eq!(mapping.read_u64(8184).unwrap(), 42);
        mapping.write_u64(16, 0x1122_3344_5566_7788).unwrap();
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 16).unwrap();
        assert_eq!(u64::from_ne_bytes(bytes), 0x1122_3344_5566_7788);
        mapping.read(17, &mut bytes[..3]).unwrap();
        assert_eq!(bytes[..3], [0x77, 0x66, 0x55]);
    }

    #[test]
    fn stays_within_its_bounds() {
        let fd = Memfd::new("bounds").len(8192).create().unwrap();
        let mapping = SharedMapping::map(&fd, 4096).unwrap();
        for offset in [4096, 4089, 3, u64::MAX, u64::MAX - 7] {
            assert_eq!(
                mapping.read_u64(offset).unwrap_err().kind(),
                io::ErrorKind::InvalidInput,
                "{offset:#x}"
            );
            assert_eq!(mapping.write_u64(offset, 1).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        mapping.read(4096, &mut []).unwrap();
        assert!(mapping.read(4096, &mut [0]).is_err());
        assert!(mapping.read(4000, &mut [0; 97]).is_err());
    }

    #[test]
    fn read_only_is_read_only() {
        let fd = Memfd::new("frozen").len(4096).create().unwrap();
        memfd::seal_write(&fd).unwrap();
        assert!(SharedMapping::map(&fd, 4096).is_err());
        let mapping = SharedMapping::map_read_only(&fd, 4096).unwrap();
        assert_eq!(mapping.read_u64(0).unwrap(), 0);
        assert_eq!(mapping.write_u64(0, 1).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn no_more_than_the_file_holds() {
        let fd = Memfd::new("short").len(4096).create().unwrap();
        for len in [0, 4097, u64::MAX] {
            assert_eq!(SharedMapping::map(&fd, len).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}
