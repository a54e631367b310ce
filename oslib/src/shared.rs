#![allow(unsafe_code, reason = "references into a shared mapping")]
//! Words of memory that two processes, or two program images, share: [`SharedWords`].
//!
//! They are atomics and nothing else, because the other side changes them at any time and may be hostile. A descriptor
//! is mapped only if the kernel itself guarantees that the mapping stays whole: a true memfd of ordinary pages whose
//! length can no longer shrink. Anything else is refused, for one truncate by the other side would be a SIGBUS here.
//! See memfd_create(2) and fcntl(2), "File Sealing".

use std::io;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

use crate::memfd::{self, Memfd, Seals};
use crate::mmap::Mapping;

/// Bytes of a page, and so the granularity of [`SharedWords`].
const PAGE_BYTES: u64 = 4096;

/// Why a descriptor was not mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// It was not made by memfd_create(2).
    #[error("shared words need a memfd")]
    NotMemfd,
    /// It is made of huge pages, which can run out after they were mapped.
    #[error("shared words need a memfd of ordinary pages")]
    HugePages,
    /// It may shrink under the mapping.
    #[error("shared words need a memfd that is sealed against shrinking")]
    NotSealed,
    /// It is empty, or not made of whole pages.
    #[error("shared words need whole pages, not {bytes} bytes")]
    Length {
        /// Its length.
        bytes: u64,
    },
    /// The kernel refused.
    #[error("cannot map shared words")]
    Io(#[from] io::Error),
}

/// A sealed memfd, mapped and read as 64-bit atomics in host byte order.
///
/// A clone is another handle on the same mapping.
#[derive(Clone, Debug)]
pub struct SharedWords {
    mapping: Arc<Mapping>,
    fd: Arc<OwnedFd>,
}

impl SharedWords {
    /// Makes a memfd with room for `words` words, rounded up to whole pages (one at least), all zero, and maps it.
    ///
    /// Its length and its seals are sealed, so nobody who receives the descriptor can spoil it for the others.
    ///
    /// # Errors
    /// Those of [`Memfd::create`] and mmap(2).
    pub fn create(name: &str, words: usize) -> io::Result<Self> {
        let bytes = (words.max(1) as u64)
            .checked_mul(size_of::<AtomicU64>() as u64)
            .and_then(|bytes| bytes.checked_next_multiple_of(PAGE_BYTES))
            .ok_or(io::ErrorKind::InvalidInput)?;
        let fd = Memfd::new(name).len(bytes).seal_size().seal_seals().create()?;
        Self::map_bytes(Arc::new(fd), bytes)
    }

    /// Maps the memfd that the other side made by [`SharedWords::create`].
    ///
    /// # Errors
    /// [`MapError`]; nothing stays mapped.
    pub fn map(fd: impl Into<Arc<OwnedFd>>) -> Result<Self, MapError> {
        let fd = fd.into();
        if !memfd::is_memfd(&*fd)? {
            return Err(MapError::NotMemfd);
        }
        if fstatfs(&*fd).map_err(io::Error::from)?.filesystem_type() == HUGETLBFS_MAGIC {
            return Err(MapError::HugePages);
        }
        // Seals before length: from here on it cannot become less than what is read next.
        if !memfd::seals(&*fd)?.contains(Seals::SHRINK) {
            return Err(MapError::NotSealed);
        }
        let bytes = memfd::len(&*fd)?;
        if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES) {
            return Err(MapError::Length { bytes });
        }
        Ok(Self::map_bytes(fd, bytes)?)
    }

    fn map_bytes(fd: Arc<OwnedFd>, bytes: u64) -> io::Result<Self> {
        let len =
            usize::try_from(bytes).ok().and_then(NonZeroUsize::new).ok_or(io::ErrorKind::InvalidInput)?;
        let mapping = Arc::new(Mapping::of(fd.as_fd(), len, true)?);
        Ok(SharedWords { mapping, fd })
    }

    /// All of them: whole pages of 512.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned and holds this many u64 for as long as `self` lives; every bit pattern is
        // a u64; whoever else maps it is another process, or reaches it through atomics as well. The seal against
        // shrinking keeps its pages there.
        unsafe {
            std::slice::from_raw_parts(
                self.mapping.start().cast::<AtomicU64>().as_ptr(),
                self.mapping.len() / size_of::<AtomicU64>(),
            )
        }
    }

    /// One word as a handle of its own that keeps the mapping alive; `None` beyond the last one.
    pub fn word(&self, index: usize) -> Option<SharedWord> {
        (index < self.words().len()).then(|| SharedWord { words: self.clone(), index })
    }

    /// The memfd, to hand to the other side.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }
}

/// One of [`SharedWords`], with its mapping kept alive.
#[derive(Clone, Debug)]
pub struct SharedWord {
    words: SharedWords,
    index: usize,
}

impl SharedWord {
    /// Waits until somebody calls [`wake`](Self::wake), `timeout` at most, unless the low 32 bits are not those of
    /// `expected` by now. May return early for no reason: look at the word again.
    ///
    /// # Errors
    /// None that are not mistakes of this function; being late or early is no error.
    pub fn wait(&self, expected: u64, timeout: Duration) -> io::Result<()> {
        let timeout = libc::timespec {
            tv_sec: timeout.as_secs().min(i32::MAX as u64) as i64,
            tv_nsec: timeout.subsec_nanos().into(),
        };
        // SAFETY: the word lies in a mapping that `self` keeps; the kernel compares its first four bytes, which are the low
        // half on this little-endian machine, and reads the timeout.
        let result = unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.as_ptr(),
                libc::FUTEX_WAIT,
                expected as u32,
                &raw const timeout,
            )
        };
        match Errno::result(result) {
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR | Errno::ETIMEDOUT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Wakes everybody who waits for this word, in every process. Store the new value first.
    pub fn wake(&self) {
        // SAFETY: as in `wait`; this reads nothing.
        unsafe { libc::syscall(libc::SYS_futex, self.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
    }

    /// All the words of its mapping.
    pub fn all(&self) -> &SharedWords {
        &self.words
    }
}

impl Deref for SharedWord {
    type Target = AtomicU64;

    fn deref(&self) -> &AtomicU64 {
        &self.words.words()[self.index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::SeqCst;

    use crate::memfd::HugePage;

    #[test]
    fn two_mappings_are_one_memory() {
        let ours = SharedWords::create("words", 600).unwrap();
        assert_eq!(ours.words().len(), 1024);
        let theirs = SharedWords::map(ours.fd().try_clone().unwrap()).unwrap();
        assert_eq!(theirs.words()[599].load(SeqCst), 0);
        ours.words()[599].store(7, SeqCst);
        assert_eq!(theirs.word(599).unwrap().compare_exchange(7, 8, SeqCst, SeqCst), Ok(7));
        assert_eq!(ours.words()[599].load(SeqCst), 8);
        assert!(ours.word(1024).is_none());
    }

    #[test]
    fn a_word_outlives_its_handle() {
        let word = {
            let words = SharedWords::create("word", 1).unwrap();
            words.word(3).unwrap()
        };
        word.store(5, SeqCst);
        assert_eq!(word.all().words()[3].load(SeqCst), 5);
    }

    #[test]
    fn what_could_shrink_is_refused() {
        let open = Memfd::new("open").len(4096).create().unwrap();
        assert!(matches!(SharedWords::map(open).unwrap_err(), MapError::NotSealed));
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(4096).unwrap();
        assert!(matches!(SharedWords::map(OwnedFd::from(file)).unwrap_err(), MapError::NotMemfd));
        if let Ok(huge) = Memfd::new("huge").hugetlb(HugePage::Size2M).len(2 << 20).seal_size().create() {
            assert!(matches!(SharedWords::map(huge).unwrap_err(), MapError::HugePages));
        }
    }

    #[test]
    fn lengths_are_checked() {
        for bytes in [0, 8, 4095, 4097] {
            let fd = Memfd::new("length").len(bytes).seal_size().create().unwrap();
            match SharedWords::map(fd).unwrap_err() {
                MapError::Length { bytes: told } => assert_eq!(told, bytes),
                other => panic!("{other}"),
            }
        }
        assert!(SharedWords::create("vast", usize::MAX).is_err());
    }

    #[test]
    fn a_wait_ends_by_a_wake_a_change_or_in_time() {
        let words = SharedWords::create("futex", 1).unwrap();
        let theirs = SharedWords::map(words.fd().clone()).unwrap().word(1).unwrap();
        let ours = words.word(1).unwrap();
        ours.wait(0, Duration::from_millis(1)).unwrap();
        let long = Duration::from_secs(30);
        let waiter = std::thread::spawn(move || {
            while theirs.load(SeqCst) == 0 {
                theirs.wait(0, long).unwrap();
            }
            theirs.load(SeqCst)
        });
        std::thread::sleep(Duration::from_millis(10));
        ours.store(3, SeqCst);
        ours.wake();
        assert_eq!(waiter.join().unwrap(), 3);
        let begin = std::time::Instant::now();
        ours.wait(0, long).unwrap();
        assert!(begin.elapsed() < long, "the value is another one already");
    }

    #[test]
    fn unmapped_on_drop() {
        let words = SharedWords::create("cpr-test-drop", 1).unwrap();
        let mapped = || std::fs::read_to_string("/proc/self/maps").unwrap().contains("cpr-test-drop");
        assert!(mapped());
        drop(words);
        assert!(!mapped());
    }
}
