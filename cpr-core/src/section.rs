//! Wire types of sections, and how an update goes up and down by one release.
//!
//! A section's wire type says its name, its version, and which type the release before had. From that follows what a
//! program reads (both) and what it writes (its own version, or the previous one for a target that reads no other). Bodies
//! are postcard here; a program with another encoding does the same with [`FrameWriter::version_for`] and
//! [`FrameWriter::put`], and [`Section::version`].

use std::fmt;
use std::ops::RangeInclusive;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::BoxError;
use crate::frame::{Frame, FrameError, FrameWriter, Section, to_body};

/// The wire type of a section, in its current version.
///
/// ```
/// use cpr_core::frame::{Frame, FrameWriter};
/// use cpr_core::preflight::SectionRange;
/// use cpr_core::section::{Previous, SectionType};
///
/// /// Version 1, as the release before had it.
/// #[derive(serde::Serialize, serde::Deserialize)]
/// struct LampV1 {
///     on: bool,
/// }
///
/// #[derive(serde::Serialize, serde::Deserialize)]
/// struct Lamp {
///     /// Percent.
///     brightness: u8,
/// }
///
/// impl SectionType for LampV1 {
///     const NAME: &'static str = "lamp";
///     const VERSION: u32 = 1;
/// }
///
/// impl SectionType for Lamp {
///     const NAME: &'static str = "lamp";
///     const VERSION: u32 = 2;
///     const PREVIOUS: Option<Previous<Lamp>> = Some(Previous::of::<LampV1>());
/// }
///
/// impl From<LampV1> for Lamp {
///     fn from(old: LampV1) -> Lamp {
///         Lamp { brightness: if old.on { 100 } else { 0 } }
///     }
/// }
///
/// impl TryFrom<&Lamp> for LampV1 {
///     type Error = String;
///
///     fn try_from(lamp: &Lamp) -> Result<LampV1, String> {
///         match lamp.brightness {
///             0 | 100 => Ok(LampV1 { on: lamp.brightness > 0 }),
///             other => Err(format!("a brightness of {other} % has no form there")),
///         }
///     }
/// }
///
/// // For a target of the release before.
/// let reads = [SectionRange { name: "lamp".into(), least: 1, most: 1 }];
/// let mut writer = FrameWriter::for_reader(reads.into_iter().collect());
/// writer.put_section(0, &Lamp { brightness: 100 }).unwrap();
/// let mut frame = Frame::parse(&writer.finish(1)).unwrap();
/// // What such a program wrote is read as well.
/// let section = frame.require("lamp", 0).unwrap();
/// assert_eq!(section.version, 1);
/// assert_eq!(section.read::<Lamp>().unwrap().brightness, 100);
/// ```
pub trait SectionType: Serialize + DeserializeOwned {
    /// The section's name; the same in every version.
    const NAME: &'static str;
    /// The version that this type is the layout of.
    const VERSION: u32;
    /// How the version before is read and written. None: there is no other.
    const PREVIOUS: Option<Previous<Self>> = None;

    /// What is read, and can be written.
    const VERSIONS: RangeInclusive<u32> =
        if Self::PREVIOUS.is_some() { Self::VERSION - 1 } else { Self::VERSION }..=Self::VERSION;
}

/// Reads and writes the version before `T`'s.
pub struct Previous<T> {
    read: fn(&Section) -> Result<T, FrameError>,
    body: fn(&T) -> Result<Vec<u8>, BoxError>,
}

impl<T: SectionType> Previous<T> {
    /// The version before is `P`. What it lacks is filled in on the way up; what it cannot say is an error on the way down.
    ///
    /// Does not compile if `P` is not the version before of the same section.
    pub const fn of<P>() -> Previous<T>
    where
        P: SectionType + Into<T> + for<'a> TryFrom<&'a T, Error: Into<BoxError>>,
    {
        const {
            assert!(P::VERSION + 1 == T::VERSION, "the previous version is the one before");
            assert!(same(P::NAME, T::NAME), "both are of one section");
        }
        Previous {
            read: |section| section.decode::<P>(P::VERSION).map(Into::into),
            body: |value| P::try_from(value).map(|value| to_body(&value)).map_err(Into::into),
        }
    }
}

impl<T> fmt::Debug for Previous<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Previous")
    }
}

const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut at = 0;
    while at < a.len() && at < b.len() && a[at] == b[at] {
        at += 1;
    }
    at == a.len() && at == b.len()
}

impl Section {
    /// Decodes the section, whether it has `T`'s version or the one before.
    ///
    /// # Errors
    /// [`FrameError::SectionVersion`] for any other, or [`FrameError::SectionBody`].
    pub fn read<T: SectionType>(&self) -> Result<T, FrameError> {
        match T::PREVIOUS {
            Some(previous) if self.version == T::VERSION - 1 => (previous.read)(self),
            _ if self.version == T::VERSION => self.decode(T::VERSION),
            _ => Err(self.unread(T::VERSIONS)),
        }
    }

    /// As a program of the release before reads it: a section with two versions only in the older one.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    #[cfg(feature = "previous-format")]
    pub fn read_as_before<T: SectionType>(&self) -> Result<T, FrameError> {
        match T::PREVIOUS {
            Some(previous) => (previous.read)(self),
            None => self.read(),
        }
    }

    pub(crate) fn unread(&self, reads: RangeInclusive<u32>) -> FrameError {
        FrameError::SectionVersion { name: self.name.clone(), found: self.version, reads }
    }
}

impl Frame {
    /// Takes the section of type `T` that must be there, and [reads](Section::read) it.
    ///
    /// # Errors
    /// [`FrameError::MissingSection`], or as [`Section::read`].
    pub fn require_section<T: SectionType>(&mut self, instance: u32) -> Result<T, FrameError> {
        self.require(T::NAME, instance)?.read()
    }
}

impl FrameWriter {
    /// The version in which section `name` is to be written by a program that can write `writes`: the newest that the
    /// reader takes, or simply the newest if the reader did not speak of it.
    ///
    /// # Errors
    /// [`FrameError::NoCommonVersion`].
    pub fn version_for(&self, name: &str, writes: RangeInclusive<u32>) -> Result<u32, FrameError> {
        let Some(reads) = self.reads.as_ref().and_then(|reads| reads.get(name)) else {
            return Ok(*writes.end());
        };
        let newest = *writes.end().min(reads.end());
        if writes.contains(&newest) && reads.contains(&newest) {
            return Ok(newest);
        }
        Err(FrameError::NoCommonVersion { name: name.into(), writes, reads })
    }

    /// Adds a section in the newest version that the reader takes.
    ///
    /// # Errors
    /// As [`version_for`](Self::version_for) and [`put`](Self::put); [`FrameError::NotInPrevious`] for a value that the
    /// previous version has no form for.
    pub fn put_section<T: SectionType>(&mut self, instance: u32, value: &T) -> Result<(), FrameError> {
        let version = self.version_for(T::NAME, T::VERSIONS)?;
        let body = match T::PREVIOUS {
            Some(previous) if version != T::VERSION => previous_body(&previous, value)?,
            _ => to_body(value),
        };
        self.put(T::NAME, instance, version, body)
    }

    /// As a program of the release before writes it: a section with two versions in the older one.
    ///
    /// # Errors
    /// As [`put_section`](Self::put_section).
    #[cfg(feature = "previous-format")]
    pub fn put_section_as_before<T: SectionType>(
        &mut self,
        instance: u32,
        value: &T,
    ) -> Result<(), FrameError> {
        match T::PREVIOUS {
            Some(previous) => self.put(T::NAME, instance, T::VERSION - 1, previous_body(&previous, value)?),
            None => self.put_section(instance, value),
        }
    }
}

fn previous_body<T: SectionType>(previous: &Previous<T>, value: &T) -> Result<Vec<u8>, FrameError> {
    (previous.body)(value).map_err(|reason| FrameError::NotInPrevious {
        name: T::NAME.into(),
        version: T::VERSION - 1,
        reason: reason.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;
    use crate::preflight::{Reads, SectionRange};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct V2 {
        word: u32,
        more: Option<String>,
    }

    #[derive(Serialize, Deserialize)]
    struct V1 {
        word: u16,
    }

    impl SectionType for V1 {
        const NAME: &'static str = "x";
        const VERSION: u32 = 1;
    }

    impl SectionType for V2 {
        const NAME: &'static str = "x";
        const VERSION: u32 = 2;
        const PREVIOUS: Option<Previous<V2>> = Some(Previous::of::<V1>());
    }

    impl From<V1> for V2 {
        fn from(old: V1) -> V2 {
            V2 { word: old.word.into(), more: None }
        }
    }

    impl TryFrom<&V2> for V1 {
        type Error = std::num::TryFromIntError;

        fn try_from(new: &V2) -> Result<V1, Self::Error> {
            Ok(V1 { word: new.word.try_into()? })
        }
    }

    fn reads(least: u32, most: u32) -> Reads {
        [SectionRange { name: "x".into(), least, most }].into_iter().collect()
    }

    fn written<T: SectionType>(mut writer: FrameWriter, value: &T) -> Result<Section, String> {
        writer.put_section(3, value).map_err(|error| error.to_string())?;
        Ok(Frame::parse(&writer.finish(1)).unwrap().require(T::NAME, 3).unwrap())
    }

    #[test]
    fn the_newest_version_that_both_know_is_written() {
        let value = V2 { word: 7, more: Some("m".into()) };
        let version = |reads| written(FrameWriter::for_reader(reads), &value).map(|section| section.version);
        assert_eq!(written(FrameWriter::default(), &value).unwrap().version, 2);
        assert_eq!(version(reads(1, 2)), Ok(2));
        assert_eq!(version(reads(2, 3)), Ok(2));
        assert_eq!(version(reads(0, 1)), Ok(1));
        assert_eq!(
            version(reads(3, 4)).unwrap_err(),
            "state section 'x' cannot be written for this target: it reads versions 3 and 4, this program writes \
             versions 1 and 2"
        );
        // A target that did not speak of it, and one that speaks nonsense.
        assert_eq!(version(Reads::default()), Ok(2));
        assert!(version(reads(2, 1)).is_err());
    }

    #[test]
    fn what_the_previous_version_cannot_say_is_an_error() {
        let value = V2 { word: 70_000, more: None };
        assert_eq!(
            written(FrameWriter::for_reader(reads(1, 1)), &value).unwrap_err(),
            "state section 'x' cannot be written in version 1: out of range integral type conversion attempted"
        );
    }

    #[test]
    fn other_versions_are_refused_by_name() {
        let section = |version| Section { name: "x".into(), instance: 0, version, body: to_body(&1u16) };
        assert_eq!(section(1).read::<V2>().unwrap(), V2 { word: 1, more: None });
        for (version, error) in [
            (0, "state section 'x' has version 0; this program reads versions 1 and 2"),
            (3, "state section 'x' has version 3; this program reads versions 1 and 2"),
            (u32::MAX, "state section 'x' has version 4294967295; this program reads versions 1 and 2"),
        ] {
            assert_eq!(section(version).read::<V2>().unwrap_err().to_string(), error);
        }
        let error = section(2).read::<V1>().err().unwrap().to_string();
        assert_eq!(error, "state section 'x' has version 2; this program reads version 1");
    }

    proptest! {
        #[test]
        fn whatever_both_versions_can_say_goes_down_and_up(word in any::<u16>()) {
            let value = V2 { word: word.into(), more: None };
            for reads in [reads(1, 1), reads(1, 2)] {
                let section = written(FrameWriter::for_reader(reads), &value).unwrap();
                prop_assert_eq!(&section.read::<V2>().unwrap(), &value);
            }
        }
    }

    #[cfg(feature = "previous-format")]
    #[test]
    fn a_program_of_the_release_before_knows_its_version_only() {
        let mut writer = FrameWriter::default();
        writer.put_section_as_before(0, &V2 { word: 7, more: None }).unwrap();
        let section = Frame::parse(&writer.finish(1)).unwrap().require("x", 0).unwrap();
        assert_eq!(section.version, 1);
        assert_eq!(section.read_as_before::<V2>().unwrap().word, 7);
        let section = written(FrameWriter::default(), &V2 { word: 7, more: None }).unwrap();
        let error = section.read_as_before::<V2>().unwrap_err().to_string();
        assert_eq!(error, "state section 'x' has version 2; this program reads version 1");
    }
}
