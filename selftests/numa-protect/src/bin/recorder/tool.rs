// SPDX-License-Identifier: GPL-2.0
//! The tool mmu-notifier-trace on processes of this program's: what it records, shows and refuses.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use anyhow::{ensure, Context, Result};
use guest::balancing::{self, CPU_NODE};
use guest::memory::{Backing, GuestMemory, Pinned};
use guest::vm::{Sweep, Vm};
use guest::PAGE;
use trace::record::kind;
use trace::saved;

use crate::{attached, child, end, write_once, Args};

/// A folder of its own, gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Folder> {
        let path = std::env::temp_dir().join(format!("tool.{}", std::process::id()));
        fs::create_dir_all(&path)?;
        Ok(Folder(path))
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs the tool, and gives what it wrote.
fn run(args: &Args, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(&args.tool);
    let command = command.args(arguments).stdin(Stdio::null());
    command
        .output()
        .with_context(|| args.tool.display().to_string())
}

/// The same where it must end with `code`; gives standard output and standard error.
fn ends(args: &Args, arguments: &[&str], code: i32) -> Result<(String, String)> {
    let output = run(args, arguments)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    ensure!(
        output.status.code() == Some(code),
        "{arguments:?} ends with {}, not {code}: {err}",
        output.status
    );
    Ok((out, err))
}

/// A command from its first instruction to its end, and all that can be made of it.
pub fn command(args: &Args) -> Result<()> {
    let folder = Folder::new()?;
    let file = folder.file("command");
    let own = std::env::current_exe()?.display().to_string();
    ends(args, &["record", "-o", &file, "--", &own, "--wait"], 0)?;
    let (about, sequence) = saved::read(Path::new(&file))?;
    let stats = about.stats.context("no counts")?;
    let (first, last) = (sequence.records.first(), sequence.records.last());
    ensure!(
        last.is_some_and(|last| last.kind == kind::RELEASE),
        "the last record is {last:?}"
    );
    ensure!(
        first.is_some_and(|first| first.kind == kind::INVALIDATE_RANGE_START),
        "the first record is {first:?}"
    );
    ensure!(
        stats.recorded == sequence.records.len() as u64 && stats.lost == 0,
        "{} records of {stats:?}",
        sequence.records.len()
    );
    ensure!(
        about.command.ends_with("--wait"),
        "command {}",
        about.command
    );

    let (rules, _) = ends(args, &["check", &file], 0)?;
    ensure!(rules.matches("ok: ").count() == 5, "{rules}");
    let (lines, _) = ends(args, &["report", &file], 0)?;
    let records = lines.lines().filter(|line| !line.starts_with('#'));
    ensure!(records.count() == sequence.records.len(), "{lines}");
    let (lines, _) = ends(
        args,
        &["report", "--json", "--filter", "callback=release", &file],
        0,
    )?;
    let object: serde_json::Value = serde_json::from_str(&lines).context("one release")?;
    ensure!(object["kind"] == "release", "{object}");
    let (lines, _) = ends(args, &["report", "--summary", &file], 0)?;
    ensure!(lines.contains("invalidate_range_start unmap"), "{lines}");
    let svg = folder.file("svg");
    ends(args, &["timeline", "-o", &svg, &file], 0)?;
    let svg = fs::read_to_string(svg)?;
    ensure!(svg.contains("<rect") && svg.contains("</svg>"), "{svg}");

    // A trace with a record less is seen, and one that ends in the middle of a record is refused.
    let mut bytes = fs::read(&file)?;
    let at = bytes.len() - 2 * 64;
    bytes.drain(at..at + 64);
    let less = folder.file("less");
    fs::write(&less, &bytes)?;
    let (rules, _) = ends(args, &["check", &less], 1)?;
    ensure!(rules.contains("broken: no record is missing"), "{rules}");
    fs::write(&less, &bytes[..bytes.len() - 1])?;
    let (_, error) = ends(args, &["report", &less], 2)?;
    ensure!(error.contains("in the middle of a record"), "{error}");
    Ok(())
}

/// A process that runs already, and what is refused, each with a sentence that names it.
pub fn process(args: &Args) -> Result<()> {
    let folder = Folder::new()?;
    let file = folder.file("process");
    let target = child()?;
    let pid = target.id().to_string();
    let before = attached()?;
    let record = ["record", "-o", &file, "--pid", &pid];
    ends(
        args,
        &[&record[..], &["--duration", "0.2", "-f", "numa"]].concat(),
        0,
    )?;
    let (about, sequence) = saved::read(Path::new(&file))?;
    ensure!(about.filter == "numa", "filter {}", about.filter);
    ensure!(sequence.records.is_empty(), "{:?}", sequence.records);
    let bytes = fs::read(&file)?;
    let (_, error) = ends(args, &record, 2)?;
    ensure!(error.contains("is there already"), "{error}");
    ensure!(
        fs::read(&file)? == bytes,
        "a file that was there was changed"
    );

    let other = folder.file("other");
    write_once("attach", &pid)?;
    let attach = ["record", "-o", &other, "-d", "0.1", "-p"];
    let (_, error) = ends(args, &[&attach[..], &[&pid]].concat(), 2)?;
    ensure!(error.contains("EEXIST"), "{error}");
    write_once("detach", &pid)?;
    end(target)?;
    let (_, error) = ends(args, &[&attach[..], &[&pid]].concat(), 2)?;
    ensure!(error.contains(&pid) && error.contains("ESRCH"), "{error}");
    let (_, error) = ends(args, &["record", "-o", &other, "-f", "numb", "-p", "1"], 2)?;
    ensure!(error.contains("callback="), "{error}");
    let (_, error) = ends(args, &["record", "-o", &other, "--", "/no/such"], 2)?;
    ensure!(error.contains("/no/such"), "{error}");
    ensure!(
        !Path::new(&other).exists(),
        "a file though nothing was recorded"
    );
    let own = std::env::current_exe()?.display().to_string();
    let (_, error) = ends(args, &["record", "-o", &other, "--", &own, "--no-such"], 2)?;
    ensure!(
        error.contains("unexpected argument"),
        "the command's own: {error}"
    );
    ensure!(attached()? == before, "something is still attached");
    Ok(())
}

/// Two tables of a process, and none of one that is not there.
pub fn stat(args: &Args) -> Result<()> {
    let target = child()?;
    let pid = target.id().to_string();
    let (tables, _) = ends(args, &["stat", "-p", &pid, "-i", "0.1", "-c", "2"], 0)?;
    let rows = tables.lines().filter(|line| line.trim().starts_with(&pid));
    ensure!(rows.count() == 2 && tables.contains("hinted"), "{tables}");
    end(target)?;
    let (_, error) = ends(args, &["stat", "-p", &pid, "-c", "1"], 2)?;
    ensure!(error.contains(&pid), "{error}");
    Ok(())
}

/// Memory of a guest in bytes, and the pages of it that are discarded.
const GUEST: usize = 4 << 20;
const DISCARDED: Range<usize> = 0x100..0x180;

/// A VM: what is told of its memory is shown with the guest pages that lie there.
pub fn guest(args: &Args) -> Result<()> {
    let folder = Folder::new()?;
    let file = folder.file("guest");
    let own = std::env::current_exe()?.display().to_string();
    ends(args, &["record", "-o", &file, "--", &own, "--guest"], 0)?;
    let (lines, _) = ends(args, &["report", "--json", &file], 0)?;
    let objects: Vec<serde_json::Value> = lines
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()
        .context("a line for each record")?;
    let slot = objects.iter().find(|one| one["slot"]["id"] == 0);
    let slot = slot.with_context(|| format!("no memory slot 0: {lines}"))?;
    let start = slot["start"].as_u64().context("no start")?;
    ensure!(slot["end"] == start + GUEST as u64, "{slot}");
    let discarded = objects.iter().find(|one| {
        one["event"] == "clear" && one["start"] == start + (DISCARDED.start * PAGE) as u64
    });
    let discarded = discarded.context("discarding memory was not recorded")?;
    let expected = serde_json::json!([
        { "vm": 0, "slot": 0, "gfn": DISCARDED.start, "pages": DISCARDED.len() }
    ]);
    ensure!(discarded["guest"] == expected, "{discarded}");
    let (text, _) = ends(args, &["report", &file], 0)?;
    ensure!(text.contains(" slot=0 gfn=100-180"), "{text}");
    let (rules, _) = ends(args, &["check", &file], 0)?;
    ensure!(rules.matches("ok: ").count() == 5, "{rules}");
    Ok(())
}

/// As the process that is recorded.
pub fn be_guest() -> Result<()> {
    let memory = Arc::new(GuestMemory::new(
        Backing::Anon,
        Pinned::None,
        GUEST,
        CPU_NODE,
    )?);
    let vm = Vm::new(&memory, &balancing::vcpu_cpus(1)?)?;
    let whole = Sweep {
        first: 0,
        stride: 1,
        count: memory.pages(),
    };
    vm.pass(0, whole)?;
    let start = memory.addresses().start as usize + DISCARDED.start * PAGE;
    // SAFETY: guest memory, which Rust holds no reference into; no vCPU runs.
    let rc = unsafe { libc::madvise(start as *mut _, DISCARDED.len() * PAGE, libc::MADV_DONTNEED) };
    ensure!(rc == 0, "madvise(): {}", std::io::Error::last_os_error());
    Ok(())
}
