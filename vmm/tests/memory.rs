//! Guest RAM of every backend across an update: it stays where it is, byte for byte, and where it cannot, the update is
//! refused before anything happens.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use serde_json::json;
use tempfile::TempDir;
use testkit::{Guest, PATIENCE, Vmm, VmmBuilder, need_kvm, process, skip_unless, wait_for};
use vmm_core::payload::{Command, MAILBOX_GPA, VcpuState, field};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const SEED: u64 = 23;

/// A VM whose RAM is this object, which has the id `ram0`.
fn with_object(object: &str) -> VmmBuilder {
    VmmBuilder::new().memory_args(&["-object", object, "-machine", "memory-backend=ram0"])
}

/// Fills all of RAM, updates both ways, and checks that every word is where it was.
fn survives(vmm: &mut Vmm, guest: &Guest) -> anyhow::Result<()> {
    let bytes = guest.usable_bytes();
    ensure!(bytes > SIZE / 2, "{bytes} bytes of RAM");
    guest.fill(bytes, SEED)?;
    for round in 0..3 {
        let beats = guest.vcpu(0).beats();
        if round == 1 {
            vmm.update_by_file()?
        } else {
            vmm.update()?
        };
        ensure!(guest.beats_on(0)? > beats, "the counter stepped back");
        guest.verify(bytes, SEED)?;
    }
    // The memory is not only the same to look at: the new program's guest writes where the old one's did.
    guest.fill(bytes, SEED + 1)?;
    vmm.update()?;
    guest.verify(bytes, SEED + 1)
}

/// A folder in memory where the system has one.
fn folder_in_memory() -> anyhow::Result<TempDir> {
    let usual = Path::new("/dev/shm");
    Ok(if usual.is_dir() { tempfile::tempdir_in(usual)? } else { tempfile::tempdir()? })
}

#[test]
fn memfd_survives() -> anyhow::Result<()> {
    need_kvm!();
    for share in ["", ",share=on"] {
        let object = format!("memory-backend-memfd,id=ram0,size={SIZE}{share}");
        let mut vmm = with_object(&object).start()?;
        let guest = vmm.guest()?;
        survives(&mut vmm, &guest)?;
        vmm.quit()?;
    }
    Ok(())
}

#[test]
fn a_shared_file_survives() -> anyhow::Result<()> {
    need_kvm!();
    let folder = folder_in_memory()?;
    let path = folder.path().join("ram");
    let object = format!("memory-backend-file,id=ram0,size={SIZE},mem-path={},share=on", path.display());
    let mut vmm = with_object(&object).start()?;
    let guest = Guest::attach_file(&path, 1)?;
    survives(&mut vmm, &guest)?;
    // The path is only how it was found at first: the memory is the descriptor that was passed on.
    let moved = folder.path().join("moved");
    fs::rename(&path, &moved)?;
    vmm.update()?;
    guest.beats_on(0)?;
    guest.verify(guest.usable_bytes(), SEED + 1)?;
    ensure!(!path.exists(), "the update made a new file");
    vmm.quit()
}

#[test]
fn shared_ram_survives() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = with_object(&format!("memory-backend-ram,id=ram0,size={SIZE},share=on")).start()?;
    let guest = vmm.guest()?;
    survives(&mut vmm, &guest)?;
    vmm.quit()
}

/// Huge pages in the pool for as long as a test needs them.
struct HugePages {
    before: Option<u64>,
}

impl HugePages {
    const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

    fn read(name: &str) -> Option<u64> {
        fs::read_to_string(format!("{}/{name}", Self::POOL)).ok()?.trim().parse().ok()
    }

    fn set(pages: u64) {
        let _ = fs::write(format!("{}/nr_hugepages", Self::POOL), pages.to_string());
    }

    /// `None` where there are too few, and none can be had.
    fn reserve(pages: u64) -> Option<HugePages> {
        let (free, all) = (Self::read("free_hugepages")?, Self::read("nr_hugepages")?);
        if free >= pages {
            return Some(HugePages { before: None });
        }
        Self::set(all + pages - free);
        // From here on it is undone when dropped, whatever came of it.
        let reserved = HugePages { before: Some(all) };
        (Self::read("free_hugepages")? >= pages).then_some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(pages) = self.before {
            Self::set(pages);
        }
    }
}

#[test]
fn huge_pages_survive() -> anyhow::Result<()> {
    need_kvm!();
    let pages = HugePages::reserve(SIZE / (2 * MIB));
    skip_unless!(pages.is_some(), "there are too few huge pages, and no more can be reserved");
    let mut vmm = with_object(&format!("memory-backend-memfd,id=ram0,size={SIZE},hugetlb=on,hugetlbsize=2M"))
        .start()?;
    let guest = vmm.guest()?;
    ensure!(guest.file().metadata()?.blksize() == 2 * MIB, "the memory is not of huge pages");
    survives(&mut vmm, &guest)?;
    vmm.quit()?;
    drop((guest, pages));
    Ok(())
}

/// Beats of vCPU 0, read from private memory of `size` bytes in the process's address space.
fn private_beats(pid: u32, size: u64) -> anyhow::Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let start = maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        // Neighbouring anonymous mappings may be shown as one.
        (end - start >= size && rest.starts_with("rw-p")).then_some(start)
    });
    let start = start.with_context(|| format!("no private mapping of {size} bytes in {maps}"))?;
    let mut word = [0; 8];
    let memory = fs::File::open(format!("/proc/{pid}/mem"))?;
    memory.read_exact_at(&mut word, start + MAILBOX_GPA + field::BEATS)?;
    Ok(u64::from_le_bytes(word))
}

fn private_beats_on(pid: u32) -> anyhow::Result<()> {
    let before = private_beats(pid, SIZE)?;
    wait_for("a beat", PATIENCE, || private_beats(pid, SIZE).ok().filter(|&beats| beats > before)).map(drop)
}

#[test]
fn private_ram_blocks_the_update_and_says_so() -> anyhow::Result<()> {
    need_kvm!();
    let folder = folder_in_memory()?;
    let file = folder.path().join("ram");
    let objects = [
        None,
        Some(format!("memory-backend-ram,id=ram0,size={SIZE}")),
        Some(format!("memory-backend-ram,id=ram0,size={SIZE},share=off")),
        Some(format!("memory-backend-memfd,id=ram0,size={SIZE},share=off")),
        Some(format!("memory-backend-file,id=ram0,size={SIZE},mem-path={},share=off", file.display())),
    ];
    for object in objects {
        let name = if object.is_some() { "ram0" } else { "microvm.ram" };
        let builder = match &object {
            Some(object) => with_object(object),
            None => VmmBuilder::new().memory_args(&["-m", "64M"]),
        };
        let mut vmm = builder.start()?;
        private_beats_on(vmm.pid()).with_context(|| format!("{object:?}"))?;
        let unset = vmm.qmp().execute("query-migrate", json!({}))?;
        ensure!(unset.get("blocked-reasons").is_none(), "no mode is set: {unset}");

        let state = vmm.path("state");
        let uri = format!("file:{}", state.display());
        let command = vmm.exec_command(&uri);
        vmm.set_exec(&command)?;
        let info = vmm.qmp().execute("query-migrate", json!({}))?;
        let reasons = info["blocked-reasons"].as_array().with_context(|| format!("not blocked: {info}"))?;
        let names_it = |text: &str| text.contains(name) && text.contains("share=on");
        ensure!(reasons.len() == 1 && reasons[0].as_str().is_some_and(names_it), "{reasons:?}");
        for uri in ["memfd:", &uri] {
            let refusal = vmm.qmp().refused("migrate", json!({ "uri": uri }))?;
            ensure!(names_it(&refusal.desc), "{refusal}");
        }
        ensure!(!state.exists(), "a refused update wrote its state file");
        ensure!(vmm.status()? == "running");
        ensure!(vmm.qmp().take_events().is_empty(), "the guest was stopped");
        private_beats_on(vmm.pid())?;
        vmm.quit()?;
    }
    Ok(())
}

/// The usable RAM's distance, in the payload's own counting, to where RAM goes on above the hole.
fn bytes_below_4g(guest: &Guest) -> u64 {
    guest.header().ranges().iter().filter(|(start, _)| *start < 1 << 32).map(|(_, len)| len).sum()
}

#[test]
fn ram_on_both_sides_of_the_hole_survives_and_stays_sparse() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = VmmBuilder::new().memory(5 << 30).start()?;
    let guest = vmm.guest()?;
    let end = guest.usable_bytes();
    let hole = bytes_below_4g(&guest);
    ensure!(hole < end && end > (5 << 30) - 64 * MIB, "hole at {hole}, end at {end}");
    // One area at the start, one across the hole, one at the very end.
    let areas = [(0, MIB), (hole - MIB, 2 * MIB), (end - MIB, MIB)];
    for (offset, bytes) in areas {
        guest.run(Command::Fill { offset, bytes, seed: SEED })?;
    }
    let allocated = || anyhow::Ok(guest.file().metadata()?.blocks() * 512);
    let before = allocated()?;
    ensure!(before < 32 * MIB, "{before} bytes are allocated");
    for _ in 0..3 {
        vmm.update()?;
        guest.beats_on(0)?;
        for (offset, bytes) in areas {
            let outcome = guest.run(Command::Verify { offset, bytes, seed: SEED })?;
            ensure!(outcome.results[0] == 0, "{outcome:?} at {offset:#x}");
        }
    }
    ensure!(allocated()? == before, "allocated: {before} -> {}", allocated()?);
    vmm.quit()
}

/// Checks that no byte of RAM differs between two looks at it.
fn same(before: &[u8], after: &[u8]) -> anyhow::Result<()> {
    ensure!(before.len() == after.len());
    if before != after {
        let differ = || before.iter().zip(after).enumerate().filter(|(_, (a, b))| a != b);
        let first = differ().next().map(|(at, _)| at);
        bail!("{} bytes of RAM changed, the first at {first:#x?}", differ().count());
    }
    Ok(())
}

#[test]
fn an_update_writes_not_one_byte_of_guest_ram() -> anyhow::Result<()> {
    need_kvm!();
    for parked in [false, true] {
        let mut vmm = VmmBuilder::new().cpus(2).start()?;
        let guest = vmm.guest()?;
        guest.fill(guest.usable_bytes(), SEED)?;
        if parked {
            // The guest runs before, in and after the update, and only reads.
            let _ = (0..2).map(|vcpu| guest.vcpu(vcpu).submit(Command::Park)).collect::<Vec<_>>();
            let all_parked =
                || (0..2).all(|vcpu| guest.vcpu(vcpu).state() == VcpuState::Parked).then_some(());
            wait_for("the vCPUs to park", PATIENCE, all_parked)?;
        } else {
            vmm.qmp().execute("stop", json!({}))?;
        }
        let blocks = guest.file().metadata()?.blocks();
        let before = guest.snapshot()?;
        for round in 0..3 {
            if round == 1 {
                vmm.update_by_file()?
            } else {
                vmm.update()?
            };
            same(&before, &guest.snapshot()?).with_context(|| format!("parked: {parked}, round {round}"))?;
        }
        // Neither does one that fails.
        let command = vmm.exec_command("memfd:");
        vmm.set_exec(&command)?;
        ensure!(vmm.migrate("file:/dev/full").is_err(), "the disk is full");
        same(&before, &guest.snapshot()?).context("after a failed update")?;
        ensure!(guest.file().metadata()?.blocks() == blocks, "memory was allocated");

        if parked {
            guest.reset_gap(0)?;
            guest.reset_gap(1)?;
        } else {
            vmm.qmp().execute("cont", json!({}))?;
        }
        guest.beats_on(0)?;
        guest.beats_on(1)?;
        guest.verify(guest.usable_bytes(), SEED)?;
        vmm.quit()?;
    }
    Ok(())
}

#[test]
fn without_a_keeper_it_works_as_well() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = VmmBuilder::new().start()?;
    let guest = vmm.guest()?;
    vmm.qmp().execute("migrate-set-parameters", json!({ "x-cpr-exec-keeper": false }))?;
    survives(&mut vmm, &guest)?;
    ensure!(process::children(vmm.pid())?.is_empty(), "there is a keeper");
    let parameters = vmm.qmp().execute("query-migrate-parameters", json!({}))?;
    ensure!(parameters["x-cpr-exec-keeper"] == false, "{parameters}");
    // It can be switched on again, and off.
    for keeper in [true, false] {
        vmm.qmp().execute("migrate-set-parameters", json!({ "x-cpr-exec-keeper": keeper }))?;
        vmm.update()?;
        guest.beats_on(0)?;
    }
    vmm.quit()
}

#[test]
fn a_file_of_another_size_is_refused_and_left_alone() -> anyhow::Result<()> {
    need_kvm!();
    let folder = folder_in_memory()?;
    let path = folder.path().join("ram");
    fs::write(&path, vec![0; 4096])?;
    let object = format!("memory-backend-file,id=ram0,size={SIZE},mem-path={},share=on", path.display());
    let mut vmm = with_object(&object).spawn()?;
    ensure!(vmm.wait_exit()? == Some(1));
    let says = vmm.stderr();
    ensure!(says.contains("ram0") && says.contains("4096"), "{says}");
    ensure!(fs::metadata(&path)?.len() == 4096, "the file was changed");
    Ok(())
}
