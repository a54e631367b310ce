//! The container story: `cpr-vmm` is process 1 of a pid namespace of its own, beside a neighbour with a TCP connection.
//!
//! An update must be nothing to the container: the same process 1 in the same namespaces and cgroup, the neighbour and
//! its connection undisturbed. `unshare` and `nsenter` stand for the container runtime. They need root.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use serde_json::json;
use testkit::process::{self, SIGTERM, send_signal};
use testkit::{Gate, PATIENCE, Vmm, VmmBuilder, need_kvm, skip_unless, wait_for};

/// Makes the container, and ends it when it ends itself.
const RUNTIME: [&str; 7] = ["unshare", "--pid", "--fork", "--mount-proc", "--uts", "--ipc", "--kill-child"];

fn can_make_namespaces() -> bool {
    let status = Command::new(RUNTIME[0]).args(&RUNTIME[1..]).arg("true").stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

macro_rules! need_namespaces {
    () => {
        skip_unless!(can_make_namespaces(), "pid namespaces need unshare(1) and root");
    };
}

/// Enters the container of process `pid`, as `docker exec` does.
fn enter(pid: u32) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["--target", &pid.to_string(), "--pid", "--mount", "--uts", "--ipc", "--"]);
    command
}

/// A process beside the VMM that sends back each line that it gets over TCP.
struct Neighbour {
    child: Child,
    connection: BufReader<TcpStream>,
    lines: u32,
}

impl Neighbour {
    fn start(pid: u32) -> anyhow::Result<Neighbour> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let script = "exec 3<>/dev/tcp/127.0.0.1/$0; exec cat <&3 >&3";
        let port = listener.local_addr()?.port().to_string();
        let child = enter(pid).args(["bash", "-c", script, &port]).stdin(Stdio::null()).spawn()?;
        let stream = wait_for("the neighbour", PATIENCE, || listener.accept().ok())?.0;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Neighbour { child, connection: BufReader::new(stream), lines: 0 })
    }

    /// Sends a line without waiting for it to come back.
    fn send(&mut self) -> anyhow::Result<()> {
        self.lines += 1;
        Ok(writeln!(self.connection.get_mut(), "line {}", self.lines)?)
    }

    /// Takes the line that was sent last.
    fn receive(&mut self) -> anyhow::Result<()> {
        let mut line = String::new();
        self.connection.read_line(&mut line).context("the neighbour's connection")?;
        ensure!(line == format!("line {}\n", self.lines), "{line:?}");
        Ok(())
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What must not change.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    pids: String,
    started: u64,
    namespaces: Vec<String>,
    cgroups: String,
    root: PathBuf,
    folder: PathBuf,
}

impl Identity {
    fn of(pid: u32) -> anyhow::Result<Identity> {
        let link = |name: &str| fs::read_link(format!("/proc/{pid}/{name}"));
        Ok(Identity {
            pids: process::status_field(pid, "NSpid")?,
            started: process::start_time(pid)?,
            namespaces: process::namespaces(pid)?,
            cgroups: process::cgroups(pid)?,
            root: link("root")?,
            folder: link("cwd")?,
        })
    }
}

/// The processes that the container sees, by its own numbers.
fn processes_inside(pid: u32) -> anyhow::Result<Vec<u32>> {
    let mut inside: Vec<u32> = fs::read_dir(format!("/proc/{pid}/root/proc"))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    inside.sort_unstable();
    Ok(inside)
}

fn start() -> anyhow::Result<Vmm> {
    let vmm = VmmBuilder::new().forking_wrapper(&RUNTIME).args(&["-pidfile", "pid"]).start()?;
    ensure!(fs::read_to_string(vmm.path("pid"))?.trim() == "1", "it is not process 1");
    Ok(vmm)
}

/// The container ends with its process 1: exit code 0, told to the monitors, nothing left.
fn ends_in_order(vmm: &mut Vmm) -> anyhow::Result<()> {
    ensure!(vmm.wait_exit()? == Some(0), "{}", vmm.stderr());
    let events = vmm.qmp().events_to_the_end()?;
    let last = events.last().context("no event")?;
    ensure!(last["event"] == "SHUTDOWN" && last["data"]["reason"] == "host-signal", "{events:?}");
    ensure!(!vmm.path("pid").exists() && !vmm.path("qmp").exists(), "a path stays behind");
    ensure!(vmm.processes().is_empty(), "processes stay behind");
    Ok(())
}

#[test]
fn process_1_and_its_neighbour_go_on_through_updates() -> anyhow::Result<()> {
    need_kvm!();
    need_namespaces!();
    let mut vmm = start()?;
    let guest = vmm.guest()?;
    let bytes = 16 << 20;
    guest.fill(bytes, 3)?;
    let pid = vmm.pid();
    let mut neighbour = Neighbour::start(pid)?;
    neighbour.send()?;
    neighbour.receive()?;
    let identity = Identity::of(pid)?;
    ensure!(identity.pids.split_whitespace().last() == Some("1"), "{identity:?}");
    ensure!(identity.namespaces != process::namespaces(std::process::id())?, "no namespace of its own");
    let inside = processes_inside(pid)?;
    ensure!(inside.len() == 2, "process 1 and its neighbour: {inside:?}");

    for round in 0..10 {
        let beats = guest.vcpu(0).beats();
        // This line is on its way while the program is replaced.
        neighbour.send()?;
        if round % 2 == 0 {
            vmm.update()?
        } else {
            vmm.update_by_file()?
        };
        neighbour.receive()?;
        ensure!(guest.beats_on(0)? > beats, "the counter stepped back");
        ensure!(Identity::of(pid)? == identity, "{identity:?} -> {:?}", Identity::of(pid)?);
        let alone = || (processes_inside(pid).ok()? == inside).then_some(());
        wait_for("the keeper's end", PATIENCE, alone)?;
        ensure!(process::children(pid)?.is_empty(), "a zombie");
    }
    guest.verify(bytes, 3)?;
    neighbour.send()?;
    neighbour.receive()?;
    send_signal(pid, SIGTERM)?;
    ends_in_order(&mut vmm)
}

#[test]
fn sigterm_ends_process_1_from_inside_and_outside() -> anyhow::Result<()> {
    need_kvm!();
    need_namespaces!();
    for updates in [0, 1] {
        for inside in [false, true] {
            let mut vmm = start()?;
            for _ in 0..updates {
                vmm.update()?;
            }
            if inside {
                let status = enter(vmm.pid()).args(["sh", "-c", "kill -TERM 1"]).status()?;
                ensure!(status.success(), "kill: {status}");
            } else {
                send_signal(vmm.pid(), SIGTERM)?;
            }
            ends_in_order(&mut vmm).with_context(|| format!("{updates} updates, from inside: {inside}"))?;
        }
    }
    Ok(())
}

#[test]
fn sigterm_during_an_update_ends_process_1_after_the_commit() -> anyhow::Result<()> {
    need_kvm!();
    need_namespaces!();
    let mut vmm = start()?;
    let gate = Gate::new(&vmm.path(""))?;
    let command = gate.command(&vmm.exec_command("memfd:"));
    vmm.set_exec(&command)?;
    vmm.qmp().execute("migrate", json!({ "uri": "memfd:" }))?;
    let held = gate.held()?;
    send_signal(vmm.pid(), SIGTERM)?;
    held.release()?;
    vmm.qmp().event("RESUME")?;
    ends_in_order(&mut vmm)
}

#[test]
fn a_new_process_1_that_refuses_makes_room_for_the_old_one() -> anyhow::Result<()> {
    need_kvm!();
    need_namespaces!();
    let mut vmm = start()?;
    let guest = vmm.guest()?;
    let pid = vmm.pid();
    let identity = Identity::of(pid)?;
    let mut neighbour = Neighbour::start(pid)?;
    let inside = processes_inside(pid)?;
    let mut command = vmm.exec_command("memfd:");
    command.push("-no-such-option".into());
    vmm.set_preflight("off")?;
    for _ in 0..2 {
        vmm.set_exec(&command)?;
        let error = vmm.migrate("memfd:").err().context("it succeeded")?.to_string();
        ensure!(error.contains("the new program failed") && error.contains("-no-such-option"), "{error}");
        guest.beats_on(0)?;
        ensure!(Identity::of(pid)? == identity, "{identity:?} -> {:?}", Identity::of(pid)?);
        let alone = || (processes_inside(pid).ok()? == inside).then_some(());
        wait_for("the keeper's end", PATIENCE, alone)?;
    }
    neighbour.send()?;
    neighbour.receive()?;
    vmm.update()?;
    guest.beats_on(0)?;
    send_signal(pid, SIGTERM)?;
    ends_in_order(&mut vmm)
}

#[test]
fn an_update_that_fails_leaves_the_container_alone() -> anyhow::Result<()> {
    need_kvm!();
    need_namespaces!();
    let mut vmm = start()?;
    let guest = vmm.guest()?;
    let pid = vmm.pid();
    let mut neighbour = Neighbour::start(pid)?;
    let inside = processes_inside(pid)?;
    // Executable, but in no format: only the exec itself can find out.
    let program = vmm.path("program");
    fs::write(&program, "neither a program nor a script\n")?;
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let command = vmm.exec_command_of(&program, "memfd:");
    let begun = Instant::now();
    for _ in 0..3 {
        vmm.set_exec(&command)?;
        let error = vmm.migrate("memfd:").err().context("it succeeded")?.to_string();
        ensure!(error.contains("cannot execute"), "{error}");
        guest.beats_on(0)?;
        ensure!(processes_inside(pid)? == inside, "the keeper is still there");
    }
    ensure!(begun.elapsed() < PATIENCE);
    neighbour.send()?;
    neighbour.receive()?;
    vmm.update()?;
    guest.beats_on(0)?;
    send_signal(pid, SIGTERM)?;
    ends_in_order(&mut vmm)
}
