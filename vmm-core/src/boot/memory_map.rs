//! The memory map that the kernel is given: RAM without the PC's hole below 1 MiB, the ACPI tables, and PCI's configuration
//! space, which Linux believes in only if it is reserved.
//!
//! Other device memory is announced by the ACPI tables alone. The numbers of the kinds
//! are those of the BIOS call INT 15h, function E820h, which both boot protocols use (ACPI 6.5, table 15.374).

use std::ops::Range;

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::error::BootError;
use super::layout::{ACPI_AREA, HIGH_START, HOLE_START};
use crate::memory::LOW_RAM_END;
use crate::pci::ECAM;

/// What a range of the memory map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Kind {
    /// RAM that the kernel may use.
    Ram = 1,
    /// Not RAM, and not to be given to any device.
    Reserved = 2,
    /// ACPI tables: the kernel may use the RAM once it has read them.
    Acpi = 3,
}

/// One range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820Range {
    /// First guest-physical address.
    pub start: u64,
    /// Length in bytes, never 0.
    pub size: u64,
    /// What it is.
    pub kind: E820Kind,
}

/// The memory map of a machine with this RAM, by ascending address; `pci`: it has a PCI bus.
pub fn e820(ram: &GuestMemoryMmap, pci: bool) -> Vec<E820Range> {
    map_of(&pieces(ram), pci)
}

/// End of the RAM that starts at 0: everything needed at boot is placed below it.
pub(super) fn low_end(ram: &GuestMemoryMmap) -> Result<u64, BootError> {
    let end = match pieces(ram).first() {
        Some(piece) if piece.start == 0 => piece.end.min(LOW_RAM_END),
        _ => 0,
    };
    if end <= HIGH_START { Err(BootError::Ram { end }) } else { Ok(end) }
}

/// RAM by ascending address, regions that touch joined.
fn pieces(ram: &GuestMemoryMmap) -> Vec<Range<u64>> {
    let mut pieces: Vec<Range<u64>> = Vec::new();
    for region in ram.iter() {
        let start = region.start_addr().raw_value();
        let end = start + region.len();
        match pieces.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => pieces.push(start..end),
        }
    }
    pieces
}

fn map_of(pieces: &[Range<u64>], pci: bool) -> Vec<E820Range> {
    let mut map = Vec::new();
    let mut push = |start: u64, end: u64, kind| {
        if start < end {
            map.push(E820Range { start, size: end - start, kind });
        }
    };
    for piece in pieces {
        push(piece.start, piece.end.min(HOLE_START), E820Kind::Ram);
        push(piece.start.max(ACPI_AREA.start), piece.end.min(ACPI_AREA.end), E820Kind::Acpi);
        push(piece.start.max(HIGH_START), piece.end, E820Kind::Ram);
    }
    if pci {
        push(ECAM.start, ECAM.end, E820Kind::Reserved);
    }
    map.sort_by_key(|range| range.start);
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    fn ram(regions: &[(u64, usize)]) -> GuestMemoryMmap {
        let regions: Vec<_> = regions.iter().map(|&(start, len)| (GuestAddress(start), len)).collect();
        GuestMemoryMmap::from_ranges(&regions).unwrap()
    }

    fn flat(map: &[E820Range]) -> Vec<(u64, u64, u32)> {
        map.iter().map(|r| (r.start, r.start + r.size, r.kind as u32)).collect()
    }

    #[test]
    fn ram_without_the_hole_and_with_high_memory() {
        assert_eq!(
            flat(&map_of(&[0..LOW_RAM_END, 1 << 32..5 << 30], false)),
            [
                (0, 0xa_0000, 1),
                (0xe_0000, 0x10_0000, 3),
                (0x10_0000, 0xc000_0000, 1),
                (0x1_0000_0000, 0x1_4000_0000, 1)
            ]
        );
    }

    #[test]
    fn configuration_space_is_nobodys_memory() {
        let map = map_of(&[0..LOW_RAM_END, 1 << 32..5 << 30], true);
        assert_eq!(flat(&map)[3..], [(0xe000_0000, 0xe010_0000, 2), (0x1_0000_0000, 0x1_4000_0000, 1)]);
        assert_eq!(map.len(), 5);
    }

    #[test]
    fn regions_that_touch_are_one() {
        let ram = ram(&[(0, 1 << 20), (1 << 20, 1 << 20), (4 << 20, 1 << 20)]);
        assert_eq!(pieces(&ram), [0..2 << 20, 4 << 20..5 << 20]);
        assert_eq!(low_end(&ram).unwrap(), 2 << 20);
        assert_eq!(e820(&ram, false).len(), 4);
    }

    #[test]
    fn ram_that_cannot_hold_boot_data_is_refused() {
        assert!(matches!(low_end(&ram(&[(0, 1 << 20)])), Err(BootError::Ram { end: 0x10_0000 })));
        assert!(matches!(low_end(&ram(&[(1 << 20, 1 << 20)])), Err(BootError::Ram { end: 0 })));
    }
}
