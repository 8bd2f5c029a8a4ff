// SPDX-License-Identifier: GPL-2.0

//! `mmu_notifier_trace`: records every MMU notifier callback of chosen processes.
//!
//! Safe code alone: it may touch its own directory in debugfs, its rings and its subscriptions.
//!
//! In `/sys/kernel/debug/mmu_notifier_trace`:
//!
//! - `attach`: write `PID` or `PID RECORDS` to record that process. `RECORDS` is the size of its
//!   ring for each CPU, a power of two, at most 4194304; 16384 unless given. The pid is looked up in
//!   the writer's pid namespace; the directory gets the number that was written. With `plain` as the
//!   last word, the subscriber has no `numa_protect`, as those that were written before it existed;
//!   its directory is `PID.plain`. A process can have both, to hold one against the other.
//! - `detach`: write `PID`, or `PID plain`, to stop and to throw the trace away.
//! - `PID/trace`: the records of all CPUs as text, one a line, in the order of time. It is read from
//!   beginning to end, by each who opens it.
//! - `PID/stats`: `recorded`, the callbacks seen (for `numa_protect`, the stretches); of these
//!   `overwritten`, those that the rings have no room for any more, and `lost`, those never stored
//!   because a writer was delayed for so long that the others went round the whole ring; `size`,
//!   the room in all rings.
//! - `PID/per_cpu/cpuN/records`: the records of that CPU as [`record::Record`] lays them out; record
//!   `seq` is at offset `seq * 64`. A record that was overwritten or lost reads as kind 0. The first
//!   one that is still there is the one numbered as `overwritten` in `stats`.
//! - `PID/per_cpu/cpuN/stats`: the same as `PID/stats`, of that CPU.
//!
//! What is recorded is an address space: that of all threads of the process, not that of a child.
//! When it ends, because the process exits or calls `execve()`, its `release` is the last record,
//! and the trace stays until it is detached. To record what follows an `execve()`, detach and
//! attach again.
//!
//! An open file holds the module; what is merely attached does not, and is detached when the module
//! is unloaded.

use core::fmt::Write as _;
use kernel::{
    cpu::{
        nr_cpu_ids,
        CpuId, //
    },
    current,
    debugfs::{
        BinaryReader,
        BinaryWriter, //
    },
    fs::file,
    mm::{
        Mm,
        MmWithUser, //
    },
    new_mutex,
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    str::CString,
    sync::{
        Arc,
        Mutex, //
    },
    task::Pid,
    uaccess::{
        UserSliceReader,
        UserSliceWriter, //
    },
};

pub mod debugfs;
pub mod mmu_notifier;
pub mod record;
pub mod ring;
pub mod text;

use debugfs::{
    Dir,
    File,
    Open, //
};
#[cfg(mmu_notifier_numa_protect)]
use mmu_notifier::NumaHints;
use mmu_notifier::{
    support,
    MmuNotifier,
    Range,
    Registration, //
};
use record::{
    event,
    kind,
    Record, //
};
use ring::{
    Entry,
    Merge,
    Merged,
    Slot, //
};
use text::{
    Line,
    Lines,
    Text, //
};

module! {
    type: MmuNotifierTrace,
    name: "mmu_notifier_trace",
    authors: ["The mmu_notifier_trace authors"],
    description: "Records MMU notifier callbacks",
    license: "GPL",
}

const DEFAULT_RECORDS: u64 = 16 * 1024;
const MAX_RECORDS: u64 = 4 * 1024 * 1024;

type Ring = ring::Ring<KVVec<Slot>>;
type Rings = ring::PerCpu<KVVec<Ring>>;

/// Makes empty rings of `size` records, one for each CPU that there can be.
///
/// Checks what there is beforehand, as the allocation alone would have other processes killed.
fn new_rings(size: u64) -> Result<Arc<Rings>> {
    let cpus = nr_cpu_ids() as usize;
    let bytes = (size * size_of::<Slot>() as u64).saturating_mul(cpus as u64);
    if support::available_bytes() < bytes {
        return Err(ENOMEM);
    }

    let size = usize::try_from(size)?;
    let mut rings = KVVec::with_capacity(cpus, GFP_KERNEL)?;
    for _ in 0..cpus {
        let mut slots = KVVec::with_capacity(size, GFP_KERNEL | __GFP_NOWARN)?;
        for _ in 0..size {
            slots.push(Slot::default(), GFP_KERNEL)?;
        }
        rings.push(Ring::new(slots).ok_or(EINVAL)?, GFP_KERNEL)?;
    }
    Ok(Arc::new(Rings::new(rings).ok_or(EINVAL)?, GFP_KERNEL)?)
}

/// The subscriber: writes a record for each callback.
struct Recorder(Arc<Rings>);

impl Recorder {
    fn record(&self, record: Record) {
        let cpu = CpuId::current().as_u32();
        let record = Record {
            time_ns: support::monotonic_ns(),
            cpu,
            tid: current!().pid() as u32,
            comm: support::current_comm(),
            ..record
        };
        self.0.push(cpu as usize, &record.to_words());
    }

    fn record_range(&self, kind: u8, range: &Range) {
        self.record(Record {
            start: range.start() as u64,
            end: range.end() as u64,
            kind,
            event: range.event() as u8,
            flags: u16::from(range.flags() as u8),
            ..Record::default()
        });
    }

    fn record_addresses(&self, kind: u8, start: usize, end: usize) {
        self.record(Record {
            start: start as u64,
            end: end as u64,
            kind,
            event: event::NONE,
            ..Record::default()
        });
    }
}

#[vtable]
impl MmuNotifier for Recorder {
    fn release(&self, _mm: &Mm) {
        self.record_addresses(kind::RELEASE, 0, usize::MAX);
    }

    fn clear_flush_young(&self, _mm: &Mm, start: usize, end: usize) -> bool {
        self.record_addresses(kind::CLEAR_FLUSH_YOUNG, start, end);
        false
    }

    fn clear_young(&self, _mm: &Mm, start: usize, end: usize) -> bool {
        self.record_addresses(kind::CLEAR_YOUNG, start, end);
        false
    }

    fn test_young(&self, _mm: &Mm, address: usize) -> bool {
        self.record_addresses(kind::TEST_YOUNG, address, address + PAGE_SIZE);
        false
    }

    fn invalidate_range_start(&self, range: &Range) {
        self.record_range(kind::INVALIDATE_RANGE_START, range);
    }

    fn invalidate_range_end(&self, range: &Range) {
        self.record_range(kind::INVALIDATE_RANGE_END, range);
    }

    #[cfg(mmu_notifier_numa_protect)]
    fn numa_protect(&self, hints: &NumaHints) {
        let range = hints.range();
        let mut stretches = hints.stretches().peekable();
        let mut position = record::flag::FIRST;

        while let Some((start, end)) = stretches.next() {
            if stretches.peek().is_none() {
                position |= record::flag::LAST;
            }
            self.record(Record {
                start: start as u64,
                end: end as u64,
                kind: kind::NUMA_PROTECT,
                event: range.event() as u8,
                flags: u16::from(range.flags() as u8) | position,
                pages: u32::try_from(hints.nr_pages()).unwrap_or(u32::MAX),
                ..Record::default()
            });
            position = 0;
        }
    }
}

/// The same without `numa_protect`.
struct Plain(Recorder);

#[vtable]
impl MmuNotifier for Plain {
    fn release(&self, mm: &Mm) {
        self.0.release(mm);
    }

    fn clear_flush_young(&self, mm: &Mm, start: usize, end: usize) -> bool {
        self.0.clear_flush_young(mm, start, end)
    }

    fn clear_young(&self, mm: &Mm, start: usize, end: usize) -> bool {
        self.0.clear_young(mm, start, end)
    }

    fn test_young(&self, mm: &Mm, address: usize) -> bool {
        self.0.test_young(mm, address)
    }

    fn invalidate_range_start(&self, range: &Range) {
        self.0.invalidate_range_start(range);
    }

    fn invalidate_range_end(&self, range: &Range) {
        self.0.invalidate_range_end(range);
    }
}

/// What is subscribed: which of the two subscribers.
enum Subscription {
    Full(Pin<KBox<Registration<Recorder>>>),
    Plain(Pin<KBox<Registration<Plain>>>),
}

impl Subscription {
    fn new(name: Name, mm: &MmWithUser, rings: Arc<Rings>) -> Result<Self> {
        let recorder = Recorder(rings);

        Ok(if name.plain {
            Self::Plain(KBox::pin_init(
                Registration::new(mm, Ok(Plain(recorder))),
                GFP_KERNEL,
            )?)
        } else {
            Self::Full(KBox::pin_init(
                Registration::new(mm, Ok(recorder)),
                GFP_KERNEL,
            )?)
        })
    }

    /// The address space, which may have lost its last user since.
    fn mm(&self) -> &Mm {
        match self {
            Self::Full(registration) => registration.mm(),
            Self::Plain(registration) => registration.mm(),
        }
    }
}

/// Tells one target from another: what is written to `attach` and `detach`, and the directory.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Name {
    pid: Pid,
    plain: bool,
}

/// The `records` file of a CPU.
struct Records {
    rings: Arc<Rings>,
    cpu: usize,
}

impl BinaryWriter for Records {
    fn write_to_slice(
        &self,
        writer: &mut UserSliceWriter,
        offset: &mut file::Offset,
    ) -> Result<usize> {
        let ring = &self.rings.rings()[self.cpu];
        let room = writer.len();
        let mut at = u64::try_from(*offset)?;

        while !writer.is_empty() {
            let seq = at / record::SIZE as u64;
            let record = match ring.get(seq) {
                Entry::Stored(words) => Record::from_words(seq, words),
                Entry::Overwritten | Entry::Lost => Record::overwritten(seq, self.cpu as u32),
                Entry::Pending => break,
            };
            let bytes = &record.to_bytes()[at as usize % record::SIZE..];
            let bytes = &bytes[..bytes.len().min(writer.len())];
            writer.write_slice(bytes)?;
            at += bytes.len() as u64;
        }

        *offset = at.try_into()?;
        Ok(room - writer.len())
    }
}

/// The `trace` file.
struct Trace {
    pid: Pid,
    rings: Arc<Rings>,
}

impl Open for Trace {
    type Stream = Text<TraceLines>;

    fn open(&self) -> Result<Pin<KBox<Self::Stream>>> {
        let cpus = self.rings.rings().len();

        Text::new(TraceLines {
            pid: self.pid,
            rings: self.rings.clone(),
            header: 0,
            merge: Merge::new(KVVec::from_elem(0, cpus, GFP_KERNEL)?),
        })
    }
}

/// The lines of the header, then one for each record.
struct TraceLines {
    pid: Pid,
    rings: Arc<Rings>,
    header: u32,
    merge: Merge<KVVec<u64>>,
}

impl Lines for TraceLines {
    fn next_line(&mut self) -> Option<Line> {
        let mut line = Line::EMPTY;
        let rings = &self.rings;

        // Writing to a `Line` cannot fail.
        let _ = match self.header {
            0 => core::writeln!(line, "# tracer: mmu_notifier_trace"),
            1 | 3 => core::writeln!(line, "#"),
            2 => core::writeln!(
                line,
                "# pid {}: records recorded/overwritten/lost: {}/{}/{}   #P:{} rings of {}",
                self.pid,
                rings.total(Ring::recorded),
                rings.total(Ring::overwritten),
                rings.total(Ring::lost),
                rings.rings().len(),
                rings.rings()[0].size(),
            ),
            4 => core::writeln!(
                line,
                "#           COMM-TID     [CPU]    TIMESTAMP: CALLBACK: START-END (PAGES) EVENT FLAGS"
            ),
            5 => core::writeln!(line, "#              | |          |            |"),
            _ => match self.merge.next(rings)? {
                Merged::Stored { seq, words, .. } => {
                    let record = Record::from_words(seq, words);
                    core::writeln!(line, "{}", record.line(PAGE_SHIFT as u32))
                }
                Merged::Missing { cpu, count } => {
                    core::writeln!(line, "CPU:{cpu} [LOST {count} EVENTS]")
                }
            },
        };
        self.header = (self.header + 1).min(6);
        Some(line)
    }
}

/// A `stats` file: of one CPU, or of all.
struct Stats {
    rings: Arc<Rings>,
    cpu: Option<usize>,
}

impl Open for Stats {
    type Stream = Text<StatsLines>;

    fn open(&self) -> Result<Pin<KBox<Self::Stream>>> {
        let rings = self.rings.rings();
        let count = |count: fn(&Ring) -> u64| match self.cpu {
            Some(cpu) => count(&rings[cpu]),
            None => self.rings.total(count),
        };

        Text::new(StatsLines {
            lines: [
                ("recorded", count(Ring::recorded)),
                ("overwritten", count(Ring::overwritten)),
                ("lost", count(Ring::lost)),
                ("size", count(Ring::size)),
            ],
            next: 0,
        })
    }
}

/// The counts when the file was opened.
struct StatsLines {
    lines: [(&'static str, u64); 4],
    next: usize,
}

impl Lines for StatsLines {
    fn next_line(&mut self) -> Option<Line> {
        let (name, value) = self.lines.get(self.next)?;
        let mut line = Line::EMPTY;

        // Writing to a `Line` cannot fail.
        let _ = core::writeln!(line, "{name} {value}");
        self.next += 1;
        Some(line)
    }
}

/// The files of one CPU.
#[pin_data]
struct CpuFiles {
    #[pin]
    records: File<Records>,
    #[pin]
    stats: File<Stats>,
}

impl CpuFiles {
    fn new(dir: &Dir, rings: &Arc<Rings>, cpu: usize) -> Result<Pin<KBox<Self>>> {
        let dir = dir.subdir(&CString::try_from_fmt(fmt!("cpu{cpu}"))?)?;
        let (records, stats) = (
            Records {
                rings: rings.clone(),
                cpu,
            },
            Stats {
                rings: rings.clone(),
                cpu: Some(cpu),
            },
        );

        KBox::pin_init(
            try_pin_init!(Self {
                records <- dir.read_binary_file(c"records", records),
                stats <- dir.read_stream(c"stats", stats),
            }),
            GFP_KERNEL,
        )
    }
}

/// One attached process: its files, which go first, and its subscription.
#[pin_data]
struct Target {
    #[pin]
    trace: File<Trace>,
    #[pin]
    stats: File<Stats>,
    per_cpu: KVec<Pin<KBox<CpuFiles>>>,
    name: Name,
    subscription: Subscription,
}

impl Target {
    fn new(
        name: Name,
        subscription: Subscription,
        rings: Arc<Rings>,
        dir: Dir,
    ) -> Result<Pin<KBox<Self>>> {
        let cpus = dir.subdir(c"per_cpu")?;
        let mut per_cpu = KVec::new();
        for cpu in 0..rings.rings().len() {
            per_cpu.push(CpuFiles::new(&cpus, &rings, cpu)?, GFP_KERNEL)?;
        }
        let (trace, stats) = (
            Trace {
                pid: name.pid,
                rings: rings.clone(),
            },
            Stats { rings, cpu: None },
        );

        KBox::pin_init(
            try_pin_init!(Self {
                trace <- dir.read_stream(c"trace", trace),
                stats <- dir.read_stream(c"stats", stats),
                per_cpu,
                name,
                subscription,
            }),
            GFP_KERNEL,
        )
    }
}

/// The attached processes, and the directory that holds theirs.
#[pin_data]
struct Targets {
    dir: Dir,
    #[pin]
    list: Mutex<KVec<Pin<KBox<Target>>>>,
}

impl Targets {
    /// Starts to record the process `name.pid` into rings of `size` records.
    fn attach(&self, name: Name, size: u64) -> Result {
        // Before the list is locked, so that it is put after the unlocking: the last user of an
        // address space tears it down.
        let mm = support::mm_of_vpid(name.pid)?;
        let mut list = self.list.lock();

        let attached = |target: &Pin<KBox<Target>>| {
            target.name.plain == name.plain
                && (target.name.pid == name.pid || target.subscription.mm().as_raw() == mm.as_raw())
        };
        if list.iter().any(attached) {
            return Err(EEXIST);
        }

        list.reserve(1, GFP_KERNEL)?;
        let rings = new_rings(size)?;
        let suffix = if name.plain { ".plain" } else { "" };
        let dir = CString::try_from_fmt(fmt!("{}{suffix}", name.pid))?;
        let dir = self.dir.subdir(&dir)?;
        let subscription = Subscription::new(name, &mm, rings.clone())?;
        list.push(Target::new(name, subscription, rings, dir)?, GFP_KERNEL)?;
        Ok(())
    }

    /// Stops recording `name`, and throws its trace away.
    fn detach(&self, name: Name) -> Result {
        let mut list = self.list.lock();
        let index = list.iter().position(|target| target.name == name);

        // Dropped under the lock: until the directory is gone its name is not free.
        drop(list.remove(index.ok_or(ENOENT)?).map_err(|_| ENOENT)?);
        Ok(())
    }
}

/// What is written to `attach` or `detach`: a pid, maybe a number, maybe `plain`.
fn read_request(reader: &mut UserSliceReader) -> Result<(Name, Option<u64>)> {
    let mut text = [0; 64];
    let len = reader.len();
    let text = text.get_mut(..len).ok_or(EINVAL)?;
    reader.read_slice(text)?;

    let text = core::str::from_utf8(text).map_err(|_| EINVAL)?;
    let mut words = text.split_ascii_whitespace().peekable();
    let number = |word: &str| {
        word.parse::<u64>().map_err(|error| match error.kind() {
            core::num::IntErrorKind::PosOverflow => ERANGE,
            _ => EINVAL,
        })
    };

    let pid = number(words.next().ok_or(EINVAL)?)?;
    let pid = Pid::try_from(pid).map_err(|_| ERANGE)?;
    let records = words.next_if(|word| *word != "plain");
    let records = records.map(number).transpose()?;
    let plain = words.next_if_eq(&"plain").is_some();
    match words.next() {
        None => Ok((Name { pid, plain }, records)),
        Some(_) => Err(EINVAL),
    }
}

/// The `attach` file.
struct Attach(Arc<Targets>);

impl BinaryReader for Attach {
    fn read_from_slice(
        &self,
        reader: &mut UserSliceReader,
        _offset: &mut file::Offset,
    ) -> Result<usize> {
        let len = reader.len();
        let (name, records) = read_request(reader)?;
        let records = records.unwrap_or(DEFAULT_RECORDS);

        if !records.is_power_of_two() || records > MAX_RECORDS {
            return Err(EINVAL);
        }
        self.0.attach(name, records)?;
        Ok(len)
    }
}

/// The `detach` file.
struct Detach(Arc<Targets>);

impl BinaryReader for Detach {
    fn read_from_slice(
        &self,
        reader: &mut UserSliceReader,
        _offset: &mut file::Offset,
    ) -> Result<usize> {
        let len = reader.len();
        let (name, None) = read_request(reader)? else {
            return Err(EINVAL);
        };

        self.0.detach(name)?;
        Ok(len)
    }
}

/// The module: dropping it removes the two files, then the targets.
#[pin_data]
struct MmuNotifierTrace {
    #[pin]
    attach: File<Attach>,
    #[pin]
    detach: File<Detach>,
}

impl kernel::InPlaceModule for MmuNotifierTrace {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(|| {
            let dir = Dir::new(c"mmu_notifier_trace")?;
            let targets_dir = dir.clone();
            let targets = Arc::pin_init(
                pin_init!(Targets {
                    list <- new_mutex!(KVec::new()),
                    dir: targets_dir,
                }),
                GFP_KERNEL,
            )?;

            Ok(try_pin_init!(Self {
                attach <- dir.write_binary_file(c"attach", Attach(targets.clone())),
                detach <- dir.write_binary_file(c"detach", Detach(targets)),
            }))
        })
    }
}
