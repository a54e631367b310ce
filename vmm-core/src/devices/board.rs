//! The PCI bus and its devices without a machine and without a thread: who has it is their guest and the I/O thread. For fuzz
//! bodies, which want the same from the same input each time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cpr_core::frame::{Frame, FrameWriter};
use vm_memory::GuestMemoryMmap;

use super::{Devices, PciConfig};
use crate::error::MachineError;
use crate::io_thread::Poller;
use crate::pci::Hypervisor;
use crate::ports::{MmioBus, PortBus};
use crate::virtio::pci::{Bell, VirtioPci};

/// A bus with devices, and what a guest reaches them by.
pub struct Board {
    /// Ports of the bus.
    pub ports: PortBus,
    /// Configuration space and BARs.
    pub mmio: MmioBus,
    devices: Devices,
    served: Vec<Arc<VirtioPci>>,
    bell: Bell,
    /// There while the guest runs.
    poller: Option<Poller>,
}

impl Board {
    /// Puts the devices on a bus. They are stopped.
    ///
    /// # Errors
    /// As for a machine: a slot that cannot be, a device of an impossible shape.
    pub fn new(
        config: PciConfig,
        memory: &GuestMemoryMmap,
        hypervisor: &Arc<dyn Hypervisor>,
    ) -> Result<Self, MachineError> {
        let (ports, mmio) = (PortBus::new(), MmioBus::new());
        let (devices, bell) = Devices::unserved(config, memory, hypervisor, &ports, &mmio)?;
        Ok(Self { ports, mmio, served: devices.served(), devices, bell, poller: None })
    }

    /// The guest goes on, or runs for the first time.
    ///
    /// # Errors
    /// There is no epoll instance to be had.
    pub fn go_on(&mut self) -> Result<(), MachineError> {
        let poller = Poller::new(&self.served, &self.bell);
        let mut poller = poller.map_err(|source| MachineError::Host { what: "an epoll instance", source })?;
        poller.start(&self.served);
        self.poller = Some(poller);
        Ok(())
    }

    /// What the I/O thread does when it is woken once. Does not wait, and does nothing while the guest is stopped.
    pub fn turn(&mut self) {
        if let Some(poller) = &mut self.poller {
            poller.turn(&self.served, &self.bell, 0, || true);
        }
    }

    /// The guest stops: returns when nothing of any device is under way.
    ///
    /// # Errors
    /// Those that did not come to rest within `deadline`.
    pub fn stop(&mut self, deadline: Duration) -> Result<(), MachineError> {
        self.poller = None;
        self.devices.stop(Instant::now() + deadline, deadline)
    }

    /// The guest, which is stopped, is reset.
    pub fn reset(&self) {
        self.devices.reset();
    }

    /// Writes the state of bus and devices, which are stopped.
    ///
    /// # Errors
    /// The device that cannot be saved.
    pub fn save(&self, main: &mut FrameWriter) -> Result<(), MachineError> {
        self.devices.save(main)
    }

    /// Reads it, into devices that have not been used.
    ///
    /// # Errors
    /// The device whose state is refused.
    pub fn load(&self, main: &mut Frame) -> Result<(), MachineError> {
        self.devices.load(main)
    }
}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Board").field("devices", &self.served).finish_non_exhaustive()
    }
}
