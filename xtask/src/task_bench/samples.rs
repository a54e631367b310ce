//! Reads back what criterion has kept of a run: `*/new/benchmark.json` and `*/new/sample.json` below its folder.

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use serde_json::Value;
use testkit::median;

/// The samples of one benchmark.
#[derive(Debug, Clone)]
pub(super) struct Figure {
    group: String,
    function: String,
    value: String,
    /// Time of one iteration, sorted; never empty.
    times: Vec<Duration>,
}

impl Figure {
    fn read(folder: &Path) -> Result<Option<Figure>> {
        let json = |name: &str| -> Result<Value> {
            let path = folder.join(name);
            let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            serde_json::from_slice(&bytes).with_context(|| format!("{} is no JSON", path.display()))
        };
        let (benchmark, sample) = (json("benchmark.json")?, json("sample.json")?);
        let text = |key: &str| benchmark[key].as_str().unwrap_or_default().to_owned();
        let numbers = |key: &str| sample[key].as_array().into_iter().flatten().filter_map(Value::as_f64);
        let mut times: Vec<Duration> = numbers("times")
            .zip(numbers("iters"))
            .filter(|&(_, iterations)| iterations > 0.0)
            .map(|(ns, iterations)| Duration::from_secs_f64(ns / iterations / 1e9))
            .collect();
        times.sort_unstable();
        let figure = Figure {
            group: text("group_id"),
            function: text("function_id"),
            value: text("value_str"),
            times,
        };
        Ok((!figure.times.is_empty()).then_some(figure))
    }

    pub(super) fn group(&self) -> &str {
        &self.group
    }

    pub(super) fn function(&self) -> &str {
        &self.function
    }

    pub(super) fn name(&self) -> String {
        let parts = [&self.group, &self.function, &self.value];
        parts.into_iter().filter(|part| !part.is_empty()).cloned().collect::<Vec<_>>().join("/")
    }

    pub(super) fn count(&self) -> usize {
        self.times.len()
    }

    pub(super) fn median(&self) -> Duration {
        median(self.times.iter().copied())
    }

    pub(super) fn worst(&self) -> Duration {
        self.times.last().copied().unwrap_or_default()
    }

    /// Distance of the quartiles, as a part of the median.
    pub(super) fn spread(&self) -> f64 {
        let at = |quarters: usize| self.times[(self.times.len() - 1) * quarters / 4].as_secs_f64();
        (at(3) - at(1)) / self.median().as_secs_f64()
    }
}

/// What one run measured.
#[derive(Debug, Default)]
pub(super) struct Results {
    figures: Vec<Figure>,
}

impl Results {
    /// Reads every benchmark below `home` that was measured since `begin`.
    pub(super) fn read(home: &Path, begin: SystemTime) -> Result<Results> {
        let mut results = Results::default();
        results.add(home, begin)?;
        // As people count: 256 MiB before 1024 MiB.
        results.figures.sort_by_cached_key(|figure| {
            (figure.group.clone(), figure.function.clone(), number(&figure.value), figure.value.clone())
        });
        Ok(results)
    }

    fn add(&mut self, folder: &Path, begin: SystemTime) -> Result<()> {
        let Ok(entries) = std::fs::read_dir(folder) else { return Ok(()) };
        for entry in entries {
            let path = entry?.path();
            if !path.is_dir() {
                continue;
            }
            if path.ends_with("new") {
                let sample = path.join("sample.json");
                if sample.metadata().and_then(|meta| meta.modified()).is_ok_and(|at| at >= begin) {
                    self.figures.extend(Figure::read(&path)?);
                }
            } else {
                self.add(&path, begin)?;
            }
        }
        Ok(())
    }

    pub(super) fn figures(&self) -> impl Iterator<Item = &Figure> {
        self.figures.iter()
    }

    /// The values that a group was measured over, in their order.
    pub(super) fn values(&self, group: &str) -> Vec<String> {
        let mut values: Vec<String> =
            self.figures.iter().filter(|figure| figure.group == group).map(|f| f.value.clone()).collect();
        values.sort_by_key(|value| number(value));
        values.dedup();
        values
    }

    pub(super) fn find(&self, group: &str, function: &str, value: &str) -> Option<&Figure> {
        self.figures.iter().find(|f| f.group == group && f.function == function && f.value == value)
    }
}

/// The number that a value begins with.
fn number(value: &str) -> u64 {
    value.split(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read_back() {
        let home = tempfile::tempdir().unwrap();
        for (value, times) in [("1024 MiB", "[9e6, 12e6]"), ("256 MiB", "[8e6, 2e6]")] {
            let folder = home.path().join("group").join(value).join("new");
            std::fs::create_dir_all(&folder).unwrap();
            let benchmark = format!(r#"{{"group_id": "g", "function_id": "f", "value_str": "{value}"}}"#);
            std::fs::write(folder.join("benchmark.json"), benchmark).unwrap();
            let sample = format!(r#"{{"iters": [2.0, 2.0], "times": {times}}}"#);
            std::fs::write(folder.join("sample.json"), sample).unwrap();
        }
        let results = Results::read(home.path(), SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(results.values("g"), ["256 MiB", "1024 MiB"]);
        let figure = results.find("g", "f", "256 MiB").unwrap();
        assert_eq!((figure.count(), figure.name()), (2, "g/f/256 MiB".into()));
        assert_eq!(figure.median(), Duration::from_micros(2500));
        assert_eq!(figure.worst(), Duration::from_millis(4));

        let later = SystemTime::now() + Duration::from_secs(60);
        assert_eq!(Results::read(home.path(), later).unwrap().figures().count(), 0);
    }
}
