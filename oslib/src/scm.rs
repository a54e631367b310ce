#![allow(unsafe_code, reason = "nix loses received descriptors when the kernel truncates control data")]
//! One message of bytes and any number of descriptors over a unix stream socket.
//!
//! A stream keeps no message boundaries, and one sendmsg(2) carries 253 descriptors at most (`SCM_MAX_FD`, unix(7)). So
//! [`send`] frames: a header that announces both counts, then the descriptors in batches, then the payload. [`recv`]
//! believes none of it: limits hold before memory is allocated, both counts must come out exactly, and whatever was
//! received by then is closed if they do not. After an error in the middle of a message the stream has lost its
//! framing: close it.
//!
//! The header is 16 bytes in host byte order (a unix socket does not leave the host): the magic `CPRS`, the number of
//! descriptors as u32, the length of the payload as u64. The first batch goes with the header, each further one with a
//! zero byte of its own, and none with the payload.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::retry;

/// `SCM_MAX_FD` of the kernel, see unix(7).
const BATCH_FDS: usize = 253;
const MAGIC: [u8; 4] = *b"CPRS";
const HEADER_BYTES: usize = 16;
/// Room for one full batch, and for what a socket option of the receiver may add (credentials, security label, pidfd).
const CONTROL_BYTES: usize = BATCH_FDS * size_of::<RawFd>() + 1024;
/// `SCM_PIDFD` of `linux/socket.h`: a descriptor that nobody here asked for.
const SCM_PIDFD: libc::c_int = 4;

/// What a receiver puts up with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of payload.
    pub max_payload: usize,
    /// Number of descriptors.
    pub max_fds: usize,
}

/// What arrived; the descriptors in the order they were sent, each close-on-exec from birth.
#[derive(Debug)]
pub struct Message {
    /// The bytes.
    pub payload: Vec<u8>,
    /// The descriptors.
    pub fds: Vec<OwnedFd>,
}

/// Why no message arrived. No descriptor of it stays open.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecvError {
    /// The peer closed the stream between two messages.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed the stream within a message.
    #[error("the peer closed the connection within a message")]
    Truncated,
    /// What arrived is not the header of a message.
    #[error("the peer speaks another protocol")]
    BadMagic,
    /// More payload was announced than the receiver allows.
    #[error("the peer announced {announced} bytes, more than {limit}")]
    PayloadTooLarge {
        /// Bytes announced.
        announced: u64,
        /// Bytes allowed.
        limit: usize,
    },
    /// More descriptors were announced than the receiver allows.
    #[error("the peer announced {announced} descriptors, more than {limit}")]
    TooManyFds {
        /// Number announced.
        announced: u32,
        /// Number allowed.
        limit: usize,
    },
    /// The number of descriptors that came is not the number announced.
    #[error("the peer announced {announced} descriptors and sent {received}")]
    FdCount {
        /// Number announced.
        announced: u32,
        /// Number seen when it was clear that they do not agree.
        received: usize,
    },
    /// The kernel could not install all descriptors (`MSG_CTRUNC`): this process may be at its limit of open files.
    #[error("the kernel dropped some of the descriptors received")]
    FdsDropped,
    /// The socket failed; `WouldBlock` if it is nonblocking, or has a receive timeout that ran out.
    #[error("cannot receive")]
    Io(#[from] io::Error),
}

/// Sends one message over a blocking unix stream socket.
///
/// # Errors
/// Those of sendmsg(2): `BrokenPipe` if the peer is gone (never a SIGPIPE); ETOOMANYREFS if this user has more
/// descriptors in flight than `RLIMIT_NOFILE` allows. Part of the message may have been sent by then.
pub fn send(sock: impl AsFd, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let sock = sock.as_fd();
    let count = u32::try_from(fds.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&MAGIC);
    header[4..8].copy_from_slice(&count.to_ne_bytes());
    header[8..].copy_from_slice(&(payload.len() as u64).to_ne_bytes());

    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let mut batches = numbers.chunks(BATCH_FDS);
    send_all(sock, &header, batches.next().unwrap_or(&[]))?;
    for batch in batches {
        send_all(sock, &[0], batch)?;
    }
    send_all(sock, payload, &[])
}

fn send_all(sock: BorrowedFd<'_>, mut bytes: &[u8], mut fds: &[RawFd]) -> io::Result<()> {
    while !bytes.is_empty() {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[] } else { &rights[..] };
        let sent = retry::on_eintr(|| {
            sendmsg::<()>(sock.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)
        })?;
        bytes = &bytes[sent..];
        // They went with the first byte.
        fds = &[];
    }
    Ok(())
}

/// Receives one message from a blocking unix stream socket.
///
/// # Errors
/// [`RecvError`]; all descriptors received by then are closed.
pub fn recv(sock: impl AsFd, limits: Limits) -> Result<Message, RecvError> {
    let mut receiver = Receiver { sock: sock.as_fd(), fds: Vec::new() };

    let mut header = [0; HEADER_BYTES];
    receiver.fill(&mut header, RecvError::Closed)?;
    let [m0, m1, m2, m3, c0, c1, c2, c3, len @ ..] = header;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(RecvError::BadMagic);
    }
    let announced = u32::from_ne_bytes([c0, c1, c2, c3]);
    let count = usize::try_from(announced)
        .ok()
        .filter(|count| *count <= limits.max_fds)
        .ok_or(RecvError::TooManyFds { announced, limit: limits.max_fds })?;
    let announced_bytes = u64::from_ne_bytes(len);
    let payload_bytes = usize::try_from(announced_bytes)
        .ok()
        .filter(|bytes| *bytes <= limits.max_payload)
        .ok_or(RecvError::PayloadTooLarge { announced: announced_bytes, limit: limits.max_payload })?;

    for _ in 1..count.div_ceil(BATCH_FDS) {
        receiver.fill(&mut [0], RecvError::Truncated)?;
        if receiver.fds.len() > count {
            break;
        }
    }
    if receiver.fds.len() != count {
        return Err(RecvError::FdCount { announced, received: receiver.fds.len() });
    }

    let mut payload = Vec::new();
    payload.try_reserve_exact(payload_bytes).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    payload.resize(payload_bytes, 0);
    receiver.fill(&mut payload, RecvError::Truncated)?;
    if receiver.fds.len() != count {
        return Err(RecvError::FdCount { announced, received: receiver.fds.len() });
    }
    Ok(Message { payload, fds: receiver.fds })
}

/// Receives what there is on a socket without framing, without blocking: up to `max_bytes`, and the descriptors that came
/// with them. Nothing at all means the end of the stream.
///
/// # Errors
/// `WouldBlock` when there is nothing now; otherwise as [`recv`].
pub fn recv_available(sock: impl AsFd, max_bytes: usize) -> Result<Message, RecvError> {
    let mut receiver = Receiver { sock: sock.as_fd(), fds: Vec::new() };
    let mut payload = vec![0; max_bytes];
    let received = receiver.recv_some(&mut payload, libc::MSG_DONTWAIT)?;
    payload.truncate(received);
    Ok(Message { payload, fds: receiver.fds })
}

/// A message on its way in, with the descriptors that came so far.
struct Receiver<'a> {
    sock: BorrowedFd<'a>,
    fds: Vec<OwnedFd>,
}

impl Receiver<'_> {
    /// Fills `buffer`; the end of the stream before its first byte is `at_start`.
    fn fill(&mut self, buffer: &mut [u8], at_start: RecvError) -> Result<(), RecvError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.recv_some(&mut buffer[filled..], 0)? {
                0 if filled == 0 => return Err(at_start),
                0 => return Err(RecvError::Truncated),
                received => filled += received,
            }
        }
        Ok(())
    }

    /// One recvmsg(2), which never returns more than one batch: the kernel stops behind data that carries descriptors.
    fn recv_some(&mut self, buffer: &mut [u8], flags: libc::c_int) -> Result<usize, RecvError> {
        // u64, because control messages are aligned like a size_t.
        let mut control = [0u64; CONTROL_BYTES.div_ceil(8)];
        let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // SAFETY: msghdr is a plain C structure for which all zeros means "nothing".
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &raw mut iov;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control);

        let received = retry::on_eintr(|| {
            // SAFETY: the header points to `iov`, which describes `buffer`, and to `control`; all three live longer than
            // the call and have the lengths given.
            nix::errno::Errno::result(unsafe {
                libc::recvmsg(self.sock.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC | flags)
            })
        })?;
        // Before any check, so that every descriptor has an owner who closes it.
        // SAFETY: recvmsg succeeded on this header, whose control buffer nobody has moved or read since.
        unsafe { self.own_descriptors(&header) };
        if header.msg_flags & libc::MSG_CTRUNC != 0 {
            return Err(RecvError::FdsDropped);
        }
        // Not negative, or it had been an error.
        Ok(received.cast_unsigned())
    }

    /// Takes over every descriptor in the control data of `header`.
    ///
    /// # Safety
    /// `header` was filled by a successful recvmsg(2), its control buffer is alive, and this is the only call for it.
    unsafe fn own_descriptors(&mut self, header: &libc::msghdr) {
        // SAFETY: the kernel set msg_controllen to what it wrote, and CMSG_FIRSTHDR and CMSG_NXTHDR stay within that.
        let mut message = unsafe { libc::CMSG_FIRSTHDR(header) };
        while !message.is_null() {
            // SAFETY: not null, so a whole cmsghdr lies there.
            let (level, kind, len) =
                unsafe { ((*message).cmsg_level, (*message).cmsg_type, (*message).cmsg_len) };
            if level == libc::SOL_SOCKET && (kind == libc::SCM_RIGHTS || kind == SCM_PIDFD) {
                // SAFETY: arithmetic on constants.
                let bytes = len.saturating_sub(unsafe { libc::CMSG_LEN(0) } as usize);
                // SAFETY: as above.
                let data = unsafe { libc::CMSG_DATA(message) }.cast::<RawFd>();
                for index in 0..bytes / size_of::<RawFd>() {
                    // SAFETY: the message holds that many numbers; the kernel installed each for this process just now, so
                    // nobody else owns it. A pidfd that the kernel could not install is negative.
                    let fd = unsafe {
                        let number = data.add(index).read_unaligned();
                        (number >= 0).then(|| OwnedFd::from_raw_fd(number))
                    };
                    if kind == libc::SCM_RIGHTS {
                        self.fds.extend(fd);
                    }
                }
            }
            // SAFETY: as for CMSG_FIRSTHDR; `message` is one of this header's.
            message = unsafe { libc::CMSG_NXTHDR(header, message) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::{Mutex, MutexGuard, PoisonError};
    use std::thread;

    use crate::{cloexec, process};

    const LIMITS: Limits = Limits { max_payload: 1 << 20, max_fds: 1000 };

    /// One at a time of the tests with hundreds of descriptors, or together they reach the usual limit of 1024.
    fn many_descriptors() -> MutexGuard<'static, ()> {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn header(magic: &[u8; 4], fds: u32, bytes: u64) -> Vec<u8> {
        [magic.as_slice(), &fds.to_ne_bytes(), &bytes.to_ne_bytes()].concat()
    }

    /// Sends raw bytes with descriptors, as a peer that keeps no rules does.
    fn send_raw(sock: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        send_all(sock.as_fd(), bytes, &numbers).unwrap();
    }

    #[test]
    fn payload_and_descriptors_arrive_in_order() {
        let _guard = many_descriptors();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let files: Vec<File> = (0..40)
            .map(|index: u64| {
                let file = File::from(crate::memfd::Memfd::new("scm").create().unwrap());
                (&file).write_all(&index.to_ne_bytes()).unwrap();
                file
            })
            .collect();
        let payload: Vec<u8> = (0..300_000u32).map(|value| value as u8).collect();
        let sent = payload.clone();
        let sender = thread::spawn(move || {
            let fds: Vec<_> = (0..600).map(|index| files[index * 7 % 40].as_fd()).collect();
            // A second message right behind the first must not be touched by the first.
            send(&ours, &sent, &fds).unwrap();
            send(&ours, b"", &fds[..253]).unwrap();
            send(&ours, b"bytes only", &[]).unwrap();
        });
        let message = recv(&theirs, LIMITS).unwrap();
        assert_eq!(message.payload, payload);
        assert_eq!(message.fds.len(), 600);
        for (index, fd) in message.fds.into_iter().enumerate() {
            assert!(cloexec::is_set(&fd).unwrap());
            let mut value = [0; 8];
            std::os::unix::fs::FileExt::read_exact_at(&File::from(fd), &mut value, 0).unwrap();
            assert_eq!(u64::from_ne_bytes(value), index as u64 * 7 % 40);
        }
        let second = recv(&theirs, LIMITS).unwrap();
        assert_eq!((second.payload.len(), second.fds.len()), (0, 253));
        let third = recv(&theirs, LIMITS).unwrap();
        assert_eq!((third.payload.as_slice(), third.fds.len()), (&b"bytes only"[..], 0));
        sender.join().unwrap();
        assert!(matches!(recv(&theirs, LIMITS), Err(RecvError::Closed)));
    }

    #[test]
    fn limits_hold_before_anything_is_read_or_allocated() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&header(&MAGIC, 0, u64::MAX)).unwrap();
        assert!(matches!(
            recv(&theirs, LIMITS),
            Err(RecvError::PayloadTooLarge { announced: u64::MAX, limit: 1_048_576 })
        ));
        ours.write_all(&header(&MAGIC, u32::MAX, 0)).unwrap();
        assert!(matches!(
            recv(&theirs, LIMITS),
            Err(RecvError::TooManyFds { announced: u32::MAX, limit: 1000 })
        ));
        let exact = Limits { max_payload: 3, max_fds: 1 };
        send(&ours, b"abc", &[ours.as_fd()]).unwrap();
        assert_eq!(recv(&theirs, exact).unwrap().payload, b"abc");
    }

    #[test]
    fn another_protocol_is_told_apart() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(b"GET / HTTP/1.1\r\n").unwrap();
        assert!(matches!(recv(&theirs, LIMITS), Err(RecvError::BadMagic)));
    }

    /// Whoever reads the other end of `peer` sees its end only when no copy of `peer` is open any more.
    fn assert_no_copy_left(peer: UnixStream, mut other_end: UnixStream) {
        drop(peer);
        other_end.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
        assert_eq!(other_end.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn wrong_counts_are_refused_and_closed() {
        let _guard = many_descriptors();
        for (announced, sent, with_payload) in
            [(1, 2, 0), (2, 1, 0), (0, 1, 0), (254, 253, 0), (253, 253, 1), (0, 0, 1)]
        {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (probe, other_end) = UnixStream::pair().unwrap();
            let fds = vec![probe.as_fd(); sent];
            send_raw(&ours, &header(&MAGIC, announced, 4), &fds);
            if announced > 253 {
                send_raw(&ours, &[0], &[]);
            }
            send_raw(
                &ours,
                b"data",
                &fds[..0].iter().copied().chain(vec![probe.as_fd(); with_payload]).collect::<Vec<_>>(),
            );
            match recv(&theirs, LIMITS) {
                Err(RecvError::FdCount { announced: told, received }) => {
                    assert_eq!((told, received), (announced, sent + with_payload));
                }
                other => panic!("announced {announced}, sent {sent}: {other:?}"),
            }
            // In flight with bytes that were never read, they are the socket's, not the receiver's.
            drop(theirs);
            assert_no_copy_left(probe, other_end);
        }
    }

    #[test]
    fn end_within_a_message_is_not_an_end_between_two() {
        let _guard = many_descriptors();
        let whole = [header(&MAGIC, 300, 4), vec![0], b"data".to_vec()].concat();
        for cut in [1, 15, 16, 17, 20] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (probe, other_end) = UnixStream::pair().unwrap();
            send_raw(&ours, &whole[..cut.min(16)], &[probe.as_fd(); 253]);
            if cut > 16 {
                send_raw(&ours, &whole[16..17], &[probe.as_fd(); 47]);
                send_raw(&ours, &whole[17..cut], &[]);
            }
            drop(ours);
            assert!(matches!(recv(&theirs, LIMITS), Err(RecvError::Truncated)), "cut at {cut}");
            assert_no_copy_left(probe, other_end);
        }
    }

    #[test]
    fn a_peer_that_left_is_an_error_and_no_signal() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(send(&ours, b"x", &[]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn nonblocking_sockets_say_so() {
        let (_ours, theirs) = UnixStream::pair().unwrap();
        process::set_nonblocking(&theirs, true).unwrap();
        match recv(&theirs, LIMITS) {
            Err(RecvError::Io(error)) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn credentials_asked_for_by_the_socket_do_not_disturb() {
        let _guard = many_descriptors();
        let (ours, theirs) = UnixStream::pair().unwrap();
        nix::sys::socket::setsockopt(&theirs, nix::sys::socket::sockopt::PassCred, &true).unwrap();
        send(&ours, b"abc", &[ours.as_fd(); 253]).unwrap();
        let message = recv(&theirs, LIMITS).unwrap();
        assert_eq!((message.payload.as_slice(), message.fds.len()), (&b"abc"[..], 253));
    }
}
