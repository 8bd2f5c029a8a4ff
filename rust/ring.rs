// SPDX-License-Identifier: GPL-2.0

//! A ring of fixed-size entries that many threads write at once, and one such ring for each CPU, read
//! as if they were one. A full ring overwrites its oldest entries, or takes no more.
//!
//! Needs `core` and storage from its caller; it touches nothing but that storage, so that it
//! compiles in the kernel and in user space.
//!
//! Writers never block, sleep, allocate or fail. Each takes the next sequence number, which names
//! the slot, claims the slot, writes, and publishes. A writer that stalls while the others go round
//! the whole ring keeps its slot: who finds it so drops his own entry and counts it as lost. Nobody
//! waits for anybody, and a reader never sees half of one entry and half of another.
//!
//! The atomics are those of `core`, not the kernel's, as the same source runs in user space. The
//! slots are only ever accessed through them, and relied on is no more than acquire and release.
//! With `--cfg loom` they are loom's, which tries every order that these allow.

#[cfg(not(loom))]
use core::sync::atomic::{
    fence,
    AtomicU64, //
};
use core::{
    ops::{
        Deref,
        DerefMut, //
    },
    sync::atomic::Ordering::{
        Acquire,
        Relaxed,
        Release, //
    },
};
#[cfg(loom)]
use loom::sync::atomic::{
    fence,
    AtomicU64, //
};

/// Words in an entry. The first is the time: it puts entries of different rings in order. Loom takes
/// the fewest that can be torn.
pub const WORDS: usize = if cfg!(loom) { 2 } else { 7 };

/// Room for one entry: a cache line, so that two writers do not share one.
#[derive(Default)]
#[repr(C, align(64))]
pub struct Slot {
    /// `0`: never claimed. Else `(seq + 1) << 2`, with [`BUSY`] and [`LOST`], of the entry that is
    /// here or that is being written.
    stamp: AtomicU64,
    words: [AtomicU64; WORDS],
}

/// Bit of a stamp: being written.
const BUSY: u64 = 1 << 0;
/// Bit of a stamp: a later entry for this slot was dropped while this one was being written.
const LOST: u64 = 1 << 1;

const fn stamp(seq: u64) -> u64 {
    (seq + 1) << 2
}

/// On a cache line of its own: written by everybody.
#[repr(align(64))]
struct Counter(AtomicU64);

/// What a sequence number leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The entry, whole.
    Stored([u64; WORDS]),
    /// It was here, and a later one took its place.
    Overwritten,
    /// Its writer found the slot still held by a writer that had been lapped, and dropped it.
    Lost,
    /// The ring was full, and does not overwrite.
    Dropped,
    /// Not written yet, or about to be.
    Pending,
}

/// The ring, over storage `S`: a vector or a boxed slice of [`Slot`]s.
///
/// # Invariants
///
/// There are a power of two of slots, and always the same ones. While a stamp is [`BUSY`], only
/// the writer that made it so writes the words of that slot.
pub struct Ring<S> {
    slots: S,
    overwrite: bool,
    next: Counter,
    lost: Counter,
}

impl<S: Deref<Target = [Slot]>> Ring<S> {
    /// Makes an empty ring, which overwrites its oldest entries when it is full, or takes no more.
    /// [`None`] where the number of slots is not a power of two.
    pub fn new(slots: S, overwrite: bool) -> Option<Self> {
        // INVARIANT: `slots` is not public and never exchanged.
        slots.len().is_power_of_two().then(|| Self {
            slots,
            overwrite,
            next: Counter(AtomicU64::new(0)),
            lost: Counter(AtomicU64::new(0)),
        })
    }

    fn slot(&self, seq: u64) -> &Slot {
        let slots = &*self.slots;

        &slots[seq as usize & (slots.len() - 1)]
    }

    /// Stores an entry under the next sequence number.
    pub fn push(&self, words: &[u64; WORDS]) {
        let seq = self.next.0.fetch_add(1, Relaxed);
        if !self.overwrite && seq >= self.size() {
            return;
        }
        if let Some(claim) = self.claim(seq) {
            claim.publish(words);
        }
    }

    /// Claims the slot of `seq`, or gives `seq` up: because a later writer was faster (to readers,
    /// `seq` is overwritten), or because an earlier one still holds the slot (`seq` is lost).
    fn claim(&self, seq: u64) -> Option<Claim<'_>> {
        let slot = self.slot(seq);
        let mut seen = slot.stamp.load(Relaxed);

        // Another turn means that another writer got on: the one that held the slot, or a later.
        loop {
            if seen > stamp(seq) {
                return None;
            }

            let held = seen & BUSY != 0;
            let wanted = if held { seen | LOST } else { stamp(seq) | BUSY };
            // Acquire: this entry's words come after those of the entry before.
            match slot
                .stamp
                .compare_exchange_weak(seen, wanted, Acquire, Relaxed)
            {
                Ok(_) if held => {
                    self.lost.0.fetch_add(1, Relaxed);
                    return None;
                }
                // INVARIANT: the stamp was not busy, and this writer made it so.
                Ok(_) => return Some(Claim(slot)),
                Err(now) => seen = now,
            }
        }
    }

    /// What is stored under `seq`. Does not wait.
    pub fn get(&self, seq: u64) -> Entry {
        if seq >= self.recorded() {
            return Entry::Pending;
        }
        if !self.overwrite && seq >= self.size() {
            return Entry::Dropped;
        }

        let slot = self.slot(seq);
        // Acquire, with the release in `publish`: sees the words that belong to the stamp.
        let before = slot.stamp.load(Acquire);
        let words = core::array::from_fn(|index| slot.words[index].load(Relaxed));
        // With the fence in `publish`: if one of the words is of a later entry, so is the stamp.
        fence(Acquire);
        let after = slot.stamp.load(Relaxed);

        if before >> 2 == seq + 1 && before & BUSY == 0 && after >> 2 == seq + 1 {
            Entry::Stored(words)
        } else if after >> 2 > seq + 1 {
            Entry::Overwritten
        } else if after >> 2 <= seq && after & LOST != 0 {
            Entry::Lost
        } else {
            Entry::Pending
        }
    }

    /// Number of slots.
    pub fn size(&self) -> u64 {
        self.slots.len() as u64
    }

    /// Sequence numbers given out so far: the next entry gets this one.
    pub fn recorded(&self) -> u64 {
        self.next.0.load(Relaxed)
    }

    /// Of [`recorded`](Self::recorded), those that the ring no longer has room for. Also the
    /// lowest sequence number that may still be read.
    pub fn overwritten(&self) -> u64 {
        match self.overwrite {
            true => self.recorded().saturating_sub(self.size()),
            false => 0,
        }
    }

    /// Of [`recorded`](Self::recorded), those that a full ring did not take.
    pub fn dropped(&self) -> u64 {
        match self.overwrite {
            true => 0,
            false => self.recorded().saturating_sub(self.size()),
        }
    }

    /// Of [`recorded`](Self::recorded), those that were never stored, see [`Entry::Lost`].
    pub fn lost(&self) -> u64 {
        self.lost.0.load(Relaxed)
    }
}

/// A ring for each CPU, so that CPUs share no cache line that they write. `R` is a vector or a boxed
/// slice of [`Ring`]s.
pub struct PerCpu<R>(R);

impl<S, R> PerCpu<R>
where
    S: Deref<Target = [Slot]>,
    R: Deref<Target = [Ring<S>]>,
{
    /// Takes as many rings as there are CPUs. [`None`] where there are none.
    pub fn new(rings: R) -> Option<Self> {
        (!rings.is_empty()).then_some(Self(rings))
    }

    /// Stores an entry in the ring of `cpu`. A writer that goes on elsewhere meanwhile does no harm.
    pub fn push(&self, cpu: usize, words: &[u64; WORDS]) {
        if let Some(ring) = self.0.get(cpu) {
            ring.push(words);
        }
    }

    /// The rings, by CPU.
    pub fn rings(&self) -> &[Ring<S>] {
        &self.0
    }

    /// The sum of a count over all CPUs.
    pub fn total(&self, count: fn(&Ring<S>) -> u64) -> u64 {
        self.0.iter().map(count).sum()
    }
}

/// What comes next of [`PerCpu`] rings, see [`Merge`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merged {
    /// The oldest entry that was not read yet.
    Stored {
        /// The CPU that stored it.
        cpu: usize,
        /// Its sequence number there.
        seq: u64,
        /// The entry.
        words: [u64; WORDS],
    },
    /// Entries of a CPU that are not there, because they were overwritten, dropped or lost.
    Missing {
        /// The CPU.
        cpu: usize,
        /// How many.
        count: u64,
    },
}

/// Reads [`PerCpu`] rings as if they were one, in the order of time. `C` is a vector or a boxed slice
/// that holds the sequence number to go on from of each CPU: zeroes for the beginning.
///
/// An entry that is published late, as its writer was interrupted after it had taken the time, comes
/// later than its time says.
pub struct Merge<C>(C);

impl<C: DerefMut<Target = [u64]>> Merge<C> {
    /// Begins from these sequence numbers.
    pub fn new(next: C) -> Self {
        Self(next)
    }

    /// What comes next. [`None`] where there is nothing more, or where an entry is just being written.
    pub fn next<S, R>(&mut self, rings: &PerCpu<R>) -> Option<Merged>
    where
        S: Deref<Target = [Slot]>,
        R: Deref<Target = [Ring<S>]>,
    {
        let mut oldest: Option<(usize, [u64; WORDS])> = None;

        for (cpu, (ring, next)) in rings.rings().iter().zip(self.0.iter_mut()).enumerate() {
            let missing = match ring.get(*next) {
                Entry::Stored(words) => {
                    if oldest.is_none_or(|(_, oldest)| words[0] < oldest[0]) {
                        oldest = Some((cpu, words));
                    }
                    continue;
                }
                Entry::Pending if *next == ring.recorded() => continue,
                Entry::Pending => return None,
                Entry::Overwritten => ring.overwritten().max(*next + 1) - *next,
                Entry::Lost => 1,
                Entry::Dropped => ring.recorded() - *next,
            };
            *next += missing;
            return Some(Merged::Missing {
                cpu,
                count: missing,
            });
        }

        let (cpu, words) = oldest?;
        let seq = self.0[cpu];
        self.0[cpu] += 1;
        Some(Merged::Stored { cpu, seq, words })
    }
}

/// A slot that this writer alone may write.
struct Claim<'a>(&'a Slot);

impl Claim<'_> {
    fn publish(self, words: &[u64; WORDS]) {
        let Self(slot) = self;

        // A reader that sees one of the words also sees that the slot is, or was, busy.
        fence(Release);
        for (to, &word) in slot.words.iter().zip(words) {
            to.store(word, Relaxed);
        }
        // Keeps `LOST`, which another writer may have added. Release: the words come first.
        slot.stamp.fetch_and(!BUSY, Release);
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::{
        sync::Arc,
        thread, //
    };

    type Shared = Arc<Ring<Vec<Slot>>>;

    fn ring(size: usize) -> Shared {
        let slots = (0..size).map(|_| Slot::default()).collect();
        Arc::new(Ring::new(slots, true).unwrap())
    }

    /// Stores entries of which each half tells the other.
    fn push(ring: &Shared, values: core::ops::Range<u64>) {
        values.for_each(|value| ring.push(&[value, !value]));
    }

    /// Reads the first entries like somebody who comes by while others write.
    fn look(ring: &Shared) {
        for seq in 0..2 {
            if let Entry::Stored(words) = ring.get(seq) {
                assert_eq!(words[0], !words[1], "halves of two entries");
            }
        }
    }

    /// At rest, what the ring has room for is there, or was lost and counted.
    fn at_rest(ring: &Shared, recorded: u64) {
        assert_eq!(ring.recorded(), recorded);
        let mut missing = 0;
        for seq in ring.overwritten()..recorded {
            match ring.get(seq) {
                Entry::Stored(words) => assert_eq!(words[0], !words[1]),
                Entry::Lost => missing += 1,
                other => panic!("{seq}: {other:?}"),
            }
        }
        assert!(missing <= ring.lost(), "more are missing than are counted");
    }

    /// Every order of what a writer of `values` and `beside` do to a ring of `size` slots, but for those in
    /// which a thread is interrupted oftener than `interruptions`. In the end there are `recorded` entries.
    fn race(
        interruptions: usize,
        size: usize,
        values: core::ops::Range<u64>,
        beside: fn(&Shared),
        recorded: u64,
    ) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(interruptions);
        model.check(move || {
            let ring = ring(size);
            while_pushing(&ring, values.clone(), beside);
            at_rest(&ring, recorded);
        });
    }

    fn while_pushing(ring: &Shared, values: core::ops::Range<u64>, beside: fn(&Shared)) {
        let other = ring.clone();
        let writer = thread::spawn(move || push(&other, values));
        beside(ring);
        writer.join().unwrap();
    }

    #[test]
    fn two_writers_of_one_slot() {
        race(4, 1, 1..3, |ring| push(ring, 3..5), 4);
    }

    #[test]
    fn two_writers_of_two_slots() {
        race(3, 2, 1..4, |ring| push(ring, 4..6), 5);
    }

    #[test]
    fn reader_that_is_overtaken() {
        race(3, 1, 1..3, look, 2);
    }

    #[test]
    fn reader_beside_two_writers() {
        race(2, 1, 1..2, |ring| while_pushing(ring, 2..3, look), 2);
    }
}

#[cfg(all(test, not(loom)))]
mod ring_tests {
    use super::*;
    use std::{
        boxed::Box,
        sync::atomic::AtomicBool,
        thread,
        vec::Vec, //
    };

    fn ring(size: usize) -> Ring<Box<[Slot]>> {
        let slots: Vec<_> = (0..size).map(|_| Slot::default()).collect();
        Ring::new(slots.into_boxed_slice(), true).unwrap()
    }

    /// Words that betray a mix of two entries.
    fn words(value: u64) -> [u64; WORDS] {
        core::array::from_fn(|index| value.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index as u64)
    }

    #[test]
    fn only_powers_of_two() {
        for size in [0, 3, 5, 6, 7, 100] {
            let slots: Vec<_> = (0..size).map(|_| Slot::default()).collect();
            assert!(Ring::new(slots, true).is_none(), "{size}");
        }
    }

    #[test]
    fn a_slot_is_a_cache_line() {
        assert_eq!(core::mem::size_of::<Slot>(), 64);
        assert_eq!(core::mem::align_of::<Slot>(), 64);
    }

    #[test]
    fn empty() {
        let ring = ring(4);
        assert_eq!(ring.get(0), Entry::Pending);
        assert_eq!(ring.get(u64::MAX >> 2), Entry::Pending);
        assert_eq!(
            (ring.recorded(), ring.overwritten(), ring.lost()),
            (0, 0, 0)
        );
    }

    #[test]
    fn wraps_around() {
        for size in [1, 2, 8] {
            let ring = ring(size);
            for seq in 0..100 {
                ring.push(&words(seq));
                let oldest = (seq + 1).saturating_sub(size as u64);
                assert_eq!(ring.overwritten(), oldest);
                for old in 0..oldest {
                    assert_eq!(ring.get(old), Entry::Overwritten);
                }
                for kept in oldest..=seq {
                    assert_eq!(ring.get(kept), Entry::Stored(words(kept)));
                }
                assert_eq!(ring.get(seq + 1), Entry::Pending);
            }
            assert_eq!((ring.recorded(), ring.lost()), (100, 0));
        }
    }

    #[test]
    fn a_full_ring_that_does_not_overwrite_takes_no_more() {
        let slots: Vec<_> = (0..4).map(|_| Slot::default()).collect();
        let ring = Ring::new(slots.into_boxed_slice(), false).unwrap();
        for seq in 0..6 {
            ring.push(&at(seq));
        }
        assert_eq!(
            (ring.recorded(), ring.overwritten(), ring.dropped()),
            (6, 0, 2)
        );
        for seq in 0..4 {
            assert_eq!(ring.get(seq), Entry::Stored(at(seq)));
        }
        assert_eq!(ring.get(4), Entry::Dropped);
        assert_eq!(ring.get(6), Entry::Pending);
        let rings = PerCpu::new(vec![ring]).unwrap();
        assert_eq!(merge(&rings), (vec![0, 1, 2, 3], vec![(0, 2)]));
    }

    #[test]
    fn a_lapped_writer_costs_the_next_entry_not_its_own() {
        let ring = ring(2);
        let stalled = ring.next.0.fetch_add(1, Relaxed);
        let claim = ring.claim(stalled).unwrap();
        assert_eq!(ring.get(0), Entry::Pending);

        for seq in 1..=4 {
            ring.push(&words(seq));
        }
        // 2 and 4 found the slot held; 1 and 3 had the other one.
        assert_eq!(ring.lost(), 2);
        assert_eq!(ring.get(1), Entry::Overwritten);
        assert_eq!(ring.get(3), Entry::Stored(words(3)));
        assert_eq!(ring.get(4), Entry::Lost);

        claim.publish(&words(0));
        assert_eq!(ring.get(0), Entry::Stored(words(0)));
        assert_eq!(ring.get(4), Entry::Lost);

        // The next one round takes the slot back.
        ring.push(&words(5));
        ring.push(&words(6));
        assert_eq!(ring.get(6), Entry::Stored(words(6)));
        assert_eq!(ring.get(0), Entry::Overwritten);
        assert_eq!(ring.lost(), 2);
    }

    #[test]
    fn a_late_writer_gives_way_to_a_later_one() {
        let ring = ring(1);
        let late = ring.next.0.fetch_add(1, Relaxed);
        ring.push(&words(1));
        assert!(ring.claim(late).is_none());
        assert_eq!(ring.get(0), Entry::Overwritten);
        assert_eq!(ring.get(1), Entry::Stored(words(1)));
        assert_eq!(ring.lost(), 0);
    }

    /// Writers on all sides, one reader that follows and one that skips, until all is written.
    fn hammer(size: usize, writers: u64, each: u64) {
        let ring = ring(size);
        let done = AtomicBool::new(false);

        thread::scope(|scope| {
            let readers: Vec<_> = (0..2)
                .map(|stride| {
                    let (ring, done) = (&ring, &done);
                    scope.spawn(move || {
                        let mut stored = 0u64;
                        let mut seq = 0;
                        while !done.load(Relaxed) {
                            match ring.get(seq) {
                                Entry::Stored(got) => {
                                    check(&got, writers, each);
                                    stored += 1;
                                    seq += 1 + stride * 7;
                                }
                                Entry::Overwritten => seq = ring.overwritten(),
                                Entry::Lost | Entry::Dropped => seq += 1,
                                Entry::Pending => thread::yield_now(),
                            }
                            if seq > ring.recorded() {
                                seq = ring.overwritten();
                            }
                        }
                        stored
                    })
                })
                .collect();
            let writers: Vec<_> = (0..writers)
                .map(|writer| {
                    let ring = &ring;
                    scope.spawn(move || {
                        for count in 0..each {
                            ring.push(&words(writer * each + count));
                        }
                    })
                })
                .collect();
            for writer in writers {
                writer.join().unwrap();
            }
            done.store(true, Relaxed);
            for reader in readers {
                reader.join().unwrap();
            }
        });

        assert_eq!(ring.recorded(), writers * each);
        // At rest every slot holds what belongs there, unless it was lost.
        let mut missing = 0;
        let mut seen = Vec::new();
        for seq in ring.overwritten()..ring.recorded() {
            match ring.get(seq) {
                Entry::Stored(got) => seen.push(check(&got, writers, each)),
                Entry::Lost => missing += 1,
                other => panic!("{seq}: {other:?}"),
            }
        }
        assert!(missing <= ring.lost());
        let stored = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), stored, "an entry is there twice");
    }

    fn check(got: &[u64; WORDS], writers: u64, each: u64) -> u64 {
        // The inverse of the odd constant in `words`, modulo 2^64.
        let mut inverse = 1u64;
        for _ in 0..6 {
            let product = inverse.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            inverse = inverse.wrapping_mul(2u64.wrapping_sub(product));
        }
        let value = got[0].wrapping_mul(inverse);
        assert_eq!(*got, words(value), "a torn entry");
        assert!(value < writers * each, "an entry that nobody wrote");
        value
    }

    type Rings = PerCpu<Vec<Ring<Box<[Slot]>>>>;

    /// An entry of this time.
    fn at(time: u64) -> [u64; WORDS] {
        let mut words = words(time);
        words[0] = time;
        words
    }

    fn merge(rings: &Rings) -> (Vec<u64>, Vec<(usize, u64)>) {
        let mut merge = Merge::new(vec![0; rings.rings().len()]);
        let (mut times, mut missing) = (Vec::new(), Vec::new());
        while let Some(next) = merge.next(rings) {
            match next {
                Merged::Stored { cpu, seq, words } => {
                    assert_eq!(rings.rings()[cpu].get(seq), Entry::Stored(words));
                    assert_eq!(words, at(words[0]));
                    times.push(words[0]);
                }
                Merged::Missing { cpu, count } => missing.push((cpu, count)),
            }
        }
        (times, missing)
    }

    fn per_cpu(cpus: usize, size: usize) -> Rings {
        PerCpu::new((0..cpus).map(|_| ring(size)).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn there_is_a_ring() {
        assert!(PerCpu::new(Vec::<Ring<Box<[Slot]>>>::new()).is_none());
    }

    #[test]
    fn entries_of_all_cpus_come_in_the_order_of_time() {
        let rings = per_cpu(3, 4);
        for (cpu, time) in [(2, 1), (0, 2), (2, 3), (1, 4), (0, 5)] {
            rings.push(cpu, &at(time));
        }
        assert_eq!(merge(&rings), (vec![1, 2, 3, 4, 5], vec![]));
        assert_eq!(rings.total(Ring::recorded), 5);
    }

    #[test]
    fn what_a_cpu_overwrote_is_said_once() {
        let rings = per_cpu(2, 2);
        for time in 0..5 {
            rings.push(1, &at(time));
        }
        rings.push(0, &at(9));
        assert_eq!(merge(&rings), (vec![3, 4, 9], vec![(1, 3)]));
        assert_eq!(rings.total(Ring::overwritten), 3);
    }

    #[test]
    fn nothing_comes_before_an_entry_that_is_being_written() {
        let rings = per_cpu(2, 2);
        let stalled = rings.rings()[0].next.0.fetch_add(1, Relaxed);
        let claim = rings.rings()[0].claim(stalled).unwrap();
        rings.push(1, &at(7));
        let mut reader = Merge::new(vec![0; 2]);
        assert_eq!(reader.next(&rings), None);
        claim.publish(&at(3));
        let time = |next| match next {
            Some(Merged::Stored { words, .. }) => words[0],
            other => panic!("{other:?}"),
        };
        assert_eq!(time(reader.next(&rings)), 3);
        assert_eq!(time(reader.next(&rings)), 7);
        assert_eq!(reader.next(&rings), None);
    }

    proptest::proptest! {
        #[test]
        fn what_is_not_missing_is_merged_in_order(
            sizes in 0u32..6,
            cpus in proptest::collection::vec(0usize..4, 0..200),
        ) {
            let rings = per_cpu(4, 1 << sizes);
            for (time, cpu) in (0..).zip(&cpus) {
                rings.push(*cpu, &at(time));
            }
            let (times, missing) = merge(&rings);
            let kept: Vec<u64> = (0..).zip(&cpus).filter(|(time, cpu)| {
                let later = &cpus[*time as usize + 1..];
                later.iter().filter(|other| other == cpu).count() < 1 << sizes
            }).map(|(time, _)| time).collect();
            proptest::prop_assert_eq!(&times, &kept);
            let missing: u64 = missing.iter().map(|(_, count)| count).sum();
            proptest::prop_assert_eq!(missing as usize + times.len(), cpus.len());
        }
    }

    #[test]
    fn concurrent_writers() {
        hammer(1024, 4, 50_000);
    }

    /// As many as a million a second are in a minute.
    #[test]
    fn sixty_million_entries() {
        hammer(1 << 14, 4, 15_000_000);
    }

    #[test]
    fn concurrent_writers_with_no_room() {
        hammer(1, 4, 50_000);
        hammer(2, 4, 50_000);
    }

    #[test]
    fn a_stalled_reader_holds_nobody_up() {
        let ring = ring(4);
        ring.push(&words(0));
        let held = ring.get(0);
        for seq in 1..1000 {
            ring.push(&words(seq));
        }
        assert_eq!(held, Entry::Stored(words(0)));
        assert_eq!(ring.get(0), Entry::Overwritten);
        assert_eq!(ring.lost(), 0);
    }
}
