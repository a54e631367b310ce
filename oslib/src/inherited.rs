#![allow(unsafe_code, reason = "a number becomes an owned descriptor here, and nowhere else")]
//! Descriptors that the previous program image left open: from a number back to an owner.
//!
//! [`take`] turns each number into an [`OwnedFd`] once. What makes this sound is a rule of this workspace: a descriptor
//! that a program image opens itself is close-on-exec from birth, as all of the standard library's are, so one that is
//! *not* can only have come through an exec. It refuses everything that the rule excludes: numbers whose flag is set,
//! numbers taken before, numbers whose flag this image cleared by [`cloexec::clear`](crate::cloexec::clear), and the
//! standard streams, which belong to the standard library.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

/// Numbers that have had an owner in this program image, and therefore are nobody's inheritance any more.
static OWNED: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Records that this image owns `number`, so that it cannot be mistaken for an inherited one.
pub(crate) fn note_own(number: RawFd) {
    OWNED.lock().unwrap_or_else(PoisonError::into_inner).insert(number);
}

/// Takes over the descriptor `number` that survived the exec of this program image, and makes it close-on-exec.
///
/// Call it early: before code that this workspace does not control (a C library, say) may have opened descriptors
/// without close-on-exec, for those look inherited. A refused number is left as it was.
///
/// # Errors
/// `InvalidInput` for a negative number or a standard stream; EBADF if the number is not open; `PermissionDenied` if it is
/// open but not inherited, or has been taken before.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("descriptor {number} is negative")));
    }
    if number <= libc::STDERR_FILENO {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("descriptor {number} is a standard stream, which has no owner"),
        ));
    }
    // Held to the end, so that of two threads that ask for one number only one gets it.
    let mut owned = OWNED.lock().unwrap_or_else(PoisonError::into_inner);
    if owned.contains(&number) {
        return Err(not_inherited(number, "has an owner already"));
    }
    // SAFETY: F_GETFD takes no pointer and changes nothing, whatever the number stands for.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(not_inherited(number, "was opened by this program: it is close-on-exec"));
    }
    // SAFETY: the number is open, it is not close-on-exec, so no code of this image opened it, and `OWNED` shows that
    // it was neither taken before nor had its flag cleared by this image: nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    owned.insert(number);
    // SAFETY: F_SETFD takes no pointer, and `fd` is owned.
    if unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

fn not_inherited(number: RawFd, why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, format!("descriptor {number} {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, IntoRawFd};

    use crate::cloexec;

    /// A descriptor as an exec leaves it: open, not close-on-exec, without an owner.
    fn bequeath() -> RawFd {
        let number = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        // SAFETY: takes no pointer; the number was just given up by its owner.
        assert_eq!(unsafe { libc::fcntl(number, libc::F_SETFD, 0) }, 0);
        number
    }

    // One test, because numbers are reused and the record is one per process: tests in parallel would take the numbers
    // out of each other's hands.
    #[test]
    fn each_number_is_taken_once() {
        // High numbers that no other test reaches, so that no reuse interferes.
        let number = bequeath();
        // SAFETY: takes no pointer; the new number has no owner.
        let high = unsafe { libc::fcntl(number, libc::F_DUPFD, 900) };
        assert!(high >= 900);
        let fd = take(high).unwrap();
        assert_eq!(fd.as_raw_fd(), high);
        assert!(cloexec::is_set(&fd).unwrap());
        assert_eq!(take(high).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        // Not even when the number is free, or reused and its flag cleared again.
        drop(fd);
        assert_eq!(take(high).unwrap_err().kind(), io::ErrorKind::PermissionDenied);

        // SAFETY: takes no pointer; the new number has no owner but the next line.
        let cleared = unsafe { OwnedFd::from_raw_fd(libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 910)) };
        assert_eq!(take(cleared.as_raw_fd()).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        cloexec::clear(&cleared).unwrap();
        assert_eq!(take(cleared.as_raw_fd()).unwrap_err().kind(), io::ErrorKind::PermissionDenied);

        for refused in [-1, 0, 1, 2] {
            assert_eq!(take(refused).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{refused}");
        }
        assert_eq!(take(987).unwrap_err().raw_os_error(), Some(libc::EBADF));
        // SAFETY: this test opened the number and nobody took it.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
    }
}
