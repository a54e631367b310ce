//! The state of a VM as a whole: interrupt controllers, timer chip, paravirtual clock, interrupt routes.
//!
//! The order towards the vCPUs' state matters. The PICs hold no LAPIC's state and may come at any time; setting the
//! IOAPIC injects what is pending in it into the LAPICs, and the timer chip may raise its interrupt at once: both come
//! after the LAPICs, or what they inject is overwritten.

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_clock_data, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_irqchip, kvm_pit_state2,
};
use oslib::clock::monotonic_ns;

use crate::error::{KvmError, MachineError};
use crate::kvm::{Capabilities, Vm};
use crate::state::{Blob, ClockState, GsiRoute, StateError, VmState};
use crate::vcpu::restore_step;

/// Reads everything. `routes` is the table that was set, as KVM does not give it back.
pub(crate) fn save(vm: &Vm, routes: Vec<GsiRoute>) -> Result<VmState, MachineError> {
    Ok(VmState {
        ioapic: save_chip(vm, KVM_IRQCHIP_IOAPIC)?,
        pic_master: save_chip(vm, KVM_IRQCHIP_PIC_MASTER)?,
        pic_slave: save_chip(vm, KVM_IRQCHIP_PIC_SLAVE)?,
        pit: Blob::of(&vm.fd().get_pit2().map_err(KvmError::of("KVM_GET_PIT2"))?),
        clock: save_clock(vm)?,
        gsi_routes: routes,
    })
}

/// Sets what may be set before the vCPUs have their state.
pub(crate) fn restore_before_vcpus(vm: &Vm, state: &VmState) -> Result<(), MachineError> {
    restore_step!("pic", {
        restore_chip(vm, KVM_IRQCHIP_PIC_MASTER, "pic_master", &state.pic_master)?;
        restore_chip(vm, KVM_IRQCHIP_PIC_SLAVE, "pic_slave", &state.pic_slave)?;
    });
    Ok(())
}

/// Sets what must come after the vCPUs' LAPICs.
pub(crate) fn restore_after_vcpus(vm: &Vm, state: &VmState) -> Result<(), MachineError> {
    restore_step!("irqchip", restore_chip(vm, KVM_IRQCHIP_IOAPIC, "ioapic", &state.ioapic)?);
    restore_step!("pit", {
        let pit: kvm_pit_state2 = state.pit.load("pit")?;
        vm.fd().set_pit2(&pit).map_err(KvmError::of("KVM_SET_PIT2"))?;
    });
    Ok(())
}

fn save_chip(vm: &Vm, chip_id: u32) -> Result<Blob, KvmError> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.fd().get_irqchip(&mut chip).map_err(KvmError::of("KVM_GET_IRQCHIP"))?;
    Ok(Blob::of(&chip))
}

fn restore_chip(vm: &Vm, chip_id: u32, field: &'static str, blob: &Blob) -> Result<(), MachineError> {
    let chip: kvm_irqchip = blob.load(field)?;
    if chip.chip_id != chip_id {
        let (expected, found) = (chip_id.into(), chip.chip_id.into());
        return Err(StateError::Value { field, expected, found }.into());
    }
    Ok(vm.fd().set_irqchip(&chip).map_err(KvmError::of("KVM_SET_IRQCHIP"))?)
}

fn save_clock(vm: &Vm) -> Result<ClockState, KvmError> {
    let before = monotonic_ns();
    let clock = vm.fd().get_clock().map_err(KvmError::of("KVM_GET_CLOCK"))?;
    let after = monotonic_ns();
    Ok(ClockState {
        kvmclock_ns: clock.clock,
        flags: clock.flags,
        realtime_ns: clock.realtime,
        host_tsc: clock.host_tsc,
        monotonic_ns: before + (after - before) / 2,
    })
}

/// Sets the paravirtual clock to what it would be had it never stopped: the guest's time goes on during an update.
///
/// Where KVM told the real time at which it read the clock, it adds what has passed since by itself. Otherwise
/// `CLOCK_MONOTONIC` tells, which both processes share as long as they run on one boot of one host.
pub(crate) fn restore_clock(vm: &Vm, caps: &Capabilities, state: &ClockState) -> Result<(), KvmError> {
    restore_step!("kvmclock", {
        let data = clock_to_set(state, caps.clock_flags, monotonic_ns());
        vm.fd().set_clock(&data).map_err(KvmError::of("KVM_SET_CLOCK"))?;
    });
    Ok(())
}

fn clock_to_set(state: &ClockState, supported: u32, now_ns: u64) -> kvm_clock_data {
    if state.flags & supported & KVM_CLOCK_REALTIME != 0 {
        return kvm_clock_data {
            clock: state.kvmclock_ns,
            flags: KVM_CLOCK_REALTIME,
            realtime: state.realtime_ns,
            ..Default::default()
        };
    }
    let passed = now_ns.saturating_sub(state.monotonic_ns);
    kvm_clock_data { clock: state.kvmclock_ns.saturating_add(passed), ..Default::default() }
}

/// Replaces the VM's interrupt routes.
pub(crate) fn set_routes(vm: &Vm, routes: &[GsiRoute]) -> Result<(), MachineError> {
    let entries: Vec<_> = routes.iter().map(route_entry).collect();
    let table = KvmIrqRouting::from_entries(&entries).map_err(|_| StateError::Size {
        field: "gsi_routes",
        rule: "at most 4096",
        found: routes.len(),
    })?;
    Ok(vm.fd().set_gsi_routing(&table).map_err(KvmError::of("KVM_SET_GSI_ROUTING"))?)
}

fn route_entry(route: &GsiRoute) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry::default();
    match *route {
        GsiRoute::Pin { gsi, chip, pin } => {
            entry.gsi = gsi;
            entry.type_ = KVM_IRQ_ROUTING_IRQCHIP;
            entry.u.irqchip = kvm_irq_routing_irqchip { irqchip: chip, pin };
        }
        GsiRoute::Msi { gsi, address_lo, address_hi, data } => {
            entry.gsi = gsi;
            entry.type_ = KVM_IRQ_ROUTING_MSI;
            entry.u.msi = kvm_irq_routing_msi { address_lo, address_hi, data, ..Default::default() };
        }
    }
    entry
}

/// The routes that KVM gives a VM with in-kernel interrupt controllers: lines 0 to 15 lead to PIC and IOAPIC, 16 to
/// 23 to the IOAPIC alone (`default_routing` of the kernel's `irq_comm.c`).
pub(crate) fn default_routes() -> Vec<GsiRoute> {
    let pic = |gsi: u32| GsiRoute::Pin {
        gsi,
        chip: if gsi < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE },
        pin: gsi % 8,
    };
    let ioapic = |gsi: u32| GsiRoute::Pin { gsi, chip: KVM_IRQCHIP_IOAPIC, pin: gsi };
    (0..16).flat_map(|gsi| [ioapic(gsi), pic(gsi)]).chain((16..24).map(ioapic)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_goes_on_during_the_update() {
        let state = ClockState { kvmclock_ns: 5_000, monotonic_ns: 100, ..Default::default() };
        let set = clock_to_set(&state, u32::MAX, 100 + 3_000_000);
        assert_eq!((set.clock, set.flags), (3_005_000, 0));
        // Never backwards, and never an overflow.
        assert_eq!(clock_to_set(&state, u32::MAX, 50).clock, 5_000);
        let late = ClockState { kvmclock_ns: u64::MAX, ..state };
        assert_eq!(clock_to_set(&late, 0, u64::MAX).clock, u64::MAX);
    }

    #[test]
    fn kvm_adds_by_itself_where_both_sides_can() {
        let state = ClockState {
            kvmclock_ns: 5_000,
            flags: KVM_CLOCK_REALTIME | 2,
            realtime_ns: 77,
            monotonic_ns: 100,
            ..Default::default()
        };
        let set = clock_to_set(&state, KVM_CLOCK_REALTIME, 1_000_000);
        assert_eq!((set.clock, set.flags, set.realtime), (5_000, KVM_CLOCK_REALTIME, 77));
        let set = clock_to_set(&state, 2, 1_000_000);
        assert_eq!((set.clock, set.flags, set.realtime), (1_004_900, 0, 0));
    }

    #[test]
    fn default_routes_lead_to_both_controllers() {
        let routes = default_routes();
        assert_eq!(routes.len(), 40);
        assert!(routes.contains(&GsiRoute::Pin { gsi: 4, chip: 0, pin: 4 }));
        assert!(routes.contains(&GsiRoute::Pin { gsi: 12, chip: 1, pin: 4 }));
        assert!(routes.contains(&GsiRoute::Pin { gsi: 23, chip: 2, pin: 23 }));
    }
}
