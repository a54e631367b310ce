//! Puts a kernel into empty guest RAM and says in which state its first vCPU starts.
//!
//! It takes the place of firmware: kernel, initrd and command line are loaded, the memory map and the ACPI tables
//! are written, and [`Entry`] sets the registers. It accepts a 64-bit ELF kernel with a PVH note and a 64-bit
//! bzImage; every other file is refused by name, before one byte of RAM is written. It creates no vCPU, makes no
//! ioctl, and adds nothing to the command line. The truth is in Linux' `Documentation/arch/x86/boot.rst`, in Xen's
//! `docs/misc/pvh.pandoc` and `xen/include/public/arch-x86/hvm/start_info.h`, and in the ACPI specification 6.5.

pub mod acpi;
mod bzimage;
mod elf;
mod entry;
mod error;
mod image;
mod initrd;
pub mod layout;
mod linux64;
mod memory_map;
mod pvh;
mod reset_vector;

use std::io::{Cursor, Read, Seek};
use std::path::PathBuf;

use linux_loader::cmdline::Cmdline;
use linux_loader::loader::load_cmdline;
use vm_memory::{GuestAddress, GuestMemoryMmap, ReadVolatile};

pub use self::entry::{Entry, Protocol};
pub use self::error::{BootError, InitrdError, KernelError};
pub use self::memory_map::{E820Kind, E820Range, e820};

use self::image::{Format, Image};
use self::initrd::Initrd;

/// What to boot.
#[derive(Clone, Debug)]
pub struct BootRequest<'a> {
    /// The kernel, in either of the two formats; which one is found out by its magic.
    pub kernel: KernelImage<'a>,
    /// The initial RAM disk, if the kernel shall get one.
    pub initrd: Option<PathBuf>,
    /// The whole kernel command line, without a terminator: printable ASCII, at most what the kernel takes (2047
    /// characters for today's Linux). Space around it is dropped.
    pub cmdline: &'a str,
    /// How many vCPUs the machine has, 1 to [`layout::MAX_VCPUS`]; their APIC ids are `0..vcpus`.
    pub vcpus: usize,
    /// The machine has a PCI bus.
    pub pci: bool,
}

/// Where the kernel comes from.
#[derive(Clone, Debug)]
pub enum KernelImage<'a> {
    /// A file.
    Path(PathBuf),
    /// An image that the program carries within itself.
    BuiltIn {
        /// What error messages call it.
        name: &'a str,
        /// The same bytes that a file would hold.
        bytes: &'a [u8],
    },
}

/// Loads the kernel and all it needs to start, and returns the state in which the first vCPU enters it.
///
/// `ram` starts at address 0 and reads as zero, as it does after creation: a kernel's zero-initialised data is not
/// cleared again. Everything is checked first; RAM is written only when the request is known to fit, so that an
/// error (other than a file that changes or cannot be read while it is loaded) leaves it as it was.
///
/// Kernel, initrd and boot data are placed below 3 GiB, the ACPI tables at [`layout::ACPI_AREA`]. The other vCPUs
/// wait for the kernel's INIT and SIPI as KVM creates them, and are not this module's concern.
pub fn load(ram: &GuestMemoryMmap, request: &BootRequest<'_>) -> Result<Entry, BootError> {
    if !(1..=layout::MAX_VCPUS).contains(&request.vcpus) {
        return Err(BootError::Vcpus { vcpus: request.vcpus });
    }
    let low_end = memory_map::low_end(ram)?;
    let ranges = e820(ram, request.pci).len();
    if ranges > layout::MEMORY_MAP_MAX {
        return Err(BootError::RamPieces { ranges, max: layout::MEMORY_MAP_MAX });
    }
    match &request.kernel {
        KernelImage::Path(path) => {
            let (file, len) = image::open(path).map_err(|e| named(&path.display(), e))?;
            load_image(ram, low_end, Image::new(file, len), &path.display(), request)
        }
        KernelImage::BuiltIn { name, bytes } => {
            load_image(ram, low_end, Image::new(Cursor::new(*bytes), bytes.len() as u64), name, request)
        }
    }
}

/// What the two formats have in common once their headers are read: where the kernel goes and what it asks for.
struct Placement {
    protocol: Protocol,
    entry: GuestAddress,
    /// First address behind all memory that the kernel uses before it reads the memory map.
    end: u64,
    /// First address behind which no initrd may reach.
    initrd_limit: u64,
    /// Longest command line in bytes, without the terminator.
    cmdline_max: usize,
}

fn load_image<F: Read + ReadVolatile + Seek>(
    ram: &GuestMemoryMmap,
    low_end: u64,
    mut image: Image<F>,
    name: &dyn std::fmt::Display,
    request: &BootRequest<'_>,
) -> Result<Entry, BootError> {
    // Look at everything.
    let (placement, header) = match image.format().map_err(|e| named(name, e))? {
        Format::Elf => (elf::place(&mut image, low_end).map_err(|e| named(name, e))?, None),
        Format::BzImage => {
            let (placement, header) = bzimage::place(&mut image, low_end).map_err(|e| named(name, e))?;
            (placement, Some(header))
        }
    };
    let cmdline = check_cmdline(request.cmdline, placement.cmdline_max)?;
    let initrd = match &request.initrd {
        Some(path) => Some(Initrd::place(path, placement.end, placement.initrd_limit)?),
        None => None,
    };

    // Write everything.
    match header {
        None => elf::load(ram, &mut image),
        Some(_) => bzimage::load(ram, &mut image, placement.entry),
    }
    .map_err(|e| named(name, e))?;
    let initrd = initrd.map(|initrd| initrd.load(ram)).transpose()?;
    load_cmdline(ram, layout::CMDLINE, &cmdline).map_err(BootError::loader)?;
    let rsdp = acpi::write(ram, request.vcpus, request.pci)?;
    reset_vector::write(ram)?;
    entry::write_gdt(ram, placement.protocol)?;
    let info = match header {
        None => pvh::write_start_info(ram, initrd, rsdp, request.pci)?,
        Some(header) => {
            linux64::write_page_tables(ram)?;
            linux64::write_boot_params(ram, header, initrd, rsdp, request.pci)?
        }
    };
    Ok(Entry::new(placement.protocol, placement.entry, info))
}

fn named(file: &dyn std::fmt::Display, cause: KernelError) -> BootError {
    BootError::Kernel { file: file.to_string(), cause }
}

fn check_cmdline(text: &str, max: usize) -> Result<Cmdline, BootError> {
    if let Some(bad) = text.chars().find(|c| !matches!(c, ' '..='~')) {
        return Err(BootError::CommandLineText { bad });
    }
    let mut cmdline = Cmdline::new(max + 1).map_err(BootError::cmdline)?;
    match cmdline.insert_str(text) {
        Ok(()) => Ok(cmdline),
        Err(linux_loader::cmdline::Error::TooLarge) => {
            Err(BootError::CommandLineTooLong { len: text.trim().len(), max })
        }
        Err(e) => Err(BootError::cmdline(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_bounded_by_the_kernel_and_kept_word_for_word() {
        let line = "console=ttyS0 a=\"b -- c\" -- init arg";
        assert_eq!(check_cmdline(line, 100).unwrap().as_cstring().unwrap().to_str().unwrap(), line);
        assert!(check_cmdline("", 10).is_ok());
        assert!(check_cmdline(&"x".repeat(10), 10).is_ok());
        assert!(matches!(
            check_cmdline(&"x".repeat(11), 10),
            Err(BootError::CommandLineTooLong { len: 11, max: 10 })
        ));
        for bad in ["a\0b", "a\nb", "ä"] {
            assert!(matches!(check_cmdline(bad, 100), Err(BootError::CommandLineText { .. })), "{bad:?}");
        }
    }
}
