//! The main channel: where the main frame is kept across the exec.
//!
//! A stream with a reader at its other end cannot work: without a keeper source and target are never alive together, and
//! with one the room for the state is taken before the exec. So it is a file, or a memfd when no disk shall be touched.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cpr_core::error::BoxError;
use cpr_core::frame::Frame;
use cpr_core::{FdKind, FdPolicy, FdRegistry, MainSource};
use serde::{Deserialize, Serialize};

use crate::names;

/// Where the main frame goes to, or comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MainChannel {
    /// A file; written from `offset` bytes on.
    File {
        /// The file.
        path: PathBuf,
        /// Bytes before the frame that are left alone.
        offset: u64,
    },
    /// A sealed memfd that the mode makes and passes on itself.
    Memfd,
}

/// The wire form, version 1.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ChannelWire {
    File { path: Vec<u8>, offset: u64 },
    Memfd,
}

/// What went wrong with the main channel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The file cannot be opened for writing.
    #[error("cannot open state file '{}' for writing: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Writing failed: the disk is full, for example.
    #[error("cannot write state to {what}: {source}")]
    Write {
        /// The file or memfd.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// The file cannot be read.
    #[error("cannot read state file '{}': {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file was read, and is not this guest's state.
    #[error("state file '{}': {source}", path.display())]
    Frame {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: cpr_core::frame::FrameError,
    },
    /// `memfd:` was asked for, but the source used another channel.
    #[error("the source left no state in a memfd; give -incoming the channel that it migrated to")]
    NoMemfd,
}

impl MainChannel {
    pub(crate) fn to_wire(&self) -> ChannelWire {
        match self {
            MainChannel::File { path, offset } => {
                // The target may be started in another directory by a wrapper.
                let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                ChannelWire::File { path: path.into_os_string().into_vec(), offset: *offset }
            }
            MainChannel::Memfd => ChannelWire::Memfd,
        }
    }

    /// Opens the channel for writing while the guest still runs, so that an unwritable path costs nothing.
    pub(crate) fn open(&self) -> Result<OpenChannel, ChannelError> {
        let MainChannel::File { path, offset } = self else {
            let memfd = oslib::memfd::Memfd::new("cpr-main").create();
            return Ok(OpenChannel::Memfd(Arc::new(memfd.map_err(memfd_error)?)));
        };
        let error = |source| ChannelError::Open { path: path.clone(), source };
        let mut options = OpenOptions::new();
        options.write(true);
        let (file, created) = match options.clone().create_new(true).open(path) {
            Ok(file) => (file, true),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => (options.open(path).map_err(error)?, false),
            Err(e) => return Err(error(e)),
        };
        Ok(OpenChannel::File { path: path.clone(), offset: *offset, file, created })
    }
}

impl From<ChannelWire> for MainChannel {
    fn from(wire: ChannelWire) -> Self {
        match wire {
            ChannelWire::File { path, offset } => {
                MainChannel::File { path: OsString::from_vec(path).into(), offset }
            }
            ChannelWire::Memfd => MainChannel::Memfd,
        }
    }
}

/// A channel that the source holds open during an attempt.
#[derive(Debug)]
pub(crate) enum OpenChannel {
    File { path: PathBuf, offset: u64, file: File, created: bool },
    Memfd(Arc<OwnedFd>),
}

fn memfd_error(source: io::Error) -> ChannelError {
    ChannelError::Write { what: "a memfd".into(), source }
}

impl OpenChannel {
    /// Enters what the target needs to find the frame into the registry.
    pub(crate) fn register(&self, registry: &FdRegistry) -> Result<(), BoxError> {
        if let OpenChannel::Memfd(fd) = self {
            registry.save(names::MAIN, 0, FdKind::Memfd, FdPolicy::MayBeRebuilt, fd)?;
        }
        Ok(())
    }

    /// Writes the frame, in place of one that was written before. No sync: the page cache outlives the process.
    pub(crate) fn write(&mut self, frame: &[u8]) -> Result<(), ChannelError> {
        match self {
            OpenChannel::File { path, offset, file, .. } => {
                let written = write_at(file, *offset, frame).and_then(|()| {
                    // Cut only afterwards, so that room that is there already is not lost to somebody else. A device such as
                    // /dev/full has no length to cut.
                    if file.metadata()?.is_file() {
                        file.set_len(*offset + frame.len() as u64)
                    } else {
                        Ok(())
                    }
                });
                written.map_err(|source| ChannelError::Write {
                    what: format!("file '{}'", path.display()),
                    source,
                })
            }
            OpenChannel::Memfd(fd) => {
                let mut file = File::from(fd.try_clone().map_err(memfd_error)?);
                write_at(&mut file, 0, frame)
                    .and_then(|()| file.set_len(frame.len() as u64))
                    .map_err(memfd_error)
            }
        }
    }

    /// Nobody changes the frame any more, where that can be had.
    pub(crate) fn seal(&self) -> Result<(), ChannelError> {
        match self {
            OpenChannel::File { .. } => Ok(()),
            OpenChannel::Memfd(fd) => oslib::memfd::seal_write(fd).map_err(memfd_error),
        }
    }

    /// After a failure: leaves nothing behind that was not there before.
    pub(crate) fn discard(self) {
        if let OpenChannel::File { path, created: true, .. } = self
            && let Err(error) = std::fs::remove_file(&path)
        {
            tracing::warn!(path = %path.display(), %error, "the unused state file stays");
        }
    }
}

fn write_at(file: &mut File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    // Not for a device or pipe, which cannot seek, unless it was asked for.
    if offset > 0 || file.metadata()?.is_file() {
        file.seek(SeekFrom::Start(offset))?;
    }
    file.write_all(bytes)
}

/// The reading end of a main channel.
pub(crate) struct ChannelSource {
    pub(crate) channel: MainChannel,
    pub(crate) memfd: Option<Arc<OwnedFd>>,
}

impl MainSource for ChannelSource {
    fn read_main(&mut self) -> Result<Frame, BoxError> {
        match &self.channel {
            MainChannel::File { path, offset } => Ok(read_file(path, *offset)?),
            MainChannel::Memfd => Ok(Frame::read_memfd(self.memfd.as_ref().ok_or(ChannelError::NoMemfd)?)?),
        }
    }
}

fn read_file(path: &Path, offset: u64) -> Result<Frame, ChannelError> {
    let error = |source| ChannelError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(error)?;
    if offset > 0 {
        file.seek(SeekFrom::Start(offset)).map_err(error)?;
    }
    Frame::read_from(file).map_err(|source| ChannelError::Frame { path: path.to_owned(), source })
}
