//! The VM descriptor and the RAM it maps.

use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings as kb;
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use oslib::eventfd::EventFd;

use super::{Vcpu, xsave_len};
use crate::error::KvmError;
use crate::memory::GuestRam;
use crate::pci::Hypervisor;

/// Guest-physical address of the three pages that KVM on Intel uses for a task state segment. Below the
/// firmware area, above every device of ours; the value that QEMU and Firecracker use.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// Guest-physical address of the page that KVM on Intel uses for an identity-mapped page table.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// A KVM VM. Keeps the RAM that it maps alive.
#[derive(Debug)]
pub struct Vm {
    // Closed before the RAM below is unmapped.
    fd: VmFd,
    xsave2: i32,
    ram: Mutex<Vec<GuestRam>>,
}

impl Vm {
    /// Creates a VM that has nothing yet.
    ///
    /// # Errors
    /// The call that failed.
    pub fn create(kvm: &Kvm) -> Result<Self, KvmError> {
        let fd = kvm.create_vm().map_err(KvmError::of("KVM_CREATE_VM"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(KvmError::of("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(KvmError::of("KVM_SET_TSS_ADDR"))?;
        let xsave2 = fd.check_extension_int(Cap::Xsave2);
        Ok(Self { fd, xsave2, ram: Mutex::new(Vec::new()) })
    }

    /// Adds the interrupt controllers: two PICs, an IOAPIC, and a LAPIC for each vCPU created from now on.
    ///
    /// After [`Vm::map_ram`]. In recent kernels (seen in 6.18) this leaves a grace period of the VM's SRCU in flight,
    /// and a memory slot that is set during it waits for its end: some 6 ms instead of 0.2.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn create_irqchip(&self) -> Result<(), KvmError> {
        self.fd.create_irq_chip().map_err(KvmError::of("KVM_CREATE_IRQCHIP"))
    }

    /// Adds the timer chip, which needs the interrupt controllers. Port 0x61, the speaker, is answered by KVM as well.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn create_pit(&self) -> Result<(), KvmError> {
        let config = kb::kvm_pit_config { flags: kb::KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        self.fd.create_pit2(config).map_err(KvmError::of("KVM_CREATE_PIT2"))
    }

    /// Maps guest RAM, one slot for each of its regions. Touches none of its pages. Comes first for speed's sake: see
    /// [`Vm::create_irqchip`].
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn map_ram(&self, ram: &GuestRam) -> Result<(), KvmError> {
        let mut held = self.ram.lock().unwrap_or_else(PoisonError::into_inner);
        let first = held.iter().map(|r| r.regions().len()).sum::<usize>();
        // Held before it is mapped, so that not even a failure half-way leaves KVM with memory that is gone.
        held.push(ram.clone());
        for (slot, region) in (first..).zip(ram.regions()) {
            let slot = kb::kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.gpa,
                memory_size: region.len,
                userspace_addr: region.host_addr,
            };
            // SAFETY: the mapping belongs to `ram`, of which `self` keeps a clone until after the VM's descriptor
            // is closed; every vCPU keeps `self`.
            unsafe { self.fd.set_user_memory_region(slot) }
                .map_err(KvmError::of("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// Creates a vCPU. `id` is its KVM id and its APIC id.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn create_vcpu(self: &Arc<Self>, id: u32) -> Result<Vcpu, KvmError> {
        let fd = self.fd.create_vcpu(id.into()).map_err(KvmError::of("KVM_CREATE_VCPU"))?;
        Ok(Vcpu::new(fd, Arc::clone(self)))
    }

    /// Returns the `kvm-ioctls` descriptor, for the calls that it has: irqfds, ioeventfds, MSIs and so on.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Bytes that an XSAVE area has in this VM.
    pub fn xsave_len(&self) -> usize {
        xsave_len(self.xsave2)
    }

    /// Tells whether `KVM_GET_XSAVE2` exists.
    pub fn has_xsave2(&self) -> bool {
        self.xsave2 > 0
    }
}

/// A doorbell as `kvm-ioctls` wants it, which borrows the descriptor.
fn borrowed(doorbell: &EventFd) -> ManuallyDrop<vmm_sys_util::eventfd::EventFd> {
    // SAFETY: the descriptor is that of an eventfd, and open for as long as `doorbell` is borrowed; what is made of it is
    // used within one call, and never dropped, so it is not closed twice.
    ManuallyDrop::new(unsafe { vmm_sys_util::eventfd::EventFd::from_raw_fd(doorbell.as_raw_fd()) })
}

impl Hypervisor for Vm {
    fn send_message(&self, address: u64, data: u32) {
        let message = kb::kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        // It tells of messages to nobody; the guest wrote them.
        if let Err(error) = self.fd.signal_msi(message) {
            tracing::debug!(%error, address, data, "an interrupt message leads nowhere");
        }
    }

    fn attach_doorbell(&self, address: u64, doorbell: &EventFd) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(&borrowed(doorbell), &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(KvmError::of("KVM_IOEVENTFD"))
    }

    fn detach_doorbell(&self, address: u64, doorbell: &EventFd) -> Result<(), KvmError> {
        self.fd
            .unregister_ioevent(&borrowed(doorbell), &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(KvmError::of("KVM_IOEVENTFD (deassign)"))
    }
}

impl AsRawFd for Vm {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
