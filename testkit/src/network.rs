//! A network of a test's own, in which taps can have any name, and that vanishes with the last process that is in it.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use nix::sched::{CloneFlags, unshare};

use crate::{PATIENCE, wait_for};

/// Where taps come from.
const TAPS: &str = "/dev/net/tun";

/// Has the calling thread in a network namespace of its own, and every process that it starts from now on.
///
/// # Errors
/// Why that, or a tap, cannot be had here.
pub fn enter_own() -> Result<(), String> {
    if !Path::new(TAPS).exists() {
        return Err(format!("there is no {TAPS}"));
    }
    if Command::new("ip").arg("-V").output().is_err() {
        return Err("there is no program 'ip'".into());
    }
    unshare(CloneFlags::CLONE_NEWNET).map_err(|error| format!("no network namespace: {error}"))
}

/// Runs ip(8) with these words, and gives what it prints.
///
/// # Errors
/// It fails.
pub fn ip(line: &str) -> anyhow::Result<String> {
    let output = Command::new("ip").args(line.split(' ')).output()?;
    ensure!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// What happens to the links of the network, as `ip monitor link` tells it.
pub struct Links {
    monitor: Child,
    told: tempfile::NamedTempFile,
}

impl Links {
    /// Watches from now on.
    ///
    /// # Errors
    /// `ip` cannot be started, or hears of nothing: `link` is one whose MTU it may change to find that out.
    pub fn watch(link: &str) -> anyhow::Result<Links> {
        let told = tempfile::NamedTempFile::new()?;
        let monitor = Command::new("ip")
            .args(["monitor", "link"])
            .stdout(Stdio::from(told.reopen()?))
            .spawn()
            .context("ip monitor")?;
        let links = Links { monitor, told };
        let resize = |bytes: u32| ip(&format!("link set dev {link} mtu {bytes}"));
        // Some time after it was started it listens.
        let mut bytes = 1300;
        wait_for("a word of ip monitor", PATIENCE, || {
            bytes += 1;
            resize(bytes).ok()?;
            std::thread::sleep(Duration::from_millis(20));
            links.told().ok().filter(|told| told.contains(&format!("mtu {bytes}")))
        })?;
        links.told.as_file().set_len(0)?;
        Ok(links)
    }

    /// What it has told so far.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn told(&self) -> anyhow::Result<String> {
        // A file that was cut off begins with zeros once more is written.
        Ok(std::fs::read_to_string(self.told.path())?.replace('\0', ""))
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
    }
}
