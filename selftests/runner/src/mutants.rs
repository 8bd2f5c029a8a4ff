// SPDX-License-Identifier: GPL-2.0
//! Boots a kernel in which one rule at a time is broken on purpose, and looks whether the tests notice. Prints KTAP, one
//! result a mutant; writes the results folders of its boots, and nothing else.
//!
//! A mutant is caught when each test named for it failed, no other did, and the kernel reported what it was said to
//! report, and nothing else. What was judged before for the same kernel, programs and specification is not run again.

use std::fs;
use std::path::PathBuf;

use anyhow::{ensure, Context, Result};
use clap::Args;
use glob::Pattern;
use serde::{Deserialize, Serialize};

use crate::boot::{self, Boot};
use crate::ktap::Outcome;

/// What to boot, and where the mutants are described.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// The mutants, see selftests/numa-protect/mutants.toml
    #[arg(long)]
    pub spec: PathBuf,
    /// Only this mutant (can be given more than once)
    #[arg(long = "mutant", value_name = "NAME")]
    pub names: Vec<String>,
    /// The boots. --results is the folder of the mutants' results folders; programs and --name come from the mutants
    #[command(flatten)]
    pub boot: boot::Options,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    mutant: Vec<Mutant>,
}

/// One broken rule and what must notice it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Mutant {
    /// The value of `numa_mutant=` on the kernel's command line, unless it is the recorder that is broken.
    name: String,
    /// The number that the recorder has for it.
    recorder: Option<u8>,
    /// What it breaks.
    breaks: String,
    #[serde(flatten)]
    expected: Expected,
}

/// A boot and what must come of it.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Expected {
    /// More for the kernel's command line.
    #[serde(default)]
    pub append: String,
    /// The programs to run, `NAME` or `NAME,ARG,...`.
    pub tests: Vec<String>,
    /// Tests of which each must fail; `*` stands for any text, and then for at least one test.
    #[serde(default)]
    pub fails: Vec<String>,
    /// Tests that may fail in consequence.
    #[serde(default)]
    pub may_fail: Vec<String>,
    /// What the first line of the kernel's report must contain.
    pub report: Option<String>,
}

/// The outcome of one mutant, kept as `verdict.json` in its results folder.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Verdict {
    /// Of kernel, programs and specification.
    key: String,
    /// Whether it was caught, or for a control, whether nothing failed.
    good: bool,
    /// What caught it, or what is wrong.
    why: String,
}

/// Boots each mutant and judges it. False if one was not caught.
pub fn mutants(options: &Options) -> Result<bool> {
    let path = &options.spec;
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let spec: Spec = toml::from_str(&text).with_context(|| path.display().to_string())?;
    for name in &options.names {
        let known = spec.mutant.iter().any(|mutant| mutant.name == *name);
        ensure!(known, "{}: no mutant {name}", path.display());
    }
    let wanted =
        |mutant: &&Mutant| options.names.is_empty() || options.names.contains(&mutant.name);
    let chosen: Vec<&Mutant> = spec.mutant.iter().filter(wanted).collect();

    println!("KTAP version 1\n1..{}", chosen.len());
    let mut good = true;
    for (number, mutant) in (1..).zip(chosen) {
        let verdict = run(options, mutant)?;
        let not = if verdict.good { "" } else { "not " };
        println!("# {}: {}", mutant.breaks, verdict.why);
        println!("{not}ok {number} mutants.{}", mutant.name);
        good &= verdict.good;
    }
    Ok(good)
}

fn run(options: &Options, mutant: &Mutant) -> Result<Verdict> {
    let results = options.boot.results.join(&mutant.name);
    let place = options
        .boot
        .results
        .join(format!("{}.verdict", mutant.name));
    let key = key(options, mutant)?;
    let earlier = fs::read_to_string(&place)
        .ok()
        .and_then(|text| serde_json::from_str::<Verdict>(&text).ok());
    if let Some(verdict) = earlier.filter(|verdict| verdict.key == key) {
        return Ok(verdict);
    }
    fs::create_dir_all(&options.boot.results)?;
    // Whether the boot as a whole is good is part of what is judged here.
    boot::boot(&boot::Options {
        name: mutant.name.clone(),
        results: results.clone(),
        append: [
            &options.boot.append,
            &mutant.expected.append,
            &match mutant.recorder {
                Some(number) => format!("mmu_notifier_trace.mutant={number}"),
                None => format!("numa_mutant={}", mutant.name),
            },
        ]
        .map(|one| &one[..])
        .join(" "),
        programs: mutant.expected.tests.clone(),
        ..options.boot.clone()
    })?;
    let (_, boot) = boot::outcome(&results)?;
    let (good, why) = match judge(&mutant.expected, &boot) {
        Ok(why) => (true, why),
        Err(why) => (false, why),
    };
    let verdict = Verdict { key, good, why };
    fs::write(&place, serde_json::to_vec_pretty(&verdict)?)?;
    Ok(verdict)
}

/// Says what a verdict depends on.
fn key(options: &Options, mutant: &Mutant) -> Result<String> {
    Ok(format!(
        "{}; {}; {}",
        boot::build_of(&options.boot.kernel)?,
        boot::build_of(&options.boot.initrd)?,
        serde_json::to_string(mutant)?
    ))
}

/// What was noticed, all that was expected, or what was not.
pub(crate) fn judge(expected: &Expected, boot: &Boot) -> Result<String, String> {
    let patterns = |texts: &[String]| -> Result<Vec<Pattern>, String> {
        let parse = |text: &String| Pattern::new(text).map_err(|error| format!("{text}: {error}"));
        texts.iter().map(parse).collect()
    };
    let (fails, may_fail) = (patterns(&expected.fails)?, patterns(&expected.may_fail)?);
    let mut noticed = Vec::new();
    match (&expected.report, &boot.splat, &boot.failure) {
        (None, None, None) => {}
        (Some(wanted), Some(splat), _) if splat.title.contains(wanted) => {
            noticed.push(format!("`{}` in the kernel log", splat.title));
        }
        (Some(wanted), Some(splat), _) => {
            return Err(format!("reports `{}` instead of `{wanted}`", splat.title));
        }
        (Some(wanted), None, _) => return Err(format!("survives: no report of `{wanted}`")),
        (None, Some(splat), _) => return Err(format!("the kernel reports `{}`", splat.title)),
        (None, None, Some(failure)) => return Err(failure.clone()),
    }
    let tests = || {
        boot.programs
            .iter()
            .flat_map(|program| &program.report.tests)
    };
    let failed: Vec<&str> = tests()
        .filter(|test| matches!(test.outcome, Outcome::NotOk(_)))
        .map(|test| test.name.as_str())
        .collect();
    // After a report the programs need not have come to their end.
    if expected.report.is_none() {
        for program in &boot.programs {
            if let Some(problem) = program.report.problems.first() {
                return Err(format!("{}: {problem}", program.name));
            }
        }
    }
    for pattern in &fails {
        if !tests().any(|test| pattern.matches(&test.name)) && expected.report.is_none() {
            return Err(format!("no test {pattern} was run"));
        }
        if !failed.iter().any(|name| pattern.matches(name)) {
            return Err(format!("survives: {pattern} did not fail"));
        }
    }
    let unrelated = failed
        .iter()
        .find(|name| !fails.iter().chain(&may_fail).any(|one| one.matches(name)));
    if let Some(name) = unrelated {
        return Err(format!("{name} failed, too"));
    }
    if !tests().any(|test| matches!(test.outcome, Outcome::Ok))
        && fails.is_empty()
        && expected.report.is_none()
    {
        return Err("no test passed".into());
    }
    if !failed.is_empty() {
        noticed.push(failed.join(", "));
    }
    Ok(match noticed.is_empty() {
        true => "nothing broken, nothing failed".into(),
        false => format!("caught by {}", noticed.join(" and ")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::{Accel, Program};
    use crate::ktap::{Report, Test};
    use crate::marker::Status;
    use crate::splat::Splat;

    fn expected(fails: &[&str], report: Option<&str>) -> Expected {
        Expected {
            append: String::new(),
            tests: vec!["p".into()],
            fails: fails.iter().map(|one| one.to_string()).collect(),
            may_fail: vec!["a.also".into()],
            report: report.map(str::to_string),
        }
    }

    fn boot(failed: &[&str], passed: &[&str], splat: Option<&str>) -> Boot {
        let test = |name: &&str, outcome| Test {
            name: name.to_string(),
            outcome,
        };
        let failed = failed
            .iter()
            .map(|name| test(name, Outcome::NotOk("x".into())));
        let passed = passed.iter().map(|name| test(name, Outcome::Ok));
        Boot {
            name: "one".into(),
            accel: Accel::Tcg,
            seconds: 1.0,
            programs: vec![Program {
                name: "p".into(),
                status: Some(Status::Exit(1)),
                report: Report {
                    tests: failed.chain(passed).collect(),
                    problems: vec![],
                },
            }],
            failure: splat.map(|_| "the kernel printed a report".into()),
            splat: splat.map(|title| Splat {
                line: 1,
                title: title.into(),
                text: vec![],
            }),
        }
    }

    #[test]
    fn a_mutant_is_caught_by_what_is_named_and_nothing_else() {
        let wanted = expected(&["a.*.x"], None);
        assert!(judge(&wanted, &boot(&["a.1.x"], &["a.2.x"], None)).is_ok());
        assert!(judge(&wanted, &boot(&["a.1.x", "a.also"], &[], None)).is_ok());
        let why = |boot| judge(&wanted, &boot).unwrap_err();
        assert!(why(boot(&[], &["a.1.x"], None)).contains("survives"));
        assert!(why(boot(&[], &["b"], None)).contains("was run"));
        assert!(why(boot(&["a.1.x", "b"], &[], None)).contains("b failed, too"));
        assert!(why(boot(&["a.1.x"], &[], Some("WARNING: y"))).contains("WARNING: y"));
        let mut silent = boot(&["a.1.x"], &[], None);
        silent.failure = Some("hangs".into());
        assert!(why(silent).contains("hangs"));
        let mut cut = boot(&["a.1.x"], &[], None);
        cut.programs[0].report.problems.push("no plan".into());
        assert!(why(cut).contains("no plan"));
    }

    #[test]
    fn a_report_has_to_be_the_one_that_was_named() {
        let wanted = expected(&[], Some("unflushed"));
        assert!(judge(&wanted, &boot(&[], &["a"], Some("WARNING: unflushed"))).is_ok());
        let why = |boot| judge(&wanted, &boot).unwrap_err();
        assert!(why(boot(&[], &["a"], Some("BUG: x"))).contains("instead"));
        assert!(why(boot(&[], &["a"], None)).contains("survives"));
    }

    #[test]
    fn a_control_fails_when_anything_does() {
        let control = expected(&[], None);
        assert!(judge(&control, &boot(&[], &["a"], None)).is_ok());
        assert!(judge(&control, &boot(&["a"], &["b"], None)).is_err());
        assert!(judge(&control, &boot(&[], &[], None)).is_err());
        assert!(judge(&control, &boot(&[], &["a"], Some("BUG: x"))).is_err());
    }

    #[test]
    fn an_unknown_field_is_refused() {
        let text = "[[mutant]]\nname = 'x'\nbreaks = 'y'\ntests = []\n";
        assert!(toml::from_str::<Spec>(text).is_ok());
        let why = toml::from_str::<Spec>(&format!("{text}mayfail = []\n")).err();
        assert!(why.unwrap().to_string().contains("mayfail"));
    }

    #[test]
    fn the_specification_is_read() {
        let text = include_str!("../../numa-protect/mutants.toml");
        let spec: Spec = toml::from_str(text).unwrap();
        for mutant in &spec.mutant {
            let control = mutant.name.starts_with("none");
            assert_eq!(
                control,
                mutant.expected.fails.is_empty() && mutant.expected.report.is_none(),
                "{}",
                mutant.name
            );
        }
    }
}
