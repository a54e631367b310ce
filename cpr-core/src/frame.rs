//! The state frame: a hand-framed header, a section table, and opaque section bodies.
//!
//! The header can be read without decoding anything, so that a foreign, cut or future file is named as such. All
//! numbers are little-endian; `docs/state-format.md` is the reference. Input is hostile: lengths are checked before
//! anything is allocated, and no input makes the parser panic.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::ownership::Epoch;
use crate::preflight::Reads;

/// First bytes of every frame.
pub const MAGIC: [u8; 8] = *b"CPRSTATE";
/// The frame layout that this crate writes. The layout of a *section* has its own version.
pub const FRAME_VERSION: u32 = 1;
/// Bytes of the header.
pub const HEADER_LEN: usize = 40;
/// The largest frame that is read, in bytes. Device state of 64 vCPUs is under 2 MiB.
pub const MAX_FRAME_LEN: u64 = 256 << 20;
/// The longest section name, in bytes.
pub const MAX_NAME_LEN: usize = 255;

const CHECKSUM_AT: usize = 36;
/// Name length, version, instance and body length of one table row; the name follows.
const ROW_LEN: usize = 2 + 4 + 4 + 8;

/// Why bytes are not a frame, or a section not what was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The first bytes are something else.
    #[error("not a CPR state frame (it does not begin with CPRSTATE)")]
    BadMagic,
    /// Written by a later program.
    #[error("state frame version {found} is newer than this program knows ({FRAME_VERSION})")]
    FutureFrame {
        /// The version found.
        found: u32,
    },
    /// Fewer bytes than the header announces, or than a header has.
    #[error("the state frame is truncated: {found} bytes of {expected}")]
    Truncated {
        /// Bytes there are.
        found: u64,
        /// Bytes there should be.
        expected: u64,
    },
    /// More bytes than the header announces.
    #[error("the state frame is followed by {extra} bytes that do not belong to it")]
    TrailingBytes {
        /// How many.
        extra: u64,
    },
    /// The header announces more than this program reads.
    #[error("the state frame claims to be {found} bytes long; at most {MAX_FRAME_LEN} are accepted")]
    TooLarge {
        /// The length found.
        found: u64,
    },
    /// The checksum does not fit: a bit flipped.
    #[error("the state frame is damaged: its checksum is {found:#010x}, its content gives {expected:#010x}")]
    BadChecksum {
        /// In the header.
        found: u32,
        /// Computed.
        expected: u32,
    },
    /// The checksum fits but the table does not: it was written wrongly.
    #[error("the state frame's section table is malformed: {0}")]
    Malformed(&'static str),
    /// The same section twice.
    #[error("state section '{name}' instance {instance} stands twice")]
    DuplicateSection {
        /// The name.
        name: String,
        /// The instance.
        instance: u32,
    },
    /// A section that is needed is not there: the state is of another machine.
    #[error("state section '{name}' instance {instance} is missing")]
    MissingSection {
        /// The name.
        name: String,
        /// The instance.
        instance: u32,
    },
    /// A section version that this program does not read.
    #[error("state section '{name}' has version {found}; this program reads {}", versions(reads))]
    SectionVersion {
        /// The name.
        name: String,
        /// The version found.
        found: u32,
        /// The versions that are read.
        reads: RangeInclusive<u32>,
    },
    /// A section that the target reads in no version that this program can write.
    #[error(
        "state section '{name}' cannot be written for this target: it reads {}, this program writes {}",
        versions(reads),
        versions(writes)
    )]
    NoCommonVersion {
        /// The name.
        name: String,
        /// The versions that can be written.
        writes: RangeInclusive<u32>,
        /// The versions that the target reads.
        reads: RangeInclusive<u32>,
    },
    /// A value that the previous version of a section has no form for.
    #[error("state section '{name}' cannot be written in version {version}: {reason}")]
    NotInPrevious {
        /// The name.
        name: String,
        /// The version that the target reads.
        version: u32,
        /// What the conversion says.
        reason: String,
    },
    /// A section body that does not decode.
    #[error("state section '{name}' instance {instance} is malformed: {reason}")]
    SectionBody {
        /// The name.
        name: String,
        /// The instance.
        instance: u32,
        /// What the decoder says.
        reason: String,
    },
    /// The frame could not be read at all.
    #[error("the state frame cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// Versions, as an error says them.
fn versions(range: &RangeInclusive<u32>) -> String {
    let (least, most) = (range.start(), range.end());
    match most.checked_sub(*least) {
        Some(0) => format!("version {most}"),
        Some(1) => format!("versions {least} and {most}"),
        _ => format!("versions {least} to {most}"),
    }
}

/// Encodes a wire type with postcard, our helper for section bodies. Bodies may be anything.
pub fn to_body<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_allocvec(value).expect("wire types are plain data: encoding to memory cannot fail")
}

/// Collects sections and writes the frame.
#[derive(Debug, Default)]
pub struct FrameWriter {
    sections: BTreeMap<(String, u32), (u32, Vec<u8>)>,
    /// What the reader takes, if that is known.
    pub(crate) reads: Option<Reads>,
}

impl FrameWriter {
    /// Writes for a target of which is known what it reads. Without that every section has its current version.
    pub fn for_reader(reads: Reads) -> FrameWriter {
        FrameWriter { sections: BTreeMap::new(), reads: Some(reads) }
    }

    /// Adds a section. `instance` tells several components of one kind apart.
    ///
    /// # Errors
    /// [`FrameError::DuplicateSection`]; [`FrameError::Malformed`] for an empty name or one over 255 bytes.
    pub fn put(&mut self, name: &str, instance: u32, version: u32, body: Vec<u8>) -> Result<(), FrameError> {
        if name.is_empty() || name.len() > MAX_NAME_LEN {
            return Err(FrameError::Malformed("a section name has 1 to 255 bytes"));
        }
        let key = (name.to_owned(), instance);
        if self.sections.contains_key(&key) {
            return Err(FrameError::DuplicateSection { name: key.0, instance });
        }
        self.sections.insert(key, (version, body));
        Ok(())
    }

    /// Adds a section whose body is `value` in postcard.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub fn put_value<T: Serialize>(
        &mut self,
        name: &str,
        instance: u32,
        version: u32,
        value: &T,
    ) -> Result<(), FrameError> {
        self.put(name, instance, version, to_body(value))
    }

    /// The frame of update `epoch`, with its sections in order of name and instance.
    pub fn finish(self, epoch: Epoch) -> Vec<u8> {
        let table: usize = self.sections.keys().map(|(name, _)| ROW_LEN + name.len()).sum();
        let bodies: usize = self.sections.values().map(|(_, body)| body.len()).sum();
        let total = HEADER_LEN + table + bodies;
        let mut out = Vec::with_capacity(total);
        out.extend(MAGIC);
        out.extend(FRAME_VERSION.to_le_bytes());
        out.extend((HEADER_LEN as u32).to_le_bytes());
        out.extend((total as u64).to_le_bytes());
        out.extend(epoch.to_le_bytes());
        out.extend((self.sections.len() as u32).to_le_bytes());
        out.extend([0; 4]);
        for ((name, instance), (version, body)) in &self.sections {
            out.extend((name.len() as u16).to_le_bytes());
            out.extend(version.to_le_bytes());
            out.extend(instance.to_le_bytes());
            out.extend((body.len() as u64).to_le_bytes());
            out.extend(name.as_bytes());
        }
        for (_, body) in self.sections.values() {
            out.extend(body);
        }
        let checksum = checksum(&out);
        out[CHECKSUM_AT..HEADER_LEN].copy_from_slice(&checksum.to_le_bytes());
        out
    }
}

/// A memfd with these bytes, a finished frame, that nobody can change any more.
///
/// # Errors
/// Those of memfd_create(2) and write(2).
pub fn sealed_memfd(name: &str, frame: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(oslib::memfd::Memfd::new(name).create()?);
    file.write_all(frame)?;
    oslib::memfd::seal_write(&file)?;
    Ok(file.into())
}

/// CRC-32 of the whole frame with the checksum field taken as zero.
fn checksum(frame: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&frame[..CHECKSUM_AT]);
    hasher.update(&[0; 4]);
    hasher.update(&frame[HEADER_LEN..]);
    hasher.finalize()
}

/// What can be known of a frame from its first [`HEADER_LEN`] bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the whole frame.
    pub total_len: u64,
    /// The update that wrote it.
    pub epoch: Epoch,
    /// Rows in the section table.
    pub sections: u32,
    /// CRC-32 over the frame.
    pub checksum: u32,
}

impl Header {
    /// Reads the header without looking at the rest.
    ///
    /// # Errors
    /// Too short, another magic, a later frame version, or an impossible length.
    pub fn parse(bytes: &[u8]) -> Result<Header, FrameError> {
        let mut cursor = Cursor(bytes);
        let short = || FrameError::Truncated { found: bytes.len() as u64, expected: HEADER_LEN as u64 };
        if cursor.array::<8>().ok_or_else(short)? != MAGIC {
            return Err(FrameError::BadMagic);
        }
        let version = cursor.u32().ok_or_else(short)?;
        if version > FRAME_VERSION {
            return Err(FrameError::FutureFrame { found: version });
        }
        let header_len = cursor.u32().ok_or_else(short)?;
        let total_len = cursor.u64().ok_or_else(short)?;
        let epoch = cursor.u64().ok_or_else(short)?;
        let sections = cursor.u32().ok_or_else(short)?;
        let checksum = cursor.u32().ok_or_else(short)?;
        if version == 0 || header_len as usize != HEADER_LEN || total_len < HEADER_LEN as u64 {
            return Err(FrameError::Malformed("impossible version or length in the header"));
        }
        if total_len > MAX_FRAME_LEN {
            return Err(FrameError::TooLarge { found: total_len });
        }
        Ok(Header { total_len, epoch, sections, checksum })
    }
}

/// One component's saved state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// The component's name.
    pub name: String,
    /// Which of several.
    pub instance: u32,
    /// Version of the body's layout.
    pub version: u32,
    /// The body; its meaning is the component's own.
    pub body: Vec<u8>,
}

impl Section {
    /// Decodes a postcard body of layout version `version`, and of no other.
    ///
    /// # Errors
    /// [`FrameError::SectionVersion`], or [`FrameError::SectionBody`] for a body that is short, long or wrong.
    pub fn decode<T: DeserializeOwned>(&self, version: u32) -> Result<T, FrameError> {
        if self.version != version {
            return Err(self.unread(version..=version));
        }
        match postcard::take_from_bytes(&self.body) {
            Ok((value, [])) => Ok(value),
            Ok((_, rest)) => Err(self.malformed(format!("{} bytes too many", rest.len()))),
            Err(error) => Err(self.malformed(error)),
        }
    }

    /// An error that names this section.
    pub fn malformed(&self, reason: impl ToString) -> FrameError {
        FrameError::SectionBody {
            name: self.name.clone(),
            instance: self.instance,
            reason: reason.to_string(),
        }
    }
}

/// A frame that was read and checked. Components take their sections; what remains at the end was written by a
/// component that this program does not have.
#[derive(Debug)]
pub struct Frame {
    /// The update that wrote it.
    pub epoch: Epoch,
    sections: BTreeMap<(String, u32), Section>,
}

/// What a reader has room for before it knows more, in bytes.
const ROOM: usize = 4096;

impl Frame {
    /// Parses and checks a frame that is all of `bytes`.
    ///
    /// # Errors
    /// Everything that [`FrameError`] knows of frames.
    pub fn parse(bytes: &[u8]) -> Result<Frame, FrameError> {
        let header = Header::parse(bytes)?;
        let found = bytes.len() as u64;
        if found < header.total_len {
            return Err(FrameError::Truncated { found, expected: header.total_len });
        }
        if found > header.total_len {
            return Err(FrameError::TrailingBytes { extra: found - header.total_len });
        }
        let expected = checksum(bytes);
        if expected != header.checksum {
            return Err(FrameError::BadChecksum { found: header.checksum, expected });
        }

        let short = || FrameError::Malformed("the table is longer than the frame");
        let mut cursor = Cursor(&bytes[HEADER_LEN..]);
        let mut rows = Vec::new();
        for _ in 0..header.sections {
            let name_len = cursor.u16().ok_or_else(short)?;
            let version = cursor.u32().ok_or_else(short)?;
            let instance = cursor.u32().ok_or_else(short)?;
            let body_len = cursor.u64().ok_or_else(short)?;
            let name = cursor.bytes(u64::from(name_len)).ok_or_else(short)?;
            let name = std::str::from_utf8(name).map_err(|_| FrameError::Malformed("a name is not UTF-8"))?;
            if name.is_empty() || name.len() > MAX_NAME_LEN {
                return Err(FrameError::Malformed("a section name has 1 to 255 bytes"));
            }
            rows.push((name, version, instance, body_len));
        }
        let mut sections = BTreeMap::new();
        for (name, version, instance, body_len) in rows {
            let body =
                cursor.bytes(body_len).ok_or(FrameError::Malformed("a body is longer than the frame"))?;
            let section = Section { name: name.to_owned(), instance, version, body: body.to_vec() };
            if sections.insert((name.to_owned(), instance), section).is_some() {
                return Err(FrameError::DuplicateSection { name: name.to_owned(), instance });
            }
        }
        if !cursor.0.is_empty() {
            return Err(FrameError::Malformed("bytes that no section owns"));
        }
        Ok(Frame { epoch: header.epoch, sections })
    }

    /// Reads one frame, and expects the end of the stream behind it.
    ///
    /// # Errors
    /// As [`parse`](Self::parse), or the stream cannot be read.
    pub fn read_from(mut stream: impl Read) -> Result<Frame, FrameError> {
        let mut bytes = Vec::with_capacity(ROOM);
        stream.by_ref().take(HEADER_LEN as u64).read_to_end(&mut bytes)?;
        let header = Header::parse(&bytes)?;
        // One byte more than announced, so that trailing bytes are noticed.
        let rest = header.total_len - HEADER_LEN as u64 + 1;
        // At once, if it is likely; more is believed when it is there.
        let likely = usize::try_from(rest).map_or(ROOM, |rest| rest.min(1 << 20));
        let mut rest = stream.take(rest);
        let mut filled = bytes.len();
        bytes.resize(filled + likely, 0);
        while filled < bytes.len() {
            match rest.read(&mut bytes[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        bytes.truncate(filled);
        rest.read_to_end(&mut bytes)?;
        Frame::parse(&bytes)
    }

    /// Reads a frame that is all of a memfd, whatever its file position, which is shared with whoever else has it.
    ///
    /// # Errors
    /// As [`read_from`](Self::read_from).
    pub fn read_memfd(fd: impl AsFd) -> Result<Frame, FrameError> {
        let mut file = File::from(fd.as_fd().try_clone_to_owned()?);
        file.seek(SeekFrom::Start(0))?;
        Frame::read_from(file)
    }

    /// Takes a section out of the frame.
    pub fn take(&mut self, name: &str, instance: u32) -> Option<Section> {
        self.sections.remove(&(name.to_owned(), instance))
    }

    /// Takes a section that must be there.
    ///
    /// # Errors
    /// [`FrameError::MissingSection`].
    pub fn require(&mut self, name: &str, instance: u32) -> Result<Section, FrameError> {
        self.take(name, instance)
            .ok_or_else(|| FrameError::MissingSection { name: name.to_owned(), instance })
    }

    /// What nobody took yet, as `name/instance`, in order.
    pub fn remaining(&self) -> Vec<String> {
        self.sections.keys().map(|(name, instance)| format!("{name}/{instance}")).collect()
    }
}

/// A checked reader over a slice: every step answers `None` instead of reading past the end.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn bytes(&mut self, len: u64) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(usize::try_from(len).ok()?)?;
        self.0 = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N as u64).map(|bytes| bytes.try_into().expect("bytes() gives the length asked for"))
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Vec<u8> {
        let mut writer = FrameWriter::default();
        writer.put_value("vcpu", 1, 3, &(7u64, "abc")).unwrap();
        writer.put("vcpu", 0, 3, vec![]).unwrap();
        writer.put("serial", 0, 1, vec![1, 2, 3]).unwrap();
        writer.finish(0xfeed)
    }

    #[test]
    fn round_trip() {
        let mut frame = Frame::read_from(&sample()[..]).unwrap();
        assert_eq!(frame.epoch, 0xfeed);
        assert_eq!(frame.remaining(), ["serial/0", "vcpu/0", "vcpu/1"]);
        let section = frame.require("vcpu", 1).unwrap();
        assert_eq!(section.decode::<(u64, String)>(3).unwrap(), (7, "abc".to_owned()));
        assert_eq!(frame.take("serial", 0).unwrap().body, [1, 2, 3]);
        assert_eq!(frame.remaining(), ["vcpu/0"]);
        let missing = frame.require("serial", 0).unwrap_err().to_string();
        assert_eq!(missing, "state section 'serial' instance 0 is missing");
    }

    #[test]
    fn a_section_of_another_version_or_length_is_named() {
        let mut frame = Frame::parse(&sample()).unwrap();
        let section = frame.require("vcpu", 1).unwrap();
        let error = section.decode::<(u64, String)>(2).unwrap_err().to_string();
        assert_eq!(error, "state section 'vcpu' has version 3; this program reads version 2");
        let error = section.decode::<u64>(3).unwrap_err().to_string();
        assert_eq!(error, "state section 'vcpu' instance 1 is malformed: 4 bytes too many");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let frame = sample();
        let parse = |bytes: &[u8]| Frame::read_from(bytes).unwrap_err().to_string();
        assert_eq!(parse(b""), "the state frame is truncated: 0 bytes of 40");
        assert_eq!(parse(b"\x7fELF rather long but no frame at all .."), FrameError::BadMagic.to_string());
        assert!(parse(&frame[..frame.len() - 1]).starts_with("the state frame is truncated: "));
        assert!(
            parse(&[&frame[..], b"x"].concat()).ends_with("followed by 1 bytes that do not belong to it")
        );

        let mut future = frame.clone();
        future[8] = 2;
        assert_eq!(parse(&future), "state frame version 2 is newer than this program knows (1)");
        let mut huge = frame.clone();
        huge[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(parse(&huge).starts_with("the state frame claims to be"), "{}", parse(&huge));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let frame = sample();
        for bit in 0..frame.len() * 8 {
            let mut bytes = frame.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Frame::parse(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_duplicate_is_refused_when_written_and_when_read() {
        let mut writer = FrameWriter::default();
        writer.put("a", 0, 1, vec![]).unwrap();
        assert!(matches!(writer.put("a", 0, 2, vec![]), Err(FrameError::DuplicateSection { .. })));

        writer.put("b", 0, 1, vec![]).unwrap();
        let mut bytes = writer.finish(1);
        let b = bytes.iter().rposition(|&c| c == b'b').unwrap();
        bytes[b] = b'a';
        let fixed = checksum(&bytes);
        bytes[CHECKSUM_AT..HEADER_LEN].copy_from_slice(&fixed.to_le_bytes());
        assert!(matches!(Frame::parse(&bytes), Err(FrameError::DuplicateSection { .. })));
    }

    proptest! {
        #[test]
        fn no_input_makes_the_parser_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..200),
            fix_header in any::<bool>(),
        ) {
            if fix_header && bytes.len() >= HEADER_LEN {
                bytes[..8].copy_from_slice(&MAGIC);
                bytes[8..12].copy_from_slice(&1u32.to_le_bytes());
                bytes[12..16].copy_from_slice(&(HEADER_LEN as u32).to_le_bytes());
                let len = bytes.len() as u64;
                bytes[16..24].copy_from_slice(&len.to_le_bytes());
                let sum = checksum(&bytes);
                bytes[CHECKSUM_AT..HEADER_LEN].copy_from_slice(&sum.to_le_bytes());
            }
            let _ = Frame::parse(&bytes);
        }

        #[test]
        fn whatever_is_put_comes_back(
            sections in proptest::collection::btree_map(
                ("[a-z/-]{1,20}", any::<u32>()),
                (any::<u32>(), proptest::collection::vec(any::<u8>(), 0..50)), 0..8),
            epoch in any::<u64>(),
        ) {
            let mut writer = FrameWriter::default();
            for ((name, instance), (version, body)) in &sections {
                writer.put(name, *instance, *version, body.clone()).unwrap();
            }
            let mut frame = Frame::parse(&writer.finish(epoch)).unwrap();
            prop_assert_eq!(frame.epoch, epoch);
            for ((name, instance), (version, body)) in sections {
                let section = frame.take(&name, instance).unwrap();
                prop_assert_eq!((section.version, section.body), (version, body));
            }
            prop_assert!(frame.remaining().is_empty());
        }
    }
}
