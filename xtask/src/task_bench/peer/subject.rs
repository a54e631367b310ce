//! A running VMM that can be updated: one interface for all, so that each is measured by the same code.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use testkit::{Guest, PATIENCE, QmpFailure, Vmm, VmmBuilder, timeline, wait_for};

use super::plan::{Cell, Mode, Who};
use super::programs::{Programs, Qemu};

/// The target of cpr-transfer, that listens already, has this long to come to rest.
const SETTLE: Duration = Duration::from_millis(100);

/// Ends the process when this thread ends, however it does; kept over an exec. See PR_SET_PDEATHSIG(2const).
const WITH_US: [&str; 3] = ["setpriv", "--pdeathsig", "KILL"];

/// Name and duration of the pieces of a blackout.
pub(super) type Phases = Vec<(String, Duration)>;

/// A VMM with a guest in it. An update is [`prepare`](Self::prepare), [`begin`](Self::begin),
/// [`finish`](Self::finish), in this order; only the second is within what is measured. Dropped, it ends its processes.
pub(super) trait Subject {
    /// The guest's RAM. Good for all updates to come.
    fn guest(&self) -> Result<Guest>;

    /// Why it cannot update by `mode`, in its own words, if so. The guest runs and no update is under way.
    fn refuses(&mut self, mode: Mode) -> Result<Option<String>>;

    /// Does what can be done for an update while the guest still runs.
    fn prepare(&mut self, mode: Mode) -> Result<()>;

    /// Begins the prepared update. When it returns, the old program will not run the guest any more.
    fn begin(&mut self, mode: Mode) -> Result<()>;

    /// Waits until the new program runs the guest and takes orders; gives what it says about the pause, if anything.
    fn finish(&mut self, mode: Mode) -> Result<Option<Phases>>;

    /// Asks the program to end, and waits until it has.
    fn quit(self: Box<Self>) -> Result<()>;
}

/// Starts `who` with the machine of `cell`.
pub(super) fn start(programs: &Programs, who: Who, cell: &Cell) -> Result<Box<dyn Subject>> {
    match who {
        Who::CprVmm => {
            let payload = programs.payload.display().to_string();
            let builder = VmmBuilder::new().binary(&programs.cpr_vmm).memory(cell.ram_bytes()).args(&[
                "-kernel",
                &payload,
                "-append",
                &format!("cpus={}", cell.vcpus),
            ]);
            let pair = Pair::start(builder, None, "ram0", cell)?;
            Ok(Box::new(CprVmm { pair, report: Value::Null }))
        }
        Who::Qemu | Who::QemuSmall => {
            let qemu = programs.qemu(who).with_context(|| format!("{} is not there", who.name()))?;
            let words = qemu_words(qemu, &programs.payload, cell)?;
            let builder = VmmBuilder::new().binary(&qemu.program);
            let pair = Pair::start(builder, Some(words), "memory-backend-memfd", cell)?;
            Ok(Box::new(QemuVm { pair }))
        }
    }
}

/// The least QEMU that does the same: no defaults, a firmware that boots at once, and monitors that wait for nobody.
fn qemu_words(qemu: &Qemu, payload: &Path, cell: &Cell) -> Result<Vec<String>> {
    let payload = payload.to_str().context("the target folder's name is not UTF-8")?;
    let bytes = cell.ram_bytes();
    let memory = format!("memory-backend-memfd,id=ram0,share=on,size={bytes}");
    let options = [
        ("-display", "none"),
        ("-serial", "null"),
        ("-machine", "microvm,memory-backend=ram0,aux-ram-share=on"),
        ("-accel", "kvm"),
        ("-cpu", "host"),
        ("-bios", "qboot.rom"),
        ("-object", &memory),
        ("-m", &format!("{}M", bytes >> 20)),
        ("-smp", &cell.vcpus.to_string()),
        ("-kernel", payload),
        ("-append", &format!("cpus={}", cell.vcpus)),
        // In the VM's folder, which is its working directory.
        ("-qmp", "unix:qmp,server=on,wait=off"),
    ];
    let mut words = qemu.arguments.clone();
    words.extend(["-nodefaults", "-no-user-config"].map(str::to_owned));
    words.extend(options.iter().flat_map(|(name, value)| [(*name).to_owned(), (*value).to_owned()]));
    Ok(words)
}

/// A program that runs the guest, and during cpr-transfer the one that will.
struct Pair {
    builder: VmmBuilder,
    /// The whole command line, where `builder` does not know it.
    words: Option<Vec<String>>,
    source: Vmm,
    target: Option<Vmm>,
    /// The name of the guest's RAM as a memfd.
    memfd: &'static str,
    vcpus: u8,
}

impl Pair {
    fn start(
        builder: VmmBuilder,
        words: Option<Vec<String>>,
        memfd: &'static str,
        cell: &Cell,
    ) -> Result<Pair> {
        let builder = builder.wrapper(&WITH_US).cpus(cell.vcpus);
        let source = with_arguments(&builder, words.as_deref(), &[]).start()?;
        Ok(Pair { builder, words, source, target: None, memfd, vcpus: cell.vcpus })
    }

    fn guest(&self) -> Result<Guest> {
        Guest::attach(self.source.pid(), self.memfd, self.vcpus.into())
            .with_context(|| format!("the VMM says: {}", self.source.stderr()))
    }

    fn refuses(&mut self, mode: Mode) -> Result<Option<String>> {
        match self.source.qmp().execute("migrate-set-parameters", json!({ "mode": mode.name() })) {
            Ok(_) => Ok(None),
            Err(error) => error.downcast::<QmpFailure>().map(|failure| Some(failure.desc)),
        }
    }

    /// Sets up cpr-exec of the same program with `incoming`.
    fn prepare_exec(&mut self, incoming: &str) -> Result<()> {
        let command = without_incoming(&self.source.exec_command(incoming));
        let command: Vec<String> = command.into_iter().chain(["-incoming".into(), incoming.into()]).collect();
        self.source.set_exec(&command)
    }

    /// Starts the target of cpr-transfer, and sets the source up for it.
    fn prepare_transfer(&mut self) -> Result<()> {
        let cpr = channel("cpr", Path::new("cpr")).to_string();
        let incoming = ["-incoming", "unix:main", "-incoming", &cpr];
        let target = with_arguments(&self.builder, self.words.as_deref(), &incoming).spawn()?;
        let listens = || target.path("cpr").exists().then_some(());
        wait_for("the target of cpr-transfer to listen", PATIENCE, listens)
            .with_context(|| format!("it says: {}", target.stderr()))?;
        thread::sleep(SETTLE);
        self.target = Some(target);
        let parameters = json!({ "mode": Mode::CprTransfer.name() });
        self.source.qmp().execute("migrate-set-parameters", parameters).map(drop)
    }

    /// Migrates to the prepared target; the guest stands still, or runs there, when this returns.
    fn begin_transfer(&mut self) -> Result<()> {
        let target = self.target.as_ref().context("no target was prepared")?;
        let channels = [channel("main", &target.path("main")), channel("cpr", &target.path("cpr"))];
        let qmp = self.source.qmp();
        qmp.take_events();
        qmp.execute("migrate", json!({ "channels": channels }))?;
        let deadline = Instant::now() + PATIENCE;
        let stopped = |event: &Value| event["event"] == "STOP";
        while !qmp.take_events().iter().any(stopped) {
            match qmp.try_read(Duration::from_millis(200))? {
                Some(event) if stopped(&event) => break,
                Some(_) => {}
                None => {
                    let info = qmp.execute("query-migrate", json!({}))?;
                    if info["status"] == "completed" {
                        break;
                    }
                    let over = info["status"] == "failed" || Instant::now() > deadline;
                    ensure!(!over, "cpr-transfer does not end: {info}; the target says: {}", target.stderr());
                }
            }
        }
        Ok(())
    }

    /// Waits for both sides to be through, and ends the source.
    fn finish_transfer(&mut self) -> Result<Value> {
        let mut target = self.target.take().context("no target was prepared")?;
        target.connect()?;
        wait_running(&mut target)?;
        let done = |vmm: &mut Vmm| vmm.status().is_ok_and(|status| status == "postmigrate").then_some(());
        wait_for("the source to be through", PATIENCE, || done(&mut self.source))?;
        // Either side may be the one that knows the phases.
        let mut report = target.qmp().execute("query-migrate", json!({}))?;
        if phases(&report).is_none() {
            report = self.source.qmp().execute("query-migrate", json!({}))?;
        }
        std::mem::replace(&mut self.source, target).quit()?;
        Ok(report)
    }
}

/// `builder` with `extra` arguments after its own.
fn with_arguments(builder: &VmmBuilder, words: Option<&[String]>, extra: &[&str]) -> VmmBuilder {
    match words {
        None => builder.clone().args(extra),
        Some(words) => {
            let words: Vec<&str> = words.iter().map(String::as_str).chain(extra.iter().copied()).collect();
            builder.clone().only_args(&words)
        }
    }
}

/// A command line without what it had to say on where the guest comes from.
fn without_incoming(words: &[String]) -> Vec<String> {
    let mut kept = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if word == "-incoming" {
            words.next();
        } else {
            kept.push(word.clone());
        }
    }
    kept
}

fn channel(kind: &str, path: &Path) -> Value {
    let address = json!({ "transport": "socket", "type": "unix", "path": path });
    json!({ "channel-type": kind, "addr": address })
}

fn wait_running(vmm: &mut Vmm) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = vmm.status()?;
        if status == "running" {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the new program is {status}; it says: {}", vmm.stderr());
        thread::sleep(Duration::from_millis(1));
    }
}

/// The phases of the pause, if `report` has a whole update.
fn phases(report: &Value) -> Option<Phases> {
    timeline(report).ok().map(|(_, phases)| phases)
}

struct CprVmm {
    pair: Pair,
    /// What the last update by exec was told about.
    report: Value,
}

impl CprVmm {
    /// No file is touched.
    const STATE: &str = "memfd:";
}

impl Subject for CprVmm {
    fn guest(&self) -> Result<Guest> {
        self.pair.guest()
    }

    fn refuses(&mut self, mode: Mode) -> Result<Option<String>> {
        self.pair.refuses(mode)
    }

    fn prepare(&mut self, mode: Mode) -> Result<()> {
        match mode {
            Mode::CprExec => self.pair.prepare_exec(Self::STATE),
            Mode::CprTransfer => self.pair.prepare_transfer(),
        }
    }

    fn begin(&mut self, mode: Mode) -> Result<()> {
        match mode {
            Mode::CprExec => self.report = self.pair.source.migrate(Self::STATE)?,
            Mode::CprTransfer => self.pair.begin_transfer()?,
        }
        Ok(())
    }

    fn finish(&mut self, mode: Mode) -> Result<Option<Phases>> {
        if mode == Mode::CprTransfer {
            self.report = self.pair.finish_transfer()?;
        }
        Ok(phases(&self.report))
    }

    fn quit(self: Box<Self>) -> Result<()> {
        self.pair.source.quit()
    }
}

struct QemuVm {
    pair: Pair,
}

impl QemuVm {
    /// In a file: QEMU 11.1 has nothing else. It is small, and read back from the page cache.
    fn state(&self) -> String {
        format!("file:{}", self.pair.source.path("state").display())
    }
}

impl Subject for QemuVm {
    fn guest(&self) -> Result<Guest> {
        self.pair.guest()
    }

    fn refuses(&mut self, mode: Mode) -> Result<Option<String>> {
        self.pair.refuses(mode)
    }

    fn prepare(&mut self, mode: Mode) -> Result<()> {
        let state = self.state();
        match mode {
            Mode::CprExec => self.pair.prepare_exec(&state),
            Mode::CprTransfer => self.pair.prepare_transfer(),
        }
    }

    fn begin(&mut self, mode: Mode) -> Result<()> {
        if mode == Mode::CprTransfer {
            return self.pair.begin_transfer();
        }
        let state = self.state();
        let qmp = self.pair.source.qmp();
        qmp.send("migrate", json!({ "uri": state }))?;
        // The exec closes the connection.
        while let Some(message) = qmp.try_read_to_end()? {
            if message.get("error").is_some() {
                bail!("QEMU refuses the update: {message}");
            }
            ensure!(message["event"] != "RESUME", "QEMU gave the update up: {}", self.pair.source.stderr());
        }
        Ok(())
    }

    fn finish(&mut self, mode: Mode) -> Result<Option<Phases>> {
        match mode {
            Mode::CprExec => {
                self.pair.source.connect()?;
                wait_running(&mut self.pair.source)?;
            }
            Mode::CprTransfer => drop(self.pair.finish_transfer()?),
        }
        Ok(None)
    }

    fn quit(self: Box<Self>) -> Result<()> {
        self.pair.source.quit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_the_guest_came_from_is_forgotten() {
        let words = ["vmm", "-m", "1G", "-incoming", "unix:main", "-smp", "2", "-incoming", "{}"];
        let words: Vec<String> = words.map(str::to_owned).into();
        assert_eq!(without_incoming(&words), ["vmm", "-m", "1G", "-smp", "2"]);
    }

    #[test]
    fn qemu_gets_the_machine_of_the_cell() {
        let qemu = Qemu {
            who: Who::Qemu,
            program: "ld.so".into(),
            arguments: vec!["qemu".into()],
            version: String::new(),
        };
        let words = qemu_words(&qemu, Path::new("/p.elf"), Cell::named("1Gx4").unwrap()).unwrap().join(" ");
        assert!(words.starts_with("qemu -nodefaults"), "{words}");
        for part in ["size=1090519040", "-m 1040M", "-smp 4", "-append cpus=4", "aux-ram-share=on"] {
            assert!(words.contains(part), "{part}: {words}");
        }
    }
}
