#![allow(
    unsafe_code,
    reason = "the environment is shared by all threads of a process, and libc does not lock it"
)]
//! Changing the environment, which is sound only while a process has one thread.
//!
//! Refuses to do so otherwise. See environ(7) and the safety section of [`std::env::remove_var`].

use std::ffi::OsStr;
use std::io;

/// Removes the variable `name`, in a process of one thread.
///
/// # Errors
/// `Unsupported` when there is another thread; those of reading `/proc/self/task`.
pub fn remove(name: impl AsRef<OsStr>) -> io::Result<()> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the environment can only be changed while there is one thread",
        ));
    }
    // SAFETY: this is the only thread, so nobody reads the environment meanwhile.
    unsafe { std::env::remove_var(name) };
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_second_thread_forbids_it() {
        // The test harness runs this test on a thread of its own.
        let error = super::remove("PATH").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::Unsupported);
        assert!(std::env::var_os("PATH").is_some());
    }
}
