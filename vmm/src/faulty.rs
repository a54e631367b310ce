//! `cpr-vmm` for tests that show what other tests are worth: built with the feature `fault-injection`, it leaves out the
//! steps of a restore that its environment names, or makes an update fail. Apart from that it is the program of `main.rs`.

pub mod app;
pub mod arriving;
pub mod chardev;
pub mod cli;
pub mod devices;
pub mod errors;
pub mod event_loop;
pub mod formats;
pub mod migration;
pub mod monitor;
pub mod sandbox;
pub mod startup;
pub mod trace;

fn main() -> std::process::ExitCode {
    startup::main(std::env::args_os().skip(1))
}
