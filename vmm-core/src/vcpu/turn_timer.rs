//! A signal of a vCPU's thread to itself, which has `KVM_RUN` return: after a turn, or before the first instruction.

use std::io;
use std::time::Duration;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state};
use nix::sys::signal::{SigEvent, SigevNotify, Signal};
use nix::sys::time::TimeSpec;
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use oslib::signals::{self, SignalMask, ThreadId};

use super::VcpuError;
use crate::error::KvmError;
use crate::kvm::{Exit, Vcpu};

/// How long a turn is: long enough for the guest to get somewhere, short against the time that entering takes all of them.
const TURN: Duration = Duration::from_micros(30);

/// The signal that ends a turn. Threads block it but for `KVM_RUN`: it is taken back without a handler, whose frame on the
/// stack would cost as much as the turn.
const TURN_SIGNAL: Signal = Signal::SIGVTALRM;

/// Ends the turns of the thread that made it: a POSIX timer, which belongs to the process and the thread.
#[derive(Default)]
pub(super) struct TurnTimer(Option<Timer>);

impl TurnTimer {
    /// The signals that `KVM_RUN` is to block during a turn of a thread that blocks these.
    pub(super) fn mask(of_thread: SignalMask) -> SignalMask {
        of_thread.without(TURN_SIGNAL as i32)
    }

    /// Makes the clock, which takes longer than to start it; tells whether there is one, as the system may refuse it.
    pub(super) fn make(&mut self) -> bool {
        if self.0.is_none() {
            let notify = SigevNotify::SigevThreadId {
                signal: TURN_SIGNAL,
                thread_id: nix::unistd::gettid().as_raw(),
                si_value: 0,
            };
            self.0 = Timer::new(ClockId::CLOCK_MONOTONIC, SigEvent::new(notify)).ok();
        }
        self.0.is_some()
    }

    /// Starts the clock, which rings once.
    pub(super) fn start(&mut self) {
        self.set(Expiration::OneShot(TimeSpec::from_duration(TURN)));
    }

    pub(super) fn stop(&mut self) {
        self.set(Expiration::OneShot(TimeSpec::from_duration(Duration::ZERO)));
        signals::take_pending(TURN_SIGNAL as i32);
    }

    fn set(&mut self, when: Expiration) {
        if let Some(timer) = &mut self.0 {
            let _ = timer.set(when, TimerSetTimeFlags::empty());
        }
    }
}

/// Has KVM do what it does on a vCPU's first way into the guest, without going in: a VM gets a kernel thread, and each vCPU
/// the memory for its page tables, which takes longer than all the rest of the way. The signal that ends turns is pending,
/// so KVM turns back at the guest's door: no instruction runs, and the vCPU counts as one that has not run.
///
/// # Errors
/// The kernel's answer. The vCPU is good for nothing then.
pub(super) fn approach_guest(vcpu: &mut Vcpu, of_thread: SignalMask) -> Result<(), VcpuError> {
    let mp_state = vcpu.fd().get_mp_state().map_err(KvmError::of("KVM_GET_MP_STATE"))?;
    // One that waits to be started by another would not get under way.
    set_mp_state(vcpu, kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
    vcpu.set_signal_mask(Some(TurnTimer::mask(of_thread)))?;
    signals::kick(ThreadId::current(), TURN_SIGNAL as i32)
        .map_err(|source| KvmError { call: "tgkill of a vCPU thread", source })?;
    let turned_back = matches!(vcpu.run()?, Exit::Interrupted);
    signals::take_pending(TURN_SIGNAL as i32);
    if !turned_back {
        let source = io::Error::other("it ran the guest, though a signal was pending");
        return Err(KvmError { call: "KVM_RUN of a new vCPU", source }.into());
    }
    vcpu.set_signal_mask(None)?;
    Ok(set_mp_state(vcpu, mp_state)?)
}

fn set_mp_state(vcpu: &Vcpu, state: kvm_mp_state) -> Result<(), KvmError> {
    vcpu.fd().set_mp_state(state).map_err(KvmError::of("KVM_SET_MP_STATE"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use nix::sys::signal::SigSet;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::kvm::{self, Vm};
    use crate::memory::{Backend, BackendConfig, BackendKind, GuestRam};
    use crate::vcpu::quiet_mask;

    #[test]
    fn the_timer_rings_once_and_leaves_nothing_behind() {
        let turn = SignalMask::of(&[TURN_SIGNAL as i32]);
        signals::block(turn).unwrap();
        let mut timer = TurnTimer::default();
        assert!(timer.make() && timer.make());
        for _ in 0..3 {
            timer.start();
            SigSet::from(TURN_SIGNAL).wait().unwrap();
            assert!(!signals::take_pending(TURN_SIGNAL as i32));
        }
        timer.start();
        std::thread::sleep(10 * TURN);
        timer.stop();
        assert!(!signals::take_pending(TURN_SIGNAL as i32), "one was left behind");
    }

    #[test]
    fn a_vcpu_at_the_guests_door_has_not_been_in() {
        if !std::path::Path::new("/dev/kvm").exists() {
            eprintln!("SKIPPED a_vcpu_at_the_guests_door_has_not_been_in: no /dev/kvm");
            return;
        }
        signals::set_mask(quiet_mask()).unwrap();
        let kvm = kvm::open().unwrap();
        let vm = Arc::new(Vm::create(&kvm).unwrap());
        let kind = BackendKind::Memfd { share: true, hugetlb: None };
        let config = BackendConfig { id: "ram0".to_owned(), size: 1 << 20, kind };
        let ram = GuestRam::map(&Backend::create(config).unwrap()).unwrap();
        vm.map_ram(&ram).unwrap();
        vm.create_irqchip().unwrap();
        // mov byte [0x2000], 0x55; out 0x10, al
        ram.memory().write_slice(&[0xc6, 0x06, 0x00, 0x20, 0x55, 0xe6, 0x10], GuestAddress(0x1000)).unwrap();

        let mut first = vm.create_vcpu(0).unwrap();
        let (mut regs, mut sregs) = (first.fd().get_regs().unwrap(), first.fd().get_sregs().unwrap());
        (sregs.cs.base, sregs.cs.selector, regs.rip) = (0, 0, 0x1000);
        first.fd().set_sregs(&sregs).unwrap();
        first.fd().set_regs(&regs).unwrap();
        let second = &mut vm.create_vcpu(1).unwrap();
        for vcpu in [&mut first, second] {
            let before = (vcpu.fd().get_regs().unwrap(), vcpu.fd().get_mp_state().unwrap());
            approach_guest(vcpu, quiet_mask()).unwrap();
            assert_eq!((vcpu.fd().get_regs().unwrap(), vcpu.fd().get_mp_state().unwrap()), before);
            assert!(!signals::take_pending(TURN_SIGNAL as i32), "the signal was left behind");
            // One that has run refuses another table, and other registers from then on are a mistake.
            let mut table = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
            vcpu.fd().set_cpuid2(&table).unwrap();
            table.as_mut_slice()[0].eax ^= 1;
            vcpu.fd().set_cpuid2(&table).unwrap();
        }
        let stored = || ram.memory().read_obj::<u8>(GuestAddress(0x2000)).unwrap();
        assert_eq!(stored(), 0);
        // The signal is blocked again, and nothing keeps the vCPU from entering.
        signals::kick(ThreadId::current(), TURN_SIGNAL as i32).unwrap();
        assert!(matches!(first.run().unwrap(), Exit::PortOut { port: 0x10, .. }));
        assert_eq!(stored(), 0x55);
    }
}
