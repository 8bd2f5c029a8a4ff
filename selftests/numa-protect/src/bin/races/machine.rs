// SPDX-License-Identifier: GPL-2.0
//! Settings of the machine for the races, and swap space on RAM disks; all is put back when dropped.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use guest::PAGE;

/// RAM disks that are used, at the most; by default they have 4 MiB each.
const DISKS: usize = 8;

/// Files in sysfs, debugfs or procfs with other values for a while.
pub struct Settings(Vec<(PathBuf, String)>);

impl Settings {
    /// Writes to each path its value, in order; they are put back in reverse order.
    pub fn replace(values: &[(&str, &str)]) -> Result<Settings> {
        let mut settings = Settings(Vec::new());
        for (path, value) in values {
            let old = fs::read_to_string(path).with_context(|| format!("{path}: needs root"))?;
            fs::write(path, value).with_context(|| format!("{path}: {value}"))?;
            settings.0.push((PathBuf::from(path), old));
        }
        Ok(settings)
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        for (path, old) in self.0.iter().rev() {
            if let Err(error) = fs::write(path, old.trim()) {
                eprintln!("{}: not put back: {error}", path.display());
            }
        }
    }
}

/// Swap space on RAM disks, in use.
pub struct Swap(Vec<CString>);

impl Swap {
    /// Whether there can be any.
    pub fn is_there() -> bool {
        Path::new("/dev/ram0").exists() && Path::new("/proc/swaps").exists()
    }

    /// Makes RAM disks into swap space. What was on them is lost.
    pub fn on() -> Result<Swap> {
        let mut swap = Swap(Vec::new());
        for disk in 0..DISKS {
            let path = format!("/dev/ram{disk}");
            if !Path::new(&path).exists() {
                break;
            }
            format_swap(&path).with_context(|| format!("make {path} swap space"))?;
            let path = CString::new(path)?;
            // SAFETY: the path is a valid string for the call.
            if unsafe { libc::swapon(path.as_ptr(), 0) } != 0 {
                return Err(std::io::Error::last_os_error())
                    .with_context(|| format!("swapon({path:?}): is CONFIG_SWAP set?"));
            }
            swap.0.push(path);
        }
        if swap.0.is_empty() {
            bail!("no RAM disk: CONFIG_BLK_DEV_RAM");
        }
        Ok(swap)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        for path in &self.0 {
            // SAFETY: the path is a valid string for the call.
            if unsafe { libc::swapoff(path.as_ptr()) } != 0 {
                eprintln!("swapoff({path:?}): {}", std::io::Error::last_os_error());
            }
        }
    }
}

/// Writes the header of swap space (`union swap_header` of include/linux/swap.h).
fn format_swap(path: &str) -> Result<()> {
    let mut disk = File::options().read(true).write(true).open(path)?;
    let size = disk.seek(SeekFrom::End(0))?;
    disk.write_all_at(&swap_header(size)?, 0)?;
    disk.sync_all()?;
    Ok(())
}

fn swap_header(size: u64) -> Result<[u8; PAGE]> {
    const INFO: usize = 1024;
    const MAGIC: &[u8; 10] = b"SWAPSPACE2";
    let pages = u32::try_from(size / PAGE as u64)?;
    if pages < 10 {
        bail!("{size} bytes are too few");
    }
    let mut header = [0; PAGE];
    // The version, then the last page.
    header[INFO..INFO + 4].copy_from_slice(&1u32.to_ne_bytes());
    header[INFO + 4..INFO + 8].copy_from_slice(&(pages - 1).to_ne_bytes());
    header[PAGE - MAGIC.len()..].copy_from_slice(MAGIC);
    Ok(header)
}

/// A counter of `/proc/vmstat`; 0 where the kernel has none of that name.
pub fn vmstat(name: &str) -> Result<u64> {
    let path = "/proc/vmstat";
    let text = fs::read_to_string(path).context(path)?;
    let value = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == name)
        .map_or(Ok(0), |(_, value)| value.trim().parse());
    value.context(path)
}

#[cfg(test)]
mod tests {
    use super::swap_header;

    #[test]
    fn a_swap_header_has_its_fields_where_the_kernel_looks() {
        let header = swap_header(4 << 20).unwrap();
        assert_eq!(header[1024..1032], [1, 0, 0, 0, 0xff, 3, 0, 0]);
        assert_eq!(&header[4086..], b"SWAPSPACE2");
        assert!(header[..1024].iter().all(|byte| *byte == 0));
        assert!(swap_header(8192).is_err());
    }
}
