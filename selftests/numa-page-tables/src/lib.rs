// SPDX-License-Identifier: GPL-2.0
//! What `placement` and `fault-in` share: where KVM's page tables are.

pub mod tables;
