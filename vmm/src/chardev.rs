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
use oslib::term::Termios;
use serde::{Deserialize, Serialize};
use vmm_core::serial::SerialSink;

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

fn registry_name(id: &str) -> String {
    format!("chardev/{id}")
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
        while !self.pending.is_empty() {
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

/// The output of a chardev; clones share it, so that a vCPU thread can write serial output itself.
#[derive(Debug, Clone, Default)]
pub struct Output(Arc<Mutex<OutputState>>);

impl Output {
    fn lock(&self) -> std::sync::MutexGuard<'_, OutputState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends `bytes`, now or as soon as the peer takes them.
    pub fn write(&self, bytes: &[u8]) {
        self.lock().write(bytes);
    }

    fn flush(&self) {
        self.lock().flush();
    }

    fn has_pending(&self) -> bool {
        !self.lock().pending.is_empty()
    }

    fn connect(&self, sink: Sink, pending: Vec<u8>) {
        *self.lock() = OutputState { sink, pending: pending.into(), dropped: 0 };
    }
}

impl SerialSink for Output {
    fn write(&mut self, bytes: &[u8]) {
        Output::write(self, bytes);
    }
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
    Stdio { input: Option<Arc<OwnedFd>>, original: Option<Termios> },
    Socket { path: PathBuf, listener: Option<Arc<OwnedFd>>, connection: Option<Arc<OwnedFd>> },
}

/// One chardev.
pub struct Chardev {
    id: String,
    kind: Kind,
    output: Output,
}

/// A chardev on its way to the next program, version 1. Its descriptors travel in the registry.
#[derive(Debug, Serialize, Deserialize)]
pub struct ChardevState {
    id: String,
    path: Option<PathBuf>,
    connected: bool,
    pending: Vec<u8>,
    original: Option<TermiosState>,
}

/// Terminal modes as plain numbers.
#[derive(Debug, Serialize, Deserialize)]
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
        let output = Output::default();
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
                open_socket(&id, path, *server, *wait, registry, &output, state)?
            }
        };
        Ok(Chardev { id, kind, output })
    }

    /// The id.
    pub fn id(&self) -> &str {
        &self.id
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

    /// What the loop should watch for chardev number `at`. `wants_input`: its front end takes bytes now.
    pub fn interests(&self, at: usize, wants_input: bool) -> Vec<Interest> {
        let mut interests = Vec::new();
        match &self.kind {
            Kind::Null => {}
            Kind::Stdio { input, .. } => {
                interests.extend(
                    input.iter().filter(|_| wants_input).map(|fd| Interest::read(fd, Token::Peer(at))),
                );
            }
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
        let output = self.output.lock();
        if !output.pending.is_empty() {
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
        *connection = Some(connect_output(&self.id, stream, registry, &self.output, Vec::new())?);
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

    /// What the next program needs, besides the descriptors.
    pub fn save(&self) -> ChardevState {
        let (path, connected, original) = match &self.kind {
            Kind::Socket { path, connection, .. } => (Some(path.clone()), connection.is_some(), None),
            Kind::Stdio { input, original } => (None, input.is_some(), original.as_ref()),
            Kind::Null | Kind::File => (None, true, None),
        };
        let pending = self.output.lock().pending.iter().copied().collect();
        ChardevState {
            id: self.id.clone(),
            path,
            connected,
            pending,
            original: original.map(TermiosState::from),
        }
    }

    /// Gives the terminal back as it was found, and removes the socket path. For the orderly end of the program.
    pub fn close(&mut self) {
        self.flush();
        match &self.kind {
            Kind::Stdio { original: Some(original), .. } => restore_terminal(original),
            Kind::Socket { path, listener: Some(_), .. } => {
                let _ = std::fs::remove_file(path);
            }
            _ => {}
        }
    }
}

impl ChardevState {
    /// Of which chardev this is.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Gives the terminal back, for a target that ends before it could take the chardev over.
    pub fn restore_terminal(&self) {
        if let Some(original) = &self.original {
            restore_terminal(&original.into());
        }
    }
}

fn pending(state: Option<ChardevState>) -> Vec<u8> {
    state.map(|state| state.pending).unwrap_or_default()
}

fn restore_terminal(original: &Termios) {
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
        oslib::term::set(&input, &original.make_raw(signal))?;
    }
    let sink = if oslib::stream::is_regular_file(&sink) { Sink::File(sink) } else { Sink::Blocking(sink) };
    output.connect(sink, pending(state));
    let at_end = saved.is_some_and(|(connected, _)| !connected);
    Ok(Kind::Stdio { input: (!at_end).then_some(input), original })
}

fn open_socket(
    id: &str,
    path: &Path,
    server: bool,
    wait: bool,
    registry: &FdRegistry,
    output: &Output,
    state: Option<ChardevState>,
) -> anyhow::Result<Kind> {
    let name = registry_name(id);
    let path = std::path::absolute(path)?;
    let same = state.filter(|state| state.path.as_deref() == Some(&path));
    if same.is_none() {
        // A chardev of the same id but another path: its predecessor's sockets are not ours to keep.
        registry.delete(&name, LISTENER);
        registry.delete(&name, CONNECTION);
    }
    let took_over = same.is_some();
    let mut connection: Option<Arc<OwnedFd>> = registry.find(&name, CONNECTION);
    if let Some(connection) = &connection {
        output.connect(Sink::Socket(connection.clone()), pending(same));
    }
    if !server {
        if connection.is_none() && !took_over {
            let stream = UnixStream::connect(&path)
                .with_context(|| format!("chardev '{id}': cannot connect to {}", path.display()))?;
            connection = Some(connect_output(id, stream.into(), registry, output, Vec::new())?);
        }
        return Ok(Kind::Socket { path, listener: None, connection });
    }
    let listener: Arc<OwnedFd> = registry
        .find_or_open(&name, LISTENER, FdKind::Socket, FdPolicy::MayBeRebuilt, || bind(&path))
        .with_context(|| format!("chardev '{id}'"))?;
    if wait && connection.is_none() && !took_over {
        eprintln!("cpr-vmm: info: waiting for connection on: unix:{},server=on", path.display());
        let stream = loop {
            oslib::stream::wait_readable(&listener)?;
            if let Some(stream) = oslib::stream::accept_nonblocking(&listener)? {
                break stream;
            }
        };
        connection = Some(connect_output(id, stream, registry, output, Vec::new())?);
    }
    Ok(Kind::Socket { path, listener: Some(listener), connection })
}

fn bind(path: &Path) -> io::Result<OwnedFd> {
    let listener: UnixListener = oslib::uds::bind(path, 0o600).map_err(io::Error::other)?;
    listener.set_nonblocking(true)?;
    Ok(listener.into())
}

fn connect_output(
    id: &str,
    stream: OwnedFd,
    registry: &FdRegistry,
    output: &Output,
    pending: Vec<u8>,
) -> anyhow::Result<Arc<OwnedFd>> {
    let connection = Arc::new(stream);
    registry.save(&registry_name(id), CONNECTION, FdKind::Socket, FdPolicy::MayBeRebuilt, &connection)?;
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
