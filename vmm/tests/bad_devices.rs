//! What a user or the host can get wrong with disks, networks and other devices. At the start the program ends with an error
//! that names the thing, and leaves nothing behind; in an update the guest runs on.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use anyhow::{Context, ensure};
use oslib::{cloexec, tap};
use serde_json::json;
use tempfile::TempDir;
use testkit::network::ip;
use testkit::process::status_field;
use testkit::{Machine, PATIENCE, Vmm, VmmBuilder, need_kvm, need_network, skip_unless, wait_for};

fn run(args: &[&str]) -> anyhow::Result<Output> {
    Ok(Command::new(env!("CARGO_BIN_EXE_cpr-vmm")).args(args).output()?)
}

#[test]
fn mistakes_end_the_program_before_it_touches_anything() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let pidfile = folder.path().join("pid");
    let pidfile = pidfile.to_str().unwrap_or_default();
    const DRIVE: &str = "file=/no/such/image,if=none,id=d,format=raw";
    for (args, expected) in [
        (
            &["-device", "virtio-blk-pci,drive=x"][..],
            "-device: virtio-blk-pci,drive=x: unknown drive 'x' (known: none)",
        ),
        (&["-drive", "file=/x,format=qcow2"], "-drive: drive 'virtio0': format 'qcow2' is not supported"),
        (&["-drive", "file=/x"], "images are not probed; say format=raw"),
        (
            &[
                "-drive",
                DRIVE,
                "-device",
                "virtio-blk-pci,drive=d,addr=1",
                "-device",
                "virtio-rng-pci,addr=1",
            ],
            "-device: virtio-rng-pci: slot 1 is taken by virtio-blk-pci,drive=d",
        ),
        (
            &["-netdev", "tap,id=n,ifname=t,script=/etc/qemu-ifup"],
            "netdev 'n': property 'script': no script is run",
        ),
        (
            &["-netdev", "tap,id=n,fds=3:4,vhostfd=5"],
            "netdev 'n': 1 vhost descriptors for 2 queues: pass one for each",
        ),
        (&["-M", "microvm-0.1", "-device", "virtio-rng-pci"], "machine type 'microvm-0.1' has no PCI bus"),
    ] {
        let output = run(&[args, &["-pidfile", pidfile]].concat())?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1), "{args:?}: {:?}", output.status);
        ensure!(said.starts_with("cpr-vmm: ") && said.contains(expected), "{args:?}: {said}");
        ensure!(said.lines().count() == 1, "{args:?}: {said}");
        ensure!(std::fs::read_dir(folder.path())?.next().is_none(), "{args:?} left something behind");
    }
    Ok(())
}

#[test]
fn what_nothing_uses_is_warned_of() -> anyhow::Result<()> {
    need_kvm!();
    let vmm = VmmBuilder::new().args(&[
        "-drive",
        "file=/no/such/image,if=none,id=d,format=raw",
        "-netdev",
        "tap,id=n,ifname=t",
        "-device",
        "virtio-rng-pci",
    ]);
    let vmm = vmm.start()?;
    vmm.guest()?.beats_on(0)?;
    let said = vmm.stderr();
    ensure!(
        said.contains("drive 'd' is used by no device; name it by -device virtio-blk-pci,drive=d"),
        "{said}"
    );
    ensure!(said.contains("netdev 'n' has no peer"), "{said}");
    vmm.quit()
}

/// A program whose start must fail, in a folder of its own.
struct Start {
    folder: TempDir,
    wrapper: &'static [&'static str],
}

impl Start {
    fn new() -> anyhow::Result<Start> {
        Ok(Start { folder: tempfile::tempdir()?, wrapper: &[] })
    }

    fn under(wrapper: &'static [&'static str]) -> anyhow::Result<Start> {
        Ok(Start { wrapper, ..Start::new()? })
    }

    /// The whole error, after which the folder holds what it did before.
    fn fails(&self, args: &[&str]) -> anyhow::Result<String> {
        let list = || -> anyhow::Result<Vec<_>> {
            let names = fs::read_dir(self.folder.path())?.map(|entry| Ok(entry?.file_name()));
            let mut names = names.collect::<io::Result<Vec<_>>>()?;
            names.sort_unstable();
            Ok(names)
        };
        let before = list()?;
        let usual = ["-nodefaults", "-display", "none", "-pidfile", "pid"];
        let sockets = ["-qmp", "unix:qmp,server=on,wait=off"];
        let words = [self.wrapper, &[env!("CARGO_BIN_EXE_cpr-vmm")], &usual, &sockets, args].concat();
        let output = Command::new(words[0]).args(&words[1..]).current_dir(self.folder.path()).output()?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(1), "{args:?}: {:?}: {said}", output.status);
        ensure!(said.starts_with("cpr-vmm: ") && said.lines().count() == 1, "{args:?}: {said}");
        let after = list()?;
        ensure!(after == before, "{args:?}: {before:?} became {after:?}");
        Ok(said)
    }

    fn file(&self, name: &str, len: u64, mode: u32) -> anyhow::Result<()> {
        let path = self.folder.path().join(name);
        fs::File::create(&path)?.set_len(len)?;
        Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
    }
}

fn all_in(said: &str, expected: &[&str]) -> anyhow::Result<()> {
    for needle in expected {
        ensure!(said.contains(needle), "{needle:?} is not in {said}");
    }
    Ok(())
}

#[test]
fn a_file_that_is_no_image_ends_the_start_without_a_trace() -> anyhow::Result<()> {
    need_kvm!();
    let start = Start::new()?;
    fs::create_dir(start.folder.path().join("folder"))?;
    start.file("text", 100, 0o600)?;
    for (file, expected) in [
        ("none.img", &["none.img cannot be opened for reading and writing: No such file or directory"][..]),
        ("folder", &["folder is a folder; an image is a regular file or a block device"]),
        ("/dev/null", &["/dev/null is a character device; an image is"]),
    ] {
        let said = start.fails(&["-drive", &format!("file={file},format=raw,id=d0")])?;
        all_in(&said, &["virtio-blk-pci at slot 1: drive d0: "])?;
        all_in(&said, expected)?;
    }
    let said = start.fails(&["-kernel", "text"])?;
    all_in(&said, &["cannot boot kernel text: ", "accepted are"])?;
    let said = start.fails(&["-kernel", "/no/such/kernel"])?;
    all_in(&said, &["/no/such/kernel", "No such file"])
}

#[test]
fn an_image_that_may_not_be_written_can_be_had_for_reading() -> anyhow::Result<()> {
    need_kvm!();
    // Root may write to every file.
    skip_unless!(
        status_field(std::process::id(), "Uid")?.starts_with("0\t"),
        "root alone gives privileges up"
    );
    let start = Start::under(&["setpriv", "--bounding-set=-dac_override", "--"])?;
    start.file("read-only.img", 4096, 0o444)?;
    let said = start.fails(&["-drive", "file=read-only.img,format=raw"])?;
    let expected =
        ["drive virtio0: read-only.img cannot be opened for reading and writing", "Permission denied"];
    all_in(&said, &expected)?;
    all_in(&said, &["read-only=on does without the latter"])?;
    let image = start.folder.path().join("read-only.img");
    let drive = format!("file={},format=raw,read-only=on", image.display());
    let vmm = VmmBuilder::new().wrapper(start.wrapper).args(&["-drive", &drive]).start()?;
    vmm.guest()?.beats_on(0)?;
    vmm.quit()
}

#[test]
fn an_image_that_another_program_writes_to_is_refused() -> anyhow::Result<()> {
    need_kvm!();
    let start = Start::new()?;
    start.file("disk.img", 4096, 0o600)?;
    let drive = format!("file={},format=raw", start.folder.path().join("disk.img").display());
    let vmm = VmmBuilder::new().args(&["-drive", &drive]).start()?;
    for more in ["", ",read-only=on"] {
        let said = start.fails(&["-drive", &format!("{drive}{more}")])?;
        all_in(
            &said,
            &["disk.img is in use: another process writes to it; end that one, or set share-rw=on"],
        )?;
    }
    // Twice in one machine it is no better.
    let said = start.fails(&["-drive", "file=disk.img,format=raw", "-drive", "file=disk.img,format=raw"])?;
    all_in(&said, &["disk.img is in use"])?;
    // What does not ask is not told.
    let other = VmmBuilder::new().args(&["-drive", &format!("{drive},file.locking=off")]).start()?;
    other.quit()?;
    vmm.quit()?;
    VmmBuilder::new().args(&["-drive", &drive]).start()?.quit()
}

#[test]
fn a_tap_that_cannot_be_had_ends_the_start_without_a_trace() -> anyhow::Result<()> {
    need_kvm!();
    need_network!();
    const CARD: [&str; 2] = ["-device", "virtio-net-pci,netdev=n0"];
    let start = Start::new()?;
    ip("tuntap add dev one mode tap vnet_hdr")?;
    ip("tuntap add dev many mode tap vnet_hdr multi_queue")?;
    let taken = tap::open("one", false)?;
    for (backend, expected) in [
        ("ifname=lo", &["tap interface 'lo' cannot be opened: it is no tap", "Invalid argument"][..]),
        ("ifname=one", &["'one' cannot be opened: somebody else has it open", "busy"]),
        ("ifname=many", &["'many' cannot be opened: it is no tap, or was made with multi_queue"]),
        (
            "ifname=one,queues=2",
            &["'one' cannot be opened: it is no tap, or was not made for several queues"],
        ),
        ("fd=77", &["descriptor 77 was not passed on"]),
    ] {
        let said = start.fails(&[&["-netdev", &format!("tap,id=n0,{backend}")][..], &CARD].concat())?;
        all_in(&said, &["virtio-net-pci at slot 1: netdev 'n0': "])?;
        all_in(&said, expected)?;
    }
    drop(taken);
    let file = fs::File::open("/dev/null")?;
    cloexec::clear(&file)?;
    let backend = format!("tap,id=n0,fd={}", file.as_raw_fd());
    let said = start.fails(&[&["-netdev", &backend][..], &CARD].concat())?;
    all_in(&said, &["tap descriptor 0 of this network cannot be used: the descriptor is not a tap's"])?;
    let start = Start::under(&["setpriv", "--bounding-set=-net_admin", "--"])?;
    let said = start.fails(&[&["-netdev", "tap,id=n0,ifname=none"][..], &CARD].concat())?;
    all_in(&said, &["tap interface 'none' cannot be opened", "does not exist", "Operation not permitted"])?;
    ensure!(ip("link show dev none").is_err(), "the interface was made");
    Ok(())
}

/// `migrate` itself refuses: by cpr-exec, and by cpr-transfer.
fn refused_at_once(machine: &mut Machine, expected: &[&str]) -> anyhow::Result<()> {
    let pid = machine.runner()?;
    machine.vmm.set_exec(&machine.vmm.exec_command("memfd:"))?;
    let error = machine.vmm.qmp().refused("migrate", json!({ "uri": "memfd:" }))?;
    all_in(&error.desc, expected).context("cpr-exec")?;
    machine.set("mode", json!("cpr-transfer"))?;
    let nobody = machine.vmm.path("nobody");
    let error = machine.vmm.qmp().refused("migrate", Vmm::channels_to(&nobody))?;
    all_in(&error.desc, expected).context("cpr-transfer")?;
    ensure!(machine.runner()? == pid);
    machine.verify()
}

/// The next program refuses when it is asked: that of a cpr-exec, and a waiting one.
fn refused_when_asked(machine: &mut Machine, options: &[&str], expected: &[&str]) -> anyhow::Result<()> {
    let pid = machine.runner()?;
    let command = machine.vmm.exec_command("memfd:");
    machine.begin(&command, "memfd:")?;
    let error = machine.has_failed()?;
    all_in(&error, expected).context("cpr-exec")?;
    all_in(&error, &["preflight"])?;
    let target = VmmBuilder::new().args(options).target("unix:main.sock").start()?;
    machine.vmm.begin_transfer(&target.cpr_socket())?;
    let error = machine.has_failed()?;
    all_in(&error, expected).context("cpr-transfer")?;
    all_in(&error, &["preflight"])?;
    ensure!(machine.runner()? == pid);
    machine.verify()
}

/// Nobody is asked: the next program refuses once it has everything, and so does the one that it falls back to. By cpr-exec the
/// guest runs on in another process.
fn refused_by_the_next(machine: &mut Machine, options: &[&str], expected: &[&str]) -> anyhow::Result<()> {
    machine.vmm.set_preflight("off")?;
    let command = machine.vmm.exec_command("memfd:");
    machine.begin(&command, "memfd:")?;
    let error = machine.has_failed()?;
    all_in(&error, expected).context("cpr-exec")?;
    machine.runner()?;
    let mut target = VmmBuilder::new().args(options).target("unix:main.sock").start()?;
    machine.vmm.begin_transfer(&target.cpr_socket())?;
    let error = machine.has_failed()?;
    all_in(&error, expected).context("cpr-transfer")?;
    ensure!(target.wait_exit()? == Some(1), "{}", target.stderr());
    all_in(&target.stderr(), expected)?;
    machine.runner()?;
    machine.verify()?;
    machine.vmm.set_preflight("require")
}

#[test]
fn an_image_that_became_shorter_is_refused() -> anyhow::Result<()> {
    need_kvm!();
    let image = tempfile::NamedTempFile::new()?;
    image.as_file().set_len(1 << 20)?;
    let options = ["-drive", &format!("file={},format=raw,id=d0", image.path().display())];
    let mut machine = Machine::start(VmmBuilder::new().args(&options))?;
    image.as_file().set_len(4096)?;
    let expected = "has become shorter: 4096 bytes, the guest's disk has 1048576";
    refused_at_once(&mut machine, &["drive d0: ", &image.path().display().to_string(), expected])?;
    // With its length it is the disk again.
    image.as_file().set_len(1 << 20)?;
    machine.vmm.update()?;
    // Out of storage as well, and the guest is there for another try.
    let folder = tempfile::tempdir()?;
    let uri = format!("file:{}", folder.path().join("vm.state").display());
    machine.vmm.store(&uri)?;
    machine.vmm.quit()?;
    image.as_file().set_len(4096)?;
    let mut target = VmmBuilder::new().args(&options).incoming(&uri).spawn()?;
    ensure!(target.wait_exit()? == Some(1), "{}", target.stderr());
    all_in(&target.stderr(), &["drive d0: ", expected])?;
    image.as_file().set_len(1 << 20)?;
    let vmm = VmmBuilder::new().args(&options).incoming(&uri).start()?;
    vmm.guest()?.beats_on(0)?;
    vmm.quit()
}

#[test]
fn another_image_of_the_same_name_is_refused() -> anyhow::Result<()> {
    need_kvm!();
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("disk.img");
    fs::File::create(&image)?.set_len(1 << 20)?;
    let options = ["-drive", &format!("file={},format=raw,id=d0", image.display())];
    let mut machine = Machine::start(VmmBuilder::new().args(&options))?;
    let old = folder.path().join("old.img");
    fs::rename(&image, &old)?;
    fs::File::create(&image)?.set_len(1 << 20)?;
    let expected = ["drive d0: ", "is not the image that the guest has", "name the same one"];
    refused_when_asked(&mut machine, &options, &expected)?;
    refused_by_the_next(&mut machine, &options, &expected)?;
    fs::rename(&old, &image)?;
    machine.vmm.update()?;
    machine.runner()?;
    end(machine.vmm)
}

#[test]
fn a_tap_that_was_renamed_or_vanished_is_refused() -> anyhow::Result<()> {
    need_kvm!();
    need_network!();
    ip("tuntap add dev t0 mode tap vnet_hdr")?;
    let options = ["-netdev", "tap,id=n0,ifname=t0", "-device", "virtio-net-pci,netdev=n0"];
    let mut machine = Machine::start(VmmBuilder::new().args(&options))?;
    ip("link set dev t0 name t1")?;
    let expected = ["the guest's network is on tap interface 't1', not on 't0'"];
    refused_when_asked(&mut machine, &options, &expected)?;
    refused_by_the_next(&mut machine, &options, &expected)?;
    ip("link set dev t1 name t0")?;
    machine.vmm.update()?;
    ip("link delete dev t0")?;
    let expected =
        ["tap interface 't0' cannot be used any more: ", "it was deleted while the descriptor was open"];
    refused_at_once(&mut machine, &expected)?;
    ensure!(ip("link show dev t0").is_err(), "the interface was made anew");
    // Out of storage the guest goes on with another one of that name.
    let folder = tempfile::tempdir()?;
    let uri = format!("file:{}", folder.path().join("vm.state").display());
    machine.vmm.store(&uri)?;
    end(machine.vmm)?;
    ip("tuntap add dev t0 mode tap vnet_hdr")?;
    let vmm = VmmBuilder::new().args(&options).incoming(&uri).start()?;
    vmm.guest()?.beats_on(0)?;
    vmm.quit()
}

#[test]
fn vhost_that_cannot_be_had_is_refused() -> anyhow::Result<()> {
    need_kvm!();
    need_network!();
    skip_unless!(!std::path::Path::new("/dev/vhost-net").exists(), "this kernel has vhost-net");
    ip("tuntap add dev t0 mode tap vnet_hdr")?;
    let device = ["-device", "virtio-net-pci,netdev=n0"];
    let expected = ["/dev/vhost-net cannot be opened: load the module 'vhost_net'", "say vhost=off"];
    let said = Start::new()?.fails(&[&["-netdev", "tap,id=n0,ifname=t0,vhost=on"], &device[..]].concat())?;
    all_in(&said, &["netdev 'n0': "])?;
    all_in(&said, &expected)?;
    let file = fs::File::open("/dev/null")?;
    cloexec::clear(&file)?;
    let fd = file.as_raw_fd();
    for (fd, expected) in [
        (77, "netdev 'n0': descriptor 77 was not passed on".to_owned()),
        (fd, format!("netdev 'n0': descriptor {fd}: the descriptor is not one of /dev/vhost-net")),
    ] {
        let backend = format!("tap,id=n0,ifname=t0,vhostfd={fd}");
        let said = Start::new()?.fails(&[&["-netdev", &backend], &device[..]].concat())?;
        all_in(&said, &[&expected])?;
    }

    let options = [&["-netdev", "tap,id=n0,ifname=t0"], &device[..]].concat();
    let mut machine = Machine::start(VmmBuilder::new().args(&options))?;
    let command = machine.vmm.exec_command("memfd:").into_iter();
    let command: Vec<_> = command.map(|word| word.replace("ifname=t0", "ifname=t0,vhost=on")).collect();
    let pid = machine.runner()?;
    machine.begin(&command, "memfd:")?;
    let error = machine.has_failed()?;
    all_in(&error, &["preflight"])?;
    all_in(&error, &expected)?;
    ensure!(machine.runner()? == pid);
    // Nobody is asked.
    machine.vmm.set_preflight("off")?;
    machine.begin(&command, "memfd:")?;
    all_in(&machine.has_failed()?, &expected)?;
    machine.runner()?;
    machine.verify()?;
    machine.vmm.update()?;
    machine.runner()?;
    end(machine.vmm)
}

/// Ends the program, in whatever process it is by now.
fn end(mut vmm: Vmm) -> anyhow::Result<()> {
    vmm.qmp().execute("quit", json!({}))?;
    wait_for("the end of every process", PATIENCE, || vmm.processes().is_empty().then_some(()))
}
