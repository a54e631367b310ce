//! The example `echo` as a process, with limits on everything that could hang.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take.
pub const LIMIT: Duration = Duration::from_secs(60);

/// The example, which `cargo test` builds next to the tests.
pub fn echo_program() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let path = own.ancestors().nth(2).unwrap().join("examples/echo");
    assert!(path.exists(), "{} is not built: cargo build -p cpr-exec --example echo", path.display());
    path
}

/// Waits until `condition` holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A process that is killed when the test ends, with its standard error in a file.
pub struct Process {
    pub child: Child,
    stderr: File,
}

impl Process {
    pub fn spawn(command: &mut Command) -> Process {
        let stderr = tempfile::tempfile().unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr.try_clone().unwrap())
            .spawn()
            .unwrap();
        Process { child, stderr }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn stderr(&mut self) -> String {
        let mut text = String::new();
        self.stderr.seek(SeekFrom::Start(0)).unwrap();
        self.stderr.read_to_string(&mut text).unwrap();
        text
    }

    /// Waits for the end of a process that is about to end, and gives its status, output and last words.
    pub fn end(mut self) -> (ExitStatus, String, String) {
        wait_until("the end of the process", || self.child.try_wait().unwrap().is_some());
        let mut stdout = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
        (self.child.wait().unwrap(), stdout, self.stderr())
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Each open descriptor with its flags (octal, open(2)) as proc(5) tells them; 2000000 is close-on-exec.
    pub fn descriptors(&self) -> Vec<(i32, String)> {
        let flags = |fd| {
            let info = std::fs::read_to_string(format!("/proc/{}/fdinfo/{fd}", self.pid())).unwrap();
            info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim().to_owned()
        };
        oslib::process::open_fds_of(self.pid()).unwrap().into_iter().map(|fd| (fd, flags(fd))).collect()
    }

    /// The blocked signals, as proc(5) tells them.
    pub fn blocked_signals(&self) -> String {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap().trim().to_owned()
    }

    /// The states and names of its children, zombies included.
    pub fn children(&self) -> Vec<String> {
        let mut children = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            // Processes come and go while this looks.
            let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
            // "pid (name) state parent ...", where the name may hold anything.
            let Some((head, tail)) = stat.rsplit_once(") ") else { continue };
            let parent = tail.split(' ').nth(1).and_then(|parent| parent.parse().ok());
            if parent == Some(self.pid()) {
                children.push(format!("{head}) {tail}"));
            }
        }
        children
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A running echo server.
pub struct Echo {
    pub process: Process,
    pub port: u16,
}

impl Echo {
    pub fn start<A: AsRef<OsStr>>(args: &[A]) -> Echo {
        let mut process = Process::spawn(Command::new(echo_program()).args(args));
        let mut line = String::new();
        BufReader::new(process.child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let Ok(port) = line.trim().parse() else { panic!("{}", process.stderr()) };
        Echo { process, port }
    }

    pub fn connect(&self) -> Client {
        connect(self.port)
    }
}

pub fn connect(port: u16) -> Client {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream.set_nodelay(true).unwrap();
    Client(BufReader::new(stream))
}

/// A client's end of a connection.
pub struct Client(pub BufReader<TcpStream>);

impl Client {
    pub fn send(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
    }

    /// The next line, without its end.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        assert_eq!(line.pop(), Some('\n'), "the connection ended at {line:?}");
        line
    }

    pub fn ask(&mut self, line: &str) -> String {
        self.send(&format!("{line}\n"));
        self.line()
    }
}
