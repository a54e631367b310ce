//! Sessions of the monitors, as bytes come in: at once or in pieces, with the program replaced between them or not.
//!
//! An input's first two bytes say how: the length of the pieces (0: at once), and a set of flags. The rest is what the
//! peer sends.

use vmm::monitor::{hmp, qmp};

use crate::backend::{Machine, ending, persisted};

/// The session is saved and restored after each piece.
const REPLACED: u8 = 1;
/// Commands that change something end later.
const SUSPENDS: u8 = 2;
/// The width of the terminal: the upper bits, as an index here.
const COLUMNS: [Option<u16>; 8] = [None, Some(80), Some(20), Some(8), Some(7), Some(2), Some(1), Some(0)];

/// A session stops before it has as much to say, whatever its peer sends, in bytes.
const OUTPUT_LIMIT: usize = 1 << 20;

/// How an input is sent.
struct Manner {
    piece: usize,
    replaced: bool,
    suspends: bool,
    columns: Option<u16>,
}

impl Manner {
    fn take(data: &[u8]) -> Option<(Manner, &[u8])> {
        let (&[piece, flags], stream) = data.split_first_chunk()?;
        let mut piece = if piece == 0 { usize::MAX } else { piece.into() };
        if flags & REPLACED != 0 {
            // Saving costs some: at every byte of a short input, now and then of a long one.
            piece = piece.max(stream.len() / 64);
        }
        let columns = COLUMNS[usize::from(flags >> 5)];
        let manner =
            Manner { piece, replaced: flags & REPLACED != 0, suspends: flags & SUSPENDS != 0, columns };
        Some((manner, stream))
    }

    /// The same input, sent at once to a program that stays.
    fn straight(&self) -> Manner {
        Manner { piece: usize::MAX, replaced: false, ..*self }
    }

    fn machine(&self) -> Machine {
        Machine { suspend: self.suspends, ..Machine::default() }
    }
}

/// QMP: the framer, the parser of requests and the decoding of commands. Pieces and updates change no answer.
pub fn qmp(data: &[u8]) -> bool {
    let Some((manner, stream)) = Manner::take(data) else { return false };
    let (commands, answers) = ask(stream, &manner.straight());
    let (same_commands, same_answers) = ask(stream, &manner);
    assert_eq!((&commands, &answers), (&same_commands, &same_answers));
    let answers = str::from_utf8(&answers).expect("answers are text");
    for answer in answers.split_terminator("\r\n") {
        let answer: serde_json::Value = serde_json::from_str(answer).expect("answers are JSON");
        assert!(answer.get("return").is_some() ^ answer.get("error").is_some() ^ answer.get("QMP").is_some());
    }
    !commands.is_empty()
}

fn ask(stream: &[u8], manner: &Manner) -> (Vec<vmm::monitor::Command>, Vec<u8>) {
    let mut machine = manner.machine();
    let mut session = qmp::Session::new("qmp0");
    let mut answers = Vec::new();
    for piece in stream.chunks(manner.piece) {
        session.feed(piece, Vec::new());
        loop {
            session.process(&mut machine);
            assert!(session.output().len() < OUTPUT_LIMIT);
            answers.extend_from_slice(session.output());
            session.consume_output(usize::MAX);
            let done = session.wants_input();
            if manner.replaced {
                session = qmp::Session::restore(persisted(&session.save()), Vec::new());
            }
            if session.is_waiting() {
                session.resume(ending());
            } else if done {
                break;
            }
        }
    }
    (machine.commands, answers)
}

pub(crate) fn qmp_seeds() -> Vec<Vec<u8>> {
    const HELLO: &str = r#"{"execute":"qmp_capabilities"}"#;
    let sessions = [
        r#"{"execute":"query-status","id":1}"#,
        r#"{"execute":"migrate","arguments":{"uri":"file:/x,offset=4K"}}{"execute":"query-migrate"}"#,
        r#"{"execute":"migrate","arguments":{"channels":[{"channel-type":"main","addr":{"transport":"file","filename":"f","offset":8}}]},"id":{"a":[1]}}"#,
        r#"{"execute":"migrate-set-parameters","arguments":{"mode":"cpr-exec","cpr-exec-command":["a","b c"]}}"#,
        r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"events","state":true}]}}"#,
        r#"{"execute":"human-monitor-command","arguments":{"command-line":"info migrate","cpu-index":0}}"#,
        r#"{"execute":"getfd","arguments":{"fdname":"tap"}}{"execute":"closefd","arguments":{"fdname":"tap"}}"#,
        "oops \n{\"execute\":\"stop\"}\u{1f}{\"execute\":\"cont\"} \"\\\\\"",
        r#"{"execute":"query-commands"}{"execute":"query-version"}{"execute":"stop"}"#,
    ];
    let manners = [[0, 0], [1, REPLACED], [7, REPLACED | SUSPENDS], [0, SUSPENDS]];
    let seeds = sessions.iter().zip(manners.iter().cycle());
    seeds.map(|(session, manner)| [&manner[..], HELLO.as_bytes(), session.as_bytes()].concat()).collect()
}

pub(crate) const QMP_WORDS: &[&str] = &[
    "{\"execute\":\"",
    "\"arguments\":{",
    "\"id\":",
    "qmp_capabilities",
    "query-status",
    "query-commands",
    "human-monitor-command",
    "command-line",
    "migrate",
    "migrate-incoming",
    "migrate-set-parameters",
    "migrate-set-capabilities",
    "capabilities",
    "capability",
    "channels",
    "channel-type",
    "transport",
    "filename",
    "offset",
    "getfd",
    "fdname",
    "cpr-exec-command",
    "file:",
    "memfd:",
    "true",
    "null",
    "1e999",
    "\\u0000",
];

/// HMP: the line editor and the commands. Pieces change no byte of the output, updates no command.
pub fn hmp(data: &[u8]) -> bool {
    let Some((manner, stream)) = Manner::take(data) else { return false };
    let (commands, drawn) = type_in(stream, &manner.straight());
    let (same_commands, drawn_in_pieces) = type_in(stream, &manner);
    assert_eq!(commands, same_commands);
    if !manner.replaced {
        assert_eq!(drawn.escape_ascii().to_string(), drawn_in_pieces.escape_ascii().to_string());
    }
    str::from_utf8(&drawn_in_pieces).expect("output is text");
    !commands.is_empty()
}

fn type_in(stream: &[u8], manner: &Manner) -> (Vec<vmm::monitor::Command>, Vec<u8>) {
    let mut machine = manner.machine();
    let mut session = hmp::Session::new("mon0");
    session.set_columns(manner.columns);
    let mut drawn = Vec::new();
    for piece in stream.chunks(manner.piece) {
        session.feed(piece, Vec::new());
        loop {
            session.process(&mut machine);
            assert!(session.output().len() < OUTPUT_LIMIT);
            drawn.extend_from_slice(session.output());
            session.consume_output(usize::MAX);
            let done = session.wants_input();
            if manner.replaced {
                session = hmp::Session::restore(persisted(&session.save()), Vec::new());
                session.set_columns(manner.columns);
            }
            if session.is_waiting() {
                session.resume(ending());
            } else if done {
                break;
            }
        }
    }
    (machine.commands, drawn)
}

pub(crate) fn hmp_seeds() -> Vec<Vec<u8>> {
    let sessions: [&[u8]; 9] = [
        b"info status\rinfo migrate_parameters\rhelp\rinfo\r",
        b"migrate_set_parameter cpr-exec-command \"a b\" 'c d' e\\ f\rinfo migrate_parameters\r",
        b"migrate -d \"file:/x y,offset=4K\"\r\nstop\ncont\n",
        b"migrate memfd:\rquit\r",
        b"mig\t_set_p\tmode \tcpr\t\rinfo na\t\r",
        b"info stXtus\x1b[D\x1b[D\x1b[D\x7fa\x05\r\x10\r\x1b[A\x1b[A\r",
        b"abc def\x17\x19\x19\x01\x0b\x19\x14\x1bb\x1bd\x1bf\x15stop\r",
        "stöp\u{8}\u{8}\u{8}op 世界👩‍👩‍👧\x02\x02\x14\x0c\rstop\r".as_bytes(),
        b"getfd tap\rclosefd tap\rmigrate_set_capability events on\rsystem_reset\r",
    ];
    let manners = [[0, 0], [1, REPLACED], [3, 0x20], [1, 0x40 | SUSPENDS], [1, 0xc0 | REPLACED]];
    let seeds = sessions.iter().zip(manners.iter().cycle());
    seeds.map(|(session, manner)| [&manner[..], session].concat()).collect()
}

pub(crate) const HMP_WORDS: &[&str] = &[
    "info ",
    "help ",
    "stop\r",
    "cont\r",
    "quit\r",
    "migrate -d ",
    "migrate_incoming ",
    "migrate_set_parameter ",
    "migrate_set_capability ",
    "cpr-exec-command ",
    "x-cpr-exec-keeper ",
    "mode ",
    "events ",
    "getfd ",
    "file:",
    "memfd:",
    "\t",
    "\r\n",
    "\x1b[A",
    "\x1b[B",
    "\x1b[C",
    "\x1b[D",
    "\x1b[3~",
    "\x1b[1;5C",
    "\x1b[H",
    "\x1bOF",
    "\x1b[<0;0;0M",
    "\x1b[32;0;0M",
    "\x1b[M",
    "\x1b]",
    "\x1b[200~",
    "\u{301}",
    "\u{200d}",
    "世",
];
