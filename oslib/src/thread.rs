#![allow(unsafe_code, reason = "the C library's thread is joined directly")]
//! What is left of threads that an exec has ended.

use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;

/// Frees the stack of a thread that ended with another process, whose memory the calling one has: a
/// [keeper](crate::keeper)'s, after the exec. What the thread owned is lost. Waits for its end, so for a thread of the
/// calling process it is a plain join.
pub fn bury<T>(thread: JoinHandle<T>) {
    let thread = thread.into_pthread_t();
    // SAFETY: the handle was the only one to join or detach this thread, and is consumed. The kernel tells a thread's end
    // in its memory however it comes about, as long as another process shares that (set_tid_address(2)); the C library
    // waits for this and nothing else, and then nobody uses the stack any more.
    unsafe { libc::pthread_join(thread, std::ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_own_process_it_is_a_join() {
        let thread = std::thread::spawn(|| std::thread::sleep(std::time::Duration::from_millis(20)));
        let id = thread.thread().id();
        bury(thread);
        assert_ne!(id, std::thread::current().id());
    }
}
