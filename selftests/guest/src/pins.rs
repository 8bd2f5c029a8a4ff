// SPDX-License-Identifier: GPL-2.0
//! Long-term pins of guest memory: by io_uring's registered buffers, or by the kernel for a PCI device that is assigned to this
//! process. Binds that device to vfio-pci, where it stays.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use io_uring::IoUring;
use iommufd_ioctls::IommuFd;
use vfio_bindings::bindings::vfio::{VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioIommufd, VfioOps};

use crate::needs;

/// The longest buffer that io_uring registers, in bytes.
const MAX_BUFFER: usize = 1 << 30;

/// Who holds the pins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// io_uring of root, whose pins are accounted nowhere.
    IoUring,
    /// io_uring of somebody without CAP_IPC_LOCK: its pins are in the process's VmPin.
    IoUringUser,
    /// An assigned device, by VFIO's container (type 1).
    Type1,
    /// An assigned device, by iommufd and the device's own character device.
    Iommufd,
}

impl Holder {
    /// All of them.
    pub const ALL: [Holder; 4] = [
        Holder::IoUring,
        Holder::IoUringUser,
        Holder::Type1,
        Holder::Iommufd,
    ];

    /// The name on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Holder::IoUring => "io_uring",
            Holder::IoUringUser => "io_uring_user",
            Holder::Type1 => "type1",
            Holder::Iommufd => "iommufd",
        }
    }

    /// What this one lacks here.
    pub fn missing(self) -> Option<String> {
        let need = match self {
            Holder::IoUring | Holder::IoUringUser => return needs::missing([&needs::IO_URING]),
            Holder::Type1 => &needs::VFIO_TYPE1,
            Holder::Iommufd => &needs::IOMMUFD,
        };
        needs::missing([need]).or_else(|| Some(format!("{:#}", Device::find().err()?)))
    }
}

impl FromStr for Holder {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Holder> {
        Holder::ALL
            .into_iter()
            .find(|one| one.name() == text)
            .with_context(|| {
                format!("{text}: nobody who pins: io_uring, io_uring_user, type1 or iommufd")
            })
    }
}

/// Pins, until dropped.
pub(crate) enum Pins {
    IoUring { _ring: IoUring },
    Device(Device),
}

impl Pins {
    /// Has `holder` pin `parts` of `whole`, all of which must be mapped until this is dropped.
    pub(crate) fn new(holder: Holder, whole: Range<u64>, parts: Vec<Range<u64>>) -> Result<Pins> {
        Ok(match holder {
            Holder::IoUring | Holder::IoUringUser => Pins::IoUring {
                _ring: ring(holder, parts)?,
            },
            Holder::Type1 | Holder::Iommufd => {
                let device = Device::open(holder)?;
                for part in parts {
                    device.map(part.start - whole.start, part)?;
                }
                Pins::Device(device)
            }
        })
    }
}

/// Registers buffers, which pins them.
fn ring(holder: Holder, parts: Vec<Range<u64>>) -> Result<IoUring> {
    let split = |part: Range<u64>| {
        let end = part.end;
        part.step_by(MAX_BUFFER).map(move |start| libc::iovec {
            iov_base: start as *mut libc::c_void,
            iov_len: MAX_BUFFER.min((end - start) as usize),
        })
    };
    let buffers: Vec<libc::iovec> = parts.into_iter().flat_map(split).collect();
    let new = || IoUring::new(1).context("io_uring_setup(): is CONFIG_IO_URING set?");
    let ring = match holder {
        Holder::IoUringUser => without_capabilities(new)?,
        _ => new()?,
    };
    // SAFETY: the caller keeps the mapping until the ring is closed.
    unsafe { ring.submitter().register_buffers(&buffers) }
        .context("IORING_REGISTER_BUFFERS: needs root or a higher RLIMIT_MEMLOCK")?;
    Ok(ring)
}

/// Does `work` as somebody else, who has no capabilities, and may lock as much as he likes.
fn without_capabilities<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    const NOBODY: libc::uid_t = 65534;
    let all = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // By the system call, which changes this thread alone.
    let become_user = |user: libc::uid_t| -> Result<()> {
        // SAFETY: takes numbers only.
        let rc = unsafe { libc::syscall(libc::SYS_setresuid, -1, user, -1) };
        ensure!(rc == 0, "setresuid(): {}", io::Error::last_os_error());
        Ok(())
    };
    // SAFETY: the kernel reads the limits.
    let rc = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &all) };
    ensure!(
        rc == 0,
        "setrlimit(): {}: needs root",
        io::Error::last_os_error()
    );
    become_user(NOBODY)?;
    let done = work();
    become_user(0)?;
    done
}

/// QEMU's device for teaching (its docs/specs/edu.rst), assigned to this process: it copies guest memory that is mapped for it.
pub struct Device {
    // Closed before what it uses.
    device: VfioDevice,
    space: Arc<dyn VfioOps>,
    /// Device addresses and lengths.
    mapped: Mutex<Vec<(u64, usize)>>,
}

impl Device {
    const VENDOR: &'static str = "0x1234";
    const DEVICE: &'static str = "0x11e8";
    /// Its address of the beginning of guest memory; it reaches no further than 256 MiB.
    const FIRST: u64 = 16 << 20;
    const LAST: u64 = (1 << 28) - 1;
    /// Where its own memory is, and how much, in bytes.
    const BUFFER: u64 = 0x40000;
    /// The most that it copies at once.
    pub const BUFFER_SIZE: usize = 4096;
    // Registers.
    const SOURCE: u64 = 0x80;
    const TARGET: u64 = 0x88;
    const COUNT: u64 = 0x90;
    const COMMAND: u64 = 0x98;
    const START: u64 = 1 << 0;
    const TO_MEMORY: u64 = 1 << 1;
    /// A transfer takes a tenth of a second.
    const LIMIT: Duration = Duration::from_secs(60);

    /// Its folder in sysfs.
    fn find() -> Result<PathBuf> {
        let folder = "/sys/bus/pci/devices";
        for entry in fs::read_dir(folder).context(folder)? {
            let path = entry?.path();
            let is = |file: &str, wanted: &str| {
                fs::read_to_string(path.join(file)).is_ok_and(|text| text.trim() == wanted)
            };
            if is("vendor", Device::VENDOR) && is("device", Device::DEVICE) {
                ensure!(
                    path.join("iommu_group").exists(),
                    "{}: no IOMMU: intel_iommu=on, or amd_iommu=on",
                    path.display()
                );
                return Ok(path);
            }
        }
        bail!("no PCI device 1234:11e8: QEMU's -device edu, behind its -device intel-iommu")
    }

    /// Binds it to vfio-pci, for whoever wants it assigned, and gives its address.
    pub fn assignable() -> Result<String> {
        let path = Device::find()?;
        Device::bind(&path)?;
        let address = path.file_name().context("no name")?;
        Ok(address.to_string_lossy().into_owned())
    }

    /// Binds it to vfio-pci, unless it is.
    fn bind(path: &Path) -> Result<()> {
        let driver = path.join("driver");
        let name = path.file_name().context("no name")?.to_string_lossy();
        let is_bound = || {
            let bound = driver.read_link();
            bound.is_ok_and(|to| to.file_name().is_some_and(|name| name == "vfio-pci"))
        };
        if is_bound() {
            return Ok(());
        }
        let write = |path: PathBuf, text: &str| {
            fs::write(&path, text).with_context(|| format!("{}: {text}", path.display()))
        };
        if driver.exists() {
            write(driver.join("unbind"), &name)?;
        }
        write(path.join("driver_override"), "vfio-pci")?;
        write("/sys/bus/pci/drivers_probe".into(), &name)?;
        ensure!(
            is_bound(),
            "{name} is not bound to vfio-pci: needs CONFIG_VFIO_PCI"
        );
        Ok(())
    }

    fn open(holder: Holder) -> Result<Device> {
        let path = Device::find()?;
        Device::bind(&path)?;
        let space: Arc<dyn VfioOps> = match holder {
            Holder::Type1 => Arc::new(VfioContainer::new(None)?),
            Holder::Iommufd => {
                let iommufd = Arc::new(IommuFd::new().context("/dev/iommu")?);
                Arc::new(VfioIommufd::new(iommufd, None, None)?)
            }
            Holder::IoUring | Holder::IoUringUser => bail!("io_uring has no device"),
        };
        let device = VfioDevice::new(&path, space.clone())
            .with_context(|| format!("open {}", path.display()))?;
        let device = Device {
            device,
            space,
            mapped: Mutex::default(),
        };
        device.master();
        Ok(device)
    }

    /// Lets it reach memory.
    fn master(&self) {
        const COMMAND: u64 = 4;
        const MEMORY_AND_MASTER: u16 = (1 << 1) | (1 << 2);
        let mut command = [0; 2];
        let config = VFIO_PCI_CONFIG_REGION_INDEX;
        self.device.region_read(config, &mut command, COMMAND);
        let command = u16::from_le_bytes(command) | MEMORY_AND_MASTER;
        self.device
            .region_write(config, &command.to_le_bytes(), COMMAND);
    }

    /// Maps a part of guest memory, which begins at `offset`.
    fn map(&self, offset: u64, part: Range<u64>) -> Result<()> {
        let (at, length) = (Device::FIRST + offset, (part.end - part.start) as usize);
        // SAFETY: guest memory, which is only read and written volatile, and which the caller keeps.
        unsafe { self.space.vfio_dma_map(at, length, part.start as *mut u8) }
            .with_context(|| format!("map {length} bytes for the device"))?;
        self.mapped().push((at, length));
        Ok(())
    }

    fn mapped(&self) -> MutexGuard<'_, Vec<(u64, usize)>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes everything from it, which unpins it.
    pub fn unmap(&self) -> Result<()> {
        for (at, length) in std::mem::take(&mut *self.mapped()) {
            self.space
                .vfio_dma_unmap(at, length)
                .with_context(|| format!("unmap {length} bytes for the device"))?;
        }
        Ok(())
    }

    /// Has the device copy `length` bytes, at most [`BUFFER_SIZE`](Device::BUFFER_SIZE), from one place in guest memory to
    /// another, by way of its own memory.
    pub fn copy(&self, from: usize, to: usize, length: usize) -> Result<()> {
        for offset in [from, to] {
            let first = Device::FIRST + offset as u64;
            let last = first + length as u64 - 1;
            ensure!(
                length <= Device::BUFFER_SIZE && last <= Device::LAST,
                "the device does not reach {length} bytes at {offset:#x}"
            );
        }
        let at = |offset: usize| Device::FIRST + offset as u64;
        self.transfer(at(from), Device::BUFFER, length, 0)?;
        self.transfer(Device::BUFFER, at(to), length, Device::TO_MEMORY)
    }

    fn transfer(&self, from: u64, to: u64, length: usize, direction: u64) -> Result<()> {
        self.write(Device::SOURCE, from);
        self.write(Device::TARGET, to);
        self.write(Device::COUNT, length as u64);
        self.write(Device::COMMAND, Device::START | direction);
        let begun = Instant::now();
        while self.read(Device::COMMAND) & Device::START != 0 {
            ensure!(begun.elapsed() < Device::LIMIT, "the device does not copy");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn write(&self, register: u64, value: u64) {
        let bytes = value.to_le_bytes();
        self.device
            .region_write(VFIO_PCI_BAR0_REGION_INDEX, &bytes, register);
    }

    fn read(&self, register: u64) -> u64 {
        let mut bytes = [0; 8];
        self.device
            .region_read(VFIO_PCI_BAR0_REGION_INDEX, &mut bytes, register);
        u64::from_le_bytes(bytes)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Err(error) = self.unmap() {
            eprintln!("{error:#}");
        }
    }
}
