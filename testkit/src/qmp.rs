//! A QMP client: one connection, commands with ids, events kept in order.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};

use crate::PATIENCE;

/// An error reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QmpFailure {
    /// The error class.
    pub class: String,
    /// The text for people.
    pub desc: String,
}

impl std::fmt::Display for QmpFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.class, self.desc)
    }
}

impl std::error::Error for QmpFailure {}

/// A client past its handshake.
pub struct Qmp {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    line: String,
    next_id: u64,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects, reads the greeting, negotiates.
    ///
    /// # Errors
    /// Nobody listens, or it speaks no QMP.
    pub fn connect(path: &Path) -> anyhow::Result<Qmp> {
        let mut qmp = Qmp::connect_only(path)?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Connects and reads the greeting; nothing is negotiated yet.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn connect_only(path: &Path) -> anyhow::Result<Qmp> {
        let stream = crate::wait_for("the QMP socket", PATIENCE, || UnixStream::connect(path).ok())?;
        let reader = BufReader::new(stream.try_clone()?);
        let mut qmp = Qmp { stream, reader, line: String::new(), next_id: 0, events: VecDeque::new() };
        let greeting = qmp.read(Instant::now() + PATIENCE)?;
        ensure!(greeting.get("QMP").is_some(), "no QMP greeting: {greeting}");
        Ok(qmp)
    }

    /// Runs a command and waits for its reply; events that come before it are kept.
    ///
    /// # Errors
    /// [`QmpFailure`] for an error reply; anything else when the connection fails, or a second reply comes.
    pub fn execute(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let id = self.send(command, arguments)?;
        self.reply(id).with_context(|| format!("QMP {command}"))
    }

    /// Runs a command that must fail.
    ///
    /// # Errors
    /// It succeeded.
    pub fn refused(&mut self, command: &str, arguments: Value) -> anyhow::Result<QmpFailure> {
        match self.execute(command, arguments) {
            Ok(value) => bail!("{command} succeeded: {value}"),
            Err(error) => error.downcast::<QmpFailure>(),
        }
    }

    /// Sends a command without waiting; gives its id.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn send(&mut self, command: &str, arguments: Value) -> anyhow::Result<u64> {
        self.next_id += 1;
        let request = json!({ "execute": command, "arguments": arguments, "id": self.next_id });
        self.send_raw(format!("{request}\n").as_bytes())?;
        Ok(self.next_id)
    }

    /// As [`execute`](Self::execute), with descriptors that travel beside the request.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn execute_with_fds(
        &mut self,
        command: &str,
        arguments: Value,
        fds: &[BorrowedFd<'_>],
    ) -> anyhow::Result<Value> {
        self.next_id += 1;
        let request = json!({ "execute": command, "arguments": arguments, "id": self.next_id });
        let request = format!("{request}\n");
        let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = sendmsg::<()>(
            self.stream.as_raw_fd(),
            &[IoSlice::new(request.as_bytes())],
            &[ControlMessage::ScmRights(&numbers)],
            MsgFlags::empty(),
            None,
        )?;
        ensure!(sent == request.len(), "the socket took {sent} of {} bytes", request.len());
        self.reply(self.next_id).with_context(|| format!("QMP {command}"))
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn send_raw(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        Ok(self.stream.write_all(bytes)?)
    }

    /// Waits for the reply to request `id`, which must be the next reply.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn reply(&mut self, id: u64) -> anyhow::Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let message = self.read(deadline)?;
            if message.get("event").is_some() {
                self.events.push_back(message);
                continue;
            }
            ensure!(message["id"] == json!(id), "reply to another request (wanted {id}): {message}");
            if let Some(error) = message.get("error") {
                let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
                return Err(QmpFailure { class: text("class"), desc: text("desc") }.into());
            }
            return Ok(message["return"].clone());
        }
    }

    /// Waits for the next event of that name, and drops the events before it.
    ///
    /// # Errors
    /// It does not come.
    pub fn event(&mut self, name: &str) -> anyhow::Result<Value> {
        self.event_where(name, |_| true)
    }

    /// Waits for the next event of that name whose data pleases.
    ///
    /// # Errors
    /// It does not come.
    pub fn event_where(&mut self, name: &str, pleases: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        self.next_event(&[name], |event| pleases(&event["data"]))
    }

    /// Waits for the next event of one of those names, and drops the events before it.
    ///
    /// # Errors
    /// None of them comes.
    pub fn event_of(&mut self, names: &[&str]) -> anyhow::Result<Value> {
        self.next_event(names, |_| true)
    }

    fn next_event(&mut self, names: &[&str], pleases: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self
                    .read(deadline)
                    .with_context(|| format!("waiting for event {}", names.join(" or ")))?,
            };
            ensure!(event.get("event").is_some(), "a reply that nobody asked for: {event}");
            if names.iter().any(|name| event["event"] == *name) && pleases(&event) {
                return Ok(event);
            }
        }
    }

    /// Events that came and that nobody waited for, in order.
    pub fn take_events(&mut self) -> Vec<Value> {
        self.events.drain(..).collect()
    }

    /// Whether an event of that name whose data pleases has come, or comes within `limit`. Events are kept.
    ///
    /// # Errors
    /// The connection ended, or a reply comes that nobody asked for.
    pub fn has_come(
        &mut self,
        name: &str,
        pleases: impl Fn(&Value) -> bool,
        limit: Duration,
    ) -> anyhow::Result<bool> {
        let deadline = Instant::now() + limit;
        while !self.events.iter().any(|event| event["event"] == name && pleases(&event["data"])) {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(message) = self.try_read(left)? else { return Ok(false) };
            ensure!(message.get("event").is_some(), "a reply that nobody asked for: {message}");
            self.events.push_back(message);
        }
        Ok(true)
    }

    /// Reads one message; none within `limit` is `None`.
    ///
    /// # Errors
    /// The connection ended, or what came is no JSON.
    pub fn try_read(&mut self, limit: Duration) -> anyhow::Result<Option<Value>> {
        match self.read(Instant::now() + limit) {
            Ok(message) => Ok(Some(message)),
            Err(error) if error.is::<TimedOut>() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads until the other end closes the connection, and gives every event since the last call that took one.
    ///
    /// # Errors
    /// The connection stays open, or a reply comes that nobody asked for.
    pub fn events_to_the_end(&mut self) -> anyhow::Result<Vec<Value>> {
        while let Some(message) = self.try_read_to_end()? {
            ensure!(message.get("event").is_some(), "a reply that nobody asked for: {message}");
            self.events.push_back(message);
        }
        Ok(self.take_events())
    }

    /// Reads one message; `None` is the end of the connection.
    ///
    /// # Errors
    /// Neither comes.
    pub fn try_read_to_end(&mut self) -> anyhow::Result<Option<Value>> {
        match self.read(Instant::now() + PATIENCE) {
            Ok(message) => Ok(Some(message)),
            Err(error) if error.is::<Ended>() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn read(&mut self, deadline: Instant) -> anyhow::Result<Value> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.reader.read_line(&mut self.line) {
                Ok(0) => return Err(Ended.into()),
                Ok(_) if self.line.ends_with('\n') => {
                    let line = std::mem::take(&mut self.line);
                    return serde_json::from_str(&line).with_context(|| format!("no JSON: {line}"));
                }
                Ok(_) => {}
                Err(e)
                    if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                // Closed with our bytes unread: an end, too.
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return Err(Ended.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the monitor said nothing in time")]
struct TimedOut;

#[derive(Debug, thiserror::Error)]
#[error("the monitor closed the connection")]
struct Ended;
