//! QMP over updates: connections stay, every command gets exactly one reply, events come in order.

use std::io::{ErrorKind, PipeReader, Read};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::{Gate, PATIENCE, Qmp, Vmm, VmmBuilder, need_kvm, process, wait_for};

/// Long enough for a message that should not come.
const QUIET: Duration = Duration::from_millis(50);

fn second_monitor(name: &str) -> String {
    format!("unix:{name},server=on,wait=off")
}

/// Everything that the connection says until something pleases, that included.
fn messages_until(qmp: &mut Qmp, pleases: impl Fn(&Value) -> bool) -> anyhow::Result<Vec<Value>> {
    let deadline = Instant::now() + PATIENCE;
    let mut messages = Vec::new();
    while !messages.last().is_some_and(&pleases) {
        let left = deadline.saturating_duration_since(Instant::now());
        match qmp.try_read(left)? {
            Some(message) => messages.push(message),
            None => anyhow::bail!("no more after {messages:#?}"),
        }
    }
    Ok(messages)
}

/// A message in short: `STOP`, `MIGRATION active`, `reply 3`, `error 3`.
fn brief(message: &Value) -> String {
    if let Some(event) = message["event"].as_str() {
        let status = message["data"]["status"].as_str();
        return status.map_or(event.to_owned(), |status| format!("{event} {status}"));
    }
    let what = if message.get("error").is_some() { "error" } else { "reply" };
    assert!(message.get("return").is_some() || what == "error", "neither reply nor event: {message}");
    format!("{what} {}", message["id"])
}

fn is_migration(status: &'static str) -> impl Fn(&Value) -> bool {
    move |message| message["event"] == "MIGRATION" && message["data"]["status"] == status
}

fn want_events(qmp: &mut Qmp) -> anyhow::Result<()> {
    let events = json!([{ "capability": "events", "state": true }]);
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": events })).map(drop)
}

fn set_command(vmm: &mut Vmm, incoming: &str) -> anyhow::Result<()> {
    let command = vmm.exec_command(incoming);
    vmm.set_exec(&command)
}

/// Sets a command that stops at a gate between the programs.
fn set_gated(vmm: &mut Vmm) -> anyhow::Result<Gate> {
    let gate = Gate::new(&vmm.path(""))?;
    let command = gate.command(&vmm.exec_command("memfd:"));
    vmm.set_exec(&command)?;
    Ok(gate)
}

#[test]
fn one_connection_sees_the_whole_update_in_order() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = VmmBuilder::new().start()?;
    let guest = vmm.guest()?;
    want_events(vmm.qmp())?;
    for uri in ["memfd:", "file:vm.state", "memfd:"] {
        set_command(&mut vmm, uri)?;
        let id = vmm.qmp().send("migrate", json!({ "uri": uri }))?;
        let messages = messages_until(vmm.qmp(), is_migration("completed"))?;
        let order: Vec<_> = messages.iter().map(brief).collect();
        let reply = format!("reply {id}");
        let expected = [
            &reply,
            "MIGRATION setup",
            "MIGRATION active",
            "STOP",
            "MIGRATION device",
            "RESUME",
            "MIGRATION completed",
        ];
        assert_eq!(order, expected);
        let times: Vec<_> = messages
            .iter()
            .filter_map(|message| message.get("timestamp"))
            .map(|time| (time["seconds"].as_u64(), time["microseconds"].as_u64()))
            .collect();
        assert!(times.is_sorted(), "{messages:#?}");
        assert_eq!(vmm.status()?, "running");
        guest.beats_on(0)?;
    }
    let capabilities = vmm.qmp().execute("query-migrate-capabilities", json!({}))?;
    assert_eq!(
        capabilities,
        json!([{ "capability": "events", "state": true }, { "capability": "x-ignore-shared", "state": false }])
    );
    vmm.quit()
}

#[test]
fn requests_around_an_update_are_answered_once_each() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = VmmBuilder::new().args(&["-qmp", &second_monitor("qmp2")]).start()?;
    let guest = vmm.guest()?;
    let mut other = Qmp::connect(&vmm.path("qmp2"))?;
    let gate = set_gated(&mut vmm)?;

    // On one connection requests stand behind `migrate` in the same packet; on the other a request is cut in two.
    let request = |id: &str, command: &str| format!(r#"{{"execute":"{command}","id":"{id}"}}"#);
    other.send_raw(request("b1", "query-name").as_bytes())?;
    let (head, tail) = r#"{"execute":"query-status","arguments":{},"id":"b2"}"#.split_at(21);
    other.send_raw(head.as_bytes())?;
    let migrate = r#"{"execute":"migrate","arguments":{"uri":"memfd:"},"id":"a1"}"#;
    let packet = [migrate, &request("a2", "query-version"), &request("a3", "no-such-command")].concat();
    vmm.qmp().send_raw(packet.as_bytes())?;

    let held = gate.held()?;
    // While neither program is there.
    for at in 4..20 {
        vmm.qmp().send_raw(request(&format!("a{at}"), "query-status").as_bytes())?;
    }
    other.send_raw(&tail.as_bytes()[..9])?;
    held.release()?;
    other.send_raw(&tail.as_bytes()[9..])?;
    other.send_raw(request("b3", "query-status").as_bytes())?;

    let messages = messages_until(vmm.qmp(), |message| message["id"] == "a19")?;
    let replies = messages.iter().filter(|message| message.get("event").is_none()).map(brief);
    let expected = (1..20).map(|at| if at == 3 { "error \"a3\"".into() } else { format!("reply \"a{at}\"") });
    assert_eq!(replies.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
    for message in messages.iter().filter(|message| message["id"].as_str() > Some("a3")) {
        let status = &message["return"]["status"];
        assert!(message["id"] == "a4" || message.get("event").is_some() || status == "running", "{message}");
    }
    let messages = messages_until(&mut other, |message| message["id"] == "b3")?;
    let order: Vec<_> = messages.iter().map(brief).collect();
    assert_eq!(order, ["reply \"b1\"", "STOP", "RESUME", "reply \"b2\"", "reply \"b3\""]);
    assert_eq!(messages[3]["return"]["status"], "running");
    for qmp in [vmm.qmp(), &mut other] {
        assert_eq!(qmp.try_read(QUIET)?, None);
    }
    guest.beats_on(0)?;
    vmm.quit()
}

#[test]
fn every_socket_keeps_its_own_session() -> anyhow::Result<()> {
    need_kvm!();
    let mut builder = VmmBuilder::new();
    for name in ["silent", "idle", "busy"] {
        builder = builder.args(&["-qmp", &second_monitor(name)]);
    }
    let mut vmm = builder.start()?;
    let mut silent = Qmp::connect_only(&vmm.path("silent"))?;
    let mut busy = Qmp::connect(&vmm.path("busy"))?;
    // A second client of a socket waits in the listener's queue until the first has gone.
    let queued = std::os::unix::net::UnixStream::connect(vmm.path("busy"))?;
    vmm.update()?;
    vmm.update_by_file()?;

    // Connected before, negotiated after: one greeting only, and no event before the negotiation.
    assert_eq!(silent.try_read(QUIET)?, None);
    let error = silent.refused("query-status", json!({}))?;
    assert_eq!(error.class, "CommandNotFound");
    silent.execute("qmp_capabilities", json!({}))?;
    silent.execute("query-status", json!({}))?;
    assert!(silent.take_events().is_empty());

    // Nobody before, somebody after.
    Qmp::connect(&vmm.path("idle"))?.execute("query-status", json!({}))?;
    wait_for("a second client's turn", PATIENCE, || Qmp::connect(&vmm.path("idle")).ok())?;

    for name in ["STOP", "RESUME", "STOP", "RESUME"] {
        busy.event(name)?;
    }
    assert_eq!(busy.refused("qmp_capabilities", json!({}))?.class, "CommandNotFound");
    drop(busy);
    queued.set_read_timeout(Some(PATIENCE))?;
    let mut greeting = [0; 7];
    (&queued).read_exact(&mut greeting)?;
    assert_eq!(&greeting, b"{\"QMP\":");
    vmm.quit()
}

#[test]
fn the_target_may_have_other_monitors() -> anyhow::Result<()> {
    need_kvm!();
    // The order of the options changes, one monitor goes, another comes.
    let mut vmm = VmmBuilder::new().args(&["-qmp", &second_monitor("gone")]).start()?;
    let guest = vmm.guest()?;
    let mut gone = Qmp::connect(&vmm.path("gone"))?;
    let mut command = vmm.exec_command("memfd:");
    let at = command.iter().position(|word| word.contains("gone")).expect("it is there");
    command.drain(at - 1..=at);
    command.splice(1..1, ["-qmp".to_owned(), second_monitor("new")]);
    vmm.set_exec(&command)?;
    vmm.migrate("memfd:")?;
    guest.beats_on(0)?;
    assert_eq!(vmm.status()?, "running");
    gone.event("STOP")?;
    gone.events_to_the_end()?;
    let mut new = Qmp::connect(&vmm.path("new"))?;
    let labels = new.execute("query-chardev", json!({}))?;
    let files: Vec<_> = labels.as_array().into_iter().flatten().map(|entry| &entry["filename"]).collect();
    assert_eq!(files.len(), 2, "{labels}");
    vmm.quit()
}

#[test]
fn descriptors_that_a_client_sent_survive() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = VmmBuilder::new().start()?;
    let ((named, named_end), (unclaimed, unclaimed_end)) = (std::io::pipe()?, std::io::pipe()?);
    let no_fd = vmm.qmp().refused("getfd", json!({ "fdname": "none" }))?;
    assert!(no_fd.desc.contains("SCM_RIGHTS"), "{no_fd}");
    vmm.qmp().execute_with_fds("getfd", json!({ "fdname": "named" }), &[named_end.as_fd()])?;
    vmm.qmp().execute_with_fds("query-status", json!({}), &[unclaimed_end.as_fd()])?;
    drop((named_end, unclaimed_end));
    vmm.update()?;
    vmm.update()?;

    // At its end a pipe is readable: as long as it is not, the program has the other side.
    let at_end = |reader: &PipeReader| oslib::stream::is_readable(reader);
    assert!(!at_end(&named)? && !at_end(&unclaimed)?);
    vmm.qmp().execute("getfd", json!({ "fdname": "claimed" }))?;
    vmm.update()?;
    assert!(!at_end(&named)? && !at_end(&unclaimed)?);
    for (name, mut reader) in [("named", named), ("claimed", unclaimed)] {
        vmm.qmp().execute("closefd", json!({ "fdname": name }))?;
        wait_for("the descriptor's end", PATIENCE, || at_end(&reader).ok().filter(|end| *end))?;
        assert_eq!(reader.read(&mut [0])?, 0);
        let error = vmm.qmp().refused("closefd", json!({ "fdname": name }))?;
        assert!(error.desc.contains(name), "{error}");
    }
    vmm.quit()
}

#[test]
fn people_can_type_through_qmp() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = VmmBuilder::new().args(&["-name", "guest=somebody"]).start()?;
    let guest = vmm.guest()?;
    let human = |vmm: &mut Vmm, line: &str| -> anyhow::Result<String> {
        let text = vmm.qmp().execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(human(&mut vmm, "info status")?, "VM status: running\r\n");
    assert_eq!(human(&mut vmm, "info name")?, "somebody\r\n");
    assert_eq!(human(&mut vmm, "nonsense")?, "unknown command: 'nonsense'\r\n");
    for topic in [
        "chardev",
        "cpus",
        "kvm",
        "memdev",
        "migrate",
        "migrate_capabilities",
        "migrate_parameters",
        "uuid",
        "version",
    ] {
        let text = human(&mut vmm, &format!("info {topic}"))?;
        assert!(text.ends_with("\r\n") || topic == "migrate", "info {topic}: {text:?}");
        assert!(!text.contains("unknown"), "info {topic}: {text:?}");
    }
    set_command(&mut vmm, "memfd:")?;
    let text = human(&mut vmm, "migrate memfd:")?;
    assert_eq!(text, "terminal does not allow synchronous migration, continuing detached\r\n");
    vmm.qmp().event("RESUME")?;
    guest.beats_on(0)?;
    wait_for("the report", PATIENCE, || {
        human(&mut vmm, "info migrate").ok().filter(|text| text.contains("Blackout (us)"))
    })?;
    vmm.quit()
}

#[test]
fn queries_have_the_shape_of_qemus() -> anyhow::Result<()> {
    need_kvm!();
    let uuid = "12345678-9abc-4def-8123-456789abcdef";
    let args = ["-name", "somebody", "-uuid", uuid, "-pidfile", "pid", "-serial", "null"];
    let mut vmm = VmmBuilder::new().cpus(2).args(&args).start()?;
    let guest = vmm.guest()?;
    for _ in 0..2 {
        let pid = vmm.pid();
        let pidfile = std::fs::read_to_string(vmm.path("pid"))?;
        assert_eq!(pidfile, format!("{pid}\n"));
        let thread_exists = |id: &Value| std::path::Path::new(&format!("/proc/{pid}/task/{id}")).exists();
        let qmp = vmm.qmp();
        let mut query = |name: &str| qmp.execute(name, json!({}));

        let version = query("query-version")?;
        assert!(version["qemu"]["major"].is_u64() && version["qemu"]["micro"].is_u64(), "{version}");
        assert!(version["package"].as_str().is_some_and(|name| name.starts_with("cpr-vmm ")), "{version}");
        assert_eq!(query("query-status")?, json!({ "running": true, "status": "running" }));
        assert_eq!(query("query-kvm")?, json!({ "enabled": true, "present": true }));
        assert_eq!(query("query-name")?, json!({ "name": "somebody" }));
        assert_eq!(query("query-uuid")?, json!({ "UUID": uuid }));

        let commands = query("query-commands")?;
        let commands: Vec<_> =
            commands.as_array().into_iter().flatten().map(|entry| entry["name"].as_str()).collect();
        for name in ["migrate", "migrate-incoming", "migrate_cancel", "query-cpus-fast", "getfd", "quit"] {
            assert!(commands.contains(&Some(name)), "{name} is not in {commands:?}");
        }

        let cpus = query("query-cpus-fast")?;
        assert_eq!(cpus.as_array().map(Vec::len), Some(2));
        for (index, cpu) in cpus.as_array().into_iter().flatten().enumerate() {
            assert_eq!(cpu["cpu-index"], index);
            assert_eq!(cpu["target"], "x86_64");
            assert!(cpu["qom-path"].is_string() && thread_exists(&cpu["thread-id"]), "{cpu}");
        }

        let chardevs = query("query-chardev")?;
        let mut entries = chardevs.as_array().into_iter().flatten();
        let entry = entries.find(|entry| entry["label"] == "serial0").cloned().unwrap_or_default();
        assert_eq!(entry, json!({ "label": "serial0", "filename": "null", "frontend-open": true }));
        let entry = chardevs[0].clone();
        assert!(entry["filename"].as_str().is_some_and(|name| name.starts_with("unix:")), "{entry}");
        assert_eq!(entry["frontend-open"], true);

        let memdev = query("query-memdev")?;
        let (id, size, share) = (&memdev[0]["id"], &memdev[0]["size"], &memdev[0]["share"]);
        assert_eq!((id, size, share), (&json!("ram0"), &json!(64 << 20), &json!(true)));

        let parameters = query("query-migrate-parameters")?;
        assert!(parameters["mode"].is_string() && parameters["cpr-exec-command"].is_array(), "{parameters}");
        let capabilities = query("query-migrate-capabilities")?;
        assert_eq!(
            capabilities,
            json!([{ "capability": "events", "state": false }, { "capability": "x-ignore-shared", "state": false }])
        );

        let info = vmm.update()?;
        assert_eq!(info["status"], "completed");
        for key in ["total-time", "setup-time", "downtime"] {
            assert!(info[key].is_u64(), "{info}");
        }
        assert_eq!(info["cpr"]["mode"], "cpr-exec");
        let us = |value: &Value| value.as_u64().unwrap_or(0);
        let blackout = us(&info["cpr"]["blackout-us"]);
        assert!(blackout > 0 && blackout <= us(&info["downtime"]) * 1000, "{info}");
        for phase in info["cpr"]["phases"].as_array().into_iter().flatten() {
            assert!(phase["name"].is_string() && phase["us"].is_u64(), "{info}");
        }
        guest.beats_on(0)?;
    }
    let error = vmm.qmp().refused("no-such-command", json!({}))?;
    assert_eq!((error.class.as_str(), error.desc.contains("no-such-command")), ("CommandNotFound", true));
    let error = vmm.qmp().refused("stop", json!({ "now": true }))?;
    assert!(error.desc.contains("'now'"), "{error}");
    let pidfile = vmm.path("pid");
    vmm.quit()?;
    assert!(!pidfile.exists());
    Ok(())
}

#[test]
fn stop_cont_and_reset() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = VmmBuilder::new().args(&["-S"]).start()?;
    assert_eq!(vmm.status()?, "prelaunch");
    vmm.qmp().execute("cont", json!({}))?;
    vmm.qmp().event("RESUME")?;
    let guest = vmm.guest()?;

    let stands_still = |vmm: &mut Vmm| -> anyhow::Result<()> {
        assert_eq!(vmm.status()?, "paused");
        let beats = guest.vcpu(0).beats();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(guest.vcpu(0).beats(), beats);
        Ok(())
    };
    vmm.qmp().execute("stop", json!({}))?;
    vmm.qmp().event("STOP")?;
    stands_still(&mut vmm)?;
    vmm.qmp().execute("stop", json!({}))?;
    vmm.qmp().execute("cont", json!({}))?;
    guest.beats_on(0)?;
    vmm.qmp().execute("cont", json!({}))?;
    vmm.qmp().event("RESUME")?;
    assert_eq!(vmm.qmp().take_events(), Vec::<Value>::new());

    // A reset boots the guest again, before and after an update.
    for update in [false, true] {
        if update {
            vmm.update()?;
            vmm.qmp().event("RESUME")?;
        }
        let beats = guest.vcpu(0).beats();
        vmm.qmp().execute("system_reset", json!({}))?;
        let reset = vmm.qmp().event("RESET")?;
        assert_eq!(reset["data"], json!({ "guest": false, "reason": "host-qmp-system-reset" }));
        wait_for("the guest's second life", PATIENCE, || (guest.vcpu(0).beats() < beats).then_some(()))?;
        wait_for("the payload", PATIENCE, || guest.header().is_ready().then_some(()))?;
        guest.beats_on(0)?;
        assert_eq!(vmm.status()?, "running");
    }

    vmm.qmp().execute("quit", json!({}))?;
    let events = vmm.qmp().events_to_the_end()?;
    let last = events.last().cloned().unwrap_or_default();
    assert_eq!(brief(&last), "SHUTDOWN");
    assert_eq!(last["data"], json!({ "guest": false, "reason": "host-qmp-quit" }));
    assert_eq!(vmm.wait_exit()?, Some(0));
    assert!(!vmm.path("qmp").exists(), "the socket's path stays");
    Ok(())
}

#[test]
fn a_paused_guest_stays_paused_over_updates() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = VmmBuilder::new().start()?;
    let guest = vmm.guest()?;
    guest.fill(8 << 20, 3)?;
    vmm.qmp().execute("stop", json!({}))?;
    want_events(vmm.qmp())?;
    let (beats, ram) = (guest.vcpu(0).beats(), guest.snapshot()?);
    vmm.qmp().take_events();
    for round in 0..3 {
        if round == 1 {
            vmm.update_by_file()?
        } else {
            vmm.update()?
        };
        assert_eq!(vmm.status()?, "paused");
        let events: Vec<_> = vmm.qmp().take_events().iter().map(brief).collect();
        let statuses = ["setup", "active", "device", "completed"].map(|name| format!("MIGRATION {name}"));
        assert_eq!(events, statuses, "nothing stopped, nothing resumed");
        assert_eq!(guest.vcpu(0).beats(), beats);
        assert!(guest.snapshot()? == ram, "the memory of a guest that stood still has changed");
    }
    vmm.qmp().execute("cont", json!({}))?;
    guest.beats_on(0)?;
    guest.verify(8 << 20, 3)?;
    assert_eq!(vmm.status()?, "running");

    // A guest that never ran goes on as one.
    let mut vmm = VmmBuilder::new().args(&["-S"]).start()?;
    vmm.update()?;
    assert_eq!(vmm.status()?, "prelaunch");
    vmm.qmp().execute("cont", json!({}))?;
    vmm.guest()?.beats_on(0)?;
    vmm.quit()
}

#[test]
fn an_update_may_wait_for_migrate_incoming() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = VmmBuilder::new().start()?;
    let guest = vmm.guest()?;
    want_events(vmm.qmp())?;
    let state = vmm.path("vm.state").display().to_string();
    let channels = json!([{ "channel-type": "main", "addr": { "transport": "file", "filename": state } }]);
    for arguments in [json!({ "uri": "memfd:" }), json!({ "channels": channels })] {
        set_command(&mut vmm, "defer")?;
        vmm.qmp().execute("migrate", arguments.clone())?;
        wait_for("the target", PATIENCE, || vmm.status().ok().filter(|status| status == "inmigrate"))?;
        for command in ["cont", "system_reset"] {
            let error = vmm.qmp().refused(command, json!({}))?;
            assert!(error.desc.contains("incoming migration"), "{command}: {error}");
        }
        // The old program runs it, however long its user takes.
        guest.beats_on(0)?;
        vmm.qmp().take_events();
        vmm.qmp().execute("migrate-incoming", arguments)?;
        vmm.qmp().event("RESUME")?;
        vmm.qmp().event_where("MIGRATION", |data| data["status"] == "completed")?;
        assert_eq!(vmm.status()?, "running");
        guest.beats_on(0)?;
    }
    vmm.quit()
}

#[test]
fn a_client_that_leaves_during_an_update_is_not_missed() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = VmmBuilder::new().args(&["-qmp", &second_monitor("qmp2")]).start()?;
    let guest = vmm.guest()?;
    let leaving = Qmp::connect(&vmm.path("qmp2"))?;
    let gate = set_gated(&mut vmm)?;
    vmm.qmp().execute("migrate", json!({ "uri": "memfd:" }))?;
    let held = gate.held()?;
    drop(leaving);
    // In the queue of a listener that nobody accepts from.
    let early = std::os::unix::net::UnixStream::connect(vmm.path("qmp2"))?;
    early.set_read_timeout(Some(QUIET))?;
    let nothing = (&early).read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(nothing, Err(ErrorKind::WouldBlock));
    held.release()?;
    early.set_read_timeout(Some(PATIENCE))?;
    assert_eq!((&early).read(&mut [0])?, 1, "its greeting");
    guest.beats_on(0)?;
    assert_eq!(vmm.status()?, "running");
    vmm.quit()
}

#[test]
fn a_client_that_leaves_as_an_update_begins_makes_room_for_the_next() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = VmmBuilder::new().args(&["-qmp", &second_monitor("qmp2")]).start()?;
    set_command(&mut vmm, "memfd:")?;
    let leaving = Qmp::connect(&vmm.path("qmp2"))?;
    // The main loop finds both in one round: the end of one connection, and the request on the other.
    process::send_signal(vmm.pid(), process::SIGSTOP)?;
    drop(leaving);
    let id = vmm.qmp().send("migrate", json!({ "uri": "memfd:" }))?;
    process::send_signal(vmm.pid(), process::SIGCONT)?;
    vmm.qmp().reply(id)?;
    vmm.qmp().event("RESUME")?;
    Qmp::connect(&vmm.path("qmp2"))?.execute("query-status", json!({}))?;
    vmm.quit()
}
