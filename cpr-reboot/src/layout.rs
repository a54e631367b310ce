//! What stands in a state file: early frame, main frame, chunks of copied RAM, an end, and whether it was used.
//!
//! `docs/state-format.md` is the reference. Input is hostile here as everywhere: every length is checked against the file's
//! own before anything is allocated.

use std::io;
use std::path::PathBuf;

use cpr_core::frame::FrameError;
use serde::{Deserialize, Serialize};

/// The mode's own section of the early frame.
pub(crate) const FILE_SECTION: &str = "cpr-reboot/file";
/// In every early frame, and in no main frame.
pub(crate) const UPDATE_SECTION: &str = "cpr-core/update";

/// The most bytes of RAM in one chunk.
pub const MAX_CHUNK_LEN: u32 = 1 << 20;
/// Bytes of a record: the head of a chunk, or the end of all chunks.
pub(crate) const RECORD_LEN: usize = 24;
/// In place of a region's number: no chunk follows.
pub(crate) const END: u32 = u32::MAX;
/// Bytes of the word at the very end.
pub const USE_LEN: u64 = 8;
/// The word of a file that no program has gone on from.
pub(crate) const UNUSED: [u8; 8] = [0; 8];
/// The word of the same, if what is outside of the file goes on with the guest, such as disks.
pub(crate) const ONCE: [u8; 8] = *b"CPR-ONCE";
/// The word of a file whose guest has run on, and has changed what is outside of the file.
pub(crate) const USED: [u8; 8] = *b"CPR-USED";

/// Version 1 of [`FILE_SECTION`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileSection {
    /// The boot of the host under which it was written.
    pub(crate) boot_id: [u8; 16],
    /// Moments of the update, in nanoseconds of that boot's CLOCK_MONOTONIC, 0 where not stamped: begin, stop requested,
    /// first exit, stopped, saved.
    pub(crate) stamps: [u64; 5],
    /// Guest RAM.
    pub(crate) regions: Vec<RegionWire>,
}

/// A region of guest RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RegionWire {
    pub(crate) name: String,
    /// Bytes.
    pub(crate) len: u64,
    pub(crate) kept: KeptWire,
}

/// Where its content is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum KeptWire {
    /// In a file of its own, which had this absolute path.
    InFile { path: Vec<u8> },
    /// In the chunks.
    Copied,
}

/// The head of a chunk, or the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    /// Number of the region, or [`END`].
    pub(crate) region: u32,
    /// Bytes that follow; 0 at the end.
    pub(crate) len: u32,
    /// Where in the region they belong; at the end, how many chunks there were.
    pub(crate) offset: u64,
    /// CRC-32 of the bytes.
    pub(crate) checksum: u32,
}

impl Record {
    pub(crate) fn to_bytes(self) -> [u8; RECORD_LEN] {
        let mut bytes = [0; RECORD_LEN];
        bytes[..4].copy_from_slice(&self.region.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.len.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.offset.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.checksum.to_le_bytes());
        let checksum = crc32fast::hash(&bytes[..20]);
        bytes[20..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// `None`: damaged.
    pub(crate) fn parse(bytes: &[u8; RECORD_LEN]) -> Option<Record> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        (word(20) == crc32fast::hash(&bytes[..20])).then(|| Record {
            region: word(0),
            len: word(4),
            offset: u64::from(word(8)) | u64::from(word(12)) << 32,
            checksum: word(16),
        })
    }
}

/// Why a file is no guest to go on with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// It cannot be opened or read.
    #[error("cannot read state file '{}': {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// One of its frames, or a section of one, is not what this program reads.
    #[error("state file '{}': {source}", path.display())]
    Frame {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: FrameError,
    },
    /// The guest's RAM in it is damaged, or the file ends too early.
    #[error("state file '{}': {problem}", path.display())]
    Ram {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A mode that writes early and main frame to different places wrote it.
    #[error(
        "state file '{}' was written by another mode, which left the guest's RAM to the program that it started; there \
         is no RAM in the file, so no guest can be started from it",
        path.display()
    )]
    NoRam {
        /// The file.
        path: PathBuf,
    },
    /// Another mode wrote it, and says so.
    #[error("state file '{}' was written by mode '{mode}', not by cpr-reboot", path.display())]
    OtherMode {
        /// The file.
        path: PathBuf,
        /// The mode.
        mode: String,
    },
    /// RAM or disks are outside of the file, and the guest has changed them since.
    #[error(
        "state file '{}' was used already: the guest has run on since, with the RAM or the disks that the file belongs to",
        path.display()
    )]
    Used {
        /// The file.
        path: PathBuf,
    },
    /// Another program has it open to go on with its guest.
    #[error("state file '{}' is in use by another program, which is about to run the guest", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// RAM or disks are outside of the file, and the file could not be marked as used.
    #[error("state file '{}' has to be marked when the guest runs on, and cannot be written: {source}", path.display())]
    Mark {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The guest's RAM could not be filled.
    #[error("guest RAM '{region}' cannot be filled from state file '{}': {source}", path.display())]
    Fill {
        /// The file.
        path: PathBuf,
        /// The region.
        region: String,
        /// The cause.
        source: io::Error,
    },
    /// The kernel does not let a control page be made.
    #[error("cannot set up the update: {0}")]
    Setup(#[source] io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_what_they_were_or_damaged() {
        let record = Record { region: 3, len: 4096, offset: 0x1_2345_6000, checksum: 0xdead_beef };
        let bytes = record.to_bytes();
        assert_eq!(Record::parse(&bytes), Some(record));
        for bit in 0..RECORD_LEN * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Record::parse(&damaged), None, "bit {bit}");
        }
    }
}
