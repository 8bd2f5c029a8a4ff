// SPDX-License-Identifier: GPL-2.0
//! How long kernel functions took, by kprobe events and histograms of tracefs
//! (Documentation/trace/kprobetrace.rst and histogram.rst); what is defined there is removed in the end.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};

use crate::tracefs::{all_hit, append, GROUP};

const TRACEFS: &str = "/sys/kernel/tracing";

/// Spans that are being counted.
pub struct Spans {
    /// What to write where to get rid of them, in this order.
    undo: Vec<(PathBuf, String)>,
}

impl Spans {
    /// Counts each call of each of `functions` from now on.
    pub fn new(functions: &[&'static str]) -> Result<Spans> {
        let mut spans = Spans { undo: Vec::new() };
        for function in functions {
            spans.define(
                function,
                &format!("p:{GROUP}/{function}_in {function}"),
                &format!("r:{GROUP}/{function}_out {function}"),
                "",
            )?;
        }
        Ok(spans)
    }

    /// Counts how long the read-write lock at `address` is held for writing, as `name`.
    pub fn count_write_lock(&mut self, name: &'static str, address: u64) -> Result<()> {
        self.define(
            name,
            &format!("r:{GROUP}/{name}_in _raw_write_lock"),
            &format!("p:{GROUP}/{name}_out _raw_write_unlock lock=%di"),
            &format!(" if lock == {address:#x}"),
        )
    }

    /// From the event `enter` to the next event `leave` of the same thread for which `condition` holds.
    fn define(
        &mut self,
        name: &'static str,
        enter: &str,
        leave: &str,
        condition: &str,
    ) -> Result<()> {
        let events = Path::new(TRACEFS).join("kprobe_events");
        append(&events, enter).with_context(|| format!("{}: {enter}", events.display()))?;
        self.undo
            .insert(0, (events.clone(), format!("-:{GROUP}/{name}_in")));
        append(&events, leave).with_context(|| format!("{}: {leave}", events.display()))?;
        self.undo
            .insert(0, (events, format!("-:{GROUP}/{name}_out")));
        let synthetic = Path::new(TRACEFS).join("synthetic_events");
        let took = format!("{name}_took u64 ns");
        append(&synthetic, &took).with_context(|| format!("{}: {took}", synthetic.display()))?;
        self.undo.insert(0, (synthetic, format!("!{took}")));
        for (event, trigger) in [
            (format!("{GROUP}/{name}_in"), format!("hist:keys=common_pid:{name}=common_timestamp")),
            (
                format!("{GROUP}/{name}_out"),
                format!("hist:keys=common_pid:ns=common_timestamp-${name}:onmatch({GROUP}.{name}_in).trace({name}_took,$ns){condition}"),
            ),
            (format!("synthetic/{name}_took"), "hist:keys=common_cpu:vals=ns".to_string()),
        ] {
            let path = Path::new(TRACEFS).join("events").join(event).join("trigger");
            append(&path, &trigger).with_context(|| format!("{}: {trigger}", path.display()))?;
            self.undo.insert(0, (path, format!("!{trigger}")));
        }
        Ok(())
    }

    /// How long it took so far, all together, in nanoseconds.
    pub fn read(&self, name: &str) -> Result<u64> {
        all_hit(&format!("{GROUP}/{name}_in"))?;
        all_hit(&format!("{GROUP}/{name}_out"))?;
        let path = Path::new(TRACEFS).join(format!("events/synthetic/{name}_took/hist"));
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        total(&text).with_context(|| path.display().to_string())
    }
}

impl Drop for Spans {
    fn drop(&mut self) {
        for (path, text) in &self.undo {
            if let Err(error) = append(path, text) {
                eprintln!("{}: {text}: {error}", path.display());
            }
        }
    }
}

/// The addresses of the `struct kvm` that this process makes while it exists.
pub struct Machines {
    instance: PathBuf,
}

impl Machines {
    const EVENT: &'static str = "machine";

    /// Looks out for them.
    pub fn watch() -> Result<Machines> {
        let event = Machines::EVENT;
        let events = Path::new(TRACEFS).join("kprobe_events");
        append(
            &events,
            &format!("p:{GROUP}/{event} kvm_arch_init_vm kvm=%di"),
        )
        .with_context(|| events.display().to_string())?;
        let machines = Machines {
            instance: Path::new(TRACEFS)
                .join(format!("instances/{GROUP}.machines.{}", std::process::id())),
        };
        fs::create_dir(&machines.instance)
            .with_context(|| machines.instance.display().to_string())?;
        let enable = machines
            .instance
            .join(format!("events/{GROUP}/{event}/enable"));
        fs::write(&enable, "1").with_context(|| enable.display().to_string())?;
        Ok(machines)
    }

    /// The last one.
    pub fn last(&self) -> Result<u64> {
        let path = self.instance.join("trace");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        text.lines()
            .filter_map(|line| line.rsplit_once("kvm=0x"))
            .next_back()
            .and_then(|(_, address)| u64::from_str_radix(address.trim(), 16).ok())
            .with_context(|| format!("{}: no VM was made", path.display()))
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        let events = Path::new(TRACEFS).join("kprobe_events");
        let removed = fs::remove_dir(&self.instance)
            .and_then(|()| append(&events, &format!("-:{GROUP}/{}", Machines::EVENT)));
        if let Err(error) = removed {
            eprintln!("{}: not removed: {error}", self.instance.display());
        }
    }
}

/// The sum over the lines of a histogram.
fn total(hist: &str) -> Result<u64> {
    let dropped = hist
        .lines()
        .find_map(|line| line.trim().strip_prefix("Dropped: "));
    ensure!(
        dropped.is_none_or(|count| count == "0"),
        "some were dropped: {hist}"
    );
    let mut sum = 0;
    for line in hist.lines().filter(|line| line.starts_with('{')) {
        let after = line
            .split_once(" ns:")
            .map(|(_, after)| after.split_whitespace().next());
        let ns = after.flatten().and_then(|ns| ns.parse::<u64>().ok());
        sum += ns.with_context(|| format!("no ns: {line}"))?;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_of_a_histogram_are_added() {
        let hist = "# event histogram\n#\n\n\
            { common_cpu:          0 } hitcount:          3  ns:      12000\n\
            { common_cpu:          1 } hitcount:          1  ns:        345\n\n\
            Totals:\n    Hits: 4\n    Entries: 2\n    Dropped: 0\n";
        assert_eq!(total(hist).unwrap(), 12345);
        assert!(total(&hist.replace("Dropped: 0", "Dropped: 2")).is_err());
        assert!(total("{ common_cpu: 0 } hitcount: 1\n").is_err());
        assert_eq!(total("").unwrap(), 0);
    }
}
