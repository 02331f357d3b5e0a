//! All that `baton` prints: results to standard output, progress and errors to standard error.
//!
//! The only file that writes to either. A closed pipe ends nothing here: who reads no longer wants no answer.

use std::io::{IsTerminal as _, Write as _};

/// Progress on standard error: on a terminal one line that is rewritten, elsewhere one line for each change.
pub(crate) struct Terminal {
    live: bool,
    shown: String,
}

impl Terminal {
    /// Live if standard error is a terminal.
    pub(crate) fn new() -> Self {
        Terminal { live: std::io::stderr().is_terminal(), shown: String::new() }
    }

    /// Whether the status is one line that is rewritten.
    pub(crate) fn is_live(&self) -> bool {
        self.live
    }

    /// Shows the status, unless it is what is shown already.
    pub(crate) fn status(&mut self, text: &str) {
        if self.shown == text {
            return;
        }
        self.shown = text.to_owned();
        // Without wrapping, so that a line longer than the terminal is wide stays one line that can be rewritten.
        if self.live { to_stderr(&format!("\r\x1b[K\x1b[?7l{text}\x1b[?7h")) } else { to_stderr(&format!("{text}\n")) }
    }

    /// Says something that stays, above the status.
    pub(crate) fn note(&mut self, text: &str) {
        self.clear();
        to_stderr(&format!("{text}\n"));
    }

    /// Takes the live status away, so that something else can be printed.
    pub(crate) fn clear(&mut self) {
        if self.live && !self.shown.is_empty() {
            to_stderr("\r\x1b[K");
            self.shown.clear();
        }
    }
}

/// A line of the result.
pub(crate) fn print_line(text: &str) {
    to_stdout(&format!("{text}\n"));
}

/// A piece of the result, shown at once.
pub(crate) fn print(text: &str) {
    to_stdout(text);
}

/// Why the command failed, each cause after what it caused.
pub(crate) fn error(error: &anyhow::Error) {
    to_stderr(&format!("error: {error:#}\n"));
}

/// A line beside the result, such as a hint in a conversation.
pub(crate) fn hint(text: &str) {
    to_stderr(&format!("{text}\n"));
}

fn to_stdout(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

fn to_stderr(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}
