//! The built-in guest and its mailbox: a PVH ELF that beats in ring 3 on every vCPU and obeys commands left in
//! guest RAM.
//!
//! It measures an update from where it counts, inside the guest, and it proves that RAM survived. It needs no
//! device, no interrupt and no disk, and runs the same under other VMMs. This module neither loads nor runs it;
//! it holds the image and speaks to a running one through [`GuestWords`], the harness's way to guest RAM.
//! The truth is `payload/payload.S`; `payload/README.md` tells how it is built up.
//!
//! ```
//! use std::{cell::RefCell, collections::HashMap};
//! use vmm_core::payload::{Command, GuestWords, Mailbox};
//!
//! #[derive(Default)]
//! struct Ram(RefCell<HashMap<u64, u64>>);
//! impl GuestWords for Ram {
//!     fn read_u64(&self, gpa: u64) -> u64 {
//!         *self.0.borrow().get(&gpa).unwrap_or(&0)
//!     }
//!     fn write_u64(&self, gpa: u64, value: u64) {
//!         self.0.borrow_mut().insert(gpa, value);
//!     }
//! }
//!
//! let ram = Ram::default();
//! let vcpu0 = Mailbox::new(&ram, 0);
//! let ticket = vcpu0.submit(Command::Fill { offset: 0, bytes: 64 << 20, seed: 7 });
//! assert_eq!(vcpu0.outcome(ticket), None, "nobody runs this guest");
//! ```

/// The payload, a static ELF64 with the PVH entry note. Its segments lie at 2 MiB to 4 MiB.
///
/// Words of the command line that it heeds: `cpus=N` (wait for N vCPUs at start, and not for a silence of about
/// 50 ms after the last one) and `noiopl` (leave ring 3 without port I/O).
pub const ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/payload.elf"));

/// Guest-physical address of the first mailbox page, that of the boot vCPU.
pub const MAILBOX_GPA: u64 = 0x10_0000;
/// Bytes between the mailbox pages of two vCPUs.
pub const MAILBOX_STRIDE: u64 = 4096;
/// vCPUs that have a page. One with a higher APIC id is halted and never heard of.
pub const MAX_VCPUS: u32 = 64;
/// Where usable RAM begins, in bytes: the payload and its tables lie below.
pub const FILL_BASE_GPA: u64 = 0x40_0000;
/// Where usable RAM ends at the latest, in bytes: the payload maps no more.
pub const FILL_END_GPA: u64 = 256 << 30;
/// Long commands beat whenever they reach a multiple of this many bytes.
pub const CHUNK_BYTES: u64 = 64 << 10;
/// "CPRPAYL1": written to [`field::MAGIC`] last of all, when the boot vCPU begins to beat.
pub const MAGIC: u64 = u64::from_le_bytes(*b"CPRPAYL1");
/// The layout that this module speaks, as found at [`field::VERSION`].
pub const LAYOUT_VERSION: u64 = 1;

/// Byte offsets of the mailbox's words, all `u64`, little endian, aligned.
///
/// "Header" words exist in the page of the boot vCPU only. The guest writes everything below `0x200`, the harness
/// everything from there on; `0x300` and above is the guest's own.
pub mod field {
    /// Header: [`super::MAGIC`] once the boot vCPU beats.
    pub const MAGIC: u64 = 0x000;
    /// Header: [`super::LAYOUT_VERSION`].
    pub const VERSION: u64 = 0x008;
    /// Header: how many vCPUs reached ring 3; latecomers are added.
    pub const STARTED: u64 = 0x010;
    /// Header: which ones, a bit per APIC id.
    pub const STARTED_MASK: u64 = 0x018;
    /// Header: usable RAM in bytes, the sum of the ranges.
    pub const USABLE_BYTES: u64 = 0x020;
    /// Header: [`super::flag`] bits.
    pub const FLAGS: u64 = 0x028;
    /// Header: number of ranges of usable RAM.
    pub const RANGE_COUNT: u64 = 0x030;
    /// Header: TSC at the PVH entry.
    pub const TSC_ENTRY: u64 = 0x038;
    /// Header: TSC when the boot vCPU began to beat.
    pub const TSC_READY: u64 = 0x040;
    /// Header: up to [`MAX_RANGES`] pairs of address and length, bytes, in the order of the memory map.
    pub const RANGES: u64 = 0x080;
    /// Room at [`RANGES`].
    pub const MAX_RANGES: u64 = 8;

    /// Beats since the start.
    pub const BEATS: u64 = 0x100;
    /// TSC of the last beat.
    pub const LAST_TSC: u64 = 0x108;
    /// Largest distance of two beats since the last gap reset, TSC cycles.
    pub const MAX_GAP_TSC: u64 = 0x110;
    /// TSC at the end of that gap.
    pub const MAX_GAP_AT_TSC: u64 = 0x118;
    /// The last gap reset that was carried out.
    pub const GAP_RESET_ACK: u64 = 0x120;
    /// Beats whose TSC lay before that of the beat before.
    pub const TSC_BACKWARDS: u64 = 0x128;
    /// The last command that was carried out; its results are complete.
    pub const DONE_SEQ: u64 = 0x140;
    /// Its [`super::Status`].
    pub const STATUS: u64 = 0x148;
    /// Its first result.
    pub const RESULT0: u64 = 0x150;
    /// Its second result.
    pub const RESULT1: u64 = 0x158;
    /// Bytes that the running long command is through with.
    pub const PROGRESS_BYTES: u64 = 0x160;
    /// Pages touched by [`super::Command::Walk`] since the start.
    pub const WALKED_PAGES: u64 = 0x168;
    /// Bytes echoed since the start.
    pub const ECHOED_BYTES: u64 = 0x170;
    /// [`super::VcpuState`].
    pub const STATE: u64 = 0x178;
    /// APIC id by which the page was chosen.
    pub const APIC_ID: u64 = 0x180;
    /// TSC when this vCPU reached ring 3.
    pub const TSC_START: u64 = 0x188;
    /// Port accesses that ended in #GP.
    pub const IO_FAULTS: u64 = 0x190;
    /// Vector of the exception that ended this vCPU.
    pub const FAULT_VECTOR: u64 = 0x1a0;
    /// Its error code.
    pub const FAULT_ERROR: u64 = 0x1a8;
    /// Its instruction pointer.
    pub const FAULT_RIP: u64 = 0x1b0;
    /// Its CR2.
    pub const FAULT_CR2: u64 = 0x1b8;

    /// Changed by the harness, last of all, when a word below has changed; the one word read at every beat.
    pub const DOORBELL: u64 = 0x200;
    /// A new value asks for a gap reset.
    pub const GAP_RESET: u64 = 0x208;
    /// A new value starts the command.
    pub const CMD_SEQ: u64 = 0x210;
    /// Its code.
    pub const CMD: u64 = 0x218;
    /// Its first argument.
    pub const ARG0: u64 = 0x220;
    /// Its second argument.
    pub const ARG1: u64 = 0x228;
    /// Its third argument.
    pub const ARG2: u64 = 0x230;
}

/// Bits of [`field::FLAGS`].
pub mod flag {
    /// COM1 is not there (it reads as all ones) or ring 3 may not reach it: nothing is printed or echoed.
    pub const NO_SERIAL: u64 = 0x01;
    /// Ring 3 was reached by `iretq`, as `sysexitq` raised #UD.
    pub const IRETQ: u64 = 0x02;
    /// Port I/O was given up on request (`noiopl`).
    pub const NO_IOPL: u64 = 0x04;
    /// CPUID shows no local APIC: no other vCPU was started.
    pub const NO_LAPIC: u64 = 0x08;
    /// RAM beyond [`super::FILL_END_GPA`] or beyond the eighth range is left out.
    pub const RAM_CUT: u64 = 0x10;
}

/// The word that `Fill` writes at guest-physical `address` (a multiple of 8) for `seed`.
///
/// For one seed no two addresses share a word, so a page restored to the wrong place shows.
#[must_use]
pub fn fill_word(address: u64, seed: u64) -> u64 {
    let x = address
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(seed.wrapping_mul(0xd1b5_4a32_d192_ed03))
        .wrapping_add(0x8cb9_2ba7_2f3d_8dd7);
    x ^ (x >> 32)
}

/// The harness's access to guest RAM, one aligned word at a time.
///
/// The guest runs meanwhile: implement both as single 64-bit accesses that the compiler keeps in program order
/// (`AtomicU64` with acquire and release). An address outside RAM is the implementer's to refuse; [`Mailbox`]
/// and [`Header`] stay inside the mailbox.
pub trait GuestWords {
    /// Reads the word at guest-physical `gpa`.
    fn read_u64(&self, gpa: u64) -> u64;
    /// Writes the word at guest-physical `gpa`.
    fn write_u64(&self, gpa: u64, value: u64);
}

/// What a vCPU can be told to do.
///
/// `offset` and `bytes` count usable RAM, the ranges strung together without their holes; both are multiples of
/// 8, or the command is refused with [`Status::Range`], as it is beyond the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Nothing; wakes a parked vCPU.
    Nop,
    /// Writes [`fill_word`] of every word's guest-physical address.
    Fill {
        /// Where to begin.
        offset: u64,
        /// How much.
        bytes: u64,
        /// Chooses the pattern.
        seed: u64,
    },
    /// Compares with what `Fill` wrote. Results: words that differ, guest-physical address of the first.
    Verify {
        /// Where to begin.
        offset: u64,
        /// How much.
        bytes: u64,
        /// The pattern's choice.
        seed: u64,
    },
    /// Writes to every 4 KiB page and leaves its contents as they are. Result: pages touched.
    Touch {
        /// Where to begin.
        offset: u64,
        /// How much.
        bytes: u64,
    },
    /// From now on touches one page with every beat, round and round; see [`Mailbox::walked_pages`]. Stopped by
    /// `bytes` 0.
    Walk {
        /// Where to begin.
        offset: u64,
        /// How much, or 0 to stop.
        bytes: u64,
    },
    /// Prints `beat <number>\n` on COM1.
    Print {
        /// The number, printed in decimal.
        number: u64,
    },
    /// From now on polls COM1 at every beat and sends back what comes in.
    Echo {
        /// On or off.
        on: bool,
    },
    /// Stops beating until the doorbell rings next, also for a gap reset. The time parked is no gap.
    Park,
    /// Reads an I/O port. Result: the value.
    PortIn {
        /// Port number.
        port: u16,
        /// 1, 2 or 4.
        bytes: u8,
    },
    /// Writes an I/O port.
    PortOut {
        /// Port number.
        port: u16,
        /// 1, 2 or 4.
        bytes: u8,
        /// What to write; excess bits are dropped.
        value: u32,
    },
    /// Reads memory or MMIO, any address below 4 GiB or in RAM; elsewhere the vCPU ends in a page fault.
    /// Result: the value.
    Load {
        /// Guest-physical address.
        gpa: u64,
        /// 1, 2, 4 or 8.
        bytes: u8,
    },
    /// Writes memory or MMIO, like `Load`.
    Store {
        /// Guest-physical address.
        gpa: u64,
        /// 1, 2, 4 or 8.
        bytes: u8,
        /// What to write; excess bits are dropped.
        value: u64,
    },
}

impl Command {
    /// The words at [`field::CMD`] and the three after it.
    #[must_use]
    pub fn encode(self) -> [u64; 4] {
        match self {
            Self::Nop => [0, 0, 0, 0],
            Self::Fill { offset, bytes, seed } => [1, offset, bytes, seed],
            Self::Verify { offset, bytes, seed } => [2, offset, bytes, seed],
            Self::Touch { offset, bytes } => [3, offset, bytes, 0],
            Self::Walk { offset, bytes } => [4, offset, bytes, 0],
            Self::Print { number } => [5, number, 0, 0],
            Self::Echo { on } => [6, on.into(), 0, 0],
            Self::Park => [7, 0, 0, 0],
            Self::PortIn { port, bytes } => [8, port.into(), bytes.into(), 0],
            Self::PortOut { port, bytes, value } => [9, port.into(), bytes.into(), value.into()],
            Self::Load { gpa, bytes } => [10, gpa, bytes.into(), 0],
            Self::Store { gpa, bytes, value } => [11, gpa, bytes.into(), value],
        }
    }
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// This payload does not know the command.
    Unknown,
    /// The port did not answer or ring 3 may not reach it.
    NoIo,
    /// Beyond usable RAM, not in whole words, or an access of an impossible size.
    Range,
    /// A value of a layout that this module does not know.
    Other(u64),
}

/// A command's end: see [`Command`] for what the results mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Whether it worked.
    pub status: Status,
    /// [`field::RESULT0`] and [`field::RESULT1`].
    pub results: [u64; 2],
}

/// What a vCPU is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuState {
    /// Never reached ring 3.
    Absent,
    /// Beating or at work on a command.
    Beating,
    /// Parked by [`Command::Park`].
    Parked,
    /// Ended by an exception; see [`field::FAULT_VECTOR`] and the words after it.
    Faulted,
    /// A value of a layout that this module does not know.
    Other(u64),
}

/// The receipt of a request, good for the vCPU that took it. It is a plain number, so that it can travel with the
/// state of a harness over an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Ticket(pub u64);

/// The mailbox page of one vCPU.
///
/// Requests are numbered and stay in guest RAM until they are answered, so a pause or an update in between loses
/// none. One harness at a time may submit, and one command at a time per vCPU: a second one submitted before the
/// first is done takes its place, or is taken for it.
#[derive(Debug)]
pub struct Mailbox<'a, M: ?Sized> {
    words: &'a M,
    page: u64,
}

impl<'a, M: GuestWords + ?Sized> Mailbox<'a, M> {
    /// The page of the vCPU with APIC id `vcpu`; 0 is the boot vCPU.
    ///
    /// # Panics
    ///
    /// If `vcpu` is not below [`MAX_VCPUS`].
    #[must_use]
    pub fn new(words: &'a M, vcpu: u32) -> Self {
        assert!(vcpu < MAX_VCPUS, "the payload has no mailbox page for vCPU {vcpu}");
        Self { words, page: MAILBOX_GPA + u64::from(vcpu) * MAILBOX_STRIDE }
    }

    /// The word at `offset`, one of [`field`].
    #[must_use]
    pub fn read(&self, offset: u64) -> u64 {
        debug_assert!(offset < MAILBOX_STRIDE);
        self.words.read_u64(self.page + offset)
    }

    fn write(&self, offset: u64, value: u64) {
        self.words.write_u64(self.page + offset, value);
    }

    /// Beats since the start.
    #[must_use]
    pub fn beats(&self) -> u64 {
        self.read(field::BEATS)
    }

    /// TSC of the last beat.
    #[must_use]
    pub fn last_tsc(&self) -> u64 {
        self.read(field::LAST_TSC)
    }

    /// Largest distance of two beats since the last gap reset, TSC cycles.
    #[must_use]
    pub fn max_gap_tsc(&self) -> u64 {
        self.read(field::MAX_GAP_TSC)
    }

    /// Pages touched by [`Command::Walk`] since the start.
    #[must_use]
    pub fn walked_pages(&self) -> u64 {
        self.read(field::WALKED_PAGES)
    }

    /// What the vCPU is doing.
    #[must_use]
    pub fn state(&self) -> VcpuState {
        match self.read(field::STATE) {
            0 => VcpuState::Absent,
            1 => VcpuState::Beating,
            2 => VcpuState::Parked,
            3 => VcpuState::Faulted,
            other => VcpuState::Other(other),
        }
    }

    /// Asks for the largest gap to be forgotten; also honoured in the midst of a long command.
    pub fn request_gap_reset(&self) -> Ticket {
        let seq = self.read(field::GAP_RESET).wrapping_add(1);
        self.write(field::GAP_RESET, seq);
        self.ring();
        Ticket(seq)
    }

    /// Whether that was done.
    #[must_use]
    pub fn gap_was_reset(&self, ticket: Ticket) -> bool {
        self.read(field::GAP_RESET_ACK) == ticket.0
    }

    /// Hands a command to the vCPU.
    pub fn submit(&self, command: Command) -> Ticket {
        let seq = self.read(field::CMD_SEQ).wrapping_add(1);
        for (i, word) in (0..).zip(command.encode()) {
            self.write(field::CMD + 8 * i, word);
        }
        self.write(field::CMD_SEQ, seq);
        self.ring();
        Ticket(seq)
    }

    /// How the command ended, if it has.
    #[must_use]
    pub fn outcome(&self, ticket: Ticket) -> Option<Outcome> {
        if self.read(field::DONE_SEQ) != ticket.0 {
            return None;
        }
        let status = match self.read(field::STATUS) {
            0 => Status::Ok,
            1 => Status::Unknown,
            2 => Status::NoIo,
            3 => Status::Range,
            other => Status::Other(other),
        };
        Some(Outcome { status, results: [self.read(field::RESULT0), self.read(field::RESULT1)] })
    }

    fn ring(&self) {
        self.write(field::DOORBELL, self.read(field::DOORBELL).wrapping_add(1));
    }
}

/// The mailbox's header: what holds for the whole guest.
#[derive(Debug)]
pub struct Header<'a, M: ?Sized> {
    words: &'a M,
}

impl<'a, M: GuestWords + ?Sized> Header<'a, M> {
    /// The header of the guest whose RAM this is.
    #[must_use]
    pub fn new(words: &'a M) -> Self {
        Self { words }
    }

    /// The word at `offset`, one of [`field`].
    #[must_use]
    pub fn read(&self, offset: u64) -> u64 {
        debug_assert!(offset < MAILBOX_STRIDE);
        self.words.read_u64(MAILBOX_GPA + offset)
    }

    /// Whether the boot vCPU beats, and speaks our layout. The other words mean nothing before.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.read(field::MAGIC) == MAGIC && self.read(field::VERSION) == LAYOUT_VERSION
    }

    /// How many vCPUs reached ring 3.
    #[must_use]
    pub fn started(&self) -> u64 {
        self.read(field::STARTED)
    }

    /// Which ones, a bit per APIC id.
    #[must_use]
    pub fn started_mask(&self) -> u64 {
        self.read(field::STARTED_MASK)
    }

    /// Usable RAM in bytes.
    #[must_use]
    pub fn usable_bytes(&self) -> u64 {
        self.read(field::USABLE_BYTES)
    }

    /// The bits of [`flag`].
    #[must_use]
    pub fn flags(&self) -> u64 {
        self.read(field::FLAGS)
    }

    /// The ranges of usable RAM: guest-physical address and length in bytes, in the guest's order.
    #[must_use]
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        (0..self.read(field::RANGE_COUNT).min(field::MAX_RANGES))
            .map(|i| (self.read(field::RANGES + 16 * i), self.read(field::RANGES + 16 * i + 8)))
            .collect()
    }

    /// Where `bytes` bytes from `offset` of usable RAM lie: guest-physical address and length of each piece. What
    /// goes beyond the end is left out.
    #[must_use]
    pub fn spans(&self, offset: u64, bytes: u64) -> Vec<(u64, u64)> {
        let mut skip = offset;
        let mut left = bytes;
        let mut spans = Vec::new();
        for (start, length) in self.ranges() {
            let skipped = skip.min(length);
            skip -= skipped;
            let piece = left.min(length - skipped);
            left -= piece;
            if piece > 0 {
                spans.push((start + skipped, piece));
            }
        }
        spans
    }
}
