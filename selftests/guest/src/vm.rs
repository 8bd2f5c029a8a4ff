// SPDX-License-Identifier: GPL-2.0
//! A virtual machine whose vCPUs sweep guest memory, each in a thread of its own; uses `/dev/kvm`.
//!
//! The guest runs in 32-bit protected mode with flat segments and without paging, so that guest addresses are physical
//! ones. Its whole program is
//!
//! ```text
//! f0 ff 07    next: lock inc dword [edi]   ; count this page: a locked instruction asks for write access at once
//! 01 f7             add edi, esi           ; on to the next page
//! e2 f9             loop next              ; until ecx pages are done
//! f4                hlt                    ; leaves KVM_RUN: the pass is complete
//! ```
//!
//! and [`Sweep`] says what is in its registers. It lies in a page of its own behind guest memory, which no scan reaches.

use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{anyhow, bail, Context, Result};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::memory::GuestMemory;
use crate::stats::Stats;
use crate::{balancing, PAGE};

const PROGRAM: [u8; 8] = [0xf0, 0xff, 0x07, 0x01, 0xf7, 0xe2, 0xf9, 0xf4];
/// Where KVM may put three pages of its own on Intel processors, far above guest memory.
const TSS_ADDRESS: usize = 0xfffb_d000;

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
    /// Sweep again and again until told to stop.
    Run(Sweep, Arc<AtomicBool>),
    /// Use CPU time in user mode until told to stop.
    Spin(Arc<AtomicBool>),
}

struct VcpuThread {
    commands: Sender<Command>,
    /// Passes made, for each command done.
    replies: Receiver<Result<u64>>,
    stats: Stats,
    thread: JoinHandle<()>,
}

/// A virtual machine and its vCPU threads.
pub struct Vm {
    vcpus: Vec<VcpuThread>,
    stats: Stats,
}

impl Vm {
    /// Makes a VM of `memory` with one vCPU for each of `cpus`, whose thread runs on that CPU only.
    pub fn new(memory: &Arc<GuestMemory>, cpus: &[usize]) -> Result<Vm> {
        if memory.size() > TSS_ADDRESS / 2 {
            bail!("{} bytes of guest memory: at most 2046 MiB", memory.size());
        }
        let kvm = Kvm::new().context("/dev/kvm: is CONFIG_KVM set, for this processor?")?;
        let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
        vm.set_tss_address(TSS_ADDRESS)
            .context("KVM_SET_TSS_ADDR")?;
        let program = Arc::new(Program::new()?);
        let program_address = memory.size() as u64;
        for (slot, (base, len, guest_phys_addr)) in [
            (memory.base(), memory.size(), 0),
            (program.0, PAGE, program_address),
        ]
        .into_iter()
        .enumerate()
        {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr,
                memory_size: len as u64,
                userspace_addr: base as u64,
            };
            // SAFETY: both mappings are kept by every vCPU thread, and so outlive the last use of the VM.
            unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
        }
        let stats = Stats::open(&vm)?;
        let vcpus = cpus
            .iter()
            .enumerate()
            .map(|(id, cpu)| {
                let vcpu = create_vcpu(&vm, id)?;
                let stats = Stats::open(&Fd(&vcpu))?;
                let (commands, inbox) = channel();
                let (outbox, replies) = channel();
                let (cpu, keep) = (*cpu, (memory.clone(), program.clone()));
                let thread = std::thread::Builder::new()
                    .name(format!("vcpu{id}"))
                    .spawn(move || {
                        serve(vcpu, id, cpu, program_address, &inbox, &outbox);
                        drop(keep);
                    })
                    .context("start a vCPU thread")?;
                Ok(VcpuThread {
                    commands,
                    replies,
                    stats,
                    thread,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Vm { vcpus, stats })
    }

    /// How many vCPUs it has.
    pub fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// A statistic of the VM.
    pub fn stat(&self, name: &str) -> Result<u64> {
        self.stats.read(name)
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

    /// Lets every vCPU thread use CPU time in user mode, outside the guest, while `body` runs.
    pub fn while_spinning<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        let (result, _) = self.during(|_, stop| Command::Spin(stop), body)?;
        Ok(result)
    }

    /// Lets every vCPU sweep again and again while `body` runs; `sweeps` has one for each. Also gives the number of
    /// complete passes that each has made.
    pub fn while_running<T>(
        &self,
        sweeps: &[Sweep],
        body: impl FnOnce() -> Result<T>,
    ) -> Result<(T, Vec<u64>)> {
        self.during(|vcpu, stop| Command::Run(sweeps[vcpu], stop), body)
    }

    fn during<T>(
        &self,
        command: impl Fn(usize, Arc<AtomicBool>) -> Command,
        body: impl FnOnce() -> Result<T>,
    ) -> Result<(T, Vec<u64>)> {
        let stop = Arc::new(AtomicBool::new(false));
        for vcpu in 0..self.vcpus.len() {
            self.send(vcpu, command(vcpu, stop.clone()))?;
        }
        let result = body();
        stop.store(true, Ordering::Relaxed);
        let passes: Result<Vec<u64>> = (0..self.vcpus.len()).map(|vcpu| self.reply(vcpu)).collect();
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
            .recv()
            .with_context(|| format!("the thread of vCPU {vcpu} has ended"))?
            .with_context(|| format!("vCPU {vcpu}"))
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

/// The page that holds the guest's program.
struct Program(*mut u8);

// SAFETY: the page belongs to no thread, and nobody writes to it after it was made.
unsafe impl Send for Program {}
// SAFETY: as above.
unsafe impl Sync for Program {}

impl Program {
    fn new() -> Result<Program> {
        // SAFETY: a new mapping of one page, into which the program fits.
        unsafe {
            let page = libc::mmap(
                ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            if page == libc::MAP_FAILED {
                return Err(std::io::Error::last_os_error()).context("map the guest's program");
            }
            ptr::copy_nonoverlapping(PROGRAM.as_ptr(), page.cast(), PROGRAM.len());
            Ok(Program(page.cast()))
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: our own page, and no vCPU is left.
        unsafe { libc::munmap(self.0.cast(), PAGE) };
    }
}

/// A new vCPU in 32-bit protected mode, flat, without paging.
fn create_vcpu(vm: &VmFd, id: usize) -> Result<VcpuFd> {
    let vcpu = vm.create_vcpu(id as u64).context("KVM_CREATE_VCPU")?;
    let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    let data = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: 0x8,
        type_: 11,
        ..data
    };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    Ok(vcpu)
}

/// The life of a vCPU thread: does what it is told until there is nobody to tell it.
fn serve(
    mut vcpu: VcpuFd,
    id: usize,
    cpu: usize,
    program_address: u64,
    inbox: &Receiver<Command>,
    outbox: &Sender<Result<u64>>,
) {
    let placed = balancing::set_affinity(&[cpu]);
    let mut pass = |sweep| run_pass(&mut vcpu, id, program_address, sweep);
    for command in inbox {
        let done = match (&placed, command) {
            (Err(error), _) => Err(anyhow!("{error:#}")),
            (Ok(()), Command::Pass(sweep)) => pass(sweep).map(|()| 1),
            (Ok(()), Command::Run(sweep, stop)) => {
                let mut passes = Ok(0);
                while !stop.load(Ordering::Relaxed) && passes.is_ok() {
                    passes = pass(sweep).and(passes).map(|made| made + 1);
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

fn run_pass(vcpu: &mut VcpuFd, id: usize, program_address: u64, sweep: Sweep) -> Result<()> {
    let regs = kvm_regs {
        rip: program_address,
        rdi: (sweep.first * PAGE + id * 4) as u64,
        rsi: (sweep.stride * PAGE as isize) as u64 & 0xffff_ffff,
        rcx: sweep.count as u64,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).context("KVM_SET_REGS")?;
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => return Ok(()),
            Ok(VcpuExit::Intr) => {}
            Ok(exit) => bail!("unexpected exit from the guest: {exit:?}"),
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {}
            Err(error) => return Err(error).context("KVM_RUN"),
        }
    }
}

/// `VcpuFd` as something that has a descriptor.
struct Fd<'a>(&'a VcpuFd);

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
