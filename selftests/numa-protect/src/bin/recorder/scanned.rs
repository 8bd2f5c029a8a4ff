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
use guest::PAGE;
use trace::client::{Client, ROOT};
use trace::record::{event, kind};

use crate::module::{load, not_unloaded, unload};
use crate::records::wait_for_zombie;
use crate::{child_with, end, write_once, Args};

/// Its memory, in bytes, and its threads, with only one of which a scan would leave alone what is on their node.
const MEMORY: usize = 16 << 20;
const THREADS: usize = 2;
/// How often each is tried: what is to be met is short.
const ROUNDS: usize = 5;
/// The longest that a scan may take to come.
const LIMIT: Duration = Duration::from_secs(60);

/// Is scanned, as all threads touch all memory, which the first does for the other.
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
    for round in 1..=ROUNDS {
        let (mut target, _settings) = scanned()?;
        let mut client = Client::attach(target.id(), "65536")?;
        let mut records = Vec::new();
        let begun = Instant::now();
        // Not where one has just ended: where another one may be.
        let scans = |records: &[trace::record::Record]| {
            let start = (kind::INVALIDATE_RANGE_START, event::PROTECTION_VMA);
            let scans = records.iter().filter(|one| (one.kind, one.event) == start);
            scans.count()
        };
        while scans(&records) <= round {
            ensure!(begun.elapsed() < LIMIT, "no scan in {LIMIT:?}");
            client.read_new(&mut records)?;
        }
        target.kill()?;
        wait_for_zombie(&target.id().to_string())?;
        let sequence = client.settle(records, Duration::ZERO)?;
        target.wait()?;
        let last = sequence.records.last().context("nothing recorded")?;
        ensure!(last.kind == kind::RELEASE, "the last record is {last:?}");
        let open = sequence.pairs.iter().find(|pair| pair.end.is_none());
        ensure!(open.is_none(), "it never ended: {open:?}");
    }
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
