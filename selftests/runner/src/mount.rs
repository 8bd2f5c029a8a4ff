// SPDX-License-Identifier: GPL-2.0
//! Mounts file systems in the test guest; makes the folders to mount on.

use std::ffi::CString;
use std::path::Path;
use std::{fs, io};

use anyhow::{Context, Result};

/// Where [`share`] goes.
pub const ROOT: &str = "/root";

/// Mounts the 9p share `root`, the host's toolchain root, and what a root file system has below it, for programs that are
/// run in it. Once only.
pub fn share() -> Result<()> {
    mount(
        "root",
        ROOT,
        "9p",
        "ro,trans=virtio,version=9p2000.L,msize=262144,cache=loose",
    )?;
    for (kind, at) in [
        ("tmpfs", "tmp"),
        ("tmpfs", "run"),
        ("proc", "proc"),
        ("sysfs", "sys"),
        ("devtmpfs", "dev"),
        ("debugfs", "sys/kernel/debug"),
        ("tracefs", "sys/kernel/tracing"),
        ("cgroup2", "sys/fs/cgroup"),
    ] {
        mount(kind, &format!("{ROOT}/{at}"), kind, "")?;
    }
    fs::create_dir_all(Path::new(ROOT).join("dev/shm")).context("dev/shm")?;
    mount("tmpfs", &format!("{ROOT}/dev/shm"), "tmpfs", "")
}

/// Mounts `source`, a file system of `kind`, at `target`, which is made if it is not there.
pub fn mount(source: &str, target: &str, kind: &str, options: &str) -> Result<()> {
    fs::create_dir_all(target).with_context(|| target.to_string())?;
    let c = |text: &str| CString::new(text);
    let (source, target_c, kind_c, options) = (c(source)?, c(target)?, c(kind)?, c(options)?);
    // SAFETY: all five are valid for the call; the kernel copies them.
    let status = unsafe {
        libc::mount(
            source.as_ptr(),
            target_c.as_ptr(),
            kind_c.as_ptr(),
            0,
            options.as_ptr().cast(),
        )
    };
    if status != 0 {
        return Err(io::Error::last_os_error())
            .with_context(|| format!("mounting {kind} at {target}"));
    }
    Ok(())
}
