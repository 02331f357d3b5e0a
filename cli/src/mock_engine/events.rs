//! An answer as a stream of events. What is equal in all events of a request is put together once; each event is then a
//! few copies into one buffer.

use super::answer::{Answer, CREATED, put};
use super::api::Api;
use super::tokens::word;
use baton_wire::names::sse;
use bytes::{BufMut as _, Bytes, BytesMut};
use std::fmt::Write as _;

/// Room that is taken for events at a time: about fifty of them share an allocation.
const BUFFER_BYTES: usize = 16 << 10;

/// The events that are left of a stream.
#[derive(Debug)]
pub(crate) struct Events {
    answer: Answer,
    shape: Shape,
    step: Step,
    buffer: BytesMut,
    /// SGLang's own API repeats the whole text in each event: so far, by choice.
    texts: Vec<String>,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Head,
    Token { index: u32, choice: u32 },
    Tail,
    End,
}

/// What stands around a token: `before`, a number (the choice, or the event's place), `middle`, the token, `after`.
#[derive(Debug, Default)]
struct Shape {
    head: String,
    before: String,
    middle: String,
    after: String,
    /// In place of `after`, in the last event of a choice.
    after_last: String,
    tail: String,
}

impl Events {
    pub(crate) fn new(answer: Answer) -> Self {
        let shape = Shape::of(&answer);
        let texts = if answer.api == Api::Generate { vec![String::new(); answer.choices as usize] } else { Vec::new() };
        let step = if shape.head.is_empty() { first_token(&answer) } else { Step::Head };
        Events { answer, shape, step, buffer: BytesMut::new(), texts }
    }

    /// The place of the token that comes next, where one does.
    pub(crate) fn next_token(&self) -> Option<u32> {
        match self.step {
            Step::Token { index, choice: 0 } => Some(index),
            Step::Head | Step::Token { .. } | Step::Tail | Step::End => None,
        }
    }

    /// Tokens of each choice.
    pub(crate) fn tokens(&self) -> u32 {
        self.answer.tokens
    }

    pub(crate) fn is_at_end(&self) -> bool {
        self.step == Step::End
    }

    /// The next piece: an event, or all that come before or after the tokens.
    pub(crate) fn next(&mut self) -> Option<Bytes> {
        match self.step {
            Step::Head => {
                self.step = first_token(&self.answer);
                Some(Bytes::from(std::mem::take(&mut self.shape.head)))
            }
            Step::Token { index, choice } => {
                let event = self.token(index, choice);
                self.step = if choice + 1 < self.answer.choices {
                    Step::Token { index, choice: choice + 1 }
                } else if index + 1 < self.answer.tokens {
                    Step::Token { index: index + 1, choice: 0 }
                } else {
                    tail(&self.shape)
                };
                Some(event)
            }
            Step::Tail => {
                self.step = Step::End;
                Some(Bytes::from(std::mem::take(&mut self.shape.tail)))
            }
            Step::End => None,
        }
    }

    fn token(&mut self, index: u32, choice: u32) -> Bytes {
        let id = self.answer.token(choice, index);
        let text = word(id, self.answer.awkward);
        let is_last = index + 1 == self.answer.tokens;
        if self.answer.api == Api::Generate {
            return self.cumulative(index, choice, text);
        }
        if self.buffer.capacity() < BUFFER_BYTES / 16 {
            self.buffer.reserve(BUFFER_BYTES);
        }
        let out = &mut self.buffer;
        if self.answer.with_ids {
            put!(out, "{}{choice} {id}\n", sse::TOKEN_IDS_PREFIX);
        }
        out.put_slice(self.shape.before.as_bytes());
        // In the responses API each event has its place in the whole stream, of which the head takes two.
        put!(out, "{}", if self.answer.api == Api::Responses { index + 2 } else { choice });
        out.put_slice(self.shape.middle.as_bytes());
        match self.answer.api {
            Api::TokenIn => put!(out, "{id}"),
            Api::Chat | Api::Completions | Api::Responses | Api::Messages | Api::Generate => {
                out.put_slice(text.as_bytes())
            }
        }
        out.put_slice(if is_last { &self.shape.after_last } else { &self.shape.after }.as_bytes());
        out.split().freeze()
    }

    fn cumulative(&mut self, index: u32, choice: u32, text: &str) -> Bytes {
        let so_far = &mut self.texts[choice as usize];
        so_far.push_str(text);
        let mut event = String::from("data: ");
        self.answer.generated(&mut event, choice, index + 1, so_far);
        event.push_str("\n\n");
        Bytes::from(event)
    }
}

fn first_token(answer: &Answer) -> Step {
    if answer.tokens > 0 && answer.choices > 0 { Step::Token { index: 0, choice: 0 } } else { Step::Tail }
}

fn tail(shape: &Shape) -> Step {
    if shape.tail.is_empty() { Step::End } else { Step::Tail }
}

const DONE: &str = "data: [DONE]\n\n";

impl Shape {
    fn of(answer: &Answer) -> Self {
        match answer.api {
            Api::Chat | Api::Completions => Self::openai(answer),
            Api::TokenIn => Self::token_in(answer),
            Api::Responses => Self::responses(answer),
            Api::Messages => Self::messages(answer),
            Api::Generate => Shape { tail: DONE.to_owned(), ..Shape::default() },
        }
    }

    fn openai(answer: &Answer) -> Self {
        let Answer { id, model, choices, .. } = answer;
        let is_chat = answer.api == Api::Chat;
        let object = if is_chat { "chat.completion.chunk" } else { "text_completion" };
        let common =
            format!("data: {{\"id\":\"{id}\",\"object\":\"{object}\",\"created\":{CREATED},\"model\":\"{model}\",");
        let mut head = String::new();
        for choice in 0..if is_chat { *choices } else { 0 } {
            put!(
                head,
                "{common}\"choices\":[{{\"index\":{choice},\"delta\":{{\"role\":\"assistant\",\"content\":\"\"}},\
                 \"logprobs\":null,\"finish_reason\":null}}]}}\n\n"
            );
        }
        let mut tail = String::new();
        if answer.includes_usage {
            put!(tail, "{common}\"choices\":[],\"usage\":{}}}\n\n", answer.usage());
        }
        tail.push_str(DONE);
        let (middle, close) = if is_chat { (",\"delta\":{\"content\":\"", "\"}") } else { (",\"text\":\"", "\"") };
        let after = |finish: &str| format!("{close},\"logprobs\":null,\"finish_reason\":{finish}}}]}}\n\n");
        Shape {
            head,
            before: format!("{common}\"choices\":[{{\"index\":"),
            middle: middle.to_owned(),
            after: after("null"),
            after_last: after("\"length\""),
            tail,
        }
    }

    fn token_in(answer: &Answer) -> Self {
        let common = format!("data: {{\"request_id\":\"{}\",\"choices\":[", answer.id);
        let after = |finish: &str| format!("],\"logprobs\":null,\"finish_reason\":{finish}}}]}}\n\n");
        let mut tail = String::new();
        if answer.includes_usage {
            put!(tail, "{common}],\"usage\":{}}}\n\n", answer.usage());
        }
        tail.push_str(DONE);
        Shape {
            head: String::new(),
            before: format!("{common}{{\"index\":"),
            middle: ",\"token_ids\":[".to_owned(),
            after: after("null"),
            after_last: after("\"length\""),
            tail,
        }
    }

    fn responses(answer: &Answer) -> Self {
        let event = |kind: &str, number: u32, rest: &str| {
            format!("event: {kind}\ndata: {{\"type\":\"{kind}\",\"sequence_number\":{number},{rest}}}\n\n")
        };
        let item = format!("{}-0", answer.id);
        let begun = format!("\"response\":{}}}", answer.response("in_progress", None));
        let added = format!(
            "\"output_index\":0,\"item\":{{\"id\":\"{item}\",\"type\":\"message\",\"role\":\"assistant\",\"status\":\
             \"in_progress\",\"content\":[]}}"
        );
        let ended = format!("\"response\":{}}}", answer.response("completed", Some(&answer.usage())));
        Shape {
            head: event("response.created", 0, &begun) + &event("response.output_item.added", 1, &added),
            before: "event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\
                     \"sequence_number\":"
                .to_owned(),
            middle: format!(",\"item_id\":\"{item}\",\"output_index\":0,\"content_index\":0,\"delta\":\""),
            after: "\"}\n\n".to_owned(),
            after_last: "\"}\n\n".to_owned(),
            tail: event("response.completed", answer.tokens.saturating_add(2), &ended),
        }
    }

    fn messages(answer: &Answer) -> Self {
        let Answer { id, model, prompt_tokens, cached_tokens, tokens, .. } = answer;
        Shape {
            head: format!(
                "event: message_start\ndata: {{\"type\":\"message_start\",\"message\":{{\"id\":\"{id}\",\"type\":\"message\",\
                 \"role\":\"assistant\",\"model\":\"{model}\",\"content\":[],\"stop_reason\":null,\"stop_sequence\":null,\
                 \"usage\":{{\"input_tokens\":{prompt_tokens},\"output_tokens\":0,\"cache_creation_input_tokens\":0,\
                 \"cache_read_input_tokens\":{cached_tokens}}}}}}}\n\n\
                 event: content_block_start\ndata: {{\"type\":\"content_block_start\",\"index\":0,\"content_block\":{{\
                 \"type\":\"text\",\"text\":\"\"}}}}\n\n"
            ),
            before: "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":".to_owned(),
            middle: ",\"delta\":{\"type\":\"text_delta\",\"text\":\"".to_owned(),
            after: "\"}}\n\n".to_owned(),
            after_last: "\"}}\n\n".to_owned(),
            tail: format!(
                "event: content_block_stop\ndata: {{\"type\":\"content_block_stop\",\"index\":0}}\n\n\
                 event: message_delta\ndata: {{\"type\":\"message_delta\",\"delta\":{{\"stop_reason\":\"max_tokens\",\
                 \"stop_sequence\":null}},\"usage\":{{\"output_tokens\":{tokens}}}}}\n\n\
                 event: message_stop\ndata: {{\"type\":\"message_stop\"}}\n\n"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::answer::tests::{APIS, answer};
    use super::*;

    fn all(answer: Answer) -> String {
        let mut events = Events::new(answer);
        let mut text = String::new();
        while let Some(event) = events.next() {
            text.push_str(std::str::from_utf8(&event).expect("text"));
        }
        assert!(events.is_at_end());
        text
    }

    /// The data of each event, without the end mark.
    fn data(text: &str) -> Vec<serde_json::Value> {
        let lines = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
        lines.map(|data| serde_json::from_str(data).unwrap_or_else(|error| panic!("{data}: {error}"))).collect()
    }

    #[test]
    fn every_event_of_every_api_is_json() {
        for api in APIS {
            for awkward in [false, true] {
                let text = all(Answer { awkward, choices: 2, includes_usage: true, ..answer(api) });
                assert!(data(&text).len() >= 10, "{api:?}: {text}");
                assert!(text.ends_with("\n\n"), "{api:?}");
            }
        }
    }

    #[test]
    fn a_streamed_text_is_the_text_that_is_not_streamed() {
        let expect: serde_json::Value = serde_json::from_str(&answer(Api::Chat).json()).expect("JSON");
        let streamed: String = data(&all(answer(Api::Chat)))
            .iter()
            .filter_map(|event| event["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
            .collect();
        assert_eq!(Some(streamed.as_str()), expect["choices"][0]["message"]["content"].as_str());
    }

    #[test]
    fn usage_comes_last_and_only_where_it_was_asked_for() {
        let events = data(&all(Answer { includes_usage: true, ..answer(Api::Completions) }));
        assert_eq!(events.len(), 6);
        assert_eq!(events[4]["choices"][0]["finish_reason"], "length");
        assert_eq!(events[5]["usage"]["completion_tokens"], 5);
        assert_eq!(events[5]["choices"], serde_json::json!([]));
        assert!(!all(answer(Api::Completions)).contains("usage"));
    }

    #[test]
    fn token_ids_stand_before_their_event() {
        let text = all(Answer { with_ids: true, ..answer(Api::Completions) });
        let ids: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix(": baton-ids 0 ")).collect();
        assert_eq!(ids.join(","), answer(Api::Completions).ids(0, 5));
    }
}
