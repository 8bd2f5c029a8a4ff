// SPDX-License-Identifier: GPL-2.0
//! What `placement` and `fault-in` share.

pub mod dirty_log;
pub mod show;
pub mod tables;
