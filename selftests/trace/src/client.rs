// SPDX-License-Identifier: GPL-2.0
//! A client of the recorder's debugfs files; touches nothing else.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::record::{kind, Record, SIZE, VERSION};
use crate::sequence::{in_order, Sequence};

/// Where the recorder's files are.
pub const ROOT: &str = "/sys/kernel/debug/mmu_notifier_trace";
/// Records fetched by one read.
const BATCH: usize = 1024;

/// The recorder, attached to a process, and detached when dropped.
pub struct Client {
    /// What `detach` is told.
    name: String,
    folder: PathBuf,
    cpus: Vec<Cpu>,
}

/// The records of one CPU.
struct Cpu {
    file: File,
    /// The sequence number to read on from, and the time of the record before.
    next: u64,
    time_ns: u64,
}

/// The recorder's own counts, in records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Callbacks seen.
    pub recorded: u64,
    /// Records that later ones took the place of.
    pub overwritten: u64,
    /// Records that full rings did not take.
    pub dropped: u64,
    /// Records that were never stored.
    pub lost: u64,
    /// Room in the rings.
    pub size: u64,
}

/// Whether the recorder is there.
pub fn is_loaded() -> bool {
    Path::new(ROOT).join("attach").exists()
}

impl Client {
    /// Attaches the recorder to the calling process with room for `size` records of each CPU, a power of two.
    pub fn attach_self(size: u64) -> io::Result<Client> {
        Client::attach(std::process::id(), &size.to_string())
    }

    /// The same, with a subscriber that has no `numa_protect`. The other one may be attached, too.
    pub fn attach_self_plain(size: u64) -> io::Result<Client> {
        Client::attach(std::process::id(), &format!("{size} plain"))
    }

    /// Attaches the recorder to the process `pid`, with `words` as the recorder's file `attach` takes them after the pid.
    pub fn attach(pid: u32, words: &str) -> io::Result<Client> {
        let version = named(&Path::new(ROOT).join("version"), |path| {
            fs::read_to_string(path)
        })?;
        if version.trim() != VERSION.to_string() {
            let version = version.trim();
            return Err(io::Error::other(format!(
                "{ROOT}/version: records of layout {version}, and this reads layout {VERSION}: take program and module of one build"
            )));
        }
        let (name, folder) = match words.split_ascii_whitespace().any(|word| word == "plain") {
            true => (format!("{pid} plain"), format!("{pid}.plain")),
            false => (pid.to_string(), pid.to_string()),
        };
        let request = format!("{pid} {words}");
        let root = Path::new(ROOT);
        named(&root.join("attach"), |path| fs::write(path, request))?;
        let folder = root.join(folder);
        // From here on, it is detached if anything fails.
        let mut client = Client {
            name,
            folder,
            cpus: Vec::new(),
        };
        while client.per_cpu(client.cpus.len()).exists() {
            let path = client.per_cpu(client.cpus.len()).join("records");
            client.cpus.push(Cpu {
                file: named(&path, |path| File::open(path))?,
                next: 0,
                time_ns: 0,
            });
        }
        Ok(client)
    }

    /// The path of a file of the target.
    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    fn per_cpu(&self, cpu: usize) -> PathBuf {
        self.folder.join(format!("per_cpu/cpu{cpu}"))
    }

    /// How many CPUs there can be.
    pub fn cpus(&self) -> usize {
        self.cpus.len()
    }

    /// Adds to `records` all that has been recorded since the last call, and keeps them in the order of time. Those that are
    /// missing are there as [`kind::OVERWRITTEN`].
    pub fn read_new(&mut self, records: &mut Vec<Record>) -> io::Result<()> {
        self.read_at_most(u64::MAX, records)
    }

    /// The same, but of each CPU so many records at the most.
    pub fn read_at_most(&mut self, most: u64, records: &mut Vec<Record>) -> io::Result<()> {
        let old = records.len();
        for cpu in 0..self.cpus.len() {
            // Not what comes while this reads: writers may be faster.
            let recorded = stats(&self.per_cpu(cpu).join("stats"))?.recorded;
            let end = recorded.min(self.cpus[cpu].next.saturating_add(most));
            self.read_cpu(cpu, end, records)?;
        }
        // A writer may have been interrupted between taking the time and storing the record.
        let oldest = records[old..].iter().map(|record| record.time_ns).min();
        let oldest = oldest.unwrap_or(u64::MAX);
        let settled = records[..old].partition_point(|record| record.time_ns <= oldest);
        records[settled..].sort_by_key(in_order);
        Ok(())
    }

    fn read_cpu(&mut self, cpu: usize, end: u64, records: &mut Vec<Record>) -> io::Result<()> {
        let path = self.per_cpu(cpu).join("records");
        let cpu = &mut self.cpus[cpu];
        let mut bytes = vec![0; BATCH * SIZE];
        loop {
            let room = end.saturating_sub(cpu.next).min(BATCH as u64) as usize * SIZE;
            let read = cpu
                .file
                .read_at(&mut bytes[..room], cpu.next * SIZE as u64)?;
            let whole = bytes[..read].chunks_exact(SIZE);
            if !whole.remainder().is_empty() {
                let problem = format!("{}: half a record at {}", path.display(), cpu.next);
                return Err(io::Error::other(problem));
            }
            if whole.len() == 0 {
                return Ok(());
            }
            cpu.next += whole.len() as u64;
            for one in whole {
                let one = one.try_into().expect("a chunk is as long as a record");
                let mut record = Record::from_bytes(one);
                if record.kind == kind::OVERWRITTEN {
                    record.time_ns = cpu.time_ns;
                }
                cpu.time_ns = record.time_ns;
                records.push(record);
            }
        }
    }

    /// All of `records` and what has been recorded since the last call. Waits, for `limit` at the most, until every start
    /// among them has its end: another thread, or the kernel's, may be about to end what it has begun.
    pub fn settle(&mut self, mut records: Vec<Record>, limit: Duration) -> io::Result<Sequence> {
        let begun = Instant::now();
        loop {
            self.read_new(&mut records)?;
            let of_kind = |kind| records.iter().filter(|record| record.kind == kind).count();
            let open = of_kind(kind::INVALIDATE_RANGE_START) != of_kind(kind::INVALIDATE_RANGE_END);
            if !open || begun.elapsed() > limit {
                return Ok(Sequence::new(records));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The recorder's counts.
    pub fn stats(&self) -> io::Result<Stats> {
        stats(&self.folder.join("stats"))
    }

    /// Copies the readable trace to the file `to`.
    pub fn copy_trace(&self, to: &Path) -> io::Result<()> {
        let mut trace = named(&self.folder.join("trace"), |path| File::open(path))?;
        let mut out = io::BufWriter::with_capacity(1 << 18, named(to, |path| File::create(path))?);
        io::copy(&mut trace, &mut out)?;
        io::Write::flush(&mut out)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = detach(&self.name);
    }
}

/// What a file `stats` says.
fn stats(path: &Path) -> io::Result<Stats> {
    let text = named(path, |path| fs::read_to_string(path))?;
    let field = |name: &str| {
        text.lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(key, _)| *key == name)
            .and_then(|(_, value)| value.trim().parse().ok())
            .ok_or_else(|| io::Error::other(format!("{}: no {name}", path.display())))
    };
    Ok(Stats {
        recorded: field("recorded")?,
        overwritten: field("overwritten")?,
        dropped: field("dropped")?,
        lost: field("lost")?,
        size: field("size")?,
    })
}

fn detach(name: &str) -> io::Result<()> {
    fs::write(Path::new(ROOT).join("detach"), name)
}

/// Does something to the file at `path`, and names it if that fails.
fn named<T>(path: &Path, action: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    action(path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}
