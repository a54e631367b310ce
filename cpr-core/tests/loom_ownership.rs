//! Explores every interleaving of those who may win the ownership word. Run by `cargo xtask test`, which builds it
//! with `--cfg loom`.
#![cfg(loom)]

use cpr_core::ownership::{Lost, Owner, OwnershipWord};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use loom::thread;

const EPOCH: u64 = 5;

/// Guest state that only the winner may touch; loom reports a race if two do.
struct Guest {
    word: AtomicU64,
    ram: loom::cell::UnsafeCell<u64>,
    runners: AtomicUsize,
}

fn guest() -> Arc<Guest> {
    let guest = Arc::new(Guest {
        word: AtomicU64::new(0),
        ram: loom::cell::UnsafeCell::new(0),
        runners: AtomicUsize::new(0),
    });
    OwnershipWord::start(&guest.word, EPOCH);
    guest
}

#[allow(unsafe_code, reason = "loom's UnsafeCell checks the access; that check is the point of the model")]
fn run_guest(guest: &Guest) {
    assert_eq!(guest.runners.fetch_add(1, Ordering::Relaxed), 0, "two runners");
    // SAFETY: only the one winner of the word gets here; loom fails the test if that is not so.
    guest.ram.with_mut(|ram| unsafe { *ram += 1 });
}

#[test]
fn at_most_one_of_source_target_and_keeper_runs_the_guest() {
    loom::model(|| {
        let guest = guest();
        let contenders: [fn(&OwnershipWord<'_>) -> Result<(), Lost>; 3] =
            [|w| w.roll_back(), |w| w.commit(), |w| w.roll_back()];
        let threads: Vec<_> = contenders
            .into_iter()
            .map(|contend| {
                let guest = guest.clone();
                thread::spawn(move || {
                    let word = OwnershipWord::attach(&guest.word, EPOCH);
                    match contend(&word) {
                        Ok(()) => run_guest(&guest),
                        Err(Lost::To(owner)) => assert_ne!(owner, Owner::Source, "lost to nobody"),
                        Err(Lost::OtherAttempt) => panic!("the word is of this attempt"),
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        // Somebody won, and it is known who.
        assert_eq!(guest.runners.load(Ordering::Relaxed), 1);
        assert_ne!(OwnershipWord::attach(&guest.word, EPOCH).owner(), Some(Owner::Source));
    });
}

#[test]
fn what_the_source_wrote_before_is_seen_by_the_target_that_won() {
    loom::model(|| {
        let guest = guest();
        let source = {
            let guest = guest.clone();
            // The source writes guest RAM (its last device completion), then hands over by the word's release.
            thread::spawn(move || {
                run_guest(&guest);
                guest.runners.store(0, Ordering::Relaxed);
                OwnershipWord::start(&guest.word, EPOCH + 1);
            })
        };
        let word = OwnershipWord::attach(&guest.word, EPOCH + 1);
        if word.commit().is_ok() {
            run_guest(&guest);
        }
        source.join().unwrap();
    });
}
