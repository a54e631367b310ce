//! As `formats.rs`, for a program that knows of each section what the release before knew: the older version of those that
//! have two.

use std::ops::RangeInclusive;

use cpr_core::frame::{Frame, FrameError, FrameWriter, Section};
use cpr_core::section::SectionType;

/// Whether this program has machine types with a PCI bus.
pub(crate) const HAS_PCI: bool = false;

/// The versions that are read, and can be written.
pub(crate) fn versions<T: SectionType>() -> RangeInclusive<u32> {
    match T::PREVIOUS {
        Some(_) => T::VERSION - 1..=T::VERSION - 1,
        None => T::VERSIONS,
    }
}

/// Decodes a section.
pub(crate) fn read<T: SectionType>(section: &Section) -> Result<T, FrameError> {
    section.read_as_before()
}

/// Takes a section that must be there out of `frame`, and decodes it.
pub(crate) fn take<T: SectionType>(frame: &mut Frame, instance: u32) -> Result<T, FrameError> {
    read(&frame.require(T::NAME, instance)?)
}

/// Adds a section.
pub(crate) fn put<T: SectionType>(
    writer: &mut FrameWriter,
    instance: u32,
    value: &T,
) -> Result<(), FrameError> {
    writer.put_section_as_before(instance, value)
}
