//! Failures of a target on purpose, so that a test can show what becomes of its guest. Only in builds with the feature
//! `fault-injection`.

use oslib::signals::{self, ThreadId};

/// `KIND@POINT`, or `KIND@POINT,always` for a fallback start, too. Kinds: `panic`, `thread-panic`, `segv`, `overflow` (of the
/// stack), `abort`, `hang`, `kill`. Points: `built`, `loaded`.
const VARIABLE: &str = "CPR_TEST_TARGET_FAILS";

/// Fails as the environment says, if it means this `point`.
pub fn strike(point: &str, fallback: bool) {
    let Ok(wish) = std::env::var(VARIABLE) else { return };
    let (wish, always) = wish.strip_suffix(",always").map_or((&*wish, false), |wish| (wish, true));
    let Some((kind, at)) = wish.split_once('@') else { return };
    if at != point || fallback && !always {
        return;
    }
    let raise = |signal| {
        let _ = signals::kick(ThreadId::current(), signal);
    };
    match kind {
        "panic" => panic!("a panic that was asked for"),
        "thread-panic" => {
            let _ = std::thread::spawn(|| panic!("a panic that was asked for")).join();
        }
        "segv" => raise(11),
        "overflow" => drop(deeper(1)),
        "abort" => std::process::abort(),
        "hang" => std::thread::sleep(std::time::Duration::from_secs(600)),
        "kill" => raise(9),
        other => panic!("{VARIABLE}: no failure '{other}'"),
    }
}

#[expect(unconditional_recursion, reason = "to fill the stack")]
fn deeper(depth: u64) -> Vec<u64> {
    let room = std::hint::black_box([depth; 256]);
    let mut deepest = deeper(depth.wrapping_add(1));
    deepest.push(room[1]);
    deepest
}
