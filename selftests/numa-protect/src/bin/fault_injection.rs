// SPDX-License-Identifier: GPL-2.0
//! What the recorder, a VM and a NUMA scan do when memory runs short; changes the machine's settings of scans and of
//! fault injection while it runs.
//!
//! The kernel fails the first allocation of a thread, slab or page, then in the next try the second, and so on until a
//! try needs fewer than that (Documentation/fault-injection/fault-injection.rst, `fail-nth`). So every allocation on the
//! way fails once:
//!
//! - when the recorder is attached, in the thread that writes to `attach`;
//! - when a VM and its vCPU are made, in the thread that makes them;
//! - when the guest touches its memory first, in the vCPU's thread;
//! - in NUMA scans, which the vCPU's thread makes in place of user code that only uses CPU time. Guest memory is pinned in
//!   stripes finer than what a bit of a report stands for if there is no memory for an exact one.
//!
//! Prints KTAP. In each try the kernel has to do what it is asked, or say why not, and leave nothing behind.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use clap::Parser;
use guest::balancing::{self, Settings, CPU_NODE, MEMORY_NODE};
use guest::ktap::{diagnostic, Ktap, Outcome};
use guest::memcg::{self, Memcg, Source};
use guest::memory::{Backing, GuestMemory, Pinned};
use guest::needs::{self, Need};
use guest::vm::{Sweep, Vm};
use guest::PAGE;
use trace::client::{self, Client};
use trace::record::{kind, Record};
use trace::sequence::{Report, Sequence};

/// Guest memory of the VMs that are not scanned, in bytes.
const SMALL: usize = 4 << 20;
/// Scans in each try: the first may have begun before the guest stopped.
const SCANS: u64 = 2;
/// The longest that these, or the start of a thread, may take.
const LIMIT: Duration = Duration::from_secs(120);
/// Room in the recorder, in records.
const RECORDS: u64 = 1 << 16;
/// How often a scan is tried until it is the vCPU's thread that makes it.
const TRIES: u32 = 30;
/// More allocations than this in one operation: something tries again and again.
const MOST: u32 = 5000;
/// Where the kernel says what it leaked.
const LEAKS: &str = "/sys/kernel/debug/kmemleak";
/// Younger memory is never called leaked.
const LEAK_AGE: Duration = Duration::from_secs(6);

/// What the tests cannot do without.
const ALL: &[Need] = &[
    Need {
        path: FailNth::OWN,
        remedy: "CONFIG_FAULT_INJECTION",
    },
    Need {
        path: "/sys/kernel/debug/failslab",
        remedy: "CONFIG_FAILSLAB",
    },
    Need {
        path: "/sys/kernel/debug/fail_page_alloc",
        remedy: "CONFIG_FAIL_PAGE_ALLOC",
    },
    needs::KVM,
    needs::TWO_NODES,
    needs::NUMA_BALANCING,
    needs::IO_URING,
    needs::RECORDER,
];

/// What the recorder, a VM and a NUMA scan do when memory runs short.
#[derive(Parser)]
struct Args {
    /// Folder for results; this program leaves none.
    #[arg(long, default_value = ".")]
    results: PathBuf,
    /// Guest memory that is scanned, in MiB; from 4 on, a report needs more room than it has on the stack.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(4..=2044))]
    memory: u32,
    /// Run the tests here, with the settings as they are, in the memory cgroup at this path.
    #[arg(long, hide = true)]
    memcg: Option<PathBuf>,
}

type Test = fn(&Args) -> Result<()>;
type ScanTest = fn(&[Scan]) -> Judgement;

const TESTS: &[(&str, Test)] = &[
    ("attach.whole_or_not_at_all", |_| attach()),
    ("vm.made_or_refused", |_| make_vm()),
    ("vm.first_pass_goes_on", |_| first_pass()),
];
const SCAN_TESTS: &[(&str, ScanTest)] = &[
    ("scan.no_report_lost", no_report_lost),
    ("scan.all_reported_dropped", all_reported_dropped),
    ("scan.coarser_where_memory_short", coarser),
    ("scan.hints_taken", hints_taken),
    ("scan.guest_memory_exact", contents_exact),
];
const NOTHING_LEAKED: &str = "nothing_leaked";

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.memcg {
        Some(memcg) => run(&args, memcg),
        None => prepare(&args),
    };
    done.unwrap_or_else(|error| {
        diagnostic(&format!("{error:#}"));
        ExitCode::FAILURE
    })
}

/// Runs the tests in a process of its own, which takes over the scan settings, and in a memory cgroup of its own.
fn prepare(args: &Args) -> Result<ExitCode> {
    if let Some(reason) = needs::missing(ALL) {
        let mut ktap = Ktap::start(names().count());
        for name in names() {
            let reason = Outcome::Skip(reason.clone());
            ktap.result(&format!("fault_injection.{name}"), &reason);
        }
        return Ok(ktap.finish());
    }
    let memcg = Memcg::create(&format!("fault_injection.{}", std::process::id()))?;
    let _scans = Settings::fast()?;
    let _faults = Faults::everywhere()?;
    let status = Command::new(std::env::current_exe()?)
        .args(["--memory", &args.memory.to_string(), "--memcg"])
        .arg(memcg.path())
        .status()?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

fn names() -> impl Iterator<Item = &'static str> {
    let others = TESTS.iter().map(|(name, _)| *name);
    let scans = SCAN_TESTS.iter().map(|(name, _)| *name);
    others.chain(scans).chain([NOTHING_LEAKED])
}

fn run(args: &Args, memcg: &Path) -> Result<ExitCode> {
    memcg::join(memcg)?;
    balancing::forbid_scans(CPU_NODE)?;
    // The vCPU's processor is left to it.
    balancing::set_affinity(&balancing::other_cpus(1)?)?;
    let mut ktap = Ktap::start(names().count());
    let mut print = |name: &str, outcome: Result<()>| {
        let outcome = match outcome {
            Ok(()) => Outcome::Ok,
            Err(error) => Outcome::NotOk(format!("{error:#}")),
        };
        ktap.result(&format!("fault_injection.{name}"), &outcome);
    };
    let leaks = Path::new(LEAKS).exists();
    if leaks {
        // What was leaked before is not looked at again.
        fs::write(LEAKS, "clear").context(LEAKS)?;
    }
    for (name, test) in TESTS {
        print(name, test(args));
    }
    let scans = scan(args, memcg);
    for (name, judge) in SCAN_TESTS {
        print(
            name,
            match &scans {
                Ok(scans) => judge(scans).map_err(anyhow::Error::msg),
                Err(error) => Err(anyhow::anyhow!("{error:#}")),
            },
        );
    }
    if leaks {
        print(NOTHING_LEAKED, nothing_leaked());
    } else {
        let reason = Outcome::Skip(format!("no {LEAKS}: needs CONFIG_DEBUG_KMEMLEAK"));
        ktap.result(&format!("fault_injection.{NOTHING_LEAKED}"), &reason);
    }
    Ok(ktap.finish())
}

/// The settings of fault injection, put back when dropped.
struct Faults(Vec<(PathBuf, String)>);

impl Faults {
    /// Every kind of allocation can fail, also such as may wait for memory, and none says so on the console.
    fn everywhere() -> Result<Faults> {
        let mut faults = Faults(Vec::new());
        for (setting, value) in [
            ("failslab/ignore-gfp-wait", "N"),
            ("failslab/verbose", "0"),
            ("fail_page_alloc/ignore-gfp-wait", "N"),
            ("fail_page_alloc/ignore-gfp-highmem", "N"),
            ("fail_page_alloc/min-order", "0"),
            ("fail_page_alloc/verbose", "0"),
        ] {
            let path = Path::new("/sys/kernel/debug").join(setting);
            let remedy = || format!("{}: needs CONFIG_FAULT_INJECTION_DEBUG_FS", path.display());
            let old = fs::read_to_string(&path).with_context(remedy)?;
            fs::write(&path, value).with_context(remedy)?;
            faults.0.push((path, old));
        }
        Ok(faults)
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        for (path, value) in &self.0 {
            if let Err(error) = fs::write(path, value.trim()) {
                eprintln!("{}: not put back: {error}", path.display());
            }
        }
    }
}

/// Which of a thread's next allocations fails.
struct FailNth(File);

impl FailNth {
    const OWN: &'static str = "/proc/thread-self/fail-nth";

    fn own() -> Result<FailNth> {
        FailNth::at(FailNth::OWN)
    }

    /// Of thread `tid` of this process.
    fn of(tid: u32) -> Result<FailNth> {
        FailNth::at(&format!("/proc/self/task/{tid}/fail-nth"))
    }

    fn at(path: &str) -> Result<FailNth> {
        let file = fs::OpenOptions::new().read(true).write(true).open(path);
        Ok(FailNth(file.context(path.to_string())?))
    }

    fn set(&self, nth: u32) -> Result<()> {
        // No allocation here: it could be the one that fails.
        let mut text = [0; 10];
        let (mut at, mut rest) = (text.len(), nth);
        loop {
            at -= 1;
            text[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        self.0.write_all_at(&text[at..], 0).context("fail-nth")
    }

    /// Whether it has failed; if not, it will not any more.
    fn take(&self) -> Result<bool> {
        let mut text = [0; 16];
        let length = self.0.read_at(&mut text, 0).context("fail-nth")?;
        self.set(0)?;
        Ok(text[..length].trim_ascii() == b"0")
    }
}

/// Gives `operation` the numbers 1, 2, ... until it says that so many allocations were not needed. Gives the number that
/// failed.
fn each_nth(what: &str, mut operation: impl FnMut(u32) -> Result<bool>) -> Result<u32> {
    for nth in 1..=MOST {
        if nth % 10 == 0 {
            diagnostic(&format!("{what}: allocation {nth}"));
        }
        if !operation(nth).with_context(|| format!("allocation {nth} failed"))? {
            ensure!(nth > 1, "{what}: nothing was allocated");
            diagnostic(&format!("{what}: each of {} allocations failed", nth - 1));
            return Ok(nth - 1);
        }
    }
    bail!("{what}: no end after {MOST} allocations")
}

/// An answer to an allocation that failed: none, `ENOMEM`, or what C and the kernel make of it on the way to a new
/// thread (`EAGAIN`) and where the kernel copies to memory whose page table it cannot allocate (`EFAULT`).
fn sensible<T>(answer: &Result<T>) -> Result<()> {
    let Err(error) = answer else { return Ok(()) };
    match guest::errno(error) {
        Some(libc::ENOMEM | libc::EAGAIN | libc::EFAULT) => Ok(()),
        _ => bail!("answered by: {error:#}"),
    }
}

/// Attached, it records and can be detached; refused, it left nothing, and can be attached.
fn attach() -> Result<()> {
    let fail = FailNth::own()?;
    let pid = std::process::id().to_string();
    let folder = Path::new(client::ROOT).join(&pid);
    let open = |name: &str| {
        let path = Path::new(client::ROOT).join(name);
        let file = fs::OpenOptions::new().write(true).open(&path);
        file.with_context(|| path.display().to_string())
    };
    let all = {
        let _attached = Client::attach_self(64).context("beforehand")?;
        files_in(&folder)
    };
    ensure!(all > 0, "{}: no files", folder.display());
    let mut without_files = 0;
    let tries = each_nth("attach", |nth| {
        let (attach, detach) = (open("attach")?, open("detach")?);
        fail.set(nth)?;
        let attached = attach.write_at(pid.as_bytes(), 0);
        let failed = fail.take()?;
        match &attached {
            Ok(_) => {
                // As everywhere in debugfs, a file that cannot be made is left out and nobody told.
                without_files += u32::from(files_in(&folder) < all);
            }
            Err(error) => {
                ensure!(
                    error.raw_os_error() == Some(libc::ENOMEM),
                    "answered by: {error}"
                );
                ensure!(failed, "ENOMEM, although nothing failed");
                ensure!(
                    !folder.exists(),
                    "refused, but {} is there",
                    folder.display()
                );
            }
        }
        match (attached, detach.write_at(pid.as_bytes(), 0)) {
            (Ok(_), Ok(_)) => {}
            (Err(_), Err(error)) if error.raw_os_error() == Some(libc::ENOENT) => {}
            (Ok(_), Err(error)) => bail!("attached, but detaching says: {error}"),
            (Err(_), answer) => bail!("refused, but detaching says: {answer:?}"),
        }
        ensure!(
            !folder.exists(),
            "detached, but {} is there",
            folder.display()
        );
        Ok(failed)
    })?;
    diagnostic(&format!(
        "attach: in {without_files} of {tries} tries attached without some of its files"
    ));
    let client = Client::attach_self(64).context("afterwards")?;
    // A thread's stack is mapped, protected and unmapped.
    std::thread::spawn(|| ()).join().expect("an empty thread");
    ensure!(
        client.stats()?.recorded > 0,
        "afterwards nothing is recorded"
    );
    Ok(())
}

/// How many files there are in `folder` and all that are in it; none if it is not there.
fn files_in(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths
        .map(|path| if path.is_dir() { files_in(&path) } else { 1 })
        .sum()
}

/// The VM is made and runs, or it is refused; the next one is made.
fn make_vm() -> Result<()> {
    let fail = FailNth::own()?;
    let memory = small_memory()?;
    let cpus = balancing::vcpu_cpus(1)?;
    each_nth("vm", |nth| {
        fail.set(nth)?;
        let vm = Vm::new(&memory, &cpus);
        let failed = fail.take()?;
        sensible(&vm)?;
        match vm {
            Ok(vm) => vm.read_pass(0, whole(&memory))?,
            Err(error) => ensure!(failed, "nothing failed: {error:#}"),
        }
        Ok(failed)
    })?;
    let vm = Vm::new(&memory, &cpus).context("afterwards")?;
    vm.pass(0, whole(&memory))?;
    memory
        .verify(&[vec![1; memory.pages()]])
        .map_err(anyhow::Error::msg)
}

/// The guest runs on, or KVM_RUN fails and the guest runs when it is tried again.
fn first_pass() -> Result<()> {
    let memory = small_memory()?;
    let cpus = balancing::vcpu_cpus(1)?;
    let mut passes = 0;
    each_nth("first pass", |nth| {
        let vm = Vm::new(&memory, &cpus)?;
        let fail = FailNth::of(vcpu_tid()?)?;
        fail.set(nth)?;
        let answer = vm.read_pass(0, whole(&memory));
        let failed = fail.take()?;
        sensible(&answer)?;
        ensure!(failed || answer.is_ok(), "nothing failed: {answer:?}");
        vm.pass(0, whole(&memory)).context("tried again")?;
        passes += 1;
        Ok(failed)
    })?;
    memory
        .verify(&[vec![passes; memory.pages()]])
        .map_err(anyhow::Error::msg)
}

fn small_memory() -> Result<Arc<GuestMemory>> {
    let memory = GuestMemory::new(Backing::Anon, Pinned::None, SMALL, MEMORY_NODE)?;
    Ok(Arc::new(memory))
}

fn whole(memory: &GuestMemory) -> Sweep {
    Sweep {
        first: 0,
        stride: 1,
        count: memory.pages(),
    }
}

/// The thread of the one vCPU that there is. It names itself, and may have yet to do so.
fn vcpu_tid() -> Result<u32> {
    let begun = Instant::now();
    while begun.elapsed() < LIMIT {
        for entry in fs::read_dir("/proc/self/task")? {
            let path = entry?.path();
            let name = fs::read_to_string(path.join("comm"));
            if name.is_ok_and(|name| name.trim() == "vcpu0") {
                let tid = path.file_name().and_then(|name| name.to_str());
                return tid.and_then(|tid| tid.parse().ok()).context("thread id");
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    bail!("no thread vcpu0")
}

/// One try of two scans and a pass.
#[derive(Clone, Debug, Default)]
struct Scan {
    /// The number of the allocation that was to fail.
    nth: u32,
    /// Whether it did.
    failed: bool,
    /// Unpinned pages of guest memory.
    unpinned: u64,
    /// Pages made PROT_NONE.
    hinted: u64,
    /// Pages that KVM had mapped before and no longer after.
    dropped: u64,
    /// Hints taken as faults in the pass after it.
    taken: u64,
    /// Of each report.
    reports: Vec<Extent>,
    /// Whether guest memory held what it must after the pass.
    contents: Option<String>,
}

/// What a report covers.
#[derive(Clone, Copy, Debug, Default)]
struct Extent {
    /// Pages that it says were hinted.
    pages: u64,
    /// Pages in its stretches.
    covered: u64,
    /// Pages in its stretches that were pinned, and so not hinted.
    pinned: u64,
}

impl Extent {
    fn new(report: &Report, pinned: &[Range<u64>]) -> Extent {
        let page = PAGE as u64;
        let shared = |one: &Range<u64>, other: &Range<u64>| {
            let end = one.end.min(other.end);
            end.saturating_sub(one.start.max(other.start)) / page
        };
        let stretches = || report.stretches.iter().map(|one| one.start..one.end);
        Extent {
            pages: report.pages(),
            covered: stretches().map(|one| (one.end - one.start) / page).sum(),
            pinned: stretches()
                .map(|one| pinned.iter().map(|other| shared(&one, other)).sum::<u64>())
                .sum(),
        }
    }
}

fn scan(args: &Args, cgroup: &Path) -> Result<Vec<Scan>> {
    let source = Source::Memcg(cgroup.to_path_buf());
    let size = (args.memory as usize) << 20;
    let memory = GuestMemory::new(Backing::Anon, Pinned::Stripes, size, MEMORY_NODE)?;
    let memory = Arc::new(memory);
    let pinned = memory.pinned_addresses();
    let unpinned = (0..memory.pages()).filter(|page| !memory.is_pinned(*page));
    let unpinned = unpinned.count() as u64;
    let vm = Vm::new(&memory, &balancing::vcpu_cpus(1)?)?;
    let tid = vcpu_tid()?;
    let fail = FailNth::of(tid)?;
    let mut client = Client::attach_self(RECORDS)?;
    let mapped = || -> Result<u64> { Ok(vm.stat("pages_4k")? + (vm.stat("pages_2m")? << 9)) };
    vm.pass(0, whole(&memory))?;
    // The first scan of a mapping allocates what the kernel keeps about it, and passes over it where that fails.
    vm.while_spinning(|| {
        balancing::enable(true)?;
        let waited = balancing::wait_for_scans(SCANS, LIMIT);
        balancing::enable(false)?;
        waited.map(drop)
    })?;
    vm.pass(0, whole(&memory))?;
    let mut passes = 2;
    let mut scans = Vec::new();
    each_nth("scan", |nth| {
        for _ in 0..TRIES {
            let mut records = Vec::new();
            client.read_new(&mut records)?;
            records.clear();
            let (before, mapped_before) = (source.read()?, mapped()?);
            let failed = vm.while_spinning(|| {
                fail.set(nth)?;
                balancing::enable(true)?;
                let waited = balancing::wait_for_scans(SCANS, LIMIT);
                balancing::enable(false)?;
                let failed = fail.take()?;
                waited.map(|_| failed)
            })?;
            let (between, mapped_after) = (source.read()?, mapped()?);
            client.read_new(&mut records)?;
            vm.pass(0, whole(&memory))?;
            passes += 1;
            let after = source.read()?;
            let by_vcpu = |record: &Record| (record.kind, record.tid) == (kind::NUMA_PROTECT, tid);
            let by_vcpu = records.iter().any(by_vcpu);
            let sequence = Sequence::new(records);
            let reports = sequence.reports.iter();
            scans.push(Scan {
                nth,
                failed,
                unpinned,
                hinted: between.pte_updates - before.pte_updates,
                dropped: mapped_before.saturating_sub(mapped_after),
                taken: after.hint_faults - between.hint_faults,
                reports: reports.map(|one| Extent::new(one, &pinned)).collect(),
                contents: memory.verify(&[vec![passes; memory.pages()]]).err(),
            });
            // Where another thread made the scan that had something to hint, this says nothing about the vCPU's.
            if by_vcpu || sequence.reports.is_empty() {
                return Ok(failed);
            }
        }
        bail!("in {TRIES} tries, no scan was made by the vCPU's thread");
    })?;
    let stats = client.stats()?;
    ensure!(
        stats.overwritten + stats.lost == 0,
        "records lost: {stats:?}"
    );
    Ok(scans)
}

type Judgement = Result<(), String>;

/// Asks the same of each try.
fn each(scans: &[Scan], ask: impl Fn(&Scan) -> Judgement) -> Judgement {
    for scan in scans {
        ask(scan).map_err(|why| match scan.failed {
            true => format!("allocation {} failed: {why}", scan.nth),
            false => format!("no allocation failed: {why}"),
        })?;
    }
    Ok(())
}

fn equal(left: (&str, u64), right: (&str, u64)) -> Judgement {
    if left.1 == right.1 {
        return Ok(());
    }
    let ((what, count), (other, expected)) = (left, right);
    Err(format!("{count} {what}, but {expected} {other}"))
}

fn no_report_lost(scans: &[Scan]) -> Judgement {
    each(scans, |scan| {
        let reported = scan.reports.iter().map(|report| report.pages).sum();
        equal(("pages hinted", scan.hinted), ("unpinned", scan.unpinned))?;
        equal(("pages reported", reported), ("hinted", scan.hinted))
    })
}

/// What a report covers is no longer mapped, be it hinted or not, and nothing else is gone.
fn all_reported_dropped(scans: &[Scan]) -> Judgement {
    each(scans, |scan| {
        let covered = scan.reports.iter().map(|report| report.covered).sum();
        equal(("pages dropped", scan.dropped), ("covered", covered))?;
        if covered < scan.hinted {
            return Err(format!("{covered} pages covered, {} hinted", scan.hinted));
        }
        Ok(())
    })
}

/// A report covers what was not hinted in a try in which an allocation failed, and in no other.
fn coarser(scans: &[Scan]) -> Judgement {
    let is_coarser = |scan: &&Scan| scan.reports.iter().any(|report| report.pinned > 0);
    each(scans, |scan| match is_coarser(&scan) && !scan.failed {
        true => Err("pinned pages were reported".into()),
        false => Ok(()),
    })?;
    match scans.iter().filter(is_coarser).count() {
        0 => Err("no report was coarser: the report's own allocation never failed".into()),
        _ => Ok(()),
    }
}

fn hints_taken(scans: &[Scan]) -> Judgement {
    each(scans, |scan| {
        equal(("hint faults", scan.taken), ("pages hinted", scan.hinted))
    })
}

fn contents_exact(scans: &[Scan]) -> Judgement {
    each(scans, |scan| scan.contents.clone().map_or(Ok(()), Err))
}

fn nothing_leaked() -> Result<()> {
    std::thread::sleep(LEAK_AGE);
    fs::write(LEAKS, "scan").context(LEAKS)?;
    let leaked = fs::read_to_string(LEAKS).context(LEAKS)?;
    ensure!(leaked.is_empty(), "{leaked}");
    Ok(())
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // A list of one range is meant.
mod tests {
    use super::*;
    use trace::record::Record;

    /// Sixteen pages of which every other two are pinned: a try in which the report's memory failed, and one without.
    fn sound() -> Vec<Scan> {
        let exact = Scan {
            nth: 2,
            unpinned: 8,
            hinted: 8,
            dropped: 8,
            taken: 8,
            reports: vec![Extent {
                pages: 8,
                covered: 8,
                pinned: 0,
            }],
            ..Scan::default()
        };
        let coarse = Scan {
            nth: 1,
            failed: true,
            dropped: 14,
            reports: vec![Extent {
                pages: 8,
                covered: 14,
                pinned: 6,
            }],
            ..exact.clone()
        };
        vec![coarse, exact]
    }

    /// The tests that fail.
    fn failing(scans: &[Scan]) -> Vec<&'static str> {
        let judged = SCAN_TESTS.iter().filter(|(_, judge)| judge(scans).is_err());
        judged.map(|(name, _)| *name).collect()
    }

    fn spoilt(spoil: impl FnOnce(&mut [Scan])) -> Vec<&'static str> {
        let mut scans = sound();
        spoil(&mut scans);
        failing(&scans)
    }

    #[test]
    fn sound_scans_pass() {
        assert!(failing(&sound()).is_empty());
    }

    #[test]
    fn each_test_fails_when_what_it_guards_is_broken() {
        let lost = spoilt(|scans| {
            scans[0].reports.clear();
            scans[0].dropped = 0;
        });
        assert_eq!(
            lost,
            [
                "scan.no_report_lost",
                "scan.all_reported_dropped",
                "scan.coarser_where_memory_short"
            ]
        );
        let names = [
            (spoilt(|scans| scans[0].reports[0].pages -= 1), 0),
            (spoilt(|scans| scans[0].dropped -= 1), 1),
            (spoilt(|scans| scans[0].reports[0].pinned = 0), 2),
            (spoilt(|scans| scans[1].reports[0].pinned = 1), 2),
            (spoilt(|scans| scans[1].taken -= 1), 3),
            (spoilt(|scans| scans[1].contents = Some("x".into())), 4),
        ];
        for (failing, expected) in names {
            assert_eq!(failing, [SCAN_TESTS[expected].0]);
        }
    }

    #[test]
    fn what_is_covered_is_counted_page_by_page() {
        let stretch = |start: u64, end: u64| Record {
            start: start << 12,
            end: end << 12,
            pages: 5,
            ..Record::default()
        };
        let report = Report {
            stretches: vec![stretch(1, 4), stretch(6, 9)],
            whole: true,
            pair: None,
        };
        let pinned = [0..2 << 12, 3 << 12..7 << 12, 8 << 12..20 << 12];
        let extent = Extent::new(&report, &pinned);
        assert_eq!((extent.pages, extent.covered, extent.pinned), (5, 6, 4));
    }
}
