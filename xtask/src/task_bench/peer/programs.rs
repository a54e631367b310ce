//! The programs that are compared: a copy of our release binary, QEMU out of the lab's cached Debian root or one that the
//! user names, and the guest that both boot.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vmm_core::payload;

use super::plan::Who;
use crate::lab::LabQemu;
use crate::tools::{release_binary, workspace};

/// QEMU as Debian's package has it, and its small build.
const QEMUS: [(Who, &str); 2] =
    [(Who::Qemu, "qemu-system-x86_64"), (Who::QemuSmall, "qemu-system-x86_64-microvm")];

/// Both modes are in QEMU from this version on.
const NEEDED: (u32, u32) = (10, 2);

/// A QEMU to run.
#[derive(Debug, Clone)]
pub(super) struct Qemu {
    pub(super) who: Who,
    pub(super) program: PathBuf,
    /// What stands before all other arguments: it runs by the dynamic loader of its own root.
    pub(super) arguments: Vec<String>,
    /// As it says itself, such as `11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)`.
    pub(super) version: String,
}

/// All programs and files of a run.
pub(super) struct Programs {
    pub(super) cpr_vmm: PathBuf,
    /// Version and commit.
    pub(super) cpr_vmm_version: String,
    /// Changes with the binary.
    pub(super) cpr_vmm_hash: u64,
    /// The full QEMU first.
    pub(super) qemus: Vec<Qemu>,
    /// The guest, as a file.
    pub(super) payload: PathBuf,
    /// Keeps the cache from being swept.
    _lab: Option<LabQemu>,
}

impl Programs {
    /// Builds ours, gets QEMU, writes the guest; files go to `folder`.
    pub(super) fn get(folder: &Path, qemu: Option<&Path>) -> Result<Programs> {
        // First, as it is the likelier to fail, and says what to do then.
        let (lab, qemus) = match qemu {
            Some(program) => (None, vec![named_qemu(program)?]),
            None => {
                let lab = LabQemu::get().context(
                    "no QEMU. With --qemu PROGRAM one of your own is taken, version 10.2 or later",
                )?;
                let qemus = lab_qemus(&lab)?;
                (Some(lab), qemus)
            }
        };
        // A copy: a build while we measure, and an update would exec another program.
        let built = release_binary()?;
        let cpr_vmm = folder.join("cpr-vmm");
        let bytes = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
        let cpr_vmm_hash = hash(&bytes);
        let _ = fs::remove_file(&cpr_vmm);
        fs::copy(&built, &cpr_vmm).with_context(|| format!("cannot write {}", cpr_vmm.display()))?;
        let payload = folder.join("payload.elf");
        fs::write(&payload, payload::ELF).with_context(|| format!("cannot write {}", payload.display()))?;
        let cpr_vmm_version = own_version(&cpr_vmm)?;
        Ok(Programs { cpr_vmm, cpr_vmm_version, cpr_vmm_hash, qemus, payload, _lab: lab })
    }

    /// The QEMU that `who` is.
    pub(super) fn qemu(&self, who: Who) -> Option<&Qemu> {
        self.qemus.iter().find(|qemu| qemu.who == who)
    }
}

fn lab_qemus(lab: &LabQemu) -> Result<Vec<Qemu>> {
    let mut qemus = Vec::new();
    for (who, name) in QEMUS {
        if let Some(command) = lab.command(name) {
            qemus.push(Qemu::new(who, &command)?);
        }
    }
    ensure!(qemus.iter().any(|qemu| qemu.who == Who::Qemu), "the Debian root has no {}", QEMUS[0].1);
    Ok(qemus)
}

fn named_qemu(program: &Path) -> Result<Qemu> {
    // A path that means the same in the folder of a VM.
    let program = if program.components().count() > 1 {
        program.canonicalize().with_context(|| format!("--qemu {}", program.display()))?
    } else {
        program.to_owned()
    };
    Qemu::new(Who::Qemu, &Command::new(program))
}

impl Qemu {
    fn new(who: Who, command: &Command) -> Result<Qemu> {
        let program = PathBuf::from(command.get_program());
        let arguments: Vec<String> = command
            .get_args()
            .map(|word| word.to_str().map(str::to_owned).context("the cache folder's name is not UTF-8"))
            .collect::<Result<_>>()?;
        let said = output_of(Command::new(&program).args(&arguments).arg("--version"))?;
        let first = said.lines().next().unwrap_or_default();
        let version =
            version_in(&said).with_context(|| format!("{program:?} is no QEMU: it says {first:?}"))?;
        let number = major_minor(version).with_context(|| format!("{version:?} is no version of QEMU"))?;
        ensure!(
            number >= NEEDED,
            "QEMU {version} has no cpr-exec: version {}.{} or later is needed",
            NEEDED.0,
            NEEDED.1
        );
        Ok(Qemu { who, version: version.to_owned(), program, arguments })
    }
}

/// `11.1.3 (Debian ...)` out of what `--version` prints.
fn version_in(said: &str) -> Option<&str> {
    Some(said.lines().next()?.strip_prefix("QEMU emulator version ")?.trim())
}

fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Version of our binary, and the commit that it was built from as far as git knows.
fn own_version(binary: &Path) -> Result<String> {
    let said = output_of(Command::new(binary).arg("--version"))?;
    let version = said.lines().next().unwrap_or_default().trim_start_matches("cpr-vmm").trim().to_owned();
    let commit = Command::new("git")
        .args(["describe", "--always", "--dirty", "--exclude=*"])
        .current_dir(workspace())
        .output()
        .ok()
        .filter(|output| output.status.success())
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    Ok(match commit {
        Some(commit) => format!("{version} (commit {commit})"),
        None => version,
    })
}

fn output_of(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    ensure!(
        output.status.success(),
        "{:?}: {}: {}",
        command.get_program(),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// FNV-1a, 64 bits: the same in every build of this task.
pub(super) fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_qemu() {
        let said = "QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)\nCopyright (c)\n";
        let version = version_in(said).unwrap();
        assert_eq!(version, "11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)");
        assert_eq!(major_minor(version), Some((11, 1)));
        assert_eq!(major_minor("10.2"), Some((10, 2)));
        assert!(major_minor("9.1.0").unwrap() < NEEDED);
        assert_eq!(version_in("bash 5"), None);
    }
}
