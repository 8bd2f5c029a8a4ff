// SPDX-License-Identifier: GPL-2.0
//! The files of a target: what can be set, and how they are read.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use anyhow::{bail, ensure, Context, Result};
use guest::balancing;
use guest::pages::Pages;
use trace::client::{Client, ROOT};
use trace::record::{self, flag, kind, Record};

use crate::records::seen_in;
use crate::{child, end, on_cpu, write_once};

/// Writing to a file of the target fails with `errno`.
fn refused(client: &Client, file: &str, text: &[u8], errno: i32) -> Result<()> {
    match write_once(client.path(file), text) {
        Err(error) if error.raw_os_error() == Some(errno) => Ok(()),
        other => bail!(
            "{file} answers {} bytes, {:?}, with {other:?}, expected: {}",
            text.len(),
            String::from_utf8_lossy(&text[..text.len().min(20)]),
            io::Error::from_raw_os_error(errno)
        ),
    }
}

fn new_records(client: &mut Client) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    client.read_new(&mut records)?;
    Ok(records)
}

pub fn version_and_size() -> Result<()> {
    let client = Client::attach_self(256)?;
    let version = fs::read_to_string(format!("{ROOT}/version"))?;
    ensure!(version == format!("{}\n", record::VERSION), "{version}");
    let size = fs::read_to_string(client.path("size"))?;
    ensure!(size == "256\n", "{size}");
    Ok(())
}

pub fn enabled() -> Result<()> {
    let mut client = Client::attach_self(1024)?;
    let pages = Pages::new(4)?;
    let is = |client: &Client, value: &str| -> Result<()> {
        let text = fs::read_to_string(client.path("enabled"))?;
        ensure!(text == value, "enabled reads {text:?}, expected {value:?}");
        Ok(())
    };
    for text in ["", "2", "on", "1 1"] {
        refused(&client, "enabled", text.as_bytes(), libc::EINVAL)?;
    }
    refused(&client, "enabled", &[b'1'; 100], libc::E2BIG)?;
    is(&client, "1\n")?;
    write_once(client.path("enabled"), "0\n")?;
    is(&client, "0\n")?;
    new_records(&mut client)?;
    pages.protect(libc::PROT_READ)?;
    let seen = new_records(&mut client)?;
    ensure!(seen.is_empty(), "recorded while it was off: {seen:?}");
    refused(&client, "marker", b"off", libc::EBADF)?;
    write_once(client.path("enabled"), "1")?;
    pages.protect(libc::PROT_READ | libc::PROT_WRITE)?;
    let seen = seen_in(&pages, &new_records(&mut client)?);
    ensure!(seen.len() == 2, "recorded of one mprotect(): {seen:?}");
    Ok(())
}

pub fn filter() -> Result<()> {
    let mut client = Client::attach_self(1024)?;
    let pages = Pages::new(4)?;
    let mut seen_with = |filter: &str| -> Result<Vec<u8>> {
        write_once(client.path("filter"), filter)?;
        let shown = fs::read_to_string(client.path("filter"))?;
        let expected = if ["", "0"].contains(&filter) {
            "none"
        } else {
            filter
        };
        ensure!(
            shown.trim_end() == expected,
            "filter {filter} reads {shown}"
        );
        new_records(&mut client)?;
        pages.protect(libc::PROT_READ)?;
        pages.protect(libc::PROT_READ | libc::PROT_WRITE)?;
        let seen = seen_in(&pages, &new_records(&mut client)?);
        Ok(seen.into_iter().map(|(kind, ..)| kind).collect())
    };
    let (start, end) = (kind::INVALIDATE_RANGE_START, kind::INVALIDATE_RANGE_END);
    let range = pages.addresses();
    let beside = format!("range={:x}-{:x}", range.end, range.end + 4096);
    let last = format!("range={:x}-{:x}", range.end - 1, range.end);
    for (filter, expected) in [
        ("0", &[start, end, start, end][..]),
        ("callback=invalidate_range_end", &[end, end]),
        ("", &[start, end, start, end]),
        ("event=protection_vma", &[start, end, start, end]),
        ("event=unmap,clear", &[]),
        ("numa", &[]),
        (&beside, &[]),
        (&last, &[start, end, start, end]),
        (
            "callback=invalidate_range_start event=protection_vma",
            &[start, start],
        ),
    ] {
        let seen = seen_with(filter)?;
        ensure!(
            seen == expected,
            "with filter {filter}: {seen:?}, expected {expected:?}"
        );
    }
    let before = fs::read_to_string(client.path("filter"))?;
    for text in [
        &b"numb"[..],
        b"callback=",
        b"\xff\xfe",
        b"range=2-1",
        b"numa\0",
    ] {
        refused(&client, "filter", text, libc::EINVAL)?;
    }
    refused(&client, "filter", &[b'x'; 513], libc::E2BIG)?;
    refused(&client, "filter", &vec![b' '; 1 << 20], libc::E2BIG)?;
    let after = fs::read_to_string(client.path("filter"))?;
    ensure!(before == after, "refused, and changed: {before} to {after}");
    Ok(())
}

pub fn marker() -> Result<()> {
    let mut client = Client::attach_self(1024)?;
    let pages = Pages::new(4)?;
    write_once(client.path("filter"), "event=protection_vma")?;
    new_records(&mut client)?;
    pages.protect(libc::PROT_READ)?;
    write_once(client.path("marker"), "half-time\n")?;
    pages.protect(libc::PROT_READ | libc::PROT_WRITE)?;
    let long = "0123456789".repeat(10);
    write_once(client.path("marker"), &long)?;
    let records = new_records(&mut client)?;
    let kinds: Vec<u8> = records.iter().map(|record| record.kind).collect();
    let (start, end, marker) = (
        kind::INVALIDATE_RANGE_START,
        kind::INVALIDATE_RANGE_END,
        kind::MARKER,
    );
    let expected = [
        start, end, marker, start, end, marker, marker, marker, marker,
    ];
    ensure!(kinds == expected, "{kinds:?}, expected {expected:?}");
    let text: Vec<u8> = records[5..].iter().flat_map(Record::marker_text).collect();
    ensure!(text.starts_with(long.as_bytes()), "{text:?}");
    let flags: Vec<u16> = records.iter().map(|record| record.flags >> 8).collect();
    let (first, last) = (flag::FIRST >> 8, flag::LAST >> 8);
    ensure!(
        flags[2] == first | last && flags[5..] == [first, 0, 0, last],
        "{flags:?}"
    );
    let trace = fs::read_to_string(client.path("trace"))?;
    let lines = trace
        .lines()
        .filter(|line| line.ends_with(": marker: half-time"));
    ensure!(lines.count() == 1, "{trace}");
    refused(&client, "marker", &[b'x'; 1025], libc::E2BIG)
}

/// The trace shows what was recorded on different CPUs in the order of time.
pub fn trace_of_all_cpus() -> Result<()> {
    let client = Client::attach_self(1024)?;
    let cpus = balancing::online_cpus()?;
    let markers = ["first", "second", "third", "fourth"];
    for (text, cpu) in markers
        .into_iter()
        .zip(cpus.iter().copied().take(2).cycle())
    {
        on_cpu(cpu, || Ok(write_once(client.path("marker"), text)?))?;
    }
    let trace = fs::read_to_string(client.path("trace"))?;
    let shown = trace
        .lines()
        .filter_map(|line| Some(line.split_once(": marker: ")?.1));
    ensure!(shown.eq(markers), "{trace}");
    Ok(())
}

/// However a file is read, it says the same.
pub fn reading() -> Result<()> {
    let target = child()?;
    let client = Client::attach(target.id(), "64")?;
    write_once(client.path("marker"), "here")?;
    write_once(client.path("marker"), "there")?;
    for file in ["trace", "stats", "filter"] {
        let whole = fs::read(client.path(file))?;
        for room in [1, 7, 100, 4096] {
            let mut open = File::open(client.path(file))?;
            let (mut text, mut part) = (Vec::new(), vec![0u8; room]);
            loop {
                match open.read(&mut part)? {
                    0 => break,
                    read => text.extend_from_slice(&part[..read]),
                }
            }
            ensure!(text == whole, "{file}, {room} bytes at a time");
            let sought = open.seek(SeekFrom::Start(0));
            ensure!(
                sought.as_ref().err().and_then(io::Error::raw_os_error) == Some(libc::ESPIPE),
                "{file}: seeking gives {sought:?}"
            );
        }
    }
    let mut found = 0;
    for cpu in 0..client.cpus() {
        let path = client.path(&format!("per_cpu/cpu{cpu}/records"));
        let whole = fs::read(&path).with_context(|| path.display().to_string())?;
        let open = File::open(&path)?;
        for (room, offset) in [
            (1, 0),
            (1, 1),
            (63, 65),
            (7, 127),
            (4096, 3),
            (64, 1 << 20),
            (1, 1 << 62),
        ] {
            let mut part = vec![0; room];
            let read = open.read_at(&mut part, offset)?;
            let rest: Option<&[u8]> = usize::try_from(offset)
                .ok()
                .and_then(|offset| whole.get(offset..));
            let expected = rest.unwrap_or(&[]);
            let expected = &expected[..expected.len().min(room)];
            ensure!(
                &part[..read] == expected,
                "cpu{cpu}: {room} bytes at {offset}"
            );
        }
        found += whole.len() / record::SIZE;
    }
    ensure!(found == 2, "{found} records of two markers");
    drop(client);
    end(target)
}
