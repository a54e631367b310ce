//! What the tasks share: cargo started the same way everywhere, and colour only for people.

use std::ffi::OsString;
use std::fmt::Display;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::lab;

/// The root of the workspace.
pub(crate) fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}

/// The cargo that started us, in the root of the workspace.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command.current_dir(workspace());
    command
}

/// Says what is run, runs it on our terminal, and tells whether it went well.
pub(crate) fn run(command: &mut Command) -> Result<bool> {
    let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
    let variables: String = command
        .get_envs()
        .filter_map(|(name, value)| Some(format!("{}={:?} ", name.to_str()?, value?.to_str()?)))
        .collect();
    eprintln!("{}", Paint::stderr().bold(format!("$ {variables}cargo {}", words.join(" "))));
    let status = command.status().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    Ok(status.success())
}

/// Builds the release binary of `cpr-vmm` with cargo's progress on the terminal, and tells its path.
pub(crate) fn release_binary() -> Result<PathBuf> {
    let built = run(cargo().args(["build", "--release", "-p", "vmm", "--bin", "cpr-vmm"]))?;
    anyhow::ensure!(built, "the release build failed; see cargo's messages above");
    lab::release_program("vmm", "cpr-vmm")
}

/// Why KVM cannot be used here, with what to do about it; `None` if it can.
pub(crate) fn kvm_obstacle() -> Option<String> {
    const NODE: &str = "/dev/kvm";
    let error = match std::fs::OpenOptions::new().read(true).write(true).open(NODE) {
        Ok(_) => return None,
        Err(error) => error,
    };
    let advice = match error.kind() {
        std::io::ErrorKind::NotFound => {
            "This host offers no KVM. On bare metal: enable virtualisation (VT-x, AMD-V) in the firmware and run\n  \
             `modprobe kvm_intel` or `modprobe kvm_amd`. In a virtual machine: enable nested virtualisation for it.\n  \
             In a container: pass the device in (`--device /dev/kvm`)."
        }
        std::io::ErrorKind::PermissionDenied => {
            "This user may not open it. Join its group with `sudo usermod -aG kvm $USER` and log in again, or run\n  \
             as root. In a container: pass the device in with read and write access."
        }
        _ => "The device is there but does not open; `dmesg | grep -i kvm` may tell why.",
    };
    Some(format!("{NODE}: {error}\n  {advice}"))
}

/// Colours for one stream: none if it is no terminal, or nobody wants them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paint {
    on: bool,
}

impl Paint {
    /// For standard output.
    pub(crate) fn stdout() -> Paint {
        Paint::new(&std::io::stdout())
    }

    /// For standard error.
    pub(crate) fn stderr() -> Paint {
        Paint::new(&std::io::stderr())
    }

    /// For text that is compared.
    #[cfg(test)]
    pub(crate) fn none() -> Paint {
        Paint { on: false }
    }

    fn new(stream: &impl IsTerminal) -> Paint {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            && std::env::var_os("TERM").is_some_and(|term| term != "dumb");
        Paint { on: wanted && stream.is_terminal() }
    }

    /// For titles.
    pub(crate) fn bold(self, text: impl Display) -> String {
        self.wrap("1", text)
    }

    /// For what matters less.
    pub(crate) fn dim(self, text: impl Display) -> String {
        self.wrap("2", text)
    }

    /// For what is as it should be.
    pub(crate) fn green(self, text: impl Display) -> String {
        self.wrap("32", text)
    }

    /// For what is not.
    pub(crate) fn red(self, text: impl Display) -> String {
        self.wrap("31", text)
    }

    fn wrap(self, code: &str, text: impl Display) -> String {
        if self.on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }
}

/// A duration as milliseconds with two decimals.
pub(crate) fn ms(duration: std::time::Duration) -> String {
    format!("{:.2}", duration.as_secs_f64() * 1e3)
}
