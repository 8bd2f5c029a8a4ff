// SPDX-License-Identifier: GPL-2.0

//! The files of a target in debugfs, which `mmu_notifier_trace.rs` describes.
//!
//! Safe code alone; it may touch its own directory and what is recorded of the target.

use core::fmt::{
    self,
    Write as _, //
};
use kernel::{
    debugfs::{
        BinaryReader,
        BinaryWriter, //
    },
    fs::file,
    page::PAGE_SHIFT,
    prelude::*,
    str::CString,
    sync::Arc,
    task::Pid,
    uaccess::{
        UserSliceReader,
        UserSliceWriter, //
    },
};

use crate::{
    debugfs::{
        Dir,
        File,
        Open, //
    },
    filter::Filter,
    record::{
        self,
        Record, //
    },
    recorder::{
        Log,
        Ring, //
    },
    ring::{
        Entry,
        Merge,
        Merged, //
    },
    text::{
        Line,
        Lines,
        Text, //
    },
};

/// The `records` file of a CPU.
struct Records {
    log: Arc<Log>,
    cpu: usize,
}

impl BinaryWriter for Records {
    fn write_to_slice(
        &self,
        writer: &mut UserSliceWriter,
        offset: &mut file::Offset,
    ) -> Result<usize> {
        let ring = &self.log.rings.rings()[self.cpu];
        let room = writer.len();
        let mut at = u64::try_from(*offset)?;

        while !writer.is_empty() {
            let seq = at / record::SIZE as u64;
            let record = match ring.get(seq) {
                Entry::Stored(words) => Record::from_words(seq, words),
                Entry::Overwritten | Entry::Lost => Record::overwritten(seq, self.cpu as u32),
                Entry::Dropped | Entry::Pending => break,
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
    log: Arc<Log>,
}

impl Open for Trace {
    type Stream = Text<TraceLines>;

    fn open(&self) -> Result<Pin<KBox<Self::Stream>>> {
        let cpus = self.log.rings.rings().len();

        Text::new(TraceLines {
            pid: self.pid,
            log: self.log.clone(),
            header: 0,
            merge: Merge::new(KVVec::from_elem(0, cpus, GFP_KERNEL)?),
        })
    }
}

/// The lines of the header, then one for each record.
struct TraceLines {
    pid: Pid,
    log: Arc<Log>,
    header: u32,
    merge: Merge<KVVec<u64>>,
}

impl Lines for TraceLines {
    fn next_line(&mut self) -> Option<Line> {
        let mut line = Line::EMPTY;
        let rings = &self.log.rings;

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

/// Text that is made when a file is opened.
pub struct Fixed<const LINES: usize> {
    lines: [Line; LINES],
    next: usize,
}

impl<const LINES: usize> Fixed<LINES> {
    fn open(lines: [Line; LINES]) -> Result<Pin<KBox<Text<Self>>>> {
        Text::new(Self { lines, next: 0 })
    }
}

impl<const LINES: usize> Lines for Fixed<LINES> {
    fn next_line(&mut self) -> Option<Line> {
        let line = self.lines.get(self.next)?;
        self.next += 1;
        Some(*line)
    }
}

/// A line with this text.
fn line(text: fmt::Arguments<'_>) -> Line {
    let mut line = Line::EMPTY;
    // Writing to a `Line` cannot fail.
    let _ = core::writeln!(line, "{text}");
    line
}

/// A `stats` file: of one CPU, or of all.
struct Stats {
    log: Arc<Log>,
    cpu: Option<usize>,
}

impl Open for Stats {
    type Stream = Text<Fixed<5>>;

    fn open(&self) -> Result<Pin<KBox<Self::Stream>>> {
        let count = |count: fn(&Ring) -> u64| match self.cpu {
            Some(cpu) => count(&self.log.rings.rings()[cpu]),
            None => self.log.rings.total(count),
        };

        Fixed::open([
            line(format_args!("recorded {}", count(Ring::recorded))),
            line(format_args!("overwritten {}", count(Ring::overwritten))),
            line(format_args!("dropped {}", count(Ring::dropped))),
            line(format_args!("lost {}", count(Ring::lost))),
            line(format_args!("size {}", count(Ring::size))),
        ])
    }
}

/// The `size` file: room for records of each CPU.
struct Size(Arc<Log>);

impl Open for Size {
    type Stream = Text<Fixed<1>>;

    fn open(&self) -> Result<Pin<KBox<Self::Stream>>> {
        Fixed::open([line(format_args!("{}", self.0.rings.rings()[0].size()))])
    }
}

/// The `version` file, of the layout of records.
pub struct Version;

impl Open for Version {
    type Stream = Text<Fixed<1>>;

    fn open(&self) -> Result<Pin<KBox<Self::Stream>>> {
        Fixed::open([line(format_args!("{}", record::VERSION))])
    }
}

/// What is written at once, as text.
///
/// # Errors
///
/// `E2BIG`: more than there is room for. `EINVAL`: not UTF-8. `EFAULT`.
pub fn read_text<'a>(reader: &mut UserSliceReader, room: &'a mut [u8]) -> Result<&'a str> {
    let text = room.get_mut(..reader.len()).ok_or(E2BIG)?;
    reader.read_slice(text)?;
    core::str::from_utf8(text).map_err(|_| EINVAL)
}

/// The `enabled` file: whether anything is recorded.
struct Enabled(Arc<Log>);

impl Open for Enabled {
    type Stream = Text<Fixed<1>>;

    fn open(&self) -> Result<Pin<KBox<Self::Stream>>> {
        let on = u8::from(self.0.gate.is_enabled());
        Fixed::open([line(format_args!("{on}"))])
    }
}

impl BinaryReader for Enabled {
    fn read_from_slice(
        &self,
        reader: &mut UserSliceReader,
        _offset: &mut file::Offset,
    ) -> Result<usize> {
        let len = reader.len();
        match read_text(reader, &mut [0; 8])?.trim_ascii() {
            "0" => self.0.gate.enable(false),
            "1" => self.0.gate.enable(true),
            _ => return Err(EINVAL),
        }
        Ok(len)
    }
}

/// The `filter` file, see [`Filter`].
struct Filtered(Arc<Log>);

impl Open for Filtered {
    type Stream = Text<Fixed<1>>;

    fn open(&self) -> Result<Pin<KBox<Self::Stream>>> {
        Fixed::open([line(format_args!("{}", self.0.gate.filter()))])
    }
}

impl BinaryReader for Filtered {
    fn read_from_slice(
        &self,
        reader: &mut UserSliceReader,
        _offset: &mut file::Offset,
    ) -> Result<usize> {
        let len = reader.len();
        let filter = Filter::parse(read_text(reader, &mut [0; 512])?);

        self.0.gate.set_filter(filter.ok_or(EINVAL)?);
        Ok(len)
    }
}

/// The `marker` file: text that goes among the records.
struct Marker(Arc<Log>);

impl BinaryReader for Marker {
    fn read_from_slice(
        &self,
        reader: &mut UserSliceReader,
        _offset: &mut file::Offset,
    ) -> Result<usize> {
        let len = reader.len();
        let mut room = [0; 1024];
        let text = room.get_mut(..len).ok_or(E2BIG)?;
        reader.read_slice(text)?;
        if !self.0.gate.is_enabled() {
            return Err(EBADF);
        }

        let mut parts = text
            .trim_ascii_end()
            .chunks(Record::MARKER_BYTES)
            .peekable();
        let mut position = record::flag::FIRST;
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                position |= record::flag::LAST;
            }
            self.0.record(Record::marker(part, position));
            position = 0;
        }
        Ok(len)
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
    fn new(dir: &Dir, log: &Arc<Log>, cpu: usize) -> Result<Pin<KBox<Self>>> {
        let dir = dir.subdir(&CString::try_from_fmt(fmt!("cpu{cpu}"))?)?;
        let (records, stats) = (
            Records {
                log: log.clone(),
                cpu,
            },
            Stats {
                log: log.clone(),
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

/// The files of a target.
#[pin_data]
pub struct Files {
    #[pin]
    trace: File<Trace>,
    #[pin]
    stats: File<Stats>,
    #[pin]
    size: File<Size>,
    #[pin]
    enabled: File<Enabled>,
    #[pin]
    filter: File<Filtered>,
    #[pin]
    marker: File<Marker>,
    per_cpu: KVec<Pin<KBox<CpuFiles>>>,
}

impl Files {
    /// Makes them in `dir`, for the process that has this number there.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn new(dir: &Dir, pid: Pid, log: &Arc<Log>) -> Result<Pin<KBox<Self>>> {
        let cpus = dir.subdir(c"per_cpu")?;
        let mut per_cpu = KVec::new();
        for cpu in 0..log.rings.rings().len() {
            per_cpu.push(CpuFiles::new(&cpus, log, cpu)?, GFP_KERNEL)?;
        }
        let (trace, stats) = (
            Trace {
                pid,
                log: log.clone(),
            },
            Stats {
                log: log.clone(),
                cpu: None,
            },
        );

        KBox::pin_init(
            try_pin_init!(Self {
                trace <- dir.read_stream(c"trace", trace),
                stats <- dir.read_stream(c"stats", stats),
                size <- dir.read_stream(c"size", Size(log.clone())),
                enabled <- dir.read_write_stream(c"enabled", Enabled(log.clone())),
                filter <- dir.read_write_stream(c"filter", Filtered(log.clone())),
                marker <- dir.write_binary_file(c"marker", Marker(log.clone())),
                per_cpu,
            }),
            GFP_KERNEL,
        )
    }
}
