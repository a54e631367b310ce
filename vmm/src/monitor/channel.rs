//! Where a saved machine goes to and comes from, as the user names it: a migration URI or a migration channel.
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
const SUPPORTED: &str = "supported: file:PATH[,offset=N], memfd:";

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
}

/// Why a URI or channel cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct ChannelError(String);

impl Channel {
    /// Parses a migration URI: `file:PATH[,offset=N]` (N in bytes, with an optional size suffix) or `memfd:`.
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
            "memfd" => error(format!("'{uri}': nothing may follow 'memfd:'")),
            _ => error(format!("unknown migration protocol: '{scheme}' in '{uri}' ({SUPPORTED})")),
        }
    }

    /// Reads a list of channels in QMP's form; it must hold exactly one, of type `main`.
    ///
    /// # Errors
    ///
    /// No main channel, more than one channel, or a channel that [`from_json`](Self::from_json) refuses.
    pub fn from_json_list(channels: Vec<Value>, path: &str) -> Result<Self, ChannelError> {
        let mut found = None;
        for (index, channel) in channels.into_iter().enumerate() {
            let channel = Self::from_json(channel, &format!("{path}[{index}]"))?;
            if found.replace(channel).is_some() {
                return Err(ChannelError("Channel list has more than one main entry".into()));
            }
        }
        found.ok_or_else(|| ChannelError("Channel list has no main entry".into()))
    }

    /// Reads one channel in QMP's form,
    /// `{"channel-type": "main", "addr": {"transport": "file", "filename": ..., "offset": ...}}`.
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
        if kind != "main" {
            return Err(ChannelError(format!("channel type '{kind}' is not supported (supported: main)")));
        }
        let addr: Map<String, Value> = channel.required("addr").map_err(text)?;
        let mut addr = Args::new(addr, &channel.path_of("addr"));
        channel.finish().map_err(text)?;
        let transport: String = addr.required("transport").map_err(text)?;
        if transport != "file" {
            return Err(ChannelError(format!(
                "transport '{transport}' is not supported (supported: file; or the URI memfd:)"
            )));
        }
        let filename: String = addr.required("filename").map_err(text)?;
        let offset = addr.optional("offset").map_err(text)?.unwrap_or(0);
        addr.finish().map_err(text)?;
        if filename.is_empty() || filename.contains('\0') {
            return Err(ChannelError("the filename of a file channel must not be empty".into()));
        }
        Ok(Self::File { path: filename.into(), offset })
    }
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, offset: 0 } => write!(f, "file:{}", path.display()),
            Self::File { path, offset } => write!(f, "file:{},offset={offset}", path.display()),
            Self::Memfd => f.write_str("memfd:"),
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
        ] {
            let error = Channel::from_uri(uri).unwrap_err().to_string();
            assert!(error.contains(needle), "{uri}: {error}");
        }
    }

    #[test]
    fn uri_round_trip() {
        for uri in ["file:vm.state", "file:/x,offset=4096", "memfd:"] {
            assert_eq!(Channel::from_uri(uri).unwrap().to_string(), uri);
        }
    }

    #[test]
    fn channels() {
        let main =
            json!({"channel-type": "main", "addr": {"transport": "file", "filename": "f", "offset": 8}});
        assert_eq!(Channel::from_json_list(vec![main.clone()], "channels"), Ok(file("f", 8)));
        for (list, needle) in [
            (vec![], "no main"),
            (vec![main.clone(), main], "more than one"),
            (vec![json!(1)], "channels[0]"),
            (vec![json!({"channel-type": "cpr"})], "'cpr'"),
            (vec![json!({"channel-type": "main", "addr": {"transport": "socket"}})], "'socket'"),
            (
                vec![json!({"channel-type": "main", "addr": {"transport": "file"}})],
                "channels[0].addr.filename",
            ),
            (
                vec![json!({"channel-type": "main", "addr": {"transport": "file", "filename": "f", "x": 1}})],
                "channels[0].addr.x",
            ),
        ] {
            let error = Channel::from_json_list(list, "channels").unwrap_err().to_string();
            assert!(error.contains(needle), "{error}");
        }
    }
}
