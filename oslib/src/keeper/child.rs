#![allow(unsafe_code, reason = "runs on borrowed memory of another process, and takes over its stack")]
//! What the keeper does until the process that it was cloned from has let go of their common memory.
//!
//! Up to [`resume`] nothing in here may allocate, lock, panic, unwind or use a thread-local, `errno` included: all of that
//! belongs to the parent, which runs at the same time.

use std::arch::asm;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use super::raw;

/// Value of [`Orders::held`] while the parent still uses the address space. The kernel stores 0 when it lets go, be it by
/// execve(2) or by its end (`set_tid_address(2)`).
pub(super) const HELD: u32 = 1;

/// What parent and keeper share. A `static`, because the kernel keeps the address of `held`.
#[derive(Debug)]
pub(super) struct Orders {
    pub(super) held: AtomicU32,
    /// The stack pointer with which the parent called execve(2), and where to go on with it; 0 before.
    pub(super) stack_pointer: AtomicUsize,
    pub(super) go_on: AtomicUsize,
    /// The keeper runs before all ordinary processes.
    pub(super) goes_first: AtomicBool,
}

/// The keeper from its first instruction on. `orders` points to [`Orders`] that last.
pub(super) extern "C" fn main(orders: *mut c_void) -> c_int {
    // SAFETY: the parent passed a pointer to a static.
    let orders = unsafe { &*orders.cast::<Orders>() };
    // The C library keeps two signals of its own out of the mask that the parent set.
    raw::block_signals(u64::MAX);
    raw::set_name(c"cpr-keeper");
    // The parent goes on at once when it wakes us, in a system call that takes a millisecond, and may well have our CPU.
    orders.goes_first.store(raw::schedule_first(), Ordering::Release);
    while orders.held.load(Ordering::Acquire) == HELD {
        raw::futex_wait(&orders.held, HELD);
    }
    let stack_pointer = orders.stack_pointer.load(Ordering::Acquire);
    if stack_pointer == 0 {
        // The parent ended before it came to its exec, so there is nothing to go on with.
        raw::exit(1);
    }
    // SAFETY: the parent has left, and left these two for us.
    unsafe { resume(stack_pointer, orders.go_on.load(Ordering::Acquire)) }
}

/// Goes on where the parent called execve(2), on the stack that was its.
///
/// # Safety
/// Both values were stored by [`super::exec_or_go_on`] of a process that no longer uses this address space.
unsafe fn resume(stack_pointer: usize, go_on: usize) -> ! {
    // SAFETY: the frames above the stack pointer are as that function left them, for nothing has used this stack since; the
    // code at `go_on` restores what its caller expects in registers.
    unsafe { asm!("mov rsp, {0}", "jmp {1}", in(reg) stack_pointer, in(reg) go_on, options(noreturn)) }
}
