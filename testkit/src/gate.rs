//! Holds an update open between the old program and the new one, for as long as a test needs to do something then.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::ensure;

use crate::PATIENCE;

/// A FIFO that a shell reads from between the two execs of an update.
pub struct Gate {
    path: PathBuf,
}

/// An update that waits behind a [`Gate`].
pub struct Held {
    fifo: File,
}

impl Gate {
    /// Makes a gate in `dir`.
    ///
    /// # Errors
    /// The FIFO cannot be made.
    pub fn new(dir: &Path) -> anyhow::Result<Gate> {
        let path = dir.join("gate");
        if !path.exists() {
            ensure!(Command::new("mkfifo").arg(&path).status()?.success(), "mkfifo failed");
        }
        Ok(Gate { path })
    }

    /// `command` behind the gate: a shell in its place waits, then executes it. No child process is made. In a preflight
    /// the gate is open.
    pub fn command(&self, command: &[String]) -> Vec<String> {
        let mut words = ["/bin/sh", "-c", "[ $CPR_VMM_PREFLIGHT ] || read word < \"$0\"; exec \"$@\""]
            .map(String::from)
            .to_vec();
        words.push(self.path.display().to_string());
        words.extend_from_slice(command);
        words
    }

    /// Waits until an update stands at the gate: the old program is gone, the new one not there.
    ///
    /// # Errors
    /// None comes.
    pub fn held(&self) -> anyhow::Result<Held> {
        // Opening a FIFO for writing without blocking works once somebody reads it.
        let open = || OpenOptions::new().write(true).custom_flags(O_NONBLOCK).open(&self.path).ok();
        let fifo = crate::wait_for("the update to come to the gate", PATIENCE, open)?;
        Ok(Held { fifo })
    }
}

/// `O_NONBLOCK` of open(2) on x86-64.
const O_NONBLOCK: i32 = 0o4000;

impl Held {
    /// Lets the update go on.
    ///
    /// # Errors
    /// Nobody waits any more.
    pub fn release(mut self) -> anyhow::Result<()> {
        Ok(self.fifo.write_all(b"\n")?)
    }
}
