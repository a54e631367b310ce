//! Which MSRs are saved, and how lists of them are read and set.
//!
//! The list is the kernel's (`KVM_GET_MSR_INDEX_LIST`) plus what it leaves out although the guest can set it. KVM
//! lists MSRs that it then refuses to read; a machine therefore tries the list once, on a vCPU that has never run,
//! and saves what could be read and written back. After that a refusal is an error that names the MSR.
//! A restored machine goes by the list that it was given: the guest cannot have set anything else.

use kvm_bindings::{Msrs, kvm_msr_entry};

use super::VcpuError;
use crate::error::KvmError;
use crate::kvm::Vcpu;

/// Time stamp counter. Saved as an offset to the host's where KVM can tell it: a value would be stale when it is set.
pub(crate) const IA32_TSC: u32 = 0x10;

/// What one `KVM_GET_MSRS` takes: `MAX_IO_MSRS` of the kernel is 256.
const CHUNK: usize = 255;

/// Hyper-V's MSRs: never offered to our guests, and merely reading them makes KVM allocate their context.
const HYPER_V: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;

/// The paravirtual wall clock, old and new. Setting one makes KVM write the time to that guest address on the spot: the
/// guest's memory would change before it is known to be ours, and after a guest's kexec the address may be anything. A
/// guest sets it anew whenever it wants to know the time, so nothing is lost.
const WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];

/// The paravirtual clock of a vCPU, old and new: an address, and in bit 0 whether it is in use.
const SYSTEM_TIME: [u32; 2] = [0x12, 0x4b56_4d01];

/// Whether a guest with these MSRs reads the time from the paravirtual clock of this vCPU.
pub(crate) fn has_paravirtual_clock(values: &[(u32, u64)]) -> bool {
    values.iter().any(|(index, value)| SYSTEM_TIME.contains(index) && value & 1 != 0)
}

/// Memory type ranges: base and mask of eight variable ones, the fixed ones, and the default.
const MTRRS: [u32; 28] = [
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c, 0x20d, 0x20e,
    0x20f, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, 0x2ff,
];

/// Machine check bank controls, `IA32_MCi_CTL`: KVM has 32 banks. The guest can set nothing else of them.
fn machine_check_controls() -> impl Iterator<Item = u32> {
    (0..32).map(|bank| 0x400 + 4 * bank)
}

/// Reading and setting lists of MSRs. Both return how many of the list were done before KVM refused one.
pub(crate) trait MsrIo {
    fn get(&self, msrs: &mut Msrs) -> Result<usize, KvmError>;
    fn set(&self, msrs: &Msrs) -> Result<usize, KvmError>;
}

impl MsrIo for Vcpu {
    fn get(&self, msrs: &mut Msrs) -> Result<usize, KvmError> {
        self.fd().get_msrs(msrs).map_err(KvmError::of("KVM_GET_MSRS"))
    }

    fn set(&self, msrs: &Msrs) -> Result<usize, KvmError> {
        self.fd().set_msrs(msrs).map_err(KvmError::of("KVM_SET_MSRS"))
    }
}

/// Returns the MSRs to save of a machine whose vCPU, one that has never run, this is. `listed` is the kernel's list.
pub(crate) fn learn_list(vcpu: &Vcpu, listed: &[u32]) -> Result<Vec<u32>, KvmError> {
    learn(vcpu, &merge(listed, vcpu.has_tsc_offset()))
}

fn merge(listed: &[u32], tsc_has_offset: bool) -> Vec<u32> {
    let mut list: Vec<u32> = Vec::with_capacity(listed.len() + 64);
    // The TSC, where it is kept at all, comes before the deadline that is measured by it.
    list.extend((!tsc_has_offset).then_some(IA32_TSC));
    for index in listed.iter().copied().chain(MTRRS).chain(machine_check_controls()) {
        let left_out = index == IA32_TSC || HYPER_V.contains(&index) || WALL_CLOCK.contains(&index);
        if !left_out && !list.contains(&index) {
            list.push(index);
        }
    }
    list
}

fn chunk(entries: &[kvm_msr_entry]) -> Msrs {
    // Fails only beyond the kernel's own limit, and CHUNK is below it.
    Msrs::from_entries(entries).expect("a chunk is shorter than MAX_IO_MSRS")
}

/// Returns those of `candidates` that this vCPU lets us read and set to what was read.
fn learn(io: &impl MsrIo, candidates: &[u32]) -> Result<Vec<u32>, KvmError> {
    let entries: Vec<_> =
        candidates.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let readable = accepted(&entries, |msrs| io.get(msrs))?;
    let settable = accepted(&readable, |msrs| io.set(msrs))?;
    Ok(settable.iter().map(|entry| entry.index).collect())
}

/// Returns the entries that `call` accepts, as it left them, leaving out each one at which it stops.
fn accepted(
    mut rest: &[kvm_msr_entry],
    call: impl Fn(&mut Msrs) -> Result<usize, KvmError>,
) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut accepted = Vec::with_capacity(rest.len());
    while !rest.is_empty() {
        let len = rest.len().min(CHUNK);
        let mut msrs = chunk(&rest[..len]);
        let done = call(&mut msrs)?.min(len);
        accepted.extend_from_slice(&msrs.as_slice()[..done]);
        rest = &rest[(done + usize::from(done < len)).min(rest.len())..];
    }
    Ok(accepted)
}

/// Reads all of a list.
pub(crate) fn read(io: &impl MsrIo, list: &[u32]) -> Result<Vec<(u32, u64)>, VcpuError> {
    let mut values = Vec::with_capacity(list.len());
    for part in list.chunks(CHUNK) {
        let entries: Vec<_> =
            part.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = chunk(&entries);
        let done = io.get(&mut msrs)?;
        if done < part.len() {
            let (index, done) = (part[done], values.len() + done);
            return Err(VcpuError::MsrRead { index, done, wanted: list.len() });
        }
        values.extend(msrs.as_slice().iter().map(|entry| (entry.index, entry.data)));
    }
    Ok(values)
}

/// Sets all of a list, in its order.
pub(crate) fn write(io: &impl MsrIo, values: &[(u32, u64)]) -> Result<(), VcpuError> {
    for (nth, part) in values.chunks(CHUNK).enumerate() {
        let entries: Vec<_> =
            part.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
        let done = io.set(&chunk(&entries))?;
        if let Some(&(index, value)) = part.get(done) {
            let done = nth * CHUNK + done;
            return Err(VcpuError::MsrWrite { index, value, done, wanted: values.len() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    /// A vCPU that refuses to read, or to set, some MSRs.
    #[derive(Default)]
    struct Fake {
        unreadable: Vec<u32>,
        unsettable: Vec<u32>,
        values: RefCell<BTreeMap<u32, u64>>,
    }

    impl MsrIo for Fake {
        fn get(&self, msrs: &mut Msrs) -> Result<usize, KvmError> {
            let entries = msrs.as_mut_slice();
            for (nth, entry) in entries.iter_mut().enumerate() {
                if self.unreadable.contains(&entry.index) {
                    return Ok(nth);
                }
                entry.data = self.values.borrow().get(&entry.index).copied().unwrap_or(0);
            }
            Ok(entries.len())
        }

        fn set(&self, msrs: &Msrs) -> Result<usize, KvmError> {
            for (nth, entry) in msrs.as_slice().iter().enumerate() {
                if self.unsettable.contains(&entry.index) {
                    return Ok(nth);
                }
                self.values.borrow_mut().insert(entry.index, entry.data);
            }
            Ok(msrs.as_slice().len())
        }
    }

    #[test]
    fn learning_leaves_out_what_kvm_refuses() {
        let candidates: Vec<u32> = (0..600).collect();
        let fake = Fake {
            unreadable: vec![0, 1, 254, 255, 256, 599],
            unsettable: vec![300, 598],
            ..Fake::default()
        };
        let learned = learn(&fake, &candidates).unwrap();
        let refused = [0, 1, 254, 255, 256, 300, 598, 599];
        let expected: Vec<u32> = (0..600).filter(|i| !refused.contains(i)).collect();
        assert_eq!(learned, expected);
    }

    #[test]
    fn long_lists_travel_whole_and_in_order() {
        let values: Vec<(u32, u64)> = (0..700).map(|i| (i, u64::from(i) << 32)).collect();
        let fake = Fake::default();
        write(&fake, &values).unwrap();
        let list: Vec<u32> = (0..700).collect();
        assert_eq!(read(&fake, &list).unwrap(), values);
    }

    #[test]
    fn a_refusal_names_the_msr_and_the_count() {
        let fake = Fake { unreadable: vec![260], unsettable: vec![261], ..Fake::default() };
        let list: Vec<u32> = (0..300).collect();
        assert_eq!(
            read(&fake, &list).unwrap_err().to_string(),
            "KVM refused to read MSR 0x104 (260 of 300 were read)"
        );
        let values: Vec<(u32, u64)> = list.iter().map(|&i| (i, 5)).collect();
        assert_eq!(
            write(&fake, &values).unwrap_err().to_string(),
            "KVM refused to set MSR 0x105 to 0x5 (261 of 300 were set)"
        );
    }

    #[test]
    fn the_list_has_the_tsc_first_or_not_at_all() {
        let listed = [0x174, IA32_TSC, 0x6e0, 0x4000_0003, 0x200, 0x11, 0x4b56_4d00, 0x4b56_4d01];
        let with_offset = merge(&listed, true);
        for left_out in [IA32_TSC, 0x4000_0003, 0x11, 0x4b56_4d00] {
            assert!(!with_offset.contains(&left_out), "{left_out:#x}");
        }
        assert!(with_offset.contains(&0x4b56_4d01));
        assert_eq!(with_offset.iter().filter(|&&i| i == 0x200).count(), 1);
        assert!(with_offset.contains(&0x2ff) && with_offset.contains(&0x47c));
        assert_eq!(merge(&listed, false)[0], IA32_TSC);
    }
}
