//! `cpr-vmm`: a KVM virtual machine monitor that can be replaced while its guest runs.
//!
//! The program picks the update modes, wires the devices of [`vmm_core`] to chardevs and monitors, and speaks QEMU's
//! command line, QMP and HMP. `docs/architecture.md` tells where things are.

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
