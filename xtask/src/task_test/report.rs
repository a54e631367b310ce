//! What the runners said, added up: nextest's JUnit report, and the lines of Rust's own test harness.

use std::collections::BTreeSet;
use std::fmt::Write;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::tools::Paint;

/// What a test prints that does not apply here, before it returns.
const SKIP_WORD: &str = "SKIPPED ";

/// Test programs that do nothing outside of the lab begin so: the lab's lane answers for them.
const LAB_BINARY: &str = "::lab_";

/// Results of all lanes.
#[derive(Debug, Default)]
pub(super) struct Tally {
    passed: usize,
    failed: Vec<String>,
    /// Name and reason.
    skipped: BTreeSet<(String, String)>,
    /// Tests that said so themselves, and that their runner counts as passed.
    skipped_themselves: usize,
}

impl Tally {
    pub(super) fn pass(&mut self) {
        self.passed += 1;
    }

    pub(super) fn fail(&mut self, name: &str) {
        self.failed.push(name.to_owned());
    }

    pub(super) fn skip(&mut self, name: &str, reason: &str) {
        self.skipped.insert((name.to_owned(), reason.to_owned()));
    }

    pub(super) fn failures(&self) -> usize {
        self.failed.len()
    }

    pub(super) fn is_good(&self) -> bool {
        self.failed.is_empty()
    }

    /// Adds the test cases of a JUnit report, as nextest writes it.
    pub(super) fn add_junit(&mut self, xml: &str) {
        for case in xml.split("<testcase ").skip(1) {
            let case = case.split("</testsuite>").next().unwrap_or(case);
            let (head, body) = case.split_once('>').unwrap_or((case, ""));
            let binary = attribute(head, "classname");
            if binary.contains(LAB_BINARY) {
                continue;
            }
            let name = format!("{binary} {}", attribute(head, "name"));
            // A flaky or rerun one has other elements: these two mean that it did not pass in the end.
            if body.contains("<failure") || body.contains("<error") {
                self.fail(&name);
                continue;
            }
            self.passed += 1;
            self.add_output(&unescape(body), &name);
        }
    }

    /// Looks for what a passed test says of itself.
    fn add_output(&mut self, output: &str, test: &str) {
        // Where the element begins there is no line break.
        let mut lines = output.lines().flat_map(|line| line.split("<system-err>"));
        if let Some(said) = lines.find_map(|line| line.trim_start().strip_prefix(SKIP_WORD)) {
            let reason = said.split_once(": ").map_or(said, |(_, reason)| reason);
            self.skip(test, reason);
            self.skipped_themselves += 1;
        }
    }

    /// Adds one line of what `cargo test` prints.
    pub(super) fn add_libtest_line(&mut self, lane: &str, line: &str) {
        let line = line.trim();
        if let Some(said) = line.strip_prefix(SKIP_WORD) {
            let (name, reason) = said.split_once(": ").unwrap_or((said, ""));
            self.skip(&format!("{lane}: {name}"), reason);
            self.skipped_themselves += 1;
        }
        let Some((name, result)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "))
        else {
            return;
        };
        match result {
            "ok" => self.passed += 1,
            _ if result.starts_with("FAILED") => self.fail(&format!("{lane}: {name}")),
            _ if result.starts_with("ignored") => {
                let reason = result.strip_prefix("ignored, ").unwrap_or("to be run by hand");
                self.skip(&format!("{lane}: {name}"), &format!("ignored: {reason}"));
            }
            // With --nocapture, what the test prints follows on this line.
            _ => {}
        }
    }

    /// Names of what did not run or did not pass, and the total on the last line.
    pub(super) fn summary(&self, paint: Paint) -> String {
        let mut text = String::new();
        for (name, reason) in &self.skipped {
            let _ = writeln!(text, "skipped: {name} ({reason})");
        }
        for name in &self.failed {
            let _ = writeln!(text, "{} {name}", paint.red("FAILED:"));
        }
        let passed = self.passed.saturating_sub(self.skipped_themselves);
        let _ =
            writeln!(text, "{passed} passed, {} failed, {} skipped", self.failed.len(), self.skipped.len());
        text
    }
}

/// Value of an attribute in a tag.
fn attribute(tag: &str, name: &str) -> String {
    let value = tag.split_once(&format!(" {name}=\"")).or_else(|| {
        let first = tag.strip_prefix(name)?.strip_prefix("=\"")?;
        Some(("", first))
    });
    unescape(value.and_then(|(_, rest)| rest.split('"').next()).unwrap_or_default())
}

/// Text of an XML element.
fn unescape(text: &str) -> String {
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&apos;", "'")
        .replace("&amp;", "&")
}

/// Names of the tests in nextest's list that match the list's filter.
pub(super) fn listed_tests(json: &str) -> Result<Vec<String>> {
    let list: Value = serde_json::from_str(json).context("the list of tests is no JSON")?;
    let suites = list["rust-suites"].as_object().context("the list of tests has no suites")?;
    let mut names = Vec::new();
    for (suite, value) in suites {
        for (name, case) in value["testcases"].as_object().into_iter().flatten() {
            if case["filter-match"]["status"] == "matches" && !suite.contains(LAB_BINARY) {
                names.push(format!("{suite} {name}"));
            }
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    const JUNIT: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="nextest-run" tests="5" failures="1" errors="0">
    <testsuite name="vmm::exec" tests="3" failures="1">
        <testcase name="goes_on" classname="vmm::exec" time="0.1">
            <system-err>nothing &amp; more</system-err>
        </testcase>
        <testcase name="needs_kvm" classname="vmm::exec" time="0.1">
            <system-err>SKIPPED exec::needs_kvm: there is no /dev/kvm
</system-err>
        </testcase>
        <testcase name="breaks" classname="vmm::exec" time="0.1">
            <failure message="thread &apos;x&apos; panicked" type="test failure">SKIPPED x: y</failure>
        </testcase>
    </testsuite>
    <testsuite name="oslib" tests="1">
        <testcase name="fds::close" classname="oslib" time="0.1"/>
    </testsuite>
    <testsuite name="vmm::lab_linux" tests="1">
        <testcase name="boots" classname="vmm::lab_linux" time="0.1"/>
    </testsuite>
</testsuites>"#;

    #[test]
    fn a_junit_report_is_counted() {
        let mut tally = Tally::default();
        tally.add_junit(JUNIT);
        assert!(!tally.is_good());
        assert_eq!(
            tally.summary(Paint::none()),
            "skipped: vmm::exec needs_kvm (there is no /dev/kvm)\nFAILED: vmm::exec breaks\n2 passed, 1 failed, 1 skipped\n"
        );
    }

    #[test]
    fn lines_of_the_harness_are_counted() {
        let mut tally = Tally::default();
        for line in [
            "running 4 tests",
            "test a::b ... ok",
            "test a::c ... ignored, slow",
            "SKIPPED a::d: no KVM",
            "test a::d ... ok",
            "test src/lib.rs - f (line 3) ... ok",
            "test result: ok. 3 passed; 0 failed; 1 ignored",
        ] {
            tally.add_libtest_line("tests", line);
        }
        assert!(tally.is_good());
        assert!(tally.summary(Paint::none()).ends_with("\n2 passed, 0 failed, 2 skipped\n"));
        tally.add_libtest_line("tests", "test a::e ... FAILED");
        assert_eq!(tally.failures(), 1);
    }

    #[test]
    fn listed_tests_are_those_that_match() {
        let json = r#"{"rust-suites": {"vmm-core::boot": {"testcases": {
            "a": {"ignored": true, "filter-match": {"status": "matches"}},
            "b": {"ignored": false, "filter-match": {"status": "mismatch", "reason": "ignored"}}}},
            "vmm::lab_load": {"testcases": {"a": {"ignored": true, "filter-match": {"status": "matches"}}}}}}"#;
        assert_eq!(listed_tests(json).unwrap(), ["vmm-core::boot a"]);
    }
}
