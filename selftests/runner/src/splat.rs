// SPDX-License-Identifier: GPL-2.0
//! Finds the first kernel report (panic, BUG, WARNING, lockdep, KASAN, stall, ...) in a console log. Text only,
//! touches nothing. Whatever scripts/kernel.debug.config switches on is here by the words that its reports begin with.

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
    // Lockdep sets some of its titles in brackets.
    "[ BUG:",
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
    "ODEBUG:",
    "DEBUG_LOCKS_WARN_ON",
    "turning off the locking correctness validator",
    // A detector that gave up finds nothing any more.
    "kmemleak: Kernel memory leak detector disabled",
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
    "panicked at",
    ": bad pgd ",
    ": bad p4d ",
    ": bad pud ",
    ": bad pmd ",
    ": bad pte ",
    "Bad swap",
    "segfault at",
    "traps:",
];

/// How the kernel complains of an allocation that the program fault_injection made fail. Nothing is wrong then, and the
/// trace that follows is no report.
const STARVED: &[&str] = &[
    "fault_injection: vmalloc error: ",
    "fault_injection: page allocation failure: ",
];

/// The first report in `log`.
pub fn first(log: &str) -> Option<Splat> {
    let lines: Vec<&str> = log.lines().collect();
    let mut starved = false;
    let (index, title) = lines.iter().enumerate().find_map(|(index, line)| {
        let text = message(line)?;
        if STARVED.iter().any(|start| text.starts_with(start)) {
            starved = true;
        } else if starved && text.starts_with("Call Trace:") {
            starved = false;
        } else if is_report(text) {
            return Some((index, text));
        }
        None
    })?;
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

/// Whether `message` begins a report.
fn is_report(message: &str) -> bool {
    let start = STARTS.iter().any(|start| message.starts_with(start));
    let part = PARTS.iter().any(|part| message.contains(part));
    start || part
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
            "WARNING: possible recursive locking detected",
            "WARNING: inconsistent lock state",
            "WARNING: bad unlock balance detected!",
            "WARNING: held lock freed!",
            "WARNING: at virt/kvm/kvm_main.c:795 kvm_mmu_invalidate_end+0x1/0x2, CPU#1: numa/77",
            "[ BUG: Invalid wait context ]",
            "BUG: MAX_LOCKDEP_CHAINS too low!",
            "BUG: workqueue leaked atomic, lock or RCU: kworker/0:1[7]",
            "BUG: using smp_processor_id() in preemptible [00000000] code: numa/77",
            "BUG: KASAN: stack-out-of-bounds in change_pud_range+0x1/0x2",
            "BUG: KASAN: vmalloc-out-of-bounds in mmu_notifier_trace+0x1/0x2",
            "BUG: Bad page map in process numa  pte:8000000000000000 pmd:1",
            "BUG: Bad rss-counter state mm:0000000000000000 type:MM_ANONPAGES val:1",
            "BUG: non-zero pgtables_bytes on freeing mm: 4096",
            "BUG kmalloc-2k (Not tainted): Poison overwritten",
            "kernel BUG at mm/page_table_check.c:77!",
            "mm/pgtable-generic.c:50: bad pmd 0000000000000000(8000000000000000)",
            "_swap_info_get: Bad swap file entry 3ffffffffffff",
            "list_add corruption. prev->next should be next (0), but was 1. (prev=2).",
            "list_del corruption. prev->next should be 0, but was 1. (prev=2)",
            "ODEBUG: free active (active state 0) object: 0 object type: timer_list",
            "rust_kernel: panicked at rust/ring.rs:1:2:",
            "Oops: 0002 [#1] PREEMPT SMP",
            "kernel BUG at mm/mprotect.c:99!",
            "general protection fault, probably for non-canonical address",
            "INFO: task numa:77 blocked for more than 120 seconds.",
            "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "watchdog: BUG: soft lockup - CPU#0 stuck for 22s!",
            "UBSAN: array-index-out-of-bounds in x.c:1:2",
            "UBSAN: shift-out-of-bounds in mm/mmu_notifier.c:1:2",
            "UBSAN: invalid-load in virt/kvm/kvm_main.c:1:2",
            "refcount_t: underflow; use-after-free.",
            "numa_protect[77]: segfault at 0 ip 0 sp 0 error 4",
            "numa_protect invoked oom-killer: gfp_mask=0x0",
            "kmemleak: 3 new suspected memory leaks",
            "kmemleak: Kernel memory leak detector disabled",
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
    fn an_allocation_that_was_made_to_fail_is_no_report() {
        let trace =
            "[    1.0] CPU: 1 PID: 7\n[    1.0] Call Trace:\n[    1.0]  warn_alloc+0x1/0x2\n";
        let failed = |comm: &str| {
            format!("[    1.0] {comm}: vmalloc error: size 1, mode:0xcc0(GFP_KERNEL)\n{trace}")
        };
        assert_eq!(first(&failed("fault_injection")), None);
        assert_eq!(first(&failed("numa_protect")).unwrap().line, 3);
        let next = failed("fault_injection") + trace;
        assert_eq!(first(&next).unwrap().line, 6);
        let next = failed("fault_injection") + "[    1.1] WARNING: x\n";
        assert_eq!(first(&next).unwrap().title, "WARNING: x");
    }

    #[test]
    fn a_long_report_is_shortened() {
        let log = "[    1.0] BUG: x\n".to_string() + &"[    1.0] more\n".repeat(100);
        assert_eq!(first(&log).unwrap().text.len(), LINES);
    }
}
