//! What this program shows of its machine before an update, and what it looks for in the machine of another one: whether it
//! could take that over with its own command line. Nothing of the guest's is opened for it.

use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use cpr_core::frame::FrameError;
use cpr_core::preflight::{self, Manifest, SectionCatalogue, Verdict};
use cpr_core::section::SectionType;
use cpr_exec::MainChannel;
use cpr_exec::PreflightRequest;
use serde::{Deserialize, Serialize};
use vmm_core::kvm::{self, Capabilities};
use vmm_core::machine::Machine;
use vmm_core::state::{PlatformState, SerialState, VcpuState, VmState};
use vmm_core::virtio::Backing;

use super::device_shape::{DeviceShape, DevicesSection};
use super::host::{ConsoleLine, EarlyState, MachineSection, OutsideSection, SerialInput};
use super::{App, FrontEnd};
use crate::chardev;
use crate::cli::config::{Config, DeviceConfig, Incoming, MemoryBackend, MemoryConfig};
use crate::cli::{self, Invocation};
use crate::devices;
use crate::errors;
use crate::formats;
use crate::migration::exec_channel;
use crate::sandbox;
use crate::startup::{self, DEFAULT_HUGE_PAGE};

/// A section's name, and the versions in which this program reads it and can write it.
type Row = (&'static str, RangeInclusive<u32>);

fn row<T: SectionType>() -> Row {
    (T::NAME, formats::versions::<T>())
}

/// Sections that are always written.
fn sections() -> [Row; 7] {
    [
        row::<EarlyState>(),
        row::<MachineSection>(),
        row::<VmState>(),
        row::<VcpuState>(),
        row::<SerialState>(),
        row::<PlatformState>(),
        row::<OutsideSection>(),
    ]
}

/// The one that is written if the machine has PCI devices.
fn devices() -> Row {
    row::<DevicesSection>()
}

/// The one that is written if the guest moves to another process.
fn moving() -> Row {
    row::<SerialInput>()
}

/// Bytes of an ordinary page.
const PAGE_BYTES: u64 = 4096;

/// What must be equal on both sides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MachineShape {
    pub(super) machine_type: String,
    pub(super) ram_bytes: u64,
    pub(super) vcpus: u32,
}

/// The host's part of a manifest, in version 2: of a machine with PCI devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct MachineManifest {
    shape: MachineShape,
    ram: RamManifest,
    /// By slot.
    devices: Vec<DeviceShape>,
    /// What is behind some of them, with their slots.
    backings: Vec<(u8, Backing)>,
}

/// Version 1, of a machine without: what it was when there were none, so that the release before can judge it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct MachineManifestV1 {
    shape: MachineShape,
    ram: RamManifest,
}

impl MachineManifest {
    fn of(config: &Config, backings: Vec<(u8, Backing)>) -> MachineManifest {
        let (shape, ram) = (MachineShape::of(config), RamManifest::of(&config.memory));
        MachineManifest { shape, ram, devices: DeviceShape::all_of(config), backings }
    }

    fn put_into(self, manifest: Manifest) -> Manifest {
        if !self.devices.is_empty() {
            return manifest.host(2, &self);
        }
        let MachineManifest { shape, ram, .. } = self;
        manifest.host(1, &MachineManifestV1 { shape, ram })
    }

    fn find_in(manifest: &Manifest) -> Result<MachineManifest, FrameError> {
        if manifest.host_version() == 1 {
            let MachineManifestV1 { shape, ram } = manifest.decode_host(1)?;
            return Ok(MachineManifest { shape, ram, devices: Vec::new(), backings: Vec::new() });
        }
        manifest.decode_host(2)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct RamManifest {
    /// Id of the memory backend.
    id: String,
    is_memfd: bool,
    page_bytes: u64,
}

impl MachineShape {
    pub(super) fn of(config: &Config) -> MachineShape {
        MachineShape {
            machine_type: config.machine.machine_type().name().into(),
            ram_bytes: config.memory.size_bytes,
            vcpus: config.cpus.into(),
        }
    }

    /// Whether a guest of this shape fits into a program of that one.
    pub(super) fn check(&self, own: &MachineShape) -> anyhow::Result<()> {
        ensure!(
            self.machine_type == own.machine_type,
            "the guest's machine type is '{}', this program has '{}'",
            self.machine_type,
            own.machine_type
        );
        let (ram, own_ram) = (self.ram_bytes, own.ram_bytes);
        ensure!(ram == own_ram, "the guest has {ram} bytes of RAM, the command line says {own_ram}");
        let (vcpus, own_vcpus) = (self.vcpus, own.vcpus);
        ensure!(vcpus == own_vcpus, "the guest has {vcpus} vCPUs, the command line says {own_vcpus}");
        Ok(())
    }
}

impl RamManifest {
    fn of(config: &MemoryConfig) -> RamManifest {
        let (is_memfd, page_bytes) = match &config.backend {
            MemoryBackend::Memfd { hugetlb, .. } => {
                (true, hugetlb.map_or(PAGE_BYTES, |pages| pages.page_bytes.unwrap_or(DEFAULT_HUGE_PAGE)))
            }
            MemoryBackend::Ram { .. } => (true, PAGE_BYTES),
            MemoryBackend::File { .. } => (false, PAGE_BYTES),
        };
        RamManifest { id: config.id.clone(), is_memfd, page_bytes }
    }

    /// Whether this RAM can be adopted as the memory backend `own`, as `vmm_core::memory::Backend::adopt` will see it.
    fn check(&self, own: &MemoryConfig) -> anyhow::Result<()> {
        ensure!(
            self.id == own.id,
            "the guest's RAM is memory backend '{}', the command line has '{}'; it must name the memory backend as the \
             previous program's did",
            self.id,
            own.id
        );
        let (MemoryBackend::Memfd { share, .. }
        | MemoryBackend::File { share, .. }
        | MemoryBackend::Ram { share }) = own.backend;
        ensure!(share, "memory backend '{}': share=on is required to take over the guest's RAM", own.id);
        let expected = RamManifest::of(own);
        ensure!(
            self.is_memfd || !expected.is_memfd,
            "the guest's RAM is a file, the command line has a memory backend '{}' of another kind; use \
             memory-backend-file",
            own.id
        );
        ensure!(
            !expected.is_memfd || self.page_bytes == expected.page_bytes,
            "the guest's RAM has pages of {} bytes, memory backend '{}' of {}; see its hugetlb and hugetlbsize",
            self.page_bytes,
            own.id,
            expected.page_bytes
        );
        Ok(())
    }
}

impl App {
    /// What the next program is shown.
    pub(super) fn show_machine(&self) -> Manifest {
        // Looked at as the update began; one that was lost since is the next program's to find.
        let backings = self.backings().unwrap_or_default();
        let mut manifest = manifest_with(&self.parts.config, self.moves_out, backings);
        let machine = self.hardware().map(|hardware| &hardware.machine);
        for (instance, (name, versions)) in machine.map(Machine::device_sections).unwrap_or_default() {
            manifest = manifest.section(name, instance, versions);
        }
        let consoles = self.parts.front_ends.iter().map(FrontEnd::consoles).sum();
        let (name, versions) = row::<ConsoleLine>();
        (0..consoles).fold(manifest, |manifest, instance| manifest.section(name, instance, versions.clone()))
    }
}

/// The manifest of a machine with this configuration, without what only its devices know: their sections, and what is behind
/// them; `moves_out`: its guest moves to another process.
pub fn manifest_of(config: &Config, moves_out: bool) -> Manifest {
    manifest_with(config, moves_out, Vec::new())
}

fn manifest_with(config: &Config, moves_out: bool, backings: Vec<(u8, Backing)>) -> Manifest {
    let mut manifest = MachineManifest::of(config, backings).put_into(Manifest::default());
    let devices = (!config.devices.is_empty()).then(devices);
    for (name, versions) in sections().into_iter().chain(devices).chain(moves_out.then(moving)) {
        let instances = if name == VcpuState::NAME { config.cpus.into() } else { 1 };
        for instance in 0..instances {
            manifest = manifest.section(name, instance, versions.clone());
        }
    }
    manifest
}

/// Whether a program with this command line could take over, here, what `manifest` shows; `catalogue` has what the mode reads.
pub fn judge(config: &Config, manifest: &Manifest, catalogue: SectionCatalogue) -> Verdict {
    let kernel = check_kvm(config)
        .and_then(|()| devices::check_kernel(config))
        .and_then(|()| sandbox::check(config.sandbox));
    judge_shown(config, manifest, catalogue, [kernel, check_room(&config.memory)])
}

/// The same, with what was found out about this host.
pub fn judge_shown(
    config: &Config,
    manifest: &Manifest,
    mut catalogue: SectionCatalogue,
    here: [anyhow::Result<()>; 2],
) -> Verdict {
    for (name, versions) in sections() {
        catalogue = catalogue.requires(name, versions);
    }
    let optional = [self::devices(), moving(), row::<ConsoleLine>()];
    for (name, versions) in optional.into_iter().chain(devices::sections()) {
        catalogue = catalogue.reads(name, versions);
    }
    let machine = match MachineManifest::find_in(manifest) {
        Ok(machine) => machine,
        Err(error) => return catalogue.judge(manifest, [errors::text(&error)]),
    };
    // Whose id it is has a check of its own.
    catalogue = catalogue.claims(&machine.ram.id, 0);
    for (name, id) in config.devices.iter().flat_map(DeviceConfig::registry_entries) {
        catalogue = catalogue.claims(&name, id);
    }
    let checks = [
        check_shape(&machine.shape, config),
        machine.ram.check(&config.memory),
        DeviceShape::check_all(&machine.devices, &DeviceShape::all_of(config)),
        devices::check_backings(config, &machine.backings),
        check_front_ends(config),
    ];
    let obstacles = checks.into_iter().chain(here).filter_map(Result::err);
    catalogue.judge(manifest, obstacles.map(|error| errors::text(error.as_ref())))
}

/// Whether the guest fits into the machine that this command line makes of it.
fn check_shape(guest: &MachineShape, config: &Config) -> anyhow::Result<()> {
    let mut config = config.clone();
    config.machine.adopt(&guest.machine_type).map_err(anyhow::Error::msg)?;
    devices::check_bus(&config)?;
    guest.check(&MachineShape::of(&config))
}

/// What would be found wrong with character devices when they are opened, without opening them.
fn check_front_ends(config: &Config) -> anyhow::Result<()> {
    let consoles = devices::Consoles::new(config)?;
    for chardev in &config.chardevs {
        chardev::identity(chardev)?;
        startup::front_end(chardev, config, &consoles)?;
    }
    Ok(())
}

fn check_kvm(config: &Config) -> anyhow::Result<()> {
    let capabilities = Capabilities::probe(&kvm::open()?)?;
    let vcpus = usize::from(config.cpus);
    ensure!(vcpus <= capabilities.max_vcpus, "KVM has no more than {} vCPUs here", capabilities.max_vcpus);
    Ok(())
}

fn check_room(memory: &MemoryConfig) -> anyhow::Result<()> {
    let need = preflight::second_program_bytes(memory.size_bytes, RamManifest::of(memory).page_bytes);
    match preflight::lack_of_room(need) {
        Ok(Some(lacking)) => bail!(lacking),
        Ok(None) => Ok(()),
        Err(error) => {
            tracing::debug!(%error, "limits on memory are not known");
            Ok(())
        }
    }
}

/// Answers a source that will execute this program with these arguments, if they fit its guest.
///
/// # Errors
/// The answer cannot be given.
pub fn answer(
    request: PreflightRequest,
    args: impl IntoIterator<Item = std::ffi::OsString>,
) -> anyhow::Result<()> {
    let verdict = match cli::parse(args) {
        Ok(Invocation::Run(config)) => {
            let verdict = judge(&config, request.manifest(), cpr_exec::catalogue());
            let channel = check_channel(&config, request.main());
            with_reason(verdict, channel.err())
        }
        Ok(Invocation::Help(_) | Invocation::Version(_)) => {
            Verdict::Refused(vec!["its arguments ask for a text, and not to take a guest over".into()])
        }
        Err(error) => Verdict::Refused(vec![errors::text(&error)]),
    };
    request.answer(&verdict).context("the verdict cannot be given")
}

fn with_reason(verdict: Verdict, error: Option<anyhow::Error>) -> Verdict {
    let Some(error) = error else { return verdict };
    let reason = errors::text(error.as_ref());
    match verdict {
        Verdict::Accepted(_) => Verdict::Refused(vec![reason]),
        Verdict::Refused(reasons) => Verdict::Refused([reasons, vec![reason]].concat()),
    }
}

/// Whether `-incoming` leads to where the source will write: `main`.
fn check_channel(config: &Config, main: &MainChannel) -> anyhow::Result<()> {
    let Some(Incoming::Channel(channel)) = &config.incoming else { return Ok(()) };
    match (exec_channel(channel.clone())?, main) {
        (MainChannel::Memfd, MainChannel::Memfd) => Ok(()),
        (MainChannel::Memfd, MainChannel::File { path, .. }) => {
            bail!("-incoming {channel}: the state goes to file:{}; name that", path.display())
        }
        (MainChannel::File { .. }, MainChannel::Memfd) => {
            bail!("-incoming {channel}: the state goes to memfd:; name that")
        }
        (MainChannel::File { path, offset }, MainChannel::File { path: theirs, offset: their_offset }) => {
            let own = file_id(&path).with_context(|| format!("-incoming {channel}: {}", path.display()))?;
            ensure!(
                offset == *their_offset && file_id(theirs).is_ok_and(|theirs| theirs == own),
                "-incoming {channel}: the state goes to file:{},offset={their_offset}; name that",
                theirs.display()
            );
            Ok(())
        }
    }
}

fn file_id(path: &Path) -> std::io::Result<[u64; 2]> {
    let found = std::fs::metadata(path)?;
    Ok([found.dev(), found.ino()])
}

#[cfg(test)]
mod tests {
    use cpr_core::frame::{Frame, FrameWriter};
    use cpr_core::preflight::DescriptorEntry;
    use cpr_core::{FdKind, FdPolicy};

    use super::*;

    fn config(args: &str) -> Config {
        match cli::parse(args.split(' ').map(Into::into)).unwrap() {
            Invocation::Run(config) => *config,
            _ => panic!("{args}"),
        }
    }

    const MEMFD: &str = "-object memory-backend-memfd,id=ram0,size=64M -machine memory-backend=ram0";

    #[test]
    fn shapes_that_differ_are_told() {
        let own = MachineShape::of(&config(MEMFD));
        own.check(&own).unwrap();
        check_shape(&own, &config(MEMFD)).unwrap();
        let later = MachineShape { machine_type: "microvm-9.9".into(), ..own.clone() };
        let said = check_shape(&later, &config(MEMFD)).unwrap_err().to_string();
        assert!(
            said.ends_with(
                "'microvm-9.9', which this program does not have (it has: microvm-0.1, microvm-0.2)"
            ),
            "{said}"
        );
        let other = |change: fn(&mut MachineShape)| {
            let mut guest = own.clone();
            change(&mut guest);
            guest.check(&own).unwrap_err().to_string()
        };
        let said = other(|guest| guest.ram_bytes = 1);
        assert_eq!(said, "the guest has 1 bytes of RAM, the command line says 67108864");
        let said = other(|guest| guest.vcpus = 9);
        assert_eq!(said, "the guest has 9 vCPUs, the command line says 1");
        let said = other(|guest| guest.machine_type = "q35".into());
        assert_eq!(said, "the guest's machine type is 'q35', this program has 'microvm-0.2'");
    }

    #[test]
    fn ram_fits_as_it_will_be_adopted() {
        let of = |args: &str| config(args).memory;
        let ram = RamManifest::of(&of(MEMFD));
        for (own, expected) in [
            (MEMFD.to_owned(), None),
            (MEMFD.replace("memfd", "ram").replace("64M", "64M,share=on"), None),
            (MEMFD.replace("memfd", "file").replace("64M", "64M,share=on,mem-path=x"), None),
            (MEMFD.replace("ram0", "other"), Some("'ram0', the command line has 'other'")),
            (MEMFD.replace("64M", "64M,share=off"), Some("share=on is required")),
            (
                MEMFD.replace("64M", "64M,hugetlb=on"),
                Some("pages of 4096 bytes, memory backend 'ram0' of 2097152"),
            ),
        ] {
            let found = ram.check(&of(&own)).err().map(|error| error.to_string());
            assert_eq!(found.is_some(), expected.is_some(), "{own}: {found:?}");
            assert!(found.unwrap_or_default().contains(expected.unwrap_or_default()), "{own}");
        }
        let file = RamManifest { is_memfd: false, ..ram };
        let error = file.check(&of(MEMFD)).unwrap_err().to_string();
        assert!(error.contains("is a file"), "{error}");
    }

    #[test]
    fn the_channel_is_the_sources() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        std::fs::write(&path, "").unwrap();
        let file = |offset| MainChannel::File { path: path.clone(), offset };
        let check = |incoming: &str, main: &MainChannel| {
            let config = config(&format!("{MEMFD} -incoming {incoming}"));
            check_channel(&config, main).err().map(|error| format!("{error:#}"))
        };
        let uri = format!("file:{}", path.display());
        assert_eq!(check("memfd:", &MainChannel::Memfd), None);
        assert_eq!(check("defer", &file(0)), None);
        assert_eq!(check(&uri, &file(0)), None);
        for (incoming, main, expected) in [
            ("memfd:", file(0), uri.as_str()),
            (uri.as_str(), MainChannel::Memfd, "the state goes to memfd:"),
            (uri.as_str(), file(9), ",offset=9; name that"),
            ("file:/no/such/file", file(0), "No such file"),
        ] {
            let said = check(incoming, &main).unwrap();
            assert!(said.contains(expected), "{said}");
        }
        assert_eq!(check_channel(&config(MEMFD), &file(0)).map_err(|e| e.to_string()), Ok(()));
    }

    #[test]
    fn what_is_shown_can_be_taken_over_by_the_same_program() {
        let config = config(&format!("{MEMFD} -smp 3"));
        let mut frame = FrameWriter::default();
        // What the core and the mode add.
        let shown = manifest_of(&config, false).section("cpr-core/update", 0, 1..=1);
        let shown = shown.section("cpr-core/activity", 0, 1..=1).section("cpr-core/registry", 0, 1..=1);
        let shown = shown.section("cpr-exec/process", 0, 1..=1);
        shown.put_into(&mut frame).unwrap();
        let manifest = Manifest::take_from(&mut Frame::parse(&frame.finish(1)).unwrap()).unwrap();
        assert_eq!(manifest, shown);
        let judge = |here| judge_shown(&config, &manifest, cpr_exec::catalogue(), here);
        let verdict = judge([Ok(()), Ok(())]);
        assert!(matches!(verdict, Verdict::Accepted(_)), "{verdict:?}");
        let verdict = judge([Ok(()), Err(anyhow::anyhow!("no room"))]);
        assert_eq!(verdict, Verdict::Refused(vec!["no room".into()]));
        let names: Vec<_> = manifest.sections.iter().map(|section| section.name.as_str()).collect();
        assert_eq!(names.iter().filter(|name| **name == VcpuState::NAME).count(), 3);
        assert!(!names.contains(&SerialInput::NAME));
        assert_eq!(manifest_of(&config, true).sections.len(), manifest_of(&config, false).sections.len() + 1);
    }

    const DEVICES: &str = "-drive file=/i,if=none,id=d,format=raw -device virtio-blk-pci,drive=d -netdev tap,id=n,fds=3:4 \
                           -device virtio-net-pci,netdev=n";

    #[test]
    fn devices_are_shown_and_judged() {
        let source = config(&format!("{MEMFD} {DEVICES}"));
        let fd = |name: &str, id| DescriptorEntry {
            name: name.into(),
            id,
            kind: FdKind::Other,
            policy: FdPolicy::MustSurvive,
        };
        let mut shown = manifest_of(&source, false)
            .section("cpr-core/update", 0, 1..=1)
            .section("cpr-core/activity", 0, 1..=1)
            .section("cpr-core/registry", 0, 1..=1)
            .section("cpr-exec/process", 0, 1..=1);
        shown.descriptors.extend([fd("drive/d", 0), fd("netdev/n", 0), fd("netdev/n", 1)]);
        assert_eq!(shown.host_version(), 2);
        assert!(shown.sections.iter().any(|section| section.name == "cpr-vmm/devices"));
        let judge = |devices: &str| {
            let target = config(&format!("{MEMFD} {devices}"));
            judge_shown(&target, &shown, cpr_exec::catalogue(), [Ok(()), Ok(())])
        };
        assert!(matches!(judge(DEVICES), Verdict::Accepted(_)), "{:?}", judge(DEVICES));
        // Numbers of descriptors are not looked at.
        let verdict = judge(&DEVICES.replace("3:4", "9:8"));
        assert!(matches!(verdict, Verdict::Accepted(_)), "{verdict:?}");
        let Verdict::Refused(reasons) =
            judge(&DEVICES.replace("id=n,fds=3:4", "id=m,fd=3").replace("netdev=n", "netdev=m"))
        else {
            panic!()
        };
        assert!(
            reasons.contains(&"virtio-net-pci at slot 2 has netdev=n, the command line says netdev=m".into()),
            "{reasons:?}"
        );
        assert!(reasons.iter().any(|reason| reason.contains("descriptor 'netdev/n' (id 1)")), "{reasons:?}");
        let Verdict::Refused(reasons) = judge("-smp 1") else { panic!() };
        let expected = "the guest has virtio-blk-pci at slot 1, the command line has nothing there";
        assert!(reasons.contains(&expected.into()), "{reasons:?}");
    }

    #[test]
    fn a_machine_without_devices_is_shown_as_the_release_before_did() {
        let own = config(MEMFD);
        let shown = manifest_of(&own, false);
        assert_eq!(shown.host_version(), 1);
        let old: MachineManifestV1 = shown.decode_host(1).unwrap();
        assert_eq!(
            old,
            MachineManifestV1 { shape: MachineShape::of(&own), ram: RamManifest::of(&own.memory) }
        );
        assert!(shown.sections.iter().all(|section| section.name != "cpr-vmm/devices"));
        let target = config(&format!("{MEMFD} {DEVICES}"));
        let Verdict::Refused(reasons) = judge_shown(&target, &shown, cpr_exec::catalogue(), [Ok(()), Ok(())])
        else {
            panic!()
        };
        let expected = "the command line has virtio-blk-pci at slot 1, the guest has nothing there";
        assert!(reasons.contains(&expected.into()), "{reasons:?}");
    }

    #[test]
    fn a_manifest_of_another_host_is_refused() {
        let mut frame = FrameWriter::default();
        Manifest::default().host(7, &1u8).put_into(&mut frame).unwrap();
        let manifest = Manifest::take_from(&mut Frame::parse(&frame.finish(1)).unwrap()).unwrap();
        let Verdict::Refused(reasons) =
            judge_shown(&config(MEMFD), &manifest, cpr_exec::catalogue(), [Ok(()), Ok(())])
        else {
            panic!()
        };
        let last = reasons.last().unwrap();
        assert!(last.contains("'the machine in cpr-core/manifest' has version 7"), "{last}");
        assert!(reasons.iter().any(|reason| reason.contains("'kvm/vcpu' is missing")), "{reasons:?}");
    }
}
