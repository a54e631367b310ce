//! Guest RAM: where it comes from, whether it outlives the VMM, and where the guest sees it.
//!
//! A [`Backend`] is QEMU's memory backend object: a memfd, a file, or anonymous memory. [`GuestRam`] is a backend
//! mapped into this process and split around the hole below 4 GiB that devices live in. Neither ever touches a page:
//! a freshly mapped RAM costs no more than two `mmap` calls, however large it is. Whether the contents survive a
//! replacement of the VMM is a property of the backend ([`Backend::in_place_obstacle`]); who must ask is the mode.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oslib::memfd::{self, HugePage, Memfd};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

/// End of the RAM below the hole for devices: 3 GiB, where QEMU's `q35` and `microvm` end it as well.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Start of the RAM above the hole: 4 GiB.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// RAM comes in whole pages.
const PAGE_LEN: u64 = 4096;
/// How much is mapped ahead at a time, in bytes: some ten microseconds of work.
pub const POPULATE_PIECE: u64 = 256 << 10;

/// What backs guest RAM, in the terms of QEMU's `-object memory-backend-*`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackendKind {
    /// `memory-backend-memfd`.
    Memfd {
        /// `share=on`: writes go to the memfd. Off: they stay in this process, and end with it.
        share: bool,
        /// Bytes of a page of the hugetlb pool to take the memory from; `None` for ordinary pages.
        hugetlb: Option<u64>,
    },
    /// `memory-backend-file`.
    File {
        /// The file, created if absent.
        path: PathBuf,
        /// As for the memfd.
        share: bool,
    },
    /// `memory-backend-ram`. As in QEMU, `share=on` gives it a descriptor: it is then a memfd in all but name.
    Ram {
        /// As for the memfd.
        share: bool,
    },
}

impl BackendKind {
    fn share(&self) -> bool {
        match *self {
            Self::Memfd { share, .. } | Self::File { share, .. } | Self::Ram { share } => share,
        }
    }

    fn hugetlb(&self) -> Option<u64> {
        match *self {
            Self::Memfd { hugetlb, .. } => hugetlb,
            _ => None,
        }
    }
}

/// A memory backend as the user asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendConfig {
    /// Its `id=`, which also names the memfd in `/proc` and the region in messages.
    pub id: String,
    /// Bytes of RAM.
    pub size: u64,
    /// What it is made of.
    pub kind: BackendKind,
}

/// Guest RAM that cannot be had, or not this way.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// Memory could not be written.
    #[error("guest RAM cannot be cleared: {source}")]
    Clear {
        /// The cause.
        source: vm_memory::GuestMemoryError,
    },
    /// The size is zero or not made of whole pages.
    #[error("memory backend {id}: a size of {size} bytes is not a positive multiple of its page size {page}")]
    Size {
        /// The backend.
        id: String,
        /// Its size in bytes.
        size: u64,
        /// The page size in bytes.
        page: u64,
    },
    /// No huge pages of this size exist on x86.
    #[error("memory backend {id}: huge pages of {page} bytes do not exist; use 2M or 1G")]
    PageSize {
        /// The backend.
        id: String,
        /// The page size asked for in bytes.
        page: u64,
    },
    /// Huge pages could not be had.
    #[error(
        "memory backend {id}: no {count} free huge pages of {page_kib} KiB; reserve them with \
         `echo {count} > /sys/kernel/mm/hugepages/hugepages-{page_kib}kB/nr_hugepages`"
    )]
    HugePages {
        /// The backend.
        id: String,
        /// Pages needed.
        count: u64,
        /// KiB of one page.
        page_kib: u64,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The memfd could not be made.
    #[error("memory backend {id}: cannot create its memfd")]
    Create {
        /// The backend.
        id: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The file could not be opened or sized.
    #[error("memory backend {id}: cannot use {}", path.display())]
    Open {
        /// The backend.
        id: String,
        /// The file.
        path: PathBuf,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The file or descriptor exists with another size.
    #[error("memory backend {id}: {what} has {found} bytes, the configuration says {expected}")]
    OtherSize {
        /// The backend.
        id: String,
        /// The file or descriptor.
        what: String,
        /// Bytes asked for.
        expected: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// A descriptor that was handed over is not what the configuration says.
    #[error("memory backend {id}: the inherited descriptor {problem}")]
    Adopt {
        /// The backend.
        id: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A descriptor that was handed over could not be examined.
    #[error("memory backend {id}: cannot examine the inherited descriptor")]
    Examine {
        /// The backend.
        id: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The configuration is of a kind whose content does not stay anywhere.
    #[error(
        "memory backend {id}: the guest's memory stayed in a file, so it must be a memory-backend-file with share=on"
    )]
    NotKept {
        /// The backend.
        id: String,
    },
    /// The page tables could not be filled.
    #[error("guest RAM cannot be mapped ahead: {0}")]
    Populate(#[source] io::Error),
    /// The memory could not be mapped.
    #[error("memory backend {id}: cannot map it")]
    Map {
        /// The backend.
        id: String,
        /// Why.
        #[source]
        source: MmapRegionError,
    },
    /// vm-memory refused the layout; this is a defect of this crate.
    #[error("memory backend {id}: its regions overlap")]
    Layout {
        /// The backend.
        id: String,
    },
}

/// A memory backend: a configuration and, unless it is anonymous, the descriptor behind it.
#[derive(Debug, Clone)]
pub struct Backend {
    config: BackendConfig,
    file: Option<Arc<File>>,
}

impl Backend {
    /// Makes the memory. A memfd cannot change its size afterwards, nor be sealed against writing.
    ///
    /// # Errors
    /// See [`MemoryError`]. A file that exists must have the size asked for, or none.
    pub fn create(config: BackendConfig) -> Result<Self, MemoryError> {
        let huge_page = config.check()?;
        let file = match &config.kind {
            BackendKind::Ram { share: false } => None,
            BackendKind::Ram { share: true } | BackendKind::Memfd { .. } => {
                let mut memfd = Memfd::new(config.id.as_str()).len(config.size).seal_size().seal_seals();
                if let Some(page) = huge_page {
                    memfd = memfd.hugetlb(page);
                }
                let fd = memfd.create().map_err(|source| match huge_page {
                    Some(page) => config.no_huge_pages(page, source),
                    None => MemoryError::Create { id: config.id.clone(), source },
                })?;
                Some(File::from(fd))
            }
            BackendKind::File { path, .. } => Some(open_sized(&config, path)?),
        };
        Ok(Self { config, file: file.map(Arc::new) })
    }

    /// Takes memory that an earlier VMM made.
    ///
    /// # Errors
    /// [`MemoryError::OtherSize`] and [`MemoryError::Adopt`] when the descriptor is not what the configuration
    /// says, or when the configuration is of a kind whose contents cannot have survived.
    pub fn adopt(config: BackendConfig, fd: Arc<File>) -> Result<Self, MemoryError> {
        let huge_page = config.check()?;
        let backend = Self { config, file: Some(fd) };
        let config = &backend.config;
        let refuse = |problem: String| MemoryError::Adopt { id: config.id.clone(), problem };
        let examine = |source| MemoryError::Examine { id: config.id.clone(), source };
        if let Some(obstacle) = backend.in_place_obstacle() {
            return Err(refuse(format!("cannot hold the guest's memory: {obstacle}")));
        }
        let fd = backend.file.as_deref().expect("it was just put there");
        let metadata = fd.metadata().map_err(examine)?;
        if metadata.len() != config.size {
            return Err(MemoryError::OtherSize {
                id: config.id.clone(),
                what: "the inherited descriptor".to_owned(),
                expected: config.size,
                found: metadata.len(),
            });
        }
        if !matches!(config.kind, BackendKind::File { .. }) {
            if !memfd::is_memfd(fd).map_err(examine)? {
                return Err(refuse("is not a memfd".to_owned()));
            }
            // A memfd that could shrink under a running guest would kill the VMM by SIGBUS.
            memfd::seal_size(fd).map_err(|e| refuse(format!("cannot be kept from shrinking: {e}")))?;
            let expected = huge_page.map_or(PAGE_LEN, HugePage::bytes);
            if metadata.blksize() != expected {
                let found = metadata.blksize();
                return Err(refuse(format!("has pages of {found} bytes, not of {expected}")));
            }
        }
        Ok(backend)
    }

    /// Opens memory that an earlier VMM left in a file. Nothing is created, nor changed in length.
    ///
    /// # Errors
    /// [`MemoryError::Open`] if the file is missing, [`MemoryError::OtherSize`], and [`MemoryError::NotKept`].
    pub fn reopen(config: BackendConfig) -> Result<Self, MemoryError> {
        config.check()?;
        let BackendKind::File { path, share: true } = &config.kind else {
            return Err(MemoryError::NotKept { id: config.id });
        };
        let fail = |source| MemoryError::Open { id: config.id.clone(), path: path.to_owned(), source };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(fail)?;
        let found = file.metadata().map_err(fail)?.len();
        if found != config.size {
            let what = path.display().to_string();
            return Err(MemoryError::OtherSize { id: config.id, what, expected: config.size, found });
        }
        Ok(Self { config, file: Some(Arc::new(file)) })
    }

    /// Returns the file that the memory stays in when no process has it open any more; `None` if it does not, be it that
    /// the file has lost its name, or that the name is another file's by now.
    pub fn stays_at(&self) -> Option<PathBuf> {
        let BackendKind::File { path, share: true } = &self.config.kind else { return None };
        let (named, open) = (std::fs::metadata(path).ok()?, self.file.as_ref()?.metadata().ok()?);
        let same = (named.dev(), named.ino()) == (open.dev(), open.ino()) && open.nlink() > 0;
        same.then(|| std::path::absolute(path).unwrap_or_else(|_| path.clone()))
    }

    /// Returns what was asked for.
    pub fn config(&self) -> &BackendConfig {
        &self.config
    }

    /// Returns the descriptor behind the memory; `None` for anonymous memory.
    pub fn fd(&self) -> Option<&Arc<File>> {
        self.file.as_ref()
    }

    /// Tells why this memory would not survive if the VMM were replaced while it stays where it is; `None` if it
    /// would.
    pub fn in_place_obstacle(&self) -> Option<String> {
        let id = &self.config.id;
        if !self.config.kind.share() {
            return Some(format!(
                "Memory region {id} is not compatible with CPR. share=on is required for memory-backend objects"
            ));
        }
        self.file.is_none().then(|| {
            format!("Memory region {id} is not compatible with CPR. It has no file descriptor to hand over")
        })
    }
}

impl BackendConfig {
    fn check(&self) -> Result<Option<HugePage>, MemoryError> {
        let huge_page = match self.kind.hugetlb() {
            None => None,
            Some(page) => Some(
                [HugePage::Size2M, HugePage::Size1G]
                    .into_iter()
                    .find(|known| known.bytes() == page)
                    .ok_or_else(|| MemoryError::PageSize { id: self.id.clone(), page })?,
            ),
        };
        let page = huge_page.map_or(PAGE_LEN, HugePage::bytes);
        if self.size == 0 || !self.size.is_multiple_of(page) {
            return Err(MemoryError::Size { id: self.id.clone(), size: self.size, page });
        }
        Ok(huge_page)
    }

    fn no_huge_pages(&self, page: HugePage, source: io::Error) -> MemoryError {
        MemoryError::HugePages {
            id: self.id.clone(),
            count: self.size / page.bytes(),
            page_kib: page.bytes() / 1024,
            source,
        }
    }
}

fn open_sized(config: &BackendConfig, path: &Path) -> Result<File, MemoryError> {
    let fail = |source| MemoryError::Open { id: config.id.clone(), path: path.to_owned(), source };
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(fail)?;
    match file.metadata().map_err(fail)?.len() {
        0 => file.set_len(config.size).map_err(fail)?,
        len if len == config.size => {}
        found => {
            return Err(MemoryError::OtherSize {
                id: config.id.clone(),
                what: path.display().to_string(),
                expected: config.size,
                found,
            });
        }
    }
    Ok(file)
}

/// One contiguous piece of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// Its guest-physical address.
    pub gpa: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Where in the backend it starts, in bytes.
    pub file_offset: u64,
    /// Where this process maps it.
    pub host_addr: u64,
}

/// Guest RAM mapped into this process. Clones share the mapping.
#[derive(Debug, Clone)]
pub struct GuestRam {
    memory: GuestMemoryMmap,
    regions: Arc<[RamRegion]>,
}

impl GuestRam {
    /// Maps a backend: up to 3 GiB at address 0, the rest from 4 GiB on. Touches no page of it.
    ///
    /// # Errors
    /// The kernel's answer to `mmap`; [`MemoryError::HugePages`] when the pool has not enough pages.
    pub fn map(backend: &Backend) -> Result<Self, MemoryError> {
        let config = &backend.config;
        let layout_error = || MemoryError::Layout { id: config.id.clone() };
        let mut regions = Vec::new();
        let mut mapped = Vec::new();
        for (gpa, len, file_offset) in layout(config.size) {
            let mapping = map_region(backend, len, file_offset)?;
            regions.push(RamRegion { gpa, len, file_offset, host_addr: mapping.as_ptr() as u64 });
            mapped.push(GuestRegionMmap::new(mapping, GuestAddress(gpa)).ok_or_else(layout_error)?);
        }
        let memory = GuestMemoryMmap::from_regions(mapped).map_err(|_| layout_error())?;
        Ok(Self { memory, regions: regions.into() })
    }

    /// Maps every page that the memory has into this process, and none that it does not have yet: a hole would be allocated
    /// by that. For a process that is about to take over a guest, which would otherwise wait for each page once more.
    /// `go_on` is asked about every [`POPULATE_PIECE`] bytes, and ends it by `false`.
    ///
    /// Returns what was mapped, in guest-physical addresses. Memory that is private, or of huge pages, is left out: the one
    /// would be copied, and of the other the kernel does not tell what is there.
    ///
    /// # Errors
    /// [`MemoryError::Populate`]. Pages may be mapped by then, which does no harm.
    pub fn populate_existing(&self, go_on: &mut dyn FnMut() -> bool) -> Result<Vec<Range<u64>>, MemoryError> {
        let mut populated = Vec::new();
        for (region, mapping) in self.regions.iter().zip(self.memory.iter()) {
            let Some(file) = mapping.file_offset().filter(|_| mapping.flags() & libc::MAP_SHARED != 0) else {
                continue;
            };
            if file.file().metadata().map_err(MemoryError::Populate)?.blksize() > PAGE_LEN {
                continue;
            }
            for extent in memfd::extents(file.file()).map_err(MemoryError::Populate)? {
                let start = extent.start.max(region.file_offset) / PAGE_LEN * PAGE_LEN;
                let end = extent.end.min(region.file_offset + region.len).next_multiple_of(PAGE_LEN);
                let mut at = start;
                while at < end {
                    if !go_on() {
                        return Ok(populated);
                    }
                    let piece = at..end.min(at + POPULATE_PIECE);
                    let host = |offset: u64| (region.host_addr + offset - region.file_offset) as usize;
                    oslib::populate::populate(host(piece.start)..host(piece.end))
                        .map_err(MemoryError::Populate)?;
                    let gpa = |offset: u64| region.gpa + offset - region.file_offset;
                    populated.push(gpa(piece.start)..gpa(piece.end));
                    at = piece.end;
                }
            }
        }
        Ok(populated)
    }

    /// Makes all of it read as zeros again, as after creation. The vCPUs must be paused.
    ///
    /// # Errors
    /// [`MemoryError::Clear`] when the memory cannot be written.
    pub fn clear(&self) -> Result<(), MemoryError> {
        for region in self.memory.iter() {
            let len = region.len();
            // Freeing the pages is quicker by far, and gives the memory back; but only what is shared has just them.
            let shared = region.flags() & libc::MAP_SHARED != 0;
            let punched = region.file_offset().filter(|_| shared).is_some_and(|file| {
                oslib::memfd::punch_hole(file.file(), file.start()..file.start() + len).is_ok()
            });
            if !punched {
                let zeros = [0; 64 << 10];
                let mut at = 0;
                while at < len {
                    let count = zeros.len().min((len - at) as usize);
                    region
                        .write_slice(&zeros[..count], MemoryRegionAddress(at))
                        .map_err(|source| MemoryError::Clear { source })?;
                    at += count as u64;
                }
            }
        }
        Ok(())
    }

    /// Returns what of the backend may be other than zero, as ranges of offsets in it, in order and without overlaps. Of
    /// private memory nobody tells, so it is all of it.
    ///
    /// # Errors
    /// Those of lseek(2).
    pub fn extents(&self) -> io::Result<Vec<Range<u64>>> {
        let mut extents = Vec::new();
        for (region, mapping) in self.regions.iter().zip(self.memory.iter()) {
            let all = region.file_offset..region.file_offset + region.len;
            match mapping.file_offset().filter(|_| mapping.flags() & libc::MAP_SHARED != 0) {
                None => extents.push(all),
                Some(file) => extents.extend(
                    memfd::extents(file.file())?
                        .into_iter()
                        .map(|extent| extent.start.max(all.start)..extent.end.min(all.end))
                        .filter(|extent| !extent.is_empty()),
                ),
            }
        }
        Ok(extents)
    }

    /// Reads `buffer.len()` bytes from this offset of the backend on. Reading a hole of shared memory allocates it; see
    /// [`extents`](Self::extents).
    ///
    /// # Errors
    /// They are not all RAM.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let (at, room) = self.place(offset + done as u64)?;
            let piece = room.min(buffer.len() - done);
            self.memory.read_slice(&mut buffer[done..done + piece], at).map_err(io::Error::other)?;
            done += piece;
        }
        Ok(())
    }

    /// Writes these bytes from this offset of the backend on.
    ///
    /// # Errors
    /// They are not all RAM.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let (at, room) = self.place(offset + done as u64)?;
            let piece = room.min(bytes.len() - done);
            self.memory.write_slice(&bytes[done..done + piece], at).map_err(io::Error::other)?;
            done += piece;
        }
        Ok(())
    }

    /// Where this offset of the backend is, and how many bytes follow in the same piece.
    fn place(&self, offset: u64) -> io::Result<(GuestAddress, usize)> {
        let region = self.regions.iter().find(|r| (r.file_offset..r.file_offset + r.len).contains(&offset));
        let region =
            region.ok_or_else(|| io::Error::other(format!("there is no RAM at offset {offset:#x}")))?;
        let within = offset - region.file_offset;
        Ok((GuestAddress(region.gpa + within), (region.len - within) as usize))
    }

    /// Returns the pieces in the order of their addresses.
    pub fn regions(&self) -> Vec<RamRegion> {
        self.regions.to_vec()
    }

    /// Returns the memory for checked access by guest-physical address.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Returns the bytes of RAM.
    pub fn len(&self) -> u64 {
        self.regions.iter().map(|r| r.len).sum()
    }

    /// Tells whether there is no RAM at all, which no backend allows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Splits `size` bytes of RAM around the hole: (guest-physical address, length, offset in the backend).
fn layout(size: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let low = size.min(LOW_RAM_END);
    [(0, low, 0), (HIGH_RAM_START, size - low, low)].into_iter().filter(|&(_, len, _)| len > 0)
}

fn map_region(backend: &Backend, len: u64, file_offset: u64) -> Result<vm_memory::MmapRegion, MemoryError> {
    let config = &backend.config;
    let sharing = if config.kind.share() { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    // The huge page pool is accounted at mmap, so that a lack of pages is an error here and not SIGBUS later.
    let reserving = if config.kind.hugetlb().is_some() { 0 } else { libc::MAP_NORESERVE };
    let mut builder = MmapRegionBuilder::new(len as usize).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    builder = match &backend.file {
        Some(file) => builder
            .with_mmap_flags(sharing | reserving)
            .with_file_offset(FileOffset::from_arc(Arc::clone(file), file_offset))
            .with_hugetlbfs(config.kind.hugetlb().is_some()),
        None => builder.with_mmap_flags(libc::MAP_ANONYMOUS | sharing | reserving),
    };
    builder.build().map_err(|source| match (source, config.check()) {
        (MmapRegionError::Mmap(source), Ok(Some(page))) if source.raw_os_error() == Some(libc::ENOMEM) => {
            config.no_huge_pages(page, source)
        }
        (source, _) => MemoryError::Map { id: config.id.clone(), source },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    const MIB: u64 = 1 << 20;

    fn config(size: u64, kind: BackendKind) -> BackendConfig {
        BackendConfig { id: "ram0".to_owned(), size, kind }
    }

    fn memfd_kind() -> BackendKind {
        BackendKind::Memfd { share: true, hugetlb: None }
    }

    #[test]
    fn ram_is_split_around_the_hole() {
        let low_only: Vec<_> = layout(256 * MIB).collect();
        assert_eq!(low_only, [(0, 256 * MIB, 0)]);
        let exactly: Vec<_> = layout(LOW_RAM_END).collect();
        assert_eq!(exactly, [(0, LOW_RAM_END, 0)]);
        let both: Vec<_> = layout(8192 * MIB).collect();
        assert_eq!(both, [(0, LOW_RAM_END, 0), (HIGH_RAM_START, 5120 * MIB, LOW_RAM_END)]);
    }

    #[test]
    fn a_file_is_opened_again_and_never_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        let kind = |share| BackendKind::File { path: path.clone(), share };
        let missing = Backend::reopen(config(MIB, kind(true))).unwrap_err();
        assert!(matches!(missing, MemoryError::Open { .. }) && !path.exists(), "{missing}");
        let backend = Backend::create(config(MIB, kind(true))).unwrap();
        assert_eq!(backend.stays_at(), Some(path.clone()));
        Backend::reopen(config(MIB, kind(true))).unwrap();
        let other = Backend::reopen(config(2 * MIB, kind(true))).unwrap_err();
        assert!(matches!(other, MemoryError::OtherSize { found: MIB, .. }), "{other}");
        Backend::reopen(config(MIB, kind(false))).unwrap_err();
        Backend::reopen(config(MIB, memfd_kind())).unwrap_err();
        // A name that is another file's, or nobody's, is not where the memory stays.
        std::fs::rename(&path, dir.path().join("elsewhere")).unwrap();
        assert_eq!(backend.stays_at(), None);
        std::fs::write(&path, "another").unwrap();
        assert_eq!(backend.stays_at(), None);
        assert_eq!(Backend::create(config(MIB, memfd_kind())).unwrap().stays_at(), None);
    }

    #[test]
    fn ram_is_read_and_written_by_offset_across_the_hole() {
        let size = LOW_RAM_END + 4 * MIB;
        let ram = GuestRam::map(&Backend::create(config(size, memfd_kind())).unwrap()).unwrap();
        assert_eq!(ram.extents().unwrap(), []);
        ram.write_at(LOW_RAM_END - 2, b"abcd").unwrap();
        assert_eq!(
            ram.memory().read_obj::<u16>(GuestAddress(HIGH_RAM_START)).unwrap(),
            u16::from_le_bytes(*b"cd")
        );
        let mut back = [0; 4];
        ram.read_at(LOW_RAM_END - 2, &mut back).unwrap();
        assert_eq!(&back, b"abcd");
        assert_eq!(
            ram.extents().unwrap(),
            [LOW_RAM_END - 4096..LOW_RAM_END, LOW_RAM_END..LOW_RAM_END + 4096]
        );
        ram.write_at(size - 1, b"xy").unwrap_err();
        ram.read_at(size, &mut back).unwrap_err();

        let private = BackendKind::Ram { share: false };
        let ram = GuestRam::map(&Backend::create(config(MIB, private)).unwrap()).unwrap();
        assert_eq!(ram.extents().unwrap(), std::slice::from_ref(&(0..MIB)));
    }

    #[test]
    fn shared_memory_survives_its_mapping() {
        let backend = Backend::create(config(16 * MIB, memfd_kind())).unwrap();
        let first = GuestRam::map(&backend).unwrap();
        first.memory().write_obj(0x1234_5678_u32, GuestAddress(0x2000)).unwrap();
        drop(first);
        let adopted = Backend::adopt(backend.config().clone(), Arc::clone(backend.fd().unwrap())).unwrap();
        let second = GuestRam::map(&adopted).unwrap();
        assert_eq!(second.memory().read_obj::<u32>(GuestAddress(0x2000)).unwrap(), 0x1234_5678);
    }

    #[test]
    fn private_memory_does_not_reach_the_memfd() {
        let backend =
            Backend::create(config(MIB, BackendKind::Memfd { share: false, hugetlb: None })).unwrap();
        let ram = GuestRam::map(&backend).unwrap();
        ram.memory().write_obj(7u8, GuestAddress(0)).unwrap();
        let again = GuestRam::map(&backend).unwrap();
        assert_eq!(again.memory().read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
    }

    #[test]
    fn mapping_allocates_no_page() {
        let backend = Backend::create(config(8192 * MIB, memfd_kind())).unwrap();
        let ram = GuestRam::map(&backend).unwrap();
        assert_eq!(ram.len(), 8192 * MIB);
        assert_eq!(ram.memory().num_regions(), 2);
        assert_eq!(backend.fd().unwrap().metadata().unwrap().blocks(), 0);
    }

    #[test]
    fn what_exists_is_mapped_ahead_and_holes_stay_holes() {
        let backend = Backend::create(config(16 * MIB, memfd_kind())).unwrap();
        let file = backend.fd().unwrap();
        let before = GuestRam::map(&backend).unwrap();
        for at in [0, 5 * MIB, 5 * MIB + PAGE_LEN, 16 * MIB - PAGE_LEN] {
            before.memory().write_obj(7u8, GuestAddress(at)).unwrap();
        }
        let blocks = file.metadata().unwrap().blocks();
        let ram = GuestRam::map(&backend).unwrap();
        let mapped = ram.populate_existing(&mut || true).unwrap();
        let extents = [0..PAGE_LEN, 5 * MIB..5 * MIB + 2 * PAGE_LEN, 16 * MIB - PAGE_LEN..16 * MIB];
        assert_eq!(mapped, extents);
        assert_eq!(file.metadata().unwrap().blocks(), blocks, "no hole was allocated");
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(5 * MIB)).unwrap(), 7);
        assert!(ram.populate_existing(&mut || false).unwrap().is_empty());
    }

    #[test]
    fn private_memory_is_not_mapped_ahead() {
        for kind in [BackendKind::Memfd { share: false, hugetlb: None }, BackendKind::Ram { share: false }] {
            let backend = Backend::create(config(MIB, kind)).unwrap();
            let ram = GuestRam::map(&backend).unwrap();
            ram.memory().write_obj(7u8, GuestAddress(0)).unwrap();
            assert!(ram.populate_existing(&mut || true).unwrap().is_empty());
        }
    }

    #[test]
    fn regions_tell_where_they_are() {
        let backend = Backend::create(config(4096 * MIB, memfd_kind())).unwrap();
        let ram = GuestRam::map(&backend).unwrap();
        let regions = ram.regions();
        assert_eq!(regions[1].gpa, HIGH_RAM_START);
        assert_eq!(regions[1].file_offset, LOW_RAM_END);
        for (region, mapped) in regions.iter().zip(ram.memory().iter()) {
            assert_eq!(region.len, mapped.len());
            assert_eq!(region.host_addr, mapped.as_ptr() as u64);
        }
    }

    #[test]
    fn obstacles_follow_sharing_and_descriptor() {
        let private = [BackendKind::Ram { share: false }, BackendKind::Memfd { share: false, hugetlb: None }];
        for kind in private {
            let obstacle = Backend::create(config(MIB, kind)).unwrap().in_place_obstacle().unwrap();
            assert_eq!(
                obstacle,
                "Memory region ram0 is not compatible with CPR. share=on is required for memory-backend objects"
            );
        }
        for kind in [BackendKind::Ram { share: true }, memfd_kind()] {
            let backend = Backend::create(config(MIB, kind)).unwrap();
            assert_eq!(backend.in_place_obstacle(), None);
            assert!(backend.fd().is_some());
        }
        assert!(Backend::create(config(MIB, BackendKind::Ram { share: false })).unwrap().fd().is_none());
    }

    #[test]
    fn adoption_refuses_what_does_not_fit() {
        let fd = |size| Arc::clone(Backend::create(config(size, memfd_kind())).unwrap().fd().unwrap());
        let message = |result: Result<Backend, MemoryError>| result.unwrap_err().to_string();
        assert_eq!(
            message(Backend::adopt(config(2 * MIB, memfd_kind()), fd(MIB))),
            "memory backend ram0: the inherited descriptor has 1048576 bytes, the configuration says 2097152"
        );
        let private = BackendKind::Memfd { share: false, hugetlb: None };
        assert!(message(Backend::adopt(config(MIB, private), fd(MIB))).contains("share=on is required"));
        let huge = BackendKind::Memfd { share: true, hugetlb: Some(2 * MIB) };
        assert!(message(Backend::adopt(config(2 * MIB, huge), fd(2 * MIB))).contains("pages of 4096 bytes"));
        let file = tempfile::tempfile().unwrap();
        file.set_len(MIB).unwrap();
        assert!(message(Backend::adopt(config(MIB, memfd_kind()), Arc::new(file))).contains("not a memfd"));
    }

    #[test]
    fn files_are_created_reused_and_refused_by_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        let kind = BackendKind::File { path: path.clone(), share: true };
        let backend = Backend::create(config(MIB, kind.clone())).unwrap();
        assert_eq!(backend.in_place_obstacle(), None);
        GuestRam::map(&backend).unwrap().memory().write_obj(9u8, GuestAddress(5)).unwrap();
        let again = GuestRam::map(&Backend::create(config(MIB, kind.clone())).unwrap()).unwrap();
        assert_eq!(again.memory().read_obj::<u8>(GuestAddress(5)).unwrap(), 9);
        for other in [MIB / 2, 2 * MIB] {
            let error = Backend::create(config(other, kind.clone())).unwrap_err().to_string();
            assert!(error.contains("has 1048576 bytes"), "{error}");
        }
    }

    #[test]
    fn impossible_sizes_are_named() {
        let huge = |page| BackendKind::Memfd { share: true, hugetlb: Some(page) };
        assert!(matches!(Backend::create(config(0, memfd_kind())), Err(MemoryError::Size { .. })));
        assert!(matches!(Backend::create(config(4097, memfd_kind())), Err(MemoryError::Size { .. })));
        assert!(matches!(Backend::create(config(MIB, huge(2 * MIB))), Err(MemoryError::Size { .. })));
        assert!(matches!(Backend::create(config(MIB, huge(65536))), Err(MemoryError::PageSize { .. })));
    }

    #[test]
    fn missing_huge_pages_tell_how_to_reserve_them() {
        // More 1 GiB pages than any test machine has. Where the kernel has no hugetlb at all, create fails the
        // same way.
        let kind = BackendKind::Memfd { share: true, hugetlb: Some(1 << 30) };
        let error = Backend::create(config(1 << 44, kind))
            .and_then(|backend| GuestRam::map(&backend))
            .unwrap_err()
            .to_string();
        assert!(error.contains("echo 16384 > /sys/kernel/mm/hugepages/hugepages-1048576kB/"), "{error}");
    }
}
