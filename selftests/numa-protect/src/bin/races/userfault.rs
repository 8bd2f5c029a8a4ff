// SPDX-License-Identifier: GPL-2.0
//! userfaultfd(2) as the races use it: ranges of own memory are protected, and released again.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};

use anyhow::{Context, Result};

/// What a range is protected from (Documentation/admin-guide/mm/userfaultfd.rst).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Writes; private memory only.
    Write,
    /// Any access to a page that is there.
    ReadWrite,
}

// Of include/uapi/linux/userfaultfd.h.
const API: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_RWP: u64 = 1 << 17;
const MODE_PROTECT: u64 = 1 << 0;
/// Bytes of `struct uffd_msg`.
const MESSAGE: usize = 32;

/// `_IOR(0xaa, number, [u64; words])`, with 3 for `direction` `_IOWR`.
const fn request(direction: u64, number: u64, words: u64) -> u64 {
    (direction << 30) | ((words * 8) << 16) | (API << 8) | number
}

const UFFDIO_API: u64 = request(3, 0x3f, 3);
const UFFDIO_REGISTER: u64 = request(3, 0x00, 4);
const UFFDIO_UNREGISTER: u64 = request(2, 0x01, 2);
const UFFDIO_WRITEPROTECT: u64 = request(3, 0x06, 3);
const UFFDIO_RWPROTECT: u64 = request(3, 0x09, 3);

impl Protection {
    fn feature(self) -> u64 {
        match self {
            Protection::Write => FEATURE_PAGEFAULT_FLAG_WP,
            Protection::ReadWrite => FEATURE_RWP,
        }
    }

    fn register_mode(self) -> u64 {
        match self {
            Protection::Write => 1 << 1,
            Protection::ReadWrite => 1 << 3,
        }
    }

    fn request(self) -> u64 {
        match self {
            Protection::Write => UFFDIO_WRITEPROTECT,
            Protection::ReadWrite => UFFDIO_RWPROTECT,
        }
    }
}

/// Whether the kernel can protect from that.
pub fn is_there(protection: Protection) -> bool {
    // The features are those that the kernel knows of when none is asked for.
    open(0).is_ok_and(|(_, features)| features & protection.feature() == protection.feature())
}

/// A userfaultfd for one kind of protection.
pub struct Userfault {
    file: File,
    protection: Protection,
}

impl Userfault {
    /// A new one, of which no memory knows yet.
    pub fn new(protection: Protection) -> Result<Userfault> {
        let (file, _) = open(protection.feature())?;
        Ok(Userfault { file, protection })
    }

    /// Protects the addresses `range` of this process, whole pages. Who accesses it then sleeps until it is released.
    pub fn protect(&self, range: &Range<u64>) -> Result<()> {
        let len = range.end - range.start;
        let mode = self.protection.register_mode();
        ioctl(
            &self.file,
            UFFDIO_REGISTER,
            &mut [range.start, len, mode, 0],
        )
        .context("UFFDIO_REGISTER")?;
        self.switch(range, MODE_PROTECT)
    }

    /// Releases it, and wakes who sleeps there. Closing the descriptor wakes those, too, who go to sleep only now: the kernel
    /// takes an entry that somebody is just changing for a missing page (`userfaultfd_must_wait()`), which nobody would fill.
    pub fn release(self, range: &Range<u64>) -> Result<()> {
        self.switch(range, 0)?;
        let mut argument = [range.start, range.end - range.start];
        ioctl(&self.file, UFFDIO_UNREGISTER, &mut argument).context("UFFDIO_UNREGISTER")
    }

    fn switch(&self, range: &Range<u64>, mode: u64) -> Result<()> {
        let mut argument = [range.start, range.end - range.start, mode];
        loop {
            match ioctl(&self.file, self.protection.request(), &mut argument) {
                // The mapping was about to change.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                other => return other.with_context(|| format!("{:?} protection", self.protection)),
            }
        }
    }

    /// How many accesses have been stopped since the last call.
    pub fn stopped(&mut self) -> Result<u64> {
        let mut stopped = 0;
        let mut message = [0; MESSAGE];
        loop {
            match self.file.read(&mut message) {
                Ok(_) => stopped += 1,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(stopped),
                Err(error) => return Err(error).context("read a userfaultfd"),
            }
        }
    }
}

/// A new userfaultfd with `features`, and the features that the kernel answers with.
fn open(features: u64) -> Result<(File, u64)> {
    // SAFETY: the call takes flags only and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error())
            .context("userfaultfd(): needs root and CONFIG_USERFAULTFD");
    }
    // SAFETY: the descriptor was just made for us and nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd as libc::c_int) };
    let mut argument = [API, features, 0];
    ioctl(&file, UFFDIO_API, &mut argument)
        .with_context(|| format!("UFFDIO_API with features {features:#x}"))?;
    Ok((file, argument[1]))
}

fn ioctl(file: &File, request: u64, argument: &mut [u64]) -> std::io::Result<()> {
    // SAFETY: each request reads and writes as many words as its number says, and `argument` has as many; protection
    // changes who may access memory when, not what it holds.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), request as _, argument.as_mut_ptr()) };
    match rc {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_headers() {
        assert_eq!(UFFDIO_API, 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER, 0xc020_aa00);
        assert_eq!(UFFDIO_UNREGISTER, 0x8010_aa01);
        assert_eq!(UFFDIO_WRITEPROTECT, 0xc018_aa06);
        assert_eq!(UFFDIO_RWPROTECT, 0xc018_aa09);
    }
}
