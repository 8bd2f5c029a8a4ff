// SPDX-License-Identifier: GPL-2.0
//! The recorder under load: callbacks on every CPU at once, as fast as they come. Changes memory of its own only.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Result};
use guest::balancing;
use guest::ktap::diagnostic;
use guest::pages::{Discarder, Pages};
use trace::client::Client;
use trace::record::{event, kind, Record};

use crate::write_once;

/// Room for records of each CPU, which goes round many times.
const SIZE: u64 = 1 << 14;
/// What a reader takes of each CPU at once, in records: he may never catch up.
const AT_ONCE: u64 = 1 << 12;
/// How often a reader comes by, and gives a sign of life.
const READ_EVERY: Duration = Duration::from_millis(200);
const TELL_EVERY: Duration = Duration::from_secs(10);

/// One thread on each CPU discards a page of its own again and again, and a reader comes by. Every callback is counted; every
/// number of every CPU is read as the record that it must be, or is missing and counted as such.
pub fn every_cpu_at_once(seconds: u64) -> Result<()> {
    let cpus = balancing::online_cpus()?;
    let pages = Pages::new(cpus.len())?;
    let addresses = pages.addresses();
    let mut client = Client::attach_self(SIZE)?;
    let filter = format!("range={:x}-{:x}", addresses.start, addresses.end);
    write_once(client.path("filter"), filter)?;
    let mut before = Vec::new();
    client.read_new(&mut before)?;
    let mut seen: Vec<Seen> = (0..client.cpus())
        .map(|cpu| {
            let first = before.iter().filter(|record| record.cpu as usize == cpu);
            Seen::from(first.count() as u64)
        })
        .collect();
    for (cpu, page) in cpus.iter().zip(addresses.step_by(guest::PAGE)) {
        seen[*cpu].page = Some(page);
    }

    let stop = AtomicBool::new(false);
    let (begun, limit) = (Instant::now(), Duration::from_secs(seconds));
    let discarded: u64 = thread::scope(|scope| -> Result<u64> {
        let (stop, pages) = (&stop, &pages);
        let writers: Vec<_> = (0..)
            .zip(&cpus)
            .map(|(index, cpu)| scope.spawn(move || discard_until(stop, *cpu, pages, index)))
            .collect();
        let read = read_beside(&mut client, &mut seen, begun, limit);
        stop.store(true, Relaxed);
        let discarded = writers.into_iter().map(|writer| match writer.join() {
            Ok(discarded) => discarded,
            Err(_) => bail!("a writer panicked"),
        });
        let discarded: Result<Vec<u64>> = discarded.collect();
        read?;
        Ok(discarded?.into_iter().sum())
    })?;
    let took = begun.elapsed().as_secs_f64();
    while read(&mut client, &mut seen)? {}

    let stats = client.stats()?;
    let recorded = stats.recorded - before.len() as u64;
    let sum = |count: fn(&Seen) -> u64| seen.iter().map(count).sum::<u64>();
    let (whole, missing) = (sum(|cpu| cpu.whole), sum(|cpu| cpu.missing));
    diagnostic(&format!(
        "recorder.records.every_cpu_at_once: {recorded} callbacks on {} CPUs in {took:.1} s, {:.0} a second; {whole} records \
         read whole, {missing} overwritten before the reader came",
        cpus.len(),
        recorded as f64 / took
    ));
    ensure!(
        recorded == 2 * discarded,
        "{recorded} callbacks counted, of {discarded} starts and as many ends"
    );
    ensure!(
        whole + missing == recorded,
        "{whole} records read and {missing} missing of {recorded}"
    );
    ensure!(
        missing <= stats.overwritten + stats.lost,
        "{missing} records missing: {stats:?}"
    );
    for (cpu, seen) in seen.iter().enumerate() {
        let kept = seen.next.saturating_sub(SIZE);
        ensure!(
            stats.lost > 0 || seen.last_missing.is_none_or(|last| last < kept),
            "CPU {cpu}: {:?} is missing, and from {kept} on the ring has room: {stats:?}",
            seen.last_missing
        );
    }
    Ok(())
}

/// What was read of a CPU.
#[derive(Default)]
struct Seen {
    /// The page that is discarded there.
    page: Option<u64>,
    first: u64,
    next: u64,
    whole: u64,
    missing: u64,
    last_missing: Option<u64>,
}

impl Seen {
    /// Nothing yet; `first` is the first of the numbers to come.
    fn from(first: u64) -> Seen {
        Seen {
            first,
            next: first,
            ..Seen::default()
        }
    }

    /// The next number: a start and an end in turn, of this CPU's page.
    fn see(&mut self, record: &Record) -> Result<()> {
        let (cpu, expected) = (record.cpu, self.next);
        ensure!(
            record.seq == expected,
            "CPU {cpu}: record {} follows where {expected} would have to",
            record.seq
        );
        self.next += 1;
        if record.kind == kind::OVERWRITTEN {
            self.missing += 1;
            self.last_missing = Some(record.seq);
            return Ok(());
        }
        self.whole += 1;
        let kind = match (expected - self.first) % 2 {
            0 => kind::INVALIDATE_RANGE_START,
            _ => kind::INVALIDATE_RANGE_END,
        };
        let page = self.page.map(|page| (page, page + guest::PAGE as u64));
        let is = (record.kind, record.event, Some((record.start, record.end)));
        ensure!(
            is == (kind, event::CLEAR, page),
            "CPU {cpu}: record {expected} is {record:x?}; expected kind {kind}, event {} of {page:x?}",
            event::CLEAR
        );
        Ok(())
    }
}

/// Reads a part of what is there; whether that was anything.
fn read(client: &mut Client, seen: &mut [Seen]) -> Result<bool> {
    let mut records = Vec::new();
    client.read_at_most(AT_ONCE, &mut records)?;
    records.sort_by_key(|record| (record.cpu, record.seq));
    for record in &records {
        match seen.get_mut(record.cpu as usize) {
            Some(cpu) => cpu.see(record)?,
            None => bail!("a record of CPU {}", record.cpu),
        }
    }
    Ok(!records.is_empty())
}

fn read_beside(
    client: &mut Client,
    seen: &mut [Seen],
    begun: Instant,
    limit: Duration,
) -> Result<()> {
    let mut told = begun;
    while begun.elapsed() < limit {
        thread::sleep(READ_EVERY);
        read(client, seen)?;
        if told.elapsed() > TELL_EVERY {
            told = Instant::now();
            let next: u64 = seen.iter().map(|cpu| cpu.next).sum();
            diagnostic(&format!(
                "recorder.records.every_cpu_at_once: {} s of {}, {next} records",
                begun.elapsed().as_secs(),
                limit.as_secs()
            ));
        }
    }
    Ok(())
}

/// Discards page `index` on `cpu` until it is told to stop; how often that was.
fn discard_until(stop: &AtomicBool, cpu: usize, pages: &Pages, index: usize) -> Result<u64> {
    balancing::set_affinity(&[cpu])?;
    let page = pages.discarder(index)?;
    let mut discarded = 0;
    while !stop.load(Relaxed) {
        page.discard()?;
        discarded += Discarder::AT_ONCE as u64;
    }
    Ok(discarded)
}
