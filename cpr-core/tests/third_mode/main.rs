//! A third mode, written by somebody who may not touch this workspace: see [`mode`]. Its targets are real processes, this
//! program once more, which the standard harness with its threads cannot be.
#![cfg_attr(loom, allow(dead_code, unused))]

#[cfg(not(loom))]
mod machine;
#[cfg(not(loom))]
mod mode;
#[cfg(not(loom))]
mod scenarios;

#[cfg(not(loom))]
fn main() -> std::process::ExitCode {
    scenarios::main()
}

#[cfg(loom)]
fn main() {}
