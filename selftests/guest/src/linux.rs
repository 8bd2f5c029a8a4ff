// SPDX-License-Identifier: GPL-2.0
//! Boots Linux in a virtual machine with one vCPU: its own memory and thread, `/dev/kvm`, and the kernel's file, read.
//!
//! The machine has what KVM emulates of a PC in the kernel, and a serial port. The kernel starts at its 32-bit entry
//! (Documentation/arch/x86/boot.rst), and ends by a restart: at the keyboard controller (`reboot=k`) or by a triple fault.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::thread::JoinHandleExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, ensure, Context, Result};
use kvm_bindings::{
    kvm_pit_config, kvm_regs, kvm_userspace_memory_region, KVM_MAX_CPUID_ENTRIES,
    KVM_PIT_SPEAKER_DUMMY,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::KernelLoader;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vm_superio::serial::{NoEvents, Serial};
use vm_superio::Trigger;

use crate::memory::GuestMemory;
use crate::stats::Stats;
use crate::vm::{create_vcpu, create_vm, Fd, TSS_ADDRESS};
use crate::{balancing, PAGE};

/// Where the boot parameters and the command line go, below the end of conventional memory.
const BOOT_PARAMS: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
/// The end of conventional memory, and the beginning of what lies above the PC's firmware.
const LOW_END: u64 = 0x9_fc00;
const HIGH_START: u64 = 0x10_0000;
/// Usable memory, in the map that the kernel is given.
const E820_RAM: u32 = 1;
/// A boot loader without a number of its own.
const LOADER: u8 = 0xff;
/// The first serial port: its I/O ports and its interrupt.
const SERIAL: u16 = 0x3f8;
const SERIAL_END: u16 = SERIAL + 7;
const SERIAL_IRQ: u32 = 4;
/// The keyboard controller's command port, and the command that resets the processor.
const KEYBOARD: u16 = 0x64;
const RESET: u8 = 0xfe;
/// How much of the console an error shows, in lines.
const TAIL: usize = 12;

/// A virtual machine that is about to boot Linux.
pub struct Linux {
    vm: Arc<VmFd>,
    vcpu: Option<VcpuFd>,
    console: Console,
    memory: Arc<GuestMemory>,
    stats: Stats,
    vcpu_stats: Stats,
}

impl Linux {
    /// Loads the bzImage `kernel` and the initramfs into `memory`, which is all zeroes.
    pub fn new(
        memory: &Arc<GuestMemory>,
        kernel: &Path,
        initramfs: &[u8],
        command_line: &str,
    ) -> Result<Linux> {
        let entry = load(memory, kernel, initramfs, command_line)
            .with_context(|| format!("load {} into guest memory", kernel.display()))?;
        let kvm = Kvm::new().context("/dev/kvm: is CONFIG_KVM set, for this processor?")?;
        let vm = create_vm(&kvm)?;
        vm.set_tss_address(TSS_ADDRESS)
            .context("KVM_SET_TSS_ADDR")?;
        vm.create_irq_chip()
            .context("KVM_CREATE_IRQCHIP: is CONFIG_KVM_IOAPIC set?")?;
        vm.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .context("KVM_CREATE_PIT2")?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: memory.size() as u64,
            userspace_addr: memory.addresses().start,
        };
        // SAFETY: the mapping is kept by `memory`, which is dropped after the VM and its vCPU.
        unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
        let vcpu = create_vcpu(&vm, 0)?;
        let mut cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .context("KVM_GET_SUPPORTED_CPUID")?;
        // The APIC's number is that of the processor that was asked.
        for leaf in cpuid.as_mut_slice() {
            match leaf.function {
                1 => leaf.ebx &= 0x00ff_ffff,
                0xb | 0x1f => leaf.edx = 0,
                0x8000_001e => leaf.eax = 0,
                _ => (),
            }
        }
        vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
        vcpu.set_regs(&kvm_regs {
            rip: entry,
            rsi: BOOT_PARAMS,
            rflags: 2,
            ..Default::default()
        })
        .context("KVM_SET_REGS")?;
        Ok(Linux {
            stats: Stats::open(&vm)?,
            vcpu_stats: Stats::open(&Fd(&vcpu))?,
            vm: Arc::new(vm),
            vcpu: Some(vcpu),
            console: Console::default(),
            memory: memory.clone(),
        })
    }

    /// Runs the vCPU on `cpu`, in a thread of its own, until the kernel restarts the machine, and gives what it wrote to
    /// the serial port. Fails with the end of that if the machine stops otherwise, or not within `limit`. Calls `waiting`
    /// meanwhile, again and again. Once only.
    pub fn run(
        &mut self,
        cpu: usize,
        limit: Duration,
        mut waiting: impl FnMut(Duration),
    ) -> Result<String> {
        let vcpu = self.vcpu.take().context("this machine has run")?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, vm) = (stop.clone(), self.vm.clone());
        let (console, memory) = (self.console.clone(), self.memory.clone());
        interruptible()?;
        let thread = std::thread::Builder::new()
            .name("vcpu0".into())
            .spawn(move || {
                let done = balancing::set_affinity(&[cpu])
                    .and_then(|()| run_to_reset(vcpu, vm, console, &stopped));
                drop(memory);
                done
            })
            .context("start the vCPU's thread")?;
        let begun = Instant::now();
        while !thread.is_finished() {
            std::thread::sleep(Duration::from_millis(5));
            waiting(begun.elapsed());
            if begun.elapsed() > limit {
                stop.store(true, Ordering::Relaxed);
                // SAFETY: the thread was not joined, and the signal does nothing but interrupt it.
                unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGUSR1) };
            }
        }
        let done = thread.join().expect("running a vCPU does not panic");
        let said = self.console.text();
        match done {
            Ok(()) => Ok(said),
            Err(error) => bail!(
                "after {:?}: {error:#}; the console's last lines:\n{}",
                begun.elapsed(),
                tail(&said)
            ),
        }
    }

    /// A statistic of the VM.
    pub fn stat(&self, name: &str) -> Result<u64> {
        self.stats.read(name)
    }

    /// A statistic of its vCPU.
    pub fn vcpu_stat(&self, name: &str) -> Result<u64> {
        self.vcpu_stats.read(name)
    }
}

/// The last lines of a console.
pub fn tail(console: &str) -> String {
    let lines: Vec<&str> = console.lines().collect();
    lines[lines.len().saturating_sub(TAIL)..].join("\n")
}

/// Puts everything in its place. Gives the address of the kernel's entry.
fn load(memory: &GuestMemory, kernel: &Path, initramfs: &[u8], command_line: &str) -> Result<u64> {
    // SAFETY: the mapping is as long as said, stays while `memory` is borrowed, and no vCPU runs yet.
    let region: MmapRegion = unsafe {
        MmapRegion::build_raw(
            memory.base(),
            memory.size(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        )
    }?;
    let region = GuestRegionMmap::new(region, GuestAddress(0))?;
    let guest = GuestMemoryMmap::from_regions(vec![region])?;

    let loaded = BzImage::load(
        &guest,
        None,
        &mut File::open(kernel)?,
        Some(GuestAddress(HIGH_START)),
    )?;
    let mut params = boot_params {
        hdr: loaded.setup_header.context("no setup header")?,
        ..Default::default()
    };
    // The kernel takes this much from where it wants to be, before it reads its map of memory.
    let kernel_end = params.hdr.pref_address + u64::from(params.hdr.init_size);
    let end = memory.size() as u64;
    let initramfs_at = end.saturating_sub(initramfs.len().next_multiple_of(PAGE) as u64);
    ensure!(
        kernel_end.max(loaded.kernel_end) <= initramfs_at,
        "{end} bytes are too few for a kernel up to {kernel_end:#x} and an initramfs of {} bytes",
        initramfs.len()
    );
    guest.write_slice(initramfs, GuestAddress(initramfs_at))?;
    let command_line = CString::new(command_line)?;
    guest.write_slice(command_line.as_bytes_with_nul(), GuestAddress(COMMAND_LINE))?;
    params.hdr.type_of_loader = LOADER;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.ramdisk_image = initramfs_at as u32;
    params.hdr.ramdisk_size = initramfs.len() as u32;
    params.e820_entries = 2;
    for (entry, (start, end)) in [(0, LOW_END), (HIGH_START, end)].into_iter().enumerate() {
        params.e820_table[entry] = boot_e820_entry {
            addr: start,
            size: end - start,
            type_: E820_RAM,
        };
    }
    guest.write_obj(params, GuestAddress(BOOT_PARAMS))?;
    Ok(loaded.kernel_load.0)
}

/// What the guest writes to its serial port.
#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Console {
    fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut console = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        console.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The serial port's interrupt, an edge.
struct SerialIrq(Arc<VmFd>);

impl Trigger for SerialIrq {
    type E = kvm_ioctls::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.set_irq_line(SERIAL_IRQ, true)?;
        self.0.set_irq_line(SERIAL_IRQ, false)
    }
}

/// Runs the vCPU until the guest resets the machine, or fails once `stop` is set and a signal has come.
fn run_to_reset(
    mut vcpu: VcpuFd,
    vm: Arc<VmFd>,
    console: Console,
    stop: &AtomicBool,
) -> Result<()> {
    let mut serial: Serial<_, NoEvents, _> = Serial::new(SerialIrq(vm), console);
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port @ SERIAL..=SERIAL_END, [value])) => serial
                .write((port - SERIAL) as u8, *value)
                .map_err(|error| anyhow!("the serial port: {error:?}"))?,
            Ok(VcpuExit::IoIn(port @ SERIAL..=SERIAL_END, [value])) => {
                *value = serial.read((port - SERIAL) as u8);
            }
            Ok(VcpuExit::IoOut(KEYBOARD, [RESET]) | VcpuExit::Shutdown) => return Ok(()),
            // Ready for the next command.
            Ok(VcpuExit::IoIn(KEYBOARD, value)) => value.fill(0),
            // Nobody is there.
            Ok(VcpuExit::IoIn(_, value) | VcpuExit::MmioRead(_, value)) => value.fill(0xff),
            Ok(VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) | VcpuExit::Intr) => (),
            Ok(exit) => bail!("unexpected exit from the guest: {exit:?}"),
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => (),
            Err(error) => {
                let error = io::Error::from_raw_os_error(error.errno());
                return Err(error).context("KVM_RUN");
            }
        }
        ensure!(!stop.load(Ordering::Relaxed), "the guest has not restarted");
    }
}

/// Has SIGUSR1 interrupt a thread, and nothing else.
fn interruptible() -> Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    let handler = nothing as extern "C" fn(libc::c_int);
    // SAFETY: the handler does nothing, and the rest of the structure may be zero: no flags, so that calls are interrupted.
    let rc = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut())
    };
    if rc != 0 {
        return Err(io::Error::last_os_error()).context("sigaction(SIGUSR1)");
    }
    Ok(())
}

/// An initramfs in which `program` is the first program to run, and there is nothing else.
pub fn initramfs(program: &[u8]) -> Vec<u8> {
    /// A file that may be run.
    const MODE: usize = 0o100_755;
    let mut archive = Vec::new();
    for (name, mode, contents) in [("init", MODE, program), ("TRAILER!!!", 0, &[][..])] {
        // inode, mode, user, group, links, time, size, device, device, of itself, name, checksum
        let size = contents.len();
        let fields = [1, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name.len() + 1, 0];
        archive.extend_from_slice(b"070701");
        for field in fields {
            archive.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(contents);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_initramfs_is_a_cpio_archive() {
        let archive = initramfs(b"\x7fELF?");
        let name = 6 + 13 * 8;
        assert_eq!(&archive[..6], b"070701");
        assert_eq!(&archive[14..22], b"000081ed");
        assert_eq!(&archive[54..62], b"00000005");
        assert_eq!(&archive[name..name + 5], b"init\0");
        assert_eq!(&archive[116..124], b"\x7fELF?\0\0\0");
        assert_eq!(&archive[124..130], b"070701");
        assert_eq!(&archive[124 + name..124 + name + 11], b"TRAILER!!!\0");
        assert_eq!(archive.len() % 4, 0);
    }

    #[test]
    fn the_end_of_a_console() {
        let console: Vec<String> = (0..20).map(|line| line.to_string()).collect();
        assert!(tail(&console.join("\n")).starts_with("8\n9\n"));
        assert_eq!(tail("all\nof it\n"), "all\nof it");
    }
}
