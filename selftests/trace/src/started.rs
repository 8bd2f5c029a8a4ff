// SPDX-License-Identifier: GPL-2.0
//! A command that waits before its first instruction, so that the recorder can be attached to it; starts and ends that
//! alone.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

/// A command that was started, and waits before its first instruction until it is told to go on. If it never is, it ends.
pub struct Started {
    child: Option<Child>,
}

impl Started {
    /// Starts it, with its own memory already. By the thread that is going to tell it to go on.
    pub fn new(command: &mut Command) -> io::Result<Started> {
        // SAFETY: between fork() and exec(), ptrace() is one system call and nothing else.
        unsafe {
            command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("run {name}: {error}")))?;
        let pid = child.id() as i32;
        let started = Started { child: Some(child) };
        let mut status = 0;
        // SAFETY: a child of ours, and a place for its status.
        let waited = unsafe { libc::waitpid(pid, &mut status, 0) };
        if waited != pid || !libc::WIFSTOPPED(status) {
            let problem = format!("{name} did not stop at its beginning: {status:#x}");
            return Err(io::Error::other(problem));
        }
        Ok(started)
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Lets it run.
    pub fn go_on(mut self) -> io::Result<Child> {
        // SAFETY: it is stopped, and traced by us.
        let status = unsafe { libc::ptrace(libc::PTRACE_DETACH, self.id() as i32, 0, 0) };
        match (status, self.child.take()) {
            (0, Some(child)) => Ok(child),
            (_, child) => {
                let error = io::Error::last_os_error();
                self.child = child;
                Err(io::Error::new(
                    error.kind(),
                    format!("PTRACE_DETACH: {error}"),
                ))
            }
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
