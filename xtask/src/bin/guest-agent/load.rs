//! Work for the CPUs whose results are known: in registers of the FPU, and all over memory.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;

use crate::{is_enough, monotonic_ns};

/// Computes the same thing again and again. False if the result changed: then a register did.
pub(crate) fn watch_arithmetic(seconds: u32) -> bool {
    println!("agent: float begin seconds={seconds}");
    let end = monotonic_ns() + i64::from(seconds) * 1_000_000_000;
    let expected = orbit();
    let (mut rounds, mut wrong) = (0_u64, 0_u64);
    while monotonic_ns() < end && !is_enough() {
        rounds += 1;
        wrong += u64::from(orbit() != expected);
    }
    println!(
        "agent: float {} rounds={rounds} wrong={wrong} enough={}",
        if wrong == 0 { "ok" } else { "bad" },
        u8::from(is_enough())
    );
    wrong == 0
}

/// A point of the logistic map after many steps. It is chaotic, so any change on the way changes the result, and it is all
/// in registers, so a change of these does. It takes some ten milliseconds, with next to nothing between two calls.
fn orbit() -> u64 {
    let mut x = black_box(0.3);
    for _ in 0..100_000 {
        x = 3.99 * x * (1.0 - x);
    }
    f64::to_bits(x)
}

/// Writes and checks memory on `threads` threads, `mib` MiB each. False if a word is not what was written: then a page was
/// lost, or a register while it was computed.
pub(crate) fn watch_memory(seconds: u32, threads: usize, mib: usize) -> bool {
    println!("agent: load begin seconds={seconds} threads={threads} mib={mib}");
    let end = monotonic_ns() + i64::from(seconds) * 1_000_000_000;
    let (rounds, wrong) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for thread in 0..threads {
            let (rounds, wrong) = (&rounds, &wrong);
            scope.spawn(move || {
                let mut words = vec![0_u64; mib << 17];
                let mut seed = thread as u64;
                while monotonic_ns() < end && !is_enough() {
                    seed += threads as u64;
                    fill(&mut words, seed);
                    wrong.fetch_add(differences(black_box(&words), seed), SeqCst);
                    rounds.fetch_add(1, SeqCst);
                }
            });
        }
    });
    let (rounds, wrong) = (rounds.load(SeqCst), wrong.load(SeqCst));
    println!(
        "agent: load {} rounds={rounds} wrong={wrong} enough={}",
        if wrong == 0 { "ok" } else { "bad" },
        u8::from(is_enough())
    );
    wrong == 0
}

/// A different word at each place, and for each seed.
fn word(seed: u64, at: usize) -> u64 {
    (seed ^ (at as u64) << 20).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn fill(words: &mut [u64], seed: u64) {
    words.iter_mut().enumerate().for_each(|(at, place)| *place = word(seed, at));
}

fn differences(words: &[u64], seed: u64) -> u64 {
    words.iter().enumerate().filter(|&(at, &found)| found != word(seed, at)).count() as u64
}
