//! The source's part of the preflight: the command of the update is executed in a child, which is shown the manifest and
//! gives a verdict, and nothing else.
//!
//! ```text
//!  source ─► child with CPR_VMM_PREFLIGHT=m,v   m: sealed memfd with the manifest's frame
//!     ◄──── its end ◄──── v: memfd that it writes the verdict's frame to; then it exits
//! ```
//!
//! The child is the program of the update with its arguments, its environment but for the variable, and its working
//! directory. A program that does not know the variable gives no verdict, whatever else it does, and that is a refusal.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cpr_core::error::BoxError;
use cpr_core::fault::{self, Point};
use cpr_core::frame::{Frame, FrameWriter, HEADER_LEN, Header, sealed_memfd};
use cpr_core::ownership::Epoch;
use cpr_core::preflight::{Asked, Manifest, Verdict};
use cpr_core::{FdRegistry, Wait};
use oslib::exec::PreparedExec;
use oslib::memfd::Memfd;
use oslib::signals::SignalMask;
use oslib::spawn::{self, Spawned, Streams};

use crate::channel::ChannelWire;
use crate::fallback::{told, with_words};
use crate::{PREFLIGHT_VARIABLE, environment, names};

/// Bytes of a verdict's frame, at most.
const VERDICT_BYTES: u64 = 256 << 10;
/// Bytes that the program may print. What comes after them is lost.
const WORDS_BYTES: u64 = 64 << 10;

/// What the source asks for.
pub(crate) struct Question<'a> {
    pub(crate) program: &'a Path,
    pub(crate) command: &'a [OsString],
    pub(crate) mask: SignalMask,
    pub(crate) manifest: &'a Manifest,
    pub(crate) main: ChannelWire,
    pub(crate) keeper: bool,
    pub(crate) epoch: Epoch,
}

/// A program that is being asked.
#[derive(Debug)]
pub(crate) struct Asking {
    child: Spawned,
    verdict: File,
    words: File,
    epoch: Epoch,
    limit: Option<Duration>,
    deadline: Option<Instant>,
    /// The child, for the host's loop.
    watched: Arc<OwnedFd>,
}

/// What the mode writes itself.
fn with_own_sections(manifest: &Manifest, keeper: bool) -> Manifest {
    let manifest = manifest.clone().section(names::PROCESS_SECTION, 0, 1..=1);
    let manifest = manifest.section(FdRegistry::SECTION, 0, 1..=1);
    if keeper { manifest.feature(names::LIVE_SOURCE) } else { manifest }
}

impl Question<'_> {
    /// Starts the program. `Err` with a text: it cannot be executed, which is an answer, too.
    pub(crate) fn ask(self, limit: Option<Duration>) -> Result<Result<Asking, String>, BoxError> {
        let mut frame = FrameWriter::default();
        with_own_sections(self.manifest, self.keeper).put_into(&mut frame)?;
        frame.put_value(names::CHANNEL_SECTION, 0, 1, &self.main)?;
        let frame = fault::pass(Point::Manifest, frame.finish(self.epoch))?;
        let manifest = sealed_memfd("cpr-manifest", &frame)?;
        // Of a fixed size, so that no program fills memory with them.
        let fixed = |name, bytes| Memfd::new(name).len(bytes).seal_size().create().map(File::from);
        let verdict = fixed("cpr-verdict", VERDICT_BYTES)?;
        let words = fixed("cpr-preflight-words", WORDS_BYTES)?;
        let null = File::open("/dev/null")?;
        let numbers = format!("{},{}", manifest.as_raw_fd(), verdict.as_raw_fd());
        let variable = (PREFLIGHT_VARIABLE.into(), numbers.into());
        let exec = PreparedExec::new(self.program, self.command, environment::own().chain([variable]))?;
        let streams = Streams { input: null.as_fd(), output: words.as_fd() };
        let child = match spawn::spawn(&exec, streams, &[manifest.as_fd(), verdict.as_fd()], self.mask) {
            Ok(child) => child,
            Err(error) => return Ok(Err(format!("cannot execute '{}': {error}", self.program.display()))),
        };
        let watched = Arc::new(child.process().as_fd().try_clone_to_owned()?);
        let deadline = limit.map(|limit| Instant::now() + limit);
        Ok(Ok(Asking { child, verdict, words, epoch: self.epoch, limit, deadline, watched }))
    }
}

impl Asking {
    /// Whether there is an answer. Once there is one, the child is gone.
    pub(crate) fn poll(&mut self) -> Result<Asked, BoxError> {
        let has_ended = self.child.process().is_exited()?;
        if !has_ended && self.deadline.is_none_or(|deadline| Instant::now() < deadline) {
            return Ok(Asked::Wait(Wait { fds: vec![self.watched.clone()], deadline: self.deadline }));
        }
        let pid = self.child.pid();
        let exit = self.child.end();
        if !has_ended {
            let limit = self.limit.unwrap_or_default();
            return Ok(Asked::Refused(self.without_verdict(format!("within {limit:?}"))));
        }
        Ok(match self.read_verdict(pid) {
            Ok(Some(verdict)) => verdict.into_asked(),
            Ok(None) => {
                let how = exit.map_or_else(|| "and ended".into(), |exit| format!("and {exit}"));
                Asked::Refused(self.without_verdict(how))
            }
            Err(error) => {
                Asked::Refused(format!("the new program gave a verdict that cannot be used: {error}"))
            }
        })
    }

    fn without_verdict(&self, how: String) -> String {
        with_words(format!("the new program gave no verdict {how}"), &self.last_words())
    }

    fn read_verdict(&self, pid: u32) -> Result<Option<Verdict>, BoxError> {
        let mut header = [0; HEADER_LEN];
        self.verdict.read_exact_at(&mut header, 0)?;
        if header == [0; HEADER_LEN] {
            return Ok(None);
        }
        let len = Header::parse(&header)?.total_len;
        if len > VERDICT_BYTES {
            return Err(format!("it is {len} bytes long, at most {VERDICT_BYTES} are read").into());
        }
        let mut frame = vec![0; usize::try_from(len)?];
        self.verdict.read_exact_at(&mut frame, 0)?;
        let mut frame = Frame::parse(&frame)?;
        if frame.epoch != self.epoch {
            return Err("it is of another update".into());
        }
        let process: u32 = frame.require(names::ANSWER_SECTION, 0)?.decode(1)?;
        if process != pid {
            // The guest's descriptors would go to the one that was started.
            return Err(format!(
                "it comes from process {process}, not from the one that was started ({pid}); a wrapper has to end in \
                 executing the program in the same process"
            )
            .into());
        }
        Ok(Some(Verdict::take_from(&mut frame)?))
    }

    fn last_words(&self) -> String {
        let mut said = Vec::new();
        let mut words = &self.words;
        if io::Seek::rewind(&mut words).and_then(|()| words.take(WORDS_BYTES).read_to_end(&mut said)).is_err()
        {
            return String::new();
        }
        // Behind what was said there is nothing but zeros.
        let end = said.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        told(&said[..end])
    }
}
