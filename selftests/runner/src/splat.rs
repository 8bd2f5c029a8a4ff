// SPDX-License-Identifier: GPL-2.0
//! Finds the first kernel report (panic, BUG, WARNING, lockdep, KASAN, stall, ...) in a console log. Text only,
//! touches nothing.

use serde::{Deserialize, Serialize};

/// A report and where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Splat {
    /// Line number in the log, from 1.
    pub line: usize,
    /// Its first line, without the time stamp.
    pub title: String,
    /// The whole report, shortened to [`LINES`] lines.
    pub text: Vec<String>,
}

/// How much of a report is shown.
pub const LINES: usize = 40;

/// What begins a report, after the time stamp.
const STARTS: &[&str] = &[
    "BUG",
    "WARNING:",
    "KASAN:",
    "UBSAN:",
    "KCSAN:",
    "Oops",
    "Kernel panic",
    "kernel BUG at",
    "general protection fault",
    "double fault",
    "stack segment",
    "divide error",
    "invalid opcode",
    "Internal error",
    "Unable to handle kernel",
    "INFO: task ",
    "INFO: rcu",
    "INFO: trying to register non-static key",
    "INFO: possible",
    "INFO: suspicious RCU",
    "INFO: NMI handler",
    "rcu: INFO:",
    "watchdog: BUG",
    "watchdog: CPU",
    "watchdog: Watchdog detected",
    "refcount_t:",
    "list_add corruption",
    "list_del corruption",
    "DEBUG_LOCKS_WARN_ON",
    "turning off the locking correctness validator",
    "Bad page",
    "Out of memory",
    "invoked oom-killer",
    "unregister_netdevice: waiting",
    "Call Trace:",
];

/// Parts that make a line a report wherever they stand in it.
const PARTS: &[&str] = &[
    "blocked for more than",
    "invoked oom-killer",
    "detected stall",
    "new suspected memory leaks",
    "segfault at",
    "traps:",
];

/// The first report in `log`.
pub fn first(log: &str) -> Option<Splat> {
    let lines: Vec<&str> = log.lines().collect();
    let (index, title) = lines
        .iter()
        .enumerate()
        .find_map(|(index, line)| Some((index, begins(line)?)))?;
    let mut text = Vec::new();
    for line in lines[index..].iter().take(LINES) {
        text.push(line.trim_end().to_string());
        if line.contains("---[ end ") {
            break;
        }
    }
    Some(Splat {
        line: index + 1,
        title: title.to_string(),
        text,
    })
}

/// The message, if `line` begins a report.
fn begins(line: &str) -> Option<&str> {
    let message = message(line)?;
    let start = STARTS.iter().any(|start| message.starts_with(start));
    let part = PARTS.iter().any(|part| message.contains(part));
    (start || part).then_some(message)
}

/// The kernel's message in a console line: what follows `[   12.345678]` and an optional caller `[    T1]`.
/// Programs have no such stamp, so what they print is never taken for a report. The stamp may stand in the middle of
/// a line, where a program's line was not finished.
fn message(line: &str) -> Option<&str> {
    let mut rest = line;
    loop {
        let (_, tail) = rest.split_once('[')?;
        if let Some((stamp, message)) = tail.split_once(']') {
            let mut parts = stamp.trim_start().split('.');
            let digits = |part: Option<&str>| {
                part.is_some_and(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()))
            };
            if digits(parts.next()) && digits(parts.next()) && parts.next().is_none() {
                let message = message.trim();
                return Some(
                    match message.strip_prefix('[').and_then(|m| m.split_once(']')) {
                        Some((caller, message)) if caller.trim_start().starts_with(['T', 'C']) => {
                            message.trim_start()
                        }
                        _ => message,
                    },
                );
            }
        }
        rest = tail;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: &str = "[    0.000000] Linux version 7.3.4\n[    0.1] WARNINGS are good\n# BUG: a program's words\n\
        WARNING: not the kernel\n[    1.5] 9p: Installing v9fs\n";

    #[test]
    fn a_quiet_log() {
        assert_eq!(first(BOOT), None);
        assert_eq!(first(""), None);
        let detector = "[   11.921662] kmemleak: Kernel memory leak detector initialized";
        assert_eq!(first(detector), None);
    }

    #[test]
    fn each_kind_is_found() {
        for title in [
            "Kernel panic - not syncing: Attempted to kill init!",
            "BUG: kernel NULL pointer dereference, address: 0000000000000000",
            "BUG: KASAN: slab-use-after-free in kvm_unmap_gfn_range+0x1/0x2",
            "BUG: sleeping function called from invalid context at mm/mprotect.c:1",
            "BUG: scheduling while atomic: numa/77/0x00000002",
            "WARNING: CPU: 1 PID: 77 at virt/kvm/kvm_main.c:795 kvm_mmu_invalidate_end+0x1/0x2",
            "WARNING: possible circular locking dependency detected",
            "WARNING: suspicious RCU usage",
            "Oops: 0002 [#1] PREEMPT SMP",
            "kernel BUG at mm/mprotect.c:99!",
            "general protection fault, probably for non-canonical address",
            "INFO: task numa:77 blocked for more than 120 seconds.",
            "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "watchdog: BUG: soft lockup - CPU#0 stuck for 22s!",
            "UBSAN: array-index-out-of-bounds in x.c:1:2",
            "refcount_t: underflow; use-after-free.",
            "numa_protect[77]: segfault at 0 ip 0 sp 0 error 4",
            "numa_protect invoked oom-killer: gfp_mask=0x0",
            "kmemleak: 3 new suspected memory leaks",
        ] {
            for stamp in [
                "[   12.345678]",
                "[   12.345678][   T77]",
                "[   12.345678][    C1]",
                "ok 1 ha[   12.3]",
            ] {
                let log = format!("{BOOT}{stamp} {title}\n[   12.4] next\n");
                let splat = first(&log).unwrap_or_else(|| panic!("{stamp} {title}"));
                assert_eq!((splat.line, splat.title.as_str()), (6, title));
            }
        }
    }

    #[test]
    fn the_first_of_two_and_its_text() {
        let log = "[    1.0] WARNING: one\n[    1.0] Call Trace:\n[    1.1] ---[ end trace 0000 ]---\n[    2.0] BUG: two\n";
        let splat = first(log).unwrap();
        assert_eq!(splat.title, "WARNING: one");
        assert_eq!(splat.text.len(), 3);
    }

    #[test]
    fn a_long_report_is_shortened() {
        let log = "[    1.0] BUG: x\n".to_string() + &"[    1.0] more\n".repeat(100);
        assert_eq!(first(&log).unwrap().text.len(), LINES);
    }
}
