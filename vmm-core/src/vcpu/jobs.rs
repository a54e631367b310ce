//! One job for every vCPU, done by as many threads as there are CPUs.
//!
//! KVM takes a parked vCPU's calls from any thread. A call takes a few microseconds and waking a thread takes more, so
//! the owner's thread does jobs itself, and has only so many vCPU threads help as there are further CPUs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

use super::slot::{Cpu, Slot};
use super::{VcpuError, wait};
use crate::error::MachineError;

/// A job that is done once with each vCPU.
pub(super) type EachJob<T> = dyn Fn(&mut Cpu) -> Result<T, VcpuError> + Send + Sync;

type Report<T> = (usize, Result<T, VcpuError>);

struct Work<T> {
    slots: Arc<[Arc<Slot>]>,
    /// The vCPU to begin with.
    first: usize,
    /// How many have been taken on.
    taken: AtomicUsize,
    job: Box<EachJob<T>>,
    reports: Sender<Report<T>>,
}

impl<T> Work<T> {
    /// Does what is left.
    fn help(&self) {
        let count = self.slots.len();
        loop {
            let taken = self.taken.fetch_add(1, Ordering::Relaxed);
            if taken >= count {
                return;
            }
            let slot = &self.slots[(self.first + taken) % count];
            // Nobody waits any more if the owner has lost interest.
            let _ = self.reports.send((slot.index, slot.with_parked(&self.job)));
        }
    }
}

/// Jobs under way.
#[must_use = "the jobs' results are lost"]
pub(crate) struct Pending<T> {
    work: Arc<Work<T>>,
    reports: Receiver<Report<T>>,
}

impl<T: Send + 'static> Pending<T> {
    /// Has `helpers` threads of vCPUs begin, the one of vCPU `awake` before others.
    pub(super) fn start(
        slots: &Arc<[Arc<Slot>]>,
        helpers: usize,
        awake: usize,
        job: Box<EachJob<T>>,
    ) -> Self {
        let (sender, reports) = channel();
        let first = (awake + 1) % slots.len();
        let (slots, taken) = (Arc::clone(slots), AtomicUsize::new(0));
        let work = Arc::new(Work { slots, first, taken, job, reports: sender });
        for slot in helping(&work.slots, awake).take(helpers) {
            let work = Arc::clone(&work);
            slot.post_job(Box::new(move || work.help()));
        }
        Self { work, reports }
    }

    /// Does what is left, and waits for the rest. Returns the results by vCPU, or the first failure; all are waited
    /// for, so that nothing goes on behind the caller's back.
    pub(crate) fn wait(self) -> Result<Vec<T>, MachineError> {
        let Self { work, reports } = self;
        work.help();
        let count = work.slots.len();
        // From here on only helpers can report: if one of them dies of its job, the reports end.
        drop(work);
        let mut results: Vec<Option<T>> = (0..count).map(|_| None).collect();
        let mut failure = None;
        for (index, result) in std::iter::from_fn(|| next(&reports)).take(count) {
            match result {
                Ok(result) => results[index] = Some(result),
                Err(source) => {
                    failure.get_or_insert(MachineError::Vcpu { index, source });
                }
            }
        }
        if let Some(failure) = failure {
            return Err(failure);
        }
        match results.iter().position(Option::is_none) {
            Some(index) => Err(MachineError::Vcpu { index, source: VcpuError::Gone }),
            None => Ok(results.into_iter().flatten().collect()),
        }
    }
}

/// Those whose threads help, in order, if vCPU `awake`'s begins. To take its order a thread needs its slot, and the owner begins
/// at the other end.
pub(super) fn helping(slots: &[Arc<Slot>], awake: usize) -> impl Iterator<Item = &Arc<Slot>> {
    slots[..=awake].iter().rev().chain(slots[awake + 1..].iter().rev())
}

/// The next report, if there is still somebody to make it. It is about to come, as a rule.
fn next<T>(reports: &Receiver<T>) -> Option<T> {
    let mut report = Err(TryRecvError::Empty);
    wait::briefly(|| {
        report = reports.try_recv();
        !matches!(report, Err(TryRecvError::Empty))
    });
    report.or_else(|_| reports.recv()).ok()
}
