//! Cuts a stream of bytes into top-level JSON values, and finds the way back after garbage.
//!
//! Only brackets and strings are looked at, once per byte, so that a request that trickles in costs no more than one
//! that comes at once; serde_json then judges the value. As in QEMU's streamer, what is not JSON costs the client one
//! error and not the connection: reading goes on at the next bracket or line.

use serde::{Deserialize, Serialize};

/// Size limit of one request in bytes.
pub(crate) const MAX_REQUEST_BYTES: usize = 1 << 20;

/// What the stream held next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// The text of a value with balanced brackets.
    Value(Vec<u8>),
    /// Bytes that were skipped, and why.
    Garbage(&'static str),
}

/// How far a value under way has been read.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Nesting {
    depth: u32,
    in_string: bool,
    escaped: bool,
}

/// What one byte did to a value.
enum Step {
    Inside,
    Complete,
    Invalid,
}

impl Nesting {
    fn step(&mut self, byte: u8) -> Step {
        // Bytes that no UTF-8 text holds; clients send 0xFF to get out of whatever state the reader is in.
        let impossible = byte >= 0xF8 || (byte < b' ' && (self.in_string || !byte.is_ascii_whitespace()));
        if impossible {
            return Step::Invalid;
        }
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return Step::Inside;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth = self.depth.saturating_add(1),
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                if self.depth == 0 {
                    return Step::Complete;
                }
            }
            _ => {}
        }
        Step::Inside
    }
}

/// Whether a byte outside of values ends garbage: the end of a line, or what no text holds.
fn resynchronises(byte: u8) -> bool {
    !(b' '..0xF8).contains(&byte)
}

/// Where in the grammar of the stream the reader is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Mode {
    /// Between values.
    #[default]
    Idle,
    /// In a value that is being kept.
    Value(Nesting),
    /// In a value that is too big, with its error already given.
    Oversized(Nesting),
    /// After garbage: until a bracket opens or a line ends.
    Recovering,
}

/// See the module's doc.
#[derive(Debug, Default)]
pub(crate) struct Framer {
    input: Vec<u8>,
    /// Start of the value under way, or of what nobody looked at.
    start: usize,
    /// First byte that nobody looked at.
    scanned: usize,
    mode: Mode,
}

/// A framer on its way to the next program.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FramerState {
    mode: Mode,
    input: Vec<u8>,
}

impl Framer {
    /// Appends input.
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.input.drain(..self.start);
            self.scanned -= self.start;
            self.start = 0;
        }
        self.input.extend_from_slice(bytes);
    }

    /// How many bytes wait for [`next`](Self::next) to look at them.
    pub(crate) fn backlog(&self) -> usize {
        self.input.len() - self.scanned
    }

    /// The next value or piece of garbage, if the input so far holds one whole.
    pub(crate) fn next(&mut self) -> Option<Frame> {
        while let Some(&byte) = self.input.get(self.scanned) {
            let opens = matches!(byte, b'{' | b'[');
            match &mut self.mode {
                Mode::Idle if opens => {
                    self.start = self.scanned;
                    self.mode = Mode::Value(Nesting::default());
                    continue;
                }
                Mode::Idle => {
                    self.skip();
                    if !byte.is_ascii_whitespace() {
                        self.mode = if resynchronises(byte) { Mode::Idle } else { Mode::Recovering };
                        return Some(Frame::Garbage("Invalid JSON syntax"));
                    }
                }
                Mode::Recovering if opens => self.mode = Mode::Idle,
                Mode::Recovering => {
                    self.skip();
                    if resynchronises(byte) {
                        self.mode = Mode::Idle;
                    }
                }
                Mode::Value(nesting) => {
                    self.scanned += 1;
                    match nesting.step(byte) {
                        Step::Inside if self.scanned - self.start > MAX_REQUEST_BYTES => {
                            self.mode = Mode::Oversized(*nesting);
                            self.start = self.scanned;
                            return Some(Frame::Garbage("JSON token size limit exceeded"));
                        }
                        Step::Inside => {}
                        Step::Complete => {
                            let value = self.input[self.start..self.scanned].to_vec();
                            self.start = self.scanned;
                            self.mode = Mode::Idle;
                            return Some(Frame::Value(value));
                        }
                        Step::Invalid => {
                            self.start = self.scanned;
                            self.mode = Mode::Idle;
                            return Some(Frame::Garbage("Invalid JSON syntax"));
                        }
                    }
                }
                Mode::Oversized(nesting) => {
                    let step = nesting.step(byte);
                    self.skip();
                    if !matches!(step, Step::Inside) {
                        self.mode = Mode::Idle;
                    }
                }
            }
        }
        None
    }

    /// Drops the byte under way.
    fn skip(&mut self) {
        self.scanned += 1;
        self.start = self.scanned;
    }

    /// What the next program needs to go on reading.
    pub(crate) fn save(&self) -> FramerState {
        // A value under way is read again from its first byte.
        let mode = if matches!(self.mode, Mode::Value(_)) { Mode::Idle } else { self.mode };
        FramerState { mode, input: self.input[self.start..].to_vec() }
    }

    /// Goes on where a predecessor stopped. Any state is a valid one.
    pub(crate) fn restore(state: FramerState) -> Self {
        let mode = if matches!(state.mode, Mode::Value(_)) { Mode::Idle } else { state.mode };
        Self { input: state.input, start: 0, scanned: 0, mode }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames(framer: &mut Framer) -> Vec<Frame> {
        std::iter::from_fn(|| framer.next()).collect()
    }

    fn all(input: &[u8]) -> Vec<Frame> {
        let mut framer = Framer::default();
        framer.feed(input);
        frames(&mut framer)
    }

    fn value(text: &str) -> Frame {
        Frame::Value(text.into())
    }

    #[test]
    fn values() {
        assert_eq!(all(b" {\"a\": [1, {}]}\r\n[]{"), [value("{\"a\": [1, {}]}"), value("[]")]);
        assert_eq!(all(br#"{"a": "}\"]\\"}"#), [value(r#"{"a": "}\"]\\"}"#)]);
    }

    #[test]
    fn garbage_costs_one_error() {
        let syntax = || Frame::Garbage("Invalid JSON syntax");
        assert_eq!(all(b"hello world\n{}"), [syntax(), value("{}")]);
        assert_eq!(all(b"oops {}"), [syntax(), value("{}")]);
        assert_eq!(all(b"{\"a\": \"x\n{}"), [syntax(), value("{}")]);
        assert_eq!(all(b"{\"a\": \xff{}"), [syntax(), value("{}")]);
        assert_eq!(all(b"\xff{}"), [syntax(), value("{}")]);
    }

    #[test]
    fn too_big_is_skipped_whole() {
        let mut framer = Framer::default();
        framer.feed(b"{\"a\": \"");
        let chunk = vec![b'}'; 100_000];
        let mut seen = Vec::new();
        for _ in 0..30 {
            framer.feed(&chunk);
            seen.extend(frames(&mut framer));
            assert!(framer.input.len() <= MAX_REQUEST_BYTES + chunk.len());
        }
        framer.feed(b"\"} {\"b\": 1}");
        seen.extend(frames(&mut framer));
        assert_eq!(seen, [Frame::Garbage("JSON token size limit exceeded"), value("{\"b\": 1}")]);
    }

    /// Bytes that are dense in what matters to the framer.
    fn stream() -> impl Strategy<Value = Vec<u8>> {
        let token = prop_oneof![
            Just(b"{\"execute\":\"stop\"}".to_vec()),
            prop::sample::select(&b"{}[]\"\\ \n,:a1\xff\xc3\xa9"[..]).prop_map(|byte| vec![byte]),
            any::<u8>().prop_map(|byte| vec![byte]),
        ];
        prop::collection::vec(token, 0..40).prop_map(|tokens| tokens.concat())
    }

    proptest! {
        #[test]
        fn chunking_and_saving_change_nothing(input in stream()) {
            let whole = all(&input);
            let mut framer = Framer::default();
            let mut pieces = Vec::new();
            for byte in &input {
                framer.feed(&[*byte]);
                pieces.extend(frames(&mut framer));
                framer = Framer::restore(framer.save());
            }
            prop_assert_eq!(whole, pieces);
        }
    }
}
