//! The lab's build: a Debian root with QEMU, kernels and tools, made by `mmdebstrap` without running one package
//! script; L1's disk, kernel and boot modules; and the kernels of the L2 guests. Everything comes from Debian.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::cache::{Cache, InUse, key_of};
use super::steps::{run_logged, step};
use super::{host, kernel};

/// Raise it when the code of this file builds something else from the same lists.
const RECIPE_VERSION: u32 = 2;

const SUITE: &str = "trixie";
/// Newer kernels and QEMU come from here.
const BACKPORTS: &str = "trixie-backports";

const PACKAGES: &[&str] = &[
    // The machines and their kernels.
    "qemu-system-x86",
    "linux-image-amd64",
    "linux-image-cloud-amd64",
    "busybox-static",
    // depmod reads compressed modules through liblzma, which it only recommends.
    "kmod",
    "liblzma5",
    // What tests and people use in L1.
    "base-files",
    "bash",
    "coreutils",
    "dash",
    "e2fsprogs",
    "grep",
    "iproute2",
    "iputils-ping",
    "mount",
    "pciutils",
    "procps",
    "runc",
    "sed",
    "socat",
    "strace",
    "tar",
    "util-linux",
];

/// Not needed to run anything here; half of the root's size.
const TRIMMED: &[&str] = &[
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "usr/lib/udev/hwdb.d",
    "usr/lib/x86_64-linux-gnu/gconv",
];

/// The same, below the modules of L1's kernel.
const TRIMMED_MODULES: &[&str] = &[
    "kernel/drivers/bluetooth",
    "kernel/drivers/gpu",
    "kernel/drivers/infiniband",
    "kernel/drivers/media",
    "kernel/drivers/net/wireless",
    "kernel/drivers/staging",
    "kernel/drivers/usb",
    "kernel/sound",
];

/// What L1's initramfs loads to reach its disk; the rest of its modules are on that, for `modprobe`.
const L1_DISK_MODULES: &[&str] = &["virtio_blk", "ext4", "overlay"];

/// What it loads for VMMs at the same time: with emulated CPUs, a module is a matter of a second.
const L1_VMM_MODULES: &[&str] = &["kvm", "kvm-amd", "tun"];

/// What an L2 guest loads where it finds a virtio device, and the file system for a disk.
const L2_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "ext4",
];

/// A finished build, kept from being swept as long as this value lives.
pub(super) struct Build {
    dir: PathBuf,
    _used: InUse,
}

impl Build {
    /// The build of the present recipe, made now unless the cache has it.
    pub(super) fn get(cache: &Cache) -> Result<Self> {
        let (dir, used) = cache.get(&key(), |dir| make(dir, &cache.build_log()))?;
        Ok(Self { dir, _used: used })
    }

    /// Whether [`Build::get`] would find it in the cache.
    pub(super) fn is_cached(cache: &Cache) -> bool {
        cache.has(&key())
    }

    /// L1's root disk, to be opened read-only.
    pub(super) fn disk(&self) -> PathBuf {
        self.dir.join("disk.img")
    }

    /// L1's kernel.
    pub(super) fn l1_kernel(&self) -> PathBuf {
        self.dir.join("l1/vmlinux")
    }

    /// The modules that L1 needs to mount its disk, in the order to load them.
    pub(super) fn l1_disk_modules(&self) -> Result<Vec<PathBuf>> {
        files_in(&self.dir.join("l1/disk-modules"))
    }

    /// The modules that VMMs need in L1, independent of the former.
    pub(super) fn l1_vmm_modules(&self) -> Result<Vec<PathBuf>> {
        files_in(&self.dir.join("l1/vmm-modules"))
    }

    /// The drivers for L2, in an order in which they can be loaded.
    pub(super) fn l2_modules(&self) -> Result<Vec<PathBuf>> {
        files_in(&self.dir.join("l2/modules"))
    }

    /// A static busybox.
    pub(super) fn busybox(&self) -> PathBuf {
        self.dir.join("root/usr/bin/busybox")
    }

    /// The root's QEMU as a program of this host.
    pub(super) fn qemu(&self) -> Command {
        self.qemu_named("qemu-system-x86_64")
    }

    /// Whether the root has this program in `/usr/bin`.
    pub(super) fn has_program(&self, name: &str) -> bool {
        self.dir.join("root/usr/bin").join(name).is_file()
    }

    /// As [`qemu`](Self::qemu), with another of the QEMUs that Debian builds.
    pub(super) fn qemu_named(&self, name: &str) -> Command {
        let root = self.dir.join("root");
        let mut command = program_of(&root, &format!("usr/bin/{name}"));
        command.arg("-L").arg(root.join("usr/share/qemu")).arg("-L").arg(root.join("usr/share/seabios"));
        command
    }
}

/// Where the guest kernels are in L1.
pub(super) const L1_KERNELS: &str = "/usr/share/lab";

fn key() -> String {
    key_of(&format!(
        "{RECIPE_VERSION} {SUITE} {BACKPORTS} {PACKAGES:?} {TRIMMED:?} {TRIMMED_MODULES:?} \
         {L1_DISK_MODULES:?} {L1_VMM_MODULES:?} {L2_MODULES:?}"
    ))
}

fn make(dir: &Path, log: &Path) -> Result<()> {
    let wanted = [("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs"), ("zstd", "zstd")];
    step(
        "1/4 programs (mmdebstrap, mke2fs, zstd)",
        "Install them by hand with apt-get, then run this again.",
        || host::install_missing(&wanted, log),
    )?;
    let root = dir.join("root");
    step(
        "2/4 Debian root with QEMU and kernels (downloads about 120 MB)",
        "If a package could not be fetched: check the network and the apt sources of this machine, then run this again.",
        || bootstrap(&root, log),
    )?;
    step(
        "3/4 kernels and modules",
        "Debian may have changed its kernel packages: the recipe in xtask/src/lab/build.rs must follow.",
        || {
            for directory in ["l1", "l2"] {
                fs::create_dir(dir.join(directory))?;
            }
            let (l1, l2) = kernels(&root)?;
            take_kernel(&root, &l1, &dir.join("l1"))?;
            fs::remove_file(dir.join("l1/bzImage"))?;
            take_kernel(&root, &l2, &dir.join("l2"))?;
            // First, because depmod opens every module that is there.
            trim(&root, &l1)?;
            for version in [&l1, &l2] {
                program_logged(&root, "usr/sbin/depmod", &["-b", path_str(&root)?, version], log)?;
            }
            take_modules(&root, &l1, L1_DISK_MODULES, &dir.join("l1/disk-modules"))?;
            take_modules(&root, &l1, L1_VMM_MODULES, &dir.join("l1/vmm-modules"))?;
            take_modules(&root, &l2, L2_MODULES, &dir.join("l2/modules"))?;
            fs::remove_dir_all(root.join("usr/lib/modules").join(&l2))?;
            let kernels = root.join(L1_KERNELS.trim_start_matches('/'));
            fs::create_dir_all(&kernels)?;
            for file in ["vmlinux", "bzImage"] {
                fs::rename(dir.join("l2").join(file), kernels.join(file))?;
            }
            accounts(&root)
        },
    )?;
    step("4/4 the disk of L1", "Is there room for 1 GB in the cache folder?", || {
        let size = used_mib(&root)?;
        let mut mke2fs = Command::new("mke2fs");
        mke2fs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
        // Mounted read-only only: no journal, no room to grow.
        mke2fs.args(["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-L", "lab", "-d"]);
        run_logged(
            mke2fs.arg(&root).arg(dir.join("disk.img")).arg(format!("{}M", size + size / 8 + 64)),
            log,
        )?;
        // On the host the root is there for QEMU; what only L1 needs is on the disk now.
        fs::remove_dir_all(root.join("usr/lib/modules"))?;
        Ok(fs::remove_dir_all(root.join(L1_KERNELS.trim_start_matches('/')))?)
    })
}

fn bootstrap(root: &Path, log: &Path) -> Result<()> {
    let source = host::debian_source()?.context("no Debian archive among the apt sources")?;
    let sources = root.with_extension("sources");
    fs::write(&sources, source.stanza(&format!("{SUITE} {BACKPORTS}")))?;
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap
        .env("DEBIAN_FRONTEND", "noninteractive")
        // Unpacked, not configured: no package script has anything to do for us.
        .args(["--mode=root", "--variant=extract", "--skip=check/empty"])
        .arg("--aptopt=Acquire::Check-Valid-Until \"false\"")
        .arg(format!("--aptopt=APT::Default-Release \"{BACKPORTS}\""))
        .arg(format!("--include={}", PACKAGES.join(",")))
        .arg(SUITE)
        .arg(root)
        .arg(&sources);
    run_logged(&mmdebstrap, log)
}

/// The versions of the generic kernel (for L1: it has the drivers) and of the cloud kernel (for L2: it is small).
fn kernels(root: &Path) -> Result<(String, String)> {
    let names: Vec<String> = fs::read_dir(root.join("usr/lib/modules"))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    let (cloud, generic): (Vec<_>, Vec<_>) = names.iter().partition(|name| name.contains("cloud"));
    ensure!(
        cloud.len() == 1 && generic.len() == 1,
        "one generic and one cloud kernel expected, found {names:?}"
    );
    Ok((generic[0].clone(), cloud[0].clone()))
}

/// Moves the kernel from the root into `to` as `bzImage`, with the ELF file in it beside it as `vmlinux`.
fn take_kernel(root: &Path, version: &str, to: &Path) -> Result<()> {
    let places = [
        root.join("usr/lib/modules").join(version).join("vmlinuz"),
        root.join(format!("boot/vmlinuz-{version}")),
    ];
    let image =
        places.iter().find(|image| image.exists()).with_context(|| format!("no vmlinuz of {version}"))?;
    let bzimage = to.join("bzImage");
    fs::rename(image, &bzimage)?;
    kernel::extract(&bzimage, &to.join("vmlinux"))
}

/// Puts the modules `wanted` and what they need into the new folder `to`, uncompressed and numbered in the order to
/// load them.
fn take_modules(root: &Path, version: &str, wanted: &[&str], to: &Path) -> Result<()> {
    let modules = root.join("usr/lib/modules").join(version);
    let dependencies = fs::read_to_string(modules.join("modules.dep"))?;
    let builtin = fs::read_to_string(modules.join("modules.builtin"))?;
    fs::create_dir(to)?;
    for (position, module) in load_order(wanted, &dependencies, &builtin)?.iter().enumerate() {
        let compressed = modules.join(module);
        let target = to.join(format!("{position:02}-{}.ko", module_name(module)));
        match compressed.extension().and_then(|extension| extension.to_str()) {
            Some("ko") => drop(fs::copy(&compressed, &target)?),
            Some("xz") => {
                let status = Command::new(root.join("usr/bin/busybox"))
                    .args(["unxz", "-c"])
                    .arg(&compressed)
                    .stdin(Stdio::null())
                    .stdout(fs::File::create(&target)?)
                    .status()?;
                ensure!(status.success(), "cannot decompress {}", compressed.display());
            }
            _ => anyhow::bail!("{} is compressed in a way we do not know", compressed.display()),
        }
    }
    Ok(())
}

/// The modules `wanted` and what they need, each after what it needs. `dependencies` is the text of `modules.dep`
/// (module, colon, needed modules, the first to load last), `builtin` that of `modules.builtin`.
fn load_order(wanted: &[&str], dependencies: &str, builtin: &str) -> Result<Vec<String>> {
    let canonical = |name: &str| name.replace('-', "_");
    let mut order: Vec<String> = Vec::new();
    let mut seen = BTreeSet::new();
    for name in wanted.iter().map(|name| canonical(name)) {
        if builtin.lines().any(|path| module_name(path) == name) {
            continue;
        }
        let (module, needs) = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(module, _)| module_name(module) == name)
            .with_context(|| format!("the kernel has no module {name}"))?;
        for path in needs.split_whitespace().rev().chain([module]) {
            if seen.insert(path) {
                order.push(path.to_owned());
            }
        }
    }
    Ok(order)
}

/// `kernel/arch/x86/kvm/kvm-amd.ko.xz` is the module `kvm_amd`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

fn trim(root: &Path, l1: &str) -> Result<()> {
    let modules = root.join("usr/lib/modules").join(l1);
    let from_root = TRIMMED.iter().map(|path| root.join(path));
    for dir in from_root.chain(TRIMMED_MODULES.iter().map(|path| modules.join(path))) {
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
    }
    Ok(())
}

/// The few files that package scripts would have made.
fn accounts(root: &Path) -> Result<()> {
    let files = [
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
        ),
        ("etc/group", "root:x:0:\ntty:x:5:\nkvm:x:104:\nnogroup:x:65534:\n"),
        ("etc/hosts", "127.0.0.1 localhost lab\n"),
        ("etc/hostname", "lab\n"),
    ];
    for (file, text) in files {
        fs::write(root.join(file), text)?;
    }
    Ok(())
}

/// A program of the root, run on this host by the root's own dynamic loader.
fn program_of(root: &Path, program: &str) -> Command {
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let mut command = Command::new(root.join("usr/lib64/ld-linux-x86-64.so.2"));
    command
        .arg("--library-path")
        .arg(format!("{}:{}", libraries.display(), libraries.join("pulseaudio").display()))
        .arg(root.join(program));
    command
}

fn program_logged(root: &Path, program: &str, arguments: &[&str], log: &Path) -> Result<()> {
    run_logged(program_of(root, program).args(arguments), log)
}

fn path_str(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

fn used_mib(dir: &Path) -> Result<u64> {
    let output = Command::new("du").arg("-sm").arg(dir).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.split_whitespace().next().and_then(|size| size.parse().ok()).context("du did not tell a size")
}

fn files_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz kernel/lib/crc16.ko.xz\n\
                       kernel/fs/jbd2/jbd2.ko.xz:\n\
                       kernel/lib/crc16.ko.xz:\n\
                       kernel/arch/x86/kvm/kvm-amd.ko.xz: kernel/arch/x86/kvm/kvm.ko.xz kernel/lib/crc16.ko.xz\n";

    #[test]
    fn modules_come_after_what_they_need() {
        let order = load_order(&["ext4", "kvm_amd"], DEP, "").unwrap();
        let names: Vec<_> = order.iter().map(|path| module_name(path)).collect();
        assert_eq!(names, ["crc16", "jbd2", "ext4", "kvm", "kvm_amd"]);
    }

    #[test]
    fn built_in_modules_are_left_out_and_unknown_ones_named() {
        assert!(load_order(&["ext4"], "", "kernel/fs/ext4/ext4.ko\n").unwrap().is_empty());
        let error = load_order(&["floppy"], DEP, "").unwrap_err();
        assert!(error.to_string().contains("floppy"));
    }
}
