//! The example as its clients see it: updated again and again, they notice nothing but the answer to `!update`.

mod common;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use common::{CLOEXEC, Client, Echo, IDLE, LIMIT, SIGKILL, children_of, echo_program, wait_until};
use cpr_core::error::BoxError;
use cpr_core::frame::Frame;
use cpr_core::{Control, FdRegistry, LiveMain, MainSource};
use oslib::eventfd::EventFd;
use oslib::pidfd::{Exit, PidFd};

const SIGUSR1: i32 = 10;
const UPDATES: u32 = 20;

/// Byte `at` of an endless text of lines, most of them short and some as long as several reads of the server.
fn text(at: u64) -> u8 {
    let hash = (at / 61).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60;
    if at % 61 == 60 && hash > 2 { b'\n' } else { b'a' + (at % 23) as u8 }
}

/// Sends an endless text in pieces that end anywhere, and checks that exactly it comes back. Stops with a whole line.
fn flood(client: Client, stop: &AtomicBool, progress: &AtomicU64) {
    let mut reader = client.0.into_inner();
    let mut writer = reader.try_clone().unwrap();
    let (sent, received) = std::thread::scope(|scope| {
        let sender = scope.spawn(move || {
            let mut at = 0;
            for piece in (0u64..).map(|n| 1 + n * n % 9001) {
                let ending = stop.load(Relaxed);
                let mut bytes: Vec<u8> = (at..at + piece).map(text).collect();
                if ending {
                    bytes = vec![b'\n'];
                }
                writer.write_all(&bytes).unwrap();
                at += bytes.len() as u64;
                if ending {
                    break;
                }
            }
            writer.shutdown(std::net::Shutdown::Write).unwrap();
            at
        });
        let (mut at, mut buffer) = (0, [0; 5000]);
        loop {
            let received = reader.read(&mut buffer).unwrap();
            for byte in &buffer[..received] {
                // The very last one ends a line wherever it is.
                if *byte != text(at) {
                    assert!(stop.load(Relaxed) && *byte == b'\n', "byte {at} is {byte}, not {}", text(at));
                }
                at += 1;
            }
            progress.store(at, Relaxed);
            if received == 0 {
                break;
            }
        }
        (sender.join().unwrap(), at)
    });
    assert_eq!(sent, received);
}

/// Short questions and answers, as fast as they go.
fn ping(mut client: Client, stop: &AtomicBool, progress: &AtomicU64) {
    while !stop.load(Relaxed) {
        let line = format!("ping {}", progress.load(Relaxed));
        assert_eq!(client.ask(&line), line);
        progress.fetch_add(1, Relaxed);
    }
}

/// Two clients that notice everything.
struct Traffic {
    stop: Arc<AtomicBool>,
    progress: Arc<[AtomicU64; 2]>,
    threads: [JoinHandle<()>; 2],
}

impl Traffic {
    fn start(pinging: Client, flooding: Client) -> Traffic {
        let stop = Arc::new(AtomicBool::new(false));
        let progress = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let spawn = |index: usize, run: fn(Client, &AtomicBool, &AtomicU64), client| {
            let (stop, progress) = (stop.clone(), progress.clone());
            std::thread::spawn(move || run(client, &stop, &progress[index]))
        };
        let threads = [spawn(0, ping, pinging), spawn(1, flood, flooding)];
        Traffic { stop, progress, threads }
    }

    fn progress(&self) -> [u64; 2] {
        [0, 1].map(|index| self.progress[index].load(Relaxed))
    }

    /// Waits until both have noticeably more than `before`.
    fn goes_on_from(&self, before: [u64; 2]) {
        wait_until("traffic", || {
            assert!(!self.threads.iter().any(JoinHandle::is_finished), "a connection was lost");
            let [pings, bytes] = self.progress();
            pings > before[0] + 3 && bytes > before[1] + 3000
        });
    }

    fn end(self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads {
            thread.join().unwrap();
        }
    }
}

#[test]
fn connections_survive_twenty_updates_under_traffic() {
    let mut echo = Echo::start::<&str>(&[]);
    let mut control = echo.connect();
    let (pinging, flooding) = (echo.connect(), echo.connect());
    wait_until("three connections", || echo.process.descriptors().len() == IDLE + 3);
    let before = (echo.process.descriptors(), echo.process.blocked_signals());

    let traffic = Traffic::start(pinging, flooding);
    for generation in 1..=UPDATES {
        let progress = traffic.progress();
        // The beginning of a line, which the next program will complete.
        control.send("!update\nhalf-");
        let answer = control.line();
        assert!(answer.starts_with(&format!("!updated to generation {generation} in ")), "{answer}");
        assert_eq!(control.ask("line"), "half-line");
        traffic.goes_on_from(progress);
    }
    assert!(echo.process.is_running(), "the same process all the time");
    wait_until("the last keeper's end", || echo.process.children().is_empty());
    traffic.end();

    // Two clients have gone; but for them everything is as it was.
    wait_until("the end of both connections", || echo.process.descriptors().len() == before.0.len() - 2);
    let _replaced = [echo.connect(), echo.connect()];
    wait_until("two other connections", || echo.process.descriptors().len() == before.0.len());
    assert_eq!(flags_of(&echo), before.0.iter().map(|(_, flags)| *flags).collect());
    assert_eq!(echo.process.blocked_signals(), before.1);
    assert_eq!(oslib::process::thread_names(echo.process.pid()).unwrap().len(), 1);
    assert_eq!(control.ask("!generation"), format!("!generation {UPDATES}"));
}

/// The flags that its descriptors have, whatever their numbers.
fn flags_of(echo: &Echo) -> std::collections::BTreeSet<u32> {
    echo.process.descriptors().into_iter().map(|(_, flags)| flags).collect()
}

#[test]
fn a_signal_updates_too_and_a_state_file_is_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    // The longer state of some other update.
    std::fs::write(&state, vec![b'x'; 1 << 20]).unwrap();
    let mut echo = Echo::start(&["--state", state.to_str().unwrap()]);
    let mut client = echo.connect();
    assert_eq!(client.ask("!generation"), "!generation 0");
    let pidfd = PidFd::open(echo.process.pid()).unwrap();
    for generation in 1..=3 {
        pidfd.send_signal(SIGUSR1).unwrap();
        let expected = format!("!generation {generation}");
        wait_until("the update", || client.ask("!generation") == expected);
        wait_until("the keeper's end", || echo.process.children().is_empty());
    }
    let written = std::fs::read(&state).unwrap();
    cpr_core::frame::Frame::parse(&written).unwrap();
    assert!(echo.process.is_running());
}

#[test]
fn a_server_started_with_signals_blocked_keeps_its_own_mask() {
    // A child inherits the mask of the thread that spawns it.
    let old = oslib::signals::block(oslib::signals::SignalMask::of(&[SIGUSR1 + 2, 40])).unwrap();
    let echo = Echo::start::<&str>(&[]);
    oslib::signals::set_mask(old).unwrap();
    let mask = echo.process.blocked_signals();
    assert_ne!(mask, format!("{:016x}", 1 << (SIGUSR1 - 1)), "more than its own signal is blocked");
    let mut client = echo.connect();
    for _ in 0..2 {
        assert!(client.ask("!update").starts_with("!updated"));
        wait_until("the mask", || echo.process.blocked_signals() == mask);
    }
}

#[test]
fn what_a_client_has_not_taken_yet_is_not_lost() {
    let echo = Echo::start::<&str>(&[]);
    let mut control = echo.connect();
    let mut lazy = echo.connect();
    // More than the sockets take in, so that the server itself has to keep some.
    let line = format!("{}\n", "x".repeat(99_999));
    let mut sender = lazy.0.get_ref().try_clone().unwrap();
    let sending = std::thread::spawn({
        let line = line.clone();
        move || (0..150).for_each(|_| sender.write_all(line.as_bytes()).unwrap())
    });
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(50));
        assert!(control.ask("!update").starts_with("!updated"));
    }
    for _ in 0..150 {
        assert_eq!(lazy.line().len(), line.len() - 1);
    }
    sending.join().unwrap();
    assert_eq!(lazy.ask("and on"), "and on");
}

#[test]
fn a_failed_exec_leaves_everything_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    // No format at all: neither ELF nor "#!". The kernel says ENOEXEC, and only when it is asked to execute it.
    let command = Exchangeable::new(&dir, &executable(&dir, "no-format", "just a text\n"));
    let state = dir.path().join("state");
    let mut echo = Echo::start(&["--state", state.to_str().unwrap(), "--command", command.path()]);
    let mut clients = [(); 3].map(|()| echo.connect());
    for client in &mut clients {
        assert_eq!(client.ask("hello"), "hello");
        client.send("half-");
    }
    let mut control = echo.connect();
    assert_eq!(control.ask("here"), "here");
    let before = (echo.process.descriptors(), echo.process.blocked_signals());
    for (fd, flags) in &before.0[3..] {
        assert_ne!(flags & CLOEXEC, 0, "descriptor {fd}");
    }
    for _ in 0..3 {
        let answer = control.ask("!update");
        assert!(answer.starts_with("!failed: cpr-exec could not hand over: cannot execute "), "{answer}");
        assert!(answer.contains("command': Exec format error"), "{answer}");
        // One turn of its loop later, everything of the attempt is gone.
        assert_eq!(control.ask("here"), "here");
        assert_eq!((echo.process.descriptors(), echo.process.blocked_signals()), before);
        assert_eq!(echo.process.children(), [""; 0]);
        assert!(!state.exists(), "the state file was made for nothing");
    }
    // It is not too late for a program that can be executed.
    command.exchange(&echo_program());
    assert!(control.ask("!update").starts_with("!updated to generation 1 in "));
    for client in &mut clients {
        assert_eq!(client.ask("line"), "half-line");
    }
    assert!(echo.process.is_running());
}

// The new program fails after it was executed, so the server goes on in the keeper.

/// A file with this content that can be executed.
fn executable(dir: &tempfile::TempDir, name: &str, content: &str) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A program for `--command` that is another one later.
struct Exchangeable(PathBuf);

impl Exchangeable {
    fn new(dir: &tempfile::TempDir, program: &Path) -> Exchangeable {
        let command = Exchangeable(dir.path().join("command"));
        symlink(program, &command.0).unwrap();
        command
    }

    fn exchange(&self, program: &Path) {
        std::fs::remove_file(&self.0).unwrap();
        symlink(program, &self.0).unwrap();
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

const ENDED: &str = "the new program ended before it took over";

/// After everything that a server could leave behind has been ended.
fn no_process_is_left(echo: Echo) {
    drop(echo);
    // Orphans, too, are children of this process. So are the servers of other tests, each for its time.
    wait_until("the end of all processes", || {
        let children = children_of(std::process::id());
        // A keeper that has stepped aside and whose parent is no more.
        for ended in children.iter().filter_map(|child| child.split_once(" (cpr-keeper) Z ")) {
            let _ = PidFd::open(ended.0.parse().unwrap()).and_then(|keeper| keeper.try_reap());
        }
        children.is_empty()
    });
}

#[test]
fn a_program_that_ends_leaves_the_server_in_another_process() {
    let dir = tempfile::tempdir().unwrap();
    let (state, program) = (dir.path().join("state"), echo_program());
    let fails = [
        ("false", "#!/bin/sh\nexec false\n".to_owned(), 1),
        // A program that does not take over has failed, whatever it says.
        ("true", "#!/bin/sh\nexit 0\n".to_owned(), 0),
        ("reserved", format!("#!/bin/sh\nCPR_VMM_FUTURE=1 exec {}\n", program.display()), 1),
        ("usage", format!("#!/bin/sh\nexec {} --bogus\n", program.display()), 1),
    ];
    let fails = fails.map(|(name, content, code)| (executable(&dir, name, &content), code));
    let command = Exchangeable::new(&dir, &program);
    let mut echo = Echo::start(&["--state", state.to_str().unwrap(), "--command", command.path()]);
    let mut control = echo.connect();
    let mut clients = [(); 3].map(|()| echo.connect());
    for client in &mut clients {
        assert_eq!(client.ask("hello"), "hello");
        client.send("half-");
    }
    assert_eq!(control.ask("here"), "here");

    for generation in 0..3 {
        let before = (echo.process.descriptors(), echo.process.blocked_signals());
        for (program, code) in &fails {
            command.exchange(program);
            let how = Exit::Exited(*code);
            let answer = control.ask("!update");
            let expected = format!("!failed: cpr-exec could not prepare: {ENDED} ({how})");
            assert!(answer.starts_with(&expected), "{answer}");
            assert_eq!(echo.follow(), how);
            // Nothing but the process id has changed.
            assert_eq!(control.ask("!generation"), format!("!generation {generation}"));
            assert_eq!((echo.process.descriptors(), echo.process.blocked_signals()), before);
            assert_eq!(echo.process.children(), [""; 0]);
            assert_eq!(oslib::process::thread_names(echo.process.pid()).unwrap().len(), 1);
            assert!(!state.exists(), "the state file was made for nothing");
            for client in &mut clients {
                assert_eq!(client.ask("line"), "half-line");
                client.send("half-");
            }
            assert_eq!(echo.connect().ask("and others"), "and others");
            wait_until("its end", || echo.process.descriptors().len() == before.0.len());
        }
        // It is not too late for a good one. A signal reaches the process that it is now.
        command.exchange(&program);
        PidFd::open(echo.process.pid()).unwrap().send_signal(SIGUSR1).unwrap();
        let expected = format!("!generation {}", generation + 1);
        wait_until("the update", || control.ask("!generation") == expected);
        wait_until("the keeper's end", || {
            echo.process.children().is_empty() && echo.process.descriptors().len() == before.0.len()
        });
        for client in &mut clients {
            assert_eq!(client.ask("line"), "half-line");
            client.send("half-");
        }
        assert!(echo.process.is_running(), "a good program does not change the process");
        let _ = std::fs::remove_file(&state);
    }
    no_process_is_left(echo);
}

#[test]
fn a_program_that_is_killed_leaves_the_server_in_another_process() {
    let dir = tempfile::tempdir().unwrap();
    let command = Exchangeable::new(&dir, &executable(&dir, "sleeps", "#!/bin/sh\nexec sleep 1000\n"));
    let mut echo = Echo::start(&["--command", command.path()]);
    let (mut client, mut control) = (echo.connect(), echo.connect());
    assert_eq!(client.ask("hello"), "hello");
    client.send("half-");
    for _ in 0..2 {
        control.send("!update\n");
        let pid = echo.process.pid();
        wait_until("the exec", || oslib::process::thread_names(pid).unwrap() == ["sleep"]);
        // What is said meanwhile is heard later.
        client.send("line\nhalf-");
        let mut newcomer = echo.connect();
        newcomer.send("anybody there?\n");
        PidFd::open(pid).unwrap().send_signal(SIGKILL).unwrap();
        let how = Exit::Signaled(SIGKILL);
        assert_eq!(control.line(), format!("!failed: cpr-exec could not prepare: {ENDED} ({how})"));
        assert_eq!(echo.follow(), how);
        assert_eq!(client.line(), "half-line");
        assert_eq!(newcomer.line(), "anybody there?");
    }
    command.exchange(&echo_program());
    assert!(control.ask("!update").starts_with("!updated to generation 1 in "));
    assert_eq!(client.ask("line"), "half-line");
    no_process_is_left(echo);
}

#[test]
fn a_program_that_hangs_is_ended_before_the_server_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let command = Exchangeable::new(&dir, &executable(&dir, "sleeps", "#!/bin/sh\nexec sleep 1000\n"));
    let mut echo = Echo::start(&["--patience-ms", "700", "--command", command.path()]);
    let (mut client, mut control) = (echo.connect(), echo.connect());
    assert_eq!(client.ask("hello"), "hello");
    client.send("half-");
    let answer = control.ask("!update");
    assert_eq!(
        answer,
        "!failed: cpr-exec could not prepare: the new program was killed: the new program has made no progress for 700ms (building)"
    );
    assert_eq!(echo.follow(), Exit::Signaled(SIGKILL));
    assert_eq!(client.ask("line"), "half-line");
    command.exchange(&echo_program());
    assert!(control.ask("!update").starts_with("!updated to generation 1 in "));
    no_process_is_left(echo);
}

/// Set where this test program is to be the new program, and says what comes of it.
const ROLE: &str = "ECHO_TEST_ROLE";

struct Unread;

impl MainSource for Unread {
    fn read_main(&mut self) -> Result<Frame, BoxError> {
        Err("that is not the point".into())
    }
}

/// No test by itself, but the new program of others: one that ends when the server has already stopped for it.
#[test]
fn what_the_new_program_does_if_this_is_it() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let inherit = |number: u64| oslib::inherited::take(i32::try_from(number).unwrap());
    let mut state = File::from(inherit(std::env::var("CPR_VMM_STATE").unwrap().parse().unwrap()).unwrap());
    state.seek(SeekFrom::Start(0)).unwrap();
    let mut early = Frame::read_from(state).unwrap();
    let registry = early.require("cpr-core/registry", 0).unwrap();
    let registry = FdRegistry::decode(&registry, |_, token| Ok(inherit(token)?)).unwrap();
    let control: Arc<OwnedFd> = registry.find("cpr-exec/control", 0).unwrap();
    let control = Control::attach(control, early.epoch).unwrap();
    let doorbell: Arc<EventFd> = registry.find("cpr-exec/doorbell", 0).unwrap();
    let mut main = LiveMain::new(control.clone(), doorbell, LIMIT, Box::new(Unread));
    assert_eq!(main.read_main().unwrap_err().to_string(), "that is not the point");
    match role.as_str() {
        "ends" => std::process::exit(3),
        "aborts" => std::process::abort(),
        // A moment later it is too late.
        "commits" => control.ownership().commit().unwrap(),
        role => panic!("{role}"),
    }
    std::process::exit(4);
}

/// A program that is [`what_the_new_program_does_if_this_is_it`].
fn new_program(dir: &tempfile::TempDir, role: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let test = "what_the_new_program_does_if_this_is_it";
    let line = format!("{ROLE}={role} exec {} --exact {test} --nocapture", own.display());
    executable(dir, role, &format!("#!/bin/sh\n{line}\n"))
}

#[test]
fn a_program_that_ends_with_the_state_in_its_hands_leaves_the_server_in_another_process() {
    const SIGABRT: i32 = 6;
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let command = Exchangeable::new(&dir, &echo_program());
    let mut echo = Echo::start(&["--state", state.to_str().unwrap(), "--command", command.path()]);
    let (mut client, mut control) = (echo.connect(), echo.connect());
    assert_eq!(client.ask("hello"), "hello");
    assert_eq!(control.ask("here"), "here");
    client.send("half-");
    let before = (echo.process.descriptors(), echo.process.blocked_signals());
    for (role, exit) in [("ends", Exit::Exited(3)), ("aborts", Exit::Signaled(SIGABRT))] {
        command.exchange(&new_program(&dir, role));
        let answer = control.ask("!update");
        assert_eq!(answer, format!("!failed: cpr-exec could not hand over: {ENDED} ({exit})"));
        assert_eq!(echo.follow(), exit);
        assert_eq!((echo.process.descriptors(), echo.process.blocked_signals()), before);
        assert!(!state.exists());
        assert_eq!(client.ask("line"), "half-line");
        client.send("half-");
    }
    command.exchange(&echo_program());
    assert!(control.ask("!update").starts_with("!updated to generation 1 in "));
    assert_eq!(client.ask("line"), "half-line");
    no_process_is_left(echo);
}

#[test]
fn a_program_that_ends_after_the_commit_has_taken_the_server_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let command = Exchangeable::new(&dir, &new_program(&dir, "commits"));
    let echo = Echo::start(&["--command", command.path()]);
    let mut client = echo.connect();
    client.send("!update\n");
    // The keeper does not take back what was the other's.
    let mut rest = String::new();
    match client.0.read_to_string(&mut rest) {
        Ok(_) => assert_eq!(rest, ""),
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
    no_process_is_left(echo);
}

#[test]
fn connections_survive_programs_that_end_under_traffic() {
    let dir = tempfile::tempdir().unwrap();
    let programs = [executable(&dir, "false", "#!/bin/sh\nexec false\n"), new_program(&dir, "ends")];
    let command = Exchangeable::new(&dir, &echo_program());
    let mut echo = Echo::start(&["--command", command.path()]);
    let mut control = echo.connect();
    let traffic = Traffic::start(echo.connect(), echo.connect());
    for generation in 1..=UPDATES / 4 {
        for program in &programs {
            let progress = traffic.progress();
            command.exchange(program);
            control.send("!update\nhalf-");
            let answer = control.line();
            assert!(answer.starts_with("!failed: ") && answer.contains(ENDED), "{answer}");
            echo.follow();
            assert_eq!(control.ask("line"), "half-line");
            traffic.goes_on_from(progress);
        }
        let progress = traffic.progress();
        command.exchange(&echo_program());
        control.send("!update\nhalf-");
        let answer = control.line();
        assert!(answer.starts_with(&format!("!updated to generation {generation} in ")), "{answer}");
        assert_eq!(control.ask("line"), "half-line");
        traffic.goes_on_from(progress);
        wait_until("the keeper's end", || echo.process.children().is_empty());
    }
    traffic.end();
    no_process_is_left(echo);
}
