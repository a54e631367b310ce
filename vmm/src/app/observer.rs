//! Stamps the true blackout, and the pause before it if there is one, as vCPU threads leave and enter the guest.

use std::sync::{Mutex, PoisonError};

use cpr_core::{Control, Course, Stamp};
use vmm_core::machine::MAX_VCPUS;
use vmm_core::vcpu::RunObserver;

/// Told by vCPU threads; stamps into the control page of the update under way, if there is one.
#[derive(Debug, Default)]
pub struct BlackoutObserver {
    armed: Mutex<Option<Armed>>,
}

#[derive(Debug)]
struct Armed {
    control: Control,
    /// What the first vCPU to leave the guest stamps.
    exit: Option<Stamp>,
    entries: Option<Entries>,
}

fn all(vcpus: usize) -> u64 {
    const { assert!(MAX_VCPUS <= 64) };
    u64::MAX >> (64 - vcpus.clamp(1, 64))
}

/// vCPUs whose first entry is still to come.
#[derive(Debug)]
struct Entries {
    /// Bit n for vCPU n, of which there are [`MAX_VCPUS`] at most.
    left: u64,
    first: Option<Stamp>,
    last: Stamp,
}

impl BlackoutObserver {
    /// In the source: stamps the vCPUs' last exits into `control`. In an update that departs, those before the departure.
    pub fn arm(&self, control: Control, course: Course) {
        let exit = match course {
            Course::Departing => Stamp::DepartureExit,
            Course::Halted | Course::Alongside => Stamp::FirstExit,
        };
        self.set(Some(Armed { control, exit: Some(exit), entries: None }));
    }

    /// In the keeper: stamps that `vcpus` vCPUs run again, and later their last exits.
    pub fn arm_in_keeper(&self, control: Control, vcpus: usize) {
        let entries = Entries { left: all(vcpus), first: None, last: Stamp::DepartureEntry };
        self.set(Some(Armed { control, exit: Some(Stamp::FirstExit), entries: Some(entries) }));
    }

    /// In the target: stamps the first entries of `vcpus` vCPUs, and then no more.
    pub fn arm_for_entries(&self, control: Control, vcpus: usize) {
        let entries = Entries { left: all(vcpus), first: Some(Stamp::FirstEntry), last: Stamp::LastEntry };
        self.set(Some(Armed { control, exit: None, entries: Some(entries) }));
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
        if let Some(Armed { control, exit: Some(stamp), .. }) = &*armed {
            control.timeline().stamp_first(*stamp);
        }
    }

    fn first_run(&self, vcpu: usize) {
        let mut armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Armed { control, entries: entries @ Some(_), .. }) = &mut *armed else { return };
        if let Some(Entries { left, first, last }) = entries {
            if let Some(first) = first {
                control.timeline().stamp_first(*first);
            }
            *left &= !(1 << vcpu);
            if *left == 0 {
                control.timeline().stamp_last(*last);
                *entries = None;
            }
        }
    }
}
