//! A stream of numbers to somebody outside who checks that none is missing, twice there, or out of turn.

use std::io::{self, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use crate::{is_enough, monotonic_ns};

/// How many numbers go into one write: a kilobyte.
const BATCH: u64 = 128;

/// Sends 1, 2, ... as 64-bit numbers, the high byte first, a kilobyte about every millisecond, and closes the connection.
pub(crate) fn send_numbers(address: &str, seconds: u32) -> io::Result<bool> {
    println!("agent: send begin seconds={seconds}");
    let mut stream = TcpStream::connect(address)?;
    let end = monotonic_ns() + i64::from(seconds) * 1_000_000_000;
    let (mut last, mut longest, mut previous) = (0_u64, 0, monotonic_ns());
    while previous < end && !is_enough() {
        let bytes: Vec<u8> = (last + 1..=last + BATCH).flat_map(u64::to_be_bytes).collect();
        stream.write_all(&bytes)?;
        last += BATCH;
        thread::sleep(Duration::from_millis(1));
        let now = monotonic_ns();
        longest = longest.max(now - previous);
        previous = now;
    }
    println!("agent: send ok last={last} longest_us={} enough={}", longest / 1000, u8::from(is_enough()));
    Ok(true)
}
