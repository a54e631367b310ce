//! Every fault at every point of an update, in every mode: who has the guest then. Complete by construction: the points
//! are those of `cpr_core::fault`, and what is not done has its reason in the table.
//!
//! After each fault at most one program runs the guest, and exactly one unless the table says `lost`: RAM is intact, the
//! counter never went back, no process, child or descriptor is left over, the monitor has answered each request once and
//! tells what happened, and the next update of whoever has the guest is a good one.
//!
//! What is expected is the function [`expected`] and, printed, `docs/fault-matrix.md` (`CPR_WRITE_DOCS=1` rewrites it).
//! What was seen goes to `fault-matrix.md` in the target folder.

use std::collections::VecDeque;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use cpr_core::fault::{Kind, LOG_VARIABLE, Point, Process, Route, VARIABLE};
use serde_json::{Value, json};
use testkit::process::{self, Census};
use testkit::{Machine, PATIENCE, QmpFailure, Vmm, VmmBuilder, need_kvm, wait_for};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Exec,
    /// cpr-exec without a keeper.
    Halted,
    Transfer,
    Reboot,
}

impl Mode {
    const ALL: [Mode; 4] = [Mode::Exec, Mode::Halted, Mode::Transfer, Mode::Reboot];

    fn route(self) -> Route {
        match self {
            Mode::Exec => Route::Departing,
            Mode::Halted => Route::Halted,
            Mode::Transfer => Route::Alongside,
            Mode::Reboot => Route::Storage,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Mode::Exec => "cpr-exec",
            Mode::Halted => "cpr-exec with x-cpr-exec-keeper=off",
            Mode::Transfer => "cpr-transfer",
            Mode::Reboot => "cpr-reboot",
        }
    }
}

/// The columns.
const KINDS: [Kind; 5] = [Kind::Error, Kind::Panic, Kind::Kill, Kind::Stall, Kind::Corrupt];

/// Who has the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Holder {
    /// The program before the update, as if nothing had happened.
    Source,
    /// The same in what was the keeper: another process id.
    Keeper,
    /// The same, started again in its process in place of the target.
    Fallback,
    Target,
    /// No program: the state file, and whoever is started from it.
    Storage,
}

impl Holder {
    fn name(self) -> &'static str {
        match self {
            Holder::Source => "source",
            Holder::Keeper => "keeper",
            Holder::Fallback => "fallback",
            Holder::Target => "target",
            Holder::Storage => "storage",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Expected {
    Runs(Holder),
    /// Source or keeper go back just as the target commits: whoever wins the word.
    TargetOr(Holder),
    /// The process that had the guest is gone, and nobody else could have had it.
    Lost,
    /// There is no such cell.
    Not(Reason),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Reason {
    NotThere,
    NoData,
    CannotFail,
}

impl Reason {
    const ALL: [(Reason, &str, &str); 3] = [
        (Reason::NotThere, "-¹", "updates of this mode do not come by"),
        (Reason::NoData, "-²", "no bytes pass here that the other side reads"),
        (Reason::CannotFail, "-³", "nothing can fail here: the guest runs, and what goes wrong is logged"),
    ];

    fn mark(self) -> &'static str {
        Reason::ALL.into_iter().find(|(reason, ..)| *reason == self).map_or("", |(_, mark, _)| mark)
    }
}

impl Expected {
    fn text(self) -> String {
        match self {
            Expected::Runs(holder) => holder.name().into(),
            Expected::TargetOr(holder) => format!("{} or target", holder.name()),
            Expected::Lost => "lost".into(),
            Expected::Not(reason) => reason.mark().into(),
        }
    }
}

/// The promise: until the commit, whatever happens to the new program leaves the guest to the old one; and whatever goes
/// wrong in the old one short of its end leaves it there. After the commit nothing but the end of the target matters.
fn expected(mode: Mode, point: Point, kind: Kind) -> Expected {
    let Some(process) = point.process(mode.route()) else { return Expected::Not(Reason::NotThere) };
    if kind == Kind::Corrupt && !point.carries_data() {
        return Expected::Not(Reason::NoData);
    }
    if kind == Kind::Error && point >= Point::Committed {
        return Expected::Not(Reason::CannotFail);
    }
    if kind == Kind::Stall && !is_watched(mode, point) {
        return Expected::Runs(Holder::Target);
    }
    match process {
        Process::Source | Process::Keeper => in_the_owner(mode, process, point, kind),
        // It has touched nothing.
        Process::Asked => Expected::Runs(Holder::Source),
        Process::Target => in_the_target(mode, point, kind),
    }
}

/// Whether somebody ends a process that stands still there. Whoever has the guest is watched by nobody: a stall there is
/// one of a second, after which the update goes on.
fn is_watched(mode: Mode, point: Point) -> bool {
    match point.process(mode.route()) {
        Some(Process::Asked) => true,
        Some(Process::Target) => matches!(mode, Mode::Exec | Mode::Transfer) && point < Point::Committed,
        _ => false,
    }
}

fn in_the_owner(mode: Mode, process: Process, point: Point, kind: Kind) -> Expected {
    let owner = if process == Process::Keeper { Holder::Keeper } else { Holder::Source };
    match (kind, point) {
        (Kind::Panic | Kind::Kill, Point::Complete) if mode == Mode::Reboot => {
            Expected::Runs(Holder::Storage)
        }
        // Nobody else has it yet: the source takes it back, and the file is worth nothing.
        (Kind::Error, Point::Complete) if mode == Mode::Reboot => Expected::Runs(owner),
        (_, Point::Complete) => Expected::Runs(Holder::Target),
        (Kind::Error, Point::Published) => Expected::TargetOr(owner),
        // The target has all that it needs.
        (_, Point::Published) => Expected::Runs(Holder::Target),
        (Kind::Panic | Kind::Kill, _) => Expected::Lost,
        // Nobody has touched anything yet.
        (Kind::Corrupt, Point::Manifest) => Expected::Runs(owner),
        // The source has left its process by the time that the target reads it, or, without a keeper, altogether.
        (Kind::Corrupt, _) => match mode {
            Mode::Exec => Expected::Runs(Holder::Keeper),
            Mode::Halted => Expected::Lost,
            // The target finds it before it has touched anything.
            Mode::Transfer | Mode::Reboot => Expected::Runs(Holder::Source),
        },
        _ => Expected::Runs(owner),
    }
}

fn in_the_target(mode: Mode, point: Point, kind: Kind) -> Expected {
    match mode {
        _ if point >= Point::Committed => Expected::Lost,
        Mode::Halted => Expected::Lost,
        Mode::Transfer => Expected::Runs(Holder::Source),
        Mode::Reboot => Expected::Runs(Holder::Storage),
        // A process that is gone, or that has not made the way back ready, cannot go it.
        Mode::Exec if kind == Kind::Kill || point == Point::Receive => Expected::Runs(Holder::Keeper),
        Mode::Exec => Expected::Runs(Holder::Fallback),
    }
}

/// Whether a target of cpr-transfer goes on waiting for another source: it has not been given anything yet.
fn waits_on(point: Point) -> bool {
    point < Point::AwaitTarget || point == Point::Receive || point == Point::Received
}

/// The table of one mode, with something in each cell.
fn table(mode: Mode, cell: impl Fn(Point, Kind) -> String) -> String {
    let mut text = format!("## {}\n\n| point | in |", mode.name());
    KINDS.iter().for_each(|kind| write!(text, " {} |", kind.name()).expect("a string takes it"));
    text.push_str("\n|---|---|---|---|---|---|---|\n");
    for &point in Point::ALL {
        let process = match point.process(mode.route()) {
            Some(Process::Source) => "source",
            Some(Process::Keeper) => "keeper",
            Some(Process::Asked) => "asked",
            Some(Process::Target) => "target",
            None => "",
        };
        write!(text, "| `{}` | {process} |", point.name()).expect("a string takes it");
        KINDS.iter().for_each(|&kind| write!(text, " {} |", cell(point, kind)).expect("a string takes it"));
        text.push('\n');
    }
    text
}

fn legend() -> String {
    let mut text = String::new();
    for (_, mark, why) in Reason::ALL {
        writeln!(text, "{mark} {why}.  ").expect("a string takes it");
    }
    text
}

/// `docs/fault-matrix.md`.
fn document() -> String {
    let mut text = String::from(include_str!("fault_matrix.md"));
    text.push_str("\n## Points\n\n| point | where |\n|---|---|\n");
    for point in Point::ALL {
        writeln!(text, "| `{}` | {} |", point.name(), point.about()).expect("a string takes it");
    }
    for mode in Mode::ALL {
        text.push('\n');
        text.push_str(&table(mode, |point, kind| expected(mode, point, kind).text()));
    }
    text.push('\n');
    text.push_str(&legend());
    text
}

#[test]
fn the_documentation_has_the_rule() -> anyhow::Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/fault-matrix.md");
    if std::env::var_os("CPR_WRITE_DOCS").is_some() {
        fs::write(&path, document())?;
    }
    ensure!(
        fs::read_to_string(&path)? == document(),
        "docs/fault-matrix.md is not what the rule says; CPR_WRITE_DOCS=1 with this test rewrites it"
    );
    Ok(())
}

/// One cell, while it is tried.
struct Cell {
    mode: Mode,
    point: Point,
    kind: Kind,
    process: Process,
    log: PathBuf,
    _folder: tempfile::TempDir,
    /// Where a guest rests.
    storage: tempfile::TempDir,
}

/// How the update went, as far as the source's monitor tells.
enum End {
    /// `migrate` itself was refused.
    Refused(String),
    Failed(String),
    Completed,
    /// There is no monitor any more.
    Gone,
}

impl Cell {
    fn new(mode: Mode, point: Point, kind: Kind) -> anyhow::Result<Option<Cell>> {
        let Some(process) = point.process(mode.route()) else { return Ok(None) };
        let folder = tempfile::tempdir()?;
        let log = folder.path().join("log");
        let storage = tempfile::tempdir_in("/dev/shm")?;
        Ok(Some(Cell { mode, point, kind, process, log, _folder: folder, storage }))
    }

    /// As the environment spells it: a stall that nobody would end is a pause.
    fn fault(&self) -> String {
        let paused = self.kind == Kind::Stall && !is_watched(self.mode, self.point);
        let kind = if paused { Kind::Pause } else { self.kind };
        format!("{}@{}", kind.name(), self.point.name())
    }

    /// A machine; where vCPUs are handled in numbers there are two.
    fn builder(&self, struck: bool) -> VmmBuilder {
        let many = matches!(
            self.point,
            Point::Leave | Point::Arrive | Point::Save | Point::Restored | Point::Commit
        );
        let cpus = if many && self.kind == Kind::Error { 2 } else { 1 };
        let builder = VmmBuilder::new().cpus(cpus).args(&["-append", &format!("cpus={cpus}")]);
        let builder = builder.env(LOG_VARIABLE, &self.log);
        let builder = if self.mode == Mode::Reboot { self.with_ram_in_file(builder) } else { builder };
        if struck { builder.env(VARIABLE, self.fault()) } else { builder }
    }

    fn run(&self) -> anyhow::Result<Expected> {
        let builder = self.builder(matches!(self.process, Process::Source | Process::Keeper));
        let mut machine = match self.mode {
            Mode::Reboot => Machine::full_in_file(builder, &self.ram(), 11)?,
            _ => Machine::full(builder, 11)?,
        };
        let before = Census::of(machine.vmm.pid())?;
        let seen = match self.mode {
            Mode::Exec | Mode::Halted => self.exec(&mut machine, &before)?,
            Mode::Transfer => self.transfer(&mut machine, &before)?,
            Mode::Reboot => self.storage(&mut machine, &before)?,
        };
        self.has_struck()?;
        let Expected::Runs(holder) = seen else { return Ok(seen) };
        self.next_update(machine, holder)?;
        Ok(seen)
    }

    /// Once, and as it should.
    fn has_struck(&self) -> anyhow::Result<()> {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        ensure!(log == format!("{}\n", self.fault()), "faults: {log:?}");
        Ok(())
    }

    fn exec(&self, machine: &mut Machine, before: &Census) -> anyhow::Result<Expected> {
        machine.set("x-cpr-exec-keeper", json!(self.mode == Mode::Exec))?;
        if is_watched(self.mode, self.point) && self.kind == Kind::Stall {
            machine.set("cpr-exec-timeout", json!(4000))?;
        }
        let is_new = matches!(self.process, Process::Asked | Process::Target);
        let struck = is_new.then(|| self.fault());
        machine.vmm.set_exec(&exec_command(&machine.vmm, struck.as_deref()))?;
        let mut end = migrate(machine, json!({ "uri": "memfd:" }))?;
        if self.point == Point::Released {
            // Which comes later than the report.
            wait_for("the fault", PATIENCE, || self.log.exists().then_some(()))?;
            if machine.vmm.status().is_err() {
                end = End::Gone;
            }
        }
        let holder = match end {
            End::Gone => {
                wait_for("the end of every process", PATIENCE, || {
                    machine.vmm.processes().is_empty().then_some(())
                })?;
                machine.stands_still()?;
                if self.process == Process::Keeper {
                    ensure!(machine.vmm.wait_exit()? == Some(1));
                    let said = machine.vmm.stderr();
                    ensure!(said.contains("the source ended before it gave the state"), "{said}");
                }
                return Ok(Expected::Lost);
            }
            End::Completed => Holder::Target,
            End::Failed(error) | End::Refused(error) => {
                self.is_told(&error)?;
                self.holder_after_failure(machine)?
            }
        };
        let runner = machine.runner().context(holder.name())?;
        ensure!((runner == machine.vmm.pid()) == (holder != Holder::Keeper), "{runner} has the guest");
        self.is_whole(machine, runner, before)?;
        Ok(Expected::Runs(holder))
    }

    /// The old program has it: in which process, and was it started again?
    fn holder_after_failure(&self, machine: &mut Machine) -> anyhow::Result<Holder> {
        let runner = machine.runner()?;
        if runner != machine.vmm.pid() {
            return Ok(Holder::Keeper);
        }
        let again = fs::read(format!("/proc/{runner}/cmdline"))?.windows(9).any(|word| word == b"-incoming");
        Ok(if again { Holder::Fallback } else { Holder::Source })
    }

    fn transfer(&self, machine: &mut Machine, before: &Census) -> anyhow::Result<Expected> {
        let struck = self.process == Process::Target;
        let mut target = self.builder(struck).target("unix:main.sock").start()?;
        machine.set("mode", json!("cpr-transfer"))?;
        let end = migrate(machine, Vmm::channels_to(&target.cpr_socket()))?;
        if let End::Failed(error) | End::Refused(error) = &end {
            self.is_told(error)?;
            let runner = machine.runner()?;
            ensure!(runner == machine.vmm.pid(), "{runner} has the guest");
            self.is_whole(machine, runner, before)?;
            self.target_is_left(target)?;
            return Ok(Expected::Runs(Holder::Source));
        }
        // The source is done with it, or dead; what becomes of the target?
        let status = wait_for("the target", PATIENCE, || match target.status() {
            Ok(status) if status == "inmigrate" && !waits_on(self.point) => None,
            other => Some(other.ok()),
        })?;
        match (status.as_deref(), &end) {
            (Some("running"), _) => {
                let source = machine.follow(target)?;
                if let End::Completed = end {
                    source.quit()?;
                }
                let runner = machine.runner()?;
                self.is_whole(machine, runner, &Census::of(runner)?)?;
                Ok(Expected::Runs(Holder::Target))
            }
            (Some("inmigrate"), End::Gone) => {
                machine.stands_still()?;
                target.quit()?;
                Ok(Expected::Lost)
            }
            (None, End::Gone) => {
                ensure!(target.wait_exit()? == Some(1), "{}", target.stderr());
                ensure!(
                    target.stderr().contains("the source ended before it gave the state"),
                    "{}",
                    target.stderr()
                );
                machine.stands_still()?;
                Ok(Expected::Lost)
            }
            (None, End::Completed) => {
                target.wait_exit()?;
                machine.stands_still()?;
                ensure!(machine.vmm.status()? == "postmigrate");
                Ok(Expected::Lost)
            }
            (status, _) => bail!("the target is {status:?}"),
        }
    }

    fn ram(&self) -> PathBuf {
        self.storage.path().join("ram")
    }

    fn state_file(&self) -> PathBuf {
        self.storage.path().join("state")
    }

    fn uri(&self) -> String {
        format!("file:{}", self.state_file().display())
    }

    fn with_ram_in_file(&self, builder: VmmBuilder) -> VmmBuilder {
        let ram = self.ram();
        let ram = format!("memory-backend-file,id=ram0,size=64M,share=on,mem-path={}", ram.display());
        builder.memory_args(&["-object", &ram, "-machine", "memory-backend=ram0"])
    }

    /// To storage, as it should be.
    fn store(&self, machine: &mut Machine) -> anyhow::Result<()> {
        machine.vmm.set_capability("x-ignore-shared")?;
        machine.vmm.store(&self.uri()).map(drop)
    }

    /// Puts the guest into storage with its RAM in place, and goes on with it from there.
    fn storage(&self, machine: &mut Machine, before: &Census) -> anyhow::Result<Expected> {
        machine.vmm.set_capability("x-ignore-shared")?;
        machine.set("mode", json!("cpr-reboot"))?;
        let end = migrate(machine, json!({ "uri": self.uri() }))?;
        match &end {
            End::Failed(error) | End::Refused(error) => {
                self.is_told(error)?;
                let runner = machine.runner()?;
                self.is_whole(machine, runner, before)?;
                self.nothing_can_be_started()?;
                return Ok(Expected::Runs(Holder::Source));
            }
            End::Gone => {
                let ended = || machine.vmm.processes().is_empty().then_some(());
                wait_for("the end of every process", PATIENCE, ended)?;
                machine.stands_still()?;
                if !self.state_file().exists() {
                    self.nothing_can_be_started()?;
                    return Ok(Expected::Lost);
                }
            }
            End::Completed => machine.stands_still()?,
        }
        let state = fs::read(self.state_file())?;
        let struck = self.process == Process::Target;
        let builder = || self.builder(struck).incoming(&self.uri());
        let mut target = builder().spawn()?;
        if goes_on(&mut target)? {
            let source = machine.follow(target)?;
            if let End::Completed = end {
                source.quit()?;
            }
            let runner = machine.runner()?;
            self.is_whole(machine, runner, &Census::of(runner)?)?;
            let is_update = matches!(end, End::Completed);
            return Ok(Expected::Runs(if is_update { Holder::Target } else { Holder::Storage }));
        }
        target.wait_exit()?;
        if self.point >= Point::Committed {
            machine.stands_still()?;
            return Ok(Expected::Lost);
        }
        if self.kind != Kind::Kill {
            self.is_told(&target.stderr())?;
        }
        ensure!(fs::read(self.state_file())? == state, "a program that failed changed the state file");
        if !struck {
            // The file is no good. Whoever has not ended the source yet, has the guest.
            machine.vmm.qmp().execute("cont", json!({}))?;
            let runner = machine.runner()?;
            self.is_whole(machine, runner, before)?;
            self.nothing_can_be_started()?;
            return Ok(Expected::Runs(Holder::Source));
        }
        let again = self.builder(false).incoming(&self.uri()).start()?;
        machine.follow(again)?.quit()?;
        machine.runner()?;
        machine.verify()?;
        Ok(Expected::Runs(Holder::Storage))
    }

    /// No half file is left, nor a whole one that a second guest could be started from.
    fn nothing_can_be_started(&self) -> anyhow::Result<()> {
        if let Ok(state) = fs::read(self.state_file()) {
            ensure!(state.ends_with(b"CPR-USED"), "the state file is not marked as used");
        }
        for entry in fs::read_dir(self.storage.path())? {
            let path = entry?.path();
            ensure!([self.ram(), self.state_file()].contains(&path), "{} is left", path.display());
        }
        Ok(())
    }

    /// One that was given nothing waits for another source; any other ends.
    fn target_is_left(&self, mut target: Vmm) -> anyhow::Result<()> {
        let lives = match self.process {
            Process::Target => match self.kind {
                Kind::Error | Kind::Corrupt => waits_on(self.point),
                Kind::Stall => matches!(self.point, Point::Greet | Point::Judge | Point::Verdict),
                _ => false,
            },
            _ => waits_on(self.point),
        };
        if lives && self.kind == Kind::Stall {
            // And it still does: it is its user's to end.
            return Ok(());
        }
        if lives {
            ensure!(target.status()? == "inmigrate");
            return target.quit();
        }
        target.wait_exit()?;
        ensure!(target.processes().is_empty());
        Ok(())
    }

    /// The guest's RAM, children, descriptors, and the one reply per request.
    fn is_whole(&self, machine: &mut Machine, runner: u32, before: &Census) -> anyhow::Result<()> {
        machine.verify()?;
        wait_for("the end of every child", PATIENCE, || {
            process::children(runner).ok().filter(Vec::is_empty).map(drop)
        })?;
        let before = descriptors(before);
        let mut now = Vec::new();
        let settled = wait_for("the descriptors of before", Duration::from_secs(2), || {
            now = descriptors(&Census::of(runner).ok()?);
            (now == before).then_some(())
        });
        settled.with_context(|| differences(&before, &now))?;
        // A reply too many would be taken for the answer to this.
        machine.vmm.qmp().execute("query-status", json!({})).map(drop)
    }

    /// The reason says what happened.
    fn is_told(&self, error: &str) -> anyhow::Result<()> {
        let said: &[&str] = match self.kind {
            Kind::Error => &["an error that was asked for, at "],
            Kind::Panic => &[
                "a panic that was asked for",
                "the target ended before it took over",
                "closed the connection",
            ],
            Kind::Kill => {
                &["was killed by signal 9", "the target ended before it took over", "closed the connection"]
            }
            Kind::Stall => &["no progress for", "said nothing for", "gave no verdict within"],
            Kind::Corrupt => &["is damaged", "descriptors in place of", "speaks version"],
            other => bail!("{other:?} has no column"),
        };
        ensure!(said.iter().any(|said| error.contains(said)), "the user is told: {error}");
        if self.kind == Kind::Error {
            ensure!(error.contains(&format!("'{}'", self.point.name())), "the user is told: {error}");
        }
        Ok(())
    }

    /// Whoever has the guest is well: another update, of the same mode, and an orderly end.
    fn next_update(&self, mut machine: Machine, holder: Holder) -> anyhow::Result<()> {
        let what = || format!("the next update of the {}", holder.name());
        if self.mode == Mode::Reboot {
            self.store(&mut machine).with_context(what)?;
            machine.vmm.quit()?;
            machine.vmm = self.builder(false).incoming(&self.uri()).start().with_context(what)?;
        } else if self.mode == Mode::Transfer {
            let builder = self.builder(false);
            let mut next = builder.target("unix:main.sock").start()?;
            machine.vmm.transfer(&mut next).with_context(what)?;
            machine.follow(next)?.quit()?;
        } else {
            machine.set("cpr-exec-timeout", json!(60_000))?;
            machine.vmm.set_exec(&exec_command(&machine.vmm, None))?;
            machine.vmm.migrate("memfd:").with_context(what)?;
        }
        machine.runner().with_context(what)?;
        machine.verify().with_context(what)?;
        self.has_struck().with_context(what)?;
        machine.vmm.qmp().execute("quit", json!({}))?;
        wait_for("the end of every process", PATIENCE, || machine.vmm.processes().is_empty().then_some(()))
    }
}

/// Whether a program that is started from storage comes to run its guest.
fn goes_on(target: &mut Vmm) -> anyhow::Result<bool> {
    let listens = wait_for("the program or its end", PATIENCE, || {
        let listens = target.path("qmp").exists();
        (listens || target.processes().is_empty()).then_some(listens)
    })?;
    // It answers once it has the guest, or never.
    Ok(listens && target.connect().is_ok() && target.status().is_ok_and(|status| status == "running"))
}

/// The command of an update to a program that this fault strikes, or none.
fn exec_command(vmm: &Vmm, fault: Option<&str>) -> Vec<String> {
    let mut command = vec!["/usr/bin/env".to_owned()];
    match fault {
        Some(fault) => command.push(format!("{VARIABLE}={fault}")),
        None => command.extend(["-u".into(), VARIABLE.into()]),
    }
    command.extend(vmm.exec_command("memfd:"));
    command
}

/// Runs `migrate` and waits for its end, as the monitor tells it.
fn migrate(machine: &mut Machine, arguments: Value) -> anyhow::Result<End> {
    if let Err(error) = machine.vmm.qmp().execute("migrate", arguments) {
        return Ok(match error.downcast::<QmpFailure>() {
            Ok(failure) => End::Refused(failure.desc),
            Err(_) => End::Gone,
        });
    }
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        machine.look_at_beats()?;
        let Ok(info) = machine.vmm.qmp().execute("query-migrate", json!({})) else { return Ok(End::Gone) };
        match info["status"].as_str() {
            Some("failed") => return Ok(End::Failed(info["error-desc"].as_str().unwrap_or_default().into())),
            Some("completed") => return Ok(End::Completed),
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    bail!("the update does not end")
}

/// What is open, but for the control page of the last update, which its report is read from.
fn descriptors(census: &Census) -> Vec<String> {
    let mut descriptors = census.descriptors.clone();
    if let Some(page) = descriptors.iter().position(|path| path.starts_with("/memfd:cpr-control")) {
        descriptors.remove(page);
    }
    descriptors
}

fn differences(before: &[String], now: &[String]) -> String {
    let mut gone: Vec<_> = before.iter().collect();
    let mut new = Vec::new();
    for descriptor in now {
        match gone.iter().position(|known| *known == descriptor) {
            Some(at) => drop(gone.swap_remove(at)),
            None => new.push(descriptor),
        }
    }
    format!("descriptors that are gone: {gone:?}, and new: {new:?}")
}

/// Tries the cells of a column, `at_once` at a time, and adds them to the table of what was seen.
fn column(mode: Mode, kind: Kind, at_once: usize) -> anyhow::Result<()> {
    need_kvm!();
    let only = std::env::var("CPR_FAULT_POINT").ok();
    let wanted = |point: &&Point| only.as_ref().is_none_or(|only| only == point.name());
    let mut cells: VecDeque<Point> = Point::ALL.iter().filter(wanted).copied().collect();
    // The long ones first.
    cells.make_contiguous().sort_by_key(|&point| !is_watched(mode, point));
    let cells = Mutex::new(cells);
    let seen = Mutex::new(Vec::new());
    let next = || cells.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some(point) = next() {
                    let cell = try_cell(mode, point, kind);
                    seen.lock().unwrap_or_else(PoisonError::into_inner).push((point, cell));
                }
            });
        }
    });
    let seen = seen.into_inner().unwrap_or_else(PoisonError::into_inner);
    let text = |point: Point| {
        let cell = seen.iter().find(|(at, _)| *at == point).map(|(_, cell)| cell);
        cell.map_or(String::new(), |cell| cell.as_ref().map_or_else(|_| "**FAILED**".into(), Clone::clone))
    };
    Point::ALL.iter().for_each(|&point| println!("{:18} {}", point.name(), text(point)));
    record(mode, kind, text)?;
    let failures: Vec<_> =
        seen.iter().filter_map(|(point, cell)| Some((point, cell.as_ref().err()?))).collect();
    let told = failures.iter().map(|(point, error)| format!("\n{}@{}: {error:#}", kind.name(), point.name()));
    ensure!(failures.is_empty(), "{}: {}", mode.name(), told.collect::<String>());
    Ok(())
}

/// What was seen, with the time that it took.
fn try_cell(mode: Mode, point: Point, kind: Kind) -> anyhow::Result<String> {
    let expected = expected(mode, point, kind);
    if let Expected::Not(reason) = expected {
        return Ok(reason.mark().into());
    }
    let started = Instant::now();
    let cell = Cell::new(mode, point, kind)?.context("no update comes by")?;
    let seen = cell.run()?;
    let as_expected = match expected {
        Expected::TargetOr(owner) => [owner, Holder::Target].map(Expected::Runs).contains(&seen),
        one => one == seen,
    };
    ensure!(as_expected, "expected: {}, seen: {}", expected.text(), seen.text());
    Ok(format!("{} {:.1} s", seen.text(), started.elapsed().as_secs_f64()))
}

/// Keeps the column, and writes the table of all that were tried so far. Columns may be tried in processes of their own.
fn record(mode: Mode, kind: Kind, cell: impl Fn(Point) -> String) -> anyhow::Result<()> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fault-matrix");
    fs::create_dir_all(&folder)?;
    let place = |mode: Mode, kind: Kind| folder.join(format!("{mode:?}-{}", kind.name()));
    let lines: String = Point::ALL.iter().map(|&point| cell(point) + "\n").collect();
    fs::write(place(mode, kind), lines)?;
    let mut text = String::from("# Faults at every point of an update: who has the guest then\n");
    for mode in Mode::ALL {
        let columns = KINDS.map(|kind| fs::read_to_string(place(mode, kind)).unwrap_or_default());
        let seen = |point: Point, kind: Kind| {
            let column = KINDS.iter().position(|known| *known == kind).map(|at| &columns[at]);
            let row = Point::ALL.iter().position(|known| *known == point);
            column.zip(row).and_then(|(column, row)| column.lines().nth(row)).unwrap_or_default().to_owned()
        };
        text.push('\n');
        text.push_str(&table(mode, seen));
    }
    text.push('\n');
    text.push_str(&legend());
    // The target folder, which names the platform in between.
    let whole = folder.ancestors().nth(3).unwrap_or(&folder).join("fault-matrix.md");
    let part = folder.join(format!("part-{}", std::process::id()));
    fs::write(&part, text)?;
    Ok(fs::rename(part, whole)?)
}

macro_rules! columns {
    ($($module:ident $mode:expr;)+) => {
        $(mod $module {
            use super::*;

            #[test]
            fn error() -> anyhow::Result<()> {
                column($mode, Kind::Error, 1)
            }

            #[test]
            fn panic() -> anyhow::Result<()> {
                column($mode, Kind::Panic, 1)
            }

            #[test]
            fn kill() -> anyhow::Result<()> {
                column($mode, Kind::Kill, 1)
            }

            // Which mostly sleep.
            #[test]
            fn stall() -> anyhow::Result<()> {
                column($mode, Kind::Stall, 6)
            }

            #[test]
            fn corrupt() -> anyhow::Result<()> {
                column($mode, Kind::Corrupt, 1)
            }
        })+
    };
}

columns! {
    exec Mode::Exec;
    exec_without_keeper Mode::Halted;
    transfer Mode::Transfer;
    reboot Mode::Reboot;
}
