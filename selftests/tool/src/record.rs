// SPDX-License-Identifier: GPL-2.0
//! Records a process into a file. Starts the process, if it is a command; attaches the recorder to it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};
use trace::client::{self, Client};
use trace::filter::Filter;
use trace::record::kind;
use trace::saved::{About, Writer};
use trace::started::Started;

use crate::slots::Watch;

/// The file unless another is given, as perf and trace-cmd have theirs.
pub const FILE: &str = "mmu-notifier-trace.dat";
/// How often records are fetched. A ring has to hold what comes meanwhile.
const PERIOD: Duration = Duration::from_millis(50);

/// What to record, and where to.
#[derive(Args)]
pub struct Options {
    /// The file to write; it must not be there
    #[arg(short, long, default_value = FILE)]
    output: PathBuf,
    /// Records in the ring of each CPU, a power of two; the module's parameter if not given
    #[arg(short, long)]
    records: Option<u64>,
    /// Keep the first records when rings are full, not the last
    #[arg(long)]
    nooverwrite: bool,
    /// Subscribe without `numa_protect`, as subscribers that were written before it existed
    #[arg(long)]
    plain: bool,
    /// Which records to keep: `callback=NAME,... event=NAME,... range=START-END numa`
    #[arg(short, long, default_value = "", value_parser = filter)]
    filter: String,
    /// Stop after so many seconds
    #[arg(short, long)]
    duration: Option<f64>,
    /// A process that runs
    #[arg(
        short,
        long,
        required_unless_present = "command",
        conflicts_with = "command"
    )]
    pid: Option<u32>,
    /// A command to run, from its first instruction on
    #[arg(last = true)]
    command: Vec<String>,
}

fn filter(text: &str) -> Result<String, String> {
    let names = |name: fn(u8) -> &'static str, range: std::ops::RangeInclusive<u8>| {
        range.map(name).collect::<Vec<_>>().join(", ")
    };
    match Filter::parse(text) {
        Some(_) => Ok(text.into()),
        None => Err(format!(
            "words that all must hold: callback= with {}; event= with {}; range=START-END, hexadecimal; numa",
            names(kind::name, kind::INVALIDATE_RANGE_START..=kind::RELEASE),
            names(trace::record::event::name, trace::record::event::UNMAP..=trace::record::event::EXCLUSIVE),
        )),
    }
}

/// Records; gives the exit status of the command, if there is one.
pub fn record(options: Options) -> Result<ExitCode> {
    ensure!(
        client::is_loaded(),
        "{}: not there; insmod mmu_notifier_trace.ko, as root, and mount debugfs",
        client::ROOT
    );
    ensure!(
        !options.output.exists(),
        "{}: is there already: move it away, or choose another with --output",
        options.output.display()
    );
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, stop.clone()).context("signals")?;
    }
    let started = match options.pid {
        Some(_) => None,
        None => {
            let [program, arguments @ ..] = &options.command[..] else {
                bail!("no command");
            };
            Some(Started::new(Command::new(program).args(arguments))?)
        }
    };
    let pid = options
        .pid
        .or_else(|| started.as_ref().map(Started::id))
        .context("neither a process nor a command")?;
    let mut words = options.records.map_or(String::new(), |one| one.to_string());
    for (is_set, word) in [
        (options.nooverwrite, " nooverwrite"),
        (options.plain, " plain"),
    ] {
        words += if is_set { word } else { "" };
    }
    let mut client = Client::attach(pid, &words).with_context(|| why(pid))?;
    if !options.filter.is_empty() {
        fs::write(client.path("filter"), &options.filter).context("filter")?;
    }
    let mut about = About {
        pid,
        command: command_line(pid),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
            .trim()
            .into(),
        // SAFETY: takes a number, returns one.
        page_size: unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64,
        words: words.trim().into(),
        filter: options.filter.clone(),
        stats: None,
    };
    let mut writer = Writer::create(&options.output, &about)
        .with_context(|| options.output.display().to_string())?;
    let mut slots = watch_slots(&about);
    let mut child = started.map(Started::go_on).transpose()?;

    let begun = Instant::now();
    let limit = options.duration.map(Duration::from_secs_f64);
    let (mut records, mut released) = (0, false);
    let status = loop {
        let ended = match &mut child {
            Some(child) => child.try_wait().context("wait for the command")?,
            None => None,
        };
        let mut new = Vec::new();
        client.read_new(&mut new)?;
        released |= new.iter().any(|one| one.kind == kind::RELEASE);
        records += new.len();
        match slots.as_mut().map(Watch::read_new) {
            Some(Ok(set)) => new.extend(set),
            Some(Err(error)) => {
                eprintln!("guest pages are not recorded any more: {error:#}");
                slots = None;
            }
            None => {}
        }
        writer
            .append(&new)
            .with_context(|| options.output.display().to_string())?;
        let late = limit.is_some_and(|limit| begun.elapsed() >= limit);
        if ended.is_some() || late || stop.load(Ordering::Relaxed) || released && child.is_none() {
            break ended;
        }
        std::thread::sleep(PERIOD);
    };
    let stats = client.stats()?;
    about.stats = Some(stats);
    if about.command.is_empty() {
        about.command = command_line(pid);
    }
    writer.finish(&about)?;
    eprintln!(
        "{records} records of {pid} in {}; {} overwritten, {} dropped, {} lost",
        options.output.display(),
        stats.overwritten,
        stats.dropped,
        stats.lost
    );
    Ok(match status {
        Some(status) => status
            .code()
            .map_or(ExitCode::FAILURE, |code| ExitCode::from(code as u8)),
        None => ExitCode::SUCCESS,
    })
}

/// So that addresses can be shown as guest pages. Without KVM there are none.
fn watch_slots(about: &About) -> Option<Watch> {
    if !Path::new("/dev/kvm").exists() {
        return None;
    }
    Watch::start(about.pid, about.page_size)
        .inspect_err(|error| eprintln!("guest pages are not recorded: {error:#}"))
        .ok()
}

/// Why attaching may have failed.
fn why(pid: u32) -> String {
    format!("attach to {pid}: it has to be a process with memory of its own (ESRCH, EINVAL) that is not recorded yet (EEXIST), by root (EACCES)")
}

/// Its words with spaces between, at most 1024 bytes.
fn command_line(pid: u32) -> String {
    let words =
        fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&words).replace('\0', " ");
    text.trim().chars().take(256).collect()
}
