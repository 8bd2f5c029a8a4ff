// SPDX-License-Identifier: GPL-2.0
//! What NUMA scans cost a VMM that is a program of its own, whichever: starts it, in its memory cgroup, with the recorder
//! attached from its first instruction on, and reads what the kernel counts of it until it has ended.
//!
//! Its threads run on node 0. Until a vCPU has run, its memory comes from node 1, by a cpuset, and is not scanned: a memory
//! policy would do that, too, but keep scans off that memory for ever, and there is no way to give one that does not
//! (MPOL_F_NUMA_BALANCING) and prefers a node to memory that another process is yet to map. What scans did is told from
//! everything else by who called: they alone change memory in [`SCAN`].

use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use std::{io, thread};

use anyhow::{bail, ensure, Context, Result};
use guest::balancing::{self, CPU_NODE, MEMORY_NODE};
use guest::memcg::{self, Source};
use guest::tracefs::{Bin, Histogram};
use guest::unmaps::{Unmaps, SCAN};
use guest::PAGE;
use serde::{Deserialize, Serialize};
use trace::client::Client;
use trace::record::{event, kind, Record};
use trace::sequence::Sequence;

/// Where user space tells KVM of guest memory (`struct kvm_userspace_memory_region2`).
const SLOT: &str = "kvm_set_memory_region";
const SLOT_ARGUMENTS: &str = "size=+16($arg2):u64 hva=+24($arg2):u64";
/// KVM's counts, a folder for each VM.
const KVM: &str = "/sys/kernel/debug/kvm";
/// Room in the recorder's ring of each CPU.
const RECORDS: &str = "65536";
/// How often is read what cannot wait.
const PERIOD: Duration = Duration::from_millis(20);

/// What to start, and how.
pub struct Vmm<'a> {
    /// The program and its arguments.
    pub words: &'a [String],
    /// The root directory that it is given.
    pub root: Option<&'a Path>,
    /// Its memory cgroup, which nobody was in before.
    pub memcg: &'a Path,
    /// Whether it may have huge pages.
    pub huge: bool,
}

/// What was counted of one VMM, from its first instruction to its end. Pages are of 4 KiB.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Boot {
    /// Pages of memory that were guest memory at some time.
    pub guest_pages: u64,
    /// Pages that were locked at the most, which those pinned for a device are (VmLck).
    pub locked: u64,
    /// Complete scans of the process, at the least: the last may have ended with it.
    pub scans: u64,
    /// Parts of the process with guest memory in them that scans went over.
    pub scan_calls: u64,
    /// Pages made PROT_NONE by scans, in those parts.
    pub hinted: u64,
    /// Faults on hints (`numa_hint_faults`), and pages migrated (`numa_pages_migrated`), of the whole process.
    pub hint_faults: u64,
    pub migrated: u64,
    /// Ranges of guest memory that KVM unmapped, whether or not anything was mapped there, and those of them for scans.
    pub unmap_calls: u64,
    pub scan_unmap_calls: u64,
    /// Pages that KVM had mapped, and dropped for scans.
    pub dropped: u64,
    /// KVM's requests to flush the TLBs of all vCPUs, and those for which a vCPU had to leave the guest.
    pub flush_requests: u64,
    pub flushes: u64,
    /// Faults that KVM took to map a page (`pf_fixed`).
    pub faults: u64,
    /// Notifications of a changed protection in guest memory that the recorder heard, and reports of hints.
    pub notifications: u64,
    pub reports: u64,
    /// From its first instruction to its end, in seconds.
    pub elapsed_s: f64,
}

/// What one VMM came to.
pub struct Ran {
    pub boot: Boot,
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub console: String,
    /// What the recorder heard.
    pub trace: Sequence,
    /// The addresses of guest memory.
    pub guest: Vec<Range<u64>>,
}

/// Runs it to its end, or for `limit`. Calls `waiting` meanwhile, again and again. NUMA balancing is on while it runs.
pub fn run(vmm: &Vmm, limit: Duration, mut waiting: impl FnMut(Duration)) -> Result<Ran> {
    for entry in fs::read_dir(KVM).context(KVM)? {
        let entry = entry?;
        ensure!(
            !entry.file_type()?.is_dir(),
            "{}: another VM runs, and would be counted, too",
            entry.path().display()
        );
    }
    let scans = Histogram::of_returns(
        SCAN,
        "start=$arg2:u64 end=$arg3:u64 hinted=$retval:u64",
        "keys=start,end:vals=hinted:size=65536",
    )?;
    let slots = Histogram::of_calls(SLOT, SLOT_ARGUMENTS, "keys=hva,size")?;
    let unmaps = Unmaps::start()?;

    memcg::allow_nodes(vmm.memcg, &MEMORY_NODE.to_string())?;
    let started = start(vmm)?;
    let pid = started.id();
    let mut client = Client::attach(pid, RECORDS).context("attach the recorder")?;
    balancing::enable(true)?;
    let begun = Instant::now();
    let mut vmm_process = Running(started.go_on()?);
    let mut stdout = vmm_process.0.stdout.take().context("its output")?;
    let console = thread::spawn(move || {
        let mut bytes = Vec::new();
        stdout.read_to_end(&mut bytes).map(|_| bytes)
    });
    let mut records: Vec<Record> = Vec::new();
    let (mut machine, mut is_running) = (None, false);
    let (mut seen_scans, mut locked) = (0, 0);
    let status = loop {
        client.read_new(&mut records)?;
        if machine.is_none() {
            machine = Machine::of(pid)?;
        }
        if let Some(machine) = machine.as_ref().filter(|_| !is_running) {
            if machine.read("exits")? > 0 {
                memcg::allow_nodes(vmm.memcg, &format!("{CPU_NODE}-{MEMORY_NODE}"))?;
                is_running = true;
            }
        }
        // Of a process that has ended, there is neither.
        seen_scans = balancing::scan_seq_of(pid).unwrap_or(seen_scans);
        locked = locked.max(locked_pages(pid).unwrap_or(0));
        if let Some(status) = vmm_process.0.try_wait().context("wait for the VMM")? {
            break status;
        }
        ensure!(
            begun.elapsed() < limit,
            "it has not ended after {limit:?}, and was stopped"
        );
        waiting(begun.elapsed());
        thread::sleep(PERIOD);
    };
    let elapsed = begun.elapsed();
    balancing::enable(false)?;
    let console = console.join().expect("reading does not panic")?;
    let console = String::from_utf8_lossy(&console).replace('\r', "");
    let machine = machine.with_context(|| format!("{status}, and there was no VM: {console}"))?;
    let trace = client.settle(records, Duration::from_secs(5))?;
    let guest = addresses(&slots.read()?);
    let scans = scans.read()?;
    let scans = scans.iter().filter(|bin| overlap(&guest, &range(bin)));
    let scans: Vec<&Bin> = scans.collect();
    let (unmapped, for_scans) = (unmaps.all()?, unmaps.by(SCAN)?);
    // Its counters reach the kernel's file only once there are enough of them: those of this process, too.
    memcg::join(vmm.memcg)?;
    let numa = Source::Memcg(vmm.memcg.into()).read()?;
    let meets = |record: &&Record| overlap(&guest, &(record.start..record.end));
    let starts = trace.pairs.iter().map(|pair| &pair.start);
    let boot = Boot {
        guest_pages: guest.iter().map(|one| one.end - one.start).sum::<u64>() / PAGE as u64,
        locked,
        scans: seen_scans,
        scan_calls: scans.iter().map(|bin| bin.hits).sum(),
        hinted: scans.iter().map(|bin| bin.fields["hinted"]).sum(),
        hint_faults: numa.hint_faults,
        migrated: numa.migrated,
        unmap_calls: unmapped.calls,
        scan_unmap_calls: for_scans.calls,
        dropped: for_scans.dropped,
        flush_requests: machine.read("remote_tlb_flush_requests")?,
        flushes: machine.read("remote_tlb_flush")?,
        faults: machine.read("pf_fixed")?,
        notifications: starts
            .filter(|start| start.event == event::PROTECTION_VMA)
            .filter(meets)
            .count() as u64,
        reports: trace
            .reports
            .iter()
            .filter(|report| report.stretches.iter().any(|one| meets(&one)))
            .count() as u64,
        elapsed_s: elapsed.as_secs_f64(),
    };
    Ok(Ran {
        boot,
        status,
        console,
        trace,
        guest,
    })
}

fn range(bin: &Bin) -> Range<u64> {
    bin.fields["start"]..bin.fields["end"]
}

/// The addresses of all memory slots that there were, ascending and disjoint.
fn addresses(slots: &[Bin]) -> Vec<Range<u64>> {
    let slot = |bin: &Bin| bin.fields["hva"]..bin.fields["hva"] + bin.fields["size"];
    let mut slots: Vec<Range<u64>> = slots
        .iter()
        .map(slot)
        .filter(|one| !one.is_empty())
        .collect();
    slots.sort_by_key(|slot| slot.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for slot in slots {
        match merged.last_mut().filter(|last| last.end >= slot.start) {
            Some(last) => last.end = last.end.max(slot.end),
            None => merged.push(slot),
        }
    }
    merged
}

/// Whether `range` meets one of `ranges`, which are ascending and disjoint.
fn overlap(ranges: &[Range<u64>], range: &Range<u64>) -> bool {
    let next = ranges.partition_point(|one| one.end <= range.start);
    ranges.get(next).is_some_and(|one| one.start < range.end)
}

/// Starts it, up to its first instruction.
fn start(vmm: &Vmm) -> Result<trace::started::Started> {
    let [program, arguments @ ..] = vmm.words else {
        bail!("no command");
    };
    let procs = vmm.memcg.join("cgroup.procs");
    let procs = File::options()
        .write(true)
        .open(&procs)
        .with_context(|| procs.display().to_string())?;
    let root = vmm
        .root
        .map(|root| std::ffi::CString::new(root.as_os_str().as_encoded_bytes()));
    let root = root.transpose()?;
    let (cpus, is_huge) = (balancing::node_cpus(CPU_NODE)?, vmm.huge);
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let other = |error: anyhow::Error| io::Error::other(format!("{error:#}"));
    let prepare = move || {
        (&procs).write_all(b"0")?;
        balancing::default_policy().map_err(other)?;
        balancing::set_affinity(&cpus).map_err(other)?;
        // SAFETY: takes numbers only.
        if !is_huge && unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if let Some(root) = &root {
            // SAFETY: a string.
            if unsafe { libc::chroot(root.as_ptr()) } != 0 {
                return Err(io::Error::last_os_error());
            }
            std::env::set_current_dir("/")?;
        }
        Ok(())
    };
    // SAFETY: this process has no other thread yet that could hold a lock while it forks.
    unsafe { command.pre_exec(prepare) };
    trace::started::Started::new(&mut command).context("start the VMM")
}

/// A process, ended with this value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Pages of the process `pid` that are locked.
fn locked_pages(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmLck:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024 / PAGE as u64)
}

/// A VM's counts. They can be read as long as this value is there, also when the VM has ended.
struct Machine {
    folder: PathBuf,
    /// KVM keeps what it counted while such a file is open.
    _kept: File,
}

impl Machine {
    /// That of the process `pid`, if it has one yet.
    fn of(pid: u32) -> Result<Option<Machine>> {
        for entry in fs::read_dir(KVM).context(KVM)? {
            let folder = entry?.path();
            let name = folder.file_name().unwrap_or_default().to_string_lossy();
            // Named after the thread that made it.
            let Some((thread, _)) = name.split_once('-') else {
                continue;
            };
            if Path::new(&format!("/proc/{pid}/task/{thread}")).exists() {
                // It may be that not all of its files are there yet.
                let kept = File::open(folder.join("exits"));
                return Ok(kept.ok().map(|_kept| Machine { folder, _kept }));
            }
        }
        Ok(None)
    }

    fn read(&self, name: &str) -> Result<u64> {
        let path = self.folder.join(name);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        text.trim()
            .parse()
            .with_context(|| path.display().to_string())
    }
}

/// Whether the VMM's memory was let go, so that the trace is whole to its end.
pub fn ended(trace: &Sequence) -> bool {
    trace.records.iter().any(|one| one.kind == kind::RELEASE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_that_touch_are_one_range() {
        let slot = |hva: u64, size: u64| Bin {
            fields: [("hva".to_string(), hva), ("size".to_string(), size)].into(),
            ..Bin::default()
        };
        let guest = addresses(&[
            slot(50, 10),
            slot(10, 20),
            slot(20, 20),
            slot(60, 0),
            slot(40, 5),
        ]);
        assert_eq!(guest, [10..45, 50..60]);
        for (range, meets) in [
            (0..10, false),
            (0..11, true),
            (45..50, false),
            (44..46, true),
            (60..70, false),
        ] {
            assert_eq!(overlap(&guest, &range), meets, "{range:?}");
        }
    }
}
