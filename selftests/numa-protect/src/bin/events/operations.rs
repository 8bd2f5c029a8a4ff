// SPDX-License-Identifier: GPL-2.0
//! Whatever else changes the page tables of a virtual machine's memory, with NUMA balancing off: it announces what it
//! does, without the flag of NUMA scans and without a report, and KVM drops what it must. Changes its own memory only.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use anyhow::{bail, ensure, Context, Result};
use guest::memcg::Source;
use guest::memory::{Backing, Pinned, HUGE_PAGE};
use guest::needs::{self, Need};
use guest::vm::Sweep;
use guest::{balancing, ksm, PAGE};
use trace::check;
use trace::client::Client;
use trace::record::{event, flag, kind, Record};
use trace::sequence::Sequence;

use crate::{Machine, Test, LIMIT, RECORDS, VM};

const USERFAULTFD: Need = Need {
    path: "/proc/sys/vm/unprivileged_userfaultfd",
    remedy: "CONFIG_USERFAULTFD",
};

/// The tests of this group.
pub const TESTS: &[Test] = &[
    test("mprotect.read_only", VM, mprotect),
    test("munmap", VM, munmap),
    test("madvise_dontneed", VM, madvise_dontneed),
    test("madvise_free", VM, madvise_free),
    test("madvise_remove", VM, madvise_remove),
    test("mremap", VM, mremap),
    test("move_pages", VM, move_pages),
    test("fork", VM, fork),
    test(
        "ksm_merge_and_unmerge",
        &[needs::KVM, needs::RECORDER, needs::KSM],
        ksm_merge_and_unmerge,
    ),
    test(
        "userfaultfd_write_protect",
        &[needs::KVM, needs::RECORDER, USERFAULTFD],
        userfaultfd_write_protect,
    ),
    test(
        "thp_collapse",
        &[needs::KVM, needs::RECORDER, needs::THP],
        thp_collapse,
    ),
    test(
        "thp_split",
        &[needs::KVM, needs::RECORDER, needs::THP],
        thp_split,
    ),
];

const fn test(name: &'static str, needs: &'static [Need], run: fn(&Source) -> Result<()>) -> Test {
    Test { name, needs, run }
}

/// Guest memory in bytes.
const MEMORY: usize = 3 * HUGE_PAGE;
/// The pages that the operations are about: where they make a mapping of their own of them, its edges are those of huge
/// pages, as else the kernel makes sure that no huge page crosses the edge, and that makes KVM drop the same pages.
const PAGES: Range<usize> = 512..1024;

/// A machine that is being recorded.
struct Recorded {
    machine: Machine,
    client: Client,
}

impl Recorded {
    fn new(backing: Backing) -> Result<Recorded> {
        Ok(Recorded {
            machine: Machine::new(backing, Pinned::None, MEMORY, 1)?,
            client: Client::attach_self(RECORDS)?,
        })
    }

    /// The addresses of base pages `pages`.
    fn addresses(&self, pages: Range<usize>) -> Range<u64> {
        let base = self.machine.memory.addresses().start;
        base + (pages.start * PAGE) as u64..base + (pages.end * PAGE) as u64
    }

    fn at(&self, page: usize) -> *mut libc::c_void {
        self.addresses(page..page).start as *mut libc::c_void
    }

    fn sweep(&self) -> Sweep {
        Sweep {
            first: PAGES.start,
            stride: 1,
            count: PAGES.len(),
        }
    }

    /// Does `operation`, which must announce `event` for some of `addresses`. Gives how many pages KVM dropped.
    fn watch(
        &mut self,
        addresses: &Range<u64>,
        event: u8,
        operation: impl FnOnce(&Machine) -> Result<()>,
    ) -> Result<u64> {
        self.client.settle(Vec::new(), LIMIT)?;
        let before = self.machine.mapped()?;
        operation(&self.machine)?;
        let after = self.machine.mapped()?;
        let records = self.client.settle(Vec::new(), LIMIT)?.records;
        let stats = self.client.stats()?;
        ensure!(stats.overwritten + stats.lost == 0, "{stats:?}");
        no_scan(records, addresses, event).map_err(anyhow::Error::msg)?;
        Ok(before.saturating_sub(after))
    }

    /// The same for [`PAGES`], all of which KVM must drop.
    fn watch_pages(
        &mut self,
        event: u8,
        operation: impl FnOnce(&Machine) -> Result<()>,
    ) -> Result<()> {
        let addresses = self.addresses(PAGES);
        let dropped = self.watch(&addresses, event, operation)?;
        let pages = PAGES.len() as u64;
        ensure!(dropped >= pages, "KVM dropped {dropped} of {pages} pages");
        Ok(())
    }

    /// The guest must not get at [`PAGES`].
    fn refused(&self) -> Result<()> {
        match self.machine.vm.pass(0, self.sweep()) {
            Ok(()) => bail!("the guest goes on writing"),
            // As an exit that says where, or as an error alone.
            Err(error)
                if guest::errno(&error) == Some(libc::EFAULT)
                    || format!("{error:#}").contains("MemoryFault") =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// Judges what was recorded of an operation that is no scan.
fn no_scan(records: Vec<Record>, addresses: &Range<u64>, event: u8) -> Result<(), String> {
    let of_scan = |one: &&Record| one.kind == kind::NUMA_PROTECT || one.flags & flag::NUMA != 0;
    if let Some(record) = records.iter().find(of_scan) {
        return Err(format!("a record as of a NUMA scan: {}", record.line(12)));
    }
    let announced = records.iter().any(|one| {
        one.kind == kind::INVALIDATE_RANGE_START
            && one.event == event
            && one.start < addresses.end
            && one.end > addresses.start
    });
    if !announced {
        let name = event::name(event);
        return Err(format!(
            "no {name} for {:x}-{:x} among {} records",
            addresses.start,
            addresses.end,
            records.len()
        ));
    }
    check::balanced(&Sequence::new(records)).map_err(|violation| violation.to_string())
}

/// The result of a system call.
fn done(status: libc::c_int, what: &str) -> Result<()> {
    match status {
        -1 => Err(io::Error::last_os_error()).context(what.to_string()),
        _ => Ok(()),
    }
}

fn protect(at: *mut libc::c_void, pages: usize, prot: libc::c_int) -> Result<()> {
    // SAFETY: guest memory, which Rust holds no reference into; it is written again only once that is allowed.
    done(
        unsafe { libc::mprotect(at, pages * PAGE, prot) },
        "mprotect()",
    )
}

fn advise(at: *mut libc::c_void, pages: usize, advice: libc::c_int, what: &str) -> Result<()> {
    // SAFETY: guest memory, which Rust holds no reference into; what may go is not compared later.
    done(unsafe { libc::madvise(at, pages * PAGE, advice) }, what)
}

/// Read-only is read-only for the guest, too, until it is put back.
fn mprotect(_: &Source) -> Result<()> {
    let mut recorded = Recorded::new(Backing::Anon)?;
    let (at, sweep) = (recorded.at(PAGES.start), recorded.sweep());
    let watched = recorded.watch_pages(event::PROTECTION_VMA, |_| {
        protect(at, PAGES.len(), libc::PROT_READ)
    });
    // First, as it matters most.
    recorded.refused().context("read-only memory")?;
    watched?;
    recorded.machine.verify().context("read-only memory")?;
    recorded.machine.vm.read_pass(0, sweep)?;
    recorded.watch_pages(event::PROTECTION_VMA, |_| {
        protect(at, PAGES.len(), libc::PROT_READ | libc::PROT_WRITE)
    })?;
    recorded.machine.pass(sweep)?;
    recorded.machine.verify()
}

fn munmap(_: &Source) -> Result<()> {
    let mut recorded = Recorded::new(Backing::Anon)?;
    let at = recorded.at(PAGES.start);
    recorded.watch_pages(event::UNMAP, |_| {
        // SAFETY: guest memory, which Rust holds no reference into; nobody reads it any more.
        done(unsafe { libc::munmap(at, PAGES.len() * PAGE) }, "munmap()")?;
        // Guest memory is unmapped as a whole in the end, so nobody else may get these addresses.
        reserve(Some(at)).map(drop)
    })?;
    recorded.refused().context("unmapped memory")
}

/// Takes addresses for [`PAGES`], at `at` or anywhere, without memory.
fn reserve(at: Option<*mut libc::c_void>) -> Result<*mut libc::c_void> {
    let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    if at.is_some() {
        flags |= libc::MAP_FIXED_NOREPLACE;
    }
    let length = PAGES.len() * PAGE;
    // SAFETY: a new mapping, over no other.
    let mapped = unsafe {
        libc::mmap(
            at.unwrap_or(ptr::null_mut()),
            length,
            libc::PROT_NONE,
            flags,
            -1,
            0,
        )
    };
    ensure!(
        mapped != libc::MAP_FAILED,
        "mmap(): {}",
        io::Error::last_os_error()
    );
    Ok(mapped)
}

fn madvise_dontneed(_: &Source) -> Result<()> {
    discard(Backing::Anon, libc::MADV_DONTNEED, "MADV_DONTNEED")
}

fn madvise_remove(_: &Source) -> Result<()> {
    discard(Backing::Memfd, libc::MADV_REMOVE, "MADV_REMOVE")
}

/// What is discarded is zero for the guest afterwards, so that it counts from zero again.
fn discard(backing: Backing, advice: libc::c_int, what: &str) -> Result<()> {
    let mut recorded = Recorded::new(backing)?;
    let (at, sweep) = (recorded.at(PAGES.start), recorded.sweep());
    recorded.watch_pages(event::CLEAR, |_| advise(at, PAGES.len(), advice, what))?;
    recorded.machine.pass(sweep)?;
    for page in PAGES {
        // SAFETY: guest memory, mapped and aligned.
        let word = unsafe { recorded.at(page).cast::<u32>().read_volatile() };
        ensure!(word == 1, "page {page}: the guest counted to {word}, not 1");
    }
    Ok(())
}

/// What may be freed is not, while the guest writes to it: there is no lack of memory.
fn madvise_free(_: &Source) -> Result<()> {
    let mut recorded = Recorded::new(Backing::Anon)?;
    let (at, sweep) = (recorded.at(PAGES.start), recorded.sweep());
    recorded.watch_pages(event::CLEAR, |_| {
        advise(at, PAGES.len(), libc::MADV_FREE, "MADV_FREE")
    })?;
    recorded.machine.pass(sweep)
}

/// Moved away, memory is out of the guest's reach; moved back, it is all there.
fn mremap(_: &Source) -> Result<()> {
    let mut recorded = Recorded::new(Backing::Anon)?;
    let (at, sweep) = (recorded.at(PAGES.start), recorded.sweep());
    let away = reserve(None)?;
    let length = PAGES.len() * PAGE;
    let moved = |from: *mut libc::c_void, to: *mut libc::c_void| {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: both are ours, and Rust holds no reference into either.
        let moved = unsafe { libc::mremap(from, length, length, flags, to) };
        ensure!(
            moved != libc::MAP_FAILED,
            "mremap(): {}",
            io::Error::last_os_error()
        );
        Ok(())
    };
    recorded.watch_pages(event::UNMAP, |_| {
        moved(at, away)?;
        reserve(Some(at)).map(drop)
    })?;
    recorded.refused().context("memory that was moved away")?;
    let there = away as u64..away as u64 + length as u64;
    recorded.watch(&there, event::UNMAP, |_| moved(away, at))?;
    recorded.machine.pass(sweep)?;
    recorded.machine.verify()
}

fn move_pages(_: &Source) -> Result<()> {
    let mut recorded = Recorded::new(Backing::Anon)?;
    recorded.watch_pages(event::CLEAR, |machine| {
        machine.memory.move_to(balancing::CPU_NODE)?;
        let nodes = machine.memory.nodes()?;
        let left = nodes
            .iter()
            .filter(|node| **node != balancing::CPU_NODE as i32);
        ensure!(left.count() == 0, "some pages did not move");
        Ok(())
    })?;
    recorded.machine.pass(recorded.machine.whole())?;
    recorded.machine.verify()
}

/// A child that lives for a moment: all private memory becomes read-only for both.
fn fork(_: &Source) -> Result<()> {
    let mut recorded = Recorded::new(Backing::Anon)?;
    recorded.watch_pages(event::PROTECTION_PAGE, |_| {
        // SAFETY: the child does nothing but exit.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()).context("fork()"),
            // SAFETY: as above.
            0 => unsafe { libc::_exit(0) },
            child => {
                // SAFETY: waits for the child; its status is not wanted.
                done(
                    unsafe { libc::waitpid(child, ptr::null_mut(), 0) },
                    "waitpid()",
                )
            }
        }
    })?;
    recorded.machine.pass(recorded.machine.whole())?;
    recorded.machine.verify()
}

fn ksm_merge_and_unmerge(_: &Source) -> Result<()> {
    let mut recorded = Recorded::new(Backing::Anon)?;
    let (at, sweep) = (recorded.at(PAGES.start), recorded.sweep());
    let advise = |advice, what| advise(at, PAGES.len(), advice, what);
    // SAFETY: guest memory, which Rust holds no reference into; no vCPU runs.
    unsafe { at.cast::<u8>().write_bytes(0x5a, PAGES.len() * PAGE) };
    recorded.watch_pages(event::CLEAR, |_| {
        advise(libc::MADV_MERGEABLE, "MADV_MERGEABLE")?;
        ksm::merge(PAGES.len() as u64, LIMIT)
    })?;
    // Reading leaves them merged.
    recorded.machine.vm.read_pass(0, sweep)?;
    recorded.watch_pages(event::CLEAR, |_| {
        advise(libc::MADV_UNMERGEABLE, "MADV_UNMERGEABLE")
    })
}

/// Of `linux/userfaultfd.h`: `_IOWR(0xaa, number, size)` with arrays of `__u64` for the structures.
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const UFFD_API: u64 = 0xaa;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;

fn userfaultfd_write_protect(_: &Source) -> Result<()> {
    let mut recorded = Recorded::new(Backing::Anon)?;
    let (start, length) = (recorded.addresses(PAGES).start, (PAGES.len() * PAGE) as u64);
    let sweep = recorded.sweep();
    // SAFETY: takes flags only; a descriptor that it gives is ours.
    let userfault = unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC);
        ensure!(fd >= 0, "userfaultfd(): {}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd as i32)
    };
    fn control<const WORDS: usize>(
        fd: &OwnedFd,
        request: libc::c_ulong,
        mut words: [u64; WORDS],
    ) -> Result<()> {
        // SAFETY: each request reads and writes a structure of as many words.
        let status = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, words.as_mut_ptr()) };
        done(status, "userfaultfd")
    }
    control(&userfault, UFFDIO_API, [UFFD_API, 0, 0])?;
    let register = [start, length, UFFDIO_REGISTER_MODE_WP, 0];
    control(&userfault, UFFDIO_REGISTER, register)?;
    for mode in [UFFDIO_WRITEPROTECT_MODE_WP, 0] {
        recorded
            .watch_pages(event::PROTECTION_VMA, |_| {
                control(&userfault, UFFDIO_WRITEPROTECT, [start, length, mode])
            })
            .with_context(|| format!("UFFDIO_WRITEPROTECT, mode {mode}"))?;
        // A write would wait for somebody to allow it.
        recorded.machine.vm.read_pass(0, sweep)?;
    }
    recorded.machine.pass(sweep)?;
    recorded.machine.verify()
}

const MADV_COLLAPSE: libc::c_int = 25;

fn thp_collapse(_: &Source) -> Result<()> {
    let mut recorded = Recorded::new(Backing::Anon)?;
    let pages = 0..HUGE_PAGE / PAGE;
    let (at, addresses) = (recorded.at(0), recorded.addresses(pages.clone()));
    let dropped = recorded.watch(&addresses, event::CLEAR, |_| {
        advise(at, pages.len(), libc::MADV_HUGEPAGE, "MADV_HUGEPAGE")?;
        advise(at, pages.len(), MADV_COLLAPSE, "MADV_COLLAPSE")
    })?;
    let pages = pages.len() as u64;
    ensure!(dropped >= pages, "KVM dropped {dropped} of {pages} pages");
    recorded.machine.pass(recorded.machine.whole())?;
    let huge = recorded.machine.vm.stat("pages_2m")?;
    ensure!(huge == 1, "{huge} huge mappings after one collapse");
    recorded.machine.verify()
}

/// A part of a huge page that goes leaves the rest in base pages.
fn thp_split(_: &Source) -> Result<()> {
    let mut recorded = Recorded::new(Backing::Thp)?;
    let huge = |machine: &Machine| machine.vm.stat("pages_2m");
    let before = huge(&recorded.machine)?;
    let (part, at) = (7, recorded.at(7));
    let addresses = recorded.addresses(0..HUGE_PAGE / PAGE);
    recorded.watch(&addresses, event::CLEAR, |_| {
        advise(at, 1, libc::MADV_DONTNEED, "MADV_DONTNEED")
    })?;
    recorded.machine.pass(recorded.machine.whole())?;
    let after = huge(&recorded.machine)?;
    ensure!(
        after + 1 == before,
        "{before} huge mappings before page {part} of one went, {after} after it"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(event: u8, flags: u16, pages: Range<u64>) -> [Record; 2] {
        [kind::INVALIDATE_RANGE_START, kind::INVALIDATE_RANGE_END].map(|kind| Record {
            kind,
            event,
            flags,
            start: pages.start << 12,
            end: pages.end << 12,
            ..Record::default()
        })
    }

    fn judged(records: &[Record]) -> String {
        let judged = no_scan(records.to_vec(), &(4 << 12..8 << 12), event::CLEAR);
        judged.err().unwrap_or_default()
    }

    #[test]
    fn what_is_announced_is_found() {
        let announced = pair(event::CLEAR, flag::BLOCKABLE, 7..9);
        assert_eq!(judged(&announced), "");
        for other in [
            pair(event::UNMAP, flag::BLOCKABLE, 7..9),
            pair(event::CLEAR, flag::BLOCKABLE, 8..9),
            pair(event::CLEAR, flag::BLOCKABLE, 2..4),
        ] {
            assert!(judged(&other).starts_with("no clear for 4000-8000 among 2"));
        }
        assert!(judged(&announced[..1]).contains("without an end"));
    }

    #[test]
    fn what_looks_like_a_scan_is_found() {
        let announced = pair(event::CLEAR, flag::BLOCKABLE, 4..5);
        for scan in [
            pair(event::CLEAR, flag::BLOCKABLE | flag::NUMA, 4..5),
            pair(event::CLEAR, flag::NUMA, 100..101),
        ] {
            assert!(judged(&[announced, scan].concat()).starts_with("a record as of"));
        }
        let report = Record {
            kind: kind::NUMA_PROTECT,
            ..announced[0]
        };
        assert!(judged(&[announced[0], report, announced[1]]).starts_with("a record as of"));
    }
}
