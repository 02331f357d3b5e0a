//! Server-sent events on their way to the client: our own comment lines leave, every other byte stays as it is.
//!
//! A decode worker puts a line `: baton-ids <choice> <id>,<id>,...` into each event, for the proxy alone. [`Filter`] takes
//! the stream in pieces cut anywhere, removes those lines, and gives out whole events only, so that when a worker dies in
//! the midst of one the client never sees half of it. Knows lines and blank lines, never what an event says.

use bytes::{Bytes, BytesMut};

/// How our lines begin. Model output can't forge one: it is JSON inside a `data:` line and has no bare line feed.
const PREFIX: &[u8] = baton_wire::names::sse::TOKEN_IDS_PREFIX.as_bytes();

/// Bytes of one event that are held back at most. A token's event with 20 alternatives is about 4 KiB; a longer one than
/// this bound (an echoed prompt with logprobs) is passed on as it comes, whole or not.
const HELD_BYTES_MAX: usize = 64 << 10;

/// Takes our lines out of one stream.
#[derive(Debug)]
pub(crate) struct Filter {
    line: Line,
    /// The current event so far, our lines already out.
    held: BytesMut,
    /// Whether part of the current event has gone out because it is longer than the bound.
    torn: bool,
    tokens: u64,
}

/// Where in a line the next byte belongs.
#[derive(Clone, Copy, Debug)]
enum Line {
    /// So many bytes of [`PREFIX`] were seen; none of them is held, since they are known.
    Start { matched: usize },
    /// In one of our lines: past the choice or not yet, and whether the last byte was a digit of an id.
    Ours { past_choice: bool, in_id: bool },
    /// In a line of the client's, blank until now or not.
    Client { blank: bool },
}

impl Default for Filter {
    fn default() -> Self {
        Filter { line: Line::Start { matched: 0 }, held: BytesMut::new(), torn: false, tokens: 0 }
    }
}

impl Filter {
    /// Takes the next piece of the stream; gives out the events that are whole with it, or nothing.
    pub(crate) fn push(&mut self, piece: &[u8]) -> Bytes {
        let mut out = std::mem::take(&mut self.held);
        out.reserve(piece.len());
        let mut whole = 0;
        let mut rest = piece;
        while let Some(&byte) = rest.first() {
            match self.line {
                Line::Start { matched } if byte == PREFIX[matched] => {
                    rest = &rest[1..];
                    self.line = if matched + 1 == PREFIX.len() {
                        Line::Ours { past_choice: false, in_id: false }
                    } else {
                        Line::Start { matched: matched + 1 }
                    };
                }
                Line::Start { matched } => {
                    out.extend_from_slice(&PREFIX[..matched]);
                    self.line = Line::Client { blank: matched == 0 };
                }
                Line::Ours { mut past_choice, mut in_id } => {
                    let (line, ended) = take_line(&mut rest);
                    for byte in line {
                        let digit = byte.is_ascii_digit();
                        self.tokens += u64::from(past_choice && digit && !in_id);
                        in_id = past_choice && digit;
                        past_choice |= *byte == b' ';
                    }
                    self.line = if ended { Line::Start { matched: 0 } } else { Line::Ours { past_choice, in_id } };
                }
                Line::Client { blank } => {
                    let (line, ended) = take_line(&mut rest);
                    out.extend_from_slice(line);
                    let blank = blank && line.iter().all(|byte| matches!(byte, b'\r' | b'\n'));
                    self.line = if ended { Line::Start { matched: 0 } } else { Line::Client { blank } };
                    if ended && blank {
                        whole = out.len();
                        self.torn = false;
                    }
                }
            }
        }
        if out.len() - whole > HELD_BYTES_MAX {
            whole = out.len();
            self.torn = true;
        }
        self.held = out.split_off(whole);
        out.freeze()
    }

    /// The stream has ended as it should: what was still held back.
    pub(crate) fn finish(&mut self) -> Bytes {
        let mut out = std::mem::take(&mut self.held);
        if let Line::Start { matched } = self.line {
            out.extend_from_slice(&PREFIX[..matched]);
        }
        out.freeze()
    }

    /// The stream broke: half an event is dropped. What must stand before an event of our own, to end one that was partly
    /// sent.
    pub(crate) fn cut(&mut self) -> &'static [u8] {
        self.held.clear();
        if self.torn { b"\n\n" } else { b"" }
    }

    /// Token ids seen in our lines.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }
}

/// Takes the bytes up to and with the next line feed, and whether there was one.
fn take_line<'a>(rest: &mut &'a [u8]) -> (&'a [u8], bool) {
    let end = rest.iter().position(|byte| *byte == b'\n');
    let (line, after) = rest.split_at(end.map_or(rest.len(), |at| at + 1));
    *rest = after;
    (line, end.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Line by line over the whole text: what the filter must give out however the text is cut.
    fn reference(text: &[u8]) -> Vec<u8> {
        text.split_inclusive(|byte| *byte == b'\n')
            .filter(|line| !line.starts_with(PREFIX))
            .flatten()
            .copied()
            .collect()
    }

    fn filtered(pieces: &[&[u8]]) -> Vec<u8> {
        let mut filter = Filter::default();
        let mut out: Vec<u8> = pieces.iter().flat_map(|piece| filter.push(piece)).collect();
        out.extend_from_slice(&filter.finish());
        out
    }

    #[test]
    fn our_lines_leave_and_the_rest_stays() {
        let check = |text: &str, expect: &str| {
            assert_eq!(String::from_utf8_lossy(&filtered(&[text.as_bytes()])), expect, "{text:?}");
        };
        check(": baton-ids 0 5,6\ndata: {}\n\n", "data: {}\n\n");
        check(": baton-ids 0 5\r\ndata: {}\r\n\r\n", "data: {}\r\n\r\n");
        check(": keep-alive\n\n", ": keep-alive\n\n");
        check(": baton-idle\n\n", ": baton-idle\n\n");
        check("data: : baton-ids 0 5\n\n", "data: : baton-ids 0 5\n\n");
        check("data: [DONE]", "data: [DONE]");
        check(": baton-i", ": baton-i");
    }

    #[test]
    fn an_event_goes_out_whole_or_not_at_all() {
        let mut filter = Filter::default();
        assert_eq!(filter.push(b": baton-ids 0 5\ndata: {\"a\""), Bytes::new());
        assert_eq!(filter.push(b": 1}\n\ndata: {"), Bytes::from_static(b"data: {\"a\": 1}\n\n"));
        assert_eq!(filter.cut(), b"");
        assert_eq!(filter.finish(), Bytes::new());
    }

    #[test]
    fn an_event_beyond_the_bound_is_passed_on_and_ended_when_cut() {
        let mut filter = Filter::default();
        assert_eq!(filter.push(&vec![b'x'; HELD_BYTES_MAX]).len(), 0);
        assert_eq!(filter.push(b"x").len(), HELD_BYTES_MAX + 1);
        assert_eq!(filter.cut(), b"\n\n");
    }

    #[test]
    fn token_ids_are_counted_however_the_line_is_cut() {
        let text = b": baton-ids 12 5,66,777\ndata: 1,2,3\n\n: baton-ids 0 8\n\n";
        for cut in 0..text.len() {
            let mut filter = Filter::default();
            filter.push(&text[..cut]);
            filter.push(&text[cut..]);
            assert_eq!(filter.tokens(), 4, "cut at {cut}");
        }
    }

    fn text() -> impl Strategy<Value = Vec<u8>> {
        let line = prop_oneof![
            Just(b": baton-ids 0 1,2\n".to_vec()),
            Just(b": baton-ids\n".to_vec()),
            Just(b"data: {\"text\": \": baton-ids 0 1\"}\n".to_vec()),
            Just(b"\n".to_vec()),
            Just(b"\r\n".to_vec()),
            prop::collection::vec(prop::sample::select(b": baton-ids 0\r\n".to_vec()), 0..30),
            prop::collection::vec(any::<u8>(), 0..30),
        ];
        prop::collection::vec(line, 0..20).prop_map(|lines| lines.concat())
    }

    proptest! {
        #[test]
        fn any_cut_of_the_stream_gives_the_same_bytes(text in text(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12)) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]).collect();
            prop_assert_eq!(filtered(&pieces), reference(&text));
        }

        #[test]
        fn what_goes_out_before_the_end_is_always_whole_events(text in text(), cut in any::<prop::sample::Index>()) {
            let mut filter = Filter::default();
            let out = filter.push(&text[..cut.index(text.len() + 1)]);
            prop_assert!(out.is_empty() || out.ends_with(b"\n"), "{:?}", out);
        }
    }
}
