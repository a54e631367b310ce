#![allow(unsafe_code, reason = "the C library's thread is joined directly")]
//! What is left of threads that an exec has ended.

use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_still_runs_is_not_waited_for() {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        bury(std::thread::spawn(move || receiver.recv()));
        drop(sender);
    }
}
