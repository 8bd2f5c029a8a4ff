// SPDX-License-Identifier: GPL-2.0
//! On which node KVM's page tables are, with guest memory on node 1 and vCPUs on node 0; writes `placement.json` into the
//! folder `--results`, and has the kernel fold its counters of pages.
//!
//! The kernel counts page tables of KVM by node (`SecPageTables` in each node's meminfo). Nothing else makes any on this
//! machine while a case runs, so what a VM adds is its own. NUMA balancing is off meanwhile. Prints KTAP.

mod full;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{ensure, Context, Result};
use clap::Parser;
use guest::balancing::{self, Settings, CPU_NODE, MEMORY_NODE};
use guest::ktap::{diagnostic, Ktap, Outcome};
use guest::memory::{Backing, GuestMemory, Pinned};
use guest::needs::{self, Need};
use guest::vm::{self, Clearing, Sweep, Vm};
use serde::Serialize;

const ALL: &[Need] = &[
    needs::KVM,
    needs::TWO_NODES,
    needs::NUMA_BALANCING,
    needs::SCAN_SETTINGS,
];
const VCPUS: usize = 2;
/// Entries of a page table, and so base pages that a leaf table maps.
const ENTRIES: u64 = 512;
/// Share of leaf tables that has to be where the memory is, in percent: at first, and after it was moved.
const PLACED: u64 = 99;
const FOLLOWED: u64 = 95;
/// Page tables above the leaves: four levels or five, a root for ordinary mode and one for SMM, with one table each on a
/// level for every GiB of the few that there are.
const ABOVE: u64 = 16;

/// On which node KVM's page tables are.
#[derive(Parser)]
struct Args {
    /// Folder for results.
    #[arg(long, default_value = ".")]
    results: PathBuf,
    /// Guest memory in MiB, a multiple of 2.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(64..=1024))]
    memory: u32,
}

/// What the VM's memory is made of, and whether its page tables are wanted where that is.
#[derive(Clone, Copy)]
struct Case {
    backing: Backing,
    asked: bool,
}

/// Page tables on the node of the vCPUs, and on that of the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct Tables {
    cpu_node: u64,
    memory_node: u64,
}

/// What a case came to. Page tables are those that the VM has.
#[derive(Clone, Debug, Serialize)]
struct Seen {
    name: String,
    /// Leaf tables that the memory needs.
    leaves: u64,
    /// After the first touch; of huge pages, after they were split for dirty logging.
    first: Tables,
    /// Of huge pages: when dirty logging had ended, and the guest had touched all again.
    merged: Option<Tables>,
    /// After all memory had moved to the node of the vCPUs, and was touched again.
    moved: Tables,
    /// Faults that were taken again, until the first count.
    retries: u64,
    /// Page tables of faults that were elsewhere than wanted, and those replaced; none where the kernel does not count them.
    remote: Option<u64>,
    replaced: Option<u64>,
    /// Page tables that were left when the VM was gone.
    left: u64,
}

type Judge = fn(&Seen) -> Result<(), String>;
/// Tests of a VM that asked, and of one that did not.
const ASKED: &[(&str, Judge)] = &[
    ("placed", |seen| {
        share("on node 1", seen.first.memory_node, seen.leaves, PLACED)
    }),
    ("followed", |seen| {
        share("on node 0", seen.moved.cpu_node, seen.leaves, FOLLOWED)
    }),
    ("counted", |seen| match (seen.remote, seen.replaced) {
        // Tables of huge pages are made anew when they are split.
        (Some(0), Some(_)) if seen.merged.is_some() => Ok(()),
        (Some(0), Some(replaced)) => share("replaced", replaced, seen.leaves, FOLLOWED),
        other => Err(format!("(remote, replaced) is {other:?}")),
    }),
    ("bounded", bounded),
];
/// Those of page tables that are replaced.
const FOLLOWING: [&str; 2] = ["followed", "counted"];
const NOT_ASKED: &[(&str, Judge)] = &[
    ("as_ever", |seen| {
        share("on node 0", seen.first.cpu_node, seen.leaves, PLACED)?;
        share("on node 0", seen.moved.cpu_node, seen.leaves, PLACED)
    }),
    ("bounded", bounded),
];

/// No more page tables than the memory needs, and none when the VM is gone.
fn bounded(seen: &Seen) -> Result<(), String> {
    let counts = [
        (Some(seen.first), seen.leaves),
        (Some(seen.moved), seen.leaves),
        (seen.merged, 0),
    ];
    for (tables, leaves) in counts {
        let all = tables.map_or(0, |tables| tables.cpu_node + tables.memory_node);
        if all > leaves + ABOVE {
            return Err(format!("{all} page tables for {leaves} leaves: {tables:?}"));
        }
    }
    match seen.left {
        0 => Ok(()),
        left => Err(format!("{left} page tables left without a VM")),
    }
}

fn share(what: &str, part: u64, whole: u64, least: u64) -> Result<(), String> {
    match part * 100 >= whole * least {
        true => Ok(()),
        false => Err(format!("{part} {what}, of {whole}: less than {least} %")),
    }
}

fn main() -> ExitCode {
    run(&Args::parse()).unwrap_or_else(|error| {
        diagnostic(&format!("{error:#}"));
        ExitCode::FAILURE
    })
}

fn run(args: &Args) -> Result<ExitCode> {
    ensure!(
        args.memory % 2 == 0,
        "--memory {}: give a multiple of 2",
        args.memory
    );
    let cases = [Backing::Anon, Backing::Memfd, Backing::Thp]
        .into_iter()
        .flat_map(|backing| [true, false].map(|asked| Case { backing, asked }));
    let tests = |case: Case| if case.asked { ASKED } else { NOT_ASKED };
    let mut ktap = Ktap::start(cases.clone().map(|case| tests(case).len()).sum::<usize>() + 3);
    let missing = needs::missing(ALL);
    let has = missing.is_none() && vm::has_numa_page_tables()?;
    // Balancing is off: memory stays where it is put.
    let _settings = missing.is_none().then(Settings::fast).transpose()?;
    let mut all = Vec::new();
    for case in cases {
        let is_thp = case.backing == Backing::Thp;
        let thp = || needs::missing(is_thp.then_some(&needs::THP));
        let split = || {
            let why = "needs nested paging: else KVM does not split huge pages when logging begins";
            (is_thp && !vm::nested_paging()).then(|| why.to_string())
        };
        let seen = match missing.clone().or_else(thp).or_else(split) {
            Some(reason) => Err(Outcome::Skip(reason)),
            None => measure(case, has, args).map_err(|error| Outcome::NotOk(format!("{error:#}"))),
        };
        for (test, judge) in tests(case) {
            let outcome = match &seen {
                Err(outcome) => outcome.clone(),
                Ok(_) if !vm::nested_paging() && FOLLOWING.contains(test) => {
                    Outcome::Skip("needs nested paging: shadow page tables do not follow".into())
                }
                Ok(seen) => judged(judge(seen)),
            };
            ktap.result(&format!("placement.{}.{test}", case.name()), &outcome);
        }
        if let Ok(seen) = seen {
            diagnostic(&format!("{seen:?}"));
            all.push(seen);
        }
    }
    let mut judge_all = |test: &str, judge: &dyn Fn() -> Result<Result<(), String>>| {
        let outcome = match &missing {
            Some(reason) => Outcome::Skip(reason.clone()),
            None => judged(judge().unwrap_or_else(|error| Err(format!("{error:#}")))),
        };
        ktap.result(&format!("placement.{test}"), &outcome);
    };
    judge_all("same_total", &|| Ok(same_total(&all)));
    judge_all("falls_back", &|| falls_back(has, args));
    judge_all("capability", &refuses);
    let path = args.results.join("placement.json");
    fs::write(&path, serde_json::to_string_pretty(&all)? + "\n")
        .with_context(|| path.display().to_string())?;
    Ok(ktap.finish())
}

fn judged(result: Result<(), String>) -> Outcome {
    match result {
        Ok(()) => Outcome::Ok,
        Err(why) => Outcome::NotOk(why),
    }
}

/// Whether a VM that asked has as many page tables as one that did not, within one percent.
fn same_total(all: &[Seen]) -> Result<(), String> {
    let total = |asked: &str| -> u64 {
        let of = all.iter().filter(|seen| seen.name.ends_with(asked));
        of.map(|seen| seen.first.cpu_node + seen.first.memory_node)
            .sum()
    };
    let (with, without) = (total(".asked"), total(".default"));
    match with > 0 && with.abs_diff(without) * 100 <= without {
        true => Ok(()),
        false => Err(format!("{with} page tables instead of {without}")),
    }
}

/// Whether the capability is refused where it must be, and is not where it need not.
fn refuses() -> Result<Result<(), String>> {
    const EINVAL: Option<i32> = Some(libc::EINVAL);
    let seen = [
        vm::ask_for_numa_page_tables(0, false, 2)?,
        vm::ask_for_numa_page_tables(1, false, 1)?,
        vm::ask_for_numa_page_tables(0, true, 1)?,
    ];
    let expected = [vec![None, None], vec![EINVAL], vec![EINVAL]];
    Ok(match seen == expected {
        true => Ok(()),
        false => Err(format!(
            "asked twice, with an argument, and with a vCPU: {seen:?}, not {expected:?}"
        )),
    })
}

impl Case {
    fn name(self) -> String {
        let asked = if self.asked { "asked" } else { "default" };
        format!("{}.{asked}", self.backing.name())
    }
}

/// `has` is whether the kernel can be asked; else the VM is an ordinary one.
fn measure(case: Case, has: bool, args: &Args) -> Result<Seen> {
    let size = (args.memory as usize) << 20;
    // This thread, too, which has huge pages split, is not where the memory is.
    balancing::set_affinity(&balancing::node_cpus(CPU_NODE)?)?;
    let memory = Arc::new(GuestMemory::new(
        case.backing,
        Pinned::None,
        size,
        MEMORY_NODE,
    )?);
    let whole = Sweep {
        first: 0,
        stride: 1,
        count: memory.pages(),
    };
    let cpus = balancing::vcpu_cpus(VCPUS)?;
    let before = tables()?;
    let of_vm = || -> Result<Tables> {
        let now = tables()?;
        Ok(Tables {
            cpu_node: now.cpu_node.saturating_sub(before.cpu_node),
            memory_node: now.memory_node.saturating_sub(before.memory_node),
        })
    };
    let vm = match case.asked && has {
        true => Vm::with_numa_page_tables(&memory, &cpus)?,
        false => Vm::new(&memory, &cpus)?,
    };
    let touch = || (0..VCPUS).try_for_each(|vcpu| vm.pass(vcpu, whole));
    touch()?;
    let (first, merged) = match case.backing {
        Backing::Thp => {
            // Eager splitting: all huge pages, when logging begins.
            let split = vm.while_logging(Clearing::Read, |_| of_vm())?;
            touch()?;
            (split, Some(of_vm()?))
        }
        _ => (of_vm()?, None),
    };
    let retries = retries(&vm)?;
    memory.move_to(CPU_NODE)?;
    touch()?;
    let moved = match case.backing {
        Backing::Thp => vm.while_logging(Clearing::Read, |_| of_vm())?,
        _ => of_vm()?,
    };
    let seen = Seen {
        name: case.name(),
        leaves: memory.pages() as u64 / ENTRIES,
        first,
        merged,
        moved,
        retries,
        remote: vm.vcpu_stat("pf_table_remote").ok(),
        replaced: vm.vcpu_stat("pf_table_moved").ok(),
        left: 0,
    };
    drop(vm);
    let left = of_vm()?;
    Ok(Seen {
        left: left.cpu_node + left.memory_node,
        ..seen
    })
}

/// Whether page tables are allocated elsewhere, and counted, where their node has no memory left.
fn falls_back(has: bool, args: &Args) -> Result<Result<(), String>> {
    if !has {
        return Ok(Err("no KVM_CAP_X86_NUMA_PAGE_TABLES".into()));
    }
    let size = (args.memory as usize) << 20;
    let memory = GuestMemory::new(Backing::Anon, Pinned::None, size, MEMORY_NODE)?;
    let memory = Arc::new(memory);
    let before = tables()?;
    let full = full::fill(MEMORY_NODE)?;
    let vm = Vm::with_numa_page_tables(&memory, &balancing::vcpu_cpus(1)?)?;
    let whole = Sweep {
        first: 0,
        stride: 1,
        count: memory.pages(),
    };
    vm.pass(0, whole)?;
    let remote = vm.vcpu_stat("pf_table_remote")?;
    let elsewhere = tables()?.cpu_node.saturating_sub(before.cpu_node);
    drop(full);
    let leaves = memory.pages() as u64 / ENTRIES;
    let counted = share("on node 0", elsewhere, leaves, FOLLOWED).and(share(
        "counted as elsewhere",
        remote,
        leaves,
        FOLLOWED,
    ));
    Ok(counted)
}

/// Faults that led to nothing, and so were taken again.
fn retries(vm: &Vm) -> Result<u64> {
    let ended = ["pf_fixed", "pf_emulate", "pf_spurious"].map(|name| vm.vcpu_stat(name));
    let ended: u64 = ended.into_iter().sum::<Result<u64>>()?;
    Ok(vm.vcpu_stat("pf_taken")?.saturating_sub(ended))
}

/// KVM's page tables on the whole machine.
fn tables() -> Result<Tables> {
    // Each CPU keeps some of the count to itself, until asked.
    const REFRESH: &str = "/proc/sys/vm/stat_refresh";
    fs::write(REFRESH, "1").context(REFRESH)?;
    let of = |node| Ok::<_, anyhow::Error>(full::kib(node, "SecPageTables:")? / 4);
    Ok(Tables {
        cpu_node: of(CPU_NODE)?,
        memory_node: of(MEMORY_NODE)?,
    })
}
