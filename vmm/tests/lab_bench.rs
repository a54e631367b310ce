//! How long the same Linux guest stands still under `cpr-vmm` and under QEMU, in the same L1, as the guest itself sees it.
//! Emulated CPUs are slow: what counts is the ratio. `cargo xtask lab bench` runs it; it is no part of the tests.

use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::json;
use tempfile::TempDir;
use testkit::lab::{BOOT_LIMIT, COMMAND_LIMIT, Lab, Mode, Report};
use testkit::{GuestShell, PATIENCE, Vmm, VmmBuilder, median, need_lab, wait_for};

/// In each cell of the table.
const UPDATES: usize = 3;

const RAM: u64 = 256 << 20;

/// Which program it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    CprVmm,
    Qemu,
}

impl Who {
    fn name(self) -> &'static str {
        match self {
            Who::CprVmm => "cpr-vmm",
            Who::Qemu => "QEMU",
        }
    }

    /// The same machine for both, as far as both have it: RAM in a shared memfd, vCPUs, kernel, serial line. QMP is in the
    /// process's own folder.
    fn builder(self, lab: &Lab, serial: &str, cpus: u8) -> VmmBuilder {
        let boot =
            ["-kernel", &lab.vmlinux, "-initrd", &lab.initrd, "-append", &lab.append, "-serial", serial];
        match self {
            Who::CprVmm => VmmBuilder::new().binary(&lab.vmm).memory(RAM).cpus(cpus).args(&boot),
            Who::Qemu => {
                let (memory, cpus) =
                    (format!("memory-backend-memfd,id=ram0,share=on,size={RAM}"), cpus.to_string());
                let machine = [
                    "-nodefaults",
                    "-no-user-config",
                    "-display",
                    "none",
                    "-machine",
                    "microvm,memory-backend=ram0,aux-ram-share=on",
                    "-accel",
                    "kvm",
                    "-cpu",
                    "host",
                    "-bios",
                    "qboot.rom",
                    "-object",
                    &memory,
                    "-m",
                    "256M",
                    "-smp",
                    &cpus,
                    "-qmp",
                    "unix:qmp,server=on,wait=off",
                ];
                let words: Vec<&str> = machine.into_iter().chain(boot).collect();
                VmmBuilder::new().binary("qemu-system-x86_64").only_args(&words)
            }
        }
    }
}

/// A guest and the program under it.
struct Subject<'a> {
    who: Who,
    lab: &'a Lab,
    cpus: u8,
    vmm: Vmm,
    shell: GuestShell,
    /// Of the serial line. QEMU does not keep its connections, so each of its programs listens at a path of its own.
    folder: TempDir,
    lines: u32,
}

impl Subject<'_> {
    fn boot(lab: &Lab, who: Who, cpus: u8) -> anyhow::Result<Subject<'_>> {
        let folder = tempfile::tempdir()?;
        let builder = who.builder(lab, &chardev(&folder, 0), cpus);
        let vmm = builder.start()?;
        let shell = GuestShell::connect(&folder.path().join("serial0"), lab.prompt())?;
        let mut subject = Subject { who, lab, cpus, vmm, shell, folder, lines: 0 };
        subject.shell.ready(BOOT_LIMIT).with_context(|| format!("says: {}", subject.vmm.stderr()))?;
        subject.shell.run_within("set +m", COMMAND_LIMIT)?;
        Ok(subject)
    }

    /// The longest gap that a thread on each CPU sees while `work` is done.
    fn gap(&mut self, work: impl FnOnce(&mut Self) -> anyhow::Result<()>) -> anyhow::Result<Duration> {
        let threads = self.cpus;
        self.shell.run_within("rm -f /tmp/enough", COMMAND_LIMIT)?;
        let watch = format!("guest-agent clock 300 {threads} > /tmp/watch & agent=$!; sleep 1.5");
        self.shell.run_within(&watch, COMMAND_LIMIT)?;
        work(self)?;
        let printed =
            self.shell.run_within("touch /tmp/enough; wait $agent; cat /tmp/watch", COMMAND_LIMIT)?;
        let report = Report::parse(&printed, "clock")?;
        Ok(Duration::from_micros(report.get("max_gap_us")?.try_into()?))
    }

    fn update(&mut self, mode: Mode) -> anyhow::Result<()> {
        match (self.who, mode) {
            (Who::CprVmm, Mode::Exec) => self.vmm.update().map(drop),
            (Who::CprVmm, Mode::Transfer) => {
                let builder = self.who.builder(self.lab, &chardev(&self.folder, 0), self.cpus);
                let mut target = builder.target("unix:main.sock").start()?;
                self.vmm.transfer(&mut target)?;
                std::mem::replace(&mut self.vmm, target).quit()
            }
            (Who::Qemu, Mode::Exec) => self.exec_qemu(),
            (Who::Qemu, Mode::Transfer) => self.transfer_qemu(),
        }
    }

    /// QEMU knows no channel but a file, and closes its connections.
    fn exec_qemu(&mut self) -> anyhow::Result<()> {
        let state = format!("file:{}", self.vmm.path("state").display());
        let mut command = vec!["qemu-system-x86_64".to_owned()];
        command.extend(self.next_arguments());
        command.extend(["-incoming".to_owned(), state.clone()]);
        self.vmm.set_exec(&command)?;
        self.vmm.qmp().send("migrate", json!({ "uri": state }))?;
        while let Some(message) = self.vmm.qmp().try_read_to_end()? {
            ensure!(message.get("error").is_none(), "QEMU refuses: {message}");
        }
        // The old program may still listen for a moment after it has closed its connections.
        wait_for("the new QEMU", PATIENCE, || self.vmm.connect().ok())
            .with_context(|| format!("it says: {}", self.vmm.stderr()))?;
        self.runs()
    }

    fn transfer_qemu(&mut self) -> anyhow::Result<()> {
        let arguments = self.next_arguments();
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let builder =
            VmmBuilder::new().binary("qemu-system-x86_64").only_args(&words).target("unix:main.sock");
        let target = builder.spawn()?;
        wait_for("QEMU to listen", PATIENCE, || target.cpr_socket().exists().then_some(()))
            .with_context(|| format!("it says: {}", target.stderr()))?;
        self.vmm.begin_transfer(&target.cpr_socket())?;
        wait_for("QEMU's transfer", PATIENCE, || {
            let info = self.vmm.qmp().execute("query-migrate", json!({})).ok()?;
            matches!(info["status"].as_str(), Some("completed" | "failed")).then_some(())
        })?;
        let mut target = target;
        target.connect()?;
        std::mem::replace(&mut self.vmm, target).quit()?;
        self.runs()
    }

    /// The arguments of the first program with a new path for the serial line.
    fn next_arguments(&mut self) -> Vec<String> {
        self.lines += 1;
        let new = chardev(&self.folder, self.lines);
        let mut arguments = self.vmm.args().to_vec();
        let serial = arguments.iter().position(|word| word == "-serial").map(|at| at + 1);
        serial.and_then(|at| arguments.get_mut(at)).into_iter().for_each(|line| line.clone_from(&new));
        arguments
    }

    /// Waits until QEMU runs the guest, and sits down in front of its new serial line.
    fn runs(&mut self) -> anyhow::Result<()> {
        wait_for("QEMU to run the guest", PATIENCE, || (self.vmm.status().ok()? == "running").then_some(()))
            .with_context(|| format!("it says: {}", self.vmm.stderr()))?;
        let path = self.folder.path().join(format!("serial{}", self.lines));
        self.shell = GuestShell::connect(&path, self.lab.prompt())?;
        self.shell.run_within("", COMMAND_LIMIT).map(drop)
    }
}

fn chardev(folder: &TempDir, line: u32) -> String {
    format!("unix:{}/serial{line},server=on,wait=off", folder.path().display())
}

#[test]
#[ignore = "in cargo xtask lab bench"]
fn blackout_beside_qemu() -> anyhow::Result<()> {
    let lab = need_lab!();
    let mut table = format!(
        "longest gap that a Linux guest with {} MiB sees, median of {UPDATES} updates (worst), ms:\n\n\
         | vCPUs | mode | cpr-vmm | QEMU | QEMU / cpr-vmm |\n|---|---|---|---|---|\n",
        RAM >> 20
    );
    for cpus in [1, 4] {
        let mut cells = Vec::new();
        for who in [Who::CprVmm, Who::Qemu] {
            let mut subject = Subject::boot(&lab, who, cpus).with_context(|| who.name())?;
            let ambient = gaps(&mut subject, |_| Ok(()))?;
            let mut row = vec![("no update", ambient)];
            for mode in [Mode::Exec, Mode::Transfer] {
                let times = gaps(&mut subject, |subject| subject.update(mode));
                row.push((mode.name(), times.with_context(|| format!("{}, {}", who.name(), mode.name()))?));
            }
            cells.push(row);
        }
        let [ours, theirs] = <[_; 2]>::try_from(cells).ok().context("two programs")?;
        for ((mode, ours), (_, theirs)) in ours.into_iter().zip(theirs) {
            let ratio = median(theirs.clone()).as_secs_f64() / median(ours.clone()).as_secs_f64();
            table += &format!("| {cpus} | {mode} | {} | {} | {ratio:.1} |\n", told(ours), told(theirs));
        }
    }
    println!("{table}");
    lab.note(&table)
}

fn gaps(
    subject: &mut Subject<'_>,
    work: impl Fn(&mut Subject<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Duration>> {
    (0..UPDATES).map(|_| subject.gap(&work)).collect()
}

fn told(times: Vec<Duration>) -> String {
    let worst = times.iter().max().copied().unwrap_or_default();
    let ms = |time: Duration| format!("{:.1}", time.as_secs_f64() * 1000.0);
    format!("{} ({})", ms(median(times)), ms(worst))
}
