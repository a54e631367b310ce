//! One job for every vCPU, done by as many threads as there are CPUs.
//!
//! KVM takes a parked vCPU's calls from any thread. A call takes a few microseconds and waking a thread takes more, so
//! the owner's thread does jobs itself, and has only so many vCPU threads help as there are further CPUs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use super::VcpuError;
use super::slot::{Cpu, Slot};
use crate::error::MachineError;

/// A job that is done once with each vCPU.
pub(super) type EachJob<T> = dyn Fn(&mut Cpu) -> Result<T, VcpuError> + Send + Sync;

type Report<T> = (usize, Result<T, VcpuError>);

struct Work<T> {
    slots: Arc<[Arc<Slot>]>,
    /// The first vCPU that nobody has taken on.
    next: AtomicUsize,
    job: Box<EachJob<T>>,
    reports: Sender<Report<T>>,
}

impl<T> Work<T> {
    /// Does what is left.
    fn help(&self) {
        while let Some(slot) = self.slots.get(self.next.fetch_add(1, Ordering::Relaxed)) {
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
    /// Has `helpers` threads of vCPUs begin.
    pub(super) fn start(slots: &Arc<[Arc<Slot>]>, helpers: usize, job: Box<EachJob<T>>) -> Self {
        let (sender, reports) = channel();
        let work =
            Arc::new(Work { slots: Arc::clone(slots), next: AtomicUsize::new(0), job, reports: sender });
        // The last ones: to take its order a thread needs its slot, and the owner begins with the first.
        for slot in slots.iter().rev().take(helpers) {
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
        for (index, result) in reports.iter().take(count) {
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
