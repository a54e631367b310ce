//! Who does the operations: a ring of the kernel's, or the calling thread.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use oslib::guest_io::Operation;
use oslib::uring::{Completion, Uring};

/// Operations under way at once in a ring.
const RING_ENTRIES: u32 = 256;
/// Operations after which the calling thread turns to what is over.
const BATCH: usize = 16;

/// Does operations. What is over waits to be [asked for](Self::completed), also what was over at once.
#[derive(Debug)]
pub(super) enum Engine<T> {
    Ring(Box<Uring<T>>),
    Caller(VecDeque<Completion<T>>),
}

impl<T> Engine<T> {
    /// A ring, or the calling thread where there can be none.
    pub(super) fn ring(drive: &str) -> Self {
        match Uring::new(RING_ENTRIES) {
            Ok(ring) => Self::Ring(Box::new(ring)),
            Err(error) => {
                tracing::warn!(drive, %error, "no io_uring here: requests are done one after the other, as with aio=threads");
                Self::caller()
            }
        }
    }

    pub(super) fn caller() -> Self {
        Self::Caller(VecDeque::new())
    }

    /// Whether nothing more can be started before something is over and was asked for.
    pub(super) fn is_full(&self) -> bool {
        match self {
            Self::Ring(ring) => ring.is_full(),
            Self::Caller(over) => over.len() >= BATCH,
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        match self {
            Self::Ring(ring) => ring.in_flight(),
            Self::Caller(over) => over.len(),
        }
    }

    /// Starts an operation, at the latest with the next [`submit`](Self::submit). There must be room.
    pub(super) fn start(&mut self, tag: T, file: &Arc<File>, operation: Operation) {
        match self {
            Self::Ring(ring) => ring.push(tag, file, operation),
            Self::Caller(over) => {
                let result = operation.run(file);
                over.push_back(Completion { tag, operation, result });
            }
        }
    }

    pub(super) fn submit(&mut self) -> io::Result<()> {
        match self {
            Self::Ring(ring) => ring.submit(),
            Self::Caller(_) => Ok(()),
        }
    }

    pub(super) fn completed(&mut self) -> Option<Completion<T>> {
        match self {
            Self::Ring(ring) => ring.completed(),
            Self::Caller(over) => over.pop_front(),
        }
    }

    /// What becomes readable when operations are over.
    pub(super) fn event(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Ring(ring) => Some(ring.event()),
            Self::Caller(_) => None,
        }
    }

    pub(super) fn drain_event(&self) -> io::Result<()> {
        match self {
            Self::Ring(ring) => ring.drain_event(),
            Self::Caller(_) => Ok(()),
        }
    }

    /// Whether it belongs to a process that this one is not.
    pub(super) fn is_left_behind(&self) -> bool {
        matches!(self, Self::Ring(ring) if !ring.is_of_this_process())
    }

    /// Waits until nothing is under way, and gives `over` what came of it.
    pub(super) fn settle(&mut self, mut over: impl FnMut(Completion<T>)) -> io::Result<()> {
        while self.in_flight() > 0 {
            if let Self::Ring(ring) = self {
                ring.wait()?;
            }
            while let Some(completion) = self.completed() {
                over(completion);
            }
        }
        Ok(())
    }
}
