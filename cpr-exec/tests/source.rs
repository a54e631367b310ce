//! What an attempt that does not get as far as its exec leaves behind: nothing. In this process, since none is replaced.

use std::path::Path;
use std::time::Instant;

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter};
use cpr_core::{
    GuestActivity, Host, MemoryRegion, Outcome, Services, Step, TerminalAction, Update, UpdateError,
};
use cpr_exec::{CprExec, MainChannel};

/// A host without a guest, whose slot is looked at from outside.
#[derive(Default)]
struct Idle {
    slot: Option<TerminalAction>,
}

impl Host for Idle {
    fn memory(&self) -> Vec<MemoryRegion> {
        Vec::new()
    }

    fn stop(&mut self, _: Instant) -> Result<GuestActivity, BoxError> {
        Ok(GuestActivity::Paused)
    }

    fn resume(&mut self, activity: GuestActivity) -> Result<(), BoxError> {
        assert_eq!(activity, GuestActivity::Paused);
        Ok(())
    }

    fn save(&mut self, main: &mut FrameWriter) -> Result<(), BoxError> {
        Ok(main.put("idle", 0, 1, vec![1, 2, 3])?)
    }

    fn load(&mut self, _: &mut Frame) -> Result<(), BoxError> {
        Err("nothing is loaded here".into())
    }

    fn request_terminal(&mut self, action: TerminalAction) {
        self.slot = Some(action);
    }
}

fn file(path: &Path) -> MainChannel {
    MainChannel::File { path: path.to_owned(), offset: 0 }
}

fn begin(services: &Services, host: &Idle, main: MainChannel) -> Result<Update, UpdateError> {
    // Should it be executed after all, this test ends with an error.
    Update::begin(services, Box::new(CprExec::new(vec!["false".into()], main)), host)
}

fn names(services: &Services) -> Vec<String> {
    let mut names = Vec::new();
    let _ = services.registry.walk_fd(|entry, _| {
        names.push(entry.to_string());
        Ok::<_, ()>(())
    });
    names
}

#[test]
fn a_last_act_that_was_cancelled_executes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for main in [MainChannel::Memfd, file(&dir.path().join("state"))] {
        let (services, mut host) = (Services::default(), Idle::default());
        let mut update = begin(&services, &host, main).unwrap();
        while !matches!(update.step(&mut host), Step::Terminal) {}
        let action = host.slot.take().unwrap();
        let outcome = update.cancel(&mut host);
        assert!(
            matches!(outcome, Outcome::Failed { error: UpdateError::Cancelled, guest: Ok(()) }),
            "{outcome:?}"
        );
        // The host was to drop it. One that runs it all the same keeps its guest.
        let mask = oslib::signals::current().unwrap();
        let error = action().unwrap_err();
        assert_eq!(error.to_string(), "the update ended before it was executed");
        assert_eq!(oslib::signals::current().unwrap(), mask);
        match update.terminal_returned(&mut host, Err(error)) {
            Step::Finished(Outcome::Failed { error: UpdateError::Over, guest: Ok(()) }) => {}
            other => panic!("{other:?}"),
        }
        assert_eq!(names(&services), [""; 0]);
        assert!(!dir.path().join("state").exists());
    }
}

#[test]
fn a_state_file_that_was_there_before_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    std::fs::write(&path, "precious").unwrap();
    let (services, mut host) = (Services::default(), Idle::default());
    let mut update = begin(&services, &host, file(&path)).unwrap();
    assert!(matches!(update.cancel(&mut host), Outcome::Failed { .. }));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious", "nothing was written before the guest stopped");
}

#[test]
fn bytes_before_the_offset_stay() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    std::fs::write(&path, [b'x'; 5000]).unwrap();
    let (services, mut host) = (Services::default(), Idle::default());
    let mut update = begin(&services, &host, MainChannel::File { path: path.clone(), offset: 100 }).unwrap();
    while !matches!(update.step(&mut host), Step::Terminal) {}
    let written = std::fs::read(&path).unwrap();
    assert_eq!(written[..100], [b'x'; 100]);
    // No state yet, but as much room as it will take.
    let mut frame = Frame::parse(&written[100..]).unwrap();
    assert_eq!(frame.epoch, update.control().epoch());
    assert_eq!(frame.require("cpr-core/room", 0).unwrap().body.len(), 64 << 10);
    update.cancel(&mut host);
}

#[test]
fn attempts_follow_each_other() {
    let (services, mut host) = (Services::default(), Idle::default());
    let mut epochs = std::collections::BTreeSet::new();
    for _ in 0..20 {
        let mut update = begin(&services, &host, MainChannel::Memfd).unwrap();
        while !matches!(update.step(&mut host), Step::Terminal) {}
        let own = ["control", "doorbell", "last-words", "main", "stderr"]
            .map(|name| format!("'cpr-exec/{name}' (id 0)"));
        assert_eq!(names(&services), own);
        update.cancel(&mut host);
        assert_eq!(names(&services), [""; 0]);
        epochs.insert(update.control().epoch());
    }
    assert_eq!(epochs.len(), 20, "each attempt has an epoch of its own");
}
