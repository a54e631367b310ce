//! Named points of an update, at which a build with the feature `fault-injection` fails on purpose, so that a test can show
//! what becomes of the guest. Without the feature nothing of this is in a program: both functions here do nothing.
//!
//! A point is one row of the table below and one call where it is: [`at`], or [`pass`] where bytes leave the process. The
//! row alone puts it into the test of all failures (`vmm/tests/fault_matrix.rs`).

#[cfg(feature = "fault-injection")]
mod strike;

#[cfg(feature = "fault-injection")]
pub use strike::{Kind, LOG_VARIABLE, Process, Route, VARIABLE, at, pass};

#[cfg(feature = "fault-injection")]
use strike::{A, K, N, S, T};

#[cfg(not(feature = "fault-injection"))]
use crate::error::BoxError;

/// Each row: the point, its name, and the process that comes by on each [`Route`], in the order of these. `S` source, `K`
/// keeper, `A` asked, `T` target, `N` none. `data`: bytes pass that the other side is to read.
macro_rules! points {
    ($($(#[doc = $about:literal])+ $point:ident $name:literal [$($process:ident)+] $($data:literal)?;)+) => {
        /// A point of an update, in the order in which an update comes to them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Point {
            $($(#[doc = $about])+ $point,)+
        }

        #[cfg(feature = "fault-injection")]
        impl Point {
            /// All of them.
            pub const ALL: &'static [Point] = &[$(Point::$point),+];

            /// As the environment spells it.
            pub fn name(self) -> &'static str {
                match self { $(Point::$point => $name),+ }
            }

            /// Where it is.
            pub fn about(self) -> &'static str {
                match self { $(Point::$point => concat!($($about),+).trim_ascii()),+ }
            }

            /// Whether bytes pass here that the other side is to read.
            pub fn carries_data(self) -> bool {
                match self { $(Point::$point => [$($data,)?].contains(&"data")),+ }
            }

            /// The process that comes by, if an update on this route does.
            pub fn process(self, route: Route) -> Option<Process> {
                let [halted, departing, alongside, storage] = match self { $(Point::$point => [$($process),+]),+ };
                match route {
                    Route::Halted => halted,
                    Route::Departing => departing,
                    Route::Alongside => alongside,
                    Route::Storage => storage,
                }
            }
        }
    };
}

points! {
    /// Before the mode looks whether the update is possible; the command has not been answered.
    Check "check" [S S S S];
    /// The source says hello over the cpr channel.
    Hello "hello" [N N S N] "data";
    /// The target has heard it, and answers.
    Greet "greet" [N N T N] "data";
    /// What the program that is asked is to judge is complete.
    Manifest "manifest" [S S S N] "data";
    /// It has read that.
    Judge "judge" [A A T N];
    /// It gives its verdict.
    Verdict "verdict" [A A T N] "data";
    /// Subscribers were told `Prepare`, and the mode is about to prepare.
    Prepare "prepare" [S S S S];
    /// Monitors were told that the guest stops, which runs yet.
    Depart "depart" [N S N N];
    /// The early sections are written, and are about to become the target's.
    Introduce "introduce" [N S S N];
    /// The early frame is complete.
    EarlyFrame "early-frame" [S S S S] "data";
    /// The message that carries the descriptors.
    Introduction "introduction" [N N S N] "data";
    /// The guest stands still, and the threads of its vCPUs rest.
    Leave "leave" [N S N N];
    /// Just before the exec: the keeper waits for it, descriptors are inheritable.
    Terminal "terminal" [S S N N];
    /// The first thing in the keeper; the guest stands still.
    Arrive "arrive" [N K N N];
    /// The target has what it needs to build, and is waited for.
    AwaitTarget "await-target" [N K S N];
    /// The guest is about to be stopped for the save.
    Stop "stop" [S K S S];
    /// The guest stands still, and its state is about to be saved.
    Save "save" [S K S S];
    /// The state is saved, and the mode is about to hand it over.
    HandOver "hand-over" [S K S S];
    /// The main frame is complete.
    MainFrame "main-frame" [S K S S] "data";
    /// The frames are in the state file, and RAM is about to follow.
    Write "write" [N N N S];
    /// All of the state file is written, and about to be made to last.
    Sync "sync" [N N N S];
    /// It has been, and the file is about to get its name.
    Name "name" [N N N S];
    /// The target was told that the state is there.
    Published "published" [N K S N];
    /// The guest is known to be the target's, or in storage.
    Complete "complete" [N K S S];
    /// The early frame was read; nothing of it is used yet.
    Receive "receive" [T T T T];
    /// Everything that came is in the target's hands; under cpr-exec the way back is ready.
    Received "received" [T T T T];
    /// Descriptors and early sections are about to be adopted.
    Adopt "adopt" [T T T T];
    /// RAM that is in the state file is about to be read.
    Fill "fill" [N N N T];
    /// The machine is built; what it lacks is the state.
    Built "built" [T T T T];
    /// The target is about to ask for the state.
    Load "load" [T T T T];
    /// It has asked, and waits.
    Ask "ask" [N T T N];
    /// The main frame was read.
    Loaded "loaded" [T T T T];
    /// The state is restored.
    Restored "restored" [T T T T];
    /// Right before the ownership word is won.
    Commit "commit" [T T T T];
    /// The guest runs in the target.
    Committed "committed" [T T T T];
    /// The state file is about to be marked: its guest has run on.
    Mark "mark" [N N N T];
    /// The source or its keeper is gone, as far as the target waits for it.
    Released "released" [T T T T];
}

/// Comes by `point`.
///
/// # Errors
/// None without the feature `fault-injection`.
#[cfg(not(feature = "fault-injection"))]
#[inline]
pub fn at(_point: Point) -> Result<(), BoxError> {
    Ok(())
}

/// Lets `bytes` pass at `point`.
///
/// # Errors
/// None without the feature `fault-injection`.
#[cfg(not(feature = "fault-injection"))]
#[inline]
pub fn pass(_point: Point, bytes: Vec<u8>) -> Result<Vec<u8>, BoxError> {
    Ok(bytes)
}
