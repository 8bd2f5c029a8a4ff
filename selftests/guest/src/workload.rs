// SPDX-License-Identifier: GPL-2.0
//! What a guest that boots Linux does there: its only program writes to memory, says what it wrote, and restarts the
//! machine.

use std::process::ExitCode;

use crate::PAGE;

/// How it begins when the guest says that it is done.
pub const DONE: &str = "workload done: ";

/// The guest's only program: writes `passes` times to each of so many pages, says what is there, and restarts the machine.
pub fn run(pages: u64, passes: u64) -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("--workload: this restarts the machine; only for the first program of a guest");
        return ExitCode::FAILURE;
    }
    println!("{}", expected(pages, passes));
    // SAFETY: no arguments but the command; nothing is left to be lost.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
    ExitCode::FAILURE
}

/// What such a guest says.
pub fn expected(pages: u64, passes: u64) -> String {
    done(&written(pages, passes))
}

/// A page, as the workload writes to it.
type Page = [u64; PAGE / 8];

/// Memory after the workload.
fn written(pages: u64, passes: u64) -> Vec<Page> {
    let mut memory = vec![[0; PAGE / 8]; pages as usize];
    for pass in 0..passes {
        for (number, page) in (0..).zip(&mut memory) {
            write(page, number, pass);
        }
    }
    memory
}

/// What a pass changes in page `number`: one word, another in the next pass, from its value before.
fn write(page: &mut Page, number: u64, pass: u64) {
    let word = &mut page[(number + pass) as usize % (PAGE / 8)];
    *word = (*word ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (pass + 1);
}

/// What the guest says of memory that it has written: a checksum of each word at its place (FNV-1a, by words).
fn done(memory: &[Page]) -> String {
    let mix = |sum: u64, word: &u64| (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    let checksum = memory.iter().flatten().fold(0xcbf2_9ce4_8422_2325, mix);
    format!("{DONE}{} pages, checksum {checksum:016x}", memory.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_word_counts_at_its_place() {
        let memory = written(3, 2);
        assert_eq!(done(&memory), expected(3, 2));
        assert!(done(&memory).starts_with("workload done: 3 pages, checksum "));
        assert!(memory.iter().flatten().filter(|word| **word != 0).count() == 6);
        for (page, word) in [(0, 0), (1, 2), (2, 511)] {
            let mut other = memory.clone();
            other[page][word] ^= 1;
            assert_ne!(done(&memory), done(&other), "word {word} of page {page}");
        }
        let mut swapped = memory.clone();
        swapped.swap(0, 1);
        assert_ne!(done(&memory), done(&swapped));
        assert_ne!(done(&memory), expected(3, 1));
    }
}
