//! Several front ends on one terminal, as with `-serial mon:stdio`: input goes to one of them, and Ctrl-a is the way
//! to the others and out.
//!
//! This sorts bytes and nothing else; who reads which front end's input is the main loop's business. The keys are
//! those of QEMU's multiplexed character device.

use serde::{Deserialize, Serialize};

/// Ctrl-a.
const ESCAPE: u8 = 0x01;

/// What Ctrl-a h shows.
pub const HELP: &str = "\r\n\
    Ctrl-a h    show this help\r\n\
    Ctrl-a x    end cpr-vmm\r\n\
    Ctrl-a b    send a break to the guest\r\n\
    Ctrl-a c    switch between serial console and monitor\r\n\
    Ctrl-a Ctrl-a  send Ctrl-a\r\n";

/// What Ctrl-a x shows.
pub const TERMINATED: &str = "cpr-vmm: Terminated\r\n";

/// What a piece of input means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Bytes for the front end of that number.
    Input {
        /// Index of the front end.
        front_end: usize,
        /// Never empty.
        bytes: Vec<u8>,
    },
    /// The terminal now belongs to another front end.
    Switched {
        /// The one that lost it.
        from: usize,
        /// The one that has it now.
        to: usize,
    },
    /// Print [`HELP`].
    Help,
    /// Print [`TERMINATED`] and end the program.
    Terminate,
    /// A break condition for that front end, to be ignored by those that know none.
    Break {
        /// Index of the front end.
        front_end: usize,
    },
}

/// The multiplexer; it is its own saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mux {
    front_ends: u8,
    focus: u8,
    escaped: bool,
}

impl Mux {
    /// Shares a terminal among `front_ends` of them (at least one); the first has it to begin with.
    #[must_use]
    pub fn new(front_ends: u8) -> Self {
        Self { front_ends: front_ends.max(1), focus: 0, escaped: false }
    }

    /// Goes on where a predecessor stopped. A state of more or fewer front ends gives the terminal to the first.
    #[must_use]
    pub fn restore(state: Self, front_ends: u8) -> Self {
        let mut mux = Self::new(front_ends);
        mux.escaped = state.escaped;
        if state.front_ends == mux.front_ends && state.focus < mux.front_ends {
            mux.focus = state.focus;
        }
        mux
    }

    /// The front end that has the terminal.
    #[must_use]
    pub fn focus(&self) -> usize {
        self.focus.into()
    }

    /// Sorts a piece of input.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        for &byte in bytes {
            if !std::mem::take(&mut self.escaped) {
                if byte == ESCAPE {
                    self.escaped = true;
                } else {
                    self.pass(byte, &mut events);
                }
                continue;
            }
            match byte {
                ESCAPE => self.pass(byte, &mut events),
                b'h' | b'?' => events.push(Event::Help),
                b'x' => events.push(Event::Terminate),
                b'b' => events.push(Event::Break { front_end: self.focus() }),
                b'c' if self.front_ends > 1 => {
                    let from = self.focus();
                    self.focus = (self.focus + 1) % self.front_ends;
                    events.push(Event::Switched { from, to: self.focus() });
                }
                _ => {}
            }
        }
        events
    }

    fn pass(&self, byte: u8, events: &mut Vec<Event>) {
        if let Some(Event::Input { front_end, bytes }) = events.last_mut()
            && *front_end == self.focus()
        {
            bytes.push(byte);
            return;
        }
        events.push(Event::Input { front_end: self.focus(), bytes: vec![byte] });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::monitor::testing::persisted;

    fn input(front_end: usize, bytes: &[u8]) -> Event {
        Event::Input { front_end, bytes: bytes.to_vec() }
    }

    #[test]
    fn escapes() {
        let mut mux = Mux::new(2);
        assert_eq!(
            mux.feed(b"ab\x01cinfo\n\x01c\x01\x01\x01zd\x01h\x01b\x01x"),
            [
                input(0, b"ab"),
                Event::Switched { from: 0, to: 1 },
                input(1, b"info\n"),
                Event::Switched { from: 1, to: 0 },
                input(0, b"\x01d"),
                Event::Help,
                Event::Break { front_end: 0 },
                Event::Terminate,
            ]
        );
        assert_eq!(Mux::new(1).feed(b"\x01ca"), [input(0, b"a")]);
    }

    #[test]
    fn odd_states_give_the_first_the_terminal() {
        let state = Mux { front_ends: 9, focus: 200, escaped: true };
        let mut mux = Mux::restore(state, 2);
        assert_eq!(mux.feed(b"\x01"), [input(0, b"\x01")]);
    }

    proptest! {
        #[test]
        fn saving_at_every_byte_changes_nothing(bytes in prop::collection::vec(prop::sample::select(&b"\x01cxhab"[..]), 0..40)) {
            let mut straight = Mux::new(2);
            let whole = straight.feed(&bytes);
            let mut mux = Mux::new(2);
            let mut pieces: Vec<Event> = Vec::new();
            for byte in &bytes {
                for event in mux.feed(&[*byte]) {
                    match (pieces.last_mut(), event) {
                        (
                            Some(Event::Input { front_end, bytes }),
                            Event::Input { front_end: same, bytes: more },
                        ) if *front_end == same => bytes.extend(more),
                        (_, event) => pieces.push(event),
                    }
                }
                mux = Mux::restore(persisted(&mux), 2);
            }
            prop_assert_eq!(whole, pieces);
            prop_assert_eq!(straight, mux);
        }
    }
}
