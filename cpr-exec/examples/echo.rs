//! A TCP echo server that replaces itself by exec and keeps every connection: how to use `cpr-exec` in a program with a
//! main loop, a state format and components of its own.
//!
//! ```text
//! $ cargo run -p cpr-exec --example echo -- --port 7007     # from another terminal: nc 127.0.0.1 7007
//! ```
//!
//! Each line comes back as it was sent, except for two: `!generation` tells how many updates the server has been
//! through, and `!update` (or SIGUSR1) makes it execute its own command line, so that a newer binary takes over. What a
//! client has sent half, and what it has not taken yet, survives. Read from `main` downwards; the steps of an update are
//! numbered.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use cpr_core::error::BoxError;
use cpr_core::frame::Frame;
use cpr_core::{
    FdKind, FdPolicy, GuestActivity, Host, Incoming, MemoryRegion, Outcome, Services, Stamp, StateWriter,
    Step, TerminalAction, Update,
};
use cpr_exec::{CprExec, ExecArrival, KeeperEnd, MainChannel};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use oslib::signals::{self, SignalFd, SignalMask};
use serde::{Deserialize, Serialize};

/// The number of SIGUSR1 on Linux x86-64, signal(7).
const SIGUSR1: i32 = 10;
/// Bytes that a client may leave untaken before the server stops reading from it.
const MAX_UNSENT: usize = 1 << 20;

// What an epoll event is about. Every other number is the id of a connection.
const LISTENER: u64 = 0;
const SIGNAL: u64 = 1;
const KEEPER: u64 = 2;
const FIRST_CONNECTION: u64 = 3;

fn main() -> ExitCode {
    // Step 6, in the new program: before anything is opened, take what the previous program left. An ordinary start finds
    // nothing; an environment that belongs to an update which this version does not know is an error.
    let started_ns = oslib::clock::monotonic_ns();
    let result = cpr_exec::receive().map_err(BoxError::from).and_then(|arrival| {
        let options = Options::parse()?;
        let mut program = match arrival {
            None => Program::start(options)?,
            Some(arrival) => Program::take_over(options, arrival, started_ns)?,
        };
        program.run()
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("echo: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Options {
    port: u16,
    /// The file for the server's state; by default it stays in memory.
    main: MainChannel,
    /// What to execute; by default this very command line.
    command: Vec<OsString>,
}

impl Options {
    fn parse() -> Result<Options, BoxError> {
        let command = std::env::args_os().collect();
        let mut options = Options { port: 0, main: MainChannel::Memfd, command };
        let mut words = std::env::args_os().skip(1);
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or("an option needs a value");
            match word.to_str() {
                Some("--port") => options.port = value()?.to_str().unwrap_or_default().parse()?,
                Some("--state") => {
                    options.main = MainChannel::File { path: value()?.into(), offset: 0 };
                }
                Some("--command") => options.command = words.by_ref().collect(),
                _ => return Err("usage: echo [--port PORT] [--state FILE] [--command WORD...]".into()),
            }
        }
        Ok(options)
    }
}

/// The server itself, which is what a virtual machine is to a VMM: the "guest" whose life goes on.
struct Server {
    services: Services,
    epoll: Epoll,
    listener: Option<Arc<TcpListener>>,
    connections: BTreeMap<u64, Connection>,
    next_id: u64,
    /// Whether clients are served. They are not between stop and resume.
    running: bool,
    update_wanted: bool,
    /// Connections that wait for an answer to `!update`.
    asked_by: Vec<u64>,
    /// Where the last act of this program waits for the loop.
    terminal: Option<TerminalAction>,
}

struct Connection {
    stream: Arc<TcpStream>,
    saved: SavedConnection,
}

/// The server's state in its own format. `cpr-core` does not look into it.
#[derive(Serialize, Deserialize)]
struct Saved<C> {
    next_id: u64,
    asked_by: Vec<u64>,
    connections: Vec<C>,
}

#[derive(Default, Serialize, Deserialize)]
struct SavedConnection {
    id: u64,
    /// A line that is not complete yet.
    input: Vec<u8>,
    /// What the client has not taken yet.
    output: Vec<u8>,
    /// The client will send no more.
    eof: bool,
}

/// Everything that an update needs of the server.
impl Host for Server {
    /// There is no guest memory to lose. A VMM lists all of its RAM here, and each region names its registry entry.
    fn memory(&self) -> Vec<MemoryRegion> {
        Vec::new()
    }

    /// A VMM parks its vCPUs here. This server has one thread, and that thread is here, so nothing runs already.
    fn stop(&mut self, _deadline: Instant) -> Result<GuestActivity, BoxError> {
        self.running = false;
        Ok(GuestActivity::Running)
    }

    fn resume(&mut self, activity: GuestActivity) -> Result<(), BoxError> {
        self.running = activity == GuestActivity::Running;
        Ok(())
    }

    fn save(&mut self, state: &mut StateWriter) -> Result<(), BoxError> {
        let connections = self.connections.values().map(|connection| &connection.saved).collect();
        let saved = Saved { next_id: self.next_id, asked_by: self.asked_by.clone(), connections };
        Ok(state.main.put("echo/server", 0, 1, serde_json::to_vec(&saved)?)?)
    }

    /// The counterpart, in the next program: state from the section, descriptors from the registry. Until the commit
    /// it must not read from them, or the state would be wrong if the update were refused after all.
    fn load(&mut self, main: &mut Frame) -> Result<(), BoxError> {
        let section = main.require("echo/server", 0)?;
        if section.version != 1 {
            return Err(format!("state section 'echo/server' has version {}", section.version).into());
        }
        let saved: Saved<SavedConnection> = serde_json::from_slice(&section.body)?;
        (self.next_id, self.asked_by) = (saved.next_id, saved.asked_by);
        let listener = self.services.registry.find("echo/listener", 0).ok_or("the listener is missing")?;
        self.listen(listener)?;
        for saved in saved.connections {
            let found = self.services.registry.find("echo/connection", saved.id);
            let stream = found.ok_or_else(|| format!("connection {} is missing", saved.id))?;
            self.add(Connection { stream, saved })?;
        }
        Ok(())
    }

    fn request_terminal(&mut self, action: TerminalAction) {
        self.terminal = Some(action);
    }
}

impl Server {
    fn new(services: Services) -> io::Result<Server> {
        Ok(Server {
            services,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            listener: None,
            connections: BTreeMap::new(),
            next_id: FIRST_CONNECTION,
            running: false,
            update_wanted: false,
            asked_by: Vec::new(),
            terminal: None,
        })
    }

    fn listen(&mut self, listener: Arc<TcpListener>) -> io::Result<()> {
        self.epoll.add(&*listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        self.listener = Some(listener);
        Ok(())
    }

    /// Step 1: whoever opens a descriptor that must survive enters it in the registry, under a name that the next
    /// program knows. The entry goes away with the `Arc`, so there is nothing to do when a connection ends.
    fn accept(&mut self) -> Result<(), BoxError> {
        let Some(listener) = &self.listener else { return Ok(()) };
        let stream = match listener.accept() {
            Ok((stream, _)) => Arc::new(stream),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => {
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        stream.set_nonblocking(true)?;
        let id = self.next_id;
        self.next_id += 1;
        let (kind, policy) = (FdKind::Socket, FdPolicy::MustSurvive);
        self.services.registry.save("echo/connection", id, kind, policy, &stream)?;
        self.add(Connection { stream, saved: SavedConnection { id, ..SavedConnection::default() } })?;
        Ok(())
    }

    fn add(&mut self, connection: Connection) -> io::Result<()> {
        self.epoll.add(&*connection.stream, connection.interest())?;
        self.connections.insert(connection.saved.id, connection);
        Ok(())
    }

    /// Moves what can be moved, or forgets the connection.
    fn serve(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let lines = match connection.transfer() {
            Ok(lines) => lines,
            Err(_) => return self.forget(id),
        };
        for line in lines {
            match line.as_slice() {
                b"!generation\n" => self.answer(id, &format!("!generation {}", self.services.generation)),
                b"!update\n" => {
                    self.update_wanted = true;
                    self.asked_by.push(id);
                }
                line => connection_output(&mut self.connections, id, line),
            }
        }
        self.flush(id);
    }

    fn flush(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let alive = connection.send().and_then(|()| {
            self.epoll.modify(&*connection.stream, &mut connection.interest()).map_err(io::Error::from)
        });
        if alive.is_err() || connection.saved.eof && connection.saved.output.is_empty() {
            self.forget(id);
        }
    }

    fn forget(&mut self, id: u64) {
        if let Some(connection) = self.connections.remove(&id) {
            // Closing is not enough: while a keeper lives, it has a copy of the descriptor.
            let _ = self.epoll.delete(&*connection.stream);
        }
    }

    fn answer(&mut self, id: u64, text: &str) {
        connection_output(&mut self.connections, id, format!("{text}\n").as_bytes());
    }

    fn answer_update(&mut self, text: &str) {
        eprintln!("echo: {text}");
        for id in std::mem::take(&mut self.asked_by) {
            self.answer(id, &format!("!{text}"));
            self.flush(id);
        }
    }
}

fn connection_output(connections: &mut BTreeMap<u64, Connection>, id: u64, bytes: &[u8]) {
    if let Some(connection) = connections.get_mut(&id) {
        connection.saved.output.extend(bytes);
    }
}

impl Connection {
    fn interest(&self) -> EpollEvent {
        let mut flags = EpollFlags::empty();
        flags.set(EpollFlags::EPOLLIN, !self.saved.eof && self.saved.output.len() < MAX_UNSENT);
        flags.set(EpollFlags::EPOLLOUT, !self.saved.output.is_empty());
        EpollEvent::new(flags, self.saved.id)
    }

    fn send(&mut self) -> io::Result<()> {
        while !self.saved.output.is_empty() {
            match (&*self.stream).write(&self.saved.output) {
                Ok(sent) => drop(self.saved.output.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends, then receives once, and gives the lines that are complete now.
    fn transfer(&mut self) -> io::Result<Vec<Vec<u8>>> {
        self.send()?;
        if self.saved.eof || self.saved.output.len() >= MAX_UNSENT {
            return Ok(Vec::new());
        }
        let mut buffer = [0; 16 << 10];
        match (&*self.stream).read(&mut buffer) {
            Ok(0) => self.saved.eof = true,
            Ok(received) => self.saved.input.extend(&buffer[..received]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        let complete = self.saved.input.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let rest = self.saved.input.split_off(complete);
        let complete = std::mem::replace(&mut self.saved.input, rest);
        Ok(complete.split_inclusive(|&byte| byte == b'\n').map(<[u8]>::to_vec).collect())
    }
}

/// The server and what surrounds it: the loop, signals, and at most one update at a time, going out or just come in.
struct Program {
    options: Options,
    server: Server,
    signals: SignalFd,
    /// The signal mask that the first program was started with. It is handed on from program to program.
    signal_mask: SignalMask,
    outgoing: Option<Update>,
    /// An update that came in, and the process that still holds what the old program had.
    incoming: Option<(Incoming, KeeperEnd)>,
}

impl Program {
    fn start(options: Options) -> Result<Program, BoxError> {
        let mut server = Server::new(Services::default())?;
        let listener = Arc::new(TcpListener::bind((Ipv4Addr::LOCALHOST, options.port))?);
        listener.set_nonblocking(true)?;
        let (kind, policy) = (FdKind::Socket, FdPolicy::MustSurvive);
        server.services.registry.save("echo/listener", 0, kind, policy, &listener)?;
        println!("{}", listener.local_addr()?.port());
        server.listen(listener)?;
        server.running = true;
        Program::new(options, server, signals::current()?, None)
    }

    /// Step 7: build everything from the state, and only then commit. Up to there the old program's connections are
    /// as they were, and any error ends this program without a byte lost to it.
    fn take_over(options: Options, arrival: ExecArrival, started_ns: u64) -> Result<Program, BoxError> {
        let mut main = arrival.main_source(arrival.main.clone());
        let mut services = Services::default();
        let mut incoming = Incoming::begin(&mut services, arrival.arrival)?;
        incoming.control().timeline().stamp_at(Stamp::TargetStarted, started_ns);
        let mut server = Server::new(services)?;
        incoming.control().timeline().stamp(Stamp::Built);
        incoming.load(&mut server, &mut *main)?;
        incoming.commit(&mut server)?;
        // Committed: the server runs here, and whatever goes wrong from now on is an ordinary error of an ordinary server.
        incoming.control().timeline().stamp_last(Stamp::LastEntry);
        let pause_us = incoming.report().blackout_ns.unwrap_or_default() / 1000;
        let text = format!("updated to generation {} in {pause_us} us", server.services.generation);
        server.answer_update(&text);

        // Step 8: the keeper learns of the commit, and ends in its own time. The loop waits for that.
        let incoming = match arrival.keeper {
            Some(keeper) => {
                keeper.release()?;
                server.epoll.add(&keeper, EpollEvent::new(EpollFlags::EPOLLIN, KEEPER))?;
                Some((incoming, keeper))
            }
            None => None,
        };
        Program::new(options, server, arrival.signal_mask, incoming)
    }

    fn new(
        options: Options,
        server: Server,
        signal_mask: SignalMask,
        incoming: Option<(Incoming, KeeperEnd)>,
    ) -> Result<Program, BoxError> {
        let signals = SignalFd::new(SignalMask::of(&[SIGUSR1]))?;
        server.epoll.add(&signals, EpollEvent::new(EpollFlags::EPOLLIN, SIGNAL))?;
        // Step 9: across the exec every signal was blocked. Now that somebody listens, those that came are delivered.
        signals::set_mask(signal_mask.with(SIGUSR1))?;
        Ok(Program { options, server, signals, signal_mask, outgoing: None, incoming })
    }

    fn run(&mut self) -> Result<(), BoxError> {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            // Step 5: the exec, from here and from nowhere deeper: no lock is held, no destructor is waiting. It comes back
            // only if it failed, with everything as before.
            if let Some(action) = self.server.terminal.take()
                && let Some(mut update) = self.outgoing.take()
            {
                let error = action();
                let outcome = update.terminal_failed(&mut self.server, error);
                self.ended(outcome);
            }
            let timeout = self.step_update();
            let ready = match self.server.epoll.wait(&mut events, timeout) {
                Err(Errno::EINTR) => 0,
                ready => ready?,
            };
            for event in &events[..ready] {
                match event.data() {
                    SIGNAL => {
                        while self.signals.read()?.is_some() {
                            self.server.update_wanted = true;
                        }
                    }
                    KEEPER => self.reap_keeper()?,
                    LISTENER if self.server.running => self.server.accept()?,
                    id if self.server.running => self.server.serve(id),
                    // Whatever clients do while the server is stopped, the next program finds it in the socket.
                    _ => {}
                }
            }
        }
    }

    /// One step per turn of the loop. Answers how long the loop may sleep.
    fn step_update(&mut self) -> EpollTimeout {
        // Step 2: begin, but not before the last update is cleaned up: its keeper is this process's child to reap.
        if self.server.update_wanted && self.outgoing.is_none() && self.incoming.is_none() {
            self.server.update_wanted = false;
            let mode = CprExec::new(self.options.command.clone(), self.options.main.clone())
                .signal_mask(self.signal_mask);
            match Update::begin(&self.server.services, Box::new(mode), &self.server) {
                Ok(update) => self.outgoing = Some(update),
                Err(error) => self.server.answer_update(&format!("failed: {error}")),
            }
        }
        let Some(update) = &mut self.outgoing else { return EpollTimeout::NONE };
        // Step 3: the update calls the server (stop, save) and the mode as it goes.
        let step = update.step(&mut self.server);
        if update.has_stopped_guest() {
            update.control().timeline().stamp_first(Stamp::FirstExit);
        }
        match step {
            Step::Again => EpollTimeout::ZERO,
            // Step 4: the last act is in the slot, and the loop is about to come by.
            Step::Terminal => EpollTimeout::ZERO,
            // Not in this mode. With one that has a second process, the loop waits for `wait.fd` as well.
            Step::Wait(_) => EpollTimeout::from(10u8),
            Step::Finished(outcome) => {
                self.ended(outcome);
                EpollTimeout::ZERO
            }
        }
    }

    fn ended(&mut self, outcome: Outcome) {
        self.outgoing = None;
        match outcome {
            Outcome::Failed { error, guest: Ok(()) } => {
                self.server.answer_update(&format!("failed: {error}"))
            }
            Outcome::Failed { guest: Err(error), .. } => eprintln!("echo: clients cannot be served: {error}"),
            // Not in this mode, where the target is this very process.
            Outcome::HandedOver => std::process::exit(0),
        }
    }

    /// Step 10: nothing is left of the old program.
    fn reap_keeper(&mut self) -> Result<(), BoxError> {
        if let Some((mut incoming, keeper)) = self.incoming.take() {
            self.server.epoll.delete(&keeper)?;
            keeper.reap()?;
            incoming.released();
        }
        Ok(())
    }
}
