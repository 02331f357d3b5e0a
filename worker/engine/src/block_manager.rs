//! Who holds which KV block, as integers: reference counts, free blocks in LRU order, and which block holds which prefix.
//!
//! A block is *held* (one or more sequences count on it) or *free*. A free block that still has a name (its [`BlockHash`]) is part of
//! the prefix cache: it can be held again as it is, until it is given out for new content. The design follows vLLM's `BlockPool`
//! (`vllm/v1/core/block_pool.py`). Bytes, generations and sequences are unknown here.

mod free_list;
#[cfg(test)]
mod tests;

use crate::kv_pool::BlockId;
use crate::prefix_hash::BlockHash;
use free_list::FreeList;
use std::collections::HashMap;

/// The books of a pool of blocks.
#[derive(Debug)]
pub struct BlockManager {
    blocks: Vec<Block>,
    free: FreeList,
    cached: HashMap<BlockHash, BlockId>,
    prefix_cache: bool,
    /// What has changed in `cached` since somebody last asked, in order; `None` until somebody has asked for it to be recorded.
    changes: Option<Vec<CacheChange>>,
}

/// A change of what the prefix cache can answer for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheChange {
    /// A block with this name can be found from now on.
    Stored(BlockHash),
    /// It can't any more.
    Removed(BlockHash),
}

#[derive(Clone, Copy, Debug, Default)]
struct Block {
    /// Sequences that hold it; 0 is free.
    ref_count: u32,
    /// Its name, if `cached` leads here.
    hash: Option<BlockHash>,
}

impl BlockManager {
    /// Books for `num_blocks` free blocks. Without `prefix_cache` no block ever gets a name.
    pub fn new(num_blocks: usize, prefix_cache: bool) -> Self {
        BlockManager {
            blocks: vec![Block::default(); num_blocks],
            free: FreeList::full(num_blocks),
            cached: HashMap::new(),
            prefix_cache,
            changes: None,
        }
    }

    /// Blocks in all.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody holds, those with a name included.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Sequences that hold `block`.
    pub fn ref_count(&self, block: BlockId) -> u32 {
        self.blocks[block.0 as usize].ref_count
    }

    /// Takes the free block that was used longest ago for new content; its old name is forgotten. `None` when all are held.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let index = self.free.pop_front()?;
        let block = &mut self.blocks[index as usize];
        block.ref_count = 1;
        if let Some(hash) = block.hash.take() {
            self.cached.remove(&hash);
            self.note(CacheChange::Removed(hash));
        }
        Some(BlockId(index))
    }

    /// Holds `block` once more, as it is: a fork of a sequence, or a block of [`BlockManager::cached_prefix`].
    pub fn share(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        if block.ref_count == 0 {
            assert!(block.hash.is_some(), "a free block without a name has no content to share");
            self.free.remove(id.0);
        }
        block.ref_count += 1;
    }

    /// Ends one hold. The last one frees the block: with a name it is kept as long as possible, without one it is reused next.
    ///
    /// # Panics
    /// When nobody holds the block: two owners would then be given it.
    pub fn release(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        assert!(block.ref_count > 0, "block {} was freed twice", id.0);
        block.ref_count -= 1;
        if block.ref_count == 0 {
            match block.hash {
                Some(_) => self.free.push_back(id.0),
                None => self.free.push_front(id.0),
            }
        }
    }

    /// Ends a sequence's hold on its block table. The last blocks are freed first, hence evicted first: a prefix is worth more the
    /// shorter it is, and a chain without its beginning cannot be found.
    pub fn release_all(&mut self, block_table: impl IntoIterator<Item = BlockId, IntoIter: DoubleEndedIterator>) {
        block_table.into_iter().rev().for_each(|block| self.release(block));
    }

    /// Gives a held block, whose content is now complete and final, its name. Where another block has that name already this one
    /// stays nameless: the content is the same.
    pub fn publish(&mut self, id: BlockId, hash: BlockHash) {
        let block = &mut self.blocks[id.0 as usize];
        debug_assert!(block.ref_count > 0, "only a holder publishes");
        if self.prefix_cache && block.hash.is_none() && !self.cached.contains_key(&hash) {
            block.hash = Some(hash);
            self.cached.insert(hash, id);
            self.note(CacheChange::Stored(hash));
        }
    }

    /// The blocks that hold the longest known beginning of a sequence with these hashes. They are not held yet: [`BlockManager::share`]
    /// them before anything is allocated.
    pub fn cached_prefix(&self, hashes: &[BlockHash]) -> Vec<BlockId> {
        hashes.iter().map_while(|hash| self.cached.get(hash).copied()).collect()
    }

    /// The names of all blocks in the prefix cache, in no order.
    pub fn cached_hashes(&self) -> impl Iterator<Item = BlockHash> {
        self.cached.keys().copied()
    }

    /// From now on changes are kept until they are taken. Whoever asks for this takes them after each step: in one step each block
    /// loses one name and gets another at most a few times, so that is what is kept.
    pub fn record_changes(&mut self) {
        self.changes.get_or_insert_default();
    }

    /// The changes since this was last called, in the order in which they happened.
    pub fn take_changes(&mut self) -> Vec<CacheChange> {
        self.changes.as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn note(&mut self, change: CacheChange) {
        if let Some(changes) = &mut self.changes {
            changes.push(change);
        }
    }
}
