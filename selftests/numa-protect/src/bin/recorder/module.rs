// SPDX-License-Identifier: GPL-2.0
//! Loading and unloading the module, and that nothing of it stays behind.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{bail, ensure, Context, Result};
use guest::ktap::diagnostic;
use guest::pages::Pages;
use trace::client::{Client, ROOT};

use crate::{attached, child, end, write_once, Args, MODULE};

/// How often the module is loaded, used and unloaded.
const CYCLES: usize = 100;
/// Cycles after which the memory that the kernel uses must not grow any more.
const WARM_UP: usize = 20;

/// Where a kernel that has tests inside says what came of them.
pub const KUNIT: &str = "/sys/kernel/debug/kunit";

/// The tests of rust/mmu_notifier.rs, which run when the module is loaded.
pub fn kunit() -> Result<()> {
    let path = Path::new(KUNIT).join("mmu_notifier/results");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let planned = text.lines().find_map(|line| line.strip_prefix("    1.."));
    let planned: usize = planned.context("no plan")?.parse()?;
    let held = text
        .lines()
        .filter(|line| line.starts_with("    ok ") && !line.contains("# SKIP"));
    ensure!(planned > 0 && held.count() == planned, "{text}");
    Ok(())
}

pub fn load(module: &Path, parameters: &CStr) -> Result<()> {
    let file = File::open(module).with_context(|| module.display().to_string())?;
    // SAFETY: the descriptor is open, and the parameters are a string.
    let status = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            parameters.as_ptr(),
            0,
        )
    };
    ensure!(
        status == 0,
        "loading {}: {}",
        module.display(),
        io::Error::last_os_error()
    );
    Ok(())
}

pub fn unload() -> io::Result<()> {
    let name = CString::new(MODULE)?;
    // SAFETY: the name is a valid string for the call.
    match unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An open file holds the module.
pub fn not_unloaded(args: &Args) -> Result<()> {
    match unload() {
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(()),
        Err(error) => Err(error).context("unloading while a file is open"),
        Ok(()) => {
            load(&args.module, c"")?;
            bail!("unloaded while a file was open");
        }
    }
}

/// An open file holds the module, also that of a target which is detached.
pub fn unload_while_open(args: &Args) -> Result<()> {
    let client = Client::attach_self(64)?;
    for file in ["trace", "stats", "filter", "per_cpu/cpu0/records"] {
        let held = File::open(client.path(file))?;
        not_unloaded(args).context(file)?;
        drop(held);
    }
    let trace = File::open(client.path("trace"))?;
    drop(client);
    let unloaded = unload();
    drop(trace);
    ensure!(
        unloaded.is_err(),
        "unloaded while a file of a detached target was open"
    );
    Ok(())
}

/// The parameters say what is not said to `attach`.
pub fn parameters(args: &Args) -> Result<()> {
    unload()?;
    load(&args.module, c"records=128 overwrite=0")?;
    let client = Client::attach(std::process::id(), "")?;
    let size = fs::read_to_string(client.path("size"))?;
    let pages = Pages::new(1)?;
    for _ in 0..512 {
        pages.protect(libc::PROT_READ)?;
        pages.protect(libc::PROT_READ | libc::PROT_WRITE)?;
    }
    let stats = client.stats()?;
    drop(client);
    unload()?;
    load(&args.module, c"")?;
    ensure!(size == "128\n", "size: {size}");
    ensure!(stats.dropped > 0 && stats.overwritten == 0, "{stats:?}");
    Ok(())
}

/// Unloading detaches; the process goes on, and its trace is gone.
pub fn unload_while_attached(args: &Args) -> Result<()> {
    let child = child()?;
    write_once("attach", child.id().to_string())?;
    write_once("attach", std::process::id().to_string())?;
    write_once("attach", format!("{} plain", std::process::id()))?;
    unload()?;
    let there = Path::new(ROOT).exists();
    load(&args.module, c"")?;
    end(child)?;
    ensure!(!there, "{ROOT} outlived the module");
    drop(Pages::new(16)?);
    let left = attached()?;
    ensure!(
        left.into_iter().eq(["attach", "detach", "version"]),
        "something is attached after loading anew"
    );
    Ok(())
}

/// Loads, attaches, runs, detaches, unloads; the kernel's memory does not grow.
pub fn cycles(args: &Args) -> Result<()> {
    // Rings are larger than what the kernel's memory varies by: losing those of one in four attachments would show.
    const RING: u64 = 1 << 12;
    let (mut before, mut size) = (0, 0);
    for cycle in 0..CYCLES {
        if cycle == WARM_UP {
            before = kernel_memory()?;
        }
        if cycle % 10 == 0 {
            diagnostic(&format!("recorder.module.cycles: {cycle} of {CYCLES}"));
        }
        unload()?;
        load(&args.module, c"")?;
        let child = child()?;
        write_once("attach", format!("{} {RING}", child.id()))?;
        let client = Client::attach_self(RING)?;
        let pages = Pages::new(16)?;
        pages.protect(libc::PROT_READ)?;
        drop(pages);
        ensure!(
            client.stats()?.recorded > 0,
            "cycle {cycle}: nothing recorded"
        );
        size = client.stats()?.size;
        drop(client);
        write_once("detach", child.id().to_string())?;
        end(child)?;
    }
    let grown = kernel_memory()?.saturating_sub(before);
    let limit = (CYCLES - WARM_UP) as u64 / 4 * size * 64;
    ensure!(
        grown < limit,
        "{CYCLES} cycles: the kernel uses {grown} bytes more, the rings of one in four cycles are {limit}"
    );
    diagnostic(&format!(
        "recorder.module.cycles: the kernel uses {grown} bytes more"
    ));
    Ok(())
}

/// What the kernel uses for itself, in bytes: slab and vmalloc.
pub fn kernel_memory() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| -> Result<u64> {
        let line = text
            .lines()
            .find(|line| line.starts_with(name))
            .with_context(|| format!("no {name} in meminfo"))?;
        let kib = line
            .split_whitespace()
            .nth(1)
            .context("meminfo: no number")?;
        Ok(kib.parse::<u64>()? * 1024)
    };
    Ok(field("Slab:")? + field("VmallocUsed:")?)
}
