// SPDX-License-Identifier: GPL-2.0
//! Pages of this process whose page tables it changes in known ways, so that subscribers hear of it; touches those alone.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;

use anyhow::{ensure, Result};

use crate::{balancing, needs, PAGE};

/// Memory that nobody else changes, not even a NUMA scan.
pub struct Pages {
    start: *mut u8,
    length: usize,
}

// SAFETY: nothing is read or written through the pointer once the pages are made; it only says where they are.
unsafe impl Send for Pages {}
// SAFETY: as above; the system calls on them can be made from many threads at once.
unsafe impl Sync for Pages {}

impl Pages {
    /// So many, that can be read and written, and are all there.
    pub fn new(count: usize) -> Result<Pages> {
        let length = count * PAGE;
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a new mapping, wherever the kernel likes.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, prot, flags, -1, 0) };
        ensure!(
            start != libc::MAP_FAILED,
            "mmap: {}",
            io::Error::last_os_error()
        );
        let pages = Pages {
            start: start.cast(),
            length,
        };
        if Path::new(needs::NUMA_BALANCING.path).exists() {
            balancing::forbid_scans_of(pages.addresses())?;
        }
        for page in 0..count {
            // SAFETY: within the mapping, which is writable.
            unsafe { pages.start.add(page * PAGE).write_volatile(1) };
        }
        Ok(pages)
    }

    /// mprotect(): a start and an end, of all pages.
    pub fn protect(&self, prot: i32) -> Result<()> {
        // SAFETY: the mapping is ours, and nobody holds a reference into it.
        let status = unsafe { libc::mprotect(self.start.cast(), self.length, prot) };
        ensure!(status == 0, "mprotect: {}", io::Error::last_os_error());
        Ok(())
    }

    /// MADV_DONTNEED: a start and an end, of all pages.
    pub fn discard(&self) -> Result<()> {
        // SAFETY: as in `protect`.
        let status = unsafe { libc::madvise(self.start.cast(), self.length, libc::MADV_DONTNEED) };
        ensure!(status == 0, "madvise: {}", io::Error::last_os_error());
        Ok(())
    }

    /// What discards page `index` many times.
    pub fn discarder(&self, index: usize) -> Result<Discarder<'_>> {
        let count = self.length / PAGE;
        ensure!(index < count, "page {index} of {count}");
        // SAFETY: only makes a descriptor.
        let process = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) };
        ensure!(process >= 0, "pidfd_open: {}", io::Error::last_os_error());
        let page = libc::iovec {
            iov_base: self.start.wrapping_add(index * PAGE).cast(),
            iov_len: PAGE,
        };
        Ok(Discarder {
            // SAFETY: made above, and nobody else has it.
            process: unsafe { File::from_raw_fd(process as i32) },
            ranges: [page; Discarder::AT_ONCE],
            _pages: self,
        })
    }

    /// Where they are.
    pub fn addresses(&self) -> Range<u64> {
        let start = self.start as u64;
        start..start + self.length as u64
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and gone with this value.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

/// Discards a page many times with each system call, so that it is the kernel's notifications that take the time.
pub struct Discarder<'a> {
    process: File,
    ranges: [libc::iovec; Discarder::AT_ONCE],
    _pages: &'a Pages,
}

impl Discarder<'_> {
    /// How often [`discard`](Self::discard) does it: a start and an end each time.
    pub const AT_ONCE: usize = 512;

    /// process_madvise(), MADV_DONTNEED.
    pub fn discard(&self) -> Result<()> {
        // SAFETY: the descriptor is valid, and the ranges are a page of `Pages`, into which nobody looks.
        let done = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                self.process.as_raw_fd(),
                self.ranges.as_ptr(),
                self.ranges.len(),
                libc::MADV_DONTNEED,
                0,
            )
        };
        ensure!(
            done == (Self::AT_ONCE * PAGE) as i64,
            "process_madvise: {done}: {}",
            io::Error::last_os_error()
        );
        Ok(())
    }
}
