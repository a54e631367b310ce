//! Guest RAM on its way into the state file: piece by piece, and what is zero not at all.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use crate::layout::{END, MAX_CHUNK_LEN, Record};

/// RAM is looked at in pages of so many bytes for zeros.
const PAGE_LEN: usize = 4096;

/// A region of guest RAM, as the mode has to deal with it.
pub struct Memory {
    /// What the user calls it.
    pub name: String,
    /// Bytes.
    pub len: u64,
    /// What becomes of its content.
    pub kept: Kept,
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("name", &self.name).field("len", &self.len).finish_non_exhaustive()
    }
}

/// What becomes of a region's content.
pub enum Kept {
    /// It stays in a file of its own.
    InFile {
        /// The file's absolute path.
        path: PathBuf,
        /// The file, which is made to last before the state is.
        file: Arc<File>,
    },
    /// It is copied into the state file.
    Copied(Arc<dyn RamSource>),
}

/// Reads a region of a guest that is stopped.
pub trait RamSource {
    /// What of it may be other than zero: offsets in order, within the region, without overlaps.
    ///
    /// # Errors
    /// The kernel's answer.
    fn extents(&self) -> io::Result<Vec<Range<u64>>>;

    /// Reads `buffer.len()` bytes from `offset` on.
    ///
    /// # Errors
    /// They cannot be read.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// Writes chunks, a limited number of bytes at a time.
pub(crate) struct RamStream {
    /// Numbers and content of the regions that are not done.
    regions: Vec<(u32, Arc<dyn RamSource>)>,
    /// What is left of the last of them, in reverse order.
    extents: Option<Vec<Range<u64>>>,
    buffer: Vec<u8>,
    chunks: u64,
}

impl RamStream {
    pub(crate) fn new(memory: &[Memory]) -> RamStream {
        let copied = memory.iter().zip(0..).filter_map(|(memory, number)| match &memory.kept {
            Kept::Copied(source) => Some((number, source.clone())),
            Kept::InFile { .. } => None,
        });
        let mut regions: Vec<_> = copied.collect();
        regions.reverse();
        RamStream { regions, extents: None, buffer: vec![0; MAX_CHUNK_LEN as usize], chunks: 0 }
    }

    /// Reads about `budget` bytes of RAM and writes what is not zero, or the end. Tells whether that was all.
    pub(crate) fn step(&mut self, out: &mut impl Write, budget: u64) -> io::Result<bool> {
        let mut done = 0;
        while done < budget {
            let Some((number, source)) = self.regions.last().cloned() else {
                let end = Record { region: END, len: 0, offset: self.chunks, checksum: 0 };
                out.write_all(&end.to_bytes())?;
                return Ok(true);
            };
            if self.extents.is_none() {
                let mut extents = source.extents()?;
                extents.reverse();
                self.extents = Some(extents);
            }
            let Some(extent) = self.extents.as_mut().and_then(Vec::pop) else {
                self.regions.pop();
                self.extents = None;
                continue;
            };
            let len = (extent.end - extent.start).min(u64::from(MAX_CHUNK_LEN));
            if extent.start + len < extent.end {
                self.extents.get_or_insert_default().push(extent.start + len..extent.end);
            }
            source.read(extent.start, &mut self.buffer[..len as usize])?;
            self.write(out, number, extent.start, len as usize)?;
            done += len;
        }
        Ok(false)
    }

    /// Writes the pages of the buffer that are not zero, neighbours in one chunk.
    fn write(&mut self, out: &mut impl Write, region: u32, start: u64, len: usize) -> io::Result<()> {
        let mut at = 0;
        while at < len {
            let end = (at + PAGE_LEN).min(len);
            if is_zero(&self.buffer[at..end]) {
                at = end;
                continue;
            }
            let mut end = end;
            while end < len && !is_zero(&self.buffer[end..(end + PAGE_LEN).min(len)]) {
                end = (end + PAGE_LEN).min(len);
            }
            let data = &self.buffer[at..end];
            let record = Record {
                region,
                len: data.len() as u32,
                offset: start + at as u64,
                checksum: crc32fast::hash(data),
            };
            out.write_all(&record.to_bytes())?;
            out.write_all(data)?;
            self.chunks += 1;
            at = end;
        }
        Ok(())
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0, |all, byte| all | byte) == 0
}
