// SPDX-License-Identifier: GPL-2.0
//! Processes with several threads on the near node, whose memory lies on the far one, until the near node has room: what it
//! costs to bring it near. Starts and ends processes, fills the near node, and changes for a while which huge pages there are.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{anyhow, bail, ensure, Context, Result};
use clap::{Parser, ValueEnum};
use guest::balancing::{self, CPU_NODE, MEMORY_NODE};
use guest::memory::{Backing, GuestMemory, Pinned};
use guest::{pages, PAGE};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Normal};

use crate::counters::{self, Counters};
use crate::show::Values;
use crate::How;

/// Which huge pages the kernel makes, for each size that it has.
const SIZES: &str = "/sys/kernel/mm/transparent_hugepage";
const HUGE: &str = "2048";
const FOLIO: &str = "64";
/// How often a thread counts before it looks whether it is to stop.
const BATCH: usize = 256;
/// Between two looks at how far it has come.
const POLL: Duration = Duration::from_millis(50);

/// What their memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pages {
    /// Base pages.
    Base,
    /// Folios of 64 KiB, mapped by PTEs.
    #[value(name = "64k")]
    Folios,
    /// Huge pages.
    Huge,
}

impl Pages {
    pub fn name(self) -> &'static str {
        match self {
            Pages::Base => "base",
            Pages::Folios => "64k",
            Pages::Huge => "huge",
        }
    }

    fn backing(self) -> Backing {
        match self {
            Pages::Base => Backing::Anon,
            Pages::Folios | Pages::Huge => Backing::Thp,
        }
    }
}

/// Which pages a thread takes, as pmbench names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Access {
    /// All as often.
    Uniform,
    /// By a normal distribution around the middle of the memory, whose deviation is an eighth of it.
    Skewed,
}

impl Access {
    pub fn name(self) -> &'static str {
        match self {
            Access::Uniform => "uniform",
            Access::Skewed => "skewed",
        }
    }

    /// One of so many.
    fn draw(self, random: &mut SmallRng, pages: usize) -> usize {
        match self {
            Access::Uniform => random.random_range(0..pages),
            Access::Skewed => {
                let whole = pages as f64;
                let normal = Normal::new(whole / 2.0, whole / 8.0).expect("a finite deviation");
                loop {
                    let page = normal.sample(random);
                    if (0.0..whole).contains(&page) {
                        return page as usize;
                    }
                }
            }
        }
    }
}

/// One process: places its memory, says so, and counts in it from the first line on standard input to its end.
#[derive(Parser)]
pub struct Process {
    #[arg(long)]
    threads: u32,
    /// In bytes.
    #[arg(long)]
    memory: usize,
    #[arg(long, value_enum)]
    pages: Pages,
    #[arg(long, value_enum)]
    access: Access,
    #[arg(long)]
    seed: u64,
}

impl Process {
    /// Fails if anything that was counted is not in memory in the end.
    pub fn run(&self) -> Result<()> {
        // Only what is placed below is scanned.
        balancing::forbid_scans(CPU_NODE)?;
        let memory =
            GuestMemory::new(self.pages.backing(), Pinned::None, self.memory, MEMORY_NODE)?;
        println!();
        let mut input = io::stdin().lock();
        input.read_line(&mut String::new())?;
        let cpus = balancing::vcpu_cpus(self.threads as usize)?;
        let stop = AtomicBool::new(false);
        let counted: Vec<Vec<u32>> = thread::scope(|scope| {
            let (memory, stop) = (&memory, &stop);
            let start = |(thread, cpu)| {
                scope.spawn(move || {
                    // Each CPU has some of the memory in its TLB.
                    balancing::set_affinity(&[cpu])?;
                    Ok(self.count(memory, thread, stop))
                })
            };
            let threads: Vec<_> = cpus.into_iter().enumerate().map(start).collect();
            let ended = input.read_to_end(&mut Vec::new());
            stop.store(true, Ordering::Relaxed);
            let joined = threads
                .into_iter()
                .map(|thread| thread.join().expect("counting"));
            joined.collect::<Result<_>>().and_then(|counted| {
                ended?;
                Ok(counted)
            })
        })?;
        memory.verify(&counted).map_err(|why| anyhow!(why))
    }

    /// How often it has counted each page.
    fn count(&self, memory: &GuestMemory, thread: usize, stop: &AtomicBool) -> Vec<u32> {
        let mut random = SmallRng::seed_from_u64(self.seed + thread as u64);
        let mut counted = vec![0; memory.pages()];
        while !stop.load(Ordering::Relaxed) {
            for _ in 0..BATCH {
                let page = self.access.draw(&mut random, counted.len());
                memory.count(page, thread);
                counted[page] += 1;
            }
        }
        counted
    }
}

/// One that was started, and has placed its memory.
struct Started {
    process: Child,
    input: Option<ChildStdin>,
    _output: BufReader<ChildStdout>,
}

impl Started {
    fn new(arguments: &[String]) -> Result<Started> {
        let program = env::current_exe().context("this program's path")?;
        let mut process = Command::new(program)
            .arg("process")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a process")?;
        let input = process.stdin.take();
        let mut output = BufReader::new(process.stdout.take().context("its output")?);
        let placed = output.read_line(&mut String::new())?;
        let mut started = Started {
            process,
            input,
            _output: output,
        };
        if placed == 0 {
            bail!("it could not place its memory: {}", started.process.wait()?);
        }
        Ok(started)
    }

    fn go(&mut self) -> Result<()> {
        let input = self.input.as_mut().context("it has ended")?;
        input.write_all(b"\n").context("tell a process to start")
    }

    fn scans(&mut self) -> Result<u64> {
        self.is_there()?;
        balancing::scan_seq_of(self.process.id())
    }

    fn is_there(&mut self) -> Result<()> {
        match self.process.try_wait().context("ask for a process")? {
            Some(status) => bail!("a process has ended too early: {status}"),
            None => Ok(()),
        }
    }

    /// Stops it, and waits until it stands still.
    fn stop(&self) -> Result<()> {
        self.signal(libc::SIGSTOP)?;
        let mut status = 0;
        // SAFETY: a child of this process, which `process` has not waited for; only `status` is written.
        let stopped = unsafe { libc::waitpid(self.pid(), &mut status, libc::WUNTRACED) };
        ensure!(
            stopped == self.pid() && libc::WIFSTOPPED(status),
            "a process has ended instead of being stopped"
        );
        Ok(())
    }

    /// Lets it go on.
    fn resume(&self) -> Result<()> {
        self.signal(libc::SIGCONT)
    }

    fn signal(&self, signal: i32) -> Result<()> {
        // SAFETY: a child of this process, which `process` has not waited for.
        let rc = unsafe { libc::kill(self.pid(), signal) };
        ensure!(rc == 0, "signal a process: {}", io::Error::last_os_error());
        Ok(())
    }

    fn pid(&self) -> i32 {
        self.process.id() as i32
    }

    /// Ends it. It says what it found on standard error.
    fn end(mut self) -> Result<()> {
        drop(self.input.take());
        let status = self.process.wait().context("wait for a process")?;
        ensure!(
            status.success(),
            "a process has lost what it counted: {status}"
        );
        Ok(())
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // One that has ended is not there to be killed.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Folios of one size only for memory that asks for large ones, until dropped.
struct OnlySize {
    /// In KiB.
    size: &'static str,
    saved: Vec<(PathBuf, String)>,
    /// Faults that have made one, before.
    made: u64,
}

impl OnlySize {
    fn new(size: &'static str) -> Result<OnlySize> {
        let made = OnlySize::faults(size)?;
        let saved = Vec::new();
        let mut only = OnlySize { size, saved, made };
        let folder = format!("hugepages-{size}kB");
        for entry in fs::read_dir(SIZES).context(SIZES)? {
            let entry = entry.context(SIZES)?;
            if !entry
                .file_name()
                .to_string_lossy()
                .starts_with("hugepages-")
            {
                continue;
            }
            let path = entry.path().join("enabled");
            // Not where only shared memory can have the size.
            if !path.exists() {
                continue;
            }
            let name = || path.display().to_string();
            let text = fs::read_to_string(&path).with_context(name)?;
            let old = text.split(['[', ']']).nth(1).with_context(name)?.into();
            let asked = entry.file_name() == *folder;
            let new = if asked { "madvise" } else { "never" };
            fs::write(&path, new).with_context(|| format!("{}: needs root", name()))?;
            only.saved.push((path, old));
        }
        Ok(only)
    }

    /// Fails if less than nine tenths of `bytes` were made of them.
    fn check(&self, bytes: u64) -> Result<()> {
        let kib = (OnlySize::faults(self.size)? - self.made) * self.size.parse::<u64>()?;
        ensure!(
            kib * 1024 >= bytes / 10 * 9,
            "{kib} KiB in folios of {} KiB, of {}: is memory fragmented?",
            self.size,
            bytes / 1024
        );
        Ok(())
    }

    fn faults(size: &str) -> Result<u64> {
        let path = format!("{SIZES}/hugepages-{size}kB/stats/anon_fault_alloc");
        let why = "needs Linux 6.10 or later, and CONFIG_TRANSPARENT_HUGEPAGE";
        let text = fs::read_to_string(&path).with_context(|| format!("{path}: {why}"))?;
        text.trim().parse().with_context(|| path.clone())
    }
}

impl Drop for OnlySize {
    fn drop(&mut self) {
        for (path, old) in &self.saved {
            if let Err(error) = fs::write(path, old) {
                eprintln!("{}: not put back: {error}", path.display());
            }
        }
    }
}

/// One round: from the time that the near node has room to that when enough of the memory is near.
pub fn measure(how: &How, pages: Pages, access: Access, round: u32) -> Result<Values> {
    let size = match pages {
        Pages::Base => None,
        Pages::Folios => Some(OnlySize::new(FOLIO)?),
        Pages::Huge => Some(OnlySize::new(HUGE)?),
    };
    let start = |process: u32| {
        let seed = u64::from(round * 1000 + process * 100);
        Started::new(&[
            format!("--threads={}", how.threads),
            format!("--memory={}", how.bytes()),
            format!("--pages={}", pages.name()),
            format!("--access={}", access.name()),
            format!("--seed={seed}"),
        ])
    };
    let mut processes: Vec<Started> = (0..how.processes).map(start).collect::<Result<_>>()?;
    let whole = (how.bytes() / PAGE) as u64 * u64::from(how.processes);

    if let Some(size) = &size {
        size.check(whole * PAGE as u64)?;
    }

    // What others do on the near node is not in the way from here on, nor this program in that of the processes.
    balancing::set_affinity(&balancing::node_cpus(CPU_NODE)?)?;
    let free = balancing::meminfo_kib(CPU_NODE, "MemFree:")? * 1024 / PAGE as u64;
    let keep = u64::from(how.near_free) * 256;
    ensure!(
        free > keep,
        "node {CPU_NODE} has {free} pages free: --near-free={}",
        how.near_free
    );
    let filled = pages::Pages::new((free - keep) as usize).context("fill the near node")?;
    balancing::set_affinity(&balancing::node_cpus(MEMORY_NODE)?)?;

    let began = counters::migrated()?;
    balancing::enable(true)?;
    let measured = (|| {
        for process in &mut processes {
            process.go()?;
        }
        let wait = Wait {
            begun: Instant::now(),
            limit: how.limit(),
        };
        wait.until("scans", || {
            let scans = processes.iter_mut().map(Started::scans);
            Ok(scans.collect::<Result<Vec<u64>>>()?.into_iter().min() >= Some(how.scans))
        })?;
        let early = counters::migrated()? - began;
        ensure!(
            early <= keep,
            "{early} pages migrated to node {CPU_NODE}, which had {keep} free: it was not full"
        );
        // What could not be migrated before is not of interest. Nothing goes on while counters are read one by one.
        processes.iter().try_for_each(Started::stop)?;
        let counters = Counters::start()?;
        drop(filled);
        processes.iter().try_for_each(Started::resume)?;
        wait.until(&format!("{} % of the memory near", how.moved), || {
            processes.iter_mut().try_for_each(Started::is_there)?;
            Ok((counters::migrated()? - began) * 100 >= whole * u64::from(how.moved))
        })?;
        processes.iter().try_for_each(Started::stop)?;
        let values = counters.read()?;
        processes.iter().try_for_each(Started::resume)?;
        Ok::<_, anyhow::Error>(values)
    })();
    let off = balancing::enable(false);
    let values = measured?;
    off?;
    let free = balancing::meminfo_kib(CPU_NODE, "MemFree:")? * 1024 / PAGE as u64;
    ensure!(
        free > keep,
        "node {CPU_NODE} is full again, with {free} pages: --memory"
    );
    processes.into_iter().try_for_each(Started::end)?;
    Ok(values)
}

/// Waits that begin at one time.
struct Wait {
    begun: Instant,
    limit: Duration,
}

impl Wait {
    fn until(&self, what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
        while !done()? {
            ensure!(
                self.begun.elapsed() < self.limit,
                "no {what} in {:?}",
                self.limit
            );
            thread::sleep(POLL);
        }
        Ok(())
    }
}
