//! Where things are in guest-physical memory and on the I/O bus, as far as a booting kernel is told about them.
//!
//! The low addresses hold what only the first instructions of the kernel read; Linux keeps clear of the first 64 KiB
//! and of the command line until it has copied them. It refuses to know devices: their ports and interrupts are where
//! the devices are, and only the interrupt controllers, which KVM keeps, are here.

use std::ops::Range;

use vm_memory::GuestAddress;

/// RAM from here to [`HIGH_START`] is not offered to the kernel: video memory and option ROMs on a PC.
pub const HOLE_START: u64 = 0xa_0000;

/// The first address a kernel may be loaded to.
pub const HIGH_START: u64 = 0x10_0000;

/// ACPI tables, and the reset vector in the last 16 bytes. A kernel that is not told where the RSDP is searches
/// exactly this range (ACPI 6.5, 5.2.5.1).
pub const ACPI_AREA: Range<u64> = 0xe_0000..0x10_0000;

/// Most vCPUs that fit 8-bit APIC ids; 255 is the broadcast id.
pub const MAX_VCPUS: usize = 255;

/// Global descriptor table.
pub const GDT: GuestAddress = GuestAddress(0x1000);
/// `hvm_start_info`.
pub const START_INFO: GuestAddress = GuestAddress(0x2000);
/// `hvm_modlist_entry` of the initrd.
pub const MODULE_LIST: GuestAddress = GuestAddress(0x2800);
/// `hvm_memmap_table_entry` table.
pub const MEMORY_MAP: GuestAddress = GuestAddress(0x3000);
/// Most ranges of the memory map: `E820_MAX_ENTRIES_ZEROPAGE` of `boot_params`, to which Linux also copies PVH's.
pub const MEMORY_MAP_MAX: usize = 128;
/// `boot_params`, the zero page of a bzImage.
pub const BOOT_PARAMS: GuestAddress = GuestAddress(0x7000);
/// Initial stack pointer of a bzImage: grows down from here, one page.
pub const STACK_TOP: GuestAddress = GuestAddress(0x9000);
/// Identity page tables of a bzImage: PML4, PDPT, then four page directories.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0xa000);
/// Kernel command line.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// Room for the command line with its terminator, in bytes.
pub const CMDLINE_ROOM: usize = 0x1_0000;

/// Local APIC registers.
pub const LAPIC: u32 = 0xfee0_0000;
/// I/O APIC registers.
pub const IOAPIC: u32 = 0xfec0_0000;
