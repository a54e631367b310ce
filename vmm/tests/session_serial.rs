//! The serial line over updates: on pipes, a file, a socket, nothing, and shared with a monitor on one terminal.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::json;
use testkit::{Console, Gate, Guest, PATIENCE, Terminal, Vmm, VmmBuilder, need_kvm, pipes, wait_for};
use vmm_core::payload::Command;

const QUIET: Duration = Duration::from_millis(30);

fn print(guest: &Guest, number: u64) -> anyhow::Result<String> {
    guest.run(Command::Print { number })?;
    Ok(format!("beat {number}\n"))
}

fn echo_on(guest: &Guest) -> anyhow::Result<()> {
    guest.run(Command::Echo { on: true }).map(drop)
}

/// Prints before and after updates; gives what it printed.
fn print_over_updates(vmm: &mut Vmm, guest: &Guest) -> anyhow::Result<String> {
    let mut printed = String::new();
    for round in 0..3 {
        printed += &print(guest, round)?;
        if round == 0 {
            vmm.update_by_file()?
        } else {
            vmm.update()?
        };
        printed += &print(guest, 10 + round)?;
    }
    Ok(printed)
}

/// Types before and after updates, and expects all of it back.
fn echo_over_updates(vmm: &mut Vmm, guest: &Guest, console: &mut Console) -> anyhow::Result<()> {
    echo_on(guest)?;
    for round in 0..3 {
        console.type_keys(format!("before {round};"))?;
        vmm.update()?;
        console.type_keys(format!("after {round};"))?;
        assert_eq!(console.expect(&format!("before {round};after {round};"))?, "");
    }
    assert_eq!(console.rest(QUIET)?, "");
    Ok(())
}

#[test]
fn on_standard_input_and_output() -> anyhow::Result<()> {
    need_kvm!();
    let (stdio, mut console) = pipes()?;
    let mut vmm = VmmBuilder::new().args(&["-serial", "stdio"]).stdio(stdio).start()?;
    let guest = vmm.guest()?;
    let printed = print_over_updates(&mut vmm, &guest)?;
    assert_eq!(console.expect(&printed)?, "cpr payload: 1 vcpus\n");
    echo_over_updates(&mut vmm, &guest, &mut console)?;
    vmm.quit()?;
    assert!(console.to_end()?.ends_with("after 2;"));
    Ok(())
}

#[test]
fn on_a_file() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = VmmBuilder::new().args(&["-serial", "file:serial.log"]).start()?;
    let guest = vmm.guest()?;
    let printed = print_over_updates(&mut vmm, &guest)?;
    let path = vmm.path("serial.log");
    let log = || std::fs::read_to_string(&path).unwrap_or_default();
    let expected = format!("cpr payload: 1 vcpus\r\n{printed}");
    let _ = wait_for("the log", PATIENCE, || (log() == expected).then_some(()));
    assert_eq!(log(), expected, "a target adds to the file and does not begin it again");
    vmm.quit()
}

#[test]
fn on_a_socket_that_is_waited_for() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = VmmBuilder::new().args(&["-serial", "unix:serial,server=on"]).spawn()?;
    wait_for("its words", PATIENCE, || vmm.stderr().contains("waiting for connection").then_some(()))?;
    let mut console = Console::connect(&vmm.path("serial"))?;
    vmm.connect()?;
    let guest = vmm.guest()?;
    let printed = print_over_updates(&mut vmm, &guest)?;
    assert_eq!(console.expect(&printed)?, "cpr payload: 1 vcpus\n");
    echo_over_updates(&mut vmm, &guest, &mut console)?;
    // A client that leaves makes room for the next, which an update does not wait for.
    drop(console);
    vmm.update()?;
    let mut console = Console::connect(&vmm.path("serial"))?;
    wait_for("the new client", PATIENCE, || {
        let _ = console.type_keys(";");
        console.rest(QUIET).ok().filter(|echo| echo.contains(';'))
    })?;
    vmm.quit()
}

#[test]
fn output_that_a_full_socket_did_not_take_comes_once_its_client_reads() -> anyhow::Result<()> {
    need_kvm!();
    let vmm = VmmBuilder::new().args(&["-serial", "unix:serial,server=on,wait=off"]).start()?;
    let mut socket = UnixStream::connect(vmm.path("serial"))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let guest = vmm.guest()?;
    // Each byte is a packet of its own, of which a socket has room for some hundred.
    let printed: Vec<_> = (0..300).map(|number| print(&guest, number)).collect::<anyhow::Result<_>>()?;
    let printed = printed.concat();
    let mut seen = String::new();
    let mut bytes = [0; 4096];
    // Nobody else does anything: no monitor has a command, and the guest does not print.
    while !seen.ends_with(&printed) {
        let count = socket.read(&mut bytes)?;
        assert!(count > 0, "the line was closed after {seen:?}");
        seen.push_str(std::str::from_utf8(&bytes[..count])?);
    }
    vmm.quit()
}

#[test]
fn on_nothing() -> anyhow::Result<()> {
    need_kvm!();
    for serial in ["null", "none", "unix:serial,server=on,wait=off"] {
        let mut vmm = VmmBuilder::new().args(&["-serial", serial]).start()?;
        let guest = vmm.guest()?;
        print_over_updates(&mut vmm, &guest)?;
        guest.beats_on(0)?;
        vmm.quit()?;
    }
    Ok(())
}

#[test]
fn no_byte_is_lost_or_doubled_while_updates_go_on() -> anyhow::Result<()> {
    need_kvm!();
    let args = ["-serial", "unix:serial,server=on,wait=off"];
    let mut vmm = VmmBuilder::new().args(&args).start()?;
    let mut socket = UnixStream::connect(vmm.path("serial"))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let guest = vmm.guest()?;
    echo_on(&guest)?;
    // What the payload said at its start may be among the first bytes.
    socket.write_all(b"\0")?;
    let mut byte = [1];
    while byte[0] != 0 {
        socket.read_exact(&mut byte)?;
    }

    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let stream = std::thread::spawn(move || -> anyhow::Result<()> {
        // More under way than the port's FIFO holds, so that some of it always waits in every queue there is.
        const UNDER_WAY: u64 = 400;
        const AT_LEAST: u64 = 2000;
        let (mut sent, mut received) = (0_u64, 0_u64);
        let value = |at: u64| (at % 251) as u8;
        let mut buffer = [0; 4096];
        loop {
            let stop = stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Disconnected);
            let ending = stop && sent >= AT_LEAST;
            if !ending && sent - received < UNDER_WAY {
                let more: Vec<_> = (sent..received + UNDER_WAY).map(value).collect();
                socket.write_all(&more)?;
                sent += more.len() as u64;
            }
            if ending && sent == received {
                return Ok(());
            }
            let count = socket.read(&mut buffer)?;
            anyhow::ensure!(count > 0, "the connection ended after {received} bytes");
            for &byte in &buffer[..count] {
                anyhow::ensure!(byte == value(received), "byte {received} is {byte}");
                received += 1;
            }
        }
    });
    for round in 0..10 {
        if round % 3 == 0 {
            vmm.update_by_file()?
        } else {
            vmm.update()?
        };
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(stop);
    stream.join().expect("the stream does not panic")?;
    vmm.quit()
}

#[test]
fn input_waits_for_the_guest_wherever_it_is() -> anyhow::Result<()> {
    need_kvm!();
    let args = ["-serial", "unix:serial,server=on,wait=off"];
    let mut vmm = VmmBuilder::new().args(&args).start()?;
    let mut console = Console::connect(&vmm.path("serial"))?;
    let guest = vmm.guest()?;
    echo_on(&guest)?;
    console.type_keys(";")?;
    console.expect(";")?;
    let word = |at: u32| format!("{at:0200};");

    // Between the programs; in the target before it has the guest; in a guest that stands still.
    let gate = Gate::new(&vmm.path(""))?;
    let command = gate.command(&vmm.exec_command("defer"));
    vmm.set_exec(&command)?;
    vmm.qmp().execute("stop", json!({}))?;
    console.type_keys(word(1))?;
    vmm.qmp().execute("migrate", json!({ "uri": "memfd:" }))?;
    let held = gate.held()?;
    console.type_keys(word(2))?;
    held.release()?;
    wait_for("the target", PATIENCE, || vmm.status().ok().filter(|status| status == "inmigrate"))?;
    console.type_keys(word(3))?;
    assert_eq!(console.rest(QUIET)?, "");
    vmm.qmp().execute("migrate-incoming", json!({ "uri": "memfd:" }))?;
    console.type_keys(word(4))?;
    assert_eq!(vmm.status()?, "paused");
    assert_eq!(console.rest(QUIET)?, "");
    vmm.qmp().execute("cont", json!({}))?;
    let expected = (1..=4).map(word).collect::<String>();
    assert_eq!(console.expect(&expected)?, "");
    assert_eq!(console.rest(QUIET)?, "");
    vmm.quit()
}

const BANNER: &str =
    concat!("cpr-vmm ", env!("CARGO_PKG_VERSION"), " monitor - type 'help' for more information\n(qemu) ");
/// Ctrl-a.
const ESCAPE: &str = "\x01";

#[test]
fn a_terminal_is_shared_with_a_monitor() -> anyhow::Result<()> {
    need_kvm!();
    let (terminal, mut console) = Terminal::open()?;
    let cooked = terminal.modes()?;
    let mut vmm = VmmBuilder::new().args(&["-serial", "mon:stdio"]).stdio(terminal.stdio()).start()?;
    let guest = vmm.guest()?;
    echo_on(&guest)?;
    assert_eq!(console.expect("cpr payload: 1 vcpus\n")?, "");

    // The serial line has the terminal to begin with, control characters and all.
    console.type_keys("abc\x03")?;
    console.expect("abc\x03")?;
    console.type_keys(format!("{ESCAPE}h"))?;
    console.expect("Ctrl-a c    switch between serial console and monitor\n")?;
    console.type_keys(format!("{ESCAPE}{ESCAPE};"))?;
    console.expect(&format!("{ESCAPE};"))?;
    console.type_keys("before,")?;
    vmm.update()?;
    console.type_keys("after;")?;
    assert_eq!(console.expect("before,after;")?, "", "the new program's monitor keeps quiet meanwhile");

    // The way to the monitor, begun in one program and ended in the next.
    console.type_keys(ESCAPE)?;
    assert_eq!(console.rest(QUIET)?, "");
    vmm.update()?;
    console.type_keys("c")?;
    assert_eq!(console.expect(BANNER)?, "");
    console.type_line("info status")?;
    console.expect("VM status: running\n(qemu) ")?;
    console.type_keys("info st")?;
    console.expect("info st")?;
    vmm.update()?;
    assert_eq!(console.expect(BANNER)?, "\n");
    console.type_line("atus")?;
    console.expect("info status\nVM status: running\n(qemu) ")?;

    // And back.
    let printed = print(&guest, 5)?;
    console.expect(&printed)?;
    console.type_keys(format!("{ESCAPE}cdef"))?;
    console.expect("\ndef")?;
    console.type_keys(format!("{ESCAPE}x"))?;
    console.expect("cpr-vmm: Terminated\n")?;
    assert_eq!(vmm.wait_exit()?, Some(0), "{}", vmm.stderr());
    assert_eq!(terminal.modes()?, cooked);
    Ok(())
}

#[test]
fn nographic_is_the_same_with_a_shorter_name() -> anyhow::Result<()> {
    need_kvm!();
    let (terminal, mut console) = Terminal::open()?;
    let args =
        ["-nographic", "-object", "memory-backend-memfd,id=ram0,size=64M", "-machine", "memory-backend=ram0"];
    let mut vmm = VmmBuilder::new().only_args(&args).stdio(terminal.stdio()).spawn()?;
    let guest = vmm.guest()?;
    echo_on(&guest)?;
    console.expect("cpr payload: 1 vcpus\n")?;
    console.type_keys(format!("{ESCAPE}c"))?;
    console.expect(BANNER)?;
    console.type_line("migrate_set_parameter mode cpr-exec")?;
    console.expect("\n(qemu) ")?;
    let command = vmm.exec_command("memfd:").join(" ");
    console.type_line(&format!("migrate_set_parameter cpr-exec-command {command}"))?;
    console.expect("\n(qemu) ")?;
    // Away from the monitor before its command is done: the update leaves the terminal with the serial line.
    console.type_keys(format!("migrate -d memfd:\r{ESCAPE}c"))?;
    assert_eq!(console.expect("(qemu) \n")?, "migrate -d memfd:\n");
    console.type_keys("abc")?;
    wait_for("the new program", PATIENCE, || {
        let command = std::fs::read(format!("/proc/{}/cmdline", vmm.pid())).unwrap_or_default();
        String::from_utf8_lossy(&command).contains("-incoming").then_some(())
    })?;
    console.type_keys("def")?;
    console.expect("abcdef")?;
    console.type_keys(format!("{ESCAPE}c"))?;
    console.expect(BANNER)?;
    console.type_line("quit")?;
    assert_eq!(vmm.wait_exit()?, Some(0), "{}", vmm.stderr());
    Ok(())
}
