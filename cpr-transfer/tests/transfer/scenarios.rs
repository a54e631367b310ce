//! What must hold.

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use cpr_core::{GuestActivity, Outcome, TargetPhase, UpdateError};
use cpr_transfer::{CprTransfer, Endpoint, ListenError, Listener, VERSION};
use oslib::eventfd::EventFd;
use oslib::pidfd::PidFd;

use crate::machine::Machine;
use crate::peers::{NOBODY, PATIENCE, ROLE, Target, act, answering, garbage, refusal, say, stranger};

const SCENARIOS: &[(&str, fn())] = &[
    ("a_machine_moves_and_beats_on", || moves(0, "good")),
    ("descriptors_of_several_batches_arrive_under_their_names", || moves(600, "good")),
    ("a_paused_machine_stays_paused", a_paused_machine_stays_paused),
    ("a_connection_that_is_there_already_will_do", a_connection_that_is_there_already_will_do),
    ("a_refusal_reaches_the_source", || stays("refuse", "the target refuses: not today", Some(0))),
    ("a_late_refusal_reaches_the_source", || {
        stays("refuse-loaded", "the target refuses: not this state", Some(0))
    }),
    ("a_target_that_dies_while_it_builds", || stays("die", "ended before it took over", Some(3))),
    ("a_target_that_dies_with_the_state", || stays("die-loaded", "ended before it took over", Some(3))),
    ("a_target_that_hangs_is_killed", || stays("hang", "no progress", None)),
    ("a_cancelled_target_ends_by_itself", a_cancelled_target_ends_by_itself),
    ("a_target_is_asked_first", a_target_is_asked_first),
    ("a_target_that_refuses_beforehand_waits_on", a_target_that_refuses_beforehand_waits_on),
    ("peers_that_give_no_verdict", peers_that_give_no_verdict),
    ("peers_that_are_no_targets", peers_that_are_no_targets),
    ("a_target_that_has_nothing_is_left_alone", a_target_that_has_nothing_is_left_alone),
    ("peers_that_are_no_sources", peers_that_are_no_sources),
    ("paths", paths),
    ("users", users),
];

pub(crate) fn main() -> ExitCode {
    if let Ok(role) = std::env::var(ROLE) {
        return match act(&role) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{role}: {error}");
                ExitCode::FAILURE
            }
        };
    }
    // The little of the standard harness's command line that tools use.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        let ignored = arguments.iter().any(|argument| argument == "--ignored");
        SCENARIOS.iter().filter(|_| !ignored).for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    std::thread::spawn(|| {
        std::thread::sleep(PATIENCE * 2);
        eprintln!("a scenario hangs");
        std::process::exit(2);
    });
    let filters: Vec<_> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    for (name, scenario) in SCENARIOS {
        if filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str())) {
            println!("{name}");
            scenario();
        }
    }
    ExitCode::SUCCESS
}

/// Of a source whose target makes no progress.
const LIMIT: Duration = Duration::from_secs(1);

fn to(path: &Path) -> Box<CprTransfer> {
    let mode = CprTransfer::new(Endpoint::Path(path.into())).leaving(vec!["stays".into()]);
    Box::new(mode.time_limits(LIMIT, LIMIT, None))
}

fn is_handed_over(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::HandedOver)
}

/// The update fails for this reason, and the machine runs on here.
fn fails(machine: &mut Machine, path: &Path, reason: &str) {
    match machine.update(to(path)) {
        Ok(Outcome::Failed { error, guest: Ok(()) }) => {
            assert!(error.to_string().contains(reason), "{error}, not {reason}");
        }
        other => panic!("{other:?}"),
    }
    machine.beat();
}

fn moves(others: u64, role: &str) {
    let mut target = Target::start(role);
    let mut machine = Machine::create(others);
    assert!(is_handed_over(&machine.update(to(&target.socket)).unwrap()));
    assert_eq!(target.exit_code(), Some(0));
    assert!(machine.beats() > 0, "it beats in the same memory");
    assert_eq!(machine.activity, GuestActivity::Paused);
    assert!(!target.socket.exists());
}

fn a_paused_machine_stays_paused() {
    let mut target = Target::start("good");
    let mut machine = Machine::create(0);
    machine.activity = GuestActivity::Paused;
    assert!(is_handed_over(&machine.update(to(&target.socket)).unwrap()));
    // Its only beat is one of a machine that must run.
    assert_eq!(target.exit_code(), Some(101));
    assert_eq!(machine.beats(), 0);
}

fn a_connection_that_is_there_already_will_do() {
    let mut target = Target::start("good");
    let mut machine = Machine::create(0);
    let stream = UnixStream::connect(&target.socket).unwrap();
    let mode = CprTransfer::new(Endpoint::Connected(stream)).leaving(vec!["stays".into()]);
    assert!(is_handed_over(&machine.update(Box::new(mode)).unwrap()));
    assert_eq!(target.exit_code(), Some(0));
}

fn stays(role: &str, reason: &str, code: Option<i32>) {
    let mut target = Target::start(role);
    let mut machine = Machine::create(1);
    fails(&mut machine, &target.socket, reason);
    assert_eq!(target.exit_code(), code);
    // Nothing of it is in the way of the next.
    let mut target = Target::start("good");
    assert!(is_handed_over(&machine.update(to(&target.socket)).unwrap()));
    assert_eq!(target.exit_code(), Some(0));
}

fn a_cancelled_target_ends_by_itself() {
    let mut target = Target::start("slow");
    let mut machine = Machine::create(0);
    let started = |update: &cpr_core::Update| {
        let rendezvous = update.control().rendezvous();
        rendezvous.progress() > 3 && rendezvous.target_phase() == TargetPhase::Building
    };
    match machine.update_until(to(&target.socket), started).unwrap() {
        Outcome::Failed { error: UpdateError::Cancelled, guest: Ok(()) } => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(target.exit_code(), Some(1));
    machine.beat();
}

fn a_target_is_asked_first() {
    let mut target = Target::start("asked");
    let mut machine = Machine::create(1);
    machine.asks = true;
    assert!(is_handed_over(&machine.update(to(&target.socket)).unwrap()));
    assert_eq!(target.exit_code(), Some(0));
}

fn a_target_that_refuses_beforehand_waits_on() {
    for (role, reason) in [
        (
            "asked-other",
            "preflight: the new program refuses: no component of this program claims state section 'machine'",
        ),
        ("good", "preflight: the new program refuses: this program cannot say whether it could take over"),
    ] {
        let mut target = Target::start(role);
        let mut machine = Machine::create(1);
        machine.asks = true;
        fails(&mut machine, &target.socket, reason);
        // It was given nothing, and takes the machine of a source that does not ask.
        machine.asks = false;
        assert!(is_handed_over(&machine.update(to(&target.socket)).unwrap()));
        assert_eq!(target.exit_code(), Some(0));
    }
}

fn peers_that_give_no_verdict() {
    let mut machine = Machine::create(0);
    machine.asks = true;
    let with = |machine: &mut Machine, answer: fn(&UnixStream), reason: &str| {
        let (path, _folder, thread) = answering(answer);
        fails(machine, &path, reason);
        thread.join().unwrap();
    };
    let hello: fn(&UnixStream) = |peer| say(peer, b"HELO", VERSION, &[PidFd::of_self().unwrap().as_fd()]);
    with(&mut machine, hello, "preflight: the target gave no verdict within 1s");
    with(
        &mut machine,
        |peer| {
            say(peer, b"HELO", VERSION, &[PidFd::of_self().unwrap().as_fd()]);
            let null = std::fs::File::open("/dev/null").unwrap();
            say(peer, b"VERD", 0, &[null.as_fd()]);
        },
        "the peer speaks another protocol",
    );
    with(
        &mut machine,
        |peer| {
            say(peer, b"HELO", VERSION, &[PidFd::of_self().unwrap().as_fd()]);
            let empty = oslib::memfd::Memfd::new("empty").create().unwrap();
            say(peer, b"VERD", 0, &[empty.as_fd()]);
        },
        "preflight: the target gave a verdict that cannot be used: the state frame is truncated",
    );
    with(
        &mut machine,
        |peer| {
            say(peer, b"HELO", VERSION, &[PidFd::of_self().unwrap().as_fd()]);
            say(peer, b"NOPE", 0, &[]);
        },
        "could not prepare",
    );
}

fn peers_that_are_no_targets() {
    let mut machine = Machine::create(0);
    let with = |machine: &mut Machine, answer: fn(&UnixStream), reason: &str| {
        let (path, _folder, thread) = answering(answer);
        fails(machine, &path, reason);
        thread.join().unwrap();
    };
    with(&mut machine, |_| {}, "said nothing for 1s");
    with(&mut machine, garbage, "the peer speaks another protocol");
    with(
        &mut machine,
        |peer| say(peer, b"HELO", VERSION - 1, &[]),
        "speaks version 1 of the protocol, this program version 2",
    );
    with(&mut machine, |peer| say(peer, b"HELO", VERSION, &[]), "0 descriptors in place of 1");
    with(
        &mut machine,
        |peer| say(peer, b"HELO", VERSION, &[peer.as_fd()]),
        "the peer speaks another protocol",
    );
    with(&mut machine, |peer| say(peer, b"WHAT", 1, &[]), "the peer speaks another protocol");
    with(&mut machine, |peer| peer.shutdown(std::net::Shutdown::Both).unwrap(), "closed the connection");
    // Half a message, and no more.
    with(&mut machine, |mut peer| drop(std::io::Write::write_all(&mut peer, b"CPRS")), "cannot receive");
}

/// It could not read the introduction, and waits for another source.
fn a_target_that_has_nothing_is_left_alone() {
    let mut target = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let process = PidFd::open(target.id()).unwrap();
    let (path, _folder, thread) = answering(move |peer| {
        say(peer, b"HELO", VERSION, &[process.as_fd()]);
        say(peer, b"NOPE", u32::from_le_bytes(*b"what"), &[]);
    });
    fails(&mut Machine::create(0), &path, "the target refuses: what");
    thread.join().unwrap();
    assert_eq!(target.try_wait().unwrap(), None, "it was ended");
    target.kill().unwrap();
    target.wait().unwrap();
}

fn peers_that_are_no_sources() {
    let mut target = Target::start("good");
    let connect = || UnixStream::connect(&target.socket).unwrap();
    let told = |mut stream: UnixStream, reason: &str| {
        let said = refusal(&mut stream);
        assert!(said.contains(reason), "{said:?}, not {reason}");
    };
    drop(connect());
    let stream = connect();
    garbage(&stream);
    told(stream, "another protocol");
    let stream = connect();
    say(&stream, b"HELO", VERSION - 1, &[]);
    told(stream, "speaks version 1 of the protocol, this program version 2");
    told(connect(), "said nothing for 2s");
    let stream = connect();
    say(&stream, b"INTR", 0, &[]);
    told(stream, "0 descriptors in place of 5");
    // Lists that do not agree with what comes, after a good beginning.
    let null = std::fs::File::open("/dev/null").unwrap();
    let foreign = "the peer speaks another protocol";
    for (announced, sent, reason) in
        [(3, 7, "7 descriptors in place of 8"), (1, 7, "7 descriptors in place of 6"), (0, 5, foreign)]
    {
        let stream = connect();
        say(&stream, b"HELO", VERSION, &[]);
        say(&stream, b"INTR", announced, &vec![null.as_fd(); sent]);
        told(stream, reason);
    }
    // A frame that a reader would wait for until somebody writes to it.
    let silent = EventFd::blocking().unwrap();
    let stream = connect();
    say(&stream, b"HELO", VERSION, &[]);
    say(&stream, b"INTR", 0, &[silent.as_fd(); 5]);
    told(stream, foreign);
    // Gone after the greeting.
    let stream = connect();
    say(&stream, b"HELO", VERSION, &[]);
    drop(stream);
    // While one is served there is no other.
    let first = connect();
    say(&first, b"HELO", VERSION, &[]);
    told(connect(), "another source is connected already");
    drop(first);
    // None of this keeps the right one out.
    let mut machine = Machine::create(2);
    assert!(is_handed_over(&machine.update(to(&target.socket)).unwrap()));
    assert_eq!(target.exit_code(), Some(0));
}

fn paths() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cpr");
    let refused = |path: &Path| {
        let error = Machine::create(0).update(to(path)).unwrap_err();
        error.to_string()
    };
    assert!(refused(&path).contains("start the target first"), "{}", refused(&path));
    assert!(refused(folder.path()).contains("is no socket"));
    // A path that a dead process left is nobody's, and a living listener's is not taken.
    drop(UnixListener::bind(&path).unwrap());
    fails(&mut Machine::create(0), &path, "nobody listens at");
    let listener = Listener::bind(&path).unwrap();
    assert!(matches!(Listener::bind(&path), Err(ListenError::Bind(_))));
    drop(listener);
    assert!(!path.exists());
    let null = std::fs::File::open("/dev/null").unwrap();
    assert!(matches!(Listener::from_fd(null.into()), Err(ListenError::NotListening)));
    let listener = UnixListener::bind(&path).unwrap();
    let mut listener = Listener::from_fd(listener.into()).unwrap();
    assert!(matches!(listener.receive(Duration::from_millis(1)), Err(ListenError::Late(_))));
    drop(listener);
    assert!(path.exists(), "somebody else made it");
    // One that was killed.
    let mut target = Target::start("good");
    target.kill();
    target.exit_code();
    fails(&mut Machine::create(0), &target.socket, "nobody listens at");
}

fn users() {
    if oslib::process::effective_uid() != 0 {
        eprintln!("SKIPPED users: only root can act as somebody else");
        return;
    }
    let mut target = Target::start("good");
    assert_eq!(stranger(&target.socket), Some(0));
    let other = Target::start("listening-stranger");
    let mut machine = Machine::create(0);
    fails(&mut machine, &other.socket, &format!("belongs to user {NOBODY}"));
    assert!(is_handed_over(&machine.update(to(&target.socket)).unwrap()));
    assert_eq!(target.exit_code(), Some(0));
}
