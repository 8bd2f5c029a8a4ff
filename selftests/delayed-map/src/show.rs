// SPDX-License-Identifier: GPL-2.0
//! What `delayed-map` has measured, kernel by kernel, and the table that comes of it; touches nothing.

use std::collections::BTreeMap;

use anyhow::{bail, ensure, Result};
use comfy_table::{presets, Cell, CellAlignment, Table};
use guest::spread::{mean, spread};
use serde::{Deserialize, Serialize};

use crate::How;

/// What is counted in a round. Pages are of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Row {
    /// Pages migrated (`numa_pages_migrated`) and made PROT_NONE (`numa_pte_updates`).
    Migrated,
    Hinted,
    /// Shootdowns that CPUs were interrupted for (`nr_tlb_remote_flush_received`; TLB in `/proc/interrupts`), and those asked
    /// for (`nr_tlb_remote_flush`).
    Ipis,
    Interrupts,
    Flushes,
    /// Faults on hints (`numa_hint_faults`), and those of them on memory of the other node.
    HintFaults,
    FarFaults,
    /// Faults whose page could not be isolated, as another fault had done so, and those that met it while it was migrated.
    Refused,
    Waits,
    /// KVM's faults (`pf_taken`), those that led to nothing, and its remote TLB flush requests.
    VmFaults,
    VmRetries,
    VmFlushes,
    /// Ranges that KVM unmapped for scans and pages that it dropped there; the same for migrations.
    ScanUnmaps,
    ScanDropped,
    MigrationUnmaps,
    MigrationDropped,
    /// NUMA scans of the VM's process until enough of its memory was near, and milliseconds.
    Scans,
    Milliseconds,
}

/// What was counted in one round.
pub type Values = BTreeMap<Row, f64>;

/// What was measured on one kernel: the rounds of each case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Boot {
    pub kernel: String,
    pub how: How,
    pub cases: BTreeMap<String, Vec<Values>>,
}

/// How a row is shown.
#[derive(Clone, Copy)]
enum Shown {
    Count,
    /// The same of what differs by little.
    FewCounts,
    /// For each page that was migrated.
    PerPage,
    /// For a thousand of KVM's faults.
    PerFaults,
}

const LINES: &[(&str, Row, Shown)] = &[
    ("pages migrated", Row::Migrated, Shown::Count),
    ("shootdown IPIs", Row::Ipis, Shown::PerPage),
    ("  TLB in /proc/interrupts", Row::Interrupts, Shown::PerPage),
    ("  remote flushes", Row::Flushes, Shown::PerPage),
    ("hints", Row::Hinted, Shown::PerPage),
    ("hint faults", Row::HintFaults, Shown::PerPage),
    ("  of far memory", Row::FarFaults, Shown::PerPage),
    (
        "  of a page just being migrated",
        Row::Refused,
        Shown::PerPage,
    ),
    ("faults on a page in migration", Row::Waits, Shown::PerPage),
    ("unmap calls for hints", Row::ScanUnmaps, Shown::PerPage),
    ("  pages dropped", Row::ScanDropped, Shown::PerPage),
    (
        "unmap calls for migrations",
        Row::MigrationUnmaps,
        Shown::PerPage,
    ),
    ("  pages dropped", Row::MigrationDropped, Shown::PerPage),
    ("KVM's faults", Row::VmFaults, Shown::PerPage),
    ("  retried, of 1,000", Row::VmRetries, Shown::PerFaults),
    ("KVM's flush requests", Row::VmFlushes, Shown::PerPage),
    ("scans until then", Row::Scans, Shown::FewCounts),
    ("milliseconds until then", Row::Milliseconds, Shown::Count),
];

/// What the table's figures mean.
pub const LEGEND: &str = "\
Mean and standard deviation over the rounds, for each page of 4 KiB that was migrated unless it says otherwise; x is the mean of the \
first kernel as a multiple of that of the second.
";

/// Fails where kernels were not measured alike: the same, as often, in all that more than one of them has.
pub fn comparable(boots: &[Boot]) -> Result<()> {
    for boot in boots {
        let kernel = &boot.kernel;
        ensure!(
            boot.how == boots[0].how,
            "{kernel} was measured otherwise than {}: {:?}, {:?}",
            boots[0].kernel,
            boot.how,
            boots[0].how
        );
        for (case, rounds) in &boot.cases {
            ensure!(!rounds.is_empty(), "{kernel}: {case} was not measured");
            let of = |other: &&Boot| {
                other
                    .cases
                    .get(case)
                    .is_some_and(|some| some.len() != rounds.len())
            };
            if let Some(other) = boots.iter().find(of) {
                bail!(
                    "{case} was measured {} times on {kernel}, and not as often on {}",
                    rounds.len(),
                    other.kernel
                );
            }
        }
    }
    Ok(())
}

/// One table of all kernels.
pub fn table(boots: &[Boot]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    let kernels = boots.iter().map(|boot| &boot.kernel[..]);
    table.set_header(["case", ""].into_iter().chain(kernels).chain(["x"]));
    let mut names: Vec<&String> = boots.iter().flat_map(|boot| boot.cases.keys()).collect();
    names.sort();
    names.dedup();
    for name in names {
        for (text, row, shown) in LINES {
            let of = |boot: &Boot| values(boot.cases.get(name)?, *row, *shown);
            let all: Vec<Option<Vec<f64>>> = boots.iter().map(of).collect();
            if all.iter().all(Option::is_none) {
                continue;
            }
            let digits = match shown {
                Shown::Count => 0,
                Shown::FewCounts => 2,
                Shown::PerPage => 4,
                Shown::PerFaults => 1,
            };
            let cells = all.iter().map(|values| match values {
                Some(values) => spread(values, digits),
                None => "-".into(),
            });
            let cells = cells.chain([multiple(&all)]);
            let cells = cells.map(|text| Cell::new(text).set_alignment(CellAlignment::Right));
            table.add_row([Cell::new(name), Cell::new(text)].into_iter().chain(cells));
        }
    }
    table
}

/// A value for each round; none where the row is in none.
fn values(rounds: &[Values], row: Row, shown: Shown) -> Option<Vec<f64>> {
    let value = |values: &Values| {
        let value = *values.get(&row)?;
        Some(match shown {
            Shown::Count | Shown::FewCounts => value,
            Shown::PerPage => value / values.get(&Row::Migrated)?,
            Shown::PerFaults => value * 1000.0 / values.get(&Row::VmFaults)?,
        })
    };
    let values: Vec<f64> = rounds.iter().filter_map(value).collect();
    (!values.is_empty()).then_some(values)
}

/// The first mean as a multiple of the second.
fn multiple(all: &[Option<Vec<f64>>]) -> String {
    match all {
        [Some(first), Some(second), ..] if mean(second) > 0.0 => {
            format!("{:.2}", mean(first) / mean(second))
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::Args;

    fn boot(kernel: &str, rounds: &[(f64, f64)]) -> Boot {
        let round = |(migrated, ipis): &(f64, f64)| {
            Values::from([(Row::Migrated, *migrated), (Row::Ipis, *ipis)])
        };
        Boot {
            kernel: kernel.into(),
            how: Args::parse_from(["delayed-map"]).how,
            cases: BTreeMap::from([("one".into(), rounds.iter().map(round).collect())]),
        }
    }

    #[test]
    fn kernels_are_compared_for_each_page() {
        let boots = [
            boot("old", &[(100.0, 200.0), (100.0, 400.0)]),
            boot("new", &[(50.0, 25.0)]),
        ];
        let text = table(&boots).to_string();
        let line = text
            .lines()
            .find(|line| line.contains("shootdown"))
            .unwrap();
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        assert_eq!(cells[3..6], ["3.0000 ± 1.4142", "0.5000", "6.00"]);
    }

    #[test]
    fn other_sizes_and_rounds_are_refused() {
        let boots = |rounds: &[(f64, f64)]| [boot("old", &[(1.0, 1.0)]), boot("new", rounds)];
        let mut all = boots(&[(1.0, 2.0)]);
        assert!(comparable(&all).is_ok());
        all[1].how.memory += 2;
        let sizes = comparable(&all).unwrap_err();
        assert!(sizes.to_string().contains("otherwise than old"));
        let rounds = comparable(&boots(&[(1.0, 1.0), (1.0, 1.0)])).unwrap_err();
        assert!(rounds.to_string().contains("not as often on new"));
        let nothing = comparable(&boots(&[])).unwrap_err();
        assert!(nothing.to_string().contains("as often on new"));
    }

    #[test]
    fn a_kernel_without_the_case_has_no_value() {
        let mut other = boot("new", &[]);
        other.cases.clear();
        let text = table(&[boot("old", &[(1.0, 1.0)]), other]).to_string();
        assert!(text.lines().nth(2).unwrap().contains(" - "));
    }
}
