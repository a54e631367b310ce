//! Memory with a descriptor: made, sealed, recognised and measured.
//!
//! [`Memfd`] builds one; the functions ask and seal. A descriptor counts as a memfd ([`is_memfd`]) only if the kernel
//! made it by memfd_create(2): a file of a tmpfs answers the same fcntls, but has a path by which others can open and
//! truncate it. Seals are described in fcntl(2), "File Sealing".

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use bitflags::bitflags;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{Whence, ftruncate, lseek};

use crate::retry;

bitflags! {
    /// What can no longer be done to a memfd (fcntl(2), "File Sealing").
    ///
    /// Ask with `contains`, never by equality: kernels add seals of their own, such as [`Seals::EXEC`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Seals: i32 {
        /// No seal can be added.
        const SEAL = libc::F_SEAL_SEAL;
        /// It cannot get shorter, so that a mapping of it within its length never raises SIGBUS for a missing page.
        const SHRINK = libc::F_SEAL_SHRINK;
        /// It cannot get longer.
        const GROW = libc::F_SEAL_GROW;
        /// Its contents cannot change.
        const WRITE = libc::F_SEAL_WRITE;
        /// Its contents cannot change except through writable mappings that exist already.
        const FUTURE_WRITE = libc::F_SEAL_FUTURE_WRITE;
        /// It cannot become executable (Linux 6.3).
        const EXEC = libc::F_SEAL_EXEC;

        const _ = !0;
    }
}

/// The page size that a memfd on hugetlbfs is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePage {
    /// 2 MiB.
    Size2M,
    /// 1 GiB.
    Size1G,
}

impl HugePage {
    /// The size of one page in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            HugePage::Size2M => 2 << 20,
            HugePage::Size1G => 1 << 30,
        }
    }

    fn flags(self) -> MFdFlags {
        match self {
            HugePage::Size2M => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
            HugePage::Size1G => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_1GB,
        }
    }
}

/// A memfd to be made: close-on-exec, never executable where the kernel knows how, open for sealing.
///
/// ```
/// # fn main() -> std::io::Result<()> {
/// use oslib::memfd::{self, Memfd};
///
/// let ram = Memfd::new("ram0").len(64 << 20).seal_size().create()?;
/// assert_eq!(memfd::len(&ram)?, 64 << 20);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing is made before `create`"]
pub struct Memfd {
    name: String,
    len_bytes: u64,
    huge_page: Option<HugePage>,
    seals: Seals,
}

impl Memfd {
    /// Starts a memfd of this name (249 bytes at most, for people who read `/proc`; it need not be unique).
    pub fn new(name: impl Into<String>) -> Self {
        Memfd { name: name.into(), len_bytes: 0, huge_page: None, seals: Seals::empty() }
    }

    /// Its length in bytes; 0 unless told. With huge pages it must be a multiple of their size.
    pub fn len(mut self, bytes: u64) -> Self {
        self.len_bytes = bytes;
        self
    }

    /// Takes its memory from the pool of huge pages of this size.
    pub fn hugetlb(mut self, page: HugePage) -> Self {
        self.huge_page = Some(page);
        self
    }

    /// Fixes the length (seals [`Seals::SHRINK`] and [`Seals::GROW`]).
    pub fn seal_size(mut self) -> Self {
        self.seals |= Seals::SHRINK | Seals::GROW;
        self
    }

    /// Refuses every later seal ([`Seals::SEAL`]), for memory that must stay writable for good.
    pub fn seal_seals(mut self) -> Self {
        self.seals |= Seals::SEAL;
        self
    }

    /// Makes it.
    ///
    /// # Errors
    /// `InvalidInput` for a name with a NUL byte, a name too long, or a length that is no multiple of the huge page;
    /// those of memfd_create(2), ftruncate(2) and fcntl(2) otherwise. Missing huge pages show later, at mmap(2).
    pub fn create(self) -> io::Result<OwnedFd> {
        let name = CString::new(self.name)?;
        if self.huge_page.is_some_and(|page| !self.len_bytes.is_multiple_of(page.bytes())) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "length is no multiple of the huge page",
            ));
        }
        let len = i64::try_from(self.len_bytes).map_err(|_| io::Error::from(Errno::EFBIG))?;
        // Sealing is allowed in so many words, because only kernels that know NOEXEC_SEAL take it as implied.
        let base = MFdFlags::MFD_CLOEXEC
            | MFdFlags::MFD_ALLOW_SEALING
            | self.huge_page.map_or(MFdFlags::empty(), HugePage::flags);
        let no_exec = MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL);
        let fd = match memfd_create(name.as_c_str(), base | no_exec) {
            // A kernel before 6.3 does not know the flag. Any other cause fails a second time, and is told then.
            Err(Errno::EINVAL) => memfd_create(name.as_c_str(), base)?,
            other => other?,
        };
        if len != 0 {
            retry::on_eintr(|| ftruncate(&fd, len))?;
        }
        if !self.seals.is_empty() {
            add_seals(&fd, self.seals)?;
        }
        Ok(fd)
    }
}

/// Fixes the length of a memfd (seals [`Seals::SHRINK`] and [`Seals::GROW`]); nothing happens if it is fixed already.
///
/// # Errors
/// `InvalidInput` (EINVAL) if `fd` cannot be sealed at all, `PermissionDenied` (EPERM) if it refuses further seals or
/// is not open for writing.
pub fn seal_size(fd: impl AsFd) -> io::Result<()> {
    add_seals(fd, Seals::SHRINK | Seals::GROW)
}

/// Freezes a memfd for good: contents, length and the seals themselves.
///
/// # Errors
/// As [`seal_size`]; `ResourceBusy` (EBUSY) while a writable shared mapping of it exists in any process.
pub fn seal_write(fd: impl AsFd) -> io::Result<()> {
    add_seals(fd, Seals::WRITE | Seals::SHRINK | Seals::GROW | Seals::SEAL)
}

/// The seals that `fd` has.
///
/// # Errors
/// `InvalidInput` (EINVAL) if it is of a kind that has no seals.
pub fn seals(fd: impl AsFd) -> io::Result<Seals> {
    Ok(Seals::from_bits_retain(fcntl(fd, FcntlArg::F_GET_SEALS)?))
}

fn add_seals(fd: impl AsFd, wanted: Seals) -> io::Result<()> {
    let fd = fd.as_fd();
    // With SEAL in place the kernel refuses even what is there already.
    if seals(fd)?.contains(wanted) {
        return Ok(());
    }
    fcntl(fd, FcntlArg::F_ADD_SEALS(SealFlag::from_bits_retain(wanted.bits())))?;
    Ok(())
}

/// Whether `fd` was made by memfd_create(2), in this process or another.
///
/// Three things must agree: it has seals (tmpfs files do, too), nothing links to it (nor to an unlinked tmpfs file), and
/// the kernel calls it `/memfd:`. Needs `/proc`.
///
/// # Errors
/// Those of fstat(2) and of reading the link in `/proc`; "it is something else" is not an error.
pub fn is_memfd(fd: impl AsFd) -> io::Result<bool> {
    let fd = fd.as_fd();
    match seals(fd) {
        Ok(_) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(false),
        // fcntl refuses an O_PATH descriptor so. Whatever it stands for, it is not memory that can be mapped.
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => return Ok(false),
        Err(error) => return Err(error),
    }
    if fstat(fd)?.st_nlink != 0 {
        return Ok(false);
    }
    let link = std::fs::read_link(format!("/proc/thread-self/fd/{}", fd.as_raw_fd()))?;
    Ok(link.as_os_str().as_bytes().starts_with(b"/memfd:"))
}

/// The length of the file behind `fd` in bytes.
///
/// # Errors
/// Those of fstat(2).
pub fn len(fd: impl AsFd) -> io::Result<u64> {
    // The kernel has no negative file sizes; the type has.
    Ok(u64::try_from(fstat(fd)?.st_size).unwrap_or(0))
}

/// Frees `range` of a file or memfd, so that it reads as zeros, in every mapping of it as well. The length stays.
///
/// # Errors
/// Those of fallocate(2): `Unsupported` where the file system cannot do it, EPERM on a write-sealed memfd.
pub fn punch_hole(fd: impl AsFd, range: Range<u64>) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let start = i64::try_from(range.start).map_err(invalid)?;
    let len = i64::try_from(range.end.saturating_sub(range.start)).map_err(invalid)?;
    retry::on_eintr(|| fallocate(fd.as_fd(), flags, start, len))
}

/// The byte ranges of `fd` that hold data, in order, none of them empty; everything else reads as zeros.
///
/// These are the ranges to populate: populating a hole allocates it. On hugetlbfs the whole file is one range. The file
/// offset stays where it is; only where `/proc` or the file cannot be opened is it moved and put back, so that nobody else may
/// use read(2), write(2) or lseek(2) on the same open file meanwhile. Mappings do not matter.
///
/// # Errors
/// Those of lseek(2); ESPIPE for what is no file.
pub fn extents(fd: impl AsFd) -> io::Result<Vec<Range<u64>>> {
    let fd = fd.as_fd();
    // Whoever is killed meanwhile leaves the offset of others alone.
    if let Some(own) = opened_anew(fd) {
        return seek_extents(own);
    }
    let offset = lseek(fd, 0, Whence::SeekCur)?;
    let found = seek_extents(fd);
    lseek(fd, offset, Whence::SeekSet)?;
    found
}

/// The same file with an offset of its own. Nothing but a file is opened: others may block, or notice.
fn opened_anew(fd: BorrowedFd<'_>) -> Option<File> {
    let kind = SFlag::from_bits_truncate(fstat(fd).ok()?.st_mode & SFlag::S_IFMT.bits());
    if kind != SFlag::S_IFREG {
        return None;
    }
    File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()
}

fn seek_extents(fd: impl AsFd) -> io::Result<Vec<Range<u64>>> {
    let fd = fd.as_fd();
    let mut extents = Vec::new();
    let mut from = 0;
    loop {
        let data = match lseek(fd, from, Whence::SeekData) {
            Ok(data) => data,
            // No data between here and the end.
            Err(Errno::ENXIO) => return Ok(extents),
            Err(error) => return Err(error.into()),
        };
        let hole = match lseek(fd, data, Whence::SeekHole) {
            Ok(hole) => hole,
            // The file shrank, or was punched, between the two calls.
            Err(Errno::ENXIO) => return Ok(extents),
            Err(error) => return Err(error.into()),
        };
        // A file offset that the kernel returns is never negative.
        if hole > data {
            extents.push(data.cast_unsigned()..hole.cast_unsigned());
        }
        // One byte on at least, or a hole punched at `data` meanwhile would have this loop turn on the spot.
        from = hole.max(data + 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::io::{Seek, SeekFrom};
    use std::os::unix::fs::{FileExt, OpenOptionsExt};

    use crate::cloexec;

    #[test]
    fn made_as_asked_for() {
        let fd = Memfd::new("as-asked").len(12345).create().unwrap();
        assert!(cloexec::is_set(&fd).unwrap());
        assert!(is_memfd(&fd).unwrap());
        assert_eq!(len(&fd).unwrap(), 12345);
        // The flags that make it non-executable must not have sealed the seals.
        assert!(!seals(&fd).unwrap().intersects(Seals::SEAL | Seals::SHRINK | Seals::GROW | Seals::WRITE));
    }

    #[test]
    fn size_seal_refuses_every_other_length_but_not_writing() {
        let file = File::from(Memfd::new("sized").len(8192).seal_size().create().unwrap());
        assert_eq!(file.set_len(4096).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(file.set_len(16384).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        file.write_all_at(b"x", 8191).unwrap();
        // Still open for the write seal.
        seal_write(&file).unwrap();
        assert_eq!(file.write_all_at(b"x", 0).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn sealing_twice_is_no_error_and_sealed_seals_stay() {
        let fd = Memfd::new("seals").len(4096).seal_size().seal_seals().create().unwrap();
        seal_size(&fd).unwrap();
        assert_eq!(seal_write(&fd).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        let frozen = Memfd::new("frozen").len(4096).create().unwrap();
        seal_write(&frozen).unwrap();
        seal_write(&frozen).unwrap();
        assert!(seals(&frozen).unwrap().contains(Seals::WRITE | Seals::SHRINK | Seals::GROW | Seals::SEAL));
    }

    #[test]
    fn only_a_memfd_is_a_memfd() {
        assert!(!is_memfd(File::open("/dev/null").unwrap()).unwrap());
        assert!(!is_memfd(File::open("/proc/self/exe").unwrap()).unwrap());
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(!is_memfd(&socket).unwrap());
        let path = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open("/dev/null").unwrap();
        assert!(!is_memfd(&path).unwrap());
        // A tmpfs file has seals; an unlinked one has no links either.
        let named = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        assert!(seals(named.as_file()).is_ok());
        assert!(!is_memfd(named.as_file()).unwrap());
        let unlinked = tempfile::tempfile_in("/dev/shm").unwrap();
        assert!(!is_memfd(&unlinked).unwrap());
    }

    #[test]
    fn names_and_lengths_that_cannot_be() {
        assert_eq!(Memfd::new("a\0b").create().unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(Memfd::new("n".repeat(300)).create().unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let odd = Memfd::new("odd").hugetlb(HugePage::Size2M).len(4096).create();
        assert_eq!(odd.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert!(Memfd::new("vast").len(u64::MAX).create().is_err());
    }

    #[test]
    fn huge_pages() {
        // Making it takes no page from the pool, so this needs no configured machine, only a kernel with hugetlbfs.
        match Memfd::new("huge").hugetlb(HugePage::Size2M).len(4 << 20).seal_size().create() {
            Ok(fd) => {
                assert!(is_memfd(&fd).unwrap());
                assert!(seals(&fd).unwrap().contains(Seals::SHRINK | Seals::GROW));
                assert_eq!(fstat(&fd).unwrap().st_blksize, 2 << 20);
            }
            Err(error) => assert!(
                matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::ENODEV | libc::EINVAL)),
                "{error}"
            ),
        }
    }

    #[test]
    fn extents_are_the_pages_written() {
        let mut file = File::from(Memfd::new("extents").len(1 << 20).create().unwrap());
        assert_eq!(extents(&file).unwrap(), []);
        file.write_all_at(&[1; 4096], 8192).unwrap();
        file.write_all_at(&[1; 8192], 65536).unwrap();
        file.seek(SeekFrom::Start(77)).unwrap();
        assert_eq!(extents(&file).unwrap(), [8192..12288, 65536..73728]);
        assert_eq!(file.stream_position().unwrap(), 77);
        file.write_all_at(&[1; 4096], (1 << 20) - 4096).unwrap();
        assert_eq!(extents(&file).unwrap().last(), Some(&((1 << 20) - 4096..1 << 20)));
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(extents(&socket).unwrap_err().raw_os_error(), Some(libc::ESPIPE));
    }

    #[test]
    fn who_asks_for_extents_does_not_move_the_offset_meanwhile() {
        let mut file = File::from(Memfd::new("extents").len(1 << 20).create().unwrap());
        (0..64).for_each(|at| file.write_all_at(&[1], at << 14).unwrap());
        file.seek(SeekFrom::Start(77)).unwrap();
        let same = file.try_clone().unwrap();
        let asking = std::thread::spawn(move || (0..500).for_each(|_| drop(extents(&same).unwrap())));
        while !asking.is_finished() {
            assert_eq!(file.stream_position().unwrap(), 77);
        }
        asking.join().unwrap();
    }

    #[test]
    fn a_punched_hole_reads_as_zeros() {
        let memfd = Memfd::new("hole").len(3 << 12).seal_size().create().unwrap();
        let file = std::fs::File::from(memfd);
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 3 << 12], 0).unwrap();
        punch_hole(&file, 1 << 12..2 << 12).unwrap();
        let mut bytes = [1; 3 << 12];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        assert!(bytes[1 << 12..2 << 12].iter().all(|&b| b == 0));
        assert!(bytes[..1 << 12].iter().chain(&bytes[2 << 12..]).all(|&b| b == 7));
        assert_eq!(len(&file).unwrap(), 3 << 12);
    }
}
