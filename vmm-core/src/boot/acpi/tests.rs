//! The tables read back the way an operating system reads them, and byte for byte against what was shipped.

use super::*;
use crate::boot::layout::MAX_VCPUS;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

/// A table by its guest-physical address, signature, length and checksum verified.
fn table_at<'a>(area: &'a [u8], address: u64, signature: &[u8]) -> &'a [u8] {
    let at = (address - ACPI_AREA.start) as usize;
    assert_eq!(at % 16, 0);
    let table = &area[at..at + u32_at(area, at + 4) as usize];
    assert_eq!(&table[..4], signature);
    assert_eq!(sum(table), 0, "checksum of {}", String::from_utf8_lossy(signature));
    table
}

/// FADT, MADT and DSDT, by way of RSDP and XSDT.
fn walk(area: &[u8]) -> [&[u8]; 3] {
    assert_eq!(&area[..8], b"RSD PTR ");
    assert_eq!((sum(&area[..20]), sum(&area[..36])), (0, 0));
    assert_eq!((area[15], u32_at(area, 20)), (2, 36));
    let xsdt = table_at(area, u64_at(area, 24), b"XSDT");
    let fadt = table_at(area, u64_at(xsdt, 36), b"FACP");
    let madt = table_at(area, u64_at(xsdt, 44), b"APIC");
    [fadt, madt, table_at(area, u64_at(fadt, 140), b"DSDT")]
}

#[test]
fn every_table_is_found_and_sums_to_zero() {
    for vcpus in [1, 2, 3, 64, MAX_VCPUS] {
        let area = tables(vcpus, false);
        walk(&area);
        assert!(area.len() as u64 <= (ACPI_AREA.end - ACPI_AREA.start) / 4, "{vcpus} vCPUs: {}", area.len());
    }
}

#[test]
fn fadt_is_hardware_reduced_with_power_and_reset_ports() {
    let area = tables(1, false);
    let [fadt, ..] = walk(&area);
    assert_eq!((fadt[8], fadt.len()), (6, 276));
    let flags = u32_at(fadt, 112);
    assert_eq!(flags, 1 << 20 | 1 << 10 | 1 << 5 | 1 << 4 | 1);
    assert_eq!(fadt[109..111], [0b10_0101, 0], "ISA devices, no 8042, no VGA, no CMOS clock");
    assert_eq!(u32_at(fadt, 36) | u32_at(fadt, 48), 0, "neither FACS nor SMI");
    let io_byte = |at: usize| {
        assert_eq!(fadt[at..at + 4], [1, 8, 0, 1], "one byte of system I/O");
        u64_at(fadt, at + 4)
    };
    assert_eq!((io_byte(116), fadt[128]), (0x602, 1));
    assert_eq!((io_byte(244), io_byte(256)), (0x600, 0x601));
}

#[test]
fn madt_names_each_processor_once() {
    for vcpus in [1, 2, MAX_VCPUS] {
        let area = tables(vcpus, false);
        let [_, madt, _] = walk(&area);
        assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xfee0_0000, 1));
        let mut entries = &madt[44..];
        let (mut processors, mut others) = (Vec::new(), Vec::new());
        while let [kind, len, ..] = *entries {
            let entry = &entries[..len.into()];
            match kind {
                0 => {
                    assert_eq!((entry[2], u32_at(entry, 4)), (entry[3], 1), "enabled, and UID is APIC id");
                    processors.push(entry[3]);
                }
                1 => others.push((kind, u32_at(entry, 4))),
                2 => others.push((kind, u32::from(entry[3]))),
                _ => others.push((kind, 0)),
            }
            entries = &entries[len.into()..];
        }
        assert_eq!(processors, ids(vcpus).collect::<Vec<_>>());
        assert_eq!(others, [(1, 0xfec0_0000), (2, 4), (4, 0)]);
    }
}

#[test]
fn dsdt_has_a_processor_device_for_each_vcpu() {
    let area = tables(MAX_VCPUS, false);
    let [.., dsdt] = walk(&area);
    let count = |what: &[u8]| dsdt.windows(what.len()).filter(|window| *window == what).count();
    assert_eq!((count(b"ACPI0007"), count(b"C000"), count(b"C0FE"), count(b"C0FF")), (255, 1, 1, 0));
    // I/O descriptor: 16-bit decode, 0x3f8 to 0x3f8, alignment 1, 8 ports; then an interrupt: consumer, edge, high.
    assert_eq!(count(&[0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8, 0x89, 6, 0, 0b0011, 1, 4, 0, 0, 0]), 1);
}

#[test]
fn a_pci_bus_is_announced() {
    let area = tables(2, true);
    let [.., dsdt] = walk(&area);
    let xsdt = table_at(&area, u64_at(&area, 24), b"XSDT");
    assert_eq!(xsdt.len(), 36 + 3 * 8);
    let mcfg = table_at(&area, u64_at(xsdt, 52), b"MCFG");
    assert_eq!((mcfg.len(), u64_at(mcfg, 44), &mcfg[52..56]), (60, 0xe000_0000, &[0, 0, 0, 0][..]));
    let count = |what: &[u8]| dsdt.windows(what.len()).filter(|window| *window == what).count();
    assert_eq!((count(b"PCI0"), count(b"MBRD")), (1, 1));
    // A window of memory, 0xc0000000 to 0xdfffffff, and its length at the end.
    let window = [0, 0, 0, 0xc0, 0xff, 0xff, 0xff, 0xdf, 0, 0, 0, 0, 0, 0, 0, 0x20];
    assert_eq!(count(&window), 1);
    // A fixed range of memory, and the ports.
    assert_eq!(count(&[0x86, 9, 0, 1, 0, 0, 0, 0xe0, 0, 0, 0x10, 0]), 1);
    assert_eq!(count(&[0x47, 1, 0xf8, 0xc, 0xf8, 0xc, 1, 8]), 1);
    let [.., without] = walk(&tables(2, false)).map(<[u8]>::to_vec);
    assert!(!without.windows(4).any(|window| window == b"PCI0"));
}

/// A running guest keeps the tables it booted with; a restarted one shall find the same. A difference here is a new
/// machine version, not a new golden file. (`xxd -r -p` and `iasl -d` make the file readable.)
#[test]
fn bytes_are_those_that_were_shipped() {
    let hex = |pci| -> String {
        let line = |line: &[u8]| line.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n";
        tables(2, pci).chunks(32).map(line).collect()
    };
    let (without, with) = (hex(false), hex(true));
    assert_eq!(without, include_str!("tables-2-vcpus.hex"), "\n{without}");
    assert_eq!(with, include_str!("tables-2-vcpus-pci.hex"), "\n{with}");
}
