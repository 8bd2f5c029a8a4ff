// SPDX-License-Identifier: GPL-2.0
//! How often a tracepoint fired or a function ran, also by its arguments or its callers, or all that some tracepoints say,
//! by a tracefs instance of its own, which is removed in the end.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read, Write};
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
            let text = read_at_once(&path).with_context(|| path.display().to_string())?;
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

/// An event that the kernel counts by some of its fields, or by who called (Documentation/trace/histogram.rst).
pub struct Histogram {
    instance: PathBuf,
    event: String,
    /// Goes after the instance.
    probe: Option<Probe>,
}

/// What had the same keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bin {
    /// The keys, and sums of values; numbers.
    pub fields: HashMap<String, u64>,
    /// Functions, from the innermost on, where they are a key.
    pub callers: Vec<String>,
    /// How many there were.
    pub hits: u64,
}

/// The key for [`Bin::callers`].
pub const CALLERS: &str = "common_stacktrace";

impl Histogram {
    /// Of `event` (`SYSTEM/NAME`); `how` begins with `keys=`.
    pub fn of(event: &str, how: &str) -> Result<Histogram> {
        Histogram::new(event.into(), None, how)
    }

    /// Of calls of the kernel's `function`, with what to fetch of its arguments.
    pub fn of_calls(function: &str, arguments: &str, how: &str) -> Result<Histogram> {
        let probe = Probe::new(function, arguments)?;
        Histogram::new(probe.0.clone(), Some(probe), how)
    }

    /// Of its returns.
    pub fn of_returns(function: &str, arguments: &str, how: &str) -> Result<Histogram> {
        let probe = Probe::at_return(function, arguments)?;
        Histogram::new(probe.0.clone(), Some(probe), how)
    }

    fn new(event: String, probe: Option<Probe>, how: &str) -> Result<Histogram> {
        let histogram = Histogram {
            instance: instance(&format!("{GROUP}.{}.bins", event.replace('/', ".")))?,
            event,
            probe,
        };
        let (path, trigger) = (histogram.path("trigger"), format!("hist:{how}"));
        append(&path, &trigger).with_context(|| format!("{}: {trigger}", path.display()))?;
        Ok(histogram)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.instance.join("events").join(&self.event).join(file)
    }

    /// What has been counted so far. Fails if anything was not.
    pub fn read(&self) -> Result<Vec<Bin>> {
        if self.probe.is_some() {
            all_hit(&self.event)?;
        }
        let path = self.path("hist");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        bins(&text).with_context(|| path.display().to_string())
    }
}

impl Drop for Histogram {
    fn drop(&mut self) {
        remove(&self.instance);
    }
}

/// What a `hist` file of tracefs says.
fn bins(hist: &str) -> Result<Vec<Bin>> {
    let mut bins = Vec::new();
    let mut bin = Bin::default();
    for line in hist.lines().filter(|line| !line.starts_with('#')) {
        match line.split_once(':') {
            Some((name, count)) if name.trim() == "Dropped" && count.trim() != "0" => {
                bail!("{} were not counted", count.trim());
            }
            _ => {}
        }
        let (begins, ends) = (line.starts_with('{'), line.contains('}'));
        if !begins && !ends {
            // Between the braces, callers stand one a line; behind the last, totals.
            bin.callers.push(line.trim().to_string());
            continue;
        }
        if begins {
            bin = Bin::default();
        }
        let words = line.replace(['{', '}', ','], " ");
        let mut words = words.split_whitespace();
        while let Some(name) = words.next().and_then(|word| word.strip_suffix(':')) {
            if name == CALLERS {
                break;
            }
            let value = words.next().and_then(|word| word.parse().ok());
            let value = value.with_context(|| format!("no number: {line}"))?;
            bin.fields.insert(name.to_string(), value);
        }
        if ends {
            bin.hits = bin
                .fields
                .remove("hitcount")
                .with_context(|| format!("no hitcount: {line}"))?;
            bins.push(std::mem::take(&mut bin));
        }
    }
    Ok(bins)
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
        fs::write(path, format!("{heading}\n{}", self.text()?))
            .with_context(|| path.display().to_string())
    }

    /// The newest `count` of them, one a line, the oldest first.
    pub fn last(&self, count: usize) -> Result<Vec<String>> {
        let text = self.text()?;
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        let newest = &lines[lines.len().saturating_sub(count)..];
        Ok(newest.iter().map(|line| line.trim().into()).collect())
    }

    fn text(&self) -> Result<String> {
        let trace = self.instance.join("trace");
        fs::read_to_string(&trace).with_context(|| trace.display().to_string())
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
        Probe::define("p", function, function, arguments)
    }

    /// At its end.
    fn at_return(function: &str, arguments: &str) -> Result<Probe> {
        Probe::define("r", &format!("{function}_return"), function, arguments)
    }

    fn define(kind: &str, name: &str, function: &str, arguments: &str) -> Result<Probe> {
        let event = format!("{GROUP}/{name}_{}", std::process::id());
        let define = format!("{kind}:{event} {function} {arguments}");
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

/// What a short file of tracefs says, by one system call: each makes the text anew, with other numbers.
fn read_at_once(path: &Path) -> io::Result<String> {
    let mut text = vec![0; 4096];
    let length = fs::File::open(path)?.read(&mut text)?;
    text.truncate(length);
    String::from_utf8(text).map_err(io::Error::other)
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
    use super::{bins, total};

    #[test]
    fn lost_events_count() {
        let stats = "entries: 3\noverrun: 40\ncommit overrun: 0\nbytes: 132\noldest event ts:  2.5\nnow ts:  3.5\ndropped events: 500\nread events: 6000\n";
        assert_eq!(total(stats).unwrap(), 6543);
        assert!(total("entries: 3\n").is_err());
    }
    #[test]
    fn a_histogram_is_read_by_keys_and_callers() {
        let hist = "# event histogram\n#\n# trigger info: hist:keys=start,end:vals=hitcount,hinted [active]\n#\n\n\
            { start: 140737, end:     140800 } hitcount:          2  hinted:         77\n\
            { level:          1, common_stacktrace:\n         zap\n         change_prot_numa\n} hitcount:          3\n\n\
            Totals:\n    Hits: 5\n    Entries: 2\n    Dropped: 0\n";
        let read = bins(hist).unwrap();
        assert_eq!(read.len(), 2);
        assert_eq!((read[0].hits, read[0].fields["hinted"]), (2, 77));
        assert_eq!(
            (read[0].fields["start"], read[0].fields["end"]),
            (140_737, 140_800)
        );
        assert!(read[0].callers.is_empty());
        assert_eq!((read[1].hits, read[1].fields["level"]), (3, 1));
        assert_eq!(read[1].callers, ["zap", "change_prot_numa"]);
        assert!(bins(&hist.replace("Dropped: 0", "Dropped: 2")).is_err());
        assert!(bins("{ start: x } hitcount: 1\n").is_err());
    }
}
