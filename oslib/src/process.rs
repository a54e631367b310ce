#![allow(unsafe_code, reason = "scheduling attributes and close_range are set directly")]
//! What a process holds, as seen from outside, and a few attributes of the calling one.
//!
//! The questions are for leak tests and reports: descriptors, threads, memory, as `/proc` tells them (proc(5)). They say
//! what was so at one moment; nothing here may decide who owns a descriptor.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use nix::sys::{prctl, stat::Mode};
use nix::unistd::{SysconfVar, sysconf};

/// How nice a process is that has stepped aside: about a tenth of the CPU time of an ordinary one.
const ASIDE: i32 = 10;

/// Ends this process in the way that disturbs others least, at once and without running any handler or destructor.
///
/// First it closes all descriptors but those in `slow`, whose last close takes long: peers see the end of their connections
/// now. Then it steps down in priority, offers itself to the OOM killer, and leaves the rest, which is to tear down its
/// address space, to the kernel.
pub fn step_aside(mut slow: Vec<RawFd>, code: i32) -> ! {
    slow.retain(|&fd| fd >= 0);
    slow.sort_unstable();
    let mut from = 0;
    for number in slow.into_iter().map(RawFd::cast_unsigned) {
        if from < number {
            close_range(from, number - 1);
        }
        from = from.max(number + 1);
    }
    close_range(from, u32::MAX);
    // Not SCHED_IDLE: beside guests that keep every CPU busy it would hardly run at all, and it would do so holding what
    // others wait for (the kernel's SRCU of MMU notifiers, which all VMs share).
    let _ = set_policy(0, libc::SCHED_BATCH);
    // SAFETY: takes no pointer; process 0 is the caller.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, ASIDE) };
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}

fn close_range(first: u32, last: u32) {
    // SAFETY: takes no pointer. Whatever owns one of these descriptors is never used again: its process ends.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

/// Schedules `pid` as an ordinary process again, if it stepped down (sched(7), setpriority(2)).
///
/// # Errors
/// EACCES or EPERM without `CAP_SYS_NICE` or a permissive `RLIMIT_NICE`; ESRCH if there is no such process.
pub fn schedule_normally(pid: u32) -> io::Result<()> {
    let pid = i32::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    set_policy(pid, libc::SCHED_OTHER)?;
    // SAFETY: takes no pointer.
    Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, pid.cast_unsigned(), 0) })?;
    Ok(())
}

/// Schedules the calling thread as an ordinary one (sched(7)). Allowed to everybody, whatever it was.
///
/// # Errors
/// None that the kernel documents.
pub(crate) fn schedule_thread_normally() -> io::Result<()> {
    set_policy(0, libc::SCHED_OTHER)
}

/// Gives `pid`, or the calling thread for 0, a policy without a priority of its own. `SCHED_RESET_ON_FORK` stays if it is
/// set: to take it back is a privilege, which its setting is not, and what is ordinary has no use for it.
fn set_policy(pid: i32, policy: libc::c_int) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: takes no pointer.
    let kept = Errno::result(unsafe { libc::sched_getscheduler(pid) })? & libc::SCHED_RESET_ON_FORK;
    // SAFETY: the parameters outlive the call, which only reads them.
    Errno::result(unsafe { libc::sched_setscheduler(pid, policy | kept, &raw const parameters) })?;
    Ok(())
}

/// The time slice of the calling thread; zero where the kernel does not tell.
///
/// # Errors
/// ENOSYS or EPERM where a sandbox has no such call.
pub(crate) fn time_slice() -> io::Result<Duration> {
    Ok(Duration::from_nanos(scheduling(0)?.sched_runtime))
}

fn scheduling(pid: u32) -> io::Result<libc::sched_attr> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    attributes.size = u32::try_from(size_of_val(&attributes)).map_err(|_| io::ErrorKind::InvalidInput)?;
    let size = attributes.size;
    // SAFETY: the kernel writes at most `size` bytes, which are there.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_getattr, pid, &raw mut attributes, size, 0) })?;
    attributes.size = size;
    Ok(attributes)
}

/// Gives the main thread of `pid`, or the calling thread for 0, another time slice, and returns the one that it had; zero is what
/// the system gives. A thread with a shorter slice runs before one with a longer when it wakes. Kernels before 6.12 take
/// no notice.
///
/// # Errors
/// EPERM for another user's process, ESRCH if there is none; ENOSYS or EPERM where a sandbox has no such call.
pub(crate) fn set_time_slice(pid: u32, slice: Duration) -> io::Result<Duration> {
    let mut attributes = scheduling(pid)?;
    let before = Duration::from_nanos(attributes.sched_runtime);
    attributes.sched_runtime = u64::try_from(slice.as_nanos()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the kernel reads `size` bytes.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_setattr, pid, &raw const attributes, 0) })?;
    Ok(before)
}

/// The user id that this process acts as.
pub fn effective_uid() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// The name of the calling thread, at most 15 bytes. The main thread's is what ps(1) calls the process's command.
///
/// # Errors
/// None that the kernel documents.
pub fn name() -> io::Result<CString> {
    Ok(prctl::get_name()?)
}

/// Gives the calling thread another [name](fn@name).
///
/// # Errors
/// None that the kernel documents.
pub fn set_name(name: &CStr) -> io::Result<()> {
    Ok(prctl::set_name(name)?)
}

/// The numbers of the descriptors that this process has open, ascending.
///
/// # Errors
/// Those of reading `/proc/self/fd`.
pub fn open_fds() -> io::Result<Vec<RawFd>> {
    open_fds_in("/proc/self/fd".into())
}

/// The numbers of the descriptors that process `pid` has open, ascending.
///
/// # Errors
/// Those of reading `/proc/<pid>/fd`: `NotFound` if there is no such process, `PermissionDenied` if it is not ours to see.
pub fn open_fds_of(pid: u32) -> io::Result<Vec<RawFd>> {
    if pid == std::process::id() {
        return open_fds();
    }
    open_fds_in(format!("/proc/{pid}/fd").into())
}

fn open_fds_in(path: PathBuf) -> io::Result<Vec<RawFd>> {
    let mut dir = Dir::open(&path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    // In one's own listing, the descriptor that lists is listed, too.
    let lister = path.starts_with("/proc/self").then(|| dir.as_raw_fd());
    let mut numbers = Vec::new();
    for entry in dir.iter() {
        if let Some(number) = entry?.file_name().to_str().ok().and_then(|name| name.parse().ok())
            && Some(number) != lister
        {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// The names of the threads of process `pid`, the main thread first, then by age. A thread that ends meanwhile may be
/// left out.
///
/// # Errors
/// Those of reading `/proc/<pid>/task`.
pub fn thread_names(pid: u32) -> io::Result<Vec<String>> {
    let mut threads: Vec<u32> = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        threads.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    threads.sort_unstable_by_key(|thread| (*thread != pid, *thread));
    let mut names = Vec::new();
    for thread in threads {
        match fs::read(format!("/proc/{pid}/task/{thread}/comm")) {
            Ok(name) => names.push(String::from_utf8_lossy(&name).trim_end_matches('\n').to_owned()),
            Err(error)
                if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(names)
}

/// The memory of process `pid` that is resident, in bytes: private and shared, as `VmRSS` counts it, which may lag by some
/// hundred KiB per CPU.
///
/// # Errors
/// Those of reading `/proc/<pid>/statm`; `InvalidData` if it is not what proc(5) says.
pub fn rss_bytes(pid: u32) -> io::Result<u64> {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm"))?;
    let pages: u64 =
        statm.split_ascii_whitespace().nth(1).and_then(|pages| pages.parse().ok()).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/statm: {statm:?}"))
        })?;
    let page_bytes = sysconf(SysconfVar::PAGE_SIZE)?.ok_or(io::ErrorKind::Unsupported)?;
    Ok(pages * page_bytes.cast_unsigned())
}

/// Has the kernel send `signal` to this process when the *thread* that spawned it ends; `None` for nothing.
///
/// Forgotten by fork(2), kept by execve(2). A parent that ended before the call is not noticed: look at getppid(2) after
/// it. See PR_SET_PDEATHSIG(2const).
///
/// # Errors
/// `InvalidInput` (EINVAL) for a number that is no named signal.
pub fn set_pdeathsig(signal: Option<i32>) -> io::Result<()> {
    let signal = signal.map(Signal::try_from).transpose()?;
    Ok(prctl::set_pdeathsig(signal)?)
}

/// Makes this process the one that inherits the orphans among its descendants, in place of pid 1, or no longer.
///
/// # Errors
/// None that the kernel documents.
pub fn set_child_subreaper(on: bool) -> io::Result<()> {
    Ok(prctl::set_child_subreaper(on)?)
}

/// Sets or clears `O_NONBLOCK`. It belongs to the open file: every duplicate, in every process, changes with it.
///
/// # Errors
/// Those of fcntl(2).
pub fn set_nonblocking(fd: impl AsFd, on: bool) -> io::Result<()> {
    let fd = fd.as_fd();
    let mut flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_NONBLOCK, on);
    fcntl(fd, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

/// Whether `O_NONBLOCK` is set.
///
/// # Errors
/// Those of fcntl(2).
pub fn is_nonblocking(fd: impl AsFd) -> io::Result<bool> {
    Ok(OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?).contains(OFlag::O_NONBLOCK))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn what_a_child_holds_is_seen_until_it_is_reaped() {
        let mut child = Command::new("sleep")
            .arg("100")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // It is named late in its exec.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while thread_names(child.id()).unwrap() != ["sleep"] {
            assert!(std::time::Instant::now() < deadline);
            std::thread::yield_now();
        }
        // It may have inherited more than its standard streams from whoever runs the tests.
        let mut listed: Vec<RawFd> = fs::read_dir(format!("/proc/{}/fd", child.id()))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
            .collect();
        listed.sort_unstable();
        assert_eq!(listed[..3], [0, 1, 2]);
        assert_eq!(open_fds_of(child.id()).unwrap(), listed);
        assert!(rss_bytes(child.id()).unwrap() > 4096);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(open_fds_of(child.id()).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(thread_names(child.id()).is_err() && rss_bytes(child.id()).is_err());
    }

    #[test]
    fn own_descriptors_without_the_one_that_lists() {
        let file = fs::File::open("/dev/null").unwrap();
        let number = file.as_raw_fd();
        assert!(open_fds().unwrap().contains(&number));
        assert!(open_fds_of(std::process::id()).unwrap().contains(&number));
    }

    #[test]
    fn own_threads_are_named() {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name("a-named-thread".into()).spawn(move || {
            let _ = receiver.recv();
        });
        // The thread names itself, some time after it was started.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !thread_names(std::process::id()).unwrap().iter().any(|name| name == "a-named-thread") {
            assert!(std::time::Instant::now() < deadline);
            std::thread::yield_now();
        }
        drop(sender);
        thread.unwrap().join().unwrap();
    }

    #[test]
    fn resident_memory_grows_with_what_is_touched() {
        let before = rss_bytes(std::process::id()).unwrap();
        let block = vec![1u8; 64 << 20];
        assert!(rss_bytes(std::process::id()).unwrap() > before + (32 << 20));
        drop(std::hint::black_box(block));
    }

    #[test]
    fn a_process_has_a_name() {
        std::thread::spawn(|| {
            set_name(c"renamed").unwrap();
            assert_eq!(fs::read_to_string("/proc/thread-self/comm").unwrap(), "renamed\n");
        })
        .join()
        .unwrap();
        assert!(!name().unwrap().is_empty() && name().unwrap().as_bytes() != b"renamed");
    }

    #[test]
    fn nonblocking_is_of_the_open_file() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let duplicate = socket.try_clone().unwrap();
        assert!(!is_nonblocking(&socket).unwrap());
        set_nonblocking(&socket, true).unwrap();
        assert!(is_nonblocking(&duplicate).unwrap());
        set_nonblocking(&duplicate, false).unwrap();
        assert!(!is_nonblocking(&socket).unwrap());
    }

    #[test]
    fn attributes_that_are_no_signal() {
        assert_eq!(set_pdeathsig(Some(99)).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        set_pdeathsig(Some(libc::SIGKILL)).unwrap();
        set_pdeathsig(None).unwrap();
    }
}
