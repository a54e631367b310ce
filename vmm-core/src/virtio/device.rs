//! What a virtio device is.

use std::fmt;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter};
use oslib::eventfd::EventFd;
use serde::{Deserialize, Serialize};

use super::Driver;
use crate::block::ImageIdentity;

/// What kind of device it is, as drivers find it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Class {
    /// The virtio device id (virtio 1.2, chapter 5).
    pub virtio_id: u16,
    /// PCI base class and subclass.
    pub pci: (u8, u8),
}

/// A device's name for a descriptor that it watches. A descriptor that takes another one's place, perhaps under the same
/// number, gets another name: by that it is told that it is a new one.
pub type WatchToken = u32;

/// For what a descriptor is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Until it can be read, or is at its end.
    Read,
    /// Until it can be written.
    Write,
}

/// A descriptor whose readiness a device wants to be told of, level-triggered.
#[derive(Debug, Clone, Copy)]
pub struct Watch<'a> {
    /// The descriptor.
    pub fd: BorrowedFd<'a>,
    /// The device's name for it.
    pub token: WatchToken,
    /// For what.
    pub direction: Direction,
}

/// The driver did something after which its rings cannot be trusted, or the device cannot go on. Only a reset by the driver helps.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Broken(String);

impl Broken {
    /// With this reason, for the log.
    pub fn new(reason: impl fmt::Display) -> Self {
        Self(reason.to_string())
    }

    /// Queue `index` is damaged.
    pub fn queue(index: usize, error: impl fmt::Display) -> Self {
        Self(format!("queue {index}: {error}"))
    }
}

/// How far a device has come to rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Nothing is under way.
    AtRest,
    /// Requests are.
    UnderWay,
}

/// What is behind a device on the host, as the kernel knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// The image of a disk.
    Image(ImageIdentity),
    /// The name of a network interface.
    Interface(String),
}

/// A section's name, and the versions of it that are read and can be written.
pub type SectionVersions = (&'static str, RangeInclusive<u32>);

/// The device's part of an update: everything that its driver, or the world, can tell from a new device of the same
/// configuration. Queues, features and status are the transport's to save.
pub trait Persistent {
    /// The sections that [`save`](Self::save) writes.
    fn sections(&self) -> Vec<SectionVersions>;

    /// Writes the sections, as instance `instance`.
    ///
    /// # Errors
    /// State that cannot be told; the update fails and the guest goes on.
    fn save(&self, main: &mut FrameWriter, instance: u32) -> Result<(), BoxError>;

    /// What is behind the device on the host, if its next process has to find the same. Asked while the guest runs.
    ///
    /// # Errors
    /// What has become of it: no process could go on with that.
    fn backing(&self) -> Result<Option<Backing>, BoxError> {
        Ok(None)
    }

    /// Reads them, into a device that has not been used. Nothing outside this process is touched.
    ///
    /// # Errors
    /// State that cannot be; the update fails.
    fn load(&mut self, main: &mut Frame, instance: u32) -> Result<(), BoxError>;
}

/// A virtio device. See the [module](super) for who calls it.
pub trait VirtioDevice: Send {
    /// What it is.
    fn class(&self) -> Class;

    /// The features it offers, without those that are the transport's own: version 1, event index and indirect descriptors.
    fn features(&self) -> u64;

    /// The most entries of each queue, powers of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// The doorbell of each queue, which it has for as long as it is there; told once, before everything else. For who has
    /// somebody else listen to them: see [`served_elsewhere`](Self::served_elsewhere).
    fn hear_doorbells(&mut self, _doorbells: &Arc<[EventFd]>) {}

    /// Reads configuration space at `offset`. Bytes beyond its end read as zero.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// Writes configuration space at `offset`. Most devices have nothing to write there.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// The driver is ready, for the first time or after a reset. Not called for a driver that arrives with an update: there is
    /// [`Persistent::load`] and then [`resume`](Self::resume).
    ///
    /// # Errors
    /// [`Broken`] if it cannot work with what was agreed on.
    fn activate(&mut self, _driver: &mut Driver) -> Result<(), Broken> {
        Ok(())
    }

    /// The driver goes away: forget it. Requests under way have to be over, or never touch its memory, when this returns.
    fn reset(&mut self);

    /// The driver has put something into queue `queue`, or may have.
    ///
    /// # Errors
    /// [`Broken`] if the queue is damaged.
    fn queue_ready(&mut self, driver: &mut Driver, queue: usize) -> Result<(), Broken>;

    /// The descriptors to watch from now on. Asked for after every call.
    fn watches(&self) -> Vec<Watch<'_>> {
        Vec::new()
    }

    /// The queues whose doorbells others listen to, such as the kernel: [`queue_ready`](Self::queue_ready) is not called when
    /// they ring. Asked for after every call.
    fn served_elsewhere(&self) -> Vec<usize> {
        Vec::new()
    }

    /// A watched descriptor is ready, or was a moment ago.
    ///
    /// # Errors
    /// [`Broken`] if a queue is damaged.
    fn fd_ready(&mut self, _driver: &mut Driver, _token: WatchToken) -> Result<(), Broken> {
        Ok(())
    }

    /// The guest is stopped, and so will this device be: starts nothing new, and completes what is under way. Called again, a
    /// little later, until it is done or time is up. [`resume`](Self::resume) ends it.
    ///
    /// # Errors
    /// [`Broken`] if a queue is damaged.
    fn drain(&mut self, _driver: &mut Driver) -> Result<Drained, Broken> {
        Ok(Drained::AtRest)
    }

    /// Has everything that the driver has stored be where it outlives the host's kernel. The device is at rest.
    ///
    /// # Errors
    /// It cannot be; the guest goes on here.
    fn settle_on_host(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// The process is about to be replaced by an exec, while another one has its memory and descriptors: lets go of what the
    /// kernel keeps for a process. The device is at rest; when the guest goes on, here or there, it takes what it needs again.
    fn leave_process(&mut self) {}

    /// The guest goes on, here, with everything that [`drain`](Self::drain) left undone: after a stop, a refused update, or in the
    /// target. Queues are offered again by [`queue_ready`](Self::queue_ready) afterwards.
    ///
    /// The process or thread may be another one than before.
    fn resume(&mut self) {}

    /// How its state is saved and loaded. A device without an answer blocks every update as long as it is there.
    fn persistent(&mut self) -> Option<&mut dyn Persistent>;
}
