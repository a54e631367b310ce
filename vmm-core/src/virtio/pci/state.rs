//! What the transport keeps over an update.

use cpr_core::section::SectionType;
use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;

use super::transport::{QueueSetup, Transport, status};
use super::{SectionVersions, signals};

/// The state of a virtio device's transport, as it travels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    /// Virtio device id, by which a device of another kind is told.
    pub virtio_id: u16,
    /// Device status.
    pub status: u8,
    /// Which half of the device's features is shown.
    pub device_feature_select: u32,
    /// Which half of the driver's features is shown.
    pub driver_feature_select: u32,
    /// What the driver has chosen of the features.
    pub driver_features: u64,
    /// Generation of the device's configuration.
    pub config_generation: u8,
    /// ISR status.
    pub isr: u8,
    /// Vector of the configuration's changes; 0xffff is none.
    pub config_vector: u16,
    /// The queue that is shown.
    pub queue_select: u16,
    /// The window into the BAR in configuration space.
    pub window: WindowState,
    /// The queues.
    pub queues: Vec<QueueState>,
}

/// Where the window into the BAR leads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowState {
    /// BAR.
    pub bar: u8,
    /// Offset in it.
    pub offset: u32,
    /// Bytes.
    pub length: u32,
}

/// A queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries.
    pub size: u16,
    /// The driver has enabled it.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// Its vector; 0xffff is none.
    pub vector: u16,
    /// Index of the next available entry that the device takes.
    pub next_avail: u16,
    /// Index of the next used entry that the device fills.
    pub next_used: u16,
}

impl SectionType for VirtioState {
    const NAME: &'static str = "virtio/transport";
    const VERSION: u32 = 1;
}

/// A section's name and versions.
pub(super) fn versions<T: SectionType>() -> SectionVersions {
    (T::NAME, T::VERSIONS)
}

/// A state of the transport that cannot be, or cannot be here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VirtioStateError {
    /// It is of a device of another kind.
    #[error("the state is of a virtio device with id {found}, this one has {expected}")]
    Id {
        /// The id of this device.
        expected: u16,
        /// The id in the state.
        found: u16,
    },
    /// It has another number of queues.
    #[error("the state has {found} queues, this device has {expected}")]
    Queues {
        /// Queues of this device.
        expected: usize,
        /// Queues in the state.
        found: usize,
    },
    /// A queue's size is impossible.
    #[error(
        "queue {queue} has {found} entries in the state; here it can have {max}, or a smaller power of two"
    )]
    QueueSize {
        /// The queue.
        queue: usize,
        /// The most that it can have.
        max: u16,
        /// What it has in the state.
        found: u16,
    },
    /// A vector does not exist.
    #[error("vector {found} does not exist")]
    Vector {
        /// Its number.
        found: u16,
    },
    /// The driver uses what this device does not offer.
    #[error("the guest's driver uses features {found:#x}, this device offers {offered:#x}")]
    Features {
        /// The features of the driver.
        found: u64,
        /// What is offered.
        offered: u64,
    },
    /// No driver can have brought the device here.
    #[error("device status {found:#x} cannot be")]
    Status {
        /// The status in the state.
        found: u8,
    },
    /// A queue is not what a driver can have set up.
    #[error(transparent)]
    Broken(#[from] crate::virtio::Broken),
}

impl Transport {
    pub(super) fn save(&mut self, window: WindowState) -> VirtioState {
        let queues = self.queues.iter().enumerate().map(|(index, setup)| {
            let live = self.driver.as_ref().and_then(|driver| driver.queues.get(index));
            QueueState {
                size: setup.size,
                enabled: setup.enabled,
                descriptors: setup.descriptors,
                available: setup.available,
                used: setup.used,
                vector: self.signals.queue_vector(index),
                next_avail: live.map_or(0, QueueT::next_avail),
                next_used: live.map_or(0, QueueT::next_used),
            }
        });
        VirtioState {
            queues: queues.collect(),
            virtio_id: self.virtio_id(),
            status: self.status,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            driver_features: self.driver_features,
            config_generation: self.signals.generation(),
            isr: self.signals.isr(),
            config_vector: self.signals.config_vector(),
            queue_select: self.queue_select,
            window,
        }
    }

    /// Takes over a driver that arrives, and its queues. The device itself is loaded afterwards.
    pub(super) fn load(&mut self, state: &VirtioState) -> Result<(), VirtioStateError> {
        self.check(state)?;
        self.status = state.status;
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        self.signals.set_generation(state.config_generation);
        self.signals.set_isr(state.isr);
        self.signals.set_config_vector(state.config_vector);
        for (index, (setup, saved)) in self.queues.iter_mut().zip(&state.queues).enumerate() {
            let QueueState { size, enabled, descriptors, available, used, .. } = *saved;
            *setup = QueueSetup { max: setup.max, size, enabled, descriptors, available, used };
            self.signals.set_queue_vector(index, saved.vector);
        }
        if state.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK {
            let mut driver = self.make_driver()?;
            for (queue, saved) in driver.queues.iter_mut().zip(&state.queues) {
                queue.set_next_avail(saved.next_avail);
                queue.set_next_used(saved.next_used);
            }
            self.driver = Some(driver);
        }
        self.hold();
        Ok(())
    }

    fn check(&self, state: &VirtioState) -> Result<(), VirtioStateError> {
        let (expected, found) = (self.virtio_id(), state.virtio_id);
        if found != expected {
            return Err(VirtioStateError::Id { expected, found });
        }
        let (expected, found) = (self.queues.len(), state.queues.len());
        if found != expected {
            return Err(VirtioStateError::Queues { expected, found });
        }
        for (queue, (setup, saved)) in self.queues.iter().zip(&state.queues).enumerate() {
            if !setup.is_good_size(saved.size) {
                return Err(VirtioStateError::QueueSize { queue, max: setup.max, found: saved.size });
            }
        }
        let mut vectors = state.queues.iter().map(|queue| queue.vector).chain([state.config_vector]);
        let exists = |vector: u16| vector == signals::NO_VECTOR || usize::from(vector) <= self.queues.len();
        if let Some(found) = vectors.find(|vector| !exists(*vector)) {
            return Err(VirtioStateError::Vector { found });
        }
        let agreed = state.status & status::FEATURES_OK != 0;
        if agreed && !self.can_agree(state.driver_features) {
            return Err(VirtioStateError::Features { found: state.driver_features, offered: self.offered() });
        }
        let known = status::BY_DRIVER | status::NEEDS_RESET;
        let (is_ready, needs_reset) =
            (state.status & status::DRIVER_OK != 0, state.status & status::NEEDS_RESET != 0);
        if state.status & !known != 0 || is_ready && !agreed || needs_reset && !is_ready {
            return Err(VirtioStateError::Status { found: state.status });
        }
        Ok(())
    }
}
