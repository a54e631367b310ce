//! The registers of the common configuration (virtio 1.2, 4.1.4.3). Reads may be of any length, as they change nothing;
//! writes of another length than the register's are ignored.

use super::transport::Transport;

const DEVICE_FEATURE_SELECT: usize = 0x00;
const DEVICE_FEATURE: usize = 0x04;
const DRIVER_FEATURE_SELECT: usize = 0x08;
const DRIVER_FEATURE: usize = 0x0c;
const CONFIG_VECTOR: usize = 0x10;
const NUM_QUEUES: usize = 0x12;
const DEVICE_STATUS: usize = 0x14;
const CONFIG_GENERATION: usize = 0x15;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_VECTOR: usize = 0x1a;
const QUEUE_ENABLE: usize = 0x1c;
const QUEUE_NOTIFY_OFFSET: usize = 0x1e;
const QUEUE_DESC: usize = 0x20;
const QUEUE_DRIVER: usize = 0x28;
const QUEUE_DEVICE: usize = 0x30;
const LEN: usize = 0x38;

/// The addresses of a queue, in the order of their registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ring {
    Descriptors,
    Available,
    Used,
}

impl Transport {
    pub(super) fn read_common(&self, offset: usize, data: &mut [u8]) {
        let mut registers = [0; LEN];
        let mut put = |at: usize, bytes: &[u8]| registers[at..at + bytes.len()].copy_from_slice(bytes);
        put(DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        put(DEVICE_FEATURE, &half(self.offered(), self.device_feature_select).to_le_bytes());
        put(DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        put(DRIVER_FEATURE, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(CONFIG_VECTOR, &self.signals.config_vector().to_le_bytes());
        put(NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(DEVICE_STATUS, &[self.status]);
        put(CONFIG_GENERATION, &[self.signals.generation()]);
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // Of a queue that does not exist the size is 0, which says so.
        let selected = usize::from(self.queue_select);
        if let Some(queue) = self.queues.get(selected) {
            put(QUEUE_SIZE, &queue.size.to_le_bytes());
            put(QUEUE_VECTOR, &self.signals.queue_vector(selected).to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(QUEUE_NOTIFY_OFFSET, &self.queue_select.to_le_bytes());
            put(QUEUE_DESC, &queue.descriptors.to_le_bytes());
            put(QUEUE_DRIVER, &queue.available.to_le_bytes());
            put(QUEUE_DEVICE, &queue.used.to_le_bytes());
        }
        for (at, byte) in (offset..).zip(data) {
            *byte = registers.get(at).copied().unwrap_or(0);
        }
    }

    /// Tells whether the device was activated or reset.
    pub(super) fn write_common(&mut self, offset: usize, data: &[u8]) -> bool {
        let selected = usize::from(self.queue_select);
        match (offset, data) {
            (DEVICE_STATUS, &[value]) => return self.write_status(value),
            (_, &[a, b]) => {
                let value = u16::from_le_bytes([a, b]);
                match offset {
                    CONFIG_VECTOR => self.signals.set_config_vector(value),
                    QUEUE_SELECT => self.queue_select = value,
                    QUEUE_SIZE => self.set_queue_size(value),
                    QUEUE_VECTOR if selected < self.queues.len() => {
                        self.signals.set_queue_vector(selected, value)
                    }
                    // Only a reset disables a queue.
                    QUEUE_ENABLE if value == 1 => self.enable_queue(),
                    _ => {}
                }
            }
            (_, &[a, b, c, d]) => {
                let value = u32::from_le_bytes([a, b, c, d]);
                match offset {
                    DEVICE_FEATURE_SELECT => self.device_feature_select = value,
                    DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
                    DRIVER_FEATURE => self.set_driver_features(value),
                    _ => self.set_address_half(offset, value),
                }
            }
            (_, &[a, b, c, d, e, f, g, h]) if offset.is_multiple_of(8) => {
                self.set_address_half(offset, u32::from_le_bytes([a, b, c, d]));
                self.set_address_half(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        false
    }

    fn set_address_half(&mut self, offset: usize, value: u32) {
        let (ring, at) = match offset {
            QUEUE_DESC..QUEUE_DRIVER => (Ring::Descriptors, offset - QUEUE_DESC),
            QUEUE_DRIVER..QUEUE_DEVICE => (Ring::Available, offset - QUEUE_DRIVER),
            QUEUE_DEVICE..LEN => (Ring::Used, offset - QUEUE_DEVICE),
            _ => return,
        };
        if at.is_multiple_of(4) {
            self.set_ring_address(ring, |address| with_half(address, (at / 4) as u32, value));
        }
    }
}

/// The half of a word that is selected: 0 low, 1 high; others are zero.
fn half(word: u64, select: u32) -> u32 {
    match select {
        0 => word as u32,
        1 => (word >> 32) as u32,
        _ => 0,
    }
}

/// The word with this half replaced.
pub(super) fn with_half(word: u64, select: u32, value: u32) -> u64 {
    match select {
        0 => word & !0xffff_ffff | u64::from(value),
        1 => word & 0xffff_ffff | u64::from(value) << 32,
        _ => word,
    }
}
