//! The far end of a terminal, a pair of pipes or a socket: bytes typed in, text read off the screen.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use oslib::term::{self, Termios};

use crate::PATIENCE;

/// What one sits in front of.
pub struct Console {
    keyboard: OwnedFd,
    screen: OwnedFd,
    /// Everything that came, as it came.
    raw: Vec<u8>,
    /// The same as it stands on the screen.
    text: Vec<u8>,
    /// Whether the last byte that came is within a control sequence.
    in_sequence: bool,
    /// How much of `text` the expectations so far have used up.
    read: usize,
}

impl Console {
    /// Types into `keyboard` and reads from `screen`.
    pub fn new(keyboard: OwnedFd, screen: OwnedFd) -> Console {
        Console { keyboard, screen, raw: Vec::new(), text: Vec::new(), in_sequence: false, read: 0 }
    }

    /// Connects to a unix socket.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> anyhow::Result<Console> {
        let what = format!("a listener at {}", path.display());
        let stream = crate::wait_for(&what, PATIENCE, || UnixStream::connect(path).ok())?;
        let keyboard = stream.try_clone()?;
        Ok(Console::new(keyboard.into(), stream.into()))
    }

    /// Types these keys.
    ///
    /// # Errors
    /// The other side is gone.
    pub fn type_keys(&mut self, keys: impl AsRef<[u8]>) -> anyhow::Result<()> {
        let mut keys = keys.as_ref();
        while !keys.is_empty() {
            match oslib::stream::write(&self.keyboard, keys) {
                Ok(count) => keys = &keys[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Types a line and the Enter key.
    ///
    /// # Errors
    /// The other side is gone.
    pub fn type_line(&mut self, line: &str) -> anyhow::Result<()> {
        self.type_keys(format!("{line}\r"))
    }

    /// Waits until `text` appears after what earlier calls waited for, and gives what stands before it.
    ///
    /// # Errors
    /// It does not come; the error has all that came.
    pub fn expect(&mut self, text: &str) -> anyhow::Result<String> {
        self.expect_within(text, PATIENCE)
    }

    /// As [`expect`](Self::expect), for what may take `limit`.
    ///
    /// # Errors
    /// It does not come; the error has all that came.
    pub fn expect_within(&mut self, text: &str, limit: Duration) -> anyhow::Result<String> {
        let deadline = Instant::now() + limit;
        let mut searched = self.read;
        loop {
            let found = self.text[searched..].windows(text.len()).position(|part| part == text.as_bytes());
            if let Some(at) = found.map(|at| searched + at) {
                let before = lossy(&self.text[self.read..at]);
                self.read = at + text.len();
                return Ok(before);
            }
            // Its beginning may be there already.
            searched = self.text.len().saturating_sub(text.len()).max(self.read);
            let left = deadline.saturating_duration_since(Instant::now());
            match self.read_some(left) {
                Ok(true) => {}
                Ok(false) => bail!("waited {limit:?} in vain for {text:?} after {:?}", self.text()),
                Err(error) => {
                    return Err(error.context(format!("waiting for {text:?} after {:?}", self.text())));
                }
            }
        }
    }

    /// Reads on for `time`, and gives what came after what [`expect`](Self::expect) waited for.
    ///
    /// # Errors
    /// The other side is gone.
    pub fn rest(&mut self, time: Duration) -> anyhow::Result<String> {
        let deadline = Instant::now() + time;
        while self.read_some(deadline.saturating_duration_since(Instant::now()))? {}
        Ok(lossy(&self.text[self.read..]))
    }

    /// Reads to the end, and gives all that ever came.
    ///
    /// # Errors
    /// The end does not come.
    pub fn to_end(&mut self) -> anyhow::Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.read_some(deadline.saturating_duration_since(Instant::now())) {
                Ok(more) => ensure!(more, "no end after {:?}", self.text()),
                Err(error) if error.is::<Ended>() => return Ok(self.text()),
                Err(error) => return Err(error),
            }
        }
    }

    /// All that came, as it stands on the screen: without carriage returns and control sequences.
    pub fn text(&self) -> String {
        lossy(&self.text)
    }

    /// All that came, as it came.
    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// Waits up to `limit` for something to read; says whether there was anything.
    fn read_some(&mut self, limit: Duration) -> anyhow::Result<bool> {
        if !oslib::stream::wait_readable_for(&self.screen, limit)? {
            return Ok(false);
        }
        match oslib::stream::read(&self.screen, 1 << 16) {
            Ok(bytes) if bytes.is_empty() => Err(Ended.into()),
            Ok(bytes) => {
                self.show(&bytes);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            // What the far end of a terminal sees when nobody has it open any more.
            Err(error) if error.raw_os_error() == Some(EIO) => Err(Ended.into()),
            Err(error) => Err(error.into()),
        }
    }

    fn show(&mut self, bytes: &[u8]) {
        self.raw.extend(bytes);
        for &byte in bytes {
            match byte {
                // A sequence ends with its first letter.
                _ if self.in_sequence => self.in_sequence = !byte.is_ascii_alphabetic(),
                b'\x1b' => self.in_sequence = true,
                b'\r' => {}
                _ => self.text.push(byte),
            }
        }
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

const EIO: i32 = 5;

#[derive(Debug, thiserror::Error)]
#[error("the other side has closed it")]
struct Ended;

/// A pseudoterminal: the side that a program has as its standard input and output.
pub struct Terminal {
    slave: Arc<OwnedFd>,
}

impl Terminal {
    /// A fresh one, and who sits in front of it.
    ///
    /// # Errors
    /// There is no pseudoterminal left.
    pub fn open() -> anyhow::Result<(Terminal, Console)> {
        let (master, slave) = term::openpty()?;
        let keyboard = master.try_clone()?;
        Ok((Terminal { slave: Arc::new(slave) }, Console::new(keyboard, master)))
    }

    /// For [`VmmBuilder::stdio`](crate::VmmBuilder::stdio).
    pub fn stdio(&self) -> [Arc<OwnedFd>; 2] {
        [self.slave.clone(), self.slave.clone()]
    }

    /// Its modes now.
    ///
    /// # Errors
    /// Those of tcgetattr(3).
    pub fn modes(&self) -> anyhow::Result<Termios> {
        Ok(term::get(self.slave.as_fd())?)
    }
}

/// Standard input and output as plain pipes, and who sits at their other ends.
///
/// # Errors
/// Those of pipe(2).
pub fn pipes() -> anyhow::Result<([Arc<OwnedFd>; 2], Console)> {
    let (input, keyboard) = io::pipe()?;
    let (screen, output) = io::pipe()?;
    Ok(([Arc::new(input.into()), Arc::new(output.into())], Console::new(keyboard.into(), screen.into())))
}
