//! What device and driver tell each other of ports (`linux/virtio_console.h`; virtio 1.2, 5.3.6.2).

use std::collections::BTreeSet;

use super::host::Size;

/// Bytes of a message without what follows it: port u32, event u16, value u16, all little-endian.
pub(super) const HEADER_LEN: usize = 8;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What the driver says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FromDriver {
    /// It wants to know of the ports.
    DeviceReady,
    /// It knows this port, and wants to know more of it.
    PortReady(u32),
    /// Somebody in the guest has opened or closed it.
    PortOpen(u32, bool),
    /// It could not make use of the device or a port; or what no driver says.
    Nothing,
}

impl FromDriver {
    pub(super) fn parse(message: &[u8]) -> FromDriver {
        let Some((header, _)) = message.split_first_chunk::<HEADER_LEN>() else { return FromDriver::Nothing };
        let [a, b, c, d, event @ .., low, high] = *header;
        let port = u32::from_le_bytes([a, b, c, d]);
        let value = u16::from_le_bytes([low, high]);
        match (u16::from_le_bytes(event), value) {
            (DEVICE_READY, 1) => FromDriver::DeviceReady,
            (PORT_READY, 1) => FromDriver::PortReady(port),
            (PORT_OPEN, value) => FromDriver::PortOpen(port, value != 0),
            _ => FromDriver::Nothing,
        }
    }
}

/// What the device says of a port, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Message {
    /// It is there.
    Add,
    /// It is a console.
    Console,
    /// Its name.
    Name,
    /// How large the terminal is.
    Resize,
    /// Nobody is at the other end any more.
    Close,
    /// Somebody is at the other end.
    Open,
}

impl Message {
    const ALL: [Message; 6] =
        [Message::Add, Message::Console, Message::Name, Message::Resize, Message::Close, Message::Open];

    pub(super) fn encode(self, port: u32, name: Option<&str>, (columns, rows): Size) -> Vec<u8> {
        let (event, value) = match self {
            Message::Add => (PORT_ADD, 1),
            Message::Console => (CONSOLE_PORT, 1),
            Message::Name => (PORT_NAME, 1),
            Message::Resize => (RESIZE, 1),
            Message::Close => (PORT_OPEN, 0),
            Message::Open => (PORT_OPEN, 1),
        };
        let mut message = Vec::with_capacity(HEADER_LEN);
        message.extend(port.to_le_bytes());
        message.extend(u16::to_le_bytes(event));
        message.extend(u16::to_le_bytes(value));
        match self {
            Message::Name => {
                // QEMU ends it with a zero, and drivers know it so.
                message.extend(name.unwrap_or_default().as_bytes());
                message.push(0);
            }
            Message::Resize => {
                // Linux reads the rows first, although the specification has the columns there.
                message.extend(rows.to_le_bytes());
                message.extend(columns.to_le_bytes());
            }
            Message::Add | Message::Console | Message::Close | Message::Open => {}
        }
        message
    }
}

/// The messages that the driver has yet to be told of a port. Each of them at most once, so that no driver can make them many.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Owed(BTreeSet<Message>);

impl Owed {
    pub(super) fn add(&mut self, message: Message) {
        self.0.insert(message);
    }

    pub(super) fn remove(&mut self, message: Message) {
        self.0.remove(&message);
    }

    pub(super) fn contains(&self, message: Message) -> bool {
        self.0.contains(&message)
    }

    pub(super) fn first(&self) -> Option<Message> {
        self.0.first().copied()
    }

    /// On the wire: bit n for message n of [`Message::ALL`].
    pub(super) fn to_bits(&self) -> u8 {
        self.0.iter().map(|&message| 1 << message as u8).sum()
    }

    /// None: a bit that stands for nothing.
    pub(super) fn from_bits(bits: u8) -> Option<Owed> {
        let owed = Owed(Message::ALL.into_iter().filter(|&message| bits & 1 << message as u8 != 0).collect());
        (owed.to_bits() == bits).then_some(owed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_layout_of_the_header() {
        let ready = [0xff, 0xff, 0xff, 0xff, 0, 0, 1, 0];
        assert_eq!(FromDriver::parse(&ready), FromDriver::DeviceReady);
        assert_eq!(FromDriver::parse(&[2, 1, 0, 0, 3, 0, 1, 0]), FromDriver::PortReady(258));
        assert_eq!(FromDriver::parse(&[2, 0, 0, 0, 3, 0, 0, 0]), FromDriver::Nothing);
        assert_eq!(FromDriver::parse(&[2, 0, 0, 0, 6, 0, 1, 0, 9]), FromDriver::PortOpen(2, true));
        assert_eq!(FromDriver::parse(&[2, 0, 0, 0, 6, 0, 0, 0]), FromDriver::PortOpen(2, false));
        assert_eq!(FromDriver::parse(&[2, 0, 0, 0, 6, 0, 0]), FromDriver::Nothing);
        assert_eq!(FromDriver::parse(&[0; 0]), FromDriver::Nothing);
        assert_eq!(Message::Close.encode(258, None, (0, 0)), [2, 1, 0, 0, 6, 0, 0, 0]);
        assert_eq!(Message::Name.encode(1, Some("ab"), (0, 0)), b"\x01\0\0\0\x07\0\x01\0ab\0");
        assert_eq!(Message::Resize.encode(0, None, (80, 25)), b"\0\0\0\0\x05\0\x01\0\x19\0\x50\0");
    }

    #[test]
    fn what_is_owed_has_an_order_and_a_form() {
        let mut owed = Owed::default();
        owed.add(Message::Open);
        owed.add(Message::Close);
        owed.add(Message::Open);
        assert_eq!(owed.first(), Some(Message::Close));
        assert_eq!(owed.to_bits(), 0b11_0000);
        assert_eq!(Owed::from_bits(0b11_0000), Some(owed));
        assert_eq!(Owed::from_bits(0b100_0000), None);
        assert_eq!(Owed::from_bits(0).unwrap().first(), None);
    }
}
