//! cpr-exec in a real OCI container: `cpr-vmm` with a Linux guest is process 1 of a container that runc made, and updates
//! are nothing to it. Same id, same process 1, same namespaces and control group; the connections of a neighbour in the
//! container and those to the monitor and the guest's serial line stay up. (`container.rs` has the same without a runtime
//! and with the built-in guest.) In the nested lab alone (`cargo xtask lab`).

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::lab::{BOOT_LIMIT, COMMAND_LIMIT, Lab};
use testkit::{GuestShell, PATIENCE, Vmm, VmmBuilder, need_lab, process, wait_for};

const ID: &str = "cpr-vmm-under-test";

/// Where the container has the folder that it shares with us.
const SHARED: &str = "/run/vm";

/// The machine, as it is in the container.
fn arguments(lab: &Lab) -> Vec<String> {
    let words = [
        "-nodefaults -display none -object memory-backend-memfd,id=ram0,size=256M -machine memory-backend=ram0 -smp 2",
        "-kernel /vmlinux -initrd /initrd",
        &format!("-qmp unix:{SHARED}/qmp,server=on,wait=off -serial unix:{SHARED}/serial,server=on,wait=off"),
    ];
    let words = words.iter().flat_map(|line| line.split(' ')).map(str::to_owned);
    words.chain(["-append".to_owned(), lab.append.clone()]).collect()
}

/// What runtime-spec wants to know: a small root, /dev/kvm and /dev/net/tun, and limits as an orchestrator sets them.
fn config(shared: &Path, command: &[String]) -> Value {
    let device = |path: &str, minor: u32| json!({ "path": path, "type": "c", "major": 10, "minor": minor });
    let allow =
        |minor: u32| json!({ "allow": true, "type": "c", "major": 10, "minor": minor, "access": "rw" });
    let capabilities = ["CAP_KILL", "CAP_NET_ADMIN"];
    json!({
        "ociVersion": "1.0.2",
        "hostname": "vm",
        "root": { "path": "rootfs", "readonly": true },
        "process": {
            "args": command,
            "cwd": "/",
            "env": ["PATH=/"],
            "user": { "uid": 0, "gid": 0 },
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            },
            "noNewPrivileges": true,
        },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
            { "destination": SHARED, "type": "bind", "source": shared, "options": ["rbind", "rw"] },
        ],
        "linux": {
            "namespaces": [{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }],
            "devices": [device("/dev/kvm", 232), device("/dev/net/tun", 200)],
            "resources": {
                "devices": [{ "allow": false, "access": "rwm" }, allow(232), allow(200)],
                "memory": { "limit": 1_u64 << 30 },
                "pids": { "limit": 64 },
            },
        },
    })
}

/// Writes the bundle: our static program, what it reads, and a shell tool for the neighbour.
fn bundle(lab: &Lab, folder: &Path, shared: &Path) -> anyhow::Result<()> {
    let root = folder.join("rootfs");
    fs::create_dir_all(&root)?;
    let busybox = Path::new("/usr/bin/busybox");
    for (from, to) in [
        (lab.vmm.as_path(), "cpr-vmm"),
        (Path::new(&lab.vmlinux), "vmlinux"),
        (Path::new(&lab.initrd), "initrd"),
        (busybox, "busybox"),
    ] {
        fs::copy(from, root.join(to)).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    for mount_point in ["proc", "dev", "run/vm"] {
        fs::create_dir_all(root.join(mount_point))?;
    }
    let mut command = vec!["/cpr-vmm".to_owned()];
    command.extend(arguments(lab));
    Ok(fs::write(folder.join("config.json"), config(shared, &command).to_string())?)
}

/// What `runc state` says, which has to stay as it is.
fn state() -> anyhow::Result<Value> {
    let output = Command::new("runc").args(["state", ID]).output()?;
    ensure!(output.status.success(), "runc state: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The container and who talks to its VMM.
struct Container {
    vmm: Vmm,
    shared: TempDir,
    _bundle: TempDir,
}

impl Container {
    fn run(lab: &Lab) -> anyhow::Result<Container> {
        let (folder, shared) = (tempfile::tempdir()?, tempfile::tempdir()?);
        bundle(lab, folder.path(), shared.path())?;
        let path = folder.path().to_str().context("a path that is not UTF-8")?;
        let builder = VmmBuilder::new().binary("runc").only_args(&["run", "--bundle", path, ID]);
        let vmm = builder.spawn()?;
        let mut container = Container { vmm, shared, _bundle: folder };
        symlink(container.shared.path().join("qmp"), container.vmm.path("qmp"))?;
        container.vmm.connect()?;
        Ok(container)
    }

    fn serial(&self) -> std::path::PathBuf {
        self.shared.path().join("serial")
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = Command::new("runc").args(["delete", "--force", ID]).stderr(Stdio::null()).status();
    }
}

/// Somebody else in the container who sends back what comes over a connection.
struct Neighbour<S> {
    connection: BufReader<S>,
    lines: u32,
}

impl<S: Read + Write> Neighbour<S> {
    fn new(connection: S) -> Neighbour<S> {
        Neighbour { connection: BufReader::new(connection), lines: 0 }
    }

    /// Sends a line without waiting for it to come back.
    fn send(&mut self) -> anyhow::Result<()> {
        self.lines += 1;
        Ok(writeln!(self.connection.get_mut(), "line {}", self.lines)?)
    }

    /// Takes the line that was sent last.
    fn receive(&mut self) -> anyhow::Result<()> {
        let mut line = String::new();
        self.connection.read_line(&mut line).context("the neighbour's connection")?;
        ensure!(line == format!("line {}\n", self.lines), "{line:?}");
        Ok(())
    }
}

/// `runc exec`, which leaves the new process behind with this standard input and output.
fn execute(command: &[&str], [input, output]: [Stdio; 2]) -> anyhow::Result<()> {
    let mut runc = Command::new("runc");
    runc.args(["exec", "--detach", ID, "/busybox"]).args(command);
    let status = runc.stdin(input).stdout(output).stderr(Stdio::null()).status()?;
    ensure!(status.success(), "{command:?}: runc: {status}");
    Ok(())
}

/// A neighbour over TCP.
fn over_tcp() -> anyhow::Result<Neighbour<TcpStream>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    listener.set_nonblocking(true)?;
    let port = listener.local_addr()?.port().to_string();
    execute(&["nc", "127.0.0.1", &port, "-e", "/busybox", "cat"], [Stdio::null(), Stdio::null()])?;
    let stream = wait_for("the neighbour over TCP", PATIENCE, || listener.accept().ok())?.0;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(Neighbour::new(stream))
}

/// A neighbour over a pair of unix sockets.
fn over_unix() -> anyhow::Result<Neighbour<UnixStream>> {
    let (ours, theirs) = UnixStream::pair()?;
    let ends = [OwnedFd::from(theirs.try_clone()?).into(), OwnedFd::from(theirs).into()];
    execute(&["cat"], ends)?;
    ours.set_read_timeout(Some(PATIENCE))?;
    Ok(Neighbour::new(ours))
}

#[test]
fn a_container_is_the_same_after_updates() -> anyhow::Result<()> {
    let lab = need_lab!();
    let mut container = Container::run(&lab)?;
    let mut shell = GuestShell::connect(&container.serial(), lab.prompt())?;
    shell.ready(BOOT_LIMIT).with_context(|| format!("says: {}", container.vmm.stderr()))?;
    shell.run_within("kept=here", COMMAND_LIMIT)?;

    let before = state()?;
    ensure!(before["status"] == "running" && before["id"] == ID, "{before}");
    let pid: u32 = before["pid"].as_u64().context("no pid")?.try_into()?;
    ensure!(
        process::status_field(pid, "NSpid")?.split_whitespace().last() == Some("1"),
        "it is not process 1"
    );
    let identity = || {
        let started = process::start_time(pid)?;
        anyhow::Ok((started, process::namespaces(pid)?, process::cgroups(pid)?))
    };
    let identity_before = identity()?;
    ensure!(identity_before.1 != process::namespaces(std::process::id())?, "no namespaces of its own");
    let mut tcp = over_tcp()?;
    let mut unix = over_unix()?;

    for update in 1..=6 {
        // These lines are on their way while the program is replaced.
        tcp.send()?;
        unix.send()?;
        let uri = if update % 2 == 1 { "memfd:".to_owned() } else { format!("file:{SHARED}/state") };
        let mut command = vec!["/cpr-vmm".to_owned()];
        command.extend(arguments(&lab));
        command.extend(["-incoming".to_owned(), uri.clone()]);
        container.vmm.set_exec(&command)?;
        let info =
            container.vmm.migrate(&uri).with_context(|| format!("says: {}", container.vmm.stderr()))?;
        ensure!(info["cpr"]["generation"] == update, "{info}");
        tcp.receive()?;
        unix.receive()?;
        let answer = shell.run_within(&format!("sleep 0.2; echo $kept {update}"), COMMAND_LIMIT)?;
        ensure!(answer == format!("here {update}"), "{answer}");
        ensure!(identity()? == identity_before, "{identity_before:?} -> {:?}", identity()?);
        ensure!(state()? == before, "{before} -> {}", state()?);
    }
    ensure!(process::children(pid)?.is_empty(), "a zombie");

    shell.type_line("poweroff -f")?;
    let code = container.vmm.wait_exit()?;
    ensure!(code == Some(0), "the container ended with {code:?}: {}", container.vmm.stderr());
    // runc removes what it ran in the foreground.
    ensure!(state().is_err(), "the container is still there: {}", state()?);
    ensure!(container.vmm.stderr().is_empty(), "it complained: {}", container.vmm.stderr());
    Ok(())
}
