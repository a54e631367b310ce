//! Taps: opened by name, given as descriptors, or kept over an update.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use cpr_core::error::BoxError;
use oslib::tap::{self, Interface, Offloads, TapError};

use super::{HEADER_LEN, Link};

/// Why a network cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// The interface cannot be opened.
    #[error(transparent)]
    Open(TapError),
    /// A descriptor is of no use.
    #[error("tap descriptor {position} of this network cannot be used")]
    Descriptor {
        /// Which one, beginning with 0.
        position: usize,
        /// Why.
        #[source]
        source: TapError,
    },
    /// Its status flags cannot be read or set.
    #[error("tap descriptor {position} of this network cannot be made nonblocking")]
    StatusFlags {
        /// Which one, beginning with 0.
        position: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is none.
    #[error("a network needs at least one tap")]
    None,
    /// Several descriptors that do not belong together.
    #[error("tap descriptors of one network are of two interfaces, '{first}' and '{other}'")]
    SeveralInterfaces {
        /// That of the first descriptor.
        first: String,
        /// Another.
        other: String,
    },
    /// Several descriptors of an interface that has one queue.
    #[error("tap interface '{name}' has one queue only: make it with multi_queue, or use one descriptor")]
    OneQueue {
        /// The interface.
        name: String,
    },
    /// The update brought another interface than the command line names.
    #[error(
        "the guest's network is on tap interface '{found}', not on '{expected}': give the name that it has"
    )]
    OtherInterface {
        /// The interface of the descriptor.
        found: String,
        /// What the command line says.
        expected: String,
    },
    /// It is gone.
    #[error("tap interface '{name}' cannot be used any more")]
    Lost {
        /// What it was called.
        name: String,
        /// Why.
        #[source]
        source: TapError,
    },
    /// Somebody changed it since the update's source had it.
    #[error("tap interface '{name}' {what}, so somebody else has changed it")]
    Changed {
        /// The interface.
        name: String,
        /// What is not as it was left.
        what: String,
    },
}

/// One queue of a tap interface.
#[derive(Debug)]
pub struct Tap {
    fd: Arc<OwnedFd>,
    interface: Interface,
    adopted: bool,
}

impl Tap {
    /// Opens `queues` queues of the interface `name`, or of a new one with a name that the kernel chooses, and sets them up:
    /// without offloads, the first one taking part.
    ///
    /// # Errors
    /// [`NetError::Open`] and [`NetError::Descriptor`].
    pub fn open(name: Option<&str>, queues: usize) -> Result<Vec<Self>, NetError> {
        let several = queues > 1;
        let first = tap::open(name.unwrap_or("tap%d"), several).map_err(NetError::Open)?;
        let name = interface(&first, 0)?.name;
        let others = (1..queues).map(|_| tap::open(&name, several).map_err(NetError::Open));
        let fds = std::iter::once(Ok(first)).chain(others).collect::<Result<_, _>>()?;
        Self::from_fds(fds)
    }

    /// Takes descriptors that another program has opened, one for each queue, and sets them up in the same way.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Vec<Self>, NetError> {
        let taps = Self::of(fds.into_iter().map(Arc::new).collect(), false)?;
        for (position, tap) in taps.iter().enumerate() {
            tap::set_nonblocking(&tap.fd).map_err(|source| NetError::StatusFlags { position, source })?;
            tap.set_up(position == 0).map_err(|source| NetError::Descriptor { position, source })?;
        }
        Ok(taps)
    }

    /// Takes descriptors that have come with an update, one for each queue, in the order in which the source had them. Changes
    /// nothing: the guest may be running with them elsewhere. `name` is the interface that the command line names, if it does.
    ///
    /// # Errors
    /// [`NetError`], also for an interface that has vanished or was changed.
    pub fn adopt(fds: Vec<Arc<OwnedFd>>, name: Option<&str>) -> Result<Vec<Self>, NetError> {
        let taps = Self::of(fds, true)?;
        Self::check_name(name, &taps[0].interface.name)?;
        for (position, tap) in taps.iter().enumerate() {
            tap.check_unchanged(position)?;
        }
        Ok(taps)
    }

    /// Whether a command line that names the interface `expected`, if any, is for one that is called `found`.
    ///
    /// # Errors
    /// [`NetError::OtherInterface`].
    pub fn check_name(expected: Option<&str>, found: &str) -> Result<(), NetError> {
        match expected.filter(|name| !name.contains('%') && *name != found) {
            Some(expected) => {
                Err(NetError::OtherInterface { found: found.to_owned(), expected: expected.to_owned() })
            }
            None => Ok(()),
        }
    }

    /// Looks at descriptors, and at what they have in common.
    fn of(fds: Vec<Arc<OwnedFd>>, adopted: bool) -> Result<Vec<Self>, NetError> {
        let tap = |(position, fd): (usize, Arc<OwnedFd>)| {
            Ok(Self { interface: interface(&fd, position)?, fd, adopted })
        };
        let taps = fds.into_iter().enumerate().map(tap).collect::<Result<Vec<_>, NetError>>()?;
        let first = taps.first().ok_or(NetError::None)?.interface.clone();
        if let Some(other) = taps.iter().find(|tap| tap.interface.name != first.name) {
            let other = other.interface.name.clone();
            return Err(NetError::SeveralInterfaces { first: first.name, other });
        }
        if taps.len() > 1 && !first.multi_queue {
            return Err(NetError::OneQueue { name: first.name });
        }
        Ok(taps)
    }

    /// Everything that the device relies on, whoever had the interface before.
    fn set_up(&self, attached: bool) -> Result<(), TapError> {
        tap::set_vnet_header_len(&self.fd, HEADER_LEN as u8)?;
        // What the device offers to its driver must work once the driver asks for it.
        tap::set_offloads(&self.fd, Offloads::all())?;
        tap::set_offloads(&self.fd, Offloads::empty())?;
        self.attach(attached)
    }

    fn check_unchanged(&self, position: usize) -> Result<(), NetError> {
        let changed = |what: String| NetError::Changed { name: self.interface.name.clone(), what };
        match tap::vnet_header_len(&self.fd) {
            Ok(HEADER_LEN) => {}
            Ok(other) => return Err(changed(format!("has a header of {other} bytes, not of {HEADER_LEN}"))),
            Err(source) => return Err(NetError::Descriptor { position, source }),
        }
        match tap::is_nonblocking(&self.fd) {
            Ok(true) => Ok(()),
            Ok(false) => Err(changed("has become blocking".to_owned())),
            Err(source) => Err(NetError::StatusFlags { position, source }),
        }
    }

    /// The kernel refuses to attach or detach twice, and remembers which it was over an update.
    fn attach(&self, attached: bool) -> Result<(), TapError> {
        if !self.interface.multi_queue || tap::interface(&self.fd)?.attached == attached {
            return Ok(());
        }
        tap::set_attached(&self.fd, attached)
    }

    /// The descriptor, for the registry: it must survive.
    pub fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// The interface's name when the descriptor was taken.
    pub fn name(&self) -> &str {
        &self.interface.name
    }
}

fn interface(fd: impl AsFd, position: usize) -> Result<Interface, NetError> {
    tap::interface(fd).map_err(|source| NetError::Descriptor { position, source })
}

impl Link for Tap {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn is_adopted(&self) -> bool {
        self.adopted
    }

    fn interface(&self) -> Result<Option<String>, BoxError> {
        match tap::interface(&self.fd) {
            Ok(interface) => Ok(Some(interface.name)),
            Err(source) => Err(NetError::Lost { name: self.interface.name.clone(), source }.into()),
        }
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        tap::set_offloads(&self.fd, offloads).map_err(io::Error::other)
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        self.attach(attached).map_err(io::Error::other)
    }
}
