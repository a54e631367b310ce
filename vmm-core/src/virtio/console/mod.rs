//! virtio-console: consoles of the guest on character devices of the program (virtio 1.2, 5.3; QEMU's `virtio-serial`
//! with `virtconsole` ports).
//!
//! A port has an [`OutputSink`] for what the guest writes, and a [`HostEnd`] by which the program brings input and says who
//! is connected. The device moves bytes between these and the queues and keeps none itself: input waits in the host's end,
//! output in the guest's memory. So what an update must keep is the input, how far a request was passed on, and what driver
//! and device know of each other. What the driver is still to be told of a port is a set and not a queue of messages.

mod control;
mod host;
mod state;

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter};
use cpr_core::section::SectionType;
use virtio_queue::QueueOwnedT;

use self::control::{FromDriver, HEADER_LEN, Message, Owed};
pub use self::host::{HostEnd, INBOX_LEN, Size};
pub use self::state::ConsoleState;
use self::state::PortState;
use super::requests::{self, AnotherTurn};
use super::{
    Broken, Class, Direction, Drained, Driver, Persistent, SectionVersions, VirtioDevice, Watch, WatchToken,
};
use crate::output::OutputSink;
use crate::state::Blob;

/// The most ports, as in QEMU.
pub const MAX_PORTS: u32 = 31;

/// Entries of the queues, as QEMU has them; and the most requests that are served in one turn.
const PORT_QUEUE_SIZE: u16 = 128;
const CONTROL_QUEUE_SIZE: u16 = 32;
/// The most bytes that the guest may write in one turn.
const OUTPUT_PER_TURN: usize = 1 << 20;
/// How much of it is copied at once.
const PIECE: usize = 16 << 10;

const F_SIZE: u32 = 0;
const F_MULTIPORT: u32 = 1;
const F_EMERG_WRITE: u32 = 2;

/// Where `emerg_wr` is in configuration space; before it are columns u16, rows u16 and the most ports u32.
const EMERG_WRITE: usize = 8;

/// Queues of the control messages.
const CONTROL_INPUT: usize = 2;
const CONTROL_OUTPUT: usize = 3;

/// The token of another turn; those below are the places of ports.
const ANOTHER_TURN: WatchToken = WatchToken::MAX;

/// A port to be made.
pub struct PortConfig {
    /// Its number, below that of the most ports.
    pub number: u32,
    /// The name that the guest knows it by.
    pub name: Option<String>,
    /// Where its output goes.
    pub sink: Box<dyn OutputSink>,
    /// Where its input comes from.
    pub host: HostEnd,
}

/// Why a console cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConsoleError {
    /// The number of ports is out of range.
    #[error("a console has room for 1 to {MAX_PORTS} ports, and not for {0}")]
    MaxPorts(u32),
    /// A port's number is too large.
    #[error("port {number} is too many for a console with room for {max_ports}")]
    Number {
        /// The port's number.
        number: u32,
        /// What there is room for.
        max_ports: u32,
    },
    /// Two ports have one number.
    #[error("there are two ports {0}")]
    Twice(u32),
    /// No descriptor can be made.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What a queue is for; the numbers are places of ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Input(Option<usize>),
    Output(Option<usize>),
    ControlInput,
    ControlOutput,
}

/// The device.
pub struct Console {
    /// By number.
    ports: Vec<Port>,
    max_ports: u32,
    /// Queues that have not been served to their end.
    unfinished: BTreeSet<usize>,
    another_turn: AnotherTurn,
    output_per_turn: usize,
    at_rest: bool,
}

struct Port {
    number: u32,
    name: Option<String>,
    sink: Box<dyn OutputSink>,
    host: HostEnd,
    link: Link,
}

/// What driver and device know of each other.
#[derive(Debug, Default)]
struct Link {
    ready: bool,
    guest_open: bool,
    told_open: bool,
    told_size: Size,
    owed: Owed,
    passed_on: u32,
}

impl Port {
    fn input_queue(&self) -> usize {
        match self.number as usize {
            0 => 0,
            number => 2 + 2 * number,
        }
    }

    /// Looks at the host's end, and takes note of what the driver is to be told.
    fn look(&mut self) {
        let presence = self.host.look();
        let link = &mut self.link;
        if !link.ready {
            return;
        }
        if link.told_open && (presence.left || !presence.connected) {
            link.owed.add(Message::Close);
        }
        let known_open = link.told_open && !link.owed.contains(Message::Close);
        match presence.connected && !known_open {
            true => link.owed.add(Message::Open),
            false => link.owed.remove(Message::Open),
        }
        if self.host.size() != link.told_size {
            link.owed.add(Message::Resize);
        }
    }

    fn introduce(&mut self) {
        self.link.ready = true;
        self.link.owed.add(Message::Console);
        if self.name.is_some() {
            self.link.owed.add(Message::Name);
        }
        self.look();
    }

    /// The driver has been told.
    fn told(&mut self, message: Message, size: Size) {
        self.link.owed.remove(message);
        match message {
            Message::Close => self.link.told_open = false,
            Message::Open => self.link.told_open = true,
            Message::Resize => self.link.told_size = size,
            Message::Add | Message::Console | Message::Name => {}
        }
    }

    fn save(&self) -> PortState {
        let Link { ready, guest_open, told_open, told_size, ref owed, passed_on } = self.link;
        PortState {
            number: self.number,
            ready,
            guest_open,
            told_open,
            told_size,
            owed: owed.to_bits(),
            passed_on,
            input: Blob::from(self.host.waiting()),
        }
    }
}

impl Console {
    /// Makes one with room for `max_ports` ports, and with these.
    ///
    /// # Errors
    /// Numbers that cannot be; those of eventfd(2).
    pub fn new(max_ports: u32, ports: Vec<PortConfig>) -> Result<Console, ConsoleError> {
        if !(1..=MAX_PORTS).contains(&max_ports) {
            return Err(ConsoleError::MaxPorts(max_ports));
        }
        let mut ports: Vec<Port> = ports
            .into_iter()
            .map(|PortConfig { number, name, sink, host }| Port {
                number,
                name,
                sink,
                host,
                link: Link::default(),
            })
            .collect();
        ports.sort_by_key(|port| port.number);
        if let Some(port) = ports.iter().find(|port| port.number >= max_ports) {
            return Err(ConsoleError::Number { number: port.number, max_ports });
        }
        if let Some(pair) = ports.windows(2).find(|pair| pair[0].number == pair[1].number) {
            return Err(ConsoleError::Twice(pair[0].number));
        }
        Ok(Console {
            ports,
            max_ports,
            unfinished: BTreeSet::new(),
            another_turn: AnotherTurn::new()?,
            output_per_turn: OUTPUT_PER_TURN,
            at_rest: false,
        })
    }

    fn place(&self, number: u32) -> Option<usize> {
        self.ports.binary_search_by_key(&number, |port| port.number).ok()
    }

    fn role(&self, queue: usize) -> Role {
        let number = match queue {
            CONTROL_INPUT => return Role::ControlInput,
            CONTROL_OUTPUT => return Role::ControlOutput,
            0 | 1 => 0,
            _ => queue / 2 - 1,
        };
        let place = u32::try_from(number).ok().and_then(|number| self.place(number));
        if queue.is_multiple_of(2) { Role::Input(place) } else { Role::Output(place) }
    }

    /// Serves a queue for one turn.
    fn serve(&mut self, driver: &mut Driver, queue: usize) -> Result<(), Broken> {
        if self.at_rest || queue >= driver.queues.len() || (queue >= 2 && !driver.has(F_MULTIPORT)) {
            return Ok(());
        }
        let finished = match self.role(queue) {
            Role::Input(place) => match place {
                Some(place) => self.give_input(driver, queue, place)?,
                // It stays with the device for a port that never comes.
                None => true,
            },
            Role::Output(place) => self.take_output(driver, queue, place)?,
            Role::ControlInput => self.tell(driver)?,
            Role::ControlOutput => return self.listen(driver),
        };
        self.note(queue, finished);
        Ok(())
    }

    fn note(&mut self, queue: usize, finished: bool) {
        match finished {
            true => self.unfinished.remove(&queue),
            false => self.unfinished.insert(queue),
        };
    }

    /// Gives the guest what input there is; says whether that was all that can be done now.
    fn give_input(&mut self, driver: &mut Driver, queue: usize, place: usize) -> Result<bool, Broken> {
        let port = &self.ports[place];
        if driver.has(F_MULTIPORT) && !port.link.guest_open {
            return Ok(true);
        }
        let mut used = false;
        let mut finished = false;
        for _ in 0..PORT_QUEUE_SIZE {
            finished = !port.host.has_input();
            if finished {
                break;
            }
            let Some(request) = requests::next(&driver.memory, &mut driver.queues[queue], queue)? else {
                finished = true;
                break;
            };
            let head = request.head_index();
            let written = match request.writer(&driver.memory) {
                Ok(mut buffer) => {
                    let input = port.host.take(buffer.available_bytes());
                    buffer.write_all(&input).map_err(|error| Broken::queue(queue, error))?;
                    input.len() as u32
                }
                // Not in RAM: it gets nothing.
                Err(_) => 0,
            };
            driver.give_back(queue, head, written)?;
            used = true;
        }
        if used {
            driver.signal(queue)?;
        }
        Ok(finished)
    }

    /// Passes on what the guest writes; says whether that was all. What it writes to a port that there is not, nobody gets.
    fn take_output(
        &mut self,
        driver: &mut Driver,
        queue: usize,
        place: Option<usize>,
    ) -> Result<bool, Broken> {
        let mut room = self.output_per_turn;
        let mut port = place.map(|place| &mut self.ports[place]);
        let mut used = false;
        let mut finished = false;
        for _ in 0..PORT_QUEUE_SIZE {
            let Some(request) = requests::next(&driver.memory, &mut driver.queues[queue], queue)? else {
                finished = true;
                break;
            };
            let head = request.head_index();
            if let Some(port) = &mut port
                && let Ok(bytes) = request.reader(&driver.memory)
                && !pass_on(bytes, port, &mut room).map_err(|error| Broken::queue(queue, error))?
            {
                driver.queues[queue].go_to_previous_position();
                break;
            }
            driver.give_back(queue, head, 0)?;
            used = true;
        }
        if used {
            driver.signal(queue)?;
        }
        Ok(finished)
    }

    /// Does what control messages of the driver ask for.
    fn listen(&mut self, driver: &mut Driver) -> Result<(), Broken> {
        let mut used = false;
        let mut finished = false;
        let mut opened = BTreeSet::new();
        for _ in 0..CONTROL_QUEUE_SIZE {
            let queue = &mut driver.queues[CONTROL_OUTPUT];
            let Some(request) = requests::next(&driver.memory, queue, CONTROL_OUTPUT)? else {
                finished = true;
                break;
            };
            let head = request.head_index();
            let mut message = [0; HEADER_LEN];
            let read =
                request.reader(&driver.memory).is_ok_and(|mut bytes| bytes.read_exact(&mut message).is_ok());
            if read {
                opened.extend(self.obey(FromDriver::parse(&message)));
            }
            driver.give_back(CONTROL_OUTPUT, head, 0)?;
            used = true;
        }
        if used {
            driver.signal(CONTROL_OUTPUT)?;
        }
        self.note(CONTROL_OUTPUT, finished);
        self.serve(driver, CONTROL_INPUT)?;
        for place in opened {
            self.serve(driver, self.ports[place].input_queue())?;
        }
        Ok(())
    }

    /// Returns the place of a port that somebody in the guest has opened.
    fn obey(&mut self, message: FromDriver) -> Option<usize> {
        match message {
            FromDriver::DeviceReady => {
                self.ports.iter_mut().for_each(|port| port.link.owed.add(Message::Add))
            }
            FromDriver::PortReady(number) => {
                let place = self.place(number)?;
                self.ports[place].introduce();
            }
            FromDriver::PortOpen(number, open) => {
                let place = self.place(number)?;
                self.ports[place].link.guest_open = open;
                return open.then_some(place);
            }
            FromDriver::Nothing => {}
        }
        None
    }

    /// Tells the driver what it is to know of ports; says whether that was all that can be told now.
    fn tell(&mut self, driver: &mut Driver) -> Result<bool, Broken> {
        let mut used = false;
        let mut finished = false;
        for _ in 0..CONTROL_QUEUE_SIZE {
            let next = self.ports.iter_mut().find_map(|port| Some((port.link.owed.first()?, port)));
            let Some((message, port)) = next else {
                finished = true;
                break;
            };
            let queue = &mut driver.queues[CONTROL_INPUT];
            let Some(request) = requests::next(&driver.memory, queue, CONTROL_INPUT)? else {
                finished = true;
                break;
            };
            let head = request.head_index();
            let size = port.host.size();
            let bytes = message.encode(port.number, port.name.as_deref(), size);
            let buffer = request.writer(&driver.memory).ok();
            // What there is room for, as QEMU does. Less than a header is no message.
            let buffer = buffer.filter(|buffer| buffer.available_bytes() >= HEADER_LEN);
            let written = match buffer {
                Some(mut buffer) => {
                    let bytes = &bytes[..bytes.len().min(buffer.available_bytes())];
                    buffer.write_all(bytes).map_err(|error| Broken::queue(CONTROL_INPUT, error))?;
                    port.told(message, size);
                    bytes.len() as u32
                }
                None => 0,
            };
            driver.give_back(CONTROL_INPUT, head, written)?;
            used = true;
        }
        if used {
            driver.signal(CONTROL_INPUT)?;
        }
        Ok(finished)
    }

    /// The host's end of a port has news.
    fn hear(&mut self, driver: &mut Driver, place: usize) -> Result<(), Broken> {
        let Some(port) = self.ports.get_mut(place) else { return Ok(()) };
        // Before the end is looked at, so that nothing newer is missed.
        port.host.news().drain().map_err(|error| Broken::new(format!("a console's eventfd: {error}")))?;
        port.look();
        let size = port.host.size();
        let queue = port.input_queue();
        if port.number == 0 && size != port.link.told_size && driver.has(F_SIZE) && !driver.has(F_MULTIPORT) {
            port.link.told_size = size;
            driver.interrupt.config();
        }
        self.serve(driver, CONTROL_INPUT)?;
        self.serve(driver, queue)
    }

    fn config(&self) -> [u8; EMERG_WRITE + 4] {
        let (columns, rows) = self.place(0).map(|place| self.ports[place].host.size()).unwrap_or_default();
        let mut config = [0; EMERG_WRITE + 4];
        config[..2].copy_from_slice(&columns.to_le_bytes());
        config[2..4].copy_from_slice(&rows.to_le_bytes());
        config[4..8].copy_from_slice(&self.max_ports.to_le_bytes());
        config
    }
}

/// Passes on a request from where the last turn has left it, as far as there is `room`; says whether that was all of it.
fn pass_on(mut bytes: virtio_queue::Reader<'_>, port: &mut Port, room: &mut usize) -> io::Result<bool> {
    let start = bytes.available_bytes().min(port.link.passed_on as usize);
    let mut rest = bytes.split_at(start).map_err(io::Error::other)?;
    let mut piece = [0; PIECE];
    while rest.available_bytes() > 0 {
        let most = PIECE.min(*room);
        if most == 0 {
            return Ok(false);
        }
        let count = rest.read(&mut piece[..most])?;
        port.sink.write(&piece[..count]);
        port.link.passed_on += count as u32;
        *room -= count;
    }
    port.link.passed_on = 0;
    Ok(true)
}

impl VirtioDevice for Console {
    fn class(&self) -> Class {
        Class { virtio_id: 3, pci: (0x07, 0x80) }
    }

    /// The same for every backend, as a guest keeps its features over an update: a size that nobody knows is told as zeros.
    fn features(&self) -> u64 {
        1 << F_SIZE | 1 << F_MULTIPORT | 1 << F_EMERG_WRITE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![PORT_QUEUE_SIZE; 2 * (self.max_ports as usize + 1)];
        sizes[CONTROL_INPUT] = CONTROL_QUEUE_SIZE;
        sizes[CONTROL_OUTPUT] = CONTROL_QUEUE_SIZE;
        sizes
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = self.config();
        for (at, byte) in data.iter_mut().enumerate() {
            *byte = offset.checked_add(at).and_then(|at| config.get(at)).copied().unwrap_or_default();
        }
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let first = self.ports.first_mut().filter(|port| port.number == 0);
        if let (EMERG_WRITE, Some(port), Some(byte)) = (offset, first, data.first()) {
            port.sink.write(&[*byte]);
        }
    }

    fn reset(&mut self) {
        self.unfinished.clear();
        self.ports.iter_mut().for_each(|port| port.link = Link::default());
    }

    fn queue_ready(&mut self, driver: &mut Driver, queue: usize) -> Result<(), Broken> {
        self.serve(driver, queue)
    }

    fn watches(&self) -> Vec<Watch<'_>> {
        if self.at_rest {
            return Vec::new();
        }
        let ends = self.ports.iter().zip(0..).map(|(port, token)| Watch {
            fd: port.host.news().as_fd(),
            token,
            direction: Direction::Read,
        });
        let turn = (!self.unfinished.is_empty()).then(|| self.another_turn.watch(ANOTHER_TURN));
        ends.chain(turn).collect()
    }

    fn fd_ready(&mut self, driver: &mut Driver, token: WatchToken) -> Result<(), Broken> {
        if self.at_rest {
            return Ok(());
        }
        if token != ANOTHER_TURN {
            return self.hear(driver, token as usize);
        }
        std::mem::take(&mut self.unfinished).into_iter().try_for_each(|queue| self.serve(driver, queue))
    }

    fn drain(&mut self, _driver: &mut Driver) -> Result<Drained, Broken> {
        // Who came and went is not looked at again by whoever is to go on.
        self.ports.iter_mut().for_each(Port::look);
        self.at_rest = true;
        Ok(Drained::AtRest)
    }

    fn resume(&mut self) {
        self.at_rest = false;
        // The ends may be other ones than those that the driver was told of.
        self.ports.iter().for_each(|port| port.host.ring());
    }

    fn persistent(&mut self) -> Option<&mut dyn Persistent> {
        Some(self)
    }
}

impl Persistent for Console {
    fn sections(&self) -> Vec<SectionVersions> {
        vec![(ConsoleState::NAME, ConsoleState::VERSIONS)]
    }

    fn save(&self, main: &mut FrameWriter, instance: u32) -> Result<(), BoxError> {
        let state = ConsoleState { ports: self.ports.iter().map(Port::save).collect() };
        Ok(main.put_section(instance, &state)?)
    }

    fn load(&mut self, main: &mut Frame, instance: u32) -> Result<(), BoxError> {
        let state: ConsoleState = main.require_section(instance)?;
        let numbers: Vec<u32> = self.ports.iter().map(|port| port.number).collect();
        state.check(&numbers)?;
        for (port, state) in self.ports.iter_mut().zip(state.ports) {
            let owed = state.owed()?;
            let PortState { ready, guest_open, told_open, told_size, passed_on, input, .. } = state;
            port.link = Link { ready, guest_open, told_open, told_size, owed, passed_on };
            port.host.put_first(input.as_slice());
        }
        Ok(())
    }
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let links: Vec<_> = self.ports.iter().map(|port| (port.number, &port.link)).collect();
        f.debug_struct("Console").field("ports", &links).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
