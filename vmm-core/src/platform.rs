//! The small devices that a PC cannot do without: reset, power-off, and the time of day.
//!
//! - [`KeyboardController`]: port 0x64 of the i8042, of which only the reset line exists.
//! - [`PowerDevice`]: ports 0x600 to 0x602, the sleep and reset registers of hardware-reduced ACPI.
//! - [`Rtc`]: ports 0x70 and 0x71, a MC146818 that can be read but not set. It shows the host's UTC.
//!
//! They hold next to no state: only the register that the RTC's index port selects.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::ports::{OverlapError, PortBus, PortDevice};
use crate::state::PlatformState;
use crate::vcpu::{EventSender, VcpuEvent};

/// The i8042's data port.
pub const I8042_DATA_PORT: u16 = 0x60;
/// The i8042's command and status port.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// Sleep control register of hardware-reduced ACPI, one byte.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// Sleep status register of hardware-reduced ACPI, one byte.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register, one byte.
pub const RESET_PORT: u16 = 0x602;
/// What to write to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type that powers the machine off, as the ACPI tables' `_S5` must say.
pub const SLEEP_TYPE_OFF: u8 = 5;

/// SLP_EN of the sleep control register (ACPI 6.5, 4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;

/// Puts the platform devices on the bus; returns the one that has state.
pub(crate) fn attach(ports: &PortBus, events: &EventSender) -> Result<Arc<Rtc>, OverlapError> {
    let keyboard = Arc::new(KeyboardController { events: events.clone() });
    ports.insert(I8042_DATA_PORT, 1, "i8042 data", keyboard.clone())?;
    ports.insert(I8042_COMMAND_PORT, 1, "i8042", keyboard)?;
    ports.insert(SLEEP_CONTROL_PORT, 3, "ACPI power", Arc::new(PowerDevice { events: events.clone() }))?;
    let rtc = Arc::new(Rtc::new());
    ports.insert(Rtc::INDEX_PORT, 2, "RTC", rtc.clone())?;
    Ok(rtc)
}

/// The reset line of an i8042. It has no keyboard: its buffers always read as empty.
#[derive(Debug)]
pub struct KeyboardController {
    events: EventSender,
}

impl PortDevice for KeyboardController {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u16, data: &[u8]) {
        // "Pulse output port" with bit 0, the reset line, pulsed. Sent to the data port it is a plain byte, and no
        // guest sends it one when there is no keyboard.
        if data.first() == Some(&0xfe) {
            self.events.send(VcpuEvent::Reset { source: "i8042" });
        }
    }
}

/// The sleep and reset registers of hardware-reduced ACPI.
#[derive(Debug)]
pub struct PowerDevice {
    events: EventSender,
}

impl PortDevice for PowerDevice {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        // Nothing to report: the machine never wakes from a sleep.
        data.fill(0);
    }

    fn write(&self, offset: u16, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        match SLEEP_CONTROL_PORT + offset {
            SLEEP_CONTROL_PORT if value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == SLEEP_TYPE_OFF => {
                self.events.send(VcpuEvent::PowerOff);
            }
            RESET_PORT if value == RESET_VALUE => self.events.send(VcpuEvent::Reset { source: "ACPI" }),
            _ => {}
        }
    }
}

/// A read-only MC146818 real-time clock: the host's UTC in BCD, 24-hour mode, no interrupts, no CMOS memory.
#[derive(Debug)]
pub struct Rtc {
    index: AtomicU8,
}

impl Rtc {
    /// The port that selects a register; the next one reads it.
    pub const INDEX_PORT: u16 = 0x70;

    fn new() -> Self {
        Self { index: AtomicU8::new(0) }
    }

    /// Saves which register is selected.
    pub fn save(&self) -> PlatformState {
        PlatformState { rtc_index: self.index.load(Ordering::Relaxed) }
    }

    /// Selects the register that was.
    pub fn restore(&self, state: &PlatformState) {
        self.index.store(state.rtc_index & 0x7f, Ordering::Relaxed);
    }
}

impl PortDevice for Rtc {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let (1, Some(value)) = (offset, data.first_mut()) {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            *value = rtc_register(self.index.load(Ordering::Relaxed), now);
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        // The top bit masks NMIs on a PC. The guest cannot set the clock.
        if let (0, Some(&value)) = (offset, data.first()) {
            self.index.store(value & 0x7f, Ordering::Relaxed);
        }
    }
}

/// Returns register `index` of the clock at `now` seconds after the epoch.
fn rtc_register(index: u8, now: u64) -> u8 {
    let (days, second_of_day) = (now / 86_400, now % 86_400);
    let (year, month, day) = civil(days);
    let bcd = |value: u64| (value / 10 * 16 + value % 10) as u8;
    match index {
        0x00 => bcd(second_of_day % 60),
        0x02 => bcd(second_of_day / 60 % 60),
        0x04 => bcd(second_of_day / 3600),
        // Sunday is 1; the epoch was a Thursday.
        0x06 => bcd((days + 4) % 7 + 1),
        0x07 => bcd(day),
        0x08 => bcd(month),
        0x09 => bcd(year % 100),
        0x32 => bcd(year / 100),
        // Register A: the usual divider, no update in progress. B: 24-hour mode. D: the battery is good.
        0x0a => 0x26,
        0x0b => 0x02,
        0x0d => 0x80,
        _ => 0,
    }
}

/// Converts days since 1970-01-01 into year, month and day of the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // Counted from 0000-03-01, so that a leap day is the last day of its year.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vcpu::event_queue;

    #[test]
    fn dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(11_017), (2000, 3, 1));
        assert_eq!(civil(20_453), (2025, 12, 31));
        assert_eq!(civil(20_454), (2026, 1, 1));
    }

    #[test]
    fn the_clock_is_bcd() {
        // 2001-09-09 01:46:40, a Sunday.
        let now = 1_000_000_000;
        let read = |index| rtc_register(index, now);
        assert_eq!([read(4), read(2), read(0)], [0x01, 0x46, 0x40]);
        assert_eq!([read(0x32), read(9), read(8), read(7), read(6)], [0x20, 0x01, 0x09, 0x09, 0x01]);
    }

    #[test]
    fn power_and_reset_are_events() {
        let (sender, queue) = event_queue().unwrap();
        let ports = PortBus::new();
        let rtc = attach(&ports, &sender).unwrap();
        // Sleep without SLP_EN, another sleep type, another reset value: nothing.
        for (port, value) in [(0x600, 5 << 2), (0x600, 0x20 | (3 << 2)), (0x602, 0), (0x601, 0x34)] {
            ports.write(port, &[value]);
        }
        assert!(queue.try_recv().is_none());
        ports.write(0x600, &[0x20 | (5 << 2)]);
        assert!(matches!(queue.try_recv(), Some(VcpuEvent::PowerOff)));
        ports.write(0x602, &[1]);
        assert!(matches!(queue.try_recv(), Some(VcpuEvent::Reset { source: "ACPI" })));
        ports.write(0x64, &[0xfe]);
        assert!(matches!(queue.try_recv(), Some(VcpuEvent::Reset { source: "i8042" })));
        ports.write(0x70, &[0x8d]);
        let mut byte = [0];
        ports.read(0x71, &mut byte);
        assert_eq!(byte, [0x80]);
        assert_eq!(rtc.save().rtc_index, 0x0d);
    }
}
