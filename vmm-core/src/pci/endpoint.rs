//! A function of type 0 with a memory BAR and MSI-X, apart from what is behind the BAR.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config::Registers;
use super::msix::{self, Msix};
use super::{ConfigSpace, FunctionState, Hypervisor, Identity, WINDOW};
use crate::state::StateError;

/// Capability id of MSI-X.
const MSIX_CAPABILITY: u8 = 0x11;
/// Not answered: no BAR is there.
const NOWHERE: u64 = u64::MAX;

/// Where in the BAR the table and the pending bits are.
#[derive(Debug, Clone, Copy)]
pub struct MsixLayout {
    /// Offset of the table.
    pub table: u32,
    /// Offset of the pending bits.
    pub pending: u32,
}

/// A function's configuration space, and what follows from it.
#[derive(Debug)]
pub struct Endpoint {
    config: Mutex<ConfigSpace>,
    /// As after power-on.
    pristine: ConfigSpace,
    /// Bytes of the BAR.
    size: u64,
    /// Where the BAR is answered, for those who only look.
    base: AtomicU64,
    msix: Arc<Msix>,
    /// Where message control is in configuration space.
    msix_control: usize,
}

impl Endpoint {
    /// A function whose BAR of `size` bytes (a power of two) is at `address` until the guest moves it. Further
    /// capabilities are added by `capabilities`.
    pub fn new(
        identity: &Identity,
        address: u64,
        size: u64,
        vectors: usize,
        layout: MsixLayout,
        hypervisor: Arc<dyn Hypervisor>,
        capabilities: impl FnOnce(&mut ConfigSpace),
    ) -> Self {
        let mut config = ConfigSpace::new(identity);
        config.add_bar(address, size);
        // Table size is a number less one; both offsets name BAR 0 by their lowest bits.
        let mut body = [0; 10];
        body[..2].copy_from_slice(&((vectors - 1) as u16).to_le_bytes());
        body[2..6].copy_from_slice(&layout.table.to_le_bytes());
        body[6..].copy_from_slice(&layout.pending.to_le_bytes());
        let at = config.add_capability(MSIX_CAPABILITY, &body, &msix::CONTROL_WRITABLE.to_le_bytes());
        capabilities(&mut config);
        Self {
            pristine: config.clone(),
            config: Mutex::new(config),
            size,
            base: AtomicU64::new(NOWHERE),
            msix: Arc::new(Msix::new(vectors, hypervisor)),
            msix_control: at + 2,
        }
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its vectors.
    pub fn msix(&self) -> &Arc<Msix> {
        &self.msix
    }

    /// The addresses at which the BAR is answered now, if it is. Outside of [`WINDOW`] nothing is.
    pub fn memory(&self) -> Option<Range<u64>> {
        match self.base.load(Ordering::Acquire) {
            NOWHERE => None,
            base => Some(base..base + self.size),
        }
    }

    /// The addresses at which it is answered before the guest moves it, and once the guest has it answered.
    pub fn first_memory(&self) -> Range<u64> {
        let base = self.pristine.bar();
        base..base + self.size
    }

    /// The guest reads configuration space.
    pub fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    /// The guest writes configuration space.
    pub fn write_config(&self, offset: usize, data: &[u8]) {
        let mut config = self.lock();
        config.write(offset, data);
        self.follow(&config);
    }

    /// Looks at the registers in configuration space.
    pub fn with_config<T>(&self, look: impl FnOnce(&ConfigSpace) -> T) -> T {
        look(&self.lock())
    }

    /// Makes everything as configuration space says.
    fn follow(&self, config: &ConfigSpace) {
        let last = WINDOW.end - self.size;
        let base = config.memory().filter(|base| (WINDOW.start..=last).contains(base)).unwrap_or(NOWHERE);
        self.base.store(base, Ordering::Release);
        self.msix.set_control(config.u16_at(self.msix_control));
    }

    /// As after power-on.
    pub fn reset(&self) {
        let mut config = self.lock();
        config.clone_from(&self.pristine);
        self.msix.reset();
        self.follow(&config);
    }

    /// Saves what the guest has set.
    pub fn save(&self) -> FunctionState {
        let Registers { command, bar, cache_line, interrupt_line } = self.lock().registers();
        let (msix_control, msix) = self.msix.save();
        FunctionState { command, bar, cache_line, interrupt_line, msix_control, msix }
    }

    /// Takes over what a guest has set.
    ///
    /// # Errors
    /// A guest cannot have set that here.
    pub fn load(&self, state: &FunctionState) -> Result<(), StateError> {
        state.check()?;
        let (expected, found) = (self.msix.count(), state.msix.len());
        if found != expected {
            return Err(StateError::Length { field: "msix", expected, found });
        }
        let FunctionState { command, bar, cache_line, interrupt_line, .. } = *state;
        let registers = Registers { command, bar, cache_line, interrupt_line };
        let mut config = self.lock();
        let set = config.set_registers(&registers);
        let differs = |field, found: u64, expected: u64| match found == expected {
            true => Ok(()),
            false => Err(StateError::Value { field, expected, found }),
        };
        differs("command", command.into(), set.command.into())?;
        differs("bar", bar, set.bar)?;
        config.write(self.msix_control, &state.msix_control.to_le_bytes());
        self.follow(&config);
        self.msix.load(state);
        Ok(())
    }
}
