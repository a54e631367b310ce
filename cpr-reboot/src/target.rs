//! The target's half: a state file, checked from its first byte to its last before anything is made of it.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use cpr_core::error::BoxError;
use cpr_core::fault::{self, Point};
use cpr_core::frame::{Frame, FrameError, HEADER_LEN, Header};
use cpr_core::{Arrival, Control, FdRegistry, MainSource, Stamp};
use serde::Deserialize;

use crate::layout::{
    END, FILE_SECTION, FileError, FileSection, KeptWire, MAX_CHUNK_LEN, ONCE, RECORD_LEN, Record, UNUSED,
    UPDATE_SECTION, USE_LEN, USED,
};
use crate::source::{STAMPS, lock, mark_used};
use crate::{MODE, mode_info};

/// A region of the guest's RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// What the source's user called it.
    pub name: String,
    /// Bytes.
    pub len: u64,
    /// Where its content is.
    pub whereabouts: Whereabouts,
}

/// Where the content of a region is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whereabouts {
    /// In a file of its own, which had this path.
    File(PathBuf),
    /// In the state file.
    Here,
}

/// A state file that was found good, but for the content of its RAM, which is checked while it is read.
#[derive(Debug)]
pub struct StateFile {
    path: PathBuf,
    file: File,
    section: FileSection,
    early: Frame,
    main_at: u64,
    chunks_at: u64,
    /// It can be used once: RAM or something else that goes on with the guest is outside of it.
    once: bool,
}

impl StateFile {
    /// Opens the file and checks it, from byte `offset` on. If it can be used once, no other program can use the file until
    /// this is dropped.
    ///
    /// # Errors
    /// [`FileError`], which names the file. Nothing was changed.
    pub fn open(path: &Path, offset: u64) -> Result<StateFile, FileError> {
        let read_error = |source| FileError::Read { path: path.to_owned(), source };
        let frame_error = |source| FileError::Frame { path: path.to_owned(), source };
        let writable = OpenOptions::new().read(true).write(true).open(path);
        let (file, cannot_write) = match writable {
            Ok(file) => (file, None),
            Err(error) => (File::open(path).map_err(read_error)?, Some(error)),
        };
        if !file.metadata().map_err(read_error)?.is_file() {
            return Err(read_error(io::Error::other("it is no regular file")));
        }
        let (mut early, main_at) = read_frame(&file, offset).map_err(frame_error)?;
        let section = match early.take(FILE_SECTION, 0) {
            Some(section) => section.decode::<FileSection>(1).map_err(frame_error)?,
            None => return Err(foreign(path, early)),
        };
        fault::at(Point::Receive).map_err(injected)?;
        // Its content is for later, but damage is to be known of now.
        let (main, chunks_at) = read_frame(&file, main_at).map_err(frame_error)?;
        if main.epoch != early.epoch {
            return Err(damaged(path, "its two frames are of different updates"));
        }
        let mut state =
            StateFile { path: path.to_owned(), file, section, early, main_at, chunks_at, once: false };
        state.once = state.stays_outside() || [ONCE, USED].contains(&state.last_word()?);
        if state.once {
            if let Some(source) = cannot_write {
                return Err(FileError::Mark { path: path.to_owned(), source });
            }
            lock(path, &state.file)?;
        }
        state.check_chunks()?;
        Ok(state)
    }

    /// The guest's RAM.
    pub fn regions(&self) -> Vec<Region> {
        let region = |wire: &crate::layout::RegionWire| Region {
            name: wire.name.clone(),
            len: wire.len,
            whereabouts: match &wire.kept {
                KeptWire::InFile { path } => Whereabouts::File(OsString::from_vec(path.clone()).into()),
                KeptWire::Copied => Whereabouts::Here,
            },
        };
        self.section.regions.iter().map(region).collect()
    }

    /// For [`cpr_core::Incoming::begin`]: no descriptors, and a control page of this program alone. On the same boot of the
    /// host its timeline goes on from the source's.
    ///
    /// # Errors
    /// [`FileError::Setup`].
    pub fn arrive(&mut self) -> Result<Arrival, FileError> {
        let control = Control::create(self.early.epoch).map_err(FileError::Setup)?;
        if self.section.boot_id == oslib::clock::boot_id().map_err(FileError::Setup)? {
            for (stamp, at_ns) in STAMPS.into_iter().zip(self.section.stamps) {
                control.timeline().stamp_at(stamp, at_ns);
            }
        }
        control.timeline().stamp(Stamp::TargetStarted);
        fault::at(Point::Received).map_err(injected)?;
        let empty = Frame::parse(&cpr_core::frame::FrameWriter::default().finish(self.early.epoch));
        let empty = empty.map_err(|source| FileError::Frame { path: self.path.clone(), source })?;
        let early = std::mem::replace(&mut self.early, empty);
        let in_place = self.stays_outside();
        Ok(Arrival { mode: mode_info(in_place), early, registry: FdRegistry::default(), control })
    }

    /// Reads the main frame.
    ///
    /// # Errors
    /// It was damaged since the file was opened.
    pub fn read_main(&self) -> Result<Frame, FileError> {
        let frame = read_frame(&self.file, self.main_at);
        Ok(frame.map_err(|source| FileError::Frame { path: self.path.clone(), source })?.0)
    }

    /// The main frame for [`cpr_core::Incoming::load`].
    pub fn main(&self) -> Box<dyn MainSource> {
        Box::new(Main(Some(self.read_main())))
    }

    /// Gives what was copied of region number `region` to `fill`, in pieces of [`MAX_CHUNK_LEN`](crate::MAX_CHUNK_LEN) at most,
    /// each with its offset. What is not given is zero.
    ///
    /// # Errors
    /// [`FileError::Ram`]: damage; [`FileError::Fill`]: `fill` refused.
    pub fn read_ram(
        &self,
        region: usize,
        fill: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> Result<(), FileError> {
        let mut buffer = vec![0; MAX_CHUNK_LEN as usize];
        let mut at = self.chunks_at;
        loop {
            let record = self.record(at)?;
            if record.region == END {
                return Ok(());
            }
            at += RECORD_LEN as u64;
            if record.region as usize == region {
                let data = &mut buffer[..record.len as usize];
                self.file.read_exact_at(data, at).map_err(|source| self.read_error(source))?;
                if crc32fast::hash(data) != record.checksum {
                    let name = &self.section.regions[region].name;
                    let problem = format!("guest RAM '{name}' is damaged at offset {:#x}", record.offset);
                    return Err(damaged(&self.path, problem));
                }
                fill(record.offset, data).map_err(|source| FileError::Fill {
                    path: self.path.clone(),
                    region: self.section.regions[region].name.clone(),
                    source,
                })?;
            }
            at += u64::from(record.len);
        }
    }

    /// The guest runs on from here: if the file can be used once, it is of no use from now on, and is marked so. It is never
    /// removed.
    ///
    /// # Errors
    /// [`FileError::Mark`].
    pub fn mark_used(&self) -> Result<(), FileError> {
        fault::at(Point::Mark).map_err(injected)?;
        if self.once { mark_used(&self.path, &self.file) } else { Ok(()) }
    }

    fn stays_outside(&self) -> bool {
        self.section.regions.iter().any(|region| region.kept != KeptWire::Copied)
    }

    /// Follows the chunks to the end of the file, without reading what is in them.
    fn check_chunks(&self) -> Result<(), FileError> {
        let len = self.file.metadata().map_err(|source| self.read_error(source))?.len();
        let mut at = self.chunks_at;
        let (mut chunks, mut last) = (0, None);
        loop {
            let record = self.record(at)?;
            at += RECORD_LEN as u64;
            if record.region == END {
                if (record.offset, record.len, record.checksum) != (chunks, 0, 0) {
                    return Err(damaged(&self.path, "its end is not that of its chunks of RAM"));
                }
                break;
            }
            let begin = (record.region, record.offset);
            let end = record.offset.checked_add(u64::from(record.len));
            let region = self.section.regions.get(record.region as usize);
            let fits = region.filter(|region| region.kept == KeptWire::Copied).zip(end);
            let Some((_, end)) = fits.filter(|(region, end)| *end <= region.len) else {
                return Err(damaged(&self.path, "a chunk of RAM belongs nowhere"));
            };
            if record.len == 0 || record.len > MAX_CHUNK_LEN || last.is_some_and(|last| begin < last) {
                return Err(damaged(&self.path, "a chunk of RAM is empty, too long or out of order"));
            }
            (chunks, last) = (chunks + 1, Some((record.region, end)));
            at += u64::from(record.len);
            if at > len {
                return Err(self.truncated(at, len));
            }
        }
        self.check_use(at, len)
    }

    fn check_use(&self, at: u64, len: u64) -> Result<(), FileError> {
        let end = at + USE_LEN;
        if len < end {
            return Err(self.truncated(end, len));
        }
        if len > end {
            return Err(damaged(&self.path, format!("{} bytes follow that do not belong to it", len - end)));
        }
        match self.last_word()? {
            UNUSED | ONCE => Ok(()),
            USED => Err(FileError::Used { path: self.path.clone() }),
            _ => Err(damaged(&self.path, "its last word is damaged")),
        }
    }

    /// The last bytes of the file, which are the word of its use unless it is damaged.
    fn last_word(&self) -> Result<[u8; 8], FileError> {
        let len = self.file.metadata().map_err(|source| self.read_error(source))?.len();
        let mut word = UNUSED;
        let read = self.file.read_exact_at(&mut word, len.saturating_sub(USE_LEN));
        read.map_err(|source| self.read_error(source))?;
        Ok(word)
    }

    fn record(&self, at: u64) -> Result<Record, FileError> {
        let mut bytes = [0; RECORD_LEN];
        match self.file.read_exact_at(&mut bytes, at) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let len = self.file.metadata().map_or(0, |metadata| metadata.len());
                return Err(self.truncated(at + RECORD_LEN as u64, len));
            }
            Err(error) => return Err(self.read_error(error)),
        }
        Record::parse(&bytes)
            .ok_or_else(|| damaged(&self.path, format!("the record at byte {at} is damaged")))
    }

    fn truncated(&self, expected: u64, found: u64) -> FileError {
        damaged(&self.path, format!("it is truncated: {found} bytes of {expected} at least"))
    }

    fn read_error(&self, source: io::Error) -> FileError {
        FileError::Read { path: self.path.clone(), source }
    }
}

/// A main frame that was read already, or why it could not be.
struct Main(Option<Result<Frame, FileError>>);

impl MainSource for Main {
    fn read_main(&mut self) -> Result<Frame, BoxError> {
        Ok(self.0.take().ok_or("the main frame was taken already")??)
    }
}

/// Reads the frame that begins at byte `at`, and tells where it ends.
fn read_frame(mut file: &File, at: u64) -> Result<(Frame, u64), FrameError> {
    file.seek(SeekFrom::Start(at))?;
    let mut header = Vec::with_capacity(HEADER_LEN);
    file.take(HEADER_LEN as u64).read_to_end(&mut header)?;
    let total = Header::parse(&header)?.total_len;
    file.seek(SeekFrom::Start(at))?;
    Ok((Frame::read_from(file.take(total))?, at + total))
}

/// A good frame, and not ours: whose?
fn foreign(path: &Path, mut frame: Frame) -> FileError {
    /// What of the section is the same in all versions of it.
    #[derive(Deserialize)]
    struct Update {
        mode: String,
        _generation: u64,
    }
    let path = path.to_owned();
    let update = frame.take(UPDATE_SECTION, 0).and_then(|section| section.decode::<Update>(1).ok());
    match update {
        Some(Update { mode, .. }) if mode != MODE.as_str() => FileError::OtherMode { path, mode },
        Some(_) => {
            let source = FrameError::MissingSection { name: FILE_SECTION.into(), instance: 0 };
            FileError::Frame { path, source }
        }
        None => FileError::NoRam { path },
    }
}

/// A failure on purpose.
fn injected(error: BoxError) -> FileError {
    FileError::Setup(io::Error::other(error))
}

fn damaged(path: &Path, problem: impl Into<String>) -> FileError {
    FileError::Ram { path: path.to_owned(), problem: problem.into() }
}
