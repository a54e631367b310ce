//! The CPUID table of a guest that is started with `-cpu host`: what KVM supports, with this machine's topology.
//!
//! One socket, one thread per core, APIC id = vCPU index. Only a cold start comes here: a restored guest keeps the table
//! that it was started with, whatever this host and this build would give it. Leaves as in Intel's SDM volume 2,
//! "CPUID", and AMD's APM volume 3, appendix E.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use crate::error::KvmError;
use crate::kvm::Capabilities;

/// Returns the table of each vCPU of a machine with `count` of them.
pub(crate) fn host_cpuid(
    kvm: &Kvm,
    caps: &Capabilities,
    count: usize,
) -> Result<Vec<Vec<kvm_cpuid_entry2>>, KvmError> {
    let supported =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(KvmError::of("KVM_GET_SUPPORTED_CPUID"))?;
    let count = count as u32;
    Ok((0..count).map(|index| table(supported.as_slice(), index, count, caps.tsc_deadline_timer)).collect())
}

/// Leaf 1, EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;
/// Leaf 1, ECX: the LAPIC timer has the TSC-deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 0x8000_0001, ECX, AMD: HTT means cores, not threads.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0xb, ECX bits 15:8: what a level is made of.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

fn table(
    supported: &[kvm_cpuid_entry2],
    index: u32,
    count: u32,
    tsc_deadline: bool,
) -> Vec<kvm_cpuid_entry2> {
    let core_bits = u32::BITS - (count - 1).leading_zeros();
    let highest = |first: u32| supported.iter().find(|e| e.function == first).map_or(first, |e| e.eax);
    let amd = is_amd(supported);

    let mut entries = Vec::with_capacity(supported.len() + 6);
    for entry in supported {
        let mut entry = *entry;
        match entry.function {
            0x1 => {
                let logical = count.next_power_of_two();
                entry.ebx = (entry.ebx & 0x0000_ffff) | (logical.min(0xff) << 16) | (index << 24);
                entry.ecx |= HYPERVISOR;
                set(&mut entry.ecx, TSC_DEADLINE, tsc_deadline);
                set(&mut entry.edx, HTT, count > 1);
            }
            // Caches: private ones belong to one core, the last one to all. Leaf 4 also tells the number of cores.
            0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                entry.eax = (entry.eax & 0x0000_3fff) | (sharing << 14);
                if entry.function == 0x4 {
                    entry.eax |= ((1 << core_bits) - 1) << 26;
                }
            }
            // Built below: KVM's own entries say that there is no topology.
            0xb | 0x1f => continue,
            0x8000_0001 if amd => set(&mut entry.ecx, CMP_LEGACY, count > 1),
            0x8000_0008 if amd => {
                entry.ecx = (entry.ecx & !0xf0ff) | (core_bits << 12) | (count - 1);
            }
            0x8000_001e => {
                entry.eax = index;
                entry.ebx = index & 0xff;
                entry.ecx = 0;
                entry.edx = 0;
            }
            _ => {}
        }
        entries.push(entry);
    }
    for function in [0xb, 0x1f] {
        if highest(0) >= function && (function == 0xb || supported.iter().any(|e| e.function == function)) {
            entries.extend(topology(function, index, count, core_bits));
        }
    }
    entries.sort_by_key(|e| (e.function, e.index));
    entries
}

/// Leaves 0xb and 0x1f: threads of a core, cores of the package, end.
fn topology(function: u32, index: u32, count: u32, core_bits: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |nth: u32, eax, ebx, kind| kvm_cpuid_entry2 {
        function,
        index: nth,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: nth | kind,
        edx: index,
        ..Default::default()
    };
    [level(0, 0, 1, LEVEL_THREAD), level(1, core_bits, count, LEVEL_CORE), level(2, 0, 0, 0)]
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

/// Tells whether leaf 0 says AuthenticAMD or HygonGenuine.
fn is_amd(entries: &[kvm_cpuid_entry2]) -> bool {
    let Some(vendor) = entries.iter().find(|e| e.function == 0) else { return false };
    let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat();
    name == b"AuthenticAMD" || name == b"HygonGenuine"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn vendor(name: &[u8; 12], highest: u32) -> kvm_cpuid_entry2 {
        let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
        leaf(0, [highest, word(0), word(8), word(4)])
    }

    fn find(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *table.iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    fn supported(name: &[u8; 12]) -> Vec<kvm_cpuid_entry2> {
        vec![
            vendor(name, 0x1f),
            leaf(1, [0x12345, 0xaabb_ccdd, 0, 0]),
            leaf(4, [0xffff_c121, 0, 0, 0]),
            leaf(0xb, [0; 4]),
            leaf(0x4000_0000, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
            leaf(0x8000_0001, [0; 4]),
            leaf(0x8000_0008, [0x3030, 0, 0, 0]),
            leaf(0x8000_001e, [9, 9, 9, 9]),
        ]
    }

    #[test]
    fn each_vcpu_has_its_apic_id_everywhere() {
        for index in [0, 1, 5, 63] {
            let table = table(&supported(b"AuthenticAMD"), index, 64, true);
            assert_eq!(find(&table, 1, 0).ebx, (index << 24) | (64 << 16) | 0xccdd);
            assert_eq!(find(&table, 0xb, 0).edx, index);
            assert_eq!(find(&table, 0xb, 1).edx, index);
            assert_eq!(find(&table, 0x8000_001e, 0).eax, index);
        }
    }

    #[test]
    fn topology_is_one_socket_of_single_threaded_cores() {
        for (count, bits) in [(1, 0), (2, 1), (3, 2), (8, 3), (64, 6)] {
            let table = table(&supported(b"AuthenticAMD"), 0, count, true);
            let (threads, cores) = (find(&table, 0xb, 0), find(&table, 0xb, 1));
            assert_eq!((threads.eax, threads.ebx, threads.ecx), (0, 1, 0x100));
            assert_eq!((cores.eax, cores.ebx, cores.ecx), (bits, count, 0x201));
            assert_eq!(find(&table, 0x8000_0008, 0).ecx, (bits << 12) | (count - 1));
            assert_eq!(find(&table, 1, 0).edx & HTT != 0, count > 1);
            assert_eq!(find(&table, 0x8000_0001, 0).ecx & CMP_LEGACY != 0, count > 1);
            assert_eq!(find(&table, 4, 0).eax >> 26, (1 << bits) - 1);
            // A first-level cache is private.
            assert_eq!((find(&table, 4, 0).eax >> 14) & 0xfff, 0);
        }
    }

    #[test]
    fn intel_leaves_of_amd_stay_alone_and_the_signature_is_kept() {
        let table = table(&supported(b"GenuineIntel"), 1, 4, false);
        assert_eq!(find(&table, 0x8000_0008, 0).ecx, 0);
        assert_eq!(find(&table, 0x8000_0001, 0).ecx, 0);
        assert_eq!(find(&table, 0x4000_0000, 0).ebx, 0x4b4d_564b);
        assert_eq!(find(&table, 1, 0).ecx, HYPERVISOR);
        assert!(!table.iter().any(|e| e.function == 0x1f));
    }
}
