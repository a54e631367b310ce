//! HMP's commands: the table that parses, lists, completes and dispatches them.
//!
//! Each is a form of a QMP command and goes through the same backend. Words, aliases and complaints are QEMU's
//! (`hmp-commands.hx`, `monitor/hmp.c`), the help texts our own.

use serde_json::Value;

use super::print;
use crate::monitor::command::{self, Capability, CapabilityState, Command, MigrationParameters, PARAMETERS};
use crate::monitor::{Backend, Channel, Channels, Origin, QmpError, Reply, SocketAddress};

/// Whether a command is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Done,
    /// The session waits for the command's end.
    Suspended,
}

/// One argument of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arg {
    /// `-x`, on or off.
    Flag(char),
    /// A word, perhaps in double quotes.
    Word(Words),
    /// A word that may be left out.
    OptionalWord(Words),
    /// The rest of the line as it stands.
    Rest(Words),
}

/// What kind of word an argument takes, for completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Words {
    Any,
    Command,
    Topic,
    Parameter,
    ParameterValue,
    Capability,
    OnOff,
    Channel,
}

/// One command.
pub(super) struct HmpCommand {
    /// The name, then its aliases.
    pub(super) names: &'static [&'static str],
    /// The arguments as help shows them.
    params: &'static str,
    help: &'static str,
    pub(super) args: &'static [Arg],
    run: fn(&mut Context<'_, '_>, &Arguments) -> Result<Flow, QmpError>,
}

/// One topic of `info`.
pub(super) struct Topic {
    pub(super) name: &'static str,
    help: &'static str,
    query: Command,
    print: fn(&Value) -> String,
}

/// The arguments of one line: flags that are set, and words in order.
#[derive(Debug, Default)]
struct Arguments {
    flags: Vec<char>,
    words: Vec<String>,
}

impl Arguments {
    fn word(&self, index: usize) -> &str {
        self.words.get(index).map_or("", String::as_str)
    }
}

/// What a command works with.
struct Context<'a, 'o> {
    backend: &'a mut dyn Backend,
    origin: &'a mut Origin<'o>,
    can_wait: bool,
    out: String,
}

impl Context<'_, '_> {
    fn execute(&mut self, command: Command) -> Result<Flow, QmpError> {
        match self.backend.execute(command, self.origin)? {
            Reply::Suspended if self.can_wait => Ok(Flow::Suspended),
            Reply::Suspended | Reply::Value(_) => Ok(Flow::Done),
        }
    }
}

/// Table row of a command without arguments.
macro_rules! plain {
    ($names:expr, $help:literal, $variant:ident) => {
        HmpCommand {
            names: $names,
            params: "",
            help: $help,
            args: &[],
            run: |context, _| context.execute(Command::$variant),
        }
    };
}

/// Every command.
pub(super) const COMMANDS: &[HmpCommand] = &[
    HmpCommand {
        names: &["help", "?"],
        params: "[COMMAND]",
        help: "list the commands, or explain one",
        args: &[Arg::OptionalWord(Words::Command)],
        run: help,
    },
    HmpCommand {
        names: &["info"],
        params: "[TOPIC]",
        help: "show some state of the machine; without a topic, list them",
        args: &[Arg::OptionalWord(Words::Topic)],
        run: info,
    },
    plain!(&["stop", "s"], "pause the guest", Stop),
    plain!(&["cont", "c"], "let the guest run on", Cont),
    plain!(&["system_reset"], "reset the guest, as its reset button would", SystemReset),
    HmpCommand {
        names: &["quit", "q"],
        params: "",
        help: "end cpr-vmm and the guest with it",
        args: &[],
        run: |context, _| {
            context.execute(Command::Quit)?;
            // No prompt any more: what follows on the terminal is somebody else's.
            Ok(Flow::Suspended)
        },
    },
    HmpCommand {
        names: &["migrate"],
        params: "[-d] URI [cpr=URI]",
        help: "save the machine to URI (file:PATH, memfd: or unix:PATH) and update by the mode that is set; -d: do not \
               wait for the end; cpr=unix:PATH: where the target of cpr-transfer listens",
        args: &[Arg::Flag('d'), Arg::Word(Words::Channel), Arg::OptionalWord(Words::Any)],
        run: migrate,
    },
    HmpCommand {
        names: &["migrate_incoming"],
        params: "URI",
        help: "load the machine from URI, after a start with -incoming defer",
        args: &[Arg::Word(Words::Channel)],
        run: |context, args| {
            let channel = channel(args.word(0))?;
            context.execute(Command::MigrateIncoming { channel })
        },
    },
    plain!(&["migrate_cancel"], "give up the migration under way", MigrateCancel),
    HmpCommand {
        names: &["migrate_set_parameter"],
        params: "NAME VALUE",
        help: "set a migration parameter (see info migrate_parameters); the value is the rest of the line, for \
               cpr-exec-command split as a shell would",
        args: &[Arg::Word(Words::Parameter), Arg::Rest(Words::ParameterValue)],
        run: migrate_set_parameter,
    },
    HmpCommand {
        names: &["migrate_set_capability"],
        params: "NAME on|off",
        help: "switch a migration capability (events, x-ignore-shared)",
        args: &[Arg::Word(Words::Capability), Arg::Word(Words::OnOff)],
        run: migrate_set_capability,
    },
    HmpCommand {
        names: &["getfd"],
        params: "NAME",
        help: "give the descriptor that came with this command over the monitor's socket a name",
        args: &[Arg::Word(Words::Any)],
        run: |context, args| {
            let name = command::fd_name(args.word(0).to_owned())?;
            context.execute(Command::GetFd { name })
        },
    },
    HmpCommand {
        names: &["closefd"],
        params: "NAME",
        help: "close a descriptor that getfd named",
        args: &[Arg::Word(Words::Any)],
        run: |context, args| context.execute(Command::CloseFd { name: args.word(0).to_owned() }),
    },
];

/// Every topic of `info`.
pub(super) const TOPICS: &[Topic] = &[
    Topic { name: "block", help: "the disks", query: Command::QueryBlock, print: print::disks },
    Topic {
        name: "chardev",
        help: "the character devices",
        query: Command::QueryChardev,
        print: print::chardevs,
    },
    Topic {
        name: "cpus",
        help: "the vCPUs and their threads",
        query: Command::QueryCpusFast,
        print: print::cpus,
    },
    Topic { name: "kvm", help: "whether KVM is in use", query: Command::QueryKvm, print: print::kvm },
    Topic { name: "memdev", help: "the memory backends", query: Command::QueryMemdev, print: print::memdevs },
    Topic {
        name: "migrate",
        help: "the last migration: status, times, blackout by phase",
        query: Command::QueryMigrate,
        print: print::migrate,
    },
    Topic {
        name: "migrate_capabilities",
        help: "the migration capabilities",
        query: Command::QueryMigrateCapabilities,
        print: print::capabilities,
    },
    Topic {
        name: "migrate_parameters",
        help: "the migration parameters",
        query: Command::QueryMigrateParameters,
        print: print::parameters,
    },
    Topic { name: "name", help: "the guest's name", query: Command::QueryName, print: print::name },
    Topic {
        name: "network",
        help: "the network interfaces",
        query: Command::QueryNetwork,
        print: print::networks,
    },
    Topic { name: "pci", help: "the PCI devices", query: Command::QueryPci, print: print::pci },
    Topic {
        name: "status",
        help: "whether the guest runs, and why not",
        query: Command::QueryStatus,
        print: print::status,
    },
    Topic { name: "uuid", help: "the guest's UUID", query: Command::QueryUuid, print: print::uuid },
];

/// The one topic that needs no backend.
pub(super) const VERSION_TOPIC: (&str, &str) = ("version", "the version of cpr-vmm");

/// Finds a command by name or alias.
pub(super) fn find(name: &str) -> Option<&'static HmpCommand> {
    COMMANDS.iter().find(|command| command.names.contains(&name))
}

/// Carries out one line; returns what it prints, and whether it goes on.
pub(super) fn run(
    line: &str,
    backend: &mut dyn Backend,
    origin: &mut Origin<'_>,
    can_wait: bool,
) -> (String, Flow) {
    let line = line.trim();
    if line.is_empty() {
        return (String::new(), Flow::Done);
    }
    let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let Some(command) = find(name) else {
        return (format!("unknown command: '{name}'\n"), Flow::Done);
    };
    let args = match parse(command.args, rest) {
        Ok(args) => args,
        Err(complaint) => {
            return (format!("{name}: {complaint}\nTry \"help {name}\" for more information\n"), Flow::Done);
        }
    };
    let mut context = Context { backend, origin, can_wait, out: String::new() };
    match (command.run)(&mut context, &args) {
        Ok(flow) => (context.out, flow),
        Err(error) => (context.out + &print::error(&error), Flow::Done),
    }
}

/// Splits what follows a command's name into its arguments.
fn parse(args: &[Arg], mut rest: &str) -> Result<Arguments, String> {
    let mut parsed = Arguments::default();
    let flags: Vec<char> =
        args.iter().filter_map(|arg| if let Arg::Flag(flag) = arg { Some(*flag) } else { None }).collect();
    rest = rest.trim_start();
    while !flags.is_empty()
        && let Some(option) = rest.strip_prefix('-')
    {
        let end = option.find(char::is_whitespace).unwrap_or(option.len());
        match option[..end].chars().find(|flag| !flags.contains(flag)) {
            Some(flag) => return Err(format!("unsupported option -{flag}")),
            None if end == 0 => return Err("unsupported option -".into()),
            None => parsed.flags.extend(option[..end].chars()),
        }
        rest = option[end..].trim_start();
    }
    for arg in args {
        match arg {
            Arg::Flag(_) => {}
            Arg::OptionalWord(_) if rest.is_empty() => {}
            Arg::Word(_) | Arg::Rest(_) if rest.is_empty() => return Err("string expected".into()),
            Arg::Word(_) | Arg::OptionalWord(_) => {
                let (word, after) = take_word(rest)?;
                parsed.words.push(word);
                rest = after.trim_start();
            }
            Arg::Rest(_) => parsed.words.push(std::mem::take(&mut rest).to_owned()),
        }
    }
    if rest.is_empty() { Ok(parsed) } else { Err("extraneous characters at the end of line".into()) }
}

/// Takes a word: up to the next blank, or in double quotes with backslash escapes.
fn take_word(text: &str) -> Result<(String, &str), String> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(char::is_whitespace).unwrap_or(text.len());
        return Ok((text[..end].to_owned(), &text[end..]));
    };
    let mut word = String::new();
    let mut chars = quoted.char_indices();
    while let Some((index, char)) = chars.next() {
        match char {
            '"' => return Ok((word, &quoted[index + 1..])),
            '\\' => match chars.next() {
                Some((_, 'n')) => word.push('\n'),
                Some((_, 'r')) => word.push('\r'),
                Some((_, char @ ('\\' | '\'' | '"'))) => word.push(char),
                Some((_, char)) => return Err(format!("unsupported escape code: '\\{char}'")),
                None => break,
            },
            char => word.push(char),
        }
    }
    Err("unterminated string".into())
}

fn channel(uri: &str) -> Result<Channel, QmpError> {
    Channel::from_uri(uri).map_err(|error| QmpError::generic(error.to_string()))
}

fn cpr_channel(word: &str) -> Result<SocketAddress, QmpError> {
    let uri = word.strip_prefix("cpr=").ok_or_else(|| {
        QmpError::generic(format!("'{word}' is not expected; after the main channel comes cpr=unix:PATH"))
    })?;
    SocketAddress::from_uri(uri).map_err(|error| QmpError::generic(error.to_string()))
}

fn help(context: &mut Context<'_, '_>, args: &Arguments) -> Result<Flow, QmpError> {
    let name = args.word(0);
    if name == "info" {
        return info(context, &Arguments::default());
    }
    let chosen = match name {
        "" => COMMANDS.iter().collect(),
        name => find(name).into_iter().collect::<Vec<_>>(),
    };
    if chosen.is_empty() {
        context.out = format!("unknown command: '{name}'\n");
    }
    for command in chosen {
        let names = command.names.join("|");
        context.out += &format!("{names} {} -- {}\n", command.params, command.help);
    }
    Ok(Flow::Done)
}

fn info(context: &mut Context<'_, '_>, args: &Arguments) -> Result<Flow, QmpError> {
    let name = args.word(0);
    if name.is_empty() {
        let version = std::iter::once(VERSION_TOPIC);
        for (name, help) in TOPICS.iter().map(|topic| (topic.name, topic.help)).chain(version) {
            context.out += &format!("info {name} -- {help}\n");
        }
        return Ok(Flow::Done);
    }
    if name == VERSION_TOPIC.0 {
        context.out = print::version();
        return Ok(Flow::Done);
    }
    let Some(topic) = TOPICS.iter().find(|topic| topic.name == name) else {
        context.out = format!("unknown command: 'info {name}'\n");
        return Ok(Flow::Done);
    };
    if let Reply::Value(value) = context.backend.execute(topic.query.clone(), context.origin)? {
        context.out = (topic.print)(&value);
    }
    Ok(Flow::Done)
}

fn migrate(context: &mut Context<'_, '_>, args: &Arguments) -> Result<Flow, QmpError> {
    let main = channel(args.word(0))?;
    let cpr = match args.word(1) {
        "" => None,
        word => Some(cpr_channel(word)?),
    };
    let channels = Channels { main, cpr };
    let wait = !args.flags.contains(&'d');
    let flow = context.execute(Command::Migrate { channels, detach: !(wait && context.can_wait) })?;
    if wait && !context.can_wait {
        context.out = "terminal does not allow synchronous migration, continuing detached\n".into();
    }
    Ok(flow)
}

fn migrate_set_parameter(context: &mut Context<'_, '_>, args: &Arguments) -> Result<Flow, QmpError> {
    let mut parameters = MigrationParameters::default();
    let value = args.word(1);
    match args.word(0) {
        "mode" => parameters.mode = Some(value.to_owned()),
        "cpr-exec-command" => {
            let command = shlex::split(value).ok_or_else(|| {
                QmpError::generic(
                    "cpr-exec-command: a quotation mark is not closed, or a backslash ends the line",
                )
            })?;
            parameters.cpr_exec_command = Some(command);
        }
        "cpr-exec-timeout" => parameters.cpr_exec_timeout = Some(milliseconds("cpr-exec-timeout", value)?),
        "cpr-defer-timeout" => parameters.cpr_defer_timeout = Some(milliseconds("cpr-defer-timeout", value)?),
        "cpr-preflight" => parameters.cpr_preflight = Some(value.to_owned()),
        "x-cpr-exec-keeper" => parameters.x_cpr_exec_keeper = Some(on_or_off(value)?),
        name => {
            return Err(QmpError::generic(format!(
                "unknown migration parameter '{name}' (known: {})",
                PARAMETERS.join(", ")
            )));
        }
    }
    context.execute(Command::MigrateSetParameters(parameters))
}

fn milliseconds(name: &str, word: &str) -> Result<u64, QmpError> {
    let error = || QmpError::generic(format!("{name}: expected a number of milliseconds, not '{word}'"));
    word.parse().map_err(|_| error())
}

fn on_or_off(word: &str) -> Result<bool, QmpError> {
    match word {
        "on" => Ok(true),
        "off" => Ok(false),
        other => Err(QmpError::generic(format!("expected 'on' or 'off', not '{other}'"))),
    }
}

fn migrate_set_capability(context: &mut Context<'_, '_>, args: &Arguments) -> Result<Flow, QmpError> {
    let capability = Capability::from_name(args.word(0))?;
    let state = on_or_off(args.word(1))?;
    context.execute(Command::MigrateSetCapabilities(vec![CapabilityState { capability, state }]))
}
