// SPDX-License-Identifier: GPL-2.0
//! What disturbs guest memory, drawn from a seed; pure.

use std::ops::Range;

use guest::memory::{Backing, HUGE_PAGE};
use guest::PAGE;

/// A kind of disturbance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// move_pages(2) of a range, sometimes migrate_pages(2) of everything, to one node or the other.
    Migrate,
    /// MADV_DONTNEED.
    Discard,
    /// Mapped over by PROT_NONE memory, which unmaps the range, and mapped again.
    Unmap,
    /// mprotect() to read-only or to nothing, and back.
    Protect,
    /// MADV_PAGEOUT.
    PageOut,
    /// MADV_COLLAPSE of a huge page, or a split of one.
    Huge,
    /// Write access to pages that KSM has merged, and will merge again.
    Merge,
    /// A child that looks at its copy for a while.
    Fork,
    /// userfaultfd's write protection, and its end.
    UserWriteProtect,
    /// userfaultfd's read-write protection, and its end.
    UserReadWriteProtect,
    /// A second memory slot of the range: created, used, moved, used, deleted.
    Slot,
    /// The dirty log switched on for all memory, the range written to, the log read and cleared, and switched off.
    DirtyLog,
    /// Long-term pins, and their end.
    Pin,
    /// A VM that is made, uses the range, and is gone.
    Machine,
    /// The range used by another VM that is there all the time.
    SecondMachine,
}

impl Kind {
    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Migrate => "migrate",
            Kind::Discard => "discard",
            Kind::Unmap => "unmap",
            Kind::Protect => "mprotect",
            Kind::PageOut => "pageout",
            Kind::Huge => "huge",
            Kind::Merge => "ksm",
            Kind::Fork => "fork",
            Kind::UserWriteProtect => "uffd_wp",
            Kind::UserReadWriteProtect => "uffd_rwp",
            Kind::Slot => "slots",
            Kind::DirtyLog => "dirty_log",
            Kind::Pin => "pin",
            Kind::Machine => "teardown",
            Kind::SecondMachine => "two_vms",
        }
    }

    /// Whether it can be done to memory of `backing` with its contents kept.
    pub fn suits(self, backing: Backing) -> bool {
        match self {
            Kind::Discard | Kind::Unmap => backing == Backing::Memfd,
            Kind::Huge => backing == Backing::Thp,
            Kind::Merge => backing == Backing::Anon,
            // A child shares shared memory, and to protect that from writes is an option of its own.
            Kind::Fork | Kind::UserWriteProtect => backing != Backing::Memfd,
            _ => true,
        }
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, and the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Stream `stream` of `seed`.
    pub fn new(seed: u64, stream: u64) -> Random {
        let mut mixed = Random(seed);
        let start = mixed.next();
        Random(start ^ Random(stream).next())
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is small beside 2^64, so that the bias of a remainder does not matter.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// One disturbance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Its kind.
    pub kind: Kind,
    /// The base pages of guest memory that it is done to; not empty.
    pub pages: Range<usize>,
    /// Random bits for what else there is to choose.
    pub choice: u64,
}

/// The disturbances of one thread, without end: a function of the seed alone.
#[derive(Clone, Debug)]
pub struct Operations {
    random: Random,
    kinds: Vec<Kind>,
    /// What is left of this round, in which each kind comes once.
    round: Vec<Kind>,
    room: Range<usize>,
}

impl Operations {
    /// Of `kinds`, within the base pages `room`, both not empty.
    pub fn new(seed: u64, thread: usize, kinds: &[Kind], room: Range<usize>) -> Operations {
        assert!(!kinds.is_empty() && !room.is_empty());
        Operations {
            random: Random::new(seed, thread as u64),
            kinds: kinds.to_vec(),
            round: Vec::new(),
            room,
        }
    }

    /// Mostly a few pages, sometimes more than a huge page.
    fn range(&mut self) -> Range<usize> {
        let most = match self.random.below(16) {
            0 => 2 * HUGE_PAGE / PAGE,
            1..4 => 128,
            _ => 16,
        };
        let len = 1 + self.random.below(most.min(self.room.len()));
        let start = self.room.start + self.random.below(self.room.len() - len + 1);
        start..start + len
    }
}

impl Iterator for Operations {
    type Item = Operation;

    fn next(&mut self) -> Option<Operation> {
        if self.round.is_empty() {
            self.round = self.kinds.clone();
        }
        let turn = self.random.below(self.round.len());
        Some(Operation {
            kind: self.round.swap_remove(turn),
            pages: self.range(),
            choice: self.random.next(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 3] = [Kind::Migrate, Kind::Protect, Kind::Pin];

    fn first(seed: u64, thread: usize) -> Vec<Operation> {
        Operations::new(seed, thread, &KINDS, 512..4096)
            .take(500)
            .collect()
    }

    #[test]
    fn numbers_are_splitmix64s() {
        let mut random = Random(1_234_567);
        let numbers: Vec<u64> = (0..3).map(|_| random.next()).collect();
        assert_eq!(
            numbers,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423
            ]
        );
    }

    #[test]
    fn a_seed_replays() {
        assert_eq!(first(7, 1), first(7, 1));
        assert_ne!(first(7, 1), first(8, 1));
        assert_ne!(first(7, 1), first(7, 0));
    }

    #[test]
    fn ranges_stay_in_their_room_and_differ_in_size() {
        let operations = first(7, 0);
        let inside = |one: &Operation| {
            !one.pages.is_empty() && 512 <= one.pages.start && one.pages.end <= 4096
        };
        assert!(operations.iter().all(inside));
        assert!(operations.iter().any(|one| one.pages.len() > 512));
        assert!(operations.iter().any(|one| one.pages.len() == 1));
        let small = Operations::new(7, 0, &KINDS, 3..4).take(50);
        assert!(small.into_iter().all(|one| one.pages == (3..4)));
    }

    #[test]
    fn each_round_has_each_kind_once() {
        for round in first(7, 0).chunks_exact(KINDS.len()) {
            let mut kinds: Vec<Kind> = round.iter().map(|one| one.kind).collect();
            kinds.sort();
            assert_eq!(kinds, KINDS);
        }
    }
}
