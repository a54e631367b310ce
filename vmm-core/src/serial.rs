//! COM1: a 16550 serial port at 0x3f8 on interrupt 4.
//!
//! The registers are `vm-superio`'s. Output goes to an [`OutputSink`], byte by byte as the guest writes it; input comes
//! from whoever owns the terminal, as far as the FIFO has room. The interrupt is a pulse, as the in-kernel
//! interrupt controllers remember edges: an interrupt that is pending when the state is saved is part of *their*
//! state, so restoring the port raises none.

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{Serial as Uart, SerialEvents};

use crate::kvm::Vm;
use crate::output::OutputSink;
use crate::ports::PortDevice;
use crate::state::{Blob, SerialState, StateError};

/// The first I/O port of COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// I/O ports of a 16550.
pub const COM1_LEN: u16 = 8;
/// The interrupt of COM1.
pub const COM1_IRQ: u32 = 4;
/// Bytes that the receive FIFO holds (`vm-superio`).
pub const FIFO_LEN: usize = 64;

/// An edge-triggered interrupt line.
pub trait IrqLine: Send + Sync {
    /// Raises and lowers the line.
    fn pulse(&self);
}

/// A line of the in-kernel interrupt controllers.
#[derive(Debug)]
pub struct KvmIrqLine {
    vm: Arc<Vm>,
    irq: u32,
}

impl KvmIrqLine {
    /// Makes line `irq` of `vm`.
    pub fn new(vm: Arc<Vm>, irq: u32) -> Self {
        Self { vm, irq }
    }
}

impl IrqLine for KvmIrqLine {
    fn pulse(&self) {
        for active in [true, false] {
            if let Err(error) = self.vm.fd().set_irq_line(self.irq, active) {
                tracing::error!(irq = self.irq, %error, "KVM_IRQ_LINE failed, an interrupt is lost");
            }
        }
    }
}

type Sink = Arc<Mutex<Box<dyn OutputSink>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The side of the sink that `vm-superio` writes to and reports to.
#[derive(Clone)]
struct Output(Sink);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SerialEvents for Output {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        lock(&self.0).input_drained();
    }
}

/// Pulses the line unless the port is just being rebuilt.
#[derive(Clone)]
struct Pulse {
    line: Arc<dyn IrqLine>,
    muted: Arc<AtomicBool>,
}

impl Trigger for Pulse {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        if !self.muted.load(Ordering::Relaxed) {
            self.line.pulse();
        }
        Ok(())
    }
}

/// The serial port.
pub struct Serial {
    uart: Mutex<Uart<Pulse, Output, Output>>,
    pulse: Pulse,
    output: Output,
}

impl Serial {
    /// Makes a port in its state after reset.
    pub fn new(line: Arc<dyn IrqLine>, sink: Box<dyn OutputSink>) -> Self {
        let pulse = Pulse { line, muted: Arc::default() };
        let output = Output(Arc::new(Mutex::new(sink)));
        let uart = Mutex::new(Uart::with_events(pulse.clone(), output.clone(), output.clone()));
        Self { uart, pulse, output }
    }

    /// Gives input to the guest; returns how many bytes fitted into the FIFO. In loopback mode none do.
    pub fn enqueue(&self, bytes: &[u8]) -> usize {
        // The only errors are a full FIFO and the interrupt, which cannot fail here.
        lock(&self.uart).enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    /// Returns the room in the FIFO, in bytes.
    pub fn fifo_room(&self) -> usize {
        lock(&self.uart).fifo_capacity()
    }

    /// Saves the registers and what the guest has not read.
    pub fn save(&self) -> SerialState {
        let state = lock(&self.uart).state();
        SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: Blob::from(state.in_buffer),
        }
    }

    /// Puts a saved state back. Raises no interrupt.
    ///
    /// # Errors
    /// [`StateError`] when the FIFO's content is too long; the port is unchanged then.
    pub fn restore(&self, state: &SerialState) -> Result<(), StateError> {
        state.check()?;
        let state = vm_superio::SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer.as_slice().to_vec(),
        };
        self.rebuild(&state);
        Ok(())
    }

    /// Puts the port into its state after reset and drops what the guest has not read.
    pub fn reset(&self) {
        self.rebuild(&vm_superio::SerialState::default());
    }

    fn rebuild(&self, state: &vm_superio::SerialState) {
        let mut uart = lock(&self.uart);
        self.pulse.muted.store(true, Ordering::Relaxed);
        let rebuilt = Uart::from_state(state, self.pulse.clone(), self.output.clone(), self.output.clone());
        self.pulse.muted.store(false, Ordering::Relaxed);
        // The only errors are a full FIFO, which the callers excluded, and the interrupt, which cannot fail here.
        if let Ok(rebuilt) = rebuilt {
            *uart = rebuilt;
        }
    }
}

impl PortDevice for Serial {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(first) = data.first_mut() {
            *first = lock(&self.uart).read(offset as u8);
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        if let Some(&first) = data.first() {
            // Neither the sink nor the interrupt can fail here.
            let _ = lock(&self.uart).write(offset as u8, first);
        }
    }
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial").field("state", &self.save()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[derive(Default)]
    struct Line(AtomicUsize);

    impl IrqLine for Line {
        fn pulse(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[derive(Clone, Default)]
    struct Seen(Arc<Mutex<Vec<u8>>>, Arc<AtomicUsize>);

    impl OutputSink for Seen {
        fn write(&mut self, bytes: &[u8]) {
            self.0.lock().unwrap().extend_from_slice(bytes);
        }

        fn input_drained(&mut self) {
            self.1.fetch_add(1, Ordering::Relaxed);
        }
    }

    const DATA: u16 = 0;
    const IER: u16 = 1;
    const SCRATCH: u16 = 7;

    fn serial() -> (Serial, Arc<Line>, Seen) {
        let (line, seen) = (Arc::<Line>::default(), Seen::default());
        (Serial::new(line.clone(), Box::new(seen.clone())), line, seen)
    }

    fn read(serial: &Serial, offset: u16) -> u8 {
        let mut byte = [0];
        serial.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn output_reaches_the_sink_and_input_the_guest() {
        let (serial, line, seen) = serial();
        for byte in b"hello" {
            serial.write(DATA, &[*byte]);
        }
        assert_eq!(*seen.0.lock().unwrap(), b"hello");
        serial.write(IER, &[1]);
        assert_eq!(serial.enqueue(b"ab"), 2);
        assert_eq!(line.0.load(Ordering::Relaxed), 1);
        assert_eq!(serial.fifo_room(), FIFO_LEN - 2);
        assert_eq!((read(&serial, DATA), read(&serial, DATA)), (b'a', b'b'));
        assert_eq!(seen.1.load(Ordering::Relaxed), 1);
        assert_eq!(serial.enqueue(&[0; 100]), FIFO_LEN);
        assert_eq!(serial.enqueue(&[0; 1]), 0);
    }

    #[test]
    fn unread_bytes_and_registers_survive_without_an_interrupt() {
        let (old, _, _) = serial();
        old.write(SCRATCH, &[0x5a]);
        old.write(IER, &[3]);
        old.enqueue(b"not read yet");
        let state = old.save();
        let (new, line, seen) = serial();
        new.restore(&state).unwrap();
        assert_eq!(line.0.load(Ordering::Relaxed), 0);
        assert_eq!(new.save(), state);
        assert_eq!(read(&new, SCRATCH), 0x5a);
        let input: Vec<u8> = (0..12).map(|_| read(&new, DATA)).collect();
        assert_eq!(input, b"not read yet");
        new.write(DATA, b"x");
        assert_eq!(*seen.0.lock().unwrap(), b"x");
        // The line works again after the restore.
        new.enqueue(b"y");
        assert_eq!(line.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn an_overlong_fifo_is_refused_and_changes_nothing() {
        let (serial, _, _) = serial();
        serial.enqueue(b"keep");
        let mut state = serial.save();
        state.in_buffer = Blob::from(vec![0; FIFO_LEN + 1]);
        assert!(matches!(serial.restore(&state), Err(StateError::Size { found: 65, .. })));
        assert_eq!(read(&serial, DATA), b'k');
    }

    #[test]
    fn reset_forgets() {
        let (serial, _, _) = serial();
        serial.write(SCRATCH, &[1]);
        serial.enqueue(b"old");
        serial.reset();
        assert_eq!(serial.fifo_room(), FIFO_LEN);
        assert_eq!(read(&serial, SCRATCH), 0);
    }
}
