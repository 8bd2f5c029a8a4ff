// SPDX-License-Identifier: GPL-2.0
//! What the kernel counts of TLB shootdowns and NUMA balancing, and the calls that it does not count; reads, and makes probes
//! which it removes.

use std::collections::HashMap;
use std::fs;

use anyhow::{Context, Result};
use guest::tracefs::Tracepoint;

use crate::show::{Row, Values};

const VMSTAT: &str = "/proc/vmstat";
const INTERRUPTS: &str = "/proc/interrupts";
const MIGRATED: &str = "numa_pages_migrated";

/// Isolates a folio for its migration, if it can.
const PREPARE: &str = "migrate_misplaced_folio_prepare";
/// Migrates one that could be isolated.
const MIGRATE: &str = "migrate_misplaced_folio";
/// Waits for the migration of a page that was met during it.
const WAITS: [&str; 2] = ["migration_entry_wait", "pmd_migration_entry_wait"];

/// How many pages have been migrated for NUMA balancing since the machine was booted.
pub fn migrated() -> Result<u64> {
    of(&vmstat()?, MIGRATED)
}

/// All of the machine, from now on.
pub struct Counters {
    vmstat: HashMap<String, u64>,
    interrupts: u64,
    prepared: Tracepoint,
    migrated: Tracepoint,
    waits: Vec<Tracepoint>,
}

impl Counters {
    pub fn start() -> Result<Counters> {
        let calls = |function| Tracepoint::count_calls(function, "", "");
        let waits = WAITS.into_iter().map(calls).collect::<Result<_>>()?;
        Ok(Counters {
            prepared: calls(PREPARE)?,
            migrated: calls(MIGRATE)?,
            waits,
            interrupts: interrupts()?,
            vmstat: vmstat()?,
        })
    }

    /// What came of it.
    pub fn read(&self) -> Result<Values> {
        let (now, interrupts) = (vmstat()?, interrupts()? - self.interrupts);
        let since = |name| Ok::<_, anyhow::Error>(of(&now, name)? - of(&self.vmstat, name)?);
        // In this order: what is migrated was prepared before.
        let migrated = self.migrated.fired()?;
        let refused = self.prepared.fired()?.checked_sub(migrated);
        let refused = refused.context("more migrations than preparations: was one not counted?")?;
        let waits = self.waits.iter().map(Tracepoint::fired);
        let hint_faults = since("numa_hint_faults")?;
        let far_faults = hint_faults.checked_sub(since("numa_hint_faults_local")?);
        let counts = [
            (Row::Migrated, since(MIGRATED)?),
            (Row::Hinted, since("numa_pte_updates")?),
            (Row::Ipis, since("nr_tlb_remote_flush_received")?),
            (Row::Interrupts, interrupts),
            (Row::Flushes, since("nr_tlb_remote_flush")?),
            (Row::HintFaults, hint_faults),
            (
                Row::FarFaults,
                far_faults.context("more hint faults on near memory than at all")?,
            ),
            (Row::Refused, refused),
            (Row::Waits, waits.sum::<Result<u64>>()?),
        ];
        Ok(counts.map(|(row, count)| (row, count as f64)).into())
    }
}

fn of(counts: &HashMap<String, u64>, name: &str) -> Result<u64> {
    counts.get(name).copied().with_context(|| {
        format!("{VMSTAT}: no {name}: is CONFIG_DEBUG_TLBFLUSH set, and CONFIG_NUMA_BALANCING?")
    })
}

fn vmstat() -> Result<HashMap<String, u64>> {
    let text = fs::read_to_string(VMSTAT).context(VMSTAT)?;
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    let counts = lines.filter_map(|(name, count)| Some((name.into(), count.parse().ok()?)));
    Ok(counts.collect())
}

/// TLB shootdowns that CPUs were interrupted for.
fn interrupts() -> Result<u64> {
    let text = fs::read_to_string(INTERRUPTS).context(INTERRUPTS)?;
    shootdowns(&text).with_context(|| format!("{INTERRUPTS}: no line TLB: is CONFIG_SMP set?"))
}

fn shootdowns(interrupts: &str) -> Option<u64> {
    let line = interrupts
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("TLB:"))?;
    let counts = line
        .split_whitespace()
        .map_while(|word| word.parse::<u64>().ok());
    Some(counts.sum())
}

#[cfg(test)]
mod tests {
    use super::shootdowns;

    #[test]
    fn shootdowns_of_all_cpus_count() {
        let text = "        CPU0   CPU1\n CAL:   9   9   Function call interrupts\n TLB:   3   40   TLB shootdowns\n";
        assert_eq!(shootdowns(text), Some(43));
        assert_eq!(shootdowns("  0: 1\n"), None);
    }
}
