// SPDX-License-Identifier: GPL-2.0
//! The lines that the guest's /init and the runner exchange over the console. Text only, touches nothing.

use std::fmt;

/// What /init says. Each is one console line, `init: ...`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Marker {
    /// User space was reached; whether `/dev/kvm` is there.
    UserSpace {
        /// `/dev/kvm` exists in the guest.
        kvm: bool,
    },
    /// A test program starts.
    Run(String),
    /// A test program ended, and how.
    Ended(String, Status),
    /// /init could not do something that the run needs.
    Error(String),
    /// Everything ran; the machine powers off.
    Done,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// By `exit()` with this status.
    Exit(i32),
    /// By this signal.
    Signal(i32),
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Status::Exit(status) => write!(f, "exit {status}"),
            Status::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

impl Status {
    /// Reads what [`Display`](fmt::Display) wrote.
    pub fn parse(text: &str) -> Option<Status> {
        let (kind, number) = text.trim().split_once(' ')?;
        let number = number.parse().ok()?;
        match kind {
            "exit" => Some(Status::Exit(number)),
            "signal" => Some(Status::Signal(number)),
            _ => None,
        }
    }
}

impl fmt::Display for Marker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Marker::UserSpace { kvm } => {
                let kvm = if *kvm { "with" } else { "without" };
                write!(f, "init: user space, {kvm} /dev/kvm")
            }
            Marker::Run(program) => write!(f, "init: run {program}"),
            Marker::Ended(program, status) => write!(f, "init: ended {program} {status}"),
            Marker::Error(what) => write!(f, "init: error {what}"),
            Marker::Done => write!(f, "init: done"),
        }
    }
}

impl Marker {
    /// The marker in a console line, wherever in it: the kernel's own lines may come in between.
    pub fn find(line: &str) -> Option<Marker> {
        let (_, text) = line.split_once("init: ")?;
        let text = text.trim_end();
        let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
        match word {
            "user" => Some(Marker::UserSpace {
                kvm: rest == "space, with /dev/kvm",
            }),
            "run" => Some(Marker::Run(rest.to_string())),
            "ended" => {
                let (program, status) = rest.split_once(' ')?;
                Some(Marker::Ended(program.to_string(), Status::parse(status)?))
            }
            "error" => Some(Marker::Error(rest.to_string())),
            "done" => Some(Marker::Done),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_marker_is_read_back() {
        for marker in [
            Marker::UserSpace { kvm: true },
            Marker::UserSpace { kvm: false },
            Marker::Run("numa_protect".into()),
            Marker::Ended("numa_protect".into(), Status::Exit(1)),
            Marker::Ended("numa_protect".into(), Status::Signal(9)),
            Marker::Error("no module".into()),
            Marker::Done,
        ] {
            assert_eq!(Marker::find(&marker.to_string()), Some(marker.clone()));
            assert_eq!(
                Marker::find(&format!("half a line {marker}\r")),
                Some(marker)
            );
        }
    }

    #[test]
    fn other_lines_are_not_markers() {
        for line in [
            "",
            "ok 1 a",
            "init: ",
            "init: ended x",
            "init: ended x exit y",
        ] {
            assert_eq!(Marker::find(line), None, "{line}");
        }
    }
}
