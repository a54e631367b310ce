//! The HMP session: the monitor that people type at, on a terminal, a pipe or a socket.
//!
//! A line is edited by [`editor`](super::editor), understood by the one table in `commands`, carried out through the
//! same [`Backend`] as QMP's, and its answer printed in QEMU's words. Output lines end in carriage return and newline,
//! as the terminal may be in raw mode.
//!
//! `info migrate` prints these keys of `query-migrate`, where present: `status`, `error-desc`, `total-time`,
//! `setup-time` and `downtime` (milliseconds), `blocked-reasons` (list of strings), and `cpr`, an object of `mode`,
//! `generation`, `preflight`, `blackout-us` and `phases` (list of `{"name", "us"}`).

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustyline::completion::longest_common_prefix;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::commands::Flow;
use super::editor::{Action, Editor, EditorState};
use super::output::OutputBuffer;
use super::{Backend, Origin, QmpError, keep_fds};

mod commands;
mod complete;
mod print;

/// What a line starts with.
pub const PROMPT: &str = "(qemu) ";

/// While this many bytes of output are undelivered, the session handles no input and asks for none.
const OUTPUT_HIGH_WATER: usize = 1 << 18;

/// Width that lists of completions are laid out for where the terminal's is unknown.
const DEFAULT_COLUMNS: u16 = 80;

/// The first line of a session.
#[must_use]
pub fn banner() -> String {
    format!("{} monitor - type 'help' for more information\n", super::PACKAGE)
}

/// Carries out one line on behalf of a monitor that cannot wait, and returns what it prints. Lines end in `\n`.
pub fn run_detached(line: &str, backend: &mut dyn Backend, origin: &mut Origin<'_>) -> String {
    commands::run(line, backend, origin, false).0
}

/// One HMP session.
#[derive(Debug)]
pub struct Session {
    id: String,
    editor: Editor,
    columns: u16,
    /// Input that the editor has not seen, because a command is under way.
    input: VecDeque<u8>,
    output: OutputBuffer,
    received_fds: VecDeque<OwnedFd>,
    /// A command is under way.
    waiting: bool,
    /// The terminal is ours, not another front end's.
    active: bool,
    /// The banner was printed.
    greeted: bool,
}

/// A session on its way to the next program. The received descriptors that nobody claimed travel beside it
/// ([`Session::received_fds`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionState {
    id: String,
    editor: EditorState,
    input: Vec<u8>,
    output: Vec<u8>,
    waiting: bool,
    active: bool,
}

impl Session {
    /// Starts a session; banner and prompt are queued. `id` is what [`Origin::monitor`] will say.
    #[must_use]
    pub fn new(id: impl Into<String>) -> Self {
        let mut session = Self::new_muxed(id);
        session.activate();
        session
    }

    /// Starts a session on a terminal that belongs to another front end for now; nothing is printed before
    /// [`activate`](Self::activate).
    #[must_use]
    pub fn new_muxed(id: impl Into<String>) -> Self {
        Self::with_editor(id.into(), Editor::new(PROMPT))
    }

    fn with_editor(id: String, editor: Editor) -> Self {
        Self {
            id,
            editor,
            columns: DEFAULT_COLUMNS,
            input: VecDeque::new(),
            output: OutputBuffer::default(),
            received_fds: VecDeque::new(),
            waiting: false,
            active: false,
            greeted: false,
        }
    }

    /// Id of the monitor.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Tells the width of the terminal in columns; `None` where there is no terminal.
    pub fn set_columns(&mut self, columns: Option<u16>) {
        self.editor.set_columns(columns);
        self.columns = columns.unwrap_or(DEFAULT_COLUMNS);
    }

    /// The terminal is this session's now: prints the banner if it is the first time, then prompt and line.
    pub fn activate(&mut self) {
        if std::mem::replace(&mut self.active, true) {
            return;
        }
        if !std::mem::replace(&mut self.greeted, true) {
            self.output.push_text(&banner());
        }
        self.show_line();
    }

    /// The terminal is another front end's from now on.
    pub fn deactivate(&mut self) {
        if std::mem::replace(&mut self.active, false) {
            self.output.push_text("\n");
        }
    }

    /// Takes bytes as they were typed, and descriptors that came with them over a socket.
    pub fn feed(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) {
        self.input.extend(bytes);
        keep_fds(&mut self.received_fds, fds);
    }

    /// Whether the main loop should read: not while a command is under way, input is left over or the peer does not
    /// take the output.
    #[must_use]
    pub fn wants_input(&self) -> bool {
        !self.waiting && self.input.is_empty() && self.output.pending().len() < OUTPUT_HIGH_WATER
    }

    /// Handles input until there is none, a command suspends the session, or much output is undelivered: one byte of
    /// input can draw a whole line. Call it again once the output is delivered, until the session
    /// [wants input](Self::wants_input) or [waits](Self::is_waiting).
    pub fn process(&mut self, backend: &mut dyn Backend) {
        while !self.waiting
            && self.output.pending().len() < OUTPUT_HIGH_WATER
            && let Some(byte) = self.input.pop_front()
        {
            match self.editor.feed(byte, &mut self.output) {
                Some(Action::Line(line)) => self.run(&line, backend),
                Some(Action::Complete) => self.complete(backend),
                None => {}
            }
        }
    }

    /// Whether a command answered [`Reply::Suspended`](super::Reply::Suspended) and waits for
    /// [`resume`](Self::resume).
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// Ends the command that suspended the session. Call [`process`](Self::process) afterwards: input may have queued
    /// up. Does nothing if no command waits.
    pub fn resume(&mut self, result: Result<Value, QmpError>) {
        if !std::mem::replace(&mut self.waiting, false) {
            return;
        }
        if let Err(error) = result {
            self.output.push_text(&print::error(&error));
        }
        self.show_line();
    }

    /// What is to be written to the terminal.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        self.output.pending()
    }

    /// Notes that the first `count` bytes of [`output`](Self::output) are written.
    pub fn consume_output(&mut self, count: usize) {
        self.output.consume(count);
    }

    /// Descriptors that came over the connection and that no command has claimed, oldest first. They must be
    /// preserved beside the saved state.
    pub fn received_fds(&self) -> impl ExactSizeIterator<Item = BorrowedFd<'_>> {
        self.received_fds.iter().map(AsFd::as_fd)
    }

    /// What the next program needs to go on with the session.
    #[must_use]
    pub fn save(&self) -> SessionState {
        SessionState {
            id: self.id.clone(),
            editor: self.editor.save(),
            input: self.input.iter().copied().collect(),
            output: self.output.pending().to_vec(),
            waiting: self.waiting,
            active: self.active,
        }
    }

    /// Goes on with a session that a predecessor saved: banner, prompt and the half-typed line are queued (if the
    /// terminal is this session's). A command that was under way still waits for [`resume`](Self::resume), and the
    /// prompt with it. `fds` are the predecessor's [`received_fds`](Self::received_fds).
    ///
    /// Tell the terminal's width with [`set_columns`](Self::set_columns) once it is known.
    #[must_use]
    pub fn restore(state: SessionState, fds: Vec<OwnedFd>) -> Self {
        let mut session = Self::with_editor(state.id, Editor::restore(PROMPT, state.editor));
        session.input = state.input.into();
        session.output = OutputBuffer::from_pending(state.output);
        session.waiting = state.waiting;
        keep_fds(&mut session.received_fds, fds);
        if state.active {
            if !session.editor.text().is_empty() {
                session.output.push_text("\n");
            }
            session.activate();
        }
        session
    }

    fn run(&mut self, line: &str, backend: &mut dyn Backend) {
        let mut origin = Origin { monitor: &self.id, received_fds: &mut self.received_fds };
        let (text, flow) = commands::run(line, backend, &mut origin, true);
        self.output.push_text(&text);
        self.waiting = flow == Flow::Suspended;
        self.show_line();
    }

    /// Completes the word at the cursor as far as it is clear, and lists the ways to go on from there.
    fn complete(&mut self, backend: &dyn Backend) {
        let before = self.editor.text_before_cursor();
        let (word, candidates) = complete::candidates(before, backend);
        let known = word.len();
        let Some(common) = longest_common_prefix(&candidates) else { return };
        let mut added = common.get(known..).unwrap_or("").to_owned();
        if candidates.len() == 1 && !common.ends_with(':') {
            added.push(' ');
        }
        self.editor.insert(&added, &mut self.output);
        if candidates.len() > 1 {
            self.output.push_text(&format!("\n{}", complete::in_columns(&candidates, self.columns)));
            self.show_line();
        }
    }

    fn show_line(&mut self) {
        if !self.waiting {
            self.editor.draw(&mut self.output);
        }
    }
}

#[cfg(test)]
mod tests;
