//! The other part of the preflight: this program was started to be asked whether it could take a guest over, and for nothing
//! else.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use cpr_core::FdRegistry;
use cpr_core::error::BoxError;
use cpr_core::fault::{self, Point};
use cpr_core::frame::{Frame, FrameWriter};
use cpr_core::ownership::Epoch;
use cpr_core::preflight::{Manifest, SectionCatalogue, Verdict};

use crate::channel::ChannelWire;
use crate::environment::take_preflight_variable;
use crate::{MainChannel, PREFLIGHT_VARIABLE, ReceiveError, names};

/// A source asks whether this program, with this command line, could take its guest over.
///
/// Answer it and exit with code 0: whatever else the program opens or prints has no business here. Without an answer the
/// source takes it that the program cannot.
#[derive(Debug)]
pub struct PreflightRequest {
    manifest: Manifest,
    main: MainChannel,
    epoch: Epoch,
    verdict: File,
}

/// Finds out whether this program was started to be asked, and not to take over.
///
/// Call it before [`receive`](crate::receive), which refuses to start a program that was asked and does not answer. The
/// demands are the same.
///
/// # Errors
/// A reserved variable is unknown (the program must exit), or the question cannot be used.
pub fn preflight_request() -> Result<Option<PreflightRequest>, ReceiveError> {
    let Some(numbers) = take_preflight_variable()? else { return Ok(None) };
    let mut memfds = Vec::new();
    for number in numbers {
        let fd = oslib::inherited::take(number).map_err(|source| ReceiveError::NotInherited {
            variable: PREFLIGHT_VARIABLE,
            number,
            source,
        })?;
        if !oslib::memfd::is_memfd(&fd).unwrap_or(false) {
            return Err(ReceiveError::NotAMemfd { variable: PREFLIGHT_VARIABLE, number: fd.as_raw_fd() });
        }
        memfds.push(fd);
    }
    PreflightRequest::read(memfds).map(Some).map_err(ReceiveError::State)
}

impl PreflightRequest {
    pub(crate) fn read(memfds: Vec<OwnedFd>) -> Result<PreflightRequest, BoxError> {
        let [manifest, verdict] = <[OwnedFd; 2]>::try_from(memfds).map_err(|_| "there are not two memfds")?;
        let mut frame = Frame::read_memfd(manifest)?;
        let main: ChannelWire = frame.require(names::CHANNEL_SECTION, 0)?.decode(1)?;
        let request = PreflightRequest {
            manifest: Manifest::take_from(&mut frame)?,
            main: main.into(),
            epoch: frame.epoch,
            verdict: verdict.into(),
        };
        fault::at(Point::Judge)?;
        Ok(request)
    }

    /// What the source will hand over.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Where the main frame will be.
    pub fn main(&self) -> &MainChannel {
        &self.main
    }

    /// Gives the verdict.
    ///
    /// # Errors
    /// It is too long, or cannot be written.
    pub fn answer(self, verdict: &Verdict) -> io::Result<()> {
        let mut frame = FrameWriter::default();
        let put = verdict.put_into(&mut frame);
        put.and_then(|()| frame.put_value(names::ANSWER_SECTION, 0, 1, &std::process::id()))
            .map_err(io::Error::other)?;
        let frame = fault::pass(Point::Verdict, frame.finish(self.epoch)).map_err(io::Error::other)?;
        self.verdict.write_all_at(&frame, 0)
    }
}

/// What this mode's receiving end reads, for the catalogue of a host that answers a preflight.
pub fn catalogue() -> SectionCatalogue {
    SectionCatalogue::default()
        .requires(names::PROCESS_SECTION, 1..=1)
        .requires(FdRegistry::SECTION, 1..=1)
        .knows(names::LIVE_SOURCE)
}
