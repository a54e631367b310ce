//! How much memory the control groups of this process leave it.
//!
//! Reads what cgroups(7), the kernel's `admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst` describe, and changes nothing.
//! A level that cannot be read, because it is outside of what is mounted here, counts as one without a limit.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A limit on memory that this process is under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryLimit {
    /// The folder of the group.
    pub group: PathBuf,
    /// Bytes that its processes may have together.
    pub limit_bytes: u64,
    /// Bytes of it that are free, or hold only what the kernel would drop first: cached files.
    pub room_bytes: u64,
}

/// Every limit on this process's memory, the closest first. Without any, nothing.
///
/// # Errors
/// Those of reading `/proc/self/cgroup` and `/proc/self/mountinfo`.
pub fn memory_limits() -> io::Result<Vec<MemoryLimit>> {
    let groups = fs::read_to_string("/proc/self/cgroup")?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(limits(&groups, &mounts))
}

/// What a hierarchy calls its files.
#[derive(Clone, Copy)]
struct Names {
    limit: &'static str,
    usage: &'static str,
    /// Rows of `memory.stat` whose sum the kernel can drop.
    cached: [&'static str; 2],
}

const V2: Names =
    Names { limit: "memory.max", usage: "memory.current", cached: ["inactive_file", "active_file"] };
const V1: Names = Names {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    cached: ["total_inactive_file", "total_active_file"],
};
/// Version 1 says "no limit" by the largest number of whole pages.
const V1_UNLIMITED: u64 = i64::MAX.cast_unsigned() / 4096 * 4096;

/// As [`memory_limits`], from the texts of the two files.
fn limits(groups: &str, mounts: &str) -> Vec<MemoryLimit> {
    let mut limits = Vec::new();
    for line in groups.lines() {
        // hierarchy:controllers:path
        let mut fields = line.splitn(3, ':');
        let (Some(hierarchy), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let (kind, names) = match (hierarchy, controllers) {
            ("0", "") => ("cgroup2", V2),
            (_, controllers) if controllers.split(',').any(|name| name == "memory") => ("cgroup", V1),
            _ => continue,
        };
        if let Some((folder, top)) = find_mounted(mounts, kind, path) {
            let levels = folder.ancestors().take_while(|level| level.starts_with(&top));
            limits.extend(levels.filter_map(|level| limit_of(level, names)));
        }
    }
    limits
}

/// The folder of group `path`, and the folder where the hierarchy is mounted.
fn find_mounted(mounts: &str, kind: &str, path: &str) -> Option<(PathBuf, PathBuf)> {
    mounts.lines().find_map(|line| {
        // id parent device root mount-point options optional-fields... - type source super-options
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3).map(unescape);
        let (root, top) = (mount.next()?, PathBuf::from(mount.next()?));
        let mut filesystem = filesystem.split(' ');
        let has_memory = || filesystem.clone().nth(2).is_some_and(|o| o.split(',').any(|o| o == "memory"));
        if filesystem.clone().next() != Some(kind) || kind == "cgroup" && !has_memory() {
            return None;
        }
        filesystem.next();
        let below = Path::new(path).strip_prefix(&root).ok()?;
        Some((top.join(below), top))
    })
}

/// Blanks and the like in paths are octal in mountinfo, see proc(5).
fn unescape(word: &str) -> String {
    let mut parts = word.split('\\');
    let mut path = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let escaped = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match escaped {
            Some(byte) => {
                path.push(byte.into());
                path.push_str(&part[3..]);
            }
            None => {
                path.push('\\');
                path.push_str(part);
            }
        }
    }
    path
}

fn limit_of(group: &Path, names: Names) -> Option<MemoryLimit> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    // "max" is no number.
    let limit_bytes = number(names.limit).filter(|&limit| limit < V1_UNLIMITED)?;
    let used = number(names.usage)?;
    let stat = read("memory.stat").unwrap_or_default();
    let row = |line: &str| {
        let (name, bytes) = line.split_once(' ')?;
        if names.cached.contains(&name) { bytes.parse::<u64>().ok() } else { None }
    };
    let cached: u64 = stat.lines().filter_map(row).sum();
    let room_bytes = limit_bytes.saturating_sub(used.saturating_sub(cached));
    Some(MemoryLimit { group: group.to_owned(), limit_bytes, room_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(folder: &Path, names: Names, [limit, usage]: [&str; 2], stat: &str) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join(names.limit), limit).unwrap();
        fs::write(folder.join(names.usage), usage).unwrap();
        fs::write(folder.join("memory.stat"), stat).unwrap();
    }

    fn mount(root: &str, top: &Path, kind: &str, options: &str) -> String {
        let top = top.display().to_string().replace(' ', "\\040");
        format!("32 31 0:29 {root} {top} rw,relatime shared:9 - {kind} {kind} {options}\n")
    }

    #[test]
    fn every_level_of_version_2_counts() {
        let folder = tempfile::tempdir().unwrap();
        let top = folder.path().join("with blanks");
        group(
            &top.join("a/b"),
            V2,
            ["1000\n", "900\n"],
            "anon 1\ninactive_file 30\nactive_file 20\nfile 999\n",
        );
        group(&top.join("a"), V2, ["max\n", "950\n"], "");
        // The top level has neither file.
        let mounts = mount("/", &top, "cgroup2", "rw");
        let found = limits("0::/a/b\n", &mounts);
        let group_of = |path: &str, limit_bytes, room_bytes| MemoryLimit {
            group: top.join(path),
            limit_bytes,
            room_bytes,
        };
        assert_eq!(found, [group_of("a/b", 1000, 150)]);
        group(&top.join("a"), V2, ["800\n", "950\n"], "");
        assert_eq!(limits("0::/a/b\n", &mounts), [group_of("a/b", 1000, 150), group_of("a", 800, 0)]);
        assert_eq!(limits("0::/elsewhere\n", &mounts), []);
    }

    #[test]
    fn version_1_has_other_names_beside_other_controllers() {
        let folder = tempfile::tempdir().unwrap();
        let top = folder.path().join("memory");
        let stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 100\ntotal_active_file 200\n";
        group(&top.join("docker/x"), V1, ["4096\n", "4000\n"], stat);
        group(&top, V1, ["9223372036854771712\n", "99\n"], "");
        let mounts = [
            mount("/", &folder.path().join("cpu"), "cgroup", "rw,cpu"),
            mount("/", &folder.path().join("unified"), "cgroup2", "rw"),
            mount("/", &top, "cgroup", "rw,memory"),
        ];
        let groups = "9:name=systemd:/\n4:memory:/docker/x\n3:cpu:/\n0::/\n";
        let found = limits(groups, &mounts.concat());
        assert_eq!(found, [MemoryLimit { group: top.join("docker/x"), limit_bytes: 4096, room_bytes: 396 }]);
    }

    #[test]
    fn a_group_that_is_mounted_as_the_root_is_found_there() {
        let folder = tempfile::tempdir().unwrap();
        group(&folder.path().join("inner"), V2, ["70", "10"], "");
        group(folder.path(), V2, ["50", "10"], "");
        let mounts = mount("/docker/1", folder.path(), "cgroup2", "rw");
        let room = |groups| limits(groups, &mounts).into_iter().map(|l| l.room_bytes).collect::<Vec<_>>();
        assert_eq!(room("0::/docker/1/inner\n"), [60, 40]);
        assert_eq!(room("0::/docker/1\n"), [40]);
        // Outside of what can be seen from here.
        assert_eq!(room("0::/../2\n"), [0; 0]);
    }

    #[test]
    fn what_is_malformed_is_no_limit() {
        let folder = tempfile::tempdir().unwrap();
        group(&folder.path().join("a"), V2, ["much", "10"], "");
        group(&folder.path().join("b"), V2, ["100", "few"], "");
        let mounts = mount("/", folder.path(), "cgroup2", "rw") + "garbage\n - \n1 2 3 4 - cgroup2\n";
        for groups in ["0::/a", "0::/b", "0::", "", "::", "0::/a\n0"] {
            assert_eq!(limits(groups, &mounts), [], "{groups}");
        }
        assert_eq!(unescape("a\\040b\\"), "a b\\");
    }

    #[test]
    fn the_own_limits_can_be_read() {
        // Whether there are any depends on where the test runs; a limit that is reached would have ended it.
        for limit in memory_limits().unwrap() {
            assert!(limit.group.is_dir() && limit.room_bytes <= limit.limit_bytes, "{limit:?}");
        }
    }
}
