//! The wire types of the bus and of its functions.

use cpr_core::section::SectionType;
use serde::{Deserialize, Serialize};

use super::msix::{CONTROL_WRITABLE, MAX_VECTORS};
use crate::state::StateError;

/// What the bus itself remembers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostState {
    /// What the guest wrote to port 0xcf8.
    pub address: u32,
}

/// What a guest has set in a function of type 0; the rest of configuration space is the device's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionState {
    /// Command register.
    pub command: u16,
    /// Address in BAR 0, without flags.
    pub bar: u64,
    /// Cache line size.
    pub cache_line: u8,
    /// Interrupt line.
    pub interrupt_line: u8,
    /// MSI-X message control: enabled, and all vectors masked.
    pub msix_control: u16,
    /// The MSI-X table.
    pub msix: Vec<MsixEntry>,
}

/// A vector of the MSI-X table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixEntry {
    /// Where the message goes.
    pub address: u64,
    /// What it says.
    pub data: u32,
    /// It is masked.
    pub masked: bool,
    /// It is to be sent once the vector is not masked any more.
    pub pending: bool,
}

impl SectionType for HostState {
    const NAME: &'static str = "pci/host";
    const VERSION: u32 = 1;
}

impl SectionType for FunctionState {
    const NAME: &'static str = "pci/function";
    const VERSION: u32 = 1;
}

impl FunctionState {
    /// Checks what does not depend on the function.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(&self) -> Result<(), StateError> {
        let found = self.msix.len();
        if found > MAX_VECTORS {
            return Err(StateError::Size { field: "msix", rule: "at most 2048", found });
        }
        if self.msix_control & !CONTROL_WRITABLE != 0 {
            let (expected, found) = (CONTROL_WRITABLE.into(), self.msix_control.into());
            return Err(StateError::Value { field: "msix_control", expected, found });
        }
        Ok(())
    }
}
