//! Times the steps of an update that are this crate's: pause, save, build anew, restore, run.
//!
//! `cargo run --release -p vmm-core --example machine_timing [ROUNDS [in-place]]`. First one machine is paused, saved
//! and run on, with `in-place` nothing else; then the calls that a machine is built of; then updates, where both machines
//! live in this process and map the same memfd, and the old one is dropped outside the measured time, as the process that
//! keeps it would do. Every vCPU is busy all the time. Times are in microseconds.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use oslib::clock::monotonic_ns;
use vm_memory::{Bytes, GuestAddress};
use vmm_core::boot::{self, BootRequest, KernelImage};
use vmm_core::kvm::{self, Capabilities, Vm};
use vmm_core::machine::{Machine, MachineConfig};
use vmm_core::memory::{Backend, BackendConfig, BackendKind, GuestRam};
use vmm_core::output::OutputSink;
use vmm_core::payload::{self, GuestWords, Header, Mailbox};
use vmm_core::state::MachineState;
use vmm_core::vcpu::RunObserver;

type Error = Box<dyn std::error::Error>;

const DEADLINE: Duration = Duration::from_secs(1);

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

impl OutputSink for Nowhere {
    fn write(&mut self, _bytes: &[u8]) {}
}

/// When the vCPUs stood still, and when they ran again.
#[derive(Default)]
struct Stamps {
    first_exit: AtomicU64,
    last_exit: AtomicU64,
    last_run: AtomicU64,
    runs: AtomicUsize,
}

impl Stamps {
    fn reset(&self) {
        self.first_exit.store(u64::MAX, Ordering::SeqCst);
        self.last_exit.store(0, Ordering::SeqCst);
        self.last_run.store(0, Ordering::SeqCst);
        self.runs.store(0, Ordering::SeqCst);
    }

    /// Waits until all of `vcpus` have entered the guest, which they do a moment after `run` has told them to; returns
    /// when the last one did.
    fn wait_last_run(&self, vcpus: usize) -> u64 {
        while self.runs.load(Ordering::SeqCst) < vcpus {
            std::thread::sleep(Duration::from_micros(200));
        }
        self.last_run.load(Ordering::SeqCst)
    }
}

impl RunObserver for Stamps {
    fn first_run(&self, _vcpu: usize) {
        self.last_run.fetch_max(monotonic_ns(), Ordering::SeqCst);
        self.runs.fetch_add(1, Ordering::SeqCst);
    }

    fn last_exit(&self, _vcpu: usize) {
        let now = monotonic_ns();
        self.first_exit.fetch_min(now, Ordering::SeqCst);
        self.last_exit.fetch_max(now, Ordering::SeqCst);
    }
}

fn main() -> Result<(), Error> {
    let rounds: usize = std::env::args().nth(1).map_or(Ok(40), |n| n.parse())?;
    in_place(rounds)?;
    if std::env::args().nth(2).is_some_and(|arg| arg == "in-place") {
        return Ok(());
    }
    println!();
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
    Ok(Machine::new(MachineConfig { ram, vcpus, serial: Box::new(Nowhere), observer, pci: None })?)
}

/// Builds a target while the source runs. It is told the CPUID as well, which does not change while a guest lives.
fn built_ahead(source: &Machine, backend: &Backend, stamps: &Arc<Stamps>) -> Result<Machine, Error> {
    let target = machine(backend, source.vcpu_count(), stamps)?;
    target.ready()?;
    target.preset_cpuid(&source.cpuid().unwrap_or_default())?;
    Ok(target)
}

/// Makes a machine whose vCPUs are all in the payload's beat loop; also returns the way to its mailboxes.
fn beating(backend: &Backend, vcpus: usize, stamps: &Arc<Stamps>) -> Result<(Machine, Ram), Error> {
    let machine = machine(backend, vcpus, stamps)?;
    let kernel = KernelImage::BuiltIn { name: "payload", bytes: payload::ELF };
    let cmdline = format!("cpus={vcpus}");
    let request = BootRequest { kernel, initrd: None, cmdline: &cmdline, vcpus, pci: false };
    let entry = boot::load(machine.ram().memory(), &request)?;
    machine.set_entry(&|regs, sregs| entry.apply(regs, sregs))?;
    machine.run()?;
    let ram = Ram(GuestRam::map(backend)?);
    while Header::new(&ram).started() < vcpus as u64 {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok((machine, ram))
}

/// A machine whose vCPUs all beat, and what is known of it.
struct Beating {
    machine: Machine,
    ram: Ram,
    stamps: Arc<Stamps>,
}

const IN_PLACE: [&str; 7] = [
    "pause",
    "first exit to last exit",
    "save",
    "rest",
    "recall",
    "run to last entry",
    "first exit to last entry",
];

/// Times pause, save and run of one machine at a time, with 1 to 8 vCPUs in turns so that all see the same noise. In
/// every other round the vCPUs' threads go to rest and come back, which the last line leaves out.
fn in_place(rounds: usize) -> Result<(), Error> {
    const COUNTS: [usize; 4] = [1, 2, 4, 8];
    let backends = COUNTS.map(|_| backend(64 << 20));
    let mut machines = Vec::new();
    for (vcpus, backend) in COUNTS.into_iter().zip(backends) {
        let stamps = Arc::new(Stamps::default());
        let (machine, ram) = beating(&backend?, vcpus, &stamps)?;
        machine.pause(DEADLINE)?;
        machines.push(Beating { machine, ram, stamps });
    }
    let mut columns = vec![vec![Vec::new(); IN_PLACE.len()]; COUNTS.len()];
    for round in 0..rounds {
        for (beating, column) in machines.iter().zip(&mut columns) {
            for (samples, value) in column.iter_mut().zip(beating.pause_save_run(round % 2 == 1)?) {
                samples.extend(value);
            }
        }
    }
    println!("one machine in place, us: median (best, worst) of {rounds} rounds");
    println!("{:>24} {:>20} {:>20} {:>20} {:>20}", "vCPUs", 1, 2, 4, 8);
    for (nth, name) in IN_PLACE.iter().enumerate() {
        print!("{name:>24}");
        for column in &mut columns {
            let samples = &mut column[nth];
            let median = median(samples);
            let (best, worst) = (samples[0], samples[samples.len() - 1]);
            print!(" {:>20}", format!("{median:.0} ({best:.0}, {worst:.0})"));
        }
        println!();
    }
    Ok(())
}

impl Beating {
    /// Lets all vCPUs beat, and then times what [`IN_PLACE`] names.
    fn pause_save_run(&self, resting: bool) -> Result<[Option<f64>; IN_PLACE.len()], Error> {
        let Self { machine, ram, stamps } = self;
        let vcpus = machine.vcpu_count();
        let boxes: Vec<_> = (0..vcpus as u32).map(|vcpu| Mailbox::new(ram, vcpu)).collect();
        let before: Vec<u64> = boxes.iter().map(Mailbox::beats).collect();
        machine.run()?;
        while boxes.iter().zip(&before).any(|(mailbox, before)| mailbox.beats() == *before) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(10));
        stamps.reset();
        let began = Instant::now();
        machine.pause(DEADLINE)?;
        let pause = us(began);
        let saving = Instant::now();
        machine.save()?;
        let save = us(saving);
        let (mut rest, mut recall) = (None, None);
        if resting {
            let going = Instant::now();
            machine.rest_threads()?;
            rest = Some(us(going));
            let recalling = Instant::now();
            machine.recall_threads()?;
            machine.thread_ids()?;
            recall = Some(us(recalling));
        }
        let exits = [&stamps.first_exit, &stamps.last_exit].map(|ns| ns.load(Ordering::SeqCst));
        let told = monotonic_ns();
        machine.run()?;
        let last_run = stamps.wait_last_run(vcpus);
        machine.pause(DEADLINE)?;
        let us_between = |from: u64, to: u64| Some((to - from) as f64 / 1e3);
        let standstill = if resting { None } else { us_between(exits[0], last_run) };
        Ok([
            Some(pause),
            us_between(exits[0], exits[1]),
            Some(save),
            rest,
            recall,
            us_between(told, last_run),
            standstill,
        ])
    }
}

fn cycle(vcpus: usize, size: u64, rounds: usize, build_ahead: bool) -> Result<(), Error> {
    let backend = backend(size)?;
    let stamps = Arc::new(Stamps::default());
    let (mut old, ram) = beating(&backend, vcpus, &stamps)?;

    let mut columns: [Vec<f64>; 9] = Default::default();
    let mut bytes = 0;
    for _ in 0..rounds {
        std::thread::sleep(Duration::from_millis(10));
        let mailbox = Mailbox::new(&ram, 0);
        let reset = mailbox.request_gap_reset();
        while !mailbox.gap_was_reset(reset) {
            std::thread::sleep(Duration::from_micros(200));
        }
        stamps.reset();
        let ahead = build_ahead.then(|| built_ahead(&old, &backend, &stamps)).transpose()?;
        let mut row = Vec::new();
        let mut lap = Instant::now();
        let mut step = || {
            row.push(us(lap));
            lap = Instant::now();
        };
        old.pause(DEADLINE)?;
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
        let gap = stamps.wait_last_run(vcpus) - stamps.last_exit.load(Ordering::SeqCst);
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
