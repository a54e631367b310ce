#![allow(unsafe_code, reason = "preadv, pwritev2 and memory that the guest writes meanwhile")]
//! Reading and writing files directly from guest memory, in the calling thread.
//!
//! An [`Operation`] owns what it works on: pieces of guest memory stay mapped for as long as it lives, so that it can be
//! given to the kernel and waited for ([`crate::uring`]) or be [run](Operation::run) at once. Guest memory is bytes that
//! somebody else writes at any time; no reference into it is ever made. Only with the feature `guest-io`, which brings
//! `vm-memory`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::fcntl::FallocateFlags;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, VolatileSlice};

use crate::retry;

/// The most pieces that one system call takes (`UIO_MAXIOV` of linux/uio.h).
const MAX_PIECES: usize = 1024;

/// What zeros are written from.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Pieces of memory, the first ones of which may be done with.
#[derive(Debug, Clone, Default)]
struct Pieces {
    all: Vec<libc::iovec>,
    /// Index of the first that is not done with.
    first: usize,
    /// Bytes that are not done with.
    len: usize,
}

impl Pieces {
    fn push(&mut self, start: *mut u8, len: usize) {
        self.all.push(libc::iovec { iov_base: start.cast(), iov_len: len });
        self.len += len;
    }

    fn advance(&mut self, mut len: usize) {
        assert!(len <= self.len, "no more than there is can be done");
        self.len -= len;
        while len > 0 {
            let piece = &mut self.all[self.first];
            let step = len.min(piece.iov_len);
            piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(step).cast();
            piece.iov_len -= step;
            len -= step;
            if piece.iov_len == 0 {
                self.first += 1;
            }
        }
    }

    /// As many as one system call takes.
    fn next(&self) -> &[libc::iovec] {
        let rest = &self.all[self.first..];
        &rest[..rest.len().min(MAX_PIECES)]
    }
}

/// Pieces of guest memory, one after the other, which stay mapped for as long as this lives.
#[derive(Debug)]
pub struct GuestBuffers {
    pieces: Pieces,
    /// Owns the mappings that the pieces lie in.
    memory: GuestMemoryMmap,
}

// SAFETY: the pointers lead into shared mappings of the process, which `memory` owns and which no thread has to itself.
unsafe impl Send for GuestBuffers {}

impl GuestBuffers {
    /// The bytes of these ranges, in this order.
    ///
    /// # Errors
    /// A range that is not RAM from its first byte to its last.
    pub fn new(
        memory: &GuestMemoryMmap,
        ranges: impl IntoIterator<Item = (GuestAddress, usize)>,
    ) -> Result<Self, GuestMemoryError> {
        let mut pieces = Pieces::default();
        for (start, len) in ranges {
            for slice in GuestMemoryBackend::get_slices(memory, start, len) {
                let slice = slice?;
                pieces.push(slice.ptr_guard_mut().as_ptr(), slice.len());
            }
        }
        Ok(Self { pieces, memory: memory.clone() })
    }

    /// Bytes that are left.
    pub fn len(&self) -> usize {
        self.pieces.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.pieces.len == 0
    }

    /// The first `len` bytes are done with.
    ///
    /// # Panics
    /// Fewer are left.
    pub fn advance(&mut self, len: usize) {
        self.pieces.advance(len);
    }

    /// Sets what is left to zero.
    pub fn zero(&mut self) {
        for piece in &self.pieces.all[self.pieces.first..] {
            // SAFETY: the piece lies in a mapping that `memory` keeps, and is accessed by volatile writes alone.
            let slice = unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) };
            for at in (0..piece.iov_len).step_by(ZEROS.len()) {
                let rest = slice.offset(at).expect("below the length");
                rest.copy_from(&ZEROS);
            }
        }
        self.pieces.advance(self.pieces.len);
    }
}

/// What is written: guest memory, or zeros.
#[derive(Debug)]
pub struct Source {
    pieces: Pieces,
    _memory: Option<GuestMemoryMmap>,
}

// SAFETY: as for `GuestBuffers`; zeros are read-only and static.
unsafe impl Send for Source {}

impl Source {
    /// `len` zeros, or as many of them as one system call writes: see [`len`](Self::len).
    pub fn zeros(len: u64) -> Self {
        let most = (ZEROS.len() * MAX_PIECES) as u64;
        let mut left = usize::try_from(len.min(most)).expect("tens of megabytes");
        let mut pieces = Pieces::default();
        while left > 0 {
            let step = left.min(ZEROS.len());
            pieces.push(ZEROS.as_ptr().cast_mut(), step);
            left -= step;
        }
        Self { pieces, _memory: None }
    }

    /// Bytes that are left.
    pub fn len(&self) -> usize {
        self.pieces.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.pieces.len == 0
    }

    /// The first `len` bytes are done with.
    ///
    /// # Panics
    /// Fewer are left.
    pub fn advance(&mut self, len: usize) {
        self.pieces.advance(len);
    }
}

impl From<GuestBuffers> for Source {
    fn from(buffers: GuestBuffers) -> Self {
        Self { pieces: buffers.pieces, _memory: Some(buffers.memory) }
    }
}

/// What becomes of a range of a file. Its length stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocation {
    /// Reads as zeros, and takes no room.
    Hole,
    /// Reads as zeros, and keeps its room.
    Zeros,
}

impl Allocation {
    fn flags(self) -> FallocateFlags {
        FallocateFlags::FALLOC_FL_KEEP_SIZE
            | match self {
                Self::Hole => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
                Self::Zeros => FallocateFlags::FALLOC_FL_ZERO_RANGE,
            }
    }

    /// As fallocate(2) takes it.
    pub(crate) fn mode(self) -> i32 {
        self.flags().bits()
    }
}

/// One thing to do with a file. What it works on comes back with its result.
#[derive(Debug)]
pub enum Operation {
    /// preadv(2).
    Read {
        /// Byte of the file.
        offset: u64,
        /// Where to.
        into: GuestBuffers,
    },
    /// pwritev2(2).
    Write {
        /// Byte of the file.
        offset: u64,
        /// What.
        from: Source,
        /// Whether it is on the disk when it is done, as after [`Sync`](Self::Sync).
        durable: bool,
    },
    /// fdatasync(2).
    Sync,
    /// fallocate(2).
    Allocate {
        /// How.
        how: Allocation,
        /// First byte of the file.
        offset: u64,
        /// How many.
        len: u64,
    },
}

impl Operation {
    /// Does it now, and returns the bytes that were read or written, which may be fewer than there are.
    ///
    /// # Errors
    /// Those of the system call.
    pub fn run(&self, file: &File) -> io::Result<usize> {
        retry::on_eintr(|| match self {
            Self::Read { offset, into } => {
                let (pieces, offset) = (into.pieces.next(), signed(*offset)?);
                // SAFETY: the pieces lie in writable mappings that `into` keeps; what is in them may change at any time.
                let read = unsafe { libc::preadv(file.as_raw_fd(), pieces.as_ptr(), count(pieces), offset) };
                length(read)
            }
            Self::Write { offset, from, durable } => {
                let (pieces, offset) = (from.pieces.next(), signed(*offset)?);
                let flags = write_flags(*durable);
                // SAFETY: the pieces lie in mappings that `from` keeps, or in a static.
                let written = unsafe {
                    libc::pwritev2(file.as_raw_fd(), pieces.as_ptr(), count(pieces), offset, flags)
                };
                length(written)
            }
            Self::Sync => nix::unistd::fdatasync(file).map(|()| 0),
            Self::Allocate { how, offset, len } => {
                nix::fcntl::fallocate(file, how.flags(), signed(*offset)?, signed(*len)?).map(|()| 0)
            }
        })
    }

    /// The pieces of memory that the kernel works on.
    pub(crate) fn pieces(&self) -> &[libc::iovec] {
        match self {
            Self::Read { into, .. } => into.pieces.next(),
            Self::Write { from, .. } => from.pieces.next(),
            Self::Sync | Self::Allocate { .. } => &[],
        }
    }
}

/// Flags of a write, as pwritev2(2) and io_uring take them.
pub(crate) fn write_flags(durable: bool) -> libc::c_int {
    if durable { libc::RWF_DSYNC } else { 0 }
}

fn count(pieces: &[libc::iovec]) -> libc::c_int {
    pieces.len() as libc::c_int
}

fn signed(number: u64) -> nix::Result<libc::off_t> {
    number.try_into().map_err(|_| nix::errno::Errno::EFBIG)
}

fn length(result: libc::ssize_t) -> nix::Result<usize> {
    nix::errno::Errno::result(result).map(libc::ssize_t::cast_unsigned)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};
    use vm_memory::Bytes;

    /// Two neighbouring regions, and a hole behind them.
    pub(crate) fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)]).unwrap()
    }

    pub(crate) fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    pub(crate) fn content(mut file: &File) -> Vec<u8> {
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    fn at(address: u64, len: usize) -> (GuestAddress, usize) {
        (GuestAddress(address), len)
    }

    #[test]
    fn reads_and_writes_pieces_across_regions() {
        let (memory, file) = (memory(), file(b"0123456789"));
        let into = GuestBuffers::new(&memory, [at(0xffd, 5), at(0x10, 0), at(0x20, 2)]).unwrap();
        assert_eq!((into.len(), into.is_empty()), (7, false));
        assert_eq!(Operation::Read { offset: 2, into }.run(&file).unwrap(), 7);
        let mut bytes = [0; 5];
        memory.read_slice(&mut bytes, GuestAddress(0xffd)).unwrap();
        assert_eq!(&bytes, b"23456");
        assert_eq!(memory.read_obj::<[u8; 2]>(GuestAddress(0x20)).unwrap(), *b"78");

        let mut from = GuestBuffers::new(&memory, [at(0x20, 2), at(0xffd, 5)]).unwrap();
        from.advance(1);
        let write = Operation::Write { offset: 0, from: from.into(), durable: true };
        assert_eq!(write.run(&file).unwrap(), 6);
        assert_eq!(content(&file), b"8234566789");
    }

    #[test]
    fn what_is_not_memory_is_refused() {
        for range in [at(0x1fff, 2), at(0x2000, 1), at(u64::MAX, 1), at(u64::MAX - 1, 4)] {
            GuestBuffers::new(&memory(), [range]).unwrap_err();
        }
    }

    #[test]
    fn zeros_go_to_files_and_to_memory() {
        let (memory, file) = (memory(), file(&[7; 200_000]));
        let mut from = Source::zeros(150_000);
        assert_eq!(from.len(), 150_000);
        from.advance(70_000);
        assert_eq!(Operation::Write { offset: 10, from, durable: false }.run(&file).unwrap(), 80_000);
        let written = content(&file);
        assert!(written[..10].iter().chain(&written[80_010..]).all(|byte| *byte == 7));
        assert!(written[10..80_010].iter().all(|byte| *byte == 0));
        assert_eq!(Source::zeros(u64::MAX).len(), 64 << 20);

        memory.write_slice(&[7; 0x2000], GuestAddress(0)).unwrap();
        let mut into = GuestBuffers::new(&memory, [at(0x100, 0x1e00)]).unwrap();
        into.advance(1);
        into.zero();
        assert!(into.is_empty());
        let mut bytes = [0; 0x2000];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        assert!(bytes[..0x101].iter().chain(&bytes[0x1f00..]).all(|byte| *byte == 7));
        assert!(bytes[0x101..0x1f00].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn holes_leave_the_length() {
        let file = file(&[7; 8192]);
        let hole = Operation::Allocate { how: Allocation::Hole, offset: 4096, len: 8192 };
        assert_eq!(hole.run(&file).unwrap(), 0);
        Operation::Sync.run(&file).unwrap();
        assert_eq!(content(&file), [[7; 4096], [0; 4096]].concat());
        let beyond = Operation::Allocate { how: Allocation::Hole, offset: u64::MAX, len: 1 };
        assert_eq!(beyond.run(&file).unwrap_err().raw_os_error(), Some(libc::EFBIG));
    }
}
