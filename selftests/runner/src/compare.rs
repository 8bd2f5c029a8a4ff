// SPDX-License-Identifier: GPL-2.0
//! Holds the patched kernel's results against the unpatched one's. Reads two results folders and the list of expected
//! failures, writes one JSON file, prints one table; touches nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use clap::Args;
use comfy_table::{presets, Cell, CellAlignment, Table};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::boot::Boot;
use crate::ktap::Outcome;
use crate::names;

/// What to compare.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Results folder of the unpatched kernel
    #[arg(long, value_name = "DIR")]
    pub unpatched: PathBuf,
    /// Results folder of the patched kernel
    #[arg(long, value_name = "DIR")]
    pub patched: PathBuf,
    /// Tests that must fail on the unpatched kernel, one name a line (more than once)
    #[arg(long, value_name = "FILE", required = true)]
    pub expected_failures: Vec<PathBuf>,
    /// Where the machine-readable result goes
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    /// Judge only the tests that ran: for runs of some of the programs or cases
    #[arg(long)]
    pub partial: bool,
}

/// How one test came out on both kernels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judged {
    /// Its name.
    pub name: String,
    /// On the unpatched kernel.
    pub unpatched: Option<Outcome>,
    /// On the patched kernel.
    pub patched: Option<Outcome>,
    /// It is there to fail on the unpatched kernel.
    pub expected_failure: bool,
    /// What is wrong; empty when nothing is.
    pub errors: Vec<String>,
}

/// `results.json`.
#[derive(Serialize)]
struct Output<'a> {
    passed: usize,
    failed: usize,
    skipped: usize,
    tests: &'a [Judged],
    /// By case: what the programs measured.
    figures: BTreeMap<String, Pair>,
    unpatched: &'a Boot,
    patched: &'a Boot,
}

/// What a program wrote of one case, on both kernels.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Pair {
    unpatched: Value,
    patched: Value,
}

/// Compares, prints, writes; whether all came out as it should.
pub fn compare(options: &Options) -> Result<bool> {
    let mut expected = BTreeSet::new();
    for file in &options.expected_failures {
        expected.append(&mut names::read(file)?);
    }
    let (unpatched, patched) = (load(&options.unpatched)?, load(&options.patched)?);
    let mut tests = judge(
        &expected,
        &outcomes(&unpatched),
        &outcomes(&patched),
        options.partial,
    );
    let figures = figures(&options.unpatched, &options.patched, &unpatched, &patched)?;
    tests.extend(
        figures
            .iter()
            .flat_map(|(name, pair)| judge_flushes(name, pair)),
    );
    print_table(&figures);
    print_boots(&figures);

    let mut failed = 0;
    let mut error = |text: String| {
        failed += 1;
        eprintln!("error: {text}");
    };
    for boot in [&unpatched, &patched] {
        for program in &boot.programs {
            for problem in &program.report.problems {
                error(format!("{}, {}: {problem}", boot.name, program.name));
            }
        }
    }
    for test in tests.iter().filter(|test| !test.errors.is_empty()) {
        error(format!("{}: {}", test.name, test.errors.join("; ")));
    }
    let both_skipped =
        |test: &&Judged| matches!(test.patched, Some(Outcome::Skip(_))) && test.errors.is_empty();
    let skipped = tests.iter().filter(both_skipped).count();
    for test in tests.iter().filter(both_skipped) {
        if let Some(Outcome::Skip(reason)) = &test.patched {
            println!("skipped: {}: {reason}", test.name);
        }
    }
    let passed = tests.iter().filter(|test| test.errors.is_empty()).count() - skipped;
    let output = Output {
        passed,
        failed,
        skipped,
        tests: &tests,
        figures,
        unpatched: &unpatched,
        patched: &patched,
    };
    let temporary = options.output.with_extension("tmp");
    fs::write(&temporary, serde_json::to_vec_pretty(&output)?)
        .with_context(|| temporary.display().to_string())?;
    fs::rename(&temporary, &options.output)
        .with_context(|| options.output.display().to_string())?;
    let before = tests
        .iter()
        .filter(|test| test.expected_failure && test.errors.is_empty())
        .count();
    println!("{passed} tests as they should be ({before} of them fail without the series), {failed} not, {skipped} skipped");
    println!(
        "traces: {}, {}; all figures: {}",
        options.unpatched.display(),
        options.patched.display(),
        options.output.display()
    );
    Ok(failed == 0)
}

fn load(folder: &Path) -> Result<Boot> {
    let file = folder.join("boot.json");
    let text = fs::read(&file).with_context(|| {
        format!(
            "{}: there is no complete run of this kernel: make boot",
            file.display()
        )
    })?;
    let boot: Boot = serde_json::from_slice(&text).with_context(|| file.display().to_string())?;
    if let Some(failure) = &boot.failure {
        bail!("{}: {failure}", folder.display());
    }
    Ok(boot)
}

fn outcomes(boot: &Boot) -> BTreeMap<String, Outcome> {
    let tests = boot
        .programs
        .iter()
        .flat_map(|program| &program.report.tests);
    tests
        .map(|test| (test.name.clone(), test.outcome.clone()))
        .collect()
}

/// Holds each test on both kernels against what it should be. With `partial`, expected failures that did not run are
/// no errors.
pub fn judge(
    expected: &BTreeSet<String>,
    unpatched: &BTreeMap<String, Outcome>,
    patched: &BTreeMap<String, Outcome>,
    partial: bool,
) -> Vec<Judged> {
    let mut all: BTreeSet<&String> = unpatched.keys().chain(patched.keys()).collect();
    if !partial {
        all.extend(expected);
    }
    let mut judged = Vec::new();
    for name in all {
        let (before, after) = (unpatched.get(name), patched.get(name));
        let expected_failure = expected.contains(name);
        let mut errors = Vec::new();
        match before {
            None => errors.push("did not run on the unpatched kernel".to_string()),
            Some(Outcome::Ok) if expected_failure => {
                errors.push(
                    "passes on the unpatched kernel, where it is expected to fail".to_string(),
                );
            }
            Some(Outcome::NotOk(why)) if !expected_failure => {
                errors.push(format!("fails on the unpatched kernel: {why}"));
            }
            Some(_) => {}
        }
        match after {
            None => errors.push("did not run on the patched kernel".to_string()),
            Some(Outcome::NotOk(why)) => errors.push(format!("fails on the patched kernel: {why}")),
            Some(_) => {}
        }
        // A test that is skipped on one kernel only shows nothing on the other.
        match (before, after) {
            (Some(Outcome::Skip(_)), Some(Outcome::Skip(_))) => {}
            (Some(Outcome::Skip(why)), Some(_)) => {
                errors.push(format!("is skipped on the unpatched kernel only: {why}"))
            }
            (Some(_), Some(Outcome::Skip(why))) => {
                errors.push(format!("is skipped on the patched kernel only: {why}"))
            }
            _ => {}
        }
        judged.push(Judged {
            name: name.clone(),
            unpatched: before.cloned(),
            patched: after.cloned(),
            expected_failure,
            errors,
        });
    }
    judged
}

/// KVM's flushes for the same scans are no more with the series than without it.
///
/// Of requests, the steps that took the fewest are held against each other: each time that a zap yields mmu_lock, which
/// depends on the machine's load, adds one. Of flushes for which a vCPU had to leave the guest, the fewest of the series
/// are held against the most without it, as a vCPU that is out of the guest at the moment need not leave it; for the same
/// reason each request that was made counts as one there.
fn judge_flushes(name: &str, pair: &Pair) -> Vec<Judged> {
    let of = |case: &Value, figure: &str| {
        let counts = steps(case, figure)?;
        Some((*counts.iter().min()?, *counts.iter().max()?))
    };
    let (requests, kicks) = ("flush_requests_scan", "flushes_scan");
    let judge = |test: &str, what: &str, before: u64, after: u64| Judged {
        name: format!("{name}.{test}"),
        unpatched: None,
        patched: None,
        expected_failure: false,
        errors: (after > before)
            .then(|| {
                format!("{after} {what} for the scans of a step, {before} on the unpatched kernel")
            })
            .into_iter()
            .collect(),
    };
    let judged = || {
        let (requested, _) = of(&pair.unpatched, requests)?;
        let (_, kicked) = of(&pair.unpatched, kicks)?;
        let (requested_after, _) = of(&pair.patched, requests)?;
        let (kicked_after, _) = of(&pair.patched, kicks)?;
        Some([
            judge(
                "kvm.flushes_no_more",
                "flush requests",
                requested,
                requested_after,
            ),
            judge(
                "kvm.kicks_no_more",
                "flushes that kicked a vCPU",
                kicked.max(requested),
                kicked_after,
            ),
        ])
    };
    judged().into_iter().flatten().collect()
}

/// `figure` of each step of a case.
fn steps(case: &Value, figure: &str) -> Option<Vec<u64>> {
    let steps = case["each_step"].as_array()?.iter();
    steps.map(|step| step[figure].as_u64()).collect()
}

/// `cases` of each program's JSON, by name.
fn figures(
    unpatched: &Path,
    patched: &Path,
    before: &Boot,
    after: &Boot,
) -> Result<BTreeMap<String, Pair>> {
    let mut figures: BTreeMap<String, Pair> = BTreeMap::new();
    for (folder, boot, patched) in [(unpatched, before, false), (patched, after, true)] {
        for program in &boot.programs {
            let file = folder.join(format!("{}.json", program.name));
            let Ok(text) = fs::read(&file) else { continue };
            let json: Value =
                serde_json::from_slice(&text).with_context(|| file.display().to_string())?;
            for case in json["cases"].as_array().into_iter().flatten() {
                let Some(name) = case["name"].as_str() else {
                    continue;
                };
                let pair = figures.entry(name.to_string()).or_default();
                *(if patched {
                    &mut pair.patched
                } else {
                    &mut pair.unpatched
                }) = case.clone();
            }
        }
    }
    Ok(figures)
}

/// Not a figure by itself: the fewest `flush_requests_scan` that a step took.
const LEAST_FLUSHES: &str = "least flush_requests_scan";

/// The columns of the table: title, and the figure in the programs' JSON.
const COLUMNS: &[(&str, &str)] = &[
    ("pages\nhinted", "hinted"),
    ("pages\nmigrated", "migrated"),
    ("pages KVM\ndropped", "dropped"),
    ("faults to put\nthem back", "faults"),
    ("flush requests\nof a step", LEAST_FLUSHES),
];

fn print_table(figures: &BTreeMap<String, Pair>) {
    let cases = figures.iter().filter(|(_, pair)| !pair.is_of_boots());
    let figures: BTreeMap<&String, &Pair> = cases.collect();
    if figures.is_empty() {
        return;
    }
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    let titles = COLUMNS.iter().map(|(title, _)| title.to_string());
    table.set_header(std::iter::once("guest memory".to_string()).chain(titles));
    let widths: Vec<usize> = COLUMNS
        .iter()
        .map(|(_, figure)| {
            let widths = figures
                .values()
                .map(|pair| number(&pair.patched, figure).len());
            widths.max().unwrap_or_default()
        })
        .collect();
    for (name, pair) in figures {
        let cells = COLUMNS.iter().zip(&widths).map(|((_, figure), width)| {
            let (before, after) = (
                number(&pair.unpatched, figure),
                number(&pair.patched, figure),
            );
            Cell::new(format!("{before} -> {after:>width$}")).set_alignment(CellAlignment::Right)
        });
        table.add_row(std::iter::once(Cell::new(name)).chain(cells));
    }
    println!("\nWhat NUMA scans did to the VM: unpatched kernel -> patched kernel\n\n{table}\n");
}

/// The columns of the table of boots: title, and the figure of each boot.
const BOOT_COLUMNS: &[(&str, &str)] = &[
    ("scans", "scans"),
    ("pages\nhinted", "hinted"),
    ("pages\nmigrated", "migrated"),
    ("unmap calls\nfor scans", "scan_unmap_calls"),
    ("pages KVM\ndropped", "dropped"),
    ("faults", "faults"),
    ("flush\nrequests", "flush_requests"),
];

impl Pair {
    /// Whether it is of a VMM that booted some times, each of which was counted whole.
    fn is_of_boots(&self) -> bool {
        self.unpatched["boots"].is_array() || self.patched["boots"].is_array()
    }
}

fn print_boots(figures: &BTreeMap<String, Pair>) {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    let titles = BOOT_COLUMNS.iter().map(|(title, _)| *title);
    table.set_header(["VMM", "boots"].into_iter().chain(titles));
    for (name, pair) in figures.iter().filter(|(_, pair)| pair.is_of_boots()) {
        let (before, after) = (&pair.unpatched["boots"], &pair.patched["boots"]);
        let boots = [before, after].map(|boots| boots.as_array().map_or(0, Vec::len));
        let cells = BOOT_COLUMNS.iter().map(|(_, figure)| {
            let (before, after) = (Spread::of(before, figure), Spread::of(after, figure));
            let means = format!("{} -> {}", before.mean(), after.mean());
            let ranges = format!("{} -> {}", before.range(), after.range());
            Cell::new(format!("{means}\n{ranges}")).set_alignment(CellAlignment::Right)
        });
        let name_and_count = [
            Cell::new(format!("{name}\nleast-most")),
            Cell::new(format!("{} -> {}", boots[0], boots[1])),
        ];
        table.add_row(name_and_count.into_iter().chain(cells));
    }
    if table.row_count() > 0 {
        println!(
            "\nWhat a boot came to, unpatched kernel -> patched kernel: the mean\n\n{table}\n"
        );
    }
}

/// The values of a figure in some boots.
struct Spread(Vec<u64>);

impl Spread {
    fn of(boots: &Value, figure: &str) -> Spread {
        let boots = boots.as_array().into_iter().flatten();
        Spread(boots.filter_map(|boot| boot[figure].as_u64()).collect())
    }

    fn mean(&self) -> String {
        match self.0.len() as u64 {
            0 => "-".into(),
            count => grouped((self.0.iter().sum::<u64>() + count / 2) / count),
        }
    }

    fn range(&self) -> String {
        match (self.0.iter().min(), self.0.iter().max()) {
            (Some(least), Some(most)) => format!("{}-{}", grouped(*least), grouped(*most)),
            _ => "-".into(),
        }
    }
}

/// A figure in words.
fn number(case: &Value, figure: &str) -> String {
    let value = match figure {
        LEAST_FLUSHES => {
            steps(case, "flush_requests_scan").and_then(|counts| counts.into_iter().min())
        }
        _ => case[figure].as_u64(),
    };
    value.map_or("-".to_string(), grouped)
}

/// A number with its thousands apart.
fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn boots_have_a_mean_and_a_range() {
        let boots = json!([{"faults": 1000}, {"faults": 2001}]);
        let (spread, none) = (Spread::of(&boots, "faults"), Spread::of(&boots, "scans"));
        assert_eq!(
            (&*spread.mean(), &*spread.range()),
            ("1,501", "1,000-2,001")
        );
        assert_eq!((&*none.mean(), &*none.range()), ("-", "-"));
        let pair = |patched| Pair {
            patched,
            ..Pair::default()
        };
        assert!(pair(json!({ "boots": boots })).is_of_boots());
        assert!(!pair(json!({ "hinted": 1 })).is_of_boots());
    }

    fn one(outcome: Option<Outcome>) -> BTreeMap<String, Outcome> {
        outcome
            .into_iter()
            .map(|outcome| ("t".to_string(), outcome))
            .collect()
    }

    fn errors(expected: bool, before: Option<Outcome>, after: Option<Outcome>) -> String {
        let expected = expected.then(|| "t".to_string()).into_iter().collect();
        let judged = judge(&expected, &one(before), &one(after), false);
        judged
            .iter()
            .flat_map(|test| test.errors.clone())
            .collect::<Vec<_>>()
            .join("; ")
    }

    #[test]
    fn as_it_should_be() {
        let fails = || Some(Outcome::NotOk("1 != 0".into()));
        let skips = || Some(Outcome::Skip("CONFIG_X".into()));
        assert_eq!(errors(false, Some(Outcome::Ok), Some(Outcome::Ok)), "");
        assert_eq!(errors(true, fails(), Some(Outcome::Ok)), "");
        assert_eq!(errors(false, skips(), skips()), "");
        assert_eq!(errors(true, skips(), skips()), "");
    }

    #[test]
    fn as_it_should_not_be() {
        let ok = || Some(Outcome::Ok);
        let fails = || Some(Outcome::NotOk("1 != 0".into()));
        let skips = || Some(Outcome::Skip("CONFIG_X".into()));
        for (expected, before, after, error) in [
            (true, ok(), ok(), "expected to fail"),
            (
                false,
                fails(),
                ok(),
                "fails on the unpatched kernel: 1 != 0",
            ),
            (false, ok(), fails(), "fails on the patched kernel: 1 != 0"),
            (true, fails(), fails(), "fails on the patched kernel"),
            (false, None, ok(), "did not run on the unpatched kernel"),
            (false, ok(), None, "did not run on the patched kernel"),
            (
                true,
                None,
                None,
                "did not run on the unpatched kernel; did not run on the patched",
            ),
            (true, skips(), ok(), "skipped on the unpatched kernel only"),
            (false, ok(), skips(), "skipped on the patched kernel only"),
        ] {
            let errors = errors(expected, before.clone(), after.clone());
            assert!(
                errors.contains(error),
                "{expected} {before:?} {after:?}: {errors}"
            );
        }
    }

    #[test]
    fn flushes() {
        let case = |requests: &[u64], kicks: &[u64]| {
            let steps = requests.iter().zip(kicks);
            let steps: Vec<_> = steps
                .map(|(requests, kicks)| {
                    serde_json::json!({"flush_requests_scan": requests, "flushes_scan": kicks})
                })
                .collect();
            serde_json::json!({"each_step": steps})
        };
        let errors = |unpatched: [&[u64]; 2], patched: [&[u64]; 2]| {
            let pair = Pair {
                unpatched: case(unpatched[0], unpatched[1]),
                patched: case(patched[0], patched[1]),
            };
            let judged = judge_flushes("case", &pair).into_iter();
            judged.map(|one| one.errors.len()).collect::<Vec<_>>()
        };
        assert_eq!(
            errors([&[1, 2, 1], &[1, 0, 1]], [&[3, 1, 2], &[2, 1, 2]]),
            [0, 0]
        );
        assert_eq!(errors([&[1, 1], &[1, 1]], [&[0, 0], &[0, 0]]), [0, 0]);
        assert_eq!(errors([&[1, 9], &[1, 9]], [&[2, 2], &[2, 2]]), [1, 0]);
        assert_eq!(errors([&[2, 2], &[1, 1]], [&[2, 4], &[3, 4]]), [0, 1]);
        assert_eq!(errors([&[1, 9], &[0, 1]], [&[2, 2], &[2, 2]]), [1, 1]);
        assert_eq!(errors([&[1, 1], &[0, 0]], [&[1, 2], &[1, 2]]), [0, 0]);
        assert!(errors([&[], &[]], [&[1], &[1]]).is_empty());
    }

    #[test]
    fn numbers() {
        let case = serde_json::json!({"a": 1234567, "b": 12, "c": 0, "each_step": [{"flush_requests_scan": 4}, {"flush_requests_scan": 3}]});
        assert_eq!(number(&case, "a"), "1,234,567");
        assert_eq!(number(&case, "b"), "12");
        assert_eq!(number(&case, "c"), "0");
        assert_eq!(number(&case, "d"), "-");
        assert_eq!(number(&case, LEAST_FLUSHES), "3");
    }
}
