// SPDX-License-Identifier: GPL-2.0
//! Guest memory in several mappings, whose edges lie inside of huge pages or of page tables, under NUMA scans: what they
//! hint, report and have KVM drop is what lies in the mappings that may be scanned, page for page. Changes its own memory
//! only.

use std::io;
use std::ops::Range;

use anyhow::{ensure, Context, Result};
use guest::memcg::Source;
use guest::memory::{Backing, Pinned, HUGE_PAGE};
use guest::needs;
use guest::{balancing, PAGE};
use trace::check;
use trace::client::Client;

use crate::{Machine, Test, LIMIT, RECORDS, VM};

/// The tests of this group.
pub const TESTS: &[Test] = &[
    Test {
        name: "vma_edges.memfd",
        needs: VM,
        run: |source| edges(source, Backing::Memfd, Pinned::None),
    },
    Test {
        name: "vma_edges.thp",
        needs: &[needs::KVM, needs::RECORDER, needs::THP],
        run: |source| edges(source, Backing::Thp, Pinned::None),
    },
    Test {
        name: "vma_edges.thp_pinned_half",
        needs: &[needs::KVM, needs::RECORDER, needs::THP, needs::IO_URING],
        run: |source| edges(source, Backing::Thp, Pinned::Half),
    },
];

/// Guest memory in bytes.
const MEMORY: usize = 4 * HUGE_PAGE;
/// The pages of two mappings that may be scanned, side by side, between two that may not: of the four huge pages three
/// have an edge inside.
const SCANNED: [Range<usize>; 2] = [200..900, 900..1800];

fn edges(source: &Source, backing: Backing, pinned: Pinned) -> Result<()> {
    let mut machine = Machine::new(backing, pinned, MEMORY, 1)?;
    let memory = machine.memory.clone();
    let base = memory.addresses().start;
    let addresses =
        |pages: &Range<usize>| base + (pages.start * PAGE) as u64..base + (pages.end * PAGE) as u64;
    let [first, second] = SCANNED;
    let around = [0..first.start, second.end..memory.pages()].map(|pages| addresses(&pages));
    for part in &around {
        balancing::forbid_scans_of(part.clone())?;
    }
    // Changes nothing but that the mapping is another one.
    let apart = addresses(&second);
    // SAFETY: advice about our own memory, which keeps its contents.
    let advised = unsafe {
        libc::madvise(
            apart.start as *mut libc::c_void,
            (apart.end - apart.start) as usize,
            libc::MADV_DONTDUMP,
        )
    };
    ensure!(
        advised == 0,
        "MADV_DONTDUMP: {}",
        io::Error::last_os_error()
    );
    // The kernel has split the huge pages that have an edge inside: KVM maps them again.
    machine.pass(machine.whole())?;

    let mut client = Client::attach_self(RECORDS)?;
    let scanned = machine.scan(source)?;
    let sequence = client.settle(Vec::new(), LIMIT)?;
    let stats = client.stats()?;
    ensure!(stats.overwritten + stats.lost == 0, "{stats:?}");
    drop(client);

    let free = SCANNED.into_iter().flatten();
    let free = free.filter(|page| !memory.is_pinned(*page)).count() as u64;
    let reported: u64 = sequence.reports.iter().map(|one| one.pages()).sum();
    ensure!(
        (scanned.hinted, reported, scanned.dropped) == (free, free, free),
        "{} pages hinted, {reported} reported, {} dropped by KVM: each must be {free}",
        scanned.hinted,
        scanned.dropped
    );
    for rule in [
        check::reports_inside_pairs,
        check::one_report_per_pair,
        check::stretches_ordered,
    ] {
        rule(&sequence)?;
    }
    check::not_reported(&sequence, &around).context("outside of what may be scanned")?;
    check::not_reported(&sequence, &memory.pinned_addresses()).context("pinned")?;

    machine.pass(machine.whole())?;
    machine.verify()
}
