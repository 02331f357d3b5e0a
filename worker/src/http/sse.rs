//! Server-sent events as bytes, the way OpenAI's clients read them.

use baton_wire::names::sse::{CACHED, TOKEN_IDS_PREFIX, USAGE};
use std::fmt::Write;

/// What a stream that is complete ends with.
pub(super) const DONE: &str = "data: [DONE]\n\n";

/// What an event is, for the proxy alone.
#[derive(Clone, Copy, Debug)]
pub(super) enum Mark<'a> {
    /// Of a choice.
    Choice {
        /// Which.
        choice: u32,
        /// In its first event: prompt tokens that a prefix cache had.
        cached: Option<usize>,
        /// The tokens that it covers.
        ids: &'a [u32],
    },
    /// The usage.
    Usage,
}

/// Appends one event. The mark goes before the data as a comment, which the proxy reads and removes.
pub(super) fn event(out: &mut String, mark: Option<Mark<'_>>, json: &str) {
    if let Some(mark) = mark {
        write_mark(out, mark).expect("writing to memory does not fail");
    }
    out.push_str("data: ");
    out.push_str(json);
    out.push_str("\n\n");
}

fn write_mark(out: &mut String, mark: Mark<'_>) -> std::fmt::Result {
    out.push_str(TOKEN_IDS_PREFIX);
    match mark {
        Mark::Usage => write!(out, "{USAGE} ")?,
        Mark::Choice { choice, cached, ids } => {
            write!(out, "{choice}")?;
            if let Some(cached) = cached {
                write!(out, "{CACHED}{cached}")?;
            }
            out.push(' ');
            for (at, id) in ids.iter().enumerate() {
                let comma = if at == 0 { "" } else { "," };
                write!(out, "{comma}{id}")?;
            }
        }
    }
    out.push('\n');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_stands_in_a_comment_of_the_same_event() {
        let mut out = String::new();
        let choice = |cached, ids| Some(Mark::Choice { choice: 1, cached, ids });
        let mut check = |mark, text: &str| {
            event(&mut out, mark, "{}");
            assert_eq!(std::mem::take(&mut out), format!("{text}data: {{}}\n\n"));
        };
        check(choice(Some(64), &[]), ": baton-ids 1;cached=64 \n");
        check(choice(None, &[7, 8]), ": baton-ids 1 7,8\n");
        check(choice(None, &[]), ": baton-ids 1 \n");
        check(Some(Mark::Usage), ": baton-ids usage \n");
        check(None, "");
    }
}
