// SPDX-License-Identifier: GPL-2.0
//! The rules of a recorded sequence, each a pure function that gives the first record against the rule.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use crate::record::{kind, Record};
use crate::sequence::{Report, Sequence};

/// A record that breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The record.
    pub record: Record,
    /// What is wrong with it.
    pub why: &'static str,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "record {}: {}: {}",
            self.record.seq,
            self.why,
            self.record.line(12)
        )
    }
}

impl std::error::Error for Violation {}

/// A rule was obeyed, or the first record that broke it.
pub type Verdict = Result<(), Violation>;

fn broken(record: &Record, why: &'static str) -> Verdict {
    Err(Violation {
        record: *record,
        why,
    })
}

/// No record is missing: the sequence numbers of each CPU follow each other and nothing was overwritten or lost.
pub fn complete(sequence: &Sequence) -> Verdict {
    for record in &sequence.records {
        if record.kind == kind::OVERWRITTEN {
            return broken(record, "overwritten or lost");
        }
    }
    match sequence.gaps.first() {
        Some(record) => broken(record, "the record before it on its CPU is missing"),
        None => Ok(()),
    }
}

/// Every start has its end, every end its start, in the same task, with the same range, event and flags.
pub fn balanced(sequence: &Sequence) -> Verdict {
    if let Some(end) = sequence.lone_ends.first() {
        return broken(end, "an end without a start");
    }
    for pair in &sequence.pairs {
        match &pair.end {
            None => return broken(&pair.start, "a start without an end"),
            Some(end) if (end.event, end.flags) != (pair.start.event, pair.start.flags) => {
                return broken(end, "an end of another kind than its start");
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Every report comes between the start and the end of a NUMA scan in the same task, and inside its range.
pub fn reports_inside_pairs(sequence: &Sequence) -> Verdict {
    for report in &sequence.reports {
        let first = &report.stretches[0];
        let Some(pair) = report.pair.map(|pair| &sequence.pairs[pair]) else {
            return broken(first, "a report outside every start/end pair");
        };
        if !pair.is_numa() {
            return broken(first, "a report in a pair that is not a NUMA scan's");
        }
        for stretch in &report.stretches {
            if stretch.start < pair.start.start || stretch.end > pair.start.end {
                return broken(stretch, "a stretch outside the range of its pair");
            }
            if pair.end.is_some_and(|end| end.seq < stretch.seq) {
                return broken(stretch, "a stretch after the end of its pair");
            }
        }
    }
    Ok(())
}

/// No start/end pair has two reports, and every report is whole.
pub fn one_report_per_pair(sequence: &Sequence) -> Verdict {
    let mut seen = HashSet::new();
    for report in &sequence.reports {
        let first = &report.stretches[0];
        if !report.whole {
            return broken(first, "a report without its first or its last stretch");
        }
        if report.pair.is_some_and(|pair| !seen.insert(pair)) {
            return broken(first, "the second report of its pair");
        }
    }
    Ok(())
}

/// The stretches of a report are page-aligned, not empty, ascending and disjoint, have room for the pages that it
/// says were hinted, and agree on their number, which is not 0.
pub fn stretches_ordered(sequence: &Sequence) -> Verdict {
    sequence.reports.iter().try_for_each(report_ordered)
}

fn report_ordered(report: &Report) -> Verdict {
    const PAGE: u64 = 4096;
    let first = &report.stretches[0];
    let (mut end, mut room) = (0, 0);
    for stretch in &report.stretches {
        if (stretch.start | stretch.end) % PAGE != 0 {
            return broken(stretch, "a stretch of half pages");
        }
        if stretch.start >= stretch.end {
            return broken(stretch, "an empty stretch");
        }
        if stretch.start < end {
            return broken(
                stretch,
                "a stretch that overlaps or precedes the one before",
            );
        }
        if stretch.pages != first.pages {
            return broken(
                stretch,
                "another number of hinted pages than in the first stretch",
            );
        }
        end = stretch.end;
        room += (stretch.end - stretch.start) / PAGE;
    }
    if first.pages == 0 {
        return broken(first, "a report of no pages");
    }
    if room < report.pages() {
        return broken(first, "more pages hinted than the stretches have room for");
    }
    Ok(())
}

/// No stretch meets one of the ranges `kept`, which are ascending and disjoint.
pub fn not_reported(sequence: &Sequence, kept: &[Range<u64>]) -> Verdict {
    for stretch in sequence.stretches() {
        let next = kept.partition_point(|range| range.end <= stretch.start);
        if kept
            .get(next)
            .is_some_and(|range| range.start < stretch.end)
        {
            return broken(stretch, "a stretch over memory that must not be reported");
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // Lists of ranges are meant, some of one range.
mod tests {
    use super::*;
    use crate::record::{event, flag};
    use proptest::prelude::*;

    const NUMA: u16 = flag::BLOCKABLE | flag::NUMA;

    /// Builds sequences record by record.
    #[derive(Clone, Default)]
    struct Builder(Vec<Record>);

    impl Builder {
        fn push(mut self, tid: u32, kind: u8, flags: u16, pages: u32, range: Range<u64>) -> Self {
            self.0.push(Record {
                seq: self.0.len() as u64,
                tid,
                kind,
                event: event::PROTECTION_VMA,
                flags,
                pages,
                start: range.start << 12,
                end: range.end << 12,
                ..Record::default()
            });
            self
        }
        fn start(self, tid: u32, flags: u16, range: Range<u64>) -> Self {
            self.push(tid, kind::INVALIDATE_RANGE_START, flags, 0, range)
        }
        fn end(self, tid: u32, flags: u16, range: Range<u64>) -> Self {
            self.push(tid, kind::INVALIDATE_RANGE_END, flags, 0, range)
        }
        fn stretch(self, tid: u32, flags: u16, pages: u32, range: Range<u64>) -> Self {
            self.push(tid, kind::NUMA_PROTECT, NUMA | flags, pages, range)
        }
        fn report(mut self, tid: u32, pages: u32, stretches: &[Range<u64>]) -> Self {
            for (at, range) in stretches.iter().enumerate() {
                let mut flags = 0;
                if at == 0 {
                    flags |= flag::FIRST;
                }
                if at + 1 == stretches.len() {
                    flags |= flag::LAST;
                }
                self = self.stretch(tid, flags, pages, range.clone());
            }
            self
        }
        fn done(self) -> Sequence {
            Sequence::new(self.0)
        }
    }

    fn offender(verdict: Verdict) -> Option<u64> {
        verdict.err().map(|violation| violation.record.seq)
    }

    /// A scan of task 1 with two stretches, inside it a migration of task 2, and a nested pair.
    fn sound() -> Builder {
        Builder::default()
            .start(1, NUMA, 0..100)
            .start(2, flag::BLOCKABLE, 50..51)
            .start(1, flag::BLOCKABLE, 60..70)
            .end(1, flag::BLOCKABLE, 60..70)
            .end(2, flag::BLOCKABLE, 50..51)
            .report(1, 5, &[10..12, 20..24])
            .end(1, NUMA, 0..100)
    }

    #[test]
    fn a_sound_sequence_obeys_every_rule() {
        let sequence = sound().done();
        assert_eq!(complete(&sequence), Ok(()));
        assert_eq!(balanced(&sequence), Ok(()));
        assert_eq!(reports_inside_pairs(&sequence), Ok(()));
        assert_eq!(one_report_per_pair(&sequence), Ok(()));
        assert_eq!(stretches_ordered(&sequence), Ok(()));
        assert_eq!(
            not_reported(&sequence, &[0..10 << 12, 12 << 12..20 << 12]),
            Ok(())
        );
        assert_eq!(sequence.numa_pairs().count(), 1);
        assert_eq!(sequence.reports[0].pages(), 5);
        assert_eq!(sequence.reports[0].pair, Some(0));
    }

    #[test]
    fn a_missing_record_is_seen() {
        let mut records = sound().0;
        records.remove(3);
        // It takes the place of the one that is missing.
        assert_eq!(offender(complete(&Sequence::new(records))), Some(3));
        let mut records = sound().0;
        records[2] = Record::overwritten(2, 0);
        assert_eq!(offender(complete(&Sequence::new(records))), Some(2));
    }

    #[test]
    fn records_of_several_cpus_come_in_the_order_of_time() {
        // Of each record its CPU, its number there, and its time.
        let sequence = |places: &[(u32, u64, u64)]| {
            let records = sound().0.into_iter().zip(places).rev();
            Sequence::new(
                records
                    .map(|(record, &(cpu, seq, time_ns))| Record {
                        cpu,
                        seq,
                        time_ns,
                        ..record
                    })
                    .collect(),
            )
        };
        let places = [
            (0, 0, 1),
            (1, 0, 2),
            (0, 1, 3),
            (0, 2, 4),
            (1, 1, 4),
            (0, 3, 5),
            (2, 7, 6),
            (0, 4, 9),
        ];
        let whole = sequence(&places);
        assert_eq!(complete(&whole), Ok(()));
        assert_eq!(balanced(&whole), Ok(()));
        assert_eq!(reports_inside_pairs(&whole), Ok(()));
        assert_eq!(
            whole.records.iter().map(|one| one.seq).collect::<Vec<_>>(),
            (0..8).collect::<Vec<_>>()
        );
        // One that was stored late: on its CPU a later time comes first.
        let mut late = places;
        (late[2].1, late[3].1) = (2, 1);
        assert_eq!(complete(&sequence(&late)), Ok(()));
        let mut places = places;
        places[4].1 = 2;
        assert_eq!(offender(complete(&sequence(&places))), Some(4));
    }

    #[test]
    fn a_start_without_an_end_is_seen() {
        let sequence = sound().start(1, NUMA, 0..4).done();
        assert_eq!(offender(balanced(&sequence)), Some(8));
    }

    #[test]
    fn an_end_without_a_start_is_seen() {
        for (tid, range) in [(3, 0..100), (1, 0..99)] {
            let sequence = Builder::default()
                .start(1, NUMA, 0..100)
                .end(tid, NUMA, range)
                .done();
            assert_eq!(offender(balanced(&sequence)), Some(1));
        }
    }

    #[test]
    fn an_end_without_the_flag_is_seen() {
        let sequence = Builder::default()
            .start(1, NUMA, 0..9)
            .end(1, flag::BLOCKABLE, 0..9)
            .done();
        assert_eq!(offender(balanced(&sequence)), Some(1));
    }

    #[test]
    fn a_report_outside_its_pair_is_seen() {
        let pair = || Builder::default().start(1, NUMA, 0..8);
        let cases = [
            (Builder::default().report(1, 1, &[1..2]), 0),
            (pair().end(1, NUMA, 0..8).report(1, 1, &[1..2]), 2),
            (pair().report(2, 1, &[1..2]).end(1, NUMA, 0..8), 1),
            (pair().report(1, 1, &[1..2, 7..9]).end(1, NUMA, 0..8), 2),
            (
                Builder::default()
                    .start(1, flag::BLOCKABLE, 0..8)
                    .report(1, 1, &[1..2])
                    .end(1, flag::BLOCKABLE, 0..8),
                1,
            ),
            (
                pair()
                    .stretch(1, flag::FIRST, 2, 1..2)
                    .end(1, NUMA, 0..8)
                    .stretch(1, flag::LAST, 2, 3..4),
                3,
            ),
        ];
        for (builder, seq) in cases {
            assert_eq!(offender(reports_inside_pairs(&builder.done())), Some(seq));
        }
    }

    #[test]
    fn a_second_report_is_seen() {
        let sequence = Builder::default()
            .start(1, NUMA, 0..8)
            .report(1, 1, &[1..2])
            .report(1, 1, &[3..4])
            .end(1, NUMA, 0..8)
            .done();
        assert_eq!(offender(one_report_per_pair(&sequence)), Some(2));
    }

    #[test]
    fn half_a_report_is_seen() {
        for flags in [0, flag::FIRST, flag::LAST] {
            let sequence = Builder::default()
                .start(1, NUMA, 0..8)
                .stretch(1, flags, 1, 1..2)
                .end(1, NUMA, 0..8)
                .done();
            assert_eq!(offender(one_report_per_pair(&sequence)), Some(1));
        }
    }

    #[test]
    fn stretches_out_of_order_are_seen() {
        for (pages, stretches, seq) in [
            (2, vec![3..4, 1..2], 2),
            (2, vec![1..3, 2..4], 2),
            (2, vec![1..3, 4..4], 2),
            (0, vec![1..3], 1),
            (4, vec![1..3, 4..5], 1),
        ] {
            let sequence = Builder::default()
                .start(1, NUMA, 0..8)
                .report(1, pages, &stretches)
                .end(1, NUMA, 0..8)
                .done();
            assert_eq!(offender(stretches_ordered(&sequence)), Some(seq));
        }
    }

    #[test]
    fn stretches_that_disagree_or_split_pages_are_seen() {
        let mut records = sound().0;
        records[6].pages = 4;
        assert_eq!(
            offender(stretches_ordered(&Sequence::new(records))),
            Some(6)
        );
        let mut records = sound().0;
        records[5].start += 8;
        assert_eq!(
            offender(stretches_ordered(&Sequence::new(records))),
            Some(5)
        );
    }

    /// Any number of tasks, each with scans that report any disjoint stretches, mixed by `turns`.
    fn mixed(scans: &[Vec<u64>], turns: &[usize]) -> Builder {
        let mut queues: Vec<Vec<Record>> = scans
            .iter()
            .enumerate()
            .map(|(task, gaps)| {
                let (tid, mut at) = (task as u32, 0);
                let stretches: Vec<_> = gaps
                    .iter()
                    .map(|gap| {
                        let start = at + gap;
                        at = start + 1 + gap % 3;
                        start..at
                    })
                    .collect();
                let mut records = Builder::default().start(tid, NUMA, 0..at + 1);
                if !stretches.is_empty() {
                    records = records.report(tid, stretches.len() as u32, &stretches);
                }
                let mut records = records.end(tid, NUMA, 0..at + 1).0;
                records.reverse();
                records
            })
            .collect();
        let mut out = Vec::new();
        let mut turns = turns.iter().cycle();
        while queues.iter().any(|queue| !queue.is_empty()) {
            let from = turns.next().unwrap_or(&0) % queues.len();
            let from = (from..queues.len()).chain(0..from);
            let mut left = from.filter(|queue| !queues[*queue].is_empty());
            if let Some(queue) = left.next() {
                out.extend(queues[queue].pop());
            }
        }
        for (seq, record) in out.iter_mut().enumerate() {
            record.seq = seq as u64;
        }
        Builder(out)
    }

    proptest! {
        #[test]
        fn tasks_at_once_obey_every_rule(
            scans in prop::collection::vec(prop::collection::vec(0u64..20, 0..12), 1..5),
            turns in prop::collection::vec(0usize..5, 1..40),
        ) {
            let sequence = mixed(&scans, &turns).done();
            prop_assert_eq!(complete(&sequence), Ok(()));
            prop_assert_eq!(balanced(&sequence), Ok(()));
            prop_assert_eq!(reports_inside_pairs(&sequence), Ok(()));
            prop_assert_eq!(one_report_per_pair(&sequence), Ok(()));
            prop_assert_eq!(stretches_ordered(&sequence), Ok(()));
            let stretches: usize = scans.iter().map(Vec::len).sum();
            prop_assert_eq!(sequence.stretches().count(), stretches);
        }

        #[test]
        fn any_record_that_goes_missing_is_seen(
            scans in prop::collection::vec(prop::collection::vec(0u64..20, 1..12), 1..5),
            turns in prop::collection::vec(0usize..5, 1..40),
            which in any::<prop::sample::Index>(),
        ) {
            let mut records = mixed(&scans, &turns).0;
            let gone = which.index(records.len());
            let kind = records.remove(gone).kind;
            let edge = gone == 0 || gone == records.len();
            for (seq, record) in records.iter_mut().enumerate() {
                if edge {
                    record.seq = seq as u64;
                }
            }
            let sequence = Sequence::new(records);
            if !edge {
                prop_assert!(complete(&sequence).is_err());
            }
            if kind != kind::NUMA_PROTECT {
                prop_assert!(balanced(&sequence).is_err());
            }
        }

        #[test]
        fn memory_that_is_kept_is_found_as_by_looking_at_each_page(
            gaps in prop::collection::vec(0u64..6, 1..20),
            kept in prop::collection::btree_set(0u64..80, 0..20),
        ) {
            let sequence = mixed(&[gaps], &[0]).done();
            let ranges: Vec<_> = kept.iter().map(|page| page << 12..(page + 1) << 12).collect();
            let meets = sequence
                .stretches()
                .any(|one| kept.iter().any(|page| (one.start..one.end).contains(&(page << 12))));
            prop_assert_eq!(not_reported(&sequence, &ranges).is_err(), meets);
        }
    }
}
