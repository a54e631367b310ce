//! Waiting for what is about to happen.

use std::time::{Duration, Instant};

/// Less than what a CPU takes to fall asleep and to be woken twice over, on a host that is itself a guest.
const BRIEFLY: Duration = Duration::from_micros(200);

/// Returns when `done`, or after a moment in which it was not; tells which. The CPU is kept awake for whoever is to bring it
/// about, and left to them.
pub(super) fn briefly(mut done: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + BRIEFLY;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        std::thread::yield_now();
    }
}
