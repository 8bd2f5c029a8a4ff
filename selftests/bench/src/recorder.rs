// SPDX-License-Identifier: GPL-2.0
//! What it costs to record a callback, beside what it costs to see it by a tracepoint or a kprobe. Changes memory of its own,
//! attaches to itself, makes events and instances of tracefs while it runs, and writes tables.
//!
//! Time is told by the machine's clock. Where QEMU counts instructions and lets each take a nanosecond (ACCEL=counted), it is
//! instructions that are told. Each measurement is made in a process of its own, one after the other, and again in each round.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use clap::{Parser, ValueEnum};
use comfy_table::{presets, Cell, CellAlignment, Table};
use guest::balancing;
use guest::ktap::{diagnostic, Ktap, Outcome};
use guest::needs::{self, Need};
use guest::pages::{Discarder, Pages};
use guest::spread::spread;
use guest::tracefs::Tracepoint;
use kvm_ioctls::{Kvm, VmFd};
use trace::client::Client;
use trace::record;

/// What it costs to record a callback.
#[derive(Parser)]
struct Args {
    /// Folder for the tables, bench-recorder.txt.
    #[arg(long, default_value = ".")]
    results: PathBuf,
    /// How often each is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How often pages are changed in a measurement, on all CPUs together, in steps of 512.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// On how many CPUs at once (more than once).
    #[arg(long, value_delimiter = ',', default_value = "1")]
    cpus: Vec<usize>,
    /// What the clock counts.
    #[arg(long, value_enum, default_value_t = Unit::Ns)]
    unit: Unit,
    /// Measure this way once, print what it takes and how many events there were.
    #[arg(long, hide = true, requires = "work")]
    way: Option<String>,
    /// How a page is changed in it.
    #[arg(long, hide = true, value_enum)]
    work: Option<Work>,
    /// Sleep until killed.
    #[arg(long, hide = true)]
    sleep: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Unit {
    /// Nanoseconds.
    Ns,
    /// Instructions.
    Instructions,
}

/// How a page is changed: each time, subscribers hear a start and an end.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Work {
    /// MADV_DONTNEED of a page that is not there, 512 times with each system call.
    Discard,
    /// mprotect() in a loop.
    Mprotect,
}

impl Work {
    fn name(self) -> &'static str {
        match self {
            Work::Discard => "discard",
            Work::Mprotect => "mprotect",
        }
    }

    fn step(self, pages: &Pages, discarder: &Discarder) -> Result<()> {
        match self {
            Work::Discard => discarder.discard(),
            Work::Mprotect => (0..Discarder::AT_ONCE / 2).try_for_each(|_| {
                pages.protect(libc::PROT_READ)?;
                pages.protect(libc::PROT_READ | libc::PROT_WRITE)
            }),
        }
    }
}

/// How a callback can be seen.
enum Seen {
    Not,
    /// By the recorder, attached with these words, and with this text in that file.
    Recorded(&'static str, Option<(&'static str, &'static str)>),
    /// By the recorder, in another process.
    Elsewhere,
    /// By a tracepoint of KVM's, of the starts.
    Tracepoint(&'static str),
    /// By a kprobe on each of the functions that call subscribers.
    Kprobes(&'static [&'static str]),
}

/// A way to see callbacks.
struct Way {
    name: &'static str,
    /// Whether the process has a VM, so that KVM hears of the callbacks, too.
    vm: bool,
    seen: Seen,
    /// The way that costs the same but for being seen.
    base: &'static str,
    /// Events for each time that a page is changed.
    events: u64,
}

/// What the recorder asks for the time of each record.
const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
const NOBODY: &str = "nobody";
const KVM: &str = "KVM alone";
const fn way(name: &'static str, base: &'static str, seen: Seen, events: u64) -> Way {
    Way {
        name,
        vm: true,
        seen,
        base,
        events,
    }
}

const WAYS: &[Way] = &[
    Way {
        vm: false,
        ..way(NOBODY, NOBODY, Seen::Not, 0)
    },
    Way {
        vm: false,
        ..way("recorder, of another process", NOBODY, Seen::Elsewhere, 0)
    },
    way(KVM, KVM, Seen::Not, 0),
    way("recorder", KVM, Seen::Recorded("16384", None), 2),
    way(
        "recorder, ring full",
        KVM,
        Seen::Recorded("64 nooverwrite", None),
        2,
    ),
    way(
        "recorder, filtered out",
        KVM,
        Seen::Recorded("64", Some(("filter", "callback=test_young"))),
        0,
    ),
    way(
        "recorder, disabled",
        KVM,
        Seen::Recorded("64", Some(("enabled", "0"))),
        0,
    ),
    way(
        "tracepoint kvm_unmap_hva_range",
        KVM,
        Seen::Tracepoint("kvm/kvm_unmap_hva_range"),
        1,
    ),
    way(
        "kprobe events",
        KVM,
        Seen::Kprobes(&[
            "__mmu_notifier_invalidate_range_start",
            "__mmu_notifier_invalidate_range_end",
        ]),
        2,
    ),
];

const ALL: &[Need] = &[needs::KVM, needs::KPROBE_EVENTS, needs::RECORDER];

fn main() -> ExitCode {
    let args = Args::parse();
    if args.sleep {
        thread::sleep(Duration::MAX);
    }
    if let (Some(name), Some(work)) = (&args.way, args.work) {
        return match measure(name, work, args.cpus[0], args.steps) {
            Ok((ns, events)) => {
                println!("{ns} {events}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("{name}: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let mut ktap = Ktap::start(1);
    let outcome = match needs::missing(ALL) {
        Some(reason) => Outcome::Skip(reason),
        None => match run(&args) {
            Ok(()) => Outcome::Ok,
            Err(error) => Outcome::NotOk(format!("{error:#}")),
        },
    };
    ktap.result("bench-recorder.measured", &outcome);
    ktap.finish()
}

/// All rounds, and the tables.
fn run(args: &Args) -> Result<()> {
    let loads: Vec<(Work, usize)> = [Work::Discard, Work::Mprotect]
        .into_iter()
        .flat_map(|work| args.cpus.iter().map(move |cpus| (work, *cpus)))
        .collect();
    // By load, by round, by way.
    let mut measured: Vec<Vec<Vec<f64>>> = vec![Vec::new(); loads.len()];
    for round in 1..=args.rounds {
        for ((work, cpus), rounds) in loads.iter().zip(&mut measured) {
            diagnostic(&format!(
                "round {round} of {}: {} on {cpus} of the CPUs",
                args.rounds,
                work.name()
            ));
            let steps = (args.steps / *cpus as u32).max(1);
            let ways = WAYS.iter().map(|way| {
                diagnostic(way.name);
                measure_in_child(way, *work, *cpus, steps)
            });
            rounds.push(ways.collect::<Result<_>>()?);
        }
    }
    let unit = match args.unit {
        Unit::Ns => "ns",
        Unit::Instructions => "instructions",
    };
    let mut text = String::new();
    for ((work, cpus), rounds) in loads.iter().zip(&measured) {
        text += &format!(
            "{} on {cpus} of the CPUs, mean and standard deviation of {} rounds\n\n{}\n\n",
            work.name(),
            args.rounds,
            table(unit, rounds)
        );
    }
    let clock = fs::read_to_string(CLOCK).context(CLOCK)?;
    text += &format!(
        "A record takes {} bytes. The clock is {}.\n",
        record::SIZE,
        clock.trim()
    );
    let path = args.results.join("bench-recorder.txt");
    fs::write(&path, text).with_context(|| path.display().to_string())
}

/// Nanoseconds for each time that a CPU changes its page, which it does in so many steps.
fn measure_in_child(way: &Way, work: Work, cpus: usize, steps: u32) -> Result<f64> {
    let output = Command::new(std::env::current_exe()?)
        .args(["--way", way.name, "--work", work.name()])
        .args(["--cpus", &cpus.to_string(), "--steps", &steps.to_string()])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}", error.trim());
    let (ns, events) = text.trim().split_once(' ').context("no two numbers")?;
    let (ns, events): (f64, u64) = (ns.parse()?, events.parse()?);
    let changes = u64::from(steps) * Discarder::AT_ONCE as u64;
    let expected = changes * cpus as u64 * way.events;
    ensure!(
        events >= expected && (expected > 0 || events == 0),
        "{}: {events} events, expected {expected}",
        way.name
    );
    Ok(ns / changes as f64)
}

/// What sees the callbacks, as long as it is there.
enum Observer {
    None,
    Recorder(Client),
    Elsewhere { _other: Other },
    Tracepoints(Vec<Tracepoint>),
}

/// A process that does nothing, and is recorded.
struct Other {
    child: Child,
    client: Option<Client>,
}

impl Drop for Other {
    fn drop(&mut self) {
        drop(self.client.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Observer {
    fn new(seen: &Seen) -> Result<Observer> {
        Ok(match seen {
            Seen::Not => Observer::None,
            Seen::Recorded(words, setting) => {
                let client = Client::attach(std::process::id(), words)?;
                if let Some((file, text)) = setting {
                    fs::write(client.path(file), text).context(*file)?;
                }
                Observer::Recorder(client)
            }
            Seen::Elsewhere => {
                let mut command = Command::new(std::env::current_exe()?);
                let child = command.arg("--sleep").stdin(Stdio::null()).spawn()?;
                let mut other = Other {
                    child,
                    client: None,
                };
                other.client = Some(Client::attach(other.child.id(), "16384")?);
                Observer::Elsewhere { _other: other }
            }
            Seen::Tracepoint(event) => Observer::Tracepoints(vec![Tracepoint::count(event, "")?]),
            Seen::Kprobes(functions) => {
                let probes = functions
                    .iter()
                    .map(|function| Tracepoint::count_calls(function, "", ""));
                Observer::Tracepoints(probes.collect::<Result<_>>()?)
            }
        })
    }

    /// How many events of this process there were so far.
    fn events(&self) -> Result<u64> {
        match self {
            Observer::None | Observer::Elsewhere { .. } => Ok(0),
            Observer::Recorder(client) => Ok(client.stats()?.recorded),
            Observer::Tracepoints(all) => all.iter().map(Tracepoint::fired).sum(),
        }
    }
}

/// Nanoseconds until all CPUs have done their steps, and events in them.
fn measure(name: &str, work: Work, cpus: usize, steps: u32) -> Result<(u128, u64)> {
    let way = WAYS.iter().find(|way| way.name == name);
    let way = way.context("no such way")?;
    let online = balancing::online_cpus()?;
    ensure!(
        cpus <= online.len(),
        "{cpus} CPUs: here are {}",
        online.len()
    );
    let _vm: Option<VmFd> = match way.vm {
        true => Some(Kvm::new()?.create_vm()?),
        false => None,
    };
    let observer = Observer::new(&way.seen)?;
    let (ready, go) = (Barrier::new(cpus + 1), Barrier::new(cpus + 1));
    thread::scope(|scope| {
        let (ready, go) = (&ready, &go);
        let workers: Vec<_> = online[..cpus]
            .iter()
            .map(|cpu| {
                scope.spawn(move || -> Result<()> {
                    let made = balancing::set_affinity(&[*cpu]).and_then(|()| Pages::new(1));
                    let warm = made.and_then(|pages| {
                        work.step(&pages, &pages.discarder(0)?)?;
                        Ok(pages)
                    });
                    // The others wait here, whatever came of it.
                    ready.wait();
                    go.wait();
                    let pages = warm?;
                    let discarder = pages.discarder(0)?;
                    (0..steps).try_for_each(|_| work.step(&pages, &discarder))
                })
            })
            .collect();
        ready.wait();
        let before = observer.events();
        let begun = Instant::now();
        go.wait();
        for worker in workers {
            match worker.join() {
                Ok(done) => done?,
                Err(_) => bail!("a worker panicked"),
            }
        }
        let took = begun.elapsed().as_nanos();
        Ok((took, observer.events()? - before?))
    })
}

/// For each way: what a change takes, what each event adds to that of its base in the same round, and the ratio of both.
fn table(unit: &str, rounds: &[Vec<f64>]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    let titles = [&format!("start and end, {unit}"), "each event", "ratio"];
    table.set_header(["seen by"].into_iter().chain(titles));
    for (index, way) in WAYS.iter().enumerate() {
        let base = WAYS.iter().position(|base| base.name == way.base);
        let pairs = rounds
            .iter()
            .map(|round| (round[index], base.map_or(f64::NAN, |base| round[base])));
        let all: Vec<f64> = pairs.clone().map(|(own, _)| own).collect();
        let each: Vec<f64> = pairs
            .clone()
            .map(|(own, base)| (own - base) / way.events as f64)
            .collect();
        let ratio: Vec<f64> = pairs.map(|(own, base)| own / base).collect();
        let texts = [
            spread(&all, 0),
            if way.events > 0 {
                spread(&each, 0)
            } else {
                String::new()
            },
            if way.base != way.name {
                spread(&ratio, 2)
            } else {
                String::new()
            },
        ];
        let cells = texts.map(|text| Cell::new(text).set_alignment(CellAlignment::Right));
        table.add_row([Cell::new(way.name)].into_iter().chain(cells));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_costs_what_its_base_does_not() {
        let round = |recorder: f64| -> Vec<f64> {
            WAYS.iter()
                .map(|way| match way.name {
                    KVM => 100.0,
                    "recorder" => recorder,
                    _ => 0.0,
                })
                .collect()
        };
        let text = table("ns", &[round(300.0), round(304.0)]).to_string();
        let line = text.lines().find(|line| line.starts_with("| recorder  "));
        let cells: Vec<_> = line.unwrap().split('|').map(str::trim).collect();
        assert_eq!(cells[2..5], ["302 ± 3", "101 ± 1", "3.02 ± 0.03"]);
    }
}
