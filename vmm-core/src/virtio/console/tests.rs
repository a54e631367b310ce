//! The console against a driver that keeps the rules, and against one that does not.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::virtio::test_driver::{Guest, RAM, saved_and_loaded};

const ALL_FEATURES: u64 = 1 << F_SIZE | 1 << F_MULTIPORT | 1 << F_EMERG_WRITE;

#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<u8>>>);

impl OutputSink for Seen {
    fn write(&mut self, bytes: &[u8]) {
        self.0.lock().unwrap().extend(bytes);
    }
}

impl Seen {
    fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

/// A console with its ends.
struct Machine {
    console: Console,
    guest: Guest,
    ends: Vec<HostEnd>,
    outputs: Vec<Seen>,
}

fn console(numbers: &[u32], outputs: &[Seen]) -> (Console, Vec<HostEnd>) {
    let ends: Vec<_> = numbers.iter().map(|_| HostEnd::new().unwrap()).collect();
    let ports = numbers.iter().zip(&ends).zip(outputs).map(|((&number, host), output)| PortConfig {
        number,
        name: (number > 0).then(|| format!("port.{number}")),
        sink: Box::new(output.clone()),
        host: host.clone(),
    });
    (Console::new(4, ports.collect()).unwrap(), ends)
}

impl Machine {
    fn new(numbers: &[u32], features: u64) -> Machine {
        let outputs: Vec<_> = numbers.iter().map(|_| Seen::default()).collect();
        let (console, ends) = console(numbers, &outputs);
        let guest = Guest::new(&console.queue_sizes(), features);
        Machine { console, guest, ends, outputs }
    }

    /// With a driver that knows its ports, and has them open.
    fn introduced(numbers: &[u32]) -> Machine {
        let mut machine = Machine::new(numbers, ALL_FEATURES);
        machine.say(&[0xff, 0xff, 0xff, 0xff, 0, 0, 1, 0]);
        for &number in numbers {
            machine.say(&[number as u8, 0, 0, 0, 3, 0, 1, 0]);
            machine.say(&[number as u8, 0, 0, 0, 6, 0, 1, 0]);
        }
        machine
    }

    fn kick(&mut self, queue: usize) {
        self.console.queue_ready(&mut self.guest.driver, queue).unwrap();
    }

    /// What a driver does that goes by event index.
    fn kick_if_asked_for(&mut self, queue: usize) {
        if self.guest.must_tell(queue) {
            self.kick(queue);
        }
    }

    fn say(&mut self, message: &[u8]) {
        self.guest.add_output(CONTROL_OUTPUT, message);
        self.kick(CONTROL_OUTPUT);
        assert_eq!(self.guest.used(CONTROL_OUTPUT).len(), 1);
    }

    /// What the device says, given buffers enough.
    fn hear(&mut self) -> Vec<Vec<u8>> {
        while self.guest.pending(CONTROL_INPUT) < CONTROL_QUEUE_SIZE {
            self.guest.add_buffer(CONTROL_INPUT, 64);
        }
        self.kick(CONTROL_INPUT);
        self.guest.used(CONTROL_INPUT).into_iter().map(|used| used.bytes).collect()
    }

    /// One round of the thread that serves the device; says whether there was anything to do.
    fn turn(&mut self) -> bool {
        let ready: Vec<_> =
            self.console.watches().into_iter().filter(|watch| is_ready(watch)).map(|w| w.token).collect();
        for &token in &ready {
            self.console.fd_ready(&mut self.guest.driver, token).unwrap();
        }
        !ready.is_empty()
    }

    fn turns(&mut self) {
        let turns = (0..100_000).take_while(|_| self.turn()).count();
        assert!(turns < 100_000, "it never comes to rest");
    }

    /// The next program takes over; the same peers are connected to it.
    fn update(&mut self) {
        assert_eq!(self.console.drain(&mut self.guest.driver).unwrap(), Drained::AtRest);
        assert!(self.console.watches().is_empty());
        let numbers: Vec<_> = self.console.ports.iter().map(|port| port.number).collect();
        let (mut next, ends) = console(&numbers, &self.outputs);
        next.output_per_turn = self.console.output_per_turn;
        for (old, new) in self.ends.iter().zip(&ends) {
            new.set_connected(old.look().connected);
            new.set_size(old.size());
        }
        saved_and_loaded(&mut self.console, &mut next).unwrap();
        self.guest.move_to_another_program();
        next.resume();
        (self.console, self.ends) = (next, ends);
        (0..self.guest.driver.queues.len()).for_each(|queue| self.kick(queue));
    }

    fn input(&mut self, queue: usize) -> Vec<u8> {
        self.guest.used(queue).into_iter().flat_map(|used| used.bytes).collect()
    }
}

fn is_ready(watch: &Watch<'_>) -> bool {
    oslib::stream::is_readable(watch.fd).unwrap()
}

fn message(port: u8, event: u8, value: u8) -> Vec<u8> {
    vec![port, 0, 0, 0, event, 0, value, 0]
}

#[test]
fn a_driver_is_told_of_ports_step_by_step() {
    let mut machine = Machine::new(&[0, 2], ALL_FEATURES);
    assert!(machine.hear().is_empty());
    machine.say(&message(0, 0, 1));
    assert_eq!(machine.hear(), [message(0, 1, 1), message(2, 1, 1)]);
    machine.ends[1].set_connected(true);
    machine.ends[1].set_size((80, 25));
    machine.turns();
    assert!(machine.hear().is_empty(), "it does not know the port yet");
    machine.say(&message(2, 3, 1));
    let name = [message(2, 7, 1), b"port.2\0".to_vec()].concat();
    let size = [message(2, 5, 1), vec![25, 0, 80, 0]].concat();
    assert_eq!(machine.hear(), [message(2, 4, 1), name, size, message(2, 6, 1)]);
    machine.say(&message(0, 3, 1));
    assert_eq!(machine.hear(), [message(0, 4, 1)]);
}

#[test]
fn peers_that_come_and_go_are_told_of_in_order() {
    let mut machine = Machine::introduced(&[0]);
    machine.hear();
    machine.ends[0].set_connected(true);
    machine.turns();
    assert_eq!(machine.hear(), [message(0, 6, 1)]);
    // Another one, before anybody has looked.
    machine.ends[0].set_connected(false);
    machine.ends[0].set_connected(true);
    machine.turns();
    assert_eq!(machine.hear(), [message(0, 6, 0), message(0, 6, 1)]);
    machine.ends[0].set_connected(false);
    machine.turns();
    assert_eq!(machine.hear(), [message(0, 6, 0)]);
    // One that nobody ever knew of.
    machine.ends[0].set_connected(true);
    machine.ends[0].set_connected(false);
    machine.turns();
    assert!(machine.hear().is_empty());
}

#[test]
fn an_update_tells_the_driver_only_what_changed() {
    let mut machine = Machine::introduced(&[0, 1]);
    machine.ends[0].set_connected(true);
    machine.ends[0].set_size((80, 25));
    machine.turns();
    machine.hear();
    machine.update();
    machine.turns();
    assert!(machine.hear().is_empty());
    // What nobody could be told before it is told after it.
    machine.ends[0].set_connected(false);
    machine.ends[0].set_connected(true);
    machine.update();
    machine.turns();
    assert_eq!(machine.hear(), [message(0, 6, 0), message(0, 6, 1)]);
    machine.ends[1].set_size((132, 50));
    machine.update();
    machine.turns();
    assert_eq!(machine.hear(), [[message(1, 5, 1), vec![50, 0, 132, 0]].concat()]);
}

#[test]
fn input_waits_for_buffers_and_for_who_opens_the_port() {
    let mut machine = Machine::new(&[1], ALL_FEATURES);
    assert_eq!(machine.ends[0].put(b"hello"), 5);
    machine.guest.add_buffer(4, 3);
    machine.kick(4);
    machine.turns();
    assert!(machine.guest.used(4).is_empty());
    machine.say(&message(1, 6, 1));
    assert_eq!(machine.input(4), b"hel");
    machine.guest.add_buffer(4, 10);
    machine.kick(4);
    assert_eq!(machine.input(4), b"lo");
    machine.say(&message(1, 6, 0));
    machine.ends[0].put(b"x");
    machine.guest.add_buffer(4, 10);
    machine.turns();
    assert!(machine.guest.used(4).is_empty());
    assert_eq!(machine.guest.interrupts(4), 2);
}

#[test]
fn a_driver_without_ports_has_one_console() {
    let mut machine = Machine::new(&[0], 1 << F_SIZE);
    machine.ends[0].put(b"in");
    machine.guest.add_buffer(0, 10);
    machine.guest.add_output(1, b"out");
    machine.kick(1);
    machine.turns();
    assert_eq!(machine.input(0), b"in");
    assert_eq!(machine.outputs[0].bytes(), b"out");
    machine.ends[0].set_size((80, 25));
    machine.turns();
    assert_eq!(machine.guest.config_interrupts(), 1);
    machine.turns();
    assert_eq!(machine.guest.config_interrupts(), 1);
    let mut config = [0xff; 16];
    machine.console.read_config(0, &mut config);
    assert_eq!(config, [80, 0, 25, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    machine.console.read_config(usize::MAX, &mut config);
    assert_eq!(config, [0; 16]);
    machine.console.write_config(8, b"!\0\0\0");
    assert_eq!(machine.outputs[0].bytes(), b"out!");
    // A queue of control messages that was not agreed on is left alone.
    machine.guest.add_buffer(CONTROL_INPUT, 64);
    machine.guest.add_output(CONTROL_OUTPUT, &message(0, 0, 1));
    machine.kick(CONTROL_OUTPUT);
    assert!(machine.guest.used(CONTROL_INPUT).is_empty());
}

#[test]
fn much_output_takes_turns() {
    let mut machine = Machine::introduced(&[0, 1]);
    let output: Vec<u8> = (0..OUTPUT_PER_TURN + 5).map(|at| at as u8 ^ (at >> 8) as u8).collect();
    machine.guest.add_output(1, &output);
    machine.kick(1);
    assert_eq!(machine.outputs[0].bytes().len(), OUTPUT_PER_TURN);
    assert!(machine.guest.used(1).is_empty());
    machine.update();
    assert_eq!(machine.outputs[0].bytes(), output);
    assert_eq!(machine.guest.used(1).len(), 1);
    machine.turns();
    for _ in 0..PORT_QUEUE_SIZE {
        machine.guest.add_output(5, b"x");
    }
    machine.kick(5);
    assert_eq!(machine.guest.used(5).len(), usize::from(PORT_QUEUE_SIZE));
    machine.guest.add_output(5, b"y");
    machine.turns();
    assert_eq!(machine.outputs[1].bytes().last(), Some(&b'y'));
}

#[test]
fn a_reset_forgets_the_driver_and_keeps_the_input() {
    let mut machine = Machine::introduced(&[0]);
    machine.ends[0].set_connected(true);
    machine.ends[0].put(b"typed ahead");
    machine.turns();
    machine.console.reset();
    let mut next = Machine::introduced(&[0]);
    next.console = machine.console;
    next.say(&message(0, 0, 1));
    assert_eq!(next.hear(), [message(0, 1, 1)]);
    next.say(&message(0, 3, 1));
    assert_eq!(next.hear(), [message(0, 4, 1), message(0, 6, 1)]);
    next.guest.add_buffer(0, 32);
    next.say(&message(0, 6, 1));
    assert_eq!(next.input(0), b"typed ahead");
}

#[test]
fn nonsense_in_requests_harms_nobody() {
    let mut machine = Machine::introduced(&[0]);
    machine.hear();
    machine.ends[0].put(b"abc");
    // No room, not in RAM, readable, in a circle.
    machine.guest.add(0, &[(0x8_0000, 0, true)]);
    machine.guest.add(0, &[(RAM, 8, true)]);
    machine.guest.add(0, &[(0x8_0000, 8, false)]);
    machine.guest.add(0, &[(u64::MAX, u32::MAX, true)]);
    machine.kick(0);
    assert_eq!(machine.guest.used(0).len(), 4);
    machine.guest.add_buffer(0, 8);
    machine.kick(0);
    assert_eq!(machine.input(0), b"abc");
    machine.guest.add(1, &[(RAM - 1, 2, false)]);
    machine.guest.add(1, &[(0x8_0000, 0, false)]);
    machine.guest.add(1, &[(0x8_0000, 8, true)]);
    machine.guest.add_output(1, b"after all");
    machine.kick(1);
    assert_eq!(machine.guest.used(1).len(), 4);
    assert_eq!(machine.outputs[0].bytes(), b"after all");
    for bad in [&[][..], &[1], &[9, 0, 0, 0, 3, 0, 1, 0], &[0xff; 8], &[0; 300]] {
        machine.say(bad);
    }
    assert!(machine.hear().is_empty());
    // Ports that are not there.
    machine.guest.add_output(7, b"to nobody");
    machine.guest.add_buffer(6, 8);
    machine.kick(7);
    machine.kick(6);
    assert_eq!(machine.guest.used(7).len(), 1);
    assert!(machine.guest.used(6).is_empty());
    machine.kick(usize::MAX);
}

#[test]
fn buffers_too_small_for_a_message_are_given_back_and_the_message_stays() {
    let mut machine = Machine::new(&[0], ALL_FEATURES);
    machine.say(&message(0, 0, 1));
    for _ in 0..CONTROL_QUEUE_SIZE {
        machine.guest.add_buffer(CONTROL_INPUT, 7);
    }
    machine.kick(CONTROL_INPUT);
    machine.turns();
    assert!(machine.guest.used(CONTROL_INPUT).iter().all(|used| used.bytes.is_empty()));
    assert_eq!(machine.hear(), [message(0, 1, 1)]);
}

#[test]
fn a_damaged_ring_breaks_the_device() {
    for queue in [0, 1, CONTROL_INPUT, CONTROL_OUTPUT] {
        let mut machine = Machine::introduced(&[0]);
        machine.ends[0].put(b"x");
        machine.console.ports[0].link.owed.add(Message::Add);
        machine.guest.claim(queue, PORT_QUEUE_SIZE + 1);
        let error = machine.console.queue_ready(&mut machine.guest.driver, queue).unwrap_err();
        assert!(error.to_string().starts_with(&format!("queue {queue}: ")), "{error}");
    }
}

#[test]
fn states_that_cannot_be_are_refused() {
    let load = |numbers: &[u32], state: &ConsoleState| {
        let mut writer = FrameWriter::default();
        writer.put_section(0, state).unwrap();
        let mut frame = Frame::parse(&writer.finish(1)).unwrap();
        let (mut console, _) = console(numbers, &[Seen::default(), Seen::default()]);
        console.load(&mut frame, 0).map_err(|error| error.to_string())
    };
    let state = |owed, input| {
        let (mut console, _) = console(&[1], &[Seen::default()]);
        console.ports[0].introduce();
        let mut port = console.ports[0].save();
        (port.owed, port.input) = (owed, Blob::from(vec![0; input]));
        ConsoleState { ports: vec![port] }
    };
    assert_eq!(load(&[1], &state(0x3f, INBOX_LEN)), Ok(()));
    let wrong = "the guest's console has the ports [1], and this one has [1, 2]; the command line must name the ports of the guest";
    assert_eq!(load(&[1, 2], &state(0, 0)).unwrap_err(), wrong);
    assert_eq!(load(&[1], &state(0x40, 0)).unwrap_err(), "field `owed` is 64, expected 0");
    let long = "field `input` has a size of 16385, which is not at most 16384 bytes";
    assert_eq!(load(&[1], &state(0, INBOX_LEN + 1)).unwrap_err(), long);
}

#[test]
fn ports_that_cannot_be_are_refused() {
    let make = |max_ports, numbers: &[u32]| {
        let port = |&number: &u32| PortConfig {
            number,
            name: None,
            sink: Box::new(Seen::default()),
            host: HostEnd::new().unwrap(),
        };
        Console::new(max_ports, numbers.iter().map(port).collect()).err().map(|error| error.to_string())
    };
    assert_eq!(make(MAX_PORTS, &[MAX_PORTS - 1, 0]), None);
    assert_eq!(make(0, &[]).unwrap(), "a console has room for 1 to 31 ports, and not for 0");
    assert_eq!(make(32, &[]).unwrap(), "a console has room for 1 to 31 ports, and not for 32");
    assert_eq!(make(2, &[2]).unwrap(), "port 2 is too many for a console with room for 2");
    assert_eq!(make(2, &[1, 1]).unwrap(), "there are two ports 1");
}

#[derive(Debug, Clone)]
enum Op {
    HostWrites(usize, u16),
    GuestReads(usize, u16),
    GuestWrites(usize, u16),
    Turn,
    Update,
    RefusedUpdate,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let port = 0..2usize;
    let op = prop_oneof![
        4 => (port.clone(), 0..6000u16).prop_map(|(port, len)| Op::HostWrites(port, len)),
        4 => (port.clone(), 0..3000u16).prop_map(|(port, len)| Op::GuestReads(port, len)),
        4 => (port, 0..3000u16).prop_map(|(port, len)| Op::GuestWrites(port, len)),
        4 => Just(Op::Turn),
        2 => Just(Op::Update),
        1 => Just(Op::RefusedUpdate),
    ];
    proptest::collection::vec(op, 1..60)
}

/// Bytes that are told from their neighbours.
fn stream(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|at| (at ^ at >> 8).wrapping_mul(31) as u8).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// No byte is lost, repeated or out of order, however updates cut the streams.
    #[test]
    fn streams_outlive_updates(ops in ops()) {
        const INPUTS: [usize; 2] = [0, 4];
        let mut machine = Machine::introduced(&[0, 1]);
        machine.console.output_per_turn = 700;
        machine.guest.agree_on_event_index();
        let (mut sent, mut read, mut written) = ([0; 2], [const { Vec::new() }; 2], [0; 2]);
        for op in ops {
            match op {
                Op::HostWrites(port, len) => {
                    sent[port] += machine.ends[port].put(&stream(sent[port], len.into()));
                }
                Op::GuestReads(port, len) => {
                    if machine.guest.pending(INPUTS[port]) < PORT_QUEUE_SIZE {
                        machine.guest.add_buffer(INPUTS[port], len.into());
                        machine.kick_if_asked_for(INPUTS[port]);
                    }
                }
                Op::GuestWrites(port, len) => {
                    let queue = INPUTS[port] + 1;
                    if machine.guest.pending(queue) < PORT_QUEUE_SIZE {
                        machine.guest.add_output(queue, &stream(written[port], len.into()));
                        written[port] += usize::from(len);
                        machine.kick_if_asked_for(queue);
                    }
                }
                Op::Turn => drop(machine.turn()),
                Op::Update => machine.update(),
                Op::RefusedUpdate => {
                    machine.console.drain(&mut machine.guest.driver).unwrap();
                    let (mut target, _) = console(&[0, 1], &machine.outputs);
                    saved_and_loaded(&mut machine.console, &mut target).unwrap();
                    machine.console.resume();
                }
            }
            for port in 0..2 {
                read[port].extend(machine.input(INPUTS[port]));
                machine.guest.used(INPUTS[port] + 1);
            }
        }
        for port in 0..2 {
            // As many bytes as can wait take no more rounds than that, however small the buffers that were there.
            for _ in 0..2 * PORT_QUEUE_SIZE {
                if machine.guest.pending(INPUTS[port]) < PORT_QUEUE_SIZE {
                    machine.guest.add_buffer(INPUTS[port], 4096);
                    machine.kick_if_asked_for(INPUTS[port]);
                }
                machine.turns();
                read[port].extend(machine.input(INPUTS[port]));
            }
            prop_assert_eq!(&read[port], &stream(0, sent[port]));
            prop_assert_eq!(machine.outputs[port].bytes(), stream(0, written[port]));
        }
    }
}
