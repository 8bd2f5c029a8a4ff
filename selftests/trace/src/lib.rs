// SPDX-License-Identifier: GPL-2.0
//! What the recorder `mmu_notifier_trace` writes, read and judged in user space; [`client`] and [`saved`] alone touch files,
//! and [`started`] alone processes.
//!
//! - [`record`]: the layout, and [`filter`]: which records are kept; the same source that the kernel module is built from.
//! - [`client`]: attaches the recorder to a process and reads what it recorded.
//! - [`started`]: a command that waits for the recorder.
//! - [`saved`]: a trace in a file.
//! - [`sequence`]: groups records into start/end pairs and reports.
//! - [`check`]: the rules that a recorded sequence must obey.

#![deny(missing_docs)]

pub mod check;
pub mod client;
#[path = "../../../rust/filter.rs"]
pub mod filter;
#[path = "../../../rust/record.rs"]
pub mod record;
pub mod saved;
pub mod sequence;
pub mod started;

/// The ring is the kernel module's; it is here for its tests.
#[cfg_attr(loom, allow(dead_code))]
#[cfg(test)]
#[path = "../../../rust/ring.rs"]
mod ring;
