//! The devices on the PCI bus: from the command line to the machine, and what an update has to know of them.
//!
//! A guest knows a device by its slot, and so does a saved state. Everything else about it that a guest could notice is its
//! shape, which must be equal on both sides of an update.

use anyhow::{bail, ensure};
use cpr_core::section::SectionType;
use cpr_core::{Blocker, Blockers, FdRegistry, ModeSet};
use serde::{Deserialize, Serialize};
use vmm_core::machine::{Machine, PciConfig};
use vmm_core::pci::{FunctionState, HostState};
use vmm_core::virtio::SectionVersions;
use vmm_core::virtio::pci::VirtioState;

use crate::cli::config::{Config, MachineType};

/// What a guest sees of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeviceShape {
    /// Its slot.
    pub(crate) slot: u8,
    /// Its model, as `-device` names it.
    pub(crate) model: String,
    /// How many queues it has.
    pub(crate) queues: u16,
}

/// The shapes of the devices that the command line asks for, by slot. Nothing is opened.
pub(crate) fn shapes(_config: &Config) -> Vec<DeviceShape> {
    Vec::new()
}

/// Makes the devices that the command line asks for; `None` if the machine has no bus. Descriptors that arrived with an
/// update are found in the registry, others are opened and entered there.
///
/// # Errors
/// A device without a bus, or one that cannot be made; the error names it.
pub(crate) fn build(config: &Config, _registry: &FdRegistry) -> anyhow::Result<Option<PciConfig>> {
    let machine_type = config.machine.machine_type();
    check_bus(machine_type, &shapes(config))?;
    Ok(machine_type.has_pci().then(PciConfig::default))
}

/// Whether the machine has a bus for its devices.
///
/// # Errors
/// It has none, and a device that needs one.
pub(crate) fn check_bus(machine_type: MachineType, devices: &[DeviceShape]) -> anyhow::Result<()> {
    let Some(device) = devices.first().filter(|_| !machine_type.has_pci()) else { return Ok(()) };
    let (model, slot, machine_type) = (&device.model, device.slot, machine_type.name());
    bail!("{model} in slot {slot}: machine type '{machine_type}' has no PCI bus; use a later one")
}

/// Whether a guest with `guest`'s devices finds them here.
///
/// # Errors
/// The first difference.
pub(crate) fn check_shapes(guest: &[DeviceShape], own: &[DeviceShape]) -> anyhow::Result<()> {
    for device in guest {
        let DeviceShape { slot, model, queues } = device;
        match own.iter().find(|own| own.slot == *slot) {
            None => bail!("the guest has a {model} in PCI slot {slot}, the command line has nothing there"),
            Some(own) => {
                let own_model = &own.model;
                ensure!(
                    own_model == model,
                    "the guest has a {model} in PCI slot {slot}, the command line a {own_model}"
                );
                let own_queues = own.queues;
                ensure!(
                    own_queues == *queues,
                    "the guest's {model} in PCI slot {slot} has {queues} queues, the command line says {own_queues}"
                );
            }
        }
    }
    let added = own.iter().find(|own| guest.iter().all(|guest| guest.slot != own.slot));
    match added {
        None => Ok(()),
        Some(DeviceShape { slot, model, .. }) => {
            bail!("the guest has nothing in PCI slot {slot}, the command line a {model}")
        }
    }
}

/// The sections of bus and devices that this program reads.
pub(crate) fn sections() -> Vec<SectionVersions> {
    vec![row::<HostState>(), row::<FunctionState>(), row::<VirtioState>()]
}

fn row<T: SectionType>() -> SectionVersions {
    (T::NAME, T::VERSIONS)
}

/// Forbids updates for as long as a device is there that cannot be saved.
pub(crate) fn block_updates(machine: &Machine, blockers: &Blockers) -> Vec<Blocker> {
    let block = |name: &str| blockers.add(ModeSet::all(), format!("device '{name}' cannot be saved"));
    machine.unsavable_devices().into_iter().map(block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(slot: u8, model: &str, queues: u16) -> DeviceShape {
        DeviceShape { slot, model: model.into(), queues }
    }

    #[test]
    fn a_guest_finds_its_devices_or_the_difference_is_told() {
        let guest = [device(1, "virtio-blk-pci", 1), device(2, "virtio-net-pci", 3)];
        let check = |own: &[DeviceShape]| check_shapes(&guest, own).map_err(|error| error.to_string());
        assert_eq!(check(&[guest[1].clone(), guest[0].clone()]), Ok(()));
        for (own, said) in [
            (
                vec![guest[0].clone()],
                "the guest has a virtio-net-pci in PCI slot 2, the command line has nothing there",
            ),
            (
                vec![device(1, "virtio-rng-pci", 1), guest[1].clone()],
                "the guest has a virtio-blk-pci in PCI slot 1, the command line a virtio-rng-pci",
            ),
            (
                vec![guest[0].clone(), device(2, "virtio-net-pci", 5)],
                "the guest's virtio-net-pci in PCI slot 2 has 3 queues, the command line says 5",
            ),
            (
                vec![guest[0].clone(), guest[1].clone(), device(9, "virtio-rng-pci", 1)],
                "the guest has nothing in PCI slot 9, the command line a virtio-rng-pci",
            ),
        ] {
            assert_eq!(check(&own), Err(said.into()));
        }
    }

    #[test]
    fn a_machine_without_a_bus_has_no_devices() {
        let of = |name| MachineType::find(name).unwrap();
        let devices = [device(1, "virtio-rng-pci", 1)];
        assert!(check_bus(of("microvm-0.1"), &[]).is_ok());
        assert!(check_bus(of("microvm-0.2"), &devices).is_ok());
        assert_eq!(
            check_bus(of("microvm-0.1"), &devices).unwrap_err().to_string(),
            "virtio-rng-pci in slot 1: machine type 'microvm-0.1' has no PCI bus; use a later one"
        );
    }
}
