//! What figures depend on: the processor, the kernel, and who else is at work. No name that tells which machine it is.

use std::fs;

/// The machine that measures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Host {
    /// The processor's name as the kernel has it.
    pub(super) cpu: String,
    pub(super) cpus: usize,
    pub(super) memory_gib: u64,
    /// The kernel's release.
    pub(super) kernel: String,
    /// The module behind `/dev/kvm`, such as `kvm_intel`.
    pub(super) kvm: String,
}

impl Host {
    pub(super) fn look() -> Host {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpu = field(&read("/proc/cpuinfo"), "model name").unwrap_or("unknown").to_owned();
        let kvm = ["kvm_intel", "kvm_amd", "kvm_pvm"].into_iter();
        let kvm = kvm.filter(|module| fs::exists(format!("/sys/module/{module}")).unwrap_or(false));
        Host {
            cpu,
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_gib: (kib(&read("/proc/meminfo"), "MemTotal") + (1 << 19)) >> 20,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            kvm: Some(kvm.collect::<Vec<_>>().join(", "))
                .filter(|names| !names.is_empty())
                .unwrap_or("kvm".into()),
        }
    }
}

/// Memory that programs can still get, in bytes.
pub(super) fn available_bytes() -> u64 {
    kib(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemAvailable") << 10
}

/// The value of the first `key: value` line.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim())
    })
}

fn kib(meminfo: &str, key: &str) -> u64 {
    field(meminfo, key).and_then(|value| value.strip_suffix("kB")?.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_proc() {
        let meminfo = "MemTotal:       24000000 kB\nMemFree:          100 kB\nMemAvailable:     2048 kB\n";
        assert_eq!(kib(meminfo, "MemAvailable"), 2048);
        assert_eq!(kib(meminfo, "Swap"), 0);
        let cpuinfo = "processor\t: 0\nmodel name\t: Some CPU @ 2.70GHz\nmodel name\t: other\n";
        assert_eq!(field(cpuinfo, "model name"), Some("Some CPU @ 2.70GHz"));
    }
}
