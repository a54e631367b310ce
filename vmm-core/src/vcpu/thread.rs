//! A vCPU's thread: makes the vCPU, runs the guest in it, answers its exits.

use std::ops::ControlFlow;
use std::sync::Arc;

use oslib::signals::{self, SignalMask, ThreadId};

use super::event::EventSender;
use super::failure::Failure;
use super::slot::{Cpu, Request, Slot, kick_signal};
use super::turn_timer::{TurnTimer, approach_guest};
use super::turns::Turn;
use super::{VcpuError, registers};
use crate::error::KvmError;
use crate::kvm::{Capabilities, Exit, Vm};
use crate::ports::{MmioBus, PortBus};

/// Told of the two instants between which the guest stands still. Called on the vCPU's thread, on the way in and out
/// of the guest: an implementation stores a time and returns.
pub trait RunObserver: Send + Sync {
    /// Called immediately before the first `KVM_RUN` after every resume.
    fn first_run(&self, vcpu: usize);

    /// Called immediately after the last `KVM_RUN` that ran the guest before a pause.
    fn last_exit(&self, vcpu: usize);
}

/// An observer that does not look.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoObserver;

impl RunObserver for NoObserver {
    fn first_run(&self, _vcpu: usize) {}
    fn last_exit(&self, _vcpu: usize) {}
}

/// What a running vCPU talks to.
#[derive(Clone)]
pub(crate) struct Environment {
    pub(crate) ports: Arc<PortBus>,
    pub(crate) mmio: Arc<MmioBus>,
    pub(crate) events: EventSender,
    pub(crate) observer: Arc<dyn RunObserver>,
    pub(crate) caps: Capabilities,
}

/// A thread of the machine lets no signals through but those that tell of its own mistakes.
pub(crate) fn quiet_mask() -> SignalMask {
    const FAULTS: [i32; 7] =
        [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT, libc::SIGTRAP, libc::SIGSYS];
    FAULTS.into_iter().fold(SignalMask::ALL, SignalMask::without)
}

/// Those of a vCPU thread are kicked as well.
fn thread_mask() -> SignalMask {
    quiet_mask().without(kick_signal())
}

pub(super) struct VcpuThread {
    pub(super) slot: Arc<Slot>,
    pub(super) vm: Arc<Vm>,
    pub(super) environment: Environment,
}

/// Tells the owner of a thread that ends without having been told to.
struct Ending<'a> {
    slot: &'a Slot,
    told: bool,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if !self.told {
            self.slot.lose();
        }
    }
}

impl VcpuThread {
    pub(super) fn run(self) {
        let slot = &*self.slot;
        let mut ending = Ending { slot, told: false };
        let mut timer = TurnTimer::default();
        if let Err(error) = self.start(&mut timer) {
            slot.fail(error);
            return;
        }
        loop {
            match slot.next_request() {
                Request::Job(job) => job(),
                Request::Run(cpu, turn) => {
                    if self.run_until_parked(cpu, turn, &mut timer) {
                        // Saving them all is what mostly comes next.
                        slot.expect_work();
                    }
                }
                Request::Rest => slot.rest(),
                Request::Quit => {
                    ending.told = true;
                    return;
                }
            }
        }
    }

    fn start(&self, timer: &mut TurnTimer) -> Result<(), VcpuError> {
        // After an exec every signal is blocked, the kick among them; before one, SIGTERM is the main loop's affair.
        oslib::keeper::forget_head_start();
        signals::set_mask(thread_mask())
            .map_err(|source| KvmError { call: "pthread_sigmask of a vCPU thread", source })?;
        self.slot.introduce(ThreadId::current());
        if self.slot.lacks_vcpu() {
            // Whether there will be turns to take is not known yet, but there is time now.
            timer.make();
            return self.create();
        }
        Ok(())
    }

    fn create(&self) -> Result<(), VcpuError> {
        let mut vcpu = self.vm.create_vcpu(self.slot.index as u32)?;
        let immediate_exit = vcpu.immediate_exit()?;
        approach_guest(&mut vcpu, thread_mask())?;
        let caps = self.environment.caps;
        let pristine = Some(Box::new(registers::Pristine::of(&vcpu, &caps)?));
        let cpu = Cpu { index: self.slot.index, vcpu, caps, cpuid: None, pristine };
        self.slot.put_new(cpu, immediate_exit);
        Ok(())
    }

    /// Runs the guest, and parks the vCPU; tells whether the thread should stay awake.
    fn run_until_parked(&self, mut cpu: Cpu, mut turn: Option<Turn>, timer: &mut TurnTimer) -> bool {
        loop {
            let stopped = self.run_guest(&mut cpu, turn.take(), timer);
            match self.slot.park(cpu, stopped) {
                ControlFlow::Break(stays_awake) => return stays_awake,
                ControlFlow::Continue(wanted) => cpu = wanted,
            }
        }
    }

    /// Runs the guest until a stop is requested or the vCPU fails; tells whether it is the stop.
    ///
    /// A stop is obeyed only where `KVM_RUN` was interrupted. After an exit that needs an answer the vCPU always enters
    /// once more, with `immediate_exit` set if it is to stop: that completes the instruction.
    fn run_guest(&self, cpu: &mut Cpu, turn: Option<Turn>, timer: &mut TurnTimer) -> bool {
        let Environment { ports, mmio, observer, events, .. } = &self.environment;
        let slot = &*self.slot;
        if slot.take_tell_paused()
            && cpu.caps.kvmclock_ctrl
            && let Err(error) = registers::notify_paused(&cpu.vcpu)
        {
            tracing::warn!(vcpu = slot.index, %error, "cannot tell the guest that it stood still");
        }
        if !slot.allow_guest() {
            return true;
        }
        cpu.pristine = None;
        // What would have no end is no turn.
        let mut turn = turn.filter(|_| {
            timer.make() && cpu.vcpu.set_signal_mask(Some(TurnTimer::mask(thread_mask()))).is_ok()
        });
        observer.first_run(slot.index);
        if turn.is_some() {
            // Last of all: a ring that comes before `KVM_RUN` keeps the vCPU from entering.
            timer.start();
        }
        let mut told = false;
        let failure = loop {
            let exit = cpu.vcpu.run();
            let stop = slot.stop_requested();
            if stop && !told {
                observer.last_exit(slot.index);
                slot.set_immediate_exit(true);
            }
            told = stop;
            if let Some(turn) = &mut turn {
                timer.stop();
                turn.end();
            }
            match exit {
                Ok(Exit::Interrupted) if stop => return true,
                Ok(Exit::Interrupted) => {
                    slot.allow_guest();
                }
                Ok(Exit::PortIn { port, size, data }) => {
                    data.chunks_mut(size.max(1)).for_each(|unit| ports.read(port, unit));
                }
                Ok(Exit::PortOut { port, size, data }) => {
                    data.chunks(size.max(1)).for_each(|unit| ports.write(port, unit));
                }
                Ok(Exit::MmioRead { address, data }) => mmio.read(address, data),
                Ok(Exit::MmioWrite { address, data }) => mmio.write(address, data),
                Ok(other) => break Failure::from(other),
                Err(error) => break Failure::Run(error.source),
            }
            if let Some(turn) = turn.take() {
                let _ = cpu.vcpu.set_signal_mask(None);
                turn.wait_for_others();
            }
        };
        if !told {
            observer.last_exit(slot.index);
        }
        events.send(failure.into_event(cpu));
        false
    }
}
