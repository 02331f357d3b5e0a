//! From logits to a token: a pure function of (logits, parameters, history, seed, choice, position).

/// What one row of logits is sampled with.
#[derive(Clone, Debug)]
pub struct SampleRow<'a> {
    /// Parameters of the request.
    pub params: &'a SamplingParams,
    /// The prompt's tokens (repetition penalty counts them; presence and frequency penalties do not).
    pub prompt: &'a [u32],
    /// Tokens generated so far in this choice.
    pub generated: &'a [u32],
    /// The request's seed.
    pub seed: u64,
    /// Index of the choice (`n`).
    pub choice: u32,
}

/// How a request wants its tokens chosen. `Default` is greedy-free OpenAI defaults: temperature 1, no truncation.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the `top_k` likeliest; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this likely relative to the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Divides (positive) or multiplies (negative) logits of tokens seen in prompt or completion; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens in the completion.
    pub presence_penalty: f32,
    /// Subtracted from logits of tokens in the completion, times their count.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens; ascending by token.
    pub logit_bias: Vec<(u32, f32)>,
    /// Report the log-probability of the chosen token and of this many of the likeliest ones.
    pub logprobs: Option<u32>,
    /// Report a hash of the raw logits (tests of bitwise equality).
    pub logits_hash: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            logprobs: None,
            logits_hash: false,
        }
    }
}

/// A sampled token.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// The token.
    pub id: u32,
    /// Natural log of its probability under the raw logits (before temperature, penalties and truncation), where asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens with theirs, likeliest first, where asked for.
    pub top_logprobs: Vec<(u32, f32)>,
    /// Hash of the raw logits, where asked for.
    pub logits_hash: Option<u64>,
}
