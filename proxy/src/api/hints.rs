//! What a request's body says that routing needs to know.
//!
//! A hint never decides whether a request is valid: the engine does that. Where a body is odd, a hint is cautious
//! instead.

use crate::api::Api;
use crate::json::scan::{DEPTH_MAX, Object, elements};
use std::borrow::Cow;

/// Bytes of a prompt's JSON that make up a token, for the estimate where no token ids are given. English text has about
/// 4.3 letters a token and JSON adds some quotes and keys; a picture in base64 is overestimated, which matters only for
/// load.
const BYTES_PER_TOKEN: u64 = 4;

/// What a request's body says that matters for choosing its path and its workers.
#[derive(Clone, Debug)]
pub(crate) struct Hints<'a> {
    /// The model, or the adapter under whose name it is asked for.
    pub(crate) model: Option<Cow<'a, str>>,
    /// An adapter that is named beside the model.
    pub(crate) lora: Option<Cow<'a, str>>,
    /// Whether the answer is to be streamed. The engine is laxer about what means `true`: the answer's content type
    /// decides.
    pub(crate) stream: bool,
    /// Choices asked for each prompt. What can't be read as a number counts as the highest one.
    pub(crate) choices: u64,
    /// Candidates computed for each prompt; read as `choices` is.
    pub(crate) best_of: u64,
    /// Whether beams are searched rather than choices sampled.
    pub(crate) beam_search: bool,
    /// Whether log probabilities of the prompt are asked for, which only who computes the prompt has.
    pub(crate) prompt_logprobs: bool,
    /// Whether the request goes on from an answer that one worker has stored.
    pub(crate) stored_conversation: bool,
    /// Prompts in this request.
    pub(crate) prompts: u64,
    /// Whether the prompts are written as a list of prompts, be it of one.
    pub(crate) batch: bool,
    /// Tokens to generate at most, for each choice, where the client said so.
    #[cfg_attr(not(test), expect(dead_code, reason = "nothing is chosen by it yet"))]
    pub(crate) max_tokens: Option<u64>,
    /// The raw values that decide the prompt's tokens, in the order in which chat templates write them; empty where
    /// there are fewer.
    pub(crate) prompt: [&'a [u8]; 3],
    /// How long all prompts are together.
    pub(crate) prompt_tokens: PromptTokens,
    /// As the client set it; what it means differs by engine (vLLM: lower is earlier).
    #[cfg_attr(not(test), expect(dead_code, reason = "nothing is chosen by it yet"))]
    pub(crate) priority: Option<i64>,
    /// Whom the client serves.
    #[cfg_attr(not(test), expect(dead_code, reason = "nothing is chosen by it yet"))]
    pub(crate) user: Option<Cow<'a, str>>,
    /// Requests with the same key share a prefix.
    pub(crate) prompt_cache_key: Option<Cow<'a, str>>,
    /// Prefixes are shared only among requests with the same salt.
    pub(crate) cache_salt: Option<Cow<'a, str>>,
}

/// The length of prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PromptTokens {
    /// Counted: the request gives token ids.
    Counted(u64),
    /// The bytes of the prompts' JSON divided by four.
    Estimated(u64),
}

impl PromptTokens {
    /// The number, however it was found.
    pub(crate) const fn get(self) -> u64 {
        match self {
            PromptTokens::Counted(tokens) | PromptTokens::Estimated(tokens) => tokens,
        }
    }
}

impl<'a> Hints<'a> {
    /// Reads the hints of a request to `api`.
    pub(crate) fn read(api: Api, object: &'a Object) -> Self {
        let sampling = match api {
            Api::Generate | Api::SglangGenerate => object.object("sampling_params"),
            Api::Chat | Api::Completions | Api::Responses | Api::Messages => None,
        };
        let sampling = sampling.as_ref().unwrap_or(object);
        let prompt = prompt(api, object);
        let Prompts { count: prompts, batch, tokens } = Prompts::measure(api, prompt);
        Hints {
            model: object.as_str("model"),
            lora: object.as_str("lora_path").or_else(|| object.as_str("lora_name")),
            stream: object.as_bool("stream").unwrap_or(false),
            choices: count_or_one(sampling.given("n")),
            best_of: count_or_one(sampling.given("best_of")),
            beam_search: is_on(sampling.given("use_beam_search")),
            prompt_logprobs: prompt_logprobs(api, object, sampling),
            stored_conversation: object.given("previous_response_id").is_some(),
            prompts,
            batch,
            max_tokens: max_tokens(api, object, sampling),
            prompt,
            prompt_tokens: tokens,
            priority: object.get("priority").and_then(|raw| std::str::from_utf8(raw).ok()?.parse().ok()),
            user: user(api, object),
            prompt_cache_key: object.as_str("prompt_cache_key"),
            cache_salt: object.as_str("cache_salt"),
        }
    }
}

/// The members that decide a prompt's tokens.
fn prompt(api: Api, object: &Object) -> [&[u8]; 3] {
    let keys = match api {
        Api::Chat => ["tools", "messages", ""],
        Api::Completions => ["prompt", "", ""],
        Api::Responses => ["tools", "instructions", "input"],
        Api::Messages => ["tools", "system", "messages"],
        Api::Generate => ["token_ids", "", ""],
        Api::SglangGenerate if object.given("input_ids").is_some() => ["input_ids", "", ""],
        Api::SglangGenerate => ["text", "", ""],
    };
    keys.map(|key| if key.is_empty() { b"".as_slice() } else { object.given(key).unwrap_or_default() })
}

fn max_tokens(api: Api, object: &Object, sampling: &Object) -> Option<u64> {
    let raw = match api {
        Api::Chat => object.given("max_completion_tokens").or_else(|| object.given("max_tokens")),
        Api::Completions | Api::Messages => object.given("max_tokens"),
        Api::Responses => object.given("max_output_tokens"),
        Api::Generate => sampling.given("max_tokens"),
        Api::SglangGenerate => sampling.given("max_new_tokens"),
    };
    raw.and_then(count)
}

fn prompt_logprobs(api: Api, object: &Object, sampling: &Object) -> bool {
    let echoed = || api == Api::Completions && is_on(object.given("echo")) && object.given("logprobs").is_some();
    match api {
        Api::SglangGenerate => object.given("return_logprob").is_some_and(|raw| raw != b"false"),
        Api::Chat | Api::Completions | Api::Responses | Api::Messages | Api::Generate => {
            sampling.given("prompt_logprobs").is_some() || echoed()
        }
    }
}

fn user(api: Api, object: &Object) -> Option<Cow<'_, str>> {
    match api {
        Api::Messages => object.object("metadata")?.as_str("user_id").map(|user| Cow::Owned(user.into_owned())),
        Api::Chat | Api::Completions | Api::Responses | Api::Generate | Api::SglangGenerate => object.as_str("user"),
    }
}

/// A switch as lax readers read it: whatever is not plainly off is on.
fn is_on(raw: Option<&[u8]>) -> bool {
    raw.is_some_and(|raw| !matches!(raw, b"false" | b"0"))
}

/// A whole number as the engines' lax reader (pydantic) reads it: `2`, `2.0`, `"2"`.
pub(crate) fn count(raw: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(raw).ok()?;
    let text = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text).trim();
    if let Ok(count) = text.parse() {
        return Some(count);
    }
    // Exactly the numbers that this many bits hold without a gap; a higher one is no count of anything here.
    let number: f64 = text.parse().ok()?;
    (number.fract() == 0.0 && (0.0..=9_007_199_254_740_992.0).contains(&number)).then_some(number as u64)
}

/// A count that is 1 where it is missing and the highest number where it can't be read, so that nothing counts on its
/// being 1.
fn count_or_one(raw: Option<&[u8]>) -> u64 {
    raw.map_or(1, |raw| count(raw).unwrap_or(u64::MAX))
}

/// What the members that hold prompts amount to.
struct Prompts {
    count: u64,
    batch: bool,
    tokens: PromptTokens,
}

impl Prompts {
    fn measure(api: Api, prompt: [&[u8]; 3]) -> Self {
        let bytes: u64 = prompt.iter().map(|raw| raw.len() as u64).sum();
        let single =
            Prompts { count: 1, batch: false, tokens: PromptTokens::Estimated(bytes.div_ceil(BYTES_PER_TOKEN)) };
        match api {
            Api::Chat | Api::Responses | Api::Messages => single,
            Api::Completions | Api::Generate | Api::SglangGenerate => Self::list(prompt[0]).unwrap_or(single),
        }
    }

    /// A list of strings, of token ids, or of lists of token ids. None if it is no list.
    fn list(raw: &[u8]) -> Option<Self> {
        let inside = raw.strip_prefix(b"[")?.trim_ascii_start();
        // In lists of numbers every comma is one between two tokens, at the seam of two inner lists as well.
        let tokens = || PromptTokens::Counted(memchr::memchr_iter(b',', raw).count() as u64 + 1);
        Some(match inside.first()? {
            b']' => Prompts { count: 0, batch: true, tokens: PromptTokens::Counted(0) },
            b'-' | b'0'..=b'9' => Prompts { count: 1, batch: false, tokens: tokens() },
            b'[' => Prompts { count: memchr::memchr_iter(b'[', inside).count() as u64, batch: true, tokens: tokens() },
            _ => {
                // More prompts than are noted are more than any connector hands over.
                let count = elements(raw, DEPTH_MAX).map_or(u64::MAX, |all| all.len() as u64);
                let tokens = PromptTokens::Estimated((raw.len() as u64).div_ceil(BYTES_PER_TOKEN));
                Prompts { count, batch: true, tokens }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::scan::scan;
    use bytes::Bytes;

    fn object(text: &str) -> Object {
        scan(&Bytes::copy_from_slice(text.as_bytes()), DEPTH_MAX).expect("valid")
    }

    #[test]
    fn a_chat_request_tells_what_routing_needs() {
        let object = object(
            r#"{"model":"m\u002f1","messages":[{"role":"user","content":"hi"}],"stream":true,"max_tokens":9,"priority":-3,
               "user":"u","prompt_cache_key":"k","cache_salt":"s","tools":[]}"#,
        );
        let hints = Hints::read(Api::Chat, &object);
        assert_eq!(hints.model.as_deref(), Some("m/1"));
        assert!(hints.stream && !hints.batch && !hints.beam_search && !hints.prompt_logprobs);
        assert_eq!((hints.choices, hints.best_of, hints.prompts), (1, 1, 1));
        assert_eq!((hints.max_tokens, hints.priority), (Some(9), Some(-3)));
        assert_eq!(hints.prompt, [b"[]".as_slice(), br#"[{"role":"user","content":"hi"}]"#, b""]);
        assert_eq!(hints.prompt_tokens, PromptTokens::Estimated((2 + 32_u64).div_ceil(4)));
        assert_eq!(hints.user.as_deref(), Some("u"));
        assert_eq!((hints.prompt_cache_key.as_deref(), hints.cache_salt.as_deref()), (Some("k"), Some("s")));
    }

    #[test]
    fn an_empty_request_has_cautious_hints() {
        for api in Api::ALL {
            let object = object("{}");
            let hints = Hints::read(api, &object);
            assert_eq!((hints.choices, hints.best_of, hints.prompts, hints.batch), (1, 1, 1, false), "{api:?}");
            assert_eq!((hints.max_tokens, hints.stream, hints.prompt_tokens.get()), (None, false, 0), "{api:?}");
        }
    }

    #[test]
    fn prompts_are_counted_in_every_shape() {
        let check = |api: Api, body: &str, prompts: u64, batch: bool, tokens: PromptTokens| {
            let object = object(body);
            let hints = Hints::read(api, &object);
            assert_eq!((hints.prompts, hints.batch, hints.prompt_tokens), (prompts, batch, tokens), "{body}");
        };
        let completions = Api::Completions;
        check(completions, r#"{"prompt":"abcdef"}"#, 1, false, PromptTokens::Estimated(2));
        check(completions, r#"{"prompt":["a,[","b\"]",""]}"#, 3, true, PromptTokens::Estimated(5));
        check(completions, r#"{"prompt":["one"]}"#, 1, true, PromptTokens::Estimated(2));
        check(completions, r#"{"prompt":[1, 2,3]}"#, 1, false, PromptTokens::Counted(3));
        check(completions, r#"{"prompt":[ [1,2,3], [4] ,[5,6]]}"#, 3, true, PromptTokens::Counted(6));
        check(completions, r#"{"prompt":[ ]}"#, 0, true, PromptTokens::Counted(0));
        check(Api::Generate, r#"{"token_ids":[7,8]}"#, 1, false, PromptTokens::Counted(2));
        check(Api::SglangGenerate, r#"{"text":["a","b"]}"#, 2, true, PromptTokens::Estimated(3));
        check(Api::SglangGenerate, r#"{"text":"ignored","input_ids":[[1],[2]]}"#, 2, true, PromptTokens::Counted(2));
        check(Api::SglangGenerate, r#"{"text":"abcdef","input_ids":null}"#, 1, false, PromptTokens::Estimated(2));
    }

    #[test]
    fn more_prompts_than_are_noted_count_as_very_many() {
        let object = object(&format!(r#"{{"prompt":[{}]}}"#, vec![r#""""#; 5000].join(",")));
        assert_eq!(Hints::read(Api::Completions, &object).prompts, u64::MAX);
    }

    #[test]
    fn the_cap_is_read_where_the_interface_has_it() {
        let check = |api: Api, body: &str, expect: Option<u64>| {
            assert_eq!(Hints::read(api, &object(body)).max_tokens, expect, "{api:?} {body}");
        };
        check(Api::Chat, r#"{"max_tokens":5,"max_completion_tokens":7}"#, Some(7));
        check(Api::Chat, r#"{"max_tokens":5,"max_completion_tokens":null}"#, Some(5));
        check(Api::Responses, r#"{"max_output_tokens":5,"max_tokens":7}"#, Some(5));
        check(Api::Messages, r#"{"max_tokens":5}"#, Some(5));
        check(Api::Generate, r#"{"sampling_params":{"max_tokens":5},"max_tokens":7}"#, Some(5));
        check(Api::SglangGenerate, r#"{"sampling_params":{"max_new_tokens":5}}"#, Some(5));
    }

    #[test]
    fn several_choices_are_seen_however_they_are_written() {
        let check =
            |body: &str, expect: u64| assert_eq!(Hints::read(Api::Chat, &object(body)).choices, expect, "{body}");
        check("{}", 1);
        check(r#"{"n":null}"#, 1);
        check(r#"{"n":1}"#, 1);
        check(r#"{"n":1.0}"#, 1);
        check(r#"{"n":2.0}"#, 2);
        check(r#"{"n":" 2 "}"#, 2);
        check(r#"{"n":2e0}"#, 2);
        check(r#"{"n":1,"\u006e":3}"#, 3);
        check(r#"{"n":[2]}"#, u64::MAX);
        check(r#"{"n":-1}"#, u64::MAX);
        check(r#"{"n":1e30}"#, u64::MAX);
        let nested = object(r#"{"sampling_params":{"n":4,"best_of":5}}"#);
        let hints = Hints::read(Api::SglangGenerate, &nested);
        assert_eq!((hints.choices, hints.best_of), (4, 5));
    }

    #[test]
    fn logprobs_of_the_prompt_are_seen() {
        let check = |api: Api, body: &str, expect: bool| {
            assert_eq!(Hints::read(api, &object(body)).prompt_logprobs, expect, "{api:?} {body}");
        };
        check(Api::Chat, r#"{"prompt_logprobs":0}"#, true);
        check(Api::Chat, r#"{"prompt_logprobs":null,"logprobs":true}"#, false);
        check(Api::Completions, r#"{"echo":true,"logprobs":1}"#, true);
        check(Api::Completions, r#"{"echo":true}"#, false);
        check(Api::Completions, r#"{"echo":false,"logprobs":1}"#, false);
        check(Api::Generate, r#"{"sampling_params":{"prompt_logprobs":1}}"#, true);
        check(Api::SglangGenerate, r#"{"return_logprob":true}"#, true);
        check(Api::SglangGenerate, r#"{"return_logprob":[false,true]}"#, true);
        check(Api::SglangGenerate, r#"{"return_logprob":false}"#, false);
    }

    #[test]
    fn a_user_of_messages_stands_in_the_metadata() {
        let object = object(r#"{"metadata":{"user_id":"u"},"system":"s","messages":[1],"tools":[2]}"#);
        let hints = Hints::read(Api::Messages, &object);
        assert_eq!(hints.user.as_deref(), Some("u"));
        assert_eq!(hints.prompt, [b"[2]".as_slice(), b"\"s\"", b"[1]"]);
    }
}
