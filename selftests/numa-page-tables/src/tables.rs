// SPDX-License-Identifier: GPL-2.0
//! How many page tables KVM has on each node; has the kernel fold its counters of pages.

use std::fs;

use anyhow::{Context, Result};
use guest::balancing::{meminfo_kib, CPU_NODE, MEMORY_NODE};
use serde::{Deserialize, Serialize};

/// Entries of a page table, and so base pages that a leaf table maps.
pub const ENTRIES: u64 = 512;

/// Page tables on the node of the vCPUs, and on that of the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tables {
    pub cpu_node: u64,
    pub memory_node: u64,
}

impl Tables {
    /// Those of the whole machine.
    pub fn count() -> Result<Tables> {
        // Each CPU keeps some of the count to itself, until asked.
        const REFRESH: &str = "/proc/sys/vm/stat_refresh";
        fs::write(REFRESH, "1").context(REFRESH)?;
        let of = |node| Ok::<_, anyhow::Error>(meminfo_kib(node, "SecPageTables:")? / 4);
        Ok(Tables {
            cpu_node: of(CPU_NODE)?,
            memory_node: of(MEMORY_NODE)?,
        })
    }

    /// Those that have come since `before`.
    pub fn since(self, before: Tables) -> Tables {
        Tables {
            cpu_node: self.cpu_node.saturating_sub(before.cpu_node),
            memory_node: self.memory_node.saturating_sub(before.memory_node),
        }
    }

    /// Of so many leaf tables those on `node`, in percent. What there is beyond them is above them, and on the node of the
    /// vCPUs.
    pub fn leaves_on(self, node: usize, leaves: u64) -> f64 {
        let on_node = match node {
            CPU_NODE => leaves.saturating_sub(self.memory_node).min(self.cpu_node),
            _ => self.memory_node,
        };
        on_node as f64 * 100.0 / leaves as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_above_the_leaves_does_not_count() {
        let tables = |cpu_node, memory_node| Tables {
            cpu_node,
            memory_node,
        };
        // Four above 64 leaves.
        let at_memory = tables(4, 64);
        assert_eq!(at_memory.leaves_on(MEMORY_NODE, 64), 100.0);
        assert_eq!(at_memory.leaves_on(CPU_NODE, 64), 0.0);
        let at_vcpus = tables(68, 0);
        assert_eq!(at_vcpus.leaves_on(MEMORY_NODE, 64), 0.0);
        assert_eq!(at_vcpus.leaves_on(CPU_NODE, 64), 100.0);
        assert_eq!(tables(36, 32).leaves_on(CPU_NODE, 64), 50.0);
        assert_eq!(at_vcpus.since(tables(4, 2)), tables(64, 0));
    }
}
