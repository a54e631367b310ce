//! `-netdev`: tap devices of the host by their ids.

use super::config::{MAX_QUEUES, NetdevConfig, TapConfig, VhostConfig};
use super::given::{Given, known};

/// The longest name of a network interface, in bytes: IFNAMSIZ of netdevice(7) less the closing zero.
const MAX_INTERFACE_NAME: usize = 15;

/// Understands a `-netdev`.
pub(super) fn netdev(mut given: Given) -> Result<NetdevConfig, String> {
    check_type(&given.required("type")?)?;
    let id = given.id()?.ok_or("property 'id' is missing")?;
    let in_netdev = |reason| format!("netdev '{id}': {reason}");
    let vhost = vhost(&mut given).map_err(in_netdev)?;
    let tap = tap(given).map_err(in_netdev)?;
    let config = NetdevConfig { id: id.clone(), tap, vhost };
    check_vhost(&config).map_err(in_netdev)?;
    Ok(config)
}

/// As in QEMU, descriptors alone mean on.
fn vhost(given: &mut Given) -> Result<Option<VhostConfig>, String> {
    let fds = match (given.text("vhostfd"), given.text("vhostfds")) {
        (Some(_), Some(_)) => return Err("properties 'vhostfd' and 'vhostfds' exclude each other".into()),
        (Some(fd), None) => Some(("vhostfd", vec![descriptor("vhostfd", &fd)?])),
        (None, Some(fds)) => Some(("vhostfds", descriptors("vhostfds", &fds)?)),
        (None, None) => None,
    };
    match (given.switch("vhost")?, fds) {
        (Some(false), Some((key, _))) => Err(format!("property '{key}': is of no use with vhost=off")),
        (_, Some((_, fds))) => Ok(Some(VhostConfig::Inherited { fds })),
        (Some(true), None) => Ok(Some(VhostConfig::Opened)),
        (_, None) => Ok(None),
    }
}

fn check_vhost(config: &NetdevConfig) -> Result<(), String> {
    let (queues, fds) = (config.queues(), vhost_fds(config));
    if fds.is_empty() || fds.len() == usize::from(queues) {
        return Ok(());
    }
    let found = fds.len();
    Err(format!(
        "{found} vhost descriptors for {queues} queues: pass one for each by vhostfds=N:M:... or have the program open \
         them (vhost=on)"
    ))
}

fn check_type(kind: &str) -> Result<(), String> {
    match kind {
        "tap" => Ok(()),
        _ => Err(format!(
            "network backend '{kind}' is not supported (supported: tap; whatever the host connects to a tap device \
             works through it)"
        )),
    }
}

fn tap(mut given: Given) -> Result<TapConfig, String> {
    for key in ["script", "downscript"] {
        if given.text(key).is_some_and(|script| script != "no") {
            return Err(format!(
                "property '{key}': no script is run; say {key}=no, and set the tap device up beforehand ('ip tuntap \
                 add', or hand over a descriptor by fd=)"
            ));
        }
    }
    if !given.switch("vnet_hdr")?.unwrap_or(true) {
        return Err("property 'vnet_hdr': off is not supported: packets have headers; leave it out".into());
    }
    let fds = match (given.text("fd"), given.text("fds")) {
        (Some(_), Some(_)) => return Err("properties 'fd' and 'fds' exclude each other".into()),
        (Some(fd), None) => Some(("fd", vec![descriptor("fd", &fd)?])),
        (None, Some(fds)) => Some(("fds", descriptors("fds", &fds)?)),
        (None, None) => None,
    };
    if let Some((key, fds)) = fds {
        return match ["ifname", "queues"].iter().find(|other| given.has(other)) {
            Some(other) => Err(format!("properties '{key}' and '{other}' exclude each other")),
            None => Ok(TapConfig::Inherited { fds }),
        };
    }
    let name = given.text("ifname").ok_or(
        "which tap device? Name it by ifname=NAME, or hand over its descriptors by fd=N or fds=N:M:...",
    )?;
    check_interface_name(&name).map_err(|reason| format!("property 'ifname': {reason}"))?;
    let queues = given.number("queues", 1..=MAX_QUEUES)?.unwrap_or(1);
    given.finish();
    Ok(TapConfig::Named { name, queues })
}

/// As the kernel's `dev_valid_name` has it. A `%` would make the kernel choose a name, another one each time.
fn check_interface_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > MAX_INTERFACE_NAME {
        return Err(format!("'{name}' has not 1 to {MAX_INTERFACE_NAME} bytes"));
    }
    let is_bad = |char: char| char.is_whitespace() || char.is_control() || "/:%".contains(char);
    if name == "." || name == ".." || name.contains(is_bad) {
        return Err(format!("'{name}' is no name of an interface"));
    }
    Ok(())
}

fn descriptors(key: &str, text: &str) -> Result<Vec<i32>, String> {
    let fds = text.split(':').map(|fd| descriptor(key, fd)).collect::<Result<Vec<_>, _>>()?;
    if fds.len() > usize::from(MAX_QUEUES) {
        return Err(format!("property '{key}': {} descriptors are too many (1 to {MAX_QUEUES})", fds.len()));
    }
    Ok(fds)
}

/// The number of a descriptor that is no standard one.
fn descriptor(key: &str, text: &str) -> Result<i32, String> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|fd| is_number && *fd > 2).ok_or_else(|| {
        format!("property '{key}': '{text}' is no number of a descriptor that the program was started with (3 or more)")
    })
}

/// The network backends that were defined, and who uses them.
#[derive(Debug, Default)]
pub(super) struct Netdevs(Vec<Entry>);

#[derive(Debug)]
struct Entry {
    config: NetdevConfig,
    /// How messages call what uses it.
    user: Option<String>,
}

impl Netdevs {
    /// Adds a backend. Its id must be new, and so must its descriptors.
    pub(super) fn add(&mut self, config: NetdevConfig) -> Result<(), String> {
        if self.0.iter().any(|other| other.config.id == config.id) {
            return Err(format!("id '{}' is taken by another -netdev", config.id));
        }
        let fds = inherited(&config);
        for (at, fd) in fds.iter().enumerate() {
            if fds[..at].contains(fd) {
                return Err(format!("netdev '{}': descriptor {fd} is named twice", config.id));
            }
            if let Some(other) = self.0.iter().find(|other| inherited(&other.config).contains(fd)) {
                let other = &other.config.id;
                return Err(format!("netdev '{}': descriptor {fd} is that of netdev '{other}'", config.id));
            }
        }
        self.0.push(Entry { config, user: None });
        Ok(())
    }

    /// What `user` finds under this id; nobody else may use it from now on.
    pub(super) fn take(&mut self, id: &str, user: &str) -> Result<NetdevConfig, String> {
        let Some(at) = self.0.iter().position(|entry| entry.config.id == id) else {
            let known = known(self.0.iter().map(|entry| entry.config.id.as_str()));
            return Err(format!("unknown netdev '{id}' (known: {known})"));
        };
        let entry = &mut self.0[at];
        if let Some(other) = &entry.user {
            return Err(format!("netdev '{id}' is in use by {other} already"));
        }
        entry.user = Some(user.to_owned());
        Ok(entry.config.clone())
    }

    /// The ids that nothing uses.
    pub(super) fn unused(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter(|entry| entry.user.is_none()).map(|entry| entry.config.id.as_str())
    }
}

/// The descriptors that the program was started with for this backend.
fn inherited(config: &NetdevConfig) -> Vec<i32> {
    let taps: &[i32] = match &config.tap {
        TapConfig::Inherited { fds } => fds,
        TapConfig::Named { .. } => &[],
    };
    [taps, vhost_fds(config)].concat()
}

fn vhost_fds(config: &NetdevConfig) -> &[i32] {
    match &config.vhost {
        Some(VhostConfig::Inherited { fds }) => fds,
        Some(VhostConfig::Opened) | None => &[],
    }
}
