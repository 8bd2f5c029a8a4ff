// SPDX-License-Identifier: GPL-2.0
//! Shows a saved trace on standard output: as lines, as JSON, or as a summary.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde_json::json;
use trace::filter::Filter;
use trace::record::{event, flag, kind, Record};
use trace::saved::{self, About};
use trace::sequence::Sequence;

use crate::slots::{Part, Slots};

/// What to show, and how.
#[derive(Args)]
pub struct Options {
    /// What `record` wrote
    #[arg(default_value = crate::record::FILE)]
    file: PathBuf,
    /// One JSON object for each record
    #[arg(long, conflicts_with = "summary")]
    json: bool,
    /// How many callbacks there were of each kind, and one line for each scan that hinted something
    #[arg(long)]
    summary: bool,
    /// Only these records: `callback=NAME,... event=NAME,... range=START-END numa`
    #[arg(long, default_value = "", value_parser = |text: &str| Filter::parse(text).ok_or("see record --help"))]
    filter: Filter,
}

pub fn report(options: &Options) -> Result<()> {
    let (about, sequence) = saved::read(&options.file)?;
    let mut out = BufWriter::new(io::stdout().lock());
    if options.summary {
        summary(&mut out, &about, &sequence)?;
    } else {
        if !options.json {
            heading(&mut out, &about)?;
        }
        let page_size = about.page_size.max(1);
        let mut slots = Slots::default();
        for record in &sequence.records {
            slots.see(record);
            if !options.filter.keeps(record) {
                continue;
            }
            let parts = slots
                .parts(record, page_size)
                .filter(|_| tells_of_range(record));
            match (options.json, record.kind) {
                (true, _) => writeln!(out, "{}", object(record, parts))?,
                (false, kind::OVERWRITTEN) => writeln!(out, "CPU:{} [LOST 1 EVENTS]", record.cpu)?,
                (false, _) => {
                    write!(out, "{}", record.line(page_size.trailing_zeros()))?;
                    for Part { slot, first, end } in parts {
                        write!(out, " slot={} gfn={first:x}-{end:x}", slot.id)?;
                    }
                    writeln!(out)?;
                }
            }
        }
    }
    out.flush()?;
    Ok(())
}

fn heading(out: &mut impl Write, about: &About) -> io::Result<()> {
    writeln!(out, "# pid {}: {}", about.pid, about.command)?;
    writeln!(out, "# Linux {}", about.kernel)?;
    if !about.filter.is_empty() {
        writeln!(out, "# filter: {}", about.filter)?;
    }
    match about.stats {
        Some(stats) => writeln!(
            out,
            "# recorded {}, overwritten {}, dropped {}, lost {}",
            stats.recorded, stats.overwritten, stats.dropped, stats.lost
        ),
        None => writeln!(out, "# the recording was cut off"),
    }
}

/// Whether something happens at its addresses: others have none, or are of the whole process.
fn tells_of_range(record: &Record) -> bool {
    !matches!(
        record.kind,
        kind::MARKER | kind::RELEASE | kind::MEMORY_SLOT
    )
}

fn object(record: &Record, parts: impl Iterator<Item = Part>) -> serde_json::Value {
    let flags: Vec<&str> = [
        (flag::BLOCKABLE, "blockable"),
        (flag::NUMA, "numa"),
        (flag::FIRST, "first"),
        (flag::LAST, "last"),
    ]
    .into_iter()
    .filter(|(bit, _)| record.flags & bit != 0)
    .map(|(_, name)| name)
    .collect();
    let mut object = json!({
        "time_ns": record.time_ns,
        "cpu": record.cpu,
        "tid": record.tid,
        "kind": kind::name(record.kind),
        "flags": flags,
    });
    if record.kind == kind::MARKER {
        let text = record.marker_text();
        let text = String::from_utf8_lossy(&text);
        object["text"] = text.trim_end_matches('\0').into();
    } else if let Some(slot) = record.slot() {
        object["start"] = record.start.into();
        object["end"] = record.end.into();
        object["slot"] = json!({ "vm": slot.vm, "id": slot.id, "gfn": slot.gfn });
    } else {
        object["comm"] = record.comm().into();
        object["start"] = record.start.into();
        object["end"] = record.end.into();
        if record.event != event::NONE {
            object["event"] = event::name(record.event).into();
        }
        if record.kind == kind::NUMA_PROTECT {
            object["hinted"] = record.pages.into();
        }
        let guest: Vec<_> = parts
            .map(|Part { slot, first, end }| {
                json!({ "vm": slot.vm, "slot": slot.id, "gfn": first, "pages": end - first })
            })
            .collect();
        if !guest.is_empty() {
            object["guest"] = guest.into();
        }
    }
    object
}

fn summary(out: &mut impl Write, about: &About, sequence: &Sequence) -> io::Result<()> {
    heading(out, about)?;
    let mut counts: BTreeMap<(u8, u8, bool), (u64, u64)> = BTreeMap::new();
    for record in &sequence.records {
        let numa = record.flags & flag::NUMA != 0;
        let (times, pages) = counts.entry((record.kind, record.event, numa)).or_default();
        *times += 1;
        if tells_of_range(record) {
            *pages += record.end.saturating_sub(record.start) / about.page_size.max(1);
        }
    }
    writeln!(out, "\n{:>10} {:>14}  callback", "times", "pages")?;
    for ((kind, event, numa), (times, pages)) in counts {
        let (kind, event) = (kind::name(kind), event::name(event));
        let numa = if numa { " numa" } else { "" };
        writeln!(out, "{times:>10} {pages:>14}  {kind} {event}{numa}")?;
    }
    if !sequence.reports.is_empty() {
        writeln!(
            out,
            "\n{:>16} {:>10} {:>10} {:>10} {:>10}  scans that hinted something",
            "time", "ms", "walked", "hinted", "stretches"
        )?;
    }
    for report in &sequence.reports {
        let Some(pair) = report.pair.map(|pair| &sequence.pairs[pair]) else {
            continue;
        };
        let start = &pair.start;
        let lasted = pair.end.map_or("open".into(), |end| {
            format!("{:.3}", (end.time_ns - start.time_ns) as f64 / 1e6)
        });
        writeln!(
            out,
            "{:>16.6} {lasted:>10} {:>10} {:>10} {:>10}  {}-{}",
            start.time_ns as f64 / 1e9,
            (start.end - start.start) / about.page_size.max(1),
            report.pages(),
            report.stretches.len(),
            start.comm(),
            start.tid,
        )?;
    }
    Ok(())
}
