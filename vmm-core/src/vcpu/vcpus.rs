//! The vCPUs as the machine's owner sees them: stopped, given work, and started again, all of them at a time.

use std::os::fd::RawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use oslib::signals;
use oslib::thread::Thread;

use super::VcpuError;
use super::jobs::{EachJob, Pending, helping};
use super::slot::{Cpu, Placed, RunningCount, Slot, kick_signal};
use super::thread::{Environment, VcpuThread};
use super::turns::Turns;
use crate::error::MachineError;
use crate::kvm::Vm;

/// A vCPU that has not parked after this long is kicked once more. One kick is enough by construction; this is the
/// belt to those braces.
const KICK_AGAIN: Duration = Duration::from_millis(2);

/// Threads that are to rest do so long before, unless the machine has no CPU time for them.
const RESTS_WITHIN: Duration = Duration::from_secs(5);

/// All vCPUs have had their turns long before, unless the machine has no CPU time for them.
const TURNS_WITHIN: Duration = Duration::from_millis(20);

/// A vCPU thread needs little stack of its own; what its devices need on top is their writers' guess.
const STACK_LEN: usize = 512 * 1024;

/// The vCPUs of one machine.
///
/// ```text
///                    run                          stop seen, or the vCPU failed
///   Parked ------------------------> Running -----------------------------------> Parked
///     |  ^
///     |  '-- jobs (create, save, restore, ...), one after the other
///     |
///     '----> threads rest ----> threads recalled: Parked
/// ```
///
/// A parked vCPU needs no thread but to run. An exec ends all threads where they stand, so before one the vCPUs are
/// parked and their threads rest: they hold nothing that would stay held. Whoever takes this memory into another process
/// gets new threads there.
pub struct Vcpus {
    slots: Arc<[Arc<Slot>]>,
    running: Arc<RunningCount>,
    /// Those of the last resume in which vCPUs took turns.
    turns: Mutex<Arc<Turns>>,
    /// Threads that have taken places for a resume to come.
    placed: Mutex<Vec<Placed>>,
    vm: Arc<Vm>,
    environment: Environment,
}

impl Vcpus {
    /// Starts a thread for each of `count` vCPUs and has it create its vCPU. Does not wait for that.
    pub(crate) fn spawn(count: usize, vm: &Arc<Vm>, environment: &Environment) -> Result<Self, MachineError> {
        let running = Arc::new(RunningCount::default());
        let slots: Arc<[_]> =
            (0..count).map(|index| Arc::new(Slot::new(index, Arc::clone(&running)))).collect();
        let vcpus = Self {
            turns: Mutex::new(Turns::new(&slots)),
            placed: Mutex::default(),
            slots,
            running,
            vm: Arc::clone(vm),
            environment: environment.clone(),
        };
        // A failure half-way drops those that were started.
        vcpus.recall_threads()?;
        Ok(vcpus)
    }

    /// Starts a thread for every vCPU that has none in this process, and wakes those that rest. Does not wait for them to be
    /// under way.
    pub(crate) fn recall_threads(&self) -> Result<(), MachineError> {
        let process = self.begin_here()?;
        self.on_each(|slot| self.ensure_thread(slot, process))
    }

    /// What threads of this process need; returns its id.
    fn begin_here(&self) -> Result<u32, MachineError> {
        // It belongs to the process, which may be another one than last time.
        signals::install_noop_handler(kick_signal())
            .map_err(|source| MachineError::Host { what: "the handler of the vCPU threads", source })?;
        Ok(std::process::id())
    }

    fn ensure_thread(&self, slot: &Arc<Slot>, process: u32) -> Result<(), VcpuError> {
        slot.ensure_thread(process, || {
            let thread = VcpuThread {
                slot: Arc::clone(slot),
                vm: Arc::clone(&self.vm),
                environment: self.environment.clone(),
            };
            Thread::spawn(&format!("vcpu{}", slot.index), STACK_LEN, move || thread.run())
        })
    }

    /// Calls `f` for one vCPU after the other, until one fails.
    fn on_each(&self, mut f: impl FnMut(&Arc<Slot>) -> Result<(), VcpuError>) -> Result<(), MachineError> {
        self.slots
            .iter()
            .try_for_each(|slot| f(slot).map_err(|source| MachineError::Vcpu { index: slot.index, source }))
    }

    fn turns(&self) -> MutexGuard<'_, Arc<Turns>> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn placed(&self) -> MutexGuard<'_, Vec<Placed>> {
        self.placed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the number of vCPUs.
    pub fn count(&self) -> usize {
        self.slots.len()
    }

    /// Waits until all vCPUs exist.
    pub(crate) fn ready(&self) -> Result<(), MachineError> {
        self.ready_with(&mut || {})
    }

    /// The same, and calls `made` after each.
    pub(crate) fn ready_with(&self, made: &mut dyn FnMut()) -> Result<(), MachineError> {
        self.on_each(|slot| {
            slot.wait_made()?;
            made();
            Ok(())
        })
    }

    /// Returns the vCPUs' descriptors.
    pub(crate) fn fds(&self) -> Result<Vec<RawFd>, MachineError> {
        self.ready()?;
        Ok(self.slots.iter().filter_map(|slot| slot.fd()).collect())
    }

    /// Returns the ids of the threads.
    pub(crate) fn thread_ids(&self) -> Result<Vec<u32>, MachineError> {
        self.ready()?;
        let mut ids = Vec::with_capacity(self.count());
        self.on_each(|slot| {
            ids.push(slot.thread_id()?.as_u32());
            Ok(())
        })?;
        Ok(ids)
    }

    /// Tells whether no vCPU runs.
    pub fn all_parked(&self) -> bool {
        self.slots.iter().all(|slot| !slot.is_running())
    }

    /// Has the threads rest as soon as their vCPUs are parked, whenever that is.
    pub(crate) fn want_rest(&self) {
        self.slots.iter().for_each(|slot| slot.want_rest());
    }

    /// Returns when all threads rest. Their vCPUs must be parked and stay so.
    pub(crate) fn rest_threads(&self) -> Result<(), MachineError> {
        self.ready()?;
        self.on_each(|slot| if slot.is_running() { Err(VcpuError::Running) } else { Ok(()) })?;
        self.want_rest();
        let until = Instant::now() + RESTS_WITHIN;
        // They are on their way, which takes less than going to sleep here.
        self.on_each(|slot| {
            while !slot.rests() {
                if Instant::now() > until {
                    return Err(VcpuError::Restless);
                }
                std::thread::yield_now();
            }
            Ok(())
        })
    }

    /// Lets every parked vCPU run. Where they take turns it returns when they have had them: what the caller does next
    /// would take the CPU of one.
    ///
    /// # Errors
    /// The vCPU that is gone, or for which no thread could be started. Those before it run.
    pub fn resume(&self) -> Result<(), MachineError> {
        let process = self.begin_here()?;
        let turns = Turns::new(&self.slots);
        let mut given = None;
        if self.take_turns() {
            given = Some(turns.give_out().into_iter());
            *self.turns() = Arc::clone(&turns);
        }
        let mut placed = std::mem::take(&mut *self.placed());
        let posted = self.on_each(|slot| {
            let turn = given.as_mut().and_then(|given| given.next());
            let takes_turns = turn.is_some();
            match slot.post_run(turn) {
                // One that has to be started finds its work, and begins. The turn of one that runs already is over, by
                // being dropped; it may be about to rest.
                Ok(()) | Err(VcpuError::Running) => self.ensure_thread(slot, process)?,
                Err(error) => return Err(error),
            }
            if takes_turns && placed.iter().all(|placed| placed.index != slot.index) {
                // The system would let new threads wait for the CPU that started them while another one idles.
                placed.extend(slot.put_on_cpu());
            }
            Ok(())
        });
        let places = placed.iter().filter(|_| given.is_some()).map(|placed| (placed.index, placed.cpu));
        turns.wake_all(places);
        // Those after a vCPU that failed got none.
        drop(given);
        turns.wait_all(TURNS_WITHIN);
        // Nobody is to wait longer, or to stay asleep.
        turns.cut_short();
        placed.iter().for_each(|placed| self.slots[placed.index].release(placed));
        posted
    }

    /// Stops every vCPU, and returns when all are parked.
    ///
    /// # Errors
    /// [`MachineError::PauseTimedOut`] with those that did not stop in time; they go on running, the others
    /// are parked. [`resume`](Self::resume) undoes it.
    pub fn pause(&self, deadline: Duration) -> Result<(), MachineError> {
        let until = Instant::now() + deadline;
        self.running.expect_none();
        self.slots.iter().for_each(|slot| slot.request_stop());
        // Those that have had their turns would wait for those that have not.
        self.turns().cut_short();
        let remind = || self.slots.iter().for_each(|slot| slot.kick_again());
        if self.running.wait_none(until, KICK_AGAIN, remind) {
            return Ok(());
        }
        let late: Vec<_> = self.slots.iter().filter(|slot| slot.is_running()).collect();
        if late.is_empty() {
            return Ok(());
        }
        late.iter().for_each(|slot| slot.withdraw_stop());
        Err(MachineError::PauseTimedOut { vcpus: late.iter().map(|slot| slot.index).collect(), deadline })
    }

    /// Has each of these vCPUs tell its guest, before it runs again, that it stood still.
    pub(crate) fn tell_paused_on_resume(&self, which: &dyn Fn(usize) -> bool) {
        self.slots.iter().filter(|slot| which(slot.index)).for_each(|slot| slot.tell_paused_on_resume());
    }

    /// Has a job begun that is done once with each parked vCPU; who waits for the result takes part in it. A vCPU that
    /// is still being created gets to it afterwards.
    pub(crate) fn start_on_all<T: Send + 'static>(&self, job: Box<EachJob<T>>) -> Pending<T> {
        Pending::start(&self.slots, self.helpers(), self.running.awake.load(Ordering::Relaxed), job)
    }

    /// Whether the vCPUs take turns after a resume.
    fn take_turns(&self) -> bool {
        self.count() > 1 && self.count() >= usable_cpus()
    }

    /// Has the threads where they will take their turns, ahead of the resume.
    pub(crate) fn take_places(&self) {
        if self.take_turns() {
            *self.placed() = self.slots.iter().filter_map(|slot| slot.put_on_cpu()).collect();
        }
    }

    /// Wakes those who will help with a job that is about to come, if they have places not where the caller is.
    pub(crate) fn rouse_helpers(&self) {
        let here = oslib::thread::current_cpu();
        if let Some(other) = self.placed().iter().rev().find(|placed| Some(placed.cpu) != here) {
            self.running.awake.store(other.index, Ordering::Relaxed);
        }
        let awake = self.running.awake.load(Ordering::Relaxed);
        for slot in helping(&self.slots, awake).take(self.helpers()) {
            let expecting = Arc::clone(slot);
            slot.post_job(Box::new(move || expecting.expect_work()));
        }
    }

    /// How many threads help the owner's with a job for all vCPUs.
    fn helpers(&self) -> usize {
        usable_cpus().min(self.count()) - 1
    }

    /// Does a job with each parked vCPU.
    pub(crate) fn on_all<T: Send + 'static>(&self, job: Box<EachJob<T>>) -> Result<Vec<T>, MachineError> {
        self.start_on_all(job).wait()
    }

    /// Does a job with one parked vCPU.
    pub(crate) fn on_one<T>(
        &self,
        index: usize,
        job: impl FnOnce(&mut Cpu) -> Result<T, VcpuError>,
    ) -> Result<T, MachineError> {
        self.slots[index].with_parked(job).map_err(|source| MachineError::Vcpu { index, source })
    }
}

impl Drop for Vcpus {
    /// Ends the threads. One that does not stop within a second, because a device holds it up, is left behind.
    fn drop(&mut self) {
        let _ = self.pause(Duration::from_secs(1));
        let stopped: Vec<_> = self.slots.iter().filter(|slot| !slot.is_running()).collect();
        stopped.iter().for_each(|slot| slot.post_quit());
        stopped.iter().for_each(|slot| slot.join());
    }
}

impl std::fmt::Debug for Vcpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.slots.iter()).finish()
    }
}

/// Returns on how many CPUs this thread, and so those that it starts, may run; at least one. The C library's answer
/// takes a microsecond, the standard library's, which looks for control groups, half a hundred.
fn usable_cpus() -> usize {
    let allowed = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0));
    let count = allowed.map_or(0, |set| {
        (0..nix::sched::CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap_or(false)).count()
    });
    count.max(1)
}
