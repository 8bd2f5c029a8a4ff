// SPDX-License-Identifier: GPL-2.0

//! Text files of lines that are formatted as they are read.
//!
//! Safe code alone; it may touch its lines and the reader's buffer.

use kernel::{
    new_mutex,
    prelude::*,
    sync::Mutex,
    uaccess::UserSliceWriter, //
};

use crate::debugfs::Stream;

/// A line of text, on the stack.
#[derive(Clone, Copy)]
pub struct Line {
    text: [u8; Line::SIZE],
    len: usize,
}

impl Line {
    /// More than the longest line takes; the rest of a longer one would be left out.
    const SIZE: usize = 320;

    /// Without text, not even a line's end.
    pub const EMPTY: Self = Self {
        text: [0; Self::SIZE],
        len: 0,
    };

    fn as_bytes(&self) -> &[u8] {
        &self.text[..self.len]
    }
}

impl core::fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let room = &mut self.text[self.len..];
        let len = text.len().min(room.len());
        room[..len].copy_from_slice(&text.as_bytes()[..len]);
        self.len += len;
        Ok(())
    }
}

/// The lines of a file, from the first on.
pub trait Lines: Send + Unpin + 'static {
    /// The next line, with its end. [`None`] where there is none now.
    fn next_line(&mut self) -> Option<Line>;
}

/// An open file of [`Lines`]. Each is made when it is read: neither the length of the text nor a slow
/// reader holds anything up.
#[pin_data]
pub struct Text<L> {
    #[pin]
    state: Mutex<State<L>>,
}

struct State<L> {
    lines: L,
    line: Line,
    /// Bytes of `line` that were read.
    read: usize,
}

impl<L: Lines> Text<L> {
    /// Begins with the first line.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn new(lines: L) -> Result<Pin<KBox<Self>>> {
        let state = State {
            lines,
            line: Line::EMPTY,
            read: 0,
        };

        KBox::pin_init(pin_init!(Self { state <- new_mutex!(state) }), GFP_KERNEL)
    }
}

impl<L: Lines> Stream for Text<L> {
    fn read(&self, writer: &mut UserSliceWriter) -> Result<usize> {
        let room = writer.len();
        let mut state = self.state.lock();

        while !writer.is_empty() {
            let rest = &state.line.as_bytes()[state.read..];
            let part = &rest[..rest.len().min(writer.len())];
            let len = part.len();
            match writer.write_slice(part) {
                Ok(()) => state.read += len,
                // What was read before is not read again.
                Err(_) if writer.len() < room => break,
                Err(error) => return Err(error),
            }
            if len == 0 {
                let Some(line) = state.lines.next_line() else {
                    break;
                };
                state.line = line;
                state.read = 0;
            }
        }
        Ok(room - writer.len())
    }
}
