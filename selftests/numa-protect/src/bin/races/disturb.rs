// SPDX-License-Identifier: GPL-2.0
//! Does to guest memory what [`Operation`] says, and looks whether it holds what it promises while it lasts; uses its
//! own range of guest memory, and for some operations the whole process.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use guest::balancing::{self, CPU_NODE};
use guest::memory::{Backing, GuestMemory, HUGE_PAGE};
use guest::vm::{Clearing, Faults, Sweep, Vm};
use guest::PAGE;
use io_uring::IoUring;

use crate::case::VCPUS;
use crate::operation::{Kind, Operation};
use crate::userfault::{Protection, Userfault};

/// Of `linux/mempolicy.h`: move also pages that other processes map.
const MPOL_MF_MOVE_ALL: libc::c_int = 1 << 2;
/// Bytes at the start of each page in which vCPUs count: a word for each.
const COUNTED: usize = 16;
/// Of an entry in `/proc/self/pagemap`: present, and the frame's number.
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// How long protected memory waits for somebody who is stopped by it.
const STOPPED: Duration = Duration::from_secs(5);

/// How often the dirty log is read while it is on.
const LOGS: usize = 4;

/// What one thread needs to disturb, and what it saw.
pub struct Disturber<'a> {
    memory: &'a Arc<GuestMemory>,
    vm: &'a Vm,
    second: Option<&'a Vm>,
    /// Which thread it is; vCPU `VCPUS + number` of `vm` is its own, as is vCPU `number` of `second`.
    number: usize,
    /// What shared guest memory is a mapping of.
    file: Option<&'a File>,
    pagemap: File,
    ring: Option<IoUring>,
    /// Passes that its operations made over each page, as `GuestMemory::verify` wants them.
    pub counted: Vec<Vec<u32>>,
    /// How often something happened that shows that the disturbance was one, by name.
    pub evidence: BTreeMap<&'static str, u64>,
    /// The first promise that was not kept.
    pub broken: Option<String>,
}

impl<'a> Disturber<'a> {
    /// Thread `number` of those that disturb `memory`, which `vm` uses, and all the time `second`, if there is one.
    /// `file`: see [`mapped_file`].
    pub fn new(
        memory: &'a Arc<GuestMemory>,
        file: Option<&'a File>,
        vm: &'a Vm,
        second: Option<&'a Vm>,
        number: usize,
    ) -> Result<Disturber<'a>> {
        Ok(Disturber {
            memory,
            vm,
            second,
            number,
            file,
            pagemap: File::open("/proc/self/pagemap").context("/proc/self/pagemap")?,
            ring: None,
            counted: vec![vec![0; memory.pages()]; COUNTED / 4],
            evidence: BTreeMap::new(),
            broken: None,
        })
    }

    /// Does `operation`, which is over when this returns.
    pub fn perform(&mut self, operation: &Operation) -> Result<()> {
        let Operation {
            kind,
            pages,
            choice,
        } = operation;
        let done = match kind {
            Kind::Migrate => self.migrate(pages, *choice),
            Kind::Discard => self.advise(pages, libc::MADV_DONTNEED),
            Kind::Unmap => self.unmap(pages, *choice),
            Kind::Protect => self.protect(pages, *choice),
            Kind::PageOut => self.page_out(pages),
            Kind::Huge => self.huge(pages, *choice),
            Kind::Merge => self.merge(pages),
            Kind::Fork => self.fork(pages, *choice),
            Kind::UserWriteProtect => self.user_protect(pages, *choice, Protection::Write),
            Kind::UserReadWriteProtect => self.user_protect(pages, *choice, Protection::ReadWrite),
            Kind::Slot => self.slot(pages, *choice),
            Kind::DirtyLog => self.dirty_log(pages, *choice),
            Kind::Pin => self.pin(pages, *choice),
            Kind::Machine => self.machine(pages, *choice),
            Kind::SecondMachine => self.second_machine(pages),
        };
        done.with_context(|| format!("{} of pages {pages:?}", kind.name()))?;
        self.saw(kind.name(), 1);
        Ok(())
    }

    fn saw(&mut self, what: &'static str, times: u64) {
        *self.evidence.entry(what).or_default() += times;
    }

    fn addresses(&self, pages: &Range<usize>) -> Range<u64> {
        let start = self.memory.addresses().start;
        start + (pages.start * PAGE) as u64..start + (pages.end * PAGE) as u64
    }

    fn at(&self, pages: &Range<usize>) -> (*mut libc::c_void, usize) {
        let range = self.addresses(pages);
        (range.start as *mut _, (range.end - range.start) as usize)
    }

    fn migrate(&mut self, pages: &Range<usize>, choice: u64) -> Result<()> {
        if choice % 8 == 0 {
            let (from, to): (libc::c_ulong, libc::c_ulong) = match choice & 8 {
                0 => (0b01, 0b10),
                _ => (0b10, 0b01),
            };
            let bits = libc::c_ulong::BITS as libc::c_ulong;
            // SAFETY: the kernel reads one word of each mask; pages keep their contents when they move.
            let rc = unsafe { libc::syscall(libc::SYS_migrate_pages, 0, bits, &from, &to) };
            ensure!(rc >= 0, "migrate_pages(): {}", io::Error::last_os_error());
            self.saw("migrate_pages(2)", 1);
            return Ok(());
        }
        let node = ((choice >> 3) & 1) as libc::c_int;
        let before = self.move_pages(pages, None)?;
        let after = self.move_pages(pages, Some(node))?;
        let moved = before.iter().zip(&after);
        let moved = moved.filter(|(before, after)| **before != node && **after == node);
        self.saw("pages moved", moved.count() as u64);
        Ok(())
    }

    /// Asks where pages are, or moves them to `node`. Gives the node of each, or its negative errno.
    fn move_pages(&self, pages: &Range<usize>, node: Option<libc::c_int>) -> Result<Vec<i32>> {
        let addresses: Vec<u64> = self.addresses(pages).step_by(PAGE).collect();
        let nodes = node.map(|node| vec![node; addresses.len()]);
        let mut status = vec![-libc::ENOENT; addresses.len()];
        // SAFETY: the arrays have as many elements as said; pages keep their contents when they move.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                0,
                addresses.len(),
                addresses.as_ptr(),
                nodes
                    .as_ref()
                    .map_or(std::ptr::null(), |nodes| nodes.as_ptr()),
                status.as_mut_ptr(),
                MPOL_MF_MOVE_ALL,
            )
        };
        // A positive number counts pages that could not be moved.
        ensure!(rc >= 0, "move_pages(): {}", io::Error::last_os_error());
        Ok(status)
    }

    fn advise(&self, pages: &Range<usize>, advice: libc::c_int) -> Result<()> {
        let (start, len) = self.at(pages);
        // SAFETY: own memory, and advice that keeps its contents: `Kind::suits` sees to that.
        let rc = unsafe { libc::madvise(start, len, advice) };
        ensure!(rc == 0, "madvise({advice}): {}", io::Error::last_os_error());
        Ok(())
    }

    /// The addresses stay taken meanwhile: another thread's mmap() could come to lie there.
    fn unmap(&mut self, pages: &Range<usize>, choice: u64) -> Result<()> {
        let file = self.file.context("not a shared mapping")?;
        let (start, len) = self.at(pages);
        let map = |access, flags, fd, offset| -> Result<()> {
            // SAFETY: guest memory's own addresses, from which nobody in this process reads meanwhile; what they map is in
            // the file, and there again in the end.
            let mapped =
                unsafe { libc::mmap(start, len, access, flags | libc::MAP_FIXED, fd, offset) };
            ensure!(mapped == start, "mmap(): {}", io::Error::last_os_error());
            Ok(())
        };
        let taken = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        map(libc::PROT_NONE, taken, -1, 0)?;
        self.while_used(pages, || {
            self.await_refusal(choice);
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let offset = (pages.start * PAGE) as libc::off_t;
            map(access, libc::MAP_SHARED, file.as_raw_fd(), offset)?;
            self.advise(pages, libc::MADV_NOHUGEPAGE)
        })?;
        self.count(VCPUS + self.number, pages);
        Ok(())
    }

    /// Runs `body`, which is to release `pages`, while this thread's own vCPU makes a pass over them.
    fn while_used<T>(&self, pages: &Range<usize>, body: impl FnOnce() -> Result<T>) -> Result<T> {
        self.vm
            .while_passing(VCPUS + self.number, sweep(pages, 0), body)
    }

    /// Waits until some vCPU was refused, and a little longer.
    fn await_refusal(&self, choice: u64) {
        let (begun, before) = (Instant::now(), self.vm.refused());
        while self.vm.refused() == before && begun.elapsed() < STOPPED {
            std::thread::yield_now();
        }
        hold(choice);
    }

    fn mprotect(&self, pages: &Range<usize>, access: libc::c_int) -> Result<()> {
        let (start, len) = self.at(pages);
        // SAFETY: own memory, which nobody but vCPUs and this thread uses, and both bear being refused.
        let rc = unsafe { libc::mprotect(start, len, access) };
        ensure!(rc == 0, "mprotect(): {}", io::Error::last_os_error());
        Ok(())
    }

    fn protect(&mut self, pages: &Range<usize>, choice: u64) -> Result<()> {
        // What is not readable cannot be looked at.
        let readable = choice % 4 != 0;
        let words = || readable.then(|| self.words(pages));
        let access = if readable {
            libc::PROT_READ
        } else {
            libc::PROT_NONE
        };
        self.mprotect(pages, access)?;
        let before = words();
        let kept = self.while_used(pages, || {
            self.await_refusal(choice);
            let kept = words() == before;
            self.mprotect(pages, libc::PROT_READ | libc::PROT_WRITE)?;
            Ok(kept)
        })?;
        self.count(VCPUS + self.number, pages);
        if !kept {
            self.break_promise("read-only memory changed", pages);
        }
        Ok(())
    }

    /// The words in which vCPUs count, of each page.
    fn words(&self, pages: &Range<usize>) -> Vec<u64> {
        let words = |page: u64| {
            let page = page as *const u64;
            // SAFETY: inside guest memory and aligned; vCPUs may write at the same time.
            (0..COUNTED / 8).map(move |word| unsafe { page.add(word).read_volatile() })
        };
        self.addresses(pages)
            .step_by(PAGE)
            .flat_map(words)
            .collect()
    }

    fn break_promise(&mut self, what: &str, pages: &Range<usize>) {
        self.broken
            .get_or_insert_with(|| format!("{what} within pages {pages:?}"));
    }

    /// Whatever cannot be paged out, e.g. as there is no room, stays.
    fn page_out(&mut self, pages: &Range<usize>) -> Result<()> {
        self.advise(pages, libc::MADV_PAGEOUT)
    }

    fn huge(&mut self, pages: &Range<usize>, choice: u64) -> Result<()> {
        const UNIT: usize = HUGE_PAGE / PAGE;
        let first = pages.start / UNIT * UNIT;
        let whole = first..first + UNIT;
        let part = pages.start..pages.end.min(whole.end);
        match choice % 8 {
            0..4 => {
                let (start, len) = self.at(&whole);
                // SAFETY: own memory, which keeps its contents.
                match unsafe { libc::madvise(start, len, libc::MADV_COLLAPSE) } {
                    0 => self.saw("collapses", 1),
                    _ => match io::Error::last_os_error() {
                        // Pages that are busy, elsewhere, or pinned; and the huge page that is one already, but of file.
                        error
                            if [libc::EAGAIN, libc::EBUSY, libc::ENOMEM, libc::EINVAL]
                                .contains(&error.raw_os_error().unwrap_or(0)) =>
                        {
                            self.saw("collapses refused", 1);
                        }
                        error => bail!("MADV_COLLAPSE: {error}"),
                    },
                }
                Ok(())
            }
            4 => {
                self.mprotect(&part, libc::PROT_READ)?;
                self.mprotect(&part, libc::PROT_READ | libc::PROT_WRITE)
            }
            5 => {
                self.advise(&part, libc::MADV_NOHUGEPAGE)?;
                self.advise(&part, libc::MADV_HUGEPAGE)
            }
            _ => self.page_out(&part),
        }
    }

    /// Sweeps `pages`, which vCPU `vcpu` of `vm` sees `shift` pages further up.
    fn pass(&mut self, vm: &Vm, vcpu: usize, pages: &Range<usize>, shift: usize) -> Result<()> {
        vm.pass(vcpu, sweep(pages, shift))?;
        self.count(vcpu, pages);
        Ok(())
    }

    /// vCPU `vcpu` has made a pass.
    fn count(&mut self, vcpu: usize, pages: &Range<usize>) {
        for page in pages.clone() {
            let word = &mut self.counted[vcpu][page];
            *word = word.wrapping_add(1);
        }
    }

    /// Writing takes a page of its own, which KSM will merge again where another one was written to as often.
    fn merge(&mut self, pages: &Range<usize>) -> Result<()> {
        // A longer pass would keep the vCPU from what it shares its processor with for too long.
        let pages = pages.start..pages.end.min(pages.start + 64);
        self.pass(self.vm, VCPUS + self.number, &pages, 0)
    }

    fn fork(&mut self, pages: &Range<usize>, choice: u64) -> Result<()> {
        let pages = if choice % 4 == 0 {
            0..self.memory.pages()
        } else {
            pages.clone()
        };
        let (start, _) = self.at(&pages);
        // SAFETY: the child only reads guest memory, sleeps and exits.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            watch_copy(start.cast(), pages.len(), choice);
        }
        ensure!(pid > 0, "fork(): {}", io::Error::last_os_error());
        let mut status = 0;
        // SAFETY: our own child, and room for its status.
        while unsafe { libc::waitpid(pid, &mut status, 0) } != pid {
            let error = io::Error::last_os_error();
            ensure!(
                error.kind() == io::ErrorKind::Interrupted,
                "waitpid(): {error}"
            );
        }
        ensure!(
            libc::WIFEXITED(status),
            "a child ended with status {status:#x}"
        );
        if libc::WEXITSTATUS(status) != 0 {
            self.break_promise("a child's copy changed", &pages);
        }
        Ok(())
    }

    fn user_protect(
        &mut self,
        pages: &Range<usize>,
        choice: u64,
        protection: Protection,
    ) -> Result<()> {
        let mut userfault = Userfault::new(protection)?;
        let range = self.addresses(pages);
        // Only pages that are there can be protected from reading, too: what was discarded has to come back first.
        self.words(pages);
        userfault.protect(&range)?;
        // Pages that this process cannot access are looked at in the file, if there is one.
        let words = || match (protection, self.file) {
            (Protection::Write, _) => Ok(Some(self.words(pages))),
            (Protection::ReadWrite, Some(file)) => words_in_file(file, pages).map(Some),
            (Protection::ReadWrite, None) => Ok(None),
        };
        let before = words()?;
        let (stopped, kept) = self.while_used(pages, || {
            let begun = Instant::now();
            let mut stopped = 0;
            while stopped == 0 && begun.elapsed() < STOPPED {
                std::thread::yield_now();
                stopped = userfault.stopped()?;
            }
            hold(choice);
            let kept = words()? == before;
            stopped += userfault.stopped()?;
            userfault.release(&range)?;
            Ok((stopped, kept))
        })?;
        self.count(VCPUS + self.number, pages);
        self.saw("accesses stopped", stopped);
        if !kept {
            self.break_promise("memory protected by userfaultfd changed", pages);
        }
        Ok(())
    }

    fn slot(&mut self, pages: &Range<usize>, choice: u64) -> Result<()> {
        let (alias, vcpu) = (self.number as u32, VCPUS + self.number);
        let room = 4 * self.memory.pages();
        let first = room * (1 + self.number) + choice as usize % self.memory.pages();
        for at in [first, first + room / 2] {
            self.vm.put_alias(alias, pages, at)?;
            self.pass(self.vm, vcpu, pages, at - pages.start)?;
        }
        self.vm.remove_alias(alias)
    }

    /// What this thread's own vCPU writes to between two readings must be in the second, whatever scans have unmapped
    /// meanwhile. The log is of all memory, so that the others' writes are logged, too.
    fn dirty_log(&mut self, pages: &Range<usize>, choice: u64) -> Result<()> {
        let (vm, vcpu) = (self.vm, VCPUS + self.number);
        let clearing = Clearing::ALL[choice as usize % Clearing::ALL.len()];
        // Each other vCPU may be about to log one page that it has just made writable (`fast_pf_fix_direct_spte()`), which
        // this one then writes to without a fault.
        let late = vm.vcpus() - 1;
        vm.while_logging(clearing, |log| {
            log.take()?;
            for reading in 0..LOGS {
                self.pass(vm, vcpu, pages, 0)?;
                if reading % 2 == 1 {
                    hold(choice);
                }
                let dirty = log.take()?;
                let logged = pages.clone().filter(|page| dirty[*page]).count();
                self.saw("pages logged", logged as u64);
                if logged + late < pages.len() {
                    self.break_promise(
                        "pages that were written to are not in the dirty log",
                        pages,
                    );
                }
            }
            Ok(())
        })
    }

    fn pin(&mut self, pages: &Range<usize>, choice: u64) -> Result<()> {
        let (iov_base, iov_len) = self.at(pages);
        let ring = match self.ring.take() {
            Some(ring) => ring,
            None => IoUring::new(1).context("io_uring_setup()")?,
        };
        // SAFETY: part of guest memory, and registered only until below.
        unsafe {
            ring.submitter()
                .register_buffers(&[libc::iovec { iov_base, iov_len }])
        }
        .context("IORING_REGISTER_BUFFERS")?;
        let before = self.frames(pages)?;
        hold(choice);
        let after = self.frames(pages)?;
        ring.submitter()
            .unregister_buffers()
            .context("IORING_UNREGISTER_BUFFERS")?;
        self.ring = Some(ring);
        if before != after {
            self.break_promise("a pinned page moved", pages);
        }
        Ok(())
    }

    /// The frames of pages that are there, if only for a moment not.
    fn frames(&self, pages: &Range<usize>) -> Result<Vec<u64>> {
        let first = self.addresses(pages).start / PAGE as u64;
        (first..first + pages.len() as u64)
            .map(|page| loop {
                let mut entry = [0; 8];
                self.pagemap
                    .read_exact_at(&mut entry, page * 8)
                    .context("/proc/self/pagemap")?;
                let entry = u64::from_ne_bytes(entry);
                // Somebody tries to migrate it.
                if entry & PRESENT != 0 {
                    ensure!(entry & FRAME != 0, "/proc/self/pagemap: needs root");
                    break Ok(entry & FRAME);
                }
                std::thread::yield_now();
            })
            .collect()
    }

    fn machine(&mut self, pages: &Range<usize>, choice: u64) -> Result<()> {
        let cpus = balancing::node_cpus(CPU_NODE)?;
        let cpu = cpus[choice as usize % cpus.len()];
        let vm = Vm::with(self.memory, &[cpu], Faults::Retried)?;
        self.pass(&vm, 0, pages, 0)
    }

    fn second_machine(&mut self, pages: &Range<usize>) -> Result<()> {
        let vm = self.second.context("no second VM")?;
        self.pass(vm, self.number, pages, 0)
    }
}

fn sweep(pages: &Range<usize>, shift: usize) -> Sweep {
    Sweep {
        first: pages.start + shift,
        stride: 1,
        count: pages.len(),
    }
}

/// The words in which vCPUs count, of each page, read from the file.
fn words_in_file(file: &File, pages: &Range<usize>) -> Result<Vec<u64>> {
    let mut words = Vec::new();
    for page in pages.clone() {
        for word in 0..COUNTED / 8 {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, (page * PAGE + word * 8) as u64)
                .context("read guest memory's file")?;
            words.push(u64::from_ne_bytes(bytes));
        }
    }
    Ok(words)
}

/// Lets a disturbance last for 1 to 4 ms.
fn hold(choice: u64) {
    std::thread::sleep(Duration::from_micros(1000 + (choice >> 32) % 3000));
}

/// What `memory` is a mapping of, if it is shared. Nobody may have disturbed it yet.
pub fn mapped_file(memory: &GuestMemory) -> Result<Option<File>> {
    if memory.backing() != Backing::Memfd {
        return Ok(None);
    }
    let range = memory.addresses();
    let path = format!("/proc/self/map_files/{:x}-{:x}", range.start, range.end);
    File::options()
        .read(true)
        .write(true)
        .open(&path)
        .map(Some)
        .with_context(|| format!("{path}: needs root"))
}

/// The life of a child: sums the words of `pages` pages from `start` up, again and again, and exits with 1 if they change.
fn watch_copy(start: *const u64, pages: usize, choice: u64) -> ! {
    let sum = || {
        let mut sum = 0u64;
        for page in 0..pages {
            for word in 0..COUNTED / 8 {
                // SAFETY: inside of the child's copy of guest memory, and aligned.
                let value = unsafe { start.add(page * (PAGE / 8) + word).read_volatile() };
                sum = (sum ^ value).wrapping_mul(0x0100_0000_01b3).rotate_left(17);
            }
        }
        sum
    };
    let first = sum();
    for _ in 0..3 {
        hold(choice);
        if sum() != first {
            // SAFETY: ends the process without running what belongs to its parent.
            unsafe { libc::_exit(1) };
        }
    }
    // SAFETY: as above.
    unsafe { libc::_exit(0) }
}
