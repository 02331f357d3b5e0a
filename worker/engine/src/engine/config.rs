//! The engine's limits.

use crate::kv_pool::BLOCK_TOKENS;

/// The engine's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// KV blocks that may be used; at most those of the pool.
    pub num_blocks: usize,
    /// Tokens a step computes at most, prefill chunks and decode steps together.
    pub max_batch_tokens: usize,
    /// Sequences that run at once at most; each choice of a request is one.
    pub max_num_seqs: usize,
    /// Tokens of one prompt that a step computes at most; a multiple of [`BLOCK_TOKENS`]. Smaller lets KV leave earlier and keeps
    /// decode steps even, larger computes prompts faster.
    pub prefill_chunk_tokens: usize,
    /// Whether prompts reuse the KV of equal beginnings.
    pub prefix_cache: bool,
    /// Requests that wait for admission at most; those preempted don't count.
    pub max_waiting: usize,
}

impl Default for EngineConfig {
    /// The worker's defaults, on a pool of 1024 blocks.
    fn default() -> Self {
        EngineConfig {
            num_blocks: 1024,
            max_batch_tokens: 512,
            max_num_seqs: 64,
            prefill_chunk_tokens: 256,
            prefix_cache: true,
            max_waiting: 1024,
        }
    }
}

/// Limits that contradict each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// `num_blocks` is 0 or more than there are.
    #[error("num_blocks is {num_blocks}, and the pool has {pool_blocks}: give at least 1 and at most that")]
    NumBlocks {
        /// Blocks configured.
        num_blocks: usize,
        /// Blocks in the pool.
        pool_blocks: usize,
    },
    /// `max_num_seqs` is 0.
    #[error("max_num_seqs must be at least 1")]
    NoSequences,
    /// A full house of decode steps would leave no room for one block of a prompt, and prompts would starve.
    #[error("max_batch_tokens is {max_batch_tokens}, and must be at least max_num_seqs + {BLOCK_TOKENS} = {min}")]
    BatchTooSmall {
        /// Tokens configured.
        max_batch_tokens: usize,
        /// The least that works.
        min: usize,
    },
    /// Chunks end where blocks end.
    #[error("prefill_chunk_tokens is {prefill_chunk_tokens}, and must be a positive multiple of {BLOCK_TOKENS}")]
    ChunkNotWholeBlocks {
        /// Tokens configured.
        prefill_chunk_tokens: usize,
    },
}

impl EngineConfig {
    /// Checks that the limits fit each other and a pool of `pool_blocks`.
    ///
    /// # Errors
    /// The first contradiction found.
    pub fn check(&self, pool_blocks: usize) -> Result<(), ConfigError> {
        let EngineConfig {
            num_blocks,
            max_batch_tokens,
            max_num_seqs,
            prefill_chunk_tokens,
            prefix_cache: _,
            max_waiting: _,
        } = *self;
        let min = max_num_seqs + BLOCK_TOKENS;
        if num_blocks == 0 || num_blocks > pool_blocks {
            Err(ConfigError::NumBlocks { num_blocks, pool_blocks })
        } else if max_num_seqs == 0 {
            Err(ConfigError::NoSequences)
        } else if max_batch_tokens < min {
            Err(ConfigError::BatchTooSmall { max_batch_tokens, min })
        } else if prefill_chunk_tokens == 0 || prefill_chunk_tokens % BLOCK_TOKENS != 0 {
            Err(ConfigError::ChunkNotWholeBlocks { prefill_chunk_tokens })
        } else {
            Ok(())
        }
    }
}
