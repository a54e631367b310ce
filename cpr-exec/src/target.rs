//! The target's half: finds the early frame through the environment, and the descriptors through the frame.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use cpr_core::error::BoxError;
use cpr_core::fault::{self, Point};
use cpr_core::frame::Frame;
use cpr_core::{Arrival, Control, FdRegistry, LiveMain, MainSource, TargetPhase};
use oslib::eventfd::EventFd;
use oslib::signals::SignalMask;

use crate::channel::{ChannelSource, MainChannel};
use crate::cleanup::KeeperEnd;
use crate::environment::{EnvironmentError, take_state_variable};
use crate::fallback::{self, LastWords, with_words};
use crate::{MODE, ProcessSection, STATE_VARIABLE, mode_info, names};

/// Why the state of the previous program image could not be taken over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// A reserved variable is unknown or malformed.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    /// The number is no open descriptor that an exec could have passed on.
    #[error("environment variable {variable} names descriptor {number}, which was not passed on: {source}")]
    NotInherited {
        /// The variable.
        variable: &'static str,
        /// The number.
        number: i32,
        /// The cause.
        source: io::Error,
    },
    /// The number is open, but it is something else.
    #[error("environment variable {variable} names descriptor {number}, which is no memfd")]
    NotAMemfd {
        /// The variable.
        variable: &'static str,
        /// The number.
        number: i32,
    },
    /// The early frame is damaged, or not what this version reads.
    #[error("the CPR state left by the previous program cannot be used: {0}")]
    State(#[source] BoxError),
}

/// An update that arrived by exec.
#[derive(Debug)]
pub struct ExecArrival {
    /// For [`cpr_core::Incoming::begin`].
    pub arrival: Arrival,
    /// The signal mask to restore once this program's handlers stand. Until then every signal is blocked.
    pub signal_mask: SignalMask,
    /// Where the source wrote the main frame.
    pub main: MainChannel,
    /// What to do with the keeper after the commit, if there is one.
    pub keeper: Option<KeeperEnd>,
    /// Reads the main frame, there or elsewhere.
    pub source: MainReader,
    /// In a fallback start, the error of the update: this is the source's program, started again in place of one that could
    /// not take the guest over.
    pub failure: Option<String>,
}

/// Opens the main frame for [`cpr_core::Incoming::load`].
#[derive(Debug)]
pub struct MainReader {
    memfd: Option<Arc<OwnedFd>>,
    /// The source's end of a rendezvous, if it goes on until then: its page, its doorbell, and its keeper.
    live: Option<(Control, Arc<EventFd>, Option<Arc<OwnedFd>>)>,
}

/// How long a source may take to stop its guest and save it.
const SAVED_WITHIN: Duration = Duration::from_secs(20);

impl MainReader {
    /// Whether the source still runs the guest. Then building takes none of the guest's time.
    pub fn is_live(&self) -> bool {
        self.live.is_some()
    }

    /// The main frame in `channel`: normally [`ExecArrival::main`], or where the user says that it is.
    /// If the source still runs the guest, reading means: ask for the state, and wait for it.
    pub fn open(&self, channel: MainChannel) -> Box<dyn MainSource> {
        let source = Box::new(ChannelSource { channel, memfd: self.memfd.clone() });
        match &self.live {
            Some((control, doorbell, keeper)) => {
                let live = LiveMain::new(control.clone(), doorbell.clone(), SAVED_WITHIN, source);
                Box::new(keeper.iter().cloned().fold(live, LiveMain::watching))
            }
            None => source,
        }
    }
}

/// Takes what the previous program image of this process left, if it was replaced by cpr-exec.
///
/// Call it first thing in `main`, with one thread and before anything is opened: descriptor numbers of the frame are
/// believed, because only what was passed on by exec lacks close-on-exec then. From here to the commit fatal signals, for
/// which it leaves handlers, and [`fall_back`](crate::fall_back) bring the source's program back into this process, if the
/// source provides for it.
///
/// # Errors
/// A reserved variable is unknown (the program must exit), or the state cannot be used. Nothing was changed for the
/// guest: it is still the previous program's.
pub fn receive() -> Result<Option<ExecArrival>, ReceiveError> {
    let Some(number) = take_state_variable()? else { return Ok(None) };
    let variable = STATE_VARIABLE;
    let state = oslib::inherited::take(number).map_err(|source| ReceiveError::NotInherited {
        variable,
        number,
        source,
    })?;
    if !oslib::memfd::is_memfd(&state).unwrap_or(false) {
        return Err(ReceiveError::NotAMemfd { variable, number });
    }
    take_over(state).map(Some).map_err(ReceiveError::State)
}

fn take_over(state: OwnedFd) -> Result<ExecArrival, BoxError> {
    let mut early = Frame::read_memfd(&state)?;
    fault::at(Point::Receive)?;
    let process: ProcessSection = early.require(names::PROCESS_SECTION, 0)?.decode(1)?;
    let registry = FdRegistry::decode(&early.require(FdRegistry::SECTION, 0)?, |_, token| {
        Ok(oslib::inherited::take(i32::try_from(token)?)?)
    })?;
    let control: Arc<OwnedFd> = registry.find(names::CONTROL, 0).ok_or("its control page is missing")?;
    let control = Control::attach(control, early.epoch)?;
    let rendezvous = control.rendezvous();
    rendezvous.enter(TargetPhase::Building);
    let words = match (registry.find(names::LAST_WORDS, 0), registry.find(names::STDERR, 0)) {
        (Some(memfd), Some(original)) => Some(LastWords { memfd, original }),
        _ => None,
    };
    let [program, directory] =
        [names::PROGRAM, names::DIRECTORY].map(|name| registry.find::<OwnedFd>(name, 0));
    let failure = rendezvous.is_fallback().then(|| {
        fallback::settle_in();
        let words = words.as_ref().map(LastWords::read).unwrap_or_default();
        with_words(format!("{MODE} could not hand over: the new program failed before it took over"), &words)
    });
    if let (None, Some(program), Some(directory), Some(wire)) =
        (&failure, program, directory, process.fallback)
        && let Err(error) = fallback::prepare(wire, [&program, &directory], &registry, &state, &control)
    {
        // There is still the keeper.
        eprintln!("the way back to the previous program could not be made ready: {error}");
    }
    let doorbell: Option<Arc<EventFd>> = registry.find(names::DOORBELL, 0);
    let keeper = match (control.keeper_pid(), &doorbell) {
        (Some(pid), Some(doorbell)) => Some(KeeperEnd::new(pid, doorbell.clone(), words)?),
        _ => None,
    };
    let live = match (process.source_goes_on, doorbell) {
        (true, Some(doorbell)) => {
            let process = keeper.as_ref().map(|keeper| keeper.as_fd().try_clone_to_owned()).transpose()?;
            Some((control.clone(), doorbell, process.map(Arc::new)))
        }
        (true, None) => return Err("its doorbell is missing".into()),
        (false, _) => None,
    };
    let memfd = registry.find(names::MAIN, 0);
    // They have served. The next update brings its own of the same names, even while somebody still holds these.
    for name in names::OWN {
        registry.delete(name, 0);
    }
    fault::at(Point::Received)?;
    Ok(ExecArrival {
        source: MainReader { memfd, live },
        arrival: Arrival { mode: mode_info(), early, registry, control },
        signal_mask: SignalMask::from_bits(process.signal_mask),
        main: process.main.into(),
        keeper,
        failure,
    })
}
