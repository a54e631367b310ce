//! Disk images on the host: raw files and block devices.
//!
//! An [`Image`] is an open, locked descriptor with a size. Whoever has it reads and writes it by position only, so that the
//! description's own position, which processes share, never matters. After an update the descriptor that arrived is
//! [adopted](Image::adopt), and nothing is opened: the locks belong to the open file, and were never let go of.
//!
//! The locks are those of QEMU's `block/file-posix.c`, byte for byte, so that a QEMU, a `qemu-img` and a `cpr-vmm` keep each
//! other out of an image just as two QEMUs do.

mod image;
mod lock;

pub use image::{Cache, Image, ImageConfig, ImageError, ImageIdentity, SECTOR_LEN};
pub use lock::LockError;
