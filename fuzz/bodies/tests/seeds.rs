//! The fuzz bodies without a fuzzer: over their seeds, and over mutations of these that are the same in every run.

use std::collections::BTreeSet;

use fuzz_bodies::{NO_TARGET, SECTIONS, TARGETS, Target, sections_taken_over};

/// Mutations of each target. All of them together take a second or two.
const MUTATIONS: u32 = 3000;
/// Targets that make a bus with devices for each input, and mutations of these.
const SLOW: &[&str] = &["console_state", "pci", "pci_function", "pci_host", "virtio_transport"];
const SLOW_MUTATIONS: u32 = 300;

/// Prints the input under way if its run panics, so that it can become a test of the code that it broke.
struct Culprit<'a> {
    target: &'a str,
    input: &'a [u8],
}

impl Drop for Culprit<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: the input was b\"{}\"", self.target, self.input.escape_ascii());
        }
    }
}

fn run(target: &Target, input: &[u8]) -> bool {
    let _culprit = Culprit { target: target.name, input };
    (target.run)(input)
}

/// SplitMix64: small, and good enough to stir bytes.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number below `limit`.
    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        from.get(self.below(from.len()))
    }
}

/// Changes an input in one of the ways that break parsers.
fn mutate(input: &mut Vec<u8>, target: &Target, seeds: &[Vec<u8>], random: &mut Random) {
    let at = random.below(input.len() + 1);
    match random.below(7) {
        0 => {
            if let Some(byte) = input.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        1 => {
            if let Some(byte) = input.get_mut(at) {
                *byte = *random.pick(&[0, 1, 0x7f, 0x80, 0xfe, 0xff]).expect("not empty");
            }
        }
        2 => input.truncate(at),
        3 => {
            let until = (at + random.below(16)).min(input.len());
            input.drain(at..until);
        }
        4 => drop(input.splice(at..at, random.next().to_le_bytes())),
        5 => {
            let word = random.pick(target.words).copied().unwrap_or("\u{ff}");
            drop(input.splice(at..at, word.bytes()));
        }
        _ => {
            let other = random.pick(seeds).expect("each target has seeds");
            let from = random.below(other.len() + 1);
            input.truncate(at);
            input.extend_from_slice(&other[from..]);
        }
    }
}

fn survives_mutations(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target of that name");
    let seeds = (target.seeds)();
    let mut random = Random(1);
    for _ in 0..if SLOW.contains(&name) { SLOW_MUTATIONS } else { MUTATIONS } {
        let mut input = random.pick(&seeds).expect("each target has seeds").clone();
        for _ in 0..=random.below(4) {
            mutate(&mut input, target, &seeds, &mut random);
        }
        input.truncate(target.max_len);
        run(target, &input);
    }
}

/// A test for each target, and one that none was forgotten.
macro_rules! targets {
    ($($name:ident),*) => {
        $(
            #[test]
            fn $name() {
                survives_mutations(stringify!($name));
            }
        )*

        #[test]
        fn every_target_is_tested_and_has_a_shim() {
            let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(names, [$(stringify!($name)),*]);
            let fuzz = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
            let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
            let listed: Vec<_> =
                manifest.lines().filter_map(|line| line.strip_prefix("path = \"fuzz_targets/")).collect();
            assert_eq!(listed, names.iter().map(|name| format!("{name}.rs\"")).collect::<Vec<_>>());
            for name in names {
                let shim = std::fs::read_to_string(fuzz.join(format!("fuzz_targets/{name}.rs"))).unwrap();
                assert!(shim.contains(&format!("fuzz_bodies::{name}(data)")), "{name}");
            }
        }
    };
}

targets!(
    activity,
    block,
    block_state,
    command_line,
    console_line,
    console_state,
    devices,
    hmp,
    machine,
    main_channel,
    manifest,
    monitors,
    net,
    net_state,
    outside,
    pci,
    pci_function,
    pci_host,
    platform,
    process,
    qmp,
    refusal,
    registry,
    serial,
    serial_input,
    state_file,
    state_frame,
    state_frame_written,
    time,
    transfer_source,
    transfer_target,
    update,
    vcpu,
    verdict,
    virtio_console,
    virtio_rng,
    virtio_transport,
    vm
);

#[test]
fn every_seed_is_what_the_program_takes() {
    for target in TARGETS {
        // The seeds of this one are a start, not a language.
        let any = target.name == "state_frame_written";
        for (number, seed) in (target.seeds)().iter().enumerate() {
            assert!(run(target, seed) || any, "{}: seed {number} is refused", target.name);
            assert!(seed.len() <= target.max_len, "{}: seed {number} is too long", target.name);
        }
    }
}

/// What the program takes over, and what the documentation has a chapter or a row for.
#[test]
fn every_section_has_a_target() {
    let documentation = include_str!("../../../docs/state-format.md");
    let documented = documentation.lines().filter_map(|line| {
        let (name, rest) =
            line.strip_prefix("### `").or_else(|| line.strip_prefix("| `"))?.split_once('`')?;
        // A version follows, or the frame that it belongs to.
        let is_section = [" 1", " 2", " | early", " | main |"].iter().any(|next| rest.starts_with(next));
        is_section.then(|| name.to_owned())
    });
    let known: BTreeSet<String> = documented.chain(sections_taken_over()).collect();
    let covered = SECTIONS.iter().map(|(section, _)| *section).chain(NO_TARGET.iter().copied());
    assert_eq!(known, covered.map(str::to_owned).collect());
    for (section, target) in SECTIONS {
        assert!(TARGETS.iter().any(|known| known.name == *target), "{section}: there is no target {target}");
    }
}

#[test]
fn no_input_at_all_is_survived() {
    for target in TARGETS {
        run(target, b"");
    }
}
