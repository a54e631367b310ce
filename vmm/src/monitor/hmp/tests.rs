use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::monitor::testing::{Machine, persisted};
use crate::monitor::{Channel, Channels, Command, SocketAddress};

/// What a session prints for input, without banner and first prompt.
fn printed(input: &str, machine: &mut Machine) -> String {
    let mut session = Session::new("hmp0");
    session.consume_output(session.output().len());
    session.feed(input.as_bytes(), vec![]);
    session.process(machine);
    String::from_utf8(session.output().to_vec()).unwrap()
}

/// What one command prints, with plain line ends.
fn answer(line: &str, machine: &mut Machine) -> String {
    let printed = printed(&format!("{line}\n"), machine);
    let text = printed.strip_prefix(&format!("{line}\r\n")).unwrap().strip_suffix(PROMPT).unwrap();
    text.replace("\r\n", "\n")
}

#[test]
fn golden_transcript() {
    let mut machine = Machine::default();
    let mut session = Session::new("hmp0");
    let lines = [
        "info status",
        "migrate_set_parameter mode cpr-exec",
        "migrate_set_parameter cpr-exec-command cpr-vmm -name 'a b' -incoming file:vm.state",
        "info migrate_parameters",
        "migrate -d file:vm.state",
    ];
    for line in lines {
        session.feed(format!("{line}\n").as_bytes(), vec![]);
        session.process(&mut machine);
    }
    let mut seen = String::from_utf8(session.output().to_vec()).unwrap();
    session.consume_output(seen.len());
    let mut session = Session::restore(persisted(&session.save()), vec![]);
    session.feed(b"info status\n", vec![]);
    session.process(&mut machine);
    seen += std::str::from_utf8(session.output()).unwrap();
    let package = crate::monitor::PACKAGE;
    assert_eq!(
        seen.replace("\r\n", "\n"),
        format!(
            "{package} monitor - type 'help' for more information\n\
             (qemu) info status\n\
             VM status: running\n\
             (qemu) migrate_set_parameter mode cpr-exec\n\
             (qemu) migrate_set_parameter cpr-exec-command cpr-vmm -name 'a b' -incoming file:vm.state\n\
             (qemu) info migrate_parameters\n\
             mode: cpr-exec\n\
             cpr-exec-command: cpr-vmm -name 'a b' -incoming file:vm.state\n\
             (qemu) migrate -d file:vm.state\n\
             (qemu) {package} monitor - type 'help' for more information\n\
             (qemu) info status\n\
             VM status: running\n\
             (qemu) "
        )
    );
    let command: Vec<String> =
        ["cpr-vmm", "-name", "a b", "-incoming", "file:vm.state"].map(String::from).into();
    assert_eq!(machine.parameters.cpr_exec_command, Some(command));
    let main = Channel::File { path: "vm.state".into(), offset: 0 };
    let channels = Channels { main, cpr: None };
    assert!(machine.commands.contains(&Command::Migrate { channels, detach: true }));
}

#[test]
fn each_command_is_its_qmp_command() {
    for (line, command) in [
        ("stop", Command::Stop),
        ("s", Command::Stop),
        ("cont", Command::Cont),
        ("c", Command::Cont),
        ("system_reset", Command::SystemReset),
        ("migrate_cancel", Command::MigrateCancel),
        ("migrate_incoming memfd:", Command::MigrateIncoming { channel: Channel::Memfd }),
        (
            "migrate -d \"memfd:\"",
            Command::Migrate { channels: Channels { main: Channel::Memfd, cpr: None }, detach: true },
        ),
        (
            "migrate -d unix:m cpr=unix:c,d",
            Command::Migrate {
                channels: Channels {
                    main: Channel::Unix { path: "m".into() },
                    cpr: Some(SocketAddress::Unix("c,d".into())),
                },
                detach: true,
            },
        ),
        ("closefd tap", Command::CloseFd { name: "tap".into() }),
    ] {
        let mut machine = Machine::default();
        assert_eq!(answer(line, &mut machine), "", "{line}");
        assert_eq!(machine.commands, [command], "{line}");
    }
    for line in ["quit", "q"] {
        let mut machine = Machine::default();
        // No prompt, and no answer to what follows.
        assert_eq!(printed(&format!("{line}\ninfo status\n"), &mut machine), format!("{line}\r\n"));
        assert_eq!(machine.commands, [Command::Quit]);
    }
    let mut machine = Machine::default();
    assert_eq!(answer("migrate_set_capability events on", &mut machine), "");
    assert!(matches!(&machine.commands[..], [Command::MigrateSetCapabilities(list)] if list[0].state));
}

#[test]
fn info_in_qemus_words() {
    let mut machine = Machine::default();
    for (line, expected) in [
        ("info kvm", "kvm support: enabled\n"),
        ("info name", "guest\n"),
        ("info uuid", "00000000-0000-0000-0000-000000000000\n"),
        ("info cpus", "* CPU #0: thread_id=11\n  CPU #1: thread_id=12\n"),
        ("info chardev", "serial0: filename=null\n"),
        (
            "info memdev",
            "memory backend: ram0\n  size:  1073741824\n  merge: false\n  dump: true\n  prealloc: false\n  \
             share: true\n  policy: default\n  host nodes: \n\n",
        ),
        (
            "info block",
            "d0: /images/a (raw, read-only)\n    Attached to:      disk0\n    Cache mode:       writeback, ignore \
             flushes\n",
        ),
        (
            "info network",
            "nic: model=virtio-net-pci,macaddr=52:54:00:12:34:56,queues=2\n \\ n0: type=tap,ifname=t0\n",
        ),
        (
            "info pci",
            "  Bus  0, device  18, function 0:\n    virtio-blk-pci: PCI device 1af4:1042\n      id \"disk0\"\n",
        ),
        ("info migrate_capabilities", "events: off\n"),
        ("info migrate_parameters", "mode: normal\ncpr-exec-command:\n"),
        ("info migrate", "Status: \t\tnone\n"),
        ("info blah", "unknown command: 'info blah'\n"),
    ] {
        assert_eq!(answer(line, &mut machine), expected, "{line}");
    }
    assert!(answer("info version", &mut machine).starts_with(env!("CARGO_PKG_VERSION")));
    for (status, expected) in [
        ("paused", "VM status: paused\n"),
        ("inmigrate", "VM status: paused (inmigrate)\n"),
        ("postmigrate", "VM status: paused (postmigrate)\n"),
    ] {
        machine.status = status;
        assert_eq!(answer("info status", &mut machine), expected);
    }
}

#[test]
fn info_migrate_tells_the_blackout() {
    let mut machine = Machine {
        migration: json!({
            "status": "completed", "total-time": 9, "setup-time": 1, "downtime": 3,
            "cpr": {"mode": "cpr-exec", "generation": 2, "blackout-us": 2911,
                    "phases": [{"name": "stop", "us": 120}, {"name": "hand over", "us": 950}]},
        }),
        ..Machine::default()
    };
    assert_eq!(
        answer("info migrate", &mut machine),
        "Status: \t\tcompleted\n\
         Time (ms): \t\ttotal=9, setup=1, down=3\n\
         CPR: \t\t\tmode=cpr-exec, generation=2\n\
         Blackout (us): \t\t2911\n  \
           stop:                      120\n  \
           hand over:                 950\n"
    );
    machine.migration = json!({"status": "failed", "error-desc": "why", "blocked-reasons": ["private RAM"]});
    assert_eq!(
        answer("info migrate", &mut machine),
        "Outgoing migration blocked:\n  private RAM\nStatus: \t\tfailed (why)\n"
    );
}

#[test]
fn mistakes_are_named() {
    let mut machine = Machine::default();
    for (line, needle) in [
        ("foo bar", "unknown command: 'foo'\n"),
        ("migrate", "migrate: string expected\nTry \"help migrate\""),
        ("migrate -x memfd:", "migrate: unsupported option -x"),
        ("migrate - memfd:", "migrate: unsupported option -"),
        ("migrate tcp:h:1", "Error: unknown migration protocol: 'tcp'"),
        ("migrate a b c", "extraneous characters"),
        ("migrate \"file:x", "unterminated string"),
        ("stop now", "stop: extraneous characters"),
        ("migrate_set_parameter mode", "string expected"),
        ("migrate_set_parameter mode warp", "Error: Parameter 'mode' does not accept value 'warp'"),
        (
            "migrate_set_parameter speed 3",
            "unknown migration parameter 'speed' (known: mode, cpr-exec-command, cpr-exec-timeout, \
             cpr-defer-timeout, cpr-preflight, x-cpr-exec-keeper)",
        ),
        ("migrate_set_parameter cpr-exec-command a 'b", "Error: cpr-exec-command: a quotation mark"),
        ("migrate_set_capability warp on", "'warp' (known: events, x-ignore-shared)"),
        ("migrate_set_parameter x-cpr-exec-keeper maybe", "not 'maybe'"),
        ("migrate_set_parameter cpr-exec-timeout soon", "a number of milliseconds, not 'soon'"),
        ("migrate_set_capability events maybe", "not 'maybe'"),
        ("getfd 1x", "Error: Parameter 'fdname'"),
        ("getfd x", "Error: No file descriptor"),
        ("help foo", "unknown command: 'foo'"),
    ] {
        let text = answer(line, &mut machine);
        assert!(text.contains(needle), "{line}: {text}");
    }
    assert!(machine.parameters.mode.is_none());
}

#[test]
fn help_lists_the_table() {
    let mut machine = Machine::default();
    let help = answer("help", &mut machine);
    assert_eq!(help.lines().count(), commands::COMMANDS.len());
    for command in commands::COMMANDS {
        assert!(help.contains(&format!("{} ", command.names.join("|"))));
        assert_eq!(
            answer(&format!("help {}", command.names[0]), &mut machine).lines().count() > 1,
            command.names[0] == "info"
        );
    }
    let topics = answer("info", &mut machine);
    assert_eq!(topics, answer("help info", &mut machine));
    assert_eq!(topics.lines().count(), commands::TOPICS.len() + 1);
    assert_eq!(answer("?", &mut machine), help);
}

#[test]
fn completion() {
    let mut machine = Machine::default();
    for (typed, expected) in [
        ("inf\t", "info "),
        ("info st\t", "info status "),
        ("migrate_set_p\tmo\tcpr-e\t", "migrate_set_parameter mode cpr-exec "),
        ("migrate_set_parameter x\tof\t", "migrate_set_parameter x-cpr-exec-keeper off "),
        ("migrate_set_capability e\tof\t", "migrate_set_capability events off "),
        ("migrate -d f\t", "migrate -d file:"),
        ("help qu\t", "help quit "),
        ("foo \t", "foo "),
        ("zzz\t", "zzz"),
    ] {
        assert_eq!(printed(typed, &mut machine), expected, "{typed:?}");
    }
    assert_eq!(
        printed("migrate_s\t\t", &mut machine),
        "migrate_set_\r\nmigrate_set_capability  migrate_set_parameter\r\n(qemu) migrate_set_\
         \r\nmigrate_set_capability  migrate_set_parameter\r\n(qemu) migrate_set_"
    );
}

#[test]
fn a_waiting_migrate_holds_the_prompt_and_the_input() {
    let mut machine = Machine::default();
    let mut session = Session::new("hmp0");
    session.feed(b"migrate memfd:\ninfo status\n", vec![]);
    session.process(&mut machine);
    assert!(session.is_waiting() && !session.wants_input());
    assert!(session.output().ends_with(b"(qemu) migrate memfd:\r\n"));
    session.consume_output(usize::MAX);
    let state = persisted(&session.save());
    let text =
        |session: &Session| String::from_utf8(session.output().to_vec()).unwrap().replace("\r\n", "\n");

    session.resume(Err(QmpError::generic("no such program")));
    session.process(&mut machine);
    assert_eq!(text(&session), "Error: no such program\n(qemu) info status\nVM status: running\n(qemu) ");

    let mut session = Session::restore(state, vec![]);
    session.process(&mut machine);
    assert_eq!(text(&session), banner());
    session.resume(Ok(json!({})));
    session.process(&mut machine);
    assert_eq!(text(&session), format!("{}(qemu) info status\nVM status: running\n(qemu) ", banner()));
    assert!(session.wants_input());
}

#[test]
fn output_that_nobody_takes_holds_the_input() {
    // One byte of input that draws a whole line, as often as one read brings it.
    let mut machine = Machine::default();
    let mut session = Session::new("hmp0");
    let line = super::super::editor::MAX_LINE_BYTES;
    session.feed(&vec![b'x'; line], vec![]);
    session.feed(&[0x0c; 200], vec![]);
    session.feed(b"\x15stop\r", vec![]);
    let mut drawn = 0;
    loop {
        session.process(&mut machine);
        let output = session.output().len();
        assert!(output < OUTPUT_HIGH_WATER + 2 * line, "{output}");
        drawn += output;
        session.consume_output(output);
        if session.wants_input() {
            break;
        }
    }
    assert!(drawn > 200 * line);
    assert_eq!(machine.commands, [Command::Stop]);
}

#[test]
fn a_half_typed_line_comes_back() {
    let mut session = Session::new("hmp0");
    session.feed(b"stop\ninfo sta\x02", vec![]);
    session.process(&mut Machine::default());
    session.consume_output(session.output().len() - 1);
    let mut session = Session::restore(persisted(&session.save()), vec![]);
    let seen = String::from_utf8(session.output().to_vec()).unwrap();
    // The last byte that was not delivered, then a fresh start below the old line.
    assert_eq!(seen, format!("D\r\n{}(qemu) info sta\x1b[D", banner().replace('\n', "\r\n")));
    session.consume_output(seen.len());
    let mut machine = Machine::default();
    session.feed(b"\x05tus\n\x10\x10\n", vec![]);
    session.process(&mut machine);
    assert_eq!(machine.commands, [Command::QueryStatus, Command::Stop]);
}

#[test]
fn a_muxed_session_keeps_quiet_until_it_has_the_terminal() {
    let mut session = Session::new_muxed("hmp0");
    assert!(session.output().is_empty());
    session.activate();
    session.activate();
    session.feed(b"ab", vec![]);
    session.process(&mut Machine::default());
    session.deactivate();
    let seen = String::from_utf8(session.output().to_vec()).unwrap();
    assert_eq!(seen, format!("{}(qemu) ab\r\n", banner().replace('\n', "\r\n")));
    session.consume_output(seen.len());
    session.activate();
    assert_eq!(session.output(), b"(qemu) ab");
    session.deactivate();
    session.consume_output(usize::MAX);
    let mut session = Session::restore(persisted(&session.save()), vec![]);
    assert!(session.output().is_empty());
    session.activate();
    assert!(session.output().ends_with(b"\r\n(qemu) ab"));
}

const TRANSCRIPT: &str = "info status\r\nmigrate_set_parameter mode cpr-exec\nfoé\x7f\x7fo\x1b[D\x1b[3~\n\
    migrate_s\tp\tcpr-exec-command 'a b'\n\x10\x10\r\nmigrate -d memfd:\nhelp";

/// Runs the transcript, saving at the given places; the machine and all that was printed except for banners and what
/// is drawn again after them.
fn transcript(step: usize, save: impl Fn(usize) -> bool) -> (Machine, Vec<u8>) {
    let mut machine = Machine::default();
    let mut session = Session::new("hmp0");
    let mut seen = Vec::new();
    for (index, chunk) in TRANSCRIPT.as_bytes().chunks(step).enumerate() {
        session.feed(chunk, vec![]);
        session.process(&mut machine);
        seen.extend_from_slice(session.output());
        session.consume_output(usize::MAX);
        if save(index) {
            session = Session::restore(persisted(&session.save()), vec![]);
            session.consume_output(usize::MAX);
        }
    }
    (machine, seen)
}

#[test]
fn saving_at_every_byte_changes_nothing() {
    let (machine, whole) = transcript(usize::MAX, |_| false);
    assert_eq!(machine.parameters.cpr_exec_command, Some(vec!["a b".to_owned()]));
    for (step, every) in [(1, false), (1, true), (2, true), (3, true), (7, true)] {
        let (other, seen) = transcript(step, |_| every);
        assert_eq!(other.commands, machine.commands);
        assert_eq!(String::from_utf8_lossy(&seen), String::from_utf8_lossy(&whole));
    }
    for boundary in 0..TRANSCRIPT.len() {
        let (other, seen) = transcript(1, |index| index == boundary);
        assert_eq!(other.commands, machine.commands, "at {boundary}");
        assert_eq!(seen, whole, "at {boundary}");
    }
}

proptest! {
    #[test]
    fn any_input_is_survived(input: Vec<u8>, text in ".{0,60}") {
        let mut session = Session::new("hmp0");
        session.feed(&input, vec![]);
        session.feed(text.as_bytes(), vec![]);
        session.feed(b"\r", vec![]);
        session.process(&mut Machine::default());
        prop_assert!(session.wants_input() || session.is_waiting());
    }

    #[test]
    fn any_line_is_survived(line in "(info|migrate|help|migrate_set_parameter|getfd|) ?[-a-z\"'\\\\ :é\t]{0,30}") {
        let mut fds = VecDeque::new();
        let mut origin = Origin { monitor: "x", received_fds: &mut fds };
        run_detached(&line, &mut Machine::default(), &mut origin);
        complete::candidates(&line, &Machine::default());
    }

    #[test]
    fn any_state_is_survived(bytes: Vec<u8>) {
        if let Ok(state) = postcard::from_bytes::<SessionState>(&bytes) {
            Session::restore(state, vec![]).process(&mut Machine::default());
        }
    }
}
