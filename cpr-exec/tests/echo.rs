//! The example as its clients see it: updated again and again, they notice nothing but the answer to `!update`.

mod common;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use common::{CLOEXEC, Client, Echo, IDLE, echo_program, wait_until};
use oslib::pidfd::PidFd;

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

#[test]
fn connections_survive_twenty_updates_under_traffic() {
    let mut echo = Echo::start::<&str>(&[]);
    let mut control = echo.connect();
    let (pinging, flooding) = (echo.connect(), echo.connect());
    wait_until("three connections", || echo.process.descriptors().len() == IDLE + 3);
    let before = (echo.process.descriptors(), echo.process.blocked_signals());

    let stop = Arc::new(AtomicBool::new(false));
    let progress = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let spawn = |index: usize, run: fn(Client, &AtomicBool, &AtomicU64), client| {
        let (stop, progress) = (stop.clone(), progress.clone());
        std::thread::spawn(move || run(client, &stop, &progress[index]))
    };
    let traffic = [spawn(0, ping, pinging), spawn(1, flood, flooding)];
    for generation in 1..=UPDATES {
        let [pings, bytes] = [0, 1].map(|index| progress[index].load(Relaxed));
        // The beginning of a line, which the next program will complete.
        control.send("!update\nhalf-");
        let answer = control.line();
        assert!(answer.starts_with(&format!("!updated to generation {generation} in ")), "{answer}");
        assert_eq!(control.ask("line"), "half-line");
        wait_until("traffic", || {
            assert!(!traffic.iter().any(|thread| thread.is_finished()), "a connection was lost");
            progress[0].load(Relaxed) > pings + 3 && progress[1].load(Relaxed) > bytes + 3000
        });
    }
    assert!(echo.process.is_running(), "the same process all the time");
    wait_until("the last keeper's end", || echo.process.children().is_empty());
    stop.store(true, Relaxed);
    for thread in traffic {
        thread.join().unwrap();
    }

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
    let script = dir.path().join("no-format");
    // No format at all: neither ELF nor "#!". The kernel says ENOEXEC, and only when it is asked to execute it.
    std::fs::write(&script, "just a text\n").unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let command = dir.path().join("command");
    std::os::unix::fs::symlink(&script, &command).unwrap();
    let state = dir.path().join("state");
    let mut echo = Echo::start(&["--state", state.to_str().unwrap(), "--command", command.to_str().unwrap()]);
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
    std::fs::remove_file(&command).unwrap();
    std::os::unix::fs::symlink(echo_program(), &command).unwrap();
    assert!(control.ask("!update").starts_with("!updated to generation 1 in "));
    for client in &mut clients {
        assert_eq!(client.ask("line"), "half-line");
    }
    assert!(echo.process.is_running());
}
