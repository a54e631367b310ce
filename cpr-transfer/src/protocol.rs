//! What the two processes say to each other over the `cpr` channel, each as one [message](oslib::scm) with a kind of four
//! bytes. `docs/state-format.md` has the layout.
//!
//! | kind | from | body | descriptors |
//! |---|---|---|---|
//! | `HELO` | both | version, u32 little-endian | the target's: its pidfd |
//! | `MANI` | source, perhaps | none | the frame with its manifest |
//! | `VERD` | target, in answer to that | none | the frame with its verdict |
//! | `INTR` | source | number of registry descriptors, u32 | [`Introduction`], then the registry's |
//! | `NOPE` | target | why not, UTF-8 | none |
//!
//! The kinds, and the layout of `HELO` and `NOPE`, are those of every version, so that programs of different versions can
//! tell their users so. Whatever comes is believed only within the limits here.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use cpr_core::fault::{self, Point};
use oslib::pidfd::PidFd;
use oslib::scm::{self, Limits, Message, RecvError};
use oslib::{process, uds};

/// The version of the protocol. Programs of different versions do not transfer.
pub const VERSION: u32 = 2;

const HELLO: &[u8; 4] = b"HELO";
const MANIFEST: &[u8; 4] = b"MANI";
const VERDICT: &[u8; 4] = b"VERD";
const INTRODUCTION: &[u8; 4] = b"INTR";
const REFUSAL: &[u8; 4] = b"NOPE";

/// Bytes of a reason; a longer one is cut.
const MAX_REASON: usize = 2048;
/// Descriptors of a registry.
pub(crate) const MAX_FDS: usize = 4096;
/// How long the rest of a message may take once its beginning is there, and how long it may take to send one.
const MESSAGE_TIME: Duration = Duration::from_secs(2);

/// Why there is no understanding with the peer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// It belongs to somebody else.
    #[error("the process at the other end belongs to user {0}, not to this one's or to root")]
    User(u32),
    /// It speaks something else, or broke off.
    #[error("{0}")]
    Receive(#[from] RecvError),
    /// It speaks something else within the framing.
    #[error("the peer speaks another protocol")]
    Foreign,
    /// It is another version.
    #[error("the peer speaks version {0} of the protocol, this program version {VERSION}")]
    Version(u32),
    /// A message has other descriptors than it should.
    #[error("the peer sent {found} descriptors in place of {expected}")]
    Descriptors {
        /// How many there should be.
        expected: usize,
        /// How many there were.
        found: usize,
    },
    /// It said no.
    #[error("the target refuses: {0}")]
    Refused(String),
    /// It says nothing.
    #[error("the peer said nothing for {0:?}")]
    Silent(Duration),
    /// What it was told to wait for did not come from it.
    #[error("the peer sent a message out of turn")]
    OutOfTurn,
    /// The socket failed.
    #[error("cannot talk to the peer: {0}")]
    Io(#[from] io::Error),
}

/// The descriptors of an introduction that belong to the mode, in the order in which they are sent.
pub(crate) struct Introduction<T> {
    /// The early frame.
    pub(crate) early: T,
    /// The control page.
    pub(crate) control: T,
    /// Where the main frame will be.
    pub(crate) main: T,
    /// The source's doorbell.
    pub(crate) doorbell: T,
    /// The source.
    pub(crate) process: T,
}

/// Descriptors of an [`Introduction`].
const OWN_FDS: usize = 5;

/// What came.
pub(crate) enum Heard {
    Hello(Vec<OwnedFd>),
    Manifest(OwnedFd),
    Verdict(OwnedFd),
    Introduction(Introduction<OwnedFd>, Vec<OwnedFd>),
}

/// One end of the channel. Nothing here waits for the peer longer than [`MESSAGE_TIME`] at a time.
#[derive(Debug)]
pub(crate) struct Link(UnixStream);

impl Link {
    /// Takes a connection, if the peer is one to talk to.
    pub(crate) fn new(stream: UnixStream) -> Result<Link, PeerError> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(MESSAGE_TIME))?;
        stream.set_write_timeout(Some(MESSAGE_TIME))?;
        Ok(Link(stream))
    }

    /// Whether the peer belongs to this process's user, or to root, who may do everything anyway.
    pub(crate) fn check_user(&self) -> Result<(), PeerError> {
        let peer = uds::peer_uid(&self.0)?;
        if peer == process::effective_uid() || peer == ROOT { Ok(()) } else { Err(PeerError::User(peer)) }
    }

    pub(crate) fn hello(&self, pidfd: Option<&PidFd>) -> io::Result<()> {
        let fds: Vec<BorrowedFd<'_>> = pidfd.iter().map(|pidfd| pidfd.as_fd()).collect();
        let point = if fds.is_empty() { Point::Hello } else { Point::Greet };
        let version = fault::pass(point, VERSION.to_le_bytes().into()).map_err(io::Error::other)?;
        self.send(HELLO, &version, &fds)
    }

    pub(crate) fn show(&self, manifest: &OwnedFd) -> io::Result<()> {
        self.send(MANIFEST, &[], &[manifest.as_fd()])
    }

    pub(crate) fn judge(&self, verdict: &OwnedFd) -> io::Result<()> {
        self.send(VERDICT, &[], &[verdict.as_fd()])
    }

    pub(crate) fn introduce(
        &self,
        own: &Introduction<BorrowedFd<'_>>,
        registry: &[OwnedFd],
    ) -> io::Result<()> {
        let mut fds = vec![own.early, own.control, own.main, own.doorbell, own.process];
        fds.extend(registry.iter().map(AsFd::as_fd));
        let count = u32::try_from(registry.len()).map_err(io::Error::other)?;
        let count = fault::pass(Point::Introduction, count.to_le_bytes().into()).map_err(io::Error::other)?;
        self.send(INTRODUCTION, &count, &fds)
    }

    pub(crate) fn refuse(&self, reason: &str) -> io::Result<()> {
        let mut end = reason.len().min(MAX_REASON);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        self.send(REFUSAL, &reason.as_bytes()[..end], &[])
    }

    fn send(&self, kind: &[u8; 4], body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        scm::send(&self.0, &[kind.as_slice(), body].concat(), fds)
    }

    /// Whether something came, or the peer is gone.
    pub(crate) fn is_readable(&self) -> io::Result<bool> {
        oslib::stream::is_readable(&self.0)
    }

    /// Reads what came. A refusal is an error.
    pub(crate) fn hear(&self) -> Result<Heard, PeerError> {
        let limits = Limits { max_payload: 4 + MAX_REASON, max_fds: OWN_FDS + MAX_FDS };
        let Message { payload, fds } = scm::recv(&self.0, limits)?;
        let (kind, body) = payload.split_first_chunk::<4>().ok_or(PeerError::Foreign)?;
        let number = || body.try_into().map(u32::from_le_bytes).map_err(|_| PeerError::Foreign);
        match kind {
            HELLO => match number()? {
                VERSION => Ok(Heard::Hello(fds)),
                other => Err(PeerError::Version(other)),
            },
            MANIFEST => only(fds).map(Heard::Manifest),
            VERDICT => only(fds).map(Heard::Verdict),
            INTRODUCTION => {
                let expected = usize::try_from(number()?).unwrap_or(usize::MAX).saturating_add(OWN_FDS);
                let mut fds = fds.into_iter();
                let found = fds.len();
                let wrong = || PeerError::Descriptors { expected, found };
                if found != expected {
                    return Err(wrong());
                }
                let mut next = || fds.next().ok_or_else(wrong);
                let own = Introduction {
                    early: memfd(next()?)?,
                    control: memfd(next()?)?,
                    main: memfd(next()?)?,
                    doorbell: next()?,
                    process: next()?,
                };
                Ok(Heard::Introduction(own, fds.collect()))
            }
            REFUSAL => Err(PeerError::Refused(String::from_utf8_lossy(body).into_owned())),
            _ => Err(PeerError::Foreign),
        }
    }

    pub(crate) fn close(&self) {
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The memfd that comes with a message.
fn only(fds: Vec<OwnedFd>) -> Result<OwnedFd, PeerError> {
    let found = fds.len();
    let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| PeerError::Descriptors { expected: 1, found })?;
    memfd(fd)
}

/// Reading from anything else could take for ever.
fn memfd(fd: OwnedFd) -> Result<OwnedFd, PeerError> {
    if oslib::memfd::is_memfd(&fd)? { Ok(fd) } else { Err(PeerError::Foreign) }
}

/// User id of root.
const ROOT: u32 = 0;

/// The descriptor of a process that the peer sent as its own.
pub(crate) fn process_of(fd: OwnedFd) -> Result<PidFd, PeerError> {
    let process = PidFd::from(fd);
    match process.send_signal(0) {
        // What is no pidfd at all would be waited for in vain.
        Err(error) if error.raw_os_error() == Some(EBADF) => Err(PeerError::Foreign),
        // It may be root's, or of a namespace that this process does not see into; its end shows all the same.
        _ => Ok(process),
    }
}

/// errno(3).
const EBADF: i32 = 9;
