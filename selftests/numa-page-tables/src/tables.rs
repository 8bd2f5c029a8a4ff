// SPDX-License-Identifier: GPL-2.0
//! How many page tables KVM has on each node; has the kernel fold its counters of pages.

use std::fs;

use anyhow::{Context, Result};
use guest::balancing::{CPU_NODE, MEMORY_NODE};
use guest::vm::Vm;
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
        let of = |node| Ok::<_, anyhow::Error>(kib(node, "SecPageTables:")? / 4);
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
}

/// Faults that led to nothing, and so were taken again.
pub fn retries(vm: &Vm) -> Result<u64> {
    let ended = ["pf_fixed", "pf_emulate", "pf_spurious"].map(|name| vm.vcpu_stat(name));
    let ended: u64 = ended.into_iter().sum::<Result<u64>>()?;
    Ok(vm.vcpu_stat("pf_taken")?.saturating_sub(ended))
}

/// What its meminfo says of `node`, in KiB.
pub fn kib(node: usize, what: &str) -> Result<u64> {
    let path = format!("/sys/devices/system/node/node{node}/meminfo");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let line = text.lines().find(|line| line.contains(what));
    let kib = line.and_then(|line| line.split_whitespace().nth(3)?.parse().ok());
    kib.with_context(|| format!("{path}: no {what}"))
}
