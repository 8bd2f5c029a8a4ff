// SPDX-License-Identifier: GPL-2.0
//! One case, run: a VM under NUMA scans whose memory is disturbed; uses this process, `/dev/kvm` and the recorder.
//!
//! Guest memory lies on node 1, two vCPUs on node 0 sweep it against each other, and threads on node 1 disturb a part of
//! guest memory each. It ends once there were enough scans and operations. Then all is stopped, each vCPU makes a whole
//! pass, and this process reads every page: if that takes a hint fault, KVM has kept a mapping of a page with a hint,
//! which it was told to drop. At last guest memory is compared with what the vCPUs have counted.
//!
//! Only guest memory is scanned, the rest of the process is bound strictly to its node.

use std::cell::Cell;
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use guest::balancing::{self, CPU_NODE, MEMORY_NODE};
use guest::memcg::{self, Source};
use guest::memory::{Backing, GuestMemory, Pinned};
use guest::vm::{Faults, Sweep, Vm};
use trace::client::{Client, Stats};
use trace::sequence::Sequence;

use crate::disturb::{self, Disturber};
use crate::machine::vmstat;
use crate::operation::{Kind, Operations, Random};

/// vCPUs that sweep all the time. Each disturbing thread has one more for itself.
pub const VCPUS: usize = 2;
/// Threads that disturb.
const THREADS: usize = 2;
/// Room in the recorder for each CPU, in records.
const RECORDS: u64 = 1 << 17;
/// Records that are kept, at the most.
const KEPT: usize = 1 << 22;
/// The longest that merging pages may take before it starts.
const MERGE: Duration = Duration::from_secs(20);
/// How long the kernel's threads, which merge, collapse and page out, may take to end what the recorder saw them begin.
const REST: Duration = Duration::from_secs(5);
/// Counters of the machine that tell of disturbances. Nothing else runs on it that would count there.
const VMSTAT: [&str; 5] = [
    "pswpout",
    "cow_ksm",
    "thp_split_pmd",
    "thp_split_page",
    "thp_collapse_alloc",
];

/// Disturbances that are done together.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The name, second part of the names of its tests.
    pub name: &'static str,
    /// What is done.
    pub kinds: &'static [Kind],
    /// What guest memory may be made of: the seed chooses.
    pub backings: &'static [Backing],
}

impl Case {
    /// What guest memory is made of with this seed.
    pub fn backing(self, seed: u64) -> Backing {
        // Cases choose for themselves.
        let stream = self
            .name
            .bytes()
            .fold(1, |sum: u64, byte| sum.rotate_left(8) ^ u64::from(byte));
        let chosen = Random::new(seed, stream).below(self.backings.len());
        self.backings[chosen]
    }

    /// What is done with this seed.
    pub fn kinds(self, seed: u64) -> Vec<Kind> {
        let backing = self.backing(seed);
        let suits = |kind: &&Kind| kind.suits(backing);
        self.kinds.iter().filter(suits).copied().collect()
    }
}

/// How to run a case.
pub struct Plan {
    /// The case.
    pub case: Case,
    /// What its operations are drawn from.
    pub seed: u64,
    /// Guest memory in bytes.
    pub memory: usize,
    /// Whole scans, at the least.
    pub scans: u64,
    /// Operations of each disturbing thread, at the least.
    pub operations: u64,
    /// The longest that both may take.
    pub limit: Duration,
    /// The memory cgroup to run in.
    pub memcg: PathBuf,
}

/// All that the checks look at.
pub struct Measured {
    /// What was done.
    pub kinds: Vec<Kind>,
    /// Whole scans while guest memory was disturbed.
    pub scans: u64,
    /// Pages that they hinted.
    pub hinted: u64,
    /// Whole passes of the sweeping vCPUs meanwhile.
    pub passes: u64,
    /// How often something happened that shows that a disturbance was one.
    pub evidence: BTreeMap<&'static str, u64>,
    /// Promises that were not kept, see [`Disturber::broken`].
    pub broken: Vec<String>,
    /// Hint faults that reading all of guest memory took after each vCPU had touched all of it.
    pub hints_left: u64,
    /// Whether guest memory held what it must in the end.
    pub contents: Result<(), String>,
    /// What was recorded; `None` where the recorder is not loaded.
    pub recording: Option<Recording>,
}

/// What two subscribers recorded at the same time.
pub struct Recording {
    /// What the one with `numa_protect` recorded, and the recorder's counts of it.
    pub full: (Sequence, Stats),
    /// The same of one without it.
    pub plain: (Sequence, Stats),
    /// Tasks that were busy before the one or after the other was there: the one that attached them, and the kernel's.
    pub busy: HashSet<u32>,
}

/// Runs a case. `progress` is called every few seconds at least.
pub fn run(plan: &Plan, progress: impl Fn(String)) -> Result<Measured> {
    let case = plan.case;
    let told = Cell::new(Instant::now());
    let alive = |what: &dyn Fn() -> String| {
        if told.get().elapsed() > Duration::from_secs(5) {
            told.set(Instant::now());
            progress(format!("{}: {}", case.name, what()));
        }
    };
    let (kinds, backing) = (case.kinds(plan.seed), case.backing(plan.seed));
    memcg::join(&plan.memcg)?;
    let source = Source::Memcg(plan.memcg.clone());
    balancing::forbid_scans(CPU_NODE)?;
    balancing::set_affinity(&balancing::other_cpus(VCPUS)?)?;
    let merged = kinds.contains(&Kind::Merge);
    let mut memory = GuestMemory::new(backing, Pinned::None, plan.memory, MEMORY_NODE)?;
    if merged {
        memory.merge_alternate(MERGE)?;
    }
    let memory = Arc::new(memory);
    let machine = |vcpus| Vm::with(&memory, &balancing::vcpu_cpus(vcpus)?, Faults::Retried);
    let vm = machine(VCPUS + THREADS)?;
    let second = match kinds.contains(&Kind::SecondMachine) {
        true => Some(machine(THREADS)?),
        false => None,
    };
    let mut counted = vec![vec![0u32; memory.pages()]; VCPUS + THREADS];
    let whole = Sweep {
        first: 0,
        stride: 1,
        count: memory.pages(),
    };
    // Merged pages are left to the threads that disturb: KSM does not merge what changes all the time.
    let swept = if merged { every_other(whole) } else { whole };
    let mut sweeps = [swept, swept.reversed()];
    if plan.seed & 1 == 1 {
        sweeps.reverse();
    }

    // So that the threads of vCPUs have started, waited, and are waiting again when the recorder is attached.
    for vm in [Some(&vm), second.as_ref()].into_iter().flatten() {
        for vcpu in (0..vm.vcpus()).cycle().take(2 * vm.vcpus()) {
            let page = Sweep { count: 1, ..whole };
            vm.pass(vcpu, page)?;
            counted[vcpu][0] += 1;
        }
    }
    let file = disturb::mapped_file(&memory)?;
    let mut subscribers = Vec::new();
    if trace::client::is_loaded() {
        for client in [Client::attach_self, Client::attach_self_plain] {
            subscribers.push((client(RECORDS)?, Vec::new()));
        }
    }
    let before = source.read()?;
    let first_counters = counters()?;
    let first_scan = balancing::scan_seq()?;
    let stop = AtomicBool::new(false);
    let done: [AtomicU64; THREADS] = Default::default();
    let (mut disturbers, passes) = vm.while_running(&sweeps, || {
        std::thread::scope(|scope| {
            let (vm, second, memory, file) = (&vm, second.as_ref(), &memory, file.as_ref());
            let (stop, done, kinds, progress) = (&stop, &done, &kinds, &progress);
            let threads: Vec<_> = (0..THREADS)
                .map(|number| {
                    let room = share(memory.pages(), number);
                    let operations = Operations::new(plan.seed, number, kinds, room);
                    std::thread::Builder::new()
                        .name(format!("disturb{number}"))
                        .spawn_scoped(scope, move || -> Result<Disturber> {
                            let mut disturber = Disturber::new(memory, file, vm, second, number)?;
                            for operation in operations {
                                if stop.load(Ordering::Relaxed) {
                                    break;
                                }
                                disturber.perform(&operation)?;
                                done[number].fetch_add(1, Ordering::Relaxed);
                            }
                            Ok(disturber)
                        })
                })
                .collect::<std::io::Result<_>>()
                .inspect_err(|_| stop.store(true, Ordering::Relaxed))
                .context("start a thread")?;
            let mut watch = || -> Result<()> {
                balancing::enable(true)?;
                let begun = Instant::now();
                loop {
                    std::thread::sleep(Duration::from_millis(10));
                    for (client, records) in &mut subscribers {
                        client.read_new(records)?;
                        ensure!(records.len() < KEPT, "more than {KEPT} records");
                    }
                    let scans = balancing::scan_seq()? - first_scan;
                    let least = done.iter().map(|done| done.load(Ordering::Relaxed)).min();
                    let least = least.unwrap_or(0);
                    let enough = scans >= plan.scans && least >= plan.operations;
                    if enough || threads.iter().any(|thread| thread.is_finished()) {
                        return Ok(());
                    }
                    let so_far = format!("{scans} scans and {least} operations per thread");
                    ensure!(
                        begun.elapsed() < plan.limit,
                        "only {so_far} in {:?}",
                        plan.limit
                    );
                    alive(&|| so_far.clone());
                }
            };
            let watched = watch();
            let disabled = balancing::enable(false);
            stop.store(true, Ordering::Relaxed);
            let disturbers: Result<Vec<Disturber>> = threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| bail!("a thread panicked")))
                .collect();
            if let Err(error) = &disturbers {
                // What it left behind may keep vCPUs for a while.
                progress(format!("{}: {error:#}", case.name));
            }
            let disturbers = disturbers?;
            watched.and(disabled)?;
            Ok(disturbers)
        })
    })?;
    let scans = balancing::scan_seq()? - first_scan;
    let hinted = source.read()?.pte_updates - before.pte_updates;
    let mut count = |vcpu: usize, sweep: Sweep, passes: u64| {
        for page in sweep.pages() {
            let word = &mut counted[vcpu][page];
            *word = word.wrapping_add(passes as u32);
        }
    };
    for (vcpu, passes) in passes.iter().enumerate() {
        count(vcpu, sweeps[vcpu], *passes);
    }

    // The first round lets the threads of vCPUs end a scan that they may be due for; the second takes all hints. Where
    // there are two VMs, hints that one takes do not tell of the other: the seed chooses.
    let last = match &second {
        Some(second) if plan.seed & 2 == 2 => second,
        _ => &vm,
    };
    for vcpu in (0..VCPUS).cycle().take(2 * VCPUS) {
        last.pass(vcpu, whole)?;
        alive(&|| format!("vCPU {vcpu} has made a last pass"));
        count(vcpu, whole, 1);
    }
    let taken = source.read()?.hint_faults;
    memory.read_all();
    let hints_left = source.read()?.hint_faults - taken;

    let mut evidence = BTreeMap::new();
    let mut broken = Vec::new();
    for disturber in &mut disturbers {
        for (expected, more) in counted.iter_mut().zip(&disturber.counted) {
            for (word, more) in expected.iter_mut().zip(more) {
                *word = word.wrapping_add(*more);
            }
        }
        for (what, times) in &disturber.evidence {
            *evidence.entry(*what).or_default() += times;
        }
        broken.extend(disturber.broken.take());
    }
    evidence.insert("runs refused", vm.refused());
    for ((name, before), after) in VMSTAT.into_iter().zip(first_counters).zip(counters()?) {
        evidence.insert(name, after - before);
    }
    if merged {
        // Each page that was merged in the beginning could be written to but once.
        let copied = evidence.get("cow_ksm").copied().unwrap_or(0);
        let once = memory.pages() as u64 / 2;
        evidence.insert("merged again", copied.saturating_sub(once));
    }
    drop(disturbers);
    let contents = memory.verify(&counted);
    let mut recordings = Vec::new();
    for (client, records) in &mut subscribers {
        let sequence = client.settle(std::mem::take(records), REST)?;
        recordings.push((sequence, client.stats()?));
    }
    let recording = match (recordings.pop(), recordings.pop()) {
        (Some(plain), Some(full)) => Some(Recording {
            busy: busy(&full.0),
            full,
            plain,
        }),
        _ => None,
    };
    Ok(Measured {
        kinds,
        scans,
        hinted,
        passes: passes.iter().sum(),
        evidence,
        broken,
        hints_left,
        contents,
        recording,
    })
}

fn every_other(sweep: Sweep) -> Sweep {
    Sweep {
        stride: 2 * sweep.stride,
        count: sweep.count / 2,
        ..sweep
    }
}

/// The part of `pages` pages that thread `number` may disturb: whole huge pages.
fn share(pages: usize, number: usize) -> Range<usize> {
    let unit = guest::memory::HUGE_PAGE / guest::PAGE;
    let bound = |number| pages / unit * number / THREADS * unit;
    bound(number)..bound(number + 1)
}

fn counters() -> Result<Vec<u64>> {
    VMSTAT.into_iter().map(vmstat).collect()
}

/// Of the tasks in `sequence`, this one, and those that are there and not of this process: the kernel's.
fn busy(sequence: &Sequence) -> HashSet<u32> {
    let is_there = |path: String| Path::new(&path).exists();
    let tasks: HashSet<u32> = sequence.records.iter().map(|record| record.tid).collect();
    let busy = tasks.into_iter().filter(|tid| {
        *tid == std::process::id()
            || is_there(format!("/proc/{tid}")) && !is_there(format!("/proc/self/task/{tid}"))
    });
    busy.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_disjoint_and_whole() {
        let shares: Vec<_> = (0..THREADS).map(|number| share(5 * 512, number)).collect();
        assert_eq!(shares, [0..1024, 1024..2560]);
    }
}
