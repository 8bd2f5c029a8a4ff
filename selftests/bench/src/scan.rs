// SPDX-License-Identifier: GPL-2.0
//! What NUMA scans of a process cost whose memory is all pinned, by its size. Pins its own
//! memory, changes the machine's scan settings while it runs, makes events of tracefs, and writes a table.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use clap::Parser;
use comfy_table::{presets, Cell, CellAlignment, Table};
use guest::balancing::{self, Settings, CPU_NODE, MEMORY_NODE};
use guest::ktap::{diagnostic, Ktap, Outcome};
use guest::memory::{Backing, GuestMemory, Pinned};
use guest::needs::{self, Need};
use guest::pins::Holder;
use guest::spans::Spans;
use guest::spread::spread;

const NEEDS: &[Need] = &[
    needs::TWO_NODES,
    needs::NUMA_BALANCING,
    needs::SCAN_SETTINGS,
    needs::KPROBE_EVENTS,
    needs::HIST_TRIGGERS,
    needs::IO_URING,
];
/// Where the kernel scans.
const SCAN: &str = "task_numa_work";
/// From one scan to the next, in milliseconds.
const PERIOD: u32 = 50;
/// Scans after which what is left out is left out.
const WARM: u64 = 4;
/// The longest that scans may take.
const LIMIT: Duration = Duration::from_secs(600);

/// What NUMA scans of pinned memory cost.
#[derive(Parser)]
struct Args {
    /// Folder for the table, bench-scan.txt.
    #[arg(long, default_value = ".")]
    results: PathBuf,
    /// How often each is measured.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Memory in MiB, a multiple of 2 (more than once).
    #[arg(long, value_delimiter = ',', default_value = "64,256,1024")]
    memory: Vec<usize>,
    /// Scans in each measurement: a multiple of 16, of which one walks over pinned memory with the series.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..))]
    scans: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let mut ktap = Ktap::start(1);
    let outcome = match needs::missing(NEEDS) {
        Some(reason) => Outcome::Skip(reason),
        None => match run(&args) {
            Ok(()) => Outcome::Ok,
            Err(error) => Outcome::NotOk(format!("{error:#}")),
        },
    };
    ktap.result("bench-scan.measured", &outcome);
    ktap.finish()
}

/// All rounds, and the table.
fn run(args: &Args) -> Result<()> {
    balancing::forbid_scans(CPU_NODE)?;
    balancing::set_affinity(&balancing::node_cpus(CPU_NODE)?)?;
    let _settings = Settings::every(PERIOD)?;
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(["memory, MiB", "a scan, ns"]);
    for mebibytes in &args.memory {
        let mut costs = Vec::new();
        for round in 1..=args.rounds {
            diagnostic(&format!(
                "round {round} of {}: {mebibytes} MiB",
                args.rounds
            ));
            costs.push(pinned(mebibytes << 20, args.scans)?);
            diagnostic(&format!("all pinned: {:.0}", costs[costs.len() - 1]));
        }
        let cells = [mebibytes.to_string(), spread(&costs, 0)];
        let cells = cells.map(|text| Cell::new(text).set_alignment(CellAlignment::Right));
        table.add_row(cells);
    }
    let text = format!(
        "{SCAN}(), nanoseconds of one of {} scans; mean and standard deviation of {} rounds\n\n{table}\n",
        args.scans, args.rounds
    );
    let path = args.results.join("bench-scan.txt");
    fs::write(&path, text).with_context(|| path.display().to_string())
}

/// What a scan takes where there is nothing to hint.
fn pinned(size: usize, scans: u64) -> Result<f64> {
    let memory = GuestMemory::pinned_by(
        Holder::IoUringUser,
        Backing::Anon,
        Pinned::All,
        size,
        MEMORY_NODE,
    )?;
    let compute = || {
        for number in 0..1000 {
            std::hint::black_box(number);
        }
    };
    balancing::while_busy(compute, || {
        balancing::wait_for_scans(WARM, LIMIT)?;
        let spans = Spans::new(&[SCAN])?;
        let scans = balancing::wait_for_scans(scans, LIMIT)?;
        let took = spans.read(SCAN)?;
        drop(spans);
        ensure!(took > 0, "no {SCAN}() in {scans} scans");
        let near = memory.nodes()?.contains(&(CPU_NODE as i32));
        ensure!(!near, "pinned memory has moved");
        Ok(took as f64 / scans as f64)
    })
}
