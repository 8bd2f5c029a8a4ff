// SPDX-License-Identifier: GPL-2.0
//! NUMA balancing as a test needs it: nodes and CPUs, memory policies of this process, and the scan settings of
//! the machine, which are put back.

use std::fmt::Display;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

const SYSCTL: &str = "/proc/sys/kernel/numa_balancing";
const DEBUGFS: &str = "/sys/kernel/debug/sched/numa_balancing";

/// The node of vCPUs.
pub const CPU_NODE: usize = 0;
/// The node on which guest memory starts. Where it has no CPUs, it is a slower tier, and balancing promotes memory.
pub const MEMORY_NODE: usize = 1;

/// The CPUs of `node`; none where it is only memory.
pub fn node_cpus(node: usize) -> Result<Vec<usize>> {
    let path = format!("/sys/devices/system/node/node{node}/cpulist");
    cpu_list(&path).context("the tests need two NUMA nodes")
}

/// All CPUs that run.
pub fn online_cpus() -> Result<Vec<usize>> {
    cpu_list("/sys/devices/system/cpu/online")
}

/// The CPUs in a file such as `0-3,8`.
fn cpu_list(path: &str) -> Result<Vec<usize>> {
    let text = fs::read_to_string(path).context(path.to_string())?;
    let mut cpus = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.parse().context(path.to_string())?;
        let last: usize = last.parse().context(path.to_string())?;
        cpus.extend(first..=last);
    }
    Ok(cpus)
}

/// What its meminfo says of `node`, such as `MemFree:`, in KiB.
pub fn meminfo_kib(node: usize, what: &str) -> Result<u64> {
    let path = format!("/sys/devices/system/node/node{node}/meminfo");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let line = text.lines().find(|line| line.contains(what));
    let kib = line.and_then(|line| line.split_whitespace().nth(3)?.parse().ok());
    kib.with_context(|| format!("{path}: no {what}"))
}

/// Whether the memory of [`MEMORY_NODE`] is a slower tier.
pub fn tiers() -> Result<bool> {
    Ok(node_cpus(MEMORY_NODE)?.is_empty())
}

/// The CPUs for `vcpus` vCPUs, on [`CPU_NODE`].
pub fn vcpu_cpus(vcpus: usize) -> Result<Vec<usize>> {
    let cpus = node_cpus(CPU_NODE)?;
    if cpus.is_empty() {
        bail!("node {CPU_NODE} has no CPU: the tests run their vCPUs there");
    }
    Ok(cpus.into_iter().cycle().take(vcpus).collect())
}

/// The CPUs for everything else: those of [`MEMORY_NODE`], or where it has none, those of [`CPU_NODE`] without vCPUs.
pub fn other_cpus(vcpus: usize) -> Result<Vec<usize>> {
    let mut cpus = node_cpus(MEMORY_NODE)?;
    if cpus.is_empty() {
        cpus = node_cpus(CPU_NODE)?.split_off(vcpus);
    }
    Ok(cpus)
}

/// Lets the calling thread run on `cpus` only.
pub fn set_affinity(cpus: &[usize]) -> Result<()> {
    set_affinity_of(0, cpus)
}

/// Lets `thread` run on `cpus` only; 0 is the calling one.
pub fn set_affinity_of(thread: libc::pid_t, cpus: &[usize]) -> Result<()> {
    // SAFETY: cpu_set_t is plain data, CPU_SET checks its bounds, and the kernel only reads the set.
    let rc = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        for cpu in cpus {
            libc::CPU_SET(*cpu, &mut set);
        }
        libc::sched_setaffinity(thread, size_of::<libc::cpu_set_t>(), &set)
    };
    if rc != 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("run on CPUs {cpus:?}"));
    }
    Ok(())
}

/// Keeps scans out of this thread's memory and out of that of threads made later: strictly bound memory is never
/// scanned. What is to be scanned says so by [`allow_scans`], so that the kernel's counters count that alone.
pub fn forbid_scans(node: usize) -> Result<()> {
    let nodes: libc::c_ulong = 1 << node;
    // SAFETY: the kernel reads `maxnode - 1` bits of `nodes`, which is as long.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_set_mempolicy,
            libc::MPOL_BIND,
            &nodes,
            libc::c_ulong::BITS as libc::c_ulong,
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error()).context("set_mempolicy(MPOL_BIND): CONFIG_NUMA?");
    }
    Ok(())
}

/// Takes back what [`forbid_scans`] did for this thread and threads and processes made later.
pub fn default_policy() -> Result<()> {
    // SAFETY: no nodes are read for this mode.
    let rc = unsafe { libc::syscall(libc::SYS_set_mempolicy, libc::MPOL_DEFAULT, 0, 0) };
    if rc != 0 {
        return Err(io::Error::last_os_error()).context("set_mempolicy(MPOL_DEFAULT)");
    }
    Ok(())
}

/// Lets scans into `addresses` of this process, whole pages: memory of nodes 0 and 1 that balancing may move.
/// New pages come from the node of the CPU that touches them first.
pub fn allow_scans(addresses: Range<u64>) -> Result<()> {
    bind(addresses, libc::MPOL_BIND | libc::MPOL_F_NUMA_BALANCING)
}

/// Keeps scans out of `addresses` of this process, whole pages, which stay where they are.
pub fn forbid_scans_of(addresses: Range<u64>) -> Result<()> {
    bind(addresses, libc::MPOL_BIND)
}

/// Gives memory a policy for nodes 0 and 1, and so a mapping of its own where its neighbour's is another.
fn bind(addresses: Range<u64>, mode: libc::c_int) -> Result<()> {
    let nodes: libc::c_ulong = 0b11;
    // SAFETY: changes only where pages may come from; the kernel reads `maxnode - 1` bits of `nodes`.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            addresses.start,
            addresses.end - addresses.start,
            mode,
            &nodes,
            libc::c_ulong::BITS as libc::c_ulong,
            0,
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error())
            .with_context(|| format!("mbind() of mode {mode:#x}: needs two nodes with memory"));
    }
    Ok(())
}

/// The scan settings of the machine, fast, and balancing off until [`enable`]; dropped, it puts back
/// what was there.
pub struct Settings {
    saved: Vec<(PathBuf, String)>,
}

impl Settings {
    /// Makes scans as fast as the tests can use them, ten a second.
    pub fn fast() -> Result<Settings> {
        Settings::new(10, 100)
    }

    /// Lets a scan of up to 256 MiB begin every `period` milliseconds. A process takes the delay until its first scan over
    /// when it starts, so this comes before the process under test; the delay is also the period as long as no hint was taken.
    pub fn every(period: u32) -> Result<Settings> {
        Settings::new(period, period)
    }

    fn new(delay: u32, period: u32) -> Result<Settings> {
        let (delay, period) = (delay.to_string(), period.to_string());
        let mut settings = Settings { saved: Vec::new() };
        settings.replace(PathBuf::from(SYSCTL), "0")?;
        for (name, value) in [
            ("scan_delay_ms", &delay[..]),
            ("scan_period_min_ms", &period),
            ("scan_period_max_ms", &period),
            ("scan_size_mb", "256"),
        ] {
            settings.replace(PathBuf::from(DEBUGFS).join(name), value)?;
        }
        Ok(settings)
    }

    fn replace(&mut self, path: PathBuf, value: &str) -> Result<()> {
        let remedy = || {
            format!(
                "{}: needs root, CONFIG_NUMA_BALANCING and debugfs",
                path.display()
            )
        };
        let old = fs::read_to_string(&path).with_context(remedy)?;
        fs::write(&path, value).with_context(remedy)?;
        self.saved.push((path, old));
        Ok(())
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        // The period's lower bound may not pass the upper one on the way back: hence the reverse order.
        for (path, value) in self.saved.iter().rev() {
            if let Err(error) = fs::write(path, value.trim()) {
                eprintln!("{}: not put back: {error}", path.display());
            }
        }
    }
}

/// Switches NUMA balancing of the machine on or off. Off, no new scan starts.
pub fn enable(on: bool) -> Result<()> {
    let mode = match (on, tiers()?) {
        (false, _) => "0",
        (true, false) => "1",
        // NUMA_BALANCING_MEMORY_TIERING
        (true, true) => "2",
    };
    fs::write(SYSCTL, mode).context(SYSCTL)
}

/// Balances memory while `body` runs and a thread of this process, without which there would be no scans, does `work` again
/// and again.
pub fn while_busy<T>(work: impl Fn() + Sync, body: impl FnOnce() -> Result<T>) -> Result<T> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                work();
            }
        });
        let done = enable(true).and_then(|()| body());
        stop.store(true, Ordering::Relaxed);
        enable(false).and(done)
    })
}

/// How many scans of this process's whole address space have ended.
pub fn scan_seq() -> Result<u64> {
    scan_seq_of("self")
}

/// The same of the process `pid`.
pub fn scan_seq_of(pid: impl Display) -> Result<u64> {
    let path = format!("/proc/{pid}/sched");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    text.lines()
        .find_map(|line| line.strip_prefix("mm->numa_scan_seq"))
        .and_then(|rest| rest.trim_start().strip_prefix(':'))
        .and_then(|value| value.trim().parse().ok())
        .with_context(|| format!("{path}: no mm->numa_scan_seq: is CONFIG_NUMA_BALANCING set?"))
}

/// Waits until `scans` more scans have ended. Some thread of this process must be using CPU time in user mode.
pub fn wait_for_scans(scans: u64, limit: Duration) -> Result<u64> {
    let first = scan_seq()?;
    let begun = Instant::now();
    loop {
        let done = scan_seq()? - first;
        if done >= scans {
            return Ok(done);
        }
        if begun.elapsed() > limit {
            bail!("{done} of {scans} NUMA scans in {limit:?}: is the machine overloaded?");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
