// SPDX-License-Identifier: GPL-2.0
//! Reads KTAP version 1 (Documentation/dev-tools/ktap.rst) and holds it against the program's exit status. Text
//! only, touches nothing.

use crate::marker::Status;
use serde::{Deserialize, Serialize};

/// How one test came out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// `ok`
    Ok,
    /// `not ok`, with the diagnostics that went before it
    NotOk(String),
    /// `ok ... # SKIP`, with the reason
    Skip(String),
}

/// One test.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Test {
    /// Its name, as printed.
    pub name: String,
    /// How it came out.
    pub outcome: Outcome,
}

/// A whole program.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The tests in order.
    pub tests: Vec<Test>,
    /// What is wrong with the output itself, or with the exit status against it. Any of these is a failure.
    pub problems: Vec<String>,
}

/// Reads a program's standard output; `status` is how it ended, `None` when that is not known.
pub fn parse(text: &str, status: Option<Status>) -> Report {
    let mut report = Report::default();
    let mut plan = None;
    let mut version = false;
    let mut diagnostics: Vec<&str> = Vec::new();
    for line in text.lines() {
        let line = line.trim_end();
        // Indented lines are subtests; their parent's line sums them up.
        if line.is_empty() || line.starts_with(char::is_whitespace) {
            continue;
        }
        if let Some(rest) = line.strip_prefix('#') {
            diagnostics.push(rest.trim());
        } else if line == "KTAP version 1" {
            version = true;
        } else if let Some(rest) = line.strip_prefix("1..") {
            let number = rest.split_whitespace().next().unwrap_or_default();
            match (number.parse::<usize>(), plan) {
                (Ok(number), None) => plan = Some(number),
                (Ok(_), Some(_)) => report.problems.push(format!("a second plan: {line}")),
                (Err(_), _) => report.problems.push(format!("not a plan: {line}")),
            }
        } else if line.starts_with("Bail out!") {
            report.problems.push(line.to_string());
        } else if let Some((passed, rest)) = result(line) {
            let number = report.tests.len() + 1;
            match test(rest, passed, number, &diagnostics) {
                Ok(test) if report.tests.iter().any(|other| other.name == test.name) => {
                    report.problems.push(format!("{} came twice", test.name));
                }
                Ok(test) => report.tests.push(test),
                Err(problem) => report.problems.push(problem),
            }
            diagnostics.clear();
        }
    }
    if !version {
        report.problems.push("no line `KTAP version 1`".to_string());
    }
    match plan {
        None => report.problems.push("no plan".to_string()),
        Some(plan) if plan != report.tests.len() => report
            .problems
            .push(format!("{plan} tests planned, {} came", report.tests.len())),
        Some(_) => {}
    }
    let failed = report
        .tests
        .iter()
        .any(|test| matches!(test.outcome, Outcome::NotOk(_)));
    let skipped = report
        .tests
        .iter()
        .all(|test| matches!(test.outcome, Outcome::Skip(_)));
    let expected = match (failed, skipped) {
        (true, _) => Status::Exit(1),
        (false, true) => Status::Exit(4),
        (false, false) => Status::Exit(0),
    };
    match status {
        None => report.problems.push("it did not end".to_string()),
        // An incomplete run is a failure of its own, whatever the results so far say.
        Some(Status::Exit(1)) if !report.problems.is_empty() => {}
        Some(status) if status != expected => {
            let last = diagnostics
                .last()
                .map_or(String::new(), |line| format!("; its last words: {line}"));
            report.problems.push(format!(
                "it ended with {status}, and its results say {expected}{last}"
            ));
        }
        Some(_) => {}
    }
    report
}

/// Splits `ok ...` or `not ok ...` into whether it passed and the rest.
fn result(line: &str) -> Option<(bool, &str)> {
    if let Some(rest) = line.strip_prefix("not ok") {
        return (rest.is_empty() || rest.starts_with(' ')).then_some((false, rest));
    }
    let rest = line.strip_prefix("ok")?;
    (rest.is_empty() || rest.starts_with(' ')).then_some((true, rest))
}

/// ` 3 - name # SKIP reason`
fn test(rest: &str, passed: bool, expected: usize, diagnostics: &[&str]) -> Result<Test, String> {
    let rest = rest.trim();
    let (number, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let (name, directive) = match rest.split_once(" # ") {
        Some((name, directive)) => (name, Some(directive)),
        None => (rest, None),
    };
    let name = name.trim().trim_start_matches("- ").to_string();
    if name.is_empty() {
        return Err(format!("a result without a name, number {number}"));
    }
    if number != expected.to_string() {
        return Err(format!("{name} has number {number}, not {expected}"));
    }
    let skip = directive.and_then(|text| text.strip_prefix("SKIP"));
    let outcome = match (passed, skip) {
        (true, Some(reason)) => Outcome::Skip(reason.trim().to_string()),
        (true, None) => Outcome::Ok,
        (false, _) => Outcome::NotOk(diagnostics.join("; ")),
    };
    Ok(Test { name, outcome })
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT_0: Option<Status> = Some(Status::Exit(0));
    const EXIT_1: Option<Status> = Some(Status::Exit(1));

    #[test]
    fn a_good_run() {
        let text =
            "KTAP version 1\n1..3\n# about a\nok 1 a\nok 2 - b # SKIP CONFIG_X\nok 3 c\n# Totals\n";
        let report = parse(text, EXIT_0);
        assert_eq!(report.problems, Vec::<String>::new());
        assert_eq!(report.tests[1].name, "b");
        assert_eq!(report.tests[1].outcome, Outcome::Skip("CONFIG_X".into()));
        assert_eq!(report.tests[2].outcome, Outcome::Ok);
    }

    #[test]
    fn a_failure_keeps_its_own_diagnostics_only() {
        let text = "KTAP version 1\n1..2\n# of a\nok 1 a\n# b: 3 != 4\nnot ok 2 b\n";
        let report = parse(text, EXIT_1);
        assert_eq!(report.problems, Vec::<String>::new());
        assert_eq!(report.tests[1].outcome, Outcome::NotOk("b: 3 != 4".into()));
    }

    #[test]
    fn a_failure_cannot_be_declared_a_skip() {
        let report = parse("KTAP version 1\n1..1\nnot ok 1 a # SKIP x\n", EXIT_1);
        assert!(matches!(report.tests[0].outcome, Outcome::NotOk(_)));
    }

    #[test]
    fn problems() {
        let long = "KTAP version 1\n1..2\nok 1 a\n";
        for (text, status, problem) in [
            ("", EXIT_0, "no line"),
            ("KTAP version 1\nok 1 a\n", EXIT_0, "no plan"),
            (long, EXIT_0, "2 tests planned, 1 came"),
            (long, None, "did not end"),
            (long, Some(Status::Signal(11)), "ended with signal 11"),
            (
                "KTAP version 1\n1..1\nok 1 a\n",
                EXIT_1,
                "its results say exit 0",
            ),
            (
                "KTAP version 1\n1..1\nnot ok 1 a\n",
                EXIT_0,
                "its results say exit 1",
            ),
            (
                "KTAP version 1\n1..1\nok 1 a # SKIP x\n",
                EXIT_0,
                "its results say exit 4",
            ),
            (
                "KTAP version 1\n1..2\nok 1 a\nok 2 a\n",
                EXIT_0,
                "a came twice",
            ),
            ("KTAP version 1\n1..1\nok 2 a\n", EXIT_0, "number 2, not 1"),
            ("KTAP version 1\n1..1\nok 1\n", EXIT_0, "without a name"),
            ("KTAP version 1\n1..x\n", EXIT_0, "not a plan"),
            (
                "KTAP version 1\n1..1\n1..1\nok 1 a\n",
                EXIT_0,
                "a second plan",
            ),
            ("KTAP version 1\n1..1\nBail out! no kvm\n", EXIT_1, "no kvm"),
        ] {
            let report = parse(text, status);
            assert!(
                report.problems.iter().any(|p| p.contains(problem)),
                "{text:?}: {:?}",
                report.problems
            );
        }
    }

    #[test]
    fn words_that_begin_like_results_are_not_results() {
        let report = parse(
            "KTAP version 1\n1..1\nokay then\nnot okay\nok 1 a\n",
            EXIT_0,
        );
        assert_eq!(report.tests.len(), 1);
        assert_eq!(report.problems, Vec::<String>::new());
    }
}
