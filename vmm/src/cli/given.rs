//! The properties that one thing was given: taken one by one, with errors that name them.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use serde_json::{Map, Value};

use super::keyval::{Pair, parse_switch};
use super::options::{id, of, path};

/// Properties of which the names are known to be right.
#[derive(Debug)]
pub(super) struct Given(Vec<Pair>);

impl Given {
    /// Refuses a property that is not among `known`.
    pub(super) fn new(pairs: Vec<Pair>, known: &[&str]) -> Result<Given, String> {
        match pairs.iter().find(|pair| !known.contains(&pair.key.as_str())) {
            Some(pair) => Err(unknown_property(&pair.key, known)),
            None => Ok(Given(pairs)),
        }
    }

    /// Whether the property was given, and not taken yet.
    pub(super) fn has(&self, key: &str) -> bool {
        self.0.iter().any(|pair| pair.key == key)
    }

    /// One that was not taken.
    pub(super) fn left(&self) -> Option<&str> {
        self.0.first().map(|pair| pair.key.as_str())
    }

    /// Ends the reading of what every property was asked for: one that was not is a mistake of this program's.
    pub(super) fn finish(self) {
        debug_assert_eq!(self.left(), None, "a property that is in a table has an effect");
    }

    /// Takes a property. Of several with one name the last counts, as in QEMU.
    pub(super) fn text(&mut self, key: &str) -> Option<String> {
        let at = self.0.iter().rposition(|pair| pair.key == key)?;
        let value = std::mem::take(&mut self.0[at].value);
        self.0.retain(|pair| pair.key != key);
        Some(value)
    }

    /// Takes a property that must be there.
    pub(super) fn required(&mut self, key: &str) -> Result<String, String> {
        self.text(key).ok_or_else(|| format!("property '{key}' is missing"))
    }

    pub(super) fn id(&mut self) -> Result<Option<String>, String> {
        self.text("id").map(|value| id(&value)).transpose()
    }

    pub(super) fn path(&mut self, key: &str) -> Result<Option<PathBuf>, String> {
        self.text(key).map(|value| of(key, path(&value))).transpose()
    }

    pub(super) fn switch(&mut self, key: &str) -> Result<Option<bool>, String> {
        self.text(key).map(|value| of(key, parse_switch(&value))).transpose()
    }

    /// Takes a decimal number.
    pub(super) fn number<T>(&mut self, key: &str, range: RangeInclusive<T>) -> Result<Option<T>, String>
    where
        T: FromStr + PartialOrd + Display,
    {
        let Some(value) = self.text(key) else { return Ok(None) };
        let number = value.parse().ok().filter(|number| range.contains(number));
        number.map(Some).ok_or_else(|| {
            format!("property '{key}': '{value}' is no number from {} to {}", range.start(), range.end())
        })
    }

    /// Takes the number of entries of a queue: a power of two.
    pub(super) fn queue_size(
        &mut self,
        key: &str,
        range: RangeInclusive<u16>,
    ) -> Result<Option<u16>, String> {
        let size = self.number(key, range)?;
        match size.filter(|size| !size.is_power_of_two()) {
            Some(size) => Err(format!("property '{key}': {size} is no power of two")),
            None => Ok(size),
        }
    }

    /// Takes a property that is one of these words.
    pub(super) fn choice<T: Copy>(&mut self, key: &str, choices: &[(&str, T)]) -> Result<Option<T>, String> {
        let Some(value) = self.text(key) else { return Ok(None) };
        let found = choices.iter().find(|(word, _)| *word == value);
        found.map(|(_, choice)| Some(*choice)).ok_or_else(|| {
            let known: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
            format!("property '{key}': '{value}' is not supported (supported: {})", known.join(", "))
        })
    }

    /// Takes a property that is there for the sake of QEMU's command lines, with the only values that say what is so anyway.
    pub(super) fn only(&mut self, key: &str, values: &[&str]) -> Result<(), String> {
        let choices: Vec<_> = values.iter().map(|value| (*value, ())).collect();
        self.choice(key, &choices).map(drop)
    }
}

/// The complaint about a property that is none.
pub(super) fn unknown_property(key: &str, known: &[&str]) -> String {
    format!("unknown property '{key}' (known: {})", known.join(", "))
}

/// The properties in JSON form. Objects inside an object are written as QEMU does on a command line, with dots.
pub(super) fn json_pairs(text: &str) -> Result<Vec<Pair>, String> {
    let members: Map<String, Value> = serde_json::from_str(text).map_err(|why| format!("bad JSON: {why}"))?;
    let mut pairs = Vec::new();
    flatten("", members, &mut pairs)?;
    Ok(pairs)
}

fn flatten(prefix: &str, members: Map<String, Value>, pairs: &mut Vec<Pair>) -> Result<(), String> {
    for (key, value) in members {
        let key = format!("{prefix}{key}");
        let value = match value {
            Value::String(text) => text,
            Value::Bool(state) => if state { "on" } else { "off" }.into(),
            Value::Number(number) => number.to_string(),
            Value::Object(members) => {
                flatten(&format!("{key}."), members, pairs)?;
                continue;
            }
            Value::Null | Value::Array(_) => {
                return Err(format!("property '{key}': neither text, number nor true or false"));
            }
        };
        pairs.push(Pair { key, value });
    }
    Ok(())
}

/// What there is, for a message about what there is not.
pub(super) fn known<'a>(ids: impl Iterator<Item = &'a str>) -> String {
    let ids: Vec<_> = ids.collect();
    if ids.is_empty() { "none".into() } else { ids.join(", ") }
}
