//! Turns: how vCPUs that outnumber the CPUs all get into the guest soon after a resume.
//!
//! A busy vCPU keeps its CPU for a whole time slice of some milliseconds, and those that have not been in wait for it. So
//! after a resume each vCPU runs the guest for one short turn and then leaves the CPU to the others; when all have had
//! theirs, all go on and the system's scheduler does as it likes. A turn ends with the vCPU's first exit, which a timer
//! of its thread brings about.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::{SigEvent, SigevNotify, Signal};
use nix::sys::time::TimeSpec;
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use oslib::signals::{self, SignalMask};

use super::slot::Slot;

/// How long a turn is: long enough for the guest to get somewhere, short against the time that entering takes all of them.
const TURN: Duration = Duration::from_micros(30);

/// The signal that ends a turn. Threads block it but for `KVM_RUN`: it is taken back without a handler, whose frame on the
/// stack would cost as much as the turn.
const TURN_SIGNAL: Signal = Signal::SIGVTALRM;

/// One resume: who is still to be woken, and whose turns have not ended.
pub(super) struct Turns {
    slots: Arc<[Arc<Slot>]>,
    /// The first thread that nobody has woken. Nothing until all have work: to one that had none, a wake-up is lost, and
    /// one that was awake may have begun before.
    next: AtomicUsize,
    left: Mutex<usize>,
    none_left: Condvar,
}

impl Turns {
    pub(super) fn new(slots: &Arc<[Arc<Slot>]>) -> Arc<Self> {
        Arc::new(Self {
            slots: Arc::clone(slots),
            next: AtomicUsize::new(slots.len()),
            left: Mutex::new(0),
            none_left: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives out a turn for each of `count` vCPUs.
    pub(super) fn give_out(self: &Arc<Self>, count: usize) -> Vec<Turn> {
        *self.lock() += count;
        (0..count).map(|_| Turn { turns: Arc::clone(self), ended: false }).collect()
    }

    /// Wakes all vCPUs' threads, which have been given their work. Each vCPU helps at the end of its turn, for it may
    /// well have taken the CPU of the caller.
    pub(super) fn wake_all(&self) {
        self.next.store(0, Ordering::Release);
        while self.wake_next() {}
    }

    /// Wakes one thread that nobody has woken; tells whether there was one.
    fn wake_next(&self) -> bool {
        let next = self.slots.get(self.next.fetch_add(1, Ordering::AcqRel));
        next.inspect(|slot| slot.wake()).is_some()
    }

    /// Waits until no turn is left, at most this long.
    pub(super) fn wait_all(&self, limit: Duration) {
        let left = self.lock();
        let _ = self.none_left.wait_timeout_while(left, limit, |left| *left > 0);
    }

    /// Lets all vCPUs that have had their turns go on, whoever has not.
    pub(super) fn cut_short(&self) {
        *self.lock() = 0;
        self.none_left.notify_all();
    }
}

/// One vCPU's turn; it ends when it is dropped, if not before.
pub(super) struct Turn {
    turns: Arc<Turns>,
    ended: bool,
}

impl Turn {
    /// The vCPU has been in the guest, or will not get there.
    pub(super) fn end(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            self.turns.wake_next();
            let mut left = self.turns.lock();
            *left = left.saturating_sub(1);
            if *left == 0 {
                drop(left);
                self.turns.none_left.notify_all();
            }
        }
    }

    /// Waits until all vCPUs have had their turns.
    pub(super) fn wait_for_others(mut self) {
        self.end();
        let mut left = self.turns.lock();
        while *left > 0 {
            left = self.turns.none_left.wait(left).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.end();
    }
}

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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use nix::sys::signal::SigSet;

    use super::*;

    fn turns(count: usize) -> (Arc<Turns>, Vec<Turn>) {
        let turns = Turns::new(&Vec::new().into());
        let given = turns.give_out(count);
        (turns, given)
    }

    #[test]
    fn all_go_on_when_the_last_turn_ends() {
        let (_turns, mut given) = turns(3);
        let (mut last, second) = (given.pop().unwrap(), given.pop().unwrap());
        let (sender, waited) = channel();
        let threads: Vec<_> = given
            .into_iter()
            .map(|turn| {
                let sender = sender.clone();
                std::thread::spawn(move || {
                    turn.wait_for_others();
                    sender.send(()).unwrap();
                })
            })
            .collect();
        // One that never gets into the guest is not waited for.
        drop(second);
        assert!(waited.recv_timeout(Duration::from_millis(50)).is_err());
        last.end();
        last.end();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        last.wait_for_others();
    }

    #[test]
    fn nobody_is_woken_before_all_have_work() {
        let slots = (0..2).map(|index| Arc::new(Slot::new(index, Arc::default()))).collect();
        let turns = Turns::new(&slots);
        // Of a thread that was awake when it got its work.
        turns.give_out(1);
        assert_eq!(turns.next.load(Ordering::SeqCst), 3, "all were passed over");
        turns.wake_all();
        assert!(!turns.wake_next());
    }

    #[test]
    fn turns_that_are_cut_short_keep_nobody_waiting() {
        let (turns, mut given) = turns(2);
        let early = given.pop().unwrap();
        let thread = std::thread::spawn(move || early.wait_for_others());
        turns.cut_short();
        thread.join().unwrap();
        given.pop().unwrap().wait_for_others();
    }

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
}
