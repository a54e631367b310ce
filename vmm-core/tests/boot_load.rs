//! What a kernel would find: images built here are loaded, and RAM is read back as the boot protocols define it.

use std::error::Error as _;
use std::path::{Path, PathBuf};

use kvm_bindings::{kvm_regs, kvm_sregs};
use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};
use vmm_core::boot::{
    BootError, BootRequest, Entry, InitrdError, KernelError, KernelImage, Protocol, layout, load,
};

const MIB: u64 = 1 << 20;
const CODE: &[u8] = b"these bytes are the kernel";

fn ram(mib: u64) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (mib * MIB) as usize)]).unwrap()
}

fn built_in(bytes: &[u8]) -> BootRequest<'_> {
    let kernel = KernelImage::BuiltIn { name: "built-in", bytes };
    BootRequest { kernel, initrd: None, cmdline: "console=ttyS0", vcpus: 1, pci: false }
}

fn file(path: &Path) -> BootRequest<'static> {
    BootRequest {
        kernel: KernelImage::Path(path.to_owned()),
        initrd: None,
        cmdline: "",
        vcpus: 1,
        pci: false,
    }
}

fn bytes_at(ram: &GuestMemoryMmap, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

// A PVH kernel: one segment at 2 MiB with 4 KiB of zeroes behind it, a foreign note segment, then the PVH note.

const ELF_ADDR: u64 = 2 * MIB;
const ELF_LEN: usize = 0x400;
const PHDR: [usize; 3] = [64, 120, 176];

fn note(name: &[u8; 4], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4, desc.len() as u32, kind] {
        note.extend(word.to_le_bytes());
    }
    note.extend(name);
    note.extend(desc);
    note.resize(note.len().next_multiple_of(4), 0);
    note
}

fn elf() -> Vec<u8> {
    let mut image = vec![0; ELF_LEN];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &[2, 0, 62, 0, 1]);
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 52, &[64, 0, 56, 0, 3, 0]);
    let foreign = note(b"GNU\0", 5, b"whatever");
    let mut xen = note(b"Xen\0", 6, b"linux\0");
    xen.extend(note(b"Xen\0", 18, &(ELF_ADDR + 4).to_le_bytes()));
    let segments = [
        (1u32, 0x300u64, CODE.len(), 0x1000),
        (4, 0x100, foreign.len(), foreign.len()),
        (4, 0x200, xen.len(), xen.len()),
    ];
    for (at, (kind, offset, file_size, mem_size)) in PHDR.into_iter().zip(segments) {
        put(&mut image, at, &kind.to_le_bytes());
        put(&mut image, at + 8, &offset.to_le_bytes());
        put(&mut image, at + 24, &ELF_ADDR.to_le_bytes());
        put(&mut image, at + 32, &(file_size as u64).to_le_bytes());
        put(&mut image, at + 40, &(mem_size as u64).to_le_bytes());
    }
    put(&mut image, 0x100, &foreign);
    put(&mut image, 0x200, &xen);
    put(&mut image, 0x300, CODE);
    image
}

// A bzImage: two setup sectors, a protected-mode part of 1 KiB, preferred at 16 MiB where it needs 4 MiB.

const PREF: u64 = 16 * MIB;
const INIT_SIZE: u32 = 4 << 20;

fn header() -> setup_header {
    setup_header {
        setup_sects: 1,
        syssize: 64,
        boot_flag: 0xaa55,
        jump: 0x6aeb,
        header: 0x5372_6448,
        version: 0x020f,
        loadflags: 1,
        initrd_addr_max: 0x7fff_ffff,
        kernel_alignment: 2 << 20,
        relocatable_kernel: 1,
        xloadflags: 0x7f,
        cmdline_size: 2047,
        pref_address: PREF,
        init_size: INIT_SIZE,
        ..Default::default()
    }
}

fn bzimage(header: setup_header) -> Vec<u8> {
    let mut image = vec![0xcc; 2048];
    put(&mut image, 0x1f1, header.as_slice());
    put(&mut image, 1024, CODE);
    image
}

fn kernel_error(ram: &GuestMemoryMmap, request: &BootRequest<'_>) -> KernelError {
    match load(ram, request) {
        Err(BootError::Kernel { cause, .. }) => cause,
        other => panic!("{other:?}"),
    }
}

fn initrd(dir: &tempfile::TempDir, len: usize) -> PathBuf {
    let path = dir.path().join("initrd.img");
    std::fs::write(&path, (0..len).map(|n| n as u8).collect::<Vec<_>>()).unwrap();
    path
}

fn applied(entry: &Entry) -> (kvm_regs, kvm_sregs) {
    let (mut regs, mut sregs) = Default::default();
    entry.apply(&mut regs, &mut sregs);
    (regs, sregs)
}

#[test]
fn pvh_kernel_finds_itself_initrd_command_line_ram_and_acpi() {
    let dir = tempfile::tempdir().unwrap();
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20), (GuestAddress(1 << 32), 1 << 20)])
        .unwrap();
    let elf = elf();
    let entry =
        load(&ram, &BootRequest { initrd: Some(initrd(&dir, 5000)), vcpus: 2, ..built_in(&elf) }).unwrap();
    assert_eq!((entry.protocol(), entry.address().0), (Protocol::Pvh, ELF_ADDR + 4));
    assert_eq!(bytes_at(&ram, ELF_ADDR, CODE.len()), CODE);

    let (regs, sregs) = applied(&entry);
    assert_eq!((regs.rip, sregs.cr0), (ELF_ADDR + 4, 0x11));
    let info: hvm_start_info = ram.read_obj(GuestAddress(regs.rbx)).unwrap();
    assert_eq!((info.magic, info.version, info.flags), (0x336e_c578, 1, 0));
    assert_eq!(bytes_at(&ram, info.cmdline_paddr, 14), b"console=ttyS0\0");
    assert_eq!(bytes_at(&ram, info.rsdp_paddr, 8), b"RSD PTR ");

    assert_eq!(info.nr_modules, 1);
    let module: hvm_modlist_entry = ram.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!((module.paddr, module.size, module.cmdline_paddr), (64 * MIB - 8192, 5000, 0));
    assert_eq!(bytes_at(&ram, module.paddr + 254, 4), [254, 255, 0, 1]);

    let map: Vec<(u64, u64, u32)> = (0..u64::from(info.memmap_entries))
        .map(|n| {
            let at = GuestAddress(info.memmap_paddr + n * 24);
            let entry: hvm_memmap_table_entry = ram.read_obj(at).unwrap();
            (entry.addr, entry.size, entry.type_)
        })
        .collect();
    assert_eq!(map, [(0, 0xa_0000, 1), (0xe_0000, 0x2_0000, 3), (MIB, 63 * MIB, 1), (1 << 32, MIB, 1)]);
    assert_eq!(descriptor_at(&ram, &sregs, sregs.cs.selector), 0x00cf_9b00_0000_ffff);
    assert_eq!(bytes_at(&ram, 0xf_fff0, 3), [0xba, 0x02, 0x06], "mov dx, reset port");
}

#[test]
fn pvh_kernel_without_initrd_has_no_module() {
    let ram = ram(16);
    let entry = load(&ram, &built_in(&elf())).unwrap();
    let info: hvm_start_info = ram.read_obj(entry.info()).unwrap();
    assert_eq!((info.nr_modules, info.modlist_paddr), (0, 0));
}

#[test]
fn bzimage_finds_itself_initrd_command_line_ram_and_acpi() {
    let dir = tempfile::tempdir().unwrap();
    let ram = ram(64);
    let image = bzimage(header());
    let entry = load(&ram, &BootRequest { initrd: Some(initrd(&dir, 5000)), ..built_in(&image) }).unwrap();
    assert_eq!((entry.protocol(), entry.address().0), (Protocol::Linux64, PREF + 0x200));
    assert_eq!(bytes_at(&ram, PREF, CODE.len()), CODE);

    let (regs, sregs) = applied(&entry);
    assert_eq!(regs.rip, PREF + 0x200);
    let params: boot_params = ram.read_obj(GuestAddress(regs.rsi)).unwrap();
    let hdr = params.hdr;
    assert_eq!(({ hdr.boot_flag }, { hdr.header }, { hdr.type_of_loader }), (0xaa55, 0x5372_6448, 0xff));
    assert_eq!(
        ({ hdr.init_size }, { hdr.pref_address }, { hdr.code32_start }),
        (INIT_SIZE, PREF, PREF as u32)
    );
    assert_eq!(bytes_at(&ram, hdr.cmd_line_ptr.into(), 14), b"console=ttyS0\0");
    assert_eq!(bytes_at(&ram, params.acpi_rsdp_addr, 8), b"RSD PTR ");
    assert_eq!(({ hdr.ramdisk_image }, { hdr.ramdisk_size }), ((64 * MIB - 8192) as u32, 5000));
    assert_eq!(bytes_at(&ram, (hdr.ramdisk_image + 254).into(), 4), [254, 255, 0, 1]);
    assert_eq!(({ params.ext_ramdisk_image }, { params.ext_cmd_line_ptr }), (0, 0));

    let map: Vec<(u64, u64, u32)> =
        params.e820_table[..params.e820_entries.into()].iter().map(|e| (e.addr, e.size, e.r#type)).collect();
    assert_eq!(map, [(0, 0xa_0000, 1), (0xe_0000, 0x2_0000, 3), (MIB, 63 * MIB, 1)]);

    assert_eq!(descriptor_at(&ram, &sregs, 0x10), 0x00af_9b00_0000_ffff);
    assert_eq!(descriptor_at(&ram, &sregs, 0x18), 0x00cf_9300_0000_ffff);
    for address in [0, regs.rsi, regs.rip, 0x3fff_ffff, 0x4000_0000, 0xfee0_0020, 0xffff_ffff] {
        assert_eq!(translate(&ram, sregs.cr3, address), Some(address));
    }
    assert_eq!(translate(&ram, sregs.cr3, 1 << 32), None);
}

fn descriptor_at(ram: &GuestMemoryMmap, sregs: &kvm_sregs, selector: u16) -> u64 {
    assert!(selector + 7 <= sregs.gdt.limit);
    ram.read_obj(GuestAddress(sregs.gdt.base + u64::from(selector))).unwrap()
}

/// As a processor walks the tables of 4-level paging with 2 MiB pages.
fn translate(ram: &GuestMemoryMmap, cr3: u64, address: u64) -> Option<u64> {
    let mut table = cr3;
    for shift in [39, 30, 21] {
        let at = GuestAddress(table + (address >> shift & 0x1ff) * 8);
        let entry: u64 = ram.read_obj(at).unwrap();
        match entry & 0x83 {
            0 => return None,
            0x83 if shift == 21 => return Some((entry & !0x1f_ffff) + (address & 0x1f_ffff)),
            3 if shift > 21 => table = entry & !0xfff,
            bad => panic!("flags {bad:#x} for {address:#x}"),
        }
    }
    unreachable!()
}

#[test]
fn bytes_behind_a_shorter_setup_header_do_not_reach_boot_params() {
    let ram = ram(64);
    let mut header = header();
    header.version = 0x020c;
    header.jump = 0x66eb;
    header.kernel_info_offset = 0xdead_beef;
    let entry = load(&ram, &built_in(&bzimage(header))).unwrap();
    let params: boot_params = ram.read_obj(entry.info()).unwrap();
    assert_eq!(({ params.hdr.kernel_info_offset }, { params.hdr.init_size }), (0, INIT_SIZE));
}

#[test]
fn initrd_keeps_below_what_an_older_kernel_reaches() {
    let dir = tempfile::tempdir().unwrap();
    let ram = ram(64);
    let initrd = Some(initrd(&dir, 5000));
    let mut header = header();
    header.xloadflags = 1;
    header.initrd_addr_max = 32 * MIB as u32 - 1;
    let entry = load(&ram, &BootRequest { initrd, ..built_in(&bzimage(header)) }).unwrap();
    let params: boot_params = ram.read_obj(entry.info()).unwrap();
    assert_eq!({ params.hdr.ramdisk_image }, (32 * MIB - 8192) as u32);
}

#[test]
fn wrong_bzimages_are_refused() {
    let ram = ram(64);
    let cause = |change: fn(&mut setup_header)| {
        let mut header = header();
        change(&mut header);
        kernel_error(&ram, &built_in(&bzimage(header)))
    };
    assert!(matches!(cause(|h| h.version = 0x020b), KernelError::OldBzImage { major: 2, minor: 11 }));
    assert!(matches!(cause(|h| h.loadflags = 0), KernelError::ZImage));
    assert!(matches!(cause(|h| h.xloadflags = 0x7e), KernelError::ThirtyTwoBit));
    assert!(matches!(cause(|h| h.syssize = 65), KernelError::Truncated { need: 2064, have: 2048 }));
    assert!(matches!(cause(|h| h.setup_sects = 0), KernelError::Truncated { .. }));
    assert!(matches!(cause(|h| (h.setup_sects, h.syssize) = (3, 0)), KernelError::BrokenBzImage { .. }));
    assert!(matches!(cause(|h| h.pref_address = 0x9_0000), KernelError::TooLow { start: 0x9_0000 }));
    assert!(matches!(cause(|h| h.init_size = 48 << 20 | 1), KernelError::TooLarge { .. }));
    assert!(matches!(cause(|h| h.pref_address = u64::MAX), KernelError::TooLarge { end: u64::MAX, .. }));
    let image = bzimage(header());
    for len in [0x206, 0x240, 1023, 1024, 2047] {
        assert!(
            matches!(kernel_error(&ram, &built_in(&image[..len])), KernelError::Truncated { .. }),
            "{len}"
        );
    }
    assert_untouched(&ram);
}

#[test]
fn wrong_elf_files_are_refused() {
    let ram = ram(16);
    let cause = |at: usize, bytes: &[u8]| {
        let mut image = elf();
        put(&mut image, at, bytes);
        kernel_error(&ram, &built_in(&image))
    };
    assert!(matches!(cause(4, &[1]), KernelError::WrongElf { .. }), "32-bit");
    assert!(matches!(cause(5, &[2]), KernelError::WrongElf { .. }), "big-endian");
    assert!(matches!(cause(18, &[183]), KernelError::WrongElf { .. }), "aarch64");
    assert!(matches!(cause(54, &[32]), KernelError::BrokenElf { .. }), "entry size");
    assert!(matches!(cause(56, &[0]), KernelError::BrokenElf { .. }), "no segments");
    assert!(matches!(cause(32, &u64::MAX.to_le_bytes()), KernelError::Truncated { .. }));
    assert!(matches!(cause(PHDR[2], &[0]), KernelError::NoPvhNote));
    assert!(matches!(cause(PHDR[0], &[0]), KernelError::BrokenElf { .. }), "loads nothing");
    assert!(matches!(cause(PHDR[0] + 8, &[0xff; 8]), KernelError::Truncated { .. }));
    assert!(matches!(cause(PHDR[0] + 24, &[0; 8]), KernelError::TooLow { start: 0 }));
    assert!(matches!(cause(PHDR[0] + 24, &[0xff; 8]), KernelError::TooLarge { end: u64::MAX, .. }));
    assert!(matches!(cause(PHDR[0] + 40, &[1, 0]), KernelError::BrokenElf { .. }), "memory < file");
    assert!(matches!(cause(PHDR[0] + 40, &(14 * MIB + 1).to_le_bytes()), KernelError::TooLarge { .. }));
    assert!(matches!(cause(PHDR[2] + 32, &[0xff; 4]), KernelError::Truncated { .. }));
    assert!(matches!(cause(0x200, &[0xff; 4]), KernelError::BrokenElf { .. }), "name of a note");
    assert!(matches!(cause(0x204, &[0xff; 4]), KernelError::BrokenElf { .. }), "content of a note");
    assert!(matches!(cause(0x21c, &[2]), KernelError::BrokenElf { .. }), "short PVH note");
    assert!(matches!(cause(0x228, &[0; 4]), KernelError::BrokenElf { .. }), "entry outside");
    let image = elf();
    for len in [4, 63, 64, 200, 0x220, 0x300 + CODE.len() - 1] {
        assert!(
            matches!(kernel_error(&ram, &built_in(&image[..len])), KernelError::Truncated { .. }),
            "{len}"
        );
    }
    assert_untouched(&ram);
}

#[test]
fn files_that_are_no_kernel_are_named_and_told_what_would_do() {
    let dir = tempfile::tempdir().unwrap();
    let ram = ram(16);
    let mut disk = vec![0; 4096];
    put(&mut disk, 0x1fe, b"\x55\xaa");
    let files: [(&str, &[u8], &str); 7] = [
        ("empty", b"", "empty"),
        ("tiny", b"x", "unknown format"),
        ("elf-magic", b"\x7fEL", "unknown format"),
        ("vmlinux.gz", b"\x1f\x8b\x08\x00", "gzip"),
        ("vmlinux.zst", b"\x28\xb5\x2f\xfd....", "zstd"),
        ("uki.efi", b"MZ\x90\x00", "EFI program"),
        ("disk.img", &disk, "disk image"),
    ];
    for (name, bytes, expected) in files {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = load(&ram, &file(&path)).unwrap_err();
        let cause = error.source().unwrap().to_string();
        assert_eq!(error.to_string(), format!("cannot boot kernel {}", path.display()));
        assert!(
            cause.contains(expected) && cause.contains("vmlinux") && cause.contains("bzImage"),
            "{cause}"
        );
    }
    assert!(matches!(kernel_error(&ram, &file(dir.path())), KernelError::NotAFile { what: "a directory" }));
    assert!(matches!(kernel_error(&ram, &file(Path::new("/dev/null"))), KernelError::NotAFile { .. }));
    assert!(matches!(kernel_error(&ram, &file(&dir.path().join("none"))), KernelError::Open(_)));
    assert_untouched(&ram);
}

#[test]
fn a_kernel_from_a_file_is_the_same_as_a_built_in_one() {
    let dir = tempfile::tempdir().unwrap();
    for image in [elf(), bzimage(header())] {
        let (from_file, from_memory) = (ram(32), ram(32));
        let path = dir.path().join("kernel");
        std::fs::write(&path, &image).unwrap();
        let request = BootRequest { cmdline: "console=ttyS0", ..file(&path) };
        assert_eq!(load(&from_file, &request).unwrap(), load(&from_memory, &built_in(&image)).unwrap());
        assert!(bytes_at(&from_file, 0, 32 << 20) == bytes_at(&from_memory, 0, 32 << 20));
    }
}

#[test]
fn unusable_initrds_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let ram = ram(16);
    let elf = elf();
    let cause =
        |path: &Path| match load(&ram, &BootRequest { initrd: Some(path.to_owned()), ..built_in(&elf) }) {
            Err(error @ BootError::Initrd { .. }) => {
                assert!(error.to_string().contains(path.to_str().unwrap()));
                let BootError::Initrd { cause, .. } = error else { unreachable!() };
                cause
            }
            other => panic!("{other:?}"),
        };
    assert!(matches!(cause(&dir.path().join("none")), InitrdError::Open(_)));
    assert!(matches!(cause(dir.path()), InitrdError::NotAFile { what: "a directory" }));
    assert!(matches!(cause(&initrd(&dir, 0)), InitrdError::Empty));
    let room = 14 * MIB - 0x1000;
    match cause(&initrd(&dir, room as usize + 1)) {
        InitrdError::TooLarge { size, room: free } => assert_eq!((size, free), (room + 1, room)),
        other => panic!("{other:?}"),
    }
    assert_untouched(&ram);
    assert!(load(&ram, &BootRequest { initrd: Some(initrd(&dir, room as usize)), ..built_in(&elf) }).is_ok());
}

#[test]
fn requests_that_fit_no_machine_are_refused() {
    let elf = elf();
    let ram = ram(16);
    for vcpus in [0, 256] {
        assert!(matches!(load(&ram, &BootRequest { vcpus, ..built_in(&elf) }), Err(BootError::Vcpus { .. })));
    }
    let long = "x".repeat(2048);
    let request = BootRequest { cmdline: &long, ..built_in(&elf) };
    assert!(matches!(load(&ram, &request), Err(BootError::CommandLineTooLong { len: 2048, max: 2047 })));
    let request = BootRequest { cmdline: "a\0b", ..built_in(&elf) };
    assert!(matches!(load(&ram, &request), Err(BootError::CommandLineText { bad: '\0' })));
    assert_untouched(&ram);

    let regions: Vec<_> = (0..127).map(|n| (GuestAddress(n * 4 * MIB), 2 << 20)).collect();
    let pieces = GuestMemoryMmap::from_ranges(&regions).unwrap();
    assert!(matches!(load(&pieces, &built_in(&elf)), Err(BootError::RamPieces { ranges: 129, max: 128 })));
}

proptest::proptest! {
    #[test]
    fn damaged_images_are_loaded_or_refused_but_never_crash(
        damage in proptest::collection::vec((0usize..0x400, proptest::prelude::any::<u8>()), 1..8),
        len in 0usize..=2048,
    ) {
        let ram = ram(32);
        for mut image in [elf(), bzimage(header())] {
            for &(at, byte) in &damage {
                image[at] = byte;
            }
            let _ = load(&ram, &built_in(&image));
            image.truncate(len);
            let _ = load(&ram, &built_in(&image));
        }
    }
}

fn assert_untouched(ram: &GuestMemoryMmap) {
    let size = 16 << 20;
    assert!(bytes_at(ram, 0, size).iter().all(|byte| *byte == 0), "a refused request wrote to RAM");
}

#[test]
fn boot_data_does_not_overlap() {
    let mut areas = [
        (layout::GDT.0, 48),
        (layout::START_INFO.0, 56),
        (layout::MODULE_LIST.0, 32),
        (layout::MEMORY_MAP.0, 24 * layout::MEMORY_MAP_MAX as u64),
        (layout::BOOT_PARAMS.0, 4096),
        (layout::STACK_TOP.0 - 4096, 4096),
        (layout::PAGE_TABLES.0, 6 * 4096),
        (layout::CMDLINE.0, layout::CMDLINE_ROOM as u64),
        (layout::HOLE_START, 0x4_0000),
        (layout::ACPI_AREA.start, 0x2_0000),
        (layout::HIGH_START, 0),
    ];
    assert!(areas[0].0 >= 0x500, "the BIOS data area reads as zero");
    areas.sort();
    for pair in areas.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
    }
}

/// Loads kernels of distributions:
/// `BOOT_TEST_KERNELS=vmlinuz:vmlinux cargo test -p vmm-core --test boot_load -- --ignored`
#[test]
#[ignore = "needs real kernels, named by BOOT_TEST_KERNELS"]
fn real_kernels_load() {
    let dir = tempfile::tempdir().unwrap();
    let kernels = std::env::var("BOOT_TEST_KERNELS").expect("BOOT_TEST_KERNELS: paths, separated by colons");
    for path in kernels.split(':') {
        let ram = ram(512);
        let request = BootRequest { initrd: Some(initrd(&dir, 30 << 20)), vcpus: 2, ..file(Path::new(path)) };
        let entry = load(&ram, &request).unwrap_or_else(|e| panic!("{e}: {:?}", e.source()));
        println!("{path}: {entry:x?}, first bytes {:02x?}", bytes_at(&ram, entry.address().0, 16));
        let small = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 48 << 20)]).unwrap();
        println!("{}", kernel_error(&small, &file(Path::new(path))));
    }
}
