// SPDX-License-Identifier: GPL-2.0
//! mmu-notifier-trace: records what MMU notifiers tell of a process, shows it and checks it. Talks to the recorder through
//! its files in debugfs, and to tracefs for what a VM tells KVM; writes the files it is told to write, and standard output.
//!
//! `record` and `stat` need the module `mmu_notifier_trace` and root; `doctor` needs neither, the others only a file.

mod doctor;
mod record;
mod report;
mod slots;
mod stat;
mod timeline;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use trace::check::{self, Verdict};
use trace::saved;
use trace::sequence::Sequence;

/// Records what MMU notifiers tell of a process, shows it and checks it.
#[derive(Parser)]
#[command(name = "mmu-notifier-trace", version)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Record a process into a file, until it ends, or Ctrl-C
    Record(record::Options),
    /// Show a file: a line for each record, JSON, or a summary
    Report(report::Options),
    /// Show what is recorded of processes each second
    Stat(stat::Options),
    /// Look at the VMs of this machine: what is pinned, what scans cost, what to do
    Doctor(doctor::Options),
    /// Check that a file obeys the rules of MMU notifiers
    Check {
        /// What `record` wrote
        #[arg(default_value = record::FILE)]
        file: PathBuf,
    },
    /// Draw a file as an SVG: time to the right, addresses down
    Timeline(timeline::Options),
    /// Print a shell's completions
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the man pages, of the program and of each command
    Man {
        /// The folder to write them to
        folder: PathBuf,
    },
}

fn main() -> ExitCode {
    let done = match Args::parse().what {
        What::Record(options) => record::record(options),
        What::Report(options) => report::report(&options).map(|()| ExitCode::SUCCESS),
        What::Stat(options) => stat::stat(&options).map(|()| ExitCode::SUCCESS),
        What::Doctor(options) => doctor::doctor(&options).map(|()| ExitCode::SUCCESS),
        What::Check { file } => check(&file),
        What::Timeline(options) => timeline::timeline(&options).map(|()| ExitCode::SUCCESS),
        What::Completions { shell } => {
            let mut command = Args::command();
            let name = command.get_name().to_string();
            clap_complete::generate(shell, &mut command, name, &mut io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        What::Man { folder } => clap_mangen::generate_to(Args::command(), &folder)
            .with_context(|| folder.display().to_string())
            .map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        // Who reads the output, a pager for example, may have read enough.
        let gone = error.downcast_ref::<io::Error>().map(io::Error::kind);
        if gone == Some(io::ErrorKind::BrokenPipe) {
            return ExitCode::SUCCESS;
        }
        eprintln!("error: {error:#}");
        ExitCode::from(2)
    })
}

/// A rule, and what it says of a sequence.
type Rule = (&'static str, fn(&Sequence) -> Verdict);

const RULES: &[Rule] = &[
    ("no record is missing", check::complete),
    ("starts and ends belong together", check::balanced),
    (
        "reports are inside the pairs of scans",
        check::reports_inside_pairs,
    ),
    (
        "no pair has two reports, and each is whole",
        check::one_report_per_pair,
    ),
    (
        "stretches are sorted, disjoint and large enough",
        check::stretches_ordered,
    ),
];

/// Exits with 1 where a rule is broken.
fn check(file: &std::path::Path) -> Result<ExitCode> {
    let (about, sequence) = saved::read(file)?;
    let mut out = io::stdout().lock();
    let mut broken = 0;
    for (rule, verdict) in RULES {
        match verdict(&sequence) {
            Ok(()) => writeln!(out, "ok: {rule}")?,
            Err(violation) => {
                broken += 1;
                writeln!(out, "broken: {rule}: {violation}")?;
            }
        }
    }
    let (records, pairs, reports) = (
        sequence.records.len(),
        sequence.pairs.len(),
        sequence.reports.len(),
    );
    writeln!(
        out,
        "{records} records of {}: {pairs} pairs, {reports} reports",
        about.command
    )?;
    out.flush().context("standard output")?;
    Ok(ExitCode::from(u8::from(broken > 0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Args::command().debug_assert();
    }
}
