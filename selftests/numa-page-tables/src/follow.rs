// SPDX-License-Identifier: GPL-2.0
//! vCPUs that move to another node, and their memory after them: whether its page tables come along. Switches NUMA balancing
//! on meanwhile, where that is to move the memory.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Result};
use guest::balancing::{self, CPU_NODE, MEMORY_NODE};
use guest::memory::{Backing, GuestMemory, Pinned};
use guest::vm::{Sweep, Vm};

use crate::{share, Machine, FOLLOWED, PLACED, VCPUS};
use numa_page_tables::tables::{Tables, ENTRIES};

/// Memory of the VM, in bytes.
const MEMORY: usize = 64 << 20;
/// The longest that NUMA balancing may take.
const LIMIT: Duration = Duration::from_secs(180);
/// Whole scans after the last page has moved: page tables that were in use meanwhile get their chance.
const SCANS: u64 = 2;

/// Who moves the memory.
#[derive(Clone, Copy)]
pub enum By {
    /// `move_pages()`.
    UserSpace,
    /// Hint faults.
    Balancing,
}

/// Fails where fewer than [`FOLLOWED`] percent of the leaf tables are on the new node in the end.
pub fn follow(machine: &Machine, backing: Backing, by: By) -> Result<()> {
    let memory = GuestMemory::new(backing, Pinned::None, MEMORY, MEMORY_NODE)?;
    let memory = Arc::new(memory);
    let leaves = memory.pages() as u64 / ENTRIES;
    let old: Vec<usize> = balancing::node_cpus(MEMORY_NODE)?
        .into_iter()
        .cycle()
        .take(VCPUS)
        .collect();
    let before = Tables::count()?;
    let vm = machine.vm(&memory, &old)?;
    let touch = || machine.touch(&vm, &memory);
    touch()?;
    let first = Tables::count()?.since(before);
    share("on node 1 at first", first.memory_node, leaves, PLACED)?;

    vm.move_vcpus(&balancing::vcpu_cpus(VCPUS)?)?;
    match by {
        By::UserSpace => memory.move_to(CPU_NODE)?,
        By::Balancing => balance(&vm, &memory)?,
    }
    touch()?;
    let moved = Tables::count()?.since(before);
    share("on node 0 then", moved.cpu_node, leaves, FOLLOWED)?;
    ensure!(
        moved.memory_node == 0 || moved.cpu_node + moved.memory_node <= leaves + crate::ABOVE,
        "more page tables than memory needs: {moved:?} for {leaves} leaves"
    );
    Ok(())
}

/// Lets vCPUs run until hint faults have moved all of the memory to their node.
fn balance(vm: &Vm, memory: &GuestMemory) -> Result<()> {
    let begun = Instant::now();
    balancing::enable(true)?;
    let sweeps = [Sweep::all(memory.pages()); VCPUS];
    let moved = vm.while_running(&sweeps, || loop {
        let left = memory.nodes()?;
        let left = left.iter().filter(|node| **node != CPU_NODE as i32).count();
        if left == 0 {
            return balancing::wait_for_scans(SCANS, LIMIT);
        }
        if begun.elapsed() > LIMIT {
            bail!("{left} pages have not moved in {LIMIT:?}");
        }
        thread::sleep(Duration::from_millis(100));
    });
    balancing::enable(false)?;
    moved.map(drop)
}
