//! Who answers which I/O port, and which guest-physical addresses outside RAM.
//!
//! A bus is a sorted list of ranges that seldom changes and that every vCPU reads. Two devices that want the same
//! address are refused when the second one arrives, by name. What nobody claims reads as all ones and swallows
//! writes, as on a PC.

use std::sync::{Arc, PoisonError, RwLock};

/// A device behind I/O ports. Called by any vCPU's thread, so it locks for itself.
pub trait PortDevice: Send + Sync {
    /// Answers a read of `data.len()` (1, 2 or 4) bytes at `offset` ports from the device's first.
    fn read(&self, offset: u16, data: &mut [u8]);

    /// Takes a write of `data.len()` (1, 2 or 4) bytes at `offset` ports from the device's first.
    fn write(&self, offset: u16, data: &[u8]);
}

/// A device behind guest-physical addresses. Called by any vCPU's thread, so it locks for itself.
pub trait MmioDevice: Send + Sync {
    /// Answers a read of `data.len()` (1 to 8) bytes at `offset` bytes from the device's first.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes a write of `data.len()` (1 to 8) bytes at `offset` bytes from the device's first.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Two devices want the same address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{newcomer} at {start:#x}..={end:#x} overlaps {owner} at {owner_start:#x}..={owner_end:#x}")]
pub struct OverlapError {
    /// The device that was refused.
    pub newcomer: String,
    /// Its first address.
    pub start: u64,
    /// Its last address.
    pub end: u64,
    /// The device that is there.
    pub owner: String,
    /// Its first address.
    pub owner_start: u64,
    /// Its last address.
    pub owner_end: u64,
}

struct Range<D: ?Sized> {
    start: u64,
    last: u64,
    name: String,
    device: Arc<D>,
}

/// The ranges of one address space, sorted.
struct Ranges<D: ?Sized>(RwLock<Vec<Range<D>>>);

impl<D: ?Sized> Ranges<D> {
    const fn new() -> Self {
        Self(RwLock::new(Vec::new()))
    }

    fn insert(&self, start: u64, len: u64, name: &str, device: Arc<D>) -> Result<(), OverlapError> {
        let last = start.saturating_add(len.max(1) - 1);
        let mut ranges = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let at = ranges.partition_point(|r| r.last < start);
        if let Some(owner) = ranges.get(at).filter(|r| r.start <= last) {
            return Err(OverlapError {
                newcomer: name.to_owned(),
                start,
                end: last,
                owner: owner.name.clone(),
                owner_start: owner.start,
                owner_end: owner.last,
            });
        }
        ranges.insert(at, Range { start, last, name: name.to_owned(), device });
        Ok(())
    }

    fn remove(&self, start: u64) -> bool {
        let mut ranges = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let before = ranges.len();
        ranges.retain(|r| r.start != start);
        ranges.len() != before
    }

    /// Returns the device that owns all of `len` bytes at `address`, and the offset into it.
    fn find(&self, address: u64, len: usize) -> Option<(Arc<D>, u64)> {
        let ranges = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let last = address.checked_add((len as u64).saturating_sub(1))?;
        let range = ranges.get(ranges.partition_point(|r| r.last < address))?;
        (range.start <= address && last <= range.last)
            .then(|| (Arc::clone(&range.device), address - range.start))
    }

    fn names(&self) -> Vec<(u64, u64, String)> {
        let ranges = self.0.read().unwrap_or_else(PoisonError::into_inner);
        ranges.iter().map(|r| (r.start, r.last, r.name.clone())).collect()
    }
}

/// The I/O ports of the machine.
pub struct PortBus(Ranges<dyn PortDevice>);

impl PortBus {
    /// Makes a bus on which nobody answers.
    pub const fn new() -> Self {
        Self(Ranges::new())
    }

    /// Gives `len` ports from `base` on to a device. `name` is for messages.
    ///
    /// # Errors
    /// [`OverlapError`] when one of the ports has an owner.
    pub fn insert(
        &self,
        base: u16,
        len: u16,
        name: &str,
        device: Arc<dyn PortDevice>,
    ) -> Result<(), OverlapError> {
        self.0.insert(base.into(), len.into(), name, device)
    }

    /// Takes back the ports of the device that starts at `base`; tells whether there was one.
    pub fn remove(&self, base: u16) -> bool {
        self.0.remove(base.into())
    }

    /// Reads one unit of `data.len()` bytes.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        match self.0.find(port.into(), data.len()) {
            Some((device, offset)) => device.read(offset as u16, data),
            None => data.fill(0xff),
        }
    }

    /// Writes one unit of `data.len()` bytes.
    pub fn write(&self, port: u16, data: &[u8]) {
        if let Some((device, offset)) = self.0.find(port.into(), data.len()) {
            device.write(offset as u16, data);
        }
    }

    /// Returns first port, last port and name of every device.
    pub fn devices(&self) -> Vec<(u64, u64, String)> {
        self.0.names()
    }
}

impl Default for PortBus {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for PortBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("PortBus").field(&self.devices()).finish()
    }
}

/// The guest-physical addresses outside RAM.
pub struct MmioBus(Ranges<dyn MmioDevice>);

impl MmioBus {
    /// Makes a bus on which nobody answers.
    pub const fn new() -> Self {
        Self(Ranges::new())
    }

    /// Gives `len` bytes from `base` on to a device. `name` is for messages.
    ///
    /// # Errors
    /// [`OverlapError`] when one of the addresses has an owner.
    pub fn insert(
        &self,
        base: u64,
        len: u64,
        name: &str,
        device: Arc<dyn MmioDevice>,
    ) -> Result<(), OverlapError> {
        self.0.insert(base, len, name, device)
    }

    /// Takes back the addresses of the device that starts at `base`; tells whether there was one.
    pub fn remove(&self, base: u64) -> bool {
        self.0.remove(base)
    }

    /// Reads `data.len()` bytes.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.0.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes `data.len()` bytes.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.0.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    /// Returns first address, last address and name of every device.
    pub fn devices(&self) -> Vec<(u64, u64, String)> {
        self.0.names()
    }
}

impl Default for MmioBus {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for MmioBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("MmioBus").field(&self.devices()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u16, Vec<u8>)>>);

    impl PortDevice for Recorder {
        fn read(&self, offset: u16, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&self, offset: u16, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn recorder() -> Arc<Recorder> {
        Arc::default()
    }

    #[test]
    fn the_owner_answers_with_its_own_offsets() {
        let bus = PortBus::new();
        let device = recorder();
        bus.insert(0x3f8, 8, "COM1", device.clone()).unwrap();
        bus.insert(0x60, 1, "keyboard", recorder()).unwrap();
        let mut byte = [0];
        bus.read(0x3fd, &mut byte);
        assert_eq!(byte, [5]);
        bus.write(0x3f9, &[1, 2]);
        assert_eq!(*device.0.lock().unwrap(), [(1, vec![1, 2])]);
    }

    #[test]
    fn nobody_reads_as_all_ones() {
        let bus = PortBus::new();
        bus.insert(0x10, 4, "four", recorder()).unwrap();
        for port in [0x0f, 0x14, 0xffff] {
            let mut data = [0; 4];
            bus.read(port, &mut data);
            assert_eq!(data, [0xff; 4]);
            bus.write(port, &data);
        }
        // An access that sticks out of the device belongs to nobody.
        let mut data = [0; 4];
        bus.read(0x12, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.read(0xffff, &mut data);
    }

    #[test]
    fn an_overlap_is_refused_by_name() {
        let bus = PortBus::new();
        bus.insert(0x3f8, 8, "COM1", recorder()).unwrap();
        for (base, len) in [(0x3f8, 8), (0x3f0, 9), (0x3ff, 1), (0x3f9, 2), (0x300, 0x1000)] {
            let error = bus.insert(base, len, "thief", recorder()).unwrap_err();
            assert_eq!((error.owner.as_str(), error.newcomer.as_str()), ("COM1", "thief"));
        }
        let error = bus.insert(0x3ff, 2, "thief", recorder()).unwrap_err();
        assert_eq!(error.to_string(), "thief at 0x3ff..=0x400 overlaps COM1 at 0x3f8..=0x3ff");
        bus.insert(0x400, 1, "after", recorder()).unwrap();
        bus.insert(0x3f7, 1, "before", recorder()).unwrap();
        assert_eq!(bus.devices().len(), 3);
        assert!(bus.remove(0x3f8));
        assert!(!bus.remove(0x3f8));
        bus.insert(0x3f8, 8, "COM1 again", recorder()).unwrap();
    }

    #[test]
    fn the_last_addresses_do_not_wrap() {
        struct Nothing;
        impl MmioDevice for Nothing {
            fn read(&self, _: u64, data: &mut [u8]) {
                data.fill(0);
            }
            fn write(&self, _: u64, _: &[u8]) {}
        }
        let bus = MmioBus::new();
        bus.insert(u64::MAX - 7, 8, "top", Arc::new(Nothing)).unwrap();
        let mut data = [1; 8];
        bus.read(u64::MAX - 7, &mut data);
        assert_eq!(data, [0; 8]);
        bus.read(u64::MAX - 3, &mut data);
        assert_eq!(data, [0xff; 8]);
    }
}
