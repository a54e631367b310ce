//! Drives a real `cpr-vmm` the way a user does: the real binary, its command line, QMP over a unix socket, a terminal,
//! and guest memory seen through its memfd.
//!
//! Tests, benchmarks and `cargo xtask demo` share it. Every wait has a limit, and a [`Vmm`] that is dropped ends its
//! process, by pid.

mod guest;
mod qmp;
mod vmm;

pub use guest::{Guest, beat_gap_us};
pub use qmp::{Qmp, QmpFailure};
pub use vmm::{Vmm, VmmBuilder, binary, payload_tsc_hz};

use std::time::{Duration, Instant};

/// How long anything may take that is not said to take longer.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `ready` gives something, `limit` at most.
///
/// # Errors
/// Names `what` it waited for in vain.
pub fn wait_for<T>(what: &str, limit: Duration, mut ready: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = ready() {
            return Ok(value);
        }
        anyhow::ensure!(Instant::now() < end, "waited {limit:?} in vain for {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Whether KVM is there at all. A test that needs it reports itself as skipped, by name, if not; if it is there and
/// cannot be used, the test fails.
pub fn kvm_is_present() -> bool {
    std::path::Path::new("/dev/kvm").exists()
}
