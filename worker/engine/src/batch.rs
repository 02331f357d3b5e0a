//! One step's work as integers: what the scheduler hands to the runner. No tensors, no policy.

use crate::kv_pool::BlockId;

/// A ragged batch: prefill chunks and decode steps of many sequences, mixed, without padding or a batch dimension.
///
/// With `T` tokens of `B` sequences, sequence `b` owns tokens `cu_seqlens_q[b] .. cu_seqlens_q[b + 1]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids. `[T]`
    pub tokens: Vec<u32>,
    /// Absolute position of each token in its sequence. `[T]`
    pub positions: Vec<u32>,
    /// Running sums of the sequences' token counts, starting at 0. `[B + 1]`
    pub cu_seqlens_q: Vec<u32>,
    /// Tokens of each sequence in the KV cache once this step has written its own. `[B]`
    pub context_lens: Vec<u32>,
    /// Blocks of each sequence, in order; enough for its context. `[B]`
    pub block_tables: Vec<Vec<BlockId>>,
    /// Where each token's K and V go: `block * block_tokens + offset`. `[T]`
    pub slot_mapping: Vec<u64>,
    /// Indices into `tokens` whose logits are wanted, ascending. A row may be asked for several times (`n` choices).
    pub logit_rows: Vec<u32>,
}

impl Batch {
    /// Sequences in the batch.
    pub fn num_sequences(&self) -> usize {
        self.context_lens.len()
    }

    /// Tokens in the batch.
    pub fn num_tokens(&self) -> usize {
        self.tokens.len()
    }
}
