// SPDX-License-Identifier: GPL-2.0
//! Pins as those of a mediated device: parts of guest memory, one after the other, by iommufd's access interface. The device
//! is the kernel's own mock of one (drivers/iommu/iommufd/selftest.c); changes guest memory only where it is told to write.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use anyhow::{ensure, Context, Result};
use iommufd_bindings::iommufd::{
    iommu_ioas_alloc, iommu_ioas_map, iommu_ioas_unmap,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as FIXED,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as WRITEABLE,
};
use iommufd_ioctls::IommuFd;

use crate::memory::GuestMemory;
use crate::needs;

/// Of drivers/iommu/iommufd/iommufd_test.h: `_IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 32)`.
const IOMMU_TEST_CMD: libc::c_ulong = 0x3ba0;
const IOMMU_TEST_OP_CREATE_ACCESS: u32 = 5;
const IOMMU_TEST_OP_DESTROY_ACCESS_PAGES: u32 = 6;
const IOMMU_TEST_OP_ACCESS_PAGES: u32 = 7;
const IOMMU_TEST_OP_ACCESS_RW: u32 = 8;
const MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES: u32 = 1 << 0;
const MOCK_FLAGS_ACCESS_WRITE: u32 = 1 << 0;
const MOCK_ACCESS_RW_WRITE: u32 = 1 << 0;
const MOCK_ACCESS_RW_SLOW_PATH: u32 = 1 << 2;

/// `struct iommu_test_cmd` with what `op` is about, which is padded to the size of the kernel's union.
#[repr(C)]
struct Command<T> {
    size: u32,
    op: u32,
    id: u32,
    reserved: u32,
    arguments: T,
    last: u32,
}

#[repr(C)]
#[derive(Default)]
struct CreateAccess {
    out_access_fd: i32,
    flags: u32,
    padding: [u64; 5],
}

#[repr(C)]
#[derive(Default)]
struct DestroyAccessPages {
    access_pages_id: u32,
    padding: [u64; 5],
}

#[repr(C)]
#[derive(Default)]
struct AccessPages {
    flags: u32,
    out_access_pages_id: u32,
    iova: u64,
    length: u64,
    uptr: u64,
    padding: [u64; 2],
}

#[repr(C)]
#[derive(Default)]
struct AccessRw {
    iova: u64,
    length: u64,
    uptr: u64,
    flags: u32,
    padding: [u64; 2],
}

const _: () = {
    assert!(size_of::<Command<CreateAccess>>() == 72);
    assert!(size_of::<Command<DestroyAccessPages>>() == 72);
    assert!(size_of::<Command<AccessPages>>() == 72);
    assert!(size_of::<Command<AccessRw>>() == 72);
};

/// How the device gets at memory that it reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// As the process does.
    User,
    /// By a pin that lasts as long as the copy.
    Pin,
}

/// A mediated device: guest memory is mapped for it, and it pins what it uses. Unpins all when dropped.
pub struct Access {
    // Closed before what it uses.
    access: File,
    iommufd: IommuFd,
    /// The I/O address space.
    ioas: u32,
    memory: Arc<GuestMemory>,
}

/// A part of guest memory that is pinned until [`Access::unpin`], or until it is unmapped.
pub struct PinnedPart(u32);

impl Access {
    /// What it lacks here.
    pub fn missing() -> Option<String> {
        let made = || -> Result<()> {
            let iommufd = IommuFd::new()?;
            create(&iommufd, address_space(&iommufd)?).map(drop)
        };
        needs::missing([&needs::IOMMUFD]).or_else(|| match made() {
            Ok(()) => None,
            Err(error) => Some(format!("{error:#}: needs CONFIG_IOMMUFD_TEST")),
        })
    }

    /// Maps all of `memory`; the device's addresses are the offsets in it. Pins nothing yet.
    pub fn new(memory: &Arc<GuestMemory>) -> Result<Access> {
        let iommufd = IommuFd::new()?;
        let ioas = address_space(&iommufd)?;
        iommufd.map_iommu_ioas(&iommu_ioas_map {
            size: size_of::<iommu_ioas_map>() as u32,
            flags: FIXED | READABLE | WRITEABLE,
            ioas_id: ioas,
            __reserved: 0,
            user_va: memory.addresses().start,
            length: memory.size() as u64,
            iova: 0,
        })?;
        Ok(Access {
            access: create(&iommufd, ioas)?,
            iommufd,
            ioas,
            memory: memory.clone(),
        })
    }

    /// Pins `part`, offsets in guest memory. The kernel fails it if these are not the pages that this process has there.
    pub fn pin(&self, part: &Range<usize>) -> Result<PinnedPart> {
        let pages = AccessPages {
            flags: MOCK_FLAGS_ACCESS_WRITE,
            iova: part.start as u64,
            length: part.len() as u64,
            uptr: self.memory.addresses().start + part.start as u64,
            ..AccessPages::default()
        };
        let pages = self
            .command(IOMMU_TEST_OP_ACCESS_PAGES, pages)
            .with_context(|| format!("pin {part:#x?} for the device"))?;
        Ok(PinnedPart(pages.out_access_pages_id))
    }

    /// Unpins it. Fails if it was unpinned already.
    pub fn unpin(&self, part: PinnedPart) -> Result<()> {
        let pages = DestroyAccessPages {
            access_pages_id: part.0,
            ..DestroyAccessPages::default()
        };
        self.command(IOMMU_TEST_OP_DESTROY_ACCESS_PAGES, pages)
            .context("unpin for the device")
            .map(drop)
    }

    /// Has the device write to guest memory at `offset`, where no vCPU counts and no tag is.
    pub fn write(&self, offset: usize, bytes: &[u8], path: Path) -> Result<()> {
        self.copy(offset, bytes.as_ptr() as u64, bytes.len(), path, true)
    }

    /// Has the device read `length` bytes of guest memory at `offset`.
    pub fn read(&self, offset: usize, length: usize, path: Path) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.copy(offset, bytes.as_mut_ptr() as u64, length, path, false)?;
        Ok(bytes)
    }

    fn copy(&self, offset: usize, at: u64, length: usize, path: Path, write: bool) -> Result<()> {
        ensure!(
            offset + length <= self.memory.size(),
            "beyond guest memory: {length} bytes at {offset:#x}"
        );
        let direction = if write { MOCK_ACCESS_RW_WRITE } else { 0 };
        let copy = AccessRw {
            iova: offset as u64,
            length: length as u64,
            uptr: at,
            flags: direction
                | match path {
                    Path::User => 0,
                    Path::Pin => MOCK_ACCESS_RW_SLOW_PATH,
                },
            ..AccessRw::default()
        };
        self.command(IOMMU_TEST_OP_ACCESS_RW, copy)
            .with_context(|| format!("copy {length} bytes at {offset:#x} by the device"))
            .map(drop)
    }

    /// Takes all of guest memory from the device, which has to let go of what it pinned.
    pub fn unmap(&self) -> Result<()> {
        let mut unmap = iommu_ioas_unmap {
            size: size_of::<iommu_ioas_unmap>() as u32,
            ioas_id: self.ioas,
            iova: 0,
            length: self.memory.size() as u64,
        };
        self.iommufd
            .unmap_iommu_ioas(&mut unmap)
            .context("unmap guest memory for the device")
    }

    fn command<T>(&self, op: u32, arguments: T) -> Result<T> {
        command(&self.iommufd, op, self.access.as_raw_fd() as u32, arguments)
    }
}

/// A new I/O address space, which is gone with `iommufd`.
fn address_space(iommufd: &IommuFd) -> Result<u32> {
    let mut ioas = iommu_ioas_alloc {
        size: size_of::<iommu_ioas_alloc>() as u32,
        flags: 0,
        out_ioas_id: 0,
    };
    iommufd.alloc_iommu_ioas(&mut ioas)?;
    Ok(ioas.out_ioas_id)
}

/// A device that uses the I/O address space `ioas`.
fn create(iommufd: &IommuFd, ioas: u32) -> Result<File> {
    let access = CreateAccess {
        flags: MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES,
        ..CreateAccess::default()
    };
    let access = command(iommufd, IOMMU_TEST_OP_CREATE_ACCESS, ioas, access)
        .context("make a mediated device")?;
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { File::from_raw_fd(access.out_access_fd) })
}

/// Gives back the arguments as the kernel left them.
fn command<T>(iommufd: &IommuFd, op: u32, id: u32, arguments: T) -> Result<T> {
    let mut command = Command {
        size: size_of::<Command<T>>() as u32,
        op,
        id,
        reserved: 0,
        arguments,
        last: 0,
    };
    // SAFETY: the structure is as long as it says. Where it has an address of this process, callers keep what is there, and
    // memory of the guest is only read and written volatile.
    let status = unsafe { libc::ioctl(iommufd.as_raw_fd(), IOMMU_TEST_CMD as _, &mut command) };
    ensure!(
        status == 0,
        "IOMMU_TEST_CMD, operation {op}: {}",
        io::Error::last_os_error()
    );
    Ok(command.arguments)
}
