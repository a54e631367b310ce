#![allow(unsafe_code, reason = "nix has no real-time signals, so sets, handlers and kicks go to libc")]
//! Signals across an exec, as events of a loop, and as a kick for a thread in KVM_RUN.
//!
//! A mask ([`SignalMask`]) is a plain number that travels in a saved state. Everything here is per thread where the
//! kernel is per thread: a mask is the calling thread's. The C library keeps the two signals of its own thread
//! machinery (32 and 33) out of every mask, and so does this module. See signal(7), signalfd(2) and tgkill(2).

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use nix::errno::Errno;

use crate::retry;

/// The highest signal number of the kernel (`_NSIG`).
const LAST_SIGNAL: i32 = 64;

/// A set of signals. Bit `n - 1` stands for signal `n`, as in the kernel and in `SigBlk` of `/proc/<pid>/status`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct SignalMask(u64);

impl SignalMask {
    /// No signal.
    pub const EMPTY: SignalMask = SignalMask(0);
    /// Every signal. SIGKILL and SIGSTOP cannot be blocked and are ignored in a mask.
    pub const ALL: SignalMask = SignalMask(u64::MAX);

    /// The set with these bits; every number is a valid set.
    pub const fn from_bits(bits: u64) -> Self {
        SignalMask(bits)
    }

    /// The bits of the set.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The set of these signals.
    ///
    /// # Panics
    /// If one of them is not from 1 to 64.
    pub const fn of(signals: &[i32]) -> Self {
        let mut mask = SignalMask::EMPTY;
        let mut index = 0;
        while index < signals.len() {
            mask = mask.with(signals[index]);
            index += 1;
        }
        mask
    }

    /// The set with `signal` in it.
    ///
    /// # Panics
    /// If `signal` is not from 1 to 64.
    pub const fn with(self, signal: i32) -> Self {
        assert!(1 <= signal && signal <= LAST_SIGNAL, "no such signal");
        SignalMask(self.0 | 1 << (signal - 1))
    }

    /// The set without `signal`.
    ///
    /// # Panics
    /// If `signal` is not from 1 to 64.
    pub const fn without(self, signal: i32) -> Self {
        assert!(1 <= signal && signal <= LAST_SIGNAL, "no such signal");
        SignalMask(self.0 & !(1 << (signal - 1)))
    }

    /// Whether `signal` is in the set; a number that is no signal is in none.
    pub const fn contains(self, signal: i32) -> bool {
        1 <= signal && signal <= LAST_SIGNAL && self.0 & 1 << (signal - 1) != 0
    }

    pub(crate) fn to_sigset(self) -> libc::sigset_t {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set it is given.
        let mut set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            set.assume_init()
        };
        for signal in (1..=LAST_SIGNAL).filter(|signal| self.contains(*signal)) {
            // The C library refuses its own two signals, which is as it should be.
            // SAFETY: `set` is initialised.
            unsafe { libc::sigaddset(&raw mut set, signal) };
        }
        set
    }

    fn from_sigset(set: &libc::sigset_t) -> Self {
        (1..=LAST_SIGNAL)
            // SAFETY: `set` is initialised; for a number that it does not like the call returns -1.
            .filter(|signal| unsafe { libc::sigismember(set, *signal) } == 1)
            .fold(SignalMask::EMPTY, SignalMask::with)
    }
}

impl fmt::Debug for SignalMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SignalMask({:#018x})", self.0)
    }
}

/// Blocks every signal in the calling thread, and returns the mask as it was.
///
/// A signal that arrives from here on stays pending, across an exec too, until [`set_mask`].
///
/// # Errors
/// None that the kernel documents.
pub fn block_all() -> io::Result<SignalMask> {
    change_mask(libc::SIG_SETMASK, Some(SignalMask::ALL))
}

/// Adds `signals` to the mask of the calling thread, and returns the mask as it was.
///
/// # Errors
/// As [`block_all`].
pub fn block(signals: SignalMask) -> io::Result<SignalMask> {
    change_mask(libc::SIG_BLOCK, Some(signals))
}

/// Makes `mask` the mask of the calling thread. Signals that it lets through and that are pending arrive at once.
///
/// # Errors
/// As [`block_all`].
pub fn set_mask(mask: SignalMask) -> io::Result<()> {
    change_mask(libc::SIG_SETMASK, Some(mask)).map(drop)
}

/// The mask of the calling thread.
///
/// # Errors
/// As [`block_all`].
pub fn current() -> io::Result<SignalMask> {
    change_mask(libc::SIG_SETMASK, None)
}

fn change_mask(how: libc::c_int, mask: Option<SignalMask>) -> io::Result<SignalMask> {
    let new = mask.map(SignalMask::to_sigset);
    let mut old = SignalMask::EMPTY.to_sigset();
    // SAFETY: both point to initialised sets, or `new` is null, which leaves the mask alone.
    let error = unsafe {
        libc::pthread_sigmask(how, new.as_ref().map_or(std::ptr::null(), std::ptr::from_ref), &raw mut old)
    };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    Ok(SignalMask::from_sigset(&old))
}

/// A signal that a [`SignalFd`] delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal {
    /// Its number.
    pub signo: i32,
    /// The process that sent it, or for SIGCHLD the child; 0 if the kernel did.
    pub pid: u32,
}

/// Signals as readable events, instead of handlers (signalfd(2)); nonblocking and close-on-exec.
///
/// What is pending when it is made, or was before an exec, is delivered, too.
#[derive(Debug)]
pub struct SignalFd(OwnedFd);

impl SignalFd {
    /// Makes one for `signals`, which must be blocked ([`block`]) in every thread of the process, or their default
    /// action takes them away.
    ///
    /// # Errors
    /// Those of signalfd(2).
    pub fn new(signals: SignalMask) -> io::Result<Self> {
        let set = signals.to_sigset();
        // SAFETY: `set` is initialised; -1 asks for a new descriptor.
        let fd = Errno::result(unsafe {
            libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)
        })?;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(SignalFd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Takes one pending signal of the process or of the calling thread; `None` if there is none.
    ///
    /// # Errors
    /// Those of read(2).
    pub fn read(&self) -> io::Result<Option<Signal>> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        match retry::on_eintr(|| nix::unistd::read(&self.0, &mut info)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
        let field = |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
        Ok(Some(Signal {
            signo: field(std::mem::offset_of!(libc::signalfd_siginfo, ssi_signo)).cast_signed(),
            pid: field(std::mem::offset_of!(libc::signalfd_siginfo, ssi_pid)),
        }))
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for SignalFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Gives `signal` a handler that does nothing, so that it interrupts system calls (EINTR) and kills nobody.
///
/// System calls are not restarted (no `SA_RESTART`): that is what gets a thread out of KVM_RUN. An exec forgets it.
///
/// # Errors
/// `InvalidInput` (EINVAL) for a number that is no signal, or one that cannot be handled.
pub fn install_noop_handler(signal: i32) -> io::Result<()> {
    extern "C" fn noop(_signal: libc::c_int) {}

    // SAFETY: sigaction is a plain C structure for which all zeros is valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = noop as extern "C" fn(libc::c_int) as libc::sighandler_t;
    action.sa_mask = SignalMask::EMPTY.to_sigset();
    // SAFETY: `action` is initialised, and its handler, which does nothing, is safe at any point of any thread.
    Errno::result(unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) })?;
    Ok(())
}

/// What [`on_fatal`] calls: a plain function, or null.
static ON_FATAL: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());

/// Bytes of the stack that fatal signals of the main thread are handled on: the frame of a CPU with large registers takes
/// some 12 KiB.
const FATAL_STACK_LEN: usize = 64 << 10;

/// Handlers of fatal signals. Dropping them puts back what was there before.
#[derive(Debug)]
pub struct FatalHandlers {
    before: Vec<(i32, libc::sigaction)>,
}

// SAFETY: the structures hold addresses of handlers, which are the same in every thread, and nothing is read through them.
unsafe impl Send for FatalHandlers {}
// SAFETY: as above.
unsafe impl Sync for FatalHandlers {}

/// Has `act` called when one of `signals` arrives or the program raises it by a fault, and lets the calling thread receive
/// them. If `act` returns, the signal takes its default action: it ends the process.
///
/// `act` runs inside a signal handler, with all signals blocked, on a stack of its own: that of the standard library in its
/// threads, and one that this function makes, once, for the thread that calls it first. So it may only do what
/// signal-safety(7) allows. One function serves the whole process: the last that was given.
///
/// # Errors
/// EINVAL for a number that is no signal or cannot be handled; ENOMEM. Nothing has changed then.
pub fn on_fatal(signals: &[i32], act: fn(i32)) -> io::Result<FatalHandlers> {
    extern "C" fn handle(signal: libc::c_int) {
        let act = ON_FATAL.load(Ordering::Acquire);
        if !act.is_null() {
            // SAFETY: only `on_fatal` stores here, and what it stores is such a function.
            let act = unsafe { std::mem::transmute::<*mut (), fn(i32)>(act) };
            act(signal);
        }
        // SAFETY: all zeros is a valid sigaction, of the default action; raise is async-signal-safe. The signal is
        // blocked until this handler has returned.
        unsafe {
            let default: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, &raw const default, std::ptr::null_mut());
            libc::raise(signal);
        }
    }

    give_alternate_stack()?;
    ON_FATAL.store(act as *mut (), Ordering::Release);
    // SAFETY: sigaction is a plain C structure for which all zeros is valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handle as extern "C" fn(libc::c_int) as libc::sighandler_t;
    action.sa_mask = SignalMask::ALL.to_sigset();
    action.sa_flags = libc::SA_ONSTACK;
    let mut handlers = FatalHandlers { before: Vec::with_capacity(signals.len()) };
    for &signal in signals {
        // SAFETY: as above.
        let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: `action` is initialised, and its handler does what its caller has promised to be safe; an early return
        // drops `handlers`, which undoes what was done.
        Errno::result(unsafe { libc::sigaction(signal, &raw const action, &raw mut before) })?;
        handlers.before.push((signal, before));
    }
    change_mask(libc::SIG_UNBLOCK, Some(SignalMask::of(signals)))?;
    Ok(handlers)
}

impl Drop for FatalHandlers {
    fn drop(&mut self) {
        for (signal, before) in &self.before {
            // SAFETY: the kernel gave us this action for this very signal.
            unsafe { libc::sigaction(*signal, std::ptr::from_ref(before), std::ptr::null_mut()) };
        }
    }
}

/// Gives the calling thread a stack for signal handlers, once per process.
fn give_alternate_stack() -> io::Result<()> {
    static GIVEN: AtomicBool = AtomicBool::new(false);
    if GIVEN.swap(true, Ordering::AcqRel) {
        return Ok(());
    }
    // Never freed: a handler may run on it at any time.
    let stack = Box::leak(vec![0u8; FATAL_STACK_LEN].into_boxed_slice());
    let stack = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: FATAL_STACK_LEN };
    // SAFETY: the memory is leaked, so the kernel may use it for ever; `stack` outlives the call.
    Errno::result(unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) })?;
    Ok(())
}

/// Takes back `signal` if it is pending for this process.
///
/// # Errors
/// EINVAL for a number that is no signal or cannot be ignored.
pub fn discard_pending(signal: i32) -> io::Result<()> {
    // SAFETY: sigaction is a plain C structure for which all zeros is valid.
    let (mut ignore, mut before): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
    ignore.sa_sigaction = libc::SIG_IGN;
    // To ignore a signal discards it where it is pending, blocked or not: see sigaction(3p).
    // SAFETY: both actions are initialised, and the second is the kernel's own.
    unsafe {
        Errno::result(libc::sigaction(signal, &raw const ignore, &raw mut before))?;
        Errno::result(libc::sigaction(signal, &raw const before, std::ptr::null_mut()))?;
    }
    Ok(())
}

/// Takes back `signal` if it is pending for the calling thread, which must block it; tells whether it was.
pub fn take_pending(signal: i32) -> bool {
    let set = SignalMask::of(&[signal]).to_sigset();
    let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: set and time outlive the call, which reads them; no information is asked for.
    unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const at_once) == signal }
}

/// A thread of this process, by its kernel id (gettid(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ThreadId(u32);

impl ThreadId {
    /// The calling thread.
    pub fn current() -> Self {
        ThreadId(nix::unistd::gettid().as_raw().cast_unsigned())
    }

    /// Its number.
    pub const fn as_u32(self) -> u32 {
        self.0
    }

    /// Whether it is the main thread of the calling process, which has the number of the process.
    pub fn is_main(self) -> bool {
        self.0 == std::process::id()
    }
}

/// Sends `signal` to one thread of this process.
///
/// # Errors
/// ESRCH if the thread has ended, EINVAL for a number that is no signal. A thread id may be reused after its thread
/// ended, for another thread of this process at worst.
pub fn kick(thread: ThreadId, signal: i32) -> io::Result<()> {
    let process = std::process::id().cast_signed();
    // SAFETY: takes no pointer, and reaches threads of this process only.
    Errno::result(unsafe { libc::syscall(libc::SYS_tgkill, process, thread.0.cast_signed(), signal) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    // Each test has a thread of its own, and so a mask of its own.

    /// Runs an ignored test of this module in a process of its own; gives its end and its standard error.
    fn in_a_process(test: &str) -> (Option<i32>, String) {
        use std::os::unix::process::ExitStatusExt;
        let name = format!("signals::tests::{test}");
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", &name, "--nocapture"])
            .output()
            .unwrap();
        (output.status.signal(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn last_act(signal: i32) {
        let words: &[u8] = if signal == libc::SIGSEGV { b"SIGSEGV handled" } else { b"SIGABRT handled" };
        crate::stream::write_stderr(words);
    }

    #[expect(unconditional_recursion, reason = "to fill the stack")]
    fn overflow(depth: u64) -> u64 {
        let room = std::hint::black_box([depth; 512]);
        overflow(depth.wrapping_add(1)) ^ room[7]
    }

    #[test]
    #[ignore = "it ends its process"]
    fn dies_of_an_overflow_of_the_stack() {
        let _handlers = on_fatal(&[libc::SIGSEGV, libc::SIGABRT], last_act).unwrap();
        overflow(0);
    }

    #[test]
    #[ignore = "it ends its process"]
    fn dies_of_a_pending_abort() {
        block_all().unwrap();
        kick(ThreadId::current(), libc::SIGABRT).unwrap();
        let _handlers = on_fatal(&[libc::SIGSEGV, libc::SIGABRT], last_act).unwrap();
    }

    #[test]
    fn a_fatal_signal_is_handled_and_still_fatal() {
        let (signal, said) = in_a_process("dies_of_an_overflow_of_the_stack");
        assert_eq!(signal, Some(libc::SIGSEGV), "{said}");
        assert!(said.contains("SIGSEGV handled"), "{said}");
        let (signal, said) = in_a_process("dies_of_a_pending_abort");
        assert_eq!(signal, Some(libc::SIGABRT), "{said}");
        assert!(said.contains("SIGABRT handled"), "{said}");
    }

    #[test]
    fn what_was_pending_can_be_discarded() {
        block(SignalMask::of(&[libc::SIGQUIT])).unwrap();
        kick(ThreadId::current(), libc::SIGQUIT).unwrap();
        discard_pending(libc::SIGQUIT).unwrap();
        // It would end the process.
        set_mask(SignalMask::EMPTY).unwrap();
        assert_eq!(discard_pending(libc::SIGKILL).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn masks_are_sets() {
        let mask = SignalMask::of(&[libc::SIGINT, libc::SIGRTMIN(), 64]);
        assert!(mask.contains(libc::SIGINT) && mask.contains(64) && !mask.contains(libc::SIGTERM));
        assert!(![0, -1, 65, i32::MAX, i32::MIN].iter().any(|signal| SignalMask::ALL.contains(*signal)));
        assert_eq!(mask.without(64).with(64), mask);
        assert_eq!(SignalMask::from_bits(mask.bits()), mask);
        assert_eq!(SignalMask::of(&[1]).bits(), 1);
        assert_eq!(SignalMask::from_sigset(&mask.to_sigset()), mask);
    }

    fn blocked_per_proc() -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    }

    #[test]
    fn the_kernel_sees_the_same_mask() {
        let before = block_all().unwrap();
        let all = current().unwrap();
        assert_eq!(all.bits(), blocked_per_proc());
        assert!(all.contains(libc::SIGTERM) && all.contains(libc::SIGCHLD) && all.contains(64));
        assert!(!all.contains(libc::SIGKILL) && !all.contains(32) && !all.contains(33));
        set_mask(SignalMask::of(&[libc::SIGUSR1])).unwrap();
        assert_eq!(blocked_per_proc(), 1 << (libc::SIGUSR1 - 1));
        assert_eq!(block(SignalMask::of(&[libc::SIGUSR2])).unwrap(), SignalMask::of(&[libc::SIGUSR1]));
        assert_eq!(current().unwrap(), SignalMask::of(&[libc::SIGUSR1, libc::SIGUSR2]));
        set_mask(before).unwrap();
        assert_eq!(current().unwrap(), before);
    }

    #[test]
    fn signals_are_read_as_events() {
        let signal = libc::SIGRTMIN() + 5;
        block(SignalMask::of(&[signal])).unwrap();
        let fd = SignalFd::new(SignalMask::of(&[signal])).unwrap();
        assert!(crate::cloexec::is_set(&fd).unwrap());
        assert_eq!(fd.read().unwrap(), None);
        kick(ThreadId::current(), signal).unwrap();
        assert!(retry::wait_readable(fd.as_fd(), Some(Duration::from_secs(10))).unwrap());
        assert_eq!(fd.read().unwrap(), Some(Signal { signo: signal, pid: std::process::id() }));
        assert_eq!(fd.read().unwrap(), None);
    }

    #[test]
    fn a_kick_interrupts_a_system_call() {
        let signal = libc::SIGRTMIN() + 6;
        install_noop_handler(signal).unwrap();
        let (sender, receiver) = mpsc::channel();
        let sleeper = std::thread::spawn(move || {
            sender.send(ThreadId::current()).unwrap();
            let started = Instant::now();
            // SAFETY: no descriptors, so no pointer that is followed.
            let result = unsafe { libc::poll(std::ptr::null_mut(), 0, 60_000) };
            (result, io::Error::last_os_error().raw_os_error(), started.elapsed())
        });
        let thread = receiver.recv().unwrap();
        assert_ne!(thread, ThreadId::current());
        // The kick may come before the call: repeat it, as one does with vCPU threads.
        while !sleeper.is_finished() {
            let _ = kick(thread, signal);
            std::thread::sleep(Duration::from_millis(1));
        }
        let (result, errno, elapsed) = sleeper.join().unwrap();
        assert_eq!((result, errno), (-1, Some(libc::EINTR)));
        assert!(elapsed < Duration::from_secs(30));
        assert_eq!(kick(thread, signal).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }

    #[test]
    fn what_is_no_signal_is_refused() {
        for signal in [0, -1, 65, libc::SIGKILL] {
            assert_eq!(
                install_noop_handler(signal).unwrap_err().kind(),
                io::ErrorKind::InvalidInput,
                "{signal}"
            );
        }
        assert_eq!(kick(ThreadId::current(), 99).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
