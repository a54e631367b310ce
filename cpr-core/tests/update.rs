//! Source and target of an update, phase by phase, with a mode and a host that only write down what happens to them.
//!
//! Both halves are driven as a loop would drive them. The mode is known to nobody: whatever holds for it holds by its
//! properties.
#![cfg(not(loom))]

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter};
use cpr_core::ownership::Owner;
use cpr_core::preflight::{Asked, Manifest, Policy, SectionCatalogue, SectionRange, Verdict};
use cpr_core::{
    Arrival, Attempt, Backing, Control, Course, CprMode, Event, FdKind, FdPolicy, FdRegistry, GuestActivity,
    HandOver, Host, Incoming, IncomingError, Introduced, MainSource, MemoryRegion, ModeId, ModeInfo, ModeSet,
    OrderClass, Outcome, Prepared, Properties, Services, Stamp, StateWriter, Step, Subscription,
    TerminalAction, Update, UpdateError, Wait,
};

const MODE: ModeId = ModeId::from_static("a-mode-of-this-test");

/// What happened, in order, as seen by everybody who takes part.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn note(&self, what: impl Into<String>) {
        self.0.lock().unwrap().push(what.into());
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }

    fn count(&self, start: &str) -> usize {
        self.0.lock().unwrap().iter().filter(|line| line.starts_with(start)).count()
    }
}

/// What a fake mode does when it is asked to hand over.
enum Plan {
    Terminal,
    /// Waits this many times, then completes.
    Wait(usize),
}

/// Early and main frame, each time that they left the source.
type Frames = Arc<Mutex<Vec<(Vec<u8>, Vec<u8>)>>>;

struct FakeMode {
    log: Log,
    properties: Properties,
    course: Course,
    fails_at: Option<&'static str>,
    /// Where it fails, the target has committed a moment before.
    target_commits: bool,
    prepare_waits: usize,
    await_waits: usize,
    /// What its last act answers.
    last_act: Result<(), &'static str>,
    plan: Plan,
    frames: Frames,
    /// What the target says to a manifest, after it has kept the mode waiting once; or there is nobody to ask.
    verdict: Option<Verdict>,
    has_asked: bool,
}

impl FakeMode {
    fn new(log: &Log) -> FakeMode {
        FakeMode {
            log: log.clone(),
            properties: Properties::RAM_IN_PLACE | Properties::DESCRIPTORS_SURVIVE,
            course: Course::Halted,
            fails_at: None,
            target_commits: false,
            prepare_waits: 0,
            await_waits: 0,
            last_act: Err("came back"),
            plan: Plan::Wait(0),
            frames: Frames::default(),
            verdict: None,
            has_asked: false,
        }
    }

    /// On any course, with every wait that there can be, and a last act that does what it should.
    fn on(course: Course, log: &Log) -> FakeMode {
        FakeMode { course, await_waits: 1, last_act: Ok(()), plan: Plan::Wait(1), ..FakeMode::new(log) }
    }

    fn visit(&self, attempt: &Attempt<'_>, place: &'static str) -> Result<(), BoxError> {
        self.log.note(format!("mode {place}"));
        if self.fails_at != Some(place) {
            return Ok(());
        }
        if self.target_commits {
            attempt.control.ownership().commit().unwrap();
        }
        Err(format!("broken {place}").into())
    }

    fn note_frames(&self, attempt: &Attempt<'_>, state: StateWriter) {
        let epoch = attempt.control.epoch();
        self.frames.lock().unwrap().push((state.early.finish(epoch), state.main.finish(epoch)));
    }

    fn last_act(&self) -> TerminalAction {
        let (log, answer) = (self.log.clone(), self.last_act);
        Box::new(move || {
            log.note("last act");
            Ok(answer?)
        })
    }

    fn next(&mut self) -> HandOver {
        match &mut self.plan {
            Plan::Terminal => HandOver::Terminal(self.last_act()),
            Plan::Wait(0) => HandOver::Complete,
            Plan::Wait(left) => {
                *left -= 1;
                HandOver::Wait(soon())
            }
        }
    }
}

fn ready_after(waits: &mut usize) -> Prepared {
    if *waits == 0 {
        return Prepared::Ready;
    }
    *waits -= 1;
    Prepared::Wait(soon())
}

fn soon() -> Wait {
    Wait { fds: Vec::new(), deadline: Some(Instant::now()) }
}

impl CprMode for FakeMode {
    fn id(&self) -> ModeId {
        MODE
    }

    fn properties(&self) -> Properties {
        self.properties
    }

    fn course(&self) -> Course {
        self.course
    }

    fn check(&mut self) -> Result<(), BoxError> {
        self.log.note("mode check");
        if self.fails_at == Some("check") { Err("broken check".into()) } else { Ok(()) }
    }

    fn preflight(&mut self, attempt: &Attempt<'_>, manifest: &Manifest) -> Result<Asked, BoxError> {
        self.visit(attempt, "preflight")?;
        let sections: Vec<_> = manifest.sections.iter().map(|section| section.name.as_str()).collect();
        assert_eq!(sections, ["clock", "cpr-core/update", "cpr-core/activity"]);
        let Some(verdict) = &self.verdict else { return Ok(Asked::Nobody) };
        if !std::mem::replace(&mut self.has_asked, true) {
            return Ok(Asked::Wait(soon()));
        }
        Ok(verdict.clone().into_asked())
    }

    fn prepare(&mut self, attempt: &Attempt<'_>) -> Result<Prepared, BoxError> {
        self.visit(attempt, "prepare")?;
        Ok(ready_after(&mut self.prepare_waits))
    }

    fn introduce(&mut self, attempt: &Attempt<'_>, state: StateWriter) -> Result<Introduced, BoxError> {
        self.visit(attempt, "introduce")?;
        self.note_frames(attempt, state);
        Ok(match self.course {
            Course::Departing => Introduced::Terminal(self.last_act()),
            Course::Halted | Course::Alongside => Introduced::Done,
        })
    }

    fn await_target(&mut self, attempt: &Attempt<'_>) -> Result<Prepared, BoxError> {
        self.visit(attempt, "await_target")?;
        Ok(ready_after(&mut self.await_waits))
    }

    fn hand_over(&mut self, attempt: &Attempt<'_>, state: StateWriter) -> Result<HandOver, BoxError> {
        self.visit(attempt, "hand_over")?;
        self.note_frames(attempt, state);
        Ok(self.next())
    }

    fn poll_hand_over(&mut self, attempt: &Attempt<'_>) -> Result<HandOver, BoxError> {
        self.visit(attempt, "poll")?;
        Ok(self.next())
    }

    fn roll_back(&mut self, attempt: &Attempt<'_>) {
        assert_eq!(attempt.control.ownership().owner(), Some(Owner::RolledBack), "the word comes first");
        self.log.note("mode roll_back");
    }
}

struct FakeHost {
    log: Log,
    memory: Vec<MemoryRegion>,
    activity: GuestActivity,
    fails_at: Option<&'static str>,
    /// Which of its visits there fail.
    failing: Range<usize>,
    visits: usize,
    slot: Option<TerminalAction>,
    /// Sections that `load` claims.
    claims: Vec<&'static str>,
    /// Descriptors that `load` finds, and keeps.
    finds: Vec<&'static str>,
    found: Vec<Arc<OwnedFd>>,
    services: Services,
    manifest: Option<Manifest>,
}

impl FakeHost {
    fn new(log: &Log, services: &Services) -> FakeHost {
        FakeHost {
            log: log.clone(),
            memory: Vec::new(),
            activity: GuestActivity::Running,
            fails_at: None,
            failing: 0..usize::MAX,
            visits: 0,
            slot: None,
            claims: vec!["clock"],
            finds: Vec::new(),
            found: Vec::new(),
            services: services.clone(),
            manifest: None,
        }
    }

    fn visit(&mut self, place: &'static str) -> Result<(), BoxError> {
        self.log.note(format!("host {place}"));
        self.fail_if_planned(place)
    }

    fn fail_if_planned(&mut self, place: &'static str) -> Result<(), BoxError> {
        if self.fails_at != Some(place) {
            return Ok(());
        }
        self.visits += 1;
        if self.failing.contains(&(self.visits - 1)) { Err(format!("broken {place}").into()) } else { Ok(()) }
    }
}

impl Host for FakeHost {
    fn memory(&self) -> Vec<MemoryRegion> {
        self.memory.clone()
    }

    fn manifest(&self, mode: &ModeInfo) -> Option<Manifest> {
        assert_eq!(mode.id, MODE);
        self.manifest.clone()
    }

    fn activity(&self) -> GuestActivity {
        self.activity
    }

    fn stop(&mut self, deadline: Instant) -> Result<GuestActivity, BoxError> {
        self.visit("stop")?;
        assert!(deadline > Instant::now());
        Ok(self.activity)
    }

    fn resume(&mut self, activity: GuestActivity) -> Result<(), BoxError> {
        self.log.note(format!("host resume {activity:?}"));
        self.fail_if_planned("resume")
    }

    fn save_early(&mut self, mode: &ModeInfo, _: &mut FrameWriter) -> Result<(), BoxError> {
        assert_eq!(mode.id, MODE);
        self.visit("save_early")
    }

    fn save(&mut self, main: &mut FrameWriter) -> Result<(), BoxError> {
        self.visit("save")?;
        let version = main.version_for("clock", 1..=2)?;
        main.put("clock", 0, version, b"{}".to_vec())?;
        Ok(())
    }

    fn before_departure(&mut self) -> Result<(), BoxError> {
        self.visit("before_departure")
    }

    fn depart(&mut self) -> Result<(), BoxError> {
        self.visit("depart")
    }

    fn departed(&mut self) -> Result<(), BoxError> {
        self.visit("departed")
    }

    fn load(&mut self, main: &mut Frame) -> Result<(), BoxError> {
        self.visit("load")?;
        for name in &self.claims {
            main.require(name, 0)?;
        }
        for name in &self.finds {
            self.found.push(self.services.registry.find(name, 0).ok_or("not there")?);
        }
        Ok(())
    }

    fn request_terminal(&mut self, action: TerminalAction) {
        self.log.note("host request_terminal");
        self.slot = Some(action);
    }
}

fn subscribe(
    services: &Services,
    log: &Log,
    name: &'static str,
    class: OrderClass,
    fails_at: Option<Event>,
) -> Subscription {
    let log = log.clone();
    let modes = ModeSet::having(Properties::RAM_IN_PLACE);
    services.notifier.subscribe(name, modes, class, move |notice| {
        assert_eq!(notice.mode.id, MODE);
        log.note(format!("{name} {}", notice.event));
        if fails_at == Some(notice.event) { Err("no".into()) } else { Ok(()) }
    })
}

/// One turn of a loop: what is in the slot is run, or else the update stepped.
fn turn(update: &mut Update, host: &mut FakeHost) -> Step {
    match host.slot.take() {
        Some(action) => update.terminal_returned(host, action()),
        None => update.step(host),
    }
}

/// Turns like a loop, with `Wait` written down, until the update is over.
fn run(update: &mut Update, host: &mut FakeHost, log: &Log) -> Outcome {
    let limit = Instant::now() + Duration::from_secs(10);
    loop {
        assert!(Instant::now() < limit, "the update does not end");
        match turn(update, host) {
            Step::Again => {}
            Step::Wait(wait) => {
                assert!(!wait.fds.is_empty() || wait.deadline.is_some());
                log.note("loop waits");
            }
            Step::Terminal => {
                assert!(host.slot.is_some(), "the host was given the action");
                assert!(matches!(update.step(host), Step::Terminal), "stepping it meanwhile changes nothing");
            }
            Step::Finished(outcome) => return outcome,
        }
    }
}

fn run_until_wait(update: &mut Update, host: &mut FakeHost) {
    loop {
        match turn(update, host) {
            Step::Again | Step::Terminal => {}
            Step::Wait(_) => return,
            Step::Finished(outcome) => panic!("{outcome:?}"),
        }
    }
}

fn finished(step: Step) -> Outcome {
    match step {
        Step::Finished(outcome) => outcome,
        other => panic!("{other:?}"),
    }
}

fn failure(outcome: Outcome) -> String {
    match outcome {
        Outcome::Failed { error, guest } => {
            guest.unwrap();
            error.to_string()
        }
        Outcome::HandedOver => panic!("it did not fail"),
    }
}

#[test]
fn phases_come_in_the_order_of_the_contract() {
    let (log, services) = (Log::default(), Services::default());
    let _late = subscribe(&services, &log, "late", OrderClass::LATE, None);
    let _early = subscribe(&services, &log, "early", OrderClass::EARLY, None);
    let mut host = FakeHost::new(&log, &services);
    let mode = FakeMode { prepare_waits: 1, plan: Plan::Wait(2), ..FakeMode::new(&log) };
    let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
    assert!(!update.has_stopped_guest());
    assert!(matches!(run(&mut update, &mut host, &log), Outcome::HandedOver));
    assert!(update.has_stopped_guest());
    assert_eq!(
        log.take(),
        [
            "mode check",
            "early Prepare",
            "late Prepare",
            "mode prepare",
            "loop waits",
            "mode prepare",
            "host stop",
            "early Stopped",
            "late Stopped",
            "host save",
            "host save_early",
            "early HandOver",
            "late HandOver",
            "mode hand_over",
            "loop waits",
            "mode poll",
            "loop waits",
            "mode poll",
        ]
    );
    assert!(!update.has_departed());
    let timeline = update.control().timeline();
    let stamps = [Stamp::Begin, Stamp::StopRequested, Stamp::Stopped, Stamp::Saved];
    let at: Vec<_> = stamps.into_iter().map(|stamp| timeline.at_ns(stamp).unwrap()).collect();
    assert!(at.is_sorted(), "{at:?}");
}

/// The sections of both frames.
fn sections((early, main): &(Vec<u8>, Vec<u8>)) -> [String; 2] {
    [early, main].map(|frame| Frame::parse(frame).unwrap().remaining().join(" "))
}

#[test]
fn sections_are_written_for_the_target_or_the_update_is_rolled_back() {
    for course in [Course::Halted, Course::Departing, Course::Alongside] {
        for (reads, expected) in
            [(None, Ok(2)), (Some((1, 2)), Ok(2)), (Some((0, 1)), Ok(1)), (Some((3, 4)), Err(()))]
        {
            let (log, services) = (Log::default(), Services::default());
            let mut host = FakeHost::new(&log, &services);
            let mode = FakeMode::on(course, &log);
            let frames = mode.frames.clone();
            let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
            if let Some((least, most)) = reads {
                update.set_reads([SectionRange { name: "clock".into(), least, most }].into_iter().collect());
            }
            match (run(&mut update, &mut host, &log), expected) {
                (Outcome::HandedOver, Ok(version)) => {
                    let frames = frames.lock().unwrap();
                    let (_, main) = frames.last().unwrap();
                    let clock = Frame::parse(main).unwrap().require("clock", 0).unwrap();
                    assert_eq!(clock.version, version, "{course:?} {reads:?}");
                }
                (Outcome::Failed { error, guest }, Err(())) => {
                    assert_eq!(
                        error.to_string(),
                        "the state could not be saved: state section 'clock' cannot be written for this target: it \
                         reads versions 3 and 4, this program writes versions 1 and 2"
                    );
                    guest.unwrap();
                    let said = log.take();
                    assert_eq!(said[said.len() - 2..], ["mode roll_back", "host resume Running"]);
                }
                other => panic!("{course:?} {reads:?}: {other:?}"),
            }
        }
    }
}

/// What comes with the target's introduction, and what with the hand over.
const EARLY: &str = "cpr-core/update/0";
const MAIN: &str = "clock/0 cpr-core/activity/0";

/// An update with a preflight, whose target has this to say.
fn asked(
    log: &Log,
    services: &Services,
    verdict: Option<Verdict>,
    policy: Policy,
) -> (Update, FakeHost, Frames) {
    let mut host = FakeHost::new(log, services);
    host.manifest = Some(Manifest::default().section("clock", 0, 1..=1));
    let mode = FakeMode { verdict, ..FakeMode::new(log) };
    let frames = mode.frames.clone();
    let mut update = Update::begin(services, Box::new(mode), &host).unwrap();
    update.set_preflight(policy);
    (update, host, frames)
}

fn refusal() -> Option<Verdict> {
    Some(Verdict::Refused(vec!["no clock here".into(), "no room".into()]))
}

#[test]
fn the_target_is_asked_before_anybody_is_told() {
    let (log, services) = (Log::default(), Services::default());
    let _subscriber = subscribe(&services, &log, "subscriber", OrderClass::NORMAL, None);
    let reads = SectionCatalogue::default().reads("clock", 1..=3);
    let verdict = reads.judge(&Manifest::default().section("cpr-core/update", 0, 1..=1), []);
    assert!(matches!(verdict, Verdict::Refused(_)), "a manifest without the core's own sections");
    let verdict = Verdict::Accepted(vec![cpr_core::preflight::SectionRange {
        name: "clock".into(),
        least: 1,
        most: 3,
    }]);
    let (mut update, mut host, frames) = asked(&log, &services, Some(verdict), Policy::Require);
    assert!(matches!(run(&mut update, &mut host, &log), Outcome::HandedOver));
    let said = log.take();
    let expected = [
        "mode check",
        "mode preflight",
        "loop waits",
        "mode preflight",
        "subscriber Prepare",
        "mode prepare",
    ];
    assert_eq!(said[..6], expected);
    assert_eq!(update.reads().and_then(|reads| reads.get("clock")), Some(1..=3));
    assert_eq!(update.preflight_refusal(), None);
    assert_eq!(sections(&frames.lock().unwrap()[0]), [EARLY, MAIN]);
}

#[test]
fn a_target_that_refuses_beforehand_undoes_nothing() {
    let (log, services) = (Log::default(), Services::default());
    let _subscriber = subscribe(&services, &log, "subscriber", OrderClass::NORMAL, None);
    let (mut update, mut host, _) = asked(&log, &services, refusal(), Policy::Require);
    let error = failure(run(&mut update, &mut host, &log));
    assert_eq!(error, "a-mode-of-this-test preflight: the new program refuses: no clock here; no room");
    let expected = ["mode check", "mode preflight", "loop waits", "mode preflight", "mode roll_back"];
    assert_eq!(log.take(), expected);
    assert_eq!(update.reads(), None);
}

#[test]
fn a_refusal_that_the_user_overrules_is_remembered_on_both_sides() {
    let (log, services) = (Log::default(), Services::default());
    let (mut update, mut host, frames) = asked(&log, &services, refusal(), Policy::Warn);
    assert!(matches!(run(&mut update, &mut host, &log), Outcome::HandedOver));
    let reason = "the new program refuses: no clock here; no room";
    assert_eq!(update.preflight_refusal(), Some(reason));
    let (early, _) = frames.lock().unwrap()[0].clone();
    let mut services = Services::default();
    let arrival = Arrival {
        mode: update.mode().clone(),
        early: Frame::parse(&early).unwrap(),
        registry: FdRegistry::default(),
        control: update.control().clone(),
    };
    let mut incoming = Incoming::begin(&mut services, arrival).unwrap();
    assert_eq!(incoming.preflight_refusal(), Some(reason));
    assert_eq!(incoming.early().remaining(), [""; 0]);
}

#[test]
fn nobody_is_asked_in_vain() {
    let (log, services) = (Log::default(), Services::default());
    // The mode cannot ask; the user does not want it; the host has nothing to show; the mode fails at it.
    let (mut update, mut host, _) = asked(&log, &services, None, Policy::Require);
    assert!(matches!(run(&mut update, &mut host, &log), Outcome::HandedOver));
    assert_eq!(log.count("mode preflight"), 1);
    log.take();
    let (mut update, mut host, _) = asked(&log, &services, refusal(), Policy::Off);
    assert!(matches!(run(&mut update, &mut host, &log), Outcome::HandedOver));
    let (mut update, mut host, _) = asked(&log, &services, refusal(), Policy::Require);
    host.manifest = None;
    assert!(matches!(run(&mut update, &mut host, &log), Outcome::HandedOver));
    assert_eq!(log.count("mode preflight"), 0);
    let mut host = FakeHost::new(&log, &services);
    host.manifest = Some(Manifest::default().section("clock", 0, 1..=1));
    let mode = FakeMode { fails_at: Some("preflight"), ..FakeMode::new(&log) };
    let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
    update.set_preflight(Policy::Warn);
    let error = failure(run(&mut update, &mut host, &log));
    assert_eq!(error, "a-mode-of-this-test could not prepare: broken preflight");
}

#[test]
fn an_update_is_cancelled_while_the_target_is_asked() {
    let (log, services) = (Log::default(), Services::default());
    let (mut update, mut host, _) = asked(&log, &services, refusal(), Policy::Require);
    run_until_wait(&mut update, &mut host);
    log.take();
    assert_eq!(failure(update.cancel(&mut host)), "the update was cancelled");
    assert_eq!(log.take(), ["mode roll_back"]);
}

#[test]
fn a_departing_program_runs_the_guest_elsewhere_until_the_target_is_ready() {
    let (log, services) = (Log::default(), Services::default());
    let _late = subscribe(&services, &log, "late", OrderClass::LATE, None);
    let _early = subscribe(&services, &log, "early", OrderClass::EARLY, None);
    let mut host = FakeHost::new(&log, &services);
    let mode = FakeMode { await_waits: 2, ..FakeMode::on(Course::Departing, &log) };
    let frames = mode.frames.clone();
    let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
    while host.slot.is_none() {
        assert!(!update.has_stopped_guest());
        turn(&mut update, &mut host);
    }
    assert!(update.has_stopped_guest() && !update.has_departed());
    let stamped = |update: &Update| update.control().timeline().at_ns(Stamp::StopRequested);
    assert_eq!(stamped(&update), None, "the first pause is not the blackout");
    run_until_wait(&mut update, &mut host);
    assert!(!update.has_stopped_guest() && update.has_departed());
    assert_eq!(stamped(&update), None);
    log.note("loop waits");
    assert!(matches!(run(&mut update, &mut host, &log), Outcome::HandedOver));
    assert!(update.has_stopped_guest() && update.has_departed());
    assert!(stamped(&update).is_some());
    assert_eq!(
        log.take(),
        [
            "mode check",
            "early Prepare",
            "late Prepare",
            "mode prepare",
            "host before_departure",
            "host save_early",
            "mode introduce",
            "host stop",
            "host depart",
            "host request_terminal",
            "last act",
            "host departed",
            "host resume Running",
            "mode await_target",
            "loop waits",
            "mode await_target",
            "loop waits",
            "mode await_target",
            "host stop",
            "early Stopped",
            "late Stopped",
            "host save",
            "early HandOver",
            "late HandOver",
            "mode hand_over",
            "loop waits",
            "mode poll",
        ]
    );
    let frames: Vec<_> = frames.lock().unwrap().iter().map(sections).collect();
    assert_eq!(frames, [[EARLY, "cpr-core/room/0"], ["", MAIN]], "room for the state, then the state");
}

#[test]
fn a_target_that_forgoes_the_guest_ends_the_update() {
    for course in [Course::Departing, Course::Alongside] {
        let (log, services) = (Log::default(), Services::default());
        let mut host = FakeHost::new(&log, &services);
        let mode = FakeMode { await_waits: 9, ..FakeMode::on(course, &log) };
        let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
        run_until_wait(&mut update, &mut host);
        update.control().ownership().commit().unwrap();
        log.take();
        assert!(matches!(run(&mut update, &mut host, &log), Outcome::HandedOver));
        assert_eq!(log.take(), [""; 0], "the guest was neither stopped nor saved");
    }
}

#[test]
fn a_target_alongside_is_built_before_the_guest_stops() {
    let (log, services) = (Log::default(), Services::default());
    let _late = subscribe(&services, &log, "late", OrderClass::LATE, None);
    let _early = subscribe(&services, &log, "early", OrderClass::EARLY, None);
    let mut host = FakeHost::new(&log, &services);
    let mode = FakeMode { await_waits: 2, ..FakeMode::on(Course::Alongside, &log) };
    let frames = mode.frames.clone();
    let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
    assert!(matches!(run(&mut update, &mut host, &log), Outcome::HandedOver));
    assert!(update.has_stopped_guest() && !update.has_departed());
    assert_eq!(
        log.take(),
        [
            "mode check",
            "early Prepare",
            "late Prepare",
            "mode prepare",
            "host save_early",
            "mode introduce",
            "mode await_target",
            "loop waits",
            "mode await_target",
            "loop waits",
            "mode await_target",
            "host stop",
            "early Stopped",
            "late Stopped",
            "host save",
            "early HandOver",
            "late HandOver",
            "mode hand_over",
            "loop waits",
            "mode poll",
        ]
    );
    let frames: Vec<_> = frames.lock().unwrap().iter().map(sections).collect();
    assert_eq!(frames, [[EARLY, ""], ["", MAIN]]);
}

#[test]
fn a_late_subscriber_is_not_told_of_the_middle_of_an_update() {
    let (log, services) = (Log::default(), Services::default());
    let mut host = FakeHost::new(&log, &services);
    let mode = FakeMode { prepare_waits: 1, ..FakeMode::new(&log) };
    let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
    run_until_wait(&mut update, &mut host);
    let _late = subscribe(&services, &log, "late", OrderClass::NORMAL, None);
    run(&mut update, &mut host, &log);
    assert!(!log.take().iter().any(|line| line.starts_with("late")));
}

/// Where a source can fail.
#[derive(Debug, Clone, Copy)]
enum Place {
    Mode(&'static str),
    Host(&'static str),
    /// The second time.
    HostAgain(&'static str),
    Subscriber(Event),
    LastAct,
}
use Place::{HostAgain, LastAct, Subscriber};

/// Whether the guest stood still when it happened.
const RUNS: bool = false;
const STANDS: bool = true;

/// Fails at `place` with what the user reads then, and looks at what comes after that. Answers whether the program was in
/// another process by then.
fn fails(course: Course, place: Place, expected: &str, stopped: bool) -> bool {
    let [departed, _] = [GuestActivity::Running, GuestActivity::Paused].map(|activity| {
        let (log, services) = (Log::default(), Services::default());
        let _first = subscribe(&services, &log, "first", OrderClass::EARLY, None);
        let mut host = FakeHost::new(&log, &services);
        let mut mode = FakeMode::on(course, &log);
        host.activity = activity;
        let mut event = None;
        match place {
            Place::Mode(at) => mode.fails_at = Some(at),
            Place::Host(at) => host.fails_at = Some(at),
            HostAgain(at) => (host.fails_at, host.failing) = (Some(at), 1..2),
            Subscriber(at) => event = Some(at),
            LastAct => {
                mode.last_act = Err("came back");
                mode.plan = Plan::Terminal;
            }
        }
        let _early = subscribe(&services, &log, "early", OrderClass::EARLY, event);
        let _normal = subscribe(&services, &log, "normal", OrderClass::NORMAL, None);
        let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
        assert_eq!(failure(run(&mut update, &mut host, &log)), expected);
        assert!(!update.has_stopped_guest());
        assert_eq!(log.count("host stop"), log.count(&format!("host resume {activity:?}")), "{expected}");

        // Exactly those who were told of the beginning, the last first; then the guest, as it was.
        let mut ending = vec!["mode roll_back".to_owned()];
        if !matches!(place, Subscriber(Event::Prepare)) {
            ending.push("normal RolledBack".to_owned());
        }
        ending.extend(["early RolledBack".to_owned(), "first RolledBack".to_owned()]);
        if stopped {
            ending.push(format!("host resume {activity:?}"));
        }
        let log = log.take();
        assert!(log.ends_with(&ending), "{expected}: {log:#?}");
        assert_eq!(
            log.iter().filter(|line| line.ends_with("RolledBack")).count(),
            ending.len() - 1 - usize::from(stopped)
        );
        update.has_departed()
    });
    departed
}

#[test]
fn every_failure_is_undone_in_reverse_order_and_resumes_the_guest() {
    let cases = [
        (Subscriber(Event::Prepare), "early failed at Prepare: no", RUNS),
        (Place::Mode("prepare"), "a-mode-of-this-test could not prepare: broken prepare", RUNS),
        (Place::Host("stop"), "the guest could not be stopped: broken stop", STANDS),
        (Subscriber(Event::Stopped), "early failed at Stopped: no", STANDS),
        (Place::Host("save"), "the state could not be saved: broken save", STANDS),
        (Place::Host("save_early"), "the state could not be saved: broken save_early", STANDS),
        (Subscriber(Event::HandOver), "early failed at HandOver: no", STANDS),
        (Place::Mode("hand_over"), "a-mode-of-this-test could not hand over: broken hand_over", STANDS),
        (Place::Mode("poll"), "a-mode-of-this-test could not hand over: broken poll", STANDS),
        (LastAct, "a-mode-of-this-test could not hand over: came back", STANDS),
    ];
    for (place, expected, stopped) in cases {
        assert!(!fails(Course::Halted, place, expected, stopped));
    }
}

#[test]
fn every_failure_beside_a_target_is_undone_too() {
    let cases = [
        (Subscriber(Event::Prepare), "early failed at Prepare: no", RUNS),
        (Place::Mode("prepare"), "a-mode-of-this-test could not prepare: broken prepare", RUNS),
        (Place::Host("save_early"), "the state could not be saved: broken save_early", RUNS),
        (Place::Mode("introduce"), "a-mode-of-this-test could not prepare: broken introduce", RUNS),
        (Place::Mode("await_target"), "a-mode-of-this-test could not prepare: broken await_target", RUNS),
        (Place::Host("stop"), "the guest could not be stopped: broken stop", STANDS),
        (Subscriber(Event::Stopped), "early failed at Stopped: no", STANDS),
        (Place::Host("save"), "the state could not be saved: broken save", STANDS),
        (Subscriber(Event::HandOver), "early failed at HandOver: no", STANDS),
        (Place::Mode("hand_over"), "a-mode-of-this-test could not hand over: broken hand_over", STANDS),
        (Place::Mode("poll"), "a-mode-of-this-test could not hand over: broken poll", STANDS),
    ];
    for (place, expected, stopped) in cases {
        assert!(!fails(Course::Alongside, place, expected, stopped));
    }
}

#[test]
fn every_failure_on_the_way_to_another_process_or_there_is_undone_too() {
    const HERE: bool = false;
    const THERE: bool = true;
    let cases = [
        (Subscriber(Event::Prepare), "early failed at Prepare: no", RUNS, HERE),
        (Place::Mode("prepare"), "a-mode-of-this-test could not prepare: broken prepare", RUNS, HERE),
        (
            Place::Host("before_departure"),
            "a-mode-of-this-test could not prepare: broken before_departure",
            RUNS,
            HERE,
        ),
        (Place::Host("save_early"), "the state could not be saved: broken save_early", RUNS, HERE),
        (Place::Mode("introduce"), "a-mode-of-this-test could not prepare: broken introduce", RUNS, HERE),
        (Place::Host("stop"), "the guest could not be stopped: broken stop", STANDS, HERE),
        (Place::Host("depart"), "a-mode-of-this-test could not prepare: broken depart", STANDS, HERE),
        (LastAct, "a-mode-of-this-test could not hand over: came back", STANDS, HERE),
        (Place::Host("departed"), "a-mode-of-this-test could not hand over: broken departed", STANDS, THERE),
        (
            Place::Mode("await_target"),
            "a-mode-of-this-test could not prepare: broken await_target",
            RUNS,
            THERE,
        ),
        (HostAgain("stop"), "the guest could not be stopped: broken stop", STANDS, THERE),
        (Subscriber(Event::Stopped), "early failed at Stopped: no", STANDS, THERE),
        (Place::Host("save"), "the state could not be saved: broken save", STANDS, THERE),
        (Subscriber(Event::HandOver), "early failed at HandOver: no", STANDS, THERE),
        (
            Place::Mode("hand_over"),
            "a-mode-of-this-test could not hand over: broken hand_over",
            STANDS,
            THERE,
        ),
        (Place::Mode("poll"), "a-mode-of-this-test could not hand over: broken poll", STANDS, THERE),
    ];
    for (place, expected, stopped, departed) in cases {
        assert_eq!(fails(Course::Departing, place, expected, stopped), departed, "{place:?}");
    }
}

const COURSES: [Course; 3] = [Course::Halted, Course::Departing, Course::Alongside];

#[test]
fn a_last_act_of_the_hand_over_has_nowhere_to_return_to() {
    for course in COURSES {
        let mode = FakeMode { plan: Plan::Terminal, ..FakeMode::on(course, &Log::default()) };
        let (log, services) = (mode.log.clone(), Services::default());
        let mut host = FakeHost::new(&log, &services);
        let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
        let error = failure(run(&mut update, &mut host, &log));
        assert_eq!(error, "a-mode-of-this-test could not hand over: the terminal action returned");
        assert!(log.take().ends_with(&["mode roll_back".into(), "host resume Running".into()]));
    }
}

#[test]
fn a_guest_that_does_not_run_in_the_other_process_is_resumed_once_more() {
    for (failures, resumed) in [(1, true), (2, false)] {
        let (log, services) = (Log::default(), Services::default());
        let mut host = FakeHost::new(&log, &services);
        let mode = FakeMode::on(Course::Departing, &log);
        let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
        while !matches!(update.step(&mut host), Step::Terminal) {}
        let answer = host.slot.take().unwrap()();
        (host.fails_at, host.failing) = (Some("resume"), 0..failures);
        let Outcome::Failed { error: UpdateError::HandOver { .. }, guest } =
            finished(update.terminal_returned(&mut host, answer))
        else {
            panic!("it is a failure");
        };
        assert_eq!(guest.is_ok(), resumed);
        let expected = ["host departed", "host resume Running", "mode roll_back", "host resume Running"];
        assert!(log.take().ends_with(&expected.map(String::from)));
    }
}

#[test]
fn a_guest_that_its_user_pauses_or_continues_meanwhile_stays_so() {
    use GuestActivity::{Paused, Running};
    for course in [Course::Departing, Course::Alongside] {
        for (before, after) in [(Running, Paused), (Paused, Running), (Paused, Paused)] {
            // The target is told how it is at the end.
            let mut sent = send_on(course, &Services::default(), |host| {
                let now = if host.log.count("mode await_target") == 0 { before } else { after };
                host.activity = now;
            });
            let (log, mut services) = (Log::default(), Services::default());
            let mut host = FakeHost::new(&log, &services);
            let mut incoming = Incoming::begin(&mut services, sent.arrival).unwrap();
            incoming.load(&mut host, &mut sent.main).unwrap();
            incoming.commit(&mut host).unwrap();
            assert_eq!(log.take(), ["host load".into(), format!("host resume {after:?}")]);

            // Taken back, it is as the user left it.
            let mut host = FakeHost::new(&log, &services);
            host.activity = before;
            let mode = FakeMode { fails_at: Some("poll"), ..FakeMode::on(course, &log) };
            let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
            run_until_wait(&mut update, &mut host);
            host.activity = after;
            failure(run(&mut update, &mut host, &log));
            let resumed: Vec<_> = log.take().into_iter().filter(|line| line.contains("resume")).collect();
            let there = (course == Course::Departing).then(|| format!("host resume {before:?}"));
            let expected: Vec<_> = there.into_iter().chain([format!("host resume {after:?}")]).collect();
            assert_eq!(resumed, expected);
        }
    }
}

#[test]
fn a_subscriber_that_refuses_is_known_by_name_and_event() {
    for event in [Event::Prepare, Event::Stopped, Event::HandOver] {
        let (log, services) = (Log::default(), Services::default());
        let _disk = subscribe(&services, &log, "disk0", OrderClass::NORMAL, Some(event));
        let mut host = FakeHost::new(&log, &services);
        let mut update = Update::begin(&services, Box::new(FakeMode::new(&log)), &host).unwrap();
        match run(&mut update, &mut host, &log) {
            Outcome::Failed { error: UpdateError::Subscriber(error), guest: Ok(()) } => {
                assert_eq!((error.subscriber.as_str(), error.event), ("disk0", event));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_guest_that_cannot_be_resumed_is_a_second_failure() {
    let (log, services) = (Log::default(), Services::default());
    let mut host = FakeHost::new(&log, &services);
    let mode = FakeMode { fails_at: Some("hand_over"), ..FakeMode::new(&log) };
    let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
    host.fails_at = Some("resume");
    match run(&mut update, &mut host, &log) {
        Outcome::Failed { error: UpdateError::HandOver { .. }, guest: Err(second) } => {
            assert_eq!(second.to_string(), "broken resume");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn preflight_touches_nothing() {
    let (log, services) = (Log::default(), Services::default());
    let _one = subscribe(&services, &log, "one", OrderClass::NORMAL, None);
    let host = FakeHost::new(&log, &services);
    let mode = FakeMode { fails_at: Some("check"), ..FakeMode::new(&log) };
    let error = Update::begin(&services, Box::new(mode), &host).unwrap_err();
    assert_eq!(error.to_string(), "broken check");
    assert!(matches!(error, UpdateError::Refused(_)));
    assert_eq!(log.take(), ["mode check"]);
}

#[test]
fn blockers_and_memory_forbid_every_mode_that_leaves_ram_in_place() {
    let (log, services) = (Log::default(), Services::default());
    let ram = Arc::new(File::open("/dev/null").unwrap());
    services.registry.save("ram0", 0, FdKind::Memfd, FdPolicy::MustSurvive, &ram).unwrap();
    let shared = |id| Backing::Shared { name: "ram0".into(), id };
    let region = |name: &str, backing| MemoryRegion { name: name.into(), len: 4096, backing };
    let mut host = FakeHost::new(&log, &services);
    host.memory = vec![
        region("good", shared(0)),
        region("lost", shared(1)),
        region("heap", Backing::Private),
        region("secret", Backing::GuestMemfd),
        region("rom", Backing::Unknown),
    ];
    let disk = services.blockers.add(ModeSet::having(Properties::RAM_IN_PLACE), "disk0 is locked");
    let begin = |properties: Properties, host: &FakeHost| {
        let mode = FakeMode { properties, ..FakeMode::new(&log) };
        Update::begin(&services, Box::new(mode), host)
    };

    let error = begin(Properties::RAM_IN_PLACE, &host).unwrap_err();
    let UpdateError::Blocked { mode, reasons } = &error else { panic!("{error}") };
    assert_eq!(mode, &MODE);
    assert_eq!(
        reasons.iter().map(ToString::to_string).collect::<Vec<_>>(),
        [
            "disk0 is locked",
            "Memory region lost has no registered descriptor.",
            "Memory region heap is not compatible with CPR. share=on is required for memory-backend objects, \
             and guest RAM needs one (-machine memory-backend=ID).",
            "Memory region secret uses guest_memfd, which is not supported with CPR.",
            "Memory region rom has no descriptor to carry over.",
        ]
    );
    assert!(
        error.to_string().starts_with("a-mode-of-this-test is blocked: disk0 is locked; Memory region lost")
    );
    assert_eq!(log.take(), [""; 0], "the mode was not even asked");

    // A mode that copies RAM does not care what it is made of.
    begin(Properties::SAME_KERNEL, &host).unwrap();
    // One that leaves shared memory in storage wants a file around it, and copies what is private.
    let error = begin(Properties::RAM_IN_STORAGE, &host).unwrap_err();
    let UpdateError::Blocked { reasons, .. } = &error else { panic!("{error}") };
    let without_a_file = |name: &str| {
        format!(
            "Memory region {name} is shared memory without a file, which ends with this process. Use \
             memory-backend-file with share=on, or switch x-ignore-shared off to have it copied."
        )
    };
    assert_eq!(
        reasons.iter().map(ToString::to_string).collect::<Vec<_>>(),
        [
            without_a_file("good"),
            without_a_file("lost"),
            "Memory region secret uses guest_memfd, which is not supported with CPR.".into(),
            "Memory region rom is of unknown making.".into(),
        ]
    );
    let file = |id| Backing::File { name: "ram0".into(), id, path: "/ram".into() };
    host.memory = vec![region("good", file(0)), region("heap", Backing::Private)];
    begin(Properties::RAM_IN_STORAGE, &host).unwrap();
    // One by one the reasons go away.
    drop(disk);
    host.memory = vec![region("file", file(0)), region("lost", file(1))];
    let error = begin(Properties::RAM_IN_PLACE, &host).unwrap_err().to_string();
    assert!(error.ends_with("blocked: Memory region lost has no registered descriptor."), "{error}");
    host.memory.truncate(1);
    begin(Properties::RAM_IN_PLACE, &host).unwrap();
    host.memory = vec![region("good", shared(0))];
    begin(Properties::RAM_IN_PLACE, &host).unwrap();
    // And an owner that goes away takes the memory's descriptor with it.
    drop(ram);
    let error = begin(Properties::RAM_IN_PLACE, &host).unwrap_err().to_string();
    assert!(error.contains("Memory region good has no registered descriptor"), "{error}");
}

#[test]
fn a_user_can_cancel_at_every_step() {
    // Turns of the loop up to the first poll.
    for (course, turns) in [(Course::Halted, 5), (Course::Alongside, 8), (Course::Departing, 9)] {
        for turns in 0..=turns {
            let (log, services) = (Log::default(), Services::default());
            let _one = subscribe(&services, &log, "one", OrderClass::NORMAL, None);
            let mut host = FakeHost::new(&log, &services);
            let mode = FakeMode { plan: Plan::Wait(9), ..FakeMode::on(course, &log) };
            let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
            for _ in 0..turns {
                assert!(!matches!(turn(&mut update, &mut host), Step::Finished(_)));
            }
            let stopped = log.count("host stop") > log.count("host resume");
            let departed = log.count("host departed") > 0;
            assert_eq!((update.has_stopped_guest(), update.has_departed()), (stopped, departed));
            log.take();
            assert_eq!(failure(update.cancel(&mut host)), "the update was cancelled");
            let mut expected = vec!["mode roll_back"];
            expected.extend((turns > 0).then_some("one RolledBack"));
            expected.extend(stopped.then_some("host resume Running"));
            assert_eq!(log.take(), expected, "{course:?} after {turns} turns");
            assert_eq!(update.has_departed(), departed);

            // It is over, whatever is tried.
            let over = "the update is over already";
            assert_eq!(failure(update.cancel(&mut host)), over);
            for answer in [Err("late".into()), Ok(())] {
                assert_eq!(failure(finished(update.terminal_returned(&mut host, answer))), over);
            }
            assert_eq!(failure(finished(update.step(&mut host))), over);
            assert_eq!(log.take(), [""; 0]);
        }
    }
}

#[test]
fn a_guest_that_the_target_has_is_not_taken_back() {
    let cases = [
        (Course::Halted, "hand_over"),
        (Course::Halted, "poll"),
        (Course::Departing, "await_target"),
        (Course::Departing, "hand_over"),
        (Course::Departing, "poll"),
        (Course::Alongside, "await_target"),
        (Course::Alongside, "poll"),
    ];
    for (course, place) in cases {
        let (log, services) = (Log::default(), Services::default());
        let _one = subscribe(&services, &log, "one", OrderClass::NORMAL, None);
        let mut host = FakeHost::new(&log, &services);
        let mode = FakeMode { fails_at: Some(place), target_commits: true, ..FakeMode::on(course, &log) };
        let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
        assert!(matches!(run(&mut update, &mut host, &log), Outcome::HandedOver));
        let expected = format!("mode {place}");
        assert_eq!(log.take().last().unwrap(), &expected, "neither rolled back nor resumed");
    }
    for course in COURSES {
        let (log, services) = (Log::default(), Services::default());
        let mut host = FakeHost::new(&log, &services);
        let mode = FakeMode { await_waits: 0, plan: Plan::Wait(9), ..FakeMode::on(course, &log) };
        let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
        run_until_wait(&mut update, &mut host);
        update.control().ownership().commit().unwrap();
        log.take();
        assert!(matches!(update.cancel(&mut host), Outcome::HandedOver), "too late");
        assert_eq!(log.take(), [""; 0]);
    }
}

// The target's half.

struct Bytes(VecDeque<Vec<u8>>);

impl MainSource for Bytes {
    fn read_main(&mut self) -> Result<Frame, BoxError> {
        let bytes = self.0.pop_front().ok_or("no main frame came")?;
        Ok(Frame::parse(&bytes)?)
    }
}

/// What arrives when `services` is updated by a mode that hands over at once.
struct Sent {
    arrival: Arrival,
    main: Bytes,
    source: Update,
}

fn mode_info() -> ModeInfo {
    ModeInfo { id: MODE, properties: Properties::RAM_IN_PLACE }
}

/// Runs a source up to its hand over and makes its frames arrive, with duplicates of its descriptors.
fn send(services: &Services, activity: GuestActivity) -> Sent {
    send_on(Course::Halted, services, |host| host.activity = activity)
}

/// The same on any course, with a user who may do something to the host before each turn of its loop.
fn send_on(course: Course, services: &Services, user: impl Fn(&mut FakeHost)) -> Sent {
    let log = Log::default();
    let mut host = FakeHost::new(&log, services);
    let mode = FakeMode { plan: Plan::Wait(9), ..FakeMode::on(course, &log) };
    let frames = mode.frames.clone();
    user(&mut host);
    let mut source = Update::begin(services, Box::new(mode), &host).unwrap();
    while log.count("mode hand_over") == 0 {
        user(&mut host);
        assert!(!matches!(turn(&mut source, &mut host), Step::Finished(_)));
    }
    // What came first tells the target what to build; the last is the state.
    let frames = std::mem::take(&mut *frames.lock().unwrap());
    let (early, main) = (&frames.first().unwrap().0, &frames.last().unwrap().1);
    let control = Control::attach(source.control().fd().clone(), source.control().epoch()).unwrap();
    let early = Frame::parse(early).unwrap();
    let arrival = Arrival { mode: mode_info(), early, registry: duplicate(&services.registry), control };
    Sent { arrival, main: Bytes([main.clone()].into()), source }
}

fn duplicate(registry: &FdRegistry) -> FdRegistry {
    let mut fds = Vec::new();
    let body = registry
        .encode(|_, fd| {
            fds.push(Some(fd.try_clone_to_owned()?));
            Ok::<_, std::io::Error>(fds.len() as u64 - 1)
        })
        .unwrap();
    let mut writer = cpr_core::frame::FrameWriter::default();
    writer.put("registry", 0, 1, body).unwrap();
    let section = Frame::parse(&writer.finish(1)).unwrap().require("registry", 0).unwrap();
    FdRegistry::decode(&section, |_, token| Ok(fds[token as usize].take().unwrap())).unwrap()
}

/// A source with one descriptor of each policy.
fn source_services() -> (Services, [Arc<File>; 2]) {
    let services = Services { generation: 4, ..Services::default() };
    let owners = [(); 2].map(|()| Arc::new(File::open("/dev/null").unwrap()));
    services.registry.save("ram0", 0, FdKind::Memfd, FdPolicy::MustSurvive, &owners[0]).unwrap();
    services.registry.save("log", 0, FdKind::Other, FdPolicy::MayBeRebuilt, &owners[1]).unwrap();
    (services, owners)
}

#[test]
fn the_target_adopts_restores_commits_and_runs() {
    for activity in [GuestActivity::Running, GuestActivity::Paused] {
        let (from, _owners) = source_services();
        let mut sent = send(&from, activity);
        let (log, mut services) = (Log::default(), Services::default());
        let _late = subscribe(&services, &log, "late", OrderClass::LATE, None);
        let _early = subscribe(&services, &log, "early", OrderClass::EARLY, None);
        let mut host = FakeHost::new(&log, &services);
        host.finds = vec!["ram0", "log"];

        let mut incoming = Incoming::begin(&mut services, sent.arrival).unwrap();
        assert_eq!((services.generation, incoming.activity()), (5, GuestActivity::Paused));
        assert_eq!(services.registry.unclaimed().len(), 2);
        incoming.load(&mut host, &mut sent.main).unwrap();
        assert_eq!(incoming.activity(), activity);
        assert_eq!(
            sent.source.control().ownership().owner(),
            Some(Owner::Source),
            "passive until the commit"
        );
        incoming.commit(&mut host).unwrap();
        assert_eq!(sent.source.control().ownership().owner(), Some(Owner::Target));
        incoming.released();
        assert_eq!(
            log.take(),
            [
                "early Adopt",
                "late Adopt",
                "host load",
                "early Restored",
                "late Restored",
                &format!("host resume {activity:?}"),
                "early Running",
                "late Running",
                "early Released",
                "late Released",
            ]
        );
        let at = |stamp| incoming.control().timeline().at_ns(stamp).unwrap();
        let stamps =
            [Stamp::Begin, Stamp::Saved, Stamp::Loaded, Stamp::Restored, Stamp::Committed, Stamp::Released];
        assert!(stamps.map(at).is_sorted(), "one timeline for both halves");
        assert!(services.registry.contains("ram0", 0) && services.registry.contains("log", 0));
    }
}

#[test]
fn a_section_that_nobody_claims_refuses_the_update() {
    let (from, _owners) = source_services();
    let mut sent = send(&from, GuestActivity::Running);
    let (log, mut services) = (Log::default(), Services::default());
    let mut host = FakeHost::new(&log, &services);
    host.claims.clear();
    host.finds = vec!["ram0"];
    let mut incoming = Incoming::begin(&mut services, sent.arrival).unwrap();
    let error = incoming.load(&mut host, &mut sent.main).unwrap_err();
    assert_eq!(error.to_string(), "no component of this program claims state section clock/0");
    assert!(matches!(error, IncomingError::UnclaimedSections(_)));
}

#[test]
fn an_early_section_that_nobody_claims_refuses_the_update_too() {
    let mut sent = send(&Services::default(), GuestActivity::Running);
    let mut early = cpr_core::frame::FrameWriter::default();
    let update = sent.arrival.early.require("cpr-core/update", 0).unwrap();
    early.put(&update.name, update.instance, update.version, update.body).unwrap();
    early.put("topology", 3, 1, vec![]).unwrap();
    sent.arrival.early = Frame::parse(&early.finish(sent.arrival.control.epoch())).unwrap();
    let (log, mut services) = (Log::default(), Services::default());
    let mut host = FakeHost::new(&log, &services);
    let mut incoming = Incoming::begin(&mut services, sent.arrival).unwrap();
    let error = incoming.load(&mut host, &mut sent.main).unwrap_err().to_string();
    assert_eq!(error, "no component of this program claims state section topology/3");
}

#[test]
fn a_descriptor_that_nobody_claims_refuses_or_is_closed_by_its_policy() {
    let (from, _owners) = source_services();
    let mut sent = send(&from, GuestActivity::Running);
    let (log, mut services) = (Log::default(), Services::default());
    let mut host = FakeHost::new(&log, &services);
    let mut incoming = Incoming::begin(&mut services, sent.arrival).unwrap();
    let error = incoming.load(&mut host, &mut sent.main).unwrap_err();
    assert_eq!(error.to_string(), "no component of this program claims descriptor 'ram0' (id 0)");
    incoming.abandon();

    let mut sent = send(&from, GuestActivity::Running);
    let mut numbers = Vec::new();
    let mut note = |entry: &cpr_core::FdEntry, fd: std::os::fd::BorrowedFd<'_>| {
        numbers.push((entry.name.clone(), fd.as_raw_fd()));
        Ok::<_, ()>(())
    };
    sent.arrival.registry.walk_fd(&mut note).unwrap();
    let mut services = Services::default();
    let mut host = FakeHost::new(&log, &services);
    host.finds = vec!["ram0"];
    let mut incoming = Incoming::begin(&mut services, sent.arrival).unwrap();
    incoming.load(&mut host, &mut sent.main).unwrap();
    assert!(services.registry.contains("log", 0), "until the commit nothing is closed");
    incoming.commit(&mut host).unwrap();
    assert!(!services.registry.contains("log", 0) && services.registry.contains("ram0", 0));
    assert_eq!(host.found[0].as_fd().as_raw_fd(), numbers.iter().find(|n| n.0 == "ram0").unwrap().1);
}

#[test]
fn the_main_frame_of_another_update_is_refused() {
    let services = Services::default();
    let mut first = send(&services, GuestActivity::Running);
    let mut second = send(&services, GuestActivity::Running);
    let (log, mut services) = (Log::default(), Services::default());
    let mut host = FakeHost::new(&log, &services);
    let mut incoming = Incoming::begin(&mut services, first.arrival).unwrap();
    let error = incoming.load(&mut host, &mut second.main).unwrap_err();
    assert!(matches!(error, IncomingError::OtherUpdate { .. }), "{error}");
    let (ours, theirs) = (first.source.control().epoch(), second.source.control().epoch());
    let text = format!("the state belongs to another update (epoch {theirs:#x}, expected {ours:#x})");
    assert_eq!(error.to_string(), text);
    assert_eq!(log.take(), [""; 0], "no component has seen it");
    let error = incoming.load(&mut host, &mut second.main).unwrap_err().to_string();
    assert_eq!(error, "the state could not be read: no main frame came");
    incoming.load(&mut host, &mut first.main).unwrap();
}

#[test]
fn an_update_of_another_mode_or_without_an_update_is_refused() {
    let mut services = Services::default();
    let mut sent = send(&services, GuestActivity::Running);
    sent.arrival.mode.id = ModeId::from_static("somebody-else");
    let error = Incoming::begin(&mut services, sent.arrival).unwrap_err().to_string();
    assert!(error.ends_with("written by mode 'a-mode-of-this-test', received by 'somebody-else'"), "{error}");

    let mut sent = send(&services, GuestActivity::Running);
    sent.arrival.early.take("cpr-core/update", 0).unwrap();
    let error = Incoming::begin(&mut services, sent.arrival).unwrap_err().to_string();
    assert_eq!(error, "state section 'cpr-core/update' instance 0 is missing");
}

#[test]
fn a_state_that_does_not_say_whether_the_guest_runs_is_refused() {
    let mut sent = send(&Services::default(), GuestActivity::Running);
    let mut main = FrameWriter::default();
    main.put("clock", 0, 1, vec![]).unwrap();
    sent.main = Bytes([main.finish(sent.arrival.control.epoch())].into());
    let (log, mut services) = (Log::default(), Services::default());
    let mut host = FakeHost::new(&log, &services);
    let mut incoming = Incoming::begin(&mut services, sent.arrival).unwrap();
    let error = incoming.load(&mut host, &mut sent.main).unwrap_err().to_string();
    assert_eq!(error, "state section 'cpr-core/activity' instance 0 is missing");
    assert_eq!(log.take(), [""; 0], "no component has seen it");
}

#[test]
fn a_guest_that_has_been_through_more_updates_than_can_be_counted_is_refused() {
    for (before, after) in [(u64::MAX - 1, Some(u64::MAX)), (u64::MAX, None)] {
        let mut sent = send(&Services::default(), GuestActivity::Running);
        let epoch = sent.arrival.early.epoch;
        let mut early = FrameWriter::default();
        early.put_value("cpr-core/update", 0, 1, &("a-mode-of-this-test", before)).unwrap();
        sent.arrival.early = Frame::parse(&early.finish(epoch)).unwrap();
        let mut services = Services::default();
        let result = Incoming::begin(&mut services, sent.arrival);
        assert_eq!(result.is_ok().then_some(services.generation), after);
        if let Err(error) = result {
            let expected =
                format!("state section 'cpr-core/update' instance 0 is malformed: generation {before}");
            assert_eq!(error.to_string(), expected);
        }
    }
}

#[test]
fn an_arrival_cannot_replace_what_the_target_opened_itself() {
    let (from, _owners) = source_services();
    let sent = send(&from, GuestActivity::Running);
    let (mut services, _own) = source_services();
    let error = Incoming::begin(&mut services, sent.arrival).unwrap_err().to_string();
    assert!(error.ends_with("descriptor 'log' (id 0) is registered already"), "{error}");
}

#[test]
fn a_roll_back_wins_over_a_commit_that_comes_later() {
    let services = Services::default();
    let mut sent = send(&services, GuestActivity::Running);
    let (log, mut services) = (Log::default(), Services::default());
    let _one = subscribe(&services, &log, "one", OrderClass::NORMAL, None);
    let mut host = FakeHost::new(&log, &services);
    let mut incoming = Incoming::begin(&mut services, sent.arrival).unwrap();
    incoming.load(&mut host, &mut sent.main).unwrap();

    let source_log = Log::default();
    let mut source_host = FakeHost::new(&source_log, &services);
    assert_eq!(failure(sent.source.cancel(&mut source_host)), "the update was cancelled");
    assert_eq!(source_log.take(), ["host resume Running"]);

    log.take();
    let error = incoming.commit(&mut host).unwrap_err();
    assert!(matches!(error, IncomingError::RolledBack), "{error}");
    assert_eq!(log.take(), [""; 0], "the guest was not touched");
    incoming.abandon();
    assert_eq!(log.take(), ["one Abandoned"]);
}

#[test]
fn a_guest_that_does_not_run_after_the_commit_is_told() {
    let mut services = Services::default();
    let mut sent = send(&services, GuestActivity::Running);
    let log = Log::default();
    let mut host = FakeHost::new(&log, &services);
    let mut incoming = Incoming::begin(&mut services, sent.arrival).unwrap();
    incoming.load(&mut host, &mut sent.main).unwrap();
    host.fails_at = Some("resume");
    let error = incoming.commit(&mut host).unwrap_err().to_string();
    assert_eq!(error, "the guest could not be resumed: broken resume");
}

#[test]
fn who_was_told_adopt_is_told_abandoned_in_reverse_order() {
    // Refused while adopting: those who were told, and nobody else.
    for event in [Event::Adopt, Event::Restored] {
        let mut sent = send(&Services::default(), GuestActivity::Running);
        let (log, mut services) = (Log::default(), Services::default());
        let _late = subscribe(&services, &log, "late", OrderClass::LATE, None);
        let _bad = subscribe(&services, &log, "bad", OrderClass::NORMAL, Some(event));
        let _early = subscribe(&services, &log, "early", OrderClass::EARLY, None);
        let mut host = FakeHost::new(&log, &services);
        let error = match Incoming::begin(&mut services, sent.arrival) {
            Err(error) => error,
            Ok(mut incoming) => {
                let error = incoming.load(&mut host, &mut sent.main).unwrap_err();
                incoming.abandon();
                error
            }
        };
        assert_eq!(error.to_string(), format!("bad failed at {event}: no"));
        let mut expected = vec!["early Adopt", "bad Adopt"];
        if event == Event::Restored {
            expected.extend(["late Adopt", "host load", "early Restored", "bad Restored", "late Abandoned"]);
        }
        expected.extend(["bad Abandoned", "early Abandoned"]);
        assert_eq!(log.take(), expected);
        assert_eq!(
            sent.source.control().ownership().owner(),
            Some(Owner::Source),
            "the source may take it back"
        );
    }
}

#[test]
fn a_component_that_refuses_its_section_refuses_the_update() {
    let mut sent = send(&Services::default(), GuestActivity::Running);
    let (log, mut services) = (Log::default(), Services::default());
    let mut host = FakeHost::new(&log, &services);
    host.claims = vec!["clock", "serial"];
    let mut incoming = Incoming::begin(&mut services, sent.arrival).unwrap();
    let error = incoming.load(&mut host, &mut sent.main).unwrap_err().to_string();
    assert_eq!(error, "the state could not be loaded: state section 'serial' instance 0 is missing");
}
