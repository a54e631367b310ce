//! The source's half: writes state and RAM to storage, and can take the guest back as long as nobody has run it.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use cpr_core::error::BoxError;
use cpr_core::fault::{self, Point};
use cpr_core::frame::to_body;
use cpr_core::{Attempt, CprMode, HandOver, ModeId, Prepared, Properties, Stamp, StateWriter, Wait};
use oslib::storage::{AtomicFile, is_volatile};

use crate::layout::{FILE_SECTION, FileError, FileSection, KeptWire, ONCE, RegionWire, UNUSED, USED};
use crate::ram::{Kept, Memory, RamStream};
use crate::{MODE, properties};

/// Bytes of RAM that are read before the program's loop has its turn again: some tens of milliseconds.
const PIECE: u64 = 64 << 20;

/// Stamps that a target on the same boot goes on from; see [`FileSection::stamps`].
pub(crate) const STAMPS: [Stamp; 5] =
    [Stamp::Begin, Stamp::StopRequested, Stamp::FirstExit, Stamp::Stopped, Stamp::Saved];

/// Why the guest is not in storage.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The file cannot be made.
    #[error("cannot open state file '{}' for writing: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file cannot be written: the disk is full, for example.
    #[error("cannot write state to file '{}': {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file that the RAM stays in cannot be made to last.
    #[error("guest RAM in '{}' cannot be written back: {source}", path.display())]
    Sync {
        /// The RAM's file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// The mode, for one attempt.
pub struct CprReboot {
    path: PathBuf,
    offset: u64,
    in_place: bool,
    once: bool,
    memory: Vec<Memory>,
    out: Option<AtomicFile>,
    stream: Option<RamStream>,
    stored: Stored,
}

impl CprReboot {
    /// Writes to `path`, from byte `offset` on; what a file there has before is kept. `memory` is all of the guest's RAM.
    /// `in_place`: some of it may stay where it is, which the memory rule is to look at.
    pub fn new(path: impl Into<PathBuf>, offset: u64, in_place: bool, memory: Vec<Memory>) -> CprReboot {
        CprReboot {
            path: path.into(),
            offset,
            in_place,
            once: in_place,
            memory,
            out: None,
            stream: None,
            stored: Stored::default(),
        }
    }

    /// Something that is outside of the file goes on with the guest, such as disks: the file can be used once, as it can if RAM
    /// is.
    pub fn used_once(mut self) -> CprReboot {
        self.once = true;
        self
    }

    /// What there is to know of the guest once it is in storage.
    pub fn stored(&self) -> Stored {
        self.stored.clone()
    }

    fn write_error(&self, source: io::Error) -> SourceError {
        SourceError::Write { path: self.path.clone(), source }
    }

    /// Makes RAM that stays in its file last.
    fn sync_memory(&self) -> Result<(), SourceError> {
        for memory in &self.memory {
            if let Kept::InFile { path, file } = &memory.kept {
                file.sync_all().map_err(|source| SourceError::Sync { path: path.clone(), source })?;
            }
        }
        Ok(())
    }

    fn section(&self, attempt: &Attempt<'_>) -> io::Result<FileSection> {
        let timeline = attempt.control.timeline();
        let region = |memory: &Memory| RegionWire {
            name: memory.name.clone(),
            len: memory.len,
            kept: match &memory.kept {
                Kept::InFile { path, .. } => {
                    KeptWire::InFile { path: path.clone().into_os_string().into_vec() }
                }
                Kept::Copied(_) => KeptWire::Copied,
            },
        };
        Ok(FileSection {
            boot_id: oslib::clock::boot_id()?,
            stamps: STAMPS.map(|stamp| timeline.at_ns(stamp).unwrap_or(0)),
            regions: self.memory.iter().map(region).collect(),
        })
    }

    /// Writes both frames; chunks come next.
    fn write_frames(&self, attempt: &Attempt<'_>, mut state: StateWriter) -> Result<(), BoxError> {
        let Some(out) = &self.out else { return Err("the state file was not made".into()) };
        let section = self.section(attempt).map_err(|source| self.write_error(source))?;
        state.early.put(FILE_SECTION, 0, 1, to_body(&section))?;
        let epoch = attempt.control.epoch();
        let early = fault::pass(Point::EarlyFrame, state.early.finish(epoch))?;
        let main = fault::pass(Point::MainFrame, state.main.finish(epoch))?;
        let mut file = out.file();
        let written = keep_head(&self.path, self.offset, file)
            .and_then(|()| file.write_all(&early))
            .and_then(|()| file.write_all(&main));
        Ok(written.map_err(|source| self.write_error(source))?)
    }

    fn write_some(&mut self, attempt: &Attempt<'_>) -> Result<HandOver, BoxError> {
        let (Some(out), Some(stream)) = (&self.out, &mut self.stream) else {
            return Err("nothing is being written".into());
        };
        fault::at(Point::Write)?;
        let written = write_piece(out.file(), stream, if self.once { ONCE } else { UNUSED });
        if !written.map_err(|source| self.write_error(source))? {
            return Ok(HandOver::Wait(Wait { fds: Vec::new(), deadline: Some(Instant::now()) }));
        }
        fault::at(Point::Sync)?;
        out.sync().map_err(|source| self.write_error(source))?;
        fault::at(Point::Name)?;
        let published =
            self.out.take().map_or_else(|| Err(io::ErrorKind::NotFound.into()), AtomicFile::publish);
        let file = published.map_err(|source| self.write_error(source))?;
        self.stored.set(&self.path, file, self.once);
        attempt.control.timeline().stamp(Stamp::Stored);
        Ok(HandOver::Complete)
    }
}

/// Writes some of the RAM, or the rest of it and the end of the file. Tells whether that was all.
fn write_piece(file: &File, stream: &mut RamStream, word: [u8; 8]) -> io::Result<bool> {
    let mut out = BufWriter::with_capacity(64 << 10, file);
    let all = stream.step(&mut out, PIECE)?;
    if all {
        out.write_all(&word)?;
    }
    out.flush()?;
    // Now rather than all at the end, where nobody could interrupt it.
    file.sync_data()?;
    Ok(all)
}

/// Copies what the file that is replaced has before `offset`, and goes there.
fn keep_head(path: &Path, offset: u64, mut out: &File) -> io::Result<()> {
    if offset == 0 {
        return Ok(());
    }
    match File::open(path) {
        Ok(old) => drop(io::copy(&mut old.take(offset), &mut out)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    out.seek(SeekFrom::Start(offset)).map(drop)
}

impl CprMode for CprReboot {
    fn id(&self) -> ModeId {
        MODE
    }

    fn properties(&self) -> Properties {
        properties(self.in_place)
    }

    fn check(&mut self) -> Result<(), BoxError> {
        let out = AtomicFile::create(&self.path);
        self.out = Some(out.map_err(|source| SourceError::Open { path: self.path.clone(), source })?);
        for memory in &self.memory {
            if let Kept::InFile { path, file } = &memory.kept
                && is_volatile(file).unwrap_or(false)
            {
                tracing::warn!("guest RAM in '{}' does not outlive a reboot of the host", path.display());
            }
        }
        Ok(())
    }

    fn prepare(&mut self, _attempt: &Attempt<'_>) -> Result<Prepared, BoxError> {
        // Most of it while the guest runs; what it writes meanwhile is for the second time.
        self.sync_memory()?;
        Ok(Prepared::Ready)
    }

    fn hand_over(&mut self, attempt: &Attempt<'_>, state: StateWriter) -> Result<HandOver, BoxError> {
        // Before the state: a state that is there has its RAM.
        self.sync_memory()?;
        self.write_frames(attempt, state)?;
        self.stream = Some(RamStream::new(&self.memory));
        self.write_some(attempt)
    }

    fn poll_hand_over(&mut self, attempt: &Attempt<'_>) -> Result<HandOver, BoxError> {
        self.write_some(attempt)
    }

    fn roll_back(&mut self, _attempt: &Attempt<'_>) {
        (self.out, self.stream) = (None, None);
        // The guest runs on here: a file that has its name by now is as if it had been taken back from there.
        if let Err(error) = self.stored.take_back() {
            tracing::error!("{error}");
        }
    }
}

/// A guest in storage, as the program knows it that put it there. Clones are of the same guest.
#[derive(Debug, Clone, Default)]
pub struct Stored(Arc<Mutex<Option<StoredFile>>>);

#[derive(Debug)]
struct StoredFile {
    path: PathBuf,
    file: File,
    /// It can be used once.
    once: bool,
}

impl Stored {
    fn set(&self, path: &Path, file: File, once: bool) {
        *self.lock() = Some(StoredFile { path: path.to_owned(), file, once });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<StoredFile>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The program runs the guest again itself. A state file that can be used once is worth nothing from now on, and is
    /// marked so.
    ///
    /// # Errors
    /// [`FileError::Used`] and [`FileError::InUse`]: another program has the guest. [`FileError::Mark`]: nothing could keep one
    /// from running it a second time.
    pub fn take_back(&self) -> Result<(), FileError> {
        let mut stored = self.lock();
        if let Some(StoredFile { path, file, once: true }) = &*stored {
            lock(path, file)?;
            let marked = mark_used(path, file);
            let _ = file.unlock();
            marked?;
        }
        *stored = None;
        Ok(())
    }
}

/// Keeps other programs from going on with the guest of this file, until it is closed.
pub(crate) fn lock(path: &Path, file: &File) -> Result<(), FileError> {
    file.try_lock().map_err(|error| match error {
        std::fs::TryLockError::WouldBlock => FileError::InUse { path: path.to_owned() },
        std::fs::TryLockError::Error(source) => FileError::Mark { path: path.to_owned(), source },
    })
}

/// Marks a locked file, unless it is marked.
pub(crate) fn mark_used(path: &Path, file: &File) -> Result<(), FileError> {
    let error = |source| FileError::Mark { path: path.to_owned(), source };
    let at = file.metadata().map_err(error)?.len().saturating_sub(crate::USE_LEN);
    let mut word = UNUSED;
    file.read_exact_at(&mut word, at).map_err(error)?;
    if word == USED {
        return Err(FileError::Used { path: path.to_owned() });
    }
    file.write_all_at(&USED, at).map_err(error)?;
    file.sync_data().map_err(error)
}
