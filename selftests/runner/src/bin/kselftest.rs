// SPDX-License-Identifier: GPL-2.0
//! Runs one of the kernel's own test collections in the test guest, with the tools of the 9p share `root`, the host's
//! toolchain root. May mount file systems below /root; run by /init as root, in a guest that is thrown away.
//!
//! Arguments: the folder of `make kselftest-install`, as the share sees it; the script to run there; its arguments.

use std::io;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, ensure, Context, Result};
use clap::Parser;
use runner::mount::{self, ROOT};

/// Runs a collection of the kernel's own tests.
#[derive(Parser)]
struct Args {
    /// Given by /init, not used: all output is on standard output.
    #[arg(long, default_value = ".")]
    results: PathBuf,
    /// Run it in a copy, for tests that leave files where they are.
    #[arg(long)]
    copy: bool,
    /// Folder of `make kselftest-install`, in the share.
    install: PathBuf,
    /// Script in that folder.
    script: PathBuf,
    /// Its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    mount::share()?;
    let from = Path::new(ROOT).join(args.install.strip_prefix("/").unwrap_or(&args.install));
    if !from.join(&args.script).exists() {
        bail!(
            "{}: not there: make test-kselftest installs it",
            from.join(&args.script).display()
        );
    }
    println!("KTAP version 1");
    // SAFETY: chroot() has no preconditions on memory; the string is static.
    if unsafe { libc::chroot(c"/root".as_ptr()) } != 0 {
        return Err(io::Error::last_os_error()).context("chroot");
    }
    let mut folder = args.install;
    if args.copy {
        standard_streams()?;
        let copy = Path::new("/tmp/install");
        let copied = Command::new("cp").arg("-r").arg(&folder).arg(copy).status();
        ensure!(
            copied.context("cp")?.success(),
            "cp -r {}",
            folder.display()
        );
        folder = copy.into();
    }
    let error = Command::new(Path::new("./").join(&args.script))
        .args(&args.arguments)
        .current_dir(&folder)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/tmp")
        .exec();
    Err(error).with_context(|| args.script.display().to_string())
}

/// Makes what devtmpfs alone does not have, and kselftest's runner writes to what a test prints.
fn standard_streams() -> Result<()> {
    for (name, number) in [("stdin", 0), ("stdout", 1), ("stderr", 2)] {
        let link = Path::new("/dev").join(name);
        match symlink(format!("/proc/self/fd/{number}"), &link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other.with_context(|| link.display().to_string())?,
        }
    }
    Ok(())
}
