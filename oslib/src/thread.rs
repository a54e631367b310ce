#![allow(unsafe_code, reason = "threads of the C library are started, joined, and moved to a CPU, directly")]
//! Threads as the system has them: on which CPUs one may run, and what is left of those that an exec has ended.

use std::ffi::CString;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;

/// A thread that was started in a moment that counts. The standard library gives each of its own a stack for the handlers of
/// signals, which takes longer to make than the thread; without one, a thread whose stack overflows ends the process without
/// a word.
pub struct Thread {
    /// As long as it is to be joined or detached.
    id: Option<libc::pthread_t>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Once the thread runs.
    parker: OnceLock<std::thread::Thread>,
    ended: AtomicBool,
}

/// What a thread begins with.
struct Start {
    name: CString,
    body: Box<dyn FnOnce() + Send>,
    shared: Arc<Shared>,
}

impl Start {
    fn run(self) {
        // Nothing but its name.
        let _ = crate::process::set_name(&self.name);
        let _ = self.shared.parker.set(std::thread::current());
        // The panic has been told, and goes no further than the thread.
        let _ = catch_unwind(AssertUnwindSafe(self.body));
        self.shared.ended.store(true, Ordering::Release);
    }
}

impl Thread {
    /// Starts a thread with a stack of so many bytes; the system shows the first 15 bytes of `name`.
    ///
    /// # Errors
    /// Those of pthread_create(3): EAGAIN where there may be no more threads. EINVAL for a name with a NUL in it.
    pub fn spawn(name: &str, stack_len: usize, body: impl FnOnce() + Send + 'static) -> io::Result<Thread> {
        extern "C" fn begin(start: *mut libc::c_void) -> *mut libc::c_void {
            // SAFETY: the box that `spawn` gave away, to this thread alone.
            unsafe { Box::from_raw(start.cast::<Start>()) }.run();
            std::ptr::null_mut()
        }
        let shared = Arc::<Shared>::default();
        let start = Start { name: CString::new(name)?, body: Box::new(body), shared: Arc::clone(&shared) };
        let attributes = Attributes::with_stack(stack_len)?;
        let start = Box::into_raw(Box::new(start));
        let mut id = 0;
        // SAFETY: the attributes were initialised; `begin` takes what it is given, which is plain heap memory of a type that
        // may be sent to another thread.
        let created = result(unsafe {
            libc::pthread_create(&raw mut id, &raw const attributes.0, begin, start.cast())
        });
        if let Err(error) = created {
            // SAFETY: no thread was started that would have taken it.
            drop(unsafe { Box::from_raw(start) });
            return Err(error);
        }
        Ok(Thread { id: Some(id), shared })
    }

    /// Waits for the thread's end.
    pub fn join(mut self) {
        if let Some(id) = self.id.take() {
            // SAFETY: this was the only one to join or detach the thread.
            unsafe { libc::pthread_join(id, std::ptr::null_mut()) };
        }
    }

    /// Frees the stack of a thread that ended with another process, whose memory the calling one has: a
    /// [keeper](crate::keeper)'s, after the exec. What the thread owned is lost; if the C library does not take it for ended,
    /// its stack is, too.
    pub fn bury(mut self) {
        if let Some(id) = self.id.take() {
            // SAFETY: this was the only one to join or detach the thread. The kernel tells a thread's end in its memory however
            // it comes about, as long as another process shares that (set_tid_address(2)); the C library goes by this, and then
            // nobody uses the stack any more. It does not wait.
            unsafe { libc::pthread_tryjoin_np(id, std::ptr::null_mut()) };
        }
    }

    /// Wakes the thread from [`std::thread::park`]. One that has not begun cannot be there.
    pub fn unpark(&self) {
        if let Some(parker) = self.shared.parker.get() {
            parker.unpark();
        }
    }

    /// Whether the thread has come to its end.
    pub fn is_finished(&self) -> bool {
        self.shared.ended.load(Ordering::Acquire)
    }

    /// The thread for the C library, which takes one that has ended for the caller (its thread id is 0 then).
    fn running(&self) -> io::Result<libc::pthread_t> {
        self.id.filter(|_| !self.is_finished()).ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
    }
}

impl Drop for Thread {
    /// The thread goes on, by itself.
    fn drop(&mut self) {
        if let Some(id) = self.id.take() {
            // SAFETY: nobody has joined or detached it.
            unsafe { libc::pthread_detach(id) };
        }
    }
}

struct Attributes(libc::pthread_attr_t);

impl Attributes {
    fn with_stack(len: usize) -> io::Result<Self> {
        // SAFETY: plain data, which pthread_attr_init(3) fills.
        let mut attributes = Self(unsafe { std::mem::zeroed() });
        // SAFETY: ours, and not in use.
        result(unsafe { libc::pthread_attr_init(&raw mut attributes.0) })?;
        // SAFETY: initialised just before.
        result(unsafe { libc::pthread_attr_setstacksize(&raw mut attributes.0, len) })?;
        Ok(attributes)
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: initialised, or zeroes, which own nothing.
        unsafe { libc::pthread_attr_destroy(&raw mut self.0) };
    }
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
    pub fn of(thread: &Thread) -> io::Result<Self> {
        let id = thread.running()?;
        let mut cpus = Self::none();
        // SAFETY: a thread that was not joined can be named, even if it has ended. The set is written within its size.
        let error = unsafe { libc::pthread_getaffinity_np(id, size_of_val(&cpus.0), &raw mut cpus.0) };
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
    pub fn apply_to(&self, thread: &Thread) -> io::Result<()> {
        let id = thread.running()?;
        // SAFETY: as in `of`; the set is only read.
        result(unsafe { libc::pthread_setaffinity_np(id, size_of_val(&self.0), &raw const self.0) })
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

/// The CPU that the caller runs on, as of a moment ago. Asks the kernel: the C library reads what that notes for each of its
/// threads (rseq(2)), but does not note for the thread that a [keeper](crate::keeper) begins with.
pub fn current_cpu() -> Option<usize> {
    let mut cpu: libc::c_uint = 0;
    let null = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: the kernel writes one number, and nothing where it is given no room.
    let answer = unsafe { libc::syscall(libc::SYS_getcpu, &raw mut cpu, null, null) };
    (answer == 0).then_some(cpu as usize)
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

    const STACK: usize = 64 * 1024;

    #[test]
    fn a_thread_goes_where_it_is_put_and_back() {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let (answer, answered) = std::sync::mpsc::channel();
        let thread = Thread::spawn("placed", STACK, move || {
            let _ = receiver.recv();
            answer.send(Cpus::of_caller().unwrap().iter().collect::<Vec<_>>()).unwrap();
        })
        .unwrap();
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
        assert_eq!(answered.recv().unwrap(), all);
        thread.join();
    }

    #[test]
    fn a_thread_that_has_ended_is_not_taken_for_the_caller() {
        let thread = Thread::spawn("short", STACK, || {}).unwrap();
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
        let thread = Thread::spawn("buried", STACK, move || {
            let _ = receiver.recv();
        });
        thread.unwrap().bury();
        drop(sender);
    }

    #[test]
    fn a_panic_ends_the_thread_and_no_more() {
        let thread = Thread::spawn("panics", STACK, || panic!("on purpose")).unwrap();
        thread.join();
    }

    #[test]
    fn a_parked_thread_is_woken() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = Thread::spawn("a name that is too long", STACK, move || {
            sender.send(std::fs::read_to_string("/proc/thread-self/comm").unwrap()).unwrap();
            std::thread::park();
        })
        .unwrap();
        assert_eq!(receiver.recv().unwrap(), "a name that is \n");
        thread.unpark();
        thread.join();
    }
}
