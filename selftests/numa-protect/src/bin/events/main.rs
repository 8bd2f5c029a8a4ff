// SPDX-License-Identifier: GPL-2.0
//! What is no NUMA scan, and who does not listen to one: changes the machine's scan and KSM settings while it runs.
//!
//! Prints KTAP. Five groups of tests:
//!
//! - `operations.rs`: whatever else changes page tables does so as before. No event of it carries the flag of NUMA scans
//!   or brings a report, and KVM obeys it.
//! - `plain.rs`: a subscriber without `numa_protect` hears what it would hear if there were no such callback.
//! - `vma_edges.rs`: a scan keeps to its mapping, also inside of a huge page.
//! - `kept.rs`: what KVM knows by other ways than the page tables that scans change, it keeps.
//! - `device.rs`: a scan leaves memory alone that is not there, but on a device, and waits for a device that is busy.
//!
//! Runs in a process of its own, started once scans are fast, and in a memory cgroup of its own.

mod device;
mod kept;
mod operations;
mod plain;
mod vma_edges;

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use clap::Parser;
use guest::balancing::{self, Settings, CPU_NODE, MEMORY_NODE};
use guest::ktap::{diagnostic, Ktap, Outcome};
use guest::memcg::{self, Memcg, Source};
use guest::memory::{Backing, GuestMemory, Pinned};
use guest::needs::{self, Need};
use guest::vm::{Sweep, Vm};

/// Room in the recorder, in records.
const RECORDS: u64 = 1 << 16;
/// Scans that reach all there is, also what they meet for the first time: the first may have begun before, and they let
/// a new mapping pass once.
const SCANS: u64 = 3;
/// The longest that scans or KSM may take.
const LIMIT: Duration = Duration::from_secs(45);

/// What is no NUMA scan, and who does not listen to one.
#[derive(Parser)]
struct Args {
    /// Folder for results; this program leaves none.
    #[arg(long, default_value = ".")]
    results: PathBuf,
    /// Only the tests whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Run the tests here, in the memory cgroup given by `--memcg`, if any.
    #[arg(long, hide = true)]
    child: bool,
    #[arg(long, hide = true, requires = "child")]
    memcg: Option<PathBuf>,
}

/// A test: its name, what it cannot do without, and what it does.
struct Test {
    name: &'static str,
    needs: &'static [Need],
    run: fn(&Source) -> Result<()>,
}

/// What every test with a virtual machine needs.
const VM: &[Need] = &[needs::KVM, needs::RECORDER];

/// What no test can do without.
const ALL: &[Need] = &[
    needs::TWO_NODES,
    needs::NUMA_BALANCING,
    needs::SCAN_SETTINGS,
];

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match args.child {
        true => run(&args),
        false => run_child(&args),
    };
    done.unwrap_or_else(|error| {
        diagnostic(&format!("{error:#}"));
        ExitCode::FAILURE
    })
}

/// Runs the tests in a process that begins with fast scans.
fn run_child(args: &Args) -> Result<ExitCode> {
    let settings = match needs::missing(ALL) {
        None => {
            // Where the whole machine has to be counted, this process at least adds nothing.
            balancing::forbid_scans(CPU_NODE)?;
            Some(Settings::fast()?)
        }
        Some(_) => None,
    };
    let memcg = Memcg::create(&format!("events.{}", std::process::id()));
    let mut command = Command::new(std::env::current_exe().context("own program")?);
    command.args(["--child", "--only", &args.only]);
    match &memcg {
        Ok(memcg) => drop(command.arg("--memcg").arg(memcg.path())),
        Err(error) => diagnostic(&format!("counting the whole machine: {error:#}")),
    }
    let status = command.status().context("start the tests' process")?;
    drop((memcg, settings));
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    if code.is_none() {
        diagnostic(&format!(
            "the tests' process did not come to its end: {status}"
        ));
    }
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

fn run(args: &Args) -> Result<ExitCode> {
    let tests = [
        operations::TESTS,
        plain::TESTS,
        vma_edges::TESTS,
        kept::TESTS,
        device::TESTS,
    ];
    let tests: Vec<&Test> = tests
        .into_iter()
        .flatten()
        .filter(|test| test.name.contains(&args.only))
        .collect();
    ensure!(!tests.is_empty(), "no test's name contains {}", args.only);
    let mut ktap = Ktap::start(tests.len());
    let missing_for_all = needs::missing(ALL);
    let mut source = Source::Vmstat;
    if missing_for_all.is_none() {
        if let Some(path) = &args.memcg {
            memcg::join(path)?;
            source = Source::Memcg(path.clone());
        }
        balancing::forbid_scans(CPU_NODE)?;
        // The vCPUs' processors are left to them.
        balancing::set_affinity(&balancing::other_cpus(1)?)?;
    }
    for test in tests {
        let outcome = match missing_for_all
            .clone()
            .or_else(|| needs::missing(test.needs))
        {
            Some(reason) => Outcome::Skip(reason),
            None => match (test.run)(&source) {
                Ok(()) => Outcome::Ok,
                // What KVM has not yet.
                Err(error) if guest::errno(&error) == Some(libc::ENOTTY) => {
                    Outcome::Skip(format!("{error:#}"))
                }
                Err(error) => Outcome::NotOk(format!("{error:#}")),
            },
        };
        ktap.result(&format!("events.{}", test.name), &outcome);
    }
    Ok(ktap.finish())
}

/// A virtual machine that has mapped all of its memory.
struct Machine {
    vm: Vm,
    memory: Arc<GuestMemory>,
    /// What each vCPU must have counted in each page.
    counted: Vec<Vec<u32>>,
}

impl Machine {
    /// `bytes` of memory (a multiple of 2 MiB) on node 1, `vcpus` vCPUs on node 0.
    fn new(backing: Backing, pinned: Pinned, bytes: usize, vcpus: usize) -> Result<Machine> {
        let memory = Arc::new(GuestMemory::new(backing, pinned, bytes, MEMORY_NODE)?);
        let mut machine = Machine {
            vm: Vm::new(&memory, &balancing::vcpu_cpus(vcpus)?)?,
            counted: vec![vec![0; memory.pages()]; vcpus],
            memory,
        };
        machine.pass(machine.whole())?;
        let (mapped, pages) = (machine.mapped()?, machine.memory.pages() as u64);
        ensure!(
            mapped >= pages,
            "KVM maps {mapped} of {pages} pages after a pass over all"
        );
        Ok(machine)
    }

    fn whole(&self) -> Sweep {
        Sweep {
            first: 0,
            stride: 1,
            count: self.memory.pages(),
        }
    }

    /// One pass of each vCPU, one after the other.
    fn pass(&mut self, sweep: Sweep) -> Result<()> {
        for vcpu in 0..self.vm.vcpus() {
            self.vm.pass(vcpu, sweep)?;
            for page in sweep.pages() {
                self.counted[vcpu][page] += 1;
            }
        }
        Ok(())
    }

    /// Lets scans run over all that may be scanned, while no vCPU touches guest memory.
    fn scan(&self, source: &Source) -> Result<Scanned> {
        let (mapped, before) = (self.mapped()?, source.read()?);
        self.vm.while_spinning_inside(|| under_scans(SCANS))?;
        Ok(Scanned {
            hinted: source.read()?.pte_updates - before.pte_updates,
            dropped: mapped.saturating_sub(self.mapped()?),
        })
    }

    /// Whether memory holds what the guest counted and what was there before.
    fn verify(&self) -> Result<()> {
        let contents = self.memory.verify(&self.counted);
        contents.map_err(anyhow::Error::msg).context("guest memory")
    }

    /// Base pages that KVM maps, those of the program among them.
    fn mapped(&self) -> Result<u64> {
        Ok(self.vm.stat("pages_4k")? + (self.vm.stat("pages_2m")? << 9))
    }
}

/// What [`Machine::scan`] saw, in base pages.
struct Scanned {
    hinted: u64,
    /// By KVM.
    dropped: u64,
}

/// Runs `body` with scans going on, until `scans` of them have ended. Something else has to use CPU time in user mode or
/// in a guest meanwhile.
fn under_scans(scans: u64) -> Result<()> {
    balancing::enable(true)?;
    let waited = balancing::wait_for_scans(scans, LIMIT);
    balancing::enable(false)?;
    waited.map(drop)
}
