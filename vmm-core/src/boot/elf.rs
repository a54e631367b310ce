//! The uncompressed ELF kernel, entered through its PVH note.
//!
//! linux-loader copies the segments; this module first checks what linux-loader takes on trust (word size, machine,
//! segments that leave RAM or cover the boot data, a note that is in none of the first segments) and finds the entry.
//! It refuses 32-bit ELF files. Formats: System V ABI chapter 4, and Xen's `xen/include/public/elfnote.h`.

use std::io::{Read, Seek};
use std::ops::Range;

use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{GuestAddress, GuestMemoryMmap, ReadVolatile};

use super::error::KernelError;
use super::image::Image;
use super::layout::HIGH_START;
use super::{Placement, Protocol};

const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EHDR_SIZE: usize = 64;
const PHDR_SIZE: usize = 56;

/// `XEN_ELFNOTE_PHYS32_ENTRY`: the note's content is the 32-bit entry point.
const PHYS32_ENTRY: u32 = 18;
const NOTE_HEADER_SIZE: usize = 12;
/// Linux has half a KiB of notes; more than this is no kernel.
const NOTES_MAX: u64 = 1 << 20;

/// Linux' `COMMAND_LINE_SIZE` on x86, without the terminator: PVH has no field that announces it.
const CMDLINE_MAX: usize = 2047;

struct Segment {
    kind: u32,
    offset: u64,
    file_size: u64,
    addr: u64,
    mem_size: u64,
}

/// Reads and checks the headers; nothing is loaded.
pub(super) fn place<F: Read + ReadVolatile + Seek>(
    image: &mut Image<F>,
    low_end: u64,
) -> Result<Placement, KernelError> {
    let segments = segments(image)?;
    let loaded = segments
        .iter()
        .filter(|segment| segment.kind == PT_LOAD && segment.mem_size > 0)
        .map(|segment| extent(segment, low_end))
        .collect::<Result<Vec<_>, _>>()?;
    let end = loaded.iter().map(|extent| extent.end).max().ok_or(broken("it loads nothing"))?;

    let entry = pvh_entry(image, &segments)?;
    if !loaded.iter().any(|extent| extent.contains(&entry)) {
        return Err(broken("the PVH entry is outside of all segments"));
    }
    Ok(Placement {
        protocol: Protocol::Pvh,
        entry: GuestAddress(entry),
        end,
        initrd_limit: low_end,
        cmdline_max: CMDLINE_MAX,
    })
}

/// Copies the segments of an image that [`place`] has accepted.
pub(super) fn load<F: Read + ReadVolatile + Seek>(
    ram: &GuestMemoryMmap,
    image: &mut Image<F>,
) -> Result<(), KernelError> {
    Elf::load(ram, None, &mut image.source, None).map(|_| ()).map_err(KernelError::Load)
}

fn segments<F: Read + ReadVolatile + Seek>(image: &mut Image<F>) -> Result<Vec<Segment>, KernelError> {
    let mut header = [0; EHDR_SIZE];
    image.read_at(0, &mut header)?;
    let wrong = |what: &str| KernelError::WrongElf { what: what.to_owned() };
    if header[5] != ELFDATA2LSB {
        return Err(wrong("big-endian"));
    }
    if header[4] != ELFCLASS64 {
        return Err(wrong("not 64-bit"));
    }
    let machine = u16_at(&header, 18);
    if machine != EM_X86_64 {
        return Err(wrong(&format!("for another processor (machine {machine}, x86-64 is {EM_X86_64})")));
    }
    let (table, entry_size, count) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if count == 0 {
        return Err(broken("it has no program headers (an object file?)"));
    }
    if usize::from(entry_size) != PHDR_SIZE || table < EHDR_SIZE as u64 {
        return Err(broken("its program header table is no 64-bit one"));
    }
    let mut headers = vec![0; usize::from(count) * PHDR_SIZE];
    image.read_at(table, &mut headers)?;
    Ok(headers
        .chunks_exact(PHDR_SIZE)
        .map(|header| Segment {
            kind: u32_at(header, 0),
            offset: u64_at(header, 8),
            addr: u64_at(header, 24),
            file_size: u64_at(header, 32),
            mem_size: u64_at(header, 40),
        })
        .collect())
}

/// The memory of a segment that is wholly in the file and wholly in RAM.
fn extent(segment: &Segment, low_end: u64) -> Result<Range<u64>, KernelError> {
    if segment.file_size > segment.mem_size {
        return Err(broken("a segment has more bytes in the file than in memory"));
    }
    if segment.addr < HIGH_START {
        return Err(KernelError::TooLow { start: segment.addr });
    }
    let end = segment.addr.saturating_add(segment.mem_size);
    if end > low_end {
        return Err(KernelError::TooLarge { end, ram_end: low_end });
    }
    Ok(segment.addr..end)
}

fn pvh_entry<F: Read + ReadVolatile + Seek>(
    image: &mut Image<F>,
    segments: &[Segment],
) -> Result<u64, KernelError> {
    for segment in segments {
        image.must_reach(segment.offset, segment.file_size)?;
    }
    for segment in segments.iter().filter(|segment| segment.kind == PT_NOTE) {
        if segment.file_size > NOTES_MAX {
            return Err(broken("its notes exceed 1 MiB"));
        }
        let mut notes = vec![0; segment.file_size as usize];
        image.read_at(segment.offset, &mut notes)?;
        if let Some(entry) = pvh_note(&notes)? {
            return Ok(entry.into());
        }
    }
    Err(KernelError::NoPvhNote)
}

fn pvh_note(mut notes: &[u8]) -> Result<Option<u32>, KernelError> {
    while notes.len() >= NOTE_HEADER_SIZE {
        let name_size = u32_at(notes, 0) as usize;
        let desc_size = u32_at(notes, 4) as usize;
        let desc_at = NOTE_HEADER_SIZE + name_size.next_multiple_of(4);
        let Some(desc) = notes.get(desc_at..desc_at + desc_size) else {
            return Err(broken("a note is longer than its segment"));
        };
        let name = &notes[NOTE_HEADER_SIZE..NOTE_HEADER_SIZE + name_size];
        if name == b"Xen\0" && u32_at(notes, 8) == PHYS32_ENTRY {
            return match desc {
                [a, b, c, d, ..] => Ok(Some(u32::from_le_bytes([*a, *b, *c, *d]))),
                _ => Err(broken("its PVH note holds no 32-bit address")),
            };
        }
        notes = notes.get(desc_at + desc_size.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(None)
}

fn broken(what: &'static str) -> KernelError {
    KernelError::BrokenElf { what }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
