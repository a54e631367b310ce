//! The way back in the same process: a target that cannot take the guest over executes the source's program again.
//!
//! ```text
//!   target fails ──► fall_back ──► the source's program, told so by the control page
//!   (error, panic, fatal signal)   = another target of the same attempt: same state, same word, same pid
//! ```
//!
//! Everything is made ready when the update is received, with copies of all descriptors, so that it works whatever has
//! become of the target since. It happens once per attempt: a fallback start that fails just ends, and the keeper goes on.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::{Mutex, PoisonError, TryLockError};

use cpr_core::ownership::Owner;
use cpr_core::{Control, FdRegistry};
use oslib::exec::PreparedExec;
use oslib::signals::{self, FatalHandlers};
use oslib::stream;

use crate::{FallbackWire, environment};

/// What is executed, while there is a way back.
static READY: Mutex<Option<Ready>> = Mutex::new(None);

#[derive(Debug)]
struct Ready {
    exec: PreparedExec,
    directory: OwnedFd,
    /// Copies of what was preserved, and the numbers under which the program is to find them.
    descriptors: Vec<(OwnedFd, RawFd)>,
    control: Control,
    handlers: Option<FatalHandlers>,
}

/// Signals that a program does not survive: by its own fault, and SIGABRT also from a source that waits in vain.
const FATAL: [(i32, &str); 6] =
    [(4, "SIGILL"), (SIGABRT, "SIGABRT"), (7, "SIGBUS"), (8, "SIGFPE"), (11, "SIGSEGV"), (31, "SIGSYS")];
/// signal(7).
pub(crate) const SIGABRT: i32 = 6;

/// Makes the way back ready: the program and the working directory of the source, the descriptors of `registry`, and
/// `state`.
pub(crate) fn prepare(
    wire: FallbackWire,
    [program, directory]: [&OwnedFd; 2],
    registry: &FdRegistry,
    state: &OwnedFd,
    control: &Control,
) -> io::Result<()> {
    let mut descriptors = vec![(state.try_clone()?, state.as_raw_fd())];
    registry.walk_fd(|_, fd| {
        descriptors.push((fd.try_clone_to_owned()?, fd.as_raw_fd()));
        Ok::<_, io::Error>(())
    })?;
    let string = OsString::from_vec;
    let arguments = wire.arguments.into_iter().map(string);
    let environment = wire.environment.into_iter().map(|(name, value)| (string(name), string(value)));
    let environment = environment::with_state(environment, state.as_raw_fd());
    let exec = PreparedExec::of_descriptor(program.try_clone()?, arguments, environment)?;
    let directory = directory.try_clone()?;
    let ready = Ready { exec, directory, descriptors, control: control.clone(), handlers: None };
    *READY.lock().unwrap_or_else(PoisonError::into_inner) = Some(ready);
    // Only now, because one of them may be pending.
    let handlers = signals::on_fatal(&FATAL.map(|(signal, _)| signal), on_signal)?;
    if let Some(ready) = READY.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
        ready.handlers = Some(handlers);
    }
    Ok(())
}

/// There is no way back any more: descriptors are closed, handlers removed.
pub(crate) fn disarm() {
    let ready = READY.lock().unwrap_or_else(PoisonError::into_inner).take();
    // Not under the lock, for a signal that still finds its handler.
    drop(ready);
}

/// Gives the guest's update up for this program: executes the source's program in this process, to take the guest over
/// from the state that this one could not use. Say why on standard error first: that is what the user is told.
///
/// Returns if there is no way back: no update is coming in, the ownership word is won already, the source has given no
/// command ([`CprExec::fallback`](crate::CprExec::fallback)), or this is a fallback start itself. May be called by any
/// thread, in a panic hook, too.
pub fn fall_back() {
    if let Some(ready) = &*READY.lock().unwrap_or_else(PoisonError::into_inner) {
        ready.go();
    }
}

/// In a signal handler: no lock is waited for, nothing is allocated.
fn on_signal(signal: i32) {
    let ready = match READY.try_lock() {
        Ok(ready) => ready,
        Err(TryLockError::Poisoned(error)) => error.into_inner(),
        Err(TryLockError::WouldBlock) => return,
    };
    if let Some(ready) = &*ready {
        let name = FATAL.iter().find(|(number, _)| *number == signal).map_or("a signal", |(_, name)| name);
        stream::write_stderr(b"the new program was ended by ");
        stream::write_stderr(name.as_bytes());
        stream::write_stderr(b"\n");
        ready.go();
    }
}

impl Ready {
    /// Safe in a signal handler.
    fn go(&self) {
        // Somebody else's guest is left alone; and after the commit there is nothing to go back to.
        if self.control.ownership().owner() != Some(Owner::Source) {
            return;
        }
        // As in every exec of an update: until handlers stand, signals wait.
        if signals::block_all().is_err() {
            return;
        }
        self.control.rendezvous().start_fallback();
        self.exec.run_with(&self.directory, &self.descriptors)
    }
}

/// In a fallback start: what exec does not keep and a watcher of processes would miss.
pub(crate) fn settle_in() {
    // An exec by descriptor names the process after the descriptor's number.
    let name = std::env::args_os().next();
    let name = name.as_deref().map(std::path::Path::new).and_then(std::path::Path::file_name);
    let name = name.and_then(|name| std::ffi::CString::new(name.as_encoded_bytes()).ok());
    if let Some(name) = name {
        let _ = oslib::process::set_name(&name);
    }
    // The source may have lost patience with the program before this one just as that one gave up.
    let _ = signals::discard_pending(SIGABRT);
}

/// A standard error that nobody reads yet: see [`LastWords::read`].
#[derive(Debug)]
pub(crate) struct LastWords {
    pub(crate) memfd: std::sync::Arc<OwnedFd>,
    /// What standard error is otherwise.
    pub(crate) original: std::sync::Arc<OwnedFd>,
}

/// Bytes of last words that are told.
const TOLD_BYTES: usize = 2048;

/// What a program has `said`, for a message. Of much the beginning, where a panic says what it is before it lists its stack,
/// and the end.
pub(crate) fn told(said: &[u8]) -> String {
    let said = said.trim_ascii();
    if said.len() <= TOLD_BYTES {
        return String::from_utf8_lossy(said).into_owned();
    }
    let [first, last] = [&said[..TOLD_BYTES / 2], &said[said.len() - TOLD_BYTES / 2..]];
    let [first, last] = [first, last].map(|part| String::from_utf8_lossy(part.trim_ascii()));
    format!("{first} [...] {last}")
}

impl LastWords {
    /// What was said so far.
    pub(crate) fn read(&self) -> String {
        told(&self.bytes())
    }

    /// Says all of it to standard error itself, which it puts back if it was replaced.
    pub(crate) fn replay(self) {
        if let Err(error) = stream::replace_stderr(&self.original) {
            tracing::error!(%error, "standard error could not be put back");
        }
        stream::write_stderr(&self.bytes());
    }

    fn bytes(&self) -> Vec<u8> {
        use std::os::unix::fs::FileExt;
        let Ok(file) = self.memfd.as_fd().try_clone_to_owned().map(std::fs::File::from) else {
            return Vec::new();
        };
        let len = oslib::memfd::len(&self.memfd).unwrap_or(0);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        // By position: the offset is where the program goes on writing.
        match file.read_at(&mut bytes, 0) {
            Ok(count) => bytes.truncate(count),
            Err(_) => bytes.clear(),
        }
        bytes
    }
}

/// `what`, and why: the words that were found, if there are any.
pub(crate) fn with_words(what: String, words: &str) -> String {
    if words.is_empty() { what } else { format!("{what}: {words}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_much_the_beginning_and_the_end_are_told() {
        assert_eq!(told(b" short\n"), "short");
        let much = [b"panicked at".to_vec(), vec![b'.'; 5000], b"main".to_vec()].concat();
        let words = told(&much);
        assert!(words.starts_with("panicked at..") && words.ends_with("..main"), "{words}");
        assert!(words.contains(".. [...] ..") && words.len() < TOLD_BYTES + 10);
    }
}
