//! Locks of a file's bytes that belong to the open file description (`F_OFD_SETLK` of fcntl(2)).
//!
//! They are there for as long as any descriptor of that description is, in any process: across exec, and when a descriptor
//! is sent away. A description never conflicts with itself, so to take a lock once more changes nothing. Advisory: they
//! bind those who ask.

use std::io;
use std::os::fd::AsFd;

use nix::fcntl::{FcntlArg, fcntl};

/// Locks byte `offset`, together with others who lock it. False: somebody has it for himself.
///
/// # Errors
/// Those of fcntl(2); EBADF for a descriptor that cannot be read from.
pub fn share(fd: impl AsFd, offset: i64) -> io::Result<bool> {
    match fcntl(fd, FcntlArg::F_OFD_SETLK(&byte(offset, libc::F_RDLCK))) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether another open file description has locked byte `offset`, in whatever way.
///
/// # Errors
/// Those of fcntl(2).
pub fn is_held_by_another(fd: impl AsFd, offset: i64) -> io::Result<bool> {
    let mut lock = byte(offset, libc::F_WRLCK);
    fcntl(fd, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn byte(offset: i64, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: offset,
        l_len: 1,
        // Has to be 0 for these locks.
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_lock_belongs_to_the_open_file() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let (ours, theirs) = (File::open(named.path()).unwrap(), File::open(named.path()).unwrap());
        assert!(share(&ours, 100).unwrap() && share(&ours, 100).unwrap());
        assert!(!is_held_by_another(&ours, 100).unwrap());
        assert!(is_held_by_another(&theirs, 100).unwrap());
        assert!(!is_held_by_another(&theirs, 101).unwrap());
        // Also for a duplicate, which keeps it.
        let duplicate = ours.try_clone().unwrap();
        assert!(!is_held_by_another(&duplicate, 100).unwrap());
        drop(ours);
        assert!(is_held_by_another(&theirs, 100).unwrap());
        assert!(share(&theirs, 100).unwrap());
        assert!(is_held_by_another(&duplicate, 100).unwrap());
        drop(duplicate);
        assert!(!is_held_by_another(&theirs, 100).unwrap());
    }
}
