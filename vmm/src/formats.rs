//! The versions in which this program reads and writes its sections: the current one of each, and the one before.

use std::ops::RangeInclusive;

use cpr_core::frame::{Frame, FrameError, FrameWriter, Section};
use cpr_core::section::SectionType;

/// Whether this program has machine types with a PCI bus.
pub(crate) const HAS_PCI: bool = true;

/// The versions that are read, and can be written.
pub(crate) fn versions<T: SectionType>() -> RangeInclusive<u32> {
    T::VERSIONS
}

/// Decodes a section.
pub(crate) fn read<T: SectionType>(section: &Section) -> Result<T, FrameError> {
    section.read()
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
    writer.put_section(instance, value)
}
