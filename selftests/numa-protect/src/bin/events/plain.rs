// SPDX-License-Identifier: GPL-2.0
//! Two subscribers to the same process under NUMA scans, one of them without `numa_protect`: it hears the same starts
//! and ends, and of no report. Looks at what the recorder says of both.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{ensure, Result};
use guest::memcg::Source;
use guest::memory::{Backing, Pinned};
use trace::client::Client;
use trace::record::{kind, Record};

use crate::{under_scans, Machine, Test, RECORDS, VM};

/// The tests of this group.
pub const TESTS: &[Test] = &[Test {
    name: "plain_subscriber",
    needs: VM,
    run: plain_subscriber,
}];

/// Guest memory in bytes.
const MEMORY: usize = 16 << 20;
/// Rounds of scans and a pass.
const ROUNDS: usize = 2;
/// Scans in each round: the first may have begun before.
const SCANS: u64 = 2;

fn plain_subscriber(_: &Source) -> Result<()> {
    let mut machine = Machine::new(Backing::Anon, Pinned::Half, MEMORY, 2)?;
    // The order says that what the process does to attach the second is not held against the first.
    let (mut full, mut plain) = (
        Client::attach_self(RECORDS)?,
        Client::attach_self_plain(RECORDS)?,
    );
    for _ in 0..ROUNDS {
        machine.vm.while_spinning_inside(|| under_scans(SCANS))?;
        machine.pass(machine.whole())?;
    }
    machine.verify()?;
    let mut recorded = [Vec::new(), Vec::new()];
    for (client, records) in [&mut full, &mut plain].into_iter().zip(&mut recorded) {
        client.read_new(records)?;
        let stats = client.stats()?;
        ensure!(stats.overwritten + stats.lost == 0, "{stats:?}");
    }
    let [full, plain] = &recorded;
    the_same(full, plain, &machine.memory.addresses()).map_err(anyhow::Error::msg)
}

/// What of a record both subscribers must agree on.
fn essence(record: &Record) -> (u8, u8, u16, u64, u64) {
    let Record {
        kind,
        event,
        flags,
        start,
        end,
        ..
    } = *record;
    (kind, event, flags, start, end)
}

/// What happened to `addresses`, thread by thread: across threads the two may see another order.
fn by_thread<'a>(
    records: impl Iterator<Item = &'a Record>,
    addresses: &Range<u64>,
) -> BTreeMap<u32, Vec<&'a Record>> {
    let mut threads: BTreeMap<u32, Vec<&Record>> = BTreeMap::new();
    for record in records.filter(|one| one.start < addresses.end && one.end > addresses.start) {
        threads.entry(record.tid).or_default().push(record);
    }
    threads
}

/// The plain subscriber heard what the full one did, but for reports, of which the full one had some.
fn the_same(full: &[Record], plain: &[Record], addresses: &Range<u64>) -> Result<(), String> {
    let report = |record: &&Record| record.kind == kind::NUMA_PROTECT;
    if let Some(record) = plain.iter().find(report) {
        return Err(format!(
            "a report to a plain subscriber: {}",
            record.line(12)
        ));
    }
    if !full.iter().any(|record| report(&record)) {
        return Err("no report to the subscriber that has the callback".into());
    }
    let heard = by_thread(full.iter().filter(|record| !report(record)), addresses);
    let heard_plain = by_thread(plain.iter(), addresses);
    if heard.keys().ne(heard_plain.keys()) {
        return Err("other threads in the plain subscriber's records".into());
    }
    for (of_full, of_plain) in heard.values().zip(heard_plain.values()) {
        let differs = of_full
            .iter()
            .zip(of_plain)
            .find(|(one, other)| essence(one) != essence(other));
        if let Some((one, other)) = differs {
            return Err(format!(
                "the plain subscriber heard {}, the other {}",
                other.line(12),
                one.line(12)
            ));
        }
        if of_full.len() != of_plain.len() {
            return Err(format!(
                "{} records of a thread in the plain subscriber's, {} in the other's",
                of_plain.len(),
                of_full.len()
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use trace::record::{event, flag};

    /// A scan of thread 1 with a report, and a migration of thread 2.
    fn full() -> Vec<Record> {
        [
            (
                1,
                kind::INVALIDATE_RANGE_START,
                event::PROTECTION_VMA,
                flag::NUMA,
            ),
            (
                2,
                kind::INVALIDATE_RANGE_START,
                event::CLEAR,
                flag::BLOCKABLE,
            ),
            (1, kind::NUMA_PROTECT, event::PROTECTION_VMA, flag::NUMA),
            (2, kind::INVALIDATE_RANGE_END, event::CLEAR, flag::BLOCKABLE),
            (
                1,
                kind::INVALIDATE_RANGE_END,
                event::PROTECTION_VMA,
                flag::NUMA,
            ),
        ]
        .map(|(tid, kind, event, flags)| Record {
            tid,
            kind,
            event,
            flags,
            start: 0x1000,
            end: 0x9000,
            ..Record::default()
        })
        .to_vec()
    }

    fn plain() -> Vec<Record> {
        let mut records = full();
        records.retain(|one| one.kind != kind::NUMA_PROTECT);
        records
    }

    fn judged(full: &[Record], plain: &[Record]) -> String {
        the_same(full, plain, &(0x1000..0x9000))
            .err()
            .unwrap_or_default()
    }

    #[test]
    fn the_same_passes_in_any_order_of_threads() {
        assert_eq!(judged(&full(), &plain()), "");
        let mut turned = plain();
        turned.swap(0, 1);
        assert_eq!(judged(&full(), &turned), "");
    }

    #[test]
    fn elsewhere_nothing_matters() {
        let mut records = plain();
        records.push(Record {
            tid: 1,
            start: 0x9000,
            end: 0xa000,
            ..records[0]
        });
        assert_eq!(judged(&full(), &records), "");
    }

    #[test]
    fn each_difference_is_seen() {
        assert!(judged(&full(), &full()).starts_with("a report to a plain"));
        assert!(judged(&plain(), &plain()).starts_with("no report"));
        for change in [
            (|records: &mut Vec<Record>| records.truncate(3)) as fn(&mut Vec<Record>),
            |records| records[0].flags = 0,
            |records| records[0].event = event::CLEAR,
            |records| records[3].end = 0x8000,
            |records| records.swap(0, 3),
            |records| records[1].tid = 3,
            |records| records.retain(|one| one.tid == 1),
        ] {
            let mut records = plain();
            change(&mut records);
            assert_ne!(judged(&full(), &records), "");
        }
    }
}
