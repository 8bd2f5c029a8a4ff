// SPDX-License-Identifier: GPL-2.0
//! A device that shares the address space of this process (the kernel's own simulation of one, lib/test_hmm.c) under NUMA
//! scans: they leave the entries of memory that lies on it as they were, and don't leave memory out because the device has
//! to sleep before it can obey. Changes its own memory only.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::panic::{self, AssertUnwindSafe};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{bail, ensure, Context, Result};
use guest::balancing::{self, Settings};
use guest::memcg::Source;
use guest::memory::HUGE_PAGE;
use guest::needs::{self, Need};
use guest::PAGE;

use crate::{under_scans, Test, SCANS};

const DEVICE: &str = "/dev/hmm_dmirror0";
const MIRROR: Need = Need {
    path: DEVICE,
    remedy: "CONFIG_TEST_HMM",
};

/// The tests of this group.
pub const TESTS: &[Test] = &[
    Test {
        name: "device_private.left_alone",
        needs: &[MIRROR],
        run: |source| left_alone(source, &BASE),
    },
    Test {
        name: "device_private.huge_left_alone",
        needs: &[MIRROR, needs::THP],
        run: |source| left_alone(source, &HUGE),
    },
    Test {
        name: "device_busy.hinted",
        needs: &[MIRROR],
        run: hinted_while_busy,
    },
];

/// Of `lib/test_hmm_uapi.h`: `_IOWR('H', number, struct hmm_dmirror_cmd)`.
const HMM_DMIRROR_READ: libc::c_ulong = 0xc028_4800;
const HMM_DMIRROR_MIGRATE_TO_DEV: libc::c_ulong = 0xc028_4802;
const HMM_DMIRROR_SNAPSHOT: libc::c_ulong = 0xc028_4804;
const HMM_DMIRROR_PROT_WRITE: u8 = 0x02;
const HMM_DMIRROR_PROT_PMD: u8 = 0x04;
const HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL: u8 = 0x20;
const WRITABLE: u8 = HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL | HMM_DMIRROR_PROT_WRITE;

/// `struct hmm_dmirror_cmd`.
#[repr(C)]
#[derive(Default)]
struct Command {
    addr: u64,
    ptr: u64,
    npages: u64,
    cpages: u64,
    faults: u64,
}

/// What is mapped: pages that go to the device, and behind them, in the same mapping, pages that stay, which show that the
/// scans came by.
struct Layout {
    advice: libc::c_int,
    to_device: usize,
    stay: usize,
}

const BASE: Layout = Layout {
    advice: libc::MADV_NOHUGEPAGE,
    to_device: 256,
    stay: 16,
};
const HUGE: Layout = Layout {
    advice: libc::MADV_HUGEPAGE,
    to_device: HUGE_PAGE / PAGE,
    stay: HUGE_PAGE / PAGE,
};
/// Pages to be hinted while the device is busy, each a mapping of its own, so that the device hears of each by itself.
const EACH: Layout = Layout {
    to_device: 0,
    stay: 64,
    ..BASE
};
/// What it is busy with.
const BUSY: Layout = Layout {
    to_device: 0,
    stay: 256,
    ..BASE
};
/// Threads that keep it busy: with two, one always waits for the device's mutex; with more, that one gets it at once.
const READERS: usize = 3;
/// A scan is short, and may come while the device rests: so many of them, each in a new process, as all that is new there
/// is looked at in the first scan.
const ROUNDS: usize = 8;
/// Time from one scan to the next in milliseconds, more than one takes here: of two scans at once, the one that comes to the
/// end makes the other leave out the mapping that both met for the first time.
const PERIOD: u32 = 1000;

/// Memory of our own, at a multiple of the huge page size.
struct Mapping {
    reserved: *mut libc::c_void,
    reserved_length: usize,
    base: *mut u8,
    pages: usize,
}

impl Mapping {
    fn new(layout: &Layout) -> Result<Mapping> {
        let pages = layout.to_device + layout.stay;
        let reserved_length = pages * PAGE + HUGE_PAGE;
        // SAFETY: a new mapping; the aligned address is inside it.
        let (reserved, base) = unsafe {
            let reserved = libc::mmap(
                ptr::null_mut(),
                reserved_length,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            ensure!(
                reserved != libc::MAP_FAILED,
                "mmap(): {}",
                io::Error::last_os_error()
            );
            (reserved, reserved.add(reserved.align_offset(HUGE_PAGE)))
        };
        let mapping = Mapping {
            reserved,
            reserved_length,
            base: base.cast(),
            pages,
        };
        let length = pages * PAGE;
        // SAFETY: a part of our own mapping, which nobody uses yet.
        let failed = unsafe {
            libc::mprotect(base, length, libc::PROT_READ | libc::PROT_WRITE) != 0
                || libc::madvise(base, length, layout.advice) != 0
        };
        ensure!(
            !failed,
            "mprotect(), madvise(): {}",
            io::Error::last_os_error()
        );
        balancing::allow_scans(mapping.address()..mapping.address() + length as u64)?;
        for page in 0..pages {
            // SAFETY: inside the part that is writable.
            unsafe { mapping.word(page).write_volatile(page as u64 + 1) };
        }
        Ok(mapping)
    }

    fn address(&self) -> u64 {
        self.base as u64
    }

    /// The first word of a page.
    fn word(&self, page: usize) -> *mut u64 {
        self.base.wrapping_add(page * PAGE).cast()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and every user of it is gone.
        unsafe { libc::munmap(self.reserved, self.reserved_length) };
    }
}

/// The simulated device, which shares the address space of this process.
struct Mirror(File);

impl Mirror {
    fn open() -> Result<Mirror> {
        let file = File::options().read(true).write(true).open(DEVICE);
        Ok(Mirror(file.context(DEVICE)?))
    }

    /// Gives how many pages the device says that it has handled.
    fn command(
        &self,
        request: libc::c_ulong,
        addr: u64,
        pages: usize,
        out: &mut [u8],
    ) -> Result<usize> {
        let mut command = Command {
            addr,
            ptr: out.as_mut_ptr() as u64,
            npages: pages as u64,
            ..Command::default()
        };
        // SAFETY: the structure is the one that the request is about; callers give room for what it writes to `out`.
        let status = unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, &mut command) };
        if status != 0 {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("{DEVICE}: request {request:#x} for {pages} pages"));
        }
        Ok(command.cpages as usize)
    }

    /// Moves pages to the device.
    fn take(&self, addr: u64, pages: usize) -> Result<()> {
        let mut contents = vec![0; pages * PAGE];
        let taken = self.command(HMM_DMIRROR_MIGRATE_TO_DEV, addr, pages, &mut contents)?;
        ensure!(taken == pages, "the device took {taken} of {pages} pages");
        Ok(())
    }

    /// Has the device read pages.
    fn read(&self, addr: u64, pages: usize, contents: &mut [u8]) -> Result<()> {
        let read = self.command(HMM_DMIRROR_READ, addr, pages, contents)?;
        ensure!(read == pages, "the device read {read} of {pages} pages");
        Ok(())
    }

    /// How pages are mapped, as the device sees it: a value of `HMM_DMIRROR_PROT_*` for each, but for its size.
    fn snapshot(&self, addr: u64, pages: usize) -> Result<Vec<u8>> {
        let mut how = vec![0; pages];
        self.command(HMM_DMIRROR_SNAPSHOT, addr, pages, &mut how)?;
        how.iter_mut().for_each(|one| *one &= !HMM_DMIRROR_PROT_PMD);
        Ok(how)
    }
}

/// Puts pages of `layout` on the device and lets scans run over all: they hint those that stayed and nothing else, and the
/// device may write as before. Then takes the pages back.
fn left_alone(source: &Source, layout: &Layout) -> Result<()> {
    let mapping = Mapping::new(layout)?;
    let mirror = Mirror::open()?;
    let (addr, pages) = (mapping.address(), layout.to_device);
    mirror.take(addr, pages)?;
    only_writable(&mirror.snapshot(addr, pages)?).context("before the scans")?;

    let before = source.read()?;
    while_spinning(|| under_scans(SCANS))?;
    let hinted = source.read()?.pte_updates - before.pte_updates;
    only_writable(&mirror.snapshot(addr, pages)?)?;
    let stay = layout.stay as u64;
    ensure!(
        hinted == stay,
        "{hinted} pages hinted, and {stay} were there to be hinted"
    );

    for page in 0..mapping.pages {
        // SAFETY: inside the mapping and aligned. A page that is on the device comes back.
        let word = unsafe { mapping.word(page).read_volatile() };
        ensure!(word == page as u64 + 1, "page {page} came back with {word}");
    }
    Ok(())
}

/// Lets a scan run while threads keep the mutex that the device takes for each notification: a scan waits for it, and
/// hints every page. One that may not sleep leaves pages out, for the next scan: so there is one only.
fn hinted_while_busy(source: &Source) -> Result<()> {
    let _period = Settings::every(PERIOD)?;
    (0..ROUNDS).try_for_each(|round| {
        in_new_process(|| one_scan_while_busy(source)).with_context(|| format!("round {round}"))
    })
}

fn one_scan_while_busy(source: &Source) -> Result<()> {
    let mirror = Mirror::open()?;
    let (each, busy) = (Mapping::new(&EACH)?, Mapping::new(&BUSY)?);
    balancing::forbid_scans_of(busy.address()..busy.address() + (busy.pages * PAGE) as u64)?;
    for page in (1..each.pages).step_by(2) {
        // SAFETY: changes what a core dump has in it, and so makes a mapping of its own of each page.
        let failed = unsafe { libc::madvise(each.word(page).cast(), PAGE, libc::MADV_DONTDUMP) };
        ensure!(failed == 0, "madvise(): {}", io::Error::last_os_error());
    }
    let before = source.read()?;
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    let (address, count) = (busy.address(), busy.pages);
    std::thread::scope(|scope| {
        let read = || -> Result<()> {
            let mut contents = vec![0; count * PAGE];
            while !stop.load(Ordering::Relaxed) {
                mirror.read(address, count, &mut contents)?;
                reads.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(read)).collect();
        let result = while_spinning(|| under_scans(1));
        stop.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().expect("reading does not panic")?;
        }
        result
    })?;
    let hinted = source.read()?.pte_updates - before.pte_updates;
    let (pages, reads) = (each.pages as u64, reads.into_inner());
    ensure!(
        hinted == pages,
        "{hinted} pages of {pages} hinted, while the device read {count} pages {reads} times"
    );
    Ok(())
}

/// Runs `body` in a copy of this process, which must have no other thread.
fn in_new_process(body: impl FnOnce() -> Result<()>) -> Result<()> {
    let (mut error, mut sent) = UnixStream::pair().context("socketpair()")?;
    // SAFETY: nobody else has a lock that the child might need, as there is no other thread.
    let child = unsafe { libc::fork() };
    ensure!(child >= 0, "fork(): {}", io::Error::last_os_error());
    if child == 0 {
        let done = panic::catch_unwind(AssertUnwindSafe(body));
        let text = match done {
            Ok(Ok(())) => String::new(),
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => "panicked".to_string(),
        };
        let status = sent.write_all(text.as_bytes()).is_err() || !text.is_empty();
        // SAFETY: ends the child, without what the parent has to clean up.
        unsafe { libc::_exit(status.into()) };
    }
    drop(sent);
    let (mut text, mut status) = (String::new(), 0);
    let read = error
        .read_to_string(&mut text)
        .context("read what the new process says");
    // SAFETY: our own child, and room for its status.
    let waited = unsafe { libc::waitpid(child, &mut status, 0) };
    ensure!(waited == child, "waitpid(): {}", io::Error::last_os_error());
    read?;
    ensure!(status == 0, "{text} (status {status:#x})");
    Ok(())
}

/// Uses CPU time in user mode while `body` runs.
fn while_spinning<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    let cpus = balancing::vcpu_cpus(1)?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let spinner = scope.spawn(|| {
            let placed = balancing::set_affinity(&cpus);
            while placed.is_ok() && !stop.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
            placed
        });
        let result = body();
        stop.store(true, Ordering::Relaxed);
        spinner.join().expect("spinning does not panic")?;
        result
    })
}

/// All of the pages are on the device, and writable there.
fn only_writable(mapped: &[u8]) -> Result<()> {
    match mapped.iter().position(|how| *how != WRITABLE) {
        None => Ok(()),
        Some(page) => {
            let count = mapped.iter().filter(|how| **how != WRITABLE).count();
            let how = mapped[page];
            bail!("{count} of {} pages are not on the device and writable, the first is page {page} ({how:#04x})", mapped.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_not_writable_is_seen() {
        assert!(only_writable(&[WRITABLE; 4]).is_ok());
        for how in [0, 0x01, 0x02, 0x21, 0x32, 0xff] {
            assert!(only_writable(&[WRITABLE, how, WRITABLE]).is_err());
        }
    }
}
