//! The QMP session: greeting, negotiation, requests, replies and events of one connection.
//!
//! The rules are those of `docs/interop/qmp-spec.rst`: every request gets exactly one reply, in order, with its id;
//! nothing but `qmp_capabilities` works before the negotiation; what is not JSON gets an error and does not end the
//! connection. Out-of-band execution is not offered.
//!
//! ```text
//!   Session::new ──greeting──► negotiating ──qmp_capabilities──► commands ◄──┐
//!                                                                   │        │ resume
//!                                                       Reply::Suspended ────┘
//! ```

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::command::{self, COMMANDS, Request};
use super::framer::{Frame, Framer, FramerState};
use super::output::OutputBuffer;
use super::{Backend, Origin, QmpError, Reply, hmp, keep_fds};

/// While this many bytes of output are undelivered, the session handles no input and asks for none.
const OUTPUT_HIGH_WATER: usize = 1 << 18;

/// One QMP connection.
#[derive(Debug)]
pub struct Session {
    id: String,
    negotiated: bool,
    framer: Framer,
    output: OutputBuffer,
    received_fds: VecDeque<OwnedFd>,
    /// A command was taken and its reply is still to come.
    waiting: Option<Waiting>,
}

/// The request whose reply is still to come.
#[derive(Debug, Clone)]
struct Waiting {
    id: Option<Value>,
}

/// A session on its way to the next program. The received descriptors that nobody claimed travel beside it
/// ([`Session::received_fds`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionState {
    id: String,
    negotiated: bool,
    framer: FramerState,
    output: Vec<u8>,
    /// The request that waits for its reply: its id as JSON text, if it has one.
    waiting: Option<Option<String>>,
}

/// A reply on the wire, with the members in the order that people expect.
#[derive(Serialize)]
struct Response<'a> {
    #[serde(rename = "return", skip_serializing_if = "Option::is_none")]
    value: Option<&'a Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a QmpError>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a Value>,
}

/// An event on the wire.
#[derive(Serialize)]
struct Event<'a> {
    timestamp: Timestamp,
    event: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'a Value>,
}

#[derive(Serialize)]
struct Timestamp {
    seconds: u64,
    microseconds: u32,
}

/// What goes before everything else.
fn greeting() -> Value {
    json!({"QMP": {"version": version(), "capabilities": []}})
}

fn version() -> Value {
    let (major, minor, micro) = super::version();
    json!({"qemu": {"major": major, "minor": minor, "micro": micro}, "package": super::PACKAGE})
}

impl Session {
    /// Starts a session on a fresh connection; the greeting is queued. `id` is what
    /// [`Origin::monitor`] will say.
    #[must_use]
    pub fn new(id: impl Into<String>) -> Self {
        let mut session = Self {
            id: id.into(),
            negotiated: false,
            framer: Framer::default(),
            output: OutputBuffer::default(),
            received_fds: VecDeque::new(),
            waiting: None,
        };
        session.send(&greeting());
        session
    }

    /// Id of the monitor.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Takes bytes as they came from the connection, and descriptors that came with them. Of unclaimed descriptors
    /// the session keeps the newest [`MAX_RECEIVED_FDS`](super::MAX_RECEIVED_FDS).
    pub fn feed(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) {
        self.framer.feed(bytes);
        keep_fds(&mut self.received_fds, fds);
    }

    /// Whether the main loop should read from the connection: not while a command is under way, input is left over or
    /// the peer does not read its replies.
    #[must_use]
    pub fn wants_input(&self) -> bool {
        !self.is_waiting() && self.framer.backlog() == 0 && self.output.pending().len() < OUTPUT_HIGH_WATER
    }

    /// Answers the requests that are complete, until one suspends the session or much output is undelivered. Call it
    /// again once the output is delivered, until the session [wants input](Self::wants_input) or
    /// [waits](Self::is_waiting).
    pub fn process(&mut self, backend: &mut dyn Backend) {
        while self.waiting.is_none() && self.output.pending().len() < OUTPUT_HIGH_WATER {
            let Some(frame) = self.framer.next() else { return };
            match frame {
                Frame::Garbage(why) => {
                    self.reply(None, Err(QmpError::generic(format!("JSON parse error, {why}"))));
                }
                Frame::Value(text) => match serde_json::from_slice(&text) {
                    Ok(value) => self.request(value, backend),
                    Err(why) => {
                        self.reply(None, Err(QmpError::generic(format!("JSON parse error, {why}"))));
                    }
                },
            }
        }
    }

    /// Whether a command answered [`Reply::Suspended`] and waits for [`resume`](Self::resume).
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Gives the reply of the command that suspended the session. Call [`process`](Self::process) afterwards: requests
    /// may have queued up. Does nothing if no command waits.
    pub fn resume(&mut self, result: Result<Value, QmpError>) {
        if let Some(Waiting { id }) = self.waiting.take() {
            self.reply(id, result);
        }
    }

    /// Sends an event; `at` is the time since the Unix epoch. Before the negotiation a client gets none.
    pub fn event(&mut self, name: &str, data: Option<&Value>, at: Duration) {
        if self.negotiated {
            let timestamp = Timestamp { seconds: at.as_secs(), microseconds: at.subsec_micros() };
            self.send(&Event { timestamp, event: name, data });
        }
    }

    /// What is to be written to the connection.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        self.output.pending()
    }

    /// Notes that the first `count` bytes of [`output`](Self::output) are written.
    pub fn consume_output(&mut self, count: usize) {
        self.output.consume(count);
    }

    /// Descriptors that came over the connection and that no command has claimed, oldest first. They must be
    /// preserved beside the saved state.
    pub fn received_fds(&self) -> impl ExactSizeIterator<Item = BorrowedFd<'_>> {
        self.received_fds.iter().map(AsFd::as_fd)
    }

    /// What the next program needs to go on with the connection.
    #[must_use]
    pub fn save(&self) -> SessionState {
        let waiting = self.waiting.as_ref().map(|waiting| waiting.id.as_ref().map(Value::to_string));
        SessionState {
            id: self.id.clone(),
            negotiated: self.negotiated,
            framer: self.framer.save(),
            output: self.output.pending().to_vec(),
            waiting,
        }
    }

    /// Goes on with a connection that a predecessor saved: no new greeting, no new negotiation, and a request that
    /// came in half goes on with its next byte. `fds` are the predecessor's [`received_fds`](Self::received_fds).
    #[must_use]
    pub fn restore(state: SessionState, fds: Vec<OwnedFd>) -> Self {
        let mut received_fds = VecDeque::new();
        keep_fds(&mut received_fds, fds);
        // An id is text that `save` wrote. Should it not parse, the reply goes out without one.
        let waiting =
            state.waiting.map(|id| Waiting { id: id.and_then(|text| serde_json::from_str(&text).ok()) });
        Self {
            id: state.id,
            negotiated: state.negotiated,
            framer: Framer::restore(state.framer),
            output: OutputBuffer::from_pending(state.output),
            received_fds,
            waiting,
        }
    }

    /// Handles one well-formed JSON value.
    fn request(&mut self, value: Value, backend: &mut dyn Backend) {
        let Value::Object(mut members) = value else {
            self.reply(None, Err(QmpError::generic("QMP input must be a JSON object")));
            return;
        };
        let id = members.remove("id");
        let result = match self.understand(members) {
            Ok(request) => self.carry_out(request, backend),
            Err(error) => Err(error),
        };
        match result {
            Ok(Reply::Value(value)) => self.reply(id, Ok(value)),
            Ok(Reply::Suspended) => self.waiting = Some(Waiting { id }),
            Err(error) => self.reply(id, Err(error)),
        }
    }

    /// Checks a request's form and its command's place in the session.
    fn understand(&self, mut members: Map<String, Value>) -> Result<Request, QmpError> {
        let name = match members.remove("execute") {
            Some(Value::String(name)) => Some(name),
            Some(_) => return Err(QmpError::generic("QMP input member 'execute' must be a string")),
            None => None,
        };
        let arguments = match members.remove("arguments") {
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return Err(QmpError::generic("QMP input member 'arguments' must be an object")),
            None => Map::new(),
        };
        if let Some(key) = members.keys().next() {
            return Err(QmpError::generic(format!("QMP input member '{key}' is unexpected")));
        }
        let name = name.ok_or_else(|| QmpError::generic("QMP input lacks member 'execute'"))?;
        if !self.negotiated && name != "qmp_capabilities" {
            return Err(QmpError::not_found("Expecting capabilities negotiation with 'qmp_capabilities'"));
        }
        if self.negotiated && name == "qmp_capabilities" {
            return Err(QmpError::not_found(
                "Capabilities negotiation is already complete, command 'qmp_capabilities' ignored",
            ));
        }
        command::parse(&name, arguments)
    }

    fn carry_out(&mut self, request: Request, backend: &mut dyn Backend) -> Result<Reply, QmpError> {
        let mut origin = Origin { monitor: &self.id, received_fds: &mut self.received_fds };
        match request {
            Request::Machine(command) => backend.execute(command, &mut origin),
            Request::Capabilities { enable } => match enable.first() {
                Some(name) => Err(QmpError::generic(format!("Capability '{name}' is not available"))),
                None => {
                    self.negotiated = true;
                    Ok(Reply::empty())
                }
            },
            Request::QueryVersion => Ok(Reply::Value(version())),
            Request::QueryCommands => {
                Ok(Reply::Value(COMMANDS.iter().map(|command| json!({"name": command.name})).collect()))
            }
            Request::HumanMonitor { line } => {
                let text = hmp::run_detached(&line, backend, &mut origin);
                Ok(Reply::Value(text.replace('\n', "\r\n").into()))
            }
        }
    }

    fn reply(&mut self, id: Option<Value>, result: Result<Value, QmpError>) {
        let id = id.as_ref();
        match &result {
            Ok(value) => self.send(&Response { value: Some(value), error: None, id }),
            Err(error) => self.send(&Response { value: None, error: Some(error), id }),
        }
    }

    fn send(&mut self, message: &impl Serialize) {
        // Serialising our own values into memory has no way to fail: keys are strings, numbers are finite.
        if let Ok(text) = serde_json::to_vec(message) {
            self.output.push(&text);
            self.output.push(b"\r\n");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use proptest::prelude::*;

    use super::*;
    use crate::monitor::testing::{Machine, persisted};

    fn lines(output: &[u8]) -> Vec<Value> {
        let text = std::str::from_utf8(output).unwrap();
        text.split_terminator("\r\n").map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn negotiated() -> Session {
        let mut session = Session::new("qmp0");
        session.feed(br#"{"execute":"qmp_capabilities"}"#, vec![]);
        session.process(&mut Machine::default());
        let pending = session.output().len();
        session.consume_output(pending);
        session
    }

    fn answers(input: &str) -> Vec<Value> {
        let mut session = negotiated();
        session.feed(input.as_bytes(), vec![]);
        session.process(&mut Machine::default());
        lines(session.output())
    }

    fn error_of(value: &Value) -> (&str, &str) {
        (value["error"]["class"].as_str().unwrap(), value["error"]["desc"].as_str().unwrap())
    }

    #[test]
    fn golden_transcript() {
        let mut session = Session::new("qmp0");
        let mut machine = Machine::default();
        session.event("STOP", None, Duration::from_secs(1));
        session.feed(
            concat!(
                r#"{"execute":"query-status"}"#,
                r#"{"execute":"qmp_capabilities","id":"a"}"#,
                r#"{"execute":"query-status","id":{"n":[1,2.5]}}"#,
                r#"{"execute":"blah","id":null}"#,
                r#"{"execute":"qmp_capabilities"}"#,
                r#"{"execute":"migrate-set-parameters","arguments":{"mode":"cpr-exec","cpr-exec-command":["a","b c"]}}"#,
                r#"{"execute":"migrate","arguments":{"uri":"file:vm.state"}}"#,
            )
            .as_bytes(),
            vec![],
        );
        session.process(&mut machine);
        session.event("STOP", None, Duration::from_micros(1_000_002));
        session.event("MIGRATION", Some(&json!({"status": "setup"})), Duration::from_secs(3));
        let greeting = serde_json::to_string(&greeting()).unwrap();
        let expected = [
            &greeting,
            r#"{"error":{"class":"CommandNotFound","desc":"Expecting capabilities negotiation with 'qmp_capabilities'"}}"#,
            r#"{"return":{},"id":"a"}"#,
            r#"{"return":{"running":true,"status":"running"},"id":{"n":[1,2.5]}}"#,
            r#"{"error":{"class":"CommandNotFound","desc":"The command blah has not been found"},"id":null}"#,
            r#"{"error":{"class":"CommandNotFound","desc":"Capabilities negotiation is already complete, command 'qmp_capabilities' ignored"}}"#,
            r#"{"return":{}}"#,
            r#"{"return":{}}"#,
            r#"{"timestamp":{"seconds":1,"microseconds":2},"event":"STOP"}"#,
            r#"{"timestamp":{"seconds":3,"microseconds":0},"event":"MIGRATION","data":{"status":"setup"}}"#,
            "",
        ]
        .join("\r\n");
        assert_eq!(std::str::from_utf8(session.output()).unwrap(), expected);
        assert_eq!(machine.parameters.mode.as_deref(), Some("cpr-exec"));
    }

    #[test]
    fn output_that_nobody_takes_holds_the_input() {
        let mut session = negotiated();
        session.feed(&br#"{"execute":"query-commands"}"#.repeat(2000), vec![]);
        let mut answers = 0;
        loop {
            session.process(&mut Machine::default());
            assert!(session.output().len() < OUTPUT_HIGH_WATER + 4096);
            answers += lines(session.output()).len();
            session.consume_output(usize::MAX);
            if session.wants_input() {
                break;
            }
        }
        assert_eq!(answers, 2000);
    }

    #[test]
    fn the_greeting_has_the_version() {
        let version = &greeting()["QMP"]["version"];
        let (major, minor, micro) = super::super::version();
        assert_eq!(version["qemu"], json!({"major": major, "minor": minor, "micro": micro}));
        assert_eq!(format!("{major}.{minor}.{micro}"), env!("CARGO_PKG_VERSION"));
        assert_eq!(answers(r#"{"execute":"query-version"}"#)[0]["return"], *version);
    }

    #[test]
    fn malformed_requests() {
        for (input, needle) in [
            ("[]", "must be a JSON object"),
            (r#"{"id":1}"#, "lacks member 'execute'"),
            (r#"{"execute":1}"#, "'execute' must be a string"),
            (r#"{"execute":"stop","arguments":[]}"#, "'arguments' must be an object"),
            (r#"{"exec-oob":"stop"}"#, "'exec-oob' is unexpected"),
            (r#"{"execute":"stop","x":1}"#, "'x' is unexpected"),
            (r#"{"execute":}"#, "JSON parse error"),
            ("{]", "JSON parse error"),
            ("nonsense\n", "JSON parse error"),
            (r#"{"execute":"human-monitor-command"}"#, "'command-line' is missing"),
        ] {
            let answers = answers(&format!("{input}{{\"execute\":\"query-name\"}}"));
            assert_eq!(answers.len(), 2, "{input}: {answers:?}");
            let (class, desc) = error_of(&answers[0]);
            assert_eq!(class, "GenericError");
            assert!(desc.contains(needle), "{input}: {desc}");
            assert_eq!(answers[1]["return"]["name"], "guest");
        }
    }

    #[test]
    fn deep_nesting_is_an_error() {
        let input = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
        let answers = answers(&(input + r#"{"execute":"stop"}"#));
        assert_eq!(answers.len(), 2);
        assert!(error_of(&answers[0]).1.contains("recursion"));
        assert_eq!(answers[1], json!({"return": {}}));
    }

    #[test]
    fn negotiation_offers_nothing() {
        let mut session = Session::new("qmp0");
        session.feed(br#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#, vec![]);
        session.process(&mut Machine::default());
        assert!(error_of(&lines(session.output())[1]).1.contains("'oob'"));
        assert!(!session.negotiated);
    }

    #[test]
    fn query_commands_lists_the_table() {
        let answer = &answers(r#"{"execute":"query-commands"}"#)[0]["return"];
        let listed: Vec<_> =
            answer.as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap()).collect();
        let table: Vec<_> = COMMANDS.iter().map(|command| command.name).collect();
        assert_eq!(listed, table);
    }

    #[test]
    fn human_monitor_command_returns_text() {
        let input =
            r#"{"execute":"human-monitor-command","arguments":{"command-line":"info status","cpu-index":0}}"#;
        assert_eq!(answers(input)[0]["return"], "VM status: running\r\n");
        let input = r#"{"execute":"human-monitor-command","arguments":{"command-line":"migrate memfd:"}}"#;
        assert!(answers(input)[0]["return"].as_str().unwrap().contains("continuing detached"));
    }

    #[test]
    fn descriptors_reach_getfd_in_order_and_are_capped() {
        let mut session = negotiated();
        let mut machine = Machine::default();
        let file = || OwnedFd::from(File::open("/dev/null").unwrap());
        session.feed(b"", (0..40).map(|_| file()).collect());
        assert_eq!(session.received_fds().len(), super::super::MAX_RECEIVED_FDS);
        session.feed(br#"{"execute":"getfd","arguments":{"fdname":"a"}}"#, vec![]);
        session.process(&mut machine);
        assert_eq!(session.received_fds().len(), super::super::MAX_RECEIVED_FDS - 1);
        assert!(machine.fds.contains_key("a"));
        let mut session = negotiated();
        session.feed(br#"{"execute":"getfd","arguments":{"fdname":"a"}}"#, vec![]);
        session.process(&mut machine);
        assert!(error_of(&lines(session.output())[0]).1.contains("No file descriptor"));
    }

    #[test]
    fn a_suspended_command_is_answered_once_and_in_order() {
        let mut session = negotiated();
        let mut machine = Machine { suspend: true, ..Machine::default() };
        session.feed(br#"{"execute":"stop","id":7}{"execute":"query-name","id":8}"#, vec![]);
        session.process(&mut machine);
        assert!(session.is_waiting() && !session.wants_input() && session.output().is_empty());
        let state = persisted(&session.save());
        let mut session = Session::restore(state, vec![]);
        machine.suspend = false;
        session.process(&mut machine);
        assert!(session.output().is_empty());
        session.resume(Ok(json!({})));
        session.resume(Ok(json!({})));
        session.process(&mut machine);
        assert!(session.wants_input());
        let answers = lines(session.output());
        assert_eq!(answers, [json!({"return": {}, "id": 7}), json!({"return": {"name": "guest"}, "id": 8})]);
    }

    /// A session with all that can be half done at a byte boundary.
    const TRANSCRIPT: &str = concat!(
        r#"{"execute":"query-status"} {"execute":"qmp_capabilities","id":1}"#,
        "\nrubbish\n",
        r#"{"execute":"query-name","id":"quote\" } é"}{"execute":"query-commands"}[1]"#,
        r#"{"execute":"human-monitor-command","arguments":{"command-line":"info status"},"id":[]}"#,
        "{\"execute\":\"un\nfinished\"}\n",
        r#"{"execute":"migrate","arguments":{"uri":"memfd:"},"id":2}"#,
    );

    fn transcript(step: usize, save: bool) -> Vec<u8> {
        let mut machine = Machine::default();
        let mut session = Session::new("qmp0");
        let mut sent = Vec::new();
        for chunk in TRANSCRIPT.as_bytes().chunks(step) {
            session.feed(chunk, vec![]);
            session.process(&mut machine);
            // Deliver an odd part, so that output is pending most of the time.
            let count = session.output().len().min(7);
            sent.extend_from_slice(&session.output()[..count]);
            session.consume_output(count);
            if save {
                session = Session::restore(persisted(&session.save()), vec![]);
            }
        }
        sent.extend_from_slice(session.output());
        sent
    }

    #[test]
    fn saving_at_every_byte_changes_nothing() {
        let whole = transcript(usize::MAX, false);
        assert_eq!(transcript(1, false), whole);
        assert_eq!(transcript(1, true), whole);
        for boundary in 1..TRANSCRIPT.len() {
            assert_eq!(transcript(boundary, true), whole, "at {boundary}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(input: Vec<u8>, tail in ".{0,40}") {
            let mut session = negotiated();
            session.feed(&input, vec![]);
            session.feed(tail.as_bytes(), vec![]);
            // Whatever came before, this gets the client back to a clean state.
            session.feed(b"\xff\n", vec![]);
            session.process(&mut Machine::default());
            let pending = session.output().len();
            session.consume_output(pending);
            session.feed(br#"{"execute":"query-name","id":1}"#, vec![]);
            session.process(&mut Machine::default());
            prop_assert_eq!(lines(session.output()), [json!({"return": {"name": "guest"}, "id": 1})]);
        }

        #[test]
        fn any_state_is_survived(bytes: Vec<u8>) {
            if let Ok(state) = postcard::from_bytes::<SessionState>(&bytes) {
                let mut session = Session::restore(state, vec![]);
                session.feed(b"{}", vec![]);
                session.process(&mut Machine::default());
            }
        }
    }
}
