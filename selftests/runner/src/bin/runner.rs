// SPDX-License-Identifier: GPL-2.0
//! The host's command: boots a kernel with the tests, compares two, tries mutants. Writes where its arguments say.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use runner::{boot, compare, designs, mutants, report, same};

#[derive(Parser)]
#[command(about = "Boots kernels with the tests and compares them")]
struct Arguments {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Subcommand)]
enum Subcommands {
    /// Boot one kernel and run the tests in it
    Boot(boot::Options),
    /// Hold the patched kernel's results against the unpatched one's, print the table
    Compare(compare::Options),
    /// Run the same cells on several kernels, round by round, and compare what scans cost
    Designs(designs::Options),
    /// Draw what that measured
    Report(report::Options),
    /// Hold the kernel's own tests on two kernels against each other
    Same(same::Options),
    /// Boot a kernel with one rule broken at a time and see whether the tests notice
    Mutants(mutants::Options),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Subcommands::Boot(options) => boot::boot(&options),
        Subcommands::Compare(options) => compare::compare(&options),
        Subcommands::Designs(options) => designs::designs(&options),
        Subcommands::Report(options) => report::report(&options),
        Subcommands::Same(options) => same::same(&options),
        Subcommands::Mutants(options) => mutants::mutants(&options),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
