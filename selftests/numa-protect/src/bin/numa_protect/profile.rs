// SPDX-License-Identifier: GPL-2.0
//! What the kernel spends on a scan, by probes on its functions, which are there for one step's scans only; uses tracefs.
//!
//! Probes cost time themselves, so that what is counted and what is timed is taken in steps of its own.

use std::ops::Range;

use anyhow::{Context, Result};
use guest::spans::{Machines, Spans};
use guest::tracefs::{self, Tracepoint};
use guest::vm::Vm;
use serde::{Deserialize, Serialize};

/// Steps that it takes, the first of which is like those before it and measures nothing.
pub const STEPS: u32 = 4;
/// KVM's callbacks that scans lead to, and others do, too; with the range that they are told (`struct mmu_notifier_range`).
const NOTIFIERS: [&str; 2] = [
    "kvm_mmu_notifier_invalidate_range_start",
    "kvm_mmu_notifier_invalidate_range_end",
];
const RANGE: &str = "start=+8(%si):x64 end=+16(%si):x64";
/// The callback that only scans lead to; not there without the series.
const PROTECT: &str = "kvm_mmu_notifier_numa_protect";
/// What a scan calls for each stretch of addresses that it walks, with their first and the one behind their last.
const WALK: &str = "change_prot_numa";
/// A scan's piece of work.
const SCAN: &str = "task_numa_work";
/// The name of the span in which mmu_lock is held.
const LOCK: &str = "mmu_lock";

/// What scans cost: counts and times are of as many walks of guest memory as are given with them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Profile {
    /// Walks of guest memory by scans.
    pub walks: u64,
    /// Calls of KVM's MMU notifier callbacks for guest memory, of those that a scan can lead to.
    pub notifier_calls: u64,
    /// Write acquisitions of the VM's mmu_lock.
    pub lock_writes: u64,
    /// Walks during which scans were timed.
    pub scan_walks: u64,
    /// How long task_numa_work() took, in nanoseconds.
    pub scan_ns: u64,
    /// Walks during which mmu_lock was timed.
    pub lock_walks: u64,
    /// How long it was held for writing, in nanoseconds.
    pub lock_held_ns: u64,
}

/// Attaches probes, and reads what they counted.
pub struct Profiler {
    /// Address of the VM's mmu_lock.
    lock: u64,
    guest: Range<u64>,
    profile: Profile,
}

/// What is attached in a step.
pub struct Probes {
    walks: Tracepoint,
    what: What,
}

enum What {
    Calls {
        notifiers: Vec<Tracepoint>,
        lock: Tracepoint,
    },
    Scan(Spans),
    Lock(Spans),
}

impl Profiler {
    /// For the VM that `make` makes, whose memory is at `guest`.
    pub fn new(make: impl FnOnce() -> Result<Vm>, guest: Range<u64>) -> Result<(Vm, Profiler)> {
        let machines = Machines::watch()?;
        let vm = make()?;
        let profiler = Profiler {
            lock: machines.last()?,
            guest,
            profile: Profile::default(),
        };
        Ok((vm, profiler))
    }

    /// Attaches what step `number` needs.
    pub fn attach(&self, number: u32) -> Result<Option<Probes>> {
        let Range { start, end } = &self.guest;
        let met = format!("start < {end:#x} && end > {start:#x}");
        let what = match number {
            1 => What::Calls {
                notifiers: {
                    let calls = |name| Tracepoint::count_calls(name, RANGE, &met);
                    let mut notifiers: Vec<_> =
                        NOTIFIERS.into_iter().map(calls).collect::<Result<_>>()?;
                    if tracefs::has_function(PROTECT) {
                        notifiers.push(Tracepoint::count_calls(PROTECT, "", "")?);
                    }
                    notifiers
                },
                lock: Tracepoint::count_calls(
                    "_raw_write_lock",
                    "lock=%di",
                    &format!("lock == {:#x}", self.lock),
                )?,
            },
            2 => What::Scan(Spans::new(&[SCAN])?),
            3 => {
                let mut spans = Spans::new(&[])?;
                spans.count_write_lock(LOCK, self.lock)?;
                What::Lock(spans)
            }
            _ => return Ok(None),
        };
        Ok(Some(Probes {
            walks: Tracepoint::count_calls(WALK, "start=%si end=%dx", &met)?,
            what,
        }))
    }

    /// Reads and detaches it.
    pub fn detach(&mut self, probes: Option<Probes>) -> Result<()> {
        let Some(Probes { walks, what }) = probes else {
            return Ok(());
        };
        let walks = walks.fired()?;
        let profile = &mut self.profile;
        match what {
            What::Calls { notifiers, lock } => {
                profile.walks = walks;
                profile.lock_writes = lock.fired()?;
                profile.notifier_calls = notifiers
                    .iter()
                    .map(Tracepoint::fired)
                    .sum::<Result<u64>>()?;
            }
            What::Scan(spans) => {
                profile.scan_walks = walks;
                profile.scan_ns = spans.read(SCAN)?;
            }
            What::Lock(spans) => {
                profile.lock_walks = walks;
                profile.lock_held_ns = spans.read(LOCK)?;
            }
        }
        Ok(())
    }

    /// All that was read. Scans may have walked over no memory that is `all_pinned`, where its pins are accounted for.
    pub fn finish(self, all_pinned: bool) -> Result<Profile> {
        let Profile {
            walks,
            scan_walks,
            lock_walks,
            ..
        } = self.profile;
        let all = [walks, scan_walks, lock_walks]
            .iter()
            .all(|count| *count > 0);
        (all || all_pinned)
            .then_some(self.profile)
            .context("a step in which no scan walked guest memory")
    }
}
