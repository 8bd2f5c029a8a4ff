// SPDX-License-Identifier: GPL-2.0
//! What is asserted of a case that was run, by name; looks at figures and records only.

use std::collections::{HashMap, HashSet};

use guest::ktap::Outcome;
use trace::check;
use trace::client::Stats;
use trace::record::{kind, Record};
use trace::sequence::Sequence;

use crate::case::{Measured, Recording};
use crate::operation::Kind;

/// Whether a disturbance of this kind promises something while it lasts.
fn promise(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Protect
            | Kind::Fork
            | Kind::UserWriteProtect
            | Kind::UserReadWriteProtect
            | Kind::DirtyLog
            | Kind::Pin
    )
}

/// What must have been seen, too, for a disturbance of this kind to have been one.
fn evidence(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::Migrate => &["pages moved"],
        Kind::Unmap | Kind::Protect => &["runs refused"],
        Kind::PageOut => &["pswpout"],
        Kind::Huge => &["collapses", "thp_split_pmd"],
        Kind::Merge => &["merged again"],
        Kind::UserWriteProtect | Kind::UserReadWriteProtect => &["accesses stopped"],
        Kind::DirtyLog => &["pages logged"],
        Kind::Discard
        | Kind::Fork
        | Kind::Slot
        | Kind::Pin
        | Kind::Machine
        | Kind::SecondMachine => &[],
    }
}

/// The names of the tests of a case that does `kinds`, in order.
pub fn tests(kinds: &[Kind]) -> Vec<&'static str> {
    let mut tests = vec!["disturbed", "scanned", "memory_exact"];
    if kinds.iter().any(|kind| promise(*kind)) {
        tests.push("promises_kept");
    }
    tests.extend([
        "no_hint_left",
        "trace.balanced",
        "trace.reports",
        "trace.plain",
    ]);
    tests
}

/// Judges every test of a case.
pub fn judge(measured: &Measured) -> Vec<(&'static str, Outcome)> {
    let one = |test| {
        let judged = match test {
            "disturbed" => outcome(disturbed(measured)),
            "scanned" => outcome(scanned(measured)),
            "memory_exact" => outcome(measured.contents.clone()),
            "promises_kept" => outcome(match measured.broken.first() {
                None => Ok(()),
                Some(broken) => Err(broken.clone()),
            }),
            "no_hint_left" => outcome(match measured.hints_left {
                0 => Ok(()),
                left => Err(format!(
                    "{left} hints were left where KVM must have dropped its mapping"
                )),
            }),
            "trace.balanced" => recorded(measured, |recording| balanced(&recording.full)),
            "trace.reports" => recorded(measured, |recording| reports(&recording.full.0)),
            "trace.plain" => recorded(measured, plain),
            _ => Outcome::NotOk("no such test".into()),
        };
        (test, judged)
    };
    tests(&measured.kinds).into_iter().map(one).collect()
}

type Judgement = Result<(), String>;

fn outcome(judgement: Judgement) -> Outcome {
    match judgement {
        Ok(()) => Outcome::Ok,
        Err(why) => Outcome::NotOk(why),
    }
}

/// A test that needs the recorder.
fn recorded(measured: &Measured, judge: impl FnOnce(&Recording) -> Judgement) -> Outcome {
    match &measured.recording {
        Some(recording) => outcome(judge(recording)),
        None => Outcome::Skip("mmu_notifier_trace not loaded (CONFIG_RUST, insmod)".into()),
    }
}

fn disturbed(measured: &Measured) -> Judgement {
    // Where kinds are mixed, there are few operations of each, and one may be too late to have an effect.
    let alone = measured.kinds.len() == 1;
    for kind in &measured.kinds {
        let effects = if alone { evidence(*kind) } else { &[] };
        for what in [kind.name()].iter().chain(effects) {
            if measured.evidence.get(what).is_none_or(|times| *times == 0) {
                return Err(format!("{}: no {what}", kind.name()));
            }
        }
    }
    Ok(())
}

fn scanned(measured: &Measured) -> Judgement {
    for (what, count) in [
        ("scans", measured.scans),
        ("pages hinted", measured.hinted),
        ("passes", measured.passes),
    ] {
        if count == 0 {
            return Err(format!("no {what} while guest memory was disturbed"));
        }
    }
    Ok(())
}

fn balanced((sequence, stats): &(Sequence, Stats)) -> Judgement {
    if stats.overwritten + stats.lost > 0 {
        return Err(format!(
            "{} records overwritten, {} lost",
            stats.overwritten, stats.lost
        ));
    }
    if sequence.pairs.is_empty() {
        return Err("nothing was recorded".into());
    }
    let rules = [check::complete, check::balanced];
    obeyed(sequence, &rules)
}

fn reports(sequence: &Sequence) -> Judgement {
    if sequence.reports.is_empty() {
        return Err("no report, although pages were hinted".into());
    }
    let rules = [
        check::reports_inside_pairs,
        check::one_report_per_pair,
        check::stretches_ordered,
    ];
    obeyed(sequence, &rules)
}

/// A subscriber without `numa_protect` is told of nothing new, and of all else the same: each task's starts and ends.
fn plain(recording: &Recording) -> Judgement {
    balanced(&recording.plain)?;
    let (full, plain) = (&recording.full.0, &recording.plain.0);
    if let Some(report) = plain.stretches().next() {
        return Err(format!("a report to it: {}", report.line(12)));
    }
    let (full, plain) = (
        by_task(full, &recording.busy),
        by_task(plain, &recording.busy),
    );
    for (tid, expected) in &full {
        let told = plain.get(tid).map_or(&[][..], Vec::as_slice);
        if let Some(at) =
            (0..expected.len().max(told.len())).find(|at| told.get(*at) != expected.get(*at))
        {
            return Err(format!(
                "start or end {at} of task {tid}: {:x?} instead of {:x?}",
                told.get(at),
                expected.get(at)
            ));
        }
    }
    match plain.keys().find(|tid| !full.contains_key(tid)) {
        None => Ok(()),
        Some(tid) => Err(format!("task {tid} was seen by it alone")),
    }
}

/// Kind, event, flags, start and end.
type Call = (u8, u8, u16, u64, u64);

fn by_task(sequence: &Sequence, but: &HashSet<u32>) -> HashMap<u32, Vec<Call>> {
    let mut tasks: HashMap<u32, Vec<Call>> = HashMap::new();
    let is_edge = |one: &&Record| {
        [kind::INVALIDATE_RANGE_START, kind::INVALIDATE_RANGE_END].contains(&one.kind)
            && !but.contains(&one.tid)
    };
    for one in sequence.records.iter().filter(is_edge) {
        let call = (one.kind, one.event, one.flags, one.start, one.end);
        tasks.entry(one.tid).or_default().push(call);
    }
    tasks
}

fn obeyed(sequence: &Sequence, rules: &[fn(&Sequence) -> check::Verdict]) -> Judgement {
    let broken = rules.iter().find_map(|rule| rule(sequence).err());
    broken.map_or(Ok(()), |violation| Err(violation.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use trace::record::{event, flag};

    fn sound(kinds: &[Kind]) -> Measured {
        let record = |(seq, kind, flags, pages)| Record {
            seq,
            kind,
            event: event::PROTECTION_VMA,
            flags: flags | flag::NUMA,
            pages,
            end: 1 << 12,
            ..Record::default()
        };
        let records = [
            (0, kind::INVALIDATE_RANGE_START, 0, 0),
            (1, kind::NUMA_PROTECT, flag::FIRST | flag::LAST, 1),
            (2, kind::INVALIDATE_RANGE_END, 0, 0),
        ];
        let names = kinds.iter().map(|kind| kind.name());
        let evidence = kinds.iter().flat_map(|kind| evidence(*kind)).copied();
        Measured {
            kinds: kinds.to_vec(),
            scans: 1,
            hinted: 1,
            passes: 1,
            evidence: names.chain(evidence).map(|what| (what, 1)).collect(),
            broken: Vec::new(),
            hints_left: 0,
            contents: Ok(()),
            recording: Some(Recording {
                full: (
                    Sequence::new(records.map(record).to_vec()),
                    Stats::default(),
                ),
                plain: (
                    Sequence::new(vec![
                        record(records[0]),
                        record((1, kind::INVALIDATE_RANGE_END, 0, 0)),
                    ]),
                    Stats::default(),
                ),
                busy: HashSet::new(),
            }),
        }
    }

    fn failing(measured: &Measured) -> Vec<&'static str> {
        let judged = judge(measured).into_iter();
        let failed = judged.filter(|(_, outcome)| *outcome != Outcome::Ok);
        failed.map(|(test, _)| test).collect()
    }

    /// What fails once `spoil` has changed a sound measurement.
    fn spoilt(spoil: impl FnOnce(&mut Measured)) -> Vec<&'static str> {
        let mut measured = sound(&[Kind::Protect, Kind::PageOut]);
        spoil(&mut measured);
        failing(&measured)
    }

    fn respell(sequence: &mut Sequence, change: impl FnOnce(&mut Vec<Record>)) {
        let mut records = std::mem::take(&mut sequence.records);
        change(&mut records);
        *sequence = Sequence::new(records);
    }

    #[test]
    fn each_test_fails_when_what_it_guards_is_broken() {
        assert!(spoilt(|_| {}).is_empty());
        for what in ["mprotect", "pageout"] {
            assert_eq!(
                spoilt(|measured| measured.evidence.extend([(what, 0)])),
                ["disturbed"]
            );
        }
        for what in ["pageout", "pswpout"] {
            let mut alone = sound(&[Kind::PageOut]);
            alone.evidence.extend([(what, 0)]);
            assert_eq!(failing(&alone), ["disturbed"]);
        }
        assert_eq!(spoilt(|measured| measured.scans = 0), ["scanned"]);
        assert_eq!(spoilt(|measured| measured.hinted = 0), ["scanned"]);
        assert_eq!(spoilt(|measured| measured.passes = 0), ["scanned"]);
        assert_eq!(
            spoilt(|measured| measured.contents = Err("a word".into())),
            ["memory_exact"]
        );
        assert_eq!(
            spoilt(|measured| measured.broken.push("a word".into())),
            ["promises_kept"]
        );
        assert_eq!(spoilt(|measured| measured.hints_left = 1), ["no_hint_left"]);
    }

    #[test]
    fn each_test_of_the_trace_fails_when_the_trace_is_broken() {
        let spoilt = |change: fn(&mut Vec<Record>)| {
            spoilt(|measured| {
                if let Some(recording) = &mut measured.recording {
                    respell(&mut recording.full.0, change);
                }
            })
        };
        assert_eq!(
            spoilt(|records| records.truncate(2)),
            ["trace.balanced", "trace.plain"]
        );
        assert_eq!(
            spoilt(|records| records[1] = Record::overwritten(1, 0)),
            ["trace.balanced", "trace.reports"]
        );
        assert_eq!(
            spoilt(|records| records[1].flags &= !flag::LAST),
            ["trace.reports"]
        );
        assert_eq!(
            spoilt(|records| records[1].end = 2 << 12),
            ["trace.reports"]
        );
        assert_eq!(spoilt(|records| records[1].pages = 2), ["trace.reports"]);
    }

    #[test]
    fn a_plain_subscriber_that_is_told_otherwise_is_seen() {
        let spoilt = |change: fn(&mut Vec<Record>)| {
            spoilt(|measured| {
                if let Some(recording) = &mut measured.recording {
                    respell(&mut recording.plain.0, change);
                }
            })
        };
        let changes: [fn(&mut Vec<Record>); 5] = [
            |records| records.truncate(1),
            |records| records.iter_mut().for_each(|one| one.flags = 0),
            |records| records.iter_mut().for_each(|one| one.tid += 1),
            |records| records.iter_mut().for_each(|one| one.end += 1),
            |records| {
                let report = Record {
                    kind: kind::NUMA_PROTECT,
                    ..records[0]
                };
                records.insert(1, report);
                (0..).zip(records).for_each(|(seq, one)| one.seq = seq);
            },
        ];
        for change in changes {
            assert_eq!(spoilt(change), ["trace.plain"]);
        }
    }

    #[test]
    fn what_cannot_be_seen_is_skipped() {
        let mut measured = sound(&[Kind::Migrate]);
        let skipped = |measured: &Measured| {
            let judged = judge(measured).into_iter();
            judged
                .filter(|(_, outcome)| matches!(outcome, Outcome::Skip(_)))
                .map(|(test, _)| test)
                .collect::<Vec<_>>()
        };
        assert!(skipped(&measured).is_empty());
        measured.recording = None;
        assert_eq!(
            skipped(&measured),
            ["trace.balanced", "trace.reports", "trace.plain"]
        );
    }
}
