//! Interrupts towards the driver: which vector stands for what, the ISR status, the generation of the configuration.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use super::super::Interrupt;
use crate::pci::Msix;

/// `VIRTIO_MSI_NO_VECTOR`: no interrupt at all.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// ISR status: a queue has something.
const ISR_QUEUE: u8 = 1 << 0;
/// ISR status: the configuration changed.
const ISR_CONFIG: u8 = 1 << 1;

/// What interrupts the driver. Shared with the devices, which signal.
#[derive(Debug)]
pub(super) struct Signals {
    msix: Arc<Msix>,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
    isr: AtomicU8,
    generation: AtomicU8,
}

impl Signals {
    pub(super) fn new(msix: Arc<Msix>, queues: usize) -> Self {
        Self {
            msix,
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
        }
    }

    /// The driver goes away. The generation stays, so that the next one does not mistake its configuration for another.
    pub(super) fn reset(&self) {
        self.set_config_vector(NO_VECTOR);
        self.queues.iter().for_each(|vector| vector.store(NO_VECTOR, Ordering::Relaxed));
        self.set_isr(0);
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config.load(Ordering::Relaxed)
    }

    /// A vector that does not exist is none.
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config.store(self.existing(vector), Ordering::Relaxed);
    }

    /// Of a queue that exists.
    pub(super) fn queue_vector(&self, queue: usize) -> u16 {
        self.queues[queue].load(Ordering::Relaxed)
    }

    pub(super) fn set_queue_vector(&self, queue: usize, vector: u16) {
        self.queues[queue].store(self.existing(vector), Ordering::Relaxed);
    }

    fn existing(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.msix.count() { vector } else { NO_VECTOR }
    }

    pub(super) fn isr(&self) -> u8 {
        self.isr.load(Ordering::Relaxed)
    }

    pub(super) fn set_isr(&self, isr: u8) {
        self.isr.store(isr, Ordering::Relaxed);
    }

    /// The driver reads the ISR status, which clears it.
    pub(super) fn read_isr(&self, offset: usize, data: &mut [u8]) {
        if let (0, Some(status)) = (offset, data.first_mut()) {
            *status = self.isr.swap(0, Ordering::AcqRel);
        }
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Relaxed)
    }

    pub(super) fn set_generation(&self, generation: u8) {
        self.generation.store(generation, Ordering::Relaxed);
    }

    /// A driver without MSI-X has no interrupts here, and looks at the ISR status.
    fn signal(&self, vector: u16, isr: u8) {
        if !self.msix.signal(vector) {
            self.isr.fetch_or(isr, Ordering::AcqRel);
        }
    }
}

/// A driver's ear.
pub(super) struct Ear(pub(super) Arc<Signals>);

impl Interrupt for Ear {
    fn queue(&self, index: usize) {
        let vector = self.0.queues.get(index).map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed));
        self.0.signal(vector, ISR_QUEUE);
    }

    fn config(&self) {
        self.0.generation.fetch_add(1, Ordering::AcqRel);
        self.0.signal(self.0.config_vector(), ISR_CONFIG);
    }
}
