// SPDX-License-Identifier: GPL-2.0
//! Cases of a test program that run in processes of their own: what they tell, and how it is heard; starts and ends
//! the process it is given, and reads where it hangs.

#![deny(missing_docs)]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use guest::ktap::{diagnostic, Ktap, Outcome};
use guest::tracefs::Events;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// A case that says nothing for so long is stopped.
const SILENCE: Duration = Duration::from_secs(60);
/// How many events of KVM are shown of it.
const KVM_EVENTS: usize = 40;

/// What a case tells its parent, one JSON object a line. `F` is what it measured, where its parent wants to know.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message<F = ()> {
    /// A sign of life, for people.
    Progress(String),
    /// The outcome of one of the case's tests.
    Result {
        /// Name of the test within the case.
        test: String,
        /// What came of it.
        outcome: Outcome,
    },
    /// All that was measured.
    Figures(Box<F>),
}

/// Tells the parent. One that went away is no reason to stop in the middle of a measurement.
pub fn tell<F: Serialize>(message: &Message<F>) {
    if let Ok(line) = serde_json::to_string(message) {
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

/// A sign of life.
pub fn progress(text: String) {
    tell(&Message::<()>::Progress(text));
}

/// The outcome of the test `test`.
pub fn outcome(test: &str, outcome: Outcome) {
    let test = test.into();
    tell(&Message::<()>::Result { test, outcome });
}

/// A program's end: of the case that is named, which tells its parent what went wrong, or of all of them.
pub fn end(case: Option<&str>, done: Result<ExitCode>) -> ExitCode {
    done.unwrap_or_else(|error| {
        match case {
            Some(name) => progress(format!("{name}: {error:#}")),
            None => diagnostic(&format!("{error:#}")),
        }
        ExitCode::FAILURE
    })
}

/// Has `run` run a case, unless something is `missing`, and prints what came of each of its `tests`.
pub fn judge<'a>(
    ktap: &mut Ktap,
    name: &str,
    tests: impl IntoIterator<Item = &'a str>,
    missing: Option<String>,
    run: impl FnOnce(&mut HashMap<String, Outcome>) -> Result<()>,
) {
    let mut outcomes = HashMap::new();
    let rest = match missing {
        Some(reason) => Outcome::Skip(reason),
        None => match run(&mut outcomes) {
            Ok(()) => Outcome::NotOk("not judged".into()),
            Err(error) => Outcome::NotOk(format!("{error:#}")),
        },
    };
    for test in tests {
        let outcome = outcomes.get(test).unwrap_or(&rest);
        ktap.result(&format!("{name}.{test}"), outcome);
    }
}

/// Adds to what came of a test so far what was `heard` of it in boot `number`, or else `rest`: the first failure stays.
pub fn merge(merged: &mut Outcome, number: u32, heard: Option<Outcome>, rest: &str) {
    if *merged == Outcome::Ok {
        *merged = match heard {
            Some(Outcome::NotOk(reason)) => Outcome::NotOk(format!("boot {number}: {reason}")),
            Some(other) => other,
            None => Outcome::NotOk(format!("boot {number}: {rest}")),
        };
    }
}

/// Where each thread of the process `pid` is, and what it is busy with: in the kernel what it waits for, else how it spends
/// a second, and what KVM counts in it and does after it.
fn show_threads(name: &str, pid: u32) {
    let before = (times(pid), kvm_counters(pid));
    std::thread::sleep(Duration::from_secs(1));
    let (after, counters) = (times(pid), kvm_counters(pid));
    for (tid, (comm, state, ticks)) in &after {
        let stack = fs::read_to_string(format!("/proc/{pid}/task/{tid}/stack")).unwrap_or_default();
        let calls: Vec<&str> = stack
            .lines()
            .filter_map(|line| line.split_whitespace().nth(1))
            .collect();
        let spent: Vec<String> = ["user", "system", "guest"]
            .iter()
            .zip(ticks)
            .zip(before.0.get(tid).map_or([0; 3], |(_, _, ticks)| *ticks))
            .filter(|((_, after), before)| *after > before)
            .map(|((what, after), before)| format!("{} ticks {what}", after - before))
            .collect();
        let (spent, calls) = (spent.join(", "), calls.join(" < "));
        diagnostic(&format!("{name}: {comm} ({state}): {calls} {spent}"));
    }
    for (counter, value) in &counters {
        let more = value.saturating_sub(before.1.get(counter).copied().unwrap_or(0));
        if more > 0 {
            diagnostic(&format!("{name}: {}: {more} more", counter.display()));
        }
    }
    for line in kvm_events().unwrap_or_else(|error| vec![format!("no trace of KVM: {error:#}")]) {
        diagnostic(&format!("{name}: {line}"));
    }
}

/// The last of what KVM did, of all VMs: a vCPU that does not come back from it says nothing else.
fn kvm_events() -> Result<Vec<String>> {
    let events = Events::collect(&["kvm"], &[])?;
    std::thread::sleep(Duration::from_millis(50));
    events.last(KVM_EVENTS)
}

/// By thread of the process `pid`: its name, its state, and its time in user mode, in the kernel and in a guest so far, in
/// ticks (proc_pid_stat(5)).
fn times(pid: u32) -> BTreeMap<String, (String, String, [u64; 3])> {
    let mut threads = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        let (Some((_, comm)), Some((_, rest))) = (stat.split_once('('), stat.rsplit_once(')'))
        else {
            continue;
        };
        let comm = comm.rsplit_once(')').map_or(comm, |(comm, _)| comm);
        // The first of `rest` is field 3, the state.
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3).copied().unwrap_or("?");
        let ticks = [14, 15, 43].map(|number| field(number).parse().unwrap_or(0));
        threads.insert(
            task.file_name().to_string_lossy().into_owned(),
            (comm.into(), field(3).into(), ticks),
        );
    }
    threads
}

/// What KVM counts for the VMs of the process `pid` and their vCPUs, by file below debugfs.
fn kvm_counters(pid: u32) -> BTreeMap<PathBuf, u64> {
    let mut counters = BTreeMap::new();
    let mut folders = vec![PathBuf::from("/sys/kernel/debug/kvm")];
    while let Some(folder) = folders.pop() {
        let is_top = folder.ends_with("kvm");
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let is_own = entry
                .file_name()
                .to_string_lossy()
                .starts_with(&format!("{pid}-"));
            let path = entry.path();
            if path.is_dir() && (is_own || !is_top) {
                folders.push(path);
            } else if let Some(value) = fs::read_to_string(&path)
                .ok()
                .filter(|_| !is_top)
                .and_then(|text| text.trim().parse().ok())
            {
                counters.insert(path, value);
            }
        }
    }
    counters
}

/// Runs the case `name` as `command`, prints its signs of life, puts the outcomes of its tests into `outcomes`, also of a
/// case that does not come to its end, and gives its figures.
pub fn run<F: DeserializeOwned>(
    name: &str,
    command: &mut Command,
    outcomes: &mut HashMap<String, Outcome>,
) -> Result<Option<F>> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("start the case's process")?;
    let stdout = child.stdout.take().context("the case's output")?;
    let (sender, lines) = channel();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    let mut figures = None;
    let silent = loop {
        match lines.recv_timeout(SILENCE) {
            Ok(line) => match serde_json::from_str(&line) {
                Ok(Message::Progress(text)) => diagnostic(&text),
                Ok(Message::Result { test, outcome }) => {
                    outcomes.insert(test, outcome);
                }
                Ok(Message::Figures(one)) => figures = Some(*one),
                Err(error) => diagnostic(&format!("{name}: {line}: {error}")),
            },
            Err(RecvTimeoutError::Disconnected) => break false,
            Err(RecvTimeoutError::Timeout) => break true,
        }
    };
    if silent {
        show_threads(name, child.id());
        child.kill().context("stop the case's process")?;
    }
    let status = child.wait().context("wait for the case's process")?;
    drop(lines);
    let _ = reader.join();
    if silent {
        bail!("{name} said nothing for {SILENCE:?} and was stopped");
    }
    if !status.success() {
        bail!("{name} did not come to its end: {status}");
    }
    Ok(figures)
}
