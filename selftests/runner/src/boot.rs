// SPDX-License-Identifier: GPL-2.0
//! Boots one kernel in QEMU with the test programs and collects what they leave. Writes the results folder it is
//! given, by way of a temporary one beside it; starts and ends QEMU; touches nothing else.

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{ensure, Context, Result};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use crate::ktap::{self, Outcome, Report};
use crate::marker::{Marker, Status};
use crate::names;
use crate::splat::{self, Splat};

/// What to boot, and how.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// The kernel's bzImage
    #[arg(long)]
    pub kernel: PathBuf,
    /// The initramfs with /init, /tests and the module
    #[arg(long)]
    pub initrd: PathBuf,
    /// Where the results go; what is there is replaced. A failed run is left in DIR.failed
    #[arg(long, value_name = "DIR")]
    pub results: PathBuf,
    /// What this run is called in messages
    #[arg(long, default_value = "guest")]
    pub name: String,
    /// Emulation, hardware KVM, or hardware KVM where a trial boot with it works
    #[arg(long, value_enum, default_value_t = Accel::Auto)]
    pub accel: Accel,
    /// Where the outcome of the trial boot is remembered
    #[arg(long, value_name = "FILE")]
    pub trial: Option<PathBuf>,
    /// How long the trial boot may take to reach user space, in seconds
    #[arg(long, default_value_t = 8)]
    pub trial_seconds: u64,
    /// Memory of the guest in MiB, half on each node
    #[arg(long, default_value_t = 3072)]
    pub memory: u64,
    /// How long the console may be silent, in seconds
    #[arg(long, default_value_t = 90)]
    pub idle: u64,
    /// How long the whole run may take, in seconds
    #[arg(long, default_value_t = 1800)]
    pub limit: u64,
    /// More for the kernel's command line
    #[arg(long, default_value = "")]
    pub append: String,
    /// Make the memory of node 1 a slower tier, without CPUs
    #[arg(long)]
    pub tiers: bool,
    /// Give the machine QEMU's device for teaching, behind an IOMMU
    #[arg(long)]
    pub device: bool,
    /// Give the guest this folder to read, as the 9p share `root`
    #[arg(long, value_name = "DIR")]
    pub share_root: Option<PathBuf>,
    /// Boot it with virtme-ng, on a copy of the root folder that this runs in, and run /init in a chroot there
    #[arg(long, conflicts_with_all = ["tiers", "device", "share_root"])]
    pub vng: bool,
    /// A test that fails makes this a failed run, too: where nothing is going to be compared
    #[arg(long)]
    pub strict: bool,
    /// The names of tests that make no run a failed one, one a line
    #[arg(long, value_name = "FILE", requires = "strict")]
    pub may_fail: Option<PathBuf>,
    /// The emulator
    #[arg(long, default_value = "qemu-system-x86_64")]
    pub qemu: PathBuf,
    /// The programs to run (NAME or NAME,ARG,...); all when none is named
    pub programs: Vec<String>,
}

/// The accelerator asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accel {
    /// Hardware KVM if a trial boot reaches user space, else emulation
    Auto,
    /// Emulation
    Tcg,
    /// Emulation of one processor at a time, with a clock that each instruction moves on by a nanosecond
    Counted,
    /// Hardware KVM
    Kvm,
}

/// One test program's part of a boot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Program {
    /// Its name in /tests.
    pub name: String,
    /// How it ended; none if it did not.
    pub status: Option<Status>,
    /// What it printed.
    pub report: Report,
}

/// The outcome of a boot, written as `boot.json` into the results folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Boot {
    /// [`Options::name`]
    pub name: String,
    /// What it ran on.
    pub accel: Accel,
    /// From QEMU's start to its end, in seconds.
    pub seconds: f64,
    /// The programs in the order in which they ran.
    pub programs: Vec<Program>,
    /// Why the run as a whole failed, if it did.
    pub failure: Option<String>,
    /// The first report of the kernel, if there is one.
    pub splat: Option<Splat>,
}

/// Boots the kernel, leaves the results, and says whether the run as a whole is good (the kernel was quiet and every
/// program ended by itself; failed tests are for [`crate::compare`] to judge, unless [`Options::strict`]).
pub fn boot(options: &Options) -> Result<bool> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGHUP,
    ] {
        signal_hook::flag::register(signal, interrupted.clone())?;
    }
    for file in [&options.kernel, &options.initrd] {
        ensure!(
            file.is_file(),
            "{} is not there: make kernels selftests",
            file.display()
        );
    }
    let mut names = BTreeSet::new();
    for program in &options.programs {
        let path = program.split(',').next().unwrap_or_default();
        let name = path.rsplit('/').next().unwrap_or_default();
        ensure!(
            names.insert(name),
            "{name} is there twice, and its results have one place: boot once for each"
        );
    }
    let may_fail = match &options.may_fail {
        Some(list) => names::read(list)?,
        None => BTreeSet::new(),
    };
    let accel = accelerator(options, &interrupted)?;
    let failed = failed(&options.results);
    let temporary = Temporary::new(suffixed(&options.results, ".tmp"))?;
    remove(&options.results)?;
    remove(&failed)?;

    let log = temporary.0.join("console.log");
    let progress = Progress::new(&options.name);
    let started = Instant::now();
    let arguments = options.programs.join(" ");
    let end = run(
        options,
        accel,
        &arguments,
        &temporary.0,
        &log,
        &interrupted,
        |seen| progress.seen(seen),
    )?;
    let seconds = started.elapsed().as_secs_f64();
    progress.finish();

    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    let splat = splat::first(&text);
    let programs = programs(&text, &temporary.0)?;
    let failure = match (&splat, end) {
        (Some(_), _) => Some("the kernel printed a report".to_string()),
        (None, End::Done) if programs.is_empty() => Some("no test program ran".to_string()),
        (None, End::Done) => None,
        (None, End::Failed(why)) => Some(why),
    };
    let boot = Boot {
        name: options.name.clone(),
        accel,
        seconds,
        programs,
        failure,
        splat,
    };
    fs::write(
        temporary.0.join("boot.json"),
        serde_json::to_vec_pretty(&boot)?,
    )?;
    let place = if boot.failure.is_some() {
        &failed
    } else {
        &options.results
    };
    fs::rename(&temporary.0, place).with_context(|| place.display().to_string())?;
    print_summary(&boot, place, &text);
    let all_held = !options.strict || judge(&boot, &may_fail);
    Ok(boot.failure.is_none() && all_held)
}

/// Names what failed and counts, in the words of [`crate::compare`]; whether all that was not skipped, or may fail, held.
fn judge(boot: &Boot, may_fail: &BTreeSet<String>) -> bool {
    let (mut passed, mut failed, mut allowed, mut skipped) = (0, 0, 0, 0);
    let mut error = |text: String| {
        failed += 1;
        eprintln!("error: {}, {text}", boot.name);
    };
    for program in &boot.programs {
        for problem in &program.report.problems {
            error(format!("{}: {problem}", program.name));
        }
        for test in &program.report.tests {
            match &test.outcome {
                Outcome::Ok => passed += 1,
                Outcome::NotOk(_) if may_fail.contains(&test.name) => allowed += 1,
                Outcome::NotOk(why) => error(format!("{}: {why}", test.name)),
                Outcome::Skip(why) => {
                    skipped += 1;
                    println!("skipped: {}: {why}", test.name);
                }
            }
        }
    }
    failed += usize::from(boot.failure.is_some());
    let of_them = match allowed {
        0 => String::new(),
        _ => format!(" ({allowed} of them fail, as they may)"),
    };
    let held = passed + allowed;
    println!("{held} tests as they should be{of_them}, {failed} not, {skipped} skipped");
    failed == 0
}

fn print_summary(boot: &Boot, place: &Path, text: &str) {
    let count = |wanted: fn(&Outcome) -> bool| {
        let tests = boot
            .programs
            .iter()
            .flat_map(|program| &program.report.tests);
        tests.filter(|test| wanted(&test.outcome)).count()
    };
    println!(
        "    {}: {} ok, {} not ok, {} skipped, in {:.0} s ({}); {}",
        boot.name,
        count(|o| matches!(o, Outcome::Ok)),
        count(|o| matches!(o, Outcome::NotOk(_))),
        count(|o| matches!(o, Outcome::Skip(_))),
        boot.seconds,
        match boot.accel {
            Accel::Kvm => "hardware KVM",
            Accel::Counted => "emulation, instructions counted",
            Accel::Auto | Accel::Tcg => "emulation",
        },
        place.display()
    );
    let log = place.join("console.log");
    let Some(failure) = &boot.failure else { return };
    eprintln!("error: {}: {failure}", boot.name);
    match &boot.splat {
        Some(splat) => {
            eprintln!("{}:{}: {}", log.display(), splat.line, splat.title);
            for line in &splat.text {
                eprintln!("    {line}");
            }
        }
        None => {
            let lines: Vec<&str> = text.lines().collect();
            let last = lines.len().saturating_sub(12);
            eprintln!("{}:{}: the last lines:", log.display(), lines.len());
            for line in &lines[last..] {
                eprintln!("    {line}");
            }
        }
    }
}

/// The programs that started, with what they left in the results folder.
fn programs(log: &str, results: &Path) -> Result<Vec<Program>> {
    let mut programs = Vec::new();
    for line in log.lines() {
        let Some(Marker::Run(name)) = Marker::find(line) else {
            continue;
        };
        let read = |extension: &str| match fs::read(results.join(format!("{name}.{extension}"))) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
            other => other.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
        };
        let status = Status::parse(&read("status")?);
        let report = ktap::parse(&read("ktap")?, status);
        programs.push(Program {
            name,
            status,
            report,
        });
    }
    Ok(programs)
}

/// How a run of QEMU ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// /init said that it was done.
    Done,
    /// Anything else, in words.
    Failed(String),
}

/// Runs QEMU to its end. `seen` gets each marker and each KTAP line.
fn run(
    options: &Options,
    accel: Accel,
    arguments: &str,
    results: &Path,
    log: &Path,
    interrupted: &AtomicBool,
    mut seen: impl FnMut(&str),
) -> Result<End> {
    let mut command = match options.vng {
        true => virtme(options, accel, arguments, results),
        false => command(options, accel, arguments, results),
    };
    let mut qemu = Qemu(command.spawn().with_context(|| {
        format!(
            "{} does not start: scripts/toolchain provides it",
            command.get_program().to_string_lossy()
        )
    })?);
    let mut console = qemu.0.stdout.take().context("no console")?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = console.read(&mut buffer) {
            if sender.send(buffer[..count].to_vec()).is_err() {
                break;
            }
        }
    });
    let mut file = fs::File::create(log)?;
    let started = Instant::now();
    let mut progressed = Instant::now();
    let mut pending = Vec::new();
    let mut end = None;
    let (idle, limit) = (
        Duration::from_secs(options.idle),
        Duration::from_secs(options.limit),
    );
    loop {
        stop_if(interrupted)?;
        match receiver.recv_timeout(Duration::from_millis(200)) {
            Ok(bytes) => {
                file.write_all(&bytes)
                    .with_context(|| format!("writing {}", log.display()))?;
                pending.extend_from_slice(&bytes);
                while let Some(index) = pending.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = pending.drain(..=index).collect();
                    let line = String::from_utf8_lossy(&line);
                    // Only a whole line is progress: a kernel that loops over half of one is stuck.
                    progressed = Instant::now();
                    match Marker::find(&line) {
                        Some(Marker::Done) => end = end.or(Some(End::Done)),
                        Some(Marker::Error(what)) => {
                            end = Some(End::Failed(format!("in the guest: {what}")))
                        }
                        _ => {}
                    }
                    seen(line.trim());
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        let what = if progressed.elapsed() > idle {
            format!(
                "no new console line for {} s: the guest hangs",
                options.idle
            )
        } else if started.elapsed() > limit {
            format!("not done after {} s", options.limit)
        } else if end.is_some() && !options.vng && progressed.elapsed() > Duration::from_secs(15) {
            // It said all it had to say and does not power off.
            break;
        } else {
            continue;
        };
        return Ok(End::Failed(what));
    }
    // Ctrl-C reaches QEMU as well, and it may be the first to act on it.
    stop_if(interrupted)?;
    let status = match options.vng {
        // It is about to end, as nobody holds the console any more. Its status is that of /init.
        true => Some(qemu.0.wait()?),
        false => qemu.0.try_wait()?,
    };
    let status = status.filter(|status| !status.success());
    Ok(match (end, status) {
        (Some(End::Done), Some(status)) if options.vng => {
            End::Failed(format!("/init was done, and vng says {status}"))
        }
        (Some(end), _) => end,
        (None, status) => {
            let status = status.map_or(String::new(), |status| format!(" ({status})"));
            End::Failed(format!(
                "the guest ended before its programs were done{status}"
            ))
        }
    })
}

fn stop_if(interrupted: &AtomicBool) -> Result<()> {
    ensure!(
        !interrupted.load(Ordering::Relaxed),
        "interrupted; nothing of this run is kept"
    );
    Ok(())
}

fn command(options: &Options, accel: Accel, arguments: &str, results: &Path) -> Command {
    let mut command = Command::new(&options.qemu);
    command.args(processor(accel));
    let node = options.memory / 2;
    command.args(["-smp", TOPOLOGY]);
    command.args(["-m", &format!("{}M", node * 2)]);
    let (mut machine, nodes) = match options.tiers {
        false => ("q35".to_string(), ["cpus=0-1", "cpus=2-3"]),
        true => ("q35,hmat=on".to_string(), ["cpus=0-3", "initiator=0"]),
    };
    if options.device {
        // What the IOMMU remaps interrupts with.
        machine += ",kernel-irqchip=split";
    }
    command.args(["-machine", &machine]);
    for (id, place) in nodes.into_iter().enumerate() {
        command.args([
            "-object",
            &format!("memory-backend-ram,id=node{id},size={node}M"),
        ]);
        command.args([
            "-numa",
            &format!("node,nodeid={id},{place},memdev=node{id}"),
        ]);
    }
    if options.tiers {
        // What the firmware says of each node's memory, as seen from node 0.
        for (target, what) in [
            (0, "access-latency,latency=10"),
            (0, "access-bandwidth,bandwidth=10G"),
            (1, "access-latency,latency=100"),
            (1, "access-bandwidth,bandwidth=1G"),
        ] {
            command.args([
                "-numa",
                &format!("hmat-lb,initiator=0,target={target},hierarchy=memory,data-type={what}"),
            ]);
        }
    }
    if options.device {
        command.args(["-device", "intel-iommu,intremap=on,caching-mode=on"]);
        command.args(["-device", "edu"]);
    }
    command.args(["-virtfs", &results_share(results)]);
    if let Some(root) = &options.share_root {
        let root = root.display().to_string().replace(',', ",,");
        command.args([
            "-virtfs",
            &format!(
                "local,path={root},mount_tag=root,readonly=on,security_model=none,multidevs=remap"
            ),
        ]);
    }
    command
        .arg("-kernel")
        .arg(&options.kernel)
        .arg("-initrd")
        .arg(&options.initrd);
    command.args([
        "-append",
        &format!(
            "console=ttyS0 panic=-1 {}{} -- --run {arguments}",
            if options.device {
                "intel_iommu=on "
            } else {
                ""
            },
            options.append
        ),
    ]);
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-monitor",
        "none",
    ]);
    command.args(["-serial", "stdio", "-no-reboot"]);
    supervised(command)
}

/// The same machine as virtme-ng makes it, which boots the root folder that this runs in; there, /init runs in a chroot.
fn virtme(options: &Options, accel: Accel, arguments: &str, results: &Path) -> Command {
    // It starts QEMU by way of two other processes: all of them end with this one.
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child"]);
    // SAFETY: has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        command.args(["--user", "--map-current-user"]);
    }
    command.arg("vng").arg("--run").arg(&options.kernel);
    // 9p, as its virtiofsd needs memory of its own layout; and no modules of the kernel's, which are looked for beside it.
    command.args(["--force-9p", "--skip-modules", "--verbose"]);
    if accel != Accel::Kvm {
        command.arg("--disable-kvm");
    }
    let node = options.memory / 2;
    command.args(["--cpus", TOPOLOGY]);
    command.args(["--memory", &format!("{}M", node * 2)]);
    for cpus in ["0-1", "2-3"] {
        command.args(["--numa", &format!("{node}M,cpus={cpus}")]);
    }
    if !options.append.is_empty() {
        command.args(["--append", &options.append]);
    }
    // Hardware KVM it asks for itself.
    let mut more = match accel {
        Accel::Kvm => String::new(),
        _ => processor(accel).join(" "),
    };
    more += &format!(" -virtfs {}", results_share(results));
    command.arg(format!("--qemu-opts={more}"));
    command.arg("--exec").arg(format!(
        "cd $(mktemp -d) && cpio --extract --quiet --io-size=1048576 <'{}' && exec chroot . /init --chroot --run {arguments}",
        options.initrd.display()
    ));
    // SAFETY: dup2() is async-signal-safe and touches no memory.
    unsafe {
        // The kernel's part of the console comes on standard error.
        command.pre_exec(
            || match libc::dup2(libc::STDOUT_FILENO, libc::STDERR_FILENO) {
                0.. => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            },
        );
    }
    supervised(command)
}

/// Nodes need sockets, else the kernel warns of the topology.
const TOPOLOGY: &str = "4,sockets=2,cores=2,threads=1";

/// QEMU's arguments for the processors.
fn processor(accel: Accel) -> &'static [&'static str] {
    match accel {
        Accel::Kvm => &["-accel", "kvm", "-cpu", "host"],
        Accel::Counted => &[
            "-accel",
            "tcg,thread=single",
            "-icount",
            "shift=0",
            "-cpu",
            "max,+svm,+npt",
        ],
        // Without five levels of page tables: README.md, "Not covered", on vCPUs that have the host's registers.
        Accel::Auto | Accel::Tcg => &["-accel", "tcg,thread=multi", "-cpu", "max,+svm,+npt,-la57"],
    }
}

/// What QEMU's `-virtfs` is told for the results to leave the guest.
fn results_share(results: &Path) -> String {
    let path = results.display().to_string().replace(',', ",,");
    format!("local,path={path},mount_tag=results,security_model=none,multidevs=remap")
}

/// The command, heard by this process and ended with it.
fn supervised(mut command: Command) -> Command {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    // SAFETY: prctl() is async-signal-safe and this call touches no memory.
    unsafe {
        // No emulator outlives the runner, however that ends.
        command.pre_exec(
            || match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            },
        );
    }
    command
}

/// Hardware KVM or emulation. That /dev/kvm opens proves nothing (on some machines ordinary kernels then hang), so a
/// trial boot decides, once for each kernel of the host.
fn accelerator(options: &Options, interrupted: &AtomicBool) -> Result<Accel> {
    if options.accel != Accel::Auto {
        return Ok(options.accel);
    }
    if fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        return Ok(Accel::Tcg);
    }
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let remembered = options
        .trial
        .as_ref()
        .and_then(|file| fs::read_to_string(file).ok())
        .unwrap_or_default();
    if let Some((boot, accel)) = remembered.split_once(' ') {
        if boot == host.trim() {
            return Ok(if accel.trim() == "kvm" {
                Accel::Kvm
            } else {
                Accel::Tcg
            });
        }
    }
    println!(
        "    trying hardware KVM, for {} s at most",
        options.trial_seconds
    );
    let temporary = Temporary::new(suffixed(&options.results, ".trial"))?;
    let trial = Options {
        idle: options.trial_seconds,
        limit: options.trial_seconds,
        ..options.clone()
    };
    let mut nested = false;
    let log = temporary.0.join("console.log");
    let end = run(
        &trial,
        Accel::Kvm,
        "--trial",
        &temporary.0,
        &log,
        interrupted,
        |line| {
            nested |= matches!(Marker::find(line), Some(Marker::UserSpace { kvm: true }));
        },
    )?;
    let (accel, word) = match (end, nested) {
        (End::Done, true) => (Accel::Kvm, "kvm"),
        (End::Done, false) => {
            println!("    hardware KVM boots, but gives no nested KVM (kvm_intel.nested=1): using emulation");
            (Accel::Tcg, "tcg")
        }
        (End::Failed(why), _) => {
            println!("    hardware KVM does not do ({why}): using emulation");
            (Accel::Tcg, "tcg")
        }
    };
    if let Some(file) = &options.trial {
        fs::write(file, format!("{} {word}\n", host.trim()))
            .with_context(|| file.display().to_string())?;
    }
    Ok(accel)
}

/// QEMU, ended with this value.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A folder that goes away with this value unless it was renamed.
struct Temporary(PathBuf);

impl Temporary {
    fn new(path: PathBuf) -> Result<Temporary> {
        remove(&path)?;
        fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        // QEMU and the log want it whatever the working directory.
        Ok(Temporary(path.canonicalize()?))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Gone after a rename; otherwise the next run removes what could not be removed now.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| path.display().to_string())
        }
        _ => Ok(()),
    }
}

/// What a boot with these results left, and where: there, or in [`failed`].
pub(crate) fn outcome(results: &Path) -> Result<(PathBuf, Boot)> {
    let left = [results.to_path_buf(), failed(results)];
    let folder = left.into_iter().find(|folder| folder.exists());
    let folder = folder.with_context(|| format!("{}: no results", results.display()))?;
    let boot = serde_json::from_slice(&fs::read(folder.join("boot.json"))?)?;
    Ok((folder, boot))
}

/// Tells one build of a file from another, by its length and its time.
pub(crate) fn build_of(path: &Path) -> Result<String> {
    let about = fs::metadata(path).with_context(|| format!("{}: was not built", path.display()))?;
    let time = about.modified()?.duration_since(UNIX_EPOCH)?.as_nanos();
    Ok(format!("{} {time}", about.len()))
}

/// Where the results of a failed run are left.
pub fn failed(results: &Path) -> PathBuf {
    suffixed(results, ".failed")
}

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(suffix);
    PathBuf::from(name)
}

/// A moving line on a terminal; elsewhere one line for each program and its every tenth of tests.
struct Progress {
    bar: ProgressBar,
    plain: bool,
    name: String,
    state: std::cell::RefCell<(u64, u64, String)>,
}

impl Progress {
    fn new(name: &str) -> Progress {
        let plain = !std::io::stderr().is_terminal();
        let bar = if plain {
            ProgressBar::hidden()
        } else {
            ProgressBar::new_spinner()
        };
        if let Ok(style) = ProgressStyle::with_template("    {spinner} {prefix}: {msg} ({elapsed})")
        {
            bar.set_style(style);
        }
        bar.set_prefix(name.to_string());
        bar.set_message("booting");
        bar.enable_steady_tick(Duration::from_millis(200));
        if plain {
            println!("    {name}: booting");
        }
        Progress {
            bar,
            plain,
            name: name.to_string(),
            state: Default::default(),
        }
    }

    fn seen(&self, line: &str) {
        let mut state = self.state.borrow_mut();
        let (done, of, program) = &mut *state;
        if let Some(Marker::Run(name)) = Marker::find(line) {
            *program = name;
            *done = 0;
            self.bar.set_message(program.clone());
            if self.plain {
                println!("    {}: running {program}", self.name);
            }
        } else if let Some(plan) = line.strip_prefix("1..").and_then(|plan| plan.parse().ok()) {
            *of = plan;
        } else if line.starts_with("ok ") || line.starts_with("not ok ") {
            *done += 1;
            let name = line
                .trim_start_matches("not ")
                .split(' ')
                .nth(2)
                .unwrap_or_default();
            self.bar
                .set_message(format!("{program} {done} of {of}, {name}"));
            if self.plain && (*done % 10 == 0 || done == of) {
                println!("    {}: {program} {done} of {of}", self.name);
            }
        }
    }

    fn finish(self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A folder with a program in QEMU's place that prints `script`'s output.
    fn options(name: &str, script: &str) -> (Temporary, Options) {
        let place = std::env::temp_dir().join(format!("runner-test-{}-{name}", std::process::id()));
        let place = Temporary::new(place).unwrap();
        let qemu = place.0.join("qemu");
        fs::write(&qemu, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).unwrap();
        for file in ["kernel", "initrd"] {
            fs::write(place.0.join(file), "").unwrap();
        }
        let options = Options {
            kernel: place.0.join("kernel"),
            initrd: place.0.join("initrd"),
            results: place.0.join("results"),
            name: name.into(),
            accel: Accel::Tcg,
            trial: Some(place.0.join("trial")),
            trial_seconds: 1,
            memory: 2048,
            idle: 1,
            limit: 5,
            append: String::new(),
            tiers: false,
            device: false,
            share_root: None,
            vng: false,
            strict: false,
            may_fail: None,
            qemu,
            programs: vec![],
        };
        (place, options)
    }

    fn result(options: &Options, suffix: &str) -> Boot {
        let file = suffixed(&options.results, suffix).join("boot.json");
        serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
    }

    #[test]
    fn a_good_run_is_kept() {
        let (place, options) = options(
            "good",
            "r=$(dirname $0)/results.tmp; printf 'KTAP version 1\\n1..1\\nok 1 a\\n' >$r/p.ktap; echo exit 0 >$r/p.status
             echo init: run p; echo init: ended p exit 0; echo init: done",
        );
        assert!(boot(&options).unwrap());
        let boot = result(&options, "");
        assert_eq!(boot.programs[0].report.tests.len(), 1);
        assert!(boot.programs[0].report.problems.is_empty());
        assert!(!place.0.join("results.tmp").exists());
    }

    #[test]
    fn failed_runs_say_why() {
        let done = "echo init: run p; echo init: done";
        for (name, script, why) in [
            (
                "panic",
                &*format!("echo '[    1.0] Kernel panic - not syncing: x'; {done}"),
                "printed a report",
            ),
            (
                "warning",
                &format!("echo '[    1.0] WARNING: x'; {done}"),
                "printed a report",
            ),
            ("silent", "exec sleep 30", "no new console line"),
            (
                "halfline",
                "while :; do printf x; sleep 0.1; done",
                "no new console line",
            ),
            (
                "endless",
                "while :; do echo x; sleep 0.1; done",
                "not done after",
            ),
            (
                "early",
                "echo hello; exit 3",
                "before its programs were done",
            ),
            ("error", "echo init: error no module", "no module"),
            ("nothing", "echo init: done", "no test program"),
        ] {
            let (_place, options) = options(name, script);
            assert!(!boot(&options).unwrap(), "{name}");
            let failure = result(&options, ".failed").failure.unwrap();
            assert!(failure.contains(why), "{name}: {failure}");
            assert!(!options.results.exists());
        }
    }

    #[test]
    fn a_strict_run_fails_where_a_test_does() {
        for (result, exit, good) in [("ok", 0, true), ("not ok", 1, false)] {
            let script = format!(
                "r=$(dirname $0)/results.tmp; printf 'KTAP version 1\\n1..1\\n{result} 1 a\\n' >$r/p.ktap
                 echo exit {exit} >$r/p.status; echo init: run p; echo init: ended p exit {exit}; echo init: done"
            );
            let (place, mut options) = options("strict", &script);
            assert!(boot(&options).unwrap());
            options.strict = true;
            assert_eq!(boot(&options).unwrap(), good, "{result}");
            let list = place.0.join("list");
            fs::write(&list, "a # why").unwrap();
            options.may_fail = Some(list);
            assert!(boot(&options).unwrap(), "{result}");
        }
    }

    #[test]
    fn a_program_is_not_run_twice() {
        let (_place, mut options) = options("twice", "true");
        options.programs = vec!["p,--only=a".into(), "/bin/q".into(), "p".into()];
        let error = boot(&options).unwrap_err().to_string();
        assert!(error.contains("p is there twice"), "{error}");
    }

    #[test]
    fn an_interrupted_run_leaves_nothing() {
        let (place, options) = options("interrupted", "echo x");
        let interrupted = AtomicBool::new(true);
        let log = place.0.join("log");
        let error = run(
            &options,
            Accel::Tcg,
            "",
            &place.0,
            &log,
            &interrupted,
            |_| {},
        )
        .unwrap_err();
        assert!(error.to_string().contains("interrupted"));
    }

    #[test]
    fn a_failed_run_replaces_an_older_good_one() {
        let (_place, options) = options("replace", "exit 1");
        fs::create_dir_all(&options.results).unwrap();
        assert!(!boot(&options).unwrap());
        assert!(!options.results.exists());
    }

    #[test]
    fn missing_files_are_named() {
        let (_place, mut options) = options("missing", "true");
        options.kernel = "/no/such/bzImage".into();
        assert!(boot(&options)
            .unwrap_err()
            .to_string()
            .contains("/no/such/bzImage"));
    }
}
