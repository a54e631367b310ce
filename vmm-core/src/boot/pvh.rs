//! `hvm_start_info`, by which a kernel entered through PVH learns of initrd, command line, RAM and ACPI tables.
//!
//! Version 1 of the structure, the first with a memory map; Linux takes the first module for its initrd. The source is
//! Xen's `xen/include/public/arch-x86/hvm/start_info.h`.

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Address, GuestAddress, GuestMemoryMmap};

use super::error::BootError;
use super::initrd::Loaded;
use super::layout::{CMDLINE, MEMORY_MAP, MODULE_LIST, START_INFO};
use super::memory_map::e820;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;

/// Writes the structure and what it points to; the command line is there already.
pub(super) fn write_start_info(
    ram: &GuestMemoryMmap,
    initrd: Option<Loaded>,
    rsdp: GuestAddress,
    pci: bool,
) -> Result<GuestAddress, BootError> {
    let map: Vec<_> = e820(ram, pci)
        .iter()
        .map(|range| hvm_memmap_table_entry {
            addr: range.start,
            size: range.size,
            type_: range.kind as u32,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = initrd
        .iter()
        .map(|initrd| hvm_modlist_entry {
            paddr: initrd.start.raw_value(),
            size: initrd.size,
            ..Default::default()
        })
        .collect();
    let start_info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { MODULE_LIST.raw_value() },
        cmdline_paddr: CMDLINE.raw_value(),
        rsdp_paddr: rsdp.raw_value(),
        memmap_paddr: MEMORY_MAP.raw_value(),
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&start_info, START_INFO);
    params.set_sections(&map, MEMORY_MAP);
    if !modules.is_empty() {
        params.set_modules(&modules, MODULE_LIST);
    }
    PvhBootConfigurator::write_bootparams(&params, ram).map_err(BootError::configurator)?;
    Ok(START_INFO)
}
