#![allow(unsafe_code, reason = "the ioctls of tun(4) take pointers")]
//! Network interfaces whose other end is a descriptor: taps.
//!
//! One descriptor is one queue of an interface. Packets are read and written whole, each with a `virtio_net_hdr` before it
//! (`IFF_VNET_HDR`) and without packet information (`IFF_NO_PI`). What a call changes here, it changes for the interface,
//! which outlives neither its last descriptor (unless it was made persistent) nor its namespace; so a program that goes on
//! with a descriptor of another only asks ([`interface`], [`vnet_header_len`], [`is_nonblocking`]). The kernel's
//! `Documentation/networking/tuntap.rst` and `linux/if_tun.h` are the source of truth.

use std::ffi::c_int;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use bitflags::bitflags;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// Where taps come from.
const DEVICE: &str = "/dev/net/tun";
/// Bytes of an interface's name, with the zero at its end (`IFNAMSIZ`).
const NAME_LEN: usize = 16;

/// Flags of a queue, as TUNSETIFF takes and TUNGETIFF tells them. They are 16 bits wide there.
const TAP: u16 = libc::IFF_TAP as u16;
const NO_PI: u16 = libc::IFF_NO_PI as u16;
const VNET_HDR: u16 = libc::IFF_VNET_HDR as u16;
const MULTI_QUEUE: u16 = libc::IFF_MULTI_QUEUE as u16;
const ATTACH_QUEUE: u16 = libc::IFF_ATTACH_QUEUE as u16;
/// Not in libc.
const DETACH_QUEUE: u16 = 0x0400;

bitflags! {
    /// What the reader of a tap takes over from the network stack (`TUN_F_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Offloads: u32 {
        /// Packets without a checksum.
        const CSUM = libc::TUN_F_CSUM;
        /// TCP over IPv4 that was not cut into segments.
        const TSO4 = libc::TUN_F_TSO4;
        /// TCP over IPv6 that was not cut into segments.
        const TSO6 = libc::TUN_F_TSO6;
        /// Either of them with congestion notification bits.
        const TSO_ECN = libc::TUN_F_TSO_ECN;
        /// UDP that was not cut into fragments. Accepted, but without effect on current kernels.
        const UFO = libc::TUN_F_UFO;
    }
}

/// What the kernel says of a tap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Whether it can have several queues.
    pub multi_queue: bool,
    /// Whether this queue takes part: packets are steered to it.
    pub attached: bool,
}

/// Why there is no tap, or why it does not do what it is told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    /// There is no driver for taps, or it is out of reach.
    #[error(
        "{DEVICE} cannot be opened: load the module 'tun', give the container that device, or pass an open tap by fd="
    )]
    Device {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No interface can have this name.
    #[error(
        "{name:?} is no name for an interface: it has 1 to 15 bytes, without slash, colon and white space"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// The interface cannot be opened, or not be made.
    #[error("tap interface '{name}' cannot be opened: {hint}")]
    Attach {
        /// The interface.
        name: String,
        /// The way out.
        hint: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The descriptor is of something else.
    #[error("the descriptor is not a tap's: it has to be {DEVICE} with an interface set by TUNSETIFF")]
    NotATap {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The descriptor has no interface.
    #[error("the tap has no interface: it was deleted while the descriptor was open, or none was ever set")]
    NoInterface,
    /// The interface is of a kind that is of no use here.
    #[error("interface '{name}' {what}: make the tap with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    Kind {
        /// The interface.
        name: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A setting was refused.
    #[error("{call} failed for a tap")]
    Call {
        /// The ioctl.
        call: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// `struct ifreq`, as far as these ioctls use it.
#[repr(C)]
struct Request {
    name: [u8; NAME_LEN],
    flags: u16,
    rest: [u8; 22],
}

impl Request {
    fn new(name: &[u8], flags: u16) -> Self {
        let mut request = Self { name: [0; NAME_LEN], flags, rest: [0; 22] };
        request.name[..name.len()].copy_from_slice(name);
        request
    }

    fn name(&self) -> String {
        let end = self.name.iter().position(|&byte| byte == 0).unwrap_or(NAME_LEN);
        String::from_utf8_lossy(&self.name[..end]).into_owned()
    }
}

/// Opens a queue of interface `name`, which is made if there is none and this process may. `%d` in it stands for a number that
/// the kernel chooses; ask [`interface`] for the name that came of it.
///
/// The descriptor is close-on-exec and never blocks. An interface with `multi_queue` can be opened several times; whoever
/// made it has to have said so, too.
///
/// # Errors
/// [`TapError::Name`], [`TapError::Device`], [`TapError::Attach`].
pub fn open(name: &str, multi_queue: bool) -> Result<OwnedFd, TapError> {
    if !is_name(name) {
        return Err(TapError::Name { name: name.to_owned() });
    }
    let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE);
    let fd = OwnedFd::from(device.map_err(|source| TapError::Device { source })?);
    let several = if multi_queue { MULTI_QUEUE } else { 0 };
    let mut request = Request::new(name.as_bytes(), TAP | NO_PI | VNET_HDR | several);
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which `Request` is in size and layout.
    match Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &mut request) }) {
        Ok(_) => Ok(fd),
        Err(errno) => Err(TapError::Attach {
            name: name.to_owned(),
            hint: attach_hint(errno, multi_queue),
            source: errno.into(),
        }),
    }
}

fn is_name(name: &str) -> bool {
    let forbidden = |byte: u8| byte == b'/' || byte == b':' || byte == 0 || byte.is_ascii_whitespace();
    (1..NAME_LEN).contains(&name.len()) && !name.bytes().any(forbidden) && name != "." && name != ".."
}

fn attach_hint(errno: Errno, multi_queue: bool) -> &'static str {
    match (errno, multi_queue) {
        (Errno::EPERM | Errno::EACCES, _) => {
            "it is another user's, or does not exist and this process may not make it; as root: ip tuntap add dev \
             NAME mode tap user USER"
        }
        (Errno::EBUSY, _) => "somebody else has it open, and it has one queue only",
        (Errno::EINVAL, false) => {
            "it is no tap, or was made with multi_queue, which needs more than one queue here"
        }
        (Errno::EINVAL, true) => {
            "it is no tap, or was not made for several queues (ip tuntap add ... multi_queue)"
        }
        (Errno::E2BIG, _) => "all queues that it can have are open",
        _ => "the kernel refuses it",
    }
}

/// What interface a tap belongs to. Changes nothing.
///
/// # Errors
/// [`TapError::NotATap`]; [`TapError::NoInterface`], for example after somebody deleted it; [`TapError::Kind`] for a tun,
/// and for a tap without the header before each packet. (Whether there is packet information, too, the kernel does not tell.)
pub fn interface(fd: impl AsFd) -> Result<Interface, TapError> {
    let mut request = Request::new(b"", 0);
    // SAFETY: TUNGETIFF writes one `struct ifreq`, which `Request` is in size and layout.
    match Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TUNGETIFF, &mut request) }) {
        Ok(_) => {}
        Err(Errno::EBADFD) => return Err(TapError::NoInterface),
        Err(errno) => return Err(TapError::NotATap { source: errno.into() }),
    }
    let (name, has) = (request.name(), |flag| request.flags & flag != 0);
    let wrong = match () {
        () if !has(TAP) => "is a tun, which has no Ethernet frames",
        () if !has(VNET_HDR) => "has no virtio header before its packets",
        () => return Ok(Interface { name, multi_queue: has(MULTI_QUEUE), attached: !has(DETACH_QUEUE) }),
    };
    Err(TapError::Kind { name, what: wrong })
}

/// Says how long the header before each packet is, in bytes. Changes nothing.
///
/// # Errors
/// [`TapError::Call`].
pub fn vnet_header_len(fd: impl AsFd) -> Result<usize, TapError> {
    let mut len: c_int = 0;
    // SAFETY: TUNGETVNETHDRSZ writes one int.
    let answer = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TUNGETVNETHDRSZ, &mut len) };
    call("TUNGETVNETHDRSZ", answer)?;
    Ok(usize::try_from(len).unwrap_or(0))
}

/// Sets how long the header before each packet is, in bytes, for all queues of the interface.
///
/// # Errors
/// [`TapError::Call`].
pub fn set_vnet_header_len(fd: impl AsFd, bytes: u8) -> Result<(), TapError> {
    let len = c_int::from(bytes);
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    call("TUNSETVNETHDRSZ", unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TUNSETVNETHDRSZ, &len) })
}

/// Says what the reader of the interface's queues can cope with, in place of what was said before. Everything needs
/// [`Offloads::CSUM`], and [`Offloads::TSO_ECN`] one of the other two.
///
/// # Errors
/// [`TapError::Call`] for what the interface does not have.
pub fn set_offloads(fd: impl AsFd, offloads: Offloads) -> Result<(), TapError> {
    let bits = libc::c_ulong::from(offloads.bits());
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    call("TUNSETOFFLOAD", unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TUNSETOFFLOAD, bits) })
}

/// Lets a queue of a multi-queue interface take part, or not. It is an error if it does, or does not, already.
///
/// # Errors
/// [`TapError::Call`].
pub fn set_attached(fd: impl AsFd, attached: bool) -> Result<(), TapError> {
    let request = Request::new(b"", if attached { ATTACH_QUEUE } else { DETACH_QUEUE });
    // SAFETY: TUNSETQUEUE reads one `struct ifreq`, which `Request` is in size and layout.
    call("TUNSETQUEUE", unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TUNSETQUEUE, &request) })
}

/// Whether reading and writing return at once. Changes nothing.
///
/// # Errors
/// Those of fcntl(2).
pub fn is_nonblocking(fd: impl AsFd) -> io::Result<bool> {
    Ok(status_flags(&fd)?.contains(OFlag::O_NONBLOCK))
}

/// Makes reading and writing return at once, for everybody who has this open file.
///
/// # Errors
/// Those of fcntl(2).
pub fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = status_flags(&fd)? | OFlag::O_NONBLOCK;
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags))?;
    Ok(())
}

fn status_flags(fd: &impl AsFd) -> io::Result<OFlag> {
    Ok(OFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?))
}

fn call(call: &'static str, answer: c_int) -> Result<(), TapError> {
    Errno::result(answer).map(drop).map_err(|errno| TapError::Call { call, source: errno.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::process::Command;

    use nix::sched::{CloneFlags, unshare};

    /// Runs `test` in a network namespace of its own, or says why not.
    fn in_a_namespace(name: &str, test: impl FnOnce() + Send + 'static) {
        let thread = std::thread::spawn(move || {
            if !std::path::Path::new(DEVICE).exists() {
                return Some("no /dev/net/tun".to_owned());
            }
            if Command::new("ip").arg("-V").output().is_err() {
                return Some("no program 'ip'".to_owned());
            }
            if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
                return Some(format!("unshare: {errno}"));
            }
            test();
            None
        });
        if let Some(reason) = thread.join().expect("the test panicked") {
            eprintln!("SKIPPED {name}: {reason}");
        }
    }

    fn ip(arguments: &[&str]) {
        assert!(Command::new("ip").args(arguments).status().unwrap().success(), "ip {arguments:?}");
    }

    #[test]
    fn a_tap_is_made_asked_and_set() {
        in_a_namespace("a_tap_is_made_asked_and_set", || {
            let tap = open("tap%d", false).unwrap();
            assert!(crate::cloexec::is_set(&tap).unwrap() && is_nonblocking(&tap).unwrap());
            let found = interface(&tap).unwrap();
            assert_eq!(found, Interface { name: "tap0".into(), multi_queue: false, attached: true });
            set_vnet_header_len(&tap, 12).unwrap();
            assert_eq!(vnet_header_len(&tap).unwrap(), 12);
            set_offloads(&tap, Offloads::all()).unwrap();
            set_offloads(&tap, Offloads::empty()).unwrap();
            let error = set_offloads(&tap, Offloads::TSO_ECN).unwrap_err();
            assert_eq!(error.to_string(), "TUNSETOFFLOAD failed for a tap");
            assert!(set_attached(&tap, false).is_err(), "it has one queue only");
        });
    }

    #[test]
    fn queues_come_and_go() {
        in_a_namespace("queues_come_and_go", || {
            let queues = [(); 2].map(|()| open("t0", true).unwrap());
            set_attached(&queues[1], false).unwrap();
            let found = queues.each_ref().map(|queue| interface(queue).unwrap());
            assert!(found.iter().all(|found| found.multi_queue && found.name == "t0"));
            assert_eq!(found.map(|found| found.attached), [true, false]);
            set_attached(&queues[1], true).unwrap();
            assert!(interface(&queues[1]).unwrap().attached);
        });
    }

    #[test]
    fn what_cannot_be_opened_is_told_with_the_way_out() {
        in_a_namespace("what_cannot_be_opened_is_told_with_the_way_out", || {
            let text = |name, several| open(name, several).unwrap_err().to_string();
            let _one = open("one", false).unwrap();
            let _several = open("several", true).unwrap();
            assert!(text("one", false).contains("'one' cannot be opened: somebody else has it open"));
            assert!(text("one", true).contains("'one' cannot be opened: it is no tap, or was not made for"));
            assert!(text("several", false).contains("or was made with multi_queue"));
            assert!(text("lo", false).contains("'lo' cannot be opened: it is no tap"));
            for name in ["", "a/b", "a b", "sixteen-bytes-ab", ".", "a:b"] {
                assert!(text(name, false).contains("is no name for an interface"), "{name}");
            }
        });
    }

    #[test]
    fn a_tap_that_vanished_says_so() {
        in_a_namespace("a_tap_that_vanished_says_so", || {
            let tap = open("t0", false).unwrap();
            ip(&["link", "delete", "t0"]);
            assert!(matches!(interface(&tap), Err(TapError::NoInterface)));
        });
    }

    #[test]
    fn other_descriptors_are_told_apart() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(interface(&null), Err(TapError::NotATap { .. })));
        assert!(!is_nonblocking(&null).unwrap());
        set_nonblocking(&null).unwrap();
        assert!(is_nonblocking(&null).unwrap());
    }

    #[test]
    fn a_tap_of_another_kind_is_refused() {
        in_a_namespace("a_tap_of_another_kind_is_refused", || {
            let open_as = |name: &str, flags| {
                let fd = std::fs::File::options().read(true).write(true).open(DEVICE).unwrap();
                assert!(matches!(interface(&fd), Err(TapError::NoInterface)));
                let mut request = Request::new(name.as_bytes(), flags);
                // SAFETY: as in `open`.
                Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &mut request) }).unwrap();
                interface(&fd).unwrap_err().to_string()
            };
            assert!(open_as("plain", TAP | NO_PI).contains("'plain' has no virtio header"));
            let tun = libc::IFF_TUN as u16;
            assert!(open_as("tun", tun | NO_PI | VNET_HDR).contains("'tun' is a tun"));
        });
    }
}
