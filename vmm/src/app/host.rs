//! What an update does to this program, in the source and in the target.

use std::collections::BTreeMap;
use std::iter::{once, repeat};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, anyhow};
use cpr_core::error::BoxError;
use cpr_core::frame::{Frame, FrameWriter, Section};
use cpr_core::preflight::Manifest;
use cpr_core::section::{Previous, SectionType};
use cpr_core::{
    Backing, FdKind, FdPolicy, FdRegistry, GuestActivity, Host, IncomingError, MemoryRegion, ModeInfo,
    Properties, TerminalAction,
};
use serde::{Deserialize, Serialize};
use vmm_core::state::{Blob, MachineState};
use vmm_core::time::{Now, TimeState};

use super::commands::named_fd;
use super::device_shape::{DeviceShape, DevicesSection};
use super::lifecycle::Reset;
use super::preflight::MachineShape;
use super::{App, Exit, FrontEnd, RunState, User};
use crate::arriving::{Arriving, Predecessor, check_transfer_channel};
use crate::chardev::ChardevState;
use crate::cli::config::{Config, Incoming};
use crate::migration::{Settings, SettingsV1, Status};
use crate::monitor::mux::Mux;
use crate::monitor::{Channel, MAX_RECEIVED_FDS, QmpError, Reply, hmp, qmp};
use crate::startup::Hardware;
use crate::{errors, formats};

/// Main section: what the guest did that the outside does not know yet.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct OutsideSection {
    /// What it printed and COM1's chardev has not sent.
    unsent: Vec<u8>,
    /// Resets that monitors have not been told of.
    resets: Vec<Reset>,
}

impl SectionType for OutsideSection {
    const NAME: &'static str = "cpr-vmm/outside";
    const VERSION: u32 = 1;
}

/// Main section, if the guest moves to another process: input for COM1 that its FIFO had no room for.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct SerialInput(Vec<u8>);

impl SectionType for SerialInput {
    const NAME: &'static str = "cpr-vmm/serial-input";
    const VERSION: u32 = 1;
}

/// Main section, one for each virtio console that has a chardev, in their order: what is on its way through the chardev.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ConsoleLine {
    /// Of which chardev.
    identity: String,
    /// What the guest wrote and the chardev has not sent, with its first console. Of a chardev that COM1 has as well, see
    /// [`OutsideSection`].
    unsent: Vec<u8>,
    /// Input that the console had no room for, if the guest moves to another process.
    input: Vec<u8>,
}

impl SectionType for ConsoleLine {
    const NAME: &'static str = "cpr-vmm/console-line";
    const VERSION: u32 = 1;
}

/// Bytes of state of a machine without vCPUs, generously.
const STATE_LEN: usize = 32 << 10;
/// Bytes of state of a vCPU, of which its extended registers are the most.
const VCPU_LEN: usize = 24 << 10;

/// Bytes of state of a device with its transport, of which the MSI-X table is the most.
const DEVICE_LEN: usize = 8 << 10;

fn state_len(vcpus: usize, devices: usize) -> usize {
    STATE_LEN + vcpus * VCPU_LEN + devices * DEVICE_LEN
}

/// Bytes of memory for the state and its encoded form.
pub fn room_for_state(config: &Config) -> usize {
    2 * state_len(config.cpus.into(), config.devices.len())
}

/// What was loaded and must wait for the commit.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    outside: OutsideSection,
    ended: Option<GuestEnd>,
    /// Input that COM1 has no room for yet.
    serial_input: Vec<u8>,
    consoles: Vec<ConsoleLine>,
}

/// Early section: chardevs, monitors, migration settings, and what the machine is built of before its state is there.
#[derive(Debug, Serialize, Deserialize)]
pub struct EarlyState {
    /// Full name of the guest's machine type.
    pub machine_type: String,
    /// Chardevs, each with its users.
    pub chardevs: Vec<(ChardevState, FrontEndState)>,
    /// Parameters and capabilities.
    pub settings: Settings,
    /// Names given by `getfd`.
    pub named_fds: Vec<String>,
    /// The CPUID table of each vCPU, for a target that is built ahead of the state.
    pub cpuid: Vec<Blob>,
}

impl SectionType for EarlyState {
    const NAME: &'static str = "cpr-vmm/monitors";
    const VERSION: u32 = 2;
    const PREVIOUS: Option<Previous<Self>> = Some(Previous::of::<EarlyStateV1>());
}

/// Version 1 of [`EarlyState`].
#[derive(Debug, Serialize, Deserialize)]
struct EarlyStateV1 {
    chardevs: Vec<(ChardevState, FrontEndState)>,
    settings: SettingsV1,
    named_fds: Vec<String>,
    cpuid: Vec<Blob>,
}

impl SectionType for EarlyStateV1 {
    const NAME: &'static str = EarlyState::NAME;
    const VERSION: u32 = 1;
}

impl From<EarlyStateV1> for EarlyState {
    fn from(old: EarlyStateV1) -> EarlyState {
        let EarlyStateV1 { chardevs, settings, named_fds, cpuid } = old;
        let machine_type = FIRST_MACHINE_TYPE.to_owned();
        EarlyState { machine_type, chardevs, settings: settings.into(), named_fds, cpuid }
    }
}

impl TryFrom<&EarlyState> for EarlyStateV1 {
    type Error = String;

    fn try_from(new: &EarlyState) -> Result<EarlyStateV1, String> {
        is_first_machine_type(&new.machine_type)?;
        let mut users = new.chardevs.iter().flat_map(|(_, front_end)| &front_end.users);
        if users.any(|user| matches!(user, UserState::Console(_))) {
            return Err("it has no consoles".into());
        }
        Ok(EarlyStateV1 {
            chardevs: new.chardevs.clone(),
            settings: (&new.settings).into(),
            named_fds: new.named_fds.clone(),
            cpuid: new.cpuid.clone(),
        })
    }
}

/// The machine type there was when machine types had no versions, and its name then.
const FIRST_MACHINE_TYPE: &str = "microvm-0.1";
const UNVERSIONED_MACHINE_TYPE: &str = "microvm";

fn is_first_machine_type(name: &str) -> Result<(), String> {
    match name {
        FIRST_MACHINE_TYPE => Ok(()),
        other => Err(format!("it has no machine type '{other}'")),
    }
}

impl EarlyState {
    /// The modes that the terminal had before any program of this guest changed them.
    pub fn terminal(&self) -> Option<oslib::term::Termios> {
        self.chardevs.iter().find_map(|(chardev, _)| chardev.terminal())
    }
}

/// The users of one chardev.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FrontEndState {
    mux: Option<Mux>,
    users: Vec<UserState>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
enum UserState {
    Serial(Vec<u8>),
    Hmp(Option<hmp::SessionState>, u64),
    Qmp(Option<qmp::SessionState>, u64),
    Console(Vec<u8>),
}

impl UserState {
    /// How many descriptors that nobody claimed travel beside it.
    fn descriptors(&self) -> u64 {
        match self {
            UserState::Serial(_) | UserState::Console(_) => 0,
            UserState::Hmp(_, count) | UserState::Qmp(_, count) => *count,
        }
    }
}

/// Main section: what the machine is made of. Must be equal on both sides, but for the run state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MachineSection {
    /// The full name.
    machine_type: String,
    ram_bytes: u64,
    vcpus: u32,
    /// QMP's name of the run state before the update: what a guest that did not run is in afterwards.
    run_state: String,
    /// How the guest ended, if it did so after the new program had been started.
    ended: Option<GuestEnd>,
}

impl SectionType for MachineSection {
    const NAME: &'static str = "cpr-vmm/machine";
    const VERSION: u32 = 2;
    const PREVIOUS: Option<Previous<Self>> = Some(Previous::of::<MachineSectionV1>());
}

/// Version 1 of [`MachineSection`]: its machine type has no version.
#[derive(Debug, Serialize, Deserialize)]
struct MachineSectionV1 {
    machine_type: String,
    ram_bytes: u64,
    vcpus: u32,
    run_state: String,
    ended: Option<GuestEnd>,
}

impl SectionType for MachineSectionV1 {
    const NAME: &'static str = MachineSection::NAME;
    const VERSION: u32 = 1;
}

impl From<MachineSectionV1> for MachineSection {
    fn from(old: MachineSectionV1) -> MachineSection {
        let MachineSectionV1 { machine_type, ram_bytes, vcpus, run_state, ended } = old;
        let machine_type = match machine_type.as_str() {
            UNVERSIONED_MACHINE_TYPE => FIRST_MACHINE_TYPE.into(),
            // There is none, and so it is refused.
            _ => machine_type,
        };
        MachineSection { machine_type, ram_bytes, vcpus, run_state, ended }
    }
}

impl TryFrom<&MachineSection> for MachineSectionV1 {
    type Error = String;

    fn try_from(new: &MachineSection) -> Result<MachineSectionV1, String> {
        is_first_machine_type(&new.machine_type)?;
        let MachineSection { ram_bytes, vcpus, run_state, ended, .. } = new.clone();
        let machine_type = UNVERSIONED_MACHINE_TYPE.to_owned();
        Ok(MachineSectionV1 { machine_type, ram_bytes, vcpus, run_state, ended })
    }
}

/// An end that the guest brought about, and that the new program has to carry out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum GuestEnd {
    PowerOff,
    Reset,
}

impl GuestEnd {
    fn of(exit: Option<&Exit>) -> Option<GuestEnd> {
        match exit? {
            Exit::GuestPowerOff => Some(GuestEnd::PowerOff),
            Exit::GuestReset => Some(GuestEnd::Reset),
            Exit::Quit | Exit::Signal(_) | Exit::Fatal => None,
        }
    }
}

impl MachineSection {
    fn of(config: &Config, run_state: RunState, ended: Option<GuestEnd>) -> MachineSection {
        let MachineShape { machine_type, ram_bytes, vcpus } = MachineShape::of(config);
        MachineSection { machine_type, ram_bytes, vcpus, run_state: run_state.name().into(), ended }
    }

    fn shape(&self) -> MachineShape {
        let machine_type = self.machine_type.clone();
        MachineShape { machine_type, ram_bytes: self.ram_bytes, vcpus: self.vcpus }
    }
}

/// Takes this program's early section.
///
/// # Errors
/// It is missing or damaged.
pub fn take_early_state(early: &mut Frame) -> anyhow::Result<EarlyState> {
    let section = early.require(EarlyState::NAME, 0)?;
    let state: EarlyState = formats::read(&section)?;
    // What would be looked for, one by one.
    let counts =
        state.chardevs.iter().flat_map(|(_, front_end)| &front_end.users).map(UserState::descriptors);
    if let Some(count) = counts.max().filter(|&count| count > MAX_RECEIVED_FDS as u64) {
        let reason = format!("a session has {count} descriptors, at most {MAX_RECEIVED_FDS} are kept");
        return Err(section.malformed(reason).into());
    }
    Ok(state)
}

/// What the main frame says of the guest. Values of the machine's state have not been checked yet.
#[derive(Debug)]
pub struct Arrived {
    /// What the guest is in afterwards, if it did not run.
    pub run_state: RunState,
    /// The machine.
    pub state: MachineState,
    time: Option<TimeState>,
    outside: OutsideSection,
    ended: Option<GuestEnd>,
    serial_input: Vec<u8>,
    consoles: Vec<ConsoleLine>,
}

/// What the main frame of a guest in storage says of its machine type.
///
/// # Errors
/// The section is missing or damaged.
pub(super) fn machine_type(main: &mut Frame) -> anyhow::Result<String> {
    let machine: MachineSection = formats::take(main, 0)?;
    Ok(machine.machine_type)
}

/// Takes what the main frame says of the guest.
///
/// # Errors
/// A section is missing or damaged, or the guest has another machine than `config`.
pub fn read_machine(main: &mut Frame, config: &Config) -> anyhow::Result<Arrived> {
    let machine: MachineSection = formats::take(main, 0)?;
    let run_state = match machine.run_state.as_str() {
        "prelaunch" => RunState::Prelaunch,
        _ => RunState::Paused,
    };
    machine.shape().check(&MachineShape::of(config))?;
    let devices = main.take(DevicesSection::NAME, 0).map(|section| formats::read(&section)).transpose()?;
    let DevicesSection(devices) = devices.unwrap_or_default();
    DeviceShape::check_all(&devices, &DeviceShape::all_of(config))?;
    let mut vcpus = Vec::new();
    for instance in 0..machine.vcpus {
        vcpus.push(formats::take(main, instance)?);
    }
    let state = MachineState {
        vm: formats::take(main, 0)?,
        vcpus,
        serial: formats::take(main, 0)?,
        platform: formats::take(main, 0)?,
    };
    let time = main.take(TimeState::NAME, 0).map(|section| read_time(&section, machine.vcpus)).transpose()?;
    let outside = formats::take(main, 0)?;
    let serial_input = main.take(SerialInput::NAME, 0).map(|section| formats::read(&section)).transpose()?;
    let SerialInput(serial_input) = serial_input.unwrap_or_default();
    let mut consoles = Vec::new();
    while let Some(section) = main.take(ConsoleLine::NAME, u32::try_from(consoles.len())?) {
        consoles.push(formats::read(&section)?);
    }
    Ok(Arrived { run_state, state, time, outside, ended: machine.ended, serial_input, consoles })
}

fn read_time(section: &Section, vcpus: u32) -> anyhow::Result<TimeState> {
    let time: TimeState = formats::read(section)?;
    if time.vcpus.len() != vcpus as usize {
        return Err(section.malformed(format!("{} vCPUs of {vcpus}", time.vcpus.len())).into());
    }
    Ok(time)
}

/// Registry name of descriptors that came to a monitor and that no command claimed yet.
fn received_fd(chardev: &str) -> String {
    format!("received/{chardev}")
}

impl FrontEnd {
    /// Goes on with the sessions that `state` has for the same kind of user, and starts the others afresh.
    /// `connected`: the peer they talk to was taken over as well; without it they have ended. `failure`: why the update
    /// failed, for a session that waits for its end.
    pub fn restore(
        &mut self,
        chardev: &str,
        state: FrontEndState,
        registry: &FdRegistry,
        connected: bool,
        failure: Option<&str>,
    ) {
        let received = |count: u64, offset: u64| -> Vec<OwnedFd> {
            (0..count)
                .filter_map(|at| registry.find::<OwnedFd>(&received_fd(chardev), offset + at))
                .filter_map(Arc::into_inner)
                .collect()
        };
        let mut offset = 0;
        for (user, state) in self.users.iter_mut().zip(state.users) {
            match (user, state) {
                (User::Serial(waiting), UserState::Serial(bytes))
                | (User::Console(_, waiting), UserState::Console(bytes)) => *waiting = bytes.into(),
                _ if !connected => {}
                (User::Hmp(session), UserState::Hmp(saved, fds)) => {
                    *session = saved.map(|saved| {
                        let mut session = hmp::Session::restore(saved, received(fds, offset));
                        // The update it waited for is what brought it here.
                        session.resume(match failure {
                            None => Ok(serde_json::Value::Null),
                            Some(error) => Err(QmpError::generic(error)),
                        });
                        Box::new(session)
                    });
                    offset += fds;
                }
                (User::Qmp(session), UserState::Qmp(saved, fds)) => {
                    *session =
                        saved.map(|saved| Box::new(qmp::Session::restore(saved, received(fds, offset))));
                    offset += fds;
                }
                _ => {}
            }
        }
        if let (Some(mux), Some(saved)) = (&mut self.mux, state.mux) {
            *mux = Mux::restore(saved, u8::try_from(self.users.len()).unwrap_or(u8::MAX));
        }
    }
}

/// Keeps the descriptors of a session in the registry until the update is over; says how many.
fn save_received<'a>(
    fds: impl Iterator<Item = std::os::fd::BorrowedFd<'a>>,
    chardev: &str,
    offset: &mut u64,
    registry: &FdRegistry,
    kept: &mut Vec<Arc<OwnedFd>>,
) -> anyhow::Result<u64> {
    let mut count = 0;
    for fd in fds {
        let fd = Arc::new(fd.try_clone_to_owned()?);
        registry.save(&received_fd(chardev), *offset, FdKind::Other, FdPolicy::MayBeRebuilt, &fd)?;
        kept.push(fd);
        *offset += 1;
        count += 1;
    }
    Ok(count)
}

impl App {
    fn early_state(&mut self) -> anyhow::Result<EarlyState> {
        let registry = &self.parts.services.registry;
        let mut kept = Vec::new();
        let mut chardevs = Vec::new();
        for (at, (chardev, front_end)) in self.parts.chardevs.iter().zip(&self.parts.front_ends).enumerate() {
            if self.moves_out && !self.travels(at) {
                continue;
            }
            let mut offset = 0;
            let mut users = Vec::new();
            for user in &front_end.users {
                users.push(match user {
                    // Read on until the guest is stopped, if the target is built meanwhile by another process.
                    User::Serial(_) if self.moves_out => UserState::Serial(Vec::new()),
                    User::Serial(waiting) => UserState::Serial(waiting.iter().copied().collect()),
                    User::Console(..) if self.moves_out => UserState::Console(Vec::new()),
                    User::Console(_, waiting) => UserState::Console(waiting.iter().copied().collect()),
                    User::Hmp(session) => {
                        let fds = session.iter().flat_map(|s| s.received_fds());
                        let fds = save_received(fds, chardev.identity(), &mut offset, registry, &mut kept)?;
                        UserState::Hmp(session.as_ref().map(|s| s.save()), fds)
                    }
                    User::Qmp(session) => {
                        let fds = session.iter().flat_map(|s| s.received_fds());
                        let fds = save_received(fds, chardev.identity(), &mut offset, registry, &mut kept)?;
                        UserState::Qmp(session.as_ref().map(|s| s.save()), fds)
                    }
                });
            }
            // What the guest prints is still being sent while the target is built.
            let pending = if front_end.is_guests() { Vec::new() } else { chardev.output().pending() };
            chardevs.push((chardev.save(pending), FrontEndState { mux: front_end.mux.clone(), users }));
        }
        self.saved_fds = kept;
        Ok(EarlyState {
            machine_type: self.parts.config.machine.machine_type().name().into(),
            chardevs,
            settings: self.parts.settings.clone(),
            named_fds: self.parts.named_fds.keys().cloned().collect(),
            cpuid: self.hardware()?.machine.cpuid().map(|tables| tables.to_vec()).unwrap_or_default(),
        })
    }

    fn save_sections(&mut self, main: &mut FrameWriter) -> anyhow::Result<()> {
        // Sessions have passed their output on to the chardevs by now, so that events told up to here are saved once.
        self.deliver_events();
        let machine = self.hardware()?.machine.save()?;
        let ended = GuestEnd::of(self.exit.as_ref());
        formats::put(main, 0, &MachineSection::of(&self.parts.config, self.state_before_update, ended))?;
        if !self.parts.config.devices.is_empty() {
            formats::put(main, 0, &DevicesSection(DeviceShape::all_of(&self.parts.config)))?;
        }
        formats::put(main, 0, &machine.vm)?;
        for (instance, vcpu) in machine.vcpus.iter().enumerate() {
            formats::put(main, u32::try_from(instance)?, vcpu)?;
        }
        formats::put(main, 0, &machine.serial)?;
        formats::put(main, 0, &machine.platform)?;
        self.hardware()?.machine.save_devices(main)?;
        // Sent by whoever has the guest in the end, and by nobody before.
        let held = self.guests_chardevs().map(|at| (at, self.parts.chardevs[at].output().hold()));
        self.unsent = held.collect();
        let unsent = self.serial_chardev().and_then(|at| self.unsent.get(&at)).cloned();
        let outside =
            OutsideSection { unsent: unsent.unwrap_or_default(), resets: self.untold_resets.clone() };
        formats::put(main, 0, &outside)?;
        if self.moves_out {
            formats::put(main, 0, &SerialInput(self.serial_input()))?;
        }
        for (line, instance) in self.console_lines().iter().zip(0..) {
            formats::put(main, instance, line)?;
        }
        if self.outlives_kernel {
            // The state is worth nothing without them.
            self.hardware()?.machine.settle_on_host()?;
            formats::put(main, 0, &self.hardware()?.machine.time()?)?;
        }
        Ok(())
    }

    fn load_sections(&mut self, main: &mut Frame) -> anyhow::Result<()> {
        self.hardware()?.machine.expect_state();
        let Arrived { run_state, mut state, time, outside, ended, serial_input, consoles } =
            read_machine(main, &self.parts.config)?;
        if let Some(time) = time {
            time.go_on(&mut state, &Now::read().context("the time of the guest cannot be set")?);
        }
        self.state_before_update = run_state;
        let machine = &self.hardware()?.machine;
        machine.restore(&state).context("the machine refuses the state")?;
        machine.load_devices(main).context("the machine refuses the state")?;
        self.loaded = Loaded { outside, ended, serial_input, consoles };
        self.hold_unsent();
        Ok(())
    }

    fn resume_guest(&mut self, activity: GuestActivity) -> anyhow::Result<()> {
        match activity {
            _ if self.guest_has_ended() => Ok(()),
            GuestActivity::Running => self.run_guest(),
            GuestActivity::Paused => {
                // Those that a departure has ended are looked for by monitors.
                self.hardware()?.machine.recall_threads()?;
                self.set_run_state(self.state_before_update);
                Ok(())
            }
        }
    }

    /// What is on its way through the chardevs of consoles, whose output is held.
    fn console_lines(&self) -> Vec<ConsoleLine> {
        let serial = self.serial_chardev();
        let mut lines = Vec::new();
        for at in self.guests_chardevs() {
            let identity = self.parts.chardevs[at].identity();
            let unsent = self.unsent.get(&at).filter(|_| serial != Some(at)).cloned().unwrap_or_default();
            let unsent = once(unsent).chain(repeat(Vec::new()));
            for (input, unsent) in self.parts.front_ends[at].console_inputs().into_iter().zip(unsent) {
                let input = if self.moves_out { input } else { Vec::new() };
                lines.push(ConsoleLine { identity: identity.into(), unsent, input });
            }
        }
        lines
    }

    fn chardev_of(&self, line: &ConsoleLine) -> Option<usize> {
        self.parts.chardevs.iter().position(|chardev| chardev.identity() == line.identity)
    }

    /// What the guest had printed is sent as soon as it is ours, and before everything that it prints here.
    fn hold_unsent(&self) {
        let hold = |at: usize, unsent: &[u8]| {
            let output = self.parts.chardevs[at].output();
            output.hold();
            output.write_first(unsent);
        };
        let Loaded { outside, consoles, .. } = &self.loaded;
        if let Some(at) = self.serial_chardev() {
            hold(at, &outside.unsent);
        }
        for line in consoles {
            match self.chardev_of(line) {
                Some(at) => hold(at, &line.unsent),
                None => tracing::warn!(
                    chardev = line.identity,
                    "a console has lost its chardev, and what was on its way there"
                ),
            }
        }
    }

    /// Another program has the guest, and sends what it had printed.
    fn forget_unsent(&mut self) {
        let Loaded { outside, consoles, .. } = std::mem::take(&mut self.loaded);
        let forget = |at: usize, unsent: &[u8]| self.parts.chardevs[at].output().release_after(unsent.len());
        if let Some(at) = self.serial_chardev() {
            forget(at, &outside.unsent);
        }
        for line in &consoles {
            if let Some(at) = self.chardev_of(line) {
                forget(at, &line.unsent);
            }
        }
    }

    fn give_console_input(&mut self, lines: Vec<ConsoleLine>) {
        let mut given = BTreeMap::new();
        for line in lines {
            if let Some(at) = self.chardev_of(&line) {
                let console: &mut usize = given.entry(at).or_default();
                self.parts.front_ends[at].give_console_input(*console, line.input);
                *console += 1;
            }
        }
    }

    /// What the guest had done to the outside when it was stopped goes on from here; the guest is ours.
    fn carry_on(&mut self) {
        let Loaded { outside, ended, serial_input, consoles } = std::mem::take(&mut self.loaded);
        self.give_serial_input(serial_input);
        self.give_console_input(consoles);
        self.untold_resets = outside.resets;
        self.tell_resets();
        if let Some(ended) = ended {
            self.exit.get_or_insert(match ended {
                GuestEnd::PowerOff => Exit::GuestPowerOff,
                GuestEnd::Reset => Exit::GuestReset,
            });
        }
    }

    /// Loads the update that this program was started for, from `channel` or from where the source wrote it, and
    /// runs the guest.
    ///
    /// # Errors
    /// The guest cannot be taken over. It is stopped, and its state is untouched.
    pub fn take_over(&mut self, channel: Option<Channel>) -> anyhow::Result<()> {
        let mut arriving = self.parts.arriving.take().ok_or_else(|| anyhow!("no update is coming in"))?;
        let result = arriving.main(channel).map_err(|error| IncomingError::Read(error.into()));
        let result = result.and_then(|mut main| arriving.incoming.load(self, &mut *main));
        let result = result.and_then(|()| {
            let vcpus = self.parts.config.cpus.into();
            self.progress.control = Some(arriving.incoming.control().clone());
            if arriving.incoming.activity() == GuestActivity::Running {
                self.parts.observer.arm_for_entries(arriving.incoming.control().clone(), vcpus);
            }
            // From the commit on there is no way back, and the guest runs.
            self.parts.sandbox.enter().map_err(|error| IncomingError::Load(error.into()))?;
            arriving.incoming.commit(self)
        });
        if let Err(error) = result {
            // After the commit nobody else has the guest, so nobody is told so.
            if !matches!(error, IncomingError::Resume(_)) {
                self.forget_unsent();
                arriving.refuse(&errors::text(&error));
            }
            return Err(error.into());
        }
        self.progress.mode = Some(arriving.incoming.mode().id.to_string());
        self.progress.preflight_refusal = arriving.incoming.preflight_refusal().map(str::to_owned);
        let failure = arriving.failure().map(str::to_owned);
        let Arriving { from, mut incoming } = arriving;
        // First of all: whoever waits for this competes with the guest for a CPU until it knows.
        let keeper = match from {
            Predecessor::Exec { rest, .. } => rest.keeper,
            Predecessor::Transfer(source) => {
                if let Err(error) = source.release() {
                    tracing::warn!(%error, "the source could not be told");
                }
                self.guest_moved_in();
                None
            }
            Predecessor::Storage(state) => {
                // From now on, and not before: until here the file is all that there is of the guest.
                if let Err(error) = state.mark_used() {
                    tracing::warn!("{}", errors::text(&error));
                }
                self.guest_moved_in();
                None
            }
        };
        self.carry_on();
        if let Some(keeper) = keeper {
            if let Err(error) = keeper.release() {
                tracing::warn!(%error, "the keeper could not be released");
            }
            self.keeper = Some((Arc::new(keeper), incoming));
        } else {
            incoming.released();
        }
        self.progress.status = if failure.is_some() { Status::Failed } else { Status::Completed };
        self.progress.error = failure;
        self.emit_migration_event();
        // Input that came along goes to the guest at once.
        self.resumed = true;
        Ok(())
    }

    pub(super) fn migrate_incoming(&mut self, channel: Channel) -> Result<Reply, QmpError> {
        if self.parts.listening.is_some() {
            check_transfer_channel(&channel)?;
            // As soon as there is a source.
            self.parts.config.incoming = Some(Incoming::Channel(channel));
            return Ok(Reply::empty());
        }
        if self.parts.in_storage {
            return self.fetch_command(channel);
        }
        let Some(arriving) = &self.parts.arriving else {
            return Err(QmpError::generic(
                "'-incoming' was not specified on the command line, or the state is loaded already",
            ));
        };
        if let Predecessor::Transfer(_) = arriving.from {
            check_transfer_channel(&channel)?;
        }
        self.take_over(Some(channel)).map_err(|error| self.cannot_take_over(&error))?;
        Ok(Reply::empty())
    }

    /// This program cannot run the guest; once its user has been answered, another one will.
    pub(super) fn cannot_take_over(&mut self, error: &anyhow::Error) -> QmpError {
        let text = errors::text(error.as_ref());
        eprintln!("cpr-vmm: {text}");
        self.exit.get_or_insert(Exit::Fatal);
        QmpError::generic(text)
    }
}

impl Host for App {
    fn memory(&self) -> Vec<MemoryRegion> {
        let Ok(Hardware { memory, .. }) = self.hardware() else { return Vec::new() };
        let config = memory.config();
        let backing = match (memory.in_place_obstacle(), memory.stays_at()) {
            (None, None) => Backing::Shared { name: config.id.clone(), id: 0 },
            (None, Some(path)) => Backing::File { name: config.id.clone(), id: 0, path },
            (Some(_), _) => Backing::Private,
        };
        vec![MemoryRegion { name: config.id.clone(), len: config.size, backing }]
    }

    fn manifest(&self, _: &ModeInfo) -> Option<Manifest> {
        Some(self.show_machine())
    }

    fn activity(&self) -> GuestActivity {
        if self.parts.run_state == RunState::Running { GuestActivity::Running } else { GuestActivity::Paused }
    }

    fn stop(&mut self, deadline: Instant) -> Result<GuestActivity, BoxError> {
        if !self.stop_told {
            self.progress.status = Status::Active;
            self.emit_migration_event();
        }
        self.state_before_update = self.parts.run_state;
        let ran =
            self.pause_guest(RunState::FinishMigrate, deadline.saturating_duration_since(Instant::now()))?;
        // What the guest asked for just before it stood still is known to this program only: a reset is carried out
        // and travels as state; after a power-off or a failure there is nothing to hand over.
        self.handle_vcpu_events();
        if self.departed && GuestEnd::of(self.exit.as_ref()).is_some() {
            // The process that the user knows is the target's, so it has to end in the guest's way.
            return Ok(GuestActivity::Paused);
        }
        if self.guest_has_ended() {
            return Err("the guest powered off, reset or failed while it was being stopped".into());
        }
        Ok(if ran { GuestActivity::Running } else { GuestActivity::Paused })
    }

    fn resume(&mut self, activity: GuestActivity) -> Result<(), BoxError> {
        self.saved_fds.clear();
        self.unsent.clear();
        self.stop_told = false;
        // Input that has waited goes to the guest at once.
        self.resumed = true;
        let resumed = self.resume_guest(activity);
        // Not before, as it takes its time; what the guest prints meanwhile comes behind.
        for at in self.guests_chardevs() {
            self.parts.chardevs[at].output().release();
        }
        Ok(resumed?)
    }

    fn save_early(&mut self, mode: &ModeInfo, early: &mut FrameWriter) -> Result<(), BoxError> {
        if !mode.properties.contains(Properties::DESCRIPTORS_SURVIVE) {
            // Sessions and connections end with this program.
            return Ok(());
        }
        let state = self.early_state()?;
        // What is saved next is saved while the guest stands still.
        oslib::memory::warm_allocator(room_for_state(&self.parts.config));
        Ok(formats::put(early, 0, &state)?)
    }

    fn save(&mut self, main: &mut FrameWriter) -> Result<(), BoxError> {
        self.progress.status = Status::Device;
        self.emit_migration_event();
        Ok(self.save_sections(main)?)
    }

    fn state_len_hint(&self) -> usize {
        state_len(self.parts.config.cpus.into(), self.parts.config.devices.len())
    }

    fn before_departure(&mut self) -> Result<(), BoxError> {
        self.say_farewell();
        Ok(())
    }

    fn depart(&mut self) -> Result<(), BoxError> {
        Ok(self.rest_threads()?)
    }

    fn departed(&mut self) -> Result<(), BoxError> {
        Ok(self.become_keeper()?)
    }

    fn load(&mut self, main: &mut Frame) -> Result<(), BoxError> {
        Ok(self.load_sections(main)?)
    }

    fn request_terminal(&mut self, action: TerminalAction) {
        self.terminal = Some(action);
    }
}

/// The descriptors that `getfd` named in the source.
pub fn find_named_fds(names: &[String], registry: &FdRegistry) -> BTreeMap<String, Arc<OwnedFd>> {
    names.iter().filter_map(|name| Some((name.clone(), registry.find(&named_fd(name), 0)?))).collect()
}

#[cfg(test)]
mod version_tests;

#[cfg(test)]
mod tests {
    use cpr_core::frame::FrameWriter;
    use vmm_core::virtio::console::HostEnd;

    use super::*;

    #[test]
    fn a_session_with_more_descriptors_than_it_can_have_is_refused() {
        type Users = Vec<UserState>;
        let users: [fn(u64) -> Users; 2] =
            [|count| vec![UserState::Hmp(None, count)], |count| vec![UserState::Qmp(None, count)]];
        for users in users {
            for (count, good) in [(16, true), (17, false), (u64::MAX, false)] {
                let chardev = ("stdio", true, b"".to_vec(), None::<()>);
                let state = (
                    "microvm-0.1",
                    vec![(chardev, (None::<Mux>, users(count)))],
                    Settings::default(),
                    [""; 0].to_vec(),
                    Vec::<Blob>::new(),
                );
                let mut early = FrameWriter::default();
                early.put_value(EarlyState::NAME, 0, 2, &state).unwrap();
                let result = take_early_state(&mut Frame::parse(&early.finish(1)).unwrap());
                let expected = format!(
                    "state section 'cpr-vmm/monitors' instance 0 is malformed: a session has {count} descriptors, at \
                     most 16 are kept"
                );
                assert_eq!(result.err().map(|error| error.to_string()), (!good).then_some(expected));
            }
        }
    }

    #[test]
    fn input_that_a_console_has_no_room_for_goes_on_with_it() {
        let end = HostEnd::new().unwrap();
        let mut front_end = FrontEnd { users: vec![User::Console(end, Default::default())], mux: None };
        assert!(front_end.is_guests_only() && front_end.consoles() == 1);
        let state = FrontEndState { mux: None, users: vec![UserState::Console(b"later".to_vec())] };
        front_end.restore("null:c", state, &FdRegistry::default(), false, None);
        assert!(matches!(&front_end.users[..], [User::Console(_, waiting)] if waiting == b"later"));
    }

    #[test]
    fn input_for_each_of_two_consoles_goes_on_with_its_own() {
        let console = || User::Console(HostEnd::new().unwrap(), Default::default());
        let users = || vec![console(), User::Serial(Default::default()), console()];
        let mut from = FrontEnd { users: users(), mux: None };
        from.give_console_input(0, b"first".to_vec());
        from.give_console_input(1, b"second".to_vec());
        let mut to = FrontEnd { users: users(), mux: None };
        // Read here in the meantime.
        to.give_console_input(1, b", and later".to_vec());
        for (console, input) in from.console_inputs().into_iter().enumerate() {
            to.give_console_input(console, input);
        }
        assert_eq!(to.console_inputs(), [b"first".to_vec(), b"second, and later".to_vec()]);
        // Of a console that there is not here.
        to.give_console_input(2, b"nobody's".to_vec());
        assert_eq!(to.console_inputs().concat().len(), 22);
    }

    #[test]
    fn a_guest_with_consoles_does_not_go_to_the_release_before() {
        let early = |users: Vec<UserState>| {
            let chardev = ("null:c", true, b"".to_vec(), None::<()>);
            let state = (
                "microvm-0.1",
                vec![(chardev, (None::<Mux>, users))],
                Settings::default(),
                [""; 0].to_vec(),
                Vec::<Blob>::new(),
            );
            let mut early = FrameWriter::default();
            early.put_value(EarlyState::NAME, 0, 2, &state).unwrap();
            take_early_state(&mut Frame::parse(&early.finish(1)).unwrap()).unwrap()
        };
        assert!(EarlyStateV1::try_from(&early(vec![UserState::Serial(Vec::new())])).is_ok());
        let error = EarlyStateV1::try_from(&early(vec![UserState::Console(Vec::new())])).unwrap_err();
        assert_eq!(error, "it has no consoles");
    }
}
