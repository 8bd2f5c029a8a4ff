// SPDX-License-Identifier: GPL-2.0
//! A trace in a file: two lines of text that say what it is, then the records. Touches the file that it is given.
//!
//! ```text
//! mmu_notifier_trace 2                     the version of the layout of records
//! {"pid": 4711, ...}                       an `About` in JSON, and spaces up to `HEADER` bytes
//! ```
//!
//! The records are in the order in which they were read, which is that of time but for those of different CPUs.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::client::Stats;
use crate::record::{Record, VERSION};
use crate::sequence::Sequence;

/// What the first line begins with.
const MAGIC: &str = "mmu_notifier_trace";
/// Length of both lines together, in bytes.
const HEADER: usize = 4096;

/// What a trace is of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// The process, by its number where it was recorded.
    pub pid: u32,
    /// Its command line, its words with spaces between; cut off after 1024 bytes.
    pub command: String,
    /// The release of the kernel.
    pub kernel: String,
    /// Bytes of a page.
    pub page_size: u64,
    /// What was asked for beside the pid: size of the rings, `nooverwrite`, `plain`.
    pub words: String,
    /// The recorder's filter.
    pub filter: String,
    /// The recorder's counts in the end; `None` where the recording was cut off.
    pub stats: Option<Stats>,
}

/// A file that is being written.
pub struct Writer(BufWriter<File>);

impl Writer {
    /// Makes the file. It is whole after [`Writer::finish`], and can be read before.
    pub fn create(path: &Path, about: &About) -> io::Result<Writer> {
        let mut file = File::create_new(path)?;
        file.write_all(&header(about)?)?;
        Ok(Writer(BufWriter::with_capacity(1 << 18, file)))
    }

    /// Appends records.
    pub fn append(&mut self, records: &[Record]) -> io::Result<()> {
        for record in records {
            self.0.write_all(&record.to_bytes())?;
        }
        self.0.flush()
    }

    /// Says in the end what it is of.
    pub fn finish(mut self, about: &About) -> io::Result<()> {
        self.0.flush()?;
        self.0.seek(SeekFrom::Start(0))?;
        self.0.write_all(&header(about)?)?;
        self.0.flush()?;
        self.0.get_ref().sync_all()
    }
}

fn header(about: &About) -> io::Result<Vec<u8>> {
    let mut text = format!("{MAGIC} {VERSION}\n{}", serde_json::to_string(about)?).into_bytes();
    if text.len() >= HEADER {
        return Err(io::Error::other(
            "what the trace is of takes more than 4 KiB",
        ));
    }
    text.resize(HEADER - 1, b' ');
    text.push(b'\n');
    Ok(text)
}

/// Reads a trace: what it is of, and its records.
///
/// # Errors
///
/// [`io::ErrorKind::InvalidData`]: not a trace, one of another version, or one that was cut off in the middle of a record.
pub fn read(path: &Path) -> io::Result<(About, Sequence)> {
    let invalid = |text: String| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{}: {text}", path.display()),
        )
    };
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    let (header, records) = bytes
        .split_at_checked(HEADER)
        .filter(|(header, _)| header.starts_with(MAGIC.as_bytes()))
        .ok_or_else(|| invalid("not a trace of mmu-notifier-trace record".into()))?;
    let header = String::from_utf8_lossy(header);
    let (first, second) = header.split_once('\n').unwrap_or_default();
    let version = first[MAGIC.len()..].trim();
    if version != VERSION.to_string() {
        return Err(invalid(format!(
            "layout {version} of records, and this reads layout {VERSION}: read it with the program that wrote it"
        )));
    }
    let about = serde_json::from_str(second.trim())
        .map_err(|error| invalid(format!("what it is of: {error}")))?;
    let sequence = Sequence::from_bytes(records)
        .ok_or_else(|| invalid("ends in the middle of a record".into()))?;
    Ok((about, sequence))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("{name}.{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    fn about() -> About {
        About {
            pid: 1,
            command: "a b".into(),
            ..About::default()
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let path = place("saved");
        let records = [1, 2].map(|seq| Record {
            seq,
            time_ns: 9 - seq,
            ..Record::default()
        });
        let mut writer = Writer::create(&path, &about()).unwrap();
        writer.append(&records).unwrap();
        let (cut_off, sequence) = read(&path).unwrap();
        assert_eq!(cut_off, about());
        assert_eq!(sequence.records.len(), 2);
        let stats = Some(Stats {
            recorded: 2,
            ..Stats::default()
        });
        let whole = About { stats, ..about() };
        writer.finish(&whole).unwrap();
        let (read_again, sequence) = read(&path).unwrap();
        assert_eq!(read_again, whole);
        let times: Vec<u64> = sequence.records.iter().map(|one| one.time_ns).collect();
        assert_eq!(times, [7, 8]);
        let exists = Writer::create(&path, &about()).err().unwrap();
        assert_eq!(exists.kind(), io::ErrorKind::AlreadyExists);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn what_is_not_a_trace_is_refused() {
        let path = place("not-saved");
        let why = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            read(&path).unwrap_err().to_string()
        };
        let good = header(&about()).unwrap();
        assert!(why(b"").contains("not a trace"));
        assert!(why(&[b'x'; 2 * HEADER]).contains("not a trace"));
        let other = String::from_utf8(good.clone()).unwrap();
        let other = other.replacen(&format!(" {VERSION}\n"), " 1\n ", 1);
        assert!(why(&other.as_bytes()[..HEADER]).contains("layout 1 "));
        assert!(why(&[&good[..], b"half"].concat()).contains("in the middle"));
        std::fs::remove_file(path).unwrap();
    }
}
