//! The smallest VMM that can run the payload: RAM, an irqchip, vCPU threads and a serial port that a test holds
//! the other end of. It exists so that a fault of the payload and a fault of our machine can be told apart.

use std::collections::VecDeque;
use std::io::Cursor;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_pit_config, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability, start_info::*};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_core::payload::{self, Command, GuestWords, Header, Mailbox, Outcome, Ticket};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

const START_INFO: u64 = 0x6000;
const MEMMAP: u64 = 0x7000;
const CMDLINE: u64 = 0x2_0000;

/// No wait in these tests lasts longer.
const PATIENCE: Duration = Duration::from_secs(20);

const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

/// What a VM is to look like.
pub(crate) struct Config<'a> {
    pub(crate) vcpus: u8,
    /// Address and size, bytes.
    pub(crate) ram: &'a [(u64, usize)],
    pub(crate) cmdline: &'a str,
    /// Whether anything answers at COM1.
    pub(crate) serial: bool,
}

impl Default for Config<'_> {
    fn default() -> Self {
        Self { vcpus: 1, ram: &[(0, 128 << 20)], cmdline: "", serial: true }
    }
}

#[derive(Default)]
struct Console {
    input: VecDeque<u8>,
    output: Vec<u8>,
    /// Accesses to other ports: port, bytes.
    others: Vec<(u16, Vec<u8>)>,
}

/// Guest RAM as the payload's mailbox wants it.
pub(crate) struct Ram(pub(crate) GuestMemoryMmap);

impl GuestWords for Ram {
    fn read_u64(&self, gpa: u64) -> u64 {
        self.0.load(GuestAddress(gpa), Ordering::Acquire).expect("read guest RAM")
    }

    fn write_u64(&self, gpa: u64, value: u64) {
        self.0.store(value, GuestAddress(gpa), Ordering::Release).expect("write guest RAM");
    }
}

/// A running VM. Dropping it stops it.
pub(crate) struct Vm {
    pub(crate) ram: Arc<Ram>,
    pub(crate) tsc_khz: u64,
    pub(crate) started_at: Instant,
    console: Arc<Mutex<Console>>,
    order: Arc<AtomicU8>,
    paused: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<()>>,
    /// One VM at a time: they would be in each other's way on a small machine.
    _turn: MutexGuard<'static, ()>,
}

impl Vm {
    /// Starts the payload, or says on stderr why it cannot be done here.
    pub(crate) fn start(config: &Config<'_>) -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                eprintln!("skipped: /dev/kvm cannot be opened: {error}");
                return None;
            }
        };
        extern "C" fn kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN(), kick).expect("install the kick handler");

        let ranges: Vec<_> = config.ram.iter().map(|&(start, size)| (GuestAddress(start), size)).collect();
        let ram = Arc::new(Ram(GuestMemoryMmap::from_ranges(&ranges).expect("map guest RAM")));
        let vm = kvm.create_vm().expect("KVM_CREATE_VM");
        add_memory(&vm, &ram.0);
        vm.set_tss_address(0xfffb_d000).expect("KVM_SET_TSS_ADDR");
        vm.create_irq_chip().expect("KVM_CREATE_IRQCHIP");
        vm.create_pit2(kvm_pit_config::default()).expect("KVM_CREATE_PIT2");
        let entry = load(&ram.0, config);

        let console = Arc::new(Mutex::new(Console::default()));
        let order = Arc::new(AtomicU8::new(RUN));
        let paused = Arc::new(AtomicUsize::new(0));
        let mut vcpus: Vec<_> = (0..config.vcpus).map(|id| create_vcpu(&kvm, &vm, id, entry)).collect();
        let tsc_khz = u64::from(vcpus[0].get_tsc_khz().expect("KVM_GET_TSC_KHZ"));
        let started_at = Instant::now();
        let threads = vcpus
            .drain(..)
            .map(|vcpu| {
                let (console, order, paused) = (console.clone(), order.clone(), paused.clone());
                let serial = config.serial;
                std::thread::spawn(move || run(vcpu, &console, &order, &paused, serial))
            })
            .collect();
        Some(Self { ram, tsc_khz, started_at, console, order, paused, threads, _turn: turn })
    }

    /// Starts the payload and waits until the boot vCPU beats.
    pub(crate) fn boot(config: &Config<'_>) -> Option<Self> {
        let vm = Self::start(config)?;
        vm.wait("the boot vCPU", || vm.header().is_ready());
        Some(vm)
    }

    pub(crate) fn header(&self) -> Header<'_, Ram> {
        Header::new(&*self.ram)
    }

    pub(crate) fn vcpu(&self, index: u32) -> Mailbox<'_, Ram> {
        Mailbox::new(&*self.ram, index)
    }

    /// What the guest has printed so far.
    pub(crate) fn output(&self) -> String {
        String::from_utf8_lossy(&self.console.lock().unwrap().output).into_owned()
    }

    /// What the guest did at ports other than COM1's.
    pub(crate) fn other_ports(&self) -> Vec<(u16, Vec<u8>)> {
        self.console.lock().unwrap().others.clone()
    }

    pub(crate) fn type_in(&self, text: &str) {
        self.console.lock().unwrap().input.extend(text.bytes());
    }

    /// Polls until `condition` holds; panics after [`PATIENCE`], naming `what`.
    pub(crate) fn wait(&self, what: &str, condition: impl Fn() -> bool) {
        let begin = Instant::now();
        while !condition() {
            assert!(
                begin.elapsed() < PATIENCE,
                "waited too long for {what}; state {:?}, fault {:x?}, output {:?}",
                self.vcpu(0).state(),
                [0x1a0, 0x1a8, 0x1b0, 0x1b8].map(|field| self.vcpu(0).read(field)),
                self.output()
            );
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    pub(crate) fn finish(&self, vcpu: u32, ticket: Ticket) -> Outcome {
        self.wait("a command", || self.vcpu(vcpu).outcome(ticket).is_some());
        self.vcpu(vcpu).outcome(ticket).unwrap()
    }

    pub(crate) fn command(&self, vcpu: u32, command: Command) -> Outcome {
        let ticket = self.vcpu(vcpu).submit(command);
        self.finish(vcpu, ticket)
    }

    pub(crate) fn reset_gap(&self, vcpu: u32) {
        let ticket = self.vcpu(vcpu).request_gap_reset();
        self.wait("a gap reset", || self.vcpu(vcpu).gap_was_reset(ticket));
    }

    /// Takes every vCPU out of the guest and keeps it out.
    pub(crate) fn pause(&self) {
        self.order.store(PAUSE, Ordering::Release);
        while self.paused.load(Ordering::Acquire) < self.threads.len() {
            self.kick();
        }
    }

    pub(crate) fn resume(&self) {
        self.order.store(RUN, Ordering::Release);
        self.wait("the vCPU threads", || self.paused.load(Ordering::Acquire) == 0);
    }

    fn kick(&self) {
        for thread in &self.threads {
            if !thread.is_finished() {
                let _ = thread.kill(SIGRTMIN());
            }
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.order.store(STOP, Ordering::Release);
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            self.kick();
        }
        for thread in self.threads.drain(..) {
            let result = thread.join();
            if !std::thread::panicking() {
                result.expect("a vCPU thread");
            }
        }
    }
}

fn add_memory(vm: &VmFd, ram: &GuestMemoryMmap) {
    for (slot, region) in (0..).zip(ram.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: ram.get_host_address(region.start_addr()).expect("RAM is mapped") as u64,
        };
        // SAFETY: the range is a whole mapping of `ram`. The vCPU threads, the only ones through which KVM gets at
        // it, are joined in `Vm::drop`, before the last `Arc` of `ram` goes; regions do not overlap.
        unsafe { vm.set_user_memory_region(region) }.expect("KVM_SET_USER_MEMORY_REGION");
    }
}

/// Loads the payload with its start info; returns the PVH entry point.
fn load(ram: &GuestMemoryMmap, config: &Config<'_>) -> u64 {
    let result = Elf::load(ram, None, &mut Cursor::new(payload::ELF), None).expect("load the payload");
    let PvhBootCapability::PvhEntryPresent(entry) = result.pvh_boot_cap else {
        panic!("the payload has no PVH entry: {:?}", result.pvh_boot_cap);
    };
    ram.write_slice(config.cmdline.as_bytes(), GuestAddress(CMDLINE)).unwrap();
    let mut memmap: Vec<_> = config
        .ram
        .iter()
        .map(|&(addr, size)| hvm_memmap_table_entry { addr, size: size as u64, type_: 1, reserved: 0 })
        .collect();
    memmap.push(hvm_memmap_table_entry { addr: 0xfec0_0000, size: 0x40_0000, type_: 2, reserved: 0 });
    for (i, &entry) in (0..).zip(&memmap) {
        ram.write_obj(entry, GuestAddress(MEMMAP + 24 * i)).unwrap();
    }
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: CMDLINE,
        memmap_paddr: MEMMAP,
        memmap_entries: memmap.len() as u32,
        ..Default::default()
    };
    ram.write_obj(info, GuestAddress(START_INFO)).unwrap();
    entry.raw_value()
}

/// A vCPU as the PVH boot protocol wants the first one; KVM leaves the others waiting for INIT and SIPI.
fn create_vcpu(kvm: &Kvm, vm: &VmFd, id: u8, entry: u64) -> VcpuFd {
    let vcpu = vm.create_vcpu(id.into()).expect("KVM_CREATE_VCPU");
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("KVM_GET_SUPPORTED_CPUID");
    for leaf in cpuid.as_mut_slice() {
        if leaf.function == 1 {
            leaf.ebx = leaf.ebx & 0x00ff_ffff | u32::from(id) << 24;
        }
    }
    vcpu.set_cpuid2(&cpuid).expect("KVM_SET_CPUID2");
    if id == 0 {
        let data = kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector: 16,
            type_: 3,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        let mut sregs = vcpu.get_sregs().expect("KVM_GET_SREGS");
        sregs.cs = kvm_segment { selector: 8, type_: 11, ..data };
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        sregs.cr0 = 0x11;
        vcpu.set_sregs(&sregs).expect("KVM_SET_SREGS");
        let regs = kvm_regs { rip: entry, rbx: START_INFO, rflags: 2, ..Default::default() };
        vcpu.set_regs(&regs).expect("KVM_SET_REGS");
    }
    vcpu
}

fn run(mut vcpu: VcpuFd, console: &Mutex<Console>, order: &AtomicU8, paused: &AtomicUsize, serial: bool) {
    loop {
        match order.load(Ordering::Acquire) {
            STOP => return,
            PAUSE => {
                paused.fetch_add(1, Ordering::AcqRel);
                while order.load(Ordering::Acquire) == PAUSE {
                    std::thread::sleep(Duration::from_micros(100));
                }
                paused.fetch_sub(1, Ordering::AcqRel);
                continue;
            }
            _ => {}
        }
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                let mut console = console.lock().unwrap();
                match port {
                    _ if !serial && (0x3f8..0x400).contains(&port) => data.fill(0xff),
                    0x3f8 => data[0] = console.input.pop_front().unwrap_or(0),
                    0x3fd => data[0] = 0x60 | u8::from(!console.input.is_empty()),
                    _ => {
                        // The port number, in each byte another one.
                        for (i, byte) in (0u8..).zip(data.iter_mut()) {
                            *byte = (port as u8).wrapping_add(i);
                        }
                    }
                }
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                let mut console = console.lock().unwrap();
                match port {
                    0x3f8 if serial => console.output.extend_from_slice(data),
                    0x3f8..0x400 => {}
                    _ => console.others.push((port, data.to_vec())),
                }
            }
            Ok(VcpuExit::MmioRead(_, data)) => data.fill(0xff),
            Ok(VcpuExit::MmioWrite(..) | VcpuExit::Hlt) => {}
            Ok(exit) => {
                let exit = format!("{exit:?}");
                panic!("{exit} at {:x?}", vcpu.get_regs());
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => panic!("KVM_RUN: {error}"),
        }
    }
}
