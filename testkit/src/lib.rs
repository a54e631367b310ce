//! Drives a real `cpr-vmm` the way a user does: the real binary, its command line, QMP over a unix socket, a terminal,
//! and guest memory seen through its memfd.
//!
//! Tests, benchmarks and `cargo xtask demo` share it. Every wait has a limit, and a [`Vmm`] that is dropped ends its
//! process, by pid.

mod belongings;
pub mod blocks;
mod console;
mod gate;
mod guest;
pub mod lab;
mod machine;
mod measure;
pub mod network;
pub mod process;
mod qmp;
mod shell;
mod vmm;

pub use belongings::{Belongings, Look};
pub use console::{Console, Terminal, pipes};
pub use gate::{Gate, Held};
pub use guest::{Guest, beat_gap_us};
pub use machine::Machine;
pub use measure::{Meter, Through, Update, median, timeline};
pub use qmp::{Qmp, QmpFailure};
pub use shell::GuestShell;
pub use vmm::{Vmm, VmmBuilder, binary, payload_tsc_hz};

use std::time::{Duration, Instant};

/// How long anything may take that is not said to take longer.
pub const PATIENCE: Duration = Duration::from_secs(60);

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

/// Skips the test that calls it, by name, where there is no KVM at all. The test returns a `Result`.
#[macro_export]
macro_rules! need_kvm {
    () => {
        if !$crate::kvm_is_present() {
            eprintln!("SKIPPED {}: there is no /dev/kvm", $crate::current_test());
            return Ok(());
        }
    };
}

/// Skips the test that calls it, by name and with the reason, unless the condition holds. The test returns a `Result`.
#[macro_export]
macro_rules! skip_unless {
    ($condition:expr, $($reason:tt)+) => {
        if !$condition {
            eprintln!("SKIPPED {}: {}", $crate::current_test(), format_args!($($reason)+));
            return Ok(());
        }
    };
}

/// Puts the test that calls it into a network of its own ([`network::enter_own`]), or skips it by name and with the reason. The
/// test returns a `Result`.
#[macro_export]
macro_rules! need_network {
    () => {
        if let Err(reason) = $crate::network::enter_own() {
            eprintln!("SKIPPED {}: {reason}", $crate::current_test());
            return Ok(());
        }
    };
}

/// The name of the running test, which is that of its thread.
pub fn current_test() -> String {
    std::thread::current().name().unwrap_or("a test").to_owned()
}

/// Whether KVM is there at all. A test that needs it reports itself as skipped, by name, if not; if it is there and
/// cannot be used, the test fails.
pub fn kvm_is_present() -> bool {
    std::path::Path::new("/dev/kvm").exists()
}
