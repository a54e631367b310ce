//! Character devices: the host's ends of monitors and serial ports (QEMU's `-chardev`).
//!
//! A chardev moves bytes and knows nothing of what they mean. Output never blocks the caller: what the peer does not
//! take now is kept, up to a limit, and sent when the main loop finds it writable. Listeners, connections, terminal
//! modes and undelivered output outlive a live update.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, bail};
use cpr_core::{FdKind, FdPolicy, FdRegistry};
use oslib::eventfd::EventFd;
use oslib::term::Termios;
use serde::{Deserialize, Serialize};
use vmm_core::output::OutputSink;

use crate::cli::config::{ChardevBackend, ChardevConfig};
use crate::event_loop::{Interest, Token};

/// Output that a peer did not take yet, in bytes; beyond it output is lost, with a warning, as on a real line.
const MAX_PENDING: usize = 4 << 20;
/// A write to a terminal or pipe blocks if it is larger than the room that poll promised.
const BLOCKING_CHUNK: usize = 64;

/// Registry id of a chardev's listener.
const LISTENER: u64 = 0;
/// Registry id of a chardev's connection.
const CONNECTION: u64 = 1;

/// The registry name of a chardev's descriptors.
pub(crate) fn registry_name(identity: &str) -> String {
    format!("chardev/{identity}")
}

/// What a chardev is on the host. By this the next program knows it again: ids of short forms such as `-qmp` are
/// counted, so that one option more would give them to other chardevs.
///
/// # Errors
/// There is no working directory, so that a relative path means nothing.
pub fn identity(config: &ChardevConfig) -> io::Result<String> {
    let id = &config.id;
    let absolute = |path: &Path| std::path::absolute(path).map(|path| path.display().to_string());
    Ok(match &config.backend {
        ChardevBackend::Null => format!("null:{id}"),
        ChardevBackend::Stdio { .. } => "stdio".into(),
        ChardevBackend::File { path } => format!("file:{}", absolute(path)?),
        ChardevBackend::Socket { path, server: true, .. } => format!("unix:{}", absolute(path)?),
        // One listener can have several clients here.
        ChardevBackend::Socket { path, .. } => format!("unix:{}:{id}", absolute(path)?),
    })
}

/// Whether it can go with a guest that moves to another process. Standard streams are each process's own.
pub fn travels(config: &ChardevConfig) -> bool {
    matches!(config.backend, ChardevBackend::Socket { .. } | ChardevBackend::File { .. })
}

/// What bytes are written to.
#[derive(Debug, Default)]
enum Sink {
    /// Nobody listens: output is dropped, as QEMU does for a socket without a client.
    #[default]
    Nobody,
    /// A socket, which has calls that never block.
    Socket(Arc<OwnedFd>),
    /// A descriptor that may be shared with other programs, so that it cannot be made non-blocking.
    Blocking(Arc<OwnedFd>),
    /// A regular file, which is always ready.
    File(Arc<OwnedFd>),
}

#[derive(Debug, Default)]
struct OutputState {
    sink: Sink,
    pending: VecDeque<u8>,
    dropped: u64,
    /// Nothing is sent now: what is pending was saved, and may be another program's to send.
    held: bool,
}

impl OutputState {
    fn write(&mut self, bytes: &[u8]) {
        if matches!(self.sink, Sink::Nobody) {
            return;
        }
        let room = MAX_PENDING.saturating_sub(self.pending.len());
        let (kept, lost) = bytes.split_at(bytes.len().min(room));
        if self.dropped == 0 && !lost.is_empty() {
            tracing::warn!("the peer of a chardev does not read: output is being lost");
        }
        self.dropped += lost.len() as u64;
        self.pending.extend(kept);
        self.flush();
    }

    /// Sends as much as goes without blocking. An error means that the peer is gone, which reading will notice.
    fn flush(&mut self) {
        while !self.pending.is_empty() && !self.held {
            let (chunk, _) = self.pending.as_slices();
            let sent = match &self.sink {
                Sink::Nobody => Ok(chunk.len()),
                Sink::Socket(fd) => oslib::stream::send_nonblocking(fd, chunk),
                Sink::File(fd) => oslib::stream::write(fd, chunk),
                Sink::Blocking(fd) => {
                    if !oslib::stream::is_writable(fd).unwrap_or(false) {
                        return;
                    }
                    oslib::stream::write(fd, &chunk[..chunk.len().min(BLOCKING_CHUNK)])
                }
            };
            match sent {
                Ok(count) => drop(self.pending.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::debug!(%error, "output lost");
                    self.pending.clear();
                }
            }
        }
    }
}

/// The output of a chardev; clones share it, so that a vCPU thread can write serial output itself. The default has nobody
/// who listens.
#[derive(Debug, Clone, Default)]
pub struct Output(Arc<SharedOutput>);

#[derive(Debug, Default)]
struct SharedOutput {
    state: Mutex<OutputState>,
    /// Rung when output is left over: a loop that waits while another thread writes does not know that it is to watch for
    /// room.
    left_over: Option<Arc<EventFd>>,
}

impl Output {
    /// One of a chardev that a loop watches.
    fn watched() -> io::Result<Output> {
        let left_over = Some(Arc::new(EventFd::new()?));
        Ok(Output(Arc::new(SharedOutput { left_over, ..SharedOutput::default() })))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, OutputState> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends `bytes`, now or as soon as the peer takes them.
    pub fn write(&self, bytes: &[u8]) {
        let mut state = self.lock();
        let is_known = !state.pending.is_empty();
        state.write(bytes);
        if !is_known
            && !state.pending.is_empty()
            && let Some(Err(error)) = self.0.left_over.as_deref().map(EventFd::signal)
        {
            tracing::error!(%error, "output may have to wait: the main loop cannot be told of it");
        }
    }

    fn flush(&self) {
        self.lock().flush();
    }

    fn has_pending(&self) -> bool {
        !self.lock().pending.is_empty()
    }

    /// What the peer has not taken yet.
    pub fn pending(&self) -> Vec<u8> {
        self.lock().pending.iter().copied().collect()
    }

    /// Drops what the peer has not taken yet: another program has sent it.
    pub fn forget(&self) {
        self.lock().pending.clear();
    }

    /// Sends nothing until told otherwise; gives what is pending then.
    pub fn hold(&self) -> Vec<u8> {
        self.lock().held = true;
        self.pending()
    }

    /// Sends again.
    pub fn release(&self) {
        let mut state = self.lock();
        state.held = false;
        state.flush();
    }

    /// Sends again, but not the first `count` bytes of what is [held](Self::hold): another program has them.
    pub fn release_after(&self, count: usize) {
        let mut state = self.lock();
        if state.held {
            let count = count.min(state.pending.len());
            state.pending.drain(..count);
        }
        state.held = false;
        state.flush();
    }

    /// Sends `bytes` before everything that is pending.
    pub fn write_first(&self, bytes: &[u8]) {
        let mut state = self.lock();
        let rest = std::mem::replace(&mut state.pending, bytes.to_vec().into());
        state.pending.extend(rest);
        state.flush();
    }

    fn connect(&self, sink: Sink, pending: Vec<u8>) {
        *self.lock() = OutputState { sink, pending: pending.into(), ..OutputState::default() };
    }
}

impl OutputSink for Output {
    fn write(&mut self, bytes: &[u8]) {
        Output::write(self, bytes);
    }
}

/// What the loop is to watch of a chardev.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Input, new connections, and room for pending output.
    Both,
    /// As [`Both`](Self::Both), but for input: its front end takes none now.
    NoInput,
    /// As [`Both`](Self::Both), but who wants to connect has to wait.
    NoAccept,
    /// Room for pending output, and nothing else: input is another program's.
    Output,
}

/// What reading gave.
#[derive(Debug)]
pub enum Input {
    /// Bytes, and descriptors that came with them.
    Data(Vec<u8>, Vec<OwnedFd>),
    /// Nothing now.
    Nothing,
    /// The peer is gone. A socket can be connected again; anything else is at its end.
    Closed,
}

enum Kind {
    Null,
    File,
    Stdio { input: Option<Arc<OwnedFd>>, original: Option<Termios>, signal: bool },
    Socket { path: PathBuf, listener: Option<Arc<OwnedFd>>, connection: Option<Arc<OwnedFd>> },
}

/// One chardev.
pub struct Chardev {
    id: String,
    identity: String,
    kind: Kind,
    output: Output,
}

/// A chardev on its way to the next program, version 1. Its descriptors travel in the registry.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ChardevState {
    identity: String,
    connected: bool,
    pending: Vec<u8>,
    original: Option<TermiosState>,
}

/// Terminal modes as plain numbers.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct TermiosState {
    flags: [u32; 4],
    line: u8,
    control: Vec<u8>,
    speeds: [u32; 2],
}

impl Chardev {
    /// Opens the chardev, or takes it over from the previous program if `state` is of the same chardev.
    ///
    /// # Errors
    /// It cannot be opened; the error names it.
    pub fn open(
        config: &ChardevConfig,
        registry: &FdRegistry,
        state: Option<ChardevState>,
    ) -> anyhow::Result<Chardev> {
        let id = config.id.clone();
        let identity = identity(config).with_context(|| format!("chardev '{id}'"))?;
        let output = Output::watched().with_context(|| format!("chardev '{id}'"))?;
        let kind = match &config.backend {
            ChardevBackend::Null => Kind::Null,
            ChardevBackend::File { path } => {
                let mut options = OpenOptions::new();
                options.create(true).write(true);
                // What the previous program wrote stays; a fresh start begins a fresh file, as QEMU does.
                if state.is_some() {
                    options.append(true)
                } else {
                    options.truncate(true)
                };
                let file = options
                    .open(path)
                    .with_context(|| format!("chardev '{id}': cannot open {}", path.display()))?;
                output.connect(Sink::File(Arc::new(file.into())), pending(state));
                Kind::File
            }
            ChardevBackend::Stdio { signal } => open_stdio(&output, *signal, state)
                .with_context(|| format!("chardev '{id}': cannot use standard input and output"))?,
            ChardevBackend::Socket { path, server, wait } => {
                let at = SocketAt { id: &id, identity: &identity, path, server: *server, wait: *wait };
                open_socket(&at, registry, &output, state)?
            }
        };
        Ok(Chardev { id, identity, kind, output })
    }

    /// Stands for a chardev that is opened when the guest arrives, because its descriptors may come with it.
    ///
    /// # Errors
    /// As [`identity`], and those of eventfd(2).
    pub fn awaited(config: &ChardevConfig) -> io::Result<Chardev> {
        let identity = identity(config)?;
        Ok(Chardev { id: config.id.clone(), identity, kind: Kind::Null, output: Output::watched()? })
    }

    /// Lets go of everything: another program has it now. Its path stays, as that of the other program.
    pub fn let_go(&mut self) {
        self.release_terminal();
        self.output.connect(Sink::Nobody, Vec::new());
        self.kind = Kind::Null;
    }

    /// The id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// See [`identity`].
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Where to write to.
    pub fn output(&self) -> &Output {
        &self.output
    }

    /// Whether there is somebody at the other end.
    pub fn is_connected(&self) -> bool {
        match &self.kind {
            Kind::Socket { connection, .. } => connection.is_some(),
            Kind::Stdio { input, .. } => input.is_some(),
            Kind::Null | Kind::File => true,
        }
    }

    /// Whether it is a terminal whose modes it changed.
    pub fn has_terminal(&self) -> bool {
        matches!(self.kind, Kind::Stdio { original: Some(_), .. })
    }

    /// The width of the terminal in columns, if it is one.
    pub fn columns(&self) -> Option<u16> {
        self.window().map(|(columns, _)| columns)
    }

    /// Columns and rows of the terminal, if it is one and they are known.
    pub fn window(&self) -> Option<(u16, u16)> {
        let Kind::Stdio { input: Some(input), .. } = &self.kind else { return None };
        let window = oslib::term::window(input).ok()?;
        (window.columns > 0).then_some((window.columns, window.rows))
    }

    /// As QEMU describes it in `query-chardev`.
    pub fn describe(&self) -> String {
        match &self.kind {
            Kind::Null => "null".into(),
            Kind::File => "file".into(),
            Kind::Stdio { .. } => "stdio".into(),
            Kind::Socket { path, listener: Some(_), connection: None } => {
                format!("disconnected:unix:{},server=on", path.display())
            }
            Kind::Socket { path, listener: Some(_), .. } => format!("unix:{},server=on", path.display()),
            Kind::Socket { path, .. } => format!("unix:{}", path.display()),
        }
    }

    /// What the loop should watch for chardev number `at`.
    pub fn interests(&self, at: usize, direction: Direction) -> Vec<Interest> {
        let mut interests = Vec::new();
        let wants_input = matches!(direction, Direction::Both | Direction::NoAccept);
        match &self.kind {
            Kind::Null => {}
            Kind::Stdio { input, .. } => {
                interests.extend(
                    input.iter().filter(|_| wants_input).map(|fd| Interest::read(fd, Token::Peer(at))),
                );
            }
            _ if direction == Direction::Output => {}
            Kind::Socket { connection: None, .. } if direction == Direction::NoAccept => {}
            Kind::Socket { listener: Some(listener), connection: None, .. } => {
                interests.push(Interest::read(listener, Token::Accept(at)));
            }
            Kind::Socket { connection, .. } => {
                interests.extend(
                    connection.iter().filter(|_| wants_input).map(|fd| Interest::read(fd, Token::Peer(at))),
                );
            }
            Kind::File => {}
        }
        let left_over = &self.output.0.left_over;
        interests.extend(left_over.iter().map(|bell| Interest::read(bell, Token::LeftOver(at))));
        let output = self.output.lock();
        if !output.pending.is_empty() && !output.held {
            match &output.sink {
                Sink::Socket(fd) => interests.push(Interest::write(fd, Token::Peer(at))),
                Sink::Blocking(fd) | Sink::File(fd) => interests.push(Interest::write(fd, Token::Output(at))),
                Sink::Nobody => {}
            }
        }
        interests
    }

    /// Sends what is pending.
    pub fn flush(&self) {
        self.output.flush();
    }

    /// The loop knows that output was left over; [`interests`](Self::interests) has what follows.
    ///
    /// # Errors
    /// Those of read(2).
    pub fn note_left_over(&self) -> io::Result<()> {
        self.output.0.left_over.as_deref().map_or(Ok(()), |bell| bell.drain().map(drop))
    }

    /// Whether output waits for the peer.
    pub fn has_pending(&self) -> bool {
        self.output.has_pending()
    }

    /// Takes a connection that the listener has.
    ///
    /// # Errors
    /// Accepting fails, or the registry refuses.
    pub fn accept(&mut self, registry: &FdRegistry) -> anyhow::Result<bool> {
        let Kind::Socket { listener: Some(listener), connection, .. } = &mut self.kind else {
            return Ok(false);
        };
        let Some(stream) = oslib::stream::accept_nonblocking(&*listener)? else { return Ok(false) };
        *connection = Some(connect_output(&self.identity, stream, registry, &self.output, Vec::new())?);
        Ok(true)
    }

    /// Reads what there is, without blocking.
    pub fn read(&mut self, limit: usize) -> Input {
        let result = match &self.kind {
            Kind::Socket { connection: Some(fd), .. } => oslib::stream::recv_with_fds(fd, limit),
            Kind::Stdio { input: Some(fd), .. } => {
                if !oslib::stream::is_readable(fd).unwrap_or(true) {
                    return Input::Nothing;
                }
                oslib::stream::read(fd, limit).map(|bytes| (bytes, Vec::new()))
            }
            _ => return Input::Nothing,
        };
        match result {
            Ok((bytes, fds)) if bytes.is_empty() && fds.is_empty() => self.closed(),
            Ok((bytes, fds)) => Input::Data(bytes, fds),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Input::Nothing
            }
            Err(_) => self.closed(),
        }
    }

    fn closed(&mut self) -> Input {
        match &mut self.kind {
            Kind::Socket { connection, .. } => {
                self.output.connect(Sink::Nobody, Vec::new());
                *connection = None;
            }
            Kind::Stdio { input, .. } => *input = None,
            Kind::Null | Kind::File => {}
        }
        Input::Closed
    }

    /// What the next program needs, besides the descriptors. `pending`: output that it is to send.
    pub fn save(&self, pending: Vec<u8>) -> ChardevState {
        let original = match &self.kind {
            Kind::Stdio { original, .. } => original.as_ref(),
            Kind::Socket { .. } | Kind::Null | Kind::File => None,
        };
        ChardevState {
            identity: self.identity.clone(),
            connected: self.is_connected(),
            pending,
            original: original.map(TermiosState::from),
        }
    }

    /// Gives the terminal back as it was found, and removes the socket path. For the orderly end of the program.
    pub fn close(&mut self) {
        self.output.release();
        self.release_terminal();
        if let Kind::Socket { path, listener: Some(_), .. } = &self.kind {
            let _ = std::fs::remove_file(path);
        }
    }

    /// Sets the terminal's modes again, after another program that had it has ended.
    pub fn reclaim_terminal(&self) {
        if let Kind::Stdio { input: Some(input), original: Some(original), signal } = &self.kind
            && let Err(error) = oslib::term::set(input, &original.make_raw(*signal))
        {
            tracing::debug!(%error, "the terminal is gone");
        }
    }

    fn release_terminal(&mut self) {
        if let Kind::Stdio { original, .. } = &mut self.kind
            && let Some(original) = original.take()
        {
            restore_terminal(&original);
        }
    }
}

impl Drop for Chardev {
    /// A start that fails must not leave a raw terminal behind.
    fn drop(&mut self) {
        self.release_terminal();
    }
}

impl ChardevState {
    /// Of which chardev this is; see [`identity`].
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Another program has sent the output that was still to be sent.
    pub fn forget_output(&mut self) {
        self.pending.clear();
    }

    /// How the terminal was found, if it was one: for a target that does not take the chardev over.
    pub fn terminal(&self) -> Option<Termios> {
        self.original.as_ref().map(Termios::from)
    }
}

fn pending(state: Option<ChardevState>) -> Vec<u8> {
    state.map(|state| state.pending).unwrap_or_default()
}

/// Gives the terminal back as it was found.
pub fn restore_terminal(original: &Termios) {
    // A background process that changes the terminal is stopped by SIGTTOU; the signal is blocked by the main loop.
    if let Err(error) = oslib::term::set(io::stdin(), original) {
        tracing::debug!(%error, "the terminal is gone");
    }
}

fn open_stdio(output: &Output, signal: bool, state: Option<ChardevState>) -> anyhow::Result<Kind> {
    let duplicate = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(Arc::new);
    let input = duplicate(io::stdin().as_fd())?;
    let sink = duplicate(io::stdout().as_fd())?;
    let saved = state.as_ref().map(|state| (state.connected, state.original.as_ref().map(Termios::from)));
    let original = match saved {
        Some((_, original)) => original,
        None => oslib::term::get(&input).ok(),
    };
    if let Some(original) = original {
        match oslib::term::set(&input, &original.make_raw(signal)) {
            // A terminal that hung up during the update must not take the guest with it.
            Err(error) if saved.is_some() => tracing::debug!(%error, "the terminal is gone"),
            result => result?,
        }
    }
    let sink = if oslib::stream::is_regular_file(&sink) { Sink::File(sink) } else { Sink::Blocking(sink) };
    output.connect(sink, pending(state));
    let at_end = saved.is_some_and(|(connected, _)| !connected);
    Ok(Kind::Stdio { input: (!at_end).then_some(input), original, signal })
}

/// Which socket to open.
struct SocketAt<'a> {
    id: &'a str,
    identity: &'a str,
    path: &'a Path,
    server: bool,
    wait: bool,
}

fn open_socket(
    at: &SocketAt<'_>,
    registry: &FdRegistry,
    output: &Output,
    state: Option<ChardevState>,
) -> anyhow::Result<Kind> {
    let SocketAt { id, identity, .. } = *at;
    let name = registry_name(identity);
    let path = std::path::absolute(at.path)?;
    let took_over = state.is_some();
    if state.as_ref().is_some_and(|state| !state.connected) {
        // Its end was seen, but something still held it open when the descriptors were counted.
        registry.delete(&name, CONNECTION);
    }
    let mut connection: Option<Arc<OwnedFd>> = registry.find(&name, CONNECTION);
    if let Some(connection) = &connection {
        output.connect(Sink::Socket(connection.clone()), pending(state));
    }
    if !at.server {
        if connection.is_none() && !took_over {
            let stream = UnixStream::connect(&path)
                .with_context(|| format!("chardev '{id}': cannot connect to {}", path.display()))?;
            connection = Some(connect_output(identity, stream.into(), registry, output, Vec::new())?);
        }
        return Ok(Kind::Socket { path, listener: None, connection });
    }
    let listener: Arc<OwnedFd> = registry
        .find_or_open(&name, LISTENER, FdKind::Socket, FdPolicy::MayBeRebuilt, || bind(&path))
        .with_context(|| format!("chardev '{id}'"))?;
    if at.wait && connection.is_none() && !took_over {
        eprintln!("cpr-vmm: info: waiting for connection on: unix:{},server=on", path.display());
        let stream = loop {
            oslib::stream::wait_readable(&listener)?;
            if let Some(stream) = oslib::stream::accept_nonblocking(&listener)? {
                break stream;
            }
        };
        connection = Some(connect_output(identity, stream, registry, output, Vec::new())?);
    }
    Ok(Kind::Socket { path, listener: Some(listener), connection })
}

fn bind(path: &Path) -> io::Result<OwnedFd> {
    let listener: UnixListener = oslib::uds::bind(path, 0o600).map_err(io::Error::other)?;
    listener.set_nonblocking(true)?;
    Ok(listener.into())
}

fn connect_output(
    identity: &str,
    stream: OwnedFd,
    registry: &FdRegistry,
    output: &Output,
    pending: Vec<u8>,
) -> anyhow::Result<Arc<OwnedFd>> {
    let connection = Arc::new(stream);
    registry.save(
        &registry_name(identity),
        CONNECTION,
        FdKind::Socket,
        FdPolicy::MayBeRebuilt,
        &connection,
    )?;
    output.connect(Sink::Socket(connection.clone()), pending);
    Ok(connection)
}

impl From<&Termios> for TermiosState {
    fn from(t: &Termios) -> Self {
        TermiosState {
            flags: [t.input, t.output, t.control, t.local],
            line: t.line_discipline,
            control: t.special.to_vec(),
            speeds: [t.input_speed, t.output_speed],
        }
    }
}

impl From<&TermiosState> for Termios {
    fn from(s: &TermiosState) -> Self {
        let [input, output, control, local] = s.flags;
        let mut special = [0; oslib::term::SPECIAL_CHARACTERS];
        for (to, from) in special.iter_mut().zip(&s.control) {
            *to = *from;
        }
        Termios {
            input,
            output,
            control,
            local,
            line_discipline: s.line,
            special,
            input_speed: s.speeds[0],
            output_speed: s.speeds[1],
        }
    }
}

/// Refuses two users of one chardev that is no multiplexer.
///
/// # Errors
/// Names the chardev.
pub fn check_users(config: &ChardevConfig, users: usize) -> anyhow::Result<()> {
    if users > 1 && !config.mux {
        bail!("chardev '{}' is used twice; give it mux=on", config.id);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
