//! The registry of descriptors that must survive an update: `(name, id) -> descriptor`.
//!
//! Owners keep their descriptors; the registry holds no more than a weak reference, so an entry goes away with its
//! owner and can never name a recycled number. After an update the registry holds what arrived until its new owner
//! [`find`](FdRegistry::find)s it.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};

use crate::error::BoxError;
use crate::frame::Section;

/// What kind of kernel object a descriptor is. A mode may refuse the kinds it cannot carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum FdKind {
    /// A memfd, such as guest RAM.
    Memfd,
    /// An eventfd.
    EventFd,
    /// A socket, listening or connected.
    Socket,
    /// A tap device queue.
    Tap,
    /// A KVM descriptor. It survives, but KVM serves it only to the address space that made it.
    Kvm,
    /// A VFIO group, container or device.
    Vfio,
    /// An iommufd context.
    Iommufd,
    /// A file, terminal, pipe or anything else.
    Other,
}

/// What happens to an entry that nobody finds after the update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FdPolicy {
    /// The guest depends on it: if nobody claims it the update is refused.
    MustSurvive,
    /// Whoever needs it can make it again: if nobody claims it, it is closed and that is logged.
    MayBeRebuilt,
}

/// An entry without its descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FdEntry {
    /// The owner's name: a memory backend's id, a chardev's id.
    pub name: String,
    /// Tells several descriptors of one owner apart.
    pub id: u64,
    /// The kind.
    pub kind: FdKind,
    /// The policy.
    pub policy: FdPolicy,
}

impl fmt::Display for FdEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}' (id {})", self.name, self.id)
    }
}

/// Why an entry could not be saved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// Another owner holds this name and id.
    #[error("descriptor '{name}' (id {id}) is registered already")]
    Duplicate {
        /// The name.
        name: String,
        /// The id.
        id: u64,
    },
}

/// Why [`FdRegistry::find_or_open`] has no descriptor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FindOrOpenError {
    /// The name is taken.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// It was not there, and opening it failed.
    #[error("cannot open '{name}' (id {id}): {source}")]
    Open {
        /// The name.
        name: String,
        /// The id.
        id: u64,
        /// The cause.
        source: std::io::Error,
    },
}

/// A descriptor that somebody owns: an [`OwnedFd`], a `File`, a socket, an own type.
pub trait SharedFd: AsFd + Send + Sync + 'static {}
impl<T: AsFd + Send + Sync + 'static> SharedFd for T {}

enum Held {
    /// Its owner has it; gone when the owner is.
    ByOwner(Weak<dyn SharedFd>),
    /// It came with the update and waits to be found.
    Unclaimed(OwnedFd),
}

impl Held {
    fn is_alive(&self) -> bool {
        match self {
            Held::ByOwner(weak) => weak.strong_count() > 0,
            Held::Unclaimed(_) => true,
        }
    }
}

struct Slot {
    kind: FdKind,
    policy: FdPolicy,
    held: Held,
}

type Slots = BTreeMap<(String, u64), Slot>;

/// The registry of one VMM. Clones share one table; the order of a walk is by name, then id.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::{fs::File, sync::Arc};
/// use cpr_core::{FdKind, FdPolicy, FdRegistry};
///
/// let registry = FdRegistry::default();
/// let log = Arc::new(File::open("/dev/null")?);
/// registry.save("log", 0, FdKind::Other, FdPolicy::MayBeRebuilt, &log)?;
/// assert!(registry.contains("log", 0));
///
/// drop(log); // an owner that goes away takes its entry with it
/// assert!(!registry.contains("log", 0));
/// # Ok(()) }
/// ```
#[derive(Clone, Default)]
pub struct FdRegistry {
    slots: Arc<Mutex<Slots>>,
}

impl fmt::Debug for FdRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(crate::lock(&self.slots).keys()).finish()
    }
}

impl FdRegistry {
    /// Name of the early section that modes keep an encoded registry in.
    pub const SECTION: &'static str = "cpr-core/registry";

    /// Enters `fd` under `name` and `id` for as long as somebody holds the `Arc`.
    ///
    /// # Errors
    /// [`RegistryError::Duplicate`] when a living owner, or an arrival that nobody found yet, has that name and id.
    pub fn save<T: SharedFd>(
        &self,
        name: &str,
        id: u64,
        kind: FdKind,
        policy: FdPolicy,
        fd: &Arc<T>,
    ) -> Result<(), RegistryError> {
        let mut slots = crate::lock(&self.slots);
        if slots.get(&(name.to_owned(), id)).is_some_and(|slot| slot.held.is_alive()) {
            return Err(RegistryError::Duplicate { name: name.to_owned(), id });
        }
        insert(&mut slots, name, id, kind, policy, fd);
        Ok(())
    }

    /// As [`save`](Self::save), but entering the same owner again is fine.
    ///
    /// # Errors
    /// [`RegistryError::Duplicate`] when another owner has that name and id.
    pub fn resave<T: SharedFd>(
        &self,
        name: &str,
        id: u64,
        kind: FdKind,
        policy: FdPolicy,
        fd: &Arc<T>,
    ) -> Result<(), RegistryError> {
        let mut slots = crate::lock(&self.slots);
        let taken_by_another = slots.get(&(name.to_owned(), id)).is_some_and(|slot| match &slot.held {
            Held::ByOwner(held) => held.strong_count() > 0 && held.as_ptr().addr() != Arc::as_ptr(fd).addr(),
            Held::Unclaimed(_) => true,
        });
        if taken_by_another {
            return Err(RegistryError::Duplicate { name: name.to_owned(), id });
        }
        insert(&mut slots, name, id, kind, policy, fd);
        Ok(())
    }

    /// Gives an arrived descriptor to its new owner, once. The entry stays, now bound to the owner's `Arc`.
    ///
    /// `None`: nothing of that name arrived, or it has an owner already.
    pub fn find<T: SharedFd + From<OwnedFd>>(&self, name: &str, id: u64) -> Option<Arc<T>> {
        let mut slots = crate::lock(&self.slots);
        let slot = slots.get_mut(&(name.to_owned(), id))?;
        if !matches!(slot.held, Held::Unclaimed(_)) {
            return None;
        }
        let Held::Unclaimed(fd) = std::mem::replace(&mut slot.held, Held::ByOwner(Weak::<OwnedFd>::new()))
        else {
            unreachable!("matched above, under the same lock")
        };
        let owned = Arc::new(T::from(fd));
        slot.held = Held::ByOwner(weak(&owned));
        Some(owned)
    }

    /// [`find`](Self::find), or `open` and [`save`](Self::save).
    ///
    /// # Errors
    /// `open` failed, or the name is taken by a living owner.
    pub fn find_or_open<T: SharedFd + From<OwnedFd>>(
        &self,
        name: &str,
        id: u64,
        kind: FdKind,
        policy: FdPolicy,
        open: impl FnOnce() -> std::io::Result<OwnedFd>,
    ) -> Result<Arc<T>, FindOrOpenError> {
        if let Some(found) = self.find(name, id) {
            return Ok(found);
        }
        let opened = open().map_err(|source| FindOrOpenError::Open { name: name.to_owned(), id, source })?;
        let owned = Arc::new(T::from(opened));
        self.save(name, id, kind, policy, &owned)?;
        Ok(owned)
    }

    /// Removes an entry; says whether it was there. An arrival that nobody found is closed by this.
    pub fn delete(&self, name: &str, id: u64) -> bool {
        let removed = crate::lock(&self.slots).remove(&(name.to_owned(), id));
        removed.is_some_and(|slot| slot.held.is_alive())
    }

    /// Whether there is a living entry of that name and id.
    pub fn contains(&self, name: &str, id: u64) -> bool {
        crate::lock(&self.slots).get(&(name.to_owned(), id)).is_some_and(|slot| slot.held.is_alive())
    }

    /// Shows every entry to `visit`, in order of name and id, until one visit fails. `visit` must not use the
    /// registry itself: the table is locked meanwhile, so that the walk sees one state of it.
    ///
    /// # Errors
    /// The first error of `visit`.
    pub fn walk_fd<E>(
        &self,
        mut visit: impl FnMut(&FdEntry, BorrowedFd<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        for ((name, id), slot) in crate::lock(&self.slots).iter() {
            let entry = FdEntry { name: name.clone(), id: *id, kind: slot.kind, policy: slot.policy };
            match &slot.held {
                Held::Unclaimed(fd) => visit(&entry, fd.as_fd())?,
                Held::ByOwner(weak) => match weak.upgrade() {
                    Some(fd) => visit(&entry, fd.as_fd())?,
                    None => continue,
                },
            }
        }
        Ok(())
    }

    /// Everything that is there, in order.
    pub fn entries(&self) -> Vec<FdEntry> {
        let mut entries = Vec::new();
        let walked: Result<(), std::convert::Infallible> = self.walk_fd(|entry, _| {
            entries.push(entry.clone());
            Ok(())
        });
        let Ok(()) = walked;
        entries
    }

    /// The arrivals that nobody found yet, in order.
    pub fn unclaimed(&self) -> Vec<FdEntry> {
        crate::lock(&self.slots)
            .iter()
            .filter(|(_, slot)| matches!(slot.held, Held::Unclaimed(_)))
            .map(|((name, id), slot)| FdEntry {
                name: name.clone(),
                id: *id,
                kind: slot.kind,
                policy: slot.policy,
            })
            .collect()
    }

    /// Writes the table as a section body. `token` turns a descriptor into what the mode's own codec needs to find it
    /// again: its number across an exec, its index in a control message.
    ///
    /// # Errors
    /// The first error of `token`; a mode refuses here, by name, what it cannot carry.
    pub fn encode<E>(
        &self,
        mut token: impl FnMut(&FdEntry, BorrowedFd<'_>) -> Result<u64, E>,
    ) -> Result<Vec<u8>, E> {
        self.encode_some(|entry, fd| token(entry, fd).map(Some))
    }

    /// As [`encode`](Self::encode), without the entries for which `token` answers `None`: what stays with the source.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_some<E>(
        &self,
        mut token: impl FnMut(&FdEntry, BorrowedFd<'_>) -> Result<Option<u64>, E>,
    ) -> Result<Vec<u8>, E> {
        let mut wire = Vec::new();
        self.walk_fd(|entry, fd| {
            let Some(token) = token(entry, fd)? else { return Ok(()) };
            let FdEntry { name, id, kind, policy } = entry.clone();
            wire.push(WireEntry { name, id, kind, policy, token });
            Ok(())
        })?;
        Ok(crate::frame::to_body(&wire))
    }

    /// Reads a table that [`encode`](Self::encode) wrote. `open` turns a token into the descriptor.
    ///
    /// # Errors
    /// The section is damaged, names an entry twice, or `open` fails; entries that were opened before are closed.
    pub fn decode(
        section: &Section,
        mut open: impl FnMut(&FdEntry, u64) -> Result<OwnedFd, BoxError>,
    ) -> Result<FdRegistry, BoxError> {
        let wire: Vec<WireEntry> = section.decode(1)?;
        let mut slots = Slots::new();
        for WireEntry { name, id, kind, policy, token } in wire {
            let entry = FdEntry { name, id, kind, policy };
            if slots.contains_key(&(entry.name.clone(), id)) {
                return Err(RegistryError::Duplicate { name: entry.name, id }.into());
            }
            let fd = open(&entry, token).map_err(|source| format!("descriptor {entry}: {source}"))?;
            slots.insert((entry.name, id), Slot { kind, policy, held: Held::Unclaimed(fd) });
        }
        Ok(FdRegistry { slots: Arc::new(Mutex::new(slots)) })
    }

    /// Takes over the entries of `arrived`; used once, at start, before any owner registers.
    ///
    /// # Errors
    /// [`RegistryError::Duplicate`] when a name is in both; nothing was taken over then.
    pub fn absorb(&self, arrived: FdRegistry) -> Result<(), RegistryError> {
        let mut from = crate::lock(&arrived.slots);
        let mut slots = crate::lock(&self.slots);
        slots.retain(|_, slot| slot.held.is_alive());
        if let Some((name, id)) = from.keys().find(|key| slots.contains_key(*key)) {
            return Err(RegistryError::Duplicate { name: name.clone(), id: *id });
        }
        slots.append(&mut from);
        Ok(())
    }
}

/// The wire form of an entry, version 1.
#[derive(Serialize, Deserialize)]
struct WireEntry {
    name: String,
    id: u64,
    kind: FdKind,
    policy: FdPolicy,
    token: u64,
}

fn weak<T: SharedFd>(fd: &Arc<T>) -> Weak<dyn SharedFd> {
    let weak: Weak<T> = Arc::downgrade(fd);
    weak
}

fn insert<T: SharedFd>(slots: &mut Slots, name: &str, id: u64, kind: FdKind, policy: FdPolicy, fd: &Arc<T>) {
    slots.insert((name.to_owned(), id), Slot { kind, policy, held: Held::ByOwner(weak(fd)) });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Frame, FrameWriter};
    use std::fs::File;
    use std::os::fd::AsRawFd;

    const OTHER: (FdKind, FdPolicy) = (FdKind::Other, FdPolicy::MustSurvive);

    fn null() -> Arc<File> {
        Arc::new(File::open("/dev/null").unwrap())
    }

    fn names(registry: &FdRegistry) -> Vec<(String, u64)> {
        let mut names = Vec::new();
        registry
            .walk_fd(|e, _| {
                names.push((e.name.clone(), e.id));
                Ok::<_, ()>(())
            })
            .unwrap();
        names
    }

    /// Through a frame, as an update does, with tokens that are duplicated descriptors.
    fn round_trip(registry: &FdRegistry) -> FdRegistry {
        let mut dups = Vec::new();
        let body = registry
            .encode(|_, fd| {
                dups.push(Some(fd.try_clone_to_owned()?));
                Ok::<_, std::io::Error>(dups.len() as u64 - 1)
            })
            .unwrap();
        let mut frame = FrameWriter::default();
        frame.put("registry", 0, 1, body).unwrap();
        let mut frame = Frame::parse(&frame.finish(1)).unwrap();
        let section = frame.require("registry", 0).unwrap();
        FdRegistry::decode(&section, |_, token| Ok(dups[token as usize].take().unwrap())).unwrap()
    }

    #[test]
    fn names_are_unique_among_the_living() {
        let registry = FdRegistry::default();
        let (a, b) = (null(), null());
        registry.save("x", 0, OTHER.0, OTHER.1, &a).unwrap();
        registry.save("x", 1, OTHER.0, OTHER.1, &a).unwrap();
        let error = registry.save("x", 0, OTHER.0, OTHER.1, &b).unwrap_err();
        assert_eq!(error.to_string(), "descriptor 'x' (id 0) is registered already");
        registry.resave("x", 0, OTHER.0, OTHER.1, &a).unwrap();
        registry.resave("x", 0, OTHER.0, OTHER.1, &b).unwrap_err();

        assert!(registry.delete("x", 0) && !registry.delete("x", 0));
        registry.save("x", 0, OTHER.0, OTHER.1, &b).unwrap();
        drop(b);
        registry.save("x", 0, OTHER.0, OTHER.1, &a).unwrap();
    }

    #[test]
    fn an_entry_goes_away_with_its_owner() {
        let registry = FdRegistry::default();
        let (a, b) = (null(), null());
        registry.save("b", 0, OTHER.0, OTHER.1, &b).unwrap();
        registry.save("a", 2, OTHER.0, OTHER.1, &a).unwrap();
        registry.save("a", 1, OTHER.0, OTHER.1, &a).unwrap();
        assert_eq!(names(&registry), [("a".into(), 1), ("a".into(), 2), ("b".into(), 0)]);
        drop(a);
        assert_eq!(names(&registry), [("b".into(), 0)]);
        assert!(!registry.contains("a", 1) && !registry.delete("a", 1));
    }

    #[test]
    fn arrivals_are_found_once_and_stay_registered() {
        let registry = FdRegistry::default();
        let (a, b) = (null(), null());
        registry.save("a", 0, FdKind::Tap, FdPolicy::MustSurvive, &a).unwrap();
        registry.save("b", 7, FdKind::Socket, FdPolicy::MayBeRebuilt, &b).unwrap();
        let arrived = FdRegistry::default();
        arrived.absorb(round_trip(&registry)).unwrap();

        assert_eq!(arrived.unclaimed().len(), 2);
        assert_eq!(names(&arrived), names(&registry), "what nobody found yet is walked, too");
        let found: Arc<File> = arrived.find("a", 0).unwrap();
        assert!(arrived.find::<File>("a", 0).is_none(), "only one owner");
        assert_eq!(
            arrived.unclaimed(),
            [FdEntry { name: "b".into(), id: 7, kind: FdKind::Socket, policy: FdPolicy::MayBeRebuilt }]
        );
        let mut seen = None;
        arrived
            .walk_fd(|e, fd| (e.name != "a").then_some(()).ok_or_else(|| seen = Some(fd.as_raw_fd())))
            .unwrap_err();
        assert_eq!(seen, Some(found.as_raw_fd()));
        drop(found);
        assert!(!arrived.contains("a", 0));
    }

    #[test]
    fn find_or_open_opens_only_what_did_not_arrive() {
        let registry = FdRegistry::default();
        let open = || Ok(OwnedFd::from(File::open("/dev/null")?));
        let first: Arc<OwnedFd> = registry.find_or_open("x", 0, OTHER.0, OTHER.1, open).unwrap();
        let error = registry.find_or_open::<OwnedFd>("x", 0, OTHER.0, OTHER.1, open).unwrap_err();
        assert!(matches!(error, FindOrOpenError::Registry(_)), "{error}");

        let arrived = round_trip(&registry);
        let found: Arc<OwnedFd> =
            arrived.find_or_open("x", 0, OTHER.0, OTHER.1, || panic!("it is there")).unwrap();
        assert_ne!(found.as_raw_fd(), first.as_raw_fd());
        let failing = registry
            .find_or_open::<OwnedFd>("y", 3, OTHER.0, OTHER.1, || Err(std::io::ErrorKind::NotFound.into()))
            .unwrap_err();
        assert!(failing.to_string().starts_with("cannot open 'y' (id 3): "), "{failing}");
    }

    #[test]
    fn ten_thousand_entries_keep_their_order() {
        let registry = FdRegistry::default();
        let fd = null();
        for i in (0..10_000u64).rev() {
            registry
                .save(&format!("dev{}", i % 100), i, FdKind::EventFd, FdPolicy::MustSurvive, &fd)
                .unwrap();
        }
        let all = names(&registry);
        assert_eq!(all.len(), 10_000);
        assert!(all.is_sorted());
        let body = registry.encode(|_, fd| Ok::<_, ()>(fd.as_raw_fd() as u64)).unwrap();
        assert_eq!(body, registry.encode(|_, fd| Ok::<_, ()>(fd.as_raw_fd() as u64)).unwrap());
    }
}
