//! Code where a PC's firmware would be entered: it writes the ACPI reset register.
//!
//! On hardware-reduced ACPI, Linux reboots through EFI and, where there is none, by a jump to the real-mode reset
//! vector (`reboot_init` in `arch/x86/kernel/reboot.c`, `efi_reboot_required` in `arch/x86/platform/efi/quirks.c`);
//! it never tries the ACPI register that it was told of. Without code there, `reboot` in the guest would run into
//! zeroes. This is all the firmware there is: it starts nothing, and a vCPU never begins here.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::error::BootError;
use crate::platform::{RESET_PORT, RESET_VALUE};

/// `ffff:0000`, the last 16 bytes of the first MiB.
pub(super) const ADDRESS: GuestAddress = GuestAddress(0xf_fff0);

/// Writes the code.
pub(super) fn write(ram: &GuestMemoryMmap) -> Result<(), BootError> {
    Ok(ram.write_slice(&code(), ADDRESS)?)
}

fn code() -> Vec<u8> {
    let [port_low, port_high] = RESET_PORT.to_le_bytes();
    let instructions: [&[u8]; 5] = [
        &[0xba, port_low, port_high], // mov dx, RESET_PORT
        &[0xb0, RESET_VALUE],         // mov al, RESET_VALUE
        &[0xee],                      // out dx, al
        &[0xf4],                      // hlt
        &[0xeb, 0xfd],                // jmp to the hlt
    ];
    instructions.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resets_and_halts() {
        assert_eq!(code(), [0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xf4, 0xeb, 0xfd]);
    }
}
