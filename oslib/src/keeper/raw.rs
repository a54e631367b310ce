#![allow(unsafe_code, reason = "system calls without the C library")]
//! System calls that leave no trace but their result: the C library's wrappers write `errno`, which the keeper shares with
//! a thread of its parent. Each returns what the kernel does, a negative errno on failure. See syscall(2).

use std::arch::asm;
use std::ffi::CStr;
use std::os::fd::RawFd;

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

/// Waits for one of `fds`; without any, merely waits.
pub(super) fn poll(fds: &mut [libc::pollfd], timeout_ms: u32) -> isize {
    let mut timeout = libc::timespec {
        tv_sec: i64::from(timeout_ms / 1000),
        tv_nsec: i64::from(timeout_ms % 1000) * 1_000_000,
    };
    // SAFETY: the kernel reads and writes the pollfds and the timespec, and a null mask leaves the signal mask as it is.
    unsafe {
        syscall(libc::SYS_ppoll, [fds.as_mut_ptr() as usize, fds.len(), &raw mut timeout as usize, 0, 0])
    }
}

/// Resets the counter of an eventfd.
pub(super) fn drain(eventfd: RawFd) {
    let mut count = 0u64;
    // SAFETY: the kernel writes no more than 8 bytes to `count`.
    unsafe {
        syscall(libc::SYS_read, [eventfd as usize, &raw mut count as usize, size_of_val(&count), 0, 0])
    };
}

pub(super) fn close_range(first: u32, last: u32) {
    // SAFETY: takes no pointer. The descriptors are the keeper's own, and no object of Rust in it owns one.
    unsafe { syscall(libc::SYS_close_range, [first as usize, last as usize, 0, 0, 0]) };
}

pub(super) fn lower_priority(nice: u8) {
    let parameter = libc::sched_param { sched_priority: 0 };
    let policy = libc::SCHED_BATCH as usize;
    // SAFETY: reads one sched_param; process 0 is the caller.
    unsafe { syscall(libc::SYS_sched_setscheduler, [0, policy, &raw const parameter as usize, 0, 0]) };
    let process = libc::PRIO_PROCESS as usize;
    // SAFETY: takes no pointer; process 0 is the caller.
    unsafe { syscall(libc::SYS_setpriority, [process, 0, nice.into(), 0, 0]) };
}

/// Writes `bytes` to the file `path`, which exists.
pub(super) fn write_file(path: &CStr, bytes: &[u8]) {
    let directory = libc::AT_FDCWD as usize;
    let flags = (libc::O_WRONLY | libc::O_CLOEXEC) as usize;
    // SAFETY: reads a C string.
    let fd = unsafe { syscall(libc::SYS_openat, [directory, path.as_ptr() as usize, flags, 0, 0]) };
    if fd < 0 {
        return;
    }
    // SAFETY: reads `bytes`; then closes what was opened above.
    unsafe {
        syscall(libc::SYS_write, [fd as usize, bytes.as_ptr() as usize, bytes.len(), 0, 0]);
        syscall(libc::SYS_close, [fd as usize, 0, 0, 0, 0]);
    }
}

pub(super) fn exit(code: u8) -> ! {
    loop {
        // SAFETY: takes no pointer, and does not return.
        unsafe { syscall(libc::SYS_exit_group, [usize::from(code), 0, 0, 0, 0]) };
    }
}
