// SPDX-License-Identifier: GPL-2.0
//! PID 1 of the test guest: mounts the file systems, loads the recorder, runs the test programs one after the
//! other, powers off. Touches the guest only; the results leave it through the 9p share `results`.
//!
//! Arguments (after `-- --run` on the kernel's command line): names of programs in /tests, or paths of others, each with its
//! own arguments after commas (`NAME,--arg,value`); none means all those in /tests. `--trial` only says that user space was
//! reached. What comes before `--run` are parameters that the kernel does not know, or `--chroot`: another init booted the
//! guest and gave this one a folder of its own, so it ends, with status 0 where everything ran, and leaves the rest to that.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use runner::marker::{Marker, Status};
use runner::mount::mount;

const MODULE: &str = "mmu_notifier_trace";
/// Where a kernel with CONFIG_DEBUG_KMEMLEAK says which of its memory nothing refers to any more.
const LEAKS: &str = "/sys/kernel/debug/kmemleak";
/// Younger memory is never called leaked: whoever asked for it may not have noted its address yet.
const LEAK_AGE: Duration = Duration::from_secs(6);

fn main() {
    let run_at = std::env::args().position(|argument| argument == "--run");
    let arguments: Vec<String> = std::env::args()
        .skip(run_at.map_or(usize::MAX, |at| at + 1))
        .collect();
    let chroot = std::env::args().nth(1).as_deref() == Some("--chroot");
    if std::process::id() != 1 && !chroot {
        eprintln!("init: this is the first program of a test guest; scripts/boot starts it");
        std::process::exit(1);
    }
    let outcome = run(&arguments);
    if let Err(error) = &outcome {
        say(&Marker::Error(format!("{error:#}").replace('\n', "; ")));
    }
    if chroot {
        std::process::exit(outcome.is_err().into());
    }
    power_off();
}

fn run(arguments: &[String]) -> Result<()> {
    mount("proc", "/proc", "proc", "")?;
    mount("sysfs", "/sys", "sysfs", "")?;
    mount("devtmpfs", "/dev", "devtmpfs", "")?;
    say(&Marker::UserSpace {
        kvm: Path::new("/dev/kvm").exists(),
    });
    if arguments.iter().any(|argument| argument == "--trial") {
        say(&Marker::Done);
        return Ok(());
    }
    mount("debugfs", "/sys/kernel/debug", "debugfs", "")?;
    mount("tracefs", "/sys/kernel/tracing", "tracefs", "")?;
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", "")?;
    mount("tmpfs", "/tmp", "tmpfs", "")?;
    mount(
        "results",
        "/results",
        "9p",
        "trans=virtio,version=9p2000.L,msize=262144",
    )?;
    let module = load_module().with_context(|| format!("loading /{MODULE}.ko"))?;
    let mut programs = arguments.to_vec();
    if programs.is_empty() {
        for entry in fs::read_dir("/tests").context("/tests")? {
            programs.push(entry?.file_name().to_string_lossy().into_owned());
        }
        programs.sort();
    }
    for program in &programs {
        let mut words = program.split(',');
        let path = Path::new("/tests").join(words.next().unwrap_or_default());
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        say(&Marker::Run(name.to_string()));
        let status = run_program(&path, &name, words)
            .with_context(|| format!("running {}", path.display()))?;
        fs::write(format!("/results/{name}.status"), format!("{status}\n")).context("/results")?;
        say(&Marker::Ended(name.to_string(), status));
    }
    if module {
        unload_module().with_context(|| format!("unloading {MODULE}"))?;
    }
    find_leaks().context(LEAKS)?;
    say(&Marker::Done);
    Ok(())
}

/// Runs one program; its standard output goes to the console and to /results/NAME.ktap.
fn run_program<'a>(
    path: &Path,
    name: &str,
    arguments: impl Iterator<Item = &'a str>,
) -> Result<Status> {
    let mut file = File::create(format!("/results/{name}.ktap"))?;
    let mut child = Command::new(path)
        .args(["--results", "/results"])
        .args(arguments)
        .current_dir("/tmp")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let output = child.stdout.take().context("no pipe")?;
    for line in BufReader::new(output).split(b'\n') {
        let mut line = line?;
        line.push(b'\n');
        io::stdout().write_all(&line)?;
        file.write_all(&line)?;
    }
    let status = child.wait()?;
    match (status.code(), status.signal()) {
        (Some(code), _) => Ok(Status::Exit(code)),
        (None, Some(signal)) => Ok(Status::Signal(signal)),
        (None, None) => bail!("neither exit nor signal: {status}"),
    }
}

fn say(marker: &Marker) {
    // Begin a line of its own whatever a program left there. Nobody is left to hear of an error here.
    let _ = write!(io::stdout(), "\n{marker}\n").and_then(|()| io::stdout().flush());
}

/// What the kernel's command line says of the module's parameters, as modprobe takes it from there.
fn parameters() -> Result<CString> {
    let text = fs::read_to_string("/proc/cmdline")?;
    let prefix = format!("{MODULE}.");
    let ours = text
        .split_whitespace()
        .filter_map(|word| word.strip_prefix(&prefix[..]));
    Ok(CString::new(ours.collect::<Vec<_>>().join(" "))?)
}

/// Whether there was a module to load.
fn load_module() -> Result<bool> {
    let file = match File::open(format!("/{MODULE}.ko")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        file => file?,
    };
    let parameters = parameters()?;
    // SAFETY: the descriptor is open, and the parameters are a string.
    let status = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            parameters.as_ptr(),
            0,
        )
    };
    if status != 0 {
        return Err(io::Error::last_os_error().into());
    }
    Ok(true)
}

fn unload_module() -> Result<()> {
    let name = CString::new(MODULE)?;
    // SAFETY: the name is a valid string for the call.
    let status = unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) };
    if status != 0 {
        return Err(io::Error::last_os_error().into());
    }
    Ok(())
}

/// Has the kernel look for memory that it leaked, and prints what it finds behind the kernel's own report.
fn find_leaks() -> Result<()> {
    if !Path::new(LEAKS).exists() {
        return Ok(());
    }
    std::thread::sleep(LEAK_AGE);
    fs::write(LEAKS, "scan")?;
    io::stdout().write_all(&fs::read(LEAKS)?)?;
    Ok(())
}

fn power_off() -> ! {
    // SAFETY: no arguments but the command; does not return where the machine can power off.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
        // A machine that cannot power off restarts; QEMU's -no-reboot ends there.
        libc::reboot(libc::RB_AUTOBOOT);
    }
    loop {
        std::thread::park();
    }
}
