//! What a vCPU's thread and the machine's owner share: where the vCPU is, and the protocol by which it is stopped.
//!
//! A parked vCPU lies in its slot, where any thread may use it under the slot's lock; a running one is with its thread.
//! So a thread may end and another may take its place while the vCPU is parked. Stopping takes no lock that a vCPU in
//! the guest could hold.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use oslib::signals::{self, ThreadId};

use super::VcpuError;
use super::turns::Turn;
use crate::kvm::{Capabilities, ImmediateExit, Vcpu};
use crate::state::Blob;

/// A vCPU, and what belongs to it whichever thread has it.
pub(crate) struct Cpu {
    pub(crate) index: usize,
    pub(crate) vcpu: Vcpu,
    pub(crate) caps: Capabilities,
    /// The CPUID table that the vCPU was given.
    pub(crate) cpuid: Option<Blob>,
}

/// Work that a vCPU's thread does for the owner while its vCPU is parked. It need not concern that vCPU.
pub(super) type Job = Box<dyn FnOnce() + Send>;

/// What a vCPU's thread is asked to do.
pub(super) enum Request {
    /// Run the guest, with a turn to take first if the vCPUs take turns.
    Run(Cpu, Option<Turn>),
    Job(Job),
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
    thread: Option<JoinHandle<()>>,
    /// The kernel's name of the thread, once that runs.
    thread_id: Option<ThreadId>,
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

    /// Asks the thread to run the guest; it hears of it with [`Slot::wake`].
    pub(super) fn post_run(&self, turn: Option<Turn>) -> Result<(), VcpuError> {
        let mut inner = self.lock_made();
        match &inner.place {
            Place::Parked(_) if inner.thread.is_none() => return Err(VcpuError::Dismissed),
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
        self.stop.store(false, Ordering::SeqCst);
        self.set_immediate_exit(false);
    }

    pub(super) fn tell_paused_on_resume(&self) {
        self.tell_paused.store(true, Ordering::Relaxed);
    }

    // The owner's side: the thread.

    pub(super) fn has_thread(&self) -> bool {
        self.lock().thread.is_some()
    }

    /// Has `spawn` start a thread, unless there is one.
    pub(super) fn ensure_thread(
        &self,
        spawn: impl FnOnce() -> std::io::Result<JoinHandle<()>>,
    ) -> Result<(), VcpuError> {
        let mut inner = self.lock();
        if inner.thread.is_none() && !matches!(inner.place, Place::Gone) {
            inner.thread = Some(spawn().map_err(VcpuError::Thread)?);
        }
        Ok(())
    }

    /// Returns the kernel's name of the thread; waits for one that is about to start.
    pub(super) fn thread_id(&self) -> Result<ThreadId, VcpuError> {
        let mut inner = self.lock();
        loop {
            match (inner.thread_id, &inner.thread, &inner.place) {
                (Some(id), _, _) => return Ok(id),
                (None, _, Place::Gone | Place::Failed(_)) => return Err(VcpuError::Gone),
                (None, None, _) => return Err(VcpuError::Dismissed),
                (None, Some(_), _) => {}
            }
            inner = self.news.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Asks the thread, if there is one, for help. Nobody is told whether it comes to it.
    pub(super) fn post_job(&self, job: Job) {
        self.lock().requests.push_back(Request::Job(job));
        self.wake();
    }

    /// Tells the thread to end. One that runs the guest does so once it has parked.
    pub(super) fn post_quit(&self) {
        self.lock().requests.push_back(Request::Quit);
        self.wake();
    }

    /// Waits for a thread that was told to end. The vCPU stays.
    pub(super) fn join(&self) {
        let thread = self.lock().thread.take();
        if let Some(thread) = thread {
            // A panic has been told on its way; the vCPU went with it.
            let _ = thread.join();
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
        self.set_place(Place::Failed(error));
    }

    pub(super) fn park(&self, cpu: Cpu) {
        // Nobody waits for news of a vCPU that exists.
        self.lock().place = Place::Parked(cpu);
        self.running.one_less();
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
                None => inner = self.wake.wait(inner).unwrap_or_else(PoisonError::into_inner),
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
}

impl RunningCount {
    fn one_more(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }

    fn one_less(&self) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count -= 1;
        if *count == 0 {
            drop(count);
            self.none.notify_all();
        }
    }

    /// Waits until no vCPU runs; tells whether that came to be before `until`. Calls `remind` after each `every`.
    pub(super) fn wait_none(&self, until: Instant, every: Duration, remind: impl Fn()) -> bool {
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
