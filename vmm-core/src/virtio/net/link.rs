//! What the device needs of the wire behind it.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use cpr_core::error::BoxError;
use oslib::tap::Offloads;

/// One queue of a network: the other end of a pair of virtio queues. [`Tap`](super::Tap) is the one there is; a test has a
/// socket that keeps the borders of packets.
pub trait Link: Send + fmt::Debug {
    /// From where packets are read, and where they are written to, whole and with a header before each. Never blocks.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Whether it has come with an update, set up as the device left it.
    fn is_adopted(&self) -> bool;

    /// The interface's name by now, if it has one.
    ///
    /// # Errors
    /// There was one, and it is gone.
    fn interface(&self) -> Result<Option<String>, BoxError> {
        Ok(None)
    }

    /// What packets may be like that are read. Counts for all queues of a network.
    ///
    /// # Errors
    /// Those of the kernel.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// Whether this queue takes part. May be called again with what is already.
    ///
    /// # Errors
    /// Those of the kernel.
    fn set_attached(&self, attached: bool) -> io::Result<()>;
}
