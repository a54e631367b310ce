//! A chardev with a loop and a peer, and threads that write.

use std::io::Read;
use std::time::{Duration, Instant};

use super::*;
use crate::event_loop::EventLoop;

/// More than a socket has room for, and less than is kept.
const MUCH: usize = 2 << 20;
const SOON: Duration = Duration::from_secs(10);

/// A socket, its chardev, and a client that is connected.
fn connected(folder: &Path) -> (Chardev, UnixStream) {
    let path = folder.join("socket");
    let config = ChardevConfig {
        id: "c".into(),
        backend: ChardevBackend::Socket { path: path.clone(), server: true, wait: false },
        mux: false,
    };
    let registry = FdRegistry::default();
    let mut chardev = Chardev::open(&config, &registry, None).unwrap();
    let client = UnixStream::connect(path).unwrap();
    assert!(chardev.accept(&registry).unwrap());
    (chardev, client)
}

/// Waits as the main loop does; false if nothing happens.
fn turn(events: &mut EventLoop, chardev: &Chardev) -> bool {
    events.set_interests(chardev.interests(0, Direction::Both)).unwrap();
    let ready = events.wait(Some(SOON)).unwrap();
    for ready in &ready {
        match ready.token {
            Token::LeftOver(0) => chardev.note_left_over().unwrap(),
            Token::Peer(0) if ready.writable => chardev.flush(),
            other => panic!("{other:?}"),
        }
    }
    !ready.is_empty()
}

#[test]
fn output_of_another_thread_that_a_full_socket_did_not_take_goes_out_once_the_client_reads() {
    let folder = tempfile::tempdir().unwrap();
    let (chardev, mut client) = connected(folder.path());
    let mut events = EventLoop::new().unwrap();
    // The loop waits already, and has nothing to watch for, when the guest begins to write.
    events.set_interests(chardev.interests(0, Direction::Both)).unwrap();
    let output = chardev.output().clone();
    let writer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        (0..MUCH / 4096).for_each(|_| output.write(&[b'x'; 4096]));
    });
    assert!(turn(&mut events, &chardev), "the loop learns that output is left over");
    writer.join().unwrap();
    assert!(chardev.has_pending());

    let reader = std::thread::spawn(move || {
        let mut all = vec![0; MUCH];
        client.read_exact(&mut all).unwrap();
        all
    });
    let start = Instant::now();
    while chardev.has_pending() && start.elapsed() < SOON {
        assert!(turn(&mut events, &chardev), "the loop watches for room");
    }
    assert_eq!(reader.join().unwrap(), vec![b'x'; MUCH]);
}

#[test]
fn a_loop_that_has_sent_everything_has_nothing_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let (chardev, mut client) = connected(folder.path());
    let mut events = EventLoop::new().unwrap();
    chardev.output().write(b"all of it");
    let mut all = [0; 9];
    client.read_exact(&mut all).unwrap();
    events.set_interests(chardev.interests(0, Direction::Both)).unwrap();
    assert!(events.wait(Some(Duration::ZERO)).unwrap().is_empty());
}

fn output() -> (Output, UnixStream) {
    let (ours, peer) = UnixStream::pair().unwrap();
    peer.set_nonblocking(true).unwrap();
    let output = Output::default();
    output.connect(Sink::Socket(Arc::new(ours.into())), Vec::new());
    (output, peer)
}

fn received(mut peer: &UnixStream) -> String {
    let mut bytes = [0; 64];
    match peer.read(&mut bytes) {
        Ok(count) => String::from_utf8_lossy(&bytes[..count]).into_owned(),
        Err(error) => error.kind().to_string(),
    }
}

#[test]
fn what_went_along_with_a_guest_is_not_sent_and_comes_back_with_it() {
    let (output, peer) = output();
    output.lock().pending.extend(b"guest");
    assert_eq!(output.hold(), b"guest");
    output.write(b"monitor");
    assert_eq!(received(&peer), io::ErrorKind::WouldBlock.to_string());
    output.release_after(5);
    assert_eq!(received(&peer), "monitor");
    output.write_first(b"guest");
    assert_eq!(received(&peer), "guest");
    // One that was connected anew meanwhile has nothing of it.
    output.lock().pending.extend(b"new");
    output.release_after(5);
    assert_eq!(received(&peer), "new");
}

#[test]
fn what_came_with_a_guest_is_sent_at_its_release_and_before_the_rest() {
    let (output, peer) = output();
    output.hold();
    output.write_first(b"before, ");
    output.write(b"after");
    assert_eq!(received(&peer), io::ErrorKind::WouldBlock.to_string());
    output.release();
    assert_eq!(received(&peer), "before, after");
}
