//! State files of cpr-reboot: two frames, chunks of RAM, and an end.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;

use cpr_core::frame::{FrameWriter, HEADER_LEN};
use cpr_reboot::StateFile;
use oslib::memfd::Memfd;
use serde::Serialize;

use crate::frame::{REPAIR_CHECKSUM, repair};
use crate::main_frame;

pub(crate) const WORDS: &[&str] = &["CPRSTATE", "CPR-USED", "cpr-reboot/file", "cpr-core/update"];

/// Bytes of a record.
const RECORD_LEN: usize = 24;
const END: u32 = u32::MAX;

/// The section `cpr-reboot/file`, as the mode writes it.
type FileWire = ([u8; 16], [u64; 5], Vec<(String, u64, KeptWire)>);

#[derive(Serialize)]
enum KeptWire {
    InFile { path: Vec<u8> },
    Copied,
}

fn record(region: u32, offset: u64, data: &[u8]) -> Vec<u8> {
    let mut record = Vec::with_capacity(RECORD_LEN + data.len());
    record.extend(region.to_le_bytes());
    record.extend((data.len() as u32).to_le_bytes());
    record.extend(offset.to_le_bytes());
    record.extend(crc32fast::hash(data).to_le_bytes());
    record.extend(crc32fast::hash(&record).to_le_bytes());
    record.extend(data);
    record
}

/// Puts right the checksums of whatever can be taken for frames and records.
fn repair_all(bytes: &mut [u8]) {
    let mut at = 0;
    for _ in 0..2 {
        let Some(length) = bytes.get(at + 16..at + 24) else { return };
        let length = u64::from_le_bytes(length.try_into().expect("eight bytes"));
        let end = usize::try_from(length).ok().and_then(|length| at.checked_add(length.max(HEADER_LEN)));
        let Some(end) = end.filter(|&end| end <= bytes.len()) else { return };
        repair(&mut bytes[at..end], REPAIR_CHECKSUM);
        at = end;
    }
    while let Some(head) = bytes.get(at..at + RECORD_LEN) {
        let length = u32::from_le_bytes(head[4..8].try_into().expect("four bytes")) as usize;
        if let Some(data) = bytes.get(at + RECORD_LEN..).and_then(|rest| rest.get(..length)) {
            let checksum = crc32fast::hash(data);
            bytes[at + 16..at + 20].copy_from_slice(&checksum.to_le_bytes());
        }
        let checksum = crc32fast::hash(&bytes[at..at + 20]);
        bytes[at + 20..at + RECORD_LEN].copy_from_slice(&checksum.to_le_bytes());
        at += RECORD_LEN + length;
    }
}

/// Any bytes as a state file. The first byte says whether checksums are repaired.
pub fn state_file(data: &[u8]) -> bool {
    let Some((&what, bytes)) = data.split_first() else { return false };
    let mut bytes = bytes.to_vec();
    if what & 1 != 0 {
        repair_all(&mut bytes);
    }
    let mut file = File::from(Memfd::new("state").create().expect("a memfd"));
    file.write_all(&bytes).expect("memory for a small file");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let state = match StateFile::open(Path::new(&path), 0) {
        Ok(state) => state,
        Err(error) => {
            let _ = error.to_string();
            return false;
        }
    };
    main_frame::read(&mut state.read_main().expect("it was read before"));
    let mut good = true;
    for (number, region) in state.regions().iter().enumerate() {
        let mut last = 0;
        let read = state.read_ram(number, &mut |offset, bytes| {
            assert!(offset >= last && !bytes.is_empty());
            last = offset + bytes.len() as u64;
            assert!(last <= region.len);
            Ok(())
        });
        good &= read.map_err(|error| error.to_string()).is_ok();
    }
    good
}

pub(crate) fn state_file_seeds() -> Vec<Vec<u8>> {
    let file = |kept, tail: &[Vec<u8>]| {
        let section: FileWire = ([7; 16], [1, 2, 3, 4, 5], vec![("ram0".into(), 1 << 20, kept)]);
        let mut early = FrameWriter::default();
        early.put_value("cpr-reboot/file", 0, 1, &section).expect("a good name");
        early.put_value("cpr-core/update", 0, 1, &("cpr-reboot", 2_u64)).expect("a good name");
        let (early, main) = (early.finish(crate::EPOCH), main_frame::writer().finish(crate::EPOCH));
        [vec![1], early, main, tail.concat()].concat()
    };
    let end = |chunks| [record(END, chunks, &[]), vec![0; 8]].concat();
    vec![
        file(KeptWire::InFile { path: b"/ram".to_vec() }, &[end(0)]),
        file(KeptWire::Copied, &[end(0)]),
        file(KeptWire::Copied, &[record(0, 4096, &[1; 64]), record(0, 8192, b"more"), end(2)]),
    ]
}
