//! Stamps the true blackout: the first vCPU's last exit and the last vCPU's first entry.

use std::sync::{Mutex, PoisonError};

use cpr_core::{Control, Stamp};
use vmm_core::vcpu::RunObserver;

/// Told by vCPU threads; stamps into the control page of the update under way, if there is one.
#[derive(Debug, Default)]
pub struct BlackoutObserver {
    armed: Mutex<Option<Armed>>,
}

#[derive(Debug)]
struct Armed {
    control: Control,
    /// vCPUs whose first entry is still to come; `None` in the source.
    entries_left: Option<usize>,
}

impl BlackoutObserver {
    /// In the source: stamps the vCPUs' last exits into `control`.
    pub fn arm(&self, control: Control) {
        self.set(Some(Armed { control, entries_left: None }));
    }

    /// In the target: stamps the first entries of `vcpus` vCPUs, and then no more.
    pub fn arm_for_entries(&self, control: Control, vcpus: usize) {
        self.set(Some(Armed { control, entries_left: Some(vcpus) }));
    }

    /// Stamps nothing.
    pub fn disarm(&self) {
        self.set(None);
    }

    fn set(&self, armed: Option<Armed>) {
        *self.armed.lock().unwrap_or_else(PoisonError::into_inner) = armed;
    }
}

impl RunObserver for BlackoutObserver {
    fn last_exit(&self, _vcpu: usize) {
        let armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Armed { control, entries_left: None }) = &*armed {
            control.timeline().stamp_first(Stamp::FirstExit);
        }
    }

    fn first_run(&self, _vcpu: usize) {
        let mut armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Armed { control, entries_left: Some(left) }) = &mut *armed {
            control.timeline().stamp_first(Stamp::FirstEntry);
            *left -= 1;
            if *left == 0 {
                control.timeline().stamp_last(Stamp::LastEntry);
                *armed = None;
            }
        }
    }
}
