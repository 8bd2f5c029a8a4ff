// SPDX-License-Identifier: GPL-2.0
//! Cases of a test program that run in processes of their own: what they tell, and how it is heard; starts and ends
//! the process it is given, and reads where it hangs.

#![deny(missing_docs)]

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use guest::ktap::{diagnostic, Outcome};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// A case that says nothing for so long is stopped.
const SILENCE: Duration = Duration::from_secs(60);

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

/// Where in the kernel each thread of the process `pid` is: what it waits for, if it hangs there.
fn show_stacks(name: &str, pid: u32) {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    for task in tasks.into_iter().flatten().flatten() {
        let read = |file| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let (comm, stat, stack) = (read("comm"), read("stat"), read("stack"));
        let state = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.split_whitespace().next());
        let calls: Vec<&str> = stack
            .lines()
            .filter_map(|line| line.split_whitespace().nth(1))
            .collect();
        diagnostic(&format!(
            "{name}: {} ({}): {}",
            comm.trim(),
            state.unwrap_or("?"),
            calls.join(" < ")
        ));
    }
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
        show_stacks(name, child.id());
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
