// SPDX-License-Identifier: GPL-2.0
//! Mounts a file system in the test guest; makes the folder to mount on.

use std::ffi::CString;
use std::{fs, io};

use anyhow::{Context, Result};

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
