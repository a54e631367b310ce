//! The guest as the harness sees it: its RAM, mapped through the VMM's own memfd, and the payload's mailboxes in it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use oslib::mapping::SharedMapping;
use vmm_core::memory::HIGH_RAM_START;
use vmm_core::payload::{Command, GuestWords, Header, Mailbox, Outcome, Status};

use crate::wait_for;

/// End of the RAM below the hole.
const LOW_RAM_END: u64 = 0xc000_0000;

/// Guest RAM and the payload in it. Stays valid over any number of updates: the memory never moves.
pub struct Guest {
    ram: SharedMapping,
    file: File,
}

impl GuestWords for Guest {
    fn read_u64(&self, gpa: u64) -> u64 {
        self.ram.read_u64(offset(gpa)).expect("the address is RAM")
    }

    fn write_u64(&self, gpa: u64, value: u64) {
        self.ram.write_u64(offset(gpa), value).expect("the address is RAM");
    }
}

/// Where guest-physical `gpa` is in the memfd.
fn offset(gpa: u64) -> u64 {
    if gpa < LOW_RAM_END { gpa } else { gpa - HIGH_RAM_START + LOW_RAM_END }
}

impl Guest {
    /// Maps the memory backend `id` of process `pid`, and waits for the payload's `vcpus` vCPUs.
    ///
    /// # Errors
    /// There is no such memfd, or the payload does not come up.
    pub fn attach(pid: u32, id: &str, vcpus: u64) -> anyhow::Result<Guest> {
        let path = wait_for("the guest's RAM", crate::PATIENCE, || find_memfd(pid, id))?;
        Guest::attach_file(&path, vcpus)
    }

    /// The same with the file that is the guest's RAM.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn attach_file(path: &Path, vcpus: u64) -> anyhow::Result<Guest> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        // Between its creation and its first use a memfd has no size yet.
        let len = wait_for("the size of the guest's RAM", crate::PATIENCE, || {
            file.metadata().ok().map(|metadata| metadata.len()).filter(|&len| len > 0)
        })?;
        let guest = Guest { ram: SharedMapping::map(&file, len)?, file };
        let header = Header::new(&guest);
        wait_for("the payload", Duration::from_secs(60), || {
            (header.is_ready() && header.started() >= vcpus).then_some(())
        })?;
        Ok(guest)
    }

    /// Bytes of RAM that the payload can fill.
    pub fn usable_bytes(&self) -> u64 {
        Header::new(self).usable_bytes()
    }

    /// The mailbox of one vCPU.
    pub fn vcpu(&self, index: u32) -> Mailbox<'_, Guest> {
        Mailbox::new(self, index)
    }

    /// The raw memory.
    pub fn ram(&self) -> &SharedMapping {
        &self.ram
    }

    /// The file or memfd that is the guest's RAM.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// All of RAM as it is now. Meaningful when the guest stands still.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn snapshot(&self) -> anyhow::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(self.ram.len_bytes())?];
        self.file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// The words of the whole guest.
    pub fn header(&self) -> Header<'_, Guest> {
        Header::new(self)
    }

    /// Runs a command on vCPU 0 to its end.
    ///
    /// # Errors
    /// It does not end, or the payload refuses it.
    pub fn run(&self, command: Command) -> anyhow::Result<Outcome> {
        let mailbox = self.vcpu(0);
        let ticket = mailbox.submit(command);
        let outcome =
            wait_for(&format!("{command:?}"), Duration::from_secs(120), || mailbox.outcome(ticket))?;
        ensure!(outcome.status == Status::Ok, "{command:?}: {outcome:?}");
        Ok(outcome)
    }

    /// Fills the first `bytes` of usable RAM with the pattern of `seed`.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn fill(&self, bytes: u64, seed: u64) -> anyhow::Result<()> {
        self.run(Command::Fill { offset: 0, bytes, seed }).map(drop)
    }

    /// Checks that the pattern is intact in every word.
    ///
    /// # Errors
    /// A word is not; the error names the first.
    pub fn verify(&self, bytes: u64, seed: u64) -> anyhow::Result<()> {
        let outcome = self.run(Command::Verify { offset: 0, bytes, seed })?;
        let [mismatches, first] = outcome.results;
        ensure!(mismatches == 0, "{mismatches} words of guest RAM are wrong, the first at {first:#x}");
        Ok(())
    }

    /// Waits until vCPU `index` has beaten again.
    ///
    /// # Errors
    /// It stands still.
    pub fn beats_on(&self, index: u32) -> anyhow::Result<u64> {
        let before = self.vcpu(index).beats();
        wait_for(&format!("a beat of vCPU {index}"), crate::PATIENCE, || {
            Some(self.vcpu(index).beats()).filter(|&beats| beats > before)
        })
        .with_context(|| format!("state {:?}", self.vcpu(index).state()))
    }

    /// Forgets the largest gap so far.
    ///
    /// # Errors
    /// The vCPU does not answer.
    pub fn reset_gap(&self, index: u32) -> anyhow::Result<()> {
        let mailbox = self.vcpu(index);
        let ticket = mailbox.request_gap_reset();
        wait_for("the gap reset", crate::PATIENCE, || mailbox.gap_was_reset(ticket).then_some(()))
    }
}

/// The memfd of process `pid` that is named `id`.
fn find_memfd(pid: u32, id: &str) -> Option<PathBuf> {
    let wanted = format!("/memfd:{id} (deleted)");
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| std::fs::read_link(path).is_ok_and(|target| target.as_os_str() == wanted.as_str()))
}

/// Runs `action`, and measures the largest gap that vCPU 0 saw between two of its own clock reads around it, in
/// microseconds. The window ends a few milliseconds after the guest beats again, so that it holds little else.
///
/// # Errors
/// The action fails, or the guest stands still.
pub fn beat_gap_us(
    guest: &Guest,
    tsc_hz: f64,
    action: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    guest.reset_gap(0)?;
    action()?;
    guest.beats_on(0)?;
    std::thread::sleep(Duration::from_millis(3));
    Ok(guest.vcpu(0).max_gap_tsc() as f64 / tsc_hz * 1e6)
}
