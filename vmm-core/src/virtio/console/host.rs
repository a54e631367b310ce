//! The host's end of a port: what the program tells the device, and the input that waits for the guest.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oslib::eventfd::EventFd;

/// Input that waits for the guest, in bytes. What is more stays with whoever brings it.
pub const INBOX_LEN: usize = 16 << 10;

/// Columns and rows of a terminal. Zeros: unknown.
pub type Size = (u16, u16);

/// What connects a port to the program, whose main loop brings input on one thread while another one serves the device.
/// Clones are the same end.
#[derive(Debug, Clone)]
pub struct HostEnd(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Readable once there is something for the device to look at.
    news: EventFd,
    /// Readable once there is room for input that was turned away.
    room: EventFd,
}

#[derive(Debug, Default)]
struct State {
    input: VecDeque<u8>,
    /// Input was turned away.
    turned_away: bool,
    presence: Presence,
    size: Size,
}

/// Who is at the other end of a port's character device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Presence {
    pub(super) connected: bool,
    /// Somebody went away since the device looked last, and another one may have come.
    pub(super) left: bool,
}

impl HostEnd {
    /// An end that nobody is connected to.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn new() -> io::Result<HostEnd> {
        let shared = Shared { state: Mutex::default(), news: EventFd::new()?, room: EventFd::new()? };
        Ok(HostEnd(Arc::new(shared)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives input to the guest; returns how many bytes there was room for. If that is not all, [`room`](Self::room) tells
    /// when there is more.
    pub fn put(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        let taken = bytes.len().min(INBOX_LEN.saturating_sub(state.input.len()));
        state.input.extend(&bytes[..taken]);
        state.turned_away |= taken < bytes.len();
        drop(state);
        if taken > 0 {
            self.ring();
        }
        taken
    }

    /// Readable once there is room for input that [`put`](Self::put) turned away. To be drained then.
    pub fn room(&self) -> &EventFd {
        &self.0.room
    }

    /// Says whether somebody is at the other end of the character device.
    pub fn set_connected(&self, connected: bool) {
        let mut state = self.lock();
        let presence = state.presence;
        state.presence = Presence { connected, left: presence.left || (presence.connected && !connected) };
        let changed = state.presence != presence;
        drop(state);
        if changed {
            self.ring();
        }
    }

    /// Says how large the terminal is.
    pub fn set_size(&self, size: Size) {
        let changed = std::mem::replace(&mut self.lock().size, size) != size;
        if changed {
            self.ring();
        }
    }

    /// Readable once the device is to look at this end.
    pub(super) fn news(&self) -> &EventFd {
        &self.0.news
    }

    /// Makes the device look at this end.
    pub(super) fn ring(&self) {
        signal(&self.0.news);
    }

    /// Takes note of who came and went.
    pub(super) fn look(&self) -> Presence {
        let mut state = self.lock();
        let presence = state.presence;
        state.presence.left = false;
        presence
    }

    pub(super) fn size(&self) -> Size {
        self.lock().size
    }

    pub(super) fn has_input(&self) -> bool {
        !self.lock().input.is_empty()
    }

    /// Takes as much input as there is, at most `limit` bytes.
    pub(super) fn take(&self, limit: usize) -> Vec<u8> {
        let mut state = self.lock();
        let count = limit.min(state.input.len());
        let taken = state.input.drain(..count).collect();
        let told = count > 0 && std::mem::take(&mut state.turned_away);
        drop(state);
        if told {
            signal(&self.0.room);
        }
        taken
    }

    /// A copy of the input that waits.
    pub(super) fn waiting(&self) -> Vec<u8> {
        self.lock().input.iter().copied().collect()
    }

    /// Input from before an update, which comes before everything else.
    pub(super) fn put_first(&self, bytes: &[u8]) {
        let mut state = self.lock();
        let later = std::mem::replace(&mut state.input, bytes.to_vec().into());
        state.input.extend(later);
    }
}

fn signal(event: &EventFd) {
    // Of a descriptor of our own that never blocks.
    if let Err(error) = event.signal() {
        tracing::error!(%error, "a console's eventfd cannot be signalled");
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn is_ready(event: &EventFd) -> bool {
        event.wait(Duration::ZERO).unwrap()
    }

    #[test]
    fn who_was_turned_away_is_told_of_room_once() {
        let end = HostEnd::new().unwrap();
        assert_eq!(end.put(&[1; INBOX_LEN - 1]), INBOX_LEN - 1);
        assert!(is_ready(end.news()) && !is_ready(end.room()));
        assert_eq!(end.put(&[2; 3]), 1);
        assert_eq!(end.put(b"x"), 0);
        assert!(!is_ready(end.room()));
        assert_eq!(end.take(2), [1, 1]);
        assert_eq!(end.room().drain().unwrap(), 1);
        assert_eq!(end.put(&[3; 2]), 2);
        end.take(INBOX_LEN);
        assert!(!is_ready(end.room()), "nobody was turned away");
    }

    #[test]
    fn news_are_what_changes() {
        let end = HostEnd::new().unwrap();
        end.set_connected(false);
        end.set_size((0, 0));
        end.put(b"");
        assert!(!is_ready(end.news()));
        end.set_connected(true);
        end.set_size((80, 25));
        assert_eq!(end.news().drain().unwrap(), 2);
        end.set_connected(false);
        end.set_connected(true);
        assert_eq!(end.look(), Presence { connected: true, left: true });
        assert_eq!(end.look(), Presence { connected: true, left: false });
    }
}
