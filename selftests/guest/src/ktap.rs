// SPDX-License-Identifier: GPL-2.0
//! Results in KTAP version 1 (Documentation/dev-tools/ktap.rst); writes to standard output only.

use std::io::Write;
use std::process::ExitCode;

/// The outcome of one test.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It held.
    Ok,
    /// It did not hold, and why.
    NotOk(String),
    /// It could not be tried, and what is missing.
    Skip(String),
}

/// A run of tests, each printed as soon as it is known.
pub struct Ktap {
    planned: usize,
    printed: usize,
    failed: usize,
    skipped: usize,
}

impl Ktap {
    /// Prints the version and the plan of `planned` tests.
    pub fn start(planned: usize) -> Ktap {
        emit(&format!("KTAP version 1\n1..{planned}"));
        Ktap {
            planned,
            printed: 0,
            failed: 0,
            skipped: 0,
        }
    }

    /// Prints one result. The reason of a failure goes before it, as a diagnostic line.
    pub fn result(&mut self, name: &str, outcome: &Outcome) {
        self.printed += 1;
        let number = self.printed;
        match outcome {
            Outcome::Ok => emit(&format!("ok {number} {name}")),
            Outcome::Skip(reason) => {
                self.skipped += 1;
                emit(&format!("ok {number} {name} # SKIP {}", one_line(reason)));
            }
            Outcome::NotOk(reason) => {
                self.failed += 1;
                diagnostic(&format!("{name}: {reason}"));
                emit(&format!("not ok {number} {name}"));
            }
        }
    }

    /// The exit status: 0 passed, 1 failed (or not all planned tests ran), 4 all skipped.
    pub fn finish(self) -> ExitCode {
        let (planned, printed) = (self.planned, self.printed);
        let (failed, skipped) = (self.failed, self.skipped);
        diagnostic(&format!(
            "Totals: pass:{} fail:{failed} skip:{skipped}",
            printed - failed - skipped
        ));
        if failed > 0 || printed != planned {
            ExitCode::from(1)
        } else if skipped == planned {
            ExitCode::from(4)
        } else {
            ExitCode::SUCCESS
        }
    }
}

/// Prints diagnostic lines.
pub fn diagnostic(text: &str) {
    for line in text.lines() {
        emit(&format!("# {line}"));
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A reader that went away is no reason to stop in the middle of a measurement.
fn emit(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}
