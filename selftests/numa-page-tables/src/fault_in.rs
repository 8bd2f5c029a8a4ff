// SPDX-License-Identifier: GPL-2.0
//! What comes of page tables on the node of the memory, and what it costs: placement, retries, and cost of faults, with guest
//! memory on node 1 and vCPUs on node 0, for a VM that asked and one that did not; and what KVM's own dirty_log_perf_test says.
//!
//! Writes `fault-in.json` into the folder `--results` and prints KTAP, or with `--show` only reads such files. Changes the
//! machine's scan settings while it runs, and has the kernel fold its counters of pages.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure, Context, Result};
use clap::{Parser, ValueEnum};
use guest::balancing::{self, Settings, CPU_NODE, MEMORY_NODE};
use guest::ktap::{diagnostic, Ktap, Outcome};
use guest::memcg::Source;
use guest::memory::{Backing, GuestMemory, Pinned};
use guest::needs;
use guest::vm::{self, Sweep, Vm};
use numa_page_tables::dirty_log::{self, DirtyLog};
use numa_page_tables::show::{self, Boot, Kind, Measured, Row, Unit};
use numa_page_tables::tables::{Tables, ENTRIES};
use numa_page_tables::NEEDS;

/// How often memory is moved away from the vCPUs for balancing to bring it to them, and in how many scans.
const MOVES: usize = 2;
const SCANS: u64 = 3;
/// How often all memory is touched for the first time.
const TOUCHES: usize = 4;
/// How long scans may take.
const LIMIT: Duration = Duration::from_secs(60);

/// What it costs to have KVM's page tables on the node of the memory.
#[derive(Parser)]
struct Args {
    /// Folder for results.
    #[arg(long, default_value = ".")]
    results: PathBuf,
    /// How often each is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(16..=1024))]
    memory: u32,
    /// What the clock counts.
    #[arg(long, value_enum, default_value_t = Unit::Ns)]
    unit: Unit,
    /// Only this part (more than once); all when none is named.
    #[arg(long, value_enum)]
    part: Vec<Part>,
    /// Only a VM of this kind, where the kernel has it (more than once); all when none is named.
    #[arg(long, value_enum)]
    kind: Vec<Kind>,
    /// KVM's own test, built with the series.
    #[arg(long, default_value = dirty_log::PROGRAM)]
    dirty_log: PathBuf,
    /// Memory for each of its two vCPUs, in MiB.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(4..=512))]
    log_memory: u32,
    /// Measure nothing: print one table of these files.
    #[arg(long, num_args = 1.., value_name = "FILE")]
    show: Vec<PathBuf>,
}

/// What is measured together.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Placement and cost of faults, by one vCPU at a time.
    Faults,
    /// Faults that are taken again.
    Retries,
    /// KVM's dirty_log_perf_test.
    DirtyLog,
}

impl Part {
    const ALL: [Part; 3] = [Part::Faults, Part::Retries, Part::DirtyLog];

    fn name(self) -> &'static str {
        match self {
            Part::Faults => "faults",
            Part::Retries => "retries",
            Part::DirtyLog => "dirty_log",
        }
    }

    /// What is not here.
    fn missing(self, args: &Args) -> Option<String> {
        let log = &args.dirty_log;
        match self {
            Part::DirtyLog if !log.exists() => Some(format!(
                "no {}: make compare-page-tables builds it",
                log.display()
            )),
            Part::DirtyLog => needs::missing([&needs::THP]),
            _ => None,
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match args.show.is_empty() {
        true => run(&args),
        false => show(&args.show).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        diagnostic(&format!("{error:#}"));
        ExitCode::FAILURE
    })
}

/// One table of what these files say.
fn show(files: &[PathBuf]) -> Result<()> {
    let read = |path: &PathBuf| -> Result<Boot> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        serde_json::from_str(&text)
            .with_context(|| format!("{}: not what fault-in writes", path.display()))
    };
    let boots: Vec<Boot> = files.iter().map(read).collect::<Result<_>>()?;
    println!("{}\n\n{}", show::table(&boots), show::LEGEND);
    print!("{}", show::PUBLISHED);
    Ok(())
}

fn run(args: &Args) -> Result<ExitCode> {
    let parts = match args.part.is_empty() {
        true => &Part::ALL[..],
        false => &args.part[..],
    };
    let mut ktap = Ktap::start(parts.len());
    let missing = needs::missing(NEEDS);
    // Without this, balancing would move memory that is to stay.
    let _settings = missing.is_none().then(Settings::fast).transpose()?;
    let mut boot = Boot {
        unit: args.unit,
        rounds: Vec::new(),
    };
    for part in parts {
        let outcome = match missing.clone().or_else(|| part.missing(args)) {
            Some(reason) => Outcome::Skip(reason),
            None => match measure(*part, args, &mut boot.rounds) {
                Ok(()) => Outcome::Ok,
                Err(error) => Outcome::NotOk(format!("{error:#}")),
            },
        };
        ktap.result(&format!("fault-in.{}.measured", part.name()), &outcome);
    }
    let path = args.results.join("fault-in.json");
    fs::write(&path, serde_json::to_string_pretty(&boot)? + "\n")
        .with_context(|| path.display().to_string())?;
    diagnostic(&show::table(&[boot]).to_string());
    Ok(ktap.finish())
}

/// All rounds of one part; those that were complete also where a later one was not.
fn measure(part: Part, args: &Args, rounds: &mut Vec<Vec<Measured>>) -> Result<()> {
    let mut kinds = match vm::has_numa_page_tables()? {
        true => vec![Kind::Off, Kind::On],
        false => vec![Kind::Unpatched],
    };
    kinds.retain(|kind| args.kind.is_empty() || args.kind.contains(kind));
    let machine = match part {
        Part::DirtyLog => None,
        _ => Some(Machine::new(args)?),
    };
    let of = |kind: Kind| -> Result<Measured> {
        let values = match (part, &machine) {
            (Part::Faults, Some(machine)) => machine.faults(kind)?,
            (_, Some(machine)) => machine.retries(kind)?,
            (_, None) => DirtyLog {
                program: &args.dirty_log,
                mebibytes: args.log_memory.into(),
            }
            .measure(kind)?,
        };
        diagnostic(&format!("{kind:?}: {values:?}"));
        Ok(Measured { kind, values })
    };
    let round = |number| -> Result<Vec<Measured>> {
        diagnostic(&format!(
            "round {number} of {}: {}",
            args.rounds,
            part.name()
        ));
        kinds.iter().copied().map(of).collect()
    };
    if part == Part::Faults {
        // What the kernel makes once, for all VMs to come, is not theirs.
        round(0)?;
    }
    (1..=args.rounds).try_for_each(|number| {
        rounds.push(round(number)?);
        Ok(())
    })
}

/// Guest memory on node 1, for one VM after the other.
struct Machine {
    memory: Arc<GuestMemory>,
    /// All pages, and the first page of each leaf table.
    whole: Sweep,
    firsts: Sweep,
    leaves: u64,
    /// How often each of two vCPUs has counted every page.
    counted: Cell<[u32; 2]>,
}

impl Machine {
    fn new(args: &Args) -> Result<Machine> {
        // Nobody shares a CPU with the first vCPU.
        let cpus = balancing::node_cpus(CPU_NODE)?;
        balancing::set_affinity(&cpus[cpus.len().min(2) - 1..])?;
        let size = (args.memory as usize) << 20;
        let memory = GuestMemory::new(Backing::Anon, Pinned::None, size, MEMORY_NODE)?;
        let pages = memory.pages();
        let leaves = pages / ENTRIES as usize;
        Ok(Machine {
            memory: Arc::new(memory),
            whole: Sweep::all(pages),
            firsts: Sweep {
                stride: ENTRIES as isize,
                ..Sweep::all(leaves)
            },
            leaves: leaves as u64,
            counted: Cell::default(),
        })
    }

    fn vm(&self, kind: Kind, vcpus: usize) -> Result<Vm> {
        let cpus = balancing::vcpu_cpus(vcpus)?;
        match kind {
            Kind::On => Vm::with_numa_page_tables(&self.memory, &cpus),
            _ => Vm::new(&self.memory, &cpus),
        }
    }

    /// Placement and cost, at first and after the memory was moved to the vCPU's node and back.
    fn faults(&self, kind: Kind) -> Result<BTreeMap<Row, f64>> {
        let mut values = BTreeMap::new();
        let ways = [
            (self.whole, Row::PageFirst, Row::PageRefill),
            (self.firsts, Row::TableFirst, Row::TableRefill),
        ];
        for (sweep, first, refill) in ways {
            let before = Tables::count()?;
            let vm = self.vm(kind, 1)?;
            let placed = |node| -> Result<f64> {
                Ok(Tables::count()?.since(before).leaves_on(node, self.leaves))
            };
            values.insert(first, fault(&vm, sweep)?);
            let at_first = placed(MEMORY_NODE)?;
            self.memory.move_to(CPU_NODE)?;
            let there = fault(&vm, sweep)?;
            let near = placed(CPU_NODE)?;
            self.memory.move_to(MEMORY_NODE)?;
            let back = fault(&vm, sweep)?;
            values.insert(refill, (there + back) / 2.0);
            values.insert(Row::PlacedFirst, at_first);
            values.insert(Row::PlacedNear, near);
            values.insert(Row::PlacedBack, placed(MEMORY_NODE)?);
            self.insert_counters(&vm, &mut values);
        }
        Ok(values)
    }

    /// Whether memory holds what both vCPUs have counted there, so many passes more than before.
    fn verify(&self, passes: &[u64]) -> Result<()> {
        let before = self.counted.get();
        let now = [0, 1].map(|vcpu| before[vcpu] + passes[vcpu] as u32);
        self.counted.set(now);
        let expected = now.map(|count| vec![count; self.memory.pages()]);
        self.memory.verify(&expected).map_err(|why| anyhow!(why))
    }

    fn insert_counters(&self, vm: &Vm, values: &mut BTreeMap<Row, f64>) {
        // The unpatched kernel has neither.
        for (row, name, of) in [
            (Row::Remote, "pf_table_remote", 1),
            (Row::Replaced, "pf_table_moved", self.leaves),
        ] {
            if let Ok(count) = vm.vcpu_stat(name) {
                values.insert(row, count as f64 / of as f64);
            }
        }
    }

    /// Faults that are taken again: when two vCPUs touch all memory at once, and while they do so again and again, and
    /// balancing moves it to them.
    fn retries(&self, kind: Kind) -> Result<BTreeMap<Row, f64>> {
        let mut values = BTreeMap::new();
        let (mut again, mut faults) = (0, 0);
        for _ in 0..TOUCHES {
            let vm = self.vm(kind, 2)?;
            vm.while_passing(0, self.whole, || vm.pass(1, self.whole))
                .context("first touch")?;
            self.verify(&[1, 1]).context("first touch")?;
            again += vm.retries()?;
            faults += vm.vcpu_stat("pf_taken")?;
        }
        values.insert(Row::RetriesQuiet, per_1000(again, faults));
        values.insert(Row::FaultsQuiet, faults as f64);

        let vm = self.vm(kind, 2)?;
        let migrated = || Ok::<_, anyhow::Error>(Source::Vmstat.read()?.migrated);
        let before = migrated()?;
        for _ in 0..MOVES {
            self.memory.move_to(MEMORY_NODE)?;
            let here = migrated()?;
            balancing::enable(true)?;
            // On a busy machine, vCPUs may not have got to hinted pages by then.
            let ran = vm.while_running(&[self.whole; 2], || {
                let begun = Instant::now();
                loop {
                    balancing::wait_for_scans(SCANS, LIMIT)?;
                    if migrated()? > here {
                        return Ok(());
                    }
                    ensure!(begun.elapsed() < LIMIT, "balancing migrated no page");
                }
            });
            balancing::enable(false)?;
            let (_, passes) = ran.context("while balancing migrates")?;
            self.verify(&passes).context("while balancing migrates")?;
        }
        let migrated = migrated()? - before;
        let (again, faults) = (vm.retries()?, vm.vcpu_stat("pf_taken")?);
        values.insert(Row::RetriesLoad, per_1000(again, faults));
        values.insert(Row::FaultsLoad, faults as f64);
        values.insert(Row::Migrated, migrated as f64);
        if let Ok(count) = vm.vcpu_stat("pf_table_moved") {
            values.insert(Row::ReplacedLoad, count as f64);
        }
        drop(vm);
        self.memory.move_to(MEMORY_NODE)?;
        Ok(values)
    }
}

/// What a fault takes in a pass of the first vCPU.
fn fault(vm: &Vm, sweep: Sweep) -> Result<f64> {
    let before = vm.vcpu_stat("pf_taken")?;
    let begun = Instant::now();
    vm.pass(0, sweep)?;
    let took = begun.elapsed().as_nanos();
    let faults = vm.vcpu_stat("pf_taken")? - before;
    ensure!(faults > 0, "no fault: there is nothing to measure");
    Ok(took as f64 / faults as f64)
}

fn per_1000(part: u64, whole: u64) -> f64 {
    part as f64 * 1000.0 / whole as f64
}
