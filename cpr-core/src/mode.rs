//! What a mode is: an open name plus declared properties.
//!
//! Nothing in this workspace decides by comparing a mode's *name*. Subscribers, blockers and the memory rule ask
//! for [`Properties`], so that they also fit modes which are written later and elsewhere.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use crate::error::BoxError;
use crate::frame::Frame;
use crate::host::StateWriter;
use crate::preflight::{Asked, Manifest};
use crate::update::Attempt;

bitflags::bitflags! {
    /// What a mode promises about an update, declared by the mode itself.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct Properties: u32 {
        /// The target has the source's process id (and so its container, cgroup and parent).
        const SAME_PID = 1 << 0;
        /// The target runs in the source's address space. No mode of ours does; KVM ties a VM to one.
        const SAME_ADDRESS_SPACE = 1 << 1;
        /// Guest RAM is not copied: the target maps the pages that the source used.
        const RAM_IN_PLACE = 1 << 2;
        /// Open descriptors arrive at the target as the same open file descriptions.
        const DESCRIPTORS_SURVIVE = 1 << 3;
        /// The host kernel keeps running, so kernel objects and clocks stay comparable.
        const SAME_KERNEL = 1 << 4;
        /// Assigned devices stay attached, with their DMA and interrupts running.
        const DEVICES_STAY_ATTACHED = 1 << 5;
        /// Shared guest RAM is not copied: it is left in the file that it is in, and no process has to live meanwhile.
        const RAM_IN_STORAGE = 1 << 6;
    }
}

/// The name of a mode, as the user types it: `cpr-exec`, `cpr-transfer`, or a stranger's own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModeId(Cow<'static, str>);

impl ModeId {
    /// A mode id known at compile time.
    pub const fn from_static(name: &'static str) -> Self {
        ModeId(Cow::Borrowed(name))
    }

    /// A mode id read at run time, for example out of a state frame.
    pub fn new(name: impl Into<String>) -> Self {
        ModeId(Cow::Owned(name.into()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ModeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A mode as subscribers and blockers see it: who it is and what it promises.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModeInfo {
    /// The mode's name.
    pub id: ModeId,
    /// What it promises.
    pub properties: Properties,
}

/// A set of modes, named by id or by a predicate over [`Properties`].
///
/// ```
/// use cpr_core::{ModeId, ModeInfo, ModeSet, Properties};
///
/// // "Every mode that leaves RAM in place", including modes nobody has written yet.
/// let in_place = ModeSet::having(Properties::RAM_IN_PLACE);
/// let exec = ModeInfo {
///     id: ModeId::from_static("cpr-exec"),
///     properties: Properties::RAM_IN_PLACE | Properties::SAME_PID,
/// };
/// assert!(in_place.contains(&exec));
/// assert!(!ModeSet::none().or_id("cpr-reboot").contains(&exec));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ModeSet {
    ids: BTreeSet<ModeId>,
    predicates: Vec<Predicate>,
}

/// Matches a mode that has all of `required` and none of `excluded`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Predicate {
    required: Properties,
    excluded: Properties,
}

impl ModeSet {
    /// No mode at all; a start for [`or_id`](Self::or_id) and its siblings.
    pub fn none() -> Self {
        Self::default()
    }

    /// Every mode there is and will be.
    pub fn all() -> Self {
        Self::having(Properties::empty())
    }

    /// The modes with these names.
    pub fn of<I: IntoIterator<Item = ModeId>>(ids: I) -> Self {
        ModeSet { ids: ids.into_iter().collect(), predicates: Vec::new() }
    }

    /// The modes that declare all of `required`.
    pub fn having(required: Properties) -> Self {
        Self::none().or_having(required, Properties::empty())
    }

    /// Adds the mode named `id`.
    #[must_use]
    pub fn or_id(mut self, id: &str) -> Self {
        self.ids.insert(ModeId::new(id));
        self
    }

    /// Adds the modes that declare all of `required` and none of `excluded`.
    #[must_use]
    pub fn or_having(mut self, required: Properties, excluded: Properties) -> Self {
        self.predicates.push(Predicate { required, excluded });
        self
    }

    /// Whether `mode` belongs to the set.
    pub fn contains(&self, mode: &ModeInfo) -> bool {
        self.ids.contains(&mode.id)
            || self
                .predicates
                .iter()
                .any(|p| mode.properties.contains(p.required) && !mode.properties.intersects(p.excluded))
    }
}

/// What the host's loop has to wait for before it steps the update again.
#[derive(Debug, Clone)]
pub struct Wait {
    /// Each becomes readable when there is news. None: only the deadline counts.
    pub fds: Vec<Arc<OwnedFd>>,
    /// When to step again at the latest.
    pub deadline: Option<Instant>,
}

/// How far [`CprMode::prepare`] got.
#[derive(Debug)]
pub enum Prepared {
    /// Everything that can be ready before the guest stops is ready.
    Ready,
    /// Call again after this.
    Wait(Wait),
}

/// How the state leaves the source.
pub enum HandOver {
    /// Run this on the loop's own thread, as its last act. It returns only if it failed.
    Terminal(TerminalAction),
    /// The target is taking the state; call [`CprMode::poll_hand_over`] after this.
    Wait(Wait),
    /// The target (or storage) has the state: the source has nothing left to run.
    Complete,
}

impl fmt::Debug for HandOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HandOver::Terminal(_) => "Terminal",
            HandOver::Wait(_) => "Wait",
            HandOver::Complete => "Complete",
        })
    }
}

/// How an update runs, declared by its mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Course {
    /// The guest stands still while the target is started and built: it is stopped, everything is saved, and the program
    /// is gone. Simple, and all that a mode without a second process can do.
    Halted,
    /// The program leaves its process to the target and goes on in another one, where it runs the guest until the target is
    /// built. Two short pauses instead of one long one.
    Departing,
    /// The target is another process from its start, and is built while the program runs the guest.
    Alongside,
}

/// How the target learnt what it needs to build.
pub enum Introduced {
    /// It has it.
    Done,
    /// It gets it by this, once the guest is stopped: [`Course::Departing`].
    Terminal(TerminalAction),
}

impl fmt::Debug for Introduced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Introduced::Done => "Done",
            Introduced::Terminal(_) => "Terminal",
        })
    }
}

/// The last closure of a program image in its process, such as the exec itself.
///
/// It comes back with the reason why it failed; or, in a mode whose course is [`Course::Departing`], with `Ok` in the other
/// process that the program goes on in.
pub type TerminalAction = Box<dyn FnOnce() -> Result<(), BoxError> + Send>;

/// A way to get from source to target.
///
/// [`Update`](crate::Update) calls the methods in this order, each at most once per attempt unless it says
/// otherwise; `preflight` only if the host has a [manifest](crate::Host::manifest), and the two in parentheses only in modes
/// whose [`course`](Self::course) has them:
///
/// ```text
/// check ─► preflight (again while Wait) ─► prepare (again while Wait) ─► ( introduce ─► await_target (again while Wait) )
///                                        ─► [guest stops, state is saved] ─► hand_over ─► (poll_hand_over …)
/// nothing to undo │ any failure from preflight on ends in roll_back
/// ```
pub trait CprMode {
    /// The mode's name. Open: pick one that nobody else uses.
    fn id(&self) -> ModeId;

    /// What the mode promises. Must not change during an attempt.
    fn properties(&self) -> Properties;

    /// How an update in this mode runs. Must not change during an attempt.
    fn course(&self) -> Course {
        Course::Halted
    }

    /// What can be said at once. The guest runs and nothing may be touched.
    ///
    /// # Errors
    /// Whatever already forbids the update: a missing parameter, a program that cannot be executed.
    fn check(&mut self) -> Result<(), BoxError>;

    /// Shows the target the manifest, to which the mode adds what it will write itself, and hears its verdict, within a time
    /// limit of the mode's own. The guest runs and nothing may be touched: a target that is asked opens nothing of the
    /// guest's. A mode with nobody to ask has nothing to do here.
    ///
    /// # Errors
    /// The target cannot be asked at all, and so not be updated to. That it says no, or nothing, is [`Asked::Refused`].
    fn preflight(&mut self, attempt: &Attempt<'_>, manifest: &Manifest) -> Result<Asked, BoxError> {
        let _ = (attempt, manifest);
        Ok(Asked::Nobody)
    }

    /// Gets everything ready that needs no stopped guest and none of its state.
    ///
    /// # Errors
    /// The update is rolled back; the guest never stopped.
    fn prepare(&mut self, attempt: &Attempt<'_>) -> Result<Prepared, BoxError>;

    /// Gives the target what it needs to build: writes the registry with the mode's own descriptor codec into
    /// `state.early`, finishes that frame and sends it. A descriptor that the mode cannot carry is refused here, by name.
    ///
    /// The guest runs. Under [`Course::Departing`] it is stopped between this and the terminal action, and `state.main` is no
    /// state but as large as one: that there is no room for it is to be found out while the program still has its process. The
    /// state comes with [`hand_over`](Self::hand_over). Under [`Course::Alongside`] `state.main` is empty.
    ///
    /// # Errors
    /// The update is rolled back and the guest resumes.
    fn introduce(&mut self, attempt: &Attempt<'_>, state: StateWriter) -> Result<Introduced, BoxError> {
        let _ = (attempt, state);
        Ok(Introduced::Done)
    }

    /// Asks whether the target is ready for the state. The guest runs. Under [`Course::Departing`] this is the first call in
    /// the other process.
    ///
    /// # Errors
    /// The target failed, is gone, or took too long: the update is rolled back.
    fn await_target(&mut self, attempt: &Attempt<'_>) -> Result<Prepared, BoxError> {
        let _ = attempt;
        Ok(Prepared::Ready)
    }

    /// Hands the state to the target, with the guest stopped: finishes the main frame and sends it on its way.
    ///
    /// Under [`Course::Halted`] this is also where the early frame is finished: see [`introduce`](Self::introduce). Under the
    /// other courses `state.early` is empty.
    ///
    /// # Errors
    /// The update is rolled back and the guest resumes.
    fn hand_over(&mut self, attempt: &Attempt<'_>, state: StateWriter) -> Result<HandOver, BoxError>;

    /// Continues a hand over that answered [`HandOver::Wait`].
    ///
    /// # Errors
    /// As [`hand_over`](Self::hand_over).
    fn poll_hand_over(&mut self, attempt: &Attempt<'_>) -> Result<HandOver, BoxError> {
        let _ = attempt;
        Ok(HandOver::Complete)
    }

    /// Undoes whatever `preflight`, `prepare`, `hand_over` or a failed terminal action left behind, and ends the target, before the guest
    /// runs again. Must not fail: what cannot be undone is logged.
    fn roll_back(&mut self, attempt: &Attempt<'_>);
}

impl dyn CprMode + '_ {
    /// Name and properties together.
    pub fn info(&self) -> ModeInfo {
        ModeInfo { id: self.id(), properties: self.properties() }
    }
}

/// Where the target finds the main frame, when the host is ready to load it.
pub trait MainSource {
    /// Reads and checks the main frame.
    ///
    /// # Errors
    /// The frame is missing, damaged, or of another update.
    fn read_main(&mut self) -> Result<Frame, BoxError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(id: &'static str, properties: Properties) -> ModeInfo {
        ModeInfo { id: ModeId::from_static(id), properties }
    }

    #[test]
    fn sets_match_by_id_or_by_property() {
        let exec = mode("cpr-exec", Properties::RAM_IN_PLACE | Properties::SAME_PID);
        let transfer = mode("cpr-transfer", Properties::RAM_IN_PLACE);
        let reboot = mode("cpr-reboot", Properties::empty());

        let by_id = ModeSet::of([ModeId::from_static("cpr-exec"), ModeId::from_static("cpr-reboot")]);
        assert!(by_id.contains(&exec) && by_id.contains(&reboot) && !by_id.contains(&transfer));

        let in_place = ModeSet::having(Properties::RAM_IN_PLACE);
        assert!(in_place.contains(&exec) && in_place.contains(&transfer) && !in_place.contains(&reboot));

        let other_process = ModeSet::none().or_having(Properties::RAM_IN_PLACE, Properties::SAME_PID);
        assert!(!other_process.contains(&exec) && other_process.contains(&transfer));

        assert!(ModeSet::all().contains(&reboot));
        assert!(!ModeSet::none().contains(&exec));
    }

    #[test]
    fn a_mode_written_later_is_matched_by_its_properties() {
        let luo = mode("strangers-mode", Properties::RAM_IN_PLACE);
        assert!(ModeSet::having(Properties::RAM_IN_PLACE).contains(&luo));
        assert!(!ModeSet::having(Properties::RAM_IN_PLACE | Properties::SAME_KERNEL).contains(&luo));
    }
}
