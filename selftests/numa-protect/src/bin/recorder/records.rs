// SPDX-License-Identifier: GPL-2.0
//! What is recorded: a known sequence, what a full ring keeps, and how a target ends.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use guest::pages::Pages;
use trace::client::{Client, ROOT};
use trace::record::{event, flag, kind, Record};

use crate::{attached, child, child_with, end, refused, write_once};

/// The longest that a process may take to die.
const LIMIT: Duration = Duration::from_secs(30);

/// What was recorded of exactly these pages: kind, event and flags.
pub fn seen_in(pages: &Pages, records: &[Record]) -> Vec<(u8, u8, u16)> {
    let ours = records
        .iter()
        .filter(|record| (record.start..record.end) == pages.addresses());
    ours.map(|record| (record.kind, record.event, record.flags))
        .collect()
}

pub fn known_sequence() -> Result<()> {
    let pages = Pages::new(16)?;
    let mut client = Client::attach_self(4096)?;
    pages.protect(libc::PROT_READ)?;
    pages.protect(libc::PROT_READ | libc::PROT_WRITE)?;
    pages.discard()?;
    let mut records = Vec::new();
    client.read_new(&mut records)?;
    let pair = |event| {
        let both = [kind::INVALIDATE_RANGE_START, kind::INVALIDATE_RANGE_END];
        both.map(|kind| (kind, event, flag::BLOCKABLE))
    };
    let expected = [
        pair(event::PROTECTION_VMA),
        pair(event::PROTECTION_VMA),
        pair(event::CLEAR),
    ]
    .concat();
    let seen = seen_in(&pages, &records);
    ensure!(
        seen == expected,
        "recorded {seen:?}, expected {expected:?} (kind, event, flags)"
    );
    let tid = std::process::id();
    let ours = records
        .iter()
        .filter(|record| record.tid == tid && record.comm().starts_with("recorder"));
    ensure!(
        ours.count() == records.len(),
        "records of other threads: {records:?}"
    );
    Ok(())
}

/// A ring too small keeps the latest, counts the others, and shows the gap.
pub fn overwritten() -> Result<()> {
    const SIZE: u64 = 64;
    let pages = Pages::new(1)?;
    let mut client = Client::attach_self(SIZE)?;
    for _ in 0..SIZE {
        pages.protect(libc::PROT_READ)?;
        pages.protect(libc::PROT_READ | libc::PROT_WRITE)?;
    }
    let stats = client.stats()?;
    ensure!(
        stats.recorded >= 4 * SIZE,
        "{stats:?}: 4 records for each of {SIZE} rounds"
    );
    ensure!(
        stats.overwritten == stats.recorded - SIZE && stats.lost == 0,
        "{stats:?}: all but {SIZE} overwritten"
    );
    let mut records = Vec::new();
    client.read_new(&mut records)?;
    records.retain(|record| record.cpu == 1);
    records.sort_by_key(|record| record.seq);
    for (seq, record) in (0..).zip(&records) {
        let kept = seq >= stats.overwritten;
        ensure!(
            record.seq == seq,
            "record {seq} says that it is {}",
            record.seq
        );
        ensure!(
            (record.kind == kind::OVERWRITTEN) != kept,
            "record {seq} of {stats:?} is {record:?}"
        );
    }
    ensure!(
        records.len() as u64 >= stats.recorded,
        "{} records of {stats:?}",
        records.len()
    );
    Ok(())
}

/// A full ring that does not overwrite keeps the earliest, and counts the others. This runs on CPU 1.
pub fn dropped() -> Result<()> {
    const SIZE: u64 = 64;
    let pages = Pages::new(1)?;
    let mut client = Client::attach(std::process::id(), &format!("{SIZE} nooverwrite"))?;
    for _ in 0..SIZE {
        pages.protect(libc::PROT_READ)?;
        pages.protect(libc::PROT_READ | libc::PROT_WRITE)?;
    }
    let stats = client.stats()?;
    ensure!(
        stats.recorded >= 4 * SIZE && stats.dropped == stats.recorded - SIZE,
        "{stats:?}: 4 records for each of {SIZE} rounds, all but {SIZE} dropped"
    );
    ensure!(
        (stats.overwritten, stats.lost) == (0, 0),
        "{stats:?}: overwritten or lost"
    );
    let mut records = Vec::new();
    client.read_new(&mut records)?;
    let seqs: Vec<u64> = records.iter().map(|record| record.seq).collect();
    ensure!(seqs == (0..SIZE).collect::<Vec<_>>(), "kept are {seqs:?}");
    let trace = fs::read_to_string(client.path("trace"))?;
    let last = trace.lines().last().unwrap_or_default();
    let expected = format!("CPU:1 [LOST {} EVENTS]", stats.dropped);
    ensure!(
        last == expected,
        "the trace ends with {last}, not {expected}"
    );
    Ok(())
}

/// What a child does to its own address space, a copy of what is recorded, is not.
pub fn not_of_children() -> Result<()> {
    let pages = Pages::new(4)?;
    let mut client = Client::attach_self(1024)?;
    // SAFETY: this process has no other thread; the child protects its own copy of the pages, and exits.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let protected = pages.protect(libc::PROT_READ);
        // SAFETY: ends the child, of whom nothing is left to be done.
        unsafe { libc::_exit(i32::from(protected.is_err())) };
    }
    ensure!(child > 0, "fork: {}", std::io::Error::last_os_error());
    let mut status = 0;
    // SAFETY: waits for the child above.
    unsafe { libc::waitpid(child, &mut status, 0) };
    ensure!(status == 0, "the child ends with {status}");
    let mut records = Vec::new();
    client.read_new(&mut records)?;
    let foreign: Vec<&Record> = records
        .iter()
        .filter(|one| one.tid == child as u32)
        .collect();
    ensure!(foreign.is_empty(), "of the child: {foreign:?}");
    ensure!(!records.is_empty(), "fork() itself was not recorded");
    pages.protect(libc::PROT_READ)?;
    records.clear();
    client.read_new(&mut records)?;
    let seen = seen_in(&pages, &records);
    ensure!(seen.len() == 2, "of the same in this process: {seen:?}");
    Ok(())
}

/// The trace of a process that exits ends with its release and stays until it is detached.
pub fn after_exit() -> Result<()> {
    let child = child()?;
    let pid = child.id().to_string();
    write_once("attach", &pid)?;
    end(child)?;
    let trace = fs::read_to_string(Path::new(ROOT).join(&pid).join("trace"))?;
    write_once("detach", &pid)?;
    let last = trace.lines().last().unwrap_or_default();
    ensure!(
        last.contains(": release:"),
        "the trace of a process that exited ends with: {last}"
    );
    ensure!(
        !attached()?.contains(&pid),
        "{pid} is detached and still there"
    );
    Ok(())
}

/// The same of a process that becomes another program: from then on nothing is recorded, until it is attached anew.
pub fn after_exec() -> Result<()> {
    let mut target = child_with("--exec")?;
    let pid = target.id();
    let mut client = Client::attach(pid, "1024")?;
    let input = target.stdin.as_mut().context("the child's input")?;
    input.write_all(b"x")?;
    // Until the other program says that it runs.
    let output = target.stdout.as_mut().context("the child's output")?;
    std::io::Read::read_exact(output, &mut [0])?;
    let mut records = Vec::new();
    client.read_new(&mut records)?;
    let last = records.last().context("nothing recorded")?;
    ensure!(last.kind == kind::RELEASE, "the last record is {last:?}");
    let recorded = client.stats()?.recorded;
    drop(client);
    let again = Client::attach(pid, "1024")?;
    end(target)?;
    ensure!(
        recorded == records.len() as u64,
        "{recorded} recorded, {} read",
        records.len()
    );
    ensure!(
        again.stats()?.recorded > 0,
        "nothing recorded of the other program"
    );
    Ok(())
}

/// A process that is killed leaves its trace; as long as nobody has waited for it, it is there, and cannot be attached.
pub fn after_kill() -> Result<()> {
    let mut target = child()?;
    let pid = target.id().to_string();
    write_once("attach", &pid)?;
    target.kill()?;
    // It gives up its memory first, and is a zombie a moment later.
    let stat = || fs::read_to_string(format!("/proc/{pid}/stat"));
    let begun = Instant::now();
    while !stat()?.contains(") Z ") {
        ensure!(begun.elapsed() < LIMIT, "no zombie: {}", stat()?);
        std::thread::sleep(Duration::from_millis(10));
    }
    let trace = fs::read_to_string(Path::new(ROOT).join(&pid).join("trace"))?;
    ensure!(trace.contains(": release:"), "no release: {trace}");
    write_once("detach", &pid)?;
    refused("attach", &pid, libc::ESRCH)?;
    target.wait()?;
    Ok(())
}
