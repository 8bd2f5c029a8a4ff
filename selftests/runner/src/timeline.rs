// SPDX-License-Identifier: GPL-2.0
//! One scan of a running guest's memory, from what the recorder and KVM's tracepoints say, and its drawing. Reads the two
//! files it is given; touches nothing else.

use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;
use serde::{Deserialize, Serialize};
use trace::record::{event, Record};
use trace::sequence::Sequence;

/// How long before the scan's start it begins, and after it, in milliseconds.
const BEFORE: f64 = 5.0;
const AFTER: f64 = 115.0;
/// Bytes of a page.
const PAGE: u64 = 4096;

/// Something that happened at one time to some pages: milliseconds, and the first page and the one after the last, counted
/// from the start of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Happened {
    /// When.
    pub ms: f64,
    /// How long, in milliseconds.
    pub lasted: f64,
    /// The pages.
    pub pages: [u64; 2],
}

/// What happened around one scan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timeline {
    /// Pages of guest memory.
    pub pages: u64,
    /// From start to end of notifications of a change of protection.
    pub pairs: Vec<Happened>,
    /// Stretches that were reported.
    pub reports: Vec<Happened>,
    /// What KVM was asked to unmap.
    pub drops: Vec<Happened>,
    /// Faults of vCPUs.
    pub faults: Vec<Happened>,
}

impl Timeline {
    /// Of the scan that met most of guest memory while events were collected.
    pub fn read(records: &Path, events: &Path) -> Result<Timeline> {
        let bytes = fs::read(records).with_context(|| records.display().to_string())?;
        let sequence = Sequence::from_bytes(&bytes)
            .with_context(|| format!("{}: cut off", records.display()))?;
        let text = fs::read_to_string(events).with_context(|| events.display().to_string())?;
        Timeline::new(&sequence, &text).with_context(|| events.display().to_string())
    }

    fn new(sequence: &Sequence, events: &str) -> Result<Timeline> {
        let guest = events
            .lines()
            .find_map(|line| line.strip_prefix("# guest memory: "))
            .and_then(range)
            .context("does not say where guest memory is")?;
        let lines: Vec<Line> = events.lines().filter_map(Line::parse).collect();
        let (first, last) = match (lines.first(), lines.last()) {
            (Some(first), Some(last)) => (first.ns, last.ns),
            _ => (0, 0),
        };
        let common = |start: u64, end: u64| start.max(guest.start)..end.min(guest.end);
        let is_scan = |record: &Record| {
            record.event == event::PROTECTION_VMA && !common(record.start, record.end).is_empty()
        };
        let begun = sequence
            .pairs
            .iter()
            .filter(|pair| is_scan(&pair.start) && (first..last).contains(&pair.start.time_ns))
            .max_by_key(|pair| {
                let met = common(pair.start.start, pair.start.end);
                // the first of equals
                (met.end - met.start, std::cmp::Reverse(pair.start.time_ns))
            })
            .context("no scan of guest memory")?
            .start
            .time_ns;
        let ms = |ns: u64| (ns as f64 - begun as f64) / 1e6 + BEFORE;
        let happened = |from: u64, to: u64, addresses: Range<u64>| {
            let met = common(addresses.start, addresses.end);
            let (ms, lasted) = (ms(from), (to - from) as f64 / 1e6);
            let seen = ms + lasted >= 0.0 && ms <= BEFORE + AFTER && !met.is_empty();
            seen.then(|| Happened {
                ms,
                lasted,
                pages: [
                    (met.start - guest.start) / PAGE,
                    (met.end - guest.start).div_ceil(PAGE),
                ],
            })
        };
        let of = |wanted: What| {
            let wanted = lines.iter().filter(move |line| line.what == wanted);
            wanted.filter_map(|line| {
                let Range { start, end } = line.addresses;
                happened(line.ns, line.ns, guest.start + start..guest.start + end)
            })
        };
        let pairs = sequence.pairs.iter().filter(|pair| is_scan(&pair.start));
        Ok(Timeline {
            pages: (guest.end - guest.start) / PAGE,
            pairs: pairs
                .filter_map(|pair| {
                    let (start, end) = (pair.start, pair.end?);
                    happened(start.time_ns, end.time_ns, start.start..start.end)
                })
                .collect(),
            reports: sequence
                .stretches()
                .filter_map(|one| happened(one.time_ns, one.time_ns, one.start..one.end))
                .collect(),
            drops: of(What::Drop).collect(),
            faults: of(What::Fault).collect(),
        })
    }

    /// Draws it from `top` on, `height` pixels high, between `left` and `right`.
    pub fn draw<Backend: DrawingBackend>(
        &self,
        root: &DrawingArea<Backend, plotters::coord::Shift>,
        frame: [(i32, i32); 2],
        colours: [RGBColor; 4],
    ) -> Result<()>
    where
        Backend::ErrorType: 'static,
    {
        let [pairs, reports, drops, faults] = colours;
        let [(left, top), (right, bottom)] = frame;
        let x = |ms: f64| {
            let share = ms.clamp(0.0, BEFORE + AFTER) / (BEFORE + AFTER);
            left + (share * f64::from(right - left)).round() as i32
        };
        let y = |page: u64| {
            top + (page as f64 / self.pages as f64 * f64::from(bottom - top)).round() as i32
        };
        let boxes = |which: &[Happened], colour: RGBColor, opacity: f64, wide: i32| {
            which.iter().try_for_each(|one| {
                let [from, to] = one.pages.map(y);
                let corners = [
                    (x(one.ms), from),
                    (
                        x(one.ms + one.lasted).max(x(one.ms) + wide),
                        to.max(from + 1),
                    ),
                ];
                let filled = colour.mix(opacity).filled();
                root.draw(&Rectangle::new(corners, filled))
            })
        };
        boxes(&self.pairs, pairs, 0.25, 1)?;
        boxes(&self.drops, drops, 1.0, 3)?;
        boxes(&self.reports, reports, 1.0, 2)?;
        boxes(&self.faults, faults, 0.8, 1)?;
        Ok(())
    }
}

/// How long a timeline is, in milliseconds, and where the scan starts in it.
pub const LENGTH: [f64; 2] = [BEFORE + AFTER, BEFORE];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Drop,
    Fault,
}

/// A line of tracefs that is of interest here.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    ns: u64,
    what: What,
    /// Of the guest.
    addresses: Range<u64>,
}

impl Line {
    fn parse(line: &str) -> Option<Line> {
        let hex = |text: &str| u64::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok();
        let (what, head, addresses) =
            if let Some((head, text)) = line.split_once(": kvm_unmap_gfn_range_") {
                let page = |name| {
                    let (_, value) = text.split_once(name)?;
                    value.split_whitespace().next()?.parse::<u64>().ok()
                };
                (
                    What::Drop,
                    head,
                    page(" start=")? * PAGE..page(" end=")? * PAGE,
                )
            } else {
                let (head, text) = line.split_once(": kvm_page_fault:")?;
                let (_, text) = text.split_once("address ")?;
                let at = hex(text.split_whitespace().next()?)?;
                (What::Fault, head, at..at + PAGE)
            };
        let (seconds, micros) = head.rsplit_once(' ')?.1.split_once('.')?;
        let ns = seconds.parse::<u64>().ok()? * 1_000_000_000 + micros.parse::<u64>().ok()? * 1000;
        Some(Line {
            ns,
            what,
            addresses,
        })
    }
}

/// `0x1000-0x2000`.
fn range(text: &str) -> Option<Range<u64>> {
    let hex = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let (start, end) = text.trim().split_once('-')?;
    Some(hex(start)?..hex(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use trace::record::{flag, kind};

    const EVENTS: &str = "\
# guest memory: 0x10000-0x20000
# tracer: nop
      vcpu0-71      [000] .....     1.000000: kvm_page_fault: vcpu 0 rip 0x10000 address 0x0000000000001000 error_code 0x6
 numa_protect-70    [001] .....     1.001000: kvm_unmap_gfn_range_70: (kvm_unmap_gfn_range+0x0/0x90) start=1 end=3
      vcpu0-71      [000] .....     9.000000: kvm_page_fault: vcpu 0 rip 0x10000 address 0x0000000000002000 error_code 0x6
";

    #[test]
    fn what_happened_around_the_scan_is_found() {
        let record = |kind, ns, start, end| Record {
            kind,
            event: event::PROTECTION_VMA,
            flags: flag::NUMA | flag::FIRST | flag::LAST,
            time_ns: ns,
            start,
            end,
            ..Record::default()
        };
        let records = vec![
            record(kind::INVALIDATE_RANGE_START, 1_000_500_000, 0, 0x18000),
            record(kind::NUMA_PROTECT, 1_001_500_000, 0x11000, 0x13000),
            record(kind::INVALIDATE_RANGE_END, 1_002_500_000, 0, 0x18000),
            record(
                kind::INVALIDATE_RANGE_START,
                1_003_000_000,
                0x20000,
                0x30000,
            ),
        ];
        let timeline = Timeline::new(&Sequence::new(records), EVENTS).unwrap();
        let happened = |ms, lasted, pages| Happened { ms, lasted, pages };
        assert_eq!(timeline.pages, 16);
        assert_eq!(timeline.pairs, [happened(5.0, 2.0, [0, 8])]);
        assert_eq!(timeline.reports, [happened(6.0, 0.0, [1, 3])]);
        assert_eq!(timeline.drops, [happened(5.5, 0.0, [1, 3])]);
        assert_eq!(timeline.faults, [happened(4.5, 0.0, [1, 2])]);
        assert!(Timeline::new(&Sequence::new(vec![]), EVENTS).is_err());
        assert!(Timeline::new(&Sequence::new(vec![]), "").is_err());
    }
}
