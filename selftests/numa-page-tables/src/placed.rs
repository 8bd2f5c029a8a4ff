// SPDX-License-Identifier: GPL-2.0
//! Guest memory on node 1, touched first by vCPUs on node 0, then moved to node 0: where the page tables are each time, and how
//! many, for a VM that asked and for one that did not.

use std::sync::Arc;

use anyhow::{bail, ensure, Result};
use guest::balancing::{self, CPU_NODE, MEMORY_NODE};
use guest::memory::{Backing, GuestMemory, Pinned};
use guest::vm::{Clearing, Vm};
use serde::Serialize;

use crate::{share, Machine, ABOVE, FOLLOWED, PLACED, VCPUS};
use numa_page_tables::tables::{Tables, ENTRIES};

/// What the VM's memory is made of, and whether its page tables are wanted where that is.
#[derive(Clone, Copy)]
pub struct Case {
    pub backing: Backing,
    pub asked: bool,
}

/// What a case came to. Page tables are those that the VM has.
#[derive(Clone, Debug, Serialize)]
pub struct Seen {
    pub name: String,
    /// Leaf tables that the memory needs.
    leaves: u64,
    /// After the first touch; of huge pages, after they were split for dirty logging.
    pub first: Tables,
    /// Of huge pages: when dirty logging had ended, and the guest had touched all again.
    merged: Option<Tables>,
    /// After all memory had moved to the node of the vCPUs, and was touched again.
    moved: Tables,
    /// Faults that were taken again, until the first count.
    retries: u64,
    /// Page tables of faults that were elsewhere than wanted, and those replaced; none where the kernel does not count them.
    remote: Option<u64>,
    replaced: Option<u64>,
    /// Page tables that were left when the VM was gone.
    left: u64,
}

type Judge = fn(&Seen) -> Result<()>;
/// Tests of a VM that asked, and of one that did not.
const ASKED: &[(&str, Judge)] = &[
    ("placed", |seen| {
        share("on node 1", seen.first.memory_node, seen.leaves, PLACED)
    }),
    ("followed", |seen| {
        share("on node 0", seen.moved.cpu_node, seen.leaves, FOLLOWED)
    }),
    ("counted", |seen| match (seen.remote, seen.replaced) {
        // Tables of huge pages are made anew when they are split.
        (Some(0), Some(_)) if seen.merged.is_some() => Ok(()),
        (Some(0), Some(replaced)) => share("replaced", replaced, seen.leaves, FOLLOWED),
        other => bail!("(remote, replaced) is {other:?}"),
    }),
    ("bounded", bounded),
];
/// Those of page tables that are replaced.
pub const FOLLOWING: [&str; 2] = ["followed", "counted"];
const NOT_ASKED: &[(&str, Judge)] = &[
    ("as_ever", |seen| {
        share("on node 0", seen.first.cpu_node, seen.leaves, PLACED)?;
        share("on node 0", seen.moved.cpu_node, seen.leaves, PLACED)
    }),
    ("bounded", bounded),
];

/// No more page tables than the memory needs, and none when the VM is gone.
fn bounded(seen: &Seen) -> Result<()> {
    let counts = [
        (Some(seen.first), seen.leaves),
        (Some(seen.moved), seen.leaves),
        (seen.merged, 0),
    ];
    for (tables, leaves) in counts {
        let all = tables.map_or(0, |tables| tables.cpu_node + tables.memory_node);
        ensure!(
            all <= leaves + ABOVE,
            "{all} page tables for {leaves} leaves: {tables:?}"
        );
    }
    ensure!(
        seen.left == 0,
        "{} page tables left without a VM",
        seen.left
    );
    Ok(())
}

impl Case {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Case> + Clone {
        [Backing::Anon, Backing::Memfd, Backing::Thp]
            .into_iter()
            .flat_map(|backing| [true, false].map(|asked| Case { backing, asked }))
    }

    pub fn name(self) -> String {
        let asked = if self.asked { "asked" } else { "default" };
        format!("{}.{asked}", self.backing.name())
    }

    pub fn tests(self) -> &'static [(&'static str, Judge)] {
        match self.asked {
            true => ASKED,
            false => NOT_ASKED,
        }
    }

    pub fn measure(self, machine: &Machine) -> Result<Seen> {
        // This thread, too, which has huge pages split, is not where the memory is.
        balancing::set_affinity(&balancing::node_cpus(CPU_NODE)?)?;
        let memory = GuestMemory::new(self.backing, Pinned::None, machine.memory, MEMORY_NODE)?;
        let memory = Arc::new(memory);
        let cpus = balancing::vcpu_cpus(VCPUS)?;
        let before = Tables::count()?;
        let of_vm = || Ok::<_, anyhow::Error>(Tables::count()?.since(before));
        let vm = match self.asked {
            true => machine.vm(&memory, &cpus)?,
            false => Vm::new(&memory, &cpus)?,
        };
        let touch = || machine.touch(&vm, &memory);
        // Eager splitting: all huge pages, when logging begins.
        let split = || vm.while_logging(Clearing::Read, |_| of_vm());
        touch()?;
        let (first, merged) = match self.backing {
            Backing::Thp => {
                let split = split()?;
                touch()?;
                (split, Some(of_vm()?))
            }
            _ => (of_vm()?, None),
        };
        let retries = vm.retries()?;
        memory.move_to(CPU_NODE)?;
        touch()?;
        let moved = match self.backing {
            Backing::Thp => split()?,
            _ => of_vm()?,
        };
        let seen = Seen {
            name: self.name(),
            leaves: memory.pages() as u64 / ENTRIES,
            first,
            merged,
            moved,
            retries,
            remote: vm.vcpu_stat("pf_table_remote").ok(),
            replaced: vm.vcpu_stat("pf_table_moved").ok(),
            left: 0,
        };
        drop(vm);
        let left = of_vm()?;
        Ok(Seen {
            left: left.cpu_node + left.memory_node,
            ..seen
        })
    }
}
