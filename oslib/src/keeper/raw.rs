#![allow(unsafe_code, reason = "system calls without the C library")]
//! System calls that leave no trace but their result: the C library's wrappers write `errno`, which the keeper shares with
//! a thread of its parent. Each returns what the kernel does, a negative errno on failure. See syscall(2).

use std::arch::asm;
use std::ffi::CStr;
use std::sync::atomic::AtomicU32;

/// # Safety
/// As the system call `number` with these arguments.
unsafe fn syscall(number: libc::c_long, [a, b, c, d, e]: [usize; 5]) -> isize {
    let result;
    // SAFETY: the calling convention of x86-64 Linux; the kernel clobbers rcx and r11 and leaves the user's stack alone. What
    // the call does to memory is the caller's promise, and the default options tell the compiler to expect it.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e,
            lateout("rcx") _, lateout("r11") _,
            options(nostack, preserves_flags),
        );
    }
    result
}

pub(super) fn set_name(name: &CStr) {
    // SAFETY: PR_SET_NAME reads a string of 16 bytes at most, up to its NUL.
    unsafe { syscall(libc::SYS_prctl, [libc::PR_SET_NAME as usize, name.as_ptr() as usize, 0, 0, 0]) };
}

pub(super) fn block_signals(mask: u64) {
    let how = libc::SIG_SETMASK as usize;
    // SAFETY: reads the 8 bytes of the kernel's own signal set.
    unsafe { syscall(libc::SYS_rt_sigprocmask, [how, &raw const mask as usize, 0, size_of_val(&mask), 0]) };
}

/// Has this process run before all ordinary ones, if it is itself quite ordinary and allowed to; tells whether. What it
/// starts meanwhile is ordinary.
pub(super) fn schedule_first() -> bool {
    // SAFETY: neither takes a pointer; process 0 is the caller.
    let (policy, niceness) = unsafe {
        let policy = syscall(libc::SYS_sched_getscheduler, [0; 5]);
        (policy, 20 - syscall(libc::SYS_getpriority, [libc::PRIO_PROCESS as usize, 0, 0, 0, 0]))
    };
    if policy & !(libc::SCHED_RESET_ON_FORK as isize) != libc::SCHED_OTHER as isize || niceness != 0 {
        return false;
    }
    let parameters = libc::sched_param { sched_priority: 1 };
    let policy = (libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK) as usize;
    // SAFETY: reads the parameters; process 0 is the caller.
    unsafe { syscall(libc::SYS_sched_setscheduler, [0, policy, &raw const parameters as usize, 0, 0]) == 0 }
}

/// Waits until somebody wakes `word`, unless its value is not `expected`; may return for no reason.
pub(super) fn futex_wait(word: &AtomicU32, expected: u32) {
    // Not a private futex: the kernel's own wake at the end of a thread or address space is a shared one.
    let wait = libc::FUTEX_WAIT as usize;
    // SAFETY: reads the word; without a timeout.
    unsafe { syscall(libc::SYS_futex, [word.as_ptr() as usize, wait, expected as usize, 0, 0]) };
}

pub(super) fn exit(code: u8) -> ! {
    loop {
        // SAFETY: takes no pointer, and does not return.
        unsafe { syscall(libc::SYS_exit_group, [usize::from(code), 0, 0, 0, 0]) };
    }
}
