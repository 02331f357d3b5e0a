//! What a client has of a stream, added up from the marks of the events that it was given whole, so that another decode worker can
//! go on with the next one. Knows what a mark says and how much is remembered; bytes and pieces are `sse.rs`'s.

use baton_wire::leg::{Resume, ResumedChoice};
use baton_wire::names::sse::{CACHED, USAGE};

/// Token ids that are remembered of one stream: a whole context of 128k tokens and half of another choice's. They take 768 KiB here
/// and at most 1.5 MiB in a leg, 8 bytes each with their commas, which the other pod's proxy and its worker have room for.
const TOKEN_IDS_MAX: usize = 192 << 10;

/// Choices that are remembered of one stream, each about 64 bytes here and in a leg: as many as a request may have prompts.
const CHOICES_MAX: usize = 1024;

/// What a client has.
#[derive(Debug, Default)]
pub(super) struct Record {
    /// As far as choices had events.
    choices: Vec<ResumedChoice>,
    /// Token ids of all choices.
    num_token_ids: usize,
    usage_sent: bool,
    is_done: bool,
    /// Whether something was given out that is not remembered, for good.
    is_lacking: bool,
}

impl Record {
    /// An event with this mark was given out.
    pub(super) fn marked(&mut self, mark: &[u8]) {
        if !self.is_lacking && self.add(mark).is_none() {
            self.give_up();
        }
    }

    /// An event without a mark was given out. `[DONE]` and errors are such events, and nothing follows them; comments are, and say
    /// nothing. Without its text it may have been anything.
    pub(super) fn unmarked(&mut self, event: Option<&[u8]>) {
        let mut lines = event.unwrap_or(b"?").split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii_end);
        if event.is_some_and(|event| event.trim_ascii_end() == b"data: [DONE]") {
            self.is_done = true;
        } else if lines.any(|line| !line.is_empty() && !line.starts_with(b":")) {
            self.give_up();
        }
    }

    /// Something was given out that can't be remembered.
    pub(super) fn give_up(&mut self) {
        *self = Record { is_lacking: true, is_done: self.is_done, ..Record::default() };
    }

    /// Whether the client has the end of the stream.
    pub(super) fn is_done(&self) -> bool {
        self.is_done
    }

    /// What the client has of so many choices; nothing where that is not known.
    pub(super) fn resume(&self, num_choices: usize) -> Option<Resume> {
        let is_known =
            !self.is_lacking && !self.is_done && self.choices.len() <= num_choices && num_choices <= CHOICES_MAX;
        is_known.then(|| {
            let mut choices = self.choices.clone();
            choices.resize_with(num_choices, ResumedChoice::default);
            Resume { choices, usage_sent: self.usage_sent }
        })
    }

    /// Adds what a mark says, if it says it in full.
    fn add(&mut self, mark: &[u8]) -> Option<()> {
        let mark = std::str::from_utf8(mark).ok()?;
        let (whose, ids) = mark.strip_suffix('\n')?.trim_end_matches('\r').split_once(' ')?;
        if whose == USAGE {
            self.usage_sent = true;
            return ids.is_empty().then_some(());
        }
        let (choice, cached) = match whose.split_once(CACHED) {
            Some((choice, cached)) => (choice, Some(cached.parse().ok()?)),
            None => (whose, None),
        };
        let choice: usize = choice.parse().ok().filter(|choice| *choice < CHOICES_MAX)?;
        if choice >= self.choices.len() {
            self.choices.resize_with(choice + 1, ResumedChoice::default);
        }
        let ResumedChoice { events, token_ids, cached_tokens } = &mut self.choices[choice];
        *events = events.checked_add(1)?;
        *cached_tokens = cached_tokens.or(cached);
        if ids.is_empty() {
            return Some(());
        }
        for id in ids.split(',') {
            if self.num_token_ids == TOKEN_IDS_MAX {
                return None;
            }
            token_ids.push(id.parse().ok()?);
            self.num_token_ids += 1;
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_remembered_up_to_the_bounds() {
        let check = |choice: usize, ids: usize, can: bool| {
            let mut record = Record::default();
            for _ in 0..ids {
                record.marked(format!("{choice} 7\n").as_bytes());
            }
            assert_eq!(record.resume(CHOICES_MAX).is_some(), can, "{choice} {ids}");
        };
        check(0, TOKEN_IDS_MAX, true);
        check(0, TOKEN_IDS_MAX + 1, false);
        check(CHOICES_MAX - 1, 1, true);
        check(CHOICES_MAX, 1, false);
        assert!(Record::default().resume(CHOICES_MAX + 1).is_none());
    }

    #[test]
    fn nothing_is_resumed_behind_the_end() {
        let mut record = Record::default();
        record.unmarked(Some(b"data: [DONE]\n\n"));
        assert!(record.is_done() && record.resume(1).is_none());
    }

    #[test]
    fn comments_say_nothing() {
        let mut record = Record::default();
        for comment in [&b": keep-alive\n\n"[..], b"\n", b"\r\n", b": a\r\n: b\r\n\r\n"] {
            record.unmarked(Some(comment));
        }
        assert_eq!(record.resume(1), Some(Resume { choices: vec![ResumedChoice::default()], usage_sent: false }));
    }
}
