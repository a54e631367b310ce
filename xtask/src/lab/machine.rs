//! L1: a whole machine emulated by QEMU (TCG) with SVM, an IOMMU and devices for VFIO, whose Debian kernel has a working
//! `/dev/kvm`. It reports over three virtio ports, each a file in the folder of the run:
//!
//! | file | what |
//! |---|---|
//! | `output.log` | output of the command, copied to our stdout while it grows |
//! | `status` | `up`, then `exit N`; or `fail REASON` |
//! | `artifacts.tar` | what the command left in `$CPR_LAB_OUT` |
//! | `console.log` | L1's serial console: kernel messages, panics |
//!
//! The machine ends by itself: when its command ended, when its kernel panicked, at the time limit (enforced by
//! timeout(1), whatever becomes of us; a shell has none unless one is asked for), and when the process that started it dies.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::LabOptions;
use super::build::Build;
use super::steps::{Terminal, limited};

/// L1 comes up within seconds; after this long it never will.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// How often the files are looked at.
const POLL: Duration = Duration::from_millis(20);

/// Kernel command line of L1. A panic, also one made of an oops, ends the machine at once (`-no-reboot`).
const L1_APPEND: &str = "console=ttyS0 quiet intel_iommu=on iommu=nopt mitigations=off tsc=reliable no_timer_check \
                         panic=-1 oops=panic";

/// How a machine ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The command ended with this status.
    Exit(i32),
    /// It did not come to that, and why.
    Broken(String),
}

/// How long things took, and how it ended.
pub(super) struct Ended {
    pub(super) end: End,
    pub(super) boot: Option<Duration>,
}

/// Runs L1 with a command in its initramfs to the end, its output going to our stdout.
pub(super) fn run(build: &Build, dir: &Path, initrd: &Path, options: &LabOptions) -> Result<Ended> {
    let console = dir.join("console.log");
    let mut qemu = limited(&build.qemu(), Some(options.time_limit), Terminal::Shared);
    machine(&mut qemu, build, dir, initrd, options)?;
    qemu.args(["-chardev", &file_chardev("console", &console)?, "-serial", "chardev:console"]);
    let errors = File::create(dir.join("qemu.log"))?;
    let begin = Instant::now();
    let child = qemu.stdin(Stdio::null()).stdout(errors.try_clone()?).stderr(errors).spawn();
    let mut child = Ending(child.context("cannot start QEMU (by setpriv and timeout)")?);

    let mut output = Follower::new(dir.join("output.log"));
    let status_file = dir.join("status");
    let mut boot = None;
    let end = loop {
        output.copy_to_stdout()?;
        let running = child.0.try_wait()?.is_none();
        let status = Status::parse(&fs::read_to_string(&status_file).unwrap_or_default());
        if status.up {
            boot.get_or_insert_with(|| begin.elapsed());
        }
        // Nothing comes after the status, and the disk is read-only: no need to wait for the power-off.
        if let Some(end) = status.end {
            break end;
        }
        if !running {
            break End::Broken(why_it_ended(begin.elapsed(), options.time_limit, &console, dir));
        }
        if boot.is_none() && begin.elapsed() > BOOT_LIMIT {
            break End::Broken(format!("L1 did not come up within {} s", BOOT_LIMIT.as_secs()));
        }
        thread::sleep(POLL);
    };
    output.copy_to_stdout()?;
    Ok(Ended { end, boot })
}

/// Runs L1 with its console on our terminal until its shell ends: somebody sits there, so there is no limit but `limit`.
pub(super) fn shell(
    build: &Build,
    dir: &Path,
    initrd: &Path,
    options: &LabOptions,
    limit: Option<Duration>,
) -> Result<()> {
    let mut qemu = limited(&build.qemu(), limit, Terminal::Shared);
    machine(&mut qemu, build, dir, initrd, options)?;
    let log = dir.join("console.log");
    let log = log.to_str().context("the cache folder's name is not UTF-8")?.replace(',', ",,");
    qemu.args(["-chardev", &format!("stdio,id=console,mux=on,signal=off,logfile={log}")]);
    qemu.args(["-serial", "chardev:console"]);
    let status = Ending(qemu.spawn().context("cannot start QEMU (by setpriv and timeout)")?).0.wait()?;
    anyhow::ensure!(status.success(), "L1 ended with {status}");
    Ok(())
}

/// Everything of the machine but its console.
fn machine(qemu: &mut Command, build: &Build, dir: &Path, initrd: &Path, options: &LabOptions) -> Result<()> {
    let disk = build.disk();
    let disk = disk.to_str().context("the cache folder's name is not UTF-8")?.replace(',', ",,");
    qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
        .args([
            "-machine",
            "q35,kernel-irqchip=split",
            "-accel",
            "tcg,thread=multi,tb-size=1024",
            "-cpu",
            "max",
        ])
        .args(["-smp", &options.cpus.to_string(), "-m", &format!("{}M", options.memory_mib)])
        // The IOMMU of Intel beside the SVM of AMD: it is the one that remaps interrupts here.
        .args(["-device", "intel-iommu,intremap=on,caching-mode=on"])
        .args(["-device", "edu,addr=0x3", "-device", "e1000e,addr=0x4"])
        .args(["-drive", &format!("file={disk},format=raw,if=virtio,readonly=on")])
        .args(["-device", "virtio-serial-pci"]);
    for (number, name) in [(1, "output.log"), (2, "status"), (3, "artifacts.tar")] {
        qemu.args(["-chardev", &file_chardev(&format!("port{number}"), &dir.join(name))?])
            .args(["-device", &format!("virtserialport,nr={number},chardev=port{number}")]);
    }
    qemu.arg("-kernel").arg(build.l1_kernel()).arg("-initrd").arg(initrd).args(["-append", L1_APPEND]);
    Ok(())
}

fn file_chardev(id: &str, path: &Path) -> Result<String> {
    let path = path.to_str().context("the cache folder's name is not UTF-8")?;
    Ok(format!("file,id={id},path={}", path.replace(',', ",,")))
}

/// A child that does not outlive this value.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        // Ended already: nothing to do. Otherwise QEMU dies with timeout(1), its parent.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the status port said so far.
#[derive(Debug, Default, PartialEq, Eq)]
struct Status {
    up: bool,
    end: Option<End>,
}

impl Status {
    fn parse(text: &str) -> Self {
        let mut status = Self::default();
        // A line counts once it is whole.
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            match line.trim_end().split_once(' ') {
                None if line.trim_end() == "up" => status.up = true,
                Some(("exit", code)) => status.end = code.parse().ok().map(End::Exit),
                Some(("fail", why)) => status.end = Some(End::Broken(why.into())),
                _ => {}
            }
        }
        status
    }
}

fn why_it_ended(after: Duration, limit: Duration, console: &Path, dir: &Path) -> String {
    let console = fs::read(console).unwrap_or_default();
    let console = String::from_utf8_lossy(&console);
    if let Some(line) = console.lines().find(|line| line.contains("Kernel panic")) {
        return format!("L1's kernel died: {}", line.trim());
    }
    if after >= limit {
        return format!("L1 reached the time limit of {} s", limit.as_secs());
    }
    let log = fs::read_to_string(dir.join("qemu.log")).unwrap_or_default();
    let errors: Vec<&str> = log.lines().filter(|line| !line.contains(": warning: ")).collect();
    match errors[..] {
        [] => "L1 went off without a word".into(),
        _ => format!("QEMU ended: {}", errors.join("; ")),
    }
}

/// Copies a growing file to stdout.
struct Follower {
    path: PathBuf,
    file: Option<File>,
}

impl Follower {
    fn new(path: PathBuf) -> Self {
        Self { path, file: None }
    }

    /// Copies what came since the last call.
    fn copy_to_stdout(&mut self) -> io::Result<()> {
        if self.file.is_none() {
            // QEMU has not made it yet.
            self.file = File::open(&self.path).ok();
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut new = Vec::new();
        file.read_to_end(&mut new)?;
        if !new.is_empty() {
            let mut stdout = io::stdout().lock();
            stdout.write_all(&new)?;
            stdout.flush()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_counts_once_its_line_is_whole() {
        assert_eq!(Status::parse(""), Status::default());
        assert_eq!(Status::parse("up\nexit 10"), Status { up: true, end: None });
        assert_eq!(Status::parse("up\nexit 101\n"), Status { up: true, end: Some(End::Exit(101)) });
        assert_eq!(Status::parse("up\r\nexit 0\r\n"), Status { up: true, end: Some(End::Exit(0)) });
        let broken = Some(End::Broken("no root disk".into()));
        assert_eq!(Status::parse("fail no root disk\n"), Status { up: false, end: broken });
    }

    #[test]
    fn the_reason_of_an_early_end_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let console = dir.path().join("console.log");
        let why = |seconds| {
            why_it_ended(Duration::from_secs(seconds), Duration::from_secs(60), &console, dir.path())
        };
        assert_eq!(why(10), "L1 went off without a word");
        assert_eq!(why(60), "L1 reached the time limit of 60 s");
        fs::write(dir.path().join("qemu.log"), "qemu: warning: no peer\nno such disk\n").unwrap();
        assert_eq!(why(10), "QEMU ended: no such disk");
        fs::write(&console, "x\n[  1.0] Kernel panic - not syncing: Fatal exception\n").unwrap();
        assert!(why(10).contains("Fatal exception"));
    }
}
