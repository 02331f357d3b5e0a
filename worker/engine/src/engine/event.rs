//! What the engine tells its driver: events out of a step, and progress from inside one.

use crate::kv_pool::BlockId;
use crate::request::{FinishReason, RequestId};
use crate::runner::RunError;
use crate::sampling::SampledToken;

/// Blocks with the generation under which they are held, in the order of the prompt's tokens.
pub type HeldBlocks = Vec<(BlockId, u64)>;

/// Something that happened to a request.
#[derive(Clone, Debug)]
pub enum Event {
    /// Blocks are reserved for an import's whole prompt.
    ImportReady {
        /// Which request.
        id: RequestId,
        /// Destination of the prompt's KV.
        blocks: HeldBlocks,
        /// Leading blocks that already hold the right KV and must not be written.
        cached_blocks: usize,
    },
    /// More of a prefill's KV can be exported, in all layers.
    Computed {
        /// Which request.
        id: RequestId,
        /// Blocks of the first `tokens` tokens.
        blocks: HeldBlocks,
        /// Leading prompt tokens whose KV is complete.
        tokens: usize,
    },
    /// A prefill is complete. Its blocks stay held until [`crate::engine::Engine::release`].
    PrefillDone {
        /// Which request.
        id: RequestId,
        /// Prompt tokens that the prefix cache had.
        cached_tokens: usize,
        /// The first token of each choice.
        first: Vec<SampledToken>,
    },
    /// A choice has a new token.
    Token {
        /// Which request.
        id: RequestId,
        /// Which of its choices.
        choice: u32,
        /// The token.
        token: SampledToken,
        /// Set on the choice's last token.
        finish: Option<FinishReason>,
        /// On the first token that the choice gets here: prompt tokens that a prefix cache had (that of the prefill worker, after an
        /// import).
        cached_tokens: Option<usize>,
    },
    /// The request is over, and its blocks are free.
    Failed {
        /// Which request.
        id: RequestId,
        /// Why.
        error: RunError,
    },
}

/// How far one prefill request's KV is in the layer that just completed.
#[derive(Clone, Copy, Debug)]
pub struct ExportProgress<'a> {
    /// Which request.
    pub id: RequestId,
    /// Blocks of the first `tokens` tokens.
    pub blocks: &'a [(BlockId, u64)],
    /// Leading prompt tokens whose KV is complete in this layer.
    pub tokens: usize,
}

/// Told from inside a step, on the engine's thread, so that KV leaves while later layers compute. Must not block.
pub trait StepHook {
    /// A layer is complete; `exports` has the step's prefill requests, and the call is left out where there are none.
    fn layer_done(&mut self, layer: usize, exports: &[ExportProgress<'_>]);
}

/// A hook for those who don't export.
impl StepHook for () {
    fn layer_done(&mut self, _layer: usize, _exports: &[ExportProgress<'_>]) {}
}

/// What the engine has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Sequences being computed.
    pub running: usize,
    /// Sequences waiting for room, those preempted included; and imports that wait for their KV.
    pub waiting: usize,
    /// Prompt tokens that still have to be computed here, waiting and running.
    pub queued_prompt_tokens: usize,
    /// KV blocks that somebody holds.
    pub blocks_used: usize,
    /// KV blocks in all.
    pub blocks_total: usize,
}

/// Totals since the engine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Forward passes.
    pub steps: u64,
    /// Forward passes that failed.
    pub failed_steps: u64,
    /// Sequences that lost their blocks to older ones and were computed again.
    pub preemptions: u64,
    /// Prompt tokens that were looked up in the prefix cache.
    pub prefix_query_tokens: u64,
    /// Of those, found.
    pub prefix_hit_tokens: u64,
    /// Tokens computed in prefill chunks, those computed again after a preemption included.
    pub computed_prompt_tokens: u64,
    /// Tokens sampled here (first tokens of imports were sampled elsewhere).
    pub generated_tokens: u64,
}
