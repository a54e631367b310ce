#![allow(unsafe_code, reason = "execve on arrays that were made in advance")]
//! Finding a program and becoming it.
//!
//! [`find_program`] answers *before* an update what execvp(3) would find out too late, and by name. [`PreparedExec`]
//! allocates everything in advance, so that [`PreparedExec::run`] is one system call. Neither clears close-on-exec nor
//! touches signals: see [`crate::cloexec`] and [`crate::signals`]. Execute from the main thread: the kernel gives the
//! process id to whichever thread does it, and watchers of older kernels see that as an end of the process.

use std::ffi::{CStr, CString, OsStr, OsString, c_char};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::sys::stat::Mode;
use nix::unistd::{AccessFlags, faccessat};

/// What execvp(3) searches when `PATH` is not set: `confstr(_CS_PATH)` of the C library.
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// Why a program cannot be executed. Each says its name as it was given or found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProgramError {
    /// No such file; `searched` is the search path, or empty if the name has a slash and none was searched.
    #[error("program {program:?} was not found{}", Searched(.searched))]
    NotFound {
        /// The program.
        program: PathBuf,
        /// The directories that were searched, in order.
        searched: Vec<PathBuf>,
    },
    /// It is a directory.
    #[error("program {program:?} is a directory")]
    IsDirectory {
        /// The program.
        program: PathBuf,
    },
    /// It is neither file nor directory.
    #[error("program {program:?} is not a file")]
    NotAFile {
        /// The program.
        program: PathBuf,
    },
    /// Its mode, or a mount with `noexec`, does not let this user execute it.
    #[error("program {program:?} is not executable")]
    NotExecutable {
        /// The program.
        program: PathBuf,
    },
    /// It cannot be looked at.
    #[error("cannot look at program {program:?}")]
    Io {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
}

struct Searched<'a>(&'a [PathBuf]);

impl fmt::Display for Searched<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut before = " in ";
        for directory in self.0 {
            write!(f, "{before}{}", directory.display())?;
            before = ":";
        }
        Ok(())
    }
}

/// Finds `program` as execvp(3) does: a name with a slash is a path, any other is searched for in the directories of
/// `path_var`, the value of `PATH` (`None`: the default of the C library). The path returned may be relative.
///
/// Whether the kernel will accept the file's *format* shows only at exec.
///
/// # Errors
/// [`ProgramError`]. As with execvp(3), a search goes on past what cannot be executed, and reports the first such
/// thing only if it finds nothing better.
pub fn find_program(program: &OsStr, path_var: Option<&OsStr>) -> Result<PathBuf, ProgramError> {
    if program.is_empty() || program.as_bytes().contains(&b'/') {
        let path = PathBuf::from(program);
        return check_program(&path).map(|()| path);
    }
    let mut searched = Vec::new();
    let mut first_refusal = None;
    let path_var = path_var.unwrap_or(OsStr::new(DEFAULT_PATH));
    for directory in path_var.as_bytes().split(|byte| *byte == b':') {
        // An empty element is the current directory; "./" keeps the result from being searched for again.
        let directory =
            if directory.is_empty() { Path::new(".") } else { Path::new(OsStr::from_bytes(directory)) };
        let candidate = directory.join(program);
        match check_program(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(ProgramError::NotFound { .. }) => {}
            Err(refusal) => {
                first_refusal.get_or_insert(refusal);
            }
        }
        searched.push(directory.to_owned());
    }
    Err(first_refusal.unwrap_or(ProgramError::NotFound { program: program.into(), searched }))
}

fn check_program(path: &Path) -> Result<(), ProgramError> {
    let program = || path.to_owned();
    let metadata = std::fs::metadata(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            ProgramError::NotFound { program: program(), searched: Vec::new() }
        }
        _ => ProgramError::Io { program: program(), source },
    })?;
    if metadata.is_dir() {
        return Err(ProgramError::IsDirectory { program: program() });
    }
    if !metadata.is_file() {
        return Err(ProgramError::NotAFile { program: program() });
    }
    // The kernel's own answer for the effective user: modes, access lists, capabilities and mounts included.
    match faccessat(AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS) {
        Ok(()) => Ok(()),
        Err(Errno::EACCES) => Err(ProgramError::NotExecutable { program: program() }),
        Err(error) => Err(ProgramError::Io { program: program(), source: error.into() }),
    }
}

/// What a file is at one moment: which one it is, and when it was changed. Another, or the same with other content, differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileIdentity {
    file: [u64; 2],
    bytes: u64,
    /// Seconds and nanoseconds of the last change of its content, and of the inode.
    changed: [(i64, i64); 2],
}

impl FileIdentity {
    /// Looks at what `path` leads to.
    ///
    /// # Errors
    /// Those of stat(2).
    pub fn of(path: impl AsRef<Path>) -> io::Result<FileIdentity> {
        let found = std::fs::metadata(path)?;
        Ok(FileIdentity {
            file: [found.dev(), found.ino()],
            bytes: found.size(),
            changed: [(found.mtime(), found.mtime_nsec()), (found.ctime(), found.ctime_nsec())],
        })
    }
}

/// An exec that only has to be done.
///
/// ```no_run
/// # fn main() -> std::io::Result<()> {
/// use oslib::exec::PreparedExec;
///
/// let exec = PreparedExec::new("/usr/bin/cpr-vmm", ["cpr-vmm", "-S"], std::env::vars_os())?;
/// let error = exec.run(); // returns only if it failed
/// # Err(error) }
/// ```
#[derive(Debug)]
pub struct PreparedExec {
    program: Program,
    // The arrays point into these, whose bytes stay where they are when this struct moves.
    _strings: Vec<CString>,
    arguments: Vec<*const c_char>,
    environment: Vec<*const c_char>,
}

#[derive(Debug)]
enum Program {
    Path(CString),
    Descriptor(OwnedFd),
}

/// A system call by number, with its arguments in the kernel's order.
pub(crate) struct SystemCall {
    pub(crate) number: isize,
    pub(crate) arguments: [usize; 5],
}

// SAFETY: the pointers lead only to the strings that the struct itself owns, and nothing changes either after it was
// made.
unsafe impl Send for PreparedExec {}
// SAFETY: as above.
unsafe impl Sync for PreparedExec {}

impl PreparedExec {
    /// Prepares to execute the file `path`, with all arguments (the first is the name that the program sees) and the
    /// whole environment.
    ///
    /// # Errors
    /// `InvalidInput` if there is no argument, if a string holds a NUL byte, or if the name of a variable is empty or holds
    /// an equals sign.
    pub fn new(
        path: impl AsRef<Path>,
        args: impl IntoIterator<Item = impl Into<OsString>>,
        env: impl IntoIterator<Item = (impl Into<OsString>, impl Into<OsString>)>,
    ) -> io::Result<Self> {
        let path = c_string("path", path.as_ref().as_os_str().to_owned())?;
        Self::prepare(Program::Path(path), args, env)
    }

    /// Like [`PreparedExec::new`], for a program by descriptor (`O_PATH` will do), whose file may have been replaced or
    /// deleted. A script is not found this way unless the descriptor survives the exec (execveat(2)).
    ///
    /// # Errors
    /// As [`PreparedExec::new`].
    pub fn of_descriptor(
        program: OwnedFd,
        args: impl IntoIterator<Item = impl Into<OsString>>,
        env: impl IntoIterator<Item = (impl Into<OsString>, impl Into<OsString>)>,
    ) -> io::Result<Self> {
        Self::prepare(Program::Descriptor(program), args, env)
    }

    fn prepare(
        program: Program,
        args: impl IntoIterator<Item = impl Into<OsString>>,
        env: impl IntoIterator<Item = (impl Into<OsString>, impl Into<OsString>)>,
    ) -> io::Result<Self> {
        let mut strings = Vec::new();
        let mut arguments = Vec::new();
        for argument in args {
            push(&mut strings, &mut arguments, c_string("argument", argument.into())?);
        }
        if arguments.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a program needs a name as first argument",
            ));
        }
        let mut environment = Vec::new();
        for (name, value) in env {
            let mut entry = name.into();
            if entry.is_empty() || entry.as_bytes().contains(&b'=') {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("{entry:?} cannot name an environment variable"),
                ));
            }
            entry.push("=");
            entry.push(value.into());
            push(&mut strings, &mut environment, c_string("environment variable", entry)?);
        }
        arguments.push(std::ptr::null());
        environment.push(std::ptr::null());
        Ok(PreparedExec { program, _strings: strings, arguments, environment })
    }

    /// The system call that [`PreparedExec::run`] makes. Its pointers are valid as long as `self`.
    pub(crate) fn system_call(&self) -> SystemCall {
        let (argv, envp) = (self.arguments.as_ptr() as usize, self.environment.as_ptr() as usize);
        match &self.program {
            Program::Path(path) => SystemCall {
                number: libc::SYS_execve as isize,
                arguments: [path.as_ptr() as usize, argv, envp, 0, 0],
            },
            Program::Descriptor(fd) => {
                // The number of a descriptor is never negative.
                let fd = fd.as_raw_fd().cast_unsigned() as usize;
                SystemCall {
                    number: libc::SYS_execveat as isize,
                    arguments: [fd, c"".as_ptr() as usize, argv, envp, libc::AT_EMPTY_PATH as usize],
                }
            }
        }
    }

    /// Path, arguments and environment, the latter two ending in null pointers. `None`: the program is no path.
    pub(crate) fn parts(&self) -> (Option<&CStr>, &[*const c_char], &[*const c_char]) {
        let path = match &self.program {
            Program::Path(path) => Some(path.as_c_str()),
            Program::Descriptor(_) => None,
        };
        (path, &self.arguments, &self.environment)
    }

    /// Replaces this program by the prepared one. Returns only if that failed; then nothing has changed.
    ///
    /// Allocates nothing and takes no lock.
    pub fn run(&self) -> io::Error {
        let (argv, envp) = (self.arguments.as_ptr(), self.environment.as_ptr());
        match &self.program {
            // SAFETY: the path is a C string; both arrays end in a null pointer and point to C strings that `self` owns.
            Program::Path(path) => unsafe {
                libc::execve(path.as_ptr(), argv, envp);
            },
            // SAFETY: as above; the path is empty and the flag says that the descriptor is meant.
            Program::Descriptor(fd) => unsafe {
                let (fd, flags) = (fd.as_raw_fd(), libc::AT_EMPTY_PATH);
                libc::syscall(libc::SYS_execveat, fd, c"".as_ptr(), argv, envp, flags);
            },
        }
        io::Error::last_os_error()
    }

    /// Replaces this program by the prepared one, which starts in `directory` and finds each of `descriptors` under the number beside it, whatever that
    /// number stands for now. The numbers must not be among those of `descriptors` themselves.
    ///
    /// Never returns: if the exec fails this process ends with code 127, because numbers that others own are no longer
    /// theirs. Allocates nothing and takes no lock, so it may be called in a signal handler.
    pub fn run_with(&self, directory: &OwnedFd, descriptors: &[(OwnedFd, RawFd)]) -> ! {
        // SAFETY: takes no pointer. A directory that nobody may enter any more is no reason to give up.
        unsafe { libc::fchdir(directory.as_raw_fd()) };
        for (fd, number) in descriptors {
            // SAFETY: takes no pointer. Whoever owns the number never uses it again: this program ends here.
            unsafe { libc::dup2(fd.as_raw_fd(), *number) };
        }
        self.run();
        // SAFETY: ends the process, without handlers or destructors.
        unsafe { libc::_exit(NOT_EXECUTED) }
    }
}

/// What shells exit with when a program cannot be executed.
const NOT_EXECUTED: libc::c_int = 127;

/// The file that this program was started from, as an `O_PATH` descriptor: what [`PreparedExec::of_descriptor`] can execute
/// even when the file was replaced or deleted meanwhile.
///
/// # Errors
/// Those of opening `/proc/self/exe`.
pub fn this_program() -> io::Result<OwnedFd> {
    Ok(nix::fcntl::open("/proc/self/exe", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// The working directory, as an `O_PATH` descriptor.
///
/// # Errors
/// Those of opening `.`.
pub fn this_directory() -> io::Result<OwnedFd> {
    Ok(nix::fcntl::open(".", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// Prepares and runs at once: see [`PreparedExec::new`] for the arguments. Returns only if it failed.
pub fn exec(
    path: impl AsRef<Path>,
    args: impl IntoIterator<Item = impl Into<OsString>>,
    env: impl IntoIterator<Item = (impl Into<OsString>, impl Into<OsString>)>,
) -> io::Error {
    match PreparedExec::new(path, args, env) {
        Ok(exec) => exec.run(),
        Err(error) => error,
    }
}

fn push(strings: &mut Vec<CString>, pointers: &mut Vec<*const c_char>, string: CString) {
    pointers.push(string.as_ptr());
    strings.push(string);
}

fn c_string(what: &str, string: OsString) -> io::Result<CString> {
    CString::new(string.into_vec()).map_err(|error| {
        let string = String::from_utf8_lossy(&error.into_vec()).into_owned();
        io::Error::new(io::ErrorKind::InvalidInput, format!("{what} {string:?} holds a NUL byte"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File, Permissions};
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    const NO_ENV: [(&str, &str); 0] = [];

    fn put(path: &Path, mode: u32) {
        fs::write(path, "#!/bin/sh\nexit 0\n").unwrap();
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_file_that_was_changed_or_replaced_is_another() {
        let folder = tempfile::tempdir().unwrap();
        let [path, other] = ["program", "other"].map(|name| folder.path().join(name));
        put(&path, 0o755);
        let before = FileIdentity::of(&path).unwrap();
        assert_eq!(FileIdentity::of(&path).unwrap(), before);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let changed = FileIdentity::of(&path).unwrap();
        assert_ne!(changed, before);
        put(&other, 0o644);
        fs::rename(&other, &path).unwrap();
        assert_ne!(FileIdentity::of(&path).unwrap(), changed);
        assert_eq!(FileIdentity::of(&other).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    #[ignore = "it becomes another program"]
    fn becomes_a_shell_that_reads_from_9_in_a_folder() {
        let program = File::open("/bin/sh").unwrap().into();
        let exec = PreparedExec::of_descriptor(program, ["sh", "-c", "cat <&9; pwd"], NO_ENV).unwrap();
        let folder = File::open("/proc").unwrap().into();
        let words = File::from(crate::memfd::Memfd::new("words").create().unwrap());
        std::os::unix::fs::FileExt::write_all_at(&words, b"these words\n", 0).unwrap();
        exec.run_with(&folder, &[(words.into(), 9)]);
    }

    #[test]
    fn descriptors_and_folder_are_given_to_the_program() {
        let name = "exec::tests::becomes_a_shell_that_reads_from_9_in_a_folder";
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", name, "--nocapture"])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.ends_with("these words\n/proc\n"), "{said}");
    }

    #[test]
    fn a_slash_means_no_search() {
        let dir = tempfile::tempdir().unwrap();
        put(&dir.path().join("good"), 0o755);
        put(&dir.path().join("plain"), 0o644);
        let _listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let find = |name: &str| find_program(dir.path().join(name).as_os_str(), None);

        assert_eq!(find("good").unwrap(), dir.path().join("good"));
        assert!(matches!(find("plain").unwrap_err(), ProgramError::NotExecutable { .. }));
        assert!(matches!(find("socket").unwrap_err(), ProgramError::NotAFile { .. }));
        assert!(matches!(find("").unwrap_err(), ProgramError::IsDirectory { .. }));
        assert!(matches!(find("good/beyond").unwrap_err(), ProgramError::NotFound { .. }));
        let missing = find("missing").unwrap_err();
        assert!(matches!(&missing, ProgramError::NotFound { searched, .. } if searched.is_empty()));
        assert_eq!(missing.to_string(), format!("program {:?} was not found", dir.path().join("missing")));
        assert!(matches!(find_program(OsStr::new(""), None).unwrap_err(), ProgramError::NotFound { .. }));
        assert!(matches!(find_program(OsStr::new("a\0/b"), None).unwrap_err(), ProgramError::Io { .. }));
    }

    #[test]
    fn the_search_goes_on_past_what_cannot_be_executed() {
        let dir = tempfile::tempdir().unwrap();
        let [first, second, third] = ["first", "second", "third"].map(|name| dir.path().join(name));
        for directory in [&first, &second, &third] {
            fs::create_dir(directory).unwrap();
        }
        put(&first.join("program"), 0o644);
        fs::create_dir(second.join("program")).unwrap();
        let path = |directories: &[&PathBuf]| std::env::join_paths(directories).unwrap();
        let find = |path: OsString| find_program(OsStr::new("program"), Some(&path));

        let refusal = find(path(&[&third, &first, &second])).unwrap_err();
        assert!(
            matches!(refusal, ProgramError::NotExecutable { program } if program == first.join("program"))
        );
        let refusal = find(path(&[&second, &first])).unwrap_err();
        assert!(
            matches!(refusal, ProgramError::IsDirectory { program } if program == second.join("program"))
        );
        let missing = find(path(&[&third, &dir.path().join("none")])).unwrap_err();
        assert_eq!(
            missing.to_string(),
            format!("program \"program\" was not found in {}:{}/none", third.display(), dir.path().display())
        );
        put(&third.join("program"), 0o755);
        assert_eq!(find(path(&[&first, &second, &third])).unwrap(), third.join("program"));
    }

    #[test]
    fn default_path_and_empty_elements() {
        assert!(find_program(OsStr::new("sh"), None).unwrap().is_absolute());
        assert_eq!(
            find_program(OsStr::new("Cargo.toml"), Some(OsStr::new(""))).unwrap_err().to_string(),
            "program \"./Cargo.toml\" is not executable"
        );
    }

    #[test]
    fn what_cannot_be_an_argument() {
        let error = PreparedExec::new("/bin/true", ["true", "a\0b"], NO_ENV).unwrap_err();
        assert_eq!(error.to_string(), "argument \"a\\0b\" holds a NUL byte");
        assert!(PreparedExec::new("/bin/\0true", ["true"], NO_ENV).is_err());
        assert!(PreparedExec::new("/bin/true", ["true"], [("A", "\0")]).is_err());
        assert!(PreparedExec::new("/bin/true", ["true"], [("A=B", "C")]).is_err());
        assert!(PreparedExec::new("/bin/true", ["true"], [("", "C")]).is_err());
        assert!(PreparedExec::new("/bin/true", Vec::<String>::new(), NO_ENV).is_err());
    }

    #[test]
    fn a_failed_exec_returns() {
        assert_eq!(exec("/does/not/exist", ["x"], NO_ENV).kind(), io::ErrorKind::NotFound);
        let text = tempfile::NamedTempFile::new().unwrap();
        fs::write(text.path(), "neither ELF nor script").unwrap();
        fs::set_permissions(text.path(), Permissions::from_mode(0o755)).unwrap();
        assert_eq!(exec(text.path(), ["x"], NO_ENV).raw_os_error(), Some(libc::ETXTBSY));
        let path = text.into_temp_path();
        assert_eq!(exec(&path, ["x"], NO_ENV).raw_os_error(), Some(libc::ENOEXEC));
    }

    /// Runs `prepared` in a child process and returns what it prints.
    fn output_of(prepared: PreparedExec) -> String {
        let mut command = Command::new("/bin/false");
        command.stdout(Stdio::piped());
        // SAFETY: `run` is one system call, which a child of fork may make.
        unsafe { command.pre_exec(move || Err(prepared.run())) };
        let mut child = command.spawn().unwrap();
        let mut output = String::new();
        child.stdout.take().unwrap().read_to_string(&mut output).unwrap();
        assert!(child.wait().unwrap().success());
        output
    }

    #[test]
    fn arguments_and_environment_arrive() {
        let args = ["renamed", "-c", "echo $0 $1 $A; env | grep -c ^HOME=; true", "zero", "one"];
        let prepared = PreparedExec::new("/bin/sh", args, [("A", "value=with=equals")]).unwrap();
        let moved = Box::new(prepared);
        assert_eq!(output_of(*moved), "zero one value=with=equals\n0\n");
    }

    #[test]
    fn a_deleted_program_runs_by_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let copy = dir.path().join("copy");
        fs::copy("/bin/echo", &copy).unwrap();
        let fd = OwnedFd::from(File::open(&copy).unwrap());
        fs::remove_file(&copy).unwrap();
        assert_eq!(
            output_of(PreparedExec::of_descriptor(fd, ["echo", "still here"], NO_ENV).unwrap()),
            "still here\n"
        );
    }
}
