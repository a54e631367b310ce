//! Front ends: which bytes of which chardev go to which monitor or serial port, and back.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use vmm_core::virtio::console::HostEnd;

use super::App;
use crate::chardev::{Chardev, Input};
use crate::monitor::mux::{self, Mux};
use crate::monitor::{QmpError, hmp, qmp};

/// How much is read at once.
const READ_LIMIT: usize = 16 << 10;

/// Everything behind one chardev.
#[derive(Debug, Default)]
pub struct FrontEnd {
    /// Who uses it; more than one only with a multiplexer.
    pub users: Vec<User>,
    /// Switches between them.
    pub mux: Option<Mux>,
}

/// One user of a chardev.
#[derive(Debug)]
pub enum User {
    /// COM1; holds input that its FIFO has no room for.
    Serial(VecDeque<u8>),
    /// A port of a virtio console; holds input that it has no room for.
    Console(HostEnd, VecDeque<u8>),
    /// A monitor for people. `None` while nobody is connected.
    Hmp(Option<Box<hmp::Session>>),
    /// A monitor for programs. `None` while nobody is connected.
    Qmp(Option<Box<qmp::Session>>),
}

/// A QMP event on its way to the monitors.
pub(super) struct PendingEvent {
    name: &'static str,
    data: Option<Value>,
    at: Duration,
}

impl FrontEnd {
    /// Whether the user in focus takes input now.
    fn wants_input(&self) -> bool {
        // A multiplexer must always see its escape character; what its users cannot take they keep.
        if self.mux.is_some() {
            return true;
        }
        self.users.iter().all(User::wants_input) && !self.users.is_empty()
    }

    /// Starts sessions for a peer that has just connected.
    pub fn connect(&mut self, id: &str) {
        let muxed = self.mux.is_some();
        for user in &mut self.users {
            match user {
                User::Hmp(session) if session.is_none() => {
                    let new = if muxed { hmp::Session::new_muxed(id) } else { hmp::Session::new(id) };
                    *session = Some(Box::new(new));
                }
                User::Qmp(session) if session.is_none() => *session = Some(Box::new(qmp::Session::new(id))),
                User::Hmp(_) | User::Qmp(_) | User::Serial(_) | User::Console(..) => {}
            }
        }
    }

    /// Tells the guest's consoles who is at the other end of the chardev, and how large that is.
    pub fn tell_consoles(&self, chardev: &Chardev) {
        for user in &self.users {
            if let User::Console(end, _) = user {
                end.set_connected(chardev.is_connected());
                end.set_size(chardev.window().unwrap_or_default());
            }
        }
    }

    /// Whether one of its users is the guest's.
    pub fn is_guests(&self) -> bool {
        self.users.iter().any(User::is_guests)
    }

    /// How many of its users are virtio consoles.
    pub(super) fn consoles(&self) -> u32 {
        self.users.iter().map(|user| u32::from(matches!(user, User::Console(..)))).sum()
    }

    /// Input that each of its virtio consoles has no room for.
    pub(super) fn console_inputs(&self) -> Vec<Vec<u8>> {
        let of = |user: &User| match user {
            User::Console(_, waiting) => Some(waiting.iter().copied().collect()),
            User::Serial(_) | User::Hmp(_) | User::Qmp(_) => None,
        };
        self.users.iter().filter_map(of).collect()
    }

    /// Input for one of its virtio consoles that comes before what was read here.
    pub(super) fn give_console_input(&mut self, console: usize, input: Vec<u8>) {
        let mut consoles = self.users.iter_mut().filter_map(|user| match user {
            User::Console(_, waiting) => Some(waiting),
            User::Serial(_) | User::Hmp(_) | User::Qmp(_) => None,
        });
        if let Some(waiting) = consoles.nth(console) {
            let later = std::mem::replace(waiting, input.into());
            waiting.extend(later);
        }
    }

    /// Whether it belongs to the guest, and to no monitor.
    pub fn is_guests_only(&self) -> bool {
        self.mux.is_none() && matches!(&self.users[..], [user] if user.is_guests())
    }

    fn disconnect(&mut self) {
        for user in &mut self.users {
            match user {
                User::Hmp(session) => *session = None,
                User::Qmp(session) => *session = None,
                User::Serial(_) | User::Console(..) => {}
            }
        }
    }
}

impl User {
    fn is_guests(&self) -> bool {
        matches!(self, User::Serial(_) | User::Console(..))
    }

    fn wants_input(&self) -> bool {
        match self {
            User::Serial(waiting) | User::Console(_, waiting) => waiting.is_empty(),
            User::Hmp(session) => session.as_ref().is_some_and(|s| s.wants_input()),
            User::Qmp(session) => session.as_ref().is_some_and(|s| s.wants_input()),
        }
    }

    fn feed(&mut self, bytes: Vec<u8>, fds: Vec<std::os::fd::OwnedFd>) {
        match self {
            User::Serial(waiting) | User::Console(_, waiting) => waiting.extend(bytes),
            User::Hmp(Some(session)) => session.feed(&bytes, fds),
            User::Qmp(Some(session)) => session.feed(&bytes, fds),
            User::Hmp(None) | User::Qmp(None) => {}
        }
    }
}

impl App {
    pub(super) fn wants_input(&self, at: usize) -> bool {
        let front_end = &self.parts.front_ends[at];
        // What comes for the serial line while the guest is not here stays where it is: monitors are read, nothing else.
        front_end.wants_input() && !(front_end.is_guests_only() && self.guest_is_away())
    }

    pub(super) fn serial_is_full(&self) -> bool {
        let mut users = self.parts.front_ends.iter().flat_map(|f| &f.users);
        !self.guest_is_away()
            && users.any(|user| matches!(user, User::Serial(waiting) if !waiting.is_empty()))
    }

    /// Consoles that had no room for input, and have some again as soon as these are readable.
    pub(super) fn full_consoles(&self) -> impl Iterator<Item = &HostEnd> {
        let users = self.parts.front_ends.iter().flat_map(|f| &f.users);
        users.filter_map(|user| match user {
            User::Console(end, waiting) if !waiting.is_empty() => Some(end),
            _ => None,
        })
    }

    pub(super) fn accept(&mut self, at: usize) -> anyhow::Result<()> {
        let chardev = &mut self.parts.chardevs[at];
        if chardev.accept(&self.parts.services.registry)? {
            self.parts.front_ends[at].connect(chardev.id());
            self.parts.front_ends[at].tell_consoles(chardev);
        }
        Ok(())
    }

    pub(super) fn read_input(&mut self, at: usize) {
        if !self.wants_input(at) {
            return;
        }
        match self.parts.chardevs[at].read(READ_LIMIT) {
            Input::Nothing => {}
            Input::Closed => {
                self.parts.front_ends[at].disconnect();
                self.parts.front_ends[at].tell_consoles(&self.parts.chardevs[at]);
            }
            Input::Data(bytes, fds) => self.feed(at, bytes, fds),
        }
    }

    fn feed(&mut self, at: usize, bytes: Vec<u8>, fds: Vec<std::os::fd::OwnedFd>) {
        let front_end = &mut self.parts.front_ends[at];
        let Some(mux) = &mut front_end.mux else {
            if let Some(user) = front_end.users.first_mut() {
                user.feed(bytes, fds);
            }
            return;
        };
        for event in mux.feed(&bytes) {
            match event {
                mux::Event::Input { front_end: user, bytes } => {
                    self.parts.front_ends[at].users[user].feed(bytes, Vec::new());
                }
                mux::Event::Switched { from, to } => {
                    // What was typed before the switch is done before it.
                    self.process_user(at, from);
                    let users = &mut self.parts.front_ends[at].users;
                    if let User::Hmp(Some(session)) = &mut users[from] {
                        session.deactivate();
                    }
                    if let User::Hmp(Some(session)) = &mut users[to] {
                        session.activate();
                    }
                }
                mux::Event::Help => self.parts.chardevs[at].output().write(mux::HELP.as_bytes()),
                mux::Event::Terminate => {
                    self.parts.chardevs[at].output().write(mux::TERMINATED.as_bytes());
                    self.exit.get_or_insert(super::Exit::Quit);
                }
                // The emulated UART reports no break.
                mux::Event::Break { .. } => {}
            }
        }
    }

    /// Lets every session handle its input, and passes on what they print.
    pub(super) fn process_front_ends(&mut self) {
        self.resumed = false;
        if self.departed {
            return;
        }
        for at in 0..self.parts.front_ends.len() {
            for user in 0..self.parts.front_ends[at].users.len() {
                self.process_user(at, user);
            }
        }
        self.deliver_events();
    }

    fn process_user(&mut self, at: usize, user: usize) {
        let is_away = self.guest_is_away();
        let slot = &mut self.parts.front_ends[at].users[user];
        match slot {
            User::Serial(waiting) => {
                // Before the port's own state is there, and after it was saved, input would be lost to it.
                if let Some(hardware) = self.parts.hardware.as_ref().filter(|_| !is_away) {
                    let accepted = hardware.machine.serial().enqueue(waiting.make_contiguous());
                    waiting.drain(..accepted);
                }
            }
            User::Console(end, waiting) => {
                if !is_away {
                    let accepted = end.put(waiting.make_contiguous());
                    waiting.drain(..accepted);
                    // Looked up each time, because windows are resized.
                    end.set_size(self.parts.chardevs[at].window().unwrap_or_default());
                }
            }
            // Taken out meanwhile: commands act on the whole program.
            User::Hmp(session) => {
                let Some(mut session) = session.take() else { return };
                // Looked up each time, because windows are resized.
                session.set_columns(self.parts.chardevs[at].columns());
                loop {
                    session.process(self);
                    let written = session.output().len();
                    self.parts.chardevs[at].output().write(session.output());
                    session.consume_output(written);
                    if session.is_waiting() || session.wants_input() {
                        break;
                    }
                }
                self.parts.front_ends[at].users[user] = User::Hmp(Some(session));
            }
            User::Qmp(session) => {
                let Some(mut session) = session.take() else { return };
                loop {
                    session.process(self);
                    let written = session.output().len();
                    self.parts.chardevs[at].output().write(session.output());
                    session.consume_output(written);
                    if session.is_waiting() || session.wants_input() {
                        break;
                    }
                }
                self.parts.front_ends[at].users[user] = User::Qmp(Some(session));
            }
        }
    }

    fn send_qmp(&mut self, at: usize, user: usize) {
        if let User::Qmp(Some(session)) = &mut self.parts.front_ends[at].users[user] {
            let written = session.output().len();
            self.parts.chardevs[at].output().write(session.output());
            session.consume_output(written);
        }
    }

    /// Queues a QMP event for every negotiated monitor.
    pub(super) fn emit(&mut self, name: &'static str, data: Option<Value>) {
        // The monitors are another program's: it has been told to stop already, and will say that it resumed.
        if self.departed {
            return;
        }
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.pending_events.push(PendingEvent { name, data, at });
    }

    pub(super) fn deliver_events(&mut self) {
        let events = std::mem::take(&mut self.pending_events);
        if events.is_empty() {
            return;
        }
        for at in 0..self.parts.front_ends.len() {
            for user in 0..self.parts.front_ends[at].users.len() {
                if let User::Qmp(Some(session)) = &mut self.parts.front_ends[at].users[user] {
                    for event in &events {
                        session.event(event.name, event.data.as_ref(), event.at);
                    }
                }
                self.send_qmp(at, user);
            }
        }
    }

    /// Ends the wait of a monitor whose command was the update that is over now.
    pub(super) fn resume_suspended(&mut self) {
        if !std::mem::take(&mut self.suspended) {
            return;
        }
        let result = || match &self.progress.error {
            Some(error) => Err(QmpError::generic(error.clone())),
            None => Ok(Value::Object(serde_json::Map::new())),
        };
        for user in self.parts.front_ends.iter_mut().flat_map(|f| &mut f.users) {
            match user {
                User::Hmp(Some(session)) => session.resume(result()),
                User::Qmp(Some(session)) => session.resume(result()),
                User::Hmp(None) | User::Qmp(None) | User::Serial(_) | User::Console(..) => {}
            }
        }
        self.resumed = true;
    }
}
