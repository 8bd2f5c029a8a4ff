// SPDX-License-Identifier: GPL-2.0
//! A process that NUMA scans go over while it is killed, and while the module is unloaded. Changes the machine's settings of
//! scans while it runs.

use std::fs::{self, File};
use std::hint::black_box;
use std::io;
use std::path::Path;
use std::process::Child;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use guest::balancing::{self, Settings};
use guest::ktap::diagnostic;
use guest::PAGE;
use trace::client::{Client, ROOT};
use trace::record::{event, kind};

use crate::module::{load, not_unloaded, unload};
use crate::{child_with, end, write_once, Args};

/// Its memory, in bytes, which a scan needs some milliseconds for, and its threads, each of which may be the one that scans.
const MEMORY: usize = 64 << 20;
const THREADS: usize = 2;
/// How often each is tried, and how many scans a process gets over in which it was not seen in time.
const ROUNDS: usize = 5;
const SCANS: usize = 50;
/// The longest that a scan may take to come.
const LIMIT: Duration = Duration::from_secs(60);

/// Is scanned, as its threads use CPU time in user mode.
pub fn be_scanned() -> Result<()> {
    let memory: &[AtomicU8] = Vec::leak((0..MEMORY).map(|_| AtomicU8::new(1)).collect());
    for _ in 0..THREADS {
        std::thread::spawn(move || loop {
            for page in memory.chunks(PAGE) {
                black_box(page[0].load(Relaxed));
            }
        });
    }
    println!();
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(())
}

/// Such a process, and the settings that have it scanned, which go after it.
fn scanned() -> Result<(Child, Settings)> {
    let settings = Settings::fast()?;
    let target = child_with("--scanned")?;
    balancing::enable(true)?;
    Ok((target, settings))
}

/// A scan is recorded whole, also that of a process that is killed meanwhile, and its release comes last.
pub fn killed() -> Result<()> {
    let mut in_scan = 0;
    for _ in 0..ROUNDS {
        let (mut target, _settings) = scanned()?;
        let mut client = Client::attach(target.id(), "65536")?;
        let mut records = Vec::new();
        let begun = Instant::now();
        let open = loop {
            ensure!(begun.elapsed() < LIMIT, "no scan in {LIMIT:?}");
            client.read_new(&mut records)?;
            let of_scans = |kind| {
                let of = (kind, event::PROTECTION_VMA);
                let all = records.iter().filter(|one| (one.kind, one.event) == of);
                all.count()
            };
            let starts = of_scans(kind::INVALIDATE_RANGE_START);
            let open = starts > of_scans(kind::INVALIDATE_RANGE_END);
            if open || starts > SCANS {
                break open;
            }
        };
        target.kill()?;
        in_scan += usize::from(open);
        // Until all its threads are gone.
        target.wait()?;
        let sequence = client.settle(records, Duration::ZERO)?;
        let last = sequence.records.last().context("nothing recorded")?;
        ensure!(last.kind == kind::RELEASE, "the last record is {last:?}");
        let open = sequence.pairs.iter().find(|pair| pair.end.is_none());
        ensure!(open.is_none(), "it never ended: {open:?}");
    }
    diagnostic(&format!(
        "recorder.records.killed_in_scan: a scan had begun in {in_scan} of {ROUNDS} rounds"
    ));
    ensure!(in_scan > 0, "no scan was seen before its end");
    Ok(())
}

/// Scans go on while the module is unloaded, unless somebody reads, and loaded anew; nothing happens to the process.
pub fn unload_while_scanned(args: &Args) -> Result<()> {
    let (target, _settings) = scanned()?;
    let trace = Path::new(ROOT).join(target.id().to_string()).join("trace");
    for _ in 0..ROUNDS {
        write_once("attach", format!("{} 1024", target.id()))?;
        let begun = Instant::now();
        while !fs::read_to_string(&trace)?.contains("protection_vma") {
            ensure!(begun.elapsed() < LIMIT, "no scan in {LIMIT:?}");
        }
        let reader = File::open(&trace)?;
        not_unloaded(args)?;
        drop(reader);
        unload()?;
        load(&args.module, c"")?;
    }
    end(target)
}
