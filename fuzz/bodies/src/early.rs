//! The sections of the early frame: the update, its descriptors, the process, the monitors.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter, Section, to_body};
use cpr_core::{
    Arrival, Control, FdEntry, FdKind, FdPolicy, FdRegistry, GuestActivity, Host, Incoming, IncomingError,
    MainSource, MemoryRegion, Services, TerminalAction,
};
use oslib::signals::SignalMask;
use serde::Serialize;
use vmm::app::{EarlyState, FrontEnd, User, find_named_fds, take_early_state};
use vmm::chardev::Chardev;
use vmm::cli::config::{ChardevBackend, ChardevConfig};
use vmm::migration::{Request, Settings};
use vmm::monitor::mux::Mux;
use vmm::monitor::{Channel, hmp, qmp};
use vmm_core::state::Blob;

use crate::backend::{Machine, ending, persisted};
use crate::{EPOCH, frame_of, section_of};

pub(crate) const UPDATE: &str = "cpr-core/update";
pub(crate) const REFUSAL: &str = "cpr-core/refusal";
pub(crate) const ACTIVITY: &str = "cpr-core/activity";
pub(crate) const REGISTRY: &str = "cpr-core/registry";
pub(crate) const PROCESS: &str = "cpr-exec/process";
pub(crate) const MONITORS: &str = "cpr-vmm/monitors";

/// Gives a frame to everything that reads sections of an early one.
pub(crate) fn read(mut frame: Frame) {
    if let Some(section) = frame.take(PROCESS, 0) {
        read_process(&section);
    }
    if let Some(section) = frame.take(REGISTRY, 0) {
        let _ = decode_registry(&section);
    }
    if let Ok(state) = take_early_state(&mut frame) {
        go_on(state, vec![User::Hmp(None)]);
    }
    begin(frame);
}

/// A good early frame.
pub(crate) fn writer() -> FrameWriter {
    let mut writer = FrameWriter::default();
    for (name, version, mut seeds) in [
        (UPDATE, 1, update_seeds()),
        (REGISTRY, 1, registry_seeds()),
        (PROCESS, 1, process_seeds()),
        (MONITORS, 2, monitors_seeds()),
    ] {
        writer.put(name, 0, version, seeds.remove(0)).expect("each name stands once");
    }
    writer
}

/// Begins an update with this early frame.
fn begun(services: &mut Services, early: Frame) -> Result<Incoming, IncomingError> {
    static CONTROL: OnceLock<Control> = OnceLock::new();
    let control = CONTROL.get_or_init(|| Control::create(EPOCH).expect("a control page")).clone();
    let arrival = Arrival { mode: cpr_exec::mode_info(), early, registry: FdRegistry::default(), control };
    Incoming::begin(services, arrival)
}

/// Whether an update can begin with this early frame.
fn begin(early: Frame) -> bool {
    match begun(&mut Services::default(), early) {
        Ok(mut incoming) => {
            let _ = (incoming.early().remaining(), incoming.activity() == GuestActivity::Running);
            incoming.abandon();
            true
        }
        Err(error) => {
            let _ = vmm::errors::text(&error);
            false
        }
    }
}

/// The section `cpr-core/update`.
pub fn update(data: &[u8]) -> bool {
    begin(frame_of(&[(UPDATE, 1, data)]))
}

pub(crate) fn update_seeds() -> Vec<Vec<u8>> {
    vec![to_body(&("cpr-exec", 3_u64)), to_body(&("cpr-exec", u64::MAX - 1))]
}

/// The section `cpr-core/refusal`, beside a good one of the update.
pub fn refusal(data: &[u8]) -> bool {
    begin(frame_of(&[(UPDATE, 1, &update_seeds()[0]), (REFUSAL, 1, data)]))
}

pub(crate) fn refusal_seeds() -> Vec<Vec<u8>> {
    vec![to_body(&"no room for a second program"), to_body(&"")]
}

/// A main frame, and a host that needs nothing of it.
struct Given(Option<Frame>);

impl MainSource for Given {
    fn read_main(&mut self) -> Result<Frame, BoxError> {
        Ok(self.0.take().ok_or("it was read")?)
    }
}

struct NoGuest;

impl Host for NoGuest {
    fn memory(&self) -> Vec<MemoryRegion> {
        Vec::new()
    }

    fn stop(&mut self, _: Instant) -> Result<GuestActivity, BoxError> {
        Ok(GuestActivity::Paused)
    }

    fn resume(&mut self, _: GuestActivity) -> Result<(), BoxError> {
        Ok(())
    }

    fn save(&mut self, _: &mut FrameWriter) -> Result<(), BoxError> {
        Ok(())
    }

    fn load(&mut self, _: &mut Frame) -> Result<(), BoxError> {
        Ok(())
    }

    fn request_terminal(&mut self, _: TerminalAction) {}
}

/// The section `cpr-core/activity`, which is all that this host's main frame has.
pub fn activity(data: &[u8]) -> bool {
    let early = frame_of(&[(UPDATE, 1, &update_seeds()[0])]);
    let mut incoming = begun(&mut Services::default(), early).expect("a good beginning");
    let loaded = incoming.load(&mut NoGuest, &mut Given(Some(frame_of(&[(ACTIVITY, 1, data)]))));
    let is_good = loaded.map_err(|error| vmm::errors::text(&error)).is_ok();
    assert!(is_good || incoming.activity() == GuestActivity::Paused);
    incoming.abandon();
    is_good
}

pub(crate) fn activity_seeds() -> Vec<Vec<u8>> {
    vec![to_body(&true), to_body(&false)]
}

fn null() -> std::io::Result<OwnedFd> {
    static NULL: OnceLock<File> = OnceLock::new();
    NULL.get_or_init(|| File::open("/dev/null").expect("/dev/null")).as_fd().try_clone_to_owned()
}

/// Decodes a registry as cpr-exec does, but for the descriptors: every number that can be one stands for /dev/null.
fn decode_registry(section: &Section) -> Result<FdRegistry, BoxError> {
    FdRegistry::decode(section, |_, token| {
        i32::try_from(token)?;
        Ok(null()?)
    })
}

fn entries(registry: &FdRegistry) -> Vec<FdEntry> {
    registry.unclaimed()
}

/// The section `cpr-core/registry`.
pub fn registry(data: &[u8]) -> bool {
    let registry = match decode_registry(&section_of(REGISTRY, data)) {
        Ok(registry) => registry,
        Err(error) => {
            let _ = vmm::errors::text(error.as_ref());
            return false;
        }
    };
    let body = registry.encode(|_, _| Ok::<_, ()>(5)).expect("a token for each");
    let again = decode_registry(&section_of(REGISTRY, &body)).expect("what was just encoded decodes");
    assert_eq!(entries(&registry), entries(&again));

    let services = Services::default();
    services.registry.absorb(registry).expect("nothing is there yet");
    for entry in entries(&again) {
        assert!(services.registry.find::<OwnedFd>(&entry.name, entry.id).is_some());
    }
    assert!(services.registry.unclaimed().is_empty());
    true
}

pub(crate) fn registry_seeds() -> Vec<Vec<u8>> {
    let registry = FdRegistry::default();
    let fd = Arc::new(null().expect("/dev/null"));
    let empty = registry.encode(|_, _| Ok::<_, ()>(0)).expect("no token to fail");
    for (name, id, kind, policy) in [
        ("ram0", 0, FdKind::Memfd, FdPolicy::MustSurvive),
        ("chardev/stdio", 1, FdKind::Socket, FdPolicy::MayBeRebuilt),
        ("getfd/tap", 0, FdKind::Other, FdPolicy::MayBeRebuilt),
        ("cpr-exec/control", u64::MAX, FdKind::EventFd, FdPolicy::MustSurvive),
    ] {
        registry.save(name, id, kind, policy, &fd).expect("each name stands once");
    }
    vec![registry.encode(|entry, _| Ok::<_, ()>(entry.id % 100)).expect("no token fails"), empty]
}

fn read_process(section: &Section) -> bool {
    match cpr_exec::fuzzing::read_process(section) {
        Ok((mask, channel)) => {
            let _ = (mask.bits(), format!("{channel:?}"));
            true
        }
        Err(error) => {
            let _ = error.to_string();
            false
        }
    }
}

/// The section `cpr-exec/process`.
pub fn process(data: &[u8]) -> bool {
    read_process(&section_of(PROCESS, data))
}

/// The wire form of a channel, whose own type is private.
#[derive(Serialize)]
pub(crate) enum ChannelWire {
    File { path: Vec<u8>, offset: u64 },
    Memfd,
}

/// A target that is given no tables asks KVM for none.
const NO_CPUID: Vec<Blob> = Vec::new();

pub(crate) fn process_seeds() -> Vec<Vec<u8>> {
    let file = ChannelWire::File { path: b"/tmp/vm.state".to_vec(), offset: 4096 };
    let fallback = (vec![b"cpr-vmm".to_vec()], vec![(b"PATH".to_vec(), b"/bin".to_vec())]);
    vec![
        to_body(&(0_u64, ChannelWire::Memfd, true, Some(fallback))),
        to_body(&(u64::MAX, file, false, None::<(Vec<Vec<u8>>, Vec<(Vec<u8>, Vec<u8>)>)>)),
    ]
}

/// The section `cpr-vmm/monitors` in both versions, and sessions that go on with it: whatever the new command line connects
/// to the character devices.
pub fn monitors(data: &[u8]) -> bool {
    let [previous, current] = [1, 2].map(|version| monitors_of(version, data));
    previous || current
}

fn monitors_of(version: u32, data: &[u8]) -> bool {
    let shapes: [fn() -> Vec<User>; 4] = [
        || vec![User::Serial(VecDeque::new()), User::Hmp(None), User::Qmp(None)],
        || vec![User::Hmp(None)],
        || vec![User::Qmp(None)],
        || vec![User::Qmp(None), User::Serial(VecDeque::new())],
    ];
    for shape in shapes {
        match take_early_state(&mut frame_of(&[(MONITORS, version, data)])) {
            Ok(state) => go_on(state, shape()),
            Err(error) => {
                let _ = vmm::errors::text(error.as_ref());
                return false;
            }
        }
    }
    true
}

/// Does what a target does with the state, with `users` on the first character device.
fn go_on(state: EarlyState, users: Vec<User>) {
    let _ = state.terminal().map(|terminal| terminal.make_raw(true));
    let EarlyState { machine_type, chardevs, settings, named_fds, cpuid: _ } = state;
    let _ = crate::command_line::config(&[]).machine.adopt(&machine_type);
    let _ = (settings.parameters(), settings.capabilities(), settings.mode_info());
    let request = Request {
        main: Channel::Memfd,
        cpr: None,
        original_mask: SignalMask::EMPTY,
        stays: Vec::new(),
        memory: Vec::new(),
        writes_disks: false,
    };
    let _ = settings.attempt(request).map_err(|error| error.to_string());
    find_named_fds(&named_fds, &FdRegistry::default());

    let mut users = Some(users);
    for (chardev, front_end_state) in chardevs {
        let users = users.take().unwrap_or_else(|| vec![User::Hmp(None)]);
        let mux = (users.len() > 1).then(|| Mux::new(users.len() as u8));
        let mut front_end = FrontEnd { users, mux };
        let registry = received(chardev.identity());
        front_end.restore(chardev.identity(), front_end_state, &registry, true, None);
        for user in &mut front_end.users {
            match user {
                User::Serial(_) | User::Console(..) | User::Hmp(None) | User::Qmp(None) => {}
                User::Hmp(Some(session)) => go_on_typing(session),
                User::Qmp(Some(session)) => go_on_asking(session),
            }
        }
        if let Some(mux) = &mut front_end.mux {
            mux.feed(b"a\x01cb\x01\x01");
            assert!(mux.focus() < front_end.users.len());
        }
    }
}

/// A registry in which two descriptors arrived for the monitors of a character device.
fn received(chardev: &str) -> FdRegistry {
    let name = format!("received/{chardev}");
    let entry = |id: u64| (&name, id, FdKind::Other, FdPolicy::MayBeRebuilt, 5_u64);
    decode_registry(&section_of(REGISTRY, &to_body(&[entry(0), entry(1)]))).unwrap_or_default()
}

fn go_on_typing(session: &mut hmp::Session) {
    let mut machine = Machine::default();
    session.set_columns(Some(80));
    for bytes in [&b""[..], b"\x10\x0e\x19x", b"\x10\x10\r", b"info status\r"] {
        session.feed(bytes, Vec::new());
        loop {
            session.process(&mut machine);
            session.consume_output(usize::MAX);
            if session.is_waiting() {
                session.resume(ending());
            } else if session.wants_input() {
                break;
            }
        }
    }
    let _ = hmp::Session::restore(persisted(&session.save()), Vec::new());
}

fn go_on_asking(session: &mut qmp::Session) {
    let mut machine = Machine::default();
    for bytes in [&b""[..], b"\"}\n{\"execute\":\"query-status\"}", b"\xff{\"execute\":\"stop\",\"id\":1}"] {
        session.feed(bytes, Vec::new());
        loop {
            session.process(&mut machine);
            session.consume_output(usize::MAX);
            if session.is_waiting() {
                session.resume(ending());
            } else if session.wants_input() {
                break;
            }
        }
    }
    let _ = persisted(&session.save());
}

/// The wire form of a user, whose own type is private.
#[derive(Serialize)]
enum UserWire {
    Serial(Vec<u8>),
    Hmp(Option<hmp::SessionState>, u64),
    Qmp(Option<qmp::SessionState>, u64),
}

/// The wire form of a terminal's modes: flags, line discipline, special characters, speeds.
type TerminalWire = ([u32; 4], u8, Vec<u8>, [u32; 2]);

pub(crate) fn monitors_seeds() -> Vec<Vec<u8>> {
    let mut machine = Machine::default();
    let mut typing = hmp::Session::new("mon0");
    typing.feed(b"info status\rinfo kvm\rinf\x02\x1b", Vec::new());
    typing.process(&mut machine);
    let mut asking = qmp::Session::new("qmp0");
    asking.feed(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"query-", Vec::new());
    asking.process(&mut machine);
    let mut waiting = qmp::Session::new("qmp1");
    waiting.feed(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"stop\",\"id\":[1]}", Vec::new());
    waiting.process(&mut Machine { suspend: true, ..Machine::default() });

    let settings = Settings::default();
    let null = ChardevConfig { id: "c0".into(), backend: ChardevBackend::Null, mux: false };
    let null = Chardev::open(&null, &FdRegistry::default(), None).expect("null opens").save(Vec::new());
    let terminal: TerminalWire = ([1, 2, 3, 4], 0, vec![3; 19], [15, 15]);
    let stdio = ("stdio", true, b"pending".to_vec(), Some(terminal));
    let stdio_users = (
        Some(Mux::new(3)),
        vec![
            UserWire::Serial(b"ls".to_vec()),
            UserWire::Hmp(Some(typing.save()), 1),
            UserWire::Qmp(Some(waiting.save()), 1),
        ],
    );
    let null_users = (None::<Mux>, vec![UserWire::Qmp(Some(asking.save()), 0)]);
    let hmp_users = (None::<Mux>, vec![UserWire::Hmp(Some(typing.save()), 16)]);
    let machine = "microvm-0.1";
    let settings_of_version_1 = ("cpr-exec", vec!["cpr-vmm"], true, 5000_u64, 0_u64, false);
    let cpuid = || vec![Blob::from(vec![0; 40])];
    vec![
        to_body(&(machine, vec![(&stdio, &stdio_users)], &settings, vec!["tap"], cpuid())),
        to_body(&(machine, vec![(null, null_users)], &settings, vec!["tap"], NO_CPUID)),
        to_body(&(machine, vec![(&stdio, hmp_users)], &settings, Vec::<String>::new(), NO_CPUID)),
        to_body(&(vec![(&stdio, stdio_users)], settings_of_version_1, vec!["tap"], cpuid())),
    ]
}
