//! Tiny guests in machine code, and the machines to run them on.

use std::fs::File;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};
use vmm_core::machine::{Machine, MachineConfig};
use vmm_core::memory::{Backend, BackendConfig, BackendKind, GuestRam};
use vmm_core::output::OutputSink;
use vmm_core::vcpu::{NoObserver, RunObserver};

/// Where vCPU 0 starts, in flat 32-bit mode.
pub(crate) const ENTRY: u64 = 0x8000;
/// Where the other vCPUs start, in real mode: the vector of their SIPI is 1.
pub(crate) const AP_ENTRY: u64 = 0x1000;
/// Counters, one `u32` for each vCPU, kept in a register and stored.
pub(crate) const COUNTERS: u64 = 0x2000;
/// The echo guest reads its input only once this `u32` is not zero.
pub(crate) const MAY_READ: u64 = 0x2100;

/// Starts the other vCPUs, then counts in `esi`.
#[rustfmt::skip]
pub(crate) const COUNT: &[u8] = &[
    0xc7, 0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0x00, 0x00, //     mov dword [0xfee000f0], 0x1ff    LAPIC on
    0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x00, 0x45, 0x0c, 0x00, //     mov dword [0xfee00300], 0xc4500  INIT, others
    0xb9, 0x64, 0x00, 0x00, 0x00,                               //     mov ecx, 100
    0x49,                                                       // 1:  dec ecx
    0x75, 0xfd,                                                 //     jnz 1b
    0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x01, 0x46, 0x0c, 0x00, //     mov dword [0xfee00300], 0xc4601  SIPI, others
    0x31, 0xf6,                                                 //     xor esi, esi
    0x46,                                                       // 2:  inc esi
    0x89, 0x35, 0x00, 0x20, 0x00, 0x00,                         //     mov [0x2000], esi
    0xeb, 0xf7,                                                 //     jmp 2b
];

/// Counts in `esi`, into the counter that its APIC id says.
#[rustfmt::skip]
pub(crate) const AP_COUNT: &[u8] = &[
    0x66, 0xb8, 0x01, 0x00, 0x00, 0x00,                         //     mov eax, 1
    0x0f, 0xa2,                                                 //     cpuid
    0x66, 0xc1, 0xeb, 0x18,                                     //     shr ebx, 24
    0x66, 0xc1, 0xe3, 0x02,                                     //     shl ebx, 2
    0x66, 0x31, 0xf6,                                           //     xor esi, esi
    0x66, 0x46,                                                 // 1:  inc esi
    0x66, 0x89, 0xb7, 0x00, 0x20,                               //     mov [bx + 0x2000], esi
    0xeb, 0xf7,                                                 //     jmp 1b
];

/// Counts, and sends back what comes in on COM1 while it may read.
#[rustfmt::skip]
pub(crate) const ECHO: &[u8] = &[
    0x31, 0xf6,                                                 //     xor esi, esi
    0x46,                                                       // 1:  inc esi
    0x89, 0x35, 0x00, 0x20, 0x00, 0x00,                         //     mov [0x2000], esi
    0x66, 0xba, 0xfd, 0x03,                                     //     mov dx, 0x3fd
    0xec,                                                       //     in al, dx
    0xa8, 0x01,                                                 //     test al, 1
    0x74, 0xf0,                                                 //     jz 1b
    0x83, 0x3d, 0x00, 0x21, 0x00, 0x00, 0x00,                   //     cmp dword [0x2100], 0
    0x74, 0xe7,                                                 //     je 1b
    0x66, 0xba, 0xf8, 0x03,                                     //     mov dx, 0x3f8
    0xec,                                                       //     in al, dx
    0xee,                                                       //     out dx, al
    0xeb, 0xdf,                                                 //     jmp 1b
];

/// Writes 1 to port 0x602, the reset register, and halts.
#[rustfmt::skip]
pub(crate) const RESET: &[u8] = &[
    0x66, 0xba, 0x02, 0x06,                                     //     mov dx, 0x602
    0xb0, 0x01,                                                 //     mov al, 1
    0xee,                                                       //     out dx, al
    0xf4,                                                       // 1:  hlt
    0xeb, 0xfd,                                                 //     jmp 1b
];

/// Loads an empty IDT and runs into an undefined instruction: a triple fault.
#[rustfmt::skip]
pub(crate) const TRIPLE_FAULT: &[u8] = &[
    0x0f, 0x01, 0x1d, 0x00, 0x30, 0x00, 0x00,                   //     lidt [0x3000]
    0x0f, 0x0b,                                                 //     ud2
];

/// Tells whether this host has KVM at all. Tests that need it say so by name when it has not.
pub(crate) fn have_kvm(test: &str) -> bool {
    let have = std::path::Path::new("/dev/kvm").exists();
    if !have {
        eprintln!("SKIPPED {test}: no /dev/kvm");
    }
    have
}

/// Keeps what the guest writes.
#[derive(Clone, Default)]
pub(crate) struct Console(pub(crate) Arc<Mutex<Vec<u8>>>);

impl OutputSink for Console {
    fn write(&mut self, bytes: &[u8]) {
        self.0.lock().unwrap().extend_from_slice(bytes);
    }
}

impl Console {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

pub(crate) fn backend(size: u64) -> Backend {
    let kind = BackendKind::Memfd { share: true, hugetlb: None };
    Backend::create(BackendConfig { id: "ram0".to_owned(), size, kind }).unwrap()
}

/// Maps the same memory once more, as another process would.
pub(crate) fn adopt(backend: &Backend) -> Backend {
    let fd: Arc<File> = Arc::new(backend.fd().unwrap().try_clone().unwrap());
    Backend::adopt(backend.config().clone(), fd).unwrap()
}

pub(crate) fn machine(backend: &Backend, vcpus: usize) -> (Machine, Console) {
    observed(backend, vcpus, Arc::new(NoObserver))
}

pub(crate) fn observed(
    backend: &Backend,
    vcpus: usize,
    observer: Arc<dyn RunObserver>,
) -> (Machine, Console) {
    let console = Console::default();
    let ram = GuestRam::map(backend).unwrap();
    let serial = Box::new(console.clone());
    (Machine::new(MachineConfig { ram, vcpus, serial, observer, pci: None }).unwrap(), console)
}

/// Starts at [`ENTRY`] in flat 32-bit mode without paging.
pub(crate) fn flat(regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 8,
        type_: 11,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 16, type_: 3, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr0 |= 1;
    regs.rip = ENTRY;
    regs.rflags = 2;
}

/// Makes a machine that runs `code`.
pub(crate) fn start(backend: &Backend, vcpus: usize, code: &[u8]) -> (Machine, Console) {
    let (machine, console) = machine(backend, vcpus);
    load(&machine, code);
    machine.set_entry(&flat).unwrap();
    machine.run().unwrap();
    (machine, console)
}

pub(crate) fn load(machine: &Machine, code: &[u8]) {
    let ram = machine.ram().memory();
    ram.write_slice(code, GuestAddress(ENTRY)).unwrap();
    ram.write_slice(AP_COUNT, GuestAddress(AP_ENTRY)).unwrap();
}

pub(crate) fn counter(machine: &Machine, vcpu: usize) -> u32 {
    machine.ram().memory().read_obj(GuestAddress(COUNTERS + 4 * vcpu as u64)).unwrap()
}

/// Waits until `condition` holds.
pub(crate) fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what} did not happen within 20 s");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until every vCPU has counted on.
pub(crate) fn wait_for_beats(machine: &Machine, vcpus: usize) {
    let before: Vec<u32> = (0..vcpus).map(|v| counter(machine, v)).collect();
    wait_for("counting of every vCPU", || (0..vcpus).all(|v| counter(machine, v) > before[v]));
}

pub(crate) const DEADLINE: Duration = Duration::from_secs(5);
