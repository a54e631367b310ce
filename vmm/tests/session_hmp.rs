//! The session that a person has at the HMP monitor, typed at the real binary over a terminal and over plain pipes.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use testkit::{Console, Gate, Guest, Qmp, Terminal, Vmm, VmmBuilder, binary, need_kvm, pipes};

const BANNER: &str =
    concat!("cpr-vmm ", env!("CARGO_PKG_VERSION"), " monitor - type 'help' for more information\n(qemu) ");
/// What a user types, but for the program's name.
const SEED: [&str; 8] = [
    "-monitor",
    "stdio",
    "-object",
    "memory-backend-memfd,id=ram0,size=1G",
    "-machine",
    "memory-backend=ram0",
    "-machine",
    "aux-ram-share=on",
];

/// A `cpr-vmm` that is found through PATH, as a user's is.
fn from_path(args: &[&str]) -> VmmBuilder {
    let folder = binary().parent().expect("a file is in a folder").to_owned();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(folder).chain(std::env::split_paths(&path));
    let path = std::env::join_paths(folders).expect("a PATH that came from PATH");
    VmmBuilder::new().binary("cpr-vmm").env("PATH", path).only_args(args)
}

/// What is typed for `cpr-exec-command`.
fn exec_command(args: &[&str], incoming: &str) -> String {
    format!("cpr-vmm {} -incoming {incoming}", args.join(" "))
}

fn command_line(pid: u32) -> String {
    String::from_utf8_lossy(&std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default())
        .replace('\0', " ")
}

/// The session of the cover letter, and its transcript.
fn seed_session(stdio: [Arc<OwnedFd>; 2], mut console: Console) -> anyhow::Result<()> {
    let mut vmm = from_path(&SEED).stdio(stdio).spawn()?;
    console.expect(BANNER)?;
    let guest = vmm.guest()?;
    guest.fill(8 << 20, 1)?;

    let command = exec_command(&SEED, "file:vm.state");
    let before = [
        "info status",
        "migrate_set_parameter mode cpr-exec",
        &format!("migrate_set_parameter cpr-exec-command {command}"),
        "migrate -d file:vm.state",
    ];
    for (at, line) in before.iter().enumerate() {
        if at > 0 {
            console.expect("(qemu) ")?;
        }
        console.type_line(line)?;
        console.expect(line)?;
    }
    console.expect(BANNER)?;
    assert_eq!(command_line(vmm.pid()).trim_end(), command, "the process is the new program");
    console.type_line("info status")?;
    console.expect("VM status: running\n(qemu) ")?;
    guest.beats_on(0)?;
    guest.verify(8 << 20, 1)?;
    console.type_line("quit")?;
    assert_eq!(vmm.wait_exit()?, Some(0), "{}", vmm.stderr());
    drop(vmm);

    let [status, mode, command, migrate] = before;
    let expected = format!(
        "{BANNER}{status}\nVM status: running\n(qemu) {mode}\n(qemu) {command}\n(qemu) {migrate}\n\
         (qemu) {BANNER}info status\nVM status: running\n(qemu) quit\n"
    );
    let transcript = console.to_end()?;
    assert_eq!(transcript, expected);
    Ok(())
}

#[test]
fn the_seed_session_works_word_for_word_at_a_terminal() -> anyhow::Result<()> {
    need_kvm!();
    let (terminal, console) = Terminal::open()?;
    let stdio = terminal.stdio();
    drop(terminal);
    seed_session(stdio, console)
}

#[test]
fn the_seed_session_works_word_for_word_over_pipes() -> anyhow::Result<()> {
    need_kvm!();
    let (stdio, console) = pipes()?;
    seed_session(stdio, console)
}

/// A monitor on a terminal.
struct Session {
    vmm: Vmm,
    guest: Guest,
    terminal: Terminal,
    console: Console,
    args: Vec<String>,
}

impl Session {
    fn start(extra: &[&str]) -> anyhow::Result<Session> {
        let (terminal, mut console) = Terminal::open()?;
        let mut args: Vec<_> = ["-monitor", "stdio", "-machine", "memory-backend=ram0"].to_vec();
        args.extend(["-object", "memory-backend-memfd,id=ram0,size=64M"]);
        args.extend(["-qmp", "unix:qmp,server=on,wait=off"]);
        args.extend(extra);
        let vmm = from_path(&args).stdio(terminal.stdio()).spawn()?;
        console.expect(BANNER)?;
        let guest = vmm.guest()?;
        let args = args.into_iter().map(String::from).collect();
        let mut session = Session { vmm, guest, terminal, console, args };
        session.ask("migrate_set_parameter mode cpr-exec")?;
        Ok(session)
    }

    /// Types a line and gives what it prints.
    fn ask(&mut self, line: &str) -> anyhow::Result<String> {
        self.console.type_line(line)?;
        self.console.expect(&format!("{line}\n"))?;
        self.console.expect("(qemu) ")
    }

    fn exec_command(&self, incoming: &str) -> String {
        exec_command(&self.args.iter().map(String::as_str).collect::<Vec<_>>(), incoming)
    }

    fn set_command(&mut self, incoming: &str) -> anyhow::Result<()> {
        let command = self.exec_command(incoming);
        let printed = self.ask(&format!("migrate_set_parameter cpr-exec-command {command}"))?;
        assert_eq!(printed, "");
        Ok(())
    }

    /// Updates at the terminal, up to the new program's prompt.
    fn update(&mut self) -> anyhow::Result<()> {
        self.set_command("memfd:")?;
        self.console.type_line("migrate -d memfd:")?;
        self.console.expect(BANNER)?;
        self.guest.beats_on(0).map(drop)
    }

    fn quit(mut self) -> anyhow::Result<()> {
        self.console.type_line("quit")?;
        assert_eq!(self.vmm.wait_exit()?, Some(0), "{}", self.vmm.stderr());
        Ok(())
    }
}

#[test]
fn under_incoming_defer_the_monitor_says_when() -> anyhow::Result<()> {
    need_kvm!();
    let mut session = Session::start(&[])?;
    for (to, from) in [("file:vm.state", "file:vm.state"), ("memfd:", "memfd:")] {
        session.guest.fill(8 << 20, 2)?;
        session.set_command("defer")?;
        session.console.type_line(&format!("migrate -d {to}"))?;
        session.console.expect(BANNER)?;
        assert_eq!(session.ask("info status")?, "VM status: paused (inmigrate)\n");
        assert_eq!(session.ask("cont")?, "Error: Guest is waiting for an incoming migration\n");
        let refused = session.ask("migrate memfd:")?;
        assert_eq!(refused, "Error: Guest is waiting for an incoming migration\n");
        // The old program runs it, however long its user takes.
        session.guest.beats_on(0)?;
        assert_eq!(session.ask(&format!("migrate_incoming {from}"))?, "");
        assert_eq!(session.ask("info status")?, "VM status: running\n");
        session.guest.beats_on(0)?;
        session.guest.verify(8 << 20, 2)?;
        let again = session.ask("migrate_incoming memfd:")?;
        assert!(again.starts_with("Error: '-incoming' was not specified"), "{again}");
    }
    session.quit()
}

#[test]
fn migrate_without_d_prompts_in_the_new_program_only() -> anyhow::Result<()> {
    need_kvm!();
    let mut session = Session::start(&[])?;
    session.set_command("memfd:")?;
    session.console.type_line("migrate memfd:")?;
    assert_eq!(session.console.expect(BANNER)?, "migrate memfd:\n");
    session.guest.beats_on(0)?;
    let info = session.ask("info migrate")?;
    for needle in ["Status: \t\tcompleted", "mode=cpr-exec, generation=1", "Blackout (us):", "restore:"] {
        assert!(info.contains(needle), "no {needle:?} in {info}");
    }
    // An update that is refused gives the prompt back in the old one.
    session.ask("migrate_set_parameter cpr-exec-command /no/such/program")?;
    let refused = session.ask("migrate memfd:")?;
    assert_eq!(refused, "Error: cpr-exec-command: program \"/no/such/program\" was not found\n");
    session.quit()
}

#[test]
fn a_half_typed_line_and_the_history_outlive_an_update() -> anyhow::Result<()> {
    need_kvm!();
    let mut session = Session::start(&["-name", "somebody"])?;
    session.ask("info name")?;
    let mut qmp = Qmp::connect(&session.vmm.path("qmp"))?;
    let command = session.exec_command("memfd:");
    let mut update = |session: &mut Session| -> anyhow::Result<()> {
        let words: Vec<_> = command.split(' ').collect();
        let parameters = serde_json::json!({ "cpr-exec-command": words });
        qmp.execute("migrate-set-parameters", parameters)?;
        qmp.execute("migrate", serde_json::json!({ "uri": "memfd:" }))?;
        session.console.expect(BANNER)?;
        Ok(())
    };

    session.console.type_keys("info sta")?;
    session.console.expect("info sta")?;
    update(&mut session)?;
    session.console.expect("info sta")?;
    session.console.type_line("tus")?;
    assert_eq!(session.console.expect("VM status: running\n(qemu) ")?, "tus\n");

    // The key Up, cut in two by an update: first the line that was typed across the last one, then the one before.
    session.console.type_keys("\x1b")?;
    update(&mut session)?;
    session.console.type_keys("[A")?;
    session.console.expect("info status")?;
    session.console.type_keys("\x1b[A\r")?;
    session.console.expect("somebody\n(qemu) ")?;

    // A cursor in the middle of a line stays there.
    session.console.type_keys("info e\x1b[D")?;
    session.console.expect("info e")?;
    update(&mut session)?;
    session.console.type_line("nam")?;
    session.console.expect("somebody\n(qemu) ")?;
    session.quit()
}

#[test]
fn the_terminal_is_given_back_as_it_was_found() -> anyhow::Result<()> {
    need_kvm!();
    let (terminal, _console) = Terminal::open()?;
    let cooked = terminal.modes()?;
    drop(terminal);

    let mut session = Session::start(&[])?;
    let raw = session.terminal.modes()?;
    assert_ne!(raw, cooked);
    for _ in 0..3 {
        session.update()?;
        assert_eq!(session.terminal.modes()?, raw);
    }
    session.console.type_line("quit")?;
    assert_eq!(session.vmm.wait_exit()?, Some(0));
    assert_eq!(session.terminal.modes()?, cooked);
    Ok(())
}

#[test]
fn a_start_that_fails_gives_the_terminal_back() -> anyhow::Result<()> {
    need_kvm!();
    let (terminal, _console) = Terminal::open()?;
    let cooked = terminal.modes()?;
    let args = ["-monitor", "stdio", "-kernel", "/no/such/kernel"];
    let mut vmm = from_path(&args).stdio(terminal.stdio()).spawn()?;
    assert_eq!(vmm.wait_exit()?, Some(1));
    assert!(vmm.stderr().contains("/no/such/kernel"), "{}", vmm.stderr());
    assert_eq!(terminal.modes()?, cooked);

    // A target that cannot load the guest, wherever on its way it finds out, makes room for the program that could; and
    // that one gives the terminal back.
    for (wrong, because) in [("id=other,size=64M", "guest RAM 'other'"), ("id=ram0,size=64M -smp 2", "vCPUs")]
    {
        let mut session = Session::start(&[])?;
        let mut command = session.exec_command("memfd:").replace("id=ram0,size=64M", wrong);
        if wrong.contains("other") {
            command = command.replace("memory-backend=ram0", "memory-backend=other");
        }
        session.ask(&format!("migrate_set_parameter cpr-exec-command {command}"))?;
        session.ask("migrate_set_parameter cpr-preflight off")?;
        // It waits, and is told the end.
        session.console.type_line("migrate memfd:")?;
        session.console.expect(because)?;
        session.console.expect("(qemu) ")?;
        assert_ne!(session.terminal.modes()?, cooked, "the editor needs a raw terminal");
        session.console.type_line("quit")?;
        assert_eq!(session.vmm.wait_exit()?, Some(0));
        assert_eq!(session.terminal.modes()?, cooked);
    }
    Ok(())
}

#[test]
fn a_target_without_the_monitor_leaves_the_terminal_alone() -> anyhow::Result<()> {
    need_kvm!();
    let (terminal, _console) = Terminal::open()?;
    let cooked = terminal.modes()?;
    let mut session = Session::start(&[])?;
    let command = session.exec_command("memfd:").replace("-monitor stdio ", "");
    session.ask(&format!("migrate_set_parameter cpr-exec-command {command}"))?;
    session.console.type_line("migrate -d memfd:")?;
    let mut qmp = Qmp::connect(&session.vmm.path("qmp"))?;
    testkit::wait_for("the new program", testkit::PATIENCE, || {
        let info = qmp.execute("query-migrate", serde_json::json!({})).ok()?;
        (info["cpr"]["generation"] == 1).then_some(())
    })?;
    session.guest.beats_on(0)?;
    assert_eq!(session.terminal.modes()?, cooked);
    qmp.execute("quit", serde_json::json!({}))?;
    assert_eq!(session.vmm.wait_exit()?, Some(0));
    Ok(())
}

#[test]
fn what_is_typed_during_an_update_is_answered_once_by_the_new_program() -> anyhow::Result<()> {
    need_kvm!();
    let mut session = Session::start(&["-name", "before"])?;
    let gate = Gate::new(session.vmm.path("").as_path())?;
    let new = session.exec_command("memfd:").replace("-name before", "-name after");
    let words: Vec<_> = new.split(' ').map(String::from).collect();
    let quoted: Vec<_> = gate.command(&words).iter().map(|word| format!("'{word}'")).collect();
    session.ask(&format!("migrate_set_parameter cpr-exec-command {}", quoted.join(" ")))?;

    // Ahead: behind a command that waits for the end of the update, and while neither program is there to read.
    session.console.type_keys("migrate memfd:\rinfo name\r")?;
    let held = gate.held()?;
    session.console.type_keys("info name\rinfo status\rinfo na")?;
    assert_eq!(session.console.rest(Duration::from_millis(50))?, "migrate memfd:\n", "nobody answers now");
    held.release()?;
    session.console.expect(BANNER)?;
    session.console.type_keys("me\r")?;
    let once = "info name\nafter\n(qemu) ";
    let expected = format!("{once}{once}info status\nVM status: running\n(qemu) {once}");
    assert_eq!(session.console.expect(&expected)?, "");
    assert_eq!(session.console.rest(Duration::from_millis(50))?, "");
    session.guest.beats_on(0)?;
    session.quit()
}

#[test]
fn a_session_over_a_socket_stays_connected() -> anyhow::Result<()> {
    need_kvm!();
    let mut vmm = VmmBuilder::new().args(&["-monitor", "unix:hmp,server=on,wait=off"]).start()?;
    let guest = vmm.guest()?;
    let mut console = Console::connect(&vmm.path("hmp"))?;
    console.expect(BANNER)?;
    for by_file in [true, false] {
        console.type_keys("info sta")?;
        console.expect("info sta")?;
        if by_file {
            vmm.update_by_file()?
        } else {
            vmm.update()?
        };
        console.expect(BANNER)?;
        console.expect("info sta")?;
        console.type_keys("\t\n")?;
        console.expect("VM status: running\n(qemu) ")?;
        guest.beats_on(0)?;
    }
    // The next client begins afresh.
    drop(console);
    let mut console = Console::connect(&vmm.path("hmp"))?;
    console.expect(BANNER)?;
    console.type_line("quit")?;
    assert!(console.to_end()?.ends_with("(qemu) quit\n"));
    assert_eq!(vmm.wait_exit()?, Some(0));
    Ok(())
}
