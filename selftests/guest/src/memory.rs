// SPDX-License-Identifier: GPL-2.0
//! Guest memory with known contents: mapped, placed, filled, pinned and checked; touches its own mapping only.
//!
//! Each base page holds, from its start, one little-endian 32-bit word for each vCPU, which that vCPU counts up, and in
//! the last eight bytes of each 64-byte line a tag made from the line's guest address; in pages to be merged, from its
//! offset in the page.

use std::io;
use std::ops::Range;
use std::ptr;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use serde::{Deserialize, Serialize};

use crate::pins::{Device, Holder, Pins};
use crate::{balancing, ksm, PAGE};

/// Size of a huge page in bytes.
pub const HUGE_PAGE: usize = 2 << 20;
/// Of `linux/mempolicy.h`: move only pages that no other process maps.
const MPOL_MF_MOVE: libc::c_int = 1 << 1;
const LINE: usize = 64;
const TAG: usize = LINE - 8;

/// What guest memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backing {
    /// Private anonymous memory in base pages.
    Anon,
    /// A shared mapping of a memfd.
    Memfd,
    /// Private anonymous memory in transparent huge pages.
    Thp,
}

/// How much of it is long-term pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pinned {
    /// Nothing.
    None,
    /// Every other stripe of 1 MiB, or of one huge page; the first stripe is not pinned.
    Half,
    /// Every other stripe of 64 KiB, or of one huge page; the first stripe is not pinned.
    #[serde(rename = "64k_stripes")]
    Stripes,
    /// Everything.
    All,
}

impl Backing {
    /// The name used in test names.
    pub fn name(self) -> &'static str {
        match self {
            Backing::Anon => "anon",
            Backing::Memfd => "memfd",
            Backing::Thp => "thp",
        }
    }

    /// Base pages in one page of this backing.
    pub fn unit(self) -> usize {
        match self {
            Backing::Anon | Backing::Memfd => 1,
            Backing::Thp => HUGE_PAGE / PAGE,
        }
    }
}

impl Pinned {
    /// The name used in test names.
    pub fn name(self) -> &'static str {
        match self {
            Pinned::None => "none",
            Pinned::Half => "half",
            Pinned::Stripes => "64k_stripes",
            Pinned::All => "all",
        }
    }
}

impl FromStr for Backing {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Backing> {
        [Backing::Anon, Backing::Memfd, Backing::Thp]
            .into_iter()
            .find(|one| one.name() == text)
            .with_context(|| format!("{text}: not a backing: anon, memfd or thp"))
    }
}

impl FromStr for Pinned {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Pinned> {
        [Pinned::None, Pinned::Half, Pinned::Stripes, Pinned::All]
            .into_iter()
            .find(|one| one.name() == text)
            .with_context(|| {
                format!("{text}: not a share of pinned memory: none, half, 64k_stripes or all")
            })
    }
}

/// Memory for a guest, which NUMA balancing may scan. Unmapped, and unpinned, when dropped.
pub struct GuestMemory {
    base: *mut u8,
    len: usize,
    backing: Backing,
    pinned: Pinned,
    /// Whether every other page, beginning with the second, is merged.
    merged: bool,
    pins: Option<Pins>,
}

// SAFETY: the mapping belongs to no thread, and everything that changes while guests run is read volatile.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Maps `len` bytes (a multiple of 2 MiB) at a multiple of 2 MiB, places them on `node`, fills and pins them.
    /// Fails if a page came from another node.
    pub fn new(backing: Backing, pinned: Pinned, len: usize, node: usize) -> Result<GuestMemory> {
        GuestMemory::pinned_by(Holder::IoUring, backing, pinned, len, node)
    }

    /// The same, with the pins held by `holder`.
    pub fn pinned_by(
        holder: Holder,
        backing: Backing,
        pinned: Pinned,
        len: usize,
        node: usize,
    ) -> Result<GuestMemory> {
        GuestMemory::with(holder, backing, pinned, len, node, GuestMemory::fill)
    }

    /// The same, but all zeroes, and so not to be verified.
    pub fn zeroed(
        backing: Backing,
        pinned: Pinned,
        len: usize,
        node: usize,
    ) -> Result<GuestMemory> {
        GuestMemory::with(
            Holder::IoUring,
            backing,
            pinned,
            len,
            node,
            GuestMemory::touch,
        )
    }

    fn with(
        holder: Holder,
        backing: Backing,
        pinned: Pinned,
        len: usize,
        node: usize,
        fill: fn(&GuestMemory),
    ) -> Result<GuestMemory> {
        if len == 0 || len % HUGE_PAGE != 0 {
            bail!("guest memory of {len} bytes: give a multiple of {HUGE_PAGE}");
        }
        let mut memory = GuestMemory {
            base: map_aligned(backing, len)?,
            len,
            backing,
            pinned,
            merged: false,
            pins: None,
        };
        let advice = match backing {
            Backing::Thp => libc::MADV_HUGEPAGE,
            Backing::Anon | Backing::Memfd => libc::MADV_NOHUGEPAGE,
        };
        // SAFETY: advice about our own mapping, which keeps its contents.
        if unsafe { libc::madvise(memory.base.cast(), len, advice) } != 0 {
            return Err(io::Error::last_os_error())
                .context("madvise(): is CONFIG_TRANSPARENT_HUGEPAGE set?");
        }
        balancing::allow_scans(memory.addresses())?;
        let cpus = balancing::node_cpus(node)?;
        std::thread::scope(|scope| {
            let filled = scope.spawn(|| -> Result<()> {
                if !cpus.is_empty() {
                    balancing::set_affinity(&cpus)?;
                }
                fill(&memory);
                if cpus.is_empty() {
                    memory.move_pages(0..memory.pages(), Some(node as libc::c_int))?;
                }
                Ok(())
            });
            filled.join().expect("filling memory does not panic")
        })
        .with_context(|| format!("place guest memory on node {node}"))?;
        memory.pin(holder)?;

        let nodes = memory.nodes()?;
        if let Some(page) = nodes.iter().position(|at| *at != node as i32) {
            bail!(
                "page {page} of guest memory is on node {} instead of {node}: free some memory there",
                nodes[page]
            );
        }
        Ok(memory)
    }

    /// Size in bytes.
    pub fn size(&self) -> usize {
        self.len
    }

    /// Size in base pages.
    pub fn pages(&self) -> usize {
        self.len / PAGE
    }

    /// What it is made of.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The addresses it takes in this process.
    pub fn addresses(&self) -> Range<u64> {
        let start = self.base as u64;
        start..start + self.len as u64
    }

    /// The device that pins it, if one does.
    pub fn device(&self) -> Option<&Device> {
        match &self.pins {
            Some(Pins::Device(device)) => Some(device),
            _ => None,
        }
    }

    /// Unpins all of it, which io_uring does some time later.
    pub fn unpin(&mut self) {
        self.pins = None;
        self.pinned = Pinned::None;
    }

    /// Takes base page `page` away; the next access gets another one, which is not pinned.
    pub fn discard(&self, page: usize) -> Result<()> {
        assert!(page < self.pages(), "no such page");
        let (advice, name) = match self.backing {
            Backing::Memfd => (libc::MADV_REMOVE, "MADV_REMOVE"),
            _ => (libc::MADV_DONTNEED, "MADV_DONTNEED"),
        };
        // SAFETY: a page of our own mapping, of which nobody holds a reference.
        match unsafe { libc::madvise(self.base.add(page * PAGE).cast(), PAGE, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()).with_context(|| format!("madvise({name})")),
        }
    }

    /// Whether base page `page` is pinned.
    pub fn is_pinned(&self, page: usize) -> bool {
        match self.pinned {
            Pinned::None => false,
            Pinned::Half | Pinned::Stripes => page * PAGE / self.stripe() % 2 == 1,
            Pinned::All => true,
        }
    }

    /// The addresses of the pinned parts in this process, ascending.
    pub fn pinned_addresses(&self) -> Vec<Range<u64>> {
        let (whole, stripe) = (self.addresses(), self.stripe());
        match self.pinned {
            Pinned::None => Vec::new(),
            Pinned::Half | Pinned::Stripes => whole
                .skip(stripe)
                .step_by(2 * stripe)
                .map(|start| start..start + stripe as u64)
                .collect(),
            Pinned::All => vec![whole],
        }
    }

    /// Makes every other page, beginning with the second, the same, and has KSM merge them (anonymous base pages that
    /// are not pinned, and that no vCPU has touched yet). A vCPU that writes to one gets a page of its own again.
    pub fn merge_alternate(&mut self, limit: Duration) -> Result<()> {
        self.merged = true;
        self.fill();
        // SAFETY: advice about our own mapping; what is merged keeps its contents.
        if unsafe { libc::madvise(self.base.cast(), self.len, libc::MADV_MERGEABLE) } != 0 {
            return Err(io::Error::last_os_error())
                .context("madvise(MADV_MERGEABLE): is CONFIG_KSM set?");
        }
        ksm::merge(self.pages() as u64 / 2, limit)
    }

    /// Whether base page `page` is merged.
    pub fn is_merged(&self, page: usize) -> bool {
        self.merged && page % 2 == 1
    }

    /// The addresses of the merged pages in this process, ascending.
    pub fn merged_addresses(&self) -> Vec<Range<u64>> {
        let merged = (0..self.pages()).filter(|page| self.is_merged(*page));
        merged
            .map(|page| {
                let start = (self.base as usize + page * PAGE) as u64;
                start..start + PAGE as u64
            })
            .collect()
    }

    /// Counts up the word of vCPU `vcpu` in base page `page`, as that vCPU does.
    pub fn count(&self, page: usize, vcpu: usize) {
        assert!(page < self.pages() && vcpu < TAG / 4, "no such word");
        // SAFETY: inside the mapping and aligned; whoever changes it while others may does so by an atomic instruction.
        let word =
            unsafe { AtomicU32::from_ptr(self.base.add(page * PAGE).cast::<u32>().add(vcpu)) };
        word.fetch_add(1, Ordering::Relaxed);
    }

    /// Reads a word of every base page, as this thread.
    pub fn read_all(&self) {
        for page in 0..self.pages() {
            // SAFETY: inside the mapping and aligned.
            unsafe { self.base.add(page * PAGE).cast::<u32>().read_volatile() };
        }
    }

    /// The node of each base page.
    pub fn nodes(&self) -> Result<Vec<i32>> {
        self.move_pages(0..self.pages(), None)
    }

    /// Moves every unpinned page to `node`, as far as the kernel can.
    pub fn move_to(&self, node: usize) -> Result<()> {
        let unpinned = (0..self.pages()).filter(|page| !self.is_pinned(*page));
        self.move_pages(unpinned, Some(node as libc::c_int))
            .map(drop)
    }

    /// Asks where pages are, or moves them to `node`. Gives the node of each, or its negative errno.
    fn move_pages(
        &self,
        pages: impl Iterator<Item = usize>,
        node: Option<libc::c_int>,
    ) -> Result<Vec<libc::c_int>> {
        let pages: Vec<*mut u8> = pages
            .map(|page| self.base.wrapping_add(page * PAGE))
            .collect();
        let targets = node.map(|node| vec![node; pages.len()]);
        let mut status = vec![-libc::ENOENT; pages.len()];
        // SAFETY: the arrays have as many elements as said; pages keep their contents when they move.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                0,
                pages.len(),
                pages.as_ptr(),
                targets.as_ref().map_or(ptr::null(), |nodes| nodes.as_ptr()),
                status.as_mut_ptr(),
                MPOL_MF_MOVE,
            )
        };
        // A positive number counts pages that could not be moved.
        if rc < 0 {
            return Err(io::Error::last_os_error())
                .context("move_pages(): is CONFIG_NUMA_MIGRATION set?");
        }
        Ok(status)
    }

    /// Compares all contents with what they must be: `expected[vcpu][page]` counted by each vCPU, and every tag.
    /// Says how many words differ, and where the first one is. No vCPU may run.
    pub fn verify(&self, expected: &[Vec<u32>]) -> Result<(), String> {
        let mut wrong = 0usize;
        let mut first = None;
        for page in 0..self.pages() {
            let at = self.base.wrapping_add(page * PAGE);
            for (vcpu, counts) in expected.iter().enumerate() {
                // SAFETY: inside the mapping and aligned.
                let word = u32::from_le(unsafe { at.cast::<u32>().add(vcpu).read_volatile() });
                if word != counts[page] {
                    wrong += 1;
                    first.get_or_insert_with(|| {
                        format!(
                            "page {page}: vCPU {vcpu} counted {word} of {}",
                            counts[page]
                        )
                    });
                }
            }
            for offset in (TAG..PAGE).step_by(LINE) {
                // SAFETY: inside the mapping and aligned.
                let tag = unsafe { at.add(offset).cast::<u64>().read_volatile() };
                if tag != self.tag(page * PAGE + offset) {
                    wrong += 1;
                    first.get_or_insert_with(|| {
                        format!("page {page}: tag {tag:#x} at offset {offset}")
                    });
                }
            }
        }
        match first {
            None => Ok(()),
            Some(first) => Err(format!("{wrong} words differ, the first in {first}")),
        }
    }

    /// Writes to it, at `offset`. Not where a vCPU counts, or a tag is.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len, "beyond guest memory");
        for (at, byte) in (offset..).zip(bytes) {
            // SAFETY: inside the mapping.
            unsafe { self.base.add(at).write_volatile(*byte) };
        }
    }

    /// Reads `length` bytes at `offset`.
    pub fn read(&self, offset: usize, length: usize) -> Vec<u8> {
        assert!(offset + length <= self.len, "beyond guest memory");
        let bytes = offset..offset + length;
        // SAFETY: inside the mapping.
        bytes
            .map(|at| unsafe { self.base.add(at).read_volatile() })
            .collect()
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }

    fn stripe(&self) -> usize {
        match (self.backing, self.pinned) {
            (Backing::Thp, _) => HUGE_PAGE,
            (_, Pinned::Stripes) => 64 << 10,
            _ => 1 << 20,
        }
    }

    /// Not zero, and different for each address that is not merged (SplitMix64's finaliser is a bijection).
    fn tag(&self, address: usize) -> u64 {
        let address = match self.is_merged(address / PAGE) {
            // Unlike any other page.
            true => self.len + address % PAGE,
            false => address,
        };
        let mut z = (address as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn fill(&self) {
        for address in (TAG..self.len).step_by(LINE) {
            // SAFETY: inside the mapping and aligned; nobody else uses it yet.
            unsafe {
                self.base
                    .add(address)
                    .cast::<u64>()
                    .write_volatile(self.tag(address));
            }
        }
    }

    /// Has every page allocated, which is new and stays zero.
    fn touch(&self) {
        for page in 0..self.pages() {
            // SAFETY: inside the mapping; nobody else uses it yet.
            unsafe { self.base.add(page * PAGE).write_volatile(0) };
        }
    }

    /// Has the pinned parts pinned.
    fn pin(&mut self, holder: Holder) -> Result<()> {
        let parts = self.pinned_addresses();
        if !parts.is_empty() {
            self.pins = Some(Pins::new(holder, self.addresses(), parts)?);
        }
        Ok(())
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        self.pins = None;
        // SAFETY: our own mapping, and every user of it borrows or shares `self`.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// Maps `len` bytes at a multiple of the huge page size.
fn map_aligned(backing: Backing, len: usize) -> Result<*mut u8> {
    let failed = |what: &str| {
        let error = io::Error::last_os_error();
        Err(error).with_context(|| format!("{what} {len} bytes of guest memory"))
    };
    // SAFETY: address space that is new, of which the part at the aligned address is mapped over and the rest unmapped.
    unsafe {
        let room = len + HUGE_PAGE;
        let reserved = libc::mmap(
            ptr::null_mut(),
            room,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        );
        if reserved == libc::MAP_FAILED {
            return failed("reserve");
        }
        let before = reserved.align_offset(HUGE_PAGE);
        let base = reserved.add(before);
        libc::munmap(reserved, before);
        libc::munmap(base.add(len), room - before - len);

        let fixed = libc::MAP_FIXED;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let mapped = match backing {
            Backing::Anon | Backing::Thp => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed;
                libc::mmap(base, len, access, flags, -1, 0)
            }
            Backing::Memfd => {
                let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
                if fd < 0 {
                    return failed("memfd_create() for");
                }
                if libc::ftruncate(fd, len as libc::off_t) != 0 {
                    return failed("ftruncate() to");
                }
                let mapped = libc::mmap(base, len, access, libc::MAP_SHARED | fixed, fd, 0);
                libc::close(fd);
                mapped
            }
        };
        if mapped == libc::MAP_FAILED {
            return failed("map");
        }
        Ok(base.cast())
    }
}
