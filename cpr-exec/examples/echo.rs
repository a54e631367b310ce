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
use std::time::{Duration, Instant};

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter};
use cpr_core::{
    FdKind, FdPolicy, GuestActivity, Host, Incoming, MemoryRegion, Outcome, Services, Stamp, Step,
    TerminalAction, Update,
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
    /// How long a new program may take without showing progress.
    patience: Duration,
    /// What to execute; by default this very command line.
    command: Vec<OsString>,
}

impl Options {
    fn parse() -> Result<Options, BoxError> {
        let command = std::env::args_os().collect();
        let patience = Duration::from_secs(5);
        let mut options = Options { port: 0, main: MainChannel::Memfd, patience, command };
        let mut words = std::env::args_os().skip(1);
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or("an option needs a value");
            match word.to_str() {
                Some("--port") => options.port = value()?.to_str().unwrap_or_default().parse()?,
                Some("--state") => {
                    options.main = MainChannel::File { path: value()?.into(), offset: 0 };
                }
                Some("--patience-ms") => {
                    options.patience = Duration::from_millis(value()?.to_str().unwrap_or_default().parse()?);
                }
                Some("--command") => options.command = words.by_ref().collect(),
                _ => {
                    return Err(
                        "usage: echo [--port PORT] [--state FILE] [--patience-ms MS] [--command WORD...]"
                            .into(),
                    );
                }
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
    streams: BTreeMap<u64, Arc<TcpStream>>,
    state: State,
    /// Whether clients are served. They are not between stop and resume.
    running: bool,
    /// This is the keeper: the clients are on their way to the new program, and come back only if it fails.
    departed: bool,
    update_wanted: bool,
    /// Where the last act of this program waits for the loop.
    terminal: Option<TerminalAction>,
}

/// What survives as bytes, in a format of this program's own. `cpr-core` does not look into it.
#[derive(Default, Serialize, Deserialize)]
struct State {
    next_id: u64,
    connections: BTreeMap<u64, Connection>,
    /// Connections that wait for an answer to `!update`.
    asked_by: Vec<u64>,
}

#[derive(Default, Serialize, Deserialize)]
struct Connection {
    /// A line that is not complete yet.
    input: Vec<u8>,
    /// What the client has not taken yet.
    output: Vec<u8>,
    /// The client will send no more.
    eof: bool,
}

/// Everything that an update needs of the server, in the old program and in the new one.
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
        // A VMM runs its guest in the keeper, too. Clients could come and go there, but the new program has their sockets
        // as they were when this one left its process.
        self.running = activity == GuestActivity::Running && !self.departed;
        Ok(())
    }

    fn departed(&mut self) -> Result<(), BoxError> {
        self.departed = true;
        Ok(())
    }

    fn save(&mut self, main: &mut FrameWriter) -> Result<(), BoxError> {
        Ok(main.put("echo/server", 0, 1, serde_json::to_vec(&self.state)?)?)
    }

    /// The counterpart, in the new program: state from the section, descriptors from the registry. Until the commit it
    /// must not read from them, or the state would be wrong if the update were refused after all.
    fn load(&mut self, main: &mut Frame) -> Result<(), BoxError> {
        let section = main.require("echo/server", 0)?;
        if section.version != 1 {
            return Err(format!("state section 'echo/server' has version {}", section.version).into());
        }
        self.state = serde_json::from_slice(&section.body)?;
        let registry = self.services.registry.clone();
        self.listen(registry.find("echo/listener", 0).ok_or("the listener is missing")?)?;
        for id in self.state.connections.keys().copied().collect::<Vec<_>>() {
            let stream = registry.find("echo/connection", id);
            self.watch(id, stream.ok_or_else(|| format!("connection {id} is missing"))?)?;
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
            streams: BTreeMap::new(),
            state: State { next_id: FIRST_CONNECTION, ..State::default() },
            running: false,
            departed: false,
            update_wanted: false,
            terminal: None,
        })
    }

    fn listen(&mut self, listener: Arc<TcpListener>) -> io::Result<()> {
        self.epoll.add(&*listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        self.listener = Some(listener);
        Ok(())
    }

    /// Step 1: whoever opens a descriptor that must survive enters it in the registry, under a name that the new
    /// program knows. The entry goes away with the `Arc`, so there is nothing to do when a connection ends.
    fn accept(&mut self) -> Result<(), BoxError> {
        let Some(Ok((stream, _))) = self.listener.as_ref().map(|listener| listener.accept()) else {
            return Ok(());
        };
        stream.set_nonblocking(true)?;
        let (id, stream) = (self.state.next_id, Arc::new(stream));
        self.state.next_id += 1;
        let (kind, policy) = (FdKind::Socket, FdPolicy::MustSurvive);
        self.services.registry.save("echo/connection", id, kind, policy, &stream)?;
        self.state.connections.insert(id, Connection::default());
        Ok(self.watch(id, stream)?)
    }

    fn watch(&mut self, id: u64, stream: Arc<TcpStream>) -> io::Result<()> {
        self.epoll.add(&*stream, self.state.connections[&id].interest(id))?;
        self.streams.insert(id, stream);
        Ok(())
    }

    /// Moves what can be moved. A connection that broke, or has nothing left to say, is forgotten.
    fn serve(&mut self, id: u64) {
        if self.receive(id).and_then(|()| self.send(id)).is_err() {
            self.state.connections.remove(&id);
            if let Some(stream) = self.streams.remove(&id) {
                // Closing does not do it: while a keeper lives, it has a copy of the descriptor.
                let _ = self.epoll.delete(&*stream);
            }
        }
    }

    fn receive(&mut self, id: u64) -> io::Result<()> {
        let (Some(mut stream), Some(connection)) =
            (self.streams.get(&id).map(|stream| &**stream), self.state.connections.get_mut(&id))
        else {
            return Ok(());
        };
        if !connection.interest(id).events().contains(EpollFlags::EPOLLIN) {
            return Ok(());
        }
        let mut buffer = [0; 16 << 10];
        match stream.read(&mut buffer) {
            Ok(0) => connection.eof = true,
            Ok(received) => connection.input.extend(&buffer[..received]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        while let Some(end) = connection.input.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = connection.input.drain(..=end).collect();
            match line.as_slice() {
                b"!generation\n" => {
                    writeln!(connection.output, "!generation {}", self.services.generation)?;
                }
                b"!update\n" => {
                    self.update_wanted = true;
                    self.state.asked_by.push(id);
                }
                line => connection.output.extend(line),
            }
        }
        Ok(())
    }

    fn send(&mut self, id: u64) -> io::Result<()> {
        let (Some(mut stream), Some(connection)) =
            (self.streams.get(&id).map(|stream| &**stream), self.state.connections.get_mut(&id))
        else {
            return Ok(());
        };
        while !connection.output.is_empty() {
            match stream.write(&connection.output) {
                Ok(sent) => drop(connection.output.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if connection.eof && connection.output.is_empty() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(self.epoll.modify(stream, &mut connection.interest(id))?)
    }

    /// Whoever asked for the update gets exactly one answer, from this program or from the next.
    fn answer_update(&mut self, text: &str) {
        eprintln!("echo: {text}");
        for id in std::mem::take(&mut self.state.asked_by) {
            if let Some(connection) = self.state.connections.get_mut(&id) {
                connection.output.extend(format!("!{text}\n").as_bytes());
                self.serve(id);
            }
        }
    }
}

impl Connection {
    fn interest(&self, id: u64) -> EpollEvent {
        let mut flags = EpollFlags::empty();
        flags.set(EpollFlags::EPOLLIN, !self.eof && self.output.len() < MAX_UNSENT);
        flags.set(EpollFlags::EPOLLOUT, !self.output.is_empty());
        EpollEvent::new(flags, id)
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

    /// Step 7: build everything from the state, and only then commit. Up to there this program has read and written
    /// nothing, so whoever it is that goes on after an error finds the connections as the old program left them.
    fn take_over(options: Options, arrival: ExecArrival, started_ns: u64) -> Result<Program, BoxError> {
        let mut main = arrival.source.open(arrival.main);
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
            // Step 5: the exec, from here and from nowhere deeper: no lock is held, no destructor is waiting. It comes back if
            // it failed, with everything as before; or in another process, the keeper, which waits for the new program.
            if let Some(action) = self.server.terminal.take()
                && let Some(mut update) = self.outgoing.take()
            {
                match update.terminal_returned(&mut self.server, action()) {
                    Step::Finished(outcome) => self.ended(outcome),
                    _ => self.outgoing = Some(update),
                }
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
                .signal_mask(self.signal_mask)
                .time_limits(Some(self.options.patience), None);
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
            // Step 4: with `Terminal` the last act is in the slot, and the loop comes by at once.
            Step::Again | Step::Terminal => EpollTimeout::ZERO,
            // In the keeper. A loop with more to do there adds `wait.fds` to its own.
            Step::Wait(_) => EpollTimeout::from(1u8),
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
                if std::mem::take(&mut self.server.departed) {
                    self.come_back();
                }
                // With the new program's last words, which may be several lines.
                self.server.answer_update(&format!("failed: {error}").replace('\n', " "))
            }
            Outcome::Failed { guest: Err(error), .. } => eprintln!("echo: clients cannot be served: {error}"),
            // This is the keeper, and of no use any more.
            Outcome::HandedOver => oslib::process::step_aside(Vec::new(), 0),
        }
    }

    /// The new program failed, so this process is the server from now on, with all of its clients.
    fn come_back(&mut self) {
        self.server.running = true;
        // An epoll instance watches the signals of the process that added the descriptor.
        let signal = EpollEvent::new(EpollFlags::EPOLLIN, SIGNAL);
        let watched = self.server.epoll.delete(&self.signals);
        if let Err(error) = watched.and_then(|()| self.server.epoll.add(&self.signals, signal)) {
            eprintln!("echo: signals go unnoticed: {error}");
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
