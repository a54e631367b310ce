//! Unix socket paths: listening on one without taking it from somebody who still does, and connecting without waiting.
//!
//! [`bind`] replaces a socket that a dead process left behind, and nothing else: a path whose listener lives, that is no
//! socket, or about which it cannot tell, is refused by name. Whether a listener lives is asked by connecting (unix(7)),
//! which a live one sees as a client that left at once. Two processes that bind by this module in one directory at the
//! same time exclude each other by flock(2) on the directory, so that neither unlinks the other's fresh socket.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::sockopt::{self, AcceptConn, PeerCredentials};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, connect, getsockname, getsockopt, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};

/// How long another process may take to bind in the same directory.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// Why a path was not bound. It is as it was before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// Somebody listens there.
    #[error("socket {path:?} is in use by a live process")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// There is something else.
    #[error("{path:?} exists and is not a socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The path cannot be looked at, replaced or bound.
    #[error("cannot listen on {path:?}")]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Listens on `path`, created with the permissions `mode` (as chmod(2), regardless of the umask), close-on-exec and
/// blocking.
///
/// The socket is never open to more than `mode`, not for a moment.
///
/// # Errors
/// [`BindError`].
pub fn bind(path: impl AsRef<Path>, mode: u32) -> Result<UnixListener, BindError> {
    let path = path.as_ref();
    let io_error = |source: io::Error| BindError::Io { path: path.to_owned(), source };
    let address = UnixAddr::new(path).map_err(|error| io_error(error.into()))?;
    let _lock = lock_directory_of(path).map_err(io_error)?;

    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io_error(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(BindError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => match is_stale(&address) {
            Ok(true) => fs::remove_file(path).map_err(io_error)?,
            Ok(false) => return Err(BindError::InUse { path: path.to_owned() }),
            Err(error) => return Err(io_error(error)),
        },
    }
    match bind_free(path, &address, mode) {
        // Somebody who does not use this module was faster.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            Err(BindError::InUse { path: path.to_owned() })
        }
        other => other.map_err(io_error),
    }
}

fn bind_free(path: &Path, address: &UnixAddr, mode: u32) -> io::Result<UnixListener> {
    let socket = stream_socket(SockFlag::SOCK_CLOEXEC)?;
    // The kernel gives the path the permissions of the socket, less the umask: never too many.
    fchmod(&socket, Mode::from_bits_truncate(mode))?;
    nix::sys::socket::bind(socket.as_raw_fd(), address)?;
    let finish = || {
        fs::set_permissions(path, Permissions::from_mode(mode & 0o777))?;
        listen(&socket, Backlog::MAXCONN).map_err(io::Error::from)
    };
    if let Err(error) = finish() {
        let _ = fs::remove_file(path);
        return Err(error);
    }
    Ok(UnixListener::from(socket))
}

/// Whether the socket at `address` has no process behind it any more.
fn is_stale(address: &UnixAddr) -> io::Result<bool> {
    // Nonblocking, or a listener with a full backlog would hold us.
    let probe = stream_socket(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    match connect(probe.as_raw_fd(), address) {
        // A full backlog, or a socket of another type: there is somebody.
        Ok(()) | Err(Errno::EAGAIN | Errno::EPROTOTYPE) => Ok(false),
        Err(Errno::ECONNREFUSED) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

fn stream_socket(flags: SockFlag) -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::Stream, flags, None)?)
}

/// Connects to the listener at `path` without waiting for it to accept; blocking from then on, close-on-exec.
///
/// # Errors
/// `ConnectionRefused` if nobody listens there any more, `NotFound` if nobody ever did, `WouldBlock` if its queue of
/// connections is full.
pub fn connect_now(path: impl AsRef<Path>) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path.as_ref())?;
    let socket = stream_socket(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    connect(socket.as_raw_fd(), &address)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// The user id of the process that connected, or that listened: `SO_PEERCRED` of unix(7).
///
/// # Errors
/// It is no connected unix socket.
pub fn peer_uid(socket: impl AsFd) -> io::Result<u32> {
    Ok(getsockopt(&socket.as_fd(), PeerCredentials)?.uid())
}

/// Whether this is a unix stream socket that listens.
pub fn is_listening(socket: impl AsFd) -> bool {
    let socket = socket.as_fd();
    getsockopt(&socket, sockopt::SockType).is_ok_and(|kind| kind == SockType::Stream)
        && getsockopt(&socket, AcceptConn).unwrap_or(false)
        && getsockname::<UnixAddr>(socket.as_raw_fd()).is_ok()
}

fn lock_directory_of(path: &Path) -> io::Result<File> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let lock = File::open(directory)?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(fs::TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(fs::TryLockError::WouldBlock) => {
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, "its directory is locked"));
            }
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn a_free_path_is_bound_with_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        for mode in [0o600, 0o660, 0o777] {
            let path = dir.path().join(format!("{mode:o}"));
            let listener = bind(&path, mode).unwrap();
            assert!(is_listening(&listener) && !is_listening(fs::File::open("/dev/null").unwrap()));
            assert!(crate::cloexec::is_set(&listener).unwrap());
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, mode);
            let mut client = UnixStream::connect(&path).unwrap();
            assert!(!is_listening(&client));
            client.write_all(b"x").unwrap();
            listener.accept().unwrap();
        }
    }

    #[test]
    fn a_stale_path_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stale");
        drop(UnixListener::bind(&path).unwrap());
        let listener = bind(&path, 0o600).unwrap();
        UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
    }

    #[test]
    fn a_live_listener_keeps_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("live");
        let listener = bind(&path, 0o600).unwrap();
        let error = bind(&path, 0o600).unwrap_err();
        assert!(matches!(&error, BindError::InUse { .. }));
        assert!(error.to_string().contains("live"));
        UnixStream::connect(&path).unwrap();
        drop(listener);
        bind(&path, 0o600).unwrap();
    }

    #[test]
    fn connecting_never_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("connect");
        assert_eq!(connect_now(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        let socket = stream_socket(SockFlag::SOCK_CLOEXEC).unwrap();
        nix::sys::socket::bind(socket.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&socket, Backlog::new(0).unwrap()).unwrap();
        let waiting = connect_now(&path).unwrap();
        assert_eq!(peer_uid(&waiting).unwrap(), crate::process::effective_uid());
        assert_eq!(connect_now(&path).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(socket);
        assert_eq!(connect_now(&path).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn a_full_backlog_is_alive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("full");
        let socket = stream_socket(SockFlag::SOCK_CLOEXEC).unwrap();
        nix::sys::socket::bind(socket.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&socket, Backlog::new(0).unwrap()).unwrap();
        let _waiting = UnixStream::connect(&path).unwrap();
        assert!(matches!(bind(&path, 0o600).unwrap_err(), BindError::InUse { .. }));
    }

    #[test]
    fn a_datagram_socket_is_alive_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("datagram");
        let _socket = UnixDatagram::bind(&path).unwrap();
        assert!(matches!(bind(&path, 0o600).unwrap_err(), BindError::InUse { .. }));
    }

    #[test]
    fn what_is_no_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "precious").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [&file, &link, &dir.path().to_owned()] {
            assert!(matches!(bind(path, 0o600).unwrap_err(), BindError::NotASocket { .. }), "{path:?}");
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    }

    #[test]
    fn paths_that_cannot_be() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().join("none/socket"), dir.path().join("x".repeat(200))] {
            match bind(&path, 0o600).unwrap_err() {
                BindError::Io { path: named, .. } => assert_eq!(named, path),
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn of_many_that_race_for_a_stale_path_one_wins_and_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("race");
        drop(UnixListener::bind(&path).unwrap());
        let results: Vec<_> = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..8).map(|_| scope.spawn(|| bind(&path, 0o600))).collect();
            racers.into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        let winners: Vec<_> = results.iter().filter_map(|result| result.as_ref().ok()).collect();
        assert_eq!(winners.len(), 1, "{results:?}");
        winners[0].set_nonblocking(true).unwrap();
        while winners[0].accept().is_ok() {}
        UnixStream::connect(&path).unwrap();
        winners[0].accept().unwrap();
        assert!(
            results
                .iter()
                .filter_map(|result| result.as_ref().err())
                .all(|e| matches!(e, BindError::InUse { .. }))
        );
    }
}
