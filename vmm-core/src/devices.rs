//! The virtio devices of a machine, on their bus: served while the guest runs, at rest while it is stopped, saved and loaded.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter};
use cpr_core::section::SectionType;
use oslib::eventfd::EventFd;
use vm_memory::GuestMemoryMmap;

use crate::error::MachineError;
use crate::io_thread::IoThread;
use crate::memory::GuestRam;
use crate::pci::{Function, HostState, Hypervisor, PciBus, SLOTS};
use crate::ports::{MmioBus, PortBus};
use crate::virtio::pci::{self, Bell, VirtioPci};
use crate::virtio::{Backing, Drained, SectionVersions, VirtioDevice};

#[cfg(feature = "fuzzing")]
mod board;
#[cfg(feature = "fuzzing")]
pub use board::Board;

/// Instance of the section of the bus itself; devices have their slots, of which 0 is the host bridge's.
const BUS: u32 = 0;

/// How long to wait before a device that is not at rest is asked again, first and at most.
const ASK_AGAIN: [Duration; 2] = [Duration::from_micros(20), Duration::from_millis(1)];

/// The PCI bus of a machine.
#[derive(Debug, Default)]
pub struct PciConfig {
    /// What is on it.
    pub devices: Vec<PciDevice>,
}

/// A device on the bus.
pub struct PciDevice {
    /// Its slot, 1 to 31. A guest knows the device by it, and so does a saved state.
    pub slot: u8,
    /// What messages call it.
    pub name: String,
    /// Features, as bits, that the device would offer and is not to.
    pub withheld: u64,
    /// The device.
    pub device: Box<dyn VirtioDevice>,
}

impl std::fmt::Debug for PciDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciDevice")
            .field("slot", &self.slot)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// A device in its slot.
struct Slot {
    name: String,
    virtio: Arc<VirtioPci>,
}

impl Slot {
    fn error(&self, source: BoxError) -> MachineError {
        MachineError::Device { device: self.name.clone(), source }
    }
}

/// The bus, its devices, and the thread that serves them, if there are any.
pub(crate) struct Devices {
    // First, so that it has ended before what it serves.
    io: Option<IoThread>,
    bus: Arc<PciBus>,
    slots: BTreeMap<u8, Slot>,
}

impl Devices {
    /// Puts the devices on a bus, and the bus where the guest finds it. They are stopped.
    pub(crate) fn new(
        config: PciConfig,
        ram: &GuestRam,
        hypervisor: &Arc<dyn Hypervisor>,
        ports: &PortBus,
        mmio: &MmioBus,
    ) -> Result<Self, MachineError> {
        let (mut devices, bell) = Self::unserved(config, ram.memory(), hypervisor, ports, mmio)?;
        let served = devices.served();
        if !served.is_empty() {
            devices.io = Some(IoThread::spawn(served, bell)?);
        }
        Ok(devices)
    }

    /// As [`new`](Self::new), but without the thread; with the bell that it would listen to.
    fn unserved(
        config: PciConfig,
        memory: &GuestMemoryMmap,
        hypervisor: &Arc<dyn Hypervisor>,
        ports: &PortBus,
        mmio: &MmioBus,
    ) -> Result<(Self, Bell), MachineError> {
        let bell = EventFd::new().map_err(|source| MachineError::Host { what: "an eventfd", source })?;
        let bell = Bell(Arc::new(bell));
        let mut slots = BTreeMap::new();
        for PciDevice { slot, name, withheld, device } in config.devices {
            check_slot(slot, &name, &slots)?;
            let address = pci::first_address(slot);
            let virtio = VirtioPci::new(device, withheld, address, memory.clone(), hypervisor, bell.clone())
                .map_err(|source| MachineError::Device { device: name.clone(), source: source.into() })?;
            slots.insert(slot, Slot { name, virtio: Arc::new(virtio) });
        }
        let functions = slots.iter().map(|(&at, slot)| (at, slot.virtio.clone() as Arc<dyn Function>));
        let bus = Arc::new(PciBus::new(functions));
        bus.attach(ports, mmio)?;
        Ok((Self { io: None, bus, slots }, bell))
    }

    /// Those that the thread serves.
    fn served(&self) -> Vec<Arc<VirtioPci>> {
        self.slots.values().map(|slot| slot.virtio.clone()).collect()
    }

    /// Does what a state would have done that is yet to come, as far as it can be known.
    pub(crate) fn prepare(&self) {
        self.slots.values().for_each(|slot| slot.virtio.attach_doorbells_ahead());
    }

    /// Whether they are served, as long as nobody wants otherwise.
    pub(crate) fn are_served(&self) -> bool {
        self.io.as_ref().is_some_and(IoThread::is_serving)
    }

    /// The guest is about to stop: what serves the devices comes to rest meanwhile.
    pub(crate) fn want_rest(&self) {
        self.io.iter().for_each(IoThread::want_rest);
    }

    /// The guest has stopped: returns when nothing of any device is under way. `deadline` is what `until` was made of.
    ///
    /// # Errors
    /// Those that did not come to rest.
    pub(crate) fn stop(&self, until: Instant, deadline: Duration) -> Result<(), MachineError> {
        self.rest(until, deadline)?;
        let mut under_way: Vec<_> = self.slots.values().collect();
        let [mut wait, longest] = ASK_AGAIN;
        loop {
            under_way.retain(|slot| slot.virtio.drain() == Drained::UnderWay);
            if under_way.is_empty() {
                return Ok(());
            }
            if Instant::now() >= until {
                let devices = under_way.iter().map(|slot| format!("device '{}'", slot.name)).collect();
                return Err(MachineError::Restless { devices, deadline });
            }
            std::thread::sleep(wait);
            wait = longest.min(wait * 2);
        }
    }

    /// Returns when the thread rests, and so may be ended.
    ///
    /// # Errors
    /// It does not get there in time.
    pub(crate) fn rest(&self, until: Instant, deadline: Duration) -> Result<(), MachineError> {
        self.want_rest();
        if self.io.as_ref().is_none_or(|io| io.wait_rests(until)) {
            return Ok(());
        }
        Err(MachineError::Restless { devices: vec!["the I/O thread".into()], deadline })
    }

    /// The thread rests, and the process is about to be replaced by an exec: devices let go of what the kernel keeps for it.
    pub(crate) fn leave_process(&self) {
        self.slots.values().for_each(|slot| slot.virtio.leave_process());
    }

    /// The guest goes on, in this process.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn go_on(&self) -> Result<(), MachineError> {
        self.io.as_ref().map_or(Ok(()), IoThread::go_on)
    }

    /// Has the thread, which rests, in this process.
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) fn recall(&self) -> Result<(), MachineError> {
        self.io.as_ref().map_or(Ok(()), IoThread::recall)
    }

    /// As after power-on.
    pub(crate) fn reset(&self) {
        self.slots.values().for_each(|slot| slot.virtio.reset());
        self.bus.reset();
    }

    /// The names of those that cannot be saved.
    pub(crate) fn unsavable(&self) -> Vec<&str> {
        let unsavable = self.slots.values().filter(|slot| slot.virtio.sections().is_none());
        unsavable.map(|slot| slot.name.as_str()).collect()
    }

    /// The sections that [`save`](Self::save) writes, with their instances.
    pub(crate) fn sections(&self) -> Vec<(u32, SectionVersions)> {
        let of_slot = |(&at, slot): (&u8, &Slot)| {
            let sections = slot.virtio.sections().unwrap_or_default().to_vec();
            sections.into_iter().map(move |section| (u32::from(at), section))
        };
        let bus = (BUS, (HostState::NAME, HostState::VERSIONS));
        [bus].into_iter().chain(self.slots.iter().flat_map(of_slot)).collect()
    }

    /// What is behind them on the host, by slot, where the next process has to find the same.
    ///
    /// # Errors
    /// The device that has lost it.
    pub(crate) fn backings(&self) -> Result<Vec<(u8, Backing)>, MachineError> {
        let mut backings = Vec::new();
        for (&at, slot) in &self.slots {
            let backing = slot.virtio.backing().map_err(|source| slot.error(source))?;
            backings.extend(backing.map(|backing| (at, backing)));
        }
        Ok(backings)
    }

    /// Writes the state of bus and devices.
    ///
    /// # Errors
    /// The device that cannot be saved.
    pub(crate) fn save(&self, main: &mut FrameWriter) -> Result<(), MachineError> {
        main.put_section(BUS, &self.bus.save()).map_err(of_bus)?;
        for (&at, slot) in &self.slots {
            slot.virtio.save(main, at.into()).map_err(|source| slot.error(source))?;
        }
        Ok(())
    }

    /// Has what the guest has stored outlive the host's kernel.
    ///
    /// # Errors
    /// The device whose data cannot be kept.
    pub(crate) fn settle_on_host(&self) -> Result<(), MachineError> {
        self.slots
            .values()
            .try_for_each(|slot| slot.virtio.settle_on_host().map_err(|source| slot.error(source)))
    }

    /// Reads it.
    ///
    /// # Errors
    /// The device whose state is refused.
    pub(crate) fn load(&self, main: &mut Frame) -> Result<(), MachineError> {
        self.bus.load(&main.require_section(BUS).map_err(of_bus)?);
        for (&at, slot) in &self.slots {
            slot.virtio.load(main, at.into()).map_err(|source| slot.error(source))?;
        }
        Ok(())
    }
}

fn of_bus(error: cpr_core::frame::FrameError) -> MachineError {
    MachineError::Device { device: "the PCI bus".into(), source: error.into() }
}

fn check_slot(slot: u8, name: &str, taken: &BTreeMap<u8, Slot>) -> Result<(), MachineError> {
    let reason = match slot {
        0 => "it is the host bridge's",
        SLOTS.. => "the last one is 31",
        _ if taken.contains_key(&slot) => "another device is there",
        _ => return Ok(()),
    };
    Err(MachineError::Slot { device: name.into(), slot, reason })
}

#[cfg(test)]
mod tests;
