// SPDX-License-Identifier: GPL-2.0
//! A device that is assigned to a VM while NUMA scans go over its memory; changes the machine's scan settings while it runs,
//! and leaves the device bound to vfio-pci.
//!
//! All of guest memory is mapped for the device, by VFIO's container or by iommufd, and so pinned by the kernel. While vCPUs
//! sweep it and scans go on, the device copies parts of it, which nobody else touches. Prints KTAP.

mod doctor;

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use clap::Parser;
use guest::balancing::{self, Settings, CPU_NODE, MEMORY_NODE};
use guest::ktap::{Ktap, Outcome};
use guest::memcg::{self, Memcg, Source};
use guest::memory::{Backing, GuestMemory, Pinned};
use guest::needs::{self, Need};
use guest::pins::{Device, Holder};
use guest::vm::{Sweep, Vm};
use guest::PAGE;

const ALL: &[Need] = &[
    needs::KVM,
    needs::TWO_NODES,
    needs::NUMA_BALANCING,
    needs::SCAN_SETTINGS,
    needs::MEMCG,
];
const HOLDERS: [Holder; 2] = [Holder::Type1, Holder::Iommufd];
const BACKINGS: [Backing; 3] = [Backing::Anon, Backing::Memfd, Backing::Thp];
const VCPUS: usize = 2;
/// What the device copies at once: less than what lies between two tags of guest memory.
const LENGTH: usize = 48;
/// Where it is in a page: behind the first tag.
const OFFSET: usize = 64;
const LIMIT: Duration = Duration::from_secs(120);

/// A device that is assigned to a VM while NUMA scans go over its memory.
#[derive(Parser)]
struct Args {
    /// Folder for results; this program leaves none.
    #[arg(long, default_value = ".")]
    results: PathBuf,
    /// Guest memory in MiB; the device reaches no more than 240.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(2..=240))]
    memory: u32,
    /// The tool that looks at the VM.
    #[arg(long, default_value = "/bin/mmu-notifier-trace")]
    tool: PathBuf,
    /// Copies that the device makes in each case.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    copies: u32,
    /// Run this one case here and talk to the parent, in the memory cgroup `--memcg`.
    #[arg(long, hide = true, requires = "memcg")]
    child: Option<String>,
    #[arg(long, hide = true, requires = "child")]
    memcg: Option<PathBuf>,
}

/// What was seen of a case.
struct Seen {
    /// Scans while the device copied.
    scans: u64,
    /// Pages hinted meanwhile.
    hinted: u64,
    /// Pages that KVM had mapped before and no longer after scans of a guest that did nothing.
    dropped: u64,
    /// Copies that did not arrive.
    lost: Vec<String>,
    /// Whether all else in guest memory is what it must be.
    contents: Result<(), String>,
    /// Whether the tool sees the VM as it is.
    doctor: Outcome,
    /// Pages hinted once nothing was mapped for the device any more, and pages that there are.
    unmapped: (u64, u64),
}

type Judge = fn(&Seen) -> Outcome;
const TESTS: &[(&str, Judge)] = &[
    ("not_hinted", |seen| {
        judged(zero(seen.hinted, "pages hinted"))
    }),
    ("not_dropped", |seen| {
        judged(zero(seen.dropped, "pages dropped"))
    }),
    ("copies_arrive", |seen| match seen.lost.first() {
        None => Outcome::Ok,
        Some(first) => Outcome::NotOk(format!("{} lost, the first {first}", seen.lost.len())),
    }),
    ("memory_exact", |seen| judged(seen.contents.clone())),
    ("doctor", |seen| seen.doctor.clone()),
    ("unmapped_hinted", |seen| match seen.unmapped {
        (hinted, pages) if hinted == pages => Outcome::Ok,
        (hinted, pages) => Outcome::NotOk(format!("{hinted} of {pages} pages hinted")),
    }),
];

fn judged(result: Result<(), String>) -> Outcome {
    match result {
        Ok(()) => Outcome::Ok,
        Err(why) => Outcome::NotOk(why),
    }
}

fn zero(count: u64, what: &str) -> Result<(), String> {
    match count {
        0 => Ok(()),
        _ => Err(format!("{count} {what}")),
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

fn cases() -> impl Iterator<Item = (String, Holder, Backing)> {
    let named = |holder: Holder, backing: Backing| {
        let name = format!("{}.{}", holder.name(), backing.name());
        (name, holder, backing)
    };
    HOLDERS
        .into_iter()
        .flat_map(move |holder| BACKINGS.map(|backing| named(holder, backing)))
}

fn run(args: &Args) -> Result<ExitCode> {
    let mut ktap = Ktap::start(cases().count() * TESTS.len());
    let settings = match needs::missing(ALL) {
        None => {
            balancing::forbid_scans(CPU_NODE)?;
            Some(Settings::fast()?)
        }
        Some(_) => None,
    };
    for (name, holder, backing) in cases() {
        let thp = needs::missing((backing == Backing::Thp).then_some(&needs::THP));
        let missing = needs::missing(ALL).or(thp).or_else(|| holder.missing());
        let tests = TESTS.iter().map(|(test, _)| *test);
        child::judge(
            &mut ktap,
            &format!("devices.{name}"),
            tests,
            missing,
            |outcomes| run_case(&name, args, outcomes),
        );
    }
    drop(settings);
    Ok(ktap.finish())
}

fn run_case(name: &str, args: &Args, outcomes: &mut HashMap<String, Outcome>) -> Result<()> {
    let memcg = Memcg::create(&format!("devices.{}.{name}", std::process::id()))?;
    let mut command = Command::new(std::env::current_exe().context("own program")?);
    command.args(["--child", name, "--memcg"]).arg(memcg.path());
    command.args(["--memory", &args.memory.to_string()]);
    command.args(["--copies", &args.copies.to_string()]);
    command.arg("--tool").arg(&args.tool);
    child::run::<()>(name, &mut command, outcomes).map(drop)
}

fn run_child(name: &str, args: &Args) -> Result<()> {
    let case = cases().find(|case| case.0 == name);
    let (_, holder, backing) = case.with_context(|| format!("no case {name}"))?;
    let seen = measure(holder, backing, args)?;
    child::progress(format!(
        "{name}: {} copies, {} scans",
        args.copies, seen.scans
    ));
    for (test, judge) in TESTS {
        child::outcome(test, judge(&seen));
    }
    Ok(())
}

fn measure(holder: Holder, backing: Backing, args: &Args) -> Result<Seen> {
    let path = args.memcg.as_ref().context("no memory cgroup")?;
    memcg::join(path)?;
    let source = Source::Memcg(path.clone());
    balancing::forbid_scans(CPU_NODE)?;
    balancing::set_affinity(&balancing::other_cpus(VCPUS)?)?;
    let size = (args.memory as usize) << 20;
    let memory = GuestMemory::pinned_by(holder, backing, Pinned::All, size, MEMORY_NODE)?;
    let memory = Arc::new(memory);
    let device = memory.device().context("no device")?;
    let whole = Sweep {
        first: 0,
        stride: 1,
        count: memory.pages(),
    };
    let vm = Vm::new(&memory, &balancing::vcpu_cpus(VCPUS)?)?;
    let mapped = || -> Result<u64> { Ok(vm.stat("pages_4k")? + (vm.stat("pages_2m")? << 9)) };
    let scan = || {
        vm.while_spinning(|| {
            balancing::enable(true)?;
            let scans = balancing::wait_for_scans(2, LIMIT);
            balancing::enable(false)?;
            scans
        })
    };
    vm.pass(0, whole)?;
    let (before, mapped_before) = (source.read()?.pte_updates, mapped()?);
    let mut scans = scan()?;
    let dropped = mapped_before.saturating_sub(mapped()?);

    let scanned_before = balancing::scan_seq()?;
    balancing::enable(true)?;
    let ran = vm.while_running(&[whole; VCPUS], || copy(&memory, device, args.copies));
    balancing::enable(false)?;
    scans += balancing::scan_seq()? - scanned_before;
    let (copies, mut passes) = ran?;
    passes[0] += 1;
    let hinted = source.read()?.pte_updates - before;
    let lost = copies
        .iter()
        .filter(|copy| memory.read(copy.target, LENGTH) != copy.text());
    let lost = lost.map(|copy| format!("at {:#x}", copy.target)).collect();
    let expected = passes
        .iter()
        .map(|count| vec![*count as u32; memory.pages()]);
    let contents = memory.verify(&expected.collect::<Vec<_>>());

    let doctor = match args.tool.exists() {
        true => judged(doctor::look(&args.tool, &vm, &memory, dropped > 0)?),
        false => Outcome::Skip(format!("no {}: --tool", args.tool.display())),
    };

    device.unmap()?;
    let before = source.read()?.pte_updates;
    scan()?;
    let unmapped = (source.read()?.pte_updates - before, memory.pages() as u64);
    Ok(Seen {
        scans,
        hinted,
        dropped,
        lost,
        contents,
        doctor,
        unmapped,
    })
}

/// What the device copied, and where to.
struct Copied {
    number: u32,
    target: usize,
}

impl Copied {
    fn text(&self) -> Vec<u8> {
        let text = format!("copy {} of the device ", self.number);
        text.into_bytes().into_iter().cycle().take(LENGTH).collect()
    }
}

/// Has the device make copies, each from one page to the next.
fn copy(memory: &GuestMemory, device: &Device, copies: u32) -> Result<Vec<Copied>> {
    let stride = memory.pages() / copies as usize * PAGE;
    ensure!(stride >= 2 * PAGE, "--copies {copies}: give more memory");
    let copy = |number: u32| {
        let from = number as usize * stride + OFFSET;
        let copied = Copied {
            number,
            target: from + PAGE,
        };
        memory.write(from, &copied.text());
        device.copy(from, copied.target, LENGTH)?;
        child::progress(format!("copy {} of {copies}", number + 1));
        Ok(copied)
    };
    (0..copies).map(copy).collect()
}
