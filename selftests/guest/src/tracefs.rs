// SPDX-License-Identifier: GPL-2.0
//! How often a tracepoint fired or a function ran, or all that some tracepoints say, by a tracefs instance of its own, which
//! is removed in the end.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};

const INSTANCES: &str = "/sys/kernel/tracing/instances";
const KPROBE_EVENTS: &str = "/sys/kernel/tracing/kprobe_events";
const KPROBE_PROFILE: &str = "/sys/kernel/tracing/kprobe_profile";
/// What functions the kernel has.
const SYMBOLS: &str = "/proc/kallsyms";
/// The group of the events that are defined here and in `spans.rs`.
pub(crate) const GROUP: &str = "numa_notify";

/// A tracepoint that is being counted.
pub struct Tracepoint {
    instance: PathBuf,
    /// Goes after the instance.
    probe: Option<Probe>,
}

/// The event of a kprobe, which is removed when dropped.
struct Probe(String);

impl Tracepoint {
    /// Whether the kernel has tracepoint `event` (`SYSTEM/NAME`).
    pub fn is_there(event: &str) -> bool {
        Path::new("/sys/kernel/tracing/events").join(event).exists()
            && Path::new(INSTANCES).exists()
    }

    /// Counts `event` (`SYSTEM/NAME`) where `filter` holds, or everywhere if it is empty (Documentation/trace/events.rst),
    /// from now on.
    pub fn count(event: &str, filter: &str) -> Result<Tracepoint> {
        Tracepoint::new(event, None)?.enable(event, filter)
    }

    /// Counts the calls of the kernel's `function` from now on, where `filter` holds of `arguments`; none of both where all
    /// count (Documentation/trace/kprobetrace.rst).
    pub fn count_calls(function: &str, arguments: &str, filter: &str) -> Result<Tracepoint> {
        let probe = Probe::new(function, arguments)?;
        let event = probe.0.clone();
        Tracepoint::new(&event, Some(probe))?.enable(&event, filter)
    }

    fn enable(self, event: &str, filter: &str) -> Result<Tracepoint> {
        if !filter.is_empty() {
            self.set(event, "filter", filter)?;
        }
        self.set(event, "enable", "1")?;
        Ok(self)
    }

    fn new(event: &str, probe: Option<Probe>) -> Result<Tracepoint> {
        Ok(Tracepoint {
            instance: instance(&format!("{GROUP}.{}", event.replace('/', ".")))?,
            probe,
        })
    }

    fn set(&self, event: &str, file: &str, value: &str) -> Result<()> {
        let path = self.instance.join("events").join(event).join(file);
        fs::write(&path, value).with_context(|| format!("{}: {value}", path.display()))
    }

    /// How often it has fired so far: what is in the buffer and what was overwritten there.
    pub fn fired(&self) -> Result<u64> {
        let mut fired = 0;
        let folder = self.instance.join("per_cpu");
        for cpu in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = cpu?.path().join("stats");
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            fired += total(&text).with_context(|| path.display().to_string())?;
        }
        if let Some(Probe(event)) = &self.probe {
            all_hit(event)?;
        }
        Ok(fired)
    }
}

/// Fails if the probe of `event` was passed and could not say so.
pub(crate) fn all_hit(event: &str) -> Result<()> {
    let name = event.rsplit('/').next().unwrap_or(event);
    let text = fs::read_to_string(KPROBE_PROFILE).context(KPROBE_PROFILE)?;
    let line = text
        .lines()
        .find(|line| line.split_whitespace().next() == Some(name));
    match line.and_then(|line| line.split_whitespace().nth(2)) {
        Some("0") => Ok(()),
        Some(missed) => bail!("{event}: {missed} missed"),
        None => bail!("{KPROBE_PROFILE}: nothing of {name}"),
    }
}

/// Whether the kernel has `function`, where a probe can be.
pub fn has_function(function: &str) -> bool {
    fs::read_to_string(SYMBOLS).is_ok_and(|symbols| {
        let mut names = symbols
            .lines()
            .filter_map(|line| line.split_whitespace().nth(2));
        names.any(|name| name == function)
    })
}

impl Drop for Tracepoint {
    fn drop(&mut self) {
        remove(&self.instance);
    }
}

/// What some tracepoints say, with the time since boot as the recorder tells it.
pub struct Events {
    instance: PathBuf,
    /// Go after the instance.
    _probes: Vec<Probe>,
}

impl Events {
    /// Collects `events` (`SYSTEM/NAME`) and calls of `functions`, each with what to fetch of its arguments, from now on,
    /// the newest 16 MiB on each CPU.
    pub fn collect(events: &[&str], functions: &[(&str, &str)]) -> Result<Events> {
        let probes: Vec<Probe> = functions
            .iter()
            .map(|(function, arguments)| Probe::new(function, arguments))
            .collect::<Result<_>>()?;
        let names = probes.iter().map(|probe| probe.0.clone());
        let names: Vec<String> = names
            .chain(events.iter().map(|one| one.to_string()))
            .collect();
        let collected = Events {
            instance: instance(&format!("{GROUP}.events"))?,
            _probes: probes,
        };
        let settings = [("trace_clock", "mono"), ("buffer_size_kb", "16384")];
        let enable = names
            .iter()
            .map(|one| (format!("events/{one}/enable"), "1"));
        for (file, value) in settings
            .map(|(file, value)| (file.to_string(), value))
            .into_iter()
            .chain(enable)
        {
            let path = collected.instance.join(file);
            fs::write(&path, value).with_context(|| format!("{}: {value}", path.display()))?;
        }
        Ok(collected)
    }

    /// Writes them to `path`, one a line, behind `heading`.
    pub fn save(&self, heading: &str, path: &Path) -> Result<()> {
        let trace = self.instance.join("trace");
        let text = fs::read_to_string(&trace).with_context(|| trace.display().to_string())?;
        fs::write(path, format!("{heading}\n{text}")).with_context(|| path.display().to_string())
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        remove(&self.instance);
    }
}

/// A new instance of tracefs for this process.
fn instance(name: &str) -> Result<PathBuf> {
    let instance = Path::new(INSTANCES).join(format!("{name}.{}", std::process::id()));
    fs::create_dir(&instance)
        .with_context(|| format!("{}: needs root, tracefs, CONFIG_FTRACE", instance.display()))?;
    Ok(instance)
}

fn remove(instance: &Path) {
    if let Err(error) = fs::remove_dir(instance) {
        eprintln!("{}: not removed: {error}", instance.display());
    }
}

impl Probe {
    /// At the beginning of `function`.
    fn new(function: &str, arguments: &str) -> Result<Probe> {
        let event = format!("{GROUP}/{function}_{}", std::process::id());
        let define = format!("p:{event} {function} {arguments}");
        append(Path::new(KPROBE_EVENTS), &define).with_context(|| {
            format!("{KPROBE_EVENTS}: {define}: does this kernel have that function?")
        })?;
        Ok(Probe(event))
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let remove = format!("-:{}", self.0);
        if let Err(error) = append(Path::new(KPROBE_EVENTS), &remove) {
            eprintln!("{KPROBE_EVENTS}: {remove}: {error}");
        }
    }
}

/// A line to one of tracefs's files, which take it as a command.
pub(crate) fn append(path: &Path, line: &str) -> io::Result<()> {
    fs::OpenOptions::new()
        .append(true)
        .open(path)?
        .write_all(format!("{line}\n").as_bytes())
}

/// All events that a `stats` file of tracefs speaks of, also those that are not in the buffer any more.
fn total(stats: &str) -> Result<u64> {
    ["entries", "overrun", "dropped events", "read events"]
        .into_iter()
        .map(|name| {
            stats
                .lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(key, _)| *key == name)
                .and_then(|(_, value)| value.trim().parse::<u64>().ok())
                .with_context(|| format!("no {name}"))
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::total;

    #[test]
    fn lost_events_count() {
        let stats = "entries: 3\noverrun: 40\ncommit overrun: 0\nbytes: 132\noldest event ts:  2.5\nnow ts:  3.5\ndropped events: 500\nread events: 6000\n";
        assert_eq!(total(stats).unwrap(), 6543);
        assert!(total("entries: 3\n").is_err());
    }
}
