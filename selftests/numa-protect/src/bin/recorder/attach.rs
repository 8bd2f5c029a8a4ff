// SPDX-License-Identifier: GPL-2.0
//! Attaching and detaching: what is refused, by whom it can be done, and how often.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, Command};

use anyhow::{bail, ensure, Context, Result};
use guest::pages::Pages;
use trace::client::{Client, ROOT};

use crate::module::kernel_memory;
use crate::{attached, child, child_with, end, refused, write_once};

pub fn bad_input(file: &str) -> Result<()> {
    for text in [
        "",
        "\n",
        "pid",
        "1 2 3",
        "1 2 plain 3",
        "1 plain 2",
        "1 plain plain",
        "plain",
        "1 plan",
        "1 2 Plain",
        "1 overwrite nooverwrite",
        "1 overwrite 64",
        "1 nooverwrite plain overwrite",
        "-1",
        "12x",
        "0x10",
        "1.5",
    ] {
        refused(file, text, libc::EINVAL)?;
    }
    refused(file, "9".repeat(100), libc::E2BIG)?;
    refused(file, b"1 \xff", libc::EINVAL)?;
    for text in ["99999999999", "2147483648", "99999999999999999999999"] {
        refused(file, text, libc::ERANGE)?;
    }
    Ok(())
}

pub fn no_such_process() -> Result<()> {
    let gone = child()?;
    let pid = gone.id().to_string();
    end(gone)?;
    refused("attach", &pid, libc::ESRCH)?;
    refused("attach", "0", libc::ESRCH)
}

pub fn bad_size() -> Result<()> {
    let pid = std::process::id();
    for size in ["0", "3", "65535", "8388608"] {
        refused("attach", format!("{pid} {size}"), libc::EINVAL)?;
    }
    Ok(())
}

pub fn twice() -> Result<()> {
    let client = Client::attach_self(1024)?;
    let pid = std::process::id().to_string();
    refused("attach", &pid, libc::EEXIST)?;
    refused("attach", format!("{pid} 2048"), libc::EEXIST)?;
    ensure!(
        client.stats()?.size == 1024 * client.cpus() as u64,
        "the second attach changed the rings of the first"
    );
    Ok(())
}

/// A subscriber without `numa_protect` goes beside the one with it: each is attached once, and detached by itself.
pub fn plain() -> Result<()> {
    let pid = std::process::id().to_string();
    let plain = Client::attach_self_plain(1024)?;
    refused("attach", format!("{pid} plain"), libc::EEXIST)?;
    refused("detach", &pid, libc::ENOENT)?;
    let full = Client::attach_self(2048)?;
    for request in ["plain", "512 plain", "512"] {
        refused("attach", format!("{pid} {request}"), libc::EEXIST)?;
    }
    refused("detach", format!("{pid} 2048"), libc::EINVAL)?;
    refused("detach", format!("{pid} 1024 plain"), libc::EINVAL)?;
    let cpus = full.cpus() as u64;
    ensure!(
        (plain.stats()?.size, full.stats()?.size) == (1024 * cpus, 2048 * cpus),
        "one attach changed the rings of the other"
    );
    drop(full);
    let left = attached()?;
    ensure!(
        left.contains(&format!("{pid}.plain")) && !left.contains(&pid),
        "attached after one of two was detached: {left:?}"
    );
    let pages = Pages::new(16)?;
    pages.protect(libc::PROT_READ)?;
    let recorded = plain.stats()?.recorded;
    ensure!(recorded >= 2, "{recorded} records of one mprotect()");
    drop(plain);
    refused("detach", format!("{pid} plain"), libc::ENOENT)
}

pub fn not_attached() -> Result<()> {
    let pid = std::process::id().to_string();
    refused("detach", &pid, libc::ENOENT)?;
    refused("detach", format!("{pid} plain"), libc::ENOENT)
}

/// The pid is that of the writer's namespace, and so is the directory's name.
pub fn in_a_namespace() -> Result<()> {
    end(child_with("--namespace")?)
}

/// In a process of its own: makes the namespace, and has its first process attach to itself.
pub fn namespace() -> Result<()> {
    println!();
    // SAFETY: only this process's next children are elsewhere.
    let status = unsafe { libc::unshare(libc::CLONE_NEWPID) };
    ensure!(status == 0, "unshare: {}", io::Error::last_os_error());
    let status = Command::new(std::env::current_exe()?)
        .arg("--attach-self")
        .status()?;
    ensure!(status.success(), "in the namespace: {status}");
    Ok(())
}

/// As the first process of a namespace.
pub fn attach_self() -> Result<()> {
    let pid = std::process::id();
    ensure!(pid == 1, "pid {pid} in a new namespace");
    let client = Client::attach_self(64)?;
    let before = client.stats()?.recorded;
    Pages::new(4)?.protect(libc::PROT_READ)?;
    ensure!(client.stats()?.recorded > before, "nothing recorded");
    ensure!(attached()?.contains("1"), "no directory 1");
    drop(client);
    ensure!(!attached()?.contains("1"), "directory 1 is still there");
    Ok(())
}

/// Many processes at once, each with a directory and records of its own.
pub fn many_at_once() -> Result<()> {
    let children: Vec<Child> = (0..64).map(|_| child()).collect::<Result<_>>()?;
    let before = attached()?.len();
    for child in &children {
        write_once("attach", format!("{} 64", child.id()))?;
    }
    ensure!(attached()?.len() == before + 64, "not all are attached");
    let pids: Vec<u32> = children.iter().map(Child::id).collect();
    for child in children {
        end(child)?;
    }
    for pid in pids {
        let trace = std::fs::read_to_string(Path::new(ROOT).join(format!("{pid}/trace")))?;
        ensure!(trace.contains(": release:"), "{pid}: no release: {trace}");
        write_once("detach", pid.to_string())?;
    }
    ensure!(attached()?.len() == before, "not all are detached");
    Ok(())
}

/// Attached and detached again and again, the recorder takes no more memory.
pub fn many_times() -> Result<()> {
    const TIMES: u64 = 1000;
    const RING: u64 = 1 << 10;
    let target = child()?;
    let (mut before, mut size) = (0, 0);
    for time in 0..TIMES {
        if time == TIMES / 5 {
            before = kernel_memory()?;
        }
        let client = Client::attach(target.id(), &RING.to_string())?;
        size = client.stats()?.size;
    }
    let grown = kernel_memory()?.saturating_sub(before);
    let limit = TIMES / 5 * size * 64;
    end(target)?;
    ensure!(
        grown < limit,
        "the kernel uses {grown} bytes more, the rings of one in four times are {limit}"
    );
    Ok(())
}

/// Who has a file open reads no more of it once its target is detached, and nothing else happens.
pub fn detach_while_read() -> Result<()> {
    let target = child()?;
    write_once("attach", format!("{} 64", target.id()))?;
    let open = |file: &str| -> Result<File> {
        let path = Path::new(ROOT).join(format!("{}/{file}", target.id()));
        File::open(&path).with_context(|| path.display().to_string())
    };
    let mut files = [
        open("trace")?,
        open("stats")?,
        open("per_cpu/cpu0/records")?,
    ];
    files[0].read_exact(&mut [0])?;
    write_once("detach", target.id().to_string())?;
    for file in &mut files {
        match file.read(&mut [0]) {
            Err(error) if error.raw_os_error() == Some(libc::EIO) => {}
            other => bail!("read of {} after detaching: {other:?}", file.as_raw_fd()),
        }
    }
    // The name is free again, and the old files have nothing to do with it.
    let again = Client::attach(target.id(), "64")?;
    drop(files);
    ensure!(again.stats()?.size > 0, "attached again, without rings");
    drop(again);
    end(target)
}
