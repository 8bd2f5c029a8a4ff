// SPDX-License-Identifier: GPL-2.0
//! What NUMA scans cost a real VMM that boots Linux, with none of its memory pinned, and with all of it, for a device that
//! is assigned to the guest. Changes the machine's scan settings while it runs, and leaves the device bound to vfio-pci.
//!
//! Prints KTAP. QEMU, from this root file system or from the 9p share `root`, boots the kernel `--kernel` with guest memory
//! that is anonymous, a shared memfd, or huge pages, `--boots` times each; the guest writes to a quarter of its memory,
//! prints a checksum, and restarts, which ends QEMU. From its first vCPU's first exit on, memory is scanned every `--period`
//! milliseconds. Memory of hugetlbfs is no case: it is never scanned. A command line behind `--` is measured instead, of
//! whatever VMM; it has to end by itself. Leaves `vmm.json` and `vmm.txt` in the folder `--results`.

mod measure;
mod qemu;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use child::Message;
use clap::Parser;
use comfy_table::{presets, Cell, CellAlignment, Table};
use guest::balancing::{self, Settings, CPU_NODE};
use guest::ktap::{diagnostic, Ktap, Outcome};
use guest::memcg::Memcg;
use guest::memory::Backing;
use guest::needs::{self, Need};
use guest::pins::{Device, Holder};
use guest::{linux, vm, workload, PAGE};
use measure::{Boot, Ran, Vmm};
use runner::mount;
use serde::Serialize;
use trace::check;

/// What no boot can do without, beside [`missing`].
const ALL: &[Need] = &[
    needs::KVM,
    needs::TWO_NODES,
    needs::NUMA_BALANCING,
    needs::SCAN_SETTINGS,
    needs::MEMCG,
    needs::CPUSETS,
    needs::KPROBE_EVENTS,
    needs::HIST_TRIGGERS,
    needs::RECORDER,
];
/// The longest that a boot may take, and how often its process gives a sign of life.
const LIMIT: Duration = Duration::from_secs(300);
const SIGN: Duration = Duration::from_secs(20);
/// Scans of a whole process with a VM in it, at the least: a boot is over after some.
const SCANS: u64 = 1;
/// Where the guest's files are, below the root directory that the VMM is given.
const FOLDER: &str = "/tmp/vmm";
/// No messages but errors, which end the guest's kernel; a restart by a triple fault, which any machine knows.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 reboot=t";

/// What NUMA scans cost a real VMM that boots Linux.
#[derive(Parser)]
struct Args {
    /// Folder for the results.
    #[arg(long, default_value = ".")]
    results: PathBuf,
    /// The guest's kernel, a bzImage with a serial console and an initramfs.
    #[arg(long, default_value = "/guest/bzImage")]
    kernel: PathBuf,
    /// Boots in each case.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    boots: u32,
    /// Only this case: anon, memfd, thp, or one of these with `.vfio` behind it (more than once).
    #[arg(long)]
    only: Vec<String>,
    /// Guest memory in MiB, a multiple of 2.
    #[arg(long, default_value_t = 96, value_parser = clap::value_parser!(u32).range(64..=2046))]
    memory: u32,
    /// How often the guest writes to each page of a quarter of its memory: for some scans.
    #[arg(long, default_value_t = 1000)]
    passes: u64,
    /// Time from one scan to the next in milliseconds.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(100..=10_000))]
    period: u32,
    /// More for the command line of the guest's kernel.
    #[arg(long, default_value = "")]
    append: String,
    /// Keep the trace of each case's last boot in the results.
    #[arg(long)]
    traces: bool,
    /// Measure this command instead, any VMM's, to its end.
    #[arg(last = true)]
    command: Vec<String>,
    /// Be the guest's only program, and write to so many pages.
    #[arg(long, hide = true)]
    workload: Option<u64>,
    /// Boot this case once here, and talk to the parent; the memory cgroup and the VMM's root directory are given.
    #[arg(long, hide = true, requires = "memcg")]
    child: Option<String>,
    #[arg(long, hide = true)]
    memcg: Option<PathBuf>,
    #[arg(long, hide = true)]
    root: Option<PathBuf>,
}

/// What is booted.
#[derive(Clone, Copy)]
enum Case {
    /// QEMU, with such memory, and with the device or without.
    Qemu(Backing, bool),
    /// The command that was given.
    Command,
}

impl Case {
    fn name(self) -> String {
        match self {
            Case::Qemu(backing, false) => backing.name().to_string(),
            Case::Qemu(backing, true) => format!("{}.vfio", backing.name()),
            Case::Command => "command".into(),
        }
    }

    fn has_device(self) -> bool {
        matches!(self, Case::Qemu(_, true))
    }

    /// What is to be booted, in order.
    fn chosen(args: &Args) -> Result<Vec<Case>> {
        if !args.command.is_empty() {
            return Ok(vec![Case::Command]);
        }
        let all = [Backing::Anon, Backing::Memfd, Backing::Thp];
        let all: Vec<Case> = [false, true]
            .into_iter()
            .flat_map(|device| all.map(|backing| Case::Qemu(backing, device)))
            .collect();
        let names: Vec<String> = all.iter().map(|case| case.name()).collect();
        if let Some(none) = args.only.iter().find(|one| !names.contains(one)) {
            bail!("--only={none}: no such case: {}", names.join(", "));
        }
        let is_chosen = |case: &Case| args.only.is_empty() || args.only.contains(&case.name());
        Ok(all.into_iter().filter(is_chosen).collect())
    }

    /// What is missing for it, and what provides it.
    fn missing(self) -> Option<String> {
        let thp = matches!(self, Case::Qemu(Backing::Thp, _)).then_some(&needs::THP);
        let device = || self.has_device().then(|| Holder::Type1.missing()).flatten();
        needs::missing(thp).or_else(device)
    }
}

/// `vmm.json`.
#[derive(Serialize)]
struct Output {
    /// Name of the program.
    program: &'static str,
    /// Release of the kernel under test.
    kernel: String,
    /// The cases that were booted.
    cases: Vec<Measured>,
}

/// The boots of one case that came to their end, in order.
#[derive(Serialize)]
struct Measured {
    name: String,
    boots: Vec<Boot>,
}

/// A test: its name, of which cases it is, and how it is judged.
type Test = (&'static str, fn(Case) -> bool, Judge);
type Judge = fn(&Ran, &Args) -> Result<(), String>;
const TESTS: &[Test] = &[
    (
        "booted",
        |_| true,
        |ran, args| match ran.console.contains(workload::DONE) || !args.command.is_empty() {
            true if ran.status.success() => Ok(()),
            _ => Err(format!(
                "{}; the console's last lines:\n{}",
                ran.status,
                linux::tail(&ran.console)
            )),
        },
    ),
    ("contents", is_qemu, |ran, args| {
        let expected = workload::expected(args.workload_pages(), args.passes);
        match ran.console.lines().any(|line| line == expected) {
            true => Ok(()),
            false => Err(format!(
                "not \"{expected}\" but:\n{}",
                linux::tail(&ran.console)
            )),
        }
    }),
    (
        "scanned",
        |_| true,
        |ran, _| {
            let Boot {
                scans, scan_calls, ..
            } = ran.boot;
            holds(
                scans >= SCANS && scan_calls >= SCANS,
                format!("{scans} scans, {scan_calls} parts of them of guest memory"),
            )
        },
    ),
    (
        "recorded",
        |_| true,
        |ran, _| {
            let trace = &ran.trace;
            let rules = [
                check::complete,
                check::balanced,
                check::reports_inside_pairs,
                check::one_report_per_pair,
                check::stretches_ordered,
            ];
            for rule in rules {
                rule(trace).map_err(|broken| broken.to_string())?;
            }
            let heard = ran.boot.notifications;
            holds(
                measure::ended(trace) && heard > 0,
                format!("{heard} notifications, or not to the end"),
            )
        },
    ),
    ("hinted", is_without, |ran, _| {
        holds(ran.boot.hinted > 0, "no page was hinted".into())
    }),
    ("pinned", Case::has_device, |ran, args| {
        let (locked, pages) = (ran.boot.locked, args.pages());
        holds(
            locked >= pages,
            format!("{locked} pages locked, of {pages}"),
        )
    }),
    ("not_hinted", Case::has_device, |ran, _| {
        check::not_reported(&ran.trace, &ran.guest).map_err(|broken| broken.to_string())?;
        holds(
            ran.boot.hinted == 0,
            format!("{} pages hinted", ran.boot.hinted),
        )
    }),
    ("not_dropped", Case::has_device, |ran, _| {
        let Boot {
            dropped,
            scan_unmap_calls,
            ..
        } = ran.boot;
        let said = format!("{dropped} pages dropped in {scan_unmap_calls} unmap calls for scans");
        holds(dropped == 0 && scan_unmap_calls == 0, said)
    }),
    ("not_flushed", Case::has_device, |ran, _| {
        let requests = ran.boot.flush_requests;
        holds(requests == 0, format!("{requests} flush requests"))
    }),
];

fn is_qemu(case: Case) -> bool {
    !matches!(case, Case::Command)
}

fn is_without(case: Case) -> bool {
    is_qemu(case) && !case.has_device()
}

fn holds(held: bool, why: String) -> Result<(), String> {
    match held {
        true => Ok(()),
        false => Err(why),
    }
}

fn tests(case: Case) -> impl Iterator<Item = &'static Test> {
    TESTS.iter().filter(move |(_, applies, _)| applies(case))
}

impl Args {
    fn pages(&self) -> u64 {
        (u64::from(self.memory) << 20) / PAGE as u64
    }

    fn workload_pages(&self) -> u64 {
        self.pages() / 4
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(pages) = args.workload {
        return workload::run(pages, args.passes);
    }
    let done = match &args.child {
        Some(name) => run_child(name, &args).map(|()| ExitCode::SUCCESS),
        None => run(&args),
    };
    done.unwrap_or_else(|error| {
        match &args.child {
            Some(_) => child::outcome("booted", Outcome::NotOk(format!("{error:#}"))),
            None => diagnostic(&format!("{error:#}")),
        }
        ExitCode::FAILURE
    })
}

fn run(args: &Args) -> Result<ExitCode> {
    if args.memory % 2 != 0 {
        bail!("--memory {}: give a multiple of 2", args.memory);
    }
    let cases = Case::chosen(args)?;
    let mut ktap = Ktap::start(cases.iter().map(|case| tests(*case).count()).sum());
    let (root, missing) = match missing(args) {
        Some(reason) => (None, Some(reason)),
        None if !args.command.is_empty() => (None, None),
        None => vmm_root()?,
    };
    let settings = match missing {
        None => {
            balancing::forbid_scans(CPU_NODE)?;
            prepare(args, root)?;
            Some(Settings::every(args.period)?)
        }
        Some(_) => None,
    };
    let mut measured = Vec::new();
    for case in cases {
        let (name, mut boots) = (case.name(), Vec::new());
        let outcomes = match missing.clone().or_else(|| case.missing()) {
            Some(reason) => vec![Outcome::Skip(reason); tests(case).count()],
            None => boot_case(case, root, args, &mut boots),
        };
        for ((test, ..), outcome) in tests(case).zip(&outcomes) {
            ktap.result(&format!("vmm.{name}.{test}"), outcome);
        }
        measured.push(Measured {
            name: format!("vmm.{name}"),
            boots,
        });
    }
    drop(settings);
    let table = table(&measured);
    diagnostic(&table);
    let output = Output {
        program: "vmm",
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
            .trim()
            .into(),
        cases: measured,
    };
    for (file, text) in [
        ("vmm.json", serde_json::to_string_pretty(&output)?),
        ("vmm.txt", table),
    ] {
        let path = args.results.join(file);
        fs::write(&path, text + "\n").with_context(|| path.display().to_string())?;
    }
    Ok(ktap.finish())
}

/// What is missing for any boot, and what provides it.
fn missing(args: &Args) -> Option<String> {
    let kernel = || {
        let none = args.command.is_empty() && !args.kernel.exists();
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

/// The root directory in which QEMU is, and what is missing if it is in none.
fn vmm_root() -> Result<(Option<&'static Path>, Option<String>)> {
    if Path::new(qemu::PROGRAM).exists() {
        return Ok((Some(Path::new("/")), None));
    }
    let (program, package) = (qemu::PROGRAM, qemu::PACKAGE);
    let none = |why| {
        format!(
            "no {program}: needs Debian's package {package}, here or in the 9p share `root`{why}"
        )
    };
    match mount::share() {
        Ok(()) => {}
        Err(error) if guest::errno(&error) == Some(libc::ENOENT) => {
            return Ok((None, Some(none(", which is not there"))));
        }
        Err(error) => return Err(error),
    }
    let root = Path::new(mount::ROOT);
    match root.join(program.trim_start_matches('/')).exists() {
        true => Ok((Some(root), None)),
        false => Ok((None, Some(none("")))),
    }
}

/// Puts the guest's files where the VMM sees them.
fn prepare(args: &Args, root: Option<&Path>) -> Result<()> {
    let Some(root) = root else {
        return Ok(());
    };
    let own = std::env::current_exe().context("own program")?;
    let own = fs::read(&own).with_context(|| own.display().to_string())?;
    let (kernel, initrd) = files(root);
    fs::create_dir_all(below(root, FOLDER)).context(FOLDER)?;
    fs::copy(&args.kernel, &kernel).with_context(|| kernel.display().to_string())?;
    fs::write(&initrd, linux::initramfs(&own)).with_context(|| initrd.display().to_string())
}

/// The guest's kernel and its initramfs, as seen from outside of `root`.
fn files(root: &Path) -> (PathBuf, PathBuf) {
    let file = |name: &str| below(root, FOLDER).join(name);
    (file("bzImage"), file("initramfs"))
}

fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// Boots as often as asked for, until one does not come to its end. Gives the outcome of each of the case's tests.
fn boot_case(case: Case, root: Option<&Path>, args: &Args, boots: &mut Vec<Boot>) -> Vec<Outcome> {
    let mut merged = vec![Outcome::Ok; tests(case).count()];
    for number in 1..=args.boots {
        let name = format!("{}.boot{number}", case.name());
        let mut outcomes = HashMap::new();
        let ended = boot_apart(&name, case, root, args, &mut outcomes);
        let rest = match &ended {
            Ok(_) => "not judged".to_string(),
            Err(error) => format!("{error:#}"),
        };
        for ((test, ..), merged) in tests(case).zip(&mut merged) {
            child::merge(merged, number, outcomes.remove(*test), &rest);
        }
        match ended {
            Ok(boot) => boots.extend(boot),
            Err(_) => break,
        }
    }
    merged
}

/// Boots once, in a process of its own, and takes down what it says.
fn boot_apart(
    name: &str,
    case: Case,
    root: Option<&Path>,
    args: &Args,
    outcomes: &mut HashMap<String, Outcome>,
) -> Result<Option<Boot>> {
    let memcg = Memcg::create(&format!("vmm.{}.{name}", std::process::id()))?;
    let mut command = Command::new(std::env::current_exe().context("own program")?);
    command
        .args(["--child", &case.name(), "--memcg"])
        .arg(memcg.path());
    if let Some(root) = root {
        command.arg("--root").arg(root);
    }
    command.arg("--results").arg(&args.results);
    command.args(["--memory", &args.memory.to_string()]);
    command.args(["--passes", &args.passes.to_string()]);
    command.args(["--append", &args.append]);
    if args.traces {
        command.arg("--traces");
    }
    command.arg("--").args(&args.command);
    child::run(name, &mut command, outcomes)
}

fn run_child(name: &str, args: &Args) -> Result<()> {
    let case = Case::chosen(args)?
        .into_iter()
        .find(|case| case.name() == name);
    let case = case.with_context(|| format!("no case {name}"))?;
    let words = words(case, args)?;
    let vmm = Vmm {
        words: &words,
        root: args.root.as_deref().filter(|root| *root != Path::new("/")),
        memcg: args.memcg.as_deref().context("no --memcg")?,
        huge: !matches!(case, Case::Qemu(Backing::Anon | Backing::Memfd, _)),
    };
    balancing::set_affinity(&balancing::other_cpus(1)?)?;
    let mut signs = 0;
    let ran = measure::run(&vmm, LIMIT, |waited| {
        if waited > SIGN * (signs + 1) {
            signs += 1;
            child::progress(format!("{name}: running for {waited:.0?}"));
        }
    })?;
    if args.traces {
        let path = args.results.join(format!("vmm.{name}.trace"));
        let lines: Vec<String> = ran
            .trace
            .records
            .iter()
            .map(|record| record.line(12).to_string())
            .collect();
        fs::write(&path, lines.join("\n") + "\n").with_context(|| path.display().to_string())?;
    }
    for (test, _, judge) in tests(case) {
        let outcome = match judge(&ran, args) {
            Ok(()) => Outcome::Ok,
            Err(why) => Outcome::NotOk(why),
        };
        child::outcome(test, outcome);
    }
    child::progress(format!("{name}: {:?}", ran.boot));
    child::tell(&Message::Figures(Box::new(ran.boot)));
    Ok(())
}

/// The VMM's command line.
fn words(case: Case, args: &Args) -> Result<Vec<String>> {
    let Case::Qemu(backing, has_device) = case else {
        return Ok(args.command.clone());
    };
    let device = match has_device {
        true => Some(Device::assignable()?),
        false => None,
    };
    let (kernel, initrd) = files(Path::new("/"));
    let (append, pages, passes) = (&args.append, args.workload_pages(), args.passes);
    let command_line = format!("{COMMAND_LINE} {append} -- --workload {pages} --passes {passes}");
    let files = (&*kernel, &*initrd);
    Ok(qemu::command(
        files,
        &command_line,
        args.memory,
        backing,
        device.as_deref(),
    ))
}

/// A count of a boot, and its title.
type Column = (&'static str, fn(&Boot) -> u64);
const COLUMNS: &[Column] = &[
    ("scans", |boot| boot.scans),
    ("pages\nhinted", |boot| boot.hinted),
    ("pages\nmigrated", |boot| boot.migrated),
    ("unmap\ncalls", |boot| boot.unmap_calls),
    ("of these\nfor scans", |boot| boot.scan_unmap_calls),
    ("pages KVM\ndropped", |boot| boot.dropped),
    ("faults", |boot| boot.faults),
    ("flush\nrequests", |boot| boot.flush_requests),
];

/// What the boots of each case came to: the mean of each count, the least and the most.
fn table(measured: &[Measured]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    let titles = COLUMNS.iter().map(|(title, _)| *title);
    table.set_header(["VMM", "boots"].into_iter().chain(titles));
    for Measured { name, boots } in measured.iter().filter(|one| !one.boots.is_empty()) {
        let cells = COLUMNS.iter().map(|(_, count)| {
            let counts: Vec<u64> = boots.iter().map(count).collect();
            let mean = counts.iter().sum::<u64>() as f64 / counts.len() as f64;
            let (least, most) = (counts.iter().min(), counts.iter().max());
            let spread = least.zip(most).filter(|(least, most)| least != most);
            let spread = spread.map(|(least, most)| format!("\n{least}-{most}"));
            Cell::new(format!("{mean:.0}{}", spread.unwrap_or_default()))
                .set_alignment(CellAlignment::Right)
        });
        table.add_row(
            [Cell::new(name), Cell::new(boots.len())]
                .into_iter()
                .chain(cells),
        );
    }
    table.to_string()
}
