//! What the next program is asked before anything is touched, and what it answers.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

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
