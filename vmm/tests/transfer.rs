//! cpr-transfer as its users see it: a guest moves between two processes of the real program, and stays where it was
//! whenever that fails.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::ensure;
use serde_json::{Value, json};
use testkit::{Guest, PATIENCE, Vmm, VmmBuilder, need_kvm, process, wait_for};
use vmm_core::payload::Command;

const SEED: u64 = 41;
const FILLED: u64 = 16 << 20;
const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;

/// The guests of this file would take each other's CPUs.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start(cpus: u8) -> anyhow::Result<(Vmm, Guest)> {
    let vmm = machine(cpus).start()?;
    let guest = vmm.guest()?;
    guest.fill(FILLED, SEED)?;
    Ok((vmm, guest))
}

fn machine(cpus: u8) -> VmmBuilder {
    VmmBuilder::new().cpus(cpus).args(&["-append", &format!("cpus={cpus}")])
}

fn target(cpus: u8) -> anyhow::Result<Vmm> {
    machine(cpus).target("unix:main.sock").start()
}

/// The update of `source` fails with this reason, and its guest runs on.
fn fails_with(source: &mut Vmm, guest: &Guest, reason: &str) -> anyhow::Result<()> {
    let info = wait_for("the end of the update", PATIENCE, || {
        let info = source.qmp().execute("query-migrate", json!({})).ok()?;
        matches!(info["status"].as_str(), Some("failed" | "cancelled" | "completed")).then_some(info)
    })?;
    let text = info["error-desc"].as_str().unwrap_or_default();
    ensure!(text.contains(reason), "{info}");
    goes_on(source, guest)
}

fn goes_on(vmm: &mut Vmm, guest: &Guest) -> anyhow::Result<()> {
    ensure!(vmm.status()? == "running");
    guest.beats_on(0)?;
    guest.verify(FILLED, SEED)
}

fn ends_with(vmm: &mut Vmm, reason: &str) -> anyhow::Result<()> {
    ensure!(vmm.wait_exit()? == Some(1), "{}", vmm.stderr());
    ensure!(vmm.stderr().contains(reason), "{}", vmm.stderr());
    Ok(())
}

fn names(events: &[Value]) -> Vec<String> {
    events
        .iter()
        .map(|event| match event["event"].as_str().unwrap_or_default() {
            "MIGRATION" => event["data"]["status"].as_str().unwrap_or_default().to_owned(),
            other => other.to_owned(),
        })
        .collect()
}

#[test]
fn a_guest_moves_and_beats_on() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let (mut source, guest) = start(1)?;
    let mut target = target(1)?;
    source.set_capability("events")?;
    target.set_capability("events")?;
    // The target answers while it waits, and refuses what needs the guest.
    ensure!(target.status()? == "inmigrate");
    for command in ["cont", "system_reset"] {
        let text = target.qmp().refused(command, json!({}))?.desc;
        ensure!(text == "Guest is waiting for an incoming migration", "{text}");
    }
    ensure!(target.qmp().refused("migrate", json!({ "uri": "memfd:" }))?.desc.contains("incoming migration"));
    ensure!(target.qmp().execute("query-cpus-fast", json!({}))? == json!([]));
    let before = guest.vcpu(0).beats();
    let info = source.transfer(&mut target)?;
    ensure!(guest.vcpu(0).beats() >= before, "the guest went back");
    ensure!(info["cpr"]["mode"] == "cpr-transfer" && info["cpr"]["generation"] == 1, "{info}");
    goes_on(&mut target, &guest)?;
    // Both tell the same story, and neither takes the other's part.
    let theirs = source.qmp().execute("query-migrate", json!({}))?;
    ensure!(theirs["cpr"]["phases"] == info["cpr"]["phases"], "{theirs} {info}");
    ensure!(source.status()? == "postmigrate");
    for (command, arguments) in
        [("cont", json!({})), ("system_reset", json!({})), ("migrate", json!({ "uri": "memfd:" }))]
    {
        let text = source.qmp().refused(command, arguments)?.desc;
        ensure!(text.contains("belongs to another process"), "{command}: {text}");
    }
    source.qmp().execute("stop", json!({}))?;
    ensure!(source.status()? == "postmigrate");
    ensure!(names(&source.qmp().take_events()) == ["setup", "active", "STOP", "device", "completed"]);
    target.status()?;
    ensure!(names(&target.qmp().take_events()) == ["active", "RESUME", "completed"]);
    ensure!(!target.cpr_socket().exists());
    source.quit()?;
    goes_on(&mut target, &guest)?;
    target.quit()
}

#[test]
fn several_in_a_row_with_four_vcpus() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let (mut vmm, guest) = start(4)?;
    for generation in 1..=3 {
        let mut next = target(4)?;
        let before: Vec<u64> = (0..4).map(|vcpu| guest.vcpu(vcpu).beats()).collect();
        let info = vmm.transfer(&mut next)?;
        ensure!(info["cpr"]["generation"] == generation, "{info}");
        for (vcpu, before) in (0..).zip(before) {
            ensure!(guest.vcpu(vcpu).beats() >= before, "vCPU {vcpu} went back");
            guest.beats_on(vcpu)?;
        }
        vmm.quit()?;
        vmm = next;
    }
    goes_on(&mut vmm, &guest)?;
    // What came by transfer can go on by exec, and the other way round.
    vmm.update()?;
    let mut next = target(4)?;
    vmm.transfer(&mut next)?;
    goes_on(&mut next, &guest)?;
    next.quit()
}

#[test]
fn a_paused_guest_stays_paused_and_defer_waits_for_the_user() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let (mut source, guest) = start(1)?;
    source.qmp().execute("stop", json!({}))?;
    let mut target = machine(1).target("defer").start()?;
    source.begin_transfer(&target.cpr_socket())?;
    wait_for("the guest's descriptors", PATIENCE, || (!target.cpr_socket().exists()).then_some(()))?;
    ensure!(target.status()? == "inmigrate");
    let text = target.qmp().refused("migrate-incoming", json!({ "uri": "file:x" }))?.desc;
    ensure!(text.contains("streamable transport"), "{text}");
    target.qmp().execute("migrate-incoming", json!({ "uri": "unix:main.sock" }))?;
    ensure!(target.status()? == "paused");
    wait_for("the source's end of it", PATIENCE, || (source.status().ok()? == "postmigrate").then_some(()))?;
    target.qmp().execute("cont", json!({}))?;
    goes_on(&mut target, &guest)?;
    // The order of the two does not matter.
    let mut next = machine(1).target("defer").start()?;
    next.qmp().execute("migrate-incoming", json!({ "uri": "memfd:" }))?;
    target.transfer(&mut next)?;
    goes_on(&mut next, &guest)
}

#[test]
fn hmp_names_both_channels() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let (mut source, guest) = start(1)?;
    let mut target = target(1)?;
    let mut hmp =
        |line: String| source.qmp().execute("human-monitor-command", json!({ "command-line": line }));
    ensure!(hmp("migrate_set_parameter mode cpr-transfer".into())? == "");
    let cpr = target.cpr_socket();
    for (line, reason) in [
        ("migrate -d unix:main.sock".into(), "missing 'cpr' migration channel"),
        (format!("migrate -d file:x cpr=unix:{}", cpr.display()), "streamable transport"),
        (format!("migrate -d unix:main.sock {}", cpr.display()), "after the main channel comes cpr="),
        ("migrate -d unix:main.sock cpr=unix:nowhere".into(), "there is no socket 'nowhere'"),
        ("migrate -d unix:main.sock cpr=fd:nothing".into(), "named 'nothing' not found"),
    ] {
        let said = hmp(line)?;
        ensure!(said.as_str().is_some_and(|said| said.contains(reason)), "{said}");
    }
    ensure!(hmp(format!("migrate -d unix:main.sock cpr=unix:{}", cpr.display()))? == "");
    wait_for("the guest", PATIENCE, || (target.status().ok()? == "running").then_some(()))?;
    goes_on(&mut target, &guest)
}

#[test]
fn a_cancelled_transfer_leaves_the_guest_where_it_is() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let (mut source, guest) = start(1)?;
    let mut target = machine(1).target("defer").start()?;
    source.begin_transfer(&target.cpr_socket())?;
    wait_for("the guest's descriptors", PATIENCE, || (!target.cpr_socket().exists()).then_some(()))?;
    let second = machine(1).target("unix:m").start()?;
    let text = source.qmp().refused("migrate", Vmm::channels_to(&second.cpr_socket()))?.desc;
    ensure!(text == "There's a migration process in progress", "{text}");
    source.qmp().execute("migrate_cancel", json!({}))?;
    let info = source.qmp().execute("query-migrate", json!({}))?;
    ensure!(info["status"] == "cancelled", "{info}");
    ends_with(&mut target, "the source took the guest back")?;
    goes_on(&mut source, &guest)?;
    let mut second = second;
    source.transfer(&mut second)?;
    goes_on(&mut second, &guest)
}

#[test]
fn a_target_of_another_shape_says_why() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let (mut source, guest) = start(1)?;
    let other_id = machine(1).memory_args(&[
        "-object",
        "memory-backend-memfd,id=other,size=64M",
        "-machine",
        "memory-backend=other",
    ]);
    for (other, early, late) in [
        (
            machine(1).memory(96 << 20),
            "the guest has 67108864 bytes of RAM, the command line says 100663296",
            "has 67108864 bytes, the configuration says 100663296",
        ),
        (machine(2), "the guest has 1 vCPUs, the command line says 2", "vCPU"),
        (
            other_id,
            "the guest's RAM is memory backend 'ram0', the command line has 'other'",
            "did not arrive",
        ),
    ] {
        let mut other = other.target("unix:m").start()?;
        // It says so before it is given anything, and goes on waiting.
        source.set_preflight("require")?;
        source.begin_transfer(&other.cpr_socket())?;
        fails_with(
            &mut source,
            &guest,
            &format!("cpr-transfer preflight: the new program refuses: {early}"),
        )?;
        ensure!(other.status()? == "inmigrate" && other.cpr_socket().exists());
        // A source that goes on all the same hears of it once more.
        source.set_preflight("warn")?;
        source.begin_transfer(&other.cpr_socket())?;
        fails_with(&mut source, &guest, late)?;
        let info = source.qmp().execute("query-migrate", json!({}))?;
        let told = info["cpr"]["preflight"].as_str().unwrap_or_default();
        ensure!(told.starts_with("refused: the new program refuses: ") && told.contains(early), "{info}");
        ends_with(&mut other, late)?;
    }
    source.set_preflight("require")?;
    let mut good = target(1)?;
    source.transfer(&mut good)?;
    goes_on(&mut good, &guest)
}

#[test]
fn a_target_that_is_none_is_given_up() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let (mut source, guest) = start(1)?;
    let silent = source.path("silent");
    let _listener = UnixListener::bind(&silent)?;
    source.begin_transfer(&silent)?;
    fails_with(&mut source, &guest, "said nothing for 5s")?;
    let garbage = source.path("garbage");
    let listener = UnixListener::bind(&garbage)?;
    let talker = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut peer, _) = listener.accept()?;
        peer.write_all(&[b'x'; 4096])?;
        let mut rest = Vec::new();
        peer.read_to_end(&mut rest).map(drop)
    });
    source.begin_transfer(&garbage)?;
    fails_with(&mut source, &guest, "the peer speaks another protocol")?;
    let _ = talker.join();
    source.begin_transfer(&garbage)?;
    fails_with(&mut source, &guest, "nobody listens at")?;
    std::fs::remove_file(&garbage)?;
    let text = source.qmp().refused("migrate", Vmm::channels_to(&garbage))?.desc;
    ensure!(text.contains("there is no socket") && text.contains("start the target first"), "{text}");
    goes_on(&mut source, &guest)
}

#[test]
fn a_source_that_is_none_is_sent_away() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let (mut source, guest) = start(1)?;
    let mut target = target(1)?;
    // Somebody who only looks, somebody who talks nonsense, and somebody who says nothing while the source comes.
    drop(UnixStream::connect(target.cpr_socket())?);
    let mut nonsense = UnixStream::connect(target.cpr_socket())?;
    nonsense.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    let mut answer = Vec::new();
    // It ends with a reset, as not all of the nonsense was read.
    let _ = nonsense.read_to_end(&mut answer);
    ensure!(String::from_utf8_lossy(&answer).contains("another protocol"));
    ensure!(target.status()? == "inmigrate");
    let silent = UnixStream::connect(target.cpr_socket())?;
    source.begin_transfer(&target.cpr_socket())?;
    fails_with(&mut source, &guest, "another source is connected already")?;
    drop(silent);
    ensure!(target.status()? == "inmigrate");
    source.transfer(&mut target)?;
    goes_on(&mut target, &guest)
}

#[test]
fn a_killed_target_leaves_the_guest_where_it_is() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let (mut source, guest) = start(1)?;
    let target = machine(1).target("defer").start()?;
    source.begin_transfer(&target.cpr_socket())?;
    wait_for("the guest's descriptors", PATIENCE, || (!target.cpr_socket().exists()).then_some(()))?;
    process::send_signal(target.pid(), SIGKILL)?;
    fails_with(&mut source, &guest, "the target ended before it took over")?;
    drop(target);
    // One that was killed before leaves a path behind that nobody listens at.
    let target = machine(1).target("defer").start()?;
    let socket = target.cpr_socket();
    process::send_signal(target.pid(), SIGKILL)?;
    wait_for("the end of the target", PATIENCE, || {
        process::status_field(target.pid(), "State").is_ok_and(|state| state.starts_with('Z')).then_some(())
    })?;
    source.begin_transfer(&socket)?;
    fails_with(&mut source, &guest, "nobody listens at")
}

#[test]
fn a_killed_source_ends_its_target() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let (mut source, _guest) = start(1)?;
    let mut target = machine(1).target("defer").start()?;
    source.begin_transfer(&target.cpr_socket())?;
    wait_for("the guest's descriptors", PATIENCE, || (!target.cpr_socket().exists()).then_some(()))?;
    process::send_signal(source.pid(), SIGKILL)?;
    ends_with(&mut target, "the source ended before it gave the state")
}

#[test]
fn a_target_that_its_user_ends_leaves_the_guest_where_it_is() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let (mut source, guest) = start(1)?;
    let target = machine(1).target("defer").start()?;
    source.begin_transfer(&target.cpr_socket())?;
    wait_for("the guest's descriptors", PATIENCE, || (!target.cpr_socket().exists()).then_some(()))?;
    target.quit()?;
    fails_with(&mut source, &guest, "its user ended it")
}

#[test]
fn a_waiting_target_ends_by_a_signal_and_leaves_nothing_behind() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let mut target = machine(1).args(&["-pidfile", "pid"]).target("unix:m").start()?;
    ensure!(!target.path("pid").exists(), "the guest is not here");
    process::send_signal(target.pid(), SIGTERM)?;
    ensure!(target.wait_exit()? == Some(0), "{}", target.stderr());
    ensure!(!target.cpr_socket().exists() && !target.path("qmp").exists());
    Ok(())
}

#[test]
fn a_connection_that_came_by_getfd_will_do_and_the_pidfile_follows_the_guest() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let folder = tempfile::tempdir()?;
    let pidfile = folder.path().join("pid");
    let machine = || machine(1).args(&["-pidfile", &pidfile.display().to_string()]);
    let mut source = machine().start()?;
    let guest = source.guest()?;
    guest.fill(FILLED, SEED)?;
    let mut target = machine().target("memfd:").start()?;
    let pid_in_file = || -> anyhow::Result<u32> { Ok(std::fs::read_to_string(&pidfile)?.trim().parse()?) };
    ensure!(pid_in_file()? == source.pid());
    let connection = UnixStream::connect(target.cpr_socket())?;
    source.qmp().execute_with_fds("getfd", json!({ "fdname": "cpr" }), &[connection.as_fd()])?;
    drop(connection);
    let line = "migrate -d memfd: cpr=fd:cpr";
    source.qmp().execute("migrate-set-parameters", json!({ "mode": "cpr-transfer" }))?;
    source.qmp().execute("human-monitor-command", json!({ "command-line": line }))?;
    wait_for("the guest", PATIENCE, || (target.status().ok()? == "running").then_some(()))?;
    goes_on(&mut target, &guest)?;
    ensure!(!target.stderr().contains("is not used by this program"), "{}", target.stderr());
    source.quit()?;
    ensure!(pid_in_file()? == target.pid());
    target.quit()?;
    ensure!(!pidfile.exists());
    Ok(())
}

#[test]
fn a_path_of_a_living_listener_is_not_taken() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let mut first = target(1)?;
    let path = first.cpr_socket();
    let cpr = format!("cpr,addr.transport=socket,addr.type=unix,addr.path={}", path.display());
    let mut second = machine(1).args(&["-incoming", "defer", "-incoming", &cpr]).spawn()?;
    ends_with(&mut second, "is in use by a live process")?;
    ensure!(first.status()? == "inmigrate");
    ensure!(is_private(&path)?);
    first.quit()?;
    ensure!(!path.exists());
    Ok(())
}

fn is_private(path: &Path) -> anyhow::Result<bool> {
    use std::os::unix::fs::PermissionsExt;
    Ok(std::fs::metadata(path)?.permissions().mode() & 0o777 == 0o600)
}

/// What is typed comes back from the guest.
fn echo(line: &mut UnixStream) -> anyhow::Result<()> {
    line.write_all(b"hello")?;
    // Behind what it printed when it started.
    let mut said = Vec::new();
    while !said.ends_with(b"hello") {
        let mut byte = [0];
        line.read_exact(&mut byte)?;
        said.extend(byte);
    }
    Ok(())
}

#[test]
fn who_connects_to_the_serial_line_meanwhile_waits_for_the_guest() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let folder = tempfile::tempdir()?;
    let serial = folder.path().join("serial");
    let option = format!("unix:{},server=on,wait=off", serial.display());
    let machine = || machine(1).args(&["-serial", &option]);
    let mut source = machine().start()?;
    let guest = source.guest()?;
    guest.fill(FILLED, SEED)?;
    guest.run(Command::Echo { on: true })?;
    let connect = || -> anyhow::Result<UnixStream> {
        let line = UnixStream::connect(&serial)?;
        line.set_read_timeout(Some(PATIENCE))?;
        Ok(line)
    };
    // One that fails leaves them to the source, one that succeeds to the target.
    let mut target = machine().target("defer").start()?;
    source.begin_transfer(&target.cpr_socket())?;
    wait_for("the guest's descriptors", PATIENCE, || (!target.cpr_socket().exists()).then_some(()))?;
    let mut line = connect()?;
    ensure!(target.status()? == "inmigrate");
    source.qmp().execute("migrate_cancel", json!({}))?;
    ends_with(&mut target, "the source took the guest back")?;
    echo(&mut line)?;
    drop(line);
    let mut target = machine().target("defer").start()?;
    source.begin_transfer(&target.cpr_socket())?;
    wait_for("the guest's descriptors", PATIENCE, || (!target.cpr_socket().exists()).then_some(()))?;
    let mut line = connect()?;
    ensure!(source.status()? == "running" && target.status()? == "inmigrate");
    target.qmp().execute("migrate-incoming", json!({ "uri": "memfd:" }))?;
    echo(&mut line)?;
    goes_on(&mut target, &guest)
}

#[test]
fn the_serial_connection_moves_with_the_guest() -> anyhow::Result<()> {
    need_kvm!();
    let _alone = alone();
    let folder = tempfile::tempdir()?;
    let serial = folder.path().join("serial");
    let option = format!("unix:{},server=on,wait=off", serial.display());
    let machine = || machine(1).args(&["-serial", &option]);
    let mut source = machine().start()?;
    let mut line = UnixStream::connect(&serial)?;
    line.set_read_timeout(Some(PATIENCE))?;
    let guest = source.guest()?;
    guest.fill(FILLED, SEED)?;
    let mut target = machine().target("memfd:").start()?;
    source.transfer(&mut target)?;
    source.quit()?;
    goes_on(&mut target, &guest)?;
    guest.run(Command::Echo { on: true })?;
    echo(&mut line)?;
    // The listener moved as well: its path is neither stale nor gone.
    drop(line);
    std::thread::sleep(Duration::from_millis(50));
    let mut line = UnixStream::connect(&serial)?;
    line.set_read_timeout(Some(PATIENCE))?;
    echo(&mut line)?;
    target.quit()
}
