//! Blocks written to a disk or a file one by one, each with fsync, so that it can be told from outside which of them must
//! be there. What they hold and where they go is [`testkit::blocks`]' affair, which compares the image afterwards.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use testkit::blocks::{self, BLOCK_BYTES};

use crate::{is_enough, monotonic_ns};

/// Writes blocks 1, 2, ... round and round over the first `count` of `path`, and reads now and then an older one back.
/// False if that is not what was written.
pub(crate) fn watch_disk(path: &Path, seconds: u32, count: u64) -> io::Result<bool> {
    println!("agent: disk begin seconds={seconds} blocks={count}");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    let end = monotonic_ns() + i64::from(seconds) * 1_000_000_000;
    let (mut last, mut wrong, mut longest) = (0, 0_u64, 0);
    while monotonic_ns() < end && !is_enough() {
        let before = monotonic_ns();
        last += 1;
        file.write_all_at(&blocks::content(last), blocks::place(last, count) * BLOCK_BYTES)?;
        file.sync_data()?;
        longest = longest.max(monotonic_ns() - before);
        wrong += u64::from(!is_there(&file, last - (last / 2) % count.min(last), count)?);
    }
    file.sync_all()?;
    println!(
        "agent: disk {} last={last} wrong={wrong} longest_us={} enough={}",
        if wrong == 0 { "ok" } else { "bad" },
        longest / 1000,
        u8::from(is_enough()),
    );
    Ok(wrong == 0)
}

/// Whether the block `number` is what stands at its place on the disk.
fn is_there(file: &File, number: u64, count: u64) -> io::Result<bool> {
    // What was synced is dropped from the page cache, so that the device is asked.
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    let mut found = [0; BLOCK_BYTES as usize];
    file.read_exact_at(&mut found, blocks::place(number, count) * BLOCK_BYTES)?;
    Ok(found == blocks::content(number))
}
