//! The bus: which function a guest means.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{CONFIG_PORTS, ConfigSpace, ECAM, HostState, Identity, SLOTS, WINDOW};
use crate::ports::{MmioBus, MmioDevice, OverlapError, PortBus, PortDevice};

/// Bytes of a function in ECAM.
const ECAM_FUNCTION: u64 = 4096;
/// The address port names a register, rather than nothing.
const ADDRESS_ENABLE: u32 = 1 << 31;

/// A function on the bus. Called by any vCPU's thread, so it locks for itself.
pub trait Function: Send + Sync {
    /// Reads configuration space.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// Writes configuration space.
    fn write_config(&self, offset: usize, data: &[u8]);

    /// The guest-physical addresses that it answers now.
    fn memory(&self) -> Option<Range<u64>>;

    /// Reads `offset` bytes from the beginning of [`memory`](Self::memory).
    fn read_memory(&self, offset: u64, data: &mut [u8]);

    /// Writes there.
    fn write_memory(&self, offset: u64, data: &[u8]);
}

/// The host bridge: something in slot 0, so that a guest believes in the bus. It has nothing to be set.
struct HostBridge(ConfigSpace);

/// As QEMU's `pcie-root`: a bridge that is nothing but its ids.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: (0x06, 0x00),
    subsystem: (0x1af4, 0x1100),
};

impl Function for HostBridge {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write_config(&self, _offset: usize, _data: &[u8]) {}

    fn memory(&self) -> Option<Range<u64>> {
        None
    }

    fn read_memory(&self, _offset: u64, _data: &mut [u8]) {}

    fn write_memory(&self, _offset: u64, _data: &[u8]) {}
}

/// Bus 0 with its host bridge.
pub struct PciBus {
    functions: BTreeMap<u8, Arc<dyn Function>>,
    /// The address port.
    address: AtomicU32,
}

impl PciBus {
    /// A bus with these functions, by slot: 1 to 31.
    pub fn new(functions: impl IntoIterator<Item = (u8, Arc<dyn Function>)>) -> Self {
        let bridge: Arc<dyn Function> = Arc::new(HostBridge(ConfigSpace::new(&HOST_BRIDGE)));
        let functions = functions.into_iter().chain([(0, bridge)]).collect();
        Self { functions, address: AtomicU32::new(0) }
    }

    /// Answers everything that is the bus' from now on.
    ///
    /// # Errors
    /// Somebody else does.
    pub fn attach(self: &Arc<Self>, ports: &PortBus, mmio: &MmioBus) -> Result<(), OverlapError> {
        let ports_len = CONFIG_PORTS.end - CONFIG_PORTS.start;
        ports.insert(CONFIG_PORTS.start, ports_len, "PCI", Arc::new(ConfigPorts(self.clone())))?;
        mmio.insert(ECAM.start, ECAM.end - ECAM.start, "PCI ECAM", Arc::new(Ecam(self.clone())))?;
        mmio.insert(WINDOW.start, WINDOW.end - WINDOW.start, "PCI memory", Arc::new(Window(self.clone())))
    }

    /// As after power-on. Its functions have resets of their own.
    pub fn reset(&self) {
        self.load(&HostState::default());
    }

    /// Saves what the bus itself remembers.
    pub fn save(&self) -> HostState {
        HostState { address: self.address.load(Ordering::Relaxed) }
    }

    /// Takes it over. There is no wrong one.
    pub fn load(&self, state: &HostState) {
        self.address.store(state.address, Ordering::Relaxed);
    }

    /// The function with this number: slot << 3, and the function in it, of which only 0 exists.
    fn function(&self, number: u32) -> Option<&dyn Function> {
        let slot = u8::try_from(number >> 3).ok().filter(|slot| *slot < SLOTS && number & 7 == 0)?;
        self.functions.get(&slot).map(|function| &**function)
    }

    fn read_config(&self, number: u32, offset: usize, data: &mut [u8]) {
        match self.function(number) {
            Some(function) => function.read_config(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write_config(&self, number: u32, offset: usize, data: &[u8]) {
        if let Some(function) = self.function(number) {
            function.write_config(offset, data);
        }
    }

    /// Who answers all of `len` bytes at `address`, and the offset into it. Of several it is the one in the lowest slot.
    fn at(&self, address: u64, len: usize) -> Option<(&dyn Function, u64)> {
        let end = address.checked_add(len as u64)?;
        self.functions.values().find_map(|function| {
            let memory = function.memory()?;
            (memory.start <= address && end <= memory.end).then(|| (&**function, address - memory.start))
        })
    }
}

impl std::fmt::Debug for PciBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let functions = self.functions.iter().map(|(slot, function)| (slot, function.memory()));
        f.debug_map().entries(functions).finish()
    }
}

/// Ports 0xcf8 to 0xcff.
struct ConfigPorts(Arc<PciBus>);

impl ConfigPorts {
    /// Function number and offset of an access to the data ports, if the address port names a register of bus 0.
    fn target(&self, offset: u16) -> Option<(u32, usize)> {
        let address = self.0.address.load(Ordering::Relaxed);
        let (bus, number) = (address >> 16 & 0xff, address >> 8 & 0xff);
        let register = (address & 0xfc) as usize + usize::from(offset - 4);
        (address & ADDRESS_ENABLE != 0 && bus == 0).then_some((number, register))
    }
}

impl PortDevice for ConfigPorts {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (offset, &mut *data) {
            (0, [_, _, _, _]) => data.copy_from_slice(&self.0.save().address.to_le_bytes()),
            (4.., _) => {
                if let Some((number, register)) = self.target(offset) {
                    self.0.read_config(number, register, data);
                }
            }
            _ => {}
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => self.0.load(&HostState { address: u32::from_le_bytes([a, b, c, d]) }),
            (4.., _) => {
                if let Some((number, register)) = self.target(offset) {
                    self.0.write_config(number, register, data);
                }
            }
            _ => {}
        }
    }
}

struct Ecam(Arc<PciBus>);

impl MmioDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read_config((offset / ECAM_FUNCTION) as u32, (offset % ECAM_FUNCTION) as usize, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write_config((offset / ECAM_FUNCTION) as u32, (offset % ECAM_FUNCTION) as usize, data);
    }
}

struct Window(Arc<PciBus>);

impl MmioDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.0.at(WINDOW.start + offset, data.len()) {
            Some((function, offset)) => function.read_memory(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, offset)) = self.0.at(WINDOW.start + offset, data.len()) {
            function.write_memory(offset, data);
        }
    }
}
