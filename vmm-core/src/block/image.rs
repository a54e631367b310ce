//! One image: how it is opened, and taken over.

use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::lock::{LockError, Use};

/// Bytes of a sector, in which disks are counted.
pub const SECTOR_LEN: u64 = 512;

/// When a write is on the disk, in the terms of QEMU's `cache=`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cache {
    /// `writeback`: when the guest flushes. The guest is told of the cache.
    #[default]
    Writeback,
    /// `writethrough`: when it is completed.
    Writethrough,
    /// `unsafe`: at some time. What the guest flushes is lost with the host's power.
    Unsafe,
}

/// An image as the user asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageConfig {
    /// The drive's `id=`, which names it in messages.
    pub id: String,
    /// A raw file or a block device.
    pub path: PathBuf,
    /// `read-only=on`: never written to.
    pub read_only: bool,
    /// `cache=`.
    pub cache: Cache,
    /// `file.locking=`: whether others are kept out. QEMU's `auto` is on here: Linux has had these locks since 3.15.
    pub locking: bool,
    /// The device's `share-rw=on`: others may write to it as well.
    pub share_rw: bool,
    /// `discard=unmap`: what the guest discards takes no room any more. QEMU's default, and this one's, is `ignore`.
    pub unmap: bool,
}

impl ImageConfig {
    /// An image with everything else as by default.
    pub fn new(id: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            id: id.into(),
            path: path.into(),
            read_only: false,
            cache: Cache::default(),
            locking: true,
            share_rw: false,
            unmap: false,
        }
    }

    /// Checks that the path, if anything is found there, leads to the image that the guest has.
    ///
    /// # Errors
    /// [`ImageError`]: it leads to another one.
    pub fn check_identity(&self, guests: ImageIdentity) -> Result<(), ImageError> {
        // A name that is gone, or that this process cannot see, says nothing: the descriptor is the image.
        match std::fs::metadata(&self.path) {
            Ok(named) if ImageIdentity::of(&named) != guests => Err(self.fail(Problem::Another)),
            _ => Ok(()),
        }
    }

    fn fail(&self, problem: Problem) -> ImageError {
        ImageError { id: self.id.clone(), path: self.path.clone(), problem }
    }
}

/// What is the same for all names of a file, or of a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageIdentity {
    is_block_device: bool,
    /// The device itself, or the one that the file is on.
    device: u64,
    /// 0 for a block device.
    inode: u64,
}

impl ImageIdentity {
    fn of(metadata: &Metadata) -> ImageIdentity {
        if metadata.file_type().is_block_device() {
            ImageIdentity { is_block_device: true, device: metadata.rdev(), inode: 0 }
        } else {
            ImageIdentity { is_block_device: false, device: metadata.dev(), inode: metadata.ino() }
        }
    }
}

/// An image that cannot be used, by name.
#[derive(Debug)]
pub struct ImageError {
    id: String,
    path: PathBuf,
    problem: Problem,
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "drive {}: {} {}", self.id, self.path.display(), self.problem)
    }
}

impl std::error::Error for ImageError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.problem.source()
    }
}

/// What is the matter with it.
#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("cannot be opened for reading{}{}", if *.read_only { "" } else { " and writing" }, hint(source, *.read_only))]
    Open { source: io::Error, read_only: bool },
    #[error("cannot be examined")]
    Examine(#[source] io::Error),
    #[error("is {0}; an image is a regular file or a block device")]
    Kind(&'static str),
    #[error("is in use: {0}")]
    Locked(LockError),
    #[error(
        "is not the image that the guest has: it is another file than before the update; name the same one"
    )]
    Another,
    #[error(
        "is {} by this command line, and was not before the update; the guest knows it as it was",
        if *.0 { "read-only" } else { "writable" }
    )]
    Access(bool),
    #[error("has become shorter: {found} bytes, the guest's disk has {expected}; give it its length back")]
    Shorter { found: u64, expected: u64 },
}

/// What helps who may read an image, but not write to it.
fn hint(error: &io::Error, read_only: bool) -> &'static str {
    let is_denied =
        matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem);
    if is_denied && !read_only { "; read-only=on does without the latter" } else { "" }
}

/// An image in use.
#[derive(Debug)]
pub struct Image {
    config: ImageConfig,
    file: Arc<File>,
    /// Bytes, as they were when it was opened or adopted.
    len: u64,
}

impl Image {
    /// Opens and locks an image. Nothing is created.
    ///
    /// # Errors
    /// [`ImageError`]: it is missing, of another kind, or somebody else's.
    pub fn open(config: ImageConfig) -> Result<Self, ImageError> {
        let refused = |source| config.fail(Problem::Open { source, read_only: config.read_only });
        // Before it is opened: a pipe would wait for its other end.
        check_kind(&config, &std::fs::metadata(&config.path).map_err(refused)?)?;
        let opened = OpenOptions::new().read(true).write(!config.read_only).open(&config.path);
        let file = opened.map_err(refused)?;
        Self::of(config, Arc::new(file))
    }

    /// Takes over an image that is open: the descriptor of the program before. Nothing is opened, and the locks, which are
    /// the open file's, are there; to take them once more changes nothing.
    ///
    /// # Errors
    /// [`ImageError`]: the descriptor is not what the configuration says.
    pub fn adopt(config: ImageConfig, fd: Arc<File>) -> Result<Self, ImageError> {
        let examine = |error| config.fail(Problem::Examine(error));
        let open = fd.metadata().map_err(examine)?;
        config.check_identity(ImageIdentity::of(&open))?;
        if oslib::storage::is_writable(&fd).map_err(examine)? == config.read_only {
            return Err(config.fail(Problem::Access(config.read_only)));
        }
        Self::of(config, fd)
    }

    fn of(config: ImageConfig, file: Arc<File>) -> Result<Self, ImageError> {
        let metadata = file.metadata().map_err(|error| config.fail(Problem::Examine(error)))?;
        check_kind(&config, &metadata)?;
        if config.locking {
            let used = Use { write: !config.read_only, share_write: config.share_rw };
            used.lock(file.as_fd()).map_err(|error| config.fail(Problem::Locked(error)))?;
        }
        let len = len(&file).map_err(|error| config.fail(Problem::Examine(error)))?;
        Ok(Self { config, file, len })
    }

    /// The descriptor, which an update has to bring along.
    pub fn fd(&self) -> &Arc<File> {
        &self.file
    }

    /// Which one it is.
    ///
    /// # Errors
    /// [`ImageError`]: it cannot be examined.
    pub fn identity(&self) -> Result<ImageIdentity, ImageError> {
        let metadata = self.file.metadata().map_err(|error| self.config.fail(Problem::Examine(error)))?;
        Ok(ImageIdentity::of(&metadata))
    }

    /// What it was made with.
    pub fn config(&self) -> &ImageConfig {
        &self.config
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.config.path
    }

    /// Sectors that the guest sees. As in QEMU, a last one that is only begun counts: what the file lacks of it reads as zeros,
    /// and is there once it was written.
    pub fn sectors(&self) -> u64 {
        self.len.div_ceil(SECTOR_LEN)
    }

    /// Checks that a disk of `sectors`, which the guest has, still fits into the image as it is now.
    ///
    /// # Errors
    /// [`ImageError`]: the image is shorter.
    pub fn check_room(&self, sectors: u64) -> Result<(), ImageError> {
        let found = len(&self.file).map_err(|error| self.config.fail(Problem::Examine(error)))?;
        if found.div_ceil(SECTOR_LEN) >= sectors {
            return Ok(());
        }
        let expected = sectors.saturating_mul(SECTOR_LEN);
        Err(self.config.fail(Problem::Shorter { found, expected }))
    }
}

fn check_kind(config: &ImageConfig, metadata: &Metadata) -> Result<(), ImageError> {
    let kind = metadata.file_type();
    let other = match () {
        () if kind.is_file() || kind.is_block_device() => return Ok(()),
        () if kind.is_dir() => "a folder",
        () if kind.is_char_device() => "a character device",
        () => "a pipe or a socket",
    };
    Err(config.fail(Problem::Kind(other)))
}

/// The length in bytes. A block device has none in its metadata, but its end can be sought.
fn len(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error;
    use tempfile::{NamedTempFile, TempDir};

    fn image_of(len: u64) -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    fn config(file: &NamedTempFile) -> ImageConfig {
        ImageConfig::new("disk0", file.path())
    }

    fn refusal(result: Result<Image, ImageError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn a_sector_that_is_begun_counts() {
        for (len, sectors) in [(0, 0), (1, 1), (512, 1), (513, 2), (1 << 40, 1 << 31)] {
            let file = image_of(len);
            assert_eq!(Image::open(config(&file)).unwrap().sectors(), sectors, "{len}");
        }
    }

    #[test]
    fn what_is_no_image_is_refused_by_name() {
        let dir = TempDir::new().unwrap();
        let open = |path: &Path| Image::open(ImageConfig::new("disk0", path));
        let missing = open(&dir.path().join("none")).unwrap_err();
        assert!(missing.to_string().contains("/none cannot be opened for reading and writing"), "{missing}");
        assert_eq!(missing.source().unwrap().to_string(), "No such file or directory (os error 2)");
        assert!(refusal(open(dir.path())).contains("is a folder; an image is a regular file"));
        assert!(
            refusal(open(Path::new("/dev/null"))).starts_with("drive disk0: /dev/null is a character device")
        );
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let read_only = ImageConfig { read_only: true, ..ImageConfig::new("disk0", &pipe) };
        assert!(refusal(Image::open(read_only)).contains("is a pipe or a socket"));
    }

    #[test]
    fn two_do_not_use_one_image_unless_they_are_told_to() {
        let file = image_of(512);
        let first = Image::open(config(&file)).unwrap();
        let error = refusal(Image::open(config(&file)));
        assert!(
            error.starts_with(&format!("drive disk0: {} is in use: another process", file.path().display()))
        );
        Image::open(ImageConfig { read_only: true, ..config(&file) }).unwrap_err();
        Image::open(ImageConfig { locking: false, ..config(&file) }).unwrap();
        drop(first);
        let reader = || Image::open(ImageConfig { read_only: true, ..config(&file) });
        let both = (reader().unwrap(), reader().unwrap());
        assert!(refusal(Image::open(config(&file))).ends_with("or use the image with read-only=on"));
        drop(both);
        let sharer = || Image::open(ImageConfig { share_rw: true, ..config(&file) });
        let _both = (sharer().unwrap(), sharer().unwrap());
    }

    /// As it comes over an update: another descriptor of the same open file.
    fn over_an_update(image: &Image) -> Arc<File> {
        Arc::new(image.fd().try_clone().unwrap())
    }

    #[test]
    fn locks_go_with_the_descriptor() {
        let file = image_of(512);
        let old = Image::open(config(&file)).unwrap();
        let new = Image::adopt(config(&file), over_an_update(&old)).unwrap();
        drop(old);
        Image::open(config(&file)).unwrap_err();
        drop(new);
        Image::open(config(&file)).unwrap();
    }

    #[test]
    fn only_the_same_image_is_adopted() {
        let (file, other) = (image_of(1024), image_of(1024));
        let old = Image::open(config(&file)).unwrap();
        let adopt = |config| Image::adopt(config, over_an_update(&old));
        assert!(refusal(adopt(config(&other))).contains("is not the image that the guest has"));
        let read_only = ImageConfig { read_only: true, ..config(&file) };
        assert!(refusal(adopt(read_only)).contains("is read-only by this command line, and was not before"));
        // Another name of it, and none at all.
        let dir = TempDir::new().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(file.path(), &link).unwrap();
        adopt(ImageConfig::new("disk0", link)).unwrap();
        let gone = file.path().to_owned();
        drop(file);
        adopt(ImageConfig::new("disk0", gone)).unwrap();
    }

    #[test]
    fn a_disk_does_not_shrink_over_an_update() {
        let file = image_of(1024);
        let image = Image::open(config(&file)).unwrap();
        image.check_room(2).unwrap();
        let error = image.check_room(3).unwrap_err().to_string();
        assert!(error.contains("has become shorter: 1024 bytes, the guest's disk has 1536"), "{error}");
        image.check_room(u64::MAX).unwrap_err();
        // Also while it is in use.
        file.as_file().set_len(512).unwrap();
        image.check_room(2).unwrap_err();
    }
}
