//! What must be equal on both sides of the mailbox, and where the image lies; no KVM needed.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::io::Cursor;

use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use proptest::prelude::*;
use vm_memory::{Address, GuestAddress, GuestMemoryMmap};
use vmm_core::payload::{
    self, Command, FILL_BASE_GPA, GuestWords, Header, Mailbox, Outcome, Status, field, fill_word, flag,
};

/// The `#define`s of plain numbers in the guest's source.
fn guest_constants() -> HashMap<&'static str, u64> {
    include_str!("../payload/payload.S")
        .lines()
        .filter_map(|line| {
            let mut words = line.strip_prefix("#define ")?.split_whitespace();
            let (name, value) = (words.next()?, words.next()?);
            let number = match value.strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16),
                None => value.parse(),
            };
            Some((name, number.ok()?))
        })
        .collect()
}

#[test]
fn constants_agree_with_the_guest() {
    let guest = guest_constants();
    for (name, here) in [
        ("MAILBOX", payload::MAILBOX_GPA),
        ("MAX_VCPUS", payload::MAX_VCPUS.into()),
        ("FILL_BASE", payload::FILL_BASE_GPA),
        ("MAPPED_GIB", payload::FILL_END_GPA >> 30),
        ("CHUNK", payload::CHUNK_BYTES),
        ("MAGIC", payload::MAGIC),
        ("LAYOUT", payload::LAYOUT_VERSION),
        ("H_MAGIC", field::MAGIC),
        ("H_VERSION", field::VERSION),
        ("H_STARTED", field::STARTED),
        ("H_MASK", field::STARTED_MASK),
        ("H_USABLE", field::USABLE_BYTES),
        ("H_FLAGS", field::FLAGS),
        ("H_RANGES", field::RANGE_COUNT),
        ("H_TSC_ENTRY", field::TSC_ENTRY),
        ("H_TSC_READY", field::TSC_READY),
        ("H_RANGE", field::RANGES),
        ("MAX_RANGES", field::MAX_RANGES),
        ("FLAG_NO_SERIAL", flag::NO_SERIAL),
        ("FLAG_IRETQ", flag::IRETQ),
        ("FLAG_NO_IOPL", flag::NO_IOPL),
        ("FLAG_NO_LAPIC", flag::NO_LAPIC),
        ("FLAG_RAM_CUT", flag::RAM_CUT),
        ("V_BEATS", field::BEATS),
        ("V_LAST_TSC", field::LAST_TSC),
        ("V_MAX_GAP", field::MAX_GAP_TSC),
        ("V_MAX_GAP_AT", field::MAX_GAP_AT_TSC),
        ("V_GAP_ACK", field::GAP_RESET_ACK),
        ("V_BACKWARDS", field::TSC_BACKWARDS),
        ("V_DONE_SEQ", field::DONE_SEQ),
        ("V_STATUS", field::STATUS),
        ("V_RESULT0", field::RESULT0),
        ("V_RESULT1", field::RESULT1),
        ("V_PROGRESS", field::PROGRESS_BYTES),
        ("V_WALKED", field::WALKED_PAGES),
        ("V_ECHOED", field::ECHOED_BYTES),
        ("V_STATE", field::STATE),
        ("V_APIC_ID", field::APIC_ID),
        ("V_TSC_START", field::TSC_START),
        ("V_IO_FAULTS", field::IO_FAULTS),
        ("V_FAULT", field::FAULT_VECTOR),
        ("V_DOORBELL", field::DOORBELL),
        ("V_GAP_REQ", field::GAP_RESET),
        ("V_CMD_SEQ", field::CMD_SEQ),
        ("V_CMD", field::CMD),
        ("V_ARG0", field::ARG0),
        ("V_ARG1", field::ARG1),
        ("V_ARG2", field::ARG2),
    ] {
        assert_eq!(guest.get(name), Some(&here), "{name}");
    }
}

#[test]
fn image_has_a_pvh_entry_and_keeps_below_usable_ram() {
    let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), FILL_BASE_GPA as usize)]).unwrap();
    let loaded = Elf::load(&ram, None, &mut Cursor::new(payload::ELF), None).unwrap();
    assert_eq!(loaded.pvh_boot_cap, PvhBootCapability::PvhEntryPresent(GuestAddress(0x20_0000)));
    assert_eq!(loaded.kernel_load, GuestAddress(0x20_0000));
    assert!(loaded.kernel_end <= FILL_BASE_GPA);
    let mailbox_end = payload::MAILBOX_GPA + u64::from(payload::MAX_VCPUS) * payload::MAILBOX_STRIDE;
    assert!(mailbox_end <= loaded.kernel_load.raw_value());
}

#[derive(Default)]
struct Words(RefCell<HashMap<u64, u64>>, RefCell<Vec<u64>>);

impl GuestWords for Words {
    fn read_u64(&self, gpa: u64) -> u64 {
        self.0.borrow().get(&gpa).copied().unwrap_or(0)
    }

    fn write_u64(&self, gpa: u64, value: u64) {
        self.0.borrow_mut().insert(gpa, value);
        self.1.borrow_mut().push(gpa);
    }
}

#[test]
fn the_doorbell_rings_last() {
    let words = Words::default();
    let mailbox = Mailbox::new(&words, 3);
    let page = payload::MAILBOX_GPA + 3 * payload::MAILBOX_STRIDE;
    let ticket = mailbox.submit(Command::Fill { offset: 8, bytes: 16, seed: 9 });
    let order = words.1.borrow().clone();
    assert_eq!(
        order,
        [field::CMD, field::ARG0, field::ARG1, field::ARG2, field::CMD_SEQ, field::DOORBELL]
            .map(|f| page + f)
    );
    assert_eq!(mailbox.outcome(ticket), None);
    words.write_u64(page + field::RESULT1, 5);
    words.write_u64(page + field::DONE_SEQ, ticket.0);
    assert_eq!(mailbox.outcome(ticket), Some(Outcome { status: Status::Ok, results: [0, 5] }));

    let reset = mailbox.request_gap_reset();
    assert!(!mailbox.gap_was_reset(reset));
    assert_eq!(words.1.borrow().last(), Some(&(page + field::DOORBELL)));
}

#[test]
#[should_panic(expected = "no mailbox page for vCPU 64")]
fn refuses_a_vcpu_without_a_page() {
    let _ = Mailbox::new(&Words::default(), payload::MAX_VCPUS);
}

#[test]
fn words_of_neighbours_and_seeds_differ() {
    let words: HashSet<_> =
        (0..4).flat_map(|seed| (0..10_000).map(move |i| fill_word(FILL_BASE_GPA + 8 * i, seed))).collect();
    assert_eq!(words.len(), 40_000);
}

proptest! {
    #[test]
    fn spans_cover_what_they_should(
        lengths in prop::collection::vec(1u64..100, 0..8), offset in 0u64..500, bytes in 0u64..500,
    ) {
        let words = Words::default();
        words.write_u64(payload::MAILBOX_GPA + field::RANGE_COUNT, lengths.len() as u64);
        let mut all = Vec::new();
        for (i, &length) in (0u64..).zip(&lengths) {
            words.write_u64(payload::MAILBOX_GPA + field::RANGES + 16 * i, 1000 * i);
            words.write_u64(payload::MAILBOX_GPA + field::RANGES + 16 * i + 8, length);
            all.extend(1000 * i..1000 * i + length);
        }
        let expected: Vec<_> = all.into_iter().skip(offset as usize).take(bytes as usize).collect();
        let spans = Header::new(&words).spans(offset, bytes);
        let got: Vec<_> = spans.iter().flat_map(|&(start, length)| start..start + length).collect();
        prop_assert_eq!(got, expected);
        prop_assert!(spans.iter().all(|&(_, length)| length > 0));
    }

    #[test]
    fn one_seed_never_repeats_a_word(a in any::<u64>(), b in any::<u64>(), seed in any::<u64>()) {
        prop_assume!(a != b);
        prop_assert_ne!(fill_word(a, seed), fill_word(b, seed));
    }
}
