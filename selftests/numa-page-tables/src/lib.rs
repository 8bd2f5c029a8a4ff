// SPDX-License-Identifier: GPL-2.0
//! What `placement` and `fault-in` share.

pub mod dirty_log;
pub mod show;
pub mod tables;

use guest::needs::{self, Need};

/// What neither can do without.
pub const NEEDS: &[Need] = &[
    needs::KVM,
    needs::TWO_NODES,
    needs::NUMA_BALANCING,
    needs::SCAN_SETTINGS,
];
