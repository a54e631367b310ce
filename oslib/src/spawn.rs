#![allow(
    unsafe_code,
    reason = "posix_spawn is called directly, as the standard library passes no descriptors on"
)]
//! A child process that gets exactly the descriptors it is given.
//!
//! [`std::process::Command`] hands on three streams and no other descriptor without code that runs between fork and exec.
//! posix_spawn(3) does it by a list, and copies no page table of a large process. Everything else that this program has open
//! is close-on-exec from birth, so the child does not see it.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;

use crate::exec::PreparedExec;
use crate::pidfd::{Exit, PidFd};
use crate::signals::SignalMask;

/// Where a child's standard streams lead.
#[derive(Debug, Clone, Copy)]
pub struct Streams<'a> {
    /// Standard input.
    pub input: BorrowedFd<'a>,
    /// Standard output and standard error.
    pub output: BorrowedFd<'a>,
}

/// A child process, the leader of a process group of its own. Dropping it [ends](Spawned::end) the group.
///
/// A program that ignores SIGCHLD stops doing so until then, or the kernel would reap the child, and its number could be
/// somebody else's. Have one at a time there.
#[derive(Debug)]
pub struct Spawned {
    pid: libc::pid_t,
    process: PidFd,
    is_reaped: bool,
    _unreaped: Unreaped,
}

/// The kernel leaves children to this process.
struct Unreaped {
    /// What SIGCHLD did before, if that was to have the kernel reap.
    before: Option<libc::sigaction>,
}

impl Unreaped {
    fn new() -> io::Result<Unreaped> {
        let mut before = MaybeUninit::<libc::sigaction>::uninit();
        // SAFETY: a null pointer changes nothing, and the call fills the other structure.
        let before = unsafe {
            Errno::result(libc::sigaction(libc::SIGCHLD, std::ptr::null(), before.as_mut_ptr()))?;
            before.assume_init()
        };
        if before.sa_sigaction != libc::SIG_IGN {
            return Ok(Unreaped { before: None });
        }
        let mut default = before;
        default.sa_sigaction = libc::SIG_DFL;
        // SAFETY: the structure is initialised, and installs no handler.
        Errno::result(unsafe { libc::sigaction(libc::SIGCHLD, &raw const default, std::ptr::null_mut()) })?;
        Ok(Unreaped { before: Some(before) })
    }
}

impl Drop for Unreaped {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // SAFETY: the structure is what the kernel gave, and installs no handler.
            unsafe { libc::sigaction(libc::SIGCHLD, before, std::ptr::null_mut()) };
        }
    }
}

impl std::fmt::Debug for Unreaped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unreaped").field("ignored", &self.before.is_some()).finish()
    }
}

/// How long a killed process may take to end.
const KILLED_WITHIN: Duration = Duration::from_secs(10);

/// Starts `exec`'s program in a child, with `streams` as its standard streams, with each of `given` under the number that it
/// has here, and with `mask` as its signal mask.
///
/// # Errors
/// Those of fork(2) and execve(2): the child is gone then, and reaped. `InvalidInput` for a program by descriptor, or for a
/// standard stream among `given`.
pub fn spawn(
    exec: &PreparedExec,
    streams: Streams<'_>,
    given: &[BorrowedFd<'_>],
    mask: SignalMask,
) -> io::Result<Spawned> {
    let (Some(path), arguments, environment) = exec.parts() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut actions = Actions::new()?;
    actions.duplicate(streams.input, libc::STDIN_FILENO)?;
    actions.duplicate(streams.output, libc::STDOUT_FILENO)?;
    actions.duplicate(streams.output, libc::STDERR_FILENO)?;
    for fd in given {
        if fd.as_raw_fd() <= libc::STDERR_FILENO {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // To itself: that clears close-on-exec in the child (glibc 2.29, and POSIX by now).
        actions.duplicate(*fd, fd.as_raw_fd())?;
    }
    let attributes = Attributes::new(mask)?;
    let unreaped = Unreaped::new()?;
    let mut pid = 0;
    // SAFETY: actions and attributes are initialised; path and arrays are those of `exec`, made for execve(2), which outlives
    // the call.
    check(unsafe {
        libc::posix_spawn(
            &raw mut pid,
            path.as_ptr(),
            &raw const actions.0,
            &raw const attributes.0,
            arguments.as_ptr().cast(),
            environment.as_ptr().cast(),
        )
    })?;
    // Not reaped, so the number is still its own.
    let process = PidFd::open(pid.cast_unsigned()).inspect_err(|_| {
        // SAFETY: the child is not reaped, so nobody else has its number; a null status is allowed.
        unsafe {
            libc::kill(pid, libc::SIGKILL);
            libc::waitpid(pid, std::ptr::null_mut(), 0);
        }
    })?;
    Ok(Spawned { pid, process, is_reaped: false, _unreaped: unreaped })
}

impl Spawned {
    /// The process.
    pub fn process(&self) -> &PidFd {
        &self.process
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid.cast_unsigned()
    }

    /// Kills what is left of the process group, and reaps the child. `None`: it does not end, or was reaped already.
    pub fn end(&mut self) -> Option<Exit> {
        if self.is_reaped {
            return None;
        }
        // SAFETY: takes no pointer. As long as the child is not reaped, no other group has its number.
        unsafe { libc::killpg(self.pid, libc::SIGKILL) };
        // Should it have made another group its own.
        let _ = self.process.kill();
        if !self.process.wait_exited(KILLED_WITHIN).unwrap_or(false) {
            return None;
        }
        self.is_reaped = true;
        self.process.try_reap().ok().flatten()
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        self.end();
    }
}

/// Answers of posix_spawn(3) are error numbers, not -1.
fn check(error: libc::c_int) -> io::Result<()> {
    if error == 0 { Ok(()) } else { Err(Errno::from_raw(error).into()) }
}

struct Actions(libc::posix_spawn_file_actions_t);

impl Actions {
    fn new() -> io::Result<Actions> {
        let mut actions = MaybeUninit::uninit();
        // SAFETY: the call initialises what it is given.
        check(unsafe { libc::posix_spawn_file_actions_init(actions.as_mut_ptr()) })?;
        // SAFETY: it succeeded.
        Ok(Actions(unsafe { actions.assume_init() }))
    }

    fn duplicate(&mut self, fd: BorrowedFd<'_>, number: libc::c_int) -> io::Result<()> {
        // SAFETY: the actions are initialised.
        check(unsafe { libc::posix_spawn_file_actions_adddup2(&raw mut self.0, fd.as_raw_fd(), number) })
    }
}

impl Drop for Actions {
    fn drop(&mut self) {
        // SAFETY: the actions are initialised, and not used after this.
        unsafe { libc::posix_spawn_file_actions_destroy(&raw mut self.0) };
    }
}

struct Attributes(libc::posix_spawnattr_t);

impl Attributes {
    fn new(mask: SignalMask) -> io::Result<Attributes> {
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: the call initialises what it is given.
        check(unsafe { libc::posix_spawnattr_init(attributes.as_mut_ptr()) })?;
        // SAFETY: it succeeded.
        let mut attributes = Attributes(unsafe { attributes.assume_init() });
        let mask = mask.to_sigset();
        let flags = (libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETPGROUP) as libc::c_short;
        // SAFETY: attributes and mask are initialised.
        unsafe {
            check(libc::posix_spawnattr_setsigmask(&raw mut attributes.0, &raw const mask))?;
            check(libc::posix_spawnattr_setpgroup(&raw mut attributes.0, 0))?;
            check(libc::posix_spawnattr_setflags(&raw mut attributes.0, flags))?;
        }
        Ok(attributes)
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: the attributes are initialised, and not used after this.
        unsafe { libc::posix_spawnattr_destroy(&raw mut self.0) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;
    use crate::memfd::Memfd;
    use crate::{cloexec, process};

    const NO_ENV: [(&str, &str); 1] = [("PATH", "/usr/bin:/bin")];

    fn run(script: &str, given: &[BorrowedFd<'_>]) -> (Option<Exit>, String) {
        let null = File::open("/dev/null").unwrap();
        let said = File::from(Memfd::new("said").create().unwrap());
        let exec = PreparedExec::new("/bin/sh", ["sh", "-c", script], NO_ENV).unwrap();
        let streams = Streams { input: null.as_fd(), output: said.as_fd() };
        let mut child = spawn(&exec, streams, given, SignalMask::of(&[10])).unwrap();
        assert!(child.process().wait_exited(Duration::from_secs(20)).unwrap());
        let exit = child.end();
        assert_eq!(child.end(), None);
        (exit, std::io::read_to_string(rewound(said)).unwrap())
    }

    fn rewound(mut file: File) -> File {
        std::io::Seek::rewind(&mut file).unwrap();
        file
    }

    #[test]
    fn it_has_what_it_is_given_and_nothing_else() {
        let mut note = File::from(Memfd::new("note").create().unwrap());
        note.write_all(b"this was given\n").unwrap();
        let secret = File::from(Memfd::new("secret").create().unwrap());
        let note = rewound(note);
        let script = format!("cat <&{}; ls -l /proc/$$/fd; cat; exit 3", note.as_raw_fd());
        let (exit, said) = run(&script, &[note.as_fd()]);
        assert_eq!(exit, Some(Exit::Exited(3)));
        assert!(said.starts_with("this was given\n"), "{said}");
        assert!(said.contains("note") && said.contains("/dev/null") && !said.contains("secret"), "{said}");
        assert!(cloexec::is_set(&note).unwrap() && cloexec::is_set(&secret).unwrap(), "nothing changes here");
        let (_, said) = run("exec grep SigBlk /proc/self/status", &[]);
        assert_eq!(said, "SigBlk:\t0000000000000200\n");
        let (_, said) = run("ps -o pgid= -p $$; echo $$", &[]);
        let numbers: Vec<_> = said.lines().map(str::trim).collect();
        assert_eq!(numbers[0], numbers[1], "a group of its own");
    }

    #[test]
    fn a_program_that_cannot_be_executed_leaves_no_child() {
        let null = File::open("/dev/null").unwrap();
        let streams = Streams { input: null.as_fd(), output: null.as_fd() };
        let exec = PreparedExec::new("/no/such/program", ["x"], NO_ENV).unwrap();
        let error = spawn(&exec, streams, &[], SignalMask::EMPTY).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        let program = File::open("/bin/sh").unwrap().into();
        let exec = PreparedExec::of_descriptor(program, ["x"], NO_ENV).unwrap();
        assert_eq!(
            spawn(&exec, streams, &[], SignalMask::EMPTY).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }

    #[test]
    fn what_it_started_ends_with_it() {
        let null = File::open("/dev/null").unwrap();
        let said = File::from(Memfd::new("said").create().unwrap());
        let exec = PreparedExec::new("/bin/sh", ["sh", "-c", "sleep 1000 & echo $!; wait"], NO_ENV).unwrap();
        let streams = Streams { input: null.as_fd(), output: said.as_fd() };
        let child = spawn(&exec, streams, &[], SignalMask::EMPTY).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        let grandchild = loop {
            let said = std::io::read_to_string(rewound(said.try_clone().unwrap())).unwrap();
            if let Ok(pid) = said.trim().parse() {
                break PidFd::open(pid).unwrap();
            }
            assert!(std::time::Instant::now() < deadline);
        };
        let pid = child.pid();
        drop(child);
        assert!(grandchild.wait_exited(Duration::from_secs(10)).unwrap());
        assert!(process::thread_names(pid).is_err(), "no zombie either");
    }
}
