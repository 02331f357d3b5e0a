//! What a step consists of, before it is run: the scheduler's decision as plain data.

use crate::kv_pool::BlockId;
use crate::sequence::SequenceId;

/// One step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Blocks that were given out for new content, to be marked as such before anything is written. One that changed hands twice
    /// in this step is in it twice.
    pub fresh: Vec<BlockId>,
    /// Copies to be made, in this order, before anything is written.
    pub copies: Vec<BlockCopy>,
    /// Sequences admitted in this step whose blocks somebody outside waits for: all imports, and prefills with a cached prefix. A
    /// plan that has some has no chunks, so that they are told at once and not after a forward pass.
    pub announced: Vec<SequenceId>,
    /// What is computed, decode steps first.
    pub chunks: Vec<Chunk>,
}

/// A block's content is wanted in another block too (copy-on-write).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// Source.
    pub from: BlockId,
    /// Destination.
    pub to: BlockId,
}

/// Tokens of one sequence that a step computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Whose.
    pub sequence: SequenceId,
    /// Index of the first token.
    pub start: usize,
    /// Tokens; at least one.
    pub len: usize,
    /// Tokens to be sampled after the last one: 0 while tokens of the sequence remain, else one for each choice it stands for.
    pub samples: u32,
}

impl Plan {
    /// Nothing can be done until somebody outside acts (an import is committed, a prefill released, a request submitted).
    pub fn is_stuck(&self) -> bool {
        self.chunks.is_empty() && self.announced.is_empty()
    }

    /// Tokens that the step computes.
    pub fn num_tokens(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.len).sum()
    }
}
