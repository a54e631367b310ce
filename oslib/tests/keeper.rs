//! The keeper against real execs, kills and descriptors.
//!
//! Each scenario is a process of its own that executes this same program once more, which the standard harness with its
//! threads cannot do. The first process only starts them and looks at how they end.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{WaitPidFlag, waitpid};
use oslib::eventfd::EventFd;
use oslib::exec::{PreparedExec, exec};
use oslib::keeper::{Keeper, KeeperPlan};
use oslib::mapping::SharedMapping;
use oslib::memfd::Memfd;
use oslib::pidfd::{Exit, PidFd};
use oslib::shared::{SharedWord, SharedWords};
use oslib::{clock, cloexec, inherited, process, signals};

/// Which part of which scenario a process plays. Absent: the one that starts them.
const ROLE: &str = "OSLIB_KEEPER_TEST_ROLE";
const RUNNING: u64 = 7;
const COMMITTED: u64 = 8;
const RAM_BYTES: u64 = 256 << 20;
const PATIENCE: Duration = Duration::from_secs(30);
const NO_ENV: [(&str, &str); 0] = [];

const SCENARIOS: [(&str, fn()); 7] = [
    ("exec_then_commit", exec_then_commit),
    ("commit_without_a_ring", || exec_into("unrung-target", 16 << 20)),
    ("failed_exec_leaves_nothing", failed_exec_leaves_nothing),
    ("target_killed_without_commit", || orphan("exec-and-hang", true, Exit::Exited(1))),
    ("source_killed_before_exec", || orphan("hang", true, Exit::Exited(1))),
    ("target_ends_after_commit_without_ring", || orphan("commit-and-end", false, Exit::Exited(0))),
    ("keeper_that_was_killed_is_cancelled", keeper_that_was_killed_is_cancelled),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Ok(role) = std::env::var(ROLE) {
        match SCENARIOS.iter().find(|(name, _)| *name == role) {
            Some((_, scenario)) => scenario(),
            None => play(&role, &arguments),
        }
        return ExitCode::SUCCESS;
    }
    // The little of the standard harness's command line that tools use.
    if arguments.iter().any(|argument| argument == "--list") {
        // Asked for the ignored ones alone, there are none.
        let ignored_only = arguments.iter().any(|argument| argument == "--ignored");
        for (name, _) in SCENARIOS.iter().filter(|_| !ignored_only) {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    let filters: Vec<_> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let mut failed = 0;
    for (name, _) in SCENARIOS {
        if !filters.is_empty() && !filters.iter().any(|filter| name.contains(filter.as_str())) {
            continue;
        }
        let status = me(name).status().unwrap();
        println!("test {name} ... {}", if status.success() { "ok" } else { "FAILED" });
        failed += u8::from(!status.success());
    }
    ExitCode::from(failed)
}

fn play(role: &str, arguments: &[String]) {
    match role {
        "target" => target(arguments),
        "unrung-target" => unrung_target(arguments),
        "exec-and-hang" => exec_into("hanging-target", RAM_BYTES),
        "hanging-target" => hanging_target(arguments),
        "hang" => hang_before_exec(),
        "commit-and-end" => exec_into("ending-target", 1 << 20),
        "ending-target" => ending_target(arguments),
        other => panic!("no role {other}"),
    }
}

/// This program in another role.
fn me(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(ROLE, role).stdin(Stdio::null());
    command
}

/// RAM as a source has it: a mapping whose page tables are populated, which an exec has to tear down.
fn populate(bytes: u64) -> SharedMapping {
    let ram = SharedMapping::map(Memfd::new("ram").len(bytes).seal_size().create().unwrap(), bytes).unwrap();
    for offset in (0..bytes).step_by(4096) {
        ram.write_u64(offset, offset).unwrap();
    }
    ram
}

fn word_and_doorbell() -> (SharedWord, EventFd) {
    let words = SharedWords::create("ownership", 1).unwrap();
    let word = words.word(0).unwrap();
    word.store(RUNNING, SeqCst);
    (word, EventFd::new().unwrap())
}

fn assert_no_children() {
    assert_eq!(waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)), Err(Errno::ECHILD));
}

fn join(numbers: &[RawFd]) -> String {
    numbers.iter().map(RawFd::to_string).collect::<Vec<_>>().join(",")
}

fn split(numbers: &str) -> Vec<RawFd> {
    numbers.split(',').map(|number| number.parse().unwrap()).collect()
}

// ---- Source: spawn the keeper, execute the target.

fn exec_then_commit() {
    exec_into("target", RAM_BYTES);
}

/// Plays the source up to its exec. The target gets, as arguments: the descriptors that were there at the start; the four
/// it takes over; the keeper's pid; when the exec began.
fn exec_into(target: &str, ram_bytes: u64) {
    let at_start = process::open_fds().unwrap();
    let _ram = populate(ram_bytes);
    let (word, doorbell) = word_and_doorbell();
    // A connection that the source alone has, and one that stands for a descriptor of KVM.
    let (_ours, peer) = UnixStream::pair().unwrap();
    let (kvm, kvm_peer) = UnixStream::pair().unwrap();
    // Threads are parked, not joined: the exec ends them.
    for _ in 0..3 {
        std::thread::spawn(std::thread::park);
    }

    let preserved = [word.all().fd().as_fd(), doorbell.as_fd(), peer.as_fd(), kvm_peer.as_fd()];
    let numbers = preserved.map(|fd| fd.as_raw_fd());
    let plan = KeeperPlan {
        commit: doorbell.as_fd(),
        word: word.clone(),
        committed: COMMITTED,
        keep_fds: vec![kvm.as_raw_fd()],
    };
    let keeper = Keeper::spawn(plan).unwrap();
    preserved.iter().for_each(|fd| cloexec::clear(fd).unwrap());
    let (pid, began_ns) = (keeper.pid().to_string(), clock::monotonic_ns().to_string());
    let args = [target, &join(&at_start), &join(&numbers), &pid, &began_ns].map(OsString::from);
    let exec = PreparedExec::new("/proc/self/exe", args, [(ROLE, target)]).unwrap();
    panic!("exec failed: {}", exec.run());
}

// ---- Target: what is there after the exec.

struct Target {
    word: SharedWord,
    doorbell: EventFd,
    peer: UnixStream,
    kvm_peer: UnixStream,
    keeper_pid: u32,
    keeper: PidFd,
    exec_ns: u64,
}

impl Target {
    fn take_over(arguments: &[String]) -> Self {
        let now_ns = clock::monotonic_ns();
        let [at_start, preserved, keeper_pid, began_ns] = arguments else { panic!("{arguments:?}") };
        let keeper_pid = keeper_pid.parse().unwrap();

        // Nothing came through the exec but what was meant to: no pidfd, no copy of the keeper's.
        let preserved = split(preserved);
        let mut expected = [split(at_start), preserved.clone()].concat();
        expected.sort_unstable();
        assert_eq!(process::open_fds().unwrap(), expected);
        assert_eq!(process::thread_names(std::process::id()).unwrap().len(), 1);

        let mut fds = preserved.iter().map(|number| inherited::take(*number).unwrap());
        let mut next = || fds.next().unwrap();
        let word = SharedWords::map(next()).unwrap().word(0).unwrap();
        assert_eq!(word.load(SeqCst), RUNNING);
        Target {
            word,
            doorbell: EventFd::from(next()),
            peer: UnixStream::from(next()),
            kvm_peer: UnixStream::from(next()),
            keeper_pid,
            keeper: PidFd::open(keeper_pid).unwrap(),
            exec_ns: now_ns - began_ns.parse::<u64>().unwrap(),
        }
    }

    fn commit(&self) {
        assert_eq!(self.word.compare_exchange(RUNNING, COMMITTED, SeqCst, SeqCst), Ok(RUNNING));
    }

    fn keeper_status(&self, field: &str) -> String {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.keeper_pid)).unwrap();
        status
            .lines()
            .find_map(|line| line.strip_prefix(field))
            .unwrap()
            .trim_start_matches(':')
            .trim()
            .to_owned()
    }
}

fn at_end(mut stream: &UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    match stream.read(&mut [0]) {
        Ok(0) => true,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
        other => panic!("{other:?}"),
    }
}

fn target(arguments: &[String]) {
    let target = Target::take_over(arguments);

    // The keeper has the old address space, this program has not.
    // On a busy machine this program may be here before the keeper has run at all.
    let deadline = Instant::now() + PATIENCE;
    while process::thread_names(target.keeper_pid).unwrap() != ["cpr-keeper"] {
        assert!(Instant::now() < deadline, "the keeper names itself");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(process::rss_bytes(target.keeper_pid).unwrap() > RAM_BYTES / 4 * 3);
    assert!(process::rss_bytes(std::process::id()).unwrap() < RAM_BYTES / 4);
    // It holds the old connections open, and nothing short of SIGKILL disturbs it.
    assert!(!at_end(&target.peer) && !at_end(&target.kvm_peer));
    let blocked = u64::from_str_radix(&target.keeper_status("SigBlk"), 16).unwrap();
    assert_eq!(blocked | 1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1), u64::MAX);
    target.keeper.send_signal(libc::SIGTERM).unwrap();
    for _ in 0..3 {
        // Rings without a commit.
        target.doorbell.signal().unwrap();
        std::thread::sleep(Duration::from_millis(10));
    }
    let deadline = Instant::now() + PATIENCE;
    while target.doorbell.wait(Duration::ZERO).unwrap() {
        assert!(Instant::now() < deadline, "the keeper drains its doorbell");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!target.keeper.is_exited().unwrap());
    assert!(!at_end(&target.peer));

    let committed = Instant::now();
    target.commit();
    target.doorbell.signal().unwrap();
    let mut ends =
        [&target.peer, &target.kvm_peer].map(|stream| PollFd::new(stream.as_fd(), PollFlags::POLLIN));
    let timeout = PollTimeout::try_from(PATIENCE).unwrap();
    assert!(poll(&mut ends, timeout).unwrap() > 0);
    let [peer_ended, kvm_ended] = ends.map(|end| end.any().unwrap());
    let peer_end = committed.elapsed();
    assert!(peer_ended, "the old connection ended later than what the keeper keeps");
    assert!(at_end(&target.peer));
    // The tear-down lies between the two. On a machine so busy that this process slept through it, both are there.
    assert!(!kvm_ended || peer_end > Duration::from_millis(5), "all was closed at once, after {peer_end:?}");

    assert!(target.keeper.wait_exited(PATIENCE).unwrap());
    assert!(at_end(&target.kvm_peer));
    let keeper_end = committed.elapsed();
    // Not reaped yet, so that what it set for its tear-down can still be read.
    let adjustment = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", target.keeper_pid)).unwrap();
    assert_eq!(adjustment.trim(), "1000");
    assert_ne!(std::fs::read_to_string("/proc/self/oom_score_adj").unwrap().trim(), "1000");
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", target.keeper_pid)).unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().collect();
    let (nice, policy) = (fields[16], fields[38]);
    assert_eq!((nice, policy), ("10", &*libc::SCHED_BATCH.to_string()));

    assert_eq!(target.keeper.reap().unwrap(), Exit::Exited(0));
    assert_no_children();
    assert!(!Path::new(&format!("/proc/{}", target.keeper_pid)).exists());
    println!(
        "    {} MiB populated: exec {:.2} ms, end of the old connection {:.2} ms and of the keeper {:.2} ms after commit",
        RAM_BYTES >> 20,
        target.exec_ns as f64 / 1e6,
        peer_end.as_secs_f64() * 1e3,
        keeper_end.as_secs_f64() * 1e3,
    );
}

fn unrung_target(arguments: &[String]) {
    let target = Target::take_over(arguments);
    target.commit();
    assert!(target.keeper.wait_exited(PATIENCE).unwrap());
    assert_eq!(target.keeper.reap().unwrap(), Exit::Exited(0));
    assert_no_children();
}

// ---- A failed exec.

/// What must be the same after a keeper was cancelled as before it was spawned.
fn holdings() -> (Vec<RawFd>, Vec<String>, signals::SignalMask) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    // The heap belongs to the allocator.
    let maps = maps.lines().filter(|line| !line.ends_with("[heap]")).map(str::to_owned).collect();
    (process::open_fds().unwrap(), maps, signals::current().unwrap())
}

fn failed_exec_leaves_nothing() {
    let (word, doorbell) = word_and_doorbell();
    let (ours, peer) = UnixStream::pair().unwrap();
    let attempt = |dropped: bool| {
        let plan = KeeperPlan {
            commit: doorbell.as_fd(),
            word: word.clone(),
            committed: COMMITTED,
            keep_fds: vec![doorbell.as_raw_fd()],
        };
        let keeper = Keeper::spawn(plan).unwrap();
        assert!(cloexec::is_set(keeper.pidfd()).unwrap());
        let pid = keeper.pid();
        assert_eq!(exec("/does/not/exist", ["x"], NO_ENV).kind(), io::ErrorKind::NotFound);
        assert!(!keeper.pidfd().is_exited().unwrap());
        if dropped {
            drop(keeper)
        } else {
            keeper.cancel().unwrap()
        }
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        assert_no_children();
    };
    // The first round warms up the allocator.
    attempt(false);
    let before = holdings();
    for round in 0..50 {
        attempt(round % 2 == 0);
    }
    assert_eq!(holdings(), before);
    // The word was not let go of, nor held on to.
    assert_eq!(word.load(SeqCst), RUNNING);
    drop(word);
    assert!(!std::fs::read_to_string("/proc/self/maps").unwrap().contains("/memfd:ownership"));
    // No copy of the connection is left anywhere.
    ours.shutdown(Shutdown::Read).unwrap();
    drop(ours);
    assert!(at_end(&peer));
}

/// Somebody ended the keeper and, by ignoring SIGCHLD, even reaped it: that is as good as cancelled.
fn keeper_that_was_killed_is_cancelled() {
    let (word, doorbell) = word_and_doorbell();
    let plan = || KeeperPlan {
        commit: doorbell.as_fd(),
        word: word.clone(),
        committed: COMMITTED,
        keep_fds: vec![],
    };
    let keeper = Keeper::spawn(plan()).unwrap();
    keeper.pidfd().send_signal(libc::SIGKILL).unwrap();
    assert!(keeper.pidfd().wait_exited(PATIENCE).unwrap());
    keeper.cancel().unwrap();

    let keeper = Keeper::spawn(plan()).unwrap();
    keeper.pidfd().send_signal(libc::SIGKILL).unwrap();
    assert_eq!(keeper.pidfd().reap().unwrap(), Exit::Signaled(libc::SIGKILL));
    keeper.cancel().unwrap();
    assert_no_children();
}

// ---- Nobody commits.

/// Starts `source`, whose standard output names its keeper, has it end, and expects the keeper, an orphan that this process
/// inherits, to end as `expected`.
fn orphan(source: &str, kill: bool, expected: Exit) {
    process::set_child_subreaper(true).unwrap();
    let mut child = me(source).stdout(Stdio::piped()).spawn().unwrap();
    let keeper_pid = first_line(&mut child).parse().unwrap();
    let keeper = PidFd::open(keeper_pid).unwrap();
    let (watch, number) = (PidFd::open(child.id()).unwrap(), child.id());
    if kill {
        assert!(!keeper.wait_exited(Duration::from_millis(20)).unwrap());
        watch.send_signal(libc::SIGKILL).unwrap();
    }
    let status = child.wait().unwrap();
    assert_eq!(status.success(), !kill, "{number}: {status}");
    assert!(keeper.wait_exited(PATIENCE).unwrap());
    assert_eq!(keeper.reap().unwrap(), expected);
    assert_no_children();
}

fn first_line(child: &mut Child) -> String {
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

fn hanging_target(arguments: &[String]) {
    let target = Target::take_over(arguments);
    println!("{}", target.keeper_pid);
    std::thread::sleep(PATIENCE * 2);
}

fn ending_target(arguments: &[String]) {
    let target = Target::take_over(arguments);
    // The parent opens the keeper while it certainly exists.
    println!("{}", target.keeper_pid);
    std::thread::sleep(Duration::from_millis(200));
    target.commit();
}

fn hang_before_exec() {
    let (word, doorbell) = word_and_doorbell();
    let plan = KeeperPlan { commit: doorbell.as_fd(), word, committed: COMMITTED, keep_fds: vec![] };
    let keeper = Keeper::spawn(plan).unwrap();
    println!("{}", keeper.pid());
    std::thread::sleep(PATIENCE * 2);
}
