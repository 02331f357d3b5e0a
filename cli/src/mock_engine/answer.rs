//! A whole answer as each API writes it. Text is put together by hand: a mock is the other end of measurements, and what
//! it writes is known to be JSON already.

use super::api::Api;
use super::tokens::{Seed, word};
use std::fmt::Write as _;

/// Seconds since the epoch that answers say they were made at: always the same, so that equal requests have equal answers.
pub(crate) const CREATED: u64 = 1_700_000_000;

/// All that an answer depends on.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) api: Api,
    /// Ready to stand in a JSON string, as is the model.
    pub(crate) id: String,
    pub(crate) model: String,
    pub(crate) prompt_tokens: u64,
    pub(crate) cached_tokens: u64,
    /// Of each choice.
    pub(crate) tokens: u32,
    /// Of all prompts.
    pub(crate) choices: u32,
    /// Whether SGLang's own API answers with a list.
    pub(crate) is_list: bool,
    pub(crate) seed: Seed,
    /// Place of the first token: tokens are a function of their place, so that our own engine's answers can be continued.
    pub(crate) start: u32,
    pub(crate) streams: bool,
    pub(crate) includes_usage: bool,
    /// What vLLM's prefill leg adds: an object of JSON.
    pub(crate) handle: Option<String>,
    /// Whether SGLang's log probabilities were asked for.
    pub(crate) logprobs: bool,
    /// Whether each event is preceded by its token ids, for our own proxy.
    pub(crate) with_ids: bool,
    pub(crate) awkward: bool,
}

/// Writing to a `String` has no error.
macro_rules! put {
    ($out:expr, $($arg:tt)*) => { write!($out, $($arg)*).expect("writing to memory never fails") };
}
pub(crate) use put;

impl Answer {
    /// The id of a token.
    pub(crate) fn token(&self, choice: u32, index: u32) -> u32 {
        self.seed.token(choice, self.start.wrapping_add(index))
    }

    /// The text of a choice, ready to stand in a JSON string.
    pub(crate) fn text(&self, choice: u32) -> String {
        (0..self.tokens).map(|index| word(self.token(choice, index), self.awkward)).collect()
    }

    /// The ids of a choice's tokens up to one, separated by commas.
    pub(crate) fn ids(&self, choice: u32, tokens: u32) -> String {
        let mut ids = String::new();
        for index in 0..tokens {
            put!(ids, "{}{}", if index > 0 { "," } else { "" }, self.token(choice, index));
        }
        ids
    }

    fn completion_tokens(&self) -> u64 {
        u64::from(self.tokens) * u64::from(self.choices)
    }

    /// `usage`, as the API writes it.
    pub(crate) fn usage(&self) -> String {
        let (prompt, cached, completion) = (self.prompt_tokens, self.cached_tokens, self.completion_tokens());
        let total = prompt + completion;
        match self.api {
            Api::Chat | Api::Completions | Api::TokenIn | Api::Generate => format!(
                "{{\"prompt_tokens\":{prompt},\"total_tokens\":{total},\"completion_tokens\":{completion},\
                 \"prompt_tokens_details\":{{\"cached_tokens\":{cached}}}}}"
            ),
            Api::Responses => format!(
                "{{\"input_tokens\":{prompt},\"input_tokens_details\":{{\"cached_tokens\":{cached}}},\
                 \"output_tokens\":{completion},\"output_tokens_details\":{{\"reasoning_tokens\":0}},\"total_tokens\":{total}}}"
            ),
            Api::Messages => format!(
                "{{\"input_tokens\":{prompt},\"output_tokens\":{completion},\"cache_creation_input_tokens\":0,\
                 \"cache_read_input_tokens\":{cached}}}"
            ),
        }
    }

    /// The whole answer, where it is not streamed.
    pub(crate) fn json(&self) -> String {
        let Answer { id, model, .. } = self;
        let usage = self.usage();
        let mut out = String::with_capacity(512);
        match self.api {
            Api::Chat | Api::Completions => {
                let object = if self.api == Api::Chat { "chat.completion" } else { "text_completion" };
                put!(
                    out,
                    "{{\"id\":\"{id}\",\"object\":\"{object}\",\"created\":{CREATED},\"model\":\"{model}\",\"choices\":["
                );
                self.each_choice(&mut out, |answer, out, choice| match answer.api {
                    Api::Chat => put!(
                        out,
                        "{{\"index\":{choice},\"message\":{{\"role\":\"assistant\",\"content\":\"{}\"}},\"logprobs\":null,\
                         \"finish_reason\":\"length\"}}",
                        answer.text(choice)
                    ),
                    _ => put!(
                        out,
                        "{{\"index\":{choice},\"text\":\"{}\",\"logprobs\":null,\"finish_reason\":\"length\"}}",
                        answer.text(choice)
                    ),
                });
                put!(out, "],\"usage\":{usage}");
            }
            Api::TokenIn => {
                put!(out, "{{\"request_id\":\"{id}\",\"choices\":[");
                self.each_choice(&mut out, |answer, out, choice| {
                    let ids = answer.ids(choice, answer.tokens);
                    put!(
                        out,
                        "{{\"index\":{choice},\"logprobs\":null,\"finish_reason\":\"length\",\"token_ids\":[{ids}]}}"
                    );
                });
                put!(out, "],\"prompt_logprobs\":null,\"usage\":{usage}");
            }
            Api::Responses => out.push_str(&self.response("completed", Some(&usage))),
            Api::Messages => put!(
                out,
                "{{\"id\":\"{id}\",\"type\":\"message\",\"role\":\"assistant\",\"model\":\"{model}\",\"content\":[{{\
                 \"type\":\"text\",\"text\":\"{}\"}}],\"stop_reason\":\"max_tokens\",\"stop_sequence\":null,\"usage\":{usage}",
                self.text(0)
            ),
            Api::Generate => {
                let (open, close) = if self.is_list { ("[", "]") } else { ("", "") };
                out.push_str(open);
                self.each_choice(&mut out, |answer, out, choice| {
                    answer.generated(out, choice, answer.tokens, &answer.text(choice));
                });
                out.push_str(close);
                return out;
            }
        }
        if let Some(handle) = &self.handle {
            put!(out, ",\"kv_transfer_params\":{handle}");
        }
        out.push('}');
        out
    }

    /// A response of OpenAI's responses API, without its closing brace.
    pub(crate) fn response(&self, status: &str, usage: Option<&str>) -> String {
        let Answer { id, model, .. } = self;
        let output = match usage {
            Some(_) => format!(
                "[{{\"id\":\"{id}-0\",\"type\":\"message\",\"role\":\"assistant\",\"status\":\"completed\",\"content\":[{{\
                 \"type\":\"output_text\",\"text\":\"{}\",\"annotations\":[]}}]}}]",
                self.text(0)
            ),
            None => "[]".to_owned(),
        };
        let usage = usage.unwrap_or("null");
        format!(
            "{{\"id\":\"{id}\",\"object\":\"response\",\"created_at\":{CREATED},\"status\":\"{status}\",\"model\":\"{model}\",\
             \"output\":{output},\"usage\":{usage}"
        )
    }

    /// One answer of SGLang's own API with so many tokens.
    pub(crate) fn generated(&self, out: &mut String, choice: u32, tokens: u32, text: &str) {
        let finish = if tokens == self.tokens {
            format!("{{\"type\":\"length\",\"length\":{tokens}}}")
        } else {
            "null".to_owned()
        };
        let each = self.prompt_tokens / u64::from(self.choices.max(1));
        put!(
            out,
            "{{\"index\":{choice},\"text\":\"{text}\",\"output_ids\":[{}],\"meta_info\":{{\"id\":\"{}\",\"finish_reason\":{finish},\
             \"prompt_tokens\":{each},\"completion_tokens\":{tokens},\"cached_tokens\":{}",
            self.ids(choice, tokens),
            self.id,
            self.cached_tokens.min(each),
        );
        if self.logprobs {
            // One for the prompt's last token and one for each of the answer: [log probability, id, text].
            put!(out, ",\"input_token_logprobs\":[[-0.25,{},null]],\"output_token_logprobs\":[", self.seed.0 % 1000);
            for index in 0..tokens {
                let comma = if index > 0 { "," } else { "" };
                put!(out, "{comma}[-0.5,{},null]", self.token(choice, index));
            }
            out.push(']');
        }
        out.push_str("}}");
    }

    fn each_choice(&self, out: &mut String, mut write: impl FnMut(&Self, &mut String, u32)) {
        for choice in 0..self.choices {
            if choice > 0 {
                out.push(',');
            }
            write(self, out, choice);
        }
    }
}

/// A text as it stands between the quotes of a JSON string.
pub(crate) fn quoted(text: &str) -> String {
    let quoted = serde_json::Value::from(text).to_string();
    quoted.get(1..quoted.len() - 1).unwrap_or_default().to_owned()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const APIS: [Api; 6] =
        [Api::Chat, Api::Completions, Api::Responses, Api::Messages, Api::TokenIn, Api::Generate];

    pub(crate) fn answer(api: Api) -> Answer {
        Answer {
            api,
            id: "x-1".into(),
            model: quoted("a \"model\""),
            prompt_tokens: 10,
            cached_tokens: 9,
            tokens: 5,
            choices: 1,
            is_list: false,
            seed: Seed(3),
            start: 0,
            streams: false,
            includes_usage: false,
            handle: None,
            logprobs: false,
            with_ids: false,
            awkward: false,
        }
    }

    fn json(answer: &Answer) -> serde_json::Value {
        let text = answer.json();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn every_apis_answer_is_json_with_its_usage() {
        for (api, pointer) in APIS.into_iter().zip([
            "/usage/prompt_tokens_details/cached_tokens",
            "/usage/prompt_tokens_details/cached_tokens",
            "/usage/input_tokens_details/cached_tokens",
            "/usage/cache_read_input_tokens",
            "/usage/prompt_tokens_details/cached_tokens",
            "/meta_info/cached_tokens",
        ]) {
            for awkward in [false, true] {
                let json = json(&Answer { awkward, logprobs: true, ..answer(api) });
                assert_eq!(json.pointer(pointer), Some(&9.into()), "{api:?}: {json}");
            }
        }
    }

    #[test]
    fn a_handle_stands_beside_the_usage() {
        for api in APIS.into_iter().filter(|api| *api != Api::Generate) {
            let json = json(&Answer { handle: Some("{\"a\":[1]}".into()), ..answer(api) });
            assert_eq!(json["kv_transfer_params"]["a"][0], 1, "{api:?}");
        }
    }

    #[test]
    fn each_choice_has_its_own_text() {
        let json = json(&Answer { choices: 3, ..answer(Api::Completions) });
        let texts: Vec<&str> =
            json["choices"].as_array().expect("a list").iter().filter_map(|choice| choice["text"].as_str()).collect();
        assert_eq!(texts.len(), 3);
        assert!(texts[0] != texts[1] && texts[1] != texts[2]);
        assert_eq!(json["usage"]["completion_tokens"], 15);
    }

    #[test]
    fn a_batch_of_sglangs_own_api_is_a_list() {
        let json = json(&Answer { choices: 2, is_list: true, ..answer(Api::Generate) });
        assert_eq!(json.as_array().map(Vec::len), Some(2));
        assert_eq!(json[1]["meta_info"]["completion_tokens"], 5);
    }
}
