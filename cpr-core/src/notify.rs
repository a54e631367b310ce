//! The multi-mode notifier: one subscription for several modes, told of each phase of an update.
//!
//! Events go out in ascending [`OrderClass`], within a class in the order of subscription; endings
//! ([`Event::RolledBack`], [`Event::Abandoned`]) go out in exactly the reverse order, and only to those who were
//! told of the beginning. Callbacks run on the thread that steps the update.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use crate::error::BoxError;
use crate::mode::{ModeInfo, ModeSet};
use crate::ownership::Epoch;

/// What subscribers are told, in the order of `docs/architecture.md`, "One update, phase by phase".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Event {
    /// Source; the guest runs. Get ready, or fail and so refuse the update.
    Prepare,
    /// Source; the guest is stopped. Detach interrupts; fail and the guest resumes.
    Stopped,
    /// Source; the state is saved. Give up what the target must take: the last step that may fail.
    HandOver,
    /// Target; the descriptors are there, no device is yet.
    Adopt,
    /// Target; state is loaded and the irqchip is back. Attach interrupts, re-kick queues.
    Restored,
    /// Target; committed, the guest was told to run. Cannot fail.
    Running,
    /// Target; the keeper or source has ended. Cannot fail.
    Released,
    /// Source; the update failed, the guest resumes here. Sent in reverse order. Cannot fail.
    RolledBack,
    /// Target; the update failed, the guest belongs to somebody else. Sent in reverse order. Cannot fail.
    Abandoned,
}

impl Event {
    /// Whether a subscriber's error stops the update. After the commit, and while unwinding, nothing can.
    pub fn may_fail(self) -> bool {
        matches!(self, Event::Prepare | Event::Stopped | Event::HandOver | Event::Adopt | Event::Restored)
    }

    fn is_ending(self) -> bool {
        matches!(self, Event::RolledBack | Event::Abandoned)
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Where in the order a subscriber is told. Any number will do; the constants are common ground.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OrderClass(pub i32);

impl OrderClass {
    /// Told first, and last when unwinding.
    pub const EARLY: OrderClass = OrderClass(-100);
    /// Devices and most others.
    pub const NORMAL: OrderClass = OrderClass(0);
    /// Told last, and first when unwinding: those that other subscribers still use.
    pub const LATE: OrderClass = OrderClass(100);
}

/// What a callback is given.
#[derive(Debug, Clone, Copy)]
pub struct Notice<'a> {
    /// What happened.
    pub event: Event,
    /// In which mode.
    pub mode: &'a ModeInfo,
    /// In which attempt.
    pub epoch: Epoch,
}

/// A subscriber refused, or failed at, an event.
#[derive(Debug, thiserror::Error)]
#[error("{subscriber} failed at {event}: {source}")]
pub struct NotifyError {
    /// The name it subscribed with.
    pub subscriber: String,
    /// What it was told.
    pub event: Event,
    /// Its own words.
    pub source: BoxError,
}

type Callback = Box<dyn FnMut(&Notice<'_>) -> Result<(), BoxError> + Send>;

struct Subscriber {
    name: String,
    modes: ModeSet,
    class: OrderClass,
    serial: u64,
    callback: Mutex<Callback>,
}

impl Subscriber {
    fn rank(&self) -> (OrderClass, u64) {
        (self.class, self.serial)
    }
}

#[derive(Default)]
struct Inner {
    next_serial: u64,
    /// Sorted by rank.
    subscribers: Vec<Weak<Subscriber>>,
}

/// The notifier of one VMM. Clones share one list.
#[derive(Clone, Default)]
pub struct Notifier {
    inner: Arc<Mutex<Inner>>,
}

impl fmt::Debug for Notifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let subscribers = self.subscribers();
        let live: Vec<_> = subscribers.iter().filter_map(Weak::upgrade).collect();
        f.debug_list().entries(live.iter().map(|s| &s.name)).finish()
    }
}

/// Keeps one subscriber; dropping it unsubscribes.
#[must_use = "dropping the subscription unsubscribes"]
pub struct Subscription {
    _subscriber: Arc<Subscriber>,
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Subscription").field(&self._subscriber.name).finish()
    }
}

impl Notifier {
    /// Subscribes `callback` to every event of updates in `modes`. `name` is what errors call it.
    ///
    /// A callback must not step the update it is told of; it may subscribe, unsubscribe and use the registry.
    pub fn subscribe(
        &self,
        name: impl Into<String>,
        modes: ModeSet,
        class: OrderClass,
        callback: impl FnMut(&Notice<'_>) -> Result<(), BoxError> + Send + 'static,
    ) -> Subscription {
        let mut inner = crate::lock(&self.inner);
        let serial = inner.next_serial;
        inner.next_serial += 1;
        let subscriber = Arc::new(Subscriber {
            name: name.into(),
            modes,
            class,
            serial,
            callback: Mutex::new(Box::new(callback)),
        });
        inner.subscribers.retain(|s| s.strong_count() > 0);
        let at =
            inner.subscribers.partition_point(|s| s.upgrade().is_some_and(|s| s.rank() <= subscriber.rank()));
        inner.subscribers.insert(at, Arc::downgrade(&subscriber));
        Subscription { _subscriber: subscriber }
    }

    /// A snapshot to walk without the lock. Weak, so that whoever unsubscribes meanwhile is not called any more.
    fn subscribers(&self) -> Vec<Weak<Subscriber>> {
        crate::lock(&self.inner).subscribers.clone()
    }
}

/// The notifications of one attempt: remembers who was told of the beginning, so that exactly those are told of the
/// end.
#[derive(Default)]
pub(crate) struct Told {
    /// By rank, which no two subscribers of a notifier share.
    subscribers: BTreeMap<(OrderClass, u64), Weak<Subscriber>>,
}

impl Told {
    /// Tells everybody who subscribed to `notice.mode`, whether or not they were told before.
    pub(crate) fn tell_all(&mut self, notifier: &Notifier, notice: &Notice<'_>) -> Result<(), NotifyError> {
        for weak in notifier.subscribers() {
            let Some(subscriber) = weak.upgrade().filter(|s| s.modes.contains(notice.mode)) else { continue };
            self.subscribers.insert(subscriber.rank(), weak);
            call(&subscriber, notice)?;
        }
        Ok(())
    }

    /// Tells those who were told before and still subscribe. Endings go out in reverse order of rank and reach
    /// everybody; another event stops at the first error.
    pub(crate) fn tell_again(&self, notice: &Notice<'_>) -> Result<(), NotifyError> {
        let mut order: Vec<_> = self.subscribers.values().collect();
        if notice.event.is_ending() {
            order.reverse();
        }
        for weak in order {
            let Some(subscriber) = weak.upgrade() else { continue };
            call(&subscriber, notice)?;
        }
        Ok(())
    }
}

fn call(subscriber: &Subscriber, notice: &Notice<'_>) -> Result<(), NotifyError> {
    let result = crate::lock(&subscriber.callback)(notice);
    match result {
        Err(source) if notice.event.may_fail() => {
            Err(NotifyError { subscriber: subscriber.name.clone(), event: notice.event, source })
        }
        Err(error) => {
            tracing::warn!(subscriber = subscriber.name, event = %notice.event, %error, "ignored");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mode::{ModeId, Properties};

    type Log = Arc<Mutex<Vec<(&'static str, Event)>>>;

    fn exec() -> ModeInfo {
        ModeInfo { id: ModeId::from_static("cpr-exec"), properties: Properties::RAM_IN_PLACE }
    }

    fn subscribe(
        notifier: &Notifier,
        log: &Log,
        name: &'static str,
        class: OrderClass,
        fails_at: Option<Event>,
    ) -> Subscription {
        let log = log.clone();
        notifier.subscribe(name, ModeSet::all(), class, move |notice| {
            log.lock().unwrap().push((name, notice.event));
            if Some(notice.event) == fails_at { Err("no".into()) } else { Ok(()) }
        })
    }

    fn tell_all(told: &mut Told, notifier: &Notifier, event: Event) -> Result<(), NotifyError> {
        told.tell_all(notifier, &Notice { event, mode: &exec(), epoch: 1 })
    }

    fn tell_again(told: &Told, event: Event) -> Result<(), NotifyError> {
        told.tell_again(&Notice { event, mode: &exec(), epoch: 1 })
    }

    fn take(log: &Log) -> Vec<(&'static str, Event)> {
        std::mem::take(&mut log.lock().unwrap())
    }

    #[test]
    fn order_is_by_class_then_by_subscription_and_reversed_for_endings() {
        let (notifier, log) = (Notifier::default(), Log::default());
        let _late = subscribe(&notifier, &log, "late", OrderClass::LATE, None);
        let _b = subscribe(&notifier, &log, "b", OrderClass::NORMAL, None);
        let _c = subscribe(&notifier, &log, "c", OrderClass::NORMAL, None);
        let _early = subscribe(&notifier, &log, "early", OrderClass::EARLY, None);

        let mut told = Told::default();
        tell_all(&mut told, &notifier, Event::Prepare).unwrap();
        let names = |log: &Log| take(log).into_iter().map(|(n, _)| n).collect::<Vec<_>>();
        assert_eq!(names(&log), ["early", "b", "c", "late"]);
        tell_again(&told, Event::Stopped).unwrap();
        assert_eq!(names(&log), ["early", "b", "c", "late"]);
        tell_again(&told, Event::RolledBack).unwrap();
        assert_eq!(names(&log), ["late", "c", "b", "early"]);
    }

    #[test]
    fn a_failing_prepare_names_itself_and_only_those_told_hear_the_end() {
        let (notifier, log) = (Notifier::default(), Log::default());
        let _a = subscribe(&notifier, &log, "a", OrderClass::NORMAL, None);
        let _b = subscribe(&notifier, &log, "b", OrderClass::NORMAL, Some(Event::Prepare));
        let _c = subscribe(&notifier, &log, "c", OrderClass::NORMAL, None);

        let mut told = Told::default();
        let error = tell_all(&mut told, &notifier, Event::Prepare).unwrap_err();
        assert_eq!(error.to_string(), "b failed at Prepare: no");
        tell_again(&told, Event::RolledBack).unwrap();
        use Event::*;
        assert_eq!(take(&log), [("a", Prepare), ("b", Prepare), ("b", RolledBack), ("a", RolledBack)]);
    }

    #[test]
    fn endings_reach_everybody_even_if_one_of_them_fails() {
        let (notifier, log) = (Notifier::default(), Log::default());
        let _a = subscribe(&notifier, &log, "a", OrderClass::NORMAL, None);
        let _b = subscribe(&notifier, &log, "b", OrderClass::NORMAL, Some(Event::RolledBack));
        let mut told = Told::default();
        tell_all(&mut told, &notifier, Event::Prepare).unwrap();
        take(&log);
        tell_again(&told, Event::RolledBack).unwrap();
        assert_eq!(take(&log), [("b", Event::RolledBack), ("a", Event::RolledBack)]);
    }

    #[test]
    fn a_subscription_that_is_gone_or_of_another_mode_hears_nothing() {
        let (notifier, log) = (Notifier::default(), Log::default());
        let a = subscribe(&notifier, &log, "a", OrderClass::NORMAL, None);
        let _other = notifier
            .subscribe("other", ModeSet::none().or_id("x"), OrderClass::EARLY, |_| Err("never".into()));
        let mut told = Told::default();
        tell_all(&mut told, &notifier, Event::Prepare).unwrap();
        drop(a);
        tell_again(&told, Event::Stopped).unwrap();
        assert_eq!(take(&log), [("a", Event::Prepare)]);
    }

    #[test]
    fn a_callback_may_subscribe_and_unsubscribe() {
        let (notifier, log) = (Notifier::default(), Log::default());
        let inner = notifier.clone();
        let held = Mutex::new(None);
        let log2 = log.clone();
        let _a = notifier.subscribe("a", ModeSet::all(), OrderClass::NORMAL, move |_| {
            *held.lock().unwrap() = Some(subscribe(&inner, &log2, "nested", OrderClass::NORMAL, None));
            Ok(())
        });
        let mut told = Told::default();
        tell_all(&mut told, &notifier, Event::Adopt).unwrap();
        assert_eq!(take(&log), []);
        tell_all(&mut told, &notifier, Event::Running).unwrap();
        assert_eq!(take(&log), [], "the first nested subscription was replaced while told");
    }
}
