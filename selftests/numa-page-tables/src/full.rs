// SPDX-License-Identifier: GPL-2.0
//! A node without memory for the kernel; takes what is free there, and raises `vm.min_free_kbytes`, until dropped.

use std::{fs, io, ptr};

use anyhow::{bail, ensure, Context, Result};
use guest::balancing::meminfo_kib;

const RESERVE: &str = "/proc/sys/vm/min_free_kbytes";
/// How much is taken at a time: a huge page goes in.
const CHUNK: usize = 8 << 20;

/// What keeps it so.
pub struct Full {
    taken: Vec<*mut libc::c_void>,
    reserve: String,
}

/// Takes the memory of `node`, as far as the kernel gives it without looking for more. What it keeps for itself, it keeps
/// from then on.
pub fn fill(node: usize) -> Result<Full> {
    let reserve = fs::read_to_string(RESERVE).context(RESERVE)?;
    let mut full = Full {
        taken: Vec::new(),
        reserve,
    };
    // What others free meanwhile makes a chunk look as if it came from elsewhere.
    let mut elsewhere = 0;
    while elsewhere < 4 {
        let before = meminfo_kib(node, "MemFree:")?;
        full.take(node)?;
        let is_from_node = meminfo_kib(node, "MemFree:")? + (CHUNK as u64 / 2048) <= before;
        elsewhere = if is_from_node { 0 } else { elsewhere + 1 };
    }
    let (free, total) = (
        meminfo_kib(node, "MemFree:")?,
        meminfo_kib(node, "MemTotal:")?,
    );
    ensure!(
        free <= total / 16,
        "node {node} has {free} KiB free that are not given"
    );
    // Allocations that may not sleep get all but this.
    let more = 4 * free;
    fs::write(RESERVE, more.to_string()).context(RESERVE)?;
    Ok(full)
}

impl Full {
    fn take(&mut self, node: usize) -> Result<()> {
        let nodes: libc::c_ulong = 1 << node;
        // SAFETY: a new mapping, whose policy is set and which is written to, within its bounds.
        unsafe {
            let chunk = libc::mmap(
                ptr::null_mut(),
                CHUNK,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            if chunk == libc::MAP_FAILED {
                return Err(io::Error::last_os_error()).context("map memory to fill a node");
            }
            self.taken.push(chunk);
            let bits = libc::c_ulong::BITS as libc::c_ulong;
            if libc::syscall(
                libc::SYS_mbind,
                chunk,
                CHUNK,
                libc::MPOL_PREFERRED,
                &nodes,
                bits,
                0,
            ) != 0
            {
                return Err(io::Error::last_os_error()).context("mbind()");
            }
            ptr::write_bytes(chunk.cast::<u8>(), 1, CHUNK);
        }
        if self.taken.len() * CHUNK > 64 << 30 {
            bail!("node {node} is not full after 64 GiB");
        }
        Ok(())
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        if let Err(error) = fs::write(RESERVE, self.reserve.trim()) {
            eprintln!("{RESERVE}: not put back: {error}");
        }
        for chunk in &self.taken {
            // SAFETY: our own mapping, which nobody else knows.
            unsafe { libc::munmap(*chunk, CHUNK) };
        }
    }
}
