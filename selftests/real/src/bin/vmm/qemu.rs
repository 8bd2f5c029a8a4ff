// SPDX-License-Identifier: GPL-2.0
//! QEMU's command line, the only place that knows which VMM it is; starts nothing.

use std::path::Path;

use guest::memory::Backing;

/// Where it is, and what it comes with.
pub const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";
pub const PACKAGE: &str = "qemu-system-x86";

/// Boots Linux with `memory` MiB of `backing`, and the PCI device at `device` assigned. The serial port is standard output;
/// a restart of the guest ends it, with status 0.
pub fn command(
    (kernel, initrd): (&Path, &Path),
    command_line: &str,
    memory: u32,
    backing: Backing,
    device: Option<&str>,
) -> Vec<String> {
    let kind = match backing {
        // With MADV_HUGEPAGE; whether that gives huge pages is for who starts it to say.
        Backing::Anon | Backing::Thp => "memory-backend-ram",
        Backing::Memfd => "memory-backend-memfd,share=on",
    };
    // All of guest memory is there before the guest runs: allocated in the beginning, or pinned, but then without what the
    // guest does not see of it and the device does not reach, which would be hinted.
    let early = if device.is_some() { "off" } else { "on" };
    let memory_backend = format!("{kind},id=guest,size={memory}M,prealloc={early}");
    let mut words = vec![
        PROGRAM.to_string(),
        "-nodefaults".into(),
        "-no-user-config".into(),
        "-no-reboot".into(),
    ];
    let (kernel, initrd) = (kernel.display().to_string(), initrd.display().to_string());
    let memory = memory.to_string();
    for (option, value) in [
        ("-display", "none"),
        ("-monitor", "none"),
        ("-serial", "stdio"),
        ("-accel", "kvm"),
        ("-cpu", "host"),
        ("-smp", "2"),
        // A PC's firmware has the chipset move memory about, for which QEMU takes it from the device and so unpins it for a
        // moment, again and again.
        ("-machine", "microvm,pcie=on,memory-backend=guest"),
        ("-object", &memory_backend),
        ("-m", &memory),
        ("-kernel", &kernel),
        ("-initrd", &initrd),
        ("-append", command_line),
    ] {
        words.extend([option.to_string(), value.to_string()]);
    }
    if let Some(address) = device {
        words.extend(["-device".into(), format!("vfio-pci,host={address}")]);
    }
    words
}
