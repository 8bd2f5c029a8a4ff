// SPDX-License-Identifier: GPL-2.0
//! Merging of equal pages (KSM), run until all are merged that should be; changes the machine's settings meanwhile.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

const SETTINGS: &str = "/sys/kernel/mm/ksm";
const PROCESS: &str = "/proc/self/ksm_stat";

/// Whether the kernel can merge pages.
pub fn is_there() -> bool {
    Path::new(SETTINGS).join("run").exists() && Path::new(PROCESS).exists()
}

/// How many pages of this process are merged, or were when KSM last looked.
fn merged_pages() -> Result<u64> {
    let text = fs::read_to_string(PROCESS).with_context(|| format!("{PROCESS}: CONFIG_KSM?"))?;
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == "ksm_merging_pages")
        .and_then(|(_, value)| value.trim().parse().ok())
        .with_context(|| format!("{PROCESS}: no ksm_merging_pages"))
}

/// Lets KSM run until `pages` pages of this process are merged, then stops it. What is merged stays so.
pub fn merge(pages: u64, limit: Duration) -> Result<()> {
    let _settings = [
        Setting::replace("sleep_millisecs", "1")?,
        Setting::replace("pages_to_scan", "16384")?,
        Setting::replace("run", "1")?,
    ];
    let begun = Instant::now();
    loop {
        let merged = merged_pages()?;
        if merged == pages {
            return Ok(());
        }
        if merged > pages || begun.elapsed() > limit {
            bail!("KSM merged {merged} pages of {pages} in {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A setting that is put back when dropped; `run` is stopped.
struct Setting {
    path: PathBuf,
    old: String,
}

impl Setting {
    fn replace(name: &str, value: &str) -> Result<Setting> {
        let path = Path::new(SETTINGS).join(name);
        let remedy = || format!("{}: needs root and CONFIG_KSM", path.display());
        let old = fs::read_to_string(&path).with_context(remedy)?;
        fs::write(&path, value).with_context(remedy)?;
        Ok(Setting { old, path })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.path, self.old.trim()) {
            eprintln!("{}: not put back: {error}", self.path.display());
        }
    }
}
