#![allow(unsafe_code, reason = "readv and writev take pointers to memory that others share")]
//! Whole packets between a descriptor and memory that somebody else may touch meanwhile, such as a guest's.
//!
//! Such memory cannot be lent out as a Rust slice. It comes as [`VolatileSlice`]s, which promise that it is mapped and that
//! nobody has a reference to it. See readv(2).

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use vm_memory::VolatileSlice;

use crate::retry;

/// The most slices of one packet, with room for one more where a packet is [read](receive).
pub const MAX_SLICES: usize = libc::UIO_MAXIOV as usize - 1;

/// Reads a packet into `slices`, one after the other, and what they do not hold into `rest`. Returns its length, in bytes.
///
/// What `rest` does not hold either is lost.
///
/// # Errors
/// Those of readv(2): `WouldBlock` if there is no packet now, `InvalidInput` for more than [`MAX_SLICES`].
pub fn receive(fd: impl AsFd, slices: &[VolatileSlice<'_>], rest: &mut [u8]) -> io::Result<usize> {
    let rest = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
    let vector = vector(slices, Some(rest));
    let (fd, count) = (fd.as_fd().as_raw_fd(), count(&vector)?);
    // SAFETY: `vector` has `count` entries. Those of `slices` are mapped for as long as the slices are borrowed, and
    // whoever shares them expects that they change; the last is a slice that is borrowed for writing.
    let read = retry::on_eintr(|| Errno::result(unsafe { libc::readv(fd, vector.as_ptr(), count) }))?;
    Ok(read.cast_unsigned())
}

/// Writes one packet that lies in `slices`, one after the other.
///
/// # Errors
/// Those of writev(2): `WouldBlock` if there is no room now, `InvalidInput` for more than [`MAX_SLICES`], or a packet
/// that makes no sense to the descriptor.
pub fn send(fd: impl AsFd, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
    let vector = vector(slices, None);
    let (fd, count) = (fd.as_fd().as_raw_fd(), count(&vector)?);
    // SAFETY: `vector` has `count` entries, which are mapped for as long as the slices are borrowed; the kernel reads
    // them, and copes with changes meanwhile.
    retry::on_eintr(|| Errno::result(unsafe { libc::writev(fd, vector.as_ptr(), count) }))?;
    Ok(())
}

fn vector(slices: &[VolatileSlice<'_>], last: Option<libc::iovec>) -> Vec<libc::iovec> {
    let entry = |slice: &VolatileSlice<'_>| libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast::<c_void>(),
        iov_len: slice.len(),
    };
    slices.iter().map(entry).chain(last).collect()
}

fn count(vector: &[libc::iovec]) -> io::Result<i32> {
    i32::try_from(vector.len()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn packets_go_through_pieces_of_memory() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let (mut a, mut b) = (*b"hel", *b"lo");
        send(&ours, &[VolatileSlice::from(&mut a[..]), VolatileSlice::from(&mut b[..])]).unwrap();
        let mut packet = [0; 16];
        let len = theirs.recv(&mut packet).unwrap();
        assert_eq!(&packet[..len], b"hello");

        theirs.send(b"good day").unwrap();
        theirs.send(b"x").unwrap();
        let mut rest = [0; 16];
        let into = &[VolatileSlice::from(&mut a[..]), VolatileSlice::from(&mut b[..])];
        assert_eq!(receive(&ours, into, &mut rest).unwrap(), 8);
        assert_eq!((&a, &b, &rest[..3]), (b"goo", b"d ", &b"day"[..]));
        assert_eq!(receive(&ours, &[], &mut rest).unwrap(), 1);
        let error = receive(&ours, &[], &mut rest).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn too_many_pieces_are_an_error() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut byte = [7];
        let slice = VolatileSlice::from(&mut byte[..]);
        send(&ours, &[slice; MAX_SLICES]).unwrap();
        assert_eq!(send(&ours, &[slice; MAX_SLICES + 2]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        theirs.send(&[1; MAX_SLICES + 1]).unwrap();
        assert_eq!(receive(&ours, &[slice; MAX_SLICES], &mut [0]).unwrap(), MAX_SLICES + 1);
        let error = receive(&ours, &[slice; MAX_SLICES + 1], &mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
