//! A shell in a guest, at the far end of its serial line. It prints a prompt that nothing else prints, and echoes nothing,
//! so what stands between two prompts is the output of one command.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use crate::{Console, PATIENCE};

/// Who sits in front of the shell. What comes of a guest that was rebooted follows in the same text.
pub struct GuestShell {
    console: Console,
    prompt: String,
}

impl GuestShell {
    /// Connects to the serial line's socket. The prompt has to be waited for: [`GuestShell::ready`].
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path, prompt: &str) -> anyhow::Result<GuestShell> {
        Ok(GuestShell { console: Console::connect(path)?, prompt: prompt.to_owned() })
    }

    /// Waits for the prompt, as after a boot; gives what the guest printed before it.
    ///
    /// # Errors
    /// It does not come; the error has the whole text of the line.
    pub fn ready(&mut self, limit: Duration) -> anyhow::Result<String> {
        self.console.expect_within(&self.prompt, limit)
    }

    /// Runs a line of the shell's language and gives its output, without the last line break.
    ///
    /// # Errors
    /// The prompt does not come back.
    pub fn run(&mut self, line: &str) -> anyhow::Result<String> {
        self.run_within(line, PATIENCE)
    }

    /// As [`run`](Self::run), for what may take `limit`.
    ///
    /// # Errors
    /// The prompt does not come back.
    pub fn run_within(&mut self, line: &str, limit: Duration) -> anyhow::Result<String> {
        self.type_line(line)?;
        let output = self.ready(limit).with_context(|| format!("the guest's shell at {line:?}"))?;
        Ok(output.trim_end_matches('\n').to_owned())
    }

    /// Types a line for whoever reads it in the guest.
    ///
    /// # Errors
    /// The VMM is gone.
    pub fn type_line(&mut self, line: &str) -> anyhow::Result<()> {
        self.console.type_keys(format!("{line}\n"))
    }

    /// Waits for `text`, for `limit` at most, and gives what stands before it.
    ///
    /// # Errors
    /// It does not come.
    pub fn expect(&mut self, text: &str, limit: Duration) -> anyhow::Result<String> {
        self.console.expect_within(text, limit)
    }

    /// All that ever came.
    pub fn transcript(&self) -> String {
        self.console.text()
    }
}
