//! An update that this program is the target of: what came, and from whom.

use cpr_core::error::BoxError;
use cpr_core::{Incoming, MainSource};
use cpr_exec::MainChannel;
use cpr_reboot::StateFile;

use crate::migration::exec_channel;
use crate::monitor::{Channel, QmpError};

/// An update that this program is the target of, until the guest is taken over.
pub struct Arriving {
    pub(crate) from: Predecessor,
    pub(crate) incoming: Incoming,
}

/// Who had the guest before.
pub(crate) enum Predecessor {
    /// The program that this process ran before.
    Exec {
        /// What remains of its arrival once the core has taken its part.
        rest: ExecRest,
        /// Where it wrote the main frame.
        main: MainChannel,
    },
    /// Another process, which still has it.
    Transfer(cpr_transfer::SourceEnd),
    /// None that lives: the guest is in storage.
    Storage(StateFile),
}

/// What remains of a [`cpr_exec::ExecArrival`] once the core has taken its part.
pub struct ExecRest {
    pub(crate) keeper: Option<cpr_exec::KeeperEnd>,
    pub(crate) source: cpr_exec::MainReader,
    /// This is a fallback start, and the update has failed with this error.
    pub(crate) failure: Option<String>,
}

impl Arriving {
    /// Whether the guest runs until its state is asked for. Then building takes none of its time.
    pub fn is_live(&self) -> bool {
        match &self.from {
            Predecessor::Exec { rest, .. } => rest.source.is_live(),
            Predecessor::Transfer(_) => true,
            Predecessor::Storage(_) => false,
        }
    }

    /// Why the update failed, if this program was started because of it.
    pub fn failure(&self) -> Option<&str> {
        match &self.from {
            Predecessor::Exec { rest, .. } => rest.failure.as_deref(),
            Predecessor::Transfer(_) | Predecessor::Storage(_) => None,
        }
    }

    /// Reads the main frame from `channel`, or from where the predecessor put it.
    ///
    /// # Errors
    /// It cannot be there.
    pub fn main(&self, channel: Option<Channel>) -> Result<Box<dyn MainSource>, QmpError> {
        match &self.from {
            Predecessor::Exec { rest, main } => {
                let channel = channel.map_or_else(|| Ok(main.clone()), exec_channel)?;
                Ok(rest.source.open(channel))
            }
            Predecessor::Transfer(source) => {
                channel.map_or(Ok(()), |channel| check_transfer_channel(&channel))?;
                Ok(source.main())
            }
            Predecessor::Storage(state) => Ok(state.main()),
        }
    }

    /// Whether there is still somebody who would give the guest.
    ///
    /// # Errors
    /// Why there is not.
    pub fn check_source(&self) -> Result<(), BoxError> {
        match &self.from {
            Predecessor::Exec { .. } | Predecessor::Storage(_) => Ok(()),
            Predecessor::Transfer(source) => source.check(),
        }
    }

    /// This program cannot take the guest over: whoever has it is told why, as far as that is possible.
    pub fn refuse(self, reason: &str) {
        self.incoming.abandon();
        if let Predecessor::Transfer(source) = self.from {
            source.refuse(reason);
        }
    }

    /// The user ends this program before it has the guest. Where it is the program that the user knows, nobody goes on with
    /// the guest; another process keeps it, and so does storage.
    pub fn forgo(self) {
        let rest = match self.from {
            Predecessor::Exec { rest, .. } => rest,
            Predecessor::Transfer(_) | Predecessor::Storage(_) => return self.refuse("its user ended it"),
        };
        let ended = self.incoming.forgo().map_err(anyhow::Error::from);
        let told = rest.keeper.map_or(Ok(()), |keeper| keeper.release());
        if let Err(error) = ended.and(told.map_err(Into::into)) {
            tracing::warn!(%error, "the guest goes on without this program");
        }
    }
}

/// What can be named as the main channel of cpr-transfer: the state goes through memory whatever the name, so a file would
/// not be what the user expects.
pub(crate) fn check_transfer_channel(channel: &Channel) -> Result<(), QmpError> {
    match channel {
        Channel::Memfd | Channel::Unix { .. } => Ok(()),
        Channel::File { .. } => Err(QmpError::generic(
            "Migration requires streamable transport (eg unix): under cpr-transfer the state goes through memory, and the \
             main channel is unix:PATH or memfd:",
        )),
    }
}
