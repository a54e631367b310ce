//! virtio-rng: randomness of the host for the guest (virtio 1.2, 5.4).
//!
//! A request is a buffer to be filled. It gets at most [`MAX_REQUEST`] bytes, and the driver asks again for more, as the
//! specification has it. The device remembers nothing: a request that was not answered is still in the queue.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter};
use cpr_core::section::SectionType;
use serde::{Deserialize, Serialize};
use virtio_queue::QueueOwnedT;

use super::requests::{self, AnotherTurn};
use super::{
    Broken, Class, Direction, Drained, Driver, Persistent, SectionVersions, VirtioDevice, Watch, WatchToken,
};

/// The most bytes that a request is answered with.
pub const MAX_REQUEST: usize = 64 << 10;

/// The only queue.
const REQUESTS: usize = 0;
/// Entries of the queue, as QEMU has it; and the most requests that are answered in one turn.
const QUEUE_SIZE: u16 = 8;

const ANOTHER_TURN: WatchToken = 0;
const SOURCE: WatchToken = 1;

/// Where the randomness comes from.
#[derive(Debug)]
pub enum Source {
    /// The kernel, by getrandom(2).
    Kernel,
    /// A file, as `/dev/hwrng`.
    File(File),
}

impl Source {
    /// Opens a file to read randomness from. It is never waited for: a device of which nothing can be read now is read later.
    ///
    /// # Errors
    /// Those of open(2), and what is neither a character device nor a pipe: of a regular file every program that opens it, as
    /// after an update, would give the guest the same bytes again.
    pub fn open(path: &Path) -> io::Result<Source> {
        let kind = std::fs::metadata(path)?.file_type();
        if !kind.is_char_device() && !kind.is_fifo() {
            let reason = "randomness is read from a character device or a pipe alone: another file has the same for everybody";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map(Source::File)
    }

    /// Some bytes into `buffer`, at least one. None: there are none now.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match self {
            Source::Kernel => oslib::random::fill(buffer).map(|()| Some(buffer.len())),
            Source::File(file) => match file.read(buffer) {
                Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is at its end")),
                Ok(count) => Ok(Some(count)),
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) =>
                {
                    Ok(None)
                }
                Err(error) => Err(error),
            },
        }
    }
}

/// What the device needs to go on with the requests in its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// The driver's word that there are any.
    Driver,
    /// Another turn.
    Turn,
    /// Something to read.
    Source,
}

/// The device.
#[derive(Debug)]
pub struct Rng {
    source: Source,
    needs: Needs,
    another_turn: AnotherTurn,
    at_rest: bool,
}

impl Rng {
    /// Makes one.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn new(source: Source) -> io::Result<Rng> {
        Ok(Rng { source, needs: Needs::Driver, another_turn: AnotherTurn::new()?, at_rest: false })
    }

    fn serve(&mut self, driver: &mut Driver) -> Result<(), Broken> {
        if self.at_rest {
            return Ok(());
        }
        let mut answered = false;
        self.needs = Needs::Turn;
        for _ in 0..QUEUE_SIZE {
            if let Some(needs) = self.answer_next(driver)? {
                self.needs = needs;
                break;
            }
            answered = true;
        }
        if answered {
            driver.signal(REQUESTS)?;
        }
        Ok(())
    }

    /// Answers the next request; or says what that takes.
    fn answer_next(&mut self, driver: &mut Driver) -> Result<Option<Needs>, Broken> {
        let queue = &mut driver.queues[REQUESTS];
        let Some(request) = requests::next(&driver.memory, queue, REQUESTS)? else {
            return Ok(Some(Needs::Driver));
        };
        let head = request.head_index();
        // A buffer that is not in RAM, or none at all, gets nothing.
        let buffer = request.writer(&driver.memory).ok().filter(|buffer| buffer.available_bytes() > 0);
        let Some(mut buffer) = buffer else {
            driver.give_back(REQUESTS, head, 0)?;
            return Ok(None);
        };
        let mut bytes = vec![0; buffer.available_bytes().min(MAX_REQUEST)];
        let Some(count) =
            self.source.read(&mut bytes).map_err(|error| Broken::new(format!("randomness: {error}")))?
        else {
            queue.go_to_previous_position();
            return Ok(Some(Needs::Source));
        };
        let written = buffer.write_all(&bytes[..count]);
        written.map_err(|error| Broken::queue(REQUESTS, error))?;
        driver.give_back(REQUESTS, head, count as u32)?;
        Ok(None)
    }
}

impl VirtioDevice for Rng {
    fn class(&self) -> Class {
        Class { virtio_id: 4, pci: (0x00, 0xff) }
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _offset: usize, data: &mut [u8]) {
        data.fill(0);
    }

    fn reset(&mut self) {
        self.needs = Needs::Driver;
    }

    fn queue_ready(&mut self, driver: &mut Driver, _queue: usize) -> Result<(), Broken> {
        self.serve(driver)
    }

    fn watches(&self) -> Vec<Watch<'_>> {
        match (self.needs, &self.source) {
            _ if self.at_rest => Vec::new(),
            (Needs::Source, Source::File(file)) => {
                vec![Watch { fd: file.as_fd(), token: SOURCE, direction: Direction::Read }]
            }
            (Needs::Driver, _) => Vec::new(),
            (Needs::Turn | Needs::Source, _) => vec![self.another_turn.watch(ANOTHER_TURN)],
        }
    }

    fn fd_ready(&mut self, driver: &mut Driver, _token: WatchToken) -> Result<(), Broken> {
        self.serve(driver)
    }

    fn drain(&mut self, _driver: &mut Driver) -> Result<Drained, Broken> {
        self.at_rest = true;
        Ok(Drained::AtRest)
    }

    fn resume(&mut self) {
        self.at_rest = false;
    }

    fn persistent(&mut self) -> Option<&mut dyn Persistent> {
        Some(self)
    }
}

/// Nothing: says that the device was there.
#[derive(Debug, Serialize, Deserialize)]
pub struct RngState {}

impl SectionType for RngState {
    const NAME: &'static str = "virtio-rng";
    const VERSION: u32 = 1;
}

impl Persistent for Rng {
    fn sections(&self) -> Vec<SectionVersions> {
        vec![(RngState::NAME, RngState::VERSIONS)]
    }

    fn save(&self, main: &mut FrameWriter, instance: u32) -> Result<(), BoxError> {
        Ok(main.put_section(instance, &RngState {})?)
    }

    fn load(&mut self, main: &mut Frame, instance: u32) -> Result<(), BoxError> {
        let RngState {} = main.require_section(instance)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use virtio_queue::QueueT;

    use super::*;
    use crate::virtio::test_driver::{Guest, RAM, saved_and_loaded};

    fn rng() -> Rng {
        Rng::new(Source::Kernel).unwrap()
    }

    fn guest() -> Guest {
        Guest::new(&rng().queue_sizes(), 0)
    }

    #[test]
    fn a_request_is_filled_up_to_the_limit() {
        let (mut rng, mut guest) = (rng(), guest());
        let small = guest.add_buffer(REQUESTS, 64);
        let large = guest.add_buffer(REQUESTS, MAX_REQUEST as u32 + 1);
        rng.queue_ready(&mut guest.driver, REQUESTS).unwrap();
        let used = guest.used(REQUESTS);
        assert_eq!(used.iter().map(|used| used.head).collect::<Vec<_>>(), [small, large]);
        assert_eq!(used.iter().map(|used| used.bytes.len()).collect::<Vec<_>>(), [64, MAX_REQUEST]);
        assert!(used.iter().all(|used| used.bytes[..64].iter().any(|&byte| byte != 0)));
        assert_ne!(used[0].bytes, used[1].bytes[..64]);
        assert_eq!(guest.interrupts(REQUESTS), 1);
        assert!(rng.watches().is_empty());
    }

    #[test]
    fn a_file_that_says_the_same_again_is_no_source() {
        assert!(matches!(Source::open(Path::new("/dev/urandom")), Ok(Source::File(_))));
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Source::open(file.path()).unwrap_err().to_string();
        assert!(error.starts_with("randomness is read from a character device or a pipe alone"), "{error}");
    }

    #[test]
    fn a_turn_has_an_end_and_another_one_follows() {
        let (mut rng, mut guest) = (rng(), guest());
        for _ in 0..QUEUE_SIZE {
            guest.add_buffer(REQUESTS, 1);
        }
        rng.queue_ready(&mut guest.driver, REQUESTS).unwrap();
        assert_eq!(guest.used(REQUESTS).len(), usize::from(QUEUE_SIZE));
        assert_eq!(rng.watches().len(), 1);
        guest.add_buffer(REQUESTS, 1);
        rng.fd_ready(&mut guest.driver, ANOTHER_TURN).unwrap();
        assert_eq!(guest.used(REQUESTS).len(), 1);
        assert!(rng.watches().is_empty());
    }

    #[test]
    fn nonsense_fails_the_request_or_breaks_the_device() {
        let (mut rng, mut guest) = (rng(), guest());
        // Not in RAM, nothing to write to, nothing at all.
        guest.add(REQUESTS, &[(RAM + 1, 64, true)]);
        guest.add(REQUESTS, &[(u64::MAX - 1, u32::MAX, true)]);
        guest.add(REQUESTS, &[(0x8000, 64, false)]);
        guest.add(REQUESTS, &[(0x8000, 0, true)]);
        rng.queue_ready(&mut guest.driver, REQUESTS).unwrap();
        assert_eq!(guest.used(REQUESTS).iter().map(|used| used.bytes.len()).collect::<Vec<_>>(), [0; 4]);
        guest.claim(REQUESTS, 9);
        assert!(rng.queue_ready(&mut guest.driver, REQUESTS).is_err());
    }

    #[test]
    fn chains_are_as_long_as_in_qemu_and_not_longer() {
        let (mut rng, mut guest) = (rng(), guest());
        guest.add_indirect(REQUESTS, 1024);
        rng.queue_ready(&mut guest.driver, REQUESTS).unwrap();
        assert_eq!(guest.driver.queues[REQUESTS].next_used(), 1);
        guest.add_indirect(REQUESTS, 1025);
        let error = rng.queue_ready(&mut guest.driver, REQUESTS).unwrap_err();
        assert_eq!(error.to_string(), "queue 0: more than 1024 descriptors in a chain");
    }

    #[test]
    fn a_source_without_bytes_is_waited_for() {
        let (mut far, near) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let mut rng = Rng::new(Source::File(File::from(OwnedFd::from(near)))).unwrap();
        let mut guest = guest();
        guest.add_buffer(REQUESTS, 8);
        rng.queue_ready(&mut guest.driver, REQUESTS).unwrap();
        assert!(guest.used(REQUESTS).is_empty());
        assert_eq!(rng.watches()[0].token, SOURCE);
        far.write_all(b"random").unwrap();
        rng.fd_ready(&mut guest.driver, SOURCE).unwrap();
        assert_eq!(guest.used(REQUESTS)[0].bytes, b"random");
        drop(far);
        guest.add_buffer(REQUESTS, 8);
        let error = rng.queue_ready(&mut guest.driver, REQUESTS).unwrap_err();
        assert_eq!(error.to_string(), "randomness: the file is at its end");
    }

    #[test]
    fn a_request_that_was_not_answered_is_the_next_program_s() {
        let (mut old, mut guest) = (rng(), guest());
        assert_eq!(old.drain(&mut guest.driver).unwrap(), Drained::AtRest);
        guest.add_buffer(REQUESTS, 64);
        old.queue_ready(&mut guest.driver, REQUESTS).unwrap();
        assert!(guest.used(REQUESTS).is_empty());
        let mut new = rng();
        saved_and_loaded(&mut old, &mut new).unwrap();
        guest.move_to_another_program();
        new.resume();
        new.queue_ready(&mut guest.driver, REQUESTS).unwrap();
        assert_eq!(guest.used(REQUESTS)[0].bytes.len(), 64);
        // And the old one's, if nothing came of it.
        old.resume();
        guest.add_buffer(REQUESTS, 64);
        old.queue_ready(&mut guest.driver, REQUESTS).unwrap();
        assert_eq!(guest.used(REQUESTS).len(), 1);
    }

    #[test]
    fn a_state_without_it_is_refused() {
        let frame = Frame::parse(&FrameWriter::default().finish(1)).unwrap();
        let error = rng().load(&mut { frame }, 3).unwrap_err();
        assert_eq!(error.to_string(), "state section 'virtio-rng' instance 3 is missing");
    }
}
