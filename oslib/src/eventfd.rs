//! A doorbell between threads and processes: one counter behind a descriptor.
//!
//! Nonblocking unless asked otherwise, so that neither ringing nor draining can stall an event loop; not a semaphore.
//! See eventfd(2). The counter lives in the open file: it survives exec and is shared by all duplicates.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::eventfd::{self, EfdFlags};
use nix::unistd;

use crate::retry;

/// An eventfd, close-on-exec.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// Makes one whose reads and writes never block.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn new() -> io::Result<Self> {
        Self::with_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
    }

    /// Makes one on which [`EventFd::drain`] waits for a signal.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn blocking() -> io::Result<Self> {
        Self::with_flags(EfdFlags::EFD_CLOEXEC)
    }

    fn with_flags(flags: EfdFlags) -> io::Result<Self> {
        Ok(EventFd(eventfd::EventFd::from_flags(flags)?.into()))
    }

    /// Adds 1 to the counter, which makes the descriptor readable. A nonblocking one that is full already stays so.
    ///
    /// # Errors
    /// Those of write(2).
    pub fn signal(&self) -> io::Result<()> {
        match retry::on_eintr(|| unistd::write(&self.0, &1u64.to_ne_bytes())) {
            Err(error) if error.raw_os_error() == Some(Errno::EAGAIN as i32) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Sets the counter to 0 and returns what it was; 0 if a nonblocking one was not signalled.
    ///
    /// # Errors
    /// Those of read(2); `InvalidData` if the descriptor is no eventfd.
    pub fn drain(&self) -> io::Result<u64> {
        let mut count = [0; 8];
        match retry::on_eintr(|| unistd::read(&self.0, &mut count)) {
            Ok(8) => Ok(u64::from_ne_bytes(count)),
            Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "not an eventfd")),
            Err(error) if error.raw_os_error() == Some(Errno::EAGAIN as i32) => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Waits `timeout` at most for a signal, and returns whether there is one. The counter stays as it is.
    ///
    /// # Errors
    /// Those of poll(2).
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        retry::wait_readable(self.0.as_fd(), Some(timeout))
    }

    /// Another descriptor of the same counter, close-on-exec.
    ///
    /// # Errors
    /// Those of fcntl(2).
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(EventFd(self.0.try_clone()?))
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Adopts a descriptor that is an eventfd already, after an exec for example; whether it blocks is its own affair.
impl From<OwnedFd> for EventFd {
    fn from(fd: OwnedFd) -> Self {
        EventFd(fd)
    }
}

impl From<EventFd> for OwnedFd {
    fn from(event: EventFd) -> Self {
        event.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::cloexec;

    #[test]
    fn counts_and_drains() {
        let event = EventFd::new().unwrap();
        assert!(cloexec::is_set(&event).unwrap());
        assert_eq!(event.drain().unwrap(), 0);
        assert!(!event.wait(Duration::ZERO).unwrap());
        event.signal().unwrap();
        event.try_clone().unwrap().signal().unwrap();
        assert!(event.wait(Duration::from_secs(10)).unwrap());
        assert_eq!(event.drain().unwrap(), 2);
        assert_eq!(event.drain().unwrap(), 0);
    }

    #[test]
    fn full_is_signalled() {
        let event = EventFd::new().unwrap();
        unistd::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        event.signal().unwrap();
        assert_eq!(event.drain().unwrap(), u64::MAX - 1);
    }

    #[test]
    fn a_blocking_one_waits() {
        let event = std::sync::Arc::new(EventFd::blocking().unwrap());
        let other = event.clone();
        let waiter = std::thread::spawn(move || other.drain().unwrap());
        std::thread::sleep(Duration::from_millis(5));
        event.signal().unwrap();
        assert_eq!(waiter.join().unwrap(), 1);
    }

    #[test]
    fn something_else_is_told_apart() {
        let event = EventFd::from(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
        assert_eq!(event.drain().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
