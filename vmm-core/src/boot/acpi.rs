//! The ACPI tables: how the kernel finds its processors, interrupt controllers, serial line and power switch.
//!
//! The platform is hardware-reduced ACPI: no SCI, no PM timer, no fixed events, no FACS; Linux then leaves PIC and PIT
//! alone and routes everything through the I/O APIC, so that a device's interrupt must be named in its `_CRS`. The
//! bytes depend on the number of vCPUs and on whether there is a PCI bus, and a change to them changes guest-visible
//! hardware. The
//! truth is the ACPI specification 6.5.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::error::BootError;
use super::layout::{ACPI_AREA, IOAPIC, LAPIC};
use super::reset_vector;
use crate::pci::{CONFIG_PORTS, ECAM, WINDOW};
use crate::platform::{RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, SLEEP_TYPE_OFF};
use crate::serial::{COM1_IRQ, COM1_LEN, COM1_PORT};

const OEM_ID: [u8; 6] = *b"CPRVMM";
const OEM_TABLE_ID: [u8; 8] = *b"CPRVMM  ";
const OEM_REVISION: u32 = 1;

/// `IAPC_BOOT_ARCH` (ACPI 6.5, table 5.11): devices on the ISA bus, no VGA, no CMOS clock, and, its bit being clear,
/// no 8042 to probe.
const LEGACY_DEVICES: u16 = 1 << 0;
const VGA_NOT_PRESENT: u16 = 1 << 2;
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

/// MADT flag: there is a pair of 8259 as well, to be masked.
const PCAT_COMPAT: u32 = 1 << 0;
const MADT_REVISION: u8 = 5;
const DSDT_REVISION: u8 = 2;
const SDT_HEADER_SIZE: usize = 36;

/// Writes the tables to [`ACPI_AREA`] and returns the address of the RSDP. `pci`: there is a PCI bus.
///
/// # Panics
/// If the tables of `vcpus` processors exceed the area; those of [`super::layout::MAX_VCPUS`] take a tenth of it.
pub fn write(ram: &GuestMemoryMmap, vcpus: usize, pci: bool) -> Result<GuestAddress, BootError> {
    let bytes = tables(vcpus, pci);
    assert!(bytes.len() as u64 <= reset_vector::ADDRESS.0 - ACPI_AREA.start);
    let rsdp = GuestAddress(ACPI_AREA.start);
    ram.write_slice(&bytes, rsdp)?;
    Ok(rsdp)
}

/// All tables as they are from the start of [`ACPI_AREA`], the RSDP first.
fn tables(vcpus: usize, pci: bool) -> Vec<u8> {
    let mut area = Area { bytes: vec![0; Rsdp::len()] };
    let dsdt = area.add(&dsdt(vcpus, pci));
    let mut entries = vec![area.add(&fadt(dsdt)), area.add(&madt(vcpus))];
    if pci {
        entries.push(area.add(&mcfg()));
    }
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    entries.into_iter().for_each(|table| xsdt.add_entry(table));
    let xsdt = area.add(&xsdt);

    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    area.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    area.bytes
}

/// The tables placed so far.
struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Appends a table, aligned for the reader's comfort, and returns its guest-physical address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let address = ACPI_AREA.start + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(signature, SDT_HEADER_SIZE as u32, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(body);
    table
}

/// Fixed hardware: how to switch off and how to reset.
fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Set means that there is no such button.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (LEGACY_DEVICES | VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT).into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.finalize()
}

/// Processors and interrupt controllers.
fn madt(vcpus: usize) -> Sdt {
    let mut body = Vec::new();
    body.extend(LAPIC.to_le_bytes());
    body.extend(PCAT_COMPAT.to_le_bytes());
    for id in ids(vcpus) {
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut body);
    }
    IoApic::new(0, IOAPIC, 0).to_aml_bytes(&mut body);
    body.extend(irq_override(COM1_IRQ as u8, COM1_IRQ));
    body.extend(local_nmi());
    table(*b"APIC", MADT_REVISION, &body)
}

/// Interrupt Source Override (ACPI 6.5, 5.2.12.5): ISA interrupt `irq` is `gsi`, edge, active high.
///
/// Only the serial line has one, and it changes nothing: it says aloud what holds for ISA anyway. The PIT has none, as
/// KVM's own routing wires it to pin 0 of the I/O APIC and not, as PCs do, to pin 2.
fn irq_override(irq: u8, gsi: u32) -> [u8; 10] {
    const ISA_BUS: u8 = 0;
    const EDGE_ACTIVE_HIGH: u8 = 0b0101;
    let [a, b, c, d] = gsi.to_le_bytes();
    [2, 10, ISA_BUS, irq, a, b, c, d, EDGE_ACTIVE_HIGH, 0]
}

/// Local APIC NMI (ACPI 6.5, 5.2.12.7): LINT1 of every processor, as on a PC.
fn local_nmi() -> [u8; 6] {
    const ALL_PROCESSORS: u8 = 0xff;
    [4, 6, ALL_PROCESSORS, 0, 0, 1]
}

/// Where PCI's configuration space is: of bus 0, which is all there is.
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM.start, 0, 0, 0);
    mcfg
}

/// Devices that cannot be found otherwise.
fn dsdt(vcpus: usize, pci: bool) -> Sdt {
    let mut body = Vec::new();
    let off = [SLEEP_TYPE_OFF, 0, 0, 0];
    Name::new("_S5_".into(), &Package::new(off.iter().map(|value| value as &dyn Aml).collect()))
        .to_aml_bytes(&mut body);
    let processors: Vec<_> = ids(vcpus).map(Processor).collect();
    let mut devices: Vec<&dyn Aml> = vec![&Com1];
    if pci {
        devices.extend([&PciRoot as &dyn Aml, &Motherboard]);
    }
    devices.extend(processors.iter().map(|processor| processor as &dyn Aml));
    Scope::new("_SB_".into(), devices).to_aml_bytes(&mut body);
    table(*b"DSDT", DSDT_REVISION, &body)
}

fn ids(vcpus: usize) -> impl Iterator<Item = u8> {
    (0..=u8::MAX).take(vcpus)
}

struct Com1;

impl Aml for Com1 {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &1u8),
                &Name::new("_DDN".into(), &"COM1"),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &IO::new(COM1_PORT, COM1_PORT, 1, COM1_LEN as u8),
                        &Interrupt::new(true, true, false, false, COM1_IRQ),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The root of the PCI bus: its configuration ports, and where its devices may be.
struct PciRoot;

impl Aml for PciRoot {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (ports, ports_len) = (CONFIG_PORTS.start, (CONFIG_PORTS.end - CONFIG_PORTS.start) as u8);
        Device::new(
            "PCI0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_SEG".into(), &0u8),
                &Name::new("_BBN".into(), &0u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &AddressSpace::new_bus_number(0u16, 0u16),
                        &IO::new(ports, ports, 1, ports_len),
                        &AddressSpace::new_memory(
                            AddressSpaceCacheable::NotCacheable,
                            true,
                            WINDOW.start as u32,
                            (WINDOW.end - 1) as u32,
                            None,
                        ),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Addresses that belong to the board: without it Linux does not believe in the configuration space of the MCFG.
struct Motherboard;

impl Aml for Motherboard {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let ecam = Memory32Fixed::new(true, ECAM.start as u32, (ECAM.end - ECAM.start) as u32);
        Device::new(
            "MBRD".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// A processor; its `_UID` is that of its entry in the MADT.
struct Processor(u8);

impl Aml for Processor {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            format!("C{:03X}", self.0).as_str().into(),
            vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &self.0)],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests;
