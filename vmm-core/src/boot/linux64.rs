//! What the 64-bit entry of a bzImage expects in memory: `boot_params` (the zero page) and identity page tables.
//!
//! Nothing is filled in that a kernel finds out from ACPI or CPUID; there is no video mode and no EFI. The source is
//! Linux' `Documentation/arch/x86/boot.rst`, section "64-bit Boot Protocol", and `zero-page.rst`.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::error::BootError;
use super::initrd::Loaded;
use super::layout::{BOOT_PARAMS, CMDLINE, PAGE_TABLES};
use super::memory_map::e820;

/// `type_of_loader` of a loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

const PAGE_SIZE: u64 = 4096;
const LARGE_PAGE_SIZE: u64 = 2 << 20;
const TABLE_ENTRIES: u64 = 512;
const DIRECTORIES: u64 = 4;
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;

/// Writes the zero page; the command line is there already.
pub(super) fn write_boot_params(
    ram: &GuestMemoryMmap,
    mut header: setup_header,
    initrd: Option<Loaded>,
    rsdp: GuestAddress,
    pci: bool,
) -> Result<GuestAddress, BootError> {
    header.type_of_loader = LOADER_UNDEFINED;
    header.code32_start = header.pref_address as u32;
    header.cmd_line_ptr = CMDLINE.raw_value() as u32;
    if let Some(initrd) = initrd {
        header.ramdisk_image = initrd.start.raw_value() as u32;
        header.ramdisk_size = initrd.size as u32;
    }
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp.raw_value(), ..Default::default() };

    let map = e820(ram, pci);
    params.e820_entries = map.len() as u8;
    for (entry, range) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: range.start, size: range.size, r#type: range.kind as u32 };
    }
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, BOOT_PARAMS), ram)
        .map_err(BootError::configurator)?;
    Ok(BOOT_PARAMS)
}

/// Maps the first 4 GiB to themselves with 2 MiB pages, which every 64-bit processor has.
pub(super) fn write_page_tables(ram: &GuestMemoryMmap) -> Result<(), BootError> {
    let table = |n: u64| PAGE_TABLES.raw_value() + n * PAGE_SIZE;
    let write = |at: u64, entry: u64| ram.write_obj(entry, GuestAddress(at));
    write(table(0), table(1) | PRESENT | WRITABLE)?;
    for directory in 0..DIRECTORIES {
        write(table(1) + directory * 8, table(2 + directory) | PRESENT | WRITABLE)?;
    }
    for page in 0..DIRECTORIES * TABLE_ENTRIES {
        write(table(2) + page * 8, (page * LARGE_PAGE_SIZE) | PRESENT | WRITABLE | LARGE)?;
    }
    Ok(())
}
