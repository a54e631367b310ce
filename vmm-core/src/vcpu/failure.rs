//! The exits that end a vCPU's run, and what the owner is told about them.

use std::io;

use super::event::VcpuEvent;
use super::slot::Cpu;
use crate::kvm::Exit;

/// An exit after which the vCPU cannot simply go on.
pub(super) enum Failure {
    TripleFault,
    System(u32),
    Halt,
    Entry(u64),
    Internal(u32, Vec<u64>),
    Memory(u64),
    Unknown(u32),
    Run(io::Error),
}

impl From<Exit<'_>> for Failure {
    fn from(exit: Exit<'_>) -> Self {
        match exit {
            Exit::Shutdown => Self::TripleFault,
            Exit::SystemEvent { kind } => Self::System(kind),
            Exit::Halt => Self::Halt,
            Exit::FailEntry { reason } => Self::Entry(reason),
            Exit::InternalError { suberror, data } => Self::Internal(suberror, data),
            Exit::MemoryFault { address } => Self::Memory(address),
            Exit::Other(reason) => Self::Unknown(reason),
            // The run loop answers these itself.
            Exit::Interrupted
            | Exit::PortIn { .. }
            | Exit::PortOut { .. }
            | Exit::MmioRead { .. }
            | Exit::MmioWrite { .. } => Self::Unknown(0),
        }
    }
}

impl Failure {
    pub(super) fn into_event(self, cpu: &Cpu) -> VcpuEvent {
        let vcpu = cpu.index;
        let what = match self {
            Self::TripleFault => return VcpuEvent::TripleFault { vcpu },
            Self::System(kind) => return VcpuEvent::System { vcpu, kind },
            Self::Halt => "the guest halted and no interrupt controller can wake it".to_owned(),
            Self::Entry(reason) => format!("the processor refused to enter the guest, reason {reason:#x}"),
            Self::Internal(suberror, data) => internal_error(suberror, &data),
            Self::Memory(address) => format!("KVM cannot map guest memory at {address:#x}"),
            Self::Unknown(reason) => format!("KVM exit {reason} is not one that this machine knows"),
            Self::Run(error) => format!("KVM_RUN failed: {error}"),
        };
        let place = match cpu.vcpu.fd().get_regs() {
            Ok(regs) => format!("rip {:#x}, rsp {:#x}, rflags {:#x}", regs.rip, regs.rsp, regs.rflags),
            Err(error) => format!("registers unreadable: {error}"),
        };
        VcpuEvent::Failed { vcpu, message: format!("{what} ({place})") }
    }
}

/// Describes `KVM_EXIT_INTERNAL_ERROR` (`linux/kvm.h`), with the instruction's bytes where KVM gives them.
fn internal_error(suberror: u32, data: &[u64]) -> String {
    let name = match suberror {
        1 => "emulation failed",
        2 => "simultaneous exceptions",
        3 => "an exit during event delivery",
        4 => "an unexpected exit",
        _ => "unknown",
    };
    let mut text = format!("KVM internal error, suberror {suberror}: {name}");
    // KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES: a length, then 15 bytes.
    if let (1, [flags, first, second, ..]) = (suberror, data)
        && flags & 1 != 0
    {
        let bytes = [first.to_le_bytes(), second.to_le_bytes()].concat();
        let len = usize::from(bytes[0]).min(15);
        text += " at instruction bytes";
        for byte in &bytes[1..=len] {
            text += &format!(" {byte:02x}");
        }
    } else if !data.is_empty() {
        text += &format!(", data {data:x?}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn internal_errors_show_the_instruction() {
        let data = [1, 0xcf48_6602, 0];
        assert_eq!(
            internal_error(1, &data),
            "KVM internal error, suberror 1: emulation failed at instruction bytes 66 48"
        );
        assert_eq!(
            internal_error(3, &[0x10]),
            "KVM internal error, suberror 3: an exit during event delivery, data [10]"
        );
        assert_eq!(internal_error(9, &[]), "KVM internal error, suberror 9: unknown");
    }
}
