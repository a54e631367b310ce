//! The programs at the other end: targets as processes, and whatever else may answer or connect.

use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use cpr_core::error::BoxError;
use cpr_core::{Incoming, Services};
use cpr_transfer::{Listener, TransferArrival};
use oslib::scm;

use crate::machine::Machine;

/// What a started process does; absent in the one that starts the scenarios.
pub(crate) const ROLE: &str = "CPR_TRANSFER_TEST_ROLE";
const SOCKET: &str = "CPR_TRANSFER_TEST_SOCKET";
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// Of the targets with peers that say nothing.
const SHORT: Duration = Duration::from_secs(2);
/// A user that is not root.
pub(crate) const NOBODY: u32 = 65534;

/// A target, ended with its scenario.
pub(crate) struct Target {
    child: Child,
    pub(crate) socket: PathBuf,
    _folder: tempfile::TempDir,
}

impl Target {
    /// Starts one, and waits until it listens.
    pub(crate) fn start(role: &str) -> Target {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("cpr");
        open_to_all(folder.path());
        let child = spawn(role, &socket);
        let end = Instant::now() + PATIENCE;
        // A path is there a moment before somebody listens. The target sees somebody who only looks.
        while UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < end, "the target does not listen");
            std::thread::sleep(Duration::from_millis(1));
        }
        Target { child, socket, _folder: folder }
    }

    /// How it ended: by an exit code, or `None` by a signal.
    pub(crate) fn exit_code(&mut self) -> Option<i32> {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < end, "the target does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn open_to_all(folder: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o777)).unwrap();
}

fn spawn(role: &str, socket: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap()).env(ROLE, role).env(SOCKET, socket).spawn().unwrap()
}

/// Runs another user's source against `socket`, and gives its exit code.
pub(crate) fn stranger(socket: &Path) -> Option<i32> {
    open_to_all(socket);
    spawn("stranger", socket).wait().unwrap().code()
}

/// The program of a started process.
pub(crate) fn act(role: &str) -> Result<(), BoxError> {
    let socket = PathBuf::from(std::env::var_os(SOCKET).ok_or("no socket")?);
    if role.ends_with("stranger") {
        nix::unistd::setuid(NOBODY.into())?;
    }
    if role == "stranger" {
        let mut stream = UnixStream::connect(&socket)?;
        let answer = refusal(&mut stream);
        return answer.contains("belongs to user 65534").then_some(()).ok_or_else(|| answer.into());
    }
    let mut listener = Listener::bind(&socket)?.patience(SHORT);
    let catalogue = cpr_transfer::catalogue().claims("ram", 0).claims("other", 0).requires("others", 1..=1);
    listener = match role {
        "asked" => {
            let catalogue = catalogue.requires("machine", 1..=3);
            listener.answering(move |manifest| catalogue.judge(manifest, []))
        }
        "asked-other" => listener.answering(move |manifest| catalogue.judge(manifest, [])),
        _ => listener,
    };
    let TransferArrival { arrival, source } = listener.receive(PATIENCE)?;
    drop(listener);
    let mut services = Services::default();
    let mut incoming = Incoming::begin(&mut services, arrival)?;
    let mut machine = Machine::empty(&services);
    machine.build(incoming.early())?;
    match role {
        "die" => std::process::exit(3),
        "hang" => loop {
            std::thread::sleep(PATIENCE);
        },
        "refuse" => {
            source.refuse("not today");
            return Ok(());
        }
        "slow" => {
            let end = Instant::now() + PATIENCE;
            while source.check().is_ok() && Instant::now() < end {
                incoming.control().rendezvous().note_progress();
                std::thread::sleep(Duration::from_millis(2));
            }
            source.check()?;
        }
        _ => {}
    }
    incoming.load(&mut machine, &mut *source.main())?;
    match role {
        "die-loaded" => std::process::exit(3),
        "refuse-loaded" => {
            source.refuse("not this state");
            return Ok(());
        }
        _ => {}
    }
    assert_eq!(machine.in_state, 7);
    incoming.commit(&mut machine)?;
    source.release()?;
    machine.beat();
    Ok(())
}

/// What a target says to somebody who may not, or cannot, talk to it.
pub(crate) fn refusal(stream: &mut UnixStream) -> String {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut said = Vec::new();
    // It may end with a reset.
    let _ = stream.read_to_end(&mut said);
    String::from_utf8_lossy(&said).into_owned()
}

pub(crate) fn say(stream: &UnixStream, kind: &[u8; 4], number: u32, fds: &[BorrowedFd<'_>]) {
    scm::send(stream, &[&kind[..], &number.to_le_bytes()].concat(), fds).unwrap();
}

/// A listener that answers the first connection with `answer`, and keeps it until it ends.
pub(crate) fn answering(
    answer: impl FnOnce(&UnixStream) + Send + 'static,
) -> (PathBuf, tempfile::TempDir, std::thread::JoinHandle<()>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cpr");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        answer(&stream);
        let _ = stream.read_to_end(&mut Vec::new());
    });
    (path, folder, thread)
}

/// Writes what is no message.
pub(crate) fn garbage(mut stream: &UnixStream) {
    let _ = stream.write_all(&[b'x'; 4096]);
}
