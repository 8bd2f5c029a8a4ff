// SPDX-License-Identifier: GPL-2.0
//! A virtual machine whose vCPUs sweep guest memory, each in a thread of its own; uses `/dev/kvm`.
//!
//! The guest runs in 32-bit protected mode with flat segments and without paging, so that guest addresses are physical
//! ones. Its whole program is
//!
//! ```text
//! f0 ff 07    next: lock inc dword [edi]   ; count this page: a locked instruction asks for write access at once
//! 01 f7             add edi, esi           ; on to the next page
//! 89 0b             mov [ebx], ecx         ; how many are left, for the host to see
//! e2 f7             loop next              ; until ecx pages are done
//! f4                hlt                    ; leaves KVM_RUN: the pass is complete
//! 8b 07       read: mov eax, [edi]         ; the same, without asking for write access
//! 01 f7             add edi, esi
//! e2 fa             loop read
//! f4                hlt
//! 83 3f 00    spin: cmp dword [edi], 0     ; stay in the guest until the host sets the last word behind the program
//! 74 fb             je spin
//! f4                hlt
//! ```
//!
//! and [`Sweep`] says what is in its registers. It lies in a page of its own behind guest memory, which no scan reaches. The
//! words that it and the host write lie in the page after that: a processor, and an emulated one more, has to look after each
//! store into a page of code. Nothing in it raises an exception; for one that comes all the same there are handlers, which halt,
//! so that it can be told which it was.

use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, ensure, Context, Result};
use kvm_bindings::{
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_create_guest_memfd, kvm_dtable,
    kvm_enable_cap, kvm_msr_entry, kvm_regs, kvm_segment, kvm_userspace_memory_region,
    kvm_userspace_memory_region2, Msrs, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_EXIT_INTERNAL_ERROR,
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::memory::GuestMemory;
use crate::stats::Stats;
use crate::{balancing, PAGE};

const HLT: u8 = 0xf4;
const PROGRAM: [u8; 23] = [
    0xf0, 0xff, 0x07, 0x01, 0xf7, 0x89, 0x0b, 0xe2, 0xf7, 0xf4, //
    0x8b, 0x07, 0x01, 0xf7, 0xe2, 0xfa, 0xf4, //
    0x83, 0x3f, 0x00, 0x74, 0xfb, 0xf4,
];
/// Offsets of its entries `next`, `read` and `spin`.
const NEXT: u64 = 0;
const READ: u64 = 10;
const SPIN: u64 = 17;
/// Offsets of the handlers of exceptions, a `hlt` for each, of their gates, and of the descriptors of segments.
const HANDLERS: usize = 0x100;
const GATES: usize = 0x200;
const SEGMENTS: usize = 0x400;
/// How many exceptions there are.
const EXCEPTIONS: usize = 32;
/// Flat segments for [`CODE`] and [`DATA`], the selectors.
const DESCRIPTORS: [u64; 3] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const CODE: u16 = 0x8;
const DATA: u16 = 0x10;
/// Offset of the words in which vCPUs say how many pages of their pass are left, from vCPU 0 on.
const LEFT: usize = PAGE;
/// Offset of the stacks, which only exceptions use, from vCPU 0 on, and of how many words each is.
const STACKS: usize = PAGE + PAGE / 2;
const STACK_WORDS: usize = 8;
/// Offset of the word that ends `spin`.
const STOP: usize = PROGRAM_SIZE - 4;
/// The program's page, and that of its words.
const PROGRAM_SIZE: usize = 2 * PAGE;
/// Where KVM may put three pages of its own on Intel processors, far above guest memory.
pub(crate) const TSS_ADDRESS: usize = 0xfffb_d000;
/// The memory slots of guest memory and of the program, and the first that is free.
const MEMORY_SLOT: u32 = 0;
const PROGRAM_SLOT: u32 = 1;
const FIRST_ALIAS: u32 = 2;
/// `_IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log)` of `linux/kvm.h`, which kvm-ioctls has not.
const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = 0xc018_aec0;
/// The longest that memory may be out of a vCPU's reach under [`Faults::Retried`].
const REFUSAL: Duration = Duration::from_secs(30);

/// Of `linux/kvm.h`: user space may map it, and need not share it with the guest explicitly.
const GUEST_MEMFD_FLAG_MMAP: u64 = 1 << 0;
const GUEST_MEMFD_FLAG_INIT_SHARED: u64 = 1 << 1;
/// Of `linux/kvm.h` with the series `numa-page-tables`.
const KVM_CAP_X86_NUMA_PAGE_TABLES: u32 = 252;
/// Of `asm/kvm_para.h`: where KVM keeps the vCPU's clock, and the bit that says that it shall.
const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
const KVM_MSR_ENABLED: u64 = 1;

/// Whether KVM uses nested paging. Else it maps up to eight pages with one fault, those around it that can be looked up
/// at once (`direct_pte_prefetch()`).
pub fn nested_paging() -> bool {
    ["kvm_amd/parameters/npt", "kvm_intel/parameters/ept"]
        .into_iter()
        .filter_map(|path| std::fs::read_to_string(format!("/sys/module/{path}")).ok())
        .all(|value| value.trim() == "Y")
}

/// What a vCPU does when `KVM_RUN` fails because the memory at a guest address is not there, or read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faults {
    /// It gives up: nobody takes guest memory away.
    Fatal,
    /// It tries again: somebody does, and puts it back soon. See [`Vm::refused`].
    Retried,
}

/// How KVM's dirty log is cleared (Documentation/virt/kvm/api.rst, `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clearing {
    /// By reading it.
    Read,
    /// By `KVM_CLEAR_DIRTY_LOG`.
    Manual,
    /// The same, and all of it is set in the beginning.
    ManualInitiallySet,
}

impl Clearing {
    /// All of them.
    pub const ALL: [Clearing; 3] = [
        Clearing::Read,
        Clearing::Manual,
        Clearing::ManualInitiallySet,
    ];

    fn argument(self) -> u64 {
        let manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
        match self {
            Clearing::Read => 0,
            Clearing::Manual => manual.into(),
            Clearing::ManualInitiallySet => (manual | KVM_DIRTY_LOG_INITIALLY_SET).into(),
        }
    }
}

/// The pages that one pass touches: `count` of them, from page `first`, `stride` pages apart (down if negative).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sweep {
    /// The first page, counted in base pages from the start of guest memory.
    pub first: usize,
    /// From one page to the next, in base pages.
    pub stride: isize,
    /// How many pages.
    pub count: usize,
}

impl Sweep {
    /// All `count` pages of guest memory.
    pub fn all(count: usize) -> Sweep {
        Sweep {
            first: 0,
            stride: 1,
            count,
        }
    }

    /// The pages, in order.
    pub fn pages(self) -> impl Iterator<Item = usize> {
        (0..self.count as isize).map(move |i| (self.first as isize + i * self.stride) as usize)
    }

    /// The same pages in the opposite order.
    pub fn reversed(self) -> Sweep {
        Sweep {
            first: (self.first as isize + (self.count as isize - 1) * self.stride) as usize,
            stride: -self.stride,
            count: self.count,
        }
    }
}

enum Command {
    /// Sweep once.
    Pass(Sweep),
    /// Sweep once without writing.
    Read(Sweep),
    /// Sweep again and again until told to stop.
    Run(Sweep, Arc<AtomicBool>),
    /// Use CPU time in user mode until told to stop.
    Spin(Arc<AtomicBool>),
    /// Use CPU time in the guest until told to stop.
    SpinInside,
    /// Keep the clock at this guest address.
    KeepClock(u64),
    /// Run on this CPU from now on.
    MoveTo(usize),
}

struct VcpuThread {
    commands: Sender<Command>,
    /// Passes made, for each command done.
    replies: Mutex<Receiver<Result<u64>>>,
    stats: Stats,
    thread: JoinHandle<()>,
}

/// A virtual machine and its vCPU threads.
pub struct Vm {
    vcpus: Vec<VcpuThread>,
    stats: Stats,
    program: Arc<Program>,
    refused: Arc<AtomicU64>,
    memory: Arc<GuestMemory>,
    /// Held while the dirty log is on.
    logging: Mutex<()>,
    vm: VmFd,
}

/// A machine without anything. Asks again where the kernel, which takes many locks for it, was interrupted.
pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => continue,
            made => return made.context("KVM_CREATE_VM"),
        }
    }
}

/// Whether this KVM has `KVM_CAP_X86_NUMA_PAGE_TABLES` (Documentation/virt/kvm/api.rst of the series `numa-page-tables`).
pub fn has_numa_page_tables() -> Result<bool> {
    let kvm = Kvm::new().context("/dev/kvm")?;
    Ok(kvm.check_extension_raw(KVM_CAP_X86_NUMA_PAGE_TABLES.into()) > 0)
}

/// What comes of asking a machine for it, given this argument, and with a vCPU or without: the error's number.
pub fn ask_for_numa_page_tables(
    argument: u64,
    vcpu: bool,
    times: usize,
) -> Result<Vec<Option<i32>>> {
    let kvm = Kvm::new().context("/dev/kvm")?;
    let vm = create_vm(&kvm)?;
    let _vcpu = vcpu.then(|| create_vcpu(&vm, 0)).transpose()?;
    let ask = |_| {
        enable_numa_page_tables(&vm, argument)
            .err()
            .map(|error| error.errno())
    };
    Ok((0..times).map(ask).collect())
}

fn enable_numa_page_tables(vm: &VmFd, argument: u64) -> Result<(), kvm_ioctls::Error> {
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_X86_NUMA_PAGE_TABLES,
        args: [argument, 0, 0, 0],
        ..Default::default()
    })
}

impl Vm {
    /// Makes a VM of `memory` with one vCPU for each of `cpus`, whose thread runs on that CPU only.
    pub fn new(memory: &Arc<GuestMemory>, cpus: &[usize]) -> Result<Vm> {
        Vm::with(memory, cpus, Faults::Fatal)
    }

    /// The same, and says what the vCPUs do where memory is missing.
    pub fn with(memory: &Arc<GuestMemory>, cpus: &[usize], faults: Faults) -> Result<Vm> {
        Vm::prepared(memory, cpus, faults, |_| Ok(()))
    }

    /// Makes a VM whose page tables are wanted on the node of the memory that they map.
    pub fn with_numa_page_tables(memory: &Arc<GuestMemory>, cpus: &[usize]) -> Result<Vm> {
        Vm::prepared(memory, cpus, Faults::Fatal, |vm| {
            enable_numa_page_tables(vm, 0).context("KVM_CAP_X86_NUMA_PAGE_TABLES")
        })
    }

    fn prepared(
        memory: &Arc<GuestMemory>,
        cpus: &[usize],
        faults: Faults,
        prepare: impl FnOnce(&VmFd) -> Result<()>,
    ) -> Result<Vm> {
        if memory.size() > TSS_ADDRESS / 2 {
            bail!("{} bytes of guest memory: at most 2046 MiB", memory.size());
        }
        let most = (STOP - STACKS) / (4 * STACK_WORDS);
        ensure!(cpus.len() <= most, "{} vCPUs: at most {most}", cpus.len());
        let kvm = Kvm::new().context("/dev/kvm: is CONFIG_KVM set, for this processor?")?;
        let vm = create_vm(&kvm)?;
        prepare(&vm)?;
        vm.set_tss_address(TSS_ADDRESS)
            .context("KVM_SET_TSS_ADDR")?;
        let program_address = memory.size() as u64;
        let program = Arc::new(Program::new(program_address)?);
        for (slot, base, len, guest_phys_addr) in [
            (MEMORY_SLOT, memory.base(), memory.size(), 0),
            (PROGRAM_SLOT, program.0, PROGRAM_SIZE, program_address),
        ] {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr,
                memory_size: len as u64,
                userspace_addr: base as u64,
            };
            // SAFETY: both mappings are kept by every vCPU thread, and so outlive the last use of the VM.
            unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
        }
        let stats = Stats::open(&vm)?;
        let refused = Arc::new(AtomicU64::new(0));
        let vcpus = cpus
            .iter()
            .enumerate()
            .map(|(id, cpu)| {
                let vcpu = create_vcpu(&vm, id)?;
                set_handlers(&vcpu, program_address)?;
                let stats = Stats::open(&Fd(&vcpu))?;
                let (commands, inbox) = channel();
                let (outbox, replies) = channel();
                let (cpu, keep) = (*cpu, memory.clone());
                let guest = Vcpu {
                    vcpu,
                    id,
                    program: program.clone(),
                    program_address,
                    faults,
                    refused: refused.clone(),
                };
                let thread = std::thread::Builder::new()
                    .name(format!("vcpu{id}"))
                    .spawn(move || {
                        serve(guest, cpu, &inbox, &outbox);
                        drop(keep);
                    })
                    .context("start a vCPU thread")?;
                Ok(VcpuThread {
                    commands,
                    replies: Mutex::new(replies),
                    stats,
                    thread,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Vm {
            vcpus,
            stats,
            program,
            refused,
            memory: memory.clone(),
            logging: Mutex::new(()),
            vm,
        })
    }

    /// How often `KVM_RUN` failed and was tried again, see [`Faults::Retried`].
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Makes the base pages `pages` of guest memory appear at base page `at` of guest addresses too, in a memory slot of
    /// their own: slot `alias` (counted from 0) is created, or moved there if the same pages were put elsewhere before.
    pub fn put_alias(&self, alias: u32, pages: &Range<usize>, at: usize) -> Result<()> {
        if pages.is_empty() || pages.end > self.memory.pages() {
            bail!("no pages {pages:?} in guest memory");
        }
        self.set_alias(alias, pages, at)
    }

    /// Deletes the memory slot of such an alias. No vCPU may use it any more.
    pub fn remove_alias(&self, alias: u32) -> Result<()> {
        self.set_alias(alias, &(0..0), 0)
    }

    /// Makes the first `pages` pages of `file` appear at base page `at` of guest addresses, in the memory slot of alias
    /// `alias`, by way of a mapping in this process, which has to be kept as long as vCPUs use it.
    pub fn put_file(
        &self,
        alias: u32,
        file: &OwnedFd,
        pages: usize,
        at: usize,
    ) -> Result<FileMapping> {
        let mapping = FileMapping::map(file, pages * PAGE)?;
        let region = kvm_userspace_memory_region {
            slot: FIRST_ALIAS + alias,
            flags: 0,
            guest_phys_addr: (at * PAGE) as u64,
            memory_size: (pages * PAGE) as u64,
            userspace_addr: mapping.addresses().start,
        };
        // SAFETY: KVM follows what becomes of the mapping, and finds no memory there when it is gone.
        unsafe { self.vm.set_user_memory_region(region) }
            .with_context(|| format!("KVM_SET_USER_MEMORY_REGION of a file at page {at:#x}"))?;
        Ok(mapping)
    }

    fn set_alias(&self, alias: u32, pages: &Range<usize>, at: usize) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot: FIRST_ALIAS + alias,
            flags: 0,
            guest_phys_addr: (at * PAGE) as u64,
            memory_size: (pages.len() * PAGE) as u64,
            userspace_addr: self.memory.addresses().start + (pages.start * PAGE) as u64,
        };
        // SAFETY: the pages are guest memory's, which this VM and its vCPU threads keep.
        unsafe { self.vm.set_user_memory_region(region) }
            .with_context(|| format!("KVM_SET_USER_MEMORY_REGION of alias {alias} at page {at:#x}"))
    }

    /// Makes `pages` pages of a new guest_memfd appear at base page `at` of guest addresses, in the memory slot of alias
    /// `alias`. KVM maps them as pages of that file, not through their address in this process.
    pub fn put_guest_memfd(&self, alias: u32, pages: usize, at: usize) -> Result<FileMapping> {
        let len = pages * PAGE;
        let fd = self
            .vm
            .create_guest_memfd(kvm_create_guest_memfd {
                size: len as u64,
                flags: GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED,
                ..Default::default()
            })
            .context("KVM_CREATE_GUEST_MEMFD: needs CONFIG_KVM_GUEST_MEMFD, Linux 6.18 or later")?;
        // SAFETY: the descriptor was just made for us and nobody else owns it.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        let memfd = FileMapping::map(&file, len)?;
        let region = kvm_userspace_memory_region2 {
            slot: FIRST_ALIAS + alias,
            flags: KVM_MEM_GUEST_MEMFD,
            guest_phys_addr: (at * PAGE) as u64,
            memory_size: len as u64,
            userspace_addr: memfd.addresses().start,
            guest_memfd: fd as u32,
            ..Default::default()
        };
        // SAFETY: KVM holds the file, and does not need the mapping.
        unsafe { self.vm.set_user_memory_region2(region) }
            .context("KVM_SET_USER_MEMORY_REGION2 with KVM_MEM_GUEST_MEMFD")?;
        Ok(memfd)
    }

    /// Lets KVM keep the paravirtual clock of `vcpu` in the 32 bytes at guest address `address`, inside of one page
    /// (Documentation/virt/kvm/x86/msr.rst).
    pub fn keep_clock(&self, vcpu: usize, address: u64) -> Result<()> {
        self.send(vcpu, Command::KeepClock(address))?;
        self.reply(vcpu).map(drop)
    }

    /// Lets vCPU threads run on `cpus` from now on, one for each.
    pub fn move_vcpus(&self, cpus: &[usize]) -> Result<()> {
        for (vcpu, cpu) in cpus.iter().enumerate() {
            self.send(vcpu, Command::MoveTo(*cpu))?;
            self.reply(vcpu)?;
        }
        Ok(())
    }

    /// Has KVM write each such clock before its vCPU enters the guest again.
    pub fn update_clocks(&self) -> Result<()> {
        let now = self.vm.get_clock().context("KVM_GET_CLOCK")?;
        self.vm.set_clock(&now).context("KVM_SET_CLOCK")
    }

    /// Runs `body` with the dirty log of guest memory on; who else wants to waits until it is off again.
    pub fn while_logging<T>(
        &self,
        clearing: Clearing,
        body: impl FnOnce(&DirtyLog) -> Result<T>,
    ) -> Result<T> {
        let _alone = self.logging.lock().unwrap_or_else(PoisonError::into_inner);
        let cap = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            args: [clearing.argument(), 0, 0, 0],
            ..Default::default()
        };
        self.vm
            .enable_cap(&cap)
            .with_context(|| format!("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 for {clearing:?}"))?;
        self.log_memory(true)?;
        let result = body(&DirtyLog { vm: self, clearing });
        let off = self.log_memory(false);
        result.and_then(|value| off.map(|()| value))
    }

    fn log_memory(&self, on: bool) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot: MEMORY_SLOT,
            flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: 0,
            memory_size: self.memory.size() as u64,
            userspace_addr: self.memory.addresses().start,
        };
        // SAFETY: the memory slot as it was made, but for its flags.
        unsafe { self.vm.set_user_memory_region(region) }
            .with_context(|| format!("KVM_MEM_LOG_DIRTY_PAGES to be {on}"))
    }

    /// How far the vCPUs are, for a thread of its own to look at.
    pub fn progress(&self) -> Progress {
        Progress {
            program: self.program.clone(),
            vcpus: self.vcpus.len(),
            touched: AtomicU64::new(0),
        }
    }

    /// How many vCPUs it has.
    pub fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// A statistic of the VM.
    pub fn stat(&self, name: &str) -> Result<u64> {
        self.stats.read(name)
    }

    /// Faults of the vCPUs that led to nothing, and so were taken again.
    pub fn retries(&self) -> Result<u64> {
        let ended = ["pf_fixed", "pf_emulate", "pf_spurious"].map(|name| self.vcpu_stat(name));
        let ended: u64 = ended.into_iter().sum::<Result<u64>>()?;
        Ok(self.vcpu_stat("pf_taken")?.saturating_sub(ended))
    }

    /// A statistic of the vCPUs, summed.
    pub fn vcpu_stat(&self, name: &str) -> Result<u64> {
        self.vcpus.iter().map(|vcpu| vcpu.stats.read(name)).sum()
    }

    /// Lets `vcpu` make one pass, and waits for it.
    pub fn pass(&self, vcpu: usize, sweep: Sweep) -> Result<()> {
        self.send(vcpu, Command::Pass(sweep))?;
        self.reply(vcpu).map(drop)
    }

    /// Lets `vcpu` make one pass while `body` runs, which is not waited for: it is complete in the end, and may be before.
    pub fn while_passing<T>(
        &self,
        vcpu: usize,
        sweep: Sweep,
        body: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        self.send(vcpu, Command::Pass(sweep))?;
        let result = body();
        self.reply(vcpu)?;
        result
    }

    /// The same, but the pages are read only: not counted, and mapped as far as reading needs it.
    pub fn read_pass(&self, vcpu: usize, sweep: Sweep) -> Result<()> {
        self.send(vcpu, Command::Read(sweep))?;
        self.reply(vcpu).map(drop)
    }

    /// Lets every vCPU spin in the guest, away from guest memory, while `body` runs.
    pub fn while_spinning_inside<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        self.program.stop().store(0, Ordering::Relaxed);
        for vcpu in 0..self.vcpus.len() {
            self.send(vcpu, Command::SpinInside)?;
        }
        let result = body();
        self.program.stop().store(1, Ordering::Relaxed);
        let stopped: Result<Vec<u64>> =
            (0..self.vcpus.len()).map(|vcpu| self.reply(vcpu)).collect();
        stopped.and(result)
    }

    /// Lets every vCPU thread use CPU time in user mode, outside the guest, while `body` runs.
    pub fn while_spinning<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        let (result, _) = self.during(self.vcpus(), |_, stop| Command::Spin(stop), body)?;
        Ok(result)
    }

    /// Lets vCPUs sweep again and again while `body` runs, as many, from the first, as `sweeps` has sweeps. Also gives the
    /// number of complete passes that each has made.
    pub fn while_running<T>(
        &self,
        sweeps: &[Sweep],
        body: impl FnOnce() -> Result<T>,
    ) -> Result<(T, Vec<u64>)> {
        let command = |vcpu: usize, stop| Command::Run(sweeps[vcpu], stop);
        self.during(sweeps.len(), command, body)
    }

    fn during<T>(
        &self,
        vcpus: usize,
        command: impl Fn(usize, Arc<AtomicBool>) -> Command,
        body: impl FnOnce() -> Result<T>,
    ) -> Result<(T, Vec<u64>)> {
        let stop = Arc::new(AtomicBool::new(false));
        for vcpu in 0..vcpus {
            self.send(vcpu, command(vcpu, stop.clone()))?;
        }
        let result = body();
        stop.store(true, Ordering::Relaxed);
        let passes: Result<Vec<u64>> = (0..vcpus).map(|vcpu| self.reply(vcpu)).collect();
        Ok((result?, passes?))
    }

    fn send(&self, vcpu: usize, command: Command) -> Result<()> {
        self.vcpus[vcpu]
            .commands
            .send(command)
            .map_err(|_| anyhow!("the thread of vCPU {vcpu} has ended"))
    }

    fn reply(&self, vcpu: usize) -> Result<u64> {
        self.vcpus[vcpu]
            .replies
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .recv()
            .with_context(|| format!("the thread of vCPU {vcpu} has ended"))?
            .with_context(|| format!("vCPU {vcpu}"))
    }
}

/// The dirty log of guest memory while it is on, see [`Vm::while_logging`].
pub struct DirtyLog<'a> {
    vm: &'a Vm,
    clearing: Clearing,
}

impl DirtyLog<'_> {
    /// For each base page whether the log says that a vCPU wrote to it since the last call.
    pub fn take(&self) -> Result<Vec<bool>> {
        let memory = &self.vm.memory;
        let mut bits = self
            .vm
            .vm
            .get_dirty_log(MEMORY_SLOT, memory.size())
            .context("KVM_GET_DIRTY_LOG")?;
        if self.clearing != Clearing::Read {
            let log = kvm_clear_dirty_log {
                slot: MEMORY_SLOT,
                num_pages: memory.pages() as u32,
                first_page: 0,
                __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                    dirty_bitmap: bits.as_mut_ptr().cast(),
                },
            };
            // SAFETY: the kernel reads a bit for each page of guest memory, as many as it has just given.
            let rc = unsafe { libc::ioctl(self.vm.vm.as_raw_fd(), KVM_CLEAR_DIRTY_LOG as _, &log) };
            if rc != 0 {
                return Err(std::io::Error::last_os_error()).context("KVM_CLEAR_DIRTY_LOG");
            }
        }
        let is_dirty = |page: usize| bits[page / 64] & (1 << (page % 64)) != 0;
        Ok((0..memory.pages()).map(is_dirty).collect())
    }
}

/// Memory of a file, a guest_memfd for example, as this process maps it.
pub struct FileMapping {
    base: *mut libc::c_void,
    len: usize,
}

impl FileMapping {
    fn map(file: &OwnedFd, len: usize) -> Result<FileMapping> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                access,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error()).context("map a file for the guest");
        }
        Ok(FileMapping { base, len })
    }

    /// The addresses it takes in this process.
    pub fn addresses(&self) -> Range<u64> {
        let start = self.base as u64;
        start..start + self.len as u64
    }

    /// The first word of each page, which vCPU 0 counts up.
    pub fn words(&self) -> impl Iterator<Item = &AtomicU32> {
        // SAFETY: inside the mapping and aligned; neither host nor guest uses it but as an atomic word.
        (0..self.len)
            .step_by(PAGE)
            .map(|offset| unsafe { AtomicU32::from_ptr(self.base.add(offset).cast()) })
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and every user of it borrows `self`.
        unsafe { libc::munmap(self.base, self.len) };
    }
}

/// What was seen of vCPUs that sweep.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// How long they were watched.
    pub time: Duration,
    /// How many pages they touched, all together.
    pub touched: u64,
    /// The longest that one of them took to its next page, to about a millisecond.
    pub longest_stall: Duration,
}

/// How far each vCPU is with its pass.
pub struct Progress {
    program: Arc<Program>,
    vcpus: usize,
    touched: AtomicU64,
}

impl Progress {
    /// How many pages they have touched while they were watched, all together.
    pub fn touched(&self) -> u64 {
        self.touched.load(Ordering::Relaxed)
    }

    /// Watches the vCPUs, which sweep `count` pages again and again, until `stop` is set.
    pub fn watch(&self, count: usize, stop: &AtomicBool) -> Seen {
        let left = |vcpu| self.program.left(vcpu).load(Ordering::Relaxed);
        let begun = Instant::now();
        let mut last: Vec<(u32, Instant)> =
            (0..self.vcpus).map(|vcpu| (left(vcpu), begun)).collect();
        let mut seen = Seen::default();
        while !stop.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
            for (vcpu, (before, since)) in last.iter_mut().enumerate() {
                let (now, time) = (left(vcpu), Instant::now());
                seen.longest_stall = seen.longest_stall.max(time - *since);
                if now != *before {
                    // More are left than before: the next pass has begun.
                    let pages = before.checked_sub(now);
                    let pages = u64::from(pages.unwrap_or(*before + count as u32 - now));
                    self.touched.fetch_add(pages, Ordering::Relaxed);
                    (*before, *since) = (now, time);
                }
            }
        }
        seen.time = begun.elapsed();
        seen.touched = self.touched();
        seen
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        for vcpu in self.vcpus.drain(..) {
            drop(vcpu.commands);
            let _ = vcpu.thread.join();
        }
    }
}

/// The pages that hold the guest's program and its words.
struct Program(*mut u8);

// SAFETY: the pages belong to no thread, and nobody writes to them after they were made but to atomic words.
unsafe impl Send for Program {}
// SAFETY: as above.
unsafe impl Sync for Program {}

impl Program {
    /// For a guest in which it is at `address`.
    fn new(address: u64) -> Result<Program> {
        let gate = |exception| {
            let handler = address + (HANDLERS + exception) as u64;
            let (low, high) = (handler & 0xffff, handler >> 16);
            // A 32-bit interrupt gate.
            low | (u64::from(CODE) << 16) | (0x8e00 << 32) | (high << 48)
        };
        let mut page = [0; PAGE];
        page[..PROGRAM.len()].copy_from_slice(&PROGRAM);
        page[HANDLERS..][..EXCEPTIONS].fill(HLT);
        let mut put = |offset: usize, entry: u64| {
            page[offset..][..8].copy_from_slice(&entry.to_le_bytes());
        };
        (0..EXCEPTIONS).for_each(|exception| put(GATES + 8 * exception, gate(exception)));
        (0..)
            .zip(DESCRIPTORS)
            .for_each(|(number, descriptor)| put(SEGMENTS + 8 * number, descriptor));
        // SAFETY: a new mapping, into which the program fits.
        unsafe {
            let pages = libc::mmap(
                ptr::null_mut(),
                PROGRAM_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            if pages == libc::MAP_FAILED {
                return Err(std::io::Error::last_os_error()).context("map the guest's program");
            }
            ptr::copy_nonoverlapping(page.as_ptr(), pages.cast(), PAGE);
            Ok(Program(pages.cast()))
        }
    }

    /// The word that ends `spin`.
    fn stop(&self) -> &AtomicU32 {
        self.word(STOP)
    }

    /// The word in which vCPU `vcpu` says how many pages are left.
    fn left(&self, vcpu: usize) -> &AtomicU32 {
        self.word(LEFT + 4 * vcpu)
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset <= STOP);
        // SAFETY: inside the pages and aligned; neither host nor guest uses it but as an atomic word.
        unsafe { AtomicU32::from_ptr(self.0.add(offset).cast()) }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: our own pages, and no vCPU is left.
        unsafe { libc::munmap(self.0.cast(), PROGRAM_SIZE) };
    }
}

/// A new vCPU in 32-bit protected mode, flat, without paging.
pub(crate) fn create_vcpu(vm: &VmFd, id: usize) -> Result<VcpuFd> {
    let vcpu = vm.create_vcpu(id as u64).context("KVM_CREATE_VCPU")?;
    let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    let data = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: DATA,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: CODE,
        type_: 11,
        ..data
    };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    Ok(vcpu)
}

/// Tells the vCPU where the handlers of exceptions are.
fn set_handlers(vcpu: &VcpuFd, program_address: u64) -> Result<()> {
    let table = |offset: usize, entries: usize| kvm_dtable {
        base: program_address + offset as u64,
        limit: (8 * entries - 1) as u16,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    sregs.idt = table(GATES, EXCEPTIONS);
    sregs.gdt = table(SEGMENTS, DESCRIPTORS.len());
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")
}

/// A vCPU as its thread knows it.
struct Vcpu {
    vcpu: VcpuFd,
    id: usize,
    program: Arc<Program>,
    program_address: u64,
    faults: Faults,
    refused: Arc<AtomicU64>,
}

/// The life of a vCPU thread: does what it is told until there is nobody to tell it.
fn serve(mut guest: Vcpu, cpu: usize, inbox: &Receiver<Command>, outbox: &Sender<Result<u64>>) {
    let placed = balancing::set_affinity(&[cpu]);
    for command in inbox {
        let done = match (&placed, command) {
            (Err(error), _) => Err(anyhow!("{error:#}")),
            (Ok(()), Command::Pass(sweep)) => guest.sweep(NEXT, sweep).map(|()| 1),
            (Ok(()), Command::Read(sweep)) => guest.sweep(READ, sweep).map(|()| 1),
            (Ok(()), Command::SpinInside) => {
                let rdi = guest.program_address + STOP as u64;
                let regs = kvm_regs {
                    rdi,
                    ..Default::default()
                };
                guest.run_to_halt(SPIN, regs).map(|()| 0)
            }
            (Ok(()), Command::KeepClock(address)) => guest.keep_clock(address).map(|()| 0),
            (Ok(()), Command::MoveTo(cpu)) => balancing::set_affinity(&[cpu]).map(|()| 0),
            (Ok(()), Command::Run(sweep, stop)) => {
                let mut passes = Ok(0);
                while !stop.load(Ordering::Relaxed) && passes.is_ok() {
                    passes = guest.sweep(NEXT, sweep).and(passes).map(|made| made + 1);
                }
                passes
            }
            (Ok(()), Command::Spin(stop)) => {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
                Ok(0)
            }
        };
        if outbox.send(done).is_err() {
            break;
        }
    }
}

impl Vcpu {
    fn sweep(&mut self, entry: u64, sweep: Sweep) -> Result<()> {
        let regs = kvm_regs {
            rbx: self.program_address + (LEFT + 4 * self.id) as u64,
            rdi: (sweep.first * PAGE + self.id * 4) as u64,
            rsi: (sweep.stride * PAGE as isize) as u64 & 0xffff_ffff,
            rcx: sweep.count as u64,
            ..Default::default()
        };
        self.run_to_halt(entry, regs)
    }

    fn keep_clock(&mut self, address: u64) -> Result<()> {
        let clock = kvm_msr_entry {
            index: MSR_KVM_SYSTEM_TIME_NEW,
            data: address | KVM_MSR_ENABLED,
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[clock]).context("one register")?;
        let set = self.vcpu.set_msrs(&msrs).context("KVM_SET_MSRS")?;
        ensure!(set == 1, "KVM does not take MSR_KVM_SYSTEM_TIME_NEW");
        Ok(())
    }

    /// Where it is, and what is being delivered to it, for people.
    fn state(&mut self) -> Result<String> {
        let regs = self.vcpu.get_regs().context("KVM_GET_REGS")?;
        let events = self.vcpu.get_vcpu_events().context("KVM_GET_VCPU_EVENTS")?;
        let run = self.vcpu.get_kvm_run();
        let internal = match run.exit_reason {
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: this is the member that goes with the reason, and numbers.
                let internal = unsafe { run.__bindgen_anon_1.internal };
                let data = &internal.data[..(internal.ndata as usize).min(internal.data.len())];
                format!("suberror {} with {data:x?}, ", internal.suberror)
            }
            _ => String::new(),
        };
        Ok(format!(
            "{internal}rip {:#x}, the program being at {:#x}; {:x?}, {:x?}, {regs:x?}",
            regs.rip, self.program_address, events.exception, events.interrupt
        ))
    }

    /// Where its stack ends, as an offset from the program.
    fn stack_end(&self) -> usize {
        STACKS + 4 * STACK_WORDS * (self.id + 1)
    }

    /// Whether it has halted in the program, and not in the handler of an exception.
    fn halted(&mut self) -> Result<()> {
        let rip = self.vcpu.get_regs().context("KVM_GET_REGS")?.rip;
        // It is behind the instruction that halted.
        let handler = rip.wrapping_sub(1 + self.program_address + HANDLERS as u64);
        if handler < EXCEPTIONS as u64 {
            let word = |number: usize| {
                self.program
                    .word(self.stack_end() - 4 * number)
                    .load(Ordering::Relaxed)
            };
            let [flags, cs, eip, last] = [1, 2, 3, 4].map(word);
            bail!(
                "exception {handler} in the guest: eip {eip:#x}, cs {cs:#x}, eflags {flags:#x}, then {last:#x}; {}",
                self.state()?
            );
        }
        Ok(())
    }

    /// Runs the program from its `entry`, with these registers, until it halts.
    fn run_to_halt(&mut self, entry: u64, regs: kvm_regs) -> Result<()> {
        let regs = kvm_regs {
            rip: self.program_address + entry,
            rsp: self.program_address + self.stack_end() as u64,
            rflags: 2,
            ..regs
        };
        self.vcpu.set_regs(&regs).context("KVM_SET_REGS")?;
        // Since when the vCPU has been refused the same page, known by how many are left.
        let mut stuck: Option<(Instant, u64)> = None;
        loop {
            let refusal = match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => return self.halted(),
                Ok(VcpuExit::Intr) => continue,
                Ok(exit @ VcpuExit::MemoryFault { .. }) => anyhow!("{exit:?}"),
                Ok(exit) => {
                    let exit = format!("{exit:?}");
                    bail!("unexpected exit from the guest: {exit}, {}", self.state()?);
                }
                Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => continue,
                Err(error) => {
                    let errno = error.errno();
                    let error = std::io::Error::from_raw_os_error(errno);
                    if errno != libc::EFAULT {
                        return Err(error).context("KVM_RUN");
                    }
                    error.into()
                }
            };
            if self.faults == Faults::Fatal {
                return Err(refusal).context("KVM_RUN");
            }
            self.refused.fetch_add(1, Ordering::Relaxed);
            let left = self.vcpu.get_regs().context("KVM_GET_REGS")?.rcx;
            match stuck {
                Some((since, at)) if at == left => {
                    if since.elapsed() > REFUSAL {
                        return Err(refusal).with_context(|| format!("KVM_RUN for {REFUSAL:?}"));
                    }
                }
                _ => stuck = Some((Instant::now(), left)),
            }
            std::thread::yield_now();
        }
    }
}

/// `VcpuFd` as something that has a descriptor.
pub(crate) struct Fd<'a>(pub(crate) &'a VcpuFd);

impl AsRawFd for Fd<'_> {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::Sweep;

    #[test]
    fn a_reversed_sweep_touches_the_same_pages() {
        let sweep = Sweep {
            first: 3,
            stride: 2,
            count: 4,
        };
        let pages: Vec<_> = sweep.pages().collect();
        let mut back: Vec<_> = sweep.reversed().pages().collect();
        assert_eq!(pages, [3, 5, 7, 9]);
        back.reverse();
        assert_eq!(back, pages);
    }
}
