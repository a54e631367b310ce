//! The capabilities by which a driver finds what is behind the BAR (virtio 1.2, 4.1.4), and the window into the BAR that
//! is one of them (4.1.4.9).

use super::state::WindowState;
use super::{BAR_LEN, COMMON, DEVICE, ISR, NOTIFY, NOTIFY_STEP, REGION_LEN};
use crate::pci::ConfigSpace;

/// Capability id of whatever a vendor likes.
const VENDOR_SPECIFIC: u8 = 0x09;
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// Offsets within a capability.
const BAR: usize = 4;
const OFFSET: usize = 8;
const LENGTH: usize = 12;
const WINDOW_DATA: usize = 16;

/// Adds all of them; returns where the window is.
pub(super) fn add(config: &mut ConfigSpace) -> usize {
    for (kind, offset) in [(COMMON_CFG, COMMON), (ISR_CFG, ISR), (DEVICE_CFG, DEVICE)] {
        config.add_capability(VENDOR_SPECIFIC, &body(kind, offset, &[]), &[]);
    }
    config.add_capability(
        VENDOR_SPECIFIC,
        &body(NOTIFY_CFG, NOTIFY, &(NOTIFY_STEP as u32).to_le_bytes()),
        &[],
    );
    let mut window = body(PCI_CFG, 0, &[0; 4]);
    window[OFFSET - 2..].fill(0);
    let mut writable = vec![0; window.len() - 4];
    writable[BAR - 2] = 0xff;
    writable[OFFSET - 2..].fill(0xff);
    config.add_capability(VENDOR_SPECIFIC, &window, &writable)
}

/// `struct virtio_pci_cap` behind id and pointer, and what follows it.
fn body(kind: u8, offset: u64, rest: &[u8]) -> Vec<u8> {
    let len = 16 + rest.len() as u8;
    let mut body = vec![len, kind, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((REGION_LEN as u32).to_le_bytes());
    body.extend(rest);
    body
}

/// Where the guest has set the window that is at `at`.
pub(super) fn window(config: &ConfigSpace, at: usize) -> WindowState {
    WindowState {
        bar: config.u16_at(at + BAR) as u8,
        offset: config.u32_at(at + OFFSET),
        length: config.u32_at(at + LENGTH),
    }
}

/// As the guest would write it, from the beginning of the capability.
pub(super) fn window_bytes(state: &WindowState) -> [u8; WINDOW_DATA] {
    let mut bytes = [0; WINDOW_DATA];
    bytes[BAR] = state.bar;
    bytes[OFFSET..LENGTH].copy_from_slice(&state.offset.to_le_bytes());
    bytes[LENGTH..].copy_from_slice(&state.length.to_le_bytes());
    bytes
}

/// Where in the BAR an access to configuration space leads that goes through the window.
pub(super) fn access(config: &ConfigSpace, at: usize, offset: usize, len: usize) -> Option<u64> {
    let WindowState { bar, offset: target, length } = window(config, at);
    let fits = offset == at + WINDOW_DATA && matches!(len, 1 | 2 | 4) && length as usize == len && bar == 0;
    let target = u64::from(target);
    (fits && target.is_multiple_of(len as u64) && target < BAR_LEN).then_some(target)
}
