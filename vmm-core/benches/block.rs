//! What a request of the disk costs: 4 KiB at random places of a file in the page cache, 16 at a time, from the kick to the
//! answer, with io_uring and in the calling thread.

#[path = "../tests/block_guest/mod.rs"]
mod block_guest;

use block_guest::{Guest, disk, image_file};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vmm_core::virtio::block::Aio;

const BLOCKS: u64 = 4096;
const BLOCK: usize = 4096;
const DEPTH: u64 = 16;

fn random_access(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("block_4k_random");
    group.throughput(Throughput::Elements(DEPTH));
    let file = image_file(BLOCKS * BLOCK as u64);
    for (way, aio) in [("io_uring", Aio::IoUring), ("caller", Aio::Threads)] {
        for (kind, request, out, room) in
            [("read", VIRTIO_BLK_T_IN, 0, BLOCK), ("write", VIRTIO_BLK_T_OUT, BLOCK, 0)]
        {
            let mut guest = Guest::new(disk(file.path(), 1, aio));
            if matches!(aio, Aio::IoUring) && !guest.block.uses_io_uring() {
                eprintln!("SKIPPED: no io_uring here");
                continue;
            }
            let (data, mut place) = (vec![1; out], 1_u64);
            group.bench_function(format!("{kind}/{way}"), |bencher| {
                bencher.iter(|| {
                    for _ in 0..DEPTH {
                        // Each block once before any comes again: the number is odd.
                        place = place.wrapping_add(2_654_435_761) % BLOCKS;
                        guest.ask(0, request, place * 8, &data, room);
                    }
                    assert_eq!(guest.finish().len() as u64, DEPTH);
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, random_access);
criterion_main!(benches);
