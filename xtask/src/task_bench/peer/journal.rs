//! The samples file: one JSON line for the circumstances, then one for each finished visit. A run that was interrupted
//! goes on where it stopped; samples of other programs or another host are put aside, never mixed in.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::plan::{Cell, Mode, Who};

/// Raise it when a sample means something else than before.
const FORMAT: u32 = 1;

/// What must be the same for samples to be compared: name and value.
pub(super) type Circumstances = Vec<(String, String)>;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Header {
    format: u32,
    circumstances: Circumstances,
}

/// One update. Times in microseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Sample {
    pub(super) mode: Mode,
    /// The largest gap that a vCPU saw.
    pub(super) gap_us: u64,
    /// The same in a window as long, without an update.
    pub(super) ambient_us: u64,
    /// The pieces of the pause, if the VMM tells them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) phases_us: Vec<(String, u64)>,
}

/// One update under a guest that walks its RAM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Walked {
    pub(super) mode: Mode,
    /// Microseconds; none if it was not over within the limit.
    pub(super) brownout_us: Option<u64>,
}

/// What a visit measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) round: u32,
    pub(super) cell: String,
    pub(super) who: Who,
    pub(super) updates: Vec<Sample>,
    pub(super) walks: Vec<Walked>,
}

/// The file and what is in it.
pub(super) struct Journal {
    file: File,
    records: Vec<Record>,
}

impl Journal {
    /// Opens the samples of these circumstances in `path`, or begins anew: with `fresh`, and when there are others, which
    /// are kept beside it. The second is a word on that for the user.
    pub(super) fn open(
        path: &Path,
        circumstances: &Circumstances,
        fresh: bool,
    ) -> Result<(Journal, Option<String>)> {
        let header = Header { format: FORMAT, circumstances: circumstances.clone() };
        let mut told = None;
        if path.exists() {
            let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            match read(&text, &header) {
                Ok((records, whole_bytes)) if !fresh => {
                    let file = OpenOptions::new().append(true).open(path)?;
                    // The line that an interrupted run did not finish.
                    file.set_len(whole_bytes)?;
                    return Ok((Journal { file, records }, None));
                }
                Ok(_) => {}
                Err(why) => {
                    let aside = aside(path);
                    fs::rename(path, &aside)?;
                    told = Some(format!("{why}: the samples so far are in {}", aside.display()));
                }
            }
        }
        let mut file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        write_line(&mut file, &header)?;
        Ok((Journal { file, records: Vec::new() }, told))
    }

    /// Adds a visit; it is kept from now on.
    pub(super) fn add(&mut self, record: Record) -> Result<()> {
        write_line(&mut self.file, &record)?;
        self.records.push(record);
        Ok(())
    }

    /// How many updates and walks there are of a round.
    pub(super) fn done(&self, round: u32, cell: &Cell, who: Who, mode: Mode) -> (u32, u32) {
        let (mut updates, mut walks) = (0, 0);
        for record in self.of(cell, who).filter(|record| record.round == round) {
            updates += record.updates.iter().filter(|sample| sample.mode == mode).count();
            walks += record.walks.iter().filter(|walked| walked.mode == mode).count();
        }
        (u32::try_from(updates).unwrap_or(u32::MAX), u32::try_from(walks).unwrap_or(u32::MAX))
    }

    /// The updates of a cell.
    pub(super) fn samples(&self, cell: &Cell, who: Who, mode: Mode) -> Vec<&Sample> {
        self.of(cell, who).flat_map(|record| &record.updates).filter(|sample| sample.mode == mode).collect()
    }

    /// The walks of a cell.
    pub(super) fn walks(&self, cell: &Cell, who: Who, mode: Mode) -> Vec<&Walked> {
        self.of(cell, who).flat_map(|record| &record.walks).filter(|walked| walked.mode == mode).collect()
    }

    fn of(&self, cell: &Cell, who: Who) -> impl Iterator<Item = &Record> {
        let name = cell.name;
        self.records.iter().filter(move |record| record.cell == name && record.who == who)
    }
}

fn aside(path: &Path) -> PathBuf {
    path.with_extension("old.jsonl")
}

fn write_line(file: &mut File, value: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_string(value)?;
    line.push('\n');
    // One write: whole or, at the end of the file, visibly not.
    file.write_all(line.as_bytes()).context("cannot write the samples")
}

/// The records of a file, and the length of its whole lines; or why it is another run's.
fn read(text: &str, header: &Header) -> Result<(Vec<Record>, u64), String> {
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    let mut lines = whole.lines();
    let first = lines.next().unwrap_or_default();
    let found: Header = serde_json::from_str(first).map_err(|_| "unknown samples file".to_owned())?;
    if found.format != header.format {
        return Err("samples of another version of this benchmark".into());
    }
    let known = |item: &&(String, String)| !header.circumstances.contains(item);
    if let Some((name, value)) = found.circumstances.iter().find(known) {
        return Err(format!("measured with another {name} ({value})"));
    }
    if found.circumstances.len() != header.circumstances.len() {
        return Err("measured with other programs".into());
    }
    let records: Result<Vec<Record>, _> = lines.map(serde_json::from_str).collect();
    let records = records.map_err(|error| format!("damaged samples file ({error})"))?;
    Ok((records, whole.len() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn circumstances(version: &str) -> Circumstances {
        vec![("kernel".into(), "6.18".into()), ("QEMU".into(), version.into())]
    }

    fn record(round: u32, gaps_us: &[u64]) -> Record {
        let sample = |&gap_us| Sample {
            mode: Mode::CprExec,
            gap_us,
            ambient_us: 70,
            phases_us: vec![("stop".into(), 200)],
        };
        let walks = vec![Walked { mode: Mode::CprExec, brownout_us: None }];
        Record {
            round,
            cell: "1G".into(),
            who: Who::CprVmm,
            updates: gaps_us.iter().map(sample).collect(),
            walks,
        }
    }

    fn gaps(journal: &Journal) -> Vec<u64> {
        let cell = Cell::named("1G").unwrap();
        journal.samples(cell, Who::CprVmm, Mode::CprExec).iter().map(|sample| sample.gap_us).collect()
    }

    #[test]
    fn a_run_goes_on_after_its_last_whole_visit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("samples.jsonl");
        let open = |fresh| Journal::open(&path, &circumstances("11.1.3"), fresh).unwrap();
        let (mut journal, told) = open(false);
        assert_eq!(told, None);
        journal.add(record(0, &[3000, 3100])).unwrap();
        drop(journal);
        // Interrupted in the middle of a line.
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"round\":1,\"cell\":").unwrap();

        let (mut journal, told) = open(false);
        assert_eq!((told, gaps(&journal)), (None, vec![3000, 3100]));
        journal.add(record(1, &[3200])).unwrap();
        let (journal, _) = open(false);
        assert_eq!(gaps(&journal), [3000, 3100, 3200]);
        let cell = Cell::named("1G").unwrap();
        assert_eq!(journal.done(0, cell, Who::CprVmm, Mode::CprExec), (2, 1));
        assert_eq!(journal.done(1, cell, Who::CprVmm, Mode::CprExec), (1, 1));
        assert_eq!(journal.done(1, cell, Who::Qemu, Mode::CprExec), (0, 0));
        assert_eq!(journal.walks(cell, Who::CprVmm, Mode::CprExec)[0].brownout_us, None);

        let (journal, told) = open(true);
        assert_eq!((told, gaps(&journal)), (None, vec![]));
    }

    #[test]
    fn samples_of_another_program_are_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("samples.jsonl");
        let (mut journal, _) = Journal::open(&path, &circumstances("11.1.3"), false).unwrap();
        journal.add(record(0, &[3000])).unwrap();
        let (journal, told) = Journal::open(&path, &circumstances("11.2.0"), false).unwrap();
        assert!(gaps(&journal).is_empty());
        assert!(told.unwrap().starts_with("measured with another QEMU (11.1.3)"));
        assert!(fs::read_to_string(aside(&path)).unwrap().contains("3000"));

        fs::write(&path, "no json\n").unwrap();
        let (_, told) = Journal::open(&path, &circumstances("11.1.3"), false).unwrap();
        assert!(told.unwrap().starts_with("unknown samples file"));
    }
}
