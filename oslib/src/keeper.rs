#![allow(
    unsafe_code,
    reason = "clone of a process that shares this one's memory, and the return on its stack"
)]
//! The keeper: the old program image goes on in a child process while its own process executes another program.
//!
//! A live update by exec has two costs that grow with the guest: exec tears down the page tables of the old address space
//! before the new program's first instruction, and nothing runs the guest until the new program is ready. A process made
//! by `clone(CLONE_VM)` avoids both. It keeps the address space in use, so that exec finds nothing to tear down; and once
//! exec has let go of that address space, it is alone in it, with copies of all descriptors: it *is* the old program, under
//! another process id. See clone(2), execve(2) and set_tid_address(2).
//!
//! ```text
//!   source (pid P)             keeper (pid K)                      target (pid P, after exec)
//!   Keeper::spawn ───────────► waits, all signals blocked
//!   Keeper::exec ─┐
//!     │           └ exec ok ─► Keeper::exec returns Departed here ── builds, takes over
//!     │                        the old program goes on: all of      ...
//!     │                        its memory, stack, descriptors
//!     └ exec failed: the keeper is killed and reaped, exec returns the error in P
//! ```
//!
//! So [`Keeper::exec`] returns exactly once: with an error in the process that called it, or with [`Departed`] in the
//! keeper. What does *not* move along is what the kernel keeps per process:
//!
//! - Threads. Exec ends all others where they stand. Let them hold no lock before, nor anything else that would stay
//!   half-done, start new ones, and free what is left of the old ([`Thread::bury`](crate::thread::Thread::bury)).
//! - Process id, children, parent: the process that executes the target is the keeper's parent.
//! - The signal mask, which is full in the keeper, and pending signals, which stay with P.
//! - What an epoll instance knows of a signalfd: it watches the signals of the process that added it. Make a new one.
//! - `FD_CLOEXEC` and everything else about descriptors is as it was at [`Keeper::spawn`]; the tables are separate.

mod child;
mod raw;
mod stack;

use std::arch::asm;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use nix::errno::Errno;

use crate::exec::PreparedExec;
use crate::pidfd::PidFd;
use crate::signals;

use self::child::{HELD, Orders};
use self::stack::Stack;

/// One for the whole address space: there is one main thread to leave it. The kernel writes to it whenever that thread
/// leaves, so it must last as long as the address space.
static ORDERS: Orders = Orders {
    held: AtomicU32::new(0),
    stack_pointer: AtomicUsize::new(0),
    go_on: AtomicUsize::new(0),
    goes_first: AtomicBool::new(false),
};
static IN_USE: AtomicBool = AtomicBool::new(false);

/// A keeper that waits for the exec.
///
/// Dropping it ends it.
#[derive(Debug)]
pub struct Keeper {
    pid: u32,
    pidfd: PidFd,
    /// The process that is to execute, for the keeper to watch.
    parent: Option<PidFd>,
    /// What the keeper runs on until it goes on as the program. Freed only when it no longer can.
    stack: Option<Stack>,
}

/// This image has moved to another process: the caller runs in the keeper.
#[derive(Debug)]
pub struct Departed {
    /// The process that was left, and that executes the new program now. It is this process's parent, as long as it lives;
    /// readable when it has ended.
    pub successor: PidFd,
    /// To be dropped once what cannot wait has been done.
    pub head_start: HeadStart,
}

/// As long as this is there, the keeper runs before the successor, which would otherwise keep its CPU for the milliseconds that
/// an exec and a start take: the main thread by a policy, where that is allowed (`CAP_SYS_NICE`, `RLIMIT_RTPRIO`) and the
/// process is scheduled in the ordinary way; other threads, when they wake, because the successor has a long time slice.
#[derive(Debug)]
pub struct HeadStart {
    goes_first: bool,
    /// The successor, and the time slice it is to have.
    steps_back: Option<(u32, Duration)>,
}

/// The longest time slice that there is (sched(7)).
const LONG_SLICE: Duration = Duration::from_millis(100);

/// Gives the calling thread an ordinary time slice, if the one that started it was to let a keeper go first: a thread begins with
/// the slice of the one that started it. For threads of a program that a keeper's exec may have started.
pub fn forget_head_start() {
    if crate::process::time_slice().is_ok_and(|slice| slice == LONG_SLICE) {
        // As in `HeadStart::begin`: what cannot be set was not set.
        let _ = crate::process::set_time_slice(0, Duration::ZERO);
    }
}

impl HeadStart {
    fn begin(successor: u32) -> HeadStart {
        // It is not there any more, or a sandbox has no such call: then it competes.
        let slice = if successor == std::os::unix::process::parent_id() {
            crate::process::set_time_slice(successor, LONG_SLICE).ok()
        } else {
            None
        };
        HeadStart {
            goes_first: ORDERS.goes_first.load(Ordering::Acquire),
            steps_back: slice.map(|before| (successor, before)),
        }
    }
}

impl Drop for HeadStart {
    fn drop(&mut self) {
        // There is nobody to tell of a failure. A parent that is gone has no slice; its number cannot be another process's as
        // long as nobody else has reaped it, and then this process has another parent.
        if let Some((successor, slice)) = self.steps_back
            && successor == std::os::unix::process::parent_id()
        {
            let _ = crate::process::set_time_slice(successor, slice);
        }
        if self.goes_first {
            // It was an ordinary process before. No failure is documented.
            let _ = crate::process::schedule_thread_normally();
        }
    }
}

impl Keeper {
    /// Starts a keeper of this process as it is now: its address space, its open descriptors.
    ///
    /// Call it from the main thread, with all signals blocked ([`signals::block_all`]) and nothing left to do but the exec.
    /// The keeper is a child of this process with SIGCHLD as exit signal, named `cpr-keeper`.
    ///
    /// # Errors
    /// `InvalidInput` from another thread than the main one, `ResourceBusy` if there is a keeper already; those of
    /// clone(2), mmap(2) and pidfd_open(2) otherwise. Then there is no keeper and nothing has changed.
    pub fn spawn() -> io::Result<Keeper> {
        if !signals::ThreadId::current().is_main() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "only the main thread can leave its process to another program",
            ));
        }
        if IN_USE.swap(true, Ordering::AcqRel) {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let spawned = Self::spawn_only_one();
        if spawned.is_err() {
            IN_USE.store(false, Ordering::Release);
        }
        spawned
    }

    fn spawn_only_one() -> io::Result<Keeper> {
        let stack = Stack::new()?;
        // Before the clone, so that the keeper has it, too: it watches its parent by this.
        let parent = PidFd::of_self()?;
        ORDERS.stack_pointer.store(0, Ordering::Release);
        ORDERS.held.store(HELD, Ordering::Release);
        // From here on the kernel clears the word and wakes its waiters when this thread lets go of the address space. What the
        // C library had registered matters to those who join a thread; nobody joins the main one.
        // SAFETY: the word is a static, so the kernel may write to it at any later time.
        unsafe { libc::syscall(libc::SYS_set_tid_address, ORDERS.held.as_ptr()) };
        // SAFETY: the stack is freed only after the child has left it or ended; `child::main` touches no thread-local and
        // no lock of this process while it uses the address space.
        let (pid, pidfd) = unsafe { clone_onto(&stack)? };
        Ok(Keeper { pid, pidfd, parent: Some(parent), stack: Some(stack) })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its pidfd, which is close-on-exec.
    pub fn pidfd(&self) -> &PidFd {
        &self.pidfd
    }

    /// Executes the program. In this process it returns only if that failed; if not, it returns in the keeper.
    ///
    /// In the keeper `successor` may have ended already, if it was killed on its way.
    ///
    /// # Errors
    /// Those of execve(2); the keeper is gone then.
    pub fn exec(mut self, exec: &PreparedExec) -> io::Result<Departed> {
        let successor = std::process::id();
        // SAFETY: the keeper waits for nothing but this, and the arguments of `exec` are whole.
        match unsafe { exec_or_go_on(exec) } {
            Ok(()) => {
                // In the keeper. `pidfd` is a number of the other process's table: here it is not open, or something else.
                let mut this = std::mem::ManuallyDrop::new(self);
                // It runs on the main stack now.
                drop(this.stack.take());
                IN_USE.store(false, Ordering::Release);
                let head_start = HeadStart::begin(successor);
                Ok(Departed { successor: this.parent.take().ok_or(io::ErrorKind::NotFound)?, head_start })
            }
            Err(error) => {
                self.end()?;
                Err(error)
            }
        }
    }

    /// Ends the keeper: kills it, reaps it, frees its stack. Also where it has ended already. Dropping does the same.
    ///
    /// # Errors
    /// Those of pidfd_send_signal(2) and waitid(2); its memory is left allocated then, because it may still run on it.
    pub fn cancel(mut self) -> io::Result<()> {
        self.end()
    }

    fn end(&mut self) -> io::Result<()> {
        let Some(stack) = self.stack.take() else { return Ok(()) };
        // Whatever goes wrong from here on, memory that a process may be running on stays.
        let stack = std::mem::ManuallyDrop::new(stack);
        self.pidfd.kill()?;
        match self.pidfd.reap() {
            Ok(_) => {}
            // Somebody else reaped it, or the kernel did because SIGCHLD is ignored: that is an end, too.
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) && self.pidfd.is_exited()? => {}
            Err(error) => return Err(error),
        }
        drop(std::mem::ManuallyDrop::into_inner(stack));
        IN_USE.store(false, Ordering::Release);
        Ok(())
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // Nobody is left to tell; the memory is safe either way.
        let _ = self.end();
    }
}

/// Clones this process without its descriptor table and its thread group, onto `stack`.
///
/// # Safety
/// `stack` outlives the child's use of it.
unsafe fn clone_onto(stack: &Stack) -> io::Result<(u32, PidFd)> {
    // No CLONE_FILES: the exec would take the table away from the keeper, or find it shared and copy it. No
    // CLONE_THREAD: the exec kills the threads of its group. CLONE_PIDFD: the number alone could be reused.
    let flags = libc::CLONE_VM | libc::CLONE_PIDFD | libc::SIGCHLD;
    let mut pidfd: libc::c_int = -1;
    let orders = (&raw const ORDERS).cast_mut().cast();
    // SAFETY: the stack is mapped and grows down from its top; the orders are what `child::main` expects; with CLONE_PIDFD
    // the fifth argument is where the kernel stores an int.
    let pid = Errno::result(unsafe {
        libc::clone(child::main, stack.top().as_ptr(), flags, orders, &raw mut pidfd)
    })?;
    // SAFETY: the kernel has just made this descriptor for us, close-on-exec, in this process only.
    Ok((pid.cast_unsigned(), PidFd::from(unsafe { OwnedFd::from_raw_fd(pidfd) })))
}

/// Executes `exec`. Returns an error in this process, or `Ok` in the keeper, once this process has let go of the memory.
///
/// To the compiler this is one call that returns once, and so it is: of the two processes that share this stack, one is
/// in the kernel until it has either left the address space, which lets the other return, or failed, after which the
/// other is killed. Nothing writes to the frames above the stored stack pointer meanwhile.
///
/// # Safety
/// There is one keeper, made by [`Keeper::spawn`] of this process.
unsafe fn exec_or_go_on(exec: &PreparedExec) -> io::Result<()> {
    let call = exec.system_call();
    let result: isize;
    // SAFETY: a system call whose arguments live in `exec`. The keeper comes to label 3 with the stack pointer that was
    // stored and with every other register lost: the two that cannot be named as clobbered are on the stack, the others are.
    unsafe {
        asm!(
            "push rbx",
            "push rbp",
            "mov [r12], rsp",
            "lea r14, [rip + 3f]",
            "mov [r13], r14",
            "syscall",
            "jmp 4f",
            "3:",
            "xor eax, eax",
            "4:",
            "pop rbp",
            "pop rbx",
            inout("rax") call.number => result,
            inout("rdi") call.arguments[0] => _,
            inout("rsi") call.arguments[1] => _,
            inout("rdx") call.arguments[2] => _,
            inout("r10") call.arguments[3] => _,
            inout("r8") call.arguments[4] => _,
            inout("r12") ORDERS.stack_pointer.as_ptr() => _,
            inout("r13") ORDERS.go_on.as_ptr() => _,
            out("r14") _,
            out("r15") _,
            clobber_abi("C"),
        );
    }
    // A successful execve(2) does not return, so 0 is the keeper's.
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-(result as i32))) }
}
