//! What a VMM (or any program with state worth keeping) implements to be updated.

use std::path::PathBuf;
use std::time::Instant;

use crate::error::BoxError;
use crate::frame::{Frame, FrameWriter};
use crate::mode::{ModeInfo, TerminalAction};
use crate::preflight::Manifest;

/// What a region of guest memory is made of, as far as an update that leaves it in place cares.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backing {
    /// Shared memory with a descriptor that is in the registry under this name and id.
    Shared {
        /// Registry name.
        name: String,
        /// Registry id.
        id: u64,
    },
    /// As [`Shared`](Self::Shared), and a file that has a name: it is there when no process has it open any more.
    File {
        /// Registry name.
        name: String,
        /// Registry id.
        id: u64,
        /// The file's name.
        path: PathBuf,
    },
    /// Private memory: it ends with this address space.
    Private,
    /// Memory of a guest_memfd, which is bound to one VM.
    GuestMemfd,
    /// Memory without a descriptor, or of unknown making.
    Unknown,
}

/// A region of guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryRegion {
    /// What the user calls it.
    pub name: String,
    /// Bytes.
    pub len: u64,
    /// What it is made of.
    pub backing: Backing,
}

/// Whether the guest ran when it was stopped, and so whether it is to run again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestActivity {
    /// It ran.
    Running,
    /// The user had paused it; it stays paused after the update.
    Paused,
}

/// The sections of the source, on their way to a mode.
#[derive(Debug, Default)]
pub struct StateWriter {
    /// What the target must know before it creates a device. Small.
    pub early: FrameWriter,
    /// Everything else.
    pub main: FrameWriter,
}

/// A program whose guest an update carries over.
///
/// One trait for both ends: a program that was updated is updated again. All methods run on the thread of the
/// host's own loop.
pub trait Host {
    /// Every region of guest memory. What is not listed is lost: list all of it, in particular what must not be
    /// left behind.
    fn memory(&self) -> Vec<MemoryRegion>;

    /// What the target is to be shown before anything is touched, for it to say whether it can take over: every section
    /// that this program will write, with its versions. Descriptors and what this crate writes are added to it. `None`, the
    /// default: the target is not asked.
    fn manifest(&self, mode: &ModeInfo) -> Option<Manifest> {
        let _ = mode;
        None
    }

    /// Whether the guest runs now. Asked before [`stop`](Self::stop), for the case that it fails half-way. A host
    /// whose user can pause the guest says so here, or a failed stop would set a paused guest running.
    fn activity(&self) -> GuestActivity {
        GuestActivity::Running
    }

    /// Parks the vCPUs and quiesces device threads, and says whether the guest ran. Called once per pause: a mode that
    /// departs makes two. May be called for a guest that is paused.
    ///
    /// # Errors
    /// Something did not stop by `deadline`. Whatever was stopped is resumed by [`resume`](Self::resume), with the
    /// [`activity`](Self::activity) of before.
    fn stop(&mut self, deadline: Instant) -> Result<GuestActivity, BoxError>;

    /// Runs the guest again after a roll back, or for the first time in the target, if `activity` says so.
    ///
    /// # Errors
    /// The guest could not be started.
    fn resume(&mut self, activity: GuestActivity) -> Result<(), BoxError>;

    /// Writes what the target must know before it creates a device. Small.
    ///
    /// Called once per attempt. The guest runs, but for modes that stop it first ([`Course::Halted`](crate::Course::Halted)).
    ///
    /// # Errors
    /// Something cannot travel now; it should name itself.
    fn save_early(&mut self, mode: &ModeInfo, early: &mut FrameWriter) -> Result<(), BoxError> {
        let _ = (mode, early);
        Ok(())
    }

    /// How many bytes [`save`](Self::save) will take at most, more or less.
    fn state_len_hint(&self) -> usize {
        64 << 10
    }

    /// Writes every component's section, with the guest stopped.
    ///
    /// # Errors
    /// A component cannot be saved now; it should name itself.
    fn save(&mut self, main: &mut FrameWriter) -> Result<(), BoxError>;

    /// The program is about to save its early sections, to stop the guest and to leave its process. Whoever is not to hear
    /// from it in its other process, because the target talks to them from now on, is told the last here.
    ///
    /// # Errors
    /// The update is rolled back.
    fn before_departure(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// The program is about to leave its process ([`Course::Departing`](crate::Course::Departing)), which ends all threads
    /// but the loop's where they stand. The guest is stopped. Have threads hold no lock here, nor anything else that would
    /// stay half-done, and have new ones in [`resume`](Self::resume), which is next: in the other process, or here if the
    /// mode failed to leave.
    ///
    /// # Errors
    /// The update is rolled back.
    fn depart(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// The program goes on in another process. What the target has by now must be left alone until the update has failed:
    /// connections whose state it was given.
    ///
    /// # Errors
    /// The update is rolled back: the target is ended.
    fn departed(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// Gives every component its section back, in the target. Take sections out of `main`; those that remain
    /// refuse the update.
    ///
    /// # Errors
    /// A component refuses its section; it should name itself.
    fn load(&mut self, main: &mut Frame) -> Result<(), BoxError>;

    /// Keeps `action` until the stack has unwound to the loop, and runs it there as the very last thing: it replaces
    /// the process. If it comes back, give its answer to [`Update::terminal_returned`](crate::Update::terminal_returned).
    fn request_terminal(&mut self, action: TerminalAction);
}
