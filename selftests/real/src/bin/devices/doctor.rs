// SPDX-License-Identifier: GPL-2.0
//! What `mmu-notifier-trace doctor` says of the VM of this process, while scans go over it; runs the tool.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{self, Command};

use anyhow::{Context, Result};
use guest::balancing::{self, MEMORY_NODE};
use guest::memory::GuestMemory;
use guest::vm::Vm;
use guest::PAGE;

use crate::VCPUS;

/// A user without rights.
const NOBODY: u32 = 65534;

/// What is wrong with it, if anything. `tool` is the tool; `dropped` is whether scans drop memory that is pinned.
pub fn look(
    tool: &Path,
    vm: &Vm,
    memory: &GuestMemory,
    dropped: bool,
) -> Result<Result<(), String>> {
    let pid = process::id().to_string();
    let say = |command: &mut Command| -> Result<(Option<i32>, String)> {
        let output = command
            .output()
            .with_context(|| tool.display().to_string())?;
        let text = [output.stdout, output.stderr].concat();
        Ok((
            output.status.code(),
            String::from_utf8_lossy(&text).into_owned(),
        ))
    };
    let doctor = || {
        let mut command = Command::new(tool);
        command.arg("doctor");
        command
    };
    let seen = vm.while_spinning(|| {
        balancing::enable(true)?;
        let seen = say(doctor().args(["--pid", &pid, "--seconds", "2"]));
        balancing::enable(false)?;
        seen
    })?;
    let nobody = say(doctor().args(["--seconds", "0"]).uid(NOBODY).gid(NOBODY))?;
    let none = say(doctor().args(["--pid", "1"]))?;

    let series = match dropped {
        true => "without the series",
        false => "with the series",
    };
    let mib = (memory.pages() * PAGE) >> 20;
    let expected: [(_, _, &[&str]); 3] = [
        (
            &seen,
            0,
            &[
                series,
                "NUMA balancing on (kernel.numa_balancing=1)",
                &format!("VM {pid} (devices): {VCPUS} vCPUs, "),
                &format!(", {mib} MiB pinned; "),
                &format!(" MiB on node {MEMORY_NODE}"),
                "pinned memory is scanned",
            ],
        ),
        (
            &nobody,
            0,
            &[
                series,
                "no VM to be seen",
                "processes of others: needs root",
            ],
        ),
        (&none, 2, &["1: has no VM"]),
    ];
    for ((code, text), wanted, said) in expected {
        let missing = said.iter().find(|said| !text.contains(**said));
        if *code != Some(wanted) || missing.is_some() {
            return Ok(Err(format!(
                "{missing:?} is not said, or ends with {code:?}, not {wanted}: {text}"
            )));
        }
    }
    let counted = |what: &str| -> Option<u64> {
        let (_, counts) = seen.1.split_once(" s: ")?;
        let (before, _) = counts.split_once(&format!(" {what}"))?;
        before.rsplit(' ').next()?.parse().ok()
    };
    let (scans, unmaps) = (counted("scans"), counted("unmap calls"));
    Ok(match scans > Some(0) && (!dropped || unmaps > Some(0)) {
        true => Ok(()),
        false => Err(format!(
            "{scans:?} scans, {unmaps:?} unmap calls: {}",
            seen.1
        )),
    })
}
