// SPDX-License-Identifier: GPL-2.0
//! A table of what is recorded of processes, once a second, as kvm_stat shows what KVM does. Attaches the recorder to them.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use comfy_table::{presets, Cell, CellAlignment, Table};
use signal_hook::consts::{SIGINT, SIGTERM};
use trace::client::{Client, Stats};
use trace::record::{flag, kind, Record};

/// Of which processes, and how often.
#[derive(Args)]
pub struct Options {
    /// The processes
    #[arg(short, long = "pid", required = true)]
    pids: Vec<u32>,
    /// Seconds between two tables
    #[arg(short, long, default_value_t = 1.0)]
    interval: f64,
    /// How many tables; until Ctrl-C if not given
    #[arg(short, long)]
    count: Option<u64>,
}

/// What came of one process between two tables.
#[derive(Default)]
struct Counts {
    starts: u64,
    scans: u64,
    scanned: u64,
    reports: u64,
    hinted: u64,
    young: u64,
    missing: u64,
    ended: bool,
}

impl Counts {
    fn of(records: &[Record], page: u64) -> Counts {
        let mut counts = Counts::default();
        for record in records {
            match record.kind {
                kind::INVALIDATE_RANGE_START if record.flags & flag::NUMA != 0 => {
                    counts.scans += 1;
                    counts.scanned += (record.end - record.start) / page;
                }
                kind::INVALIDATE_RANGE_START => counts.starts += 1,
                kind::NUMA_PROTECT if record.flags & flag::FIRST != 0 => {
                    counts.reports += 1;
                    counts.hinted += u64::from(record.pages);
                }
                kind::CLEAR_FLUSH_YOUNG | kind::CLEAR_YOUNG | kind::TEST_YOUNG => counts.young += 1,
                kind::OVERWRITTEN => counts.missing += 1,
                kind::RELEASE => counts.ended = true,
                _ => {}
            }
        }
        counts
    }
}

struct Watched {
    pid: u32,
    client: Client,
    before: Stats,
}

pub fn stat(options: &Options) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, stop.clone()).context("signals")?;
    }
    // SAFETY: takes a number, returns one.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
    let mut watched = Vec::new();
    for pid in &options.pids {
        let client = Client::attach(*pid, "").with_context(|| format!("attach to {pid}"))?;
        watched.push(Watched {
            pid: *pid,
            client,
            before: Stats::default(),
        });
    }
    let mut tables = 0;
    while options.count != Some(tables) && !watched.is_empty() {
        // A signal does not end a sleep of std's.
        let slices = (options.interval / 0.1).ceil().max(1.0) as u32;
        for _ in 0..slices {
            std::thread::sleep(Duration::from_secs_f64(
                options.interval / f64::from(slices),
            ));
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        table.set_header([
            "pid", "starts", "scans", "scanned", "reports", "hinted", "young", "missing",
        ]);
        let mut ended = Vec::new();
        for one in &mut watched {
            let mut records = Vec::new();
            one.client.read_new(&mut records)?;
            let mut counts = Counts::of(&records, page);
            let stats = one.client.stats()?;
            counts.missing += (stats.dropped + stats.lost) - (one.before.dropped + one.before.lost);
            one.before = stats;
            let figures = [
                counts.starts,
                counts.scans,
                counts.scanned,
                counts.reports,
                counts.hinted,
                counts.young,
                counts.missing,
            ];
            let figures = figures.map(|one| Cell::new(one).set_alignment(CellAlignment::Right));
            table.add_row([Cell::new(one.pid)].into_iter().chain(figures));
            if counts.ended {
                ended.push(one.pid);
            }
        }
        let mut out = io::stdout().lock();
        if out.is_terminal() {
            // To the top, and clear what is below.
            write!(out, "\x1b[H\x1b[J")?;
        }
        writeln!(out, "{table}")?;
        out.flush()?;
        drop(out);
        for pid in ended {
            eprintln!("{pid} has ended, or become another program");
            watched.retain(|one| one.pid != pid);
        }
        tables += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_counted() {
        let record = |kind, flags, end, pages| Record {
            kind,
            flags,
            end,
            pages,
            ..Record::default()
        };
        let (start, report) = (kind::INVALIDATE_RANGE_START, kind::NUMA_PROTECT);
        let counts = Counts::of(
            &[
                record(start, flag::BLOCKABLE, 4096, 0),
                record(start, flag::NUMA, 8 * 4096, 0),
                record(report, flag::NUMA | flag::FIRST, 4096, 3),
                record(report, flag::NUMA | flag::LAST, 4096, 3),
                record(kind::INVALIDATE_RANGE_END, flag::NUMA, 8 * 4096, 0),
                record(kind::TEST_YOUNG, 0, 4096, 0),
                record(kind::OVERWRITTEN, 0, 0, 0),
            ],
            4096,
        );
        assert_eq!((counts.starts, counts.scans, counts.scanned), (1, 1, 8));
        assert_eq!((counts.reports, counts.hinted), (1, 3));
        assert_eq!((counts.young, counts.missing, counts.ended), (1, 1, false));
    }
}
