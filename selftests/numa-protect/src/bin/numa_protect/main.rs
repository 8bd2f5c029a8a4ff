// SPDX-License-Identifier: GPL-2.0
//! What a NUMA scan does to a VM, for every kind of guest memory; changes the machine's scan settings while it runs.
//!
//! Prints KTAP; see `case.rs` for what is measured and `check.rs` for what is asserted. Each case runs in a process
//! of its own, in a memory cgroup of its own. Leaves in the folder `--results`: `numa_protect.json`, see [`Output`],
//! of each case, where the recorder is loaded, `CASE.records` (all its records) and `CASE.trace` (its readable trace of the
//! stepped part), and with `--events` `CASE.events`.

mod case;
mod check;
mod profile;

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use child::Message;
use clap::Parser;
use guest::balancing::{self, Settings, CPU_NODE};
use guest::ktap::{diagnostic, Ktap, Outcome};
use guest::memcg::Memcg;
use guest::memory::{Backing, Pinned};
use guest::needs::{self, Need};
use guest::pins::Holder;
use serde::Serialize;

use case::{Case, Figures, Layout};

/// What no case can do without.
const ALL: &[Need] = &[
    needs::KVM,
    needs::TWO_NODES,
    needs::NUMA_BALANCING,
    needs::SCAN_SETTINGS,
];

/// What `--profile` cannot do without.
const PROFILE: &[Need] = &[needs::KPROBE_EVENTS, needs::HIST_TRIGGERS];

/// What a NUMA scan does to a VM.
#[derive(Parser)]
struct Args {
    /// Folder for the results.
    #[arg(long, default_value = ".")]
    results: PathBuf,
    /// Guest memory in MiB, a multiple of 4.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(4..=2044))]
    memory: u32,
    /// Steps of one scan and one pass over guest memory that are counted; --profile takes four.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..))]
    steps: u32,
    /// Who pins the pinned parts: io_uring, or an assigned device, by VFIO's type1 or by iommufd.
    #[arg(long, default_value = "io_uring")]
    pins: Holder,
    /// How long the guest then runs with scans going on, in milliseconds, at the least.
    #[arg(long, default_value_t = 2000)]
    free_run: u64,
    /// Measure what the kernel spends on scans (CONFIG_KPROBE_EVENTS, CONFIG_HIST_TRIGGERS), instead of recording them.
    #[arg(long)]
    profile: bool,
    /// Also save what KVM unmapped and faulted in while the guest ran, as CASE.events, in the format of tracefs.
    #[arg(long)]
    events: bool,
    /// Only the cases whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Print the cases' names, and run none.
    #[arg(long)]
    list: bool,
    /// Run this one case here and talk to the parent; its memory cgroup, if it has one, is given by `--memcg`.
    #[arg(long, hide = true)]
    child: Option<String>,
    #[arg(long, hide = true, requires = "child")]
    memcg: Option<PathBuf>,
}

/// `numa_protect.json`.
#[derive(Serialize)]
struct Output {
    /// Name of the program.
    program: &'static str,
    /// Release of the kernel.
    kernel: String,
    /// Whether the recorder was loaded.
    recorder: bool,
    /// The cases that came to their end, in order.
    cases: Vec<Figures>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.child {
        Some(name) => run_child(name, &args).map(|()| ExitCode::SUCCESS),
        None => run(&args),
    };
    child::end(args.child.as_deref(), done)
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for backing in [Backing::Anon, Backing::Memfd, Backing::Thp] {
        for pinned in [Pinned::None, Pinned::Half, Pinned::Stripes, Pinned::All] {
            // Huge pages are pinned whole, as in Half.
            if (backing, pinned) != (Backing::Thp, Pinned::Stripes) {
                cases.push(Case {
                    backing,
                    pinned,
                    layout: Layout::Whole,
                });
            }
        }
        cases.push(Case {
            backing,
            pinned: Pinned::None,
            layout: Layout::TouchedHalf,
        });
    }
    cases.push(Case {
        backing: Backing::Anon,
        pinned: Pinned::None,
        layout: Layout::KsmAlternating,
    });
    cases
}

fn run(args: &Args) -> Result<ExitCode> {
    if args.memory % 4 != 0 {
        bail!("--memory {}: give a multiple of 4", args.memory);
    }
    let cases: Vec<Case> = cases()
        .into_iter()
        .filter(|case| case.name().contains(&args.only))
        .collect();
    if cases.is_empty() {
        bail!("no case's name contains {}", args.only);
    }
    if args.list {
        for case in cases {
            println!("{}", case.name());
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(reason) = args.profile.then(|| needs::missing(PROFILE)).flatten() {
        bail!("--profile: {reason}");
    }
    let mut ktap = Ktap::start(cases.iter().map(|case| check::tests(*case).len()).sum());
    let recorder = trace::client::is_loaded() && !args.profile;
    let settings = match needs::missing(ALL) {
        None => {
            // Where the whole machine has to be counted, this process at least adds nothing.
            balancing::forbid_scans(CPU_NODE)?;
            Some(Settings::fast()?)
        }
        Some(_) => None,
    };
    let mut figures = Vec::new();
    for case in cases {
        let name = case.name();
        let missing = needs::missing(ALL).or_else(|| missing_for(case, args.pins));
        child::judge(&mut ktap, &name, check::tests(case), missing, |outcomes| {
            figures.extend(run_case(case, args, outcomes)?);
            Ok(())
        });
    }
    drop(settings);
    let output = Output {
        program: "numa_protect",
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?
            .trim()
            .into(),
        recorder,
        cases: figures,
    };
    let path = args.results.join("numa_protect.json");
    std::fs::write(&path, serde_json::to_string_pretty(&output)? + "\n")
        .with_context(|| path.display().to_string())?;
    Ok(ktap.finish())
}

/// What this case cannot do without.
fn missing_for(case: Case, holder: Holder) -> Option<String> {
    let wanted = [
        (case.backing == Backing::Thp, &needs::THP),
        (case.layout == Layout::KsmAlternating, &needs::KSM),
    ];
    let missing = needs::missing(wanted.into_iter().filter(|one| one.0).map(|one| one.1));
    missing.or_else(|| match case.pinned {
        Pinned::None => None,
        _ => holder.missing(),
    })
}

/// Runs `case` in a process of its own and takes down what it says.
fn run_case(
    case: Case,
    args: &Args,
    outcomes: &mut HashMap<String, Outcome>,
) -> Result<Option<Figures>> {
    let name = case.name();
    let memcg = match Memcg::create(&format!("numa_protect.{}.{name}", std::process::id())) {
        Ok(memcg) => Some(memcg),
        Err(error) => {
            diagnostic(&format!(
                "{name}: counting the whole machine instead: {error:#}"
            ));
            None
        }
    };
    let mut command = Command::new(std::env::current_exe().context("own program")?);
    command.arg("--child").arg(&name);
    command.arg("--results").arg(&args.results);
    command.args(["--memory", &args.memory.to_string()]);
    command.args(["--pins", args.pins.name()]);
    command.args(["--steps", &args.steps.to_string()]);
    command.args(["--free-run", &args.free_run.to_string()]);
    if args.profile {
        command.arg("--profile");
    }
    if args.events {
        command.arg("--events");
    }
    if let Some(memcg) = &memcg {
        command.arg("--memcg").arg(memcg.path());
    }
    child::run(&name, &mut command, outcomes)
}

fn run_child(name: &str, args: &Args) -> Result<()> {
    let case = cases()
        .into_iter()
        .find(|case| case.name() == name)
        .with_context(|| format!("no case {name}"))?;
    let plan = case::Plan {
        case,
        holder: args.pins,
        memory: (args.memory as usize) << 20,
        steps: match args.profile {
            true => profile::STEPS,
            false => args.steps,
        },
        free_run: Duration::from_millis(args.free_run),
        results: args.results.clone(),
        memcg: args.memcg.clone(),
        profile: args.profile,
        events: args.events,
    };
    let measured = case::measure(&plan, child::progress)?;
    for (test, outcome) in check::judge(case, &measured) {
        child::outcome(test, outcome);
    }
    child::tell(&Message::Figures(Box::new(measured.figures)));
    Ok(())
}
