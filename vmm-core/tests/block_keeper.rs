//! The disk in the keeper: another process that goes on with its memory and copies of its descriptors, after the process
//! that made its ring has executed another program.
//!
//! A program of its own, which executes itself: the standard harness has threads, which an exec would end.

mod block_guest;

use std::ffi::OsString;
use std::process::{Command, ExitCode};

use block_guest::{Guest, PATIENCE, content, disk, image_file};
use oslib::exec::PreparedExec;
use oslib::keeper::Keeper;
use oslib::pidfd::{Exit, PidFd};
use oslib::{process, signals};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_OUT};
use vmm_core::virtio::VirtioDevice;
use vmm_core::virtio::block::Aio;

const NAME: &str = "the_disk_goes_on_in_the_keeper";
/// Which part this process plays. Absent: the one that starts the others.
const ROLE: &str = "BLOCK_KEEPER_TEST_ROLE";
/// What the keeper ends with if all went well.
const WELL: i32 = 42;

fn main() -> ExitCode {
    match std::env::var(ROLE).as_deref() {
        Ok("source") => source(),
        Ok(_) => target(),
        Err(_) => harness(),
    }
}

/// The little of the standard harness that tools use.
fn harness() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |wanted: &str| arguments.iter().any(|argument| argument == wanted);
    if has("--list") {
        if !has("--ignored") {
            println!("{NAME}: test");
        }
        return ExitCode::SUCCESS;
    }
    let mut filters = arguments.iter().filter(|argument| !argument.starts_with('-')).peekable();
    if filters.peek().is_some() && !filters.any(|filter| NAME.contains(filter.as_str())) {
        return ExitCode::SUCCESS;
    }
    let status = Command::new(std::env::current_exe().unwrap()).env(ROLE, "source").status().unwrap();
    println!("test {NAME} ... {}", if status.success() { "ok" } else { "FAILED" });
    ExitCode::from(u8::from(!status.success()))
}

fn source() -> ExitCode {
    let file = image_file(1 << 20);
    let mut guest = Guest::new(disk(file.path(), 1, Aio::IoUring));
    let by_ring = guest.block.uses_io_uring();
    for sector in 0..8 {
        guest.ask(0, VIRTIO_BLK_T_OUT, sector, &[1; 512], 0);
        guest.ask(0, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    }
    guest.kick(0).unwrap();
    guest.drain();
    // Two that stay in the queue over the exec.
    guest.ask(0, VIRTIO_BLK_T_OUT, 8, &[2; 512], 0);
    guest.ask(0, VIRTIO_BLK_T_FLUSH, 0, &[], 0);

    signals::block_all().unwrap();
    let keeper = Keeper::spawn().unwrap();
    let arguments = ["target".into(), OsString::from(keeper.pid().to_string())];
    let exec = PreparedExec::new("/proc/self/exe", arguments, [(ROLE, "target")]).unwrap();
    let departed = keeper.exec(&exec).unwrap();

    // In the keeper, as the old program.
    assert!(!departed.successor.is_exited().unwrap());
    guest.block.resume();
    assert_eq!(guest.block.uses_io_uring(), by_ring);
    let answers = guest.finish();
    assert!(answers.len() == 18 && answers.iter().all(|answer| answer.status == 0));
    for sector in 9..16 {
        guest.ask(0, VIRTIO_BLK_T_OUT, sector, &[3; 512], 0);
        guest.ask(0, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    }
    guest.kick(0).unwrap();
    guest.drain();
    assert_eq!(guest.answers().len(), 14);
    assert_eq!(
        content(file.as_file())[..16 * 512],
        [[1; 8 * 512].as_slice(), &[2; 512], &[3; 7 * 512]].concat()
    );
    drop((guest, file));
    process::step_aside(vec![], WELL);
}

fn target() -> ExitCode {
    let keeper = PidFd::open(std::env::args().nth(1).unwrap().parse().unwrap()).unwrap();
    assert!(keeper.wait_exited(PATIENCE).unwrap());
    assert_eq!(keeper.reap().unwrap(), Exit::Exited(WELL));
    ExitCode::SUCCESS
}
