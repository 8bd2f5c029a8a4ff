// SPDX-License-Identifier: GPL-2.0
//! A VM whose memory lies on the far node and follows its vCPUs: what KVM is told for each page that moves, when it is hinted
//! and when it is migrated.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure, Context, Result};
use guest::balancing::{self, CPU_NODE, MEMORY_NODE};
use guest::memory::{Backing, GuestMemory, Pinned};
use guest::unmaps::{Unmaps, MIGRATION, SCAN};
use guest::vm::{Sweep, Vm};

use crate::counters::Counters;
use crate::show::{Row, Values};
use crate::How;

/// How many vCPUs there are, each of which counts in all memory.
const VCPUS: usize = 2;
/// Between two looks at how far it has come.
const POLL: Duration = Duration::from_millis(100);

/// One round: from the time that all is mapped to that when enough of it is near.
pub fn measure(how: &How, backing: Backing) -> Result<Values> {
    balancing::forbid_scans(CPU_NODE)?;
    let memory = GuestMemory::new(backing, Pinned::None, how.bytes(), MEMORY_NODE)?;
    let memory = Arc::new(memory);
    let vm = Vm::new(&memory, &balancing::vcpu_cpus(VCPUS)?)?;
    let whole = Sweep::all(memory.pages());
    for vcpu in 0..VCPUS {
        vm.pass(vcpu, whole)?;
    }
    let unmaps = Unmaps::start()?;
    let of_vm = || -> Result<[u64; 3]> {
        Ok([
            vm.vcpu_stat("pf_taken")?,
            vm.retries()?,
            vm.stat("remote_tlb_flush_requests")?,
        ])
    };
    let before = of_vm()?;
    let counters = Counters::start()?;
    let scans = balancing::scan_seq()?;
    balancing::enable(true)?;
    let begun = Instant::now();
    let ran = vm.while_running(&[whole; VCPUS], || loop {
        let nodes = memory.nodes()?;
        let near = nodes
            .iter()
            .filter(|node| **node == CPU_NODE as i32)
            .count();
        if near * 100 >= nodes.len() * how.moved as usize {
            return Ok((balancing::scan_seq()? - scans, begun.elapsed()));
        }
        ensure!(
            begun.elapsed() < how.limit(),
            "{near} pages near in {:?}",
            how.limit()
        );
        thread::sleep(POLL);
    });
    let off = balancing::enable(false);
    let ((scans, took), passes) = ran?;
    off?;
    let mut values = counters.read()?;
    values.insert(Row::Scans, scans as f64);
    values.insert(Row::Milliseconds, took.as_secs_f64() * 1000.0);
    let after = of_vm()?;
    let rows = [Row::VmFaults, Row::VmRetries, Row::VmFlushes];
    for (row, (now, then)) in rows.into_iter().zip(after.into_iter().zip(before)) {
        let since = now.checked_sub(then);
        values.insert(row, since.context("KVM's statistics went back")? as f64);
    }
    for (function, calls, dropped) in [
        (SCAN, Row::ScanUnmaps, Row::ScanDropped),
        (MIGRATION, Row::MigrationUnmaps, Row::MigrationDropped),
    ] {
        let unmapped = unmaps.by(function)?;
        values.insert(calls, unmapped.calls as f64);
        values.insert(dropped, unmapped.dropped as f64);
    }
    let counted = passes
        .iter()
        .map(|passes| vec![*passes as u32 + 1; memory.pages()]);
    let counted: Vec<Vec<u32>> = counted.collect();
    memory.verify(&counted).map_err(|why| anyhow!(why))?;
    Ok(values)
}
