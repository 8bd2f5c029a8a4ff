// SPDX-License-Identifier: GPL-2.0

//! Which records are kept: a filter as text, and as what is asked for each record.
//!
//! Needs `core` alone, so that it compiles in the kernel and in user space; it touches nothing but
//! its own words.

use core::{
    fmt,
    sync::atomic::{
        AtomicU64,
        Ordering::Relaxed, //
    },
};

use crate::record::{
    event,
    flag,
    kind,
    Record, //
};

/// What a record has to be to be kept. As text, words that must all hold, in any order:
///
/// - `callback=NAME[,NAME...]`: it is of one of these callbacks, by their names in the trace;
/// - `event=NAME[,NAME...]`: it carries one of these events, `-` for none;
/// - `range=START-END`: it meets these addresses, hexadecimal as in the trace;
/// - `numa`: it is of a scan that only plants NUMA hints.
///
/// `0`, `none` or nothing keeps all. A marker is kept in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filter {
    /// A bit for each [`kind`](mod@kind).
    kinds: u16,
    /// A bit for each [`event`](mod@event), the last for [`event::NONE`].
    events: u16,
    numa: bool,
    start: u64,
    end: u64,
}

/// Where [`event::NONE`] is in [`Filter::events`].
const NO_EVENT: u8 = 15;

const fn event_bit(event: u8) -> u16 {
    match event {
        event::NONE => 1 << NO_EVENT,
        _ => 1 << (event % NO_EVENT),
    }
}

impl Filter {
    /// Keeps every record.
    pub const ALL: Self = Self {
        kinds: u16::MAX,
        events: u16::MAX,
        numa: false,
        start: 0,
        end: u64::MAX,
    };

    /// Reads a filter. [`None`] for a word that is not known, is there twice, or names nothing.
    pub fn parse(text: &str) -> Option<Self> {
        let mut filter = Self::ALL;
        let mut words = text.split_ascii_whitespace().peekable();

        let all = |word: &&str| matches!(*word, "0" | "none");
        if words.next_if(all).is_some() {
            return words.next().is_none().then_some(filter);
        }
        for word in words {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            match name {
                "callback" if filter.kinds == u16::MAX => {
                    let kinds = (kind::OVERWRITTEN + 1..kind::MARKER)
                        .map(|one| (kind::name(one), 1 << one));
                    filter.kinds = bits(value, kinds)?;
                }
                "event" if filter.events == u16::MAX => {
                    let events = (event::UNMAP..=event::EXCLUSIVE).chain([event::NONE]);
                    filter.events =
                        bits(value, events.map(|one| (event::name(one), event_bit(one))))?;
                }
                "range" if (filter.start, filter.end) == (0, u64::MAX) => {
                    let (start, end) = value.split_once('-')?;
                    (filter.start, filter.end) = (address(start)?, address(end)?);
                    if filter.start >= filter.end {
                        return None;
                    }
                }
                "numa" if word == name && !filter.numa => filter.numa = true,
                _ => return None,
            }
        }
        Some(filter)
    }

    /// Whether to keep `record`.
    pub fn keeps(&self, record: &Record) -> bool {
        record.kind == kind::MARKER
            || self.kinds & (1 << (record.kind & 15)) != 0
                && self.events & event_bit(record.event) != 0
                && (!self.numa || record.flags & flag::NUMA != 0)
                && record.start < self.end
                && record.end > self.start
    }
}

/// The bits of the names in a list. [`None`] for one that is not there.
fn bits(list: &str, known: impl Iterator<Item = (&'static str, u16)> + Clone) -> Option<u16> {
    list.split(',').try_fold(0, |bits, name| {
        let (_, bit) = known.clone().find(|(other, _)| *other == name)?;
        Some(bits | bit)
    })
}

/// A hexadecimal number, with `0x` before it or not. No sign, which Rust would take.
fn address(text: &str) -> Option<u64> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    let all = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    all.then(|| u64::from_str_radix(digits, 16).ok()).flatten()
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::ALL {
            return f.write_str("none");
        }
        let mut before = "";
        let mut list = |f: &mut fmt::Formatter<'_>, name: &str, first: &str| {
            let separator = if first.is_empty() { "," } else { before };
            before = " ";
            core::write!(f, "{separator}{first}{name}")
        };

        if self.kinds != u16::MAX {
            let mut first = "callback=";
            for one in (0..16).filter(|one| self.kinds & (1 << one) != 0) {
                list(f, kind::name(one), first)?;
                first = "";
            }
        }
        if self.events != u16::MAX {
            let mut first = "event=";
            for one in (0..NO_EVENT).chain([event::NONE]) {
                if self.events & event_bit(one) != 0 {
                    list(f, event::name(one), first)?;
                    first = "";
                }
            }
        }
        if (self.start, self.end) != (0, u64::MAX) {
            core::write!(f, "{before}range={:x}-{:x}", self.start, self.end)?;
            before = " ";
        }
        if self.numa {
            core::write!(f, "{before}numa")?;
        }
        Ok(())
    }
}

/// A [`Filter`] that is asked while it may be changed, and whether to record at all. Who is asked
/// during a change may answer by a part of either filter.
pub struct Gate {
    /// The masks and flags of the filter, and [`ENABLED`].
    what: AtomicU64,
    start: AtomicU64,
    end: AtomicU64,
}

const NUMA: u64 = 1 << 32;
const ENABLED: u64 = 1 << 33;

impl Gate {
    /// Records what `filter` keeps.
    pub fn new(filter: Filter) -> Self {
        let gate = Self {
            what: AtomicU64::new(ENABLED),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
        };
        gate.set_filter(filter);
        gate
    }

    /// Whether to record this.
    pub fn keeps(&self, record: &Record) -> bool {
        let what = self.what.load(Relaxed);
        what & ENABLED != 0 && self.filter_of(what).keeps(record)
    }

    fn filter_of(&self, what: u64) -> Filter {
        Filter {
            kinds: what as u16,
            events: (what >> 16) as u16,
            numa: what & NUMA != 0,
            start: self.start.load(Relaxed),
            end: self.end.load(Relaxed),
        }
    }

    /// The filter.
    pub fn filter(&self) -> Filter {
        self.filter_of(self.what.load(Relaxed))
    }

    /// Changes it.
    pub fn set_filter(&self, filter: Filter) {
        let numa = if filter.numa { NUMA } else { 0 };
        let what = u64::from(filter.kinds) | (u64::from(filter.events) << 16) | numa;

        self.start.store(filter.start, Relaxed);
        self.end.store(filter.end, Relaxed);
        // Never fails, as it always has something to store.
        let _ = self
            .what
            .fetch_update(Relaxed, Relaxed, |old| Some(old & ENABLED | what));
    }

    /// Whether anything is recorded.
    pub fn is_enabled(&self) -> bool {
        self.what.load(Relaxed) & ENABLED != 0
    }

    /// Goes on recording, or stops.
    pub fn enable(&self, on: bool) {
        if on {
            self.what.fetch_or(ENABLED, Relaxed);
        } else {
            self.what.fetch_and(!ENABLED, Relaxed);
        }
    }
}

#[cfg(test)]
mod filter_tests {
    use super::*;
    use proptest::prelude::*;

    fn record(kind: u8, event: u8, flags: u16, start: u64, end: u64) -> Record {
        Record {
            kind,
            event,
            flags,
            start,
            end,
            ..Record::default()
        }
    }

    #[test]
    fn words_that_all_must_hold() {
        let text =
            "event=clear,protection_vma range=0x1000-3000 callback=invalidate_range_start numa";
        let filter = Filter::parse(text).unwrap();
        let good = record(
            kind::INVALIDATE_RANGE_START,
            event::CLEAR,
            flag::NUMA,
            0x2000,
            0x9000,
        );
        assert!(filter.keeps(&good));
        for other in [
            Record {
                kind: kind::INVALIDATE_RANGE_END,
                ..good
            },
            Record {
                event: event::MIGRATE,
                ..good
            },
            Record {
                event: event::NONE,
                ..good
            },
            Record {
                flags: flag::BLOCKABLE,
                ..good
            },
            Record {
                start: 0x3000,
                ..good
            },
            Record {
                start: 0,
                end: 0x1000,
                ..good
            },
        ] {
            assert!(!filter.keeps(&other), "{other:?}");
        }
        assert!(filter.keeps(&Record::marker(b"", 0)));
    }

    #[test]
    fn nothing_keeps_all() {
        for text in ["", " \n", "0\n", "none"] {
            assert_eq!(Filter::parse(text), Some(Filter::ALL), "{text}");
        }
        assert_eq!(Filter::ALL.to_string(), "none");
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for text in [
            "numb",
            "numa=1",
            "numa numa",
            "callback",
            "callback=",
            "callback=,",
            "callback=release,",
            "callback=overwritten",
            "callback=marker",
            "callback=unknown",
            "callback=release callback=release",
            "event=unknown",
            "event=clear;event=unmap",
            "range=1000",
            "range=-",
            "range=2000-1000",
            "range=1000-1000",
            "range=+1-2",
            "range=1-10000000000000000",
            "0 numa",
            "none none",
        ] {
            assert_eq!(Filter::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_gate_shuts_and_keeps_its_filter() {
        let filter = Filter::parse("callback=release").unwrap();
        let gate = Gate::new(Filter::ALL);
        let release = record(kind::RELEASE, event::NONE, 0, 0, u64::MAX);
        let start = record(kind::INVALIDATE_RANGE_START, event::UNMAP, 0, 0, 1);
        assert!(gate.is_enabled() && gate.keeps(&release) && gate.keeps(&start));
        gate.set_filter(filter);
        assert!(gate.keeps(&release) && !gate.keeps(&start));
        gate.enable(false);
        assert!(!gate.is_enabled() && !gate.keeps(&release));
        gate.set_filter(filter);
        assert!(!gate.is_enabled());
        gate.enable(true);
        assert_eq!(gate.filter(), filter);
    }

    proptest! {
        #[test]
        fn a_filter_that_is_shown_can_be_read(
            kinds in 1u16..0x80, events in 1u16..0x100, none in any::<bool>(), numa in any::<bool>(),
            all in any::<[bool; 3]>(), ends in any::<(u64, u64)>(),
        ) {
            prop_assume!(ends.0 != ends.1);
            let mut filter = Filter { kinds: kinds << 1, numa, ..Filter::ALL };
            filter.events = events | if none { 1 << NO_EVENT } else { 0 };
            (filter.start, filter.end) = (ends.0.min(ends.1), ends.0.max(ends.1));
            if all[0] { filter.kinds = u16::MAX; }
            if all[1] { filter.events = u16::MAX; }
            if all[2] { (filter.start, filter.end) = (0, u64::MAX); }
            prop_assert_eq!(Filter::parse(&filter.to_string()), Some(filter));
            let gate = Gate::new(filter);
            prop_assert_eq!(gate.filter(), filter);
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,80}") {
            let _ = Filter::parse(&text);
        }
    }
}
