//! A client's request, parsed and checked once: after this, nothing in it can be wrong but the prompt's length.
//!
//! Both legs parse the same body again and so reach the same parameters; the model's facts come in as an argument.

use super::error::RequestError;
use super::fields::{Fields, token};
use super::limits::{
    CACHE_SALT_BYTES_MAX, CHOICES_MAX, COMPLETIONS_MAX_TOKENS_DEFAULT, STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX,
    STOP_TOKENS_MAX,
};
use super::messages::{self, Message};
use super::prompt::{self, Prompt};
use super::sampling;
use super::unserved;
use baton_engine::config::GenerationDefaults;
use baton_engine::sampling::SamplingParams;
use baton_wire::render::Endpoint;
use serde_json::{Map, Value};

/// Keeps a tenant's salts apart from those that clients give where there are no tenants; a change of what is hashed changes the text.
const TENANT_SALT: &str = "baton 2026 tenant cache salt v1";

/// What a request is checked against.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelFacts {
    /// The name towards clients.
    pub name: String,
    /// Tokens that the model has logits for: ids are below this.
    pub vocab_size: u32,
    /// Prompt plus completion, in tokens.
    pub max_model_length: usize,
    /// The publisher's sampling defaults.
    pub defaults: GenerationDefaults,
}

/// A client's request.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What is to be completed.
    pub input: Input,
    /// Whether and how the answer is streamed.
    pub stream: Option<StreamOptions>,
    /// Completions of each prompt.
    pub choices: u32,
    /// The client's seed.
    pub seed: Option<u64>,
    /// Completion tokens of each choice at most, where the client says; they must fit beside the prompt.
    pub max_tokens: Option<usize>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// What ends a choice.
    pub stop: Stop,
    /// Separates prefix caches: equal prompts share KV only under an equal salt.
    pub salt: u64,
}

/// What is to be completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A conversation, rendered by the model's chat template.
    Chat {
        /// The conversation.
        messages: Vec<Message>,
        /// Further variables for this model's template, such as `enable_thinking` (vLLM's `chat_template_kwargs`).
        variables: Map<String, Value>,
    },
    /// Prompts as they stand.
    Completions {
        /// The prompts.
        prompts: Vec<Prompt>,
        /// Whether each completion starts with its prompt.
        echo: bool,
    },
}

/// How an answer is streamed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// Whether a last event carries the usage.
    pub include_usage: bool,
}

/// What ends a choice before its length does.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Stop {
    /// Texts that end it.
    pub strings: Vec<String>,
    /// Tokens that end it besides the model's own.
    pub tokens: Vec<u32>,
    /// Whether the text ends with the stop string.
    pub include_stop_string: bool,
    /// Whether the model's own end-of-sequence tokens are text like any other.
    pub ignore_eos: bool,
}

/// Counts instead of quoting: stop strings are the client's words.
impl std::fmt::Debug for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stop({} strings, {} tokens, ignore_eos: {})", self.strings.len(), self.tokens.len(), self.ignore_eos)
    }
}

impl Request {
    /// Parses and checks a body that was sent to `endpoint`.
    ///
    /// # Errors
    /// The first thing that is wrong, with the parameter's name.
    pub fn parse(endpoint: Endpoint, json: &str, model: &ModelFacts) -> Result<Self, RequestError> {
        let mut fields = Fields::parse(json)?;
        check_model(&mut fields, model)?;
        let input = input(&mut fields, endpoint, model.vocab_size)?;
        let sampling = sampling::take(&mut fields, endpoint, &model.defaults, model.vocab_size)?;
        if matches!(input, Input::Completions { echo: true, .. }) && sampling.logprobs.is_some() {
            return Err(RequestError::Unsupported {
                param: "echo".to_owned(),
                note: " together with logprobs: log-probabilities of prompts are not computed".to_owned(),
            });
        }
        let request = Request {
            input,
            stream: stream(&mut fields)?,
            choices: fields.integer("n", 1..=CHOICES_MAX)?.map_or(1, |n| n as u32),
            seed: seed(&mut fields)?,
            max_tokens: max_tokens(&mut fields, endpoint)?,
            sampling,
            stop: stop(&mut fields, model.vocab_size)?,
            salt: salt(&mut fields)?,
        };
        fields.rest().try_for_each(|(name, value)| unserved::check(&name, &value))?;
        Ok(request)
    }

    /// Where the request was sent.
    pub fn endpoint(&self) -> Endpoint {
        match self.input {
            Input::Chat { .. } => Endpoint::Chat,
            Input::Completions { .. } => Endpoint::Completions,
        }
    }

    /// The request as one of a tenant: its prompts share KV with those of the same tenant under an equal salt alone.
    pub fn of_tenant(mut self, tenant_salt: Option<u64>) -> Self {
        if let Some(tenant_salt) = tenant_salt {
            let mut hasher = blake3::Hasher::new_derive_key(TENANT_SALT);
            hasher.update(&tenant_salt.to_le_bytes());
            hasher.update(&self.salt.to_le_bytes());
            self.salt = first_8_bytes(&hasher.finalize());
        }
        self
    }

    /// Prompts that it has once rendered.
    pub fn num_prompts(&self) -> usize {
        match &self.input {
            Input::Chat { .. } => 1,
            Input::Completions { prompts, .. } => prompts.len(),
        }
    }

    /// Completion tokens that each choice of a prompt may have.
    ///
    /// # Errors
    /// [`RequestError::ContextLengthExceeded`] when the prompt and what the client asks for don't fit into the model.
    pub fn completion_tokens_max(&self, prompt_tokens: usize, model: &ModelFacts) -> Result<usize, RequestError> {
        let left = model.max_model_length.saturating_sub(prompt_tokens);
        let wanted = self.max_tokens.unwrap_or(1);
        let (param, default) = match self.input {
            Input::Chat { .. } => ("messages", left),
            Input::Completions { .. } => ("prompt", COMPLETIONS_MAX_TOKENS_DEFAULT.min(left)),
        };
        if wanted > left {
            return Err(RequestError::ContextLengthExceeded {
                param,
                prompt_tokens,
                completion_tokens: wanted,
                max_model_length: model.max_model_length,
            });
        }
        Ok(self.max_tokens.unwrap_or(default))
    }
}

fn check_model(fields: &mut Fields, model: &ModelFacts) -> Result<(), RequestError> {
    let name = fields.string("model")?.ok_or_else(|| RequestError::Missing { param: "model".to_owned() })?;
    if name == model.name {
        return Ok(());
    }
    Err(RequestError::model_not_found(&name, &model.name))
}

fn input(fields: &mut Fields, endpoint: Endpoint, vocab_size: u32) -> Result<Input, RequestError> {
    Ok(match endpoint {
        Endpoint::Chat => Input::Chat {
            messages: messages::take(fields)?,
            variables: fields.object("chat_template_kwargs")?.map(Fields::into_map).unwrap_or_default(),
        },
        Endpoint::Completions => Input::Completions {
            prompts: prompt::take(fields, vocab_size)?,
            echo: fields.boolean("echo")?.unwrap_or(false),
        },
    })
}

fn stream(fields: &mut Fields) -> Result<Option<StreamOptions>, RequestError> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let Some(mut options) = fields.object("stream_options")? else {
        return Ok(stream.then(StreamOptions::default));
    };
    if !stream {
        let reason = "needs stream to be true";
        return Err(RequestError::Conflict { param: "stream_options".to_owned(), reason });
    }
    let include_usage = options.boolean("include_usage")?.unwrap_or(false);
    // Padding against traffic analysis by a provider's clients; asking for none is what happens anyway.
    if options.boolean("include_obfuscation")? == Some(true) {
        let param = options.path("include_obfuscation");
        return Err(RequestError::Unsupported { param, note: String::new() });
    }
    options.finish()?;
    Ok(Some(StreamOptions { include_usage }))
}

fn max_tokens(fields: &mut Fields, endpoint: Endpoint) -> Result<Option<usize>, RequestError> {
    let mut take = |name| Ok(fields.integer(name, 1..=i64::MAX)?.map(|n| usize::try_from(n).unwrap_or(usize::MAX)));
    let old = take("max_tokens")?;
    let new = match endpoint {
        Endpoint::Chat => take("max_completion_tokens")?,
        Endpoint::Completions => None,
    };
    match (old, new) {
        (Some(old), Some(new)) if old != new => Err(RequestError::Conflict {
            param: "max_tokens".to_owned(),
            reason: "differs from max_completion_tokens; give one of them",
        }),
        (old, new) => Ok(new.or(old)),
    }
}

/// OpenAI's seeds are signed, others' go up to 2^64: both are taken, as the same 64 bits.
fn seed(fields: &mut Fields) -> Result<Option<u64>, RequestError> {
    let Some(value) = fields.value("seed") else { return Ok(None) };
    match value.as_i64().map(i64::cast_unsigned).or(value.as_u64()) {
        Some(seed) => Ok(Some(seed)),
        None => Err(RequestError::WrongType {
            param: "seed".to_owned(),
            expected: "an integer of at most 64 bits",
            found: super::fields::kind(&value),
        }),
    }
}

fn stop(fields: &mut Fields, vocab_size: u32) -> Result<Stop, RequestError> {
    let strings = match fields.value("stop") {
        None => Vec::new(),
        Some(Value::String(text)) => vec![stop_string("stop".to_owned(), Value::String(text))?],
        Some(Value::Array(list)) => {
            check_count("stop", list.len(), "strings", STOP_STRINGS_MAX)?;
            let strings =
                list.into_iter().enumerate().map(|(index, value)| stop_string(format!("stop[{index}]"), value));
            strings.collect::<Result<_, _>>()?
        }
        Some(other) => {
            return Err(RequestError::WrongType {
                param: "stop".to_owned(),
                expected: "a string or an array of strings",
                found: super::fields::kind(&other),
            });
        }
    };
    let tokens = fields.list("stop_token_ids")?.unwrap_or_default();
    check_count("stop_token_ids", tokens.len(), "tokens", STOP_TOKENS_MAX)?;
    let tokens = tokens.iter().map(|value| token("stop_token_ids", value, vocab_size)).collect::<Result<_, _>>()?;
    Ok(Stop {
        strings,
        tokens,
        include_stop_string: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
    })
}

fn stop_string(param: String, value: Value) -> Result<String, RequestError> {
    match value {
        Value::String(text) if text.is_empty() => Err(RequestError::Empty { param }),
        Value::String(text) if text.len() > STOP_STRING_BYTES_MAX => {
            Err(RequestError::TooMany { param, found: text.len(), unit: "bytes", max: STOP_STRING_BYTES_MAX })
        }
        Value::String(text) => Ok(text),
        other => Err(RequestError::WrongType { param, expected: "a string", found: super::fields::kind(&other) }),
    }
}

fn salt(fields: &mut Fields) -> Result<u64, RequestError> {
    let Some(text) = fields.string("cache_salt")? else { return Ok(0) };
    let param = || "cache_salt".to_owned();
    match text.len() {
        0 => Err(RequestError::Empty { param: param() }),
        1..=CACHE_SALT_BYTES_MAX => Ok(first_8_bytes(&blake3::hash(text.as_bytes()))),
        found => Err(RequestError::TooMany { param: param(), found, unit: "bytes", max: CACHE_SALT_BYTES_MAX }),
    }
}

fn first_8_bytes(hash: &blake3::Hash) -> u64 {
    let (first, _) = hash.as_bytes().split_first_chunk::<8>().expect("a hash has 32 bytes");
    u64::from_le_bytes(*first)
}

fn check_count(param: &str, found: usize, unit: &'static str, max: usize) -> Result<(), RequestError> {
    if found <= max { Ok(()) } else { Err(RequestError::TooMany { param: param.to_owned(), found, unit, max }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> ModelFacts {
        ModelFacts {
            name: "tiny".to_owned(),
            vocab_size: 100,
            max_model_length: 64,
            defaults: GenerationDefaults::default(),
        }
    }

    /// A chat request with `rest` added.
    fn chat(rest: &str) -> Result<Request, RequestError> {
        let json = format!(r#"{{"model":"tiny","messages":[{{"role":"user","content":"hi"}}]{rest}}}"#);
        Request::parse(Endpoint::Chat, &json, &model())
    }

    fn completions(rest: &str) -> Result<Request, RequestError> {
        Request::parse(Endpoint::Completions, &format!(r#"{{"model":"tiny","prompt":"hi"{rest}}}"#), &model())
    }

    #[test]
    fn a_request_without_options_has_the_defaults() {
        let request = chat("").expect("valid");
        assert_eq!((request.choices, request.seed, request.stream, request.salt), (1, None, None, 0));
        assert_eq!(request.completion_tokens_max(4, &model()), Ok(60), "chat may fill the context");
        let request = completions("").expect("valid");
        assert_eq!(request.completion_tokens_max(4, &model()), Ok(16));
        assert_eq!(request.completion_tokens_max(60, &model()), Ok(4), "a default is cut to what is left");
    }

    #[test]
    fn what_is_asked_for_must_fit_and_the_error_has_the_numbers() {
        let request = chat(r#","max_completion_tokens":60"#).expect("valid");
        assert_eq!(request.completion_tokens_max(4, &model()), Ok(60));
        let error = request.completion_tokens_max(5, &model()).expect_err("5 + 60 > 64");
        for number in ["64", "5 in its prompt", "60 more"] {
            assert!(error.to_string().contains(number), "{error}");
        }
        assert!(chat("").expect("valid").completion_tokens_max(64, &model()).is_err(), "no room for a single token");
    }

    #[test]
    fn stop_is_a_string_or_a_list() {
        assert_eq!(chat(r#","stop":"a""#).expect("valid").stop.strings, ["a"]);
        assert_eq!(chat(r#","stop":["a","b"]"#).expect("valid").stop.strings, ["a", "b"]);
        let all = r#","stop_token_ids":[3],"ignore_eos":true,"include_stop_str_in_output":true"#;
        let stop = chat(all).expect("valid").stop;
        assert_eq!((stop.tokens, stop.ignore_eos, stop.include_stop_string), (vec![3], true, true));
    }

    #[test]
    fn a_template_gets_the_variables_that_it_is_given() {
        let request = chat(r#","chat_template_kwargs":{"enable_thinking":false}"#).expect("valid");
        let Input::Chat { variables, .. } = request.input else { panic!("it is a chat") };
        assert_eq!(variables.get("enable_thinking"), Some(&Value::Bool(false)));
    }

    #[test]
    fn a_seed_is_any_64_bits() {
        assert_eq!(chat(r#","seed":-1"#).expect("valid").seed, Some(u64::MAX));
        assert_eq!(chat(r#","seed":18446744073709551615"#).expect("valid").seed, Some(u64::MAX));
        assert!(chat(r#","seed":1.5"#).is_err());
    }

    #[test]
    fn a_salt_changes_the_cache_and_nothing_else() {
        let with = |salt: &str| chat(&format!(r#","cache_salt":"{salt}""#)).expect("valid");
        assert_ne!(with("a").salt, with("b").salt);
        assert_eq!(Request { salt: 0, ..with("a") }, chat("").expect("valid"));
    }

    #[test]
    fn tenants_share_no_salt_whatever_their_clients_say() {
        let with = |tenant, salt: &str| {
            let rest = if salt.is_empty() { String::new() } else { format!(r#","cache_salt":"{salt}""#) };
            chat(&rest).expect("valid").of_tenant(tenant).salt
        };
        let all =
            [None, Some(0), Some(1), Some(2)].into_iter().flat_map(|tenant| ["", "a", "b"].map(|salt| (tenant, salt)));
        let salts: std::collections::BTreeSet<u64> = all.map(|(tenant, salt)| with(tenant, salt)).collect();
        assert_eq!(salts.len(), 12, "each pair has its own");
        assert_eq!(with(None, ""), 0, "without a tenant all is as it was");
        assert_eq!(with(Some(1), "a"), with(Some(1), "a"));
    }

    #[test]
    fn what_popular_clients_send_for_nothing_changes_nothing() {
        let nulls = [
            "stop",
            "temperature",
            "top_p",
            "n",
            "max_tokens",
            "max_completion_tokens",
            "seed",
            "stream",
            "stream_options",
            "logprobs",
            "top_logprobs",
            "logit_bias",
            "presence_penalty",
            "frequency_penalty",
            "user",
            "tools",
            "tool_choice",
            "response_format",
            "metadata",
            "service_tier",
            "reasoning_effort",
            "functions",
        ];
        let nulls: String = nulls.iter().map(|name| format!(",\"{name}\":null")).collect();
        let nothing = r#","stop":[],"tools":[],"tool_choice":"none","response_format":{"type":"text"},"logit_bias":{},"user":"u""#;
        let plain = chat("").expect("valid");
        for rest in [nulls.as_str(), nothing, r#","stream":false,"stream_options":null"#] {
            assert_eq!(chat(rest).expect(rest), plain);
        }
        let options = r#","stream":true,"stream_options":{"include_usage":false,"include_obfuscation":false}"#;
        assert_eq!(chat(options).expect("valid").stream, Some(StreamOptions::default()));
        let nulls = r#","suffix":null,"echo":null,"best_of":null,"logprobs":null,"max_tokens":null,"stream":null"#;
        assert_eq!(completions(nulls), completions(""));
    }

    #[test]
    fn each_wrong_field_is_named() {
        for (rest, param) in [
            (r#","n":0"#, "n"),
            (r#","n":9"#, "n"),
            (r#","n":1.5"#, "n"),
            (r#","stream":"yes""#, "stream"),
            (r#","stream_options":{"include_usage":true}"#, "stream_options"),
            (r#","stream":true,"stream_options":{"x":1}"#, "stream_options.x"),
            (r#","max_tokens":0"#, "max_tokens"),
            (r#","max_tokens":1,"max_completion_tokens":2"#, "max_tokens"),
            (r#","min_tokens":2"#, "min_tokens"),
            (r#","stop":3"#, "stop"),
            (r#","stop":["a",""]"#, "stop[1]"),
            (r#","stop_token_ids":[100]"#, "stop_token_ids"),
            (r#","cache_salt":"""#, "cache_salt"),
            (r#","tools":[{}]"#, "tools"),
            (r#","response_format":{"type":"json_object"}"#, "response_format"),
            (r#","prompt":"x""#, "prompt"),
            (r#","wat":1"#, "wat"),
        ] {
            let error = chat(rest).expect_err(rest);
            assert_eq!(error.param(), Some(param), "{rest}: {error}");
        }
        for (rest, param) in [
            (r#","suffix":"x""#, "suffix"),
            (r#","best_of":2"#, "best_of"),
            (r#","echo":true,"logprobs":1"#, "echo"),
            (r#","max_completion_tokens":2"#, "max_completion_tokens"),
        ] {
            assert_eq!(completions(rest).expect_err(rest).param(), Some(param), "{rest}");
        }
    }

    #[test]
    fn malformed_json_is_located() {
        let error = Request::parse(Endpoint::Chat, "{\"model\":\n  tiny}", &model()).expect_err("not JSON");
        assert!(matches!(error, RequestError::MalformedJson { line: 2, column: 4, .. }), "{error:?}");
        assert!(matches!(Request::parse(Endpoint::Chat, "[]", &model()), Err(RequestError::WrongType { .. })));
    }

    #[test]
    fn another_models_name_is_refused_with_ours() {
        let error =
            Request::parse(Endpoint::Completions, r#"{"model":"gpt","prompt":"x"}"#, &model()).expect_err("gpt");
        assert_eq!(error.to_string(), r#"the model "gpt" does not exist; this server has "tiny""#);
    }
}
