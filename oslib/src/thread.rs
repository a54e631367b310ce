#![allow(unsafe_code, reason = "threads of the C library are joined, and moved to a CPU, directly")]
//! Threads as the system has them: on which CPUs one may run, and what is left of those that an exec has ended.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;

use nix::errno::Errno;

/// Frees the stack of a thread that ended with another process, whose memory the calling one has: a
/// [keeper](crate::keeper)'s, after the exec. What the thread owned is lost, and the standard library's signal stack with it;
/// if the C library does not take it for ended, its stack is, too.
pub fn bury<T>(thread: JoinHandle<T>) {
    let thread = thread.into_pthread_t();
    // SAFETY: the handle was the only one to join or detach this thread, and is consumed. The kernel tells a thread's end
    // in its memory however it comes about, as long as another process shares that (set_tid_address(2)); the C library
    // goes by this, and then nobody uses the stack any more. It does not wait.
    unsafe { libc::pthread_tryjoin_np(thread, std::ptr::null_mut()) };
}

/// The CPUs on which a thread may run.
#[derive(Clone, Copy)]
pub struct Cpus(libc::cpu_set_t);

impl Cpus {
    /// Those of the calling thread, which the threads that it starts have as well.
    ///
    /// # Errors
    /// Those of sched_getaffinity(2): EINVAL on a machine with more than 1024 CPUs.
    pub fn of_caller() -> io::Result<Self> {
        let mut cpus = Self::none();
        // SAFETY: the kernel writes at most the size that it is told; 0 is the caller.
        Errno::result(unsafe { libc::sched_getaffinity(0, size_of_val(&cpus.0), &raw mut cpus.0) })?;
        Ok(cpus)
    }

    /// All that there can be. Given to a thread: all that its control group lets it have, now and later (cpuset(7)).
    pub fn all() -> Self {
        let mut cpus = Self::none();
        for cpu in 0..Self::ROOM {
            // SAFETY: the set is ours, and has a bit of this number.
            unsafe { libc::CPU_SET(cpu, &mut cpus.0) };
        }
        cpus
    }

    /// Those of a thread of this process.
    ///
    /// # Errors
    /// As [`of_caller`](Self::of_caller); ESRCH if the thread has ended.
    pub fn of<T>(thread: &JoinHandle<T>) -> io::Result<Self> {
        check_runs(thread)?;
        let mut cpus = Self::none();
        // SAFETY: a thread that has a handle can be named by it, even if it has ended. The set is written within its size.
        let error = unsafe {
            libc::pthread_getaffinity_np(thread.as_pthread_t(), size_of_val(&cpus.0), &raw mut cpus.0)
        };
        result(error).map(|()| cpus)
    }

    /// One CPU alone.
    ///
    /// # Panics
    /// If the number is not below 1024.
    pub fn only(cpu: usize) -> Self {
        assert!(cpu < Self::ROOM);
        let mut cpus = Self::none();
        // SAFETY: the set is ours, and has a bit of this number.
        unsafe { libc::CPU_SET(cpu, &mut cpus.0) };
        cpus
    }

    /// Their numbers, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> {
        // SAFETY: the set has bits of these numbers.
        (0..Self::ROOM).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &self.0) })
    }

    /// Has a thread of this process run on these only, from now on.
    ///
    /// # Errors
    /// EINVAL if none of them is one that the thread may be given (cpuset(7)); ESRCH if it has ended.
    pub fn apply_to<T>(&self, thread: &JoinHandle<T>) -> io::Result<()> {
        check_runs(thread)?;
        // SAFETY: as in `of`; the set is only read.
        result(unsafe {
            libc::pthread_setaffinity_np(thread.as_pthread_t(), size_of_val(&self.0), &raw const self.0)
        })
    }

    const ROOM: usize = libc::CPU_SETSIZE as usize;

    fn none() -> Self {
        // SAFETY: a set of bits; all zero is the empty one.
        Self(unsafe { std::mem::zeroed() })
    }
}

impl std::fmt::Debug for Cpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// The C library takes a thread that has ended for the caller (its thread id is 0 then).
fn check_runs<T>(thread: &JoinHandle<T>) -> io::Result<()> {
    if thread.is_finished() { Err(io::Error::from_raw_os_error(libc::ESRCH)) } else { Ok(()) }
}

/// The CPU that the caller runs on, as of a moment ago.
pub fn current_cpu() -> Option<usize> {
    // SAFETY: takes no pointer.
    usize::try_from(unsafe { libc::sched_getcpu() }).ok()
}

/// What a function says that returns its error.
fn result(error: libc::c_int) -> io::Result<()> {
    match error {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_goes_where_it_is_put_and_back() {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let _ = receiver.recv();
            Cpus::of_caller().unwrap().iter().collect::<Vec<_>>()
        });
        let home = Cpus::of(&thread).unwrap();
        let all: Vec<usize> = Cpus::of_caller().unwrap().iter().collect();
        assert_eq!(home.iter().collect::<Vec<_>>(), all);
        let last = *all.last().unwrap();
        Cpus::only(last).apply_to(&thread).unwrap();
        assert_eq!(Cpus::of(&thread).unwrap().iter().collect::<Vec<_>>(), [last]);
        assert_eq!(Cpus::only(1023).apply_to(&thread).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        Cpus::all().apply_to(&thread).unwrap();
        assert!(Cpus::of(&thread).unwrap().iter().count() >= all.len());
        home.apply_to(&thread).unwrap();
        drop(sender);
        assert_eq!(thread.join().unwrap(), all);
    }

    #[test]
    fn a_thread_that_has_ended_is_not_taken_for_the_caller() {
        let thread = std::thread::spawn(|| {});
        while !thread.is_finished() {
            std::thread::yield_now();
        }
        let before: Vec<usize> = Cpus::of_caller().unwrap().iter().collect();
        assert_eq!(Cpus::only(before[0]).apply_to(&thread).unwrap_err().raw_os_error(), Some(libc::ESRCH));
        assert_eq!(Cpus::of_caller().unwrap().iter().collect::<Vec<_>>(), before);
    }

    #[test]
    fn one_that_still_runs_is_not_waited_for() {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        bury(std::thread::spawn(move || receiver.recv()));
        drop(sender);
    }
}
