//! Numbered blocks that are written round and round over a disk or a file: whoever knows the number of the last one that
//! was acknowledged knows every byte that must be there. The agent in the guest writes them, a test compares the image.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, ensure};

/// Size of a block.
pub const BLOCK_BYTES: u64 = 4096;

/// Where the block `number` goes, counted in blocks, if there is room for `count`. Neighbours in time are none in place,
/// so that the device cannot join them.
pub fn place(number: u64, count: u64) -> u64 {
    // A prime, so that every place has its turn unless `count` is a multiple of it.
    number.wrapping_mul(7919) % count
}

/// What it holds: its number first, then what follows from that.
pub fn content(number: u64) -> [u8; BLOCK_BYTES as usize] {
    let mut block = [0; BLOCK_BYTES as usize];
    for (at, word) in (0_u64..).zip(block.chunks_exact_mut(8)) {
        let value = if at == 0 { number } else { (number ^ at << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15) };
        word.copy_from_slice(&value.to_le_bytes());
    }
    block
}

/// Checks that the first `count` blocks of `image` hold what writing the blocks 1 to `last` leaves there.
///
/// # Errors
/// It cannot be read, or a write was lost, repeated, or went wrong; the error says at which block.
pub fn verify(image: &Path, count: u64, last: u64) -> anyhow::Result<()> {
    let file = File::open(image).with_context(|| format!("cannot open {}", image.display()))?;
    for number in (1..=last).rev().take(usize::try_from(count)?) {
        let place = place(number, count);
        let found = read(&file, place).with_context(|| format!("block {place} of {}", image.display()))?;
        let there = u64::from_le_bytes(found[..8].try_into()?);
        ensure!(
            there >= number,
            "a write was lost, or an older one repeated: block {place} holds {there}, not {number}"
        );
        ensure!(
            there == number,
            "block {place} holds {there}, which nobody has told of: {number} was the last one"
        );
        ensure!(
            found == content(number),
            "block {place} is damaged: its number {number} is right, the rest is not"
        );
    }
    Ok(())
}

fn read(file: &File, place: u64) -> io::Result<[u8; BLOCK_BYTES as usize]> {
    let mut block = [0; BLOCK_BYTES as usize];
    file.read_exact_at(&mut block, place * BLOCK_BYTES)?;
    Ok(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNT: u64 = 16;

    fn image(last: u64) -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(COUNT * BLOCK_BYTES).unwrap();
        (1..=last).for_each(|number| write(&image, number, &content(number)));
        image
    }

    fn write(image: &tempfile::NamedTempFile, number: u64, bytes: &[u8]) {
        image.as_file().write_all_at(bytes, place(number, COUNT) * BLOCK_BYTES).unwrap();
    }

    fn complaint(image: &tempfile::NamedTempFile, last: u64) -> String {
        verify(image.path(), COUNT, last).unwrap_err().to_string()
    }

    #[test]
    fn every_place_has_its_turn() {
        let mut places: Vec<u64> = (1..=COUNT).map(|number| place(number, COUNT)).collect();
        places.sort_unstable();
        assert_eq!(places, (0..COUNT).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_lost_repeated_or_damaged_is_found() {
        for last in [0, 5, COUNT, 3 * COUNT + 7] {
            verify(image(last).path(), COUNT, last).unwrap();
        }
        let lost = image(40);
        assert!(complaint(&lost, 41).contains("a write was lost"));
        write(&lost, 30, &content(30 - COUNT));
        assert!(complaint(&lost, 40).contains("holds 14, not 30"));
        assert!(complaint(&image(40), 39).contains("which nobody has told of"));
        let damaged = image(40);
        let mut bytes = content(33);
        bytes[4000] ^= 1;
        write(&damaged, 33, &bytes);
        assert!(complaint(&damaged, 40).contains("is damaged"));
    }
}
