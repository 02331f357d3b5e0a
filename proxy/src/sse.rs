//! Server-sent events on their way to the client: our own comment lines leave, every other byte stays as it is.
//!
//! A decode worker puts a line `: baton-ids <choice> <id>,<id>,...` into each event, for the proxy alone. [`Filter`] takes
//! the stream in pieces cut anywhere, removes those lines, and gives out whole events only, so that when a worker dies in
//! the midst of one the client never sees half of it. What the lines of the events said that were given out whole is the
//! [`Record`], from which another worker goes on. Knows lines and blank lines, never what an event says.

mod record;

use baton_wire::leg::Resume;
use bytes::{Bytes, BytesMut};
use record::Record;

/// How our lines begin. Model output can't forge one: it is JSON inside a `data:` line and has no bare line feed.
const PREFIX: &[u8] = baton_wire::names::sse::TOKEN_IDS_PREFIX.as_bytes();

/// Bytes of one event that are held back at most. A token's event with 20 alternatives is about 4 KiB; a longer one than
/// this bound (an echoed prompt with logprobs) is passed on as it comes, whole or not.
const HELD_BYTES_MAX: usize = 64 << 10;

/// Bytes of our line in one event that are kept at most: some 8,000 token ids, where one event covers a token or two.
const MARK_BYTES_MAX: usize = 64 << 10;

/// Takes our lines out of one stream.
#[derive(Debug)]
pub(crate) struct Filter {
    line: Line,
    /// The current event so far, our lines already out.
    held: BytesMut,
    /// Whether part of the current event has gone out because it is longer than the bound.
    torn: bool,
    /// Our line of the current event so far, behind its prefix and with its line feed.
    mark: Vec<u8>,
    /// Token ids of the current event so far.
    pending: u64,
    /// Token ids of the events that were given out whole.
    tokens: u64,
    record: Record,
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
        Filter {
            line: Line::Start { matched: 0 },
            held: BytesMut::new(),
            torn: false,
            mark: Vec::new(),
            pending: 0,
            tokens: 0,
            record: Record::default(),
        }
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
                        self.pending += u64::from(past_choice && digit && !in_id);
                        in_id = past_choice && digit;
                        past_choice |= *byte == b' ';
                    }
                    if self.mark.len() + line.len() <= MARK_BYTES_MAX {
                        self.mark.extend_from_slice(line);
                    } else {
                        self.record.give_up();
                    }
                    self.line = if ended { Line::Start { matched: 0 } } else { Line::Ours { past_choice, in_id } };
                }
                Line::Client { blank } => {
                    let (line, ended) = take_line(&mut rest);
                    out.extend_from_slice(line);
                    let blank = blank && line.iter().all(|byte| matches!(byte, b'\r' | b'\n'));
                    self.line = if ended { Line::Start { matched: 0 } } else { Line::Client { blank } };
                    if ended && blank {
                        self.event_ends(&out[whole..]);
                        whole = out.len();
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

    /// An event is whole with this, which is all of it unless it is torn.
    fn event_ends(&mut self, event: &[u8]) {
        if self.mark.is_empty() {
            self.record.unmarked((!self.torn).then_some(event));
        } else {
            self.record.marked(&self.mark);
            self.mark.clear();
        }
        self.tokens += std::mem::take(&mut self.pending);
        self.torn = false;
    }

    /// The stream has ended as it should: what was still held back.
    pub(crate) fn finish(&mut self) -> Bytes {
        let mut out = std::mem::take(&mut self.held);
        if let Line::Start { matched } = self.line {
            out.extend_from_slice(&PREFIX[..matched]);
        }
        self.tokens += std::mem::take(&mut self.pending);
        out.freeze()
    }

    /// The stream broke: half an event is dropped. What must stand before an event of our own, to end one that was partly
    /// sent.
    pub(crate) fn cut(&mut self) -> &'static [u8] {
        self.held.clear();
        if self.torn { b"\n\n" } else { b"" }
    }

    /// The stream broke and is to go on from another worker: half an event is dropped, and the next piece is taken as that
    /// worker's first. What the client has of `num_choices` choices; nothing, and nothing done, where that is not known in full.
    pub(crate) fn resume(&mut self, num_choices: usize) -> Option<Resume> {
        let resume = self.record.resume(num_choices).filter(|_| !self.torn)?;
        self.held.clear();
        self.mark.clear();
        self.pending = 0;
        self.line = Line::Start { matched: 0 };
        Some(resume)
    }

    /// Whether `[DONE]` was given out: then the client has all of the answer, however the stream ends.
    pub(crate) fn is_done(&self) -> bool {
        self.record.is_done()
    }

    /// Token ids of the events that were given out.
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
    use baton_wire::leg::ResumedChoice;
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

    /// A stream as a worker writes it: each event's mark and data.
    fn stream() -> impl Strategy<Value = Vec<(Option<Mark>, Vec<u8>)>> {
        let ids = prop::collection::vec(0_u32..100_000, 0..4);
        let event = (0_u32..3, ids, prop::option::of(0_u32..100), "[a-z: \"]{0,12}");
        let data = |text: &str| format!("data: {{\"text\": {text:?}}}\n\n").into_bytes();
        let event =
            event.prop_map(move |(choice, ids, cached, text)| (Some(Mark::Choice(choice, cached, ids)), data(&text)));
        let comment = Just((None, b": keep-alive\n\n".to_vec()));
        let events = prop::collection::vec(prop_oneof![9 => event, 1 => comment], 0..12);
        let usage = Just((Some(Mark::Usage), b"data: {\"usage\": {}}\n\n".to_vec()));
        let done = Just((None, b"data: [DONE]\n\n".to_vec()));
        let end = prop_oneof![Just(0), Just(1), Just(2)];
        (events, usage, done, end).prop_map(|(mut events, usage, done, end)| {
            events.extend([usage, done].into_iter().take(end));
            events
        })
    }

    /// What a mark says.
    #[derive(Clone, Debug)]
    enum Mark {
        Choice(u32, Option<u32>, Vec<u32>),
        Usage,
    }

    fn written(events: &[(Option<Mark>, Vec<u8>)]) -> Vec<u8> {
        let mut out = Vec::new();
        for (mark, data) in events {
            match mark {
                None => {}
                Some(Mark::Usage) => out.extend_from_slice(b": baton-ids usage \n"),
                Some(Mark::Choice(choice, cached, ids)) => {
                    let cached = cached.map_or_else(String::new, |tokens| format!(";cached={tokens}"));
                    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
                    out.extend_from_slice(format!(": baton-ids {choice}{cached} {}\n", ids.join(",")).as_bytes());
                }
            }
            out.extend_from_slice(data);
        }
        out
    }

    /// What the marks of these events say together.
    fn said(events: &[(Option<Mark>, Vec<u8>)]) -> Resume {
        let mut resume = Resume { choices: vec![ResumedChoice::default(); 3], usage_sent: false };
        for mark in events.iter().filter_map(|(mark, _)| mark.as_ref()) {
            match mark {
                Mark::Usage => resume.usage_sent = true,
                Mark::Choice(choice, cached, ids) => {
                    let choice = &mut resume.choices[*choice as usize];
                    choice.events += 1;
                    choice.token_ids.extend(ids);
                    choice.cached_tokens = choice.cached_tokens.or(*cached);
                }
            }
        }
        resume
    }

    #[test]
    fn what_is_not_known_in_full_can_not_be_resumed() {
        let check = |text: &[u8], num_choices: usize, can: bool| {
            let mut filter = Filter::default();
            filter.push(text);
            assert_eq!(filter.resume(num_choices).is_some(), can, "{:?}", String::from_utf8_lossy(text));
        };
        check(b"", 1, true);
        check(b": baton-ids 0 5\ndata: {}\n\n", 1, true);
        check(b": baton-ids 1 5\ndata: {}\n\n", 1, false);
        check(b"data: {\"error\": {}}\n\n", 1, false);
        check(b": baton-ids x 5\ndata: {}\n\n", 1, false);
        check(b": baton-ids 0 5\n: baton-ids 0 6\ndata: {}\n\n", 1, false);
        check(b": baton-ids 0 99999999999\ndata: {}\n\n", 1, false);
        check(&[&b": baton-ids 0 5\ndata: "[..], &vec![b'x'; HELD_BYTES_MAX]].concat(), 1, false);
        check(&[&b": baton-ids 0 5\ndata: "[..], &vec![b'x'; HELD_BYTES_MAX], b"\n\n"].concat(), 1, true);
        check(
            &[&b": baton-ids 0 "[..], &b"1234567,".repeat(MARK_BYTES_MAX / 8), b"1\ndata: {}\n\n"].concat(),
            1,
            false,
        );
    }

    #[test]
    fn the_stream_that_goes_on_begins_with_a_line_of_its_own() {
        for half in [": bat", ": baton-ids 0 6,", ": baton-ids 0 6\n", ": baton-ids 0 6\ndata: {\"te", "data: {}\n"] {
            let mut filter = Filter::default();
            let mut out = filter.push(b": baton-ids 0;cached=3 5\ndata: one\n\n").to_vec();
            out.extend_from_slice(&filter.push(half.as_bytes()));
            let choice = ResumedChoice { events: 1, token_ids: vec![5], cached_tokens: Some(3) };
            assert_eq!(filter.resume(1), Some(Resume { choices: vec![choice], usage_sent: false }), "{half:?}");
            out.extend_from_slice(&filter.push(b": baton-ids 0 6\ndata: two\n\ndata: [DONE]\n\n"));
            assert_eq!(String::from_utf8_lossy(&out), "data: one\n\ndata: two\n\ndata: [DONE]\n\n");
            assert_eq!((filter.tokens(), filter.is_done()), (2, true));
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
        fn the_record_is_that_of_the_events_that_went_out_however_the_stream_is_cut(
            events in stream(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 1..12),
        ) {
            let text = written(&events);
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
            cuts.push(0);
            cuts.sort_unstable();
            let mut filter = Filter::default();
            let out: Vec<u8> = cuts.windows(2).flat_map(|cut| filter.push(&text[cut[0]..cut[1]])).collect();
            // How many events are out is told by the bytes alone.
            let ends = events.iter().scan(0, |end, (_, data)| { *end += data.len(); Some(*end) });
            let count = ends.take_while(|end| *end <= out.len()).count();
            let sent = &events[..count];
            prop_assert_eq!(sent.iter().map(|(_, data)| data.len()).sum::<usize>(), out.len());
            let expect = said(sent);
            prop_assert_eq!(filter.tokens(), expect.choices.iter().map(|choice| choice.token_ids.len() as u64).sum::<u64>());
            prop_assert_eq!(filter.is_done(), out.ends_with(b"data: [DONE]\n\n"));
            // Behind [DONE] there is nothing to go on with.
            prop_assert_eq!(filter.resume(3), (!filter.is_done()).then_some(expect));
        }

        #[test]
        fn what_goes_out_before_the_end_is_always_whole_events(text in text(), cut in any::<prop::sample::Index>()) {
            let mut filter = Filter::default();
            let out = filter.push(&text[..cut.index(text.len() + 1)]);
            prop_assert!(out.is_empty() || out.ends_with(b"\n"), "{:?}", out);
        }
    }
}
