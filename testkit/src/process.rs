//! What the kernel tells of a process, in the form that tests compare: before and after an update, a failure, the end.
//!
//! The truth is proc(5). Everything here looks from outside and changes nothing but [`send_signal`].

use std::fs;
use std::io;
use std::path::Path;

use oslib::pidfd::PidFd;

/// SIGHUP.
pub const SIGHUP: i32 = 1;
/// SIGINT.
pub const SIGINT: i32 = 2;
/// SIGTERM.
pub const SIGTERM: i32 = 15;
/// SIGCONT.
pub const SIGCONT: i32 = 18;
/// SIGSTOP.
pub const SIGSTOP: i32 = 19;

/// What a process holds, counted. Take both of the two that are compared at the same phase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census {
    /// What the open descriptors lead to, sorted: one entry per descriptor.
    pub descriptors: Vec<String>,
    /// Thread names, sorted, without those that KVM adds (`kvm-*`).
    pub threads: Vec<String>,
    /// Memory mappings.
    pub mappings: usize,
    /// Size of the address space, KiB.
    pub size_kib: u64,
    /// Resident anonymous memory, KiB.
    pub anonymous_kib: u64,
    /// All resident memory, guest RAM included, KiB.
    pub resident_kib: u64,
}

impl Census {
    /// Counts what process `pid` holds now.
    ///
    /// # Errors
    /// It is gone.
    pub fn of(pid: u32) -> anyhow::Result<Census> {
        let mut descriptors = Vec::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            // One that was closed meanwhile is not counted.
            if let Ok(target) = fs::read_link(entry?.path()) {
                descriptors.push(target.to_string_lossy().into_owned());
            }
        }
        descriptors.sort_unstable();
        let mut threads = oslib::process::thread_names(pid)?;
        threads.retain(|name| !name.starts_with("kvm-"));
        threads.sort_unstable();
        let kib = |key| {
            let value = status_field(pid, key)?;
            let number = value.split_ascii_whitespace().next().and_then(|kib| kib.parse().ok());
            number.ok_or_else(|| io::Error::other(format!("{key}: {value}")))
        };
        Ok(Census {
            descriptors,
            threads,
            mappings: fs::read_to_string(format!("/proc/{pid}/maps"))?.lines().count(),
            size_kib: kib("VmSize")?,
            anonymous_kib: kib("RssAnon")?,
            resident_kib: kib("VmRSS")?,
        })
    }

    /// Checks that nothing has piled up since `before`. Descriptors and threads must be the same; of memory, where
    /// address space layout and per-CPU counters add noise, `slack_kib` and four mappings are forgiven.
    ///
    /// # Errors
    /// Tells what there is more, or less.
    pub fn check_against(&self, before: &Census, slack_kib: u64) -> anyhow::Result<()> {
        anyhow::ensure!(self.descriptors == before.descriptors, "descriptors: {before:#?} -> {self:#?}");
        anyhow::ensure!(self.threads == before.threads, "threads: {before:#?} -> {self:#?}");
        anyhow::ensure!(self.mappings <= before.mappings + 4, "mappings: {before:#?} -> {self:#?}");
        for (what, now, then) in [
            ("address space", self.size_kib, before.size_kib),
            ("anonymous memory", self.anonymous_kib, before.anonymous_kib),
            ("resident memory", self.resident_kib, before.resident_kib),
        ] {
            anyhow::ensure!(now <= then + slack_kib, "{what}: {then} -> {now} KiB");
        }
        Ok(())
    }
}

/// A field of `/proc/PID/status`, such as `SigBlk`.
///
/// # Errors
/// There is no such process, or no such field.
pub fn status_field(pid: u32, key: &str) -> io::Result<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let value = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    value.map(|value| value.trim().to_owned()).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// When the process was started, in clock ticks since boot. Together with the pid it tells one process from any other.
///
/// # Errors
/// There is no such process.
pub fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, field 2, is in parentheses and may hold anything; start time is field 22.
    let after_name = stat.rsplit_once(')').map(|(_, rest)| rest);
    let field = after_name.and_then(|rest| rest.split_ascii_whitespace().nth(19)?.parse().ok());
    field.ok_or_else(|| io::Error::other(stat))
}

/// The namespaces that the process is in, as the kernel names them.
///
/// # Errors
/// There is no such process.
pub fn namespaces(pid: u32) -> io::Result<Vec<String>> {
    let mut links = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/ns"))? {
        links.push(fs::read_link(entry?.path())?.to_string_lossy().into_owned());
    }
    links.sort_unstable();
    Ok(links)
}

/// Where the process is in the cgroup hierarchies.
///
/// # Errors
/// There is no such process.
pub fn cgroups(pid: u32) -> io::Result<String> {
    fs::read_to_string(format!("/proc/{pid}/cgroup"))
}

/// Children of the process that nobody has waited for yet, zombies included.
///
/// # Errors
/// There is no such process.
pub fn children(pid: u32) -> io::Result<Vec<u32>> {
    let mut children = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let list = fs::read_to_string(thread?.path().join("children")).unwrap_or_default();
        children.extend(list.split_ascii_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    Ok(children)
}

/// Processes whose working directory is `folder`: all that a VM left behind, as each has a folder of its own.
pub fn processes_in(folder: &Path) -> Vec<u32> {
    let (Ok(entries), Ok(folder)) = (fs::read_dir("/proc"), folder.canonicalize()) else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid: &u32| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == folder))
        .collect()
}

/// Sends `signal` to the process.
///
/// # Errors
/// There is no such process.
pub fn send_signal(pid: u32, signal: i32) -> io::Result<()> {
    PidFd::open(pid)?.send_signal(signal)
}
