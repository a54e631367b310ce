//! Why a machine cannot be booted, in words for the person who gave the command.

use std::io;
use std::path::PathBuf;

use linux_loader::{cmdline, configurator, loader};
use vm_memory::GuestMemoryError;

use super::layout::MAX_VCPUS;

/// The request cannot be booted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// The kernel image is unusable.
    #[error("cannot boot kernel {file}")]
    Kernel {
        /// Path of the file, or name of the built-in image.
        file: String,
        /// What is wrong with it.
        #[source]
        cause: KernelError,
    },
    /// The initrd is unusable.
    #[error("cannot use initrd {}", file.display())]
    Initrd {
        /// Path of the file.
        file: PathBuf,
        /// What is wrong with it.
        #[source]
        cause: InitrdError,
    },
    /// The command line exceeds what the kernel reads.
    #[error("the kernel command line has {len} characters; this kernel takes at most {max}")]
    CommandLineTooLong {
        /// Characters given.
        len: usize,
        /// Characters accepted.
        max: usize,
    },
    /// The command line holds a character that a kernel would misread.
    #[error("the kernel command line holds {bad:?}; only printable ASCII is accepted")]
    CommandLineText {
        /// The first such character.
        bad: char,
    },
    /// Too few or too many vCPUs.
    #[error("{vcpus} vCPUs: a machine has 1 to {MAX_VCPUS}")]
    Vcpus {
        /// The number given.
        vcpus: usize,
    },
    /// Guest RAM is not laid out as a PC's.
    #[error("guest RAM must be one piece from address 0 to beyond 1 MiB; this one ends at {end:#x}")]
    Ram {
        /// End of the piece that starts at 0; 0 if there is none.
        end: u64,
    },
    /// The machine's memory map has more ranges than the boot protocol can carry.
    #[error("guest RAM is in {ranges} pieces; at most {max} can be described to the kernel")]
    RamPieces {
        /// Ranges of the memory map.
        ranges: usize,
        /// Ranges that fit.
        max: usize,
    },
    /// Boot data could not be written to guest RAM.
    #[error("cannot write boot data to guest RAM")]
    Write(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl BootError {
    pub(super) fn cmdline(e: cmdline::Error) -> Self {
        Self::Write(Box::new(e))
    }

    pub(super) fn configurator(e: configurator::Error) -> Self {
        Self::Write(Box::new(e))
    }

    pub(super) fn loader(e: loader::Error) -> Self {
        Self::Write(Box::new(e))
    }
}

impl From<GuestMemoryError> for BootError {
    fn from(e: GuestMemoryError) -> Self {
        Self::Write(Box::new(e))
    }
}

/// What the words "would be accepted" stand for in every message about a kernel of the wrong kind.
macro_rules! accepted {
    () => {
        "accepted are an uncompressed 64-bit ELF kernel with a PVH note (vmlinux) and a 64-bit bzImage (vmlinuz)"
    };
}

/// What is wrong with a kernel image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// It cannot be opened or looked at.
    #[error("cannot open the file")]
    Open(#[source] io::Error),
    /// It is a directory, a pipe, a device.
    #[error("it is {what}, not a regular file; {}", accepted!())]
    NotAFile {
        /// What it is, with its article.
        what: &'static str,
    },
    /// It has no bytes.
    #[error("the file is empty; {}", accepted!())]
    Empty,
    /// Its magic belongs to neither format.
    #[error("this is {what}, no kernel this machine can start; {}", accepted!())]
    Unknown {
        /// What the first bytes look like, with its article.
        what: &'static str,
    },
    /// An ELF file for another processor or word size.
    #[error("this ELF file is {what}; {}", accepted!())]
    WrongElf {
        /// What it is.
        what: String,
    },
    /// An ELF file without `XEN_ELFNOTE_PHYS32_ENTRY`.
    #[error("this ELF file has no PVH entry note (Linux writes it with CONFIG_PVH=y); {}", accepted!())]
    NoPvhNote,
    /// An ELF header that contradicts itself.
    #[error("the ELF headers are broken: {what}; {}", accepted!())]
    BrokenElf {
        /// The contradiction.
        what: &'static str,
    },
    /// A kernel of a boot protocol from before the 64-bit entry was announced.
    #[error(
        "its boot protocol is {major}.{minor:02}, at least 2.12 (Linux 3.8) is needed; {}",
        accepted!()
    )]
    OldBzImage {
        /// Major version of the boot protocol.
        major: u8,
        /// Minor version of the boot protocol.
        minor: u8,
    },
    /// A zImage, which is loaded below 640 KiB.
    #[error("this is a zImage, which loads to low memory; {}", accepted!())]
    ZImage,
    /// A bzImage without the 64-bit entry point.
    #[error("this bzImage has no 64-bit entry (it was built for 32-bit processors); {}", accepted!())]
    ThirtyTwoBit,
    /// A bzImage whose header contradicts itself.
    #[error("the bzImage header is broken: {what}; {}", accepted!())]
    BrokenBzImage {
        /// The contradiction.
        what: &'static str,
    },
    /// The file is shorter than its own headers say.
    #[error(
        "the file is truncated: its headers speak of {need} bytes, it has {have}; an intact file would be accepted"
    )]
    Truncated {
        /// Length that the headers ask for.
        need: u64,
        /// Length of the file.
        have: u64,
    },
    /// The kernel needs memory where the machine has none.
    #[error(
        "the kernel needs RAM up to {} MiB, this machine's low RAM ends at {} MiB; \
         give the machine more RAM, or a smaller kernel",
        end.div_ceil(1 << 20), ram_end >> 20
    )]
    TooLarge {
        /// First address behind what it needs.
        end: u64,
        /// First address behind low RAM.
        ram_end: u64,
    },
    /// The kernel wants to be where boot data and ROMs are.
    #[error("it asks to be loaded to {start:#x}; only addresses from 1 MiB up are accepted")]
    TooLow {
        /// Where it wants to be.
        start: u64,
    },
    /// It cannot be read, or changes while it is loaded.
    #[error("cannot read the file")]
    Read(#[source] io::Error),
    /// linux-loader refused what this module had accepted.
    #[error("cannot load the image")]
    Load(#[source] loader::Error),
}

/// What is wrong with an initrd.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitrdError {
    /// It cannot be opened or looked at.
    #[error("cannot open the file")]
    Open(#[source] io::Error),
    /// It is a directory, a pipe, a device.
    #[error("it is {what}, not a regular file; a cpio archive or file-system image is accepted")]
    NotAFile {
        /// What it is, with its article.
        what: &'static str,
    },
    /// It has no bytes.
    #[error("the file is empty; a cpio archive or file-system image is accepted")]
    Empty,
    /// It does not fit between the kernel and the end of what the kernel can reach.
    #[error(
        "it has {size} bytes, between kernel and end of usable low RAM are {room}; \
         give the machine more RAM, or a smaller initrd"
    )]
    TooLarge {
        /// Bytes of the file.
        size: u64,
        /// Bytes free for it.
        room: u64,
    },
    /// It cannot be read, or became shorter.
    #[error("cannot read the file")]
    Read(#[source] GuestMemoryError),
}
