//! The usage in a stream of server-sent events, set right as the events pass.

use crate::api::Api;
use crate::json::usage::{Usage, needle, patch_object};
use bytes::{Bytes, BytesMut};
use memchr::memmem;

/// Bytes of one event that are held back at most until it is whole. The longest event that carries usage repeats a
/// whole answer with its tools and instructions (`response.completed`): a MiB is about 250,000 tokens of text. A longer
/// one is passed on as it comes and not patched.
const HELD_BYTES_MAX: usize = 1 << 20;

/// Patches the usage in a stream of server-sent events, and gives out whole events only, so that when a worker dies in
/// the midst of one the client never sees half of it. A piece that holds whole events without usage is passed on as it
/// is, not copied.
#[derive(Debug)]
pub(crate) struct UsagePatch {
    api: Api,
    cached: Option<u64>,
    finder: memmem::Finder<'static>,
    /// The current event so far.
    held: BytesMut,
    /// Part of the current event has gone out because it is longer than the bound; how the last line of it ended so
    /// far.
    torn: Option<Line>,
    seen: Usage,
}

/// How far a line has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// Nothing yet.
    Start,
    /// A carriage return alone.
    Return,
    /// Something.
    Text,
}

impl UsagePatch {
    /// For an answer of `api`; without a number of cached tokens, usage is only read.
    pub(crate) fn new(api: Api, cached: Option<u64>) -> Self {
        let finder = memmem::Finder::new(needle(api));
        UsagePatch { api, cached, finder, held: BytesMut::new(), torn: None, seen: Usage::default() }
    }

    /// The prefill worker has answered after the decode worker began to.
    #[cfg(test)]
    pub(crate) fn set_cached(&mut self, cached: u64) {
        self.cached = Some(cached);
    }

    /// Takes the next piece of the stream; gives out the events that are whole with it, or nothing.
    pub(crate) fn push(&mut self, mut piece: Bytes) -> Bytes {
        if let Some(line) = self.torn {
            let (line, end) = blank_line_end(line, &piece);
            let Some(end) = end else {
                self.torn = Some(line);
                return piece;
            };
            self.torn = None;
            let torn = piece.split_to(end);
            let whole = self.push_whole(piece);
            return if whole.is_empty() { torn } else { [torn, whole].concat().into() };
        }
        self.push_whole(piece)
    }

    fn push_whole(&mut self, mut piece: Bytes) -> Bytes {
        let whole = if self.held.is_empty() {
            let whole = piece.split_to(last_blank_line_end(&piece, 0).unwrap_or(0));
            self.held.extend_from_slice(&piece);
            whole
        } else {
            let known = self.held.len();
            self.held.extend_from_slice(&piece);
            match last_blank_line_end(&self.held, known) {
                Some(end) => self.held.split_to(end).freeze(),
                None => Bytes::new(),
            }
        };
        let whole = self.patch_events(whole);
        if self.held.len() <= HELD_BYTES_MAX {
            return whole;
        }
        self.torn = Some(blank_line_end(Line::Start, &self.held).0);
        let torn = self.held.split().freeze();
        if whole.is_empty() { torn } else { [whole, torn].concat().into() }
    }

    /// The stream has ended as it should: what was still held back.
    pub(crate) fn finish(&mut self) -> Bytes {
        let rest = self.held.split().freeze();
        self.patch_events(rest)
    }

    /// The stream broke: half an event is dropped. What must stand before an event of our own, to end one that was
    /// partly sent.
    pub(crate) fn cut(&mut self) -> &'static [u8] {
        self.held.clear();
        if self.torn.take().is_some() { b"\n\n" } else { b"" }
    }

    /// What the events said so far, before they were patched; of several the last.
    pub(crate) fn seen(&self) -> Usage {
        self.seen
    }

    /// Whole events, or the rest of a stream.
    fn patch_events(&mut self, events: Bytes) -> Bytes {
        let mut out = BytesMut::new();
        let mut copied = 0;
        let mut from = 0;
        while let Some(hit) = self.finder.find(&events[from..]).map(|at| from + at) {
            let line_start = memchr::memrchr(b'\n', &events[..hit]).map_or(0, |at| at + 1);
            let line_end = memchr::memchr(b'\n', &events[hit..]).map_or(events.len(), |at| hit + at);
            let behind = hit + self.finder.needle().len();
            // Most events of a stream may say `"usage":null`; they need no closer look.
            if is_null(&events[behind..line_end]) {
                from = behind;
                continue;
            }
            from = line_end;
            let event_start = last_blank_line_end(&events[..line_start], 0).unwrap_or(0);
            let event_end = blank_line_end(Line::Text, &events[hit..]).1.map_or(events.len(), |end| hit + end);
            let Some(json) = data(&events[line_start..line_end]) else { continue };
            if event_end - event_start > HELD_BYTES_MAX {
                continue;
            }
            let json = line_start + json.start..line_start + json.end;
            let text = events.slice(json.clone());
            let Some((patched, said)) = patch_object(self.api, &text, self.cached) else { continue };
            self.seen.update(said);
            if patched.as_ptr() != text.as_ptr() {
                out.extend_from_slice(&events[copied..json.start]);
                out.extend_from_slice(&patched);
                copied = json.end;
            }
        }
        if copied == 0 {
            return events;
        }
        out.extend_from_slice(&events[copied..]);
        out.freeze()
    }
}

/// Whether behind a key there is `null`.
fn is_null(behind: &[u8]) -> bool {
    behind.trim_ascii_start().strip_prefix(b":").is_some_and(|value| value.trim_ascii_start().starts_with(b"null"))
}

/// Where in a line of an event its data lies.
fn data(line: &[u8]) -> Option<std::ops::Range<usize>> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let value = line.strip_prefix(b"data:")?;
    let value = value.strip_prefix(b" ").unwrap_or(value);
    Some(line.len() - value.len()..line.len())
}

/// Where the first blank line ends, in a text that goes on from `line`; and how far the text's last line has got.
///
/// Lines end in a line feed, with a carriage return before it or not. The standard also allows a carriage return alone,
/// which no engine sends: such a stream would be passed on unpatched in pieces of the bound.
fn blank_line_end(mut line: Line, text: &[u8]) -> (Line, Option<usize>) {
    let mut from = 0;
    loop {
        let rest = &text[from..];
        let Some(at) = memchr::memchr(b'\n', rest) else {
            let line = match (line, rest) {
                (line, b"") => line,
                (Line::Start, b"\r") => Line::Return,
                _ => Line::Text,
            };
            return (line, None);
        };
        from += at + 1;
        match (line, &rest[..at]) {
            (Line::Start | Line::Return, b"") | (Line::Start, b"\r") => return (Line::Start, Some(from)),
            _ => line = Line::Start,
        }
    }
}

/// Where the last blank line ends, in a text that begins with a line; only if it ends behind `known`.
fn last_blank_line_end(text: &[u8], known: usize) -> Option<usize> {
    let mut before = text.len();
    while let Some(at) = memchr::memrchr(b'\n', &text[known..before]).map(|at| known + at) {
        let line = &text[..at];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() || line.ends_with(b"\n") {
            return Some(at + 1);
        }
        before = at;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::usage::patch;
    use proptest::prelude::*;

    fn patched(text: &str, cached: u64) -> String {
        let (out, _) = patch(Api::Chat, &Bytes::copy_from_slice(text.as_bytes()), Some(cached));
        String::from_utf8_lossy(&out).into_owned()
    }

    fn streamed(api: Api, cached: Option<u64>, pieces: &[&[u8]]) -> String {
        let mut patch = UsagePatch::new(api, cached);
        let mut out: Vec<u8> = Vec::new();
        for piece in pieces {
            out.extend_from_slice(&patch.push(Bytes::copy_from_slice(piece)));
        }
        out.extend_from_slice(&patch.finish());
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn a_stream_keeps_the_last_usage_seen() {
        let mut patch = UsagePatch::new(Api::Messages, None);
        let start = r#"data: {"message":{"usage":{"input_tokens":9,"output_tokens":0}}}"#;
        let delta = r#"data: {"usage":{"output_tokens":5}}"#;
        let events = Bytes::from(format!("{start}\n\n{delta}\n\n"));
        assert_eq!(patch.push(events.clone()).as_ptr(), events.as_ptr());
        let expect = Usage { prompt_tokens: Some(9), completion_tokens: Some(5), cached_tokens: None };
        assert_eq!(patch.seen(), expect);
    }

    #[test]
    fn whole_events_without_usage_are_not_copied() {
        let mut patch = UsagePatch::new(Api::Chat, Some(1));
        let events = Bytes::from_static(b"data: {\"choices\":[],\"usage\":null}\n\ndata: {\"choices\":[1]}\r\n\r\n");
        let out = patch.push(events.clone());
        assert_eq!((out.as_ptr(), out.len()), (events.as_ptr(), events.len()));
        let split = Bytes::from_static(b"data: {}\n\ndata: {\"us");
        let out = patch.push(split.clone());
        assert_eq!((out.as_ptr(), out.len()), (split.as_ptr(), 10));
        assert_eq!(patch.push(Bytes::from_static(b"age\":{}}\n")).len(), 0);
        assert_eq!(
            patch.push(Bytes::from_static(b"\n")),
            "data: {\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":1}}}\n\n"
        );
    }

    #[test]
    fn the_prefill_workers_number_may_come_late() {
        let mut patch = UsagePatch::new(Api::Chat, None);
        let event = Bytes::from_static(b"data: {\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":7}}}\n\n");
        assert_eq!(patch.push(event.clone()), event);
        patch.set_cached(3);
        assert!(patch.push(event).windows(3).any(|bytes| bytes == b":3}"));
    }

    #[test]
    fn half_an_event_is_dropped_when_the_stream_breaks() {
        let mut patch = UsagePatch::new(Api::Chat, Some(1));
        assert_eq!(patch.push(Bytes::from_static(b"data: {}\n\ndata: {\"a")), "data: {}\n\n");
        assert_eq!(patch.cut(), b"");
        assert_eq!(patch.finish(), Bytes::new());
    }

    /// An event of so many bytes with usage at its end.
    fn long_event(len: usize) -> Vec<u8> {
        let (head, tail) = ("data: {\"text\":\"", "\",\"usage\":{\"a\":1}}\n\n");
        [head.as_bytes(), &vec![b'x'; len - head.len() - tail.len()], tail.as_bytes()].concat()
    }

    #[test]
    fn an_event_beyond_the_bound_is_passed_on_unpatched() {
        let short = b"data: {\"usage\":{\"a\":1}}\r\n\r\n".as_slice();
        for (len, is_patched) in [(HELD_BYTES_MAX, true), (HELD_BYTES_MAX + 1, false)] {
            let text = [&long_event(len), short].concat();
            let whole = streamed(Api::Chat, Some(5), &[&text]);
            assert_eq!(whole.matches("cached_tokens").count(), if is_patched { 2 } else { 1 }, "{len}");
            for cut in [1, len / 2, len - 30, len - 2, len - 1, len, len + 1] {
                assert!(streamed(Api::Chat, Some(5), &[&text[..cut], &text[cut..]]) == whole, "{len} cut at {cut}");
            }
            let pieces: Vec<&[u8]> = text.chunks(1000).collect();
            assert!(streamed(Api::Chat, Some(5), &pieces) == whole, "{len} in small pieces");
        }
        let mut patch = UsagePatch::new(Api::Chat, Some(5));
        assert_eq!(patch.push(Bytes::from(vec![b'x'; HELD_BYTES_MAX + 1])).len(), HELD_BYTES_MAX + 1);
        assert_eq!(patch.push(Bytes::from_static(b"on")), "on");
        assert_eq!(patch.cut(), b"\n\n");
    }

    fn text() -> impl Strategy<Value = Vec<u8>> {
        let line = prop_oneof![
            Just(
                "data: {\"usage\":{\"prompt_tokens\":9,\"prompt_tokens_details\":{\"cached_tokens\":8}}}\n".to_owned()
            ),
            Just("data:{\"usage\":{\"a\":\"\\n\"}}\r\n".to_owned()),
            Just("data: {\"usage\":null}\n".to_owned()),
            Just("data: {\"choices\":[{\"text\":\"usage\"}]}\n".to_owned()),
            Just("data: [DONE]\n".to_owned()),
            Just("event: message\n".to_owned()),
            Just(": \"usage\": {}\n".to_owned()),
            Just("\n".to_owned()),
            Just("\n".to_owned()),
            Just("\r\n".to_owned()),
            Just("\r".to_owned()),
            "[\r\n \"a-e:{}]{0,12}",
        ];
        prop::collection::vec(line, 0..16).prop_map(|lines| lines.concat().into_bytes())
    }

    /// Line by line over the whole text: what the patch must give out however the text is cut.
    fn reference(text: &[u8], cached: u64) -> String {
        let text = String::from_utf8_lossy(text);
        let lines = text.split_inclusive('\n').map(|line| {
            let body = line.strip_suffix('\n').unwrap_or(line);
            let body = body.strip_suffix('\r').unwrap_or(body);
            let end = &line[body.len()..];
            match body.strip_prefix("data:") {
                Some(json) => {
                    let trimmed = json.strip_prefix(' ').unwrap_or(json);
                    let space = &json[..json.len() - trimmed.len()];
                    format!("data:{space}{}{end}", patched(trimmed, cached))
                }
                None => line.to_owned(),
            }
        });
        lines.collect()
    }

    proptest! {
        #[test]
        fn any_cut_of_the_stream_gives_the_same_bytes(
            text in text(),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]).collect();
            prop_assert_eq!(streamed(Api::Chat, Some(4), &pieces), reference(&text, 4));
        }

        #[test]
        fn a_blank_line_is_found_in_pieces_of_any_size(text in "[\r\nx]{0,12}", cut in any::<prop::sample::Index>()) {
            let (first, second) = text.as_bytes().split_at(cut.index(text.len() + 1));
            let (line, end) = blank_line_end(Line::Start, first);
            let (_, then) = blank_line_end(line, second);
            let found = end.or(then.map(|end| first.len() + end));
            prop_assert_eq!(found, blank_line_end(Line::Start, text.as_bytes()).1);
            let first = (0..=text.len()).find(|at| last_blank_line_end(&text.as_bytes()[..*at], 0) == Some(*at));
            prop_assert_eq!(found, first);
        }

        #[test]
        fn what_goes_out_before_the_end_is_always_whole_events(text in text(), cut in any::<prop::sample::Index>()) {
            let mut patch = UsagePatch::new(Api::Chat, None);
            let out = patch.push(Bytes::copy_from_slice(&text[..cut.index(text.len() + 1)]));
            let whole = out.is_empty() || out == "\n" || out == "\r\n" || out.ends_with(b"\n\n") || out.ends_with(b"\n\r\n");
            prop_assert!(whole, "{:?}", out);
        }
    }
}
