//! A `cpr-vmm` process with a QMP monitor.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::process::Census;
use crate::{Guest, PATIENCE, Qmp, process, wait_for};

/// The `cpr-vmm` that was built beside the running test or tool, in the same profile; `TESTKIT_CPR_VMM` names another.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("TESTKIT_CPR_VMM") {
        return path.into();
    }
    let exe = std::env::current_exe().expect("the running program has a path");
    exe.ancestors()
        .skip(1)
        .map(|folder| folder.join("cpr-vmm"))
        .find(|path| path.is_file())
        .expect("cpr-vmm is built beside the program that uses it: cargo build -p vmm")
}

/// Ticks per second of the TSC that the payload reads, measured against CLOCK_MONOTONIC.
pub fn payload_tsc_hz(guest: &Guest) -> f64 {
    let read = || (guest.vcpu(0).last_tsc(), Instant::now());
    let (from, start) = read();
    std::thread::sleep(std::time::Duration::from_millis(100));
    let (to, end) = read();
    (to - from) as f64 / (end - start).as_secs_f64()
}

/// What to start.
#[derive(Debug, Clone)]
pub struct VmmBuilder {
    /// The one built beside us, if none: looked for only when it is started.
    binary: Option<PathBuf>,
    memory: u64,
    cpus: u8,
    memory_args: Option<Vec<String>>,
    extra: Vec<String>,
    /// Options that are no part of the machine.
    incoming: Vec<String>,
    wrapper: Vec<String>,
    wrapper_forks: bool,
    only: Option<Vec<String>>,
    environment: Vec<(String, OsString)>,
    stdio: Option<[Arc<OwnedFd>; 2]>,
}

impl Default for VmmBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl VmmBuilder {
    /// A VM with 64 MiB of shared memfd RAM named `ram0` and one vCPU, booting the payload.
    pub fn new() -> VmmBuilder {
        VmmBuilder {
            binary: None,
            memory: 64 << 20,
            cpus: 1,
            memory_args: None,
            extra: Vec::new(),
            incoming: Vec::new(),
            wrapper: Vec::new(),
            wrapper_forks: false,
            only: None,
            environment: Vec::new(),
            stdio: None,
        }
    }

    /// Bytes of guest RAM.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: u8) -> Self {
        self.cpus = cpus;
        self
    }

    /// Memory options in place of the usual memfd.
    #[must_use]
    pub fn memory_args(mut self, args: &[&str]) -> Self {
        self.memory_args = Some(args.iter().map(ToString::to_string).collect());
        self
    }

    /// Further arguments.
    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Self {
        self.extra.extend(args.iter().map(ToString::to_string));
        self
    }

    /// Makes it a target of cpr-transfer that waits at `cpr.sock` in its folder, with this main channel.
    #[must_use]
    pub fn target(mut self, main: &str) -> Self {
        let cpr = format!("cpr,addr.transport=socket,addr.type=unix,addr.path={CPR_SOCKET}");
        self.incoming = ["-incoming", main, "-incoming", &cpr].map(String::from).to_vec();
        self
    }

    /// Has it go on with a guest that is in storage: `file:PATH`, or `defer`.
    #[must_use]
    pub fn incoming(mut self, main: &str) -> Self {
        self.incoming = ["-incoming", main].map(String::from).to_vec();
        self
    }

    /// A command that starts the VMM, such as `unshare`.
    #[must_use]
    pub fn wrapper(mut self, words: &[&str]) -> Self {
        self.wrapper = words.iter().map(ToString::to_string).collect();
        self
    }

    /// The same, where the wrapper does not become the VMM but starts it as a child and hands on its exit code.
    #[must_use]
    pub fn forking_wrapper(mut self, words: &[&str]) -> Self {
        self.wrapper_forks = true;
        self.wrapper(words)
    }

    /// Standard input and output, such as the slave of a pseudoterminal.
    #[must_use]
    pub fn terminal(self, slave: OwnedFd) -> Self {
        let slave = Arc::new(slave);
        self.stdio([slave.clone(), slave])
    }

    /// Standard input and output, in place of nothing and a file.
    #[must_use]
    pub fn stdio(mut self, [input, output]: [Arc<OwnedFd>; 2]) -> Self {
        self.stdio = Some([input, output]);
        self
    }

    /// These arguments and no others; memory, vCPUs and QMP are then the caller's affair.
    #[must_use]
    pub fn only_args(mut self, args: &[&str]) -> Self {
        self.only = Some(args.iter().map(ToString::to_string).collect());
        self
    }

    /// An environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    /// Another binary.
    #[must_use]
    pub fn binary(mut self, path: impl Into<PathBuf>) -> Self {
        self.binary = Some(path.into());
        self
    }

    /// The machine arguments, the same for source and target, with the QMP socket in `dir`.
    fn arguments(&self, dir: &Path) -> Vec<String> {
        if let Some(only) = &self.only {
            return only.clone();
        }
        let memory = self.memory_args.clone().unwrap_or_else(|| {
            let object = format!("memory-backend-memfd,id=ram0,size={}", self.memory);
            ["-object", &object, "-machine", "memory-backend=ram0"].map(String::from).to_vec()
        });
        let qmp = format!("unix:{},server=on,wait=off", dir.join("qmp").display());
        let mut args = vec!["-nodefaults".to_owned(), "-display".into(), "none".into()];
        args.extend(memory);
        args.extend(["-smp".into(), self.cpus.to_string(), "-qmp".into(), qmp]);
        args.extend(self.extra.clone());
        args
    }

    /// Starts the process without connecting to it; standard error goes to `stderr` in its folder.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(self) -> anyhow::Result<Vmm> {
        let dir = tempfile::Builder::new().prefix("cpr-vmm-").tempdir()?;
        let args = self.arguments(dir.path());
        let mut words: Vec<OsString> = self.wrapper.iter().map(OsString::from).collect();
        let program = self.binary.clone().unwrap_or_else(binary);
        words.push(program.clone().into());
        words.extend(args.iter().chain(&self.incoming).map(OsString::from));
        let (stdin, stdout): (Stdio, Stdio) = match &self.stdio {
            Some([input, output]) => (input.try_clone()?.into(), output.try_clone()?.into()),
            None => (Stdio::null(), File::create(dir.path().join("stdout"))?.into()),
        };
        let child = Command::new(&words[0])
            .args(&words[1..])
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir(dir.path())
            .stdin(stdin)
            .stdout(stdout)
            .stderr(File::create(dir.path().join("stderr"))?)
            .spawn()
            .with_context(|| format!("cannot start {words:?}"))?;
        let mut vmm = Vmm {
            pid: child.id(),
            child,
            dir,
            args,
            binary: program,
            cpus: self.cpus,
            qmp: None,
            next_state: 0,
        };
        if self.wrapper_forks {
            vmm.pid = crate::wait_for("the wrapper's child", PATIENCE, || {
                process::children(vmm.child.id()).ok()?.first().copied()
            })?;
        }
        Ok(vmm)
    }

    /// Starts the process and connects QMP.
    ///
    /// # Errors
    /// It does not come up; the error has its standard error.
    pub fn start(self) -> anyhow::Result<Vmm> {
        let mut vmm = self.spawn()?;
        vmm.connect()?;
        Ok(vmm)
    }
}

/// Where a target of cpr-transfer waits, in its folder.
const CPR_SOCKET: &str = "cpr.sock";

/// What `cpr-exec-timeout` is at the start.
const DEFAULT_LIMIT_MS: u64 = 5000;

/// signal(7).
const SIGKILL: i32 = 9;

/// A running `cpr-vmm`.
pub struct Vmm {
    pid: u32,
    child: Child,
    dir: TempDir,
    args: Vec<String>,
    binary: PathBuf,
    cpus: u8,
    qmp: Option<Qmp>,
    next_state: u32,
}

impl Vmm {
    /// The process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How many vCPUs it has.
    pub fn cpus(&self) -> u8 {
        self.cpus
    }

    /// A path in the VM's own folder, which is its working directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The VM's processes: itself, a wrapper, keepers.
    pub fn processes(&self) -> Vec<u32> {
        process::processes_in(self.dir.path())
    }

    /// The machine arguments that it was started with.
    pub fn args(&self) -> &[String] {
        &self.args
    }

    /// What it wrote to standard error so far.
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.path("stderr")).unwrap_or_default()
    }

    /// Connects QMP, after a mere [`spawn`](VmmBuilder::spawn).
    ///
    /// # Errors
    /// The process does not come up; the error has its standard error.
    pub fn connect(&mut self) -> anyhow::Result<()> {
        match Qmp::connect(&self.path("qmp")) {
            Ok(qmp) => self.qmp = Some(qmp),
            Err(error) => return Err(error.context(format!("cpr-vmm says: {}", self.stderr()))),
        }
        Ok(())
    }

    /// The QMP connection.
    ///
    /// # Panics
    /// If it was never made, or given away.
    pub fn qmp(&mut self) -> &mut Qmp {
        self.qmp.as_mut().expect("there is a QMP connection")
    }

    /// Attaches to the payload.
    ///
    /// # Errors
    /// The payload does not come up.
    pub fn guest(&self) -> anyhow::Result<Guest> {
        Guest::attach(self.pid(), "ram0", self.cpus.into())
            .with_context(|| format!("cpr-vmm says: {}", self.stderr()))
    }

    /// The command that replaces this VMM by another of the same machine.
    pub fn exec_command(&self, incoming: &str) -> Vec<String> {
        self.exec_command_of(&self.binary, incoming)
    }

    /// The same with another program.
    pub fn exec_command_of(&self, program: &Path, incoming: &str) -> Vec<String> {
        let mut command = vec![program.display().to_string()];
        command.extend(self.args.clone());
        command.extend(["-incoming".into(), incoming.into()]);
        command
    }

    /// Sets up cpr-exec with this command; unless a time limit was set, with more time than a busy machine with many
    /// tests on it needs.
    ///
    /// # Errors
    /// QMP refuses.
    pub fn set_exec(&mut self, command: &[String]) -> anyhow::Result<()> {
        let mut arguments = json!({ "mode": "cpr-exec", "cpr-exec-command": command });
        if self.qmp().execute("query-migrate-parameters", json!({}))?["cpr-exec-timeout"] == DEFAULT_LIMIT_MS
        {
            arguments["cpr-exec-timeout"] = 60_000.into();
        }
        self.qmp().execute("migrate-set-parameters", arguments).map(drop)
    }

    /// Sets `cpr-preflight`. A test of what comes later than a preflight turns it off.
    ///
    /// # Errors
    /// QMP refuses.
    pub fn set_preflight(&mut self, policy: &str) -> anyhow::Result<()> {
        self.qmp().execute("migrate-set-parameters", json!({ "cpr-preflight": policy })).map(drop)
    }

    /// Updates by cpr-exec through a memfd, waits until the guest's new VMM has it, and gives its `query-migrate`.
    ///
    /// # Errors
    /// The update fails.
    pub fn update(&mut self) -> anyhow::Result<Value> {
        self.update_through("memfd:")
    }

    /// As [`update`](Self::update), through a state file.
    ///
    /// # Errors
    /// The update fails.
    pub fn update_by_file(&mut self) -> anyhow::Result<Value> {
        self.next_state += 1;
        let uri = format!("file:{}", self.path(&format!("state{}", self.next_state)).display());
        self.update_through(&uri)
    }

    fn update_through(&mut self, uri: &str) -> anyhow::Result<Value> {
        let command = self.exec_command(uri);
        self.set_exec(&command)?;
        self.migrate(uri)
    }

    /// Runs `migrate` and waits for its end, with what is set.
    ///
    /// # Errors
    /// The update fails.
    pub fn migrate(&mut self, uri: &str) -> anyhow::Result<Value> {
        let before = self.generation()?;
        self.qmp().execute("migrate", json!({ "uri": uri }))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let info = self.qmp().execute("query-migrate", json!({}))?;
            match info["status"].as_str() {
                // The last vCPU may still be on its way into the guest.
                Some("completed") if self.generation_of(&info) > before && is_over(&info) => return Ok(info),
                Some("failed") => bail!("the update failed: {}", info["error-desc"]),
                _ => ensure!(Instant::now() < deadline, "the update does not end: {info}"),
            }
            // Asked without a pause, it would spend the CPU that the update needs.
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    /// Where it waits for a source, as a [target](VmmBuilder::target).
    pub fn cpr_socket(&self) -> PathBuf {
        self.path(CPR_SOCKET)
    }

    /// The arguments of a `migrate` to that target.
    pub fn channels_to(target: &Path) -> Value {
        let socket = |path: &Path| json!({ "transport": "socket", "type": "unix", "path": path });
        json!({ "channels": [
            { "channel-type": "main", "addr": socket(&target.with_file_name("main.sock")) },
            { "channel-type": "cpr", "addr": socket(target) },
        ] })
    }

    /// Begins to transfer to `target`, without waiting.
    ///
    /// # Errors
    /// QMP refuses.
    pub fn begin_transfer(&mut self, target: &Path) -> anyhow::Result<()> {
        self.qmp().execute("migrate-set-parameters", json!({ "mode": "cpr-transfer" }))?;
        self.qmp().execute("migrate", Vmm::channels_to(target)).map(drop)
    }

    /// Counts what the process holds once the keeper of the last update is gone.
    ///
    /// # Errors
    /// The keeper stays, or the process ends.
    pub fn census(&mut self) -> anyhow::Result<Census> {
        let pid = self.pid();
        wait_for("the keeper's end", PATIENCE, || process::children(pid).ok()?.is_empty().then_some(()))?;
        // Once round its loop, so that it has also closed what it watched the keeper by.
        self.status()?;
        Census::of(pid)
    }

    /// Transfers to `target`, waits until it has the guest, and gives its `query-migrate`.
    ///
    /// # Errors
    /// The update fails.
    pub fn transfer(&mut self, target: &mut Vmm) -> anyhow::Result<Value> {
        self.begin_transfer(&target.cpr_socket())?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            // The source: a target that takes over answers when it is done.
            let ours = self.qmp().execute("query-migrate", json!({}))?;
            match ours["status"].as_str() {
                Some("completed") => break,
                Some("failed" | "cancelled") => bail!("the transfer failed: {}", ours["error-desc"]),
                _ => ensure!(Instant::now() < deadline, "the transfer does not end: {ours}"),
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        crate::wait_for("the report of the transfer", PATIENCE, || {
            let info = target.qmp().execute("query-migrate", json!({})).ok()?;
            (info["status"] == "completed" && is_over(&info)).then_some(info)
        })
    }

    fn generation(&mut self) -> anyhow::Result<u64> {
        let info = self.qmp().execute("query-migrate", json!({}))?;
        Ok(self.generation_of(&info))
    }

    fn generation_of(&self, info: &Value) -> u64 {
        info["cpr"]["generation"].as_u64().unwrap_or(0)
    }

    /// Switches a migration capability on.
    ///
    /// # Errors
    /// QMP refuses.
    pub fn set_capability(&mut self, name: &str) -> anyhow::Result<()> {
        let list = json!({ "capabilities": [{ "capability": name, "state": true }] });
        self.qmp().execute("migrate-set-capabilities", list).map(drop)
    }

    /// Puts the guest into storage by cpr-reboot; gives `query-migrate`.
    ///
    /// # Errors
    /// The guest is not there.
    pub fn store(&mut self, uri: &str) -> anyhow::Result<Value> {
        self.qmp().execute("migrate-set-parameters", json!({ "mode": "cpr-reboot" }))?;
        self.qmp().execute("migrate", json!({ "uri": uri }))?;
        let info = crate::wait_for("the end of the update", PATIENCE, || {
            let info = self.qmp().execute("query-migrate", json!({})).ok()?;
            matches!(info["status"].as_str(), Some("failed" | "cancelled" | "completed")).then_some(info)
        })?;
        ensure!(info["status"] == "completed", "{info}");
        ensure!(self.status()? == "postmigrate");
        Ok(info)
    }

    /// The run state.
    ///
    /// # Errors
    /// QMP is gone.
    pub fn status(&mut self) -> anyhow::Result<String> {
        let status = self.qmp().execute("query-status", json!({}))?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Stops the process as a whole, with its guest, until [`go_on`](Self::go_on): what it is sent meanwhile it finds
    /// all at once.
    ///
    /// # Errors
    /// It is gone, or does not stop.
    pub fn halt(&self) -> anyhow::Result<()> {
        process::send_signal(self.pid, process::SIGSTOP)?;
        let stopped = || process::status_field(self.pid, "State").is_ok_and(|state| state.starts_with('T'));
        crate::wait_for("the process to stop", PATIENCE, || stopped().then_some(()))
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// It is gone.
    pub fn go_on(&self) -> anyhow::Result<()> {
        Ok(process::send_signal(self.pid, process::SIGCONT)?)
    }

    /// Asks it to end, and waits for a good exit.
    ///
    /// # Errors
    /// It does not end, or not well.
    pub fn quit(mut self) -> anyhow::Result<()> {
        self.qmp().execute("quit", json!({}))?;
        let code = self.wait_exit()?;
        ensure!(code == Some(0), "exit code {code:?}: {}", self.stderr());
        Ok(())
    }

    /// Waits for the end of the process; `None` if a signal ended it.
    ///
    /// # Errors
    /// It goes on.
    pub fn wait_exit(&mut self) -> anyhow::Result<Option<i32>> {
        crate::wait_for("the end of cpr-vmm", PATIENCE, || self.child.try_wait().ok().flatten())
            .map(|s| s.code())
    }
}

/// Whether the report is whole: the phases end with the guest's resumption, if it ran at all.
fn is_over(info: &Value) -> bool {
    let phases = info["cpr"]["phases"].as_array();
    let stopped = phases.is_some_and(|phases| phases.iter().any(|phase| phase["name"] == "stop"));
    !stopped || info["cpr"].get("blackout-us").is_some()
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // An update that was under way leaves the guest to another process, which is to end as well.
        for _ in 0..100 {
            let left = self.processes();
            if left.is_empty() {
                return;
            }
            for pid in left {
                let _ = process::send_signal(pid, SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
