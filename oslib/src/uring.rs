#![allow(unsafe_code, reason = "the kernel is given memory that it works on later")]
//! File operations under way in the kernel: io_uring(7), by the crate `io-uring`.
//!
//! A ring owns each [`Operation`] from the push until the kernel says that it is over, and with it the memory and the file
//! that the kernel works on. A ring that is dropped waits for what is under way. It can be used by any thread, one at a
//! time, but the kernel ends what a thread submitted when that thread ends: whoever hands a ring on waits first. Only with
//! the feature `guest-io`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};

use crate::eventfd::EventFd;
use crate::guest_io::{Operation, write_flags};

/// An operation that is over.
#[derive(Debug)]
pub struct Completion<T> {
    /// What [`Uring::push`] was given along with it.
    pub tag: T,
    /// The operation itself.
    pub operation: Operation,
    /// Bytes that were read or written, which may be fewer than there are.
    pub result: io::Result<usize>,
}

/// What the kernel works on: must stay where it is until the kernel is done.
struct UnderWay<T> {
    tag: T,
    operation: Operation,
    file: Arc<File>,
}

/// A ring, whose user knows an operation again by a `T`.
pub struct Uring<T> {
    ring: IoUring,
    event: EventFd,
    /// Indexed by what the kernel is told to call them.
    under_way: Vec<Option<UnderWay<T>>>,
    free: Vec<usize>,
    /// The process that made it.
    process: u32,
}

impl<T> Uring<T> {
    /// Makes a ring for `most` operations at a time, a power of two.
    ///
    /// # Errors
    /// Those of io_uring_setup(2): ENOSYS where the kernel has none, EPERM where a container or an administrator forbids it.
    pub fn new(most: u32) -> io::Result<Self> {
        let ring = IoUring::new(most)?;
        let event = EventFd::new()?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let under_way = (0..most).map(|_| None).collect();
        Ok(Self {
            ring,
            event,
            under_way,
            free: (0..most as usize).rev().collect(),
            process: std::process::id(),
        })
    }

    /// Whether this process made it. Another one that has its memory and descriptors, the keeper, makes one of its own: what
    /// the kernel keeps of a ring per process is not there.
    pub fn is_of_this_process(&self) -> bool {
        self.process == std::process::id()
    }

    /// Becomes readable when operations are over.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Operations under way.
    pub fn in_flight(&self) -> usize {
        self.under_way.len() - self.free.len()
    }

    /// Whether there is no room for another operation.
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Takes an operation, for the next [`submit`](Self::submit).
    ///
    /// # Panics
    /// The ring is [full](Self::is_full).
    pub fn push(&mut self, tag: T, file: &Arc<File>, operation: Operation) {
        let index = self.free.pop().expect("the caller has looked whether there is room");
        let slot = self.under_way[index].insert(UnderWay { tag, operation, file: file.clone() });
        let entry = slot.entry().user_data(index as u64);
        // SAFETY: memory and descriptor belong to the slot, which stays until the completion is there; the pieces are behind a
        // pointer that does not move with it.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the queue has an entry for each slot");
    }

    /// Gives the kernel what was pushed. What it cannot take now is kept for the next call, and the [event](Self::event) makes
    /// sure that there is one.
    ///
    /// # Errors
    /// Those of io_uring_enter(2) that waiting does not help against.
    pub fn submit(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if is_passing(&error) => return self.event.signal(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Forgets the event, for another one to come.
    ///
    /// # Errors
    /// Those of read(2).
    pub fn drain_event(&self) -> io::Result<()> {
        self.event.drain().map(drop)
    }

    /// The next operation that is over, if there is one.
    pub fn completed(&mut self) -> Option<Completion<T>> {
        let entry = self.ring.completion().next()?;
        let index = entry.user_data() as usize;
        let UnderWay { tag, operation, .. } =
            self.under_way[index].take().expect("each operation is completed once");
        self.free.push(index);
        let result =
            usize::try_from(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()));
        Some(Completion { tag, operation, result })
    }

    /// Waits until one of the operations under way is over; returns at once if there is none.
    ///
    /// # Errors
    /// Those of io_uring_enter(2).
    pub fn wait(&mut self) -> io::Result<()> {
        while self.in_flight() > 0 && self.ring.completion().is_empty() {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if is_passing(&error) => std::thread::yield_now(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The kernel has no memory at the moment, or wants completions to be read first.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
}

impl<T> UnderWay<T> {
    fn entry(&self) -> squeue::Entry {
        let fd = types::Fd(self.file.as_raw_fd());
        let pieces = self.operation.pieces();
        let (start, count) = (pieces.as_ptr(), pieces.len() as u32);
        match &self.operation {
            Operation::Read { offset, .. } => opcode::Readv::new(fd, start, count).offset(*offset).build(),
            Operation::Write { offset, durable, .. } => {
                opcode::Writev::new(fd, start, count).offset(*offset).rw_flags(write_flags(*durable)).build()
            }
            Operation::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Operation::Allocate { how, offset, len } => {
                opcode::Fallocate::new(fd, *len).offset(*offset).mode(how.mode()).build()
            }
        }
    }
}

impl<T> std::fmt::Debug for Uring<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}

impl<T> Drop for Uring<T> {
    fn drop(&mut self) {
        while self.in_flight() > 0 {
            if self.wait().is_err() {
                // Nobody knows what the kernel still does: memory that it may write to is never given back.
                std::mem::forget(std::mem::take(&mut self.under_way));
                return;
            }
            while self.completed().is_some() {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_io::tests::{content, file, memory};
    use crate::guest_io::{Allocation, GuestBuffers, Source};
    use std::time::Duration;
    use vm_memory::{Bytes, GuestAddress};

    /// A ring, unless this host forbids it.
    fn ring(most: u32) -> Option<Uring<u64>> {
        match Uring::new(most) {
            Ok(ring) => Some(ring),
            Err(error) => {
                eprintln!("SKIPPED: no io_uring here: {error}");
                None
            }
        }
    }

    fn write(memory: &vm_memory::GuestMemoryMmap, offset: u64, address: u64, len: usize) -> Operation {
        let from = GuestBuffers::new(memory, [(GuestAddress(address), len)]).unwrap();
        Operation::Write { offset, from: from.into(), durable: false }
    }

    fn finish(ring: &mut Uring<u64>) -> Vec<(u64, io::Result<usize>)> {
        let mut over = Vec::new();
        while ring.in_flight() > 0 {
            ring.wait().unwrap();
            over.extend(std::iter::from_fn(|| ring.completed()).map(|done| (done.tag, done.result)));
        }
        over.sort_by_key(|(tag, _)| *tag);
        over
    }

    #[test]
    fn operations_complete_and_the_event_tells() {
        let Some(mut ring) = ring(4) else { return };
        let (memory, file) = (memory(), Arc::new(file(&[1; 8192])));
        memory.write_slice(b"hello", GuestAddress(0xffe)).unwrap();
        let poll = EventFd::from(ring.event().try_clone_to_owned().unwrap());
        assert!(!poll.wait(Duration::ZERO).unwrap());
        ring.push(7, &file, write(&memory, 3, 0xffe, 5));
        assert!(!ring.is_full() && ring.in_flight() == 1);
        ring.submit().unwrap();
        assert!(poll.wait(Duration::from_secs(10)).unwrap());
        ring.drain_event().unwrap();
        let done = ring.completed().unwrap();
        assert_eq!((done.tag, done.result.unwrap()), (7, 5));
        assert_eq!(&content(&file)[..9], b"\x01\x01\x01hello\x01");

        let into = GuestBuffers::new(&memory, [(GuestAddress(0), 4), (GuestAddress(8), 4)]).unwrap();
        ring.push(1, &file, Operation::Read { offset: 4, into });
        ring.push(2, &file, Operation::Sync);
        ring.push(3, &file, Operation::Write { offset: 8190, from: Source::zeros(5), durable: true });
        ring.push(4, &file, Operation::Allocate { how: Allocation::Hole, offset: u64::MAX, len: 1 });
        assert!(ring.is_full());
        ring.submit().unwrap();
        let over = finish(&mut ring);
        assert_eq!(over.iter().map(|(tag, _)| *tag).collect::<Vec<_>>(), [1, 2, 3, 4]);
        let lens: Vec<_> = over[..3].iter().map(|(_, result)| *result.as_ref().unwrap()).collect();
        assert_eq!(lens, [8, 0, 5]);
        over[3].1.as_ref().unwrap_err();
        assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(0)).unwrap(), *b"ello");
        assert_eq!(content(&file).len(), 8195);
    }

    #[test]
    fn dropped_it_waits_for_what_is_under_way() {
        let Some(mut ring) = ring(64) else { return };
        let file = Arc::new(file(b""));
        {
            // The operations keep it mapped.
            let memory = memory();
            memory.write_slice(&[9; 0x2000], GuestAddress(0)).unwrap();
            for number in 0..64 {
                ring.push(number, &file, write(&memory, number * 0x2000, 0, 0x2000));
            }
        }
        // Not even submitted yet.
        drop(ring);
        let content = content(&file);
        assert!(content.len() == 64 * 0x2000 && content.iter().all(|byte| *byte == 9));
    }

    #[test]
    fn another_thread_goes_on_with_it() {
        let Some(mut ring) = ring(8) else { return };
        let (memory, file) = (memory(), Arc::new(file(b"")));
        memory.write_slice(&[5; 0x1000], GuestAddress(0)).unwrap();
        // The thread that submits stays until it is over, as the rules say.
        std::thread::scope(|scope| {
            let (sender, receiver) = std::sync::mpsc::channel();
            let (over, until) = std::sync::mpsc::channel::<()>();
            let (memory, file) = (&memory, &file);
            scope.spawn(move || {
                ring.push(1, file, write(memory, 0, 0, 0x1000));
                ring.submit().unwrap();
                sender.send(ring).unwrap();
                until.recv().unwrap();
            });
            let mut ring = receiver.recv().unwrap();
            assert!(matches!(finish(&mut ring)[..], [(1, Ok(0x1000))]));
            ring.push(2, file, write(memory, 0x1000, 0, 0x1000));
            ring.submit().unwrap();
            assert!(matches!(finish(&mut ring)[..], [(2, Ok(0x1000))]));
            over.send(()).unwrap();
        });
        assert!(content(&file) == [5; 0x2000]);
    }
}
