//! A program that is no VMM rests in storage, and another one goes on; or somebody damaged what was there.

use std::cell::RefCell;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter, HEADER_LEN, Header};
use cpr_core::{
    Backing, FdKind, FdPolicy, GuestActivity, Host, Incoming, MemoryRegion, Outcome, Services, Step,
    TerminalAction, Update,
};
use cpr_reboot::{CprReboot, FileError, Kept, Memory, RamSource, StateFile, Stored, Whereabouts};
use proptest::prelude::*;
use tempfile::TempDir;

const LEN: usize = 3 << 20;

/// Memory with holes, and with zeros that are no holes.
fn content() -> Vec<u8> {
    let mut bytes = vec![0; LEN];
    for at in (0..LEN).filter(|at| !matches!(at / 4096 % 7, 2 | 3) && !(1 << 20..2 << 20).contains(at)) {
        bytes[at] = (at % 251 + 1) as u8;
    }
    bytes
}

struct Bytes(Vec<u8>);

impl RamSource for Bytes {
    fn extents(&self) -> io::Result<Vec<Range<u64>>> {
        // All of one extent is more than one chunk.
        Ok(vec![0..(1 << 20) + 4096, (2 << 20) - 8192..LEN as u64])
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.copy_from_slice(&self.0[offset as usize..offset as usize + buffer.len()]);
        Ok(())
    }
}

fn copied() -> Vec<Memory> {
    vec![Memory { name: "ram0".into(), len: LEN as u64, kept: Kept::Copied(Arc::new(Bytes(content()))) }]
}

fn in_file(path: &Path) -> Vec<Memory> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    file.set_len(LEN as u64).unwrap();
    vec![Memory {
        name: "ram0".into(),
        len: LEN as u64,
        kept: Kept::InFile { path: path.to_owned(), file: Arc::new(file) },
    }]
}

/// A guest that counts how often it was asked to do what.
#[derive(Default)]
struct Counter {
    value: u64,
    running: bool,
    backing: Option<Backing>,
    log: Rc<RefCell<Vec<&'static str>>>,
}

impl Host for Counter {
    fn memory(&self) -> Vec<MemoryRegion> {
        let region =
            |backing: &Backing| MemoryRegion { name: "ram0".into(), len: 1, backing: backing.clone() };
        self.backing.iter().map(region).collect()
    }

    fn stop(&mut self, _deadline: Instant) -> Result<GuestActivity, BoxError> {
        self.log.borrow_mut().push("stop");
        Ok(if std::mem::take(&mut self.running) { GuestActivity::Running } else { GuestActivity::Paused })
    }

    fn resume(&mut self, activity: GuestActivity) -> Result<(), BoxError> {
        self.log.borrow_mut().push("resume");
        self.running = activity == GuestActivity::Running;
        Ok(())
    }

    fn save(&mut self, main: &mut FrameWriter) -> Result<(), BoxError> {
        Ok(main.put_value("counter", 0, 1, &self.value)?)
    }

    fn load(&mut self, main: &mut Frame) -> Result<(), BoxError> {
        self.value = main.require("counter", 0)?.decode(1)?;
        Ok(())
    }

    fn request_terminal(&mut self, _action: TerminalAction) {
        unreachable!("nothing is executed");
    }
}

fn drive(update: &mut Update, host: &mut Counter) -> Outcome {
    loop {
        match update.step(host) {
            Step::Again | Step::Wait(_) => {}
            Step::Finished(outcome) => return outcome,
            Step::Terminal => unreachable!("nothing is executed"),
        }
    }
}

fn guest(value: u64) -> Counter {
    Counter { value, running: true, ..Counter::default() }
}

/// Puts a guest that counted to 42 into storage.
fn store(mode: CprReboot) -> Result<Stored, String> {
    let stored = mode.stored();
    let mut host = guest(42);
    let mut update =
        Update::begin(&Services::default(), Box::new(mode), &host).map_err(|error| error.to_string())?;
    match drive(&mut update, &mut host) {
        Outcome::HandedOver => {
            assert!(!host.running);
            let report = update.control().timeline().report();
            assert!(report.total_ns.is_some());
            Ok(stored)
        }
        Outcome::Failed { error, guest } => {
            guest.unwrap();
            assert!(host.running && *host.log.borrow() == ["stop", "resume"], "the guest runs on");
            Err(error.to_string())
        }
    }
}

/// Goes on with what is in storage, and tells how far it had counted and what is in its memory.
fn go_on(path: &Path, offset: u64) -> Result<(u64, Vec<u8>, StateFile), FileError> {
    let mut state = StateFile::open(path, offset)?;
    let mut memory = vec![0; LEN];
    state.read_ram(0, &mut |at, bytes| {
        memory[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        Ok(())
    })?;
    let arrival = state.arrive()?;
    let mut services = Services::default();
    let mut incoming = Incoming::begin(&mut services, arrival).unwrap();
    let mut host = Counter::default();
    // What the frame says is for the core to judge; damage to it is for the file.
    state.read_main()?;
    incoming.load(&mut host, &mut *state.main()).unwrap();
    incoming.commit(&mut host).unwrap();
    assert!(host.running && services.generation == 1);
    Ok((host.value, memory, state))
}

fn refused(path: &Path) -> String {
    go_on(path, 0).map(|_| ()).unwrap_err().to_string()
}

fn place() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.state");
    (dir, path)
}

/// Everything in a folder, hidden names as well.
fn names(dir: &TempDir) -> Vec<String> {
    let names = fs::read_dir(dir.path()).unwrap();
    let mut names: Vec<_> = names.map(|name| name.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn memory_is_copied_without_its_zeros() {
    let (_dir, path) = place();
    store(CprReboot::new(&path, 0, false, copied())).unwrap();
    let state = StateFile::open(&path, 0).unwrap();
    let regions = state.regions();
    assert_eq!((regions[0].name.as_str(), regions[0].len), ("ram0", LEN as u64));
    assert_eq!(regions[0].whereabouts, Whereabouts::Here);
    let full = content().chunks(4096).filter(|page| page.iter().any(|&byte| byte != 0)).count() * 4096;
    let len = fs::metadata(&path).unwrap().len() as usize;
    assert!((full..full + (32 << 10)).contains(&len), "{len} bytes of {full}");
    // A copy is as good the second time, and needs not be written to.
    for _ in 0..2 {
        let (value, memory, state) = go_on(&path, 0).unwrap();
        assert!(value == 42 && memory == content());
        state.mark_used().unwrap();
    }
}

#[test]
fn memory_stays_in_its_file_and_is_used_once() {
    let (dir, path) = place();
    let ram = dir.path().join("ram");
    let store = || store(CprReboot::new(&path, 0, true, in_file(&ram))).unwrap();
    let stored = store();
    let (value, _, state) = go_on(&path, 0).unwrap();
    assert_eq!(value, 42);
    assert_eq!(state.regions()[0].whereabouts, Whereabouts::File(ram.clone()));
    // While one goes on with it, nobody else does.
    assert!(refused(&path).contains("is in use by another program"));
    assert!(stored.take_back().unwrap_err().to_string().contains("is in use by another program"));
    // One that fails before its commit leaves it as it was.
    drop(state);
    let (_, _, state) = go_on(&path, 0).unwrap();
    state.mark_used().unwrap();
    drop(state);
    assert!(refused(&path).contains("was used already"));
    assert!(stored.take_back().unwrap_err().to_string().contains("was used already"));

    // The program that stored it takes it back.
    let stored = store();
    go_on(&path, 0).unwrap();
    stored.take_back().unwrap();
    assert!(refused(&path).contains("was used already"));
    stored.take_back().unwrap();
}

#[test]
fn copied_memory_is_used_once_if_disks_go_on() {
    let (_dir, path) = place();
    let store = || store(CprReboot::new(&path, 0, false, copied()).used_once()).unwrap();
    let stored = store();
    let (value, memory, state) = go_on(&path, 0).unwrap();
    assert!(value == 42 && memory == content());
    assert!(refused(&path).contains("is in use by another program"));
    drop(state);
    go_on(&path, 0).unwrap().2.mark_used().unwrap();
    assert!(refused(&path).contains("was used already"));
    assert!(stored.take_back().unwrap_err().to_string().contains("was used already"));
    store().take_back().unwrap();
    assert!(refused(&path).contains("was used already"));
}

#[test]
fn shared_memory_without_a_name_is_refused_where_it_would_stay() {
    let (dir, path) = place();
    let services = Services::default();
    let fd = Arc::new(File::open("/dev/null").unwrap());
    services.registry.save("ram0", 0, FdKind::Memfd, FdPolicy::MustSurvive, &fd).unwrap();
    let host = Counter { backing: Some(Backing::Shared { name: "ram0".into(), id: 0 }), ..guest(1) };
    let mode = |in_place| Box::new(CprReboot::new(&path, 0, in_place, copied()));
    let error = Update::begin(&services, mode(true), &host).unwrap_err().to_string();
    assert!(
        error.starts_with("cpr-reboot is blocked: Memory region ram0 is shared memory without a file"),
        "{error}"
    );
    Update::begin(&services, mode(false), &host).unwrap();
    assert_eq!(names(&dir), [""; 0]);
}

#[test]
fn what_stands_before_the_offset_stays() {
    let (_dir, path) = place();
    fs::write(&path, b"somebody else's header, and more").unwrap();
    store(CprReboot::new(&path, 23, false, copied())).unwrap();
    assert_eq!(&fs::read(&path).unwrap()[..23], b"somebody else's header,");
    assert_eq!(go_on(&path, 23).unwrap().0, 42);
    store(CprReboot::new(&path, 4096, false, copied())).unwrap();
    assert_eq!(go_on(&path, 4096).unwrap().0, 42);
    assert!(refused(&path).contains("does not begin with CPRSTATE"));
}

#[test]
fn a_place_that_cannot_be_written_is_refused_at_once() {
    let (dir, path) = place();
    let error = |path: &Path| store(CprReboot::new(path, 0, false, copied())).unwrap_err();
    assert!(error(dir.path()).contains("directory"), "{}", error(dir.path()));
    assert!(error(Path::new("/dev/full")).contains("no regular file"));
    assert!(error(&dir.path().join("none/vm.state")).contains("cannot open state file"));
    assert!(error(Path::new("/proc/vm.state")).contains("cannot open state file"));
    assert!(!path.exists() && names(&dir).is_empty());
}

/// A file system of 1 MiB, until this is dropped.
struct Small(TempDir);

impl Small {
    fn mount() -> Option<Small> {
        let dir = tempfile::tempdir().unwrap();
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("none"), dir.path(), Some("tmpfs"), flags, Some("size=1m")).ok()?;
        Some(Small(dir))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = nix::mount::umount(self.0.path());
    }
}

#[test]
fn a_full_disk_leaves_the_old_file_and_the_guest() {
    let Some(small) = Small::mount() else {
        println!("SKIPPED a_full_disk_leaves_the_old_file_and_the_guest: mounting needs root");
        return;
    };
    let path = small.0.path().join("vm.state");
    fs::write(&path, "old").unwrap();
    let error = store(CprReboot::new(&path, 0, false, copied())).unwrap_err();
    assert!(error.contains("cpr-reboot could not hand over: cannot write state to file"), "{error}");
    assert!(error.contains("No space left"), "{error}");
    assert_eq!(
        (fs::read(&path).unwrap().as_slice(), names(&small.0)),
        (&b"old"[..], vec!["vm.state".into()])
    );
}

/// Memory that tells when it is read, and then cannot be.
struct Endless;

impl RamSource for Endless {
    fn extents(&self) -> io::Result<Vec<Range<u64>>> {
        Ok(std::iter::once(0..1 << 30).collect())
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(1);
        if offset > 8 << 20 {
            println!("\nwriting");
            std::thread::sleep(std::time::Duration::from_secs(60));
        }
        Ok(())
    }
}

#[test]
#[ignore = "started by the next one, to be killed"]
fn writes_until_it_is_killed() {
    let path = std::env::var_os("STATE_FILE").expect("the other test names a file");
    let memory = Memory { name: "ram0".into(), len: 1 << 30, kept: Kept::Copied(Arc::new(Endless)) };
    store(CprReboot::new(PathBuf::from(path), 0, false, vec![memory])).unwrap();
}

#[test]
fn a_writer_that_is_killed_leaves_the_old_file() {
    let (dir, path) = place();
    store(CprReboot::new(&path, 0, false, copied())).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "writes_until_it_is_killed", "--ignored", "--nocapture"])
        .env("STATE_FILE", &path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let heard = lines.map_while(Result::ok).any(|line| line == "writing");
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    assert!(heard, "the child never got that far");
    assert_eq!(go_on(&path, 0).unwrap().0, 42);
    assert_eq!(names(&dir), ["vm.state"]);
}

#[test]
fn files_of_others_are_named() {
    let (dir, path) = place();
    let write = |writer: FrameWriter| fs::write(&path, writer.finish(7)).unwrap();
    let mut main = FrameWriter::default();
    main.put_value("cpr-core/activity", 0, 1, &true).unwrap();
    write(main);
    assert!(
        refused(&path).contains("was written by another mode, which left the guest's RAM"),
        "{}",
        refused(&path)
    );
    let mut early = FrameWriter::default();
    early.put_value("cpr-core/update", 0, 1, &("cpr-else", 3_u64)).unwrap();
    write(early);
    assert!(
        refused(&path).ends_with("was written by mode 'cpr-else', not by cpr-reboot"),
        "{}",
        refused(&path)
    );
    let mut later = FrameWriter::default();
    later.put("cpr-reboot/file", 0, 2, Vec::new()).unwrap();
    write(later);
    assert!(refused(&path).contains("'cpr-reboot/file' has version 2; this program reads version 1"));
    fs::write(&path, "CPRSTATE\x02\0\0\0").unwrap();
    assert!(refused(&path).contains("version 2 is newer than this program knows"));
    fs::write(&path, "").unwrap();
    assert!(refused(&path).contains("truncated: 0 bytes of 40"));
    assert!(refused(&dir.path().join("none")).contains("cannot read state file"));
    assert!(refused(dir.path()).contains("cannot read state file"));
    assert!(refused(Path::new("/dev/null")).contains("no regular file"));
}

#[test]
fn frames_of_two_updates_are_refused() {
    let (dir, path) = place();
    store(CprReboot::new(&path, 0, false, copied())).unwrap();
    let other = dir.path().join("other");
    store(CprReboot::new(&other, 0, false, copied())).unwrap();
    let early_len = |path: &Path| {
        let mut header = [0; HEADER_LEN];
        File::open(path).unwrap().read_exact_at(&mut header, 0).unwrap();
        Header::parse(&header).unwrap().total_len as usize
    };
    let (first, second) = (fs::read(&path).unwrap(), fs::read(&other).unwrap());
    let mixed = [&first[..early_len(&path)], &second[early_len(&other)..]].concat();
    fs::write(&path, mixed).unwrap();
    assert!(refused(&path).contains("its two frames are of different updates"));
}

/// The same file with more, fewer or other bytes in it.
#[derive(Debug, Clone)]
enum Damage {
    Bit(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    More(Vec<u8>),
    Lost(prop::sample::Index, usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        4 => (at(), 0..8_u8).prop_map(|(at, bit)| Damage::Bit(at, bit)),
        1 => at().prop_map(Damage::Cut),
        1 => prop::collection::vec(any::<u8>(), 1..100).prop_map(Damage::More),
        1 => (at(), 1..5000_usize).prop_map(|(at, len)| Damage::Lost(at, len)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn damage_is_found(damages in prop::collection::vec(damage(), 1..3), small in any::<bool>()) {
        let (dir, path) = place();
        // Of a small file most is frames, of the other one most is RAM.
        let memory = if small { in_file(&dir.path().join("ram")) } else { copied() };
        store(CprReboot::new(&path, 0, small, memory)).unwrap();
        let good = fs::read(&path).unwrap();
        let mut bytes = good.clone();
        for damage in damages {
            let len = bytes.len();
            match damage {
                Damage::Bit(at, bit) if len > 0 => bytes[at.index(len)] ^= 1 << bit,
                Damage::Cut(at) if len > 0 => bytes.truncate(at.index(len)),
                Damage::More(more) => bytes.extend(more),
                Damage::Lost(at, count) if len > 0 => {
                    let at = at.index(len);
                    bytes.drain(at..(at + count).min(len));
                }
                _ => {}
            }
        }
        prop_assume!(bytes != good);
        fs::write(&path, &bytes).unwrap();
        let result = go_on(&path, 0);
        prop_assert!(result.is_err());
        prop_assert!(result.err().unwrap().to_string().contains("vm.state"));
    }
}
