//! QEMU's image locks: who uses a file says how, and what it does not put up with.
//!
//! A byte of the file stands for each permission, and another one for its refusal. Both are locked in shared mode, for
//! several may do the same; whoever comes looks whether somebody holds the opposite byte of one of his own. All of them are
//! beyond most headers and need not exist. The numbers are part of QEMU's interface (`RAW_LOCK_PERM_BASE`,
//! `RAW_LOCK_SHARED_BASE` and `BLK_PERM_*`).

use std::io;
use std::os::fd::BorrowedFd;

use oslib::locks;

/// First byte of what is done: `RAW_LOCK_PERM_BASE`.
const DONE: i64 = 100;
/// First byte of what is not put up with: `RAW_LOCK_SHARED_BASE`.
const REFUSED: i64 = 200;

/// `BLK_PERM_CONSISTENT_READ`: reads, and relies on what it reads.
const READ: i64 = 0;
/// `BLK_PERM_WRITE`.
const WRITE: i64 = 1;

/// Why an image cannot be locked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Somebody writes to it, whom this use does not put up with.
    #[error(
        "another process writes to it; end that one, or set share-rw=on in both if their guests can share a disk; \
         file.locking=off does not ask"
    )]
    Written,
    /// Somebody reads it, and wants nobody to write.
    #[error("another process uses it and allows no writer; end that one, or use the image with read-only=on")]
    Used,
    /// Somebody does not want it to be read: its content is being changed as a whole.
    #[error("another process is changing it as a whole; wait for that one to end")]
    Unreadable,
    /// The file system has no locks.
    #[error("its file system refuses locks; file.locking=off does without, and nobody is kept out then")]
    Unsupported(#[source] io::Error),
}

/// How an image is to be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Use {
    /// It is written to.
    pub(super) write: bool,
    /// Other writers are fine: QEMU's `share-rw`.
    pub(super) share_write: bool,
}

impl Use {
    /// Takes the locks. On an open file that has them already this changes nothing.
    ///
    /// Locks are never given back before the file is closed: a target that takes an open file over may yet be refused, and
    /// its source go on with what it had. For the same reason a use that cannot be takes none.
    pub(super) fn lock(self, fd: BorrowedFd<'_>) -> Result<(), LockError> {
        let take = |byte| match locks::share(fd, byte) {
            Ok(true) => Ok(()),
            Ok(false) => Err(LockError::Used),
            Err(error) => Err(LockError::Unsupported(error)),
        };
        self.check(fd)?;
        take(DONE + READ)?;
        if self.write {
            take(DONE + WRITE)?;
        }
        if !self.share_write {
            take(REFUSED + WRITE)?;
        }
        // Of two who come at the same time, at least one sees the other.
        self.check(fd)
    }

    /// Whether others bear this use, and are borne.
    fn check(self, fd: BorrowedFd<'_>) -> Result<(), LockError> {
        let held = |byte| locks::is_held_by_another(fd, byte).map_err(LockError::Unsupported);
        if !self.share_write && held(DONE + WRITE)? {
            return Err(LockError::Written);
        }
        if self.write && held(REFUSED + WRITE)? {
            return Err(LockError::Used);
        }
        if held(REFUSED + READ)? {
            return Err(LockError::Unreadable);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    const WRITER: Use = Use { write: true, share_write: false };
    const READER: Use = Use { write: false, share_write: false };
    const SHARER: Use = Use { write: true, share_write: true };

    #[test]
    fn who_can_use_an_image_beside_whom() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let try_both = |first: Use, second: Use| {
            let open = || File::options().read(true).write(true).open(named.path()).unwrap();
            let (one, other) = (open(), open());
            first.lock(one.as_fd()).unwrap();
            let result = second.lock(other.as_fd());
            // Once more, with the locks of one's own.
            if result.is_ok() {
                first.lock(one.as_fd()).unwrap();
            }
            result
        };
        assert!(matches!(try_both(WRITER, WRITER), Err(LockError::Written)));
        assert!(matches!(try_both(WRITER, READER), Err(LockError::Written)));
        assert!(matches!(try_both(READER, WRITER), Err(LockError::Used)));
        assert!(matches!(try_both(WRITER, SHARER), Err(LockError::Used)));
        assert!(matches!(try_both(SHARER, WRITER), Err(LockError::Written)));
        try_both(READER, READER).unwrap();
        try_both(SHARER, SHARER).unwrap();
    }

    #[test]
    fn a_use_that_is_refused_takes_nothing() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(named.path()).unwrap();
        let (one, other) = (open(), open());
        SHARER.lock(one.as_fd()).unwrap();
        SHARER.lock(other.as_fd()).unwrap();
        assert!(matches!(WRITER.lock(other.as_fd()), Err(LockError::Written)));
        // The first one sees no more than before.
        SHARER.lock(one.as_fd()).unwrap();
    }

    #[test]
    fn the_bytes_are_those_of_qemu() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let file = File::options().read(true).write(true).open(named.path()).unwrap();
        WRITER.lock(file.as_fd()).unwrap();
        let other = File::open(named.path()).unwrap();
        let held: Vec<i64> =
            (0..300).filter(|byte| locks::is_held_by_another(&other, *byte).unwrap()).collect();
        assert_eq!(held, [100, 101, 201]);
        // As `qemu-img` does while it converts into an image.
        drop(file);
        locks::share(&other, REFUSED + READ).unwrap();
        let reader = File::open(named.path()).unwrap();
        assert!(matches!(READER.lock(reader.as_fd()), Err(LockError::Unreadable)));
    }
}
