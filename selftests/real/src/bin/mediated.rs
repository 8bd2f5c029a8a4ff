// SPDX-License-Identifier: GPL-2.0
//! A mediated device, whose pins come and go with what the guest does, while NUMA scans go over the VM's memory; changes the
//! machine's scan settings while it runs.
//!
//! A window of guest memory is pinned through iommufd's access interface and slides over all of it. First nothing happens at
//! the same time, so that the counts of each position are exact; then vCPUs sweep memory, scans go on, and the device copies
//! inside its window. In the end memory is taken from the device while it holds pins. Prints KTAP.

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use guest::access::{Access, Path};
use guest::balancing::{self, Settings, CPU_NODE, MEMORY_NODE};
use guest::ktap::{Ktap, Outcome};
use guest::memcg::{self, Memcg, Source};
use guest::memory::{Backing, GuestMemory, Pinned, HUGE_PAGE};
use guest::needs::{self, Need};
use guest::vm::{Sweep, Vm};
use guest::PAGE;

const ALL: &[Need] = &[
    needs::KVM,
    needs::TWO_NODES,
    needs::NUMA_BALANCING,
    needs::SCAN_SETTINGS,
    needs::MEMCG,
];
const BACKINGS: [Backing; 3] = [Backing::Anon, Backing::Memfd, Backing::Thp];
const VCPUS: usize = 2;
/// Bytes of guest memory that are pinned at a time.
const WINDOW: usize = HUGE_PAGE;
/// What the device writes at once: less than what lies between two tags of guest memory.
const LENGTH: usize = 48;
/// Where it writes in a page: behind the first tag.
const OFFSET: usize = 64;
const LIMIT: Duration = Duration::from_secs(120);

/// A mediated device, whose pins come and go, while NUMA scans go over the VM's memory.
#[derive(Parser)]
struct Args {
    /// Folder for results; this program leaves none.
    #[arg(long, default_value = ".")]
    results: PathBuf,
    /// Guest memory in MiB, a multiple of 2, of which 2 are pinned at a time.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(4..))]
    memory: u32,
    /// How often the window slides over all of it while vCPUs run.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Run this one case here and talk to the parent, in the memory cgroup `--memcg`.
    #[arg(long, hide = true, requires = "memcg")]
    child: Option<String>,
    #[arg(long, hide = true, requires = "child")]
    memcg: Option<PathBuf>,
}

/// What was seen of a case.
struct Seen {
    /// Of each position of the window, without anything else going on.
    positions: Vec<Position>,
    /// Pages that were not pinned meanwhile.
    unpinned: u64,
    /// Scans while vCPUs ran and the window slid.
    scans: u64,
    /// Copies of the device that did not arrive.
    lost: Vec<String>,
    /// Whether all else in guest memory is what it must be.
    contents: Result<(), String>,
    /// Pages hinted once memory was taken from the device, pages that could then be moved, and pages that there are.
    unmapped: (u64, u64, u64),
}

struct Position {
    hinted: u64,
    /// Pages that KVM had mapped before and no longer after.
    dropped: u64,
}

type Judge = fn(&Seen) -> Result<(), String>;
const TESTS: &[(&str, Judge)] = &[
    ("not_hinted", |seen| {
        each(seen, |one| one.hinted <= seen.unpinned)
    }),
    ("hinted_again", |seen| {
        each(seen, |one| one.hinted >= seen.unpinned)
    }),
    ("not_dropped", |seen| {
        each(seen, |one| one.dropped <= seen.unpinned)
    }),
    ("copies_arrive", |seen| match seen.lost.first() {
        None => Ok(()),
        Some(first) => Err(format!("{} lost, the first {first}", seen.lost.len())),
    }),
    ("memory_exact", |seen| seen.contents.clone()),
    ("unmapped_hinted", |seen| {
        let (hinted, _, pages) = seen.unmapped;
        all(hinted, pages, "hinted")
    }),
    ("unmapped_moves", |seen| {
        let (_, moved, pages) = seen.unmapped;
        all(moved, pages, "moved")
    }),
];

/// Whether it holds at each position of the window.
fn each(seen: &Seen, holds: impl Fn(&Position) -> bool) -> Result<(), String> {
    match seen.positions.iter().position(|one| !holds(one)) {
        None => Ok(()),
        Some(number) => {
            let Position { hinted, dropped } = seen.positions[number];
            Err(format!(
                "at position {number} of the window {hinted} pages hinted and {dropped} dropped, and {} are not pinned",
                seen.unpinned
            ))
        }
    }
}

fn all(count: u64, pages: u64, what: &str) -> Result<(), String> {
    match count == pages {
        true => Ok(()),
        false => Err(format!("{count} of {pages} pages {what}")),
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.child {
        Some(name) => run_child(name, &args).map(|()| ExitCode::SUCCESS),
        None => run(&args),
    };
    child::end(args.child.as_deref(), done)
}

fn run(args: &Args) -> Result<ExitCode> {
    let mut ktap = Ktap::start(BACKINGS.len() * TESTS.len());
    let missing = needs::missing(ALL).or_else(Access::missing);
    let settings = match &missing {
        None => {
            balancing::forbid_scans(CPU_NODE)?;
            Some(Settings::fast()?)
        }
        Some(_) => None,
    };
    for backing in BACKINGS {
        let name = backing.name();
        let thp = needs::missing((backing == Backing::Thp).then_some(&needs::THP));
        let tests = TESTS.iter().map(|(test, _)| *test);
        let (case, missing) = (format!("mediated.{name}"), missing.clone().or(thp));
        child::judge(&mut ktap, &case, tests, missing, |outcomes| {
            run_case(name, args, outcomes)
        });
    }
    drop(settings);
    Ok(ktap.finish())
}

fn run_case(name: &str, args: &Args, outcomes: &mut HashMap<String, Outcome>) -> Result<()> {
    let memcg = Memcg::create(&format!("mediated.{}.{name}", std::process::id()))?;
    let mut command = Command::new(std::env::current_exe().context("own program")?);
    command.args(["--child", name, "--memcg"]).arg(memcg.path());
    command.args(["--memory", &args.memory.to_string()]);
    command.args(["--rounds", &args.rounds.to_string()]);
    child::run::<()>(name, &mut command, outcomes).map(drop)
}

fn run_child(name: &str, args: &Args) -> Result<()> {
    let seen = measure(name.parse()?, args)?;
    child::progress(format!(
        "{name}: {} positions, {} scans while the vCPUs ran",
        seen.positions.len(),
        seen.scans
    ));
    for (test, judge) in TESTS {
        let outcome = match judge(&seen) {
            Ok(()) => Outcome::Ok,
            Err(why) => Outcome::NotOk(why),
        };
        child::outcome(test, outcome);
    }
    Ok(())
}

fn measure(backing: Backing, args: &Args) -> Result<Seen> {
    let path = args.memcg.as_ref().context("no memory cgroup")?;
    memcg::join(path)?;
    let source = Source::Memcg(path.clone());
    balancing::forbid_scans(CPU_NODE)?;
    balancing::set_affinity(&balancing::other_cpus(VCPUS)?)?;
    let size = (args.memory as usize) << 20;
    let memory = Arc::new(GuestMemory::new(backing, Pinned::None, size, MEMORY_NODE)?);
    let access = Access::new(&memory)?;
    let windows: Vec<Range<usize>> = (0..size)
        .step_by(WINDOW)
        .map(|start| start..start + WINDOW)
        .collect();
    let pages = memory.pages() as u64;
    let whole = Sweep {
        first: 0,
        stride: 1,
        count: memory.pages(),
    };
    let vm = Vm::new(&memory, &balancing::vcpu_cpus(VCPUS)?)?;
    let mapped = || -> Result<u64> { Ok(vm.stat("pages_4k")? + (vm.stat("pages_2m")? << 9)) };
    // A guest that has touched all of its memory is scanned while it does nothing.
    let scan = || -> Result<Position> {
        vm.pass(0, whole)?;
        let (before, mapped_before) = (source.read()?.pte_updates, mapped()?);
        vm.while_spinning(|| {
            balancing::enable(true)?;
            let scans = balancing::wait_for_scans(2, LIMIT);
            balancing::enable(false)?;
            scans
        })?;
        Ok(Position {
            hinted: source.read()?.pte_updates - before,
            dropped: mapped_before.saturating_sub(mapped()?),
        })
    };
    let mut positions = Vec::new();
    for window in &windows {
        let part = access.pin(window)?;
        positions.push(scan()?);
        access.unpin(part)?;
        child::progress(format!(
            "window {} of {size:#x}",
            format_args!("{window:#x?}")
        ));
    }

    let scanned_before = balancing::scan_seq()?;
    balancing::enable(true)?;
    let ran = vm.while_running(&[whole; VCPUS], || slide(&access, &windows, args.rounds));
    balancing::enable(false)?;
    let scans = balancing::scan_seq()? - scanned_before;
    let (lost, mut passes) = ran?;
    passes[0] += windows.len() as u64;
    let expected = passes
        .iter()
        .map(|count| vec![*count as u32; memory.pages()]);
    let contents = memory.verify(&expected.collect::<Vec<_>>());

    for window in &windows {
        access.pin(window)?;
    }
    access.unmap()?;
    let hinted = scan()?.hinted;
    memory.move_to(MEMORY_NODE)?;
    let moved = memory.nodes()?;
    let moved = moved.iter().filter(|node| **node == MEMORY_NODE as i32);
    Ok(Seen {
        positions,
        unpinned: pages - (WINDOW / PAGE) as u64,
        scans,
        lost,
        contents,
        unmapped: (hinted, moved.count() as u64, pages),
    })
}

/// Slides the window over all of guest memory, each time pinning what comes before unpinning what was. In each window the
/// device writes once a scan has come by, and reads after another. Says which copies did not arrive.
fn slide(access: &Access, windows: &[Range<usize>], rounds: u32) -> Result<Vec<String>> {
    let mut lost = Vec::new();
    let mut last = None;
    for (number, window) in (0..rounds).flat_map(|_| windows).enumerate() {
        let part = access.pin(window)?;
        if let Some(last) = last.replace(part) {
            access.unpin(last)?;
        }
        // A page of its own each time.
        let target = window.start + number * 8 % (WINDOW / PAGE) * PAGE + OFFSET;
        let text = format!("copy {number} of the device ");
        let text: Vec<u8> = text.into_bytes().into_iter().cycle().take(LENGTH).collect();
        let (to, from) = match number % 2 {
            0 => (Path::Pin, Path::User),
            _ => (Path::User, Path::Pin),
        };
        balancing::wait_for_scans(1, LIMIT)?;
        access.write(target, &text, to)?;
        balancing::wait_for_scans(1, LIMIT)?;
        if access.read(target, LENGTH, from)? != text {
            lost.push(format!("at {target:#x}"));
        }
        child::progress(format!("copy {number}, to {window:#x?}"));
    }
    last.map_or(Ok(()), |last| access.unpin(last))?;
    Ok(lost)
}
