// SPDX-License-Identifier: GPL-2.0
//! Groups recorded callbacks: starts with their ends, stretches into reports, reports into pairs. Pure.

use std::collections::{HashMap, HashSet};

use crate::record::{flag, kind, Record, SIZE};

/// A start, and its end if one came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The start.
    pub start: Record,
    /// The end: the next one of the same task and range that no later start takes.
    pub end: Option<Record>,
}

impl Pair {
    /// Whether the pair is of a NUMA scan.
    pub fn is_numa(&self) -> bool {
        self.start.flags & flag::NUMA != 0
    }
}

/// One call of `numa_protect()`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Its stretches, in the order in which they were reported; at least one.
    pub stretches: Vec<Record>,
    /// Whether the first stretch says that it is the first, the last that it is the last, and none between either.
    pub whole: bool,
    /// Index of the innermost pair of the same task that was open when the report began.
    pub pair: Option<usize>,
}

impl Report {
    /// The pages that the report says were hinted.
    pub fn pages(&self) -> u64 {
        u64::from(self.stretches[0].pages)
    }
}

/// What puts records of all CPUs in order: the time; on one CPU, the sequence number.
pub fn in_order(record: &Record) -> (u64, u32, u64) {
    (record.time_ns, record.cpu, record.seq)
}

/// Records in the order of time, grouped.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    /// All of them, with new sequence numbers: their places here.
    pub records: Vec<Record>,
    /// Of these, those whose predecessor on their CPU is missing.
    pub gaps: Vec<Record>,
    /// In the order of their starts.
    pub pairs: Vec<Pair>,
    /// Ends that no start belongs to.
    pub lone_ends: Vec<Record>,
    /// In the order of their first stretches.
    pub reports: Vec<Report>,
}

impl Sequence {
    /// Groups records as the recorder's files hold them. `None` where the last one is cut off.
    pub fn from_bytes(bytes: &[u8]) -> Option<Sequence> {
        let records = bytes
            .chunks(SIZE)
            .map(|one| Some(Record::from_bytes(one.try_into().ok()?)));
        Some(Sequence::new(records.collect::<Option<_>>()?))
    }

    /// Groups `records`, in any order.
    pub fn new(mut records: Vec<Record>) -> Sequence {
        let mut sequence = Sequence::default();
        // A writer may have been interrupted between taking the time and storing the record: on a CPU, what is missing shows
        // in the order of sequence numbers only.
        records.sort_by_key(|record| (record.cpu, record.seq));
        let follows =
            |pair: &[Record]| pair[0].cpu != pair[1].cpu || pair[0].seq + 1 == pair[1].seq;
        let gaps: HashSet<(u32, u64)> = records
            .windows(2)
            .filter(|pair| !follows(pair))
            .map(|pair| (pair[1].cpu, pair[1].seq))
            .collect();
        records.sort_by_key(in_order);
        for (place, record) in (0..).zip(&mut records) {
            let is_gap = gaps.contains(&(record.cpu, record.seq));
            record.seq = place;
            if is_gap {
                sequence.gaps.push(*record);
            }
        }
        // Of each task: its open pairs, and whether the report begun last has not seen its last stretch yet.
        let mut open: HashMap<u32, Vec<usize>> = HashMap::new();
        let mut unfinished: HashMap<u32, usize> = HashMap::new();
        for record in &records {
            let open = open.entry(record.tid).or_default();
            match record.kind {
                kind::INVALIDATE_RANGE_START => {
                    open.push(sequence.pairs.len());
                    sequence.pairs.push(Pair {
                        start: *record,
                        end: None,
                    });
                }
                kind::INVALIDATE_RANGE_END => {
                    let place = open.iter().rposition(|pair| {
                        let start = &sequence.pairs[*pair].start;
                        (start.start, start.end) == (record.start, record.end)
                    });
                    match place {
                        Some(place) => sequence.pairs[open.remove(place)].end = Some(*record),
                        None => sequence.lone_ends.push(*record),
                    }
                }
                kind::NUMA_PROTECT => {
                    let first = record.flags & flag::FIRST != 0;
                    let last = record.flags & flag::LAST != 0;
                    let report = match unfinished.remove(&record.tid) {
                        Some(report) if !first => {
                            sequence.reports[report].stretches.push(*record);
                            report
                        }
                        _ => {
                            sequence.reports.push(Report {
                                stretches: vec![*record],
                                whole: false,
                                pair: open.last().copied(),
                            });
                            sequence.reports.len() - 1
                        }
                    };
                    if last {
                        let report = &mut sequence.reports[report];
                        report.whole = report.stretches[0].flags & flag::FIRST != 0;
                    } else {
                        unfinished.insert(record.tid, report);
                    }
                }
                _ => {}
            }
        }
        sequence.records = records;
        sequence
    }

    /// The pairs of NUMA scans.
    pub fn numa_pairs(&self) -> impl Iterator<Item = &Pair> {
        self.pairs.iter().filter(|pair| pair.is_numa())
    }

    /// The stretches of all reports.
    pub fn stretches(&self) -> impl Iterator<Item = &Record> {
        self.reports.iter().flat_map(|report| &report.stretches)
    }
}
