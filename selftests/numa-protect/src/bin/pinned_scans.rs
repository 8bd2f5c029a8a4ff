// SPDX-License-Identifier: GPL-2.0
//! How often NUMA scans walk over memory that is all pinned, and that they walk over it at once when that is over. Pins its own
//! memory, and changes the machine's scan settings while it runs.
//!
//! Prints KTAP. Scans are ten a second; a thread uses CPU time, or the test itself, so that they happen. A scan of the process ends
//! each time (`mm->numa_scan_seq`), whether or not it walked over the memory; walks are calls of [`WALK`].

use std::ops::Range;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{ensure, Context, Result};
use guest::balancing::{self, Settings, CPU_NODE, MEMORY_NODE};
use guest::ktap::{diagnostic, Ktap, Outcome};
use guest::memcg::Source;
use guest::memory::{Backing, GuestMemory, Pinned};
use guest::needs::{self, Need};
use guest::pins::Holder;
use guest::tracefs::Tracepoint;

const NEEDS: &[Need] = &[
    needs::TWO_NODES,
    needs::NUMA_BALANCING,
    needs::SCAN_SETTINGS,
    needs::KPROBE_EVENTS,
    needs::IO_URING,
    needs::THP,
];
/// The function that makes pages PROT_NONE, and its arguments but the first.
const WALK: &str = "change_prot_numa";
const WALK_ARGUMENTS: &str = "start=$arg2:u64 end=$arg3:u64";
/// Memory in bytes.
const MEMORY: usize = 16 << 20;
/// In how many scans walks are counted, and how many of these there may be: fewer than a tenth.
const SCANS: u64 = 64;
const FEW: u64 = SCANS / 10;
/// How soon a change is noticed: by the first scan that begins after it, which is the second to end at the latest.
const SOON: u64 = 2;
/// How often a process forks, and after how many scans each time: fewer than after which a walk is due.
const FORKS: u32 = 32;
const FORK_AFTER: u64 = 3;
/// The longest that scans may take, and what is done behind the back of this process.
const LIMIT: Duration = Duration::from_secs(60);

/// A test, of what kind of memory, pinned by whom, or beside such memory.
struct Test {
    name: &'static str,
    backing: Backing,
    holder: Holder,
    pinned: Pinned,
    /// Whether the test is the process's only thread.
    alone: bool,
    judge: fn(&mut Memory) -> Result<()>,
}

const TESTS: &[Test] = &[
    test(
        "anon.left_out",
        Backing::Anon,
        Holder::IoUringUser,
        left_out,
    ),
    test(
        "memfd.left_out",
        Backing::Memfd,
        Holder::IoUringUser,
        left_out,
    ),
    test("thp.left_out", Backing::Thp, Holder::IoUringUser, left_out),
    test(
        "anon.unpinned",
        Backing::Anon,
        Holder::IoUringUser,
        unpinned,
    ),
    test(
        "memfd.unpinned",
        Backing::Memfd,
        Holder::IoUringUser,
        unpinned,
    ),
    test("thp.unpinned", Backing::Thp, Holder::IoUringUser, unpinned),
    test(
        "anon.mapped_anew",
        Backing::Anon,
        Holder::IoUringUser,
        mapped_anew,
    ),
    test(
        "memfd.mapped_anew",
        Backing::Memfd,
        Holder::IoUringUser,
        mapped_anew,
    ),
    beside_pinned("memfd.beside_pinned", Backing::Memfd),
    beside_pinned("thp.beside_pinned", Backing::Thp),
    // Nobody would say when these are gone.
    test(
        "anon.not_accounted",
        Backing::Anon,
        Holder::IoUring,
        not_accounted,
    ),
    test("anon.mlocked", Backing::Anon, Holder::IoUring, mlocked),
    Test {
        alone: true,
        ..test("anon.forked", Backing::Anon, Holder::IoUringUser, forked)
    },
];

const fn test(
    name: &'static str,
    backing: Backing,
    holder: Holder,
    judge: fn(&mut Memory) -> Result<()>,
) -> Test {
    Test {
        name,
        backing,
        holder,
        pinned: Pinned::All,
        alone: false,
        judge,
    }
}

/// Of memory that is hinted, while as much as it has pages is pinned beside it.
const fn beside_pinned(name: &'static str, backing: Backing) -> Test {
    Test {
        pinned: Pinned::None,
        ..test(name, backing, Holder::IoUringUser, always)
    }
}

fn main() -> ExitCode {
    let mut ktap = Ktap::start(TESTS.len());
    for test in TESTS {
        let outcome = match needs::missing(NEEDS) {
            Some(reason) => Outcome::Skip(reason),
            None => match test.run() {
                Ok(()) => Outcome::Ok,
                Err(error) => Outcome::NotOk(format!("{error:#}")),
            },
        };
        ktap.result(&format!("pinned_scans.{}", test.name), &outcome);
    }
    ktap.finish()
}

impl Test {
    fn run(&self) -> Result<()> {
        // Only what is placed below is scanned.
        balancing::forbid_scans(CPU_NODE)?;
        balancing::set_affinity(&balancing::node_cpus(CPU_NODE)?)?;
        let _settings = Settings::fast()?;
        let make = |backing, pinned| {
            GuestMemory::pinned_by(self.holder, backing, pinned, MEMORY, MEMORY_NODE)
        };
        // Of another kind: two of the same may be one VMA.
        let _beside = (self.pinned == Pinned::None)
            .then(|| make(Backing::Anon, Pinned::All))
            .transpose()?;
        let memory = make(self.backing, self.pinned)?;
        let addresses = memory.addresses();
        let inside = format!("start < {} && end > {}", addresses.end, addresses.start);
        let mut memory = Memory {
            walks: Tracepoint::count_calls(WALK, WALK_ARGUMENTS, &inside)?,
            memory,
        };
        let mut judge = || (self.judge)(&mut memory);
        if self.alone {
            let judged = balancing::enable(true).and_then(|()| judge());
            balancing::enable(false).and(judged)
        } else {
            balancing::while_busy(std::hint::spin_loop, judge)
        }
    }
}

/// Memory that is scanned, and the walks over it.
struct Memory {
    memory: GuestMemory,
    walks: Tracepoint,
}

impl Memory {
    /// Waits for a walk, so that one has just been.
    fn wait_for_walk(&self) -> Result<()> {
        let before = self.walks.fired()?;
        wait_until("a walk", || Ok(self.walks.fired()? != before))
    }

    /// Walks in so many scans.
    fn walks_in(&self, scans: u64) -> Result<u64> {
        let before = self.walks.fired()?;
        balancing::wait_for_scans(scans, LIMIT)?;
        Ok(self.walks.fired()? - before)
    }

    /// The first walk may have begun before all was ready.
    fn settle(&self) -> Result<()> {
        self.wait_for_walk()?;
        self.wait_for_walk()
    }
}

/// Waits for `what`, which has come once `is_there` says so, and uses CPU time.
fn wait_until(what: &str, is_there: impl Fn() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !is_there()? {
        ensure!(begun.elapsed() < LIMIT, "waited {LIMIT:?} for {what}");
        (0..10_000).for_each(|_| std::hint::spin_loop());
    }
    Ok(())
}

/// There are few walks, but there are some.
fn left_out(memory: &mut Memory) -> Result<()> {
    memory.settle()?;
    let walks = memory.walks_in(SCANS)?;
    diagnostic(&format!("{walks} walks in {SCANS} scans"));
    ensure!((1..=FEW).contains(&walks), "{walks} walks in {SCANS} scans");
    Ok(())
}

/// Once it is not pinned any more, all of it is hinted by the next scan.
fn unpinned(memory: &mut Memory) -> Result<()> {
    memory.settle()?;
    let before = Source::Vmstat.read()?.pte_updates;
    memory.memory.unpin();
    wait_until("the end of its pins", || Ok(accounted()? == 0))?;
    balancing::wait_for_scans(SOON, LIMIT)?;
    let hinted = Source::Vmstat.read()?.pte_updates - before;
    let pages = memory.memory.pages() as u64;
    ensure!(
        hinted >= pages,
        "{hinted} of {pages} pages hinted {SOON} scans later"
    );
    Ok(())
}

/// A page that takes a pinned one's place is hinted by the next scan.
fn mapped_anew(memory: &mut Memory) -> Result<()> {
    let page = memory.memory.pages() / 2;
    memory.memory.discard(page)?;
    memory.settle()?;
    let walks = memory.walks_in(SOON)?;
    let before = Source::Vmstat.read()?.pte_updates;
    memory.memory.count(page, 0);
    balancing::wait_for_scans(SOON, LIMIT)?;
    let hinted = Source::Vmstat.read()?.pte_updates - before;
    ensure!(
        hinted >= 1,
        "{hinted} pages hinted {SOON} scans later; {walks} walks before"
    );
    Ok(())
}

/// Each scan walks over it. Older kernels account for what root's io_uring pins, too.
fn not_accounted(memory: &mut Memory) -> Result<()> {
    if accounted()? > 0 {
        return unpinned(memory);
    }
    always(memory)
}

/// The same of mlocked memory, which is accounted for as if it were pinned.
fn mlocked(memory: &mut Memory) -> Result<()> {
    let Range { start, end } = memory.memory.addresses();
    // SAFETY: it is this process's memory, and keeps its contents.
    let rc = unsafe { libc::mlock(start as *const libc::c_void, (end - start) as usize) };
    ensure!(rc == 0, "mlock: {}", io::Error::last_os_error());
    not_accounted(memory)
}

/// A walk comes, however often the process forks: where it has one thread, that sets the number of its scans back.
fn forked(memory: &mut Memory) -> Result<()> {
    memory.settle()?;
    let before = memory.walks.fired()?;
    for _ in 0..FORKS {
        // SAFETY: the child does nothing but end.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: ends the child, and nothing of this process is flushed or dropped there.
            unsafe { libc::_exit(0) };
        }
        ensure!(child > 0, "fork: {}", io::Error::last_os_error());
        // SAFETY: its status is not asked for.
        let ended = unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
        ensure!(ended == child, "waitpid: {}", io::Error::last_os_error());
        wait_until("scans after fork()", || {
            Ok(balancing::scan_seq()? >= FORK_AFTER)
        })?;
    }
    let walks = memory.walks.fired()? - before;
    diagnostic(&format!(
        "{walks} walks in {FORKS} times {FORK_AFTER} scans"
    ));
    ensure!(
        walks > 1,
        "{walks} walks in {FORKS} times {FORK_AFTER} scans"
    );
    Ok(())
}

/// Each scan walks over it, from the first on.
fn always(memory: &mut Memory) -> Result<()> {
    memory.wait_for_walk()?;
    let walks = memory.walks_in(SCANS)?;
    ensure!(walks + SOON >= SCANS, "{walks} walks in {SCANS} scans");
    Ok(())
}

/// What this process has pinned, as far as that is accounted, in KiB.
fn accounted() -> Result<u64> {
    const STATUS: &str = "/proc/self/status";
    let text = fs::read_to_string(STATUS).context(STATUS)?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmPin:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    kib.with_context(|| format!("{STATUS}: no VmPin"))
}
