//! What a driver asks for: from a chain of descriptors to something that can be done.
//!
//! A chain has bytes that the device reads, then bytes that it writes; how they are cut into descriptors means nothing.
//! The first 16 are the header, the last one takes the status. A chain without these two, or one that is no chain, is a
//! ring that cannot be trusted; everything else is a request that fails.

use oslib::guest_io::{GuestBuffers, Source};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::config::MAX_RANGE_SECTORS;
use crate::block::SECTOR_LEN;
use crate::virtio::Broken;

/// Bytes of `struct virtio_blk_outhdr`, and of `struct virtio_blk_discard_write_zeroes`.
const HEADER_LEN: usize = 16;

/// The most bytes of one request. More than any driver asks for; what is under way cannot be stopped, so that it has to be
/// little enough to be waited for.
pub(super) const MAX_REQUEST_LEN: u64 = 64 << 20;

/// How a request ended, as its driver is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    Failed = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// The disk that is asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Disk<'a> {
    pub(super) sectors: u64,
    pub(super) read_only: bool,
    pub(super) serial: &'a str,
    /// What device and driver agreed on.
    pub(super) features: u64,
}

/// Something to be done with the image. Places and lengths are in bytes, and within the disk.
#[derive(Debug)]
pub(super) enum Action {
    /// It is done.
    Nothing,
    Read {
        offset: u64,
        into: GuestBuffers,
    },
    Write {
        offset: u64,
        from: Source,
    },
    Flush,
    Discard {
        offset: u64,
        len: u64,
    },
    WriteZeroes {
        offset: u64,
        len: u64,
        unmap: bool,
    },
}

impl Action {
    /// Bytes of the image that it reads or changes.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Nothing | Self::Flush => 0,
            Self::Read { into, .. } => into.len() as u64,
            Self::Write { from, .. } => from.len() as u64,
            Self::Discard { len, .. } | Self::WriteZeroes { len, .. } => *len,
        }
    }
}

type Range = (GuestAddress, usize);

/// A chain that can be answered.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) head: u16,
    /// Where the status goes.
    pub(super) status: GuestAddress,
    /// Bytes that the driver finds written, the status among them. As QEMU, all that there is room for.
    pub(super) written: u32,
    kind: u32,
    sector: u64,
    /// Data from the driver.
    readable: Vec<Range>,
    /// Room for data to the driver.
    writable: Vec<Range>,
}

impl Request {
    pub(super) fn parse(
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<Self, Broken> {
        let head = chain.head_index();
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        // Of a chain with nothing in it, the first descriptor is the one that is missing.
        let mut goes_on = true;
        for descriptor in chain {
            goes_on = descriptor.has_next();
            let ranges = match (descriptor.is_write_only(), writable.is_empty()) {
                (true, _) => &mut writable,
                (false, true) => &mut readable,
                (false, false) => {
                    return Err(Broken::new("a descriptor to be read follows one to be written"));
                }
            };
            ranges.push((descriptor.addr(), descriptor.len() as usize));
        }
        if goes_on {
            return Err(Broken::new(format_args!("the chain of descriptor {head} leads nowhere")));
        }
        let header: [u8; HEADER_LEN] =
            read_front(memory, &mut readable)?.ok_or_else(|| Broken::new("a request without a header"))?;
        // Chains are shorter than 4 GiB, as virtio-queue ends longer ones.
        let written = writable.iter().map(|(_, len)| *len as u32).sum();
        let status =
            pop_back(&mut writable).ok_or_else(|| Broken::new("a request without room for its status"))?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        Ok(Self {
            head,
            status,
            written,
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            sector: u64::from_le_bytes(sector),
            readable,
            writable,
        })
    }

    /// What is to be done, or how the request ends without it.
    pub(super) fn action(&self, memory: &GuestMemoryMmap, disk: Disk<'_>) -> Result<Action, Status> {
        let has = |feature: u32| disk.features & (1 << feature) != 0;
        match self.kind {
            VIRTIO_BLK_T_IN => self.read(memory, disk),
            VIRTIO_BLK_T_OUT => self.write(memory, disk),
            VIRTIO_BLK_T_FLUSH => Ok(Action::Flush),
            VIRTIO_BLK_T_GET_ID => self.tell_serial(memory, disk.serial),
            VIRTIO_BLK_T_DISCARD if has(VIRTIO_BLK_F_DISCARD) => {
                let (offset, len, flags) = self.range(memory, disk)?;
                if flags != 0 {
                    return Err(Status::Unsupported);
                }
                Ok(Action::Discard { offset, len })
            }
            VIRTIO_BLK_T_WRITE_ZEROES if has(VIRTIO_BLK_F_WRITE_ZEROES) => {
                let (offset, len, flags) = self.range(memory, disk)?;
                if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                    return Err(Status::Unsupported);
                }
                Ok(Action::WriteZeroes { offset, len, unmap: flags != 0 })
            }
            _ => Err(Status::Unsupported),
        }
    }

    fn read(&self, memory: &GuestMemoryMmap, disk: Disk<'_>) -> Result<Action, Status> {
        let into = buffers(memory, &self.writable)?;
        let offset = disk.offset(self.sector, into.len() as u64)?;
        Ok(if into.is_empty() { Action::Nothing } else { Action::Read { offset, into } })
    }

    fn write(&self, memory: &GuestMemoryMmap, disk: Disk<'_>) -> Result<Action, Status> {
        disk.check_writable()?;
        let from = buffers(memory, &self.readable)?;
        let offset = disk.offset(self.sector, from.len() as u64)?;
        Ok(if from.is_empty() { Action::Nothing } else { Action::Write { offset, from: from.into() } })
    }

    fn tell_serial(&self, memory: &GuestMemoryMmap, serial: &str) -> Result<Action, Status> {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        id[..serial.len()].copy_from_slice(serial.as_bytes());
        let mut rest = &id[..];
        for (start, len) in &self.writable {
            let (now, later) = rest.split_at(rest.len().min(*len));
            memory.write_slice(now, *start).map_err(|_| Status::Failed)?;
            rest = later;
        }
        Ok(Action::Nothing)
    }

    /// The one segment of a discard or write-zeroes request: first byte, bytes, flags.
    fn range(&self, memory: &GuestMemoryMmap, disk: Disk<'_>) -> Result<(u64, u64, u32), Status> {
        disk.check_writable()?;
        let mut readable = self.readable.clone();
        let segment = read_front::<HEADER_LEN>(memory, &mut readable).ok().flatten().ok_or(Status::Failed)?;
        if readable.iter().any(|(_, len)| *len > 0) {
            // More than one segment, which configuration space does not allow.
            return Err(Status::Unsupported);
        }
        let [sector @ .., s0, s1, s2, s3, f0, f1, f2, f3] = segment;
        let sectors = u32::from_le_bytes([s0, s1, s2, s3]);
        if sectors > MAX_RANGE_SECTORS {
            return Err(Status::Failed);
        }
        let len = u64::from(sectors) * SECTOR_LEN;
        let offset = disk.offset(u64::from_le_bytes(sector), len)?;
        Ok((offset, len, u32::from_le_bytes([f0, f1, f2, f3])))
    }
}

impl Disk<'_> {
    fn check_writable(self) -> Result<(), Status> {
        if self.read_only { Err(Status::Failed) } else { Ok(()) }
    }

    /// The first byte of `len` bytes from `sector` on, if they are whole sectors of the disk.
    fn offset(self, sector: u64, len: u64) -> Result<u64, Status> {
        let end = sector.checked_add(len / SECTOR_LEN).ok_or(Status::Failed)?;
        if !len.is_multiple_of(SECTOR_LEN) || end > self.sectors {
            return Err(Status::Failed);
        }
        sector.checked_mul(SECTOR_LEN).ok_or(Status::Failed)
    }
}

fn buffers(memory: &GuestMemoryMmap, ranges: &[Range]) -> Result<GuestBuffers, Status> {
    if ranges.iter().map(|(_, len)| *len as u64).sum::<u64>() > MAX_REQUEST_LEN {
        return Err(Status::Failed);
    }
    GuestBuffers::new(memory, ranges.iter().copied()).map_err(|_| Status::Failed)
}

/// Reads the first bytes of `ranges`, and leaves the others. None: there are not as many.
fn read_front<const N: usize>(
    memory: &GuestMemoryMmap,
    ranges: &mut Vec<Range>,
) -> Result<Option<[u8; N]>, Broken> {
    let mut bytes = [0; N];
    let (mut done, mut used) = (0, 0);
    for (start, len) in ranges.iter_mut() {
        let step = (N - done).min(*len);
        if step > 0 {
            memory.read_slice(&mut bytes[done..done + step], *start).map_err(Broken::new)?;
        }
        // Within the range, whose bytes are all in memory up to here.
        *start = GuestAddress(start.0 + step as u64);
        *len -= step;
        done += step;
        if done == N {
            break;
        }
        used += 1;
    }
    ranges.drain(..used);
    Ok((done == N).then_some(bytes))
}

/// Takes the last byte away.
fn pop_back(ranges: &mut Vec<Range>) -> Option<GuestAddress> {
    while let Some((start, len)) = ranges.last_mut() {
        if *len > 0 {
            *len -= 1;
            return start.0.checked_add(*len as u64).map(GuestAddress);
        }
        ranges.pop();
    }
    None
}
