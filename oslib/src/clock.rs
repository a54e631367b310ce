#![allow(unsafe_code, reason = "reads the time stamp counter")]
//! Clocks that mean the same to every process of one boot of one machine, and the id of that boot.
//!
//! Times compare only between processes whose [`boot_id`] agrees, and TSC values only where the TSCs of all CPUs are
//! synchronous. See clock_gettime(2), random(4) and the processor manual on RDTSC.

use std::io;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`, which all processes of one time namespace share.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every kernel has CLOCK_MONOTONIC");
    // 64 bits of nanoseconds since boot overflow after 584 years.
    Duration::from(now).as_nanos() as u64
}

/// The time stamp counter of the CPU that this runs on, in ticks; other instructions may move across the reading.
pub fn tsc() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC; it touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The 16 bytes of the UUID that the kernel drew when it booted.
///
/// # Errors
/// Those of reading `/proc/sys/kernel/random/boot_id`; `InvalidData` if no UUID is in there.
pub fn boot_id() -> io::Result<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    parse_uuid(text.trim_end())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "boot_id is no UUID"))
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let mut digits = text.chars().filter(|char| *char != '-').map(|char| char.to_digit(16));
    let mut bytes = [0; 16];
    for byte in &mut bytes {
        let (high, low) = (digits.next()??, digits.next()??);
        *byte = (high << 4 | low) as u8;
    }
    digits.next().is_none().then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_advance() {
        let (ns, ticks) = (monotonic_ns(), tsc());
        std::thread::sleep(Duration::from_millis(2));
        assert!(monotonic_ns() >= ns + 2_000_000);
        assert!(tsc() > ticks);
    }

    #[test]
    fn boot_id_stays() {
        let id = boot_id().unwrap();
        assert_ne!(id, [0; 16]);
        assert_eq!(id, boot_id().unwrap());
    }

    #[test]
    fn uuids() {
        assert_eq!(
            parse_uuid("00010203-0405-0607-0809-0a0B0c0dfFf0"),
            Some([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 0xff, 0xf0])
        );
        for bad in
            ["", "00", "00010203-0405-0607-0809-0a0b0c0dfff", "00010203-0405-0607-0809-0a0b0c0dfff0a", "é"]
        {
            assert_eq!(parse_uuid(bad), None, "{bad}");
        }
    }
}
