//! Finds room for the initrd and loads it: as high as kernel and low RAM allow, where it is out of the way of a
//! kernel that unpacks and moves itself. It does not look inside the file; the kernel does.

use std::fs::File;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::error::{BootError, InitrdError};
use super::image::open_regular;

const PAGE: u64 = 4096;

/// An initrd that has a place but is not there yet.
pub(super) struct Initrd {
    path: PathBuf,
    file: File,
    place: Loaded,
}

/// Where an initrd is. Start and end are below 4 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Loaded {
    pub(super) start: GuestAddress,
    pub(super) size: u64,
}

impl Initrd {
    /// Opens the file and reserves whole pages for it at the end of `kernel_end..limit`.
    pub(super) fn place(path: &Path, kernel_end: u64, limit: u64) -> Result<Self, BootError> {
        let fail = |cause| BootError::Initrd { file: path.to_owned(), cause };
        let (file, size) = open_regular(path).map_err(|e| fail(e.into()))?;
        let start = place(size, kernel_end, limit).map_err(fail)?;
        Ok(Self { path: path.to_owned(), file, place: Loaded { start, size } })
    }

    pub(super) fn load(mut self, ram: &GuestMemoryMmap) -> Result<Loaded, BootError> {
        ram.read_exact_volatile_from(self.place.start, &mut self.file, self.place.size as usize)
            .map_err(|e| BootError::Initrd { file: self.path, cause: InitrdError::Read(e) })?;
        Ok(self.place)
    }
}

fn place(size: u64, kernel_end: u64, limit: u64) -> Result<GuestAddress, InitrdError> {
    let floor = kernel_end.next_multiple_of(PAGE);
    match limit.checked_sub(size).map(|start| start & !(PAGE - 1)) {
        Some(start) if start >= floor => Ok(GuestAddress(start)),
        _ => Err(InitrdError::TooLarge { size, room: limit.saturating_sub(floor) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_to_the_last_whole_pages_below_the_limit() {
        assert_eq!(place(1, 0x1000, 0x4000).unwrap(), GuestAddress(0x3000));
        assert_eq!(place(0x2001, 0x1000, 0x4000).unwrap(), GuestAddress(0x1000));
        assert_eq!(place(0x1000, 0x1000, 0x3fff).unwrap(), GuestAddress(0x2000));
    }

    #[test]
    fn never_touches_the_kernel() {
        for (size, kernel_end, limit) in [(0x3001, 0x1000, 0x4000), (0x2001, 0x1001, 0x4000), (9, 8, 4)] {
            assert!(matches!(place(size, kernel_end, limit), Err(InitrdError::TooLarge { .. })));
        }
    }
}
