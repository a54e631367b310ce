//! Configuration space of a function of type 0: bytes, and which of their bits a guest can change.
//!
//! Everything else follows from that: writing ones to a BAR and reading its size back, for example, works because the bits
//! below the size cannot be changed.

/// Bytes of it. The extended space behind them reads as zero: no extended capability.
pub const CONFIG_LEN: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CACHE_LINE: usize = 0x0c;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// Where the first capability is.
const FIRST_CAPABILITY: usize = 0x40;

/// Command register: memory BARs are answered.
const MEMORY_SPACE: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;
const INTX_DISABLE: u16 = 1 << 10;
/// Status register: there is a list of capabilities.
const CAPABILITY_LIST: u16 = 1 << 4;
/// A BAR of memory with an address of 64 bits. The bits below 16 are flags.
const BAR_64_BIT: u64 = 0b100;
const BAR_FLAGS: u64 = 0xf;

/// What a function says that it is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class and subclass.
    pub class: (u8, u8),
    /// Vendor id and device id of the subsystem.
    pub subsystem: (u16, u16),
}

/// What of configuration space a guest has set, apart from capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Registers {
    pub(super) command: u16,
    pub(super) bar: u64,
    pub(super) cache_line: u8,
    pub(super) interrupt_line: u8,
}

/// Configuration space.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_LEN],
    /// The bits that a guest can change.
    writable: [u8; CONFIG_LEN],
    /// Where the pointer to the next capability goes.
    last_capability: usize,
    end_of_capabilities: usize,
}

impl ConfigSpace {
    /// Of a function without BAR and capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_LEN],
            writable: [0; CONFIG_LEN],
            last_capability: CAPABILITIES,
            end_of_capabilities: FIRST_CAPABILITY,
        };
        let Identity { vendor, device, revision, class, subsystem } = *identity;
        space.set(0, &vendor.to_le_bytes());
        space.set(2, &device.to_le_bytes());
        space.set(8, &[revision, 0, class.1, class.0]);
        space.set(SUBSYSTEM, &subsystem.0.to_le_bytes());
        space.set(SUBSYSTEM + 2, &subsystem.1.to_le_bytes());
        space.allow(CACHE_LINE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Adds BAR 0: memory of `size` bytes, a power of two of at least 16, at `address`.
    pub fn add_bar(&mut self, address: u64, size: u64) {
        self.set(BAR0, &(address | BAR_64_BIT).to_le_bytes());
        self.allow(BAR0, &(!(size - 1) & !BAR_FLAGS).to_le_bytes());
        self.allow(COMMAND, &(MEMORY_SPACE | BUS_MASTER | INTX_DISABLE).to_le_bytes());
    }

    /// Adds a capability: its id, and what follows id and pointer. Returns where it is. `writable` are the bits of `body`
    /// that a guest can change.
    ///
    /// # Panics
    /// If the space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.end_of_capabilities;
        self.set(self.last_capability, &[at as u8]);
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        let status = self.u16_at(STATUS) | CAPABILITY_LIST;
        self.set(STATUS, &status.to_le_bytes());
        self.last_capability = at + 1;
        self.end_of_capabilities = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Sets bytes, whether a guest can change them or not.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Reads as a guest does: any number of bytes anywhere.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes as a guest does: any number of bytes anywhere, of which only the bits that can be changed are.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, new) in (offset..CONFIG_LEN).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | new & mask;
        }
    }

    /// The address of BAR 0 while it is answered.
    pub fn memory(&self) -> Option<u64> {
        (self.u16_at(COMMAND) & MEMORY_SPACE != 0).then(|| self.bar())
    }

    /// Whether the function may access memory by itself.
    pub fn is_bus_master(&self) -> bool {
        self.u16_at(COMMAND) & BUS_MASTER != 0
    }

    /// The 16-bit register at `offset`.
    pub fn u16_at(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// The 32-bit register at `offset`.
    pub fn u32_at(&self, offset: usize) -> u32 {
        u32::from(self.u16_at(offset)) | u32::from(self.u16_at(offset + 2)) << 16
    }

    pub(super) fn bar(&self) -> u64 {
        (u64::from(self.u32_at(BAR0)) | u64::from(self.u32_at(BAR0 + 4)) << 32) & !BAR_FLAGS
    }

    pub(super) fn registers(&self) -> Registers {
        Registers {
            command: self.u16_at(COMMAND),
            bar: self.bar(),
            cache_line: self.bytes[CACHE_LINE],
            interrupt_line: self.bytes[INTERRUPT_LINE],
        }
    }

    /// Sets them as a guest would. Reads back what it makes of values that a guest cannot have set.
    pub(super) fn set_registers(&mut self, registers: &Registers) -> Registers {
        self.write(COMMAND, &registers.command.to_le_bytes());
        self.write(BAR0, &registers.bar.to_le_bytes());
        self.write(CACHE_LINE, &[registers.cache_line]);
        self.write(INTERRUPT_LINE, &[registers.interrupt_line]);
        self.registers()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1044,
            revision: 1,
            class: (0xff, 0),
            subsystem: (0x1af4, 0x1100),
        });
        space.add_bar(0xc001_0000, 0x1_0000);
        space
    }

    fn read(space: &ConfigSpace, offset: usize) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn what_it_is_cannot_be_changed() {
        let mut space = space();
        let before = space.clone();
        for offset in (0..CONFIG_LEN).step_by(4) {
            space.write(offset, &[0; 4]);
            space.write(offset, &[0xff; 4]);
        }
        assert_eq!(read(&space, 0), 0x1044_1af4);
        assert_eq!(read(&space, 8), 0xff00_0001);
        assert_eq!(read(&space, 0x2c), 0x1100_1af4);
        assert_eq!(read(&space, 4), read(&before, 4) | 0x406);
    }

    #[test]
    fn a_bar_tells_its_size_and_moves() {
        let mut space = space();
        assert_eq!((read(&space, 0x10), read(&space, 0x14)), (0xc001_0004, 0));
        space.write(0x10, &[0xff; 4]);
        space.write(0x14, &[0xff; 4]);
        assert_eq!((read(&space, 0x10), read(&space, 0x14)), (0xffff_0004, 0xffff_ffff));
        space.write(0x10, &0xc123_4567u32.to_le_bytes());
        space.write(0x14, &[0; 4]);
        assert_eq!(space.memory(), None, "nothing is answered before the guest says so");
        space.write(4, &[2]);
        assert_eq!(space.memory(), Some(0xc123_0000));
        // Byte by byte, as nobody does.
        space.write(0x13, &[0xd0]);
        assert_eq!(space.memory(), Some(0xd023_0000));
    }

    #[test]
    fn accesses_may_be_anywhere() {
        let mut space = space();
        let mut data = [7; 8];
        space.read(252, &mut data);
        assert_eq!(data, [0; 8]);
        space.read(usize::MAX - 3, &mut data[..2]);
        space.write(252, &[1; 8]);
        space.write(4096, &[1; 8]);
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut space = space();
        assert_eq!(space.u16_at(6) & 0x10, 0);
        let first = space.add_capability(9, &[4, 0, 0], &[]);
        let second = space.add_capability(0x11, &[1, 2, 3, 4], &[0, 0x80]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_ne!(space.u16_at(6) & 0x10, 0);
        assert_eq!(read(&space, 0x34) & 0xff, 0x40);
        assert_eq!((space.u16_at(0x40), space.u16_at(0x48)), (0x4809, 0x0011));
        space.write(0x48, &[0xff; 6]);
        assert_eq!(space.u32_at(0x48), 0x8201_0011);
    }
}
