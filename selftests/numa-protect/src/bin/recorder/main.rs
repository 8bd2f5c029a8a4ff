// SPDX-License-Identifier: GPL-2.0
//! The recorder itself: what it answers to bad input, what it records of a known sequence, and that nothing of it stays
//! behind. Attaches to itself and to children of its own; loads and unloads the module.
//!
//! Prints KTAP. Without the module, loaded or at `--module`, all tests are skipped.

mod attach;
mod files;
mod load;
mod module;
mod records;
mod scanned;
mod tool;

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{bail, ensure, Context, Result};
use clap::Parser;
use guest::balancing;
use guest::ktap::{Ktap, Outcome};
use guest::needs;
use trace::client::{is_loaded, ROOT};

const MODULE: &str = "mmu_notifier_trace";

/// The recorder: bad input, a known sequence, loading and unloading.
#[derive(Parser)]
struct Args {
    /// Folder for results; this program leaves none.
    #[arg(long, default_value = ".")]
    results: PathBuf,
    /// Only the tests with this in their name.
    #[arg(long, default_value = "")]
    only: String,
    /// The module, for the tests that load it.
    #[arg(long, default_value_os_t = needs::beside("mmu_notifier_trace.ko", "/mmu_notifier_trace.ko"))]
    module: PathBuf,
    /// The tool, for the tests that run it.
    #[arg(long, default_value_os_t = needs::beside("mmu-notifier-trace", "/bin/mmu-notifier-trace"))]
    tool: PathBuf,
    /// How long every CPU is kept busy with what is recorded, in seconds.
    #[arg(long, default_value_t = 2)]
    load_seconds: u64,
    /// Do nothing until the end of standard input: be the process that the tests attach to.
    #[arg(long, hide = true)]
    wait: bool,
    /// Become another program, which waits, at the first byte of standard input.
    #[arg(long, hide = true)]
    exec: bool,
    /// Make a pid namespace and attach to a process in it, from there.
    #[arg(long, hide = true)]
    namespace: bool,
    /// Attach to oneself.
    #[arg(long, hide = true)]
    attach_self: bool,
    /// Have memory that is scanned, until the end of standard input.
    #[arg(long, hide = true)]
    scanned: bool,
    /// Be a virtual machine for a moment.
    #[arg(long, hide = true)]
    guest: bool,
}

type Test = fn(&Args) -> Result<()>;

const TESTS: &[(&str, Test)] = &[
    ("attach.bad_input", |_| attach::bad_input("attach")),
    ("attach.no_such_process", |_| attach::no_such_process()),
    ("attach.kernel_thread", |_| {
        refused("attach", "2", libc::EINVAL)
    }),
    ("attach.bad_size", |_| attach::bad_size()),
    ("attach.twice", |_| attach::twice()),
    ("attach.plain", |_| attach::plain()),
    ("attach.in_a_namespace", |_| attach::in_a_namespace()),
    ("attach.64_at_once", |_| attach::many_at_once()),
    ("attach.1000_times", |_| attach::many_times()),
    ("detach.bad_input", |_| attach::bad_input("detach")),
    ("detach.not_attached", |_| attach::not_attached()),
    ("detach.while_read", |_| attach::detach_while_read()),
    ("files.version_and_size", |_| files::version_and_size()),
    ("files.enabled", |_| files::enabled()),
    ("files.filter", |_| files::filter()),
    ("files.marker", |_| files::marker()),
    ("files.trace_of_all_cpus", |_| files::trace_of_all_cpus()),
    ("files.reading", |_| files::reading()),
    ("records.known_sequence", |_| records::known_sequence()),
    ("records.overwritten", |_| on_cpu(1, records::overwritten)),
    ("records.dropped", |_| on_cpu(1, records::dropped)),
    ("records.every_cpu_at_once", |args| {
        load::every_cpu_at_once(args.load_seconds)
    }),
    ("records.not_of_children", |_| records::not_of_children()),
    ("records.after_exit", |_| records::after_exit()),
    ("records.after_exec", |_| records::after_exec()),
    ("records.after_kill", |_| records::after_kill()),
    ("records.killed_in_scan", |_| scanned::killed()),
    ("tool.command", tool::command),
    ("tool.process", tool::process),
    ("tool.stat", tool::stat),
    ("tool.guest", tool::guest),
    ("module.kunit", |_| module::kunit()),
    ("module.unload_while_open", module::unload_while_open),
    (
        "module.unload_while_attached",
        module::unload_while_attached,
    ),
    ("module.unload_in_scan", scanned::unload_while_scanned),
    ("module.parameters", module::parameters),
    ("module.cycles", module::cycles),
];

fn main() -> ExitCode {
    let args = Args::parse();
    let child = match &args {
        Args { wait: true, .. } => Some(wait()),
        Args { exec: true, .. } => Some(exec()),
        Args {
            namespace: true, ..
        } => Some(attach::namespace()),
        Args {
            attach_self: true, ..
        } => Some(attach::attach_self()),
        Args { scanned: true, .. } => Some(scanned::be_scanned()),
        Args { guest: true, .. } => Some(tool::be_guest()),
        _ => None,
    };
    match child {
        Some(Ok(())) => return ExitCode::SUCCESS,
        Some(Err(error)) => {
            eprintln!("{error:#}");
            return ExitCode::FAILURE;
        }
        None => {}
    }
    let chosen: Vec<_> = TESTS
        .iter()
        .map(|(name, test)| (format!("recorder.{name}"), test))
        .filter(|(name, _)| name.contains(&args.only))
        .collect();
    if chosen.is_empty() {
        eprintln!("--only {}: no such test", args.only);
        return ExitCode::FAILURE;
    }
    let mut ktap = Ktap::start(chosen.len());
    let no_scans = needs::missing([&needs::TWO_NODES, &needs::NUMA_BALANCING]);
    let no_guest = needs::missing([&needs::KVM, &needs::KPROBE_EVENTS]);
    for (name, test) in chosen {
        let outcome = match () {
            () if !is_loaded() => {
                Outcome::Skip(format!("{MODULE} not loaded (CONFIG_RUST, insmod)"))
            }
            () if name.contains(".in_a_namespace") && !Path::new("/proc/self/ns/pid").exists() => {
                Outcome::Skip("no pid namespaces: CONFIG_PID_NS".into())
            }
            () if name.contains(".tool.") && !args.tool.exists() => {
                Outcome::Skip(format!("no {}: --tool", args.tool.display()))
            }
            () if name.ends_with(".guest") && no_guest.is_some() => {
                Outcome::Skip(no_guest.clone().unwrap_or_default())
            }
            () if name.ends_with("_in_scan") && no_scans.is_some() => {
                Outcome::Skip(no_scans.clone().unwrap_or_default())
            }
            () if name.ends_with(".kunit") && !Path::new(module::KUNIT).exists() => {
                Outcome::Skip(format!("no {}: CONFIG_KUNIT_DEBUGFS", module::KUNIT))
            }
            () if name.contains(".module.") && !args.module.exists() => {
                Outcome::Skip(format!("no {}: --module", args.module.display()))
            }
            () => match test(&args) {
                Ok(()) => Outcome::Ok,
                Err(error) => Outcome::NotOk(format!("{error:#}")),
            },
        };
        ktap.result(&name, &outcome);
    }
    ktap.finish()
}

fn wait() -> Result<()> {
    println!();
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(())
}

fn exec() -> Result<()> {
    println!();
    io::stdin().read_exact(&mut [0])?;
    Err(Command::new(std::env::current_exe()?)
        .arg("--wait")
        .exec()
        .into())
}

/// One write(2) of `text`, however short, to a file below the recorder's folder.
fn write_once(file: impl AsRef<Path>, text: impl AsRef<[u8]>) -> io::Result<()> {
    let text = text.as_ref();
    let file = fs::OpenOptions::new()
        .write(true)
        .open(Path::new(ROOT).join(file))?;
    // SAFETY: the descriptor is open and the buffer is as long as said.
    let written = unsafe { libc::write(file.as_raw_fd(), text.as_ptr().cast(), text.len()) };
    match written {
        -1 => Err(io::Error::last_os_error()),
        _ if written as usize == text.len() => Ok(()),
        _ => Err(io::Error::other(format!(
            "{written} of {} bytes written",
            text.len()
        ))),
    }
}

/// The names in the recorder's folder.
fn attached() -> Result<BTreeSet<String>> {
    let names =
        fs::read_dir(ROOT)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

/// Writing `text` fails with `errno` and changes nothing.
fn refused(file: &str, text: impl AsRef<[u8]>, errno: i32) -> Result<()> {
    let before = attached()?;
    let answer = write_once(file, &text);
    let text = String::from_utf8_lossy(text.as_ref());
    let expected = io::Error::from_raw_os_error(errno);
    match answer {
        Ok(()) => bail!("{file} takes {text:?}; expected: {expected}"),
        Err(error) if error.raw_os_error() != Some(errno) => {
            bail!("{file} answers {text:?} with: {error}; expected: {expected}")
        }
        Err(_) => ensure!(
            attached()? == before,
            "{text:?}, though refused, changed what is attached"
        ),
    }
    Ok(())
}

/// A process that lives until it is given an end of its input.
fn child() -> Result<Child> {
    child_with("--wait")
}

/// This program as a process of its own, told what to do.
fn child_with(argument: &str) -> Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.arg(argument).spawn()?;
    // Until its program runs, its address space can still be this process's.
    let stdout = child.stdout.as_mut().context("the child's output")?;
    stdout.read_exact(&mut [0])?;
    Ok(child)
}

fn end(mut child: Child) -> Result<()> {
    drop(child.stdin.take());
    let status = child.wait()?;
    ensure!(
        status.success(),
        "the child did not come to its end: {status}"
    );
    Ok(())
}

/// Runs `body` in a thread on this CPU.
fn on_cpu(cpu: usize, body: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            balancing::set_affinity(&[cpu])?;
            body()
        });
        thread
            .join()
            .unwrap_or_else(|_| bail!("the thread panicked"))
    })
}
