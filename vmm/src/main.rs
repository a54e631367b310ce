//! `cpr-vmm`: a KVM virtual machine monitor that can be replaced while its guest runs.
//!
//! The program picks the update modes, wires the devices of [`vmm_core`] to chardevs and monitors, and speaks QEMU's
//! command line, QMP and HMP. `docs/architecture.md` tells where things are.

mod app;
mod chardev;
mod cli;
mod event_loop;
mod migration;
mod monitor;
mod startup;
mod trace;

fn main() -> std::process::ExitCode {
    startup::main(std::env::args_os().skip(1))
}
