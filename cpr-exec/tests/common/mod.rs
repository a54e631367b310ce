//! The example `echo` as a process, with limits on everything that could hang.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use oslib::cloexec;
use oslib::pidfd::{Exit, PidFd};

/// How long anything may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// `O_CLOEXEC` as fdinfo shows it.
pub(crate) const CLOEXEC: u32 = 0o2000000;

/// The example, which `cargo test` builds next to the tests.
pub(crate) fn echo_program() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let path = own.ancestors().nth(2).unwrap().join("examples/echo");
    assert!(path.exists(), "{} is not built: cargo build -p cpr-exec --example echo", path.display());
    path
}

/// Waits until `condition` holds.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A process that is killed when the test ends, with its standard error in a file.
pub(crate) struct Process {
    pub(crate) child: Child,
    /// Where the program went on, if the one that should have replaced it failed.
    moved: Option<(u32, PidFd)>,
    stderr: File,
    /// Descriptors that this test has without close-on-exec, from whoever runs it; a child has them, too.
    inherited: Vec<i32>,
}

/// One at a time, so that no child gets the descriptors that are meant for another.
static SPAWN: Mutex<()> = Mutex::new(());

impl Process {
    pub(crate) fn spawn(command: &mut Command) -> Process {
        Process::spawn_passing(command, |_| {})
    }

    /// Spawns a process that inherits every descriptor that `each` shows to the visitor it is given.
    pub(crate) fn spawn_passing(command: &mut Command, each: impl Fn(&dyn Fn(BorrowedFd<'_>))) -> Process {
        let stderr = tempfile::tempfile().unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr.try_clone().unwrap());
        let _lock = SPAWN.lock().unwrap_or_else(PoisonError::into_inner);
        each(&|fd| cloexec::clear(fd).unwrap());
        let mut inherited = oslib::process::open_fds().unwrap();
        inherited.retain(|&fd| fd > 2 && flags(std::process::id(), fd).is_some_and(|f| f & CLOEXEC == 0));
        let child = command.spawn().unwrap();
        each(&|fd| cloexec::set(fd).unwrap());
        Process { child, moved: None, stderr, inherited }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.moved.as_ref().map_or(self.child.id(), |(pid, _)| *pid)
    }

    /// The program goes on in process `pid`; the one that it was in has ended. How, is the answer.
    pub(crate) fn follow(&mut self, pid: u32) -> Exit {
        assert_ne!(pid, self.pid());
        let left = self.moved.replace((pid, PidFd::open(pid).unwrap()));
        let left = left.map_or_else(|| PidFd::open(self.child.id()).unwrap(), |(_, pidfd)| pidfd);
        assert!(left.is_exited().unwrap(), "the process that was left still runs");
        left.reap().unwrap()
    }

    pub(crate) fn stderr(&mut self) -> String {
        let mut text = String::new();
        self.stderr.seek(SeekFrom::Start(0)).unwrap();
        self.stderr.read_to_string(&mut text).unwrap();
        text
    }

    /// Waits for the end of a process that is about to end, and gives its status, output and last words.
    pub(crate) fn end(mut self) -> (ExitStatus, String, String) {
        wait_until("the end of the process", || self.child.try_wait().unwrap().is_some());
        let mut stdout = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
        (self.child.wait().unwrap(), stdout, self.stderr())
    }

    pub(crate) fn is_running(&mut self) -> bool {
        match &self.moved {
            Some((_, pidfd)) => !pidfd.is_exited().unwrap(),
            None => self.child.try_wait().unwrap().is_none(),
        }
    }

    /// Each descriptor that it opened, and the standard streams, with its flags as open(2) and proc(5) have them.
    pub(crate) fn descriptors(&self) -> Vec<(i32, u32)> {
        let fds = oslib::process::open_fds_of(self.pid()).unwrap();
        let own = fds.into_iter().filter(|fd| !self.inherited.contains(fd));
        own.filter_map(|fd| Some((fd, flags(self.pid(), fd)?))).collect()
    }

    /// The blocked signals, as proc(5) tells them.
    pub(crate) fn blocked_signals(&self) -> String {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap().trim().to_owned()
    }

    /// The states and names of its children, zombies included.
    pub(crate) fn children(&self) -> Vec<String> {
        children_of(self.pid())
    }
}

/// The states and names of the children of process `pid`, zombies included.
pub(crate) fn children_of(pid: u32) -> Vec<String> {
    let mut children = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        // Processes come and go while this looks.
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        // "pid (name) state parent ...", where the name may hold anything.
        let Some((head, tail)) = stat.rsplit_once(") ") else { continue };
        let parent = tail.split(' ').nth(1).and_then(|parent| parent.parse().ok());
        if parent == Some(pid) {
            children.push(format!("{head}) {tail}"));
        }
    }
    children
}

fn flags(pid: u32, fd: i32) -> Option<u32> {
    let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).ok()?;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
    u32::from_str_radix(flags.trim(), 8).ok()
}

impl Drop for Process {
    fn drop(&mut self) {
        match &self.moved {
            Some((_, pidfd)) => {
                let _ = pidfd.send_signal(SIGKILL);
                let _ = pidfd.reap();
            }
            None => {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
        }
    }
}

/// signal(7).
pub(crate) const SIGKILL: i32 = 9;

/// The processes that hold the socket which listens to `port`.
fn listeners(port: u16) -> Vec<u32> {
    // proc_net_tcp(5): number, local address, peer, state (0A is listening), ... and the inode as the tenth field.
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let address = format!("0100007F:{port:04X}");
    let inode = table.lines().find_map(|line| {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        (fields[1] == address && fields[3] == "0A").then(|| fields[9])
    });
    let Some(socket) = inode.map(|inode| PathBuf::from(format!("socket:[{inode}]"))) else { return vec![] };
    let holds = |pid: u32| {
        let fds = oslib::process::open_fds_of(pid).unwrap_or_default();
        let mut links = fds.iter().map(|fd| std::fs::read_link(format!("/proc/{pid}/fd/{fd}")));
        links.any(|link| link.is_ok_and(|link| link == socket))
    };
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|&pid| holds(pid)).collect()
}

/// Descriptors of a server without clients: standard streams, epoll, listener, signals.
pub(crate) const IDLE: usize = 6;

/// A running echo server.
pub(crate) struct Echo {
    pub(crate) process: Process,
    pub(crate) port: u16,
}

impl Echo {
    pub(crate) fn start<A: AsRef<OsStr>>(args: &[A]) -> Echo {
        // A keeper whose parent has ended becomes a child of this process, which can see and reap it then.
        oslib::process::set_child_subreaper(true).unwrap();
        let mut process = Process::spawn(Command::new(echo_program()).args(args));
        let mut line = String::new();
        BufReader::new(process.child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let Ok(port) = line.trim().parse() else { panic!("{}", process.stderr()) };
        // It tells its port before its loop runs; an answer shows that all of it stands.
        assert_eq!(connect(port).ask("!generation"), "!generation 0");
        let echo = Echo { process, port };
        wait_until("the end of that connection", || echo.process.descriptors().len() == IDLE);
        echo
    }

    pub(crate) fn connect(&self) -> Client {
        connect(self.port)
    }

    /// After a failed update: the server is in another process now. Answers how the one that it left has ended.
    pub(crate) fn follow(&mut self) -> Exit {
        let listeners = listeners(self.port);
        let [pid] = listeners[..] else { panic!("{listeners:?}: {}", self.process.stderr()) };
        self.process.follow(pid)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // A test that ends amid an update: whoever goes on with the server then is a process that nobody knows.
        let deadline = Instant::now() + LIMIT;
        loop {
            let left = listeners(self.port);
            for pid in &left {
                let _ = PidFd::open(*pid).and_then(|process| process.send_signal(SIGKILL));
            }
            if left.is_empty() || Instant::now() > deadline {
                break;
            }
        }
    }
}

pub(crate) fn connect(port: u16) -> Client {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream.set_nodelay(true).unwrap();
    Client(BufReader::new(stream))
}

/// A client's end of a connection.
pub(crate) struct Client(pub(crate) BufReader<TcpStream>);

impl Client {
    pub(crate) fn send(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
    }

    /// The next line, without its end.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        assert_eq!(line.pop(), Some('\n'), "the connection ended at {line:?}");
        line
    }

    pub(crate) fn ask(&mut self, line: &str) -> String {
        self.send(&format!("{line}\n"));
        self.line()
    }
}
