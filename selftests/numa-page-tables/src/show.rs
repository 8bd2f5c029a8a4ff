// SPDX-License-Identifier: GPL-2.0
//! What `fault-in` has measured, boot by boot, and the table that comes of it; touches nothing.

use std::collections::BTreeMap;

use clap::ValueEnum;
use comfy_table::{presets, Cell, CellAlignment, Table};
use guest::spread::{deviation, mean, spread};
use serde::{Deserialize, Serialize};

/// On which kernel, and whether the VM asked for page tables on the node of the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// On one that cannot be asked.
    Unpatched,
    Off,
    On,
}

/// What the clock counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Nanoseconds.
    Ns,
    /// Instructions.
    Instructions,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Row {
    /// Leaf tables on the node of the memory, in percent: at first, and after each migration.
    PlacedFirst,
    PlacedNear,
    PlacedBack,
    /// Page tables of faults that were allocated elsewhere than wanted, and those replaced.
    Remote,
    Replaced,
    /// Faults taken again, of 1,000, and the faults.
    RetriesQuiet,
    FaultsQuiet,
    RetriesLoad,
    FaultsLoad,
    /// Pages that balancing migrated meanwhile, and tables that were replaced.
    Migrated,
    ReplacedLoad,
    /// What a fault takes, of all pages, and of one page for each leaf table; at first, and after a migration.
    PageFirst,
    PageRefill,
    TableFirst,
    TableRefill,
    /// dirty_log_perf_test: see `dirty_log.rs`.
    SplitPlaced,
    SplitCpuNode,
    SplitMemoryNode,
    SplitRemote,
    SplitReplaced,
    SplitPopulate,
    SplitEnable,
    SplitDirty,
    SplitDisable,
    NestedPlaced,
    NestedCpuNode,
    NestedMemoryNode,
    NestedRemote,
    NestedReplaced,
    NestedPopulate,
    NestedEnable,
    NestedDirty,
    NestedDisable,
}

/// What was measured of a VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    pub kind: Kind,
    pub values: BTreeMap<Row, f64>,
}

/// What was measured in one boot: rounds, in each of which the kinds of VMs had their turn.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Boot {
    pub unit: Unit,
    pub rounds: Vec<Vec<Measured>>,
}

/// How a row is shown.
#[derive(Clone, Copy)]
enum Shown {
    /// Mean and standard deviation, with so many digits.
    Mean(usize),
    /// The same, of boots that counted instructions.
    Instructions,
    /// On as a multiple of off in the same round, of boots that took times.
    Ratio,
}

const LINES: &[(&str, Row, Shown)] = &[
    (
        "leaf tables on the memory's node, %: first touch",
        Row::PlacedFirst,
        Shown::Mean(0),
    ),
    (
        "  memory migrated to the vCPUs' node",
        Row::PlacedNear,
        Shown::Mean(0),
    ),
    ("  and back", Row::PlacedBack, Shown::Mean(0)),
    (
        "tables allocated elsewhere than wanted",
        Row::Remote,
        Shown::Mean(0),
    ),
    (
        "leaf tables replaced, of each, by both migrations",
        Row::Replaced,
        Shown::Mean(2),
    ),
    (
        "retries in 1,000 faults: first touch, two vCPUs at once",
        Row::RetriesQuiet,
        Shown::Mean(2),
    ),
    ("  of so many faults", Row::FaultsQuiet, Shown::Mean(0)),
    (
        "  while balancing migrates",
        Row::RetriesLoad,
        Shown::Mean(2),
    ),
    ("  of so many faults", Row::FaultsLoad, Shown::Mean(0)),
    ("  pages migrated meanwhile", Row::Migrated, Shown::Mean(0)),
    (
        "  tables replaced meanwhile",
        Row::ReplacedLoad,
        Shown::Mean(0),
    ),
    (
        "instructions for a fault: first touch",
        Row::PageFirst,
        Shown::Instructions,
    ),
    ("  after a migration", Row::PageRefill, Shown::Instructions),
    (
        "  first touch, the first page of each leaf table",
        Row::TableFirst,
        Shown::Instructions,
    ),
    (
        "  after a migration, the first page of each",
        Row::TableRefill,
        Shown::Instructions,
    ),
    (
        "time for a fault, on / off: first touch",
        Row::PageFirst,
        Shown::Ratio,
    ),
    ("  after a migration", Row::PageRefill, Shown::Ratio),
    (
        "  first touch, the first page of each leaf table",
        Row::TableFirst,
        Shown::Ratio,
    ),
    (
        "  after a migration, the first page of each",
        Row::TableRefill,
        Shown::Ratio,
    ),
    (
        "dirty_log_perf_test: split tables of node 1's memory there, %",
        Row::SplitPlaced,
        Shown::Mean(0),
    ),
    (
        "  split tables on node 0",
        Row::SplitCpuNode,
        Shown::Mean(0),
    ),
    (
        "  split tables on node 1",
        Row::SplitMemoryNode,
        Shown::Mean(0),
    ),
    (
        "  tables of faults elsewhere than wanted",
        Row::SplitRemote,
        Shown::Mean(0),
    ),
    ("  tables replaced", Row::SplitReplaced, Shown::Mean(0)),
    (
        "  time to populate, on / off",
        Row::SplitPopulate,
        Shown::Ratio,
    ),
    (
        "  time to enable logging, on / off",
        Row::SplitEnable,
        Shown::Ratio,
    ),
    (
        "  time to dirty all, twice, on / off",
        Row::SplitDirty,
        Shown::Ratio,
    ),
    (
        "  time to disable logging, on / off",
        Row::SplitDisable,
        Shown::Ratio,
    ),
    (
        "the same in a nested guest: split tables there, %",
        Row::NestedPlaced,
        Shown::Mean(0),
    ),
    (
        "  split tables on node 0",
        Row::NestedCpuNode,
        Shown::Mean(0),
    ),
    (
        "  split tables on node 1",
        Row::NestedMemoryNode,
        Shown::Mean(0),
    ),
    (
        "  tables of faults elsewhere than wanted",
        Row::NestedRemote,
        Shown::Mean(0),
    ),
    ("  tables replaced", Row::NestedReplaced, Shown::Mean(0)),
    (
        "  time to populate, on / off",
        Row::NestedPopulate,
        Shown::Ratio,
    ),
    (
        "  time to enable logging, on / off",
        Row::NestedEnable,
        Shown::Ratio,
    ),
    (
        "  time to dirty all, twice, on / off",
        Row::NestedDirty,
        Shown::Ratio,
    ),
    (
        "  time to disable logging, on / off",
        Row::NestedDisable,
        Shown::Ratio,
    ),
];

/// What the table's signs mean.
pub const LEGEND: &str = "\
Mean and standard deviation over the rounds; * is further from the unpatched kernel than twice the standard error of the \
difference. Times are compared within one boot only, and instructions and counts also between boots; - was not measured, or \
the kernel has no such counter.
";

/// What others have measured, where memory of another node takes longer.
pub const PUBLISHED: &str = "\
Published by others, and not measured here: in emulation, memory of another node takes no longer, so what a page table's \
place is worth cannot be seen.
- vMitosis, which migrates and replicates them (Panwar et al., Fast Local Page-Tables for Virtualized NUMA Servers with \
vMitosis, ASPLOS 2021, doi 10.1145/3445814.3446709), on four sockets with 1.5 TiB: \"a speedup of 1.8-3.1x for Thin \
(single-socket) and 1.06-1.6x for Wide (multi-socket) workloads\".
- The series of 2023 that was abandoned (\"NUMA aware page table allocation\") reported: v1, 2-35 % in \
dirty_log_perf_test; v3, 130-150 % in the pre-copy of a live migration of a VM with 416 vCPUs and 11 TiB on \
eight nodes; v4 (https://lore.kernel.org/kvm/20230306224127.1689967-1-vipinsh@google.com/) gives none.
";

/// One table of all boots.
pub fn table(boots: &[Boot]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(["", "unpatched", "off", "on"]);
    for (text, row, shown) in LINES {
        let of = |kind| values(boots, *row, kind, *shown);
        let all = [Kind::Unpatched, Kind::Off, Kind::On].map(of);
        if all.iter().all(Vec::is_empty) {
            continue;
        }
        let digits = match shown {
            Shown::Mean(digits) => *digits,
            Shown::Instructions => 0,
            Shown::Ratio => 2,
        };
        let cells = all.iter().map(|values| {
            let mark = match is_outside(&all[0], values) {
                true => " *",
                false => "",
            };
            match values.is_empty() {
                true => "-".into(),
                false => format!("{}{mark}", spread(values, digits)),
            }
        });
        let cells = cells.map(|text| Cell::new(text).set_alignment(CellAlignment::Right));
        table.add_row([Cell::new(text)].into_iter().chain(cells));
    }
    table
}

/// A value for each round that has the row.
fn values(boots: &[Boot], row: Row, kind: Kind, shown: Shown) -> Vec<f64> {
    let unit = match shown {
        Shown::Mean(_) => None,
        Shown::Instructions => Some(Unit::Instructions),
        Shown::Ratio => Some(Unit::Ns),
    };
    let boots = boots
        .iter()
        .filter(|boot| unit.is_none_or(|unit| unit == boot.unit));
    let rounds = boots.flat_map(|boot| &boot.rounds);
    let of = |round: &[Measured], kind| {
        let mut all = round.iter().filter(|measured| measured.kind == kind);
        all.find_map(|measured| measured.values.get(&row).copied())
    };
    let value = |round: &Vec<Measured>| match shown {
        Shown::Ratio => match kind {
            Kind::On => Some(of(round, Kind::On)? / of(round, Kind::Off)?),
            _ => None,
        },
        _ => of(round, kind),
    };
    rounds.filter_map(value).collect()
}

/// Whether the means are further from each other than twice the standard error of their difference.
fn is_outside(base: &[f64], values: &[f64]) -> bool {
    let error = |values: &[f64]| Some(deviation(values)?.powi(2) / values.len() as f64);
    match (error(base), error(values)) {
        (Some(first), Some(second)) => {
            (mean(base) - mean(values)).abs() > 2.0 * (first + second).sqrt()
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(unit: Unit, row: Row, kinds: &[(Kind, f64)], rounds: usize) -> Boot {
        let round = |number: usize| {
            let measured = |(kind, value): &(Kind, f64)| Measured {
                kind: *kind,
                // Not the same in each round.
                values: BTreeMap::from([(row, value + number as f64)]),
            };
            kinds.iter().map(measured).collect()
        };
        Boot {
            unit,
            rounds: (0..rounds).map(round).collect(),
        }
    }

    fn cells(boots: &[Boot]) -> Vec<Vec<String>> {
        let text = table(boots).to_string();
        let lines = text.lines().skip(2);
        let cells = |line: &str| {
            let cells = line.split('|').map(|cell| cell.trim().to_string());
            cells.skip(2).take(3).collect()
        };
        lines.map(cells).collect()
    }

    #[test]
    fn boots_of_both_kernels_make_one_row() {
        let boots = [
            boot(Unit::Ns, Row::RetriesLoad, &[(Kind::Unpatched, 1.0)], 3),
            boot(
                Unit::Ns,
                Row::RetriesLoad,
                &[(Kind::Off, 1.0), (Kind::On, 9.0)],
                3,
            ),
        ];
        let expected = ["2.00 ± 1.00", "2.00 ± 1.00", "10.00 ± 1.00 *"];
        assert_eq!(cells(&boots), [expected]);
    }

    #[test]
    fn times_are_shown_as_ratios_only() {
        let both = [(Kind::Off, 2.0), (Kind::On, 4.0)];
        let boots = [
            boot(Unit::Ns, Row::PageFirst, &[(Kind::Unpatched, 3.0)], 1),
            boot(Unit::Ns, Row::PageFirst, &both, 1),
            boot(Unit::Instructions, Row::PageFirst, &both, 1),
        ];
        assert_eq!(cells(&boots), [["-", "2", "4"], ["-", "-", "2.00"]]);
    }

    #[test]
    fn a_row_that_nobody_measured_is_left_out() {
        assert!(cells(&[]).is_empty());
        assert!(!is_outside(&[1.0], &[5.0]));
        assert!(!is_outside(&[1.0, 3.0], &[2.0, 4.0]));
    }
}
