//! The device.

use std::collections::VecDeque;
use std::fmt;
use std::io;

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter};
use cpr_core::section::SectionType;
use oslib::guest_io::{Allocation, Operation, Source};
use oslib::uring::Completion;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::config::{ConfigSpace, WRITEBACK};
use super::engine::Engine;
use super::request::{Action, Disk, MAX_REQUEST_LEN, Request, Status};
use super::state::BlockState;
use crate::block::{Cache, Image};
use crate::guest_log::warn_of_guest;
use crate::virtio::requests::{self, AnotherTurn};
use crate::virtio::{
    Backing, Broken, Class, Direction, Drained, Driver, Persistent, SectionVersions, VirtioDevice, Watch,
    WatchToken,
};

/// The most queues that a disk can have.
pub const MAX_QUEUES: u16 = 64;

/// The most requests of a queue that are taken before it is somebody else's turn. Not each of them is one for the engine.
const BURST: usize = 256;
/// Bytes under way from which on nothing more is started, so that a stop waits for so many and one request more.
const MOST_BYTES: u64 = MAX_REQUEST_LEN;

const ENGINE: WatchToken = 0;
const ANOTHER_TURN: WatchToken = 1;

/// Who does the requests, in the terms of QEMU's `aio=`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Aio {
    /// `io_uring`: the kernel, many at once. Where it cannot be had, as [`Threads`](Self::Threads), with a warning.
    #[default]
    IoUring,
    /// `threads`: the thread that serves the device, one after the other.
    Threads,
}

/// A disk as the user asked for it.
#[derive(Debug)]
pub struct BlockConfig {
    /// What is on it.
    pub image: Image,
    /// `serial=`, at most 20 bytes.
    pub serial: String,
    /// `num-queues=`, 1 to 64.
    pub queues: u16,
    /// `queue-size=`: entries of each, a power of two from 4 to 1024.
    pub queue_size: u16,
    /// `aio=`.
    pub aio: Aio,
}

impl BlockConfig {
    /// A disk with this image and everything else as by default: one queue of 256.
    pub fn new(image: Image) -> Self {
        Self { image, serial: String::new(), queues: 1, queue_size: 256, aio: Aio::default() }
    }
}

/// A disk that cannot be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The serial number has no room.
    #[error("drive {id}: the serial number \"{serial}\" has {} bytes; at most {VIRTIO_BLK_ID_BYTES} are possible", serial.len())]
    Serial {
        /// The drive.
        id: String,
        /// The serial number.
        serial: String,
    },
    /// So many queues are not possible.
    #[error("drive {id}: num-queues={found}; 1 to {MAX_QUEUES} are possible")]
    Queues {
        /// The drive.
        id: String,
        /// The number.
        found: u16,
    },
    /// Queues of this size are not possible.
    #[error("drive {id}: queue-size={found}; a power of two from 4 to 1024 is possible")]
    QueueSize {
        /// The drive.
        id: String,
        /// The size.
        found: u16,
    },
    /// No eventfd could be made.
    #[error("drive {id}: cannot make an eventfd")]
    EventFd {
        /// The drive.
        id: String,
        /// The cause.
        source: io::Error,
    },
    /// The disk that arrives with an update is another one than this.
    #[error("drive {id}: the guest has a disk with {what} {before}, by this command line it is {now}")]
    Other {
        /// The drive.
        id: String,
        /// In what they differ.
        what: &'static str,
        /// What the guest has.
        before: String,
        /// What there is here.
        now: String,
    },
}

/// A request that was taken from its queue and is not given back yet.
#[derive(Debug)]
struct Task {
    queue: usize,
    head: u16,
    status: GuestAddress,
    written: u32,
    /// Of the image, that it reads or changes.
    bytes: u64,
    purpose: Purpose,
    /// It is to be on the disk when it is done.
    durable: bool,
}

/// What the operation of a task is a part of.
#[derive(Debug, Clone, Copy)]
enum Purpose {
    /// It is all there is.
    Alone,
    /// Nothing is lost if it cannot be.
    Discard,
    /// Zeros up to this byte, which are written if the file system has no other way.
    Zeros { end: u64 },
}

/// How a task goes on.
enum Next {
    Do(Operation),
    Over(Status),
}

/// A disk.
#[derive(Debug)]
pub struct Block {
    image: Image,
    serial: String,
    queues: u16,
    queue_size: u16,
    engine: Engine<Task>,
    /// What the guest knows, in sectors.
    sectors: u64,
    /// The write cache is on, as far as the driver can flush it.
    writeback: bool,
    /// The host failed to write something back: the kernel has told so once, and says of later attempts that all is well.
    inconsistent: bool,
    /// Nothing new is started.
    draining: bool,
    /// Queues that were left before they were empty: there was no room, or it was others' turn.
    waiting: VecDeque<usize>,
    another_turn: AnotherTurn,
    /// Of the requests under way.
    bytes: u64,
    /// Queues that something was given back to, and whose driver was not told yet.
    unsignalled: Vec<bool>,
}

impl Block {
    /// Makes a disk, which no driver has touched yet.
    ///
    /// # Errors
    /// [`BlockError`]: the configuration cannot be.
    pub fn new(config: BlockConfig) -> Result<Self, BlockError> {
        let BlockConfig { image, serial, queues, queue_size, aio } = config;
        let id = image.config().id.clone();
        if serial.len() > VIRTIO_BLK_ID_BYTES as usize {
            return Err(BlockError::Serial { id, serial });
        }
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(BlockError::Queues { id, found: queues });
        }
        if !(4..=1024).contains(&queue_size) || !queue_size.is_power_of_two() {
            return Err(BlockError::QueueSize { id, found: queue_size });
        }
        let another_turn =
            AnotherTurn::new().map_err(|source| BlockError::EventFd { id: id.clone(), source })?;
        Ok(Self {
            engine: match aio {
                Aio::IoUring => Engine::ring(&id),
                Aio::Threads => Engine::caller(),
            },
            sectors: image.sectors(),
            writeback: starts_with_cache(&image),
            image,
            serial,
            queues,
            queue_size,
            inconsistent: false,
            draining: false,
            waiting: VecDeque::new(),
            another_turn,
            bytes: 0,
            unsignalled: vec![false; queues.into()],
        })
    }

    /// What is on it.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Whether the kernel does the requests, many at once.
    pub fn uses_io_uring(&self) -> bool {
        matches!(self.engine, Engine::Ring(_))
    }

    fn config_space(&self) -> ConfigSpace {
        let &Self { sectors, queues, queue_size, writeback, .. } = self;
        ConfigSpace { sectors, queues, queue_size, writeback }
    }

    /// Whether what is written has to be on the disk when it is done: there is no cache, or a driver that cannot flush.
    fn is_durable(&self, driver: &Driver) -> bool {
        self.image.config().cache != Cache::Unsafe && !(self.writeback && driver.has(VIRTIO_BLK_F_FLUSH))
    }

    /// Takes requests out of a queue, as far as there is room and for one turn.
    fn serve(&mut self, driver: &mut Driver, queue: usize) -> Result<(), Broken> {
        let broken = |error| Broken::queue(queue, error);
        if self.draining || !driver.queues.get(queue).is_some_and(QueueT::ready) {
            return Ok(());
        }
        driver.queues[queue].disable_notification(&driver.memory).map_err(broken)?;
        let begun = self.begin(driver, queue);
        // Also what stood before a chain that is none.
        self.submit()?;
        let is_empty = begun?;
        self.finish(driver)?;
        // The driver may have added one before it saw that it is to tell.
        let has_more =
            !is_empty || driver.queues[queue].enable_notification(&driver.memory).map_err(broken)?;
        if has_more && !self.waiting.contains(&queue) {
            self.waiting.push_back(queue);
        }
        Ok(())
    }

    fn has_room(&self) -> bool {
        !self.engine.is_full() && self.bytes < MOST_BYTES
    }

    fn submit(&mut self) -> Result<(), Broken> {
        self.engine.submit().map_err(|error| Broken::new(format_args!("io_uring_enter: {error}")))
    }

    /// Starts the requests of a queue until there is none, no room, or it is others' turn. Tells whether there is none.
    fn begin(&mut self, driver: &mut Driver, queue: usize) -> Result<bool, Broken> {
        for _ in 0..BURST {
            if !self.has_room() {
                return Ok(false);
            }
            let Some(request) = take(driver, queue)? else { return Ok(true) };
            let disk = Disk {
                sectors: self.sectors,
                read_only: self.image.config().read_only,
                serial: &self.serial,
                features: driver.features,
            };
            let action = request.action(&driver.memory, disk);
            let mut task = Task {
                queue,
                head: request.head,
                status: request.status,
                written: request.written,
                bytes: 0,
                purpose: Purpose::Alone,
                durable: self.is_durable(driver),
            };
            let next = match action {
                Ok(action) => {
                    task.bytes = action.bytes();
                    self.first(&mut task, action)
                }
                Err(status) => Next::Over(status),
            };
            self.bytes += task.bytes;
            self.go_on(driver, task, next)?;
        }
        Ok(false)
    }

    /// The first operation of a task.
    fn first(&self, task: &mut Task, action: Action) -> Next {
        let config = self.image.config();
        Next::Do(match action {
            Action::Nothing => return Next::Over(Status::Ok),
            Action::Read { offset, into } => Operation::Read { offset, into },
            Action::Write { offset, from } => Operation::Write { offset, from, durable: task.durable },
            Action::Flush if config.cache == Cache::Unsafe || config.read_only => {
                return Next::Over(Status::Ok);
            }
            Action::Flush => return self.sync(),
            Action::Discard { len, .. } if len == 0 || !config.unmap => return Next::Over(Status::Ok),
            Action::Discard { offset, len } => {
                task.purpose = Purpose::Discard;
                Operation::Allocate { how: Allocation::Hole, offset, len }
            }
            Action::WriteZeroes { len: 0, .. } => return Next::Over(Status::Ok),
            Action::WriteZeroes { offset, len, unmap } => {
                task.purpose = Purpose::Zeros { end: offset + len };
                let how = if unmap && config.unmap { Allocation::Hole } else { Allocation::Zeros };
                Operation::Allocate { how, offset, len }
            }
        })
    }

    /// Has what was written be on the disk, if that can still be known.
    fn sync(&self) -> Next {
        if self.inconsistent { Next::Over(Status::Failed) } else { Next::Do(Operation::Sync) }
    }

    /// Turns to every operation that is over, and tells the driver.
    fn finish(&mut self, driver: &mut Driver) -> Result<(), Broken> {
        while let Some(Completion { mut tag, operation, result }) = self.engine.completed() {
            let next = self.next(&mut tag, operation, result);
            self.go_on(driver, tag, next)?;
        }
        self.submit()?;
        for queue in 0..self.unsignalled.len() {
            if std::mem::take(&mut self.unsignalled[queue]) {
                driver.signal(queue)?;
            }
        }
        Ok(())
    }

    fn go_on(&mut self, driver: &mut Driver, task: Task, next: Next) -> Result<(), Broken> {
        match next {
            Next::Do(operation) => {
                self.engine.start(task, self.image.fd(), operation);
                Ok(())
            }
            Next::Over(status) => {
                let Task { queue, head, written, bytes, .. } = task;
                self.bytes -= bytes;
                let told = driver.memory.write_obj(status as u8, task.status);
                told.map_err(|error| Broken::queue(queue, error))?;
                self.unsignalled[queue] = true;
                driver.give_back(queue, head, written)
            }
        }
    }

    /// What follows an operation.
    fn next(&mut self, task: &mut Task, operation: Operation, result: io::Result<usize>) -> Next {
        let done = match result {
            Ok(done) => done,
            Err(error) if is_passing(&error) => return Next::Do(operation),
            Err(error) => return self.instead(task, &operation, &error),
        };
        match operation {
            // As QEMU: what the file lacks is zero.
            Operation::Read { mut into, .. } if done == 0 => {
                into.zero();
                Next::Over(Status::Ok)
            }
            Operation::Read { offset, mut into } => {
                into.advance(done);
                if into.is_empty() {
                    return Next::Over(Status::Ok);
                }
                Next::Do(Operation::Read { offset: offset + done as u64, into })
            }
            Operation::Write { .. } if done == 0 => Next::Over(Status::Failed),
            Operation::Write { offset, mut from, durable } => {
                from.advance(done);
                let offset = offset + done as u64;
                match task.purpose {
                    _ if !from.is_empty() => Next::Do(Operation::Write { offset, from, durable }),
                    Purpose::Zeros { end } if offset < end => Next::Do(zeros(task, offset, end)),
                    _ => Next::Over(Status::Ok),
                }
            }
            Operation::Allocate { .. } if task.durable => self.sync(),
            // The error was told to another one that was under way.
            Operation::Sync if self.inconsistent => Next::Over(Status::Failed),
            Operation::Allocate { .. } | Operation::Sync => Next::Over(Status::Ok),
        }
    }

    /// What follows an operation that failed.
    fn instead(&mut self, task: &Task, operation: &Operation, error: &io::Error) -> Next {
        match (task.purpose, operation) {
            (Purpose::Discard, Operation::Allocate { .. }) if is_unsupported(error) => Next::Over(Status::Ok),
            (Purpose::Zeros { end }, Operation::Allocate { offset, .. }) if is_unsupported(error) => {
                Next::Do(zeros(task, *offset, end))
            }
            _ => {
                let image = self.image.path().display();
                warn_of_guest!(drive = self.image.config().id, %image, %error, "a request of the guest failed");
                self.inconsistent |= is_lost(operation, error);
                Next::Over(Status::Failed)
            }
        }
    }
}

/// Writes zeros up to `end`, or as many as one system call writes.
fn zeros(task: &Task, offset: u64, end: u64) -> Operation {
    Operation::Write { offset, from: Source::zeros(end - offset), durable: task.durable }
}

/// Takes the next request out of a queue.
fn take(driver: &mut Driver, queue: usize) -> Result<Option<Request>, Broken> {
    let Driver { memory, queues, .. } = driver;
    let Some(chain) = requests::take(memory, &mut queues[queue], queue)? else { return Ok(None) };
    Request::parse(memory, chain).map(Some).map_err(|error| Broken::queue(queue, error))
}

/// Whether the kernel may have dropped something that was written before, and not by this operation alone.
fn is_lost(operation: &Operation, error: &io::Error) -> bool {
    match operation {
        Operation::Sync => !is_passing(error),
        Operation::Write { durable: true, .. } => error.raw_os_error() == Some(libc::EIO),
        _ => false,
    }
}

/// It was interrupted, or ended with the thread that had submitted it. Nothing was told to the guest, so it is done again.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::ECANCELED))
}

/// The file system, or the disk, cannot do this to ranges, or not to this one.
fn is_unsupported(error: &io::Error) -> bool {
    let codes = [libc::EOPNOTSUPP, libc::ENOSYS, libc::ENODEV, libc::ENOTTY, libc::EINVAL];
    error.raw_os_error().is_some_and(|code| codes.contains(&code))
}

fn starts_with_cache(image: &Image) -> bool {
    image.config().cache != Cache::Writethrough
}

impl VirtioDevice for Block {
    fn class(&self) -> Class {
        // Mass storage, SCSI: what QEMU's virtio-blk-pci is.
        Class { virtio_id: VIRTIO_ID_BLOCK as u16, pci: (0x01, 0x00) }
    }

    fn features(&self) -> u64 {
        let mut features = vec![
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_CONFIG_WCE,
        ];
        if self.image.config().read_only {
            features.push(VIRTIO_BLK_F_RO);
        } else {
            features.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        if self.queues > 1 {
            features.push(VIRTIO_BLK_F_MQ);
        }
        features.into_iter().fold(0, |bits, feature| bits | 1 << feature)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; self.queues.into()]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.config_space().read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let Some(byte) = WRITEBACK.checked_sub(offset).and_then(|at| data.get(at)) {
            self.writeback = *byte != 0;
        }
    }

    fn reset(&mut self) {
        let inconsistent = &mut self.inconsistent;
        let settled = self.engine.settle(|Completion { operation, result, .. }| {
            *inconsistent |= result.is_err_and(|error| is_lost(&operation, &error));
        });
        if let Err(error) = settled {
            // Dropped, the ring keeps the memory that the kernel may still write to.
            tracing::error!(drive = self.image.config().id, %error, "io_uring does not answer any more");
            self.engine = Engine::caller();
        }
        self.writeback = starts_with_cache(&self.image);
        (self.draining, self.bytes) = (false, 0);
        self.waiting.clear();
        self.unsignalled.fill(false);
    }

    fn queue_ready(&mut self, driver: &mut Driver, queue: usize) -> Result<(), Broken> {
        self.serve(driver, queue)
    }

    fn watches(&self) -> Vec<Watch<'_>> {
        let turn = !self.draining && !self.waiting.is_empty() && self.has_room();
        let turn = turn.then(|| self.another_turn.watch(ANOTHER_TURN));
        let engine = self.engine.event().map(|fd| Watch { fd, token: ENGINE, direction: Direction::Read });
        turn.into_iter().chain(engine).collect()
    }

    fn fd_ready(&mut self, driver: &mut Driver, token: WatchToken) -> Result<(), Broken> {
        if token == ENGINE {
            self.engine.drain_event().map_err(Broken::new)?;
        }
        self.finish(driver)?;
        match self.waiting.pop_front() {
            Some(queue) => self.serve(driver, queue),
            None => Ok(()),
        }
    }

    fn drain(&mut self, driver: &mut Driver) -> Result<Drained, Broken> {
        self.draining = true;
        self.finish(driver)?;
        Ok(if self.engine.in_flight() == 0 { Drained::AtRest } else { Drained::UnderWay })
    }

    fn settle_on_host(&mut self) -> Result<(), BoxError> {
        let config = self.image.config();
        if config.read_only {
            return Ok(());
        }
        let fail = |reason: fmt::Arguments<'_>| {
            format!("drive {}: {} cannot be written back: {reason}", config.id, config.path.display())
        };
        if self.inconsistent {
            return Err(fail(format_args!("an earlier attempt has failed, and data may be lost")).into());
        }
        self.image.fd().sync_data().map_err(|error| {
            self.inconsistent = true;
            fail(format_args!("{error}")).into()
        })
    }

    fn resume(&mut self) {
        self.draining = false;
        // Every queue is offered.
        self.waiting.clear();
        if self.engine.is_left_behind() {
            self.engine = Engine::ring(&self.image.config().id);
            self.bytes = 0;
        }
    }

    fn persistent(&mut self) -> Option<&mut dyn Persistent> {
        Some(self)
    }
}

impl Persistent for Block {
    fn sections(&self) -> Vec<SectionVersions> {
        vec![(BlockState::NAME, BlockState::VERSIONS)]
    }

    fn save(&self, main: &mut FrameWriter, instance: u32) -> Result<(), BoxError> {
        if self.engine.in_flight() > 0 {
            return Err(format!("drive {}: requests are under way", self.image.config().id).into());
        }
        let state = BlockState {
            serial: self.serial.clone(),
            read_only: self.image.config().read_only,
            queues: self.queues,
            queue_size: self.queue_size,
            sectors: self.sectors,
            writeback: self.writeback,
            inconsistent: self.inconsistent,
        };
        Ok(main.put_section(instance, &state)?)
    }

    fn backing(&self) -> Result<Option<Backing>, BoxError> {
        self.image.check_room(self.sectors)?;
        Ok(Some(Backing::Image(self.image.identity()?)))
    }

    fn load(&mut self, main: &mut Frame, instance: u32) -> Result<(), BoxError> {
        let state: BlockState = main.require_section(instance)?;
        let same = |what, before: String, now: String| {
            let id = self.image.config().id.clone();
            if before == now { Ok(()) } else { Err(BlockError::Other { id, what, before, now }) }
        };
        same(
            "the serial number",
            format!("\"{}\"", state.serial.escape_debug()),
            format!("\"{}\"", self.serial.escape_debug()),
        )?;
        same("read-only", on_off(state.read_only), on_off(self.image.config().read_only))?;
        same("num-queues", state.queues.to_string(), self.queues.to_string())?;
        same("queue-size", state.queue_size.to_string(), self.queue_size.to_string())?;
        self.image.check_room(state.sectors)?;
        self.sectors = state.sectors;
        self.writeback = state.writeback;
        self.inconsistent = state.inconsistent;
        Ok(())
    }
}

fn on_off(value: bool) -> String {
    if value { "on" } else { "off" }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::ImageConfig;
    use crate::virtio::Interrupt;
    use oslib::guest_io::GuestBuffers;
    use vm_memory::GuestMemoryMmap;

    struct Deaf;

    impl Interrupt for Deaf {
        fn queue(&self, _index: usize) {}
        fn config(&self) {}
    }

    fn block(cache: Cache) -> Block {
        let file = tempfile::NamedTempFile::new().unwrap();
        let image = Image::open(ImageConfig { cache, ..ImageConfig::new("disk0", file.path()) }).unwrap();
        Block::new(BlockConfig { aio: Aio::Threads, ..BlockConfig::new(image) }).unwrap()
    }

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap()
    }

    fn task(purpose: Purpose) -> Task {
        Task { queue: 0, head: 0, status: GuestAddress(0), written: 1, bytes: 0, purpose, durable: true }
    }

    #[test]
    fn a_write_is_durable_unless_the_driver_flushes_a_cache() {
        for (cache, write_cache, flushes, durable) in [
            (Cache::Writeback, None, true, false),
            (Cache::Writeback, None, false, true),
            (Cache::Writeback, Some(0), true, true),
            (Cache::Writethrough, None, true, true),
            (Cache::Writethrough, Some(1), true, false),
            (Cache::Unsafe, None, true, false),
            (Cache::Unsafe, Some(0), false, false),
        ] {
            let mut block = block(cache);
            let features = u64::from(flushes) << VIRTIO_BLK_F_FLUSH;
            let driver = Driver { memory: memory(), queues: vec![], features, interrupt: Box::new(Deaf) };
            write_cache.inspect(|on| block.write_config(WRITEBACK, &[*on]));
            assert_eq!(block.is_durable(&driver), durable, "{cache:?} {write_cache:?} {flushes}");
        }
        let mut task = task(Purpose::Alone);
        let from = Source::zeros(512);
        let first = block(Cache::Writeback).first(&mut task, Action::Write { offset: 0, from });
        assert!(matches!(first, Next::Do(Operation::Write { durable: true, .. })));
    }

    #[test]
    fn a_flush_reaches_the_disk_unless_it_is_unsafe() {
        let flush = |cache| block(cache).first(&mut task(Purpose::Alone), Action::Flush);
        assert!(matches!(flush(Cache::Writeback), Next::Do(Operation::Sync)));
        assert!(matches!(flush(Cache::Writethrough), Next::Do(Operation::Sync)));
        assert!(matches!(flush(Cache::Unsafe), Next::Over(Status::Ok)));
    }

    #[test]
    fn a_flush_that_failed_is_not_forgotten() {
        let failed = |code| Err(io::Error::from_raw_os_error(code));
        let write = |durable| Operation::Write { offset: 0, from: Source::zeros(512), durable };
        for (operation, code, lost) in [
            (Operation::Sync, libc::EIO, true),
            (Operation::Sync, libc::ENOSPC, true),
            (Operation::Sync, libc::EINTR, false),
            (write(true), libc::EIO, true),
            (write(true), libc::ENOSPC, false),
            (write(false), libc::EIO, false),
        ] {
            let told = format!("{operation:?} {code}");
            let mut old = block(Cache::Writeback);
            let _ = old.next(&mut task(Purpose::Alone), operation, failed(code));
            let check = |block: &mut Block| {
                let flush = block.first(&mut task(Purpose::Alone), Action::Flush);
                assert_eq!(matches!(flush, Next::Over(Status::Failed)), lost, "{told}");
                let under_way = block.next(&mut task(Purpose::Alone), Operation::Sync, Ok(0));
                assert_eq!(matches!(under_way, Next::Over(Status::Failed)), lost, "{told}");
                let discard = Operation::Allocate { how: Allocation::Hole, offset: 0, len: 512 };
                let durable = block.next(&mut task(Purpose::Discard), discard, Ok(0));
                assert_eq!(matches!(durable, Next::Over(Status::Failed)), lost, "{told}");
            };
            check(&mut old);
            // Neither a new driver nor a new program makes it good.
            old.reset();
            let mut writer = FrameWriter::default();
            old.save(&mut writer, 0).unwrap();
            let mut new = block(Cache::Writeback);
            new.load(&mut Frame::parse(&writer.finish(1)).unwrap(), 0).unwrap();
            check(&mut new);
        }
    }

    #[test]
    fn what_was_lost_does_not_settle() {
        let mut block = block(Cache::Unsafe);
        block.settle_on_host().unwrap();
        block.inconsistent = true;
        let error = block.settle_on_host().unwrap_err().to_string();
        assert!(error.starts_with("drive disk0: /"), "{error}");
        assert!(
            error.ends_with("cannot be written back: an earlier attempt has failed, and data may be lost"),
            "{error}"
        );
    }

    #[test]
    fn zeros_are_written_where_a_range_cannot_be_zeroed() {
        let mut block = block(Cache::Writeback);
        let (start, len) = (512, 100 << 20);
        let mut task = task(Purpose::Alone);
        let first = block.first(&mut task, Action::WriteZeroes { offset: start, len, unmap: false });
        let Next::Do(mut operation) = first else { panic!("there is something to do") };
        let mut result = Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        let mut at = start;
        loop {
            let next = block.next(&mut task, operation, result);
            let Next::Do(Operation::Write { offset, from, durable: true }) = next else {
                assert!(matches!(next, Next::Over(Status::Ok)));
                break;
            };
            assert_eq!(offset, at);
            assert!(!from.is_empty() && offset + from.len() as u64 <= start + len);
            // In uneven pieces, as a disk may be slow.
            let done = from.len().min(7 << 20);
            at += done as u64;
            (operation, result) = (Operation::Write { offset, from, durable: true }, Ok(done));
        }
        assert_eq!(at, start + len);
    }

    #[test]
    fn errors_are_those_of_the_request() {
        let mut block = block(Cache::Writeback);
        let failed = |code| Err(io::Error::from_raw_os_error(code));
        let write = || Operation::Write { offset: 0, from: Source::zeros(512), durable: false };
        let hole = || Operation::Allocate { how: Allocation::Hole, offset: 0, len: 512 };
        let mut next = |purpose, operation, result| block.next(&mut task(purpose), operation, result);
        for code in [libc::ENOSPC, libc::EIO, libc::EOPNOTSUPP] {
            assert!(matches!(next(Purpose::Alone, write(), failed(code)), Next::Over(Status::Failed)));
        }
        assert!(matches!(next(Purpose::Alone, write(), Ok(0)), Next::Over(Status::Failed)));
        assert!(matches!(
            next(Purpose::Alone, write(), failed(libc::ECANCELED)),
            Next::Do(Operation::Write { .. })
        ));
        assert!(matches!(next(Purpose::Discard, hole(), failed(libc::EOPNOTSUPP)), Next::Over(Status::Ok)));
        assert!(matches!(next(Purpose::Discard, hole(), failed(libc::EIO)), Next::Over(Status::Failed)));
        assert!(matches!(
            next(Purpose::Zeros { end: 512 }, hole(), failed(libc::ENOSPC)),
            Next::Over(Status::Failed)
        ));
        // What is durable is so after a discard, too.
        assert!(matches!(next(Purpose::Discard, hole(), Ok(0)), Next::Do(Operation::Sync)));
    }

    #[test]
    fn what_was_read_in_part_is_read_on() {
        let (mut block, memory) = (block(Cache::Writeback), memory());
        memory.write_slice(&[7; 0x1000], GuestAddress(0)).unwrap();
        let into = GuestBuffers::new(&memory, [(GuestAddress(0x100), 1024)]).unwrap();
        let read = Operation::Read { offset: 512, into };
        let next = block.next(&mut task(Purpose::Alone), read, Ok(1000));
        let Next::Do(Operation::Read { offset: 1512, into }) = next else { panic!("24 bytes are left") };
        assert_eq!(into.len(), 24);
        let end = block.next(&mut task(Purpose::Alone), Operation::Read { offset: 1512, into }, Ok(0));
        assert!(matches!(end, Next::Over(Status::Ok)));
        let mut bytes = [0; 1026];
        memory.read_slice(&mut bytes, GuestAddress(0xff)).unwrap();
        assert!(bytes[..1001] == [7; 1001] && bytes[1001..1025] == [0; 24] && bytes[1025] == 7);
    }
}
