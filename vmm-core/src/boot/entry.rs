//! The state in which the first vCPU enters the kernel, and the descriptor table that this state refers to.
//!
//! It changes what the boot protocol prescribes and leaves the rest as KVM created it: APIC base, pending interrupts,
//! the state of the other vCPUs. Sources: Xen's `docs/misc/pvh.pandoc`; Linux' `Documentation/arch/x86/boot.rst`,
//! section "64-bit Boot Protocol"; Intel SDM volume 3, sections 3.4.5 and 4.5.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::error::BootError;
use super::layout::{GDT, PAGE_TABLES, STACK_TOP};

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that always reads as 1.
const RFLAGS_FIXED: u64 = 1 << 1;

/// The selectors are Linux' `__BOOT_CS`, `__BOOT_DS` and `__BOOT_TSS`.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;
/// Null, unused, code, data, and a TSS descriptor, which takes two entries in long mode.
const GDT_ENTRIES: usize = 6;

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// 32-bit protected mode without paging, `ebx` points to `hvm_start_info`.
    Pvh,
    /// Long mode with identity page tables, `rsi` points to `boot_params`.
    Linux64,
}

/// A loaded kernel, ready to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    protocol: Protocol,
    address: GuestAddress,
    info: GuestAddress,
}

impl Entry {
    pub(super) fn new(protocol: Protocol, address: GuestAddress, info: GuestAddress) -> Self {
        Self { protocol, address, info }
    }

    /// How the kernel is entered.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Its first instruction.
    pub fn address(&self) -> GuestAddress {
        self.address
    }

    /// The structure that tells it about the machine: `hvm_start_info` or `boot_params`.
    pub fn info(&self) -> GuestAddress {
        self.info
    }

    /// Sets the registers of the first vCPU. `sregs` are those that KVM reports of the vCPU as it was created.
    pub fn apply(&self, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
        *regs = kvm_regs { rip: self.address.raw_value(), rflags: RFLAGS_FIXED, ..Default::default() };
        match self.protocol {
            Protocol::Pvh => {
                regs.rbx = self.info.raw_value();
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr3 = 0;
                sregs.cr4 = 0;
                sregs.efer = 0;
            }
            Protocol::Linux64 => {
                regs.rsi = self.info.raw_value();
                regs.rsp = STACK_TOP.raw_value();
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                sregs.cr3 = PAGE_TABLES.raw_value();
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
            }
        }
        sregs.cr2 = 0;
        sregs.cs = code(self.protocol);
        for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
            *segment = data();
        }
        sregs.tr = tss();
        sregs.gdt =
            kvm_dtable { base: GDT.raw_value(), limit: (GDT_ENTRIES * 8 - 1) as u16, ..Default::default() };
        // No table at all: an exception before the kernel has its own ends the machine instead of running wild.
        sregs.idt = kvm_dtable::default();
    }
}

/// Writes the table that the segments of [`Entry::apply`] come from, for kernels that load them again.
pub(super) fn write_gdt(ram: &GuestMemoryMmap, protocol: Protocol) -> Result<(), BootError> {
    let table: [u64; GDT_ENTRIES] =
        [0, 0, descriptor(&code(protocol)), descriptor(&data()), descriptor(&tss()), 0];
    for (n, entry) in (0..).zip(table) {
        ram.write_obj(entry, GDT.unchecked_add(n * 8))?;
    }
    Ok(())
}

/// Execute, read, accessed; flat.
fn code(protocol: Protocol) -> kvm_segment {
    let long = u8::from(protocol == Protocol::Linux64);
    kvm_segment { selector: CODE_SELECTOR, type_: 0b1011, l: long, db: 1 - long, ..flat() }
}

/// Read, write, accessed; flat.
fn data() -> kvm_segment {
    kvm_segment { selector: DATA_SELECTOR, type_: 0b0011, db: 1, ..flat() }
}

fn flat() -> kvm_segment {
    kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() }
}

/// A busy TSS of the smallest legal size; processors want one, nobody reads it.
fn tss() -> kvm_segment {
    kvm_segment { selector: TSS_SELECTOR, limit: 0x67, type_: 0b1011, present: 1, ..Default::default() }
}

/// A segment as its entry in the descriptor table.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_ | segment.s << 4 | segment.dpl << 5 | segment.present << 7);
    let flags = u64::from(segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3);
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (segment.base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As KVM reports it after reset.
    fn reset() -> (kvm_regs, kvm_sregs) {
        let regs = kvm_regs { rip: 0xfff0, rdx: 0x600, rflags: 2, ..Default::default() };
        let sregs = kvm_sregs { cr0: 0x6000_0010, apic_base: 0xfee0_0900, ..Default::default() };
        (regs, sregs)
    }

    #[test]
    fn descriptors_are_the_textbook_ones() {
        assert_eq!(descriptor(&code(Protocol::Pvh)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&code(Protocol::Linux64)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data()), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&tss()), 0x0000_8b00_0000_0067);
        let everywhere = kvm_segment { base: 0x1234_5678, ..flat() };
        assert_eq!(descriptor(&everywhere), 0x128f_9034_5678_ffff);
    }

    #[test]
    fn pvh_is_flat_protected_mode() {
        let (mut regs, mut sregs) = reset();
        Entry::new(Protocol::Pvh, GuestAddress(0x100_0000), GuestAddress(0x2000))
            .apply(&mut regs, &mut sregs);
        assert_eq!((regs.rip, regs.rbx, regs.rdx, regs.rflags), (0x100_0000, 0x2000, 0, 2));
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x11, 0, 0, 0));
        assert_eq!((sregs.cs.base, sregs.cs.limit, sregs.cs.db, sregs.cs.l), (0, u32::MAX, 1, 0));
        assert_eq!((sregs.ss.type_, sregs.ss.db, sregs.tr.limit, sregs.tr.type_), (3, 1, 0x67, 11));
        assert_eq!(sregs.apic_base, 0xfee0_0900, "the local APIC stays as KVM made it");
    }

    #[test]
    fn linux_is_long_mode() {
        let (mut regs, mut sregs) = reset();
        Entry::new(Protocol::Linux64, GuestAddress(0x100_0200), GuestAddress(0x7000))
            .apply(&mut regs, &mut sregs);
        assert_eq!((regs.rip, regs.rsi, regs.rsp), (0x100_0200, 0x7000, 0x9000));
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x8000_0011, 0xa000, 0x20, 0x500));
        assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
        for segment in [sregs.ds, sregs.es, sregs.ss] {
            assert_eq!((segment.selector, segment.limit, segment.base), (0x18, u32::MAX, 0));
        }
        assert_eq!((sregs.gdt.base, sregs.gdt.limit), (0x1000, 47));
    }
}
