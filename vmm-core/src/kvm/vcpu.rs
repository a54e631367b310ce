//! One vCPU's descriptor and its two mappings of `kvm_run`.

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use kvm_bindings as kb;
use kvm_ioctls::{VcpuExit, VcpuFd};
use oslib::signals::SignalMask;
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

use super::exit::Exit;
use super::{Vm, zero};
use crate::error::KvmError;
use crate::state::SREGS2_LEN;

const KVMIO: u32 = kb::KVMIO;

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kb::kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kb::kvm_sregs2);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kb::kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kb::kvm_device_attr);
ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kb::kvm_device_attr);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kb::kvm_xsave);
ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kb::kvm_xsave);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kb::kvm_xsave);
ioctl_iowr_nr!(KVM_GET_NESTED_STATE, KVMIO, 0xbe, kb::kvm_nested_state);
ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kb::kvm_pre_fault_memory);
ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, kb::kvm_signal_mask);
ioctl_iow_nr!(KVM_SET_NESTED_STATE, KVMIO, 0xbf, kb::kvm_nested_state);

/// One vCPU. Keeps its VM, and so the guest's memory mapping, alive.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    vm: Arc<Vm>,
    /// As far as it is known: nobody but us changes it. 0 if it is not.
    tsc_khz: AtomicU32,
}

impl Vcpu {
    pub(super) fn new(fd: VcpuFd, vm: Arc<Vm>) -> Self {
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        Self { fd, vm, tsc_khz: AtomicU32::new(tsc_khz) }
    }

    /// Returns the `kvm-ioctls` descriptor, for the calls that it has.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Returns the VM that this vCPU belongs to.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Maps the vCPU's `kvm_run` page a second time, for the thread that stops it.
    ///
    /// # Errors
    /// The kernel's answer to `mmap`.
    pub fn immediate_exit(&self) -> Result<ImmediateExit, KvmError> {
        ImmediateExit::map(self.fd.as_raw_fd())
    }

    /// Has KVM map these guest-physical addresses, whole pages of RAM, before the guest asks for them. Needs
    /// [`Capabilities::pre_fault_memory`](super::Capabilities).
    ///
    /// # Errors
    /// The kernel's answer, other than `EINTR` and `EAGAIN`. Part of the range may be mapped.
    pub fn pre_fault(&self, range: std::ops::Range<u64>) -> Result<(), KvmError> {
        let size = range.end - range.start;
        let mut left = kb::kvm_pre_fault_memory { gpa: range.start, size, ..Default::default() };
        while left.size > 0 {
            // SAFETY: the structure is the one that this call reads and updates, and outlives it; what KVM maps is RAM of
            // its own memory slots.
            let ret = unsafe { ioctl_with_mut_ref(&self.fd, KVM_PRE_FAULT_MEMORY(), &mut left) };
            match zero(ret, "KVM_PRE_FAULT_MEMORY") {
                Err(error) if !matches!(error.source.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {
                    return Err(error);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Has `KVM_RUN` block these signals and no others while it lasts, or those of its thread (`None`). A signal that is
    /// blocked but for `KVM_RUN` ends that, and is pending afterwards.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn set_signal_mask(&self, mask: Option<SignalMask>) -> Result<(), KvmError> {
        /// `struct kvm_signal_mask` with the kernel's `sigset_t`.
        #[repr(C)]
        struct Wire {
            len: u32,
            signals: [u8; 8],
        }
        let wire = mask.map(|mask| Wire { len: 8, signals: mask.bits().to_ne_bytes() });
        let pointer = wire.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the kernel reads the length and as many bytes after it, which is this structure; null asks for none.
        let ret = unsafe { ioctl_with_ptr(&self.fd, KVM_SET_SIGNAL_MASK(), pointer) };
        zero(ret, "KVM_SET_SIGNAL_MASK")
    }

    /// Enters the guest and returns when user space is needed. A signal is an exit, not an error.
    ///
    /// # Errors
    /// The kernel's answer, other than `EINTR` and `EAGAIN`.
    pub fn run(&mut self) -> Result<Exit<'_>, KvmError> {
        enum Io {
            In,
            Out,
        }
        let io = match self.fd.run() {
            Ok(VcpuExit::IoIn(..)) => Io::In,
            Ok(VcpuExit::IoOut(..)) => Io::Out,
            Ok(_) => return Ok(self.other_exit()),
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Ok(Exit::Interrupted),
            Err(e) => return Err(KvmError { call: "KVM_RUN", source: e.into() }),
        };
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit was told as KVM_EXIT_IO, so `io` is the active member of the union.
        let details = unsafe { run.__bindgen_anon_1.io };
        let (port, size) = (details.port, usize::from(details.size));
        let len = size * details.count as usize;
        let start = std::ptr::from_mut(run).cast::<u8>();
        // SAFETY: KVM places `count` units of `size` bytes at `data_offset`, all of it within the mapping of
        // KVM_GET_VCPU_MMAP_SIZE bytes that kvm-ioctls made; the borrow of `self` keeps it, and nothing but the
        // next KVM_RUN, which needs `self`, writes there.
        let data = unsafe { std::slice::from_raw_parts_mut(start.add(details.data_offset as usize), len) };
        Ok(match io {
            Io::In => Exit::PortIn { port, size, data },
            Io::Out => Exit::PortOut { port, size, data },
        })
    }

    /// Decodes every exit but port I/O from the `kvm_run` page.
    fn other_exit(&mut self) -> Exit<'_> {
        let run = self.fd.get_kvm_run();
        let reason = run.exit_reason;
        let details = &mut run.__bindgen_anon_1;
        // SAFETY: in each arm, `exit_reason` as the kernel wrote it names the active member of the union, all of
        // whose members are plain integers.
        unsafe {
            match reason {
                kb::KVM_EXIT_MMIO => {
                    let mmio = &mut details.mmio;
                    let len = (mmio.len as usize).min(mmio.data.len());
                    if mmio.is_write != 0 {
                        Exit::MmioWrite { address: mmio.phys_addr, data: &mmio.data[..len] }
                    } else {
                        Exit::MmioRead { address: mmio.phys_addr, data: &mut mmio.data[..len] }
                    }
                }
                kb::KVM_EXIT_HLT => Exit::Halt,
                kb::KVM_EXIT_SHUTDOWN => Exit::Shutdown,
                kb::KVM_EXIT_SYSTEM_EVENT => Exit::SystemEvent { kind: details.system_event.type_ },
                kb::KVM_EXIT_FAIL_ENTRY => {
                    Exit::FailEntry { reason: details.fail_entry.hardware_entry_failure_reason }
                }
                kb::KVM_EXIT_INTERNAL_ERROR => {
                    let internal = &details.internal;
                    let count = (internal.ndata as usize).min(internal.data.len());
                    Exit::InternalError { suberror: internal.suberror, data: internal.data[..count].to_vec() }
                }
                kb::KVM_EXIT_MEMORY_FAULT => Exit::MemoryFault { address: details.memory_fault.gpa },
                kb::KVM_EXIT_INTR | kb::KVM_EXIT_IRQ_WINDOW_OPEN => Exit::Interrupted,
                other => Exit::Other(other),
            }
        }
    }

    /// Returns the frequency of the guest's TSC in kHz; 0 where KVM does not tell.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz.load(Ordering::Relaxed)
    }

    /// Sets the frequency of the guest's TSC.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<(), KvmError> {
        self.fd.set_tsc_khz(khz).map_err(KvmError::of("KVM_SET_TSC_KHZ"))?;
        self.tsc_khz.store(khz, Ordering::Relaxed);
        Ok(())
    }

    /// Returns guest TSC minus host TSC, modulo 2^64; `None` when KVM does not tell.
    ///
    /// # Errors
    /// The kernel's answer, other than "no such attribute".
    pub fn tsc_offset(&self) -> Result<Option<u64>, KvmError> {
        let mut offset = 0u64;
        let attr = tsc_offset_attr(std::ptr::from_mut(&mut offset) as u64);
        // SAFETY: `attr.addr` points to a u64 that outlives the call, which is what this attribute writes.
        let ret = unsafe { ioctl_with_ref(&self.fd, KVM_GET_DEVICE_ATTR(), &attr) };
        match zero(ret, "KVM_GET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)") {
            Ok(()) => Ok(Some(offset)),
            Err(e) if is_absent(&e.source) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Sets guest TSC minus host TSC.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn set_tsc_offset(&self, mut offset: u64) -> Result<(), KvmError> {
        let attr = tsc_offset_attr(std::ptr::from_mut(&mut offset) as u64);
        // SAFETY: `attr.addr` points to a u64 that outlives the call, which is what this attribute reads.
        let ret = unsafe { ioctl_with_ref(&self.fd, KVM_SET_DEVICE_ATTR(), &attr) };
        zero(ret, "KVM_SET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)")
    }

    /// Tells whether the TSC offset can be read and set.
    pub fn has_tsc_offset(&self) -> bool {
        let attr = tsc_offset_attr(0);
        // SAFETY: KVM_HAS_DEVICE_ATTR reads the structure and does not use `addr`.
        unsafe { ioctl_with_ref(&self.fd, KVM_HAS_DEVICE_ATTR(), &attr) == 0 }
    }

    /// Reads `struct kvm_sregs2` as bytes. Needs `KVM_CAP_SREGS2`.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn sregs2(&self) -> Result<[u8; SREGS2_LEN], KvmError> {
        let mut bytes = [0u8; SREGS2_LEN];
        // SAFETY: the kernel writes SREGS2_LEN bytes, the size of struct kvm_sregs2, and asks for no alignment.
        let ret = unsafe { ioctl_with_mut_ptr(&self.fd, KVM_GET_SREGS2(), bytes.as_mut_ptr()) };
        zero(ret, "KVM_GET_SREGS2").map(|()| bytes)
    }

    /// Sets `struct kvm_sregs2` from bytes. Needs `KVM_CAP_SREGS2`.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn set_sregs2(&self, bytes: &[u8; SREGS2_LEN]) -> Result<(), KvmError> {
        // SAFETY: the kernel reads SREGS2_LEN bytes, the size of struct kvm_sregs2.
        let ret = unsafe { ioctl_with_ptr(&self.fd, KVM_SET_SREGS2(), bytes.as_ptr()) };
        zero(ret, "KVM_SET_SREGS2")
    }

    /// Reads the XSAVE area, as long as this VM has it.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn xsave(&self) -> Result<Vec<u8>, KvmError> {
        let mut bytes = vec![0u8; self.vm.xsave_len()];
        let (request, call) = if self.vm.has_xsave2() {
            (KVM_GET_XSAVE2(), "KVM_GET_XSAVE2")
        } else {
            (KVM_GET_XSAVE(), "KVM_GET_XSAVE")
        };
        // SAFETY: the buffer has the length that KVM_CAP_XSAVE2 told for this VM (at least 4096), which is what
        // the kernel writes; this process never enables further features by arch_prctl.
        let ret = unsafe { ioctl_with_mut_ptr(&self.fd, request, bytes.as_mut_ptr()) };
        zero(ret, call).map(|()| bytes)
    }

    /// Sets the XSAVE area. A shorter one is extended by zeroes: its header tells which parts of it count.
    ///
    /// # Errors
    /// The kernel's answer, or `E2BIG` when `bytes` is longer than this VM's area.
    pub fn set_xsave(&self, bytes: &[u8]) -> Result<(), KvmError> {
        let room = self.vm.xsave_len();
        let padded;
        let pointer = match bytes.len() {
            len if len == room => bytes.as_ptr(),
            len if len < room => {
                padded = [bytes, &vec![0; room - len]].concat();
                padded.as_ptr()
            }
            _ => {
                let source = io::Error::from_raw_os_error(libc::E2BIG);
                return Err(KvmError { call: "KVM_SET_XSAVE", source });
            }
        };
        // SAFETY: `pointer` leads to `room` bytes, the most that the kernel reads for this VM; `padded`, if used,
        // lives until the end of this function.
        let ret = unsafe { ioctl_with_ptr(&self.fd, KVM_SET_XSAVE(), pointer) };
        zero(ret, "KVM_SET_XSAVE")
    }

    /// Reads the nested state, at most `len` bytes (`KVM_CAP_NESTED_STATE`); `None` when this vCPU has none.
    ///
    /// # Errors
    /// The kernel's answer, other than "there is no such thing".
    pub fn nested_state(&self, len: usize) -> Result<Option<Vec<u8>>, KvmError> {
        if len < size_of::<kb::kvm_nested_state>() {
            return Ok(None);
        }
        let mut bytes = vec![0u8; len];
        bytes[4..8].copy_from_slice(&(len as u32).to_le_bytes());
        // SAFETY: `size` in the header says how long the buffer is, and the kernel writes no more than that.
        let ret = unsafe { ioctl_with_mut_ptr(&self.fd, KVM_GET_NESTED_STATE(), bytes.as_mut_ptr()) };
        match zero(ret, "KVM_GET_NESTED_STATE") {
            Ok(()) => {
                let size = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
                bytes.truncate(size);
                Ok(Some(bytes))
            }
            // A KVM that announces the capability and has nothing behind it answers EINVAL.
            Err(e) if is_absent(&e.source) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Sets the nested state. `bytes` must have the length that its own header tells.
    ///
    /// # Errors
    /// The kernel's answer, or `EINVAL` when the header lies.
    pub fn set_nested_state(&self, bytes: &[u8]) -> Result<(), KvmError> {
        let told = bytes.get(4..8).and_then(|s| s.try_into().ok()).map(u32::from_le_bytes);
        if bytes.len() < size_of::<kb::kvm_nested_state>() || told != u32::try_from(bytes.len()).ok() {
            let source = io::Error::from_raw_os_error(libc::EINVAL);
            return Err(KvmError { call: "KVM_SET_NESTED_STATE", source });
        }
        // SAFETY: the header's `size` equals the buffer's length (checked above); the kernel reads no more.
        let ret = unsafe { ioctl_with_ptr(&self.fd, KVM_SET_NESTED_STATE(), bytes.as_ptr()) };
        zero(ret, "KVM_SET_NESTED_STATE")
    }
}

impl AsRawFd for Vcpu {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn tsc_offset_attr(addr: u64) -> kb::kvm_device_attr {
    kb::kvm_device_attr { flags: 0, group: kb::KVM_VCPU_TSC_CTRL, attr: kb::KVM_VCPU_TSC_OFFSET.into(), addr }
}

/// Tells whether the kernel's answer means that there is no such thing, rather than that it failed.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENXIO | libc::ENOTTY | libc::ENODEV))
}

/// The `immediate_exit` byte of a vCPU, for any thread: a mapping of the `kvm_run` page of its own, so that
/// the vCPU's thread keeps sole use of the one that `kvm-ioctls` made.
#[derive(Debug)]
pub struct ImmediateExit {
    page: NonNull<u8>,
}

/// Only the first page of the mapping is needed.
const PAGE_LEN: usize = 4096;

// SAFETY: the page is only ever accessed through an atomic byte.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn map(vcpu: RawFd) -> Result<Self, KvmError> {
        // SAFETY: a fresh mapping chosen by the kernel; a KVM vCPU descriptor has at least one page at offset 0.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu,
                0,
            )
        };
        match NonNull::new(page.cast::<u8>()) {
            Some(page) if page.as_ptr().cast() != libc::MAP_FAILED => Ok(Self { page }),
            _ => Err(KvmError { call: "mmap of kvm_run", source: io::Error::last_os_error() }),
        }
    }

    /// Makes the next `KVM_RUN`, or the current one once a signal interrupts it, return without running the
    /// guest; or lets it run again.
    pub fn set(&self, leave: bool) {
        // SAFETY: the page is mapped as long as `self` lives, `immediate_exit` lies in it, and no reference other
        // than this atomic one is ever made to this mapping.
        let byte =
            unsafe { AtomicU8::from_ptr(self.page.as_ptr().add(offset_of!(kb::kvm_run, immediate_exit))) };
        byte.store(leave.into(), Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, made with this length, and no pointer into it outlives `self`.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE_LEN) };
    }
}
