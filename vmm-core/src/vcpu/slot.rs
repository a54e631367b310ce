//! What a vCPU's thread and the machine's owner share: where the vCPU is, and the protocol by which it is stopped.
//!
//! A parked vCPU lies in its slot, where any thread may use it under the slot's lock; a running one is with its thread.
//! So a thread may end and another may take its place while the vCPU is parked. Stopping takes no lock that a vCPU in
//! the guest could hold.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use oslib::signals::{self, ThreadId};
use oslib::thread::{Cpus, Thread};

use super::turns::Turn;
use super::{Pristine, VcpuError, wait};
use crate::kvm::{Capabilities, ImmediateExit, Vcpu};
use crate::state::Blob;

/// A vCPU, and what belongs to it whichever thread has it.
pub(crate) struct Cpu {
    pub(crate) index: usize,
    pub(crate) vcpu: Vcpu,
    pub(crate) caps: Capabilities,
    /// The CPUID table that the vCPU was given.
    pub(crate) cpuid: Option<Blob>,
    /// Until the vCPU is given a state, or runs.
    pub(crate) pristine: Option<Box<Pristine>>,
}

/// Work that a vCPU's thread does for the owner while its vCPU is parked. It need not concern that vCPU.
pub(super) type Job = Box<dyn FnOnce() + Send>;

/// What a vCPU's thread is asked to do.
pub(super) enum Request {
    /// Run the guest, with a turn to take first if the vCPUs take turns.
    Run(Cpu, Option<Turn>),
    Job(Job),
    /// Rest until the vCPU is to run again.
    Rest,
    Quit,
}

/// Where the vCPU is.
enum Place {
    /// Not made yet; its thread is at it.
    Coming,
    /// Here, stopped.
    Parked(Cpu),
    /// With its thread, which runs the guest or is about to.
    Running,
    /// It could not be made, and nobody has asked yet.
    Failed(VcpuError),
    /// Lost: not made, or its thread ended with it.
    Gone,
}

struct Inner {
    place: Place,
    requests: VecDeque<Request>,
    thread: Option<Owned>,
    /// The kernel's name of the thread, once that runs.
    thread_id: Option<ThreadId>,
}

/// A vCPU's thread that stays on one CPU for a while.
pub(super) struct Placed {
    pub(super) index: usize,
    pub(super) cpu: usize,
    /// Where it may run otherwise.
    home: Cpus,
    process: u32,
}

/// A thread, and the process that it was started in: an exec ends it with that, while this memory lives on.
struct Owned {
    handle: Thread,
    process: u32,
}

/// A thread whose vCPU is parked waits for requests. One that rests does so without holding or owning anything, so that it
/// may be ended at any instruction.
mod rest {
    /// The thread takes requests.
    pub(super) const NO: u8 = 0;
    /// It is to rest once it has none.
    pub(super) const WANTED: u8 = 1;
    /// It rests.
    pub(super) const YES: u8 = 2;
}

pub(super) struct Slot {
    pub(super) index: usize,
    inner: Mutex<Inner>,
    /// The thread waits here for requests.
    wake: Condvar,
    /// The owner waits here for the thread to start and to make its vCPU.
    news: Condvar,
    running: Arc<RunningCount>,
    stop: AtomicBool,
    /// One of the constants in [`rest`].
    rest: AtomicU8,
    /// The guest is to be told that it stood still.
    tell_paused: AtomicBool,
    immediate_exit: OnceLock<ImmediateExit>,
    fd: OnceLock<RawFd>,
}

impl Slot {
    pub(super) fn new(index: usize, running: Arc<RunningCount>) -> Self {
        let inner = Inner { place: Place::Coming, requests: VecDeque::new(), thread: None, thread_id: None };
        Self {
            index,
            inner: Mutex::new(inner),
            wake: Condvar::new(),
            news: Condvar::new(),
            running,
            stop: AtomicBool::new(false),
            rest: AtomicU8::new(rest::NO),
            tell_paused: AtomicBool::new(false),
            immediate_exit: OnceLock::new(),
            fd: OnceLock::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the vCPU has been made, or not.
    fn lock_made(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.lock();
        while matches!(inner.place, Place::Coming) {
            inner = self.news.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner
    }

    // The owner's side: the vCPU.

    /// Waits until the vCPU exists. Why it does not is told once.
    pub(super) fn wait_made(&self) -> Result<(), VcpuError> {
        self.lock_made().check()
    }

    /// Uses the parked vCPU, on the caller's thread. Waits for one that is still being made.
    pub(super) fn with_parked<T>(
        &self,
        job: impl FnOnce(&mut Cpu) -> Result<T, VcpuError>,
    ) -> Result<T, VcpuError> {
        let mut inner = self.lock_made();
        match &mut inner.place {
            Place::Parked(cpu) => job(cpu),
            Place::Running => Err(VcpuError::Running),
            _ => Err(inner.check().err().unwrap_or(VcpuError::Gone)),
        }
    }

    /// Returns the vCPU's descriptor, once it exists.
    pub(super) fn fd(&self) -> Option<RawFd> {
        self.fd.get().copied()
    }

    pub(super) fn is_running(&self) -> bool {
        matches!(self.lock().place, Place::Running)
    }

    /// Asks the thread, which need not be there yet, to run the guest. One that is there hears of it with
    /// [`Slot::wake`].
    pub(super) fn post_run(&self, turn: Option<Turn>) -> Result<(), VcpuError> {
        let mut inner = self.lock_made();
        match &inner.place {
            Place::Parked(_) => {}
            Place::Running => return Err(VcpuError::Running),
            _ => return Err(inner.check().err().unwrap_or(VcpuError::Gone)),
        }
        self.stop.store(false, Ordering::SeqCst);
        if let Place::Parked(cpu) = std::mem::replace(&mut inner.place, Place::Running) {
            self.running.one_more();
            inner.requests.push_back(Request::Run(cpu, turn));
        }
        Ok(())
    }

    /// Takes back what [`post_run`](Self::post_run) asked of a thread that is not there.
    fn withdraw_run(&self) {
        let mut inner = self.lock();
        let run = inner.requests.iter().position(|request| matches!(request, Request::Run(..)));
        if let Some(Request::Run(cpu, _)) = run.and_then(|at| inner.requests.remove(at)) {
            inner.place = Place::Parked(cpu);
            drop(inner);
            let _ = self.running.one_less();
        }
    }

    /// Has the thread look at its requests.
    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Makes a running vCPU leave the guest: first the wish, then the flag that keeps `KVM_RUN` from starting, then the
    /// signal that ends one which has started. A thread that is still to start sees the wish, and needs no signal.
    pub(super) fn request_stop(&self) {
        let inner = self.lock();
        if matches!(inner.place, Place::Running) {
            self.stop.store(true, Ordering::SeqCst);
            self.set_immediate_exit(true);
            let thread = inner.thread_id;
            drop(inner);
            kick(thread);
        }
    }

    pub(super) fn kick_again(&self) {
        let inner = self.lock();
        if matches!(inner.place, Place::Running) {
            kick(inner.thread_id);
        }
    }

    pub(super) fn withdraw_stop(&self) {
        // Before the thread parks the vCPU, or after.
        let _inner = self.lock();
        self.stop.store(false, Ordering::SeqCst);
        self.set_immediate_exit(false);
    }

    pub(super) fn tell_paused_on_resume(&self) {
        self.tell_paused.store(true, Ordering::Relaxed);
    }

    // The owner's side: the thread.

    /// Has `spawn` start a thread in `process`, the calling one, unless there is one; a thread that rests goes on. If
    /// none can be started, the vCPU does not run.
    ///
    /// A thread of another process must have ended: the exec that left us its memory has seen to that.
    pub(super) fn ensure_thread(
        &self,
        process: u32,
        spawn: impl FnOnce() -> std::io::Result<Thread>,
    ) -> Result<(), VcpuError> {
        {
            let mut inner = self.lock();
            match inner.thread.take_if(|thread| thread.process != process) {
                Some(thread) => {
                    // The next one gets its stack.
                    thread.handle.bury();
                    inner.thread_id = None;
                    self.rest.store(rest::NO, Ordering::SeqCst);
                }
                None if matches!(inner.place, Place::Gone) => return Ok(()),
                None => {}
            }
            if let Some(thread) = &inner.thread {
                self.end_rest(thread);
                return Ok(());
            }
        }
        // Not under the lock: the thread begins by taking it.
        let handle = spawn().map_err(VcpuError::Thread).inspect_err(|_| self.withdraw_run())?;
        self.lock().thread = Some(Owned { handle, process });
        Ok(())
    }

    /// Puts the thread on one CPU, another one for each next vCPU, if it may run on several. Where the system refuses this, the
    /// thread stays where it is.
    pub(super) fn put_on_cpu(&self) -> Option<Placed> {
        let inner = self.lock();
        let Owned { handle, process } = inner.thread.as_ref()?;
        let home = Cpus::of(handle).ok()?;
        let count = home.iter().count();
        let cpu = home.iter().nth(self.index % count.max(1)).filter(|_| count > 1)?;
        Cpus::only(cpu).apply_to(handle).ok()?;
        Some(Placed { index: self.index, cpu, home, process: *process })
    }

    /// Lets the thread run where it could before, unless it was put elsewhere meanwhile, by somebody else.
    pub(super) fn release(&self, placed: &Placed) {
        if let Some(Owned { handle, process }) = &self.lock().thread
            && *process == placed.process
            && Cpus::of(handle).is_ok_and(|cpus| cpus.iter().eq([placed.cpu]))
        {
            // Asked for by name, the same CPUs would stay its own even if its control group got more.
            let all = Cpus::all().apply_to(handle).and_then(|()| Cpus::of(handle));
            if !all.is_ok_and(|cpus| cpus.iter().eq(placed.home.iter())) {
                // Only a thread that has ended is not there to be released.
                let _ = placed.home.apply_to(handle);
            }
        }
    }

    /// Sends the thread to rest once its vCPU is parked.
    pub(super) fn want_rest(&self) {
        let inner = self.lock();
        if inner.thread.is_some() && self.rest.load(Ordering::SeqCst) == rest::NO {
            self.rest.store(rest::WANTED, Ordering::SeqCst);
            drop(inner);
            self.wake();
        }
    }

    /// Whether the thread holds and owns nothing: it rests, or there is none.
    pub(super) fn rests(&self) -> bool {
        self.rest.load(Ordering::SeqCst) == rest::YES || self.lock().thread.is_none()
    }

    fn end_rest(&self, thread: &Owned) {
        if self.rest.swap(rest::NO, Ordering::SeqCst) == rest::YES {
            thread.handle.unpark();
        }
    }

    /// Returns the kernel's name of the thread; waits for one that is about to start.
    pub(super) fn thread_id(&self) -> Result<ThreadId, VcpuError> {
        let mut inner = self.lock();
        loop {
            match (inner.thread_id, &inner.thread, &inner.place) {
                (Some(id), _, _) => return Ok(id),
                (None, _, Place::Gone | Place::Failed(_)) => return Err(VcpuError::Gone),
                (None, None, _) => return Err(VcpuError::Gone),
                (None, Some(_), _) => {}
            }
            inner = self.news.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Asks the thread, if there is one, for help. Nobody is told whether it comes to it.
    pub(super) fn post_job(&self, job: Job) {
        let mut inner = self.lock();
        // One that rests would come to it when it is long done.
        if self.rest.load(Ordering::SeqCst) == rest::NO {
            inner.requests.push_back(Request::Job(job));
            drop(inner);
            self.wake();
        }
    }

    /// Tells the thread to end. One that runs the guest does so once it has parked.
    pub(super) fn post_quit(&self) {
        let mut inner = self.lock();
        inner.requests.push_back(Request::Quit);
        if let Some(thread) = &inner.thread {
            self.end_rest(thread);
        }
        drop(inner);
        self.wake();
    }

    /// Waits for a thread that was told to end. The vCPU stays.
    pub(super) fn join(&self) {
        let thread = self.lock().thread.take();
        if let Some(Owned { handle, process }) = thread {
            // A panic has been told on its way; the vCPU went with it.
            match process == std::process::id() {
                true => handle.join(),
                false => handle.bury(),
            }
        }
        let mut inner = self.lock();
        inner.thread_id = None;
        inner.requests.clear();
    }

    // The thread's side.

    /// The thread runs.
    pub(super) fn introduce(&self, thread: ThreadId) {
        self.lock().thread_id = Some(thread);
        self.news.notify_all();
    }

    /// Tells whether the thread has to make the vCPU first.
    pub(super) fn lacks_vcpu(&self) -> bool {
        matches!(self.lock().place, Place::Coming)
    }

    pub(super) fn put_new(&self, cpu: Cpu, immediate_exit: ImmediateExit) {
        let _ = self.fd.set(cpu.vcpu.as_raw_fd());
        let _ = self.immediate_exit.set(immediate_exit);
        self.set_place(Place::Parked(cpu));
    }

    pub(super) fn fail(&self, error: VcpuError) {
        let before = std::mem::replace(&mut self.lock().place, Place::Failed(error));
        self.news.notify_all();
        if matches!(before, Place::Running) {
            self.running.one_less();
        }
    }

    /// Tells whether the thread should stay awake for work. A vCPU that was `stopped` is given back to run on if the stop
    /// was withdrawn meanwhile: whoever did so counts on it.
    pub(super) fn park(&self, cpu: Cpu, stopped: bool) -> ControlFlow<bool, Cpu> {
        {
            let mut inner = self.lock();
            if stopped && !self.stop_requested() {
                return ControlFlow::Continue(cpu);
            }
            // Nobody waits for news of a vCPU that exists.
            inner.place = Place::Parked(cpu);
        }
        let can_help = self.running.note_parked(self.index, oslib::thread::current_cpu());
        ControlFlow::Break(self.running.one_less() || can_help)
    }

    /// Stays awake for a moment, for work that is about to come, unless it will come to another.
    pub(super) fn expect_work(&self) {
        wait::briefly(|| {
            self.running.awake.load(Ordering::Relaxed) != self.index
                || !self.lock().requests.is_empty()
                || self.rest.load(Ordering::SeqCst) == rest::WANTED
        });
    }

    /// The thread ends without having been told to, and its vCPU with it.
    pub(super) fn lose(&self) {
        let mut inner = self.lock();
        let was_running = matches!(inner.place, Place::Running);
        // Why it could not be made is still to be asked for.
        if !matches!(inner.place, Place::Failed(_)) {
            inner.place = Place::Gone;
        }
        inner.thread_id = None;
        inner.requests.clear();
        drop(inner);
        self.news.notify_all();
        if was_running {
            self.running.one_less();
        }
    }

    fn set_place(&self, place: Place) {
        self.lock().place = place;
        self.news.notify_all();
    }

    pub(super) fn next_request(&self) -> Request {
        let mut inner = self.lock();
        loop {
            match inner.requests.pop_front() {
                Some(request) => return request,
                None if self.rest.load(Ordering::SeqCst) == rest::WANTED => return Request::Rest,
                None => inner = self.wake.wait(inner).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Rests until there is something to do. For a thread that owns nothing which an end at any instruction would leave
    /// half-done.
    pub(super) fn rest(&self) {
        let wanted = self.rest.compare_exchange(rest::WANTED, rest::YES, Ordering::SeqCst, Ordering::SeqCst);
        if wanted.is_ok() {
            while self.rest.load(Ordering::SeqCst) == rest::YES {
                std::thread::park();
            }
        }
    }

    pub(super) fn stop_requested(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Lets `KVM_RUN` run the guest, unless a stop was requested. A stop that is requested at the same time is seen
    /// here, or sets the flag after us: both sides write before they read.
    pub(super) fn allow_guest(&self) -> bool {
        self.set_immediate_exit(false);
        let stop = self.stop_requested();
        if stop {
            self.set_immediate_exit(true);
        }
        !stop
    }

    pub(super) fn set_immediate_exit(&self, leave: bool) {
        if let Some(byte) = self.immediate_exit.get() {
            byte.set(leave);
        }
    }

    pub(super) fn take_tell_paused(&self) -> bool {
        self.tell_paused.swap(false, Ordering::Relaxed)
    }
}

impl Inner {
    fn check(&mut self) -> Result<(), VcpuError> {
        match &self.place {
            Place::Failed(_) => match std::mem::replace(&mut self.place, Place::Gone) {
                Place::Failed(error) => Err(error),
                _ => Err(VcpuError::Gone),
            },
            Place::Gone => Err(VcpuError::Gone),
            Place::Coming | Place::Parked(_) | Place::Running => Ok(()),
        }
    }
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.lock().place {
            Place::Coming => "Coming",
            Place::Parked(_) => "Parked",
            Place::Running => "Running",
            Place::Failed(_) => "Failed",
            Place::Gone => "Gone",
        })
    }
}

/// The signal that makes a vCPU's thread leave the guest: the first real-time signal. It has a handler that does
/// nothing, and only vCPU threads let it through.
pub(super) fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

fn kick(thread: Option<ThreadId>) {
    if let Some(thread) = thread {
        // The thread may have ended; then there is nothing to stop.
        let _ = signals::kick(thread, kick_signal());
    }
}

/// How many of a machine's vCPUs run. Whoever stops them waits here once, not once for each.
#[derive(Default)]
pub(super) struct RunningCount {
    count: Mutex<usize>,
    none: Condvar,
    /// A vCPU whose thread is awake, or soonest so, and not on the owner's CPU if there is such a one.
    pub(super) awake: AtomicUsize,
    /// The CPU of the owner, who waits for the vCPUs to park.
    owners_cpu: AtomicUsize,
    /// Whether [`awake`](Self::awake) was elsewhere when it parked.
    awake_elsewhere: AtomicBool,
}

impl RunningCount {
    fn one_more(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }

    /// Tells whether none is left.
    fn one_less(&self) -> bool {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count -= 1;
        let none = *count == 0;
        drop(count);
        if none {
            self.none.notify_all();
        }
        none
    }

    /// The vCPUs are about to be stopped.
    pub(super) fn expect_none(&self) {
        self.awake_elsewhere.store(false, Ordering::Relaxed);
        self.note_owner();
    }

    fn note_owner(&self) {
        // Where it is not known, nobody is taken to share it.
        let here = oslib::thread::current_cpu().unwrap_or(usize::MAX);
        self.owners_cpu.store(here, Ordering::Relaxed);
    }

    /// The vCPU's thread, on this CPU, has parked it; tells whether that is where the owner is not. One that shared the owner's CPU
    /// would be no help, and take its time.
    fn note_parked(&self, index: usize, cpu: Option<usize>) -> bool {
        let owner = self.owners_cpu.load(Ordering::Relaxed);
        let elsewhere = cpu.is_some_and(|here| here != owner);
        if elsewhere || !self.awake_elsewhere.load(Ordering::Relaxed) {
            self.awake.store(index, Ordering::Relaxed);
        }
        self.awake_elsewhere.fetch_or(elsewhere, Ordering::Relaxed);
        elsewhere
    }

    /// Waits until no vCPU runs; tells whether that came to be before `until`. Calls `remind` after each `every`.
    pub(super) fn wait_none(&self, until: Instant, every: Duration, remind: impl Fn()) -> bool {
        wait::briefly(|| {
            self.note_owner();
            *self.count.lock().unwrap_or_else(PoisonError::into_inner) == 0
        });
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        while *count > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let (again, timeout) =
                self.none.wait_timeout(count, left.min(every)).unwrap_or_else(PoisonError::into_inner);
            count = again;
            if timeout.timed_out() && *count > 0 {
                drop(count);
                remind();
                count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_stays_awake_is_not_where_the_owner_is() {
        let running = RunningCount::default();
        let stop = |parked: &[(usize, usize)]| {
            running.expect_none();
            running.owners_cpu.store(0, Ordering::Relaxed);
            let can_help: Vec<bool> =
                parked.iter().map(|&(index, cpu)| running.note_parked(index, Some(cpu))).collect();
            (running.awake.load(Ordering::Relaxed), can_help)
        };
        assert_eq!(stop(&[(3, 0), (1, 1), (2, 1), (0, 0)]), (2, vec![false, true, true, false]));
        // The last one, if all were with the owner.
        assert_eq!(stop(&[(1, 0), (3, 0)]), (3, vec![false, false]));
        assert!(!running.note_parked(2, None), "nobody knows where");
    }
}
