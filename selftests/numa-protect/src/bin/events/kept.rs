// SPDX-License-Identifier: GPL-2.0
//! What KVM knows of guest memory by other ways than the page tables that NUMA scans change: it keeps that while they run,
//! and no longer than it may. Changes its own memory, and counts calls of a function of KVM's.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{ensure, Result};
use guest::balancing::{self, CPU_NODE};
use guest::memcg::Source;
use guest::memory::{Backing, Pinned, HUGE_PAGE};
use guest::needs;
use guest::tracefs::Tracepoint;
use guest::vm::Sweep;

use crate::{Machine, Test};

/// The tests of this group.
pub const TESTS: &[Test] = &[
    Test {
        name: "kept.guest_memfd",
        needs: &[needs::KVM],
        run: guest_memfd,
    },
    Test {
        name: "kept.pfncache",
        needs: &[needs::KVM, needs::KPROBE_EVENTS],
        run: pfncache,
    },
];

/// Ordinary guest memory in bytes.
const MEMORY: usize = HUGE_PAGE;
/// The pages of a guest_memfd, and those in the middle that the guest uses.
const GUEST_MEMFD: usize = 96;
const GUESTS: Range<usize> = 32..64;

/// Memory that KVM maps by its place in a guest_memfd can be mapped by this process, too, and then be scanned. A report may
/// run across entries that are empty, but here KVM maps just those.
fn guest_memfd(source: &Source) -> Result<()> {
    let mut machine = Machine::new(Backing::Anon, Pinned::None, MEMORY, 1)?;
    let (ordinary, at) = (machine.memory.pages(), 2 * machine.memory.pages());
    let memfd = machine.vm.put_guest_memfd(0, GUEST_MEMFD, at)?;
    balancing::allow_scans(memfd.addresses())?;
    // The guest's pages stay out of the page tables of this process, and its own, around them, out of the guest's. They
    // are only read: as pages of a file, scans leave them alone once they are dirty.
    let outside = memfd
        .words()
        .enumerate()
        .filter(|(page, _)| !GUESTS.contains(page));
    let sum: u32 = outside.map(|(_, word)| word.load(Ordering::Relaxed)).sum();
    ensure!(sum == 0, "a new guest_memfd is not empty");
    let guests = Sweep {
        first: at + GUESTS.start,
        stride: 1,
        count: GUESTS.len(),
    };
    machine.vm.pass(0, guests)?;

    let scanned = machine.scan(source)?;
    let hintable = (ordinary + GUEST_MEMFD - GUESTS.len()) as u64;
    let ordinary = ordinary as u64;
    ensure!(
        (scanned.hinted, scanned.dropped) == (hintable, ordinary),
        "{} pages hinted of {hintable}, {} dropped of the {ordinary} that lie elsewhere",
        scanned.hinted,
        scanned.dropped
    );
    machine.vm.pass(0, guests)?;
    for (page, word) in memfd.words().enumerate() {
        let word = word.load(Ordering::Relaxed);
        let expected = if GUESTS.contains(&page) { 2 } else { 0 };
        ensure!(
            word == expected,
            "page {page} of the guest_memfd holds {word}, not {expected}"
        );
    }
    machine.pass(machine.whole())?;
    machine.verify()
}

/// Where the clock lies: in a line of its own, and not over its tag.
const CLOCK: u64 = 64;
/// What KVM calls where it may not use a `gfn_to_pfn_cache` any more, as the page has gone from there.
const REFRESH: &str = "kvm_gpc_refresh";

/// To write a vCPU's clock, KVM remembers in which frame it lies. A hint moves nothing, but migration does.
fn pfncache(source: &Source) -> Result<()> {
    let mut machine = Machine::new(Backing::Anon, Pinned::None, MEMORY, 1)?;
    machine.vm.keep_clock(0, CLOCK)?;
    let first = update_clock(&mut machine)?;
    let refreshes = Tracepoint::count_calls(REFRESH, "", "")?;

    let scanned = machine.scan(source)?;
    let pages = machine.memory.pages() as u64;
    ensure!(
        scanned.hinted == pages,
        "{} of {pages} pages hinted",
        scanned.hinted
    );
    let second = update_clock(&mut machine)?;
    let after_scans = refreshes.fired()?;

    machine.memory.move_to(CPU_NODE)?;
    let third = update_clock(&mut machine)?;
    let after_migration = refreshes.fired()? - after_scans;

    ensure!(
        first < second && second < third,
        "the clock's versions: {first}, {second}, {third}"
    );
    ensure!(
        (after_scans, after_migration) == (0, 1),
        "{after_scans} refreshes of where the clock lies after scans, {after_migration} after it was migrated once"
    );
    machine.verify()
}

/// Has KVM write the clock. Gives its version, which counts how often it has.
fn update_clock(machine: &mut Machine) -> Result<u32> {
    machine.vm.update_clocks()?;
    // So that the vCPU enters the guest, but does not touch the clock's page.
    machine.pass(Sweep {
        first: 1,
        stride: 1,
        count: 1,
    })?;
    let version = (machine.memory.addresses().start + CLOCK) as *mut u32;
    // SAFETY: guest memory and aligned; it is used as an atomic word only.
    let version = unsafe { AtomicU32::from_ptr(version) };
    Ok(version.load(Ordering::Relaxed))
}
