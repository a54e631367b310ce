//! vCPUs: their threads, what they do between two exits, and their state.
//!
//! Each vCPU has one thread ("vcpu0" and so on), which creates it, runs it, and makes every call on it: KVM is quick only
//! for the thread that used a vCPU last, and all vCPUs are saved and restored at the same time. A vCPU is parked
//! (nothing but the jobs it is given) or running; the diagram is at [`Vcpus`]. The order in which state is read and
//! set is in `registers.rs`, with the reasons.

mod cpuid;
mod event;
mod msrs;
mod registers;
mod threads;

pub use event::{EventQueue, EventSender, VcpuEvent, event_queue};
pub use threads::{NoObserver, RunObserver, Vcpus};

pub(crate) use cpuid::host_cpuid;
pub(crate) use msrs::{IA32_TSC, learn_list as learn_msr_list};
pub(crate) use registers::{entry_registers, restore, save, set_cpuid, set_entry_registers};
pub(crate) use threads::{Environment, Pending};

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
