#![allow(unsafe_code, reason = "pidfd_open, pidfd_getfd, pidfd_send_signal and waitid are called directly")]
//! A process by descriptor instead of by number: it is never somebody else.
//!
//! Open it while the number cannot have been reused: for a child that was not reaped, for oneself, for a number that a
//! trusted party vouches for. [`PidFd::reap`] is for children only, those made by clone(2) with another exit signal
//! than SIGCHLD included. See pidfd_open(2), pidfd_send_signal(2) and waitid(2).

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;

use crate::retry;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this exit code (0 to 255).
    Exited(i32),
    /// By this signal.
    Signaled(i32),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Exited(code) => write!(f, "exited with code {code}"),
            Exit::Signaled(signal) => write!(f, "was killed by signal {signal}"),
        }
    }
}

/// A descriptor of a process, close-on-exec. It becomes readable (poll(2)) when the process has ended.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Opens the process that has the number `pid` now.
    ///
    /// # Errors
    /// ESRCH if there is none, EINVAL if `pid` is no number of a process.
    pub fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: takes no pointer. The kernel checks the number.
        let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
        // SAFETY: the kernel has just made this descriptor for us. It is an int, returned in a long.
        Ok(PidFd(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }))
    }

    /// Opens the calling process, for others to watch it.
    ///
    /// # Errors
    /// Those of pidfd_open(2).
    pub fn of_self() -> io::Result<Self> {
        Self::open(std::process::id())
    }

    /// A copy, close-on-exec, of the process's descriptor `number`: another number for the same open file.
    ///
    /// # Errors
    /// EBADF if it has no such descriptor, EPERM if the caller may not trace it, ESRCH if it is gone.
    pub fn copy_descriptor(&self, number: RawFd) -> io::Result<OwnedFd> {
        // SAFETY: takes no pointer. The kernel checks both numbers.
        let fd =
            Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.0.as_raw_fd(), number, 0) })?;
        // SAFETY: the kernel has just made this descriptor for us. It is an int, returned in a long.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
    }

    /// Sends a signal; 0 only asks whether there is still a process, a zombie included.
    ///
    /// # Errors
    /// ESRCH if it was reaped, EPERM, EINVAL for a number that is no signal.
    pub fn send_signal(&self, signal: i32) -> io::Result<()> {
        let info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: a null siginfo is allowed and means "as kill(2) would".
        Errno::result(unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), signal, info, 0)
        })?;
        Ok(())
    }

    /// Sends SIGKILL. A process that is gone already has had what it was to get.
    ///
    /// # Errors
    /// EPERM.
    pub fn kill(&self) -> io::Result<()> {
        match self.send_signal(libc::SIGKILL) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            result => result,
        }
    }

    /// Whether the process has ended, reaped or not.
    ///
    /// # Errors
    /// Those of poll(2).
    pub fn is_exited(&self) -> io::Result<bool> {
        self.wait_exited(Duration::ZERO)
    }

    /// Waits `timeout` at most for the process to end, and returns whether it has.
    ///
    /// # Errors
    /// Those of poll(2).
    pub fn wait_exited(&self, timeout: Duration) -> io::Result<bool> {
        retry::wait_readable(self.0.as_fd(), Some(timeout))
    }

    /// How the process ended, if it has and the kernel tells: of any process, child or not. `None` also where it cannot be
    /// told: before Linux 6.15 the kernel forgets a process once its parent has reaped it.
    pub fn ended_how(&self) -> Option<Exit> {
        let status = self.status_after_reaping().or_else(|| self.status_of_zombie())?;
        Some(if libc::WIFSIGNALED(status) {
            Exit::Signaled(libc::WTERMSIG(status))
        } else {
            Exit::Exited(libc::WEXITSTATUS(status))
        })
    }

    /// `PIDFD_GET_INFO` of linux/pidfd.h, with the first version of its structure.
    fn status_after_reaping(&self) -> Option<i32> {
        #[repr(C)]
        #[derive(Default)]
        struct PidFdInfo {
            mask: u64,
            cgroup: u64,
            ids: [u32; 11],
            exit_code: i32,
        }
        /// `_IOWR(0xff, 11, struct pidfd_info)`.
        const PIDFD_GET_INFO: libc::c_ulong = 0xc040_ff0b;
        const PIDFD_INFO_EXIT: u64 = 1 << 3;
        let mut info = PidFdInfo { mask: PIDFD_INFO_EXIT, ..PidFdInfo::default() };
        // SAFETY: the number encodes the size of the structure, 64 bytes, to which the kernel writes.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), PIDFD_GET_INFO as _, &raw mut info) };
        (done == 0 && info.mask & PIDFD_INFO_EXIT != 0).then_some(info.exit_code)
    }

    /// The last field of `/proc/<pid>/stat` (proc(5)).
    fn status_of_zombie(&self) -> Option<i32> {
        let fdinfo = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.0.as_raw_fd())).ok()?;
        let pid: u32 = fdinfo.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // It is still this process if it was not reaped up to here.
        self.send_signal(0).ok()?;
        let (_, fields) = stat.rsplit_once(')')?;
        let state = fields.trim_start().chars().next()?;
        matches!(state, 'Z' | 'X').then(|| fields.split_ascii_whitespace().last()?.parse().ok())?
    }

    /// Waits for the process, a child of this one, and removes it from the process table.
    ///
    /// # Errors
    /// ECHILD if it is no child, was reaped already, or was reaped by the kernel because SIGCHLD is ignored.
    pub fn reap(&self) -> io::Result<Exit> {
        loop {
            if let Some(exit) = self.wait(0)? {
                return Ok(exit);
            }
        }
    }

    /// Like [`PidFd::reap`], without waiting: `None` while the process runs.
    ///
    /// # Errors
    /// As [`PidFd::reap`].
    pub fn try_reap(&self) -> io::Result<Option<Exit>> {
        self.wait(libc::WNOHANG)
    }

    fn wait(&self, flags: libc::c_int) -> io::Result<Option<Exit>> {
        // __WALL: a child whose exit signal is not SIGCHLD is invisible without it.
        let flags = flags | libc::WEXITED | libc::__WALL;
        // The number of a descriptor is never negative.
        let id = self.0.as_raw_fd().cast_unsigned();
        // SAFETY: siginfo_t is a plain C structure for which all zeros means "no child".
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // Not nix's waitid: it fails on a child that a real-time signal killed, after having reaped it.
        retry::on_eintr(|| {
            // SAFETY: `info` is a valid siginfo_t to write to.
            Errno::result(unsafe { libc::waitid(libc::P_PIDFD, id, &raw mut info, flags) })
        })?;
        // SAFETY: waitid fills the fields of a child, and without a child leaves them zero.
        let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
        if pid == 0 {
            return Ok(None);
        }
        Ok(Some(if info.si_code == libc::CLD_EXITED { Exit::Exited(status) } else { Exit::Signaled(status) }))
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for PidFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Adopts a descriptor that is a pidfd already, from another process for example. Anything else shows as an error of
/// the calls that follow.
impl From<OwnedFd> for PidFd {
    fn from(fd: OwnedFd) -> Self {
        PidFd(fd)
    }
}

impl From<PidFd> for OwnedFd {
    fn from(pidfd: PidFd) -> Self {
        pidfd.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    use crate::cloexec;

    /// A child that is reaped by its pidfd.
    fn spawn(program: &str, args: &[&str]) -> PidFd {
        #[expect(clippy::zombie_processes, reason = "reaping it is what is tested")]
        let child = Command::new(program).args(args).spawn().unwrap();
        PidFd::open(child.id()).unwrap()
    }

    #[test]
    fn a_copied_descriptor_is_the_same_open_file() {
        use std::io::{Seek, SeekFrom, Write};

        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        let process = PidFd::of_self().unwrap();
        let mut copy = std::fs::File::from(process.copy_descriptor(file.as_raw_fd()).unwrap());
        assert!(cloexec::is_set(&copy).unwrap());
        assert_eq!(copy.stream_position().unwrap(), 7);
        copy.seek(SeekFrom::Start(2)).unwrap();
        assert_eq!(file.stream_position().unwrap(), 2);
        assert_eq!(process.copy_descriptor(1 << 20).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn how_a_process_ended_is_told_without_reaping_it() {
        for (script, how) in [("exit 3", Exit::Exited(3)), ("kill -TERM $$", Exit::Signaled(libc::SIGTERM))] {
            let mut child = std::process::Command::new("sh").args(["-c", script]).spawn().unwrap();
            let pidfd = PidFd::open(child.id()).unwrap();
            assert!(pidfd.wait_exited(Duration::from_secs(30)).unwrap());
            assert_eq!(pidfd.ended_how(), Some(how));
            child.wait().unwrap();
            // Later kernels know it still.
            assert!(pidfd.ended_how().is_none_or(|told| told == how));
        }
        assert_eq!(PidFd::of_self().unwrap().ended_how(), None);
    }

    #[test]
    fn a_child_that_exits() {
        let pidfd = spawn("/bin/sh", &["-c", "exit 7"]);
        assert!(cloexec::is_set(&pidfd).unwrap());
        assert!(pidfd.wait_exited(Duration::from_secs(10)).unwrap());
        // Ended, not reaped.
        pidfd.send_signal(0).unwrap();
        assert_eq!(pidfd.try_reap().unwrap(), Some(Exit::Exited(7)));
        assert!(pidfd.is_exited().unwrap());
        assert_eq!(pidfd.send_signal(0).unwrap_err().raw_os_error(), Some(libc::ESRCH));
        assert_eq!(pidfd.reap().unwrap_err().raw_os_error(), Some(libc::ECHILD));
    }

    #[test]
    fn a_child_that_is_killed() {
        // A real-time signal has no name, and must come out all the same.
        for signal in [libc::SIGKILL, libc::SIGRTMIN() + 3] {
            let pidfd = spawn("sleep", &["100"]);
            assert!(!pidfd.is_exited().unwrap());
            assert!(!pidfd.wait_exited(Duration::from_millis(5)).unwrap());
            assert_eq!(pidfd.try_reap().unwrap(), None);
            pidfd.send_signal(signal).unwrap();
            assert_eq!(pidfd.reap().unwrap(), Exit::Signaled(signal));
        }
    }

    #[test]
    fn self_is_alive() {
        let pidfd = PidFd::of_self().unwrap();
        assert!(!pidfd.is_exited().unwrap());
        assert_eq!(pidfd.reap().unwrap_err().raw_os_error(), Some(libc::ECHILD));
        let again = PidFd::from(OwnedFd::from(pidfd));
        again.send_signal(0).unwrap();
    }

    #[test]
    fn numbers_of_nobody() {
        assert_eq!(PidFd::open(0).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert_eq!(PidFd::open(u32::MAX).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert_eq!(PidFd::open(0x3fff_ffff).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }
}
