// SPDX-License-Identifier: GPL-2.0
//! What a machine must have for a test, and what to say where it has not; only looks.

use std::path::{Path, PathBuf};

/// A file that a test cannot do without.
pub struct Need {
    /// The file or folder.
    pub path: &'static str,
    /// What provides it.
    pub remedy: &'static str,
}

/// Virtual machines.
pub const KVM: Need = Need {
    path: "/dev/kvm",
    remedy: "CONFIG_KVM_INTEL or CONFIG_KVM_AMD, and a processor that KVM runs on",
};
/// A node for guest memory, and one for vCPUs.
pub const TWO_NODES: Need = Need {
    path: "/sys/devices/system/node/node1/cpulist",
    remedy: "two NUMA nodes, and CONFIG_NUMA",
};
/// Scans.
pub const NUMA_BALANCING: Need = Need {
    path: "/proc/sys/kernel/numa_balancing",
    remedy: "CONFIG_NUMA_BALANCING",
};
/// Their settings.
pub const SCAN_SETTINGS: Need = Need {
    path: "/sys/kernel/debug/sched/numa_balancing",
    remedy: "CONFIG_DEBUG_FS, mounted, and root",
};
/// Counts of one test only.
pub const MEMCG: Need = Need {
    path: "/sys/fs/cgroup/cgroup.subtree_control",
    remedy: "CONFIG_MEMCG, and cgroup2 mounted",
};
/// Memory of one node only, for a while.
pub const CPUSETS: Need = Need {
    path: "/sys/fs/cgroup/cpuset.mems.effective",
    remedy: "CONFIG_CPUSETS, and cgroup2 mounted",
};
/// Huge pages.
pub const THP: Need = Need {
    path: "/sys/kernel/mm/transparent_hugepage",
    remedy: "CONFIG_TRANSPARENT_HUGEPAGE",
};
/// Pins.
pub const IO_URING: Need = Need {
    path: "/proc/sys/kernel/io_uring_disabled",
    remedy: "CONFIG_IO_URING",
};
/// Devices by VFIO's container.
pub const VFIO_TYPE1: Need = Need {
    path: "/dev/vfio/vfio",
    remedy: "CONFIG_VFIO_IOMMU_TYPE1",
};
/// Devices by iommufd.
pub const IOMMUFD: Need = Need {
    path: "/dev/iommu",
    remedy: "CONFIG_IOMMUFD",
};
/// Merging of equal pages.
pub const KSM: Need = Need {
    path: "/sys/kernel/mm/ksm/run",
    remedy: "CONFIG_KSM",
};
/// The recorder.
pub const RECORDER: Need = Need {
    path: "/sys/kernel/debug/mmu_notifier_trace/attach",
    remedy: "mmu_notifier_trace loaded (CONFIG_RUST, insmod)",
};

/// Events where functions begin and end.
pub const KPROBE_EVENTS: Need = Need {
    path: "/sys/kernel/tracing/kprobe_events",
    remedy: "CONFIG_KPROBE_EVENTS, and tracefs mounted",
};
/// The time between two events.
pub const HIST_TRIGGERS: Need = Need {
    path: "/sys/kernel/tracing/synthetic_events",
    remedy: "CONFIG_HIST_TRIGGERS, and tracefs mounted",
};

/// Says which of `needs` is not there, and what provides it.
pub fn missing<'a>(needs: impl IntoIterator<Item = &'a Need>) -> Option<String> {
    let gone = needs
        .into_iter()
        .find(|need| !Path::new(need.path).exists());
    gone.map(|need| format!("no {}: needs {}", need.path, need.remedy))
}

/// The file `name` beside this program, as the kernel's own runner has it; else where the test guest has it.
pub fn beside(name: &str, in_guest: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let beside = own.with_file_name(name);
    match beside.exists() {
        true => beside,
        false => in_guest.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_is_missing_is_named() {
        let need = |path, remedy| Need { path, remedy };
        let (there, gone) = (need("/proc", ""), need("/proc/no-such", "CONFIG_X"));
        assert_eq!(missing([&there]), None);
        let named = Some("no /proc/no-such: needs CONFIG_X".into());
        assert_eq!(missing([&there, &gone, &need("/proc/none", "")]), named);
    }

    #[test]
    fn what_is_installed_beside_the_program_comes_first() {
        let own = std::env::current_exe().unwrap();
        let name = own.file_name().unwrap().to_str().unwrap();
        assert_eq!(beside(name, "/elsewhere"), own);
        assert_eq!(beside("no-such", "/elsewhere"), Path::new("/elsewhere"));
    }
}
