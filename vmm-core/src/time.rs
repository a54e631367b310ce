//! The guest's time beyond one boot of a host.
//!
//! As long as the kernel stays, a saved TSC offset and CLOCK_MONOTONIC mean the same to source and target, and nothing
//! here is needed. Another kernel counts both from its own start: then the guest's counters go on from what they were,
//! plus the time that has passed by the wall clock, which is the one clock that both hosts have. A wall clock that was set
//! back in between counts as no time at all: the guest's time never goes backwards.

use std::time::{SystemTime, UNIX_EPOCH};

use cpr_core::section::SectionType;
use oslib::clock::{boot_id, monotonic_ns};
use serde::{Deserialize, Serialize};

use crate::state::{ClockState, MachineState, VcpuState};
use crate::vcpu::IA32_TSC;

/// What the clocks showed when a machine was saved. A wire type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeState {
    /// The boot of the host that the other numbers belong to.
    pub boot_id: [u8; 16],
    /// CLOCK_REALTIME in ns.
    pub realtime_ns: u64,
    /// CLOCK_MONOTONIC in ns at the same moment.
    pub monotonic_ns: u64,
    /// The guest's TSC on each vCPU, and CLOCK_REALTIME in ns when it was read.
    pub vcpus: Vec<(u64, u64)>,
}

impl SectionType for TimeState {
    const NAME: &'static str = "kvm/time";
    const VERSION: u32 = 1;
}

/// What the clocks show now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// The boot of the host.
    pub boot_id: [u8; 16],
    /// CLOCK_REALTIME in ns.
    pub realtime_ns: u64,
    /// CLOCK_MONOTONIC in ns.
    pub monotonic_ns: u64,
}

impl Now {
    /// Reads the clocks.
    ///
    /// # Errors
    /// The kernel does not tell its boot id.
    pub fn read() -> std::io::Result<Now> {
        Ok(Now { boot_id: boot_id()?, realtime_ns: realtime_ns(), monotonic_ns: monotonic_ns() })
    }
}

/// CLOCK_REALTIME in ns; 0 before 1970.
pub(crate) fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

impl TimeState {
    /// Makes `state` one of the present boot, if it is of another one.
    pub fn go_on(&self, state: &mut MachineState, now: &Now) {
        if self.boot_id == now.boot_id {
            return;
        }
        self.go_on_with_clock(&mut state.vm.clock, now);
        for (vcpu, &(tsc, realtime_ns)) in state.vcpus.iter_mut().zip(&self.vcpus) {
            set_tsc(vcpu, tsc, now.realtime_ns.saturating_sub(realtime_ns));
        }
    }

    /// The paravirtual clock, as if it had been read now. KVM's own pair of it and the real time would do, but tells
    /// nothing where a wall clock was set back.
    fn go_on_with_clock(&self, clock: &mut ClockState, now: &Now) {
        let read_at = self.realtime_ns.saturating_sub(self.monotonic_ns.saturating_sub(clock.monotonic_ns));
        let passed = now.realtime_ns.saturating_sub(read_at);
        *clock = ClockState {
            kvmclock_ns: clock.kvmclock_ns.saturating_add(passed),
            monotonic_ns: now.monotonic_ns,
            ..ClockState::default()
        };
    }
}

/// Gives the vCPU a TSC in place of an offset to a host's that is gone. It comes first: the deadline among the MSRs is
/// measured by it.
fn set_tsc(vcpu: &mut VcpuState, tsc: u64, passed_ns: u64) {
    vcpu.tsc_offset = None;
    vcpu.msrs.retain(|&(index, _)| index != IA32_TSC);
    vcpu.msrs.insert(0, (IA32_TSC, tsc.wrapping_add(ticks(passed_ns, vcpu.tsc_khz))));
}

/// Ticks in so many ns, at so many kHz.
fn ticks(ns: u64, khz: u32) -> u64 {
    (u128::from(ns) * u128::from(khz) / 1_000_000) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::machine_state;

    const SECOND: u64 = 1_000_000_000;

    fn saved() -> (TimeState, MachineState) {
        let mut state = machine_state(2);
        state.vm.clock = ClockState {
            kvmclock_ns: 50 * SECOND,
            flags: 7,
            realtime_ns: 1,
            host_tsc: 2,
            monotonic_ns: 90 * SECOND,
        };
        for vcpu in &mut state.vcpus {
            (vcpu.tsc_khz, vcpu.tsc_offset) = (2_000_000, Some(u64::MAX));
            vcpu.msrs = vec![(0x174, 5), (0x6e0, 6)];
        }
        let time = TimeState {
            boot_id: [1; 16],
            realtime_ns: 1000 * SECOND,
            monotonic_ns: 90 * SECOND + 500,
            vcpus: vec![(7_000, 1000 * SECOND), (8_000, 1000 * SECOND + 1_000)],
        };
        (time, state)
    }

    fn now(boot: u8, realtime_ns: u64) -> Now {
        Now { boot_id: [boot; 16], realtime_ns, monotonic_ns: 3 * SECOND }
    }

    #[test]
    fn one_boot_needs_nothing() {
        let (time, mut state) = saved();
        let before = state.clone();
        time.go_on(&mut state, &now(1, 2000 * SECOND));
        assert_eq!(state, before);
    }

    #[test]
    fn another_boot_goes_on_by_the_wall_clock() {
        let (time, mut state) = saved();
        time.go_on(&mut state, &now(2, 1060 * SECOND));
        // 60 s at 2 GHz; the second was read 1 us later.
        let tsc: Vec<_> = state.vcpus.iter().map(|vcpu| vcpu.msrs[0]).collect();
        assert_eq!(tsc, [(IA32_TSC, 7_000 + 120 * SECOND), (IA32_TSC, 8_000 + 120 * SECOND - 2_000)]);
        for vcpu in &state.vcpus {
            assert_eq!(vcpu.tsc_offset, None);
            assert_eq!(vcpu.msrs[1..], [(0x174, 5), (0x6e0, 6)]);
        }
        let clock = state.vm.clock;
        // The clock was read 500 ns before the pair was.
        assert_eq!(clock.kvmclock_ns, 110 * SECOND + 500);
        assert_eq!((clock.flags, clock.realtime_ns, clock.monotonic_ns), (0, 0, 3 * SECOND));
    }

    #[test]
    fn time_never_goes_backwards_nor_overflows() {
        let (time, mut state) = saved();
        time.go_on(&mut state, &now(2, 10 * SECOND));
        assert_eq!(state.vcpus[0].msrs[0], (IA32_TSC, 7_000));
        assert_eq!(state.vm.clock.kvmclock_ns, 50 * SECOND);

        let (time, mut state) = saved();
        state.vcpus[0].tsc_khz = u32::MAX;
        time.go_on(&mut state, &now(2, u64::MAX));
        let wild = TimeState { realtime_ns: 0, monotonic_ns: u64::MAX, ..time };
        let (_, mut state) = saved();
        wild.go_on(&mut state, &now(2, u64::MAX));
        assert_eq!(state.vm.clock.kvmclock_ns, u64::MAX);
    }

    #[test]
    fn a_tsc_among_the_msrs_is_replaced() {
        let (time, mut state) = saved();
        state.vcpus[0].msrs.insert(0, (IA32_TSC, 1));
        // A frequency that nobody told: no time can be added.
        (state.vcpus[0].tsc_khz, state.vcpus[0].tsc_offset) = (0, None);
        time.go_on(&mut state, &now(2, 1060 * SECOND));
        assert_eq!(state.vcpus[0].msrs, [(IA32_TSC, 7_000), (0x174, 5), (0x6e0, 6)]);
    }
}
