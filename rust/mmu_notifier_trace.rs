// SPDX-License-Identifier: GPL-2.0

//! `mmu_notifier_trace`: records every MMU notifier callback of chosen processes.
//!
//! Safe code alone: it may touch its own directory in debugfs, its rings and its subscriptions.
//!
//! In `/sys/kernel/debug/mmu_notifier_trace`:
//!
//! - `attach`: write `PID` to record that process, or `PID RECORDS` for another size of its rings,
//!   one for each CPU: a power of two, at most 4194304. The module's parameter `records` says what it
//!   is else, 16384. The pid is looked up in the writer's pid namespace; the directory gets the number
//!   that was written. Words may follow:
//!   - `overwrite` or `nooverwrite`: whether full rings overwrite the oldest records or take no more;
//!     the module's parameter `overwrite` says it else.
//!   - `plain`: the subscriber has no `numa_protect`, as those that were written before it existed;
//!     its directory is `PID.plain`. A process can have both, to hold one against the other.
//! - `detach`: write `PID`, or `PID plain`, to stop and to throw the trace away.
//! - `version`: that of the layout of records, [`record::VERSION`].
//!
//! In `PID`:
//!
//! - `trace`: the records of all CPUs as text, one a line, in the order of time. It is read from
//!   beginning to end, by each who opens it, and stays.
//! - `stats`: `recorded`, the callbacks that were to be recorded (for `numa_protect`, the stretches);
//!   of these `overwritten`, those that the rings have no room for any more, `dropped`, those that
//!   full rings did not take, and `lost`, those never stored because a writer was delayed for so long
//!   that the others went round the whole ring; `size`, the room in all rings.
//! - `size`: the room in the ring of each CPU.
//! - `enabled`: `1`, or `0` while nothing is recorded.
//! - `filter`: which records are kept, see [`filter::Filter`]. `0` for all.
//! - `marker`: what is written here, up to 1024 bytes, goes among the records.
//! - `per_cpu/cpuN/records`: the records of that CPU as [`record::Record`] lays them out; record `seq`
//!   is at offset `seq * 64`. A record that was overwritten or lost reads as kind 0. The first one
//!   that is still there is the one numbered as `overwritten` in `stats`.
//! - `per_cpu/cpuN/stats`: the same as `stats`, of that CPU.
//!
//! There is no `trace_pipe`: with one, who reads would take records away from who reads beside him.
//! Who follows a target reads on in `records`, or in an open `trace`, which end where nothing more is
//! there yet.
//!
//! What is recorded is an address space: that of all threads of the process, not that of a child.
//! When it ends, because the process exits or calls `execve()`, its `release` is the last record,
//! and the trace stays until it is detached. To record what follows an `execve()`, detach and
//! attach again.
//!
//! An open file holds the module; what is merely attached does not, and is detached when the module
//! is unloaded.

use core::borrow::Borrow;
use kernel::{
    debugfs::BinaryReader,
    fs::file,
    new_mutex,
    prelude::*,
    str::CString,
    sync::{
        Arc,
        Mutex, //
    },
    task::Pid,
    uaccess::UserSliceReader, //
};

pub mod debugfs;
pub mod files;
pub mod filter;
pub mod mmu_notifier;
pub mod record;
pub mod recorder;
pub mod ring;
pub mod text;

use debugfs::{
    Dir,
    File, //
};
use files::{
    read_text,
    Files,
    Version, //
};
use mmu_notifier::support;
use recorder::{
    Log,
    Subscription, //
};

module! {
    type: MmuNotifierTrace,
    name: "mmu_notifier_trace",
    authors: ["The mmu_notifier_trace authors"],
    description: "Records MMU notifier callbacks",
    license: "GPL",
    params: {
        records: u64 {
            default: 16384,
            description: "Size of a ring, in records, where attach does not say (16384)",
        },
        // As a number: Linux 7.2 has no other parameters.
        overwrite: u8 {
            default: 1,
            description: "Whether full rings overwrite the oldest records, where attach does not say (1)",
        },
    },
}

const MAX_RECORDS: u64 = 4 * 1024 * 1024;

/// Tells one target from another: what is written to `attach` and `detach`, and the directory.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Name {
    pid: Pid,
    plain: bool,
}

/// One attached process: its files, which go first, and its subscription.
struct Target {
    _files: Pin<KBox<Files>>,
    name: Name,
    subscription: Subscription,
}

/// The attached processes, and the directory that holds theirs.
#[pin_data]
struct Targets {
    dir: Dir,
    #[pin]
    list: Mutex<KVec<Target>>,
}

impl Targets {
    /// Starts to record the process `name.pid` into rings of `size` records.
    fn attach(&self, name: Name, size: u64, overwrite: bool) -> Result {
        // Before the list is locked, so that it is put after the unlocking: the last user of an
        // address space tears it down.
        let mm = support::mm_of_vpid(name.pid)?;
        let mut list = self.list.lock();

        let attached = |target: &Target| {
            target.name.plain == name.plain
                && (target.name.pid == name.pid || target.subscription.mm().as_raw() == mm.as_raw())
        };
        if list.iter().any(attached) {
            return Err(EEXIST);
        }

        list.reserve(1, GFP_KERNEL)?;
        let log = Log::new(size, overwrite)?;
        let suffix = if name.plain { ".plain" } else { "" };
        let dir = CString::try_from_fmt(fmt!("{}{suffix}", name.pid))?;
        let dir = self.dir.subdir(&dir)?;
        let subscription = Subscription::new(&mm, log.clone(), name.plain)?;
        let target = Target {
            _files: Files::new(&dir, name.pid, &log)?,
            name,
            subscription,
        };
        list.push(target, GFP_KERNEL)?;
        Ok(())
    }

    /// Stops recording `name`, and throws its trace away.
    fn detach(&self, name: Name) -> Result {
        let mut list = self.list.lock();
        let index = list.iter().position(|target| target.name == name);

        // Dropped under the lock: until the directory is gone its name is not free.
        drop(list.remove(index.ok_or(ENOENT)?).map_err(|_| ENOENT)?);
        Ok(())
    }
}

/// What is written to `attach`, or, of it, the pid and `plain`, to `detach`.
struct Request {
    name: Name,
    records: Option<u64>,
    overwrite: Option<bool>,
}

impl Request {
    fn read(reader: &mut UserSliceReader) -> Result<Self> {
        let mut room = [0; 64];
        let mut words = read_text(reader, &mut room)?
            .split_ascii_whitespace()
            .peekable();
        let number = |word: &str| {
            word.parse::<u64>().map_err(|error| match error.kind() {
                core::num::IntErrorKind::PosOverflow => ERANGE,
                _ => EINVAL,
            })
        };

        let pid = number(words.next().ok_or(EINVAL)?)?;
        let mut request = Self {
            name: Name {
                pid: Pid::try_from(pid).map_err(|_| ERANGE)?,
                plain: false,
            },
            records: None,
            overwrite: None,
        };
        if let Some(records) = words.next_if(|word| word.starts_with(|c: char| c.is_ascii_digit()))
        {
            request.records = Some(number(records)?);
        }
        for word in words {
            match word {
                "overwrite" if request.overwrite.is_none() => request.overwrite = Some(true),
                "nooverwrite" if request.overwrite.is_none() => request.overwrite = Some(false),
                "plain" if !request.name.plain => request.name.plain = true,
                _ => return Err(EINVAL),
            }
        }
        Ok(request)
    }
}

/// A parameter of the module, of which Linux 7.2 gives a reference, and 7.3 the value.
fn parameter<T: Copy>(value: impl Borrow<T>) -> T {
    *value.borrow()
}

/// The `attach` file.
struct Attach(Arc<Targets>);

impl BinaryReader for Attach {
    fn read_from_slice(
        &self,
        reader: &mut UserSliceReader,
        _offset: &mut file::Offset,
    ) -> Result<usize> {
        let len = reader.len();
        let request = Request::read(reader)?;
        let records = request
            .records
            .unwrap_or_else(|| parameter::<u64>(module_parameters::records.value()));
        let overwrite = request
            .overwrite
            .unwrap_or_else(|| parameter::<u8>(module_parameters::overwrite.value()) != 0);

        if !records.is_power_of_two() || records > MAX_RECORDS {
            return Err(EINVAL);
        }
        self.0.attach(request.name, records, overwrite)?;
        Ok(len)
    }
}

/// The `detach` file.
struct Detach(Arc<Targets>);

impl BinaryReader for Detach {
    fn read_from_slice(
        &self,
        reader: &mut UserSliceReader,
        _offset: &mut file::Offset,
    ) -> Result<usize> {
        let len = reader.len();
        let Request {
            name,
            records: None,
            overwrite: None,
        } = Request::read(reader)?
        else {
            return Err(EINVAL);
        };

        self.0.detach(name)?;
        Ok(len)
    }
}

/// The module: dropping it removes the files, then the targets.
#[pin_data]
struct MmuNotifierTrace {
    #[pin]
    version: File<Version>,
    #[pin]
    attach: File<Attach>,
    #[pin]
    detach: File<Detach>,
}

impl kernel::InPlaceModule for MmuNotifierTrace {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(|| {
            if parameter::<u8>(module_parameters::overwrite.value()) > 1 {
                return Err(EINVAL);
            }
            let dir = Dir::new(c"mmu_notifier_trace")?;
            let targets_dir = dir.clone();
            let targets = Arc::pin_init(
                pin_init!(Targets {
                    list <- new_mutex!(KVec::new()),
                    dir: targets_dir,
                }),
                GFP_KERNEL,
            )?;

            Ok(try_pin_init!(Self {
                version <- dir.read_stream(c"version", Version),
                attach <- dir.write_binary_file(c"attach", Attach(targets.clone())),
                detach <- dir.write_binary_file(c"detach", Detach(targets)),
            }))
        })
    }
}
