//! The preflight by a program that is to be executed: with ones that answer, which this test is itself, and with ones that
//! have never heard of it. Nothing is executed in this process, and nothing is left of any child.
//!
//! It has no harness: what is asked must have one thread.

use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter};
use cpr_core::preflight::{Manifest, Policy};
use cpr_core::{
    FdKind, FdPolicy, GuestActivity, Host, MemoryRegion, ModeInfo, Outcome, Services, Step, TerminalAction,
    Update,
};
use cpr_exec::{CprExec, MainChannel, PREFLIGHT_VARIABLE};

type Case = (&'static str, fn());

const CASES: [Case; 8] = [
    ("a_program_that_fits_is_accepted", a_program_that_fits_is_accepted),
    ("a_refusal_names_the_section", a_refusal_names_the_section),
    ("who_gives_no_verdict_refuses", who_gives_no_verdict_refuses),
    ("who_hangs_is_ended", who_hangs_is_ended),
    ("a_verdict_of_somebody_else_is_none", a_verdict_of_somebody_else_is_none),
    ("a_program_that_was_changed_since_is_not_executed", a_program_that_was_changed_since_is_not_executed),
    ("a_user_can_cancel_meanwhile", a_user_can_cancel_meanwhile),
    ("who_is_asked_and_does_not_know_it_exits", who_is_asked_and_does_not_know_it_exits),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(role) = arguments.iter().find_map(|argument| argument.strip_prefix("role=")) {
        return answer(role);
    }
    // The little of the standard harness's command line that tools use.
    if arguments.iter().any(|argument| argument == "--list") {
        let ignored_only = arguments.iter().any(|argument| argument == "--ignored");
        CASES.iter().filter(|_| !ignored_only).for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let filters: Vec<_> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    for (name, case) in CASES {
        if filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str())) {
            case();
            let me = std::process::id();
            let children = fs::read_to_string(format!("/proc/{me}/task/{me}/children")).unwrap();
            assert_eq!(children, "", "{name} left a child");
            println!("test {name} ... ok");
        }
    }
    ExitCode::SUCCESS
}

/// What the program does that is asked.
fn answer(role: &str) -> ExitCode {
    let numbers = std::env::var(PREFLIGHT_VARIABLE).unwrap_or_default();
    if role == "ignorant" {
        return match cpr_exec::receive() {
            Ok(_) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    let request = cpr_exec::preflight_request().unwrap().expect("it is asked");
    let input = std::io::read_to_string(std::io::stdin()).unwrap();
    assert_eq!(input, "", "standard input is empty");
    let open = fs::read_dir("/proc/self/fd").unwrap().map(|entry| fs::read_link(entry.unwrap().path()));
    let open: Vec<_> = open.flatten().map(|target| target.display().to_string()).collect();
    assert!(!open.iter().any(|target| target.contains("guests-own")), "{open:?}");
    assert_eq!(std::env::var_os(PREFLIGHT_VARIABLE), None);
    assert_eq!(request.main(), &MainChannel::Memfd);
    let catalogue = cpr_exec::catalogue().claims("guest", 0);
    let catalogue = if role == "other" { catalogue } else { catalogue.requires("idle", 1..=2) };
    match role {
        "garbage" => {
            let verdict = numbers.split_once(',').unwrap().1;
            let file = fs::OpenOptions::new().write(true).open(format!("/proc/self/fd/{verdict}"));
            std::io::Write::write_all(&mut file.unwrap(), &[b'x'; 4096]).unwrap();
        }
        "mute" => {}
        "panics" => panic!("out of order"),
        _ => {
            let verdict = catalogue.judge(request.manifest(), []);
            request.answer(&verdict).unwrap();
        }
    }
    ExitCode::SUCCESS
}

#[derive(Default)]
struct Idle {
    slot: Option<TerminalAction>,
}

impl Host for Idle {
    fn memory(&self) -> Vec<MemoryRegion> {
        Vec::new()
    }

    fn manifest(&self, _: &ModeInfo) -> Option<Manifest> {
        Some(Manifest::default().section("idle", 0, 2..=3))
    }

    fn stop(&mut self, _: Instant) -> Result<GuestActivity, BoxError> {
        Ok(GuestActivity::Paused)
    }

    fn resume(&mut self, _: GuestActivity) -> Result<(), BoxError> {
        Ok(())
    }

    fn save(&mut self, main: &mut FrameWriter) -> Result<(), BoxError> {
        Ok(main.put("idle", 0, 2, Vec::new())?)
    }

    fn load(&mut self, _: &mut Frame) -> Result<(), BoxError> {
        Err("nothing is loaded here".into())
    }

    fn request_terminal(&mut self, action: TerminalAction) {
        self.slot = Some(action);
    }
}

fn me(role: &str) -> Vec<String> {
    vec![std::env::current_exe().unwrap().display().to_string(), format!("role={role}")]
}

fn sh(script: &str) -> Vec<String> {
    ["sh", "-c", script].map(String::from).to_vec()
}

fn begin(services: &Services, host: &Idle, command: &[String], limit: Duration) -> Update {
    let command = command.iter().map(Into::into).collect();
    let mode = CprExec::new(command, MainChannel::Memfd).time_limits(Some(limit), None);
    Update::begin(services, Box::new(mode), host).unwrap()
}

/// Steps on until something else than waiting is to be done.
fn run(update: &mut Update, host: &mut Idle) -> Step {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        match update.step(host) {
            Step::Again => {}
            Step::Wait(wait) => {
                assert!(Instant::now() < end, "it does not end");
                let limit = wait.deadline.unwrap().saturating_duration_since(Instant::now());
                oslib::stream::wait_readable_for(&wait.fds[0], limit).unwrap();
            }
            other => return other,
        }
    }
}

/// The longest that a program may take which is to be heard out.
const PATIENCE: Duration = Duration::from_secs(50);

/// Asks a program that must refuse, for the reason.
fn refusal(command: &[String], limit: Duration) -> String {
    let (services, mut host) = (Services::default(), Idle::default());
    let guest = std::sync::Arc::new(oslib::memfd::Memfd::new("guests-own").create().unwrap());
    services.registry.save("guest", 0, FdKind::Memfd, FdPolicy::MustSurvive, &guest).unwrap();
    let mut update = begin(&services, &host, command, limit);
    match run(&mut update, &mut host) {
        Step::Finished(Outcome::Failed { error, guest: Ok(()) }) => {
            assert!(!update.has_stopped_guest() && host.slot.is_none());
            assert_eq!(services.registry.entries().len(), 1, "nothing was registered");
            let text = error.to_string();
            text.strip_prefix("cpr-exec preflight: ").unwrap_or_else(|| panic!("{text}")).to_owned()
        }
        other => panic!("{command:?}: {other:?}"),
    }
}

fn a_program_that_fits_is_accepted() {
    let (services, mut host) = (Services::default(), Idle::default());
    let guest = std::sync::Arc::new(oslib::memfd::Memfd::new("guests-own").create().unwrap());
    services.registry.save("guest", 0, FdKind::Memfd, FdPolicy::MustSurvive, &guest).unwrap();
    let mut update = begin(&services, &host, &me("fits"), PATIENCE);
    assert!(matches!(run(&mut update, &mut host), Step::Terminal));
    let reads = update.reads().unwrap();
    assert_eq!(reads.get("idle"), Some(1..=2));
    assert_eq!(reads.get("cpr-exec/process"), Some(1..=1));
    update.cancel(&mut host);
}

fn a_refusal_names_the_section() {
    let reason = refusal(&me("other"), PATIENCE);
    assert_eq!(
        reason,
        "the new program refuses: no component of this program claims state section 'idle' (version 3); use a program \
         that has it"
    );
}

fn who_gives_no_verdict_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let garbage = folder.path().join("garbage");
    fs::write(&garbage, "\x7fnothing that a kernel executes").unwrap();
    fs::set_permissions(&garbage, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let garbage = garbage.display().to_string();
    let cannot = format!("cannot execute '{garbage}': Exec format error");
    for (command, expected) in [
        (vec!["true".to_owned()], "the new program gave no verdict and exited with code 0"),
        (sh("echo no such machine >&2; exit 3"), "gave no verdict and exited with code 3: no such machine"),
        (sh("echo on standard output"), "gave no verdict and exited with code 0: on standard output"),
        (sh("kill -SEGV $$"), "gave no verdict and was killed by signal 11"),
        (me("mute"), "gave no verdict and exited with code 0"),
        (me("panics"), "out of order"),
        (me("garbage"), "gave a verdict that cannot be used: not a CPR state frame"),
        (vec![garbage], &cannot),
    ] {
        let reason = refusal(&command, PATIENCE);
        assert!(reason.contains(expected), "{command:?}: {reason}");
    }
}

fn who_hangs_is_ended() {
    let limit = Duration::from_millis(300);
    let reason = refusal(&sh("echo waiting for a client; sleep 1000"), limit);
    assert_eq!(reason, "the new program gave no verdict within 300ms: waiting for a client");
    // Not even one that says a lot takes much memory.
    let reason = refusal(&sh("while :; do echo nonsense; done 2> /dev/null"), limit);
    assert!(reason.contains("nonsense") && reason.len() < 4096, "{reason}");
}

fn a_verdict_of_somebody_else_is_none() {
    let wrapper = [sh("\"$@\"; exit 0"), vec!["sh".into()], me("fits")].concat();
    let reason = refusal(&wrapper, PATIENCE);
    assert!(
        reason.contains("comes from process") && reason.contains("a wrapper has to end in executing"),
        "{reason}"
    );
}

fn a_program_that_was_changed_since_is_not_executed() {
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join("program");
    for policy in [Policy::Require, Policy::Off] {
        fs::copy(std::env::current_exe().unwrap(), &own).unwrap();
        let (services, mut host) = (Services::default(), Idle::default());
        let mut command = me("fits");
        command[0] = own.display().to_string();
        let mut update = begin(&services, &host, &command, PATIENCE);
        update.set_preflight(policy);
        assert!(matches!(run(&mut update, &mut host), Step::Terminal));
        let other = folder.path().join("other");
        // What cannot be executed, should it be tried.
        fs::write(&other, "").unwrap();
        fs::rename(&other, &own).unwrap();
        let error = host.slot.take().unwrap()().unwrap_err();
        let is_named = error.to_string().contains("was changed since it was asked");
        assert_eq!(is_named, policy == Policy::Require, "{policy:?}: {error}");
        let end = update.terminal_returned(&mut host, Err(error));
        assert!(matches!(end, Step::Finished(Outcome::Failed { guest: Ok(()), .. })), "{end:?}");
        assert_eq!(services.registry.entries(), []);
    }
}

fn a_user_can_cancel_meanwhile() {
    let (services, mut host) = (Services::default(), Idle::default());
    let mut update = begin(&services, &host, &sh("sleep 1000"), PATIENCE);
    loop {
        match update.step(&mut host) {
            Step::Again => {}
            Step::Wait(_) => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(update.cancel(&mut host), Outcome::Failed { guest: Ok(()), .. }));
}

fn who_is_asked_and_does_not_know_it_exits() {
    let reason = refusal(&me("ignorant"), PATIENCE);
    let expected =
        "environment variable CPR_VMM_PREFLIGHT is reserved for live updates and unknown to this version";
    assert!(reason.contains("exited with code 1") && reason.contains(expected), "{reason}");
}
