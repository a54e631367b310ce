//! Where the lab's builds and the logs of its runs live: under the user's cache folder, never in the repository.
//!
//! ```text
//! ~/.cache/cpr-vmm/lab/
//!   lock           exclusive while a build is made, shared while one is used
//!   <recipe key>/  one finished build; it appears by rename, so that it is whole or absent
//!   tmp-*/         a build in the making; a leftover of an interrupted one is swept by the next
//!   build.log      what the programs of the last build said
//!   runs/<n>/      logs of the last runs, see `machine`
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// How many runs keep their logs.
const RUNS_KEPT: usize = 10;

/// The cache folder of the lab.
pub(super) struct Cache {
    dir: PathBuf,
}

/// Keeps a build from being swept while it is used.
pub(super) struct InUse {
    _lock: File,
}

impl Cache {
    /// Opens `$XDG_CACHE_HOME/cpr-vmm/lab`, by default `~/.cache/cpr-vmm/lab`, and makes it if need be.
    pub(super) fn open() -> Result<Self> {
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = absolute("XDG_CACHE_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
            .context("neither XDG_CACHE_HOME nor HOME is an absolute path: nowhere to keep the lab")?;
        let dir = base.join("cpr-vmm/lab");
        fs::create_dir_all(dir.join("runs")).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Self { dir })
    }

    pub(super) fn build_log(&self) -> PathBuf {
        self.dir.join("build.log")
    }

    /// Whether the build of this key is there.
    pub(super) fn has(&self, key: &str) -> bool {
        self.dir.join(key).is_dir()
    }

    /// The build of this key, made by `make` in a folder handed to it if it is not there. Builds of other keys go
    /// away once a new one is finished.
    pub(super) fn get(&self, key: &str, make: impl Fn(&Path) -> Result<()>) -> Result<(PathBuf, InUse)> {
        let finished = self.dir.join(key);
        loop {
            let lock = self.lock_file()?;
            lock.lock_shared()?;
            if finished.is_dir() {
                return Ok((finished, InUse { _lock: lock }));
            }
            drop(lock);

            let lock = self.lock_file()?;
            if lock.try_lock().is_err() {
                eprintln!("lab: waiting for another session of the lab to end");
                lock.lock()?;
            }
            if finished.is_dir() {
                continue;
            }
            self.sweep(|name| name.starts_with("tmp-"))?;
            let _ = fs::remove_file(self.build_log());
            let temporary = self.dir.join(format!("tmp-{}", std::process::id()));
            fs::create_dir(&temporary)?;
            if let Err(error) = make(&temporary) {
                let _ = remove(&temporary);
                return Err(error);
            }
            fs::rename(&temporary, &finished)?;
            self.sweep(|name| name != key)?;
        }
    }

    /// A new folder for the logs of one run; those of the oldest runs go away.
    pub(super) fn new_run(&self) -> Result<PathBuf> {
        let runs = self.dir.join("runs");
        let mut numbers: Vec<u64> =
            fs::read_dir(&runs)?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
        numbers.sort_unstable();
        let old = numbers.len().saturating_sub(RUNS_KEPT - 1);
        for number in &numbers[..old] {
            let _ = remove(&runs.join(number.to_string()));
        }
        // Another run may take the same number at the same time: whoever makes the folder has it.
        let first = numbers.last().map_or(1, |last| last + 1);
        for number in first..first + 100 {
            let run = runs.join(number.to_string());
            match fs::create_dir(&run) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                made => {
                    return made
                        .map(|()| run.clone())
                        .with_context(|| format!("cannot create {}", run.display()));
                }
            }
        }
        anyhow::bail!("no free number for a run under {}", runs.display())
    }

    fn lock_file(&self) -> Result<File> {
        let path = self.dir.join("lock");
        File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))
    }

    /// Removes the builds, finished or not, whose name is `unwanted`.
    fn sweep(&self, unwanted: impl Fn(&str) -> bool) -> Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type()?.is_dir() && name != "runs" && unwanted(&name) {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }
}

/// Removes a folder, but nothing that a killed build may have left mounted in it.
fn remove(dir: &Path) -> Result<()> {
    let status = Command::new("rm").args(["-rf", "--one-file-system", "--"]).arg(dir).status()?;
    ensure!(status.success(), "cannot remove {}", dir.display());
    Ok(())
}

/// A short, stable name for a text (FNV-1a, 64 bits).
pub(super) fn key_of(text: &str) -> String {
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("runs")).unwrap();
        let cache = Cache { dir: dir.path().into() };
        (dir, cache)
    }

    #[test]
    fn a_build_is_made_once_and_replaces_the_older_ones() {
        let (_dir, cache) = cache();
        fs::create_dir(cache.dir.join("old")).unwrap();
        fs::create_dir(cache.dir.join("tmp-1")).unwrap();
        let (path, used) = cache.get("new", |dir| Ok(fs::write(dir.join("x"), "y")?)).unwrap();
        assert_eq!(fs::read(path.join("x")).unwrap(), b"y");
        drop(used);
        cache.get("new", |_| panic!("made twice")).unwrap();
        assert!(!cache.has("old") && !cache.has("tmp-1"));
        assert!(cache.dir.join("runs").is_dir());
    }

    #[test]
    fn a_failed_build_leaves_nothing_that_looks_finished() {
        let (_dir, cache) = cache();
        let result = cache.get("new", |dir| {
            fs::write(dir.join("half"), "")?;
            anyhow::bail!("network")
        });
        assert!(result.is_err());
        assert!(!cache.has("new"));
        assert_eq!(
            fs::read_dir(&cache.dir).unwrap().filter(|e| e.as_ref().unwrap().path().is_dir()).count(),
            1
        );
    }

    #[test]
    fn only_the_last_runs_keep_their_logs() {
        let (_dir, cache) = cache();
        let runs: Vec<_> = (0..RUNS_KEPT + 3).map(|_| cache.new_run().unwrap()).collect();
        assert!(!runs[2].exists() && runs[3].exists());
        assert_eq!(fs::read_dir(cache.dir.join("runs")).unwrap().count(), RUNS_KEPT);
    }

    #[test]
    fn keys_differ_with_the_text() {
        assert_eq!(key_of(""), "cbf29ce484222325");
        assert_ne!(key_of("a"), key_of("b"));
    }
}
