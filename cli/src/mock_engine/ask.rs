//! A request's body: the fields that an engine acts on. Unknown fields are skipped without being built, since a mock is
//! the other end of measurements.

use super::api::Api;
use super::tokens::Seed;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;

/// Choices of one request at most, as vLLM and SGLang have it by default or thereabouts.
pub(crate) const CHOICES_MAX: u64 = 128;

/// Tokens of one choice at most, so that a mistyped limit is a refusal rather than a stream that never ends.
pub(crate) const TOKENS_MAX: u64 = 1 << 20;

/// Characters that make a token where a prompt is text: about right for English.
const CHARACTERS_PER_TOKEN: usize = 4;

/// A body as it came.
#[derive(Debug, Deserialize)]
pub(crate) struct Ask<'a> {
    #[serde(borrow)]
    pub(crate) model: Option<Cow<'a, str>>,
    #[serde(borrow)]
    prompt: Option<&'a RawValue>,
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
    #[serde(borrow)]
    input: Option<&'a RawValue>,
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow)]
    input_ids: Option<&'a RawValue>,
    #[serde(borrow)]
    token_ids: Option<&'a RawValue>,
    #[serde(default)]
    pub(crate) stream: Option<bool>,
    pub(crate) stream_options: Option<StreamOptions>,
    pub(crate) max_tokens: Option<u64>,
    pub(crate) max_completion_tokens: Option<u64>,
    pub(crate) max_output_tokens: Option<u64>,
    pub(crate) min_tokens: Option<u64>,
    pub(crate) n: Option<u64>,
    pub(crate) sampling_params: Option<Sampling>,
    pub(crate) seed: Option<u64>,
    pub(crate) return_logprob: Option<bool>,
    pub(crate) data_parallel_rank: Option<u32>,
    pub(crate) routed_dp_rank: Option<u32>,
    pub(crate) disagg_prefill_dp_rank: Option<u32>,
    #[serde(borrow)]
    pub(crate) kv_transfer_params: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(crate) bootstrap_host: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(crate) bootstrap_port: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(crate) bootstrap_room: Option<&'a RawValue>,
}

/// What a stream carries besides tokens.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: Option<bool>,
}

/// Limits, where an API keeps them apart.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct Sampling {
    pub(crate) max_tokens: Option<u64>,
    pub(crate) max_new_tokens: Option<u64>,
    pub(crate) min_tokens: Option<u64>,
    pub(crate) n: Option<u64>,
}

/// A body that no engine takes.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    /// Not JSON, or a field of a wrong type.
    #[error("the body can't be read: {0}")]
    Unreadable(#[source] serde_json::Error),
    /// Nothing to continue.
    #[error("the body has no prompt")]
    NoPrompt,
    /// More than there is room for.
    #[error("{what} is above {max}")]
    TooMany { what: &'static str, max: u64 },
}

impl AskError {
    /// Whether a key of the body stands in it twice. Engines take one of the two, and not each the same.
    pub(crate) fn is_duplicate_key(&self) -> bool {
        match self {
            AskError::Unreadable(error) => error.to_string().starts_with("duplicate field"),
            AskError::NoPrompt | AskError::TooMany { .. } => false,
        }
    }
}

/// What a prompt comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Prompt {
    /// How many there are.
    pub(crate) count: u64,
    /// Whether they came as a list, which may be of one.
    pub(crate) is_list: bool,
    /// Of all of them.
    pub(crate) tokens: u64,
    pub(crate) seed: Seed,
}

impl<'a> Ask<'a> {
    /// Reads a body.
    ///
    /// # Errors
    /// See [`AskError`].
    pub(crate) fn read(body: &'a [u8]) -> Result<Self, AskError> {
        let ask: Ask<'a> = serde_json::from_slice(body).map_err(AskError::Unreadable)?;
        if ask.choices() > CHOICES_MAX {
            return Err(AskError::TooMany { what: "n", max: CHOICES_MAX });
        }
        Ok(ask)
    }

    /// The prompt or prompts, by their number and size.
    ///
    /// # Errors
    /// When there is none, or too many for their choices.
    pub(crate) fn prompt(&self) -> Result<Prompt, AskError> {
        let raw = self.raw()?.get();
        let (count, is_list, tokens) = measure(raw)?;
        if count.saturating_mul(self.choices()) > CHOICES_MAX {
            return Err(AskError::TooMany { what: "the number of prompts and choices", max: CHOICES_MAX });
        }
        Ok(Prompt { count, is_list, tokens, seed: Seed::of(raw.as_bytes()) })
    }

    /// The prompt or prompts, each as it came.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn raw_prompts(&self) -> Result<Vec<&'a RawValue>, AskError> {
        let raw = self.raw()?;
        match measure(raw.get())? {
            (_, true, _) => serde_json::from_str(raw.get()).map_err(AskError::Unreadable),
            (_, false, _) => Ok(vec![raw]),
        }
    }

    fn raw(&self) -> Result<&'a RawValue, AskError> {
        let keys = [self.prompt, self.messages, self.input, self.text, self.input_ids, self.token_ids];
        keys.into_iter().flatten().next().ok_or(AskError::NoPrompt)
    }

    /// Choices for each prompt.
    pub(crate) fn choices(&self) -> u64 {
        self.n.or(self.sampling_params.and_then(|sampling| sampling.n)).unwrap_or(1).max(1)
    }

    pub(crate) fn streams(&self) -> bool {
        self.stream == Some(true)
    }

    /// Whether a stream ends with usage because it was asked for.
    pub(crate) fn includes_usage(&self) -> bool {
        self.stream_options.is_some_and(|options| options.include_usage == Some(true))
    }

    /// The limit of the answer's tokens that this API knows, the newer name before the older.
    pub(crate) fn limit(&self, api: Api) -> Option<u64> {
        let sampling = self.sampling_params.unwrap_or_default();
        match api {
            Api::Chat => self.max_completion_tokens.or(self.max_tokens),
            Api::Completions | Api::Messages => self.max_tokens,
            Api::Responses => self.max_output_tokens,
            Api::TokenIn => sampling.max_tokens,
            Api::Generate => sampling.max_new_tokens,
        }
    }

    /// The least number of tokens that is asked for.
    pub(crate) fn at_least(&self) -> u64 {
        self.min_tokens.or(self.sampling_params.and_then(|sampling| sampling.min_tokens)).unwrap_or(0)
    }
}

/// Number of prompts, whether they are a list, and tokens in all.
fn measure(raw: &str) -> Result<(u64, bool, u64), AskError> {
    let inside = raw.strip_prefix('[').map(str::trim_start);
    match inside.and_then(|inside| inside.bytes().next()) {
        Some(b'"' | b'[') => {
            let prompts: Vec<&RawValue> = serde_json::from_str(raw).map_err(AskError::Unreadable)?;
            let tokens = prompts.iter().map(|prompt| tokens(prompt.get())).sum();
            Ok((prompts.len() as u64, true, tokens))
        }
        Some(b']') => Err(AskError::NoPrompt),
        _ => Ok((1, false, tokens(raw))),
    }
}

/// Ids are counted; text is estimated, and a conversation by its JSON.
fn tokens(raw: &str) -> u64 {
    let is_ids =
        raw.strip_prefix('[').is_some_and(|inside| inside.trim_start().starts_with(|c: char| c.is_ascii_digit()));
    let tokens = if is_ids {
        raw.bytes().filter(|byte| *byte == b',').count() + 1
    } else {
        raw.len().saturating_sub(2).div_ceil(CHARACTERS_PER_TOKEN).max(1)
    };
    tokens as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_counted_in_all_their_forms() {
        let check = |body: &str, count: u64, is_list: bool, tokens: u64| {
            let ask = Ask::read(body.as_bytes()).unwrap_or_else(|error| panic!("{body}: {error}"));
            let prompt = ask.prompt().unwrap_or_else(|error| panic!("{body}: {error}"));
            assert_eq!((prompt.count, prompt.is_list, prompt.tokens), (count, is_list, tokens), "{body}");
        };
        check(r#"{"prompt": "eight ch"}"#, 1, false, 2);
        check(r#"{"prompt": ""}"#, 1, false, 1);
        check(r#"{"prompt": [1, 2, 3]}"#, 1, false, 3);
        check(r#"{"prompt": ["abcd", "abcdefgh"]}"#, 2, true, 3);
        check(r#"{"input_ids": [[1, 2], [3]]}"#, 2, true, 3);
        check(r#"{"text": ["abcd"]}"#, 1, true, 1);
        check(r#"{"messages": [{"role": "user"}]}"#, 1, false, 4);
        check(r#"{"unknown": {"a": [1]}, "token_ids": [ 7 ]}"#, 1, false, 1);
    }

    #[test]
    fn a_body_without_a_prompt_or_with_too_much_is_refused() {
        let check = |body: &str, expect: &str| {
            let outcome = Ask::read(body.as_bytes()).and_then(|ask| ask.prompt());
            let error = outcome.expect_err(body).to_string();
            assert!(error.contains(expect), "{body}: {error}");
        };
        check("{}", "no prompt");
        check("[]", "can't be read");
        check(r#"{"prompt": []}"#, "no prompt");
        check(r#"{"prompt": "a", "n": 129}"#, "n is above 128");
        check(r#"{"prompt": ["a", "b"], "n": 65}"#, "prompts and choices is above 128");
        check(r#"{"prompt": "a", "max_tokens": "many"}"#, "can't be read");
    }

    #[test]
    fn a_key_that_stands_twice_is_known_as_such() {
        let error = Ask::read(br#"{"stream": true, "stream": false}"#).expect_err("twice");
        assert!(error.is_duplicate_key());
        assert!(!Ask::read(b"{").expect_err("cut").is_duplicate_key());
    }

    #[test]
    fn each_api_has_its_own_limit() {
        let body = br#"{"max_tokens": 1, "max_completion_tokens": 2, "max_output_tokens": 3,
            "sampling_params": {"max_tokens": 4, "max_new_tokens": 5, "min_tokens": 6}}"#;
        let ask = Ask::read(body).expect("a body");
        let apis = [Api::Chat, Api::Completions, Api::Responses, Api::Messages, Api::TokenIn, Api::Generate];
        assert_eq!(apis.map(|api| ask.limit(api)), [Some(2), Some(1), Some(3), Some(1), Some(4), Some(5)]);
        assert_eq!(ask.at_least(), 6);
    }
}
