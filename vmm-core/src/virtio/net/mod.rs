//! virtio-net: an Ethernet card with a tap behind it (virtio 1.2, 5.1).
//!
//! Packets go between the tap and the driver's buffers without a copy, with the header that virtio and taps have in common.
//! An update keeps the tap's descriptors and sets nothing anew: what the network sends meanwhile waits in the interface's queue.
//! The device filters nothing and announces nothing. The kernel may serve its queues instead (`vhost.rs`).

mod control;
mod features;
mod link;
mod receive;
mod ring;
mod state;
mod tap;
mod transmit;
mod vhost;

#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use oslib::eventfd::EventFd;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MTU, VIRTIO_NET_S_LINK_UP,
};
use virtio_queue::QueueT;

use self::vhost::{Accelerated, told};
use super::{Broken, Class, Direction, Drained, Driver, Persistent, VirtioDevice, Watch, WatchToken};
use crate::guest_log::warn_of_guest;

pub use link::Link;
pub use state::NetState;
pub use tap::{NetError, Tap};
pub use vhost::{Accelerator, VhostUnfit, check_vhost};

/// An Ethernet address.
pub type MacAddress = [u8; 6];

/// The most queue pairs of a device: as many queues as a tap has (`MAX_TAP_QUEUES` of the kernel).
pub const MAX_PAIRS: usize = 256;

/// Bytes of `struct virtio_net_hdr_v1`, which is before each packet.
const HEADER_LEN: usize = 12;
/// The longest packet: the header, an Ethernet header with two VLAN tags, and the longest IP packet, rounded up.
const MAX_PACKET_LEN: usize = 0x11000;
/// How much goes in one direction before the others' turn.
const BURST_PACKETS: usize = 256;
/// The same in bytes, as vhost-net has it (`VHOST_NET_WEIGHT`).
const BURST_BYTES: usize = 512 << 10;

/// Entries of a queue for packets. QEMU's default, too.
const QUEUE_SIZE: u16 = 256;
/// Entries of the control queue.
const CONTROL_QUEUE_SIZE: u16 = 64;

/// What is watched beside taps, whose tokens are numbers of queues: what a queue served by the kernel calls by, and what tells
/// of errors of a pair. The number of the queue, or that of the pair's first, is added.
const CALL: WatchToken = 1 << 16;
const ERROR: WatchToken = 2 << 16;

/// What a device is like, apart from its taps.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Its address. The driver may set another one, until it resets the device.
    pub mac: MacAddress,
    /// The largest packet that the driver is told to send, in bytes, if it is told; at least 68, what IPv4
    /// demands of a link.
    pub mtu: Option<u16>,
}

/// Two virtio queues, for receiving and for sending, and what they are connected to.
struct Pair {
    link: Box<dyn Link>,
    /// The kernel, if it is to serve the queues.
    accelerated: Option<Accelerated>,
    /// A packet that has been read and that the driver had no buffers for.
    held: Option<Vec<u8>>,
    /// The driver has buffers, as far as is known: packets are waited for.
    receiving: bool,
    /// The driver has packets that were not yet taken: room for them, or our turn, is waited for.
    sending: bool,
    /// The network behind it is no more.
    gone: bool,
}

impl Pair {
    fn lose(&mut self, reason: impl fmt::Display) {
        tracing::warn!(link = ?self.link, %reason, "the network of the guest is gone");
        self.gone = true;
    }

    /// What is to be watched for the pair whose first queue is number `first` of the device.
    fn watches(&self, first: usize) -> impl Iterator<Item = Watch<'_>> {
        let watch = |fd, token, direction| Watch { fd, token, direction };
        let receive = first as WatchToken;
        let by_us = self.accelerated.is_none();
        // Of what is gone there is nothing to read, and epoll(7) would say so without end.
        let reads = by_us && self.receiving && !self.gone;
        let read = reads.then(|| watch(self.link.fd(), receive, Direction::Read));
        let write = (by_us && self.sending).then(|| watch(self.link.fd(), receive + 1, Direction::Write));
        let kernel = self.accelerated.iter().flat_map(move |kernel| {
            let bells = [(kernel.call(0), CALL), (kernel.call(1), CALL + 1), (kernel.error(), ERROR)];
            bells.map(|(bell, token)| watch(bell.as_fd(), token + receive, Direction::Read))
        });
        [read, write].into_iter().flatten().chain(kernel)
    }

    fn is_served_by_kernel(&self, queue: usize) -> bool {
        self.accelerated.as_ref().is_some_and(|kernel| kernel.serves(queue % 2))
    }

    /// Has the kernel serve `queue` from now on, once a packet that waits here is with the driver. Returns whether that is so,
    /// or will be. If the kernel cannot, the device does it.
    fn leave_to_kernel(
        &mut self,
        driver: &mut Driver,
        queue: usize,
        doorbells: &[EventFd],
        rest: &mut [u8],
    ) -> Result<bool, Broken> {
        if self.accelerated.is_some() && queue.is_multiple_of(2) && self.held.is_some() {
            self.receive(driver, queue, rest)?;
            if self.held.is_some() {
                return Ok(true);
            }
        }
        let Some(kernel) = &mut self.accelerated else { return Ok(false) };
        let Err(error) = kernel.start(driver, queue, &doorbells[queue], self.link.fd()) else {
            return Ok(true);
        };
        let (link, error) = (&self.link, told(&error));
        tracing::error!(?link, error, "the kernel cannot serve a network: packets go through this program");
        kernel.stop(driver, queue & !1)?;
        self.accelerated = None;
        (self.receiving, self.sending) = (true, true);
        Ok(false)
    }
}

/// A virtio network card.
pub struct Net {
    settings: Settings,
    pairs: Vec<Pair>,
    mac: MacAddress,
    active_pairs: usize,
    guest_offloads: u64,
    link_up: bool,
    /// Between [`drain`](VirtioDevice::drain) and [`resume`](VirtioDevice::resume).
    at_rest: bool,
    /// The taps are yet to be set to what was loaded.
    unlike_state: bool,
    /// Room for what the driver's buffers do not hold of a packet. Nothing is in there between calls.
    rest: Vec<u8>,
    /// That of each queue, once they are known.
    doorbells: Arc<[EventFd]>,
}

impl Net {
    /// Makes a device of one queue pair for each of `links`, of which there are 1 to [`MAX_PAIRS`]. Touches none of them.
    ///
    /// # Panics
    /// If there are none, or too many.
    pub fn new<L: Link + 'static>(settings: Settings, links: Vec<L>) -> Self {
        assert!((1..=MAX_PAIRS).contains(&links.len()), "{} queue pairs", links.len());
        let pair = |link| Pair {
            link: Box::new(link) as Box<dyn Link>,
            accelerated: None,
            held: None,
            receiving: false,
            sending: false,
            gone: false,
        };
        Self {
            settings,
            pairs: links.into_iter().map(pair).collect(),
            mac: settings.mac,
            active_pairs: 1,
            guest_offloads: 0,
            link_up: true,
            at_rest: false,
            unlike_state: false,
            rest: vec![0; MAX_PACKET_LEN],
            doorbells: Arc::default(),
        }
    }

    /// Has the kernel serve the queues, by one of `accelerators` for each pair. `handed_over`: an update hands them over,
    /// instead of the next program having its own.
    ///
    /// # Errors
    /// No eventfd could be made.
    ///
    /// # Panics
    /// If there are not as many as pairs.
    pub fn accelerate<A: Accelerator + 'static>(
        mut self,
        accelerators: Vec<A>,
        handed_over: bool,
    ) -> io::Result<Self> {
        assert_eq!(accelerators.len(), self.pairs.len(), "accelerators for the queue pairs");
        for (pair, accelerator) in self.pairs.iter_mut().zip(accelerators) {
            pair.accelerated = Some(Accelerated::new(Box::new(accelerator), handed_over)?);
        }
        Ok(self)
    }

    /// The control queue stands behind the others; and a driver that knows of one pair only expects it behind that one.
    fn control_queue(&self, driver: &Driver) -> Option<usize> {
        let pairs = if driver.has(VIRTIO_NET_F_MQ) { self.pairs.len() } else { 1 };
        driver.has(VIRTIO_NET_F_CTRL_VQ).then_some(2 * pairs)
    }

    fn set_offloads(&mut self, guest_offloads: u64) -> io::Result<()> {
        self.pairs[0].link.set_offloads(features::tap_offloads(guest_offloads))?;
        self.guest_offloads = guest_offloads;
        Ok(())
    }

    /// Lets the first `count` pairs take part.
    fn activate_pairs(&mut self, count: usize) -> io::Result<()> {
        for (index, pair) in self.pairs.iter().enumerate() {
            pair.link.set_attached(index < count)?;
        }
        self.active_pairs = count;
        Ok(())
    }

    /// Gives the turn to a queue of packets: an even one for receiving, an odd one for sending.
    fn turn(&mut self, driver: &mut Driver, queue: usize) -> Result<(), Broken> {
        let Self { pairs, active_pairs, rest, doorbells, .. } = self;
        let Some(pair) = pairs[..*active_pairs].get_mut(queue / 2) else { return Ok(()) };
        let ready = is_ready(driver, queue);
        let by_kernel = ready && pair.leave_to_kernel(driver, queue, doorbells, rest)?;
        match queue % 2 {
            _ if by_kernel => {}
            0 if ready => pair.receive(driver, queue, rest)?,
            0 => pair.receiving = false,
            _ if ready => pair.transmit(driver, queue)?,
            _ => pair.sending = false,
        }
        self.tell_link(driver);
        Ok(())
    }

    /// Has the kernel serve the pairs that take part, and no others, as far as it serves any.
    fn update_kernel(&mut self, driver: &mut Driver) -> Result<(), Broken> {
        let active = self.active_pairs;
        for (index, pair) in self.pairs.iter_mut().enumerate().skip(active) {
            if let Some(kernel) = &mut pair.accelerated {
                kernel.stop(driver, 2 * index)?;
            }
        }
        let accelerated = |index: &usize| self.pairs[*index].accelerated.is_some();
        let queues: Vec<_> =
            (0..active).filter(accelerated).flat_map(|pair| [2 * pair, 2 * pair + 1]).collect();
        queues.into_iter().try_for_each(|queue| self.turn(driver, queue))
    }

    /// Tells the driver whether there is a network, if it knows otherwise: from the one that the device had before an update,
    /// for example.
    fn tell_link(&mut self, driver: &Driver) {
        let link_up = self.has_link();
        if self.link_up != link_up {
            self.link_up = link_up;
            driver.interrupt.config();
        }
    }

    fn has_link(&self) -> bool {
        self.pairs.iter().all(|pair| !pair.gone)
    }

    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        let status = if self.link_up { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&(self.pairs.len() as u16).to_le_bytes());
        config[10..].copy_from_slice(&self.settings.mtu.unwrap_or(0).to_le_bytes());
        config
    }
}

fn is_ready(driver: &Driver, queue: usize) -> bool {
    driver.queues.get(queue).is_some_and(QueueT::ready)
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net")
            .field("settings", &self.settings)
            .field("active_pairs", &self.active_pairs)
            .field("guest_offloads", &format_args!("{:#x}", self.guest_offloads))
            .field("link_up", &self.link_up)
            .finish_non_exhaustive()
    }
}

impl VirtioDevice for Net {
    fn class(&self) -> Class {
        Class { virtio_id: VIRTIO_ID_NET as u16, pci: (0x02, 0x00) }
    }

    fn features(&self) -> u64 {
        let several = u64::from(self.pairs.len() > 1) << VIRTIO_NET_F_MQ;
        let mtu = u64::from(self.settings.mtu.is_some()) << VIRTIO_NET_F_MTU;
        features::always() | several | mtu
    }

    fn hear_doorbells(&mut self, doorbells: &Arc<[EventFd]>) {
        self.doorbells = doorbells.clone();
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 2 * self.pairs.len()];
        sizes.push(CONTROL_QUEUE_SIZE);
        sizes
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = self.config();
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = offset.checked_add(index).and_then(|at| config.get(at)).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, driver: &mut Driver) -> Result<(), Broken> {
        if !driver.has(VIRTIO_F_VERSION_1) {
            return Err(Broken::new(
                "a driver without VIRTIO_F_VERSION_1 has another header before its packets",
            ));
        }
        let refused = |error| Broken::new(format_args!("the tap refuses what was agreed on: {error}"));
        self.activate_pairs(1).map_err(refused)?;
        self.set_offloads(features::guest_offloads(driver.features)).map_err(refused)?;
        self.pairs[0].receiving = true;
        self.update_kernel(driver)
    }

    fn reset(&mut self) {
        self.mac = self.settings.mac;
        self.link_up = self.has_link();
        for pair in &mut self.pairs {
            pair.accelerated.iter_mut().for_each(Accelerated::forget);
            (pair.held, pair.receiving, pair.sending) = (None, false, false);
        }
        // Firmware that comes next may know of no offloads.
        if let Err(error) = self.set_offloads(0).and_then(|()| self.activate_pairs(1)) {
            warn_of_guest!(%error, "a network could not be reset");
        }
        self.unlike_state = false;
    }

    fn queue_ready(&mut self, driver: &mut Driver, queue: usize) -> Result<(), Broken> {
        if self.at_rest {
            return Ok(());
        }
        match self.control_queue(driver) {
            Some(control) if control == queue && is_ready(driver, queue) => self.control(driver, queue),
            Some(control) if control == queue => Ok(()),
            _ => self.turn(driver, queue),
        }
    }

    fn watches(&self) -> Vec<Watch<'_>> {
        if self.at_rest {
            return Vec::new();
        }
        let active = self.pairs[..self.active_pairs].iter().enumerate();
        active.flat_map(|(index, pair)| pair.watches(2 * index)).collect()
    }

    fn served_elsewhere(&self) -> Vec<usize> {
        let queues = 0..2 * self.active_pairs;
        queues.filter(|queue| self.pairs[queue / 2].is_served_by_kernel(*queue)).collect()
    }

    fn fd_ready(&mut self, driver: &mut Driver, token: WatchToken) -> Result<(), Broken> {
        if self.at_rest {
            return Ok(());
        }
        let queue = (token % CALL) as usize;
        let kernel = self.pairs.get(queue / 2).and_then(|pair| pair.accelerated.as_ref());
        match (token - queue as WatchToken, kernel) {
            (CALL, Some(kernel)) => kernel.interrupt(driver, queue),
            (ERROR, Some(kernel)) => match kernel.error().drain() {
                Ok(0) => Ok(()),
                _ => Err(Broken::queue(queue, "the kernel cannot make sense of it, or of the next one")),
            },
            // The token is the queue's number.
            _ => self.turn(driver, queue),
        }
    }

    fn drain(&mut self, driver: &mut Driver) -> Result<Drained, Broken> {
        self.at_rest = true;
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            if let Some(kernel) = &mut pair.accelerated {
                kernel.rest(driver, 2 * index)?;
            }
        }
        Ok(Drained::AtRest)
    }

    fn leave_process(&mut self) {
        let kernels = self.pairs.iter_mut().filter_map(|pair| pair.accelerated.as_mut());
        kernels.for_each(Accelerated::leave_process);
    }

    fn resume(&mut self) {
        self.at_rest = false;
        if !std::mem::take(&mut self.unlike_state) {
            return;
        }
        let (offloads, pairs) = (self.guest_offloads, self.active_pairs);
        if let Err(error) = self.set_offloads(offloads).and_then(|()| self.activate_pairs(pairs)) {
            tracing::error!(%error, "a network is not set up as its driver expects");
        }
    }

    fn persistent(&mut self) -> Option<&mut dyn Persistent> {
        Some(self)
    }
}
