// SPDX-License-Identifier: GPL-2.0

//! The subscribers: a record for each callback, in the ring of the CPU that it is called on.
//!
//! Safe code alone; it may touch its rings and its subscriptions.

use kernel::{
    cpu::{
        nr_cpu_ids,
        CpuId, //
    },
    current,
    mm::{
        Mm,
        MmWithUser, //
    },
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc, //
};

#[cfg(mmu_notifier_numa_protect)]
use crate::mmu_notifier::NumaHints;
use crate::{
    filter::{
        Filter,
        Gate, //
    },
    mmu_notifier::{
        support,
        MmuNotifier,
        Range,
        Registration, //
    },
    record::{
        event,
        kind,
        Record, //
    },
    ring::{
        self,
        Slot, //
    },
};

/// The ring of a CPU.
pub type Ring = ring::Ring<KVVec<Slot>>;
/// Those of a target.
pub type Rings = ring::PerCpu<KVVec<Ring>>;

/// Makes empty rings of `size` records, one for each CPU that there can be.
///
/// Checks what there is beforehand, as the allocation alone would have other processes killed.
fn new_rings(size: u64, overwrite: bool) -> Result<Rings> {
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
        rings.push(Ring::new(slots, overwrite).ok_or(EINVAL)?, GFP_KERNEL)?;
    }
    Rings::new(rings).ok_or(EINVAL)
}

/// What is recorded of a target, and what of it is kept.
pub struct Log {
    /// The records.
    pub rings: Rings,
    /// Which.
    pub gate: Gate,
}

impl Log {
    /// Makes an empty one with room for `size` records of each CPU, which records everything.
    ///
    /// # Errors
    ///
    /// `ENOMEM`. `EINVAL`: the size is not a power of two.
    pub fn new(size: u64, overwrite: bool) -> Result<Arc<Self>> {
        let log = Self {
            rings: new_rings(size, overwrite)?,
            gate: Gate::new(Filter::ALL),
        };

        Ok(Arc::new(log, GFP_KERNEL)?)
    }

    /// Stores `record` if it is kept, with when, where and by whom it was made.
    pub fn record(&self, record: Record) {
        if !self.gate.keeps(&record) {
            return;
        }
        let cpu = CpuId::current().as_u32();
        let record = Record {
            time_ns: support::monotonic_ns(),
            cpu,
            tid: current!().pid() as u32,
            comm: match record.kind {
                kind::MARKER => record.comm,
                _ => support::current_comm(),
            },
            ..record
        };
        self.rings.push(cpu as usize, &record.to_words());
    }
}

/// The subscriber: writes a record for each callback.
struct Recorder(Arc<Log>);

impl Recorder {
    fn record_range(&self, kind: u8, range: &Range) {
        self.0.record(Record {
            start: range.start() as u64,
            end: range.end() as u64,
            kind,
            event: range.event() as u8,
            flags: u16::from(range.flags() as u8),
            ..Record::default()
        });
    }

    fn record_addresses(&self, kind: u8, start: usize, end: usize) {
        self.0.record(Record {
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
        use crate::record::flag;

        let range = hints.range();
        let mut stretches = hints.stretches().peekable();
        let mut position = flag::FIRST;

        while let Some((start, end)) = stretches.next() {
            if stretches.peek().is_none() {
                position |= flag::LAST;
            }
            self.0.record(Record {
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

/// What records a target, as long as it is there.
pub struct Subscription(Subscriber);

/// Which of the two subscribers.
enum Subscriber {
    Full(Pin<KBox<Registration<Recorder>>>),
    Plain(Pin<KBox<Registration<Plain>>>),
}

impl Subscription {
    /// Records what happens to `mm` from now on.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, `EINTR`: see [`Registration::new`].
    pub fn new(mm: &MmWithUser, log: Arc<Log>, plain: bool) -> Result<Self> {
        let recorder = Recorder(log);

        Ok(Self(if plain {
            let registration = Registration::new(mm, Ok(Plain(recorder)));
            Subscriber::Plain(KBox::pin_init(registration, GFP_KERNEL)?)
        } else {
            let registration = Registration::new(mm, Ok(recorder));
            Subscriber::Full(KBox::pin_init(registration, GFP_KERNEL)?)
        }))
    }

    /// The address space, which may have lost its last user since.
    pub fn mm(&self) -> &Mm {
        match &self.0 {
            Subscriber::Full(registration) => registration.mm(),
            Subscriber::Plain(registration) => registration.mm(),
        }
    }
}
