// SPDX-License-Identifier: GPL-2.0
//! Holds what a program printed on two kernels against each other, result line by result line. Reads two results folders,
//! prints KTAP.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use crate::names;

/// Two results folders and what to compare.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Results folder of the unpatched kernel
    #[arg(long)]
    pub unpatched: PathBuf,
    /// Results folder of the patched kernel
    #[arg(long)]
    pub patched: PathBuf,
    /// The program whose NAME.ktap to compare
    #[arg(long)]
    pub program: String,
    /// Tests that are known to come out differently from run to run, one name a line
    #[arg(long, value_name = "FILE")]
    pub unsteady: PathBuf,
}

/// A test's own result and those of the subtests that it printed, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Outcome {
    result: String,
    subtests: Vec<String>,
}

/// Compares. False if a test differs that is not known to be unsteady.
pub fn same(options: &Options) -> Result<bool> {
    let read = |folder: &Path| -> Result<BTreeMap<String, Outcome>> {
        let path = folder.join(format!("{}.ktap", options.program));
        let text = fs::read(&path).with_context(|| path.display().to_string())?;
        Ok(outcomes(&String::from_utf8_lossy(&text)))
    };
    let (unpatched, patched) = (read(&options.unpatched)?, read(&options.patched)?);
    let unsteady = names::read(&options.unsteady)?;

    let names: Vec<&String> = unpatched
        .keys()
        .chain(patched.keys().filter(|name| !unpatched.contains_key(*name)))
        .collect();
    println!("KTAP version 1\n1..{}", names.len());
    let mut good = !names.is_empty();
    for (number, name) in (1..).zip(names) {
        let difference = difference(unpatched.get(name), patched.get(name));
        match difference {
            None => println!("ok {number} {name} # {} on both", unpatched[name].result),
            Some(text) if unsteady.contains(name) => {
                println!("# {name}: {text}");
                println!("ok {number} {name} # SKIP unsteady: {text}");
            }
            Some(text) => {
                good = false;
                println!("# {name}: {text}");
                println!("not ok {number} {name}");
            }
        }
    }
    Ok(good)
}

/// The first difference, in words.
fn difference(unpatched: Option<&Outcome>, patched: Option<&Outcome>) -> Option<String> {
    let (Some(before), Some(after)) = (unpatched, patched) else {
        return Some(match unpatched {
            Some(_) => "not run on the patched kernel".into(),
            None => "not run on the unpatched kernel".into(),
        });
    };
    if before.result != after.result {
        return Some(format!(
            "{} on the unpatched kernel, {} on the patched one",
            before.result, after.result
        ));
    }
    let longest = before.subtests.len().max(after.subtests.len());
    (0..longest)
        .map(|number| (before.subtests.get(number), after.subtests.get(number)))
        .find(|(before, after)| before != after)
        .map(|(before, after)| {
            let line =
                |line: Option<&String>| line.map_or("nothing".into(), |one| format!("`{one}`"));
            format!(
                "{} on the unpatched kernel, {} on the patched one",
                line(before),
                line(after)
            )
        })
}

/// The results in the output of kselftest's runner, by test; the output of a test comes before its result, after `# `.
fn outcomes(text: &str) -> BTreeMap<String, Outcome> {
    let mut outcomes = BTreeMap::new();
    let mut subtests = Vec::new();
    for line in text.lines() {
        let inner = line.trim_start_matches(['#', ' ']);
        let Some((passed, rest)) = result(inner) else {
            continue;
        };
        if line.starts_with('#') {
            subtests.push(inner.trim_end().to_string());
            continue;
        }
        let (name, directive) = rest.split_once(" # ").unwrap_or((rest, ""));
        let directive = directive.split_whitespace().next().unwrap_or_default();
        let result = match (passed, directive) {
            (true, "SKIP") => "skipped",
            (true, _) => "passed",
            (false, "TIMEOUT") => "timed out",
            (false, _) => "failed",
        };
        outcomes.insert(
            name.trim().to_string(),
            Outcome {
                result: result.into(),
                subtests: std::mem::take(&mut subtests),
            },
        );
    }
    outcomes
}

/// Whether a result line says ok, and what comes after its number.
fn result(line: &str) -> Option<(bool, &str)> {
    let (passed, rest) = match line.strip_prefix("not ok ") {
        Some(rest) => (false, rest),
        None => (true, line.strip_prefix("ok ")?),
    };
    let (number, rest) = rest.split_once(' ')?;
    number.parse::<u32>().ok()?;
    Some((passed, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "TAP version 13\n1..3\n# selftests: kvm: a\n# 1..2\n# ok 1 x\n# not ok 2 y\n\
        not ok 1 selftests: kvm: a # exit=1\nok 2 selftests: kvm: b # SKIP\nnot ok 3 selftests: kvm: c # TIMEOUT 9 seconds\n";

    #[test]
    fn results_and_those_of_subtests_are_found() {
        let found = outcomes(OUTPUT);
        assert_eq!(
            found["selftests: kvm: a"].subtests,
            ["ok 1 x", "not ok 2 y"]
        );
        let results: Vec<_> = found.values().map(|one| one.result.as_str()).collect();
        assert_eq!(results, ["failed", "skipped", "timed out"]);
    }

    #[test]
    fn differences_are_named() {
        let before = outcomes(OUTPUT);
        let after = outcomes(&OUTPUT.replace("# not ok 2 y", "# ok 2 y"));
        let of = |all: &BTreeMap<String, Outcome>, name: &str| all.get(name).cloned();
        let a = "selftests: kvm: a";
        assert_eq!(
            difference(of(&before, a).as_ref(), of(&before, a).as_ref()),
            None
        );
        let text = difference(of(&before, a).as_ref(), of(&after, a).as_ref()).unwrap();
        assert!(
            text.contains("`not ok 2 y` on the unpatched kernel, `ok 2 y`"),
            "{text}"
        );
        assert!(difference(of(&before, a).as_ref(), None)
            .unwrap()
            .contains("not run"));
        let passed = outcomes(&OUTPUT.replace("not ok 1", "ok 1"));
        let text = difference(of(&before, a).as_ref(), of(&passed, a).as_ref()).unwrap();
        assert!(
            text.contains("failed on the unpatched kernel, passed on"),
            "{text}"
        );
    }
}
