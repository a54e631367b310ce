//! The close-on-exec flag: what decides whether a descriptor survives cpr-exec.
//!
//! The flag belongs to the descriptor number, not to the open file behind it: a duplicate has one of its own. See
//! fcntl(2), `F_GETFD` and `F_SETFD`. Clear it at the last moment before an exec and set it again if the exec fails,
//! or every child process that anybody spawns meanwhile inherits the descriptor, too.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::inherited;

/// Lets `fd` survive an exec.
///
/// The number counts from here on as one that this program image owns, and [`inherited::take`] refuses it.
///
/// # Errors
/// Those of fcntl(2).
pub fn clear(fd: impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd();
    inherited::note_own(fd.as_raw_fd());
    fcntl(fd, FcntlArg::F_SETFD(flags(fd)? - FdFlag::FD_CLOEXEC))?;
    Ok(())
}

/// Has the kernel close `fd` when an exec succeeds.
///
/// # Errors
/// Those of fcntl(2).
pub fn set(fd: impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd();
    fcntl(fd, FcntlArg::F_SETFD(flags(fd)? | FdFlag::FD_CLOEXEC))?;
    Ok(())
}

/// Whether the kernel closes `fd` when an exec succeeds.
///
/// # Errors
/// Those of fcntl(2).
pub fn is_set(fd: impl AsFd) -> io::Result<bool> {
    Ok(flags(fd)?.contains(FdFlag::FD_CLOEXEC))
}

fn flags(fd: impl AsFd) -> io::Result<FdFlag> {
    // Retained, not truncated: a flag of a later kernel is to be written back as it was.
    Ok(FdFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFD)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flag_is_cleared_and_set_again() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(is_set(&file).unwrap());
        clear(&file).unwrap();
        assert!(!is_set(&file).unwrap());
        clear(&file).unwrap();
        assert!(!is_set(&file).unwrap());
        set(&file).unwrap();
        assert!(is_set(&file).unwrap());
    }

    #[test]
    fn a_duplicate_has_a_flag_of_its_own() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let duplicate = file.try_clone().unwrap();
        clear(&file).unwrap();
        assert!(is_set(&duplicate).unwrap());
    }
}
