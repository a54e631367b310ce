//! The console as it travels.

use cpr_core::section::SectionType;
use serde::{Deserialize, Serialize};

use super::control::Owed;
use super::host::INBOX_LEN;
use crate::state::{Blob, StateError};

/// The device.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Every port, by number.
    pub(super) ports: Vec<PortState>,
}

impl SectionType for ConsoleState {
    const NAME: &'static str = "virtio-console";
    const VERSION: u32 = 1;
}

/// A port, as its driver knows it, and its input.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PortState {
    pub(super) number: u32,
    /// The driver has said that it knows the port.
    pub(super) ready: bool,
    /// Somebody in the guest has it open.
    pub(super) guest_open: bool,
    /// The driver was told that somebody is at the other end.
    pub(super) told_open: bool,
    /// Columns and rows that it was told.
    pub(super) told_size: (u16, u16),
    /// Messages that it has yet to be told: bit n for the nth of add, console, name, resize, close, open.
    pub(super) owed: u8,
    /// How much of the first request of the output queue has been passed on, in bytes.
    pub(super) passed_on: u32,
    /// Input that the guest has not been given.
    pub(super) input: Blob,
}

impl PortState {
    pub(super) fn owed(&self) -> Result<Owed, StateError> {
        Owed::from_bits(self.owed).ok_or(StateError::Value {
            field: "owed",
            expected: u64::from(self.owed) & 0x3f,
            found: self.owed.into(),
        })
    }
}

impl ConsoleState {
    /// Checks it for a device with ports of these numbers.
    pub(super) fn check(&self, numbers: &[u32]) -> Result<(), Unfit> {
        let found: Vec<u32> = self.ports.iter().map(|port| port.number).collect();
        if found != numbers {
            return Err(Unfit::Ports { found, expected: numbers.to_vec() });
        }
        for port in &self.ports {
            let found = port.input.as_slice().len();
            if found > INBOX_LEN {
                return Err(StateError::Size { field: "input", rule: "at most 16384 bytes", found }.into());
            }
            port.owed()?;
        }
        Ok(())
    }
}

/// Why a state is not one of this device.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unfit {
    #[error(
        "the guest's console has the ports {found:?}, and this one has {expected:?}; the command line must name the ports \
         of the guest"
    )]
    Ports { found: Vec<u32>, expected: Vec<u32> },
    #[error(transparent)]
    State(#[from] StateError),
}
