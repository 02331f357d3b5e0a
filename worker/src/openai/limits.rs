//! How much one request may ask for: every bound of the client API, each with where it comes from.

/// Bytes of a request's body. A prompt of 128k tokens is about 0.6 MB of English; this leaves room for escapes and for
/// scripts of three bytes a character.
pub const BODY_BYTES_MAX: usize = 4 << 20;

/// Choices (`n`) of one prompt. Each is a sequence of its own in the batch: more would let one request fill it.
pub const CHOICES_MAX: i64 = 8;

/// Prompts of one completions request. With [`CHOICES_MAX`] it bounds the sequences that one request can queue.
pub const PROMPTS_MAX: usize = 64;

/// Messages of one chat request. Templates concatenate in quadratic time at worst.
pub const MESSAGES_MAX: usize = 4096;

/// Stop strings. OpenAI takes 4; vLLM's clients send a few more. Each is compared with every token's text.
pub const STOP_STRINGS_MAX: usize = 16;

/// Bytes of one stop string. That much text may be held back from the client while it could still become the stop string.
pub const STOP_STRING_BYTES_MAX: usize = 1024;

/// Stop tokens in `stop_token_ids`; compared with every token.
pub const STOP_TOKENS_MAX: usize = 64;

/// Alternatives reported for each token (`top_logprobs`), as in the OpenAI API.
pub const TOP_LOGPROBS_MAX: i64 = 20;

/// Entries of `logit_bias`, as in the OpenAI API.
pub const LOGIT_BIAS_MAX: usize = 300;

/// Bytes of `cache_salt`: a random identifier is under 64.
pub const CACHE_SALT_BYTES_MAX: usize = 256;

/// Tokens that `/v1/completions` generates where the request doesn't say, as in the OpenAI API.
pub const COMPLETIONS_MAX_TOKENS_DEFAULT: usize = 16;

/// Characters of a client's text that a message may repeat (a model's name, a field's name).
pub const ECHO_CHARS_MAX: usize = 80;

/// A range of numbers.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// Lower end.
    pub min: f64,
    /// Whether the lower end itself is excluded.
    pub above_min: bool,
    /// Upper end, included.
    pub max: f64,
}

impl Range {
    const fn closed(min: f64, max: f64) -> Self {
        Range { min, above_min: false, max }
    }

    const fn above(min: f64, max: f64) -> Self {
        Range { min, above_min: true, max }
    }

    /// Whether `value` lies inside. A NaN lies nowhere.
    pub fn contains(&self, value: f64) -> bool {
        value <= self.max && if self.above_min { value > self.min } else { value >= self.min }
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let from = if self.above_min { "above" } else { "at least" };
        write!(f, "{from} {} and at most {}", self.min, self.max)
    }
}

/// `temperature`, as in the OpenAI API.
pub const TEMPERATURE: Range = Range::closed(0.0, 2.0);
/// `top_p`: 0 would keep nothing.
pub const TOP_P: Range = Range::above(0.0, 1.0);
/// `min_p`.
pub const MIN_P: Range = Range::closed(0.0, 1.0);
/// `presence_penalty` and `frequency_penalty`, as in the OpenAI API.
pub const PENALTY: Range = Range::closed(-2.0, 2.0);
/// `repetition_penalty`: a divisor of logits, so above 0; beyond 100 nothing is left to penalise.
pub const REPETITION_PENALTY: Range = Range::above(0.0, 100.0);
/// Values of `logit_bias`, as in the OpenAI API.
pub const LOGIT_BIAS: Range = Range::closed(-100.0, 100.0);
