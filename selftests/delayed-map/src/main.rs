// SPDX-License-Identifier: GPL-2.0
//! What NUMA balancing costs other CPUs for each page that it migrates: TLB shootdowns of processes whose memory lies on the far
//! node, and unmap calls of a VM.
//!
//! Writes `delayed-map.json` into the folder `--results` and prints KTAP, or with `--show` only reads such files. Changes the
//! machine's scan settings while it runs, for some cases also which huge pages there are, and fills the near node's memory.

mod counters;
mod processes;
mod show;
mod vm;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use guest::balancing::Settings;
use guest::ktap::{diagnostic, Ktap, Outcome};
use guest::memory::Backing;
use guest::needs::{self, Need};

use serde::{Deserialize, Serialize};

use processes::{Access, Pages, Process};
use show::{Boot, Values};

const NEEDS: &[Need] = &[
    needs::TWO_NODES,
    needs::NUMA_BALANCING,
    needs::SCAN_SETTINGS,
    needs::KPROBE_EVENTS,
    needs::THP,
];

/// What NUMA balancing costs other CPUs for each page that it migrates.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    how: How,
    /// Folder for results.
    #[arg(long, default_value = ".")]
    results: PathBuf,
    /// What the kernel is called in tables.
    #[arg(long, default_value = "this kernel")]
    kernel: String,
    /// How often each is measured.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Only these (more than once); all when none is named.
    #[arg(long, value_enum)]
    part: Vec<Part>,
    /// Measure nothing: print one table of these files.
    #[arg(long, num_args = 1.., value_name = "FILE")]
    show: Vec<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

/// How much is migrated, and for whom.
#[derive(Parser, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct How {
    /// Processes.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    processes: u32,
    /// Threads of each.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=14))]
    threads: u32,
    /// Memory of each process, or of the VM, in MiB; whole huge pages.
    #[arg(long, default_value_t = 48, value_parser = clap::value_parser!(u32).range(2..=65536))]
    memory: u32,
    /// What is free on the near node at first, in MiB.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(4..))]
    near_free: u32,
    /// How many scans of each process end before the rest of the near node is free.
    #[arg(long, default_value_t = 2)]
    scans: u64,
    /// Until so many percent of the memory have been migrated.
    #[arg(long, default_value_t = 80, value_parser = clap::value_parser!(u32).range(1..=100))]
    moved: u32,
    /// Milliseconds from one scan to the next.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(10..))]
    period: u32,
    /// The longest that may take, in seconds.
    #[arg(long, default_value_t = 120)]
    limit: u64,
}

impl How {
    /// Memory in bytes.
    fn bytes(&self) -> usize {
        (self.memory as usize) << 20
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(self.limit)
    }
}

#[derive(Subcommand)]
enum Command {
    /// One of the processes; started by this program.
    #[command(hide = true)]
    Process(Process),
}

/// Whose memory is migrated.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// That of processes.
    Processes,
    /// That of a VM.
    Vm,
}

/// What is measured at one time.
#[derive(Clone, Copy)]
enum Case {
    Processes(Pages, Access),
    Vm(Backing),
}

impl Case {
    const ALL: [Case; 7] = [
        Case::Processes(Pages::Base, Access::Uniform),
        Case::Processes(Pages::Base, Access::Skewed),
        Case::Processes(Pages::Folios, Access::Uniform),
        Case::Processes(Pages::Huge, Access::Uniform),
        Case::Vm(Backing::Anon),
        Case::Vm(Backing::Memfd),
        Case::Vm(Backing::Thp),
    ];

    fn name(self) -> String {
        match self {
            Case::Processes(pages, access) => format!("{}.{}", pages.name(), access.name()),
            Case::Vm(backing) => format!("vm.{}", backing.name()),
        }
    }

    fn part(self) -> Part {
        match self {
            Case::Processes(..) => Part::Processes,
            Case::Vm(_) => Part::Vm,
        }
    }

    fn missing(self) -> Option<String> {
        match self.part() {
            Part::Processes => needs::missing(NEEDS),
            Part::Vm => needs::missing(NEEDS.iter().chain([&needs::KVM, &needs::HIST_TRIGGERS])),
        }
    }

    fn measure(self, how: &How, round: u32) -> Result<Values> {
        let _settings = Settings::every(how.period)?;
        match self {
            Case::Processes(pages, access) => processes::measure(how, pages, access, round),
            Case::Vm(backing) => vm::measure(how, backing),
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.command {
        Some(Command::Process(process)) => process.run().map(|()| ExitCode::SUCCESS),
        None if args.show.is_empty() => run(&args),
        None => show(&args.show).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        match args.command {
            Some(_) => eprintln!("{error:#}"),
            None => diagnostic(&format!("{error:#}")),
        }
        ExitCode::FAILURE
    })
}

/// One table of what these files say.
fn show(files: &[PathBuf]) -> Result<()> {
    let read = |path: &PathBuf| -> Result<Boot> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        serde_json::from_str(&text)
            .with_context(|| format!("{}: not what delayed-map writes", path.display()))
    };
    let boots: Vec<Boot> = files.iter().map(read).collect::<Result<_>>()?;
    show::comparable(&boots)?;
    println!("{}\n\n{}", show::table(&boots), show::LEGEND);
    Ok(())
}

fn run(args: &Args) -> Result<ExitCode> {
    let is_asked = |case: &Case| args.part.is_empty() || args.part.contains(&case.part());
    let cases: Vec<Case> = Case::ALL.into_iter().filter(is_asked).collect();
    let memory = args.how.memory;
    ensure!(
        memory % 2 == 0,
        "--memory={memory}: huge pages are of 2 MiB"
    );
    let mut ktap = Ktap::start(cases.len());
    let mut boot = Boot {
        kernel: args.kernel.clone(),
        how: args.how.clone(),
        cases: BTreeMap::new(),
    };
    for case in cases {
        let rounds = boot.cases.entry(case.name()).or_default();
        let outcome = match case.missing() {
            Some(reason) => Outcome::Skip(reason),
            None => match measure(case, args, rounds) {
                Ok(()) => Outcome::Ok,
                Err(error) => Outcome::NotOk(format!("{error:#}")),
            },
        };
        ktap.result(&format!("delayed-map.{}.measured", case.name()), &outcome);
    }
    let path = args.results.join("delayed-map.json");
    fs::write(&path, serde_json::to_string_pretty(&boot)? + "\n")
        .with_context(|| path.display().to_string())?;
    diagnostic(&show::table(&[boot]).to_string());
    Ok(ktap.finish())
}

/// All rounds of one case; those that were complete also where a later one was not.
fn measure(case: Case, args: &Args, rounds: &mut Vec<Values>) -> Result<()> {
    for round in 1..=args.rounds {
        let name = case.name();
        diagnostic(&format!("round {round} of {}: {name}", args.rounds));
        rounds.push(case.measure(&args.how, round)?);
    }
    Ok(())
}
