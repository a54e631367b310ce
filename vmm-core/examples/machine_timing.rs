//! Times the steps of an update that are this crate's: pause, save, build anew, restore, run.
//!
//! `cargo run --release -p vmm-core --example machine_timing [ROUNDS]`. Both machines live in this process and map the
//! same memfd; the old one is dropped outside the measured time, as the process that keeps it would do. Times are
//! medians in microseconds; `sum` is from the last exit to the first entry.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use oslib::clock::monotonic_ns;
use vm_memory::{Bytes, GuestAddress};
use vmm_core::boot::{self, BootRequest, KernelImage};
use vmm_core::kvm::{self, Capabilities, Vm};
use vmm_core::machine::{Machine, MachineConfig};
use vmm_core::memory::{Backend, BackendConfig, BackendKind, GuestRam};
use vmm_core::payload::{self, GuestWords, Header, Mailbox};
use vmm_core::serial::SerialSink;
use vmm_core::state::MachineState;
use vmm_core::vcpu::RunObserver;

type Error = Box<dyn std::error::Error>;

/// The payload's way to its mailboxes.
struct Ram(GuestRam);

impl GuestWords for Ram {
    fn read_u64(&self, gpa: u64) -> u64 {
        self.0.memory().load(GuestAddress(gpa), Ordering::Relaxed).expect("mailboxes lie in RAM")
    }

    fn write_u64(&self, gpa: u64, value: u64) {
        self.0.memory().store(value, GuestAddress(gpa), Ordering::Relaxed).expect("mailboxes lie in RAM");
    }
}

struct Nowhere;

impl SerialSink for Nowhere {
    fn write(&mut self, _bytes: &[u8]) {}
}

/// From the last vCPU's last exit to the last vCPU's first entry.
#[derive(Default)]
struct Stamps {
    last_exit: AtomicU64,
    first_run: AtomicU64,
    first_runs: AtomicUsize,
}

impl RunObserver for Stamps {
    fn first_run(&self, _vcpu: usize) {
        self.first_run.fetch_max(monotonic_ns(), Ordering::Relaxed);
        self.first_runs.fetch_add(1, Ordering::SeqCst);
    }

    fn last_exit(&self, _vcpu: usize) {
        self.last_exit.fetch_max(monotonic_ns(), Ordering::Relaxed);
    }
}

fn main() -> Result<(), Error> {
    let rounds: usize = std::env::args().nth(1).map_or(Ok(40), |n| n.parse())?;
    building_blocks(rounds)?;
    for build_ahead in [false, true] {
        println!();
        println!(
            "median of {rounds} updates, us; the target is built {}",
            if build_ahead { "while the source runs" } else { "after the state is saved" }
        );
        println!(
            "{:>5} {:>6} | {:^31} | {:^23} | {:^23} | {:^23} |",
            "", "", "state", "machine", "last exit to first run", "gap that vCPU 0 saw"
        );
        println!(
            "{:>5} {:>6} | {:>7} {:>7} {:>7} {:>7} | {:>7} {:>7} {:>7} | {:>7} {:>7} {:>7} | {:>7} {:>7} {:>7} | {:>6}",
            "vcpus",
            "MiB",
            "pause",
            "save",
            "encode",
            "decode",
            "new",
            "restore",
            "run",
            "median",
            "best",
            "worst",
            "median",
            "best",
            "worst",
            "bytes"
        );
        for (vcpus, mib) in
            [(1, 256), (1, 1024), (1, 4096), (1, 8192), (2, 256), (2, 8192), (4, 256), (8, 256), (8, 8192)]
        {
            cycle(vcpus, mib << 20, rounds, build_ahead)?;
        }
    }
    Ok(())
}

fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

fn us(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e6
}

fn backend(size: u64) -> Result<Backend, Error> {
    let kind = BackendKind::Memfd { share: true, hugetlb: None };
    Ok(Backend::create(BackendConfig { id: "ram0".to_owned(), size, kind })?)
}

/// Times the calls that `Machine::new` is made of, one after the other.
fn building_blocks(rounds: usize) -> Result<(), Error> {
    const NAMES: [&str; 8] =
        ["open", "probe", "VM", "RAM mmap", "RAM slots", "irqchip", "PIT", "8 vCPUs, one thread"];
    println!("building blocks, us: median (best) of {rounds} rounds");
    println!("{:>20} {:>15} {:>15} {:>15} {:>15}", "RAM in MiB", 256, 1024, 4096, 8192);
    let mut table = vec![String::new(); NAMES.len()];
    for mib in [256, 1024, 4096, 8192] {
        let backend = backend(mib << 20)?;
        let mut samples = vec![Vec::new(); NAMES.len()];
        for _ in 0..rounds {
            let mut nth = 0;
            let mut lap = Instant::now();
            let mut step = || {
                samples[nth].push(us(lap));
                nth += 1;
                lap = Instant::now();
            };
            let kvm = kvm::open()?;
            step();
            Capabilities::probe(&kvm)?;
            step();
            let vm = Arc::new(Vm::create(&kvm)?);
            step();
            let ram = GuestRam::map(&backend)?;
            step();
            vm.map_ram(&ram)?;
            step();
            vm.create_irqchip()?;
            step();
            vm.create_pit()?;
            step();
            let vcpus = (0..8).map(|id| vm.create_vcpu(id)).collect::<Result<Vec<_>, _>>()?;
            step();
            drop(vcpus);
        }
        for (line, samples) in table.iter_mut().zip(&mut samples) {
            let median = median(samples);
            *line += &format!(" {:>15}", format!("{median:.0} ({:.0})", samples[0]));
        }
    }
    for (name, line) in NAMES.iter().zip(table) {
        println!("{name:>20}{line}");
    }
    Ok(())
}

fn machine(backend: &Backend, vcpus: usize, stamps: &Arc<Stamps>) -> Result<Machine, Error> {
    let observer = Arc::clone(stamps) as Arc<dyn RunObserver>;
    let ram = GuestRam::map(backend)?;
    Ok(Machine::new(MachineConfig { ram, vcpus, serial: Box::new(Nowhere), observer })?)
}

/// Builds a target while the source runs. It is told the CPUID as well, which does not change while a guest lives.
fn built_ahead(source: &Machine, backend: &Backend, stamps: &Arc<Stamps>) -> Result<Machine, Error> {
    let target = machine(backend, source.vcpu_count(), stamps)?;
    target.ready()?;
    target.preset_cpuid(&source.cpuid().unwrap_or_default())?;
    Ok(target)
}

fn cycle(vcpus: usize, size: u64, rounds: usize, build_ahead: bool) -> Result<(), Error> {
    let backend = backend(size)?;
    let stamps = Arc::new(Stamps::default());
    let mut old = machine(&backend, vcpus, &stamps)?;
    let kernel = KernelImage::BuiltIn { name: "payload", bytes: payload::ELF };
    let cmdline = format!("cpus={vcpus}");
    let request = BootRequest { kernel, initrd: None, cmdline: &cmdline, vcpus };
    let entry = boot::load(old.ram().memory(), &request)?;
    old.set_entry(&|regs, sregs| entry.apply(regs, sregs))?;
    old.run()?;
    let ram = Ram(GuestRam::map(&backend)?);
    while Header::new(&ram).started() < vcpus as u64 {
        std::thread::sleep(Duration::from_millis(10));
    }

    let mut columns: [Vec<f64>; 9] = Default::default();
    let mut bytes = 0;
    for _ in 0..rounds {
        std::thread::sleep(Duration::from_millis(10));
        let mailbox = Mailbox::new(&ram, 0);
        let reset = mailbox.request_gap_reset();
        while !mailbox.gap_was_reset(reset) {
            std::thread::sleep(Duration::from_micros(200));
        }
        stamps.first_run.store(0, Ordering::Relaxed);
        stamps.first_runs.store(0, Ordering::SeqCst);
        stamps.last_exit.store(0, Ordering::Relaxed);
        let ahead = build_ahead.then(|| built_ahead(&old, &backend, &stamps)).transpose()?;
        let mut row = Vec::new();
        let mut lap = Instant::now();
        let mut step = || {
            row.push(us(lap));
            lap = Instant::now();
        };
        old.pause(Duration::from_secs(1))?;
        step();
        let state = old.save()?;
        step();
        let wire = postcard::to_allocvec(&state)?;
        step();
        let new = match ahead {
            Some(new) => new,
            None => machine(&backend, vcpus, &stamps)?,
        };
        step();
        let state: MachineState = postcard::from_bytes(&wire)?;
        step();
        new.restore(&state)?;
        step();
        new.run()?;
        step();
        bytes = wire.len();
        // The vCPUs enter the guest a moment after `run` has told them to.
        while stamps.first_runs.load(Ordering::SeqCst) < vcpus {
            std::thread::sleep(Duration::from_micros(200));
        }
        let gap = stamps.first_run.load(Ordering::Relaxed) - stamps.last_exit.load(Ordering::Relaxed);
        row.push(gap as f64 / 1e3);
        let beats = mailbox.beats();
        while mailbox.beats() == beats {
            std::thread::sleep(Duration::from_micros(200));
        }
        row.push(mailbox.max_gap_tsc() as f64 * 1e3 / f64::from(state.vcpus[0].tsc_khz));
        // Printed in another order than measured: building apart from the state's way.
        for (column, nth) in columns.iter_mut().zip([0, 1, 2, 4, 3, 5, 6, 7, 8]) {
            column.push(row[nth]);
        }
        old = new;
    }
    let m: Vec<f64> = columns.iter_mut().map(|column| median(column)).collect();
    print!("{vcpus:>5} {:>6} |", size >> 20);
    for (nth, value) in m[..7].iter().enumerate() {
        print!(" {value:>7.0}{}", if nth == 3 || nth == 6 { " |" } else { "" });
    }
    for (value, sorted) in m.iter().zip(&columns).skip(7) {
        print!(" {value:>7.0} {:>7.0} {:>7.0} |", sorted[0], sorted[rounds - 1]);
    }
    println!(" {bytes:>6}");
    Ok(())
}
