//! What happens at a point that the environment names. A process image is struck once, so that its next update is a good
//! one; what it executes has the variable in its environment, too, and is struck at points of its own.

use std::fs::OpenOptions;
use std::io::Write;
use std::panic::catch_unwind;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use oslib::signals::{self, ThreadId};

use super::Point;
use crate::error::BoxError;

/// `KIND@POINT`: what is to happen, and where.
pub const VARIABLE: &str = "CPR_TEST_FAULT";
/// A file that gets a line for each time that it did.
pub const LOG_VARIABLE: &str = "CPR_TEST_FAULT_LOG";

/// The way that an update goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// To a program that takes the source's place: [`Course::Halted`](crate::Course::Halted).
    Halted,
    /// [`Course::Departing`](crate::Course::Departing).
    Departing,
    /// [`Course::Alongside`](crate::Course::Alongside).
    Alongside,
    /// To storage, and later from there: [`Course::Halted`](crate::Course::Halted), too.
    Storage,
}

/// A process of an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Process {
    /// The program before the update, in the process that its user knows.
    Source,
    /// The same in the process that it has departed to.
    Keeper,
    /// A program that is asked beforehand, and is no target.
    Asked,
    /// The program after the update.
    Target,
}

pub(super) const S: Option<Process> = Some(Process::Source);
pub(super) const K: Option<Process> = Some(Process::Keeper);
pub(super) const A: Option<Process> = Some(Process::Asked);
pub(super) const T: Option<Process> = Some(Process::Target);
pub(super) const N: Option<Process> = None;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident $name:literal;)+) => {
        /// What a fault is.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Kind {
            $($(#[$doc])* $kind,)+
        }

        impl Kind {
            const ALL: &[Kind] = &[$(Kind::$kind),+];

            /// As the environment spells it.
            pub fn name(self) -> &'static str {
                match self { $(Kind::$kind => $name),+ }
            }
        }
    };
}

kinds! {
    /// The step fails with an error.
    Error "error";
    /// The thread panics, which ends the process as it does in a release.
    Panic "panic";
    /// The process is killed by SIGKILL.
    Kill "kill";
    /// The thread never goes on.
    Stall "stall";
    /// The thread goes on after a second: a stall where nobody watches.
    Pause "pause";
    /// A byte of what passes is another.
    Corrupt "corrupt";
    /// A thread beside this one panics.
    ThreadPanic "thread-panic";
    /// A wild access to memory.
    Segv "segv";
    /// The stack overflows.
    Overflow "overflow";
    /// The program aborts itself.
    Abort "abort";
}

static WISH: LazyLock<Option<(Kind, Point)>> = LazyLock::new(|| {
    let wish = std::env::var(VARIABLE).ok()?;
    let wished = wish.split_once('@').and_then(|(kind, point)| {
        let kind = Kind::ALL.iter().find(|known| known.name() == kind)?;
        let point = Point::ALL.iter().find(|known| known.name() == point)?;
        Some((*kind, *point))
    });
    Some(wished.unwrap_or_else(|| panic!("{VARIABLE}: no fault '{wish}'")))
});

/// What is to happen at `point`, unless it did.
fn struck(point: Point) -> Option<Kind> {
    static STRUCK: AtomicBool = AtomicBool::new(false);
    let (kind, _) = WISH.filter(|&(_, wished)| wished == point)?;
    if STRUCK.swap(true, Ordering::AcqRel) {
        return None;
    }
    if let Some(path) = std::env::var_os(LOG_VARIABLE) {
        let log = OpenOptions::new().create(true).append(true).open(path);
        log.and_then(|mut log| writeln!(log, "{}@{}", kind.name(), point.name()))
            .expect("the log can be written");
    }
    Some(kind)
}

/// Comes by `point`, and fails there if the environment says so.
///
/// # Errors
/// The one that was asked for.
///
/// # Panics
/// The environment names no fault that there is.
pub fn at(point: Point) -> Result<(), BoxError> {
    struck(point).map_or(Ok(()), |kind| act(kind, point))
}

/// As [`at`]; and `bytes` may be others afterwards.
///
/// # Errors
/// As [`at`].
///
/// # Panics
/// As [`at`].
pub fn pass(point: Point, mut bytes: Vec<u8>) -> Result<Vec<u8>, BoxError> {
    match struck(point) {
        None => {}
        Some(Kind::Corrupt) => {
            let middle = bytes.len() / 2;
            bytes.get_mut(middle).into_iter().for_each(|byte| *byte ^= 0x55);
        }
        Some(kind) => act(kind, point)?,
    }
    Ok(bytes)
}

fn act(kind: Kind, point: Point) -> Result<(), BoxError> {
    match kind {
        Kind::Error => return Err(format!("an error that was asked for, at '{}'", point.name()).into()),
        Kind::Panic => {
            // Up to here as far as the hooks are concerned; and no further, as a release does not unwind.
            let _ = catch_unwind(|| panic!("a panic that was asked for"));
            std::process::abort()
        }
        Kind::Kill => raise(9),
        Kind::Stall => loop {
            std::thread::sleep(Duration::from_secs(600));
        },
        Kind::Pause => std::thread::sleep(Duration::from_secs(1)),
        Kind::Corrupt => return Err("there is nothing to corrupt here".into()),
        Kind::ThreadPanic => {
            let _ = std::thread::spawn(|| panic!("a panic that was asked for")).join();
        }
        Kind::Segv => raise(11),
        Kind::Overflow => drop(deeper(1)),
        Kind::Abort => std::process::abort(),
    }
    Ok(())
}

fn raise(signal: i32) {
    let _ = signals::kick(ThreadId::current(), signal);
}

#[expect(unconditional_recursion, reason = "to fill the stack")]
fn deeper(depth: u64) -> Vec<u64> {
    let room = std::hint::black_box([depth; 256]);
    let mut deepest = deeper(depth.wrapping_add(1));
    deepest.push(room[1]);
    deepest
}
