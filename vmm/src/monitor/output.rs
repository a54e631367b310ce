//! Bytes on their way to a monitor's peer.

/// A queue of bytes that is appended at one end and written out, perhaps in parts, at the other.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct OutputBuffer {
    bytes: Vec<u8>,
    /// How many of `bytes` are already delivered.
    delivered: usize,
}

impl OutputBuffer {
    /// Starts with bytes that were not delivered by a predecessor.
    pub(crate) fn from_pending(bytes: Vec<u8>) -> Self {
        Self { bytes, delivered: 0 }
    }

    /// Queues bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Queues text for a terminal: every newline becomes carriage return and newline.
    pub(crate) fn push_text(&mut self, text: &str) {
        for (index, line) in text.split('\n').enumerate() {
            if index > 0 {
                self.push(b"\r\n");
            }
            self.push(line.as_bytes());
        }
    }

    /// What is to be written.
    pub(crate) fn pending(&self) -> &[u8] {
        &self.bytes[self.delivered..]
    }

    /// Notes that the first `count` bytes of [`pending`](Self::pending) are written; more than that is all of them.
    pub(crate) fn consume(&mut self, count: usize) {
        self.delivered = self.delivered.saturating_add(count).min(self.bytes.len());
        if self.delivered == self.bytes.len() {
            self.bytes.clear();
            self.delivered = 0;
        } else if self.delivered > self.bytes.len() / 2 {
            self.bytes.drain(..self.delivered);
            self.delivered = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delivers_in_parts() {
        let mut out = OutputBuffer::from_pending(b"ab".to_vec());
        out.push_text("c\nd\n");
        assert_eq!(out.pending(), b"abc\r\nd\r\n");
        out.consume(3);
        assert_eq!(out.pending(), b"\r\nd\r\n");
        out.consume(3);
        out.push(b"x");
        assert_eq!(out.pending(), b"\r\nx");
        out.consume(99);
        assert!(out.pending().is_empty());
    }
}
