// SPDX-License-Identifier: GPL-2.0
//! Memory slots of VMs: watches a process set them, and tells which guest pages lie at an address. Makes an event and an
//! instance in tracefs while it watches, and reads what comes of them.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use trace::record::{Record, Slot};

const TRACEFS: &str = "/sys/kernel/tracing";
/// What KVM calls for each slot that user space sets, whose second argument has the layout of the ioctl's
/// (`struct kvm_userspace_memory_region2`).
const FUNCTION: &str = "kvm_set_memory_region";
const ARGUMENTS: &str =
    "vm=$arg1:x64 slot=+0($arg2):u32 gpa=+8($arg2):x64 size=+16($arg2):x64 hva=+24($arg2):x64";

/// Watches what a process tells KVM of its memory.
pub struct Watch {
    pipe: File,
    /// What was read of a line that has not come to its end.
    rest: String,
    lines: Lines,
    _made: Made,
}

impl Watch {
    /// Of process `pid` and the threads that it will have.
    pub fn start(pid: u32, page_size: u64) -> Result<Watch> {
        let name = format!("mmu_notifier_trace_{}", std::process::id());
        let event = format!("{name}/slot");
        let define = format!("p:{event} {FUNCTION} {ARGUMENTS}");
        let events = Path::new(TRACEFS).join("kprobe_events");
        append(&events, &define).with_context(|| format!("{}: {define}", events.display()))?;
        // From here on, what was made is removed if anything fails.
        let made = Made {
            instance: Path::new(TRACEFS).join("instances").join(&name),
            event,
        };
        fs::create_dir(&made.instance).with_context(|| made.instance.display().to_string())?;
        let threads = fs::read_dir(format!("/proc/{pid}/task")).context("its threads")?;
        let threads: Vec<String> = threads
            .map(|thread| Ok(thread?.file_name().to_string_lossy().into_owned()))
            .collect::<io::Result<_>>()?;
        for (file, value) in [
            ("trace_clock".into(), "mono"),
            ("options/event-fork".into(), "1"),
            ("set_event_pid".into(), threads.join(" ").as_str()),
            (format!("events/{}/enable", made.event), "1"),
        ] {
            let path = made.instance.join(file);
            fs::write(&path, value).with_context(|| path.display().to_string())?;
        }
        let pipe = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(made.instance.join("trace_pipe"))
            .context("trace_pipe")?;
        Ok(Watch {
            pipe,
            rest: String::new(),
            lines: Lines::new(page_size),
            _made: made,
        })
    }

    /// What has been set since the last call.
    pub fn read_new(&mut self) -> Result<Vec<Record>> {
        let mut bytes = vec![0; 1 << 16];
        loop {
            match self.pipe.read(&mut bytes) {
                Ok(0) => break,
                Ok(read) => self.rest += &String::from_utf8_lossy(&bytes[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("trace_pipe"),
            }
        }
        let end = self.rest.rfind('\n').map_or(0, |at| at + 1);
        let whole: String = self.rest.drain(..end).collect();
        whole.lines().map(|line| self.lines.record(line)).collect()
    }
}

/// The event and the instance in tracefs.
struct Made {
    instance: PathBuf,
    event: String,
}

impl Drop for Made {
    fn drop(&mut self) {
        match fs::remove_dir(&self.instance) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                eprintln!("{}: not removed: {error}", self.instance.display());
            }
            _ => {}
        }
        let remove = format!("-:{}", self.event);
        if let Err(error) = append(&Path::new(TRACEFS).join("kprobe_events"), &remove) {
            eprintln!("kprobe_events: {remove}: {error}");
        }
    }
}

/// A line to a file that takes lines as commands.
fn append(path: &Path, line: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().append(true).open(path)?;
    file.write_all(format!("{line}\n").as_bytes())
}

/// Makes records of the event's lines.
struct Lines {
    page_size: u64,
    /// The VMs, as the kernel tells them from each other.
    vms: Vec<u64>,
    records: u64,
}

impl Lines {
    fn new(page_size: u64) -> Lines {
        Lines {
            page_size,
            vms: Vec::new(),
            records: 0,
        }
    }

    /// Of a line such as
    ///
    /// ```text
    ///   qemu-312  [001] .....  25.123456: slot: (kvm_set_memory_region+0x4/0x6e0) vm=0xffff88800a slot=0 gpa=0x0 size=0x8000 hva=0x7f00
    /// ```
    fn record(&mut self, line: &str) -> Result<Record> {
        let parsed = || {
            let (before, fields) = line.split_once(": slot: ")?;
            let time = before.split_whitespace().next_back()?;
            let (seconds, micros) = time.split_once('.')?;
            let time_ns =
                (seconds.parse::<u64>().ok()? * 1_000_000 + micros.parse::<u64>().ok()?) * 1000;
            let (task, _) = before.rsplit_once('[')?;
            let tid = task.trim_end().rsplit_once('-')?.1.parse().ok()?;
            let field = |name: &str| {
                let value = fields
                    .split_whitespace()
                    .find_map(|word| word.strip_prefix(name))?;
                match value.strip_prefix("0x") {
                    Some(digits) => u64::from_str_radix(digits, 16).ok(),
                    None => value.parse().ok(),
                }
            };
            Some((
                time_ns,
                tid,
                ["vm=", "slot=", "gpa=", "size=", "hva="].map(field),
            ))
        };
        let (time_ns, tid, fields) = parsed().with_context(|| format!("trace_pipe: {line}"))?;
        let [Some(vm), Some(id), Some(gpa), Some(size), Some(hva)] = fields else {
            anyhow::bail!("trace_pipe: {line}");
        };
        let known = self.vms.iter().position(|one| *one == vm);
        let vm = known.unwrap_or_else(|| {
            self.vms.push(vm);
            self.vms.len() - 1
        });
        let slot = Slot {
            vm: vm as u64,
            id: id as u32,
            gfn: gpa / self.page_size,
        };
        let seq = self.records;
        self.records += 1;
        Ok(Record {
            seq,
            time_ns,
            tid,
            // Of no CPU: those number their own records.
            cpu: u32::MAX,
            ..Record::memory_slot(slot, hva, hva + size)
        })
    }
}

/// Which guest pages lie at which addresses, as records tell.
#[derive(Default)]
pub struct Slots(BTreeMap<(u64, u32), (Range<u64>, u64)>);

/// A part of a memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The slot, from whose first page on `gfn` is counted.
    pub slot: Slot,
    /// Guest frame numbers: the first, and that after the last.
    pub first: u64,
    /// See `first`.
    pub end: u64,
}

impl Slots {
    /// Takes note, if it is a record of a slot.
    pub fn see(&mut self, record: &Record) {
        if let Some(Slot { vm, id, gfn }) = record.slot() {
            match record.start == record.end {
                true => self.0.remove(&(vm, id)),
                false => self.0.insert((vm, id), (record.start..record.end, gfn)),
            };
        }
    }

    /// The guest pages at the addresses of `record`, by slot.
    pub fn parts<'a>(
        &'a self,
        record: &'a Record,
        page_size: u64,
    ) -> impl Iterator<Item = Part> + 'a {
        self.0.iter().filter_map(move |((vm, id), (range, gfn))| {
            let (start, end) = (record.start.max(range.start), record.end.min(range.end));
            let page = |address: u64| gfn + (address - range.start) / page_size;
            (start < end).then(|| Part {
                slot: Slot {
                    vm: *vm,
                    id: *id,
                    gfn: *gfn,
                },
                first: page(start),
                end: page(end + page_size - 1),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = " qemu-kvm-312     [001] .....    25.123456: slot: (kvm_set_memory_region+0x4/0x6e0) vm=0xffff88800a slot=2 gpa=0x100000 size=0x8000 hva=0x7f0000001000";

    #[test]
    fn a_line_becomes_a_record() {
        let mut lines = Lines::new(4096);
        let record = lines.record(LINE).unwrap();
        assert_eq!((record.time_ns, record.tid), (25_123_456_000, 312));
        assert_eq!(record.start..record.end, 0x7f00_0000_1000..0x7f00_0000_9000);
        let slot = Slot {
            vm: 0,
            id: 2,
            gfn: 0x100,
        };
        assert_eq!(record.slot(), Some(slot));
        let other = lines.record(&LINE.replace("88800a", "88800b")).unwrap();
        assert_eq!(other.slot(), Some(Slot { vm: 1, ..slot }));
        assert_eq!(other.seq, 1);
        assert!(lines.record("CPU:1 [LOST 12 EVENTS]").is_err());
    }

    #[test]
    fn addresses_lead_to_guest_pages() {
        let mut slots = Slots::default();
        let slot = Slot {
            vm: 0,
            id: 0,
            gfn: 0x100,
        };
        slots.see(&Record::memory_slot(slot, 0x10_000, 0x20_000));
        let record = Record {
            start: 0xf000,
            end: 0x12_000,
            ..Record::default()
        };
        let parts: Vec<_> = slots.parts(&record, 4096).collect();
        assert_eq!(
            parts,
            [Part {
                slot,
                first: 0x100,
                end: 0x102
            }]
        );
        let beside = Record {
            start: 0x20_000,
            end: 0x21_000,
            ..Record::default()
        };
        assert_eq!(slots.parts(&beside, 4096).count(), 0);
        slots.see(&Record::memory_slot(slot, 0, 0));
        assert_eq!(slots.parts(&record, 4096).count(), 0);
    }
}
