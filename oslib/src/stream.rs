#![allow(unsafe_code, reason = "accept4 gives a bare number, and standard error is one")]
//! Reading and writing streams from an event loop: sockets by calls that never block, and descriptors that other programs
//! share, and that must therefore stay blocking, by asking poll(2) first.
//!
//! Nothing here changes the file status flags of a descriptor. See send(2), accept(2), poll(2).

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, SockFlag, accept4, send};
use nix::sys::stat::{SFlag, fstat};

use crate::retry;
use crate::scm::{self, RecvError};

/// Sends some of `bytes` over a socket and says how many. Never blocks and never raises SIGPIPE.
///
/// # Errors
/// `WouldBlock` when the peer has no room; `BrokenPipe` when it is gone.
pub fn send_nonblocking(socket: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    retry::on_eintr(|| send(socket.as_fd().as_raw_fd(), bytes, flags))
}

/// Receives up to `max_bytes` from a unix socket, with the descriptors that came with them. Never blocks. Nothing at all
/// means that the peer closed the connection.
///
/// # Errors
/// `WouldBlock` when there is nothing now.
pub fn recv_with_fds(socket: impl AsFd, max_bytes: usize) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    match scm::recv_available(socket, max_bytes) {
        Ok(message) => Ok((message.payload, message.fds)),
        Err(RecvError::Io(error)) => Err(error),
        Err(other) => Err(io::Error::other(other)),
    }
}

/// Reads up to `max_bytes`; none means the end. Blocks if [`is_readable`] would say no.
///
/// # Errors
/// Those of read(2).
pub fn read(fd: impl AsFd, max_bytes: usize) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; max_bytes];
    let count = retry::on_eintr(|| nix::unistd::read(fd.as_fd(), &mut buffer))?;
    buffer.truncate(count);
    Ok(buffer)
}

/// Writes some of `bytes` and says how many. Blocks if [`is_writable`] would say no, or if there is less room than bytes.
///
/// # Errors
/// Those of write(2).
pub fn write(fd: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    retry::on_eintr(|| nix::unistd::write(fd.as_fd(), bytes))
}

/// Makes descriptor 2, standard error, the open file behind `fd`. It survives an exec, as it always does.
///
/// # Errors
/// Those of dup2(2).
pub fn replace_stderr(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: takes no pointer. The standard library never closes number 2 and relies on no particular file behind it.
    Errno::result(unsafe { libc::dup2(fd.as_fd().as_raw_fd(), libc::STDERR_FILENO) })?;
    Ok(())
}

/// Writes to standard error, at once and as far as it goes. Takes no lock, so it may be called in a signal handler.
pub fn write_stderr(bytes: &[u8]) {
    // SAFETY: the pointer and the length are of one slice, which the call only reads.
    unsafe { libc::write(libc::STDERR_FILENO, bytes.as_ptr().cast(), bytes.len()) };
}

/// Whether a read would give something, or the end, at once.
///
/// # Errors
/// Those of poll(2).
pub fn is_readable(fd: impl AsFd) -> io::Result<bool> {
    retry::wait_readable(fd.as_fd(), Some(Duration::ZERO))
}

/// Whether a small write would go through at once, or fail at once.
///
/// # Errors
/// Those of poll(2).
pub fn is_writable(fd: impl AsFd) -> io::Result<bool> {
    let ready =
        retry::on_eintr(|| poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)], PollTimeout::ZERO))?;
    Ok(ready != 0)
}

/// Waits until there is something to read, or to accept.
///
/// # Errors
/// Those of poll(2).
pub fn wait_readable(fd: impl AsFd) -> io::Result<()> {
    retry::wait_readable(fd.as_fd(), None).map(drop)
}

/// The same for `limit` at most; says whether there is.
///
/// # Errors
/// Those of poll(2).
pub fn wait_readable_for(fd: impl AsFd, limit: Duration) -> io::Result<bool> {
    retry::wait_readable(fd.as_fd(), Some(limit))
}

/// Takes a connection from a nonblocking listener, close-on-exec from birth; `None` if nobody is there.
///
/// # Errors
/// Those of accept(2); a connection that ended before it was accepted counts as nobody.
pub fn accept_nonblocking(listener: impl AsFd) -> io::Result<Option<OwnedFd>> {
    match accept4(listener.as_fd().as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
        // SAFETY: the kernel has just made this descriptor; nobody else knows its number.
        Ok(number) => Ok(Some(unsafe { OwnedFd::from_raw_fd(number) })),
        Err(Errno::EAGAIN | Errno::ECONNABORTED | Errno::EINTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether this is a regular file: always ready, and unknown to epoll(7).
pub fn is_regular_file(fd: impl AsFd) -> bool {
    fstat(fd.as_fd()).is_ok_and(|stat| stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn a_full_socket_blocks_nobody() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let chunk = [7; 4096];
        let mut sent = 0;
        let error = loop {
            match send_nonblocking(&ours, &chunk) {
                Ok(count) => sent += count,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(!is_writable(&ours).unwrap());
        let mut all = vec![0; sent];
        theirs.read_exact(&mut all).unwrap();
        assert!(is_writable(&ours).unwrap());
        drop(theirs);
        assert_eq!(send_nonblocking(&ours, &chunk).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn nothing_an_answer_and_the_end_are_told_apart() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        assert!(!is_readable(&ours).unwrap());
        assert_eq!(recv_with_fds(&ours, 9).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        theirs.write_all(b"hello").unwrap();
        assert_eq!(recv_with_fds(&ours, 3).unwrap().0, b"hel");
        assert_eq!(read(&ours, 9).unwrap(), b"lo");
        drop(theirs);
        assert!(is_readable(&ours).unwrap());
        assert!(recv_with_fds(&ours, 9).unwrap().0.is_empty());
    }

    #[test]
    fn a_listener_without_a_client_gives_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        assert!(accept_nonblocking(&listener).unwrap().is_none());
        let client = UnixStream::connect(&path).unwrap();
        wait_readable(&listener).unwrap();
        let accepted = accept_nonblocking(&listener).unwrap().unwrap();
        assert!(crate::cloexec::is_set(&accepted).unwrap());
        send_nonblocking(&client, b"x").unwrap();
        assert_eq!(read(&accepted, 2).unwrap(), b"x");
        assert!(is_regular_file(tempfile::tempfile().unwrap()) && !is_regular_file(&client));
    }
}
