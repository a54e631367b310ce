//! Completion: what the word at the cursor could become.
//!
//! The grammar is the table of commands; only the names of modes come from the backend.

use cpr_core::preflight::Policy;
use unicode_width::UnicodeWidthStr;

use super::commands::{self, Arg, COMMANDS, TOPICS, VERSION_TOPIC, Words};
use crate::monitor::Backend;
use crate::monitor::command::{Capability, PARAMETERS};

/// The word that ends the text before the cursor, and every word it could become, sorted.
pub(super) fn candidates<'a>(before: &'a str, backend: &dyn Backend) -> (&'a str, Vec<String>) {
    let before = before.trim_start();
    let split = before.rfind(char::is_whitespace).map_or(0, |index| index + 1);
    // The blank may be wider than a byte.
    let split = before.ceil_char_boundary(split);
    let (earlier, word) = before.split_at(split);
    let mut earlier = earlier.split_whitespace();
    let words = match earlier.next() {
        None => Words::Command,
        Some(name) => match commands::find(name) {
            Some(command) => kind(command.args, earlier.clone()),
            None => Words::Any,
        },
    };
    let mut found = all(words, earlier.next().unwrap_or(""), backend);
    found.retain(|candidate| candidate.starts_with(word));
    found.sort_unstable();
    (word, found)
}

/// What kind of word comes after those given.
fn kind<'a>(args: &[Arg], given: impl Iterator<Item = &'a str>) -> Words {
    let given = given.filter(|word| !word.starts_with('-')).count();
    let mut words = args.iter().filter_map(|arg| match arg {
        Arg::Flag(_) => None,
        Arg::Word(words) | Arg::OptionalWord(words) | Arg::Rest(words) => Some(*words),
    });
    words.nth(given).unwrap_or(Words::Any)
}

/// Every word of a kind; `first` is the command's first argument.
fn all(words: Words, first: &str, backend: &dyn Backend) -> Vec<String> {
    let owned = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
    match words {
        Words::Any => Vec::new(),
        // Aliases are short already, and would make every completion ambiguous.
        Words::Command => COMMANDS.iter().map(|command| command.names[0].to_owned()).collect(),
        Words::Topic => {
            TOPICS.iter().map(|topic| topic.name).chain([VERSION_TOPIC.0]).map(String::from).collect()
        }
        Words::Parameter => owned(PARAMETERS),
        Words::ParameterValue if first == "mode" => backend.migration_modes(),
        Words::ParameterValue if first == "cpr-preflight" => owned(&Policy::ALL.map(Policy::name)),
        Words::ParameterValue if first == "x-cpr-exec-keeper" => owned(&["on", "off"]),
        Words::ParameterValue => Vec::new(),
        Words::Capability => Capability::ALL.iter().map(|capability| capability.name().to_owned()).collect(),
        Words::OnOff => owned(&["on", "off"]),
        Words::Channel => owned(&["file:", "memfd:"]),
    }
}

/// Lays words out in columns, one text line per row.
pub(super) fn in_columns(words: &[String], columns: u16) -> String {
    let width = words.iter().map(|word| word.width()).max().unwrap_or(0) + 2;
    let per_row = (usize::from(columns) / width).max(1);
    let mut out = String::new();
    for row in words.chunks(per_row) {
        let row: String = row.iter().map(|word| format!("{word:<width$}")).collect();
        out += row.trim_end();
        out.push('\n');
    }
    out
}
