// SPDX-License-Identifier: GPL-2.0
//! What KVM is told to unmap of all VMs, and what it had mapped there, by the function of the kernel that led to it; makes
//! probes, which it removes.

use anyhow::Result;

use crate::tracefs::{Bin, Histogram, CALLERS};

/// The function in which a scan makes pages PROT_NONE, of a part of one mapping at a time.
pub const SCAN: &str = "change_prot_numa";
/// The function that takes a folio out of page tables for its migration.
pub const MIGRATION: &str = "try_to_migrate";
/// What KVM calls for each range of guest memory that it unmaps, and its tracepoint of entries in its page tables that
/// change.
const UNMAP: &str = "kvm_unmap_gfn_range";
const ENTRY: &str = "kvmmmu/kvm_tdp_mmu_spte_changed";
/// Of those, the ones that mapped a page, and are there no longer. Bit 11 is KVM's own for an entry that is there, bit 7 the
/// processor's for a huge page.
const DROPPED: &str = "(level == 1 || old_spte & 0x80) && old_spte & 0x800 && !(new_spte & 0x800)";

/// Counted from [`Unmaps::start`] on.
pub struct Unmaps {
    calls: Histogram,
    drops: Histogram,
}

/// What some function has led to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unmapped {
    /// Ranges of guest memory, whether or not anything was mapped there.
    pub calls: u64,
    /// Base pages that were mapped there; with nested paging only.
    pub dropped: u64,
}

impl Unmaps {
    /// Begins to count.
    pub fn start() -> Result<Unmaps> {
        let by_caller = format!("keys={CALLERS}:size=4096");
        let drops = format!("keys=level,{CALLERS}:size=4096 if {DROPPED}");
        Ok(Unmaps {
            calls: Histogram::of_calls(UNMAP, "", &by_caller)?,
            drops: Histogram::of(ENTRY, &drops)?,
        })
    }

    /// All.
    pub fn all(&self) -> Result<Unmapped> {
        self.sum(|_| true)
    }

    /// What came of `function`, such as [`SCAN`].
    pub fn by(&self, function: &str) -> Result<Unmapped> {
        self.sum(|bin| is_below(bin, function))
    }

    fn sum(&self, counts: impl Fn(&Bin) -> bool) -> Result<Unmapped> {
        let (calls, drops) = (self.calls.read()?, self.drops.read()?);
        Ok(Unmapped {
            calls: calls
                .iter()
                .filter(|bin| counts(bin))
                .map(|bin| bin.hits)
                .sum(),
            dropped: drops.iter().filter(|bin| counts(bin)).map(pages).sum(),
        })
    }
}

/// Whether `function` is among the callers.
fn is_below(bin: &Bin, function: &str) -> bool {
    bin.callers
        .iter()
        .any(|caller| caller.split('+').next() == Some(function))
}

/// Pages that entries of a level map: on each, 512 times as many as on the one below.
fn pages(bin: &Bin) -> u64 {
    bin.hits << (9 * (bin.fields["level"] - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_are_told_by_name() {
        let bin = Bin {
            callers: vec!["change_prot_numa+0x5a/0xd0".into()],
            ..Bin::default()
        };
        assert!(is_below(&bin, SCAN));
        assert!(!is_below(&bin, "change_prot"));
    }

    #[test]
    fn an_entry_of_level_2_maps_512_pages() {
        let bin = |level| Bin {
            fields: [("level".into(), level)].into(),
            callers: Vec::new(),
            hits: 3,
        };
        assert_eq!((pages(&bin(1)), pages(&bin(2))), (3, 1536));
    }
}
