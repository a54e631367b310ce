//! The commands, typed, and the one table that parses, lists and dispatches QMP's names for them.
//!
//! Arguments are checked here as far as their form goes; whether a mode exists or a file can be written is for the
//! [`Backend`](super::Backend) to say.

use serde_json::{Map, Value};

use super::args::Args;
use super::{Channel, Channels, QmpError};

/// A command for the machine. The doc of each variant says what QMP returns for it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Command {
    /// `query-status`: `{"status": "running", "running": true}`.
    QueryStatus,
    /// `query-kvm`: `{"enabled": true, "present": true}`.
    QueryKvm,
    /// `query-name`: `{"name": ...}`, or `{}` without one.
    QueryName,
    /// `query-uuid`: `{"UUID": ...}`.
    QueryUuid,
    /// `query-cpus-fast`: a list of `{"cpu-index", "thread-id", "qom-path", "target"}`.
    QueryCpusFast,
    /// `query-chardev`: a list of `{"label", "filename", "frontend-open"}`.
    QueryChardev,
    /// `query-memdev`: a list of `{"id", "size", "share", "merge", "dump", "prealloc", "policy", "host-nodes"}`.
    QueryMemdev,
    /// `query-block`: a list of `{"device", "qdev", "type", "removable", "locked", "inserted"}`.
    QueryBlock,
    /// `query-pci`: a list of `{"bus", "devices"}`, of which each is `{"bus", "slot", "function", "qdev_id", "id", "model"}`.
    QueryPci,
    /// HMP's `info network`: a list of `{"name", "model", "mac", "queues", "netdev", "peer"}`. It has no name in QMP.
    QueryNetwork,
    /// `stop`.
    Stop,
    /// `cont`.
    Cont,
    /// `quit`.
    Quit,
    /// `system_reset`.
    SystemReset,
    /// `migrate`.
    Migrate {
        /// Where the state goes, and descriptors.
        channels: Channels,
        /// Whether the reply comes at once (always so from QMP) or, by [`Reply::Suspended`](super::Reply), at the
        /// end.
        detach: bool,
    },
    /// `migrate-incoming`.
    MigrateIncoming {
        /// Where the state comes from.
        channel: Channel,
    },
    /// `migrate_cancel`.
    MigrateCancel,
    /// `query-migrate`: see [`hmp`](super::hmp) for the keys that are printed.
    QueryMigrate,
    /// `migrate-set-parameters`.
    MigrateSetParameters(MigrationParameters),
    /// `query-migrate-parameters`: an object with a member for each of [`PARAMETERS`].
    QueryMigrateParameters,
    /// `migrate-set-capabilities`.
    MigrateSetCapabilities(Vec<CapabilityState>),
    /// `query-migrate-capabilities`: a list of `{"capability", "state"}`.
    QueryMigrateCapabilities,
    /// `getfd`: gives the oldest of the origin's received descriptors a name.
    GetFd {
        /// Its name; never starts with a digit, never empty.
        name: String,
    },
    /// `closefd`: closes a descriptor that `getfd` named.
    CloseFd {
        /// Its name.
        name: String,
    },
}

/// Migration parameters to set; what is `None` stays as it is.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct MigrationParameters {
    /// Name of the mode. Which names exist is for the backend to say.
    pub mode: Option<String>,
    /// Program and arguments of the next VMM. An empty list unsets it.
    pub cpr_exec_command: Option<Vec<String>>,
    /// Milliseconds that the next VMM may go without progress before it has the guest; 0 for no limit.
    pub cpr_exec_timeout: Option<u64>,
    /// Milliseconds that it may wait for a `migrate-incoming`; 0 for no limit.
    pub cpr_defer_timeout: Option<u64>,
    /// Whether the next VMM is asked beforehand, and what its refusal means: the name of a [policy](cpr_core::preflight::Policy).
    pub cpr_preflight: Option<String>,
    /// Whether the old VMM runs the guest, in a keeper, until the next one has it. For comparison only, hence the `x-`.
    pub x_cpr_exec_keeper: Option<bool>,
}

/// Names of the migration parameters, as QMP and HMP know them.
pub const PARAMETERS: &[&str] = &[
    "mode",
    "cpr-exec-command",
    "cpr-exec-timeout",
    "cpr-defer-timeout",
    "cpr-preflight",
    "x-cpr-exec-keeper",
];

/// A migration capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Capability {
    /// `events`: send a `MIGRATION` event at every change of status.
    Events,
    /// `x-ignore-shared`: a mode that would copy guest RAM leaves what is shared where it is.
    IgnoreShared,
}

impl Capability {
    /// Every capability there is.
    pub const ALL: &[Self] = &[Self::Events, Self::IgnoreShared];

    /// The name users know it by.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::IgnoreShared => "x-ignore-shared",
        }
    }

    /// The capability of that name.
    ///
    /// # Errors
    ///
    /// No such capability; the error names those that exist.
    pub fn from_name(name: &str) -> Result<Self, QmpError> {
        Self::ALL.iter().copied().find(|capability| capability.name() == name).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|capability| capability.name()).collect();
            QmpError::generic(format!(
                "Parameter 'capability' does not accept value '{name}' (known: {})",
                known.join(", ")
            ))
        })
    }
}

/// A capability and whether it is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CapabilityState {
    /// Which one.
    pub capability: Capability,
    /// On or off.
    pub state: bool,
}

/// A QMP request with its arguments understood: for the machine, or for the session itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    Machine(Command),
    Capabilities { enable: Vec<String> },
    QueryVersion,
    QueryCommands,
    HumanMonitor { line: String },
}

/// One QMP command: its name, and what makes a request of its arguments.
pub(crate) struct QmpCommand {
    pub(crate) name: &'static str,
    parse: fn(&mut Args) -> Result<Request, QmpError>,
}

/// Table row of a command without arguments.
macro_rules! plain {
    ($name:literal, $variant:ident) => {
        QmpCommand { name: $name, parse: |_| Ok(Request::Machine(Command::$variant)) }
    };
}

/// Every QMP command. `query-commands` lists it, and a request reaches its handler through nothing else.
pub(crate) const COMMANDS: &[QmpCommand] = &[
    QmpCommand {
        name: "qmp_capabilities",
        parse: |args| Ok(Request::Capabilities { enable: args.optional("enable")?.unwrap_or_default() }),
    },
    QmpCommand { name: "query-version", parse: |_| Ok(Request::QueryVersion) },
    QmpCommand { name: "query-commands", parse: |_| Ok(Request::QueryCommands) },
    QmpCommand { name: "human-monitor-command", parse: human_monitor_command },
    plain!("query-status", QueryStatus),
    plain!("query-kvm", QueryKvm),
    plain!("query-name", QueryName),
    plain!("query-uuid", QueryUuid),
    plain!("query-cpus-fast", QueryCpusFast),
    plain!("query-chardev", QueryChardev),
    plain!("query-memdev", QueryMemdev),
    plain!("query-block", QueryBlock),
    plain!("query-pci", QueryPci),
    plain!("stop", Stop),
    plain!("cont", Cont),
    plain!("quit", Quit),
    plain!("system_reset", SystemReset),
    QmpCommand { name: "migrate", parse: migrate },
    QmpCommand { name: "migrate-incoming", parse: migrate_incoming },
    plain!("migrate_cancel", MigrateCancel),
    plain!("query-migrate", QueryMigrate),
    QmpCommand { name: "migrate-set-parameters", parse: migrate_set_parameters },
    plain!("query-migrate-parameters", QueryMigrateParameters),
    QmpCommand { name: "migrate-set-capabilities", parse: migrate_set_capabilities },
    plain!("query-migrate-capabilities", QueryMigrateCapabilities),
    QmpCommand { name: "getfd", parse: getfd },
    QmpCommand { name: "closefd", parse: closefd },
];

/// Makes a request of a command's name and arguments.
pub(crate) fn parse(name: &str, arguments: Map<String, Value>) -> Result<Request, QmpError> {
    let command = COMMANDS
        .iter()
        .find(|command| command.name == name)
        .ok_or_else(|| QmpError::not_found(format!("The command {name} has not been found")))?;
    let mut args = Args::new(arguments, "");
    let request = (command.parse)(&mut args)?;
    args.finish()?;
    Ok(request)
}

fn human_monitor_command(args: &mut Args) -> Result<Request, QmpError> {
    let line = args.required("command-line")?;
    // No command of ours depends on a current CPU, so any is as good as another.
    args.optional::<u64>("cpu-index")?;
    Ok(Request::HumanMonitor { line })
}

fn channels(args: &mut Args, command: &str) -> Result<Channels, QmpError> {
    let uri: Option<String> = args.optional("uri")?;
    let channels: Option<Vec<Value>> = args.optional("channels")?;
    match (uri, channels) {
        (Some(uri), None) => Channel::from_uri(&uri).map(|main| Channels { main, cpr: None }),
        (None, Some(channels)) => Channels::from_json_list(channels, "channels"),
        _ => {
            return Err(QmpError::generic(format!(
                "'{command}' needs exactly one of the arguments 'uri' and 'channels'"
            )));
        }
    }
    .map_err(|error| QmpError::generic(error.to_string()))
}

fn migrate(args: &mut Args) -> Result<Request, QmpError> {
    let channels = channels(args, "migrate")?;
    // QMP's migrate returns at once whatever `detach` says; QEMU documents it as without effect.
    args.optional::<bool>("detach")?;
    Ok(Request::Machine(Command::Migrate { channels, detach: true }))
}

fn migrate_incoming(args: &mut Args) -> Result<Request, QmpError> {
    match channels(args, "migrate-incoming")? {
        Channels { main: channel, cpr: None } => Ok(Request::Machine(Command::MigrateIncoming { channel })),
        // As QEMU: by then descriptors have to be there.
        Channels { cpr: Some(_), .. } => {
            Err(QmpError::generic("Channel list must have only one entry, for type 'main'"))
        }
    }
}

fn migrate_set_parameters(args: &mut Args) -> Result<Request, QmpError> {
    Ok(Request::Machine(Command::MigrateSetParameters(MigrationParameters {
        mode: args.optional("mode")?,
        cpr_exec_command: args.optional("cpr-exec-command")?,
        cpr_exec_timeout: args.optional("cpr-exec-timeout")?,
        cpr_defer_timeout: args.optional("cpr-defer-timeout")?,
        cpr_preflight: args.optional("cpr-preflight")?,
        x_cpr_exec_keeper: args.optional("x-cpr-exec-keeper")?,
    })))
}

fn migrate_set_capabilities(args: &mut Args) -> Result<Request, QmpError> {
    let list: Vec<Map<String, Value>> = args.required("capabilities")?;
    let mut states = Vec::with_capacity(list.len());
    for (index, entry) in list.into_iter().enumerate() {
        let mut entry = Args::new(entry, &format!("capabilities[{index}]"));
        let name: String = entry.required("capability")?;
        let state = entry.required("state")?;
        entry.finish()?;
        states.push(CapabilityState { capability: Capability::from_name(&name)?, state });
    }
    Ok(Request::Machine(Command::MigrateSetCapabilities(states)))
}

/// Checks the name of a descriptor: one that starts with a digit could be taken for a number.
pub(crate) fn fd_name(name: String) -> Result<String, QmpError> {
    if name.is_empty() || name.starts_with(|first: char| first.is_ascii_digit()) {
        return Err(QmpError::generic("Parameter 'fdname' expects a name not starting with a digit"));
    }
    Ok(name)
}

fn getfd(args: &mut Args) -> Result<Request, QmpError> {
    Ok(Request::Machine(Command::GetFd { name: fd_name(args.required("fdname")?)? }))
}

fn closefd(args: &mut Args) -> Result<Request, QmpError> {
    Ok(Request::Machine(Command::CloseFd { name: args.required("fdname")? }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::monitor::ErrorClass;

    fn request(name: &str, arguments: Value) -> Result<Request, QmpError> {
        let Value::Object(arguments) = arguments else { panic!("not an object") };
        parse(name, arguments)
    }

    fn error(name: &str, arguments: Value) -> String {
        request(name, arguments).unwrap_err().desc
    }

    #[test]
    fn names_are_unique() {
        for (index, command) in COMMANDS.iter().enumerate() {
            assert!(COMMANDS[..index].iter().all(|other| other.name != command.name), "{}", command.name);
        }
    }

    #[test]
    fn migrate_takes_a_uri_or_channels() {
        let to_file = |offset| {
            let channels = Channels { main: Channel::File { path: "f".into(), offset }, cpr: None };
            Ok(Request::Machine(Command::Migrate { channels, detach: true }))
        };
        assert_eq!(request("migrate", json!({"uri": "file:f", "detach": true})), to_file(0));
        let channels =
            json!([{"channel-type": "main", "addr": {"transport": "file", "filename": "f", "offset": 9}}]);
        assert_eq!(request("migrate", json!({"channels": channels})), to_file(9));
        assert!(error("migrate", json!({"uri": "file:f", "channels": channels})).contains("exactly one"));
        assert!(error("migrate", json!({})).contains("exactly one"));
        assert!(error("migrate", json!({"uri": "rdma:x"})).contains("'rdma'"));
        assert!(error("migrate", json!({"uri": 3})).contains("'uri', expected: string"));
    }

    #[test]
    fn parameters_are_typed_and_named() {
        assert_eq!(
            request("migrate-set-parameters", json!({"mode": "cpr-exec", "cpr-exec-command": ["a", "b c"]})),
            Ok(Request::Machine(Command::MigrateSetParameters(MigrationParameters {
                mode: Some("cpr-exec".into()),
                cpr_exec_command: Some(vec!["a".into(), "b c".into()]),
                ..MigrationParameters::default()
            })))
        );
        let text = error("migrate-set-parameters", json!({"downtime-limit": 3}));
        assert_eq!(
            text,
            "Parameter 'downtime-limit' is unexpected (known: mode, cpr-exec-command, cpr-exec-timeout, \
             cpr-defer-timeout, cpr-preflight, x-cpr-exec-keeper)"
        );
        assert!(
            error("migrate-set-parameters", json!({"cpr-exec-command": "a"})).contains("array of strings")
        );
    }

    #[test]
    fn capabilities_are_checked() {
        let list = json!({"capabilities": [{"capability": "events", "state": true}]});
        assert_eq!(
            request("migrate-set-capabilities", list),
            Ok(Request::Machine(Command::MigrateSetCapabilities(vec![CapabilityState {
                capability: Capability::Events,
                state: true
            }])))
        );
        let text = error(
            "migrate-set-capabilities",
            json!({"capabilities": [{"capability": "xbzrle", "state": true}]}),
        );
        assert!(text.contains("'xbzrle'") && text.contains("events"), "{text}");
        let text = error("migrate-set-capabilities", json!({"capabilities": [{"capability": "events"}]}));
        assert_eq!(text, "Parameter 'capabilities[0].state' is missing");
    }

    #[test]
    fn descriptors_are_named() {
        assert_eq!(
            request("getfd", json!({"fdname": "tap"})),
            Ok(Request::Machine(Command::GetFd { name: "tap".into() }))
        );
        assert!(error("getfd", json!({"fdname": "3x"})).contains("digit"));
        assert_eq!(error("closefd", json!({})), "Parameter 'fdname' is missing");
    }

    #[test]
    fn unknown_commands_and_arguments() {
        let failure = request("blah", json!({})).unwrap_err();
        assert_eq!(failure.class, ErrorClass::CommandNotFound);
        assert_eq!(error("stop", json!({"x": 1})), "Parameter 'x' is unexpected (known: none)");
    }
}
