//! What the fuzzer runs: one function per kind of hostile input, from bytes to what the program makes of them.
//!
//! A body calls the code that the program itself calls, and checks more than that nothing panics: what was read is
//! written and read again, and a session that is cut into pieces and saved between them does the same as one that is
//! not. It opens nothing that the input names, and needs no KVM. The shims for libFuzzer are next door
//! (`fuzz/fuzz_targets`); `tests/` runs the same bodies over their seeds, and over some thousand mutations of them, on
//! stable.

mod backend;
mod block;
mod board;
mod command_line;
mod early;
mod frame;
mod main_frame;
mod monitors;
mod net;
mod pci;
mod preflight;
mod rings;
mod state_file;
mod transfer;

pub use block::{block, block_state};
pub use command_line::command_line;
pub use early::{activity, monitors, process, refusal, registry, update};
pub use frame::{state_frame, state_frame_written};
pub use main_frame::{
    console_line, devices, machine, outside, platform, serial, serial_input, time, vcpu, vm,
};
pub use monitors::{hmp, qmp};
pub use net::{net, net_state};
pub use pci::{console_state, pci, pci_function, pci_host, virtio_transport};
pub use preflight::{main_channel, manifest, verdict};
pub use rings::{virtio_console, virtio_rng};
pub use state_file::state_file;
pub use transfer::{transfer_source, transfer_target};

use std::fmt::Debug;

use cpr_core::frame::{Frame, FrameWriter, Section, to_body};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// One kind of input.
#[derive(Debug)]
pub struct Target {
    /// Its name, which is the shim's, too.
    pub name: &'static str,
    /// The body; tells whether the input was what the program takes.
    pub run: fn(&[u8]) -> bool,
    /// Inputs that the program takes, written by the encoders that it has itself.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// The longest input that is worth trying, in bytes.
    pub max_len: usize,
    /// Words of the input's language.
    pub words: &'static [&'static str],
}

/// Every target, by name.
pub const TARGETS: &[Target] = &[
    Target { name: "activity", run: activity, seeds: early::activity_seeds, max_len: 16, words: &[] },
    Target { name: "block", run: block, seeds: block::seeds, max_len: 4096, words: &[] },
    Target { name: "block_state", run: block_state, seeds: block::state_seeds, max_len: 64, words: &[] },
    Target {
        name: "command_line",
        run: command_line,
        seeds: command_line::seeds,
        max_len: 1024,
        words: command_line::WORDS,
    },
    Target {
        name: "console_line",
        run: console_line,
        seeds: main_frame::console_line_seeds,
        max_len: 256,
        words: &[],
    },
    Target {
        name: "console_state",
        run: console_state,
        seeds: pci::console_state_seeds,
        max_len: 512,
        words: &[],
    },
    Target { name: "devices", run: devices, seeds: main_frame::devices_seeds, max_len: 256, words: &[] },
    Target { name: "hmp", run: hmp, seeds: monitors::hmp_seeds, max_len: 1024, words: monitors::HMP_WORDS },
    Target { name: "machine", run: machine, seeds: main_frame::machine_seeds, max_len: 256, words: &[] },
    Target {
        name: "main_channel",
        run: main_channel,
        seeds: preflight::main_channel_seeds,
        max_len: 256,
        words: &[],
    },
    Target { name: "manifest", run: manifest, seeds: preflight::manifest_seeds, max_len: 1024, words: &[] },
    Target { name: "monitors", run: monitors, seeds: early::monitors_seeds, max_len: 4096, words: &[] },
    Target { name: "net", run: net, seeds: net::net_seeds, max_len: 2048, words: &[] },
    Target { name: "net_state", run: net_state, seeds: net::net_state_seeds, max_len: 512, words: &[] },
    Target { name: "outside", run: outside, seeds: main_frame::outside_seeds, max_len: 256, words: &[] },
    Target { name: "pci", run: pci, seeds: pci::pci_seeds, max_len: 2048, words: &[] },
    Target {
        name: "pci_function",
        run: pci_function,
        seeds: pci::pci_function_seeds,
        max_len: 512,
        words: &[],
    },
    Target { name: "pci_host", run: pci_host, seeds: pci::pci_host_seeds, max_len: 16, words: &[] },
    Target { name: "platform", run: platform, seeds: main_frame::platform_seeds, max_len: 16, words: &[] },
    Target { name: "process", run: process, seeds: early::process_seeds, max_len: 256, words: &[] },
    Target { name: "qmp", run: qmp, seeds: monitors::qmp_seeds, max_len: 1024, words: monitors::QMP_WORDS },
    Target { name: "refusal", run: refusal, seeds: early::refusal_seeds, max_len: 256, words: &[] },
    Target { name: "registry", run: registry, seeds: early::registry_seeds, max_len: 1024, words: &[] },
    Target { name: "serial", run: serial, seeds: main_frame::serial_seeds, max_len: 128, words: &[] },
    Target {
        name: "serial_input",
        run: serial_input,
        seeds: main_frame::serial_input_seeds,
        max_len: 256,
        words: &[],
    },
    Target {
        name: "state_file",
        run: state_file,
        seeds: state_file::state_file_seeds,
        max_len: 16 << 10,
        words: state_file::WORDS,
    },
    Target {
        name: "state_frame",
        run: state_frame,
        seeds: frame::state_frame_seeds,
        max_len: 16 << 10,
        words: frame::WORDS,
    },
    Target {
        name: "state_frame_written",
        run: state_frame_written,
        seeds: frame::state_frame_written_seeds,
        max_len: 4096,
        words: &[],
    },
    Target { name: "time", run: time, seeds: main_frame::time_seeds, max_len: 256, words: &[] },
    Target {
        name: "transfer_source",
        run: transfer_source,
        seeds: transfer::transfer_source_seeds,
        max_len: 1024,
        words: transfer::WORDS,
    },
    Target {
        name: "transfer_target",
        run: transfer_target,
        seeds: transfer::transfer_target_seeds,
        max_len: 1024,
        words: transfer::WORDS,
    },
    Target { name: "update", run: update, seeds: early::update_seeds, max_len: 128, words: &[] },
    Target { name: "vcpu", run: vcpu, seeds: main_frame::vcpu_seeds, max_len: 16 << 10, words: &[] },
    Target { name: "verdict", run: verdict, seeds: preflight::verdict_seeds, max_len: 256, words: &[] },
    Target {
        name: "virtio_console",
        run: virtio_console,
        seeds: rings::virtio_console_seeds,
        max_len: 8192,
        words: &[],
    },
    Target { name: "virtio_rng", run: virtio_rng, seeds: rings::virtio_rng_seeds, max_len: 8192, words: &[] },
    Target {
        name: "virtio_transport",
        run: virtio_transport,
        seeds: pci::virtio_transport_seeds,
        max_len: 512,
        words: &[],
    },
    Target { name: "vm", run: vm, seeds: main_frame::vm_seeds, max_len: 4096, words: &[] },
];

/// Each section of a state, and the target that has its body for an input.
pub const SECTIONS: &[(&str, &str)] = &[
    ("cpr-core/activity", "activity"),
    ("cpr-core/manifest", "manifest"),
    ("cpr-core/refusal", "refusal"),
    ("cpr-core/registry", "registry"),
    ("cpr-core/update", "update"),
    ("cpr-core/verdict", "verdict"),
    ("cpr-exec/main-channel", "main_channel"),
    ("cpr-exec/process", "process"),
    ("cpr-reboot/file", "state_file"),
    ("cpr-vmm/console-line", "console_line"),
    ("cpr-vmm/devices", "devices"),
    ("cpr-vmm/machine", "machine"),
    ("cpr-vmm/monitors", "monitors"),
    ("cpr-vmm/outside", "outside"),
    ("cpr-vmm/serial-input", "serial_input"),
    ("kvm/time", "time"),
    ("kvm/vcpu", "vcpu"),
    ("kvm/vm", "vm"),
    ("pci/function", "pci_function"),
    ("pci/host", "pci_host"),
    ("platform", "platform"),
    ("serial", "serial"),
    ("virtio-blk", "block_state"),
    ("virtio-console", "console_state"),
    ("virtio-net", "net_state"),
    ("virtio/transport", "virtio_transport"),
];

/// Sections without a target: zeros that nobody reads, one number of four bytes, and nothing at all.
pub const NO_TARGET: &[&str] = &["cpr-core/room", "cpr-exec/answer", "virtio-rng"];

/// Every section that this program takes over under any of its modes.
pub fn sections_taken_over() -> Vec<String> {
    preflight::sections_taken_over()
}

/// The update that every frame here belongs to.
const EPOCH: u64 = 7;

/// A frame of these sections, by name, version and body, each instance 0, that went through its bytes.
fn frame_of(sections: &[(&str, u32, &[u8])]) -> Frame {
    let mut writer = FrameWriter::default();
    for (name, version, body) in sections {
        writer.put(name, 0, *version, body.to_vec()).expect("each name stands once");
    }
    Frame::parse(&writer.finish(EPOCH)).expect("what was just written can be read")
}

/// A section as it stands in a frame, with this body.
fn section_of(name: &str, body: &[u8]) -> Section {
    Section { name: name.to_owned(), instance: 0, version: 1, body: body.to_vec() }
}

/// Decodes a body. What decodes is the same after it was encoded and decoded again.
fn decoded<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, body: &[u8]) -> Option<T> {
    let value: T = section_of(name, body).decode(1).map_err(|error| error.to_string()).ok()?;
    let again: T = section_of(name, &to_body(&value)).decode(1).expect("what was just encoded decodes");
    assert_eq!(value, again);
    Some(value)
}
