//! Source and target of an update, phase by phase, with a mode and a host that only write down what happens to them.
//!
//! Both halves are driven as a loop would drive them. The mode is known to nobody: whatever holds for it holds by its
//! properties.
#![cfg(not(loom))]

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter};
use cpr_core::ownership::Owner;
use cpr_core::{
    Arrival, Attempt, Backing, Control, CprMode, Event, FdKind, FdPolicy, FdRegistry, GuestActivity,
    HandOver, Host, Incoming, IncomingError, MainSource, MemoryRegion, ModeId, ModeInfo, ModeSet, OrderClass,
    Outcome, Prepared, Properties, Services, Stamp, StateWriter, Step, Subscription, TerminalAction, Update,
    UpdateError, Wait,
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
}

/// What a fake mode does when it is asked to hand over.
enum Plan {
    Terminal,
    /// Waits this many times, then completes.
    Wait(usize),
    Fail(&'static str),
    /// The target commits, and its mode reports a failure all the same.
    CommitAndFail,
}

/// Both frames as they left the source.
type Frames = Arc<Mutex<Option<(Vec<u8>, Vec<u8>)>>>;

struct FakeMode {
    log: Log,
    properties: Properties,
    fails_at: Option<&'static str>,
    prepare_waits: usize,
    plan: Plan,
    frames: Frames,
}

impl FakeMode {
    fn new(log: &Log) -> FakeMode {
        FakeMode {
            log: log.clone(),
            properties: Properties::RAM_IN_PLACE | Properties::DESCRIPTORS_SURVIVE,
            fails_at: None,
            prepare_waits: 0,
            plan: Plan::Wait(0),
            frames: Frames::default(),
        }
    }

    fn visit(&self, place: &'static str) -> Result<(), BoxError> {
        self.log.note(format!("mode {place}"));
        if self.fails_at == Some(place) { Err(format!("broken {place}").into()) } else { Ok(()) }
    }

    fn next(&mut self) -> HandOver {
        match &mut self.plan {
            Plan::Wait(0) => HandOver::Complete,
            Plan::Wait(left) => {
                *left -= 1;
                HandOver::Wait(soon())
            }
            _ => HandOver::Complete,
        }
    }
}

fn soon() -> Wait {
    Wait { fd: None, deadline: Some(Instant::now()) }
}

impl CprMode for FakeMode {
    fn id(&self) -> ModeId {
        MODE
    }

    fn properties(&self) -> Properties {
        self.properties
    }

    fn check(&mut self) -> Result<(), BoxError> {
        self.visit("check")
    }

    fn prepare(&mut self, attempt: &Attempt<'_>) -> Result<Prepared, BoxError> {
        self.visit("prepare")?;
        assert!(attempt.slow_to_close.is_empty());
        if self.prepare_waits > 0 {
            self.prepare_waits -= 1;
            return Ok(Prepared::Wait(soon()));
        }
        Ok(Prepared::Ready)
    }

    fn hand_over(&mut self, attempt: &Attempt<'_>, state: StateWriter) -> Result<HandOver, BoxError> {
        self.visit("hand_over")?;
        assert_eq!(attempt.slow_to_close, [77]);
        let epoch = attempt.control.epoch();
        *self.frames.lock().unwrap() = Some((state.early.finish(epoch), state.main.finish(epoch)));
        match self.plan {
            Plan::Terminal => Ok(HandOver::Terminal(Box::new(|| "came back".into()))),
            Plan::Fail(why) => Err(why.into()),
            Plan::CommitAndFail => {
                attempt.control.ownership().commit().unwrap();
                Err("the connection broke".into())
            }
            Plan::Wait(_) => Ok(self.next()),
        }
    }

    fn poll_hand_over(&mut self, _: &Attempt<'_>) -> Result<HandOver, BoxError> {
        self.visit("poll")?;
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
    slot: Option<TerminalAction>,
    /// Sections that `load` claims.
    claims: Vec<&'static str>,
    /// Descriptors that `load` finds, and keeps.
    finds: Vec<&'static str>,
    found: Vec<Arc<OwnedFd>>,
    services: Services,
}

impl FakeHost {
    fn new(log: &Log, services: &Services) -> FakeHost {
        FakeHost {
            log: log.clone(),
            memory: Vec::new(),
            activity: GuestActivity::Running,
            fails_at: None,
            slot: None,
            claims: vec!["clock"],
            finds: Vec::new(),
            found: Vec::new(),
            services: services.clone(),
        }
    }

    fn visit(&self, place: &'static str) -> Result<(), BoxError> {
        self.log.note(format!("host {place}"));
        if self.fails_at == Some(place) { Err(format!("broken {place}").into()) } else { Ok(()) }
    }
}

impl Host for FakeHost {
    fn memory(&self) -> Vec<MemoryRegion> {
        self.memory.clone()
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
        if self.fails_at == Some("resume") { Err("broken resume".into()) } else { Ok(()) }
    }

    fn save(&mut self, state: &mut StateWriter) -> Result<(), BoxError> {
        self.visit("save")?;
        state.main.put("clock", 0, 1, b"{}".to_vec())?;
        Ok(())
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

    fn slow_to_close(&self) -> Vec<i32> {
        vec![77]
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

/// Steps like a loop, with `Wait` and `Terminal` written down, until the update is over.
fn run(update: &mut Update, host: &mut FakeHost, log: &Log) -> Outcome {
    let limit = Instant::now() + Duration::from_secs(10);
    loop {
        assert!(Instant::now() < limit, "the update does not end");
        match update.step(host) {
            Step::Again => {}
            Step::Wait(wait) => {
                assert!(wait.fd.is_some() || wait.deadline.is_some());
                log.note("loop waits");
            }
            Step::Terminal => {
                assert!(matches!(update.step(host), Step::Terminal), "stepping it meanwhile changes nothing");
                let error = host.slot.take().expect("the host was given the action")();
                return update.terminal_failed(host, error);
            }
            Step::Finished(outcome) => return outcome,
        }
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
            "early HandOver",
            "late HandOver",
            "mode hand_over",
            "loop waits",
            "mode poll",
            "loop waits",
            "mode poll",
        ]
    );
    let timeline = update.control().timeline();
    let stamps = [Stamp::Begin, Stamp::StopRequested, Stamp::Stopped, Stamp::Saved];
    let at: Vec<_> = stamps.into_iter().map(|stamp| timeline.at_ns(stamp).unwrap()).collect();
    assert!(at.is_sorted(), "{at:?}");
}

#[test]
fn a_late_subscriber_is_not_told_of_the_middle_of_an_update() {
    let (log, services) = (Log::default(), Services::default());
    let mut host = FakeHost::new(&log, &services);
    let mode = FakeMode { prepare_waits: 1, ..FakeMode::new(&log) };
    let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
    while !matches!(update.step(&mut host), Step::Wait(_)) {}
    let _late = subscribe(&services, &log, "late", OrderClass::NORMAL, None);
    run(&mut update, &mut host, &log);
    assert!(!log.take().iter().any(|line| line.starts_with("late")));
}

/// Every place where a source can fail, what the user reads then, and whether the guest had been stopped.
#[test]
fn every_failure_is_undone_in_reverse_order_and_resumes_the_guest() {
    enum Place {
        Mode(&'static str),
        Host(&'static str),
        Subscriber(Event),
        HandOver(Plan),
    }
    use Place::*;
    let cases = [
        (Subscriber(Event::Prepare), "early failed at Prepare: no", false),
        (Mode("prepare"), "a-mode-of-this-test could not prepare: broken prepare", false),
        (Host("stop"), "the guest could not be stopped: broken stop", true),
        (Subscriber(Event::Stopped), "early failed at Stopped: no", true),
        (Host("save"), "the state could not be saved: broken save", true),
        (Subscriber(Event::HandOver), "early failed at HandOver: no", true),
        (HandOver(Plan::Fail("full")), "a-mode-of-this-test could not hand over: full", true),
        (Mode("poll"), "a-mode-of-this-test could not hand over: broken poll", true),
        (HandOver(Plan::Terminal), "a-mode-of-this-test could not hand over: came back", true),
    ];
    for (place, expected, stopped) in cases {
        for activity in [GuestActivity::Running, GuestActivity::Paused] {
            let (log, services) = (Log::default(), Services::default());
            let _first = subscribe(&services, &log, "first", OrderClass::EARLY, None);
            let mut host = FakeHost::new(&log, &services);
            let mut mode = FakeMode { plan: Plan::Wait(1), ..FakeMode::new(&log) };
            host.activity = activity;
            let mut event = None;
            match &place {
                Mode(at) => mode.fails_at = Some(at),
                Host(at) => host.fails_at = Some(at),
                Subscriber(at) => event = Some(*at),
                HandOver(Plan::Terminal) => mode.plan = Plan::Terminal,
                HandOver(_) => mode.plan = Plan::Fail("full"),
            }
            let _early = subscribe(&services, &log, "early", OrderClass::EARLY, event);
            let _normal = subscribe(&services, &log, "normal", OrderClass::NORMAL, None);
            let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
            assert_eq!(failure(run(&mut update, &mut host, &log)), expected);
            assert!(!update.has_stopped_guest());

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
    let mode = FakeMode { plan: Plan::Fail("full"), ..FakeMode::new(&log) };
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
    // One by one the reasons go away.
    drop(disk);
    host.memory.truncate(1);
    begin(Properties::RAM_IN_PLACE, &host).unwrap();
    // And an owner that goes away takes the memory's descriptor with it.
    drop(ram);
    let error = begin(Properties::RAM_IN_PLACE, &host).unwrap_err().to_string();
    assert!(error.contains("Memory region good has no registered descriptor"), "{error}");
}

#[test]
fn a_user_can_cancel_at_every_step() {
    for steps in 0..6 {
        let (log, services) = (Log::default(), Services::default());
        let _one = subscribe(&services, &log, "one", OrderClass::NORMAL, None);
        let mut host = FakeHost::new(&log, &services);
        let mode = FakeMode { plan: Plan::Wait(9), ..FakeMode::new(&log) };
        let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
        for _ in 0..steps {
            assert!(!matches!(update.step(&mut host), Step::Finished(_)));
        }
        log.take();
        let stopped = update.has_stopped_guest();
        assert_eq!(failure(update.cancel(&mut host)), "the update was cancelled");
        let mut expected = vec!["mode roll_back"];
        expected.extend((steps > 0).then_some("one RolledBack"));
        expected.extend(stopped.then_some("host resume Running"));
        assert_eq!(log.take(), expected, "after {steps} steps");

        // It is over, whatever is tried.
        assert_eq!(failure(update.cancel(&mut host)), "the update is over already");
        assert_eq!(failure(update.terminal_failed(&mut host, "late".into())), "the update is over already");
        match update.step(&mut host) {
            Step::Finished(outcome) => assert_eq!(failure(outcome), "the update is over already"),
            other => panic!("{other:?}"),
        }
        assert_eq!(log.take(), [""; 0]);
    }
}

#[test]
fn a_guest_that_the_target_has_is_not_taken_back() {
    let (log, services) = (Log::default(), Services::default());
    let _one = subscribe(&services, &log, "one", OrderClass::NORMAL, None);
    let mut host = FakeHost::new(&log, &services);
    let mode = FakeMode { plan: Plan::CommitAndFail, ..FakeMode::new(&log) };
    let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
    assert!(matches!(run(&mut update, &mut host, &log), Outcome::HandedOver));
    assert_eq!(log.take().last().unwrap(), "mode hand_over", "neither rolled back nor resumed");

    let mode = FakeMode { plan: Plan::Wait(9), ..FakeMode::new(&log) };
    let mut update = Update::begin(&services, Box::new(mode), &host).unwrap();
    while !matches!(update.step(&mut host), Step::Wait(_)) {}
    update.control().ownership().commit().unwrap();
    log.take();
    assert!(matches!(update.cancel(&mut host), Outcome::HandedOver), "too late");
    assert_eq!(log.take(), [""; 0]);
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
    let log = Log::default();
    let mut host = FakeHost::new(&log, services);
    host.activity = activity;
    let mode = FakeMode { plan: Plan::Wait(9), ..FakeMode::new(&log) };
    let frames = mode.frames.clone();
    let mut source = Update::begin(services, Box::new(mode), &host).unwrap();
    while !matches!(source.step(&mut host), Step::Wait(_)) {}
    let (early, main) = frames.lock().unwrap().take().unwrap();
    let control = Control::attach(source.control().fd().clone(), source.control().epoch()).unwrap();
    let early = Frame::parse(&early).unwrap();
    let arrival = Arrival { mode: mode_info(), early, registry: duplicate(&services.registry), control };
    Sent { arrival, main: Bytes([main].into()), source }
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
        assert_eq!((services.generation, incoming.activity()), (5, activity));
        assert_eq!(services.registry.unclaimed().len(), 2);
        incoming.load(&mut host, &mut sent.main).unwrap();
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
fn a_guest_that_has_been_through_more_updates_than_can_be_counted_is_refused() {
    for (before, after) in [(u64::MAX - 1, Some(u64::MAX)), (u64::MAX, None)] {
        let mut sent = send(&Services::default(), GuestActivity::Running);
        let epoch = sent.arrival.early.epoch;
        let mut early = FrameWriter::default();
        early.put_value("cpr-core/update", 0, 1, &("a-mode-of-this-test", before, true)).unwrap();
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
