//! MSI-X: interrupts that are messages, in a table that the guest fills (PCI Local Bus 3.0, 6.8.2).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::state::MsixEntry;
use super::{FunctionState, Hypervisor};

/// Bytes of a vector in the table.
pub(super) const ENTRY_LEN: usize = 16;
/// The most vectors that a function may have.
pub const MAX_VECTORS: usize = 2048;

/// Message control: the function uses MSI-X.
const ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
const MASK_ALL: u16 = 1 << 14;
/// The bits of message control that a guest can change.
pub(super) const CONTROL_WRITABLE: u16 = ENABLE | MASK_ALL;
/// Vector control: the vector is masked.
const MASKED: u32 = 1;

const UNUSED: MsixEntry = MsixEntry { address: 0, data: 0, masked: true, pending: false };

#[derive(Debug)]
struct Vectors {
    control: u16,
    entries: Vec<MsixEntry>,
}

/// The vectors of a function. An interrupt on one that is masked is remembered, and sent when it is no longer.
pub struct Msix {
    vectors: Mutex<Vectors>,
    hypervisor: Arc<dyn Hypervisor>,
}

impl Msix {
    /// `count` vectors, at most [`MAX_VECTORS`], all masked.
    pub fn new(count: usize, hypervisor: Arc<dyn Hypervisor>) -> Self {
        let vectors = Vectors { control: 0, entries: vec![UNUSED; count] };
        Self { vectors: Mutex::new(vectors), hypervisor }
    }

    fn lock(&self) -> MutexGuard<'_, Vectors> {
        self.vectors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many vectors there are.
    pub fn count(&self) -> usize {
        self.lock().entries.len()
    }

    /// Interrupts the guest by vector `index`, now or when the vector is unmasked. Tells whether MSI-X is in use at all;
    /// a vector that does not exist is none.
    pub fn signal(&self, index: u16) -> bool {
        let mut vectors = self.lock();
        if vectors.control & ENABLE == 0 {
            return false;
        }
        if let Some(entry) = vectors.entries.get_mut(usize::from(index)) {
            entry.pending = true;
            self.send_pending(&mut vectors);
        }
        true
    }

    /// The guest wrote message control.
    pub(super) fn set_control(&self, control: u16) {
        let mut vectors = self.lock();
        vectors.control = control & CONTROL_WRITABLE;
        self.send_pending(&mut vectors);
    }

    /// Reads the table at `offset`.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        let vectors = self.lock();
        for (at, byte) in (offset..).zip(data) {
            *byte = vectors.entries.get(at / ENTRY_LEN).map_or(0, |entry| bytes_of(entry)[at % ENTRY_LEN]);
        }
    }

    /// Writes the table at `offset`: one or two aligned words of 32 bits, everything else is ignored.
    pub fn write_table(&self, offset: usize, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len()) {
            return;
        }
        let mut vectors = self.lock();
        let Some(entry) = vectors.entries.get_mut(offset / ENTRY_LEN) else { return };
        let mut bytes = bytes_of(entry);
        bytes[offset % ENTRY_LEN..][..data.len()].copy_from_slice(data);
        *entry = MsixEntry { pending: entry.pending, ..entry_of(&bytes) };
        self.send_pending(&mut vectors);
    }

    /// Reads the pending bits at `offset`. They cannot be written.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        let vectors = self.lock();
        let is_pending = |index: usize| vectors.entries.get(index).is_some_and(|entry| entry.pending);
        for (at, byte) in (offset..).zip(data) {
            *byte = (0..8)
                .filter(|bit| is_pending(at.saturating_mul(8) + bit))
                .fold(0, |byte, bit| byte | 1 << bit);
        }
    }

    fn send_pending(&self, vectors: &mut Vectors) {
        if vectors.control & (ENABLE | MASK_ALL) != ENABLE {
            return;
        }
        for entry in vectors.entries.iter_mut().filter(|entry| entry.pending && !entry.masked) {
            entry.pending = false;
            self.hypervisor.send_message(entry.address, entry.data);
        }
    }

    /// As after power-on.
    pub(super) fn reset(&self) {
        let mut vectors = self.lock();
        vectors.control = 0;
        vectors.entries.fill(UNUSED);
    }

    pub(super) fn save(&self) -> (u16, Vec<MsixEntry>) {
        let vectors = self.lock();
        (vectors.control, vectors.entries.clone())
    }

    /// Takes over a state that was checked. Sends nothing: what is pending was masked.
    pub(super) fn load(&self, state: &FunctionState) {
        let mut vectors = self.lock();
        vectors.control = state.msix_control & CONTROL_WRITABLE;
        vectors.entries.clone_from(&state.msix);
    }
}

impl std::fmt::Debug for Msix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Msix").field("vectors", &*self.lock()).finish_non_exhaustive()
    }
}

fn bytes_of(entry: &MsixEntry) -> [u8; ENTRY_LEN] {
    let mut bytes = [0; ENTRY_LEN];
    bytes[..8].copy_from_slice(&entry.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&entry.data.to_le_bytes());
    bytes[12..].copy_from_slice(&u32::from(entry.masked).to_le_bytes());
    bytes
}

fn entry_of(bytes: &[u8; ENTRY_LEN]) -> MsixEntry {
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    MsixEntry {
        address: u64::from(word(0)) | u64::from(word(4)) << 32,
        data: word(8),
        masked: word(12) & MASKED != 0,
        pending: false,
    }
}
