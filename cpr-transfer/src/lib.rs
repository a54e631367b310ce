//! The cpr-transfer mode: the target is another process, started by the user, and is built while the source runs the
//! guest.
//!
//! The two meet on a unix socket, the `cpr` channel: the target listens, the source connects, and gives it every
//! descriptor of its registry and what must be known before a device is made. From then on they share memory: the
//! control page with the [rendezvous](cpr_core::rendezvous), and a memfd that the state of the stopped guest is written
//! to. Nothing of the guest's pause goes through a socket.
//!
//! ```text
//!   target                                   source
//!   Listener::bind
//!                       ◄──── hello ───────  preflight or prepare: connects
//!   its pidfd           ───── hello ──────►
//!                       ◄─── manifest ─────  preflight
//!   can it be done?     ──── verdict ─────►
//!                       ◄─ introduction ───  introduce: early frame, control page, state memfd, doorbell, pidfd, registry
//!   builds, then Ready, rings ────────────►  await_target
//!   waits for the word  ◄─── published ────  stops the guest, saves, hand_over
//!   commits, rings      ──────────────────►  poll_hand_over: Complete
//!
//!   at any time         ── refused: why ──►  rolls back; and the end of either process is seen by the other
//! ```
//!
//! - Source: hand a [`CprTransfer`] to [`cpr_core::Update::begin`].
//! - Target: a [`Listener`], polled by the program's own loop, gives a [`TransferArrival`].
//!
//! Either side accepts a peer of its own user, or of root, and nobody else. A peer that says nothing, or something else,
//! is given up within a time limit; until it has taken the introduction the target goes back to listening.

mod protocol;
mod source;
mod target;

pub use protocol::{PeerError, VERSION};
pub use source::{CprTransfer, Endpoint};
pub use target::{ListenError, Listener, SourceEnd, TransferArrival, catalogue};

use cpr_core::{ModeId, ModeInfo, Properties};

/// The mode's name.
pub const MODE: ModeId = ModeId::from_static("cpr-transfer");

/// What the mode promises.
pub const PROPERTIES: Properties = Properties::RAM_IN_PLACE
    .union(Properties::DESCRIPTORS_SURVIVE)
    .union(Properties::SAME_KERNEL)
    .union(Properties::DEVICES_STAY_ATTACHED);

/// Name and properties together.
pub fn mode_info() -> ModeInfo {
    ModeInfo { id: MODE, properties: PROPERTIES }
}
