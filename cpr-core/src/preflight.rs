//! Preflight by the program that is to take over: what it is shown of this one before anything is touched, and what it
//! answers.
//!
//! ```text
//!  source: Host::manifest ─► Manifest ─► the mode ─► target: SectionCatalogue::judge, and what the host adds
//!          Reads or a refusal ◄─────────── the mode ◄─ Verdict
//! ```
//!
//! Both are sections of a [`Frame`], so that a mode can add its own beside them. A target ignores sections of a manifest
//! that it does not know: what it must not ignore is a [feature](Manifest::feature).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::frame::{Frame, FrameError, FrameWriter, Section, to_body};
use crate::registry::{FdEntry, FdKind, FdPolicy};
use crate::update::{ACTIVITY_SECTION, UPDATE_SECTION};

/// Name of the section that a manifest is.
pub const MANIFEST_SECTION: &str = "cpr-core/manifest";
/// Name of the section that a verdict is.
pub const VERDICT_SECTION: &str = "cpr-core/verdict";
/// Name of the early section that says that a preflight refused and the user went on all the same.
pub(crate) const REFUSAL_SECTION: &str = "cpr-core/refusal";

/// Bytes of a refusal that are told; a longer one is cut.
const MAX_REFUSAL: usize = 2048;

/// What becomes of an update that the target refuses beforehand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Policy {
    /// It ends, with nothing touched.
    #[default]
    Require,
    /// It goes on, with a warning.
    Warn,
    /// The target is not asked.
    Off,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Policy; 3] = [Policy::Require, Policy::Warn, Policy::Off];

    /// The name that users know it by.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Require => "require",
            Policy::Warn => "warn",
            Policy::Off => "off",
        }
    }

    /// The policy of that name.
    pub fn from_name(name: &str) -> Option<Policy> {
        Policy::ALL.into_iter().find(|policy| policy.name() == name)
    }
}

/// A section that the source will write. A wire type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectionEntry {
    /// The component's name.
    pub name: String,
    /// Which of several.
    pub instance: u32,
    /// The oldest version that the source can write.
    pub least: u32,
    /// The version that it writes unless it is asked for an older one.
    pub version: u32,
}

/// A descriptor that the source will hand on. A wire type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorEntry {
    /// Its registry name.
    pub name: String,
    /// Its registry id.
    pub id: u64,
    /// What it is.
    pub kind: FdKind,
    /// What becomes of it if nobody claims it.
    pub policy: FdPolicy,
}

impl From<FdEntry> for DescriptorEntry {
    fn from(FdEntry { name, id, kind, policy }: FdEntry) -> Self {
        DescriptorEntry { name, id, kind, policy }
    }
}

/// What a program that is to take over is shown. Version 1 of [`MANIFEST_SECTION`].
///
/// ```
/// use cpr_core::preflight::{Manifest, SectionCatalogue, Verdict};
///
/// let manifest = Manifest::default().section("clock", 0, 1..=2).section("nic", 0, 1..=1);
/// let catalogue = SectionCatalogue::default().reads("clock", 1..=1);
/// let Verdict::Refused(reasons) = catalogue.judge(&manifest, []) else { panic!() };
/// let says = |name| reasons.iter().any(|reason| reason.contains(name));
/// // The clock can be written as version 1; a nic is not known.
/// assert!(says("'nic'") && !says("'clock'"));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Sections of both frames.
    pub sections: Vec<SectionEntry>,
    /// Descriptors in the registry.
    pub descriptors: Vec<DescriptorEntry>,
    /// What the target must know by name, because nothing else here shows it.
    pub features: Vec<String>,
    host_version: u32,
    host: Vec<u8>,
}

impl Manifest {
    /// Adds a section that the source writes in the last of these versions, or in an earlier one if it is asked to.
    #[must_use]
    pub fn section(mut self, name: &str, instance: u32, versions: RangeInclusive<u32>) -> Self {
        let (&least, &version) = (versions.start(), versions.end());
        self.sections.push(SectionEntry { name: name.into(), instance, least, version });
        self
    }

    /// Adds something that the target must know.
    #[must_use]
    pub fn feature(mut self, name: &str) -> Self {
        self.features.push(name.into());
        self
    }

    /// Sets what the host itself wants the target to see, in version `version` of a layout of its own.
    #[must_use]
    pub fn host<T: Serialize>(mut self, version: u32, body: &T) -> Self {
        (self.host_version, self.host) = (version, to_body(body));
        self
    }

    /// The version of what the source's host wants the target to see.
    pub fn host_version(&self) -> u32 {
        self.host_version
    }

    /// What the source's host wants the target to see.
    ///
    /// # Errors
    /// As [`Section::decode`].
    pub fn decode_host<T: DeserializeOwned>(&self, version: u32) -> Result<T, FrameError> {
        let name = "the machine in cpr-core/manifest".into();
        Section { name, instance: 0, version: self.host_version, body: self.host.clone() }.decode(version)
    }

    /// Adds the manifest to a frame.
    ///
    /// # Errors
    /// The frame has one already.
    pub fn put_into(&self, frame: &mut FrameWriter) -> Result<(), FrameError> {
        frame.put_value(MANIFEST_SECTION, 0, 1, self)
    }

    /// Takes the manifest out of a frame.
    ///
    /// # Errors
    /// It is missing, damaged, or of another version.
    pub fn take_from(frame: &mut Frame) -> Result<Manifest, FrameError> {
        frame.require(MANIFEST_SECTION, 0)?.decode(1)
    }
}

/// Which versions of a section a program reads. A wire type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectionRange {
    /// The section's name.
    pub name: String,
    /// The oldest version that is read.
    pub least: u32,
    /// The latest version that is read.
    pub most: u32,
}

/// What the target answers. Version 1 of [`VERDICT_SECTION`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// It can take over, and reads these.
    Accepted(Vec<SectionRange>),
    /// It cannot, for these reasons. Each names the section, descriptor or option.
    Refused(Vec<String>),
}

impl Verdict {
    /// Adds the verdict to a frame.
    ///
    /// # Errors
    /// The frame has one already.
    pub fn put_into(&self, frame: &mut FrameWriter) -> Result<(), FrameError> {
        frame.put_value(VERDICT_SECTION, 0, 1, self)
    }

    /// Takes the verdict out of a frame.
    ///
    /// # Errors
    /// It is missing, damaged, or of another version.
    pub fn take_from(frame: &mut Frame) -> Result<Verdict, FrameError> {
        frame.require(VERDICT_SECTION, 0)?.decode(1)
    }

    /// What the verdict means for the source.
    pub fn into_asked(self) -> Asked {
        match self {
            Verdict::Accepted(ranges) => Asked::Accepted(ranges.into_iter().collect()),
            Verdict::Refused(reasons) => {
                let mut text = format!("the new program refuses: {}", reasons.join("; "));
                text.truncate(text.floor_char_boundary(MAX_REFUSAL));
                Asked::Refused(text)
            }
        }
    }
}

/// How far [`CprMode::preflight`](crate::CprMode::preflight) got.
#[derive(Debug)]
pub enum Asked {
    /// The mode has nobody to ask.
    Nobody,
    /// Call again after this.
    Wait(crate::mode::Wait),
    /// The target can take over, and reads these.
    Accepted(Reads),
    /// It cannot, or gave no answer: why.
    Refused(String),
}

/// Which versions the target reads, of each section that it knows.
///
/// ```
/// use cpr_core::preflight::{Reads, SectionRange};
///
/// let reads: Reads = [SectionRange { name: "serial".into(), least: 1, most: 2 }].into_iter().collect();
/// assert_eq!(reads.get("serial"), Some(1..=2));
/// assert_eq!(reads.get("pci"), None);
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reads(BTreeMap<String, (u32, u32)>);

impl Reads {
    /// The versions of section `name` that are read; `None` if the target did not speak of it.
    pub fn get(&self, name: &str) -> Option<RangeInclusive<u32>> {
        self.0.get(name).map(|&(least, most)| least..=most)
    }

    /// Every section that the target spoke of, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, RangeInclusive<u32>)> {
        self.0.iter().map(|(name, &(least, most))| (name.as_str(), least..=most))
    }
}

impl FromIterator<SectionRange> for Reads {
    fn from_iter<I: IntoIterator<Item = SectionRange>>(ranges: I) -> Self {
        Reads(ranges.into_iter().map(|range| (range.name, (range.least, range.most))).collect())
    }
}

/// What a program can take over: sections with the versions that it reads, features, descriptors. It has what `cpr-core`
/// itself writes from the start; a mode and a host add theirs.
#[derive(Debug, Clone)]
pub struct SectionCatalogue {
    sections: BTreeMap<String, Row>,
    features: BTreeSet<String>,
    descriptors: BTreeSet<(String, u64)>,
}

#[derive(Debug, Clone)]
struct Row {
    versions: RangeInclusive<u32>,
    is_required: bool,
}

impl Default for SectionCatalogue {
    fn default() -> Self {
        let empty = SectionCatalogue {
            sections: BTreeMap::new(),
            features: BTreeSet::new(),
            descriptors: BTreeSet::new(),
        };
        empty.requires(UPDATE_SECTION, 1..=1).requires(ACTIVITY_SECTION, 1..=1)
    }
}

impl SectionCatalogue {
    /// The program reads these versions of a section, if there is one.
    #[must_use]
    pub fn reads(self, name: &str, versions: RangeInclusive<u32>) -> Self {
        self.with(name, Row { versions, is_required: false })
    }

    /// The program reads these versions of a section, and cannot do without it.
    #[must_use]
    pub fn requires(self, name: &str, versions: RangeInclusive<u32>) -> Self {
        self.with(name, Row { versions, is_required: true })
    }

    fn with(mut self, name: &str, row: Row) -> Self {
        self.sections.insert(name.into(), row);
        self
    }

    /// The program knows this feature.
    #[must_use]
    pub fn knows(mut self, feature: &str) -> Self {
        self.features.insert(feature.into());
        self
    }

    /// The program finds a use for this descriptor.
    #[must_use]
    pub fn claims(mut self, name: &str, id: u64) -> Self {
        self.descriptors.insert((name.into(), id));
        self
    }

    /// Everything that the program cannot take over of what the manifest shows. Each reason names the thing and the way out.
    pub fn obstacles(&self, manifest: &Manifest) -> Vec<String> {
        let sections = manifest.sections.iter().filter_map(|section| self.obstacle(section));
        let missing = self.sections.iter().filter(|(name, row)| {
            row.is_required && manifest.sections.iter().all(|section| section.name != **name)
        });
        let missing = missing.map(|(name, _)| {
            format!(
                "state section '{name}' is missing: the running program does not write it; use an earlier one"
            )
        });
        let features = manifest.features.iter().filter(|feature| !self.features.contains(*feature));
        let features = features
            .map(|feature| format!("feature '{feature}' is unknown to this program; use a later one"));
        let lost = manifest.descriptors.iter().filter(|fd| {
            fd.policy == FdPolicy::MustSurvive && !self.descriptors.contains(&(fd.name.clone(), fd.id))
        });
        let lost = lost.map(|fd| {
            format!(
                "no component of this program claims descriptor '{}' (id {}), which the guest depends on; its command \
                 line must name what it belongs to",
                fd.name, fd.id
            )
        });
        sections.chain(missing).chain(features).chain(lost).collect()
    }

    fn obstacle(&self, SectionEntry { name, instance: _, least, version }: &SectionEntry) -> Option<String> {
        let Some(Row { versions, .. }) = self.sections.get(name) else {
            return Some(format!(
                "no component of this program claims state section '{name}' (version {version}); use a program that has it"
            ));
        };
        let way_out = if versions.end() < least {
            "a later one"
        } else if versions.start() > version {
            "an earlier one in between"
        } else {
            return None;
        };
        let read = match (versions.start(), versions.end()) {
            (least, most) if least == most => format!("version {most}"),
            (least, most) => format!("versions {least} to {most}"),
        };
        Some(format!(
            "state section '{name}' has version {version}; this program reads {read}; use {way_out}"
        ))
    }

    /// The verdict on a manifest, in which the host has `found` other obstacles.
    pub fn judge(&self, manifest: &Manifest, found: impl IntoIterator<Item = String>) -> Verdict {
        let mut obstacles = self.obstacles(manifest);
        obstacles.extend(found);
        // Several instances of a section have one reason.
        let mut told = BTreeSet::new();
        obstacles.retain(|obstacle| told.insert(obstacle.clone()));
        if !obstacles.is_empty() {
            return Verdict::Refused(obstacles);
        }
        let range = |(name, row): (&String, &Row)| SectionRange {
            name: name.clone(),
            least: *row.versions.start(),
            most: *row.versions.end(),
        };
        Verdict::Accepted(self.sections.iter().map(range).collect())
    }
}

/// What a program takes beside page tables, in bytes: its own memory, and the kernel's for a VM and its vCPUs. Generous.
const OWN_BYTES: u64 = 16 << 20;

/// How much memory a second program around `ram_bytes` of guest RAM takes at most, in bytes, when the RAM is in pages of
/// `page_bytes`: an entry of 8 bytes for each, and the program itself.
pub fn second_program_bytes(ram_bytes: u64, page_bytes: u64) -> u64 {
    (ram_bytes / page_bytes.max(1)).saturating_mul(8).saturating_add(OWN_BYTES)
}

/// Why a second program of `need_bytes` does not fit beside the first, if a control group of this process lacks the room.
///
/// # Errors
/// The kernel does not tell which groups these are.
pub fn lack_of_room(need_bytes: u64) -> std::io::Result<Option<String>> {
    Ok(lacking(&oslib::cgroup::memory_limits()?, need_bytes))
}

fn lacking(limits: &[oslib::cgroup::MemoryLimit], need_bytes: u64) -> Option<String> {
    let lacking = limits.iter().find(|limit| limit.room_bytes < need_bytes)?;
    Some(format!(
        "control group '{}' is limited to {} bytes of memory, of which {} are free; a second set of page tables for the \
         guest's RAM can take {need_bytes}; raise the limit, at least for the time of the update",
        lacking.group.display(),
        lacking.limit_bytes,
        lacking.room_bytes
    ))
}

/// What the core itself adds to a host's manifest.
pub(crate) fn complete(manifest: &mut Manifest, descriptors: Vec<FdEntry>) {
    let own = std::mem::take(manifest).section(UPDATE_SECTION, 0, 1..=1).section(ACTIVITY_SECTION, 0, 1..=1);
    *manifest = own;
    manifest.descriptors.extend(descriptors.into_iter().map(DescriptorEntry::from));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn catalogue() -> SectionCatalogue {
        SectionCatalogue::default()
            .requires("cpu", 1..=2)
            .reads("nic", 3..=3)
            .knows("course")
            .claims("ram", 0)
    }

    fn manifest() -> Manifest {
        let mut manifest =
            Manifest::default().section("cpu", 0, 1..=2).section("cpu", 1, 1..=2).feature("course");
        let entry = |name: &str, policy| FdEntry { name: name.into(), id: 0, kind: FdKind::Memfd, policy };
        complete(
            &mut manifest,
            vec![entry("ram", FdPolicy::MustSurvive), entry("socket", FdPolicy::MayBeRebuilt)],
        );
        manifest
    }

    #[test]
    fn what_fits_is_accepted_with_the_ranges_that_are_read() {
        let Asked::Accepted(reads) = catalogue().judge(&manifest(), []).into_asked() else { panic!() };
        assert_eq!(reads.get("cpu"), Some(1..=2));
        assert_eq!(reads.get("nic"), Some(3..=3));
        assert_eq!(reads.get(ACTIVITY_SECTION), Some(1..=1));
        assert_eq!(reads.iter().count(), 4);
    }

    #[test]
    fn an_older_version_will_do_if_the_source_can_write_it() {
        let versions = |versions| Manifest { sections: Vec::new(), ..manifest() }.section("cpu", 0, versions);
        let obstacles = |versions_written| {
            let mut manifest = versions(versions_written);
            complete(&mut manifest, Vec::new());
            catalogue().obstacles(&manifest)
        };
        assert_eq!(obstacles(2..=3), [""; 0]);
        assert_eq!(
            obstacles(3..=4),
            ["state section 'cpu' has version 4; this program reads versions 1 to 2; use a later one"]
        );
        assert_eq!(
            obstacles(0..=0),
            [
                "state section 'cpu' has version 0; this program reads versions 1 to 2; use an earlier one in between"
            ]
        );
    }

    #[test]
    fn every_obstacle_is_named_once() {
        let mut manifest =
            manifest().section("disk", 0, 1..=1).section("disk", 1, 1..=1).feature("time-travel");
        manifest.sections.retain(|section| section.name != "cpu");
        manifest.descriptors[1].policy = FdPolicy::MustSurvive;
        let Verdict::Refused(reasons) = catalogue().judge(&manifest, ["no room".to_owned()]) else {
            panic!()
        };
        let said = ["'disk' (version 1)", "'cpu' is missing", "'time-travel'", "'socket' (id 0)", "no room"];
        assert_eq!(reasons.len(), said.len(), "{reasons:?}");
        for (reason, said) in reasons.iter().zip(said) {
            assert!(reason.contains(said), "{reason}");
        }
    }

    #[test]
    fn both_survive_their_frame_and_nothing_else_passes_for_them() {
        let manifest = manifest().host(2, &("q35", 4u32));
        let mut frame = FrameWriter::default();
        manifest.put_into(&mut frame).unwrap();
        let verdict = Verdict::Refused(vec!["no".into()]);
        verdict.put_into(&mut frame).unwrap();
        let mut frame = Frame::parse(&frame.finish(7)).unwrap();
        assert_eq!(Verdict::take_from(&mut frame).unwrap(), verdict);
        let arrived = Manifest::take_from(&mut frame).unwrap();
        assert_eq!(arrived, manifest);
        assert_eq!(arrived.decode_host::<(String, u32)>(2).unwrap(), ("q35".to_owned(), 4));
        let error = arrived.decode_host::<(String, u32)>(1).unwrap_err().to_string();
        assert_eq!(
            error,
            "state section 'the machine in cpr-core/manifest' has version 2; this program reads version 1"
        );
        assert!(matches!(Verdict::take_from(&mut frame), Err(FrameError::MissingSection { .. })));
    }

    #[test]
    fn page_tables_need_room_in_every_group() {
        const GIB: u64 = 1 << 30;
        assert_eq!(second_program_bytes(GIB, 4096), (2 << 20) + OWN_BYTES);
        assert_eq!(second_program_bytes(GIB, 2 << 20), 4096 + OWN_BYTES);
        let limit = |group: &str, room_bytes| oslib::cgroup::MemoryLimit {
            group: group.into(),
            limit_bytes: 2 * GIB,
            room_bytes,
        };
        let limits = [limit("/near", 100), limit("/far", 50)];
        assert_eq!(lacking(&limits, 50), None);
        assert_eq!(lacking(&[], u64::MAX), None);
        let said = lacking(&limits, 51).unwrap();
        assert!(said.starts_with(
            "control group '/far' is limited to 2147483648 bytes of memory, of which 50 are free"
        ));
        assert!(said.contains("can take 51;"), "{said}");
        assert!(
            lack_of_room(u64::MAX).unwrap().is_some() || oslib::cgroup::memory_limits().unwrap().is_empty()
        );
    }

    #[test]
    fn a_long_refusal_is_cut() {
        let Asked::Refused(text) = Verdict::Refused(vec!["ä".repeat(5000)]).into_asked() else { panic!() };
        assert!(
            text.len() <= MAX_REFUSAL && text.starts_with("the new program refuses: ä"),
            "{}",
            text.len()
        );
    }

    #[test]
    fn policies_have_names() {
        for policy in Policy::ALL {
            assert_eq!(Policy::from_name(policy.name()), Some(policy));
        }
        assert_eq!(Policy::from_name("on"), None);
    }
}
