// SPDX-License-Identifier: GPL-2.0
//! Looks at a running system for somebody who runs VMs there: is NUMA balancing on, is the series in the kernel, which VMs are
//! there, how much of each is pinned, what scans cost them, and what to do. Reads /proc and /sys, counts with perf events, and
//! changes nothing. Needs neither the module nor root, and says what it could not see.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use clap::Args;
use perf_event::events::Tracepoint;
use perf_event::{Builder, Counter};

const MIB: u64 = 1 << 20;
/// Where the kernel says what functions it has; also to those whom it does not tell the addresses.
const SYMBOLS: &str = "/proc/kallsyms";
/// What only a kernel with the series has.
const SERIES: &str = "mmu_notifier_numa_hints_next";
const BALANCING: &str = "/proc/sys/kernel/numa_balancing";
const KVM: &str = "/sys/kernel/debug/kvm";
/// What is watched of a VM: what KVM calls it, and what it is here.
const COUNTERS: &[(&str, &str)] = &[
    ("pf_taken", "faults"),
    ("remote_tlb_flush_requests", "TLB flush requests"),
];

/// What to look at.
#[derive(Args)]
pub struct Options {
    /// Only these processes; all VMs if not given
    #[arg(short, long = "pid")]
    pids: Vec<u32>,
    /// How long to watch, in seconds
    #[arg(short, long, default_value_t = 5.0)]
    seconds: f64,
}

/// The machine.
#[derive(Clone, Debug, Default, PartialEq)]
struct Machine {
    release: String,
    /// Whether the series is in the kernel; none where that cannot be seen.
    series: Option<bool>,
    /// Nodes with memory.
    nodes: usize,
    /// The sysctl; none in a kernel without balancing.
    balancing: Option<u32>,
}

/// A process that has a VM.
#[derive(Clone, Debug, Default, PartialEq)]
struct Vm {
    pid: u32,
    name: String,
    vcpus: usize,
    /// In bytes.
    resident: u64,
    /// Pinned for the long term as far as the kernel counts it, in bytes.
    pinned: u64,
    /// Bytes on each node.
    nodes: BTreeMap<u32, u64>,
    /// What happened while it was watched.
    seen: Seen,
}

/// What there was of a VM at one time, or more of it at a later one. By name.
type Seen = BTreeMap<&'static str, u64>;
const SCANS: &str = "scans";
const MIGRATED: &str = "pages migrated";
const UNMAPS: &str = "unmap calls";
/// KVM is told to drop what it has mapped of a range. In the folder of events, wherever that is.
const UNMAP: &str = "kvm/kvm_unmap_hva_range/id";
const EVENTS: [&str; 2] = [
    "/sys/kernel/tracing/events",
    "/sys/kernel/debug/tracing/events",
];

pub fn doctor(options: &Options) -> Result<()> {
    let mut unseen = Vec::new();
    let machine = machine(&mut unseen)?;
    let mut vms = vms(&options.pids, &mut unseen)?;
    for pid in &options.pids {
        let is_seen = vms.iter().any(|vm| vm.pid == *pid);
        ensure!(
            is_seen,
            "{pid}: has no VM, or needs root to be seen, or is not there"
        );
    }
    let before: Vec<Seen> = vms.iter().map(|vm| counters(vm.pid, &mut unseen)).collect();
    let unmaps: Vec<Result<Unmaps>> = vms.iter().map(|vm| Unmaps::of(vm.pid)).collect();
    if !vms.is_empty() {
        thread::sleep(Duration::try_from_secs_f64(options.seconds).context("--seconds")?);
    }
    for ((vm, before), unmaps) in vms.iter_mut().zip(before).zip(unmaps) {
        // What could not be seen was said the first time.
        let after = counters(vm.pid, &mut Vec::new());
        vm.seen = after
            .into_iter()
            .filter_map(|(name, after)| Some((name, after.saturating_sub(*before.get(name)?))))
            .collect();
        match unmaps.and_then(Unmaps::count) {
            Ok(count) => drop(vm.seen.insert(UNMAPS, count)),
            Err(error) => unseen.push(format!("how often KVM unmaps for {}: {error:#}", vm.pid)),
        }
    }
    let mut out = io::stdout().lock();
    for line in report(&machine, &vms, options.seconds) {
        writeln!(out, "{line}")?;
    }
    for what in unseen {
        writeln!(out, "not seen: {what}")?;
    }
    out.flush().context("standard output")
}

fn machine(unseen: &mut Vec<String>) -> Result<Machine> {
    let release = "/proc/sys/kernel/osrelease";
    let release = fs::read_to_string(release).context(release)?;
    let series = match fs::read_to_string(SYMBOLS) {
        Ok(text) if !text.is_empty() => Some(text.lines().any(|line| line.ends_with(SERIES))),
        _ => {
            unseen.push(format!("whether the series is in the kernel: no {SYMBOLS}"));
            None
        }
    };
    let nodes = fs::read_to_string("/sys/devices/system/node/has_memory").unwrap_or_default();
    let balancing = fs::read_to_string(BALANCING).ok();
    Ok(Machine {
        release: release.trim().into(),
        series,
        nodes: count_of_list(&nodes),
        balancing: balancing.and_then(|text| text.trim().parse().ok()),
    })
}

/// How many numbers there are in a list such as `0-3,8`.
fn count_of_list(text: &str) -> usize {
    let part = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(last.parse::<usize>().ok()? + 1 - first.parse::<usize>().ok()?)
    };
    text.trim().split(',').filter_map(part).sum()
}

/// The processes that have a VM.
fn vms(pids: &[u32], unseen: &mut Vec<String>) -> Result<Vec<Vm>> {
    let (mut vms, mut closed) = (Vec::new(), 0);
    for entry in fs::read_dir("/proc").context("/proc")? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(pid) = name.and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if !pids.is_empty() && !pids.contains(&pid) {
            continue;
        }
        match vm(pid, &path) {
            Ok(vm) => vms.extend(vm),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => closed += 1,
            // It has ended meanwhile.
            Err(_) => {}
        }
    }
    if closed > 0 {
        unseen.push(format!("{closed} processes of others: needs root"));
    }
    vms.sort_by_key(|vm: &Vm| vm.pid);
    Ok(vms)
}

/// What the process at `path` is, if it has a VM.
fn vm(pid: u32, path: &Path) -> io::Result<Option<Vm>> {
    let (mut has_vm, mut vcpus) = (false, 0);
    for descriptor in fs::read_dir(path.join("fd"))? {
        let target = fs::read_link(descriptor?.path()).unwrap_or_default();
        let target = target.to_string_lossy();
        has_vm |= target == "anon_inode:kvm-vm";
        vcpus += usize::from(target.starts_with("anon_inode:kvm-vcpu:"));
    }
    if !has_vm {
        return Ok(None);
    }
    let status = fs::read_to_string(path.join("status"))?;
    let maps = fs::read_to_string(path.join("numa_maps")).unwrap_or_default();
    let rollup = fs::read_to_string(path.join("smaps_rollup")).unwrap_or_default();
    Ok(Some(Vm {
        pid,
        name: fs::read_to_string(path.join("comm"))?.trim().into(),
        vcpus,
        resident: kib(&status, "VmRSS:"),
        // iommufd counts in the one, VFIO's container in the other, where mlock() counts, which pins nothing.
        pinned: kib(&status, "VmPin:")
            + kib(&status, "VmLck:").saturating_sub(kib(&rollup, "Locked:")),
        nodes: by_node(&maps),
        seen: Seen::new(),
    }))
}

/// A field of /proc/PID/status, in bytes.
fn kib(status: &str, name: &str) -> u64 {
    let field = status.lines().find_map(|line| line.strip_prefix(name));
    let number = field.and_then(|field| field.split_whitespace().next());
    number.and_then(|one| one.parse().ok()).unwrap_or(0) * 1024
}

/// From /proc/PID/numa_maps: bytes on each node.
fn by_node(maps: &str) -> BTreeMap<u32, u64> {
    let mut nodes = BTreeMap::new();
    for line in maps.lines() {
        let page = line
            .split_whitespace()
            .find_map(|word| word.strip_prefix("kernelpagesize_kB=")?.parse().ok())
            .unwrap_or(4)
            * 1024;
        for word in line.split_whitespace() {
            let node = word.strip_prefix('N').and_then(|word| word.split_once('='));
            let Some((node, pages)) = node else { continue };
            if let (Ok(node), Ok(pages)) = (node.parse(), pages.parse::<u64>()) {
                *nodes.entry(node).or_default() += pages * page;
            }
        }
    }
    nodes
}

/// What has been counted of the VM of process `pid` so far.
fn counters(pid: u32, unseen: &mut Vec<String>) -> Seen {
    let mut seen = Seen::new();
    let sched = fs::read_to_string(format!("/proc/{pid}/sched")).unwrap_or_default();
    let field = |name: &str| -> Option<u64> {
        let line = sched.lines().find_map(|line| line.strip_prefix(name));
        line?.split_once(':')?.1.trim().parse().ok()
    };
    for (name, what) in [
        ("mm->numa_scan_seq", SCANS),
        ("numa_pages_migrated", MIGRATED),
    ] {
        seen.extend(field(name).map(|value| (what, value)));
    }
    match folders(pid) {
        Ok(folders) => {
            for (file, what) in COUNTERS {
                let value = |folder: &PathBuf| -> Option<u64> {
                    let text = fs::read_to_string(folder.join(file)).ok()?;
                    text.trim().parse().ok()
                };
                let values: Option<Vec<u64>> = folders.iter().map(value).collect();
                seen.extend(values.map(|values| (*what, values.iter().sum())));
            }
        }
        Err(error) => unseen.push(format!(
            "what KVM counts of {pid}: {KVM}: {error}: needs root, and debugfs mounted"
        )),
    }
    seen
}

/// Counts how often the threads of a process have KVM drop mappings: scans run in them, so do faults and madvise().
struct Unmaps(Vec<Counter>);

impl Unmaps {
    fn of(pid: u32) -> Result<Unmaps> {
        let read = |folder: &&str| fs::read_to_string(Path::new(folder).join(UNMAP)).ok();
        let id = EVENTS.iter().find_map(read);
        let id =
            id.context("no tracepoint kvm:kvm_unmap_hva_range: needs root, and tracefs mounted")?;
        let id = id
            .trim()
            .parse()
            .with_context(|| format!("{UNMAP}: {id:?}"))?;
        let mut counters = Vec::new();
        for task in fs::read_dir(format!("/proc/{pid}/task")).context("its threads")? {
            let name = task?.file_name();
            let thread = name.to_str().and_then(|name| name.parse().ok());
            let thread = thread.with_context(|| format!("thread {name:?}"))?;
            let mut counter = Builder::new(Tracepoint::with_id(id))
                .observe_pid(thread)
                .any_cpu()
                .include_kernel()
                .build()
                .with_context(|| format!("perf event of thread {thread}"))?;
            counter.enable().context("perf event")?;
            counters.push(counter);
        }
        Ok(Unmaps(counters))
    }

    fn count(mut self) -> Result<u64> {
        let counts = self.0.iter_mut().map(|counter| counter.read());
        counts.sum::<std::io::Result<u64>>().context("perf event")
    }
}

/// Where KVM's counters of the VMs of process `pid` are.
fn folders(pid: u32) -> io::Result<Vec<PathBuf>> {
    let mut folders = Vec::new();
    for entry in fs::read_dir(KVM)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|name| name.starts_with(&format!("{pid}-"))) {
            folders.push(path);
        }
    }
    Ok(folders)
}

/// All that there is to say, in lines.
fn report(machine: &Machine, vms: &[Vm], seconds: f64) -> Vec<String> {
    let mut lines = vec![format!(
        "kernel {}: {}",
        machine.release,
        match machine.series {
            Some(true) => "with the series, scans drop only what they hint",
            Some(false) => "without the series, scans drop all that they pass over",
            None => "it cannot be seen whether the series is in it",
        }
    )];
    lines.push(format!(
        "{} nodes with memory, NUMA balancing {}",
        machine.nodes,
        match machine.balancing {
            None => "not in this kernel".into(),
            Some(0) => "off".into(),
            Some(mode) => format!("on (kernel.numa_balancing={mode})"),
        }
    ));
    if vms.is_empty() {
        lines.push("no VM to be seen".into());
    }
    for vm in vms {
        let nodes = vm
            .nodes
            .iter()
            .map(|(node, bytes)| format!("{} MiB on node {node}", bytes / MIB));
        lines.push(format!(
            "VM {} ({}): {} vCPUs, {} MiB resident, {} MiB pinned; {}",
            vm.pid,
            vm.name,
            vm.vcpus,
            vm.resident / MIB,
            vm.pinned / MIB,
            nodes.collect::<Vec<_>>().join(", ")
        ));
        let seen = vm
            .seen
            .iter()
            .map(|(what, count)| format!("{count} {what}"));
        let seen = seen.collect::<Vec<_>>().join(", ");
        lines.push(format!("    in {seconds} s: {seen}"));
        lines.extend(advice(machine, vm).map(|advice| format!("    {advice}")));
    }
    lines
}

/// What to do about a VM, if anything.
fn advice(machine: &Machine, vm: &Vm) -> Option<&'static str> {
    let scanned = vm.seen.get(SCANS).is_some_and(|scans| *scans > 0);
    let mostly_pinned = vm.pinned * 2 > vm.resident;
    if machine.nodes < 2 || matches!(machine.balancing, None | Some(0)) || !scanned {
        return None;
    }
    match (machine.series, mostly_pinned) {
        (Some(true), true) => Some(
            "pinned memory is scanned and left alone: nothing to do; a policy that binds it spares the scan, too",
        ),
        (_, true) => Some(
            "pinned memory is scanned, for nothing: apply the series; or bind the guest's memory to its nodes (QEMU: \
             policy=bind,host-nodes=... of its memory backend), which keeps scans off it; or set kernel.numa_balancing=0",
        ),
        (_, false) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_counted() {
        for (text, count) in [("", 0), ("0\n", 1), ("0-1\n", 2), ("0-3,8,10-11\n", 7)] {
            assert_eq!(count_of_list(text), count, "{text}");
        }
    }

    #[test]
    fn pages_are_summed_by_node() {
        let maps = "7f00 default anon=3 dirty=3 N0=1 N1=2 kernelpagesize_kB=4\n\
                    7f10 bind:0 anon=2 N1=2 kernelpagesize_kB=2048\n\
                    7f20 default file=/lib/x mapped=1\n";
        let expected = BTreeMap::from([(0, 4096), (1, 8192 + 4 * MIB)]);
        assert_eq!(by_node(maps), expected);
    }

    #[test]
    fn fields_are_in_bytes() {
        let status = "VmLck:\t       0 kB\nVmPin:\t   65536 kB\n";
        assert_eq!(kib(status, "VmPin:"), 64 * MIB);
        assert_eq!(kib(status, "VmRSS:"), 0);
    }

    #[test]
    fn advice_is_for_pinned_memory_that_is_scanned() {
        let machine = Machine {
            series: Some(false),
            nodes: 2,
            balancing: Some(1),
            ..Machine::default()
        };
        let vm = Vm {
            resident: 100 * MIB,
            pinned: 90 * MIB,
            seen: Seen::from([(SCANS, 3)]),
            ..Vm::default()
        };
        let without = advice(&machine, &vm).unwrap();
        assert!(without.contains("apply the series"));
        let patched = Machine {
            series: Some(true),
            ..machine.clone()
        };
        assert!(advice(&patched, &vm).unwrap().contains("nothing to do"));
        let none = [
            advice(
                &Machine {
                    nodes: 1,
                    ..machine.clone()
                },
                &vm,
            ),
            advice(
                &Machine {
                    balancing: Some(0),
                    ..machine.clone()
                },
                &vm,
            ),
            advice(
                &machine,
                &Vm {
                    pinned: 0,
                    ..vm.clone()
                },
            ),
            advice(
                &machine,
                &Vm {
                    seen: Seen::new(),
                    ..vm.clone()
                },
            ),
        ];
        assert_eq!(none, [None; 4]);
    }
}
