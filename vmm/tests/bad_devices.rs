//! What a user can get wrong with disks, networks and other devices, as far as the command line alone tells: the program
//! ends at once with an error that names the thing, and has touched nothing.

use std::process::{Command, Output};

use anyhow::ensure;

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
            &["-netdev", "tap,id=n,ifname=t,vhost=on"],
            "netdev 'n': property 'vhost': vhost=on is not supported",
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

/// No machine has a bus for them yet, and to leave them out silently would be a lie.
#[test]
fn a_device_is_refused_rather_than_left_out() -> anyhow::Result<()> {
    let output = run(&["-device", "virtio-rng-pci,id=rng0"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "{:?}", output.status);
    ensure!(said.contains("virtio-rng-pci 'rng0' is not wired up yet"), "{said}");
    Ok(())
}

#[test]
fn what_nothing_uses_is_warned_of() -> anyhow::Result<()> {
    // The device ends the program before it would run a guest.
    let unused = [
        "-drive",
        "file=/i,if=none,id=d,format=raw",
        "-netdev",
        "tap,id=n,ifname=t",
        "-device",
        "virtio-rng-pci",
    ];
    let output = run(&unused)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        said.contains("drive 'd' is used by no device; name it by -device virtio-blk-pci,drive=d"),
        "{said}"
    );
    ensure!(said.contains("netdev 'n' has no peer"), "{said}");
    Ok(())
}
