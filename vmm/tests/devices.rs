//! Disks, networks, randomness and a console through updates, as far as the host sees them: what is open stays open, what
//! is locked stays locked, and nothing is opened anew. The built-in guest has no drivers; with drivers it is
//! `lab_devices.rs`.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use oslib::pidfd::PidFd;
use oslib::tap::{self, Interface};
use oslib::{cloexec, locks};
use serde_json::json;
use tempfile::TempDir;
use testkit::network::{Links, ip};
use testkit::process;
use testkit::{Machine, PATIENCE, Vmm, VmmBuilder, binary, need_kvm, need_network, wait_for};

/// The locks of a program that writes to an image and allows no other writer, as QEMU has them: it reads (100), it writes
/// (101), nobody else may write (201).
const LOCKS: [i64; 3] = [100, 101, 201];
const IMAGES: [&str; 2] = ["first.img", "second.img"];
const NAMED: &str = "named0";
const GIVEN: &str = "given0";
const QUEUES: usize = 2;
/// Of the named tap: nobody who runs tests.
const OWNER: u32 = 54321;
/// Under these a process cannot open that tap any more, and goes on with one that it has.
const UNPRIVILEGED: [&str; 3] = ["setpriv", "--bounding-set=-net_admin", "--"];
const SIGKILL: i32 = 9;

/// The guests of this file would take each other's CPUs.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is behind the devices of a machine.
struct Backing {
    folder: TempDir,
    /// Of a tap that is there for as long as somebody has it open.
    given: Vec<OwnedFd>,
    more: Vec<String>,
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

impl Backing {
    fn make() -> anyhow::Result<Backing> {
        let folder = tempfile::tempdir()?;
        for image in IMAGES {
            File::create(folder.path().join(image))?.set_len(1 << 20)?;
        }
        ip(&format!("tuntap add dev {NAMED} mode tap multi_queue vnet_hdr user {OWNER}"))?;
        ip(&format!("link set dev {NAMED} up"))?;
        Ok(Backing { folder, given: given_tap()?, more: Vec::new() })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn options(&self) -> Vec<String> {
        let [first, second] = IMAGES.map(|image| self.path(image).display().to_string());
        let numbers: Vec<_> = self.given.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
        // A target finds its descriptors by the netdev's id.
        let numbers = if numbers.is_empty() { "100:101".to_owned() } else { numbers.join(":") };
        let options = [
            format!("-drive file={first},if=none,id=d0,format=raw,aio=io_uring"),
            "-device virtio-blk-pci,drive=d0,serial=one,num-queues=2,addr=2".to_owned(),
            format!("-drive file={second},if=none,id=d1,format=raw,aio=threads,discard=unmap"),
            "-device virtio-blk-pci,drive=d1,addr=3".to_owned(),
            format!("-netdev tap,id=n0,ifname={NAMED},queues={QUEUES},script=no,downscript=no"),
            "-device virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01,addr=4".to_owned(),
            format!("-netdev tap,id=n1,fds={numbers}"),
            "-device virtio-net-pci,netdev=n1,mac=52:54:00:00:00:02,addr=5".to_owned(),
            "-device virtio-rng-pci,addr=6".to_owned(),
            format!("-chardev socket,id=c0,path={},server=on,wait=off", self.path("console").display()),
            "-device virtio-serial-pci,addr=7 -device virtconsole,chardev=c0".to_owned(),
        ];
        let options = options.iter().flat_map(|line| line.split(' ').map(String::from));
        options.chain(self.more.clone()).collect()
    }

    fn builder(&self) -> VmmBuilder {
        let options = self.options();
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        VmmBuilder::new().cpus(2).args(&["-append", "cpus=2"]).args(&options)
    }

    /// Starts it with the given tap, which nobody else has from then on.
    fn start(&mut self, builder: VmmBuilder) -> anyhow::Result<Machine> {
        self.given.iter().try_for_each(cloexec::clear)?;
        let machine = Machine::start(builder)?;
        self.given.clear();
        Ok(machine)
    }

    /// Nothing is held any more.
    fn is_released(&self) -> anyhow::Result<()> {
        for image in IMAGES.map(|image| self.path(image)).iter().filter(|image| image.exists()) {
            ensure!(held(&File::open(image)?)?.is_empty(), "{} is locked", image.display());
        }
        ensure!(ip(&format!("link show dev {GIVEN}")).is_err(), "somebody has {GIVEN}");
        let carrier = ip(&format!("link show dev {NAMED}"))?;
        ensure!(carrier.contains("NO-CARRIER"), "somebody has {NAMED}: {carrier}");
        ensure!(!self.path("console").exists(), "the console's socket is there");
        Ok(())
    }
}

fn given_tap() -> anyhow::Result<Vec<OwnedFd>> {
    let queues = (0..QUEUES).map(|_| Ok(tap::open(GIVEN, true)?)).collect::<anyhow::Result<_>>()?;
    ip(&format!("link set dev {GIVEN} up"))?;
    Ok(queues)
}

/// Those of the locks that somebody else has.
fn held(image: &File) -> anyhow::Result<Vec<i64>> {
    let mut held = Vec::new();
    for byte in LOCKS {
        if locks::is_held_by_another(image, byte)? {
            held.push(byte);
        }
    }
    Ok(held)
}

/// Looks at the locks of images all the time.
struct LockWatch {
    stop: Arc<AtomicBool>,
    watcher: JoinHandle<anyhow::Result<u64>>,
}

impl LockWatch {
    fn start(images: Vec<File>) -> LockWatch {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let watcher = std::thread::spawn(move || {
            let mut looks = 0;
            while !stopped.load(Ordering::Relaxed) {
                for image in &images {
                    let held = held(image)?;
                    ensure!(held == LOCKS, "locked are {held:?} of {image:?} at look {looks}");
                }
                looks += 1;
                std::thread::sleep(Duration::from_micros(100));
            }
            Ok(looks)
        });
        LockWatch { stop, watcher }
    }

    fn finish(self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let looks = self.watcher.join().expect("the watcher does not panic")?;
        ensure!(looks > 10, "the watcher looked {looks} times only");
        Ok(())
    }
}

/// What no update may change, seen from the host.
struct Watch {
    locks: LockWatch,
    links: Links,
    console: UnixStream,
    before: Network,
    images: Vec<PathBuf>,
}

/// Interfaces as the kernel describes them, and as the descriptors of a process do.
#[derive(Debug, PartialEq, Eq)]
struct Network {
    links: [String; 2],
    taps: Vec<String>,
}

impl Network {
    fn of(pid: u32) -> anyhow::Result<Network> {
        let link = |name| ip(&format!("-d -o link show dev {name}"));
        let (process, mut taps) = (PidFd::open(pid)?, Vec::new());
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let entry = entry?;
            if fs::read_link(entry.path()).is_ok_and(|target| target == Path::new("/dev/net/tun")) {
                let tap = process.copy_descriptor(entry.file_name().to_string_lossy().parse()?)?;
                let Interface { name, multi_queue, attached } = tap::interface(&tap)?;
                let header = tap::vnet_header_len(&tap)?;
                ensure!(tap::is_nonblocking(&tap)?, "{name} blocks");
                taps.push(format!("{name} {multi_queue} {attached} {header}"));
            }
        }
        taps.sort_unstable();
        Ok(Network { links: [link(NAMED)?, link(GIVEN)?], taps })
    }
}

impl Watch {
    fn start(backing: &Backing, machine: &mut Machine) -> anyhow::Result<Watch> {
        let images = IMAGES.map(|image| backing.path(image)).to_vec();
        let open = images.iter().map(File::open).collect::<Result<_, _>>()?;
        let mut console = UnixStream::connect(backing.path("console"))?;
        console.set_nonblocking(true)?;
        console.write_all(b"typed ahead\n")?;
        for name in [NAMED, GIVEN] {
            // The kernel notices carriers some time later.
            let is_up = |link: &String| link.contains("LOWER_UP") && !link.contains("state DOWN");
            let is_up = || ip(&format!("link show dev {name}")).ok().filter(is_up);
            wait_for("a carrier", PATIENCE, is_up)?;
        }
        let links = Links::watch(NAMED)?;
        let before = Network::of(machine.vmm.pid())?;
        ensure!(before.taps.len() == 2 * QUEUES, "{before:?}");
        ensure!(before.taps.iter().all(|tap| tap.contains(" true ") && tap.ends_with(" 12")), "{before:?}");
        let mut watch = Watch { locks: LockWatch::start(open), links, console, before, images };
        watch.look(machine)?;
        Ok(watch)
    }

    /// The guest runs in one process, which has everything, and nobody else can have an image.
    fn look(&mut self, machine: &mut Machine) -> anyhow::Result<u32> {
        let runner = machine.runner()?;
        machine.verify()?;
        let now = Network::of(runner)?;
        ensure!(now == self.before, "{:#?} became {now:#?}", self.before);
        let told = self.links.told()?;
        ensure!(told.is_empty(), "{told}");
        match self.console.read(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            other => bail!("the console's connection: {other:?}"),
        }
        for image in self.images.iter().filter(|image| image.exists()) {
            refuses_image(image)?;
        }
        Ok(runner)
    }

    /// Ends the program: then, and not before, all of it is free.
    fn finish(mut self, backing: &Backing, vmm: Vmm) -> anyhow::Result<()> {
        self.locks.finish()?;
        self.console.set_nonblocking(false)?;
        self.console.set_read_timeout(Some(PATIENCE))?;
        end(vmm)?;
        ensure!(self.console.read(&mut [0])? == 0, "the console has said something");
        backing.is_released()?;
        let told = self.links.told()?;
        ensure!(told.contains(GIVEN), "the end of {GIVEN} was not told: {told}");
        Ok(())
    }
}

/// Ends the program, in whatever process it is by now.
fn end(mut vmm: Vmm) -> anyhow::Result<()> {
    vmm.qmp().execute("quit", json!({}))?;
    wait_for("the end of every process", PATIENCE, || vmm.processes().is_empty().then_some(()))
}

/// Another program is refused the image of a running guest.
fn refuses_image(image: &Path) -> anyhow::Result<()> {
    let drive = format!("file={},format=raw", image.display());
    let other =
        Command::new(binary()).args(["-nodefaults", "-display", "none", "-drive", &drive]).output()?;
    let said = String::from_utf8_lossy(&other.stderr);
    ensure!(other.status.code() == Some(1), "{:?}: {said}", other.status);
    ensure!(said.contains(&format!("{} is in use: another process writes to it", image.display())), "{said}");
    Ok(())
}

/// A command that becomes another one with fewer privileges.
fn unprivileged(command: Vec<String>) -> Vec<String> {
    [words(&UNPRIVILEGED), command].concat()
}

fn replaced(words: Vec<String>, old: &str, new: &str) -> Vec<String> {
    words.into_iter().map(|word| word.replace(old, new)).collect()
}

fn go_through_execs(sandbox: &[&str]) -> anyhow::Result<()> {
    let mut backing = Backing::make()?;
    backing.more = words(sandbox);
    let mut machine = backing.start(backing.builder())?;
    let mut watch = Watch::start(&backing, &mut machine)?;
    let pid = machine.vmm.pid();
    machine.vmm.update()?;
    ensure!(watch.look(&mut machine)? == pid);
    machine.vmm.update_by_file()?;
    ensure!(watch.look(&mut machine)? == pid);
    // Nothing could be opened any more.
    fs::remove_file(backing.path(IMAGES[0]))?;
    fs::rename(backing.path(IMAGES[1]), backing.path("elsewhere.img"))?;
    watch.images = vec![backing.path("elsewhere.img")];
    let command = unprivileged(machine.vmm.exec_command("memfd:"));
    machine.vmm.set_exec(&command)?;
    machine.vmm.migrate("memfd:")?;
    ensure!(watch.look(&mut machine)? == pid);
    let said = machine.vmm.stderr();
    ensure!(said.is_empty(), "{said}");
    watch.finish(&backing, machine.vmm)
}

#[test]
fn a_guest_with_devices_lives_through_execs() -> anyhow::Result<()> {
    need_kvm!();
    need_network!();
    let _alone = alone();
    go_through_execs(&[])
}

#[test]
fn a_guest_with_devices_lives_through_execs_in_a_sandbox() -> anyhow::Result<()> {
    need_kvm!();
    need_network!();
    let _alone = alone();
    go_through_execs(&["-sandbox", "on,elevateprivileges=deny,resourcecontrol=deny"])
}

#[test]
fn a_guest_with_devices_moves_to_other_processes() -> anyhow::Result<()> {
    need_kvm!();
    need_network!();
    let _alone = alone();
    for sandbox in [&[][..], &["-sandbox", "on,elevateprivileges=deny,resourcecontrol=deny,spawn=deny"]] {
        let mut backing = Backing::make()?;
        backing.more = words(sandbox);
        let mut machine = backing.start(backing.builder())?;
        let mut watch = Watch::start(&backing, &mut machine)?;
        for generation in 1..=3 {
            if generation == 3 {
                fs::remove_file(backing.path(IMAGES[0]))?;
                watch.images.remove(0);
            }
            let builder = backing.builder().wrapper(&UNPRIVILEGED).target("unix:main.sock");
            let mut target = builder.start()?;
            let info = machine.vmm.transfer(&mut target)?;
            ensure!(info["cpr"]["generation"] == generation, "{info}");
            machine.follow(target)?.quit()?;
            ensure!(watch.look(&mut machine)? == machine.vmm.pid());
            ensure!(machine.vmm.stderr().is_empty(), "{}", machine.vmm.stderr());
        }
        watch.finish(&backing, machine.vmm)?;
        ip(&format!("tuntap del dev {NAMED} mode tap multi_queue"))?;
    }
    Ok(())
}

#[test]
fn a_guest_with_devices_rests_and_goes_on() -> anyhow::Result<()> {
    need_kvm!();
    need_network!();
    let _alone = alone();
    for sandbox in [&[][..], &["-sandbox", "on,elevateprivileges=deny,resourcecontrol=deny,spawn=deny"]] {
        let mut backing = Backing::make()?;
        backing.more = words(sandbox);
        let mut machine = backing.start(backing.builder())?;
        let uri = format!("file:{}", backing.path("vm.state").display());
        machine.vmm.store(&uri)?;
        // Until it ends, its guest can go on in it.
        refuses_image(&backing.path(IMAGES[0]))?;
        machine.vmm.quit()?;
        backing.is_released()?;
        // A program that has nothing inherited opens everything.
        backing.given = given_tap()?;
        backing.given.iter().try_for_each(cloexec::clear)?;
        let vmm = backing.builder().incoming(&uri).start()?;
        backing.given.clear();
        let guest = vmm.guest()?;
        guest.beats_on(0)?;
        ensure!(Network::of(vmm.pid())?.taps.len() == 2 * QUEUES);
        for image in IMAGES {
            refuses_image(&backing.path(image))?;
        }
        ensure!(vmm.stderr().is_empty(), "{}", vmm.stderr());
        vmm.quit()?;
        backing.is_released()?;
        ip(&format!("tuntap del dev {NAMED} mode tap multi_queue"))?;
    }
    Ok(())
}

#[test]
fn failed_updates_leave_devices_as_they_were() -> anyhow::Result<()> {
    need_kvm!();
    need_network!();
    let _alone = alone();
    let mut backing = Backing::make()?;
    let mut machine = backing.start(backing.builder())?;
    let mut watch = Watch::start(&backing, &mut machine)?;
    machine.vmm.set_preflight("off")?;
    let pid = machine.vmm.pid();
    // One that adopts them, and refuses the state.
    let command = replaced(machine.vmm.exec_command("memfd:"), "serial=one", "serial=two");
    machine.begin(&command, "memfd:")?;
    let error = machine.has_failed()?;
    ensure!(error.contains("has serial=one, the command line says serial=two"), "{error}");
    ensure!(watch.look(&mut machine)? == pid);
    // One that is killed once it has them.
    let command = machine.vmm.exec_command("defer");
    machine.begin(&command, "memfd:")?;
    wait_for("the target", PATIENCE, || machine.vmm.status().ok().filter(|status| status == "inmigrate"))?;
    process::send_signal(pid, SIGKILL)?;
    let error = machine.has_failed()?;
    ensure!(error.contains("killed by signal 9"), "{error}");
    let keeper = watch.look(&mut machine)?;
    ensure!(keeper != pid);
    machine.vmm.update()?;
    ensure!(watch.look(&mut machine)? == keeper);
    // And a process beside.
    let mut target = backing.builder().target("defer").start()?;
    machine.vmm.begin_transfer(&target.cpr_socket())?;
    wait_for("the target's machine", PATIENCE, || {
        Network::of(target.pid()).ok().filter(|network| network.taps.len() == 2 * QUEUES)
    })?;
    process::send_signal(target.pid(), SIGKILL)?;
    machine.has_failed()?;
    ensure!(target.wait_exit()?.is_none());
    drop(target);
    ensure!(watch.look(&mut machine)? == keeper);
    watch.finish(&backing, machine.vmm)
}

#[test]
fn nothing_piles_up_over_twenty_updates() -> anyhow::Result<()> {
    need_kvm!();
    need_network!();
    let _alone = alone();
    let mut backing = Backing::make()?;
    let mut machine = backing.start(backing.builder())?;
    let mut watch = Watch::start(&backing, &mut machine)?;
    let mut census = |machine: &mut Machine| {
        watch.look(machine)?;
        machine.vmm.census()
    };
    let mut before = None;
    for update in 1..=20 {
        machine.vmm.update()?;
        if update == 2 {
            before = Some(census(&mut machine)?);
        }
    }
    let before = before.context("the second update is one of them")?;
    census(&mut machine)?.check_against(&before, 1024)?;
    watch.finish(&backing, machine.vmm)
}

/// What a preflight finds, in the new command line: what is replaced, by what, and what is said.
const DIFFERENCES: [(&str, &str, &str); 7] = [
    (
        "one,num-queues=2,addr=2",
        "one,num-queues=2,addr=a",
        "the guest has virtio-blk-pci at slot 2, the command line has nothing there",
    ),
    ("addr=6", "addr=1e", "the guest has virtio-rng-pci at slot 6, the command line has nothing there"),
    (
        "virtio-rng-pci",
        "virtio-serial-pci",
        "the guest has virtio-rng-pci at slot 6, the command line has virtio-serial-pci there",
    ),
    ("d0", "other", "virtio-blk-pci at slot 2 has drive=d0, the command line says drive=other"),
    ("serial=one", "serial=two", "virtio-blk-pci at slot 2 has serial=one, the command line says serial=two"),
    (
        "num-queues=2",
        "num-queues=1",
        "virtio-blk-pci at slot 2 has num-queues=2, the command line says num-queues=1",
    ),
    (",queues=2", ",queues=1", "virtio-net-pci at slot 4 has queues=2, the command line says queues=1"),
];

#[test]
fn a_command_line_with_other_devices_is_refused_beforehand() -> anyhow::Result<()> {
    need_kvm!();
    need_network!();
    let _alone = alone();
    let mut backing = Backing::make()?;
    let mut machine = backing.start(backing.builder())?;
    let mut watch = Watch::start(&backing, &mut machine)?;
    let pid = machine.vmm.pid();
    let refused = |machine: &mut Machine, expected: &str| {
        let error = machine.has_failed()?;
        ensure!(error.contains("preflight") && error.contains(expected), "{error}");
        anyhow::Ok(())
    };
    let own = backing.options();
    let mut others: Vec<_> =
        DIFFERENCES.iter().map(|(old, new, said)| (replaced(own.clone(), old, new), *said)).collect();
    // Without its disks; and with more.
    others.push((
        own[8..].to_vec(),
        "the guest has virtio-blk-pci at slot 2, the command line has nothing there",
    ));
    let more = [own.clone(), words(&["-device", "virtio-rng-pci,addr=1f"])].concat();
    others.push((more, "the command line has virtio-rng-pci at slot 1f, the guest has nothing there"));
    for (options, expected) in others {
        let mut command = machine.vmm.exec_command("memfd:");
        let at = command.iter().position(|word| *word == own[0]).context("there are devices")?;
        command.splice(at..at + own.len(), options.clone());
        machine.begin(&command, "memfd:")?;
        refused(&mut machine, expected).context("cpr-exec")?;
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let target = VmmBuilder::new().cpus(2).args(&["-append", "cpus=2"]).args(&options);
        let target = target.target("unix:main.sock").start()?;
        machine.vmm.begin_transfer(&target.cpr_socket())?;
        refused(&mut machine, expected).context("cpr-transfer")?;
        ensure!(Network::of(target.pid())?.taps.is_empty(), "the target has a tap");
    }
    ensure!(watch.look(&mut machine)? == pid);
    watch.finish(&backing, machine.vmm)
}

#[test]
fn a_guest_of_the_first_machine_type_goes_on_without_a_bus() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let mut machine = Machine::start(VmmBuilder::new().args(&["-M", "microvm-0.1"]))?;
    for machine_type in ["microvm-0.1", "microvm", "microvm"] {
        let command = replaced(machine.vmm.exec_command("memfd:"), "microvm-0.1", machine_type);
        machine.vmm.set_exec(&command)?;
        machine.vmm.migrate("memfd:")?;
        machine.beats_on()?;
        ensure!(machine.vmm.qmp().execute("query-pci", json!({}))? == json!([]));
    }
    let mut target = VmmBuilder::new().args(&["-M", "microvm"]).target("unix:main.sock").start()?;
    machine.vmm.transfer(&mut target)?;
    machine.follow(target)?.quit()?;
    machine.beats_on()?;
    // It has no place for a device, and does not become a later machine.
    for (options, expected) in [
        (&["-device", "virtio-rng-pci"][..], "machine type 'microvm-0.1' has no PCI bus"),
        (&["-M", "microvm-0.2"], "the guest's machine type is 'microvm-0.1'"),
    ] {
        let command = [machine.vmm.exec_command("memfd:"), words(options)].concat();
        machine.begin(&command, "memfd:")?;
        let error = machine.has_failed()?;
        ensure!(error.contains(expected), "{error}");
    }
    machine.beats_on()?;
    machine.verify()?;
    machine.vmm.quit()
}
