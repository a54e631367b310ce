//! The device, what its driver has told the transport, and how far the two have come (virtio 1.2, 2.1 and 3.1).

use std::fmt;
use std::sync::Arc;

use cpr_core::error::BoxError;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::ShapeError;
use super::common::{Ring, with_half};
use super::signals::{Ear, Signals};
use crate::guest_log::warn_of_guest;
use crate::virtio::{Broken, Drained, Driver, Interrupt, Persistent, VirtioDevice, Watch, WatchToken};

/// Device status bits (virtio 1.2, 2.1).
pub(super) mod status {
    pub(in super::super) const ACKNOWLEDGE: u8 = 1;
    pub(in super::super) const DRIVER: u8 = 2;
    pub(in super::super) const DRIVER_OK: u8 = 4;
    pub(in super::super) const FEATURES_OK: u8 = 8;
    pub(in super::super) const NEEDS_RESET: u8 = 64;
    pub(in super::super) const FAILED: u8 = 128;
    /// What a driver sets.
    pub(in super::super) const BY_DRIVER: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// The transport's own features, by bit number (virtio 1.2, 6).
pub(super) const INDIRECT_DESC: u32 = 28;
pub(super) const EVENT_IDX: u32 = 29;
pub(super) const VERSION_1: u32 = 32;
const OWN_FEATURES: u64 = 1 << INDIRECT_DESC | 1 << EVENT_IDX | 1 << VERSION_1;

/// A queue as the driver has set it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueSetup {
    pub(super) max: u16,
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

impl QueueSetup {
    fn new(queue: usize, max: u16) -> Result<Self, ShapeError> {
        // The size of a queue that its maximum does not allow could not be read back.
        match Queue::new(max) {
            Ok(_) => Ok(Self { max, size: max, enabled: false, descriptors: 0, available: 0, used: 0 }),
            Err(_) => Err(ShapeError::QueueSize { queue, size: max }),
        }
    }

    /// The queue to be used, where it is the `index`th.
    pub(super) fn queue(
        &self,
        index: usize,
        memory: &GuestMemoryMmap,
        event_idx: bool,
    ) -> Result<Queue, Broken> {
        let broken = |error| Broken::queue(index, error);
        let mut queue = Queue::new(self.max).map_err(broken)?;
        if !self.enabled {
            return Ok(queue);
        }
        queue.try_set_size(self.size).map_err(broken)?;
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).map_err(broken)?;
        queue.try_set_avail_ring_address(GuestAddress(self.available)).map_err(broken)?;
        queue.try_set_used_ring_address(GuestAddress(self.used)).map_err(broken)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        match queue.is_valid(memory) {
            true => Ok(queue),
            false => Err(Broken::queue(index, "its rings are not in RAM")),
        }
    }

    pub(super) fn is_good_size(&self, size: u16) -> bool {
        size.is_power_of_two() && size <= self.max
    }
}

/// A device and its driver, as far as there is one.
pub(super) struct Transport {
    device: Box<dyn VirtioDevice>,
    /// Features that the device would offer and is not to.
    withheld: u64,
    memory: GuestMemoryMmap,
    pub(super) signals: Arc<Signals>,
    pub(super) status: u8,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<QueueSetup>,
    /// There from `DRIVER_OK` on, until a reset or until something is found broken.
    pub(super) driver: Option<Driver>,
    /// The device has been drained, or loaded, and waits for the guest to go on.
    held: bool,
}

impl Transport {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        withheld: u64,
        memory: GuestMemoryMmap,
        signals: Arc<Signals>,
    ) -> Result<Self, ShapeError> {
        let sizes = device.queue_sizes().into_iter().enumerate();
        let queues = sizes.map(|(queue, max)| QueueSetup::new(queue, max)).collect::<Result<_, _>>()?;
        Ok(Self {
            device,
            withheld,
            memory,
            signals,
            status: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
            driver: None,
            held: false,
        })
    }

    // Configured by the driver.

    pub(super) fn offered(&self) -> u64 {
        self.device.features() & !self.withheld | OWN_FEATURES
    }

    pub(super) fn set_driver_features(&mut self, value: u32) {
        // What was agreed on stays until a reset.
        if self.status & status::FEATURES_OK == 0 {
            self.driver_features = with_half(self.driver_features, self.driver_feature_select, value);
        }
    }

    /// Whether a driver may have these features.
    pub(super) fn can_agree(&self, features: u64) -> bool {
        features & !self.offered() == 0 && features & 1 << VERSION_1 != 0
    }

    /// The driver writes the device status; tells whether that activated or reset the device. Bits once set go away by a reset
    /// alone, which is a write of 0.
    pub(super) fn write_status(&mut self, value: u8) -> bool {
        if value == 0 {
            self.reset();
            return true;
        }
        let new = value & status::BY_DRIVER & !self.status;
        self.status |= new & !(status::FEATURES_OK | status::DRIVER_OK);
        // Not set if it cannot be: the driver reads it back.
        if new & status::FEATURES_OK != 0 && self.can_agree(self.driver_features) {
            self.status |= status::FEATURES_OK;
        }
        let ready = self.status & (status::FEATURES_OK | status::NEEDS_RESET) == status::FEATURES_OK;
        if new & status::DRIVER_OK == 0 || !ready {
            return false;
        }
        self.status |= status::DRIVER_OK;
        // A device that was stopped before it had a driver.
        self.resume();
        if let Err(broken) = self.activate() {
            self.break_down(&broken);
        }
        true
    }

    fn activate(&mut self) -> Result<(), Broken> {
        let mut driver = self.make_driver()?;
        self.device.activate(&mut driver)?;
        self.driver = Some(driver);
        Ok(())
    }

    /// The driver with its queues as it has set them up, none of which has been used.
    pub(super) fn make_driver(&self) -> Result<Driver, Broken> {
        let event_idx = self.driver_features & 1 << EVENT_IDX != 0;
        let queues = self.queues.iter().enumerate();
        let queues = queues.map(|(index, setup)| setup.queue(index, &self.memory, event_idx));
        Ok(Driver {
            queues: queues.collect::<Result<_, _>>()?,
            memory: self.memory.clone(),
            features: self.driver_features,
            interrupt: Box::new(Ear(self.signals.clone())),
        })
    }

    fn selected(&mut self) -> Option<&mut QueueSetup> {
        // Once the device works, a queue cannot be changed, nor one that has been enabled.
        let fixed = self.status & status::DRIVER_OK != 0;
        self.queues.get_mut(usize::from(self.queue_select)).filter(|queue| !fixed && !queue.enabled)
    }

    pub(super) fn set_queue_size(&mut self, size: u16) {
        if let Some(queue) = self.selected().filter(|queue| queue.is_good_size(size)) {
            queue.size = size;
        }
    }

    pub(super) fn enable_queue(&mut self) {
        if let Some(queue) = self.selected() {
            queue.enabled = true;
        }
    }

    pub(super) fn set_ring_address(&mut self, ring: Ring, change: impl FnOnce(u64) -> u64) {
        if let Some(queue) = self.selected() {
            let address = match ring {
                Ring::Descriptors => &mut queue.descriptors,
                Ring::Available => &mut queue.available,
                Ring::Used => &mut queue.used,
            };
            *address = change(*address);
        }
    }

    pub(super) fn read_device(&self, offset: usize, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    pub(super) fn write_device(&mut self, offset: usize, data: &[u8]) {
        self.resume();
        self.device.write_config(offset, data);
    }

    /// Everything as after power-on.
    pub(super) fn reset(&mut self) {
        if self.status != 0 {
            self.device.reset();
        }
        self.driver = None;
        self.status = 0;
        (self.device_feature_select, self.driver_feature_select, self.driver_features) = (0, 0, 0);
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueSetup {
                size: queue.max,
                enabled: false,
                descriptors: 0,
                available: 0,
                used: 0,
                ..*queue
            };
        }
        self.signals.reset();
    }

    /// The device may not access memory any more, so nothing of it may be under way when this returns. Its driver starts
    /// it again, if at all, by a reset.
    pub(super) fn leave_memory_alone(&mut self) {
        if self.driver.take().is_some() {
            self.device.reset();
            self.status &= !status::DRIVER_OK;
        }
    }

    // Working.

    /// Has the device do something for its driver, if there is one.
    fn work<T>(
        &mut self,
        work: impl FnOnce(&mut dyn VirtioDevice, &mut Driver) -> Result<T, Broken>,
    ) -> Option<T> {
        let driver = self.driver.as_mut()?;
        match work(&mut *self.device, driver) {
            Ok(done) => Some(done),
            Err(broken) => {
                self.break_down(&broken);
                None
            }
        }
    }

    /// The device cannot go on with this driver, and says so. It forgets the driver at once, so that nothing of it is under
    /// way any more: not in its memory either.
    fn break_down(&mut self, broken: &Broken) {
        let virtio_id = self.virtio_id();
        warn_of_guest!(virtio_id, reason = %broken, "a virtio device needs a reset by its driver");
        self.device.reset();
        self.driver = None;
        self.status |= status::NEEDS_RESET;
        Ear(self.signals.clone()).config();
    }

    pub(super) fn queue_ready(&mut self, queue: usize) {
        let is_ready = |driver: &Driver| driver.queues.get(queue).is_some_and(QueueT::ready);
        if self.driver.as_ref().is_some_and(is_ready) {
            self.work(|device, driver| device.queue_ready(driver, queue));
        }
    }

    pub(super) fn fd_ready(&mut self, token: WatchToken) {
        self.work(|device, driver| device.fd_ready(driver, token));
    }

    pub(super) fn watches(&self) -> Vec<Watch<'_>> {
        match self.driver {
            Some(_) => self.device.watches(),
            None => Vec::new(),
        }
    }

    pub(super) fn served_elsewhere(&self) -> Vec<usize> {
        match self.driver {
            Some(_) => self.device.served_elsewhere(),
            None => Vec::new(),
        }
    }

    /// A device without a driver has nothing under way.
    pub(super) fn drain(&mut self) -> Drained {
        self.held = true;
        self.work(|device, driver| device.drain(driver)).unwrap_or(Drained::AtRest)
    }

    pub(super) fn leave_process(&mut self) {
        self.device.leave_process();
    }

    pub(super) fn settle_on_host(&mut self) -> Result<(), BoxError> {
        self.device.settle_on_host()
    }

    pub(super) fn resume(&mut self) {
        if std::mem::take(&mut self.held) {
            self.device.resume();
        }
    }

    // Saved and loaded.

    pub(super) fn virtio_id(&self) -> u16 {
        self.device.class().virtio_id
    }

    pub(super) fn persistent(&mut self) -> Option<&mut dyn Persistent> {
        self.device.persistent()
    }

    /// What was loaded waits for the guest to go on.
    pub(super) fn hold(&mut self) {
        self.held = true;
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport")
            .field("class", &self.device.class())
            .field("status", &self.status)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}
