//! A device for tests, and a driver that reaches it as a guest would.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter};
use cpr_core::section::SectionType;
use oslib::eventfd::EventFd;
use serde::{Deserialize, Serialize};
use virtio_queue::QueueOwnedT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{
    Broken, Class, Direction, Drained, Driver, Persistent, SectionVersions, VirtioDevice, Watch, WatchToken,
};
use crate::error::KvmError;
use crate::pci::Hypervisor;

/// What a test sees and steers of a [`Loopback`].
#[derive(Debug, Default)]
pub(crate) struct Remote {
    /// It does not come to rest.
    pub(crate) busy: AtomicBool,
    pub(crate) resumed: AtomicUsize,
    pub(crate) reset: AtomicUsize,
    /// Readiness of its descriptor that it was told of.
    pub(crate) ready: AtomicUsize,
    /// Chains that it gave back.
    pub(crate) served: AtomicUsize,
    /// It was called although it had been drained and not resumed.
    pub(crate) woken: AtomicBool,
    /// Chains are completed only by a drain, or when the descriptor is ready.
    pub(crate) slow: AtomicBool,
    /// Others listen to the doorbell of queue 0.
    pub(crate) deaf: AtomicBool,
    /// How often it was asked about that.
    pub(crate) asked: AtomicUsize,
}

/// Answers each buffer with the bytes inverted: queue 0 in the same chain, queue 1 not at all.
pub(crate) struct Loopback {
    pub(crate) remote: Arc<Remote>,
    pub(crate) watched: Option<Arc<EventFd>>,
    pub(crate) savable: bool,
    held: bool,
    /// Heads and lengths of chains that are not completed.
    under_way: Vec<(u16, u32)>,
    config: LoopbackState,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LoopbackState {
    bytes: [u8; 8],
    /// Chains that were answered.
    answered: u64,
}

impl SectionType for LoopbackState {
    const NAME: &'static str = "test/loopback";
    const VERSION: u32 = 1;
}

/// The feature that it offers.
pub(crate) const FEATURE: u64 = 1 << 5;

impl Loopback {
    pub(crate) fn new() -> (Box<Loopback>, Arc<Remote>) {
        let remote = Arc::new(Remote::default());
        let device = Loopback {
            remote: remote.clone(),
            watched: None,
            savable: true,
            held: false,
            under_way: Vec::new(),
            config: LoopbackState::default(),
        };
        (Box::new(device), remote)
    }

    fn note_call(&self) {
        if self.held {
            self.remote.woken.store(true, Ordering::SeqCst);
        }
    }

    fn complete(&mut self, driver: &mut Driver) -> Result<(), Broken> {
        for (head, written) in self.under_way.drain(..) {
            driver.give_back(0, head, written)?;
            self.config.answered += 1;
            self.remote.served.fetch_add(1, Ordering::SeqCst);
        }
        driver.signal(0)
    }
}

impl VirtioDevice for Loopback {
    fn class(&self) -> Class {
        Class { virtio_id: 42, pci: (0xff, 0) }
    }

    fn features(&self) -> u64 {
        FEATURE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![16, 8]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.config.bytes.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.note_call();
        for (at, byte) in (offset..self.config.bytes.len()).zip(data) {
            self.config.bytes[at] = *byte;
        }
    }

    fn reset(&mut self) {
        self.under_way.clear();
        self.config = LoopbackState::default();
        self.remote.reset.fetch_add(1, Ordering::SeqCst);
    }

    fn queue_ready(&mut self, driver: &mut Driver, queue: usize) -> Result<(), Broken> {
        self.note_call();
        if queue != 0 {
            return Ok(());
        }
        let memory = driver.memory.clone();
        let chains = driver.queues[0].iter(&memory).map_err(|error| Broken::queue(0, error))?;
        for chain in chains {
            let (mut sum, mut written) = (0u8, 0);
            let head = chain.head_index();
            for descriptor in chain {
                let mut bytes = vec![0; descriptor.len().min(4096) as usize];
                if descriptor.is_write_only() {
                    bytes.fill(!sum);
                    let _ = memory.write_slice(&bytes, descriptor.addr());
                    written += bytes.len() as u32;
                } else if memory.read_slice(&mut bytes, descriptor.addr()).is_ok() {
                    sum = bytes.iter().fold(sum, |sum, byte| sum.wrapping_add(*byte));
                }
            }
            self.under_way.push((head, written));
        }
        if self.remote.slow.load(Ordering::SeqCst) { Ok(()) } else { self.complete(driver) }
    }

    fn watches(&self) -> Vec<Watch<'_>> {
        let watch = |fd| Watch { fd, token: 7, direction: Direction::Read };
        self.watched.iter().map(|fd| watch(fd.as_fd())).collect()
    }

    fn served_elsewhere(&self) -> Vec<usize> {
        self.remote.asked.fetch_add(1, Ordering::SeqCst);
        if self.remote.deaf.load(Ordering::SeqCst) { vec![0] } else { Vec::new() }
    }

    fn fd_ready(&mut self, driver: &mut Driver, token: WatchToken) -> Result<(), Broken> {
        self.note_call();
        assert_eq!(token, 7);
        self.watched.as_ref().unwrap().drain().unwrap();
        self.remote.ready.fetch_add(1, Ordering::SeqCst);
        self.complete(driver)
    }

    fn drain(&mut self, driver: &mut Driver) -> Result<Drained, Broken> {
        self.held = true;
        if self.remote.busy.load(Ordering::SeqCst) {
            return Ok(Drained::UnderWay);
        }
        self.complete(driver)?;
        Ok(Drained::AtRest)
    }

    fn resume(&mut self) {
        self.held = false;
        self.remote.resumed.fetch_add(1, Ordering::SeqCst);
    }

    fn persistent(&mut self) -> Option<&mut dyn Persistent> {
        if self.savable { Some(self) } else { None }
    }
}

impl Persistent for Loopback {
    fn sections(&self) -> Vec<SectionVersions> {
        vec![(LoopbackState::NAME, LoopbackState::VERSIONS)]
    }

    fn save(&self, main: &mut FrameWriter, instance: u32) -> Result<(), BoxError> {
        Ok(main.put_section(instance, &self.config)?)
    }

    fn load(&mut self, main: &mut Frame, instance: u32) -> Result<(), BoxError> {
        self.held = true;
        self.config = main.require_section(instance)?;
        Ok(())
    }
}

/// In KVM's place: notes what it is asked for.
#[derive(Debug, Default)]
pub(crate) struct NoHypervisor {
    pub(crate) messages: Mutex<Vec<(u64, u32)>>,
    /// Addresses of doorbells.
    pub(crate) doorbells: Mutex<Vec<u64>>,
    /// It refuses doorbells.
    pub(crate) deaf: AtomicBool,
}

impl NoHypervisor {
    pub(crate) fn take_messages(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.messages.lock().unwrap())
    }
}

impl Hypervisor for NoHypervisor {
    fn send_message(&self, address: u64, data: u32) {
        self.messages.lock().unwrap().push((address, data));
    }

    fn attach_doorbell(&self, address: u64, _doorbell: &EventFd) -> Result<(), KvmError> {
        if self.deaf.load(Ordering::SeqCst) {
            return Err(KvmError { call: "KVM_IOEVENTFD", source: std::io::ErrorKind::Unsupported.into() });
        }
        let mut doorbells = self.doorbells.lock().unwrap();
        assert!(!doorbells.contains(&address), "{address:#x} is attached twice");
        doorbells.push(address);
        Ok(())
    }

    fn detach_doorbell(&self, address: u64, _doorbell: &EventFd) -> Result<(), KvmError> {
        let mut doorbells = self.doorbells.lock().unwrap();
        let before = doorbells.len();
        doorbells.retain(|attached| *attached != address);
        match doorbells.len() < before {
            true => Ok(()),
            false => Err(KvmError { call: "KVM_IOEVENTFD", source: std::io::ErrorKind::NotFound.into() }),
        }
    }
}

/// Entries of queue 0.
const SIZE: u16 = 16;
/// Where its rings are, and the buffers.
pub(crate) const DESCRIPTORS: u64 = 0x10_0000;
pub(crate) const AVAILABLE: u64 = 0x10_1000;
pub(crate) const USED: u64 = 0x10_2000;
const BUFFERS: u64 = 0x11_0000;

/// What a guest does with memory outside of RAM.
pub(crate) trait Wires {
    fn read(&self, offset: u64, data: &mut [u8]);
    fn write(&self, offset: u64, data: &[u8]);
}

/// Brings the device behind `bar` up to `DRIVER_OK`: all features, queue 0 with vector 1, configuration with vector 0.
pub(crate) fn bring_up(bar: &impl Wires) {
    agree(bar);
    set_queue(bar, DESCRIPTORS);
    bar.write(0x14, &[0x0f]);
}

/// Up to `FEATURES_OK`.
pub(crate) fn agree(bar: &impl Wires) {
    for value in [1u8, 3] {
        bar.write(0x14, &[value]);
    }
    for (select, features) in [(0u32, FEATURE as u32 | 1 << 28 | 1 << 29), (1, 1)] {
        bar.write(0x08, &select.to_le_bytes());
        bar.write(0x0c, &features.to_le_bytes());
    }
    bar.write(0x14, &[0x0b]);
}

/// Enables queue 0, with its descriptors at this address.
pub(crate) fn set_queue(bar: &impl Wires, descriptors: u64) {
    bar.write(0x10, &0u16.to_le_bytes());
    bar.write(0x16, &0u16.to_le_bytes());
    bar.write(0x18, &SIZE.to_le_bytes());
    bar.write(0x1a, &1u16.to_le_bytes());
    for (at, address) in [(0x20, descriptors), (0x28, AVAILABLE), (0x30, USED)] {
        bar.write(at, &(address as u32).to_le_bytes());
        bar.write(at + 4, &((address >> 32) as u32).to_le_bytes());
    }
    bar.write(0x1c, &1u16.to_le_bytes());
}

/// Unmasks both vectors, and gives them messages: 0xc0 and 0xc1 to the first processor.
pub(crate) fn unmask(bar: &impl Wires) {
    for vector in 0..2u64 {
        let at = 0x4000 + 16 * vector;
        bar.write(at, &0xfee0_0000u32.to_le_bytes());
        bar.write(at + 8, &(0xc0 + vector as u32).to_le_bytes());
        bar.write(at + 12, &0u32.to_le_bytes());
    }
}

/// Makes a chain of two buffers available in queue 0: `byte`, and room for the answer.
pub(crate) fn offer(memory: &GuestMemoryMmap, byte: u8) {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    let index: u16 = memory.read_obj(GuestAddress(AVAILABLE + 2)).unwrap();
    let head = index * 2 % SIZE;
    memory.write_obj(byte, GuestAddress(BUFFERS)).unwrap();
    for (at, descriptor) in [
        (head, Descriptor::new(BUFFERS, 1, NEXT, head + 1)),
        (head + 1, Descriptor::new(BUFFERS + 64, 1, WRITE, 0)),
    ] {
        memory.write_obj(descriptor, GuestAddress(DESCRIPTORS + 16 * u64::from(at))).unwrap();
    }
    memory.write_obj(head, GuestAddress(AVAILABLE + 4 + 2 * u64::from(index % SIZE))).unwrap();
    // Interrupt as soon as something is used.
    memory.write_obj(used(memory), GuestAddress(AVAILABLE + 4 + 2 * u64::from(SIZE))).unwrap();
    memory.store(index.wrapping_add(1), GuestAddress(AVAILABLE + 2), Ordering::Release).unwrap();
}

/// How many chains of queue 0 the driver was given back.
pub(crate) fn used(memory: &GuestMemoryMmap) -> u16 {
    memory.load(GuestAddress(USED + 2), Ordering::Acquire).unwrap()
}

/// The last answer.
pub(crate) fn answer(memory: &GuestMemoryMmap) -> u8 {
    memory.read_obj(GuestAddress(BUFFERS + 64)).unwrap()
}
