//! What the core itself adds to the time in which the guest stands still: the registry, the state frame, the notifier.

use std::fs::File;
use std::hint::black_box;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter};
use cpr_core::{
    Attempt, CprMode, FdEntry, FdKind, FdPolicy, FdRegistry, GuestActivity, HandOver, Host, MemoryRegion,
    ModeId, ModeSet, OrderClass, Outcome, Prepared, Properties, Services, StateWriter, Step, TerminalAction,
    Update,
};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Bytes of a vCPU's section: registers, 4 KiB of XSAVE, local APIC, a few hundred MSRs.
const VCPU_BYTES: usize = 12 << 10;

/// `count` entries, all of the same descriptor. The name is the prefix of an interrupt's, of which there are most.
fn registry_of(count: u64) -> (FdRegistry, Arc<File>) {
    let registry = FdRegistry::default();
    let fd = Arc::new(File::open("/dev/null").unwrap());
    for id in 0..count {
        registry.save("virtio0/call", id, FdKind::EventFd, FdPolicy::MustSurvive, &fd).unwrap();
    }
    (registry, fd)
}

fn registry(criterion: &mut Criterion) {
    // Decoding gives every entry a descriptor of its own.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();

    let mut group = criterion.benchmark_group("registry");
    for count in [10, 1_000, 10_000] {
        let (registry, fd) = registry_of(count);
        group.throughput(Throughput::Elements(count));
        group.bench_function(BenchmarkId::new("walk", count), |bencher| {
            let visit = |entry: &FdEntry, fd: BorrowedFd<'_>| {
                black_box((entry, fd));
                Ok::<_, ()>(())
            };
            bencher.iter(|| registry.walk_fd(visit));
        });
        group.bench_function(BenchmarkId::new("encode", count), |bencher| {
            bencher.iter(|| registry.encode(|entry, _| Ok::<_, ()>(entry.id)).unwrap());
        });
        if count + 64 > most {
            eprintln!("registry/decode/{count} left out: at most {most} descriptors are allowed");
            continue;
        }
        let mut frame = FrameWriter::default();
        frame.put("registry", 0, 1, registry.encode(|entry, _| Ok::<_, ()>(entry.id)).unwrap()).unwrap();
        let section = Frame::parse(&frame.finish(1)).unwrap().require("registry", 0).unwrap();
        // One dup(2) for each entry included.
        group.bench_function(BenchmarkId::new("decode", count), |bencher| {
            let open = || FdRegistry::decode(&section, |_, _| Ok(fd.try_clone()?.into())).unwrap();
            bencher.iter_batched(|| (), |()| open(), BatchSize::PerIteration);
        });
    }
    group.finish();
}

fn vcpu_frame(vcpus: u32) -> FrameWriter {
    let mut frame = FrameWriter::default();
    for vcpu in 0..vcpus {
        let body = (0..VCPU_BYTES).map(|at| (at * 7) as u8).collect();
        frame.put("vcpu", vcpu, 1, body).unwrap();
    }
    frame
}

fn frame(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frame");
    for vcpus in [1, 8, 64] {
        group.throughput(Throughput::Bytes(u64::from(vcpus) * VCPU_BYTES as u64));
        group.bench_function(BenchmarkId::new("encode", vcpus), |bencher| {
            let setup = || vcpu_frame(vcpus);
            bencher.iter_batched(setup, |frame| frame.finish(1), BatchSize::SmallInput);
        });
        let bytes = vcpu_frame(vcpus).finish(1);
        group.bench_function(BenchmarkId::new("decode", vcpus), |bencher| {
            bencher.iter(|| Frame::parse(&bytes).unwrap());
        });
    }
    group.finish();
}

/// A mode and a host that do nothing, so that what is left of an update is who is told of it.
struct Nothing;

impl CprMode for Nothing {
    fn id(&self) -> ModeId {
        ModeId::from_static("nothing")
    }

    fn properties(&self) -> Properties {
        Properties::RAM_IN_PLACE
    }

    fn check(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    fn prepare(&mut self, _: &Attempt<'_>) -> Result<Prepared, BoxError> {
        Ok(Prepared::Ready)
    }

    fn hand_over(&mut self, _: &Attempt<'_>, _: StateWriter) -> Result<HandOver, BoxError> {
        Ok(HandOver::Complete)
    }

    fn roll_back(&mut self, _: &Attempt<'_>) {}
}

impl Host for Nothing {
    fn memory(&self) -> Vec<MemoryRegion> {
        Vec::new()
    }

    fn stop(&mut self, _: Instant) -> Result<GuestActivity, BoxError> {
        Ok(GuestActivity::Running)
    }

    fn resume(&mut self, _: GuestActivity) -> Result<(), BoxError> {
        Ok(())
    }

    fn save(&mut self, _: &mut FrameWriter) -> Result<(), BoxError> {
        Ok(())
    }

    fn load(&mut self, _: &mut Frame) -> Result<(), BoxError> {
        Ok(())
    }

    fn request_terminal(&mut self, _: TerminalAction) {}
}

/// A source's whole update from `Prepare` to `HandOver`: three events for each subscriber.
fn notifier(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("notifier");
    for count in [1, 10, 100, 1_000] {
        let services = Services::default();
        let modes = ModeSet::having(Properties::RAM_IN_PLACE);
        let subscribe = |_| {
            services.notifier.subscribe("device", modes.clone(), OrderClass::NORMAL, |notice| {
                black_box(notice);
                Ok(())
            })
        };
        let _subscriptions: Vec<_> = (0..count).map(subscribe).collect();
        group.throughput(Throughput::Elements(3 * count));
        group.bench_function(BenchmarkId::new("fan-out", count), |bencher| {
            let begin = || Update::begin(&services, Box::new(Nothing), &Nothing).unwrap();
            let run = |mut update: Update| {
                let outcome = loop {
                    if let Step::Finished(outcome) = update.step(&mut Nothing) {
                        break outcome;
                    }
                };
                assert!(matches!(outcome, Outcome::HandedOver));
                update
            };
            bencher.iter_batched(begin, run, BatchSize::PerIteration);
        });
    }
    group.finish();
}

criterion_group!(benches, registry, frame, notifier);
criterion_main!(benches);
