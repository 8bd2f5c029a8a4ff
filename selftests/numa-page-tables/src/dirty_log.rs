// SPDX-License-Identifier: GPL-2.0
//! KVM's own dirty_log_perf_test, run with a vCPU on each node, each with huge pages of its own node, and with the thread that
//! has them split on the node of the first; starts and ends that program, and reads what it prints.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use guest::balancing::{self, CPU_NODE, MEMORY_NODE};

use crate::show::{Kind, Row};
use crate::tables::Tables;

/// Where the test guest has it.
pub const PROGRAM: &str = "/page-tables/dirty_log_perf_test";
/// How often page tables are counted meanwhile.
const PERIOD: Duration = Duration::from_millis(5);
/// KVM's statistics, summed over VMs that are there.
const STATISTICS: &str = "/sys/kernel/debug/kvm";

/// What it is to run, and with how much memory for each vCPU.
pub struct DirtyLog<'a> {
    pub program: &'a Path,
    pub mebibytes: u64,
}

/// The rows of the guest itself, and those of a guest in it.
struct Rows {
    placed: Row,
    cpu_node: Row,
    memory_node: Row,
    remote: Row,
    replaced: Row,
    populate: Row,
    enable: Row,
    dirty: Row,
    disable: Row,
}

const PLAIN: Rows = Rows {
    placed: Row::SplitPlaced,
    cpu_node: Row::SplitCpuNode,
    memory_node: Row::SplitMemoryNode,
    remote: Row::SplitRemote,
    replaced: Row::SplitReplaced,
    populate: Row::SplitPopulate,
    enable: Row::SplitEnable,
    dirty: Row::SplitDirty,
    disable: Row::SplitDisable,
};
const NESTED: Rows = Rows {
    placed: Row::NestedPlaced,
    cpu_node: Row::NestedCpuNode,
    memory_node: Row::NestedMemoryNode,
    remote: Row::NestedRemote,
    replaced: Row::NestedReplaced,
    populate: Row::NestedPopulate,
    enable: Row::NestedEnable,
    dirty: Row::NestedDirty,
    disable: Row::NestedDisable,
};

/// Seconds that it took, by what it says of them; iterations are summed.
#[derive(Debug, Default, PartialEq)]
struct Times {
    populate: f64,
    enable: f64,
    dirty: f64,
    disable: f64,
}

impl DirtyLog<'_> {
    /// Runs it, as a guest and as a guest in a guest.
    pub fn measure(&self, kind: Kind) -> Result<BTreeMap<Row, f64>> {
        let mut values = self.run(kind, &[], &PLAIN)?;
        values.extend(self.run(kind, &["-n"], &NESTED)?);
        Ok(values)
    }

    fn run(&self, kind: Kind, more: &[&str], rows: &Rows) -> Result<BTreeMap<Row, f64>> {
        let (near, far) = (
            balancing::node_cpus(CPU_NODE)?,
            balancing::node_cpus(MEMORY_NODE)?,
        );
        ensure!(near.len() > 1, "node {CPU_NODE} has one CPU only");
        // Of both vCPUs, and of the thread that has huge pages split.
        let cpus = format!("{},{},{}", near[0], far[0], near[1]);
        let mut command = Command::new(self.program);
        // With -g all is split at once, when logging begins.
        command.args(["-g", "-v", "2", "-c", &cpus, "-s", "anonymous_thp"]);
        command.args(["-b", &format!("{}M", self.mebibytes)]);
        command.args(more);
        if kind == Kind::On {
            command.arg("-t");
        }
        // It may only use CPUs that this thread may use.
        balancing::set_affinity(&balancing::online_cpus()?)?;
        let before = Tables::count()?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let mut seen = Vec::new();
        let (mut remote, mut replaced) = (None, None);
        let status = loop {
            seen.push(Tables::count()?.since(before));
            remote = remote.max(statistic("pf_table_remote")?);
            replaced = replaced.max(statistic("pf_table_moved")?);
            match child.try_wait()? {
                Some(status) => break status,
                None => thread::sleep(PERIOD),
            }
        };
        // A page or so: less than fits into a pipe.
        let (mut said, mut wrong) = (String::new(), String::new());
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        stdout.context("no output")?.read_to_string(&mut said)?;
        stderr.context("no errors")?.read_to_string(&mut wrong)?;
        ensure!(status.success(), "{command:?}: {status}: {said}{wrong}");
        let times = times(&said).with_context(|| format!("{command:?}: {said}"))?;
        // Of each vCPU's memory.
        let leaves = self.mebibytes / 2;
        let split = split(&seen, 2 * leaves)?;
        let values = [
            (rows.placed, split.leaves_on(MEMORY_NODE, leaves)),
            (rows.cpu_node, split.cpu_node as f64),
            (rows.memory_node, split.memory_node as f64),
            (rows.populate, times.populate),
            (rows.enable, times.enable),
            (rows.dirty, times.dirty),
            (rows.disable, times.disable),
        ];
        let counts = [(rows.remote, remote), (rows.replaced, replaced)];
        let counts = counts
            .into_iter()
            .filter_map(|(row, count)| Some((row, count? as f64)));
        Ok(values.into_iter().chain(counts).collect())
    }
}

/// The page tables that came when so many huge pages were split: those when there were most, without those that there were
/// before.
fn split(seen: &[Tables], huge_pages: u64) -> Result<Tables> {
    let total = |tables: &Tables| tables.cpu_node + tables.memory_node;
    let most = (0..seen.len()).max_by_key(|at| total(&seen[*at]));
    let most = most.context("nothing seen")?;
    let before = total(&seen[most]).checked_sub(huge_pages);
    let is_before = |tables: &&Tables| before.is_some_and(|before| total(tables) <= before);
    let earlier = seen[..most].iter().rfind(is_before);
    let earlier = earlier
        .with_context(|| format!("{:?} is no more by {huge_pages} than before", seen[most]))?;
    Ok(seen[most].since(*earlier))
}

/// A statistic of KVM's; none where the kernel has it not.
fn statistic(name: &str) -> Result<Option<u64>> {
    let path = Path::new(STATISTICS).join(name);
    match fs::read_to_string(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        text => {
            let count = text.map(|text| text.trim().parse());
            let count = count.with_context(|| path.display().to_string())?;
            Ok(Some(count.with_context(|| path.display().to_string())?))
        }
    }
}

/// Reads what it says.
fn times(said: &str) -> Result<Times> {
    let of = |what: &str| -> Result<f64> {
        let lines = said.lines().filter_map(|line| line.split_once(what));
        let seconds: Vec<f64> = lines
            .map(|(_, time)| time.trim().trim_end_matches('s').parse())
            .collect::<Result<_, _>>()
            .with_context(|| format!("no time: {what}"))?;
        ensure!(!seconds.is_empty(), "nothing of: {what}");
        Ok(seconds.iter().sum())
    };
    Ok(Times {
        populate: of("Populate memory time:")?,
        enable: of("Enabling dirty logging time:")?,
        dirty: of(" dirty memory time:")?,
        disable: of("Disabling dirty logging time:")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_before_a_split_does_not_count() {
        let tables = |(cpu_node, memory_node)| Tables {
            cpu_node,
            memory_node,
        };
        let seen = [(0, 0), (5, 0), (5, 2), (20, 2), (37, 34), (4, 2), (0, 0)].map(tables);
        assert_eq!(split(&seen, 64).unwrap(), tables((32, 32)));
        assert!(split(&seen, 72).is_err());
        assert!(split(&[], 1).is_err());
    }

    #[test]
    fn what_it_says_is_read() {
        let said = "Testing guest mode: PA-bits:ANY, VA-bits:48,  4K pages\n\
            Populate memory time: 1.500000000s\nEnabling dirty logging time: 0.250000000s\n\n\
            Iteration 1 dirty memory time: 1.000000000s\nIteration 1 get dirty log time: 0.000100000s\n\
            Iteration 2 dirty memory time: 0.500000000s\nDisabling dirty logging time: 0.125000000s\n";
        let expected = Times {
            populate: 1.5,
            enable: 0.25,
            dirty: 1.5,
            disable: 0.125,
        };
        assert_eq!(times(said).unwrap(), expected);
        assert!(times("Populate memory time: 1.5s\n").is_err());
        assert!(times(&said.replace("0.250000000s", "long")).is_err());
    }
}
