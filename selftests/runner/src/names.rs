// SPDX-License-Identifier: GPL-2.0
//! Reads a list of tests' names, one a line; `#` begins a comment. Touches nothing else.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{ensure, Context, Result};

/// The names in the file.
pub fn read(path: &Path) -> Result<BTreeSet<String>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    parse(&text).with_context(|| path.display().to_string())
}

fn parse(text: &str) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for line in text.lines() {
        let name = line.split('#').next().unwrap_or_default().trim();
        ensure!(!name.contains(char::is_whitespace), "not one name: {line}");
        ensure!(
            name.is_empty() || names.insert(name.to_string()),
            "{name} is there twice"
        );
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_are_no_names() {
        let names = parse("a\n# b\n\n c # d\n").unwrap();
        assert_eq!(names.into_iter().collect::<Vec<_>>(), ["a", "c"]);
    }

    #[test]
    fn faults_are_reported() {
        assert!(parse("a b\n").is_err());
        assert!(parse("a\na\n").is_err());
    }
}
