//! vCPUs: their threads, what they do between two exits, and their state.
//!
//! Each vCPU has one thread ("vcpu0" and so on), which creates it and runs it. A vCPU is parked or running; the
//! diagram is at [`Vcpus`]. A parked one takes jobs from any thread, and does without its own.
//!
//! | What | Where |
//! |---|---|
//! | the owner's side: resume, pause, jobs, threads that go and come back | `vcpus.rs` |
//! | the thread's side: the guest's exits | `thread.rs`, `failure.rs` |
//! | what both share, and the stop protocol | `slot.rs` |
//! | quick resume of many vCPUs on few CPUs | `turns.rs` |
//! | a turn's end, and the way to a new guest's door | `turn_timer.rs` |
//! | one job for all vCPUs | `jobs.rs` |
//! | waiting without falling asleep | `wait.rs` |
//! | the order in which state is read and set, and why | `registers.rs`, `msrs.rs`, `cpuid.rs` |

mod cpuid;
mod event;
mod failure;
mod jobs;
mod msrs;
mod registers;
mod slot;
mod thread;
mod turn_timer;
mod turns;
mod vcpus;
mod wait;

pub use event::{EventQueue, EventSender, VcpuEvent, event_queue};
pub use thread::{NoObserver, RunObserver};
pub use vcpus::Vcpus;

pub(crate) use cpuid::host_cpuid;
pub(crate) use jobs::Pending;
pub(crate) use msrs::{IA32_TSC, has_paravirtual_clock, learn_list as learn_msr_list, read as read_msrs};
pub(crate) use registers::{Pristine, entry_registers, restore, save, set_cpuid, set_entry_registers};
pub(crate) use thread::{Environment, quiet_mask};

pub use crate::error::VcpuError;

/// Runs a step of a restore, unless the build has faults and the environment asks to leave this one out.
macro_rules! restore_step {
    ($name:literal, $step:expr) => {{
        #[cfg(feature = "fault-injection")]
        let skipped = $crate::vcpu::fault::skips($name);
        #[cfg(not(feature = "fault-injection"))]
        let skipped = false;
        if !skipped {
            $step
        }
    }};
}
pub(crate) use restore_step;

/// Steps of a restore that are left out on purpose, so that a test can be shown to notice.
#[cfg(feature = "fault-injection")]
pub(crate) mod fault {
    use std::sync::OnceLock;

    /// A comma list of steps: `cpuid`, `tsc-offset`, `mp-state`, `regs`, `sregs`, `xsave`, `xcrs`, `debugregs`,
    /// `lapic`, `msrs`, `nested`, `events`, `pic`, `irqchip`, `pit`, `kvmclock`, `gsi-routes`, `serial`,
    /// `platform`.
    const VARIABLE: &str = "CPR_TEST_SKIP_RESTORE";

    pub(crate) fn skips(step: &str) -> bool {
        static SKIPPED: OnceLock<String> = OnceLock::new();
        let skipped = SKIPPED.get_or_init(|| std::env::var(VARIABLE).unwrap_or_default());
        skipped.split(',').any(|s| s.trim() == step)
    }
}
