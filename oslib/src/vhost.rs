#![allow(unsafe_code, reason = "the ioctls of vhost take pointers, and give the kernel memory to work on")]
//! `/dev/vhost-net`: a kernel thread that serves the two queues of a network card, between guest memory and a tap.
//!
//! An open file of it belongs to the process that has [claimed](Vhost::claim) it, more precisely to that process's address
//! space, and the thread is one of that process. A process that goes on with such a file of another has to wait until that one
//! has [released](Vhost::release) it. Whatever happens, the indices of the rings are the only state; the rings themselves are
//! in guest memory. The kernel's `linux/vhost.h` and `drivers/vhost/` are the source of truth.

use std::ffi::c_int;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::stat::{SFlag, fstat, major, minor};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::eventfd::EventFd;

const DEVICE: &str = "/dev/vhost-net";
/// Its number (`VHOST_NET_MINOR` of linux/miscdevice.h), the same everywhere.
const DEVICE_NUMBER: (u64, u64) = (10, 238);

/// Queues of one open file: the one for receiving, then the one for sending.
pub const QUEUES: usize = 2;

/// The most pieces that guest memory may be in. The kernel takes more (`max_mem_regions`).
const MAX_REGIONS: usize = 8;

/// `struct vhost_vring_state`.
#[repr(C)]
struct RingState {
    index: u32,
    number: u32,
}

/// `struct vhost_vring_file`. A descriptor of -1 is none.
#[repr(C)]
struct RingFile {
    index: u32,
    fd: c_int,
}

/// `struct vhost_vring_addr`, with addresses of this process.
#[repr(C)]
struct RingAddresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// `struct vhost_memory_region`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Region {
    guest: u64,
    len: u64,
    here: u64,
    flags: u64,
}

/// `struct vhost_memory`, with room for its regions.
#[repr(C)]
struct MemoryTable {
    count: u32,
    padding: u32,
    regions: [Region; MAX_REGIONS],
}

mod request {
    use super::{MemoryTable, RingAddresses, RingFile, RingState};

    /// `VHOST_VIRTIO`.
    const VHOST: u8 = 0xaf;
    /// Of `struct vhost_memory` without its regions, by which the call has its number.
    const MEMORY_HEADER_LEN: usize = 8;

    nix::ioctl_read!(get_features, VHOST, 0x00, u64);
    nix::ioctl_write_ptr!(set_features, VHOST, 0x00, u64);
    nix::ioctl_none!(set_owner, VHOST, 0x01);
    nix::ioctl_none!(reset_owner, VHOST, 0x02);
    nix::ioctl_write_ptr_bad!(
        set_mem_table,
        nix::request_code_write!(VHOST, 0x03, MEMORY_HEADER_LEN),
        MemoryTable
    );
    nix::ioctl_write_ptr!(set_vring_num, VHOST, 0x10, RingState);
    nix::ioctl_write_ptr!(set_vring_addr, VHOST, 0x11, RingAddresses);
    nix::ioctl_write_ptr!(set_vring_base, VHOST, 0x12, RingState);
    nix::ioctl_readwrite!(get_vring_base, VHOST, 0x12, RingState);
    nix::ioctl_write_ptr!(set_vring_kick, VHOST, 0x20, RingFile);
    nix::ioctl_write_ptr!(set_vring_call, VHOST, 0x21, RingFile);
    nix::ioctl_write_ptr!(set_vring_err, VHOST, 0x22, RingFile);
    nix::ioctl_write_ptr!(net_set_backend, VHOST, 0x30, RingFile);
}

/// Why the kernel does not serve queues.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VhostError {
    /// The kernel has no vhost-net, or it is out of reach.
    #[error(
        "{DEVICE} cannot be opened: load the module 'vhost_net', give the container that device, pass an open one by \
         vhostfd=, or say vhost=off"
    )]
    Device {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The descriptor is of something else.
    #[error("the descriptor is not one of {DEVICE}")]
    NotVhost,
    /// Another process has claimed the same open file.
    #[error("this open file of {DEVICE} is in use by another program: pass one of its own to each")]
    InUse,
    /// Guest memory is in too many pieces.
    #[error("guest memory is in {found} pieces, {DEVICE} is given {MAX_REGIONS} at most")]
    Memory {
        /// How many there are.
        found: usize,
    },
    /// A ring is not in guest memory.
    #[error("a ring is not in guest memory")]
    Ring(#[source] GuestMemoryError),
    /// A call was refused.
    #[error("{call} failed for {DEVICE}")]
    Call {
        /// The ioctl.
        call: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A queue as the driver has set it up, and what the kernel needs to serve it.
#[derive(Debug)]
pub struct Ring<'a> {
    /// Entries.
    pub size: u16,
    /// The table of descriptors.
    pub descriptors: GuestAddress,
    /// The available ring.
    pub available: GuestAddress,
    /// The used ring. Its index is where the kernel goes on.
    pub used: GuestAddress,
    /// Index of the next available entry to take.
    pub next_available: u16,
    /// Signalled when there is something in the queue. It is listened to, and never read.
    pub kick: &'a EventFd,
    /// What the kernel signals when the driver wants to be interrupted.
    pub call: &'a EventFd,
    /// What the kernel signals when it cannot make sense of the queue.
    pub error: &'a EventFd,
    /// The tap.
    pub link: BorrowedFd<'a>,
}

/// An open file of `/dev/vhost-net`.
#[derive(Debug)]
pub struct Vhost {
    fd: Arc<OwnedFd>,
    /// What the kernel may access: mapped for as long as this process has claimed the file.
    memory: Option<GuestMemoryMmap>,
}

impl Vhost {
    /// Opens one. The descriptor is close-on-exec.
    ///
    /// # Errors
    /// [`VhostError::Device`].
    pub fn open() -> Result<Self, VhostError> {
        let device = OpenOptions::new().read(true).write(true).open(DEVICE);
        let device = device.map_err(|source| VhostError::Device { source })?;
        Ok(Self { fd: Arc::new(device.into()), memory: None })
    }

    /// Takes one that another program has opened. Changes nothing: somebody may be using it.
    ///
    /// # Errors
    /// [`VhostError::NotVhost`].
    pub fn adopt(fd: Arc<OwnedFd>) -> Result<Self, VhostError> {
        let found = fstat(&fd).map_err(|errno| VhostError::Call { call: "fstat", source: errno.into() })?;
        let is_device = SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFCHR;
        match is_device && (major(found.st_rdev), minor(found.st_rdev)) == DEVICE_NUMBER {
            true => Ok(Self { fd, memory: None }),
            false => Err(VhostError::NotVhost),
        }
    }

    /// The descriptor, for whoever hands it over.
    pub fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// The features of virtio that it has, as bits.
    ///
    /// # Errors
    /// [`VhostError::Call`].
    pub fn features(&self) -> Result<u64, VhostError> {
        let mut features = 0;
        // SAFETY: the call writes one u64.
        call("VHOST_GET_FEATURES", unsafe { request::get_features(self.fd.as_raw_fd(), &mut features) })?;
        Ok(features)
    }

    /// Makes this process the one whose queues are served, in this memory, and starts the thread for it. The thread inherits
    /// scheduling and control groups from the caller.
    ///
    /// # Errors
    /// [`VhostError::InUse`], [`VhostError::Memory`], [`VhostError::Call`]; it is not claimed then.
    pub fn claim(&mut self, memory: &GuestMemoryMmap) -> Result<(), VhostError> {
        let table = table(memory)?;
        // SAFETY: the call takes no argument.
        match unsafe { request::set_owner(self.fd.as_raw_fd()) } {
            Err(Errno::EBUSY) => return Err(VhostError::InUse),
            answer => call("VHOST_SET_OWNER", answer)?,
        }
        // Before the kernel has it, and until it has it no more.
        self.memory = Some(memory.clone());
        // SAFETY: the call reads a header and as many regions as that says, which `table` has. What they describe stays
        // mapped, as `self.memory` keeps it; guest memory is bytes that others write at any time.
        let told =
            call("VHOST_SET_MEM_TABLE", unsafe { request::set_mem_table(self.fd.as_raw_fd(), &table) });
        told.inspect_err(|_| drop(self.release()))
    }

    /// Whether this process has claimed it.
    pub fn is_claimed(&self) -> bool {
        self.memory.is_some()
    }

    /// Ends the thread, after the queues if they are served, and leaves the open file to the next process that claims it. Does
    /// nothing if it is not claimed.
    ///
    /// # Errors
    /// [`VhostError::Call`]; it stays claimed then.
    pub fn release(&mut self) -> Result<(), VhostError> {
        if self.is_claimed() {
            // SAFETY: the call takes no argument.
            call("VHOST_RESET_OWNER", unsafe { request::reset_owner(self.fd.as_raw_fd()) })?;
            self.memory = None;
        }
        Ok(())
    }

    /// Says what was agreed on with the driver, out of [`features`](Self::features), while no queue is served. Forgotten with
    /// a release.
    ///
    /// # Errors
    /// [`VhostError::Call`].
    pub fn agree(&mut self, features: u64) -> Result<(), VhostError> {
        // SAFETY: the call reads one u64.
        call("VHOST_SET_FEATURES", unsafe { request::set_features(self.fd.as_raw_fd(), &features) })
    }

    /// Has the kernel serve queue `index`, below [`QUEUES`], which it does not serve yet. Nobody else may touch the rings
    /// until [`stop`](Self::stop).
    ///
    /// # Errors
    /// [`VhostError::Ring`], [`VhostError::Call`]; the queue is not served then.
    pub fn start(&mut self, index: usize, ring: &Ring<'_>) -> Result<(), VhostError> {
        let fd = self.fd.as_raw_fd();
        let state = |number: u16| RingState { index: index as u32, number: number.into() };
        let file = |fd: c_int| RingFile { index: index as u32, fd };
        let addresses = self.addresses(index, ring)?;
        // SAFETY: each call reads one structure, which is as the kernel has it. The addresses are in memory that
        // `self.memory` keeps mapped and that nobody has a reference to. Of descriptors the kernel takes references.
        unsafe {
            call("VHOST_SET_VRING_NUM", request::set_vring_num(fd, &state(ring.size)))?;
            call("VHOST_SET_VRING_BASE", request::set_vring_base(fd, &state(ring.next_available)))?;
            call("VHOST_SET_VRING_ADDR", request::set_vring_addr(fd, &addresses))?;
            call("VHOST_SET_VRING_KICK", request::set_vring_kick(fd, &file(ring.kick.as_raw_fd())))?;
            call("VHOST_SET_VRING_CALL", request::set_vring_call(fd, &file(ring.call.as_raw_fd())))?;
            call("VHOST_SET_VRING_ERR", request::set_vring_err(fd, &file(ring.error.as_raw_fd())))?;
            call("VHOST_NET_SET_BACKEND", request::net_set_backend(fd, &file(ring.link.as_raw_fd())))
        }
    }

    /// Has the kernel serve queue `index` no more; returns the index of the next available entry to take. Nothing of the queue
    /// is under way when this returns, and packets that were read ahead are back in the tap's queue.
    ///
    /// # Errors
    /// [`VhostError::Call`].
    pub fn stop(&mut self, index: usize) -> Result<u16, VhostError> {
        let fd = self.fd.as_raw_fd();
        let none = RingFile { index: index as u32, fd: -1 };
        let mut state = RingState { index: index as u32, number: 0 };
        // SAFETY: the calls read and write one structure each, which is as the kernel has it.
        unsafe {
            call("VHOST_NET_SET_BACKEND", request::net_set_backend(fd, &none))?;
            call("VHOST_GET_VRING_BASE", request::get_vring_base(fd, &mut state))?;
        }
        // The indices of a split ring are 16 bits wide.
        Ok(state.number as u16)
    }

    fn addresses(&self, index: usize, ring: &Ring<'_>) -> Result<RingAddresses, VhostError> {
        let size = usize::from(ring.size);
        let here = |start, len| {
            let memory = self.memory.as_ref().ok_or(GuestMemoryError::InvalidGuestAddress(start));
            let piece = memory.and_then(|memory| memory.get_slice(start, len)).map_err(VhostError::Ring)?;
            Ok::<u64, VhostError>(piece.ptr_guard().as_ptr() as u64)
        };
        // Virtio 1.2, 2.7.
        Ok(RingAddresses {
            index: index as u32,
            flags: 0,
            descriptors: here(ring.descriptors, 16 * size)?,
            used: here(ring.used, 6 + 8 * size)?,
            available: here(ring.available, 6 + 2 * size)?,
            log: 0,
        })
    }
}

impl Drop for Vhost {
    /// Others may have the same open file, so the kernel is told that this memory is not its any more.
    fn drop(&mut self) {
        // What fails leaves the thread with addresses that it reports as bad.
        let _ = self.release();
    }
}

fn table(memory: &GuestMemoryMmap) -> Result<MemoryTable, VhostError> {
    let found = memory.num_regions();
    if found > MAX_REGIONS {
        return Err(VhostError::Memory { found });
    }
    let mut table =
        MemoryTable { count: found as u32, padding: 0, regions: [Region::default(); MAX_REGIONS] };
    let region = |region: &GuestRegionMmap| Region {
        guest: region.start_addr().0,
        len: region.len(),
        here: region.as_ptr() as u64,
        flags: 0,
    };
    table.regions.iter_mut().zip(memory.iter()).for_each(|(entry, found)| *entry = region(found));
    Ok(table)
}

fn call(call: &'static str, answer: nix::Result<c_int>) -> Result<(), VhostError> {
    answer.map(drop).map_err(|errno| VhostError::Call { call, source: errno.into() })
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn something_else_is_not_taken() {
        for path in ["/dev/null", "/proc/self/exe", "/"] {
            let fd = Arc::new(OwnedFd::from(File::open(path).unwrap()));
            let error = Vhost::adopt(fd).unwrap_err();
            assert_eq!(error.to_string(), "the descriptor is not one of /dev/vhost-net", "{path}");
        }
    }

    #[test]
    fn memory_is_told_as_it_is_mapped() {
        let of = |pieces: &[(u64, usize)]| {
            let pieces: Vec<_> = pieces.iter().map(|&(start, len)| (GuestAddress(start), len)).collect();
            GuestMemoryMmap::from_ranges(&pieces).unwrap()
        };
        let memory = of(&[(0, 0x3000), (0x1_0000_0000, 0x1000)]);
        let told = table(&memory).unwrap();
        assert_eq!(told.count, 2);
        assert_eq!([told.regions[0].guest, told.regions[1].guest], [0, 0x1_0000_0000]);
        assert_eq!([told.regions[0].len, told.regions[1].len], [0x3000, 0x1000]);
        for region in &told.regions[..2] {
            let here = memory.get_host_address(GuestAddress(region.guest)).unwrap();
            assert_eq!(region.here, here as u64);
        }
        let scattered: Vec<_> = (0..9).map(|at| (at * 0x2000, 0x1000)).collect();
        let error = table(&of(&scattered)).err().unwrap();
        assert_eq!(error.to_string(), "guest memory is in 9 pieces, /dev/vhost-net is given 8 at most");
    }
}
