//! Turns: how vCPUs that outnumber the CPUs all get into the guest soon after a resume.
//!
//! A busy vCPU keeps its CPU for a whole time slice of some milliseconds, and those that have not been in wait for it. So
//! after a resume each vCPU runs the guest for one short turn and then leaves the CPU to the others; when all have had
//! theirs, all go on and the system's scheduler does as it likes. A turn ends with the vCPU's first exit, which a timer
//! of its thread brings about.
//!
//! Threads that have been put on a CPU are woken one after the other there, each at the end of the turn before its own: one
//! that is woken earlier interrupts that turn, or whoever wakes it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::slot::Slot;

/// One resume: who is still to be woken, and whose turns have not ended.
pub(super) struct Turns {
    slots: Arc<[Arc<Slot>]>,
    state: Mutex<State>,
    none_left: Condvar,
}

#[derive(Default)]
struct State {
    /// How many turns have not ended.
    left: usize,
    /// By vCPU: whether it had a turn, which has ended.
    ended: Vec<bool>,
    /// By CPU: the vCPUs whose threads nobody has woken. None until all have work: to a thread that had none, a wake-up
    /// is lost, and one that was awake may have begun before.
    asleep: BTreeMap<usize, VecDeque<usize>>,
    /// By vCPU: where it takes its turn, if it was put there.
    cpus: Vec<Option<usize>>,
}

impl State {
    /// Whose turn is next on this CPU; it counts as woken.
    fn next_on(&mut self, cpu: usize) -> Option<usize> {
        let asleep = self.asleep.get_mut(&cpu)?;
        std::iter::from_fn(|| asleep.pop_front()).find(|&vcpu| !self.ended[vcpu])
    }
}

impl Turns {
    pub(super) fn new(slots: &Arc<[Arc<Slot>]>) -> Arc<Self> {
        let state =
            State { ended: vec![false; slots.len()], cpus: vec![None; slots.len()], ..State::default() };
        Arc::new(Self { slots: Arc::clone(slots), state: Mutex::new(state), none_left: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives out a turn for each vCPU, in order.
    pub(super) fn give_out(self: &Arc<Self>) -> Vec<Turn> {
        let count = self.slots.len();
        self.lock().left = count;
        (0..count).map(|vcpu| Turn { turns: Arc::clone(self), vcpu, ended: false }).collect()
    }

    /// Has all vCPUs' threads woken, which have been given their work. Where `places` tells the vCPU and the CPU of those
    /// that were given turns and put somewhere, they wake each other.
    pub(super) fn wake_all(&self, places: impl Iterator<Item = (usize, usize)>) {
        let mut state = self.lock();
        for (vcpu, cpu) in places {
            state.cpus[vcpu] = Some(cpu);
            state.asleep.entry(cpu).or_default().push_back(vcpu);
        }
        let here = oslib::thread::current_cpu();
        let mut cpus: Vec<usize> = state.asleep.keys().copied().collect();
        // Whoever is woken on the caller's CPU takes it.
        cpus.sort_by_key(|&cpu| Some(cpu) == here);
        let free: Vec<usize> = (0..self.slots.len()).filter(|&vcpu| state.cpus[vcpu].is_none()).collect();
        let first: Vec<usize> = cpus.into_iter().filter_map(|cpu| state.next_on(cpu)).collect();
        drop(state);
        first.into_iter().chain(free).for_each(|vcpu| self.slots[vcpu].wake());
    }

    /// Waits until no turn is left, at most this long.
    pub(super) fn wait_all(&self, limit: Duration) {
        let state = self.lock();
        let _ = self.none_left.wait_timeout_while(state, limit, |state| state.left > 0);
    }

    /// Lets all vCPUs that have had their turns go on, whoever has not.
    pub(super) fn cut_short(&self) {
        let mut state = self.lock();
        state.left = 0;
        let asleep = std::mem::take(&mut state.asleep);
        drop(state);
        self.none_left.notify_all();
        asleep.into_values().flatten().for_each(|vcpu| self.slots[vcpu].wake());
    }
}

/// One vCPU's turn; it ends when it is dropped, if not before.
pub(super) struct Turn {
    turns: Arc<Turns>,
    vcpu: usize,
    ended: bool,
}

impl Turn {
    /// The vCPU has been in the guest, or will not get there.
    pub(super) fn end(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let mut state = self.turns.lock();
        state.ended[self.vcpu] = true;
        state.left = state.left.saturating_sub(1);
        let none_left = state.left == 0;
        let next = state.cpus[self.vcpu].and_then(|cpu| state.next_on(cpu));
        drop(state);
        if none_left {
            self.turns.none_left.notify_all();
        }
        if let Some(next) = next {
            self.turns.slots[next].wake();
        }
    }

    /// Waits until all vCPUs have had their turns.
    pub(super) fn wait_for_others(mut self) {
        self.end();
        let mut state = self.turns.lock();
        while state.left > 0 {
            state = self.turns.none_left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    const NONE: Vec<usize> = Vec::new();

    fn turns(count: usize) -> (Arc<Turns>, Vec<Turn>) {
        let slots = (0..count).map(|index| Arc::new(Slot::new(index, Arc::default()))).collect();
        let turns = Turns::new(&slots);
        let given = turns.give_out();
        (turns, given)
    }

    /// Those that nobody has woken, on CPUs 0 and 1.
    fn asleep(turns: &Turns) -> [Vec<usize>; 2] {
        let state = turns.lock();
        [0, 1].map(|cpu| state.asleep.get(&cpu).into_iter().flatten().copied().collect())
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
    fn each_turn_wakes_the_next_on_its_cpu() {
        let (turns, mut given) = turns(7);
        // One that was awake when it got its work has its turn before anybody is woken.
        given[2].end();
        assert_eq!(asleep(&turns), [NONE, NONE]);
        turns.wake_all([(0, 0), (2, 0), (4, 0), (6, 0), (1, 1), (3, 1)].into_iter());
        assert_eq!(asleep(&turns), [vec![2, 4, 6], vec![3]]);
        given[0].end();
        assert_eq!(asleep(&turns), [vec![6], vec![3]], "vCPU 2 is passed over");
        // Woken at once, and by nobody's end: it is on no CPU that is known.
        given[5].end();
        assert_eq!(asleep(&turns), [vec![6], vec![3]]);
        given[1].end();
        assert_eq!(asleep(&turns), [vec![6], NONE]);
        turns.cut_short();
        assert_eq!(asleep(&turns), [NONE, NONE], "nobody is left asleep");
        given.clear();
        assert_eq!(turns.lock().left, 0);
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
}
