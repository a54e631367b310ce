//! The bzImage, a Linux kernel that unpacks itself, entered at its 64-bit entry point.
//!
//! linux-loader copies the protected-mode part; this module checks the setup header first, since linux-loader also
//! takes kernels without a 64-bit entry and files cut short. It refuses boot protocols before 2.12, which cannot say
//! whether they have that entry. The header is described in Linux' `Documentation/arch/x86/boot.rst`.

use std::io::{Read, Seek};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{Address, ByteValued, GuestAddress, GuestMemoryMmap, ReadVolatile};

use super::error::KernelError;
use super::image::Image;
use super::layout::{CMDLINE_ROOM, HIGH_START};
use super::{Placement, Protocol};

const HEADER_OFFSET: u64 = 0x1f1;
/// The header ends as many bytes behind this offset as the byte before it says.
const JUMP_TARGET_BASE: usize = 0x202;
const PROTOCOL_MIN: u16 = 0x020c;
const LOADED_HIGH: u8 = 1 << 0;
const XLF_KERNEL_64: u16 = 1 << 0;
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
/// The 64-bit entry point, from where the protected-mode part was loaded.
const ENTRY_64_OFFSET: u64 = 0x200;

/// Reads and checks the setup header; nothing is loaded. The header is returned as `boot_params` wants it.
pub(super) fn place<F: Read + ReadVolatile + Seek>(
    image: &mut Image<F>,
    low_end: u64,
) -> Result<(Placement, setup_header), KernelError> {
    let header = read_header(image)?;
    check_kind(&header)?;

    let setup_size = 512 * (1 + if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) });
    image.must_reach(setup_size, u64::from(header.syssize) * 16)?;
    let kernel_size = image.len - setup_size;
    if kernel_size <= ENTRY_64_OFFSET {
        return Err(KernelError::BrokenBzImage { what: "there is nothing behind the setup code" });
    }

    // Where the kernel prefers to run is also where one that cannot be relocated must be.
    let load = header.pref_address;
    if load < HIGH_START {
        return Err(KernelError::TooLow { start: load });
    }
    let end = load.saturating_add(kernel_size.max(header.init_size.into()));
    if end > low_end {
        return Err(KernelError::TooLarge { end, ram_end: low_end });
    }

    // A kernel that may itself be above 4 GiB reads its initrd from anywhere; initrd_addr_max binds older ones.
    let initrd_limit = if header.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0 {
        low_end
    } else {
        low_end.min(u64::from(header.initrd_addr_max) + 1)
    };
    let placement = Placement {
        protocol: Protocol::Linux64,
        entry: GuestAddress(load + ENTRY_64_OFFSET),
        end,
        initrd_limit,
        cmdline_max: (header.cmdline_size as usize).min(CMDLINE_ROOM - 1),
    };
    Ok((placement, header))
}

/// Copies the protected-mode part of an image that [`place`] has accepted.
pub(super) fn load<F: Read + ReadVolatile + Seek>(
    ram: &GuestMemoryMmap,
    image: &mut Image<F>,
    entry: GuestAddress,
) -> Result<(), KernelError> {
    let load = GuestAddress(entry.raw_value() - ENTRY_64_OFFSET);
    BzImage::load(ram, Some(load), &mut image.source, None).map(|_| ()).map_err(KernelError::Load)
}

fn read_header<F: Read + ReadVolatile + Seek>(image: &mut Image<F>) -> Result<setup_header, KernelError> {
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    image.read_at(HEADER_OFFSET, bytes)?;
    // What follows the header of this protocol version is code; boot_params must have zeros there.
    let jump_offset = JUMP_TARGET_BASE - 1 - HEADER_OFFSET as usize;
    let header_len = (jump_offset + 1 + usize::from(bytes[jump_offset])).min(bytes.len());
    bytes[header_len..].fill(0);
    Ok(header)
}

fn check_kind(header: &setup_header) -> Result<(), KernelError> {
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(KernelError::ZImage);
    }
    if header.version < PROTOCOL_MIN {
        let [major, minor] = header.version.to_be_bytes();
        return Err(KernelError::OldBzImage { major, minor });
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::ThirtyTwoBit);
    }
    Ok(())
}
