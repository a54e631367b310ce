//! A target that does not get the guest has touched nothing of it: memory, open files and bytes under way are the same
//! after an update that failed as before it.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, ensure};
use oslib::eventfd::EventFd;
use serde_json::{Value, json};
use testkit::{
    Belongings, Console, Gate, Guest, Look, PATIENCE, Qmp, Terminal, Vmm, VmmBuilder, need_kvm, process,
    wait_for,
};
use vmm_core::payload::{Command, FILL_BASE_GPA};

const SEED: u64 = 5;
const FILLED: u64 = 8 << 20;
const SIGKILL: i32 = 9;

/// Typed at the serial line of a guest that stands still: more than COM1's FIFO and the program take (16 KiB at a time).
const TYPED: usize = 20 << 10;

/// Whether the guest runs while it is not updated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Guests {
    Paused,
    Running,
}

/// A guest with users, and with all that belongs to it.
struct Scene {
    vmm: Vmm,
    guest: Guest,
    guests: Guests,
    /// A second monitor, whose requests are under way.
    monitor: Qmp,
    prompt: Console,
    terminal: Terminal,
    at_terminal: Console,
    serial: UnixStream,
    typed: Vec<u8>,
    belongings: Belongings,
    before: Look,
    pattern: Vec<u8>,
    asked: Vec<u64>,
    rounds: usize,
    folder: tempfile::TempDir,
}

/// The machine, with its sockets in `folder`; a target of cpr-transfer has the serial line alone in common with its source.
fn machine(folder: &std::path::Path) -> VmmBuilder {
    let serial = format!("unix:{},server=on,wait=off", folder.join("serial").display());
    VmmBuilder::new().args(&["-serial", &serial])
}

fn pattern(guest: &Guest) -> anyhow::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(FILLED)?];
    guest.file().read_exact_at(&mut bytes, FILL_BASE_GPA)?;
    Ok(bytes)
}

impl Scene {
    fn set(guests: Guests) -> anyhow::Result<Scene> {
        let folder = tempfile::tempdir()?;
        let socket = |name: &str| format!("unix:{},server=on,wait=off", folder.path().join(name).display());
        let (terminal, mut at_terminal) = Terminal::open()?;
        let mut vmm = machine(folder.path())
            .args(&["-qmp", &socket("qmp2"), "-monitor", &socket("hmp"), "-monitor", "stdio"])
            .stdio(terminal.stdio())
            .start()?;
        let guest = vmm.guest()?;
        guest.fill(FILLED, SEED)?;
        guest.run(Command::Echo { on: true })?;
        let monitor = Qmp::connect(&folder.path().join("qmp2"))?;
        let mut prompt = Console::connect(&folder.path().join("hmp"))?;
        prompt.expect("(qemu) ")?;
        at_terminal.expect("(qemu) ")?;
        let mut serial = UnixStream::connect(folder.path().join("serial"))?;
        serial.set_read_timeout(Some(PATIENCE))?;

        // A target that was asked beforehand would not get as far as it can here.
        vmm.qmp().execute("migrate-set-parameters", json!({ "cpr-preflight": "off" }))?;

        // An eventfd and a file that a user gave to the program.
        let event = EventFd::new()?;
        event.signal()?;
        let file = tempfile::tempfile()?;
        (&file).write_all(b"content")?;
        for (name, fd) in [("event", event.as_fd()), ("file", file.as_fd())] {
            vmm.qmp().execute_with_fds("getfd", json!({ "fdname": name }), &[fd])?;
        }

        let mut typed = Vec::new();
        if guests == Guests::Paused {
            vmm.qmp().execute("stop", json!({}))?;
            typed.extend((0..TYPED).map(|at| b'a' + (at % 23) as u8));
            serial.write_all(&typed)?;
        }
        let mut belongings = Belongings::of(vmm.pid())?;
        belongings.add("the eventfd", event.as_fd().try_clone_to_owned()?);
        belongings.add("the terminal", terminal.stdio()[0].try_clone()?);
        let mut before = belongings.look()?;
        if guests == Guests::Paused {
            before = wait_for("the serial line to be full", PATIENCE, || {
                std::thread::sleep(Duration::from_millis(50));
                let now = belongings.look().ok()?;
                let is_settled = now == before && now.most_unread() > 0;
                before = now;
                is_settled.then(|| before.clone())
            })?;
        }
        // Four listeners with a connection each.
        let count = |part: &str| before.names().filter(|name| name.contains(part)).count();
        ensure!(count("/memfd:ram0") == 1 && count("socket:") >= 8 && count("(deleted)") == 2, "{before:?}");
        let pattern = pattern(&guest)?;
        Ok(Scene {
            vmm,
            guest,
            guests,
            monitor,
            prompt,
            terminal,
            at_terminal,
            serial,
            typed,
            belongings,
            before,
            pattern,
            asked: Vec::new(),
            rounds: 0,
            folder,
        })
    }

    /// Users go on: requests that nobody is there to read.
    fn ask(&mut self) -> anyhow::Result<()> {
        self.rounds += 1;
        for command in ["query-status", "query-name", "query-version"] {
            self.asked.push(self.monitor.send(command, json!({}))?);
        }
        self.prompt.type_keys(b"info sta")?;
        self.at_terminal.type_keys(b"info sta")
    }

    /// An update by cpr-exec with this command fails.
    fn exec_fails(&mut self, command: &[String], uri: &str, reason: &str) -> anyhow::Result<()> {
        let gate = Gate::new(&self.vmm.path(""))?;
        let command = gate.command(command);
        self.vmm.set_exec(&command)?;
        self.vmm.qmp().execute("migrate", json!({ "uri": uri }))?;
        let held = gate.held()?;
        self.ask()?;
        held.release()?;
        self.failed(reason)
    }

    fn failed(&mut self, reason: &str) -> anyhow::Result<()> {
        let info = wait_for("the failure", PATIENCE, || {
            let info = self.vmm.qmp().execute("query-migrate", json!({}));
            info.map(|info: Value| (info["status"] == "failed").then_some(info)).transpose()
        })??;
        let said = info["error-desc"].as_str().unwrap_or_default();
        ensure!(said.contains(reason), "{said}");
        let one = || (self.vmm.processes().len() == 1).then_some(());
        wait_for("all but one process to end", PATIENCE, one)
    }

    /// Everything is as it was, and everybody who asked is answered once.
    fn is_as_it_was(&mut self) -> anyhow::Result<()> {
        let expected = if self.guests == Guests::Paused { "paused" } else { "running" };
        for id in std::mem::take(&mut self.asked) {
            self.monitor.reply(id)?;
        }
        let more = self.monitor.try_read(Duration::from_millis(100))?;
        ensure!(more.as_ref().is_none_or(|message| message.get("event").is_some()), "{more:?}");
        for console in [&mut self.prompt, &mut self.at_terminal] {
            console.type_keys(b"tus\r")?;
            console.expect(&format!("VM status: {expected}"))?;
            let answers = console.text().matches("VM status: ").count();
            ensure!(answers == self.rounds, "{answers} answers to {}", self.rounds);
            console.expect("(qemu) ")?;
        }
        let now = self.belongings.look()?;
        let differences = self.before.differences(&now);
        match self.guests {
            Guests::Paused => ensure!(differences.is_empty(), "{differences:#?}"),
            // Its beats are in its memory.
            Guests::Running => {
                let others: Vec<_> = differences
                    .iter()
                    .filter(|line| !line.contains("/memfd:ram0") || !line.contains("content"))
                    .collect();
                ensure!(others.is_empty(), "{others:#?}");
            }
        }
        ensure!(pattern(&self.guest)? == self.pattern, "memory that the guest does not write has changed");
        self.terminal.modes()?;
        Ok(())
    }

    /// The guest goes on, with every byte that was typed, once.
    fn goes_on(mut self) -> anyhow::Result<()> {
        if self.guests == Guests::Paused {
            self.vmm.qmp().execute("cont", json!({}))?;
        }
        self.guest.beats_on(0)?;
        self.guest.verify(FILLED, SEED)?;
        self.serial.write_all(b"!end")?;
        self.typed.extend(b"!end");
        // Behind what it printed when it started.
        let mut said = Vec::new();
        while !said.ends_with(b"!end") {
            let mut bytes = [0; 4096];
            let count = self.serial.read(&mut bytes).context("the echo of the serial line")?;
            ensure!(count > 0, "the serial line was closed");
            said.extend(&bytes[..count]);
        }
        ensure!(said.ends_with(&self.typed), "{} bytes came back for {}", said.len(), self.typed.len());
        let more = said.len() - self.typed.len();
        ensure!(!said[..more].windows(8).any(|bytes| self.typed.starts_with(bytes)), "something came twice");
        self.vmm.qmp().execute("quit", json!({}))?;
        drop(self.folder);
        Ok(())
    }

    /// The command of cpr-exec, with `from` replaced.
    fn command(&self, incoming: &str, [from, to]: [&str; 2]) -> Vec<String> {
        self.vmm.exec_command(incoming).into_iter().map(|word| word.replace(from, to)).collect()
    }

    /// An update by cpr-transfer to this target fails.
    fn transfer_fails(
        &mut self,
        target: &mut Vmm,
        deferred: bool,
        end: impl FnOnce(&mut Vmm) -> anyhow::Result<()>,
        reason: &str,
    ) -> anyhow::Result<()> {
        if !deferred {
            self.ask()?;
        }
        self.vmm.begin_transfer(&target.cpr_socket())?;
        if deferred {
            wait_for("the guest's descriptors", PATIENCE, || (!target.cpr_socket().exists()).then_some(()))?;
            self.ask()?;
        }
        end(target)?;
        self.failed(reason)
    }
}

const SMALL: [&str; 2] = ["size=67108864", "size=33554432"];

#[test]
fn a_target_of_cpr_exec_that_refuses_has_touched_nothing() -> anyhow::Result<()> {
    need_kvm!();
    for guests in [Guests::Paused, Guests::Running] {
        let mut scene = Scene::set(guests)?;
        let more_vcpus =
            [scene.vmm.exec_command("memfd:"), ["-smp", "2"].map(String::from).to_vec()].concat();
        scene.exec_fails(&more_vcpus, "memfd:", "the guest has 1 vCPUs, the command line says 2")?;
        scene.is_as_it_was().context("another number of vCPUs")?;
        let less_ram = scene.command("memfd:", SMALL);
        scene.exec_fails(&less_ram, "memfd:", "ram0")?;
        scene.is_as_it_was().context("less RAM")?;
        // Not what the source wrote: damage on its way.
        let garbage = scene.folder.path().join("garbage");
        std::fs::write(&garbage, vec![b'x'; 4096])?;
        let garbage = scene.vmm.exec_command(&format!("file:{}", garbage.display()));
        scene.exec_fails(&garbage, "memfd:", "not a CPR state frame")?;
        scene.is_as_it_was().context("a damaged state")?;
        scene.goes_on()?;
    }
    Ok(())
}

#[test]
fn a_target_of_cpr_transfer_that_refuses_or_is_killed_has_touched_nothing() -> anyhow::Result<()> {
    need_kvm!();
    for guests in [Guests::Paused, Guests::Running] {
        let mut scene = Scene::set(guests)?;
        let target = |deferred: bool| {
            let main = if deferred { "defer" } else { "unix:main.sock" };
            machine(scene.folder.path()).target(main)
        };
        let (more_vcpus, less_ram, killed) =
            (target(false).cpus(2), target(false).memory(32 << 20), target(true));
        scene.transfer_fails(&mut more_vcpus.start()?, false, |_| Ok(()), "1 vCPUs")?;
        scene.is_as_it_was().context("another number of vCPUs")?;
        scene.transfer_fails(&mut less_ram.start()?, false, |_| Ok(()), "ram0")?;
        scene.is_as_it_was().context("less RAM")?;
        let kill = |target: &mut Vmm| Ok(process::send_signal(target.pid(), SIGKILL)?);
        scene.transfer_fails(&mut killed.start()?, true, kill, "")?;
        scene.is_as_it_was().context("a killed target")?;
        scene.goes_on()?;
    }
    Ok(())
}

/// What a target does to itself at the last moment before the commit.
#[cfg(feature = "fault-injection")]
mod faults {
    use cpr_core::fault::VARIABLE;

    use super::*;

    const LATEST: &str = "kill@commit";

    #[test]
    fn a_target_of_cpr_exec_that_is_killed_before_the_commit_has_touched_nothing() -> anyhow::Result<()> {
        need_kvm!();
        for guests in [Guests::Paused, Guests::Running] {
            let mut scene = Scene::set(guests)?;
            let state = scene.folder.path().join("state");
            let uri = format!("file:{}", state.display());
            let mut command = vec!["/usr/bin/env".to_owned(), format!("{VARIABLE}={LATEST}")];
            command.extend(scene.vmm.exec_command(&uri));
            scene.exec_fails(&command, &uri, "signal 9")?;
            scene.is_as_it_was()?;
            scene.goes_on()?;
        }
        Ok(())
    }

    #[test]
    fn a_target_of_cpr_transfer_that_is_killed_before_the_commit_has_touched_nothing() -> anyhow::Result<()> {
        need_kvm!();
        for guests in [Guests::Paused, Guests::Running] {
            let mut scene = Scene::set(guests)?;
            let target = machine(scene.folder.path()).target("unix:main.sock").env(VARIABLE, LATEST);
            scene.transfer_fails(&mut target.start()?, false, |_| Ok(()), "")?;
            scene.is_as_it_was()?;
            scene.goes_on()?;
        }
        Ok(())
    }
}
