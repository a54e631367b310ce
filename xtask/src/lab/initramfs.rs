//! The two initramfs archives, put together anew for every run (it takes milliseconds): L1's, with the modules that reach
//! its disk and the files of this run; and that of the L2 guests, with a shell and the guest agent.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::build::{Build, L1_KERNELS};
use super::cpio::Archive;
use super::{LabOptions, PROMPT, environment};

const L1_INIT: &str = include_str!("scripts/l1-init.sh");
const L1_MAIN: &str = include_str!("scripts/l1-main.sh");
const L2_INIT: &str = include_str!("scripts/l2-init.sh");

/// Writes the initramfs of the L2 guests.
pub(super) fn write_l2(to: &Path, build: &Build, agent: &Path) -> Result<()> {
    let mut archive = base(to, build, &L2_INIT.replace("@PROMPT@", PROMPT))?;
    archive.file("bin/guest-agent", 0o755, &read(agent)?)?;
    add_modules(&mut archive, "modules", &build.l2_modules()?)?;
    archive.finish()?;
    Ok(())
}

/// Writes the initramfs of L1. Without a `command` (words of a shell line) L1 gives a shell on its console.
pub(super) fn write_l1(
    to: &Path,
    build: &Build,
    l2_initrd: &Path,
    options: &LabOptions,
    command: Option<&[String]>,
) -> Result<()> {
    let mut archive = base(to, build, L1_INIT)?;
    add_modules(&mut archive, "disk-modules", &build.l1_disk_modules()?)?;
    add_modules(&mut archive, "vmm-modules", &build.l1_vmm_modules()?)?;

    archive.dir("payload")?;
    archive.file("payload/.l1-main", 0o755, L1_MAIN.as_bytes())?;
    let variables = environment(options)
        .into_iter()
        .map(|(name, value)| Ok(format!("export {name}={}\n", quote(&value)?)))
        .collect::<Result<String>>()?;
    archive.file("payload/.environment", 0o644, variables.as_bytes())?;
    if let Some(command) = command {
        let words = command.iter().map(|word| quote(word)).collect::<Result<Vec<_>>>()?;
        archive.file("payload/.command", 0o644, format!("exec {}\n", words.join(" ")).as_bytes())?;
    }
    archive.link("payload/vmlinux", &format!("{L1_KERNELS}/vmlinux"))?;
    archive.link("payload/bzImage", &format!("{L1_KERNELS}/bzImage"))?;
    archive.file("payload/initrd", 0o644, &read(l2_initrd)?)?;
    if let Some(vmm) = &options.vmm {
        archive.file("payload/cpr-vmm", 0o755, &read(vmm)?)?;
    }
    for file in &options.files {
        archive.file(&format!("payload/{}", file.name), 0o755, &read(&file.from)?)?;
    }
    archive.finish()?;
    Ok(())
}

/// An archive with the busybox of the lab and an `/init`.
fn base(to: &Path, build: &Build, init: &str) -> Result<Archive<BufWriter<File>>> {
    let file = File::create(to).with_context(|| format!("cannot create {}", to.display()))?;
    let mut archive = Archive::new(BufWriter::new(file));
    for dir in ["bin", "dev", "proc", "sys"] {
        archive.dir(dir)?;
    }
    archive.char_device("dev/console", 5, 1)?;
    archive.file("bin/busybox", 0o755, &read(&build.busybox())?)?;
    archive.link("bin/sh", "busybox")?;
    archive.file("init", 0o755, init.as_bytes())?;
    Ok(archive)
}

fn add_modules<W: Write>(archive: &mut Archive<W>, dir: &str, modules: &[PathBuf]) -> Result<()> {
    archive.dir(dir)?;
    for module in modules {
        let name =
            module.file_name().and_then(|name| name.to_str()).context("a module without a plain name")?;
        archive.file(&format!("{dir}/{name}"), 0o644, &read(module)?)?;
    }
    Ok(())
}

fn quote(word: &str) -> Result<String> {
    Ok(shlex::try_quote(word).with_context(|| format!("{word:?} cannot be passed to a shell"))?.into_owned())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
