// SPDX-License-Identifier: GPL-2.0
//! Boots a kernel with the test programs, judges what it printed, and compares two kernels. Starts QEMU, writes
//! where it is told to, and touches nothing else.

#![deny(missing_docs)]

pub mod boot;
pub mod compare;
pub mod designs;
pub mod ktap;
pub mod marker;
pub mod mount;
pub mod mutants;
pub mod names;
pub mod report;
pub mod same;
pub mod splat;
pub mod timeline;
