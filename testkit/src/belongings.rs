//! What belongs to a guest, looked at byte by byte: before something that must leave it alone, and after.
//!
//! Descriptors are copied out of the process that has them (pidfd_getfd(2)). A copy is the same open file, so that a look
//! finds what any holder did to it, whoever that is by then: its offset, its flags, its content, what is unread in it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt};

use anyhow::{Context, ensure};
use nix::sys::socket::{MsgFlags, recv};
use oslib::pidfd::PidFd;

/// Open files that a guest depends on.
#[derive(Debug, Default)]
pub struct Belongings {
    held: BTreeMap<String, OwnedFd>,
}

/// What [`Belongings`] were like at one moment: facts by name, for each by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Look(BTreeMap<String, BTreeMap<&'static str, String>>);

impl Belongings {
    /// The memory, files and sockets of process `pid`, without its standard streams and without what is its own, such as
    /// KVM's objects and event queues.
    ///
    /// # Errors
    /// The process is gone, or may not be looked at.
    pub fn of(pid: u32) -> anyhow::Result<Belongings> {
        let process = PidFd::open(pid)?;
        let mut belongings = Belongings::default();
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let entry = entry?;
            let number: i32 = entry.file_name().to_string_lossy().parse()?;
            let target = fs::read_link(entry.path())?.to_string_lossy().into_owned();
            let is_file = target.starts_with('/') && !target.starts_with("/dev/");
            if number > 2 && (is_file || target.starts_with("socket:")) {
                belongings.add(&format!("{number} {target}"), process.copy_descriptor(number)?);
            }
        }
        ensure!(!belongings.held.is_empty(), "process {pid} has nothing");
        Ok(belongings)
    }

    /// Adds one of which the caller has a descriptor.
    pub fn add(&mut self, name: &str, fd: OwnedFd) {
        self.held.insert(name.to_owned(), fd);
    }

    /// What they are like now.
    ///
    /// # Errors
    /// One cannot be looked at.
    pub fn look(&self) -> anyhow::Result<Look> {
        let look = |(name, fd): (&String, &OwnedFd)| Ok((name.clone(), facts(fd).context(name.clone())?));
        Ok(Look(self.held.iter().map(look).collect::<anyhow::Result<_>>()?))
    }
}

impl Look {
    /// What is different `now`, one line each.
    pub fn differences(&self, now: &Look) -> Vec<String> {
        let mut differences = Vec::new();
        for (name, before) in &self.0 {
            for (fact, before) in before {
                let now = now.0.get(name).and_then(|facts| facts.get(fact));
                if now != Some(before) {
                    let now = now.map_or("nothing", String::as_str);
                    differences.push(format!("{name}: {fact} was {before}, is {now}"));
                }
            }
        }
        differences
    }

    /// Their names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// What was not read of the socket whose name contains `name`, in bytes.
    pub fn unread(&self, name: &str) -> Option<usize> {
        let (_, facts) = self.0.iter().find(|(key, _)| key.contains(name))?;
        facts.get("unread")?.split(' ').next()?.parse().ok()
    }

    /// The most bytes that were not read of any socket.
    pub fn most_unread(&self) -> usize {
        self.0.keys().filter_map(|name| self.unread(name)).max().unwrap_or(0)
    }
}

/// Close-on-exec in `flags:` of proc_pid_fdinfo(5): it belongs to a descriptor, not to the open file.
const O_CLOEXEC: u32 = 0o200_0000;

fn facts(fd: &OwnedFd) -> anyhow::Result<BTreeMap<&'static str, String>> {
    let mut facts = BTreeMap::new();
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    for (key, value) in info.lines().filter_map(|line| line.split_once(':')) {
        let value = value.trim();
        match key {
            "pos" => drop(facts.insert("offset", value.to_owned())),
            "flags" => {
                let flags = u32::from_str_radix(value, 8)? & !O_CLOEXEC;
                facts.insert("flags", format!("{flags:#o}"));
            }
            "eventfd-count" => drop(facts.insert("count", value.to_owned())),
            _ => {}
        }
    }
    let file = File::from(fd.try_clone()?);
    let kind = file.metadata()?;
    if kind.is_file() {
        facts.insert("size", kind.len().to_string());
        facts.insert("content", hash_of(&file)?);
    } else if kind.file_type().is_socket() {
        if let Some(unread) = peek(fd) {
            facts.insert("unread", format!("{} bytes, {}", unread.len(), hash(&unread)));
        }
    } else if oslib::term::is_tty(fd.as_fd()) {
        facts.insert("terminal", format!("{:?}", oslib::term::get(fd.as_fd())?));
    }
    Ok(facts)
}

/// What is not read yet; `None` for a listener.
fn peek(fd: &OwnedFd) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 1 << 20];
    match recv(fd.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Ok(count) => bytes.truncate(count),
        Err(nix::errno::Errno::EAGAIN) => bytes.clear(),
        Err(_) => return None,
    }
    Some(bytes)
}

fn hash(bytes: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    format!("{:016x}", hasher.finish())
}

fn hash_of(file: &File) -> anyhow::Result<String> {
    let (mut hasher, mut at, mut buffer) = (DefaultHasher::new(), 0, vec![0; 1 << 20]);
    loop {
        let count = file.read_at(&mut buffer, at)?;
        if count == 0 {
            return Ok(format!("{:016x}", hasher.finish()));
        }
        hasher.write(&buffer[..count]);
        at += count as u64;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::unix::net::UnixStream;

    use oslib::eventfd::EventFd;
    use oslib::memfd::Memfd;

    use super::*;

    /// Everything that a target could touch, and the copies that are looked at.
    struct Scene {
        ram: File,
        socket: UnixStream,
        event: EventFd,
        terminal: OwnedFd,
        belongings: Belongings,
        _others: (UnixStream, OwnedFd),
    }

    fn scene() -> Scene {
        let ram = File::from(Memfd::new("ram").create().unwrap());
        ram.set_len(1 << 20).unwrap();
        let (socket, mut peer) = UnixStream::pair().unwrap();
        peer.write_all(b"unread").unwrap();
        let event = EventFd::new().unwrap();
        event.signal().unwrap();
        let (master, terminal) = oslib::term::openpty().unwrap();
        let mut belongings = Belongings::default();
        let process = PidFd::of_self().unwrap();
        for (name, number) in [
            ("ram", ram.as_raw_fd()),
            ("socket", socket.as_raw_fd()),
            ("event", event.as_fd().as_raw_fd()),
            ("terminal", terminal.as_raw_fd()),
        ] {
            belongings.add(name, process.copy_descriptor(number).unwrap());
        }
        Scene { ram, socket, event, terminal, belongings, _others: (peer, master) }
    }

    #[test]
    fn nothing_is_different_without_a_change() {
        let scene = scene();
        let before = scene.belongings.look().unwrap();
        assert_eq!(before.unread("socket"), Some(6));
        let none: [&str; 0] = [];
        assert_eq!(before.differences(&scene.belongings.look().unwrap()), none);
    }

    #[test]
    fn the_least_change_is_noticed() {
        type Change = fn(&mut Scene);
        let changes: [(&str, Change); 8] = [
            ("ram: content", |scene| assert_eq!(scene.ram.write_at(&[1], 0x8_1234).unwrap(), 1)),
            ("ram: size", |scene| scene.ram.set_len((1 << 20) + 1).unwrap()),
            ("ram: offset", |scene| assert_eq!(scene.ram.seek(SeekFrom::Start(1)).unwrap(), 1)),
            ("socket: unread", |scene| scene.socket.read_exact(&mut [0]).unwrap()),
            ("socket: unread", |scene| scene._others.0.write_all(b"!").unwrap()),
            ("socket: flags", |scene| scene.socket.set_nonblocking(true).unwrap()),
            ("event: count", |scene| assert_eq!(scene.event.drain().unwrap(), 1)),
            ("terminal: terminal", |scene| {
                let raw = oslib::term::get(&scene.terminal).unwrap().make_raw(true);
                oslib::term::set(&scene.terminal, &raw).unwrap();
            }),
        ];
        for (expected, change) in changes {
            let mut scene = scene();
            let before = scene.belongings.look().unwrap();
            change(&mut scene);
            let differences = before.differences(&scene.belongings.look().unwrap());
            assert!(differences.iter().any(|line| line.starts_with(expected)), "{expected}: {differences:?}");
        }
    }

    #[test]
    fn a_process_has_its_memory_and_sockets_here() {
        let scene = scene();
        let belongings = Belongings::of(std::process::id()).unwrap();
        let names: Vec<_> = belongings.held.keys().filter(|name| name.contains("/memfd:ram")).collect();
        assert!(!names.is_empty(), "{belongings:?}");
        assert!(belongings.look().unwrap().most_unread() >= 6);
        drop(scene);
    }
}
