//! Answers as the OpenAI API writes them: one object, or a chunk for each piece of text as it is generated.
//!
//! Knows text, counts and log-probabilities; where they come from is the caller's business. The two endpoints' shapes are in
//! `answer/chat.rs` and `answer/completions.rs`.

mod chat;
mod completions;

use baton_wire::render::Endpoint;
use serde::Serialize;

/// What every object of one answer starts with.
#[derive(Clone, Debug)]
pub struct Head {
    /// Unique, and the same in every chunk.
    pub id: String,
    /// Seconds since the Unix epoch.
    pub created: u64,
    /// The model's name.
    pub model: String,
    /// The model's short fingerprint: equal fingerprints, seeds and requests give equal completions.
    pub system_fingerprint: String,
}

/// Tokens that a request used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// In all prompts.
    pub prompt_tokens: u64,
    /// Generated, in all choices.
    pub completion_tokens: u64,
    /// Both.
    pub total_tokens: u64,
    /// More about the prompts.
    pub prompt_tokens_details: PromptTokensDetails,
}

/// More about the prompts' tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PromptTokensDetails {
    /// Of the prompt tokens, those whose KV was found in a prefix cache.
    pub cached_tokens: u64,
}

impl Usage {
    /// The usage of a request.
    pub fn new(prompt_tokens: u64, cached_tokens: u64, completion_tokens: u64) -> Self {
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
        }
    }
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// A stop token or a stop string.
    Stop,
    /// As many tokens as were asked for, or as fit.
    Length,
}

/// A token as text, which it need not be on its own: half a character becomes U+FFFD, its bytes stay true.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenText {
    /// For people.
    pub text: String,
    /// For programs.
    pub bytes: Vec<u8>,
}

/// A generated token with log-probabilities.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: TokenText,
    /// Its log-probability.
    pub logprob: f32,
    /// The likeliest tokens, likeliest first.
    pub top: Vec<(TokenText, f32)>,
    /// Characters before it in the choice's text.
    pub text_offset: usize,
}

/// A piece of one choice's text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    /// Which choice.
    pub choice: u32,
    /// Text that follows what came before.
    pub text: String,
    /// One for each token of the piece, where asked for.
    pub logprobs: Option<Vec<TokenLogprob>>,
}

/// The lowest log-probability that is written: JSON has no infinity.
const LOGPROB_MIN: f32 = -9999.0;

/// One answer's shape: which endpoint it is for and what its chunks contain.
#[derive(Clone, Debug)]
pub struct Answer {
    /// What every object starts with.
    pub head: Head,
    /// Which shape.
    pub endpoint: Endpoint,
    /// Whether chunks have a `usage` field (null until the last one).
    pub include_usage: bool,
}

impl Answer {
    /// The first chunk of a choice, where the endpoint has one that carries no text.
    pub fn first_chunk(&self, choice: u32) -> Option<String> {
        match self.endpoint {
            Endpoint::Chat => Some(chat::role_chunk(self, choice)),
            Endpoint::Completions => None,
        }
    }

    /// A chunk with text.
    pub fn text_chunk(&self, piece: &Piece) -> String {
        match self.endpoint {
            Endpoint::Chat => chat::text_chunk(self, piece),
            Endpoint::Completions => completions::text_chunk(self, piece),
        }
    }

    /// The last chunk of a choice.
    pub fn finish_chunk(&self, choice: u32, reason: FinishReason) -> String {
        match self.endpoint {
            Endpoint::Chat => chat::finish_chunk(self, choice, reason),
            Endpoint::Completions => completions::finish_chunk(self, choice, reason),
        }
    }

    /// The last chunk of a stream whose client asked for the usage.
    pub fn usage_chunk(&self, usage: Usage) -> Option<String> {
        self.include_usage.then(|| match self.endpoint {
            Endpoint::Chat => chat::usage_chunk(self, usage),
            Endpoint::Completions => completions::usage_chunk(self, usage),
        })
    }

    /// The whole answer as one object; `choices` in order.
    pub fn whole(&self, choices: &[(Piece, FinishReason)], usage: Usage) -> String {
        match self.endpoint {
            Endpoint::Chat => chat::whole(self, choices, usage),
            Endpoint::Completions => completions::whole(self, choices, usage),
        }
    }

    /// `usage` of a chunk that has none: absent, or null where the client asked for it in the last one.
    fn no_usage(&self) -> Option<Option<Usage>> {
        self.include_usage.then_some(None)
    }
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("answers are strings, numbers and lists, which always serialise")
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() { LOGPROB_MIN } else { logprob.max(LOGPROB_MIN) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn answer(endpoint: Endpoint, include_usage: bool) -> Answer {
        let head = Head { id: "id".into(), created: 7, model: "tiny".into(), system_fingerprint: "fp_1".into() };
        Answer { head, endpoint, include_usage }
    }

    fn token(text: &str) -> TokenText {
        TokenText { text: text.to_owned(), bytes: text.as_bytes().to_vec() }
    }

    fn piece() -> Piece {
        let logprob = TokenLogprob {
            token: token("a"),
            logprob: -0.5,
            top: vec![(token("a"), -0.5), (token("b"), f32::NEG_INFINITY)],
            text_offset: 3,
        };
        Piece { choice: 1, text: "a".into(), logprobs: Some(vec![logprob]) }
    }

    fn value(json: &str) -> Value {
        serde_json::from_str(json).expect("own JSON parses")
    }

    #[test]
    fn chat_chunks_have_role_then_text_then_reason_then_usage() {
        let answer = answer(Endpoint::Chat, true);
        let chunk = |choices: Value, usage: Value| {
            json!({"id": "id", "object": "chat.completion.chunk", "created": 7, "model": "tiny",
                   "system_fingerprint": "fp_1", "choices": choices, "usage": usage})
        };
        assert_eq!(
            value(&answer.first_chunk(0).expect("chat starts with the role")),
            chunk(
                json!([{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": null,
                           "finish_reason": null}]),
                Value::Null
            )
        );
        let logprobs = json!({"refusal": null, "content": [{"token": "a", "bytes": [97], "logprob": -0.5, "top_logprobs": [
            {"token": "a", "bytes": [97], "logprob": -0.5}, {"token": "b", "bytes": [98], "logprob": -9999.0}]}]});
        assert_eq!(
            value(&answer.text_chunk(&piece())),
            chunk(
                json!([{"index": 1, "delta": {"content": "a"}, "logprobs": logprobs, "finish_reason": null}]),
                Value::Null
            )
        );
        assert_eq!(
            value(&answer.finish_chunk(1, FinishReason::Length)),
            chunk(json!([{"index": 1, "delta": {}, "logprobs": null, "finish_reason": "length"}]), Value::Null)
        );
        let usage = json!({"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7,
                           "prompt_tokens_details": {"cached_tokens": 4}});
        assert_eq!(value(&answer.usage_chunk(Usage::new(5, 4, 2)).expect("asked for")), chunk(json!([]), usage));
    }

    #[test]
    fn without_include_usage_no_chunk_has_the_field() {
        for endpoint in [Endpoint::Chat, Endpoint::Completions] {
            let answer = answer(endpoint, false);
            assert_eq!(answer.usage_chunk(Usage::default()), None);
            assert_eq!(value(&answer.text_chunk(&piece())).get("usage"), None);
        }
    }

    #[test]
    fn completions_write_logprobs_in_columns() {
        let answer = answer(Endpoint::Completions, false);
        assert_eq!(answer.first_chunk(0), None);
        let whole = value(&answer.whole(&[(piece(), FinishReason::Stop)], Usage::new(1, 0, 1)));
        assert_eq!(whole["object"], "text_completion");
        assert_eq!(
            whole["choices"],
            json!([{"index": 1, "text": "a", "finish_reason": "stop", "logprobs": {"tokens": ["a"], "token_logprobs": [-0.5],
                    "top_logprobs": [{"a": -0.5, "b": -9999.0}], "text_offset": [3]}}])
        );
    }

    #[test]
    fn a_whole_chat_answer_has_messages() {
        let whole = value(&answer(Endpoint::Chat, false).whole(&[(piece(), FinishReason::Stop)], Usage::new(1, 0, 1)));
        assert_eq!(whole["object"], "chat.completion");
        assert_eq!(whole["choices"][0]["message"], json!({"role": "assistant", "content": "a", "refusal": null}));
        assert_eq!(whole["usage"]["total_tokens"], 2);
    }
}
