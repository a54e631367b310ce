//! The manifest that a program is shown beforehand, and the verdict that it gives.

use std::sync::OnceLock;

use cpr_core::frame::{FrameWriter, sealed_memfd, to_body};
use cpr_core::preflight::{Asked, Manifest, SectionRange, Verdict};
use oslib::memfd::Memfd;
use vmm::app::{judge_shown, manifest_of};
use vmm::cli::config::Config;
use vmm::cli::{self, Invocation};

use crate::decoded;
use crate::early::ChannelWire;

const MAIN_CHANNEL: &str = "cpr-exec/main-channel";

/// The command line of the program that judges.
fn config() -> &'static Config {
    static CONFIG: OnceLock<Config> = OnceLock::new();
    CONFIG.get_or_init(|| {
        let args = "-object memory-backend-memfd,id=ram0,size=64M -machine memory-backend=ram0 -smp 2 -drive \
                    file=/i,id=d,format=raw -nic tap,fd=9 -device virtio-rng-pci";
        match cli::parse(args.split(' ').map(Into::into)) {
            Ok(Invocation::Run(config)) => *config,
            other => panic!("{other:?}"),
        }
    })
}

/// The section `cpr-core/manifest`. Whatever it shows, there is a verdict on it.
pub fn manifest(data: &[u8]) -> bool {
    let Some(manifest) = decoded::<Manifest>(cpr_core::preflight::MANIFEST_SECTION, data) else {
        return false;
    };
    let verdict = judge_shown(config(), &manifest, cpr_exec::catalogue(), [Ok(()), Ok(())]);
    matches!(verdict, Verdict::Accepted(_))
}

pub(crate) fn manifest_seeds() -> Vec<Vec<u8>> {
    let shown = manifest_of(config(), false)
        .section("cpr-core/update", 0, 1..=1)
        .section("cpr-core/activity", 0, 1..=1)
        .section("cpr-core/registry", 0, 1..=1)
        .section("cpr-exec/process", 0, 1..=1);
    vec![to_body(&shown), to_body(&shown.feature("cpr-exec/live-source"))]
}

/// The section `cpr-exec/main-channel`, beside a good manifest.
pub fn main_channel(data: &[u8]) -> bool {
    let mut frame = FrameWriter::default();
    manifest_of(config(), false).put_into(&mut frame).expect("the only manifest");
    frame.put(MAIN_CHANNEL, 0, 1, data.to_vec()).expect("the only channel");
    let manifest = sealed_memfd("manifest", &frame.finish(crate::EPOCH)).expect("a memfd");
    let verdict = Memfd::new("verdict").create().expect("a memfd");
    match cpr_exec::fuzzing::read_question([manifest, verdict]) {
        Ok(request) => {
            let _ = format!("{:?}", request.main());
            true
        }
        Err(error) => {
            let _ = error.to_string();
            false
        }
    }
}

pub(crate) fn main_channel_seeds() -> Vec<Vec<u8>> {
    let file = ChannelWire::File { path: b"/tmp/vm.state".to_vec(), offset: 4096 };
    vec![to_body(&ChannelWire::Memfd), to_body(&file)]
}

/// Every section that the program takes over, as its verdicts say it.
pub(crate) fn sections_taken_over() -> Vec<String> {
    let shown = manifest_of(config(), true)
        .section("cpr-core/update", 0, 1..=1)
        .section("cpr-core/activity", 0, 1..=1)
        .section("cpr-core/registry", 0, 1..=1)
        .section("cpr-exec/process", 0, 1..=1);
    let mut names = Vec::new();
    for catalogue in [cpr_exec::catalogue(), cpr_transfer::catalogue()] {
        match judge_shown(config(), &shown, catalogue.reads("cpr-exec/process", 1..=1), [Ok(()), Ok(())]) {
            Verdict::Accepted(sections) => names.extend(sections.into_iter().map(|section| section.name)),
            Verdict::Refused(reasons) => panic!("{reasons:?}"),
        }
    }
    names
}

/// The section `cpr-core/verdict`.
pub fn verdict(data: &[u8]) -> bool {
    let Some(verdict) = decoded::<Verdict>(cpr_core::preflight::VERDICT_SECTION, data) else { return false };
    match verdict.into_asked() {
        Asked::Accepted(reads) => {
            for (name, versions) in reads.iter() {
                assert_eq!(reads.get(name), Some(versions));
            }
        }
        Asked::Refused(text) => assert!(text.len() <= 2048),
        Asked::Nobody | Asked::Wait(_) => panic!("a verdict is one"),
    }
    true
}

pub(crate) fn verdict_seeds() -> Vec<Vec<u8>> {
    let range = |name: &str, most| SectionRange { name: name.into(), least: 1, most };
    let accepted = Verdict::Accepted(vec![range("serial", 1), range("kvm/vcpu", 2)]);
    let refused = Verdict::Refused(vec!["no room".into(), "another machine".into()]);
    vec![to_body(&accepted), to_body(&refused)]
}
