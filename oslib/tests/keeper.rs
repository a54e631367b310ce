//! The keeper against real execs, kills and descriptors.
//!
//! Each scenario is a process of its own that executes this same program once more, which the standard harness with its
//! threads cannot do. The first process only starts them and looks at how they end.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::wait::{WaitPidFlag, waitpid};
use oslib::exec::PreparedExec;
use oslib::keeper::{Departed, Keeper};
use oslib::mapping::SharedMapping;
use oslib::memfd::Memfd;
use oslib::pidfd::{Exit, PidFd};
use oslib::shared::{SharedWord, SharedWords};
use oslib::thread::{self, Cpus, Thread};
use oslib::{clock, cloexec, inherited, process, signals};

/// Which part of which scenario a process plays. Absent: the one that starts them.
const ROLE: &str = "OSLIB_KEEPER_TEST_ROLE";
const RAM_BYTES: u64 = 256 << 20;
const PATIENCE: Duration = Duration::from_secs(30);
const NO_ENV: [(&str, &str); 0] = [];

const SCENARIOS: [(&str, fn()); 6] = [
    ("the_image_goes_on_in_the_keeper", || exec_into("target", RAM_BYTES)),
    ("and_can_leave_its_process_again", leave_twice),
    ("failed_exec_leaves_nothing", failed_exec_leaves_nothing),
    ("source_killed_before_exec", source_killed_before_exec),
    ("target_killed_at_once", target_killed_at_once),
    ("what_is_refused", what_is_refused),
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
        "second-target" => second_target(arguments),
        "hang" => hang_before_exec(),
        "exec-true" => exec_true(),
        other => panic!("no role {other}"),
    }
}

/// This program in another role.
fn me(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(ROLE, role).stdin(Stdio::null());
    command
}

/// RAM as a source has it: a mapping whose page tables are populated, which an exec would have to tear down.
fn populate(bytes: u64) -> SharedMapping {
    let ram = SharedMapping::map(Memfd::new("ram").len(bytes).seal_size().create().unwrap(), bytes).unwrap();
    for offset in (0..bytes).step_by(4096) {
        ram.write_u64(offset, offset).unwrap();
    }
    ram
}

fn shared_word() -> SharedWord {
    SharedWords::create("word", 1).unwrap().word(0).unwrap()
}

/// Waits until the other process has stored `value`.
fn await_value(word: &SharedWord, value: u64) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = word.load(SeqCst);
        if now == value {
            return;
        }
        assert!(Instant::now() < deadline, "{now} instead of {value}");
        word.wait(now, Duration::from_millis(100)).unwrap();
    }
}

fn tell(word: &SharedWord, value: u64) {
    word.store(value, SeqCst);
    word.wake();
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

thread_local! {
    static OF_THE_MAIN_THREAD: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

/// Leaves this process to `role` of this program; the arguments are: the descriptors that were there at the start, the
/// preserved ones, the keeper's pid, when the exec began.
fn leave_to(role: &str, at_start: &[RawFd], preserved: &[BorrowedFd<'_>]) -> Departed {
    signals::block_all().unwrap();
    let numbers: Vec<_> = preserved.iter().map(|fd| fd.as_raw_fd()).collect();
    preserved.iter().for_each(|fd| cloexec::clear(fd).unwrap());
    let keeper = Keeper::spawn().unwrap();
    let (pid, began_ns) = (keeper.pid().to_string(), clock::monotonic_ns().to_string());
    let args = [role, &join(at_start), &join(&numbers), &pid, &began_ns].map(OsString::from);
    let exec = PreparedExec::new("/proc/self/exe", args, [(ROLE, role)]).unwrap();
    keeper.exec(&exec).unwrap()
}

// ---- Source, and what becomes of it in the keeper.

fn exec_into(target: &str, ram_bytes: u64) {
    let at_start = process::open_fds().unwrap();
    let ram = populate(ram_bytes);
    let word = shared_word();
    // A connection that the source alone has.
    let (ours, mut peer) = UnixStream::pair().unwrap();
    // Exec ends threads where they stand, so no lock may be held by one.
    let parked: Vec<_> = (0..3).map(|_| Thread::spawn("parked", STACK, std::thread::park).unwrap()).collect();
    std::thread::sleep(Duration::from_millis(20));
    let on_the_heap: Vec<u32> = (0..1000).collect();
    let on_the_stack = [0x5a5a_u64; 64];
    OF_THE_MAIN_THREAD.set(77);
    let floating = std::hint::black_box(1.25_f64);
    let source_pid = std::process::id();
    let before = policy();

    let departed = leave_to(target, &at_start, &[word.all().fd().as_fd(), ours.as_fd()]);

    // In the keeper: another process, with everything else as it was.
    assert_ne!(std::process::id(), source_pid);
    assert_eq!(nix::unistd::getppid().as_raw().cast_unsigned(), source_pid);
    assert_eq!(process::thread_names(std::process::id()).unwrap(), ["cpr-keeper"]);
    assert!(!departed.successor.is_exited().unwrap());
    assert_eq!(on_the_heap.iter().sum::<u32>(), 499_500);
    assert!(on_the_stack.iter().all(|word| *word == 0x5a5a) && floating * 4.0 == 5.0);
    assert_eq!(OF_THE_MAIN_THREAD.get(), 77);
    assert_eq!(ram.read_u64(4096).unwrap(), 4096);
    let never_blocked = 1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1);
    drop(departed.head_start);
    assert_eq!(policy(), before, "how it is scheduled");
    assert_eq!(signals::current().unwrap().bits() | never_blocked | 3 << 31, u64::MAX);
    // It can do what a program does: allocate, start threads and join them, panic and catch it, talk.
    let threads: Vec<_> = (0..8_u64)
        .map(|n| {
            std::thread::spawn(move || (0..20_000).map(|i| format!("{i}").len() as u64).sum::<u64>() + n)
        })
        .collect();
    let sums: Vec<u64> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    assert_eq!(sums[7] - sums[0], 7);
    // What the exec has left of threads can be freed.
    assert_eq!(mappings_of(STACK), parked.len());
    parked.into_iter().for_each(Thread::bury);
    assert_eq!(mappings_of(STACK), 0);
    knows_its_cpu();
    let caught = std::panic::catch_unwind(|| std::panic::resume_unwind(Box::new(5_u8)));
    assert_eq!(caught.unwrap_err().downcast_ref(), Some(&5_u8));
    peer.write_all(b"from the old program").unwrap();
    deep(200);

    tell(&word, 1);
    await_value(&word, 2);
    tell(&word, 3);
    process::step_aside(vec![], 42);
}

/// How this process is scheduled, as proc_pid_stat(5) counts: field 41, the policy.
fn policy() -> String {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after_the_name = stat.rsplit(") ").next().unwrap();
    after_the_name.split(' ').nth(38).unwrap().to_owned()
}

/// A size that no other mapping has: more than what the C library keeps of stacks for threads to come.
const STACK: usize = (64 << 20) + 12345 * 4096;

/// How many mappings of this process have `len` bytes, give or take a few pages.
fn mappings_of(len: usize) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let lens = maps.lines().map(|line| {
        let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
        usize::from_str_radix(to, 16).unwrap() - usize::from_str_radix(from, 16).unwrap()
    });
    lens.filter(|found| found.abs_diff(len) <= 8 * 4096).count()
}

/// Uses about a megabyte of stack.
fn deep(left: u32) -> u64 {
    let block = std::hint::black_box([u64::from(left); 640]);
    if left == 0 { block[0] } else { deep(left - 1) + block[639] }
}

fn target(arguments: &[String]) {
    let now_ns = clock::monotonic_ns();
    let [at_start, preserved, keeper_pid, began_ns] = arguments else { panic!("{arguments:?}") };
    let exec_ns = now_ns - began_ns.parse::<u64>().unwrap();
    let keeper_pid: u32 = keeper_pid.parse().unwrap();
    let keeper = PidFd::open(keeper_pid).unwrap();

    // Nothing came through the exec but what was meant to: no pidfd, no copy of the keeper's.
    let preserved = split(preserved);
    let mut expected = [split(at_start), preserved.clone(), vec![keeper.as_fd().as_raw_fd()]].concat();
    expected.sort_unstable();
    assert_eq!(process::open_fds().unwrap(), expected);
    assert_eq!(process::thread_names(std::process::id()).unwrap().len(), 1);
    let word = SharedWords::map(inherited::take(preserved[0]).unwrap()).unwrap().word(0).unwrap();
    let mut stream = UnixStream::from(inherited::take(preserved[1]).unwrap());

    await_value(&word, 1);
    // The keeper has the old address space, this program has not.
    assert!(process::rss_bytes(keeper_pid).unwrap() > RAM_BYTES / 4 * 3);
    assert!(process::rss_bytes(std::process::id()).unwrap() < RAM_BYTES / 4);
    let mut text = [0; 20];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"from the old program");
    // Nothing short of SIGKILL disturbs it.
    keeper.send_signal(libc::SIGTERM).unwrap();
    assert!(!keeper.wait_exited(Duration::from_millis(20)).unwrap());

    tell(&word, 2);
    await_value(&word, 3);
    // The peer's end of the connection was the keeper's only: it is closed before the memory is taken down.
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(stream.read(&mut text).unwrap(), 0);
    assert!(keeper.wait_exited(PATIENCE).unwrap());
    // Not reaped yet, so that what it set for its tear-down can still be read.
    let adjustment = std::fs::read_to_string(format!("/proc/{keeper_pid}/oom_score_adj")).unwrap();
    assert_eq!(adjustment.trim(), "1000");
    assert_ne!(std::fs::read_to_string("/proc/self/oom_score_adj").unwrap().trim(), "1000");
    let stat = std::fs::read_to_string(format!("/proc/{keeper_pid}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().collect();
    assert_eq!((fields[16], fields[38]), ("10", &*libc::SCHED_BATCH.to_string()));
    assert_eq!(keeper.reap().unwrap(), Exit::Exited(42));
    assert_no_children();
    println!("    {} MiB populated: exec {:.2} ms", RAM_BYTES >> 20, exec_ns as f64 / 1e6);
}

/// The program in the keeper is a program like any other: it leaves its process once more.
fn leave_twice() {
    process::set_child_subreaper(true).unwrap();
    let at_start = process::open_fds().unwrap();
    let word = shared_word();
    leave_to("second-target", &at_start, &[word.all().fd().as_fd()]);
    let second = std::process::id();
    leave_to("second-target", &at_start, &[word.all().fd().as_fd()]);
    assert_ne!(std::process::id(), second);
    tell(&word, word.load(SeqCst) + 100);
    process::step_aside(vec![], 0);
}

fn second_target(arguments: &[String]) {
    let word = SharedWords::map(inherited::take(split(&arguments[1])[0]).unwrap()).unwrap().word(0).unwrap();
    word.fetch_add(1, SeqCst);
    word.wake();
    await_value(&word, 102);
    let keeper = PidFd::open(arguments[2].parse().unwrap()).unwrap();
    // The first target's keeper executed the second one.
    assert_eq!(keeper.reap().unwrap(), Exit::Exited(0));
}

// ---- A failed exec.

/// The C library does not, in the thread that was the other process's main thread.
fn knows_its_cpu() {
    let caller = nix::unistd::Pid::from_raw(0);
    let home = sched_getaffinity(caller).unwrap();
    for cpu in Cpus::of_caller().unwrap().iter() {
        let mut only = CpuSet::new();
        only.set(cpu).unwrap();
        sched_setaffinity(caller, &only).unwrap();
        assert_eq!(thread::current_cpu(), Some(cpu));
    }
    sched_setaffinity(caller, &home).unwrap();
}

/// What must be the same after a keeper was cancelled as before it was spawned.
fn holdings() -> (Vec<RawFd>, Vec<String>, signals::SignalMask) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    // The heap belongs to the allocator.
    let maps = maps.lines().filter(|line| !line.ends_with("[heap]")).map(str::to_owned).collect();
    (process::open_fds().unwrap(), maps, signals::current().unwrap())
}

fn failed_exec_leaves_nothing() {
    signals::block_all().unwrap();
    let (ours, peer) = UnixStream::pair().unwrap();
    let missing = PreparedExec::new("/does/not/exist", ["x"], NO_ENV).unwrap();
    let attempt = |way: u8| {
        let keeper = Keeper::spawn().unwrap();
        assert!(cloexec::is_set(keeper.pidfd()).unwrap());
        let pid = keeper.pid();
        match way {
            0 => drop(keeper),
            1 => keeper.cancel().unwrap(),
            _ => assert_eq!(keeper.exec(&missing).unwrap_err().kind(), io::ErrorKind::NotFound),
        }
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        assert_no_children();
    };
    // The first round warms up the allocator.
    (0..3).for_each(attempt);
    let before = holdings();
    (0..60).for_each(|round| attempt(round % 3));
    assert_eq!(holdings(), before);
    // No copy of the connection is left anywhere.
    drop(ours);
    assert_eq!((&peer).read(&mut [0]).unwrap(), 0);

    // Somebody ended the keeper and, by ignoring SIGCHLD, even reaped it: that is as good as cancelled.
    let keeper = Keeper::spawn().unwrap();
    keeper.pidfd().send_signal(libc::SIGKILL).unwrap();
    assert_eq!(keeper.pidfd().reap().unwrap(), Exit::Signaled(libc::SIGKILL));
    keeper.cancel().unwrap();
    // And the program runs on as ever.
    std::thread::spawn(|| ()).join().unwrap();
}

fn what_is_refused() {
    let other = std::thread::spawn(|| Keeper::spawn().unwrap_err().kind()).join().unwrap();
    assert_eq!(other, io::ErrorKind::InvalidInput);
    signals::block_all().unwrap();
    let first = Keeper::spawn().unwrap();
    assert_eq!(Keeper::spawn().unwrap_err().kind(), io::ErrorKind::ResourceBusy);
    first.cancel().unwrap();
    Keeper::spawn().unwrap().cancel().unwrap();
}

// ---- Ends that nobody planned.

/// Starts `source`, whose standard output names its keeper, which this process inherits.
fn orphan(source: &str) -> (Child, PidFd) {
    process::set_child_subreaper(true).unwrap();
    let mut child = me(source).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let keeper = PidFd::open(line.trim_end().parse().unwrap()).unwrap();
    (child, keeper)
}

fn source_killed_before_exec() {
    let (mut child, keeper) = orphan("hang");
    assert!(!keeper.wait_exited(Duration::from_millis(20)).unwrap());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(keeper.wait_exited(PATIENCE).unwrap());
    assert_eq!(keeper.reap().unwrap(), Exit::Exited(1));
    assert_no_children();
}

fn hang_before_exec() {
    signals::block_all().unwrap();
    let keeper = Keeper::spawn().unwrap();
    println!("{}", keeper.pid());
    std::thread::sleep(PATIENCE * 2);
}

/// The target ends as soon as it runs; the old program sees it, and has all that it needs to go on.
fn target_killed_at_once() {
    let (mut child, keeper) = orphan("exec-true");
    assert!(child.wait().unwrap().success());
    assert!(keeper.wait_exited(PATIENCE).unwrap());
    assert_eq!(keeper.reap().unwrap(), Exit::Exited(9));
}

fn exec_true() {
    signals::block_all().unwrap();
    let keeper = Keeper::spawn().unwrap();
    println!("{}", keeper.pid());
    let exec = PreparedExec::new("/bin/true", ["true"], NO_ENV).unwrap();
    let departed = keeper.exec(&exec).unwrap();
    assert!(departed.successor.wait_exited(PATIENCE).unwrap());
    process::step_aside(vec![], 9);
}
