//! `-drive` and `-blockdev`: images by their ids.
//!
//! QEMU's graph of block nodes has two storeys here: a node of driver `raw` upon one of driver `file`. Which option of
//! which of the two counts, and what one inherits from the other, follows QEMU's `block.c`.

use std::path::PathBuf;

use super::config::{Aio, Cache, DriveConfig};
use super::given::{Given, known};
use super::options::{id, of, path};

/// An image as `-drive` defines it.
#[derive(Debug)]
pub(super) struct Drive {
    pub(super) config: DriveConfig,
    /// The serial number of the disk, unless its device has one.
    pub(super) serial: Option<String>,
    /// It comes with a device (`if=virtio`).
    pub(super) has_device: bool,
}

/// A node as `-blockdev` defines it.
#[derive(Debug)]
pub(super) struct Node {
    name: String,
    read_only: bool,
    discard: bool,
    kind: NodeKind,
}

#[derive(Debug)]
enum NodeKind {
    File(FileNode),
    /// Upon a node of its own.
    Raw(FileNode),
    /// Upon a node of another name.
    RawUpon {
        below: String,
        cache: Cache,
    },
}

#[derive(Debug)]
struct FileNode {
    path: PathBuf,
    cache: Cache,
    locking: bool,
    aio: Aio,
    discard: bool,
}

/// What may be named by `drive=`.
#[derive(Debug)]
pub(super) enum Block {
    Drive(Drive),
    Node(Node),
}

impl Block {
    pub(super) fn id(&self) -> &str {
        match self {
            Block::Drive(drive) => &drive.config.id,
            Block::Node(node) => &node.name,
        }
    }
}

const DISCARD: &[(&str, bool)] = &[("ignore", false), ("off", false), ("unmap", true), ("on", true)];
const LOCKING: &[(&str, bool)] = &[("auto", true), ("on", true), ("off", false)];
const AIO: &[(&str, Aio)] = &[("threads", Aio::Threads), ("io_uring", Aio::IoUring)];

/// Understands a `-drive`; `next_id` names one that has no id, and comes with a device.
pub(super) fn drive(mut given: Given, next_id: impl FnOnce() -> String) -> Result<Drive, String> {
    let has_device = given.choice("if", &[("none", false), ("virtio", true)])?.unwrap_or(true);
    let id = match given.id()? {
        Some(id) => id,
        None if has_device => next_id(),
        None => return Err("property 'id' is missing: with if=none a -device names the drive by it".into()),
    };
    let within = |reason: String| format!("drive '{id}': {reason}");
    let file = given.required("file").map_err(within)?;
    let path = of("file", image(&file)).map_err(within)?;
    drive_rest(given, id.clone(), path, has_device).map_err(within)
}

fn drive_rest(mut given: Given, id: String, path: PathBuf, has_device: bool) -> Result<Drive, String> {
    check_format(given.text("driver").or(given.text("format")))?;
    given.only("media", &["disk"])?;
    given.only("snapshot", &["off"])?;
    given.only("detect-zeroes", &["off"])?;
    given.only("werror", &["report"])?;
    given.only("rerror", &["report"])?;
    let read_only = match given.switch("readonly")? {
        Some(state) => given.switch("read-only")?.unwrap_or(state),
        None => given.switch("read-only")?.unwrap_or(false),
    };
    let cache = drive_cache(&mut given)?;
    let config = DriveConfig {
        id,
        path,
        read_only,
        cache,
        discard: given.choice("discard", DISCARD)?.unwrap_or(false),
        locking: given.choice("file.locking", LOCKING)?.unwrap_or(true),
        share_rw: false,
        aio: aio(&mut given, "aio")?,
    };
    let serial = given.text("serial");
    given.finish();
    Ok(Drive { config, serial, has_device })
}

/// `cache=`, and its parts.
fn drive_cache(given: &mut Given) -> Result<Cache, String> {
    let cache = match given.text("cache").as_deref() {
        None | Some("writeback") => Cache::Writeback,
        Some("writethrough") => Cache::Writethrough,
        Some("unsafe") => Cache::Unsafe,
        Some(direct @ ("none" | "directsync")) => {
            let like = if direct == "none" { "writeback" } else { "writethrough" };
            return Err(format!(
                "property 'cache': '{direct}' is not supported: images go through the page cache; say cache={like}"
            ));
        }
        Some(other) => {
            return Err(format!(
                "property 'cache': '{other}' is not supported (supported: writeback, writethrough, unsafe)"
            ));
        }
    };
    check_direct(given, "cache.direct")?;
    let no_flush = given.switch("cache.no-flush")?.unwrap_or(cache == Cache::Unsafe);
    let writeback = given.switch("cache.writeback")?.unwrap_or(cache != Cache::Writethrough);
    match (no_flush, writeback) {
        (true, true) => Ok(Cache::Unsafe),
        (true, false) => Err("cache.no-flush=on and cache.writeback=off exclude each other".into()),
        (false, true) => Ok(Cache::Writeback),
        (false, false) => Ok(Cache::Writethrough),
    }
}

fn check_direct(given: &mut Given, key: &str) -> Result<(), String> {
    match given.switch(key)? {
        Some(true) => Err(format!(
            "property '{key}': on is not supported: images go through the page cache; leave it out"
        )),
        _ => Ok(()),
    }
}

/// A file on the host. What QEMU would take for another protocol is refused.
fn image(file: &str) -> Result<PathBuf, String> {
    if let Some(literally) = file.strip_prefix("file:") {
        return path(literally);
    }
    match file.split_once(':') {
        Some((protocol, _)) if !protocol.contains('/') && !protocol.is_empty() => Err(format!(
            "'{file}': protocol '{protocol}' is not supported (supported: files; file:{file} is the file of that name)"
        )),
        _ => path(file),
    }
}

/// Images are never probed: a guest could write itself another format.
fn check_format(format: Option<String>) -> Result<(), String> {
    match format.as_deref() {
        Some("raw") => Ok(()),
        Some(other) => Err(format!(
            "format '{other}' is not supported (supported: raw; 'qemu-img convert -O raw' makes one)"
        )),
        None => Err("property 'format' is missing: images are not probed; say format=raw".into()),
    }
}

fn aio(given: &mut Given, key: &str) -> Result<Aio, String> {
    given.choice(key, AIO).map(Option::unwrap_or_default)
}

/// Understands a `-blockdev`.
pub(super) fn blockdev(mut given: Given) -> Result<Node, String> {
    let driver = given.required("driver")?;
    let name =
        id(&given.required("node-name")?).map_err(|reason| format!("property 'node-name': {reason}"))?;
    node(given, &driver, name.clone()).map_err(|reason| format!("node '{name}': {reason}"))
}

fn node(mut given: Given, driver: &str, name: String) -> Result<Node, String> {
    given.only("detect-zeroes", &["off"])?;
    given.only("file.detect-zeroes", &["off"])?;
    // Here a node that may be opened either way is opened as it was asked for.
    given.only("auto-read-only", &["off"])?;
    given.switch("file.auto-read-only")?;
    let read_only = given.switch("read-only")?.unwrap_or(false);
    let discard = given.choice("discard", DISCARD)?;
    let cache = cache(&mut given, "", Cache::default())?;
    let (kind, discard) = match driver {
        "file" => {
            refuse(&given, driver, &["file", "file.driver", "file.filename"])?;
            let discard = discard.unwrap_or(false);
            (NodeKind::File(file_node(&mut given, "", cache, discard)?), discard)
        }
        "raw" => {
            refuse(&given, driver, &["filename", "locking", "aio"])?;
            // As in QEMU, what is below passes on what is above, unless it says otherwise.
            let kind = match given.text("file") {
                Some(below) => {
                    refuse(&given, "raw with file=NODE", &["file.driver", "file.filename"])?;
                    NodeKind::RawUpon { below, cache }
                }
                None => {
                    given
                        .choice("file.driver", &[("file", ())])?
                        .ok_or("property 'file.driver' is missing")?;
                    if given.switch("file.read-only")?.is_some_and(|below| below != read_only) {
                        return Err("properties 'read-only' and 'file.read-only' differ".into());
                    }
                    let below = given.choice("file.discard", DISCARD)?.unwrap_or(true);
                    let cache = self::cache(&mut given, "file.", cache)?;
                    NodeKind::Raw(file_node(&mut given, "file.", cache, below)?)
                }
            };
            (kind, discard.unwrap_or(false))
        }
        other => {
            return Err(format!(
                "driver '{other}' is not supported (supported: raw, file; 'qemu-img convert -O raw' makes an image raw)"
            ));
        }
    };
    match given.left() {
        Some(left) => Err(format!("property '{left}' does not belong to this driver and its file")),
        None => Ok(Node { name, read_only, discard, kind }),
    }
}

fn refuse(given: &Given, driver: &str, keys: &[&str]) -> Result<(), String> {
    match keys.iter().find(|key| given.has(key)) {
        Some(key) => Err(format!("driver {driver}: unknown property '{key}'")),
        None => Ok(()),
    }
}

fn cache(given: &mut Given, prefix: &str, default: Cache) -> Result<Cache, String> {
    check_direct(given, &format!("{prefix}cache.direct"))?;
    Ok(match given.switch(&format!("{prefix}cache.no-flush"))? {
        None => default,
        Some(true) => Cache::Unsafe,
        Some(false) => Cache::Writeback,
    })
}

fn file_node(given: &mut Given, prefix: &str, cache: Cache, discard: bool) -> Result<FileNode, String> {
    let filename = format!("{prefix}filename");
    let path = given.path(&filename)?.ok_or_else(|| format!("property '{filename}' is missing"))?;
    let locking = given.choice(&format!("{prefix}locking"), LOCKING)?.unwrap_or(true);
    let aio = aio(given, &format!("{prefix}aio"))?;
    Ok(FileNode { path, cache, locking, aio, discard })
}

/// The images that were defined, and who uses them.
#[derive(Debug, Default)]
pub(super) struct Blocks(Vec<Entry>);

#[derive(Debug)]
struct Entry {
    block: Block,
    /// How messages call what uses it.
    user: Option<String>,
}

/// What a device finds by `drive=`.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) drive: DriveConfig,
    pub(super) serial: Option<String>,
}

impl Blocks {
    /// Adds an image whose id must be new.
    pub(super) fn add(&mut self, block: Block) -> Result<(), String> {
        if self.0.iter().any(|other| other.block.id() == block.id()) {
            return Err(format!("id '{}' is taken by another -drive or -blockdev", block.id()));
        }
        self.0.push(Entry { block, user: None });
        Ok(())
    }

    /// An id for the drive that comes with a device, as QEMU numbers them.
    pub(super) fn next_id(&self) -> String {
        let is_taken = |id: &String| self.0.iter().any(|other| other.block.id() == *id);
        (0..).map(|index| format!("virtio{index}")).find(|id| !is_taken(id)).unwrap_or_default()
    }

    /// What `user` finds under this id; nobody else may use it from now on.
    pub(super) fn take(&mut self, id: &str, user: &str) -> Result<Found, String> {
        let at = self.position(id).ok_or_else(|| {
            format!("unknown drive '{id}' (known: {})", known(self.0.iter().map(|entry| entry.block.id())))
        })?;
        self.use_by(at, user)?;
        match &self.0[at].block {
            Block::Drive(drive) => Ok(Found { drive: drive.config.clone(), serial: drive.serial.clone() }),
            Block::Node(_) => {
                let drive = self.whole(at, user)?;
                Ok(Found { drive, serial: None })
            }
        }
    }

    fn position(&self, id: &str) -> Option<usize> {
        self.0.iter().position(|entry| entry.block.id() == id)
    }

    fn use_by(&mut self, at: usize, user: &str) -> Result<(), String> {
        let Entry { block, user: taken_by } = &mut self.0[at];
        match taken_by {
            Some(other) => Err(format!("drive '{}' is in use by {other} already", block.id())),
            None => {
                *taken_by = Some(user.to_owned());
                Ok(())
            }
        }
    }

    /// A node together with what is below it.
    fn whole(&mut self, at: usize, user: &str) -> Result<DriveConfig, String> {
        let Block::Node(node) = &self.0[at].block else { return Err("is no node".into()) };
        let (name, read_only, discard) = (node.name.clone(), node.read_only, node.discard);
        let (below, cache) = match &node.kind {
            NodeKind::File(file) | NodeKind::Raw(file) => {
                return Ok(image_of(name, file, read_only, discard));
            }
            NodeKind::RawUpon { below, cache } => (below.clone(), *cache),
        };
        let names = known(self.0.iter().map(|entry| entry.block.id()).filter(|other| *other != name));
        let at = self
            .position(&below)
            .filter(|&below| below != at)
            .ok_or_else(|| format!("node '{name}': unknown node '{below}' (known: {names})"))?;
        self.use_by(at, user)?;
        match &self.0[at].block {
            Block::Node(Node { kind: NodeKind::File(file), read_only: below_read_only, .. }) => {
                if *below_read_only && !read_only {
                    return Err(format!(
                        "node '{name}' is to be written, but its file '{below}' is read-only; say read-only=on for both"
                    ));
                }
                // In QEMU, it is the file that is flushed or not.
                if cache == Cache::Unsafe && file.cache != Cache::Unsafe {
                    return Err(format!(
                        "node '{name}': cache.no-flush=on is in vain, as its file '{below}' is flushed; say \
                         cache.no-flush=on for both"
                    ));
                }
                Ok(image_of(name, file, read_only, discard))
            }
            _ => Err(format!("node '{name}': '{below}' is no node of driver file")),
        }
    }

    /// The ids that nothing uses.
    pub(super) fn unused(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter(|entry| entry.user.is_none()).map(|entry| entry.block.id())
    }
}

fn image_of(id: String, file: &FileNode, read_only: bool, discard: bool) -> DriveConfig {
    DriveConfig {
        id,
        path: file.path.clone(),
        read_only,
        cache: file.cache,
        discard: discard && file.discard,
        locking: file.locking,
        share_rw: false,
        aio: file.aio,
    }
}
