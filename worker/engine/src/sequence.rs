//! One choice of one request as the scheduler sees it: tokens, how many of them have KV, and in which blocks.
//!
//! Until the prompt is computed a request is one sequence that stands for all its choices (`forks`); then it splits.

use crate::kv_pool::{BLOCK_TOKENS, BlockId};
use crate::prefix_hash::{self, BlockHash};
use crate::request::RequestKind;
use std::sync::Arc;

/// Names a sequence. The order is the order of service: first come (`arrival`), first served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId {
    /// Counts the requests as they come; all choices of a request share it.
    pub arrival: u64,
    /// Which choice; 0 before the split.
    pub choice: u32,
}

/// One sequence.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// What is wanted of it. An import that was committed or given up is a `Generate` from then on.
    pub kind: RequestKind,
    /// Choices that this sequence will split into when its first token is sampled; 1 from then on.
    pub forks: u32,
    /// Blocks that hold, or are reserved for, its KV, in order.
    pub block_table: Vec<BlockId>,
    /// Leading tokens whose KV is in the blocks.
    pub num_computed: usize,
    /// Leading tokens that the prefix cache had when the sequence was first admitted; `None` before.
    pub num_cached: Option<usize>,
    prompt: Arc<[u32]>,
    generated: Vec<u32>,
    salt: u64,
    hashes: Vec<BlockHash>,
}

impl Sequence {
    /// A sequence of which nothing is computed.
    pub fn new(prompt: Arc<[u32]>, salt: u64, kind: RequestKind, choices: u32) -> Self {
        Sequence {
            kind,
            forks: choices,
            block_table: Vec::new(),
            num_computed: 0,
            num_cached: None,
            prompt,
            generated: Vec::new(),
            salt,
            hashes: Vec::new(),
        }
    }

    /// One choice of a request whose completion was begun elsewhere.
    pub fn resumed(prompt: Arc<[u32]>, generated: Vec<u32>, salt: u64) -> Self {
        Sequence { generated, ..Sequence::new(prompt, salt, RequestKind::Generate, 1) }
    }

    /// Tokens of prompt and completion.
    pub fn num_tokens(&self) -> usize {
        self.prompt.len() + self.generated.len()
    }

    /// Tokens whose KV is still to be computed. 1 is a decode step (or as cheap as one).
    pub fn num_uncomputed(&self) -> usize {
        self.num_tokens() - self.num_computed
    }

    /// The prompt.
    pub fn prompt(&self) -> &[u32] {
        &self.prompt
    }

    /// Tokens generated so far.
    pub fn generated(&self) -> &[u32] {
        &self.generated
    }

    /// The token at `index` of prompt and completion.
    pub fn token(&self, index: usize) -> u32 {
        match index.checked_sub(self.prompt.len()) {
            None => self.prompt[index],
            Some(index) => self.generated[index],
        }
    }

    /// Adds a generated token.
    pub fn push(&mut self, token: u32) {
        self.generated.push(token);
    }

    /// The hashes of the first `blocks` blocks, which must be full.
    pub fn hashes(&mut self, blocks: usize) -> &[BlockHash] {
        debug_assert!(blocks * BLOCK_TOKENS <= self.num_tokens(), "only full blocks have hashes");
        while self.hashes.len() < blocks {
            let start = self.hashes.len() * BLOCK_TOKENS;
            let block: Vec<u32> = (start..start + BLOCK_TOKENS).map(|index| self.token(index)).collect();
            let parent = self.hashes.last().copied().unwrap_or_else(|| prefix_hash::root(self.salt));
            self.hashes.push(prefix_hash::chain(parent, &block));
        }
        &self.hashes[..blocks]
    }
}
