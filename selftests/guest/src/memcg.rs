// SPDX-License-Identifier: GPL-2.0
//! What NUMA balancing did to this process, as its own memory cgroup counted it; makes and removes that cgroup.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::PAGE;

/// Where cgroup v2 is mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// A memory cgroup that is removed when dropped. It must be empty of processes by then.
pub struct Memcg {
    path: PathBuf,
}

impl Memcg {
    /// Makes the cgroup `name` under the root of the hierarchy.
    pub fn create(name: &str) -> Result<Memcg> {
        let control = Path::new(ROOT).join("cgroup.subtree_control");
        fs::write(&control, "+memory").with_context(|| {
            format!(
                "{}: is cgroup2 mounted and CONFIG_MEMCG set?",
                control.display()
            )
        })?;
        let path = Path::new(ROOT).join(name);
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Memcg { path })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Memcg {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
    }
}

/// Moves the calling process into the cgroup at `path`.
pub fn join(path: &Path) -> Result<()> {
    let procs = path.join("cgroup.procs");
    fs::write(&procs, "0").with_context(|| procs.display().to_string())
}

/// Lets the processes in the cgroup at `path`, below the root of the hierarchy, take memory of `nodes` only, a list such as
/// `0-1`. Memory of one node is not scanned.
pub fn allow_nodes(path: &Path, nodes: &str) -> Result<()> {
    let control = Path::new(ROOT).join("cgroup.subtree_control");
    fs::write(&control, "+cpuset").with_context(|| {
        let control = control.display();
        format!("{control}: is cgroup2 mounted and CONFIG_CPUSETS set?")
    })?;
    let mems = path.join("cpuset.mems");
    fs::write(&mems, nodes).with_context(|| format!("{}: {nodes}", mems.display()))
}

/// Memory of the kernel's own that the cgroup at `path` is charged, in bytes.
pub fn kernel_memory(path: &Path) -> Result<u64> {
    fold_counters();
    let path = path.join("memory.stat");
    field(&path, "kernel").context("memory of the kernel: needs Linux 5.18 or later")
}

/// Running totals of NUMA balancing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Page table entries made PROT_NONE, in base pages.
    pub pte_updates: u64,
    /// Faults on such entries; one for a huge page.
    pub hint_faults: u64,
    /// Base pages migrated.
    pub migrated: u64,
}

/// Where [`Counters`] are read.
pub enum Source {
    /// A memory cgroup's `memory.stat`: counts only the processes in it.
    Memcg(PathBuf),
    /// `/proc/vmstat`: counts the whole machine.
    Vmstat,
}

impl Source {
    /// Reads the counters, exact at the time of the call.
    pub fn read(&self) -> Result<Counters> {
        let path = match self {
            Source::Memcg(path) => {
                fold_counters();
                path.join("memory.stat")
            }
            Source::Vmstat => PathBuf::from("/proc/vmstat"),
        };
        let field = |name: &str| field(&path, name).context("is CONFIG_NUMA_BALANCING set?");
        Ok(Counters {
            pte_updates: field("numa_pte_updates")?,
            hint_faults: field("numa_hint_faults")?,
            migrated: field("numa_pages_migrated")?,
        })
    }
}

/// The value of `name` in a file of names and values.
fn field(path: &Path, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let found = lines.find(|(key, _)| *key == name);
    found
        .and_then(|(_, value)| value.trim().parse().ok())
        .with_context(|| format!("{}: no {name}", path.display()))
}

/// Has the kernel fold its per-CPU counts into `memory.stat`, which it does only once enough changes have come together: makes
/// as many as it takes, by page faults of this process.
fn fold_counters() {
    fault_pages(256 + 128 * online_cpus());
}

fn online_cpus() -> usize {
    // SAFETY: sysconf() has no preconditions.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }).unwrap_or(1)
}

/// Takes `pages` page faults on memory that is given back at once.
fn fault_pages(pages: usize) {
    // SAFETY: a new mapping, written inside its bounds and unmapped before anybody else knows of it.
    unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            pages * PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if at == libc::MAP_FAILED {
            return;
        }
        for page in 0..pages {
            at.cast::<u8>().add(page * PAGE).write_volatile(1);
        }
        libc::munmap(at, pages * PAGE);
    }
}
