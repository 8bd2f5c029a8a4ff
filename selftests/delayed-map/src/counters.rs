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

/// A page is isolated for its migration, or cannot be, and is migrated; somebody meets one that is just being migrated.
const PREPARE: &str = "migrate_misplaced_folio_prepare";
const MIGRATE: &str = "migrate_misplaced_folio";
const WAITS: [&str; 2] = ["migration_entry_wait", "pmd_migration_entry_wait"];

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

    /// How many pages have been migrated since.
    pub fn migrated(&self) -> Result<u64> {
        since(&self.vmstat, &vmstat()?, "numa_pages_migrated")
    }

    /// What came of it.
    pub fn read(&self) -> Result<Values> {
        let (now, interrupts) = (vmstat()?, interrupts()? - self.interrupts);
        let of = |name| since(&self.vmstat, &now, name);
        let refused = self
            .prepared
            .fired()?
            .saturating_sub(self.migrated.fired()?);
        let waits = self.waits.iter().map(Tracepoint::fired);
        let hint_faults = of("numa_hint_faults")?;
        let counts = [
            (Row::Migrated, of("numa_pages_migrated")?),
            (Row::Hinted, of("numa_pte_updates")?),
            (Row::Ipis, of("nr_tlb_remote_flush_received")?),
            (Row::Interrupts, interrupts),
            (Row::Flushes, of("nr_tlb_remote_flush")?),
            (Row::HintFaults, hint_faults),
            (
                Row::FarFaults,
                hint_faults.saturating_sub(of("numa_hint_faults_local")?),
            ),
            (Row::Refused, refused),
            (Row::Waits, waits.sum::<Result<u64>>()?),
        ];
        Ok(counts.map(|(row, count)| (row, count as f64)).into())
    }
}

fn since(before: &HashMap<String, u64>, now: &HashMap<String, u64>, name: &str) -> Result<u64> {
    let of = |counts: &HashMap<String, u64>| {
        let count = counts.get(name).copied();
        count.with_context(|| {
            format!("{VMSTAT}: no {name}: is CONFIG_DEBUG_TLBFLUSH set, and CONFIG_NUMA_BALANCING?")
        })
    };
    Ok(of(now)? - of(before)?)
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
