//! The saved state of a machine as it travels: types that exist only for the wire.
//!
//! No type here is used to run anything, and no running type is serialised: what a field means does not change
//! when the code around it does. KVM's own structures travel as the bytes the kernel gave (a [`Blob`]), and their
//! exact length is checked when they are loaded, because `kvm-bindings`' own serde silently pads and truncates.
//! The layouts are those of `linux/kvm.h`, which is kernel ABI.

use std::fmt;

use cpr_core::section::SectionType;
use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_pit_state2, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Bytes of `struct kvm_sregs2`.
pub const SREGS2_LEN: usize = 320;
/// Bytes of `struct kvm_xsave` without the extension that `KVM_CAP_XSAVE2` tells of.
pub const XSAVE_MIN_LEN: usize = 4096;
/// The most bytes of an XSAVE area that are believed; AMX needs some 11 KiB.
pub const XSAVE_MAX_LEN: usize = 64 * 1024;
/// Bytes of the fixed head of `struct kvm_nested_state`.
pub const NESTED_HEADER_LEN: usize = 128;
/// The most bytes of nested state that are believed: head, VMCS12 and shadow VMCS12.
pub const NESTED_MAX_LEN: usize = 64 * 1024;
/// `KVM_MAX_CPUID_ENTRIES` of the kernel.
pub const MAX_CPUID_ENTRIES: usize = 256;
/// The most MSRs of one vCPU that are believed.
pub const MAX_MSRS: usize = 4096;
/// The most GSI routes that are believed: `KVM_MAX_IRQ_ROUTES` of the kernel.
pub const MAX_GSI_ROUTES: usize = 4096;

/// A saved state that cannot be loaded. Nothing was touched when this is returned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// A KVM structure has not the length that the kernel's header gives it.
    #[error("field `{field}` has {found} bytes, expected {expected}")]
    Length {
        /// The field.
        field: &'static str,
        /// The length it must have.
        expected: usize,
        /// The length it has.
        found: usize,
    },
    /// A field of variable length is impossibly long, short or uneven.
    #[error("field `{field}` has a size of {found}, which is not {rule}")]
    Size {
        /// The field.
        field: &'static str,
        /// The rule it breaks.
        rule: &'static str,
        /// The size it has.
        found: usize,
    },
    /// A field has a value that cannot be.
    #[error("field `{field}` is {found}, expected {expected}")]
    Value {
        /// The field.
        field: &'static str,
        /// What it must be.
        expected: u64,
        /// What it is.
        found: u64,
    },
}

/// Opaque bytes. On the wire: a length and the bytes, copied as a whole.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Blob(Vec<u8>);

impl Blob {
    /// Takes the bytes of a kernel structure.
    pub fn of<T: IntoBytes + Immutable>(value: &T) -> Self {
        Self(value.as_bytes().to_vec())
    }

    /// Returns the kernel structure that these bytes are.
    ///
    /// # Errors
    /// [`StateError::Length`] naming `field` when there are more or fewer bytes than the structure has.
    pub fn load<T: FromBytes>(&self, field: &'static str) -> Result<T, StateError> {
        T::read_from_bytes(&self.0).map_err(|_| StateError::Length {
            field,
            expected: size_of::<T>(),
            found: self.0.len(),
        })
    }

    /// Returns the bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }
}

impl From<Vec<u8>> for Blob {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blob({} bytes)", self.0.len())
    }
}

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl<'de> Visitor<'de> for Bytes {
            type Value = Blob;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Blob, E> {
                Ok(Blob(bytes.to_vec()))
            }

            fn visit_byte_buf<E: serde::de::Error>(self, bytes: Vec<u8>) -> Result<Blob, E> {
                Ok(Blob(bytes))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Blob, A::Error> {
                // Formats without a bytes type (JSON). The size hint is not believed.
                let mut bytes = Vec::new();
                while let Some(byte) = seq.next_element()? {
                    if bytes.len() >= 1 << 20 {
                        return Err(A::Error::custom("more than 1 MiB of bytes"));
                    }
                    bytes.push(byte);
                }
                Ok(Blob(bytes))
            }
        }
        deserializer.deserialize_bytes(Bytes)
    }
}

/// The segment and control registers, in whichever form the saving host's KVM had them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SregsState {
    /// `struct kvm_sregs`.
    Sregs(Blob),
    /// `struct kvm_sregs2`, which has the PDPTRs.
    Sregs2(Blob),
}

/// Everything of one vCPU that the guest can tell from a fresh one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// The vCPU's index, which is its KVM id and APIC id.
    pub id: u32,
    /// The CPUID table: `struct kvm_cpuid_entry2`, one after the other.
    pub cpuid: Blob,
    /// `struct kvm_mp_state`.
    pub mp_state: Blob,
    /// `struct kvm_regs`.
    pub regs: Blob,
    /// `struct kvm_sregs` or `kvm_sregs2`.
    pub sregs: SregsState,
    /// The XSAVE area, as long as the saving host's `KVM_CAP_XSAVE2` said.
    pub xsave: Blob,
    /// `struct kvm_xcrs`; absent where KVM has none.
    pub xcrs: Option<Blob>,
    /// `struct kvm_debugregs`.
    pub debugregs: Blob,
    /// `struct kvm_lapic_state`.
    pub lapic: Blob,
    /// MSRs and their values, in the order in which they are to be set.
    pub msrs: Vec<(u32, u64)>,
    /// `struct kvm_vcpu_events`.
    pub events: Blob,
    /// `struct kvm_nested_state` with its data; absent where KVM has none.
    pub nested: Option<Blob>,
    /// The guest's TSC frequency in kHz; 0 where KVM does not tell.
    pub tsc_khz: u32,
    /// Guest TSC minus host TSC, modulo 2^64. Absent where KVM does not tell: the TSC is then among the MSRs.
    pub tsc_offset: Option<u64>,
}

/// The guest's paravirtual clock, and when it was read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// The clock in ns, as `KVM_GET_CLOCK` gave it.
    pub kvmclock_ns: u64,
    /// `KVM_CLOCK_*` flags of that answer.
    pub flags: u32,
    /// `CLOCK_REALTIME` in ns at that moment; meaningful with `KVM_CLOCK_REALTIME` in `flags`.
    pub realtime_ns: u64,
    /// The host's TSC at that moment; meaningful with `KVM_CLOCK_HOST_TSC` in `flags`.
    pub host_tsc: u64,
    /// `CLOCK_MONOTONIC` in ns at which the clock was read.
    pub monotonic_ns: u64,
}

/// Where an interrupt line or message leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum GsiRoute {
    /// A pin of an in-kernel interrupt controller.
    Pin {
        /// The global system interrupt.
        gsi: u32,
        /// 0 and 1: the PICs; 2: the IOAPIC (`KVM_IRQCHIP_*`).
        chip: u32,
        /// The pin of it.
        pin: u32,
    },
    /// A message-signalled interrupt.
    Msi {
        /// The global system interrupt.
        gsi: u32,
        /// Low 32 bits of the message's address.
        address_lo: u32,
        /// High 32 bits of it.
        address_hi: u32,
        /// The message's data.
        data: u32,
    },
}

/// What belongs to the VM as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// `struct kvm_irqchip` of the IOAPIC.
    pub ioapic: Blob,
    /// `struct kvm_irqchip` of the first PIC.
    pub pic_master: Blob,
    /// `struct kvm_irqchip` of the second PIC.
    pub pic_slave: Blob,
    /// `struct kvm_pit_state2`.
    pub pit: Blob,
    /// The paravirtual clock.
    pub clock: ClockState,
    /// The interrupt routes; none means KVM's default table.
    pub gsi_routes: Vec<GsiRoute>,
}

/// The serial port: registers and what the guest has not read yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor latch, high byte.
    pub baud_divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Bytes in the receive FIFO, oldest first.
    pub in_buffer: Blob,
}

/// What the small platform devices remember.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlatformState {
    /// The register that the guest last selected through port 0x70.
    pub rtc_index: u8,
}

/// The whole machine, without its RAM and without devices that others add.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// The vCPUs in the order of their ids.
    pub vcpus: Vec<VcpuState>,
    /// What belongs to the VM as a whole.
    pub vm: VmState,
    /// The serial port.
    pub serial: SerialState,
    /// The small platform devices.
    pub platform: PlatformState,
}

impl SectionType for VcpuState {
    const NAME: &'static str = "kvm/vcpu";
    const VERSION: u32 = 1;
}

impl SectionType for VmState {
    const NAME: &'static str = "kvm/vm";
    const VERSION: u32 = 1;
}

impl SectionType for SerialState {
    const NAME: &'static str = "serial";
    const VERSION: u32 = 1;
}

impl SectionType for PlatformState {
    const NAME: &'static str = "platform";
    const VERSION: u32 = 1;
}

impl VcpuState {
    /// Checks every length and count, so that a later restore can fail only where KVM refuses a value.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(&self) -> Result<(), StateError> {
        check_cpuid(&self.cpuid)?;
        check_len::<kvm_mp_state>("mp_state", &self.mp_state)?;
        check_len::<kvm_regs>("regs", &self.regs)?;
        match &self.sregs {
            SregsState::Sregs(blob) => check_len::<kvm_sregs>("sregs", blob)?,
            SregsState::Sregs2(blob) => exact("sregs2", blob, SREGS2_LEN)?,
        }
        let xsave = self.xsave.as_slice().len();
        if !(XSAVE_MIN_LEN..=XSAVE_MAX_LEN).contains(&xsave) || !xsave.is_multiple_of(4) {
            return Err(StateError::Size {
                field: "xsave",
                rule: "4 KiB to 64 KiB in steps of 4",
                found: xsave,
            });
        }
        if let Some(xcrs) = &self.xcrs {
            check_len::<kvm_xcrs>("xcrs", xcrs)?;
        }
        check_len::<kvm_debugregs>("debugregs", &self.debugregs)?;
        check_len::<kvm_lapic_state>("lapic", &self.lapic)?;
        if self.msrs.len() > MAX_MSRS {
            return Err(StateError::Size { field: "msrs", rule: "at most 4096", found: self.msrs.len() });
        }
        check_len::<kvm_vcpu_events>("events", &self.events)?;
        if let Some(nested) = &self.nested {
            check_nested(nested.as_slice())?;
        }
        Ok(())
    }
}

impl VmState {
    /// Checks every length and count.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(&self) -> Result<(), StateError> {
        check_len::<kvm_irqchip>("ioapic", &self.ioapic)?;
        check_len::<kvm_irqchip>("pic_master", &self.pic_master)?;
        check_len::<kvm_irqchip>("pic_slave", &self.pic_slave)?;
        check_len::<kvm_pit_state2>("pit", &self.pit)?;
        if self.gsi_routes.len() > MAX_GSI_ROUTES {
            return Err(StateError::Size {
                field: "gsi_routes",
                rule: "at most 4096",
                found: self.gsi_routes.len(),
            });
        }
        Ok(())
    }
}

impl SerialState {
    /// Checks that the FIFO's content fits the FIFO.
    ///
    /// # Errors
    /// [`StateError::Size`] when it does not.
    pub fn check(&self) -> Result<(), StateError> {
        let found = self.in_buffer.as_slice().len();
        if found > crate::serial::FIFO_LEN {
            return Err(StateError::Size { field: "serial.in_buffer", rule: "at most 64", found });
        }
        Ok(())
    }
}

impl MachineState {
    /// Checks every length and count of every part, and that the vCPUs are in order. Touches nothing.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(&self) -> Result<(), StateError> {
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            vcpu.check()?;
            if vcpu.id as usize != index {
                return Err(StateError::Value {
                    field: "vcpu.id",
                    expected: index as u64,
                    found: vcpu.id.into(),
                });
            }
        }
        self.vm.check()?;
        self.serial.check()
    }
}

fn exact(field: &'static str, blob: &Blob, expected: usize) -> Result<(), StateError> {
    let found = blob.as_slice().len();
    if found == expected { Ok(()) } else { Err(StateError::Length { field, expected, found }) }
}

fn check_len<T>(field: &'static str, blob: &Blob) -> Result<(), StateError> {
    exact(field, blob, size_of::<T>())
}

fn check_cpuid(blob: &Blob) -> Result<(), StateError> {
    let found = blob.as_slice().len();
    let entry = size_of::<kvm_cpuid_entry2>();
    if !found.is_multiple_of(entry) || found / entry > MAX_CPUID_ENTRIES {
        return Err(StateError::Size { field: "cpuid", rule: "a multiple of 40 up to 256 entries", found });
    }
    Ok(())
}

fn check_nested(bytes: &[u8]) -> Result<(), StateError> {
    if !(NESTED_HEADER_LEN..=NESTED_MAX_LEN).contains(&bytes.len()) {
        return Err(StateError::Size { field: "nested", rule: "128 bytes to 64 KiB", found: bytes.len() });
    }
    // struct kvm_nested_state { u16 flags; u16 format; u32 size; ... }: the kernel reads `size` bytes from the
    // pointer it is given, so a larger one would read past our buffer.
    let size = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
    if size != bytes.len() {
        return Err(StateError::Length { field: "nested.size", expected: bytes.len(), found: size });
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
