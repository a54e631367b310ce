//! Where a saved machine goes to and comes from, as the user names it: a migration URI, or migration channels.
//!
//! Both spellings are QEMU's (`qapi/migration.json`, `docs/devel/migration/CPR.rst`). Only the transports that
//! this program carries are representable; every other one is an error that names it.

use std::fmt;
use std::path::PathBuf;

use serde_json::{Map, Value};
use thiserror::Error;

use crate::cli::keyval;
use crate::monitor::args::Args;

/// What this program can carry, for error messages.
const SUPPORTED: &str = "supported: file:PATH[,offset=N], memfd:, unix:PATH";

/// The main channel of an outgoing or incoming migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Channel {
    /// A file, from a byte offset on.
    File {
        /// Path of the file, relative to the working directory if not absolute.
        path: PathBuf,
        /// Where in the file the stream starts, in bytes.
        offset: u64,
    },
    /// Anonymous memory that the update itself hands from one program to the next; no disk is touched.
    Memfd,
    /// A unix socket, as cpr-transfer's users name the main channel. The state goes through memory that both programs
    /// share; nothing is sent over this socket, and nobody binds it.
    Unix {
        /// Its path.
        path: PathBuf,
    },
}

/// Where source and target of cpr-transfer meet: the `cpr` channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketAddress {
    /// A path that the target listens on.
    Unix(PathBuf),
    /// An open socket: its number if it was inherited, its name if it came by `getfd`.
    Fd(String),
}

/// The channels of an update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Channels {
    /// Where the state goes.
    pub main: Channel,
    /// Where descriptors go, in modes that have such a channel.
    pub cpr: Option<SocketAddress>,
}

/// One channel of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TypedChannel {
    /// `channel-type` `main`.
    Main(Channel),
    /// `channel-type` `cpr`.
    Cpr(SocketAddress),
}

/// Why a URI or channel cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct ChannelError(String);

impl Channel {
    /// Parses a migration URI: `file:PATH[,offset=N]` (N in bytes, with an optional size suffix), `memfd:` or `unix:PATH`.
    ///
    /// # Errors
    ///
    /// An unknown scheme, an empty path or a malformed offset.
    pub fn from_uri(uri: &str) -> Result<Self, ChannelError> {
        let error = |text: String| Err(ChannelError(text));
        let Some((scheme, rest)) = uri.split_once(':') else {
            return error(format!("unknown migration protocol: '{uri}' ({SUPPORTED})"));
        };
        match scheme {
            "file" => {
                let (path, offset) = match rest.rsplit_once(",offset=") {
                    Some((path, offset)) => {
                        let offset = keyval::parse_size(offset, 1)
                            .map_err(|why| ChannelError(format!("'{uri}': bad offset: {why}")))?;
                        (path, offset)
                    }
                    None => (rest, 0),
                };
                if path.is_empty() || path.contains('\0') {
                    return error(format!("'{uri}': a path must follow 'file:'"));
                }
                Ok(Self::File { path: path.into(), offset })
            }
            "memfd" if rest.is_empty() => Ok(Self::Memfd),
            "unix" => Ok(Self::Unix { path: socket_path(rest)? }),
            "memfd" => error(format!("'{uri}': nothing may follow 'memfd:'")),
            _ => error(format!("unknown migration protocol: '{scheme}' in '{uri}' ({SUPPORTED})")),
        }
    }
}

impl SocketAddress {
    /// Parses `unix:PATH` or `fd:NAME`.
    ///
    /// # Errors
    ///
    /// Another scheme, or nothing behind it.
    pub fn from_uri(uri: &str) -> Result<Self, ChannelError> {
        match uri.split_once(':') {
            Some(("unix", path)) => socket_path(path).map(Self::Unix),
            Some(("fd", name)) if !name.is_empty() => Ok(Self::Fd(name.into())),
            _ => Err(ChannelError(format!("'{uri}' is no cpr channel (supported: unix:PATH, fd:NAME)"))),
        }
    }
}

impl Channels {
    /// Reads a list of channels in QMP's form: one of type `main`, and perhaps one of type `cpr`.
    ///
    /// # Errors
    ///
    /// No main channel, two of one type, or a channel that [`TypedChannel::from_json`] refuses.
    pub fn from_json_list(channels: Vec<Value>, path: &str) -> Result<Self, ChannelError> {
        let twice = |kind| ChannelError(format!("Channel list has more than one {kind} entry"));
        let (mut main, mut cpr) = (None, None);
        for (index, channel) in channels.into_iter().enumerate() {
            let (kind, is_second) = match TypedChannel::from_json(channel, &format!("{path}[{index}]"))? {
                TypedChannel::Main(channel) => ("main", main.replace(channel).is_some()),
                TypedChannel::Cpr(address) => ("cpr", cpr.replace(address).is_some()),
            };
            if is_second {
                return Err(twice(kind));
            }
        }
        let main = main.ok_or_else(|| ChannelError("Channel list has no main entry".into()))?;
        Ok(Self { main, cpr })
    }
}

impl TypedChannel {
    /// Reads one channel in QMP's form,
    /// `{"channel-type": "main", "addr": {"transport": "file", "filename": ..., "offset": ...}}`, or with
    /// `{"transport": "socket", "type": "unix", "path": ...}`.
    ///
    /// `path` is where the value stands in its command, for error messages; it may be empty.
    ///
    /// # Errors
    ///
    /// A channel type or transport that is not carried, and a missing, unknown or mistyped member.
    pub fn from_json(channel: Value, path: &str) -> Result<Self, ChannelError> {
        let text = |error: crate::monitor::QmpError| ChannelError(error.desc);
        let Value::Object(channel) = channel else {
            return Err(ChannelError(format!("Invalid parameter type for '{path}', expected: object")));
        };
        let mut channel = Args::new(channel, path);
        let kind: String = channel.required("channel-type").map_err(text)?;
        let addr: Map<String, Value> = channel.required("addr").map_err(text)?;
        let mut addr = Args::new(addr, &channel.path_of("addr"));
        channel.finish().map_err(text)?;
        let transport: String = addr.required("transport").map_err(text)?;
        let typed = match (kind.as_str(), transport.as_str()) {
            ("main", "file") => Self::Main(file_channel(&mut addr)?),
            ("main", "socket") => match socket_address(&mut addr)? {
                SocketAddress::Unix(path) => Self::Main(Channel::Unix { path }),
                SocketAddress::Fd(_) => {
                    return Err(ChannelError("socket type 'fd' is for the cpr channel only".into()));
                }
            },
            ("cpr", "socket") => Self::Cpr(socket_address(&mut addr)?),
            ("cpr", _) => return Err(ChannelError("bad cpr channel address; must be unix".into())),
            ("main", _) => {
                return Err(ChannelError(format!(
                    "transport '{transport}' is not supported (supported: file, socket; or the URI memfd:)"
                )));
            }
            _ => {
                return Err(ChannelError(format!(
                    "channel type '{kind}' is not supported (supported: main, cpr)"
                )));
            }
        };
        addr.finish().map_err(text)?;
        Ok(typed)
    }
}

fn file_channel(addr: &mut Args) -> Result<Channel, ChannelError> {
    let text = |error: crate::monitor::QmpError| ChannelError(error.desc);
    let filename: String = addr.required("filename").map_err(text)?;
    let offset = addr.optional("offset").map_err(text)?.unwrap_or(0);
    if filename.is_empty() || filename.contains('\0') {
        return Err(ChannelError("the filename of a file channel must not be empty".into()));
    }
    Ok(Channel::File { path: filename.into(), offset })
}

fn socket_address(addr: &mut Args) -> Result<SocketAddress, ChannelError> {
    let text = |error: crate::monitor::QmpError| ChannelError(error.desc);
    let kind: String = addr.required("type").map_err(text)?;
    match kind.as_str() {
        "unix" => {
            let path: String = addr.required("path").map_err(text)?;
            Ok(SocketAddress::Unix(socket_path(&path)?))
        }
        "fd" => Ok(SocketAddress::Fd(addr.required("str").map_err(text)?)),
        _ => Err(ChannelError(format!("socket type '{kind}' is not supported (supported: unix, fd)"))),
    }
}

/// The most bytes of a socket's path: sun_path of unix(7) has 108, one of them the closing zero.
const MAX_SOCKET_PATH: usize = 107;

fn socket_path(path: &str) -> Result<PathBuf, ChannelError> {
    if path.is_empty() || path.contains('\0') {
        return Err(ChannelError("the path of a socket must not be empty".into()));
    }
    if path.len() > MAX_SOCKET_PATH {
        return Err(ChannelError(format!("socket path '{path}' is longer than {MAX_SOCKET_PATH} bytes")));
    }
    Ok(path.into())
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, offset: 0 } => write!(f, "file:{}", path.display()),
            Self::File { path, offset } => write!(f, "file:{},offset={offset}", path.display()),
            Self::Memfd => f.write_str("memfd:"),
            Self::Unix { path } => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn file(path: &str, offset: u64) -> Channel {
        Channel::File { path: path.into(), offset }
    }

    #[test]
    fn uris() {
        assert_eq!(Channel::from_uri("file:vm.state"), Ok(file("vm.state", 0)));
        assert_eq!(Channel::from_uri("file:/a,b,offset=0x1000"), Ok(file("/a,b", 0x1000)));
        assert_eq!(Channel::from_uri("file:x,offset=4K"), Ok(file("x", 4096)));
        assert_eq!(Channel::from_uri("memfd:"), Ok(Channel::Memfd));
        for (uri, needle) in [
            ("tcp:host:1", "'tcp'"),
            ("exec:cat", "'exec'"),
            ("vm.state", "'vm.state'"),
            ("file:", "path"),
            ("file:x,offset=q", "offset"),
            ("memfd:3", "memfd:"),
            ("unix:", "path of a socket"),
        ] {
            let error = Channel::from_uri(uri).unwrap_err().to_string();
            assert!(error.contains(needle), "{uri}: {error}");
        }
    }

    #[test]
    fn uri_round_trip() {
        for uri in ["file:vm.state", "file:/x,offset=4096", "memfd:", "unix:/run/main.sock"] {
            assert_eq!(Channel::from_uri(uri).unwrap().to_string(), uri);
        }
    }

    #[test]
    fn channels() {
        let main =
            json!({"channel-type": "main", "addr": {"transport": "file", "filename": "f", "offset": 8}});
        let cpr =
            json!({"channel-type": "cpr", "addr": {"transport": "socket", "type": "unix", "path": "c"}});
        let by_fd = json!({"channel-type": "cpr", "addr": {"transport": "socket", "type": "fd", "str": "x"}});
        let read = |list| Channels::from_json_list(list, "channels");
        assert_eq!(read(vec![main.clone()]), Ok(Channels { main: file("f", 8), cpr: None }));
        let to = |cpr| Ok(Channels { main: file("f", 8), cpr: Some(cpr) });
        assert_eq!(read(vec![cpr.clone(), main.clone()]), to(SocketAddress::Unix("c".into())));
        assert_eq!(read(vec![main.clone(), by_fd]), to(SocketAddress::Fd("x".into())));
        for (list, needle) in [
            (vec![], "no main"),
            (vec![cpr.clone()], "no main"),
            (vec![main.clone(), main.clone()], "more than one main"),
            (vec![cpr.clone(), main, cpr], "more than one cpr"),
            (vec![json!(1)], "channels[0]"),
            (vec![json!({"channel-type": "data", "addr": {"transport": "file"}})], "'data'"),
            (vec![json!({"channel-type": "cpr", "addr": {"transport": "file"}})], "must be unix"),
            (vec![json!({"channel-type": "main", "addr": {"transport": "rdma"}})], "'rdma'"),
            (vec![json!({"channel-type": "cpr", "addr": {"transport": "socket", "type": "inet"}})], "'inet'"),
            (
                vec![json!({"channel-type": "cpr", "addr": {"transport": "socket", "type": "unix"}})],
                "channels[0].addr.path",
            ),
            (
                vec![json!({"channel-type": "main", "addr": {"transport": "file"}})],
                "channels[0].addr.filename",
            ),
            (
                vec![json!({"channel-type": "main", "addr": {"transport": "file", "filename": "f", "x": 1}})],
                "channels[0].addr.x",
            ),
        ] {
            let error = read(list).unwrap_err().to_string();
            assert!(error.contains(needle), "{error}");
        }
    }

    #[test]
    fn cpr_uris() {
        assert_eq!(SocketAddress::from_uri("unix:/c"), Ok(SocketAddress::Unix("/c".into())));
        assert_eq!(SocketAddress::from_uri("fd:x"), Ok(SocketAddress::Fd("x".into())));
        let long = format!("unix:/{}", "x".repeat(107));
        for uri in ["unix:", "fd:", "tcp:x:1", "c", &long] {
            SocketAddress::from_uri(uri).unwrap_err();
        }
    }
}
