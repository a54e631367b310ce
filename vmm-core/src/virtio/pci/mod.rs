//! The PCI transport of virtio: how a driver finds a device, agrees with it and tells it of its queues (virtio 1.2, 4.1).
//!
//! It is the modern interface alone, with MSI-X and without INTx, which is what drivers use where they are given the
//! choice. All of it is behind one BAR:
//!
//! | offset | what | where |
//! |---|---|---|
//! | 0x0000 | common configuration | `common.rs` |
//! | 0x1000 | ISR status | `signals.rs` |
//! | 0x2000 | the device's configuration | the device |
//! | 0x3000 | notifications, 4 bytes for each queue | `notify.rs` |
//! | 0x4000 | MSI-X table | [`Msix`](crate::pci::Msix) |
//! | 0xc000 | MSI-X pending bits | |
//!
//! The device, what was agreed on with its driver, and the driver's queues are under one lock (`transport.rs`).
//! Configuration space, vectors and doorbells have their own, so that a vCPU that looks at them waits for no device.

mod capabilities;
mod common;
mod notify;
mod signals;
mod state;
mod transport;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter};
use oslib::eventfd::EventFd;
use vm_memory::GuestMemoryMmap;

use self::notify::Doorbells;
use self::signals::Signals;
use self::transport::Transport;
use super::{Backing, Drained, SectionVersions, VirtioDevice, Watch, WatchToken};
use crate::pci::{ConfigSpace, Endpoint, Function, FunctionState, Hypervisor, Identity, MsixLayout, WINDOW};

pub use self::state::{QueueState, VirtioState, VirtioStateError, WindowState};

/// Bytes of the BAR.
pub const BAR_LEN: u64 = 0x1_0000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0xc000;
/// Bytes of each of the first four.
const REGION_LEN: u64 = 0x1000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_STEP: u64 = 4;

/// The most queues of a device: each has a vector, and there is one for the configuration.
pub const MAX_QUEUES: usize = 1023;

/// Red Hat, who gives virtio devices their ids (virtio 1.2, 4.1.2).
const VENDOR: u16 = 0x1af4;
/// Device id of the device of virtio id 0.
const FIRST_DEVICE_ID: u16 = 0x1040;
/// As QEMU's.
const SUBSYSTEM_ID: u16 = 0x1100;

/// A device that cannot be one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShapeError {
    /// It has more queues than the transport has room for.
    #[error("{found} queues, at most {MAX_QUEUES} are possible")]
    Queues {
        /// How many it has.
        found: usize,
    },
    /// The size of a queue is none.
    #[error("queue {queue} cannot have a size of {size}; it must be a power of two up to 32768")]
    QueueSize {
        /// Which.
        queue: usize,
        /// Its size.
        size: u16,
    },
    /// No eventfd could be made.
    #[error("cannot make an eventfd")]
    EventFd(#[source] std::io::Error),
}

/// Tells the thread that serves devices that one wants to be looked at.
#[derive(Debug, Clone)]
pub(crate) struct Bell(pub(crate) Arc<EventFd>);

impl Bell {
    pub(crate) fn ring(&self) {
        if let Err(error) = self.0.signal() {
            tracing::error!(%error, "cannot ring for the I/O thread");
        }
    }
}

/// A virtio device behind PCI.
pub struct VirtioPci {
    endpoint: Endpoint,
    /// Where the window into the BAR is in configuration space.
    window: usize,
    signals: Arc<Signals>,
    doorbells: Doorbells,
    /// See [`sections`](Self::sections).
    sections: Option<Vec<SectionVersions>>,
    transport: Mutex<Transport>,
    /// What the device watches may have changed by the doing of somebody else than the thread that watches.
    changed: AtomicBool,
    bell: Bell,
}

impl VirtioPci {
    /// Puts `device` behind PCI; its BAR is at `address` until the guest moves it.
    ///
    /// # Errors
    /// The device has an impossible shape.
    pub(crate) fn new(
        mut device: Box<dyn VirtioDevice>,
        withheld: u64,
        address: u64,
        memory: GuestMemoryMmap,
        hypervisor: &Arc<dyn Hypervisor>,
        bell: Bell,
    ) -> Result<Self, ShapeError> {
        let sizes = device.queue_sizes();
        if sizes.len() > MAX_QUEUES {
            return Err(ShapeError::Queues { found: sizes.len() });
        }
        let class = device.class();
        let identity = Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE_ID + class.virtio_id,
            revision: 1,
            class: class.pci,
            subsystem: (VENDOR, SUBSYSTEM_ID),
        };
        let layout = MsixLayout { table: MSIX_TABLE as u32, pending: MSIX_PENDING as u32 };
        let mut window = 0;
        let endpoint = Endpoint::new(
            &identity,
            address,
            BAR_LEN,
            sizes.len() + 1,
            layout,
            hypervisor.clone(),
            |config| {
                window = capabilities::add(config);
            },
        );
        let transport = [state::versions::<FunctionState>(), state::versions::<VirtioState>()];
        let sections =
            device.persistent().map(|device| transport.into_iter().chain(device.sections()).collect());
        let signals = Arc::new(Signals::new(endpoint.msix().clone(), sizes.len()));
        let doorbells = Doorbells::new(sizes.len(), hypervisor.clone()).map_err(ShapeError::EventFd)?;
        device.hear_doorbells(doorbells.bells());
        Ok(Self {
            window,
            doorbells,
            transport: Mutex::new(Transport::new(device, withheld, memory, signals.clone())?),
            signals,
            sections,
            endpoint,
            changed: AtomicBool::new(false),
            bell,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Transport> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The doorbell of each queue: readable when the driver has rung.
    pub(crate) fn doorbells(&self) -> &[EventFd] {
        self.doorbells.bells()
    }

    /// Answers the doorbell of a queue.
    pub(crate) fn rung(&self, queue: usize) {
        self.doorbells.silence(queue);
        self.lock().queue_ready(queue);
    }

    /// A descriptor that the device watches is ready.
    pub(crate) fn fd_ready(&self, token: WatchToken) {
        self.lock().fd_ready(token);
    }

    /// Gives `take` what the device watches now, and the queues whose doorbells others answer. There is nothing of either for
    /// a driver that is not there.
    pub(crate) fn watches<T>(&self, take: impl FnOnce(Vec<Watch<'_>>, &[usize]) -> T) -> T {
        let transport = self.lock();
        take(transport.watches(), &transport.served_elsewhere())
    }

    /// Whether [`watches`](Self::watches) may have changed by somebody else's doing since this was asked last.
    pub(crate) fn take_changed(&self) -> bool {
        self.changed.swap(false, Ordering::AcqRel)
    }

    fn change(&self) {
        self.changed.store(true, Ordering::Release);
        self.bell.ring();
    }

    /// The guest goes on: ends what [`drain`](Self::drain) began, and has the device look into each queue.
    pub(crate) fn go_on(&self) {
        let mut transport = self.lock();
        transport.resume();
        (0..self.doorbells.bells().len()).for_each(|queue| transport.queue_ready(queue));
    }

    /// The guest is stopped: has the device complete what is under way.
    pub(crate) fn drain(&self) -> Drained {
        self.lock().drain()
    }

    /// The device is at rest, and this process about to be replaced: has it let go of what the kernel keeps for a process.
    pub(crate) fn leave_process(&self) {
        self.lock().leave_process();
    }

    /// The device is at rest: has what its driver has stored outlive the host's kernel.
    pub(crate) fn settle_on_host(&self) -> Result<(), BoxError> {
        self.lock().settle_on_host()
    }

    /// Has the doorbells where they will be once the guest has the BAR answered that it has not moved. For a machine that is
    /// built ahead of its state, as KVM may take long.
    pub(crate) fn attach_doorbells_ahead(&self) {
        self.doorbells.follow(|| Some(self.endpoint.first_memory()));
    }

    /// As after power-on.
    pub(crate) fn reset(&self) {
        self.lock().reset();
        self.endpoint.reset();
        self.follow();
        (0..self.doorbells.bells().len()).for_each(|queue| self.doorbells.silence(queue));
        self.change();
    }

    /// The doorbells are where the BAR is.
    fn follow(&self) {
        self.doorbells.follow(|| self.endpoint.memory());
    }

    /// The sections that [`save`](Self::save) writes; `None` if the device cannot be saved. Waits for no device.
    pub fn sections(&self) -> Option<&[SectionVersions]> {
        self.sections.as_deref()
    }

    /// What is behind the device on the host, if its next process has to find the same.
    ///
    /// # Errors
    /// What has become of it.
    pub fn backing(&self) -> Result<Option<Backing>, BoxError> {
        self.lock().persistent().map_or(Ok(None), |device| device.backing())
    }

    /// Writes the state as sections of this instance. The guest is stopped, and the device at rest.
    ///
    /// # Errors
    /// The device cannot be saved, or not now.
    pub fn save(&self, main: &mut FrameWriter, instance: u32) -> Result<(), BoxError> {
        main.put_section(instance, &self.endpoint.save())?;
        let mut transport = self.lock();
        main.put_section(
            instance,
            &transport.save(self.endpoint.with_config(|config| capabilities::window(config, self.window))),
        )?;
        transport.persistent().ok_or("it cannot be saved")?.save(main, instance)
    }

    /// Reads the state into a device that has not been used.
    ///
    /// # Errors
    /// A state that is damaged, or of another device.
    pub fn load(&self, main: &mut Frame, instance: u32) -> Result<(), BoxError> {
        let function: FunctionState = main.require_section(instance)?;
        let virtio: VirtioState = main.require_section(instance)?;
        let mut transport = self.lock();
        transport.load(&virtio)?;
        self.endpoint.load(&function)?;
        self.endpoint.write_config(self.window, &capabilities::window_bytes(&virtio.window));
        self.follow();
        transport.persistent().ok_or("it cannot be loaded")?.load(main, instance)?;
        drop(transport);
        self.change();
        Ok(())
    }
}

impl Function for VirtioPci {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.endpoint.read_config(offset, data);
        let target =
            self.endpoint.with_config(|config| capabilities::access(config, self.window, offset, data.len()));
        if let Some(target) = target {
            self.read_memory(target, data);
        }
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        let is_master = || self.endpoint.with_config(ConfigSpace::is_bus_master);
        let was_master = is_master();
        self.endpoint.write_config(offset, data);
        self.follow();
        // A kernel that starts another one leaves devices to it as they are, but for this.
        if was_master && !is_master() {
            self.lock().leave_memory_alone();
            self.change();
        }
        let target =
            self.endpoint.with_config(|config| capabilities::access(config, self.window, offset, data.len()));
        if let Some(target) = target {
            self.write_memory(target, data);
        }
    }

    fn memory(&self) -> Option<Range<u64>> {
        self.endpoint.memory()
    }

    fn read_memory(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = (offset % REGION_LEN) as usize;
        match offset {
            COMMON..ISR => self.lock().read_common(within, data),
            ISR..DEVICE => self.signals.read_isr(within, data),
            DEVICE..NOTIFY => self.lock().read_device(within, data),
            MSIX_TABLE..MSIX_PENDING => self.endpoint.msix().read_table((offset - MSIX_TABLE) as usize, data),
            MSIX_PENDING.. => self.endpoint.msix().read_pending((offset - MSIX_PENDING) as usize, data),
            _ => {}
        }
    }

    fn write_memory(&self, offset: u64, data: &[u8]) {
        let within = (offset % REGION_LEN) as usize;
        let changed = match offset {
            COMMON..ISR => self.lock().write_common(within, data),
            DEVICE..NOTIFY => {
                self.lock().write_device(within, data);
                true
            }
            NOTIFY..MSIX_TABLE => {
                self.doorbells.ring((offset - NOTIFY) / NOTIFY_STEP);
                false
            }
            MSIX_TABLE..MSIX_PENDING => {
                self.endpoint.msix().write_table((offset - MSIX_TABLE) as usize, data);
                false
            }
            _ => false,
        };
        if changed {
            self.change();
        }
    }
}

impl std::fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtioPci").field("transport", &*self.lock()).finish_non_exhaustive()
    }
}

/// Where the BAR of the device in this slot is before the guest moves it.
pub(crate) fn first_address(slot: u8) -> u64 {
    WINDOW.start + u64::from(slot) * BAR_LEN
}

#[cfg(test)]
mod tests;
