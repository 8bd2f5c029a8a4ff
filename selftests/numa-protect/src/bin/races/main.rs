// SPDX-License-Identifier: GPL-2.0
//! NUMA hint scans against everything else that changes a VM's memory; changes settings of the machine while it runs,
//! and what is on its RAM disks.
//!
//! Prints KTAP; see `case.rs` for how a case runs, `operation.rs` for what is done, `disturb.rs` for how, and `check.rs`
//! for what is asserted. What is done is a function of the seed, which is printed: `--seed` replays it, as far as
//! threads can be replayed. To soak, let each case do more (`--scans`, `--operations`) and oftener (`--rounds`, each
//! with a seed of its own).

mod case;
mod check;
mod disturb;
mod machine;
mod operation;
mod userfault;

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use clap::Parser;
use guest::balancing::{self, Settings, CPU_NODE};
use guest::ktap::{diagnostic, Ktap, Outcome};
use guest::memcg::Memcg;
use guest::memory::Backing::{Anon, Memfd, Thp};
use guest::needs::{self, Need};

use case::{Case, Plan};
use machine::Swap;
use operation::{Kind, Random};
use userfault::Protection;

const BALANCING: &str = "/sys/kernel/debug/sched/numa_balancing";
const KSM: &str = "/sys/kernel/mm/ksm";
const KHUGEPAGED: &str = "/sys/kernel/mm/transparent_hugepage/khugepaged";

/// What no case can do without.
const ALL: &[Need] = &[
    needs::KVM,
    needs::TWO_NODES,
    needs::NUMA_BALANCING,
    needs::SCAN_SETTINGS,
    needs::MEMCG,
    needs::THP,
];

/// NUMA hint scans against everything else that changes a VM's memory.
#[derive(Parser)]
struct Args {
    /// Folder for the results; nothing is left there.
    #[arg(long, default_value = ".")]
    results: PathBuf,
    /// What the operations are drawn from; random if not given.
    #[arg(long)]
    seed: Option<u64>,
    /// Guest memory in MiB, a multiple of 4.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(4..=256))]
    memory: u32,
    /// Whole scans in each case, at the least.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    scans: u64,
    /// Operations of each of its two disturbing threads, at the least.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    operations: u64,
    /// The longest that both may take, in seconds: only to end what hangs.
    #[arg(long, default_value_t = 300)]
    limit: u64,
    /// How often each case is run, with another seed each time.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Time from one scan to the next in milliseconds, if nothing delays it.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(10..=100))]
    period: u32,
    /// Only the cases whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Run this one case here and talk to the parent, in the memory cgroup `--memcg`.
    #[arg(long, hide = true, requires = "memcg", requires = "seed")]
    child: Option<String>,
    #[arg(long, hide = true, requires = "child")]
    memcg: Option<PathBuf>,
}

/// A case of one kind is named after it.
const fn single(
    name: &'static str,
    kind: &'static [Kind],
    backings: &'static [guest::memory::Backing],
) -> Case {
    Case {
        name,
        kinds: kind,
        backings,
    }
}

const CASES: &[Case] = &[
    single("unmap", &[Kind::Unmap], &[Memfd]),
    single("mprotect", &[Kind::Protect], &[Anon, Memfd, Thp]),
    single("discard", &[Kind::Discard], &[Memfd]),
    single("pageout", &[Kind::PageOut], &[Anon, Memfd]),
    single("huge", &[Kind::Huge], &[Thp]),
    single("ksm", &[Kind::Merge], &[Anon]),
    single("fork", &[Kind::Fork], &[Anon, Thp]),
    single("uffd_wp", &[Kind::UserWriteProtect], &[Anon, Thp]),
    single(
        "uffd_rwp",
        &[Kind::UserReadWriteProtect],
        &[Anon, Memfd, Thp],
    ),
    single("slots", &[Kind::Slot], &[Anon, Memfd, Thp]),
    single("dirty_log", &[Kind::DirtyLog], &[Anon, Memfd, Thp]),
    single("pin", &[Kind::Pin], &[Anon, Memfd, Thp]),
    single("migrate", &[Kind::Migrate], &[Anon, Memfd, Thp]),
    single("teardown", &[Kind::Machine], &[Anon, Memfd, Thp]),
    single("two_vms", &[Kind::SecondMachine], &[Anon, Memfd, Thp]),
    Case {
        name: "all",
        kinds: &[
            Kind::Migrate,
            Kind::Discard,
            Kind::Unmap,
            Kind::Protect,
            Kind::PageOut,
            Kind::Huge,
            Kind::Fork,
            Kind::UserWriteProtect,
            Kind::UserReadWriteProtect,
            Kind::Slot,
            Kind::DirtyLog,
            Kind::Pin,
            Kind::Machine,
            Kind::SecondMachine,
        ],
        backings: &[Anon, Memfd, Thp],
    },
];

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.child {
        Some(name) => run_child(name, &args).map(|()| ExitCode::SUCCESS),
        None => run(&args),
    };
    child::end(args.child.as_deref(), done)
}

fn run(args: &Args) -> Result<ExitCode> {
    if args.memory % 4 != 0 {
        bail!("--memory {}: give a multiple of 4", args.memory);
    }
    let cases: Vec<Case> = CASES
        .iter()
        .filter(|case| case.name.contains(&args.only))
        .copied()
        .collect();
    if cases.is_empty() {
        bail!("no case's name contains {}", args.only);
    }
    let seed = match args.seed {
        Some(seed) => seed,
        None => random_seed()?,
    };
    let mut ktap = Ktap::start(
        cases
            .iter()
            .map(|case| check::tests(case.kinds).len())
            .sum(),
    );
    diagnostic(&format!("--seed {seed}"));
    let settings = match needs::missing(ALL) {
        None => {
            balancing::forbid_scans(CPU_NODE)?;
            let settings = Settings::fast()?;
            // In the kernel, the size bounds the period from below.
            let fastest = machine::Settings::replace(&[
                (
                    &format!("{BALANCING}/scan_size_mb"),
                    &args.memory.to_string(),
                ),
                (
                    &format!("{BALANCING}/scan_period_min_ms"),
                    &args.period.to_string(),
                ),
                (
                    &format!("{BALANCING}/scan_period_max_ms"),
                    &args.period.to_string(),
                ),
            ])?;
            // Put back in this order.
            Some((fastest, settings))
        }
        Some(_) => None,
    };
    for case in cases {
        let outcomes = match needs::missing(ALL).or_else(|| missing_for(case)) {
            Some(reason) => every(case, Outcome::Skip(reason)),
            None => soak(case, args, seed),
        };
        for test in check::tests(case.kinds) {
            ktap.result(&format!("races.{}.{test}", case.name), &outcomes[test]);
        }
    }
    drop(settings);
    Ok(ktap.finish())
}

fn random_seed() -> Result<u64> {
    let mut seed = [0u8; 4];
    // SAFETY: the kernel writes as many bytes as said.
    let got = unsafe { libc::getrandom(seed.as_mut_ptr().cast(), seed.len(), 0) };
    if got != seed.len() as isize {
        return Err(std::io::Error::last_os_error()).context("getrandom()");
    }
    Ok(u32::from_ne_bytes(seed).into())
}

fn every(case: Case, outcome: Outcome) -> HashMap<String, Outcome> {
    let tests = check::tests(case.kinds).into_iter();
    tests.map(|test| (test.into(), outcome.clone())).collect()
}

/// Runs `case` as often as asked, with a seed for each round, until a test fails. The first round has the seed given.
fn soak(case: Case, args: &Args, seed: u64) -> HashMap<String, Outcome> {
    let mut seeds = Random::new(seed, 0);
    let mut seed = seed;
    let mut outcomes = HashMap::new();
    for round in 1..=args.rounds {
        let mut heard = HashMap::new();
        let rest = match run_case(case, args, seed, &mut heard) {
            Ok(()) => Outcome::NotOk("not judged".into()),
            Err(error) => Outcome::NotOk(format!("{error:#}")),
        };
        outcomes = every(case, rest);
        outcomes.extend(heard);
        if outcomes
            .values()
            .any(|one| matches!(one, Outcome::NotOk(_)))
        {
            diagnostic(&format!(
                "{}: to replay round {round}: --seed {seed} --only {}",
                case.name, case.name
            ));
            break;
        }
        seed = seeds.next() >> 32;
    }
    outcomes
}

/// What this case cannot do without.
fn missing_for(case: Case) -> Option<String> {
    let missing = |kind: &Kind| match kind {
        Kind::PageOut if !Swap::is_there() => {
            Some("no RAM disk: needs CONFIG_SWAP and CONFIG_BLK_DEV_RAM".into())
        }
        Kind::Merge => needs::missing([&needs::KSM]),
        Kind::UserWriteProtect if !userfault::is_there(Protection::Write) => {
            Some("no write protection: needs CONFIG_USERFAULTFD".into())
        }
        Kind::UserReadWriteProtect if !userfault::is_there(Protection::ReadWrite) => {
            Some("no read-write protection: needs CONFIG_USERFAULTFD_RWP".into())
        }
        Kind::Pin => needs::missing([&needs::IO_URING]),
        _ => None,
    };
    case.kinds.iter().find_map(missing)
}

/// Runs `case` in a process of its own and takes down what it says.
fn run_case(
    case: Case,
    args: &Args,
    seed: u64,
    outcomes: &mut HashMap<String, Outcome>,
) -> Result<()> {
    let has = |kind| case.kinds(seed).contains(&kind);
    let swap = has(Kind::PageOut) || has(Kind::Huge);
    let _swap = match swap && Swap::is_there() {
        true => Some(Swap::on()?),
        false => None,
    };
    let mut settings = Vec::new();
    if has(Kind::Merge) {
        for (name, value) in [
            ("smart_scan", "0"),
            ("sleep_millisecs", "5"),
            ("pages_to_scan", "256"),
            ("run", "1"),
        ] {
            settings.push((format!("{KSM}/{name}"), value));
        }
    }
    if has(Kind::Huge) {
        for name in ["scan_sleep_millisecs", "alloc_sleep_millisecs"] {
            settings.push((format!("{KHUGEPAGED}/{name}"), "10"));
        }
    }
    let settings: Vec<(&str, &str)> = settings
        .iter()
        .map(|(path, value)| (&path[..], *value))
        .collect();
    let _settings = machine::Settings::replace(&settings)?;
    let memcg = Memcg::create(&format!("races.{}.{}", std::process::id(), case.name))?;
    let mut command = Command::new(std::env::current_exe().context("own program")?);
    command.args(["--child", case.name, "--memcg"]);
    command.arg(memcg.path());
    for (name, value) in [
        ("--seed", seed),
        ("--memory", args.memory.into()),
        ("--scans", args.scans),
        ("--operations", args.operations),
        ("--limit", args.limit),
    ] {
        command.arg(name).arg(value.to_string());
    }
    child::run::<()>(case.name, &mut command, outcomes).map(drop)
}

fn run_child(name: &str, args: &Args) -> Result<()> {
    let case = CASES.iter().find(|case| case.name == name);
    let plan = Plan {
        case: *case.with_context(|| format!("no case {name}"))?,
        seed: args.seed.context("no seed")?,
        memory: (args.memory as usize) << 20,
        scans: args.scans,
        operations: args.operations,
        limit: Duration::from_secs(args.limit),
        memcg: args.memcg.clone().context("no memory cgroup")?,
    };
    let backing = plan.case.backing(plan.seed).name();
    child::progress(format!("{name}: {backing} memory"));
    let measured = case::run(&plan, child::progress)?;
    let seen: Vec<String> = measured
        .evidence
        .iter()
        .filter(|(_, times)| **times > 0)
        .map(|(what, times)| format!("{what} {times}"))
        .collect();
    child::progress(format!(
        "{name}: {} passes under {} scans, {} pages hinted, {} records; {}",
        measured.passes,
        measured.scans,
        measured.hinted,
        measured
            .recording
            .as_ref()
            .map_or(0, |one| one.full.0.records.len()),
        seen.join(", ")
    ));
    for (test, outcome) in check::judge(&measured) {
        child::outcome(test, outcome);
    }
    Ok(())
}
