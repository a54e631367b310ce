//! Whole frames, and what reads them.
//!
//! A checksum stops everything that a fuzzer changes at random, so both targets repair it: one repairs the header of any
//! bytes, the other one writes frames out of sections and damages them afterwards.

use std::collections::BTreeMap;

use arbitrary::{Arbitrary, Unstructured};
use cpr_core::frame::{FRAME_VERSION, Frame, FrameWriter, HEADER_LEN, MAGIC};

use crate::{early, main_frame};

pub(crate) const WORDS: &[&str] = &["CPRSTATE", "cpr-core/update", "kvm/vcpu", "serial"];

/// Bits of the first byte of an input: what of the header behind it is put right before it is read.
const REPAIR_MAGIC: u8 = 1;
const REPAIR_LENGTH: u8 = 2;
pub(crate) const REPAIR_CHECKSUM: u8 = 4;

/// Puts parts of a frame's header right; bytes that hold no header stay as they are.
pub(crate) fn repair(frame: &mut [u8], what: u8) {
    if frame.len() < HEADER_LEN {
        return;
    }
    if what & REPAIR_MAGIC != 0 {
        frame[..8].copy_from_slice(&MAGIC);
        frame[8..12].copy_from_slice(&FRAME_VERSION.to_le_bytes());
        frame[12..16].copy_from_slice(&(HEADER_LEN as u32).to_le_bytes());
    }
    if what & REPAIR_LENGTH != 0 {
        let length = frame.len() as u64;
        frame[16..24].copy_from_slice(&length.to_le_bytes());
    }
    if what & REPAIR_CHECKSUM != 0 {
        frame[36..40].fill(0);
        let checksum = crc32fast::hash(frame);
        frame[36..40].copy_from_slice(&checksum.to_le_bytes());
    }
}

/// Reads a frame in both ways that there are. Whatever is in it can be written again.
fn parsed(bytes: &[u8]) -> Option<Frame> {
    let frame = Frame::parse(bytes);
    let streamed = Frame::read_from(bytes);
    assert_eq!(frame.is_ok(), streamed.is_ok(), "{frame:?} {streamed:?}");
    let mut frame = frame.map_err(|error| error.to_string()).ok()?;
    let mut streamed = streamed.ok()?;
    let mut writer = FrameWriter::default();
    let names = frame.remaining();
    for name in &names {
        let (name, instance) = name.rsplit_once('/').expect("a name and an instance");
        let instance = instance.parse().expect("an instance is a number");
        let section = streamed.require(name, instance).expect("both have the same sections");
        assert_eq!(frame.take(name, instance).as_ref(), Some(&section));
        writer
            .put(name, instance, section.version, section.body)
            .expect("a name that was read is a good one");
    }
    assert!(frame.remaining().is_empty() && streamed.remaining().is_empty());
    let again = Frame::parse(&writer.finish(frame.epoch)).expect("what was just written can be read");
    assert_eq!((again.epoch, again.remaining()), (frame.epoch, names));
    Some(again)
}

/// Gives a frame to everything that takes sections out of one.
fn read_all(bytes: &[u8]) -> bool {
    let Some(mut frame) = parsed(bytes) else { return false };
    main_frame::read(&mut frame);
    early::read(frame);
    true
}

/// Any bytes as a frame. The first byte says what of the header is repaired.
pub fn state_frame(data: &[u8]) -> bool {
    let Some((&what, frame)) = data.split_first() else { return false };
    let mut frame = frame.to_vec();
    repair(&mut frame, what);
    read_all(&frame)
}

pub(crate) fn state_frame_seeds() -> Vec<Vec<u8>> {
    let mut small = FrameWriter::default();
    small.put_value("vcpu", 1, 3, &(7_u64, "abc")).expect("a good name");
    small.put("serial", 0, 1, vec![1, 2, 3]).expect("a good name");
    let frames = [FrameWriter::default(), small, early::writer(), main_frame::writer()];
    let mut seeds = Vec::new();
    for frame in frames.map(|writer| writer.finish(crate::EPOCH)) {
        for what in [0, REPAIR_CHECKSUM, REPAIR_MAGIC | REPAIR_LENGTH | REPAIR_CHECKSUM] {
            seeds.push([&[what], &frame[..]].concat());
        }
    }
    seeds
}

/// A frame, and what happens to it on its way.
#[derive(Debug, Arbitrary)]
struct Written<'a> {
    epoch: u64,
    sections: Vec<WrittenSection<'a>>,
    /// Places and values of bytes that change.
    damage: Vec<(u16, u8)>,
    /// What of the header is put right after that.
    repair: u8,
    keep: Option<u16>,
}

#[derive(Debug, Arbitrary)]
struct WrittenSection<'a> {
    /// One that the program reads, or any other.
    known: Option<u8>,
    name: &'a str,
    instance: u8,
    version: Option<u32>,
    body: &'a [u8],
}

/// Names of sections that the program reads.
const KNOWN: [&str; 9] = [
    early::UPDATE,
    early::REGISTRY,
    early::PROCESS,
    early::MONITORS,
    main_frame::MACHINE,
    main_frame::VCPU,
    main_frame::VM,
    main_frame::SERIAL,
    main_frame::PLATFORM,
];

/// A frame that was written out of sections, and damaged or not. What is undamaged comes back.
pub fn state_frame_written(data: &[u8]) -> bool {
    let Ok(input) = Written::arbitrary_take_rest(Unstructured::new(data)) else { return false };
    let mut writer = FrameWriter::default();
    let mut put = BTreeMap::new();
    for section in &input.sections {
        let name = section.known.map_or(section.name, |known| KNOWN[usize::from(known) % KNOWN.len()]);
        let (instance, version) = (u32::from(section.instance), section.version.unwrap_or(1));
        if writer.put(name, instance, version, section.body.to_vec()).is_ok() {
            put.insert((name, instance), (version, section.body));
        }
    }
    let whole = writer.finish(input.epoch);
    let mut frame = Frame::parse(&whole).expect("what was just written can be read");
    for ((name, instance), (version, body)) in put {
        let section = frame.take(name, instance).expect("what was put is there");
        assert_eq!((section.version, &section.body[..]), (version, body));
    }
    assert!(frame.remaining().is_empty());

    let mut bytes = whole;
    bytes.truncate(input.keep.map_or(usize::MAX, usize::from));
    for (at, value) in input.damage {
        if let Some(byte) = bytes.get_mut(usize::from(at)) {
            *byte = value;
        }
    }
    repair(&mut bytes, input.repair);
    read_all(&bytes)
}

/// The structure is taken from the bytes by rules of its own: anything is an input, and mutations find the good ones.
pub(crate) fn state_frame_written_seeds() -> Vec<Vec<u8>> {
    vec![vec![0; 64], (0..=255).collect()]
}
