//! Typed access to the arguments of a QMP command, with QEMU's error texts.
//!
//! serde's own messages name types of this program; QMP clients (and people) know those of QEMU's visitors, which
//! name the argument by its full path, as in `channels[0].addr.filename`.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::monitor::QmpError;

/// A type that an argument can have.
pub(crate) trait Argument: DeserializeOwned {
    /// The type's name in an error message.
    const EXPECTED: &'static str;
}

impl Argument for String {
    const EXPECTED: &'static str = "string";
}

impl Argument for bool {
    const EXPECTED: &'static str = "boolean";
}

impl Argument for u64 {
    const EXPECTED: &'static str = "integer";
}

impl Argument for Vec<String> {
    const EXPECTED: &'static str = "array of strings";
}

impl Argument for Vec<Value> {
    const EXPECTED: &'static str = "array";
}

impl Argument for Vec<Map<String, Value>> {
    const EXPECTED: &'static str = "array of objects";
}

impl Argument for Map<String, Value> {
    const EXPECTED: &'static str = "object";
}

/// The members of one JSON object, taken out one by one; [`finish`](Args::finish) refuses what is left.
pub(crate) struct Args {
    members: Map<String, Value>,
    path: String,
    taken: Vec<&'static str>,
}

impl Args {
    /// Starts on an object that stands at `path` in its command (empty: the arguments themselves).
    pub(crate) fn new(members: Map<String, Value>, path: &str) -> Self {
        Self { members, path: path.to_owned(), taken: Vec::new() }
    }

    /// The full path of member `key`.
    pub(crate) fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Takes a member that may be absent.
    pub(crate) fn optional<T: Argument>(&mut self, key: &'static str) -> Result<Option<T>, QmpError> {
        self.taken.push(key);
        let Some(value) = self.members.remove(key) else { return Ok(None) };
        serde_json::from_value(value).map(Some).map_err(|_| {
            QmpError::generic(format!(
                "Invalid parameter type for '{}', expected: {}",
                self.path_of(key),
                T::EXPECTED
            ))
        })
    }

    /// Takes a member that must be there.
    pub(crate) fn required<T: Argument>(&mut self, key: &'static str) -> Result<T, QmpError> {
        self.optional(key)?
            .ok_or_else(|| QmpError::generic(format!("Parameter '{}' is missing", self.path_of(key))))
    }

    /// Refuses members that nobody took.
    pub(crate) fn finish(self) -> Result<(), QmpError> {
        let Some(key) = self.members.keys().next() else { return Ok(()) };
        let known = if self.taken.is_empty() { "none".to_owned() } else { self.taken.join(", ") };
        Err(QmpError::generic(format!("Parameter '{}' is unexpected (known: {known})", self.path_of(key))))
    }
}
