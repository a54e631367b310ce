//! A Linux guest with disks, a network card, a console and a source of random numbers on PCI lives through updates under
//! I/O: no write is lost, none repeated, no file system damaged, no byte of a connection lost, no link flaps. What is
//! looked at is looked at from outside: images after the end, the far end of a connection, the tap.
//!
//! The tests named `control_...` do the same with QEMU in place of `cpr-vmm` and without updates: they show that the
//! agent, the comparison and the guest's drivers are in order. In the nested lab alone (`cargo xtask lab`).

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use oslib::vhost::{Vhost, VhostError};
use tempfile::TempDir;
use testkit::blocks::{self, BLOCK_BYTES};
use testkit::lab::{
    Boot, COMMAND_LIMIT, Lab, Linux, Mode, Report, Target, log_has_nothing_new, remember_log, watched,
};
use testkit::process::{SIGINT, send_signal};
use testkit::{Console, PATIENCE, need_lab};
use vmm_core::memory::{Backend, BackendConfig, BackendKind, GuestRam};
use vmm_core::virtio::net::check_vhost;

const UPDATES: u32 = 6;

/// Who runs the guest.
#[derive(Clone, Copy)]
enum Under {
    /// `cpr-vmm`, which is updated by this mode.
    Updates(Mode),
    /// QEMU, which is not.
    Qemu,
}

impl Under {
    fn boot(self, lab: Lab, cpus: u8, devices: &[&str]) -> anyhow::Result<Linux> {
        let boot = match self {
            Under::Updates(mode) => Boot::new(&lab, mode, cpus),
            Under::Qemu => Boot::new(&lab, Mode::Exec, cpus)
                .program("qemu-system-x86_64".into(), &[])
                .args(&["-machine", "q35,accel=kvm", "-cpu", "host", "-m", "256M"]),
        };
        boot.args(devices).boot(lab)
    }

    /// What the guest's devices are used through.
    fn happen(self, linux: &mut Linux) -> anyhow::Result<()> {
        for _ in 0..UPDATES {
            std::thread::sleep(Duration::from_millis(500));
            if let Under::Updates(_) = self {
                linux.update(Target::Good)?;
            }
        }
        std::thread::sleep(Duration::from_millis(500));
        Ok(())
    }
}

fn good(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(
        output.status.success(),
        "{command:?}: {}: {}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    Ok(())
}

// Disks.

/// Blocks on the bare disk, and of the file on the one with a file system.
const BARE_BLOCKS: u64 = 4096;
const FILE_BLOCKS: u64 = 1024;

struct Disks {
    folder: TempDir,
}

impl Disks {
    fn make() -> anyhow::Result<Disks> {
        let disks = Disks { folder: tempfile::tempdir()? };
        File::create(disks.bare())?.set_len(BARE_BLOCKS * BLOCK_BYTES)?;
        File::create(disks.formatted())?.set_len(64 << 20)?;
        good(Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(disks.formatted()))?;
        Ok(disks)
    }

    fn bare(&self) -> PathBuf {
        self.folder.path().join("bare.img")
    }

    fn formatted(&self) -> PathBuf {
        self.folder.path().join("formatted.img")
    }

    fn options(&self) -> Vec<String> {
        let disk = |id: &str, image: &Path| {
            let drive = format!("file={},if=none,id={id},format=raw", image.display());
            ["-drive".to_owned(), drive, "-device".to_owned(), format!("virtio-blk-pci,drive={id}")]
        };
        [disk("d0", &self.bare()), disk("d1", &self.formatted())].concat()
    }

    /// Both images hold what was written last, and the file system is clean.
    fn hold(&self, bare: u64, file: u64) -> anyhow::Result<()> {
        blocks::verify(&self.bare(), BARE_BLOCKS, bare).context("the bare disk")?;
        good(Command::new("e2fsck").arg("-fn").arg(self.formatted()))?;
        let copy = self.folder.path().join("file");
        let dump = format!("dump /file {}", copy.display());
        good(Command::new("debugfs").args(["-R", &dump]).arg(self.formatted()))?;
        blocks::verify(&copy, FILE_BLOCKS, file).context("the file on the other disk")
    }
}

fn disks(under: Under, cpus: u8) -> anyhow::Result<()> {
    let lab = need_lab!();
    let disks = Disks::make()?;
    let options = disks.options();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let mut linux = under.boot(lab, cpus, &options)?;
    let written = write_through(&mut linux, under);
    let (bare, file) = written.with_context(|| format!("the VMM said: {}", linux.said()))?;
    linux.power_off()?;
    disks.hold(bare.try_into()?, file.try_into()?)
}

/// Both disks are written to all the time; gives the numbers of the last writes.
fn write_through(linux: &mut Linux, under: Under) -> anyhow::Result<(i64, i64)> {
    let mounted = linux.run("mkdir -p /mnt && mount -t ext4 /dev/vdb /mnt && echo mounted")?;
    ensure!(mounted == "mounted", "{mounted}");
    remember_log(linux)?;
    let watches = [format!("disk 600 {BARE_BLOCKS} /dev/vda"), format!("disk 600 {FILE_BLOCKS} /mnt/file")];
    let watches = [watches[0].as_str(), watches[1].as_str()];
    let printed = watched(linux, &watches, COMMAND_LIMIT, |linux| under.happen(linux))?;
    let [bare, file] = [Report::parse(&printed[0], "disk")?, Report::parse(&printed[1], "disk")?];
    for report in [&bare, &file] {
        linux.step(&report.line);
        ensure!(report.get("enough")? == 1, "the watch ended by itself: {}", report.line);
        ensure!(report.get("wrong")? == 0, "what was read was not what was written: {}", report.line);
        ensure!(report.get("last")? > i64::from(UPDATES), "hardly anything was written: {}", report.line);
    }
    log_has_nothing_new(linux)?;
    let unmounted = linux.run("umount /mnt && sync && echo unmounted")?;
    ensure!(unmounted == "unmounted", "{unmounted}");
    linux.lab.note(&format!(
        "{} and {} writes with fsync, the longest {} and {} us",
        bare.get("last")?,
        file.get("last")?,
        bare.get("longest_us")?,
        file.get("longest_us")?,
    ))?;
    Ok((bare.get("last")?, file.get("last")?))
}

#[test]
fn disks_with_one_vcpu_by_exec() -> anyhow::Result<()> {
    disks(Under::Updates(Mode::Exec), 1)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn disks_with_four_vcpus_by_exec() -> anyhow::Result<()> {
    disks(Under::Updates(Mode::Exec), 4)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn disks_with_one_vcpu_by_transfer() -> anyhow::Result<()> {
    disks(Under::Updates(Mode::Transfer), 1)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn disks_with_four_vcpus_by_transfer() -> anyhow::Result<()> {
    disks(Under::Updates(Mode::Transfer), 4)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn control_disks_under_qemu() -> anyhow::Result<()> {
    disks(Under::Qemu, 1)
}

// Network.

/// A tap between us, at `.1`, and the guest, at `.2`.
struct Tap;

impl Tap {
    const NAME: &str = "tap0";
    const HOST: &str = "10.11.0.1";
    const GUEST: &str = "10.11.0.2";
    const NETDEV: &str = "tap,id=n0,ifname=tap0,script=no,downscript=no";

    fn make() -> anyhow::Result<Tap> {
        for line in [
            format!("tuntap add {} mode tap vnet_hdr", Tap::NAME),
            format!("addr add {}/24 dev {}", Tap::HOST, Tap::NAME),
            format!("link set {} up", Tap::NAME),
        ] {
            good(Command::new("ip").args(line.split(' ')))?;
        }
        Ok(Tap)
    }

    /// How often the link came or went, as the kernel counts it.
    fn carrier_changes(&self) -> anyhow::Result<String> {
        Ok(fs::read_to_string(format!("/sys/class/net/{}/carrier_changes", Tap::NAME))?)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", Tap::NAME]).status();
    }
}

/// What came over a stream of numbers.
struct Stream {
    last: u64,
    longest_gap: Duration,
}

/// Takes the stream of the agent's `send`, until its end.
fn receive(listener: TcpListener) -> JoinHandle<anyhow::Result<Stream>> {
    std::thread::spawn(move || {
        let (mut connection, _) = listener.accept()?;
        connection.set_read_timeout(Some(PATIENCE))?;
        let mut stream = Stream { last: 0, longest_gap: Duration::ZERO };
        let mut previous = Instant::now();
        loop {
            let mut number = [0; 8];
            match connection.read_exact(&mut number) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(stream),
                Err(error) => {
                    return Err(error).context(format!("the connection after number {}", stream.last));
                }
            }
            let number = u64::from_be_bytes(number);
            ensure!(number == stream.last + 1, "number {number} came after {}", stream.last);
            stream.last = number;
            stream.longest_gap = stream.longest_gap.max(previous.elapsed());
            previous = Instant::now();
        }
    })
}

/// ping(8), every 10 ms.
struct Ping {
    child: Child,
}

impl Ping {
    fn start() -> anyhow::Result<Ping> {
        let mut ping = Command::new("ping");
        ping.args(["-n", "-D", "-i", "0.01", Tap::GUEST]);
        let child = ping.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot run ping")?;
        Ok(Ping { child })
    }

    /// Ends it; gives how many were answered, how many were not, and the longest time between two answers.
    fn end(self) -> anyhow::Result<(usize, usize, Duration)> {
        send_signal(self.child.id(), SIGINT)?;
        let output = self.child.wait_with_output()?;
        answers(&String::from_utf8_lossy(&output.stdout))
    }
}

/// Reads lines such as `[1767222000.123456] 64 bytes from 10.11.0.2: icmp_seq=1 ttl=64 time=0.5 ms`.
fn answers(printed: &str) -> anyhow::Result<(usize, usize, Duration)> {
    let answers: Vec<(f64, usize)> = printed
        .lines()
        .filter_map(|line| {
            let (time, rest) = line.strip_prefix('[')?.split_once(']')?;
            let number = rest.split_once("icmp_seq=")?.1.split(' ').next()?;
            Some((time.parse().ok()?, number.parse().ok()?))
        })
        .collect();
    let highest = answers.iter().map(|&(_, number)| number).max().context("nobody answered a ping")?;
    let gaps = answers.windows(2).map(|pair| pair[1].0 - pair[0].0);
    Ok((answers.len(), highest - answers.len(), Duration::from_secs_f64(gaps.fold(0.0, f64::max))))
}

/// Who carries packets between the guest and the tap.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Carrier {
    /// The program that runs the guest.
    Program,
    /// vhost-net, which each program opens.
    Kernel,
    /// vhost-net, by a descriptor that the first program was started with.
    Passed,
}

/// Opens the descriptor of [`Carrier::Passed`], unless an update has brought it, and becomes the program.
const PASS_VHOST: &str =
    "#!/bin/bash\n[ -e /proc/self/fd/9 ] || exec 9<>/dev/vhost-net\nexec \"$VMM\" \"$@\"\n";

impl Carrier {
    fn netdev(self) -> String {
        let vhost = match self {
            Carrier::Program => "vhost=off",
            Carrier::Kernel => "vhost=on",
            Carrier::Passed => "vhost=on,vhostfd=9",
        };
        format!("{},{vhost}", Tap::NETDEV)
    }

    fn boot(self, under: Under, lab: Lab, cpus: u8, folder: &Path) -> anyhow::Result<Linux> {
        let netdev = self.netdev();
        let device = ["-netdev", &netdev, "-device", "virtio-net-pci,netdev=n0"];
        // The kernel's thread is not hindered by what is denied to the program.
        let sandbox = match self {
            Carrier::Kernel => {
                &["-sandbox", "on,obsolete=deny,elevateprivileges=deny,resourcecontrol=deny"][..]
            }
            Carrier::Program | Carrier::Passed => &[],
        };
        let devices = [&device[..], sandbox].concat();
        if self != Carrier::Program {
            // Others do without, and with emulated CPUs a module takes a while.
            good(Command::new("modprobe").arg("vhost_net"))?;
        }
        let (Carrier::Passed, Under::Updates(mode)) = (self, under) else {
            return under.boot(lab, cpus, &devices);
        };
        let script = folder.join("pass-vhost");
        fs::write(&script, PASS_VHOST)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        let vmm = lab.vmm.display().to_string();
        Boot::new(&lab, mode, cpus).program(script, &[("VMM", &vmm)]).args(&devices).boot(lab)
    }

    /// The program's I/O thread reads and writes packets, or nothing but eventfds of 8 bytes; and the kernel's thread is there,
    /// or not.
    fn carries(self, pid: u32) -> anyhow::Result<()> {
        let by_kernel = self != Carrier::Program;
        let tasks = fs::read_dir(format!("/proc/{pid}/task"))?.map(|task| Ok(task?.path()));
        let tasks = tasks.collect::<std::io::Result<Vec<_>>>()?;
        let named = |name: &str| tasks.iter().find(|task| is_named(task, name));
        ensure!(named("vhost-").is_some() == by_kernel, "threads of vhost: {:?}", named("vhost-"));
        let io = fs::read_to_string(named("io").context("no I/O thread")?.join("io"))?;
        let count = |key: &str| -> anyhow::Result<u64> {
            let value = io.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
            Ok(value.with_context(|| format!("no {key} in {io}"))?.parse()?)
        };
        let only_eventfds = count("rchar")? <= 8 * count("syscr")? && count("wchar")? <= 8 * count("syscw")?;
        ensure!(only_eventfds == by_kernel, "the I/O thread: {io}");
        Ok(())
    }
}

fn is_named(task: &Path, prefix: &str) -> bool {
    fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with(prefix))
}

fn network(under: Under, cpus: u8) -> anyhow::Result<()> {
    network_by(under, cpus, Carrier::Program, |linux| under.happen(linux))
}

/// As [`network`], with packets that the kernel carries.
fn vhost(under: Under, cpus: u8, by: Carrier) -> anyhow::Result<()> {
    network_by(under, cpus, by, |linux| {
        by.carries(linux.vmm.pid())?;
        under.happen(linux)
    })
}

fn network_by(
    under: Under,
    cpus: u8,
    by: Carrier,
    happen: impl FnOnce(&mut Linux) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let lab = need_lab!();
    let tap = Tap::make()?;
    let folder = tempfile::tempdir()?;
    let mut linux = by.boot(under, lab, cpus, folder.path())?;
    let carried = carry(&mut linux, &tap, under, by, happen);
    carried.with_context(|| format!("the VMM said: {}", linux.said()))?;
    linux.power_off()
}

fn carry(
    linux: &mut Linux,
    tap: &Tap,
    under: Under,
    by: Carrier,
    happen: impl FnOnce(&mut Linux) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let set = linux.run(&format!("ifconfig eth0 {} netmask 255.255.255.0 up && echo up", Tap::GUEST))?;
    ensure!(set == "up", "{set}");
    let ping = format!("ping -c 1 -W 10 {} > /dev/null && echo there", Tap::HOST);
    ensure!(linux.run(&ping)? == "there", "the guest does not reach us: {}", linux.run("ifconfig -a")?);
    remember_log(linux)?;
    let carrier = tap.carrier_changes()?;
    let listener = TcpListener::bind((Tap::HOST, 0))?;
    let send = format!("send 600 {}", listener.local_addr()?);
    let stream = receive(listener);
    let ping = Ping::start()?;
    let printed = watched(linux, &[&send], COMMAND_LIMIT, |linux| {
        happen(linux)?;
        match under {
            Under::Updates(_) => by.carries(linux.vmm.pid()),
            Under::Qemu => Ok(()),
        }
    })?;
    let (answered, unanswered, longest) = ping.end()?;
    let stream = stream.join().ok().context("the receiver panicked")??;

    let report = Report::parse(&printed[0], "send")?;
    linux.step(&report.line);
    ensure!(report.get("enough")? == 1, "the watch ended by itself: {}", report.line);
    ensure!(report.get("last")? == i64::try_from(stream.last)?, "{} of {}", stream.last, report.line);
    // The last one may be under way when ping is ended.
    ensure!(unanswered <= 1, "{unanswered} pings of {} had no answer", answered + unanswered);
    ensure!(tap.carrier_changes()? == carrier, "the link went down meanwhile");
    log_has_nothing_new(linux)?;
    linux.lab.note(&format!(
        "{} bytes over TCP, longest gap {:?}; {answered} pings answered, {unanswered} not, longest gap {longest:?}",
        stream.last * 8,
        stream.longest_gap,
    ))
}

#[test]
fn network_with_four_vcpus_by_exec() -> anyhow::Result<()> {
    network(Under::Updates(Mode::Exec), 4)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn network_with_one_vcpu_by_exec() -> anyhow::Result<()> {
    network(Under::Updates(Mode::Exec), 1)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn network_with_four_vcpus_by_transfer() -> anyhow::Result<()> {
    network(Under::Updates(Mode::Transfer), 4)
}

#[test]
fn network_with_one_vcpu_by_transfer() -> anyhow::Result<()> {
    network(Under::Updates(Mode::Transfer), 1)
}

#[test]
fn network_by_vhost_with_one_vcpu_by_exec() -> anyhow::Result<()> {
    vhost(Under::Updates(Mode::Exec), 1, Carrier::Kernel)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn network_by_vhost_with_four_vcpus_by_exec() -> anyhow::Result<()> {
    vhost(Under::Updates(Mode::Exec), 4, Carrier::Kernel)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn network_by_vhost_with_one_vcpu_by_transfer() -> anyhow::Result<()> {
    vhost(Under::Updates(Mode::Transfer), 1, Carrier::Kernel)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn network_by_vhost_with_four_vcpus_by_transfer() -> anyhow::Result<()> {
    vhost(Under::Updates(Mode::Transfer), 4, Carrier::Kernel)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn network_by_a_passed_vhost_by_exec() -> anyhow::Result<()> {
    vhost(Under::Updates(Mode::Exec), 1, Carrier::Passed)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn network_by_a_passed_vhost_by_transfer() -> anyhow::Result<()> {
    vhost(Under::Updates(Mode::Transfer), 1, Carrier::Passed)
}

/// What hand-overs of passed descriptors rely on.
#[test]
fn vhost_has_one_owner_at_a_time() -> anyhow::Result<()> {
    let _lab = need_lab!();
    good(Command::new("modprobe").arg("vhost_net"))?;
    let kind = BackendKind::Memfd { share: true, hugetlb: None };
    let ram = Backend::create(BackendConfig { id: "ram".into(), size: 1 << 20, kind })?;
    let ram = GuestRam::map(&ram)?;
    let mut vhost = Vhost::open()?;
    check_vhost(&vhost)?;
    let mut other = Vhost::adopt(vhost.descriptor().clone())?;
    vhost.claim(ram.memory())?;
    ensure!(matches!(other.claim(ram.memory()), Err(VhostError::InUse)) && !other.is_claimed());
    vhost.release()?;
    other.claim(ram.memory())?;
    drop(other);
    Ok(vhost.claim(ram.memory())?)
}

/// Each update has the other carrier than the program before.
#[test]
#[ignore = "in cargo xtask lab test --all"]
fn network_by_vhost_and_without_in_turns() -> anyhow::Result<()> {
    let turns = |linux: &mut Linux| {
        for by in [Carrier::Program, Carrier::Kernel].into_iter().cycle().take(UPDATES as usize) {
            std::thread::sleep(Duration::from_millis(500));
            let command = linux.vmm.exec_command("memfd:").into_iter();
            let netdev = |word: String| if word.starts_with(Tap::NETDEV) { by.netdev() } else { word };
            linux.exec(&command.map(netdev).collect::<Vec<_>>(), "memfd:")?;
            std::thread::sleep(Duration::from_millis(500));
            by.carries(linux.vmm.pid())?;
        }
        Ok(())
    };
    network_by(Under::Updates(Mode::Exec), 1, Carrier::Kernel, turns)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn control_network_under_qemu() -> anyhow::Result<()> {
    network(Under::Qemu, 1)
}

// Console and random numbers.

fn console_and_rng(under: Under, cpus: u8) -> anyhow::Result<()> {
    let lab = need_lab!();
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("console");
    let chardev = format!("socket,id=c0,path={},server=on,wait=off", socket.display());
    let devices = ["-device", "virtio-rng-pci", "-device", "virtio-serial-pci", "-chardev", &chardev];
    let devices = [&devices[..], &["-device", "virtconsole,chardev=c0"]].concat();
    let mut linux = under.boot(lab, cpus, &devices)?;
    let used = use_console_and_rng(&mut linux, under, &socket);
    used.with_context(|| format!("the VMM said: {}", linux.said()))?;
    linux.power_off()
}

fn use_console_and_rng(linux: &mut Linux, under: Under, socket: &Path) -> anyhow::Result<()> {
    let mut console = Console::connect(socket)?;
    linux.run("stty -F /dev/hvc0 raw -echo; cat /dev/hvc0 > /tmp/typed & typed=$!")?;
    remember_log(linux)?;
    under.happen(linux)?;

    linux.run("echo out of the guest > /dev/hvc0")?;
    console.expect("out of the guest")?;
    console.type_keys("into the guest\n")?;
    let typed = linux.run("until grep -q guest /tmp/typed; do sleep 0.1; done; cat /tmp/typed")?;
    ensure!(typed == "into the guest", "{typed}");
    let numbers = linux.number("dd if=/dev/hwrng bs=64 count=1 2> /dev/null | wc -c")?;
    ensure!(numbers == 64, "{numbers} bytes of random numbers");
    log_has_nothing_new(linux)
}

#[test]
fn console_and_rng_by_exec() -> anyhow::Result<()> {
    console_and_rng(Under::Updates(Mode::Exec), 1)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn console_and_rng_by_transfer() -> anyhow::Result<()> {
    console_and_rng(Under::Updates(Mode::Transfer), 4)
}

#[test]
#[ignore = "in cargo xtask lab test --all"]
fn control_console_and_rng_under_qemu() -> anyhow::Result<()> {
    console_and_rng(Under::Qemu, 1)
}

#[test]
fn answers_of_ping_are_read() -> anyhow::Result<()> {
    let printed = "PING 10.11.0.2 (10.11.0.2) 56(84) bytes of data.\n\
                   [1767222000.100000] 64 bytes from 10.11.0.2: icmp_seq=1 ttl=64 time=0.5 ms\n\
                   [1767222000.110000] 64 bytes from 10.11.0.2: icmp_seq=2 ttl=64 time=0.5 ms\n\
                   [1767222000.360000] 64 bytes from 10.11.0.2: icmp_seq=5 ttl=64 time=9 ms\n";
    let (answered, unanswered, longest) = answers(printed)?;
    ensure!((answered, unanswered, longest.as_millis()) == (3, 2, 250), "{longest:?}");
    ensure!(answers("PING\n").is_err());
    Ok(())
}
