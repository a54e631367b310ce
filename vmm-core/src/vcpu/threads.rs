//! The vCPU threads and how they are stopped, given work and started again.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use oslib::scheduling::{self, SHORTEST_SLICE};
use oslib::signals::{self, SignalMask, ThreadId};

use super::event::{EventSender, VcpuEvent};
use super::{VcpuError, registers};
use crate::error::MachineError;
use crate::kvm::{Capabilities, Exit, ImmediateExit, Vcpu, Vm};
use crate::ports::{MmioBus, PortBus};
use crate::state::Blob;

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

/// A vCPU as its own thread sees it.
pub(crate) struct Cpu {
    pub(crate) index: usize,
    pub(crate) vcpu: Vcpu,
    pub(crate) caps: Capabilities,
    /// The CPUID table that the vCPU was given.
    pub(crate) cpuid: Option<Blob>,
}

type Job = Box<dyn FnOnce(&mut Cpu) + Send>;

/// A job with a result, for one vCPU's thread.
pub(crate) type Task<T> = Box<dyn FnOnce(&mut Cpu) -> Result<T, VcpuError> + Send>;

enum Request {
    Job(Job),
    Run,
    Quit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Creating the vCPU, waiting for work, or doing a job.
    Parked,
    /// Told to run the guest.
    Running,
    /// The thread is gone.
    Ended,
}

struct Inner {
    phase: Phase,
    requests: VecDeque<Request>,
}

/// What a vCPU's thread and its owner share.
struct Slot {
    index: usize,
    inner: Mutex<Inner>,
    /// The thread waits here for requests.
    wake: Condvar,
    /// The owner waits here for the end of [`Phase::Running`].
    parked: Condvar,
    stop: AtomicBool,
    /// The thread is about to enter the guest for the first time since it was told to run.
    entering: AtomicBool,
    /// The guest is to be told that it stood still.
    tell_paused: AtomicBool,
    thread: OnceLock<ThreadId>,
    immediate_exit: OnceLock<ImmediateExit>,
    fd: OnceLock<RawFd>,
}

impl Slot {
    fn new(index: usize) -> Self {
        Self {
            index,
            inner: Mutex::new(Inner { phase: Phase::Parked, requests: VecDeque::new() }),
            wake: Condvar::new(),
            parked: Condvar::new(),
            stop: AtomicBool::new(false),
            entering: AtomicBool::new(false),
            tell_paused: AtomicBool::new(false),
            thread: OnceLock::new(),
            immediate_exit: OnceLock::new(),
            fd: OnceLock::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn post(&self, request: Request) -> Result<(), VcpuError> {
        let mut inner = self.lock();
        match inner.phase {
            Phase::Ended => return Err(VcpuError::Gone),
            Phase::Running => return Err(VcpuError::Running),
            Phase::Parked => {}
        }
        if matches!(request, Request::Run) {
            self.stop.store(false, Ordering::SeqCst);
            self.entering.store(false, Ordering::Relaxed);
            inner.phase = Phase::Running;
        }
        inner.requests.push_back(request);
        self.wake.notify_one();
        Ok(())
    }

    fn next_request(&self) -> Request {
        let mut inner = self.lock();
        loop {
            match inner.requests.pop_front() {
                Some(request) => return request,
                None => inner = self.wake.wait(inner).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn set_phase(&self, phase: Phase) {
        self.lock().phase = phase;
        self.parked.notify_all();
    }

    fn set_immediate_exit(&self, leave: bool) {
        if let Some(byte) = self.immediate_exit.get() {
            byte.set(leave);
        }
    }

    /// Makes the vCPU leave the guest: first the wish, then the flag that keeps `KVM_RUN` from starting, then the
    /// signal that ends one which has started.
    fn request_stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.set_immediate_exit(true);
        self.kick();
    }

    fn kick(&self) {
        if let Some(thread) = self.thread.get() {
            // The thread may have ended; then there is nothing to stop.
            let _ = signals::kick(*thread, kick_signal());
        }
    }

    /// Lets `KVM_RUN` run the guest, unless a stop was requested. A stop that is requested at the same time is seen
    /// here, or sets the flag after us: both sides write before they read.
    fn allow_guest(&self) -> bool {
        self.set_immediate_exit(false);
        let stop = self.stop.load(Ordering::SeqCst);
        if stop {
            self.set_immediate_exit(true);
        }
        !stop
    }

    /// Failure to hurry a vCPU is no failure: it enters the guest when its turn comes.
    fn set_slice(&self, slice: Option<Duration>) {
        if let Some(thread) = self.thread.get() {
            let _ = scheduling::set_slice(*thread, slice);
        }
    }

    /// Gives the vCPU a moment to enter the guest.
    fn wait_entering(&self) {
        let until = Instant::now() + ENTER_WITHIN;
        while !self.entering.load(Ordering::Acquire) && Instant::now() < until {
            std::thread::sleep(ENTER_POLL);
        }
    }

    /// Waits until the vCPU is parked; tells whether it is.
    fn wait_parked(&self, until: Instant) -> bool {
        let mut inner = self.lock();
        while inner.phase == Phase::Running {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let (again, timeout) =
                self.parked.wait_timeout(inner, left.min(KICK_AGAIN)).unwrap_or_else(PoisonError::into_inner);
            inner = again;
            if timeout.timed_out() && inner.phase == Phase::Running {
                self.kick();
            }
        }
        true
    }
}

/// How long one vCPU may take to enter the guest before the next one is let in all the same.
const ENTER_WITHIN: Duration = Duration::from_micros(500);
/// How often that is looked at.
const ENTER_POLL: Duration = Duration::from_micros(10);

/// Keeps the thread that lets vCPUs in ahead of those that are in already, while it does.
struct Usher(ThreadId);

impl Usher {
    fn start() -> Self {
        let thread = ThreadId::current();
        let _ = scheduling::set_slice(thread, Some(SHORTEST_SLICE));
        Self(thread)
    }
}

impl Drop for Usher {
    fn drop(&mut self) {
        let _ = scheduling::set_slice(self.0, None);
    }
}

/// A vCPU that has not parked after this long is kicked once more. One kick is enough by construction; this is the
/// belt to those braces.
const KICK_AGAIN: Duration = Duration::from_millis(2);

/// A vCPU thread needs little stack of its own; what its devices need on top is their writers' guess.
const STACK_LEN: usize = 512 * 1024;

/// The signal that makes a vCPU's thread leave the guest: the first real-time signal. It has a handler that does
/// nothing, and only vCPU threads let it through.
pub(crate) fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

/// The vCPUs of one machine.
///
/// ```text
///                    run                          stop seen, or the vCPU failed
///   Parked ------------------------> Running -----------------------------------> Parked
///     |  ^
///     |  '-- jobs (create, save, restore, ...), one after the other
///     '--> quit: Ended
/// ```
///
/// An exec ends all threads where they stand, so before one the vCPUs are parked, not joined: if the exec fails, they
/// are resumed.
pub struct Vcpus {
    slots: Vec<Arc<Slot>>,
    threads: Vec<JoinHandle<()>>,
    /// One message for each vCPU once it is created, until somebody has waited for them.
    created: Mutex<Option<Receiver<Report<()>>>>,
}

impl Vcpus {
    /// Starts a thread for each of `count` vCPUs and has it create its vCPU. Does not wait for that.
    pub(crate) fn spawn(count: usize, vm: &Arc<Vm>, environment: &Environment) -> Result<Self, MachineError> {
        signals::install_noop_handler(kick_signal())
            .map_err(|source| MachineError::Host { what: "the handler of the kick signal", source })?;
        let (created, receiver) = channel();
        let mut vcpus = Self { slots: Vec::new(), threads: Vec::new(), created: Mutex::new(Some(receiver)) };
        for index in 0..count {
            let slot = Arc::new(Slot::new(index));
            let thread =
                VcpuThread { slot: Arc::clone(&slot), vm: Arc::clone(vm), environment: environment.clone() };
            let created = created.clone();
            let handle = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(STACK_LEN)
                .spawn(move || thread.run(&created))
                .map_err(|source| MachineError::Host { what: "a vCPU thread", source })?;
            // Together, so that a failure half-way ends those that were started.
            vcpus.slots.push(slot);
            vcpus.threads.push(handle);
        }
        Ok(vcpus)
    }

    /// Returns the number of vCPUs.
    pub fn count(&self) -> usize {
        self.slots.len()
    }

    /// Waits until all vCPUs exist.
    pub(crate) fn ready(&self) -> Result<(), MachineError> {
        let mut created = self.created.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(receiver) = created.take() {
            collect(&receiver, self.count())?;
        }
        Ok(())
    }

    /// Returns the vCPUs' descriptors.
    pub(crate) fn fds(&self) -> Result<Vec<RawFd>, MachineError> {
        self.ready()?;
        Ok(self.slots.iter().filter_map(|slot| slot.fd.get().copied()).collect())
    }

    /// Returns the ids of the threads.
    pub(crate) fn thread_ids(&self) -> Result<Vec<u32>, MachineError> {
        self.ready()?;
        Ok(self.slots.iter().filter_map(|slot| slot.thread.get().map(|thread| thread.as_u32())).collect())
    }

    /// Tells whether no vCPU runs.
    pub fn all_parked(&self) -> bool {
        self.slots.iter().all(|slot| slot.lock().phase != Phase::Running)
    }

    /// Lets every parked vCPU run.
    ///
    /// # Errors
    /// The vCPU whose thread has ended.
    pub fn resume(&self) -> Result<(), MachineError> {
        // Where vCPUs outnumber the CPUs, the first ones in would keep the others waiting for a whole time slice each.
        // So they are let in one by one, with a slice so short that each takes the CPU from those that are in already.
        let usher = (self.count() > 1).then(Usher::start);
        for slot in &self.slots {
            if usher.is_some() {
                slot.set_slice(Some(SHORTEST_SLICE));
            }
            match slot.post(Request::Run) {
                Ok(()) if usher.is_some() => slot.wait_entering(),
                Ok(()) | Err(VcpuError::Running) => {}
                Err(source) => return Err(MachineError::Vcpu { index: slot.index, source }),
            }
        }
        Ok(())
    }

    /// Stops every vCPU, and returns when all are parked.
    ///
    /// # Errors
    /// [`MachineError::PauseTimedOut`] with those that did not stop in time; they go on running, the others
    /// are parked. `resume` makes it undone.
    pub fn pause(&self, deadline: Duration) -> Result<(), MachineError> {
        let until = Instant::now() + deadline;
        for slot in &self.slots {
            if slot.lock().phase == Phase::Running {
                slot.request_stop();
            }
        }
        let late: Vec<_> = self.slots.iter().filter(|slot| !slot.wait_parked(until)).collect();
        if late.is_empty() {
            return Ok(());
        }
        for slot in &late {
            slot.stop.store(false, Ordering::SeqCst);
            slot.set_immediate_exit(false);
        }
        Err(MachineError::PauseTimedOut { vcpus: late.iter().map(|slot| slot.index).collect(), deadline })
    }

    /// Has each vCPU tell its guest, before it runs again, that it stood still.
    pub(crate) fn tell_paused_on_resume(&self) {
        for slot in &self.slots {
            slot.tell_paused.store(true, Ordering::Relaxed);
        }
    }

    /// Gives every parked vCPU's thread one job, all at the same time; the result waits for them. A vCPU that is still
    /// being created gets to it afterwards.
    pub(crate) fn start_on_all<T: Send + 'static>(
        &self,
        mut job: impl FnMut(usize) -> Task<T>,
    ) -> Result<Pending<T>, MachineError> {
        let (sender, receiver) = channel();
        for slot in &self.slots {
            slot.post(reporting(slot.index, &sender, job(slot.index)))
                .map_err(|source| MachineError::Vcpu { index: slot.index, source })?;
        }
        Ok(Pending { receiver, count: self.count() })
    }

    /// Gives every parked vCPU's thread one job and waits for all results.
    pub(crate) fn on_all<T: Send + 'static>(
        &self,
        job: impl FnMut(usize) -> Task<T>,
    ) -> Result<Vec<T>, MachineError> {
        self.start_on_all(job)?.wait()
    }

    /// Gives one parked vCPU's thread a job and waits for the result.
    pub(crate) fn on_one<T: Send + 'static>(
        &self,
        index: usize,
        job: impl FnOnce(&mut Cpu) -> Result<T, VcpuError> + Send + 'static,
    ) -> Result<T, MachineError> {
        let (sender, receiver) = channel();
        self.slots[index]
            .post(reporting(index, &sender, Box::new(job)))
            .map_err(|source| MachineError::Vcpu { index, source })?;
        drop(sender);
        match receiver.recv() {
            Ok((_, result)) => result.map_err(|source| MachineError::Vcpu { index, source }),
            Err(_) => Err(MachineError::Vcpu { index, source: VcpuError::Gone }),
        }
    }
}

impl Drop for Vcpus {
    /// Ends the threads. One that does not stop within a second, because a device holds it up, is left behind.
    fn drop(&mut self) {
        let _ = self.pause(Duration::from_secs(1));
        for (slot, thread) in self.slots.iter().zip(self.threads.drain(..)) {
            if slot.post(Request::Quit).is_ok() {
                let _ = thread.join();
            }
        }
    }
}

impl std::fmt::Debug for Vcpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.slots.iter().map(|slot| slot.lock().phase)).finish()
    }
}

type Report<T> = (usize, Result<T, VcpuError>);

fn reporting<T: Send + 'static>(index: usize, sender: &Sender<Report<T>>, job: Task<T>) -> Request {
    let sender = sender.clone();
    Request::Job(Box::new(move |cpu| {
        // Nobody waits any more if an earlier vCPU failed.
        let _ = sender.send((index, job(cpu)));
    }))
}

/// Jobs that the vCPUs' threads are doing.
#[must_use = "the jobs' results are lost"]
pub(crate) struct Pending<T> {
    receiver: Receiver<Report<T>>,
    count: usize,
}

impl<T> Pending<T> {
    /// Waits for all of them; returns the results by vCPU, or the first failure.
    pub(crate) fn wait(self) -> Result<Vec<T>, MachineError> {
        collect(&self.receiver, self.count)
    }
}

fn collect<T>(receiver: &Receiver<Report<T>>, count: usize) -> Result<Vec<T>, MachineError> {
    let mut results: Vec<Option<T>> = (0..count).map(|_| None).collect();
    let mut failure = None;
    for _ in 0..count {
        match receiver.recv() {
            Ok((index, Ok(result))) => results[index] = Some(result),
            // All are waited for, so that nothing goes on behind the caller's back.
            Ok((index, Err(source))) => {
                failure.get_or_insert(MachineError::Vcpu { index, source });
            }
            Err(_) => break,
        }
    }
    if let Some(failure) = failure {
        return Err(failure);
    }
    let missing = results.iter().position(Option::is_none);
    match missing {
        Some(index) => Err(MachineError::Vcpu { index, source: VcpuError::Gone }),
        None => Ok(results.into_iter().flatten().collect()),
    }
}

/// Signals that a vCPU thread lets through: the kick, and those that tell of its own mistakes.
fn thread_mask() -> SignalMask {
    const FAULTS: [i32; 7] =
        [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT, libc::SIGTRAP, libc::SIGSYS];
    FAULTS.into_iter().fold(SignalMask::ALL.without(kick_signal()), SignalMask::without)
}

struct VcpuThread {
    slot: Arc<Slot>,
    vm: Arc<Vm>,
    environment: Environment,
}

/// Marks the thread as gone, however it ends.
struct Ending(Arc<Slot>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.set_phase(Phase::Ended);
        // Jobs that never ran report by dropping their sender.
        self.0.lock().requests.clear();
    }
}

impl VcpuThread {
    fn run(self, created: &Sender<Report<()>>) {
        let _ending = Ending(Arc::clone(&self.slot));
        let mut cpu = match self.create() {
            Ok(cpu) => cpu,
            Err(error) => {
                let _ = created.send((self.slot.index, Err(error)));
                return;
            }
        };
        let _ = created.send((self.slot.index, Ok(())));
        loop {
            match self.slot.next_request() {
                Request::Job(job) => job(&mut cpu),
                Request::Run => {
                    self.run_guest(&mut cpu);
                    self.slot.set_phase(Phase::Parked);
                }
                Request::Quit => return,
            }
        }
    }

    fn create(&self) -> Result<Cpu, VcpuError> {
        // After an exec every signal is blocked, the kick among them; before one, SIGTERM is the main loop's affair.
        signals::set_mask(thread_mask())
            .map_err(|source| crate::error::KvmError { call: "pthread_sigmask of a vCPU thread", source })?;
        let _ = self.slot.thread.set(ThreadId::current());
        let mut vcpu = self.vm.create_vcpu(self.slot.index as u32)?;
        let immediate_exit = vcpu.immediate_exit()?;
        // The first KVM_RUN of a VM does work that is done once (it starts a kernel thread, for one). Done here, it
        // is out of the way of the restore; with this flag it runs no instruction and changes no state.
        immediate_exit.set(true);
        vcpu.run()?;
        immediate_exit.set(false);
        let _ = self.slot.immediate_exit.set(immediate_exit);
        let _ = self.slot.fd.set(vcpu.as_raw_fd());
        Ok(Cpu { index: self.slot.index, vcpu, caps: self.environment.caps, cpuid: None })
    }

    /// Runs the guest until a stop is requested or the vCPU fails.
    ///
    /// A stop is obeyed only where `KVM_RUN` was interrupted. After an exit that needs an answer the vCPU always enters
    /// once more, with `immediate_exit` set if it is to stop: that completes the instruction.
    fn run_guest(&self, cpu: &mut Cpu) {
        let Environment { ports, mmio, observer, events, .. } = &self.environment;
        let slot = &*self.slot;
        if slot.tell_paused.swap(false, Ordering::Relaxed)
            && cpu.caps.kvmclock_ctrl
            && let Err(error) = registers::notify_paused(&cpu.vcpu)
        {
            tracing::warn!(vcpu = slot.index, %error, "cannot tell the guest that it stood still");
        }
        if !slot.allow_guest() {
            return;
        }
        // No longer in a hurry: whoever enters next takes the CPU from this thread, not the other way round.
        slot.set_slice(None);
        slot.entering.store(true, Ordering::Release);
        observer.first_run(slot.index);
        let mut told = false;
        let failure = loop {
            let exit = cpu.vcpu.run();
            let stop = slot.stop.load(Ordering::SeqCst);
            if stop && !told {
                observer.last_exit(slot.index);
                slot.set_immediate_exit(true);
            }
            told = stop;
            match exit {
                Ok(Exit::Interrupted) if stop => return,
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
        };
        if !told {
            observer.last_exit(slot.index);
        }
        events.send(failure.into_event(cpu));
    }
}

/// An exit after which the vCPU cannot simply go on.
enum Failure {
    TripleFault,
    System(u32),
    Halt,
    Entry(u64),
    Internal(u32, Vec<u64>),
    Memory(u64),
    Unknown(u32),
    Run(io::Error),
}

impl From<Exit<'_>> for Failure {
    fn from(exit: Exit<'_>) -> Self {
        match exit {
            Exit::Shutdown => Self::TripleFault,
            Exit::SystemEvent { kind } => Self::System(kind),
            Exit::Halt => Self::Halt,
            Exit::FailEntry { reason } => Self::Entry(reason),
            Exit::InternalError { suberror, data } => Self::Internal(suberror, data),
            Exit::MemoryFault { address } => Self::Memory(address),
            Exit::Other(reason) => Self::Unknown(reason),
            // The run loop answers these itself.
            Exit::Interrupted
            | Exit::PortIn { .. }
            | Exit::PortOut { .. }
            | Exit::MmioRead { .. }
            | Exit::MmioWrite { .. } => Self::Unknown(0),
        }
    }
}

impl Failure {
    fn into_event(self, cpu: &Cpu) -> VcpuEvent {
        let vcpu = cpu.index;
        let what = match self {
            Self::TripleFault => return VcpuEvent::TripleFault { vcpu },
            Self::System(kind) => return VcpuEvent::System { vcpu, kind },
            Self::Halt => "the guest halted and no interrupt controller can wake it".to_owned(),
            Self::Entry(reason) => format!("the processor refused to enter the guest, reason {reason:#x}"),
            Self::Internal(suberror, data) => internal_error(suberror, &data),
            Self::Memory(address) => format!("KVM cannot map guest memory at {address:#x}"),
            Self::Unknown(reason) => format!("KVM exit {reason} is not one that this machine knows"),
            Self::Run(error) => format!("KVM_RUN failed: {error}"),
        };
        let place = match cpu.vcpu.fd().get_regs() {
            Ok(regs) => format!("rip {:#x}, rsp {:#x}, rflags {:#x}", regs.rip, regs.rsp, regs.rflags),
            Err(error) => format!("registers unreadable: {error}"),
        };
        VcpuEvent::Failed { vcpu, message: format!("{what} ({place})") }
    }
}

/// Describes `KVM_EXIT_INTERNAL_ERROR` (`linux/kvm.h`), with the instruction's bytes where KVM gives them.
fn internal_error(suberror: u32, data: &[u64]) -> String {
    let name = match suberror {
        1 => "emulation failed",
        2 => "simultaneous exceptions",
        3 => "an exit during event delivery",
        4 => "an unexpected exit",
        _ => "unknown",
    };
    let mut text = format!("KVM internal error, suberror {suberror}: {name}");
    // KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES: a length, then 15 bytes.
    if let (1, [flags, first, second, ..]) = (suberror, data)
        && flags & 1 != 0
    {
        let bytes = [first.to_le_bytes(), second.to_le_bytes()].concat();
        let len = usize::from(bytes[0]).min(15);
        text += " at instruction bytes";
        for byte in &bytes[1..=len] {
            text += &format!(" {byte:02x}");
        }
    } else if !data.is_empty() {
        text += &format!(", data {data:x?}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn internal_errors_show_the_instruction() {
        let data = [1, 0xcf48_6602, 0];
        assert_eq!(
            internal_error(1, &data),
            "KVM internal error, suberror 1: emulation failed at instruction bytes 66 48"
        );
        assert_eq!(
            internal_error(3, &[0x10]),
            "KVM internal error, suberror 3: an exit during event delivery, data [10]"
        );
        assert_eq!(internal_error(9, &[]), "KVM internal error, suberror 9: unknown");
    }
}
