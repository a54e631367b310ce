//! Files that are to outlive the process: written whole or not at all, and whether they outlive the host as well.
//!
//! Linux promises that rename(2) replaces a name in one step, that O_TMPFILE of open(2) makes a file without a name,
//! and that fsync(2) of a file and then of its folder makes both last. Nothing here locks: two writers of one name are
//! both whole, and the last one stays.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{AT_FDCWD, AtFlags, FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};

/// Permissions of a new file: what a guest had in its memory is its owner's affair.
const MODE: u32 = 0o600;
/// `RAMFS_MAGIC` of linux/magic.h, which libc leaves out.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// A file that appears under its name at once and whole, or not at all.
///
/// Dropped before [`publish`](Self::publish), it leaves nothing behind. Killed, it leaves nothing where the file system
/// knows O_TMPFILE, except in the moment between link and rename; else a file named `.cpr-state-PID-N.tmp`.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    /// The final name.
    path: PathBuf,
    folder: PathBuf,
    /// Where the file is while it has a name that is not the final one.
    temporary: Option<PathBuf>,
}

impl AtomicFile {
    /// Makes the file beside `path`, without touching what is there. A symbolic link is followed.
    ///
    /// # Errors
    /// `path` is something else than a regular file, or its folder cannot be written.
    pub fn create(path: &Path) -> io::Result<AtomicFile> {
        let path = resolve(path)?;
        let folder = match path.parent() {
            Some(folder) if path.file_name().is_some() => folder.to_owned(),
            _ => return Err(io::Error::from_raw_os_error(libc::EISDIR)),
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(MODE);
        let (file, temporary) = match options.clone().custom_flags(libc::O_TMPFILE).open(&folder) {
            Ok(file) => (file, None),
            // EISDIR: a kernel or file system that takes the flag for O_DIRECTORY.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
                let temporary = temporary_name(&folder);
                (options.create_new(true).open(&temporary)?, Some(temporary))
            }
            Err(error) => return Err(error),
        };
        Ok(AtomicFile { file, path, folder, temporary })
    }

    /// The file, for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes what was written last. What is not must not be [published](Self::publish).
    ///
    /// # Errors
    /// Those of fsync(2).
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Gives the file its name, in place of whatever has that name.
    ///
    /// # Errors
    /// Those of linkat(2), rename(2) and fsync(2). The name is as it was then, or, if only the folder could not be made to
    /// last, belongs to nobody.
    pub fn publish(mut self) -> io::Result<File> {
        if self.temporary.is_none() {
            let name = temporary_name(&self.folder);
            let unnamed = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            nix::unistd::linkat(AT_FDCWD, unnamed.as_str(), AT_FDCWD, &name, AtFlags::AT_SYMLINK_FOLLOW)?;
            self.temporary = Some(name);
        }
        if let Some(temporary) = &self.temporary {
            fs::rename(temporary, &self.path)?;
            self.temporary = None;
        }
        if let Err(error) = sync_folder(&self.folder) {
            let _ = fs::remove_file(&self.path);
            return Err(error);
        }
        self.file.try_clone()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = fs::remove_file(temporary);
        }
    }
}

/// The absolute path that a file under this name has, or would have.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    match fs::canonicalize(path) {
        Ok(path) if path.is_file() => Ok(path),
        Ok(path) if path.is_dir() => Err(io::Error::from_raw_os_error(libc::EISDIR)),
        Ok(_) => Err(io::Error::other("it is no regular file")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => match fs::symlink_metadata(path) {
            Ok(_) => Err(io::Error::other("it is a symbolic link that leads nowhere")),
            Err(_) => std::path::absolute(path),
        },
        Err(error) => Err(error),
    }
}

fn temporary_name(folder: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    folder.join(format!(".cpr-state-{}-{count}.tmp", std::process::id()))
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    match File::open(folder)?.sync_all() {
        // A file system that has nothing to write back.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result,
    }
}

/// Whether what is in this file ends with the running kernel: tmpfs, hugetlbfs, ramfs.
///
/// # Errors
/// Those of fstatfs(2).
pub fn is_volatile(fd: impl AsFd) -> io::Result<bool> {
    let kind = fstatfs(fd)?.filesystem_type();
    Ok([TMPFS_MAGIC, HUGETLBFS_MAGIC, RAMFS_MAGIC].contains(&kind))
}

/// Whether this descriptor can be written through.
///
/// # Errors
/// Those of fcntl(2).
pub fn is_writable(fd: impl AsFd) -> io::Result<bool> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    Ok(matches!(flags & OFlag::O_ACCMODE, OFlag::O_RDWR | OFlag::O_WRONLY))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        fs::write(&path, "old").unwrap();
        let written = AtomicFile::create(&path).unwrap();
        written.file().write_all(b"half").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        drop(written);
        assert_eq!(
            (fs::read(&path).unwrap().as_slice(), names(dir.path())),
            (&b"old"[..], vec!["state".into()])
        );

        let written = AtomicFile::create(&path).unwrap();
        written.file().write_all(b"new").unwrap();
        let file = written.publish().unwrap();
        assert_eq!(
            (fs::read(&path).unwrap().as_slice(), names(dir.path())),
            (&b"new"[..], vec!["state".into()])
        );
        assert_eq!(file.metadata().unwrap().ino(), fs::metadata(&path).unwrap().ino());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, MODE);
    }

    #[test]
    fn a_temporary_name_goes_with_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let mut written = AtomicFile::create(&path).unwrap();
        // As on a file system without O_TMPFILE.
        let name = temporary_name(dir.path());
        written.file = File::create_new(&name).unwrap();
        written.temporary = Some(name);
        assert_eq!(names(dir.path()).len(), 1);
        // Nothing can be renamed onto a folder.
        fs::create_dir(&path).unwrap();
        written.publish().unwrap_err();
        assert_eq!(names(dir.path()), ["state"]);
    }

    #[test]
    fn links_are_followed_and_other_things_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("real"), "old").unwrap();
        symlink(at("real"), at("link")).unwrap();
        let written = AtomicFile::create(&at("link")).unwrap();
        written.file().write_all(b"new").unwrap();
        written.publish().unwrap();
        assert_eq!(fs::read(at("real")).unwrap(), b"new");
        assert!(fs::symlink_metadata(at("link")).unwrap().is_symlink());

        symlink(at("nowhere"), at("dangling")).unwrap();
        let refused = |path: &Path| AtomicFile::create(path).unwrap_err().to_string();
        assert!(refused(&at("dangling")).contains("leads nowhere"));
        assert!(refused(dir.path()).contains("directory"), "{}", refused(dir.path()));
        assert!(refused(Path::new("/dev/null")).contains("no regular file"));
        assert!(refused(&at("none/state")).contains("No such file"));
        assert!(refused(&at("real/state")).contains("Not a directory"));
    }

    #[test]
    fn who_can_write() {
        let named = tempfile::NamedTempFile::new().unwrap();
        assert!(!is_writable(File::open(named.path()).unwrap()).unwrap());
        assert!(is_writable(named.as_file()).unwrap());
        assert!(is_writable(OpenOptions::new().append(true).open(named.path()).unwrap()).unwrap());
    }

    #[test]
    fn tmpfs_is_volatile() {
        assert!(is_volatile(File::open("/dev/shm").unwrap()).unwrap());
        assert!(is_volatile(crate::memfd::Memfd::new("m").create().unwrap()).unwrap());
        assert!(!is_volatile(File::open("/proc").unwrap()).unwrap());
    }
}
