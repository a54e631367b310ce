//! Opens a kernel or initrd file and tells the two kernel formats apart by their magic.
//!
//! Only regular files are opened: a pipe would block the start and has no length. It refuses by saying what the
//! bytes look like instead, since a compressed kernel or a disk image is the usual mistake.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use vm_memory::ReadVolatile;

use super::error::{InitrdError, KernelError};

/// `HdrS`, at [`BZIMAGE_MAGIC_OFFSET`] of every Linux image since boot protocol 2.00.
const BZIMAGE_MAGIC: &[u8] = b"HdrS";
const BZIMAGE_MAGIC_OFFSET: usize = 0x202;

pub(super) enum Format {
    Elf,
    BzImage,
}

/// Why a path is no file to load from; the two callers have a message each.
pub(super) enum OpenError {
    Open(io::Error),
    NotAFile(&'static str),
    Empty,
}

impl From<OpenError> for KernelError {
    fn from(e: OpenError) -> Self {
        match e {
            OpenError::Open(e) => Self::Open(e),
            OpenError::NotAFile(what) => Self::NotAFile { what },
            OpenError::Empty => Self::Empty,
        }
    }
}

impl From<OpenError> for InitrdError {
    fn from(e: OpenError) -> Self {
        match e {
            OpenError::Open(e) => Self::Open(e),
            OpenError::NotAFile(what) => Self::NotAFile { what },
            OpenError::Empty => Self::Empty,
        }
    }
}

/// Opens a kernel file; also returns its length in bytes.
pub(super) fn open(path: &Path) -> Result<(File, u64), KernelError> {
    Ok(open_regular(path)?)
}

/// Opens a regular file that is not empty; also returns its length in bytes.
pub(super) fn open_regular(path: &Path) -> Result<(File, u64), OpenError> {
    // Asked before the open, which on a FIFO would wait for a writer.
    let kind = fs::metadata(path).map_err(OpenError::Open)?.file_type();
    if !kind.is_file() {
        return Err(OpenError::NotAFile(match () {
            _ if kind.is_dir() => "a directory",
            _ if kind.is_fifo() => "a pipe",
            _ if kind.is_socket() => "a socket",
            _ => "a device",
        }));
    }
    let file = File::open(path).map_err(OpenError::Open)?;
    match file.metadata().map_err(OpenError::Open)?.len() {
        0 => Err(OpenError::Empty),
        len => Ok((file, len)),
    }
}

/// A kernel image of known length, from a file or from memory.
pub(super) struct Image<F> {
    pub(super) source: F,
    pub(super) len: u64,
}

impl<F: Read + ReadVolatile + Seek> Image<F> {
    pub(super) fn new(source: F, len: u64) -> Self {
        Self { source, len }
    }

    /// Fills `buf` from `offset`; an image that ends earlier is [`KernelError::Truncated`].
    pub(super) fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), KernelError> {
        self.must_reach(offset, buf.len() as u64)?;
        self.source.seek(SeekFrom::Start(offset)).map_err(KernelError::Read)?;
        self.source.read_exact(buf).map_err(KernelError::Read)
    }

    /// The image holds `size` bytes from `offset`.
    pub(super) fn must_reach(&self, offset: u64, size: u64) -> Result<(), KernelError> {
        match offset.saturating_add(size) {
            need if need > self.len => Err(KernelError::Truncated { need, have: self.len }),
            _ => Ok(()),
        }
    }

    pub(super) fn format(&mut self) -> Result<Format, KernelError> {
        let mut head = vec![0; self.len.min(0x206) as usize];
        self.read_at(0, &mut head)?;
        if head.starts_with(b"\x7fELF") {
            return Ok(Format::Elf);
        }
        if head.get(BZIMAGE_MAGIC_OFFSET..) == Some(BZIMAGE_MAGIC) {
            return Ok(Format::BzImage);
        }
        match looks_like(&head) {
            Some(what) => Err(KernelError::Unknown { what }),
            None if head.is_empty() => Err(KernelError::Empty),
            None => Err(KernelError::Unknown { what: "a file of unknown format" }),
        }
    }
}

fn looks_like(head: &[u8]) -> Option<&'static str> {
    let known: [(&[u8], &str); 10] = [
        (b"\x1f\x8b", "a gzip archive (unpack it first)"),
        (b"\xfd7zXZ\0", "an xz archive (unpack it first)"),
        (b"\x28\xb5\x2f\xfd", "a zstd archive (unpack it first)"),
        (b"BZh", "a bzip2 archive (unpack it first)"),
        (b"\x02\x21\x4c\x18", "an lz4 archive (unpack it first)"),
        (b"\x04\x22\x4d\x18", "an lz4 archive (unpack it first)"),
        (b"070701", "a cpio archive (an initrd?)"),
        (b"QFI\xfb", "a qcow2 disk image"),
        (b"#!", "a script"),
        (b"MZ", "an EFI program without a Linux boot header"),
    ];
    known.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, what)| *what).or_else(|| {
        (head.get(0x1fe..0x200) == Some(b"\x55\xaa"))
            .then_some("a disk image or a kernel from before Linux 1.3.73")
    })
}
