// SPDX-License-Identifier: GPL-2.0
//! A virtual machine for tests of NUMA balancing: it touches `/dev/kvm`, its own memory and its own threads,
//! and, in [`balancing`], [`memcg`], [`ksm`] and [`tracefs`], settings of the machine that are put back.
//!
//! Every count of pages, here and in the programs, is in base pages of [`PAGE`] bytes, huge pages included.
//!
//! - [`memory`]: guest memory of a chosen backing, on a chosen node, pinned or not, with known contents.
//! - [`pins`]: who pins it: io_uring, or a device that is assigned to this process.
//! - [`access`]: pins that come and go, those of a mediated device.
//! - [`vm`]: the machine and its vCPU threads, which sweep that memory.
//! - [`linux`]: a machine that boots Linux in that memory.
//! - [`workload`]: what the guest does there.
//! - [`stats`]: KVM's binary statistics.
//! - [`balancing`]: NUMA balancing of this process: CPUs, policies, scans.
//! - [`memcg`]: what the memory cgroup counted of it.
//! - [`ksm`]: merging of equal pages.
//! - [`tracefs`]: how often a tracepoint fired.
//! - [`unmaps`]: what KVM unmapped, and on whose account.
//! - [`spans`]: how long functions of the kernel took.
//! - [`pages`]: pages that are protected and discarded at will.
//! - [`needs`]: what the machine must have for all that.
//! - [`spread`]: what values measured several times come to.
//! - [`ktap`]: how results are printed.

#![deny(missing_docs)]

pub mod access;
pub mod balancing;
pub mod ksm;
pub mod ktap;
pub mod linux;
pub mod memcg;
pub mod memory;
pub mod needs;
pub mod pages;
pub mod pins;
pub mod spans;
pub mod spread;
pub mod stats;
pub mod tracefs;
pub mod unmaps;
pub mod vm;
pub mod workload;

/// Size of a base page in bytes.
pub const PAGE: usize = 4096;

/// The system's answer that an error goes back to, if it goes back to one.
pub fn errno(error: &anyhow::Error) -> Option<i32> {
    error.chain().find_map(|cause| {
        let system = cause.downcast_ref::<std::io::Error>();
        let kvm = cause.downcast_ref::<kvm_ioctls::Error>();
        system
            .and_then(std::io::Error::raw_os_error)
            .or(kvm.map(|error| error.errno()))
    })
}
