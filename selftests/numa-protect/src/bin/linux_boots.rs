// SPDX-License-Identifier: GPL-2.0
//! What NUMA scans cost a VM that boots Linux, with none of its memory pinned, and with all of it, as where a device is
//! assigned: the measurement of the RFC of 2023. Changes the machine's scan settings while it runs.
//!
//! Prints KTAP. Each boot is a process of its own, in a memory cgroup of its own. Guest memory lies on node 1, the vCPU runs
//! on node 0, and from the first instruction to the restart, memory is scanned every `--period` milliseconds. The guest's kernel
//! is the file `--kernel`; its first and only program is this one again, which writes to a quarter of the guest's memory a few
//! times over, prints a checksum of it and restarts the machine. Leaves `linux_boots.json` in the folder `--results`, see
//! [`Output`].

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use child::Message;
use clap::Parser;
use guest::balancing::{self, Settings, CPU_NODE, MEMORY_NODE};
use guest::ktap::{diagnostic, Ktap, Outcome};
use guest::linux::{self, Linux};
use guest::memcg::{self, Memcg, Source};
use guest::memory::{Backing, GuestMemory, Pinned};
use guest::needs::{self, Need};
use guest::tracefs::Tracepoint;
use guest::{vm, workload, PAGE};
use serde::{Deserialize, Serialize};

/// What no boot can do without, beside [`missing`].
const ALL: &[Need] = &[
    needs::KVM,
    needs::TWO_NODES,
    needs::NUMA_BALANCING,
    needs::SCAN_SETTINGS,
    needs::MEMCG,
    needs::KPROBE_EVENTS,
];
/// With how much of its memory pinned a guest boots.
const GROUPS: [Pinned; 2] = [Pinned::None, Pinned::All];
/// The longest that a boot may take, and how often its process gives a sign of life.
const LIMIT: Duration = Duration::from_secs(300);
const SIGN: Duration = Duration::from_secs(20);
/// Scans of guest memory in each boot, at the least: the first may have begun before anything was mapped.
const SCANS: u64 = 2;
/// What KVM calls for each range of guest memory that it unmaps, and the tracepoint for what makes it do so.
const UNMAP: &str = "kvm_unmap_gfn_range";
const UNMAP_EVENT: &str = "kvm/kvm_unmap_hva_range";
/// No ACPI tables, no PCI and one processor: nothing to look for. Only errors are printed, and end it.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 reboot=k acpi=off pci=off nosmp";

/// What NUMA scans cost a VM that boots Linux.
#[derive(Parser)]
struct Args {
    /// Folder for the results.
    #[arg(long, default_value = ".")]
    results: PathBuf,
    /// The guest's kernel, a bzImage with a serial console and an initramfs.
    #[arg(long, default_value_os_t = needs::beside("bzImage", "/guest/bzImage"))]
    kernel: PathBuf,
    /// Boots in each group.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    boots: u32,
    /// Guest memory in MiB, a multiple of 2.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(64..=2046))]
    memory: u32,
    /// How often the guest writes to each page of a quarter of its memory.
    #[arg(long, default_value_t = 2)]
    passes: u64,
    /// Time from one scan to the next in milliseconds.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(100..=10_000))]
    period: u32,
    /// More for the command line of the guest's kernel.
    #[arg(long, default_value = "")]
    append: String,
    /// Be the guest's only program, and write to so many pages.
    #[arg(long, hide = true)]
    workload: Option<u64>,
    /// Boot once here, with so much pinned, and talk to the parent; the memory cgroup is given by `--memcg`.
    #[arg(long, hide = true, requires = "memcg")]
    child: Option<Pinned>,
    #[arg(long, hide = true)]
    memcg: Option<PathBuf>,
}

/// `linux_boots.json`.
#[derive(Serialize)]
struct Output {
    /// Name of the program.
    program: &'static str,
    /// Release of the kernel under test.
    kernel: String,
    /// Pages that the guest wrote to, and how often.
    workload_pages: u64,
    passes: u64,
    /// The two groups.
    groups: Vec<Group>,
}

/// Boots of one kind.
#[derive(Serialize)]
struct Group {
    /// `unpinned`, or `pinned`: all guest memory is pinned.
    name: &'static str,
    /// The boots that came to their end, in order.
    boots: Vec<Boot>,
}

/// What was counted in one boot, from the guest's first instruction to its restart. Pages are of 4 KiB.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Boot {
    /// Pages of guest memory.
    guest_pages: u64,
    /// Complete scans of the process.
    scans: u64,
    /// Pages made PROT_NONE by scans (`numa_pte_updates`).
    hinted: u64,
    /// Faults on hints (`numa_hint_faults`).
    hint_faults: u64,
    /// Pages migrated (`numa_pages_migrated`).
    migrated: u64,
    /// Ranges of guest memory that KVM unmapped, whether or not anything was mapped there: calls of `kvm_unmap_gfn_range()`.
    /// About one of them for each page migrated, the rest for scans.
    unmap_calls: u64,
    /// How often `kvm_unmap_hva_range` fired for guest memory.
    unmap_events: u64,
    /// KVM's requests to flush the TLBs of all vCPUs (`remote_tlb_flush_requests`).
    flush_requests: u64,
    /// Such flushes for which a vCPU had to leave the guest (`remote_tlb_flush`).
    flushes: u64,
    /// Faults that KVM took to map a page (`pf_fixed`).
    faults: u64,
    /// Pages that KVM had mapped in the end.
    mapped: u64,
    /// From the first instruction to the restart, in seconds.
    elapsed_s: f64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(pages) = args.workload {
        return workload::run(pages, args.passes);
    }
    if let Some(pinned) = args.child {
        return match run_child(pinned, &args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                child::outcome("booted", Outcome::NotOk(format!("{error:#}")));
                ExitCode::FAILURE
            }
        };
    }
    match run(&args) {
        Ok(code) => code,
        Err(error) => {
            diagnostic(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// The name of a group.
fn group(pinned: Pinned) -> &'static str {
    match pinned {
        Pinned::None => "unpinned",
        _ => "pinned",
    }
}

/// The tests of a group, each of which must hold in every boot.
fn tests(pinned: Pinned) -> &'static [&'static str] {
    match pinned {
        Pinned::None => &["booted", "contents", "scanned"],
        _ => &[
            "booted",
            "contents",
            "scanned",
            "nothing_unmapped",
            "not_flushed",
            "mapped_once",
        ],
    }
}

/// How the tests of what was counted came out.
fn judge(pinned: Pinned, boot: &Boot) -> Vec<(&'static str, Outcome)> {
    let Boot {
        scans,
        hinted,
        unmap_calls,
        unmap_events,
        flush_requests,
        faults,
        mapped,
        ..
    } = *boot;
    // What can be hinted must have been, else there was nothing to measure.
    let hints = (hinted > 0) == (pinned == Pinned::None);
    [
        (
            "scanned",
            scans >= SCANS && hints,
            format!("{scans} scans, which hinted {hinted} pages"),
        ),
        (
            "nothing_unmapped",
            unmap_calls == 0 && unmap_events == 0,
            format!("KVM unmapped {unmap_calls} ranges, for {unmap_events} events"),
        ),
        (
            "not_flushed",
            flush_requests == 0,
            format!("{flush_requests} flush requests"),
        ),
        (
            "mapped_once",
            faults == mapped,
            format!("{faults} faults for {mapped} pages"),
        ),
    ]
    .into_iter()
    .filter(|(test, ..)| tests(pinned).contains(test))
    .map(|(test, held, reason)| match held {
        true => (test, Outcome::Ok),
        false => (test, Outcome::NotOk(reason)),
    })
    .collect()
}

fn run(args: &Args) -> Result<ExitCode> {
    if args.memory % 2 != 0 {
        bail!("--memory {}: give a multiple of 2", args.memory);
    }
    let mut ktap = Ktap::start(GROUPS.into_iter().map(|pinned| tests(pinned).len()).sum());
    let missing = missing(args);
    let settings = match missing {
        None => {
            balancing::forbid_scans(CPU_NODE)?;
            Some(Settings::every(args.period)?)
        }
        Some(_) => None,
    };
    let mut groups = Vec::new();
    for pinned in GROUPS {
        let (name, mut boots) = (group(pinned), Vec::new());
        let missing = missing.clone().or_else(|| match pinned {
            Pinned::None => None,
            _ => needs::missing([&needs::IO_URING]),
        });
        let outcomes = match missing {
            Some(reason) => vec![Outcome::Skip(reason); tests(pinned).len()],
            None => boot_group(pinned, args, &mut boots),
        };
        if !boots.is_empty() {
            summarise(name, &boots);
        }
        for (test, outcome) in tests(pinned).iter().zip(&outcomes) {
            ktap.result(&format!("linux_boots.{name}.{test}"), outcome);
        }
        groups.push(Group { name, boots });
    }
    drop(settings);
    let output = Output {
        program: "linux_boots",
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?
            .trim()
            .into(),
        workload_pages: args.workload_pages(),
        passes: args.passes,
        groups,
    };
    let path = args.results.join("linux_boots.json");
    std::fs::write(&path, serde_json::to_string_pretty(&output)? + "\n")
        .with_context(|| path.display().to_string())?;
    Ok(ktap.finish())
}

/// What is missing for any boot, and what provides it.
fn missing(args: &Args) -> Option<String> {
    let kernel = || {
        let none = !args.kernel.exists();
        none.then(|| {
            format!(
                "no {}: needs a kernel to boot, --kernel",
                args.kernel.display()
            )
        })
    };
    let paging = || {
        let none = !vm::nested_paging();
        none.then(|| "needs nested paging: without, KVM maps what the guest's own tables do".into())
    };
    needs::missing(ALL).or_else(kernel).or_else(paging)
}

/// Boots as often as asked for, until one does not come to its end. Gives the outcome of each of the group's tests.
fn boot_group(pinned: Pinned, args: &Args, boots: &mut Vec<Boot>) -> Vec<Outcome> {
    let mut merged = vec![Outcome::Ok; tests(pinned).len()];
    for number in 1..=args.boots {
        let name = format!("{}.boot{number}", group(pinned));
        let mut outcomes = HashMap::new();
        let ended = boot_apart(&name, pinned, args, &mut outcomes);
        let rest = match &ended {
            Ok(_) => "not judged".to_string(),
            Err(error) => format!("{error:#}"),
        };
        for (test, merged) in tests(pinned).iter().zip(&mut merged) {
            child::merge(merged, number, outcomes.remove(*test), &rest);
        }
        match ended {
            Ok(boot) => boots.extend(boot),
            Err(_) => break,
        }
    }
    merged
}

/// A count of a boot, and its name.
type Column = (&'static str, fn(&Boot) -> u64);

/// Says what the boots of a group came to: the mean of each count, the least and the most.
fn summarise(name: &str, boots: &[Boot]) {
    let columns: [Column; 6] = [
        ("unmap calls", |boot| boot.unmap_calls),
        ("flush requests", |boot| boot.flush_requests),
        ("faults", |boot| boot.faults),
        ("scans", |boot| boot.scans),
        ("pages hinted", |boot| boot.hinted),
        ("pages migrated", |boot| boot.migrated),
    ];
    for (what, count) in columns {
        let counts: Vec<u64> = boots.iter().map(count).collect();
        let mean = counts.iter().sum::<u64>() as f64 / counts.len() as f64;
        let (least, most) = (counts.iter().min(), counts.iter().max());
        if let (Some(least), Some(most)) = (least, most) {
            diagnostic(&format!("{name}: {what}: {mean:.1} ({least} to {most})"));
        }
    }
}

/// Boots once, in a process of its own, and takes down what it says.
fn boot_apart(
    name: &str,
    pinned: Pinned,
    args: &Args,
    outcomes: &mut HashMap<String, Outcome>,
) -> Result<Option<Boot>> {
    let memcg = Memcg::create(&format!("linux_boots.{}.{name}", std::process::id()))?;
    let mut command = Command::new(std::env::current_exe().context("own program")?);
    command.args(["--child", pinned.name()]);
    command.arg("--memcg").arg(memcg.path());
    command.arg("--kernel").arg(&args.kernel);
    command.args(["--memory", &args.memory.to_string()]);
    command.args(["--passes", &args.passes.to_string()]);
    command.args(["--append", &args.append]);
    child::run(name, &mut command, outcomes)
}

impl Args {
    fn workload_pages(&self) -> u64 {
        (u64::from(self.memory) << 20) / PAGE as u64 / 4
    }
}

fn run_child(pinned: Pinned, args: &Args) -> Result<()> {
    let (boot, console) = boot(pinned, args)?;
    if !console.contains(workload::DONE) {
        bail!(
            "the guest restarted before its workload was done; the console's last lines:\n{}",
            linux::tail(&console)
        );
    }
    child::outcome("booted", Outcome::Ok);
    let expected = workload::expected(args.workload_pages(), args.passes);
    child::outcome(
        "contents",
        match console.lines().any(|line| line == expected) {
            true => Outcome::Ok,
            false => Outcome::NotOk(format!(
                "not \"{expected}\" but:\n{}",
                linux::tail(&console)
            )),
        },
    );
    for (test, outcome) in judge(pinned, &boot) {
        child::outcome(test, outcome);
    }
    child::progress(format!(
        "{}: {} scans, {} pages hinted, {} unmap calls, {} flush requests, {} faults, {:.1} s",
        group(pinned),
        boot.scans,
        boot.hinted,
        boot.unmap_calls,
        boot.flush_requests,
        boot.faults,
        boot.elapsed_s
    ));
    child::tell(&Message::Figures(Box::new(boot)));
    Ok(())
}

/// Boots a guest. Gives the counts, and its console.
fn boot(pinned: Pinned, args: &Args) -> Result<(Boot, String)> {
    let memcg = args.memcg.as_ref().context("no --memcg")?;
    memcg::join(memcg)?;
    let source = Source::Memcg(memcg.clone());
    balancing::forbid_scans(CPU_NODE)?;
    balancing::set_affinity(&balancing::other_cpus(1)?)?;
    let size = (args.memory as usize) << 20;
    let memory = Arc::new(GuestMemory::zeroed(
        Backing::Anon,
        pinned,
        size,
        MEMORY_NODE,
    )?);
    let guest = memory.addresses();
    let own = std::env::current_exe().context("own program")?;
    let own = std::fs::read(&own).with_context(|| own.display().to_string())?;
    let command_line = format!(
        "{COMMAND_LINE} {} -- --workload {} --passes {}",
        args.append,
        args.workload_pages(),
        args.passes
    );
    let mut machine = Linux::new(
        &memory,
        &args.kernel,
        &linux::initramfs(&own),
        &command_line,
    )?;
    let [cpu] = balancing::vcpu_cpus(1)?[..] else {
        bail!("one vCPU, one CPU");
    };

    let calls = Tracepoint::count_calls(UNMAP, "", "")?;
    let filter = format!("start < {:#x} && end > {:#x}", guest.end, guest.start);
    let events = Tracepoint::count(UNMAP_EVENT, &filter)?;
    let (numa, scans) = (source.read()?, balancing::scan_seq()?);
    let begun = Instant::now();
    balancing::enable(true)?;
    let mut signs = 0;
    let ran = machine.run(cpu, LIMIT, |waited| {
        if waited > SIGN * (signs + 1) {
            signs += 1;
            child::progress(format!("{}: booting for {waited:.0?}", group(pinned)));
        }
    });
    balancing::enable(false)?;
    let (elapsed, console) = (begun.elapsed(), ran?);
    let now = source.read()?;
    let [small, huge] = ["pages_4k", "pages_2m"].map(|name| machine.stat(name));
    let boot = Boot {
        guest_pages: memory.pages() as u64,
        scans: balancing::scan_seq()? - scans,
        hinted: now.pte_updates - numa.pte_updates,
        hint_faults: now.hint_faults - numa.hint_faults,
        migrated: now.migrated - numa.migrated,
        unmap_calls: calls.fired()?,
        unmap_events: events.fired()?,
        flush_requests: machine.stat("remote_tlb_flush_requests")?,
        flushes: machine.stat("remote_tlb_flush")?,
        faults: machine.vcpu_stat("pf_fixed")?,
        mapped: small? + (huge? << 9),
        elapsed_s: elapsed.as_secs_f64(),
    };
    Ok((boot, console))
}
