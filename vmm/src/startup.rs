//! From the command line to a running program: a cold boot, or the target of an update.
//!
//! A program that is only asked whether it could take a guest over answers that, and ends.
//!
//! The order matters for both. What a previous program left is received before anything is opened; the machine is
//! built before the state is read; and until the commit nothing is printed or read, so that another program can still
//! take the guest back. Whatever goes wrong up to there, an error, a panic or a fault, is the previous program's turn: it
//! is executed again in this process ([`cpr_exec::fall_back`]).

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use cpr_core::fault::{self, Point};
use cpr_core::ownership::Owner;
use cpr_core::{Blocker, Control, FdKind, FdPolicy, FdRegistry, Incoming, Services, Stamp};
use cpr_exec::ExecArrival;
use cpr_transfer::Listener;
use oslib::signals::{self, SignalFd, SignalMask};
use vmm_core::boot::{self, BootRequest, Entry, KernelImage};
use vmm_core::machine::{Machine, MachineConfig};
use vmm_core::memory::{Backend, BackendConfig, BackendKind, GuestRam};
use vmm_core::payload;
use vmm_core::state::Blob;

use crate::app::{self, App, BlackoutObserver, EarlyState, Exit, FrontEnd, Parts, RunState, User};
use crate::arriving::{Arriving, ExecRest, Predecessor};
use crate::chardev::{self, Chardev, Output};
use crate::cli::config::{self, Config, MemoryBackend, MonitorKind};
use crate::cli::{self, Invocation};
use crate::devices::{self, Backing, Consoles};
use crate::monitor::mux::Mux;
use crate::monitor::{Channel, SocketAddress};
use crate::sandbox::Sandbox;
use crate::{errors, trace};

/// Signals that end the program in good order.
const ENDING: SignalMask = SignalMask::of(&[SIGHUP, SIGINT, SIGTERM]);
/// Signals that are blocked without being waited for: setting a terminal's modes from the background must not stop us.
const IGNORED: SignalMask = SignalMask::of(&[SIGTTOU]);
const SIGHUP: i32 = 1;
const SIGINT: i32 = 2;
const SIGTERM: i32 = 15;
const SIGTTOU: i32 = 22;

/// Of freed memory: more than what the states of 64 vCPUs take.
const KEPT_HEAP: usize = 4 << 20;

/// Runs the program with these arguments (without the program's own name).
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let started_ns = oslib::clock::monotonic_ns();
    oslib::memory::tune_allocator(KEPT_HEAP);
    match try_main(args, started_ns) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cpr-vmm: {}", errors::text(error.as_ref()));
            // Returns unless this was the target of an update.
            cpr_exec::fall_back();
            ExitCode::FAILURE
        }
    }
}

fn try_main(args: impl IntoIterator<Item = OsString>, started_ns: u64) -> anyhow::Result<ExitCode> {
    if let Some(request) = cpr_exec::preflight_request()? {
        app::answer_preflight(request, args)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut arrival = cpr_exec::receive()?;
    if let Some(arrival) = &arrival {
        arrival.arrival.control.timeline().stamp_at(Stamp::TargetStarted, started_ns);
        fall_back_on_panic();
    }
    let invocation = cli::parse(args).inspect_err(|_| {
        // The predecessor's terminal modes are still set, and nobody else will give the terminal back.
        let early =
            arrival.as_mut().and_then(|arrival| app::take_early_state(&mut arrival.arrival.early).ok());
        if let Some(terminal) = early.and_then(|early| early.terminal()) {
            chardev::restore_terminal(&terminal);
        }
    })?;
    let config = match invocation {
        Invocation::Run(config) => *config,
        Invocation::Help(_) | Invocation::Version(_) if arrival.is_some() => {
            bail!("this program was asked for a text, and not to take a guest over")
        }
        Invocation::Help(text) | Invocation::Version(text) => {
            print!("{text}");
            return Ok(ExitCode::SUCCESS);
        }
    };
    trace::start(&config.trace)?;
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let mut app = start(config, arrival)?;
    Ok(match app.run()? {
        Exit::Fatal => ExitCode::FAILURE,
        Exit::Quit | Exit::Signal(_) | Exit::GuestPowerOff | Exit::GuestReset => ExitCode::SUCCESS,
    })
}

/// For a panic of any thread, after its message.
fn fall_back_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        cpr_exec::fall_back();
    }));
}

fn start(config: Config, arrival: Option<ExecArrival>) -> anyhow::Result<App> {
    let (signals, original_mask) = handle_signals(arrival.as_ref())?;
    let mut services = Services::default();
    let mut sandbox = Sandbox::new(config.sandbox, &services.blockers)?;
    if arrival.is_none() {
        // Others enter it when they have the guest.
        sandbox.enter()?;
    }
    let mut listening = None;
    let (arriving, early) = match (arrival, &config.incoming_cpr) {
        (Some(arrival), cpr) => {
            if cpr.is_some() {
                tracing::warn!("ignoring cpr channel for migration mode cpr-exec");
            }
            receive(&mut services, arrival).map(|(arriving, early)| (Some(arriving), Some(early)))?
        }
        (None, Some(cpr)) => {
            listening = Some(listen(cpr, &config)?);
            (None, None)
        }
        (None, None) => {
            check_storage(&config)?;
            (None, None)
        }
    };
    let terminal = early.as_ref().and_then(EarlyState::terminal);
    let in_storage = arriving.is_none() && listening.is_none() && config.incoming.is_some();
    let is_successor = arriving.is_some();
    let guest = Guest { arriving, early, listening, in_storage };
    let result = build(config, services, sandbox, signals, original_mask, guest).and_then(|mut app| {
        app.begin().inspect_err(|_| {
            if !is_successor {
                app.remove_traces();
            }
        })?;
        Ok(app)
    });
    // The terminal's modes outlive the update; unless a chardev answers for them now, this program must.
    if let Some(terminal) = terminal
        && !result.as_ref().is_ok_and(App::has_terminal)
    {
        chardev::restore_terminal(&terminal);
    }
    result
}

/// Where the guest comes from, if it is not booted.
struct Guest {
    arriving: Option<Arriving>,
    early: Option<EarlyState>,
    listening: Option<Listener>,
    in_storage: bool,
}

/// A program that no update has started, and that is to boot nothing, finds its guest in a file.
fn check_storage(config: &Config) -> anyhow::Result<()> {
    match &config.incoming {
        None | Some(config::Incoming::Defer) => Ok(()),
        // Only looked at, so that a wrong one ends the program before it has made anything.
        Some(config::Incoming::Channel(Channel::File { path, offset })) => {
            app::open_state(path, *offset).map(drop).context("-incoming")
        }
        Some(config::Incoming::Channel(channel)) => bail!(
            "-incoming: '{channel}': this program was not started by an update, so the guest can only be in a file \
             that cpr-reboot wrote (file:PATH)"
        ),
    }
}

/// What the guest runs on: there from the start, or from when the guest arrives.
pub struct Hardware {
    pub(crate) memory: Backend,
    pub(crate) ram: GuestRam,
    pub(crate) machine: Machine,
    /// Of devices that cannot be saved.
    _blockers: Vec<Blocker>,
}

/// Guest RAM before there is a machine around it.
pub(crate) struct Ram {
    memory: Backend,
    pub(crate) ram: GuestRam,
    origin: RamOrigin,
}

/// Where the guest's RAM comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RamOrigin {
    /// It is made; what it is to hold comes later.
    New,
    /// Its descriptor came with an update.
    Registry,
    /// It stayed in its file.
    Storage,
}

/// Makes or adopts the guest's RAM, and maps it.
pub(crate) fn open_ram(config: &Config, registry: &FdRegistry, origin: RamOrigin) -> anyhow::Result<Ram> {
    let memory = open_memory(&config.memory, registry, origin)?;
    let ram = GuestRam::map(&memory)?;
    Ok(Ram { memory, ram, origin })
}

/// What a machine is connected to.
pub(crate) struct HostSide<'a> {
    pub(crate) services: &'a Services,
    pub(crate) observer: &'a Arc<BlackoutObserver>,
    pub(crate) chardevs: &'a [Chardev],
    pub(crate) consoles: &'a Consoles,
}

impl Ram {
    /// Builds the machine around it.
    pub(crate) fn into_hardware(self, config: &Config, host: &HostSide<'_>) -> anyhow::Result<Hardware> {
        let backing = Backing {
            registry: &host.services.registry,
            has_arrived: self.origin == RamOrigin::Registry,
            ram: &self.ram,
            chardevs: host.chardevs,
            consoles: host.consoles,
        };
        let machine = Machine::new(MachineConfig {
            ram: self.ram.clone(),
            vcpus: config.cpus.into(),
            serial: Box::new(serial_output(config, host.chardevs)),
            observer: host.observer.clone(),
            pci: devices::build(config, &backing)?,
        })?;
        let blockers = devices::block_updates(&machine, &host.services.blockers);
        Ok(Hardware { memory: self.memory, ram: self.ram, machine, _blockers: blockers })
    }
}

impl Hardware {
    /// Does everything that the state is not needed for, while the guest runs elsewhere.
    pub(crate) fn complete(&self, config: &Config, cpuid: &[Blob], control: &Control) -> anyhow::Result<()> {
        let rendezvous = control.rendezvous();
        rendezvous.note_progress();
        self.machine.preset_cpuid(cpuid)?;
        rendezvous.note_progress();
        self.machine.ready_with(&mut || rendezvous.note_progress())?;
        self.machine.prepare_devices();
        self.machine.prepare_to_run();
        rendezvous.note_progress();
        oslib::memory::warm_allocator(app::room_for_state(config));
        Ok(())
    }

    /// Maps the guest's pages ahead of their use, so that it finds them there after the blackout.
    ///
    /// Not for cpr-exec: a guest with gigabytes of RAM was seen to stand still for milliseconds while this went on beside
    /// it, and the monitors of an exec are silent meanwhile.
    pub(crate) fn populate(&self, control: &Control) -> anyhow::Result<()> {
        let rendezvous = control.rendezvous();
        let mut began = Instant::now();
        let populated = self.machine.populate(&mut || {
            rendezvous.note_progress();
            // As long as the piece took: a thread that never sleeps would keep a vCPU that shares its CPU waiting for whole
            // time slices.
            std::thread::sleep(began.elapsed());
            began = Instant::now();
            // A source that took the guest back waits for the end of this process.
            control.ownership().owner() == Some(Owner::Source)
        });
        // Pages that are not there now come as the guest asks for them.
        populated.or_else(|error| {
            tracing::warn!(%error, "the guest's pages are mapped one by one");
            Ok(())
        })
    }
}

/// The output of COM1's chardev.
fn serial_output(config: &Config, chardevs: &[Chardev]) -> Output {
    let serial = config.serial.as_ref().and_then(|id| chardevs.iter().find(|chardev| chardev.id() == id));
    serial.map(|chardev| chardev.output().clone()).unwrap_or_default()
}

/// Says which process has the guest.
pub(crate) fn write_pidfile(config: &Config) -> anyhow::Result<()> {
    let Some(path) = &config.pidfile else { return Ok(()) };
    std::fs::write(path, format!("{}\n", std::process::id()))
        .with_context(|| format!("-pidfile: cannot write {}", path.display()))
}

/// Removes it, if it names this process. That of a guest that moved here or from here names another one, or none yet.
pub(crate) fn remove_pidfile(path: &Path) {
    if std::fs::read_to_string(path).is_ok_and(|pid| pid.trim() == std::process::id().to_string()) {
        let _ = std::fs::remove_file(path);
    }
}

/// Waits for a source.
fn listen(cpr: &SocketAddress, config: &Config) -> anyhow::Result<Listener> {
    let listener = match cpr {
        SocketAddress::Unix(path) => Listener::bind(std::path::absolute(path)?)?,
        SocketAddress::Fd(number) => {
            let number = number
                .parse()
                .with_context(|| format!("-incoming: addr.str: '{number}' is no descriptor number"))?;
            let socket = oslib::inherited::take(number)
                .with_context(|| format!("-incoming: descriptor {number} was not passed on"))?;
            Listener::from_fd(socket).with_context(|| format!("-incoming: descriptor {number}"))?
        }
    };
    let config = config.clone();
    Ok(listener.answering(move |manifest| app::judge(&config, manifest, cpr_transfer::catalogue())))
}

/// What others find of a program that starts: its process id and its sockets. Removed if the start fails, unless a program
/// before has left them.
struct Traces {
    pidfile: Option<PathBuf>,
    chardevs: Vec<Chardev>,
    are_own: bool,
}

impl Traces {
    /// Leaves them to an [`App`], which removes them at its end.
    fn hand_over(mut self) -> Vec<Chardev> {
        self.are_own = false;
        std::mem::take(&mut self.chardevs)
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        if self.are_own {
            self.chardevs.iter_mut().for_each(Chardev::close);
            self.pidfile.iter().for_each(|path| remove_pidfile(path));
        }
    }
}

fn build(
    mut config: Config,
    services: Services,
    sandbox: Sandbox,
    signals: SignalFd,
    original_mask: SignalMask,
    Guest { arriving, early, listening, in_storage }: Guest,
) -> anyhow::Result<App> {
    let mut traces = Traces { pidfile: None, chardevs: Vec::new(), are_own: arriving.is_none() };
    // While the guest is in another process, that is the one to be found; and none while it is in storage.
    if listening.is_none() && !in_storage {
        write_pidfile(&config)?;
        traces.pidfile.clone_from(&config.pidfile);
    }
    // The source watches that this program gets on.
    let note_progress = || {
        if let Some(arriving) = &arriving {
            arriving.incoming.control().rendezvous().note_progress();
        }
    };
    note_progress();
    let ram = match (&listening, in_storage, &arriving) {
        (None, false, None) => Some(open_ram(&config, &services.registry, RamOrigin::New)?),
        (None, false, Some(_)) => Some(open_ram(&config, &services.registry, RamOrigin::Registry)?),
        // Once the guest is here, or known to be there.
        _ => None,
    };
    note_progress();
    let (mut states, settings, named_fds, cpuid) = match early {
        Some(EarlyState { machine_type, chardevs, settings, named_fds, cpuid }) => {
            config.machine.adopt(&machine_type).map_err(anyhow::Error::msg)?;
            (chardevs, settings, app::find_named_fds(&named_fds, &services.registry), cpuid)
        }
        None => Default::default(),
    };
    if !cpuid.is_empty() && cpuid.len() != usize::from(config.cpus) {
        bail!("the guest has {} vCPUs, the command line says {}", cpuid.len(), config.cpus);
    }
    // How the update ended for a monitor that waits for it: by a program that has it, the source's or a later one.
    let failure = arriving.as_ref().and_then(|arriving| arriving.failure().map(str::to_owned));
    if failure.is_some()
        && arriving.as_ref().is_some_and(|a| a.incoming.control().rendezvous().was_deferred())
    {
        // The program that failed served the monitors meanwhile.
        states.iter_mut().for_each(|(state, _)| state.forget_output());
    }
    let consoles = Consoles::new(&config)?;
    let mut front_ends = Vec::new();
    for chardev_config in &config.chardevs {
        let identity = chardev::identity(chardev_config)?;
        let at = states.iter().position(|(state, _)| state.identity() == identity);
        let (chardev_state, users_state) = at.map(|at| states.swap_remove(at)).unzip();
        let took_over = chardev_state.is_some();
        let mut front_end = front_end(chardev_config, &config, &consoles)?;
        let chardev = if listening.is_some() && front_end.is_guests_only() && chardev::travels(chardev_config)
        {
            Chardev::awaited(chardev_config)?
        } else {
            Chardev::open(chardev_config, &services.registry, chardev_state)?
        };
        if let Some(state) = users_state {
            front_end.restore(
                &identity,
                state,
                &services.registry,
                chardev.is_connected(),
                failure.as_deref(),
            );
        }
        if chardev.is_connected() && !took_over {
            front_end.connect(chardev.id());
        }
        front_end.tell_consoles(&chardev);
        traces.chardevs.push(chardev);
        front_ends.push(front_end);
    }
    let observer = Arc::new(BlackoutObserver::default());
    let hardware = match ram {
        Some(ram) => {
            let host = HostSide {
                services: &services,
                observer: &observer,
                chardevs: &traces.chardevs,
                consoles: &consoles,
            };
            Some(ram.into_hardware(&config, &host)?)
        }
        None => None,
    };
    if let (Some(arriving), Some(hardware)) = (&arriving, &hardware) {
        let control = arriving.incoming.control();
        if arriving.is_live() {
            // The guest runs meanwhile, so everything that can be done now is.
            hardware.complete(&config, &cpuid, control)?;
        }
        fault::at(Point::Built).map_err(|error| anyhow::anyhow!(error))?;
        control.timeline().stamp(Stamp::Built);
    }
    let is_target = arriving.is_some() || listening.is_some() || in_storage;
    let run_state = if is_target { RunState::InMigrate } else { RunState::Prelaunch };
    let chardevs = traces.hand_over();
    App::new(Parts {
        config,
        services,
        sandbox,
        hardware,
        observer,
        signals,
        original_mask,
        chardevs,
        front_ends,
        consoles,
        settings,
        named_fds,
        run_state,
        arriving,
        listening,
        in_storage,
    })
}

/// Lets the main loop wait for signals. In the target every signal is blocked until here; a SIGTERM that came
/// meanwhile is handled once the guest runs.
fn handle_signals(arrival: Option<&ExecArrival>) -> anyhow::Result<(SignalFd, SignalMask)> {
    let original = match arrival {
        Some(arrival) => arrival.signal_mask,
        None => signals::current()?,
    };
    signals::block(SignalMask::from_bits(ENDING.bits() | IGNORED.bits()))?;
    let fd = SignalFd::new(ENDING)?;
    signals::set_mask(SignalMask::from_bits(original.bits() | ENDING.bits() | IGNORED.bits()))?;
    Ok((fd, original))
}

fn receive(services: &mut Services, arrival: ExecArrival) -> anyhow::Result<(Arriving, EarlyState)> {
    let ExecArrival { arrival, main, keeper, source, failure, .. } = arrival;
    let mut incoming = Incoming::begin(services, arrival)?;
    let early = app::take_early_state(incoming.early())?;
    let from = Predecessor::Exec { rest: ExecRest { keeper, source, failure }, main };
    Ok((Arriving { from, incoming }, early))
}

fn open_memory(
    config: &config::MemoryConfig,
    registry: &FdRegistry,
    origin: RamOrigin,
) -> anyhow::Result<Backend> {
    let kind = match &config.backend {
        MemoryBackend::Memfd { share, hugetlb } => {
            let hugetlb = hugetlb.map(|pages| pages.page_bytes.unwrap_or(DEFAULT_HUGE_PAGE));
            BackendKind::Memfd { share: *share, hugetlb }
        }
        MemoryBackend::File { path, share } => BackendKind::File { path: path.clone(), share: *share },
        MemoryBackend::Ram { share } => BackendKind::Ram { share: *share },
    };
    let fd_kind = if matches!(kind, BackendKind::File { .. }) { FdKind::Other } else { FdKind::Memfd };
    let backend = BackendConfig { id: config.id.clone(), size: config.size_bytes, kind };
    if origin == RamOrigin::Registry {
        let Some(fd) = registry.find::<File>(&config.id, 0) else {
            bail!(
                "guest RAM '{}' did not arrive with the update; the command line must name the memory backend as \
                 the previous program's did",
                config.id
            );
        };
        return Ok(Backend::adopt(backend, fd)?);
    }
    let backend = match origin {
        RamOrigin::Storage => Backend::reopen(backend)?,
        RamOrigin::New | RamOrigin::Registry => Backend::create(backend)?,
    };
    if let (Some(fd), None) = (backend.fd(), backend.in_place_obstacle()) {
        registry.save(&config.id, 0, fd_kind, FdPolicy::MustSurvive, fd)?;
    }
    Ok(backend)
}

/// The page size of `hugetlb=on` without a size.
pub(crate) const DEFAULT_HUGE_PAGE: u64 = 2 << 20;

/// Who uses a character device.
pub(crate) fn front_end(
    chardev: &config::ChardevConfig,
    config: &Config,
    consoles: &Consoles,
) -> anyhow::Result<FrontEnd> {
    let mut users = Vec::new();
    if config.serial.as_ref() == Some(&chardev.id) {
        users.push(User::Serial(Default::default()));
    }
    let ports = consoles.of_chardev(config, &chardev.id).into_iter();
    users.extend(ports.map(|end| User::Console(end, Default::default())));
    for monitor in config.monitors.iter().filter(|monitor| monitor.chardev == chardev.id) {
        users.push(match monitor.kind {
            MonitorKind::Hmp => User::Hmp(None),
            MonitorKind::Qmp => User::Qmp(None),
        });
    }
    chardev::check_users(chardev, users.len())?;
    let mux = chardev.mux.then(|| Mux::new(u8::try_from(users.len()).unwrap_or(u8::MAX)));
    Ok(FrontEnd { users, mux })
}

/// Loads what the guest boots into its RAM.
///
/// # Errors
/// The kernel or initrd cannot be loaded; the error names the file.
pub fn load_kernel(config: &Config, ram: &GuestRam) -> anyhow::Result<Entry> {
    let kernel = match &config.boot.kernel {
        Some(path) => KernelImage::Path(path.clone()),
        None => KernelImage::BuiltIn { name: "the built-in payload", bytes: payload::ELF },
    };
    let request = BootRequest {
        kernel,
        initrd: config.boot.initrd.clone(),
        cmdline: config.boot.append.as_deref().unwrap_or_default(),
        vcpus: config.cpus.into(),
        pci: config.machine.machine_type().has_pci(),
    };
    Ok(boot::load(ram.memory(), &request)?)
}
