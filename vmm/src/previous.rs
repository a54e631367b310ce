//! `cpr-vmm` for tests of updates from and to the release before: built with the feature `previous-format`, it reads and
//! writes each section in the version before the current one, if there is one, and knows no other. Apart from that it is the
//! program of `main.rs`.

pub mod app;
pub mod arriving;
pub mod chardev;
pub mod cli;
pub mod devices;
pub mod errors;
pub mod event_loop;
#[path = "formats_previous.rs"]
pub mod formats;
pub mod migration;
pub mod monitor;
pub mod sandbox;
pub mod startup;
pub mod trace;

fn main() -> std::process::ExitCode {
    startup::main(std::env::args_os().skip(1))
}
