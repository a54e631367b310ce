//! What must hold for the mode, and the target's program.

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cpr_core::error::BoxError;
use cpr_core::{
    Event, GuestActivity, Incoming, MainSource, ModeSet, OrderClass, Outcome, Properties, Services,
    Subscription, UpdateError,
};
use oslib::pidfd::{Exit, PidFd};

use crate::machine::{Machine, RAM_LEN, ask};
use crate::mode::{ForkPipe, MODE, Receiver};

/// What a target does; absent in the process that starts the scenarios.
const ROLE: &str = "FORK_PIPE_TEST_ROLE";
const PATIENCE: Duration = Duration::from_secs(30);

const SCENARIOS: [(&str, fn()); 7] = [
    ("a_machine_moves_into_its_child_and_on", a_machine_moves_into_its_child_and_on),
    ("a_paused_machine_stays_paused", a_paused_machine_stays_paused),
    ("a_target_that_refuses_is_rolled_back", || {
        rolled_back("refuse", "could not hand over: the state could not")
    }),
    ("a_target_that_dies_is_rolled_back", || rolled_back("die", "the target ended before it was running")),
    ("a_target_that_hangs_is_ended_and_rolled_back", || rolled_back("hang", "in time")),
    ("a_target_that_never_starts_is_rolled_back", || {
        rolled_back("exit", "could not prepare: the target ended")
    }),
    (
        "blockers_and_subscribers_know_it_by_its_properties",
        blockers_and_subscribers_know_it_by_its_properties,
    ),
];

pub(crate) fn main() -> ExitCode {
    if let Ok(role) = std::env::var(ROLE) {
        return match target(&role) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
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
            // One that fails panics, and so ends the program.
            scenario();
            println!("test {name} ... ok");
        }
    }
    ExitCode::SUCCESS
}

fn mode(role: &str) -> Box<ForkPipe> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(ROLE, role);
    let patience = if role == "hang" { Duration::from_millis(500) } else { PATIENCE };
    Box::new(ForkPipe::new(command, patience))
}

/// The target's program.
fn target(role: &str) -> Result<(), BoxError> {
    if role == "exit" {
        return Ok(());
    }
    let mut receiver = Receiver::connect()?;
    let mut services = Services::default();
    let mut incoming = Incoming::begin(&mut services, receiver.receive()?)?;
    match role {
        "die" => {
            // Else the source might notice while it still sends.
            receiver.read_main()?;
            std::process::abort()
        }
        "hang" => std::thread::sleep(PATIENCE * 2),
        // It takes the main frame for the state of a machine that it does not have.
        "refuse" => assert!(services.registry.delete("ram", 0)),
        _ => {}
    }
    let mut machine = Machine::new(&services);
    if let Err(error) = incoming.load(&mut machine, &mut receiver) {
        incoming.abandon();
        receiver.tell(&error.to_string())?;
        return Err(error.into());
    }
    incoming.commit(&mut machine)?;
    receiver.tell("running")?;
    drop((incoming, receiver));

    while machine.activity == GuestActivity::Running {
        match machine.serve()?.as_deref() {
            None => {}
            Some("update") => match machine.update(mode("run"))? {
                Outcome::HandedOver => break,
                Outcome::Failed { error, .. } => return Err(error.into()),
            },
            // The client has gone.
            Some(_) => break,
        }
    }
    Ok(())
}

/// A machine in this process, and its client's end.
fn machine() -> (Machine, UnixStream) {
    let (client, server) = UnixStream::pair().unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let services = Services { generation: 10, ..Services::default() };
    (Machine::create(&services, server).unwrap(), client)
}

fn who(client: &mut UnixStream) -> (u32, u64, u64) {
    let answer = ask(client, "who").unwrap();
    let numbers: Vec<u64> = answer.split(' ').map(|number| number.parse().unwrap()).collect();
    (numbers[0] as u32, numbers[1], numbers[2])
}

/// Asks a machine that this process itself runs.
fn ask_here(machine: &mut Machine, client: &mut UnixStream, command: &str) -> String {
    let mut there = client.try_clone().unwrap();
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| ask(&mut there, command).unwrap());
        assert_eq!(machine.serve().unwrap(), None);
        answer.join().unwrap()
    })
}

fn children() -> usize {
    let own = std::process::id();
    let path = format!("/proc/{own}/task/{own}/children");
    std::fs::read_to_string(path).unwrap().split_whitespace().count()
}

fn a_machine_moves_into_its_child_and_on() {
    let (mut machine, mut client) = machine();
    let ram = machine.ram().unwrap();
    ram.write_all_at(b"pattern", RAM_LEN - 7).unwrap();
    assert_eq!(ask_here(&mut machine, &mut client, "who"), format!("{} 10 0", std::process::id()));
    assert!(matches!(machine.update(mode("run")).unwrap(), Outcome::HandedOver));
    drop(machine);

    // The connection is the same and its other end is in the child; the state came along.
    let (first, generation, commands) = who(&mut client);
    assert_ne!(first, std::process::id());
    assert_eq!((generation, commands), (11, 1));
    // So is the memory: what the child writes stands here.
    assert_eq!(ask(&mut client, "poke").unwrap(), "16");
    let mut word = [0; 8];
    ram.read_exact_at(&mut word, 16).unwrap();
    assert_eq!(u64::from_ne_bytes(word), 2);

    // The child does it, too: to a child of its own, and ends.
    let process = PidFd::open(first).unwrap();
    std::io::Write::write_all(&mut client, b"update\n").unwrap();
    assert!(process.wait_exited(PATIENCE).unwrap());
    assert_eq!(process.reap().unwrap(), Exit::Exited(0));
    let (second, generation, commands) = who(&mut client);
    assert!(second != first && second != std::process::id());
    assert_eq!((generation, commands), (12, 3));
    let mut pattern = [0; 7];
    ram.read_exact_at(&mut pattern, RAM_LEN - 7).unwrap();
    assert_eq!(&pattern, b"pattern");

    // It ends with its client.
    let process = PidFd::open(second).unwrap();
    drop(client);
    assert!(process.wait_exited(PATIENCE).unwrap());
}

fn a_paused_machine_stays_paused() {
    let (mut machine, client) = machine();
    machine.activity = GuestActivity::Paused;
    let Outcome::HandedOver = machine.update(mode("run")).unwrap() else { panic!("it failed") };
    drop(machine);
    // A target that runs nothing ends at once, without having served anybody.
    let mut client = client;
    assert!(ask(&mut client, "who").is_err());
    let own = std::process::id();
    let left = std::fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap();
    for pid in left.split_whitespace() {
        assert_eq!(PidFd::open(pid.parse().unwrap()).unwrap().reap().unwrap(), Exit::Exited(0));
    }
}

type Log = Arc<Mutex<Vec<Event>>>;

fn subscribe(services: &Services, modes: ModeSet) -> (Log, Subscription) {
    let log = Log::default();
    let theirs = log.clone();
    let subscription = services.notifier.subscribe("disk0", modes, OrderClass::NORMAL, move |notice| {
        assert_eq!(notice.mode.id, MODE);
        theirs.lock().unwrap().push(notice.event);
        Ok(())
    });
    (log, subscription)
}

fn rolled_back(role: &str, words: &str) {
    let (mut machine, mut client) = machine();
    let (log, _subscription) = subscribe(&machine.services, ModeSet::all());
    ask_here(&mut machine, &mut client, "poke");
    let fds = oslib::process::open_fds().unwrap();
    for _ in 0..3 {
        match machine.update(mode(role)).unwrap() {
            Outcome::Failed { error, guest: Ok(()) } => {
                let error = error.to_string();
                assert!(error.starts_with("fork-pipe ") && error.contains(words), "{error}");
            }
            other => panic!("{other:?}"),
        }
        // The machine is here as before, and nothing of the target is left.
        assert_eq!(machine.activity, GuestActivity::Running);
        assert_eq!(log.lock().unwrap().drain(..).next_back(), Some(Event::RolledBack));
        assert_eq!(oslib::process::open_fds().unwrap(), fds);
        assert_eq!(children(), 0);
    }
    assert_eq!(ask_here(&mut machine, &mut client, "who"), format!("{} 10 1", std::process::id()));
    // And it can still go.
    assert!(matches!(machine.update(mode("run")).unwrap(), Outcome::HandedOver));
    drop(machine);
    let (pid, generation, commands) = who(&mut client);
    assert_eq!((generation, commands), (11, 2));
    let process = PidFd::open(pid).unwrap();
    drop(client);
    assert_eq!(process.reap().unwrap(), Exit::Exited(0));
}

fn blockers_and_subscribers_know_it_by_its_properties() {
    let (mut machine, _client) = machine();
    let services = machine.services.clone();
    let other_process = ModeSet::none().or_having(Properties::RAM_IN_PLACE, Properties::SAME_PID);
    let (told, _one) = subscribe(&services, other_process.clone());
    let (not_told, _two) = subscribe(&services, ModeSet::having(Properties::SAME_PID).or_id("cpr-exec"));
    let blocker = services.blockers.add(other_process, "disk0 is locked by this process");
    match machine.update(mode("exit")).unwrap_err().downcast_ref() {
        Some(error @ UpdateError::Blocked { .. }) => {
            assert_eq!(error.to_string(), "fork-pipe is blocked: disk0 is locked by this process");
        }
        other => panic!("{other:?}"),
    }
    assert!(told.lock().unwrap().is_empty());
    drop(blocker);
    assert!(matches!(machine.update(mode("exit")).unwrap(), Outcome::Failed { .. }));
    assert_eq!(*told.lock().unwrap(), [Event::Prepare, Event::RolledBack]);
    assert!(not_told.lock().unwrap().is_empty());

    // The memory rule as well.
    services.registry.delete("ram", 0);
    let error = machine.update(mode("run")).unwrap_err().to_string();
    assert_eq!(error, "fork-pipe is blocked: Memory region ram has no registered descriptor.");
}
