// SPDX-License-Identifier: GPL-2.0
//! Huge pages that KVM splits for dirty logging, in each way that it has: where the new page tables are. Changes KVM's
//! parameter `eager_page_split` meanwhile.

use std::fs;
use std::sync::Arc;

use anyhow::{Context, Result};
use guest::balancing::{self, CPU_NODE, MEMORY_NODE};
use guest::memory::{Backing, GuestMemory, Pinned};
use guest::vm::Clearing;

use crate::{share, Machine, PLACED, VCPUS};
use numa_page_tables::tables::{Tables, ENTRIES};

const EAGER: &str = "/sys/module/kvm/parameters/eager_page_split";

/// When huge pages are split.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// All of them, when the dirty log is switched on.
    On,
    /// Those that are cleared, when it is cleared: it is all set in the beginning.
    Cleared,
    /// Each, when a vCPU writes to it.
    Written,
}

/// Fails where fewer than [`PLACED`] percent of the leaf tables are on the node of the memory.
pub fn split(machine: &Machine, when: When, clearing: Clearing) -> Result<()> {
    let memory = GuestMemory::new(Backing::Thp, Pinned::None, machine.memory, MEMORY_NODE)?;
    let memory = Arc::new(memory);
    // The thread that splits eagerly is where the vCPUs are.
    balancing::set_affinity(&balancing::node_cpus(CPU_NODE)?)?;
    let _lazily = (when == When::Written).then(Lazily::new).transpose()?;
    let vm = machine.vm(&memory, &balancing::vcpu_cpus(VCPUS)?)?;
    let touch = || machine.touch(&vm, &memory);
    touch()?;
    // Huge pages need no leaf table.
    let before = Tables::count()?;
    let split = vm.while_logging(clearing, |log| {
        match when {
            When::On => (),
            When::Cleared => drop(log.take()?),
            When::Written => touch()?,
        }
        Ok(Tables::count()?.since(before))
    })?;
    let leaves = memory.pages() as u64 / ENTRIES;
    share("on node 1", split.memory_node, leaves, PLACED)
}

/// KVM does not split eagerly, until dropped.
struct Lazily(String);

impl Lazily {
    fn new() -> Result<Lazily> {
        let before = fs::read_to_string(EAGER).context(EAGER)?;
        fs::write(EAGER, "N").context(EAGER)?;
        Ok(Lazily(before))
    }
}

impl Drop for Lazily {
    fn drop(&mut self) {
        if let Err(error) = fs::write(EAGER, self.0.trim()) {
            eprintln!("{EAGER}: not put back: {error}");
        }
    }
}
