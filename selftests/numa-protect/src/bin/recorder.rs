// SPDX-License-Identifier: GPL-2.0
//! The recorder itself: what it answers to bad input, what it records of a known sequence, and that nothing of it stays
//! behind. Attaches to itself and to children of its own; loads and unloads the module.
//!
//! Prints KTAP. Without the module, loaded or at `--module`, all tests are skipped.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{bail, ensure, Context, Result};
use clap::Parser;
use guest::balancing;
use guest::ktap::{diagnostic, Ktap, Outcome};
use trace::client::{is_loaded, Client, ROOT};
use trace::record::{event, flag, kind, Record};

const MODULE: &str = "mmu_notifier_trace";
/// How often the module is loaded, used and unloaded.
const CYCLES: usize = 100;
/// Cycles after which the memory that the kernel uses must not grow any more.
const WARM_UP: usize = 20;

/// The recorder: bad input, a known sequence, loading and unloading.
#[derive(Parser)]
struct Args {
    /// Folder for results; this program leaves none.
    #[arg(long, default_value = ".")]
    results: PathBuf,
    /// The module, for the tests that load it.
    #[arg(long, default_value = "/mmu_notifier_trace.ko")]
    module: PathBuf,
    /// Do nothing until the end of standard input: be the process that the tests attach to.
    #[arg(long, hide = true)]
    wait: bool,
}

type Test = fn(&Args) -> Result<()>;

const TESTS: &[(&str, Test)] = &[
    ("attach.bad_input", |_| bad_input("attach")),
    ("attach.no_such_process", |_| no_such_process()),
    ("attach.kernel_thread", |_| {
        refused("attach", "2", libc::EINVAL)
    }),
    ("attach.bad_size", |_| bad_size()),
    ("attach.twice", |_| twice()),
    ("attach.plain", |_| plain()),
    ("detach.bad_input", |_| bad_input("detach")),
    ("detach.not_attached", |_| not_attached()),
    ("records.known_sequence", |_| known_sequence()),
    ("records.overwritten", |_| on_cpu(OVERWRITER, overwritten)),
    ("records.after_exit", |_| after_exit()),
    ("module.unload_while_attached", unload_while_attached),
    ("module.cycles", cycles),
];

fn main() -> ExitCode {
    let args = Args::parse();
    if args.wait {
        println!();
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        return ExitCode::SUCCESS;
    }
    let mut ktap = Ktap::start(TESTS.len());
    for (name, test) in TESTS {
        let name = format!("recorder.{name}");
        let outcome = match () {
            () if !is_loaded() => {
                Outcome::Skip(format!("{MODULE} not loaded (CONFIG_RUST, insmod)"))
            }
            () if name.contains(".module.") && !args.module.exists() => {
                Outcome::Skip(format!("no {}: --module", args.module.display()))
            }
            () => match test(&args) {
                Ok(()) => Outcome::Ok,
                Err(error) => Outcome::NotOk(format!("{error:#}")),
            },
        };
        ktap.result(&name, &outcome);
    }
    ktap.finish()
}

/// One write(2) of `text`, however short.
fn write_once(file: &str, text: &str) -> io::Result<()> {
    let file = fs::OpenOptions::new()
        .write(true)
        .open(Path::new(ROOT).join(file))?;
    // SAFETY: the descriptor is open and the buffer is as long as said.
    let written = unsafe { libc::write(file.as_raw_fd(), text.as_ptr().cast(), text.len()) };
    match written {
        -1 => Err(io::Error::last_os_error()),
        _ if written as usize == text.len() => Ok(()),
        _ => Err(io::Error::other(format!(
            "{written} of {} bytes written",
            text.len()
        ))),
    }
}

/// The names in the recorder's folder.
fn attached() -> Result<BTreeSet<String>> {
    let names =
        fs::read_dir(ROOT)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

/// Writing `text` fails with `errno` and changes nothing.
fn refused(file: &str, text: &str, errno: i32) -> Result<()> {
    let before = attached()?;
    let answer = write_once(file, text);
    let expected = io::Error::from_raw_os_error(errno);
    match answer {
        Ok(()) => bail!("{file} takes {text:?}; expected: {expected}"),
        Err(error) if error.raw_os_error() != Some(errno) => {
            bail!("{file} answers {text:?} with: {error}; expected: {expected}")
        }
        Err(_) => ensure!(
            attached()? == before,
            "{text:?}, though refused, changed what is attached"
        ),
    }
    Ok(())
}

fn bad_input(file: &str) -> Result<()> {
    for text in [
        "",
        "\n",
        "pid",
        "1 2 3",
        "1 2 plain 3",
        "1 plain 2",
        "1 plain plain",
        "plain",
        "1 plan",
        "1 2 Plain",
        "-1",
        "12x",
        "0x10",
        "1.5",
        &"9".repeat(100),
    ] {
        refused(file, text, libc::EINVAL)?;
    }
    for text in ["99999999999", "2147483648", "99999999999999999999999"] {
        refused(file, text, libc::ERANGE)?;
    }
    Ok(())
}

/// A process that lives until it is given an end of its input.
fn child() -> Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.arg("--wait").spawn()?;
    // Until its program runs, its address space can still be this process's.
    let stdout = child.stdout.as_mut().context("the child's output")?;
    stdout.read_exact(&mut [0])?;
    Ok(child)
}

fn end(mut child: Child) -> Result<()> {
    drop(child.stdin.take());
    let status = child.wait()?;
    ensure!(
        status.success(),
        "the child did not come to its end: {status}"
    );
    Ok(())
}

fn no_such_process() -> Result<()> {
    let gone = child()?;
    let pid = gone.id().to_string();
    end(gone)?;
    refused("attach", &pid, libc::ESRCH)?;
    refused("attach", "0", libc::ESRCH)
}

fn bad_size() -> Result<()> {
    let pid = std::process::id();
    for size in ["0", "3", "65535", "8388608"] {
        refused("attach", &format!("{pid} {size}"), libc::EINVAL)?;
    }
    Ok(())
}

fn twice() -> Result<()> {
    let client = Client::attach_self(1024)?;
    let pid = std::process::id().to_string();
    refused("attach", &pid, libc::EEXIST)?;
    refused("attach", &format!("{pid} 2048"), libc::EEXIST)?;
    ensure!(
        client.stats()?.size == 1024 * client.cpus() as u64,
        "the second attach changed the rings of the first"
    );
    Ok(())
}

/// A subscriber without `numa_protect` goes beside the one with it: each is attached once, and detached by itself.
fn plain() -> Result<()> {
    let pid = std::process::id().to_string();
    let plain = Client::attach_self_plain(1024)?;
    refused("attach", &format!("{pid} plain"), libc::EEXIST)?;
    refused("detach", &pid, libc::ENOENT)?;
    let full = Client::attach_self(2048)?;
    for request in ["plain", "512 plain", "512"] {
        refused("attach", &format!("{pid} {request}"), libc::EEXIST)?;
    }
    refused("detach", &format!("{pid} 2048"), libc::EINVAL)?;
    refused("detach", &format!("{pid} 1024 plain"), libc::EINVAL)?;
    let cpus = full.cpus() as u64;
    ensure!(
        (plain.stats()?.size, full.stats()?.size) == (1024 * cpus, 2048 * cpus),
        "one attach changed the rings of the other"
    );
    drop(full);
    let left = attached()?;
    ensure!(
        left.contains(&format!("{pid}.plain")) && !left.contains(&pid),
        "attached after one of two was detached: {left:?}"
    );
    let pages = Pages::new(16)?;
    pages.protect(libc::PROT_READ)?;
    let recorded = plain.stats()?.recorded;
    ensure!(recorded >= 2, "{recorded} records of one mprotect()");
    drop(plain);
    refused("detach", &format!("{pid} plain"), libc::ENOENT)
}

fn not_attached() -> Result<()> {
    let pid = std::process::id().to_string();
    refused("detach", &pid, libc::ENOENT)?;
    refused("detach", &format!("{pid} plain"), libc::ENOENT)
}

/// Memory of our own that nobody else changes.
struct Pages {
    start: *mut u8,
    length: usize,
}

impl Pages {
    fn new(count: usize) -> Result<Pages> {
        let length = count * 4096;
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a new mapping, wherever the kernel likes.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, prot, flags, -1, 0) };
        ensure!(
            start != libc::MAP_FAILED,
            "mmap: {}",
            io::Error::last_os_error()
        );
        let pages = Pages {
            start: start.cast(),
            length,
        };
        for page in 0..count {
            // SAFETY: within the mapping, which is writable.
            unsafe { pages.start.add(page * 4096).write_volatile(1) };
        }
        Ok(pages)
    }

    fn protect(&self, prot: i32) -> Result<()> {
        // SAFETY: the mapping is ours, and nobody holds a reference into it.
        let status = unsafe { libc::mprotect(self.start.cast(), self.length, prot) };
        ensure!(status == 0, "mprotect: {}", io::Error::last_os_error());
        Ok(())
    }

    fn discard(&self) -> Result<()> {
        // SAFETY: as in `protect`.
        let status = unsafe { libc::madvise(self.start.cast(), self.length, libc::MADV_DONTNEED) };
        ensure!(status == 0, "madvise: {}", io::Error::last_os_error());
        Ok(())
    }

    /// What was recorded of exactly this mapping.
    fn seen_in(&self, records: &[Record]) -> Vec<(u8, u8, u16)> {
        let (start, end) = (self.start as u64, self.start as u64 + self.length as u64);
        let ours = records
            .iter()
            .filter(|record| (record.start, record.end) == (start, end));
        ours.map(|record| (record.kind, record.event, record.flags))
            .collect()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and gone with this value.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

fn known_sequence() -> Result<()> {
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
    let seen = pages.seen_in(&records);
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

/// Runs `test` in a thread on this CPU.
fn on_cpu(cpu: u32, test: fn() -> Result<()>) -> Result<()> {
    let thread = std::thread::spawn(move || {
        balancing::set_affinity(&[cpu as usize])?;
        test()
    });
    thread.join().unwrap_or_else(|_| bail!("the test panicked"))
}

/// The CPU whose ring is overwritten.
const OVERWRITER: u32 = 1;

/// A ring too small keeps the latest, counts the others, and shows the gap.
fn overwritten() -> Result<()> {
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
    records.retain(|record| record.cpu == OVERWRITER);
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

/// The trace of a process that exits ends with its release and stays until it is detached.
fn after_exit() -> Result<()> {
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

fn load(module: &Path) -> Result<()> {
    let file = File::open(module).with_context(|| module.display().to_string())?;
    // SAFETY: the descriptor is open, the parameter string is empty and static.
    let status =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    ensure!(
        status == 0,
        "loading {}: {}",
        module.display(),
        io::Error::last_os_error()
    );
    Ok(())
}

fn unload() -> Result<()> {
    let name = CString::new(MODULE)?;
    // SAFETY: the name is a valid string for the call.
    let status = unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) };
    ensure!(
        status == 0,
        "unloading {MODULE}: {}",
        io::Error::last_os_error()
    );
    Ok(())
}

/// Unloading detaches; the process goes on, and its trace is gone.
fn unload_while_attached(args: &Args) -> Result<()> {
    let child = child()?;
    write_once("attach", &child.id().to_string())?;
    write_once("attach", &std::process::id().to_string())?;
    write_once("attach", &format!("{} plain", std::process::id()))?;
    unload()?;
    let there = Path::new(ROOT).exists();
    load(&args.module)?;
    end(child)?;
    ensure!(!there, "{ROOT} outlived the module");
    drop(Pages::new(16)?);
    let left = attached()?;
    ensure!(left.len() == 2, "attached after loading anew: {left:?}");
    Ok(())
}

/// Loads, attaches, runs, detaches, unloads; the kernel's memory does not grow.
fn cycles(args: &Args) -> Result<()> {
    // Rings are larger than what the kernel's memory varies by: losing those of one in four attachments would show.
    const RING: u64 = 1 << 12;
    let (mut before, mut size) = (0, 0);
    for cycle in 0..CYCLES {
        if cycle == WARM_UP {
            before = kernel_memory()?;
        }
        if cycle % 10 == 0 {
            diagnostic(&format!("recorder.module.cycles: {cycle} of {CYCLES}"));
        }
        unload()?;
        load(&args.module)?;
        let child = child()?;
        write_once("attach", &format!("{} {RING}", child.id()))?;
        let client = Client::attach_self(RING)?;
        let pages = Pages::new(16)?;
        pages.protect(libc::PROT_READ)?;
        drop(pages);
        ensure!(
            client.stats()?.recorded > 0,
            "cycle {cycle}: nothing recorded"
        );
        size = client.stats()?.size;
        drop(client);
        write_once("detach", &child.id().to_string())?;
        end(child)?;
    }
    let grown = kernel_memory()?.saturating_sub(before);
    let limit = (CYCLES - WARM_UP) as u64 / 4 * size * 64;
    ensure!(
        grown < limit,
        "{CYCLES} cycles: the kernel uses {grown} bytes more, the rings of one in four cycles are {limit}"
    );
    diagnostic(&format!(
        "recorder.module.cycles: the kernel uses {grown} bytes more"
    ));
    Ok(())
}

/// What the kernel uses for itself, in bytes: slab and vmalloc.
fn kernel_memory() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| -> Result<u64> {
        let line = text
            .lines()
            .find(|line| line.starts_with(name))
            .with_context(|| format!("no {name} in meminfo"))?;
        let kib = line
            .split_whitespace()
            .nth(1)
            .context("meminfo: no number")?;
        Ok(kib.parse::<u64>()? * 1024)
    };
    Ok(field("Slab:")? + field("VmallocUsed:")?)
}
