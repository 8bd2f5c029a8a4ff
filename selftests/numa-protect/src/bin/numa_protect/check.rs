// SPDX-License-Identifier: GPL-2.0
//! What is asserted of a measured case, by name; looks at figures and records only.
//!
//! A rule about reports also fails where there is no report though pages were hinted: what nothing tried is not held.

use guest::ktap::Outcome;
use guest::memory::Pinned;
use trace::check::{self, Verdict};
use trace::record::{event, flag, Record};
use trace::sequence::{Pair, Sequence};

use crate::case::{Case, Layout, Measured, Step};

/// The names of the tests of `case`, in order.
pub fn tests(case: Case) -> Vec<&'static str> {
    let mut tests = vec!["trace.balanced", "trace.scans_flagged"];
    if case.pinned != Pinned::All {
        tests.extend([
            "trace.report_inside_pair",
            "trace.one_report_per_pair",
            "trace.stretches_ordered",
        ]);
    }
    tests.push("trace.reported_equals_hinted");
    if case.pinned != Pinned::None {
        tests.push("trace.pinned_not_reported");
    }
    if case.layout == Layout::KsmAlternating {
        tests.push("trace.ksm_not_reported");
    }
    tests.push("kvm.tracepoint_once_per_report");
    if case.pinned != Pinned::All {
        tests.push("kvm.flushes_bounded");
    }
    match case.pinned {
        Pinned::All => tests.push("kvm.pinned_not_dropped"),
        Pinned::None | Pinned::Half | Pinned::Stripes => tests.extend([
            "kvm.dropped_equals_hinted",
            "kvm.faults_equal_dropped",
            "vm.hints_taken",
            "vm.no_hint_left",
            "vm.migrates",
        ]),
    }
    tests.push("vm.unpinned_hinted");
    if case.pinned != Pinned::None {
        tests.push("vm.pinned_stays");
    }
    tests.push("guest.memory_exact");
    tests
}

/// Judges every test of `case`.
pub fn judge(case: Case, measured: &Measured) -> Vec<(&'static str, Outcome)> {
    let one = |test| {
        let judged = match test {
            "trace.balanced" => recorded(measured, |_| balanced(measured)),
            "trace.scans_flagged" => {
                recorded(measured, |sequence| scans_flagged(measured, sequence))
            }
            "trace.report_inside_pair" => reports(measured, check::reports_inside_pairs),
            "trace.one_report_per_pair" => reports(measured, check::one_report_per_pair),
            "trace.stretches_ordered" => reports(measured, check::stretches_ordered),
            "trace.reported_equals_hinted" => recorded(measured, |_| reported(measured)),
            "trace.pinned_not_reported" | "trace.ksm_not_reported" => {
                recorded(measured, |sequence| {
                    verdict(check::not_reported(sequence, &measured.kept))
                })
            }
            "kvm.tracepoint_once_per_report" => tracepoint_once_per_report(measured),
            "kvm.flushes_bounded" => flushes_bounded(measured),
            "kvm.pinned_not_dropped" => outcome(pinned_not_dropped(measured)),
            "kvm.dropped_equals_hinted" => outcome(dropped_equals_hinted(measured)),
            "kvm.faults_equal_dropped" => outcome(faults_equal_dropped(measured)),
            "vm.hints_taken" => outcome(hints_taken(case, measured)),
            "vm.no_hint_left" => no_hint_left(measured),
            "vm.migrates" => outcome(migrates(measured)),
            "vm.unpinned_hinted" => outcome(unpinned_hinted(measured)),
            "vm.pinned_stays" => outcome(pinned_stays(measured)),
            "guest.memory_exact" => outcome(measured.contents.clone()),
            _ => Outcome::NotOk("no such test".into()),
        };
        (test, judged)
    };
    tests(case).into_iter().map(one).collect()
}

type Judgement = Result<(), String>;

/// What one page table maps.
const PAGES_PER_TABLE: u64 = 512;

fn outcome(judgement: Judgement) -> Outcome {
    match judgement {
        Ok(()) => Outcome::Ok,
        Err(why) => Outcome::NotOk(why),
    }
}

fn verdict(verdict: Verdict) -> Judgement {
    verdict.map_err(|violation| violation.to_string())
}

/// A test that needs the recorder.
fn recorded(measured: &Measured, judge: impl FnOnce(&Sequence) -> Judgement) -> Outcome {
    match &measured.recording {
        Some((sequence, _)) => outcome(judge(sequence)),
        None => Outcome::Skip(
            "nothing recorded: mmu_notifier_trace not loaded (CONFIG_RUST, insmod), or --profile"
                .into(),
        ),
    }
}

/// A test that needs the recorder and reports.
fn reports(measured: &Measured, rule: impl FnOnce(&Sequence) -> Verdict) -> Outcome {
    recorded(measured, |sequence| {
        some_report(measured, sequence)?;
        verdict(rule(sequence))
    })
}

fn some_report(measured: &Measured, sequence: &Sequence) -> Judgement {
    if sequence.reports.is_empty() {
        let hinted = measured.figures.hinted + measured.figures.free_run.hinted;
        return Err(format!("no report, although {hinted} pages were hinted"));
    }
    Ok(())
}

/// Asks the same of each step.
fn each_step(measured: &Measured, ask: impl Fn(&Step) -> Judgement) -> Judgement {
    for (number, step) in (1..).zip(&measured.figures.each_step) {
        ask(step).map_err(|why| format!("step {number}: {why}"))?;
    }
    Ok(())
}

fn equal(left: (&str, u64), right: (&str, u64)) -> Judgement {
    if left.1 == right.1 {
        return Ok(());
    }
    Err(format!(
        "{} {}, but {} {}",
        left.1, left.0, right.1, right.0
    ))
}

fn balanced(measured: &Measured) -> Judgement {
    let Some((sequence, stats)) = &measured.recording else {
        return Ok(());
    };
    equal(("records overwritten", stats.overwritten), ("expected", 0))?;
    equal(("records lost", stats.lost), ("expected", 0))?;
    verdict(check::complete(sequence))?;
    verdict(check::balanced(sequence))?;
    if sequence.pairs.is_empty() {
        return Err("nothing was recorded".into());
    }
    Ok(())
}

/// In the stepped part the pairs of scans carry the flag, in each step, and no other pair does.
fn scans_flagged(measured: &Measured, sequence: &Sequence) -> Judgement {
    let guest = &measured.guest;
    let is_scan = |step: &Step, start: &Record| {
        start.event == event::PROTECTION_VMA
            && (step.first_record..step.end_record).contains(&start.seq)
            && (guest.start <= start.start && start.end <= guest.end)
    };
    let steps = &measured.figures.each_step;
    let stepped = |pair: &&Pair| pair.start.seq < measured.figures.free_run.first_record;
    for Pair { start, .. } in sequence.pairs.iter().filter(stepped) {
        let scan = steps.iter().any(|step| is_scan(step, start));
        if scan != (start.flags & flag::NUMA != 0) {
            let without = if scan { "without" } else { "with" };
            return Err(format!(
                "record {}: a start {without} the flag of NUMA scans: {}",
                start.seq,
                start.line(12)
            ));
        }
    }
    each_step(measured, |step| {
        let scanned = sequence.pairs.iter().any(|pair| is_scan(step, &pair.start));
        scanned.then_some(()).ok_or("no scan was recorded".into())
    })
}

fn reported(measured: &Measured) -> Judgement {
    let names = ("pages reported", "hinted");
    each_step(measured, |step| {
        equal((names.0, step.reported), (names.1, step.hinted))
    })?;
    let free_run = &measured.figures.free_run;
    equal((names.0, free_run.reported), (names.1, free_run.hinted))
        .map_err(|why| format!("running freely: {why}"))
}

fn pinned_not_dropped(measured: &Measured) -> Judgement {
    each_step(measured, |step| {
        equal(("pages dropped", step.dropped), ("expected", 0))?;
        equal(("faults", step.faults), ("expected", 0))
    })?;
    equal(
        ("faults running freely", measured.figures.free_run.faults),
        ("expected", 0),
    )
}

fn dropped_equals_hinted(measured: &Measured) -> Judgement {
    each_step(measured, |step| {
        equal(("pages dropped", step.dropped), ("hinted", step.hinted))
    })
}

fn faults_equal_dropped(measured: &Measured) -> Judgement {
    each_step(measured, |step| {
        let (faults, mapped) = (step.faults, step.mapped_again);
        if measured.one_page_per_fault || faults > mapped || faults * 8 < mapped {
            equal(("faults", faults), ("mappings put back", mapped))?;
        }
        if step.whole_pass && step.still_missing != 0 {
            return Err(format!(
                "{} mappings missing after a pass over all pages",
                step.still_missing
            ));
        }
        Ok(())
    })
}

/// Each hint that the pass meets is taken as a fault, once.
fn hints_taken(case: Case, measured: &Measured) -> Judgement {
    let unit = case.backing.unit() as u64;
    let mut left = 0;
    each_step(measured, |step| {
        if step.hinted == 0 && step.expected > 0 {
            return Err("nothing was hinted".into());
        }
        Ok(())
    })?;
    for (number, step) in (1..).zip(&measured.figures.each_step) {
        left += step.hinted / unit;
        if step.hint_faults > left || (step.whole_pass && step.hint_faults != left) {
            return Err(format!(
                "step {number}: {} hint faults for {left} hints",
                step.hint_faults
            ));
        }
        left -= step.hint_faults;
    }
    Ok(())
}

/// A pass over all pages leaves no hint: where one is left, KVM has kept a mapping that it was told to drop, or put one
/// back from a lookup that began before the hint.
fn no_hint_left(measured: &Measured) -> Outcome {
    if !measured.own_counts {
        return Outcome::Skip("the counts are the whole machine's (cgroup2, CONFIG_MEMCG)".into());
    }
    let none = |left| equal(("hints left", left), ("expected", 0));
    let judgement =
        each_step(measured, |step| step.hints_left.map_or(Ok(()), none)).and_then(|()| {
            none(measured.figures.free_run.hints_left)
                .map_err(|why| format!("running freely: {why}"))
        });
    outcome(judgement)
}

/// The tracepoint that operators watch fires once for a scan that hinted guest memory, and not for another.
fn tracepoint_once_per_report(measured: &Measured) -> Outcome {
    let steps = &measured.figures.each_step;
    if steps.iter().any(|step| step.unmap_events.is_none()) {
        return Outcome::Skip("no kvm_unmap_hva_range in tracefs: CONFIG_FTRACE, tracefs".into());
    }
    recorded(measured, |_| {
        each_step(measured, |step| {
            equal(
                ("kvm_unmap_hva_range events", step.unmap_events.unwrap_or(0)),
                ("reports", step.reports),
            )
        })
    })
}

/// A report makes one flush, and at the worst, where it has to yield all the time, one for each 2 MiB: never one for each
/// entry.
fn flushes_bounded(measured: &Measured) -> Outcome {
    let tables = measured.figures.guest_pages.div_ceil(PAGES_PER_TABLE);
    recorded(measured, |sequence| {
        some_report(measured, sequence)?;
        each_step(measured, |step| {
            let (requests, most) = (step.flush_requests_scan, step.reports * tables);
            if requests > most {
                let reports = step.reports;
                return Err(format!(
                    "{requests} flush requests, but {most} are the most for {reports} reports"
                ));
            }
            Ok(())
        })
    })
}

/// Memory follows the vCPUs, in a quiet guest and again in a busy one.
fn migrates(measured: &Measured) -> Judgement {
    let figures = &measured.figures;
    for (when, migrated) in [
        ("in the steps", figures.migrated),
        ("running freely", figures.free_run.migrated),
    ] {
        if migrated == 0 && !(measured.tiers && when == "in the steps") {
            return Err(format!("no page migrated {when}"));
        }
    }
    let free = figures.guest_pages - figures.pinned_pages - figures.merged_pages;
    if measured.free_left * 2 > free {
        let left = measured.free_left;
        return Err(format!("{left} of {free} pages left behind in the end"));
    }
    Ok(())
}

fn unpinned_hinted(measured: &Measured) -> Judgement {
    each_step(measured, |step| {
        equal(
            ("pages hinted", step.hinted),
            ("unpinned and touched", step.expected),
        )
    })
}

fn pinned_stays(measured: &Measured) -> Judgement {
    equal(("pinned pages moved", measured.kept_moved), ("expected", 0))
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // A list of one range is meant.
mod tests {
    use super::*;
    use crate::case::{Figures, FreeRun};
    use guest::memory::Backing;
    use trace::client::Stats;
    use trace::record::kind;

    const GUEST: u64 = 8;

    fn case(pinned: Pinned) -> Case {
        Case {
            backing: Backing::Anon,
            pinned,
            layout: Layout::Whole,
        }
    }

    /// Eight pages, of which the pinned ones are the last; one step of one scan, and a free run of another.
    fn sound(pinned: Pinned) -> Measured {
        let pinned_pages = match pinned {
            Pinned::None => 0,
            Pinned::Half | Pinned::Stripes => GUEST / 2,
            Pinned::All => GUEST,
        };
        let hinted = GUEST - pinned_pages;
        let mut records = Vec::new();
        for _ in 0..2 {
            for (kind, flags, pages, end) in [
                (kind::INVALIDATE_RANGE_START, 0, 0, GUEST),
                (kind::NUMA_PROTECT, flag::FIRST | flag::LAST, hinted, hinted),
                (kind::INVALIDATE_RANGE_END, 0, 0, GUEST),
            ] {
                if kind == kind::NUMA_PROTECT && hinted == 0 {
                    continue;
                }
                records.push(Record {
                    seq: records.len() as u64,
                    kind,
                    event: event::PROTECTION_VMA,
                    flags: flags | flag::NUMA,
                    pages: pages as u32,
                    end: end << 12,
                    ..Record::default()
                });
            }
        }
        let step = Step {
            expected: hinted,
            hinted,
            dropped: hinted,
            dropped_mappings: hinted,
            reported: hinted,
            reports: u64::from(hinted > 0),
            unmap_events: Some(u64::from(hinted > 0)),
            hints_left: Some(0),
            faults: hinted,
            mapped_again: hinted,
            whole_pass: true,
            hint_faults: hinted,
            migrated: hinted,
            scans: 1,
            end_record: if hinted > 0 { 3 } else { 2 },
            ..Step::default()
        };
        Measured {
            figures: Figures {
                name: String::new(),
                backing: Backing::Anon,
                pinned,
                layout: Layout::Whole,
                guest_pages: GUEST,
                pinned_pages,
                merged_pages: 0,
                steps: 1,
                scans: 1,
                hinted,
                hint_faults: hinted,
                migrated: hinted,
                dropped: hinted,
                dropped_mappings: hinted,
                faults: hinted,
                flush_requests: 1,
                flushes: 1,
                profile: None,
                recorded: None,
                each_step: vec![step],
                free_run: FreeRun {
                    hinted,
                    reported: hinted,
                    migrated: hinted,
                    faults: hinted,
                    first_record: step.end_record,
                    ..FreeRun::default()
                },
                pages_on_node: [hinted, pinned_pages],
                elapsed_s: 1.0,
            },
            recording: Some((Sequence::new(records), Stats::default())),
            guest: 0..GUEST << 12,
            tiers: false,
            one_page_per_fault: true,
            own_counts: true,
            kept: vec![hinted << 12..GUEST << 12],
            contents: Ok(()),
            kept_moved: 0,
            free_left: 0,
        }
    }

    /// The tests that do not pass.
    fn failing(pinned: Pinned, measured: &Measured) -> Vec<&'static str> {
        judge(case(pinned), measured)
            .into_iter()
            .filter(|(_, outcome)| *outcome != Outcome::Ok)
            .map(|(test, _)| test)
            .collect()
    }

    /// What fails once `spoil` has changed a sound measurement.
    fn spoilt(pinned: Pinned, spoil: impl FnOnce(&mut Measured)) -> Vec<&'static str> {
        let mut measured = sound(pinned);
        spoil(&mut measured);
        failing(pinned, &measured)
    }

    fn respell(measured: &mut Measured, change: impl FnOnce(&mut Vec<Record>)) {
        if let Some((sequence, _)) = &mut measured.recording {
            let mut records = std::mem::take(&mut sequence.records);
            change(&mut records);
            *sequence = Sequence::new(records);
        }
    }

    #[test]
    fn sound_measurements_pass() {
        for pinned in [Pinned::None, Pinned::Half, Pinned::All] {
            assert!(failing(pinned, &sound(pinned)).is_empty(), "{pinned:?}");
        }
    }

    #[test]
    fn without_a_recorder_its_tests_are_skipped() {
        let mut measured = sound(Pinned::Half);
        measured.recording = None;
        for (test, outcome) in judge(case(Pinned::Half), &measured) {
            let skipped = matches!(outcome, Outcome::Skip(_));
            let needed = test.starts_with("trace.")
                || ["kvm.tracepoint_once_per_report", "kvm.flushes_bounded"].contains(&test);
            assert_eq!(skipped, needed, "{test}");
        }
    }

    #[test]
    fn without_counts_of_its_own_a_test_is_skipped() {
        let spoil = |measured: &mut Measured| {
            measured.own_counts = false;
            measured.figures.free_run.hints_left = 7;
        };
        assert_eq!(spoilt(Pinned::None, spoil), ["vm.no_hint_left"]);
    }

    #[test]
    fn without_nested_paging_a_fault_maps_up_to_eight_pages() {
        for (faults, fails) in [(5, 1), (4, 0), (1, 0), (0, 1)] {
            let failing = spoilt(Pinned::Half, |measured| {
                measured.one_page_per_fault = false;
                measured.figures.each_step[0].faults = faults;
            });
            assert_eq!(failing.len(), fails, "{faults}");
        }
    }

    #[test]
    fn each_test_fails_when_what_it_guards_is_broken() {
        let step = |change: fn(&mut Step)| {
            move |measured: &mut Measured| change(&mut measured.figures.each_step[0])
        };
        let half = Pinned::Half;
        assert_eq!(
            spoilt(half, step(|step| step.dropped += 4)),
            ["kvm.dropped_equals_hinted"]
        );
        assert_eq!(
            spoilt(half, step(|step| step.faults += 1)),
            ["kvm.faults_equal_dropped"]
        );
        assert_eq!(
            spoilt(half, step(|step| step.still_missing = 1)),
            ["kvm.faults_equal_dropped"]
        );
        assert_eq!(
            spoilt(half, step(|step| step.hint_faults -= 1)),
            ["vm.hints_taken"]
        );
        assert_eq!(
            spoilt(half, step(|step| step.expected += 1)),
            ["vm.unpinned_hinted"]
        );
        assert_eq!(
            spoilt(half, step(|step| step.reported -= 1)),
            ["trace.reported_equals_hinted"]
        );
        assert_eq!(
            spoilt(half, |measured| measured.figures.free_run.reported -= 1),
            ["trace.reported_equals_hinted"]
        );
        assert_eq!(
            spoilt(half, step(|step| step.hints_left = Some(1))),
            ["vm.no_hint_left"]
        );
        assert_eq!(
            spoilt(half, |measured| measured.figures.free_run.hints_left = 1),
            ["vm.no_hint_left"]
        );
        assert_eq!(
            spoilt(half, step(|step| step.flush_requests_scan = 2)),
            ["kvm.flushes_bounded"]
        );
        for fired in [Some(0), Some(2), None] {
            assert_eq!(
                spoilt(half, |measured| measured.figures.each_step[0]
                    .unmap_events = fired),
                ["kvm.tracepoint_once_per_report"]
            );
        }
        assert_eq!(
            spoilt(Pinned::All, step(|step| step.unmap_events = Some(1))),
            ["kvm.tracepoint_once_per_report"]
        );
        assert_eq!(
            spoilt(half, |measured| measured.figures.free_run.migrated = 0),
            ["vm.migrates"]
        );
        assert_eq!(
            spoilt(half, |measured| measured.free_left = 3),
            ["vm.migrates"]
        );
        assert_eq!(
            spoilt(half, |measured| measured.kept_moved = 1),
            ["vm.pinned_stays"]
        );
        assert_eq!(
            spoilt(half, |measured| measured.contents = Err("a word".into())),
            ["guest.memory_exact"]
        );
        for change in [
            |step: &mut Step| step.dropped = 8,
            |step: &mut Step| step.faults = 8,
        ] {
            assert_eq!(
                spoilt(Pinned::All, step(change)),
                ["kvm.pinned_not_dropped"]
            );
        }
        assert_eq!(
            spoilt(Pinned::All, |measured| measured.figures.free_run.faults = 1),
            ["kvm.pinned_not_dropped"]
        );
    }

    #[test]
    fn a_merged_page_in_a_report_is_seen() {
        let case = Case {
            layout: Layout::KsmAlternating,
            ..case(Pinned::None)
        };
        let mut measured = sound(Pinned::None);
        let failing = |measured: &Measured| -> Vec<_> {
            let judged = judge(case, measured).into_iter();
            judged
                .filter(|(_, outcome)| *outcome != Outcome::Ok)
                .map(|(test, _)| test)
                .collect()
        };
        assert!(failing(&measured).is_empty());
        measured.kept = vec![3 << 12..4 << 12];
        assert_eq!(failing(&measured), ["trace.ksm_not_reported"]);
    }

    #[test]
    fn each_test_of_the_trace_fails_when_the_trace_is_broken() {
        let spoilt = |change: fn(&mut Vec<Record>)| {
            spoilt(Pinned::Half, |measured| respell(measured, change))
        };
        assert_eq!(
            spoilt(|records| records.retain(|one| one.kind != kind::INVALIDATE_RANGE_END)),
            ["trace.balanced"]
        );
        assert_eq!(
            spoilt(|records| (records[1].seq, records[2].seq) = (2, 1)),
            ["trace.report_inside_pair"]
        );
        assert_eq!(
            spoilt(|records| records[1].end = 6 << 12),
            ["trace.pinned_not_reported"]
        );
        assert_eq!(
            spoilt(|records| records[1].end = 1 << 12),
            ["trace.stretches_ordered"]
        );
        assert_eq!(
            spoilt(|records| records[1].flags &= !flag::LAST),
            ["trace.one_report_per_pair"]
        );
        assert_eq!(
            spoilt(|records| {
                records.retain(|one| one.kind != kind::NUMA_PROTECT);
                (0..).zip(records).for_each(|(seq, one)| one.seq = seq);
            }),
            [
                "trace.report_inside_pair",
                "trace.one_report_per_pair",
                "trace.stretches_ordered",
                "kvm.flushes_bounded"
            ]
        );
    }
}
