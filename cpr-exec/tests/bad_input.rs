//! What a user, a wrapper or an older program can get wrong, on both sides of the exec: each is an error that names the
//! thing. Before the exec the clients are served on as before.

mod common;

use std::io::{Seek, SeekFrom, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use common::{Echo, LIMIT, Process, connect, echo_program, wait_until};
use cpr_core::frame::FrameWriter;
use cpr_core::ownership::Owner;
use cpr_core::{Control, FdKind, FdPolicy, FdRegistry, TargetPhase};
use oslib::eventfd::EventFd;
use oslib::memfd::Memfd;
use serde::Serialize;

// The source: a command or a state file that cannot be used.

/// Asks for an update that must fail, twice, and checks that a client with half a line sent notices nothing.
fn refuses(args: &[&str]) -> String {
    let mut echo = Echo::start(args);
    let (mut client, mut control) = (echo.connect(), echo.connect());
    assert_eq!(client.ask("hello"), "hello");
    assert_eq!(control.ask("here"), "here");
    client.send("half-");
    let before = (echo.process.descriptors(), echo.process.blocked_signals());
    let answer = control.ask("!update");
    assert_eq!(control.ask("!update"), answer);
    assert_eq!(client.ask("line"), "half-line");
    assert_eq!((echo.process.descriptors(), echo.process.blocked_signals()), before);
    assert_eq!(echo.process.children(), [""; 0]);
    assert!(echo.process.is_running());
    answer.strip_prefix("!failed: ").unwrap_or_else(|| panic!("{answer}")).to_owned()
}

#[test]
fn a_command_that_cannot_be_executed_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain");
    std::fs::write(&plain, "").unwrap();
    let missing = dir.path().join("missing");
    let [plain, missing, directory] = [&plain, &missing, dir.path()].map(|path| path.to_str().unwrap());

    assert_eq!(refuses(&["--command"]), "cpr-exec mode requires setting cpr-exec-command");
    let empty = "cpr-exec-command begins with an empty word; its first word is the program to execute";
    assert_eq!(refuses(&["--command", "", "x"]), empty);
    let prefix = "cpr-exec-command: program";
    assert_eq!(refuses(&["--command", missing]), format!("{prefix} {missing:?} was not found"));
    let found_nowhere = refuses(&["--command", "no-such-program-at-all"]);
    assert!(found_nowhere.starts_with(&format!("{prefix} \"no-such-program-at-all\" was not found in /")));
    assert_eq!(refuses(&["--command", directory]), format!("{prefix} {directory:?} is a directory"));
    assert_eq!(refuses(&["--command", plain]), format!("{prefix} {plain:?} is not executable"));
}

#[test]
fn a_state_file_that_cannot_be_written_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("no/where");
    let answer = refuses(&["--state", nowhere.to_str().unwrap()]);
    let expected = format!("cannot open state file '{}' for writing: No such file", nowhere.display());
    assert!(answer.starts_with(&expected), "{answer}");
    let answer = refuses(&["--state", dir.path().to_str().unwrap()]);
    assert!(answer.contains("for writing: Is a directory"), "{answer}");
}

#[test]
fn a_full_disk_is_rolled_back() {
    let answer = refuses(&["--state", "/dev/full"]);
    // The rehearsal finds it out, before the program leaves its process.
    let expected =
        "cpr-exec could not prepare: cannot write state to file '/dev/full': No space left on device";
    assert!(answer.starts_with(expected), "{answer}");
}

// The target: an environment or a state that is not what it should be.

/// A start with these reserved variables, of a program that must end before it does anything.
fn ends_with(variables: &[(&str, &str)]) -> String {
    ends_with_passing(variables, |_| {})
}

fn ends_with_passing(variables: &[(&str, &str)], each: impl Fn(&dyn Fn(BorrowedFd<'_>))) -> String {
    // The port is taken and the last option unknown: a program that got as far would say so.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let mut command = Command::new(echo_program());
    command.args(["--port", &port, "--bogus"]).envs(variables.iter().copied());
    let (status, stdout, stderr) = Process::spawn_passing(&mut command, each).end();
    assert_eq!((status.code(), stdout.as_str()), (Some(1), ""), "{stderr}");
    stderr
}

#[test]
fn a_reserved_variable_that_is_unknown_ends_the_program_before_it_opens_anything() {
    for name in ["CPR_VMM_FUTURE", "CPR_VMM_", "CPR_VMM_STATE2"] {
        let stderr = ends_with(&[(name, "1")]);
        assert!(
            stderr.contains(&format!("environment variable {name} is reserved for live updates")),
            "{stderr}"
        );
    }
    // Even next to a state that could be used.
    let crafted = Crafted::new();
    let number = crafted.state.as_raw_fd().to_string();
    let both = [("CPR_VMM_STATE", number.as_str()), ("CPR_VMM_FUTURE", "1")];
    let stderr = ends_with_passing(&both, |visit| crafted.each(visit));
    assert!(stderr.contains("CPR_VMM_FUTURE"), "{stderr}");
    // The prefix ends in an underscore. Without a bad variable, the bad option is what ends it.
    assert!(ends_with(&[("CPR_VMMX", "1")]).contains("usage"), "not reserved");
}

#[test]
fn a_state_variable_that_leads_nowhere_is_refused() {
    for value in ["", "abc", "-1", "3.5", "99999999999", "0x3"] {
        let expected =
            format!("environment variable CPR_VMM_STATE is '{value}', which is no descriptor number");
        assert!(ends_with(&[("CPR_VMM_STATE", value)]).contains(&expected));
    }
    let closed = ends_with(&[("CPR_VMM_STATE", "987")]);
    assert!(
        closed.contains("CPR_VMM_STATE names descriptor 987, which was not passed on: Bad file"),
        "{closed}"
    );
    let standard = ends_with(&[("CPR_VMM_STATE", "2")]);
    assert!(standard.contains("names descriptor 2, which was not passed on"), "{standard}");
}

#[test]
fn a_state_descriptor_that_is_no_memfd_is_refused() {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    for fd in [file.as_fd(), socket.as_fd()] {
        let number = fd.as_raw_fd().to_string();
        let stderr = ends_with_passing(&[("CPR_VMM_STATE", &number)], |visit| visit(fd));
        assert!(stderr.contains(&format!("names descriptor {number}, which is no memfd")), "{stderr}");
    }
}

/// The `cpr-exec/process` section, version 1, as `docs/state-format.md` has it.
#[derive(Serialize)]
struct Process1 {
    signal_mask: u64,
    main: Channel1,
    source_goes_on: bool,
    /// No way back: it is the tests of `cpr-vmm` that show it.
    fallback: Option<()>,
}

#[derive(Serialize)]
enum Channel1 {
    File { path: Vec<u8>, offset: u64 },
}

/// The `cpr-core/update` section, version 1.
#[derive(Serialize)]
struct Update1 {
    mode: String,
    generation: u64,
}

/// The `cpr-core/activity` section, version 1.
#[derive(Serialize)]
struct Activity1 {
    guest_running: bool,
}

const EPOCH: u64 = 0x5eed;

/// An update from nowhere: what a source leaves behind, made by this test.
struct Crafted {
    dir: tempfile::TempDir,
    state: OwnedFd,
    registry: FdRegistry,
    control: Control,
    listener: Arc<TcpListener>,
    source_goes_on: bool,
}

/// A server without clients.
const SERVER: &[u8] = br#"{"next_id":3,"connections":{},"asked_by":[]}"#;

impl Crafted {
    fn new() -> Crafted {
        let listener = Arc::new(TcpListener::bind("127.0.0.1:0").unwrap());
        listener.set_nonblocking(true).unwrap();
        let control = Control::create(EPOCH).unwrap();
        let registry = FdRegistry::default();
        let must = FdPolicy::MustSurvive;
        registry.save("cpr-exec/control", 0, FdKind::Memfd, must, control.fd()).unwrap();
        registry.save("echo/listener", 0, FdKind::Socket, must, &listener).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let state = Memfd::new("crafted").create().unwrap();
        let crafted = Crafted { dir, state, registry, control, listener, source_goes_on: false };
        crafted.put_main(EPOCH, "echo/server", 1, SERVER);
        crafted.put_early(&crafted.early(|_, fd| fd));
        crafted
    }

    fn main_path(&self) -> std::path::PathBuf {
        self.dir.path().join("main")
    }

    fn put_main(&self, epoch: u64, section: &str, version: u32, body: &[u8]) {
        let mut main = FrameWriter::default();
        main.put(section, 0, version, body.to_vec()).unwrap();
        main.put_value("cpr-core/activity", 0, 1, &Activity1 { guest_running: true }).unwrap();
        std::fs::write(self.main_path(), main.finish(epoch)).unwrap();
    }

    /// The early frame, with the descriptor numbers that `number` gives.
    fn early(&self, number: impl Fn(&str, u64) -> u64) -> Vec<u8> {
        let mut early = FrameWriter::default();
        let path = self.main_path().as_os_str().as_bytes().to_vec();
        let main = Channel1::File { path, offset: 0 };
        let process = Process1 { signal_mask: 0, main, source_goes_on: self.source_goes_on, fallback: None };
        early.put_value("cpr-exec/process", 0, 1, &process).unwrap();
        let update = Update1 { mode: "cpr-exec".into(), generation: 6 };
        early.put_value("cpr-core/update", 0, 1, &update).unwrap();
        let registry = self
            .registry
            .encode(|entry, fd| Ok::<_, ()>(number(&entry.name, fd.as_raw_fd() as u64)))
            .unwrap();
        early.put("cpr-core/registry", 0, 1, registry).unwrap();
        early.finish(EPOCH)
    }

    fn put_early(&self, frame: &[u8]) {
        let mut file = std::fs::File::from(self.state.try_clone().unwrap());
        file.set_len(0).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(frame).unwrap();
    }

    /// Every descriptor that the target is to inherit.
    fn each(&self, visit: &dyn Fn(BorrowedFd<'_>)) {
        visit(self.state.as_fd());
        let _ = self.registry.walk_fd(|_, fd| {
            visit(fd);
            Ok::<_, ()>(())
        });
    }

    fn start(&self) -> Process {
        let number = self.state.as_raw_fd().to_string();
        let mut command = Command::new(echo_program());
        Process::spawn_passing(command.env("CPR_VMM_STATE", number), |visit| self.each(visit))
    }

    /// The words with which the target refuses it. Nothing was touched: the word still says so.
    fn refused(&self) -> String {
        let (status, stdout, stderr) = self.start().end();
        assert_eq!((status.code(), stdout.as_str()), (Some(1), ""), "{stderr}");
        assert!(stderr.starts_with("echo: ") && !stderr.contains("panicked"), "{stderr}");
        assert_eq!(self.control.ownership().owner(), Some(Owner::Source));
        stderr.trim_end().trim_start_matches("echo: ").to_owned()
    }

    fn refused_early(&self, frame: &[u8]) -> String {
        self.put_early(frame);
        let stderr = self.refused();
        let prefix = "the CPR state left by the previous program cannot be used: ";
        stderr.strip_prefix(prefix).unwrap_or_else(|| panic!("{stderr}")).to_owned()
    }
}

#[test]
fn a_crafted_update_is_otherwise_accepted() {
    let crafted = Crafted::new();
    let mut process = crafted.start();
    wait_until("the commit", || {
        assert!(process.is_running(), "{}", process.stderr());
        crafted.control.ownership().owner() == Some(Owner::Target)
    });
    let mut client = connect(crafted.listener.local_addr().unwrap().port());
    assert_eq!(client.ask("!generation"), "!generation 7");
}

/// What a source leaves behind that goes on until the target is ready, and its doorbell.
fn crafted_by_a_source_that_goes_on() -> (Crafted, Arc<EventFd>) {
    let mut crafted = Crafted::new();
    let doorbell = Arc::new(EventFd::new().unwrap());
    let must = FdPolicy::MustSurvive;
    crafted.registry.save("cpr-exec/doorbell", 0, FdKind::EventFd, must, &doorbell).unwrap();
    crafted.source_goes_on = true;
    crafted.put_early(&crafted.early(|_, fd| fd));
    // Whatever stands there before the source says so is not the state.
    std::fs::write(crafted.main_path(), "a rehearsal").unwrap();
    (crafted, doorbell)
}

#[test]
fn the_state_of_a_source_that_goes_on_is_asked_for_and_waited_for() {
    let (crafted, doorbell) = crafted_by_a_source_that_goes_on();
    let mut process = crafted.start();
    let mut client = connect(crafted.listener.local_addr().unwrap().port());
    client.send("!generation\n");
    assert!(doorbell.wait(LIMIT).unwrap(), "{}", process.stderr());
    assert_eq!(crafted.control.rendezvous().target_phase(), TargetPhase::Ready);
    std::thread::sleep(Duration::from_millis(100));
    assert!(process.is_running(), "{}", process.stderr());
    assert_eq!(crafted.control.ownership().owner(), Some(Owner::Source));
    crafted.put_main(EPOCH, "echo/server", 1, SERVER);
    crafted.control.rendezvous().publish_state();
    assert_eq!(client.line(), "!generation 7");
    assert_eq!(crafted.control.ownership().owner(), Some(Owner::Target));
}

#[test]
fn a_keeper_that_ends_ends_the_wait() {
    let (crafted, doorbell) = crafted_by_a_source_that_goes_on();
    let mut keeper = Command::new("sleep").arg("1000").spawn().unwrap();
    crafted.control.set_keeper_pid(Some(keeper.id()));
    let process = crafted.start();
    assert!(doorbell.wait(LIMIT).unwrap());
    keeper.kill().unwrap();
    keeper.wait().unwrap();
    let (status, stdout, stderr) = process.end();
    assert_eq!((status.code(), stdout.as_str()), (Some(1), ""));
    assert_eq!(stderr, "echo: the state could not be read: the source ended before it gave the state\n");
}

#[test]
fn a_source_that_takes_the_guest_back_ends_the_wait() {
    let (crafted, doorbell) = crafted_by_a_source_that_goes_on();
    let process = crafted.start();
    assert!(doorbell.wait(LIMIT).unwrap());
    crafted.control.ownership().roll_back().unwrap();
    let (status, stdout, stderr) = process.end();
    assert_eq!((status.code(), stdout.as_str()), (Some(1), ""));
    assert_eq!(stderr, "echo: the state could not be read: the source took the guest back\n");
}

#[test]
fn a_source_that_goes_on_without_a_doorbell_is_refused() {
    let (crafted, _) = crafted_by_a_source_that_goes_on();
    crafted.registry.delete("cpr-exec/doorbell", 0);
    crafted.put_early(&crafted.early(|_, fd| fd));
    crafted.put_main(EPOCH, "echo/server", 1, SERVER);
    let mut process = crafted.start();
    wait_until("its end", || {
        let owner = crafted.control.ownership().owner();
        assert_eq!(owner, Some(Owner::Source), "it took over from a source that runs");
        !process.is_running()
    });
    let (.., stderr) = process.end();
    assert!(stderr.contains("doorbell"), "{stderr}");
}

#[test]
fn a_damaged_early_frame_is_refused() {
    let crafted = Crafted::new();
    let good = crafted.early(|_, fd| fd);
    assert_eq!(crafted.refused_early(b""), "the state frame is truncated: 0 bytes of 40");
    let garbage = crafted.refused_early(&[0xa5; 300]);
    assert_eq!(garbage, "not a CPR state frame (it does not begin with CPRSTATE)");
    let cut = crafted.refused_early(&good[..good.len() - 1]);
    assert_eq!(cut, format!("the state frame is truncated: {} bytes of {}", good.len() - 1, good.len()));
    let long = crafted.refused_early(&[&good[..], b"x"].concat());
    assert_eq!(long, "the state frame is followed by 1 bytes that do not belong to it");
    // Bits all over the table and the bodies.
    for at in (40..good.len()).step_by(good.len() / 7) {
        let mut flipped = good.clone();
        flipped[at] ^= 0x10;
        let error = crafted.refused_early(&flipped);
        assert!(error.starts_with("the state frame is damaged: its checksum is "), "byte {at}: {error}");
    }
    let mut future = good.clone();
    future[8] = 9;
    let future = crafted.refused_early(&future);
    assert_eq!(future, "state frame version 9 is newer than this program knows (1)");
}

#[test]
fn a_section_from_the_future_is_refused() {
    let crafted = Crafted::new();
    let mut early = FrameWriter::default();
    early.put("cpr-exec/process", 0, 2, vec![1, 2, 3]).unwrap();
    let error = crafted.refused_early(&early.finish(EPOCH));
    assert_eq!(error, "state section 'cpr-exec/process' has version 2; this program reads version 1");
}

#[test]
fn a_descriptor_that_did_not_come_is_named() {
    let crafted = Crafted::new();
    let replace =
        |name: &'static str, number: u64| move |found: &str, fd: u64| if found == name { number } else { fd };
    let error = crafted.refused_early(&crafted.early(replace("echo/listener", 987)));
    assert!(error.starts_with("descriptor 'echo/listener' (id 0): Bad file descriptor"), "{error}");
    let error = crafted.refused_early(&crafted.early(replace("cpr-exec/control", 1)));
    assert!(error.starts_with("descriptor 'cpr-exec/control' (id 0): descriptor 1 is a standard"), "{error}");
    let error = crafted.refused_early(&crafted.early(replace("echo/listener", u64::MAX)));
    assert!(error.starts_with("descriptor 'echo/listener' (id 0): "), "{error}");
    // Two entries with one number: one of them is not what it says.
    let control = crafted.control.fd().as_raw_fd() as u64;
    let error = crafted.refused_early(&crafted.early(replace("echo/listener", control)));
    assert!(error.contains("has an owner already"), "{error}");
    // The listener in place of the control page.
    let swap = |found: &str, fd: u64| {
        let other = if found == "echo/listener" { control } else { crafted.listener.as_raw_fd() as u64 };
        assert_ne!(fd, other);
        other
    };
    let error = crafted.refused_early(&crafted.early(swap));
    assert!(error.contains("shared words need a memfd"), "{error}");

    crafted.registry.delete("cpr-exec/control", 0);
    let error = crafted.refused_early(&crafted.early(|_, fd| fd));
    assert_eq!(error, "its control page is missing");
}

#[test]
fn a_main_frame_that_is_not_of_this_update_is_refused() {
    let crafted = Crafted::new();
    let refused = |crafted: &Crafted| {
        let error = crafted.refused();
        error.replace(&crafted.main_path().display().to_string(), "MAIN")
    };
    crafted.put_main(0xbad, "echo/server", 1, SERVER);
    let other = "the state belongs to another update (epoch 0xbad, expected 0x5eed)";
    assert_eq!(refused(&crafted), other);
    crafted.put_main(EPOCH, "echo/server", 2, SERVER);
    let version = "the state could not be loaded: state section 'echo/server' has version 2";
    assert_eq!(refused(&crafted), version);
    crafted.put_main(EPOCH, "vcpu", 1, SERVER);
    let missing = "the state could not be loaded: state section 'echo/server' instance 0 is missing";
    assert_eq!(refused(&crafted), missing);
    crafted.put_main(EPOCH, "echo/server", 1, br#"{"next_id":4,"connections":{"3":{"input":[],"#);
    assert!(refused(&crafted).starts_with("the state could not be loaded: EOF while parsing"));
    let connection =
        br#"{"next_id":4,"connections":{"3":{"input":[],"output":[],"eof":false}},"asked_by":[]}"#;
    crafted.put_main(EPOCH, "echo/server", 1, connection);
    assert_eq!(refused(&crafted), "the state could not be loaded: connection 3 is missing");

    let garbage = |path: &Path| std::fs::write(path, "hello, this is no frame of any kind at all").unwrap();
    garbage(&crafted.main_path());
    let no_frame = "the state could not be read: state file 'MAIN': not a CPR state frame (it does not begin with \
                    CPRSTATE)";
    assert_eq!(refused(&crafted), no_frame);
    std::fs::remove_file(crafted.main_path()).unwrap();
    let gone =
        "the state could not be read: cannot read state file 'MAIN': No such file or directory (os error 2)";
    assert_eq!(refused(&crafted), gone);
}

#[test]
fn a_descriptor_that_the_program_does_not_know_refuses_the_update() {
    let crafted = Crafted::new();
    let tap = Arc::new(std::fs::File::open("/dev/null").unwrap());
    crafted.registry.save("net0", 2, FdKind::Tap, FdPolicy::MustSurvive, &tap).unwrap();
    crafted.put_early(&crafted.early(|_, fd| fd));
    assert_eq!(crafted.refused(), "no component of this program claims descriptor 'net0' (id 2)");
}
