// SPDX-License-Identifier: GPL-2.0
//! Runs the same cells on several kernels, round by round, and compares what scans cost on each. Boots QEMU, writes the
//! results folder and one JSON file that it is given, prints tables; touches nothing else.
//!
//! Each boot's results are kept as they come, so that an interrupted run goes on where it was. Rounds are interleaved:
//! what drifts on the machine falls on all kernels alike.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use anyhow::{bail, ensure, Context, Result};
use clap::{Args, Parser};
use comfy_table::{presets, Cell, CellAlignment, Table};
use glob::Pattern;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::boot;
use crate::ktap::Outcome;
use crate::mutants::{judge, Expected};
use crate::timeline::Timeline;

/// What to run, and how often.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// A design to run (more than once), and the folder with its initramfs.cpio and its kernel's output folder `o`; the
    /// first is the kernel without any
    #[arg(long = "design", value_name = "NAME=DIR", required = true, value_parser = design)]
    pub designs: Vec<Design>,
    /// What is known about the designs, see selftests/numa-protect/designs.toml
    #[arg(long)]
    pub spec: PathBuf,
    /// The design that the others are held against
    #[arg(long, value_name = "NAME", default_value = "numa-protect")]
    pub reference: String,
    /// The design of which a scan is drawn, beside the first and the one that the others are held against; the recorder
    /// has to be in their initramfs. Without it none is drawn
    #[arg(long, value_name = "NAME", default_value = "")]
    pub drawn: String,
    /// A cell to run (more than once)
    #[arg(long = "cell", value_name = "NAME", required = true)]
    pub cells: Vec<String>,
    /// What is in the names of these cells, and of no other
    #[arg(long, value_name = "NAME", default_value = "")]
    pub only: String,
    /// How often each kernel is booted
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// How many kernels run at the same time: one keeps about one processor busy
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub at_once: u32,
    /// Where each boot's results go, and are found again
    #[arg(long, value_name = "DIR")]
    pub results: PathBuf,
    /// Where the figures of all rounds go
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    /// Emulation, hardware KVM, or hardware KVM where a trial boot with it works
    #[arg(long, value_enum, default_value_t = boot::Accel::Auto)]
    pub accel: boot::Accel,
    /// Where the outcome of the trial boot is remembered
    #[arg(long, value_name = "FILE")]
    pub trial: Option<PathBuf>,
}

/// A kernel to measure.
#[derive(Clone, Debug)]
pub struct Design {
    name: String,
    folder: PathBuf,
}

fn design(text: &str) -> Result<Design> {
    let (name, folder) = text.split_once('=').context("not NAME=DIR")?;
    Ok(Design {
        name: name.to_string(),
        folder: folder.into(),
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    design: Vec<Note>,
    /// Where the reference is worse than others, and why.
    #[serde(default)]
    worse: Vec<Reason>,
}

/// Why the reference may be worse than others.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Reason {
    /// In which column.
    pub column: String,
    /// Why, in one line.
    pub why: String,
}

/// What is known about a design.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Note {
    /// Its name, the folder's in `alternatives/`.
    pub name: String,
    /// What it does, in one line.
    pub idea: String,
    /// Whose idea it is.
    pub from: String,
    /// What it adds to the notifiers' interface.
    pub interface: String,
    /// Whether guests, subscribers and hints are as well off as without it.
    pub sound: bool,
    /// The argument for that, in one line.
    pub why: String,
    /// A boot that shows it.
    #[serde(skip_serializing)]
    shown: Option<Expected>,
}

/// The layout of what is kept and of what is written; another one is not read.
pub const LAYOUT: u32 = 4;
/// The program that measures, guest memory in its cells, in MiB, enough for several stripes of each kind, and what its boots
/// have on the command line: it only counts what is traced, and buffers of the usual size take as long to make as a scan.
const PROGRAM: &str = "numa_protect";
const MEMORY: u32 = 8;
const APPEND: &str = "trace_buf_size=64k";
/// Kinds of paging in the guest's host, and what the kernel's command line says for each.
const PAGING: &[(&str, &str)] = &[("nested", ""), ("shadow", "kvm_amd.npt=0 kvm_intel.ept=0")];
/// The program that boots Linux, how often in all and at one time, the milliseconds from scan to scan, which are the kernel's
/// default for the shortest, and what is compared of it.
const BOOTS_PROGRAM: &str = "linux_boots";
const BOOTS_PERIOD: u32 = 1000;
const BOOTS: u32 = 10;
const BOOTS_A_ROUND: u32 = 5;
const BOOT_COLUMNS: &[(&str, &str)] = &[
    ("unmap calls", "unmap_calls"),
    ("flush requests", "flush_requests"),
    ("faults", "faults"),
    ("scans", "scans"),
    ("migrated", "migrated"),
];
/// The cell of which a scan is drawn.
const DRAWN_CELL: &str = "anon.pinned_half";
/// Its tests that hold for every sound design.
const SOUND: &[&str] = &["*.vm.*", "*.guest.*"];

/// What is better in a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    /// A smaller number.
    Less,
    /// A larger number.
    More,
    /// The scan's own work, which no design is there to change.
    Neither,
}

/// How a column's values are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// As they are.
    Count,
    /// As a ratio to the first design's of the same round.
    Time,
}

/// A column of the tables.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Title {
    /// What is counted: `/walk` per walk of all of the guest's memory by a scan, `/step` for the scans between two sweeps
    /// over it by the vCPUs, `/scan` per scan while they run.
    pub title: String,
    /// How values are compared.
    pub kind: Kind,
    /// What is better.
    pub better: Better,
}

/// A column, and how to get its value from what the program wrote of a cell.
struct Column {
    title: &'static str,
    kind: Kind,
    better: Better,
    value: fn(&Value) -> Option<f64>,
}

const COLUMNS: &[Column] = &[
    count("notifier calls/walk", Better::Less, |cell| {
        profiled(cell, "notifier_calls", "walks")
    }),
    count("mmu_lock writes/step", Better::Less, |cell| {
        cell["profile"]["lock_writes"].as_f64()
    }),
    count("hinted/step", Better::Neither, |cell| {
        per_step(cell, "hinted")
    }),
    count("dropped/step", Better::Less, |cell| {
        per_step(cell, "dropped")
    }),
    count(NOT_HINTED, Better::Less, |cell| {
        let (dropped, hinted) = (per_step(cell, "dropped")?, per_step(cell, "hinted")?);
        Some((dropped - hinted).max(0.0))
    }),
    count("faults/step", Better::Less, |cell| per_step(cell, "faults")),
    count("flush requests/step", Better::Less, |cell| {
        per_step(cell, "flush_requests_scan")
    }),
    count("migrated", Better::Neither, |cell| {
        cell["migrated"].as_f64()
    }),
    count("running: retries/scan", Better::Less, |cell| {
        running(cell, "retries")
    }),
    count("running: flush requests/scan", Better::Less, |cell| {
        running(cell, "flush_requests")
    }),
    time("mmu_lock held", Better::Less, |cell| {
        cell["profile"]["lock_held_ns"].as_f64()
    }),
    time("task_numa_work()", Better::Less, |cell| {
        profiled(cell, "scan_ns", "scan_walks")
    }),
    time("running: progress", Better::More, |cell| {
        let run = &cell["free_run"];
        Some(run["touched"].as_f64()? / run["scanned_s"].as_f64()?)
    }),
    time("running: longest stall", Better::Less, |cell| {
        cell["free_run"]["longest_stall_s"].as_f64()
    }),
];
/// Pages that were dropped in vain.
const NOT_HINTED: &str = "dropped, not hinted/step";

const fn count(title: &'static str, better: Better, value: fn(&Value) -> Option<f64>) -> Column {
    let kind = Kind::Count;
    Column {
        title,
        kind,
        better,
        value,
    }
}

const fn time(title: &'static str, better: Better, value: fn(&Value) -> Option<f64>) -> Column {
    let kind = Kind::Time;
    Column {
        title,
        kind,
        better,
        value,
    }
}

/// The median over the steps of a cell: most are alike, and one may be far out (a vCPU that kicks the other for each page
/// it maps). The first is left out: memory goes to the vCPUs' node in it.
fn per_step(cell: &Value, figure: &str) -> Option<f64> {
    let steps = cell["each_step"].as_array()?.get(1..)?;
    let values: Option<Vec<f64>> = steps.iter().map(|step| step[figure].as_f64()).collect();
    let mut values = values.filter(|values| !values.is_empty())?;
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    Some(match values.len() % 2 {
        1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    })
}

/// What was probed, per walk of guest memory by a scan.
fn profiled(cell: &Value, figure: &str, walks: &str) -> Option<f64> {
    let profile = &cell["profile"];
    let walks = profile[walks].as_f64().filter(|walks| *walks > 0.0)?;
    Some(profile[figure].as_f64()? / walks)
}

/// Of the part in which the guest runs freely, per scan.
fn running(cell: &Value, figure: &str) -> Option<f64> {
    let run = &cell["free_run"];
    let scans = run["scans"].as_f64().filter(|scans| *scans > 0.0)?;
    Some(run[figure].as_f64()? / scans)
}

/// What one boot left.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Kept {
    layout: u32,
    /// Of the kernel and the programs.
    key: String,
    /// What it ran on.
    accel: boot::Accel,
    /// Why the kernel or the program failed, if it did. Such a boot is done again when it is asked for again.
    failure: Option<String>,
    /// The tests of the program that held.
    held: Vec<String>,
    /// Those that did not.
    failed: Vec<String>,
    /// By name: what the program measured.
    cells: BTreeMap<String, Value>,
    /// Whether what was said to show the design's fault did, and how, or why not.
    shown: Option<Result<String, String>>,
    /// By group: what was counted in each boot of Linux.
    boots: BTreeMap<String, Vec<Value>>,
    /// What was to be drawn.
    timeline: Option<Timeline>,
}

/// What a boot is for.
#[derive(Clone, Copy, Debug)]
enum Purpose<'a> {
    /// To measure the cells, with this paging in the guest's host.
    Measure(&'static str),
    /// To boot Linux in a VM.
    Boots,
    /// To show what is wrong with a design.
    Show(&'a Expected),
    /// To draw a scan.
    Draw,
}

/// One boot of the plan.
#[derive(Clone, Debug)]
struct Boot<'a> {
    design: &'a Design,
    /// The name of its results, after the design's.
    name: String,
    purpose: Purpose<'a>,
    append: String,
    programs: Vec<String>,
}

/// Runs what is missing, compares, prints, writes; whether every boot came to its end.
pub fn designs(options: &Options) -> Result<bool> {
    let (notes, reasons) = notes(options)?;
    let plan = plan(options, &notes);
    let mut kept = Vec::new();
    let mut missing = Vec::new();
    for one in &plan {
        match find(options, one)? {
            Some(found) => kept.push((one.clone(), found)),
            None => missing.push(one),
        }
    }
    for (one, kept_now) in missing.iter().zip(run_all(options, &missing)?) {
        kept.push(((*one).clone(), kept_now));
    }
    let accel = kept[0].1.accel;
    if let Some((one, _)) = kept.iter().find(|(_, kept)| kept.accel != accel) {
        bail!(
            "{} ran on something else than {}: move one of them away, or choose with ACCEL=",
            place(options, one).display(),
            place(options, &kept[0].0).display()
        );
    }
    let data = Data::new(options, &notes, &reasons, &kept);
    data.print(&options.reference);
    if options.only.is_empty() {
        write(&options.output, &serde_json::to_vec_pretty(&data)?)?;
    } else {
        println!("Not written to {}: not all cells", options.output.display());
    }
    let unexplained = data
        .worse(&options.reference)
        .0
        .iter()
        .any(|one| one.why.is_none());
    if unexplained && options.only.is_empty() {
        eprintln!(
            "error: {}: does not say why (see above)",
            options.spec.display()
        );
    }
    let mut good = !unexplained || !options.only.is_empty();
    for (one, kept) in &kept {
        let not_shown = kept.shown.as_ref().and_then(|shown| shown.as_ref().err());
        for failure in kept.failure.iter().chain(not_shown) {
            eprintln!("error: {}, {}: {failure}", one.design.name, one.name);
            good = false;
        }
    }
    Ok(good)
}

/// Runs these boots, `--at-once` at a time, in order. After one that cannot be run no other is begun.
fn run_all(options: &Options, missing: &[&Boot]) -> Result<Vec<Kept>> {
    let begun = Instant::now();
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let gone_wrong = AtomicBool::new(false);
    let work = || {
        let mut ran = Vec::new();
        while !gone_wrong.load(Relaxed) {
            let index = next.fetch_add(1, Relaxed);
            let Some(one) = missing.get(index) else {
                break;
            };
            let left = match done.load(Relaxed) {
                0 => String::new(),
                done => {
                    let left = begun.elapsed() / done as u32 * (missing.len() - done) as u32;
                    format!(", about {} min left", left.as_secs().div_ceil(60))
                }
            };
            let (number, of) = (index + 1, missing.len());
            let design = &one.design.name;
            eprintln!("==> boot {number} of {of}{left}: {design}, {}", one.name);
            let kept = run(options, one);
            gone_wrong.fetch_or(kept.is_err(), Relaxed);
            done.fetch_add(1, Relaxed);
            ran.push((index, kept));
        }
        ran
    };
    let mut all: Vec<(usize, Result<Kept>)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..options.at_once).map(|_| scope.spawn(work)).collect();
        let ran = workers.into_iter().map(|worker| worker.join());
        ran.flat_map(|ran| ran.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    all.sort_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, kept)| kept).collect()
}

/// What is known about the designs, in the order in which they were named.
fn notes(options: &Options) -> Result<(Vec<Note>, Vec<Reason>)> {
    let path = &options.spec;
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let spec: Spec = toml::from_str(&text).with_context(|| path.display().to_string())?;
    let known = |name: &str| spec.design.iter().find(|note| note.name == name);
    let named = |name: &str| options.designs.iter().any(|design| design.name == name);
    ensure!(
        named(&options.reference),
        "--reference {}: not one of the designs to run",
        options.reference
    );
    ensure!(
        options.drawn.is_empty() || known(&options.drawn).is_some(),
        "--drawn {}: {} says nothing about it",
        options.drawn,
        path.display()
    );
    let notes: Result<Vec<Note>> = options
        .designs
        .iter()
        .map(|design| {
            let note = known(&design.name);
            let name = &design.name;
            note.cloned()
                .with_context(|| format!("{}: says nothing about {name}", path.display()))
        })
        .collect();
    Ok((notes?, spec.worse))
}

/// Every boot, in order.
fn plan<'a>(options: &'a Options, notes: &'a [Note]) -> Vec<Boot<'a>> {
    let measure = format!(
        "{PROGRAM},--profile,--memory={MEMORY},--free-run=500,--only={}",
        options.only
    );
    let mut plan = Vec::new();
    for round in 1..=options.rounds {
        for (paging, append) in PAGING {
            // Another one begins each round, so that no design always runs on what another left.
            let designs = options.designs.iter().cycle().skip(round as usize - 1);
            plan.extend(designs.take(options.designs.len()).map(|design| Boot {
                design,
                name: format!("{paging}-paging.round-{round}"),
                purpose: Purpose::Measure(paging),
                append: format!("{APPEND} {append}"),
                programs: vec![measure.clone()],
            }));
        }
    }
    if !options.only.is_empty() {
        return plan;
    }
    for round in 1..=BOOTS / BOOTS_A_ROUND {
        plan.extend(options.designs.iter().map(|design| Boot {
            design,
            name: format!("{BOOTS_PROGRAM}.round-{round}"),
            purpose: Purpose::Boots,
            append: String::new(),
            programs: vec![format!(
                "{BOOTS_PROGRAM},--boots={BOOTS_A_ROUND},--period={BOOTS_PERIOD}"
            )],
        }));
    }
    for (design, note) in options.designs.iter().zip(notes) {
        plan.extend(note.shown.as_ref().map(|expected| Boot {
            design,
            name: "shown".into(),
            purpose: Purpose::Show(expected),
            append: expected.append.clone(),
            programs: expected.tests.clone(),
        }));
    }
    if options.drawn.is_empty() {
        return plan;
    }
    let drawn = [&options.designs[0].name, &options.drawn, &options.reference];
    let is_drawn = |design: &&Design| drawn.contains(&&design.name);
    plan.extend(options.designs.iter().filter(is_drawn).map(|design| Boot {
        design,
        name: "timeline".into(),
        purpose: Purpose::Draw,
        append: String::new(),
        programs: vec![format!("{PROGRAM},--events,--steps=2,--only={DRAWN_CELL}")],
    }));
    plan
}

fn place(options: &Options, one: &Boot) -> PathBuf {
    let cells = match &options.only[..] {
        "" => "all",
        only => only,
    };
    let boot = format!("{}.{}", one.design.name, one.name);
    options.results.join(cells).join(boot)
}

/// What is kept of this boot, if it is of the same kernel and programs and came to its end.
fn find(options: &Options, one: &Boot) -> Result<Option<Kept>> {
    let file = place(options, one).join("kept.json");
    let Ok(text) = fs::read(&file) else {
        return Ok(None);
    };
    let Ok(value) = serde_json::from_slice::<Value>(&text) else {
        return Ok(None);
    };
    if value["layout"] != LAYOUT {
        bail!(
            "{}: layout {}, and this reads layout {LAYOUT} only: move {} away, or remove it",
            file.display(),
            value["layout"],
            options.results.display()
        );
    }
    let kept: Kept = serde_json::from_value(value).with_context(|| file.display().to_string())?;
    let good = kept.failure.is_none() && !matches!(kept.shown, Some(Err(_)));
    Ok((kept.key == key(one)? && good).then_some(kept))
}

/// The kernel and the initramfs.
fn files(design: &Design) -> [PathBuf; 2] {
    ["o/arch/x86/boot/bzImage", "initramfs.cpio"].map(|file| design.folder.join(file))
}

/// Says what results depend on.
fn key(one: &Boot) -> Result<String> {
    let mut key = format!("{} {}", one.append, one.programs.join(" "));
    for path in files(one.design) {
        key += &format!("; {}", boot::build_of(&path)?);
    }
    if let Purpose::Show(expected) = one.purpose {
        key += &serde_json::to_string(expected)?;
    }
    Ok(key)
}

/// [`boot::Options`] with what its arguments default to.
#[derive(Parser)]
struct BootOptions {
    #[command(flatten)]
    boot: boot::Options,
}

fn run(options: &Options, one: &Boot) -> Result<Kept> {
    let results = place(options, one);
    let [kernel, initrd] = files(one.design);
    let mut arguments = vec!["boot".into(), "--kernel".into(), kernel.into_os_string()];
    arguments.extend(["--initrd".into(), initrd.into_os_string()]);
    arguments.extend(["--results".into(), results.clone().into_os_string()]);
    let defaults = BootOptions::try_parse_from(arguments)?.boot;
    let key = key(one)?;
    let parent = results.parent().unwrap_or(&options.results);
    fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
    let boot_options = boot::Options {
        name: format!("{}, {}", one.design.name, one.name),
        accel: options.accel,
        trial: options.trial.clone(),
        append: one.append.clone(),
        programs: one.programs.clone(),
        ..defaults
    };
    let measure = || -> Result<(boot::Boot, Kept)> {
        boot::boot(&boot_options)?;
        let (folder, boot) = boot::outcome(&results)?;
        let kept = summarise(key.clone(), options, one, &folder, &boot)?;
        Ok((boot, kept))
    };
    let (boot, mut kept) = measure()?;
    // A machine that is busy for a moment is no finding about the kernel, and hours of other boots wait for this one.
    if boot.failure.is_none() && kept.failure.is_some() {
        eprintln!(
            "==> once more, as not all was measured: {}, {}",
            one.design.name, one.name
        );
        kept = measure()?.1;
    }
    fs::create_dir_all(&results)?;
    write(&results.join("kept.json"), &serde_json::to_vec(&kept)?)?;
    Ok(kept)
}

/// Writes a file as a whole or not at all.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| path.display().to_string())
}

/// What `program` wrote, if it came so far.
fn written(folder: &Path, program: &str) -> Result<Value> {
    let file = folder.join(format!("{program}.json"));
    let text = match fs::read(&file) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Value::Null),
        other => other.with_context(|| file.display().to_string())?,
    };
    serde_json::from_slice(&text).with_context(|| file.display().to_string())
}

fn summarise(
    key: String,
    options: &Options,
    one: &Boot,
    folder: &Path,
    boot: &boot::Boot,
) -> Result<Kept> {
    let tests = |wanted: fn(&Outcome) -> bool| -> Vec<String> {
        boot.programs
            .iter()
            .flat_map(|program| &program.report.tests)
            .filter(|test| wanted(&test.outcome))
            .map(|test| test.name.clone())
            .collect()
    };
    let mut cells = BTreeMap::new();
    let value = written(folder, PROGRAM)?;
    for cell in value["cases"].as_array().into_iter().flatten() {
        if let Some(name) = cell["name"].as_str() {
            cells.insert(name.to_string(), cell.clone());
        }
    }
    let mut boots = BTreeMap::new();
    let value = written(folder, BOOTS_PROGRAM)?;
    for group in value["groups"].as_array().into_iter().flatten() {
        if let (Some(name), Some(some)) = (group["name"].as_str(), group["boots"].as_array()) {
            boots.insert(name.to_string(), some.clone());
        }
    }
    let unfinished = || -> Option<String> {
        for program in &boot.programs {
            if let Some(problem) = program.report.problems.first() {
                return Some(format!("{}: {problem}", program.name));
            }
        }
        let skipped = tests(|outcome| matches!(outcome, Outcome::Skip(_)));
        let missing = match one.purpose {
            Purpose::Measure(_) => options
                .cells
                .iter()
                .find(|cell| !cells.contains_key(*cell))
                .cloned(),
            Purpose::Boots => boots
                .iter()
                .find(|(_, some)| some.len() != BOOTS_A_ROUND as usize)
                .map(|(group, _)| group.clone()),
            Purpose::Show(_) | Purpose::Draw => None,
        }?;
        let why = match skipped.is_empty() {
            true => String::new(),
            false => format!(" ({} tests were skipped)", skipped.len()),
        };
        Some(format!(
            "{missing} was not measured{why}: see {}",
            folder.display()
        ))
    };
    let timeline = || {
        let file = |extension| folder.join(format!("{DRAWN_CELL}.{extension}"));
        Timeline::read(&file("records"), &file("events"))
    };
    let (drawn, not_drawn) = match one.purpose {
        Purpose::Draw => match timeline() {
            Ok(drawn) => (Some(drawn), None),
            Err(error) => (None, Some(format!("{error:#}"))),
        },
        _ => (None, None),
    };
    // A report of the kernel may be what a boot has to show.
    let failure = match one.purpose {
        Purpose::Show(_) => None,
        _ => boot.failure.clone().or_else(unfinished).or(not_drawn),
    };
    Ok(Kept {
        layout: LAYOUT,
        key,
        accel: boot.accel,
        held: tests(|outcome| matches!(outcome, Outcome::Ok)),
        failed: tests(|outcome| matches!(outcome, Outcome::NotOk(_))),
        cells,
        shown: match one.purpose {
            Purpose::Show(expected) => Some(judge(expected, boot)),
            _ => None,
        },
        boots,
        timeline: drawn,
        failure,
    })
}

/// By design: for each column, the value of each round.
pub type Rounds = BTreeMap<String, Vec<Vec<f64>>>;

/// What was measured of one cell on one kind of paging.
#[derive(Debug, Serialize, Deserialize)]
pub struct Measured {
    /// `nested` or `shadow`.
    pub paging: String,
    /// The cell's name.
    pub cell: String,
    /// The values.
    pub values: Rounds,
}

/// How a design did in the tests that every sound one holds, and what shows the fault of one that is not.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Evidence {
    /// How many results of such tests were good, in all rounds.
    pub held: usize,
    /// The tests that failed, and how often.
    pub failed: BTreeMap<String, usize>,
    /// What showed the fault.
    pub shown: Option<String>,
}

/// What came of all boots, as it is written and read again for the report.
#[derive(Debug, Serialize, Deserialize)]
pub struct Data {
    /// [`LAYOUT`]
    pub layout: u32,
    /// What all ran on.
    pub accel: boot::Accel,
    /// How often each kernel was booted.
    pub rounds: u32,
    /// The columns.
    pub columns: Vec<Title>,
    /// The designs.
    pub designs: Vec<Note>,
    /// Where the reference may be worse.
    pub reasons: Vec<Reason>,
    /// By design.
    pub evidence: BTreeMap<String, Evidence>,
    /// By design, of some: one scan of half pinned anonymous memory while the guest runs.
    pub timelines: BTreeMap<String, Timeline>,
    /// By design and group, of boots of Linux: for each of the columns [`Data::boot_columns`], the value of each boot.
    pub boots: BTreeMap<String, Rounds>,
    /// What was counted of them.
    pub boot_columns: Vec<String>,
    /// The cells.
    pub measured: Vec<Measured>,
}

/// Where another design is better in one column.
pub struct Worse<'a> {
    /// The column.
    pub column: &'a str,
    /// The other design.
    pub design: &'a str,
    /// In which cells, and both values.
    pub cells: Vec<(String, [String; 2])>,
    /// Why.
    pub why: Option<&'a Reason>,
}

impl Worse<'_> {
    /// In one line.
    pub fn text(&self) -> String {
        let (cell, [own, other]) = &self.cells[0];
        let more = match self.cells.len() - 1 {
            0 => String::new(),
            more => format!(", and in {more} cells more"),
        };
        let why = self.why.map_or("not explained yet", |reason| &reason.why);
        format!(
            "{}, {}: {own} instead of {other} in {cell}{more}: {why}",
            self.design, self.column
        )
    }
}

/// In how many comparisons of counts `reference` was not worse.
pub fn better(reference: &str, worse: &[Worse], compared: usize) -> String {
    let lost: usize = worse.iter().map(|one| one.cells.len()).sum();
    match compared {
        0 => "One round, or one design: nothing to be said of what is noise.".to_string(),
        _ => format!(
            "{reference} is best or level in {} of {compared} comparisons of counts with sound designs.",
            compared - lost
        ),
    }
}

impl Data {
    fn new(options: &Options, designs: &[Note], reasons: &[Reason], kept: &[(Boot, Kept)]) -> Data {
        let sound: Vec<Pattern> = SOUND
            .iter()
            .map(|one| Pattern::new(one).expect("a pattern"))
            .collect();
        let is_sound = |name: &&String| sound.iter().any(|one| one.matches(name));
        let mut evidence: BTreeMap<String, Evidence> = BTreeMap::new();
        let mut measured: BTreeMap<(&str, &str), Rounds> = BTreeMap::new();
        let mut timelines = BTreeMap::new();
        let mut boots: BTreeMap<String, Rounds> = BTreeMap::new();
        for (boot, one) in kept {
            let about = evidence.entry(boot.design.name.clone()).or_default();
            if let Some(shown) = &one.shown {
                about.shown = shown.as_ref().ok().cloned();
            }
            timelines.extend(
                one.timeline
                    .clone()
                    .map(|one| (boot.design.name.clone(), one)),
            );
            for (group, some) in &one.boots {
                let columns = boots
                    .entry(boot.design.name.clone())
                    .or_default()
                    .entry(group.clone())
                    .or_insert_with(|| vec![Vec::new(); BOOT_COLUMNS.len()]);
                for ((_, field), values) in BOOT_COLUMNS.iter().zip(columns) {
                    values.extend(some.iter().filter_map(|one| one[*field].as_f64()));
                }
            }
            let Purpose::Measure(paging) = boot.purpose else {
                continue;
            };
            let of_cell = |name: &&String| {
                let cell = |cell: &String| name.starts_with(&format!("{cell}."));
                one.cells.keys().any(cell)
            };
            about.held += one.held.iter().filter(is_sound).count();
            for name in one.failed.iter().filter(is_sound).filter(of_cell) {
                *about.failed.entry(name.clone()).or_default() += 1;
            }
            let base = kept.iter().find(|(other, _)| {
                other.name == boot.name && other.design.name == options.designs[0].name
            });
            for (name, cell) in &one.cells {
                let base = base.and_then(|(_, kept)| kept.cells.get(name));
                let columns = measured
                    .entry((paging, name))
                    .or_default()
                    .entry(boot.design.name.clone())
                    .or_insert_with(|| vec![Vec::new(); COLUMNS.len()]);
                for (column, rounds) in COLUMNS.iter().zip(columns) {
                    let value = (column.value)(cell);
                    rounds.extend(match column.kind {
                        Kind::Count => value,
                        Kind::Time => value
                            .zip(base.and_then(column.value))
                            .filter(|(_, base)| *base > 0.0)
                            .map(|(value, base)| value / base),
                    });
                }
            }
        }
        Data {
            layout: LAYOUT,
            accel: kept[0].1.accel,
            rounds: options.rounds,
            columns: COLUMNS
                .iter()
                .map(|column| Title {
                    title: column.title.into(),
                    kind: column.kind,
                    better: column.better,
                })
                .collect(),
            designs: designs.to_vec(),
            reasons: reasons.to_vec(),
            evidence,
            timelines,
            boots,
            boot_columns: BOOT_COLUMNS.iter().map(|one| one.0.into()).collect(),
            measured: measured
                .into_iter()
                .map(|((paging, cell), values)| Measured {
                    paging: paging.into(),
                    cell: cell.into(),
                    values,
                })
                .collect(),
        }
    }

    /// Where a sound design that hints as much is better than `reference` in something that is not a time, outside the noise;
    /// and how many comparisons that is of.
    pub fn worse(&self, reference: &str) -> (Vec<Worse<'_>>, usize) {
        let mut worse: Vec<Worse> = Vec::new();
        let mut compared = 0;
        for measured in &self.measured {
            let Some(ours) = measured.values.get(reference) else {
                continue;
            };
            for (design, values) in &measured.values {
                let is_sound = self
                    .designs
                    .iter()
                    .any(|note| note.name == *design && note.sound);
                let both = |index: usize| Spread::of(&ours[index]).zip(Spread::of(&values[index]));
                let differ = |index: usize, own: Spread, other: Spread| {
                    own.differs(
                        other,
                        [reference, design].map(|name| self.noise(name, index)),
                    )
                };
                let hints_alike = (0..self.columns.len())
                    .filter(|index| self.columns[*index].better == Better::Neither)
                    .filter_map(|index| Some((index, both(index)?)))
                    .all(|(index, (own, other))| !differ(index, own, other));
                if design == reference || !is_sound || !hints_alike {
                    continue;
                }
                for (index, column) in self.columns.iter().enumerate() {
                    let Some((own, other)) = both(index) else {
                        continue;
                    };
                    if column.kind == Kind::Time || own.rounds.min(other.rounds) < 2 {
                        continue;
                    }
                    compared += 1;
                    let is_worse = match column.better {
                        Better::Less => own.mean > other.mean,
                        Better::More => own.mean < other.mean,
                        Better::Neither => false,
                    };
                    if !is_worse || !differ(index, own, other) {
                        continue;
                    }
                    let cell = format!("{} ({})", measured.cell, measured.paging);
                    let text = [own, other].map(|spread| spread.text(column.kind));
                    let found = (cell, text);
                    match worse
                        .iter_mut()
                        .find(|one| one.column == column.title && one.design == design)
                    {
                        Some(one) => one.cells.push(found),
                        None => worse.push(Worse {
                            column: &column.title,
                            design,
                            cells: vec![found],
                            why: self.reasons.iter().find(|one| one.column == column.title),
                        }),
                    }
                }
            }
        }
        (worse, compared)
    }

    fn print(&self, reference: &str) {
        if !self.boots.is_empty() {
            let mut table = Table::new();
            table.load_preset(presets::ASCII_MARKDOWN);
            let titles = self.boot_titles();
            table.set_header(std::iter::once("design").chain(titles.iter().map(|one| &one[..])));
            for (name, texts) in self.boot_rows() {
                let texts = texts
                    .into_iter()
                    .map(|text| Cell::new(text).set_alignment(CellAlignment::Right));
                table.add_row(std::iter::once(Cell::new(name)).chain(texts));
            }
            println!("\nBoots of Linux in a VM that is scanned\n\n{table}");
        }
        for measured in &self.measured {
            let mut table = Table::new();
            table.load_preset(presets::ASCII_MARKDOWN);
            let titles = self.columns.iter().map(|column| &column.title[..]);
            table.set_header(std::iter::once("design").chain(titles));
            for note in &self.designs {
                if !measured.values.contains_key(&note.name) {
                    continue;
                }
                let texts = (0..self.columns.len()).map(|index| {
                    let text = self.text(measured, &note.name, index, reference);
                    Cell::new(text).set_alignment(CellAlignment::Right)
                });
                table.add_row(std::iter::once(Cell::new(&note.name)).chain(texts));
            }
            println!("\n{}, {} paging\n\n{table}", measured.cell, measured.paging);
        }
        println!(
            "\nMean and standard deviation over {} rounds. `*`: further from {reference} than chance explains.\n\
             Times are ratios to {} in the same round.\n",
            self.rounds, self.designs[0].name
        );
        for note in &self.designs {
            let sound = if note.sound { "sound" } else { "not sound" };
            println!(
                "{}: {sound}: {} ({})",
                note.name,
                note.why,
                self.seen(&note.name)
            );
        }
        println!();
        let (worse, compared) = self.worse(reference);
        for one in &worse {
            println!("{reference} is worse than {}", one.text());
        }
        println!("{}", better(reference, &worse, compared));
    }

    /// The titles of the table of boots: each column for each group.
    pub fn boot_titles(&self) -> Vec<String> {
        let groups = self
            .boots
            .values()
            .next()
            .into_iter()
            .flat_map(BTreeMap::keys);
        groups
            .flat_map(|group| {
                self.boot_columns
                    .iter()
                    .map(move |one| format!("{group}: {one}"))
            })
            .collect()
    }

    /// Its rows: a design's name, and mean and deviation of each column.
    pub fn boot_rows(&self) -> Vec<(&str, Vec<String>)> {
        let designs = self.designs.iter().map(|note| &note.name[..]);
        designs
            .filter_map(|name| {
                let columns = self.boots.get(name)?.values().flatten();
                let text = |values: &Vec<f64>| {
                    Spread::of(values).map_or("-".into(), |spread| spread.text(Kind::Count))
                };
                Some((name, columns.map(text).collect()))
            })
            .collect()
    }

    /// How noisy a column is for a design: its standard deviation relative to the mean, over all cells.
    fn noise(&self, design: &str, index: usize) -> f64 {
        let spreads = self
            .measured
            .iter()
            .filter_map(|measured| Spread::of(measured.values.get(design)?.get(index)?));
        let squares: Vec<f64> = spreads
            .filter(|spread| spread.mean > 0.0 && spread.rounds > 1)
            .map(|spread| (spread.deviation / spread.mean).powi(2))
            .collect();
        match squares.len() {
            0 => 0.0,
            cells => (squares.iter().sum::<f64>() / cells as f64).sqrt(),
        }
    }

    /// One value of a table, with its mark.
    pub fn text(&self, measured: &Measured, design: &str, index: usize, reference: &str) -> String {
        let spread = |name: &str| Spread::of(measured.values.get(name)?.get(index)?);
        let kind = self.columns[index].kind;
        let noise = [design, reference].map(|name| self.noise(name, index));
        match (spread(design), spread(reference)) {
            (None, _) => "-".to_string(),
            (Some(spread), Some(other)) if spread.differs(other, noise) => {
                format!("{}*", spread.text(kind))
            }
            (Some(spread), _) => format!("{} ", spread.text(kind)),
        }
    }

    /// What was seen of whether a design is sound.
    pub fn seen(&self, name: &str) -> String {
        let Some(seen) = self.evidence.get(name) else {
            return String::new();
        };
        let mut text = seen.shown.iter().cloned().collect::<Vec<_>>();
        text.push(format!("{} results of tests held", seen.held));
        text.extend(
            seen.failed
                .iter()
                .map(|(name, times)| format!("{name} failed {times} times")),
        );
        text.join("; ")
    }
}

/// What all rounds gave for one value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation.
    pub deviation: f64,
    /// The smallest.
    pub least: f64,
    /// The largest.
    pub most: f64,
    rounds: usize,
}

/// How many standard errors apart two means have to be: chance alone does that once in 150,000 comparisons, and there are a
/// few thousand.
const APART: f64 = 4.5;

impl Spread {
    /// Of these, if there are any.
    pub fn of(values: &[f64]) -> Option<Spread> {
        if values.is_empty() {
            return None;
        }
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let squares = values
            .iter()
            .map(|value| (value - mean).powi(2))
            .sum::<f64>();
        Some(Spread {
            mean,
            deviation: match values.len() {
                1 => 0.0,
                _ => (squares / (count - 1.0)).sqrt(),
            },
            least: values.iter().copied().fold(f64::INFINITY, f64::min),
            most: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            rounds: values.len(),
        })
    }

    /// Whether they are further apart than chance explains; with `noise`, for each, the deviation relative to the mean that
    /// its column has in all cells: of the few rounds of one cell, a small deviation may be an accident. One round alone does
    /// not say what is noise.
    pub fn differs(self, other: Spread, noise: [f64; 2]) -> bool {
        let error = |one: Spread, noise: f64| {
            one.deviation.max(noise * one.mean).powi(2) / one.rounds as f64
        };
        let error = (error(self, noise[0]) + error(other, noise[1])).sqrt();
        let gap = (self.mean - other.mean).abs();
        self.rounds.min(other.rounds) > 1 && gap > APART * error
    }

    /// Mean and standard deviation, in words.
    pub fn text(self, kind: Kind) -> String {
        let number = |value: f64| match kind {
            Kind::Time => format!("{value:.2}"),
            Kind::Count if value >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
            Kind::Count => format!("{value:.1}"),
        };
        match self.deviation {
            deviation if deviation > 0.0 => format!("{} ±{}", number(self.mean), number(deviation)),
            _ => number(self.mean),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(values: &[f64]) -> Spread {
        Spread::of(values).unwrap()
    }

    #[test]
    fn a_difference_within_the_noise_is_none() {
        let differ = |one: &[f64], other: &[f64]| spread(one).differs(spread(other), [0.0; 2]);
        assert!(!differ(&[1.0, 3.0], &[2.0, 4.0]));
        assert!(differ(&[1.0, 1.1], &[2.0, 2.1]));
        assert!(!differ(&[1.0, 2.0], &[2.5, 2.6]));
        assert!(differ(&[5.0, 5.0], &[6.0, 6.0]));
        assert!(!differ(&[5.0, 5.0], &[5.0, 5.0]));
        assert!(!differ(&[5.0], &[6.0]));
        // Close together by chance, in a column that is not.
        let (one, other) = (spread(&[222.0, 224.0]), spread(&[201.0, 201.0]));
        assert!(one.differs(other, [0.0; 2]));
        assert!(!one.differs(other, [0.1; 2]));
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn spreads_are_printed_as_what_they_are() {
        assert_eq!(spread(&[1.0]).text(Kind::Count), "1");
        assert_eq!(spread(&[1.0, 2.0]).text(Kind::Count), "1.5 ±0.7");
        assert_eq!(spread(&[1.0, 1.0]).text(Kind::Time), "1.00");
    }

    #[test]
    fn figures_are_divided_by_the_scans() {
        let cell = serde_json::json!({
            "each_step": [{"hinted": 9, "dropped": 9}, {"hinted": 1, "dropped": 4}, {"hinted": 3, "dropped": 6}],
            "profile": {"walks": 4, "notifier_calls": 6, "lock_writes": 2, "scan_walks": 0, "scan_ns": 3},
            "free_run": {"scans": 4, "flush_requests": 2, "touched": 6, "scanned_s": 1.5},
            "migrated": 7,
        });
        let value = |title: &str| {
            let column = COLUMNS.iter().find(|column| column.title == title);
            (column.unwrap().value)(&cell)
        };
        assert_eq!(value("hinted/step"), Some(2.0));
        assert_eq!(value(NOT_HINTED), Some(3.0));
        assert_eq!(value("notifier calls/walk"), Some(1.5));
        assert_eq!(value("mmu_lock writes/step"), Some(2.0));
        assert_eq!(value("mmu_lock held"), None);
        assert_eq!(value("task_numa_work()"), None);
        assert_eq!(value("running: flush requests/scan"), Some(0.5));
        assert_eq!(value("running: progress"), Some(4.0));
        assert_eq!(value("migrated"), Some(7.0));
    }

    fn note(name: &str) -> Note {
        Note {
            name: name.into(),
            idea: String::new(),
            from: String::new(),
            interface: String::new(),
            sound: true,
            why: String::new(),
            shown: None,
        }
    }

    /// Two designs with these rounds of one column each.
    fn data(column: Column, ours: &[f64], theirs: &[f64]) -> Data {
        let values = [("ours", ours), ("theirs", theirs)];
        Data {
            layout: LAYOUT,
            accel: boot::Accel::Tcg,
            rounds: 2,
            columns: vec![Title {
                title: column.title.into(),
                kind: column.kind,
                better: column.better,
            }],
            designs: vec![note("ours"), note("theirs")],
            reasons: vec![],
            evidence: BTreeMap::new(),
            timelines: BTreeMap::new(),
            boots: BTreeMap::new(),
            boot_columns: vec![],
            measured: vec![Measured {
                paging: "nested".into(),
                cell: "anon".into(),
                values: values
                    .map(|(name, rounds)| (name.to_string(), vec![rounds.to_vec()]))
                    .into(),
            }],
        }
    }

    #[test]
    fn what_is_worse_is_named() {
        let less = || count("faults", Better::Less, |_| None);
        assert_eq!(
            data(less(), &[3.0, 4.0], &[1.0, 1.0]).worse("ours").0.len(),
            1
        );
        assert_eq!(
            data(less(), &[1.0, 1.0], &[3.0, 4.0]).worse("ours").0.len(),
            0
        );
        assert_eq!(
            data(less(), &[1.0, 3.0], &[1.0, 1.0]).worse("ours").0.len(),
            0
        );
        let more = || count("progress", Better::More, |_| None);
        assert_eq!(
            data(more(), &[1.0, 1.0], &[3.0, 4.0]).worse("ours").0.len(),
            1
        );
        let neither = || count("hinted", Better::Neither, |_| None);
        assert_eq!(
            data(neither(), &[3.0, 4.0], &[1.0, 1.0])
                .worse("ours")
                .0
                .len(),
            0
        );
        let taken = || time("held", Better::Less, |_| None);
        assert_eq!(
            data(taken(), &[3.0, 4.0], &[1.0, 1.0])
                .worse("ours")
                .0
                .len(),
            0
        );
    }

    #[test]
    fn results_of_another_layout_are_left_alone() {
        let results = std::env::temp_dir().join(format!("designs.{}", std::process::id()));
        let one = Design {
            name: "one".into(),
            folder: results.join("one"),
        };
        let options = Options {
            designs: vec![one.clone()],
            spec: PathBuf::new(),
            reference: "one".into(),
            drawn: String::new(),
            cells: vec!["anon".into()],
            only: String::new(),
            rounds: 1,
            at_once: 1,
            results: results.clone(),
            output: results.join("out"),
            accel: boot::Accel::Tcg,
            trial: None,
        };
        let plan = plan(&options, &[]);
        for file in files(&one) {
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "").unwrap();
        }
        assert!(find(&options, &plan[0]).unwrap().is_none());
        let place = place(&options, &plan[0]);
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join("kept.json"), r#"{"layout": 1}"#).unwrap();
        let why = find(&options, &plan[0]).unwrap_err().to_string();
        assert!(why.contains("layout 1") && why.contains("move"), "{why}");
        // What was cut off is measured again.
        fs::write(place.join("kept.json"), r#"{"lay"#).unwrap();
        assert!(find(&options, &plan[0]).unwrap().is_none());
        fs::remove_dir_all(results).unwrap();
    }

    #[test]
    fn the_specification_is_read() {
        let text = include_str!("../../numa-protect/designs.toml");
        let spec: Spec = toml::from_str(text).unwrap();
        let names: Vec<&str> = spec.design.iter().map(|note| &note.name[..]).collect();
        assert!(names.contains(&"numa-protect"));
        for reason in &spec.worse {
            let mut columns = COLUMNS.iter();
            assert!(columns.any(|column| column.title == reason.column));
        }
    }
}
