// SPDX-License-Identifier: GPL-2.0
//! KVM's binary statistics (Documentation/virt/kvm/api.rst, 4.131 KVM_GET_STATS_FD); reads only.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use anyhow::{bail, Context, Result};

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
/// `struct kvm_stats_header`: flags, name_size, num_desc, id_offset, desc_offset, data_offset, each u32.
const HEADER: usize = 24;
/// `struct kvm_stats_desc` before its name: flags u32, exponent s16, size u16, offset u32, bucket_size u32.
const DESCRIPTOR: usize = 16;

/// The statistics of one VM or of one vCPU.
pub struct Stats {
    file: File,
    /// Offset in the file of the first value of each statistic.
    offsets: HashMap<String, u64>,
}

impl Stats {
    /// Opens the statistics of a VM or vCPU. The file stays readable while the VM exists.
    pub fn open(kvm_object: &impl AsRawFd) -> Result<Stats> {
        // SAFETY: the ioctl takes no argument and returns a new descriptor or -1.
        let fd = unsafe { libc::ioctl(kvm_object.as_raw_fd(), KVM_GET_STATS_FD as _) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error())
                .context("KVM_GET_STATS_FD: needs Linux 5.14 or later");
        }
        // SAFETY: the descriptor was just made for us and nobody else owns it.
        let file = unsafe { File::from_raw_fd(fd) };

        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)
            .context("header of the KVM statistics")?;
        let [name_size, count, descriptors, data] =
            [4, 8, 16, 20].map(|at| u32_at(&header, at) as usize);

        let stride = DESCRIPTOR + name_size;
        let mut bytes = vec![0; stride * count];
        file.read_exact_at(&mut bytes, descriptors as u64)
            .context("descriptors of the KVM statistics")?;
        let offsets = bytes
            .chunks_exact(stride)
            .map(|one| {
                let name = one[DESCRIPTOR..].split(|b| *b == 0).next().unwrap_or(&[]);
                let offset = data as u64 + u64::from(u32_at(one, 8));
                (String::from_utf8_lossy(name).into_owned(), offset)
            })
            .collect();
        Ok(Stats { file, offsets })
    }

    /// The present value of `name`, e.g. `pf_fixed` (faults), `pages_4k` (mappings), `remote_tlb_flush`.
    pub fn read(&self, name: &str) -> Result<u64> {
        let Some(offset) = self.offsets.get(name) else {
            bail!("this kernel's KVM has no statistic {name}");
        };
        let mut value = [0; 8];
        self.file
            .read_exact_at(&mut value, *offset)
            .with_context(|| format!("KVM statistic {name}"))?;
        Ok(u64::from_le_bytes(value))
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
