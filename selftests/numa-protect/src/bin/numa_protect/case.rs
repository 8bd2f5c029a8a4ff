// SPDX-License-Identifier: GPL-2.0
//! One case, measured: a VM of one kind of memory under NUMA scans; uses this process, `/dev/kvm` and the recorder.
//!
//! Guest memory lies on node 1, both vCPUs run on node 0, all else of the process on node 1. First comes the *stepped*
//! part, in which nothing happens at the same time, so that every count is exact. After a warm-up pass that maps
//! everything, each step is
//!
//! 1. a scan: the vCPUs spin in the guest, away from guest memory, until two whole scans have ended: the first may have
//!    begun before;
//! 2. a pass: scans are off, one vCPU after the other sweeps guest memory;
//! 3. after a pass over all of it, a look for hints that are left: this process reads every page.
//!
//! Then guest memory goes back to node 1, and the guest runs freely for a while, both vCPUs at once and against each
//! other, with scans going on; after that one more pass, and another look for hints.
//!
//! Only guest memory is scanned, the rest of the process is bound strictly to its node; so the cgroup's counts are
//! guest memory's.

use std::fs;
use std::io::{self, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use guest::balancing::{self, CPU_NODE, MEMORY_NODE};
use guest::memcg::{self, Counters, Source};
use guest::memory::{Backing, GuestMemory, Pinned, HUGE_PAGE};
use guest::pins::Holder;
use guest::tracefs::{Events, Tracepoint};
use guest::vm::{self, Seen, Sweep, Vm};
use serde::{Deserialize, Serialize};
use trace::client::{Client, Stats};
use trace::record::Record;
use trace::sequence::{Report, Sequence};

use crate::profile::{Profile, Profiler};

const VCPUS: usize = 2;
/// Scans in each step.
const SCANS: u64 = 2;
/// Scans that the guest runs freely under, at the least.
const FREE_SCANS: u64 = 4;
/// Room in the recorder for each CPU, in records.
const RECORDS: u64 = 1 << 17;
/// Fires for what KVM unmaps of a VM's memory because the process's page tables change.
const UNMAP_EVENT: &str = "kvm/kvm_unmap_hva_range";
/// What [`Plan::events`] saves: ranges of guest page numbers that KVM unmaps, and faults.
const UNMAP: (&str, &str) = ("kvm_unmap_gfn_range", "start=+8(%si):u64 end=+16(%si):u64");
const FAULT_EVENT: &str = "kvm/kvm_page_fault";
/// The longest that scans may take, and that vCPUs are waited for until they have met.
const LIMIT: Duration = Duration::from_secs(45);
const MEET: Duration = Duration::from_secs(30);

/// Which pages a pass touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// All.
    Whole,
    /// In every other step, beginning with the first, or with `--profile` in each, only every other page (huge page).
    TouchedHalf,
    /// All; every other page, beginning with the second, is merged by KSM and only read.
    KsmAlternating,
}

/// A kind of guest memory and how it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// What guest memory is made of.
    pub backing: Backing,
    /// How much of it is pinned.
    pub pinned: Pinned,
    /// Which pages a pass touches.
    pub layout: Layout,
}

impl Case {
    /// The first part of the names of its tests, and the name of its files.
    pub fn name(self) -> String {
        let backing = self.backing.name();
        match self.layout {
            Layout::Whole => format!("{backing}.pinned_{}", self.pinned.name()),
            Layout::TouchedHalf => format!("{backing}.touched_half"),
            Layout::KsmAlternating => format!("{backing}.ksm_alternating"),
        }
    }
}

/// How to run a case.
pub struct Plan {
    /// The case.
    pub case: Case,
    /// Who pins the pinned parts of guest memory.
    pub holder: Holder,
    /// Guest memory in bytes; a quarter of it where pages are merged.
    pub memory: usize,
    /// Steps that are counted.
    pub steps: u32,
    /// Length of the part in which the guest runs freely.
    pub free_run: Duration,
    /// Where files go.
    pub results: PathBuf,
    /// The memory cgroup to run in; without one, the machine's counters are used.
    pub memcg: Option<PathBuf>,
    /// Whether to measure what the kernel spends, see [`Profile`].
    pub profile: bool,
    /// Whether to save what KVM unmapped and faulted in while the guest ran freely, as `CASE.events`.
    pub events: bool,
}

/// What was counted in one case. All pages are base pages of 4 KiB; a huge page counts as 512. Everything but
/// `free_run`, `pages_on_node` and `elapsed_s` is of the stepped part alone.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Figures {
    /// Name of the case.
    pub name: String,
    /// `anon`, `memfd` or `thp`.
    pub backing: Backing,
    /// `none`, `half`, `64k_stripes` or `all`.
    pub pinned: Pinned,
    /// `whole`, `touched_half` or `ksm_alternating`.
    pub layout: Layout,
    /// Pages of guest memory.
    pub guest_pages: u64,
    /// Pages of it that are pinned.
    pub pinned_pages: u64,
    /// Pages of it that are merged.
    pub merged_pages: u64,
    /// Steps of scans and a pass.
    pub steps: u32,
    /// Complete scans of the address space.
    pub scans: u64,
    /// Pages made PROT_NONE by scans (`numa_pte_updates`).
    pub hinted: u64,
    /// Faults on hints; one for a huge page (`numa_hint_faults`).
    pub hint_faults: u64,
    /// Pages migrated (`numa_pages_migrated`).
    pub migrated: u64,
    /// Pages that KVM had mapped before a scan and no longer after it.
    pub dropped: u64,
    /// The same, counted in mappings: one for a huge page.
    pub dropped_mappings: u64,
    /// Faults that KVM took in the passes to map pages again (`pf_fixed`).
    pub faults: u64,
    /// KVM's requests to flush the TLBs of all vCPUs (`remote_tlb_flush_requests`).
    pub flush_requests: u64,
    /// Such flushes for which a vCPU had to leave the guest (`remote_tlb_flush`).
    pub flushes: u64,
    /// What the kernel spent on scans, with `--profile`.
    pub profile: Option<Profile>,
    /// What the recorder saw, where it is loaded.
    pub recorded: Option<Recorded>,
    /// Each step.
    pub each_step: Vec<Step>,
    /// The free-running part.
    pub free_run: FreeRun,
    /// In the end, pages of guest memory on node 0 and on node 1.
    pub pages_on_node: [u64; 2],
    /// Length of the whole case in seconds.
    pub elapsed_s: f64,
}

/// What the recorder saw in the stepped part.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Recorded {
    /// `invalidate_range_start()` calls of any kind.
    pub notifier_starts: u64,
    /// Of those, calls whose range meets guest memory while no vCPU touched it, that is, those of the scans.
    pub scan_starts: u64,
    /// Start/end pairs flagged as a NUMA scan's.
    pub numa_pairs: u64,
    /// `numa_protect()` calls.
    pub reports: u64,
    /// Stretches in them.
    pub stretches: u64,
    /// Pages that they say were hinted.
    pub reported: u64,
}

/// One step.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Step {
    /// Unpinned pages touched since the scan before: what the scans of this step should hint.
    pub expected: u64,
    /// Pages hinted by the scans.
    pub hinted: u64,
    /// Pages dropped by the scans.
    pub dropped: u64,
    /// Mappings dropped by the scans.
    pub dropped_mappings: u64,
    /// Pages that reports of the scans say were hinted.
    pub reported: u64,
    /// Faults of the pass.
    pub faults: u64,
    /// Mappings that the pass put back.
    pub mapped_again: u64,
    /// Mappings missing after the pass, compared with the beginning.
    pub still_missing: i64,
    /// Whether the pass touched all pages.
    pub whole_pass: bool,
    /// Hint faults in the pass.
    pub hint_faults: u64,
    /// Pages migrated.
    pub migrated: u64,
    /// Complete scans.
    pub scans: u64,
    /// Flush requests during the scans.
    pub flush_requests_scan: u64,
    /// Flush requests during the pass.
    pub flush_requests_pass: u64,
    /// Flushes during the scans for which a vCPU had to leave the guest.
    pub flushes_scan: u64,
    /// The same during the pass.
    pub flushes_pass: u64,
    /// How often `kvm_unmap_hva_range` fired for guest memory during the scans; `None` without tracefs.
    pub unmap_events: Option<u64>,
    /// Reports of the scans.
    pub reports: u64,
    /// Hints that a pass over all pages left, taken by reading every page afterwards; `None` if it was not such a pass.
    pub hints_left: Option<u64>,
    /// Sequence number of the first record of the scans.
    pub first_record: u64,
    /// Sequence number after their last record.
    pub end_record: u64,
}

/// The part in which the guest runs while scans go on.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct FreeRun {
    /// Its length in seconds.
    pub elapsed_s: f64,
    /// Complete passes over guest memory, all vCPUs together.
    pub passes: u64,
    /// Complete scans.
    pub scans: u64,
    /// Pages hinted.
    pub hinted: u64,
    /// Pages that reports say were hinted.
    pub reported: u64,
    /// Hint faults.
    pub hint_faults: u64,
    /// Pages migrated.
    pub migrated: u64,
    /// KVM's faults.
    pub faults: u64,
    /// KVM's flush requests.
    pub flush_requests: u64,
    /// KVM's flushes for which a vCPU had to leave the guest.
    pub flushes: u64,
    /// Hints that were left after one more pass without scans.
    pub hints_left: u64,
    /// Faults of vCPUs that had to be tried again.
    pub retries: u64,
    /// Pages that all vCPUs together touched while scans went on, and for how long that was, in seconds.
    pub touched: u64,
    pub scanned_s: f64,
    /// The longest that a vCPU took from one page to the next, in seconds.
    pub longest_stall_s: f64,
    /// Sequence number of its first record.
    pub first_record: u64,
}

/// All that the checks look at.
pub struct Measured {
    /// The figures.
    pub figures: Figures,
    /// What was recorded, of both parts, and the recorder's counts; `None` where it is not loaded.
    pub recording: Option<(Sequence, Stats)>,
    /// Addresses of guest memory.
    pub guest: Range<u64>,
    /// Whether guest memory began in a slower tier. The steps' passes come with balancing off, when the kernel does not tell
    /// tiers apart, so that what they promote is left to chance.
    pub tiers: bool,
    /// Whether each of KVM's faults maps one page, or one huge page, see [`vm::nested_paging`].
    pub one_page_per_fault: bool,
    /// Whether the counts are this process's own, as a memory cgroup keeps them.
    pub own_counts: bool,
    /// Addresses of the pinned or merged parts of it.
    pub kept: Vec<Range<u64>>,
    /// Whether guest memory held what it must in the end.
    pub contents: Result<(), String>,
    /// Pinned or merged pages that are not where they were.
    pub kept_moved: u64,
    /// Other pages that are still where they were.
    pub free_left: u64,
}

/// Counters at one moment.
#[derive(Clone, Copy)]
struct Snapshot {
    numa: Counters,
    scans: u64,
    mapped: u64,
    mappings: u64,
    faults: u64,
    flush_requests: u64,
    flushes: u64,
    unmap_events: Option<u64>,
    retries: u64,
    /// Records read so far.
    records: u64,
}

struct Bench {
    vm: Vm,
    memory: Arc<GuestMemory>,
    source: Source,
    client: Option<Client>,
    unmap: Option<Tracepoint>,
    profiler: Option<Profiler>,
    records: Vec<Record>,
    /// What each vCPU must have counted in each page.
    counted: Vec<Vec<u32>>,
}

/// Runs a case. `progress` is called every few seconds at least.
pub fn measure(plan: &Plan, progress: impl Fn(String)) -> Result<Measured> {
    let begun = Instant::now();
    let case = plan.case;
    let name = case.name();
    let mut bench = Bench::new(plan)?;
    progress(format!(
        "{name}: {} pages of guest memory on node {MEMORY_NODE}, {VCPUS} vCPUs on node {CPU_NODE}",
        bench.memory.pages()
    ));
    let whole = bench.every(match case.layout {
        Layout::KsmAlternating => 2,
        Layout::Whole | Layout::TouchedHalf => 1,
    });
    bench.pass(whole, 0)?;
    // Another subscriber would be measured, too.
    if trace::client::is_loaded() && !plan.profile {
        bench.client = Some(Client::attach_self(RECORDS)?);
    }

    let mut steps = Vec::new();
    let mut touched = whole;
    let first = bench.snapshot()?;
    let mut before = first;
    for number in 0..plan.steps {
        let expected = bench.hintable(touched)?;
        let probes = match &bench.profiler {
            Some(profiler) => profiler.attach(number)?,
            None => None,
        };
        bench.scan()?;
        if let Some(profiler) = &mut bench.profiler {
            profiler.detach(probes)?;
        }
        let between = bench.snapshot()?;
        touched = match case.layout {
            Layout::TouchedHalf if number % 2 == 0 || plan.profile => {
                bench.every(2 * case.backing.unit())
            }
            _ => whole,
        };
        bench.pass(touched, number as usize)?;
        let after = bench.snapshot()?;
        let hints_left = match touched == whole {
            true => Some(bench.hints_left(after)?),
            false => None,
        };
        let step = Step {
            expected,
            hinted: between.numa.pte_updates - before.numa.pte_updates,
            dropped: before.mapped.saturating_sub(between.mapped),
            dropped_mappings: before.mappings.saturating_sub(between.mappings),
            reported: 0,
            faults: after.faults - between.faults,
            mapped_again: after.mappings.saturating_sub(between.mappings),
            still_missing: first.mappings as i64 - after.mappings as i64,
            whole_pass: touched == whole,
            hint_faults: after.numa.hint_faults - between.numa.hint_faults,
            migrated: after.numa.migrated - before.numa.migrated,
            scans: between.scans - before.scans,
            flush_requests_scan: between.flush_requests - before.flush_requests,
            flush_requests_pass: after.flush_requests - between.flush_requests,
            flushes_scan: between.flushes - before.flushes,
            flushes_pass: after.flushes - between.flushes,
            unmap_events: between
                .unmap_events
                .zip(before.unmap_events)
                .map(|(b, a)| b - a),
            reports: 0,
            hints_left,
            first_record: before.records,
            end_record: between.records,
        };
        progress(format!(
            "{name}: step {}: {} pages hinted, {} dropped, {} faults, {} migrated, {} flush requests",
            number + 1,
            step.hinted,
            step.dropped,
            step.faults,
            step.migrated,
            step.flush_requests_scan + step.flush_requests_pass,
        ));
        steps.push(step);
        before = bench.snapshot()?;
    }
    if let Some(client) = &bench.client {
        client.copy_trace(&plan.results.join(format!("{name}.trace")))?;
        progress(format!("{name}: {} records so far", bench.records.len()));
    }

    // So that there is something to migrate under load, too.
    bench.memory.move_to(MEMORY_NODE)?;
    let start = bench.snapshot()?;
    let events = plan
        .events
        .then(|| Events::collect(&[FAULT_EVENT], &[UNMAP]))
        .transpose()?;
    let (elapsed, passes, seen) = bench.free_run(whole, plan.free_run)?;
    if let Some(events) = events {
        let Range { start, end } = bench.memory.addresses();
        let heading = format!("# guest memory: {start:#x}-{end:#x}");
        events.save(&heading, &plan.results.join(format!("{name}.events")))?;
    }
    let end = bench.snapshot()?;
    bench.pass(whole, 0)?;
    let swept = bench.snapshot()?;
    let hints_left = bench.hints_left(swept)?;
    let mut free_run = FreeRun {
        elapsed_s: elapsed.as_secs_f64(),
        passes,
        scans: end.scans - start.scans,
        hinted: end.numa.pte_updates - start.numa.pte_updates,
        reported: 0,
        hint_faults: end.numa.hint_faults - start.numa.hint_faults,
        migrated: end.numa.migrated - start.numa.migrated,
        faults: end.faults - start.faults,
        flush_requests: end.flush_requests - start.flush_requests,
        flushes: end.flushes - start.flushes,
        hints_left,
        retries: end.retries - start.retries,
        touched: seen.touched,
        scanned_s: seen.time.as_secs_f64(),
        longest_stall_s: seen.longest_stall.as_secs_f64(),
        first_record: start.records,
    };
    progress(format!(
        "{name}: {passes} passes in {:.1} s under {} scans: {} pages hinted, {} migrated, {} faults",
        free_run.elapsed_s, free_run.scans, free_run.hinted, free_run.migrated, free_run.faults
    ));

    let nodes = bench.memory.nodes()?;
    let on_node = |node| nodes.iter().filter(|at| **at == node).count() as u64;
    let away = |kept| {
        let all = nodes.iter().enumerate();
        all.filter(|(page, _)| bench.is_kept(*page) == kept)
            .filter(|(_, at)| **at != MEMORY_NODE as i32)
            .count() as u64
    };
    let pages = bench.memory.pages();
    let count = |is: &dyn Fn(usize) -> bool| (0..pages).filter(|page| is(*page)).count() as u64;
    let pinned_pages = count(&|page| bench.memory.is_pinned(page));
    let merged_pages = count(&|page| bench.memory.is_merged(page));
    let (kept_moved, free_left) = (away(true), bench.unpinned(whole) - away(false));
    let pages_on_node = [on_node(0), on_node(1)];
    let contents = bench.memory.verify(&bench.counted);

    let recording = match bench.client.take() {
        None => None,
        Some(client) => {
            let stats = client.stats()?;
            drop(client);
            write_records(plan, &name, &bench.records)?;
            let sequence = Sequence::new(std::mem::take(&mut bench.records));
            for step in &mut steps {
                let records = step.first_record..step.end_record;
                step.reports = reports(&sequence, records.clone()).count() as u64;
                step.reported = pages_in(reports(&sequence, records));
            }
            free_run.reported = pages_in(reports(&sequence, free_run.first_record..u64::MAX));
            Some((sequence, stats))
        }
    };
    let recorded = recording
        .as_ref()
        .map(|(sequence, _)| summarise(sequence, &steps, free_run.first_record, &bench.memory));
    let sum = |field: fn(&Step) -> u64| steps.iter().map(field).sum();
    let figures = Figures {
        name,
        backing: case.backing,
        pinned: case.pinned,
        layout: case.layout,
        guest_pages: pages as u64,
        pinned_pages,
        merged_pages,
        steps: plan.steps,
        scans: sum(|step| step.scans),
        hinted: sum(|step| step.hinted),
        hint_faults: sum(|step| step.hint_faults),
        migrated: sum(|step| step.migrated),
        dropped: sum(|step| step.dropped),
        dropped_mappings: sum(|step| step.dropped_mappings),
        faults: sum(|step| step.faults),
        flush_requests: sum(|step| step.flush_requests_scan + step.flush_requests_pass),
        flushes: sum(|step| step.flushes_scan + step.flushes_pass),
        profile: bench
            .profiler
            .take()
            .map(|profiler| profiler.finish(case.pinned == Pinned::All))
            .transpose()?,
        recorded,
        free_run,
        pages_on_node,
        elapsed_s: begun.elapsed().as_secs_f64(),
        each_step: steps,
    };
    Ok(Measured {
        figures,
        recording,
        guest: bench.memory.addresses(),
        tiers: balancing::tiers()?,
        one_page_per_fault: vm::nested_paging(),
        own_counts: matches!(bench.source, Source::Memcg(_)),
        kept: match case.layout {
            Layout::KsmAlternating => bench.memory.merged_addresses(),
            Layout::Whole | Layout::TouchedHalf => bench.memory.pinned_addresses(),
        },
        contents,
        kept_moved,
        free_left,
    })
}

impl Bench {
    fn new(plan: &Plan) -> Result<Bench> {
        let source = match &plan.memcg {
            Some(path) => {
                memcg::join(path)?;
                Source::Memcg(path.clone())
            }
            None => Source::Vmstat,
        };
        balancing::forbid_scans(CPU_NODE)?;
        // The vCPUs' processors are left to them: where a scan has to yield, KVM flushes once more.
        balancing::set_affinity(&balancing::other_cpus(VCPUS)?)?;
        let case = plan.case;
        // Merging takes long: a quarter has to do.
        let size = match case.layout {
            Layout::KsmAlternating => (plan.memory / 4).next_multiple_of(HUGE_PAGE),
            Layout::Whole | Layout::TouchedHalf => plan.memory,
        };
        let mut memory =
            GuestMemory::pinned_by(plan.holder, case.backing, case.pinned, size, MEMORY_NODE)?;
        if case.layout == Layout::KsmAlternating {
            memory.merge_alternate(LIMIT)?;
        }
        let memory = Arc::new(memory);
        let unmap = match Tracepoint::is_there(UNMAP_EVENT) {
            true => {
                let Range { start, end } = memory.addresses();
                let filter = format!("start < {end:#x} && end > {start:#x}");
                Some(Tracepoint::count(UNMAP_EVENT, &filter)?)
            }
            false => None,
        };
        let make = || Vm::new(&memory, &balancing::vcpu_cpus(VCPUS)?);
        let (vm, profiler) = match plan.profile {
            true => {
                let (vm, profiler) = Profiler::new(make, memory.addresses())?;
                (vm, Some(profiler))
            }
            false => (make()?, None),
        };
        Ok(Bench {
            vm,
            profiler,
            counted: vec![vec![0; memory.pages()]; VCPUS],
            memory,
            source,
            client: None,
            unmap,
            records: Vec::new(),
        })
    }

    /// Every `stride`th page, beginning with the first.
    fn every(&self, stride: usize) -> Sweep {
        Sweep {
            first: 0,
            stride: stride as isize,
            count: self.memory.pages() / stride,
        }
    }

    /// Whether `page` is pinned or merged, and so not to be hinted.
    fn is_kept(&self, page: usize) -> bool {
        self.memory.is_pinned(page) || self.memory.is_merged(page)
    }

    /// Of the pages that `sweep` touches, or whose huge page it touches, those that are not pinned.
    fn unpinned(&self, sweep: Sweep) -> u64 {
        let step = sweep.stride as usize;
        let unit = self.memory.backing().unit();
        let each = if step < unit { 1 } else { unit as u64 };
        let free = sweep.pages().filter(|page| !self.memory.is_pinned(*page));
        each * free.count() as u64
    }

    /// What a scan may hint of what `sweep` touched: between tiers, only what is still in the slower one.
    fn hintable(&self, sweep: Sweep) -> Result<u64> {
        if !balancing::tiers()? {
            return Ok(self.unpinned(sweep));
        }
        let nodes = self.memory.nodes()?;
        let slow = (0..nodes.len()).filter(|page| nodes[*page] == MEMORY_NODE as i32);
        Ok(slow.filter(|page| !self.is_kept(*page)).count() as u64)
    }

    /// One pass of each vCPU, one after the other, beginning with vCPU `first` (modulo their number). Merged pages, all
    /// of which lie between those of `sweep`, are read.
    fn pass(&mut self, sweep: Sweep, first: usize) -> Result<()> {
        for turn in 0..VCPUS {
            let vcpu = (first + turn) % VCPUS;
            self.vm.pass(vcpu, sweep)?;
            self.count(vcpu, sweep, 1);
            if self.memory.is_merged(1) {
                self.vm.read_pass(vcpu, Sweep { first: 1, ..sweep })?;
            }
        }
        Ok(())
    }

    /// Hints in guest memory now, at `before`: reads every page from node 1. Takes them, if there are any.
    fn hints_left(&self, before: Snapshot) -> Result<u64> {
        self.memory.read_all();
        Ok(self.source.read()?.hint_faults - before.numa.hint_faults)
    }

    fn count(&mut self, vcpu: usize, sweep: Sweep, passes: u64) {
        for page in sweep.pages() {
            let word = &mut self.counted[vcpu][page];
            *word = word.wrapping_add(passes as u32);
        }
    }

    /// Scans the process while no vCPU touches guest memory.
    fn scan(&self) -> Result<()> {
        self.vm.while_spinning_inside(|| {
            balancing::enable(true)?;
            let waited = balancing::wait_for_scans(SCANS, LIMIT);
            balancing::enable(false)?;
            waited.map(drop)
        })
    }

    /// Lets the vCPUs run against each other under scans for about `time`, and until they have met, so that each page was
    /// touched while balancing was on: without its statistics, the kernel leaves pages that two threads use where they are.
    /// Gives the time taken, the passes made, and what was seen of the vCPUs meanwhile.
    fn free_run(&mut self, whole: Sweep, time: Duration) -> Result<(Duration, u64, Seen)> {
        let begun = Instant::now();
        let progress = Arc::new(self.vm.progress());
        let stop = Arc::new(AtomicBool::new(false));
        let (watched, stopped) = (progress.clone(), stop.clone());
        let watching = std::thread::spawn(move || watched.watch(whole.count, &stopped));
        let sweeps = [whole, whole.reversed()];
        let (client, records) = (&mut self.client, &mut self.records);
        let ((), passes) = self.vm.while_running(&sweeps, || {
            balancing::enable(true)?;
            let first = balancing::scan_seq()?;
            let mut watch = || -> Result<()> {
                let met = || progress.touched() >= whole.count as u64 || begun.elapsed() > MEET;
                while begun.elapsed() < time
                    || balancing::scan_seq()? < first + FREE_SCANS
                    || !met()
                {
                    ensure!(begun.elapsed() < LIMIT, "too few scans in {LIMIT:?}");
                    std::thread::sleep(Duration::from_millis(100).min(time));
                    if let Some(client) = client {
                        client.read_new(records)?;
                    }
                }
                Ok(())
            };
            let watched = watch();
            balancing::enable(false)?;
            stop.store(true, Ordering::Relaxed);
            watched
        })?;
        let seen = watching.join().expect("watching does not panic");
        let elapsed = begun.elapsed();
        for (vcpu, passes) in passes.iter().enumerate() {
            self.count(vcpu, sweeps[vcpu], *passes);
        }
        Ok((elapsed, passes.iter().sum(), seen))
    }

    /// Faults of vCPUs that had to be tried again.
    fn retries(&self) -> Result<u64> {
        let stat = |name| self.vm.vcpu_stat(name);
        let settled = stat("pf_fixed")? + stat("pf_emulate")? + stat("pf_spurious")?;
        Ok(stat("pf_taken")?.saturating_sub(settled))
    }

    fn snapshot(&mut self) -> Result<Snapshot> {
        let numa = self.source.read()?;
        if let Some(client) = &mut self.client {
            client.read_new(&mut self.records)?;
        }
        let [small, huge, giant] =
            ["pages_4k", "pages_2m", "pages_1g"].map(|name| self.vm.stat(name));
        let [small, huge, giant] = [small?, huge?, giant?];
        Ok(Snapshot {
            numa,
            scans: balancing::scan_seq()?,
            mapped: small + (huge << 9) + (giant << 18),
            mappings: small + huge + giant,
            faults: self.vm.vcpu_stat("pf_fixed")?,
            flush_requests: self.vm.stat("remote_tlb_flush_requests")?,
            flushes: self.vm.stat("remote_tlb_flush")?,
            unmap_events: self.unmap.as_ref().map(Tracepoint::fired).transpose()?,
            retries: self.retries()?,
            records: self.records.len() as u64,
        })
    }
}

/// The reports begun within `records`.
fn reports(sequence: &Sequence, records: Range<u64>) -> impl Iterator<Item = &Report> {
    let reports = sequence.reports.iter();
    reports.filter(move |report| records.contains(&report.stretches[0].seq))
}

/// The pages that `reports` say were hinted.
fn pages_in<'a>(reports: impl Iterator<Item = &'a Report>) -> u64 {
    reports.map(Report::pages).sum()
}

fn summarise(sequence: &Sequence, steps: &[Step], end: u64, memory: &GuestMemory) -> Recorded {
    let guest = memory.addresses();
    let stepped = |record: &Record| record.seq < end;
    let pairs = || sequence.pairs.iter().filter(|pair| stepped(&pair.start));
    let reports = || {
        sequence
            .reports
            .iter()
            .filter(|one| stepped(&one.stretches[0]))
    };
    let of_scan = |record: &Record| {
        let in_scan = |step: &Step| (step.first_record..step.end_record).contains(&record.seq);
        record.start < guest.end && record.end > guest.start && steps.iter().any(in_scan)
    };
    Recorded {
        notifier_starts: pairs().count() as u64,
        scan_starts: pairs().filter(|pair| of_scan(&pair.start)).count() as u64,
        numa_pairs: pairs().filter(|pair| pair.is_numa()).count() as u64,
        reports: reports().count() as u64,
        stretches: reports().map(|one| one.stretches.len() as u64).sum(),
        reported: reports().map(|one| one.pages()).sum(),
    }
}

fn write_records(plan: &Plan, name: &str, records: &[Record]) -> Result<()> {
    let path = plan.results.join(format!("{name}.records"));
    let write = || -> io::Result<()> {
        let mut out = io::BufWriter::with_capacity(1 << 18, fs::File::create(&path)?);
        for record in records {
            out.write_all(&record.to_bytes())?;
        }
        out.flush()
    };
    write().with_context(|| path.display().to_string())
}
