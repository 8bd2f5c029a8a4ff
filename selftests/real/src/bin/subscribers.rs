// SPDX-License-Identifier: GPL-2.0
//! Subscribers of MMU notifiers other than KVM, each with its own tests, which run unchanged while NUMA scans go over their
//! processes; changes the machine's scan settings while it runs, and has an RDMA device on the loopback interface meanwhile.
//!
//! HMM's simulated device (lib/test_hmm.c) has the kernel's hmm-tests; soft-RoCE, which pages memory in on demand, has those of
//! rdma-core. Their processes are moved from node to node all the time, so that there is always memory to be hinted. Prints
//! KTAP: what a subscriber's own tests said are lines before a result, to be held against those on another kernel.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::chroot;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use clap::Parser;
use guest::balancing::{self, Settings};
use guest::ktap::{diagnostic, Ktap, Outcome};
use guest::memcg::{Memcg, Source};
use guest::needs::{self, Need};
use guest::tracefs::Events;
use runner::mount;

const ALL: &[Need] = &[
    needs::TWO_NODES,
    needs::NUMA_BALANCING,
    needs::SCAN_SETTINGS,
    needs::MEMCG,
    needs::KPROBE_EVENTS,
];
/// Time from one scan of a process to the next, in milliseconds: some of the tests are short.
const PERIOD: u32 = 10;
/// What hints the pages of a mapping, and what mprotect() calls for one.
const SCAN: &str = "change_prot_numa";
const MPROTECT: &str = "mprotect_fixup";
/// `MMU_NOTIFY_PROTECTION_VMA`, of scans and mprotect() alike.
const PROTECTION: &str = "event=2";
/// How long processes stay on a node.
const STAY: Duration = Duration::from_millis(50);
/// When they say nothing for so long, a sign of life is printed for them.
const SILENCE: Duration = Duration::from_secs(20);
/// A subscriber's tests are stopped when they have not ended by then.
const LIMIT: Duration = Duration::from_secs(600);
/// Where rdma-core's tests are, in Debian's package.
const RDMA_TESTS: &str = "/usr/share/doc/rdma-core/tests";
const RDMA_DEVICE: &str = "rxe_numa";

/// Subscribers of MMU notifiers other than KVM, under NUMA scans.
#[derive(Parser)]
struct Args {
    /// Folder for results; this program leaves none.
    #[arg(long, default_value = ".")]
    results: PathBuf,
    /// Use the tools of the 9p share `root`, as a test guest has none.
    #[arg(long)]
    share: bool,
    /// The kernel's hmm-tests, as the share sees it.
    #[arg(long, default_value = "../mm/hmm-tests")]
    hmm_tests: PathBuf,
    /// How often rdma-core's tests are run.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Leave NUMA balancing off, to see which tests notice.
    #[arg(long)]
    no_scans: bool,
}

/// A subscriber and its tests.
struct Subscriber {
    name: &'static str,
    /// The function by which it is told of a range, and where it has the kind of change.
    callback: (&'static str, &'static str),
    /// The name of the tests' processes.
    comm: &'static str,
    /// What is not here.
    missing: fn(&Args) -> Option<String>,
    /// Makes ready what they need, and gives what starts them.
    command: fn(&Args) -> Result<Command>,
    /// Takes back what that made.
    clean_up: fn() -> Result<()>,
    /// What a line of their output says.
    read: fn(&str) -> Line,
}

const SUBSCRIBERS: [Subscriber; 2] = [
    Subscriber {
        name: "hmm",
        // Its own, dmirror_interval_invalidate(), cannot be probed. It alone subscribes to these processes, and to all of
        // their memory.
        callback: (
            "__mmu_notifier_invalidate_range_start",
            "event=+28(%di):u32",
        ),
        comm: "hmm-tests",
        missing: |args| {
            needs::missing([&Need {
                path: "/dev/hmm_dmirror0",
                remedy: "CONFIG_TEST_HMM",
            }])
            .or_else(|| {
                let path = &args.hmm_tests;
                let there = path.exists();
                let build = "tools/testing/selftests/mm has it: --hmm-tests=PATH";
                (!there).then(|| format!("no {}: {build}", path.display()))
            })
        },
        command: |args| {
            let mut command = Command::new(&args.hmm_tests);
            // Fails where it takes longer than two minutes, which tells nothing of the kernel.
            command.args(["-T", "benchmark_thp_migration"]);
            // Fails on either kernel as often, where somebody holds a page for a moment when it is to move to the device.
            command.args(["-T", "migrate_fault"]);
            Ok(command)
        },
        clean_up: || Ok(()),
        read: tap,
    },
    Subscriber {
        name: "rdma",
        callback: ("rxe_ib_invalidate_range", "event=+28(%si):u32"),
        comm: "python3",
        missing: |_| {
            needs::missing([
                &Need {
                    path: "/sys/class/infiniband",
                    remedy: "CONFIG_RDMA_RXE and CONFIG_INFINIBAND_ON_DEMAND_PAGING",
                },
                &Need {
                    path: RDMA_TESTS,
                    remedy: "rdma-core",
                },
                &Need {
                    path: "/usr/lib/python3/dist-packages/pyverbs",
                    remedy: "python3-pyverbs",
                },
                &Need {
                    path: "/usr/bin/rdma",
                    remedy: "iproute2",
                },
            ])
        },
        command: rdma_tests,
        clean_up: || call(Command::new("rdma").args(["link", "delete", RDMA_DEVICE])),
        read: unittest,
    },
];

/// A line of output.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    /// How many tests there are.
    Count(usize),
    /// Whether a test passed, and its name; behind a `#`, that it was skipped.
    Result(bool, String),
    Other,
}

/// What was seen of a subscriber's tests.
struct Seen {
    count: Option<usize>,
    results: usize,
    failed: usize,
    /// Pages hinted meanwhile, on the whole machine.
    hinted: u64,
    calls: Calls,
}

/// Calls of kernel functions by the tests' processes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Calls {
    /// Mappings that scans looked at.
    scanned: u64,
    /// Changes of protection that the subscriber was told of in a scan, and in mprotect().
    told: u64,
    told_otherwise: u64,
}

type Judge = fn(&Seen) -> Result<(), String>;
/// The first result comes behind what the tests printed.
const TESTS: &[(&str, Judge)] = &[
    ("passed", |seen| {
        match (seen.count, seen.results, seen.failed) {
            (Some(count), results, 0) if results == count && count > 0 => Ok(()),
            (count, results, failed) => Err(format!(
                "{results} results of {} tests, {failed} of them failures",
                count.unwrap_or(0)
            )),
        }
    }),
    ("scanned", |seen| match (seen.calls.scanned, seen.hinted) {
        (0, _) => Err("no mapping scanned".into()),
        (_, 0) => Err("no page hinted".into()),
        _ => Ok(()),
    }),
    ("told", |seen| match seen.calls.told {
        0 => Err("told of no scan".into()),
        _ => Ok(()),
    }),
];

fn main() -> ExitCode {
    run(&Args::parse()).unwrap_or_else(|error| {
        diagnostic(&format!("{error:#}"));
        ExitCode::FAILURE
    })
}

fn run(args: &Args) -> Result<ExitCode> {
    if args.share {
        mount::share()?;
        chroot(mount::ROOT).context(mount::ROOT)?;
        std::env::set_current_dir("/").context("/")?;
    }
    let mut ktap = Ktap::start(SUBSCRIBERS.len() * TESTS.len());
    let missing = needs::missing(ALL);
    let settings = match missing {
        None => Some(Settings::every(PERIOD)?),
        Some(_) => None,
    };
    for subscriber in &SUBSCRIBERS {
        let reason = missing.clone().or_else(|| (subscriber.missing)(args));
        let seen = match reason {
            Some(reason) => Err(Outcome::Skip(reason)),
            None => measure(subscriber, args).map_err(|error| Outcome::NotOk(format!("{error:#}"))),
        };
        for (test, judge) in TESTS {
            let outcome = match &seen {
                Ok(seen) => judge(seen).map_or_else(Outcome::NotOk, |()| Outcome::Ok),
                Err(outcome) => outcome.clone(),
            };
            ktap.result(&format!("subscribers.{}.{test}", subscriber.name), &outcome);
        }
    }
    drop(settings);
    Ok(ktap.finish())
}

fn measure(subscriber: &Subscriber, args: &Args) -> Result<Seen> {
    let name = subscriber.name;
    let memcg = Memcg::create(&format!("subscribers.{}.{name}", std::process::id()))?;
    let mut command = (subscriber.command)(args)?;
    let events = Events::collect(&[], &[(SCAN, ""), (MPROTECT, ""), subscriber.callback])?;
    let hinted = Source::Vmstat.read()?.pte_updates;

    balancing::enable(!args.no_scans)?;
    let ran = Tests::start(subscriber, &mut command, &memcg).and_then(Tests::finish);
    balancing::enable(false)?;
    (subscriber.clean_up)()?;
    let (count, results) = ran?;
    let trace = Path::new("/tmp/subscribers.trace");
    events.save(name, trace)?;
    let text = fs::read_to_string(trace).with_context(|| trace.display().to_string())?;
    let seen = Seen {
        count,
        results: results.len(),
        failed: results.iter().filter(|ok| !**ok).count(),
        hinted: Source::Vmstat.read()?.pte_updates - hinted,
        calls: calls(&text, subscriber),
    };
    diagnostic(&format!(
        "{name}: {} results, {} of them failures; {} pages hinted; {:?}",
        seen.results, seen.failed, seen.hinted, seen.calls
    ));
    Ok(seen)
}

/// The calls in a trace. A subscriber is told inside the function that changes a range: of the two, what the thread called last.
fn calls(trace: &str, subscriber: &Subscriber) -> Calls {
    let mut calls = Calls::default();
    let mut in_scan = HashMap::new();
    for line in trace.lines() {
        let Some((thread, rest)) = line.split_once(" [") else {
            continue;
        };
        let is_own = |(comm, _): &(&str, &str)| *comm == subscriber.comm;
        let Some((_, thread)) = thread.trim().rsplit_once('-').filter(is_own) else {
            continue;
        };
        let event = rest.split(": ").nth(1).unwrap_or_default();
        let is = |function: &str| event.starts_with(function);
        if is(SCAN) {
            calls.scanned += 1;
            in_scan.insert(thread, true);
        } else if is(MPROTECT) {
            in_scan.insert(thread, false);
        } else if is(subscriber.callback.0) && rest.ends_with(PROTECTION) {
            match in_scan.get(thread) {
                Some(true) => calls.told += 1,
                _ => calls.told_otherwise += 1,
            }
        }
    }
    calls
}

/// A subscriber's tests while they run.
struct Tests<'a> {
    subscriber: &'a Subscriber,
    memcg: &'a Memcg,
    child: Child,
}

impl<'a> Tests<'a> {
    fn start(
        subscriber: &'a Subscriber,
        command: &mut Command,
        memcg: &'a Memcg,
    ) -> Result<Tests<'a>> {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let procs = memcg.path().join("cgroup.procs");
        fs::write(&procs, child.id().to_string()).with_context(|| procs.display().to_string())?;
        Ok(Tests {
            subscriber,
            memcg,
            child,
        })
    }

    /// Prints what they say, moves their processes from node to node, and gives how many tests there are, and which passed.
    fn finish(mut self) -> Result<(Option<usize>, Vec<bool>)> {
        let output = self.child.stdout.take().context("no output")?;
        let (sender, lines) = channel();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let nodes = [balancing::node_cpus(0)?, balancing::node_cpus(1)?];
        let mut node = nodes.iter().cycle();
        let (begun, mut moved, mut heard) = (Instant::now(), Instant::now(), Instant::now());
        let (mut count, mut results) = (None, Vec::new());
        loop {
            match lines.recv_timeout(STAY) {
                Ok(line) => {
                    heard = Instant::now();
                    let line = String::from_utf8_lossy(&line).into_owned();
                    match (self.subscriber.read)(&line) {
                        Line::Result(ok, name) => {
                            results.push(ok);
                            let ok = if ok { "ok" } else { "not ok" };
                            diagnostic(&format!("{ok} {} {name}", results.len()));
                            continue;
                        }
                        Line::Count(number) => count = Some(number),
                        Line::Other => (),
                    }
                    // Marked, so that nothing in it is taken for a result.
                    diagnostic(&format!("| {line}"));
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => (),
            }
            if heard.elapsed() > SILENCE {
                heard = Instant::now();
                diagnostic(&format!("| after {:?}", begun.elapsed()));
            }
            if begun.elapsed() > LIMIT {
                self.child.kill().context("stop them")?;
                bail!("not at an end after {LIMIT:?}");
            }
            if moved.elapsed() > STAY {
                moved = Instant::now();
                self.move_to(node.next().context("no node")?)?;
            }
        }
        let status = self.child.wait().context("wait for them")?;
        diagnostic(&format!("{}: {status}", self.subscriber.name));
        reader.join().expect("reading does not panic");
        Ok((count, results))
    }

    /// Lets all of their threads run on `cpus` only.
    fn move_to(&self, cpus: &[usize]) -> Result<()> {
        let path = self.memcg.path().join("cgroup.threads");
        let threads = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        for thread in threads.lines() {
            // One that has ended meanwhile needs no CPU.
            let _ = balancing::set_affinity_of(thread.parse()?, cpus);
        }
        Ok(())
    }
}

/// Reads TAP.
fn tap(line: &str) -> Line {
    let (ok, rest) = match line.strip_prefix("not ok ") {
        Some(rest) => (false, rest),
        None => match (line.strip_prefix("ok "), line.strip_prefix("1..")) {
            (Some(rest), _) => (true, rest),
            (_, Some(count)) => return count.parse().map_or(Line::Other, Line::Count),
            _ => return Line::Other,
        },
    };
    match rest.split_once(' ') {
        Some((number, name)) if number.parse::<u32>().is_ok() => Line::Result(ok, name.into()),
        _ => Line::Other,
    }
}

/// Reads what Python's unittest says.
fn unittest(line: &str) -> Line {
    let words: Vec<&str> = line.split_whitespace().collect();
    if let ["Ran", count, "test" | "tests", ..] = words[..] {
        return count.parse().map_or(Line::Other, Line::Count);
    }
    let (Some(name), Some((_, outcome))) = (words.first(), line.rsplit_once(" ... ")) else {
        return Line::Other;
    };
    match (outcome.trim(), outcome.strip_prefix("skipped ")) {
        ("ok", _) => Line::Result(true, name.to_string()),
        ("FAIL" | "ERROR", _) => Line::Result(false, name.to_string()),
        (_, Some(reason)) => Line::Result(true, format!("{name} # SKIP {reason}")),
        _ => Line::Other,
    }
}

/// Makes the device, and a copy of the tests, which are packed.
fn rdma_tests(args: &Args) -> Result<Command> {
    let folder = Path::new("/tmp/rdma-core-tests");
    let device = Path::new("/sys/class/infiniband").join(RDMA_DEVICE);
    if !device.exists() {
        call(Command::new("ip").args(["link", "set", "lo", "up"]))?;
        let add = ["link", "add", RDMA_DEVICE, "type", "rxe", "netdev", "lo"];
        call(Command::new("rdma").args(add))?;
    }
    if !folder.exists() {
        call(Command::new("cp").arg("-rL").arg(RDMA_TESTS).arg(folder))?;
        call(Command::new("gunzip").arg("-r").arg(folder))?;
    }
    // The first address of the device is of IPv6, which the test kernel has not.
    let gid = |index: &usize| fs::read_to_string(device.join(format!("ports/1/gids/{index}")));
    let is_v4 = |index: &usize| gid(index).is_ok_and(|gid| gid.contains(":ffff:"));
    let gid = (0..8)
        .find(is_v4)
        .context("the device has no address of IPv4")?;
    // Results are on standard error.
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" 2>&1", "sh", "python3", "-W", "ignore"]);
    command.args(["run_tests.py", "--dev", RDMA_DEVICE, "-v"]);
    command.args(["--gid", &gid.to_string()]);
    command.args((0..args.rounds).map(|_| "tests.test_odp"));
    command.current_dir(folder);
    Ok(command)
}

fn call(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("start {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_read() {
        let result = |ok, name: &str| Line::Result(ok, name.into());
        assert_eq!(tap("1..78"), Line::Count(78));
        assert_eq!(tap("ok 12 x # SKIP y"), result(true, "x # SKIP y"));
        assert_eq!(tap("not ok 1 x"), result(false, "x"));
        assert_eq!(
            (tap("# ok 1 x"), tap("ok then")),
            (Line::Other, Line::Other)
        );

        let test = |outcome: &str| unittest(&format!("test_a (t.T.test_a) ... {outcome}"));
        assert_eq!(unittest("Ran 51 tests in 40.460s"), Line::Count(51));
        assert_eq!(test("ok"), result(true, "test_a"));
        assert_eq!(test("ERROR"), result(false, "test_a"));
        assert_eq!(test("skipped 'no'"), result(true, "test_a # SKIP 'no'"));
        assert_eq!((test(""), unittest("OK")), (Line::Other, Line::Other));
    }

    #[test]
    fn who_changes_a_protection_is_told_apart() {
        let line = |thread: &str, event: &str| format!("  {thread}  [001] .....  1.25: {event}\n");
        let (scan, mprotect) = (
            "change_prot_numa_9: (x+0x0/0x9)",
            "mprotect_fixup_9: (x+0x0/0x9)",
        );
        let told = |kind: u32| format!("rxe_ib_invalidate_range_9: (x+0x0/0x9) event={kind}");
        let trace = [
            ("python3-7", scan),
            ("python3-8", mprotect),
            ("python3-7", &told(2)),
            ("python3-7", &told(1)),
            ("python3-8", &told(2)),
            ("other-9", scan),
            ("other-9", &told(2)),
        ];
        let trace: String = trace.map(|(thread, event)| line(thread, event)).concat();
        let expected = Calls {
            scanned: 1,
            told: 1,
            told_otherwise: 1,
        };
        assert_eq!(calls(&trace, &SUBSCRIBERS[1]), expected);
    }
}
