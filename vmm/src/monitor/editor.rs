//! Line editing without a terminal: keys in as bytes, one line and its drawing out.
//!
//! The text, its cursor and word motions are rustyline's [`LineBuffer`], key sequences are decoded by terminput; both
//! are used for their pure parts only, as HMP also runs on sockets and pipes and the terminal's settings belong to
//! the main loop. Keys are Emacs' as in QEMU's monitor. All state can be saved, up to a half-received key sequence.

use std::collections::VecDeque;

use rustyline::line_buffer::{ChangeListener, DeleteListener, Direction, LineBuffer};
use rustyline::{At, Word};
use serde::{Deserialize, Serialize};
use terminput::{Event, KeyCode, KeyEvent, KeyModifiers};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::output::OutputBuffer;

/// Longest line in bytes. Generous, as `cpr-exec-command` is a whole command line.
pub const MAX_LINE_BYTES: usize = 1 << 16;

/// How many lines the history holds, as in QEMU's monitor.
pub const MAX_HISTORY: usize = 64;

/// Longest key sequence in bytes; what is longer is no key.
const MAX_KEY_BYTES: usize = 32;

const ESCAPE: u8 = 0x1b;

/// What a key asked for beyond editing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The line is finished; the editor is empty again.
    Line(String),
    /// Completion at the cursor is wanted.
    Complete,
}

/// An editor on its way to the next program.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EditorState {
    text: String,
    /// Byte offset of the cursor in `text`.
    cursor: u32,
    history: Vec<String>,
    /// The history entry on show, and the line that was being typed before.
    recalled: Option<(u32, String)>,
    killed: String,
    key: Vec<u8>,
    after_return: bool,
}

/// Edits one line at a time.
#[derive(Debug)]
pub struct Editor {
    prompt: &'static str,
    line: LineBuffer,
    history: VecDeque<String>,
    recalled: Option<(usize, String)>,
    killed: Killed,
    /// Bytes of a key sequence that is not complete.
    key: Vec<u8>,
    /// The last byte was a carriage return: a newline after it belongs to it.
    after_return: bool,
    /// Width of the terminal; unknown on sockets and pipes, where lines are taken to be endless.
    columns: Option<usize>,
}

/// The text that was deleted last, for yanking.
#[derive(Debug, Default)]
struct Killed(String);

impl DeleteListener for Killed {
    fn delete(&mut self, _index: usize, text: &str, _direction: Direction) {
        text.clone_into(&mut self.0);
    }
}

/// For changes that nobody needs to hear of.
struct Silent;

impl DeleteListener for Silent {
    fn delete(&mut self, _index: usize, _text: &str, _direction: Direction) {}
}

impl ChangeListener for Silent {
    fn insert_char(&mut self, _index: usize, _char: char) {}

    fn insert_str(&mut self, _index: usize, _text: &str) {}

    fn replace(&mut self, _index: usize, _old: &str, _new: &str) {}
}

/// What a byte of input amounts to.
enum Key {
    /// More bytes are needed.
    Partial,
    /// No key that exists.
    Unknown,
    /// Text.
    Char(char),
    /// A key with its modifiers.
    Special(KeyEvent),
}

impl Editor {
    /// Starts with an empty line and an empty history. Nothing is drawn yet.
    #[must_use]
    pub fn new(prompt: &'static str) -> Self {
        Self {
            prompt,
            line: LineBuffer::with_capacity(MAX_LINE_BYTES),
            history: VecDeque::new(),
            recalled: None,
            killed: Killed::default(),
            key: Vec::new(),
            after_return: false,
            columns: None,
        }
    }

    /// Tells the width of the terminal in columns (`None` or 0: not a terminal, or unknown), so that long lines are
    /// redrawn over all their rows.
    pub fn set_columns(&mut self, columns: Option<u16>) {
        self.columns = columns.filter(|&columns| columns > 0).map(usize::from);
    }

    /// The line so far.
    #[must_use]
    pub fn text(&self) -> &str {
        self.line.as_str()
    }

    /// The part of the line before the cursor.
    #[must_use]
    pub fn text_before_cursor(&self) -> &str {
        &self.line.as_str()[..self.line.pos()]
    }

    /// Draws the prompt and the line on an empty row.
    pub(crate) fn draw(&self, out: &mut OutputBuffer) {
        out.push(self.prompt.as_bytes());
        self.update(out, "", 0);
    }

    /// Inserts text at the cursor, as completion does. Text that does not fit is left out.
    pub(crate) fn insert(&mut self, text: &str, out: &mut OutputBuffer) {
        self.edit(out, |line, _| {
            line.yank(text, 1, &mut Silent);
        });
    }

    /// Takes one byte of input.
    pub(crate) fn feed(&mut self, byte: u8, out: &mut OutputBuffer) -> Option<Action> {
        let after_return = std::mem::replace(&mut self.after_return, byte == b'\r');
        if byte == b'\n' && after_return {
            return None;
        }
        // A control character inside a sequence cannot be part of one: the sequence was cut short.
        if byte < b' ' && (self.key.len() > 1 || byte == ESCAPE) {
            self.key.clear();
        }
        self.key.push(byte);
        match decode(&self.key) {
            Key::Partial if self.key.len() < MAX_KEY_BYTES => None,
            Key::Partial => {
                self.key.clear();
                None
            }
            Key::Unknown => {
                let cut_short = self.key.len() > 1 && self.key[0] != ESCAPE;
                self.key.clear();
                // An unfinished character, then something else: only the former is lost.
                if cut_short && !is_continuation(byte) { self.feed(byte, out) } else { None }
            }
            Key::Char(char) => {
                self.key.clear();
                self.type_char(char, out);
                None
            }
            Key::Special(key) => {
                self.key.clear();
                self.press(key, out)
            }
        }
    }

    /// What the next program needs to go on with the line.
    #[must_use]
    pub fn save(&self) -> EditorState {
        EditorState {
            text: self.line.as_str().to_owned(),
            cursor: self.line.pos() as u32,
            history: self.history.iter().cloned().collect(),
            recalled: self.recalled.as_ref().map(|(index, text)| (*index as u32, text.clone())),
            killed: self.killed.0.clone(),
            key: self.key.clone(),
            after_return: self.after_return,
        }
    }

    /// Goes on where a predecessor stopped. Nothing is drawn yet. What does not fit this editor's limits is cut.
    #[must_use]
    pub fn restore(prompt: &'static str, state: EditorState) -> Self {
        let mut editor = Self::new(prompt);
        let text = floor(&state.text, MAX_LINE_BYTES);
        editor.line.update(text, floor(text, state.cursor as usize).len(), &mut Silent);
        for line in state.history {
            editor.remember(floor(&line, MAX_LINE_BYTES));
        }
        editor.recalled = state
            .recalled
            .map(|(index, text)| (index as usize, floor(&text, MAX_LINE_BYTES).to_owned()))
            .filter(|(index, _)| *index < editor.history.len());
        floor(&state.killed, MAX_LINE_BYTES).clone_into(&mut editor.killed.0);
        if state.key.len() < MAX_KEY_BYTES {
            editor.key = state.key;
        }
        editor.after_return = state.after_return;
        editor
    }

    fn press(&mut self, key: KeyEvent, out: &mut OutputBuffer) -> Option<Action> {
        let control = key.modifiers.contains(KeyModifiers::CTRL);
        let alt = key.modifiers.contains(KeyModifiers::ALT);
        match key.code {
            KeyCode::Enter => return Some(Action::Line(self.enter(out))),
            KeyCode::Tab => return Some(Action::Complete),
            KeyCode::Char(char) if control => self.control(char, out),
            KeyCode::Char(char) if alt => self.meta(char, out),
            KeyCode::Left if control || alt => self.meta('b', out),
            KeyCode::Right if control || alt => self.meta('f', out),
            KeyCode::Backspace if alt => self.control('w', out),
            KeyCode::Left => self.control('b', out),
            KeyCode::Right => self.control('f', out),
            KeyCode::Home => self.control('a', out),
            KeyCode::End => self.control('e', out),
            KeyCode::Up => self.control('p', out),
            KeyCode::Down => self.control('n', out),
            KeyCode::Backspace => self.control('h', out),
            KeyCode::Delete => self.edit(out, |line, _| {
                line.delete(1, &mut Silent);
            }),
            _ => {}
        }
        None
    }

    /// A control key, by its letter. Ctrl-c and Ctrl-d on an empty line do nothing: neither may end a guest.
    fn control(&mut self, letter: char, out: &mut OutputBuffer) {
        match letter {
            'a' => self.edit(out, |line, _| {
                line.move_home();
            }),
            'e' => self.edit(out, |line, _| {
                line.move_end();
            }),
            'b' => self.edit(out, |line, _| {
                line.move_backward(1);
            }),
            'f' => self.edit(out, |line, _| {
                line.move_forward(1);
            }),
            'h' => self.edit(out, |line, _| {
                line.backspace(1, &mut Silent);
            }),
            'd' => self.edit(out, |line, _| {
                line.delete(1, &mut Silent);
            }),
            'k' => self.edit(out, |line, killed| {
                line.kill_line(killed);
            }),
            'u' => self.edit(out, |line, killed| {
                line.discard_line(killed);
            }),
            'w' => self.edit(out, |line, killed| {
                line.delete_prev_word(Word::Big, 1, killed);
            }),
            't' => self.edit(out, |line, _| {
                line.transpose_chars(&mut Silent);
            }),
            'y' => {
                let text = self.killed.0.clone();
                self.insert(&text, out);
            }
            'l' => {
                out.push(b"\x1b[H\x1b[2J");
                self.draw(out);
            }
            'p' => self.recall(true, out),
            'n' => self.recall(false, out),
            _ => {}
        }
    }

    /// A key with Alt (or after Escape), by its letter.
    fn meta(&mut self, letter: char, out: &mut OutputBuffer) {
        match letter {
            'b' => self.edit(out, |line, _| {
                line.move_to_prev_word(Word::Emacs, 1);
            }),
            'f' => self.edit(out, |line, _| {
                line.move_to_next_word(At::AfterEnd, Word::Emacs, 1);
            }),
            'd' => self.edit(out, |line, killed| {
                line.delete_word(At::AfterEnd, Word::Emacs, 1, killed);
            }),
            _ => {}
        }
    }

    fn type_char(&mut self, char: char, out: &mut OutputBuffer) {
        if char.width().is_none() {
            return;
        }
        if !self.line.is_cursor_at_end() {
            return self.edit(out, |line, _| {
                line.insert(char, 1, &mut Silent);
            });
        }
        // The common case without a look at the whole line: only the new character is drawn.
        let length = self.line.len();
        if self.line.insert(char, 1, &mut Silent).is_some() {
            out.push(&self.line.as_str().as_bytes()[length..]);
            self.wrap(out);
        }
    }

    fn enter(&mut self, out: &mut OutputBuffer) -> String {
        self.edit(out, |line, _| {
            line.move_end();
        });
        out.push(b"\r\n");
        let text = self.line.as_str().to_owned();
        self.line.update("", 0, &mut Silent);
        self.recalled = None;
        self.remember(&text);
        text
    }

    /// Adds a line to the history, once: an equal one moves to the end.
    fn remember(&mut self, text: &str) {
        if text.trim().is_empty() {
            return;
        }
        self.history.retain(|line| line != text);
        self.history.push_back(text.to_owned());
        if self.history.len() > MAX_HISTORY {
            self.history.pop_front();
        }
    }

    /// Shows the previous (`older`) or next line of the history.
    fn recall(&mut self, older: bool, out: &mut OutputBuffer) {
        let index = match (&self.recalled, older) {
            (None, true) => self.history.len().checked_sub(1),
            (None, false) => return,
            (Some((index, _)), true) => index.checked_sub(1),
            (Some((index, _)), false) => Some(index + 1),
        };
        let Some(index) = index else { return };
        let text = match (self.history.get(index), self.recalled.take()) {
            (Some(entry), recalled) => {
                let typed = recalled.map_or_else(|| self.line.as_str().to_owned(), |(_, typed)| typed);
                self.recalled = Some((index, typed));
                entry.clone()
            }
            // Past the newest entry: back to what was being typed.
            (None, Some((_, typed))) => typed,
            (None, None) => return,
        };
        self.edit(out, |line, _| line.update(&text, text.len(), &mut Silent));
    }

    /// Changes the line and draws the difference.
    fn edit(&mut self, out: &mut OutputBuffer, change: impl FnOnce(&mut LineBuffer, &mut Killed)) {
        let (old, cursor) = (self.line.as_str().to_owned(), self.line.pos());
        change(&mut self.line, &mut self.killed);
        self.update(out, &old, cursor);
    }

    /// Turns a drawing of `old` with the cursor at byte `cursor` into one of the line as it is now.
    fn update(&self, out: &mut OutputBuffer, old: &str, cursor: usize) {
        let new = self.line.as_str();
        let common =
            old.chars().zip(new.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        let mut at = self.cell(&old[..cursor]);
        if old.len() > common || new.len() > common {
            self.go(out, at, self.cell(&old[..common]));
            out.push(&new.as_bytes()[common..]);
            if new.len() > common {
                self.wrap(out);
            }
            if self.cell(old) > self.cell(new) || old.len() > common {
                out.push(if self.columns.is_some() { b"\x1b[J" } else { b"\x1b[K" });
            }
            at = self.cell(new);
        }
        self.go(out, at, self.cell(&new[..self.line.pos()]));
    }

    /// Number of the terminal cell right after `text`, counted from the start of the prompt.
    fn cell(&self, text: &str) -> usize {
        self.prompt.width() + text.width()
    }

    /// After printing up to the end of the line: a terminal that just filled its last column stays there until the
    /// next character; pushes it to where [`go`](Self::go) takes it to be.
    fn wrap(&self, out: &mut OutputBuffer) {
        if self.columns.is_some_and(|columns| self.cell(self.line.as_str()).is_multiple_of(columns)) {
            out.push(b"\r\n");
        }
    }

    /// Moves the terminal's cursor from one cell to another.
    fn go(&self, out: &mut OutputBuffer, from: usize, to: usize) {
        let (from, to) = match self.columns {
            Some(columns) => ((from / columns, from % columns), (to / columns, to % columns)),
            None => ((0, from), (0, to)),
        };
        let mut by = |count: usize, letter: char| match count {
            0 => {}
            1 => out.push(format!("\x1b[{letter}").as_bytes()),
            _ => out.push(format!("\x1b[{count}{letter}").as_bytes()),
        };
        by(from.0.saturating_sub(to.0), 'A');
        by(to.0.saturating_sub(from.0), 'B');
        by(from.1.saturating_sub(to.1), 'D');
        by(to.1.saturating_sub(from.1), 'C');
    }
}

/// Understands a byte sequence as one key.
fn decode(bytes: &[u8]) -> Key {
    match bytes {
        // Escape alone is the start of a sequence or stands for Alt, however long the next byte takes.
        [ESCAPE] => return Key::Partial,
        [b'\n'] => return Key::Special(KeyCode::Enter.into()),
        _ if is_mouse_report(bytes) => return Key::Unknown,
        _ => {}
    }
    match Event::parse_from(bytes) {
        Ok(None) => Key::Partial,
        Ok(Some(Event::Key(key))) => match key.code {
            KeyCode::Char(char) if !key.modifiers.intersects(KeyModifiers::CTRL | KeyModifiers::ALT) => {
                Key::Char(char)
            }
            _ => Key::Special(key),
        },
        Ok(Some(_)) | Err(_) => Key::Unknown,
    }
}

/// Whether a byte sequence says what the mouse did, in the forms of xterm (`ESC [ < ... M` or `m`) and rxvt (`ESC [ ... M`).
/// No key is like that, and terminput trusts the numbers in it.
fn is_mouse_report(bytes: &[u8]) -> bool {
    match bytes {
        [ESCAPE, b'[', b'<', .., last] => matches!(last, b'M' | b'm'),
        [ESCAPE, b'[', b'0'..=b'9', .., last] => *last == b'M',
        _ => false,
    }
}

/// Whether a byte goes on with a character of UTF-8.
fn is_continuation(byte: u8) -> bool {
    (0x80..0xc0).contains(&byte)
}

/// The longest prefix of `text` of at most `bytes` bytes that ends with a whole character.
fn floor(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::monitor::testing::persisted;

    const PROMPT: &str = "> ";

    /// A terminal that understands what the editor draws.
    struct Screen {
        columns: usize,
        rows: Vec<Vec<char>>,
        row: usize,
        column: usize,
    }

    impl Screen {
        fn new(columns: usize) -> Self {
            Self { columns, rows: vec![vec![]], row: 0, column: 0 }
        }

        fn show(columns: usize, bytes: &[u8]) -> Self {
            let mut screen = Self::new(columns);
            screen.print(std::str::from_utf8(bytes).unwrap());
            screen
        }

        fn print(&mut self, text: &str) {
            let mut chars = text.chars();
            while let Some(char) = chars.next() {
                match char {
                    '\r' => self.column = 0,
                    '\n' => self.row += 1,
                    '\x1b' => {
                        assert_eq!(chars.next(), Some('['));
                        let mut count = 0;
                        let letter = loop {
                            match chars.next().unwrap() {
                                digit @ '0'..='9' => {
                                    count = count * 10 + digit.to_digit(10).unwrap() as usize
                                }
                                letter => break letter,
                            }
                        };
                        let by = count.max(1);
                        match letter {
                            'A' => self.row -= by,
                            'B' => self.row += by,
                            'C' => self.column += by,
                            'D' => self.column -= by,
                            'K' => self.rows[self.row].truncate(self.column),
                            'J' => {
                                self.rows.truncate(self.row + 1);
                                self.rows[self.row].truncate(self.column);
                            }
                            _ => panic!("unknown sequence {letter}"),
                        }
                    }
                    char => {
                        if self.column == self.columns {
                            self.row += 1;
                            self.column = 0;
                        }
                        self.grow();
                        let row = &mut self.rows[self.row];
                        row.resize(row.len().max(self.column + 1), ' ');
                        row[self.column] = char;
                        self.column += 1;
                    }
                }
                self.grow();
            }
        }

        fn grow(&mut self) {
            self.rows.resize(self.rows.len().max(self.row + 1), vec![]);
        }

        fn text(&self) -> String {
            self.rows.iter().flatten().collect()
        }

        fn cell(&self) -> usize {
            self.row * self.columns + self.column
        }
    }

    fn type_in(editor: &mut Editor, keys: &[u8]) -> (Vec<Action>, Vec<u8>) {
        let mut out = OutputBuffer::default();
        let actions = keys.iter().filter_map(|byte| editor.feed(*byte, &mut out)).collect();
        (actions, out.pending().to_vec())
    }

    /// Types keys into a new editor; the text with `|` at the cursor.
    fn typed(keys: &str) -> String {
        let mut editor = Editor::new(PROMPT);
        type_in(&mut editor, keys.as_bytes());
        shown(&editor)
    }

    fn shown(editor: &Editor) -> String {
        let before = editor.text_before_cursor();
        format!("{before}|{}", &editor.text()[before.len()..])
    }

    #[test]
    fn emacs_keys() {
        for (keys, expected) in [
            ("abc", "abc|"),
            ("abc\x01x", "x|abc"),
            ("abc\x01\x05x", "abcx|"),
            ("abc\x02\x02x\x06y", "axby|c"),
            ("abc\x1b[D\x1bOD\x1b[Cx", "abx|c"),
            ("abc\x1b[Hx\x1b[Fy", "xabcy|"),
            ("abc\x1b[1~x\x1b[4~y", "xabcy|"),
            ("abc\x7f\x08", "a|"),
            ("abc\x01\x04\x1b[3~", "|c"),
            ("abc\x02\x0b", "ab|"),
            ("abc\x02\x15", "|c"),
            ("ab cd\x17", "ab |"),
            ("ab cd\x15\x19\x19", "ab cdab cd|"),
            ("ab cd\x1bbx", "ab x|cd"),
            ("ab cd\x01\x1bfx", "abx| cd"),
            ("ab cd\x1b[1;5Dx", "ab x|cd"),
            ("ab cd\x1b\x7f", "ab |"),
            ("ab cd\x01\x1bd", "| cd"),
            ("ab\x14", "ba|"),
            ("\x04\x03a", "a|"),
            ("é\x08日\x02x", "x|日"),
            ("a\x1bPb", "ab|"),
            ("a\x1b[999b", "a|"),
            ("a\x1b[\x01b", "b|a"),
        ] {
            assert_eq!(typed(keys), expected, "{keys:?}");
        }
    }

    #[test]
    fn mouse_reports_are_no_keys() {
        // Nobody asked the terminal for them. Places count from 1; these say 0, or no place at all.
        for report in ["\x1b[<0;0;1M", "\x1b[<0;1;0m", "\x1b[<M", "\x1b[32;0;1M", "\x1b[32;1;0M", "\x1b[M !!"]
        {
            assert_eq!(typed(&format!("a{report}b")), "ab|", "{report:?}");
        }
    }

    #[test]
    fn bad_utf8_is_left_out() {
        let mut editor = Editor::new(PROMPT);
        type_in(&mut editor, b"a\xc3b\xff\x80c");
        assert_eq!(editor.text(), "abc");
    }

    #[test]
    fn line_ends() {
        for (keys, count) in
            [("a\n", 1), ("a\r", 1), ("a\r\n", 1), ("a\r\r\n\n", 3), ("\n\n", 2), ("a\x1b\r", 1)]
        {
            let mut editor = Editor::new(PROMPT);
            let (actions, out) = type_in(&mut editor, keys.as_bytes());
            assert_eq!(actions.len(), count, "{keys:?}");
            assert!(out.ends_with(b"\r\n"));
        }
    }

    #[test]
    fn plain_typing_echoes_plainly() {
        let mut editor = Editor::new(PROMPT);
        let (actions, out) = type_in(&mut editor, b"info status\n");
        assert_eq!(actions, [Action::Line("info status".into())]);
        assert_eq!(out, b"info status\r\n");
    }

    #[test]
    fn history() {
        let mut editor = Editor::new(PROMPT);
        type_in(&mut editor, b"one\ntwo\none\n\n  \nthree\nty");
        for (keys, expected) in [
            ("\x10", "three|"),
            ("\x1b[A", "one|"),
            ("\x10", "two|"),
            ("\x10", "two|"),
            ("\x0e", "one|"),
            ("\x1b[B\x0e", "ty|"),
            ("\x0e", "ty|"),
        ] {
            type_in(&mut editor, keys.as_bytes());
            assert_eq!(shown(&editor), expected, "{keys:?}");
        }
        for line in 0..100 {
            type_in(&mut editor, format!("\x15{line}\n").as_bytes());
        }
        assert_eq!(editor.history.len(), MAX_HISTORY);
        assert_eq!(editor.history[0], "36");
    }

    #[test]
    fn the_line_is_bounded() {
        let mut editor = Editor::new(PROMPT);
        let long = vec![b'x'; MAX_LINE_BYTES + 10];
        let (_, out) = type_in(&mut editor, &long);
        assert!(editor.text().len() >= MAX_LINE_BYTES && editor.text().len() < long.len());
        assert_eq!(out.len(), editor.text().len());
        assert!(matches!(&type_in(&mut editor, b"\x01y\n").0[..], [Action::Line(_)]));
    }

    #[test]
    fn a_restored_editor_redraws() {
        let mut editor = Editor::new(PROMPT);
        type_in(&mut editor, b"old\nhalf line\x02\x02\x1b[");
        let editor = Editor::restore(PROMPT, persisted(&editor.save()));
        let mut out = OutputBuffer::default();
        editor.draw(&mut out);
        assert_eq!(out.pending(), b"> half line\x1b[2D");
        let mut editor = editor;
        type_in(&mut editor, b"D");
        assert_eq!(shown(&editor), "half l|ine");
        type_in(&mut editor, b"\x10");
        assert_eq!(editor.text(), "old");
    }

    #[test]
    fn odd_states_are_cut_to_fit() {
        let state = EditorState {
            text: "é".repeat(MAX_LINE_BYTES),
            cursor: 3,
            history: vec!["x".into(); 1000],
            recalled: Some((9, "y".into())),
            key: vec![b'['; 1000],
            ..EditorState::default()
        };
        let mut editor = Editor::restore(PROMPT, state);
        assert_eq!(editor.text_before_cursor(), "é");
        assert_eq!(editor.text().len(), MAX_LINE_BYTES);
        type_in(&mut editor, b"\x10\x0e\x0e");

        // Longer than a line can be, and with a character across the limit.
        let long = format!("x{}", "é".repeat(MAX_LINE_BYTES));
        let state = EditorState {
            history: vec![long.clone()],
            recalled: Some((0, long.clone())),
            killed: long,
            ..EditorState::default()
        };
        let mut editor = Editor::restore(PROMPT, state);
        type_in(&mut editor, b"\x0e");
        assert_eq!(editor.text().len(), MAX_LINE_BYTES - 1);
        type_in(&mut editor, b"\x10");
        assert_eq!(editor.text().len(), MAX_LINE_BYTES - 1);
        type_in(&mut editor, b"\x15\x19");
        assert_eq!(editor.save().killed.len(), MAX_LINE_BYTES - 1);
    }

    /// Keys that matter to the editor, in any order.
    fn keys() -> impl Strategy<Value = Vec<u8>> {
        let key = prop_oneof![
            4 => "[a-z é日]".prop_map(String::into_bytes),
            1 => prop::sample::select(vec![
                "\x01", "\x02", "\x05", "\x06", "\x08", "\x04", "\x0b", "\x15", "\x17", "\x19", "\x14", "\x10",
                "\x0e", "\r", "\n", "\x1b[A", "\x1b[D", "\x1b[3~", "\x1bb", "\x1bf", "\x1bd", "\x1b[1;5C", "\x7f",
            ]).prop_map(|key| key.as_bytes().to_vec()),
            1 => any::<u8>().prop_filter("clears the screen", |byte| *byte != 0x0c).prop_map(|byte| vec![byte]),
        ];
        prop::collection::vec(key, 0..60).prop_map(|keys| keys.concat())
    }

    proptest! {
        #[test]
        fn saving_at_every_byte_changes_nothing(keys in keys()) {
            let mut straight = Editor::new(PROMPT);
            let whole = type_in(&mut straight, &keys);
            let mut editor = Editor::new(PROMPT);
            let (mut actions, mut drawn) = (vec![], vec![]);
            for key in &keys {
                let (more_actions, more_drawn) = type_in(&mut editor, &[*key]);
                actions.extend(more_actions);
                drawn.extend(more_drawn);
                editor = Editor::restore(PROMPT, persisted(&editor.save()));
            }
            prop_assert_eq!(whole, (actions, drawn));
            prop_assert_eq!(straight.save(), editor.save());
        }

        /// What the user sees is the line, whatever was typed and however narrow the terminal.
        #[test]
        fn the_screen_shows_the_line(keys in keys(), columns in 3_u16..40) {
            // Narrow characters only: the screen above has no notion of others.
            let keys: Vec<u8> = keys.into_iter().filter(|byte| byte.is_ascii() && !matches!(byte, b'\r' | b'\n')).collect();
            for columns in [Some(columns), None] {
                let mut editor = Editor::new(PROMPT);
                editor.set_columns(columns);
                let mut out = OutputBuffer::default();
                editor.draw(&mut out);
                for byte in &keys {
                    editor.feed(*byte, &mut out);
                }
                let screen = Screen::show(columns.map_or(100_000, usize::from), out.pending());
                prop_assert_eq!(screen.text(), format!("{PROMPT}{}", editor.text()));
                prop_assert_eq!(screen.cell(), PROMPT.len() + editor.text_before_cursor().len());
            }
        }

        #[test]
        fn any_state_is_survived(bytes: Vec<u8>, keys: Vec<u8>) {
            if let Ok(state) = postcard::from_bytes::<EditorState>(&bytes) {
                type_in(&mut Editor::restore(PROMPT, state), &keys);
            }
        }
    }
}
