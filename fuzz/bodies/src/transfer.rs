//! What comes over the cpr channel, in both directions: bytes and descriptors, as a peer sends them that keeps no rules.
//!
//! Behind a first byte an input is a list of what is sent at once: how many descriptors (the top bit: no message, but plain
//! bytes), how many bytes (u16), which descriptors, and the bytes. Then the peer is gone, so that nobody waits for it.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use cpr_core::error::BoxError;
use cpr_core::frame::{FrameWriter, sealed_memfd, to_body};
use cpr_core::preflight::{Asked, Manifest, SectionCatalogue};
use cpr_core::{
    Attempt, Control, CprMode, FdKind, FdPolicy, FdRegistry, HandOver, Incoming, Prepared, Services,
    StateWriter,
};
use cpr_transfer::{CprTransfer, Endpoint, Listener, TransferArrival, VERSION};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use oslib::eventfd::EventFd;
use oslib::memfd::Memfd;
use oslib::pidfd::PidFd;
use oslib::scm::{self, Limits, RecvError};

use crate::early::{ACTIVITY, REGISTRY, UPDATE};
use crate::{EPOCH, main_frame};

pub(crate) const WORDS: &[&str] = &["CPRS", "HELO", "MANI", "VERD", "INTR", "NOPE"];

/// Longer than anything here takes: nobody is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// Of a count of descriptors: what follows is sent without the framing of a message.
const PLAIN: u8 = 0x80;

/// What a descriptor can be.
#[derive(Clone, Copy)]
enum Kind {
    Early,
    EarlyTwice,
    Control,
    Published,
    Main,
    Manifest,
    Verdict,
    Memfd,
    Doorbell,
    Blocking,
    Process,
    Null,
    Socket,
}

impl Kind {
    const ALL: [Kind; 13] = [
        Kind::Early,
        Kind::EarlyTwice,
        Kind::Control,
        Kind::Published,
        Kind::Main,
        Kind::Manifest,
        Kind::Verdict,
        Kind::Memfd,
        Kind::Doorbell,
        Kind::Blocking,
        Kind::Process,
        Kind::Null,
        Kind::Socket,
    ];

    fn of(byte: u8) -> Kind {
        Kind::ALL[usize::from(byte) % Kind::ALL.len()]
    }

    fn open(self) -> Result<OwnedFd, BoxError> {
        Ok(match self {
            Kind::Early => sealed_memfd("early", &early([0, 1]))?,
            Kind::EarlyTwice => sealed_memfd("early", &early([1, 1]))?,
            Kind::Control => Control::create(EPOCH)?.fd().try_clone()?,
            Kind::Published => {
                let control = Control::create(EPOCH)?;
                control.rendezvous().publish_state();
                control.fd().try_clone()?
            }
            Kind::Main => sealed_memfd("main", &main_frame::writer().finish(EPOCH))?,
            Kind::Manifest => {
                let mut frame = FrameWriter::default();
                shown().put_into(&mut frame)?;
                sealed_memfd("manifest", &frame.finish(EPOCH))?
            }
            Kind::Verdict => {
                let mut frame = FrameWriter::default();
                catalogue().judge(&shown(), []).put_into(&mut frame)?;
                sealed_memfd("verdict", &frame.finish(EPOCH))?
            }
            Kind::Memfd => Memfd::new("memfd").len(64).create()?,
            Kind::Doorbell => EventFd::new()?.as_fd().try_clone_to_owned()?,
            Kind::Blocking => EventFd::blocking()?.as_fd().try_clone_to_owned()?,
            Kind::Process => ended_process()?,
            Kind::Null => File::open("/dev/null")?.into(),
            Kind::Socket => UnixStream::pair()?.0.into(),
        })
    }
}

/// A process that may be killed, because it has ended.
fn ended_process() -> Result<OwnedFd, BoxError> {
    static ENDED: OnceLock<OwnedFd> = OnceLock::new();
    let ended = ENDED.get_or_init(|| {
        let mut child = Command::new("true").stdin(Stdio::null()).spawn().expect("true(1)");
        let process = PidFd::open(child.id()).expect("a child");
        child.wait().expect("a child ends");
        process.as_fd().try_clone_to_owned().expect("a descriptor")
    });
    Ok(ended.try_clone()?)
}

/// Two descriptors, at these places of the message.
fn early(places: [u64; 2]) -> Vec<u8> {
    let entry = |id: usize| ("other", id as u64, FdKind::Other, FdPolicy::MayBeRebuilt, places[id]);
    let mut early = FrameWriter::default();
    early.put(REGISTRY, 0, 1, to_body(&vec![entry(0), entry(1)])).expect("a good name");
    early.put_value(UPDATE, 0, 1, &("cpr-transfer", 3_u64)).expect("a good name");
    early.finish(EPOCH)
}

fn shown() -> Manifest {
    let shown = Manifest::default().section("machine", 0, 1..=1).section(REGISTRY, 0, 1..=1);
    shown.section(UPDATE, 0, 1..=1).section(ACTIVITY, 0, 1..=1)
}

fn catalogue() -> SectionCatalogue {
    cpr_transfer::catalogue().requires("machine", 1..=3)
}

/// Sends what the input says, and no more. The other end may have enough of it before.
fn send(socket: &UnixStream, mut input: &[u8]) {
    while let [count, low, high, rest @ ..] = input {
        let descriptors = usize::from(count & !PLAIN).min(rest.len());
        let (kinds, rest) = rest.split_at(descriptors);
        let (bytes, rest) = rest.split_at(usize::from(u16::from_le_bytes([*low, *high])).min(rest.len()));
        input = rest;
        let fds: Vec<OwnedFd> =
            kinds.iter().map(|&kind| Kind::of(kind).open().expect("a descriptor")).collect();
        let sent = if count & PLAIN == 0 {
            scm::send(socket, bytes, &fds.iter().map(AsFd::as_fd).collect::<Vec<BorrowedFd<'_>>>())
        } else {
            let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
            let rights = [ControlMessage::ScmRights(&numbers)];
            let control = if numbers.is_empty() { &[] } else { &rights[..] };
            let flags = MsgFlags::MSG_NOSIGNAL;
            sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None)
                .map(drop)
                .map_err(Into::into)
        };
        if sent.is_err() {
            break;
        }
    }
    socket.shutdown(std::net::Shutdown::Write).expect("a socket of this process");
}

/// One piece of an input: a message with these descriptors.
fn message(kind: &[u8; 4], body: &[u8], fds: &[Kind]) -> Vec<u8> {
    let length = u16::try_from(kind.len() + body.len()).expect("a short message").to_le_bytes();
    let kinds: Vec<u8> = fds.iter().map(|&kind| kind as u8).collect();
    [&[fds.len() as u8], &length[..], &kinds, kind, body].concat()
}

fn hello(fds: &[Kind]) -> Vec<u8> {
    message(b"HELO", &VERSION.to_le_bytes(), fds)
}

/// A target that waits for its source, and the address where it does.
fn listening() -> &'static (SocketAddr, Mutex<Listener>) {
    static LISTENING: OnceLock<(SocketAddr, Mutex<Listener>)> = OnceLock::new();
    LISTENING.get_or_init(|| {
        let address = SocketAddr::from_abstract_name(format!("fuzz-bodies-{}", std::process::id()));
        let address = address.expect("a short name");
        let socket = UnixListener::bind_addr(&address).expect("a name of this process");
        let listener = Listener::from_fd(socket.into()).expect("it listens").patience(PATIENCE);
        (address, Mutex::new(listener.answering(|manifest| catalogue().judge(manifest, []))))
    })
}

/// What a source sends, heard by a target: which then has an update, or waits for the next source. Whatever it answers is a
/// message.
pub fn transfer_source(data: &[u8]) -> bool {
    let Some((_, input)) = data.split_first() else { return false };
    let (address, listener) = listening();
    let mut listener = listener.lock().unwrap_or_else(PoisonError::into_inner);
    let source = UnixStream::connect_addr(address).expect("it listens");
    source.set_read_timeout(Some(PATIENCE)).expect("a limit");
    send(&source, input);
    let arrival = listener.poll().expect("the listener itself is well");
    assert!(listener.wait().deadline.is_none(), "a source that is gone is not waited for");
    let mut good = arrival.is_some();
    if let Some(arrival) = arrival {
        go_on(arrival);
    }
    loop {
        match scm::recv(&source, Limits { max_payload: 4096, max_fds: 1 }) {
            Ok(answer) => good |= answer.payload.starts_with(b"VERD"),
            Err(RecvError::Closed | RecvError::Io(_)) => return good,
            Err(error) => panic!("the target sent no message: {error}"),
        }
    }
}

/// Does what a target does that finds its source gone.
fn go_on(TransferArrival { arrival, source }: TransferArrival) {
    let _ = source.check().map_err(|error| error.to_string());
    let _ = source.main().read_main().map_err(|error| error.to_string());
    match Incoming::begin(&mut Services::default(), arrival) {
        Ok(incoming) => incoming.abandon(),
        Err(error) => drop(error.to_string()),
    }
    source.refuse("enough");
}

pub(crate) fn transfer_source_seeds() -> Vec<Vec<u8>> {
    let introduction = |control, main| {
        let own = [Kind::Early, control, main, Kind::Doorbell, Kind::Process];
        message(b"INTR", &2_u32.to_le_bytes(), &[&own[..], &[Kind::Memfd, Kind::Null]].concat())
    };
    let manifest = || message(b"MANI", &[], &[Kind::Manifest]);
    vec![
        [vec![0], hello(&[]), introduction(Kind::Control, Kind::Memfd)].concat(),
        [vec![0], hello(&[]), introduction(Kind::Published, Kind::Main)].concat(),
        [vec![0], hello(&[]), manifest()].concat(),
        [vec![0], hello(&[]), manifest(), introduction(Kind::Control, Kind::Memfd)].concat(),
    ]
}

/// What a target sends, heard by a source, which asks it beforehand if the first byte is odd. It comes as far as the
/// introduction, or gives the target up; it waits for nobody who is gone.
pub fn transfer_target(data: &[u8]) -> bool {
    let Some((&how, input)) = data.split_first() else { return false };
    let (target, theirs) = UnixStream::pair().expect("two sockets");
    send(&target, input);
    let registry = FdRegistry::default();
    let fd = Arc::new(Kind::Null.open().expect("/dev/null"));
    registry.save("fd", 0, FdKind::Other, FdPolicy::MayBeRebuilt, &fd).expect("the only one");
    let control = Control::create(EPOCH).expect("a control page");
    let attempt = Attempt { control: &control, registry: &registry };
    let mut mode = CprTransfer::new(Endpoint::Connected(theirs)).time_limits(PATIENCE, PATIENCE, None);
    let introduced = introduce(&mut mode, &attempt, how & 1 != 0);
    if introduced.is_ok() {
        let ended = mode.await_target(&attempt).err().or_else(|| hand_over(&mut mode, &attempt).err());
        ended.expect("a target that is gone cannot take over").to_string();
    }
    mode.roll_back(&attempt);
    introduced.map_err(|error| error.to_string()).is_ok()
}

fn introduce(mode: &mut CprTransfer, attempt: &Attempt<'_>, asks: bool) -> Result<(), BoxError> {
    mode.check()?;
    if asks {
        match mode.preflight(attempt, &shown())? {
            Asked::Accepted(_) => {}
            Asked::Refused(reason) => return Err(reason.into()),
            Asked::Nobody | Asked::Wait(_) => panic!("it was asked, and is gone"),
        }
    }
    match mode.prepare(attempt)? {
        Prepared::Ready => {}
        Prepared::Wait(_) => panic!("it is gone"),
    }
    mode.introduce(attempt, StateWriter::default()).map(drop)
}

fn hand_over(mode: &mut CprTransfer, attempt: &Attempt<'_>) -> Result<HandOver, BoxError> {
    mode.hand_over(attempt, StateWriter::default())
}

pub(crate) fn transfer_target_seeds() -> Vec<Vec<u8>> {
    let verdict = || message(b"VERD", &[], &[Kind::Verdict]);
    let refusal = || message(b"NOPE", b"not today", &[]);
    vec![
        [vec![0], hello(&[Kind::Process])].concat(),
        [vec![0], hello(&[Kind::Process]), verdict(), refusal()].concat(),
        [vec![1], hello(&[Kind::Process]), verdict()].concat(),
        [vec![1], hello(&[Kind::Process]), verdict(), refusal()].concat(),
    ]
}
