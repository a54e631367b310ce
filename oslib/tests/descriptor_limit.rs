//! At the limit of open files the kernel drops descriptors of a message. A process of its own, for the limit is one.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use oslib::scm::{self, Limits, RecvError};
use oslib::{eventfd::EventFd, process};

#[test]
fn dropped_descriptors_are_an_error_and_none_stays() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let event = EventFd::new().unwrap();
    let before = process::open_fds().unwrap();
    scm::send(&ours, b"state", &[event.as_fd(); 100]).unwrap();
    // Room for some of them, not for all.
    setrlimit(Resource::RLIMIT_NOFILE, 60, hard).unwrap();
    let limits = Limits { max_payload: 16, max_fds: 100 };
    assert!(matches!(scm::recv(&theirs, limits), Err(RecvError::FdsDropped)));
    assert_eq!(process::open_fds().unwrap(), before);
}
