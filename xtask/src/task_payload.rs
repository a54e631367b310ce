//! `cargo xtask payload`: the built-in guest as a stand-alone file.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use vmm_core::payload;

/// Arguments of `cargo xtask payload`.
#[derive(Debug, Args)]
pub(crate) struct PayloadArgs {
    /// Where to write it
    #[arg(default_value = "target/payload.elf")]
    path: PathBuf,
}

/// Writes the payload and says how other VMMs boot it.
pub(crate) fn payload(arguments: &PayloadArgs) -> Result<bool> {
    let path = &arguments.path;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    std::fs::write(path, payload::ELF).with_context(|| format!("cannot write {}", path.display()))?;
    let size = payload::ELF.len();
    let path = path.display();
    println!("{path}: PVH ELF, {size} bytes: the guest that cpr-vmm boots without -kernel");
    println!();
    println!("QEMU boots it, too:");
    println!("  qemu-system-x86_64 -machine microvm -accel kvm -cpu host -m 256M -smp 2 \\");
    println!("    -nodefaults -no-user-config -display none -serial stdio -kernel {path} -append cpus=2");
    println!();
    println!(
        "It prints `cpr payload: 2 vcpus` on COM1, then beats until it is ended. What it measures stands at \
         guest-physical {:#x}; vmm-core/payload/README.md tells the words.",
        payload::MAILBOX_GPA
    );
    Ok(true)
}
