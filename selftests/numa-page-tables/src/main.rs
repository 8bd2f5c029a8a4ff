// SPDX-License-Identifier: GPL-2.0
//! On which node KVM's page tables are; writes `placement.json` into the folder `--results`, has the kernel fold its counters
//! of pages, and changes the machine's NUMA balancing, and what else a test says, while it runs.
//!
//! The kernel counts page tables of KVM by node (`SecPageTables` in each node's meminfo). Nothing else makes any on this
//! machine while a case runs, so what a VM adds is its own. Prints KTAP.

mod follow;
mod full;
mod placed;
mod split;

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{ensure, Context, Result};
use clap::Parser;
use guest::balancing::{self, Settings, MEMORY_NODE};
use guest::ktap::{diagnostic, Ktap, Outcome};
use guest::memcg::{self, Memcg};
use guest::memory::{Backing, GuestMemory, Pinned};
use guest::needs::{self, Need};
use guest::vm::{self, Clearing, Sweep, Vm};
use guest::PAGE;

use follow::{follow, By};
use numa_page_tables::dirty_log::{self, DirtyLog};
use numa_page_tables::show::{Kind, Row};
use numa_page_tables::tables::{Tables, ENTRIES};
use numa_page_tables::NEEDS;
use placed::{Case, Seen, FOLLOWING};
use split::{split, When};

const VCPUS: usize = 2;
/// Share of leaf tables that has to be where the memory is, in percent: at first, and after it was moved.
const PLACED: u64 = 99;
const FOLLOWED: u64 = 95;
/// Page tables above the leaves: four levels or five, a root for ordinary mode and one for SMM, with one table each on a
/// level for every GiB of the few that there are.
const ABOVE: u64 = 16;
/// Page tables from the root to a page.
const LEVELS: i64 = 5;
/// Why tests are skipped without nested paging.
const FOLLOW: &str = "shadow page tables do not follow";
const SPLIT: &str = "else KVM does not split huge pages when logging begins";

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

/// What there is to make VMs on, and how large they are.
pub struct Machine {
    /// Whether the kernel can be asked to have page tables on the node of the memory.
    has: bool,
    /// In bytes.
    memory: usize,
}

impl Machine {
    /// A VM that asks, where that can be.
    fn vm(&self, memory: &Arc<GuestMemory>, cpus: &[usize]) -> Result<Vm> {
        match self.has {
            true => Vm::with_numa_page_tables(memory, cpus),
            false => Vm::new(memory, cpus),
        }
    }

    /// Each vCPU touches all memory.
    fn touch(&self, vm: &Vm, memory: &GuestMemory) -> Result<()> {
        (0..vm.vcpus()).try_for_each(|vcpu| vm.pass(vcpu, Sweep::all(memory.pages())))
    }
}

/// A test that makes VMs of its own.
struct Single {
    name: &'static str,
    needs: &'static [Need],
    /// Why it needs nested paging, if it does.
    nested_paging: Option<&'static str>,
    judge: fn(&Machine) -> Result<()>,
}

const fn single(name: &'static str, judge: fn(&Machine) -> Result<()>) -> Single {
    Single {
        name,
        needs: NEEDS,
        nested_paging: None,
        judge,
    }
}

const fn follows(name: &'static str, judge: fn(&Machine) -> Result<()>) -> Single {
    Single {
        nested_paging: Some(FOLLOW),
        ..single(name, judge)
    }
}

const fn splits(name: &'static str, judge: fn(&Machine) -> Result<()>) -> Single {
    const NEEDS: &[Need] = &[
        needs::KVM,
        needs::TWO_NODES,
        needs::SCAN_SETTINGS,
        needs::THP,
    ];
    Single {
        nested_paging: Some(SPLIT),
        needs: NEEDS,
        ..single(name, judge)
    }
}

const SINGLE: &[Single] = &[
    follows("follow.anon.moved", |machine| {
        follow(machine, Backing::Anon, By::UserSpace)
    }),
    follows("follow.memfd.moved", |machine| {
        follow(machine, Backing::Memfd, By::UserSpace)
    }),
    follows("follow.anon.balanced", |machine| {
        follow(machine, Backing::Anon, By::Balancing)
    }),
    follows("follow.memfd.balanced", |machine| {
        follow(machine, Backing::Memfd, By::Balancing)
    }),
    splits("split.on", |machine| {
        split(machine, When::On, Clearing::Manual)
    }),
    splits("split.cleared", |machine| {
        split(machine, When::Cleared, Clearing::ManualInitiallySet)
    }),
    splits("split.written", |machine| {
        split(machine, When::Written, Clearing::Read)
    }),
    Single {
        needs: PERF_TEST,
        ..splits("split.nested", nested)
    },
    single("falls_back", falls_back),
    single("no_struct_page", no_struct_page),
    Single {
        needs: &[
            needs::KVM,
            needs::TWO_NODES,
            needs::SCAN_SETTINGS,
            needs::MEMCG,
        ],
        ..single("reserve", reserve)
    },
    Single {
        needs: &[needs::KVM],
        ..single("capability", refuses)
    },
];

const PERF_TEST: &[Need] = &[
    needs::KVM,
    needs::TWO_NODES,
    needs::SCAN_SETTINGS,
    needs::THP,
    Need {
        path: dirty_log::PROGRAM,
        remedy: "KVM's own test, built by make test-page-tables",
    },
];

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
    let of_cases: usize = Case::all().map(|case| case.tests().len()).sum();
    let mut ktap = Ktap::start(of_cases + 1 + SINGLE.len());
    let missing = needs::missing(NEEDS);
    let machine = Machine {
        has: needs::missing(&[needs::KVM]).is_none() && vm::has_numa_page_tables()?,
        memory: (args.memory as usize) << 20,
    };
    // Balancing is off but where a test switches it on: memory stays where it is put.
    let _settings = missing.is_none().then(Settings::fast).transpose()?;
    let without = |why: &str| (!vm::nested_paging()).then(|| format!("needs nested paging: {why}"));
    let mut all = Vec::new();
    for case in Case::all() {
        let is_thp = case.backing == Backing::Thp;
        let skip = missing
            .clone()
            .or_else(|| needs::missing(is_thp.then_some(&needs::THP)))
            .or_else(|| is_thp.then(|| without(SPLIT)).flatten());
        let seen = match skip {
            Some(reason) => Err(Outcome::Skip(reason)),
            None => case
                .measure(&machine)
                .map_err(|error| Outcome::NotOk(format!("{error:#}"))),
        };
        for (test, judge) in case.tests() {
            let following = || FOLLOWING.contains(test).then(|| without(FOLLOW)).flatten();
            let outcome = match &seen {
                Err(outcome) => outcome.clone(),
                Ok(seen) => following().map_or_else(|| judged(judge(seen)), Outcome::Skip),
            };
            ktap.result(&format!("placement.{}.{test}", case.name()), &outcome);
        }
        if let Ok(seen) = seen {
            diagnostic(&format!("{seen:?}"));
            all.push(seen);
        }
    }
    let same = missing.map_or_else(|| judged(same_total(&all)), Outcome::Skip);
    ktap.result("placement.same_total", &same);
    for test in SINGLE {
        let skip = needs::missing(test.needs).or_else(|| test.nested_paging.and_then(without));
        let outcome = skip.map_or_else(|| judged((test.judge)(&machine)), Outcome::Skip);
        ktap.result(&format!("placement.{}", test.name), &outcome);
    }
    let path = args.results.join("placement.json");
    fs::write(&path, serde_json::to_string_pretty(&all)? + "\n")
        .with_context(|| path.display().to_string())?;
    Ok(ktap.finish())
}

fn judged(result: Result<()>) -> Outcome {
    match result {
        Ok(()) => Outcome::Ok,
        Err(error) => Outcome::NotOk(format!("{error:#}")),
    }
}

/// Fails where `part` is less than `least` percent of `whole`.
pub fn share(what: &str, part: u64, whole: u64, least: u64) -> Result<()> {
    ensure!(
        part * 100 >= whole * least,
        "{part} {what}, of {whole}: less than {least} %"
    );
    Ok(())
}

/// A VM that asked has as many page tables as one that did not, within one percent.
fn same_total(all: &[Seen]) -> Result<()> {
    let total = |asked: &str| -> u64 {
        let of = all.iter().filter(|seen| seen.name.ends_with(asked));
        of.map(|seen| seen.first.cpu_node + seen.first.memory_node)
            .sum()
    };
    let (with, without) = (total(".asked"), total(".default"));
    ensure!(
        with > 0 && with.abs_diff(without) * 100 <= without,
        "{with} page tables instead of {without}"
    );
    Ok(())
}

/// KVM's own test of the dirty log, whose vCPUs run on both nodes, and are guests of a guest: its shadow page tables.
fn nested(machine: &Machine) -> Result<()> {
    let test = DirtyLog {
        program: dirty_log::PROGRAM.as_ref(),
        mebibytes: 64,
    };
    let kind = if machine.has { Kind::On } else { Kind::Off };
    let values = test.measure(kind)?;
    for (row, what) in [
        (Row::SplitPlaced, "of page tables"),
        (Row::NestedPlaced, "of a nested guest's"),
    ] {
        let percent = values.get(&row).context("not measured")?;
        ensure!(
            *percent >= PLACED as f64,
            "{percent} % {what} for memory of node 1 are there: less than {PLACED} %"
        );
    }
    Ok(())
}

/// The capability is refused where it must be, and is not where it need not.
fn refuses(machine: &Machine) -> Result<()> {
    const EINVAL: Option<i32> = Some(libc::EINVAL);
    let seen = [
        vm::ask_for_numa_page_tables(0, false, 2)?,
        vm::ask_for_numa_page_tables(1, false, 1)?,
        vm::ask_for_numa_page_tables(0, true, 1)?,
    ];
    // There is nothing to choose on a machine that can have one node only.
    let can_have_two = fs::read_to_string("/sys/devices/system/node/possible")
        .is_ok_and(|nodes| nodes.trim() != "0");
    let granted = if can_have_two { None } else { EINVAL };
    let expected = [vec![granted; 2], vec![EINVAL], vec![EINVAL]];
    ensure!(
        machine.has == can_have_two && seen == expected,
        "KVM_CHECK_EXTENSION says {}; asked twice, with an argument, and with a vCPU: {seen:?}, not {expected:?}",
        machine.has
    );
    Ok(())
}

/// Page tables are allocated elsewhere, and counted, where their node has no memory left.
fn falls_back(machine: &Machine) -> Result<()> {
    let memory = GuestMemory::new(Backing::Anon, Pinned::None, machine.memory, MEMORY_NODE)?;
    let memory = Arc::new(memory);
    let before = Tables::count()?;
    let full = full::fill(MEMORY_NODE)?;
    let vm = machine.vm(&memory, &balancing::vcpu_cpus(1)?)?;
    machine.touch(&vm, &memory)?;
    let remote = vm.vcpu_stat("pf_table_remote")?;
    let elsewhere = Tables::count()?.since(before).cpu_node;
    drop(full);
    let leaves = memory.pages() as u64 / ENTRIES;
    share("on node 0", elsewhere, leaves, FOLLOWED)?;
    share("counted as elsewhere", remote, leaves, FOLLOWED)
}

/// A vCPU of a VM that asked has no more in reserve than another, which takes the few page tables that it needs to map a page
/// from there, and not from their node.
fn reserve(machine: &Machine) -> Result<()> {
    let memcg = Memcg::create("placement")?;
    memcg::join(memcg.path())?;
    let charged = |asked: bool| -> Result<i64> {
        let memory = GuestMemory::new(Backing::Anon, Pinned::None, machine.memory, MEMORY_NODE)?;
        let memory = Arc::new(memory);
        let cpus = balancing::vcpu_cpus(VCPUS)?;
        let before = memcg::kernel_memory(memcg.path())?;
        let vm = match asked {
            true => machine.vm(&memory, &cpus)?,
            false => Vm::new(&memory, &cpus)?,
        };
        (0..VCPUS).try_for_each(|vcpu| vm.pass(vcpu, Sweep::all(1)))?;
        let charged = memcg::kernel_memory(memcg.path())? as i64 - before as i64;
        Ok(charged / PAGE as i64)
    };
    // The first VM of a process makes what the others find.
    charged(false)?;
    let pages = [charged(false)?, charged(true)?];
    memcg::join("/sys/fs/cgroup".as_ref())?;
    diagnostic(&format!(
        "pages of the kernel's, default and asked: {pages:?}"
    ));
    let more = pages[1] - pages[0];
    ensure!(
        more <= VCPUS as i64 * LEVELS,
        "{more} pages more than the {} without asking",
        pages[0]
    );
    Ok(())
}

/// Memory of a device is mapped as ever, by page tables that are not wanted anywhere.
fn no_struct_page(machine: &Machine) -> Result<()> {
    let device = device_memory()?.context("no PCI device with memory: QEMU's q35 has some")?;
    let file = File::options()
        .read(true)
        .write(true)
        .open(&device)
        .with_context(|| device.display().to_string())?;
    let memory = GuestMemory::new(Backing::Anon, Pinned::None, machine.memory, MEMORY_NODE)?;
    let memory = Arc::new(memory);
    let vm = machine.vm(&memory, &balancing::vcpu_cpus(1)?)?;
    // Where nothing else is, so that it needs a page table of its own.
    let at = 2 * machine.memory / PAGE;
    // The program has its page tables before that.
    vm.pass(0, Sweep::all(1))?;
    let before = Tables::count()?;
    let _mapping = vm.put_file(0, &file.into(), 1, at)?;
    let page = Sweep {
        first: at,
        stride: 1,
        count: 1,
    };
    vm.read_pass(0, page)?;
    let made = Tables::count()?.since(before);
    let remote = vm.vcpu_stat("pf_table_remote").unwrap_or_default();
    ensure!(
        made.cpu_node > 0 && made.memory_node == 0 && remote == 0,
        "{made:?} for a page of {}, {remote} counted as elsewhere",
        device.display()
    );
    Ok(())
}

/// The file of a page or more of a PCI device's memory, not to be prefetched, and so not a frame buffer's.
fn device_memory() -> Result<Option<PathBuf>> {
    const DEVICES: &str = "/sys/bus/pci/devices";
    /// Of `linux/ioport.h`.
    const IORESOURCE_MEM: u64 = 0x200;
    const IORESOURCE_PREFETCH: u64 = 0x2000;
    for device in fs::read_dir(DEVICES).context(DEVICES)? {
        let device = device?.path();
        let text = fs::read_to_string(device.join("resource"))?;
        for (number, line) in text.lines().take(6).enumerate() {
            let words = line.split_whitespace();
            let words: Vec<u64> = words
                .map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16))
                .collect::<Result<_, _>>()?;
            if let [start, end, flags] = words[..] {
                let kind = flags & (IORESOURCE_MEM | IORESOURCE_PREFETCH);
                if kind == IORESOURCE_MEM && end - start + 1 >= PAGE as u64 {
                    return Ok(Some(device.join(format!("resource{number}"))));
                }
            }
        }
    }
    Ok(None)
}
