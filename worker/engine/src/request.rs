//! What the engine is asked to do: one prompt, how to continue it and which part of the work is wanted here.
//!
//! Knows token ids and numbers. Text, HTTP bodies and who is on the other side of a handover are the worker's business.

use crate::sampling::SamplingParams;

/// Names a request between [`crate::engine::Engine::submit`] and its last event. The caller's own; unique among the open ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// One prompt to be worked on.
#[derive(Clone, Debug)]
pub struct Request {
    /// Names it in every event.
    pub id: RequestId,
    /// The prompt's token ids; at least one.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Completions wanted of the one prompt (`n`); at least 1. The prompt is computed once for all of them.
    pub choices: u32,
    /// Random draws are a function of (seed, choice, position).
    pub seed: u64,
    /// Tokens each choice may generate; at least 1. Cut to what the context still holds after the prompt.
    pub max_tokens: usize,
    /// Tokens that end a choice (reported, then nothing more): the model's end-of-sequence ids unless the client ignores them, and
    /// the client's own.
    pub stop_tokens: Vec<u32>,
    /// Enters every block hash of this prompt, so that callers with different salts never share a prefix.
    pub salt: u64,
    /// Which part of the work is wanted.
    pub kind: RequestKind,
    /// Where the completions were begun elsewhere, what each choice has generated there; `None` for one that is over. They count as
    /// generated in every respect and are not told again. Empty where they begin here; only for [`RequestKind::Generate`].
    pub resumed: Vec<Option<Vec<u32>>>,
}

impl Request {
    /// Whether `resumed`, whose longest choice that goes on has `begun` tokens, can be gone on with.
    pub(crate) fn resumed_fits(&self, begun: usize) -> bool {
        let some_go_on = self.resumed.iter().any(Option::is_some);
        self.kind == RequestKind::Generate
            && self.resumed.len() == self.choices as usize
            && some_go_on
            && begun < self.max_tokens
    }

    /// Whether a choice ends with `token` as the `generated`th of its tokens.
    pub fn finish_after(&self, token: u32, generated: usize) -> Option<FinishReason> {
        if self.stop_tokens.contains(&token) {
            Some(FinishReason::Stop)
        } else if generated >= self.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}

/// Which part of a request's work is wanted here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// All of it: compute the prompt, then generate.
    Generate,
    /// Compute the prompt, sample the first token of each choice, then keep the blocks until
    /// [`crate::engine::Engine::release`].
    Prefill,
    /// Generate from a prompt whose KV is written from outside: blocks are reserved and announced, and generation starts at
    /// [`crate::engine::Engine::commit_import`].
    Import,
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// It generated one of the request's stop tokens.
    Stop,
    /// It generated as many tokens as it may, or the context is full.
    Length,
}

/// Why a request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// There is nothing to continue.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// No room for even one generated token.
    #[error("the prompt has {tokens} tokens, and prompt plus completion may have at most {max_model_length}")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens that the model's context holds.
        max_model_length: usize,
    },
    /// The KV cache as a whole is too small for this prompt and one token more.
    #[error("the prompt needs {blocks} KV blocks and the cache has {blocks_total}")]
    PromptNeverFits {
        /// Blocks for the prompt and one token.
        blocks: usize,
        /// Blocks there are.
        blocks_total: usize,
    },
    /// More choices than sequences may run at once.
    #[error("{choices} choices were asked for, and at least 1 and at most {max} are possible")]
    ChoicesOutOfRange {
        /// Choices asked for.
        choices: u32,
        /// Sequences that may run at once.
        max: usize,
    },
    /// `max_tokens` is 0.
    #[error("max_tokens must be at least 1")]
    NoTokensWanted,
    /// What was generated elsewhere is not of such a request: of other choices, of none that goes on, as long as may be, or not to be
    /// generated here.
    #[error("what was generated elsewhere does not fit the request")]
    ResumedMisfit,
    /// As many requests wait as may.
    #[error("{waiting} requests are waiting already")]
    QueueFull {
        /// Requests that wait.
        waiting: usize,
    },
    /// The id names a request that is still open.
    #[error("request id {} is in use", .0.0)]
    DuplicateId(RequestId),
}
