//! Where the output of a device that speaks to a character device goes.

/// Takes what the guest writes to a serial port or console. Called by the thread that emulates the device, a vCPU's among
/// them, with the device locked: it must neither block nor call back into the device.
pub trait OutputSink: Send {
    /// Takes bytes that the guest wrote. What it cannot pass on at once it keeps or drops; the guest is not told.
    fn write(&mut self, bytes: &[u8]);

    /// The guest has read everything that was enqueued: there is room again. Told by a [serial port](crate::serial).
    fn input_drained(&mut self) {}
}
