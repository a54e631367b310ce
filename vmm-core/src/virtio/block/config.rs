//! Configuration space: `struct virtio_blk_config`, virtio 1.2, 5.2.4. Everything is little-endian.

use super::request::MAX_REQUEST_LEN;
use crate::block::SECTOR_LEN;

/// Bytes up to the end of what belongs to `VIRTIO_BLK_F_WRITE_ZEROES`.
const LEN: usize = 60;
/// Where `writeback` stands, the only field that a driver writes.
pub(super) const WRITEBACK: usize = 32;
/// The most sectors of one discard or write-zeroes request.
pub(super) const MAX_RANGE_SECTORS: u32 = (MAX_REQUEST_LEN / SECTOR_LEN) as u32;

/// What configuration space tells of.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConfigSpace {
    pub(super) sectors: u64,
    pub(super) queues: u16,
    pub(super) queue_size: u16,
    pub(super) writeback: bool,
}

impl ConfigSpace {
    /// Header and status are two descriptors of a request; the rest can be data. As QEMU's `seg-max-adjust`.
    fn max_segments(self) -> u32 {
        u32::from(self.queue_size) - 2
    }

    fn bytes(self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.sectors.to_le_bytes());
        put(12, &self.max_segments().to_le_bytes());
        // blk_size. Then the topology: physical sectors are not larger, and nothing is better than one sector.
        put(20, &(SECTOR_LEN as u32).to_le_bytes());
        put(26, &1_u16.to_le_bytes());
        put(WRITEBACK, &[u8::from(self.writeback)]);
        put(34, &self.queues.to_le_bytes());
        // Discard: sectors, segments, alignment in sectors. Write zeroes: sectors, segments, whether room may be given up.
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &1_u32.to_le_bytes());
        put(44, &1_u32.to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &1_u32.to_le_bytes());
        put(56, &[1]);
        bytes
    }

    pub(super) fn read(self, offset: usize, data: &mut [u8]) {
        let bytes = self.bytes();
        for (at, byte) in data.iter_mut().enumerate() {
            *byte = offset.checked_add(at).and_then(|at| bytes.get(at)).copied().unwrap_or(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_of_any_place_and_length() {
        let space = ConfigSpace { sectors: 0x1122_3344_5566, queues: 4, queue_size: 256, writeback: true };
        let mut whole = [0xff; 70];
        space.read(0, &mut whole);
        assert_eq!(whole[..8], 0x1122_3344_5566_u64.to_le_bytes());
        assert_eq!(whole[12..16], 254_u32.to_le_bytes());
        assert_eq!((whole[32], whole[34]), (1, 4));
        assert_eq!(whole[60..], [0; 10]);
        for offset in 0..whole.len() {
            let mut two = [0xff; 2];
            space.read(offset, &mut two);
            assert_eq!(two, [whole[offset], whole.get(offset + 1).copied().unwrap_or(0)]);
        }
        let mut far = [0xff; 4];
        space.read(usize::MAX - 1, &mut far);
        assert_eq!(far, [0; 4]);
    }
}
