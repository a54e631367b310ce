//! What the agent in the guest prints.

use std::collections::BTreeMap;

use anyhow::Context;

/// A line `agent: NAME VERDICT key=value ...`.
pub struct Report {
    /// The whole line.
    pub line: String,
    values: BTreeMap<String, i64>,
}

impl Report {
    /// Finds the report of the watch `name` in what was printed.
    ///
    /// # Errors
    /// There is none.
    pub fn parse(text: &str, name: &str) -> anyhow::Result<Report> {
        let start = format!("agent: {name} ");
        let found = text.lines().find_map(|line| {
            let rest = line.strip_prefix(&start)?;
            (!rest.starts_with("begin")).then_some(rest)
        });
        let rest = found.with_context(|| format!("no report of {name}: {text:?}"))?;
        let pairs = rest.split_whitespace().filter_map(|word| word.split_once('='));
        let values = pairs.filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?))).collect();
        Ok(Report { line: format!("{start}{rest}"), values })
    }

    /// A value of it.
    ///
    /// # Errors
    /// It has no such key.
    pub fn get(&self, key: &str) -> anyhow::Result<i64> {
        self.values.get(key).copied().with_context(|| format!("no {key} in {:?}", self.line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_is_found_behind_the_announcement() {
        let text = "agent: timer begin seconds=3\nnoise\nagent: timer ok wakeups=12 missed=-1 word=x\n";
        let report = Report::parse(text, "timer").unwrap();
        assert_eq!(report.line, "agent: timer ok wakeups=12 missed=-1 word=x");
        assert_eq!((report.get("wakeups").unwrap(), report.get("missed").unwrap()), (12, -1));
        assert!(report.get("word").unwrap_err().to_string().contains("no word"));
        assert!(Report::parse(text, "clock").is_err());
    }
}
