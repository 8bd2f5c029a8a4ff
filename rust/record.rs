// SPDX-License-Identifier: GPL-2.0

//! The layout of one record, written once for the recorder and for everyone who reads its files.
//! [`VERSION`] changes with it.
//!
//! Needs `core` alone, so that it compiles in the kernel and in user space; it touches no memory
//! but its arguments.

use core::fmt;

/// Version of the layout, which the recorder's file `version` says. 1 had one ring for all CPUs.
pub const VERSION: u32 = 2;

/// Size of a record in a `records` file, in bytes. Record `seq` is at offset `seq * SIZE`.
pub const SIZE: usize = 64;

/// Values of [`Record::kind`]: which callback was called.
pub mod kind {
    /// Not a callback: the record with this sequence number is not in its ring (any more).
    pub const OVERWRITTEN: u8 = 0;
    /// `invalidate_range_start()`.
    pub const INVALIDATE_RANGE_START: u8 = 1;
    /// `invalidate_range_end()`.
    pub const INVALIDATE_RANGE_END: u8 = 2;
    /// `numa_protect()`: one record for each stretch of the report.
    pub const NUMA_PROTECT: u8 = 3;
    /// `clear_flush_young()`.
    pub const CLEAR_FLUSH_YOUNG: u8 = 4;
    /// `clear_young()`.
    pub const CLEAR_YOUNG: u8 = 5;
    /// `test_young()`.
    pub const TEST_YOUNG: u8 = 6;
    /// `release()`.
    pub const RELEASE: u8 = 7;
    /// Not a callback: text that was written to `marker`, see [`Record::marker`](super::Record::marker).
    pub const MARKER: u8 = 8;
    /// Not a callback: a memory slot of a VM was set, see [`Slot`](super::Slot). Only in traces that were
    /// saved.
    pub const MEMORY_SLOT: u8 = 9;

    /// The name of `kind` as the trace shows it.
    pub fn name(kind: u8) -> &'static str {
        match kind {
            OVERWRITTEN => "overwritten",
            INVALIDATE_RANGE_START => "invalidate_range_start",
            INVALIDATE_RANGE_END => "invalidate_range_end",
            NUMA_PROTECT => "numa_protect",
            CLEAR_FLUSH_YOUNG => "clear_flush_young",
            CLEAR_YOUNG => "clear_young",
            TEST_YOUNG => "test_young",
            RELEASE => "release",
            MARKER => "marker",
            MEMORY_SLOT => "memory_slot",
            _ => "unknown",
        }
    }
}

/// Values of [`Record::event`]: the kernel's `enum mmu_notifier_event`.
pub mod event {
    /// `MMU_NOTIFY_UNMAP`.
    pub const UNMAP: u8 = 0;
    /// `MMU_NOTIFY_CLEAR`.
    pub const CLEAR: u8 = 1;
    /// `MMU_NOTIFY_PROTECTION_VMA`.
    pub const PROTECTION_VMA: u8 = 2;
    /// `MMU_NOTIFY_PROTECTION_PAGE`.
    pub const PROTECTION_PAGE: u8 = 3;
    /// `MMU_NOTIFY_SOFT_DIRTY`.
    pub const SOFT_DIRTY: u8 = 4;
    /// `MMU_NOTIFY_RELEASE`.
    pub const RELEASE: u8 = 5;
    /// `MMU_NOTIFY_MIGRATE`.
    pub const MIGRATE: u8 = 6;
    /// `MMU_NOTIFY_EXCLUSIVE`.
    pub const EXCLUSIVE: u8 = 7;
    /// The callback carries no event.
    pub const NONE: u8 = 255;

    /// The name of `event` as the trace shows it.
    pub fn name(event: u8) -> &'static str {
        match event {
            UNMAP => "unmap",
            CLEAR => "clear",
            PROTECTION_VMA => "protection_vma",
            PROTECTION_PAGE => "protection_page",
            SOFT_DIRTY => "soft_dirty",
            RELEASE => "release",
            MIGRATE => "migrate",
            EXCLUSIVE => "exclusive",
            NONE => "-",
            _ => "unknown",
        }
    }
}

/// Bits of [`Record::flags`]. The low byte holds the kernel's own range flags.
pub mod flag {
    /// `MMU_NOTIFIER_RANGE_BLOCKABLE`: the callback may sleep.
    pub const BLOCKABLE: u16 = 1 << 0;
    /// `MMU_NOTIFIER_RANGE_NUMA`: the walk only plants NUMA hints.
    pub const NUMA: u16 = 1 << 1;
    /// The first stretch of a `numa_protect()` report, the first part of a marker.
    pub const FIRST: u16 = 0x100;
    /// The last stretch of a `numa_protect()` report, the last part of a marker.
    pub const LAST: u16 = 0x200;
}

/// A memory slot of a VM: where in the guest the range of a record of it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Tells the VMs of a process from each other, from 0.
    pub vm: u64,
    /// The number that user space gave it, its high half that of the address space.
    pub id: u32,
    /// Guest frame number of its first page.
    pub gfn: u64,
}

/// One callback, as it was recorded. In the file: little endian, [`SIZE`] bytes, without padding,
/// the fields in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Record {
    /// Sequence number on its CPU, from 0, without gaps: a missing one is a record lost.
    pub seq: u64,
    /// `CLOCK_MONOTONIC`, in nanoseconds: puts records of different CPUs in order.
    pub time_ns: u64,
    /// First address of the range.
    pub start: u64,
    /// First address after the range.
    pub end: u64,
    /// The CPU that ran the callback.
    pub cpu: u32,
    /// The thread that ran the callback, as the initial pid namespace numbers it.
    pub tid: u32,
    /// Which callback, see [`kind`](mod@kind).
    pub kind: u8,
    /// Why, see [`event`](mod@event).
    pub event: u8,
    /// How, see [`flag`].
    pub flags: u16,
    /// `numa_protect()`: the pages that the whole report hinted, repeated in each of its
    /// stretches, at most `u32::MAX`. Of a memory slot its number, 0 elsewhere.
    pub pages: u32,
    /// The thread's name, padded with zeroes; see [`Record::marker`] and [`Record::memory_slot`].
    pub comm: [u8; 16],
}

const _: () = assert!(core::mem::size_of::<Record>() == SIZE);

impl Record {
    /// The placeholder that is read for a record which is not in the ring of `cpu`.
    pub fn overwritten(seq: u64, cpu: u32) -> Self {
        Self {
            seq,
            cpu,
            kind: kind::OVERWRITTEN,
            event: event::NONE,
            ..Self::default()
        }
    }

    /// The eight bytes of `comm` from `at` on.
    fn comm_half(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.comm[at..at + 8]);
        u64::from_le_bytes(bytes)
    }

    /// The record without its sequence number, as the words that the ring stores.
    pub fn to_words(&self) -> [u64; 7] {
        [
            self.time_ns,
            self.start,
            self.end,
            u64::from(self.cpu) | (u64::from(self.tid) << 32),
            u64::from(self.kind)
                | (u64::from(self.event) << 8)
                | (u64::from(self.flags) << 16)
                | (u64::from(self.pages) << 32),
            self.comm_half(0),
            self.comm_half(8),
        ]
    }

    /// The inverse of [`Record::to_words`].
    pub fn from_words(seq: u64, words: [u64; 7]) -> Self {
        let [time_ns, start, end, place, what, comm_low, comm_high] = words;
        let mut comm = [0; 16];
        comm[..8].copy_from_slice(&comm_low.to_le_bytes());
        comm[8..].copy_from_slice(&comm_high.to_le_bytes());

        Self {
            seq,
            time_ns,
            start,
            end,
            cpu: place as u32,
            tid: (place >> 32) as u32,
            kind: what as u8,
            event: (what >> 8) as u8,
            flags: (what >> 16) as u16,
            pages: (what >> 32) as u32,
            comm,
        }
    }

    /// The record as the `records` file holds it.
    pub fn to_bytes(&self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        bytes[..8].copy_from_slice(&self.seq.to_le_bytes());
        for (to, word) in bytes[8..].chunks_exact_mut(8).zip(self.to_words()) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Reads a record of the `records` file.
    pub fn from_bytes(bytes: &[u8; SIZE]) -> Self {
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
            u64::from_le_bytes(word)
        };

        Self::from_words(word(0), core::array::from_fn(|index| word(index + 1)))
    }

    /// Bytes of a marker's text in one record.
    pub const MARKER_BYTES: usize = 32;

    /// A part of a marker's text, at most [`MARKER_BYTES`](Self::MARKER_BYTES), in the place of the range and the name.
    pub fn marker(text: &[u8], flags: u16) -> Self {
        let mut bytes = [0; Self::MARKER_BYTES];
        let len = text.len().min(bytes.len());
        bytes[..len].copy_from_slice(&text[..len]);
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let mut comm = [0; 16];
        comm.copy_from_slice(&bytes[16..]);

        Self {
            start: word(0),
            end: word(8),
            kind: kind::MARKER,
            event: event::NONE,
            flags,
            comm,
            ..Self::default()
        }
    }

    /// The text of a marker's part, padded with zeroes.
    pub fn marker_text(&self) -> [u8; Self::MARKER_BYTES] {
        let mut text = [0; Self::MARKER_BYTES];
        text[..8].copy_from_slice(&self.start.to_le_bytes());
        text[8..16].copy_from_slice(&self.end.to_le_bytes());
        text[16..].copy_from_slice(&self.comm);
        text
    }

    /// A memory slot that now has these addresses; none where it is gone.
    pub fn memory_slot(slot: Slot, start: u64, end: u64) -> Self {
        let mut comm = [0; 16];
        comm[..8].copy_from_slice(&slot.gfn.to_le_bytes());
        comm[8..].copy_from_slice(&slot.vm.to_le_bytes());

        Self {
            start,
            end,
            kind: kind::MEMORY_SLOT,
            event: event::NONE,
            pages: slot.id,
            comm,
            ..Self::default()
        }
    }

    /// The memory slot, if it is a record of one.
    pub fn slot(&self) -> Option<Slot> {
        (self.kind == kind::MEMORY_SLOT).then(|| Slot {
            vm: self.comm_half(8),
            id: self.pages,
            gfn: self.comm_half(0),
        })
    }

    /// The thread's name, up to its first zero; what is not UTF-8 is left out.
    pub fn comm(&self) -> &str {
        let len = self.comm.iter().position(|&byte| byte == 0);
        let comm = &self.comm[..len.unwrap_or(self.comm.len())];
        match core::str::from_utf8(comm) {
            Ok(comm) => comm,
            Err(error) => core::str::from_utf8(&comm[..error.valid_up_to()]).unwrap_or(""),
        }
    }

    /// The record as a line of the `trace` file, without the line's end. Pages are counted in
    /// units of `1 << page_shift` bytes.
    pub fn line(&self, page_shift: u32) -> Line<'_> {
        Line {
            record: self,
            page_shift,
        }
    }
}

/// Shows a record as a line of the `trace` file, see [`Record::line`].
pub struct Line<'a> {
    record: &'a Record,
    page_shift: u32,
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let record = self.record;
        let micros = record.time_ns / 1000;
        let pages = record.end.wrapping_sub(record.start) >> self.page_shift;
        let comm = match record.kind {
            kind::MARKER | kind::MEMORY_SLOT => "<...>",
            _ => record.comm(),
        };

        core::write!(
            f,
            "{:>16}-{:<7} [{:03}] {:>5}.{:06}: {}: ",
            comm,
            record.tid,
            record.cpu,
            micros / 1_000_000,
            micros % 1_000_000,
            kind::name(record.kind),
        )?;
        if record.kind == kind::MARKER {
            let text = record.marker_text();
            let end = text.iter().rposition(|byte| *byte != 0);
            return core::write!(f, "{}", text[..end.map_or(0, |end| end + 1)].escape_ascii());
        }
        if let Some(Slot { vm, id, gfn }) = record.slot() {
            let (start, end) = (record.start, record.end);
            return core::write!(
                f,
                "{start:x}-{end:x} ({pages}) slot={id} gfn={gfn:x} vm={vm}"
            );
        }
        core::write!(
            f,
            "{:x}-{:x} ({}) {}",
            record.start,
            record.end,
            pages,
            event::name(record.event),
        )?;

        if record.kind == kind::NUMA_PROTECT {
            core::write!(f, " hinted={}", record.pages)?;
        }
        for (flag, name) in [
            (flag::BLOCKABLE, "blockable"),
            (flag::NUMA, "numa"),
            (flag::FIRST, "first"),
            (flag::LAST, "last"),
        ] {
            if record.flags & flag != 0 {
                core::write!(f, " {name}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod record_tests {
    use super::*;

    fn sample() -> Record {
        Record {
            seq: 0x0102_0304_0506_0708,
            time_ns: 12_345_678_901,
            start: 0x7f00_0000_0000,
            end: 0x7f00_0020_0000,
            cpu: 3,
            tid: 4711,
            kind: kind::NUMA_PROTECT,
            event: event::PROTECTION_VMA,
            flags: flag::BLOCKABLE | flag::NUMA | flag::FIRST | flag::LAST,
            pages: 400,
            comm: *b"vcpu0\0\0\0\0\0\0\0\0\0\0\0",
        }
    }

    #[test]
    fn bytes_and_words_come_back() {
        let record = sample();
        assert_eq!(Record::from_bytes(&record.to_bytes()), record);
        assert_eq!(Record::from_words(record.seq, record.to_words()), record);
    }

    #[test]
    fn fields_are_where_the_layout_says() {
        let bytes = sample().to_bytes();
        assert_eq!(bytes[..8], 0x0102_0304_0506_0708u64.to_le_bytes());
        assert_eq!(bytes[8..16], 12_345_678_901u64.to_le_bytes());
        assert_eq!(bytes[16..24], 0x7f00_0000_0000u64.to_le_bytes());
        assert_eq!(bytes[24..32], 0x7f00_0020_0000u64.to_le_bytes());
        assert_eq!(bytes[32..36], 3u32.to_le_bytes());
        assert_eq!(bytes[36..40], 4711u32.to_le_bytes());
        assert_eq!(bytes[40..44], [3, 2, 3, 3]);
        assert_eq!(bytes[44..48], 400u32.to_le_bytes());
        assert_eq!(&bytes[48..53], b"vcpu0");
    }

    #[test]
    fn a_line_reads_like_tracefs() {
        assert_eq!(
            sample().line(12).to_string(),
            "           vcpu0-4711    [003]    12.345678: numa_protect: \
             7f0000000000-7f0000200000 (512) protection_vma hinted=400 blockable numa first last"
        );
        assert!(Record::overwritten(7, 0)
            .line(12)
            .to_string()
            .contains("overwritten: 0-0 (0) -"));
    }

    #[test]
    fn a_marker_holds_its_text() {
        let line = |text: &[u8]| Record::marker(text, 0).line(12).to_string();
        assert!(
            line(b"begins here").ends_with("<...>-0       [000]     0.000000: marker: begins here")
        );
        assert!(line(b"a\xff\nb").ends_with(": a\\xff\\nb"));
        assert!(line(b"").ends_with("marker: "));
        let long = [b'x'; 40];
        assert_eq!(
            Record::marker(&long, 0).marker_text(),
            [b'x'; Record::MARKER_BYTES]
        );
    }

    #[test]
    fn a_memory_slot_comes_back() {
        let slot = Slot {
            vm: 1,
            id: 3 | (1 << 16),
            gfn: 0x10_0000,
        };
        let record = Record::memory_slot(slot, 0x7f00_0000_0000, 0x7f00_0020_0000);
        let record = Record::from_bytes(&record.to_bytes());
        assert_eq!(record.slot(), Some(slot));
        assert!(record
            .line(12)
            .to_string()
            .ends_with("memory_slot: 7f0000000000-7f0000200000 (512) slot=65539 gfn=100000 vm=1"));
        assert_eq!(sample().slot(), None);
    }

    #[test]
    fn a_name_that_is_no_text_is_cut() {
        let mut record = sample();
        record.comm[2] = 0xff;
        assert_eq!(record.comm(), "vc");
    }
}
