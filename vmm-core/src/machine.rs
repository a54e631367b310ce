//! The machine: a KVM VM with its vCPUs, and the way of its state out and in.
//!
//! Life of a machine:
//!
//! ```text
//! new ---> set_entry ----------> run <-> pause ---> save ---> (this process ends here)
//!   '----> preset_cpuid? ---> restore ---> run
//! ```
//!
//! [`Machine::new`] needs only RAM and a number of vCPUs, so the target of an update calls it while the source still
//! runs, or before it has read the state. Every method is called from one thread, the owner's; vCPUs have their own. What
//! has to be settled between methods (which mode, when to commit, what devices do) is the owner's business.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cpr_core::frame::{Frame, FrameWriter};
use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::Kvm;
use zerocopy::IntoBytes;

use crate::devices::Devices;
pub use crate::devices::{PciConfig, PciDevice};
pub use crate::error::MachineError;
use crate::kvm::{self, Capabilities, Vm};
use crate::memory::GuestRam;
use crate::output::OutputSink;
use crate::pci::Hypervisor;
use crate::platform::{self, Rtc};
use crate::ports::{MmioBus, PortBus};
use crate::serial::{COM1_IRQ, COM1_LEN, COM1_PORT, KvmIrqLine, Serial};
use crate::state::{Blob, GsiRoute, MachineState, PlatformState, VcpuState};
use crate::time::{Now, TimeState, realtime_ns};
use crate::vcpu::{self, Environment, EventQueue, EventSender, RunObserver, Vcpus, event_queue};
use crate::virtio::{Backing, SectionVersions};
use crate::vm_state;

/// The most vCPUs that a machine has. The ACPI tables and the payload's mailboxes go this far.
pub const MAX_VCPUS: usize = 64;

/// Threads rest long before, unless the machine has no CPU time for them.
const RESTS_WITHIN: Duration = Duration::from_secs(5);

/// What a machine is made of.
pub struct MachineConfig {
    /// The guest's RAM.
    pub ram: GuestRam,
    /// How many vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: usize,
    /// Where COM1's output goes.
    pub serial: Box<dyn OutputSink>,
    /// Who is told when the guest stands still and when it runs again.
    pub observer: Arc<dyn RunObserver>,
    /// Its PCI bus, if it has one.
    pub pci: Option<PciConfig>,
}

/// A virtual machine. Dropping it ends its vCPU threads.
pub struct Machine {
    // First, so that the threads are gone before what they use.
    vcpus: Vcpus,
    // Second, for the same reason.
    devices: Option<Devices>,
    serial: Arc<Serial>,
    rtc: Arc<Rtc>,
    ports: Arc<PortBus>,
    mmio: Arc<MmioBus>,
    queue: EventQueue,
    sender: EventSender,
    cpuid: Mutex<Option<Arc<[Blob]>>>,
    msr_list: Mutex<Option<Arc<[u32]>>>,
    routes: Mutex<Vec<GsiRoute>>,
    /// Whether the timer chip exists.
    pit: Mutex<bool>,
    vm: Arc<Vm>,
    caps: Capabilities,
    kvm: Kvm,
    ram: GuestRam,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    /// Builds the VM, maps the RAM, and starts the vCPU threads, which create their vCPUs meanwhile. Returns without
    /// waiting for those: what needs them waits, or has its work done behind their creation.
    ///
    /// # Errors
    /// No usable KVM, or a call that failed. A vCPU that cannot be created is reported by the first method that
    /// needs it.
    pub fn new(config: MachineConfig) -> Result<Self, MachineError> {
        let kvm = kvm::open()?;
        let caps = Capabilities::probe(&kvm)?;
        let limit = caps.max_vcpus.min(MAX_VCPUS);
        if !(1..=limit).contains(&config.vcpus) {
            return Err(MachineError::VcpuLimit { wanted: config.vcpus, limit });
        }
        let vm = Arc::new(Vm::create(&kvm)?);
        let (sender, queue) = event_queue()?;
        let (ports, mmio) = (Arc::new(PortBus::new()), Arc::new(MmioBus::new()));
        let environment = Environment {
            ports: Arc::clone(&ports),
            mmio: Arc::clone(&mmio),
            events: sender.clone(),
            observer: config.observer,
            caps,
        };
        vm.map_ram(&config.ram)?;
        vm.create_irqchip()?;
        let vcpus = Vcpus::spawn(config.vcpus, &vm, &environment)?;
        let line = Arc::new(KvmIrqLine::new(Arc::clone(&vm), COM1_IRQ));
        let serial = Arc::new(Serial::new(line, config.serial));
        ports.insert(COM1_PORT, COM1_LEN, "COM1", serial.clone())?;
        let rtc = platform::attach(&ports, &sender)?;
        let hypervisor: Arc<dyn Hypervisor> = vm.clone();
        let devices = |pci| Devices::new(pci, &config.ram, &hypervisor, &ports, &mmio);
        Ok(Self {
            vcpus,
            devices: config.pci.map(devices).transpose()?,
            serial,
            rtc,
            ports,
            mmio,
            queue,
            sender,
            cpuid: Mutex::new(None),
            msr_list: Mutex::new(None),
            routes: Mutex::new(Vec::new()),
            pit: Mutex::new(false),
            vm,
            caps,
            kvm,
            ram: config.ram,
        })
    }

    /// Waits until the machine is complete: every vCPU exists, and the timer chip. For a target that is built ahead of its
    /// state; whoever has the state already calls [`Machine::restore`] at once, which overlaps the two.
    ///
    /// # Errors
    /// The vCPU that could not be created.
    pub fn ready(&self) -> Result<(), MachineError> {
        self.ready_with(&mut || {})
    }

    /// As [`ready`](Self::ready), and calls `made` after each vCPU: for whoever has to show that it goes on.
    ///
    /// # Errors
    /// As [`ready`](Self::ready).
    pub fn ready_with(&self, made: &mut dyn FnMut()) -> Result<(), MachineError> {
        self.ensure_pit()?;
        self.vcpus.ready_with(made)
    }

    /// Has the devices of a machine that is built ahead of its state as they are likely to be: a guest that has not moved
    /// them, and uses them. KVM may need longer for that than for all the rest of a restore.
    pub fn prepare_devices(&self) {
        self.devices.iter().for_each(Devices::prepare);
    }

    /// Maps the RAM that exists already, for this process and, where KVM can, for the guest: see
    /// [`GuestRam::populate_existing`]. For a target that is built ahead of its state.
    ///
    /// # Errors
    /// The kernel's answer. The machine works all the same, and maps pages as the guest asks for them.
    pub fn populate(&self, go_on: &mut dyn FnMut() -> bool) -> Result<(), MachineError> {
        let populated = self.ram.populate_existing(go_on)?;
        if self.caps.pre_fault_memory {
            for range in populated {
                if !go_on() {
                    break;
                }
                self.vcpus.on_one(0, |cpu| Ok(cpu.vcpu.pre_fault(range)?))?;
            }
        }
        Ok(())
    }

    /// Prepares a cold start: gives the vCPUs the host's CPUID, and the first one its first instruction. `entry`
    /// changes the registers as KVM resets them. The other vCPUs wait for the guest to start them.
    ///
    /// # Errors
    /// The vCPU and the call that failed.
    pub fn set_entry(&self, entry: &dyn Fn(&mut kvm_regs, &mut kvm_sregs)) -> Result<(), MachineError> {
        self.ready()?;
        let tables = vcpu::host_cpuid(&self.kvm, &self.caps, self.vcpus.count())?;
        let tables: Vec<Blob> = tables.iter().map(|table| Blob::from(table.as_bytes().to_vec())).collect();
        self.preset_cpuid(&tables)?;
        self.msr_list()?;
        self.enter_at(entry)
    }

    /// Gives the vCPUs their CPUID tables ahead of [`Machine::restore`], which then need not. `tables` are the `cpuid`
    /// fields of the vCPUs' states.
    ///
    /// # Errors
    /// The vCPU whose table was refused; [`MachineError::VcpuCount`] when there are not as many as vCPUs.
    pub fn preset_cpuid(&self, tables: &[Blob]) -> Result<(), MachineError> {
        self.check_count(tables.len())?;
        self.ready()?;
        let tables: Arc<[Blob]> = tables.into();
        let given = Arc::clone(&tables);
        self.vcpus
            .on_all(Box::new(move |cpu| vcpu::set_cpuid(&cpu.vcpu, &mut cpu.cpuid, &given[cpu.index])))?;
        *lock(&self.cpuid) = Some(tables);
        Ok(())
    }

    /// Returns the CPUID table of each vCPU, running or not, for [`Machine::preset_cpuid`] of a target that is built
    /// ahead; `None` before the machine has been given any.
    pub fn cpuid(&self) -> Option<Arc<[Blob]>> {
        lock(&self.cpuid).clone()
    }

    /// Lets the vCPUs run, or run again, and the devices with them. Threads that rest are recalled.
    ///
    /// # Errors
    /// A vCPU that does not exist any more, or has no thread and gets none; devices that get none.
    pub fn run(&self) -> Result<(), MachineError> {
        self.ready()?;
        // What can fail comes before any vCPU runs.
        self.devices.as_ref().map_or(Ok(()), Devices::recall)?;
        self.vcpus.resume().inspect_err(|_| self.stop_those_that_run())?;
        // Afterwards: a guest that waits for a device is better off than one that does not run.
        self.devices.as_ref().map_or(Ok(()), Devices::go_on)
    }

    /// A machine that cannot run does not run in part.
    fn stop_those_that_run(&self) {
        if let Err(error) = self.vcpus.pause(RESTS_WITHIN) {
            tracing::error!(%error, "a vCPU of a machine that cannot run did not stop");
        }
    }

    /// Stops the vCPUs, then the devices; returns when no vCPU runs and no request to a device is under way.
    ///
    /// # Errors
    /// [`MachineError::PauseTimedOut`] when a vCPU is held up longer than `deadline`, [`MachineError::Restless`] when a
    /// device is. The machine goes on then as it did before: all vCPUs run, not only those that were late.
    pub fn pause(&self, deadline: Duration) -> Result<(), MachineError> {
        let until = Instant::now() + deadline;
        let ran = !self.is_paused();
        let served = self.devices.as_ref().is_some_and(Devices::are_served);
        // So that their thread comes to rest while the vCPUs stop.
        self.devices.iter().for_each(Devices::want_rest);
        let stopped = self.vcpus.pause(deadline);
        let devices = || self.devices.as_ref().map_or(Ok(()), |devices| devices.stop(until, deadline));
        stopped.and_then(|()| devices()).inspect_err(|_| self.undo_stop(ran, served))
    }

    /// What is told is why the machine did not stop.
    fn undo_stop(&self, ran: bool, served: bool) {
        let undone = match (ran, &self.devices) {
            (true, _) => self.run(),
            // A guest that has come to its end may leave work to devices.
            (false, Some(devices)) if served => devices.go_on(),
            (false, _) => Ok(()),
        };
        if let Err(error) = undone {
            tracing::error!(%error, "a machine that could not be stopped does not go on either");
        }
    }

    /// Has the threads of the vCPUs rest as soon as these are stopped, until they run again: a
    /// [`Machine::rest_threads`] that follows the stop has little to wait for.
    pub fn rest_when_paused(&self) {
        self.vcpus.want_rest();
    }

    /// Has the threads of a paused machine's vCPUs rest, and returns when they do. The vCPUs stay as they are: the
    /// machine can be saved. For an owner whose process is about to lose its threads, by an exec, while the memory and the
    /// descriptors live on in another one: threads that rest may end at any instruction and leave nothing half-done.
    /// Harmless when they rest already.
    ///
    /// # Errors
    /// A vCPU that runs, or a thread that does not get there.
    pub fn rest_threads(&self) -> Result<(), MachineError> {
        self.vcpus.rest_threads()?;
        let Some(devices) = &self.devices else { return Ok(()) };
        devices.rest(Instant::now() + RESTS_WITHIN, RESTS_WITHIN)?;
        devices.leave_process();
        Ok(())
    }

    /// Ends the rest of the threads, or starts a thread for each vCPU in the calling process, if that is not the one of
    /// [`Machine::rest_threads`] but shares its memory and has its descriptors. [`Machine::run`] does this by itself.
    ///
    /// # Errors
    /// The vCPU for which no thread could be started. Those before it have theirs; a further call goes on with it.
    pub fn recall_threads(&self) -> Result<(), MachineError> {
        self.vcpus.recall_threads()?;
        self.devices.as_ref().map_or(Ok(()), Devices::recall)
    }

    /// Saves the state of a paused machine. The machine can run on afterwards.
    ///
    /// # Errors
    /// A vCPU that runs, or the call that failed.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        self.ready()?;
        let list = self.msr_list()?;
        let saving = self.start_saving(&list);
        let vm = vm_state::save(&self.vm, lock(&self.routes).clone());
        let (serial, platform) = (self.serial.save(), self.rtc.save());
        Ok(MachineState { vcpus: saving.wait()?, vm: vm?, serial, platform })
    }

    /// Reads what a paused machine's time is measured by, for a target that another kernel may run.
    ///
    /// # Errors
    /// A vCPU that runs, or the call that failed.
    pub fn time(&self) -> Result<TimeState, MachineError> {
        self.ready()?;
        let mut vcpus = Vec::with_capacity(self.vcpus.count());
        for index in 0..self.vcpus.count() {
            vcpus.push(self.vcpus.on_one(index, |cpu| {
                Ok((vcpu::read_msrs(&cpu.vcpu, &[vcpu::IA32_TSC])?[0].1, realtime_ns()))
            })?);
        }
        let now =
            Now::read().map_err(|source| MachineError::Host { what: "a time for another boot", source })?;
        Ok(TimeState {
            boot_id: now.boot_id,
            realtime_ns: now.realtime_ns,
            monotonic_ns: now.monotonic_ns,
            vcpus,
        })
    }

    /// For a target that is built ahead of its state: what its first [`Machine::run`] would do that needs none.
    pub fn prepare_to_run(&self) {
        self.vcpus.take_places();
    }

    /// Wakes threads that will help with [`Machine::restore`], which is about to follow: while the state is being decoded.
    pub fn expect_state(&self) {
        self.vcpus.rouse_helpers();
    }

    /// Gives a machine that has not run yet a saved state. The guest is told, when it runs, that it stood still.
    ///
    /// # Errors
    /// A state that is malformed or of another shape touches nothing. After any other error the machine is of no use.
    pub fn restore(&self, state: &MachineState) -> Result<(), MachineError> {
        state.check()?;
        self.check_count(state.vcpus.len())?;
        let restoring = self.start_restoring(&state.vcpus);
        let around = self.ensure_pit().and_then(|()| self.restore_around_vcpus(state));
        let restored = restoring.wait();
        // A vCPU that could not be created has done no work either; the reason is the first of the two.
        self.ready()?;
        restored?;
        around?;
        vm_state::restore_after_vcpus(&self.vm, &state.vm)?;
        vm_state::restore_clock(&self.vm, &self.caps, &state.vm.clock)?;
        // What its first host let it set, it may have set; this host's own list may be shorter.
        let mut list: Vec<u32> = state.vcpus[0].msrs.iter().map(|&(index, _)| index).collect();
        if list.contains(&vcpu::IA32_TSC) && self.vcpus.on_one(0, |cpu| Ok(cpu.vcpu.has_tsc_offset()))? {
            // It came from another boot of the host, and is kept as an offset from now on.
            list.retain(|&index| index != vcpu::IA32_TSC);
        }
        *lock(&self.msr_list) = Some(list.into());
        *lock(&self.cpuid) = Some(state.vcpus.iter().map(|vcpu| vcpu.cpuid.clone()).collect());
        let has_clock: Vec<_> =
            state.vcpus.iter().map(|vcpu| vcpu::has_paravirtual_clock(&vcpu.msrs)).collect();
        self.vcpus.tell_paused_on_resume(&|index| has_clock[index]);
        Ok(())
    }

    /// Puts a paused machine into the state after power-on: the guest keeps its CPUID, its clock goes on. `entry` is
    /// as in [`Machine::set_entry`]. Reloading the kernel into RAM is the caller's.
    ///
    /// The state comes from a VM of the same shape that is made for the purpose: no snapshot of the start has to be
    /// kept, or carried through updates.
    ///
    /// # Errors
    /// A vCPU that runs, or the call that failed.
    pub fn reset(&self, entry: &dyn Fn(&mut kvm_regs, &mut kvm_sregs)) -> Result<(), MachineError> {
        self.ready()?;
        let cpuid = self.cpuid().unwrap_or_else(|| vec![Blob::default(); self.vcpus.count()].into());
        let (vcpus, vm) = self.pristine(&cpuid)?;
        vm_state::restore_before_vcpus(&self.vm, &vm)?;
        self.start_restoring(&vcpus).wait()?;
        vm_state::restore_after_vcpus(&self.vm, &vm)?;
        self.serial.reset();
        self.rtc.restore(&PlatformState::default());
        self.devices.iter().for_each(Devices::reset);
        self.enter_at(entry)
    }

    /// The names of devices that cannot be saved, and so forbid every update.
    pub fn unsavable_devices(&self) -> Vec<&str> {
        self.devices.iter().flat_map(Devices::unsavable).collect()
    }

    /// What is behind the devices on the host, by slot, where the next process has to find the same. The guest may be running.
    ///
    /// # Errors
    /// [`MachineError::Device`] with one that no process could go on with: its image is shorter than the guest's disk, or its
    /// interface is gone.
    pub fn backings(&self) -> Result<Vec<(u8, Backing)>, MachineError> {
        self.devices.as_ref().map_or(Ok(Vec::new()), Devices::backings)
    }

    /// The sections of the PCI bus and its devices, each with its instance: what [`Machine::save_devices`] writes.
    pub fn device_sections(&self) -> Vec<(u32, SectionVersions)> {
        self.devices.iter().flat_map(Devices::sections).collect()
    }

    /// Writes the state of the PCI bus and its devices, of a paused machine. The machine can run on afterwards.
    ///
    /// # Errors
    /// [`MachineError::Device`] with the one that cannot be saved.
    pub fn save_devices(&self, main: &mut FrameWriter) -> Result<(), MachineError> {
        self.devices.as_ref().map_or(Ok(()), |devices| devices.save(main))
    }

    /// Has what the guest of a paused machine has stored, on disks for example, outlive the host's kernel.
    ///
    /// # Errors
    /// [`MachineError::Device`] with the one that cannot keep it. The machine can run on.
    pub fn settle_on_host(&self) -> Result<(), MachineError> {
        self.devices.as_ref().map_or(Ok(()), Devices::settle_on_host)
    }

    /// Gives the PCI bus and the devices of a machine that has not run yet their state.
    ///
    /// # Errors
    /// [`MachineError::Device`] with the one whose state is refused. The machine is of no use then.
    pub fn load_devices(&self, main: &mut Frame) -> Result<(), MachineError> {
        self.devices.as_ref().map_or(Ok(()), |devices| devices.load(main))
    }

    /// Has each vCPU tell its guest, before it runs again, that it stood still (`KVM_KVMCLOCK_CTRL`), so that the
    /// guest's soft-lockup watchdog keeps quiet. [`Machine::restore`] does this by itself.
    pub fn notify_guest_paused(&self) {
        self.vcpus.tell_paused_on_resume(&|_| true);
    }

    /// Replaces the interrupt routes, which travel with the machine. [`default_routes`] is what KVM starts with.
    ///
    /// # Errors
    /// The kernel's answer; the routes are as before then.
    pub fn set_gsi_routes(&self, routes: &[GsiRoute]) -> Result<(), MachineError> {
        vm_state::set_routes(&self.vm, routes)?;
        *lock(&self.routes) = routes.to_vec();
        Ok(())
    }

    /// Returns the interrupt routes that were set; none means KVM's own.
    pub fn gsi_routes(&self) -> Vec<GsiRoute> {
        lock(&self.routes).clone()
    }

    /// Returns every KVM descriptor of the machine: `/dev/kvm`, the VM, the vCPUs. Whoever keeps the old machine past
    /// an exec closes these last.
    ///
    /// # Errors
    /// The vCPU that could not be created.
    pub fn kvm_fds(&self) -> Result<Vec<RawFd>, MachineError> {
        let mut fds = vec![self.kvm.as_raw_fd(), self.vm.as_raw_fd()];
        fds.extend(self.vcpus.fds()?);
        Ok(fds)
    }

    /// Returns the kernel's ids of the vCPU threads, in order of the vCPUs.
    ///
    /// # Errors
    /// The vCPU that could not be created, or has no thread.
    pub fn thread_ids(&self) -> Result<Vec<u32>, MachineError> {
        self.vcpus.thread_ids()
    }

    /// Returns the events for the owner: a descriptor to wait on, and the queue behind it.
    pub fn events(&self) -> &EventQueue {
        &self.queue
    }

    /// Returns a sender into [`Machine::events`], for further devices.
    pub fn event_sender(&self) -> EventSender {
        self.sender.clone()
    }

    /// Returns the I/O ports, for further devices.
    pub fn ports(&self) -> &Arc<PortBus> {
        &self.ports
    }

    /// Returns the addresses outside RAM, for further devices.
    pub fn mmio(&self) -> &Arc<MmioBus> {
        &self.mmio
    }

    /// Returns COM1.
    pub fn serial(&self) -> &Arc<Serial> {
        &self.serial
    }

    /// Returns the VM, for irqfds, ioeventfds and messages.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Returns the guest's RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Returns what this host's KVM offers.
    pub fn capabilities(&self) -> &Capabilities {
        &self.caps
    }

    /// Returns the number of vCPUs.
    pub fn vcpu_count(&self) -> usize {
        self.vcpus.count()
    }

    /// Tells whether no vCPU runs.
    pub fn is_paused(&self) -> bool {
        self.vcpus.all_parked()
    }

    /// Creates the timer chip, unless it exists. Not part of `new`: it has KVM start a kernel thread and wait for it, which
    /// is better done while the vCPUs' threads are at work.
    fn ensure_pit(&self) -> Result<(), MachineError> {
        let mut exists = lock(&self.pit);
        if !*exists {
            self.vm.create_pit()?;
            *exists = true;
        }
        Ok(())
    }

    fn check_count(&self, found: usize) -> Result<(), MachineError> {
        let expected = self.vcpus.count();
        if found == expected { Ok(()) } else { Err(MachineError::VcpuCount { expected, found }) }
    }

    fn enter_at(&self, entry: &dyn Fn(&mut kvm_regs, &mut kvm_sregs)) -> Result<(), MachineError> {
        let (mut regs, mut sregs) = self.vcpus.on_one(0, |cpu| vcpu::entry_registers(&cpu.vcpu))?;
        entry(&mut regs, &mut sregs);
        self.vcpus.on_one(0, move |cpu| vcpu::set_entry_registers(&cpu.vcpu, &regs, &sregs))
    }

    /// Returns the MSRs to save, found out on the first vCPU if this machine was not restored.
    fn msr_list(&self) -> Result<Arc<[u32]>, MachineError> {
        let mut known = lock(&self.msr_list);
        if let Some(list) = &*known {
            return Ok(Arc::clone(list));
        }
        let listed = self.kvm.get_msr_index_list();
        let listed = listed.map_err(crate::error::KvmError::of("KVM_GET_MSR_INDEX_LIST"))?;
        let list =
            self.vcpus.on_one(0, move |cpu| Ok(vcpu::learn_msr_list(&cpu.vcpu, listed.as_slice())?))?;
        Ok(Arc::clone(known.insert(list.into())))
    }

    fn start_saving(&self, list: &Arc<[u32]>) -> vcpu::Pending<VcpuState> {
        let list = Arc::clone(list);
        self.vcpus.start_on_all(Box::new(move |cpu| {
            let cpuid = cpu.cpuid.clone().unwrap_or_default();
            vcpu::save(&cpu.vcpu, cpu.index as u32, &cpu.caps, &cpuid, &list)
        }))
    }

    fn start_restoring(&self, states: &[VcpuState]) -> vcpu::Pending<()> {
        let states: Arc<[VcpuState]> = states.into();
        self.vcpus.start_on_all(Box::new(move |cpu| {
            vcpu::restore(&cpu.vcpu, &cpu.caps, &mut cpu.cpuid, cpu.pristine.take(), &states[cpu.index])
        }))
    }

    /// What is restored while the vCPUs' threads begin with the vCPUs.
    fn restore_around_vcpus(&self, state: &MachineState) -> Result<(), MachineError> {
        vcpu::restore_step!("gsi-routes", {
            if !state.vm.gsi_routes.is_empty() {
                self.set_gsi_routes(&state.vm.gsi_routes)?;
            }
        });
        vm_state::restore_before_vcpus(&self.vm, &state.vm)?;
        vcpu::restore_step!("serial", self.serial.restore(&state.serial)?);
        vcpu::restore_step!("platform", self.rtc.restore(&state.platform));
        Ok(())
    }

    /// Returns the state after power-on of a VM like this one whose vCPUs have these CPUID tables.
    fn pristine(&self, cpuid: &[Blob]) -> Result<(Vec<VcpuState>, crate::state::VmState), MachineError> {
        let scratch = Arc::new(Vm::create(&self.kvm)?);
        scratch.create_irqchip()?;
        scratch.create_pit()?;
        let list = self.msr_list()?;
        let list: Vec<u32> = list.iter().copied().filter(|&index| index != vcpu::IA32_TSC).collect();
        let mut states = Vec::with_capacity(cpuid.len());
        for (index, table) in cpuid.iter().enumerate() {
            let state = || -> Result<VcpuState, vcpu::VcpuError> {
                let vcpu = scratch.create_vcpu(index as u32)?;
                vcpu::set_cpuid(&vcpu, &mut None, table)?;
                let mut state = vcpu::save(&vcpu, index as u32, &self.caps, table, &list)?;
                // The time stamp counter goes on, as the clock does.
                (state.tsc_khz, state.tsc_offset) = (0, None);
                Ok(state)
            };
            states.push(state().map_err(|source| MachineError::Vcpu { index, source })?);
        }
        Ok((states, vm_state::save(&scratch, Vec::new())?))
    }
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("vcpus", &self.vcpus).field("ram", &self.ram.regions()).finish()
    }
}

/// Returns the interrupt routes that KVM starts with, for whoever adds to them.
pub fn default_routes() -> Vec<GsiRoute> {
    vm_state::default_routes()
}
