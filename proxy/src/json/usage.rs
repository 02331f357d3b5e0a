//! The usage that an answer reports: read, and set right where a prompt was computed by another worker.
//!
//! A decode worker takes the KV that it was handed for KV from its own prefix cache and reports nearly the whole prompt
//! as cached. How much of it really was cached the prefill worker said; its number replaces the other, since cached
//! tokens are billed for less. Nothing else in an answer is touched.

use crate::api::Api;
use crate::json::scan::{DEPTH_MAX, Object, scan};
use crate::json::splice::{Change, splice};
use bytes::Bytes;
use memchr::memmem;

/// Token counts, as far as the answer gave any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// The whole prompt, cached tokens included.
    pub(crate) prompt_tokens: Option<u64>,
    /// Generated.
    pub(crate) completion_tokens: Option<u64>,
    /// Of the prompt's tokens those whose KV was there already.
    pub(crate) cached_tokens: Option<u64>,
}

impl Usage {
    /// What an answer says about its usage.
    pub(crate) fn read(api: Api, answer: &Object) -> Usage {
        place(api, answer).map(|(_, usage)| Usage::of(api, &usage)).unwrap_or_default()
    }

    fn of(api: Api, usage: &Object) -> Usage {
        let cached_within = |details: &str| usage.object(details).and_then(|details| details.as_u64("cached_tokens"));
        let (prompt, completion) = match api {
            Api::Responses | Api::Messages => ("input_tokens", "output_tokens"),
            Api::Chat | Api::Completions | Api::Generate | Api::SglangGenerate => {
                ("prompt_tokens", "completion_tokens")
            }
        };
        let cached_tokens = match api {
            Api::Chat | Api::Completions | Api::Generate => cached_within("prompt_tokens_details"),
            Api::Responses => cached_within("input_tokens_details"),
            Api::Messages => usage.as_u64("cache_read_input_tokens"),
            Api::SglangGenerate => usage.as_u64("cached_tokens"),
        };
        let mut prompt_tokens = usage.as_u64(prompt);
        if api == Api::Messages {
            // Anthropic counts the prompt in three parts that exclude each other.
            let created = usage.as_u64("cache_creation_input_tokens").unwrap_or(0);
            prompt_tokens =
                prompt_tokens.map(|input| input.saturating_add(cached_tokens.unwrap_or(0)).saturating_add(created));
        }
        Usage { prompt_tokens, completion_tokens: usage.as_u64(completion), cached_tokens }
    }

    /// Takes over what a later event says.
    pub(super) fn update(&mut self, later: Usage) {
        self.prompt_tokens = later.prompt_tokens.or(self.prompt_tokens);
        self.completion_tokens = later.completion_tokens.or(self.completion_tokens);
        self.cached_tokens = later.cached_tokens.or(self.cached_tokens);
    }
}

/// Where an answer or an event has its usage: the member that it lies in, if it is not the outermost object, and the
/// usage.
fn place(api: Api, answer: &Object) -> Option<(Option<&'static str>, Object)> {
    let key = member(api);
    if let Some(usage) = answer.object(key) {
        return Some((None, usage));
    }
    let outer = match api {
        Api::Responses => "response",
        Api::Messages => "message",
        Api::Chat | Api::Completions | Api::Generate | Api::SglangGenerate => return None,
    };
    Some((Some(outer), answer.object(outer)?.object(key)?))
}

const fn member(api: Api) -> &'static str {
    match api {
        Api::SglangGenerate => "meta_info",
        Api::Chat | Api::Completions | Api::Responses | Api::Messages | Api::Generate => "usage",
    }
}

/// What every text with usage in it contains. In model output its quotes are escaped, so that it can't stand there.
pub(super) const fn needle(api: Api) -> &'static [u8] {
    match api {
        Api::SglangGenerate => b"\"cached_tokens\"",
        Api::Chat | Api::Completions | Api::Responses | Api::Messages | Api::Generate => b"\"usage\"",
    }
}

/// A whole JSON answer with the number of cached tokens that the prefill worker gave, if there was one. Also what the
/// answer said itself. An answer that is no JSON object or has no usage stays as it is.
pub(crate) fn patch(api: Api, answer: &Bytes, cached: Option<u64>) -> (Bytes, Usage) {
    if memmem::find(answer, needle(api)).is_none() {
        return (answer.clone(), Usage::default());
    }
    patch_object(api, answer, cached).unwrap_or_else(|| (answer.clone(), Usage::default()))
}

pub(super) fn patch_object(api: Api, text: &Bytes, cached: Option<u64>) -> Option<(Bytes, Usage)> {
    let answer = scan(text, DEPTH_MAX).ok()?;
    let (outer, usage) = place(api, &answer)?;
    let said = Usage::of(api, &usage);
    let Some(cached) = cached else { return Some((text.clone(), said)) };
    // Where nothing is claimed and nothing was cached, silence says it as well.
    if said.cached_tokens.unwrap_or(0) == cached {
        return Some((text.clone(), said));
    }
    let digits = cached.to_string();
    let number = Change::Set(digits.as_bytes());
    let details = [("cached_tokens", number)];
    let input;
    let changes: &[(&str, Change<'_>)] = match api {
        Api::Chat | Api::Completions | Api::Generate => &[("prompt_tokens_details", Change::Within(&details))],
        Api::Responses => &[("input_tokens_details", Change::Within(&details))],
        Api::SglangGenerate => &[("cached_tokens", number)],
        Api::Messages => {
            // What is no longer read from the cache was input, and the other way round: the three parts keep their sum.
            let total = usage.as_u64("input_tokens").unwrap_or(0).saturating_add(said.cached_tokens.unwrap_or(0));
            input = total.saturating_sub(cached).to_string();
            &[("cache_read_input_tokens", number), ("input_tokens", Change::Replace(input.as_bytes()))]
        }
    };
    let inner = [(member(api), Change::Within(changes))];
    let patched = match outer {
        None => splice(&answer, &inner),
        Some(outer) => splice(&answer, &[(outer, Change::Within(&inner))]),
    };
    Some((patched, said))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::usage_stream::UsagePatch;

    fn patched(api: Api, text: &str, cached: u64) -> String {
        let (out, _) = patch(api, &Bytes::copy_from_slice(text.as_bytes()), Some(cached));
        String::from_utf8_lossy(&out).into_owned()
    }

    fn check(api: Api, text: &str, cached: u64, expect: &str) {
        assert_eq!(patched(api, text, cached), expect, "{api:?} {text}");
        let frame = Bytes::from(format!("event: x\ndata: {text}\n\n"));
        let streamed = UsagePatch::new(api, Some(cached)).push(frame);
        assert_eq!(streamed, format!("event: x\ndata: {expect}\n\n"), "{api:?}");
    }

    // Problem 6, `vllm-router#193`, `llm-d-router#1012`, `vllm#47136`: the decode worker reports the KV that it was
    // handed as cached.
    #[test]
    fn cached_tokens_are_what_the_prefill_worker_said() {
        for api in [Api::Chat, Api::Completions, Api::Generate] {
            check(
                api,
                r#"{"id":"1","usage":{"prompt_tokens":128,"prompt_tokens_details":{"cached_tokens":127},"completion_tokens":3},"x":1.0}"#,
                64,
                r#"{"id":"1","usage":{"prompt_tokens":128,"prompt_tokens_details":{"cached_tokens":64},"completion_tokens":3},"x":1.0}"#,
            );
        }
        check(
            Api::Responses,
            r#"{"usage":{"input_tokens":128,"input_tokens_details":{"cached_tokens":127}}}"#,
            64,
            r#"{"usage":{"input_tokens":128,"input_tokens_details":{"cached_tokens":64}}}"#,
        );
        check(
            Api::Responses,
            r#"{"type":"response.completed","response":{"id":"r","usage":{"input_tokens_details":{"cached_tokens":127}}}}"#,
            64,
            r#"{"type":"response.completed","response":{"id":"r","usage":{"input_tokens_details":{"cached_tokens":64}}}}"#,
        );
        check(
            Api::SglangGenerate,
            r#"{"text":"a","meta_info":{"prompt_tokens":128,"cached_tokens":127}}"#,
            64,
            r#"{"text":"a","meta_info":{"prompt_tokens":128,"cached_tokens":64}}"#,
        );
    }

    // Problem 6: Anthropic's input tokens exclude the cached ones, so what moves from one to the other must keep the
    // sum.
    #[test]
    fn the_parts_of_a_messages_prompt_keep_their_sum() {
        check(
            Api::Messages,
            r#"{"usage":{"input_tokens":1,"cache_creation_input_tokens":0,"cache_read_input_tokens":127,"output_tokens":3}}"#,
            64,
            r#"{"usage":{"input_tokens":64,"cache_creation_input_tokens":0,"cache_read_input_tokens":64,"output_tokens":3}}"#,
        );
        check(
            Api::Messages,
            r#"{"type":"message_start","message":{"usage":{"input_tokens":128,"output_tokens":0}}}"#,
            64,
            r#"{"type":"message_start","message":{"usage":{"input_tokens":64,"output_tokens":0,"cache_read_input_tokens":64}}}"#,
        );
        check(
            Api::Messages,
            r#"{"type":"message_delta","delta":{},"usage":{"cache_read_input_tokens":127,"input_tokens":1}}"#,
            0,
            r#"{"type":"message_delta","delta":{},"usage":{"cache_read_input_tokens":0,"input_tokens":128}}"#,
        );
    }

    #[test]
    fn missing_details_are_added_only_when_something_was_cached() {
        let chat = |text: &str, cached: u64, expect: &str| check(Api::Chat, text, cached, expect);
        chat(r#"{"usage":{"a":1}}"#, 0, r#"{"usage":{"a":1}}"#);
        chat(r#"{"usage":{"a":1}}"#, 8, r#"{"usage":{"a":1,"prompt_tokens_details":{"cached_tokens":8}}}"#);
        chat(
            r#"{"usage":{"prompt_tokens_details":null}}"#,
            8,
            r#"{"usage":{"prompt_tokens_details":{"cached_tokens":8}}}"#,
        );
        chat(r#"{"usage":{"prompt_tokens_details":null}}"#, 0, r#"{"usage":{"prompt_tokens_details":null}}"#);
        chat(
            r#"{"usage":{"prompt_tokens_details":{"audio":0}}}"#,
            8,
            r#"{"usage":{"prompt_tokens_details":{"audio":0,"cached_tokens":8}}}"#,
        );
        chat(
            r#"{"usage":{"prompt_tokens_details":{"cached_tokens":127}}}"#,
            0,
            r#"{"usage":{"prompt_tokens_details":{"cached_tokens":0}}}"#,
        );
    }

    #[test]
    fn what_is_no_usage_stays() {
        let same = |api: Api, text: &str| check(api, text, 64, text);
        same(Api::Chat, r#"{"usage":null,"choices":[]}"#);
        same(Api::Chat, r#"{"choices":[{"usage":{"prompt_tokens":1}}]}"#);
        same(Api::Chat, r#"{"choices":[{"text":"\"usage\":{}"}]}"#);
        same(Api::Chat, r#"{"usage":[1]}"#);
        same(Api::Chat, r#"{"usage":{"prompt_tokens":1}"#);
        same(Api::Chat, "[DONE]");
        same(Api::Responses, r#"{"type":"response.created","response":{"usage":null}}"#);
        same(Api::Messages, r#"{"type":"content_block_delta","delta":{"text":"usage"}}"#);
        same(Api::SglangGenerate, r#"[{"meta_info":{"cached_tokens":127}}]"#);
    }

    #[test]
    fn usage_is_read_as_it_was_said() {
        let read = |api: Api, text: &str| patch(api, &Bytes::copy_from_slice(text.as_bytes()), Some(1)).1;
        let usage = |prompt, completion, cached| Usage {
            prompt_tokens: prompt,
            completion_tokens: completion,
            cached_tokens: cached,
        };
        let chat = r#"{"usage":{"prompt_tokens":9,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":8}}}"#;
        assert_eq!(read(Api::Chat, chat), usage(Some(9), Some(2), Some(8)));
        let messages = r#"{"usage":{"input_tokens":1,"cache_read_input_tokens":8,"cache_creation_input_tokens":4,"output_tokens":2}}"#;
        assert_eq!(read(Api::Messages, messages), usage(Some(13), Some(2), Some(8)));
        let responses = r#"{"usage":{"input_tokens":9,"output_tokens":2}}"#;
        assert_eq!(read(Api::Responses, responses), usage(Some(9), Some(2), None));
        let sglang = r#"{"meta_info":{"prompt_tokens":9,"completion_tokens":2,"cached_tokens":8}}"#;
        assert_eq!(read(Api::SglangGenerate, sglang), usage(Some(9), Some(2), Some(8)));
        assert_eq!(read(Api::Chat, "{}"), Usage::default());
    }
}
