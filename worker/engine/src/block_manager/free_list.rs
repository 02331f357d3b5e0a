//! The free blocks in the order in which they are given out: a doubly linked list in two vectors, so that a block found by its hash
//! leaves the middle in constant time. The design is that of vLLM's `FreeKVCacheBlockQueue` (`vllm/v1/core/kv_cache_utils.py`).

/// Links of every block; index `n` (one past the last block) is both ends of the list.
#[derive(Debug)]
pub(super) struct FreeList {
    next: Vec<u32>,
    previous: Vec<u32>,
    len: usize,
}

impl FreeList {
    /// All of `num_blocks` blocks, lowest first.
    pub(super) fn full(num_blocks: usize) -> Self {
        let ends = u32::try_from(num_blocks).expect("a pool has fewer than 2^32 blocks");
        let mut list = FreeList { next: (0..=ends).collect(), previous: (0..=ends).collect(), len: 0 };
        (0..ends).for_each(|block| list.push_back(block));
        list
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Adds a block that is given out last.
    pub(super) fn push_back(&mut self, block: u32) {
        let ends = self.ends();
        self.link(self.previous[ends as usize], block, ends);
    }

    /// Adds a block that is given out next.
    pub(super) fn push_front(&mut self, block: u32) {
        let ends = self.ends();
        self.link(ends, block, self.next[ends as usize]);
    }

    pub(super) fn pop_front(&mut self) -> Option<u32> {
        let first = self.next[self.ends() as usize];
        (first != self.ends()).then(|| {
            self.remove(first);
            first
        })
    }

    /// Takes out a block that is in the list.
    pub(super) fn remove(&mut self, block: u32) {
        let (before, after) = (self.previous[block as usize], self.next[block as usize]);
        self.next[before as usize] = after;
        self.previous[after as usize] = before;
        self.len -= 1;
    }

    fn ends(&self) -> u32 {
        (self.next.len() - 1) as u32
    }

    fn link(&mut self, before: u32, block: u32, after: u32) {
        self.next[before as usize] = block;
        self.previous[block as usize] = before;
        self.next[block as usize] = after;
        self.previous[after as usize] = block;
        self.len += 1;
    }
}
